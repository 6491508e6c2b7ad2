"""The command: pages, Markdown and JSON where they were asked for, and nothing where the request is wrong."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from phlora_pipeline import cli, manifest, several, storage
from phlora_pipeline.errors import ConflictError, RequestError
from phlora_pipeline.report import making, report
from phlora_pipeline.report.words import MADE_BY
from phlora_pipeline.zoo import latest
from tests import runs
from tests.report import shelf
from tests.s3_server import S3
from tests.zoo import shelf as adapters

EVIL = '<script>alert("1")</script> & $x$ \x1b[31m 模型'


class Page(HTMLParser):
    """What a browser would make of it, as far as these tests look."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.links: list[str] = []
        self.tags: list[str] = []
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        told = dict(attrs)
        self.ids += [told["id"] or ""] if "id" in told else []
        self.links += [told[name] or "" for name in ("href", "src", "xlink:href") if name in told]

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def page(path: Path) -> Page:
    return Page(path.read_text(encoding="utf-8"))


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_page_has_its_figures_inside_and_beside(tmp_path: Path) -> None:
    source = shelf.write(tmp_path / "energy.parquet", shelf.rows(layers=4), "support-bot")
    made = report([str(source)], str(tmp_path / "out" / "page.html"))
    figures = [f"page-{key}.{kind}" for key in ("energy", "size", "grid", "spectra") for kind in ("svg", "png")]
    assert sorted(made.files) == sorted(figures)
    assert set(files(tmp_path / "out")) == {"page.html", *figures}
    told = page(tmp_path / "out" / "page.html")
    assert told.tags.count("svg") == 4
    assert len(told.ids) == len(set(told.ids))
    assert "support-bot" in told.words
    assert {link for link in told.links if not link.startswith(("#", "data:"))} == set(figures)
    for name in figures:
        data = (tmp_path / "out" / name).read_bytes()
        assert MADE_BY.encode() in data[:4096]
        if name.endswith("svg"):
            assert ET.fromstring(data).tag.endswith("svg")
        else:
            assert data.startswith(b"\x89PNG")


def test_nothing_on_a_page_is_fetched_from_anywhere(tmp_path: Path) -> None:
    report([str(shelf.write(tmp_path / "m.parquet", shelf.rows(), "m"))], str(tmp_path / "p.html"))
    text = (tmp_path / "p.html").read_text()
    assert not re.search(r"https?://(?!www\.w3\.org)", text)
    assert "default-src 'none'" in text
    assert "@import" not in text


def test_the_same_manifest_gives_the_same_bytes_and_replaces_the_earlier_report(tmp_path: Path) -> None:
    source = str(shelf.write(tmp_path / "m.parquet", shelf.rows(), "m"))
    report([source], str(tmp_path / "out" / "p.html"))
    before = files(tmp_path / "out")
    report([source], str(tmp_path / "out" / "p.html"))
    assert files(tmp_path / "out") == before
    shelf.write(tmp_path / "m.parquet", shelf.rows(decay=1.5), "m")
    report([source], str(tmp_path / "out" / "p.html"))
    after = files(tmp_path / "out")
    assert after.keys() == before.keys()
    assert all(after[name] != data for name, data in before.items())


def test_names_are_escaped_wherever_they_stand(tmp_path: Path) -> None:
    rows = shelf.rows()
    rows[0] = shelf.adapted(f"model.layers.0.{EVIL}", "attention", (64, 64), 0.5, solver=EVIL)
    rows[-1] = shelf.EnergyRow("v", EVIL, EVIL, "other", (3,), "F32", "F32", "failed", EVIL)
    for number in range(2):
        shelf.write(tmp_path / f"{number}.parquet", rows, EVIL, base=EVIL)
    report([str(tmp_path / "0.parquet")], str(tmp_path / "one.html"))
    report([str(tmp_path / f"{number}.parquet") for number in range(2)], str(tmp_path / "two.html"))
    pages = [tmp_path / "one.html", tmp_path / "two.html", *(tmp_path / "two").iterdir()]
    assert len(pages) == 4
    for path in pages:
        told = page(path)
        assert told.tags.count("script") == 1  # our own
        assert "alert(" in "".join(told.words)
        assert "\x1b" not in path.read_text()
    for path in tmp_path.glob("*.svg"):
        assert not [item for item in ET.parse(path).iter() if item.tag.endswith("script")]


