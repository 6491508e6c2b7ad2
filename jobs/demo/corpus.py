"""The Brown corpus as tagged sentences: parsing, a small tag set, and a split by document.

Brown's 87 tags and their combinations (`nn-tl`, `do*`, `pps+bez`) are mapped to twelve classes after Petrov, Das and
McDonald's universal tags: few enough for a head that two hundred steps can train, and what taggers are compared on.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from .errors import DemoError

TAGS = ("ADJ", "ADP", "ADV", "CONJ", "DET", "NOUN", "NUM", "PRON", "PRT", "VERB", ".", "X")

# The longest prefix of the tag's first part decides.
_PREFIXES = {
    "jj": "ADJ", "in": "ADP", "cs": "ADP", "rb": "ADV", "rn": "ADV", "wrb": "ADV", "wql": "ADV", "ql": "ADV", "cc": "CONJ",
    "ab": "DET", "ap": "DET", "at": "DET", "dt": "DET", "wdt": "DET", "nn": "NOUN", "np": "NOUN", "nr": "NOUN", "cd": "NUM", "od": "NUM",
    "pn": "PRON", "pp": "PRON", "wp": "PRON", "ex": "PRON", "rp": "PRT", "to": "PRT", "be": "VERB", "do": "VERB", "hv": "VERB",
    "md": "VERB", "vb": "VERB", "fw": "X", "nil": "X", "uh": "X",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Sentence:
    """Words and the index of each word's tag in `TAGS`."""

    words: tuple[str, ...]
    tags: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Corpus:
    """Sentences to train on and to score with; no document has sentences in both."""

    train: tuple[Sentence, ...]
    held_out: tuple[Sentence, ...]


def read_corpus(folder: Path) -> Corpus:
    """Every tenth document is held out, so each genre is on both sides."""
    documents = sorted(path for path in folder.iterdir() if path.is_file())
    if not documents:
        raise DemoError(f"no documents in {folder}", remedy="remove this folder and run again")
    parts: dict[bool, list[Sentence]] = {True: [], False: []}
    for number, path in enumerate(documents):
        parts[number % 10 == 0] += parse(path.read_text(encoding="utf-8"), path.name)
    return Corpus(train=tuple(parts[False]), held_out=tuple(parts[True]))


def parse(text: str, document: str = "") -> list[Sentence]:
    """Sentences of one document: a line each, `word/tag` separated by blanks.

    >>> parse("The/at jury/nn said/vbd ./.")[0].words
    ('The', 'jury', 'said', '.')
    """
    return [_sentence(line, document) for line in text.splitlines() if line.strip()]


def universal(tag: str) -> str:
    """The class of a Brown tag.

    >>> universal("nn-tl"), universal("do*"), universal("pps+bez"), universal("fw-in"), universal("``")
    ('NOUN', 'VERB', 'PRON', 'X', '.')
    """
    first = tag.lower().split("+")[0]
    if not first[:1].isalpha():
        return "ADV" if first.startswith("*") else "."  # `*` alone is the tag of "not"
    return next((_PREFIXES[first[:size]] for size in (3, 2) if first[:size] in _PREFIXES), "X")


def _sentence(line: str, document: str) -> Sentence:
    words, tags = [], []
    for token in line.split():
        word, slash, tag = token.rpartition("/")
        if not slash or not word or not tag:
            raise DemoError(f"{document}: {token!r} is not word/tag", remedy="remove the unpacked corpus and run again")
        words.append(word)
        tags.append(TAGS.index(universal(tag)))
    return Sentence(tuple(words), tuple(tags))
