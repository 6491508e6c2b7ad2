"""`--for`: what each dialect takes and drops, by the rules of `servers.toml`, and that what is written loads as written."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from phlora_pipeline import cli, loaders, targets
from phlora_pipeline.errors import RequestError
from phlora_pipeline.loaders import Ranks
from phlora_pipeline.targets import Dialect
from phlora_pipeline.verify import verify
from tests import runs, toys
from tests.test_plan import SETTINGS, llama, of_rank, planned

LANGUAGE = tuple(dialect for dialect in targets.dialects() if dialect != "kohya")
EVERY_TYPE = (*targets.model_types(), "unlisted", "")
Written = tuple[dict[str, object], dict[str, Tensor]]
QWEN2 = {**toys.LLAMA, "model_type": "qwen2"}


@pytest.mark.parametrize("model_type", EVERY_TYPE)
@pytest.mark.parametrize(
    ("dialect", "others"), [("nim", ("vllm", "sglang")), ("portable", ("peft", "vllm", "sglang", "gguf"))]
)
def test_a_dialect_of_many_servers_takes_what_each_of_them_takes(
    dialect: Dialect, others: tuple[Dialect, ...], model_type: str
) -> None:
    all_of_them, each = targets.server_rules(model_type, dialect), [targets.server_rules(model_type, o) for o in others]
    assert all_of_them.kinds == frozenset.intersection(*(rules.kinds for rules in each))
    assert all_of_them.carries == frozenset.intersection(*(rules.carries for rules in each))
    for flag in ("tied_embeddings", "per_tensor_ranks", "rslora", "target_pattern"):
        assert getattr(all_of_them, flag) == all(getattr(rules, flag) for rules in each)
    assert all_of_them.whole_families == any(rules.whole_families for rules in each)
    for limit in ("max_rows", "max_rank"):
        assert getattr(all_of_them, limit) == min(
            (value for rules in each if (value := getattr(rules, limit)) is not None), default=None
        )


def test_every_choice_of_the_flag_has_rules() -> None:
    from phlora_pipeline.cli.options import Dialect as Flag

    assert tuple(flag.value for flag in Flag) == targets.dialects()


def test_peft_alone_carries_tensors_whole_and_both_ends_of_a_tie() -> None:
    rules = {dialect: targets.server_rules("llama", dialect) for dialect in LANGUAGE}
    assert {dialect for dialect, found in rules.items() if found.tied_embeddings} == {"peft"}
    assert {dialect for dialect, found in rules.items() if "norm" in found.carries} == {"peft"}
    assert {dialect for dialect, found in rules.items() if found.per_tensor_ranks} == {"peft", "vllm"}


@pytest.mark.parametrize("dialect", LANGUAGE)
def test_a_rank_above_a_servers_largest_is_refused_in_the_plan(dialect: Dialect) -> None:
    asked = replace(of_rank(600), dialect=dialect)
    if targets.server_rules("llama", dialect).max_rank is None:
        assert planned(llama(), asked).written_rank == 600
    else:
        with pytest.raises(RequestError, match="rank 600 is more than the 512"):
            planned(llama(), asked)


@pytest.mark.parametrize(
    ("dialect", "written"), [("vllm", 32), ("nim", 32), ("sglang", 20), ("gguf", 20), ("peft", 20)]
)
def test_only_vllms_kernels_ask_for_a_rank_of_their_grid(dialect: Dialect, written: int) -> None:
    assert planned(llama(), replace(of_rank(20), dialect=dialect)).written_rank == written


@pytest.mark.parametrize("dialect", ["portable", "vllm", "sglang", "nim", "gguf"])
def test_of_a_type_that_no_server_serves_nothing_is_planned(dialect: Dialect) -> None:
    shapes, config = {"transformer.h.0.attn.c_attn.weight": (8, 24)}, {"model_type": "gpt2"}
    with pytest.raises(
        RequestError,
        match=r"a Conv1D of model type 'gpt2' is not known to be applied by .*; --for peft adapts it",
    ):
        planned(shapes, replace(SETTINGS, dialect=dialect), config=config)


def test_a_reason_names_the_servers_that_differ() -> None:
    left_out = {
        dialect: planned(llama(), replace(SETTINGS, dialect=dialect), config=QWEN2).left_out.get("lm_head.weight", "")
        for dialect in LANGUAGE
    }
    assert left_out["portable"] == left_out["nim"] == left_out["vllm"]
    assert left_out["vllm"].startswith("kind lm_head of model type 'qwen2' is not known to be applied by vLLM;")
    assert {left_out[dialect] for dialect in ("peft", "sglang", "gguf")} == {""}


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Everything moved, each matrix along a spectrum that falls at its own rate."""
    return saved(tmp_path_factory.mktemp("qwen"), QWEN2)


