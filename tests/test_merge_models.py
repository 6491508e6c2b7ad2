"""base + the adapter extracted at full rank = the fine-tune, to one rounding: real models, on disk as transformers writes them.

What the tests assert, entry by entry. Let t be the fine-tune's weight in its dtype, and e what float32 loses on the way from
it to the factors and back: the merged weight is round(t + e). Since t itself is a number of that dtype and rounding goes to the
nearest one, |merged − t| ≤ 2|e|; and merged = t wherever |e| is under a quarter of t's ulp. With |e| ≤ 1e-6 of the largest
entry, "to one rounding of its dtype" means: in 16 bits every entry above a thousandth (bf16) or a hundredth (fp16) of the largest
is the fine-tune's bit for bit, and those below are within 2e-6 of the largest. In float32 no entry need be: e is the rounding of
the factors themselves, several ulps of the largest entry, and no float32 factors hold more.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from tests import models, runs, toys
from tests.loras import PEFT_WARNS, trained
from tests.test_carry import OF_PEFT, net, saved
from tests.test_merge_copy import Watcher, contents, merged, tensors_of

pytestmark = [pytest.mark.slow, *OF_PEFT, *PEFT_WARNS]

FULL = 80
LOST = 1e-6
"""e: what the float32 factors and the float32 sum may lose, of the largest entries of update and weight."""

Where = Callable[[str, Tensor], bool]


def weights(name: str, parameter: Tensor) -> bool:
    return parameter.ndim >= 2 and not name.endswith("bias")


def spread(folder: Path, model: PreTrainedModel, **others: object) -> Path:
    """Over several shards, with an index."""
    model.save_pretrained(folder, max_shard_size="20KB", **others)
    assert (folder / "model.safetensors.index.json").exists()
    return folder


def assert_one_rounding(merged: Path, tuned: Path, base: Path) -> None:
    """The theorem above; whatever did not change is the base's bit for bit, and what only counts is the fine-tune's."""
    found, wanted, before = (tensors_of(folder) for folder in (merged, tuned, base))
    assert found.keys() == wanted.keys()
    equal = total = 0
    for name, value in wanted.items():
        got = found[name]
        assert (got.dtype, got.shape) == (value.dtype, value.shape), name
        if not value.is_floating_point() or (name in before and torch.equal(value, before[name])):
            assert torch.equal(got, value), name
            continue
        t, error = value.double(), (got.double() - value.double()).abs()
        e = LOST * float(t.abs().max())
        assert float(error.max()) <= 2 * e, (name, float(error.max()), e)
        # Wherever e is less than a quarter of an ulp, the rounding takes it away.
        ulp = torch.finfo(value.dtype).eps * t.abs() / 2
        assert torch.equal(got[ulp > 4 * e], value[ulp > 4 * e]), name
        equal, total = equal + int((got == value).sum()), total + value.numel()
    assert total
    if {value.dtype for value in wanted.values()} == {torch.bfloat16}:
        assert equal > 0.999 * total, equal / total


CASES = [
    *(("llama", dtype, weights, False) for dtype in (torch.bfloat16, torch.float32, torch.float16)),
    ("llama-tied", torch.bfloat16, weights, False),
    ("phi3", torch.bfloat16, weights, False),
    ("gpt2", torch.bfloat16, weights, False),
    ("mixtral", torch.bfloat16, weights, False),
    ("mixtral", torch.bfloat16, weights, True),
    ("qwen3-moe", torch.float32, weights, True),
    ("gpt-oss", torch.bfloat16, weights, True),
    *((name, torch.bfloat16, models.everything, False) for name in ("bert", "qwen2", "llama-tied", "gpt2")),
]
"""Model, dtype, what changed (with more than weights: kept whole, `carry all`), and whether its experts are stacked on disk."""


@pytest.mark.parametrize(("name", "dtype", "where", "stacked"), CASES)
def test_at_full_rank_it_is_the_fine_tune_to_one_rounding(
    name: str, dtype: torch.dtype, where: Where, stacked: bool, tmp_path: Path
) -> None:
    base = {**models.MODELS, "gpt-oss": models.gpt_oss}[name]().to(dtype)
    tuned = models.moved(base, where=where)
    folders = [
        spread(tmp_path / side, model, save_original_format=not stacked)
        for side, model in (("base", base), ("tuned", tuned))
    ]
    carry = "all" if where is models.everything else "none"
    runs.extract(*folders, tmp_path / "adapter", rank=FULL, dialect="peft", carry=carry)
    result = merged(folders[0], tmp_path / "adapter", out=tmp_path / "merged")
    assert result.outcome == "committed"
    assert_one_rounding(tmp_path / "merged", folders[1], folders[0])
    shards = {path.name for path in folders[0].glob("*.safetensors")}
    assert {path.name for path in (tmp_path / "merged").glob("*.safetensors")} == shards
    for document in ("config.json", "model.safetensors.index.json"):
        assert (tmp_path / "merged" / document).read_bytes() == (folders[0] / document).read_bytes()
    loaded = type(base).from_pretrained(tmp_path / "merged", dtype=dtype).eval()
    wanted = type(base).from_pretrained(folders[1], dtype=dtype).eval()
    assert models.distance(models.outputs(loaded).float(), models.outputs(wanted).float()) < 1e-4


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
def test_it_is_what_peft_merges(name: str, stacked: bool, tmp_path: Path) -> None:
    """Of a small rank, in float32, where PEFT's own arithmetic is the same."""
    base = models.MODELS[name]()
    tuned = models.moved(base, where=weights)
    folders = [models.save(model, tmp_path / side, as_in_memory=stacked) for side, model in (("base", base), ("tuned", tuned))]  # fmt: skip
    # GPT-2 is tied, and of a tie PEFT merges both ends into the one matrix: twice the update.
    targets = "linear" if base.config.tie_word_embeddings else "all"
    runs.extract(*folders, tmp_path / "adapter", rank=3, dialect="peft", targets=targets)
    merged(folders[0], tmp_path / "adapter", out=tmp_path / "merged")
    ours = type(base).from_pretrained(tmp_path / "merged").state_dict()
    theirs = models.adapted(base, tmp_path / "adapter").merge_and_unload().state_dict()
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        assert torch.allclose(ours[key], value, rtol=1e-5, atol=1e-5), key


