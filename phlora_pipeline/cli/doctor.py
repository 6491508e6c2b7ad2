"""What is asked before a first night: whether everything is there that it will need."""

from __future__ import annotations

from typing import Annotated

import typer

from phlora_pipeline import render
from phlora_pipeline.cli.loading import loading
from phlora_pipeline.cli.options import Json


def doctor(
    zoo: Annotated[
        str,
        typer.Argument(metavar="[ZOO]", show_default=False, help="The zoo.yaml; left out: this machine and Ray alone."),
    ] = "",
    address: Annotated[
        str,
        typer.Option(
            "--address",
            metavar="URL",
            help="Of the dashboard that phlora submit will be given. Default: RAY_API_SERVER_ADDRESS, RAY_ADDRESS.",
        ),
    ] = "",
    json_output: Json = False,
) -> None:
    """Look at what a night needs, before the first one: each line ok, or what is wrong and what helps.

    The zoo.yaml, versions, device, memory, disk; Ray's address and version; the output: can it be listed, written once and
    not twice, swapped, cleaned; the clocks; every base, and a fine-tune of each place. Writes three small objects to
    OUTPUT/_parts/doctor/ and removes them. Exit code: of the worst, as a night would end: 2, 11, 12 or 14.

    Example: phlora doctor zoo.yaml
    """
    with loading():
        from phlora_pipeline import doctor as doctors
    findings = []
    for finding in doctors.examine(zoo, address):
        findings.append(finding)
        if not json_output:
            render.show_finding(finding)
    code = doctors.exit_code(findings)
    if json_output:
        render.json_object(render.finding_record(findings, code))
    raise typer.Exit(code)
