"""Names that differ by a wrapper's prefix: the same adapter as from names that agree, by the base's names; never a guess."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from phlora_pipeline import adapter, names, pipeline
from phlora_pipeline.checkpoint import Checkpoint, TensorRef
from phlora_pipeline.errors import RequestError
from phlora_pipeline.verify import verify
from tests import models, runs, toys

LLAMA = frozenset(toys.llama_tensors())
LAYERS = len(LLAMA) - 2


def checkpoint(found: frozenset[str]) -> Checkpoint:
    return Checkpoint("/m", {name: TensorRef(name, "F32", (2,), "/m", 0, 8, "e") for name in sorted(found)}, {}, "f")


def matched(base: frozenset[str], tuned: frozenset[str]) -> Checkpoint:
    return names.by_the_names_of(checkpoint(base), checkpoint(tuned))


def llava(old: bool) -> frozenset[str]:
    """Names of a multimodal model: transformers moved the inner model's prefix to the front."""
    inner = "language_model.model" if old else "model.language_model"
    outer = "" if old else "model."
    found = {f"{inner}.{name.removeprefix('model.')}" for name in LLAMA if name.startswith("model.")}
    return frozenset(
        {*found, f"{outer}vision_tower.patch.weight", ("language_model." if old else "") + "lm_head.weight"}
    )


def compiled(name: str) -> str:
    """torch.compile of each layer, and of nothing else."""
    return re.sub(r"(layers\.\d+)\.", r"\1._orig_mod.", name)


WRAPPED: dict[str, tuple[Callable[[str], str], str]] = {
    "torch.compile": (lambda name: f"_orig_mod.{name}", f"{len(LLAMA)} without `_orig_mod.`"),
    "layers compiled": (compiled, f"{len(LLAMA) - 2} without `_orig_mod.`"),
    "DDP": (lambda name: f"module.{name}", f"{len(LLAMA)} without `module.`"),
    "PEFT": (lambda name: f"base_model.model.{name}", f"{len(LLAMA)} without `base_model.model.`"),
    "DDP of compiled": (lambda name: f"module._orig_mod.{name}", f"{len(LLAMA)} without `module._orig_mod.`"),
    "a language model's": (lambda name: f"language_model.{name}", f"{len(LLAMA)} without `language_model.`"),
}


@pytest.mark.parametrize("way", WRAPPED)
def test_a_wrapper_in_the_fine_tune_or_in_the_base(way: str) -> None:
    wrap, told = WRAPPED[way]
    wrapped = frozenset(map(wrap, LLAMA))
    found = matched(LLAMA, wrapped)
    assert found.tensors.keys() == LLAMA
    assert all(ref.name == name for name, ref in found.tensors.items())
    assert told in found.matched
    back = matched(wrapped, LLAMA)
    assert back.tensors.keys() == wrapped
    assert told.replace("without", "with") in back.matched


def test_a_head_that_the_base_lacks_is_left_as_it_is() -> None:
    bare = frozenset(name.removeprefix("model.") for name in LLAMA - {"lm_head.weight"})
    found = matched(bare, LLAMA)
    assert found.tensors.keys() == bare | {"lm_head.weight"}
    assert f"{len(bare)} without `model.`" in found.matched


def test_prefixes_that_changed_places() -> None:
    old, new = llava(old=True), llava(old=False)
    found = matched(new, old)
    assert found.tensors.keys() == new
    assert "with `model.language_model.` for `language_model.model.`" in found.matched
    assert "1 without `language_model.`" in found.matched  # the head


@pytest.mark.parametrize(
    ("base", "tuned"),
    [
        (LLAMA, LLAMA),
        (LLAMA, LLAMA - {"lm_head.weight"}),
        (LLAMA, LLAMA | {"score.weight"}),
        (LLAMA, frozenset(f"backbone.{name}" for name in LLAMA)),  # no wrapper that is known
        (LLAMA, frozenset(f"module.{name}" if "mlp" in name else f"other.{name}" for name in LLAMA)),  # half of them
        (frozenset({"model.x.w", "language_model.x.w"}), frozenset({"x.w"})),  # which of the two?
        (frozenset({"model.x.w", "y.w"}), frozenset({"x.w", "module.x.w"})),  # and which of these?
    ],
)
def test_where_names_agree_or_nothing_is_certain_they_stay(base: frozenset[str], tuned: frozenset[str]) -> None:
    found = matched(base, tuned)
    assert found.tensors.keys() == tuned
    assert not found.matched


def test_the_adapter_is_the_one_of_names_that_agree(tmp_path: Path) -> None:
    base = toys.llama_tensors()
    tuned = toys.fine_tuned(base)
    folder = toys.save(tmp_path / "base", base)
    plain = toys.save(tmp_path / "plain", tuned)
    wrapped = toys.save(tmp_path / "wrapped", {f"_orig_mod.{name}": value for name, value in tuned.items()}, shards=2)
    watcher = runs.Watcher()
    runs.extract(folder, plain, tmp_path / "one")
    runs.extract(folder, wrapped, tmp_path / "two", observer=watcher)
    one, two = (runs.contents(tmp_path / out) for out in ("one", "two"))
    for name in (adapter.WEIGHTS, adapter.CONFIG):
        assert one[name] == two[name]
    told = (
        f"{len(base)} of {len(base)} names of the fine-tune are matched to the base's: {len(base)} without `_orig_mod.`"
    )
    assert told in watcher.warnings
    assert told in pipeline.plan(runs.settings(folder, wrapped, tmp_path / "three")).plan.warnings
    assert json.loads(two["run.json"])["sources"]["tuned"]["names"] == told
    assert "names" not in json.loads(one["run.json"])["sources"]["tuned"]
    assert runs.rows(tmp_path / "two").keys() == base.keys()
    assert verify(str(folder), str(wrapped), str(tmp_path / "two")).passed


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_what_torch_compile_saves_loads_in_peft(tmp_path: Path) -> None:
    base = models.MODELS["llama"]()
    tuned = models.moved(base, where=models.matrices)
    wrapped: nn.Module = torch.compile(tuned, backend="eager")  # type: ignore[assignment]
    state = {name: value.contiguous() for name, value in wrapped.state_dict().items()}
    assert all(name.startswith("_orig_mod.") for name in state)
    pair = models.save(base, tmp_path / "base"), toys.save(tmp_path / "tuned", state, base.config.to_dict())
    runs.extract(*pair, tmp_path / "out", rank=64)
    assert models.distance(models.outputs(models.adapted(base, tmp_path / "out")), models.outputs(tuned)) < 1e-4


def test_another_architecture_is_refused_with_what_differs_and_how_many_match(tmp_path: Path) -> None:
    base = toys.save(tmp_path / "base", toys.llama_tensors())
    tensors = {
        name.replace("mlp", "ffn").replace("self_attn", "attention"): value
        for name, value in toys.llama_tensors().items()
    }
    same = len(tensors.keys() & LLAMA)
    told = rf"{same} of the fine-tune's {len(LLAMA)} tensor names are in the base, which has {len(LLAMA)} .*mlp.*ffn|attention"
    for model_type, says in (("llama", "different architectures"), ("qwen2", "'llama', the fine-tune 'qwen2'")):
        tuned = toys.save(tmp_path / model_type, tensors, {**toys.LLAMA, "model_type": model_type})
        with pytest.raises(RequestError, match=says) as caught:
            runs.extract(base, tuned, tmp_path / "out")
        assert re.search(told, caught.value.what)
        assert not (tmp_path / "out").exists()
