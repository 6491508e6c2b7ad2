"""A zoo.yaml: run and submit its nights, ask how it stands, and see to its adapters."""

from __future__ import annotations

import contextlib
import os
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from phlora_pipeline import console, render
from phlora_pipeline.cli.loading import loading
from phlora_pipeline.cli.options import Json, Model, Yes, Zoo
from phlora_pipeline.cli.stopping import Stop
from phlora_pipeline.errors import PhloraError, RequestError

if TYPE_CHECKING:
    from phlora_pipeline.zoofile import ZooConfig


def init(
    url: Annotated[str, typer.Argument(metavar="URL", help="A place with checkpoints: a folder or prefix.")],
    json_output: Json = False,
) -> None:
    """Write a first zoo.yaml for a place full of checkpoints, with what was found and what was guessed, on stdout.

    Example: phlora init s3://models/finetunes > zoo.yaml
    """
    with loading():
        from phlora_pipeline.zoo import init as first
    text = first.init(url)
    render.json_object({"zoo": text}) if json_output else sys.stdout.write(text)


def run(zoo: Zoo, yes: Yes = False, json_output: Json = False) -> None:
    """Convert what is new in a zoo, in front of you: the nightly job. What is published already is left alone.

    With RAY_ADDRESS set and `engine: auto` it runs on that cluster. SIGTERM finishes what is in flight, and ends with 143;
    Ctrl-C, or a second SIGTERM, ends at once with 130: the next run goes on from the parts that are there. Exit 3: some
    models failed, the others are published. Its last line names its result.json and its exit code.

    Example: phlora run zoo.yaml
    """
    from phlora_pipeline.submit import last_line

    url, code = "", 0
    try:
        config = _on_its_cluster(_load(zoo))
        with loading():
            from phlora_pipeline import storage
            from phlora_pipeline.runlog import RESULT, RUNS
            from phlora_pipeline.zoo import night as nights
        aside = contextlib.redirect_stdout(sys.stderr) if json_output else contextlib.nullcontext()
        with Stop() as stop, console.night_reporter(quiet=json_output) as observer, aside:  # Ray prints what it likes
            result = nights.night(config, observer, yes=yes, stopping=stop)
        code = result.exit_code
        url = storage.join(config.output, RUNS, result.run, RESULT) if result.run else ""
        render.json_object(render.night_record(result, url)) if json_output else render.show_night(result)
    except PhloraError as error:
        url, code = error.result, error.exit_code
        render.show_error(error, as_json=json_output)
    if not json_output:
        render.line(last_line(url, code))
    raise typer.Exit(code)


def submit(
    zoo: Zoo,
    address: Annotated[
        str,
        typer.Option(
            "--address",
            metavar="URL",
            help="Of the cluster's dashboard, such as http://HEAD:8265. Default: RAY_API_SERVER_ADDRESS, RAY_ADDRESS, this machine's.",
        ),
    ] = "",
    working_dir: Annotated[
        str,
        typer.Option("--working-dir", metavar="DIR", help="Uploaded to the cluster; ZOO lies below it, or is a URL."),
    ] = ".",
    no_wait: Annotated[
        bool, typer.Option("--no-wait", help="Do not follow the job: exit 0 once it is accepted.")
    ] = False,
    yes: Yes = False,
    json_output: Json = False,
) -> None:
    """Run a night on a Ray cluster, follow its log, and end with the run's own exit code, which Ray's client would hide.

    phlora-pipeline must be installed on the cluster, in this version. Ctrl-C leaves the job alone.

    Example: phlora submit zoo.yaml --address http://head:8265
    """
    from phlora_pipeline import submit as submission

    first: list[str] = []

    def say(text: str) -> None:
        if not first:
            first.append(text.strip())
        sys.stderr.write(text)
        sys.stderr.flush()

    try:
        job = submission.submit(zoo, address=address, working_dir=working_dir, yes=yes, wait=not no_wait, say=say)
    except KeyboardInterrupt:
        if first:
            render.line(f"the job goes on: {first[0]}", sys.stderr)
        sys.exit(130)
    if json_output:
        render.json_object(asdict(job))
    else:
        render.line(f"{job.id}: {job.status}{f' ({job.reason})' if job.reason else ''}")
        if job.exit_code is not None:
            render.line(submission.last_line(job.result, job.exit_code))
    raise typer.Exit(job.exit_code or 0)


def status(zoo: Zoo, json_output: Json = False) -> None:
    """Tell where every model stands, and why: counts first. Reads listings and small files only.

    published, unchanged: done. due: new or changed, for the next run. waiting: its upload has not ended. failed: once, to
    be tried again. quarantined: failed twice. blocked: cannot be tried. gone: has adapters, but is not in the zoo any more.
    """
    config = _load(zoo)
    with loading():
        from phlora_pipeline.zoo import status as statuses
    found = statuses.status(config)
    render.json_object(found.as_dict()) if json_output else render.show_status(found)


