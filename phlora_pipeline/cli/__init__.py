"""The `phlora` command: flags in, one recipe called, one table or one JSON object out.

Results go to stdout, everything else to stderr. Exit codes: 0 done, or nothing to do · 1 a bug · 2 the request is wrong ·
3 a model failed, the others are done · 11 credentials · 12 storage · 13 verification failed · 14 no usable device · 130 interrupted ·
143 stopped in order.

`extraction` has the commands for one pair of checkpoints, `zoo` those for a zoo.yaml, `report` shows what came of either,
`options` has their flags.
"""

from __future__ import annotations

import io
import sys
import traceback
from collections.abc import Sequence
from typing import Annotated

import typer

from phlora_pipeline import __version__, render
from phlora_pipeline.cli import compress, doctor, extraction, merging, report, zoo
from phlora_pipeline.cli.leaving import exit_code_kept
from phlora_pipeline.cli.loading import loading as _loading
from phlora_pipeline.errors import PhloraError

__all__ = ["_loading", "app", "command", "main"]

INTERRUPTED = 130
_ONE, _ZOO, _MORE = "One checkpoint", "A zoo of checkpoints", "Before and after"

app = typer.Typer(
    name="phlora",
    help="Turn full-rank fine-tuned checkpoints into LoRA adapters, post hoc and without data.",
    epilog="URLs: a local path, s3://, gs://, az://, hf://, or anything that fsspec knows; output goes to a local path or s3://.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for _panel, _commands in {
    _ONE: (extraction.extract, extraction.plan, extraction.verify),
    _ZOO: (
        zoo.init, doctor.doctor, zoo.run, zoo.submit, zoo.status, zoo.explain, zoo.retry, zoo.rollback, zoo.pull, zoo.gc,
    ),
    _MORE: (report.report, compress.compress, merging.merge, extraction.convert, extraction.calibrate),
}.items():  # fmt: skip
    for _command in _commands:
        app.command(rich_help_panel=_panel)(_command)


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        render.line(f"phlora-pipeline {__version__}")
        raise typer.Exit


def command(arguments: Sequence[str] | None = None) -> None:
    """`main` as a process of its own, which tells its exit code whatever native libraries do at the end."""
    with exit_code_kept():
        main(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command; every expected error is two lines and an exit code.

    Args:
        arguments: in place of the command line's.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal that cannot show ‖ΔW‖ is no reason to fail
    given = list(sys.argv[1:] if arguments is None else arguments)
    as_json = "--json" in given
    try:
        code = app(given, standalone_mode=False)
    except PhloraError as error:
        render.show_error(error, as_json=as_json)
        sys.exit(error.exit_code)
    except typer.TyperException as error:  # the command line itself is wrong
        if as_json:
            render.json_object({"error": error.format_message(), "remedy": "see --help", "exit_code": 2})
        error.show()  # type: ignore[attr-defined]  # every usage error has it
        sys.exit(2)
    except Exception:
        traceback.print_exc()
        print("error: this is a bug in phlora-pipeline; please report it with the lines above", file=sys.stderr)
        sys.exit(1)
    if code == INTERRUPTED:
        print("interrupted; run the same command again: finished parts are kept", file=sys.stderr)
    sys.exit(code or 0)
