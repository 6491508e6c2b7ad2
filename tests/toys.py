"""Toy checkpoints: small, real in form, made from chosen spectra. Shared by the tests."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "tie_word_embeddings": False}


def with_spectrum(d: int, k: int, singular_values: Tensor, *, seed: int = 0) -> Tensor:
    """A (d, k) float64 matrix with exactly these singular values."""
    generator = torch.Generator().manual_seed(seed)
    n = len(singular_values)
    U = torch.linalg.qr(torch.randn(d, n, generator=generator, dtype=torch.float64))[0]
    V = torch.linalg.qr(torch.randn(k, n, generator=generator, dtype=torch.float64))[0]
    made: Tensor = (U * singular_values.double()) @ V.mT
    return made


def llama_tensors(
    *, layers: int = 2, hidden: int = 32, kv: int = 16, inner: int = 48, vocab: int = 64
) -> dict[str, Tensor]:
    """Tensors of a small GQA Llama, float32, the same at every call."""
    generator = torch.Generator().manual_seed(7)
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (vocab, hidden),
        "lm_head.weight": (vocab, hidden),
    }
    for layer in range(layers):
        at = f"model.layers.{layer}"
        shapes |= {
            f"{at}.self_attn.q_proj.weight": (hidden, hidden),
            f"{at}.self_attn.k_proj.weight": (kv, hidden),
            f"{at}.self_attn.v_proj.weight": (kv, hidden),
            f"{at}.self_attn.o_proj.weight": (hidden, hidden),
            f"{at}.mlp.gate_proj.weight": (inner, hidden),
            f"{at}.mlp.up_proj.weight": (inner, hidden),
            f"{at}.mlp.down_proj.weight": (hidden, inner),
            f"{at}.input_layernorm.weight": (hidden,),
        }
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def fine_tuned(base: Mapping[str, Tensor], *, scale: float = 0.05, seed: int = 1) -> dict[str, Tensor]:
    """Every tensor moved a little, in its own dtype."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: (value + scale * torch.randn(value.shape, generator=generator)).to(value.dtype)
        for name, value in base.items()
    }


def save(folder: Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any] = LLAMA, *, shards: int = 1) -> Path:
    """Write a checkpoint folder, sharded by turns over `shards` files with an index, or in one file."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(dict(config)))
    if shards == 1:
        save_file(dict(tensors), folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    weight_map: dict[str, str] = {}
    for shard in range(shards):
        name = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        chosen = dict(list(tensors.items())[shard::shards])
        save_file(chosen, folder / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(chosen, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def load(folder: Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint that `save` wrote in one file."""
    found: dict[str, Tensor] = load_file(folder / "model.safetensors")
    return found
