"""From a tensor's name and shape to its module and kind, and whether it has a low-rank form at all."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Literal

Kind = Literal[
    "attention", "mlp", "expert", "router", "embedding", "lm_head", "linear", "conv", "norm", "bias", "other"
]
_NO_MODULE = "not the 2-D weight of a module that loaders find and apply by its name"
_UNKNOWN_STACK = "experts in one tensor that cannot be told apart: its layout is not known for this type of model"
MATRIX_KINDS: frozenset[Kind] = frozenset(
    {"attention", "mlp", "expert", "router", "embedding", "lm_head", "linear", "conv"}
)
_EMBEDDING = re.compile(
    r"^(embed_tokens|embed_in|tokens_embed|positions_embed|embed(ding)?s?|wte|wpe|shared|relative_attention_bias)$|_embeddings?$"
)
# Looked up by a forward of their own (OPT, BART, Whisper), by none (DeBERTa), under another name in memory (GPT-NeoX), or as
# a bare weight by the forward around them (Mamba): a LoRA beside them fails, or is never asked.
_TABLE = re.compile(r"^(embed_positions|rel_embeddings|embed_out|dt_proj)$")
_OWN_NAME = re.compile(r"(^|\.)(embed_positions|rel_embeddings|dt_proj)\.weight$")
_HEAD = re.compile(r"(^|\.)(lm_head|output_projection|output_layer)$|^output$")
_TOWER = re.compile(r"(^|\.)(vision\w*|visual|audio\w*|image\w*|multi_modal_projector|mm_projector|connector)\.")
_EXPERT = re.compile(r"\.experts\.\d+\.")
_STACKED = re.compile(r"(^|\.)experts\.[a-z]\w*(\.weight)?$|_moe\.(in|out)put_linear(\.weight)?$")
_ROUTER = re.compile(r"\.(gate|router|router\.layer|shared_expert_gate)$")
_NORM = re.compile(r"(norm\w*|(^|_)ln(_\w+)?\d*)$", re.IGNORECASE)
# Nothing but the name or the bias tells: a transposed kernel is (in, out, height …), and its bias as long as out.
_TRANSPOSED = re.compile(r"de_?conv|conv_?(\dd_?)?transpose|transposed?_?conv", re.IGNORECASE)
_KEEP = "; --for peft --carry all keeps it whole"
_ATTENTION = re.compile(
    r"(^|\.)(self_?attn\w*|\w*attention\w*|attn\w*)\.|(^|\.)([qkvo]_proj|qkv(_proj)?|query_key_value|w[qkvo]|W_pack|query|key|value)$"
)
_MLP = re.compile(
    r"(^|\.)(mlp|feed_?forward|ffn?|intermediate|block_sparse_moe|shared_expert)\.|(^|\.)(gate_proj|up_proj|down_proj|gate_up_proj|fc\d|w[123]|lin[12]|dense_\w+)$|\.layers?\.\d+\.output\.dense$"
)


def module_of(name: str) -> str:
    """A tensor's module, in PEFT's meaning: its name without `.weight`.

    >>> module_of("model.layers.0.self_attn.q_proj.weight")
    'model.layers.0.self_attn.q_proj'
    """
    return name.removesuffix(".weight")


@lru_cache(1 << 16)  # fine-tunes of one base have the same names
def kind_of(name: str, shape: Sequence[int]) -> Kind:
    """What kind of layer a tensor belongs to.

    >>> kind_of("model.layers.0.self_attn.q_proj.weight", (64, 64)), kind_of("lm_head.weight", (1000, 64))
    ('attention', 'lm_head')
    """
    if name.endswith((".bias", "_bias")):
        return "bias"
    module = module_of(name)
    leaf = module.rpartition(".")[2]
    if len(shape) < 2:
        return "norm" if _NORM.search(leaf) else "other"
    if len(shape) == 3 and _STACKED.search(name):
        return "expert"
    if not name.endswith(".weight") or _TABLE.match(leaf):
        return "other"
    if len(shape) > 2:
        return "conv" if len(shape) <= 5 else "other"
    return _matrix_kind(module, leaf)


def _matrix_kind(module: str, leaf: str) -> Kind:
    if _HEAD.search(module):
        return "lm_head"
    if _EMBEDDING.search(leaf):
        return "embedding"
    if _EXPERT.search(module):
        return "expert"
    if _ROUTER.search(module):
        return "router"
    if _ATTENTION.search(module):
        return "attention"
    return "mlp" if _MLP.search(module) else "linear"


def shadowed(module: str, kind: Kind) -> bool:
    """Whether PEFT takes a module of a model with experts for one of them: dense layers, shared experts, gates of attention.

    On transformers 5 it turns every name of `target_modules` that ends so into the parameter that stacks the experts.

    >>> shadowed("layers.0.mlp.shared_expert.up_proj", "mlp"), shadowed("layers.0.mlp.experts.0.up_proj", "expert")
    (True, False)
    """
    return kind in {"mlp", "attention", "linear"} and module.rpartition(".")[2] in {"gate_proj", "up_proj", "down_proj"}


def has_experts(names: Iterable[str]) -> bool:
    """Whether any tensor or module is an expert's, or a stack of them."""
    return any(_EXPERT.search(name) or _STACKED.search(name) for name in names)


