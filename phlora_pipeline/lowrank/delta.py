"""ΔW formed in float32 from whatever is stored, its norms summed in float64, and what is not finite found and named."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

_WIDE = frozenset({torch.float64, torch.int64, torch.int32})
"""Stored dtypes whose differences float32 would lose: they are formed in float64, and then rounded."""

CHUNK = 1 << 22
"""Elements that are held in float64 at a time: sums are exact enough, and no temporary is as large as a weight."""

_CACHED = 1 << 18
"""Elements that a processor takes at a time: they stay in its caches; a multiple of `_RUN`."""

_RUN = 256
"""Squares that are summed in float32."""

_FLOAT32_SQUARES = (1e-25, 1e30)
"""Sums of squares that float32 holds without overflow, and without losing entries to underflow."""


def to_host(tensor: Tensor) -> Any:
    """A small tensor as (nested) lists: the one place where the device is waited for."""
    return tensor.tolist()


def form_delta(base: Tensor, tuned: Tensor, out: Tensor, rounded: Tensor | None = None) -> Tensor:
    """Write `ΔW = W_tuned − W_base` into `out`, in float32, from whatever dtypes are stored.

    The subtraction is never done in a 16-bit dtype: that alone would add up to 5e-4 of relative error.

    Args:
        base, tuned: same shape, any dtype, on the CPU or on `out`'s device.
        out: contiguous float32 of the same shape; overwritten.
        rounded: ΔW once more, rounded to this tensor's dtype, while it is in a processor's cache; its rows may lie apart.

    Returns:
        (3,) float64 on `out`'s device: ‖W_base‖_F², ‖W_tuned‖_F², ‖ΔW‖_F²; with `rounded` (4,), the last being
        ‖ΔW − rounded‖_F². A NaN or an infinity among the entries makes ‖ΔW‖_F² not finite, and nothing else does: squares of
        float32 values cannot overflow float64.
    """
    if not {base.dtype, tuned.dtype} & _WIDE:
        return _form_cached(base.reshape(-1), tuned.reshape(-1), out.view(-1), rounded)
    sums = torch.zeros(3, dtype=torch.float64, device=out.device)
    for piece in _pieces(out.numel(), CHUNK):
        # In two steps: in one, what goes to a GPU would be converted on the processor, and go there as twice the bytes.
        before = base.reshape(-1)[piece].to(out.device).double()
        after = tuned.reshape(-1)[piece].to(out.device).double()
        torch.sub(after, before, out=out.view(-1)[piece])
        sums += torch.stack([sum_of_squares(before), sum_of_squares(after), sum_of_squares(out.view(-1)[piece])])
    if rounded is not None:
        rounded.copy_(out)
        sums = torch.cat([sums, distance_sq(out, rounded).view(1)])
    return sums


def _form_cached(base: Tensor, tuned: Tensor, out: Tensor, rounded: Tensor | None) -> Tensor:
    """The same, on a processor each piece while it is in the cache, with squares summed in float32 over `_RUN` entries only.

    Few calls, each on a large piece: where two threads form their matrices at once, they wait for Python's lock after each;
    and a GPU waits for its launches.
    """
    size, there = _CACHED if out.device.type == "cpu" else CHUNK, out.device
    columns = 3 if rounded is None else 4
    k = 1 if rounded is None else rounded.shape[-1]
    even = _RUN // math.gcd(k, _RUN)  # rows whose entries are whole runs
    rows = even * max(1, size // (even * k))
    whole = out.numel() // (even * k) * even * k
    if not whole:
        return _form_rest(base, tuned, out, rounded)
    lengths = torch.empty(columns, whole // _RUN, dtype=torch.float32, device=there)
    scratch = torch.empty(min(rows * k, whole), dtype=torch.float32, device=there)
    sides = [_split(side[:whole], rows * k) for side in (base, tuned, out)]
    copies = [None] * len(sides[0]) if rounded is None else torch.split(rounded[: whole // k], rows)
    found = _split(lengths, rows * k // _RUN)
    for before, after, delta, copy, norms in zip(*sides, copies, found, strict=True):
        # In two steps: in one, what goes to a GPU would be converted on the processor, and go there as twice the bytes.
        beside = scratch[: len(delta)].copy_(before.to(there))
        delta.copy_(after.to(there))
        _norms(beside, norms[0])
        _norms(delta, norms[1])
        _norms(delta.sub_(beside), norms[2])
        if copy is not None:
            beside.view(copy.shape).copy_(copy.copy_(delta.view(copy.shape)))
            _norms(beside.sub_(delta), norms[3])
    rest = torch.zeros(columns, dtype=torch.float64, device=there)
    if whole < out.numel():
        left = None if rounded is None else rounded[whole // k :]
        rest = _form_rest(base[whole:], tuned[whole:], out[whole:], left)
    table = torch.stack([*(norms.double().square_().sum(dim=1) for norms in found), rest])
    low, high = _FLOAT32_SQUARES
    squares = table[:-1, :3]  # what rounding takes may be nothing
    certain = ((squares >= low) & (squares <= high)).all(dim=1)  # NaN is not
    for row, known in enumerate(to_host(certain)):
        if not known:
            squares[row] = torch.stack([sum_of_squares(pieces[row].to(there)) for pieces in sides])
    return table.sum(dim=0)


def _split(panel: Tensor, size: int) -> tuple[Tensor, ...]:
    return torch.split(panel, size, dim=-1)


def _form_rest(base: Tensor, tuned: Tensor, out: Tensor, rounded: Tensor | None) -> Tensor:
    """The same of the few entries that are left, in float64."""
    base, tuned = base.to(out.device), tuned.to(out.device)
    out.copy_(tuned).sub_(base)
    sums = [sum_of_squares(side) for side in (base, tuned, out)]
    if rounded is not None:
        sums.append(sum_of_squares(rounded.copy_(out.view(rounded.shape)).float().view(-1) - out))
    return torch.stack(sums)


def _norms(values: Tensor, out: Tensor) -> None:
    """Write the norms of runs of `_RUN` entries; their squares' sums are right to 1e-7."""
    torch.linalg.vector_norm(values.view(-1, _RUN), dim=1, out=out)


