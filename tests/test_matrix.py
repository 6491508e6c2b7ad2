"""The README's table of layer kinds and dialects: it is of today, and each cell tells what an extraction does."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from phlora_pipeline import adapter, convolutions, matrix, targets
from phlora_pipeline.errors import RequestError
from phlora_pipeline.matrix import ROWS, Row
from phlora_pipeline.targets import Dialect
from tests import runs, toys

README = Path(__file__).parent.parent / "README.md"


def test_the_readme_has_the_table_of_today() -> None:
    text = README.read_text("utf-8")
    assert matrix.insert(text) == text, "python -m jobs.matrix"


def test_another_table_would_be_noticed() -> None:
    text = README.read_text("utf-8")
    assert matrix.insert(text.replace("carried", "refused")) != text.replace("carried", "refused")


def test_the_rows_have_names_of_their_own() -> None:
    assert len({row.title for row in ROWS}) == len(ROWS)


def witnesses(number: int, dialect: Dialect) -> list[tuple[str, bool]]:
    """A model type for which the cell says that it is carried, and one for which it says that it is not."""
    cell = matrix.cell(number, dialect)
    return [(types[0], carried) for types, carried in ((cell.carried, True), (tuple(cell.refused), False)) if types]


def save(row: Row, model_type: str, folder: Path) -> tuple[Path, Path]:
    generator = torch.Generator().manual_seed(1)
    config = {**row.config, "model_type": model_type}
    return tuple(  # type: ignore[return-value]
        toys.save(
            folder / side, {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}, config
        )
        for side, shapes in zip(("base", "tuned"), row.shapes(model_type), strict=True)
    )


def _is_of(asked: str, key: str) -> bool:
    """Whether a key of the adapter's file is about a tensor: a factor of it, itself whole, or the bias of its pair."""
    tensor = asked.partition("[")[0]
    module, _, leaf = tensor.rpartition(".")
    if key == f"base_model.model.{tensor}":
        return True
    if leaf == "bias":
        return key.endswith(f".{module}.lora_B.bias")
    if tensor != asked:  # factors are of the rows that both have
        return False
    stack = module.rpartition(".experts.")[0] + ".experts.lora_"
    own = (f".{module}.lora_", *([stack] if "experts" in module else []))
    return any(part in key for part in own) or key.startswith(f"{adapter.kohya_name(module)}.")


def refused(row: Row, pair: tuple[Path, Path], out: Path, dialect: Dialect, carry: str) -> bool:
    groups = tuple(f"{glob}={number}" for glob, number in row.conv_groups)
    try:
        runs.extract(*pair, out, dialect=dialect, carry=carry, force=True, conv_groups=groups)
    except RequestError:
        return True
    return False


@pytest.mark.parametrize("dialect", targets.dialects())
@pytest.mark.parametrize("number", range(len(ROWS)), ids=[row.title for row in ROWS])
def test_a_cell_tells_what_an_extraction_does(number: int, dialect: Dialect, tmp_path: Path) -> None:
    row, cell = ROWS[number], matrix.cell(number, dialect)
    for model_type, carried in witnesses(number, dialect):
        out = tmp_path / model_type / "out"
        pair = save(row, model_type, tmp_path / model_type)
        if refused(row, pair, out, dialect, "all" if cell.whole else "none"):
            assert not carried
            assert not out.exists() or not list(out.iterdir())
            continue
        asked, rows = row.asked(model_type), runs.rows(out)
        told = rows[asked if asked in rows else f"{asked.partition('.experts.')[0]}.experts.down_proj"]
        with safe_open(out / "adapter_model.safetensors", "pt") as file:
            keys = [key for key in file.keys() if _is_of(convolutions.whole_of(asked), key)]  # noqa: SIM118
        there = "carried" if cell.whole else "adapted"
        assert (told.status, bool(keys)) == ((there, True) if carried else ("skipped", False)), told
        assert bool(told.reason) != carried or told.reason.startswith(("rank", "kept whole"))


@pytest.mark.parametrize("title", ["embedding", "lm_head, untied"])
def test_a_limit_of_rows_is_where_the_table_says(title: str) -> None:
    number = next(number for number, row in enumerate(ROWS) if row.title == title)
    limited = {dialect: matrix.cell(number, dialect).max_rows for dialect in targets.dialects()}
    assert limited == {
        "portable": 258048,
        "peft": None,
        "vllm": 258048,
        "sglang": None,
        "nim": 258048,
        "gguf": None,
        "kohya": None,
    }


def test_no_cell_is_without_a_reason() -> None:
    for number in range(len(ROWS)):
        for dialect in targets.dialects():
            cell = matrix.cell(number, dialect)
            assert bool(cell.note) == (cell.state != "carried")
