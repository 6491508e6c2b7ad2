"""What LoRA has no form for, kept whole: with it a full-rank adapter *is* the fine-tune, norms, biases, new rows and all."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from phlora_pipeline import carry
from phlora_pipeline.carry import Place
from phlora_pipeline.errors import RequestError
from phlora_pipeline.verify import verify
from tests import models, runs

FULL = 64

OF_PEFT = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to True but the target module is:UserWarning"),
    pytest.mark.filterwarnings(
        "ignore:`lora_bias=True` was passed but the targeted layer:peft.utils.warning.PeftWarning"
    ),
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning"),
    pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match:RuntimeWarning"),
]


class TestPlaces:
    """Where PEFT can keep a tensor."""

    NAMES = (
        "a.q.weight",
        "a.q.bias",
        "a.norm.weight",
        "a.norm.bias",
        "a.scale",
        "top.weight",
        "top.inner.weight",
        "loose",
    )

    def test_a_bias_is_its_pairs_and_the_rest_whole_modules(self) -> None:
        wanted = {"a.q.bias": "bias", "a.norm.weight": "norm", "a.norm.bias": "bias"}
        found, without = carry.places(wanted, self.NAMES, {"a.q": "attention"})  # type: ignore[arg-type]
        assert found == {
            "a.q.bias": Place("bias", "a.q"),
            "a.norm.weight": Place("module", "a.norm"),
            "a.norm.bias": Place("module", "a.norm"),
        }
        assert without == {}

    def test_a_bias_beside_a_weight_that_is_not_adapted_takes_its_module_along(self) -> None:
        found, _ = carry.places({"a.q.bias": "bias"}, self.NAMES, {})
        assert found == {"a.q.bias": Place("module", "a.q")}

    @pytest.mark.parametrize("name", ["a.scale", "top.weight", "loose"])
    def test_a_module_with_others_inside_is_never_taken(self, name: str) -> None:
        found, without = carry.places({name: "other"}, self.NAMES, {})
        assert found == {}
        assert "saves whole modules" in without[name]

    def test_no_biases_beside_experts(self) -> None:
        _, without = carry.places({"a.q.bias": "bias"}, self.NAMES, {"a.q": "attention", "e.experts.0.w1": "expert"})
        assert "experts" in without["a.q.bias"]

    def test_what_peft_would_take_for_one_of_them_is_kept_too(self) -> None:
        """By the end of its name, whatever its components are."""
        names = ("norm.weight", "layers.0.layernorm.weight", "layers.0.other.weight")
        kept = carry.kept_modules({"norm.weight"}, {"norm.weight": Place("module", "norm")}, names)
        assert kept == ["layers.0.layernorm", "norm"]

    def test_nothing_is_kept_that_did_not_change(self) -> None:
        assert carry.kept_modules(set(), {"norm.weight": Place("module", "norm")}, ("norm.weight",)) == []


def test_it_is_refused_for_servers(pair: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="carry all needs dialect peft"):
        runs.extract(*pair, tmp_path / "out", carry="all")
    assert not (tmp_path / "out").exists()


def total_energy(base: Path, tuned: Path) -> float:
    """‖ΔW‖² over all tensors that both have, in float64."""
    before, after = load_file(base / "model.safetensors"), load_file(tuned / "model.safetensors")
    return sum(float((after[name].double() - before[name].double()).square().sum()) for name in after)


@pytest.mark.slow
class TestModels:
    """Of transformers, loaded by PEFT."""

    pytestmark = OF_PEFT

    @pytest.mark.parametrize(
        "name", ["llama", "llama-tied", "qwen2", "bert", "gpt2", "mixtral", "qwen3-moe", "mpnet", "opt", "deberta-v2"]
    )
    def test_at_full_rank_it_is_the_fine_tune(self, name: str, tmp_path: Path) -> None:
        base = {**models.MODELS, **models.STRANGERS}[name]()
        tuned = models.moved(base, where=models.everything)
        folders = models.save(base, tmp_path / "base"), models.save(tuned, tmp_path / "tuned")
        wanted = models.outputs(tuned)
        found = {}
        for rank in (1, 8, FULL):
            out = tmp_path / f"r{rank}"
            runs.extract(*folders, out, rank=rank, dialect="peft", carry="all")
            model = models.loaded(base, out)
            assert verify(str(folders[0]), str(folders[1]), str(out)).passed
            found[rank] = models.distance(models.outputs(model), wanted)
        assert found[FULL] < 1e-4, found
        assert found[FULL] <= found[8] <= found[1]
        rows = runs.rows(tmp_path / f"r{FULL}")
        assert {row.status for row in rows.values()} <= {"adapted", "carried", "unchanged"}, [
            (row.tensor, row.reason) for row in rows.values() if row.status not in {"adapted", "carried", "unchanged"}
        ]
        energy = sum((row.delta_norm or 0.0) ** 2 for row in rows.values())
        assert energy == pytest.approx(total_energy(*folders), rel=1e-6)


class Net(nn.Module):
    """Convolutions of every kind that PEFT adapts, as UNets and encoders have them."""

    def __init__(self) -> None:
        super().__init__()
        self.line = nn.Conv1d(3, 6, 3, padding=1)
        self.stem = nn.Conv2d(2, 8, 3, padding=1)
        self.down = nn.Conv2d(8, 12, 3, stride=2, padding=1, bias=False)
        self.point = nn.Conv2d(12, 5, 1)
        self.volume = nn.Conv3d(2, 4, (1, 3, 3))
        self.norm = nn.BatchNorm2d(12)
        self.out = nn.Linear(5, 3)

    def forward(self, image: Tensor) -> Tensor:
        found = self.point(self.norm(torch.relu(self.down(torch.relu(self.stem(image))))))
        flat = self.out(found.mean(dim=(2, 3)))
        line = self.line(image.flatten(2)[:, :1].repeat(1, 3, 1)).mean(dim=(1, 2))
        return flat + line[:, None] + self.volume(image[:, :, None]).mean()


def net(seed: int) -> Net:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = Net().eval()
        with torch.no_grad():
            for parameter in made.parameters():
                parameter.add_(0.3 * torch.randn(parameter.shape))
    return made


def saved(model: nn.Module, folder: Path) -> Path:
    folder.mkdir()
    save_file(model.state_dict(), folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps({"model_type": "net"}))
    return folder


@pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed but the targeted layer:peft.utils.warning.PeftWarning")
@pytest.mark.parametrize("carried", ["none", "all"])
def test_convolutions_are_the_fine_tunes(carried: str, tmp_path: Path) -> None:
    """Kernels of one, two and three dimensions; without their biases and norms they come close, with them they are it."""
    base = net(1)
    tuned = copy.deepcopy(base)
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if carried == "all" or parameter.ndim >= 2:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))))
    folders = saved(base, tmp_path / "base"), saved(tuned, tmp_path / "tuned")
    image = torch.randn(2, 2, 8, 8, generator=torch.Generator().manual_seed(3))
    wanted, errors = tuned(image), []
    for rank in (1, 4, 24):
        out = tmp_path / f"r{rank}"
        runs.extract(*folders, out, rank=rank, dialect="peft", carry=carried)
        model = PeftModel.from_pretrained(copy.deepcopy(base), str(out)).eval()
        errors.append(float((model(image) - wanted).detach().norm() / wanted.detach().norm()))
        assert verify(str(folders[0]), str(folders[1]), str(out)).passed
        merged = model.merge_and_unload() if carried == "none" else model
        assert float((merged(image) - wanted).detach().norm() / wanted.detach().norm()) == pytest.approx(
            errors[-1], abs=1e-5
        )
    assert errors[-1] < 1e-4
    rows = runs.rows(tmp_path / "r24")
    assert {name for name, row in rows.items() if row.kind == "conv" and row.status == "adapted"} == {
        f"{name}.weight" for name in ("line", "stem", "down", "point", "volume")
    }
    assert rows["stem.weight"].shape == (8, 2, 3, 3)
    assert sum((row.delta_norm or 0.0) ** 2 for row in rows.values()) == pytest.approx(total_energy(*folders), rel=1e-6)


@pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed but the targeted layer:peft.utils.warning.PeftWarning")
@pytest.mark.parametrize(
    ("key", "told"),
    [
        ("norm.weight", "norm.weight is of a module in modules_to_save, but is not in the file"),
        ("norm.running_mean", "norm.running_mean is of a module in modules_to_save, but is not in the file"),
        ("stem.lora_B.bias", "stem.lora_B has no bias, but lora_bias is set"),
        ("norm.", "modules_to_save names norm, which is not in the file"),
    ],
)
def test_what_is_missing_is_found_without_any_manifest(key: str, told: str, tmp_path: Path) -> None:
    """PEFT loads such a file without an error, and has the base's values there, or zeros."""
    folders = saved(net(1), tmp_path / "base"), saved(net(2), tmp_path / "tuned")
    out = tmp_path / "out"
    runs.extract(*folders, out, dialect="peft", carry="all", force=True)
    for name in ("energy.parquet", "run.json"):
        (out / name).unlink()
    assert verify(*map(str, folders), str(out)).passed
    tensors = load_file(out / "adapter_model.safetensors")
    (out / "adapter_model.safetensors").unlink()
    kept = {name: value for name, value in tensors.items() if not name.startswith(f"base_model.model.{key}")}
    save_file(kept, out / "adapter_model.safetensors")
    assert verify(*map(str, folders), str(out)).problems == (told,)