def explain(zoo: Zoo, model: Model, json_output: Json = False) -> None:
    """Tell all about one model: its state, the cause, the next step, what happened before, and its versions.

    Example: phlora explain zoo.yaml support-bot
    """
    config = _load(zoo)
    with loading():
        from phlora_pipeline.zoo import status as statuses
    found = statuses.explain(config, model)
    render.json_object(found.as_dict()) if json_output else render.show_explanation(found)


def retry(zoo: Zoo, model: Model, json_output: Json = False) -> None:
    """Forget a model's failures, so that the next run tries it again though nothing has changed."""
    config = _load(zoo)
    with loading():
        from phlora_pipeline.zoo import catalog, state
        from phlora_pipeline.zoo.status import require_known
    known = state.Ledger.read(config.output).models
    if model not in known:
        require_known(model, {*known, *(entry.id for entry in catalog.catalog(config))})
    forgotten = state.retry(config.output, model)
    if json_output:
        render.json_object({"model": model, "forgotten": forgotten})
    else:
        told = f"{forgotten} failures are forgotten; the next phlora run tries it again"
        render.line(f"{model}: {told if forgotten else 'it had no failures'}")


def rollback(
    zoo: Zoo,
    model: Model,
    version: Annotated[
        str,
        typer.Argument(
            metavar="[VERSION]", show_default=False, help="As phlora explain shows it; its beginning is enough."
        ),
    ] = "",
    unpin: Annotated[bool, typer.Option("--unpin", help="Serve the newest version again, and those to come.")] = False,
    json_output: Json = False,
) -> None:
    """Serve an earlier version of a model, and pin it: later ones are published, but not served until --unpin.

    Examples: phlora rollback zoo.yaml support-bot 3f2a9c   phlora rollback zoo.yaml support-bot --unpin
    """
    if unpin == bool(version):
        raise RequestError("expected a VERSION or --unpin, and not both", remedy="see phlora explain for the versions")
    config = _load(zoo)
    with loading():
        from phlora_pipeline.zoo import latest
        from phlora_pipeline.zoo.status import published, require_known
    require_known(model, published(config.output))
    if unpin:
        after = latest.unpin(config.output, model)
    else:
        meant = [item.version for item in latest.versions(config.output, model) if item.version.startswith(version)]
        after = latest.rollback(config.output, model, meant[0] if len(meant) == 1 else version)
    if after is None:
        raise RequestError(f"nothing is published of {model}", remedy="see phlora explain")
    if json_output:
        render.json_object({"model": model, **asdict(after)})
    else:
        render.line(
            f"{model} serves {after.version}{', pinned' if after.pinned else ''}; servers get it by phlora pull"
        )


def pull(
    zoo: Zoo,
    to: Annotated[str, typer.Option("--to", metavar="DIR", help="A local folder; each model gets a folder in it.")],
    models: Annotated[
        list[str] | None, typer.Argument(metavar="[MODEL]...", show_default=False, help="Only these; default: all.")
    ] = None,
    json_output: Json = False,
) -> None:
    """Bring a folder up to date with the published adapters, one folder each, swapped atomically, as servers want them.

    What is there already is left alone; of a model that is gone the folder is left. Exit 3: some could not be fetched.

    Example: phlora pull zoo.yaml --to /srv/adapters
    """
    config = _load(zoo)
    with loading():
        from phlora_pipeline.zoo import pull as pulling
        from phlora_pipeline.zoo.status import published, require_known
    known = published(config.output) if models else ()
    for model in models or ():
        require_known(model, known)
    pulled = pulling.pull(config.output, to, models or ())
    if json_output:
        render.json_object({"to": to, "models": [asdict(item) for item in pulled]})
    else:
        render.show_pulled(pulled, to)
    if any(item.outcome == "failed" for item in pulled):
        raise typer.Exit(3)


def gc(
    zoo: Zoo,
    yes: Annotated[bool, typer.Option("--yes", help="Remove it; without this it is only told.")] = False,
    json_output: Json = False,
) -> None:
    """Find what may go: parts that no run goes on with, versions beyond `keep`, uploads that were never finished.

    Never anything that is served, pinned or younger than two days by the store's clock; with `run.keep_parts` no parts of
    a version that is there. Nothing is removed without --yes.
    """
    config = _load(zoo)
    with loading():
        from phlora_pipeline.zoo import gc as collecting
    found = collecting.collect(config.output, config.keep, keep_parts=config.run.keep_parts, delete=yes)
    if json_output:
        total = sum(item.bytes for item in found)
        render.json_object({"removed": yes, "bytes": total, "garbage": [asdict(item) for item in found]})
    else:
        render.show_garbage(found, deleted=yes)


def _load(zoo: str) -> ZooConfig:
    from phlora_pipeline import zoofile

    return zoofile.load(zoo)


def _on_its_cluster(config: ZooConfig) -> ZooConfig:
    """`auto` is Ray where there is a cluster to join: a job of it would otherwise use one node alone."""
    if config.run.engine == "auto" and os.environ.get("RAY_ADDRESS"):
        return config.model_copy(update={"run": config.run.model_copy(update={"engine": "ray"})})
    return config
