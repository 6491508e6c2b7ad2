"""Places full of checkpoints, as a catalog sees them: files of the right names, small files with real content."""

from __future__ import annotations

import json
from pathlib import Path

from phlora_pipeline import zoofile
from phlora_pipeline.zoofile import ZooConfig

CARD = "---\nlicense: apache-2.0\nbase_model: {}\n---\n# A model\n"


def checkpoint(folder: Path, *, origin: str = "", card: object = None, weights: str = "model.safetensors") -> Path:
    """A folder that a listing takes for a checkpoint; `origin` is its `_name_or_path`, `card` its card's base_model."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {"model_type": "llama", **({"_name_or_path": origin} if origin else {})}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / weights).write_bytes(b"not read")
    if card is not None:
        (folder / "README.md").write_text(CARD.format(json.dumps(card)))
    return folder


def zoo(root: Path, text: str) -> ZooConfig:
    """A zoo.yaml over `root`: `{root}` in it is that, its output lies beside."""
    return zoofile.loads(f"output: {root}-out\n" + text.replace("{root}", str(root)))
