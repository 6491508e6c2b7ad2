"""Stacked experts are the matrices that they are: named, ordered and oriented as those who keep them apart do."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from phlora_pipeline import experts
from phlora_pipeline.checkpoint import Checkpoint, open_checkpoint, read_tensors
from phlora_pipeline.errors import CheckpointError, RequestError
from phlora_pipeline.verify import verify
from tests import runs, toys
from tests.test_plan import checkpoint

E, H, I = 3, 8, 6  # noqa: E741

MIXTRAL = {"model_type": "mixtral", "architectures": ["MixtralForCausalLM"]}
QWEN = {"model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"]}
UNLISTED = {"model_type": "one-that-no-table-names", "architectures": ["SomeForCausalLM"]}
GPT_OSS = {"model_type": "gpt_oss", "architectures": ["GptOssForCausalLM"]}

NAMES = {"mixtral": ("block_sparse_moe", "w1", "w3", "w2"), "qwen3_moe": ("mlp", "gate_proj", "up_proj", "down_proj")}


def stacked(seed: int = 0, layers: int = 2) -> dict[str, Tensor]:
    """Attention, a router and experts, as transformers 5 holds them."""
    generator = torch.Generator().manual_seed(seed)
    shapes: dict[str, tuple[int, ...]] = {}
    for layer in range(layers):
        at = f"model.layers.{layer}"
        shapes |= {f"{at}.self_attn.{p}_proj.weight": (H, H) for p in "qkvo"}
        shapes |= {f"{at}.mlp.gate.weight": (E, H)}
        shapes |= {f"{at}.mlp.experts.gate_up_proj": (E, 2 * I, H), f"{at}.mlp.experts.down_proj": (E, H, I)}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def turned(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same stacks as (in, out)."""
    return {name: value.mT.contiguous() if value.ndim == 3 else value for name, value in tensors.items()}


def taken_apart(tensors: dict[str, Tensor], model_type: str) -> dict[str, Tensor]:
    """By torch, and named by hand: what the view must be equal to."""
    block, gate, up, down = NAMES[model_type]
    found = {}
    for held, value in tensors.items():
        name = held.replace(".mlp.", f".{block}.")
        at = name.rpartition(".")[0]
        if name.endswith("gate_up_proj"):
            for expert, both in enumerate(value):
                halves = both.clone().chunk(2)
                found |= {f"{at}.{expert}.{leaf}.weight": half for leaf, half in zip((gate, up), halves, strict=True)}
        elif name.endswith("experts.down_proj"):
            found |= {f"{at}.{expert}.{down}.weight": one.clone() for expert, one in enumerate(value)}
        else:
            found[name] = value
    return found


def seen(folder: Path) -> dict[str, Tensor]:
    """Every tensor by the view, read from the file."""
    viewed, _ = experts.apart(open_checkpoint(str(folder)), open_checkpoint(str(folder)))
    assert all(name == ref.name for name, ref in viewed.tensors.items())
    return dict(zip(viewed.tensors, read_tensors(list(viewed.tensors.values())), strict=True))


def assert_same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert set(found) == set(wanted)
    for name, value in wanted.items():
        assert torch.equal(found[name], value), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("config", [MIXTRAL, QWEN], ids=lambda config: config["model_type"])
def test_a_stack_is_its_experts(config: dict[str, Any], dtype: torch.dtype, tmp_path: Path) -> None:
    tensors = {name: value.to(dtype) for name, value in stacked().items()}
    toys.save(tmp_path, tensors, config)
    assert_same(seen(tmp_path), taken_apart(tensors, config["model_type"]))


def test_stacks_in_two_shards_are_one_pair(tmp_path: Path) -> None:
    toys.save(tmp_path, stacked(), QWEN, shards=3)
    assert_same(seen(tmp_path), taken_apart(stacked(), "qwen3_moe"))


def test_experts_that_are_apart_stay_as_they_are(tmp_path: Path) -> None:
    apart = taken_apart(stacked(), "mixtral")
    toys.save(tmp_path, apart, MIXTRAL)
    assert_same(seen(tmp_path), apart)


def test_interleaved_experts_are_two_matrices_each_stored_in_out(tmp_path: Path) -> None:
    tensors = turned(stacked())
    toys.save(tmp_path, tensors, GPT_OSS)
    found = seen(tmp_path)
    for expert in range(E):
        for leaf, shape in (("gate_up_proj", (H, 2 * I)), ("down_proj", (I, H))):
            one = found.pop(f"model.layers.1.mlp.experts.{expert}.{leaf}.weight")
            assert one.shape == shape
            assert torch.equal(one, tensors[f"model.layers.1.mlp.experts.{leaf}"][expert])
    assert not any("layers.1.mlp.experts" in name for name in found)


