"""From URLs to what was asked for, where it was asked for: everything is read and judged before anything is written."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal, get_args

from phlora_pipeline import storage
from phlora_pipeline.errors import ConflictError, RequestError
from phlora_pipeline.report import sources, text
from phlora_pipeline.report.entry import Entry, entry
from phlora_pipeline.report.facts import ModelReport, Source, model_report
from phlora_pipeline.report.words import MADE_BY, file_name, noun

Format = Literal["html", "md", "json"]
FORMATS: tuple[Format, ...] = get_args(Format)

_HEAD = 4096
_POOL_FROM = 24
_MOST_WORKERS = 16


@dataclass(frozen=True, slots=True)
class Made:
    """What was made.

    Attributes:
        out: URL of the page or the file; empty where there is only a text.
        models: how many it tells of.
        files: names of the files beside the page, relative to its folder.
        text: what was written, unless it is a page.
    """

    out: str
    models: int
    files: tuple[str, ...] = ()
    text: str = ""


def report(urls: str | Sequence[str], out: str = "", *, form: Format = "html") -> Made:
    """Tell what adapters keep: one model in detail, several side by side with a page each.

    Args:
        urls: one or several: manifests, adapters' folders, outputs of zoos.
        out: the file to write, `….html`; its figures, and the pages of several models, go beside it. Text may go without.
        form: of what is written. Only `html` needs the extra `report`.

    Raises:
        RequestError: a manifest is not there, is none, or is of another schema; or the output cannot be written. Nothing is.
    """
    if form == "html" and not out:
        raise RequestError("a page needs a place", remedy="pass --out page.html, or --format md")
    target = storage.normalize(out) if out else ""
    if target:
        _require_place(target)
    found = sources.find([urls] if isinstance(urls, str) else urls)
    if form == "html":
        return _pages(found, target)
    reports = [_report(source) for source in found]
    names = distinct([told.model for told in reports], [told.url for told in reports])
    named = [replace(each, model=name) for each, name in zip(reports, names, strict=True)]
    told = text.as_json(named) if form == "json" else text.markdown(named, noun([each.model for each in reports]))
    if target:
        _put_all([target], [(target, told.encode())])
    return Made(target, len(reports), text=told)


def distinct(names: Sequence[str], urls: Sequence[str]) -> list[str]:
    """Names of which no two are the same: where models share one, their folders tell them apart, or a number does.

    >>> distinct(["bot", "bot", "x"], ["/a/r16/energy.parquet", "/a/r32/energy.parquet", "/b/energy.parquet"])
    ['bot (r16)', 'bot (r32)', 'x']
    """
    count = Counter(names)
    folders = [storage.basename(url.rpartition("/")[0]) for url in urls]
    told = [f"{name} ({folder})" if count[name] > 1 else name for name, folder in zip(names, folders, strict=True)]
    return _numbered(told, " ")


def _numbered(names: Sequence[str], before: str) -> list[str]:
    """Names as they are, or with a number where an earlier one took it."""
    taken: set[str] = set()
    found = []
    for name in names:
        tries = (name if number == 1 else f"{name}{before}{number}" for number in range(1, len(names) + 1))
        found.append(next(each for each in tries if each.casefold() not in taken))
        taken.add(found[-1].casefold())
    return found


def _report(source: Source) -> ModelReport:
    told, rows = sources.read(sources.with_records(source))
    return model_report(rows, told)


def _pages(found: Sequence[Source], out: str) -> Made:
    _require_extra()
    from phlora_pipeline.report import html

    folder, _, name = out.rpartition("/")
    stem = name.removesuffix(".html")
    if len(found) == 1:
        drawn = html.model_page(_report(found[0]), stem=stem)
        files = {storage.join(folder, each): data for each, data in drawn.files.items()}
        _put_all([*files, out], {**files, out: drawn.html.encode()}.items())
        return Made(out, 1, tuple(drawn.files))
    with tempfile.TemporaryDirectory(prefix="phlora-report-") as aside:
        entries = list(_drawn(found, f"../{name}", aside))
        names = distinct([each.name for each in entries], [source.url for source in found])
        pages = [f"{stem}/{page}.html" for page in _numbered([file_name(each) for each in names], "-")]
        entries = [replace(each, name=own, href=page) for each, own, page in zip(entries, names, pages, strict=True)]
        drawn = html.index_page(entries, stem=stem)

        def files_in_order() -> Iterator[tuple[str, bytes]]:
            """The page over all comes last: what it links to is there by then."""
            for number, page in enumerate(pages):
                with open(_aside(aside, number), "rb") as stored:
                    yield storage.join(folder, page), stored.read()
            for each, data in drawn.files.items():
                yield storage.join(folder, each), data
            yield out, drawn.html.encode()

        _put_all([*(storage.join(folder, each) for each in (*pages, *drawn.files)), out], files_in_order())
    return Made(out, len(entries), (*drawn.files, *pages))


def _drawn(found: Sequence[Source], up: str, aside: str) -> Iterator[Entry]:
    """An entry for each model, whose page is put aside by its number; many are drawn by several processes."""
    work = partial(_draw, up=up, aside=aside)
    workers = min(len(os.sched_getaffinity(0)), _MOST_WORKERS)
    if len(found) < _POOL_FROM or workers == 1:
        yield from map(work, enumerate(found))
        return
    # Spawned, not forked: reading has left threads behind in this process.
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield from pool.map(work, enumerate(found), chunksize=4)


def _draw(numbered: tuple[int, Source], up: str, aside: str) -> Entry:
    from phlora_pipeline.report import html

    number, source = numbered
    told = _report(source)
    with open(_aside(aside, number), "wb") as stored:
        stored.write(html.model_page(told, up=up).html.encode())
    return entry(told, told.model, "")


def _aside(folder: str, number: int) -> str:
    return os.path.join(folder, f"{number}.html")


def _require_extra() -> None:
    try:
        import jinja2
        import matplotlib as mpl
    except ImportError as error:
        raise RequestError(
            f"a page is made with matplotlib and jinja2, and {error.name} is not installed",
            remedy="pip install 'phlora-pipeline[report]', or pass --format md or json, which need neither",
        ) from error
    assert jinja2
    assert mpl


def _require_place(out: str) -> None:
    folder = out.rpartition("/")[0]
    if out in storage.list_folders(folder):
        raise ConflictError(f"{out} is a folder", remedy=f"name a file in it: {storage.join(out, 'page.html')}")
    storage.require_writable(folder)
    _require_ours(out)


def _require_ours(url: str) -> None:
    """A report replaces an earlier one, and nothing else."""
    info = storage.stat(url)
    if info is None:
        return
    head = bytearray(min(info.size, _HEAD))
    if head:
        storage.read_ranges([storage.ByteRange(info.url, info.etag, 0, memoryview(head))])
    if MADE_BY.encode() not in head:
        raise ConflictError(
            f"{url} is there already, and was not written by phlora report", remedy="choose another name for --out"
        )


def _put_all(urls: Iterable[str], files: Iterable[tuple[str, bytes]]) -> None:
    for url in urls:
        _require_ours(url)
    for url, data in files:
        if not storage.swap(url, data, storage.stat(url)):
            raise ConflictError(f"{url} was replaced by somebody else meanwhile", remedy="run again")
