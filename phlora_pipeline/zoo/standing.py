"""Where every model stands tonight: from listings and small files alone, no header and no tensor is read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Literal

from phlora_pipeline import checkpoint
from phlora_pipeline.config import read_profile
from phlora_pipeline.errors import ConflictError, IncompleteError, RequestError, SourceChangedError
from phlora_pipeline.lowrank import Profile
from phlora_pipeline.plan import NUMERICS_REVISION, digest_of
from phlora_pipeline.zoo import latest
from phlora_pipeline.zoo.catalog import Entry
from phlora_pipeline.zoo.state import Attempt, Ledger, Outcome
from phlora_pipeline.zoofile import ExtractSettings

State = Literal["published", "unchanged", "due", "incomplete", "quarantined", "blocked"]
"""`published`, `unchanged`: settled, the latter without an adapter, since nothing differs from the base. `due`: to be
converted. `incomplete`: its upload has not ended, it waits. `quarantined`: it has failed twice, and waits for other sources or
`phlora retry`. `blocked`: it cannot be tried: no base, or a base that cannot be read."""

_LOOKERS = 16


@dataclass(frozen=True, slots=True)
class Standing:
    """A model tonight.

    Attributes:
        entry: of the catalog.
        state: see `State`.
        request: digest of what is asked: both checkpoints as they are listed, and the settings; empty where that is not known.
        reason, remedy: in words; empty where there is nothing to say.
        since: when it came to be so, ISO 8601 in UTC; empty where that is not recorded.
        outcome: of the request, where it is settled.
        attempts: vain ones at the request.
        asked: what the request is the digest of.
    """

    entry: Entry
    state: State
    request: str = ""
    reason: str = ""
    remedy: str = ""
    since: str = ""
    outcome: Outcome | None = None
    attempts: tuple[Attempt, ...] = ()
    asked: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _Seen:
    """A checkpoint's fingerprint, or why there is none."""

    fingerprint: str = ""
    error: RequestError | SourceChangedError | None = None


def standings(entries: Iterable[Entry], ledger: Ledger) -> list[Standing]:
    """Where each entry stands, in the order given.

    Raises:
        CredentialsError, StorageError: no model can be blamed for these.
    """
    entries = list(entries)
    bases = sorted({entry.base_url for entry in entries if not entry.problem})
    with ThreadPoolExecutor(_LOOKERS, thread_name_prefix="phlora-look") as pool:
        seen = dict(zip(bases, pool.map(_look, bases), strict=True))
        tuned = list(pool.map(lambda entry: _Seen() if entry.problem else _look(entry.url), entries))
    ledger.open(entry.id for entry in entries)
    profiles = {url: read_profile(url) for url in sorted({entry.settings.profile for entry in entries}) if url}
    found = [_standing(entry, seen, looked, ledger, profiles) for entry, looked in zip(entries, tuned, strict=True)]
    with ThreadPoolExecutor(_LOOKERS, thread_name_prefix="phlora-look") as pool:
        return list(pool.map(partial(_served, ledger.out), found))


def asked_of(
    base: str, tuned: str, settings: ExtractSettings, base_name: str, profiles: Mapping[str, Profile]
) -> dict[str, str]:
    """What is asked of a model: digests of contents, so that moving a checkpoint asks for nothing new.

    Args:
        base, tuned: fingerprints by `checkpoint.look`.
        settings: all of the model's.
        base_name: what the adapter will call its base.
        profiles: by their URLs.
    """
    chosen: dict[str, object] = {name: value for name, value in settings if name not in {"preset", "profile"}}
    if settings.budget is None:
        del chosen["budget"]  # it came later than many a zoo: whoever has none asks for nothing new
    profile = asdict(profiles[settings.profile]) if settings.profile else None  # by what it says
    return {
        "base": base,
        "checkpoint": tuned,
        "settings": digest_of({**chosen, "profile": profile, "base_name": base_name}),
        "revision of the numerics": str(NUMERICS_REVISION),
    }


def request_id(asked: Mapping[str, str]) -> str:
    """The digest of all that is asked."""
    return digest_of(dict(asked))


def as_opened(standing: Standing, base: str, tuned: str) -> Standing:
    """The request for two checkpoints as they were opened: they may have been replaced since they were looked at.

    Args:
        standing: of the model.
        base, tuned: `Checkpoint.listed`.
    """
    asked = {**standing.asked, "base": base, "checkpoint": tuned}
    return replace(standing, request=request_id(asked), asked=asked)


def _look(url: str) -> _Seen:
    try:
        return _Seen(checkpoint.look(url))
    except (RequestError, SourceChangedError) as error:
        return _Seen(error=error)


def _standing(
    entry: Entry, bases: Mapping[str, _Seen], tuned: _Seen, ledger: Ledger, profiles: Mapping[str, Profile]
) -> Standing:
    if entry.problem:
        return Standing(entry, "blocked", reason=entry.problem)
    base = bases[entry.base_url]
    if base.error is not None:
        waits = isinstance(base.error, IncompleteError | SourceChangedError)
        return Standing(
            entry, "incomplete" if waits else "blocked", reason=f"its base: {base.error.what}", remedy=base.error.remedy
        )
    if tuned.error is not None:
        waits = isinstance(tuned.error, IncompleteError | SourceChangedError)
        return Standing(entry, "incomplete" if waits else "blocked", reason=tuned.error.what, remedy=tuned.error.remedy)
    asked = asked_of(base.fingerprint, tuned.fingerprint, entry.settings, entry.base_name, profiles)
    request = request_id(asked)
    outcome, attempts = ledger.outcome(entry.id, request), ledger.attempts(entry.id, request)
    last = attempts[-1] if attempts else None
    if outcome is not None:
        state: State = "published" if outcome.outcome == "committed" else "unchanged"
        return Standing(entry, state, request, since=outcome.ended, outcome=outcome, attempts=attempts, asked=asked)
    if ledger.quarantined(entry.id, request) and last is not None:
        remedy = f"{last.remedy}; then replace the checkpoint, or: phlora retry" if last.remedy else "phlora retry"
        return Standing(
            entry, "quarantined", request, last.reason, f"{remedy} ZOO {entry.id}", last.ended, None, attempts, asked
        )
    why = _why_due(ledger.latest_outcome(entry.id), asked, last)
    return Standing(entry, "due", request, why, since=last.ended if last else "", attempts=attempts, asked=asked)


def _served(out: str, standing: Standing) -> Standing:
    """What was published, and is not what the pointer says, is due again: its adapter stands, and only has to be served.

    So it is where a checkpoint or a setting is again what it was before the last change, or where a pointer was lost.
    """
    outcome = standing.outcome
    if standing.state != "published" or outcome is None:
        return standing
    try:
        pointer = latest.read(out, standing.entry.id)
    except ConflictError:  # `phlora status` says so, and nothing can be published over it
        return standing
    newest = pointer and latest.newest(pointer)
    if newest is not None and (newest.version == outcome.version or newest.request == standing.request):
        return standing
    why = "another version has been served since" if newest else "nothing is served"
    return replace(standing, state="due", reason=f"published {outcome.ended[:10]}, but {why}", since="", outcome=None)


def _why_due(before: Outcome | None, asked: Mapping[str, str], last: Attempt | None) -> str:
    if last is not None:
        told = "failed" if last.kind == "failed" else "its source changed while it was read"
        return f"tried before, {told}: {last.reason}"
    if before is None:
        return "new"
    others = [name for name, digest in asked.items() if before.asked.get(name) != digest]
    return f"changed since {before.ended[:10]}: {', '.join(others) or 'what is asked'}"
