"""A real decoder, fine-tuned twice, served once: each request gets its own fine-tune's answer."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.servers import checkpoints, greedy, smollm2, vllm
from tests.servers.environment import MARKS
from tests.servers.smollm2 import ASKED, MANNERS

pytestmark = MARKS

RANK, TOKENS = 32, 24


@pytest.mark.timeout(1200)  # the first time, the fine-tunes are trained
def test_each_request_gets_its_own_fine_tunes_answer(tmp_path: Path) -> None:
    zoo = smollm2.prepare()
    asked = [(manner, country) for country in ASKED for manner in MANNERS]
    wanted = {}
    for manner in MANNERS:
        model = greedy.load(zoo.tuned[manner])
        for country, city in ASKED.items():
            wanted[manner, country] = zoo.text(greedy.answer(model, zoo.question(country), TOKENS).tokens)
            assert wanted[manner, country] == MANNERS[manner].format(country=country, city=city)
        del model
    adapters = {
        manner: checkpoints.extract(zoo.base, zoo.tuned[manner], tmp_path / manner, rank=RANK) for manner in MANNERS
    }
    with vllm.serving(zoo.base, tmp_path, max_rank=RANK, adapters=len(MANNERS)) as server:
        for manner, adapter in adapters.items():
            server.load(manner, adapter)
        with ThreadPoolExecutor(len(asked)) as pool:  # one batch
            found = list(pool.map(lambda one: server.answer(one[0], zoo.question(one[1]), TOKENS), asked))
        plain = {zoo.text(server.answer(vllm.BASE, zoo.question(country), TOKENS).tokens) for country in ASKED}
    said = {one: zoo.text(answer.tokens) for one, answer in zip(asked, found, strict=True)}
    assert said == wanted
    assert plain.isdisjoint(wanted.values())
