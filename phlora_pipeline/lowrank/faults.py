"""What a library's error means: that memory is out, or that it refuses this matrix. All others are somebody's bug."""

from __future__ import annotations

import torch

_OF_MEMORY = (
    "DefaultCPUAllocator",
    "CUDA error: out of memory",
    "STATUS_ALLOC_FAILED",
    "cublasCreate",
    "cusolverDnCreate",
)
"""A processor's; page-locked memory's; what cuBLAS and cuSOLVER say, which allocate beside torch, and when they are started."""


def out_of_memory(error: BaseException) -> bool:
    """Torch has a type for its own memory on a GPU alone; elsewhere it raises a RuntimeError with these words."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _OF_MEMORY)


def refused(error: BaseException) -> bool:
    """Whether another solver may do: it has not converged, or cuSOLVER does not take a matrix of this size."""
    if isinstance(error, torch.linalg.LinAlgError):  # type: ignore[attr-defined]  # it is exported
        return True
    return isinstance(error, RuntimeError) and "CUSOLVER_STATUS" in str(error) and not out_of_memory(error)
