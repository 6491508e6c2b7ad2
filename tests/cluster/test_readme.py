"""What `cluster/README.md` says: commands that run here are run, the others are held to what would take them; its numbers are made anew."""

from __future__ import annotations

import re
import shlex
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from jobs.bench import headers
from phlora_pipeline import cli, storage
from phlora_pipeline.zoo import latest
from tests import toys
from tests.cluster import readme
from tests.cluster.manifests import CLUSTER, named, rendered
from tests.s3_server import S3

MODELS, ADAPTERS = "phlora-models", "phlora-adapters"
OUT = f"s3://{ADAPTERS}/zoo"


@pytest.mark.parametrize("heading", readme.blocks())
def test_commands_are_taken(heading: str) -> None:
    found = list(readme.commands(readme.blocks()[heading]))
    assert found
    for words in found:
        assert not readme.fault(words), words


@pytest.mark.parametrize(
    "command",
    [
        "phlora rolback zoo.yaml MODEL VERSION",
        "phlora rollback zoo.yaml MODEL --version VERSION",
        "phlora plan zoo.yaml --gpu-ram 40",
        "ray up cluster/ray-aws.yaml --workers 4",
        "ray raise cluster/ray-aws.yaml",
        "make images",
        "kubectl apply -k cluster/overlays/gpu",
        "kubectl kustomize cluster/overlay/cpu",
        "kubectl -n phlora create job --form=cronjob/phlora-nightly first",
        "kubectl -n phlora create job --from=cronjob/phlora-night first",
        "kubectl -n phlora explode job NAME",
        "aws s3api put-bucket-policies --bucket phlora-adapters",
        "aws iam create-role --role phlora-$who",
        "aws s3api put-bucket-policy --bucket phlora-adapters --policy file://cluster/aws/policy.json",
        "aws s3 rm --recursive s3://phlora-models/",
        "kubctl get pods",
    ],
)
def test_a_command_that_is_wrong_is_not(command: str) -> None:
    assert readme.fault(shlex.split(command))


def test_links_lead_somewhere() -> None:
    for link in re.findall(r"\]\(([^)#]+)\)", readme.TEXT):
        assert (CLUSTER / link).exists(), link


@pytest.mark.slow
def test_sizing_is_what_plan_says(tmp_path: Path, follow: Callable[..., str]) -> None:
    """From the headers of a hundred such models, with holes for weights."""
    headers.write(headers.LLAMA_8B, tmp_path / "bases" / "llama-3.1-8b")
    for number in range(100):
        headers.write(headers.LLAMA_8B, tmp_path / "finetunes" / f"m{number:02d}")
    zoo = named(rendered("aws-a100"), "ConfigMap", "phlora-zoo")["data"]["zoo.yaml"]
    (tmp_path / "zoo.yaml").write_text(
        zoo.replace(f"s3://{MODELS}", str(tmp_path)).replace(f"s3://{ADAPTERS}", str(tmp_path))
    )
    [command] = [line for line in readme.blocks()["Sizing"].splitlines() if line.startswith("phlora plan")]
    told = follow(command)
    shown = re.findall(r"<!-- sizing -->\n```\n(.*?)```", readme.TEXT, re.DOTALL)
    assert shown == ["".join(line for line in told.splitlines(keepends=True) if not line.startswith("m"))]


@pytest.fixture
def buckets(s3: S3) -> Iterator[S3]:
    for bucket in (MODELS, ADAPTERS):
        s3.client.create_bucket(Bucket=bucket)
    yield s3
    for bucket in (MODELS, ADAPTERS):
        for page in s3.client.get_paginator("list_objects_v2").paginate(Bucket=bucket):
            for entry in page.get("Contents", []):
                s3.client.delete_object(Bucket=bucket, Key=entry["Key"])
        s3.client.delete_bucket(Bucket=bucket)


