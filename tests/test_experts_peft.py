"""Adapters of experts that are stacked on disk, loaded by PEFT: at full rank they are the fine-tune, and no rank is worse than a smaller one."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from phlora_pipeline.verify import verify
from tests import models, runs
from tests.test_peft_models import FULL, Pair, pytestmark

__all__ = ["pytestmark"]

STACKED = {"mixtral": models.MODELS["mixtral"], "qwen3-moe": models.MODELS["qwen3-moe"], "gpt-oss": models.gpt_oss}

MakePair = Callable[..., Pair]


def weights(name: str, parameter: Tensor) -> bool:
    """What has a low-rank form: the experts' biases are matrices by their shape alone."""
    return parameter.ndim >= 2 and not name.endswith("bias")


def attention(name: str, parameter: Tensor) -> bool:
    return "self_attn" in name and weights(name, parameter)


def attention_and_experts(name: str, parameter: Tensor) -> bool:
    return attention(name, parameter) or ".experts." in name


@pytest.fixture
def make_pair(tmp_path: Path) -> MakePair:
    def make(name: str, where: Callable[[str, Tensor], bool], *, as_in_memory: bool = True) -> Pair:
        base = {**STACKED, **models.STRANGERS}[name]()
        return saved(base, models.moved(base, where=where), tmp_path / "pair", as_in_memory=as_in_memory)

    return make


def saved(base: PreTrainedModel, tuned: PreTrainedModel, folder: Path, *, as_in_memory: bool = True) -> Pair:
    sides = [
        models.save(model, folder / name, as_in_memory=as_in_memory) for model, name in ((base, "b"), (tuned, "t"))
    ]
    shapes = {value.ndim for name, value in load_file(sides[0] / "model.safetensors").items() if ".experts." in name}
    assert (3 in shapes) == (as_in_memory or base.config.model_type == "gpt_oss")
    return Pair(base, tuned, *sides)


def assert_is_the_fine_tune(base: PreTrainedModel, pair: Pair, out: Path) -> None:
    assert models.distance(models.outputs(models.loaded(base, out)), models.outputs(pair.tuned)) < 1e-4
    assert verify(str(pair.base_folder), str(pair.tuned_folder), str(out)).passed


@pytest.mark.parametrize(
    ("name", "dialect", "where"),
    [
        *((name, "peft", weights) for name in STACKED),
        ("mixtral", "portable", attention_and_experts),
        ("qwen3-moe", "portable", attention_and_experts),
        ("gpt-oss", "portable", attention),
    ],
)
def test_full_rank_is_the_fine_tune(
    name: str, dialect: str, where: Callable[[str, Tensor], bool], make_pair: MakePair, tmp_path: Path
) -> None:
    pair, out = make_pair(name, where), tmp_path / "out"
    assert models.distance(models.outputs(pair.base), models.outputs(pair.tuned)) > 0.1
    result = runs.extract(pair.base_folder, pair.tuned_folder, out, rank=FULL, dialect=dialect)
    assert (result.summary.skipped, result.summary.coverage) == (0, 1)
    assert_is_the_fine_tune(pair.base, pair, out)


@pytest.mark.parametrize("name", STACKED)
def test_no_rank_is_worse_than_a_smaller_one(name: str, make_pair: MakePair, tmp_path: Path) -> None:
    """What is missing of each parameter after PEFT's own merge never grows with r."""
    pair = make_pair(name, weights)
    wanted = pair.tuned.state_dict()
    residuals = []
    for rank in (1, 3, 12, FULL):
        out = tmp_path / str(rank)
        runs.extract(pair.base_folder, pair.tuned_folder, out, rank=rank, dialect="peft")
        merged = models.adapted(pair.base, out).merge_and_unload().state_dict()
        residuals.append({key: float((wanted[key] - merged[key]).norm()) for key in wanted})
    for smaller, larger in itertools.pairwise(residuals):
        assert all(larger[key] <= smaller[key] + 1e-5 for key in larger)
    stacks = [key for key in wanted if ".experts." in key and not key.endswith("bias")]
    changes = {key: float((wanted[key] - pair.base.state_dict()[key]).norm()) for key in stacks}
    assert all(residuals[0][key] < 0.99 * changes[key] for key in stacks)
    assert all(residuals[-1][key] < 1e-5 * changes[key] for key in stacks)


def partly(name: str) -> Callable[[str, Tensor], bool]:
    """Layer 1 and a v_proj are unchanged."""
    return lambda key, value: attention_and_experts(key, value) and "layers.1." not in key and "v_proj" not in key


