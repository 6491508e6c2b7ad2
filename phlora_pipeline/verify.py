"""Is an adapter what it claims to be? Measured from the written bytes, against both checkpoints, one module at a time.

Loaders do not ask: PEFT drops keys that fit no module without a word, vLLM serves the base model for a wrong path. So
the key sets are compared here, as the dialect's loaders would, and the energy of each pair is measured anew.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from phlora_pipeline import (
    adapter,
    experts,
    loaders,
    lowrank,
    manifest,
    names,
    reducer,
    storage,
    targets,
    verify_kept,
)
from phlora_pipeline.checkpoint import Checkpoint, TensorRef, open_checkpoint, open_file, read_tensors
from phlora_pipeline.errors import NotFoundError, RequestError
from phlora_pipeline.extract import checked_device
from phlora_pipeline.manifest import EnergyRow
from phlora_pipeline.targets import Dialect

TOLERANCE = 1e-4
"""How far the measured energy may be from the manifest's: well above rounding, well below anything that matters."""

_KEY = re.compile(
    r"base_model\.model\.(?P<module>.+)\.(?:(?P<embedding>lora_embedding_[AB])|(?P<linear>lora_[AB])\.weight)"
)
_SMALL = 64 << 20


@dataclass(frozen=True, slots=True)
class ModuleCheck:
    """One module of the adapter.

    Attributes:
        module: in the base.
        written_energy: 1 − ‖ΔW − s·BA‖²/‖ΔW‖² as measured; None where ΔW = 0.
        promised: what the manifest says; None where it says nothing.
        problem: in words; empty where all is well.
    """

    module: str
    written_energy: float | None
    promised: float | None
    problem: str


@dataclass(frozen=True, slots=True)
class Verification:
    """The checks of every module, and what is wrong with the adapter as a whole."""

    modules: tuple[ModuleCheck, ...]
    problems: tuple[str, ...]
    written_energy: float | None

    @property
    def passed(self) -> bool:
        """Whether nothing at all is wrong."""
        return not self.problems and not any(check.problem for check in self.modules)


@dataclass(frozen=True, slots=True)
class _Pair:
    down: TensorRef
    up: TensorRef
    embedding: bool
    alpha: TensorRef | None = None
    expert: int = 0
    experts: int = 1


class _Factors:
    """Reads pairs; a stack of experts once for all that are asked for one after another."""

    def __init__(self) -> None:
        self._of: list[TensorRef] = []
        self._held: list[Tensor] = []

    def read(self, pair: _Pair) -> list[Tensor]:
        """A (r, in) and B (out, r), or an embedding's."""
        if self._of != [pair.down, pair.up]:
            self._of, self._held = [pair.down, pair.up], read_tensors([pair.down, pair.up])
        if pair.experts == 1:
            return self._held
        both = zip(self._held, (True, False), strict=True)
        return [experts.of_one(held, pair.expert, pair.experts, down=down) for held, down in both]


def verify(
    base_url: str,
    tuned_url: str,
    adapter_url: str,
    *,
    dialect: Dialect | None = None,
    tolerance: float = TOLERANCE,
    device: str = "cpu",
) -> Verification:
    """Check an adapter against its two checkpoints.

    Args:
        base_url, tuned_url: the checkpoints.
        adapter_url: a PEFT folder; `energy.parquet` beside the weights, where there is one, is held to its word.
        dialect: whose loaders it is held to; None: those it was written for, by `run.json`, or PEFT.
        tolerance: of the difference between measured and promised energy.
        device: where to multiply.

    Raises:
        RequestError: one of the three cannot be read as what it should be.
    """
    where = checked_device(device)
    base, tuned = experts.apart(open_checkpoint(base_url), open_checkpoint(tuned_url))
    tuned = names.by_the_names_of(base, tuned)
    folder = storage.normalize(adapter_url)
    config = _config(folder)
    ranks = _ranks(config, folder)
    tensors, _ = open_file(storage.join(folder, adapter.WEIGHTS))
    own, problems = verify_kept.without_kept(tensors, config, base, tuned)
    kohya = config.get("format") == "kohya"
    parameters = config.get("target_parameters") or []
    pairs, more = _kohya_pairs(own, base) if kohya else _pairs(own, ranks, parameters)
    problems += more
    promised, run = _promises(folder), _run(folder)
    problems += _digest_problems(folder, run)
    problems += [] if kohya else _key_problems(pairs, config, base)
    problems += _broken_promises(pairs, promised)
    rules = targets.server_rules(tuned.model_type or base.model_type, dialect or _dialect(run))
    shapes = {name: ref.shape for name, ref in base.tensors.items()}
    problems += loaders.objections(rules, config, frozenset(pairs), shapes)
    factors = _Factors()
    measured = [
        _check(module, pair, factors, base, tuned, promised, _scale(module, pair, ranks), tolerance, where)
        for module, pair in sorted(pairs.items(), key=lambda item: (item[1].down.name, item[1].expert))
    ]
    kept, total = math.fsum(kept for _, kept, _ in measured), math.fsum(total for _, _, total in measured)
    return Verification(tuple(check for check, _, _ in measured), tuple(problems), kept / total if total else None)


