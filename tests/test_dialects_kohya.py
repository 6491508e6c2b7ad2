"""`--for kohya`: a UNet's layers by the names that diffusion UIs know, each pair with its own alpha."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from phlora_pipeline import cli
from phlora_pipeline.errors import RequestError
from phlora_pipeline.verify import Verification, verify
from tests import runs, toys

UNET = {"_class_name": "UNet2DConditionModel"}
BLOCK = "down_blocks.0.attentions.1.transformer_blocks.0"
LINEAR = {
    f"{BLOCK}.attn1.to_q": (24, 24),
    f"{BLOCK}.attn2.to_k": (24, 40),
    f"{BLOCK}.attn1.to_out.0": (24, 24),
    f"{BLOCK}.ff.net.0.proj": (48, 24),
    "down_blocks.0.resnets.0.time_emb_proj": (24, 32),
    "time_embedding.linear_1": (32, 16),
}
OTHERS = {f"{BLOCK}.norm1.weight": (24,), f"{BLOCK}.attn1.to_q.bias": (24,)}


def name_of(module: str) -> str:
    return "lora_unet_" + module.replace(".", "_")


@pytest.fixture(scope="module")
def unet(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("unet")
    generator = torch.Generator().manual_seed(4)
    shapes = {**{f"{module}.weight": shape for module, shape in LINEAR.items()}, **OTHERS}
    base = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    tuned = toys.fine_tuned(base)
    for number, (module, shape) in enumerate(LINEAR.items()):
        sigma = torch.arange(1, min(shape) + 1).double() ** -(0.5 + 0.3 * number)
        tuned[f"{module}.weight"] = base[f"{module}.weight"] + toys.with_spectrum(*shape, sigma, seed=number).float()
    return toys.save(folder / "base", base, UNET), toys.save(folder / "tuned", tuned, UNET)


def check(unet: tuple[Path, Path], out: Path) -> Verification:
    return verify(str(unet[0]), str(unet[1]), str(out))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("energy", [None, 0.8])
def test_each_pair_is_pefts_under_another_name(
    energy: float | None, dtype: str, unet: tuple[Path, Path], tmp_path: Path
) -> None:
    for dialect in ("kohya", "peft"):
        runs.extract(*unet, tmp_path / dialect, dialect=dialect, energy=energy, rank=5, dtype=dtype)
    tensors = load_file(tmp_path / "kohya" / "adapter_model.safetensors")
    parts = ("lora_down.weight", "lora_up.weight", "alpha")
    assert set(tensors) == {f"{name_of(module)}.{part}" for module in LINEAR for part in parts}
    ranks = set()
    for module in LINEAR:
        down, up, alpha = (tensors[f"{name_of(module)}.{part}"] for part in parts)
        assert (alpha.dtype, alpha.shape) == (torch.float32, ())
        assert float(alpha) == down.shape[0] == up.shape[1]
        torch.testing.assert_close(
            up.double() @ down.double(), runs.written_delta(tmp_path / "peft", module), rtol=0, atol=1e-12
        )
        ranks.add(down.shape[0])
    assert (len(ranks) > 1) == (energy is not None)
    found = check(unet, tmp_path / "kohya")
    assert found.passed, found
    assert {checked.module for checked in found.modules} == set(LINEAR)


def test_who_reads_other_keys_is_told_by_verify(unet: tuple[Path, Path], tmp_path: Path) -> None:
    for dialect, other in (("kohya", "peft"), ("peft", "kohya")):
        runs.extract(*unet, tmp_path / dialect, dialect=dialect)
        urls = (str(unet[0]), str(unet[1]), str(tmp_path / dialect))
        assert verify(*urls).passed
        assert any(
            f"its keys are {'kohya' if dialect == 'kohya' else 'PEFT'}'s" in said
            for said in verify(*urls, dialect=other).problems
        )


def test_peft_does_not_take_it_for_its_own(unet: tuple[Path, Path], tmp_path: Path) -> None:
    """It would find none of the keys, and serve the base without a word."""
    runs.extract(*unet, tmp_path, dialect="kohya")
    with pytest.raises(KeyError, match="peft_type"):
        PeftModel.from_pretrained(torch.nn.Linear(4, 4), str(tmp_path))
    assert "from peft" not in (tmp_path / "README.md").read_text()


ALPHA = f"{name_of(f'{BLOCK}.attn1.to_q')}.alpha"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda tensors: tensors[ALPHA].mul_(2), ""),
        (lambda tensors: tensors.pop(ALPHA), "and not a pair with its alpha"),
        (lambda tensors: tensors.update({"lora_te_x.alpha": torch.ones(())}), "lora_te_x is no module of the base"),
    ],
    ids=["scale", "missing", "foreign"],
)
def test_verify_reads_the_names_and_the_alphas(
    change: Callable[[dict[str, Tensor]], object], says: str, unet: tuple[Path, Path], tmp_path: Path
) -> None:
    runs.extract(*unet, tmp_path, dialect="kohya")
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    path.unlink()
    save_file(tensors, path)
    found = check(unet, tmp_path)
    assert says in "\n".join(found.problems)
    faults = [checked.module for checked in found.modules if checked.problem]
    assert faults == ([] if says else [f"{BLOCK}.attn1.to_q"])
    assert not found.passed


def test_a_language_model_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    base = toys.llama_tensors(layers=1)
    pair = toys.save(tmp_path / "base", base), toys.save(tmp_path / "tuned", toys.fine_tuned(base))
    places = ["--base", str(pair[0]), "--tuned", str(pair[1]), "--out", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", ["phlora", "extract", *places, "--for", "kohya", "--engine", "local"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    assert "--for kohya is for the UNets of diffusion models, this is a transformers model of type 'llama'" in " ".join(
        capsys.readouterr().err.split()
    )
    assert not (tmp_path / "out").exists()


def test_two_modules_of_one_name_are_refused(tmp_path: Path) -> None:
    base = {"block_0.proj.weight": torch.randn(8, 8), "block.0_proj.weight": torch.randn(8, 8)}
    pair = toys.save(tmp_path / "base", base, UNET), toys.save(tmp_path / "tuned", toys.fine_tuned(base), UNET)
    with pytest.raises(RequestError, match="block_0_proj"):
        runs.extract(*pair, tmp_path / "out", dialect="kohya")


def test_its_config_says_what_it_is(unet: tuple[Path, Path], tmp_path: Path) -> None:
    runs.extract(*unet, tmp_path, dialect="kohya", rank=5, base_name="org/unet")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config == {"format": "kohya", "base_model_name_or_path": "org/unet", "r": 5}


def test_a_convolution_has_its_kernel_below_and_a_kernel_of_one_above(tmp_path: Path) -> None:
    """And the two after one another are ΔW, where the rank is all there is."""
    generator = torch.Generator().manual_seed(5)
    shapes = {"down_blocks.0.resnets.0.conv1": (8, 4, 3, 3), "down_blocks.0.downsamplers.0.conv": (6, 5, 1, 1)}
    base = {f"{module}.weight": torch.randn(shape, generator=generator) for module, shape in shapes.items()}
    tuned = toys.fine_tuned(base)
    folders = toys.save(tmp_path / "base", base, UNET), toys.save(tmp_path / "tuned", tuned, UNET)
    runs.extract(*folders, tmp_path / "out", rank=8, dialect="kohya")
    found = load_file(tmp_path / "out" / "adapter_model.safetensors")
    for module, (d, channels, height, width) in shapes.items():
        down, up, alpha = (
            found[f"{name_of(module)}.{part}"] for part in ("lora_down.weight", "lora_up.weight", "alpha")
        )
        assert (tuple(down.shape), tuple(up.shape)) == ((8, channels, height, width), (d, 8, 1, 1))
        delta = torch.einsum("or,rchw->ochw", up[..., 0, 0], down) * alpha / 8
        wanted = tuned[f"{module}.weight"] - base[f"{module}.weight"]
        assert float((delta - wanted).norm() / wanted.norm()) < 1e-5
    assert check(folders, tmp_path / "out").passed
