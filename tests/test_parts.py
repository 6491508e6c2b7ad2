"""Parts: what goes in comes out, the same input gives the same bytes, and the first writer wins."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from phlora_pipeline import parts
from phlora_pipeline.errors import CheckpointError, NotFoundError
from phlora_pipeline.parts import TensorResult

RESULTS = [
    TensorResult(
        "w1",
        "factored",
        base_sq=1.5,
        tuned_sq=1.25,
        delta_sq=0.1 + 0.2,
        noise_sq=1e-9,
        noise_edge=0.3,
        changed=0.75,
        residual_sq=1e-30,
        singular_values=(0.5, 0.25),
        solver="exact",
        certificate=1.2e-6,
        notes=("krylov 80: certificate 2.0e-03 over 1.0e-03", "one more"),
    ),
    TensorResult("w2", "failed", reason="3 of 4 entries of the base are NaN"),
    TensorResult("w3", "unchanged", base_sq=2.0, tuned_sq=2.0),
]
FACTORS = {"w1": (torch.randn(2, 5), torch.randn(4, 2))}


def test_round_trip(tmp_path: Path) -> None:
    url = str(tmp_path / "a" / "part.safetensors")
    parts.store(url, RESULTS, FACTORS)
    part = parts.load(url)
    assert list(part.results.values()) == RESULTS
    assert torch.equal(parts.read_factor(part, "A", "w1"), FACTORS["w1"][0])
    assert torch.equal(parts.read_factor(part, "B", "w1"), FACTORS["w1"][1])


def test_it_is_an_ordinary_safetensors_file(tmp_path: Path) -> None:
    url = str(tmp_path / "part.safetensors")
    parts.store(url, RESULTS, FACTORS)
    with safe_open(url, "pt") as file:
        assert torch.equal(file.get_tensor("A:w1"), FACTORS["w1"][0])


def test_the_same_input_gives_the_same_bytes_and_the_first_writer_wins(tmp_path: Path) -> None:
    url = tmp_path / "part.safetensors"
    parts.store(str(url), RESULTS, FACTORS)
    first = url.read_bytes()
    parts.store(str(url), RESULTS[1:], {})
    assert url.read_bytes() == first
    parts.store(str(tmp_path / "again.safetensors"), RESULTS, FACTORS)
    assert (tmp_path / "again.safetensors").read_bytes() == first


def test_non_contiguous_factors_are_stored_as_what_they_are(tmp_path: Path) -> None:
    A, B = torch.randn(5, 2).mT, torch.randn(8, 2)[::2]
    parts.store(str(tmp_path / "p.safetensors"), RESULTS[:1], {"w1": (A, B)})
    part = parts.load(str(tmp_path / "p.safetensors"))
    assert torch.equal(parts.read_factor(part, "A", "w1"), A)
    assert torch.equal(parts.read_factor(part, "B", "w1"), B)


def test_a_missing_or_foreign_file_is_no_part(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError):
        parts.load(str(tmp_path / "none.safetensors"))
    from safetensors.torch import save_file

    save_file({"w": torch.ones(1)}, tmp_path / "foreign.safetensors")
    with pytest.raises(CheckpointError, match="not a part"):
        parts.load(str(tmp_path / "foreign.safetensors"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int64])
def test_chunks_are_the_tensors_bytes(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "_CHUNK", 7)
    tensor = torch.arange(10).reshape(2, 5).to(dtype)
    assert b"".join(parts.tensor_chunks(tensor)) == tensor.view(torch.uint8).numpy().tobytes()
