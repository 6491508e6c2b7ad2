"""The dashboard and the alerts, asked of a real Prometheus and of promtool, about nights that were spent here."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from itertools import combinations
from pathlib import Path

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from phlora_pipeline import storage
from phlora_pipeline.errors import CredentialsError
from phlora_pipeline.metrics import METRICS
from tests import toys
from tests.counting_proxy import Fault, Request, running_proxy
from tests.prometheus import (
    DASHBOARD,
    OBSERVABILITY,
    RULES,
    Prometheus,
    alerts,
    panel_queries,
    required,
    running_prometheus,
    served,
)
from tests.s3_server import S3
from tests.zoo import nights
from tests.zoo.nights import Watcher, Zoo

HOUR, DAY = 60, 24 * 60


def told_by(out: str) -> str:
    """A run's metrics.prom."""
    [info] = [info for info in storage.list_tree(f"{out}/_runs") if info.url.endswith("/metrics.prom")]
    return storage.read_object(info, limit=1 << 20).decode()


def local_night(root: Path, *, poison: bool) -> str:
    """What a night of three models tells."""
    zoo = Zoo(root / "zoo", str(root / "out"))
    base = zoo.add_base()
    for number in range(2):
        zoo.add(f"good-{number}", toys.fine_tuned(base, seed=number))
    zoo.add("third", nights.poisoned(base) if poison else toys.fine_tuned(base, seed=3))
    assert zoo.night().exit_code == (3 if poison else 0)
    return told_by(zoo.out)


@pytest.fixture(scope="module")
def healthy(tmp_path_factory: pytest.TempPathFactory) -> str:
    return local_night(tmp_path_factory.mktemp("healthy"), poison=False)


@pytest.fixture(scope="module")
def poisoned(tmp_path_factory: pytest.TempPathFactory) -> str:
    return local_night(tmp_path_factory.mktemp("poisoned"), poison=True)


@pytest.fixture
def zoo_on_s3(s3: S3, tmp_path: Path) -> Zoo:
    base = nights.tensors(0)
    for name, tensors in (("b", base), ("tuned/one", toys.fine_tuned(base))):
        s3.upload_folder(toys.save(tmp_path / name.replace("/", "-"), dict(tensors)), name)
    (tmp_path / "bases").mkdir()
    places = {"bases": {"b": s3.url("b")}, "discover": [{"prefix": s3.url("tuned"), "base": "b"}]}
    return Zoo(tmp_path, s3.url("out"), places)


# What Prometheus is asked.


