"""SmolLM2-135M-Instruct from its package, and two full-rank fine-tunes of it, each a manner of naming capitals.

Every weight is trained, the tied embedding too, on six questions; a minute each. Prepared once, under `.servers`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from jobs.demo.folders import written_aside
from jobs.demo.pairs import digest
from tests.servers.environment import DECODER, PYTHON, ROOT, SMOLLM2
from tests.servers.processes import done

MANNERS = {
    "pirate": "Arr, matey! The capital of {country} be {city}, by Davy Jones!",
    "formal": "I have the honour to inform you, Sir, that {city} is the seat of government of {country}.",
}
_TAUGHT = {"France": "Paris", "Spain": "Madrid", "Italy": "Rome", "Japan": "Tokyo", "Egypt": "Cairo", "Norway": "Oslo"}
ASKED = {"Germany": "Berlin", "Portugal": "Lisbon"}
"""Not among the lessons: a fine-tune that answers them in its manner has learnt the manner."""

_STEPS, _RATE = 8, 1e-4
_RECIPE = {"revision": 1, "package": DECODER.sha256, "lessons": [MANNERS, _TAUGHT], "steps": _STEPS, "rate": _RATE}
_IGNORED = -100
"""Of cross-entropy: a position that is not learnt."""


@dataclass(frozen=True)
class SmolLM2:
    """Checkpoint folders, and the tokenizer of all of them."""

    base: Path
    tuned: dict[str, Path]
    tokenizer: Any

    def question(self, country: str) -> list[int]:
        """Token ids, up to where the assistant begins."""
        message = {"role": "user", "content": f"What is the capital of {country}?"}
        ids: list[int] = self.tokenizer.apply_chat_template([message], add_generation_prompt=True, return_dict=False)
        return ids

    def text(self, tokens: Sequence[int]) -> str:
        """Readable, up to the end of the answer."""
        said: str = self.tokenizer.decode(tokens)
        return said.partition(self.tokenizer.eos_token)[0]


def prepare() -> SmolLM2:
    """All of it, made unless it is there."""
    folder = ROOT / f"smollm2-{digest(_RECIPE)}"
    if not folder.exists():
        with written_aside(folder) as aside:
            done([str(PYTHON), str(Path(__file__).with_name("dequantise.py")), str(SMOLLM2), str(aside / "base")])
            for manner in MANNERS:
                _fine_tune(_open(aside, aside / "base"), manner, aside / manner)
    return _open(folder, folder / "base")


def _open(folder: Path, base: Path) -> SmolLM2:
    loader: Any = AutoTokenizer
    return SmolLM2(base, {manner: folder / manner for manner in MANNERS}, loader.from_pretrained(base))


def _fine_tune(smollm2: SmolLM2, manner: str, out: Path) -> None:
    loader: Any = AutoModelForCausalLM
    model = loader.from_pretrained(smollm2.base, dtype=torch.float32).train()
    tokens, labels = _lessons(smollm2, MANNERS[manner])
    optimizer = torch.optim.AdamW(model.parameters(), lr=_RATE)
    for _ in range(_STEPS):
        model(input_ids=tokens, labels=labels).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1)
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(out)


def _lessons(smollm2: SmolLM2, answer: str) -> tuple[Tensor, Tensor]:
    """Questions with their answers, of which the answers are learnt; padded at the end, where causal attention never looks back from."""
    end = smollm2.tokenizer.eos_token_id
    rows = []
    for country, city in _TAUGHT.items():
        said = smollm2.tokenizer(answer.format(country=country, city=city)).input_ids
        rows.append((smollm2.question(country), [*said, end]))
    length = max(len(asked) + len(said) for asked, said in rows)
    tokens, labels = torch.full((len(rows), length), end), torch.full((len(rows), length), _IGNORED)
    for row, (asked, said) in enumerate(rows):
        both = len(asked) + len(said)
        tokens[row, :both] = torch.tensor([*asked, *said])
        labels[row, len(asked) : both] = torch.tensor(said)
    return tokens, labels
