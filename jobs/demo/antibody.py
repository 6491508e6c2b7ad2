"""The second pair, trained by others: anarcii's numbering network for antibodies, and its fine-tune for shark antibodies.

Both are published as PyTorch pickles (BSD-3), so they go through the explicit step `phlora convert` first. The score is the
share of real shark sequences, from the package's own tests, that a network numbers exactly as the fine-tune does.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from .command import convert
from .errors import DemoError
from .folders import written_aside
from .numbering import Numberer, agreement, linear_names
from .packages import Package, fetch, unpack
from .pairs import Pair, Scores, digest

# The weights are those of later releases, byte for byte; later archives lack the tests with their sequences.
ANARCII = Package(
    "sdist", "anarcii", "2.0.0", "anarcii-2.0.0.tar.gz",
    "237c71747e0ef4aa16cdd839ef1964a8e73a9cf6703c239b8d1c0380a1a08257",
)  # fmt: skip

_ROOT = "anarcii-2.0.0"
_SHARKS = f"{_ROOT}/tests/data/raw_data/shark_check.fa"
_PICKLES = {kind: f"{_ROOT}/src/anarcii/models/{kind}/{kind}_4_2_128_512.pt" for kind in ("antibody", "shark")}
_RECIPE = {"revision": 1, "package": ANARCII.sha256}


def prepare(root: Path, say: Callable[[str], None]) -> Pair:
    """The pair under `root`, downloaded and converted unless it is there.

    Args:
        say: told what takes time before it is done.
    """
    archive = fetch(ANARCII, root / "downloads")
    package = unpack(archive, [f"{_ROOT}/LICENCE", _SHARKS, *_PICKLES.values()], root / "packages" / _ROOT)
    folder = root / f"anarcii-{digest(_RECIPE)}"
    if not folder.exists():
        say("anarcii: converting two pickles to safetensors")
        with written_aside(folder) as aside:
            for kind, pickle in _PICKLES.items():
                _convert(package / pickle, aside / "converted" / kind, aside / kind)
    sharks = read_fasta((package / _SHARKS).read_text(encoding="ascii"))
    base, tuned = folder / "antibody", folder / "shark"
    return Pair(
        name="anarcii, antibody → shark",
        metric=f"numbered as the fine-tune, {len(sharks)} shark sequences",
        base=base,
        tuned=tuned,
        adapter=folder / "adapter-r32-whole",
        scores=partial(_scores, base, tuned, sharks),
        promised_points=10.0,
        options=("--carry", "all"),
    )


def read_fasta(text: str) -> list[str]:
    r"""The sequences of a FASTA file.

    >>> read_fasta(">one\nARV\nDQT\n>two\nTRV\n")
    ['ARVDQT', 'TRV']
    """
    records = [record.partition("\n")[2] for record in text.split(">")[1:]]
    sequences = ["".join(record.split()) for record in records]
    if not sequences or not all(sequences):
        raise DemoError(
            f"expected FASTA with sequences, got {text[:40]!r}", remedy="remove the unpacked package and run again"
        )
    return sequences


def _convert(pickle: Path, converted: Path, out: Path) -> None:
    """From the pickle to a checkpoint whose every matrix is a module's weight (`numbering.py` says why)."""
    from safetensors.torch import load_file, save_file

    convert(pickle, converted)
    out.mkdir()
    save_file(
        linear_names(load_file(converted / "model.safetensors")), out / "model.safetensors", metadata={"format": "pt"}
    )
    (out / "config.json").write_text(json.dumps({"model_type": "anarcii", "architectures": ["S2S"]}, indent=2) + "\n")


def _scores(base: Path, tuned: Path, sequences: Sequence[str], adapter: Path) -> Scores:
    from peft import PeftModel

    fine_tune, model = _model(tuned), _model(base)
    wanted = fine_tune(sequences)
    before = agreement(model(sequences), wanted)
    # All that matrices can give, at any rank: the fine-tune's own, between the base's norms and biases.
    model.load_state_dict(
        {name: value for name, value in fine_tune.state_dict().items() if value.ndim == 2}, strict=False
    )
    matrices = agreement(model(sequences), wanted)
    adapted = agreement(PeftModel.from_pretrained(_model(base), str(adapter))(sequences), wanted)
    return Scores(base=before, tuned=1.0, adapted=adapted, matrices=matrices)


def _model(folder: Path) -> Numberer:
    from safetensors.torch import load_file

    model = Numberer()
    model.load_state_dict(load_file(folder / "model.safetensors"))
    return model.eval()
