"""Places where checkpoints and adapters lie: whether they can be listed, read in ranges, and written as a night writes."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator
from functools import partial

from phlora_pipeline import storage
from phlora_pipeline.checkpoint import open_checkpoint
from phlora_pipeline.doctor.finding import Finding, Worry, examined, skipped
from phlora_pipeline.errors import (
    CredentialsError,
    NotFoundError,
    PhloraError,
    StorageError,
    UnsupportedStoreError,
)
from phlora_pipeline.storage import ByteRange, ObjectInfo
from phlora_pipeline.summary import size
from phlora_pipeline.zoo import layout
from phlora_pipeline.zoo.catalog import Entry, catalog
from phlora_pipeline.zoofile import ZooConfig, within

PROBES = "doctor"
"""Where the doctor writes, under the output's `_parts`: what a night may remove again; after a crash it is `phlora gc`'s."""

SKEW_SECONDS = 600.0
"""S3 refuses requests that are signed 15 minutes off; somewhat earlier it is time to say so."""

SLIGHT_SKEW_SECONDS = 30.0
ROOM = 1 << 30
"""Free bytes below which an output counts as full: two adapters of an 8B model."""

_NO_ANSWER = {CredentialsError.exit_code, StorageError.exit_code}
_BECAUSE = "because of the output, which is in the same store"
_WHY_ONCE = "two nights that overlap could overwrite each other's adapters"


def of_storage(config: ZooConfig) -> Iterator[Finding]:
    """All places of a zoo."""
    wrong = examined("credentials", lambda: storage.identity(config.output))
    if wrong.told:
        yield wrong
    if wrong.state == "wrong":
        yield skipped("output: list", f"because of {wrong.check}")
    else:
        wrong = examined("output: list", lambda: _listed(config.output))
        yield wrong
    yield from _of_output(config.output, wrong)
    shut = _root(config.output) if wrong.exit_code in _NO_ANSWER else ""
    yield from _of_bases(config, shut)
    yield from _of_models(config, shut)


def _of_output(out: str, wrong: Finding) -> Iterator[Finding]:
    """Whether a night could write there, unless something is wrong already. Writes three small objects under `_parts/doctor/`, and removes them."""
    # Called like a night's own, for which its role has rights by name (cluster/aws): only a latest.json may it replace.
    folder = storage.join(out, layout.PARTS, PROBES, secrets.token_hex(16))
    looks = {
        "output: create once": lambda: _once(storage.join(folder, "once"), in_parts=False),
        "output: create once, in parts": lambda: _once(storage.join(folder, "parts"), in_parts=True),
        "output: swap": lambda: _swapped(storage.join(folder, layout.LATEST)),
        "output: remove": lambda: _removed(folder),
        "output: room": lambda: _room(out),
        "clock": lambda: _clock(out),
    }
    listed = wrong.state != "wrong"
    for check, look in looks.items():
        # Who is not let in, or gets no answer, is told so once and not nine times.
        if wrong.state == "wrong":
            yield skipped(check, f"because of {wrong.check}")
            continue
        found = examined(check, look)
        yield found
        if found.exit_code in _NO_ANSWER and check != "clock":
            wrong = found
    if listed and wrong.state == "wrong":
        _tidied(folder)


def _of_bases(config: ZooConfig, shut: str) -> Iterator[Finding]:
    """Whether each base is there, and whole: by its listing and headers, read in ranges. `shut`: a bucket that lets nobody in."""
    for name, base in config.bases.items():
        if _root(base.url) == shut:
            yield skipped(f"base {name}", _BECAUSE)
        else:
            yield examined(f"base {name}", partial(_base, base.url))


def _of_models(config: ZooConfig, shut: str) -> Iterator[Finding]:
    """Whether the fine-tunes can be listed and read: one of each place."""
    if shut in {_root(place.prefix) for place in config.discover} | {_root(model.url) for model in config.models}:
        yield skipped("models: list", _BECAUSE)
        return
    entries: list[Entry] = []

    def listed() -> str | Worry:
        entries.extend(catalog(config))
        lost = [entry for entry in entries if entry.problem]
        told = f"{len(entries)} fine-tunes are listed"
        if not entries:
            return Worry(told, "list some under models, or give their place under discover")
        return Worry(f"{told}; {len(lost)} cannot be tried, {lost[0].id}: {lost[0].problem}", "see phlora status") if lost else told  # fmt: skip

    listing = examined("models: list", listed)
    yield listing
    places = [place.prefix for place in config.discover] + ([""] if config.models else [])
    for place in places:
        check = f"models: read {place or 'what is listed by hand'}"
        among = [entry for entry in entries if not entry.problem and (within(entry.url, place) if place else True)]
        if among:
            yield examined(check, partial(_ranged, among[0].url))
        else:
            yield skipped(check, f"because of {listing.check}" if listing.state == "wrong" else "there is none to try")


def _root(url: str) -> str:
    """Of a URL, the scheme and the bucket; of a path nothing but its beginning."""
    scheme, _, rest = url.partition("://")
    return f"{scheme}://{rest.partition('/')[0]}" if rest else "/"


def _listed(out: str) -> str:
    storage.require_writable(out)
    models = [name for name in map(storage.basename, storage.list_folders(out)) if layout.is_model(name)]
    return f"{out}: {len(models)} models have adapters there"


def _once(url: str, *, in_parts: bool) -> str:
    created = storage.put_new(url, b"first", in_parts=in_parts)
    again = storage.put_new(url, b"other", in_parts=in_parts)
    if (created, again) != ("created", "different"):
        how = "If-None-Match on completing an upload in parts" if in_parts else "If-None-Match"
        raise UnsupportedStoreError(
            f"{url}: a second write was not refused ({created}, then {again}): the store, or what is before it, ignores {how}",
            remedy=f"use a store with conditional writes (S3 has them), and reach it directly: without them {_WHY_ONCE}",
        )
    return "a second write is refused"


def _swapped(url: str) -> str:
    storage.swap(url, b"first", None)
    seen = _seen(url)
    moved = storage.swap(url, b"second", seen)
    late = storage.swap(url, b"third", seen)
    if not moved or late:
        raise UnsupportedStoreError(
            f"{url}: a write by one who had seen an older object was {'accepted' if late else 'refused, and so was one by who had seen the newest'}: the store, or what is before it, ignores If-Match",
            remedy="use a store with conditional writes (S3 has them), and reach it directly: without them latest.json may go back to an older version",
        )
    return "only who has seen the newest object replaces it"


def _seen(url: str) -> ObjectInfo:
    found = storage.stat(url)
    if found is None:
        raise StorageError(f"{url} was written just now, and is not there", remedy="use a store that is consistent")
    return found


def _removed(folder: str) -> str:
    for info in storage.list_folder(folder):
        storage.delete(info.url)
    if left := storage.list_folder(folder):
        raise StorageError(
            f"{left[0].url} was removed, and is there still", remedy="is the bucket versioned, or retained?"
        )
    for level in (folder, folder.rpartition("/")[0], folder.rsplit("/", 2)[0]):
        storage.drop_empty_folder(level)
    return f"the three objects written to {folder} are gone again"


def _tidied(folder: str) -> None:
    try:
        _removed(folder)
    except PhloraError:  # what is wrong has been told; phlora gc takes what is left
        return


def _room(out: str) -> str:
    free = storage.free_bytes(out)
    if free is None:
        return "the store has no end"
    if free < ROOM:
        raise StorageError(f"{size(free)} are free at {out}", remedy="free some space, or choose another output")
    return f"{size(free)} are free at {out}"


def _clock(out: str) -> str | Worry:
    ahead = time.time() - storage.clock(out)
    told = f"this machine's clock is {abs(ahead):.1f} s {'ahead of' if ahead > 0 else 'behind'} the store's"
    if abs(ahead) > SKEW_SECONDS:
        raise CredentialsError(told, remedy="set it (NTP): S3 refuses what is signed 15 minutes off")
    if abs(ahead) > SLIGHT_SKEW_SECONDS:
        return Worry(told, "set it (NTP): moments in records will not fit those of the store")
    return told


def _base(url: str) -> str:
    found = open_checkpoint(url)
    return f"{url}: {len(found.tensors)} tensors, {size(found.nbytes)}"


def _ranged(url: str) -> str:
    """The last bytes of a checkpoint's largest file: what ignores ranges sends others."""
    infos = [info for info in storage.list_folder(url) if info.url.endswith(".safetensors")]
    single = storage.stat(url) if not infos else None
    infos += [single] if single else []
    if not infos:
        raise NotFoundError(f"there are no safetensors at {url}", remedy="see phlora status")
    largest = max(infos, key=lambda info: info.size)
    into = memoryview(bytearray(min(8, largest.size)))
    storage.read_ranges([ByteRange(largest.url, largest.etag, largest.size - len(into), into)])
    return f"a range of {largest.url} was read"
