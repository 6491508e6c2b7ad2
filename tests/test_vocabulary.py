"""A vocabulary that the fine-tune has grown or shrunk: the shared rows are adapted, new ones kept where there is a place."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from phlora_pipeline import carry, targets
from phlora_pipeline.errors import RequestError
from phlora_pipeline.verify import verify
from tests import models, runs, toys

FULL = 80


def test_resized_is_told_by_embeddings_alone() -> None:
    shapes = [("embedding", (10, 4), (12, 4)), ("attention", (10, 4), (13, 4)), ("lm_head", (10, 4), (12, 5))]
    assert targets.resized(shapes) == {(10, 12)}  # type: ignore[arg-type]


def toy_pair(tmp_path: Path, base_rows: int, tuned_rows: int) -> tuple[Path, Path]:
    small = toys.llama_tensors(layers=1, vocab=base_rows)
    large = toys.fine_tuned(toys.llama_tensors(layers=1, vocab=tuned_rows), seed=2)
    for name, tensor in small.items():
        if tensor.shape == large[name].shape:
            large[name] = toys.fine_tuned({name: tensor}, seed=3)[name]
        else:
            rows = min(base_rows, tuned_rows)
            large[name][:rows] = tensor[:rows] + 0.01 * torch.randn(rows, tensor.shape[1])
    return toys.save(tmp_path / "base", small), toys.save(tmp_path / "tuned", large)


@pytest.mark.parametrize(("base_rows", "tuned_rows"), [(40, 43), (43, 40)])
def test_the_energy_of_the_shared_rows_is_accounted_for(base_rows: int, tuned_rows: int, tmp_path: Path) -> None:
    folders = toy_pair(tmp_path, base_rows, tuned_rows)
    result = runs.extract(*folders, tmp_path / "out", rank=16)
    rows = runs.rows(tmp_path / "out")
    before, after = (load_file(folder / "model.safetensors") for folder in folders)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        change = after[name][:40].double() - before[name][:40].double()
        assert rows[name].delta_norm == pytest.approx(float(change.norm()), rel=1e-6)
        assert rows[name].status == "adapted"
        assert (f"{name}[40:]" in rows) == (tuned_rows == 43)
    if tuned_rows == 43:
        new = rows["lm_head.weight[40:]"]
        assert (new.status, new.shape[0], new.delta_norm) == ("skipped", 3, None)
        assert ("lm_head.weight[40:]", "3 rows that the base does not have") in result.summary.uncompared
    assert verify(str(folders[0]), str(folders[1]), str(tmp_path / "out")).passed


def test_rows_that_are_not_a_vocabularys_are_refused(tmp_path: Path) -> None:
    base = toys.llama_tensors(layers=1)
    tuned = toys.fine_tuned(base)
    name = "model.layers.0.mlp.down_proj.weight"
    tuned[name] = torch.cat([tuned[name], tuned[name][:3]])
    folders = toys.save(tmp_path / "base", base), toys.save(tmp_path / "tuned", tuned)
    with pytest.raises(RequestError, match=r"shapes differ in 1 of .* tensors: model.layers.0.mlp.down_proj"):
        runs.extract(*folders, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def logits(model: torch.nn.Module, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        return model(input_ids=tokens).logits


def resized(model: PreTrainedModel, rows: int) -> PreTrainedModel:
    made = copy.deepcopy(model)
    made.resize_token_embeddings(rows, mean_resizing=False)
    return made.eval()


IN_PEFT = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning"),
    pytest.mark.filterwarnings(
        "ignore:`lora_bias=True` was passed but the targeted layer:peft.utils.warning.PeftWarning"
    ),
]


class TestInPeft:
    """A model with 64 tokens, and fine-tunes with 67 and 61."""

    pytestmark = IN_PEFT

    @pytest.mark.parametrize("name", ["llama", "llama-tied"])
    @pytest.mark.parametrize("rows", [67, 61])
    def test_on_the_base_as_it_is_shared_tokens_are_the_fine_tunes(self, name: str, rows: int, tmp_path: Path) -> None:
        base = models.MODELS[name]()
        tuned = models.moved(resized(base, rows), where=models.matrices)
        folders = models.save(base, tmp_path / "base"), models.save(tuned, tmp_path / "tuned")
        runs.extract(*folders, tmp_path / "out", rank=FULL, dialect="peft")
        shared = min(rows, 64)
        tokens = torch.arange(shared).reshape(1, -1)[:, :30]
        found = logits(models.adapted(base, tmp_path / "out"), tokens)
        assert found.shape[-1] == 64
        assert models.distance(found[..., :shared], logits(tuned, tokens)[..., :shared]) < 1e-4

    @pytest.mark.parametrize(
        ("name", "rows"), [("llama", 67), ("llama-tied", 67), ("qwen2", 67), ("qwen2", 61), ("opt", 61), ("phi", 61)]
    )
    def test_on_a_resized_base_what_is_kept_whole_is_there_too(self, name: str, rows: int, tmp_path: Path) -> None:
        """Qwen2 and Phi have biases, for whose sake embeddings are kept whole; Phi has one in its output, too."""
        base = {**models.MODELS, **models.STRANGERS}[name]()
        tuned = models.moved(resized(base, rows), where=models.everything)
        folders = models.save(base, tmp_path / "base"), models.save(tuned, tmp_path / "tuned")
        runs.extract(*folders, tmp_path / "out", rank=FULL, dialect="peft", carry="all")
        tokens = torch.arange(rows).reshape(1, -1)[:, -30:]
        found = logits(models.adapted(resized(base, rows), tmp_path / "out"), tokens)
        assert models.distance(found, logits(tuned, tokens)) < 1e-4
        with pytest.raises(RuntimeError, match="size mismatch"):
            models.adapted(base, tmp_path / "out")
        assert f"resize_token_embeddings({rows})" in (tmp_path / "out" / "README.md").read_text()
        by_name = runs.rows(tmp_path / "out")
        carried = {
            (row.status, row.reason)
            for key, row in by_name.items()
            if row.kind in {"embedding", "lm_head"} and row.shape[0] == rows
        }
        assert carried == {("carried", carry.OTHER_ROWS)}
        assert {row.status for key, row in by_name.items() if key.endswith("[64:]")} == (
            {"carried"} if rows > 64 else set()
        )
        assert verify(str(folders[0]), str(folders[1]), str(tmp_path / "out")).passed


def test_verify_refuses_two_vocabularies_in_one_adapter(tmp_path: Path) -> None:
    """An embedding that is kept with the fine-tune's rows, beside an output's pair with the base's: no model has both."""
    folders = toy_pair(tmp_path, 43, 40)
    out = tmp_path / "out"
    runs.extract(*folders, out, dialect="peft", exclude=("*embed*",))
    assert verify(*map(str, folders), str(out)).passed
    tensors = load_file(out / "adapter_model.safetensors")
    embedding = "model.embed_tokens"
    tensors[f"base_model.model.{embedding}.weight"] = load_file(folders[1] / "model.safetensors")[f"{embedding}.weight"]
    (out / "adapter_model.safetensors").unlink()
    save_file(tensors, out / "adapter_model.safetensors")
    config = json.loads((out / "adapter_config.json").read_text())
    (out / "adapter_config.json").write_text(json.dumps({**config, "modules_to_save": [embedding]}))
    problems = verify(*map(str, folders), str(out)).problems
    assert (
        "lm_head has a pair for the base's 43 rows, but model.embed_tokens.weight is kept with the fine-tune's 40: no model has both"
        in problems
    )
