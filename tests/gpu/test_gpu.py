"""The unit of work on a real GPU, against the CPU: subspaces and energies, since bytes are promised per device class."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from phlora_pipeline import extract
from phlora_pipeline.checkpoint import open_checkpoint, read_tensors
from phlora_pipeline.errors import DeviceError
from phlora_pipeline.parts import TensorResult
from phlora_pipeline.plan import Block, Task, TensorPair
from phlora_pipeline.targets import kind_of, module_of
from phlora_pipeline.verify import verify
from tests import runs, toys

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device on this machine"),
]

DEVICE = "cuda"


@pytest.fixture
def gapped(tmp_path: Path) -> tuple[Path, Path]:
    """Updates with a gap after the eighth singular value, so that the leading subspaces are well determined."""
    base = toys.llama_tensors(hidden=128, kv=64, inner=192, vocab=256)
    tuned = dict(base)
    for seed, (name, value) in enumerate(base.items()):
        if value.ndim == 2:
            spectrum = torch.cat([torch.linspace(2, 1, 8), torch.linspace(0.1, 0.01, min(value.shape) - 8)])
            tuned[name] = value + toys.with_spectrum(*value.shape, spectrum, seed=seed).float()
    return toys.save(tmp_path / "base", base), toys.save(tmp_path / "tuned", tuned)


def compute(
    folders: tuple[Path, Path], device: str, *, max_rank: int
) -> tuple[list[TensorResult], dict[str, tuple[Tensor, Tensor]]]:
    """The task of one shape: q_proj and o_proj of both layers."""
    base, tuned = (open_checkpoint(str(folder)).tensors for folder in folders)
    names = [name for name, ref in sorted(tuned.items()) if ref.shape == (128, 128)]
    pairs = tuple(TensorPair(module_of(name), kind_of(name, (128, 128)), base[name], tuned[name]) for name in names)
    task = Task(Block("block", "factor", pairs), "/nowhere", max_rank, "exact")
    stored = read_tensors([ref for pair in pairs for ref in (pair.base, pair.tuned)])
    return extract.compute(task, stored, torch.device(device))


def test_subspaces_and_energies_are_those_of_the_cpu(gapped: tuple[Path, Path]) -> None:
    there, factors = compute(gapped, DEVICE, max_rank=8)
    here, expected = compute(gapped, "cpu", max_rank=8)
    assert len(here) == 4
    for one, other in zip(there, here, strict=True):
        assert (one.name, one.status, one.solver) == (other.name, other.status, other.solver)
        assert one.delta_sq == pytest.approx(other.delta_sq, rel=1e-10)
        assert one.base_sq == pytest.approx(other.base_sq, rel=1e-10)
        assert one.residual_sq == pytest.approx(other.residual_sq, rel=1e-3)
        assert one.singular_values == pytest.approx(other.singular_values, rel=1e-4)
    for name, (A, B) in factors.items():
        A_cpu, B_cpu = expected[name]
        assert A.device.type == B.device.type == "cpu"
        # The projectors on rows and columns, and the product: what does not depend on signs or order.
        for mine, theirs in ((A.mT, A_cpu.mT), (B, B_cpu)):
            Q, Q_cpu = (torch.linalg.qr(side.double())[0] for side in (mine, theirs))
            assert torch.dist(Q @ Q.mT, Q_cpu @ Q_cpu.mT) < 1e-3
        assert torch.dist(B @ A, B_cpu @ A_cpu) < 1e-3 * torch.linalg.norm(B_cpu @ A_cpu)


def test_the_same_bytes_every_time(gapped: tuple[Path, Path], tmp_path: Path) -> None:
    for out in ("one", "two"):
        runs.extract(*gapped, tmp_path / out, device=DEVICE, dtype="bfloat16")
    assert runs.contents(tmp_path / "one") == runs.contents(tmp_path / "two")


def test_the_adapter_is_as_good_as_the_cpus(gapped: tuple[Path, Path], tmp_path: Path) -> None:
    for device in (DEVICE, "cpu"):
        runs.extract(*gapped, tmp_path / device, device=device)
        assert verify(str(gapped[0]), str(gapped[1]), str(tmp_path / device), device=device).passed
    there, here = (runs.rows(tmp_path / device) for device in (DEVICE, "cpu"))
    for name, row in here.items():
        assert there[name].status == row.status
        assert there[name].written_energy == pytest.approx(row.written_energy, abs=1e-5)
    shapes = [
        {key: value.shape for key, value in load_file(tmp_path / device / "adapter_model.safetensors").items()}
        for device in (DEVICE, "cpu")
    ]
    assert shapes[0] == shapes[1]


@pytest.mark.ray
@pytest.mark.slow
def test_ray_gives_a_gpu_to_its_actor(
    gapped: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    for engine in ("local", "ray"):
        runs.extract(*gapped, tmp_path / engine, engine=engine, device=DEVICE)
    assert runs.contents(tmp_path / "local") == runs.contents(tmp_path / "ray")


def test_a_gpu_that_is_not_there_is_named() -> None:
    with pytest.raises(DeviceError, match=r"cuda:99 is not there: torch sees \d+ CUDA devices"):
        extract.Worker("cuda:99", 1)
