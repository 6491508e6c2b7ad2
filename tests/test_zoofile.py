"""zoo.yaml: what is taken, what is refused with its line, and how the layers of settings make one whole."""

from __future__ import annotations

import json
import os
import re
from importlib.resources import files
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from phlora_pipeline import zoofile
from phlora_pipeline.config import RunConfig
from phlora_pipeline.errors import NotFoundError, RequestError
from phlora_pipeline.zoofile import ExtractSettings, RunSettings, ZooConfig, loads, model_id, settings_for, within
from tests.s3_server import S3

FULL = """\
output: s3://bucket/adapters
bases:
  llama-8b: s3://models/llama-8b
  qwen: {url: s3://models/qwen, name: Qwen/Qwen3-8B}
models:
  - id: support-bot
    url: s3://x/support
    base: llama-8b
    extract: {rank: 64}
  - url: s3://x/org/mail-bot/
discover:
  - prefix: s3://models/finetunes
    depth: 2
    base: qwen
    rules: [{match: "*-8b-*", base: llama-8b}]
    exclude: ["tmp-*"]
overrides:
  - {match: "support-*", extract: {rank: 48, dtype: float32}}
extract: {rank: 16, energy: null, max_rank: 0, targets: all, include: [], exclude: ["*.lm_head"], carry: none, for: peft, dtype: auto, solver: auto, tolerance: 1.0e-3, profile: "", preset: null}
run: {engine: auto, device: auto, workers: 0, threads: 0, gpus_per_worker: 0.5, share_base: max, allow_partial: false, force: false, keep_parts: true}
limits: {max_models: 5, max_bytes: 0, max_minutes: 0, max_models_due: 100}
keep: 3
"""
LEAST = "output: /adapters\n"


def refused(text: str) -> str:
    with pytest.raises(RequestError) as caught:
        loads(text)
    assert caught.value.exit_code == 2
    assert caught.value.remedy
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 800
    return str(caught.value)


