"""Is an adapter what it claims to be? Measured from the written bytes, against both checkpoints, one module at a time.

Loaders do not ask: PEFT drops keys that fit no module without a word, vLLM serves the base model for a wrong path. So
the key sets are compared here, as the dialect's loaders would, and the energy of each pair is measured anew.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from phlora_pipeline import adapter, convolutions, experts, loaders, names, storage, targets
from phlora_pipeline.checkpoint import open_checkpoint, open_file
from phlora_pipeline.extract import checked_device
from phlora_pipeline.targets import Dialect
from phlora_pipeline.verify.check import ModuleCheck, check
from phlora_pipeline.verify.files import config_of, dialect_of, digest_problems, promises_of, ranks_of, run_of
from phlora_pipeline.verify.kept import without_kept
from phlora_pipeline.verify.keys import broken_promises, key_problems
from phlora_pipeline.verify.pairs import Factors, groups_in, kohya_pairs, pairs_of, scale_of

__all__ = ["TOLERANCE", "ModuleCheck", "Verification", "verify"]

TOLERANCE = 1e-4
"""How far the measured energy may be from the manifest's: well above rounding, well below anything that matters."""


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
        adapter_url: a PEFT folder; `energy.parquet` beside the weights, where there is one, is held to its word; that of a compressed
            adapter tells of another adapter, and not of the fine-tune.
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
    config = config_of(folder)
    ranks = ranks_of(config, folder)
    tensors, _ = open_file(storage.join(folder, adapter.WEIGHTS))
    own, problems = without_kept(tensors, config, base, tuned)
    groups = groups_in(own)
    base, tuned = convolutions.apart(base, groups), convolutions.apart(tuned, groups)
    kohya = config.get("format") == "kohya"
    parameters = config.get("target_parameters") or []
    pairs, more = kohya_pairs(own, base) if kohya else pairs_of(own, ranks, parameters)
    problems += more
    run = run_of(folder)
    promised = promises_of(folder, run)
    problems += digest_problems(folder, run)
    problems += [] if kohya else key_problems(pairs, config, base)
    problems += broken_promises(pairs, promised)
    rules = targets.server_rules(tuned.model_type or base.model_type, dialect or dialect_of(run))
    shapes = {name: ref.shape for name, ref in base.tensors.items()}
    problems += loaders.objections(rules, config, frozenset(pairs), shapes)
    factors = Factors()
    measured = [
        check(module, pair, factors, base, tuned, promised, scale_of(module, pair, ranks), tolerance, where)
        for module, pair in sorted(pairs.items(), key=lambda item: (item[1].down.name, item[1].expert))
    ]
    kept, total = math.fsum(kept for _, kept, _ in measured), math.fsum(total for _, _, total in measured)
    return Verification(tuple(check for check, _, _ in measured), tuple(problems), kept / total if total else None)