def test_a_tied_update_is_added_once_and_by_peft_twice(tmp_path: Path) -> None:
    """As the adapter's card says."""
    base = models.MODELS["llama-tied"]()
    folders = [models.save(model, tmp_path / side) for side, model in (("base", base), ("tuned", models.moved(base, where=weights)))]  # fmt: skip
    runs.extract(*folders, tmp_path / "adapter", rank=FULL, dialect="peft")
    card = (tmp_path / "adapter" / "README.md").read_text()
    assert "a merger that keeps the tie, as PEFT's, adds it twice. `phlora merge` adds it once." in card
    merged(folders[0], tmp_path / "adapter", out=tmp_path / "merged")
    name = "model.embed_tokens.weight"
    before, after, ours = (tensors_of(folder)[name] for folder in (*folders, tmp_path / "merged"))
    assert torch.allclose(ours, after, atol=1e-5)
    theirs = models.adapted(base, tmp_path / "adapter").merge_and_unload().state_dict()[name]
    assert torch.allclose(theirs, 2 * after - before, atol=1e-5)


ATTENTION = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj"]}
TRAINED = [
    ("llama", ATTENTION),
    ("llama", {**ATTENTION, "use_rslora": True, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 3}}),
    ("llama", {**ATTENTION, "modules_to_save": ["lm_head", "norm"]}),
    ("llama", {**ATTENTION, "target_modules": ["embed_tokens", "down_proj"]}),
    ("gpt2", {"r": 4, "lora_alpha": 6, "target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
    ("mixtral", {"r": 2, "lora_alpha": 3, "target_modules": ["q_proj"], "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]}),
]  # fmt: skip


@pytest.mark.parametrize(("name", "settings"), TRAINED)
@pytest.mark.parametrize("stacked", [False, True])
def test_adapters_that_were_trained_are_merged_as_peft_does(
    name: str, settings: dict[str, object], stacked: bool, tmp_path: Path
) -> None:
    base = models.MODELS[name]()
    folder = models.save(base, tmp_path / "base", as_in_memory=stacked)
    trained(base, tmp_path / "adapter", **settings)
    merged(folder, tmp_path / "adapter", out=tmp_path / "merged")
    ours = type(base).from_pretrained(tmp_path / "merged").state_dict()
    theirs = PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path / "adapter")).merge_and_unload().state_dict()
    assert ours.keys() == theirs.keys()
    changed = [key for key, value in base.state_dict().items() if not torch.equal(value, ours[key])]
    assert len(changed) >= 3
    for key, value in theirs.items():
        assert torch.allclose(ours[key], value, rtol=1e-5, atol=1e-5), key


def test_several_with_weights_are_their_sum(tmp_path: Path) -> None:
    """And the order does not matter, beyond rounding; a weight of −1 takes an adapter off again."""
    base = models.MODELS["llama"]()
    folder = models.save(base, tmp_path / "base")
    one, other = tmp_path / "one", tmp_path / "other"
    trained(base, one, seed=1, **ATTENTION)
    trained(base, other, seed=2, **{**ATTENTION, "r": 3, "target_modules": ["v_proj", "lm_head"]})
    merged(folder, one, out=tmp_path / "1")
    merged(folder, other, out=tmp_path / "2")
    merged(folder, (one, 0.7), (other, -0.3), out=tmp_path / "both")
    merged(folder, (other, -0.3), (one, 0.7), out=tmp_path / "turned")
    merged(tmp_path / "1", (one, -1.0), out=tmp_path / "back")
    before, first, second, both, turned, back = (
        tensors_of(tmp_path / name) for name in ("base", "1", "2", "both", "turned", "back")
    )
    for name, value in before.items():
        wanted = value.double() + 0.7 * (first[name].double() - value) - 0.3 * (second[name].double() - value)
        assert torch.allclose(both[name].double(), wanted, rtol=1e-5, atol=1e-6), name
        assert torch.allclose(both[name], turned[name], rtol=1e-6, atol=1e-6)
        assert torch.allclose(back[name], value, rtol=1e-5, atol=1e-6)


def test_what_was_merged_can_be_extracted_again(tmp_path: Path) -> None:
    """An adapter of rank 4, merged into a float32 base, is all there is between the two: rank 4 holds it, and it is the same."""
    base = models.MODELS["qwen2"]()
    folder = models.save(base, tmp_path / "base")
    tuned = models.save(models.moved(base, where=weights), tmp_path / "tuned")
    runs.extract(folder, tuned, tmp_path / "first", rank=4)
    merged(folder, tmp_path / "first", out=tmp_path / "merged")
    result = runs.extract(folder, tmp_path / "merged", tmp_path / "second", rank=4)
    assert result.summary.preserved_energy == pytest.approx(1, abs=1e-6)
    for module in (row.module for row in runs.rows(tmp_path / "second").values() if row.status == "adapted"):
        if not module.endswith("embed_tokens"):
            one, other = (runs.written_delta(tmp_path / name, module) for name in ("first", "second"))
            assert models.distance(other, one) < 1e-4, module


@pytest.mark.parametrize(
    ("name", "rows"), [("llama", 67), ("llama-tied", 67), ("qwen2", 67), ("llama", 61), ("llama-tied", 61)]
)
def test_a_vocabulary_of_another_size(name: str, rows: int, tmp_path: Path) -> None:
    """A larger one is kept whole; of a smaller one the shared rows are adapted, and the others stay the base's."""
    base = models.MODELS[name]().bfloat16()
    tuned = copy.deepcopy(base)
    tuned.resize_token_embeddings(rows, mean_resizing=False)
    tuned = models.moved(tuned, where=models.everything)
    folders = spread(tmp_path / "base", base), spread(tmp_path / "tuned", tuned)
    runs.extract(*folders, tmp_path / "adapter", rank=FULL, dialect="peft", carry="all")
    watcher = Watcher()
    merged(folders[0], tmp_path / "adapter", out=tmp_path / "merged", observer=watcher)
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    found, wanted = tensors_of(tmp_path / "merged"), tensors_of(folders[1])
    embedding = "model.embed_tokens.weight"
    if rows < 64:
        assert (config["vocab_size"], len(found[embedding])) == (64, 64)
        assert torch.equal(found[embedding][61:], tensors_of(folders[0])[embedding][61:])
        assert torch.allclose(found[embedding][:61].float(), wanted[embedding].float(), rtol=2**-7, atol=1e-5)
        return
    assert_one_rounding(tmp_path / "merged", folders[1], folders[0])
    assert config["vocab_size"] == rows
    assert torch.equal(found[embedding], wanted[embedding])
    assert f"from 64 rows to {rows}" in watcher.warnings[0]
    index = json.loads((tmp_path / "merged" / "model.safetensors.index.json").read_text())
    assert index["metadata"] == json.loads((folders[1] / "model.safetensors.index.json").read_text())["metadata"]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.bfloat16)
    tokens = torch.arange(rows - 27, rows)[None]
    one, other = (model(input_ids=tokens).logits.float().detach() for model in (loaded, tuned))
    assert models.distance(one, other) < 1e-2


