"""Tiny models of real architectures, built from their configs, and what it takes to compare them. No network."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
import transformers
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64}
GATED = {**SIZES, "intermediate_size": 48, "num_key_value_heads": 2, "max_position_embeddings": 32}
EXPERTS = {**GATED, "num_experts_per_tok": 2, "tie_word_embeddings": False}

MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": lambda: _build("Llama", "ForCausalLM", **GATED, tie_word_embeddings=False),
    "llama-tied": lambda: _build("Llama", "ForCausalLM", **GATED, tie_word_embeddings=True),
    "qwen2": lambda: _build("Qwen2", "ForCausalLM", **GATED, tie_word_embeddings=False),
    "phi3": lambda: _build("Phi3", "ForCausalLM", **GATED, tie_word_embeddings=False, pad_token_id=0, bos_token_id=1, eos_token_id=2),
    "bert": lambda: _build("Bert", "ForTokenClassification", **SIZES, intermediate_size=48, max_position_embeddings=32),
    "gpt2": lambda: _build("GPT2", "LMHeadModel", n_embd=32, n_layer=2, n_head=4, vocab_size=64, n_positions=32),
    "mixtral": lambda: _build("Mixtral", "ForCausalLM", **EXPERTS, num_local_experts=4),
    "qwen3-moe": lambda: _build("Qwen3Moe", "ForCausalLM", **EXPERTS, head_dim=8, num_experts=4, moe_intermediate_size=24),
}  # fmt: skip


STRANGERS: dict[str, Callable[[], PreTrainedModel]] = {
    "gpt-neox": lambda: _build("GPTNeoX", "ForCausalLM", **SIZES, intermediate_size=48, max_position_embeddings=32),
    "mpnet": lambda: _build("MPNet", "ForTokenClassification", **SIZES, intermediate_size=48, max_position_embeddings=40),
    "opt": lambda: _build(
        "OPT", "ForCausalLM", **SIZES, ffn_dim=48, word_embed_proj_dim=32, max_position_embeddings=40, pad_token_id=1
    ),
    "phi": lambda: _build("Phi", "ForCausalLM", **GATED),
    "deberta-v2": lambda: _build(
        "DebertaV2", "ForTokenClassification", **SIZES, intermediate_size=48, max_position_embeddings=40,
        relative_attention=True, pos_att_type=["p2c", "c2p"],
    ),
    "bert-mlm": lambda: _build("Bert", "ForMaskedLM", **SIZES, intermediate_size=48, max_position_embeddings=32),
    "dense-beside-experts": lambda: _build(
        "Qwen3Moe", "ForCausalLM", **EXPERTS, head_dim=8, num_experts=4, moe_intermediate_size=24, mlp_only_layers=[0]
    ),
}  # fmt: skip
"""Architectures in which a name alone misleads."""


def gpt_oss() -> PreTrainedModel:
    """Its experts are stacked on disk as well, gate and up interleaved, with biases."""
    plain = {"rope_type": "default", "rope_theta": 1e4}
    return _build("GptOss", "ForCausalLM", **EXPERTS, head_dim=8, num_local_experts=4, rope_parameters=plain)


_MOE = {
    **EXPERTS, "head_dim": 8, "num_local_experts": 4, "num_experts": 4, "n_routed_experts": 4, "moe_num_experts": 4, "moe_intermediate_size": 24,
    "moe_k": 2, "moe_topk": 2, "n_group": 1, "topk_group": 1, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    # One dense layer, and shared experts, where the family has such.
    "first_k_dense_replace": 1, "num_dense_layers": 1, "moe_layer_start_index": 1, "n_shared_experts": 1, "num_shared_experts": 1,
    "moe_num_shared_experts": 1, "shared_expert_intermediate_size": 24,
    "kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
    "index_topk": 4, "index_n_heads": 2, "index_head_dim": 8,
    "linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "mamba_d_state": 8, "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 1, "expert_layer_offset": 0, "use_mamba_kernels": False,
}  # fmt: skip
_OF_TYPE = {
    "qwen3_next": {"layer_types": ["linear_attention", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 0},
}


def moe(model_type: str) -> PreTrainedModel:
    """A model of any type with experts: of the settings above those that its config knows."""
    family = transformers.AutoConfig.for_model(model_type).__class__
    known = set().union(*(getattr(ancestor, "__annotations__", {}) for ancestor in family.__mro__))
    # Of attention over a compressed cache, each head has keys of its own.
    heads = {"num_key_value_heads": 4} if "kv_lora_rank" in known else {}
    settings = {**_MOE, **heads, **_OF_TYPE.get(model_type, {})}
    config = family(**{name: value for name, value in settings.items() if name in known})
    return _filled(lambda: transformers.AutoModelForCausalLM.from_config(config))


def _build(family: str, head: str, **settings: object) -> PreTrainedModel:
    """The same random weights at every call; `eval`, since dropout cannot be compared."""
    config = getattr(transformers, f"{family}Config")(**settings)
    return _filled(lambda: getattr(transformers, family + head)(config))


def _filled(make: Callable[[], PreTrainedModel]) -> PreTrainedModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = make()
    # Weights of a trained model's size: with the initial 0.02 the layers hardly count beside the residual stream.
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.mul_(5)
    return model.eval()


def moved(
    base: PreTrainedModel, *, where: Callable[[str, Tensor], bool], scale: float = 0.05, seed: int = 11
) -> PreTrainedModel:
    """A copy in which every parameter that `where` chooses by name and value is another one."""
    tuned = copy.deepcopy(base)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if where(name, parameter):
                parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
    return tuned


def everything(_name: str, _parameter: Tensor) -> bool:
    return True


def matrices(_name: str, parameter: Tensor) -> bool:
    """What has a low-rank form; fused experts are stacks of matrices in memory, and matrices on disk."""
    return parameter.ndim >= 2


def save(model: PreTrainedModel, folder: Path, *, as_in_memory: bool = False) -> Path:
    """As everybody saves a model; or with its experts stacked, as transformers 5 holds them."""
    model.save_pretrained(folder, save_original_format=not as_in_memory)
    return folder


def with_tensors_of(base: Path, tuned: Path, names: Iterable[str], out: Path) -> Path:
    """The base's checkpoint with some of the fine-tune's tensors in it, by their names on disk."""
    out.mkdir()
    (out / "config.json").write_bytes((base / "config.json").read_bytes())
    tensors, others = load_file(base / "model.safetensors"), load_file(tuned / "model.safetensors")
    save_file(
        {**tensors, **{name: others[name] for name in names}}, out / "model.safetensors", metadata={"format": "pt"}
    )
    return out


def adapted(base: nn.Module, adapter: Path) -> PeftModel:
    """The base with the adapter, by PEFT's own loader, unmerged; the base given stays as it is."""
    return PeftModel.from_pretrained(copy.deepcopy(base), str(adapter)).eval()


def loaded(base: nn.Module, adapter: Path) -> PeftModel:
    """By PEFT, which has a place for every key and a key for every place: it drops and makes up keys without an error."""
    model = adapted(base, adapter)
    keys = model.load_adapter(str(adapter), "again")
    assert (keys.missing_keys, keys.unexpected_keys) == ([], [])
    return model


@torch.no_grad()
def outputs(model: nn.Module) -> Tensor:
    """Logits on fixed tokens: each of the vocabulary once."""
    vocabulary = model.config.vocab_size
    tokens = torch.randperm(vocabulary, generator=torch.Generator().manual_seed(5)).reshape(4, -1)
    return model(input_ids=tokens).logits


def distance(found: Tensor, wanted: Tensor) -> float:
    """Relative, in the Frobenius norm."""
    return float((found - wanted).norm() / wanted.norm())
