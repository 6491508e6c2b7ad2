"""The catalog: which folders are models, which base each has, and that no folder can hide another or stop the rest."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import pytest

from phlora_pipeline import checkpoint as reader
from phlora_pipeline import storage
from phlora_pipeline.errors import CredentialsError, RequestError
from phlora_pipeline.storage import ByteRange
from phlora_pipeline.zoo import folders
from phlora_pipeline.zoo.catalog import Entry, catalog
from phlora_pipeline.zoofile import loads
from tests import toys
from tests.s3_server import S3
from tests.zoo.places import checkpoint, zoo

BASES = """
bases:
  llama: {url: "s3://bases/Llama-3.1-8B", name: meta-llama/Llama-3.1-8B}
  qwen: {url: "{root}-bases/qwen3", name: Qwen/Qwen3-8B}
"""
DISCOVER = BASES + "discover: [{prefix: '{root}'}]\n"


def found(root: Path, text: str = DISCOVER) -> dict[str, Entry]:
    entries = catalog(zoo(root, text))
    assert [entry.id for entry in entries] == sorted({entry.id for entry in entries})
    return {entry.id: entry for entry in entries}


def bases(entries: Mapping[str, Entry]) -> dict[str, str]:
    return {name: entry.base_id for name, entry in entries.items()}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "ft").mkdir()
    return tmp_path / "ft"


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files whose bytes were read, as they really are read."""
    seen: list[str] = []
    real = storage.read_ranges

    def counting(ranges: list[ByteRange]) -> None:
        seen.extend(storage.basename(wanted.url) for wanted in ranges)
        real(ranges)

    monkeypatch.setattr(storage, "read_ranges", counting)
    monkeypatch.setattr("phlora_pipeline.storage.verbs.read_ranges", counting)
    return seen


class TestWhichFoldersAreModels:
    """config.json and safetensors, and no adapter; nothing else, and nothing that is something else already."""

    def test_full_checkpoints_are(self, root: Path) -> None:
        toys.save(root / "real", toys.llama_tensors(layers=1), shards=2)
        checkpoint(root / "one")
        checkpoint(root / "index-only", weights=reader.INDEX)  # its shards are still on their way
        assert set(found(root)) == {"real", "one", "index-only"}

    def test_others_are_not(self, root: Path) -> None:
        checkpoint(root / "adapter", weights="adapter_model.safetensors")
        (root / "adapter" / "adapter_config.json").write_text("{}")
        checkpoint(root / "pickle", weights="pytorch_model.bin")
        checkpoint(root / "no-config").joinpath("config.json").unlink()
        (root / "empty").mkdir()
        (root / "file").write_text("")
        assert found(root) == {}

    def test_neither_the_bases_nor_what_is_excluded(self, root: Path) -> None:
        for name in ("base", "base-as-file", "tmp-1", "tmp-2/inner", "kept"):
            checkpoint(root / name)
        text = "bases: {a: '{root}/base', b: '{root}/base-as-file/model.safetensors'}\n"
        text += "discover: [{prefix: '{root}', depth: 2, base: a, exclude: ['tmp-*']}]"
        assert set(found(root, text)) == {"kept"}

    def test_a_base_above_the_prefix_does_not_hide_what_is_below(self, root: Path) -> None:
        checkpoint(root / "a" / "m")
        text = "bases: {b: '{root}/model.safetensors', c: '{root}'}\ndiscover: [{prefix: '{root}/a', base: b}]"
        assert set(found(root, text)) == {"m"}

    @pytest.mark.parametrize(
        ("depth", "ids"), [(1, {"top"}), (2, {"top", "org--m"}), (3, {"top", "org--m", "a--b--c"})]
    )
    def test_as_deep_as_asked_but_not_inside_a_model(self, root: Path, depth: int, ids: set[str]) -> None:
        for name in ("top", "top/checkpoint-500", "org/m", "a/b/c"):
            checkpoint(root / name)
        assert set(found(root, f"{BASES}discover: [{{prefix: '{root}', depth: {depth}, base: qwen}}]")) == ids

    def test_a_prefix_that_is_not_there_is_an_error_and_an_empty_one_is_not(self, root: Path) -> None:
        with pytest.raises(RequestError, match=r"there is nothing at .*/ft/typo"):
            found(root, "discover: [{prefix: '{root}/typo'}]")
        (root / "README.md").write_text("Checkpoints will be here.")
        assert found(root) == {}


