"""The benchmark, `python -m jobs.bench`: it measures, saves every row as soon as it is there, and shows tables.

Kernels (6a), an adapter at a smaller rank, whole processes beside mergekit (6b), the distance to what the machine allows (6c), and how cost grows (6d); of a
zoo, planning, the driver's own cost, and the tail of a night on simulated workers. It judges nothing. Exit codes: 0 measured · 2 something that is to be measured does not run; what was measured before is saved.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

from . import compressing, dispatching, end_to_end, kernels, limit, night, planning, ranges, results, scaling, table
from .measure import BenchError
from .settings import FULL, QUICK, Bench, Sizes

SECTIONS: dict[str, Callable[[Bench], None]] = {
    "kernels": kernels.run,
    "end-to-end": end_to_end.run,
    "compress": compressing.run,
    "limit": limit.run,
    "scaling": scaling.run,
    "ranges": ranges.run,
    "planning": planning.run,
    "dispatch": dispatching.run,
    "night": night.run,
}


def main() -> int:
    """Parse, measure section by section, show."""
    options = _parser().parse_args()
    if options.device != "cpu" and options.only != ["kernels"]:
        return _refused(f"--device {options.device} is for --only kernels")
    out = options.out or (options.dir / "quick.json" if options.quick else Path("benchmarks.json"))
    options.dir.mkdir(parents=True, exist_ok=True)
    code = 0
    for name in options.only:
        bench = Bench(
            root=options.dir.resolve(),
            sizes=_chosen(QUICK if options.quick else FULL, options),
            peers=not options.no_mergekit,
            others=not options.no_others,
            say=say,
            save=partial(results.save, out, name if options.device == "cpu" else f"{name}-{options.device}"),
            device=options.device,
        )
        try:
            SECTIONS[name](bench)
        except BenchError as error:
            say(f"error: {name}: {error}")
            code = 2
    found = results.read(out)
    print(table.rendered(found))
    if options.readme or not options.quick:
        show(table.headline(found), options.readme or Path("README.md"))
    if options.tables or not options.quick:
        show(table.rendered(found), options.tables or Path(__file__).with_name("README.md"))
    return code


def _refused(why: str) -> int:
    say(f"error: {why}")
    return 2


def show(tables: str, page: Path) -> None:
    """The tables into a page, where there is a place for them."""
    try:
        page.write_text(table.inserted(page.read_text(), tables))
    except (OSError, ValueError) as error:
        say(f"{page} was left as it is: {error}")


def say(line: str) -> None:
    """Progress goes to stderr, tables to stdout."""
    print(line, file=sys.stderr, flush=True)


def _sections(value: str) -> list[str]:
    chosen = value.split(",")
    if unknown := sorted(set(chosen) - set(SECTIONS)):
        raise argparse.ArgumentTypeError(f"unknown: {', '.join(unknown)}; known: {', '.join(SECTIONS)}")
    return chosen


def _listed(value: str) -> list[str]:
    return value.split(",")


def _chosen(sizes: Sizes, options: argparse.Namespace) -> Sizes:
    """Only the shapes and spectra of the kernels that are asked for."""
    shapes = tuple(shape for shape in sizes.shapes if not options.shapes or f"{shape[0]}x{shape[1]}" in options.shapes)
    spectra = tuple(name for name in sizes.spectra if not options.spectra or name in options.spectra)
    return replace(sizes, shapes=shapes, spectra=spectra)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m jobs.bench", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--only", type=_sections, default=list(SECTIONS), metavar="LIST", help=f"of {','.join(SECTIONS)}; default: all"
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="tiny cases, to see that all runs; results go to DIR/quick.json, and no page is touched",
    )
    parser.add_argument(
        "--no-mergekit", action="store_true", help="ours alone: its environment is a download of 0.3 GB"
    )
    parser.add_argument(
        "--no-others", action="store_true", help="of the kernels, `auto` and the full SVD alone: the others take hours"
    )
    parser.add_argument(
        "--device",
        choices=("cpu", "cuda"),
        default="cpu",
        help="of the kernels; a GPU's results are a section of their own",
    )
    parser.add_argument("--shapes", type=_listed, metavar="LIST", help="of the kernels, such as 576x576,4096x4096")
    parser.add_argument("--spectra", type=_listed, metavar="LIST", help="of the kernels, such as power-0.4,flat")
    parser.add_argument("--out", type=Path, help="results, merged with what is there (default: benchmarks.json)")
    parser.add_argument(
        "--readme",
        type=Path,
        help="where the main tables go, between <!-- benchmarks --> and <!-- /benchmarks --> (default: README.md)",
    )
    parser.add_argument(
        "--tables", type=Path, help="where all tables go, likewise (default: the benchmark's own README.md)"
    )
    parser.add_argument(
        "--dir", type=Path, default=Path(".bench"), help="pairs and environments, kept (default: %(default)s)"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
