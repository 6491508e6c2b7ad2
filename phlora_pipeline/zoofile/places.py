"""Ids and places: what a model may be called, and which places are the same. Pure string work, but for links of local paths."""

from __future__ import annotations

import os
import re

from phlora_pipeline.errors import RequestError, quoted

_COMPONENT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_MAX_ID = 96


def model_id(text: str) -> str:
    """What a model is called in the output: `org/name` becomes `org--name`.

    >>> model_id("org/support-bot")
    'org--support-bot'

    Raises:
        RequestError: it cannot be the name of a folder everywhere.
    """
    made = text.replace("/", "--")
    if len(made) > _MAX_ID or not all(_COMPONENT.fullmatch(component) for component in text.split("/")):
        raise RequestError(
            f"{quoted(text)} cannot be an id: expected letters, digits, '.', '_' and '-', "
            f"a letter or digit first, at most {_MAX_ID} in all",
            remedy="give it an id of that form",
        )
    return made


def within(url: str, folder: str) -> bool:
    """Whether a place is a folder, or lies in it. Links of local paths are followed.

    >>> within("s3://zoo/a/b", "s3a://zoo/a"), within("s3://zoo/ab", "s3://zoo/a")
    (True, False)
    """
    inner, outer = canonical(url), canonical(folder)
    return inner == outer or inner.startswith(outer.rstrip("/") + "/")


def canonical(url: str) -> str:
    """One form for places that are the same: links of local paths followed, `s3a` written `s3`."""
    scheme, separator, path = url.partition("://")
    if not separator:
        return os.path.realpath(url)
    return f"{'s3' if scheme.lower() == 's3a' else scheme.lower()}://{path}"


def folder_of(url: str) -> str:
    """A checkpoint's folder: its URL, unless that is one file's.

    >>> folder_of("s3://zoo/llama/model.safetensors"), folder_of("s3://zoo/llama")
    ('s3://zoo/llama', 's3://zoo/llama')
    """
    return url.rpartition("/")[0] if url.endswith(".safetensors") else url


def is_id(text: str) -> bool:
    """Whether it could be the id of a model or base as it is."""
    return len(text) <= _MAX_ID and _COMPONENT.fullmatch(text) is not None
