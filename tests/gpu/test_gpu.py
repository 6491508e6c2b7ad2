"""The unit of work on a real GPU, against float64 on the CPU: subspaces and energies, since bytes are promised per device class."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from phlora_pipeline import extract, lowrank
from phlora_pipeline.checkpoint import open_checkpoint, read_tensors
from phlora_pipeline.errors import DeviceError
from phlora_pipeline.lowrank import Factors, Outcome, Settings
from phlora_pipeline.parts import TensorResult
from phlora_pipeline.plan import Block, Member, TensorPair
from phlora_pipeline.reading import Reader
from phlora_pipeline.targets import kind_of, module_of
from phlora_pipeline.verify import verify
from tests import runs, toys
from tests.lowrank.cases import delta_of, energies_of, left_by, loss_of, pair_of

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
    folders: tuple[Path, Path], device: str, *, max_rank: int, solver: Any = "auto"
) -> tuple[list[TensorResult], dict[str, tuple[Tensor, Tensor]]]:
    """The task of one shape: q_proj and o_proj of both layers."""
    base, tuned = (open_checkpoint(str(folder)).tensors for folder in folders)
    names = [name for name, ref in sorted(tuned.items()) if ref.shape == (128, 128)]
    pairs = tuple(TensorPair(module_of(name), kind_of(name, (128, 128)), base[name], tuned[name]) for name in names)
    settings = Settings(max_rank, solver)
    member = Member("", Block("block", "factor", pairs), "/nowhere", settings)
    stored = read_tensors([ref for pair in pairs for ref in (pair.base, pair.tuned)])
    return extract.compute(member, lowrank.PROFILES["other"], stored[::2], stored[1::2], torch.device(device))


@pytest.mark.parametrize("solver", lowrank.SOLVERS)
def test_subspaces_and_energies_are_those_of_the_cpu(gapped: tuple[Path, Path], solver: Any) -> None:
    there, factors = compute(gapped, DEVICE, max_rank=8, solver=solver)
    here, expected = compute(gapped, "cpu", max_rank=8, solver="exact")
    assert len(here) == 4
    for one, other in zip(there, here, strict=True):
        assert (one.name, one.status) == (other.name, other.status)
        assert one.delta_sq == pytest.approx(other.delta_sq, rel=1e-7)
        assert one.base_sq == pytest.approx(other.base_sq, rel=1e-7)
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


def outcomes(deltas: Sequence[Tensor], wanted: Settings, *, pinned: bool = False) -> list[Outcome]:
    pairs = [pair_of(delta) for delta in deltas]
    if pinned:
        pairs = [(base.pin_memory(), tuned.pin_memory()) for base, tuned in pairs]
    names = [f"w{number}" for number in range(len(deltas))]
    device = torch.device(DEVICE)
    return lowrank.decompose(pairs, names, wanted, extract.profile_of(device), device)


def on_the_cpu(outcome: Outcome) -> Factors:
    found = outcome.factors
    assert found is not None, outcome.failure
    return Factors(
        **{**{name: getattr(found, name) for name in found.__slots__}, "A": found.A.cpu(), "B": found.B.cpu()}
    )


def assert_is_best(outcome: Outcome, delta: Tensor) -> None:
    found, energies = on_the_cpu(outcome), energies_of(delta)
    assert -1e-6 < loss_of(found, delta) <= found.certificate + 1e-7
    assert found.residual_sq == pytest.approx(left_by(found, delta), rel=1e-3, abs=1e-9 * float(energies.sum()))
    sigma = torch.tensor(found.singular_values, dtype=torch.float64)
    for product in (found.B.double().mT @ found.B.double(), found.A.double() @ found.A.double().mT):
        assert float((product - torch.diag(sigma)).abs().max()) <= 1e-4 * float(sigma[0])


SPECTRA = ["power", "flat", "steep", "clustered", "rank two", "tiny", "huge"]
SIZES = [(700, 600), (600, 700), (40, 9), (1, 7), (1, 1)]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("solver", lowrank.SOLVERS)
def test_every_solver_is_as_good_as_its_certificate_says(solver: Any, size: tuple[int, int]) -> None:
    """Against float64, a batch of all spectra at once; TF32 or a wrong driver would show in the fourth digit."""
    deltas = [delta_of(*size, name) for name in SPECTRA]
    for outcome, delta in zip(outcomes(deltas, Settings(8, solver)), deltas, strict=True):
        assert_is_best(outcome, delta)
        assert outcome.factors.certificate <= 1e-3


@pytest.mark.parametrize("driver", ["gesvda", "gesvd", None])
def test_every_driver_gives_the_true_triplets(driver: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lowrank.full, "drivers", lambda _: (driver,))
    deltas = [delta_of(300, 200, name) for name in SPECTRA[:4]]
    for outcome, delta in zip(outcomes(deltas, Settings(8, "exact")), deltas, strict=True):
        wanted = "exact" if driver is None else f"exact {driver}"
        if outcome.factors.solver != wanted:  # it refuses some spectra, and says so
            assert driver == "gesvda"
            assert outcome.factors.notes[0].startswith("exact gesvda: ")
        assert_is_best(outcome, delta)


@pytest.mark.parametrize("solver", lowrank.SOLVERS)
def test_a_batch_is_as_good_as_one_by_one(solver: Any) -> None:
    deltas = [delta_of(500, 400, name) for name in SPECTRA]
    together = outcomes(deltas, Settings(8, solver))
    for number, (delta, found) in enumerate(zip(deltas, together, strict=True)):
        [alone] = lowrank.decompose(
            [pair_of(delta)], [f"w{number}"], Settings(8, solver), extract.profile_of(torch.device(DEVICE)), torch.device(DEVICE)
        )  # fmt: skip
        assert alone.delta_sq == pytest.approx(found.delta_sq, rel=1e-10)
        assert alone.factors.solver == found.factors.solver
        assert alone.factors.singular_values == pytest.approx(found.factors.singular_values, rel=1e-3)


@pytest.mark.parametrize("solver", lowrank.SOLVERS)
def test_pinned_memory_changes_no_byte(solver: Any) -> None:
    deltas = [delta_of(500, 400, name) for name in SPECTRA[:3]]
    for one, other in zip(
        outcomes(deltas, Settings(8, solver)), outcomes(deltas, Settings(8, solver), pinned=True), strict=True
    ):
        assert torch.equal(one.factors.A, other.factors.A)
        assert torch.equal(one.factors.B, other.factors.B)


def test_what_is_read_comes_through_pinned_memory_that_is_used_again(tmp_path: Path) -> None:
    tensors = {
        f"w{number}": torch.randn(300, 400, generator=torch.Generator().manual_seed(number)) for number in range(4)
    }
    refs = open_checkpoint(str(toys.save(tmp_path / "some", tensors))).tensors
    reader = Reader(torch.device(DEVICE), 1 << 20)
    for name, value in tensors.items():
        with reader.taken([refs[name]], [[refs["w3"]]]) as stored:
            assert stored[0].is_cuda
            assert torch.equal(stored[0].cpu(), value)
    reader._thread.shutdown(wait=True)
    assert 1 <= len(reader._free) <= 2
    assert all(torch.frombuffer(memory, dtype=torch.uint8).is_pinned() for memory in reader._free)


class TestMemory:
    """The ladder, on a device of which this process may use little."""

    @pytest.fixture
    def room(self) -> Iterator[Any]:
        """Gives a function that leaves so many bytes."""
        torch.cuda.empty_cache()
        _, total = torch.cuda.mem_get_info()

        def leave(nbytes: int) -> None:
            torch.cuda.set_per_process_memory_fraction(min(1.0, (torch.cuda.memory_reserved() + nbytes) / total))

        yield leave
        torch.cuda.set_per_process_memory_fraction(1.0)
        torch.cuda.empty_cache()

    def test_a_batch_that_does_not_fit_is_halved(self, room: Any) -> None:
        deltas = [delta_of(2048, 1536, "power", seed=seed) for seed in range(8)]  # 12 MiB each in float32
        outcomes(deltas[:1], Settings(8, "krylov"))  # cuBLAS's own workspace, once
        room(90 << 20)
        for outcome, delta in zip(outcomes(deltas, Settings(8, "krylov")), deltas, strict=True):
            assert outcome.factors.notes[0] == "out of memory on cuda with 8 at once"
            assert not any("processor" in note for note in outcome.factors.notes)
            assert_is_best(outcome, delta)

    def test_a_matrix_larger_than_the_memory_is_formed_slice_by_slice(
        self, room: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        generator = torch.Generator().manual_seed(0)
        delta = torch.randn(16384, 64, generator=generator) @ torch.randn(64, 4096, generator=generator)  # 256 MiB
        monkeypatch.setattr(lowrank.operator, "CHUNK", 1 << 20)
        outcomes([delta[:512]], Settings(8, "krylov"))
        room(224 << 20)
        [outcome] = outcomes([delta], Settings(64, "krylov"))
        assert outcome.factors.notes[:2] == ("out of memory on cuda with 1 at once", "formed slice by slice")
        assert not any("processor" in note for note in outcome.factors.notes)
        found = on_the_cpu(outcome)
        left = float((delta - found.B @ found.A).double().square().sum())
        assert left <= 1e-5 * outcome.delta_sq
        assert found.certificate <= 1e-3

    def test_no_room_at_all_leaves_it_to_the_processor(self, room: Any) -> None:
        delta = delta_of(1024, 900, "power")
        room(1 << 20)
        [outcome] = outcomes([delta], Settings(8))
        assert "done on the processor" in outcome.factors.notes
        assert_is_best(outcome, delta)


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
