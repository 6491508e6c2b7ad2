"""What `--rank`, `--energy` and `--budget` ask for together: one of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from phlora_pipeline.errors import RequestError, quoted

DEFAULT = 32


@dataclass(frozen=True, slots=True)
class Asked:
    """One rank, or several.

    Attributes:
        rank: the one, or the largest; `auto`.
        several: all of them, where there are more than one.
    """

    rank: int | Literal["auto"]
    several: tuple[int, ...] = ()


def asked(rank: str | None, energy: float | None, budget: str | None) -> Asked:
    """From the command line's words.

    Raises:
        RequestError: more than one way is named, or a rank is no number.
    """
    flags = {"--rank": rank, "--energy": energy, "--budget": budget}
    if len(named := [flag for flag, value in flags.items() if value is not None]) > 1:
        raise RequestError(
            f"{' and '.join(named)} are different ways to choose ranks",
            remedy="give one of them; see phlora extract --help",
        )
    if rank is None or rank.strip().lower() == "auto":
        return Asked("auto" if rank else DEFAULT)
    parts = [part.strip() for part in rank.split(",")]
    if not all(part.removeprefix("-").isdecimal() for part in parts):
        raise RequestError(
            f"rank must be a number, several such as 16,32,64, or auto; got {quoted(rank)}",
            remedy="see phlora extract --help",
        )
    numbers = sorted({int(part) for part in parts})
    return Asked(numbers[-1], tuple(numbers) if len(numbers) > 1 else ())