class TestWhatIsTaken:
    """The whole vocabulary, in its shortest and its longest forms."""

    def test_every_key(self) -> None:
        zoo = loads(FULL)
        assert zoo.output == "s3://bucket/adapters"
        assert [(key, base.url, base.name) for key, base in zoo.bases.items()] == [
            ("llama-8b", "s3://models/llama-8b", ""),
            ("qwen", "s3://models/qwen", "Qwen/Qwen3-8B"),
        ]
        assert [(model.id, model.url, model.base) for model in zoo.models] == [
            ("support-bot", "s3://x/support", "llama-8b"),
            ("mail-bot", "s3://x/org/mail-bot", ""),
        ]
        [place] = zoo.discover
        assert (place.prefix, place.depth, place.base, place.exclude) == (
            "s3://models/finetunes",
            2,
            "qwen",
            ("tmp-*",),
        )
        assert [(rule.match, rule.base) for rule in place.rules] == [("*-8b-*", "llama-8b")]
        assert (zoo.extract.rank, zoo.extract.dialect, zoo.extract.exclude) == (16, "peft", ("*.lm_head",))
        assert (zoo.run.gpus_per_worker, zoo.run.share_base, zoo.run.keep_parts) == (0.5, "max", True)
        assert (zoo.limits.max_models, zoo.limits.max_models_due, zoo.keep) == (5, 100, 3)

    def test_the_least_has_the_documented_defaults(self) -> None:
        zoo = loads(LEAST)
        assert (zoo.bases, zoo.models, zoo.discover, zoo.overrides) == ({}, (), (), ())
        assert (zoo.keep, zoo.limits.max_models_due, zoo.run.share_base, zoo.run.gpus_per_worker) == (
            3,
            100,
            "auto",
            1.0,
        )

    def test_a_key_with_nothing_behind_it_is_left_out(self) -> None:
        """A list whose lines are all commented out is nothing to YAML."""
        empty = "models:\n  # - url: s3://x\ndiscover:\nextract:\nlimits: {max_models: ~}\nkeep:\n"
        assert loads(LEAST + empty) == loads(LEAST)

    def test_it_reads_back_from_json(self) -> None:
        """The resolved form lies beside each run; layers must still be layers in it."""
        for by_alias in (True, False):
            stored = json.loads(json.dumps(loads(FULL).model_dump(mode="json", by_alias=by_alias)))
            again = ZooConfig.model_validate(stored)
            assert again == loads(FULL)
            assert settings_for(again, "support-x") == settings_for(loads(FULL), "support-x")
            assert stored["overrides"][0]["extract"] == {"rank": 48, "dtype": "float32"}

    def test_it_cannot_be_changed(self) -> None:
        with pytest.raises(ValueError, match="frozen"):
            loads(LEAST).keep = 4

    def test_scalars_mean_what_they_say(self) -> None:
        """YAML 1.1 would make numbers, dates, truths and strings of these that nobody wrote."""
        text = """\
output: /out
bases: {no: /b, 007: /c, 1e3: /d}
models: [{id: 007, url: /m, base: no}, {id: 2024-01-01, url: /n, base: 007}, {url: /p/1_000, base: 1e3}]
extract: {tolerance: 1e-4, rank: 8}
run: {share_base: off, force: yes}
"""
        zoo = loads(text)
        assert list(zoo.bases) == ["no", "007", "1e3"]
        assert [model.id for model in zoo.models] == ["007", "2024-01-01", "1_000"]
        assert (zoo.extract.tolerance, zoo.extract.rank, zoo.run.share_base, zoo.run.force) == (1e-4, 8, "off", True)

    def test_bytes_may_have_a_unit(self) -> None:
        assert loads(LEAST + "limits: {max_bytes: 2TB}").limits.max_bytes == 2 * 10**12

    def test_local_places_become_absolute(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.chdir(tmp_path)
        zoo = loads("output: out\nbases: {b: base/}\n")
        assert (zoo.output, zoo.bases["b"].url) == (str(tmp_path / "out"), str(tmp_path / "base"))

    def test_thousands_of_models_are_read(self) -> None:
        lines = "".join(f"  - {{id: m{i}, url: s3://ft/m{i}, base: b}}\n" for i in range(3000))
        assert len(loads(f"{LEAST}bases: {{b: s3://b/b}}\nmodels:\n{lines}").models) == 3000


MODELS = "bases: {b: /b}\nmodels:\n"


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "line 1: it is empty"),
        ("# nothing\n", "line 1: it is empty"),
        ("- a\n", "line 1: expected keys with values"),
        ("keep: 1\n", "line 1: output: it must be given"),
        ("outptu: /out\n", "line 1: unknown key 'outptu'; did you mean 'output'?"),
        (LEAST + "\nrun: {\n  engin: ray}\n", "line 4: run: unknown key 'engin'; did you mean 'engine'?"),
        (LEAST + MODELS + "- {url: /m, base: b}\n- url: /n\n  bsae: b\n", "line 6: models[1]: unknown key 'bsae'; did you mean 'base'?"),
        (LEAST + "bases:\n  b:\n    ulr: /b\n", "line 4: bases.b: unknown key 'ulr'; did you mean 'url'?"),
        (LEAST + "extract:\n  rank: 0\n", "line 3: extract.rank: rank must be between 1 and 512, got '0' (see"),
        (LEAST + "extract:\n  budget: 5 apples\n", "line 3: extract.budget: a budget is a size of the adapter's file, such as 200MB"),
        (LEAST + "extract:\n  rank: auto\n  energy: 0.9\n", "line 2: extract: energy and rank auto are different ways to choose ranks"),
        (LEAST + "extract:\n  rank: 2.5\n", "line 3: extract.rank: "),
        (LEAST + "extract:\n  for: ollama\n", "line 3: extract.for: "),
        (LEAST + "extract:\n  energy: 1.5\n", "line 3: extract.energy: "),
        (LEAST + "extract:\n  include: q_proj\n", "line 3: extract.include: expected a list, got 'q_proj'"),
        (LEAST + "extract:\n  rank: 64\n  max_rank: 8\n", "line 2: extract: max_rank must be between rank (64) and 512, got 8"),
        (LEAST + "extract: 3\n", "line 2: extract: expected keys with values, got '3'"),
        (LEAST + "models: {a: /m}\n", "line 2: models: expected a list"),
        (LEAST + "keep: -1\n", "line 2: keep: "),
        (LEAST + "run: {gpus_per_worker: 1.5}\n", "line 2: run.gpus_per_worker: more than one GPU"),
        (LEAST + "run: {gpus_per_worker: 0}\n", "line 2: run.gpus_per_worker: "),
        (LEAST + "limits: {max_minutes: inf}\n", "line 2: limits.max_minutes: "),
        (LEAST + "limits: {max_bytes: -1}\n", "line 2: limits.max_bytes: "),
        (LEAST + "discover: [{prefix: /p, depth: 5}]\n", "line 2: discover[0].depth: "),
        (LEAST + "discover: [{depth: 1}]\n", "line 2: discover[0].prefix: it must be given"),
        (LEAST + "overrides: [{match: '', extract: {}}]\n", "line 2: overrides[0].match: "),
        (LEAST + "overrides:\n- match: a\n  extract: {max_rank: 8}\n", "line 4: overrides[0].extract: max_rank must be between"),
        (LEAST + "bases: {b: {url: /b, name: /home/b}}\n", "line 2: bases.b.name: the base's name must be a hub id"),
        (LEAST + "bases: {org/b: /b}\n", "line 2: bases.'org/b': 'org/b' cannot be a base's id: it has a slash"),
        (LEAST + "bases: {b: ''}\n", "line 2: bases.b.url: not a path or URL: ''"),
        (LEAST + MODELS + "- url: s3:/m\n", "line 4: models[0].url: not a path or URL: 's3:/m'"),
        (LEAST + MODELS + "- {url: /m}\n- {url: /n, id: m}\n", "line 5: models[1].id: id 'm' is there twice, first as models[0] (/m)"),
        (LEAST + MODELS + "- {url: /a, id: o/m}\n- {url: /b1, id: o--m}\n", "line 5: models[1].id: id 'o--m' is there twice"),
        (LEAST + MODELS + "- url: /m\n  base: c\n", "line 5: models[0].base: there is no base 'c'; bases: b"),
        (LEAST + "discover:\n- prefix: /p\n  base: c\n", "line 4: discover[0].base: there is no base 'c'; bases: none"),
        (LEAST + "discover:\n- prefix: /p\n  rules:\n  - {match: x, base: c}\n", "line 5: discover[0].rules[0].base: there is no base 'c'"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_told_with_its_line(text: str, told: str) -> None:
    assert f"zoo.yaml, {told}" in refused(text)


def test_the_first_of_many_errors_is_told() -> None:
    assert "line 2: " in refused(LEAST + "keep: x\nrun: {workers: -1}\nlimits: {max_models: -1}\n")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("keep: 1\nkeep: 2\n", "line 3: key 'keep' is there twice, first in line 2"),
        ("run:\n  force: yes\n  workers: 1\n  force: no\n", "line 5: key 'force' is there twice, first in line 3"),
        ("keep: [\n", "not YAML"),
        ("\tkeep: 1\n", "line 2: not YAML"),
        ("discover: [{prefix: /p, exclude: [*-tmp]}]\n", "line 2: '-tmp' is an alias or anchor"),
        ("extract: &x {rank: 3}\n", "line 2: 'x' is an alias or anchor"),
        ("discover: [{prefix: /p, exclude: [*.tmp]}]\n", "line 2: "), ("keep: *x\n", "line 2: 'x' is an alias or anchor"),
        ("extract:\n  <<: {rank: 3}\n", "line 3: extract: unknown key '<<'"),
        ("keep: !!python/object/apply:os.system ['true']\n", "line 2: the tag 'tag:yaml.org,2002:python/object/apply:os.system' is"),
        ("keep: !!int 3\n", "line 2: the tag"),
        ("? {a: b}\n: 3\n", "line 2: a key is not plain text"),
        ("---\nkeep: 3\n", "line 2: a second document begins"),
        ("keep: " + "[" * 100_000, "line 2: nested more than 30 deep"),
        ("keep: " + "{a: " * 100_000, "line 2: nested more than 30 deep"),
        ("keep: '\x07'\n", "line 2: there is a character '\\x07'"),
        ("a: &a [x, x]\nb: &b [*a, *a]\n", "line 2: 'a' is an alias or anchor"),
    ],
)  # fmt: skip
def test_only_plain_data_is_yaml_here(text: str, told: str) -> None:
    assert told in refused(LEAST + text)


