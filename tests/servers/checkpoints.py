"""A tiny base that servers can serve, and fine-tunes of it as portable adapters, made by the command as a user calls it."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from tests import models

_BYTES = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"abcdefghijklmnopqrstuvwxyz"]
VOCABULARY = len(_BYTES)
WHOLE = 64
"""No smaller than any matrix, so that the adapter is the fine-tune."""

RANKS = {"whole": WHOLE, "sixteen": 16, "five": 5}
"""Fine-tune → rank of its adapter; the last is padded to 8."""

PROMPTS = [[5, 9, 77], [1, 200], [263, 262, 261, 260, 3, 4], [150]]
TOKENS = 10

_SIZES = {
    # vLLM's attention on the CPU wants heads of 32 or more.
    "hidden_size": WHOLE, "num_attention_heads": 2, "num_key_value_heads": 1, "num_hidden_layers": 2,
    "intermediate_size": 96, "vocab_size": VOCABULARY, "max_position_embeddings": 256, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
_FAMILIES = {
    "llama": ("Llama", {"tie_word_embeddings": False}),
    "llama-tied": ("Llama", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {"tie_word_embeddings": False, "head_dim": 32}),
    "mixtral": ("Mixtral", {"tie_word_embeddings": False, **_EXPERTS}),
}


@dataclass(frozen=True)
class Family:
    """Folders: a base, its fine-tunes and their portable adapters, by name."""

    base: Path
    tuned: dict[str, Path]
    adapters: dict[str, Path]


def make(kind: str, folder: Path, *, ranks: dict[str, int] = RANKS, dialect: str = "portable") -> Family:
    """Of a model type: a random base, fine-tunes in which every matrix is another, and their adapters."""
    name, settings = _FAMILIES[kind]
    model = models._build(name, "ForCausalLM", **{**_SIZES, **settings})
    base = with_tokenizer(models.save(model, folder / "base"))
    tuned, adapters = {}, {}
    for seed, (fine_tune, rank) in enumerate(ranks.items()):
        moved = models.moved(model, where=models.matrices, seed=seed, scale=0.1)
        tuned[fine_tune] = models.save(moved, folder / f"tuned-{fine_tune}")
        adapters[fine_tune] = extract(base, tuned[fine_tune], folder / fine_tune, rank=rank, dialect=dialect)
    return Family(base, tuned, adapters)


def extract(base: Path, tuned: Path, out: Path, *, rank: int, dialect: str = "portable") -> Path:
    """`phlora extract` in a process of its own; returns the adapter's folder."""
    flags = {
        "base": base, "tuned": tuned, "out": out, "rank": rank, "for": dialect, "dtype": "float32", "engine": "local",
        "device": "cpu", "threads": 1,
    }  # fmt: skip
    options = [word for flag, value in flags.items() for word in (f"--{flag}", str(value))]
    command = [sys.executable, "-m", "phlora_pipeline", "extract", *options, "--json"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr + done.stdout
    return out


def with_tokenizer(folder: Path) -> Path:
    """A tokenizer of single bytes and letters, of the form that llama.cpp's converter takes for a Llama's."""
    special = [
        {
            "id": number, "content": name, "special": True, "single_word": False, "lstrip": False, "rstrip": False,
            "normalized": False,
        }
        for number, name in enumerate(_BYTES[:3])
    ]  # fmt: skip
    model = {
        "type": "BPE", "vocab": {name: number for number, name in enumerate(_BYTES)}, "merges": [], "unk_token": "<unk>",
        "byte_fallback": True, "fuse_unk": True, "ignore_merges": False,
    }  # fmt: skip
    decoder = {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, {"type": "Fuse"}]}
    described = {"version": "1.0", "added_tokens": special, "decoder": decoder, "model": model}
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer.json").write_text(json.dumps(described))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **names}))
    return folder
