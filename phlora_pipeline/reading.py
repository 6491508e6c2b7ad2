"""Tensors on their way to the device while others are computed there, through memory that is used again.

Fresh memory costs more than the copy into it: the kernel clears and maps every page, 46 MiB in 50 ms instead of 9. What
goes on to a GPU is read into pinned memory, which costs ten times that to make, and is free again once its copy is over there.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from phlora_pipeline.checkpoint import TensorRef, read_tensors, room_for
from phlora_pipeline.lowrank import out_of_memory


@dataclass(frozen=True, slots=True)
class _Loaded:
    """Tensors, and the memory of the `Reader` that they lie in, if they do."""

    tensors: list[Tensor]
    memory: memoryview | None


class Reader:
    """Reads lists of tensors, some lists ahead.

    Attributes:
        waited: seconds in all for which whoever took tensors had to wait for them.
    """

    def __init__(self, device: torch.device, most_bytes: int) -> None:
        """Of one worker.

        Args:
            device: where the tensors are wanted.
            most_bytes: a list that is larger is not read ahead, and its memory is not kept: memory before speed.
        """
        self._device, self._most_bytes = device, most_bytes
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="phlora-read-ahead")
        self._copies = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self._free: list[memoryview] = []
        self._lent: dict[int, memoryview] = {}
        self._ahead: list[tuple[Sequence[TensorRef], Future[_Loaded]]] = []
        self.waited = 0.0

    @contextlib.contextmanager
    def taken(self, refs: Sequence[TensorRef], following: Sequence[Sequence[TensorRef]] = ()) -> Iterator[list[Tensor]]:
        """These tensors, as `read_tensors` gives them, while the lists that are likely to follow are being read.

        On the CPU, or on a GPU already where they fit beside what is computed there. After
        the block they must not be used any more: the memory has other tensors then.

        Raises:
            SourceChangedError: a shard was replaced since its header was read.
            CredentialsError, StorageError: as storage says.
        """
        began = time.monotonic()
        loaded = self._take(refs)
        self.waited += time.monotonic() - began
        if loaded.memory is not None:
            self._lent[id(loaded.tensors)] = loaded.memory
        try:
            self.read_ahead(following)
            yield loaded.tensors
        finally:
            self.give_back(loaded.tensors)

    def read_ahead(self, following: Sequence[Sequence[TensorRef]]) -> None:
        """Begin to read the lists that are likely to be taken next."""
        waiting = [hint for hint, _ in self._ahead]
        self._ahead += [
            (hint, self._thread.submit(self._read, hint))
            for hint in following
            if hint not in waiting and room_for(hint) <= self._most_bytes
        ]

    def give_back(self, tensors: list[Tensor]) -> None:
        """Before the block ends that they were taken for: what is read ahead from now on may go where they were."""
        tensors.clear()
        if (memory := self._lent.pop(id(tensors), None)) is not None:
            self._free.append(memory)

    def _take(self, refs: Sequence[TensorRef]) -> _Loaded:
        while self._ahead:
            hint, ahead = self._ahead.pop(0)
            if hint == refs:
                return ahead.result()
            # What comes in another order than it was hinted at is no longer wanted.
            if not ahead.cancel() and ahead.exception() is None and (memory := ahead.result().memory) is not None:
                self._free.append(memory)
        return self._read(refs)

    def _read(self, refs: Sequence[TensorRef]) -> _Loaded:
        wanted = room_for(refs)
        memory = self._memory(wanted) if 0 < wanted <= self._most_bytes else None
        loaded = _Loaded(read_tensors(refs, memory), memory)
        if self._copies is None:
            return loaded
        try:
            there = _on_device(loaded.tensors, self._device, self._copies)
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
            return loaded  # they go there one by one, when their turn comes
        if memory is not None:
            self._free.append(memory)
        return _Loaded(there, None)

    def _memory(self, wanted: int) -> memoryview:
        """The smallest that does; where none does, one too small is given up for it."""
        self._free.sort(key=len)
        for index, memory in enumerate(self._free):
            if len(memory) >= wanted:
                return self._free.pop(index)
        if self._free:
            self._free.pop()
        if self._device.type == "cuda":
            try:
                return torch.empty(wanted, dtype=torch.uint8, pin_memory=True).numpy().data
            except RuntimeError as error:
                if not out_of_memory(error):
                    raise
        return memoryview(bytearray(wanted))


def _on_device(stored: list[Tensor], device: torch.device, copies: torch.cuda.Stream) -> list[Tensor]:
    """Copied from pinned memory on a stream of their own, while the device computes on another."""
    with torch.cuda.stream(copies):
        moved = [tensor.pin_memory().to(device, non_blocking=True) for tensor in stored]
    copies.synchronize()
    for tensor in moved:  # their memory is not given out again before the computing stream has read them
        tensor.record_stream(torch.cuda.default_stream(device))
    return moved
