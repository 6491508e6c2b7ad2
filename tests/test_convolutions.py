"""Grouped, depthwise and transposed convolutions: what PEFT's pair can be is the fine-tune at full rank, the rest is told and kept whole."""

from __future__ import annotations

import copy
import itertools
import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from phlora_pipeline import convolutions, pipeline, several, targets
from phlora_pipeline.compress import compress
from phlora_pipeline.errors import RequestError
from phlora_pipeline.merge import merge
from phlora_pipeline.verify import verify
from tests import loras, models, runs

pytestmark = [
    pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer with groups > 1:UserWarning"),
    pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed but:peft.utils.warning.PeftWarning"),
]

GROUPED = {"line": 4, "image": 2, "many": 4, "volume": 2}
SAID = tuple(f"{name}={groups}" for name, groups in GROUPED.items())
FULL = 512
"""No smaller than the groups times the rank of one of them."""


class Net(nn.Module):
    """Groups in one, two and three dimensions, one of a single channel each; and what LoRA has no use or no form for."""

    def __init__(self) -> None:
        super().__init__()
        self.line = nn.Conv1d(8, 24, 3, padding=1, groups=4)
        self.image = nn.Conv2d(6, 10, (3, 2), stride=2, groups=2, bias=False)
        self.many = nn.Conv1d(4, 20, 5, groups=4)
        self.volume = nn.Conv3d(4, 6, (1, 2, 2), groups=2)
        self.depthwise = nn.Conv2d(10, 10, 3, padding=1, groups=10)
        self.up = nn.ConvTranspose2d(10, 12, 2)
        self.plain = nn.Conv2d(12, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(n, 288) → (n, 3, …) of every layer."""
        image = self.plain(torch.tanh(self.up(torch.tanh(self.depthwise(self.image(x.view(-1, 6, 6, 8)))))))
        others = self.line(x.view(-1, 8, 36)), self.many(x.view(-1, 4, 72)), self.volume(x.view(-1, 4, 2, 6, 6))
        return torch.cat([part.flatten(1) for part in (image, *others)], dim=1)


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Net, Net, Path, Path]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        base = Net().eval()
    return (base, *moved(base, tmp_path, *(name for name, _ in base.named_parameters())))


def moved(base: Net, folder: Path, *names: str) -> tuple[Net, Path, Path]:
    tuned, generator = copy.deepcopy(base), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if name in names:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    for model, side in ((base, "base"), (tuned, "tuned")):
        (folder / side).mkdir(exist_ok=True)
        (folder / side / "config.json").write_text('{"model_type": "net"}')
        save_file(model.state_dict(), folder / side / "model.safetensors", metadata={"format": "pt"})
    return tuned, folder / "base", folder / "tuned"


@torch.no_grad()
def distance(found: nn.Module, wanted: nn.Module) -> float:
    x = torch.randn(2, 288, generator=torch.Generator().manual_seed(3))
    return models.distance(found(x), wanted(x))


@torch.no_grad()
def by_hand(base: Net, tuned: Net, names: list[str]) -> Net:
    """The base with some of the fine-tune's tensors."""
    made = copy.deepcopy(base)
    for name in names:
        made.get_parameter(name).copy_(tuned.get_parameter(name))
    return made


@pytest.mark.parametrize("carry", ["none", "all"])
def test_full_rank_is_the_fine_tune_and_no_rank_is_worse(
    carry: str, pair: tuple[Net, Net, Path, Path], tmp_path: Path
) -> None:
    base, tuned, *folders = pair
    errors, missing = [], []
    for rank in (1, 3, 5, 8, FULL):
        out = tmp_path / f"r{rank}"
        runs.extract(*folders, out, rank=rank, dialect="peft", carry=carry, conv_groups=SAID)
        rows = runs.rows(out)
        assert verify(*map(str, folders), str(out)).passed
        left_out = [name for name, row in rows.items() if row.status == "skipped"]
        errors.append(distance(models.loaded(by_hand(base, tuned, left_out), out), tuned))
        missing.append({name: 1 - (row.preserved_energy or 0) for name, row in rows.items() if row.status == "adapted"})
    assert errors[-1] < 1e-4 < errors[0]
    assert errors == sorted(errors, reverse=True)
    for smaller, larger in itertools.pairwise(missing):
        assert all(larger[name] <= smaller[name] + 1e-9 for name in larger)
    told = {
        name: row.reason
        for name, row in rows.items()
        if row.status in {"skipped", "carried"} and name.endswith("weight")
    }
    assert set(told) == {"depthwise.weight", "up.weight"}
    if carry == "none":
        assert "one input channel" in told["depthwise.weight"]
        assert told["up.weight"].startswith("a transposed convolution, which PEFT does not adapt")
    else:
        assert not left_out
    before, after = (load_file(folder / "model.safetensors") for folder in folders)
    energy = sum(float((after[name].double() - before[name].double()).square().sum()) for name in before)
    assert sum((row.delta_norm or 0.0) ** 2 for row in rows.values()) == pytest.approx(energy, rel=1e-6)


def test_ranks_are_pefts_multiples_of_the_groups(pair: tuple[Net, Net, Path, Path], tmp_path: Path) -> None:
    """Asked for 7, four groups have 1 each, two have 3 each; PEFT would refuse 7 itself."""
    _, _, *folders = pair
    runs.extract(*folders, tmp_path / "out", rank=7, dialect="peft", conv_groups=SAID)
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    shapes = {key.removeprefix("base_model.model."): tuple(value.shape) for key, value in tensors.items()}
    assert (shapes["line.lora_A.weight"], shapes["line.lora_B.weight"]) == ((4, 8, 3), (24, 1, 1))
    assert (shapes["image.lora_A.weight"], shapes["image.lora_B.weight"]) == ((6, 6, 3, 2), (10, 3, 1, 1))
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["rank_pattern"] == config["alpha_pattern"] == {"^line": 4, "^many": 4, "^image": 6, "^volume": 6}
    assert runs.rows(tmp_path / "out")["image.group_1_of_2.weight"].rank == 3
    said = pipeline.plan(runs.settings(*folders, tmp_path / "out", rank=5, dialect="peft", conv_groups=SAID)).outlook()
    written = runs.extract(*folders, tmp_path / "r5", rank=5, dialect="peft", conv_groups=SAID)
    assert (said.file_bytes, said.natural_bytes) == (written.adapter_bytes, written.natural_bytes)


def test_a_share_of_the_energy_is_kept_in_every_group(pair: tuple[Net, Net, Path, Path], tmp_path: Path) -> None:
    base, _, *folders = pair
    runs.extract(*folders, tmp_path / "out", energy=0.7, dialect="peft", conv_groups=SAID)
    rows = [row for row in runs.rows(tmp_path / "out").values() if row.status == "adapted"]
    assert all((row.preserved_energy or 0) >= 0.7 for row in rows)
    assert verify(*map(str, folders), str(tmp_path / "out")).passed
    models.loaded(base, tmp_path / "out")


@pytest.mark.parametrize("carry", ["none", "all"])
@pytest.mark.parametrize("ranks", [{"rank": "auto"}, {"energy": 0.5}, {"energy": 0.9, "max_rank": 2}, {"budget": "8KB"}, {"budget": "6100B"}])  # fmt: skip
def test_however_ranks_are_chosen_peft_loads_them_and_the_file_weighs_what_was_said(
    ranks: dict[str, object], carry: str, pair: tuple[Net, Net, Path, Path], tmp_path: Path
) -> None:
    base, _, *folders = pair
    out = tmp_path / "out"
    result = runs.extract(*folders, out, dialect="peft", carry=carry, conv_groups=SAID, **ranks)
    tensors = load_file(out / "adapter_model.safetensors")
    for name, groups in GROUPED.items():
        rank = tensors[f"base_model.model.{name}.lora_A.weight"].shape[0]
        own = [row.rank for key, row in runs.rows(out).items() if key.startswith(f"{name}.group")]
        assert rank == groups * max(own)
    models.loaded(base, out)
    assert verify(*map(str, folders), str(out)).passed
    assert (out / "adapter_model.safetensors").stat().st_size == result.adapter_bytes
    if "budget" in ranks:
        assert result.adapter_bytes <= {"8KB": 8000, "6100B": 6100}[str(ranks["budget"])]


def test_several_ranks_at_once_are_each_a_multiple_of_the_groups(
    pair: tuple[Net, Net, Path, Path], tmp_path: Path
) -> None:
    base, _, *folders = pair
    config = runs.settings(*folders, tmp_path / "out", rank=9, dialect="peft", conv_groups=SAID)
    for one in several.extract(config, (2, 9), runs.Watcher()):
        models.loaded(base, Path(one.out))
        runs.extract(
            *folders, tmp_path / "alone", rank=one.rank, max_rank=9, dialect="peft", conv_groups=SAID, overwrite=True
        )
        assert runs.contents(Path(one.out)) == runs.contents(tmp_path / "alone")


def test_what_peft_has_no_pair_for_is_told_with_the_remedy_that_helps(
    pair: tuple[Net, Net, Path, Path], tmp_path: Path
) -> None:
    _, _, *folders = pair
    watcher = runs.Watcher()
    runs.extract(*folders, tmp_path / "out", dialect="peft", conv_groups=SAID, observer=watcher)
    (told,) = (text for text in watcher.warnings if "left out" in text)
    assert told.startswith("PEFT has no pair for up.weight, depthwise.weight: ")
    assert told.endswith("; --for peft --carry all keeps them whole")


def test_it_is_merged_group_by_group_and_compressed_by_nobody(
    pair: tuple[Net, Net, Path, Path], tmp_path: Path
) -> None:
    """At full rank the fine-tune, to float32; PEFT itself merges no grouped convolution."""
    _, _, *folders = pair
    runs.extract(*folders, tmp_path / "out", dialect="peft", carry="all", rank=FULL, conv_groups=SAID)
    assert merge(str(folders[0]), [str(tmp_path / "out")], str(tmp_path / "merged")).changed >= len(GROUPED)
    found, wanted = (load_file(folder / "model.safetensors") for folder in (tmp_path / "merged", folders[1]))
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert torch.allclose(found[name], value, rtol=1e-5, atol=1e-6), name
    with pytest.raises(RequestError, match="grouped convolutions, which are not compressed: image, 4 of"):
        compress(str(tmp_path / "out"), str(tmp_path / "smaller"), rank=4)
    assert not (tmp_path / "smaller").exists()


def test_a_trained_pair_that_no_grouped_kernel_can_hold_is_not_merged(
    pair: tuple[Net, Net, Path, Path], tmp_path: Path
) -> None:
    base, _, *folders = pair
    loras.trained(base, tmp_path / "lora", r=8, target_modules=["line"])
    with pytest.raises(RequestError, match="into the channels of others"):
        merge(str(folders[0]), [str(tmp_path / "lora")], str(tmp_path / "merged"))
    assert not (tmp_path / "merged").exists()


def test_a_group_that_did_not_change_has_zeros(tmp_path: Path) -> None:
    base = Net().eval()
    tuned, *folders = moved(base, tmp_path)
    with torch.no_grad():
        tuned.line.weight[6:12] += 0.1 * torch.randn(6, 2, 3)
    save_file(tuned.state_dict(), folders[1] / "model.safetensors", metadata={"format": "pt"})
    runs.extract(*folders, tmp_path / "out", dialect="peft", rank=FULL, conv_groups=SAID)
    status = {row.tensor: row.status for row in runs.rows(tmp_path / "out").values() if "line.group" in row.tensor}
    assert status == {f"line.group_{n}_of_4.weight": "adapted" if n == 1 else "zero_filled" for n in range(4)}
    assert set(load_file(tmp_path / "out" / "adapter_model.safetensors")) == {
        f"base_model.model.line.lora_{side}.weight" for side in "AB"
    }
    assert distance(models.loaded(base, tmp_path / "out"), tuned) < 1e-4
    assert verify(*map(str, folders), str(tmp_path / "out")).passed


def test_a_bias_alone_is_carried_by_a_pair_of_zeros(tmp_path: Path) -> None:
    base = Net().eval()
    tuned, *folders = moved(base, tmp_path, "line.bias")
    runs.extract(*folders, tmp_path / "out", dialect="peft", carry="all", conv_groups=SAID)
    assert distance(models.loaded(base, tmp_path / "out"), tuned) < 1e-4


def test_a_kernel_that_nobody_knows_is_kept_whole(pair: tuple[Net, Net, Path, Path], tmp_path: Path) -> None:
    """Whatever its groups are: `--carry all` needs no knowledge of them."""
    base, tuned, *folders = pair
    grouped = tuple(said for said in SAID if "many" not in said)
    runs.extract(*folders, tmp_path / "out", dialect="peft", carry="all", rank=FULL, conv_groups=grouped)
    row = runs.rows(tmp_path / "out")["many.weight"]
    assert (row.status, row.reason) == ("carried", "kept whole: in modules_to_save")
    assert distance(models.loaded(base, tmp_path / "out"), tuned) < 1e-4


def test_where_groups_save_nothing_they_are_not_adapted(pair: tuple[Net, Net, Path, Path], tmp_path: Path) -> None:
    """PEFT's A spans the channels of all groups: of ten rows and ten groups it has more entries than the kernel."""
    _, _, *folders = pair
    runs.extract(*folders, tmp_path / "out", dialect="peft", conv_groups=(*SAID, "depthwise=10"))
    row = runs.rows(tmp_path / "out")["depthwise.weight"]
    assert row.status == "skipped"
    assert (
        row.reason
        == "PEFT's pair for a convolution of so many groups is no smaller than its kernel; --for peft --carry all keeps it whole"
    )


def test_a_kernel_of_one_channel_that_is_not_grouped_is_adapted_once_that_is_said(tmp_path: Path) -> None:
    base, tuned = nn.Sequential(nn.Conv1d(1, 6, 5, bias=False)), nn.Sequential(nn.Conv1d(1, 6, 5, bias=False))
    folders = tmp_path / "base", tmp_path / "tuned"
    for model, folder in zip((base, tuned), folders, strict=True):
        folder.mkdir()
        save_file(model.state_dict(), folder / "model.safetensors")
    with pytest.raises(RequestError, match="one input channel"):
        runs.extract(*folders, tmp_path / "none", dialect="peft", force=True)
    runs.extract(*folders, tmp_path / "out", dialect="peft", force=True, conv_groups=("*=1",))
    x = torch.randn(2, 1, 9)
    with torch.no_grad():
        assert models.distance(models.loaded(base, tmp_path / "out")(x), tuned(x)) < 1e-4


@pytest.mark.parametrize(
    ("said", "match"),
    [
        ("nowhere*=4", "names no convolution"),
        ("line=5", "cannot have 5 groups: they do not divide its 24 outputs"),
        ("line", "conv_groups"),
        ("line=0", "conv_groups"),
    ],
)
def test_what_cannot_be_is_refused(said: str, match: str, pair: tuple[Net, Net, Path, Path], tmp_path: Path) -> None:
    _, _, *folders = pair
    with pytest.raises(RequestError, match=match):
        runs.extract(*folders, tmp_path / "out", dialect="peft", conv_groups=(said,))
    assert not (tmp_path / "out").exists()


def test_no_other_dialect_has_groups(pair: tuple[Net, Net, Path, Path], tmp_path: Path) -> None:
    _, _, *folders = pair
    for folder in folders:
        (folder / "config.json").write_text('{"_class_name": "UNet2DConditionModel"}')
    runs.extract(*folders, tmp_path / "out", dialect="kohya", conv_groups=SAID)
    rows = runs.rows(tmp_path / "out")
    assert rows["plain.weight"].status == "adapted"
    assert "any but PEFT" in rows["line.group_0_of_4.weight"].reason


def test_verify_sees_what_a_grouped_kernel_cannot_be(pair: tuple[Net, Net, Path, Path], tmp_path: Path) -> None:
    _, _, *folders = pair
    runs.extract(*folders, tmp_path / "out", dialect="peft", conv_groups=SAID)
    path = tmp_path / "out" / "adapter_model.safetensors"
    tensors = load_file(path)
    tensors["base_model.model.line.lora_A.weight"][0, 7] = 1e-3
    path.unlink()
    save_file(tensors, path)
    found = verify(*map(str, folders), str(tmp_path / "out"))
    assert [check.module for check in found.modules if "beside its groups" in check.problem] == ["line.group_0_of_4"]


def test_exclude_names_the_convolution_and_not_its_groups(pair: tuple[Net, Net, Path, Path], tmp_path: Path) -> None:
    _, _, *folders = pair
    runs.extract(*folders, tmp_path / "out", dialect="peft", conv_groups=SAID, exclude=("line",))
    rows = runs.rows(tmp_path / "out")
    assert {row.reason for row in rows.values() if "line.group" in row.tensor} == {"excluded by --exclude"}
    assert rows["image.group_0_of_2.weight"].status == "adapted"


def test_the_plan_says_what_the_config_lets_one_think_of_convolutions(
    pair: tuple[Net, Net, Path, Path], tmp_path: Path
) -> None:
    _, _, *folders = pair
    told = {"num_conv_pos_embedding_groups": 16, "norm_num_groups": 32, "dilations": [[1, 3], [1]], "q_groups": 1}
    for folder in folders:
        (folder / "config.json").write_text(json.dumps(told))
    plan = pipeline.plan(runs.settings(*folders, tmp_path / "out", dialect="peft", conv_groups=SAID)).plan
    assert plan.warnings == (
        "config.json says num_conv_pos_embedding_groups 16; if one of the convolutions that are adapted is grouped, PEFT will not load its pair: say it by --conv-groups 'GLOB=N' (plain.weight)",
        "config.json says dilations [[1, 3], [1]]; PEFT forgets a convolution's dilation until the adapter is merged: merge it, or leave dilated ones out by --exclude 'GLOB' (plain.weight)",
    )


@pytest.mark.parametrize("name", ["up.0.deconv.weight", "conv_transpose.weight", "dec.ConvTranspose_0.weight"])
def test_a_transposed_convolution_is_known_by_its_name_or_its_bias(name: str) -> None:
    assert "transposed" in targets.kernel_refusal(name, (8, 8, 3), None, ())
    assert "transposed" in targets.kernel_refusal("up.weight", (8, 6, 3), None, (6,))
    assert targets.kernel_refusal("down.conv.weight", (8, 6, 3), None, (8,)) == ""


def test_peft_still_forgets_dilation_and_has_no_transposed_convolution() -> None:
    """The reasons above, of the installed PEFT: where this fails, they are out of date."""
    dilated = get_peft_model(nn.Sequential(nn.Conv1d(4, 4, 3, dilation=2)), LoraConfig(target_modules=["0"]))
    assert dilated.base_model.model[0].lora_A["default"].dilation == (1,)
    with pytest.raises(ValueError, match="not supported"):
        get_peft_model(nn.Sequential(nn.ConvTranspose1d(4, 4, 3)), LoraConfig(target_modules=["0"]))
    with pytest.raises(ValueError, match="divisible by groups"):
        get_peft_model(nn.Sequential(nn.Conv1d(4, 4, 3, groups=4)), LoraConfig(r=6, target_modules=["0"]))


def test_a_factor_of_one_group_is_a_view() -> None:
    A, B = torch.zeros(6, 4, 3), torch.zeros(8, 3, 1)
    convolutions.of_one(A, 1, 2, down=True).fill_(1)
    convolutions.of_one(B, 1, 2, down=False).fill_(1)
    assert torch.equal(A.nonzero()[:, :2].unique(dim=0), torch.cartesian_prod(torch.arange(3, 6), torch.arange(2, 4)))
    assert B.squeeze(2).sum(1).tolist() == [0] * 4 + [3] * 4
    assert not convolutions.reaches_across(A, 2)
    A[0, 3] = 1
    assert convolutions.reaches_across(A, 2)
