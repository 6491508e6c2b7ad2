"""How far is `phlora extract` from its own limit? `python -m jobs.bench`, or `make bench`.

One synthetic bf16 pair of Llama shape is extracted as a whole process, and in the same run the bare decompositions of the
same matrices are timed in this process: the solver is the limit while it is an exact one, so the ratio says what the
pipeline around it costs. It reports, it judges nothing; figures of two machines, or of two days, do not compare.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

SEED = 0


def shapes(layers: int, hidden: int, inner: int) -> dict[str, tuple[int, int]]:
    """A GQA Llama's matrices: names → (d, k)."""
    found: dict[str, tuple[int, int]] = {}
    for layer in range(layers):
        at = f"model.layers.{layer}"
        found |= {
            f"{at}.self_attn.{name}_proj.weight": (rows, hidden)
            for name, rows in (("q", hidden), ("k", hidden // 4), ("v", hidden // 4), ("o", hidden))
        }
        found |= {f"{at}.mlp.gate_proj.weight": (inner, hidden), f"{at}.mlp.up_proj.weight": (inner, hidden)}
        found |= {f"{at}.mlp.down_proj.weight": (hidden, inner)}
    return found


def write_pair(folder: Path, wanted: dict[str, tuple[int, int]]) -> None:
    """A base and a fine-tune whose difference has a slowly falling spectrum, as full fine-tunes have."""
    generator = torch.Generator().manual_seed(SEED)
    base = {name: 0.02 * torch.randn(shape, generator=generator) for name, shape in wanted.items()}
    tuned = {name: value + 0.002 * torch.randn(value.shape, generator=generator) for name, value in base.items()}
    for side, tensors in (("base", base), ("tuned", tuned)):
        (folder / side).mkdir()
        (folder / side / "config.json").write_text(json.dumps({"model_type": "llama"}))
        save_file({name: value.bfloat16() for name, value in tensors.items()}, folder / side / "model.safetensors")


def bare_seconds(wanted: dict[str, tuple[int, int]], threads: int) -> float:
    """Time of `torch.linalg.svd` alone, on matrices of these shapes."""
    torch.set_num_threads(threads)
    total = 0.0
    for shape in wanted.values():
        delta = torch.randn(shape)
        began = time.perf_counter()
        torch.linalg.svd(delta, full_matrices=False)
        total += time.perf_counter() - began
    return total


def main() -> None:
    """Measure, and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--inner", type=int, default=1408)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    wanted = shapes(options.layers, options.hidden, options.inner)
    with tempfile.TemporaryDirectory(prefix="phlora-bench-") as scratch:
        folder = Path(scratch)
        write_pair(folder, wanted)
        command = [
            sys.executable,
            "-m",
            "phlora_pipeline",
            "extract",
            "--json",
            "--base",
            str(folder / "base"),
            "--tuned",
            str(folder / "tuned"),
        ]
        command += ["--threads", str(options.threads), "--out", str(folder / "adapter")]
        began = time.perf_counter()
        done = subprocess.run(
            command, capture_output=True, text=True, check=True, env={**os.environ, "OMP_WAIT_POLICY": "passive"}
        )
        wall = time.perf_counter() - began
        result = json.loads(done.stdout)
        empty = time.perf_counter()
        subprocess.run(
            command, capture_output=True, check=True
        )  # the adapter stands already: start-up and nothing else
        start_up = time.perf_counter() - empty
    bare = bare_seconds(wanted, options.threads)
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    report = {
        "pair": {
            "matrices": len(wanted),
            "entries": sum(d * k for d, k in wanted.values()),
            "threads": options.threads,
        },
        "extract_seconds": round(wall, 2),
        "start_up_seconds": round(start_up, 2),
        "bare_svd_seconds": round(bare, 2),
        "ratio_to_bare_svd": round((wall - start_up) / bare, 2),
        "peak_memory_mib": round(usage.ru_maxrss / 1024),
        "preserved_energy": result["summary"]["preserved_energy"],
        "written_energy": result["summary"]["written_energy"],
    }
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
