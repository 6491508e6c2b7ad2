"""YAML as plain data with line numbers: mappings, lists and text; nothing that runs, refers or multiplies.

A scalar stays the text that was written, and the field that takes it decides what it is: `id: 007`, `share_base: off` and
`tolerance: 1e-3` mean what they say, where YAML 1.1 would make 7, False and the string '1e-3' of them. Aliases, tags and
deep nesting have no use here and are how a small file becomes gigabytes or code; they are refused where they stand.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import yaml

from phlora_pipeline.errors import RequestError, one_line, quoted

Path = tuple[str | int, ...]
"""From the document's root to a value: keys and positions."""

MAX_DEPTH = 30
# libyaml where it was built in: thousands of models are read in a blink rather than in seconds.
_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_NULLS = frozenset({"", "~", "null", "Null", "NULL"})
_UNPRINTABLE = re.compile("[^\t\n\r\x20-\x7e\x85\xa0-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
_PLAIN = re.compile(r"[A-Za-z0-9./][A-Za-z0-9._/-]*")
_PLAIN_URL = re.compile(r"[a-z0-9]+://[A-Za-z0-9._/-]+")
_FRONT_MATTER = re.compile(r"\ufeff?---[ \t]*\r?\n(.*?\n)---[ \t]*(?:\r?\n|\Z)", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Document:
    """A parsed file.

    Attributes:
        name: of the file, for messages.
        data: mappings, lists, text and None; None as a whole where the file is empty.
        lines: where each value begins, from 1; for a mapping's value the line of its key.
    """

    name: str
    data: Any
    lines: Mapping[Path, int] = field(repr=False)

    def line(self, path: Path) -> int:
        """Where a value begins; where it was not written, the nearest thing around it that was."""
        while path and path not in self.lines:
            path = path[:-1]
        return self.lines.get(path, 1)

    def refusal(self, path: Path, what: str, *, remedy: str) -> RequestError:
        """An error at a value."""
        return _refusal(self.name, self.line(path), what, remedy)


def parse(text: str, name: str) -> Document:
    """One YAML document.

    Raises:
        RequestError: it is not YAML, or more than plain data; names file and line.
    """
    if found := _UNPRINTABLE.search(text):
        line = text.count("\n", 0, found.start()) + 1
        raise _refusal(name, line, f"there is a character {found[0]!a}", "write it in quotes, escaped, or remove it")
    reader = _Reader(name, yaml.parse(text, Loader=_LOADER))
    try:
        return Document(name, reader.document(), reader.lines)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise _refusal(
            name,
            mark.line + 1 if mark else 1,
            f"not YAML: {one_line(Exception(error.problem or error.context))}",
            "indent by spaces, and put text that begins with * & ! % @ or ` in quotes",
        ) from error
    except yaml.YAMLError as error:
        raise RequestError(f"{name}: not YAML: {one_line(error)}", remedy="write it as UTF-8 text") from error


def front_matter(text: str) -> Mapping[str, Any]:
    r"""The mapping between the `---` lines that a model card begins with; empty where there is none that can be read.

    >>> front_matter("---\nbase_model: [org/a, org/b]\n---\n# Card\n")
    {'base_model': ['org/a', 'org/b']}
    """
    found = _FRONT_MATTER.match(text)
    if not found:
        return {}
    try:
        data = parse(found[1], "README.md").data
    except RequestError:  # a stranger's card: it says nothing, then
        return {}
    return data if isinstance(data, dict) else {}


def scalar(text: str) -> str:
    """Text as YAML for one line, in any place: quoted where it must be.

    >>> scalar("s3://zoo/llama"), scalar("*-8b"), scalar("no")
    ('s3://zoo/llama', '"*-8b"', "'no'")
    """
    if _PLAIN_URL.fullmatch(text):
        return text
    style = None if _PLAIN.fullmatch(text) else '"'
    line = yaml.safe_dump([text], default_flow_style=True, default_style=style, allow_unicode=True, width=1 << 30)
    return line.strip()[1:-1]


def _refusal(name: str, line: int, what: str, remedy: str) -> RequestError:
    return RequestError(f"{name}, line {line}: {what}", remedy=remedy)


class _Reader:
    """Builds values from the parser's events; nothing of YAML's own construction is involved."""

    def __init__(self, name: str, events: Iterator[Any]) -> None:
        self.name = name
        self.lines: dict[Path, int] = {}
        self._events = events

    def document(self) -> Any:
        """The one document of the stream."""
        data = None
        for event in self._events:
            if isinstance(event, yaml.DocumentStartEvent) and self.lines:
                raise self._refused(event, "a second document begins", "write one document, without `---` inside")
            if isinstance(event, yaml.NodeEvent):
                data = self._value(event, ())
        return data

    def _value(self, event: Any, path: Path) -> Any:
        self.lines.setdefault(path, _line(event))
        if isinstance(event, yaml.AliasEvent) or event.anchor is not None:
            raise self._refused(
                event, f"{quoted(event.anchor)} is an alias or anchor", "write the value out, or put it in quotes"
            )
        if event.tag is not None:
            raise self._refused(
                event, f"the tag {quoted(event.tag)} is not accepted", "leave it out, or quote the text"
            )
        if len(path) > MAX_DEPTH:
            raise self._refused(event, f"nested more than {MAX_DEPTH} deep", "write it as the documentation shows")
        if isinstance(event, yaml.SequenceStartEvent):
            return self._list(path)
        if isinstance(event, yaml.MappingStartEvent):
            return self._mapping(path)
        plain = event.implicit[0]
        return None if plain and event.value in _NULLS else event.value

    def _list(self, path: Path) -> list[Any]:
        items: list[Any] = []
        for event in self._events:
            if isinstance(event, yaml.SequenceEndEvent):
                break
            items.append(self._value(event, (*path, len(items))))
        return items

    def _mapping(self, path: Path) -> dict[str, Any]:
        built: dict[str, Any] = {}
        for event in self._events:
            if isinstance(event, yaml.MappingEndEvent):
                break
            if not isinstance(event, yaml.ScalarEvent):
                raise self._refused(event, "a key is not plain text", "quote it: braces and brackets begin a value")
            key = str(event.value)
            if key in built:
                before = self.lines[(*path, key)]
                raise self._refused(event, f"key {quoted(key)} is there twice, first in line {before}", "remove one")
            self.lines[(*path, key)] = _line(event)
            built[key] = self._value(next(self._events), (*path, key))
        return built

    def _refused(self, event: Any, what: str, remedy: str) -> RequestError:
        return _refusal(self.name, _line(event), what, remedy)


def _line(event: Any) -> int:
    return int(event.start_mark.line) + 1
