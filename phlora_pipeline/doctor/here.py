"""The machine at hand: versions, device, memory, disk, descriptors. What is judged is an argument, what is looked at is the machine's."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import resource
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator

from phlora_pipeline.doctor.finding import Finding, Worry, examined
from phlora_pipeline.errors import RequestError, StorageError
from phlora_pipeline.extract import checked_device
from phlora_pipeline.machine import available_memory, processors
from phlora_pipeline.summary import size

PACKAGE = "phlora-pipeline"
OF_CONCERN = (PACKAGE, "s3fs", "aiobotocore", "boto3")
"""Whose requirements are looked at: s3fs, aiobotocore and boto3 fit each other in one botocore only."""

SHOWN = ("torch", "ray", "boto3", "s3fs", "pyarrow")
LITTLE_MEMORY = 2 << 30
FULL = 0.95
"""Of a disk: Ray's own threshold, from which on it gives a node no more work."""

LITTLE_ROOM = 1 << 30
FEW_DESCRIPTORS = 1024

_INSTALL = "install it from constraints.txt: pip install -c constraints.txt phlora-pipeline"


def of_machine(*, device: str | None) -> Iterator[Finding]:
    """All of it.

    Args:
        device: as the zoo.yaml has it; None where other machines do the work.
    """
    yield examined("versions", _versions)
    if device is not None:
        yield examined("device", lambda: _device(device))
        yield examined("memory", _memory)
    yield examined("disk", lambda: room(os.environ.get("RAY_TMPDIR") or tempfile.gettempdir()))
    yield examined("descriptors", lambda: descriptors(resource.getrlimit(resource.RLIMIT_NOFILE)[0]))


def unmet(requirements: Iterable[str], version_of: Callable[[str], str | None]) -> list[str]:
    """What is required and not there in such a version, each in words; what is required only by an extra does not count.

    >>> unmet(["torch<3,>=2.6", "ray>=2.50", "jinja2; extra == 'report'"], {"torch": "2.5.1"}.get)
    ['torch 2.5.1 is not <3,>=2.6', 'ray is not installed']
    """
    from packaging.requirements import Requirement

    told = []
    for text in requirements:
        wanted = Requirement(text)
        if wanted.marker is not None and not wanted.marker.evaluate({"extra": ""}):
            continue
        there = version_of(wanted.name)
        if there is None:
            told.append(f"{wanted.name} is not installed")
        elif not wanted.specifier.contains(there, prereleases=True):
            told.append(f"{wanted.name} {there} is not {wanted.specifier}")
    return told


def room(folder: str) -> str:
    """Of the disk of a folder.

    Raises:
        StorageError: it is full, or as good as full.
    """
    try:
        disk = shutil.disk_usage(folder)
    except OSError as error:
        raise StorageError(f"{folder}: {error.strerror}", remedy="set TMPDIR, or RAY_TMPDIR, to a folder that is there") from error  # fmt: skip
    told = f"{size(disk.free)} of {size(disk.total)} are free at {folder}, where Ray spills and keeps its logs"
    if disk.free < LITTLE_ROOM or disk.free < (1 - FULL) * disk.total:
        raise StorageError(told, remedy="free some space, or set TMPDIR, for Ray RAY_TMPDIR, to another disk")
    return told


def descriptors(allowed: int) -> str | Worry:
    """Of so many files that may be open at once."""
    told = f"{'any number of' if allowed == resource.RLIM_INFINITY else allowed} files may be open at once"
    if allowed != resource.RLIM_INFINITY and allowed < FEW_DESCRIPTORS:
        return Worry(told, "ulimit -n 65536: each connection takes one, and Ray some hundred")
    return told


def _versions() -> str:
    told = {name: there for name in SHOWN if (there := _version(name))}
    wrong = [
        f"{of}: {what}"
        for of in OF_CONCERN
        if _version(of)
        for what in unmet(importlib.metadata.requires(of) or (), _version)
    ]
    if wrong:
        raise RequestError("; ".join(wrong), remedy=_INSTALL)
    return f"Python {platform.python_version()}, {', '.join(f'{name} {there}' for name, there in told.items())}"


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _device(device: str) -> str | Worry:
    import torch

    found = checked_device(device)
    if found.type == "cpu":
        return f"{processors()} processors" if device == "cpu" else f"no CUDA device; {processors()} processors"
    told, least = [], None
    for number in range(torch.cuda.device_count()) if found.index is None else [found.index]:
        free, total = torch.cuda.mem_get_info(number)
        told.append(f"cuda:{number} {torch.cuda.get_device_name(number)}, {size(free)} of {size(total)} free")
        least = free if least is None else min(free, least)
    if least is not None and least < LITTLE_MEMORY:
        return Worry("; ".join(told), "see nvidia-smi: who else uses it?")
    return "; ".join(told)


def _memory() -> str | Worry:
    free = available_memory()
    if free is None:
        return "what is free is not told here"
    if free < LITTLE_MEMORY:
        return Worry(f"{size(free)} can be allocated", "give the worker more: phlora plan tells what a task needs")
    return f"{size(free)} can be allocated"
