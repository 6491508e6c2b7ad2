"""`python dequantise.py GGUF OUT`, in the servers' environment: OUT is an ordinary float32 checkpoint."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def main(source: Path, out: Path) -> None:
    opened = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.float32)
    # What was opened from a GGUF is refused by save_pretrained, though nothing in it is quantised any more.
    config = opened.config
    del config.quantization_config
    plain = type(opened)(config)
    plain.load_state_dict(opened.state_dict())
    plain.save_pretrained(out)
    AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name).save_pretrained(out)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