def _config(folder: str) -> dict[str, Any]:
    info = storage.stat(storage.join(folder, adapter.CONFIG))
    if info is None:
        raise NotFoundError(
            f"there is no adapter at {folder}: {adapter.CONFIG} is missing",
            remedy="give the folder that phlora extract wrote",
        )
    try:
        config = json.loads(storage.read_object(info, limit=_SMALL))
    except ValueError as error:
        raise RequestError(f"{info.url} is not JSON: {error}") from error
    if not isinstance(config, dict) or (config.get("peft_type") != "LORA" and config.get("format") != "kohya"):
        raise RequestError(f"{info.url} is not the config of a LoRA adapter")
    return config


def _ranks(config: Mapping[str, Any], folder: str) -> loaders.Ranks:
    if config.get("use_dora"):
        raise RequestError(
            f"{folder} uses use_dora, which verify does not measure",
            remedy="verify adapters as phlora extract writes them",
        )
    if config.get("format") == "kohya":
        return loaders.Ranks(1, 1, {}, {}, rslora=False)  # in the file itself
    try:
        return loaders.Ranks.of(config)
    except (TypeError, ValueError) as error:
        raise RequestError(f"{folder}/{adapter.CONFIG} gives no rank and scale: {error}") from error


def _pairs(
    tensors: Mapping[str, TensorRef], ranks: loaders.Ranks, parameters: Sequence[str]
) -> tuple[dict[str, _Pair], list[str]]:
    sides: dict[str, dict[str, TensorRef]] = {}
    problems = []
    for key, ref in tensors.items():
        match = _KEY.fullmatch(key)
        if match is None:
            problems.append(f"unexpected key {key!r}: no loader knows what to do with it")
        else:
            sides.setdefault(match["module"], {})[match["embedding"] or match["linear"]] = ref
    pairs: dict[str, _Pair] = {}
    stacks = {experts.wrapper_of(name): name for name in parameters}
    for module, found in sides.items():
        if set(found) not in ({"lora_A", "lora_B"}, {"lora_embedding_A", "lora_embedding_B"}):
            problems.append(f"{module} has {', '.join(sorted(found))} without its counterpart")
            continue
        down, up = (found[name] for name in sorted(found))
        rank = ranks.rank(module)
        if module in stacks and down.shape[:1] == up.shape[1:] and not down.shape[0] % rank:
            (at, _, leaf), count = stacks[module].rpartition("."), down.shape[0] // rank
            pairs |= {
                f"{at}.{expert}.{leaf}": _Pair(down, up, embedding=False, expert=expert, experts=count)
                for expert in range(count)
            }
        elif down.shape[0] == rank == up.shape[1]:
            pairs[module] = _Pair(down, up, embedding="lora_embedding_A" in found)
        else:
            problems.append(f"{module} has {list(down.shape)} and {list(up.shape)}, {adapter.CONFIG} says rank {rank}")
    return pairs, problems


def _kohya_pairs(tensors: Mapping[str, TensorRef], base: Checkpoint) -> tuple[dict[str, _Pair], list[str]]:
    """By the names that diffusion UIs make of the base's modules."""
    modules = {adapter.kohya_name(targets.module_of(name)): targets.module_of(name) for name in base.tensors}
    found: dict[str, dict[str, TensorRef]] = {}
    for key, ref in tensors.items():
        name, _, part = key.partition(".")
        found.setdefault(name, {})[part] = ref
    pairs, problems = {}, []
    for name, parts in found.items():
        if name not in modules:
            problems.append(f"{name} is no module of the base: UIs would drop it")
        elif set(parts) != {"lora_down.weight", "lora_up.weight", "alpha"}:
            problems.append(f"{name} has {', '.join(sorted(parts))}, and not a pair with its alpha")
        elif parts["lora_down.weight"].shape[:1] != parts["lora_up.weight"].shape[1:2]:
            problems.append(f"{name} has factors of two ranks")
        else:
            pairs[modules[name]] = _Pair(
                parts["lora_down.weight"], parts["lora_up.weight"], embedding=False, alpha=parts["alpha"]
            )
    return pairs, problems


def _scale(module: str, pair: _Pair, ranks: loaders.Ranks) -> float:
    if pair.alpha is None:
        return ranks.scale(module)
    return float(read_tensors([pair.alpha])[0]) / pair.down.shape[0]


def _promises(folder: str) -> dict[str, EnergyRow]:
    url = storage.join(folder, reducer.MANIFEST)
    return {row.module: row for row in manifest.read(url)} if storage.stat(url) else {}


def _run(folder: str) -> dict[str, Any]:
    info = storage.stat(storage.join(folder, reducer.RUN))
    return reducer.run_record(info) if info else {}


def _dialect(run: Mapping[str, Any]) -> Dialect:
    named = run.get("settings", {}).get("dialect")
    return named if named in targets.dialects() else "peft"


