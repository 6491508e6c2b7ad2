"""What can go wrong, as types: each says what happened and what to do about it.

Every error that a user can meet derives from `PhloraError` and carries the exit code of the command that met it, so that
a script (and `podFailurePolicy`) can tell a wrong request from a storage that is down. Anything else is a bug: exit 1.
"""

from __future__ import annotations


class PhloraError(Exception):
    """Base of all expected errors.

    Args:
        what: one line: what was expected, what was got, where.
        remedy: one line: what the user can do; empty where nothing is known.
    """

    exit_code = 1
    result = ""
    """URL of the result.json that the run left which this error ended; empty where it left none."""

    def __init__(self, what: str, *, remedy: str = "") -> None:
        super().__init__(what, remedy)
        self.what = what
        self.remedy = remedy

    def __str__(self) -> str:
        return f"{self.what} ({self.remedy})" if self.remedy else self.what

    def __reduce__(self) -> tuple[object, ...]:
        # Errors cross process boundaries (Ray pickles them); the default would lose the keyword argument.
        return (_rebuild, (type(self), self.what, self.remedy))


def _rebuild(kind: type[PhloraError], what: str, remedy: str) -> PhloraError:
    return kind(what, remedy=remedy)


class RequestError(PhloraError):
    """The request is wrong: nothing was written."""

    exit_code = 2


class CheckpointError(RequestError):
    """A checkpoint cannot be read as one: malformed, incomplete, or of an unsupported format."""


class IncompleteError(CheckpointError):
    """A checkpoint of which a part is not there, or not all there: perhaps it is still being uploaded."""


class NotFoundError(RequestError):
    """An object or a folder that should be there is not."""


class UnsupportedStoreError(RequestError):
    """The storage behind a URL cannot give a guarantee that the operation needs."""


class ConflictError(RequestError):
    """Something different already stands where a result should go."""


class ModelFailedError(PhloraError):
    """The run ended in order, but the model has failed tensors and was not committed."""

    exit_code = 3


class SourceChangedError(PhloraError):
    """A source object was replaced between planning and reading. Running again plans anew."""

    exit_code = 3


class CredentialsError(PhloraError):
    """Credentials are missing, expired, or lack a permission. No model is blamed."""

    exit_code = 11


class StorageError(PhloraError):
    """Storage cannot be reached or does not behave, after all retries."""

    exit_code = 12


class VerificationError(PhloraError):
    """What was written is not what was promised."""

    exit_code = 13


class DeviceError(PhloraError):
    """The device that was asked for is not there or cannot be used."""

    exit_code = 14


def one_line(error: BaseException, limit: int = 300) -> str:
    """What a foreign error says, in one line: clients print whole paragraphs."""
    text = " ".join(str(error).split())
    return text if len(text) <= limit else f"{text[:limit]} …"


def quoted(value: object, limit: int = 100) -> str:
    """What a stranger wrote, in quotes, for a message: not at its full length, which can be megabytes."""
    text = repr(value)
    return text if len(text) <= limit else f"{text[:limit]}…"
