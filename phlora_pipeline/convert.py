"""A pickled checkpoint → safetensors: the one step that unpickles, explicit, and in a process of its own.

The child runs with `weights_only=True` and without the parent's secrets in its environment, so that a pickle which
breaks out of torch's restricted unpickler finds no credentials there. Local files only.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from phlora_pipeline import storage
from phlora_pipeline.errors import CheckpointError, ConflictError, NotFoundError, RequestError
from phlora_pipeline.storage.urls import scheme

_WRAPPERS = ("state_dict", "model_state_dict", "model", "module")
_INDEX = "pytorch_model.bin.index.json"
_SAFE_TORCH = (2, 10)
_KEPT_ENVIRONMENT = ("PATH", "LANG", "LC_ALL", "LD_LIBRARY_PATH", "TMPDIR", "OMP_NUM_THREADS", "SYSTEMROOT")


@dataclass(frozen=True, slots=True)
class Converted:
    """What a conversion wrote: where, how many tensors, and the entries that were no tensors."""

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
    target = Path(out)
    if (target / "model.safetensors").exists():
        raise ConflictError(f"{target / 'model.safetensors'} is there already", remedy="choose another output folder")
    storage.require_writable(out)
    with tempfile.TemporaryDirectory(prefix="phlora-convert-") as scratch:
        written = Path(scratch) / "model.safetensors"
        report = _in_child(files, written)
        target.mkdir(parents=True, exist_ok=True)
        config = Path(source) / "config.json"
        if Path(source).is_dir() and config.exists():
            shutil.copyfile(config, target / "config.json")
        size = written.stat().st_size
        outcome = storage.put_new(str(target / "model.safetensors"), lambda: _chunks(written), size=size)
    if outcome == "different":
        raise ConflictError(
            f"{target / 'model.safetensors'} appeared meanwhile, with other content",
            remedy="choose another output folder",
        )
    return Converted(out, int(report["tensors"]), size, tuple(report["dropped"]))


def _pickles(source: str) -> list[str]:
    path = Path(source)
    if path.is_file():
        return [str(path)]
    if (path / _INDEX).is_file():
        names = sorted(set(json.loads((path / _INDEX).read_text())["weight_map"].values()))
        unsafe = [name for name in names if Path(name).name != name]
        if unsafe:
            raise CheckpointError(
                f"{path / _INDEX} names {unsafe[0]!r}, which is not a plain file name in its own folder"
            )
        return [str(path / name) for name in names]
    if (path / "pytorch_model.bin").is_file():
        return [str(path / "pytorch_model.bin")]
    raise NotFoundError(
        f"there is no pickled checkpoint at {source}",
        remedy="give a .bin, .pt, .pth or .ckpt file, or a folder with pytorch_model.bin",
    )


def _in_child(files: list[str], written: Path) -> dict[str, Any]:
    environment = {name: value for name, value in os.environ.items() if name in _KEPT_ENVIRONMENT}
    command = [sys.executable, "-m", "phlora_pipeline.convert", str(written), *files]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)  # noqa: S603  # our own module
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise CheckpointError(
            f"{files[0]} could not be unpickled safely: {last[:300]}",
            remedy="it holds more than tensors: have its author save a state_dict",
        )
    return dict(json.loads(done.stdout))


def _child(written: str, files: list[str]) -> None:
    """What the child process does: unpickle restrictedly, flatten, save."""
    from safetensors.torch import save_file

    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < _SAFE_TORCH:
        raise SystemExit(
            f"torch {torch.__version__} unpickles unsafely even with weights_only (CVE-2026-24747); convert needs 2.10 or newer"
        )
    tensors: dict[str, torch.Tensor] = {}
    dropped: list[str] = []
    for file in files:
        loaded = _state_dict(torch.load(file, map_location="cpu", weights_only=True))
        for name, value in loaded.items():
            if isinstance(value, torch.Tensor):
                # A copy: tied and sliced tensors share memory in a pickle, and must not in safetensors.
                tensors[name] = value.detach().clone().contiguous()
            else:
                dropped.append(name)
    if not tensors:
        raise SystemExit("it holds no tensors")
    save_file(tensors, written, metadata={"format": "pt"})
    print(json.dumps({"tensors": len(tensors), "dropped": sorted(dropped)}))


def _state_dict(loaded: object) -> Mapping[str, Any]:
    """The mapping from names to tensors, where training code has wrapped it once."""
    for _ in range(2):
        if not isinstance(loaded, Mapping):
            raise SystemExit(f"it holds a {type(loaded).__name__}, not a state dict")
        inner = next((loaded[key] for key in _WRAPPERS if isinstance(loaded.get(key), Mapping)), None)
        if inner is None:
            return {str(name): value for name, value in loaded.items()}
        loaded = inner
    raise SystemExit("its state dict is wrapped more than twice")


def _chunks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while chunk := file.read(16 << 20):
            yield chunk


if __name__ == "__main__":
    _child(sys.argv[1], sys.argv[2:])
