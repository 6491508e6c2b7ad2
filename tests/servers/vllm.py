"""vLLM's OpenAI server on the CPU, with adapters that come and go over HTTP."""

from __future__ import annotations

import contextlib
import json
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.servers.environment import PYTHON
from tests.servers.greedy import Answer
from tests.servers.processes import free_port, running, tail

BASE = "base"
_PATIENCE = 400
"""Seconds until it serves: a minute where nothing else runs, several beside other work."""

_ENVIRONMENT = {
    "VLLM_HOST_IP": "127.0.0.1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True",
}


@dataclass(frozen=True)
class Vllm:
    """A server that answers."""

    url: str
    log: Path

    def load(self, name: str, adapter: Path) -> None:
        """From now on `name` is a model."""
        self._post("v1/load_lora_adapter", lora_name=name, lora_path=str(adapter))

    def unload(self, name: str) -> None:
        """From now on `name` is none."""
        self._post("v1/unload_lora_adapter", lora_name=name)

    def answer(self, model: str, prompt: Sequence[int], tokens: int) -> Answer:
        """The greedy continuation, past any end of sequence."""
        said = self._post(
            "v1/completions", model=model, prompt=list(prompt), max_tokens=tokens, temperature=0, ignore_eos=True,
            return_token_ids=True, logprobs=1,
        )  # fmt: skip
        choice = json.loads(said)["choices"][0]
        return Answer(tuple(choice["token_ids"]), tuple(choice["logprobs"]["token_logprobs"]))

    def _post(self, path: str, **body: Any) -> str:
        request = urllib.request.Request(
            f"{self.url}/{path}", json.dumps(body).encode(), headers={"Content-Type": "application/json"}
        )
        try:
            with _direct.open(request, timeout=300) as answer:
                return str(answer.read().decode())
        except urllib.error.HTTPError as error:
            with error:
                raise RefusedError(f"{path}: {error.code} {error.read().decode()}\n{tail(self.log)}") from error


class RefusedError(Exception):
    """The server answered with an error."""


_direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))


@contextlib.contextmanager
def serving(base: Path, folder: Path, *, max_rank: int, adapters: int) -> Iterator[Vllm]:
    """The base as the model `base`, in float32, until the block ends; its log stays in `folder`.

    Args:
        base: a checkpoint.
        folder: for the log.
        max_rank: of any adapter.
        adapters: how many will be loaded at a time, at most.
    """
    port, log = free_port(), folder / "vllm" / "log"
    command = [
        str(PYTHON), "-m", "vllm.entrypoints.openai.api_server", "--host", "127.0.0.1", "--port", str(port),
        "--model", str(base), "--served-model-name", BASE, "--dtype", "float32", "--max-model-len", "128",
        "--enforce-eager", "--enable-lora", "--max-lora-rank", str(max_rank), "--max-loras",
        # vLLM's torch kernels give a request for the base whatever is in the last slot, so that one must stay empty.
        str(adapters + 1),
    ]  # fmt: skip
    with running(command, _ENVIRONMENT, log) as process:
        server = Vllm(f"http://127.0.0.1:{port}", log)
        _await(server, process)
        yield server


def _await(server: Vllm, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + _PATIENCE
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(OSError), _direct.open(f"{server.url}/health", timeout=5):
            return
        time.sleep(1)
    raise RuntimeError(f"vLLM does not start; {tail(server.log)}")
