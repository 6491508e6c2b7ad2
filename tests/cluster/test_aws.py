"""What AWS is given: roles that may as little as the code needs, rules of the bucket, and the file for `ray up`."""

from __future__ import annotations

import copy
import importlib.util
import json
import re
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import botocore.session
import jsonschema
import pytest
import yaml
from botocore.validate import ParamValidator

from phlora_pipeline import zoofile
from phlora_pipeline.doctor.places import PROBES
from phlora_pipeline.zoo import layout
from tests.cluster.manifests import CLUSTER, ROOT, named, rendered

AWS = CLUSTER / "aws"
ADAPTERS, MODELS = "arn:aws:s3:::phlora-adapters", "arn:aws:s3:::phlora-models"
MADE, SEEN, PIECE = {"s3:if-none-match": "*"}, {"s3:if-match": "etag"}, {"s3:ObjectCreationOperation": "false"}
"""What a request tells: it creates, it swaps, it is a piece of an upload."""


def document(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((AWS / name).read_text())
    return found


def allows(policies: list[dict[str, Any]], action: str, resource: str, told: dict[str, str] | None = None) -> bool:
    """IAM's answer, for the few operators that are used: a Deny that matches wins, an Allow must match."""
    keys = {"s3:ObjectCreationOperation": "true", "aws:SecureTransport": "true", **(told or {})}
    effects = {
        statement["Effect"]
        for policy in policies
        for statement in policy["Statement"]
        if _any(statement["Action"], action) and _any(statement["Resource"], resource) and _holds(statement.get("Condition", {}), keys)
    }  # fmt: skip
    return effects == {"Allow"}


def _any(patterns: str | list[str], text: str) -> bool:
    return any(fnmatchcase(text, pattern) for pattern in ([patterns] if isinstance(patterns, str) else patterns))


def _holds(condition: dict[str, dict[str, str]], keys: dict[str, str]) -> bool:
    for operator, wanted in condition.items():
        for key, value in wanted.items():
            found = str(key not in keys).lower() if operator == "Null" else keys.get(key)
            assert operator in {"Null", "Bool"}, operator
            if found != value:
                return False
    return True


NIGHT, GC, BUCKET = "night-policy.json", "gc-policy.json", "bucket-policy.json"
PUT, DELETE, GET, ABORT = "s3:PutObject", "s3:DeleteObject", "s3:GetObject", "s3:AbortMultipartUpload"
WEIGHTS = f"{ADAPTERS}/zoo/support-bot/0f0f/{layout.WEIGHTS}"
PART = f"{ADAPTERS}/zoo/{layout.PARTS}/support-bot/0f0f/b.safetensors"
OUTCOME = f"{ADAPTERS}/zoo/{layout.STATE}/support-bot/0f0f/outcome.json"
PROBE = f"{ADAPTERS}/zoo/{layout.PARTS}/{PROBES}/0f0f"
POINTER = f"{ADAPTERS}/zoo/support-bot/{layout.LATEST}"


@pytest.mark.parametrize(
    ("role", "action", "resource", "told", "expected"),
    [
        (NIGHT, "s3:ListBucket", MODELS, {}, True),
        (NIGHT, "s3:ListBucket", ADAPTERS, {}, True),
        (NIGHT, GET, f"{MODELS}/finetunes/a/model.safetensors", {}, True),
        (NIGHT, GET, POINTER, {}, True),
        (NIGHT, PUT, WEIGHTS, MADE, True),
        (NIGHT, PUT, WEIGHTS, PIECE, True),
        (NIGHT, PUT, WEIGHTS, {}, False),
        (NIGHT, PUT, WEIGHTS, SEEN, False),
        (NIGHT, PUT, POINTER, MADE, True),
        (NIGHT, PUT, POINTER, SEEN, True),
        (NIGHT, PUT, POINTER, {}, False),
        (NIGHT, PUT, OUTCOME, SEEN, True),
        (NIGHT, PUT, f"{MODELS}/finetunes/a/model.safetensors", MADE, False),
        (NIGHT, PUT, f"{ADAPTERS}/elsewhere/x", MADE, False),
        (NIGHT, PUT, f"{PROBE}/once", MADE, True),
        (NIGHT, PUT, f"{PROBE}/{layout.LATEST}", SEEN, True),  # the doctor's, as the night's role
        (NIGHT, DELETE, f"{PROBE}/{layout.LATEST}", {}, True),
        (NIGHT, DELETE, PART, {}, True),
        (NIGHT, DELETE, WEIGHTS, {}, False),
        (NIGHT, DELETE, OUTCOME, {}, False),
        (NIGHT, DELETE, f"{MODELS}/finetunes/a/model.safetensors", {}, False),
        (NIGHT, ABORT, WEIGHTS, {}, True),
        (NIGHT, GET, WEIGHTS, {"aws:SecureTransport": "false"}, False),
        (GC, "s3:ListBucket", ADAPTERS, {}, True),
        (GC, "s3:ListBucketMultipartUploads", ADAPTERS, {}, True),
        (GC, "s3:ListMultipartUploadParts", WEIGHTS, {}, True),
        (GC, GET, POINTER, {}, True),
        (GC, DELETE, WEIGHTS, {}, True),
        (GC, ABORT, WEIGHTS, {}, True),
        (GC, PUT, WEIGHTS, MADE, False),
        (GC, PUT, POINTER, SEEN, False),
        (GC, GET, f"{MODELS}/finetunes/a/model.safetensors", {}, False),
        (GC, DELETE, f"{MODELS}/finetunes/a/model.safetensors", {}, False),
        (GC, DELETE, f"{ADAPTERS}/elsewhere/x", {}, False),
    ],
)
def test_a_role_may_what_its_job_needs_and_no_more(
    role: str, action: str, resource: str, told: dict[str, str], expected: bool
) -> None:
    assert allows([document(role), document(BUCKET)], action, resource, told) is expected


def test_nobody_overwrites_blindly_not_even_who_may_do_everything() -> None:
    administrator = {"Statement": [{"Effect": "Allow", "Action": "s3:*", "Resource": "*"}]}
    assert allows([administrator], PUT, WEIGHTS)
    assert not allows([administrator, document(BUCKET)], PUT, WEIGHTS)
    for told in (MADE, SEEN, PIECE):
        assert allows([administrator, document(BUCKET)], PUT, WEIGHTS, told)


@pytest.mark.parametrize("path", sorted(AWS.glob("*-policy.json")), ids=lambda path: path.name)
def test_policies_name_what_they_are_about(path: Path) -> None:
    for statement in document(path.name)["Statement"]:
        assert set(statement) <= {"Sid", "Effect", "Principal", "Action", "Resource", "Condition"}
        assert re.fullmatch(r"[A-Za-z0-9]+", statement["Sid"])
        if statement["Effect"] == "Allow":
            assert "*" not in str(statement["Action"])
            assert "Principal" not in statement
            assert "arn:aws:s3:::*" not in str(statement["Resource"])


@pytest.mark.parametrize("who", ["night", "gc"])
def test_a_role_is_for_the_pods_of_one_account(who: str) -> None:
    [statement] = document(f"{who}-trust.json")["Statement"]
    [account] = [
        item
        for item in rendered("aws-a100")
        if item["kind"] == "ServiceAccount" and item["metadata"]["name"] == f"phlora-{who}"
    ]
    told = {key.rpartition(":")[2]: value for key, value in statement["Condition"]["StringEquals"].items()}
    assert told == {
        "sub": f"system:serviceaccount:{account['metadata']['namespace']}:phlora-{who}",
        "aud": "sts.amazonaws.com",
    }
    assert statement["Action"] == "sts:AssumeRoleWithWebIdentity"


def test_lifecycle_ends_what_was_given_up_and_nothing_that_is_served() -> None:
    rules = document("lifecycle.json")
    shape = (
        botocore.session.get_session()
        .get_service_model("s3")
        .operation_model("PutBucketLifecycleConfiguration")
        .input_shape
    )
    assert not ParamValidator().validate({"Bucket": "b", "LifecycleConfiguration": rules}, shape).has_errors()
    uploads, parts = rules["Rules"]
    output = zoofile.loads(named(rendered("aws-a100"), "ConfigMap", "phlora-zoo")["data"]["zoo.yaml"]).output
    prefix = output.removeprefix("s3://phlora-adapters/")
    assert (uploads["Filter"]["Prefix"], "Expiration" in uploads) == (f"{prefix}/", False)
    assert parts["Filter"]["Prefix"] == f"{prefix}/{layout.PARTS}/"
    assert parts["Expiration"]["Days"] > 2  # gc's own patience, by which a night has long gone on from them


_UV = "".join(re.findall(r"^UV +:= (\S+)", (ROOT / "Makefile").read_text(), re.MULTILINE))
_NODE = "available_node_types/{}/node_config"
RAY_UP: dict[str, str] = {
    "cluster_name": r"phlora",
    "max_workers": r"4",
    "upscaling_speed": r"\d+",
    "idle_timeout_minutes": r"5",
    "provider/type": r"aws",
    "provider/region": r"[a-z]+-[a-z]+-\d",
    "provider/availability_zone": r"(,?[a-z]+-[a-z]+-\d[a-f])+",
    "provider/cache_stopped_nodes": r"False",  # a stopped node keeps its disk
    "provider/use_internal_ips": r"True",  # whoever reaches Ray can run code on it
    "auth/ssh_user": r"ubuntu",
    "head_node_type": r"head",
    "available_node_types/head/resources": r"{'CPU': 0, 'GPU': 0}",
    "available_node_types/head/max_workers": r"0",
    "available_node_types/a100/resources": r"{'CPU': 96, 'GPU': 8}",
    "available_node_types/a100/min_workers": r"0",
    "available_node_types/a100/max_workers": r"4",
    f"{_NODE.format('a100')}/InstanceType": r"p4de?\.24xlarge",
    f"{_NODE.format('a100')}/MetadataOptions/HttpTokens": r"required",  # or a forged request gets the role
    f"{_NODE.format('a100')}/IamInstanceProfile/Arn": r"arn:aws:iam::\d{12}:instance-profile/phlora-night",
    f"{_NODE.format('head')}/MetadataOptions/HttpTokens": r"required",
    f"{_NODE.format('head')}/IamInstanceProfile/Arn": r"arn:aws:iam::\d{12}:instance-profile/phlora-head",
    "file_mounts": r".*'~/phlora-pipeline': '\.'.*",
    "rsync_filter": r"\['\.gitignore'\]",
    "setup_commands": rf".*uv=={re.escape(_UV)}'.*constraints\.txt torch .*",
    "head_start_ray_commands": r".*RAY_AUTH_MODE=token RAY_JOB_STOP_WAIT_TIME_S=40 ray start .*--dashboard-host=127\.0\.0\.1.*",
    "worker_start_ray_commands": r".*RAY_AUTH_MODE=token ray start .*",
}
"""Path → how its value must look; Ray's schema leaves these open."""


class TestRayUp:
    """`ray-aws.yaml`."""

    config = yaml.safe_load((CLUSTER / "ray-aws.yaml").read_text())

    def test_ray_takes_it(self) -> None:
        assert list(ray_up_faults(self.config)) == []

    @pytest.mark.parametrize(
        "place", ["", "provider", "auth", "available_node_types/a100/node_config/IamInstanceProfile"]
    )
    def test_a_key_that_is_misspelt_is_caught(self, place: str) -> None:
        keys = list(at(self.config, place))
        for key in keys:
            one = copy.deepcopy(self.config)
            at(one, place)[f"{key}s"] = at(one, place).pop(key)
            assert list(ray_up_faults(one)), key
        assert keys

    @pytest.mark.parametrize(
        ("place", "value"),
        [
            ("max_workers", -1),
            ("max_workers", "four"),
            ("idle_timeout_minutes", "5m"),
            ("available_node_types/head/resources", {"CPU": 2}),
            ("available_node_types/head/max_workers", 1),
            ("available_node_types/a100/min_workers", 1),
            ("available_node_types/a100/max_workers", 8),
            ("available_node_types/a100/node_config/InstanceType", "p4.24xlarge"),
            ("available_node_types/a100/node_config/MetadataOptions", {"HttpTokens": "optional"}),
            ("available_node_types/a100/node_config/IamInstanceProfile", {"Arn": "arn:aws:iam::1:instance-profile/admin"}),
            ("head_node_type", "a100"),
            ("provider/use_internal_ips", False),
            ("provider/cache_stopped_nodes", True),
            ("head_start_ray_commands", ["ray start --head --dashboard-host=0.0.0.0"]),
            ("worker_start_ray_commands", ["ray start --address=$RAY_HEAD_IP:6379"]),
            ("setup_commands", ["pip install phlora-pipeline"]),
        ],
    )  # fmt: skip
    def test_what_is_wrong_is_caught(self, place: str, value: Any) -> None:
        one = copy.deepcopy(self.config)
        above, _, key = place.rpartition("/")
        at(one, above)[key] = value
        assert one != self.config
        assert list(ray_up_faults(one))


def ray_up_faults(config: dict[str, Any]) -> Iterator[str]:
    package = Path(str(importlib.util.find_spec("ray").origin)).parent  # type: ignore[union-attr]
    schema = json.loads((package / "autoscaler" / "ray-schema.json").read_text())
    yield from (error.message for error in jsonschema.Draft7Validator(schema).iter_errors(config))
    for place, wanted in RAY_UP.items():
        if not re.fullmatch(wanted, str(at(config, place))):
            yield f"{place} is {at(config, place)}"


def at(config: Any, place: str) -> Any:
    for key in filter(None, place.split("/")):
        config = config.get(key, {})
    return config
