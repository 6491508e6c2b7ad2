"""Which kinds of layers each dialect carries, as the README's table: found by planning tiny pairs, so that it cannot differ.

A row is a pair of headers with one tensor in question. It is planned for every dialect and for every model type that
`servers.toml` knows, and one that it does not. Pure.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

from phlora_pipeline import convolutions, experts, lowrank, targets
from phlora_pipeline.carry import Carry
from phlora_pipeline.checkpoint import Checkpoint, TensorRef
from phlora_pipeline.errors import RequestError
from phlora_pipeline.plan import PlanSettings, make_plan
from phlora_pipeline.safetensors_format import tensor_bytes
from phlora_pipeline.targets import Dialect, Selection

START, END = "<!-- matrix: python -m jobs.matrix -->", "<!-- end of matrix -->"
UNLISTED = "one-that-no-table-names"

_LAYER = "model.layers.0"
_PLAIN = {f"{_LAYER}.self_attn.{leaf}_proj.weight": (8, 8) for leaf in "qkvo"}
# What a reason says of one model or server; the table says it by its columns.
_PARTICULAR = re.compile(
    r"^nothing to adapt: .*?\(\d+ × | of (the unlisted )?model type '[^']*'|(?<=applied) by .*|, this is .*|;.*"
)

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class Row:
    """One kind of layer.

    Attributes:
        title: for the reader.
        tensor: the one in question.
        base: the base's tensors, this one among them.
        grown: those of the fine-tune that have another shape.
        config: of both, without its model type.
        conv1d: whether it is about model types whose layers are transformers' Conv1D, or about the others.
        stacked: whether it is about experts in one tensor, which each model type has its own way round.
        conv_groups: what the user says of the convolution.
    """

    title: str
    tensor: str
    base: Shapes
    grown: Shapes = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=lambda: {"tie_word_embeddings": False})
    conv1d: bool = False
    stacked: bool = False
    conv_groups: tuple[tuple[str, int], ...] = ()

    def shapes(self, model_type: str) -> tuple[Shapes, Shapes]:
        """The tensors of base and fine-tune."""
        base = self.base
        if self.stacked and _turned(model_type):
            base = {name: (shape[0], *shape[:0:-1]) for name, shape in base.items()}
        return base, {**base, **self.grown}

    def asked(self, model_type: str) -> str:
        """The tensor in question, as checkpoints of this type call it."""
        if self.conv_groups:
            return f"{targets.module_of(self.tensor)}.group_1_of_{self.conv_groups[0][1]}.weight"
        if not self.stacked or _turned(model_type):
            return self.tensor
        names = targets.expert_names(model_type)
        return f"{_LAYER}.{names.get('block', 'mlp')}.experts.1.{names['down']}.weight"


def _turned(model_type: str) -> bool:
    return targets.is_transposed("down_proj", model_type)


def _row(title: str, name: str, shape: tuple[int, ...], **others: Any) -> Row:
    beside = others.pop("beside", {})
    own = {name: shape} if shape and name not in beside else {}
    return Row(title, name, {**_PLAIN, **beside, **own}, **others)


_EMBEDDING, _HEAD, _VOCABULARY = "model.embed_tokens.weight", "lm_head.weight", (16, 8)
_CAUSAL = {"architectures": ["LlamaForCausalLM"]}
_UNTIED, _TIED = {**_CAUSAL, "tie_word_embeddings": False}, {**_CAUSAL, "tie_word_embeddings": True}
_BOTH = {_EMBEDDING: _VOCABULARY, _HEAD: _VOCABULARY}
_EXPERTS = {
    f"{_LAYER}.mlp.experts.{number}.{leaf}_proj.weight": (8, 8)
    for number in range(2)
    for leaf in ("gate", "up", "down")
}

ROWS = (
    _row("linear: attention", f"{_LAYER}.self_attn.q_proj.weight", (8, 8)),
    _row("linear: MLP", f"{_LAYER}.mlp.up_proj.weight", (12, 8), beside={f"{_LAYER}.mlp.gate_proj.weight": (12, 8)}),
    _row("linear: others (poolers, classifiers)", "pooler.dense.weight", (8, 8)),
    _row("fused qkv, gate and up", f"{_LAYER}.self_attn.qkv_proj.weight", (24, 8)),
    Row(
        "transformers' Conv1D (GPT-2)",
        "transformer.h.0.attn.c_attn.weight",
        {"transformer.h.0.attn.c_attn.weight": (8, 24)},
        conv1d=True,
    ),
    _row("conv1d", "encoder.conv1.weight", (8, 4, 3)),
    _row("conv2d", "encoder.conv1.weight", (8, 4, 3, 3)),
    _row("conv3d", "encoder.conv1.weight", (8, 4, 3, 3, 3)),
    _row(
        "grouped convolution, `--conv-groups`", "encoder.conv1.weight", (8, 4, 3), conv_groups=(("encoder.conv1", 2),)
    ),
    _row("depthwise convolution", "encoder.conv1.weight", (8, 1, 3)),
    _row("transposed convolution", "encoder.deconv.weight", (8, 4, 3)),
    _row("embedding", _EMBEDDING, _VOCABULARY, beside=_BOTH, config=_UNTIED),
    _row("lm_head, untied", _HEAD, _VOCABULARY, beside=_BOTH, config=_UNTIED),
    _row("embedding tied to lm_head", _EMBEDDING, _VOCABULARY, config=_TIED),
    _row(
        "embedding, grown vocabulary",
        _EMBEDDING,
        _VOCABULARY,
        beside=_BOTH,
        config=_UNTIED,
        grown=dict.fromkeys(_BOTH, (20, 8)),
    ),
    _row(
        "new rows of a grown vocabulary",
        f"{_EMBEDDING}[16:]",
        (),
        beside=_BOTH,
        config=_UNTIED,
        grown=dict.fromkeys(_BOTH, (20, 8)),
    ),
    _row("experts, a matrix each", f"{_LAYER}.mlp.experts.1.up_proj.weight", (8, 8), beside=_EXPERTS),
    _row(
        "experts, stacked in one tensor",
        f"{_LAYER}.mlp.experts.1.down_proj.weight",
        (),
        beside={f"{_LAYER}.mlp.experts.gate_up_proj": (2, 24, 8), f"{_LAYER}.mlp.experts.down_proj": (2, 8, 12)},
        stacked=True,
    ),
    _row("router", f"{_LAYER}.mlp.gate.weight", (4, 8)),
    _row("norm", f"{_LAYER}.input_layernorm.weight", (8,)),
    _row("bias", f"{_LAYER}.self_attn.q_proj.bias", (8,)),
)


@dataclass(frozen=True, slots=True)
class Cell:
    """What a dialect does with a row.

    Attributes:
        carried: model types for which the tensor is in the adapter.
        refused: the others → why.
        max_rows: of an embedding or head, more than which are refused; None without such a limit.
        whole: whether it takes `--carry all`.
    """

    carried: tuple[str, ...]
    refused: Mapping[str, str]
    max_rows: int | None = None
    whole: bool = False

    @property
    def state(self) -> str:
        """`carried`, `carried if` or `refused`."""
        if not self.carried:
            return "refused"
        return "carried if" if self.refused or self.max_rows or self.whole else "carried"

    @property
    def note(self) -> str:
        """The condition, or the reason; empty where it is simply carried."""
        if not self.carried:
            # Of a type of which the most is taken: why this, and not why anything.
            reason = self.refused.get("llama") or next(iter(self.refused.values()))
            return _PARTICULAR.sub("", reason)
        conditions = []
        if self.refused:
            # Of the unlisted ones all do, or none.
            listed = [name for name in self.refused if name != UNLISTED]
            conditions.append(
                f"the model type is not {_any(listed)}"
                if UNLISTED in self.carried
                else f"the model type is {_any(self.carried)}"
            )
        if self.whole:
            conditions.append("it is asked for: `--carry all`")
        if self.max_rows:
            conditions.append(f"it has at most {self.max_rows:,} rows")
        return " and ".join(conditions)


def _any(names: tuple[str, ...] | list[str]) -> str:
    return " or ".join(filter(None, [", ".join(names[:-1]), names[-1]]))


@cache
def cell(number: int, dialect: Dialect) -> Cell:
    """The cell of a row, by its number in `ROWS`, and a dialect."""
    row = ROWS[number]
    outcomes = {model_type: outcome(row, dialect, model_type) for model_type in _types(row, dialect)}
    whole = all(outcomes.values()) and bool(targets.server_rules(UNLISTED, dialect).carries)
    if whole:
        outcomes = {model_type: outcome(row, dialect, model_type, "all") for model_type in outcomes}
    carried = tuple(model_type for model_type, reason in outcomes.items() if not reason)
    limit = targets.server_rules(UNLISTED, dialect).max_rows if carried else None
    if limit is not None:
        many = replace(
            row, base={name: (limit + 1, *shape[1:]) for name, shape in row.base.items() if name in _BOTH} | _PLAIN
        )
        limit = limit if row.tensor in _BOTH and outcome(many, dialect, carried[0]) else None
    refused = {name: reason for name, reason in outcomes.items() if reason}
    return Cell(carried, refused, limit, whole=whole and bool(carried))


def _types(row: Row, dialect: Dialect) -> Iterator[str]:
    if not row.conv1d and targets.server_rules("", dialect).unets_only:
        yield ""  # diffusers' models have no model type
        return
    for model_type in targets.model_types():
        if targets.is_conv1d(model_type) == row.conv1d:
            yield model_type
    if not row.conv1d:
        yield UNLISTED


def outcome(row: Row, dialect: Dialect, model_type: str, carry: Carry = "none") -> str:
    """Why the row's tensor is not in an adapter for such a model; empty where it is."""
    selection = Selection(conv_groups=row.conv_groups)
    settings = PlanSettings(selection, dialect, 8, "/out/_parts", lowrank.Settings(8), carry=carry)
    config = {**row.config, "model_type": model_type}
    shapes = row.shapes(model_type)
    base, tuned = experts.apart(_headers("base", shapes[0], config), _headers("tuned", shapes[1], config))
    groups = convolutions.told(tuned, selection)
    base, tuned = convolutions.apart(base, groups), convolutions.apart(tuned, groups)
    try:
        plan = make_plan(base, tuned, settings)
    except RequestError as error:
        told = str(error)
        return told if told.startswith("nothing") else told.partition(":")[0]
    asked = row.asked(model_type)
    if asked.partition("[")[0] in plan.carried:
        return ""
    if row.stacked and asked not in tuned.tensors:
        return "experts in one tensor that cannot be told apart"
    return {**plan.left_out, **plan.unread}.get(asked, "")


