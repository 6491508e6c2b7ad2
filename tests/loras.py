"""Adapters as other people have them: made by PEFT on a tiny model, every entry random, and saved by it."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

PEFT_WARNS = [
    pytest.mark.filterwarnings(f"ignore:{text}")
    for text in (
        "`is_gradient_checkpointing` is deprecated:FutureWarning",
        "fan_in_fan_out is set to True but the target module is:UserWarning",
        "Model (has|with) `tie_word_embeddings=True`:UserWarning",
        "Setting `save_embedding_layers` to `True`:UserWarning",
        "The following (rank|alpha)_pattern keys did not match:RuntimeWarning",
        "target_modules=.* were set but no module was matched:RuntimeWarning",
        "Adapter 'default'. .* LoRA tensor:UserWarning",
    )
]
"""What PEFT 0.21 says of adapters that are as they are meant."""


def trained(base: nn.Module, folder: Path, *, seed: int = 13, **settings: Any) -> PeftModel:
    """The base with a LoRA of which no entry is zero, saved in `folder`; the base given stays as it is."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = get_peft_model(copy.deepcopy(base), LoraConfig(**settings)).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name or "modules_to_save" in name or parameter.requires_grad:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(folder)
    return model