@pytest.mark.parametrize(
    "name", ["../x", "a/../b", "/etc", "a//b", "a/", "<script>alert(1)</script>", "a\nb", "a b", "é", "", ".hidden", "-rf", "_state", "a" * 97, "a" * 4096, "a\0b", "\ud800", "a\\b", "a%2fb"],
)  # fmt: skip
def test_hostile_names_are_no_ids(name: str) -> None:
    with pytest.raises(RequestError) as caught:
        model_id(name)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400
    for place in (f"models: [{{url: /m, id: {json.dumps(name)}}}]", f"bases: {{{json.dumps(name)}: /b}}"):
        if name:
            assert "zoo.yaml, line 2: " in refused(LEAST + place)


def test_an_id_is_one_component_and_the_same_when_it_is_made_again() -> None:
    assert model_id("org/name") == "org--name"
    assert model_id("a" * 96) == "a" * 96
    assert model_id(model_id("Org/Name_v1.5-b/x")) == "Org--Name_v1.5-b--x"


def test_a_hostile_last_component_asks_for_an_id() -> None:
    assert "models[0].id: 'my model' cannot be an id" in refused(LEAST + "models: [{url: s3://x/my model}]")
    assert loads(LEAST + "models: [{url: s3://x/my model, id: mine}]").models[0].id == "mine"