def keeps_whole(name: str, shape: Sequence[int]) -> bool:
    """Whether a tensor without a low-rank form may be a part of a module that is kept whole, where loaders know it by this name."""
    kind = kind_of(name, shape)
    return kind in {"norm", "bias"} or (kind == "other" and (len(shape) == 1 or bool(_OWN_NAME.search(name))))


def tower_refusal(name: str) -> str:
    """Why a weight beside a multimodal model's language model is not adapted; empty for the language model's own."""
    return (
        "part of a tower beside the language model, which loaders rename or leave alone" if _TOWER.search(name) else ""
    )


def shape_refusal(shape: Sequence[int], kind: Kind, dtype: str) -> str:
    """Why a tensor cannot be a LoRA target at all; empty where it can."""
    if kind in {"norm", "bias"}:
        return f"a {kind} has no low-rank form"
    if kind == "other" or len(shape) != 2:
        return _UNKNOWN_STACK if kind == "expert" else _NO_MODULE
    if dtype not in {"F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"}:
        return f"stored as {dtype}, and not in floating point"
    if 0 in shape:
        return f"empty: shape {list(shape)}"
    return ""


def kernel_refusal(name: str, shape: Sequence[int], groups: int | None, bias: Sequence[int]) -> str:
    """Why a convolution is not adapted; empty where it is.

    Args:
        name: the tensor.
        shape: (rows, channels, height …).
        groups: how many it has; None where nobody said.
        bias: shape of the bias beside it; empty where there is none.
    """
    if _TRANSPOSED.search(name) or (bias and bias[0] != shape[0]):
        return f"a transposed convolution, which PEFT does not adapt{_KEEP}"
    if groups is None:
        told = "a kernel of one input channel: depthwise or not, its shape does not tell, and PEFT's factors differ"
        return (
            f"{told}; --conv-groups 'GLOB=1' adapts it as not grouped{_KEEP.replace(';', ',')}" if shape[1] == 1 else ""
        )
    if groups > 1 and not worth_grouping(shape[0], groups):
        return f"PEFT's pair for a convolution of so many groups is no smaller than its kernel{_KEEP}"
    return ""


def worth_grouping(rows: int, groups: int) -> bool:
    """Whether PEFT's pair for a convolution of several groups is any smaller than its kernel (convolutions.py says why)."""
    return groups > 1 and groups * groups < rows


def resized(shapes: Iterable[tuple[Kind, Sequence[int], Sequence[int]]]) -> frozenset[tuple[int, int]]:
    """How the fine-tune's vocabularies were grown or shrunk: (rows in the base, rows in the fine-tune).

    Told by embeddings and output matrices; whatever else changes its rows in just that way has a row per token, too.

    Args:
        shapes: kind, shape in the base, shape in the fine-tune, of each tensor.
    """
    return frozenset(
        (base[0], tuned[0])
        for kind, base, tuned in shapes
        if kind in {"embedding", "lm_head"}
        and len(base) == len(tuned) == 2
        and base[0] != tuned[0]
        and base[1] == tuned[1]
    )
