"""Errors: each has an exit code of its own meaning, crosses processes whole, and speaks in lines."""

from __future__ import annotations

import pickle

import pytest

from phlora_pipeline import errors
from phlora_pipeline.errors import PhloraError, one_line, quoted

KINDS = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, PhloraError)]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_an_error_survives_a_pickle(kind: type[PhloraError]) -> None:
    error = pickle.loads(pickle.dumps(kind("what", remedy="do this")))
    assert type(error) is kind
    assert (error.what, error.remedy, str(error)) == ("what", "do this", "what (do this)")


def test_without_a_remedy_there_are_no_empty_brackets() -> None:
    assert str(PhloraError("what")) == "what"


def test_exit_codes_are_the_documented_ones() -> None:
    codes = {kind.__name__: kind.exit_code for kind in KINDS}
    assert codes == {
        "PhloraError": 1,
        "RequestError": 2,
        "CheckpointError": 2,
        "IncompleteError": 2,
        "NotFoundError": 2,
        "UnsupportedStoreError": 2,
        "ConflictError": 2,
        "ModelFailedError": 3,
        "SourceChangedError": 3,
        "CredentialsError": 11,
        "StorageError": 12,
        "VerificationError": 13,
        "DeviceError": 14,
    }


def test_one_line_folds_a_clients_paragraphs() -> None:
    told = one_line(ValueError("first\n\n  second\tthird " + "x" * 1000))
    assert told.startswith("first second third xxx")
    assert len(told) < 310
    assert "\n" not in told


def test_quoted_shows_strange_characters_and_is_short() -> None:
    assert quoted("a\nb\x1b[31m") == r"'a\nb\x1b[31m'"
    assert len(quoted("x" * 10_000_000)) < 110
