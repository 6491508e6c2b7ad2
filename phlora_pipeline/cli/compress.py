"""An existing adapter at a lower rank."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from phlora_pipeline import render
from phlora_pipeline.cli.loading import loading
from phlora_pipeline.cli.options import RANKS, SELECT, BaseName, Budget, Dialect, Dtype, Json, Out


def compress(
    adapter: Annotated[
        str,
        typer.Option(
            "--adapter", metavar="URL", help="A PEFT adapter's folder, or a .safetensors file with kohya's keys."
        ),
    ],
    out: Out,
    rank: Annotated[
        int | None,
        typer.Option(
            "--rank", "-r", rich_help_panel=RANKS, show_default=False, help="Rank of every module that has as many."
        ),
    ] = None,
    energy: Annotated[
        float | None,
        typer.Option(
            "--energy",
            metavar="SHARE",
            rich_help_panel=RANKS,
            show_default=False,
            help="Each module's smallest rank that keeps this share of its ‖B·A‖².",
        ),
    ] = None,
    budget: Budget = None,
    dialect: Annotated[
        Dialect | None,
        typer.Option(
            "--for",
            rich_help_panel=SELECT,
            show_default=False,
            help="portable (the default): one rank for all modules, padded with zeros; peft, vllm: each at its own. Kohya's keys stay kohya's.",
        ),
    ] = None,
    base_name: BaseName = "",
    dtype: Annotated[Dtype, typer.Option("--dtype", help="Of the written factors; auto: the original's.")] = Dtype.AUTO,
    device: Annotated[str, typer.Option("--device", help="auto, cpu, cuda or cuda:N.")] = "cpu",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an adapter that stands in --out.")] = False,
    json_output: Json = False,
) -> None:
    """Compress an existing LoRA to a lower rank: the best factors of that rank, from its own factors alone.

    No base is needed and nothing is trained. Energies are shares of the original adapter's. DoRA, LoHa, AdaLoRA and others that
    are no plain low-rank update are refused by name.

    Examples: phlora compress --adapter ./r128 --out ./r32 --rank 32   phlora compress --adapter ./r128 --out ./small --energy 0.95 --for peft
    """
    with loading():
        from phlora_pipeline.compress import compress as run
    result = run(
        adapter, out, rank=rank, energy=energy, budget=budget, dialect=dialect.value if dialect else None,
        dtype=dtype.value, base_name=base_name, device=device, overwrite=overwrite,
    )  # fmt: skip
    render.json_object(asdict(result)) if json_output else render.show_compression(result)
