"""Measured processes: where they are started, and the resident memory of the one that runs, from /proc."""

from __future__ import annotations

import ctypes
import gc
import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

#: Folder from which `python -m benchmarks.…` runs.
ROOT = Path(__file__).parent.parent


def outcome_of(
    module: str,
    arguments: Sequence[str],
    environment: Mapping[str, str],
    *,
    tree: str = "",
    own_driver: bool = False,
) -> dict[str, Any]:
    """The JSON object that `module` prints last, run in a fresh process.

    tree: a checkout whose library it runs in the place of this one's (`benchmarks.other_tree`); `own_driver`: by that
    checkout's own benchmarks.

    Raises:
        ModuleNotFoundError: what is to be measured is not installed, or the other tree lacks a module.
        ImportError: the other tree lacks a name.
        RuntimeError: the process failed otherwise.
    """
    through = ["benchmarks.other_tree", tree] if tree and not own_driver else []
    command = [sys.executable, "-m", *through, module, *arguments]
    variables = {**os.environ, **environment}
    if own_driver:
        variables["PYTHONPATH"] = os.pathsep.join(str(Path(tree, folder).resolve()) for folder in (".", "kernels"))
    done = subprocess.run(command, cwd=tree if own_driver else ROOT, capture_output=True, text=True, env=variables)
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        kinds = {kind.__name__: kind for kind in (ModuleNotFoundError, ImportError)}
        kind = kinds.get(last.partition(":")[0], RuntimeError)
        raise kind(f"{' '.join(command[2:])}: {last}")
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


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
