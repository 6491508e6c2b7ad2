"""The demo, `python -m jobs.demo`: two real pairs of checkpoints → adapters → verified, scored, and one table.

Prepare what is not there yet, extract by the `phlora` command, verify its bytes, load the adapter by PEFT and score it
beside the base and the full fine-tune. At the end a pair that is none, which must be refused. Exit codes: 0 all as it
should be · 1 an adapter is further from its fine-tune than promised · 2 the demo could not go on, or a step of it did not
do what it has to.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    # Before torch is imported: its threads wait busily by default, which on a shared machine costs more than it gains.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # all that is needed is on disk

from phlora_pipeline import manifest
from phlora_pipeline.summary import summarize

from . import antibody, command, minilm, strangers, table
from .errors import DemoError
from .pairs import Pair


def run(root: Path) -> int:
    """The recipe; returns the exit code."""
    start = time.monotonic()
    quiet_libraries()
    first, second = minilm.prepare(root, say), antibody.prepare(root, say)
    results = [extract_and_score(pair) for pair in (first, second)]
    refusal = refused(*strangers.prepare(root))
    print()
    table.show(results)
    print(f"\nnegative control: silero-vad 5.1.2 → 6.0.0, same shapes, refused: {refusal}")
    print(f"\n{time.monotonic() - start:.0f} s in all; a second run re-uses what lies under {root}")
    too_far = [result for result in results if result.lost_points > result.pair.promised_points]
    for result in too_far:
        told = f"{result.pair.name} lost {result.lost_points:.1f} points, more than {result.pair.promised_points}"
        print(f"error: {told}", file=sys.stderr)
    return 1 if too_far else 0


def extract_and_score(pair: Pair) -> table.Result:
    """One pair's way: `phlora extract`, `phlora verify`, PEFT."""
    say(f"{pair.name}: extracting")
    done = command.extract(pair.base, pair.tuned, pair.adapter, pair.options)
    say(f"{pair.name}: extracted in {done.seconds:.0f} s, verifying")
    command.verify(pair.base, pair.tuned, pair.adapter)
    say(f"{pair.name}: scoring base, fine-tune, and base + adapter")
    return table.Result(
        pair=pair,
        summary=summarize(manifest.read(str(pair.adapter / "energy.parquet"))),
        scores=pair.scores(pair.adapter),
        adapter_bytes=(pair.adapter / "adapter_model.safetensors").stat().st_size,
        checkpoint_bytes=(pair.tuned / "model.safetensors").stat().st_size,
    )


def refused(base: Path, stranger: Path) -> str:
    """What `phlora extract` says of two checkpoints that have nothing to do with each other."""
    say("negative control: two checkpoints of the same shapes, trained apart; an error is expected")
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "adapter"
        error = str(command.extract(base, stranger, out, expect=2).said.get("error", ""))
        if "not a fine-tune" not in error:
            raise DemoError(
                f"the negative control was refused for another reason: {error}",
                remedy="this is a bug; please report it",
            )
        if (out / "adapter_config.json").exists():
            raise DemoError(
                "the negative control was refused and yet published", remedy="this is a bug; please report it"
            )
    return error


def quiet_libraries() -> None:
    """No progress bars and notes of libraries between the demo's own lines."""
    from transformers.utils import logging

    settings: Any = logging
    settings.set_verbosity_error()
    settings.disable_progress_bar()
    warnings.simplefilter("ignore", FutureWarning)  # peft and transformers about each other's names


def say(line: str) -> None:
    """Progress goes to stderr, the table to stdout."""
    print(line, file=sys.stderr, flush=True)


def main() -> int:
    """Parse the one option and run."""
    parser = argparse.ArgumentParser(prog="python -m jobs.demo", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--dir",
        type=Path,
        default=Path(".demo"),
        help="where downloads, checkpoints and adapters lie (default: %(default)s)",
    )
    root = parser.parse_args().dir
    try:
        return run(root)
    except DemoError as error:
        what, remedy = error.what, error.remedy
    except OSError as error:
        what, remedy = str(error), f"{root} must be writable, on a disk with 600 MB free; --dir names another folder"
    print(f"error: {what}\n  fix: {remedy}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
