"""What pages call things: adapters of one model are no models, and what was compressed knows no checkpoint."""

from __future__ import annotations

import html
import json
import re
from pathlib import Path

import pytest

from phlora_pipeline import several
from phlora_pipeline.compress import compress
from phlora_pipeline.report import report
from tests import runs, toys
from tests.report import shelf


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`ranks/`: one fine-tune at three ranks; `c4`, `c90`: the largest of these, compressed."""
    root = tmp_path_factory.mktemp("wording")
    base = toys.llama_tensors(layers=1)
    pair = toys.save(root / "base", base), toys.save(root / "tuned", toys.fine_tuned(base))
    several.extract(runs.settings(*pair, root / "ranks"), [4, 8, 16], runs.Watcher())
    compress(str(root / "ranks" / "r16"), str(root / "c4"), rank=4)
    compress(str(root / "ranks" / "r16"), str(root / "c90"), energy=0.9)
    return root


def text(path: Path) -> str:
    """What a reader reads: no markup, no drawing, no style."""
    page = re.sub(r"<(style|script|svg)\b.*?</\1>", "", path.read_text(), flags=re.DOTALL)
    return " ".join(html.unescape(re.sub(r"<[^>]+>", " ", page)).split())


def told(out: Path, *sources: Path) -> tuple[str, str]:
    """A page over these, and Markdown."""
    urls = [str(source) for source in sources]
    report(urls, str(out / "page.html"))
    return text(out / "page.html"), report(urls, form="md").text


def test_adapters_of_one_model_are_adapters(made: Path, tmp_path: Path) -> None:
    page, lines = told(tmp_path, made / "ranks")
    for each in (page, lines):
        assert "3 adapters" in each
        assert "model" not in each.replace("model.", "").lower()
    assert "median over the adapters" in page


def test_models_are_models(tmp_path: Path) -> None:
    page, lines = told(tmp_path, shelf.zoo(tmp_path / "zoo", 3))
    for each in (page, lines):
        assert "3 models" in each
    assert "median over the models" in page


def test_a_checkpoint_counts_once_however_many_adapters_it_has(made: Path, tmp_path: Path) -> None:
    page, _ = told(tmp_path, made / "ranks")
    [one, *others] = json.loads(report([str(made / "ranks")], form="json").text)["models"]
    assert {(other["checkpoint"], other["checkpoint_bytes"]) for other in others} == {
        (one["checkpoint"], one["checkpoint_bytes"])
    }
    share = sum(each["adapter_bytes"] for each in (one, *others)) / one["checkpoint_bytes"]
    assert f"{100 * share:.1f} % of the checkpoints' {one['checkpoint_bytes'] / 1e3:.1f} kB" in page


OF_CHECKPOINTS = (
    "checkpoint",
    "fine-tun",
    "extracted",
    "W tuned",
    "Coverage",
    "Certificate",
    "noise",
    "‖W‖",
    "coverage",
)


@pytest.mark.parametrize("alone", [False, True])
def test_what_was_compressed_speaks_of_no_checkpoint(made: Path, tmp_path: Path, alone: bool) -> None:
    """Not even where the manifest is all there is."""
    source = made / "c4"
    if alone:
        source = tmp_path / "alone.parquet"
        source.write_bytes((made / "c4" / "energy.parquet").read_bytes())
    page, lines = told(tmp_path, source)
    for each in (page, lines):
        assert not [word for word in OF_CHECKPOINTS if word in each]
        assert " % of the energy of the adapter that was compressed, in 9 weights." in each
    assert "LoRA adapter, compressed from another" in page
    assert "ΔW = s·B·A, what the adapter was before it was compressed" in page
    [model] = json.loads(report([str(source)], form="json").text)["models"]
    assert (model["compressed"], model["checkpoint_bytes"]) == (True, 0)


def test_what_was_extracted_speaks_of_its_checkpoint(made: Path, tmp_path: Path) -> None:
    """The words that the test above looks for are the ones that stand there."""
    page, _ = told(tmp_path, made / "ranks" / "r8")
    assert {word for word in OF_CHECKPOINTS if word in page} >= {*OF_CHECKPOINTS} - {"coverage"}


def test_both_side_by_side_are_told_apart(made: Path, tmp_path: Path) -> None:
    page, lines = told(tmp_path, made / "ranks" / "r16", made / "c4", made / "c90")
    assert "LoRA adapters, extracted or compressed" in page
    assert "the compressed not counted" in page
    assert "; of what was compressed, ΔW is what the adapter was before." in page
    coverages = [row.split("|")[-3].strip() for row in lines.splitlines()[-3:]]
    assert coverages[1:] == ["–", "–"]
    assert coverages[0].endswith(" %")
    page, _ = told(tmp_path, made / "c4", made / "c90")
    assert "LoRA adapters, compressed" in page
    assert "Coverage " not in page.partition("Energy against rank")[0]