class TestBases:
    """By hand, by rule, for all, from config.json, from the card: in this order."""

    def test_each_way_gives_way_to_the_one_before(self, root: Path) -> None:
        for name in ("hand", "rule-x", "plain"):
            checkpoint(root / name, origin="c", card="d")
        spec = "".join(f"  {name}: /bases/{name}\n" for name in ("hand", "rule", "all", "c", "d"))
        bases_text = f"bases:\n{spec}models: [{{url: '{root}/hand', base: hand}}]\n"
        discover = "discover: [{prefix: '{root}', rules: [{match: 'rule-*', base: rule}, {match: '*-x', base: d}]"
        entries = found(root, f"{bases_text}{discover}, base: all}}]")
        assert bases(entries) == {"hand": "hand", "rule-x": "rule", "plain": "all"}
        assert bases(found(root, f"{bases_text}{discover}}}]"))["plain"] == "c"
        checkpoint(root / "plain", origin="unknown/thing", card="d")
        assert bases(found(root, f"{bases_text}{discover}}}]"))["plain"] == "d"

    @pytest.mark.parametrize(
        "name",
        [
            "llama", "LLAMA", "meta-llama/Llama-3.1-8B", "META-LLAMA/llama-3.1-8b", "s3://bases/Llama-3.1-8B",
            "s3://bases/Llama-3.1-8B/", "/home/me/Llama-3.1-8B", "other-org/Llama-3.1-8B", " llama ",
            "/root/.cache/huggingface/hub/models--meta-llama--Llama-3.1-8B/snapshots/0e9e39f249a1",
        ],
    )  # fmt: skip
    def test_ids_names_and_urls_are_known_whole_or_by_their_last_component(self, root: Path, name: str) -> None:
        checkpoint(root / "by-config", origin=name)
        checkpoint(root / "by-card", card=name)
        checkpoint(root / "by-list", card=["someone/else", name])
        entries = found(root)
        assert bases(entries) == {"by-config": "llama", "by-card": "llama", "by-list": "llama"}
        for entry in entries.values():
            assert (entry.base_url, entry.base_name, entry.problem) == (
                "s3://bases/Llama-3.1-8B",
                "meta-llama/Llama-3.1-8B",
                "",
            )

    @pytest.mark.parametrize("name", ["llama-2", "Llama-3.1", "3.1-8B", "Qwen/Qwen3-8B-Base", "/", "..", "x" * 5000])
    def test_what_is_alike_is_not_the_same(self, root: Path, name: str) -> None:
        checkpoint(root / "m", origin=name)
        [entry] = found(root).values()
        assert (entry.base_id, entry.base_url) == ("", "")
        assert entry.problem.startswith("no base found: its config.json names ")
        assert "bases: 'llama', 'qwen'" in entry.problem
        assert len(entry.problem) < 500

    def test_two_that_may_be_meant_are_none_unless_one_is_named_whole(self, root: Path) -> None:
        text = "bases: {a: /one/llama, b: /two/llama}\ndiscover: [{prefix: '{root}'}]"
        checkpoint(root / "either", origin="x/llama", card="/one/llama")
        checkpoint(root / "whole", origin="/two/llama")
        checkpoint(root / "merged", card=["a", "b"])
        entries = found(root, text)
        assert bases(entries) == {"either": "", "whole": "b", "merged": ""}
        assert "its config.json names 'x/llama', which may be a or b" in entries["either"].problem
        assert "its README.md names 'a', 'b', which may be a or b" in entries["merged"].problem

    def test_only_what_is_needed_is_read(self, root: Path, reads: list[str]) -> None:
        checkpoint(root / "given", origin="qwen", card="qwen")
        found(root, BASES + "discover: [{prefix: '{root}', base: qwen}]\nmodels: [{url: s3://nowhere/x, base: llama}]")
        assert reads == []
        found(root)
        assert reads == ["config.json"]

    def test_a_long_card_is_read_at_its_head_only(self, root: Path) -> None:
        card = checkpoint(root / "m", card="qwen") / "README.md"
        with card.open("ab") as file:
            file.truncate(5 << 30)
        assert bases(found(root)) == {"m": "qwen"}

    def test_a_model_is_not_its_own_base(self, root: Path) -> None:
        text = "bases: {b: /b}\nmodels: [{url: /b, base: b}, {url: /b/ft, base: b}]"
        assert {name: bool(entry.problem) for name, entry in found(root, text).items()} == {"b": True, "ft": False}

    def test_a_place_without_anything_is_told_as_that(self, root: Path) -> None:
        [entry] = found(root, BASES + "models: [{url: '{root}/nowhere'}]").values()
        assert entry.problem.startswith(f"there is nothing at {root}/nowhere")

    def test_a_model_given_as_a_file_has_its_config_beside(self, root: Path) -> None:
        checkpoint(root / "m", origin="qwen")
        entries = found(root, DISCOVER + "models: [{id: mine, url: '{root}/m/model.safetensors'}]")
        assert bases(entries) == {"mine": "qwen"}


