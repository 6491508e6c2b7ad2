"""What became of each request: one small record per outcome and per failed attempt, written once and never changed.

A request (base, fine-tune and settings as they are tonight, by a digest) is settled when it has an outcome, and
quarantined after two deterministic failures. Both can be told from one listing of `_state` and the few small files that
matter; nothing else is remembered between nights. Records are create-only: of two racing nights the first one's outcome
stands, and attempts number themselves.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal, TypeVar

from phlora_pipeline import storage
from phlora_pipeline.errors import NotFoundError, SourceChangedError
from phlora_pipeline.storage import ObjectInfo
from phlora_pipeline.zoo import layout

QUARANTINE = 2
"""So many deterministic failures of one request, and it is not tried again."""

OUTCOME = "outcome.json"

_ATTEMPT = re.compile(r"attempt-([1-9][0-9]{0,8})\.json")
_OUTCOMES = ("committed", "nothing_to_adapt")
_KINDS = ("failed", "changed")
_LONGEST = 4000
_READERS = 16

Record = TypeVar("Record", "Outcome", "Attempt")


@dataclass(frozen=True, slots=True)
class Outcome:
    """A request that is settled: `outcome.json`.

    Attributes:
        request: what was asked, by its digest.
        outcome: an adapter was published, or the two checkpoints were the same.
        version: of the adapter, or of the manifest that says that nothing changed.
        run: that settled it.
        ended: when, ISO 8601 in UTC.
        summary: of the manifest's rows.
        asked: what the request's digest is of, each by a digest of its own: what is another one tells why a model is due again.
    """

    request: str
    outcome: Literal["committed", "nothing_to_adapt"]
    version: str
    run: str
    ended: str
    summary: Mapping[str, Any]
    asked: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Attempt:
    """A request that was tried in vain: `attempt-<n>.json`.

    Attributes:
        request: what was asked, by its digest.
        number: of this attempt, from 1.
        kind: `failed`: it would fail again, these count for the quarantine; `changed`: its source was replaced meanwhile.
        reason, remedy: in words, one line each.
        run: that tried.
        ended: when, ISO 8601 in UTC.
    """

    request: str
    number: int
    kind: Literal["failed", "changed"]
    reason: str
    remedy: str
    run: str
    ended: str


@dataclass(frozen=True, slots=True)
class _Records:
    """Of one model, as read."""

    outcomes: Mapping[str, Outcome]
    attempts: Mapping[str, tuple[Attempt, ...]]
    problems: tuple[str, ...]


class Ledger:
    """All records under one output, as they lay there at one moment: a listing, and their contents as they are asked for.

    Attributes:
        out: URL of the output.
    """

    def __init__(self, out: str, listed: Mapping[str, tuple[ObjectInfo, ...]]) -> None:
        self.out, self._listed = out, listed
        self._read: dict[str, _Records] = {}

    @classmethod
    def read(cls, out: str) -> Ledger:
        """List the records; none is opened yet."""
        root = storage.join(out, layout.STATE)
        listed: dict[str, list[ObjectInfo]] = {}
        for info in storage.list_tree(root):
            model, _, rest = info.url.removeprefix(f"{root}/").partition("/")
            if layout.is_model(model) and _named(rest.partition("/")[2]):
                listed.setdefault(model, []).append(info)
        return cls(out, {model: tuple(infos) for model, infos in listed.items()})

    @property
    def models(self) -> tuple[str, ...]:
        """That have records, by name."""
        return tuple(sorted(self._listed))

    @property
    def problems(self) -> tuple[str, ...]:
        """Records that were met and are none, in words. They count as absent: one damaged file must not stop the night."""
        return tuple(problem for model in sorted(self._read) for problem in self._read[model].problems)

    def open(self, models: Iterable[str] | None = None) -> None:
        """Read the records of these models (None: of all) in parallel; otherwise each model's when it is asked for."""
        wanted = set(self._listed if models is None else models) & self._listed.keys() - self._read.keys()
        infos = [info for model in sorted(wanted) for info in self._listed[model]]
        with ThreadPoolExecutor(_READERS) as pool:
            told = dict(zip((info.url for info in infos), pool.map(_read, infos), strict=True))
        for model in wanted:
            self._read[model] = _sorted({info.url: told[info.url] for info in self._listed[model]})

    def outcome(self, model: str, request: str) -> Outcome | None:
        """What the request was settled with."""
        return self._of(model).outcomes.get(request)

    def attempts(self, model: str, request: str) -> tuple[Attempt, ...]:
        """Vain attempts at the request, in their order."""
        return self._of(model).attempts.get(request, ())

    def quarantined(self, model: str, request: str) -> bool:
        """Whether the request has failed so often that it is not tried again."""
        return sum(attempt.kind == "failed" for attempt in self.attempts(model, request)) >= QUARANTINE

    def due(self, model: str, request: str) -> bool:
        """Whether the request is neither settled nor quarantined."""
        return self.outcome(model, request) is None and not self.quarantined(model, request)

    def outcomes(self, model: str) -> tuple[Outcome, ...]:
        """Of all the model's requests, the newest last."""
        return tuple(sorted(self._of(model).outcomes.values(), key=lambda outcome: outcome.ended))

    def latest_outcome(self, model: str) -> Outcome | None:
        """The newest, of whichever request."""
        return next(reversed(self.outcomes(model)), None)

    def latest_attempts(self, model: str) -> tuple[Attempt, ...]:
        """All attempts at the request that was tried in vain last, in their order."""
        return max(self._of(model).attempts.values(), key=lambda tried: tried[-1].ended, default=())

    def _of(self, model: str) -> _Records:
        if model in self._listed and model not in self._read:
            self.open([model])
        return self._read.get(model, _Records({}, {}, ()))


