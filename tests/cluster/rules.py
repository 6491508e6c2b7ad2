"""What no schema sees: names that must exist, words out of a few, numbers that must fit each other. Pure, on documents."""

from __future__ import annotations

import re
import zoneinfo
from collections.abc import Iterator

from phlora_pipeline import zoofile
from phlora_pipeline.errors import RequestError
from tests.cluster import containers, network
from tests.cluster.manifests import ROOT, Document, named, pods, selects, walk

LONGEST_RAYJOB = 47
AFTER_THE_NAME = "-29384640-3"
"""What a CronJob's Job, and then its RayJob, have behind the CronJob's name."""

WORDS = {
    "action": {"Ignore", "FailJob", "Count", "FailIndex"},
    "concurrencyPolicy": {"Forbid"},
    "effect": {"NoSchedule", "PreferNoSchedule", "NoExecute"},
    "operator": {"In", "NotIn", "Exists", "DoesNotExist", "Equal"},
    "protocol": {"TCP", "UDP"},
    "restartPolicy": {"Never"},
    "whenUnsatisfiable": {"ScheduleAnyway"},
}
"""Field → values that are wanted here. Schemas take any text."""

_FIELDS = ((0, 59), (0, 23), (1, 31), (1, 12), (0, 7))


def faults(documents: list[Document]) -> Iterator[str]:
    """All that is wrong with an overlay."""
    for check in (
        zoo, words, namespaces, schedules, exit_codes, rayjob, cluster, stopping, workers, ray_version, roles, disruption,
        containers.restricted, containers.resources, containers.mounts, containers.references, containers.images,
        containers.accounts, network.network, network.scraped,
    ):  # fmt: skip
        for fault in check(documents):
            yield f"{check.__name__}: {fault}"


def words(documents: list[Document]) -> Iterator[str]:
    for path, value in walk(documents):
        if path[-1] in WORDS and value not in WORDS[path[-1]]:
            yield f"{'/'.join(map(str, path))}: {value!r}"
        if path[-1] == "policyTypes" and not set(value) <= {"Ingress", "Egress"}:
            yield f"policyTypes {value}"


def namespaces(documents: list[Document]) -> Iterator[str]:
    space = named(documents, "Namespace")
    if space["metadata"].get("labels", {}).get("pod-security.kubernetes.io/enforce") != "restricted":
        yield "pods that may do anything are let in"
    for item in documents:
        if item["kind"] != "Namespace" and item["metadata"].get("namespace") != space["metadata"]["name"]:
            yield f"{item['kind']} {item['metadata']['name']} is in another namespace"


def schedules(documents: list[Document]) -> Iterator[str]:
    for item in documents:
        if item["kind"] == "CronJob":
            yield from (f"{item['metadata']['name']}: {fault}" for fault in _schedule(item))


def _schedule(item: Document) -> Iterator[str]:
    spec = item["spec"]
    if not is_schedule(spec["schedule"]):
        yield f"{spec['schedule']!r} is no schedule"
    if spec.get("timeZone") not in zoneinfo.available_timezones():
        yield f"there is no time zone {spec.get('timeZone')!r}"
    if spec.get("suspend") or "concurrencyPolicy" not in spec:
        yield "it never runs, or twice at once"
    # Below a deadline of 10 s Kubernetes may never start it.
    for field, least in {
        "startingDeadlineSeconds": 10,
        "successfulJobsHistoryLimit": 1,
        "failedJobsHistoryLimit": 1,
    }.items():
        if spec.get(field, 0) < least:
            yield f"{field} is {spec.get(field)}, expected {least} or more"
    if spec["jobTemplate"]["spec"].get("activeDeadlineSeconds", 1 << 30) >= 86400:
        yield "it may go on into its next turn"
    if len(item["metadata"]["name"] + AFTER_THE_NAME) > LONGEST_RAYJOB:
        yield "too long for the RayJobs that are called after it"


def exit_codes(documents: list[Document]) -> Iterator[str]:
    """Of jobs/kuberay.py: what it answers for is final; everything else is its own failure, and tried again."""
    from jobs.kuberay import AGAIN

    final = {2, 3, 11, 12, 13, 14, 124, 137}
    spec = named(documents, "CronJob", "phlora-nightly")["spec"]["jobTemplate"]["spec"]
    rules = spec.get("podFailurePolicy", {}).get("rules", [])
    told = [
        rule for rule in rules if rule["action"] == "FailJob" and rule.get("onExitCodes", {}).get("operator") == "In"
    ]
    if not final >= AGAIN or {code for rule in told for code in rule["onExitCodes"]["values"]} != final:
        yield f"expected the Job to end at {sorted(final)}"
    disrupted = {"type": "DisruptionTarget", "status": "True"}
    if not any(rule["action"] == "Ignore" and disrupted in rule.get("onPodConditions", []) for rule in rules):
        yield "a drained node counts as a failure"
    if spec.get("backoffLimit", 0) < 1:
        yield "a pod that is lost is not started again"


