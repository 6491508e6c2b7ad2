"""What the policies choose, what is published, and what is refused before anything is written."""

from __future__ import annotations

import itertools
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from phlora_pipeline import cli, lora, manifest
from phlora_pipeline.compress import CompressResult, compress
from phlora_pipeline.compress.factors import needed_bytes, require_memory
from phlora_pipeline.errors import ConflictError, PhloraError, RequestError
from tests import runs
from tests.s3_server import S3

MODULES = {f"model.layers.{layer}.{leaf}": shape for layer in (0, 1) for leaf, shape in (("self_attn.q_proj", (32, 24)), ("mlp.up_proj", (48, 24)))}  # fmt: skip
RANK = 12


def key(module: str, side: str) -> str:
    return f"base_model.model.{module}.lora_{side}.weight"


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rank 12, alpha 6, in bf16; each module's energy falls off at its own pace."""
    folder = tmp_path_factory.mktemp("lora")
    generator = torch.Generator().manual_seed(9)
    tensors: dict[str, Tensor] = {}
    for number, (module, (d, k)) in enumerate(MODULES.items()):
        decay = torch.arange(1, RANK + 1).float() ** -(0.3 + 0.6 * number)
        tensors[key(module, "A")] = (torch.randn(RANK, k, generator=generator) * decay[:, None]).bfloat16()
        tensors[key(module, "B")] = torch.randn(d, RANK, generator=generator).bfloat16()
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {
        "peft_type": "LORA", "r": RANK, "lora_alpha": 6, "target_modules": ["q_proj", "up_proj"], "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "org/base", "lora_dropout": 0.1, "init_lora_weights": "orthogonal",
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def original(pristine: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pristine, tmp_path / "original"))


def squeeze(original: Path, out: Path, **asked: Any) -> CompressResult:
    return compress(str(original), str(out), **asked)


