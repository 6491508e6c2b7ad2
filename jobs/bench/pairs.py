"""Pairs of bf16 weights whose ΔW has a chosen spectrum, and whole Llama-shaped checkpoints made of them.

ΔW = Q₁ΣQ₂ᵀ with Q₁, Q₂ products of Hartley transforms and random signs: orthogonal, dense, and applied in O(n log n), so
that a 32000×2048 matrix takes seconds where QR factors would take minutes. What a solver is given is
bf16(W + ΔW) − bf16(W), which has rounding noise on top (about 3e-4 of the energy at these scales), as checkpoints have;
`truth.py` measures what is optimal for that. Only `rank-16` is exact, made of small integers that bf16 holds.
"""

from __future__ import annotations

import hashlib
import json
import math
import zlib
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from jobs.demo.folders import written_aside

SPECTRA = ("power-0.35", "power-0.4", "power-0.6", "power-1.0", "flat", "rank-16", "clustered", "rounding")
"""`flat`: all σ equal. `clustered`: 24 equal σ at a time. `rounding`: an update of 1e-5 rms, lost among bf16's roundings."""

WEIGHT_RMS, UPDATE_RMS, LOST_RMS = 0.02, 0.002, 1e-5
LOW_RANK, CLUSTER = 16, 24
REVISION = 1
"""Of the recipes below: part of the names of everything that is kept on disk."""


def singular_values(spectrum: str, number: int) -> Tensor:
    """The first `number` singular values, σ₁ = 1, descending, in float64.

    >>> [round(value, 3) for value in singular_values("power-1.0", 4).tolist()]
    [1.0, 0.5, 0.333, 0.25]
    """
    index = torch.arange(number, dtype=torch.float64)
    if spectrum.startswith("power-"):
        return torch.pow(index + 1, -float(spectrum.removeprefix("power-")))
    if spectrum == "flat":
        return torch.ones_like(index)
    if spectrum == "clustered":
        return torch.pow(index // CLUSTER + 1, -0.5)
    if spectrum in {"rank-16", "rounding"}:
        return (index < LOW_RANK).double()
    raise ValueError(f"unknown spectrum {spectrum!r}; known: {', '.join(SPECTRA)}")


def with_spectrum(values: Tensor, d: int, k: int, rms: float, generator: torch.Generator) -> Tensor:
    """A dense (d, k) float32 matrix with singular values proportional to `values` and entries of this root mean square."""
    delta = torch.zeros(d, k)
    scaled = values * (rms * math.sqrt(d * k) / float(values.norm()))
    delta.diagonal().copy_(scaled)
    for dim in (0, 1, 0, 1):
        signs = torch.randint(0, 2, (delta.shape[dim],), generator=generator).mul_(2).sub_(1).float()
        delta *= signs.unsqueeze(1 - dim)
        delta = _hartley(delta, dim)
    return delta


def _hartley(x: Tensor, dim: int) -> Tensor:
    """The discrete Hartley transform along `dim`: real, orthogonal and its own inverse."""
    found = torch.fft.fft(x, dim=dim)
    return torch.sub(found.real, found.imag).div_(math.sqrt(x.shape[dim]))


def weight_pair(spectrum: str, d: int, k: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Base and fine-tuned weight, (d, k) bf16 each; the same for the same arguments."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"{spectrum} {d} {k} {seed}".encode()))
    if spectrum == "rank-16":
        return _exact_low_rank(d, k, generator)
    base = (WEIGHT_RMS * torch.randn(d, k, generator=generator)).bfloat16()
    rms = LOST_RMS if spectrum == "rounding" else UPDATE_RMS
    delta = with_spectrum(singular_values(spectrum, min(d, k)), d, k, rms, generator)
    return base, (base.float() + delta).bfloat16()


def _exact_low_rank(d: int, k: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Multiples of 2⁻¹⁰ below 256 of them, which bf16 holds exactly: ΔW is a product of two matrices of ±1."""
    rank = min(LOW_RANK, d, k)
    B, A = (torch.randint(0, 2, shape, generator=generator).mul_(2).sub_(1).float() for shape in ((d, rank), (rank, k)))
    base = (20 * torch.randn(d, k, generator=generator)).round_().clamp_(-127, 127)
    return (base / 1024).bfloat16(), ((base + B @ A) / 1024).bfloat16()


def llama_shapes(layers: int, hidden: int, inner: int, vocab: int) -> dict[str, tuple[int, ...]]:
    """Every tensor of a Llama with grouped queries, as TinyLlama has them: an eighth as many keys as queries."""
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, hidden)}
    for layer in range(layers):
        at = f"model.layers.{layer}"
        for name, rows in (("q", hidden), ("k", hidden // 8), ("v", hidden // 8), ("o", hidden)):
            found[f"{at}.self_attn.{name}_proj.weight"] = (rows, hidden)
        found |= {f"{at}.mlp.{name}_proj.weight": (inner, hidden) for name in ("gate", "up")}
        found[f"{at}.mlp.down_proj.weight"] = (hidden, inner)
        found |= {f"{at}.{name}_layernorm.weight": (hidden,) for name in ("input", "post_attention")}
    return found | {"model.norm.weight": (hidden,), "lm_head.weight": (vocab, hidden)}


def llama_config(layers: int, hidden: int, inner: int, vocab: int) -> dict[str, Any]:
    """A config.json that transformers, and so mergekit, accepts."""
    head = min(64, hidden // 8)
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "bfloat16", "hidden_act": "silu",
        "hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers, "vocab_size": vocab,
        "num_attention_heads": hidden // head, "num_key_value_heads": hidden // 8 // head, "head_dim": head,
        "max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
        "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip


def llama_pair(
    root: Path, layers: int, hidden: int, inner: int, vocab: int, spectrum: str = "power-0.4"
) -> tuple[Path, Path]:
    """Folders of a base and its fine-tune under `root`, made unless they are there (a minute for four layers of 2048)."""
    config = llama_config(layers, hidden, inner, vocab)
    recipe = json.dumps([REVISION, config, spectrum], sort_keys=True)
    folder = root / f"llama-{layers}x{hidden}-{hashlib.sha256(recipe.encode()).hexdigest()[:8]}"
    if not folder.exists():
        sides: tuple[dict[str, Tensor], dict[str, Tensor]] = ({}, {})
        for seed, (name, shape) in enumerate(llama_shapes(layers, hidden, inner, vocab).items()):
            for tensors, tensor in zip(sides, _tensor_pair(spectrum, shape, seed), strict=True):
                tensors[name] = tensor
        with written_aside(folder) as aside:
            for side, tensors in zip(("base", "tuned"), sides, strict=True):
                (aside / side).mkdir()
                (aside / side / "config.json").write_text(json.dumps(config, indent=1))
                save_file(tensors, aside / side / "model.safetensors", metadata={"format": "pt"})
    return folder / "base", folder / "tuned"


def _tensor_pair(spectrum: str, shape: tuple[int, ...], seed: int) -> tuple[Tensor, Tensor]:
    if len(shape) == 2:
        return weight_pair(spectrum, shape[0], shape[1], seed)
    generator = torch.Generator().manual_seed(seed)
    return torch.ones(shape).bfloat16(), (1 + 0.01 * torch.randn(shape, generator=generator)).bfloat16()
