"""Layer × projection: every matrix of a layer has one place, in models of any family."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from phlora_pipeline.report.grid import GOAL, grid, labels, place_of
from tests import models, runs
from tests.report import shelf

WANTED = {
    "llama": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    "bert": ("query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense"),
    "mixtral": ("q_proj", "k_proj", "v_proj", "o_proj", "w1", "w3", "w2", "gate"),
}


@pytest.mark.slow
@pytest.mark.parametrize("family", WANTED)
def test_every_matrix_of_a_layer_is_in_one_cell(family: str, tmp_path: Path) -> None:
    base = models.MODELS[family]()
    tuned = models.moved(base, where=models.matrices)
    runs.extract(
        models.save(base, tmp_path / "base"), models.save(tuned, tmp_path / "tuned"), tmp_path / "out", dialect="peft"
    )
    rows = runs.rows(tmp_path / "out")
    found = grid(list(rows.values()))
    assert set(WANTED[family]) == set(found.projections)
    assert found.projections[:3] == WANTED[family][:3]
    assert found.layers == ("0", "1")
    placed = Counter(place_of(row.module) is not None for row in rows.values() if len(row.shape) == 2)
    assert sum(cell.tensors for line in found.cells for cell in line if cell) == placed[True]


def test_a_cell_tells_what_its_rows_do() -> None:
    rows = shelf.rows(layers=3, decay=0.9)
    found = grid(rows)
    assert found.projections == ("q_proj", "k_proj", "up_proj")
    row, cell = rows[4], found.cells[0][1]
    assert row.module == "model.layers.1.self_attn.q_proj"
    assert cell is not None
    assert (cell.tensors, cell.status, cell.ranks) == (1, "adapted", (8, 8))
    assert cell.energy == pytest.approx(row.preserved_energy)
    needed = cell.needed or 0
    kept = [sum(v * v for v in row.singular_values[:rank]) / row.delta_norm**2 for rank in (needed - 1, needed)]
    assert kept[0] < GOAL <= kept[1]


def test_experts_are_taken_together_by_energy() -> None:
    heavy = shelf.adapted("m.layers.0.mlp.experts.0.w1", "expert", (8, 8), 0.0, rank=2, most=8, rest=0.0)
    light = shelf.adapted("m.layers.0.mlp.experts.1.w1", "expert", (8, 8), 3.0, rank=4, most=8, rest=0.0)
    ((cell,),) = grid([heavy, light]).cells
    assert cell is not None
    assert (cell.tensors, cell.ranks) == (2, (2, 4))
    energies = [(row.delta_norm**2, row.preserved_energy) for row in (heavy, light)]
    assert cell.energy == pytest.approx(sum(w * e for w, e in energies) / sum(w for w, _ in energies))


def test_stacks_of_layers_are_told_apart_and_what_has_no_layer_is_left_out() -> None:
    names = ["model.encoder.layers.0.fc1", "model.encoder.layers.1.fc1", "model.decoder.layers.0.fc1", "lm_head"]
    found = grid([shelf.adapted(name, "mlp", (8, 8), 1.0) for name in names])
    assert found.layers == ("decoder 0", "encoder 0", "encoder 1")
    assert found.projections == ("fc1",)


def test_what_is_left_out_of_a_layer_is_a_cell_without_energy() -> None:
    rows = shelf.rows(layers=2)
    rows[0] = shelf.EnergyRow("v", rows[0].tensor, rows[0].module, "attention", (64, 64), "BF16", "BF16", "unchanged")
    cell = grid(rows).cells[0][0]
    assert cell is not None
    assert (cell.status, cell.energy, cell.ranks) == ("unchanged", None, None)


def test_labels_are_as_short_as_they_can_be_and_all_different() -> None:
    names = ["attn1.to_q", "attn2.to_q", "ff.net.*.proj", "proj_in"]
    assert labels(names) == {"attn1.to_q": "attn1.to_q", "attn2.to_q": "attn2.to_q", "ff.net.*.proj": "proj", "proj_in": "proj_in"}  # fmt: skip