def _headers(side: str, shapes: Shapes, config: Mapping[str, Any]) -> Checkpoint:
    refs = {
        name: TensorRef(name, "F32", shape, f"/{side}/model.safetensors", 0, tensor_bytes("F32", shape), side)
        for name, shape in shapes.items()
    }
    return Checkpoint(f"/{side}", refs, dict(config), side)


def markdown() -> str:
    """The table, and the notes that its cells name."""
    dialects = targets.dialects()
    notes: dict[str, int] = {}
    lines = ["| | " + " | ".join(f"`{dialect}`" for dialect in dialects) + " |", "|---" * (len(dialects) + 1) + "|"]
    for number, row in enumerate(ROWS):
        cells = [cell(number, dialect) for dialect in dialects]
        told = [f"{found.state} {_mark(notes, found.note)}".strip() for found in cells]
        lines.append(f"| {row.title} | " + " | ".join(told) + " |")
    return "\n".join([*lines, "", *(f"{number}. {note}" for note, number in notes.items())])


def _mark(notes: dict[str, int], note: str) -> str:
    return f"({notes.setdefault(note, len(notes) + 1)})" if note else ""


def insert(readme: str) -> str:
    """The README with the table of today between its two markers."""
    before, _, rest = readme.partition(START)
    _, _, after = rest.partition(END)
    return f"{before}{START}\n\n{markdown()}\n\n{END}{after}"
