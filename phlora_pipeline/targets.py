"""Which tensors are adapted: from a tensor's name and shape to its module, kind and orientation. Pure.

Kinds come from names and shapes, as the field has come to spell them, not from a table per architecture; what *servers*
take for a kind comes from `servers.toml`.
"""

from __future__ import annotations

import fnmatch
import re
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from importlib import resources
from typing import Any, Literal

Kind = Literal[
    "attention", "mlp", "expert", "router", "embedding", "lm_head", "linear", "conv", "norm", "bias", "other"
]
Targets = Literal["all", "linear", "paper"]
Dialect = Literal["portable", "peft", "vllm", "sglang", "nim", "gguf", "kohya"]

EXCLUDED = "excluded by --exclude"
_NO_MODULE = "not the 2-D weight of a module that loaders find and apply by its name"
_UNKNOWN_STACK = "experts in one tensor that cannot be told apart: its layout is not known for this type of model"

MATRIX_KINDS: frozenset[Kind] = frozenset(
    {"attention", "mlp", "expert", "router", "embedding", "lm_head", "linear", "conv"}
)
_TARGET_KINDS: dict[Targets, frozenset[Kind]] = {
    "all": MATRIX_KINDS,
    "linear": MATRIX_KINDS - {"embedding", "lm_head", "conv"},
    "paper": frozenset({"attention", "mlp", "expert"}),  # the paper's Appendix B
}

_EMBEDDING = re.compile(
    r"^(embed_tokens|embed_in|tokens_embed|positions_embed|embed(ding)?s?|wte|wpe|shared|relative_attention_bias)$|_embeddings?$"
)
# Looked up by a forward of their own (OPT, BART, Whisper), by none (DeBERTa), or under another name in memory (GPT-NeoX):
# a LoRA beside them fails, or is never asked.
_TABLE = re.compile(r"^(embed_positions|rel_embeddings|embed_out)$")
_HEAD = re.compile(r"(^|\.)(lm_head|output_projection|output_layer)$|^output$")
_TOWER = re.compile(r"(^|\.)(vision\w*|visual|audio\w*|image\w*|multi_modal_projector|mm_projector|connector)\.")
_EXPERT = re.compile(r"\.experts\.\d+\.")
_STACKED = re.compile(r"(^|\.)experts\.[a-z]\w*(\.weight)?$")
_ROUTER = re.compile(r"\.(gate|router|router\.layer|shared_expert_gate)$")
_NORM = re.compile(r"(norm\w*|(^|_)ln(_\w+)?\d*)$", re.IGNORECASE)
_ATTENTION = re.compile(
    r"(^|\.)(self_?attn\w*|\w*attention\w*|attn\w*)\.|(^|\.)([qkvo]_proj|qkv(_proj)?|query_key_value|w[qkvo]|W_pack|query|key|value)$"
)
_MLP = re.compile(
    r"(^|\.)(mlp|feed_?forward|ffn?|intermediate|block_sparse_moe|shared_expert)\.|(^|\.)(gate_proj|up_proj|down_proj|gate_up_proj|fc\d|w[123]|lin[12]|dense_\w+)$|\.layers?\.\d+\.output\.dense$"
)

# A server fuses these at load: where one of a group is adapted, the others must have a pair too.
_FAMILIES = (
    ("q_proj", "k_proj", "v_proj"),
    ("gate_proj", "up_proj"),
    ("query", "key", "value"),
    ("wq", "wk", "wv"),
    ("w1", "w3"),
)
_EXPERT_FAMILIES = (("gate_proj", "up_proj", "down_proj"), ("gate_up_proj", "down_proj"), ("w1", "w2", "w3"))


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


