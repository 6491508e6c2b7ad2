"""The pages in a real browser: figures are there and have a size, tables sort, nothing is fetched, nobody complains."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

from phlora_pipeline.report import html, report, sources
from phlora_pipeline.report.entry import entry
from phlora_pipeline.report.facts import model_report
from tests import runs, toys
from tests.report import shelf

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
QUIET = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)

pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed: apt-get install chromium")]  # fmt: skip


@dataclass
class Opened:
    """A page, and what it complained of or asked for."""

    page: Page
    noise: list[str] = field(default_factory=list)

    def column(self, table: str, number: int) -> list[str]:
        rows = f"table#{table} tbody tr:not([hidden])"
        told: list[str] = self.page.eval_on_selector_all(
            rows, "(rows, n) => rows.map(r => r.cells[n].innerText)", number
        )
        return told

    def sort(self, table: str, head: str) -> None:
        self.page.locator(f"table#{table} th button", has_text=head).first.click()


Open = Callable[..., Opened]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=CHROMIUM, args=list(QUIET))
        yield found
        found.close()


@pytest.fixture
def visit(browser: Browser) -> Iterator[Open]:
    """Opens a page, and after the test sees that it was quiet."""
    visits: list[Opened] = []

    def opened(path: Path, scheme: str = "light") -> Opened:
        page = browser.new_page(color_scheme=scheme, viewport={"width": 1100, "height": 800})
        found = Opened(page)
        page.on("console", lambda message: found.noise.append(message.text))
        page.on("pageerror", lambda error: found.noise.append(str(error)))
        page.on(
            "request", lambda request: request.url.startswith(("file:", "data:")) or found.noise.append(request.url)
        )
        page.goto(path.as_uri())
        visits.append(found)
        return found

    yield opened
    for found in visits:
        assert found.noise == []
        found.page.close()


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page of a real extraction."""
    folder = tmp_path_factory.mktemp("adapter")
    base = toys.llama_tensors(layers=8)
    pair = toys.save(folder / "base", base), toys.save(folder / "support-bot", toys.fine_tuned(base))
    runs.extract(*pair, folder / "out", max_rank=16)
    report([str(folder / "out")], str(folder / "page.html"))
    return folder / "page.html"


@pytest.mark.parametrize(("scheme", "ink"), [("light", "rgb(26, 34, 48)"), ("dark", "rgb(231, 236, 244)")])
def test_a_models_page_has_its_figures_in_either_scheme(adapter: Path, visit: Open, scheme: str, ink: str) -> None:
    opened = visit(adapter, scheme)
    plots = opened.page.locator("svg.plot")
    assert plots.count() == 4
    for number in range(4):
        box = plots.nth(number).bounding_box()
        assert box is not None
        assert box["width"] > 200
        assert box["height"] > 100
        assert plots.nth(number).locator("path, use").count() > 5
        assert plots.nth(number).get_attribute("role") == "img"
        assert plots.nth(number).locator("title").first.text_content()
    assert opened.page.eval_on_selector("body", "element => getComputedStyle(element).color") == ink
    legend = opened.page.locator("#energy svg text", has_text="mean over the layers").first
    assert legend.evaluate("element => getComputedStyle(element).fill") == ink
    assert opened.page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_numbers_stand_behind_every_figure_and_all_tensors_sort(adapter: Path, visit: Open) -> None:
    opened = visit(adapter)
    assert opened.page.locator("figure + details summary").count() == 4
    opened.page.locator("summary", has_text="66 tensors").click()
    opened.sort("tensors", "energy")
    energies = [float(text.removesuffix(" %")) for text in opened.column("tensors", 7) if text != "–"]
    assert len(energies) == 58
    assert energies == sorted(energies, reverse=True)
    assert opened.column("tensors", 7)[-1] == "–"  # what has no value comes last
    opened.sort("tensors", "energy")
    assert next(text for text in opened.column("tensors", 7) if text != "–") == f"{min(energies)} %"
    opened.page.locator("input.find").fill("layers.3.mlp")
    assert len(opened.column("tensors", 0)) == 3


def test_the_page_over_500_models_is_light_and_sorts_and_finds(tmp_path: Path, visit: Open) -> None:
    found = sources.find([str(shelf.zoo(tmp_path / "zoo", 500, most=12))])
    reports = [model_report(rows, told) for told, rows in map(sources.read, found)]
    drawn = html.index_page([entry(each, each.model, f"zoo/{each.model}.html") for each in reports], stem="zoo")
    (tmp_path / "zoo.html").write_text(drawn.html, encoding="utf-8")
    assert (tmp_path / "zoo.html").stat().st_size < 600_000
    opened = visit(tmp_path / "zoo.html")
    assert opened.page.locator("svg.plot").count() == 2
    assert len(opened.column("models", 0)) == 500
    opened.sort("models", "energy")
    energies = [float(text.removesuffix(" %")) for text in opened.column("models", 5)]
    assert energies == sorted(energies, reverse=True)
    opened.sort("models", "model")
    assert opened.column("models", 0) == sorted(opened.column("models", 0))
    assert opened.page.locator("#models th").first.get_attribute("aria-sort") == "ascending"
    opened.page.locator("input.find").fill("bot-123")
    assert opened.column("models", 0) == ["team--bot-123"]


def test_a_zoo_leads_to_its_models_and_back(tmp_path: Path, visit: Open) -> None:
    report([str(shelf.zoo(tmp_path / "zoo", 3))], str(tmp_path / "out" / "a zoo.html"))
    opened = visit(tmp_path / "out" / "a zoo.html")
    opened.page.locator("#models a", has_text="team--bot-001").click()
    assert opened.page.locator("h1").inner_text() == "team--bot-001"
    assert opened.page.locator("svg.plot").count() == 4
    opened.page.locator("a", has_text="all of them").click()
    assert opened.page.locator("h1").inner_text() == "3 models"


@pytest.mark.parametrize("layers", [0, 1])
def test_the_smallest_manifests(layers: int, tmp_path: Path, visit: Open) -> None:
    name = "<script>alert(1)</script>"
    report([str(shelf.write(tmp_path / "m.parquet", shelf.rows(layers=layers), name))], str(tmp_path / "p.html"))
    opened = visit(tmp_path / "p.html", "dark")
    assert opened.page.locator("svg.plot").count() == 4 * layers
    assert opened.page.locator("h1").inner_text() == (name if layers else "m")


def test_a_narrow_screen_has_no_sideways_scroll(adapter: Path, visit: Open) -> None:
    opened = visit(adapter)
    opened.page.set_viewport_size({"width": 390, "height": 800})
    assert opened.page.evaluate("document.documentElement.scrollWidth <= innerWidth")
