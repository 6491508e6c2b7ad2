"""Sums over a manifest, and the texts made of them."""

from __future__ import annotations

from dataclasses import replace

import pytest

from phlora_pipeline.card import model_card
from phlora_pipeline.manifest import EnergyRow, Status
from phlora_pipeline.summary import percent, reasons, size, summarize
from tests.test_plan import llama, planned


def row(name: str, status: Status, delta: float | None, energy: float | None = None, reason: str = "") -> EnergyRow:
    rank = 8 if energy is not None else None
    return EnergyRow(
        "v", name, name, "mlp", (9, 9), "F32", "F32", status, reason, rank=rank, delta_norm=delta,
        preserved_energy=energy, written_energy=energy, energy_at={8: energy} if energy is not None else {},
    )  # fmt: skip


ROWS = [
    row("a", "adapted", 3.0, 1.0),
    row("b", "adapted", 1.0, 0.5),
    row("n", "skipped", 2.0, reason="a norm has no low-rank form"),
    row("m", "skipped", 1.0, reason="a norm has no low-rank form"),
    row("u", "unchanged", 0.0),
    row("x", "skipped", None, reason="not in the base"),
]


def test_energies_are_weighted_by_squared_norms() -> None:
    found = summarize(ROWS)
    assert found.preserved_energy == pytest.approx((9 * 1.0 + 1 * 0.5) / 10)
    assert found.energy_at[8] == found.preserved_energy
    assert found.energy_at[16] is None
    assert found.coverage == pytest.approx(10 / 15)
    assert (found.adapted, found.skipped, found.unchanged) == (2, 3, 1)


def test_left_out_shares_and_coverage_add_up_to_one() -> None:
    found = summarize(ROWS)
    assert sum(share for *_, share, _ in found.left_out) + (found.coverage or 0) == pytest.approx(1)
    assert [name for name, *_ in found.left_out] == ["n", "m"]
    assert reasons(found) == [("a norm has no low-rank form", 2, pytest.approx(5 / 15))]


def test_a_tied_outputs_delta_is_counted_once() -> None:
    tied = row("lm_head", "adapted", 3.0, reason="tied to a, whose delta goes on both")
    assert summarize([*ROWS, tied]).coverage == summarize(ROWS).coverage


def test_nothing_changed() -> None:
    found = summarize([row("u", "unchanged", 0.0)])
    assert found.coverage is None
    assert found.preserved_energy is None


@pytest.mark.parametrize(
    ("share", "text"), [(None, "–"), (0.0, "0.0 %"), (1.0, "100.0 %"), (1e-7, "< 0.1 %"), (-0.02, "-2.0 %")]
)
def test_percent(share: float | None, text: str) -> None:
    assert percent(share) == text


@pytest.mark.parametrize(
    ("nbytes", "text"), [(0, "0 B"), (999, "999 B"), (1500, "1.5 kB"), (2.5e9, "2.5 GB"), (3e15, "3000.0 TB")]
)
def test_size(nbytes: float, text: str) -> None:
    assert size(nbytes) == text


def card(rows: list[EnergyRow], **changes: str) -> str:
    plan = planned(llama())
    return model_card(plan, rows, **{"base_name": "", "dtype": "bfloat16", **changes})


def test_the_card_says_what_is_kept_and_what_is_not() -> None:
    text = card(ROWS)
    assert "| 95.0 % |" in text
    assert "a norm has no low-rank form | 2 | 33.33 % |" in text
    assert "Extracted, not trained" in text
    assert "base_model" not in text.split("---")[1]


def test_the_card_names_a_base_only_by_a_given_name() -> None:
    assert 'base_model: "org/base"' in card(ROWS, base_name="org/base")


def test_the_card_serves_the_base_by_its_name_and_a_strange_one_breaks_no_command() -> None:
    assert "`vllm serve org/base --enable-lora" in card(ROWS, base_name="org/base")
    assert "`vllm serve BASE --enable-lora" in card(ROWS)
    assert "`vllm serve 'a; rm' --enable-lora" in card(ROWS, base_name="a; rm")
    fence = card(ROWS, base_name='x"\n```\nimport os').partition("```python\n")[2].partition("\n```\n")[0]
    assert len(fence.splitlines()) == 3


def test_the_card_tells_what_smaller_ranks_keep() -> None:
    told = {8: 0.5, 16: 0.75, 32: 0.95, 64: None}
    rows = [replace(item, energy_at=told) if item.rank is not None else item for item in ROWS]
    plan = replace(planned(llama()), rank=32)
    text = model_card(plan, rows, base_name="", dtype="bfloat16")
    lines = [line for line in text.splitlines() if "by the first" in line]
    assert lines == ["| … by the first 8 of them | 50.0 % |", "| … by the first 16 of them | 75.0 % |"]


@pytest.mark.parametrize("evil", ["<script>alert(1)</script>", "a | b | c", "line\nbreak\n# title", "`code`"])
def test_hostile_text_stays_inside_its_cell(evil: str) -> None:
    lines = card([*ROWS, row("z", "skipped", 1.0, reason=evil)]).splitlines()
    [line] = [line for line in lines if line.startswith("|") and line.endswith("| 1 | 6.25 % |")]
    assert "<" not in line.replace("&lt;", "")
    assert line.replace("\\|", "").count("|") == 4
    assert "`" not in line
