"""Results → Markdown, and into a page between two markers. Pure; what is not there is left out, nothing is judged."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from . import zoo_table
from .figures import factor, lines, of_optimal, seconds, share, tiny
from .measure import Machine

START, END = "<!-- benchmarks -->", "<!-- /benchmarks -->"

Row = dict[str, Any]


def inserted(page: str, table: str) -> str:
    """The page with this table between its markers, whatever stood there.

    >>> print(inserted("a <!-- benchmarks --> old <!-- /benchmarks --> b", "new"))
    a <!-- benchmarks -->
    new
    <!-- /benchmarks --> b

    Raises:
        ValueError: it has no such place.
    """
    before, start, rest = page.partition(START)
    _, end, after = rest.partition(END)
    if not start or not end:
        raise ValueError(f"no place for the table: there is no {START} with an {END} after it")
    return f"{before}{START}\n{table.strip()}\n{END}{after}"


def rendered(results: dict[str, Any]) -> str:
    """All tables that there are results for."""
    return _joined(
        results,
        (
            ("end-to-end", _end_to_end),
            ("limit", _limit),
            ("scaling", _scaling),
            ("kernels", lambda rows: [*_kernels(rows), *_kernels_further(rows)]),
            ("kernels-cuda", _kernels_on_a_gpu),
            ("compress", _compress),
            ("ranges", zoo_table.ranges),
            ("planning", zoo_table.planning),
            ("dispatch", zoo_table.dispatch),
            ("night", zoo_table.night),
        ),
    )


def headline(results: dict[str, Any]) -> str:
    """What somebody wants to know first: whole processes beside mergekit, the distance to the limit, kernels."""
    return _joined(results, (("end-to-end", _end_to_end), ("limit", _limit), ("kernels", _kernels)))


def _joined(results: dict[str, Any], shown: Sequence[tuple[str, Callable[[dict[str, Row]], list[str]]]]) -> str:
    parts = [_conditions(results)]
    for section, render in shown:
        if rows := results.get(section):
            parts += render(rows)
    return "\n\n".join(part for part in parts if part)


def _conditions(results: dict[str, Any]) -> str:
    entries = [row for section in results.values() for row in section.values() if "machine" in row and "gpu" not in row]
    if not entries:
        return ""
    machines = sorted({Machine(**row["machine"]).sentence() for row in entries})
    days = sorted({row["when"][:10] for row in entries})
    when = days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}"
    return f"Measured by `make bench`, {when}, on {'; and on '.join(machines)}. All numbers, with loads and single rows, are in `benchmarks.json`."


def _end_to_end(rows: dict[str, Row]) -> list[str]:
    headers = [
        "as whole processes",
        "",
        "wall",
        "start-up",
        "processor",
        "peak memory",
        "captured energy",
        "wall: ours is",
        "… without start-up",
        "memory",
    ]
    body: list[list[str]] = []
    notes = []
    for name, row in rows.items():
        if "skipped" in row:
            notes.append(f"{name}: {row['skipped']}")
            continue
        label = f"{name}, r = {row['rank']}"
        for tool, shown in (("ours", "`phlora extract`"), ("mergekit", "`mergekit-extract-lora`")):
            cost = row.get(tool)
            if cost is None:
                continue
            if "skipped" in cost:
                notes.append(f"{name}: {cost['skipped']}")
                continue
            start = row[f"{tool}_start_up"]
            ratios = _ratios(row) if tool == "ours" and "wall" in row.get("mergekit", {}) else ["", "", ""]
            body.append([
                label if tool == "ours" else "", f"{shown}, {_of(cost)}", seconds(cost["wall"]), seconds(start["wall"]), seconds(cost["processor"]),
                f"{cost['peak_mib']:.0f} MiB", share(row["energy"]["captured"][tool]), *ratios,
            ])  # fmt: skip
        if "mergekit" in row["energy"]["captured"]:
            energy = row["energy"]
            notes.append(
                f"{label}: over {energy['tensors']} tensors, ours is at worst {energy['worst_difference']:+.1e} of a tensor's ‖ΔW‖² from mergekit's ({energy['worst_tensor']})"
            )
    return ["**End to end**, against mergekit 0.1.5", lines(headers, body), _listed(notes)]


def _of(cost: Row) -> str:
    runs = f"median of {cost['runs']}" if cost["runs"] > 1 else "one run"
    return f"{runs}, {cost['threads']} threads" if "threads" in cost else runs


def _ratios(row: Row) -> list[str]:
    ours, theirs = row["ours"], row["mergekit"]
    own_work, their_work = (
        ours["wall"] - row["ours_start_up"]["wall"],
        theirs["wall"] - row["mergekit_start_up"]["wall"],
    )
    bare = f"{factor(their_work / own_work)} faster" if min(own_work, their_work) > 0 else "–"
    return [
        f"{factor(theirs['wall'] / ours['wall'])} faster",
        bare,
        f"{ours['peak_mib'] / theirs['peak_mib']:.2f} of mergekit's",
    ]


def _limit(rows: dict[str, Row]) -> list[str]:
    headers = ["", "wall", "start-up", "reading", "products", "limit", "wall without start-up / limit"]
    body = [
        [f"{name}, r = {row['rank']}, {row['read_bytes'] / 1e9:.2f} GB", seconds(row["ours"]["wall"]), seconds(row["start_up"]["wall"]),
         seconds(row["reading_seconds"]), seconds(row["products_seconds"]), seconds(row["limit_seconds"]), f"{row['ratio']:.2f}"]
        for name, row in rows.items()
    ]  # fmt: skip
    return [
        "**Distance to the limit**: the larger of reading the bytes and of the algorithm's own products",
        lines(headers, body),
    ]


def _scaling(rows: dict[str, Row]) -> list[str]:
    found = []
    for series in dict.fromkeys(row["series"] for row in rows.values()):
        points = sorted((row for row in rows.values() if row["series"] == series), key=lambda row: int(row["value"]))
        body = [
            ["wall", *(seconds(row["ours"]["wall"]) for row in points)],
            ["of which start-up", *(seconds(row["start_up"]["wall"]) for row in points)],
        ]
        found.append(lines([series, *(str(row["value"]) for row in points)], body))
    return ["**How cost grows** (fine-tunes that share a base: one night of `phlora run`)", *found]


def _kernels(shapes: dict[str, Row]) -> list[str]:
    every = [
        "shape",
        "r",
        "`torch.linalg.svd`",
        "`auto`, α = 0.4",
        "",
        "captured",
        "of optimal",
        "certificate",
        "route",
        "least of optimal, all spectra",
        "least ×, all spectra",
        "fastest / fastest of `exact`, worst",
    ]
    cells: list[list[str]] = []
    for shape, found in shapes.items():
        for rank in sorted({row["rank"] for row in found["rows"]}):
            autos = [row for row in found["rows"] if row["rank"] == rank and row["method"] == "auto"]
            if autos:
                cells.append([shape.replace("x", "×"), str(rank), *_cell(found, autos)])
    return ["**Kernels**: two bf16 matrices in memory → A and B, certificate and checks included", lines(every, cells)]


def _kernels_on_a_gpu(shapes: dict[str, Row]) -> list[str]:
    """The same of a GPU, with a sentence of its own on where and when."""
    found = sorted({(row["gpu"], row["machine"]["torch"], row["when"][:10]) for row in shapes.values()})
    where = "; and ".join(f"{gpu}, torch {torch}, {day}" for gpu, torch, day in found)
    _, *tables = _kernels(shapes)
    return [
        f"**Kernels on a GPU** ({where}): two bf16 matrices in its memory → A and B there, certificate and checks included; ours in the blocks that a worker is given, of 24 at most, and the others one by one",
        *tables,
        *_kernels_further(shapes),
    ]


def _kernels_further(shapes: dict[str, Row]) -> list[str]:
    spectra = [row for shape, found in shapes.items() for row in _spectra(shape, found)]
    peers = [
        row
        for shape, found in shapes.items()
        for rank in sorted({row["rank"] for row in found["rows"]})
        for row in _peers(shape, rank, found)
    ]
    parts = [
        "Every spectrum, `auto`:",
        lines(["shape", "spectrum", "r", "time", "×", "captured", "of optimal", "certificate", "route"], spectra),
    ]
    if peers:
        parts += [
            "Other libraries on the same matrices (α = 0.4):",
            lines(["shape", "r", "method", "time", "×", "captured", "of optimal"], peers),
        ]
    return parts


def _cell(found: Row, autos: list[Row]) -> list[str]:
    base = found["baseline"]["seconds"]
    shown = next((row for row in autos if row["spectrum"] == "power-0.4"), autos[0])
    beside = [
        found["exact"] | row.get("exact_here", {}) for row in autos
    ]  # of this very cell, where it was timed there
    rivals = [row["fastest"] / exact["fastest"] for row, exact in zip(autos, beside, strict=True)]
    slowest = max(autos, key=lambda row: float(row["seconds"]))
    least = min(autos, key=lambda row: float(row["captured_to_optimal"]))
    return [
        seconds(base), seconds(shown["seconds"]), factor(base / shown["seconds"]), *_quality(shown), str(shown["route"]),
        f"{of_optimal(least['captured_to_optimal'])} ({least['spectrum']})", f"{factor(base / slowest['seconds'])} ({slowest['spectrum']})", f"{max(rivals):.2f}",
    ]  # fmt: skip


def _spectra(shape: str, found: Row) -> Iterator[list[str]]:
    for row in found["rows"]:
        if row["method"] == "auto":
            speed = factor(found["baseline"]["seconds"] / row["seconds"])
            told = [row["spectrum"], str(row["rank"]), seconds(row["seconds"]), speed]
            yield [shape.replace("x", "×"), *told, *_quality(row), str(row["route"])]


def _quality(row: Row) -> list[str]:
    certificate = row.get("certificate")
    told = "–" if certificate is None or math.isnan(certificate) else tiny(certificate)
    return [share(row["captured"]), of_optimal(row["captured_to_optimal"]), told]


def _peers(shape: str, rank: int, found: Row) -> Iterator[list[str]]:
    for row in found["rows"]:
        if row["rank"] == rank and "route" not in row:
            speed = factor(found["baseline"]["seconds"] / row["seconds"])
            told = f"{seconds(row['seconds'])} (of {row['runs']})"
            yield [
                shape.replace("x", "×"),
                str(rank),
                row["method"],
                told,
                speed,
                share(row["captured"]),
                of_optimal(row["captured_to_optimal"]),
            ]


def _compress(rows: dict[str, Row]) -> list[str]:
    headers = [
        "shape",
        "rank",
        "`torch.linalg.svd` of B·A",
        "ours, from the factors",
        "",
        "captured",
        "less than optimal by",
    ]
    body = []
    for name, row in rows.items():
        shape, _, ranks = name.replace("x", "×").partition(" ")
        body.append([
            shape, ranks, seconds(row["svd"]["seconds"]), seconds(row["ours"]["seconds"]), factor(row["faster"]), share(row["captured"]), tiny(max(row["loss"], 0.0)),
        ])  # fmt: skip
    return ["**Compressing a LoRA**: the best factors of a smaller rank", lines(headers, body)]


def _listed(notes: Sequence[str]) -> str:
    return "\n".join(f"- {note}" for note in notes)
