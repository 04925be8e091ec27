"""Runs of `worker.py` outside this process: on two ranks, or forked from a process that has imported everything."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

WORKER = Path(__file__).with_name("worker.py")


def on_two_ranks(worker: Path, jobs: list[dict[str, Any]], *, fails: bool = False) -> str:
    """Do `jobs` in one launch of two gloo ranks; the last `fails` or not. Returns what was written to stderr."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--rdzv_backend=c10d"]
    command += ["--rdzv_endpoint=localhost:0", str(worker), json.dumps(jobs)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert (done.returncode != 0) == fails, done.stderr[-3000:]
    return done.stderr


class Forks:
    """`python worker.py serve`, which forks a process for every job: each starts as a fresh one does, without its
    seconds of imports."""

    def __init__(self) -> None:
        command = [sys.executable, str(WORKER), "serve"]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self._server = subprocess.Popen(command, env=environment, **pipes)

    def run(self, job: dict[str, Any], stderr: Path) -> tuple[int, str]:
        """The return code, as `subprocess` says it, and what was written to stderr."""
        self._server.stdin.write(json.dumps([job, str(stderr)]) + "\n")
        self._server.stdin.flush()
        return int(self._server.stdout.readline()), stderr.read_text()

    def close(self) -> None:
        """No more jobs: the server ends."""
        self._server.stdin.close()
        self._server.wait(timeout=60)
        self._server.stdout.close()
