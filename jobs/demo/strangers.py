"""The negative control: two releases of a voice detector with the same shapes, of which neither is the other's fine-tune.

silero-vad 5.1.2 and 6.0.0 (MIT) were trained apart. Factoring their difference would give an adapter that loads and is
garbage, so `phlora extract` has to refuse the pair.
"""

from __future__ import annotations

import re
import warnings
from pathlib import Path

from .folders import written_aside
from .packages import Package, fetch, unpack

_RELEASES = (
    Package(
        "wheel", "silero-vad", "5.1.2", "silero_vad-5.1.2-py3-none-any.whl",
        "93b41953d7774b165407fda6b533c119c5803864e367d5034dc626c82cfdf661",
    ),
    Package(
        "wheel", "silero-vad", "6.0.0", "silero_vad-6.0.0-py3-none-any.whl",
        "37d29be8944d2a2e6f1cc38a066076f13e78e6fc1b567a1beddcca72096f077f",
    ),
)  # fmt: skip
_ARCHIVE = "silero_vad/data/silero_vad.jit"


def prepare(root: Path) -> tuple[Path, Path]:
    """Two checkpoint folders that have nothing to do with each other but their shapes."""
    older, newer = (_prepare(package, root) for package in _RELEASES)
    return older, newer


def _prepare(package: Package, root: Path) -> Path:
    folder = root / f"silero-vad-{package.version}"
    if not folder.exists():
        archive = unpack(fetch(package, root / "downloads"), [_ARCHIVE], root / "packages" / folder.name) / _ARCHIVE
        with written_aside(folder) as aside:
            _convert(archive, aside / "model.safetensors")
    return folder


def _convert(archive: Path, out: Path) -> None:
    import torch
    from safetensors.torch import save_file

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is deprecated; this is how the weights are published
        state = torch.jit.load(str(archive), map_location="cpu").state_dict()  # type: ignore[no-untyped-call]
    # The recurrent layer's matrices are parameters of one module (`rnn.weight_ih`); as weights of modules they can be adapted.
    named = {re.sub(r"\.weight_(\w+)$", r".\1.weight", name): tensor.contiguous() for name, tensor in state.items()}
    save_file(named, out, metadata={"format": "pt"})
