"""What every test starts from: one thread, no network credentials, quick retries, a toy pair."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import stamina
import torch

from phlora_pipeline.cli.leaving import leave_with
from tests import toys

pytest_plugins = ["tests.s3_server"]

_sessions: list[pytest.Session] = []
leave_with(lambda: int(_sessions[0].exitstatus) if _sessions else None)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """What the process is to tell at its end, in which Ray has often been."""
    _sessions.append(session)


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    """Bits differ with the number of threads; two busy threads on two cores are slower than one."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _one_thread_again() -> Iterator[None]:
    """Workers and benchmarks set another number, and leave it to their process."""
    yield
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _quick_retries() -> Iterator[None]:
    with stamina.set_testing(True, attempts=3, cap=True):
        yield


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    """A base and a fine-tune of it, as folders."""
    base = toys.llama_tensors()
    return toys.save(tmp_path / "base", base), toys.save(tmp_path / "tuned", toys.fine_tuned(base))