SECRET = "hunter2hunter2"


@pytest.mark.parametrize(
    "text",
    [
        f"aws_secret_access_key: {SECRET}", f"run: {{aws_access_key_id: {SECRET}}}", f"bases: {{b: {{url: /b, token: {SECRET}}}}}",
        f"bases: {{AWS_SESSION_TOKEN: {SECRET}}}", f"hfToken: {SECRET}", f"limits:\n  db-password: {SECRET}",
        f"models: [{{url: /m, extract: {{credentials: {{a: {SECRET}}}}}}}]", f"account_key: {SECRET}",
        f"output: https://user:{SECRET}@host/x", f"discover: [{{prefix: 's3://key:{SECRET}@bucket/x'}}]",
        f"models: [{{url: 'https://h/m?X-Amz-Signature={SECRET}'}}]", f"models: [{{url: 'https://h/m?sv=1&sig={SECRET}'}}]",
        "bases: {b: AKIAIOSFODNN7EXAMPLE}", "keep: hf_" + SECRET * 3, f"'https://user:{SECRET}@host/x': 1",
    ],
)  # fmt: skip
def test_secrets_are_refused_and_not_repeated(text: str) -> None:
    told = refused(f"# a zoo\n{text}\n")
    assert re.search("line [234]: ", told)
    assert "secret" in told
    assert SECRET not in told
    assert "AKIA" not in told


def test_names_that_only_sound_secret_are_taken() -> None:
    zoo = loads(LEAST + "bases: {tokenizer-8b: 's3://models/secret-project@2/token'}\nmodels: [{url: /secret}]\n")
    assert list(zoo.bases) == ["tokenizer-8b"]


