"""What can be asked about a zoo in the morning: where every model stands and why, and one model's history. Reads no tensor."""

from __future__ import annotations

import datetime as dt
import difflib
from collections import Counter
from collections.abc import Collection, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any, Literal

from phlora_pipeline import storage
from phlora_pipeline.errors import ConflictError, RequestError, quoted
from phlora_pipeline.zoo import latest, layout
from phlora_pipeline.zoo.catalog import catalog
from phlora_pipeline.zoo.latest import Latest
from phlora_pipeline.zoo.standing import Standing, standings
from phlora_pipeline.zoo.state import Attempt, Ledger, Outcome
from phlora_pipeline.zoofile import ZooConfig

STATES = ("published", "unchanged", "due", "waiting", "failed", "quarantined", "blocked", "gone")
"""In the order in which they are told. `unchanged`: nothing differs from the base. `waiting`: for the end of an upload. `failed`: once; the
next night tries again. `gone`: has adapters, but is not in the zoo any more."""

_AT_ONCE = 16
_NEXT = {
    "published": "nothing to do; servers get it by phlora pull",
    "unchanged": "nothing to do: there is nothing to adapt",
    "due": "the next phlora run converts it",
    "waiting": "it is converted by the first phlora run after its upload has ended",
    "failed": "the next phlora run tries once more, and quarantines it if that fails, too",
    "quarantined": "it waits for another checkpoint or other settings, or for phlora retry",
    "blocked": "mend that in zoo.yaml or at its place",
    "gone": "its adapters stay; add its checkpoint to zoo.yaml again, or remove its folder",
}


@dataclass(frozen=True, slots=True)
class ModelStatus:
    """Where a model stands.

    Attributes:
        id: of the model.
        state: one of `STATES`.
        reason, remedy: in words; empty where there is nothing to say.
        since: when it came to be so, ISO 8601 in UTC; empty where that is not recorded.
        url: of the fine-tune.
        base: id of its base.
        serves: version that is served, whatever the state is; empty where none is.
        pinned: whether that was chosen by `phlora rollback`.
        kept: share of the update's energy that is in the published bytes.
    """

    id: str
    state: str
    reason: str = ""
    remedy: str = ""
    since: str = ""
    url: str = ""
    base: str = ""
    serves: str = ""
    pinned: bool = False
    kept: float | None = None


@dataclass(frozen=True, slots=True)
class ZooStatus:
    """Where the zoo stands.

    Attributes:
        output: where its adapters are.
        models: all, by id.
        problems: records that cannot be read, in words.
    """

    output: str
    models: tuple[ModelStatus, ...]
    problems: tuple[str, ...]

    @property
    def counts(self) -> dict[str, int]:
        """How many models are in each state that there is."""
        counted = Counter(model.state for model in self.models)
        return {state: counted[state] for state in STATES if counted[state]}

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"counts": self.counts, **asdict(self)}


@dataclass(frozen=True, slots=True)
class Event:
    """Something that has happened to a model.

    Attributes:
        at: when, ISO 8601 in UTC.
        what: `published`, `unchanged`, `failed` or `changed`.
        version: of the adapter.
        reason, remedy: in words.
        run: that did it.
    """

    at: str
    what: str
    version: str = ""
    reason: str = ""
    remedy: str = ""
    run: str = ""


@dataclass(frozen=True, slots=True)
class VersionStatus:
    """A published version: when, how large, and whether it is the one that is served."""

    version: str
    committed: str
    size: int
    served: bool


@dataclass(frozen=True, slots=True)
class Explanation:
    """One model.

    Attributes:
        status: where it stands.
        next_step: what happens next, or what to do.
        history: oldest first.
        versions: that are published, oldest first.
        newest: version that waits behind a pin; empty where none does.
    """

    status: ModelStatus
    next_step: str
    history: tuple[Event, ...]
    versions: tuple[VersionStatus, ...]
    newest: str = ""

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def status(config: ZooConfig) -> ZooStatus:
    """Where every model stands.

    Raises:
        CredentialsError, StorageError: it cannot be told.
    """
    ledger = Ledger.read(config.output)
    found = standings(catalog(config), ledger)
    there = published(config.output)
    listed = {standing.entry.id for standing in found}
    gone = [model for model in there if model not in listed]
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        pointers = dict(zip(there, pool.map(lambda model: _pointer(config.output, model), there), strict=True))
    models = [_told(standing, pointers.get(standing.entry.id)) for standing in found]
    models += [_gone(model, pointers[model]) for model in gone if pointers[model] is not None]
    return ZooStatus(config.output, tuple(sorted(models, key=lambda model: model.id)), ledger.problems)


