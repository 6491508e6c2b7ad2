"""Names that stand in two places are the same in both."""

from __future__ import annotations

import subprocess
import sys

import pytest

from phlora_pipeline import adapter, prepare, reducer
from phlora_pipeline.zoo import layout


def test_files_have_the_names_that_the_reducer_publishes() -> None:
    assert layout.PUBLISHED == reducer.PUBLISHED
    assert (layout.WEIGHTS, layout.CONFIG) == (adapter.WEIGHTS, adapter.CONFIG)
    assert (layout.MANIFEST, layout.CARD, layout.RUN) == (reducer.MANIFEST, reducer.CARD, reducer.RUN)
    assert layout.PARTS == prepare.PARTS


@pytest.mark.parametrize(
    "name", ["", ".", "..", "_state", ".versions", "-x", "a/b", "a b", "a\n", "é", "x" * 97, "<script>"]
)
def test_the_zoos_own_folders_and_hostile_names_are_no_models(name: str) -> None:
    assert not layout.is_model(name)


@pytest.mark.parametrize(
    "name", ["", "..", "latest.json", "0" * 15, "0" * 65, "ABCDEF0123456789", "0123456789abcdef/x"]
)
def test_other_folders_are_no_versions(name: str) -> None:
    assert not layout.is_version(name)


def test_text_sorts_as_time_does() -> None:
    told = [layout.utc_now() for _ in range(50)]
    assert told == sorted(told)
    assert all(len(text) == len(told[0]) for text in told)


@pytest.mark.parametrize("told", ["2026-11-22T09:00:00Z", "2026-11-22T10:00:00+01:00", "2026-11-22T09:00:00"])
def test_a_moment_is_the_same_however_it_is_told(told: str) -> None:
    assert layout.moment(told) == 1795338000.0


def test_records_and_pointers_need_no_torch() -> None:
    """Nobody waits seconds for a status."""
    script = (
        "import sys; from phlora_pipeline.zoo import dataset, gc, latest, pull, state;"
        "print([name for name in ('torch', 'pyarrow', 'ray', 'boto3') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
