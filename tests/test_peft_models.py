"""An adapter at full rank *is* the fine-tune: real architectures, saved by transformers, loaded by PEFT."""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from phlora_pipeline import pipeline
from phlora_pipeline.verify import verify
from tests import models, runs

pytestmark = [
    pytest.mark.slow,
    # PEFT 0.21 still calls what transformers 5 has renamed.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    # PEFT warns that merging a tied adapter would add its delta twice; the model card says so too.
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True` and a tied layer:UserWarning"),
    # A config has one fan_in_fan_out for GPT-2's Conv1D and its lm_head; PEFT sets it right where it does not apply.
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to True but the target module is:UserWarning"),
    # PEFT's own rank pattern for fused experts, looked up while it injects the other modules.
    pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match:RuntimeWarning"),
]

FULL = 64
"""No smaller than any matrix of the tiny models, and on the servers' grid."""

FOR_WHOM = [
    (name, dialect)
    for name in models.MODELS
    for dialect in ("peft", "portable")
    if (name, dialect) != ("gpt2", "portable")
]
"""Of GPT-2 no server takes anything: `tests/test_dialects.py`."""


@dataclass(frozen=True)
class Pair:
    """A base, a fine-tune, and their checkpoints."""

    base: PreTrainedModel
    tuned: PreTrainedModel
    base_folder: Path
    tuned_folder: Path


MakePair = Callable[[str, Callable[[str, Tensor], bool]], Pair]


@pytest.fixture(scope="module")
def make_pair(tmp_path_factory: pytest.TempPathFactory) -> MakePair:
    @functools.cache
    def make(name: str, where: Callable[[str, Tensor], bool]) -> Pair:
        base = {**models.MODELS, **models.STRANGERS}[name]()
        tuned = models.moved(base, where=where)
        folder = tmp_path_factory.mktemp(name)
        return Pair(base, tuned, models.save(base, folder / "base"), models.save(tuned, folder / "tuned"))

    return make


@pytest.mark.parametrize("name", models.MODELS)
def test_full_rank_for_peft_is_the_fine_tune(name: str, make_pair: MakePair, tmp_path: Path) -> None:
    pair = make_pair(name, models.matrices)
    wanted = models.outputs(pair.tuned)
    assert models.distance(models.outputs(pair.base), wanted) > 0.1
    runs.extract(pair.base_folder, pair.tuned_folder, tmp_path, rank=FULL, dialect="peft")
    assert models.distance(models.outputs(models.loaded(pair.base, tmp_path)), wanted) < 1e-4
    assert verify(str(pair.base_folder), str(pair.tuned_folder), str(tmp_path)).passed


def completed(pair: Pair, dialect: str, folder: Path) -> PeftModel:
    """The adapter at full rank, over a base that was given by hand what the manifest says is left out."""
    out = folder / "adapter"
    runs.extract(pair.base_folder, pair.tuned_folder, out, rank=FULL, dialect=dialect)
    left_out = [row.tensor for row in runs.rows(out).values() if row.status == "skipped"]
    base = models.with_tensors_of(pair.base_folder, pair.tuned_folder, left_out, folder / "completed")
    return models.loaded(type(pair.base).from_pretrained(base).eval(), out)


@pytest.mark.parametrize(("name", "dialect"), FOR_WHOM)
def test_what_is_left_out_is_the_whole_difference(name: str, dialect: str, make_pair: MakePair, tmp_path: Path) -> None:
    """Norms, biases, and what servers do not take: with them in the base, the adapter is the fine-tune, and only then."""
    pair = make_pair(name, models.everything)
    wanted = models.outputs(pair.tuned)
    assert models.distance(models.outputs(completed(pair, dialect, tmp_path)), wanted) < 1e-4
    assert models.distance(models.outputs(models.loaded(pair.base, tmp_path / "adapter")), wanted) > 1e-2
    assert verify(str(pair.base_folder), str(pair.tuned_folder), str(tmp_path / "adapter")).passed


@pytest.mark.parametrize("dialect", ["peft", "portable"])
@pytest.mark.parametrize("name", models.STRANGERS)
def test_misleading_names(name: str, dialect: str, make_pair: MakePair, tmp_path: Path) -> None:
    """The same for architectures in which a name alone does not tell what a weight is."""
    pair = make_pair(name, models.everything)
    assert models.distance(models.outputs(completed(pair, dialect, tmp_path)), models.outputs(pair.tuned)) < 1e-4


class Numbered(nn.Module):
    """Layers in a list, and a head whose modules have numbers for names, as `nn.Sequential` makes them."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleDict({"proj": nn.Linear(8, 8)}) for _ in range(3))
        self.classifier = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer["proj"](x)
        return self.classifier(x)


def test_a_number_is_no_name_of_a_target(tmp_path: Path) -> None:
    base, tuned = Numbered(), Numbered()
    for model, name in ((base, "base"), (tuned, "tuned")):
        (tmp_path / name).mkdir()
        save_file(model.state_dict(), tmp_path / name / "model.safetensors")
    runs.extract(tmp_path / "base", tmp_path / "tuned", tmp_path / "out", dialect="peft", force=True)
    with torch.no_grad():
        for one, other in zip(base.modules(), tuned.modules(), strict=True):
            if isinstance(one, nn.Linear):
                one.bias.copy_(other.bias)
        x = torch.randn(5, 8, generator=torch.Generator().manual_seed(1))
        assert models.distance(models.loaded(base, tmp_path / "out")(x), tuned(x)) < 1e-4


def test_portable_at_full_rank_is_the_fine_tune(make_pair: MakePair, tmp_path: Path) -> None:
    """An untied Llama's embeddings and head are taken by every server, so nothing at all is lost."""
    pair = make_pair("llama", models.matrices)
    result = runs.extract(pair.base_folder, pair.tuned_folder, tmp_path, rank=FULL)
    assert models.distance(models.outputs(models.loaded(pair.base, tmp_path)), models.outputs(pair.tuned)) < 1e-4
    assert result.summary.coverage == 1
    assert result.summary.skipped == 0


def test_pefts_silence_would_be_noticed(make_pair: MakePair, tmp_path: Path) -> None:
    """The check of keys in `models.loaded` can fail: PEFT itself raises nothing for a key that fits nowhere."""
    pair = make_pair("llama", models.matrices)
    runs.extract(pair.base_folder, pair.tuned_folder, tmp_path)
    weights = tmp_path / "adapter_model.safetensors"
    there, nowhere = (f"base_model.model.model.layers.{layer}.self_attn.q_proj.lora_A.weight" for layer in (1, 9))
    renamed = {nowhere if key == there else key: value for key, value in load_file(weights).items()}
    weights.unlink()
    save_file(renamed, weights)
    with pytest.warns(UserWarning, match="Found missing adapter keys"):
        model = models.adapted(pair.base, tmp_path)
    keys = model.load_adapter(str(tmp_path), "again")
    assert keys.unexpected_keys == [nowhere]
    assert keys.missing_keys == [there.replace(".weight", ".again.weight")]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_no_rank_is_worse_than_a_smaller_one(dtype: str, make_pair: MakePair, tmp_path: Path) -> None:
    """What is missing of the fine-tune after PEFT's own merge never grows with r; nor does the manifest say so."""
    pair = make_pair("qwen2", models.matrices)
    wanted = pair.tuned.state_dict()
    residuals, energies = [], []
    for rank in (1, 3, 16, FULL):
        out = tmp_path / str(rank)
        runs.extract(pair.base_folder, pair.tuned_folder, out, rank=rank, dialect="peft", dtype=dtype)
        merged = models.adapted(pair.base, out).merge_and_unload().state_dict()
        residuals.append({name: float((wanted[name] - merged[name]).norm()) for name in wanted})
        energies.append({name: row.written_energy for name, row in runs.rows(out).items() if row.status == "adapted"})
    rounding = {"float32": 1e-6, "bfloat16": 2**-8, "float16": 2**-11}[dtype]
    for smaller, larger in itertools.pairwise(residuals):
        assert all(larger[name] <= smaller[name] + 1e-6 for name in larger)
    for smaller_e, larger_e in itertools.pairwise(energies):
        assert all(larger_e[name] >= smaller_e[name] for name in larger_e)
    changes = {name: float((wanted[name] - value).norm()) for name, value in pair.base.state_dict().items()}
    assert all(residuals[-1][name] <= 4 * rounding * changes[name] for name in energies[-1])


@pytest.mark.parametrize("name", ["llama", "qwen2", "bert", "mixtral"])
def test_portable_means_one_rank_one_scale_and_plain_lists(name: str, make_pair: MakePair, tmp_path: Path) -> None:
    """What each server of serving.md §4 assumes, some of them without looking."""
    pair = make_pair(name, models.everything)
    result = runs.extract(pair.base_folder, pair.tuned_folder, tmp_path, rank=5)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert result.written_rank == config["r"] == config["lora_alpha"] == 8
    assert config["bias"] == "none"
    for absent in ("rank_pattern", "alpha_pattern", "modules_to_save", "use_rslora", "use_dora", "fan_in_fan_out"):
        assert not config[absent]
    assert isinstance(config["target_modules"], list)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    for key, value in tensors.items():
        assert key.startswith("base_model.model.")
        assert value.shape[key.endswith(("lora_B.weight", "lora_embedding_B"))] == 8
        padding = value[:, 5:] if "_B" in key else value[5:]
        assert not padding.any()
        assert value.any()


def only(*fragments: str) -> Callable[[str, Tensor], bool]:
    return lambda name, _: any(fragment in name for fragment in fragments)


WITHIN_LAYER_0 = only("layers.0.self_attn.q_proj.weight", "layers.0.mlp.up_proj.weight")


def test_families_are_whole_and_zero_pairs_change_nothing(make_pair: MakePair, tmp_path: Path) -> None:
    """q and up changed in one of two layers: servers fuse q/k/v and gate/up, and stack layers, so all of those have pairs."""
    pair = make_pair("llama", WITHIN_LAYER_0)
    runs.extract(pair.base_folder, pair.tuned_folder, tmp_path, rank=FULL)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    leaves = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj"]
    everywhere = {f"model.layers.{layer}.{leaf}" for layer in (0, 1) for leaf in leaves}
    changed = {"model.layers.0.self_attn.q_proj", "model.layers.0.mlp.up_proj"}
    keys = {f"base_model.model.{module}.lora_{side}.weight" for module in everywhere for side in "AB"}
    assert set(tensors) == keys
    assert {key for key in keys if tensors[key].any()} == {
        f"base_model.model.{module}.lora_{side}.weight" for module in changed for side in "AB"
    }
    status = {row.module: row.status for row in runs.rows(tmp_path).values()}
    assert {module for module, found in status.items() if found == "zero_filled"} == everywhere - changed
    assert {module for module, found in status.items() if found == "adapted"} == changed
    assert models.distance(models.outputs(models.loaded(pair.base, tmp_path)), models.outputs(pair.tuned)) < 1e-4


def test_one_changed_expert_gives_every_expert_a_pair(make_pair: MakePair, tmp_path: Path) -> None:
    base = models.MODELS["mixtral"]()
    tuned = models.moved(base, where=lambda *_: False)
    with torch.no_grad():
        tuned.model.layers[1].mlp.experts.down_proj[2].add_(0.3)
    folders = models.save(base, tmp_path / "base"), models.save(tuned, tmp_path / "tuned")
    out = tmp_path / "out"
    runs.extract(*folders, out, rank=1)
    status = {row.module: row.status for row in runs.rows(out).values()}
    experts = {
        f"model.layers.{layer}.block_sparse_moe.experts.{expert}.{leaf}"
        for layer in range(2)
        for expert in range(4)
        for leaf in ("w1", "w2", "w3")
    }
    changed = "model.layers.1.block_sparse_moe.experts.2.w2"
    assert {module for module, found in status.items() if found == "adapted"} == {changed}
    assert {module for module, found in status.items() if found == "zero_filled"} == experts - {changed}
    assert models.distance(models.outputs(models.loaded(base, out)), models.outputs(tuned)) < 1e-4


def test_a_tied_delta_is_on_both_ends_for_peft(make_pair: MakePair, tmp_path: Path) -> None:
    """Half of it is worse: taken from the output alone, the adapter is far from the fine-tune."""
    pair = make_pair("llama-tied", models.matrices)
    runs.extract(pair.base_folder, pair.tuned_folder, tmp_path, rank=FULL, dialect="peft")
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    embedding = (tensors[f"base_model.model.model.embed_tokens.lora_embedding_{side}"] for side in "AB")
    head = (tensors[f"base_model.model.lm_head.lora_{side}.weight"] for side in "BA")
    assert all(torch.equal(one.mT, other) for one, other in zip(embedding, head, strict=True))
    model = models.loaded(pair.base, tmp_path)
    assert models.distance(models.outputs(model), models.outputs(pair.tuned)) < 1e-4
    with torch.no_grad():
        model.get_submodule("base_model.model.lm_head.lora_B.default").weight.zero_()
    assert models.distance(models.outputs(model), models.outputs(pair.tuned)) > 0.1


def test_a_tied_delta_is_dropped_by_name_where_servers_differ(make_pair: MakePair, tmp_path: Path) -> None:
    pair = make_pair("llama-tied", models.matrices)
    result = runs.extract(pair.base_folder, pair.tuned_folder, tmp_path, rank=FULL)
    before, after = (load_file(folder / "model.safetensors") for folder in (pair.base_folder, pair.tuned_folder))
    energies = {name: float((after[name].double() - before[name].double()).square().sum()) for name in before}
    [(tensor, reason, share, _)] = result.summary.left_out
    assert tensor == "model.embed_tokens.weight"
    assert "tied to lm_head" in reason
    assert "--for peft" in reason
    assert share == pytest.approx(energies[tensor] / sum(energies.values()), rel=1e-6)
    assert result.summary.coverage == pytest.approx(1 - share, rel=1e-6)
    assert not any("embed" in key or "lm_head" in key for key in load_file(tmp_path / "adapter_model.safetensors"))
    assert "tied to lm_head" in (tmp_path / "README.md").read_text()


@pytest.mark.parametrize(("name", "dialect"), FOR_WHOM)
def test_the_plan_accounts_for_every_tensor_on_disk(
    name: str, dialect: str, make_pair: MakePair, tmp_path: Path
) -> None:
    pair = make_pair(name, models.matrices)
    plan = pipeline.plan(runs.settings(pair.base_folder, pair.tuned_folder, tmp_path, dialect=dialect)).plan
    told = [*(target.name for target in plan.adapted), *plan.left_out, *plan.unread]
    assert sorted(told) == sorted(load_file(pair.tuned_folder / "model.safetensors"))
    assert all(reason for reason in plan.left_out.values())


@pytest.mark.parametrize(("name", "leaf"), [("mixtral", "w1"), ("qwen3-moe", "gate_proj")])
def test_experts_are_matrices_on_disk_and_adapted_one_by_one(
    name: str, leaf: str, make_pair: MakePair, tmp_path: Path
) -> None:
    """transformers 5 fuses experts in memory and writes them apart; servers and PEFT take the names on disk."""
    pair = make_pair(name, models.matrices)
    plan = pipeline.plan(runs.settings(pair.base_folder, pair.tuned_folder, tmp_path)).plan
    adapted = {target.module for target in plan.adapted if target.kind == "expert"}
    assert len(adapted) == 2 * 4 * 3
    assert sum(module.endswith(f".experts.3.{leaf}") for module in adapted) == 2
