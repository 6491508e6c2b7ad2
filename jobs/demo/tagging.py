"""Part-of-speech tagging with a BERT token classifier: batches, the linear probe, full-rank training, accuracy.

All of it is deterministic for one version of torch and one thread: constant seeds, and batches in an order of their own.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from .corpus import Sentence

IGNORED = -100
"""Label of tokens that are not scored: special ones, padding, and all but the first piece of a word."""

_LONGEST = 64
_EVALUATION_BATCH = 64
_WARM_UP_STEPS = 20


def encode(sentences: Sequence[Sentence], tokenizer: Any) -> tuple[dict[str, Tensor], Tensor]:
    """Padded inputs and the label of each token."""
    encoded = tokenizer(
        [list(sentence.words) for sentence in sentences], is_split_into_words=True, padding=True,
        truncation=True, max_length=_LONGEST, return_tensors="pt",
    )  # fmt: skip
    rows = [labels(encoded.word_ids(row), sentence.tags) for row, sentence in enumerate(sentences)]
    return dict(encoded), torch.tensor(rows)


def labels(word_ids: Sequence[int | None], tags: Sequence[int]) -> list[int]:
    """The word's tag at the first piece of each word, `IGNORED` elsewhere.

    >>> labels([None, 0, 0, 1, None], (7, 9))
    [-100, 7, -100, 9, -100]
    """
    before = [None, *word_ids[:-1]]
    return [
        IGNORED if word is None or word == last else tags[word] for word, last in zip(word_ids, before, strict=True)
    ]


def batches(sentences: Sequence[Sentence], size: int) -> list[Sequence[Sentence]]:
    """Sentences of like length together, which saves most of the padding."""
    ordered = sorted(sentences, key=lambda sentence: len(sentence.words))
    return [ordered[start : start + size] for start in range(0, len(ordered), size)]


def correct(logits: Tensor, wanted: Tensor) -> tuple[int, int]:
    """How many tokens got their label, of how many that have one.

    Args:
        logits: (batch, tokens, classes).
        wanted: (batch, tokens), `IGNORED` where nothing is asked.
    """
    return int((logits.argmax(-1) == wanted).sum()), int((wanted != IGNORED).sum())


@torch.no_grad()
def accuracy(model: Any, tokenizer: Any, sentences: Sequence[Sentence]) -> float:
    """Share of words whose tag the model finds."""
    model.eval()
    right = asked = 0
    for inputs, wanted in _encoded(sentences, _EVALUATION_BATCH, tokenizer):
        found, of = correct(model(**inputs).logits, wanted)
        right, asked = right + found, asked + of
    return right / asked


def fit_probe(model: Any, tokenizer: Any, sentences: Sequence[Sentence]) -> None:
    """Train the head alone, on features of the frozen body: what the base knows without being fine-tuned."""
    model.eval()
    features, wanted = [], []
    with torch.no_grad():
        for inputs, target in _encoded(sentences, _EVALUATION_BATCH, tokenizer):
            asked = target != IGNORED
            features.append(model.base_model(**inputs).last_hidden_state[asked])
            wanted.append(target[asked])
    hidden, target = torch.cat(features), torch.cat(wanted)  # (words, hidden), (words,)
    optimizer = torch.optim.LBFGS(model.classifier.parameters(), max_iter=60, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        # A little weight decay: without it the head grows as long as the iterations last.
        value: Tensor = cross_entropy(model.classifier(hidden), target) + 1e-4 * model.classifier.weight.square().sum()
        value.backward()  # type: ignore[no-untyped-call]
        return value

    optimizer.step(loss)  # type: ignore[no-untyped-call]


def fine_tune(model: Any, tokenizer: Any, sentences: Sequence[Sentence], *, batch: int, peak: float, seed: int) -> None:
    """One pass over the sentences with AdamW, every weight trained; the rate rises for a few steps, then falls to zero.

    Args:
        batch: sentences per step.
        peak: the highest learning rate.
        seed: of dropout and of the batches' order.
    """
    torch.manual_seed(seed)
    model.train()
    steps = batches(sentences, batch)
    random.Random(seed).shuffle(steps)  # noqa: S311  # no secret
    # No weight decay: it would move every row of the embedding, seen or not, and ΔW would no longer be what was learned.
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak, weight_decay=0.0, fused=True)
    for number, step in enumerate(steps):
        for group in optimizer.param_groups:
            group["lr"] = peak * min(1.0, (number + 1) / _WARM_UP_STEPS) * (1.0 - number / len(steps))
        inputs, wanted = encode(step, tokenizer)
        loss = cross_entropy(model(**inputs).logits.flatten(0, 1), wanted.flatten(), ignore_index=IGNORED)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


def _encoded(sentences: Sequence[Sentence], size: int, tokenizer: Any) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
    return (encode(batch, tokenizer) for batch in batches(sentences, size))
