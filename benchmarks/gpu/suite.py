"""Stage 8: the suite's GPU tests."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

from benchmarks.gpu.report import Report
from benchmarks.gpu.sizes import Sizes

ROOT = Path(__file__).resolve().parents[2]
#: Where they are: the other files would be collected in vain.
TESTS = ("tests/benchmarks/test_gpu.py",)
#: pytest's status where no test was selected.
NO_TESTS = 5
#: Seconds in which an interrupted pytest prints its summary.
SUMMARY = 3.0


def run(report: Report, sizes: Sizes) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider", *sizes.pytest, *TESTS]
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=os.environ | sizes.environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    interrupted = False
    try:
        text, _ = process.communicate(timeout=max(report.left() - SUMMARY, 1.0))
    except subprocess.TimeoutExpired:
        interrupted = True
        process.send_signal(signal.SIGINT)  # pytest then says what it has seen so far
        text, _ = process.communicate()
        report.write(skipped="later tests", reason="the stage's time is over; `make test-gpu` runs all")
    print(text, flush=True)
    lines = [line for line in text.splitlines() if line.strip()]
    report.add("pytest", headline=lines[-1] if lines else None, status=process.returncode)
    failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    if failed or not (interrupted or process.returncode == 0):
        none = ["no test was selected"] if process.returncode == NO_TESTS else []
        report.fail("pytest", "; ".join([*failed, *none]) or f"pytest ended with status {process.returncode}")
