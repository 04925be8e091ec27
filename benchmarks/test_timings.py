"""The same cases under pytest-benchmark: `pytest benchmarks --benchmark-only --benchmark-group-by=param:case`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from benchmarks import cases, contenders, preference_loss
from benchmarks.cases import HeadCase, LossCase
from benchmarks.linear_preference_loss import PEERS

pytest.importorskip("pytest_benchmark")
HEADS: dict[str, Callable[[cases.HeadInputs], Callable[[], None]]] = {
    "fastdpo": lambda x: lambda: contenders.fastdpo_head(x),
    "bare GEMMs": contenders.BareGemms,
}


@pytest.mark.parametrize("contender", HEADS)
@pytest.mark.parametrize("case", cases.HEAD_CASES, ids=lambda case: case.name)
def test_head(case: HeadCase, contender: str, benchmark: Any) -> None:
    benchmark.extra_info.update(flops=case.flops, bytes=case.bytes())
    benchmark.pedantic(HEADS[contender](cases.head_inputs(case)), rounds=3, warmup_rounds=1)


@pytest.mark.parametrize("peer", PEERS)
@pytest.mark.parametrize("case", [cases.PAIR_CASE], ids=["pairs"])
def test_peers(case: cases.PairCase, peer: str, benchmark: Any) -> None:
    inputs = cases.pair_inputs(case)
    rows = inputs.targets.numel() if PEERS[peer].all_rows else inputs.scored_rows
    benchmark.extra_info.update(flops=case.flops(rows, PEERS[peer].gemms))
    benchmark.pedantic(PEERS[peer].call, (inputs,), rounds=2)


@pytest.mark.parametrize("step", ["from sums", "from tokens"])
@pytest.mark.parametrize("case", cases.LOSS_CASES, ids=lambda case: f"{case.pairs} pairs")
def test_loss(case: LossCase, step: str, benchmark: Any) -> None:
    benchmark(preference_loss.steps(case)[step])