def rayjob(documents: list[Document]) -> Iterator[str]:
    item = named(documents, "RayJob")
    spec = item["spec"]
    if spec.get("suspend") is not True:
        yield "the pattern itself would run"
    if spec.get("shutdownAfterJobFinishes") is not True or not 0 < spec.get("ttlSecondsAfterFinished", 0) <= 3600:
        yield "its cluster stays, and costs"
    if not 0 < spec.get("preRunningDeadlineSeconds", 0) < spec.get("activeDeadlineSeconds", 0):
        yield "expected 0 < preRunningDeadlineSeconds < activeDeadlineSeconds"
    if spec.get("backoffLimit") != 0:
        yield "KubeRay would repeat a night because of a failed model"
    if spec.get("submissionMode") != "K8sJobMode":
        yield "nobody shows its log"
    nightly = named(documents, "CronJob", "phlora-nightly")["spec"]["jobTemplate"]["spec"]
    if nightly["template"]["spec"]["containers"][0].get("command") != [
        "python",
        "jobs/kuberay.py",
        item["metadata"]["name"],
    ]:
        yield "the CronJob does not ask for it"
    if nightly["activeDeadlineSeconds"] < 3 * spec.get("activeDeadlineSeconds", 0):
        yield "the CronJob's pod ends before the night"


def cluster(documents: list[Document]) -> Iterator[str]:
    spec = named(documents, "RayJob")["spec"]["rayClusterSpec"]
    if spec.get("authOptions", {}).get("mode") != "token":
        yield "whoever reaches Ray can run code on it"
    if spec.get("enableInTreeAutoscaling") is not True or spec.get("autoscalerOptions", {}).get("version") != "v2":
        yield "no worker would come, or go"
    head = spec["headGroupSpec"]["rayStartParams"]
    if (head.get("num-cpus"), head.get("num-gpus")) != ("0", "0"):
        yield "the head works"
    for group in spec["workerGroupSpecs"]:
        if group.get("replicas") != 0 or group["minReplicas"] != 0:
            yield f"{group['groupName']}: a night with nothing due starts nodes"
    sizes = [
        part["rayStartParams"].get("object-store-memory") for part in (spec["headGroupSpec"], *spec["workerGroupSpecs"])
    ]
    if not all(size and size.isdigit() and int(size) <= 1 << 30 for size in sizes):
        yield "memory is set apart for tensors, which do not pass through Ray"


