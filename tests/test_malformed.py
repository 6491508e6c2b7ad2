"""Inputs that are not checkpoints: each has its own clear error, and nothing at all is written."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from pathlib import Path
from random import Random

import pytest
import safetensors
from hypothesis import given, settings
from hypothesis import strategies as st

from phlora_pipeline import pipeline
from phlora_pipeline.config import run_config
from phlora_pipeline.errors import CheckpointError, RequestError
from phlora_pipeline.extract import TaskReport
from phlora_pipeline.plan import Plan
from phlora_pipeline.safetensors_format import header_length, parse_header
from tests import malformed, toys
from tests.malformed import CANARY, CORPUS, Case


class Silent:
    """An observer that fails the test where anything is read."""

    def planned(self, plan: Plan) -> None:
        pytest.fail("a malformed checkpoint was planned")

    def task_done(self, report: TaskReport) -> None:
        pytest.fail("a malformed checkpoint was read")

    def warn(self, text: str) -> None:
        pass


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A good checkpoint."""
    return toys.save(tmp_path_factory.mktemp("good") / "base", toys.llama_tensors())


def built(case: Case, tmp_path: Path) -> tuple[Path, Path]:
    """What is to be opened, and the folder that it was laid out in."""
    folder = tmp_path / "bad"
    folder.mkdir()
    return case.build(folder) or folder, folder


def test_there_are_enough_ways_to_be_wrong() -> None:
    assert len(CORPUS) >= 150


@pytest.mark.parametrize("name", CORPUS)
def test_a_malformed_checkpoint_is_refused(name: str, tmp_path: Path, base: Path) -> None:
    case = CORPUS[name]
    bad, folder = built(case, tmp_path)
    out = tmp_path / "out"
    began = time.monotonic()
    with pytest.raises(RequestError) as caught:
        pipeline.extract(run_config(base=str(base), tuned=str(bad), out=str(out)), Silent())
    what, remedy = caught.value.what, caught.value.remedy
    assert re.search(case.told, what), what
    assert str(folder / case.file) in what
    assert remedy
    assert not re.search(r"[\n\r\0\x1b]", what + remedy)
    assert len(what) < 1000
    assert caught.value.exit_code == 2
    assert not out.exists()
    assert not (folder / CANARY).exists()
    assert time.monotonic() - began < 30


def test_the_canary_sings(tmp_path: Path) -> None:
    """The pickles of the corpus do harm where they are unpickled: otherwise their silence would prove nothing."""
    import pickle

    malformed._pickled(tmp_path, "x.bin")
    pickle.loads((tmp_path / "x.bin").read_bytes())
    assert (tmp_path / CANARY).exists()


@pytest.mark.parametrize("name", ["tensor twice", "shard above the folder", "only pytorch_model.bin", "nothing there"])
def test_a_malformed_base_is_refused_like_a_malformed_fine_tune(name: str, tmp_path: Path, base: Path) -> None:
    bad, _ = built(CORPUS[name], tmp_path)
    with pytest.raises(RequestError, match=CORPUS[name].told):
        pipeline.extract(run_config(base=str(bad), tuned=str(base), out=str(tmp_path / "out")), Silent())
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["last byte missing", "HTML", "shard with a newline"])
def test_the_command_says_it_in_two_lines(name: str, tmp_path: Path, base: Path) -> None:
    bad, _ = built(CORPUS[name], tmp_path)
    command = [sys.executable, "-m", "phlora_pipeline", "extract", "--base", str(base), "--tuned", str(bad)]
    done = subprocess.run([*command, "--out", str(tmp_path / "out"), "--json"], capture_output=True, text=True)
    assert done.returncode == 2
    error, fix = done.stderr.splitlines()
    assert re.match(f"error: .*{CORPUS[name].told}", error)
    assert fix.startswith("  fix: ")
    told = json.loads(done.stdout)
    assert told == {"error": error.removeprefix("error: "), "remedy": fix.removeprefix("  fix: "), "exit_code": 2}
    assert not (tmp_path / "out").exists()


