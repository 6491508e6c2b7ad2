"""Small eigenproblems on several threads: the same numbers, in the same order."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from phlora_pipeline.lowrank import small


@pytest.fixture(params=[1, 2, 3])
def _threads(request: pytest.FixtureRequest) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


def matrices(count: int, rows: int = 12) -> torch.Tensor:
    factors = torch.randn(count, rows, 2 * rows, dtype=torch.float64, generator=torch.Generator().manual_seed(count))
    return factors @ factors.mT


@pytest.mark.usefixtures("_threads")
@pytest.mark.parametrize("count", [1, 2, 5])
def test_every_matrix_has_its_own_eigenvalues(count: int) -> None:
    given = matrices(count)
    assert torch.equal(small.eigvalsh_beside(given), torch.linalg.eigvalsh(given))
    values, W = small._eigh_beside(given)
    expected = torch.linalg.eigh(given)
    assert torch.equal(values, expected.eigenvalues)
    assert torch.equal(W, expected.eigenvectors)


def test_a_processors_own_are_solved_as_they_come() -> None:
    given = matrices(3)
    assert torch.equal(small.eigvalsh(given), torch.linalg.eigvalsh(given))
    assert torch.equal(small.eigh(given)[0], torch.linalg.eigh(given).eigenvalues)


def test_what_is_asked_of_a_matrix_that_is_refused_is_told() -> None:
    with pytest.raises(torch.linalg.LinAlgError):
        small.eigvalsh_beside(torch.full((2, 4, 4), torch.nan, dtype=torch.float64))
