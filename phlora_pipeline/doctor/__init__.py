"""Before a first night: everything that it will need, looked at one by one, each well or with what is wrong and what helps.

`finding` is the words, `here` looks at this machine, `places` at storage, `cluster` at Ray.
"""

from __future__ import annotations

from collections.abc import Iterator

from phlora_pipeline import zoofile
from phlora_pipeline.doctor.cluster import elsewhere, of_ray
from phlora_pipeline.doctor.finding import Finding, examined, exit_code
from phlora_pipeline.doctor.here import of_machine
from phlora_pipeline.doctor.places import of_storage
from phlora_pipeline.zoofile import RunSettings, ZooConfig

__all__ = ["Finding", "examine", "exit_code"]


def examine(zoo: str, address: str = "") -> Iterator[Finding]:
    """Look at everything, and tell it as it is found. Writes to the output: three small objects, removed again.

    Args:
        zoo: the zoo.yaml; empty: this machine and Ray alone.
        address: of a cluster's dashboard, as of `phlora submit`.
    """
    configs: list[ZooConfig] = []
    if zoo:
        yield examined("zoo.yaml", lambda: _loaded(zoo, configs))
    run = configs[0].run if configs else RunSettings()
    yield from of_machine(device=None if elsewhere(address, run) else run.device)
    yield from of_ray(address, run)
    for config in configs:
        yield from of_storage(config)


def _loaded(zoo: str, into: list[ZooConfig]) -> str:
    config = zoofile.load(zoo)
    into.append(config)
    places = len(config.discover)
    return f"{len(config.bases)} bases, {len(config.models)} models by hand, {places} places to look for more"