@dataclass(frozen=True, slots=True)
class ServerRules:
    """What the dialect's servers take of one model type: what each single one of them takes.

    Attributes:
        dialect: for whom.
        model_type: as in `config.json`; may be unknown or empty.
        takes: server's name → kinds of modules that it applies.
        listed: whether `servers.toml` knows the type.
        carries: kinds of tensors that may be carried whole.
        max_rows: most rows of an adapted embedding or lm_head, or None.
        max_rank: the largest rank, or None.
        rank_grid: ranks that are written, smallest first; empty where any is.
        tied_embeddings: whether a tied pair may carry its delta on both ends.
        per_tensor_ranks: whether each module may have a rank of its own.
        rslora: whether a scale over the root of the rank is read.
        target_pattern: whether `target_modules` may be a regular expression.
        unets_only: whether it is for UNets of diffusion models alone, whose adapters have kohya's keys.
        stacked_experts: whether the type's experts are taken as one parameter for all of them.
        whole_families: whether what servers fuse or stack must be whole, with zero pairs in the gaps.
    """

    dialect: Dialect
    model_type: str
    takes: Mapping[str, frozenset[Kind]]
    listed: bool
    carries: frozenset[Kind]
    max_rows: int | None
    max_rank: int | None
    rank_grid: tuple[int, ...]
    tied_embeddings: bool
    per_tensor_ranks: bool
    rslora: bool
    target_pattern: bool
    unets_only: bool
    stacked_experts: bool
    whole_families: bool

    @property
    def kinds(self) -> frozenset[Kind]:
        """Kinds of modules that every server applies."""
        return frozenset.intersection(*self.takes.values())

    def refusing(self, kind: Kind) -> str:
        """The servers that do not apply a kind, in words."""
        return ", ".join(name for name, kinds in self.takes.items() if kind not in kinds)


@cache
def server_rules(model_type: str, dialect: Dialect) -> ServerRules:
    """Rules of a dialect for a model type: what all of its servers in `servers.toml` have in common."""
    servers = [_servers()["servers"][name] for name in _servers()["dialects"][dialect]]
    grids = [frozenset(server["rank_grid"]) for server in servers if "rank_grid" in server]
    return ServerRules(
        dialect,
        model_type,
        takes={server["name"]: _taken(server, model_type) for server in servers},
        listed=model_type in model_types(),
        carries=frozenset.intersection(*(frozenset(server["carries"]) for server in servers)),
        max_rows=_least(server["max_rows"] for server in servers),
        max_rank=_least(server["max_rank"] for server in servers),
        rank_grid=tuple(sorted(frozenset.intersection(*grids))) if grids else (),
        tied_embeddings=all(server["tied"] for server in servers),
        per_tensor_ranks=all(server["per_tensor_ranks"] for server in servers),
        rslora=all(server["rslora"] for server in servers),
        target_pattern=all(server["target_pattern"] for server in servers),
        unets_only=any(server["unets_only"] for server in servers),
        stacked_experts=all(model_type in server["stacked_experts"] for server in servers),
        whole_families=any(server["whole_families"] for server in servers),
    )


def _taken(server: Mapping[str, Any], model_type: str) -> frozenset[Kind]:
    if is_conv1d(model_type) and not server["conv1d"]:
        return frozenset()
    return frozenset([*server["any_type"], *server["types"].get(model_type, ())])


def _least(limits: Iterable[int]) -> int | None:
    """The smallest limit; 0 is none."""
    return min((limit for limit in limits if limit), default=None)


@cache
def dialects() -> tuple[Dialect, ...]:
    """Every dialect, in the order of `servers.toml`."""
    return tuple(_servers()["dialects"])


@cache
def model_types() -> tuple[str, ...]:
    """Every model type of which `servers.toml` says anything."""
    named = {name for server in _servers()["servers"].values() for name in server["types"]}
    return tuple(sorted(named | set(_servers()["types"])))


def is_conv1d(model_type: str) -> bool:
    """Whether a type's layers are transformers' `Conv1D`, whatever they are called."""
    return bool(_servers()["types"].get(model_type, {}).get("conv1d"))


def is_transposed(module: str, model_type: str) -> bool:
    """Whether the checkpoint stores this matrix as (in, out), as transformers' `Conv1D` does."""
    return module.rpartition(".")[2] in _servers()["types"].get(model_type, {}).get("transposed", ())


def expert_names(model_type: str) -> Mapping[str, str]:
    """How checkpoints of single experts spell `gate`, `up` and `down`, and the `block` around the experts where it has a name of its own there."""
    plain = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}
    names: Mapping[str, str] = _servers()["types"].get(model_type, {}).get("expert_names", plain)
    return names


def takes_parameters(model_type: str, dialect: Dialect) -> bool:
    """Whether experts, stacked, and routers are adapted as parameters, not as modules."""
    return dialect == "peft" and server_rules(model_type, dialect).stacked_experts


def written_rank(rank: int, grid: Sequence[int]) -> int:
    """The rank that is written: the next of the grid, or `rank` itself where there is none.

    >>> written_rank(20, (1, 8, 16, 32)), written_rank(20, ())
    (32, 20)
    """
    return next((step for step in grid if step >= rank), rank)


