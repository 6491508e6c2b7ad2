"""The forecast against the night that follows it, and against what more machines must do to it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from phlora_pipeline.errors import RequestError
from phlora_pipeline.zoo.forecast import SOLVERS, Cluster, forecast
from tests import toys
from tests.zoo import nights
from tests.zoo.nights import Zoo


@pytest.fixture
def zoo(tmp_path: Path) -> Zoo:
    """Three models of one base."""
    made = Zoo(tmp_path / "zoo", str(tmp_path / "out"))
    made.add_base()
    for seed in (1, 2, 3):
        made.add(f"m{seed}", toys.fine_tuned(nights.tensors(), seed=seed))
    return made


@pytest.mark.parametrize("share", ["off", "max"])
def test_it_tells_the_bytes_that_the_night_then_reads(zoo: Zoo, share: str) -> None:
    config = zoo.config(run={"share_base": share})
    told = forecast(config, Cluster())
    one = sum(tensor.numel() * tensor.element_size() for tensor in nights.tensors().values())
    assert told.read_bytes == (6 if share == "off" else 4) * one
    assert sum(model.tuned_bytes for model in told.models) == 3 * one
    assert [(model.id, model.why, model.base) for model in told.models] == [(f"m{n}", "new", "b") for n in (1, 2, 3)]
    assert not Path(zoo.out).exists(), "a forecast writes nothing"
    assert zoo.night(run={"share_base": share}).read_bytes == told.read_bytes
    after = forecast(config, Cluster())
    assert (after.models, after.read_bytes, after.tasks, after.states) == ((), 0, 0, {"published": 3})
    assert set(after.seconds.values()) == {0.0}


@pytest.mark.parametrize("own", [{"rank": 4}, {"rank": 4, "for": "peft", "dtype": "float32"}, {"budget": "3kB"}])
def test_it_tells_the_bytes_that_are_then_written(own: dict[str, object], zoo: Zoo) -> None:
    told = forecast(zoo.config(extract=own), Cluster())
    zoo.night(extract=own)
    for model in told.models:
        assert (
            sum(path.stat().st_size for path in Path(zoo.out, model.id).rglob("adapter_model.safetensors"))
            == model.adapter_bytes
        )


@pytest.mark.parametrize("budget", ["3kB", "700-params", "1GB"])
def test_of_ranks_of_their_own_it_tells_what_a_budget_is(budget: str, zoo: Zoo) -> None:
    own = {"budget": budget, "for": "peft", "dtype": "float32"}
    told = forecast(zoo.config(extract=own), Cluster())
    zoo.night(extract=own)
    for model in told.models:
        [weights] = Path(zoo.out, model.id).rglob("adapter_model.safetensors")
        header = 0 if budget != "700-params" else 8 + int.from_bytes(weights.read_bytes()[:8], "little")
        assert 0.9 * model.adapter_bytes < weights.stat().st_size - header <= model.adapter_bytes


def test_more_machines_never_take_longer_and_reading_is_the_floor(zoo: Zoo) -> None:
    config = zoo.config()
    some = Cluster(node_read_rate=1e6, price=10.0)
    one, four = forecast(config, some), forecast(config, replace(some, nodes=4))
    for solver in SOLVERS:
        assert four.seconds[solver] <= one.seconds[solver]
        assert one.seconds[solver] >= one.read_bytes / some.node_read_rate
        assert one.cost[solver] == pytest.approx(10 * one.seconds[solver] / 3600)
        assert one.compute_seconds[solver] == pytest.approx(sum(model.seconds[solver] for model in one.models))
    assert forecast(config, Cluster()).cost == {}


def test_the_full_decomposition_is_told_beside_ours(tmp_path: Path) -> None:
    """On matrices that are large enough for a Krylov basis."""
    zoo = Zoo(tmp_path / "zoo", str(tmp_path / "out"))
    base = {"model.layers.0.mlp.up_proj.weight": torch.zeros(2048, 1024)}
    toys.save(zoo.root / "bases" / "b", base)
    zoo.add("m", {name: torch.randn(2048, 1024, generator=torch.Generator().manual_seed(1)) for name in base})
    told = forecast(zoo.config(), Cluster(profile="cpu-bf16"))
    assert told.compute_seconds["exact"] > 3 * told.compute_seconds["auto"]


def test_what_would_fail_or_wait_is_named(zoo: Zoo) -> None:
    zoo.add("other", toys.llama_tensors(hidden=48))
    weights = zoo.add("short", toys.fine_tuned(nights.tensors(), seed=4)) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    told = forecast(zoo.config(limits={"max_models": 2}), Cluster())
    assert len(told.models) + len(told.refused) == 2
    assert told.deferred
    everything = forecast(zoo.config(), Cluster())
    assert list(everything.refused) == ["other"]
    assert "different architectures" in everything.refused["other"]
    assert list(everything.waiting) == ["short"]
    assert "truncated" in everything.waiting["short"]
    assert json.loads(json.dumps(everything.as_dict()))["states"] == {"due": 5}


def test_a_gpu_that_is_too_small_is_told_with_the_tensors_that_are_too_large(zoo: Zoo) -> None:
    largest = "model.layers.0.mlp.down_proj.weight"
    roomy = forecast(zoo.config(), Cluster())
    assert (roomy.gpu_memory, roomy.sliced) == (40e9, {})
    assert forecast(zoo.config(), Cluster(gpu_memory=80e9)).gpu_memory == 80e9
    tight = forecast(zoo.config(), Cluster(gpu_memory=roomy.gpu_bytes))  # a tenth of it is not for tensors
    assert tight.sliced == {largest: roomy.gpu_bytes}
    assert not forecast(zoo.config(), Cluster(gpu_memory=1.2 * roomy.gpu_bytes)).sliced
    assert forecast(zoo.config(), Cluster(profile="cpu")).gpu_memory is None


def test_an_unknown_profile_is_refused(zoo: Zoo) -> None:
    with pytest.raises(RequestError, match="no profile 'a100'"):
        forecast(zoo.config(), Cluster(profile="a100"))
