"""Four nights of a zoo on S3, by `ray job submit` to four nodes of eight GPUs: all, none, what is new, and what is wrong."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from phlora_pipeline import storage, zoofile
from phlora_pipeline.zoo import layout
from phlora_pipeline.zoo.night import night
from tests import toys
from tests.counting_proxy import Proxy, running_proxy
from tests.ray_cluster import running_cluster
from tests.s3_server import S3
from tests.zoo import nights

pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.s3]

MODELS, BASES, WORKERS = 60, 3, 8
JOB = Path(__file__).parents[2] / "jobs" / "nightly.py"


class SubmittedZoo:
    """A zoo on S3, and the nights that a cluster is given."""

    def __init__(self, folder: Path, s3: S3, proxy: Proxy, dashboard: str) -> None:
        self.out, self.proxy = s3.url("out"), proxy
        self._folder, self._s3, self._dashboard = folder, s3, dashboard
        self._work = folder / "work"
        (self._work / "jobs").mkdir(parents=True)
        shutil.copy(JOB, self._work / "jobs")
        on_ray = {"engine": "ray", "device": "auto", "workers": WORKERS, "gpus_per_worker": 0.5, "threads": 1}
        (self._work / "zoo.yaml").write_text(self.description(self.out, on_ray))

    def description(self, out: str, run: Mapping[str, Any]) -> str:
        """The zoo.yaml, with an output of its own."""
        numbers = range(BASES)
        rules = [{"match": f"{number}-*", "base": f"b{number}"} for number in numbers]
        return json.dumps({
            "output": out,
            "bases": {f"b{number}": self._s3.url(f"zoo/bases/{number}") for number in numbers},
            "discover": [{"prefix": self._s3.url("zoo/tuned"), "rules": rules}],
            "extract": {"rank": 4, "dtype": "float32"},
            "run": run,
        })  # fmt: skip

    def upload(self, name: str, tensors: Mapping[str, Tensor], *, shards: int = 1, without: str = "") -> None:
        """In the place of what is there, if anything is."""
        here = self._folder / name.replace("/", "-")
        shutil.rmtree(here, ignore_errors=True)
        toys.save(here, dict(tensors), shards=shards)
        if without:
            (here / without).unlink()
        self._s3.upload_folder(here, f"zoo/{name}")

    def submit(self) -> tuple[str, int]:
        """A night: its log, and the exit code that its last line tells; what goes through the proxy is counted anew."""
        self.proxy.clear()
        done = subprocess.run(
            [
                str(Path(sys.executable).with_name("ray")), "job", "submit", "--address", self._dashboard,
                "--working-dir", str(self._work), "--", "python", "jobs/nightly.py", "zoo.yaml",
            ],
            capture_output=True, text=True, timeout=300, check=False,
        )  # fmt: skip
        found = re.search(r"^result: .+; exit code ([0-9]+)$", done.stdout, re.MULTILINE)
        assert found, done.stdout + done.stderr
        assert (done.returncode == 0) == (found[1] == "0")  # Ray makes 1 of every other code
        return done.stdout, int(found[1])

    def read(self) -> set[str]:
        """Checkpoints of which tensors were read."""
        return {key.split("/")[-2] for key, count in self.proxy.tensor_bytes.items() if count}

    def events(self) -> list[dict[str, Any]]:
        """Of the only run so far."""
        [info] = [info for info in storage.list_tree(f"{self.out}/_runs") if info.url.endswith("/events.jsonl")]
        return [json.loads(line) for line in storage.read_object(info, limit=1 << 24).splitlines()]


@pytest.fixture
def zoo(tmp_path: Path, s3: S3, monkeypatch: pytest.MonkeyPatch) -> Iterator[SubmittedZoo]:
    """Behind a proxy, and the cluster, whose nodes have the environment of this process."""
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    with running_proxy(s3.server.endpoint) as proxy:
        s3.use(endpoint=proxy.endpoint)
        with running_cluster(4, dashboard=True) as cluster:
            yield SubmittedZoo(tmp_path, s3, proxy, cluster.dashboard)


@pytest.mark.timeout(600)
def test_sixty_models_on_three_bases(zoo: SubmittedZoo) -> None:
    bases = [nights.tensors(number) for number in range(BASES)]
    for number, base in enumerate(bases):
        zoo.upload(f"bases/{number}", base)
    for number in range(MODELS):
        zoo.upload(f"tuned/{number % BASES}-{number:02d}", toys.fine_tuned(bases[number % BASES], seed=number))

    # All of them: by several workers, none of them failing, with the bytes of a plain loop.
    told, code = zoo.submit()
    assert (code, f"{MODELS}/{MODELS} models" in told) == (0, True), told
    nights.require_whole(zoo.out)
    happened = zoo.events()
    assert not [event for event in happened if event["event"] == "retry"]
    workers = {event["worker"] for event in happened if event["event"] == "task"}
    assert 1 < len(workers) <= WORKERS  # on a busy machine most may start too late
    calm = f"{zoo.out}-calm"
    assert night(zoofile.loads(zoo.description(calm, nights.PLAIN)), nights.Watcher()).counts == {"committed": MODELS}
    assert nights.left_behind(zoo.out) == nights.left_behind(calm)

    # Nothing is due: no tensor is read, nothing is written.
    before = nights.names(zoo.out)
    told, code = zoo.submit()
    assert (code, "nothing due" in told, sum(zoo.proxy.tensor_bytes.values())) == (0, True, 0), told
    assert nights.names(zoo.out) == before

    # One is new, one was replaced: these, and their bases.
    zoo.upload("tuned/0-new", toys.fine_tuned(bases[0], seed=100))
    zoo.upload("tuned/1-01", toys.fine_tuned(bases[1], seed=101))
    told, code = zoo.submit()
    assert (code, zoo.read()) == (0, {"0", "1", "0-new", "1-01"}), told
    made = {name.split("/")[0] for name in nights.names(zoo.out) - before if name.endswith(layout.CONFIG)}
    assert made == {"0-new", "1-01"}

    # What cannot be converted is told with its reason, and takes nobody with it.
    zoo.upload("tuned/0-poison", nights.poisoned(bases[0]))
    zoo.upload("tuned/1-wrong", nights.tensors(9))
    zoo.upload(
        "tuned/2-partial", toys.fine_tuned(bases[2], seed=103), shards=2, without="model-00002-of-00002.safetensors"
    )
    zoo.upload("tuned/2-good", toys.fine_tuned(bases[2], seed=104))
    told, code = zoo.submit()
    assert code == 3, told
    for line in (
        "failed 0-poison: .* NaN or infinite",
        "failed 1-wrong: .* not a fine-tune",
        "incomplete 2-partial: .* is missing",
        "1 +committed$",
    ):
        assert re.search(f"^{line}", told, re.MULTILINE), (line, told)
    nights.require_whole(zoo.out)
