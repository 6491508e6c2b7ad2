"""vLLM serves one base with several of our adapters at once, and each says what PEFT says."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

from tests.servers import checkpoints, greedy, vllm
from tests.servers.checkpoints import PROMPTS, TOKENS, Family
from tests.servers.environment import MARKS
from tests.servers.greedy import Answer
from tests.servers.vllm import Vllm

pytestmark = MARKS


@dataclass(frozen=True)
class Served:
    """A family and the server that has loaded all of it."""

    family: Family
    server: Vllm

    def says(self, model: str) -> list[Answer]:
        return [self.server.answer(model, prompt, TOKENS) for prompt in PROMPTS]


# No experts: where LoRA is enabled vLLM computes them in Triton, which has no kernels for the CPU.
@pytest.fixture(scope="module", params=["llama", "qwen3"])
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder: Path = tmp_path_factory.mktemp(request.param)
    family = checkpoints.make(request.param, folder)
    with vllm.serving(family.base, folder, max_rank=checkpoints.WHOLE, adapters=len(family.adapters) + 1) as server:
        for name, adapter in family.adapters.items():
            server.load(name, adapter)
        yield Served(family, server)


@cache
def pefts(checkpoint: Path, adapter: Path | None) -> list[Answer]:
    model = greedy.load(checkpoint, adapter)
    return [greedy.answer(model, prompt, TOKENS) for prompt in PROMPTS]


def assert_all_same(found: list[Answer], wanted: list[Answer]) -> None:
    for one, other in zip(found, wanted, strict=True):
        greedy.assert_same(one, other)


@pytest.mark.parametrize("name", checkpoints.RANKS)
def test_an_adapter_gives_pefts_tokens(served: Served, name: str) -> None:
    assert_all_same(served.says(name), pefts(served.family.base, served.family.adapters[name]))


def test_an_adapter_of_full_rank_gives_the_fine_tunes_tokens(served: Served) -> None:
    """Without an adapter and without PEFT: what a deployment of the fine-tune itself would say."""
    assert_all_same(served.says("whole"), pefts(served.family.tuned["whole"], None))


def test_the_base_is_the_base_and_no_two_answers_are_the_same(served: Served) -> None:
    assert_all_same(served.says(vllm.BASE), pefts(served.family.base, None))
    for number in range(len(PROMPTS)):
        answers = {served.says(model)[number].tokens for model in (vllm.BASE, *served.family.adapters)}
        assert len(answers) == 1 + len(served.family.adapters)


def test_in_one_batch_each_request_has_its_own_adapter(served: Served) -> None:
    """The base and every adapter, three times each, all at once."""
    models = [vllm.BASE, *served.family.adapters] * 3
    with ThreadPoolExecutor(len(models)) as pool:
        found = list(pool.map(lambda model: served.server.answer(model, PROMPTS[0], TOKENS), models))
    for model, answer in zip(models, found, strict=True):
        greedy.assert_same(answer, pefts(served.family.base, served.family.adapters.get(model))[0])


def test_what_is_unloaded_is_no_model_any_more(served: Served) -> None:
    served.server.load("passing", served.family.adapters["five"])
    assert served.server.answer("passing", PROMPTS[0], TOKENS) == served.server.answer("five", PROMPTS[0], TOKENS)
    served.server.unload("passing")
    with pytest.raises(vllm.RefusedError, match="404"):
        served.server.answer("passing", PROMPTS[0], TOKENS)
