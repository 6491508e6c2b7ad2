"""Policies on real files: a budget counts the bytes that are written, whatever the dialect."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from phlora_pipeline import pipeline
from phlora_pipeline.errors import RequestError
from phlora_pipeline.summary import percent, summarize
from phlora_pipeline.verify import verify
from tests import runs, toys
from tests.test_experts import MIXTRAL, stacked

Pair = tuple[Path, Path]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """Matrices of a Llama, each moved along a spectrum that falls at its own rate; one q and one layer's MLP not at all."""
    folder = tmp_path_factory.mktemp("pair")
    base = toys.llama_tensors(layers=2, hidden=48, inner=64)
    tuned = dict(base)
    still = {"model.layers.1.self_attn.q_proj.weight", "model.layers.1.mlp.gate_proj.weight"}
    for number, name in enumerate(sorted(name for name, value in base.items() if value.ndim == 2)):
        if name not in still:
            d, k = base[name].shape
            sigma = 0.3 * (1 + number % 3) * torch.arange(1, min(d, k) + 1).double() ** -(0.2 + 0.1 * number)
            tuned[name] = base[name] + toys.with_spectrum(d, k, sigma, seed=number).float()
    for name, value in base.items():
        if value.ndim == 1:
            tuned[name] = value + 0.1
    return toys.save(folder / "base", base), toys.save(folder / "tuned", tuned)


def weights(out: Path) -> int:
    return (out / "adapter_model.safetensors").stat().st_size


def kept(out: Path) -> float:
    return sum((row.preserved_energy or 0) * row.delta_norm**2 for row in runs.rows(out).values() if row.rank)


def own_ranks(out: Path) -> dict[str, int]:
    return {row.module: row.rank for row in runs.rows(out).values() if row.rank is not None}


@pytest.mark.parametrize("budget", [24_000, 40_001, 96_000])
@pytest.mark.parametrize(("dialect", "carry"), [("peft", "none"), ("peft", "all"), ("vllm", "none")])
def test_ranks_of_their_own_fill_the_budget_to_the_byte_and_keep_more_than_an_even_rank(
    budget: int, dialect: str, carry: str, pair: Pair, tmp_path: Path
) -> None:
    common = {"dialect": dialect, "carry": carry, "targets": "linear"}
    result = runs.extract(*pair, tmp_path / "out", budget=f"{budget}B", rank=16, **common)
    size = weights(tmp_path / "out")
    assert size <= budget
    ranks = own_ranks(tmp_path / "out")
    assert result.ranks == {f"{module}.weight": rank for module, rank in ranks.items()}
    cheapest = 4 * min(
        sum(value.shape) for value in load_file(pair[0] / "model.safetensors").values() if value.ndim == 2
    )
    assert budget - size < cheapest + 64  # no rank more would fit, the header's digits and padding aside
    shapes = {key: value.shape for key, value in load_file(tmp_path / "out" / "adapter_model.safetensors").items()}
    for key, shape in shapes.items():
        module = re.sub(r"^base_model\.model\.|\.lora_.*$", "", key)
        if module in ranks and "lora_" in key and not key.endswith("bias"):
            assert ranks[module] in shape
    for rank in (1, 2, 4, 8):
        even = tmp_path / f"even{rank}"
        runs.extract(*pair, even, rank=rank, max_rank=48, **common)
        assert weights(even) > size or kept(tmp_path / "out") >= kept(even) * (1 - 1e-9)
    assert verify(str(pair[0]), str(pair[1]), str(tmp_path / "out")).passed


@pytest.mark.parametrize("budget", ["30000B", "60000B", "15k-params"])
@pytest.mark.parametrize("dialect", ["portable", "gguf", "sglang"])
def test_under_one_rank_for_all_it_is_the_largest_that_fits(
    budget: str, dialect: str, pair: Pair, tmp_path: Path
) -> None:
    result = runs.extract(*pair, tmp_path / "out", budget=budget, dialect=dialect, max_rank=32)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    amount, unit = int(re.sub(r"\D", "", budget)), budget.lstrip("0123456789")

    def taken(folder: Path) -> float:
        if unit == "B":
            return weights(folder)
        return sum(value.numel() for value in load_file(folder / "adapter_model.safetensors").values()) / 1000

    assert taken(tmp_path / "out") <= amount
    assert config["rank_pattern"] == {}
    assert set(own_ranks(tmp_path / "out").values()) <= {result.rank, 16}  # 16 is all that some have
    steps = sorted({1, 8, 16, 32} if dialect == "portable" else set(range(1, 33)))
    larger = [step for step in steps if step > result.rank][:1]
    for rank in larger:
        runs.extract(*pair, tmp_path / "larger", rank=rank, dialect=dialect)
        assert taken(tmp_path / "larger") > amount


