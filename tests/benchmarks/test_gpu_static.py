"""Budgets of the head on GPUs: launches counted on real calls, bytes and predicted times of the model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch

from benchmarks import launches
from benchmarks.cases import HeadCase
from benchmarks.linear_logprob import gpu_static
from fastdpo.ops.linear_logprob.operators import linear_logprob
from fastdpo.ops.linear_logprob.tiles import WORKSPACE

ROOT = Path(__file__).parents[2]
FIELDS = {"card", "rows", "hidden", "vocab", "launches", "bytes_per_logit", "predicted_ms", "bare_ms", "ratio"}


def test_budgets() -> None:
    """At 4,096 × 4,096 × 128,256 with E in 256 MiB. By hand, with C = 4 chunks: target logits, C products with the
    fold, C products E W, merge, rescue, the backward's scaling, and two launches of the reference."""
    assert WORKSPACE == 256 * 2**20
    command = [sys.executable, "-m", "benchmarks", "gpu_static", "--json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    listed = json.loads(done.stdout)
    assert len(listed) == len(gpu_static.CARDS) * len(gpu_static.GPU_HEADS)
    assert all(set(each) >= FIELDS and each["model"] is True for each in listed)
    found = {(each["card"], each["rows"], each["hidden"], each["vocab"]): each for each in listed}
    for card, bound in (("H100", 1.25), ("RTX 4090", 1.1)):
        each = found[card, 4096, 4096, 128256]
        assert each["launches"] == 2 * 4 + 6 <= 24
        assert each["bytes_per_logit"] <= 5.6
        assert each["ratio"] == pytest.approx(each["predicted_ms"] / each["bare_ms"], rel=1e-3)
        assert each["ratio"] <= bound
    assert found["H100", 4096, 896, 151936]["launches"] == 2 * 5 + 6
    assert found["RTX 4090", 8192, 2048, 128256]["launches"] == 2 * 8 + 6


def test_launches_do_not_grow_with_rows() -> None:
    """By hand, with one chunk: target logits, product, merge, rescue, and two grids of the reference; E W; the scaling.
    The casts are those by which a CPU multiplies E and its slice of the weight."""
    expected = launches.Counts(grids=6, products=1, others=1, allocations=10, casts=2)
    with mock.patch("fastdpo.ops.linear_logprob.operators.SCALE_ROWS", 16):
        assert launches.count_head(1) == expected


def test_model_by_hand() -> None:
    """A card of 1 TFLOP/s and 100 GB/s; 4,096 rows, H = 1000, V = 65,536 are two chunks of 32,768 columns.

    Bytes per logit: E twice 2; accumulator (4 + 8), unit gradient 4 + 2 and its scaling 2 + 2 over V/H; a top and a sum
    of two passes per 256 columns, written and read.
    """
    case, card = HeadCase(4096, 1000, 65536), gpu_static.Card("a card", 90, 1.0, 100.0, 0.5)
    expected = 4 + 22 * 1000 / 65536 + 2 * 16 / 256
    assert gpu_static.bytes_per_logit(case, card) == pytest.approx(expected)
    product = 2 * 4096 * 1000 * 65536 / 1e12
    seconds = 2 * product / 0.5 + product + expected * 4096 * 65536 / 100e9
    counts = launches.Counts(grids=7, products=2, others=1, allocations=9)
    found = gpu_static.predict(case, card, counts)
    assert found.launches == 10
    assert found.bare_ms == pytest.approx(3e3 * product, abs=1e-3)
    assert found.predicted_ms == pytest.approx(1e3 * seconds, abs=1e-3)
    slow_host = gpu_static.predict(HeadCase(1, 8, 256), card, counts)
    assert slow_host.predicted_ms == slow_host.host_ms == pytest.approx(7 * 0.03 + 3 * 0.01)


def test_launches_are_counted_within_operators_and_views_are_not() -> None:
    targets = torch.zeros(4, dtype=torch.int64)
    with launches.counting_launches() as counts:
        x = torch.zeros(4, 4)
        y = x.view(16)[2:].bfloat16().float()
        x.addmm_(x, x.t())
        torch.mm(x, x, out=torch.empty(4, 4))
        y.mul_(2.0)
        linear_logprob(x, x, None, targets, None, 1.0, 1.0, None, x.dtype, False, True, [], WORKSPACE, "torch")
    # zeros, mul_, and within the operator its product, and more operators than these
    assert (counts.grids, counts.products) == (0, 3)
    assert counts.others > 2
    assert counts.allocations >= 2
    assert counts.casts == 2
