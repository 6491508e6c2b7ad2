"""What is no plain LoRA is refused by name; what is damaged says where."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AdaLoraConfig, IA3Config, LoHaConfig, LoKrConfig, VeraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from phlora_pipeline import lora
from phlora_pipeline.errors import CheckpointError, NotFoundError, PhloraError, RequestError
from tests import loras

pytestmark = loras.PEFT_WARNS

Change = Callable[[dict[str, Any], dict[str, Tensor]], object]
PROJ = "base_model.model.proj"


class Small(nn.Module):
    """Two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.proj, self.out = nn.Linear(12, 8), nn.Linear(8, 6)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    loras.trained(Small(), tmp_path / "adapter", r=4, lora_alpha=6, target_modules=["proj", "out"])
    return tmp_path / "adapter"


def edited(folder: Path, change: Change) -> Path:
    path = folder / "adapter_config.json"
    config, tensors = json.loads(path.read_text()), load_file(folder / "adapter_model.safetensors")
    change(config, tensors)
    path.write_text(json.dumps(config))
    (folder / "adapter_model.safetensors").unlink()
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def refusal(url: Path, kind: type[PhloraError] = CheckpointError) -> str:
    with pytest.raises(kind) as caught:
        lora.open_adapter(str(url))
    assert caught.value.exit_code == 2
    assert caught.value.remedy
    return caught.value.what


def test_what_it_says(saved: Path) -> None:
    adapter = lora.open_adapter(str(saved))
    assert [(module.name, module.rank, module.scale, module.inputs, module.outputs) for module in adapter.modules.values()] == [
        ("out", 4, 1.5, 8, 6), ("proj", 4, 1.5, 12, 8),
    ]  # fmt: skip
    assert (adapter.rank, adapter.kohya, adapter.whole) == (4, False, ())
    assert lora.open_adapter(str(saved / "adapter_model.safetensors")).modules == adapter.modules


def test_its_fingerprint_is_of_its_bytes_and_its_config(saved: Path) -> None:
    first = lora.open_adapter(str(saved)).fingerprint
    assert lora.open_adapter(str(saved)).fingerprint == first
    edited(saved, lambda config, _: config.update(lora_alpha=7))
    assert lora.open_adapter(str(saved)).fingerprint != first


@pytest.mark.parametrize(
    ("config", "named"),
    [
        (AdaLoraConfig(target_modules=["proj"], total_step=10), "ADALORA"),
        (LoHaConfig(target_modules=["proj"]), "LOHA"),
        (LoKrConfig(target_modules=["proj"]), "LOKR"),
        (VeraConfig(target_modules=["proj"]), "VERA"),
        (IA3Config(target_modules=["proj"], feedforward_modules=[]), "IA3"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_other_methods(config: Any, named: str, tmp_path: Path) -> None:
    get_peft_model(Small(), config).save_pretrained(tmp_path)
    assert f"is not a plain low-rank update of its base: {named}: " in refusal(tmp_path)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"use_dora": True}, "DoRA"),
        *(({"init_lora_weights": name}, f"init_lora_weights {name!r}") for name in ("pissa", "pissa_niter_4", "olora")),
    ],
)
def test_loras_that_are_no_update_of_their_base(settings: dict[str, Any], named: str, tmp_path: Path) -> None:
    loras.trained(Small(), tmp_path, r=4, target_modules=["proj"], **settings)
    assert named in refusal(tmp_path)


@pytest.mark.parametrize("start", [True, False, "gaussian", "orthogonal", "eva", "mica"])
def test_initialisations_that_leave_the_base_alone(start: object, saved: Path) -> None:
    edited(saved, lambda config, _: config.update(init_lora_weights=start))
    assert len(lora.open_adapter(str(saved)).modules) == 2


