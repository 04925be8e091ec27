"""Peak rates of devices: GPUs from their vendor's figures, this machine's CPU measured.

Nothing here was ever run on a GPU: what follows from a GPU's figures is a model.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Device:
    """name: as users write it. label: as it is printed. teraflops: of dense GEMMs (GPUs: 16-bit inputs, float32 sums).
    gigabytes_per_second: of the memory. l2_mib: the GPU's L2."""

    name: str
    label: str
    teraflops: float
    gigabytes_per_second: float
    l2_mib: float = 0.0


GPUS = (
    Device("rtx-3060", "RTX 3060 12 GB", 25.5, 360, 3),
    Device("rtx-4090", "RTX 4090", 165.2, 1008, 72),
    Device("a100", "A100 80 GB SXM", 312, 2039, 40),
    Device("h100", "H100 SXM", 989, 3350, 50),
)

#: Rows, columns and depth of the GEMM, and elements of the copy, that are timed on a CPU; seconds of each.
_GEMM, _COPY, _SECONDS = (512, 1536, 576), 2**24, 0.5


def measured_cpu(dtype: torch.dtype) -> Device:
    """This machine's CPU: the best of repeated GEMMs in `dtype`, and of copies that no cache holds."""
    rows, columns, depth = _GEMM
    a, b = torch.randn(rows, depth, dtype=dtype), torch.randn(columns, depth, dtype=dtype)
    flops = 2 * rows * columns * depth / _best_seconds(lambda: a @ b.t())
    source, target = torch.zeros(_COPY), torch.zeros(_COPY)
    moved = 2 * 4 * _COPY / _best_seconds(lambda: target.copy_(source))
    label = f"this CPU, {torch.get_num_threads()} threads, measured"
    return Device("cpu", label, flops / 1e12, moved / 1e9)


def _best_seconds(work: Callable[[], object]) -> float:
    best, end = float("inf"), time.perf_counter() + _SECONDS
    while time.perf_counter() < end:
        begun = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - begun)
    return best
