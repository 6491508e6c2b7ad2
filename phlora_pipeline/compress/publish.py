"""Rows, tensors, card and config of a compressed adapter, and their publication."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from phlora_pipeline import adapter, lowrank, manifest, parts, reducer, storage, targets
from phlora_pipeline.adapter import Kept, Layout, Slot
from phlora_pipeline.compress.card import compressed_card
from phlora_pipeline.compress.factors import Compact, written_energy
from phlora_pipeline.compress.layout import EXPERT, metadata_of, written_rank
from phlora_pipeline.compress.request import REVISION, Request
from phlora_pipeline.manifest import EnergyRow
from phlora_pipeline.summary import summarize


def rows_of(request: Request, found: Mapping[str, Compact], kept: Mapping[str, int], layout: Layout) -> list[EnergyRow]:
    rows = [_row(request, compact, kept[name]) for name, compact in found.items()]
    rows += [
        EnergyRow(
            request.version, item.key.removeprefix(adapter.PREFIX), targets.module_of(item.key.removeprefix(adapter.PREFIX)),
            targets.kind_of(item.key, item.shape), item.shape, "", item.tuned.dtype if item.tuned else "", status="carried", reason="kept as it was",
        )
        for item in layout.kept
    ]  # fmt: skip
    return sorted(rows, key=lambda row: row.tensor)


def _row(request: Request, compact: Compact, rank: int) -> EnergyRow:
    module, sigma, total = compact.module, compact.singular_values, compact.delta_sq
    tensor = (
        module.name
        if request.lora.kohya or module.name != module.path.removeprefix(adapter.PREFIX)
        else f"{module.name}.weight"
    )
    shape = (module.outputs, module.inputs)
    energies = {r: lowrank.preserved_energy(sigma, total, min(r, len(sigma))) for r in manifest.ENERGY_RANKS}
    return EnergyRow(
        request.version,
        tensor,
        module.name,
        targets.kind_of(tensor, shape),
        (module.experts, *shape) if module.experts > 1 else shape,
        "",
        module.A.dtype,
        status="adapted" if total else "zero_filled",
        reason=f"rank {module.rank} before" if total else "it was zero before",
        rank=rank,
        delta_norm=math.sqrt(total),
        preserved_energy=lowrank.preserved_energy(sigma, total, rank),
        written_energy=written_energy(compact, rank, adapter.DTYPES[request.dtype][1]),
        singular_values=sigma,
        energy_at=energies,
        solver=manifest.OF_FACTORS,
    )


def publish(
    request: Request,
    found: Mapping[str, Compact],
    kept: Mapping[str, int],
    layout: Layout,
    rows: list[EnergyRow],
    config: dict[str, object],
) -> None:
    written = written_rank(kept, request.dialect)
    metadata = metadata_of(request.lora, written)
    weights = reducer.Weights(
        adapter.file_header(layout, request.dtype, metadata),
        lambda: _tensors(request, found, kept, layout),
        adapter.file_bytes(layout, request.dtype, metadata),
    )
    reducer.publish(
        request.out,
        weights,
        rows,
        config=config,
        card=compressed_card(
            request.lora,
            rows,
            kept,
            written=written,
            dialect=request.dialect,
            base_name=_public(request.base_name),
            dtype=request.dtype,
        ),
        run={
            "version": request.version,
            "operation": "compress",
            "numerics_revision": REVISION,
            "settings": {
                "rank": request.rank,
                "energy": request.policy.energy,
                "budget": request.policy.budget.words() if request.policy.budget else None,
                "dialect": request.dialect,
                "dtype": request.dtype,
            },
            "written": {"rank": written, "dtype": request.dtype, "base_name": request.base_name},
            "sources": {"adapter": {"fingerprint": request.lora.fingerprint}},
            "summary": summarize(rows).as_dict(),
        },
        model=storage.basename(request.lora.url),
        base=request.base_name,
    )


def _tensors(
    request: Request, found: Mapping[str, Compact], kept: Mapping[str, int], layout: Layout
) -> Iterator[bytes]:
    biases = {module.bias.name: module.scale for module in request.lora.modules.values() if module.bias}
    for item in layout.in_file_order(request.dtype):
        dtype = adapter.stored_dtype(item, request.dtype)[1]
        if isinstance(item, Kept):
            yield from parts.tensor_chunks(_kept(item, biases.get(item.key, 1.0), dtype))
        else:
            yield from parts.tensor_chunks(_filled(item, found, kept, dtype))


def _kept(item: Kept, scale: float, dtype: torch.dtype) -> Tensor:
    whole = adapter.keep(item)
    return whole if scale == 1 else (whole.float() * scale).to(dtype)


def _filled(slot: Slot, found: Mapping[str, Compact], kept: Mapping[str, int], dtype: torch.dtype) -> Tensor:
    if slot.alpha is not None:
        return adapter.fill(slot, None, 0, dtype)
    first = slot.stack[0] if slot.stack else slot.tensor
    assert first is not None
    name = first.partition(EXPERT)[0]
    factors = found[name].A if slot.side == "A" else found[name].B
    if slot.stack:
        return adapter.fill_stack(slot, factors, kept[name], dtype)
    return adapter.fill(slot, factors[0], kept[name], dtype)


def _public(name: str) -> str:
    """A hub id or a served name; a path says nothing to others."""
    return "" if name.startswith(("/", ".", "~")) or "://" in name else name