@pytest.mark.parametrize(
    ("name", "dialect", "as_in_memory"),
    [
        *itertools.product(("mixtral", "qwen3-moe"), ("portable", "peft"), (True, False)),
        ("gpt-oss", "peft", True),
    ],
)
def test_an_expert_a_layer_and_a_v_proj_are_unchanged(name: str, dialect: str, as_in_memory: bool, tmp_path: Path) -> None:  # fmt: skip
    """All experts have a pair, or PEFT stacks three of four; the pairs of those that did not change are zero."""
    base = STACKED[name]()
    tuned = models.moved(base, where=partly(name))
    with torch.no_grad():
        for key, value in tuned.named_parameters():
            if ".experts." in key:
                value[2] = base.get_parameter(key)[2]
                if key.endswith("bias"):
                    value.copy_(base.get_parameter(key))
    pair, out = saved(base, tuned, tmp_path / "pair", as_in_memory=as_in_memory), tmp_path / "out"
    runs.extract(pair.base_folder, pair.tuned_folder, out, rank=FULL, dialect=dialect)
    assert_is_the_fine_tune(pair.base, pair, out)
    rows = runs.rows(out).values()
    experts = [row for row in rows if row.kind == "expert"]
    assert len(experts) == 2 * 4 * (2 if name == "gpt-oss" else 3)
    for row in experts:
        changed = "layers.0." in row.tensor and ".experts.2." not in row.tensor
        assert row.status == ("adapted" if changed else "zero_filled"), row.tensor
    v = {row.module: row.status for row in rows if row.module.endswith("v_proj")}
    assert set(v.values()) == {"zero_filled" if dialect == "portable" else "unchanged"}


def test_two_adapters_of_gpt_oss_live_in_one_model(tmp_path: Path) -> None:
    """PEFT refuses adapters whose sets of parameters differ; ours are whole, though only one of a layer's experts changed."""
    base, pairs = models.gpt_oss(), []
    for number, layer in enumerate((0, 1)):
        tuned = models.moved(base, where=lambda *_: False)
        with torch.no_grad():
            tuned.model.layers[layer].mlp.experts.down_proj[3 - number].add_(0.3)
        pairs.append(saved(base, tuned, tmp_path / f"pair{number}"))
        runs.extract(pairs[-1].base_folder, pairs[-1].tuned_folder, tmp_path / str(number), dialect="peft")
    model = models.adapted(base, tmp_path / "0")
    keys = model.load_adapter(str(tmp_path / "1"), "second")
    assert (keys.missing_keys, keys.unexpected_keys) == ([], [])
    for name, pair in zip(("default", "second"), pairs, strict=True):
        model.set_adapter(name)
        assert models.distance(models.outputs(model), models.outputs(pair.tuned)) < 1e-4


@pytest.mark.parametrize("ranks", [{"rank": FULL}, {"rank": "auto"}, {"budget": "400KB"}])
@pytest.mark.parametrize("leaf", ["gate_up_proj", "down_proj"])
@pytest.mark.parametrize("name", STACKED)
def test_one_parameter_of_the_two_changed(
    name: str, leaf: str, ranks: dict[str, object], make_pair: MakePair, tmp_path: Path
) -> None:
    """PEFT wraps the experts once for each parameter, so that the path of the one depends on the other's."""
    pair, out = make_pair(name, lambda key, _: key.endswith(f"experts.{leaf}")), tmp_path / "out"
    result = runs.extract(pair.base_folder, pair.tuned_folder, out, dialect="peft", **ranks)
    assert (out / "adapter_model.safetensors").stat().st_size == result.adapter_bytes
    assert_is_the_fine_tune(pair.base, pair, out)


def test_verify_names_the_expert_that_is_off_and_the_parameter_that_is_missing(
    make_pair: MakePair, tmp_path: Path
) -> None:
    pair, out = make_pair("gpt-oss", weights), tmp_path / "out"
    runs.extract(pair.base_folder, pair.tuned_folder, out, rank=8, dialect="peft")
    path, experts = out / "adapter_model.safetensors", "model.layers.0.mlp.experts"
    tensors = load_file(path)
    tensors[f"base_model.model.{experts}.lora_A.weight"][8:16] *= 2
    for side in "AB":
        del tensors[f"base_model.model.{experts.replace('0', '1')}.base_layer.lora_{side}.weight"]
    path.unlink()
    save_file(tensors, path)
    found = verify(str(pair.base_folder), str(pair.tuned_folder), str(out))
    assert [check.module for check in found.modules if check.problem] == [f"{experts}.1.down_proj"]
    missing = "model.layers.1.mlp.experts.{}.gate_up_proj"
    for expert in range(4):
        assert (
            f"the manifest says {missing.format(expert)} is adapted, but the file has no pair for it" in found.problems
        )
        assert f"the config names {missing.format(expert)}, which has no pair in the file" in found.problems