class TestPlaces:
    """The output never lies in an input, nor an input in the output."""

    @pytest.mark.parametrize(
        ("output", "told"),
        [
            ("s3://m/llama", "lies inside s3://m/llama (bases.llama.url)"),
            ("s3a://m/llama/x", "lies inside s3://m/llama (bases.llama.url)"),
            ("s3://m/ft", "lies inside s3://m/ft (discover[0].prefix)"),
            ("s3://m/ft/a/b/", "lies inside s3://m/ft (discover[0].prefix)"),
            ("s3://m/one/out", "lies inside s3://m/one (models[0].url)"),
            ("s3://m/two", "lies inside s3://m/two/model.safetensors (models[1].url)"),
            ("s3://m", "lies inside the output s3://m"),
        ],
    )
    def test_inside_each_other(self, output: str, told: str) -> None:
        text = (
            "bases: {llama: s3://m/llama}\nmodels: [{url: s3://m/one}, {url: s3://m/two/model.safetensors}]\n"
            "discover: [{prefix: s3://m/ft}]\n"
        )
        assert told in refused(f"{text}output: {output}\n")
        assert loads(f"{text}output: s3://m/ft-adapters\n").output == "s3://m/ft-adapters"

    def test_a_link_does_not_hide_it(self, tmp_path: Path) -> None:
        (tmp_path / "ft").mkdir()
        (tmp_path / "link").symlink_to(tmp_path / "ft")
        assert "lies inside" in refused(f"output: {tmp_path}/link/out\ndiscover: [{{prefix: {tmp_path}/ft}}]\n")

    def test_the_root_holds_everything(self) -> None:
        assert within("/a", "/")
        assert not within("/", "/a")
        assert not within("s3://a/b", "/")


class TestLoad:
    """From a file or an object."""

    def test_the_file_is_named(self, tmp_path: Path) -> None:
        path = tmp_path / "night.yaml"
        path.write_text("\ufeff" + LEAST + "kep: 3\n")
        with pytest.raises(
            RequestError, match=rf"^{re.escape(str(path))}, line 2: unknown key 'kep'; did you mean 'keep'\?"
        ):
            zoofile.load(str(path))
        path.write_text("\ufeff" + LEAST)
        assert zoofile.load(os.path.relpath(path)).output == "/adapters"

    @pytest.mark.parametrize(
        ("data", "told"),
        [
            (b"output: /a\nkeep: \xff\n", "line 2: not UTF-8"),
            (b"#" * ((1 << 20) + 1), "has 1048577 bytes; at most 1048576"),
        ],
    )
    def test_what_is_no_text_or_no_end(self, data: bytes, told: str, tmp_path: Path) -> None:
        (tmp_path / "zoo.yaml").write_bytes(data)
        with pytest.raises(RequestError, match=re.escape(told)):
            zoofile.load(str(tmp_path / "zoo.yaml"))

    def test_nothing_is_there(self, tmp_path: Path) -> None:
        with pytest.raises(NotFoundError, match="no zoo file at"):
            zoofile.load(str(tmp_path / "zoo.yaml"))

    @pytest.mark.s3
    def test_from_s3(self, s3: S3) -> None:
        assert zoofile.load(s3.put("zoo.yaml", FULL.encode())) == loads(FULL)


