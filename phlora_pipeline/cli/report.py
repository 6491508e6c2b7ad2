"""What manifests tell: a page, Markdown or JSON."""

from __future__ import annotations

import sys
from enum import StrEnum
from typing import Annotated

import typer

from phlora_pipeline import render
from phlora_pipeline.cli.loading import loading
from phlora_pipeline.cli.options import Json


class Form(StrEnum):
    """Of what is written."""

    HTML = "html"
    MD = "md"
    JSON = "json"


def report(
    manifests: Annotated[
        list[str],
        typer.Argument(
            metavar="MANIFEST...",
            help="An energy.parquet, an adapter's folder, a folder of adapters, or a zoo's output: URLs, one or more.",
        ),
    ],
    out: Annotated[
        str,
        typer.Option(
            "--out",
            metavar="FILE",
            show_default=False,
            help="The page: figures go beside it as SVG and PNG, pages of several models into a folder of its name. Without it, text goes to stdout.",
        ),
    ] = "",
    form: Annotated[
        Form | None,
        typer.Option(
            "--format", show_default=False, help="Default: html with --out (needs the extra `report`), else md."
        ),
    ] = None,
    json_output: Json = False,
) -> None:
    """Show what adapters keep: energy against rank, size against energy, where in the model, and what is left out and why.

    From manifests alone: no tensor is read. One model gets a page in detail; several, or a zoo, a page over all that links
    to one for each. Pages need no network. An earlier report is replaced, nothing else.

    Examples: phlora report ./adapter --out page.html   phlora report s3://serving/adapters --out zoo.html

    What each rank keeps, side by side: phlora extract --rank 16,32,64 --out ./ranks ...   phlora report ./ranks --out ranks.html
    """
    chosen = form or (Form.HTML if out else Form.JSON if json_output else Form.MD)
    if json_output and not out and chosen is not Form.JSON:
        raise typer.BadParameter(f"--json and --format {chosen.value} without --out: which of the two on stdout?")
    with loading():
        from phlora_pipeline import report as reporting
    made = reporting.report(manifests, out, form=chosen.value)
    if not out:
        sys.stdout.write(made.text)
    elif json_output:
        render.json_object({"out": made.out, "format": chosen.value, "models": made.models, "files": made.files})
    else:
        told = f", {len(made.files)} files beside it" if made.files else ""
        render.line(f"{made.out}: {made.models} manifest{'s' if made.models != 1 else ''}{told}")
