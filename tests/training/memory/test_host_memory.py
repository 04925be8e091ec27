"""What a process frees goes back to the system."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

#: Blocks of 2 MiB that are freed once, which raises glibc's threshold, then 200 MiB of them, all freed but the last.
_SCRIPT = """
import psutil, sys, torch
from fastdpo.training.memory.host import map_large_blocks
if sys.argv[1] == "mapped":
    assert map_large_blocks()
rss = lambda: psutil.Process().memory_info().rss / 2**20
block = lambda: torch.ones(2**19)
for _ in range(3):
    block()
before = rss()
blocks = [block() for _ in range(100)]
assert rss() - before > 190
del blocks[:-1]
print(rss() - before)
"""


def retained(how: str) -> float:
    """MiB that a process still has after it freed 198 of 200."""
    environment = {k: v for k, v in os.environ.items() if k not in ("MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")}
    command = [sys.executable, "-c", _SCRIPT, how]
    return float(subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout)


def test_freed_blocks_leave_the_process() -> None:
    assert retained("default") > 100  # what the setting is for
    assert retained("mapped") < 10


def test_the_users_own_threshold_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastdpo.training.memory.host import map_large_blocks

    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "1048576")
    assert not map_large_blocks()