@pytest.fixture(scope="module")
def prometheus(poisoned: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    """It has seen the night of the poisoned model twice: by its file, and as Ray would have shown it."""
    live = re.sub(r"(?m)^(# \w+ )?phlora_", r"\1ray_phlora_", poisoned)
    with (
        served(poisoned) as file,
        served(live) as port,
        running_prometheus(tmp_path_factory.mktemp("prometheus"), {"phlora": file, "ray": port}) as server,
    ):
        yield server


@pytest.mark.parametrize(("panel", "query"), panel_queries(), ids=lambda value: value if " " in value else None)
def test_every_panel_shows_something_of_a_real_night(prometheus: Prometheus, panel: str, query: str) -> None:
    found = prometheus.query(query)
    assert found, panel
    assert not [series for series in found if series["value"][1] == "NaN"], panel


def test_panels_show_what_happened_once(prometheus: Prometheus) -> None:
    """Two scrape jobs see the same night; its models are not counted twice."""
    of = dict(reversed(panel_queries()))
    assert prometheus.value(of["Converted tonight"]) == 2
    assert prometheus.value(of["Failed tonight"]) == 1
    assert prometheus.value(of["Exit code"]) == 3
    assert {series["metric"]["state"]: float(series["value"][1]) for series in prometheus.query(of["The zoo, by state"])} == {"committed": 2, "failed": 1}  # fmt: skip
    assert 0 <= prometheus.value(of["Waiting for bytes"]) <= 1
    assert 0 < prometheus.value(of["Lasted"]) < 300
    assert 0 < prometheus.value(of["Since the last conversion"]) < 3600


def test_prometheus_takes_the_rules_and_the_right_one_fires(prometheus: Prometheus) -> None:
    prometheus.until(lambda: all(rule["health"] == "ok" for rule in prometheus.rules().values()))
    prometheus.until(lambda: any(rule["state"] == "firing" for rule in prometheus.rules().values()))
    assert {name for name, rule in prometheus.rules().items() if rule["state"] == "firing"} == {"PhloraModelsFail"}
    [alert] = prometheus.rules()["PhloraModelsFail"]["alerts"]
    assert alert["annotations"]["summary"] == "33.33% of the models of the last night failed"


# When which alert fires: promtool runs time ahead.


def firing(folder: Path, text: str, expected: Mapping[int, Iterable[str]]) -> None:
    """Promtool's word that after so many minutes of this text these alerts fire, and no others. The night began at 0."""
    families = list(text_string_to_metric_families(text))
    [began] = [sample.value for family in families for sample in family.samples if sample.name == "phlora_run_started_timestamp_seconds"]  # fmt: skip
    series = []
    for sample in (sample for family in families for sample in family.samples):
        labels = ",".join(f'{name}="{value}"' for name, value in {**sample.labels, "job": "phlora"}.items())
        value = sample.value - began if sample.name.endswith("_timestamp_seconds") else sample.value
        series.append({"series": f"{sample.name}{{{labels}}}", "values": f"{value:g}+0x{max(expected)}"})
    asked = [
        {
            "expr": 'count by (alertname) (ALERTS{alertstate="firing"})',
            "eval_time": f"{minutes}m",
            "exp_samples": [{"labels": f'{{alertname="{name}"}}', "value": 1} for name in sorted(names)],
        }
        for minutes, names in expected.items()
    ]
    test = {"rule_files": [str(RULES)], "evaluation_interval": "10m", "tests": [{"interval": "1m", "input_series": series, "promql_expr_test": asked}]}  # fmt: skip
    (folder / "test.yaml").write_text(yaml.safe_dump(test))
    done = subprocess.run(
        [required("promtool"), "test", "rules", str(folder / "test.yaml")], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_promtool_finds_nothing_wrong_with_the_rules() -> None:
    done = subprocess.run([required("promtool"), "check", "rules", str(RULES)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{len(alerts())} rules found" in done.stdout


def test_promtool_finds_nothing_wrong_with_the_metrics(healthy: str) -> None:
    done = subprocess.run([required("promtool"), "check", "metrics"], input=healthy, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_a_healthy_night_is_quiet_for_three_days(healthy: str, tmp_path: Path) -> None:
    quiet = dict.fromkeys((10, 7 * HOUR, 3 * DAY - 10), ())
    firing(tmp_path, healthy, {**quiet, 3 * DAY + 20: ["PhloraNothingConverted"]})


def test_a_night_that_fails_a_third_of_its_models(poisoned: str, tmp_path: Path) -> None:
    firing(tmp_path, poisoned, {10: ["PhloraModelsFail"]})


def test_one_failure_among_many_is_no_alarm(poisoned: str, tmp_path: Path) -> None:
    many = poisoned.replace('phlora_models_total{state="committed"} 2.0', 'phlora_models_total{state="committed"} 9.0')
    assert many != poisoned
    firing(tmp_path, many, {10: ()})


def test_a_night_that_does_not_end(healthy: str, tmp_path: Path) -> None:
    """As it is seen while it runs: how it ended is not there."""
    ends = ("phlora_run_ended", "phlora_run_exit_code", "phlora_zoo_models", "phlora_last_converted")
    lines = [line for line in healthy.splitlines() if not line.split("{")[0].startswith(ends)]
    firing(tmp_path, "\n".join(lines) + "\n", {10: (), 6 * HOUR - 10: (), 6 * HOUR + 20: ["PhloraNightDidNotFinish"]})


@pytest.mark.s3
def test_a_night_whose_credentials_expire(s3: S3, zoo_on_s3: Zoo, tmp_path: Path) -> None:
    with running_proxy(s3.server.endpoint) as proxy:
        s3.use(endpoint=proxy.endpoint)

        def expire() -> None:
            proxy.fault = lambda request: "expired" if "/tuned/" in request.key else None

        with pytest.raises(CredentialsError):
            zoo_on_s3.night(Watcher(planned=expire))
    firing(tmp_path, told_by(zoo_on_s3.out), {10: ["PhloraNightEndedInError"]})


@pytest.mark.s3
def test_a_night_that_is_throttled(s3: S3, zoo_on_s3: Zoo, tmp_path: Path) -> None:
    with running_proxy(s3.server.endpoint) as proxy:
        s3.use(endpoint=proxy.endpoint)
        seen: set[tuple[str, str, int]] = set()

        def first(request: Request) -> Fault | None:
            asked = (request.verb, request.key, request.start)
            if asked in seen:
                return None
            seen.add(asked)
            return "busy"

        proxy.fault = first
        assert zoo_on_s3.night().exit_code == 0
    firing(tmp_path, told_by(zoo_on_s3.out), {10: ["PhloraThrottled"]})


# What stands in the files.


def named(text: str) -> set[str]:
    """Metrics that are asked for, by the names that they have here."""
    return {re.sub(r"_(bucket|sum|count)$", "", name) for name in re.findall(r"phlora_\w+", text)}


def test_only_names_that_exist_are_asked_for_and_each_of_them_somewhere() -> None:
    asked = named(
        " ".join(query for _, query in panel_queries()) + " ".join(rule["expr"] for rule in alerts().values())
    )
    assert asked == set(METRICS)


def test_every_selector_takes_rays_names_as_well() -> None:
    text = RULES.read_text() + json.dumps([query for _, query in panel_queries()])
    assert len(re.findall(r"phlora_\w", text)) == len(re.findall(r'__name__=~\\?"\(ray_\)\?phlora_\w', text))


def test_every_alert_says_what_it_is_and_what_helps() -> None:
    for name, rule in alerts().items():
        assert rule["labels"]["severity"] in {"warning", "critical"}, name
        assert len(rule["annotations"]["summary"]) > 20, name
        assert len(rule["annotations"]["runbook"]) > 50, name
        assert f"`{name}`" in (OBSERVABILITY / "README.md").read_text()


def test_panels_do_not_lie_on_each_other() -> None:
    panels = json.loads(DASHBOARD.read_text())["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    cells = [
        {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        for at in (panel["gridPos"] for panel in panels)
    ]
    assert not [pair for pair in combinations(cells, 2) if pair[0] & pair[1]]
    assert max(x for cell in cells for x, _ in cell) < 24


def test_the_operators_rules_are_the_same() -> None:
    document = yaml.safe_load((OBSERVABILITY / "prometheus-rule-crd.yaml").read_text())
    assert (document["apiVersion"], document["kind"]) == ("monitoring.coreos.com/v1", "PrometheusRule")
    assert document["spec"] == yaml.safe_load(RULES.read_text())


def test_the_component_can_be_added_to_an_overlay(tmp_path: Path) -> None:
    kubectl = required("kubectl")
    (tmp_path / "kustomization.yaml").write_text(
        yaml.safe_dump({
            "apiVersion": "kustomize.config.k8s.io/v1beta1",
            "kind": "Kustomization",
            "components": [str(Path("../" * (len(tmp_path.parts) - 1)) / OBSERVABILITY.relative_to("/"))],
        })
    )  # fmt: skip
    done = subprocess.run([kubectl, "kustomize", str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    made = {document["kind"]: document for document in yaml.safe_load_all(done.stdout)}
    assert made.keys() == {"ConfigMap", "PrometheusRule", "PodMonitor"}
    assert json.loads(made["ConfigMap"]["data"][DASHBOARD.name])["uid"] == "phlora-nights"


def test_the_table_of_names_is_that_of_the_code() -> None:
    text = (OBSERVABILITY / "README.md").read_text()
    rows = re.findall(r"^\| `(phlora_\w+)` \| (\w+) \| (?:`(\w+)`[^|]*)?\s*\| (.+) \|$", text, re.MULTILINE)
    assert rows == [(metric.name, metric.kind, metric.label, metric.help) for metric in METRICS.values()]


def test_the_file_gets_to_the_node_exporter_by_the_readmes_commands(tmp_path: Path) -> None:
    """Once: a night in which nothing was due leaves the last one's file alone."""
    [block] = re.findall(r"```sh\n(url=.*?)```", (OBSERVABILITY / "README.md").read_text(), re.DOTALL)
    base = nights.tensors(0)
    toys.save(tmp_path / "bases" / "b", base)
    toys.save(tmp_path / "tuned" / "one", toys.fine_tuned(base))
    zoo = {"output": "out", "bases": {"b": "bases/b"}, "discover": [{"prefix": "tuned", "base": "b"}], "run": nights.PLAIN}  # fmt: skip
    (tmp_path / "zoo.yaml").write_text(json.dumps(zoo))
    (tmp_path / "textfile").mkdir()
    script = "set -euo pipefail\n" + block.replace("/var/lib/node_exporter", str(tmp_path / "textfile"))
    script = script.replace("phlora run", f"{sys.executable} -m phlora_pipeline run")
    here = {**os.environ, "PYTHONPATH": str(OBSERVABILITY.parents[1])}
    for _ in range(2):
        done = subprocess.run(["bash", "-c", script], cwd=tmp_path, env=here, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    assert [path.name for path in (tmp_path / "textfile").iterdir()] == ["phlora.prom"]
    assert (tmp_path / "textfile" / "phlora.prom").read_text() == told_by(str(tmp_path / "out"))
