"""Rates of this machine's device, measured, for the cost function that picks a route: `phlora calibrate`.

A profile changes which solver a shape takes, never what a solver gives; an extraction that used one is another extraction.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict

import torch

from phlora_pipeline import storage
from phlora_pipeline.errors import ConflictError
from phlora_pipeline.extract import checked_device, profile_of
from phlora_pipeline.lowrank import Profile, drivers, exact_flops

_SIZE = 2048
_SMALL = 1024
_THIN, _WIDE = 8, 128
_REPEATS = 15
_ON_A_GPU = 4
"""So many times as large: below that it is launches that are measured."""


def measure(device_name: str, threads: int, name: str) -> Profile:
    """The rates of a device, each the best of several runs: what else the machine does only slows them.

    Args:
        device_name: `auto`, `cpu`, `cuda` or `cuda:N`.
        threads: processor threads, as an extraction will have them.
        name: of the profile.

    Raises:
        DeviceError: the device is not there.
    """
    device = checked_device(device_name)
    torch.set_num_threads(threads)
    like = profile_of(device)
    float32, _ = _panel(torch.float32, device)
    bfloat16, stream = _panel(torch.bfloat16, device)
    square = torch.randn(_SMALL, _SMALL, device=device)
    wide = square.double()
    eigh_rate, svd_rate, row = _decompositions(device)
    return Profile(
        name=name,
        low="bfloat16" if bfloat16 > 1.2 * float32 else "float32",
        block_per_rank=like.block_per_rank,
        steps=like.steps,
        degree=like.degree,
        low_rate=max(bfloat16, float32),
        float32_rate=float32,
        float64_rate=2.0 * _SMALL**3 / _seconds(lambda: wide @ wide.mT, device),
        eigh_rate=eigh_rate,
        svd_rate=svd_rate,
        stream_rate=stream,
        call=_seconds(lambda: square[:8, :8] + 1, device),
        row=row,
        least_block=like.least_block,
    )


def write(profile: Profile, url: str) -> None:
    """Put a profile as JSON.

    Raises:
        ConflictError: another file is there.
    """
    text = json.dumps(asdict(profile), indent=2) + "\n"
    if storage.put_new(storage.normalize(url), text.encode()) == "different":
        raise ConflictError(f"{url} is there already", remedy="choose another file: a profile is part of an identity")


def _decompositions(device: torch.device) -> tuple[float, float, float]:
    """Operations per second of eigh and of SVD; and what each row takes besides, which a GPU shows at two sizes."""

    def eigh(rows: int) -> float:
        wide = torch.randn(rows, rows, device=device, dtype=torch.float64)
        gram = wide @ wide.mT
        return _seconds(lambda: torch.linalg.eigh(gram), device)

    rows, row = _SMALL, 0.0
    if device.type == "cuda":
        rows = _SMALL * _ON_A_GPU
        few, many = eigh(rows // 8), eigh(rows)
        row = max((few - many / 8**3) / (rows // 8 * (1 - 1 / 64)), 0.0)
        spent = max(many - row * rows, 0.1 * many)
    else:
        spent = eigh(rows)
    square = torch.randn(rows, rows, device=device)
    driver = drivers(device)[0]
    svd = _seconds(lambda: torch.linalg.svd(square, full_matrices=False, driver=driver), device)
    return 9.0 * rows**3 / spent, exact_flops(rows, rows) / max(svd - row * rows, 0.1 * svd), row


def _panel(dtype: torch.dtype, device: torch.device) -> tuple[float, float]:
    """Operations per second of products with thin panels, and bytes per second that they read of the matrix."""
    there = device.type == "cuda"
    size, wide = (_SIZE * _ON_A_GPU, _WIDE * _ON_A_GPU**2) if there else (_SIZE, _WIDE)
    matrix = torch.randn(size, size, device=device).to(dtype)
    times = {}
    for rows in (_THIN, wide):
        panel = torch.randn(rows, size, device=device).to(dtype)
        times[rows] = _seconds(lambda panel=panel: panel @ matrix.mT, device)  # type: ignore[misc]
    flops = 2.0 * size * size
    if there:  # it reads while it multiplies
        return flops * wide / times[wide], matrix.nbytes / times[_THIN]
    # A busy machine may give the thin panel as long as the wide one: it is not believed beyond this.
    rate = flops * (wide - _THIN) / max(times[wide] - times[_THIN], 0.3 * times[wide])
    reading = max(times[_THIN] - flops * _THIN / rate, 0.1 * times[_THIN])
    return rate, matrix.nbytes / reading


def _seconds(run: Callable[[], object], device: torch.device) -> float:
    best = float("inf")
    for _ in range(_REPEATS + 1):  # the first one warms up
        began = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - began)
    return best
