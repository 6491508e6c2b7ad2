"""Ray, as a night or `phlora submit` would find it: whether somebody is there, in this version, with what the work asks for."""

from __future__ import annotations

import os
from collections.abc import Iterator

from phlora_pipeline import driver, submit
from phlora_pipeline.doctor.finding import Finding, Worry, examined, skipped
from phlora_pipeline.errors import DeviceError
from phlora_pipeline.zoofile import RunSettings


def of_ray(address: str, run: RunSettings) -> Iterator[Finding]:
    """The dashboard that jobs are submitted to, or the cluster that a night would join; or why neither is of interest.

    Args:
        address: of the dashboard, where one is asked for by name.
        run: engine, device and workers.
    """
    if dashboard := dashboard_of(address):
        yield examined("ray", lambda: _dashboard(dashboard))
    elif elsewhere(address, run):
        yield examined("ray", lambda: _joined(run))
    elif run.engine == "ray":
        yield skipped("ray", "no RAY_ADDRESS: a night starts a Ray of its own, on this machine")
    else:
        yield skipped("ray", f"engine is {run.engine}, and there is no RAY_ADDRESS")


def dashboard_of(address: str) -> str:
    """Where jobs would be submitted; empty where nothing says that they are to be."""
    told = address or os.environ.get("RAY_API_SERVER_ADDRESS", "") or os.environ.get("RAY_ADDRESS", "")
    return told if address or told.startswith(("http://", "https://")) else ""


def elsewhere(address: str, run: RunSettings) -> bool:
    """Whether other machines do the work."""
    return bool(dashboard_of(address) or (run.engine != "local" and os.environ.get("RAY_ADDRESS")))


def _dashboard(address: str) -> str:
    there, here = submit.version(address), driver.version()
    if there != here:
        raise DeviceError(
            f"the cluster at {address} has Ray {there}, this machine {here}",
            remedy=f"pip install 'ray[default]=={there}' here, or give the cluster an image with ray {here} (rayVersion)",
        )
    return f"{address} takes jobs, and has Ray {there}"


def _joined(run: RunSettings) -> str | Worry:
    seen = driver.look()
    told = f"Ray {seen.version}, {seen.nodes} nodes with {seen.gpus:g} GPUs and {seen.processors:g} processors"
    if seen.strangers:
        raise DeviceError(f"{told}; {'; '.join(seen.strangers[:3])}", remedy="give all nodes the same image")
    if run.device.startswith("cuda") and seen.gpus < run.gpus_per_worker:
        if not run.workers:
            raise DeviceError(
                f"{told}; one worker asks for {run.gpus_per_worker:g} GPU",
                remedy="run.device: cpu, or say by run.workers how many to wait for while nodes come",
            )
        return Worry(f"{told}; {run.workers} workers would be waited for", "may the cluster scale up to GPU nodes?")
    if run.device == "auto" and not seen.gpus:
        return Worry(f"{told}; `auto` would use processors", "run.device: cuda, if GPU nodes are to come; else cpu")
    return told