def test_convolutions_norms_and_what_counts(tmp_path: Path) -> None:
    base = net(1)
    tuned = copy.deepcopy(base)
    with torch.no_grad():
        for number, parameter in enumerate(tuned.parameters()):
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number)))
        tuned.norm.num_batches_tracked += 2**40 + 1
    folders = saved(base, tmp_path / "base"), saved(tuned, tmp_path / "tuned")
    runs.extract(*folders, tmp_path / "adapter", rank=FULL, dialect="peft", carry="all")
    merged(folders[0], tmp_path / "adapter", out=tmp_path / "merged")
    assert_one_rounding(tmp_path / "merged", folders[1], folders[0])
    assert (contents(tmp_path / "merged").keys()) == {"config.json", "model.safetensors"}


@pytest.mark.parametrize("dialect", ["kohya", "peft"])
def test_a_unet_in_either_dialect(dialect: str, tmp_path: Path) -> None:
    shapes = {"down_blocks.0.attn.to_q": (24, 16), "down_blocks.0.resnets.0.conv1": (8, 4, 3, 3), "mid.proj": (6, 9)}
    generator = torch.Generator().manual_seed(4)
    base = {f"{module}.weight": torch.randn(shape, generator=generator).half() for module, shape in shapes.items()}
    unet = {"_class_name": "UNet2DConditionModel"}
    folders = toys.save(tmp_path / "b", base, unet), toys.save(tmp_path / "t", toys.fine_tuned(base), unet)
    runs.extract(*folders, tmp_path / "adapter", rank=FULL, dialect=dialect)
    merged(folders[0], tmp_path / "adapter", out=tmp_path / "merged")
    assert_one_rounding(tmp_path / "merged", folders[1], folders[0])