def _digest_problems(folder: str, run: Mapping[str, Any]) -> Iterator[str]:
    """Are these the weights that the run published? Two adapters of one shape look alike to every loader."""
    weights = storage.stat(storage.join(folder, adapter.WEIGHTS))
    promised = run.get("weights", {}).get("sha256")
    if promised and weights and storage.sha256(weights) != promised:
        yield f"{adapter.WEIGHTS} is not the file that {reducer.RUN} tells of"


def _key_problems(pairs: Mapping[str, _Pair], config: Mapping[str, Any], base: Checkpoint) -> Iterator[str]:
    modules = {targets.module_of(name) for name in base.tensors}
    wanted, parameters = config.get("target_modules") or [], config.get("target_parameters") or []
    for module in sorted(pairs):
        if not _matched(module, wanted) and not _matched(experts.parameter_of(module), parameters):
            yield f"{module} is in the file but not in target_modules: PEFT would drop it without a word"
        if module not in modules and targets.kind_of(f"{module}.weight", (1, 1)) != "lm_head":
            yield f"{module} is no module of the base: loaders would drop it without a word"
    for module in sorted(modules - set(pairs)):
        if _matched(module, wanted) or _matched(experts.parameter_of(module), parameters):
            yield f"target_modules names {module}, which has no pair in the file"


def _broken_promises(pairs: Mapping[str, _Pair], promised: Mapping[str, EnergyRow]) -> Iterator[str]:
    for module, row in sorted(promised.items()):
        if row.status in {"adapted", "zero_filled"} and module not in pairs:
            yield f"the manifest says {module} is {row.status}, but the file has no pair for it"


def _matched(module: str, wanted: object) -> bool:
    """As PEFT matches: a list by whole-component suffix, a string as a regular expression."""
    if isinstance(wanted, str):
        return wanted == "all-linear" or re.fullmatch(wanted, module) is not None
    return isinstance(wanted, list) and any(module == name or module.endswith(f".{name}") for name in wanted)


def _check(
    module: str,
    pair: _Pair,
    factors: _Factors,
    base: Checkpoint,
    tuned: Checkpoint,
    promised: Mapping[str, EnergyRow],
    scale: float,
    tolerance: float,
    device: torch.device,
) -> tuple[ModuleCheck, float, float]:
    """The check, the energy that the pair keeps, and that of the module's ΔW."""
    name = f"{module}.weight"
    if name not in base.tensors:  # a tied output has no tensor of its own: its input has the delta, and the promise
        name = next(
            (
                other
                for other, ref in base.tensors.items()
                if targets.kind_of(other, ref.shape) == "embedding" and ref.shape[:1] == pair.up.shape[:1]
            ),
            name,
        )
    row = promised.get(targets.module_of(name))
    before, after = base.tensors.get(name), tuned.tensors.get(name)
    if before is None or after is None or before.shape[1:] != after.shape[1:] or len(before.shape) < 2:
        return _unmeasured(module, "the checkpoints hold no comparable matrix of this name")
    down, up = (tensor.to(device, torch.float32).flatten(1) for tensor in factors.read(pair))  # (r, in), (out, r)
    before, after = before.matrix, after.matrix
    turned = pair.embedding or targets.is_transposed(module, tuned.model_type or base.model_type)
    product = (down.mT, up.mT) if turned else (up, down)
    if (product[0].shape[0], product[1].shape[1]) != before.shape:
        return _unmeasured(
            module, f"the pair {list(down.shape)}, {list(up.shape)} does not fit the weight {list(before.shape)}"
        )
    if row and row.status in {"zero_filled", "failed"}:
        is_zero = not (down.any() and up.any())
        return _unmeasured(module, "" if is_zero else f"the manifest says {row.status}, but the pair is not zero")
    # Of a vocabulary that was grown or shrunk the shared rows; the adapter has a row for each that the base has.
    shared = min(before.shape[0], after.shape[0])
    product = (product[0][:shared], product[1])
    delta = torch.empty((shared, before.shape[1]), dtype=torch.float32, device=device)
    stored = read_tensors([before.rows(shared), after.rows(shared)])
    total = float(lowrank.form_delta(stored[0], stored[1], delta)[2])
    left = float(lowrank.sum_of_squares(delta.addmm_(*product, alpha=-scale)))
    energy = 1 - left / total if total else None
    word = row.written_energy if row else None
    return ModuleCheck(module, energy, word, _energy_problem(energy, left, word, tolerance)), total - left, total


def _unmeasured(module: str, problem: str) -> tuple[ModuleCheck, float, float]:
    return ModuleCheck(module, None, None, problem), 0.0, 0.0


def _energy_problem(energy: float | None, left: float, promised: float | None, tolerance: float) -> str:
    if energy is None:
        return "" if left == 0 else "the weight did not change, but its pair is not zero"
    if not math.isfinite(energy):
        return "its values are not finite"
    if promised is not None and abs(energy - promised) > tolerance:
        return f"keeps {energy:.6f} of the update's energy, the manifest promises {promised:.6f}"
    if promised is None and energy < -tolerance:
        return f"takes the base further from the fine-tune: energy {energy:.6f}"
    return ""