ODD = {
    "in-out of a type that is not known for it": (UNLISTED, (E, H, 2 * I), (E, I, H)),
    "out-in of a type that is stored in-out": (GPT_OSS, (E, 2 * I, H), (E, H, I)),
    "halves that do not fit": (QWEN, (E, 2 * I + 1, H), (E, H, I)),
    "other numbers of experts": (QWEN, (E, 2 * I, H), (E + 1, H, I)),
    "flattened": (QWEN, (E, 2 * I, H), (E * H, I)),
    "alone": (QWEN, (E, 2 * I, H), None),
}


@pytest.mark.parametrize(("config", "up", "down"), ODD.values(), ids=ODD)
def test_what_is_not_understood_stays_whole_and_is_told(
    config: dict[str, Any], up: tuple[int, ...], down: tuple[int, ...] | None, tmp_path: Path
) -> None:
    others = {"layers.0.self_attn.q_proj.weight": (H, H)}
    shapes = {**others, "layers.0.mlp.experts.gate_up_proj": up}
    shapes |= {"layers.0.mlp.experts.down_proj": down} if down else {}
    before, _ = experts.apart(*[checkpoint(shapes, config=config)] * 2)
    assert dict(before.tensors) == checkpoint(shapes, config=config).tensors
    base = {name: torch.ones(shape) for name, shape in shapes.items()}
    pair = toys.save(tmp_path / "base", base, config), toys.save(tmp_path / "tuned", toys.fine_tuned(base), config)
    runs.extract(*pair, tmp_path / "out", dialect="peft")
    row = runs.rows(tmp_path / "out")["layers.0.mlp.experts.gate_up_proj"]
    assert (row.status, row.kind) == ("skipped", "expert")
    assert "its layout is not known" in row.reason


def test_orientation_is_in_the_shapes_alone() -> None:
    """Whatever the sizes, even H = 2I and H = I: a type's stacks in the other orientation are never taken for its own."""
    for h, i in [(4, 2), (2, 4), (4, 4), (8, 2), (2, 1), (1, 1)]:
        out_in = {"experts.gate_up_proj": (E, 2 * i, h), "experts.down_proj": (E, h, i)}
        in_out = {"experts.gate_up_proj": (E, h, 2 * i), "experts.down_proj": (E, i, h)}
        for shapes, config, understood in (
            (out_in, QWEN, True), (in_out, QWEN, False), (in_out, GPT_OSS, True), (out_in, GPT_OSS, False)
        ):  # fmt: skip
            made = checkpoint(shapes, config=config)
            assert (experts.apart(made, made)[0].tensors != made.tensors) is understood, (h, i, config)


@pytest.mark.parametrize(("inner", "dtype"), [(I, "F8_E4M3"), (0, "BF16")], ids=["quantised", "empty"])
def test_stacks_that_cannot_be_cut_stay_whole(inner: int, dtype: str) -> None:
    shapes = {"mlp.experts.gate_up_proj": (E, 2 * inner, H), "mlp.experts.down_proj": (E, H, inner)}
    made = checkpoint(shapes, config=QWEN, dtype=dtype)
    assert experts.apart(made, made)[0].tensors == made.tensors


def test_an_expert_that_is_there_twice_is_refused() -> None:
    shapes = {"mlp.experts.gate_up_proj": (E, 2 * I, H), "mlp.experts.down_proj": (E, H, I)}
    made = checkpoint({**shapes, "mlp.experts.1.up_proj.weight": (I, H)}, config=QWEN)
    with pytest.raises(CheckpointError, match=r"mlp\.experts\.1\.up_proj\.weight.* twice: by itself and in a stack"):
        experts.apart(made, made)


def test_a_side_without_a_config_is_spelt_as_the_other_says() -> None:
    shapes = {"mlp.experts.gate_up_proj": (E, 2 * I, H), "mlp.experts.down_proj": (E, H, I)}
    base, tuned = checkpoint(shapes, config=MIXTRAL), checkpoint(shapes, config={})
    names = [set(side.tensors) for side in experts.apart(base, tuned)]
    assert names[0] == names[1] >= {"block_sparse_moe.experts.2.w1.weight"}


def test_pefts_stack_holds_each_factor_once() -> None:
    """The layout of PEFT's ParamWrapper, by its own formula: reshape to (E, r, in), and to (out, r, E)."""
    A, B = torch.randn(E * 2, H), torch.randn(I, 2 * E)
    for expert in range(E):
        assert torch.equal(experts.of_one(A, expert, E, down=True), A.reshape(E, -1, H)[expert])
        assert torch.equal(experts.of_one(B, expert, E, down=False), B.reshape(I, -1, E).permute(2, 0, 1)[expert])


Folders = dict[str, tuple[Path, Path]]


