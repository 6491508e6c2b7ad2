"""A pickled checkpoint → safetensors: the one step that unpickles, explicit, and in a process of its own.

The child runs with `weights_only=True` and without the parent's secrets in its environment, so that a pickle which
breaks out of torch's restricted unpickler finds no credentials there. Local files only.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from phlora_pipeline import storage
from phlora_pipeline.errors import CheckpointError, ConflictError, NotFoundError, RequestError, one_line
from phlora_pipeline.storage.urls import scheme

_WRAPPERS = ("state_dict", "model_state_dict", "model", "module")
_INDEX = "pytorch_model.bin.index.json"
_WEIGHTS = "model.safetensors"
_SAFE_TORCH = (2, 10)
_AUTHOR = "have its author save a plain state_dict"
_KEPT_ENVIRONMENT = ("PATH", "LANG", "LC_ALL", "LD_LIBRARY_PATH", "TMPDIR", "OMP_NUM_THREADS", "SYSTEMROOT")


@dataclass(frozen=True, slots=True)
class Converted:
    """What a conversion wrote: where, how many tensors, and the entries that are none or lie outside the state dict."""

    out: str
    tensors: int
    nbytes: int
    dropped: tuple[str, ...]


def convert(source: str, out: str) -> Converted:
    """Write `out/model.safetensors` from a pickle, with `config.json` beside it where the source folder has one.

    Args:
        source: a `.bin`, `.pt`, `.pth` or `.ckpt` file, or a folder with `pytorch_model.bin` or its shards and index.
        out: a folder without `model.safetensors`.

    Raises:
        RequestError: not local, not there, not a state dict of tensors, or not loadable under `weights_only`.
    """
    for url in (source, out):
        if scheme(url) != "file":
            raise RequestError(
                f"{url}: pickles are converted from and to local folders only", remedy="fetch the file first"
            )
    source, out = storage.normalize(source), storage.normalize(out)
    files = _pickles(source)
    if storage.stat(storage.join(out, _WEIGHTS)) is not None:
        raise _standing(storage.join(out, _WEIGHTS))
    storage.require_writable(out)
    # Beside the result: the system's temporary folder may be small, or memory.
    beside = next(folder for folder in (Path(out), *Path(out).parents) if folder.is_dir())
    with tempfile.TemporaryDirectory(prefix=".phlora-convert-", dir=beside) as scratch:
        written = Path(scratch) / _WEIGHTS
        report = _in_child(files, written)
        config = Path(source) / "config.json"
        if config.is_file():
            _put(out, "config.json", config)
        _put(out, _WEIGHTS, written)
        size = written.stat().st_size
    return Converted(out, int(report["tensors"]), size, tuple(report["dropped"]))


def _put(out: str, name: str, file: Path) -> None:
    url = storage.join(out, name)
    if storage.put_new(url, lambda: _chunks(file), size=file.stat().st_size) == "different":
        raise _standing(url)


def _standing(url: str) -> ConflictError:
    return ConflictError(f"{url} is there already", remedy="choose another output folder")


def _pickles(source: str) -> list[str]:
    path = Path(source)
    if path.is_file():
        return [str(path)]
    if (path / _INDEX).is_file():
        return [str(path / name) for name in _shards(path / _INDEX)]
    if (path / "pytorch_model.bin").is_file():
        return [str(path / "pytorch_model.bin")]
    raise NotFoundError(
        f"there is no pickled checkpoint at {source}",
        remedy="give a .bin, .pt, .pth or .ckpt file, or a folder with pytorch_model.bin",
    )


def _shards(index: Path) -> list[str]:
    try:
        names = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
        there = {entry.name for entry in index.parent.iterdir() if entry.is_file()}
        absent = [name for name in names if name not in there]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{index} is not an index of shards: {one_line(error)}", remedy="download or write it again"
        ) from error
    # Names of files in the index's own folder, and nothing else: `../x` is not among them.
    if absent or not names:
        raise NotFoundError(
            f"{index} names no shard that lies in its own folder as {absent[0]!r}" if absent else f"{index} is empty",
            remedy="fetch the shard, and do not use an index that points elsewhere",
        )
    return names


def _in_child(files: list[str], written: Path) -> dict[str, Any]:
    environment = {name: value for name, value in os.environ.items() if name in _KEPT_ENVIRONMENT}
    # -P: a model folder that is the current one may hold a torch.py of its own.
    command = [sys.executable, "-P", "-m", "phlora_pipeline.convert", str(written), *files]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)  # noqa: S603  # our own module
    try:
        report = dict(json.loads(done.stdout))
    except ValueError as error:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise CheckpointError(
            f"{files[0]} could not be converted: {last[:300]}", remedy="see whether memory and disk suffice for it"
        ) from error
    if "refused" in report:
        raise CheckpointError(str(report["refused"]), remedy=str(report["remedy"]))
    return report


def _child(written: str, files: list[str]) -> dict[str, Any]:
    """What the child process does: unpickle restrictedly, flatten, save."""
    import torch
    from safetensors.torch import save_file

    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < _SAFE_TORCH:
        raise CheckpointError(
            f"torch {torch.__version__} unpickles unsafely even with weights_only (CVE-2026-24747)",
            remedy="install torch 2.10 or newer",
        )
    tensors: dict[str, torch.Tensor] = {}
    dropped: set[str] = set()
    for file in files:
        loaded, beside = _state_dict(_load(file), file)
        dropped |= beside
        for name, value in loaded.items():
            if not isinstance(value, torch.Tensor):
                dropped.add(str(name))
            elif str(name) in tensors:
                raise CheckpointError(f"{file} holds {name!r} again", remedy="fetch all shards of one version")
            else:
                # A copy: tied and sliced tensors share memory in a pickle, and must not in safetensors.
                tensors[str(name)] = value.detach().clone().contiguous()
    if not tensors:
        raise CheckpointError(f"{files[0]} holds no tensors", remedy=_AUTHOR)
    save_file(tensors, written, metadata={"format": "pt"})
    return {"tensors": len(tensors), "dropped": sorted(dropped)}


def _load(file: str) -> object:
    import torch

    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever the bytes have led the unpickler to
        text = str(error)
        wanted = re.search(r"GLOBAL (\S+)", text)
        if wanted:
            raise CheckpointError(f"{file} wants to run {wanted[1]}, and was refused", remedy=_AUTHOR) from error
        # Of torch's paragraphs, the line that says what was wrong with the bytes.
        reason = re.search(r"Unsupported .*", text)
        told = reason[0] if reason else one_line(error) or "it ends too early"
        raise CheckpointError(
            f"{file} cannot be unpickled: {type(error).__name__}: {told}",
            remedy="see whether it is whole, and a PyTorch file",
        ) from error


def _state_dict(loaded: object, file: str) -> tuple[Mapping[Any, Any], set[str]]:
    """The mapping from names to tensors, where training code has wrapped it, and what lay beside it."""
    beside: set[str] = set()
    for _ in range(3):
        if not isinstance(loaded, Mapping):
            raise CheckpointError(f"{file} holds a {type(loaded).__name__}, not a state dict", remedy=_AUTHOR)
        wrapper = next((key for key in _WRAPPERS if isinstance(loaded.get(key), Mapping)), None)
        if wrapper is None:
            return loaded, beside
        beside |= {str(name) for name in loaded if name != wrapper}
        loaded = loaded[wrapper]
    raise CheckpointError(f"{file} holds a state dict that is wrapped more than twice", remedy=_AUTHOR)


def _chunks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while chunk := file.read(16 << 20):
            yield chunk


if __name__ == "__main__":
    try:
        print(json.dumps(_child(sys.argv[1], sys.argv[2:])))
    except CheckpointError as refusal:
        print(json.dumps({"refused": refusal.what, "remedy": refusal.remedy}))
