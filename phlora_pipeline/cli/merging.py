"""Adapters into their base: a checkpoint of its own, for who serves no adapters."""

from __future__ import annotations

import re
from dataclasses import asdict
from enum import StrEnum
from typing import Annotated

import typer

from phlora_pipeline import console, render
from phlora_pipeline.cli.loading import loading
from phlora_pipeline.cli.options import RUN, Base, Json

# `s3://host:9000` and `C:` are no weights: what follows the last colon is a number, and what is before it has a path.
_WEIGHTED = re.compile(r"(?P<url>(?!\w+://[^/]*:[^/]*$).+):(?P<weight>[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?)")


class MergedDtype(StrEnum):
    """Of the merged tensors."""

    BASE = "base"
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


def merge(
    base: Base,
    adapter: Annotated[
        list[str],
        typer.Option(
            "--adapter",
            metavar="URL[:WEIGHT]",
            show_default=False,
            help="A LoRA of that base: a PEFT folder, or a .safetensors file; how much of it is added (1). May be repeated.",
        ),
    ],
    out: Annotated[
        str, typer.Option("--out", metavar="URL", help="Where the checkpoint goes: a folder that is empty or absent.")
    ],
    dtype: Annotated[
        MergedDtype,
        typer.Option(
            "--dtype", help="Of all floating-point tensors; base: each as it is there, and copied if unchanged."
        ),
    ] = MergedDtype.BASE,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", rich_help_panel=RUN, help="Replace another merge at --out.")
    ] = False,
    json_output: Json = False,
) -> None:
    """Merge adapters into their base: W + Σ weight·scale·B·A, in float32, rounded once; with the base's shards and files.

    What no adapter touches is the base's bit for bit. Interrupted, it leaves nothing that loads; the same command goes on.

    Examples: phlora merge --base ./llama --adapter ./support --out ./merged
    phlora merge --base ./llama --adapter s3://zoo/support:0.7 --adapter s3://zoo/legal:0.3 --out s3://models/both
    """
    adapters = [weighted(text) for text in adapter]
    with loading():
        from phlora_pipeline import merge as merging
    with console.writer(quiet=json_output) as observer:
        result = merging.merge(base, adapters, out, dtype=dtype.value, overwrite=overwrite, observer=observer)
    render.json_object(asdict(result)) if json_output else render.show_merge(result)


def weighted(text: str) -> tuple[str, float]:
    """An adapter's URL and its weight.

    >>> weighted("s3://zoo/support:0.7"), weighted("./support"), weighted("http://host:8080")
    (('s3://zoo/support', 0.7), ('./support', 1.0), ('http://host:8080', 1.0))
    """
    match = _WEIGHTED.fullmatch(text)
    return (match["url"], float(match["weight"])) if match else (text, 1.0)
