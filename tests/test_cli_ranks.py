"""`--rank`, `--energy` and `--budget` on the command line: one of them, and what each tells."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from phlora_pipeline import cli
from tests import toys


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("pair")
    base = toys.llama_tensors(layers=1)
    toys.save(folder / "base", base)
    toys.save(folder / "tuned", toys.fine_tuned(base))
    return ["--base", str(folder / "base"), "--tuned", str(folder / "tuned")]


def phlora(*arguments: str) -> int:
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    return int(stop.value.code or 0)


@pytest.mark.parametrize("command", ["extract", "plan"])
@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ("--rank 8 --energy 0.9", "--rank and --energy are different ways to choose ranks"),
        ("--rank auto --budget 5MB", "--rank and --budget are different ways"),
        ("--energy 0.9 --budget 5MB", "--energy and --budget are different ways"),
        ("--rank 8,many", "rank must be a number, several such as 16,32,64, or auto; got '8,many'"),
        ("--rank 8,", "rank must be a number, several"),
        ("--rank 8,513", "rank must be between 1 and 512, got 513"),
        ("--rank 0,8", "rank must be between 1 and 512, got 0"),
        ("--budget 5M", "a budget is a size of the adapter's file, such as 200MB or 64MiB"),
        ("--budget 9B", "a budget of 9 bytes does not hold the smallest adapter"),
    ],
)
def test_what_cannot_be_is_refused_and_nothing_is_written(
    command: str, flags: str, told: str, pair: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = ["--out", str(tmp_path / "out")] if command == "extract" else []
    assert phlora(command, *pair, *out, *flags.split(), "--json") == 2
    assert told in json.loads(capsys.readouterr().out)["error"]
    assert not (tmp_path / "out").exists()


def test_several_ranks_are_told_by_plan_and_written_by_extract(
    pair: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert phlora("plan", *pair, "--rank", "8,4,8", "--for", "peft", "--dtype", "float32") == 2  # plan has no --dtype
    capsys.readouterr()
    assert phlora("plan", *pair, "--rank", "8,4,8", "--for", "peft", "--json") == 0
    planned = json.loads(capsys.readouterr().out)
    assert [one["rank"] for one in planned["adapters"]] == [4, 8]
    assert phlora("plan", *pair, "--rank", "4,8", "--for", "peft") == 0
    assert "write 2 adapters from one extraction, all cut from rank 8:" in capsys.readouterr().out
    assert phlora("extract", *pair, "--rank", "8,4", "--for", "peft", "--out", str(tmp_path / "out"), "--json") == 0
    written = json.loads(capsys.readouterr().out)["adapters"]
    for one, promised in zip(written, planned["adapters"], strict=True):
        size = (Path(one["out"]) / "adapter_model.safetensors").stat().st_size
        assert size == one["adapter_bytes"] == promised["file_bytes"]
        assert one["version"] == promised["version"]
    assert [Path(one["out"]).name for one in written] == ["r4", "r8"]


@pytest.mark.parametrize(
    ("flags", "policy"), [("--rank auto", "auto"), ("--energy 0.5", "energy"), ("--budget 30kB", "budget")]
)
@pytest.mark.parametrize("dialect", ["portable", "vllm"])
def test_one_rank_for_all_is_said_before_it_runs_and_both_sizes_after(
    flags: str, policy: str, dialect: str, pair: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert phlora("plan", *pair, *flags.split(), "--for", dialect) == 0
    assert ("has one rank for all tensors" in capsys.readouterr().out) == (dialect == "portable")
    where = ["--out", str(tmp_path / "out"), "--for", dialect]
    padded = dialect == "portable" and policy != "budget"  # which takes a rank of the servers' grid
    assert phlora("extract", *pair, *flags.split(), *where, "--json") == 0
    done = json.loads(capsys.readouterr().out)
    assert done["policy"] == policy
    assert (done["natural_bytes"] == done["adapter_bytes"]) == (not padded)
    assert len(set(done["ranks"].values())) > 1 or policy == "budget"
    assert phlora("extract", *pair, *flags.split(), *where) == 0
    told = capsys.readouterr().out
    assert ("(ranks " in told) == (len(set(done["ranks"].values())) > 1)
    assert ("zero-padded to rank" in told) == padded
    card = (tmp_path / "out" / "README.md").read_text()
    assert "Ranks were chosen to keep " in card
    assert ("zero-padded" in card) == padded
