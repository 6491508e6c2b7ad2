"""What a server's answer is compared with: PEFT's own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import nn
from transformers import AutoModelForCausalLM


@dataclass(frozen=True)
class Answer:
    """A greedy continuation, and what each of its tokens was given by the model."""

    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]


def load(checkpoint: Path, adapter: Path | None = None) -> nn.Module:
    """A checkpoint in float32, with an adapter over it by PEFT."""
    loader: Any = AutoModelForCausalLM
    model: nn.Module = loader.from_pretrained(checkpoint, dtype=torch.float32).eval()
    return model if adapter is None else PeftModel.from_pretrained(model, str(adapter)).eval()


@torch.no_grad()
def answer(model: nn.Module, prompt: Sequence[int], tokens: int) -> Answer:
    """The most likely token, and again, past any end of sequence."""
    said, logprobs = [], []
    read, cache = torch.tensor([list(prompt)]), None
    for _ in range(tokens):
        out = model(input_ids=read, past_key_values=cache, use_cache=True)
        following, cache = out.logits[0, -1].log_softmax(-1), out.past_key_values
        logprobs.append(float(following.max()))
        said.append(int(following.argmax()))
        read = torch.tensor([said[-1:]])
    return Answer(tuple(said), tuple(logprobs))


def assert_same(found: Answer, wanted: Answer, *, within: float = 1e-4) -> None:
    """The same tokens, as sure of each: equal tokens alone could be a coincidence."""
    assert found.tokens == wanted.tokens, (found, wanted)
    assert found.logprobs == pytest.approx(wanted.logprobs, abs=within)
