"""Tables of what a zoo costs: planning it, dispatching its tasks, and the tail of its night. Pure."""

from __future__ import annotations

from typing import Any

from .figures import lines, seconds, share

Row = dict[str, Any]


def planning(rows: dict[str, Row]) -> list[str]:
    """`plan` of a whole zoo."""
    body = [
        [name, str(row["tensors"] // row["models"]), seconds(row["seconds"]), seconds(row["processor"]), f"{row['peak_mib']:.0f} MiB"]
        for name, row in rows.items()
    ]  # fmt: skip
    return [
        "**Planning a zoo**, from headers in memory to tasks in cohorts",
        lines(["", "tensors of each", "wall", "processor", "peak memory"], body),
    ]


def ranges(rows: dict[str, Row]) -> list[str]:
    """Reading tensors at S3's pace."""
    best = max(row["rate"] for name, row in rows.items() if not name.startswith("ours"))
    body = [[name, f"{row['rate'] / 1e6:.0f} MB/s", f"{row['rate'] / best:.2f}"] for name, row in rows.items()]
    return [
        "**Reading from an object store**: ranges of 8 MiB from a server of S3's pace (first byte after 30 ms, 60 MB/s on each connection)",
        lines(["", "rate", "of the best other client's"], body),
    ]


def dispatch(rows: dict[str, Row]) -> list[str]:
    """The driver's own cost."""
    body = [
        [name, f"{row['processor_ms']:.2f} ms", f"{row['wall_ms']:.2f} ms", f"{row['grown_mib']:.1f} MiB", f"{row['task_bytes']} bytes"]
        for name, row in rows.items()
    ]  # fmt: skip
    return [
        "**Dispatching on Ray**, to actors that do nothing: what the driver takes for each task, and how much it grows after the first tenth",
        lines(["", "driver's processor time", "wall", "memory grown", "a task and its forecast"], body),
    ]


def night(rows: dict[str, Row]) -> list[str]:
    """Makespan over the ideal, in simulated nights."""
    body = [
        [
            row["night"], row["solver"], str(row["gpus"]), str(row["tasks"]), str(row["cohorts"]), seconds(row["makespan"]), f"{row['tail']:.3f}",
            f"{row['asked']:.2f}" if row["asked"] else "–", seconds(row["first_published"]), seconds(row["half_published"]),
            f"{row['read_bytes'] / 1e12:.2f} TB", share(row["vain_bytes"] / row["read_bytes"]), f"{row['least_bytes'] / 1e12:.2f} TB",
        ]
        for row in rows.values()
    ]  # fmt: skip
    headers = [
        "fine-tunes", "solver", "GPUs", "tasks", "cohorts", "takes", "over the ideal", "asked for", "first adapter", "half of them",
        "read", "in vain", "each checkpoint once",
    ]  # fmt: skip
    told = dict.fromkeys(assumptions(row["assumed"]) for row in rows.values())
    return ["**A night, simulated**: real plans, cohorts and dispatcher, assumed rates", lines(headers, body), *told]


def assumptions(assumed: Row) -> str:
    """In words: what is not measured is said."""
    noise = f"task times vary by {share(assumed['noise'])}" if assumed["noise"] else "task times as planned"
    return (
        f"Assumed, not measured: GPUs of profile {assumed['profile']}, {assumed['gpus_per_node']} on a node; a worker reads {_rate(assumed['worker_rate'])} at most, "
        f"a node {_rate(assumed['node_rate'])}, the storage gives {_rate(assumed['storage_rate'])} in all; {noise}; publishing takes no time. The ideal is the larger of "
        "all computing shared evenly and all bytes at the cluster's rate."
    )


def _rate(value: float) -> str:
    return f"{value / 1e9:g} GB/s"