def test_biases_of_experts_are_told_and_are_the_whole_difference(make_pair: MakePair, tmp_path: Path) -> None:
    pair, out = make_pair("gpt-oss", models.everything), tmp_path / "out"
    runs.extract(pair.base_folder, pair.tuned_folder, out, rank=FULL, dialect="peft")
    left_out = {row.tensor: row for row in runs.rows(out).values() if row.status == "skipped"}
    for leaf in ("gate_up_proj_bias", "down_proj_bias"):
        row = left_out[f"model.layers.1.mlp.experts.{leaf}"]
        assert (row.kind, row.reason) == ("bias", "a bias has no low-rank form")
        assert row.delta_norm
    by_hand = models.with_tensors_of(pair.base_folder, pair.tuned_folder, left_out, tmp_path / "completed")
    completed = type(pair.base).from_pretrained(by_hand).eval()
    assert_is_the_fine_tune(completed, pair, out)
    assert models.distance(models.outputs(models.loaded(pair.base, out)), models.outputs(pair.tuned)) > 1e-2


def beside_experts(name: str, parameter: Tensor) -> bool:
    return attention_and_experts(name, parameter) or "layers.0.mlp" in name


DENSE = {f"model.layers.0.mlp.{leaf}_proj" for leaf in ("gate", "up", "down")}


@pytest.mark.parametrize("as_in_memory", [True, False])
def test_dense_layers_beside_experts_are_adapted_as_parameters(
    as_in_memory: bool, make_pair: MakePair, tmp_path: Path
) -> None:
    pair, out = make_pair("dense-beside-experts", beside_experts, as_in_memory=as_in_memory), tmp_path / "out"
    result = runs.extract(pair.base_folder, pair.tuned_folder, out, rank=FULL, dialect="peft")
    assert (result.summary.skipped, result.summary.coverage) == (0, 1)
    assert_is_the_fine_tune(pair.base, pair, out)
    config = json.loads((out / "adapter_config.json").read_text())
    assert set(config["target_parameters"]) == {f"{module}.weight" for module in DENSE}


def test_dense_layers_beside_experts_are_left_out_where_peft_would_drop_them(
    make_pair: MakePair, tmp_path: Path
) -> None:
    pair, out = make_pair("dense-beside-experts", beside_experts), tmp_path / "out"
    runs.extract(pair.base_folder, pair.tuned_folder, out, rank=FULL)
    left_out = {row.tensor for row in runs.rows(out).values() if row.status == "skipped"}
    assert left_out == {f"{module}.weight" for module in DENSE}
    by_hand = models.with_tensors_of(pair.base_folder, pair.tuned_folder, left_out, tmp_path / "completed")
    assert_is_the_fine_tune(type(pair.base).from_pretrained(by_hand).eval(), pair, out)


def test_dense_layers_beside_experts_are_modules_for_servers(make_pair: MakePair, tmp_path: Path) -> None:
    """vLLM goes by the keys alone."""
    pair, out = make_pair("dense-beside-experts", beside_experts), tmp_path / "out"
    result = runs.extract(pair.base_folder, pair.tuned_folder, out, rank=FULL, dialect="vllm")
    assert result.summary.skipped == 0
    keys = set(load_file(out / "adapter_model.safetensors"))
    assert {f"base_model.model.{module}.lora_{side}.weight" for module in DENSE for side in "AB"} <= keys
    assert "target_parameters" not in json.loads((out / "adapter_config.json").read_text())


def test_vllm_gets_gpt_oss_experts_as_peft_does(make_pair: MakePair, tmp_path: Path) -> None:
    """The same 3-D keys and factors, all experts in two pairs a layer; its classes know no router."""
    pair = make_pair(
        "gpt-oss", lambda name, value: weights(name, value) and not name.startswith(("lm_head", "model.embed"))
    )
    tensors = {}
    for dialect in ("peft", "vllm"):
        runs.extract(pair.base_folder, pair.tuned_folder, tmp_path / dialect, rank=FULL, dialect=dialect)
        tensors[dialect] = load_file(tmp_path / dialect / "adapter_model.safetensors")
    assert {key for key in tensors["peft"] if key not in tensors["vllm"]} == {
        f"base_model.model.model.layers.{layer}.mlp.router.lora_{side}.weight" for layer in (0, 1) for side in "AB"
    }
    for key, value in tensors["vllm"].items():
        assert torch.equal(value, tensors["peft"][key])
    shapes = {key.partition("layers.0.mlp.")[2]: tuple(value.shape) for key, value in tensors["vllm"].items()}
    hidden, inner, stack = 32, 48, 4 * FULL
    assert {name: shape for name, shape in shapes.items() if name} == {
        "experts.base_layer.lora_A.weight": (stack, hidden),
        "experts.base_layer.lora_B.weight": (2 * inner, stack),
        "experts.lora_A.weight": (stack, inner),
        "experts.lora_B.weight": (hidden, stack),
    }
    left_out = [name for name, row in runs.rows(tmp_path / "vllm").items() if row.status == "skipped"]
    assert all(".router." in name for name in left_out)
    by_hand = models.with_tensors_of(pair.base_folder, pair.tuned_folder, left_out, tmp_path / "completed")
    assert_is_the_fine_tune(type(pair.base).from_pretrained(by_hand).eval(), pair, tmp_path / "vllm")
