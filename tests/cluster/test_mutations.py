"""What can go wrong with a manifest, done to it: each must be caught. A check that nothing fails is no check."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from typing import Any

import pytest

from tests.cluster import rules, schemas
from tests.cluster.manifests import OBSERVED, OVERLAYS, Document, rendered, walk

GONE = object()

_JOB = "RayJob/phlora-night/spec"
_RAY = f"{_JOB}/rayClusterSpec"
_HEAD = f"{_RAY}/headGroupSpec/template"
_WORKERS = f"{_RAY}/workerGroupSpecs/0"
_NIGHTLY = "CronJob/phlora-nightly/spec"
_POD = f"{_NIGHTLY}/jobTemplate/spec/template/spec"
_GC = "CronJob/phlora-gc/spec"
_GC_POD = f"{_GC}/jobTemplate/spec/template/spec"

MUTATIONS: list[tuple[str, Any]] = [
    # The schedule.
    (f"{_NIGHTLY}/schedule", "0 25 * * *"),
    (f"{_NIGHTLY}/schedule", "0 1 * *"),
    (f"{_NIGHTLY}/schedule", "at one"),
    (f"{_NIGHTLY}/timeZone", "Europe/Berlyn"),
    (f"{_NIGHTLY}/concurrencyPolicy", "Forbids"),
    (f"{_NIGHTLY}/concurrencyPolicy", "Allow"),
    (f"{_NIGHTLY}/concurrencyPolicy", GONE),
    (f"{_NIGHTLY}/startingDeadlineSeconds", 5),
    (f"{_NIGHTLY}/startingDeadlineSeconds", "3600"),
    (f"{_NIGHTLY}/failedJobsHistoryLimit", 0),
    (f"{_NIGHTLY}/suspend", True),
    (f"{_NIGHTLY}/jobTemplate/spec/activeDeadlineSeconds", 90000),
    (f"{_NIGHTLY}/jobTemplate/spec/activeDeadlineSeconds", 3600),
    (f"{_NIGHTLY}/jobTemplate/spec/backoffLimit", 0),
    (f"{_NIGHTLY}/jobTemplate/spec/podFailurePolicy/rules/1/onExitCodes/values", [2, 3]),
    (f"{_NIGHTLY}/jobTemplate/spec/podFailurePolicy/rules/1/onExitCodes/operator", "NotIn"),
    (f"{_NIGHTLY}/jobTemplate/spec/podFailurePolicy/rules/1/action", "Fail"),
    (f"{_NIGHTLY}/jobTemplate/spec/podFailurePolicy/rules/0", GONE),
    ("CronJob/phlora-nightly/metadata/name", "phlora-nightly-conversion-of-the-whole-zoo"),
    # The pod that makes a RayJob of it.
    (f"{_POD}/containers/0/command", ["python", "jobs/kuberay.py", "phlora-nights"]),
    (f"{_POD}/containers/0/env/1/valueFrom/fieldRef/fieldPath", "metadata.name"),
    (f"{_POD}/containers/0/env/2", GONE),
    (f"{_POD}/containers/0/resources/requests/memory", "128MB"),
    (f"{_POD}/serviceAccountName", "phlora-night"),
    (f"{_POD}/serviceAccountName", "phlora-scheduler"),
    (f"{_POD}/automountServiceAccountToken", False),
    (f"{_POD}/restartPolicy", "Always"),
    (f"{_POD}/restartPolicy", "OnFailure"),
    (f"{_POD}/volumes", []),
    # The night.
    ("RayJob/phlora-night/metadata/name", "phlora-night-of-the-whole-zoo-of-all-our-fine-tunes"),
    (f"{_JOB}/suspend", False),
    (f"{_JOB}/entrypoint", "phlora run /etc/phlora/zoo.yaml"),
    (f"{_JOB}/entrypoint", "exec phlora run /etc/zoo.yaml"),
    (f"{_JOB}/jobId", "nightly"),
    (f"{_JOB}/submissionMode", "K8SJobMode"),
    (f"{_JOB}/preRunningDeadlineSeconds", 0),
    (f"{_JOB}/activeDeadlineSeconds", 600),
    (f"{_JOB}/activeDeadlineSeconds", "21600"),
    (f"{_JOB}/backoffLimit", 2),
    (f"{_JOB}/shutdownAfterJobFinishes", False),
    (f"{_JOB}/ttlSecondsAfterFinished", GONE),
    (f"{_JOB}/ttlSecondsAfterFinish", 600),
    # Its cluster.
    (f"{_RAY}/rayVersion", "2.9.0"),
    (f"{_RAY}/rayVersion", 2.6),
    (f"{_RAY}/authOptions", GONE),
    (f"{_RAY}/authOptions/mode", "disabled"),
    (f"{_RAY}/authOptions/mode", "tokens"),
    (f"{_RAY}/enableInTreeAutoscaling", False),
    (f"{_RAY}/autoscalerOptions/version", "v3"),
    (f"{_RAY}/autoscalerOptions/securityContext", GONE),
    (f"{_RAY}/autoscalerOptions/volumeMounts", []),
    (f"{_RAY}/headGroupSpec/rayStartParams/num-cpus", "4"),
    (f"{_RAY}/headGroupSpec/rayStartParams/num-cpus", 0),
    (f"{_RAY}/headGroupSpec/rayStartParams", GONE),
    (f"{_WORKERS}/minReplicas", 1),
    (f"{_WORKERS}/replicas", 4),
    (f"{_WORKERS}/maxReplicas", 3),
    (f"{_WORKERS}/maxReplica", 4),
    (f"{_WORKERS}/rayStartParams/object-store-memory", GONE),
    # Being stopped.
    (f"{_HEAD}/spec/terminationGracePeriodSeconds", 30),
    (f"{_HEAD}/spec/containers/0/lifecycle", GONE),
    (f"{_HEAD}/spec/containers/0/env/0/value", "3"),
    (f"{_HEAD}/spec/containers/0/env/0/value", 40),
    (f"{_WORKERS}/template/spec/terminationGracePeriodSeconds", 600),
    (f"{_WORKERS}/template/spec/containers/0/lifecycle/preStop/exec/command", ["ray", "status"]),
    # Pods.
    (f"{_HEAD}/spec/containers/0/image", "rayproject/ray:2.60.0"),
    (f"{_WORKERS}/template/spec/containers/0/image", "registry.example.com/phlora-pipeline:latest"),
    (f"{_HEAD}/spec/containers/0/securityContext/readOnlyRootFilesystem", False),
    (f"{_HEAD}/spec/containers/0/securityContext/privileged", True),
    (f"{_HEAD}/spec/containers/0/securityContext/capabilities/drop", []),
    (f"{_WORKERS}/template/spec/securityContext/runAsNonRoot", GONE),
    (f"{_WORKERS}/template/spec/securityContext/runAsUser", 0),
    (f"{_WORKERS}/template/spec/securityContext/fsGroup", GONE),
    (f"{_WORKERS}/template/spec/securityContext/seccompProfile/type", "Unconfined"),
    (f"{_WORKERS}/template/spec/hostNetwork", True),
    (f"{_WORKERS}/template/spec/containers/0/resources/requests", GONE),
    (f"{_WORKERS}/template/spec/containers/0/resources/limits/memory", "8 GB"),
    (f"{_WORKERS}/template/spec/containers/0/imagePullPolicys", "Always"),
    (f"{_WORKERS}/template/spec/containers", []),
    (f"{_WORKERS}/template/spec/topologySpreadConstraints/0/whenUnsatisfiable", "DoNotSchedule"),
    (f"{_WORKERS}/template/spec/serviceAccountName", "default"),
    (f"{_WORKERS}/template/spec/automountServiceAccountToken", GONE),
    (f"{_HEAD}/spec/volumes/1/configMap/name", "phlora-zoos"),
    (f"{_HEAD}/spec/containers/0/volumeMounts/1/mountPath", "/etc/zoo"),
    (f"{_HEAD}/spec/containers/0/volumeMounts/0", GONE),
    (f"{_HEAD}/spec/volumes/0/emptyDir", {}),
    (f"{_HEAD}/spec/containers/0/envFrom/0/configMapRef/name", "environment"),
    (f"{_HEAD}/spec/containers/0/envFrom/1/secretRef/optional", False),
    (f"{_JOB}/submitterPodTemplate", GONE),
    # What may go, and who removes it.
    (f"{_GC}/schedule", "0 13 * * 8"),
    (f"{_GC}/concurrencyPolicy", "Replace"),
    (f"{_GC_POD}/serviceAccountName", "phlora-night"),
    (f"{_GC_POD}/containers/0/command", ["phlora", "gc", "/etc/phlora/zoo.yml", "--yes"]),
    # Who may what.
    ("Namespace/phlora/metadata/labels", {}),
    ("Role/phlora-schedule/metadata/namespace", "default"),
    ("Role/phlora-schedule/rules/0/verbs", ["*"]),
    ("Role/phlora-schedule/rules/0/verbs", ["get", "create", "delete"]),
    ("Role/phlora-schedule/rules/0/resources", ["rayjobs", "secrets"]),
    ("Role/phlora-schedule/kind", "ClusterRole"),
    ("RoleBinding/phlora-schedule/roleRef/name", "cluster-admin"),
    ("RoleBinding/phlora-schedule/subjects/0/name", "default"),
    ("ServiceAccount/phlora-night/automountServiceAccountToken", True),
    ("ServiceAccount/phlora-schedule/metadata/annotations", {"eks.amazonaws.com/role-arn": "arn:aws:iam::1:role/admin"}),
    ("ServiceAccount/phlora-gc/metadata/name", "phlora-collector"),
    # Who may talk to whom.
    ("NetworkPolicy/phlora-nothing/spec/policyTypes", ["Ingress"]),
    ("NetworkPolicy/phlora-nothing/spec/egress", [{}]),
    ("NetworkPolicy/phlora-ray/spec/ingress/0/from", GONE),
    ("NetworkPolicy/phlora-ray/spec/ingress/1/ports", GONE),
    ("NetworkPolicy/phlora-ray/spec/ingress/1/ports/0/protocol", "HTTP"),
    ("NetworkPolicy/phlora-ray/spec/podSelector", {"matchLabels": {"app": "ray"}}),
    ("NetworkPolicy/phlora-ray/spec/podSelector/matchExpressions/0/operator", "NotIn"),
    ("NetworkPolicy/phlora-ray/spec/ingress/0/from/0/podSelector/matchExpressions/0/operator", "NotIn"),
    ("NetworkPolicy/phlora-ray/spec/egress/1/to/0/ipBlock/except", []),
    ("NetworkPolicy/phlora-ray/spec/policyTypes", ["Ingres", "Egress"]),
    ("NetworkPolicy/phlora-submit/spec/podSelector/matchLabels", {"app.kubernetes.io/component": "submitter"}),
    ("NetworkPolicy/phlora-outside/spec/policyTypes", ["Ingress"]),
    # The head stays where it is.
    ("PodDisruptionBudget/phlora-head/spec/selector/matchLabels", {"app.kubernetes.io/component": "ray-head"}),
    ("PodDisruptionBudget/phlora-head/spec/minAvailable", GONE),
    ("PodDisruptionBudget/phlora-head/spec/minAvailable", "50%"),
    (f"{_HEAD}/metadata/annotations", {}),
    # The zoo.
    ("ConfigMap/phlora-zoo/data", {"zoo.yml": "output: s3://o"}),
    ("ConfigMap/phlora-zoo/data/zoo.yaml", "output: s3://o\nrun: {engine: ray, workerss: 4}\n"),
    ("ConfigMap/phlora-zoo/data/zoo.yaml", "output: s3://o\nrun: {engine: local, device: cpu, workers: 4}\n"),
    ("ConfigMap/phlora-zoo/data/zoo.yaml", "output: s3://o\nrun: {engine: ray, device: cpu}\n"),
    ("ConfigMap/phlora-environment/metadata/name", "environment"),
]  # fmt: skip

ON_A100: list[tuple[str, Any]] = [
    (f"{_WORKERS}/template/spec/nodeSelector/node.kubernetes.io~1instance-type", "g5.48xlarge"),
    (f"{_WORKERS}/template/spec/nodeSelector/node.kubernetes.io~1instance-type", "from instance.yaml"),
    (f"{_WORKERS}/template/spec/nodeSelector/karpenter.sh~1capacity-type", "Spot"),
    (f"{_WORKERS}/template/spec/tolerations/0/effect", "NoSchedul"),
    (f"{_WORKERS}/template/spec/tolerations", GONE),
    (f"{_WORKERS}/template/spec/containers/0/resources/limits/nvidia.com~1gpu", "4"),
    (f"{_WORKERS}/template/spec/containers/0/resources/requests/cpu", "32"),
    (f"{_HEAD}/spec/nodeSelector", GONE),
    ("ServiceAccount/phlora-night/metadata/annotations", GONE),
    ("ServiceAccount/phlora-gc/metadata/annotations/eks.amazonaws.com~1role-arn", "arn:aws:iam::123456789012:role/phlora-night"),
]  # fmt: skip


WHERE_OBSERVED: list[tuple[str, Any]] = [
    ("PodMonitor/phlora/spec/selector/matchExpressions/0/values", ["head", "workers"]),
    ("PodMonitor/phlora/spec/selector/matchExpressions/0/operator", "NotIn"),
    ("PodMonitor/phlora/spec/podMetricsEndpoints/0/port", "dashboard"),
    ("PodMonitor/phlora/spec/podMetricsEndpoints/0/port", 8080),
    ("PodMonitor/phlora/spec/podMetricsEndpoints", []),
    ("PodMonitor/phlora/metadata/namespace", "monitoring"),
    ("PodMonitor/phlora/kind", "ServiceMonitor"),
    ("PrometheusRule/phlora/spec/groups/0/rules/0/expr", GONE),
    ("PrometheusRule/phlora/spec/groups/0/rules/0/labels/severity", 1),
    ("PrometheusRule/phlora/apiVersion", "monitoring.coreos.com/v1alpha1"),
]


def cases() -> Iterator[Any]:
    for overlay in OVERLAYS:
        for path, value in MUTATIONS + (ON_A100 if "a100" in overlay else []):
            yield _case(overlay, path, value)
    for path, value in WHERE_OBSERVED:
        yield _case(OBSERVED, path, value)


def _case(overlay: str, path: str, value: Any) -> Any:
    return pytest.param(overlay, path, value, id=f"{overlay}-{path}-{'gone' if value is GONE else value}"[:150])


@pytest.mark.parametrize(("overlay", "path", "value"), list(cases()))
def test_it_is_caught(overlay: str, path: str, value: Any) -> None:
    before = rendered(overlay)
    after = mutated(before, path, value)
    assert after != before
    assert fault(after)


@pytest.mark.parametrize("overlay", [OBSERVED, "aws-a100-spot"])  # every field is in one of them
def test_a_key_that_is_misspelt_is_caught_wherever_it_stands(overlay: str) -> None:
    """But for labels and the like, of which the rules ask for those that matter."""
    documents, missed = rendered(overlay), []
    for path, value in list(walk(documents)):
        if isinstance(value, dict) and not set(path) & FREE:
            for key in value:
                one = renamed(documents, path[1:], key)
                if not fault(one):
                    missed.append("/".join(map(str, [*path, key])))
    assert not missed


FREE = {"labels", "annotations", "matchLabels", "data", "nodeSelector", "requests", "limits", "rayStartParams"}


def fault(documents: list[Document]) -> str:
    """The first that is wrong, by schema or by rule; a rule that cannot even find its way has found something, too."""
    try:
        return next(itertools.chain(schemas.faults(documents), rules.faults(documents)), "")
    except (LookupError, ValueError, TypeError, AttributeError) as error:
        return repr(error)


def mutated(documents: list[Document], path: str, value: Any) -> list[Document]:
    """A copy with one value set, added or taken out; the path begins with the document's kind and name."""
    made = copy.deepcopy(documents)
    kind, name, *keys = (part.replace("~1", "/") for part in path.split("/"))
    [place] = [item for item in made if (item["kind"], item["metadata"]["name"]) == (kind, name)]
    *above, last = (int(key) if key.isdigit() else key for key in keys)
    for key in above:
        place = place[key]
    if value is GONE:
        del place[last]
    else:
        place[last] = value
    return made


def renamed(documents: list[Document], path: tuple[Any, ...], key: str) -> list[Document]:
    """A copy in which a key is written wrongly."""
    made = copy.deepcopy(documents)
    place: Any = made
    for part in path:
        place = place[part]
    place[f"{key}s"] = place.pop(key)
    return made
