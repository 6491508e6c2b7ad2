"""The `phlora` command: flags in, one recipe called, one table or one JSON object out.

Results go to stdout, everything else to stderr. Exit codes: 0 done, or nothing to do · 1 a bug · 2 the request is wrong ·
3 the model failed · 11 credentials · 12 storage · 13 verification failed · 14 no usable device · 130 interrupted.
"""

from __future__ import annotations

import contextlib
import gc
import io
import os
import sys
import traceback
from collections.abc import Iterator
from dataclasses import asdict
from enum import StrEnum
from typing import Annotated, Any

import typer

from phlora_pipeline import __version__, console, render
from phlora_pipeline.errors import PhloraError
from phlora_pipeline.machine import default_threads
from phlora_pipeline.summary import size

app = typer.Typer(
    name="phlora",
    help="Turn full-rank fine-tuned checkpoints into LoRA adapters, post hoc and without data.",
    epilog="URLs: a local path, s3://, gs://, az://, hf://, or anything that fsspec knows; output goes to a local path or s3://.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

INTERRUPTED = 130
_SELECT, _NUMERICS, _RUN = "What is adapted", "How it is computed", "How it runs"


class Targets(StrEnum):
    """Named sets of kinds."""

    ALL = "all"
    LINEAR = "linear"
    PAPER = "paper"


class Dialect(StrEnum):
    """For whom the adapter is written."""

    PORTABLE = "portable"
    PEFT = "peft"


class Dtype(StrEnum):
    """Of the factors."""

    AUTO = "auto"
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


class Engine(StrEnum):
    """Where tasks run."""

    AUTO = "auto"
    LOCAL = "local"
    RAY = "ray"


class Solver(StrEnum):
    """How the factors are computed."""

    AUTO = "auto"
    KRYLOV = "krylov"
    GRAM = "gram"
    EXACT = "exact"


Base = Annotated[
    str,
    typer.Option(
        "--base",
        metavar="URL",
        help="The base checkpoint: a folder with config.json and safetensors, or one .safetensors file.",
    ),
]
Tuned = Annotated[str, typer.Option("--tuned", metavar="URL", help="The fine-tuned checkpoint of that base.")]
Out = Annotated[
    str, typer.Option("--out", metavar="URL", help="Where the adapter goes: a folder that is empty or absent.")
]
Rank = Annotated[int, typer.Option("--rank", "-r", help="Rank r of the adapter, 1 to 512.")]
MaxRank = Annotated[
    int,
    typer.Option(
        "--max-rank",
        help="Singular values kept for the manifest; E_r is known up to here. 0: the same as --rank, or 128 with --energy.",
    ),
]
TargetsOption = Annotated[
    Targets,
    typer.Option(
        "--targets",
        rich_help_panel=_SELECT,
        help="all: every 2-D weight and embedding; linear: no embeddings or lm_head; paper: attention and MLP.",
    ),
]
Include = Annotated[
    list[str] | None,
    typer.Option(
        "--include",
        metavar="GLOB",
        rich_help_panel=_SELECT,
        help="Adapt only matrices whose name matches; may be repeated.",
    ),
]
Exclude = Annotated[
    list[str] | None,
    typer.Option(
        "--exclude",
        metavar="GLOB",
        rich_help_panel=_SELECT,
        help="Leave out tensors whose name matches; may be repeated.",
    ),
]
For = Annotated[
    Dialect,
    typer.Option(
        "--for",
        rich_help_panel=_SELECT,
        help="portable: what PEFT, vLLM, SGLang, NIM and llama.cpp all apply; peft: every matrix, for PEFT only.",
    ),
]
BaseName = Annotated[
    str,
    typer.Option(
        "--base-name",
        metavar="NAME",
        rich_help_panel=_SELECT,
        help="The base's hub id or served name, for adapter_config.json. Default: what config.json says.",
    ),
]
DtypeOption = Annotated[
    Dtype,
    typer.Option(
        "--dtype",
        rich_help_panel=_NUMERICS,
        help="Of the written factors; auto: the fine-tune's where that has 16 bits, else float32.",
    ),
]
SolverOption = Annotated[
    Solver,
    typer.Option(
        "--solver",
        rich_help_panel=_NUMERICS,
        help="auto: the cheapest that meets --tolerance; krylov: block Krylov; gram: eigenvectors of ΔWΔWᵀ; exact: full SVD.",
    ),
]
Tolerance = Annotated[
    float,
    typer.Option(
        "--tolerance",
        rich_help_panel=_NUMERICS,
        help="Share of ‖ΔW‖² that the factors may certifiably lose against the optimal ones of their rank.",
    ),
]
Energy = Annotated[
    float | None,
    typer.Option(
        "--energy",
        metavar="SHARE",
        help="Instead of --rank: each tensor's smallest rank that keeps this share of its ‖ΔW‖², at most --max-rank.",
    ),
]
ProfileOption = Annotated[
    str,
    typer.Option(
        "--profile", metavar="FILE", rich_help_panel=_NUMERICS, help="Rates of your device, from phlora calibrate."
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout, and no progress.")]


@app.command()
def extract(
    base: Base,
    tuned: Tuned,
    out: Out,
    rank: Rank = 32,
    energy: Energy = None,
    max_rank: MaxRank = 0,
    targets: TargetsOption = Targets.ALL,
    include: Include = None,
    exclude: Exclude = None,
    dialect: For = Dialect.PORTABLE,
    base_name: BaseName = "",
    dtype: DtypeOption = Dtype.AUTO,
    solver: SolverOption = Solver.AUTO,
    tolerance: Tolerance = 1e-3,
    profile: ProfileOption = "",
    engine: Annotated[
        Engine,
        typer.Option(
            "--engine",
            rich_help_panel=_RUN,
            help="local: a loop in this process; ray: actors, one per GPU, on RAY_ADDRESS or this machine; auto: ray where there are several GPUs.",
        ),
    ] = Engine.AUTO,
    device: Annotated[str, typer.Option("--device", rich_help_panel=_RUN, help="auto, cpu, cuda or cuda:N.")] = "auto",
    workers: Annotated[
        int, typer.Option("--workers", min=0, rich_help_panel=_RUN, help="Ray workers; 0: as many as fit.")
    ] = 0,
    threads: Annotated[
        int,
        typer.Option(
            "--threads",
            min=0,
            rich_help_panel=_RUN,
            help="Processor threads per worker; the same number gives the same bytes. 0: all, at most 8.",
        ),
    ] = 0,
    allow_partial: Annotated[
        bool,
        typer.Option(
            "--allow-partial", rich_help_panel=_RUN, help="Publish even if tensors failed; the card names them."
        ),
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", rich_help_panel=_RUN, help="Replace another adapter at --out.")
    ] = False,
    force: Annotated[
        bool,
        typer.Option(
            "--force", rich_help_panel=_RUN, help="Publish even if the pair does not look like base and fine-tune."
        ),
    ] = False,
    keep_parts: Annotated[
        bool,
        typer.Option(
            "--keep-parts",
            rich_help_panel=_RUN,
            help="Keep the intermediate parts: another --dtype or a smaller --rank (under the same --max-rank) then needs no second SVD.",
        ),
    ] = False,
    json_output: Json = False,
) -> None:
    """Extract a LoRA adapter from a fine-tuned checkpoint and its base.

    Example: phlora extract --base ./llama --tuned s3://zoo/llama-support --out ./adapter --rank 32
    """
    from phlora_pipeline import config

    settings = config.run_config(
        base=base, tuned=tuned, out=out, rank=rank, energy=energy, max_rank=max_rank, targets=targets.value, include=tuple(include or ()), exclude=tuple(exclude or ()),
        dialect=dialect.value, base_name=base_name, dtype=dtype.value, solver=solver.value, tolerance=tolerance, profile=profile, engine=engine.value, device=device, workers=workers,
        threads=threads, allow_partial=allow_partial, overwrite=overwrite, force=force, keep_parts=keep_parts,
    )  # fmt: skip
    with _loading():
        from phlora_pipeline import pipeline
    with console.reporter(quiet=json_output) as observer:
        result = pipeline.extract(settings, observer)
    render.json_object(asdict(result)) if json_output else render.show_result(result)


@app.command()
def plan(
    base: Base,
    tuned: Tuned,
    rank: Rank = 32,
    energy: Energy = None,
    max_rank: MaxRank = 0,
    targets: TargetsOption = Targets.ALL,
    include: Include = None,
    exclude: Exclude = None,
    dialect: For = Dialect.PORTABLE,
    solver: SolverOption = Solver.AUTO,
    device: Annotated[str, typer.Option("--device", help="auto, cpu, cuda or cuda:N.")] = "auto",
    profile: ProfileOption = "",
    json_output: Json = False,
) -> None:
    """Say what extract would do: which tensors, which not and why, bytes, work and memory. Reads headers only."""
    from phlora_pipeline import config

    settings = config.run_config(
        base=base, tuned=tuned, rank=rank, energy=energy, max_rank=max_rank, targets=targets.value, include=tuple(include or ()),
        exclude=tuple(exclude or ()), dialect=dialect.value, solver=solver.value, device=device, profile=profile,
    )  # fmt: skip
    with _loading():
        from phlora_pipeline import pipeline
    prepared = pipeline.plan(settings)
    render.json_object(render.plan_record(prepared)) if json_output else render.show_plan(prepared)


@app.command()
def verify(
    base: Base,
    tuned: Tuned,
    adapter: Annotated[str, typer.Option("--adapter", metavar="URL", help="The adapter's folder.")],
    device: Annotated[str, typer.Option("--device", help="cpu, cuda or cuda:N.")] = "cpu",
    json_output: Json = False,
) -> None:
    """Measure from its bytes what an adapter keeps of the update, and check its keys. Exit 13 when anything is off."""
    with _loading():
        from phlora_pipeline import verify as verification
    found = verification.verify(base, tuned, adapter, device=device)
    record = {
        "passed": found.passed,
        "written_energy": found.written_energy,
        "problems": found.problems,
        "modules": [asdict(check) for check in found.modules],
    }
    render.json_object(record) if json_output else render.show_verification(found)
    if not found.passed:
        raise typer.Exit(13)


@app.command()
def convert(
    source: Annotated[
        str, typer.Argument(metavar="IN", help="A .bin, .pt, .pth or .ckpt file, or a folder with pytorch_model.bin.")
    ],
    out: Annotated[str, typer.Argument(metavar="OUT", help="A folder for model.safetensors.")],
    json_output: Json = False,
) -> None:
    """Convert a pickled checkpoint to safetensors, in a process of its own that holds no credentials."""
    from phlora_pipeline import convert as conversion

    done = conversion.convert(source, out)
    if json_output:
        render.json_object(asdict(done))
    else:
        render.line(f"{done.tensors} tensors, {size(done.nbytes)} → {done.out}/model.safetensors")
        if done.dropped:
            render.line(f"{len(done.dropped)} entries are no tensors and were dropped: {', '.join(done.dropped[:5])}")


@app.command()
def calibrate(
    out: Annotated[str, typer.Option("--out", metavar="FILE", help="Where the profile goes, as JSON.")],
    name: Annotated[str, typer.Option("--name", help="Of the profile, for manifests and messages.")] = "custom",
    device: Annotated[str, typer.Option("--device", help="auto, cpu, cuda or cuda:N.")] = "auto",
    threads: Annotated[int, typer.Option("--threads", min=0, help="As extract will have them. 0: all, at most 8.")] = 0,
    json_output: Json = False,
) -> None:
    """Measure this device's rates, from which --solver auto picks its routes: extract --profile FILE. Takes a minute.

    Without one, rates of a device of the same kind are used; it pays where yours differs much from those.
    """
    with _loading():
        from phlora_pipeline import calibrate as calibration
    found = calibration.measure(device, threads or default_threads(), name)
    calibration.write(found, out)
    render.json_object(asdict(found)) if json_output else render.show_profile(asdict(found), out)


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        render.line(f"phlora-pipeline {__version__}")
        raise typer.Exit


def main() -> None:
    """Run the command; every expected error is two lines and an exit code."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal that cannot show ‖ΔW‖ is no reason to fail
    try:
        code = app(standalone_mode=False)
    except PhloraError as error:
        _say_json({"error": error.what, "remedy": error.remedy, "exit_code": error.exit_code})
        render.line(f"error: {error.what}", sys.stderr)
        if error.remedy:
            render.line(f"  fix: {error.remedy}", sys.stderr)
        sys.exit(error.exit_code)
    except typer.TyperException as error:  # the command line itself is wrong
        _say_json({"error": error.format_message(), "remedy": "see --help", "exit_code": 2})
        error.show()  # type: ignore[attr-defined]  # every usage error has it
        sys.exit(2)
    except Exception:
        traceback.print_exc()
        print("error: this is a bug in phlora-pipeline; please report it with the lines above", file=sys.stderr)
        sys.exit(1)
    if code == INTERRUPTED:
        print("interrupted; run the same command again: finished parts are kept", file=sys.stderr)
    sys.exit(code or 0)


def _say_json(record: dict[str, Any]) -> None:
    if "--json" in sys.argv:
        render.json_object(record)


@contextlib.contextmanager
def _loading() -> Iterator[None]:
    """Around an import that brings torch, and with it a quarter of a million objects that stay as long as the process.

    The garbage collector would look through them again and again while they are made, and once more at exit: a third of
    the time of a small run. Help and refused settings do without torch, so that it is imported late.
    """
    # OpenMP's threads spin between one thin product and the next, and on a shared machine take the processor from each
    # other: with a short spin a third of the time on a busy one, with none a third more on a quiet one.
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
