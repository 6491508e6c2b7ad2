"""fp8 with scales: what is read is the definition's product, rounded once; and a pair of such weights converts like any other."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from phlora_pipeline import extract, quantised
from phlora_pipeline.checkpoint import open_checkpoint, read_tensors, room_for
from phlora_pipeline.errors import CheckpointError
from phlora_pipeline.reading import Reader
from phlora_pipeline.tensors import TensorRef
from phlora_pipeline.verify import verify
from tests import fp8, models, runs, toys

E4M3, E5M2, F32, BF16, UE8M0 = (
    torch.float8_e4m3fn, torch.float8_e5m2, torch.float32, torch.bfloat16, torch.float8_e8m0fnu
)  # fmt: skip
NAME = "model.layers.0.mlp.up_proj.weight"


def random(*shape: int, seed: int = 0) -> Tensor:
    """Of very different sizes from row to row, so that a scale in the wrong place cannot pass."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.logspace(-3, 2, max(shape[0], 1)).view(-1, *[1] * (len(shape) - 1))
    return sizes * torch.randn(shape, generator=generator)


def read(folder: Path) -> dict[str, Tensor]:
    opened = open_checkpoint(str(folder))
    return dict(zip(opened.tensors, read_tensors(list(opened.tensors.values())), strict=True))


