"""What bad nights must not do, `python -m jobs.chaos --seeds 20`: nodes, workers and then the driver are killed, by seed.

On a Ray cluster of four fake 8-GPU nodes and a real S3 server on loopback, a zoo is converted while 2 nodes, 5 workers and
then the driver are killed at random points; the nodes are replaced, and the night is run again. Each time the output must
be that of an undisturbed night, byte for byte, and no part that stood when a task began may be computed again: at the server
each part is created once, and nobody comes with it again. Exit codes: 0 so it was · 1 it was not, and for which seeds.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    # Before torch is imported: its threads wait busily by default, which on a shared machine costs more than it gains.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch

from phlora_pipeline import zoofile
from phlora_pipeline.cli.leaving import exit_code_kept
from phlora_pipeline.dispatch import MAX_ATTEMPTS
from phlora_pipeline.zoo.night import night
from tests import toys
from tests.counting_proxy import Proxy, running_proxy
from tests.ray_cluster import FakeCluster, kill, running_cluster
from tests.s3_server import BUCKET, Server, environment, running_server
from tests.zoo import nights

NODES, NODES_LOST, WORKERS, WORKERS_LOST = 4, 2, 8, 5
MODELS, BASES, SHAPES = 24, 2, 8
PARTS = MODELS * SHAPES
HELD_UP = 0.4
"""Seconds that each part is on its way: so long a night of such small models lasts that something can happen in it."""

PATIENCE = 150.0
"""Seconds without a new part, or in all for what should end by itself."""


@dataclass(frozen=True)
class Outcome:
    """How one seed ended.

    Attributes:
        story: who was killed when, in parts.
        wrong: what should not be; empty where all is well.
    """

    story: str
    wrong: tuple[str, ...]


def main(arguments: Sequence[str] | None = None) -> int:
    """The recipe; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m jobs.chaos", description=__doc__)
    parser.add_argument("--seeds", type=int, default=20, help="how many nights are disturbed (default 20)")
    parser.add_argument("--first", type=int, default=1, help="the first seed (default 1)")
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(1)
    wrong = []
    with tempfile.TemporaryDirectory(prefix="chaos-") as folder, running_server() as server, running_proxy(server.endpoint) as proxy:  # fmt: skip
        # The workers have their nodes' environment, not the driver's: it is set before there is a node.
        os.environ.update(environment(proxy.endpoint))
        calm = prepare(Path(folder), server)
        proxy.delay = lambda request: HELD_UP if request.conditional and "/_parts/" in request.key else 0.0
        with running_cluster(NODES) as cluster:
            for seed in range(chosen.first, chosen.first + chosen.seeds):
                began = time.monotonic()
                outcome = disturbed(seed, Path(folder), cluster, proxy, calm)
                told = f"WRONG: {'; '.join(outcome.wrong)}" if outcome.wrong else "as if nothing had happened"
                say(f"seed {seed}: {outcome.story} · {told} · {time.monotonic() - began:.0f} s")
                wrong += [seed] if outcome.wrong else []
    say(
        f"{chosen.seeds - len(wrong)} of {chosen.seeds} nights as undisturbed" + (f"; not so: {wrong}" if wrong else "")
    )
    return 1 if wrong else 0


def prepare(folder: Path, server: Server) -> dict[str, Any]:
    """Upload the zoo; what an undisturbed night of a plain loop makes of it."""
    for number in range(BASES):
        base = tensors(number)
        upload(server, toys.save(folder / f"base-{number}", base), f"bases/{number}")
        for model in range(number, MODELS, BASES):
            upload(server, toys.save(folder / f"m{model}", toys.fine_tuned(base, seed=model)), f"tuned/{number}-{model:02d}")  # fmt: skip
    result = night(zoofile.loads(zoo_yaml("calm", engine="local", device="cpu")), nights.Watcher())
    if result.counts != {"committed": MODELS}:
        raise RuntimeError(f"the undisturbed night ended with {result.counts}: {result.models}")
    return nights.left_behind(place("calm"))


def tensors(seed: int) -> dict[str, torch.Tensor]:
    """A base whose matrices have a shape each, and so a part each."""
    generator = torch.Generator().manual_seed(seed)
    return {
        f"model.layers.{layer}.self_attn.q_proj.weight": torch.randn((16 + 4 * layer, 24), generator=generator)
        for layer in range(SHAPES)
    }


def upload(server: Server, folder: Path, name: str) -> None:
    """As somebody else does."""
    for path in folder.iterdir():
        server.foreign.put_object(Bucket=BUCKET, Key=f"zoo/{name}/{path.name}", Body=path.read_bytes())


def place(name: str) -> str:
    """URL of an output."""
    return f"s3://{BUCKET}/out-{name}"


def zoo_yaml(out: str, **run: object) -> str:
    """The zoo's description, with an output of its own."""
    bases = {f"b{number}": f"s3://{BUCKET}/zoo/bases/{number}" for number in range(BASES)}
    rules = [{"match": f"{number}-*", "base": f"b{number}"} for number in range(BASES)]
    return json.dumps({
        "output": place(out),
        "bases": bases,
        "discover": [{"prefix": f"s3://{BUCKET}/zoo/tuned", "rules": rules}],
        "extract": {"rank": 4, "dtype": "float32"},
        "run": {"threads": 1, **run},
    })  # fmt: skip


