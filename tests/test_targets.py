"""Names and shapes → kinds, refusals, families, and the list that PEFT matches by."""

from __future__ import annotations

import pytest

from phlora_pipeline import targets
from phlora_pipeline.targets import Selection

KINDS = [
    ("model.layers.0.self_attn.q_proj.weight", (8, 8), "attention"),
    ("model.layers.0.self_attn.qkv_proj.weight", (24, 8), "attention"),
    ("transformer.h.3.attn.c_attn.weight", (8, 24), "attention"),
    ("encoder.layer.0.attention.self.query.weight", (8, 8), "attention"),
    ("encoder.layer.0.attention.output.dense.weight", (8, 8), "attention"),
    ("layers.0.attention.wq.weight", (8, 8), "attention"),
    ("encoder.layer.0.output.dense.weight", (8, 32), "mlp"),
    ("encoder.layer.0.intermediate.dense.weight", (32, 8), "mlp"),
    ("model.layers.0.mlp.gate_proj.weight", (32, 8), "mlp"),
    ("transformer.h.0.mlp.c_fc.weight", (8, 32), "mlp"),
    ("layers.0.feed_forward.w1.weight", (32, 8), "mlp"),
    ("model.layers.0.mlp.experts.17.up_proj.weight", (32, 8), "expert"),
    ("model.layers.0.block_sparse_moe.experts.3.w2.weight", (8, 32), "expert"),
    ("model.layers.0.block_sparse_moe.gate.weight", (4, 8), "router"),
    ("model.layers.0.mlp.gate.weight", (4, 8), "router"),
    ("model.embed_tokens.weight", (100, 8), "embedding"),
    ("embeddings.word_embeddings.weight", (100, 8), "embedding"),
    ("embeddings.position_embeddings.weight", (64, 8), "embedding"),
    ("transformer.wte.weight", (100, 8), "embedding"),
    ("encoder.tok_embedding.weight", (100, 8), "embedding"),
    ("gpt_neox.embed_in.weight", (100, 8), "embedding"),
    ("encoder.relative_attention_bias.weight", (32, 4), "embedding"),
    ("lm_head.weight", (100, 8), "lm_head"),
    ("output.weight", (100, 8), "lm_head"),
    ("transformer.output_layer.weight", (100, 8), "lm_head"),
    ("embed_out.weight", (100, 8), "other"),
    ("model.decoder.embed_positions.weight", (100, 8), "other"),
    ("pooler.dense.weight", (8, 8), "linear"),
    ("classifier.weight", (12, 8), "linear"),
    ("model.layers.0.input_layernorm.weight", (8,), "norm"),
    ("transformer.h.0.ln_1.weight", (8,), "norm"),
    ("encoder.layer.0.output.LayerNorm.weight", (8,), "norm"),
    ("encoder.layer.0.output.LayerNorm.bias", (8,), "bias"),
    ("model.layers.0.self_attn.q_proj.bias", (8,), "bias"),
    ("patch_embed.proj.weight", (8, 3, 4, 4), "conv"),
    ("model.layers.0.block_sparse_moe.input_linear.weight", (4, 96, 32), "expert"),
    ("model.layers.0.mamba.dt_proj.weight", (64, 8), "other"),
    ("lstm.weight_ih_l0", (32, 8), "other"),
    ("in_proj_weight", (24, 8), "other"),
    ("logit_scale", (), "other"),
]


@pytest.mark.parametrize(("name", "shape", "kind"), KINDS, ids=[name for name, _, _ in KINDS])
def test_kind(name: str, shape: tuple[int, ...], kind: str) -> None:
    assert targets.kind_of(name, shape) == kind


@pytest.mark.parametrize(
    ("shape", "kind", "dtype", "says"),
    [
        ((8,), "norm", "F32", "norm"),
        ((8,), "bias", "F32", "bias"),
        ((8, 27), "conv", "F32", ""),
        ((32, 8), "other", "F32", "not the 2-D weight"),
        ((32, 8), "mlp", "I8", "not in floating point"),
        ((32, 8), "mlp", "F8_E4M3", ""),
        ((0, 8), "mlp", "F32", "empty"),
        ((32, 8), "mlp", "BF16", ""),
    ],
)
def test_what_cannot_be_a_target_says_why(shape: tuple[int, ...], kind: targets.Kind, dtype: str, says: str) -> None:
    reason = targets.shape_refusal(shape, kind, dtype)
    assert says in reason
    assert bool(reason) == bool(says)


def test_selection_by_named_sets() -> None:
    assert not Selection("all").refusal("lm_head.weight", "lm_head")
    assert "linear" in Selection("linear").refusal("lm_head.weight", "lm_head")
    assert not Selection("linear").refusal("pooler.dense.weight", "linear")
    assert "paper" in Selection("paper").refusal("pooler.dense.weight", "linear")
    assert not Selection("paper").refusal("x.self_attn.q_proj.weight", "attention")


def test_globs_match_tensor_and_module_names_and_exclude_wins() -> None:
    chosen = Selection(include=("*.q_proj", "*.v_proj.weight"), exclude=("*.3.*",))
    assert not chosen.refusal("model.layers.0.self_attn.q_proj.weight", "attention")
    assert not chosen.refusal("model.layers.0.self_attn.v_proj.weight", "attention")
    assert "--include" in chosen.refusal("model.layers.0.self_attn.k_proj.weight", "attention")
    assert "--exclude" in chosen.refusal("model.layers.3.self_attn.q_proj.weight", "attention")


def test_include_names_matrices_of_any_kind() -> None:
    assert not Selection("paper", include=("lm_head",)).refusal("lm_head.weight", "lm_head")


