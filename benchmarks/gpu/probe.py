"""The card and the versions, as one JSON object: `python -m benchmarks.gpu.probe`, so that its caller holds no context.

{"versions": {...}, "card": {...} or null, "reason": why there is none that could run the stages, with the next step}
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
from importlib import metadata
from typing import Any

PACKAGES = (
    "torch", "triton", "transformers", "accelerate", "peft", "bitsandbytes", "datasets", "trl", "liger_kernel",
    "cut-cross-entropy", "huggingface_hub", "pyarrow", "numpy",
)  # fmt: skip
NO_TORCH = (
    "torch cannot be imported by {python} ({error}). Set PYTHON to the interpreter that has a CUDA build of torch 2.11 "
    "or newer."
)
NO_CUDA = "torch {version} is a build without CUDA. Install a CUDA build of torch 2.11 or newer."
NO_CARD = "no card is visible to torch {version}. See what `nvidia-smi -L` lists, and CUDA_VISIBLE_DEVICES."


def versions() -> dict[str, str | None]:
    """None for what is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def driver() -> str | None:
    """The driver's version, where nvidia-smi is there to say it."""
    if shutil.which("nvidia-smi") is None:
        return None
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    return done.stdout.splitlines()[0].strip() if done.returncode == 0 and done.stdout.strip() else None


def probe() -> dict[str, Any]:
    found: dict[str, Any] = {"versions": versions(), "card": None, "reason": ""}
    try:
        import torch
    except ImportError as error:
        return found | {"reason": NO_TORCH.format(python=sys.executable, error=error)}
    found["versions"] |= {"torch": torch.__version__, "cuda": torch.version.cuda}
    if not torch.cuda.is_available():
        text = NO_CARD if torch.version.cuda else NO_CUDA
        return found | {"reason": text.format(version=torch.__version__)}
    properties = torch.cuda.get_device_properties(0)
    found["card"] = {
        "name": properties.name,
        "capability": [properties.major, properties.minor],
        "multiprocessors": properties.multi_processor_count,
        "l2_bytes": properties.L2_cache_size,
        "memory_bytes": properties.total_memory,
        "driver": driver(),
        "visible": os.environ.get("CUDA_VISIBLE_DEVICES"),
    }
    return found


if __name__ == "__main__":
    print(json.dumps(probe()))