def test_several_have_a_page_each_and_one_over_all(tmp_path: Path) -> None:
    sources = [str(shelf.write(tmp_path / name / "energy.parquet", shelf.rows(decay=decay), "bot")) for name, decay in (("r8", 0.5), ("r16", 0.9))]  # fmt: skip
    made = report(sources, str(tmp_path / "out" / "all.html"))
    assert made.models == 2
    told = page(tmp_path / "out" / "all.html")
    links = [link for link in told.links if link.startswith("all/")]
    assert links == ["all/bot-r8.html", "all/bot-r16.html"]
    assert {"bot (r8)", "bot (r16)"} <= set(told.words)
    for link in links:
        assert "../all.html" in page(tmp_path / "out" / link).links
    assert set(files(tmp_path / "out")) == {"all.html", *made.files}


def test_a_folder_of_adapters_is_told_side_by_side(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    several.extract(runs.settings(*pair, tmp_path / "out", rank=2), [16, 2, 8], runs.Watcher())
    made = report([str(tmp_path / "out")], str(tmp_path / "all.html"))
    assert [name for name in made.files if name.startswith("all/")] == [
        f"all/tuned-r{rank}.html" for rank in (2, 8, 16)
    ]
    told = page(tmp_path / "all.html")
    assert {f"tuned (r{rank})" for rank in (2, 8, 16)} <= set(told.words)
    assert "tuned (r2), tuned (r8), tuned (r16)" in (tmp_path / "all-energy.svg").read_text()  # one spectrum, one line


def test_a_zoo_is_told_by_the_versions_that_it_serves(tmp_path: Path) -> None:
    out = str(tmp_path / "zoo")
    for number in (1, 2):
        adapters.publish(out, number)
        made = manifest.without_names(f"{out}/{adapters.MODEL}/{adapters.version(number)}/energy.parquet")
        storage.put_new(f"{out}/_manifest/base=b/model={adapters.MODEL}/{adapters.version(number)}.parquet", made)
    shelf.zoo(tmp_path / "zoo", 3)
    for number in (2, 1):  # the first version's run began later
        latest.advance(out, adapters.MODEL, adapters.version(number), f"{number}", adapters.moment(3 - number))
    told = json.loads(report([out], form="json").text)["models"]
    assert [model["model"] for model in told] == [adapters.MODEL, *(f"team--bot-{n:03d}" for n in range(3))]
    assert (told[0]["base"], told[0]["version"]) == ("b", adapters.version(1))
    weights = tmp_path / "zoo" / adapters.MODEL / adapters.version(1) / "adapter_model.safetensors"
    assert (told[0]["adapter_bytes"], told[0]["exact"]) == (weights.stat().st_size, True)
    assert report([f"{out}/_manifest"], form="json").models == 4


@pytest.mark.slow
def test_many_are_drawn_by_several_processes_with_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    zoo = str(shelf.zoo(tmp_path / "zoo", making._POOL_FROM))
    report([zoo], str(tmp_path / "pool" / "zoo.html"))
    monkeypatch.setattr(making, "_POOL_FROM", 1000)
    report([zoo], str(tmp_path / "loop" / "zoo.html"))
    assert files(tmp_path / "pool") == files(tmp_path / "loop")


@pytest.mark.parametrize("layers", [0, 1])
def test_the_smallest_manifests_have_a_page(layers: int, tmp_path: Path) -> None:
    report([str(shelf.write(tmp_path / "m.parquet", shelf.rows(layers=layers), "m"))], str(tmp_path / "p.html"))
    told = page(tmp_path / "p.html")
    assert told.tags.count("svg") == 4 * layers
    assert any("has no rows" in text for text in told.words) == (layers == 0)
    one = shelf.adapted("lm_head", "lm_head", (2, 1), 1.0, most=1, rank=1)
    report([str(shelf.write(tmp_path / "one.parquet", [one], "m"))], str(tmp_path / "p.html"))
    assert page(tmp_path / "p.html").tags.count("svg") == 3  # it is in no layer


class TestText:
    """Markdown and JSON, which need no library."""

    def test_markdown_has_the_numbers(self, tmp_path: Path) -> None:
        rows = shelf.rows(layers=3)
        text = report([str(shelf.write(tmp_path / "m.parquet", rows, "a|b"))], form="md").text
        assert "# a\\|b" in text
        assert re.search(r"\| 8 \| \d+\.\d % \|", text)
        assert "| left out | a norm has no low-rank form | 3 |" in text
        widths = {line.count(" | ") for block in text.split("\n\n") if block.startswith("| rank") for line in block.splitlines() if "---" not in line}  # fmt: skip
        assert len(widths) == 1

    def test_markdown_of_several_is_one_table(self, tmp_path: Path) -> None:
        text = report([str(shelf.zoo(tmp_path, 3))], form="md").text
        assert len(re.findall(r"^\| team--bot-00\d \| llama-\db \| 8 \|", text, re.MULTILINE)) == 3

    def test_without_the_extra_there_is_text_and_a_page_says_what_to_install(self, tmp_path: Path) -> None:
        source = shelf.write(tmp_path / "m.parquet", shelf.rows(), "m")
        script = "import sys; sys.modules['matplotlib'] = None; from phlora_pipeline import cli; cli.main()"
        command = [sys.executable, "-c", script, "report", str(source)]
        assert "# m" in subprocess.run(command, capture_output=True, text=True, check=True).stdout
        done = subprocess.run([*command, "--out", str(tmp_path / "p.html")], capture_output=True, text=True)
        assert done.returncode == 2
        assert "matplotlib is not installed" in done.stderr
        assert "pip install 'phlora-pipeline[report]'" in done.stderr
        assert not (tmp_path / "p.html").exists()


class TestCommand:
    """Flags, and what is printed."""

    def run(self, capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as stop:
            cli.main(["report", *map(str, arguments)])
        told = capsys.readouterr()
        return int(stop.value.code or 0), told.out, told.err

    def test_what_comes_without_a_word_of_the_format(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        source = shelf.write(tmp_path / "m.parquet", shelf.rows(), "m")
        assert self.run(capsys, source)[1].startswith("<!-- made by phlora report")
        assert json.loads(self.run(capsys, source, "--json")[1])["models"][0]["model"] == "m"
        code, out, err = self.run(capsys, source, "--out", tmp_path / "p.html")
        assert (code, err) == (0, "")
        assert out == f"{tmp_path}/p.html: 1 manifest, 8 files beside it\n"
        told = json.loads(self.run(capsys, source, "--out", tmp_path / "p.html", "--json")[1])
        assert (told["models"], told["format"], len(told["files"])) == (1, "html", 8)
        assert self.run(capsys, source, "--out", tmp_path / "p.md", "--format", "md")[0] == 0
        assert (tmp_path / "p.md").read_text() == self.run(capsys, source)[1]

    @pytest.mark.parametrize("flags", [["--format", "html"], ["--format", "md", "--json"], ["--format", "pdf"], []])
    def test_a_wrong_command_line(self, flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        source = [shelf.write(tmp_path / "m.parquet", shelf.rows(), "m")] if flags else []
        code, _, err = self.run(capsys, *source, *flags)
        assert code == 2
        assert err
        assert set(files(tmp_path)) <= {"m.parquet"}


class TestRefused:
    """Exit 2, and nothing is written."""

    @pytest.fixture(autouse=True)
    def _good(self, tmp_path: Path) -> None:
        self.good = str(shelf.write(tmp_path / "good.parquet", shelf.rows(), "good"))

    def refused(self, tmp_path: Path, told: str, *urls: str, out: Path | None = None, form: Any = "html") -> None:
        before = files(tmp_path)
        with pytest.raises(RequestError, match=told) as error:
            report(urls, str(out or tmp_path / "out" / "p.html"), form=form)
        assert error.value.exit_code == 2
        assert error.value.remedy
        assert files(tmp_path) == before

    @pytest.mark.parametrize("rows", [0, 4])
    @pytest.mark.parametrize("form", ["html", "md", "json"])
    def test_a_manifest_of_an_older_schema(self, rows: int, form: str, tmp_path: Path) -> None:
        table = pq.ParquetFile(self.good).read(use_threads=False).slice(0, rows)
        at = table.schema.get_field_index("schema_version")
        old = table.set_column(at, "schema_version", pa.array([0] * rows, pa.int32()))
        pq.write_table(old.replace_schema_metadata({"phlora.schema_version": "0"}), tmp_path / "old.parquet")
        self.refused(tmp_path, r"old\.parquet has schema version 0; this version reads 1", self.good, str(tmp_path / "old.parquet"), form=form)  # fmt: skip

    @pytest.mark.parametrize("rows", [[], [{"a": 1}]])
    def test_a_parquet_file_that_is_no_manifest(self, rows: list[dict[str, int]], tmp_path: Path) -> None:
        pq.write_table(pa.Table.from_pylist(rows, schema=pa.schema([("a", pa.int64())])), tmp_path / "a.parquet")
        self.refused(tmp_path, "is a Parquet file, but not a manifest", str(tmp_path / "a.parquet"))

    def test_no_parquet_at_all(self, tmp_path: Path) -> None:
        (tmp_path / "energy.parquet").write_text("no")
        self.refused(tmp_path, "is not a readable manifest", str(tmp_path))

    def test_nothing_there(self, tmp_path: Path) -> None:
        self.refused(tmp_path, "there is no manifest at", str(tmp_path / "nowhere"))

    def test_somebodys_file_is_kept(self, tmp_path: Path) -> None:
        (tmp_path / "notes.html").write_text("<p>mine")
        (tmp_path / "p-energy.png").write_bytes(b"mine")
        self.refused(tmp_path, "was not written by phlora report", self.good, out=tmp_path / "notes.html")
        self.refused(tmp_path, "was not written by phlora report", self.good, out=tmp_path / "p.html")
        self.refused(tmp_path, "was not written by phlora report", self.good, out=Path(self.good), form="md")

    def test_an_adapters_card_is_no_report_though_it_speaks_of_one(
        self, tmp_path: Path, pair: tuple[Path, Path]
    ) -> None:
        runs.extract(*pair, tmp_path / "out")
        assert "phlora report" in (tmp_path / "out" / "README.md").read_text()
        self.refused(tmp_path, "was not written by", str(tmp_path / "out"), out=tmp_path / "out" / "README.md", form="md")  # fmt: skip

    def test_a_place_that_cannot_be(self, tmp_path: Path) -> None:
        (tmp_path / "folder").mkdir()
        self.refused(tmp_path, "is a folder", self.good, out=tmp_path / "folder")
        self.refused(tmp_path, "is a file, not a folder", self.good, out=tmp_path / "good.parquet" / "p.html")
        with pytest.raises(RequestError, match="a page needs a place"):
            report([self.good])

    def test_a_page_that_somebody_else_replaces_meanwhile(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        # Patched: the moment between looking and putting cannot be hit from outside.
        monkeypatch.setattr(making.storage, "swap", lambda *_: False)
        with pytest.raises(ConflictError, match="replaced by somebody else"):
            report([self.good], str(tmp_path / "p.html"))


@pytest.mark.s3
def test_from_s3_to_s3(s3: S3) -> None:
    rows = manifest.to_parquet(shelf.rows(), model="m", base="b")
    storage.put_new("s3://zoo/report/a/energy.parquet", rows)
    made = report(["s3://zoo/report/a"], "s3://zoo/report/pages/p.html")
    names = {storage.basename(info.url) for info in storage.list_folder("s3://zoo/report/pages")}
    assert names == {"p.html", *made.files}
    assert report(["s3://zoo/report/a"], "s3://zoo/report/pages/p.html") == made
