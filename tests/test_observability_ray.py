"""On a real cluster: what is live on Ray's metrics port is what metrics.prom holds in the end; and what the doctor says of Ray."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from phlora_pipeline.doctor.cluster import of_ray
from phlora_pipeline.doctor.finding import Finding
from phlora_pipeline.metrics import METRICS
from phlora_pipeline.zoofile import RunSettings
from tests import toys
from tests.prometheus import panel_queries, running_prometheus
from tests.ray_cluster import FakeCluster, running_cluster
from tests.test_observability import told_by
from tests.zoo import nights
from tests.zoo.nights import Zoo

pytestmark = [pytest.mark.slow, pytest.mark.ray]


@pytest.fixture(scope="module")
def cluster() -> Iterator[FakeCluster]:
    """It reports every second; by itself every ten."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_metrics_report_interval_ms", "1000")
        with running_cluster(1) as running:
            patch.setenv("RAY_ADDRESS", running.address)
            patch.delenv("RAY_API_SERVER_ADDRESS", raising=False)
            yield running


@pytest.mark.timeout(400)
def test_the_same_numbers_are_live_and_in_the_file(cluster: FakeCluster, tmp_path: Path) -> None:
    import ray

    on_ray = {"engine": "ray", "device": "cpu", "workers": 1, "threads": 1}
    zoo = Zoo(tmp_path / "zoo", str(tmp_path / "out"), {"run": on_ray})
    base = zoo.add_base()
    for number in range(2):
        zoo.add(f"good-{number}", toys.fine_tuned(base, seed=number))
    zoo.add("poison", nights.poisoned(base))
    # The driver stays as long as it is looked at: by itself it is gone with the night.
    ray.init(include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    try:
        ports = {f"node-{number}": f"127.0.0.1:{node['MetricsExportPort']}" for number, node in enumerate(ray.nodes())}
        waiting = dict(panel_queries())
        with running_prometheus(tmp_path, ports) as prometheus, ThreadPoolExecutor(1) as pool:

            def all_were_shown() -> bool:
                for panel, query in list(waiting.items()):
                    if prometheus.query(query):
                        del waiting[panel]
                return not waiting

            shown = pool.submit(prometheus.until, all_were_shown, 90)
            assert zoo.night().exit_code == 3
            shown.result()

            told = [sample for family in text_string_to_metric_families(told_by(zoo.out)) for sample in family.samples]
            counted = {
                (sample.name, next(iter(sample.labels.values()), "")): sample.value
                for sample in told
                if sample.name in METRICS and METRICS[sample.name].kind == "counter" and sample.value
            }
            assert len(counted) > 10

            def live(name: str, label: str) -> float:
                only = f'{{{METRICS[name].label}="{label}"}}' if label else ""
                found = prometheus.query(f"sum(ray_{name}{only})")
                return float(found[0]["value"][1]) if found else 0.0

            prometheus.until(lambda: {key: live(*key) for key in counted} == pytest.approx(counted))
            started = "phlora_run_started_timestamp_seconds"
            [at] = [sample.value for sample in told if sample.name == started]
            assert prometheus.value(f"max(max_over_time(ray_{started}[1h]))") == at
            # Set again and again: Ray shows a gauge once.
            assert prometheus.value(f"max(count_over_time(ray_{started}[1h]))") >= 2
    finally:
        ray.shutdown()


def found(run: RunSettings) -> Finding:
    [finding] = of_ray("", run)
    return finding


@pytest.mark.timeout(200)
def test_the_doctor_joins_it_and_counts_its_nodes(cluster: FakeCluster) -> None:
    well = found(RunSettings(engine="ray", device="cuda"))
    assert (well.state, well.exit_code) == ("ok", 0), well
    assert "2 nodes with 8 GPUs and 2 processors" in well.told
    few = found(RunSettings(engine="ray", device="cuda", gpus_per_worker=16))
    assert (few.state, few.exit_code) == ("wrong", 14)
    patient = found(RunSettings(engine="ray", device="cuda", gpus_per_worker=16, workers=2))
    assert patient.state == "warning"


@pytest.mark.timeout(200)
def test_the_doctor_names_a_cluster_of_another_version(cluster: FakeCluster) -> None:
    """The cluster is made to say, where Ray itself looks, that it was started by another one."""
    from ray._common.usage.usage_constants import CLUSTER_METADATA_KEY
    from ray._private.ray_constants import KV_NAMESPACE_CLUSTER
    from ray._raylet import GcsClient

    client = GcsClient(address=cluster.address)
    metadata = json.loads(client.internal_kv_get(CLUSTER_METADATA_KEY, KV_NAMESPACE_CLUSTER))
    told = json.dumps({**metadata, "ray_version": "2.9.3"}).encode()
    client.internal_kv_put(CLUSTER_METADATA_KEY, told, True, KV_NAMESPACE_CLUSTER)
    # In a process of its own: Ray does not let go of a cluster that it could not join.
    done = subprocess.run([sys.executable, "-m", "phlora_pipeline", "doctor", "--json"], capture_output=True, text=True)
    assert done.returncode == 14, done.stderr
    [wrong] = [item for item in json.loads(done.stdout)["findings"] if item["state"] == "wrong"]
    assert (wrong["check"], wrong["exit_code"]) == ("ray", 14)
    assert "Ray: 2.9.3" in wrong["told"]
    assert "same version" in wrong["remedy"]
