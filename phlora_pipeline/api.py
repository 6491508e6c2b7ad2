"""The commands as functions of Python: `from phlora_pipeline import api as phlora`.

Paths and URLs go in as they do on the command line, frozen values come out, and what is wrong is a
`phlora_pipeline.errors.PhloraError` with the command's own words, remedy and exit code. Nothing is printed.

A base and its fine-tune, made here; yours are folders or URLs with `config.json` and safetensors:

>>> import pathlib, tempfile, torch
>>> from safetensors.torch import save_file
>>> folder = pathlib.Path(tempfile.mkdtemp())
>>> names = [f"model.layers.{n}.mlp.{side}_proj.weight" for n in range(4) for side in ("up", "down")]
>>> draw = torch.Generator().manual_seed(7)
>>> before = {name: torch.randn(48, 48, generator=draw) for name in names}
>>> after = {name: W + 0.05 * torch.randn(48, 48, generator=draw) for name, W in before.items()}
>>> for side, tensors in (("base", before), ("tuned", after)):
...     (folder / side).mkdir()
...     save_file(tensors, folder / side / "model.safetensors")
...     _ = (folder / side / "config.json").write_text('{"model_type": "llama"}')
>>> base, tuned = str(folder / "base"), str(folder / "tuned")

Look before you pick a rank: extract once with a generous one, read the curve.

>>> from phlora_pipeline import api as phlora
>>> wide = phlora.extract(base, tuned, str(folder / "r32"), rank=32, engine="local")
>>> curve = phlora.energy_curve(wide.out, ranks=[8, 16, 32])
>>> [round(share, 1) for share in curve.mean]
[0.5, 0.7, 1.0]

Then what you need: several ranks at no second SVD, a share of the energy, or a size.

>>> several = phlora.extract_ranks(base, tuned, str(folder / "several"), [8, 16], engine="local")
>>> [(pathlib.Path(one.out).name, one.rank) for one in several]
[('r8', 8), ('r16', 16)]
>>> small = phlora.extract(base, tuned, str(folder / "small"), budget="80kB", dialect="peft", engine="local")
>>> small.adapter_bytes <= 80_000
True

Is it what it says, by its bytes?

>>> phlora.verify(base, tuned, small.out).passed
True

An adapter that is too large becomes a smaller one, without its checkpoints; several are put into their base again.

>>> smaller = phlora.compress(wide.out, str(folder / "r8"), rank=8)
>>> smaller.original_rank, smaller.rank
(32, 8)
>>> merged = phlora.merge(base, [wide.out, (smaller.out, 0.5)], str(folder / "merged"))
>>> merged.changed
8

And all of it for people: `report(..., "page.html")` makes a page with figures (the extra `report`), this a table.

>>> page = phlora.report([wide.out, smaller.out], str(folder / "models.md"), form="md")
>>> page.models
2
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from phlora_pipeline import pipeline, several
from phlora_pipeline.compress import CompressResult, compress
from phlora_pipeline.config import run_config
from phlora_pipeline.merge import MergeResult, merge
from phlora_pipeline.pipeline import ExtractResult, Observer
from phlora_pipeline.report import EnergyCurve, Made, energy_curve, report
from phlora_pipeline.verify import Verification, verify

__all__ = [
    "CompressResult", "EnergyCurve", "ExtractResult", "Made", "MergeResult", "Observer", "Verification",
    "compress", "energy_curve", "extract", "extract_ranks", "merge", "report", "verify",
]  # fmt: skip


class _Silent:
    """An observer of nothing: warnings are in the result, too."""

    def planned(self, plan: object) -> None: ...

    def task_done(self, report: object) -> None: ...

    def warn(self, text: str) -> None: ...


def extract(base: str, tuned: str, out: str, *, observer: Observer | None = None, **settings: Any) -> ExtractResult:
    """One fine-tune and its base → one adapter.

    Args:
        base, tuned: checkpoints: folders or `.safetensors` files, as paths or URLs.
        out: an empty or absent folder.
        observer: is told how far it is.
        settings: any other of `phlora_pipeline.config.RunConfig`: rank (a number, or `auto`), energy, budget, dialect, dtype,
            carry, targets, solver, engine, device …, by the names and with the defaults of `phlora extract`.

    Raises:
        RequestError: a setting or the pair is wrong; nothing is published.
        ModelFailedError: a tensor failed; nothing is published.
        PhloraError: storage, credentials, device, or a source that changed.
    """
    return pipeline.extract(run_config(base=base, tuned=tuned, out=out, **settings), observer or _Silent())


def extract_ranks(
    base: str, tuned: str, out: str, ranks: Sequence[int], *, observer: Observer | None = None, **settings: Any
) -> list[ExtractResult]:
    """An adapter of each rank, smallest first, in `out/r8`, `out/r16` …: one extraction, no second SVD.

    Args:
        base, tuned, observer, settings: as of `extract`.
        out: the folder of them all.
        ranks: of the adapters.

    Raises:
        PhloraError: as `extract`; adapters that are committed stay.
    """
    config = run_config(base=base, tuned=tuned, out=out, rank=max(ranks, default=0), **settings)
    return several.extract(config, ranks, observer or _Silent())
