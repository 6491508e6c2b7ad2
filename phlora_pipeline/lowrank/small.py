"""Eigenproblems of small matrices, where they are solved soonest: a GPU takes them one after another, and each in many short steps.

A processor has the eigenvectors of a 40×40 matrix in a third of the time that an H100 takes, with the way there and back; it
takes several at once, one thread each; and what is done with them before a panel is multiplied again needs no launches there.
Bytes do not depend on how many threads there are.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from phlora_pipeline.lowrank.beside import side_by_side

_SMALL = 128
"""Rows of a matrix up to which the processor is ahead: at 200 the device has its eigenvectors in half of the time."""

Found = TypeVar("Found")

Eigh = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Eigenvalues, ascending, and eigenvectors of a batch of symmetric matrices."""


def solved(solve: Callable[..., tuple[Tensor, ...]], *given: Tensor) -> tuple[Tensor, ...]:
    """What `solve(eigh, *given)` makes of batches (b, l, …): where these are, or on the processor, and brought back.

    Args:
        solve: takes an `Eigh`, and what is given.
        given: the first is (b, l, l).
    """
    device = given[0].device
    if device.type == "cpu" or given[0].shape[-1] > _SMALL:
        return solve(torch.linalg.eigh, *given)
    return tuple(part.to(device) for part in solve(_eigh_beside, *(each.cpu() for each in given)))


def eigh(symmetric: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues, ascending, and eigenvectors."""
    values, W = solved(lambda eigh, each: eigh(each), symmetric)
    return values, W


def eigvalsh(symmetric: Tensor) -> Tensor:
    """Eigenvalues, ascending."""
    if symmetric.device.type == "cpu" or symmetric.shape[-1] > _SMALL:
        values: Tensor = torch.linalg.eigvalsh(symmetric)
        return values
    return eigvalsh_beside(symmetric.cpu()).to(symmetric.device)


def eigvalsh_beside(symmetric: Tensor) -> Tensor:
    """The same of matrices on the processor, for a GPU that waits: on all threads, one matrix on each."""
    return torch.cat(_beside(torch.linalg.eigvalsh, symmetric))


def _eigh_beside(symmetric: Tensor) -> tuple[Tensor, Tensor]:
    values, W = zip(*_beside(torch.linalg.eigh, symmetric), strict=True)
    return torch.cat(values), torch.cat(W)


def _beside(solve: Callable[[Tensor], Found], symmetric: Tensor) -> list[Found]:
    """One call for each thread: whatever else they did, they would wait for Python's lock."""
    threads = torch.get_num_threads()
    if threads == 1 or len(symmetric) == 1:
        return [solve(symmetric)]
    parts = symmetric.tensor_split(min(threads, len(symmetric)))
    return side_by_side([partial(solve, part) for part in parts])
