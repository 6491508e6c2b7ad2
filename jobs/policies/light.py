"""Two more pairs on MiniLM: one whose embeddings alone are trained, and one tuned so lightly that bfloat16 hardly shows it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from jobs.demo import minilm
from jobs.demo.corpus import read_corpus
from jobs.demo.folders import written_aside
from jobs.demo.pairs import Pair, digest
from jobs.demo.tagging import fine_tune

SEED, STEPS, BATCH = 42, 200, 8
PEAKS = {"embeddings": 1e-3, "light": 1e-5}


def prepare(root: Path, kind: str, say: Callable[[str], None]) -> Pair:
    """The pair of a kind under `root`, trained unless it is there, from the base of the demo's first.

    Args:
        kind: `embeddings` or `light`.
        say: told what takes time before it is done.
    """
    import torch

    first = minilm.prepare(root, say)
    texts = root / "packages" / "brown-1.9.80" / "package"
    recipe = {"revision": 1, "base": first.base.parent.name, "kind": kind, "peak": PEAKS[kind], "steps": STEPS}
    folder = root / f"minilm-{kind}-{digest(recipe)}"
    dtype = torch.bfloat16 if kind == "light" else torch.float32
    if not folder.exists():
        say(f"MiniLM, {kind}: {STEPS} steps of fine-tuning (a minute or two)")
        model, tokenizer = minilm.load_model(first.base).to(dtype), minilm.load_tokenizer(first.base)
        with written_aside(folder) as aside:
            minilm.save(model, tokenizer, aside / "base")
            _train(model.float(), tokenizer, texts, kind)
            minilm.save(model.to(dtype), tokenizer, aside / "tuned")
    name = {"embeddings": "MiniLM, embeddings trained", "light": "MiniLM, lightly tuned in bf16"}[kind]
    base, tuned = folder / "base", folder / "tuned"
    scores = partial(minilm.scores_of, base, tuned, texts)
    return Pair(name, first.metric, base, tuned, folder / "adapter", scores, promised_points=100.0)


def _train(model: Any, tokenizer: Any, texts: Path, kind: str) -> None:
    for parameter in model.base_model.encoder.parameters():
        parameter.requires_grad = kind != "embeddings"
    sentences = minilm.sample(read_corpus(texts).train, STEPS * BATCH)
    fine_tune(model, tokenizer, sentences, batch=BATCH, peak=PEAKS[kind], seed=SEED)
