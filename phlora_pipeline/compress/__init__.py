"""An existing LoRA at a lower rank: open → check → decompose → choose ranks → publish.

The update of each module, scale·B·A, is decomposed from its factors alone, so that no base is needed, and the best factors of
a smaller rank take their place, under the same keys. What is no pair of factors stays as it is.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

from phlora_pipeline import adapter, loaders, lora, manifest, reducer, storage, targets
from phlora_pipeline.adapter import Layout
from phlora_pipeline.compress import choice
from phlora_pipeline.compress.choice import choose
from phlora_pipeline.compress.factors import decomposed, require_memory
from phlora_pipeline.compress.layout import config_of, make_layout, metadata_of, written_rank
from phlora_pipeline.compress.publish import publish, rows_of
from phlora_pipeline.compress.request import Request, requested
from phlora_pipeline.extract import checked_device
from phlora_pipeline.machine import available_memory
from phlora_pipeline.manifest import EnergyRow
from phlora_pipeline.summary import Summary, size, summarize
from phlora_pipeline.targets import Dialect

__all__ = ["CompressResult", "compress"]


@dataclass(frozen=True, slots=True)
class CompressResult:
    """How a compression ended.

    Attributes:
        outcome: `committed`, or `exists`: the same adapter stood there already.
        out: where it is.
        version: its identity.
        original_rank, rank, written_rank: the largest that was stored, that is kept, and as the config says.
        original_bytes, adapter_bytes: of the weights' files.
        summary: the rows, summed up; energies are shares of the original adapter's.
        ranks: module → what is kept of it.
        warnings: in words.
    """

    outcome: str
    out: str
    version: str
    original_rank: int
    rank: int
    written_rank: int
    original_bytes: int
    adapter_bytes: int
    summary: Summary
    ranks: Mapping[str, int]
    warnings: tuple[str, ...]


def compress(
    adapter_url: str,
    out: str,
    *,
    rank: int | None = None,
    energy: float | None = None,
    budget: str | None = None,
    dialect: Dialect | None = None,
    dtype: str = "auto",
    base_name: str = "",
    device: str = "cpu",
    overwrite: bool = False,
) -> CompressResult:
    """An adapter at a lower rank, in `out`.

    Args:
        adapter_url: a PEFT folder, or a `.safetensors` file of kohya's.
        out: an empty or absent folder.
        rank: of every module that has as many; or
        energy: each module's smallest rank that keeps this share of its ‖B·A‖²; or
        budget: the most energy of all modules that fits, such as `20MB` or `3M-params`.
        dialect: for whom; None: `portable`, of kohya's keys `kohya`.
        dtype: of the factors; `auto`: the original's.
        base_name: the base's hub id or served name; empty: as the original says.
        device: where to compute.
        overwrite: whether an adapter in `out` is replaced.

    Raises:
        RequestError: refused before a factor was read, or since one is not finite; nothing is written.
    """
    where = checked_device(device)
    request = requested(adapter_url, out, rank, energy, budget, dialect, dtype, base_name)
    there = reducer.standing(request.out, request.version, interrupted=lambda: True, overwrite=overwrite)
    if there is not None:
        rows = manifest.read(storage.join(request.out, reducer.MANIFEST))
        kept = {row.module: row.rank or 1 for row in rows if row.module in request.lora.modules}
        return _result(request, "exists", make_layout(request.lora, kept, request.dialect), kept, rows, ())
    require_memory(request.lora, request.rank, torch.get_num_threads(), available_memory())
    storage.require_writable(request.out)
    found = decomposed(request.lora, choice.most(request.rank, request.policy), where)
    kept = choose(request.lora, found, request.policy, request.dialect, request.dtype)
    layout = make_layout(request.lora, kept, request.dialect)
    for item in layout.kept:
        if item.tuned:
            lora.finite(item.tuned, adapter.keep(item))
    rows = rows_of(request, found, kept, layout)
    if overwrite:
        reducer.unpublish(request.out)
    config = config_of(request.lora, layout, written_rank(kept, request.dialect), request.base_name)
    publish(request, found, kept, layout, rows, config)
    return _result(request, "committed", layout, kept, rows, tuple(_warnings(request, layout, kept, config)))


def _warnings(request: Request, layout: Layout, kept: Mapping[str, int], config: Mapping[str, object]) -> Iterator[str]:
    rules = targets.server_rules("", request.dialect)
    if not request.lora.kohya:
        yield from loaders.objections(rules, config, frozenset(), {})
    least, most, written = min(kept.values()), max(kept.values()), written_rank(kept, request.dialect)
    if not rules.per_tensor_ranks and least != written and not request.lora.kohya:
        padded, own = (
            adapter.file_bytes(one, request.dtype) for one in (layout, make_layout(request.lora, kept, "peft"))
        )
        told = f"ranks are {least} to {most}" if least != most else f"the rank is {most}"
        yield f"{told}, and --for {request.dialect} pads all to {written}: {size(padded)}; --for peft or vllm writes each at its own: {size(own)}"


def _result(
    request: Request,
    outcome: str,
    layout: Layout,
    kept: Mapping[str, int],
    rows: list[EnergyRow],
    warnings: tuple[str, ...],
) -> CompressResult:
    before, written = storage.stat(request.lora.weights), written_rank(kept, request.dialect)
    return CompressResult(
        outcome,
        request.out,
        request.version,
        request.lora.rank,
        max(kept.values()),
        written,
        before.size if before else 0,
        adapter.file_bytes(layout, request.dtype, metadata_of(request.lora, written)),
        summarize(rows),
        dict(sorted(kept.items())),
        warnings,
    )
