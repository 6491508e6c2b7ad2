"""Checkpoints of public models as their headers would say: in memory, or as files with a hole where the weights would be."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from phlora_pipeline.checkpoint import Checkpoint, TensorRef

SHARD_BYTES = 5 << 30
"""As `save_pretrained` cuts them."""

_ITEMSIZE = {"BF16": 2, "F16": 2, "F32": 4}


@dataclass(frozen=True, slots=True)
class Architecture:
    """The values of a `config.json` that decide names and shapes.

    Attributes:
        name: the model's id on the hub.
        experts: of each layer; 0 for a dense model, whose MLPs have `inner` rows. Otherwise each expert has.
        head_norms: whether queries and keys are normalised by weights of their own.
    """

    name: str
    model_type: str
    hidden: int
    inner: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    experts: int = 0
    head_norms: bool = False

    @property
    def config(self) -> dict[str, Any]:
        """What the planner asks of `config.json`."""
        kind = {"llama": "Llama", "qwen3_moe": "Qwen3Moe"}[self.model_type]
        return {
            "model_type": self.model_type,
            "architectures": [f"{kind}ForCausalLM"],
            "tie_word_embeddings": False,
        }

    def shapes(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Every tensor's name and shape, in the order in which the model has them."""
        yield "model.embed_tokens.weight", (self.vocab, self.hidden)
        for layer in range(self.layers):
            for name, shape in self._layer():
                yield f"model.layers.{layer}.{name}.weight", shape
        yield "model.norm.weight", (self.hidden,)
        yield "lm_head.weight", (self.vocab, self.hidden)

    def _layer(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        yield "self_attn.q_proj", (queries, self.hidden)
        yield "self_attn.k_proj", (keys, self.hidden)
        yield "self_attn.v_proj", (keys, self.hidden)
        yield "self_attn.o_proj", (self.hidden, queries)
        if self.head_norms:
            yield "self_attn.q_norm", (self.head_dim,)
            yield "self_attn.k_norm", (self.head_dim,)
        if self.experts:
            yield "mlp.gate", (self.experts, self.hidden)
        for mlp in [f"mlp.experts.{expert}" for expert in range(self.experts)] or ["mlp"]:
            yield f"{mlp}.gate_proj", (self.inner, self.hidden)
            yield f"{mlp}.up_proj", (self.inner, self.hidden)
            yield f"{mlp}.down_proj", (self.hidden, self.inner)
        yield "input_layernorm", (self.hidden,)
        yield "post_attention_layernorm", (self.hidden,)

    @property
    def parameters(self) -> int:
        """Numbers in all tensors."""
        return sum(math.prod(shape) for _, shape in self.shapes())


# Their config.json on the hub, all bf16 and untied. Of the last, every layer has experts, of moe_intermediate_size rows.
LLAMA_8B = Architecture("meta-llama/Llama-3.1-8B", "llama", 4096, 14336, 32, 32, 8, 128, 128256)
LLAMA_70B = Architecture("meta-llama/Llama-3.1-70B", "llama", 8192, 28672, 80, 64, 8, 128, 128256)
QWEN3_235B = Architecture(
    "Qwen/Qwen3-235B-A22B", "qwen3_moe", 4096, 1536, 94, 64, 4, 128, 151936, experts=128, head_norms=True
)


def checkpoint(architecture: Architecture, url: str, dtype: str = "BF16") -> Checkpoint:
    """What `open_checkpoint` makes of such a model's headers. Another URL is another checkpoint."""
    tensors: dict[str, TensorRef] = {}
    shard, start = 0, 0
    etag = hashlib.sha256(url.encode()).hexdigest()[:32]
    for name, shape in architecture.shapes():
        stop = start + _ITEMSIZE[dtype] * math.prod(shape)
        if start and stop > SHARD_BYTES:
            shard, start, stop = shard + 1, 0, stop - start
        tensors[name] = TensorRef(name, dtype, shape, f"{url}/model-{shard:05d}.safetensors", start, stop, etag)
        start = stop
    return Checkpoint(url, tensors, architecture.config, hashlib.sha256(f"{url} {dtype}".encode()).hexdigest())


def write(architecture: Architecture, folder: Path, dtype: str = "BF16") -> None:
    """The same as a folder that can be planned from, and takes next to no room: every weight is a hole, read as zeros."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(architecture.config))
    shards: dict[str, list[TensorRef]] = {}
    for ref in checkpoint(architecture, str(folder), dtype).tensors.values():
        shards.setdefault(Path(ref.url).name, []).append(ref)
    for name, refs in shards.items():
        told = {ref.name: {"dtype": dtype, "shape": ref.shape, "data_offsets": (ref.start, ref.stop)} for ref in refs}
        header = json.dumps(told).encode()
        with (folder / name).open("wb") as file:
            file.write(len(header).to_bytes(8, "little") + header)
            file.truncate(file.tell() + refs[-1].stop)
    index = {"weight_map": {ref.name: name for name, refs in shards.items() for ref in refs}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
