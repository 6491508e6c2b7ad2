"""Plans from headers alone: nothing here has a byte of weights."""

from __future__ import annotations

import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest

from phlora_pipeline import lowrank
from phlora_pipeline.checkpoint import Checkpoint, TensorRef
from phlora_pipeline.errors import RequestError
from phlora_pipeline.plan import Plan, PlanSettings, blocks, make_plan, require_fits
from phlora_pipeline.ranks import Policy
from phlora_pipeline.safetensors_format import tensor_bytes
from phlora_pipeline.targets import Selection
from tests.toys import LLAMA

SETTINGS = PlanSettings(Selection(), "portable", rank=8, parts_url="/out/_parts", factors=lowrank.Settings(8))
OWN = replace(lowrank.PROFILES["cpu"], name="my machine")


def of_rank(rank: int, **wanted: Any) -> PlanSettings:
    return replace(SETTINGS, rank=rank, factors=lowrank.Settings(rank, **wanted))


def checkpoint(
    shapes: dict[str, tuple[int, ...]], *, side: str = "base", dtype: str = "BF16", config: dict[str, Any] = LLAMA
) -> Checkpoint:
    refs, at = {}, 0
    for name, shape in shapes.items():
        size = tensor_bytes(dtype, shape)
        refs[name] = TensorRef(name, dtype, shape, f"/{side}/model.safetensors", at, at + size, "etag")
        at += size
    return Checkpoint(f"/{side}", refs, config, f"fingerprint of {side}")


def llama(layers: int = 2, hidden: int = 64) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (100, hidden),
        "lm_head.weight": (100, hidden),
        "model.norm.weight": (hidden,),
    }
    for n in range(layers):
        shapes |= {f"model.layers.{n}.self_attn.{p}_proj.weight": (hidden, hidden) for p in "qkvo"}
        shapes |= {f"model.layers.{n}.mlp.{p}_proj.weight": (2 * hidden, hidden) for p in ("gate", "up")}
    return shapes


def planned(
    shapes: dict[str, tuple[int, ...]],
    settings: PlanSettings = SETTINGS,
    *,
    tuned: dict[str, tuple[int, ...]] | None = None,
    **both: Any,
) -> Plan:
    return make_plan(checkpoint(shapes, **both), checkpoint(tuned or shapes, side="tuned", **both), settings)


def test_every_tensor_of_the_fine_tune_is_accounted_for_once() -> None:
    shapes = llama() | {"model.new.weight": (4, 4), "model.layers.0.conv.weight": (4, 4, 3)}
    base = {name: shape for name, shape in shapes.items() if name != "model.new.weight"}
    made = make_plan(checkpoint(base), checkpoint(shapes, side="tuned"), SETTINGS)
    in_tasks = [pair.name for task in made.tasks for pair in task.block.pairs]
    assert sorted([*in_tasks, *made.unread]) == sorted(shapes)
    assert {pair.name for pair in made.adapted} | made.left_out.keys() == set(in_tasks)
    assert made.unread == {"model.new.weight": "not in the base"}
    assert all(made.left_out.values())


def test_a_plan_is_a_pure_function_of_headers_and_settings() -> None:
    assert planned(llama()) == planned(llama())


@pytest.mark.parametrize(
    ("change", "new_parts"),
    [
        ({"rank": 4}, False),
        ({"identity": (("dtype", "float16"),)}, False),
        ({"dialect": "peft"}, False),
        ({"profile": OWN}, True),
        ({"factors": lowrank.Settings(16)}, True),
        ({"factors": lowrank.Settings(8, solver="krylov")}, True),
        ({"factors": lowrank.Settings(8, tolerance=1e-4)}, True),
        ({"factors": lowrank.Settings(8, energy=0.9)}, True),
        ({"selection": Selection("paper")}, True),
    ],
)
def test_identities_change_with_what_decides_the_bytes_and_only_then(change: dict[str, Any], new_parts: bool) -> None:
    """A smaller rank or another dtype is another adapter, cut from the same parts."""
    before, after = planned(llama()), planned(llama(), replace(SETTINGS, **change))
    assert before.version != after.version
    assert (before.extraction_id != after.extraction_id) == new_parts


def test_a_committed_profile_is_no_part_of_an_identity() -> None:
    """Its routes are the worker's device's, wherever the plan was made."""
    before, after = planned(llama()), planned(llama(), replace(SETTINGS, profile=lowrank.PROFILES["sm90"]))
    assert (before.version, before.extraction_id) == (after.version, after.extraction_id)


def test_where_things_lie_is_no_part_of_an_identity() -> None:
    before, after = planned(llama()), planned(llama(), replace(SETTINGS, parts_url="s3://elsewhere/_parts"))
    assert (before.version, before.extraction_id) == (after.version, after.extraction_id)
    assert before.tasks[0].members[0].part_url != after.tasks[0].members[0].part_url