def disturbed(seed: int, folder: Path, cluster: FakeCluster, proxy: Proxy, calm: dict[str, Any]) -> Outcome:
    """One bad night, and the run after it."""
    dice, name = random.Random(seed), f"seed-{seed}"  # noqa: S311 (no secret is made of it)
    file = folder / f"{name}.yaml"
    file.write_text(zoo_yaml(name, engine="ray", device="auto", workers=WORKERS, gpus_per_worker=0.5))
    proxy.clear()
    driver = start(file, cluster)
    try:
        story, ended = torment(dice, name, driver, cluster, proxy)
    finally:
        driver.kill()
        driver.wait()
    cluster.add(NODES - len(cluster.nodes))
    began, stood = time.monotonic(), len(proxy.created(parts_of(name)))
    again = start(file, cluster)
    try:
        told, errors = again.communicate(timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        again.kill()
        return Outcome(story, ("the run after it does not end",))
    wrong = ["the night ended before the driver was killed"] if ended else []
    if again.returncode != 0:
        wrong.append(f"the run after it ended with {again.returncode}: {(told + errors)[-2000:]}")
    story += f", again from {stood} in {time.monotonic() - began:.0f} s"
    return Outcome(story, (*wrong, *differences(name, proxy, calm)))


def start(file: Path, cluster: FakeCluster) -> subprocess.Popen[str]:
    """The night, as a job does it: in a process of its own."""
    command = [sys.executable, "-m", "phlora_pipeline", "run", str(file), "--json"]
    environment = {**os.environ, "RAY_ADDRESS": cluster.address}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def torment(
    dice: random.Random, name: str, driver: subprocess.Popen[str], cluster: FakeCluster, proxy: Proxy
) -> tuple[str, bool]:
    """Kill nodes and workers, then the driver; tells whom at which part, and whether the driver had ended before."""
    victims = ["node"] * NODES_LOST + ["worker"] * WORKERS_LOST
    dice.shuffle(victims)
    points = sorted(dice.randrange(1, int(0.85 * PARTS)) for _ in victims)
    points.append(dice.randrange(int(0.85 * PARTS), PARTS))
    story: list[str] = []
    for victim, point in zip([*victims, "driver"], points, strict=True):
        stood = wait_for(point, name, driver, proxy)
        if driver.poll() is not None:
            return ", ".join(story), True
        if victim == "node":
            cluster.kill(dice.choice(cluster.nodes))
        elif victim == "worker":
            kill(dice.choice(some_workers(cluster)))
        else:
            driver.kill()
        story.append(f"{victim} at {stood}")
    return ", ".join(story), False


def wait_for(point: int, name: str, driver: subprocess.Popen[str], proxy: Proxy) -> int:
    """Until so many parts were created, or the driver has ended; how many there are."""
    last, since = -1, time.monotonic()
    while (stood := len(proxy.created(parts_of(name)))) < point and driver.poll() is None:
        if stood != last:
            last, since = stood, time.monotonic()
        if time.monotonic() - since > PATIENCE:
            raise RuntimeError(f"{name}: no further part after {stood} in {PATIENCE:.0f} s")
        time.sleep(0.05)
    return stood


def some_workers(cluster: FakeCluster) -> list[int]:
    """Those that live, as soon as there are any."""
    deadline = time.monotonic() + PATIENCE
    while not (found := cluster.workers()):
        if time.monotonic() > deadline:
            raise RuntimeError("there are no workers")
        time.sleep(0.2)
    return found


def parts_of(name: str) -> str:
    """What the keys of a run's parts contain."""
    return f"/out-{name}/_parts/"


def differences(name: str, proxy: Proxy, calm: dict[str, Any]) -> list[str]:
    """From an undisturbed night, in words."""
    wrong = []
    left = nights.left_behind(place(name))
    blamed = {key: left[key]["reason"] for key in left if "/attempt-" in key}
    wrong += [f"{key.split('/')[1]} was blamed: {reason}" for key, reason in blamed.items() if not deserved(reason)]
    for key, reason in blamed.items():
        say(f"{name}: {key.split('/')[1]} failed on the way, and was converted by the run after it: {reason}")
    left = {key: data for key, data in left.items() if key not in blamed}
    for what, keys in (
        ("missing", calm.keys() - left.keys()),
        ("too much", left.keys() - calm.keys()),
        ("other bytes", {key for key in calm.keys() & left.keys() if calm[key] != left[key]}),
    ):
        if keys:
            wrong.append(f"{len(keys)} objects are {what}: {', '.join(sorted(keys)[:3])}")
    created, refused = proxy.created(parts_of(name)), proxy.refused(parts_of(name))
    if len(created) != PARTS or set(created.values()) != {1}:
        wrong.append(f"{len(created)} parts were created {sum(created.values())} times, {PARTS} once were expected")
    if refused:
        wrong.append(f"{len(refused)} parts were computed again though they stood: {', '.join(sorted(refused)[:3])}")
    try:
        nights.require_whole(place(name))
    except AssertionError as error:
        wrong.append(f"not whole: {error}")
    return wrong


def deserved(reason: str) -> bool:
    """Whether a task was in two workers that were killed: that counts as its fault, since no more can be known of it."""
    return "its worker died: ActorDiedError" in reason and f"({MAX_ATTEMPTS} attempts)" in reason


def say(text: str) -> None:
    """A line, at once."""
    print(text, flush=True)


if __name__ == "__main__":
    with exit_code_kept():
        sys.exit(main())
