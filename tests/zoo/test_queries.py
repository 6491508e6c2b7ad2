"""The README's queries of the dataset, as they are printed there, on what a night has left."""

from __future__ import annotations

import re
from pathlib import Path

import duckdb
import polars as pl
import pytest

from phlora_pipeline import manifest
from phlora_pipeline.zoo import latest
from tests import toys
from tests.zoo import nights
from tests.zoo.nights import Zoo

README = (Path(__file__).parents[2] / "README.md").read_text()
PLACE = "adapters/_manifest"


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A night of two models, one of which is called by a number."""
    root = tmp_path_factory.mktemp("zoo")
    made = Zoo(root / "zoo", str(root / "out"))
    made.add_base()
    for seed, name in ((1, "0042"), (2, "plain")):
        made.add(name, toys.fine_tuned(nights.tensors(), seed=seed))
    assert made.night().exit_code == 0
    return made.out


def kept(out: str, model: str) -> float:
    """Σ E_r·‖ΔW‖² / Σ ‖ΔW‖², from the version's own manifest."""
    pointer = latest.read(out, model)
    assert pointer is not None
    rows = [row for row in manifest.read(f"{out}/{model}/{pointer.version}/energy.parquet") if row.delta_norm]
    total = sum(row.delta_norm**2 for row in rows if row.delta_norm)
    return sum(row.delta_norm**2 * (row.preserved_energy or 0) for row in rows if row.delta_norm) / total


def test_duckdb(out: str) -> None:
    [query] = re.findall(rf'duckdb -c "(.*{PLACE}.*)"', README)
    found = dict(duckdb.sql(query.replace(PLACE, f"{out}/_manifest")).fetchall())
    assert found == {model: pytest.approx(kept(out, model)) for model in ("0042", "plain")}


def test_polars(out: str) -> None:
    [text] = [block for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if PLACE in block]
    scope: dict[str, object] = {}
    exec(text.replace(PLACE, f"{out}/_manifest").replace("print(", "found = ("), scope)
    found = scope["found"]
    assert isinstance(found, pl.DataFrame)
    assert set(found["base"]) == {"b"}
    assert sorted(map(str, found["model"])) == ["0042", "plain"]
    assert all(0 < value <= 1 for value in found["preserved_energy"])