VALID = (
    b'{"__metadata__":{"format":"pt"},"a":{"dtype":"F32","shape":[2,3],"data_offsets":[0,24]},'
    b'"b":{"dtype":"U8","shape":[],"data_offsets":[24,25]},"c":{"dtype":"F4","shape":[4,0],"data_offsets":[25,25]},'
    b'"d":{"dtype":"BOOL","shape":[1,1],"data_offsets":[25,26]}}'
)
DATA = bytes(26)
TOKENS = re.findall(rb'"[^"]*"|\d+|[{}\[\],:]', VALID)
NUMBERS = [
    b"-0", b"0", b"00", b"1", b"1e0", b"2.0", b"-1", b"2", b"3", b"6", b"24", b"25", b"26", b"true", b"null", b"NaN", b"[]", b"2,3", b"0,2",
    b"4611686018427387904", b"9223372036854775808", b"18446744073709551615", b"18446744073709551616",
]  # fmt: skip
STRINGS = [
    b'"a"', b'"b"', b'"\\u0061"', b'"\\ud800"', b'"\\ud83d\\ude00"', b'"\\u0000"', b'"\0"', b'"\xff"', b'"\xc3\xa9"', b'"__metadata__"',
    b'"dtype"', b'"shape"', b'"data_offsets"', b'"F32"', b'"I32"', b'"F4"', b'"U8"', b'"BOOL"', b'"F99"', b'"\\x"', b"'a'", b"1", b"null",
]  # fmt: skip
OTHERS = [
    b"{",
    b"}",
    b"[",
    b"]",
    b",",
    b":",
    b" ",
    b"\n",
    b"\0",
    b"\xef\xbb\xbf",
    b'"x":1,',
    b"{},",
    b"-0",
    b'"a"',
    b"",
]


def mutant(random: Random) -> bytes:
    """The valid file with a few of its header's tokens changed, most of them for others of their kind."""
    tokens = list(TOKENS)
    for _ in range(random.choice([1, 1, 1, 2, 2, 3, 4])):
        index = random.randrange(len(tokens))
        like = NUMBERS if tokens[index].isdigit() else STRINGS if tokens[index].startswith(b'"') else OTHERS
        tokens[index : index + random.choice([1] * 8 + [0, 2])] = [random.choice([*like, *like, *OTHERS])]
    header = b"".join(tokens)
    lie, tail = random.choice([0] * 40 + [-1, 1, 8]), random.choice([0] * 40 + [-1, 1])
    return malformed.safetensors_file(header, bytes(len(DATA) + tail), length=max(len(header) + lie, 0))


def accepted(file: bytes) -> dict[str, tuple[str, tuple[int, ...], bytes]] | None:
    """What our parser makes of a file; None where it refuses it, in the only way that it may."""
    try:
        length = header_length(file[:512], len(file), "x")
        header = parse_header(file[8 : 8 + length], len(file), "x")
    except CheckpointError:
        return None
    return {name: (entry.dtype, entry.shape, file[entry.start : entry.stop]) for name, entry in header.entries.items()}


def agrees(file: bytes) -> bool:
    """Whether we accept a file; what we accept must mean to the reference library exactly what it means to us."""
    ours = accepted(file)
    if ours is None:
        return False
    reference = safetensors.deserialize(file)  # raises where the reference refuses what we accept
    theirs = {name: (entry["dtype"], tuple(entry["shape"]), bytes(entry["data"])) for name, entry in reference}
    assert theirs == ours, file
    return True


@settings(max_examples=300, deadline=None)
@given(random=st.randoms(use_true_random=False))
def test_no_mutant_surprises(random: Random) -> None:
    agrees(mutant(random))


def test_nor_do_fifty_thousand() -> None:
    random = Random(0)
    kept = sum(agrees(mutant(random)) for _ in range(50_000))
    assert 500 < kept < 5_000


def test_the_unmutated_file_is_accepted() -> None:
    assert set(accepted(malformed.safetensors_file(VALID, DATA)) or ()) == {"a", "b", "c", "d"}
