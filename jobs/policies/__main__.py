"""One table of rank policies on four pairs, written for PEFT: bytes, energy, and the task. `python -m jobs.policies`.

Each pair is extracted at fixed ranks, at an energy of 0.9, above its rounding noise, and within the bytes that each fixed
rank takes. A budget that keeps less than the fixed rank of its size is an error, exit code 1.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from jobs.demo import antibody, command, minilm
from jobs.demo.__main__ import quiet_libraries, say
from jobs.demo.pairs import Pair
from jobs.demo.table import plain
from phlora_pipeline import manifest
from phlora_pipeline.ranks import spread_words
from phlora_pipeline.summary import percent, size, summarize

from . import light

FIXED = (8, 32)
MAX_RANK = 128
HEADERS = ("pair", "policy", "ranks", "file", "energy kept", "base", "fine-tuned", "base + adapter")


@dataclass(frozen=True, slots=True)
class Row:
    """One policy on one pair.

    Attributes:
        ranks: in words.
        file_bytes: of the weights.
        kept: share of ‖ΔW‖² over all compared tensors that the factors keep.
        base, tuned, adapted: scores, from 0 to 1; the last None where there is no adapter.
    """

    pair: str
    policy: str
    ranks: str
    file_bytes: int
    kept: float
    base: float
    tuned: float
    adapted: float | None

    @property
    def cells(self) -> list[str]:
        """Under `HEADERS`."""
        scores = [percent(score) for score in (self.base, self.tuned, self.adapted)]
        return [self.pair, self.policy, self.ranks, size(self.file_bytes), percent(self.kept, 2), *scores]


def rows_of(pair: Pair) -> Iterator[Row]:
    """Every policy on one pair; a budget follows the fixed rank whose bytes it has."""
    for rank in FIXED:
        fixed = row_of(pair, f"rank {rank}", ("--rank", str(rank)))
        yield fixed
        yield row_of(pair, f"budget, as rank {rank}", ("--budget", f"{fixed.file_bytes}B"))
    yield row_of(pair, "energy 0.9", ("--energy", "0.9"))
    yield row_of(pair, "auto", ("--rank", "auto"))


def row_of(pair: Pair, policy: str, flags: tuple[str, ...]) -> Row:
    """Extract, verify and score; what an earlier run has found is taken from beside the adapter."""
    out = (
        pair.base.parent / "policies" / "".join(sign if sign.isalnum() else "-" for sign in " ".join(flags).strip("-"))
    )
    say(f"{pair.name}: {policy}")
    where = ("--base", str(pair.base), "--tuned", str(pair.tuned), "--out", str(out))
    done = command.phlora(
        "extract", *where, *flags, "--max-rank", str(MAX_RANK), *pair.options, "--for", "peft", "--json"
    )
    found, version = out / "_score.json", done.said["version"]
    stored = json.loads(found.read_text()) if found.exists() else {}
    if stored.pop("version", None) == version:
        return Row(**stored)
    summary = summarize(manifest.read(str(out / "energy.parquet")))
    weights = out / "adapter_model.safetensors"
    if weights.exists():
        command.verify(pair.base, pair.tuned, out)
    scores = pair.scores(out if weights.exists() else pair.base.parent / "policies" / "rank-8")
    row = Row(
        pair=pair.name,
        policy=policy,
        ranks=spread_words(done.said["ranks"].values()) if done.said["ranks"] else "none",
        file_bytes=weights.stat().st_size if weights.exists() else 0,
        kept=(summary.preserved_energy or 0.0) * (summary.coverage or 0.0),
        base=scores.base,
        tuned=scores.tuned,
        adapted=scores.adapted if weights.exists() else None,
    )
    found.write_text(json.dumps({**asdict(row), "version": version}))
    return row


def short(rows: list[Row]) -> list[str]:
    """Budgets that keep less than the fixed rank of their size."""
    fixed = {(row.pair, row.policy): row for row in rows}
    found = []
    for row in rows:
        rival = fixed.get((row.pair, row.policy.removeprefix("budget, as ")))
        if (
            rival is not row
            and rival is not None
            and (row.kept < rival.kept - 1e-9 or row.file_bytes > rival.file_bytes)
        ):
            found.append(
                f"{row.pair}: {row.policy} keeps {row.kept:.6f} in {row.file_bytes} bytes, it {rival.kept:.6f}"
            )
    return found


def main() -> int:
    """Prepare the pairs, fill the table, judge it."""
    parser = argparse.ArgumentParser(prog="python -m jobs.policies", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--dir", type=Path, default=Path(".demo"), help="the demo's folder (default: %(default)s)")
    root = parser.parse_args().dir
    quiet_libraries()
    pairs = [minilm.prepare(root, say), antibody.prepare(root, say)]
    pairs += [light.prepare(root, kind, say) for kind in light.PEAKS]
    rows = [row for pair in pairs for row in rows_of(pair)]
    print("\n".join(plain([list(HEADERS), *(row.cells for row in rows)])))
    for line in short(rows):
        print(f"error: {line}", file=sys.stderr)
    return 1 if short(rows) else 0


if __name__ == "__main__":
    sys.exit(main())
