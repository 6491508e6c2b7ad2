"""What will be done, decided from headers alone: which tensors, in which blocks, and which are left out and why. Pure.

No storage, no device, no engine: two opened checkpoints and the user's choices in, a `Plan` of frozen values out. Bad
pairs are refused here, before a tensor is read.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Literal

from phlora_pipeline import lowrank, targets
from phlora_pipeline.checkpoint import TORCH_DTYPES, Checkpoint, TensorRef
from phlora_pipeline.errors import RequestError
from phlora_pipeline.lowrank import routes
from phlora_pipeline.targets import Dialect, Kind, Selection, ServerRules

BLOCK_BYTES = 96 << 20
"""Cap of one block's ΔW in float32: what a worker holds, and loses if it dies."""

NUMERICS_REVISION = 2
"""Raised when results change, so that an upgrade recomputes a zoo only where it must."""

_RUNTIME_BYTES = 512 << 20
_THREADS = 8
"""Of a worker, at most by default: so many small matrices are done side by side."""

_PIECE_BYTES = 4 * lowrank.CHUNK
"""Of ΔW, where it is only measured."""

_READ_RATE = 1e9
"""Bytes per second that a worker is taken to read, for the order of tasks alone."""

_READ_DTYPES = frozenset(TORCH_DTYPES) - {"F8_E4M3", "F8_E5M2"}

Purpose = Literal["factor", "measure"]


@dataclass(frozen=True, slots=True)
class TensorPair:
    """The same weight in both checkpoints."""

    module: str
    kind: Kind
    base: TensorRef
    tuned: TensorRef

    @property
    def name(self) -> str:
        """The tensor's name."""
        return self.tuned.name

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape, the same on both sides."""
        return self.tuned.shape

    @property
    def numel(self) -> int:
        """Its number of entries."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes to read, both sides."""
        return self.base.nbytes + self.tuned.nbytes