@pytest.mark.parametrize(
    ("field", "value", "named"),
    [
        ("alora_invocation_tokens", [1, 2], "aLoRA"),
        ("use_qalora", True, "QALoRA"),
        ("layer_replication", [[0, 4], [2, 5]], "layer replication"),
        ("kasa_config", {"beta": 1}, "KaSA"),
        ("trainable_token_indices", [3], "trainable tokens"),
        ("init_lora_weights", "corda", "corda"),
        ("init_lora_weights", "lora_ga", "lora_ga"),
        ("init_lora_weights", "loftq", "loftq"),
        ("peft_type", "PROMPT_TUNING", "PROMPT_TUNING: it is not a LoRA"),
    ],
)
def test_variants_by_their_config(field: str, value: object, named: str, saved: Path) -> None:
    edited(saved, lambda config, _: config.update({field: value}))
    assert named in refusal(saved)


@pytest.mark.parametrize(
    ("key", "named"),
    [
        (f"{PROJ}.lora_magnitude_vector", "DoRA"),
        ("lora_unet_x.hada_w1_a", "LoHa"),
        ("lora_unet_x.lokr_w1", "LoKr"),
        ("lora_unet_x.lora_mid.weight", "LoCon"),
        ("lora_unet_x.dora_scale", "DoRA"),
        ("lora_unet_x.diff", "a full difference"),
    ],
)
def test_variants_by_their_keys(key: str, named: str, tmp_path: Path, saved: Path) -> None:
    edited(saved, lambda _, tensors: tensors.update({key: torch.ones(4, 4)}))
    assert named in refusal(saved)
    pair = {"lora_unet_x.lora_down.weight": torch.ones(2, 4), "lora_unet_x.lora_up.weight": torch.ones(4, 2)}
    save_file({**pair, key: torch.ones(4, 4)}, tmp_path / "k.safetensors")
    assert named in refusal(tmp_path / "k.safetensors")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda _, t: t.pop(f"{PROJ}.lora_B.weight"), "proj has lora_A without its counterpart"),
        (lambda _, t: t.update({f"{PROJ}.lora_A.weight": torch.ones(3, 12)}), "proj has [3, 12] and [8, 4], adapter_config.json says rank 4"),
        (lambda c, _: c.update(r=5), "says rank 5"),
        (lambda c, _: c.update(r=2), "says rank 2"),
        (lambda c, _: c.update(rank_pattern={"proj": 2}), "proj has [4, 12] and [8, 4], adapter_config.json says rank 2"),
        (lambda c, _: c.update(r=0), "0 is no rank"),
        (lambda c, _: c.update(lora_alpha=None), "None is no lora_alpha"),
        (lambda _, t: t.update({f"{PROJ}.lora_A.weight": torch.ones(4, 12, dtype=torch.int8)}), "is stored as I8"),
        (lambda _, t: t.update({f"{PROJ}.norm.weight": torch.ones(4)}), "unexpected key 'base_model.model.proj.norm.weight'"),
        (lambda _, t: t.clear() or t.update(x=torch.ones(1)), "unexpected key 'x'"),
    ],
)  # fmt: skip
def test_what_does_not_fit_together(change: Change, says: str, saved: Path) -> None:
    assert says in refusal(edited(saved, change))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_told_with_its_place(bad: float, saved: Path) -> None:
    edited(saved, lambda _, tensors: tensors[f"{PROJ}.lora_B.weight"].view(-1)[6:8].fill_(bad))
    module = lora.open_adapter(str(saved)).modules["proj"]
    with pytest.raises(CheckpointError, match=r"proj\.lora_B\.weight .* has 2 entries .* the first at \[1, 2\]"):
        module.factors()


def test_what_is_not_there(tmp_path: Path, saved: Path) -> None:
    assert "there is no adapter" in refusal(tmp_path / "nothing", NotFoundError)
    (saved / "adapter_config.json").unlink()
    assert "adapter_config.json is missing" in refusal(saved, NotFoundError)
    assert "adapter_config.json is missing" in refusal(saved / "adapter_model.safetensors", NotFoundError)
    (saved / "adapter_model.safetensors").rename(saved / "adapter_model.bin")
    assert "is a pickle" in refusal(saved)


def test_a_config_that_is_none(saved: Path) -> None:
    (saved / "adapter_config.json").write_text("[]")
    assert "not the config of an adapter" in refusal(saved, RequestError)
    (saved / "adapter_config.json").write_text("{")
    assert "is not JSON" in refusal(saved)
