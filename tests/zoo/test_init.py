"""`phlora init`: what it proposes loads, and catalogs to what it found."""

from __future__ import annotations

from pathlib import Path

import pytest

from phlora_pipeline.errors import RequestError
from phlora_pipeline.zoo.catalog import catalog
from phlora_pipeline.zoo.init import grouped, init
from phlora_pipeline.zoofile import ExtractSettings, Limits, ZooConfig, loads, within
from tests.s3_server import S3
from tests.zoo.places import checkpoint

LLAMA = "meta-llama/Llama-3.1-8B"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Five of Llama (one of them a second generation), two of Qwen which lies among them, one that says nothing."""
    root = tmp_path / "ft"
    for number in range(3):
        checkpoint(root / f"support-{number}", origin=LLAMA)
    checkpoint(root / "by-card", card=[LLAMA])
    checkpoint(root / "second-generation", origin="/home/me/support-0")
    checkpoint(root / "Qwen3-8B", origin="Qwen/Qwen3-8B")
    checkpoint(root / "mail-a", origin="Qwen/Qwen3-8B")
    checkpoint(root / "mail-b", origin="/data/qwen3-8b/")
    checkpoint(root / "silent")
    (root / "notes").mkdir()
    return root


def proposed(root: Path | str) -> ZooConfig:
    return loads(init(str(root)))


def test_what_it_writes_catalogs_to_what_it_found(root: Path) -> None:
    zoo = proposed(root)
    assert {key: (base.url, base.name) for key, base in zoo.bases.items()} == {
        "Llama-3.1-8B": (f"hf://{LLAMA}", LLAMA),
        "Qwen3-8B": (f"{root}/Qwen3-8B", "Qwen/Qwen3-8B"),
    }
    assert {entry.id: entry.base_id for entry in catalog(zoo)} == {
        **{f"support-{number}": "Llama-3.1-8B" for number in range(3)},
        "by-card": "Llama-3.1-8B",
        "second-generation": "Llama-3.1-8B",
        "mail-a": "Qwen3-8B",
        "mail-b": "Qwen3-8B",
        "silent": "Llama-3.1-8B",  # the base of the most others, and marked as a guess
    }
    assert not any(entry.problem for entry in catalog(zoo))


def test_the_output_lies_beside(root: Path) -> None:
    zoo = proposed(root)
    assert zoo.output == f"{root}-adapters"
    assert not within(zoo.output, str(root))
    assert not within(str(root), zoo.output)


def test_guesses_are_marked_and_counted(root: Path) -> None:
    text = init(str(root))
    assert f"8 fine-tunes below {root}" in text
    assert "# 5 fine-tunes: 'by-card', 'second-generation', 'support-0', 'support-1', 'support-2'" in text
    assert "# 1 do not say what they come from: 'silent'" in text
    assert "{match: second-generation, base: Llama-3.1-8B}" in text  # its config.json names another fine-tune
    marked = [line.partition("#")[0].strip() for line in text.splitlines() if "# <-" in line]
    assert marked == [f"output: {root}-adapters", f"Llama-3.1-8B: {{url: hf://{LLAMA}, name: {LLAMA}}}", "rules:"]


def test_the_settings_that_it_spells_out_are_the_defaults(root: Path) -> None:
    zoo, least = proposed(root), loads("output: /out")
    assert (zoo.run, zoo.limits, zoo.keep, zoo.overrides) == (least.run, least.limits, least.keep, ())
    assert {name: getattr(zoo.extract, name) for name in ExtractSettings.model_fields} == {
        name: getattr(least.extract, name) for name in ExtractSettings.model_fields
    }
    assert zoo.limits == Limits()


def test_every_key_of_the_file_is_in_it(root: Path) -> None:
    text = init(str(root))
    assert [key for key in ZooConfig.model_fields if f"\n{key}:" not in text] == ["models"]


def test_it_looks_as_deep_as_it_must(tmp_path: Path) -> None:
    checkpoint(tmp_path / "zoo" / "team" / "org" / "m", origin=LLAMA)
    zoo = proposed(tmp_path / "zoo")
    assert zoo.discover[0].depth == 3
    assert [entry.id for entry in catalog(zoo)] == ["team--org--m"]


def test_where_nothing_names_a_base_it_still_loads_and_says_so(tmp_path: Path) -> None:
    for name in ("a", "b"):
        checkpoint(tmp_path / "zoo" / name)
    text = init(str(tmp_path / "zoo"))
    assert loads(text).bases == {}
    assert "No file says what the base is" in text
    assert all("no base found" in entry.problem for entry in catalog(loads(text)))


@pytest.mark.parametrize("made", ["nothing", "an empty folder", "no checkpoint"])
def test_where_there_is_nothing_it_says_so(made: str, tmp_path: Path) -> None:
    place = tmp_path / "zoo"
    if made != "nothing":
        place.mkdir()
    if made == "no checkpoint":
        (place / "folder" / "deep").mkdir(parents=True)
    with pytest.raises(RequestError, match=r"there is nothing at|no checkpoints below"):
        init(str(place))


@pytest.mark.parametrize(
    "origin",
    [
        "s3://", "s3://bases", "s3://bases/llama", "https://u:hunter2hunter2@host/llama", "hf_token", "org/my-token", "../..",
        "a: b # c", "x\ny: z", "*", "&a", "${HOME}", "<script>", "null", "no", "007", "{}", "a" * 900, "org/" + "b" * 500, "é/ü",
        "/", "C:\\models\\llama", "a/b/c", "::", "'", '"', "\u2028", "\U0001f600/x",
    ],
)  # fmt: skip
def test_whatever_the_base_is_called_the_text_loads(origin: str, tmp_path: Path) -> None:
    checkpoint(tmp_path / "zoo" / "m", origin=origin)
    checkpoint(tmp_path / "zoo" / "n", origin=LLAMA)
    text = init(str(tmp_path / "zoo"))
    assert "hunter2" not in text
    zoo = loads(text)
    assert "Llama-3.1-8B" in zoo.bases
    assert {entry.id for entry in catalog(zoo)} >= {"n"}


@pytest.mark.parametrize("name", ["my model", "a\nkeep: 99", "{}", "*", "[a]", "x?", "'", "é", "-", "#"])
def test_whatever_the_folders_are_called_the_text_loads(name: str, tmp_path: Path) -> None:
    checkpoint(tmp_path / "zoo" / name)
    checkpoint(tmp_path / "zoo" / "n", origin=LLAMA)
    zoo = proposed(tmp_path / "zoo")
    assert zoo.keep == 3
    assert [rule.base for rule in zoo.discover[0].rules] == ["Llama-3.1-8B"]


def test_a_rule_for_one_folder_matches_no_other(tmp_path: Path) -> None:
    checkpoint(tmp_path / "zoo" / "m[ab]*")
    checkpoint(tmp_path / "zoo" / "ma", origin="other/base")
    for number in range(3):
        checkpoint(tmp_path / "zoo" / f"n{number}", origin=LLAMA)
    found = {entry.url.rpartition("/")[2]: entry.base_id for entry in catalog(proposed(tmp_path / "zoo"))}
    assert found["ma"] == "base"


class TestGrouped:
    """Pure: names in, groups out."""

    def test_a_chain_ends_at_its_root_and_a_circle_nowhere(self) -> None:
        guesses = {"v3": "v2", "v2": "v1", "v1": "org/base", "a": "b", "b": "a", "c": "a"}
        groups, orphans = grouped(guesses, dict.fromkeys(guesses, "/x"))
        assert [(group.name, group.models) for group in groups] == [("org/base", ("v1", "v2", "v3"))]
        assert orphans == ["a", "b", "c"]

    def test_every_model_is_in_one_group_or_an_orphan_or_a_base(self) -> None:
        guesses = {"m1": "o/B", "m2": "b", "B": "", "c": "", "d": "x"}
        groups, orphans = grouped(guesses, {path: f"/p/{path}" for path in guesses})
        assert [(group.name, group.place, group.models) for group in groups] == [
            ("o/B", "/p/B", ("m1", "m2")),
            ("x", "", ("d",)),
        ]
        assert orphans == ["c"]


@pytest.mark.s3
def test_from_a_bucket(s3: S3, root: Path) -> None:
    for name in ("support-0", "by-card", "mail-a", "Qwen3-8B"):
        s3.upload_folder(root / name, f"ft/{name}")
    zoo = proposed(s3.url("ft") + "/")
    assert zoo.output == s3.url("ft-adapters")
    assert zoo.bases["Qwen3-8B"].url == s3.url("ft/Qwen3-8B")
    assert {entry.id: entry.base_id for entry in catalog(zoo)} == {
        "support-0": "Llama-3.1-8B", "by-card": "Llama-3.1-8B", "mail-a": "Qwen3-8B",
    }  # fmt: skip
