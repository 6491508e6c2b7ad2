"""A number c with E_r(optimal) − E_r(ours) ≤ c, from what the solver has at hand.

**The bound.** Let G = DᵀD, V an orthonormal basis of p ≥ r rows, M = VGVᵀ, C = VG(I − VᵀV), P = (I − VᵀV)G(I − VᵀV), and
μ ≥ λ_max(P). For x > 0 and any vectors a in the span of V and b orthogonal to it, 2aᵀCb ≤ aᵀ(CCᵀ/x)a + x·bᵀb, hence

    G  ≼  (M + CCᵀ/x) ⊕ (P + x·I)  ≼  (M + CCᵀ/x) ⊕ (μ + x)·I,

and so λ_i(G) is at most the i-th largest of the p eigenvalues of M + CCᵀ/x and of μ + x, repeated. That holds for each x by
itself, so each i takes the x that suits it best:

    Σ_{i≤r} λ_i(G)  ≤  Σ_{i≤r} min_x λ_i((M + CCᵀ/x) ⊕ (μ + x)·I).

With x = θ_i − μ, where the Ritz value θ_i is above μ, it is the gap bound (a residual enters as ‖c_i‖²/(θ_i − μ)); where it
is not, small x gives the gap-free one, Σ max(θ_i, μ + x). The left side is the optimal energy (Eckart and Young; Ky Fan),
and ours is Σσ_i² of the triplets that we return, so c is the difference over ‖ΔW‖_F², and a rounding term.

**The tail.** μ comes from s random rows Z ~ N(0, 1), drawn independently of V: with T_j the Chebyshev polynomial of degree
j, β > 0, λ = λ_max(P) ≥ β and w its eigenvector, the s columns of  Y = T_j(√(P/β))·(I − VᵀV)Zᵀ  have wᵀY = T_j(√(λ/β))·wᵀZᵀ, and so
N = ‖Y‖₂² ≥ T_j(√(λ/β))²·g  where g = ‖Zw‖² is χ² of s degrees of freedom, whatever w is. (In the spectral norm: in
Frobenius's, all s columns of what is not w would count.) With x_s the quantile P(χ²_s < x_s) = δ, therefore, but for a
probability of δ = 1e-9 per tensor and estimate,

    λ  ≤  β·cosh²(arccosh(√(N/x_s))/j).

This is Dixon's (1983) power estimate with a polynomial that grows as fast as one of its degree can; Kuczyński and
Woźniakowski (1992) give the like for Lanczos. The polynomials alternate Dᵀ and D, so degree j takes j products of s rows.
They are done in low precision: rounding D to D + E moves √λ by at most ‖E‖₂ ≤ ‖E‖_F, which is measured; a further 1/32 covers
the rounding of the panels.

c is thereby probabilistic; where it is shown it is called so.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from phlora_pipeline.lowrank.delta import to_host
from phlora_pipeline.lowrank.operator import Operator, gram
from phlora_pipeline.lowrank.panels import against, gaussian
from phlora_pipeline.lowrank.ritz import Compression
from phlora_pipeline.lowrank.small import eigvalsh, eigvalsh_beside

PROBES = 16
"""s, rows of Z."""

FAILURE = 1e-9
"""δ, the probability that one estimate of the tail is too low."""

_SHIFTS = 16
"""Values of x that are tried."""

_LOWEST_SHIFT = 0.01
"""The smallest of them, as a share of θ_r."""

_LARGE, _HUGE = 20.0, 600.0
"""Exponents from which arccosh is a logarithm, and from which nothing is known."""

_PANEL_ROUNDING = 1 + 1 / 32
_ROUNDING = 16 * 2.0**-24
"""Share of the captured energy that float32 arithmetic may have moved: many times what was ever seen."""

_FLOOR = 1e-9
"""Of ‖D‖_F²: tails and shifts below it are not told apart."""


def certificate(optimum: float, captured: float, norm_sq: float) -> float:
    """The number c ≥ 0, from a bound of the optimal energy; infinite where that is not a number.

    Args:
        optimum: an upper bound of Σ_{i≤r} λ_i(G).
        captured: Σσ_i² of the triplets returned.
        norm_sq: ‖D‖_F².
    """
    if not math.isfinite(optimum):
        return math.inf
    lost = max(min(optimum, norm_sq) - captured, 0.0)  # no more than all of it can be optimal
    return (lost + _ROUNDING * captured) / norm_sq


def optimum_bound(found: Compression, tails: Sequence[float], rank: int) -> list[list[float]]:
    """Upper bounds of λ_1 … λ_rank of each G of the batch, each of them valid by itself.

    Args:
        found: of p ≥ rank rows.
        tails: μ of each matrix.
        rank: how many are wanted.
    """
    # Processors that have several matrices take one on each thread; those of a GPU are waited for.
    eigenvalues = eigvalsh if found.V.device.type == "cpu" else eigvalsh_beside
    bounds = []
    for M, S, tail in zip(found.M, found.S, tails, strict=True):
        ritz = torch.linalg.eigvalsh(M).flip(-1)
        largest = ritz[0].clamp_min(torch.finfo(torch.float64).tiny)
        lowest = torch.clamp_min(_LOWEST_SHIFT * ritz[rank - 1] / largest, _FLOOR)
        steps = torch.linspace(0, 1, _SHIFTS, dtype=torch.float64)
        shifts = largest * lowest ** (1 - steps)  # geometric, from the smallest that matters to the largest
        values = eigenvalues(M + S / shifts.view(-1, 1, 1))  # (shifts, p)
        others = (tail + shifts).unsqueeze(-1).expand(-1, rank)
        ordered = torch.cat([values, others], dim=-1).sort(dim=-1, descending=True)[0][:, :rank]
        bounds.append(to_host(ordered.min(dim=0)[0]))
    return bounds


def tail_bound(
    op: Operator, V: Tensor, names: Sequence[str], guesses: Sequence[float], norms_sq: Sequence[float], degree: int
) -> list[float]:
    """μ ≥ λ_max(P) of each matrix of the batch, but for a probability of `FAILURE` each.

    Args:
        op: D.
        V: (b, p, n), orthonormal rows, or zero ones.
        names: seed Z.
        guesses: β of each: near λ_max(P), better a little below than above; any is valid that does not depend on Z.
        norms_sq: ‖D‖_F² of each.
        degree: j ≥ 1, the number of products.
    """
    betas = [max(guess, _FLOOR * norm_sq) for guess, norm_sq in zip(guesses, norms_sq, strict=True)]
    scale = torch.tensor(betas, dtype=torch.float64).rsqrt().float().to(op.device).view(-1, 1, 1)
    previous = against(gaussian(names, f"tail {degree}", PROBES, op.shape[2], op.device), V)  # T_0
    current = scale * op.to_short(previous)  # T_1
    twice = 2 * scale
    shrunk = torch.zeros(len(betas), dtype=torch.float64, device=op.device)  # log of what both were divided by
    for step in range(2, degree + 1):
        following = op.to_short(current) if step % 2 else against(op.to_long(current), V)
        previous, current = current, following.mul_(twice).sub_(previous)
        # Where β is far below λ the polynomials outgrow float32.
        size = current.abs().amax(dim=(1, 2), keepdim=True).clamp_min(1)
        previous, current = previous / size, current / size
        shrunk += size.double().log().view(-1)
    roundings = op.roundings(norms_sq)
    logs = to_host(_largest(gram(current)).log() + 2 * shrunk)
    return [
        (math.sqrt(_inflated(beta, log, degree)) + rounding) ** 2 * _PANEL_ROUNDING
        for beta, log, rounding in zip(betas, logs, roundings, strict=True)
    ]


def _largest(squares: Tensor) -> Tensor:
    """λ_max of each Gram matrix; infinite where one is not finite, which LAPACK would refuse the whole batch for."""
    finite = torch.isfinite(squares).all(dim=2).all(dim=1)
    values = eigvalsh(torch.where(finite.view(-1, 1, 1), squares, 0))[:, -1].clamp_min(0)
    return torch.where(finite, values, math.inf)


def _inflated(beta: float, log_length: float, degree: int) -> float:
    """β·cosh²(arccosh(√(N/x_s))/j) from the logarithm of N."""
    growth = (log_length - math.log(chi_square_quantile(PROBES, FAILURE))) / 2
    if not growth < _HUGE:
        return math.inf  # also where N is not a number
    arccosh = growth + math.log(2) if growth > _LARGE else math.acosh(max(math.exp(growth), 1.0))
    return beta * math.cosh(arccosh / degree) ** 2


@functools.cache
def chi_square_quantile(degrees: int, probability: float) -> float:
    """The x with P(χ² < x) = probability, for an even number of degrees of freedom: a Poisson sum, bisected."""
    half = degrees // 2
    low, high = 0.0, float(degrees)
    for _ in range(100):
        middle = (low + high) / 2
        rate = middle / 2
        term = math.exp(half * math.log(rate) - rate - math.lgamma(half + 1)) if rate else 0.0
        below = 0.0
        for index in range(half + 1, half + 200):
            below += term
            term *= rate / index
        low, high = (middle, high) if below < probability else (low, middle)
    return low
