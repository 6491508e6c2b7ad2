"""Other ways to the same factors. Each starts where ours does, at two bf16 tensors in memory, and ends at A and B."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable

import torch
from torch import Tensor

Method = Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]]
"""(base, tuned, rank) → (A (r, k), B (d, r))."""

OVERSAMPLED = 8
BASELINE = "torch.linalg.svd"


def full_svd(base: Tensor, tuned: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """What the paper and every known extractor do: a thin SVD by LAPACK, cut off."""
    U, S, Vh = torch.linalg.svd(tuned.float() - base.float(), full_matrices=False)
    return _factors(U[:, :rank], S[:rank], Vh[:rank])


def lowrank_2(base: Tensor, tuned: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """`torch.svd_lowrank` with its default of two power iterations."""
    return _svd_lowrank(base, tuned, rank, niter=2)


def lowrank_4(base: Tensor, tuned: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The same with four."""
    return _svd_lowrank(base, tuned, rank, niter=4)


def _svd_lowrank(base: Tensor, tuned: Tensor, rank: int, *, niter: int) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    delta = tuned.float() - base.float()
    U, S, V = torch.svd_lowrank(delta, q=min(rank + OVERSAMPLED, *delta.shape), niter=niter)
    return _factors(U[:, :rank], S[:rank], V.mT[:rank])


def gesvda(base: Tensor, tuned: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The approximate driver of cuSOLVER, which on an H100 is the most accurate of its three."""
    return _svd_by("gesvda", base, tuned, rank)


def gesvd(base: Tensor, tuned: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """QR iteration by cuSOLVER."""
    return _svd_by("gesvd", base, tuned, rank)


def gesvdj(base: Tensor, tuned: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Jacobi sweeps by cuSOLVER: what `torch.linalg.svd` takes on a GPU unless it is told otherwise."""
    return _svd_by("gesvdj", base, tuned, rank)


def _svd_by(driver: str, base: Tensor, tuned: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    U, S, Vh = torch.linalg.svd(tuned.float() - base.float(), full_matrices=False, driver=driver)
    return _factors(U[:, :rank], S[:rank], Vh[:rank])


def arpack(base: Tensor, tuned: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """`scipy.sparse.linalg.svds`: ARPACK's Lanczos, to machine precision."""
    solve = importlib.import_module("scipy.sparse.linalg").svds
    U, S, Vh = solve((tuned.float() - base.float()).numpy(), k=rank, rng=0)
    order = S.argsort()[::-1]
    return _factors(*(torch.from_numpy(part.copy()) for part in (U[:, order], S[order], Vh[order])))


def randomized(base: Tensor, tuned: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """scikit-learn's `randomized_svd` with its defaults."""
    solve = importlib.import_module("sklearn.utils.extmath").randomized_svd
    U, S, Vh = solve((tuned.float() - base.float()).numpy(), n_components=rank, random_state=0)
    return _factors(*(torch.from_numpy(part) for part in (U, S, Vh)))


def _factors(U: Tensor, S: Tensor, Vh: Tensor) -> tuple[Tensor, Tensor]:
    root = S.sqrt()
    return root.unsqueeze(1) * Vh, U * root


METHODS: dict[str, Method] = {
    "torch.svd_lowrank, niter=2": lowrank_2,
    "torch.svd_lowrank, niter=4": lowrank_4,
    "scipy svds": arpack,
    "scikit-learn randomized_svd": randomized,
}
_NEEDS = {"scipy svds": "scipy", "scikit-learn randomized_svd": "sklearn"}


_ON_A_GPU: dict[str, Method] = {
    "torch.svd_lowrank, niter=2": lowrank_2,
    "torch.svd_lowrank, niter=4": lowrank_4,
    "torch.linalg.svd, gesvdj": gesvdj,
    "torch.linalg.svd, gesvd": gesvd,
    "torch.linalg.svd, gesvda": gesvda,
}

WHOLE = frozenset(name for name in _ON_A_GPU if name.startswith(BASELINE))
"""What costs the same whatever the rank."""


def available(device: str = "cpu") -> dict[str, Method]:
    """Those that know the device, and whose library is installed (extra `bench`)."""
    return {
        name: method
        for name, method in (METHODS if device == "cpu" else _ON_A_GPU).items()
        if name not in _NEEDS or importlib.util.find_spec(_NEEDS[name]) is not None
    }


def takes(name: str, shape: tuple[int, int], rank: int) -> bool:
    """Whether a method can do this cell at all: ARPACK finds fewer than all singular values."""
    return rank <= min(shape) and not (name == "scipy svds" and rank == min(shape))