class TestSettings:
    """Every entry carries all of its settings."""

    def test_overrides_match_discovered_ids_too(self, root: Path) -> None:
        for name in ("support-a", "b"):
            checkpoint(root / name)
        text = (
            BASES
            + "discover: [{prefix: '{root}', base: qwen}]\noverrides: [{match: 'support-*', extract: {rank: 64}}]\n"
        )
        entries = found(root, text + "models: [{url: /x/c, base: qwen, extract: {rank: 8}}]")
        assert {name: entry.settings.rank for name, entry in entries.items()} == {"support-a": 64, "b": 32, "c": 8}

    def test_settings_that_do_not_fit_are_that_models_problem(self, root: Path) -> None:
        for name in ("ab", "b"):
            checkpoint(root / name)
        text = "overrides: [{match: 'a*', extract: {max_rank: 40}}, {match: '*b', extract: {rank: 64}}]\n"
        entries = found(root, BASES + text + "discover: [{prefix: '{root}', base: qwen}]")
        assert "max_rank must be between rank (64) and 512, got 40" in entries["ab"].problem
        assert entries["b"].problem == ""


class TestOneBadFolder:
    """One folder's fault is one entry's problem; the storage's fault is nobody's."""

    @pytest.mark.parametrize(
        "name", ["my model", "<script>alert(1)</script>", "new\nline", "-rf", "é", "a" * 200, "..."]
    )
    def test_a_hostile_name_is_an_entry_that_is_not_tried(self, root: Path, name: str) -> None:
        checkpoint(root / (name.replace("/", "∕")), origin="qwen")
        checkpoint(root / "good", origin="qwen")
        entries = found(root)
        bad = entries[next(key for key in entries if key != "good")]
        assert "cannot be an id" in bad.problem
        assert "\n" not in bad.problem
        assert loads(f"output: /o\nmodels: [{{url: /x, id: {bad.id}}}]").models[0].id == bad.id
        assert entries["good"].problem == ""

    def test_a_hostile_name_can_be_given_an_id(self, root: Path) -> None:
        checkpoint(root / "my model", origin="qwen")
        assert bases(found(root, DISCOVER + "models: [{id: mine, url: '{root}/my model'}]")) == {"mine": "qwen"}

    @pytest.mark.parametrize("config", ["", "{", "[]", "[" * 10**5, '{"_name_or_path": {}}', "\0", "x" * (5 << 20)])
    def test_a_broken_config_is_told_or_says_nothing(self, root: Path, config: str) -> None:
        (checkpoint(root / "bad") / "config.json").write_text(config)
        checkpoint(root / "good", origin="qwen")
        entries = found(root)
        assert entries["bad"].problem
        assert "\n" not in entries["bad"].problem
        assert entries["good"].base_id == "qwen"

    def test_two_folders_of_one_id_are_one_entry_that_names_both(self, root: Path) -> None:
        for name in ("org--m", "org/m"):
            checkpoint(root / name)
        [entry] = found(root, BASES + "discover: [{prefix: '{root}', depth: 2, base: qwen}]").values()
        assert entry.id == "org--m"
        assert f"'{root}/org--m', '{root}/org/m'" in entry.problem
        assert entry.base_id == ""

    def test_what_is_listed_by_hand_is_not_found_again(self, root: Path) -> None:
        checkpoint(root / "m", origin="qwen")
        (root.parent / "link").symlink_to(root)
        text = f"models: [{{url: '{root.parent}/link/m', id: other, base: llama}}]\n"
        overlapping = BASES + text + "discover: [{prefix: '{root}'}, {prefix: '{root}'}]"
        assert bases(found(root, overlapping)) == {"other": "llama"}

    def test_what_two_places_have_is_one_model(self, root: Path) -> None:
        checkpoint(root / "org" / "m", origin="qwen")
        text = BASES + "discover: [{prefix: '{root}', depth: 2}, {prefix: '{root}/org'}]"
        assert bases(found(root, text)) == {"org--m": "qwen"}

    @pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
    def test_a_folder_without_permission_is_named(self, root: Path) -> None:
        checkpoint(root / "shut").chmod(0)
        try:
            assert "no permission" in found(root)["shut"].problem
        finally:
            (root / "shut").chmod(0o700)

    def test_a_folder_that_cannot_be_listed_is_named(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """As above, for those who may read everything."""
        checkpoint(root / "good", origin="qwen")
        (root / "shut").mkdir()
        real = storage.list_folder

        def refusing(url: str) -> object:
            if url.endswith("/shut"):
                raise RequestError("no permission", remedy="ask")
            return real(url)

        monkeypatch.setattr(storage, "list_folder", refusing)
        entries = found(root)
        assert entries["shut"].problem == "no permission (ask)"
        assert entries["good"].problem == ""

    def test_a_folder_that_changes_meanwhile_is_named(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        checkpoint(root / "m", origin="qwen")
        listed = folders.look(str(root / "m"))
        time.sleep(0.01)
        checkpoint(root / "m", origin="llama")
        monkeypatch.setattr(folders, "look", lambda url, components=1: listed)
        assert "no longer what was planned" in found(root)["m"].problem


def test_it_waits_for_no_tensors_library_and_no_client() -> None:
    script = "import sys; from phlora_pipeline.zoo import catalog, init; print(*{name.partition('.')[0] for name in sys.modules})"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert not set(done.stdout.split()) & {"torch", "numpy", "pyarrow", "ray", "fsspec", "boto3"}


def test_two_thousand_folders_take_seconds(root: Path) -> None:
    for number in range(2000):
        checkpoint(root / f"m{number:04}", origin=["qwen", "meta-llama/Llama-3.1-8B"][number % 2])
    began = time.monotonic()
    entries = found(root)
    assert time.monotonic() - began < 10
    assert len(entries) == 2000
    assert sum(entry.base_id == "llama" for entry in entries.values()) == 1000


@pytest.mark.s3
class TestS3:
    """The same from a bucket, where folders are only prefixes."""

    def test_a_bucket_is_a_folder_like_any(self, s3: S3, root: Path) -> None:
        for name, more in {
            "a": {"origin": "qwen"},
            "org/b": {"card": "Qwen/Qwen3-8B"},
            "c": {"origin": "none"},
        }.items():
            s3.upload_folder(checkpoint(root / name, **more), f"ft/{name}")  # type: ignore[arg-type]
        s3.put("ft/adapter/adapter_config.json", b"{}")
        s3.put("ft/adapter/adapter_model.safetensors", b"")
        s3.put("ft/empty/", b"")
        text = DISCOVER.replace("prefix: '{root}'", f"prefix: '{s3.url('ft')}/', depth: 2")
        entries = found(root, text)
        assert bases(entries) == {"a": "qwen", "org--b": "qwen", "c": ""}
        assert entries["org--b"].url == s3.url("ft/org/b")
        s3a = found(root, text.replace("s3://zoo", "s3a://zoo"))
        assert bases(s3a) == bases(entries)

    def test_a_prefix_or_bucket_that_is_not_there(self, s3: S3, root: Path) -> None:
        for prefix in (s3.url("typo"), "s3://no-such-bucket/ft"):
            with pytest.raises(RequestError, match=r"there is (nothing at|no bucket)"):
                found(root, f"discover: [{{prefix: '{prefix}'}}]")

    def test_wrong_credentials_are_no_models_problem(self, s3: S3, root: Path) -> None:
        s3.upload_folder(checkpoint(root / "a"), "ft/a")
        s3.use(("admin-key", "wrong"))
        with pytest.raises(CredentialsError):
            found(root, f"discover: [{{prefix: '{s3.url('ft')}'}}]")
        with pytest.raises(CredentialsError):
            found(root, f"models: [{{url: '{s3.url('ft/a')}'}}]")
