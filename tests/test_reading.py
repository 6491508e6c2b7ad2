"""Tensors read ahead: the right bytes whatever the hints, in memory that is used again but never while it is read."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast
from unittest.mock import Mock

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from phlora_pipeline import reading
from phlora_pipeline.checkpoint import TensorRef, open_file
from phlora_pipeline.errors import SourceChangedError
from phlora_pipeline.reading import Reader

CPU = torch.device("cpu")
SHAPES = [(3, 5), (64,), (0, 4), (), (7, 11), (128, 33), (1,)]


def tensor(number: int) -> torch.Tensor:
    dtype = (torch.float32, torch.bfloat16, torch.float16)[number % 3]
    return torch.randn(SHAPES[number], generator=torch.Generator().manual_seed(number)).to(dtype)


@pytest.fixture(scope="module")
def refs(tmp_path_factory: pytest.TempPathFactory) -> list[TensorRef]:
    """Of one file, in the order of `SHAPES`."""
    file = tmp_path_factory.mktemp("checkpoint") / "model.safetensors"
    save_file({str(number): tensor(number) for number in range(len(SHAPES))}, file)
    tensors, _ = open_file(str(file))
    return [tensors[str(number)] for number in range(len(SHAPES))]


NUMBERS = st.lists(st.integers(0, len(SHAPES) - 1), min_size=1, max_size=4)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    script=st.lists(st.tuples(NUMBERS, st.none() | NUMBERS), min_size=1, max_size=8),
    most=st.sampled_from([0, 200, 1 << 20]),
)
def test_what_is_taken_is_what_is_stored(
    refs: list[TensorRef], script: list[tuple[list[int], list[int] | None]], most: int
) -> None:
    """Whatever was hinted at before, and whatever fits into the memory that is kept."""
    reader = Reader(CPU, most)
    for numbers, hint in script:
        following = [] if hint is None else [[refs[number] for number in hint], [refs[hint[0]]]]
        with reader.taken([refs[number] for number in numbers], following) as stored:
            for _, ahead in reader._ahead:
                ahead.exception()  # what is read ahead is all there, and has changed nothing here
            assert [found.dtype for found in stored] == [tensor(number).dtype for number in numbers]
            for found, number in zip(stored, numbers, strict=True):
                assert found.shape == tensor(number).shape
                assert torch.equal(found, tensor(number))


def reads(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    seen: list[list[str]] = []
    original = reading.read_tensors

    def noted(refs: Sequence[TensorRef], memory: memoryview | None = None) -> list[torch.Tensor]:
        seen.append([ref.name for ref in refs])
        return original(refs, memory)

    monkeypatch.setattr(reading, "read_tensors", noted)
    return seen


def test_a_hint_that_comes_true_is_read_once(refs: list[TensorRef], monkeypatch: pytest.MonkeyPatch) -> None:
    seen, reader = reads(monkeypatch), Reader(CPU, 1 << 20)
    with reader.taken(refs[:2], [refs[4:6]]):
        pass
    with reader.taken(refs[4:6]):
        pass
    assert seen == [["0", "1"], ["4", "5"]]


def test_what_is_too_large_is_not_read_ahead_and_keeps_no_memory(
    refs: list[TensorRef], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, reader = reads(monkeypatch), Reader(CPU, 1000)
    large, small = [refs[5]], [refs[0]]
    with reader.taken(small, [large]):
        assert seen == [["0"]]
    with reader.taken(large, [small]):
        pass
    with reader.taken(small):
        pass
    assert seen == [["0"], ["5"], ["0"]]
    assert [len(memory) for memory in reader._free] == [64]


def test_two_buffers_do_for_any_number_of_reads(refs: list[TensorRef]) -> None:
    reader = Reader(CPU, 1 << 20)
    for _ in range(20):
        with reader.taken([refs[5]], [[refs[5]]]):
            pass
    assert len(reader._free) <= 2
    first = {id(memory) for memory in reader._free}
    with reader.taken([refs[5]]), reader.taken([refs[4]]):
        pass
    assert {id(memory) for memory in reader._free} >= first


@pytest.mark.parametrize("ahead", [True, False])
def test_a_replaced_source_is_an_error_of_the_one_who_takes_it(tmp_path: Path, ahead: bool) -> None:
    first, second = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    for file in (first, second):
        save_file({"w": torch.ones(4, 4)}, file)
    (a, _), (b, _) = open_file(str(first)), open_file(str(second))
    data = second.read_bytes()
    second.unlink()
    second.write_bytes(data)  # even the same bytes: nobody can know that without reading all of them
    reader = Reader(CPU, 1 << 20)
    with reader.taken([a["w"]], [[b["w"]]] if ahead else []) as stored:
        assert torch.equal(stored[0], torch.ones(4, 4))
    with pytest.raises(SourceChangedError, match="no longer what was planned"), reader.taken([b["w"]]):
        pass
    with reader.taken([a["w"]], [[b["w"]]]):
        pass
    with reader.taken([a["w"]]) as stored:  # a hint that failed and was wrong harms nobody
        assert torch.equal(stored[0], torch.ones(4, 4))


def test_an_error_while_computing_gives_the_memory_back(refs: list[TensorRef]) -> None:
    reader = Reader(CPU, 1 << 20)
    with pytest.raises(ZeroDivisionError), reader.taken([refs[5]]):
        raise ZeroDivisionError
    assert len(reader._free) == 1


@pytest.mark.parametrize("words", ["CUDA error: out of memory", "CUDA out of memory. Tried to allocate 2.00 GiB."])
def test_without_room_for_the_copies_tensors_stay_where_they_are(
    words: str, refs: list[TensorRef], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of page-locked memory, or of the device's."""
    reader = Reader(CPU, 1 << 20)
    reader._copies = cast(Any, "a stream")
    failure = torch.OutOfMemoryError(words) if "Tried" in words else RuntimeError(words)
    monkeypatch.setattr(reading, "_on_device", Mock(side_effect=failure))
    with reader.taken([refs[5]]) as stored:
        assert torch.equal(stored[0], tensor(5))
    monkeypatch.setattr(reading, "_on_device", Mock(side_effect=RuntimeError("CUDA error: unspecified launch failure")))
    with pytest.raises(RuntimeError, match="launch failure"), reader.taken([refs[5]]):
        pass


def test_what_is_read_ahead_goes_where_nothing_is_needed_any_more(refs: list[TensorRef]) -> None:
    reader = Reader(CPU, 1 << 20)
    with reader.taken([refs[5]]) as stored:
        at = stored[0].data_ptr()
        reader.give_back(stored)
        reader.read_ahead([[refs[4]]])
        with reader.taken([refs[4]]) as following:
            assert (following[0].data_ptr(), stored) == (at, [])
            assert torch.equal(following[0], tensor(4))
    assert len(reader._free) == 1  # once, however often it is given back
