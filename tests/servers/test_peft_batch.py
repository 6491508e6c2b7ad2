"""PEFT with several of our adapters in one batch: each row is as its adapter alone makes it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel

from tests import models, runs

pytestmark = [
    pytest.mark.slow,
    pytest.mark.servers,
    # PEFT 0.21 still calls what transformers 5 has renamed.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]

ROWS = ["five", "__base__", "whole", "five", "sixteen", "__base__"]
RANKS = {"five": 5, "sixteen": 16, "whole": 64}


@pytest.mark.parametrize("name", ["llama", "qwen2"])
@torch.no_grad()
def test_each_row_is_as_its_adapter_alone(name: str, tmp_path: Path) -> None:
    base = models.MODELS[name]()
    folder = models.save(base, tmp_path / "base")
    tokens = torch.randint(64, (len(ROWS), 12), generator=torch.Generator().manual_seed(2))
    adapters = {}
    for seed, (adapter, rank) in enumerate(RANKS.items()):
        tuned = models.save(models.moved(base, where=models.matrices, seed=seed), tmp_path / f"tuned-{adapter}")
        adapters[adapter] = tmp_path / adapter
        runs.extract(folder, tuned, adapters[adapter], rank=rank)
    alone = {adapter: models.adapted(base, out)(input_ids=tokens).logits for adapter, out in adapters.items()}
    alone["__base__"] = base(input_ids=tokens).logits
    batch = PeftModel.from_pretrained(base, str(adapters["five"]), adapter_name="five").eval()
    for adapter in ("sixteen", "whole"):
        batch.load_adapter(str(adapters[adapter]), adapter)
    together = batch(input_ids=tokens, adapter_names=ROWS).logits
    for row, adapter in enumerate(ROWS):
        assert models.distance(together[row], alone[adapter][row]) < 1e-6
        others = [logits for other, logits in alone.items() if other != adapter]
        assert min(models.distance(together[row], logits[row]) for logits in others) > 0.1