def saved(folder: Path, config: Mapping[str, object]) -> tuple[Path, Path]:
    base = toys.llama_tensors()
    tuned = toys.fine_tuned(base)
    for number, (name, value) in enumerate(base.items()):
        if value.ndim == 2:
            sigma = torch.arange(1, min(value.shape) + 1).double() ** -(0.3 + 0.1 * number)
            tuned[name] = value + toys.with_spectrum(*value.shape, sigma, seed=number).float()
    return toys.save(folder / "base", base, config), toys.save(folder / "tuned", tuned, config)


@pytest.mark.parametrize("dialect", LANGUAGE)
def test_what_is_dropped_is_named_with_its_energy(dialect: Dialect, qwen: tuple[Path, Path], tmp_path: Path) -> None:
    """In the manifest and the card; what stays and what goes adds up to all that changed."""
    result = runs.extract(*qwen, tmp_path, dialect=dialect)
    rows = runs.rows(tmp_path)
    base, tuned = (load_file(folder / "model.safetensors") for folder in qwen)
    energies = {name: float((tuned[name].double() - base[name].double()).square().sum()) for name in base}
    assert {name: row.delta_norm**2 for name, row in rows.items()} == pytest.approx(energies, rel=1e-6)
    dropped = {name for name, row in rows.items() if row.status == "skipped"}
    matrices = {"model.embed_tokens.weight", "lm_head.weight"}
    assert dropped & matrices == (matrices if dialect in {"portable", "vllm", "nim"} else set())
    shares = {name: share for name, _, share, _ in result.summary.left_out}
    assert shares == pytest.approx({name: energies[name] / sum(energies.values()) for name in dropped}, rel=1e-6)
    card = (tmp_path / "README.md").read_text()
    assert all(f"`{name}`:" in card for name in dropped & matrices)
    found = verify(str(qwen[0]), str(qwen[1]), str(tmp_path))
    assert found.passed, found


@pytest.mark.parametrize("dialect", LANGUAGE)
def test_the_card_tells_how_to_load_it_where_it_loads(
    dialect: Dialect, qwen: tuple[Path, Path], tmp_path: Path
) -> None:
    runs.extract(*qwen, tmp_path, dialect=dialect, rank=5)
    card = (tmp_path / "README.md").read_text().partition("## Loading it")[2]
    told = {"PEFT": "from peft", "vLLM": "--max-lora-rank 8", "SGLang": "sglang.launch_server", "llama.cpp": "_to_gguf"}
    servers = set(targets.server_rules("qwen2", dialect).takes)
    assert {server for server, text in told.items() if text in card} == servers


