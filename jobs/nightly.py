"""The nightly job of a cluster: `ray job submit --working-dir . -- python jobs/nightly.py zoo.yaml [--yes]`.

The same as `phlora run` in front of you, on the cluster of RAY_ADDRESS, which Ray sets for its jobs. The last line of its
log names its result.json and its exit code, since Ray's client tells neither. Ray sends SIGTERM to a job that is stopped, and
SIGKILL 3 s later: set RAY_JOB_STOP_WAIT_TIME_S to 40 in the job's environment, as `phlora submit` does, so that it can
finish what is in flight.
"""

from __future__ import annotations

import sys

from phlora_pipeline import cli

if __name__ == "__main__":
    cli.command(["run", *sys.argv[1:]])