def record_outcome(out: str, model: str, outcome: Outcome) -> Outcome:
    """Write a request's outcome, once: the one that stands is returned, which may be an earlier run's."""
    url, data = _url(out, model, outcome.request, OUTCOME), _json(outcome)
    while storage.put_new(url, data) == "different":
        standing = storage.stat(url)
        if standing is None:  # removed meanwhile, by gc
            continue
        found = _read(standing)
        if isinstance(found, Outcome):
            return found
        if storage.swap(url, data, standing):  # nobody can make anything of what stood there
            break
    return outcome


def record_attempt(
    out: str, model: str, request: str, *, kind: Literal["failed", "changed"], reason: str, remedy: str, run: str
) -> Attempt:
    """Write that a request was tried in vain, under the next free number."""
    taken = [number for info in storage.list_folder(_url(out, model, request)) if (number := _number(info))]
    for number in itertools.count(max(taken, default=0) + 1):
        attempt = Attempt(request, number, kind, _clipped(reason), _clipped(remedy), run, layout.utc_now())
        if storage.put_new(_url(out, model, request, f"attempt-{number}.json"), _json(attempt)) != "different":
            return attempt
    raise AssertionError("numbers do not end")


def retry(out: str, model: str) -> int:
    """Forget all vain attempts at a model, so that it is due again; tells how many there were."""
    attempts = [info for info in storage.list_tree(_url(out, model)) if _number(info)]
    for info in attempts:
        storage.delete(info.url)
    for folder in {info.url.rpartition("/")[0] for info in attempts}:
        storage.drop_empty_folder(folder)
    return len(attempts)


def forget(out: str, model: str, version: str) -> int:
    """Remove the outcomes that name a version which is about to go: its requests, should they come back, are due again."""
    gone = 0
    for info in storage.list_tree(_url(out, model)):
        if storage.basename(info.url) == OUTCOME:
            found = _read(info)
            if isinstance(found, Outcome) and found.version == version:
                storage.delete(info.url)
                storage.drop_empty_folder(info.url.rpartition("/")[0])
                gone += 1
    return gone


def _url(out: str, model: str, *names: str) -> str:
    return storage.join(out, layout.STATE, model, *names)


def _named(name: str) -> bool:
    return name == OUTCOME or _ATTEMPT.fullmatch(name) is not None


def _number(info: ObjectInfo) -> int:
    found = _ATTEMPT.fullmatch(storage.basename(info.url))
    return int(found[1]) if found else 0


def _read(info: ObjectInfo) -> Outcome | Attempt | str | None:
    """A record, what is wrong with it, or None where it is gone by now."""
    while True:
        try:
            data = storage.read_object(info, limit=layout.SMALL)
            break
        except (NotFoundError, SourceChangedError):
            # Removed by `retry` or gc since it was listed; maybe another one has its name by now.
            found = storage.stat(info.url)
            if found is None:
                return None
            if found.size > layout.SMALL:
                return f"{found.url} has {found.size} bytes: it is no record of ours"
            info = found
    folder = info.url.rsplit("/", 2)[1]
    record = _parsed(data, Attempt) if _number(info) else _parsed(data, Outcome)
    if record is None or record.request != folder or (isinstance(record, Attempt) and record.number != _number(info)):
        return f"{info.url} is not a record of this version's format"
    return record


def _parsed(data: bytes, kind: type[Record]) -> Record | None:
    try:
        told = json.loads(data)
        values = {item.name: told[item.name] for item in fields(kind)}
        layout.moment(values["ended"])
    except (ValueError, KeyError, TypeError):
        return None
    texts = (value for name, value in values.items() if name not in {"summary", "asked", "number"})
    plain = all(isinstance(value, str) for value in texts) and all(
        isinstance(values.get(name, {}), dict) for name in ("summary", "asked")
    )
    known = values.get("outcome", "committed") in _OUTCOMES and values.get("kind", "failed") in _KINDS
    return kind(**values) if plain and known else None


def _sorted(told: Mapping[str, Outcome | Attempt | str | None]) -> _Records:
    records = list(told.values())
    attempts = sorted(
        (item for item in records if isinstance(item, Attempt)), key=lambda item: (item.request, item.number)
    )
    return _Records(
        {item.request: item for item in records if isinstance(item, Outcome)},
        {request: tuple(tried) for request, tried in itertools.groupby(attempts, key=lambda item: item.request)},
        tuple(item for item in records if isinstance(item, str)),
    )


def _clipped(text: str) -> str:
    one_line = " ".join(text.split())
    return one_line if len(one_line) <= _LONGEST else f"{one_line[:_LONGEST]} …"


def _json(record: Outcome | Attempt) -> bytes:
    return (json.dumps(asdict(record), indent=2, sort_keys=True) + "\n").encode()
