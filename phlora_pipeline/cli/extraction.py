"""One pair of checkpoints: extract, plan, verify; and what goes before: convert, calibrate."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Annotated, Any

import typer

from phlora_pipeline import console, render
from phlora_pipeline.cli import ranks
from phlora_pipeline.cli.loading import loading
from phlora_pipeline.cli.options import (
    RUN,
    Base,
    BaseName,
    Budget,
    Carry,
    CarryOption,
    ConvGroups,
    Dialect,
    Dtype,
    DtypeOption,
    Energy,
    Engine,
    Exclude,
    For,
    Gpu,
    GpuMemory,
    GpusPerNode,
    Include,
    Json,
    MaxRank,
    NodeReadRate,
    Nodes,
    Out,
    Price,
    ProfileOption,
    Rank,
    Solver,
    SolverOption,
    Targets,
    TargetsOption,
    Tolerance,
    Tuned,
)
from phlora_pipeline.machine import default_threads
from phlora_pipeline.summary import size


def extract(
    base: Base,
    tuned: Tuned,
    out: Out,
    rank: Rank = None,
    energy: Energy = None,
    budget: Budget = None,
    max_rank: MaxRank = 0,
    targets: TargetsOption = Targets.ALL,
    include: Include = None,
    exclude: Exclude = None,
    conv_groups: ConvGroups = None,
    carry: CarryOption = Carry.NONE,
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
            rich_help_panel=RUN,
            help="local: a loop in this process; ray: actors, one per GPU, on RAY_ADDRESS or this machine; auto: ray where there are several GPUs.",
        ),
    ] = Engine.AUTO,
    device: Annotated[str, typer.Option("--device", rich_help_panel=RUN, help="auto, cpu, cuda or cuda:N.")] = "auto",
    workers: Annotated[
        int, typer.Option("--workers", min=0, rich_help_panel=RUN, help="Ray workers; 0: as many as fit.")
    ] = 0,
    threads: Annotated[
        int,
        typer.Option(
            "--threads",
            min=0,
            rich_help_panel=RUN,
            help="Processor threads per worker; the same number gives the same bytes. 0: all, at most 8.",
        ),
    ] = 0,
    allow_partial: Annotated[
        bool,
        typer.Option(
            "--allow-partial", rich_help_panel=RUN, help="Publish even if tensors failed; the card names them."
        ),
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", rich_help_panel=RUN, help="Replace another adapter at --out.")
    ] = False,
    force: Annotated[
        bool,
        typer.Option(
            "--force", rich_help_panel=RUN, help="Publish even if the pair does not look like base and fine-tune."
        ),
    ] = False,
    keep_parts: Annotated[
        bool,
        typer.Option(
            "--keep-parts",
            rich_help_panel=RUN,
            help="Keep the intermediate parts: another --dtype or a smaller --rank (under the same --max-rank) then needs no second SVD.",
        ),
    ] = False,
    json_output: Json = False,
) -> None:
    """Extract a LoRA adapter from a fine-tuned checkpoint and its base.

    Examples: phlora extract --base ./llama --tuned s3://zoo/llama-support --out ./adapter --rank 32

    … --rank 16,32,64 (three adapters, one decomposition)   … --budget 200MB --for vllm   … --rank auto --for peft
    """
    from phlora_pipeline import config

    wanted = ranks.asked(rank, energy, budget)
    settings = config.run_config(
        base=base, tuned=tuned, out=out, rank=wanted.rank, energy=energy, budget=budget, max_rank=max_rank, targets=targets.value, include=tuple(include or ()), carry=carry.value, exclude=tuple(exclude or ()), conv_groups=tuple(conv_groups or ()),
        dialect=dialect.value, base_name=base_name, dtype=dtype.value, solver=solver.value, tolerance=tolerance, profile=profile, engine=engine.value, device=device, workers=workers,
        threads=threads, allow_partial=allow_partial, overwrite=overwrite, force=force, keep_parts=keep_parts,
    )  # fmt: skip
    with loading():
        from phlora_pipeline import pipeline, several
    with console.reporter(quiet=json_output) as observer:
        if wanted.several:
            results = several.extract(settings, wanted.several, observer)
        else:
            results = [pipeline.extract(settings, observer)]
    if json_output:
        records = [asdict(result) for result in results]
        render.json_object({"adapters": records} if wanted.several else records[0])
    else:
        for result in results:
            render.show_result(result)


def plan(
    context: typer.Context,
    zoo: Annotated[
        str,
        typer.Argument(
            metavar="[ZOO]", show_default=False, help="A zoo.yaml: what tonight would read, compute, take and cost."
        ),
    ] = "",
    base: Base = "",
    tuned: Tuned = "",
    rank: Rank = None,
    energy: Energy = None,
    budget: Budget = None,
    max_rank: MaxRank = 0,
    targets: TargetsOption = Targets.ALL,
    include: Include = None,
    exclude: Exclude = None,
    conv_groups: ConvGroups = None,
    carry: CarryOption = Carry.NONE,
    dialect: For = Dialect.PORTABLE,
    solver: SolverOption = Solver.AUTO,
    device: Annotated[str, typer.Option("--device", help="auto, cpu, cuda or cuda:N.")] = "auto",
    profile: ProfileOption = "",
    nodes: Nodes = 1,
    gpus_per_node: GpusPerNode = 8,
    node_read_rate: NodeReadRate = 3.0,
    gpu: Gpu = "sm80",
    gpu_memory: GpuMemory = 0.0,
    price: Price = 0.0,
    json_output: Json = False,
) -> None:
    """Say what would be done, and do nothing: of one pair (--base, --tuned), or of a night (ZOO). Reads headers only.

    Of a pair: which tensors, which not and why, bytes, work and memory. Of a zoo: which models are due and why, what they
    would read, compute, take and cost on so many nodes. A zoo's settings are in its zoo.yaml.

    Examples: phlora plan --base ./llama --tuned ./support   phlora plan zoo.yaml --nodes 4 --price 32
    """
    given = {
        name for name in context.params if getattr(context.get_parameter_source(name), "name", "") == "COMMANDLINE"
    }
    if zoo and (strange := given - {"zoo", "json_output", *_OF_A_NIGHT}):
        raise typer.BadParameter(f"a zoo's settings are in {zoo}, not in {_flags(context, strange)}", ctx=context)
    if not zoo and (strange := given & set(_OF_A_NIGHT)):
        raise typer.BadParameter(f"{_flags(context, strange)}: of a night; give a ZOO", ctx=context)
    if zoo:
        cluster = {"nodes": nodes, "gpus_per_node": gpus_per_node, "profile": gpu, "price": price}
        rates = {"node_read_rate": node_read_rate * 1e9, "gpu_memory": gpu_memory * 1e9}
        _plan_zoo(zoo, {**cluster, **rates}, json_output=json_output)
        return
    if missing := [f"--{name}" for name in ("base", "tuned") if name not in given]:
        raise typer.BadParameter(f"Missing option {' and '.join(missing)}, or a ZOO", ctx=context)
    from phlora_pipeline import config

    wanted = ranks.asked(rank, energy, budget)
    settings = config.run_config(
        base=base, tuned=tuned, rank=wanted.rank, energy=energy, budget=budget, max_rank=max_rank, targets=targets.value, include=tuple(include or ()), carry=carry.value,
        exclude=tuple(exclude or ()), conv_groups=tuple(conv_groups or ()), dialect=dialect.value, solver=solver.value, device=device, profile=profile,
    )  # fmt: skip
    with loading():
        from phlora_pipeline import several
    prepared = [made for _, made in several.plan(settings, wanted.several)]
    render.json_object(render.plan_record(prepared)) if json_output else render.show_plan(prepared)


_OF_A_NIGHT = ("nodes", "gpus_per_node", "node_read_rate", "gpu", "gpu_memory", "price")


def _flags(context: typer.Context, names: Iterable[str]) -> str:
    return ", ".join(param.opts[0] for param in context.command.params if param.name in set(names))


def _plan_zoo(zoo: str, cluster: Mapping[str, Any], *, json_output: bool) -> None:
    from phlora_pipeline import zoofile

    config = zoofile.load(zoo)
    with loading():
        from phlora_pipeline.zoo import forecast
    made = forecast.forecast(config, forecast.Cluster(**cluster))
    render.json_object(made.as_dict()) if json_output else render.show_forecast(made)


def verify(
    base: Base,
    tuned: Tuned,
    adapter: Annotated[str, typer.Option("--adapter", metavar="URL", help="The adapter's folder.")],
    dialect: Annotated[
        Dialect | None,
        typer.Option(
            "--for", show_default=False, help="Whose loaders it is held to. Default: whom it was written for."
        ),
    ] = None,
    device: Annotated[str, typer.Option("--device", help="cpu, cuda or cuda:N.")] = "cpu",
    logits: Annotated[
        bool,
        typer.Option(
            "--logits", help="Also run base, base with adapter, and fine-tune (transformers and peft needed)."
        ),
    ] = False,
    prompt: Annotated[
        list[str] | None,
        typer.Option("--prompt", metavar="TEXT", help="For --logits; may be repeated. Default: random tokens."),
    ] = None,
    json_output: Json = False,
) -> None:
    """Measure from its bytes what an adapter keeps of the update, and check its keys. Exit 13 when anything is off."""
    if prompt and not logits:
        raise typer.BadParameter("--prompt is for --logits")
    with loading():
        from phlora_pipeline import logits as comparison
        from phlora_pipeline import verify as verification
    found = verification.verify(base, tuned, adapter, dialect=dialect.value if dialect else None, device=device)
    agreement = comparison.compare(base, tuned, adapter, prompt or (), device=device) if logits else None
    record = {
        "passed": found.passed,
        "written_energy": found.written_energy,
        "problems": found.problems,
        "modules": [asdict(check) for check in found.modules],
        **({"logits": asdict(agreement)} if agreement else {}),
    }
    render.json_object(record) if json_output else render.show_verification(found, agreement)
    if not found.passed:
        raise typer.Exit(13)


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
    with loading():
        from phlora_pipeline import calibrate as calibration
    found = calibration.measure(device, threads or default_threads(), name)
    calibration.write(found, out)
    render.json_object(asdict(found)) if json_output else render.show_profile(asdict(found), out)
