"""The commands of `cluster/README.md`, and how each can be held to what would take it: pure, but for kubectl's own parsing."""

from __future__ import annotations

import itertools
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import botocore.session
import typer
from botocore import xform_name
from botocore.exceptions import BotoCoreError
from botocore.model import OperationNotFoundError

from phlora_pipeline import cli
from tests.cluster.manifests import CLUSTER, OVERLAYS, ROOT, rendered

TEXT = (CLUSTER / "README.md").read_text()
UNTRIED = {"docker", "helm", "sed"}
PLACEHOLDERS = {"MODEL": "m0", "VERSION": "00ff" * 8, "NAME": "phlora-nightly-29384640", "$who": "night", "BASE": "b"}


def blocks() -> dict[str, str]:
    """Heading → its shell commands."""
    found: dict[str, str] = {}
    for part in re.split(r"^##+ ", TEXT, flags=re.MULTILINE)[1:]:
        heading = part.partition("\n")[0]
        found[heading] = "".join(re.findall(r"^```sh\n(.*?)^```$", part, re.MULTILINE | re.DOTALL))
    return {heading: block for heading, block in found.items() if block}


def commands(text: str) -> Iterator[list[str]]:
    """The words of each command: also of those that `ray exec` would run."""
    for line in text.splitlines():
        lexer = shlex.shlex(re.sub(r"^ *(for .*; do|done)$", "", line), posix=True, punctuation_chars="&")
        lexer.whitespace_split = True
        for ampersands, group in itertools.groupby(lexer, "&&".__eq__):
            words = list(itertools.dropwhile(re.compile("[A-Z_]+=").match, group))
            if ampersands or words[0] in {"cd", "cp", "mkdir", "."}:
                continue
            yield words
            if words[:2] == ["ray", "exec"]:
                yield from commands(words[3])


def fault(words: list[str]) -> str:
    """What is wrong with a command; empty where nothing is."""
    program, *arguments = [_filled(word) for word in words]
    if program in UNTRIED:
        return ""
    try:
        return {"phlora": _phlora, "ray": _ray, "make": _make, "kubectl": _kubectl, "aws": _aws}[program](arguments)
    except (LookupError, BotoCoreError, OperationNotFoundError) as error:
        return repr(error)


def _filled(word: str) -> str:
    for name, value in PLACEHOLDERS.items():
        word = re.sub(rf"(?<![A-Z_]){re.escape(name)}(?![A-Z_=])", value, word)
    return word


def _phlora(arguments: list[str]) -> str:
    if ">" in arguments:
        arguments = arguments[: arguments.index(">")]
    return _parsed(typer.main.get_command(cli.app), arguments)


def _ray(arguments: list[str]) -> str:
    from ray.scripts.scripts import cli as group

    if "cluster/ray-aws.yaml" in arguments and not (CLUSTER / "ray-aws.yaml").exists():
        return "there is no ray-aws.yaml"
    return _parsed(group, arguments)


def _parsed(group: Any, arguments: list[str]) -> str:
    try:
        group.commands[arguments[0]].make_context(arguments[0], arguments[1:])
    except Exception as error:  # of two libraries' usage errors
        return f"{arguments}: {error!r}"
    return ""


def _make(arguments: list[str]) -> str:
    done = subprocess.run(["make", "-n", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stderr if done.returncode else ""


def _kubectl(arguments: list[str]) -> str:
    """kubectl's own word, up to the API server, which is not there."""
    kubectl = Path(sys.executable).with_name("kubectl")
    if "-k" in arguments and Path(arguments[arguments.index("-k") + 1]).name not in OVERLAYS:
        return f"there is no such overlay: {arguments}"
    for kind, name in re.findall(r"\b(cronjob|sa|secret|generic)[/ ](phlora-\S+)", " ".join(arguments)):
        if (_KINDS[kind], name) not in _there():
            return f"there is no {kind} {name}"
    if arguments[0] == "kustomize":
        done = subprocess.run([kubectl, *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
        return done.stderr if done.returncode else ""
    command = [kubectl, "--server", "http://127.0.0.1:9", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return "" if "127.0.0.1:9" in done.stderr and "refused" in done.stderr else done.stderr or done.stdout


_KINDS = {"cronjob": "CronJob", "sa": "ServiceAccount", "secret": "Secret", "generic": "Secret"}


@cache
def _there() -> frozenset[tuple[str, str]]:
    made_by_hand = ("Secret", "phlora-credentials")
    return frozenset({made_by_hand, *((item["kind"], item["metadata"]["name"]) for item in rendered("cpu"))})


def _aws(arguments: list[str]) -> str:
    service, operation, *options = arguments
    if (service, operation) == ("s3", "rm"):
        return "" if re.fullmatch(r"s3://phlora-adapters/zoo/\S+", options[-1]) else f"{options[-1]} is not ours"
    named = operation.title().replace("-", "")
    model = botocore.session.get_session().get_service_model(service.removesuffix("api"))
    members = {xform_name(name, "-") for name in model.operation_model(named).input_shape.members}
    if strange := {option[2:] for option in options if option.startswith("--")} - members:
        return f"{operation} does not take {strange}"
    missing = [
        option
        for option in options
        if option.startswith("file://") and not (ROOT / option.removeprefix("file://")).exists()
    ]
    return f"there is no {missing}" if missing else ""