# weight, block, shape in which the scale is stored (None: as the grid), name after the weight's, its config's block size, dtypes
CASES: dict[str, tuple[Any, ...]] = {
    "per tensor, scalar": ((48, 40), (48, 40), (), "_scale", None, E4M3, F32),
    "per tensor, [1], e5m2": ((48, 40), (48, 40), (1,), "_scale", None, E5M2, F32),
    "transformers, per tensor": ((48, 40), (48, 40), (), "_scale_inv", None, E4M3, F32),
    "DeepSeek": ((256, 384), (128, 128), None, "_scale_inv", [128, 128], E4M3, F32),
    "DeepSeek, ragged": ((130, 300), (128, 128), None, "_scale_inv", [128, 128], E4M3, F32),
    "DeepSeek, no word in config.json": ((200, 300), (128, 128), None, "_scale_inv", None, E4M3, F32),
    "smaller than one block": ((40, 50), (128, 128), None, "_scale_inv", [128, 128], E4M3, F32),
    "another block size": ((50, 70), (16, 32), None, "_scale_inv", [16, 32], E4M3, F32),
    "compressed-tensors, per channel": ((48, 40), (1, 40), None, "_scale", None, E4M3, BF16),
    "compressed-tensors, groups": ((48, 64), (1, 16), None, "_scale", None, E4M3, F32),
    "ModelOpt, a vector": ((48, 40), (1, 40), (48,), "_scale", None, E4M3, F32),
    "exponents": ((256, 130), (128, 128), None, "_scale_inv", [128, 128], E4M3, UE8M0),
    "experts in one tensor": ((3, 40, 50), (1, 16, 16), None, "_scale_inv", [16, 16], E4M3, F32),
    "experts, per channel": ((3, 40, 50), (1, 1, 50), None, "_scale", None, E4M3, F32),
    "a vector of weights": ((300,), (128,), None, "_scale_inv", [128, 128], E4M3, F32),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_what_is_read_is_the_product_rounded_once(case: str, tmp_path: Path) -> None:
    shape, block, kept, suffix, told, dtype, scale_dtype = CASES[case]
    stored, scale = fp8.quantised(random(*shape), block, dtype, scale_dtype)
    there = {NAME: stored, f"{NAME}{suffix}": scale if kept is None else scale.reshape(kept)}
    found = read(toys.save(tmp_path / "m", there, fp8.config(told), shards=2))  # the scale in a shard of its own
    assert list(found) == [NAME]
    assert found[NAME].dtype == F32
    assert torch.equal(found[NAME], fp8.dequantised(stored, scale, block).float())


@pytest.mark.parametrize("name", ["scale", "qscale_weight", "scale_weight"])
def test_scales_go_by_other_names_too(name: str, tmp_path: Path) -> None:
    stored, scale = fp8.quantised(random(40, 50), (16, 16))
    there = {NAME: stored, NAME.replace("weight", name): scale}
    found = read(toys.save(tmp_path / "m", there, fp8.config()))
    assert torch.equal(found[NAME], fp8.dequantised(stored, scale, (16, 16)).float())


def test_bytes_are_exponents(tmp_path: Path) -> None:
    stored = random(4, 64).to(E4M3)
    scale = torch.tensor([[120, 127], [128, 1], [130, 254], [127, 126]], dtype=torch.uint8)
    found = read(toys.save(tmp_path / "m", {NAME: stored, f"{NAME}_scale": scale}))
    factors = torch.pow(2.0, scale.double() - 127).repeat_interleave(32, dim=1)
    assert torch.equal(found[NAME], (stored.double() * factors).float())


def test_every_value_of_eight_bits_is_what_torch_says(tmp_path: Path) -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(2, 128)
    for dtype in (E4M3, E5M2):
        there = {NAME: codes.view(dtype), f"{NAME}_scale": torch.ones(())}
        found = read(toys.save(tmp_path / str(dtype), there))[NAME]
        torch.testing.assert_close(found, codes.view(dtype).float(), rtol=0, atol=0, equal_nan=True)


def test_scales_are_parts_of_their_weights_and_those_of_activations_of_none(tmp_path: Path) -> None:
    stored, scale = fp8.quantised(random(40, 50), (40, 50))
    beside = {
        NAME.replace("weight", "input_scale"): torch.ones(1), "model.layers.0.self_attn.k_scale": torch.ones(()),
        "model.layers.0.input_scale": torch.ones(7),  # somebody's parameter: no single number
    }  # fmt: skip
    opened = open_checkpoint(str(toys.save(tmp_path / "m", {NAME: stored, f"{NAME}_scale": scale, **beside})))
    assert set(opened.tensors) == {NAME, "model.layers.0.input_scale"}
    assert opened.tensors[NAME].dtype == "F8_E4M3"
    assert opened.tensors[NAME].nbytes == 40 * 50 + 4
    without = open_checkpoint(str(toys.save(tmp_path / "plain", {"a.weight": torch.ones(2, 2), **beside})))
    assert len(without.tensors) == 4


def test_without_any_scale_the_values_are_the_weight(tmp_path: Path) -> None:
    """As transformers takes them, and as diffusion models are stored."""
    stored = random(40, 50).to(E5M2)
    assert torch.equal(read(toys.save(tmp_path / "m", {NAME: stored}))[NAME], stored)


BAD = {
    "one scale is missing": ({f"{NAME}_scale": torch.ones(()), "b.weight": torch.ones(4, 4).to(E4M3)}, "1 others have one"),
    "three fused layers": ({f"{NAME}_scale": torch.ones(3)}, r"no scale of a weight of shape \[48, 40\]"),
    "too few blocks": ({f"{NAME}_scale_inv": torch.ones(2, 3)}, r"for blocks of \[128, 128\]"),
    "too many dimensions": ({f"{NAME}_scale_inv": torch.ones(2, 1, 1)}, "no scale"),
    "none at all": ({f"{NAME}_scale_inv": torch.ones(0)}, "no scale"),
    "integers": ({f"{NAME}_scale_inv": torch.ones(1, 1, dtype=torch.int32)}, "stored as I32"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_a_scale_that_is_missing_or_does_not_fit_is_refused(case: str, tmp_path: Path) -> None:
    beside, told = BAD[case]
    folder = toys.save(tmp_path / "m", {NAME: torch.ones(48, 40).to(E4M3), **beside})
    with pytest.raises(CheckpointError, match=told) as caught:
        open_checkpoint(str(folder))
    assert str(folder) in caught.value.what
    assert caught.value.remedy


def test_a_config_that_promises_scales_is_held_to_its_word(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"without a scale, though config\.json tells"):
        open_checkpoint(str(toys.save(tmp_path / "m", {NAME: torch.ones(4, 4).to(E4M3)}, fp8.config())))


def test_another_block_size_is_another_checkpoint(tmp_path: Path) -> None:
    """config.json decides what the bytes mean: parts of the one must not pass for the other's."""
    stored, scale = fp8.quantised(random(48, 48), (24, 24))
    folder = toys.save(tmp_path / "m", {NAME: stored, f"{NAME}_scale_inv": scale}, fp8.config((24, 24)))
    before = open_checkpoint(str(folder)).fingerprint
    (folder / "config.json").write_text(json.dumps(fp8.config((32, 32))))
    assert open_checkpoint(str(folder)).fingerprint != before


@pytest.fixture(scope="module")
def refs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, TensorRef]:
    """Weights with scales of several kinds, and one without."""
    there = {"bf16": random(33, 7).bfloat16()}
    for name, shape, block in (
        ("blocks", (40, 50), (16, 16)), ("one", (9, 31), (9, 31)), ("rows", (17, 5), (1, 5)), ("experts", (3, 20, 18), (1, 16, 16)),
    ):  # fmt: skip
        there[name], there[f"{name}_scale"] = fp8.quantised(random(*shape), block)
    folder = toys.save(tmp_path_factory.mktemp("refs") / "m", there, fp8.config())
    return dict(open_checkpoint(str(folder)).tensors)


@settings(max_examples=80, deadline=None)
@given(
    name=st.sampled_from(["blocks", "one", "rows", "experts"]),
    start=st.integers(0, 500), size=st.integers(1, 700), chunk=st.sampled_from([1, 7, 64, 1 << 18]),
)  # fmt: skip
def test_pieces_are_those_of_the_whole(
    refs: dict[str, TensorRef], name: str, start: int, size: int, chunk: int
) -> None:
    ref = refs[name]
    start = min(start, math.prod(ref.shape) - 1)
    [whole] = read_tensors([ref])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quantised, "_CHUNK", chunk)
        [piece] = read_tensors([ref.entries(start, start + size)])
        [again] = read_tensors([ref.entries(start, start + size).entries(0, 3)])
    assert torch.equal(piece, whole.reshape(-1)[start : start + size])
    assert torch.equal(again, piece[:3])


def test_memory_of_ones_own_or_given_gives_the_same(refs: dict[str, TensorRef]) -> None:
    """What lies beside a weight in the memory must not be touched when the weight is spread out."""
    wanted = list(refs.values())
    own = read_tensors(wanted)
    memory = bytearray(b"\xaa" * (room_for(wanted) + 1))
    given = read_tensors(wanted, memoryview(memory))
    with Reader(torch.device("cpu"), 1 << 20).taken(wanted, [wanted]) as taken:
        for mine, theirs, another in zip(own, given, taken, strict=True):
            assert mine.dtype == theirs.dtype == another.dtype
            assert torch.equal(mine, theirs)
            assert torch.equal(mine, another)
    assert memory[-1] == 0xAA
    assert room_for([refs["blocks"]]) == 8000 + 64  # float32, and a scale of 4 × 4


def save(
    folder: Path, tensors: Mapping[str, Tensor], block: Any = (16, 16), **others: Any
) -> tuple[Path, dict[str, Tensor]]:
    """A checkpoint in eight bits, and what it means."""
    stored, meant = fp8.checkpoint(tensors, block, **others)
    told = block if None not in block else None
    return toys.save(folder, stored, fp8.config(told), shards=3), meant


BASE = toys.llama_tensors()
TUNED = toys.fine_tuned(BASE, scale=0.3)


@pytest.mark.parametrize(
    ("coarse", "block", "suffix"),
    [
        ("tuned", (16, 16), "_scale_inv"),
        ("base", (1, None), "_scale"),
        ("both", (None, None), "_scale"),
        ("both", (16, 16), "_scale_inv"),
    ],
)
def test_energies_are_those_of_the_dequantised_weights(coarse: str, block: Any, suffix: str, tmp_path: Path) -> None:
    """Each tensor's, and their sum over all of them, adapted, left out or only measured."""
    sides: dict[str, tuple[Path, dict[str, Tensor]]] = {}
    for side, tensors in (("base", BASE), ("tuned", TUNED)):
        if coarse in (side, "both"):
            sides[side] = save(tmp_path / side, tensors, block, suffix=suffix)
        else:
            halves = {name: value.bfloat16() for name, value in tensors.items()}
            meant = {name: value.double() for name, value in halves.items()}
            sides[side] = toys.save(tmp_path / side, halves, shards=2), meant
    (base, before), (tuned, after) = sides["base"], sides["tuned"]
    watcher, out = runs.Watcher(), tmp_path / "out"
    done = runs.extract(base, tuned, out, rank=16, exclude=["*.1.mlp.up_proj"], observer=watcher)
    rows = runs.rows(out)
    assert rows.keys() == TUNED.keys()
    deltas = {name: after[name].float().double() - before[name].float().double() for name in after}
    for name, row in rows.items():
        assert row.delta_norm == pytest.approx(float(deltas[name].norm()), rel=1e-6), name
    total = sum(float(delta.square().sum()) for delta in deltas.values())
    assert math.fsum((row.delta_norm or 0) ** 2 for row in rows.values()) == pytest.approx(total, rel=1e-6)
    row = rows[NAME]
    assert (row.status, row.base_dtype, row.tuned_dtype) == (
        "adapted", "BF16" if coarse == "tuned" else "F8_E4M3", "BF16" if coarse == "base" else "F8_E4M3"
    )  # fmt: skip
    values = torch.linalg.svdvals(deltas[NAME])
    assert row.preserved_energy == pytest.approx(float(values[:16].square().sum() / values.square().sum()), rel=1e-5)
    assert any("stored in fp8" in warning for warning in watcher.warnings)
    assert done.read_bytes == sum(report.nbytes for report in watcher.reports)
    assert verify(str(base), str(tuned), str(out)).passed


def test_what_is_only_measured_is_read_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (base, before), (tuned, after) = save(tmp_path / "base", BASE), save(tmp_path / "tuned", TUNED)
    monkeypatch.setattr(extract, "STREAMED_BYTES", 0)
    monkeypatch.setattr(extract, "PIECE", 100)
    runs.extract(base, tuned, tmp_path / "out", exclude=["*mlp*"])
    row = runs.rows(tmp_path / "out")[NAME]
    assert row.status == "skipped"
    assert row.delta_norm == pytest.approx(float((after[NAME].float() - before[NAME].float()).norm()), rel=1e-6)


def test_a_worker_is_planned_with_room_for_float32(tmp_path: Path) -> None:
    """Four times what is stored; the bytes to read are those that are stored."""
    (base, _), (tuned, _) = save(tmp_path / "base", BASE), save(tmp_path / "tuned", TUNED)
    runs.extract(base, tuned, tmp_path / "out", observer=(watcher := runs.Watcher()))
    assert watcher.plan is not None
    block = next(task.block for task in watcher.plan.tasks if NAME in {pair.name for pair in task.block.pairs})
    entries, scales = sum(pair.numel for pair in block.pairs), 3 * 2 * len(block.pairs)
    assert block.read_bytes == 8 * entries
    assert block.nbytes == 2 * (entries + 4 * scales)


def as_transformers_writes(model: transformers.PreTrainedModel, folder: Path) -> Path:
    """Quantised by transformers' own operation, with its own config."""
    from types import SimpleNamespace

    from transformers.integrations.finegrained_fp8 import Fp8Quantize

    config = transformers.FineGrainedFP8Config(weight_block_size=(16, 16))
    quantize = Fp8Quantize(SimpleNamespace(quantization_config=config))
    tensors: dict[str, Tensor] = {}
    for name, value in model.state_dict().items():
        inner = ".layers." in name and value.ndim == 2
        tensors |= quantize.convert({name: value}) if inner else {name: value}
    return toys.save(
        folder, tensors, {**json.loads(model.config.to_json_string()), "quantization_config": config.to_dict()}
    )


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_transformers_own_checkpoints_convert_and_load_in_peft(tmp_path: Path) -> None:
    """Its quantiser wrote both; its loader reads both; with the adapter at full rank the base is the fine-tune."""
    base = models.MODELS["llama"]()
    tuned = models.moved(base, where=models.matrices, scale=0.3)
    pair = as_transformers_writes(base, tmp_path / "base"), as_transformers_writes(tuned, tmp_path / "tuned")
    loaded = [transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=F32).eval() for folder in pair]
    ours = read(pair[1])
    for name, theirs in loaded[1].state_dict().items():
        assert torch.equal(ours[name], theirs), name
    runs.extract(*pair, tmp_path / "out", rank=64)
    wanted = models.outputs(loaded[1])
    assert models.distance(models.outputs(loaded[0]), wanted) > 0.1
    assert models.distance(models.outputs(models.adapted(loaded[0], tmp_path / "out")), wanted) < 1e-4
