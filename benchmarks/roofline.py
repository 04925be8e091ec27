"""What counted bytes and FLOPs allow on GPUs. A MODEL: nothing here was ever measured on a GPU.

GEMMs take the longer of FLOPs at the peak rate and bytes at the memory's bandwidth; the fold takes its bytes at that
bandwidth, as if no tile stayed in the L2 (one that does makes it faster). Reading and writing overlap in neither.
Launches are counted, not timed: beside the total stands what LAUNCH_US each would cost the host.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from unittest import mock

import torch

from benchmarks.cases import HeadCase
from benchmarks.report import Figure
from benchmarks.settings import Settings
from fastdpo.estimate.devices import GPUS, Device
from fastdpo.ops import tiles

TITLE = "roofline: a MODEL for 16-bit heads from counted bytes and FLOPs, never measured"
LAUNCH_US = 5.0
ITEM = 2  # bytes of weight, hidden and of the GEMM's operands
CASES = (HeadCase(4096, 896, 151936), HeadCase(4096, 4096, 128256))


@dataclass(frozen=True)
class Counted:
    """FLOPs and bytes of each GEMM, bytes of everything else, and launches."""

    gemms: tuple[tuple[int, int], ...]
    other_bytes: int
    launches: int


def count(case: HeadCase, plan: tiles.TilePlan) -> Counted:
    """Policy with its unit gradient, and reference; the weight is read once per chunk of rows and GEMM."""
    n, h, v = case.rows, case.hidden, case.vocab
    chunks, slices = math.ceil(n / plan.rows), math.ceil(v / plan.columns)
    operands = ITEM * (v * h * chunks + n * h * slices)
    logits = operands + 4 * n * v  # writes the float32 tile
    product = ITEM * (n * v + v * h * chunks) + 8 * n * h * slices  # reads P and W, adds to the accumulator
    fold_policy, fold_reference = (4 + ITEM) * n * v, 4 * n * v
    finish = (8 + ITEM + ITEM) * n * h + 2 * ITEM * n * h  # the unit gradient, and its scaling in the backward
    rescale = slices - 1  # launches; rows whose peak stays are not touched
    launches = chunks * (3 * slices + rescale + 1 + 2 * slices)
    gemm = 2 * n * h * v
    return Counted(((gemm, logits), (gemm, product), (gemm, logits)), fold_policy + fold_reference + finish, launches)


def plan_for(gpu: Device, case: HeadCase) -> tiles.TilePlan:
    """What the planner would choose there."""
    with mock.patch.object(tiles, "_cache_bytes", return_value=int(gpu.l2_mib * 2**20)):
        return tiles.plan_tiles(case.rows, case.vocab, case.hidden, torch.device("cuda"))


def run(settings: Settings) -> list[Figure]:
    figures = []
    for case in CASES:
        for gpu in GPUS:
            plan = plan_for(gpu, case)
            counted = count(case, plan)
            flops_s, bytes_s = gpu.teraflops * 1e12, gpu.gigabytes_per_second * 1e9
            bare = 1e3 * sum(flops for flops, _ in counted.gemms) / flops_s
            gemms = 1e3 * sum(max(flops / flops_s, size / bytes_s) for flops, size in counted.gemms)
            other = 1e3 * counted.other_bytes / bytes_s
            host = 1e-3 * LAUNCH_US * counted.launches
            figures.append(
                Figure(
                    f"{case.name} (model)",
                    gpu.label,
                    gemms + other,
                    "ms",
                    "GEMM FLOPs at peak",
                    bare,
                    (gemms + other) / bare,
                    note=f"not GEMM {other:.1f} ms, {other / (gemms + other):.0%}; tiles {plan.rows} × {plan.columns}; "
                    f"{counted.launches:,} launches, {host:.0f} ms of host at {LAUNCH_US:g} µs",
                )
            )
    return figures
