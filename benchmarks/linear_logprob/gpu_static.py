"""The head on GPUs by a MODEL: launches counted on real calls, bytes and FLOPs from the plan. Never measured.

    python -m benchmarks gpu_static --json

A head call is policy forward and backward, and reference, through the fused product (`ops.linear_logprob.fused`), with
every row scored (ignore_index=None): finding ignored rows takes some launches more, and one wait.
    device time   2 fused products at `main_loop` of the bare GEMMs' rate, E W at that rate, and all bytes but the
                  reading of hidden states and weight at the memory's bandwidth, as if no epilogue hid behind a product
    host time     HOST_TRITON per Triton grid, HOST_PRODUCT per operator of torch's; it runs beside the device's
    predicted     the longer of the two
    bare          the three products' FLOPs
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from benchmarks.cases import GPU_HEADS, HeadCase
from benchmarks.launches import Counts
from benchmarks.report import Figure, at_most
from benchmarks.settings import Settings
from fastdpo.ops.linear_logprob.tiles import WORKSPACE, plan_fused
from fastdpo_kernels.linear_logprob.tiles import listed

TITLE = "gpu_static: a MODEL of 16-bit heads on GPUs, from counted launches, bytes and FLOPs, never measured"
#: Seconds of host per launch: a Triton grid with about 20 arguments from eager Python; mm and addmm. Estimated.
HOST_TRITON, HOST_PRODUCT = 30e-6, 10e-6
ITEM = 2  # bytes of weight, hidden states and E


@dataclass(frozen=True)
class Card:
    """capability: decides the tile. teraflops, gigabytes_per_second: what GEMMs and copies reach, estimated.
    main_loop: the fused product's rate over the bare GEMMs', without its epilogue."""

    name: str
    capability: int
    teraflops: float
    gigabytes_per_second: float
    main_loop: float


CARDS = (Card("H100", 90, 700, 3000, 0.85), Card("RTX 4090", 89, 155, 950, 0.95))
#: (card, case) → bound of predicted over bare.
TARGETS = {("H100", GPU_HEADS[0]): 1.25, ("RTX 4090", GPU_HEADS[0]): 1.1}


@dataclass(frozen=True)
class Prediction:
    """Of one card and case. launches: of one head call; host_ms: what they cost the host."""

    card: str
    rows: int
    hidden: int
    vocab: int
    launches: int
    bytes_per_logit: float
    host_ms: float
    predicted_ms: float
    bare_ms: float
    ratio: float
    model: bool = True


def bytes_per_logit(case: HeadCase, card: Card) -> float:
    """Bytes of a head call over N·V, but for the reading of hidden states and weight."""
    chunks = chunks_of(case)
    exps = 2 * ITEM  # written, and read by E W
    accumulator = 4 + 8 * (chunks - 1)  # per N·H: written by the first product, read and written by the others
    finish, backward = 4 + ITEM, 2 * ITEM
    tile = listed((card.capability, "plain")).columns
    partials = 2 * 16 / tile  # policy and reference: a top and a sum, written and read
    return exps + (accumulator + finish + backward) * case.hidden / case.vocab + partials


def chunks_of(case: HeadCase) -> int:
    return plan_fused(case.rows, case.vocab, ITEM, WORKSPACE, unit_gradient=True).chunks(case.vocab)


def predict(case: HeadCase, card: Card, counts: Counts) -> Prediction:
    """From the launches that were counted with as many chunks as this case takes."""
    product = case.flops / 3 / (card.teraflops * 1e12)
    moved = bytes_per_logit(case, card) * case.rows * case.vocab / (card.gigabytes_per_second * 1e9)
    device = 2 * product / card.main_loop + product + moved
    host = HOST_TRITON * counts.grids + HOST_PRODUCT * (counts.products + counts.others)
    predicted = max(device, host)
    return Prediction(
        card.name, case.rows, case.hidden, case.vocab, counts.launches, round(bytes_per_logit(case, card), 3),
        round(1e3 * host, 3), round(1e3 * predicted, 3), round(3e3 * product, 3), round(predicted / (3 * product), 4),
    )  # fmt: skip


def counted(chunks: Sequence[int]) -> list[Counts]:
    """Launches of head calls, counted in a process where Triton interprets."""
    command = [sys.executable, "-m", "benchmarks.launches", *map(str, chunks)]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"counting launches failed:\n{done.stderr[-2000:]}")
    return [Counts(**each) for each in json.loads(done.stdout)]


def predictions() -> list[Prediction]:
    """Of every case on every card."""
    chunks = sorted({chunks_of(case) for case in GPU_HEADS})
    by_chunks = dict(zip(chunks, counted(chunks), strict=True))
    return [predict(case, card, by_chunks[chunks_of(case)]) for case in GPU_HEADS for card in CARDS]


def as_json() -> str:
    return json.dumps([asdict(each) for each in predictions()], indent=1)


def run(settings: Settings) -> list[Figure]:
    cases = {(case.rows, case.hidden, case.vocab): case for case in GPU_HEADS}
    figures = []
    for each in predictions():
        case = cases[each.rows, each.hidden, each.vocab]
        target = TARGETS.get((each.card, case), math.inf)
        figures.append(
            Figure(
                f"{case.name} (model)",
                each.card,
                each.predicted_ms,
                "ms",
                "3 GEMMs' FLOPs",
                each.bare_ms,
                each.ratio,
                at_most(target) if math.isfinite(target) else None,
                f"{each.launches} launches, {each.host_ms:.2f} ms of host; {each.bytes_per_logit:.2f} bytes per logit",
            )
        )
    return figures