@dataclass(frozen=True, slots=True)
class Selection:
    """What the user wants adapted.

    Attributes:
        targets: a named set of kinds.
        include, exclude: globs on tensor or module names. With `include`, only what matches is adapted, whatever its kind of matrix.
    """

    targets: Targets = "all"
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()

    def excludes(self, name: str) -> bool:
        """Whether `--exclude` names the tensor."""
        return any(_matches(name, pattern) for pattern in self.exclude)

    def refusal(self, name: str, kind: Kind) -> str:
        """Why a matrix is not adapted by the user's choice; empty where it is."""
        if self.excludes(name):
            return EXCLUDED
        if self.include:
            return "" if any(_matches(name, pattern) for pattern in self.include) else "not named by --include"
        return "" if kind in _TARGET_KINDS[self.targets] else f"--targets {self.targets} leaves out kind {kind}"


def server_refusal(kind: Kind, shape: Sequence[int], rules: ServerRules) -> str:
    """Why the dialect's servers would not take a matrix; empty where they do."""
    if kind not in rules.kinds:
        if rules.dialect == "peft":
            return f"PEFT does not find kind {kind} of model type {rules.model_type!r} by its name in the checkpoint"
        who = f"model type {rules.model_type!r}" if rules.listed else f"the unlisted model type {rules.model_type!r}"
        what = "a Conv1D" if is_conv1d(rules.model_type) and kind in {"attention", "mlp"} else f"kind {kind}"
        return f"{what} of {who} is not known to be applied by {rules.refusing(kind)}{_remedy(kind, rules)}"
    if kind in {"embedding", "lm_head"} and rules.max_rows is not None and shape[0] > rules.max_rows:
        return f"servers take at most {rules.max_rows} rows, this has {shape[0]}; --for peft adapts it"
    return ""


def _remedy(kind: Kind, rules: ServerRules) -> str:
    return "; --for peft adapts it" if kind in server_rules(rules.model_type, "peft").kinds else ""


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


def kernel_refusal(kernel: Sequence[int]) -> str:
    """Why a convolution is not adapted, from its kernel (channels, height …); empty where it is."""
    if kernel and kernel[0] == 1:
        return "a kernel of one input channel: grouped or not, its shape does not tell, and PEFT's factors differ"
    return ""


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


def families(modules: Iterable[str], adapted: frozenset[str]) -> frozenset[str]:
    """Modules that need a zero pair so that every family of which one member is adapted is whole.

    Families, as servers fuse and stack them: the same module in every layer, q/k/v, gate/up, and all experts with all
    their projections.

    Args:
        modules: every matrix module of the checkpoint.
        adapted: those that carry a delta.
    """
    whole = {_family_type(module) for module in adapted}
    whole |= {relative for kind_type in whole for relative in _relatives(kind_type)}
    return frozenset(module for module in modules if module not in adapted and _family_type(module) in whole)


def _family_type(module: str) -> str:
    """The module's path with every layer and expert number taken out."""
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", module)


def _relatives(kind_type: str) -> list[str]:
    parent, _, leaf = kind_type.rpartition(".")
    groups = _EXPERT_FAMILIES if ".experts." in kind_type else _FAMILIES
    return [f"{parent}.{other}" for group in groups if leaf in group for other in group]


def target_modules(adapted: frozenset[str], modules: Sequence[str]) -> list[str]:
    """`target_modules` as a list that PEFT's suffix match reads as exactly `adapted`.

    A last path component stands for all its modules where every module of that name is adapted; the others are named in
    full, since a suffix would also match a vision tower, a pooler, or a container: the `0` of `classifier.0` is a layer's, too.

    >>> target_modules(frozenset({"a.0.q", "a.1.q", "a.0.dense"}), ["a.0.q", "a.1.q", "a.0.dense", "pooler.dense"])
    ['a.0.dense', 'q']
    """
    others = {module.rpartition(".")[2] for module in modules if module not in adapted}
    others |= {part for module in modules if not module.endswith("bias") for part in module.split(".")[:-1]}
    # A component that is itself a suffix of another's path is safe: PEFT matches whole components only.
    return sorted({leaf if (leaf := module.rpartition(".")[2]) not in others else module for module in adapted})


def _matches(name: str, pattern: str) -> bool:
    return fnmatch.fnmatchcase(name, pattern) or fnmatch.fnmatchcase(module_of(name), pattern)


@cache
def _servers() -> dict[str, Any]:
    return tomllib.loads(resources.files("phlora_pipeline").joinpath("servers.toml").read_text())