def test_portable_takes_what_every_server_takes_of_the_type() -> None:
    llama, qwen, unknown = (targets.server_rules(name, "portable") for name in ("llama", "qwen2", "bert"))
    assert not targets.server_refusal("embedding", (1000, 8), llama)
    assert "300000" in targets.server_refusal("embedding", (300_000, 8), llama)
    assert "--for peft" in targets.server_refusal("embedding", (1000, 8), qwen)
    assert "unlisted" in targets.server_refusal("linear", (8, 8), unknown)
    assert not targets.server_refusal("attention", (8, 8), unknown)
    assert "--for peft" not in targets.server_refusal("expert", (8, 8), unknown)  # PEFT would not find it either


def test_peft_takes_every_matrix_that_it_can_find() -> None:
    """Experts and routers are fused in memory; PEFT follows their names for some types and drops them for others."""
    bert, mixtral = targets.server_rules("bert", "peft"), targets.server_rules("mixtral", "peft")
    refused = {kind for kind in targets.MATRIX_KINDS if targets.server_refusal(kind, (300_000, 8), bert)}
    assert refused == {"expert", "router"}
    assert not any(targets.server_refusal(kind, (300_000, 8), mixtral) for kind in targets.MATRIX_KINDS)
    assert "--for peft" not in targets.server_refusal("expert", (8, 8), bert)
    assert bert.rank_grid == ()


@pytest.mark.parametrize(
    ("name", "tower"),
    [
        ("model.vision_tower.encoder.layers.0.mlp.fc1.weight", True),
        ("visual.blocks.0.attn.qkv.weight", True),
        ("multi_modal_projector.linear_1.weight", True),
        ("language_model.model.layers.0.mlp.up_proj.weight", False),
        ("model.layers.0.self_attn.q_proj.weight", False),
    ],
)
def test_towers_beside_a_language_model(name: str, tower: bool) -> None:
    assert bool(targets.tower_refusal(name)) == tower


@pytest.mark.parametrize(
    ("rank", "written"), [(1, 1), (2, 8), (8, 8), (20, 32), (33, 64), (129, 256), (257, 320), (512, 512)]
)
def test_rank_is_written_as_the_next_of_the_grid(rank: int, written: int) -> None:
    assert targets.written_rank(rank, targets.server_rules("llama", "portable").rank_grid) == written


def layers(*names: str, count: int = 2) -> list[str]:
    return [f"model.layers.{layer}.{name}" for layer in range(count) for name in names]


def test_a_family_is_whole_over_projections_and_layers() -> None:
    """q in one layer alone asks for q, k and v in all layers, and for nothing else."""
    modules = layers("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.up_proj")
    found = targets.families(modules, frozenset({"model.layers.1.self_attn.q_proj"}))
    assert found == {"model.layers.0.self_attn.q_proj", *layers("self_attn.k_proj", "self_attn.v_proj")}


def test_gate_and_up_go_together_and_down_alone() -> None:
    modules = layers("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj", count=1)
    assert targets.families(modules, frozenset({"model.layers.0.mlp.up_proj"})) == {"model.layers.0.mlp.gate_proj"}
    assert targets.families(modules, frozenset({"model.layers.0.mlp.down_proj"})) == set()


def test_one_expert_asks_for_all_experts_and_projections() -> None:
    modules = layers(*[f"mlp.experts.{e}.{p}" for e in range(3) for p in ("gate_proj", "up_proj", "down_proj")])
    adapted = frozenset({"model.layers.0.mlp.experts.1.up_proj"})
    assert targets.families(modules, adapted) == set(modules) - adapted


def test_an_embedding_has_no_family() -> None:
    assert (
        targets.families(["model.embed_tokens", *layers("self_attn.q_proj")], frozenset({"model.embed_tokens"}))
        == set()
    )


def peft_matches(module: str, names: list[str]) -> bool:
    """PEFT's rule for a list (peft/tuners/tuners_utils.py, check_target_module_exists)."""
    return module in names or any(module.endswith(f".{name}") for name in names)


@pytest.mark.parametrize(
    "adapted",
    [
        {"encoder.layer.0.output.dense", "encoder.layer.0.attention.output.dense"},
        {"encoder.layer.0.output.dense"},
        {"pooler.dense"},
        {"encoder.layer.0.attention.self.query", "encoder.layer.1.attention.self.query"},
        {"lm_head"},
    ],
)
def test_target_modules_match_exactly_what_is_adapted(adapted: set[str]) -> None:
    modules = [
        f"encoder.layer.{n}.{part}"
        for n in (0, 1)
        for part in ("output.dense", "attention.output.dense", "attention.self.query", "output.LayerNorm")
    ]
    modules += ["pooler.dense", "lm_head"]
    names = targets.target_modules(frozenset(adapted), modules)
    assert {module for module in modules if peft_matches(module, names)} == adapted


def test_conv1d_weights_are_stored_the_other_way_round() -> None:
    assert targets.is_transposed("transformer.h.0.attn.c_attn", "gpt2")
    assert not targets.is_transposed("transformer.h.0.attn.c_attn", "llama")


@pytest.mark.parametrize(
    ("shape", "groups", "says"),
    [
        ((8, 3, 3, 3), None, ""),
        ((8, 2, 5), None, ""),
        ((8, 1, 3, 3), None, "one input channel"),
        ((8, 1, 5), None, "one input"),
        ((8, 1, 5), 1, ""),
        ((8, 1, 5), 2, ""),
        ((8, 4, 5), 3, "no smaller"),
        ((8, 1, 5), 8, "no smaller"),
    ],
)
def test_a_kernel_of_one_channel_is_not_guessed_at(shape: tuple[int, ...], groups: int | None, says: str) -> None:
    found = targets.kernel_refusal("conv.weight", shape, groups, ())
    assert says in found
    assert bool(says) == bool(found)