def distance_sq(delta: Tensor, rounded: Tensor) -> Tensor:
    """‖ΔW − its rounding‖_F² in float64, of two (d, k): right to 1e-6, some rows at a time."""
    total = torch.zeros((), dtype=torch.float64, device=delta.device)
    rows = max(1, (_CACHED if delta.device.type == "cpu" else CHUNK) // delta.shape[1])
    for part, copy in zip(torch.split(delta, rows), torch.split(rounded, rows), strict=True):
        total += _squares((part - copy).view(-1))
    return total


def _squares(values: Tensor) -> Tensor:
    """Σ x² in float64 of float32 sums of `_RUN` entries: right to 1e-8."""
    whole = len(values) // _RUN * _RUN
    rows = values[:whole].view(-1, _RUN)
    rest = values[whole:].double()
    total: Tensor = torch.linalg.vecdot(rows, rows).double().sum() + torch.dot(rest, rest)
    return total


def first_nonfinite(base: Tensor, tuned: Tensor) -> tuple[int, tuple[int, ...]] | None:
    """How many entries of ΔW are NaN or infinite, and the index of the first; None where all are finite."""
    count, first = 0, -1
    for piece in _pieces(base.numel(), CHUNK):
        delta = tuned.reshape(-1)[piece].to(base.device).double() - base.reshape(-1)[piece].double()
        bad = torch.isfinite(delta.float()).logical_not()
        found = int(to_host(bad.sum()))
        if found and not count:
            first = piece.start + int(to_host(bad.byte().argmax()))
        count += found
    return (count, unravelled(first, tuple(base.shape))) if count else None


def unravelled(flat: int, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The index of an entry from its number in row-major order.

    >>> unravelled(5, (2, 3))
    (1, 2)
    """
    index: list[int] = []
    for size in reversed(shape):
        flat, at = divmod(flat, size)
        index.insert(0, at)
    return tuple(index)


def scale_exponent(norm_sq: float) -> int:
    """The power of two that brings a matrix of this squared Frobenius norm near to norm 1; 0 where it is near enough.

    Gram matrices square, and bfloat16 and float32 share one range of exponents: norms from 2⁻²⁰ to 2²⁰ are left alone.
    """
    exponent = math.frexp(math.sqrt(norm_sq))[1]
    return 0 if abs(exponent) <= 20 else -exponent


def scale_(tensor: Tensor, exponent: int) -> Tensor:
    """Multiply by 2^exponent in place; exact but for underflow. In two steps, since 2¹⁴⁹ is no float32."""
    if exponent:
        half = exponent // 2
        tensor.mul_(2.0**half).mul_(2.0 ** (exponent - half))
    return tensor


def sum_of_squares(values: Tensor) -> Tensor:
    """Σ x² in float64, through temporaries of `CHUNK` elements at most."""
    flat = values.reshape(-1)
    total = torch.zeros((), dtype=torch.float64, device=values.device)
    for piece in _pieces(flat.numel(), CHUNK):
        part = flat[piece].double()
        total += torch.dot(part, part)
    return total


def _pieces(numel: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, numel)) for start in range(0, numel, size))