class TestSettings:
    """Layers: the zoo's, each matching override in order, the model's own."""

    def zoo(self, extract: str, *overrides: tuple[str, str]) -> ZooConfig:
        lines = [f"- {{match: '{match}', extract: {changes}}}" for match, changes in overrides]
        return loads(f"{LEAST}extract: {extract}\noverrides:\n" + "\n".join(lines))

    def test_later_ones_win_and_change_only_what_they_name(self) -> None:
        zoo = self.zoo("{rank: 8, dtype: float32}", ("a*", "{rank: 16, for: peft}"), ("*b", "{rank: 24}"))
        wanted = {"z": (8, "portable"), "a": (16, "peft"), "b": (24, "portable"), "ab": (24, "peft")}
        for model, (rank, dialect) in wanted.items():
            made = settings_for(zoo, model)
            assert (made.rank, made.max_rank, made.dialect, made.dtype) == (rank, rank, dialect, "float32")
        own = ExtractSettings.model_validate({"rank": 32})
        assert (settings_for(zoo, "ab", own).rank, settings_for(zoo, "ab", own).dialect) == (32, "peft")

    def test_matching_minds_the_case(self) -> None:
        assert settings_for(self.zoo("{}", ("A*", "{rank: 5}")), "a").rank == 32

    def test_a_preset_gives_way_to_what_is_named_beside_or_after_it(self) -> None:
        paper = settings_for(self.zoo("{preset: paper}"), "m")
        assert (paper.rank, paper.solver, paper.targets) == (32, "exact", "paper")
        assert settings_for(self.zoo("{preset: paper, rank: 8}"), "m").rank == 8
        later = settings_for(self.zoo("{rank: 8, dtype: float32}", ("*", "{preset: paper, targets: all}")), "m")
        assert (later.rank, later.solver, later.targets, later.dtype) == (32, "exact", "all", "float32")

    def test_null_takes_an_earlier_preset_or_energy_back(self) -> None:
        zoo = self.zoo("{preset: paper, energy: 0.9}", ("plain", "{preset: null, energy: null}"))
        assert settings_for(zoo, "plain") == settings_for(loads(LEAST), "m")
        assert settings_for(zoo, "m").energy == 0.9

    def test_the_same_settings_are_equal_however_they_were_said(self) -> None:
        """What decides an adapter's identity must not see the difference."""
        ways = [
            "{preset: paper}",
            "{rank: 32, solver: exact, targets: paper}",
            "{preset: paper, max_rank: 32, for: portable}",
        ]
        dumps = {json.dumps(settings_for(self.zoo(way), "m").model_dump(mode="json")) for way in ways}
        assert len(dumps) == 1
        assert set(json.loads(dumps.pop())) == set(ExtractSettings.model_fields)

    def test_what_only_together_makes_no_sense_is_refused_for_that_model(self) -> None:
        zoo = self.zoo("{}", ("a*", "{max_rank: 40}"), ("*b", "{rank: 64}"))
        assert settings_for(zoo, "a").max_rank == 40
        with pytest.raises(RequestError, match=r"max_rank must be between rank \(64\) and 512, got 40"):
            settings_for(zoo, "ab")

    @pytest.mark.parametrize(
        ("zoos", "models", "policy"),
        [
            ("{rank: auto}", "{}", "auto"),
            ("{rank: auto}", "{budget: 5MB}", "budget"),
            ("{rank: auto}", "{energy: 0.9}", "energy"),
            ("{rank: auto}", "{rank: 8}", "fixed"),
            ("{budget: 5MB}", "{rank: auto}", "auto"),
            ("{budget: 5MB}", "{energy: 0.9}", "energy"),
            ("{budget: 5MB, max_rank: 64}", "{for: peft}", "budget"),
            ("{energy: 0.9}", "{budget: 5MB}", "budget"),
            ("{energy: 0.9}", "{energy: null, rank: 8, max_rank: 8}", "fixed"),
        ],
    )
    def test_a_later_way_to_choose_ranks_takes_the_place_of_an_earlier_one(
        self, zoos: str, models: str, policy: str
    ) -> None:
        made = settings_for(self.zoo(zoos, ("*", models)), "m")
        again = made.run_config(base="/b", tuned="/t", out="/o", base_name="", run=loads(LEAST).run)
        assert again.policy.name == policy

    def test_fields_are_those_of_an_extraction(self) -> None:
        """Name, type and default: a setting that an extraction learns, or unlearns, must be met here."""
        run = {"gpus_per_worker", "share_base"} - set(RunConfig.model_fields)
        mine = {**ExtractSettings.model_fields, **RunSettings.model_fields}
        assert set(mine) - {"preset"} - run == set(RunConfig.model_fields) - {
            "base",
            "tuned",
            "out",
            "base_name",
            "overwrite",
        }
        for name in set(mine) & set(RunConfig.model_fields):
            assert mine[name].annotation == RunConfig.model_fields[name].annotation, name
            assert mine[name].default == RunConfig.model_fields[name].default, name

    def test_an_extraction_gets_all_of_them(self) -> None:
        zoo = loads(FULL)
        made = settings_for(zoo, "support-bot", zoo.models[0].extract).run_config(
            base="/b", tuned="/t", out="/o", base_name="org/b", run=zoo.run
        )
        assert (made.base, made.tuned, made.out, made.base_name) == ("/b", "/t", "/o", "org/b")
        assert (made.rank, made.dtype, made.dialect, made.exclude, made.keep_parts) == (
            64,
            "float32",
            "peft",
            ("*.lm_head",),
            True,
        )
        with pytest.raises(RequestError, match="lies inside the tuned checkpoint"):
            zoo.extract.run_config(base="/b", tuned="/t", out="/t/o", base_name="", run=zoo.run)


