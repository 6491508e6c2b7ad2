"""Read side of existing adapters: whose keys they are, what each pair is multiplied by, and which matrix of a base it is for."""

from __future__ import annotations

from phlora_pipeline.lora.files import Adapter, open_adapter, ranks_of
from phlora_pipeline.lora.fit import Delta, Fit, fit
from phlora_pipeline.lora.modules import LoraModule, Whole, finite

__all__ = ["Adapter", "Delta", "Fit", "LoraModule", "Whole", "finite", "fit", "open_adapter", "ranks_of"]