def edit(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    change(tensors)
    (folder / "adapter_model.safetensors").unlink()
    save_file(tensors, folder / "adapter_model.safetensors")


class TestRanks:
    def test_no_rank_keeps_less_than_a_smaller_one(self, original: Path, tmp_path: Path) -> None:
        energies = [
            squeeze(original, tmp_path / str(rank), rank=rank, dialect="peft").summary.written_energy
            for rank in (1, 2, 5, 9, RANK)
        ]
        assert all(smaller < larger for smaller, larger in itertools.pairwise(energies))
        assert energies[-1] == pytest.approx(1, abs=1e-4)  # bf16

    @pytest.mark.parametrize("share", [0.5, 0.9, 0.999, 1.0])
    def test_energy_is_the_smallest_rank_that_keeps_the_share(
        self, share: float, original: Path, tmp_path: Path
    ) -> None:
        squeeze(original, tmp_path / "out", energy=share, dialect="peft", dtype="float32")
        for row in runs.rows(tmp_path / "out").values():
            squares = torch.tensor(row.singular_values).double().square()
            assert float(squares[: row.rank].sum() / squares.sum()) >= share - 1e-6
            assert float(squares[: row.rank - 1].sum() / squares.sum()) < share

    @pytest.mark.parametrize("dialect", ["peft", "portable"])
    def test_a_budget_is_kept_to_and_never_worse_than_a_fixed_rank_of_its_size(
        self, dialect: Any, original: Path, tmp_path: Path
    ) -> None:
        for rank in (1, 4, 8):
            fixed = squeeze(original, tmp_path / f"r{rank}", rank=rank, dialect=dialect)
            budget = squeeze(original, tmp_path / f"b{rank}", budget=f"{fixed.adapter_bytes}B", dialect=dialect)
            size = (tmp_path / f"b{rank}" / "adapter_model.safetensors").stat().st_size
            assert size == budget.adapter_bytes <= fixed.adapter_bytes
            assert budget.summary.preserved_energy >= fixed.summary.preserved_energy - 1e-9
            assert (len(set(budget.ranks.values())) > 1) == (dialect == "peft" and rank > 1)

    def test_a_budget_of_parameters(self, original: Path, tmp_path: Path) -> None:
        result = squeeze(original, tmp_path / "out", budget="1K-params", dialect="peft")
        entries = sum(tensor.numel() for tensor in load_file(tmp_path / "out" / "adapter_model.safetensors").values())
        spent = sum(result.ranks[name] * sum(shape) for name, shape in MODULES.items())
        assert entries == spent
        assert 1000 - 72 < entries <= 1000

    def test_portable_is_padded_to_one_rank_and_says_so(self, original: Path, tmp_path: Path) -> None:
        result = squeeze(original, tmp_path / "out", energy=0.8)
        assert len(set(result.ranks.values())) > 1
        assert result.written_rank in {8, 16}
        shapes = {
            tensor.shape[0]
            for name, tensor in load_file(tmp_path / "out" / "adapter_model.safetensors").items()
            if "lora_A" in name
        }
        assert shapes == {result.written_rank}
        config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
        assert (config["r"], config["lora_alpha"], config["rank_pattern"]) == (
            result.written_rank,
            result.written_rank,
            {},
        )
        assert any("pads all to" in warning and "--for peft" in warning for warning in result.warnings)

    def test_a_rank_below_the_grid_says_what_it_costs(self, original: Path, tmp_path: Path) -> None:
        [told] = squeeze(original, tmp_path / "out", rank=2).warnings
        assert told.startswith("the rank is 2, and --for portable pads all to 8: ")
        assert not squeeze(original, tmp_path / "own", rank=2, dialect="peft").warnings
        assert not squeeze(original, tmp_path / "eight", rank=8).warnings


class TestPublication:
    def test_the_config_is_the_originals_with_other_ranks(self, original: Path, tmp_path: Path) -> None:
        squeeze(original, tmp_path / "out", rank=4)
        before, after = (
            json.loads((folder / "adapter_config.json").read_text()) for folder in (original, tmp_path / "out")
        )
        assert {name for name in before if before[name] != after[name]} == {"r", "lora_alpha", "init_lora_weights"}
        assert (after["r"], after["lora_alpha"], after["use_rslora"], after["init_lora_weights"]) == (8, 8, False, True)

    def test_files_are_whole_and_the_second_call_reads_nothing(self, original: Path, tmp_path: Path) -> None:
        out = tmp_path / "out"
        first = squeeze(original, out, rank=4)
        assert set(runs.contents(out)) == {
            "README.md",
            "adapter_config.json",
            "adapter_model.safetensors",
            "energy.parquet",
            "run.json",
        }
        before = runs.contents(out)
        again = squeeze(original, out, rank=4)
        assert (again.outcome, again.ranks, again.adapter_bytes) == ("exists", first.ranks, first.adapter_bytes)
        (out / "adapter_config.json").unlink()  # killed before its commit
        (out / "run.json").unlink()
        assert squeeze(original, out, rank=4).outcome == "committed"
        assert runs.contents(out) == before

    def test_the_same_bytes_wherever_the_original_lies(self, original: Path, tmp_path: Path) -> None:
        squeeze(original, tmp_path / "one", energy=0.9)
        squeeze(original, tmp_path / "two", energy=0.9)
        assert runs.contents(tmp_path / "one") == runs.contents(tmp_path / "two")

    def test_another_adapter_is_replaced_only_when_asked(self, original: Path, tmp_path: Path) -> None:
        squeeze(original, tmp_path / "out", rank=4)
        with pytest.raises(ConflictError, match="already holds another adapter"):
            squeeze(original, tmp_path / "out", rank=5)
        result = squeeze(original, tmp_path / "out", rank=5, overwrite=True)
        assert (result.outcome, result.rank) == ("committed", 5)

    def test_the_card_tells_what_it_was(self, original: Path, tmp_path: Path) -> None:
        squeeze(original, tmp_path / "out", rank=4)
        card = (tmp_path / "out" / "README.md").read_text()
        assert "LoRA of rank 4, compressed from one of rank 12" in card
        assert 'base_model: "org/base"' in card
        assert "PeftModel.from_pretrained" in card

    def test_a_zero_pair_stays_one(self, original: Path, tmp_path: Path) -> None:
        module = next(iter(MODULES))
        edit(original, lambda tensors: tensors[key(module, "B")].zero_())
        result = squeeze(original, tmp_path / "out", energy=0.9, dialect="peft")
        assert result.summary.zero_filled == 1
        assert result.ranks[module] == 1
        tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
        assert not (tensors[key(module, "B")] @ tensors[key(module, "A")]).any()

    def test_manifests_are_read_back(self, original: Path, tmp_path: Path) -> None:
        squeeze(original, tmp_path / "out", rank=4)
        rows = manifest.read(str(tmp_path / "out" / "energy.parquet"))
        assert {row.module for row in rows} == set(MODULES)
        for row in rows:
            assert (row.rank, row.tuned_dtype, row.solver, row.status) == (4, "BF16", "factors", "adapted")
            assert len(row.singular_values) == RANK
            assert row.energy_at[8] > row.preserved_energy
            assert row.energy_at[16] == pytest.approx(1)


class TestRefusals:
    def refused(
        self, original: Path, out: Path, says: str, kind: type[PhloraError] = RequestError, **asked: Any
    ) -> None:
        with pytest.raises(kind, match=says) as caught:
            squeeze(original, out, **asked)
        assert caught.value.exit_code == 2
        assert caught.value.remedy
        assert not out.exists()

    @pytest.mark.parametrize(
        ("asked", "says"),
        [
            ({"rank": 13}, "rank 13 is more than .* stores: its largest is 12"),
            ({"rank": 0}, "0 is no rank"),
            ({}, "no rank is asked for"),
            ({"rank": 4, "energy": 0.9}, "rank and energy are different ways"),
            ({"energy": 1.5}, "a share between 0 and 1"),
            ({"energy": 0.0}, "a share between 0 and 1"),
            ({"budget": "much"}, "a budget is a size"),
            ({"budget": "1kB"}, "does not hold the smallest adapter: rank 1 of 4 modules in bfloat16"),
            ({"rank": 4, "dialect": "kohya"}, "the keys of .* are PEFT's"),
        ],
    )  # fmt: skip
    def test_what_cannot_be_had(self, asked: dict[str, Any], says: str, original: Path, tmp_path: Path) -> None:
        self.refused(original, tmp_path / "out", says, **asked)

    @pytest.mark.parametrize("bad", [float("nan"), float("inf")])
    def test_what_is_not_finite(self, bad: float, original: Path, tmp_path: Path) -> None:
        edit(original, lambda tensors: tensors[key(next(iter(MODULES)), "A")][3].fill_(bad))
        self.refused(
            original, tmp_path / "out", r"q_proj\.lora_A\.weight .* 24 entries .* the first at \[3, 0\]", rank=4
        )

    def test_what_is_kept_whole_and_is_not_finite(self, original: Path, tmp_path: Path) -> None:
        """Also with --overwrite the adapter that stands there stays."""
        squeeze(original, tmp_path / "out", rank=4)
        before = runs.contents(tmp_path / "out")
        config = json.loads((original / "adapter_config.json").read_text())
        (original / "adapter_config.json").write_text(json.dumps({**config, "modules_to_save": ["head"]}))
        edit(original, lambda tensors: tensors.update({"base_model.model.head.weight": torch.full((2, 2), torch.nan)}))
        with pytest.raises(RequestError, match=r"head\.weight"):
            squeeze(original, tmp_path / "out", rank=4, overwrite=True)
        assert runs.contents(tmp_path / "out") == before

    def test_what_overflows(self, original: Path, tmp_path: Path) -> None:
        edit(original, lambda tensors: [tensor.mul_(1e6) for tensor in tensors.values()])
        self.refused(original, tmp_path / "out", "overflow float16", rank=4, dtype="float16")
        assert squeeze(original, tmp_path / "out", rank=4).outcome == "committed"

    def test_what_does_not_fit_in_memory(self, original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        free = 64 << 20
        monkeypatch.setattr("phlora_pipeline.compress.available_memory", lambda: free)
        self.refused(original, tmp_path / "out", r"takes up to 0\.3 GiB of memory, 0\.1 GiB are there", energy=0.9)

    def test_its_own_folder(self, original: Path, tmp_path: Path) -> None:
        before = runs.contents(original)
        (tmp_path / "link").symlink_to(original)
        for out in (original, tmp_path / "link"):
            with pytest.raises(RequestError, match="is where the adapter itself lies"):
                squeeze(original, out, rank=4, overwrite=True)
        assert runs.contents(original) == before


def test_what_is_kept_decides_what_memory_is_needed(original: Path) -> None:
    """Of each pair the share that its rank keeps, in float32; where ranks are not known before, all of it."""
    adapter = lora.open_adapter(str(original))
    entries = 4 * sum(RANK * sum(shape) for shape in MODULES.values())
    needed = [needed_bytes(adapter, rank, 2) for rank in (None, RANK, 3, 99)]
    assert needed[0] == needed[1] == needed[3] == needed[2] + entries * 3 // 4
    require_memory(adapter, 3, 2, needed[2])
    require_memory(adapter, 3, 2, None)
    with pytest.raises(RequestError, match="it cannot fit") as caught:
        require_memory(adapter, None, 2, needed[2])
    assert "a --rank" in (caught.value.remedy or "")


class TestCommand:
    def phlora(self, monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
        monkeypatch.setattr(sys, "argv", ["phlora", "compress", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return int(ended.value.code or 0)

    def test_words(
        self, original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert self.phlora(monkeypatch, "--adapter", original, "--out", tmp_path / "out", "--energy", 0.8) == 0
        said = capsys.readouterr()
        assert "rank 12 → " in said.out
        assert "energy of the original adapter kept: " in said.out
        assert "warning: ranks are" in said.err

    def test_json(
        self, original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert self.phlora(monkeypatch, "--adapter", original, "--out", tmp_path / "out", "--rank", 4, "--json") == 0
        record = json.loads(capsys.readouterr().out)
        assert (record["outcome"], record["original_rank"], record["rank"], record["written_rank"]) == (
            "committed",
            12,
            4,
            8,
        )
        assert record["ranks"] == dict.fromkeys(MODULES, 4)

    def test_a_wrong_request(
        self, original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert self.phlora(monkeypatch, "--adapter", original, "--out", tmp_path / "out", "--rank", 64) == 2
        assert "its largest is 12" in capsys.readouterr().err
        assert not (tmp_path / "out").exists()


@pytest.mark.s3
def test_from_a_bucket_to_a_bucket_the_bytes_are_those_of_a_disk(original: Path, s3: S3, tmp_path: Path) -> None:
    squeeze(original, tmp_path / "out", energy=0.9)
    s3.upload_folder(original, "lora")
    url, out = s3.url("lora"), s3.url("out")
    assert compress(url, out, energy=0.9).outcome == "committed"
    assert compress(url, out, energy=0.9).outcome == "exists"
    assert s3.get("out/adapter_model.safetensors") == (tmp_path / "out" / "adapter_model.safetensors").read_bytes()
    with pytest.raises(RequestError, match="is where the adapter itself lies"):
        compress(url, f"{url}/", energy=0.9, overwrite=True)