def test_the_card_says_what_these_ranks_keep_and_not_what_smaller_slices_would(pair: Pair, tmp_path: Path) -> None:
    """Of ranks of their own no slice is that of one rank for all: such a rank may keep more than they do, or less."""
    runs.extract(*pair, tmp_path / "out", budget="24kB", dialect="peft", max_rank=32)
    runs.extract(*pair, tmp_path / "even", rank=16, max_rank=32, dialect="peft")
    card, rows = (tmp_path / "out" / "README.md").read_text(), runs.rows(tmp_path / "out").values()
    own = sorted(row.rank for row in rows if row.rank is not None)
    assert f"# LoRA of ranks {own[0]} to {own[-1]}, median " in card
    assert "by the first" not in card
    even = summarize(list(runs.rows(tmp_path / "even").values())).preserved_energy
    assert f"| rank 16 for each of them would keep | {percent(even)} |" in card


def test_a_budget_that_holds_everything_takes_everything(pair: Pair, tmp_path: Path) -> None:
    runs.extract(*pair, tmp_path / "out", budget="1GB", dialect="peft", max_rank=64)
    for row in runs.rows(tmp_path / "out").values():
        if row.rank is not None:
            assert row.rank == min(row.shape)


@pytest.mark.parametrize("carry", ["none", "all"])
def test_what_cannot_fit_is_refused_before_a_tensor_is_read_and_says_the_least(
    carry: str, pair: Pair, tmp_path: Path
) -> None:
    with pytest.raises(RequestError, match="smallest adapter") as refused:
        runs.extract(*pair, tmp_path / "out", budget="1kB", dialect="peft", carry=carry)
    assert not (tmp_path / "out").exists()
    assert ("kept whole" in refused.value.what) == (carry == "all")
    least = int(re.search(r"takes ([\d,]+) bytes", refused.value.what)[1].replace(",", ""))
    with pytest.raises(RequestError, match="smallest adapter"):
        runs.extract(*pair, tmp_path / "out", budget=f"{least - 1}B", dialect="peft", carry=carry)
    runs.extract(*pair, tmp_path / "out", budget=f"{least}B", dialect="peft", carry=carry)
    assert weights(tmp_path / "out") <= least


def test_policies_share_parts_and_have_versions_of_their_own(pair: Pair, tmp_path: Path) -> None:
    ways = [{"rank": 48}, {"rank": "auto"}, {"budget": "30000B"}, {"budget": "30001B"}, {"budget": "30k-params"}]
    plans = [
        pipeline.plan(runs.settings(*pair, tmp_path, dialect="peft", **{"rank": 8, "max_rank": 48, **way})).plan
        for way in ways
    ]
    assert len({plan.extraction_id for plan in plans}) == 1
    assert len({plan.version for plan in plans}) == len(ways)


def test_another_policy_reuses_parts_that_were_kept(pair: Pair, tmp_path: Path) -> None:
    out, watcher = tmp_path / "out", runs.Watcher()
    runs.extract(*pair, out, rank=48, dialect="peft", keep_parts=True)
    first = runs.extract(
        *pair, out, budget="30000B", max_rank=48, dialect="peft", overwrite=True, observer=watcher, keep_parts=True
    )
    assert all(report.reused for report in watcher.reports)
    again = runs.extract(*pair, out, budget="30000B", max_rank=48, dialect="peft")
    assert (again.outcome, again.ranks, again.natural_bytes) == ("exists", first.ranks, first.natural_bytes)


def test_what_padding_costs_is_told(pair: Pair, tmp_path: Path) -> None:
    padded = runs.extract(*pair, tmp_path / "padded", energy=0.8)
    natural = runs.extract(*pair, tmp_path / "natural", energy=0.8, dialect="vllm")
    assert natural.ranks == padded.ranks
    assert natural.natural_bytes == padded.natural_bytes == weights(tmp_path / "natural") < weights(tmp_path / "padded")


@pytest.mark.parametrize("dialect", ["peft", "portable"])
def test_experts_share_one_rank_and_the_budget_is_kept(dialect: str, tmp_path: Path) -> None:
    base = stacked(layers=1)
    folders = toys.save(tmp_path / "base", base, MIXTRAL), toys.save(tmp_path / "tuned", toys.fine_tuned(base), MIXTRAL)
    out = tmp_path / "out"
    result = runs.extract(*folders, out, budget="9kB", dialect=dialect, max_rank=8)
    assert weights(out) <= 9000
    assert (result.rank > 1) == (dialect == "peft")  # the portable grid goes on at 8
    assert any("one rank" in warning for warning in result.warnings)
    assert verify(str(folders[0]), str(folders[1]), str(out)).passed


def test_what_is_tied_is_paid_twice(tmp_path: Path) -> None:
    base = toys.llama_tensors(layers=1)
    del base["lm_head.weight"]
    config = {**toys.LLAMA, "tie_word_embeddings": True}
    folders = toys.save(tmp_path / "base", base, config), toys.save(tmp_path / "tuned", toys.fine_tuned(base), config)
    result = runs.extract(*folders, tmp_path / "out", budget="20kB", dialect="peft", max_rank=32)
    found = verify(str(folders[0]), str(folders[1]), str(tmp_path / "out"))
    assert found.passed
    assert found.written_energy == pytest.approx(result.summary.written_energy, abs=1e-6)  # what is tied counts once
    assert 19_000 < weights(tmp_path / "out") <= 20_000
    keys = load_file(tmp_path / "out" / "adapter_model.safetensors").keys()
    assert {key for key in keys if "lm_head" in key}
    assert {key for key in keys if "embedding" in key}