@dataclass(frozen=True, slots=True)
class Block:
    """Tensors of one shape of one model: the unit that is stored.

    Attributes:
        id: names the part; a pure function of the model's headers.
        purpose: `factor` for weights that are adapted; `measure` for others, of which only ‖ΔW‖ is wanted.
        pairs: at most `BLOCK_BYTES` of float32 ΔW together, or a single larger one.
    """

    id: str
    purpose: Purpose
    pairs: tuple[TensorPair, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of every tensor in it."""
        return self.pairs[0].shape

    @property
    def delta_bytes(self) -> int:
        """All its ΔW in float32."""
        return 4 * sum(pair.numel for pair in self.pairs)

    @property
    def nbytes(self) -> int:
        """Bytes to read."""
        return sum(pair.nbytes for pair in self.pairs)


@dataclass(frozen=True, slots=True)
class Task:
    """The unit of work: one block, with all that a worker anywhere needs to do it.

    Attributes:
        block: what to read.
        part_url: where the result goes.
        settings: what is wanted of every factorisation.
        profile: rates of the device that it is planned for.
    """

    block: Block
    part_url: str
    settings: lowrank.Settings
    profile: lowrank.Profile

    @property
    def cost(self) -> float:
        """Seconds that it is planned to take, for the order; bytes are read at `_READ_RATE`."""
        seconds = self.block.nbytes / _READ_RATE
        if self.block.purpose == "factor":
            seconds += len(self.block.pairs) * routes.seconds(*self._problem)
        return seconds

    @property
    def flops(self) -> float:
        """Floating-point operations of the planned route."""
        return 0.0 if self.block.purpose == "measure" else len(self.block.pairs) * routes.flops(*self._problem)

    @property
    def _problem(self) -> tuple[int, int, int, lowrank.Solver, lowrank.Profile]:
        d, k = self.block.shape
        return d, k, self.settings.max_rank, self.settings.solver, self.profile

    @property
    def worker_bytes(self) -> int:
        """Peak memory of doing it: the stored bytes, ΔW, and the solver's own."""
        if self.block.purpose == "measure":
            return self.block.nbytes + _PIECE_BYTES
        d, k = self.block.shape
        beside = min(len(self.block.pairs), _THREADS) if d * k <= lowrank.BESIDE_ENTRIES else 1
        factors = 4 * min(self.settings.max_rank, d, k) * (d + k) * len(self.block.pairs)
        return self.block.nbytes + beside * routes.worker_bytes(*self._problem) + factors


@dataclass(frozen=True, slots=True)
class Plan:
    """Everything that an engine and the reducer need to know.

    Attributes:
        extraction_id: digest of what decides the parts.
        version: digest of what decides the adapter.
        tasks: largest first.
        left_out: tensors that are measured but not adapted → reason.
        unread: tensors that cannot be compared at all → reason.
        base_only: tensors of the base that the fine-tune lacks.
        matrices: every module of the fine-tune with a matrix that could carry a pair, for whole families.
        dialect: for whom the adapter is written.
        model_type: of the fine-tune, or of the base where that says more.
        modules: every module of the fine-tune.
        tied: (input embedding's module, output module) where they share one weight, whose delta goes on both.
        rank: of the adapter, as asked for; the most that it may have where a threshold of energy is asked for.
        written_rank: of the adapter, as written: the next of the servers' grid.
        rank_grid: ranks that servers compute with; empty where any is.
        energy: the threshold of each tensor's E_r, or None; the ranks are known when all tensors are factorised.
        warnings: in words, for the user.
    """

    extraction_id: str
    version: str
    tasks: tuple[Task, ...]
    left_out: Mapping[str, str]
    unread: Mapping[str, str]
    base_only: tuple[str, ...]
    matrices: Mapping[str, TensorPair]
    dialect: Dialect
    model_type: str
    modules: tuple[str, ...]
    tied: tuple[str, str] | None
    rank: int
    written_rank: int
    rank_grid: tuple[int, ...]
    energy: float | None
    warnings: tuple[str, ...]

    def of_rank(self, rank: int) -> Plan:
        """The same plan, once the rank that a threshold of energy takes is known."""
        return replace(self, rank=rank, written_rank=targets.written_rank(rank, self.rank_grid))

    @property
    def adapted(self) -> tuple[TensorPair, ...]:
        """The pairs that will be factorised, by name."""
        found = (pair for task in self.tasks if task.block.purpose == "factor" for pair in task.block.pairs)
        return tuple(sorted(found, key=lambda pair: pair.name))

    @property
    def parts_folder(self) -> str:
        """Where all its parts are, and no others."""
        return self.tasks[0].part_url.rpartition("/")[0]

    @property
    def nbytes(self) -> int:
        """Bytes of tensors to read."""
        return sum(task.block.nbytes for task in self.tasks)

    @property
    def flops(self) -> float:
        """Floating-point operations of all factorisations, by their planned routes."""
        return sum(task.flops for task in self.tasks)

    @property
    def adapter_parameters(self) -> int:
        """Numbers in the adapter, zero pairs of whole families left aside."""
        own = sum(self.written_rank * sum(pair.shape) for pair in self.adapted)
        tied = sum(
            self.written_rank * sum(pair.shape) for pair in self.adapted if self.tied and pair.module == self.tied[0]
        )
        return own + tied

    @property
    def part_bytes(self) -> int:
        """Bytes of all parts: float32 factors at max_rank."""
        factor = (task for task in self.tasks if task.block.purpose == "factor")
        return sum(
            4 * len(task.block.pairs) * min(task.settings.max_rank, *task.block.shape) * sum(task.block.shape)
            for task in factor
        )

    @property
    def worker_bytes(self) -> int:
        """Peak memory of one worker: its largest task, the next one being read, and the runtime."""
        if not self.tasks:
            return _RUNTIME_BYTES
        return (
            _RUNTIME_BYTES
            + max(task.worker_bytes for task in self.tasks)
            + min(2 * BLOCK_BYTES, max(task.block.nbytes for task in self.tasks))
        )


@dataclass(frozen=True, slots=True)
class PlanSettings:
    """The choices that shape a plan, free of where things run.

    Attributes:
        rank: of the adapter.
        factors: what is wanted of every factorisation.
        profile: rates of the device that the plan is for.
        parts_url: folder of all parts; a part goes to `<parts_url>/<extraction_id>/<block>.safetensors`.
        identity: further settings that decide the adapter's bytes (dtype, name of the base …).
    """

    selection: Selection
    dialect: Dialect
    rank: int
    parts_url: str
    factors: lowrank.Settings
    profile: lowrank.Profile = lowrank.PROFILES["cpu"]
    identity: tuple[tuple[str, str], ...] = ()


def make_plan(base: Checkpoint, tuned: Checkpoint, settings: PlanSettings) -> Plan:
    """The plan of one extraction.

    Raises:
        RequestError: different architectures, shapes that differ, or nothing to adapt: nothing has been read.
    """
    _require_same_model(base, tuned)
    rules = targets.server_rules(tuned.model_type or base.model_type, settings.dialect)
    pairs, unread = _pair(base, tuned, settings.selection)
    tied = _tied_modules(tuned if tuned.config else base, pairs)
    chosen, left_out = _choose(pairs, settings.selection, rules, tied, multimodal=_multimodal(base, tuned))
    if not chosen:
        raise _nothing_matches(left_out, unread)
    extraction_id = _digest(
        {
            "base": base.fingerprint, "tuned": tuned.fingerprint, "factor": sorted(pair.name for pair in chosen),
            "wanted": asdict(settings.factors), "numerics": NUMERICS_REVISION,
            # A profile of one's own may take other routes; the committed ones are chosen by the worker's device.
            "profile": None if settings.profile.name in lowrank.PROFILES else asdict(settings.profile),
        }
    )  # fmt: skip
    written = targets.written_rank(settings.rank, rules.rank_grid)
    version = _digest(
        {
            "extraction": extraction_id,
            "rank": settings.rank,
            "dialect": settings.dialect,
            "tied": tied,
            "model_type": rules.model_type,
            "architectures": tuned.config.get("architectures") or base.config.get("architectures"),
            **dict(settings.identity),
        }
    )
    blocks = [*_blocks("factor", chosen), *_blocks("measure", [pair for pair in pairs if pair.name in left_out])]
    folder = f"{settings.parts_url}/{extraction_id}"
    tasks = [Task(block, f"{folder}/{block.id}.safetensors", settings.factors, settings.profile) for block in blocks]
    return Plan(
        extraction_id=extraction_id,
        version=version,
        tasks=tuple(sorted(tasks, key=lambda task: (-task.cost, task.block.id))),
        left_out=left_out,
        unread=unread,
        base_only=tuple(sorted(set(base.tensors) - set(tuned.tensors))),
        matrices={
            pair.module: pair for pair in pairs if not targets.shape_refusal(pair.shape, pair.kind, pair.tuned.dtype)
        },
        dialect=settings.dialect,
        model_type=rules.model_type,
        modules=tuple(sorted({targets.module_of(name) for name in tuned.tensors})),
        tied=tied if tied and any(pair.module == tied[0] for pair in chosen) else None,
        rank=settings.rank,
        written_rank=written,
        rank_grid=rules.rank_grid,
        energy=settings.factors.energy,
        warnings=tuple(_warnings(base, tuned, settings, written, pairs)),
    )


def require_fits(plan: Plan, memory_bytes: int | None) -> None:
    """Refuse a plan whose largest task cannot fit.

    Args:
        memory_bytes: what one worker may use; None where it is not known.

    Raises:
        RequestError: with both numbers and the culprit.
    """
    if memory_bytes is None or plan.worker_bytes <= memory_bytes:
        return
    largest = max(plan.tasks, key=lambda task: task.worker_bytes)
    names = ", ".join(pair.name for pair in largest.block.pairs[:3])
    raise RequestError(
        f"it cannot fit: a worker needs {plan.worker_bytes / 2**30:.1f} GiB, {memory_bytes / 2**30:.1f} GiB are there; the largest block is {names} of shape {list(largest.block.shape)}",
        remedy="run it on a larger machine, with fewer workers, or leave the tensor out: --exclude",
    )


def _require_same_model(base: Checkpoint, tuned: Checkpoint) -> None:
    if base.model_type and tuned.model_type and base.model_type != tuned.model_type:
        raise RequestError(
            f"different architectures: the base is {base.model_type!r}, the fine-tune {tuned.model_type!r}",
            remedy="give the base that this model was fine-tuned from",
        )
    common = set(base.tensors) & set(tuned.tensors)
    if 2 * len(common) < len(tuned.tensors) or not common:
        raise RequestError(
            f"different architectures: {len(common)} of the fine-tune's {len(tuned.tensors)} tensor names are in the base"
            f" (base has {_some(set(base.tensors) - common)}; fine-tune has {_some(set(tuned.tensors) - common)})",
            remedy="give the base that this model was fine-tuned from, saved by the same library",
        )


def _pair(base: Checkpoint, tuned: Checkpoint, selection: Selection) -> tuple[list[TensorPair], dict[str, str]]:
    """Tensors that can be compared, and those that cannot."""
    pairs: list[TensorPair] = []
    unread: dict[str, str] = {}
    differing: list[str] = []
    for name, after in sorted(tuned.tensors.items()):
        before = base.tensors.get(name)
        kind = targets.kind_of(name, after.shape)
        if before is None:
            unread[name] = "not in the base"
        elif before.shape != after.shape:
            unread[name] = f"shape differs: base {list(before.shape)}, fine-tune {list(after.shape)}"
            if not selection.excludes(name):
                differing.append(f"{name} (base {list(before.shape)}, fine-tune {list(after.shape)})")
        elif {before.dtype, after.dtype} - _READ_DTYPES:
            unread[name] = f"stored as {before.dtype} and {after.dtype}: quantised weights are not dequantised yet"
        else:
            pairs.append(TensorPair(targets.module_of(name), kind, before, after))
    if differing:
        raise RequestError(
            f"shapes differ in {len(differing)} of {len(tuned.tensors)} tensors: {_some(differing)}",
            remedy="give the right base, or leave these tensors out: --exclude 'GLOB'",
        )
    return pairs, unread


def _choose(
    pairs: Sequence[TensorPair],
    selection: Selection,
    rules: ServerRules,
    tied: tuple[str, str] | None,
    *,
    multimodal: bool,
) -> tuple[list[TensorPair], dict[str, str]]:
    """Pairs that are adapted, and the reason for each that is not."""
    chosen: list[TensorPair] = []
    left_out: dict[str, str] = {}
    experts = any(pair.kind == "expert" for pair in pairs)
    for pair in pairs:
        reason = (
            (targets.EXCLUDED if selection.excludes(pair.name) else "")
            or targets.shape_refusal(pair.shape, pair.kind, pair.tuned.dtype)
            or targets.shape_refusal(pair.shape, pair.kind, pair.base.dtype)
            or selection.refusal(pair.name, pair.kind)
            or (targets.tower_refusal(pair.name) if multimodal else "")
            or (_shadowed_refusal(pair) if experts else "")
            or targets.server_refusal(pair.kind, pair.shape, rules)
            or _tied_refusal(pair, rules, tied)
        )
        if reason:
            left_out[pair.name] = reason
        else:
            chosen.append(pair)
    return chosen, left_out


def _shadowed_refusal(pair: TensorPair) -> str:
    """Dense layers and shared experts beside routed ones: PEFT on transformers 5 takes their names for the experts'."""
    leaf = pair.module.rpartition(".")[2]
    if pair.kind == "mlp" and leaf in {"gate_proj", "up_proj", "down_proj"}:
        return f"PEFT takes every {leaf} of a model with experts for one of them, and would drop this one"
    return ""


def _tied_refusal(pair: TensorPair, rules: ServerRules, tied: tuple[str, str] | None) -> str:
    if tied is None:
        return ""
    source, output = tied
    if pair.module == output:
        return f"tied to {source}, whose delta goes on both" if rules.tied_embeddings else f"tied to {source}"
    if pair.module == source and not output:
        return "tied to an output that the checkpoint does not name; half of a tied delta is worse than none"
    if pair.module == source and not rules.tied_embeddings:
        return f"tied to {output}: not every server takes the delta on both ends; --for peft adapts both"
    return ""


def _tied_modules(configured: Checkpoint, pairs: Sequence[TensorPair]) -> tuple[str, str] | None:
    """The input embedding and the output module of a causal model that share one weight, or None.

    Tied is what `tie_word_embeddings` says, or what a checkpoint without an output matrix of its own leaves no doubt of.
    """
    causal = any("ForCausalLM" in name or "LMHead" in name for name in configured.architectures)
    tied = any(
        part in name
        for name in configured.architectures
        for part in ("MaskedLM", "PreTraining", "ConditionalGeneration")
    )
    inputs = [pair for pair in pairs if pair.kind == "embedding"]
    if not inputs or not (causal or tied) or configured.config.get("tie_word_embeddings") is False:
        return None
    # Positions are embedded too (GPT-2's wpe); the vocabulary has the most rows.
    source = max(inputs, key=lambda pair: pair.shape[0]).module
    outputs = [pair.module for pair in pairs if pair.kind == "lm_head"]
    if not outputs:
        # Decoders that call their input so call their output lm_head; elsewhere the name is anybody's guess.
        return source, "lm_head" if causal and source.rpartition(".")[2] in {"embed_tokens", "wte"} else ""
    return (source, outputs[0]) if configured.config.get("tie_word_embeddings") is True else None


def _blocks(purpose: Purpose, pairs: Sequence[TensorPair]) -> list[Block]:
    by_shape: dict[tuple[int, ...], list[TensorPair]] = {}
    for pair in sorted(pairs, key=lambda pair: pair.name):
        by_shape.setdefault(pair.shape, []).append(pair)
    blocks = []
    for shape, same in sorted(by_shape.items()):
        each = max(1, BLOCK_BYTES // max(4 * math.prod(shape), 1))
        for start in range(0, len(same), each):
            chunk = tuple(same[start : start + each])
            digest = _digest([purpose, *(pair.name for pair in chunk)])[:12]
            blocks.append(Block(f"{purpose}-{'x'.join(map(str, shape)) or 'scalar'}-{digest}", purpose, chunk))
    return blocks


def _nothing_matches(left_out: Mapping[str, str], unread: Mapping[str, str]) -> RequestError:
    reasons: dict[str, int] = {}
    for reason in (*left_out.values(), *unread.values()):
        reasons[reason] = reasons.get(reason, 0) + 1
    most = sorted(reasons.items(), key=lambda item: (-item[1], item[0]))[:4]
    told = "; ".join(f"{count} × {reason}" for reason, count in most)
    return RequestError(
        f"nothing to adapt: no tensor is a target ({told})",
        remedy="look at phlora plan, and change --targets, --include, --exclude or --for",
    )


def _warnings(
    base: Checkpoint, tuned: Checkpoint, settings: PlanSettings, written: int, pairs: Sequence[TensorPair]
) -> Iterable[str]:
    missing = sorted(set(base.tensors) - set(tuned.tensors))
    if missing:
        yield f"{len(missing)} tensors of the base are not in the fine-tune: {_some(missing)}"
    if written != settings.rank and settings.factors.energy is None:
        yield f"rank {settings.rank} is written as {written}, zero-padded: the next rank that servers compute with"
    if _has_head(tuned, base) and any("." not in pair.module for pair in pairs if pair.kind == "embedding"):
        yield "the tensors' names lack the prefix that they have in memory under the model's head: loaders will find no module; save the whole model by save_pretrained first"
    if _multimodal(base, tuned):
        yield "a multimodal model: only its language model is adapted, and loaders may know that by other names; see that your loader reports no unexpected keys"


def _has_head(*sides: Checkpoint) -> bool:
    return any("For" in name or "LMHead" in name for side in sides for name in side.architectures)


def _multimodal(base: Checkpoint, tuned: Checkpoint) -> bool:
    return any(key in side.config for side in (base, tuned) for key in ("vision_config", "audio_config"))


def _some(names: Iterable[str], most: int = 3) -> str:
    ordered = sorted(names)
    return (
        ", ".join(ordered[:most]) + (f" and {len(ordered) - most} more" if len(ordered) > most else "")
        if ordered
        else "none"
    )


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()[:32]