@pytest.fixture(scope="module", params=["mixtral", "qwen3_moe"])
def folders(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Folders:
    """A base and a fine-tune, with experts stacked and apart."""
    config = {"mixtral": MIXTRAL, "qwen3_moe": QWEN}[request.param]
    base = stacked()
    sides, at = {"base": base, "tuned": toys.fine_tuned(base)}, tmp_path_factory.mktemp(request.param)
    for side, tensors in sides.items():
        toys.save(at / "stacked" / side, tensors, config)
        toys.save(at / "apart" / side, taken_apart(tensors, request.param), config)
    return {form: (at / form / "base", at / form / "tuned") for form in ("stacked", "apart")}


@pytest.mark.parametrize("dialect", ["portable", "peft"])
def test_every_form_of_a_pair_gives_the_same_bytes(folders: Folders, dialect: str, tmp_path: Path) -> None:
    """Stacked beside stacked, stacked beside apart, apart beside stacked."""
    both = [folders["apart"], folders["stacked"]]
    pairs = [(base, tuned) for base, _ in both for _, tuned in both]
    found = []
    for number, (base, tuned) in enumerate(pairs):
        out = tmp_path / str(number)
        runs.extract(base, tuned, out, rank=4, dialect=dialect)
        assert verify(str(base), str(tuned), str(out)).passed
        rows = [replace(row, version="") for row in runs.rows(out).values()]
        files = [(out / name).read_bytes() for name in ("adapter_model.safetensors", "adapter_config.json")]
        found.append((rows, *files))
    assert all(other == found[0] for other in found[1:])


def test_energies_of_the_experts_are_that_of_the_stack(folders: Folders, tmp_path: Path) -> None:
    runs.extract(*folders["stacked"], tmp_path)
    before, after = (load_file(folder / "model.safetensors") for folder in folders["stacked"])
    rows = runs.rows(tmp_path).values()
    for layer in range(2):
        squares = [row.delta_norm**2 for row in rows if f"layers.{layer}." in row.tensor and row.kind == "expert"]  # type: ignore[operator]
        at = f"model.layers.{layer}.mlp.experts"
        stacks = [(after[name].double() - before[name].double()).square().sum() for name in after if at in name]
        assert len(squares) == 3 * E
        assert sum(squares) == pytest.approx(float(sum(stacks)), rel=1e-6)
    total = sum(float((after[name].double() - before[name].double()).square().sum()) for name in after)
    assert sum(row.delta_norm**2 for row in rows) == pytest.approx(total, rel=1e-6)  # type: ignore[operator]


def test_an_unlisted_types_experts_are_left_out_one_by_one(tmp_path: Path) -> None:
    base = stacked()
    pair = toys.save(tmp_path / "base", base, UNLISTED), toys.save(tmp_path / "tuned", toys.fine_tuned(base), UNLISTED)
    runs.extract(*pair, tmp_path / "out", dialect="peft")
    rows = [row for row in runs.rows(tmp_path / "out").values() if row.kind == "expert"]
    assert len(rows) == 2 * 3 * E
    assert {row.status for row in rows} == {"skipped"}
    assert all(UNLISTED["model_type"] in row.reason and row.delta_norm for row in rows)


def test_other_architectures_are_told_apart_as_before(tmp_path: Path) -> None:
    base = toys.save(tmp_path / "base", stacked(), QWEN)
    tuned = toys.save(tmp_path / "tuned", stacked(1), MIXTRAL)
    with pytest.raises(RequestError, match="different architectures"):
        runs.extract(base, tuned, tmp_path / "out")


def damaged(adapter: Path, change: str) -> None:
    """A stack whose experts are in another order, or that has lost one of them."""
    weights = adapter / "adapter_model.safetensors"
    tensors, key = load_file(weights), "base_model.model.model.layers.0.mlp.experts.lora_A.weight"
    changed = {
        "order": lambda A: A.unflatten(0, (E, -1)).flip(0).flatten(0, 1),
        "short": lambda A: A.unflatten(0, (E, -1))[1:].flatten(0, 1),
    }[change](tensors[key])
    weights.unlink()
    save_file({**tensors, key: changed.contiguous()}, weights)


@pytest.mark.parametrize(("change", "told"), [("order", "promises"), ("short", "says rank 4")])
def test_verify_looks_into_a_stack(change: str, told: str, tmp_path: Path) -> None:
    base = turned(stacked())
    pair = toys.save(tmp_path / "base", base, GPT_OSS), toys.save(tmp_path / "tuned", toys.fine_tuned(base), GPT_OSS)
    runs.extract(*pair, tmp_path / "out", dialect="peft", rank=4)
    (tmp_path / "out" / "run.json").unlink()  # its digest would tell first
    assert verify(str(pair[0]), str(pair[1]), str(tmp_path / "out")).passed
    damaged(tmp_path / "out", change)
    found = verify(str(pair[0]), str(pair[1]), str(tmp_path / "out"))
    problems = [*found.problems, *(check.problem for check in found.modules)]
    assert any(told in problem for problem in problems)
    assert not any("layers.1" in problem for problem in problems)


def test_checkpoints_without_experts_are_given_back_untouched() -> None:
    made: Checkpoint = checkpoint({"model.layers.0.mlp.gate_proj.weight": (I, H)})
    assert experts.apart(made, made) == (made, made)
