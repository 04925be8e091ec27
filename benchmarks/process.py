"""Measured processes: where they are started, and the resident memory of the one that runs, from /proc."""

from __future__ import annotations

import ctypes
import gc
import re
from pathlib import Path

#: Folder from which `python -m benchmarks.…` runs.
ROOT = Path(__file__).parent.parent


def reset_peak() -> int:
    """Give back what is free, forget the peak so far, and return the bytes that are resident now."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # VmHWM := VmRSS
    return status("VmRSS")


def status(name: str) -> int:
    """A size in bytes from /proc/self/status."""
    found = re.search(rf"^{name}:\s+(\d+) kB$", Path("/proc/self/status").read_text(encoding="ascii"), re.MULTILINE)
    assert found is not None
    return int(found[1]) * 1024
