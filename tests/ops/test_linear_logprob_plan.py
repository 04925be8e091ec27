"""The head's memory and tile plans, and the inputs and backends that are refused."""

from __future__ import annotations

import itertools
import math
import subprocess
import sys
from typing import Any

import pytest
import torch
from head_inputs import BACKENDS, problem

import fastdpo
from fastdpo.ops.linear_logprob.tiles import MAX_ROWS, WORKSPACE, TilePlan, plan_fused, plan_gpu_tiles, plan_tiles


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several row chunks and vocabulary slices, with a ragged last one of each."""
    monkeypatch.setenv("FASTDPO_TILE", "100x400")


# Memory

MEMORY = """
import re, torch, fastdpo
torch.set_num_threads(1)
def status(name):
    return int(re.search(name + r":\\s+(\\d+) kB", open("/proc/self/status").read())[1]) * 1024
rows, hidden, vocab = {rows}, {hidden}, {vocab}
small = torch.ones(8, hidden, requires_grad=True)
fastdpo.linear_logprob(small, torch.ones(64, hidden), torch.zeros(8, dtype=torch.int64)).sum().backward()
x, weight = torch.randn(rows, hidden).requires_grad_(), torch.randn(vocab, hidden)
targets = torch.randint(0, vocab, (rows,))
open("/proc/self/clear_refs", "w").write("5")
before = status("VmRSS")
fastdpo.linear_logprob(x, weight, targets).sum().backward()
print(status("VmHWM") - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("vocab", [32_000, 256_000])
def test_peak_memory_does_not_depend_on_the_vocabulary(vocab: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FASTDPO_TILE")
    rows, hidden = 1500, 64
    script = MEMORY.format(rows=rows, hidden=hidden, vocab=vocab)
    grown = int(subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout)
    assert grown <= plan_tiles(rows, vocab, hidden).bytes() + rows * hidden * 4 + 16 * 2**20
    assert grown >= rows * hidden * 4  # the gradient at least, or nothing was measured


# Tile plans, and what is refused


def test_plans(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FASTDPO_TILE")
    cache = {"rows": 1024, "hidden_size": 576}
    assert plan_tiles(vocab_size=49152, **cache).rows == 1024
    assert plan_tiles(5, 49152, 576).rows == 5
    assert plan_tiles(8192, 49152, 576) == plan_tiles(1024, 49152, 576)
    assert plan_tiles(1025, 49152, 576).rows == 513  # and 512: no part of one row
    for rows in (1023, 1024, 1025, 3000, 100_001):
        size = plan_tiles(rows, 49152, 576).rows
        assert size <= MAX_ROWS
        assert 0 <= -rows % size < -(-rows // MAX_ROWS)  # parts differ by less than their number
    assert plan_tiles(1024, 100, 576).columns == 100
    for rows, hidden in itertools.product((1, 16, 1024, 100_000), (8, 576, 4096, 16384)):
        plan = plan_tiles(rows, 256_000, hidden)
        assert plan.bytes() <= 8 * 2**20
        assert plan.columns % 256 == 0
        assert 256 <= plan.columns <= 2048


def test_plans_of_a_gpu_follow_the_workspace_and_no_cache() -> None:
    """By hand: 256 MiB hold 4,096 × 10,922 elements of 4 + 2 bytes, of which a program takes 8,192 columns; 8,192 rows
    of 16-bit exponentials are 16,384 columns wide, and 128,256 columns in 8 equal chunks of whole steps are 16,128."""
    older = {"vocab_size": 128_256, "newer": False, "itemsize": 2, "workspace": WORKSPACE}
    assert plan_gpu_tiles(4096, **older) == TilePlan(4096, 8192)
    assert plan_gpu_tiles(4097, **older) == TilePlan(2049, 8192)
    assert plan_gpu_tiles(8192, **(older | {"newer": True})) == TilePlan(8192, 5376)
    assert plan_gpu_tiles(300, **(older | {"workspace": 2**16})) == TilePlan(38, 256)
    plan = plan_fused(8192, 128_256, 2, WORKSPACE, unit_gradient=True)
    assert (plan.rows, plan.columns, plan.chunks(128_256)) == (8192, 16_128, 8)
    assert plan_fused(8193, 128_256, 2, WORKSPACE, unit_gradient=True).rows == 4112  # 4,097 in whole steps of 16
    assert plan_fused(4096, 128_256, 2, WORKSPACE, unit_gradient=False).chunks(128_256) == 1
    for rows, workspace in itertools.product((1, 77, 4096, 50_000), (2**16, 2**26, 2**28)):
        plan = plan_fused(rows, 128_256, 2, workspace, unit_gradient=True)
        assert 2 * plan.rows * plan.columns <= workspace
        assert plan.columns % 256 == 0


def test_plan_override(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTDPO_TILE", "64x512")
    assert plan_tiles(1000, 50_000, 576) == TilePlan(64, 512)
    monkeypatch.setenv("FASTDPO_TILE", "64")
    with pytest.raises(ValueError, match=r"FASTDPO_TILE='64' must be rows x columns"):
        plan_tiles(1, 1, 1)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"weight": torch.zeros(20, 5)}, ValueError, r"do not fit: \(3, 4\), \(20, 5\), \(3,\)"),
        ({"targets": torch.zeros(2, dtype=torch.int64)}, ValueError, r"\(2,\)"),
        ({"targets": torch.zeros(3, dtype=torch.int32)}, TypeError, "targets has dtype torch.int32"),
        (
            {"targets": torch.tensor([1, 20, -1])},
            ValueError,
            r"targets has 2 values outside \[0, 20\), the first is 20",
        ),
        ({"targets": torch.tensor([1, -100, 3]), "ignore_index": None}, ValueError, "the first is -100"),
        ({"bias": torch.zeros(19)}, ValueError, r"bias has shape \(19,\)"),
        ({"weight": torch.zeros(20, 4, dtype=torch.uint8)}, TypeError, "weight has dtype torch.uint8"),
        ({"weight": torch.zeros(20, 4, device="meta")}, ValueError, "weight is on meta, hidden on cpu"),
        ({"targets": torch.zeros(3, dtype=torch.int64, device="meta")}, ValueError, "targets is on meta"),
        ({"softcap": -1.0}, ValueError, "softcap=-1.0"),
        ({"temperature": 0.0}, ValueError, "temperature=0.0"),
        ({"logit_scale": math.inf}, ValueError, "logit_scale=inf"),
        ({"stats": ("perplexity",)}, ValueError, "perplexity"),
    ],
)
def test_bad_input_is_named(change: dict[str, Any], error: type[Exception], message: str, backend: str) -> None:
    data: dict[str, Any] = problem(3, 4, 20, torch.float32)
    with pytest.raises(error, match=message):
        fastdpo.linear_logprob(**(data | change), backend=backend)


def test_backends_that_cannot_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    data = problem(3, 4, 20, torch.float64)
    with pytest.raises(ValueError, match=r"backend='triton' computes in float32 and cannot serve float64"):
        fastdpo.linear_logprob(**data, backend="triton")
    with pytest.raises(ValueError, match=r"backend='cuda' is unknown; accepted are auto, torch, triton"):
        fastdpo.linear_logprob(**data, backend="cuda")
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(ValueError, match=r"backend='triton' cannot"):
        fastdpo.linear_logprob(**problem(3, 4, 20, torch.float32), backend="triton")
    monkeypatch.setenv("FASTDPO_BACKEND", "triton")
    with pytest.raises(ValueError, match=r"FASTDPO_BACKEND='triton' cannot"):
        fastdpo.linear_logprob(**problem(3, 4, 20, torch.float32))
