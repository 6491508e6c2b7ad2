"""What looks like a secret: a zoo.yaml is committed, mailed and copied into every run's folder, so it must hold none."""

from __future__ import annotations

import re
from typing import Any

from phlora_pipeline.errors import quoted
from phlora_pipeline.zoofile.document import Document, Path

_KEY = re.compile(
    r"(.*[-_. ])?(secret|token|password|passwd|passphrase|credentials?|connection[-_]?string"
    r"|(access|account|api|private|secret|shared)[-_]?key([-_]?id)?)",
    re.IGNORECASE,
)
_CAMEL = re.compile(r"(?<=[a-z0-9])(?=[A-Z])")
_VALUE = re.compile(
    r"://[^/\s:@]*:[^/\s@]+@"  # user:password@
    r"|[?&](X-Amz-Signature|X-Amz-Credential|X-Goog-Signature|Signature|sig|token)="  # a signed URL
    r"|\b(AKIA|ASIA)[0-9A-Z]{16}\b"  # AWS access key
    r"|\bhf_[A-Za-z0-9]{30,}"  # a hub's token
    r"|-----BEGIN [A-Z ]*PRIVATE KEY",
    re.IGNORECASE,
)
_REMEDY = (
    "leave it out: credentials come from the environment, a profile or a role (and change this one, if others saw it)"
)


def refuse_secrets(document: Document) -> None:
    """Look through all keys and values, before anything else quotes them.

    Raises:
        RequestError: something looks like a secret; it is not repeated in the message.
    """
    _walk(document, document.data, ())


def _walk(document: Document, value: Any, path: Path) -> None:
    if isinstance(value, dict):
        for key, inner in value.items():
            if _looks_secret(key):
                raise document.refusal((*path, key), f"{quoted(key)} looks like a secret", remedy=_REMEDY)
            _walk(document, key, (*path, key))
            _walk(document, inner, (*path, key))
    elif isinstance(value, list):
        for position, inner in enumerate(value):
            _walk(document, inner, (*path, position))
    elif isinstance(value, str) and _VALUE.search(value):
        raise document.refusal(path, "there is a secret in a value (not repeated here)", remedy=_REMEDY)


def _looks_secret(key: str) -> bool:
    return bool(_KEY.fullmatch(_CAMEL.sub("_", key)))