def test_largest_tasks_come_first_and_hold_one_shape_each() -> None:
    made = planned(llama())
    costs = [task.cost for task in made.tasks]
    assert costs == sorted(costs, reverse=True)
    assert all(len({pair.shape for pair in task.block.pairs}) == 1 for task in made.tasks)
    assert len({task.block.id for task in made.tasks}) == len(made.tasks)


def test_blocks_are_capped_and_a_larger_tensor_is_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 3 * 4 * 64 * 64)
    made = planned(llama())
    for task in made.tasks:
        assert task.block.delta_bytes <= blocks.BLOCK_BYTES or len(task.block.pairs) == 1
    square = [task for task in made.tasks if task.block.shape == (64, 64)]
    assert sorted(len(task.block.pairs) for task in square) == [2, 3, 3]


def test_a_block_does_not_depend_on_the_rest_of_the_model() -> None:
    small, large = planned(llama(layers=1)), planned(llama(layers=1) | {"extra.weight": (7, 9)})
    assert {task.block.id for task in small.tasks} < {task.block.id for task in large.tasks}


def test_bytes_are_those_of_the_compared_tensors() -> None:
    shapes = llama()
    total = sum(tensor_bytes("BF16", shape) for shape in shapes.values())
    assert planned(shapes).nbytes == 2 * total


def test_different_model_types_are_refused() -> None:
    with pytest.raises(RequestError, match="'llama', the fine-tune 'qwen2'"):
        make_plan(checkpoint(llama()), checkpoint(llama(), config={"model_type": "qwen2"}), SETTINGS)


def test_disjoint_names_are_refused_with_an_example_of_each() -> None:
    with pytest.raises(RequestError, match=r"0 of the fine-tune's 1 .* has 15 .* only in the fine-tune: bert\.weight"):
        planned(llama(), tuned={"bert.weight": (4, 4)})


def test_differing_shapes_are_refused_by_name_unless_excluded() -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    d, k = llama()[name]
    other = llama() | {name: (d + 1, k)}
    with pytest.raises(RequestError, match=rf"up_proj\.weight \(base \[{d}, {k}\], fine-tune \[{d + 1}, {k}\]\)"):
        planned(llama(), tuned=other)
    made = planned(llama(), replace(SETTINGS, selection=Selection(exclude=(name,))), tuned=other)
    assert f"[{d + 1}, {k}]" in made.unread[name]


def test_nothing_to_adapt_says_why() -> None:
    with pytest.raises(RequestError, match=r"nothing to adapt.*14 × not named by --include"):
        planned(llama(), replace(SETTINGS, selection=Selection(include=("nothing.like.this",))))


def test_a_plan_that_cannot_fit_is_refused_with_both_numbers_and_the_culprit() -> None:
    made = planned({"model.embed_tokens.weight": (200_000, 8192), "lm_head.weight": (8, 8192)})
    require_fits(made, None)
    require_fits(made, 2**40)
    with pytest.raises(
        RequestError, match=r"GiB, 4\.0 GiB are there; .*model\.embed_tokens\.weight .*\[200000, 8192\]"
    ):
        require_fits(made, 4 * 2**30)


def test_dtypes_that_torch_does_not_read_are_listed_and_never_read() -> None:
    shapes = llama()
    tuned = checkpoint(shapes, side="tuned")
    name = "model.layers.0.mlp.up_proj.weight"
    ref = replace(tuned.tensors[name], dtype="F8_E4M3FNUZ", stop=tuned.tensors[name].start + 128 * 64)
    made = make_plan(checkpoint(shapes), replace(tuned, tensors={**tuned.tensors, name: ref}), SETTINGS)
    assert "F8_E4M3FNUZ" in made.unread[name]
    assert name not in {pair.name for task in made.tasks for pair in task.block.pairs}