class TestSchema:
    """For editors."""

    def test_the_shipped_one_is_the_codes(self) -> None:
        shipped = json.loads(files("phlora_pipeline").joinpath("zoo.schema.json").read_text("utf-8"))
        assert shipped == zoofile.schema(), (
            "write json.dumps(zoofile.schema(), indent=2, ensure_ascii=False) to the file"
        )

    @pytest.mark.parametrize("text", [FULL, LEAST])
    def test_what_is_taken_fits_it(self, text: str) -> None:
        jsonschema.Draft202012Validator.check_schema(zoofile.schema())
        jsonschema.validate(yaml.safe_load(text), zoofile.schema())

    @pytest.mark.parametrize(
        "more", ["kep: 3", "keep: -1", "run: {engine: spark}", "extract: {dialect: peft}", "bases: {b: 3}"]
    )
    def test_what_is_refused_does_not(self, more: str) -> None:
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(yaml.safe_load(LEAST + more), zoofile.schema())

    def test_every_field_is_described(self) -> None:
        made = zoofile.schema()
        base = made["$defs"]["Base"]["anyOf"][1]
        for described in (made, base, *(kind for name, kind in made["$defs"].items() if name != "Base")):
            for name, described_field in described["properties"].items():
                assert described_field.get("description"), name


def answer(text: str) -> ZooConfig | str:
    try:
        return loads(text)
    except RequestError as error:
        return str(error)


@given(st.text(max_size=200))
def test_any_text_is_a_zoo_or_refused_in_one_line(text: str) -> None:
    for tried in (text, LEAST + text, FULL.replace("mail-bot", text), f"{LEAST}models: [{{url: {text}}}]"):
        told = answer(tried)
        assert isinstance(told, ZooConfig) or (told.startswith("zoo.yaml") and "\n" not in told)


@given(
    st.integers(0, len(FULL)),
    st.integers(0, 40),
    st.sampled_from(["", " ", "\n", ":", "- ", "{", "]", '"', "null", "*"]),
)
def test_a_damaged_file_is_a_zoo_or_refused_with_the_line(start: int, cut: int, put: str) -> None:
    told = answer(FULL[:start] + put + FULL[start + cut :])
    assert isinstance(told, ZooConfig) or re.match(r"zoo\.yaml, line \d+: ", told)


@given(st.text(alphabet=st.characters(codec="utf-8"), max_size=60))
def test_a_scalar_reads_back_in_any_place(text: str) -> None:
    """By our reader, and by everyone else's."""
    written = zoofile.scalar(text)
    assert "\n" not in written
    for place in (f"{{{written}: [{written}, x]}}  # end", f"- {written}  # end\n- {{a: {written}}}"):
        found: Any = yaml.safe_load(place)
        key = next(iter(found)) if isinstance(found, dict) else found[0]
        assert key == text


@pytest.mark.parametrize(
    ("card", "base"),
    [
        ("---\nbase_model: org/a\n---\n# x", "org/a"), ("---\r\nbase_model: org/a\r\n---\r\n", "org/a"),
        ("\ufeff---\nbase_model:\n- a\n- b\n---", ["a", "b"]), ("# no front matter\n---\nbase_model: a\n---\n", None),
        ("---\nbase_model: a\n", None), ("---\n- a\n---\n", None), ("---\na: [\n---\n", None), ("", None),
        ("---\n---\n", None), ("---\nx: !!python/name:os.system\n---\n", None), ("---\nbase_model: 3.10\n---\n", "3.10"),
    ],
)  # fmt: skip
def test_front_matter_is_taken_where_it_can_be_read(card: str, base: object) -> None:
    assert zoofile.front_matter(card).get("base_model") == base