@pytest.fixture(scope="module")
def own(qwen: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("own") / "out"
    runs.extract(*qwen, out, dialect="vllm", energy=0.6)
    return out


class TestOwnRanks:
    """`--energy` for PEFT and vLLM: no zeros are written."""

    def test_every_pair_has_the_rank_that_its_energy_takes(self, own: Path) -> None:
        config = json.loads((own / "adapter_config.json").read_text())
        ranks = Ranks.of(config)
        rows = [row for row in runs.rows(own).values() if row.status == "adapted"]
        tensors = load_file(own / "adapter_model.safetensors")
        assert len({row.rank for row in rows}) > 3
        assert config["r"] == config["lora_alpha"] == max(row.rank for row in rows)
        assert config["rank_pattern"] == config["alpha_pattern"]
        for row in rows:
            A = tensors[f"base_model.model.{row.module}.lora_A.weight"]
            assert A.shape[0] == row.rank == ranks.rank(row.module)
            assert A.any(dim=1).all()
            assert ranks.scale(row.module) == 1

    @pytest.mark.parametrize("dialect", ["portable", "sglang", "nim", "gguf"])
    def test_it_is_the_uniform_adapter_without_its_zeros(
        self, dialect: Dialect, own: Path, qwen: tuple[Path, Path], tmp_path: Path
    ) -> None:
        runs.extract(*qwen, tmp_path, dialect=dialect, energy=0.6)
        config = json.loads((tmp_path / "adapter_config.json").read_text())
        assert not config["rank_pattern"]
        modules = {row.module for row in runs.rows(own).values() if row.status == "adapted"}
        assert modules
        for module in modules:
            torch.testing.assert_close(
                runs.written_delta(own, module), runs.written_delta(tmp_path, module), rtol=0, atol=1e-12
            )
        size = (tmp_path / "adapter_model.safetensors").stat().st_size
        assert (own / "adapter_model.safetensors").stat().st_size < size

    @pytest.mark.parametrize("dialect", ["portable", "sglang", "nim", "gguf"])
    def test_whom_it_is_not_for_is_told_by_verify(self, dialect: Dialect, own: Path, qwen: tuple[Path, Path]) -> None:
        assert verify(str(qwen[0]), str(qwen[1]), str(own)).passed
        problems = verify(str(qwen[0]), str(qwen[1]), str(own), dialect=dialect).problems
        assert any(problem.startswith("rank_pattern is not read by all") for problem in problems)

    def test_a_changed_pattern_is_another_scale(self, own: Path, qwen: tuple[Path, Path]) -> None:
        path = own / "adapter_config.json"
        text = path.read_text()
        config = json.loads(text)
        name = next(iter(config["alpha_pattern"]))
        config["alpha_pattern"] = {**config["alpha_pattern"], name: 2 * config["alpha_pattern"][name]}
        path.write_text(json.dumps(config))
        try:
            found = verify(str(qwen[0]), str(qwen[1]), str(own))
        finally:
            path.write_text(text)
        assert [f"^{check.module.replace('.', chr(92) + '.')}" for check in found.modules if check.problem] == [name]


@pytest.fixture(scope="module", params=["sglang", "nim", "portable"])
def written(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Written:
    """Of a fine-tune in which one q_proj, one up_proj and the norms alone changed."""
    folder = tmp_path_factory.mktemp(request.param)
    base = toys.llama_tensors()
    moved = toys.fine_tuned(base)
    names = [name for name in base if "layernorm" in name or "0.self_attn.q" in name or "1.mlp.up" in name]
    pair = toys.save(folder / "b", base), toys.save(folder / "t", {**base, **{name: moved[name] for name in names}})
    runs.extract(*pair, folder / "out", dialect=request.param, energy=0.5)
    config = json.loads((folder / "out" / "adapter_config.json").read_text())
    return config, load_file(folder / "out" / "adapter_model.safetensors")


class TestSGLang:
    """SGLang 0.5.23's loader, rule by rule, on what we write for it."""

    def test_every_buffer_has_the_configs_rank(self, written: Written) -> None:
        """mem_pool.py:908-911, 1265: `buffer_view.shape == weight.shape`."""
        config, tensors = written
        assert {value.shape["lora_B" in key] for key, value in tensors.items()} == {config["r"]}

    def test_the_scale_is_alpha_over_r_and_nothing_else_is_read(self, written: Written) -> None:
        """lora.py:71; use_rslora, rank_pattern, alpha_pattern and modules_to_save are read nowhere."""
        config, _ = written
        assert config["lora_alpha"] == config["r"]
        assert not any(config[name] for name in ("use_rslora", "rank_pattern", "alpha_pattern", "modules_to_save"))

    def test_where_there_is_q_there_are_k_and_v(self, written: Written) -> None:
        """lora.py:281-306 concatenates q, k and v; gate and up likewise."""
        _, tensors = written
        keys = {key for key in tensors if ".q_proj." in key}
        assert keys
        assert all(key.replace(".q_proj.", f".{other}_proj.") in tensors for key in keys for other in "kv")
        assert all(key.replace(".up_proj.", ".gate_proj.") in tensors for key in tensors if ".up_proj." in key)

    def test_targets_are_a_list(self, written: Written) -> None:
        """lora_manager.py:845-858 refuses a regular expression."""
        assert isinstance(written[0]["target_modules"], list)

    def test_every_weight_belongs_to_a_target(self, written: Written) -> None:
        """mem_pool.py:982-983: `get_target_module_name` raises for a name without one, such as a norm's."""
        config, tensors = written
        assert tensors
        assert all(any(f".{name}." in key for name in config["target_modules"]) for key in tensors)


class TestObjections:
    """What `verify` says of an adapter that some loader would not apply as written."""

    BASE: ClassVar = llama()
    GOOD: ClassVar = {"r": 8, "lora_alpha": 8, "target_modules": ["q_proj", "k_proj", "v_proj"], "bias": "none"}
    QKV = frozenset(f"model.layers.{n}.self_attn.{p}_proj" for n in (0, 1) for p in "qkv")

    def said(
        self, dialect: Dialect, model_type: str = "llama", modules: frozenset[str] = QKV, **changes: object
    ) -> str:
        rules = targets.server_rules(model_type, dialect)
        return "\n".join(loaders.objections(rules, {**self.GOOD, **changes}, modules, self.BASE))

    @pytest.mark.parametrize("dialect", LANGUAGE)
    def test_a_plain_adapter_has_none(self, dialect: Dialect) -> None:
        assert self.said(dialect) == ""

    @pytest.mark.parametrize(
        ("changes", "accepted"),
        [
            ({"alpha_pattern": {"q_proj": 4}}, {"peft", "vllm"}),
            ({"use_rslora": True}, {"peft", "vllm"}),
            ({"target_modules": ".*_proj"}, {"peft", "vllm", "gguf"}),
            ({"r": 1024}, {"peft", "sglang", "gguf"}),
            ({"bias": "all"}, {"peft"}),
            ({"lora_bias": True}, {"peft"}),
            ({"modules_to_save": ["norm"]}, {"peft"}),
        ],
    )
    def test_a_config_is_taken_by_those_who_read_it(self, changes: dict[str, object], accepted: set[str]) -> None:
        assert {dialect for dialect in LANGUAGE if not self.said(dialect, **changes)} == accepted

    def test_a_gap_in_a_family_matters_to_servers(self) -> None:
        gap = self.QKV - {"model.layers.1.self_attn.v_proj"}
        assert self.said("peft", modules=gap) == ""
        assert "model.layers.1.self_attn.v_proj has no pair" in self.said("vllm", modules=gap)

    def test_a_kind_that_a_server_would_not_apply(self) -> None:
        head = self.QKV | {"lm_head"}
        accepted = {dialect for dialect in LANGUAGE if not self.said(dialect, "qwen2", head)}
        assert accepted == {"peft", "sglang", "gguf"}

    def test_half_of_a_tied_delta(self) -> None:
        base = {name: shape for name, shape in self.BASE.items() if name != "lm_head.weight"}
        for dialect in LANGUAGE:
            rules = targets.server_rules("llama", dialect)
            said = list(loaders.objections(rules, self.GOOD, self.QKV | {"lm_head"}, base))
            assert bool(said) == (dialect != "peft")


@pytest.mark.parametrize("key", ["^model\\.layers\\.1\\.q", "layers.1.q", "q"])
def test_patterns_are_read_as_peft_reads_them(key: str) -> None:
    """peft/tuners/tuners_utils.py, get_pattern_key; vLLM 0.32's peft_helper.py says the same."""
    from peft.utils.other import get_pattern_key

    modules = ["model.layers.1.q", "model.layers.11.q", "tower.model.layers.1.q", "model.layers.1.xq"]
    ranks = Ranks(9, 9, {key: 4}, {key: 2}, rslora=False)
    for module in modules:
        assert (ranks.rank(module) == 4) == (get_pattern_key([key], module) == key)
        assert ranks.scale(module) == (0.5 if ranks.rank(module) == 4 else 1)
    assert Ranks(4, 8, {}, {}, rslora=True).scale("q") == 8 / math.sqrt(4)


def test_a_dialect_that_nobody_knows_is_wrong_usage(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    monkeypatch.setattr(
        sys, "argv", ["phlora", "extract", "--base", "b", "--tuned", "t", "--out", "o", "--for", "ollama"]
    )
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    assert "gguf" in capsys.readouterr().err
