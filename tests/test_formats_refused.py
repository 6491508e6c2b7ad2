"""Formats that hold no weights: refused before anything is read, by their name, with where they were seen and what to do."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from phlora_pipeline import formats
from phlora_pipeline.checkpoint import open_checkpoint
from phlora_pipeline.convert import convert
from phlora_pipeline.errors import RequestError
from phlora_pipeline.safetensors_format import Entry
from tests import runs, toys

AT = "model.layers.0.mlp.up_proj"


class Seen(NamedTuple):
    """A quantised layer: what its tensors are called after its module, and what config.json says."""

    tensors: Mapping[str, Tensor]
    quantisation: Mapping[str, Any]
    format: str
    remedy: str


def integers(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
    return torch.ones(shape, dtype=dtype)


HALF, BYTES = torch.ones(2, 8).half(), torch.uint8
GPTQ = {
    ".qweight": integers(4, 8), ".qzeros": integers(1, 1), ".scales": HALF, ".g_idx": integers(32)
}  # fmt: skip
AWQ = {".qweight": integers(32, 1), ".qzeros": integers(1, 1), ".scales": HALF}
NF4 = {
    ".weight": integers(128, 1, dtype=BYTES), ".weight.absmax": torch.ones(4), ".weight.quant_map": torch.ones(16),
    ".weight.quant_state.bitsandbytes__nf4": integers(80, dtype=BYTES),
}  # fmt: skip
INT8 = {".weight": integers(8, 32, dtype=torch.int8), ".SCB": torch.ones(8), ".weight_format": integers(1, dtype=BYTES)}
PACKED = {".weight_packed": integers(8, 4), ".weight_scale": HALF, ".weight_shape": torch.tensor([8, 32])}
W8A8 = {".weight": integers(8, 32, dtype=torch.int8), ".weight_scale": torch.ones(8, 1)}
MXFP4 = {
    ".gate_up_proj_blocks": integers(2, 8, 1, 16, dtype=BYTES),
    ".gate_up_proj_scales": integers(2, 8, 1, dtype=BYTES),
}
NVFP4 = {".weight": integers(8, 16, dtype=BYTES), ".weight_scale": torch.ones(8, 2).to(torch.float8_e4m3fn), ".weight_scale_2": torch.ones(())}  # fmt: skip
HQQ = {".W_q": integers(8, 16, dtype=BYTES), ".scale": HALF}

CASES = {
    "GPTQ": Seen(GPTQ, {"quant_method": "gptq", "bits": 4}, "GPTQ", "GPTQModel"),
    "GPTQ, no word in config.json": Seen(GPTQ, {}, "GPTQ", "GPTQModel"),
    "AWQ": Seen(AWQ, {"quant_method": "awq"}, "AWQ", "AutoAWQConverter"),
    "AWQ, no word in config.json": Seen(AWQ, {}, "AWQ", "AutoAWQConverter"),
    "bitsandbytes, four bits": Seen(NF4, {"quant_method": "bitsandbytes"}, "bitsandbytes", "model.dequantize()"),
    "bitsandbytes, eight bits": Seen(INT8, {}, "bitsandbytes", "model.dequantize()"),
    "compressed-tensors, packed": Seen(
        PACKED, {"quant_method": "compressed-tensors", "format": "pack-quantized"}, "packed", "CompressedTensorsConfig(dequantize=True)"
    ),
    "compressed-tensors, integers": Seen(W8A8, {"quant_method": "compressed-tensors"}, "compressed-tensors", "CompressedTensorsConfig(dequantize=True)"),
    "integers with scales": Seen(W8A8, {}, "integers with scales", "by the library that packed it"),
    "MXFP4": Seen(MXFP4, {"quant_method": "mxfp4"}, "MXFP4", "Mxfp4Config"),
    "NVFP4": Seen(NVFP4, {"quant_method": "modelopt"}, "modelopt", "by the library that packed it"),
    "HQQ": Seen(HQQ, {"quant_method": "hqq"}, "HQQ", "HQQLinear"),
    "a method of tomorrow": Seen({".weight": integers(8, 16)}, {"quant_method": "tomorrow"}, "tomorrow", "by the library that packed it"),
}  # fmt: skip


def saved(folder: Path, layer: Mapping[str, Tensor], quantisation: Mapping[str, Any]) -> Path:
    tensors = {name: value for name, value in toys.llama_tensors().items() if not name.startswith(AT)}
    tensors |= {f"{AT}{last}": value for last, value in layer.items()}
    config = {**toys.LLAMA, "quantization_config": quantisation} if quantisation else toys.LLAMA
    return toys.save(folder, tensors, config, shards=2)


@pytest.mark.parametrize("side", ["base", "tuned"])
@pytest.mark.parametrize("case", CASES)
def test_the_plan_refuses_it_by_name(case: str, side: str, tmp_path: Path) -> None:
    seen = CASES[case]
    folders = {"base": toys.save(tmp_path / "good", toys.llama_tensors())}
    folders |= {"tuned": folders["base"], side: saved(tmp_path / "bad", seen.tensors, seen.quantisation)}
    with pytest.raises(RequestError, match=f"is quantised as .*{seen.format}") as caught:
        runs.extract(folders["base"], folders["tuned"], tmp_path / "out")
    what = caught.value.what
    assert caught.value.exit_code == 2
    assert str(tmp_path / "bad") in what
    assert AT in what
    assert ("config.json says quant_method" in what) == bool(seen.quantisation)
    assert seen.remedy in caught.value.remedy
    assert not (tmp_path / "out").exists()


def test_a_config_left_behind_condemns_no_plain_weights(tmp_path: Path) -> None:
    """As after merging what was trained in four bits."""
    tensors = {
        **toys.llama_tensors(), "model.embeddings.position_ids": torch.arange(8)[None], "model.mask": torch.ones(4, 4, dtype=BYTES),
    }  # fmt: skip
    config = {**toys.LLAMA, "quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}
    assert open_checkpoint(str(toys.save(tmp_path / "m", tensors, config))).tensors.keys() == tensors.keys()


@pytest.mark.parametrize(
    "word", [None, 7, "gptq", ["gptq"], {"quant_method": None}, {"config_groups": [1]}, {"weight_block_size": "x"}]
)
def test_a_config_that_makes_no_sense_says_nothing(word: object, tmp_path: Path) -> None:
    tensors = toys.llama_tensors()
    folder = toys.save(tmp_path / "m", tensors, {**toys.LLAMA, "quantization_config": word})
    assert open_checkpoint(str(folder)).tensors.keys() == tensors.keys()


def test_of_sharded_pickles_the_folder_is_to_be_converted(tmp_path: Path) -> None:
    """And the command that the remedy names does it: one shard alone would be half a checkpoint."""
    tensors, source = toys.llama_tensors(), tmp_path / "pickled"
    source.mkdir()
    names = [f"pytorch_model-{number:05d}-of-00002.bin" for number in (1, 2)]
    placed = {name: names[number % 2] for number, name in enumerate(tensors)}
    for shard in names:
        torch.save({name: value for name, value in tensors.items() if placed[name] == shard}, source / shard)
    (source / "config.json").write_text(json.dumps(toys.LLAMA))
    (source / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": placed}))
    with pytest.raises(RequestError, match=names[0]) as caught:
        open_checkpoint(str(source))
    assert caught.value.remedy.endswith(f"phlora convert {source} OUT")
    convert(str(source), str(tmp_path / "out"))
    assert open_checkpoint(str(tmp_path / "out")).tensors.keys() == tensors.keys()


def test_names_that_only_look_like_it_are_let_through() -> None:
    """A decoder of `up_blocks` is no MXFP4, nor a buffer of integers a weight."""
    plain = {
        "decoder.up_blocks": ("F32", (4, 4)), "attn.bias": ("U8", (1, 1, 8, 8)), "index.weight": ("I64", (4, 4)), "norm.scale": ("F32", (4,)),
    }  # fmt: skip
    there = {name: Entry(dtype, shape, 0, 0) for name, (dtype, shape) in plain.items()}
    assert formats.refusal(there, {}) is None
