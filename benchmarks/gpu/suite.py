"""Stage 8: the suite's GPU tests, tests/test_gpu*.py."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from benchmarks.gpu.report import Report
from benchmarks.gpu.sizes import Sizes

ROOT = Path(__file__).resolve().parents[2]
#: pytest's status where no test was selected.
NO_TESTS = 5


def run(report: Report, sizes: Sizes) -> None:
    tests = [str(path.relative_to(ROOT)) for path in sorted((ROOT / "tests").glob("test_gpu*.py"))]
    command = [sys.executable, "-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider", *sizes.pytest, *tests]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=os.environ | sizes.environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    print(done.stdout, flush=True)
    lines = [line for line in done.stdout.splitlines() if line.strip()]
    report.add("pytest", headline=lines[-1] if lines else None, status=done.returncode)
    if done.returncode:
        failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
        none = ["no test was selected"] if done.returncode == NO_TESTS else []
        report.fail("pytest", "; ".join([*failed, *none]) or f"pytest ended with status {done.returncode}")
