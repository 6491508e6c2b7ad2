"""`phlora verify --logits`: base with adapter against the fine-tune, run by transformers and PEFT."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from phlora_pipeline import cli, logits
from phlora_pipeline.errors import RequestError
from tests import models, runs, toys

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("logits")
    base = models.MODELS["llama"]()
    tuned = models.moved(base, where=models.matrices)
    return models.save(base, folder / "base"), models.save(tuned, folder / "tuned")


def compared(pair: tuple[Path, Path], out: Path, **settings: object) -> logits.Agreement:
    runs.extract(*pair, out, **settings)
    return logits.compare(str(pair[0]), str(pair[1]), str(out))


def test_at_full_rank_it_answers_as_the_fine_tune(pair: tuple[Path, Path], tmp_path: Path) -> None:
    found = compared(pair, tmp_path / "full", rank=64)
    assert found.positions == 4 * 32
    assert found.kl < 1e-6
    assert found.top1 == 1
    assert found.base_kl > 1e-2
    assert found.base_top1 < 1


def test_a_smaller_rank_answers_less_like_it(pair: tuple[Path, Path], tmp_path: Path) -> None:
    full, small = (compared(pair, tmp_path / str(rank), rank=rank) for rank in (64, 1))
    assert small.kl > 100 * full.kl
    assert (small.base_kl, small.base_top1) == (full.base_kl, full.base_top1)


def test_the_command_tells_it(
    pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    runs.extract(*pair, tmp_path, rank=64)
    places = ["--base", str(pair[0]), "--tuned", str(pair[1]), "--adapter", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["phlora", "verify", *places, "--logits", "--json"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert not ended.value.code
    assert json.loads(capsys.readouterr().out)["logits"]["top1"] == 1


def test_what_it_cannot_run_is_refused(pair: tuple[Path, Path], tmp_path: Path) -> None:
    runs.extract(*pair, tmp_path / "out")
    with pytest.raises(RequestError, match="is not on this machine"):
        logits.compare("s3://bucket/base", str(pair[1]), str(tmp_path / "out"))
    with pytest.raises(RequestError, match="no tokenizer"):
        logits.compare(str(pair[0]), str(pair[1]), str(tmp_path / "out"), ["hello"])
    encoder = toys.save(tmp_path / "encoder", toys.llama_tensors(layers=1), {"model_type": "bert", "architectures": ["BertModel"]})  # fmt: skip
    with pytest.raises(RequestError, match="no causal language model"):
        logits.compare(str(pair[0]), str(encoder), str(tmp_path / "out"))