class TestTied:
    """Where input and output share a weight, the delta must be on both ends or on neither."""

    UNSAID: ClassVar = {key: value for key, value in LLAMA.items() if key != "tie_word_embeddings"}
    SHAPES: ClassVar = {name: shape for name, shape in llama().items() if name != "lm_head.weight"}

    def test_a_causal_model_without_an_output_matrix_is_tied(self) -> None:
        made = planned(self.SHAPES, replace(SETTINGS, dialect="peft"), config=self.UNSAID)
        assert made.tied == ("model.embed_tokens", "lm_head")
        assert "model.embed_tokens.weight" in {pair.name for pair in made.adapted}

    def test_portable_leaves_it_out_and_names_the_remedy(self) -> None:
        made = planned(self.SHAPES, config=self.UNSAID)
        assert made.tied is None
        assert "--for peft" in made.left_out["model.embed_tokens.weight"]

    def test_the_config_says_so_even_where_both_are_stored(self) -> None:
        made = planned(llama(), replace(SETTINGS, dialect="peft"), config=LLAMA | {"tie_word_embeddings": True})
        assert made.tied == ("model.embed_tokens", "lm_head")
        assert "tied" in made.left_out["lm_head.weight"]

    def test_an_untied_model_has_two_deltas(self) -> None:
        made = planned(llama())
        assert made.tied is None
        assert {"lm_head", "embedding"} <= {pair.kind for pair in made.adapted}

    def test_the_config_may_deny_it(self) -> None:
        assert planned(self.SHAPES, config=LLAMA | {"tie_word_embeddings": False}).tied is None

    def test_an_output_without_a_name_leaves_the_embedding_out(self) -> None:
        """A masked LM's decoder is tied under a name that the checkpoint does not tell: half of a delta is not written."""
        config = {"model_type": "bert", "architectures": ["BertForMaskedLM"]}
        made = planned(self.SHAPES, replace(SETTINGS, dialect="peft"), config=config)
        assert "half of a tied delta" in made.left_out["model.embed_tokens.weight"]

    def test_an_encoder_is_not_tied(self) -> None:
        made = planned(
            self.SHAPES,
            replace(SETTINGS, dialect="peft"),
            config={"model_type": "bert", "architectures": ["BertModel"]},
        )
        assert made.tied is None

    def test_the_vocabulary_and_not_the_positions_are_tied(self) -> None:
        shapes = {
            "transformer.wpe.weight": (32, 8),
            "transformer.wte.weight": (99, 8),
            "transformer.h.0.attn.c_attn.weight": (8, 24),
        }
        config = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}
        made = make_plan(
            checkpoint(shapes, config=config),
            checkpoint(shapes, config=config, side="tuned"),
            replace(SETTINGS, dialect="peft"),
        )
        assert made.tied == ("transformer.wte", "lm_head")


def test_a_rank_off_the_grid_is_written_padded_and_said() -> None:
    made = planned(llama(), of_rank(20))
    assert (made.rank, made.written_rank) == (20, 32)
    assert any("zero-padded" in warning for warning in made.warnings)


def test_with_a_threshold_of_energy_the_rank_is_known_later_and_then_goes_on_the_grid() -> None:
    made = planned(llama(), replace(of_rank(20, energy=0.9), policy=Policy(energy=0.9)))
    assert made.policy.name == "energy"
    assert [warning.partition(":")[0] for warning in made.warnings] == [
        "--for portable has one rank for all tensors"
    ]  # and nothing of padding 20 to 32
    later = made.of_rank(9)
    assert (later.rank, later.written_rank) == (9, 16)
    assert (later.version, later.extraction_id, later.tasks) == (made.version, made.extraction_id, made.tasks)
    assert later.adapter_parameters < made.adapter_parameters


def test_tensors_that_only_the_base_has_are_said() -> None:
    made = make_plan(checkpoint(llama() | {"extra.weight": (3, 3)}), checkpoint(llama(), side="tuned"), SETTINGS)
    assert made.base_only == ("extra.weight",)
    assert any("extra.weight" in warning for warning in made.warnings)


def test_dense_layers_beside_experts_are_left_out_by_name() -> None:
    """PEFT would take their pairs for an expert's, and drop them without a word."""
    shapes = llama() | {
        f"model.layers.9.mlp.experts.{e}.{p}_proj.weight": (8, 8) for e in range(2) for p in ("gate", "up", "down")
    }
    made = planned(shapes, config=LLAMA | {"model_type": "mixtral"})
    assert "experts" in made.left_out["model.layers.0.mlp.gate_proj.weight"]
    assert "model.layers.9.mlp.experts.1.down_proj.weight" in {pair.name for pair in made.adapted}


def test_a_multimodal_models_towers_are_left_out_and_it_is_warned() -> None:
    shapes = llama() | {"vision_tower.layers.0.self_attn.q_proj.weight": (8, 8)}
    made = planned(shapes, config=LLAMA | {"vision_config": {}})
    assert "tower" in made.left_out["vision_tower.layers.0.self_attn.q_proj.weight"]
    assert any("multimodal" in warning for warning in made.warnings)


def test_what_config_json_says_of_the_model_decides_the_version() -> None:
    """A mended config.json is another adapter: kinds, ties and task type come from it."""
    assert planned(llama()).version != planned(llama(), config=LLAMA | {"architectures": ["LlamaModel"]}).version


def test_memory_counts_the_solvers_own() -> None:
    """A copy, U, Vh and LAPACK's workspace: several times the matrix, and most where it is square."""
    [square] = [task for task in planned(llama(hidden=512)).tasks if task.block.shape == (512, 512)]
    assert square.worker_bytes > square.block.delta_bytes + 5 * 4 * 512 * 512


def test_a_package_that_is_built_holds_every_module() -> None:
    """An editable install would hide a sub-package that is left out."""
    from setuptools import find_packages

    root = Path(__file__).parent.parent
    wanted = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]["find"]["include"]
    found = find_packages(str(root), include=wanted)
    folders = {
        str(path.parent.relative_to(root)).replace("/", ".") for path in (root / "phlora_pipeline").rglob("*.py")
    }
    assert set(found) == folders
