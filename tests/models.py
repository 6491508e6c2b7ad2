"""Tiny models of real architectures, built from their configs, and what it takes to compare them. No network."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64}
GATED = {**SIZES, "intermediate_size": 48, "num_key_value_heads": 2, "max_position_embeddings": 32}
MOE = {**GATED, "num_hidden_layers": 2, "num_experts_per_tok": 2}

MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": lambda: _build("Llama", "ForCausalLM", **GATED, tie_word_embeddings=False),
    "llama-tied": lambda: _build("Llama", "ForCausalLM", **GATED, tie_word_embeddings=True),
    "qwen2": lambda: _build("Qwen2", "ForCausalLM", **GATED, tie_word_embeddings=False),
    "bert": lambda: _build("Bert", "ForTokenClassification", **SIZES, intermediate_size=48, max_position_embeddings=32),
    "gpt2": lambda: _build("GPT2", "LMHeadModel", n_embd=32, n_layer=2, n_head=4, vocab_size=64, n_positions=32),
    "mixtral": lambda: _build("Mixtral", "ForCausalLM", **MOE, num_local_experts=4, tie_word_embeddings=False),
    "qwen3-moe": lambda: _build(
        "Qwen3Moe", "ForCausalLM", **MOE, head_dim=8, num_experts=4, moe_intermediate_size=24, tie_word_embeddings=False
    ),
}


def _build(family: str, head: str, **settings: object) -> PreTrainedModel:
    """A model of the same random weights at every call, ready to be compared: no dropout."""
    config = getattr(transformers, f"{family}Config")(**settings)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = getattr(transformers, family + head)(config)
    # Weights of real size: at the default 0.02 the layers hardly matter beside the residual stream.
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.mul_(5)
    return model.eval()


def fine_tuned(base: PreTrainedModel, *, scale: float = 0.05, where: Callable[[str, Tensor], bool] = lambda *_: True) -> PreTrainedModel:
    """A copy in which every parameter that `where` chooses has moved."""
    tuned = copy.deepcopy(base)
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if where(name, parameter):
                parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
    return tuned


def is_matrix(_name: str, parameter: Tensor) -> bool:
    """Weights that have a low-rank form, those of fused experts among them."""
    return parameter.ndim >= 2


@torch.no_grad()
def outputs(model: nn.Module) -> Tensor:
    """Logits on fixed tokens, each of the vocabulary once."""
    vocabulary = model.config.vocab_size
    tokens = torch.randperm(vocabulary, generator=torch.Generator().manual_seed(5)).reshape(4, -1)
    return model(input_ids=tokens).logits


def distance(found: Tensor, wanted: Tensor) -> float:
    """Relative, in the Frobenius norm."""
    return float((found - wanted).norm() / wanted.norm())