def explain(config: ZooConfig, model: str) -> Explanation:
    """All that is known of one model.

    Raises:
        RequestError: there is no such model; names the nearest.
    """
    ledger = Ledger.read(config.output)
    entries = {entry.id: entry for entry in catalog(config)}
    there = published(config.output)
    require_known(model, {*entries, *there})
    pointer = _pointer(config.output, model)
    seen = standings([entries[model]], ledger) if model in entries else []
    told = _told(seen[0], pointer) if seen else _gone(model, pointer)
    attempts = {*ledger.latest_attempts(model), *(attempt for standing in seen for attempt in standing.attempts)}
    history = [*map(_attempt, attempts), *map(_outcome, ledger.outcomes(model))]
    versions = latest.versions(config.output, model)
    newest = pointer.newest.version if isinstance(pointer, Latest) and pointer.newest else ""
    return Explanation(
        told,
        _next_step(told),
        tuple(sorted(history, key=lambda event: event.at)),
        tuple(
            VersionStatus(item.version, _moment(item.modified), item.size, item.version == told.serves)
            for item in versions
        ),
        newest if newest != told.serves else "",
    )


def _next_step(model: ModelStatus) -> str:
    goes_on = model.state in {"due", "failed"}  # whatever is done about it
    return "; ".join(filter(None, (model.remedy, _NEXT[model.state] if goes_on or not model.remedy else "")))


def published(out: str) -> tuple[str, ...]:
    """Models that have a folder in the output, by id: told without a look at any checkpoint."""
    return tuple(sorted(filter(layout.is_model, map(storage.basename, storage.list_folders(out)))))


def require_known(model: str, known: Collection[str]) -> None:
    """Refuse a model that is not there, and name those that may be meant.

    Raises:
        RequestError: with the nearest ids.
    """
    if model in known:
        return
    near = nearest(model, known)
    raise RequestError(
        f"there is no model {quoted(model)} among {len(known)}",
        remedy=f"did you mean {' or '.join(near)}?" if near else "see phlora status for their ids",
    )


def nearest(model: str, known: Iterable[str]) -> list[str]:
    """The three ids that are likest, whatever their case.

    >>> nearest("Suport-bot", ["support-bot", "sales-bot", "llama"])
    ['support-bot', 'sales-bot']
    """
    lower = {name.lower(): name for name in known}
    return [lower[name] for name in difflib.get_close_matches(model[:100].lower(), lower, n=3, cutoff=0.5)]


def _pointer(out: str, model: str) -> Latest | ConflictError | None:
    try:
        return latest.read(out, model)
    except ConflictError as error:  # one damaged pointer must not hide the others
        return error


def _told(standing: Standing, pointer: Latest | ConflictError | None) -> ModelStatus:
    entry, outcome = standing.entry, standing.outcome
    served = pointer if isinstance(pointer, Latest) else None
    damaged = pointer if isinstance(pointer, ConflictError) else None
    kept = outcome.summary.get("written_energy") if outcome is not None else None
    return ModelStatus(
        entry.id,
        _state(standing),
        standing.reason if damaged is None else damaged.what,
        standing.remedy or (standing.attempts[-1].remedy if standing.attempts else "")
        if damaged is None
        else damaged.remedy,
        standing.since,
        entry.url,
        entry.base_id,
        served.version if served else "",
        served is not None and served.pinned,
        kept if isinstance(kept, float) else None,
    )


def _state(standing: Standing) -> str:
    if standing.state == "incomplete":
        return "waiting"
    failed = standing.state == "due" and any(attempt.kind == "failed" for attempt in standing.attempts)
    return "failed" if failed else standing.state


def _gone(model: str, pointer: Latest | ConflictError | None) -> ModelStatus:
    served = pointer if isinstance(pointer, Latest) else None
    return ModelStatus(
        model,
        "gone",
        "it has adapters, but is not in the zoo any more",
        serves=served.version if served else "",
        pinned=served is not None and served.pinned,
    )


def _attempt(attempt: Attempt) -> Event:
    return Event(attempt.ended, attempt.kind, "", attempt.reason, attempt.remedy, attempt.run)


def _outcome(outcome: Outcome) -> Event:
    what: Literal["published", "unchanged"] = "published" if outcome.outcome == "committed" else "unchanged"
    return Event(outcome.ended, what, outcome.version, run=outcome.run)


def _moment(seconds: float) -> str:
    return dt.datetime.fromtimestamp(seconds, dt.UTC).isoformat(timespec="seconds")