def stopping(documents: list[Document]) -> Iterator[str]:
    """SIGTERM must come to the night, and it must have its time."""
    spec = named(documents, "RayJob")["spec"]
    if not spec["entrypoint"].startswith("exec phlora run "):
        yield "a shell takes the signal"
    head = spec["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]
    hook = head["containers"][0].get("lifecycle", {}).get("preStop", {}).get("exec", {}).get("command", [""])
    if not hook[-1].startswith(f"ray job stop {spec.get('jobId')};"):
        yield f"nobody stops {spec.get('jobId')}: {hook}"
    waits = [
        int(item["value"])
        for item in head["containers"][0].get("env", [])
        if item["name"] == "RAY_JOB_STOP_WAIT_TIME_S"
    ]
    if waits != [40] or head.get("terminationGracePeriodSeconds", 30) < waits[0] + 60:
        yield f"the head is killed before the night has ended: {waits} s, {head.get('terminationGracePeriodSeconds')} s"
    for group in spec["rayClusterSpec"]["workerGroupSpecs"]:
        pod = group["template"]["spec"]
        if not 30 <= pod.get("terminationGracePeriodSeconds", 30) <= 120:
            yield f"{group['groupName']}: a spot node does not wait so long"
        if pod["containers"][0].get("lifecycle", {}).get("preStop", {}).get("exec", {}).get("command") != [
            "ray",
            "stop",
        ]:
            yield f"{group['groupName']}: Ray is not told that the node goes"


def workers(documents: list[Document]) -> Iterator[str]:
    """As many as zoo.yaml asks for must find a place."""
    run = _zoo(documents).run
    [group] = named(documents, "RayJob")["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    pod = group["template"]["spec"]
    asked = pod["containers"][0]["resources"]
    gpus = int(asked.get("limits", {}).get("nvidia.com/gpu", 0))
    if (run.engine, run.device) != ("ray", "cuda" if gpus else "cpu"):
        yield f"zoo.yaml asks for {run.engine} on {run.device}, the pods have {gpus} GPUs"
    if run.workers != group["maxReplicas"] * (gpus or 1):
        yield f"zoo.yaml asks for {run.workers} workers, at most {group['maxReplicas']} pods of {gpus or 1} will come"
    if gpus != int(asked.get("requests", {}).get("nvidia.com/gpu", 0)):
        yield "requested and limited GPUs differ"
    processors = int(asked["requests"]["cpu"])
    if run.threads * (gpus or 1) > processors:
        yield f"{run.threads} threads for each of {gpus or 1} workers, but {processors} processors"
    if gpus:
        if not re.fullmatch(
            r"p4de?\.24xlarge", pod.get("nodeSelector", {}).get("node.kubernetes.io/instance-type", "")
        ):
            yield "no instance of eight A100"
        if pod["nodeSelector"].get("karpenter.sh/capacity-type") not in {"spot", "on-demand"}:
            yield "neither on demand nor spot"
        if {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"} not in pod.get("tolerations", []):
            yield "GPU nodes keep them out"
        head = named(documents, "RayJob")["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]
        if head.get("nodeSelector", {}).get("karpenter.sh/capacity-type") != "on-demand":
            yield "the head may be taken away"


def ray_version(documents: list[Document]) -> Iterator[str]:
    locked = re.search(r"^ray==(.+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    asked = named(documents, "RayJob")["spec"]["rayClusterSpec"]["rayVersion"]
    if locked is None or asked != locked[1]:
        yield f"the manifest says {asked}, the image has {locked and locked[1]}"


def roles(documents: list[Document]) -> Iterator[str]:
    role, binding = named(documents, "Role"), named(documents, "RoleBinding")
    if role["rules"] != [{"apiGroups": ["ray.io"], "resources": ["rayjobs"], "verbs": ["get", "create"]}]:
        yield f"{role['rules']}"
    if binding["roleRef"] != {
        "apiGroup": "rbac.authorization.k8s.io",
        "kind": "Role",
        "name": role["metadata"]["name"],
    }:
        yield f"{binding['roleRef']}"
    space = named(documents, "Namespace")["metadata"]["name"]
    if binding["subjects"] != [{"kind": "ServiceAccount", "name": "phlora-schedule", "namespace": space}]:
        yield f"{binding['subjects']}"
    for item in documents:
        if item["kind"] in {"ClusterRole", "ClusterRoleBinding"}:
            yield f"{item['kind']} {item['metadata']['name']}"


def disruption(documents: list[Document]) -> Iterator[str]:
    spec = named(documents, "PodDisruptionBudget")["spec"]
    held = {part for part, template in pods(documents) if selects(spec["selector"], template)}
    if held != {"head"} or spec.get("minAvailable") != 1:
        yield f"holds {held}: {spec}"
    head = dict(pods(documents))["head"]["metadata"]
    if head.get("annotations", {}).get("karpenter.sh/do-not-disrupt") != "true":
        yield "Karpenter may move the head to a cheaper node"


def zoo(documents: list[Document]) -> Iterator[str]:
    try:
        _zoo(documents)
    except RequestError as error:
        yield str(error)


def is_schedule(text: str) -> bool:
    """Five fields of numbers, ranges, steps and lists, within their bounds.

    >>> [is_schedule(text) for text in ("0 1 * * *", "*/15 0-6 1,15 * 1-5", "0 25 * * *", "0 1 * *", "@daily", "5-1 * * * *")]
    [True, True, False, False, False, False]
    """
    fields = text.split(" ")
    return len(fields) == len(_FIELDS) and all(
        _is_field(field, *bounds) for field, bounds in zip(fields, _FIELDS, strict=True)
    )


def _is_field(text: str, low: int, high: int) -> bool:
    for item in text.split(","):
        match = re.fullmatch(r"(\*|(\d+)(?:-(\d+))?)(?:/([1-9]\d*))?", item)
        if match is None:
            return False
        first, last = int(match[2] or low), int(match[3] or match[2] or high)
        if not low <= first <= last <= high:
            return False
    return True


def _zoo(documents: list[Document]) -> zoofile.ZooConfig:
    return zoofile.loads(named(documents, "ConfigMap", "phlora-zoo")["data"]["zoo.yaml"])
