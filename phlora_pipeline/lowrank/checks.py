"""Is this a factorisation of that ΔW? Libraries have returned wrong ones without an error; none is published unchecked.

Four facts hold for leading singular triplets, whatever route they came by, and are cheap to test: everything is finite; the
factors' rows are orthogonal with squared lengths σ; random rows ψ see the same matrix, (ψD)·vᵢ = σᵢ·(ψ·uᵢ) for every i; and
Parseval: Σσ² and the energy that ψ sees outside of the factors make up ‖ΔW‖_F².
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from phlora_pipeline.lowrank.delta import to_host
from phlora_pipeline.lowrank.operator import gram
from phlora_pipeline.lowrank.ritz import Triplets

_TOLERANCE = 1e-4
"""Relative to ‖ΔW‖_F or σ_1: rounding of float32 reaches a hundredth of it."""

_SEEN = (0.003, 12.0)
"""χ² of 8 degrees of freedom over 8 lies between these, but for a probability of 1e-9; it is what ψ sees of a residual of
rank one, and sees of others more sharply."""


def problems(
    found: Triplets, norms_sq: Sequence[float], psi: Tensor, seen: Tensor, totals: Sequence[float] | None = None
) -> list[str]:
    """What is wrong with each factorisation of a batch; empty where nothing is.

    To be asked on the side where the third fact holds by construction: of Dᵀ, where short·Dᵀ is what gave the triplets.

    Args:
        found: triplets, q of each; of D, or of Dᵀ, of which psi and seen are then, too.
        norms_sq: ‖D‖_F² of each.
        psi: (b, s, m) random rows that no solver has used.
        seen: (b, s, n): ψ·D, from a product with D itself.
        totals: Σσ² of each over the whole spectrum, where the solver knows it: a value that it has lost is missing there.
    """
    short, long = found.short, found.long
    q, sigma = short.shape[1], found.energies.sqrt().to(short.device)  # (b, q)
    # In float64: a sum of a hundred thousand entries of one sign is off by more in float32 than is tolerated here.
    on_short, on_long = gram(torch.cat([short, psi], dim=1)), gram(torch.cat([long, seen], dim=1))  # (b, q + s, q + s)
    crossed = on_short[:, q:, :q]  # (b, s, q): √σ·ψu
    left = seen - crossed.float() @ long  # ψ·(D − UᵀΣV)
    agreement = on_long[:, q:, :q] - crossed * sigma.unsqueeze(1)
    measures = torch.stack(
        [
            torch.isfinite(short).flatten(1).all(dim=1).double() * torch.isfinite(long).flatten(1).all(dim=1),
            _off(on_short[:, :q, :q], sigma),
            _off(on_long[:, :q, :q], sigma),
            agreement.square().sum(dim=(1, 2)).sqrt() / sigma[:, 0].sqrt().clamp_min(1e-30),
            left.double().square().sum(dim=(1, 2)) / psi.shape[1],
            found.energies.to(short.device).sum(dim=1),
        ],
        dim=1,
    )
    return [
        _problem(row, norm_sq) or _spectrum_problem(total, norm_sq)
        for row, norm_sq, total in zip(to_host(measures), norms_sq, totals or norms_sq, strict=True)
    ]


def _spectrum_problem(total: float, norm_sq: float) -> str:
    if abs(total - norm_sq) <= _TOLERANCE * norm_sq:
        return ""
    return f"energies do not add up: all σ² are {total / norm_sq:.6f} of ‖ΔW‖²"


def _off(inner: Tensor, sigma: Tensor) -> Tensor:
    """Largest entry of P·Pᵀ − Σ, over σ_1."""
    wrong = (inner - torch.diag_embed(sigma)).abs().amax(dim=(1, 2))
    return wrong / sigma[:, 0].clamp_min(1e-30)


def _problem(row: Sequence[float], norm_sq: float) -> str:
    finite, off_short, off_long, disagreement, seen_sq, kept_sq = row
    if not finite:
        return "factors are not finite"
    if not max(off_short, off_long) <= _TOLERANCE:
        return f"singular vectors are not orthogonal ({max(off_short, off_long):.1e})"
    norm = norm_sq**0.5
    if not disagreement <= _TOLERANCE * norm * 8:
        return f"random rows see another matrix ({disagreement / norm:.1e})"
    residual_sq = max(norm_sq - kept_sq, 0.0)
    low, high = _SEEN
    slack = _TOLERANCE * norm_sq
    if not (low * residual_sq - slack <= seen_sq <= high * residual_sq + slack and kept_sq <= norm_sq + slack):
        return f"energies do not add up: Σσ² {kept_sq / norm_sq:.6f}, residual {seen_sq / norm_sq:.6f} of ‖ΔW‖²"
    return ""
