"""Where things lie under a zoo's output: the names, in one place.

    <out>/<model>/<version>/…  adapter_config.json          an adapter; the config is the commit
    <out>/<model>/latest.json                               which version is served
    <out>/_state/<model>/<request>/outcome.json  attempt-<n>.json
    <out>/_manifest/base=<id>/model=<id>/<version>.parquet  one dataset over the whole zoo
    <out>/_runs/<run>/…   <out>/_parts/<model>/<extraction>/…

Folders that begin with an underscore are the zoo's own: a model's id begins with a letter or a digit. Names of files that
the reducer publishes are repeated here, because importing it loads torch, and nobody waits for that to see a status; a
test holds them equal.
"""

from __future__ import annotations

import datetime as dt
import re

from phlora_pipeline import storage

WEIGHTS = "adapter_model.safetensors"
MANIFEST = "energy.parquet"
CARD = "README.md"
RUN = "run.json"
CONFIG = "adapter_config.json"
PUBLISHED = (WEIGHTS, MANIFEST, CARD, RUN, CONFIG)
"""An adapter's files, in the order of publication."""

LATEST = "latest.json"
STATE, DATASET, PARTS = "_state", "_manifest", "_parts"

SMALL = 1 << 20
"""No record of ours is larger than this."""

_MODEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}")
_VERSION = re.compile(r"[0-9a-f]{16,64}")


def is_model(name: str) -> bool:
    """Whether a folder under the output can be a model's.

    >>> is_model("org--name-8b.v2"), is_model("_state"), is_model(".."), is_model("a/b")
    (True, False, False, False)
    """
    return _MODEL.fullmatch(name) is not None


def is_version(name: str) -> bool:
    """Whether a folder of a model can be a version's: these are digests.

    >>> is_version("00ff" * 8), is_version("notes")
    (True, False)
    """
    return _VERSION.fullmatch(name) is not None


def dataset_copy(out: str, model: str, base_id: str, version: str) -> str:
    """URL of a version's table in the dataset."""
    return storage.join(out, DATASET, f"base={base_id}", f"model={model}", f"{version}.parquet")


def utc_now() -> str:
    """Now, as records tell it: ISO 8601 in UTC, always of one form, so that text sorts as time does."""
    return dt.datetime.now(dt.UTC).isoformat(timespec="microseconds")


def moment(text: str) -> float:
    """Seconds since the epoch of a record's moment; before all others where none is told.

    >>> moment("1970-01-01T00:01:00Z"), moment("")
    (60.0, -inf)
    """
    if not text:
        return float("-inf")
    told = dt.datetime.fromisoformat(text)
    return (told if told.tzinfo else told.replace(tzinfo=dt.UTC)).timestamp()
