"""Pickle → safetensors: the same tensors, and a pickle that is more than tensors does nothing at all."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from phlora_pipeline import convert as module
from phlora_pipeline.checkpoint import open_checkpoint
from phlora_pipeline.convert import convert
from phlora_pipeline.errors import CheckpointError, ConflictError, NotFoundError, RequestError
from tests import toys

STATE = {
    "a.weight": torch.arange(6.0).reshape(2, 3),
    "a.bias": torch.tensor([1.0, -0.0]).bfloat16(),
    "n": torch.tensor(3),
}


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the child's code here: a process costs three seconds. The tests of the process itself do without this."""

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        try:
            answer = module._child(command[4], command[5:])
        except CheckpointError as refusal:
            answer = {"refused": refusal.what, "remedy": refusal.remedy}
        return subprocess.CompletedProcess(command, 0, json.dumps(answer), "")

    monkeypatch.setattr(module.subprocess, "run", run)


def same(folder: Path, expected: dict[str, torch.Tensor]) -> bool:
    found = load_file(folder / "model.safetensors")
    return found.keys() == expected.keys() and all(
        value.dtype == found[name].dtype and torch.equal(value, found[name]) for name, value in expected.items()
    )


def test_a_state_dict_becomes_a_checkpoint_in_a_process_of_its_own(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    torch.save(OrderedDict(STATE), source / "pytorch_model.bin")
    (source / "config.json").write_text(json.dumps(toys.LLAMA))
    done = convert(str(source), str(tmp_path / "out"))
    assert same(tmp_path / "out", STATE)
    assert (done.tensors, done.dropped) == (3, ())
    assert done.nbytes == (tmp_path / "out" / "model.safetensors").stat().st_size
    assert open_checkpoint(str(tmp_path / "out")).model_type == "llama"
    assert sorted(os.listdir(tmp_path)) == ["out", "source"]
    assert sorted(os.listdir(tmp_path / "out")) == ["config.json", "model.safetensors"]


@pytest.mark.usefixtures("in_process")
@pytest.mark.parametrize("wrapper", ["state_dict", "model_state_dict", "model", "module"])
def test_a_wrapped_state_dict_is_found_and_what_lies_beside_it_told(tmp_path: Path, wrapper: str) -> None:
    torch.save({wrapper: STATE, "epoch": 3, "optimizer": {"state": {0: torch.ones(2)}}}, tmp_path / "last.ckpt")
    done = convert(str(tmp_path / "last.ckpt"), str(tmp_path / "out"))
    assert same(tmp_path / "out", STATE)
    assert done.dropped == ("epoch", "optimizer")


@pytest.mark.usefixtures("in_process")
def test_two_wrappings_are_opened_and_three_are_not(tmp_path: Path) -> None:
    torch.save({"model": {"state_dict": STATE}}, tmp_path / "two.pt")
    assert convert(str(tmp_path / "two.pt"), str(tmp_path / "out")).tensors == 3
    torch.save({"model": {"model": {"state_dict": STATE}}}, tmp_path / "three.pt")
    with pytest.raises(CheckpointError, match="wrapped more than twice"):
        convert(str(tmp_path / "three.pt"), str(tmp_path / "out3"))


@pytest.mark.usefixtures("in_process")
def test_entries_that_are_no_tensors_are_dropped_and_told(tmp_path: Path) -> None:
    torch.save({**STATE, "version": 2, "name": "x", "nested": {"w": torch.ones(1)}, "none": None}, tmp_path / "x.pth")
    done = convert(str(tmp_path / "x.pth"), str(tmp_path / "out"))
    assert same(tmp_path / "out", STATE)
    assert done.dropped == ("name", "nested", "none", "version")


@pytest.mark.usefixtures("in_process")
def test_tied_sliced_and_transposed_tensors_are_whole(tmp_path: Path) -> None:
    weight = torch.arange(12.0).reshape(3, 4)
    state = {
        "embed.weight": weight,
        "head.weight": weight,
        "row": weight[1],
        "turned": weight.T,
        "grad": torch.nn.Parameter(weight),
    }
    torch.save(state, tmp_path / "x.bin")
    convert(str(tmp_path / "x.bin"), str(tmp_path / "out"))
    assert same(tmp_path / "out", {name: value.detach() for name, value in state.items()})


@pytest.mark.usefixtures("in_process")
def test_the_old_format_is_read_too(tmp_path: Path) -> None:
    torch.save(STATE, tmp_path / "x.bin", _use_new_zipfile_serialization=False)
    convert(str(tmp_path / "x.bin"), str(tmp_path / "out"))
    assert same(tmp_path / "out", STATE)


def sharded(folder: Path) -> dict[str, str]:
    names = {
        "a.weight": "pytorch_model-00001-of-00002.bin",
        "a.bias": "pytorch_model-00002-of-00002.bin",
        "n": "pytorch_model-00002-of-00002.bin",
    }
    for file in set(names.values()):
        torch.save({name: STATE[name] for name, shard in names.items() if shard == file}, folder / file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
    return names


@pytest.mark.usefixtures("in_process")
def test_shards_become_one_file(tmp_path: Path) -> None:
    sharded(tmp_path)
    assert convert(str(tmp_path), str(tmp_path / "out")).tensors == 3
    assert same(tmp_path / "out", STATE)


@pytest.mark.usefixtures("in_process")
def test_a_folder_can_be_converted_in_place(tmp_path: Path) -> None:
    torch.save(STATE, tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text("{}")
    convert(str(tmp_path), str(tmp_path))
    assert same(tmp_path, STATE)
    assert open_checkpoint(str(tmp_path)).tensors.keys() == STATE.keys()


class Evil:
    """Runs `call(*args)` where it is unpickled."""

    def __init__(self, call: Callable[..., object], *args: object) -> None:
        self.reduced = call, args

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return self.reduced


@pytest.mark.parametrize("how", ["system", "mkdir", "eval"])
def test_a_pickle_that_runs_code_is_refused_and_does_nothing(tmp_path: Path, how: str) -> None:
    canary = tmp_path / "canary"
    evil = {
        "system": Evil(os.system, f"touch {canary}"),
        "mkdir": Evil(os.mkdir, str(canary)),
        "eval": Evil(eval, f"__import__('os').mkdir({str(canary)!r})"),
    }[how]
    torch.save({"a": torch.ones(2), "b": evil}, tmp_path / "x.bin")
    with pytest.raises(CheckpointError, match=rf"x\.bin wants to run (\w+\.)?{how}, and was refused") as caught:
        convert(str(tmp_path / "x.bin"), str(tmp_path / "out"))
    assert "state_dict" in caught.value.remedy
    assert os.listdir(tmp_path) == ["x.bin"]
    torch.load(tmp_path / "x.bin", weights_only=False)["a"].sum()
    assert canary.exists(), "the pickle was harmless all along"


def test_the_child_holds_no_secrets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Asked of the child itself: a stand-in for the interpreter prints its environment and then fails."""
    for name in (
        "AWS_ACCESS_KEY_ID",
        "AWS_SECRET_ACCESS_KEY",
        "AWS_SESSION_TOKEN",
        "AWS_PROFILE",
        "HF_TOKEN",
        "GOOGLE_APPLICATION_CREDENTIALS",
    ):
        monkeypatch.setenv(name, "hush-hush")
    monkeypatch.setenv("HOME", "/home/hush-hush")
    stand_in = tmp_path / "python"
    stand_in.write_text(f"#!/bin/sh\nenv > {tmp_path}/seen\nexit 3\n")
    stand_in.chmod(0o755)
    monkeypatch.setattr(module.sys, "executable", str(stand_in))
    torch.save(STATE, tmp_path / "x.bin")
    with pytest.raises(CheckpointError, match="could not be converted: exit code 3"):
        convert(str(tmp_path / "x.bin"), str(tmp_path / "out"))
    seen = (tmp_path / "seen").read_text()
    assert "PATH=" in seen
    assert "hush-hush" not in seen
    assert not (tmp_path / "out").exists()


def test_code_beside_the_pickle_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Model folders come with Python files; one that is called torch.py must not be imported for being near."""
    torch.save(STATE, tmp_path / "x.bin")
    for name in ("torch", "safetensors", "json", "phlora_pipeline"):
        (tmp_path / f"{name}.py").write_text(f"open({str(tmp_path / 'canary')!r}, 'w').close()\nraise SystemExit(1)\n")
    monkeypatch.chdir(tmp_path)
    assert convert("x.bin", "out").tensors == 3
    assert not (tmp_path / "canary").exists()


@pytest.mark.usefixtures("in_process")
def test_what_stands_is_not_overwritten(tmp_path: Path) -> None:
    torch.save(STATE, tmp_path / "pytorch_model.bin")
    out = toys.save(tmp_path / "out", {"other": torch.ones(1)})
    with pytest.raises(ConflictError, match=r"model\.safetensors is there already"):
        convert(str(tmp_path), str(out))
    assert same(out, {"other": torch.ones(1)})
    (out / "model.safetensors").unlink()
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConflictError, match=r"config\.json is there already"):
        convert(str(tmp_path), str(out))
    assert os.listdir(out) == ["config.json"]
    assert json.loads((out / "config.json").read_text()) == toys.LLAMA


@pytest.mark.parametrize("url", ["s3://zoo/m/pytorch_model.bin", "hf://org/m", "memory://m"])
def test_places_elsewhere_are_refused(tmp_path: Path, url: str) -> None:
    torch.save(STATE, tmp_path / "x.bin")
    for source, out in ((url, str(tmp_path / "out")), (str(tmp_path / "x.bin"), url)):
        with pytest.raises(RequestError, match="local folders only"):
            convert(source, out)
    assert os.listdir(tmp_path) == ["x.bin"]


def _index(text: str) -> Callable[[Path], object]:
    return lambda folder: (folder / "pytorch_model.bin.index.json").write_text(text)


def _bin(content: object) -> Callable[[Path], object]:
    return lambda folder: torch.save(content, folder / "pytorch_model.bin")


def _raw(content: bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / "pytorch_model.bin").write_bytes(content)


def _twice(folder: Path) -> None:
    sharded(folder)
    torch.save(STATE, folder / "pytorch_model-00002-of-00002.bin")


def _missing(folder: Path) -> None:
    sharded(folder)
    (folder / "pytorch_model-00002-of-00002.bin").unlink()


WRONG: dict[str, tuple[Callable[[Path], object], str]] = {
    "nothing there": (lambda _: None, "no pickled checkpoint"),
    "empty": (_raw(b""), "cannot be unpickled: EOFError: it ends too early"),
    "HTML": (_raw(b"<html></html>"), "cannot be unpickled"),
    "plain pickle": (_raw(pickle.dumps({"a": 1}, protocol=2)), "cannot be unpickled"),
    "zip cut short": (_raw(b"PK\x03\x04" + bytes(50)), "cannot be unpickled"),
    "a list": (_bin([torch.ones(2)]), "holds a list, not a state dict"),
    "a tensor": (_bin(torch.ones(2)), "holds a Tensor, not a state dict"),
    "no tensors": (_bin({"a": 1}), "holds no tensors"),
    "index not JSON": (_index("{"), "not an index of shards"),
    "index a list": (_index("[]"), "not an index of shards"),
    "index without map": (_index("{}"), "not an index of shards"),
    "index with numbers": (_index('{"weight_map": {"a": 1, "b": "x"}}'), "not an index of shards"),
    "index empty": (_index('{"weight_map": {}}'), "is empty"),
    "index above": (_index('{"weight_map": {"a": "../x.bin"}}'), "no shard that lies in its own folder as '../x.bin'"),
    "index two dots": (_index('{"weight_map": {"a": ".."}}'), "no shard that lies in its own folder as '..'"),
    "index absolute": (_index('{"weight_map": {"a": "/etc/passwd"}}'), "no shard that lies in its own folder"),
    "shard missing": (_missing, "no shard that lies in its own folder as 'pytorch_model-00002"),
    "tensor in two shards": (_twice, "again"),
}


@pytest.mark.usefixtures("in_process")
@pytest.mark.filterwarnings(
    "ignore:Detected pickle protocol"
)  # torch's word on one of the inputs; the child says it to nobody
@pytest.mark.parametrize("name", WRONG)
def test_what_is_no_pickled_checkpoint_is_refused(tmp_path: Path, name: str) -> None:
    lay_out, told = WRONG[name]
    source = tmp_path / "source"
    source.mkdir()
    lay_out(source)
    with pytest.raises((CheckpointError, NotFoundError), match=told) as caught:
        convert(str(source), str(tmp_path / "out"))
    assert str(source) in caught.value.what
    assert caught.value.remedy
    assert "\n" not in caught.value.what
    assert os.listdir(tmp_path) == ["source"]


def test_an_unsafe_torch_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", "2.9.1+cu128")
    with pytest.raises(CheckpointError, match="CVE-2026-24747"):
        module._child(str(tmp_path / "x"), [])
