"""The overlays are right, by every schema and rule, and fit the code that they run."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from phlora_pipeline import zoofile
from tests.cluster import rules, schemas
from tests.cluster.manifests import CLUSTER, OBSERVED, OVERLAYS, ROOT, named, pods, rendered


def test_nothing_is_wrong_with_an_overlay_that_is_observed() -> None:
    documents = rendered(OBSERVED)
    assert {"PrometheusRule", "PodMonitor"} <= {item["kind"] for item in documents}
    assert list(schemas.faults(documents)) == []
    assert list(rules.faults(documents)) == []


@pytest.mark.parametrize("overlay", OVERLAYS)
class TestOverlays:
    """Each of them."""

    def test_nothing_is_wrong_with_it(self, overlay: str) -> None:
        assert list(schemas.faults(rendered(overlay))) == []
        assert list(rules.faults(rendered(overlay))) == []

    def test_kubernetes_validate_finds_nothing_either_in_old_and_new_versions(self, overlay: str) -> None:
        for item in rendered(overlay):
            if item["apiVersion"] != "ray.io/v1":
                for version in (schemas.KUBERNETES, kubernetes_validate.latest_version()):
                    kubernetes_validate.validate(item, version, strict=True)

    def test_what_pods_run_is_a_command_of_ours(self, overlay: str) -> None:
        """Its flags parse, up to the zoo.yaml that is not there."""
        entry = named(rendered(overlay), "RayJob")["spec"]["entrypoint"].removeprefix("exec ").split()
        gc = dict(pods(rendered(overlay)))["phlora-gc"]["spec"]["containers"][0]["command"]
        for command in (entry, gc):
            assert command[0] == "phlora"
            done = subprocess.run(
                [sys.executable, "-m", "phlora_pipeline", *command[1:]], capture_output=True, text=True, check=False
            )
            assert (done.returncode, "there is no zoo file at /etc/phlora/zoo.yaml" in done.stderr) == (2, True), (
                done.stderr
            )


@pytest.mark.parametrize("text", sorted(CLUSTER.glob("overlays/*/zoo.yaml")), ids=lambda path: path.parent.name)
def test_a_zoo_is_read_by_our_own_loader(text: Path) -> None:
    assert zoofile.load(str(text)).output.startswith("s3://")


@pytest.mark.parametrize("instance", ["p4d.24xlarge", "p4de.24xlarge"])
def test_the_instance_is_one_variable(instance: str, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(CLUSTER, tmp_path / "cluster")
    file = tmp_path / "cluster" / "overlays" / "aws-a100" / "instance.yaml"
    file.write_text(re.sub(r"^  type: .*$", f"  type: {instance}", file.read_text(), flags=re.MULTILINE))
    kubectl = Path(sys.executable).with_name("kubectl")
    done = subprocess.run([kubectl, "kustomize", file.parent], capture_output=True, text=True, check=True)
    documents = list(yaml.safe_load_all(done.stdout))
    assert done.stdout.count(instance) == 1
    assert list(rules.faults(documents)) == []


def test_spot_changes_the_workers_and_nothing_else() -> None:
    before, after = rendered("aws-a100"), rendered("aws-a100-spot")
    changed = [one["kind"] for one, other in zip(before, after, strict=True) if one != other]
    assert changed == ["RayJob"]
    for documents in (before, after):
        pod = dict(pods(documents))["workers"]["spec"]
        del pod["nodeSelector"]["karpenter.sh/capacity-type"], pod["tolerations"]
    assert before == after


@pytest.mark.skipif(not schemas.CRD.exists(), reason="KubeRay's CRDs are not part of the repository")
def test_our_schema_of_a_rayjob_has_no_field_that_kuberay_has_not() -> None:
    ours, theirs = (validator.schema for validator in schemas.rayjob_validators())
    require_part_of(ours["properties"]["spec"], theirs["properties"]["spec"], "spec")


def require_part_of(ours: dict[str, Any], theirs: dict[str, Any], path: str) -> None:
    if "type" in ours:
        assert ours["type"] == theirs["type"], path
    if "enum" in ours and "enum" in theirs:
        assert set(ours["enum"]) == set(theirs["enum"]), path
    for name, inner in ours.get("properties", {}).items():
        assert name in theirs["properties"], f"{path}.{name}"
        require_part_of(inner, theirs["properties"][name], f"{path}.{name}")
    if isinstance(ours.get("items"), dict):
        require_part_of(ours["items"], theirs["items"], f"{path}[]")


class TestImage:
    """What the Dockerfile says, as far as it can be told without building."""

    text = (ROOT / "Dockerfile").read_text()

    def test_it_is_made_from_the_locked_set_by_the_locked_uv(self) -> None:
        makefile = (ROOT / "Makefile").read_text()
        assert re.findall(r"UV_VERSION=([0-9.]+)", self.text) == re.findall(r"^UV +:= (\S+)", makefile, re.MULTILINE)
        assert all(
            "constraints.txt" in line
            for line in self.text.splitlines()
            if "uv pip install" in line and "--no-deps --comp" not in line
        )

    def test_its_user_is_the_manifests(self) -> None:
        assert re.findall(r"^USER (.*)$", self.text, re.MULTILINE) == ["1000:1000"]

    def test_the_last_stage_takes_what_is_named_and_installs_nothing(self) -> None:
        last = self.text.rpartition("\nFROM ")[2]
        assert not re.search(r"\b(apt-get|pip|uv|curl|gcc)\b", last.replace("/opt/uv", ""))
        assert set(re.findall(r"^COPY (?:--from=\S+ )?(.*)$", last, re.MULTILINE)) == {
            "/opt/phlora /opt/phlora", "/package /opt/phlora", "jobs/__init__.py jobs/nightly.py jobs/kuberay.py jobs/",
        }  # fmt: skip
