"""Layouts and factors: what is written for whom, down to shapes, padding and orientation."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from phlora_pipeline import adapter
from phlora_pipeline.adapter import Layout, Slot
from phlora_pipeline.plan import Plan, PlanSettings, make_plan
from phlora_pipeline.targets import Selection
from tests.test_plan import SETTINGS, checkpoint, llama, of_rank
from tests.toys import LLAMA


def plan_of(shapes: dict[str, tuple[int, ...]], settings: PlanSettings = SETTINGS, **both: Any) -> Plan:
    return make_plan(checkpoint(shapes, **both), checkpoint(shapes, side="tuned", **both), settings)


def everything(plan: Plan) -> frozenset[str]:
    return frozenset(pair.name for pair in plan.adapted)


def shapes_by_key(layout: Layout) -> dict[str, tuple[int, int]]:
    return {slot.key: slot.shape for slot in layout.slots}


def test_each_module_has_a_pair_of_the_written_rank() -> None:
    made = plan_of(llama(layers=1), of_rank(5))
    shapes = shapes_by_key(adapter.make_layout(made, everything(made)))
    assert shapes["base_model.model.model.layers.0.mlp.up_proj.lora_A.weight"] == (8, 64)
    assert shapes["base_model.model.model.layers.0.mlp.up_proj.lora_B.weight"] == (128, 8)
    assert list(shapes) == sorted(shapes)
    assert len(shapes) == 2 * len(made.adapted)


def test_an_embedding_has_its_own_keys_and_is_turned() -> None:
    made = plan_of(llama(layers=1))
    shapes = shapes_by_key(adapter.make_layout(made, everything(made)))
    assert shapes["base_model.model.model.embed_tokens.lora_embedding_A"] == (8, 100)
    assert shapes["base_model.model.model.embed_tokens.lora_embedding_B"] == (64, 8)
    assert shapes["base_model.model.lm_head.lora_A.weight"] == (8, 64)


def test_a_tied_output_gets_the_embeddings_factors_as_a_linear_layer() -> None:
    shapes = {name: shape for name, shape in llama(layers=1).items() if name != "lm_head.weight"}
    unsaid = {key: value for key, value in LLAMA.items() if key != "tie_word_embeddings"}
    made = plan_of(shapes, replace(SETTINGS, dialect="peft"), config=unsaid)
    slots = {slot.key: slot for slot in adapter.make_layout(made, everything(made)).slots}
    head = slots["base_model.model.lm_head.lora_B.weight"]
    assert (head.tensor, head.side, head.shape, head.transposed) == ("model.embed_tokens.weight", "B", (100, 8), False)
    assert "base_model.model.model.embed_tokens.lora_embedding_A" in slots


def test_portable_families_are_whole_and_the_fillers_are_zero() -> None:
    made = plan_of(llama(layers=2))
    only_q = frozenset({"model.layers.1.self_attn.q_proj.weight"})
    layout = adapter.make_layout(made, only_q)
    assert layout.zero_filled == {f"model.layers.{n}.self_attn.{p}_proj" for n in (0, 1) for p in "qkv"} - {
        "model.layers.1.self_attn.q_proj"
    }
    zero = next(slot for slot in layout.slots if slot.key.endswith("0.self_attn.v_proj.lora_A.weight"))
    assert zero.tensor is None
    assert torch.equal(adapter.fill(zero, None, 8, torch.bfloat16), torch.zeros(8, 64, dtype=torch.bfloat16))


def test_peft_gets_no_fillers() -> None:
    made = plan_of(llama(layers=2), replace(SETTINGS, dialect="peft"))
    layout = adapter.make_layout(made, frozenset({"model.layers.1.self_attn.q_proj.weight"}))
    assert layout.modules == {"model.layers.1.self_attn.q_proj"}


def test_nothing_changed_means_no_slots() -> None:
    made = plan_of(llama())
    assert adapter.make_layout(made, frozenset()).slots == ()


@pytest.mark.parametrize("transposed", [False, True])
def test_filling_cuts_pads_and_turns_but_keeps_the_product(transposed: bool) -> None:
    """B̂·Â is the rank-2 cut of the delta (or its transpose), whatever padding stands around it."""
    A, B = torch.randn(4, 6), torch.randn(5, 4)  # (q, k), (d, q)
    cut = B[:, :2] @ A[:2]  # (d, k)
    sides = ("B", "A") if transposed else ("A", "B")
    inputs, outputs = (5, 6) if transposed else (6, 5)
    down = adapter.fill(
        Slot("down", (3, inputs), "w", sides[0], transposed), {"A": A, "B": B}[sides[0]], 2, torch.float32
    )
    up = adapter.fill(Slot("up", (outputs, 3), "w", sides[1], transposed), {"A": A, "B": B}[sides[1]], 2, torch.float32)
    assert down.is_contiguous()
    torch.testing.assert_close(up @ down, cut.mT if transposed else cut)


def test_factors_are_rounded_once() -> None:
    factor = torch.tensor([[1 + 2**-9 + 2**-12]])
    slot = Slot("down", (1, 1), "w", "A", False)
    assert adapter.fill(slot, factor, 1, torch.bfloat16).item() == factor.to(torch.bfloat16).item()


@pytest.mark.parametrize(
    ("dtype", "picked"), [("BF16", "bfloat16"), ("F16", "float16"), ("F32", "float32"), ("F64", "float32")]
)
def test_auto_dtype_is_the_fine_tunes_where_that_has_16_bits(dtype: str, picked: str) -> None:
    made = plan_of(llama(), dtype=dtype)
    assert adapter.pick_dtype("auto", made.adapted) == picked
    assert adapter.pick_dtype("float16", made.adapted) == "float16"


def test_the_config_is_what_every_loader_reads_the_same_way() -> None:
    made = plan_of(llama(), of_rank(5))
    config = adapter.adapter_config(made, adapter.make_layout(made, everything(made)), "org/base", ["LlamaForCausalLM"])
    assert (config["r"], config["lora_alpha"], config["use_rslora"], config["bias"]) == (8, 8, False, "none")
    assert config["modules_to_save"] is None
    assert not config["rank_pattern"]
    assert not config["alpha_pattern"]
    assert config["task_type"] == "CAUSAL_LM"
    assert config["base_model_name_or_path"] == "org/base"
    assert config["target_modules"] == [
        "embed_tokens",
        "gate_proj",
        "k_proj",
        "lm_head",
        "o_proj",
        "q_proj",
        "up_proj",
        "v_proj",
    ]


def test_an_encoder_has_no_task_type_and_an_unknown_base_no_name() -> None:
    made = plan_of(llama(), config={"model_type": "bert"})
    config = adapter.adapter_config(made, adapter.make_layout(made, everything(made)), "", ["BertModel"])
    assert config["task_type"] is None
    assert config["base_model_name_or_path"] is None


@pytest.mark.parametrize(
    ("name", "hub_id"),
    [
        ("meta-llama/Llama-3.1-8B", "meta-llama/Llama-3.1-8B"),
        ("/data/models/llama", ""),
        ("./llama", ""),
        ("../a/b", ""),
        ("llama", ""),
        ("", ""),
    ],
)
def test_a_path_never_becomes_the_bases_name(name: str, hub_id: str) -> None:
    assert adapter.base_name_from({"_name_or_path": name}) == hub_id


def test_conv1d_weights_ask_for_fan_in_fan_out() -> None:
    shapes = {"transformer.wte.weight": (99, 8), "transformer.h.0.attn.c_attn.weight": (8, 24)}
    config = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}
    made = plan_of(shapes, replace(SETTINGS, dialect="peft"), config=config)
    layout = adapter.make_layout(made, everything(made))
    assert layout.fan_in_fan_out
    assert shapes_by_key(layout)["base_model.model.transformer.h.0.attn.c_attn.lora_B.weight"] == (24, 8)


def test_selection_reaches_the_layout() -> None:
    made = plan_of(llama(), replace(SETTINGS, dialect="peft", selection=Selection(include=("*.o_proj",))))
    assert {module.rpartition(".")[2] for module in adapter.make_layout(made, everything(made)).modules} == {"o_proj"}


def test_auto_dtype_is_that_of_most_entries() -> None:
    """Not of the first tensor: a few float32 matrices in a bfloat16 checkpoint do not double the adapter."""
    made = plan_of(llama(), dtype="BF16")
    first, *others = made.adapted
    odd = replace(first, tuned=replace(first.tuned, dtype="F32"))
    assert adapter.pick_dtype("auto", [odd, *others]) == "bfloat16"
