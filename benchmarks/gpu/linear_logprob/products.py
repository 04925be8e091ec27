"""Stage 3: the head's products alone, by tile: h Wᵀ into the operands' dtype and into float32, A += P W in float32.

FLOPs of a tile: 2 · rows · columns · H. A plan of tiles costs the sum over the head of what is printed here.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.cases import HeadCase
from benchmarks.gpu.clock import Clock
from benchmarks.gpu.report import Report
from benchmarks.gpu.sizes import Sizes
from fastdpo.ops.linear_logprob.head import Head

#: Seconds of one tile's four products, allocation and warm-up included.
NEEDED = 2.0


def plain_head(weight: Tensor) -> Head:
    """A head without options, for its products: the same calls as the tile loop's."""
    return Head(weight, None, 1.0, 1.0, None, weight.dtype)


def products(case: HeadCase, rows: int, columns: int, dtype: torch.dtype, device: str) -> dict[str, Callable[[], None]]:
    """Of one tile, on random operands: zeros multiply faster."""
    hidden = torch.randn(rows, case.hidden, dtype=dtype, device=device)
    weight = torch.randn(columns, case.hidden, dtype=dtype, device=device)
    probs = torch.rand(rows, columns, dtype=dtype, device=device)
    logits = torch.empty(rows, columns, dtype=dtype, device=device)
    tile = torch.empty(rows, columns, dtype=torch.float32, device=device)
    total = torch.zeros(rows, case.hidden, dtype=torch.float32, device=device)
    head = plain_head(weight)
    return {
        "logits": partial(head.matmul, hidden, weight.t(), logits),
        "logits in float32": partial(head.matmul, hidden, weight.t(), tile),
        "gradient added in float32": partial(head.matmul_add, probs, weight, total),
    }


def run(report: Report, sizes: Sizes) -> None:
    clock = Clock(sizes.device, sizes.seconds / 4)
    best: dict[str, float] = {}
    for case in sizes.heads:
        for rows, columns in sizes.tiles:
            rows, columns = min(rows or case.rows, case.rows), min(columns or case.vocab, case.vocab)
            name = f"H = {case.hidden}: {rows} × {columns}"
            if report.skips(name, NEEDED if sizes.on_gpu else 0.0):
                continue
            with report.case(name):
                figures: dict[str, Any] = {}
                for what, times in clock.measure(products(case, rows, columns, sizes.dtype, sizes.device)).items():
                    rate = 2 * rows * columns * case.hidden / times.ms / 1e9
                    figures[what] = {"teraflops": rate, **times.figures()}
                    best[what] = max(best.get(what, 0.0), rate)
                report.add(name, **figures)
    report.add(
        "summary", headline="; ".join(f"{what}: up to {rate:,.3g} TFLOP/s" for what, rate in best.items()), **best
    )
