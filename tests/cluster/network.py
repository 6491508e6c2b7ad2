"""Who may talk to whom, pod by pod: all of it, and nothing else."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from tests.cluster.manifests import Document, pods, selects

_OUTSIDE = "to 0.0.0.0/0 but 169.254.0.0/16"
_NAMES = {"to kube-system UDP 53", "to kube-system TCP 53"}
_RAY = {
    "from head|worker all", "to head|worker all", "from submit TCP 8265", "from kuberay-system TCP 8265",
    "from monitoring TCP 8080",
}  # fmt: skip
_TLS = {f"{_OUTSIDE} TCP 443", f"{_OUTSIDE} TCP 6443"}
NETWORK = {
    "head": _NAMES | _RAY | _TLS,
    "workers": _NAMES | _RAY | _TLS,
    "submit": _NAMES | {"to head TCP 8265"},
    "phlora-nightly": _NAMES | _TLS,
    "phlora-gc": _NAMES | _TLS,
}
"""All that each pod may say and hear."""


def network(documents: list[Document]) -> Iterator[str]:
    policies = [item for item in documents if item["kind"] == "NetworkPolicy"]
    both = ["Ingress", "Egress"]
    if not any(item["spec"] == {"podSelector": {}, "policyTypes": both} for item in policies):
        yield "what is not named is allowed"
    for item in policies:
        name, spec = item["metadata"]["name"], item["spec"]
        if spec["podSelector"] and not any(selects(spec["podSelector"], template) for _, template in pods(documents)):
            yield f"{name} is about no pod"
        for direction in ("ingress", "egress"):
            if direction in spec and direction.capitalize() not in spec.get("policyTypes", []):
                yield f"{name}: {direction} without its policyType"
    for part, template in pods(documents):
        reached = {
            rule for item in policies if selects(item["spec"]["podSelector"], template) for rule in _shown(item["spec"])
        }
        if reached != NETWORK[part]:
            yield f"{part}: {sorted(reached ^ NETWORK[part])}"


def scraped(documents: list[Document]) -> Iterator[str]:
    """Where there is a PodMonitor, it means Ray's nodes, by a port that they have and that is let in."""
    for item in documents:
        if item["kind"] == "PodMonitor":
            meant = {part: pod for part, pod in pods(documents) if selects(item["spec"]["selector"], pod)}
            if set(meant) != {"head", "workers"}:
                yield f"scrapes {sorted(meant)}"
            for part, pod in meant.items():
                ports = {port["name"]: port["containerPort"] for port in pod["spec"]["containers"][0]["ports"]}
                for endpoint in item["spec"]["podMetricsEndpoints"]:
                    if f"from monitoring TCP {ports.get(endpoint['port'])}" not in NETWORK[part]:
                        yield f"{part}: {endpoint['port']} is not let in"


def _shown(spec: Document) -> Iterator[str]:
    for direction, others in (("ingress", "from"), ("egress", "to")):
        for rule in spec.get(direction, ()):
            ports = [f"{port.get('protocol')} {port.get('port')}" for port in rule.get("ports", ())] or ["all"]
            peers = [_peer(peer) for peer in rule.get(others, ())] or ["anybody"]
            yield from (f"{others} {peer} {port}" for peer in peers for port in ports)


def _peer(peer: Document) -> str:
    if block := peer.get("ipBlock"):
        return f"{block['cidr']} but {','.join(block.get('except', ['nothing']))}"
    labels: Sequence[str] = [
        *(value for part in peer.values() for value in part.get("matchLabels", {}).values()),
        *(
            "|".join(item["values"])
            for part in peer.values()
            for item in part.get("matchExpressions", ())
            if item["operator"] == "In"
        ),
    ]
    return "+".join(labels) or "anybody"