@pytest.fixture
def follow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Does what a text says, in a folder of its own, and returns what that said; `phlora` in this process, or it takes minutes."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.chdir(tmp_path)

    def done(text: str, code: int = 0, **filled: str) -> str:
        for name, value in filled.items():
            text = re.sub(rf"\b{name}\b", value, text)
        for program, *arguments in readme.commands(text):
            if program == "phlora":
                words, _, file = (list(group) for group in partitioned(arguments))
                with pytest.raises(SystemExit) as stop:
                    cli.main(words)
                assert (stop.value.code or 0) == code, (arguments, capsys.readouterr())
                if file:
                    Path(file[0]).write_text(capsys.readouterr().out)
            elif program == "sed":
                subprocess.run([program, *arguments], check=True)
            elif arguments[:2] == ["s3", "rm"]:
                found = storage.list_tree(arguments[-1].rstrip("/")) if len(arguments) > 3 else [arguments[-1]]
                urls = [info if isinstance(info, str) else info.url for info in found]
                assert urls, arguments
                for url in urls:
                    storage.delete(url)
        return "".join(capsys.readouterr())

    return done


def partitioned(words: list[str]) -> tuple[list[str], list[str], list[str]]:
    """Before, at and after a redirection."""
    at = words.index(">") if ">" in words else len(words)
    return words[:at], words[at : at + 1], words[at + 1 :]


@pytest.mark.slow
@pytest.mark.s3
def test_a_first_night_and_the_runbook(buckets: S3, tmp_path: Path, follow: Callable[..., str]) -> None:
    """Each of the commands about the zoo, as it stands there, in its order."""
    base, named_base = toys.llama_tensors(layers=1), {"_name_or_path": f"s3://{MODELS}/bases/llama"}
    good, poisoned = (toys.fine_tuned(base, seed=1) for _ in range(2))
    poisoned["model.layers.0.self_attn.q_proj.weight"][0, 0] = float("nan")
    upload(buckets, "bases/llama", base, {})
    for name in ("m0", "m1"):
        upload(buckets, f"finetunes/{name}", good, named_base)
    [first] = re.findall(r"^phlora init.*?(?=^```)", readme.TEXT, re.MULTILINE | re.DOTALL)
    assert "adapters: 2 pulled" in follow(first)
    assert {"m0", "m1"} <= {path.name for path in (tmp_path / "adapters").iterdir()}
    [version] = [item.version for item in latest.versions(OUT, "m0")]
    runbook = readme.blocks()

    upload(buckets, "finetunes/m1", poisoned, named_base)
    follow("phlora run zoo.yaml", code=3)
    assert "NaN" in follow(runbook["A poisoned model (exit code 3)"], MODEL="m1")
    upload(buckets, "finetunes/m1", good, named_base)
    assert "2 published" in follow("phlora status zoo.yaml"), "the bytes are what they were"

    follow("sed -i 's/rank: 32/rank: 4/' zoo.yaml")
    assert "due: 2 × changed since" in follow(runbook["An upgrade"])
    assert len(latest.versions(OUT, "m0")) == 2
    follow(runbook["A full disk"])
    assert "pinned" in follow(runbook["Rolling back an adapter"], MODEL="m0", VERSION=version)
    pointer = latest.read(OUT, "m0")
    assert pointer is not None
    assert (pointer.pinned, pointer.version == version) == (False, False)

    before = names()
    told = follow(runbook["Restoring the manifest"], MODEL="m0", BASE="llama")
    assert "_manifest lacked the tables of 2 versions: they are copied there again" in told
    assert "read 0 B of tensors" in told
    outcome_of_the_first = before - names()
    assert [url.split("/")[-4:-2] for url in outcome_of_the_first] == [["_state", "m0"]]
    assert names() <= before
    restored = latest.read(OUT, "m0")
    assert restored is not None
    assert (restored.version, restored.request) == (pointer.version, pointer.request)


def names() -> set[str]:
    """All that stands, but for runs."""
    return {info.url for info in storage.list_tree(OUT) if "/_runs/" not in info.url}


def upload(s3: S3, name: str, tensors: dict[str, Any], more: dict[str, str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        for path in toys.save(Path(folder) / "m", tensors, {**toys.LLAMA, **more}).iterdir():
            s3.client.put_object(Bucket=MODELS, Key=f"{name}/{path.name}", Body=path.read_bytes())
