"""Peak memory of the head's forward and backward above its inputs, each case in a process of its own.

`python -m benchmarks.linear_logprob.memory CASE CONTENDER THREADS DTYPE` measures one and prints bytes; CASE is
rows,hidden,vocab.
"""

from __future__ import annotations

import subprocess
import sys

import psutil
import torch

from benchmarks import cases
from benchmarks.cases import HeadCase
from benchmarks.contenders import POLICY_HEADS
from benchmarks.process import ROOT, reset_peak, status
from benchmarks.report import Figure, at_most
from benchmarks.settings import Settings
from fastdpo.ops.linear_logprob.tiles import plan_tiles

TITLE = "memory: peak of policy forward + backward above the inputs (hidden.grad, N × H, is part of it)"
MIB = 2**20
#: Allowed above tile and gradient: statistics of the rows, the GEMM's packing buffers, the allocator's slack.
SLACK = 16 * MIB
#: Copies of the (N, V) logits in float32 that a peer without tiles may hold: logits, log-probs, two gradients.
FULL_COPIES = 4


def run(settings: Settings) -> list[Figure]:
    figures = []
    for case in cases.TINY_HEAD[:1] if settings.tiny else cases.MEMORY_CASES:
        if case.heavy and not settings.full:
            figures.append(Figure(case.name, "fastdpo", note="takes long; --full measures it"))
            continue
        gradient = case.rows * case.hidden * settings.dtype.itemsize
        tile = plan_tiles(case.rows, case.vocab, case.hidden).bytes()
        bound = tile + case.rows * case.hidden * 4 + SLACK
        ours = measured(case, "fastdpo", settings)
        figures.append(
            Figure(
                case.name,
                "fastdpo",
                ours / MIB,
                "MiB",
                "tile + N × H × 4 + 16 MiB",
                bound / MIB,
                ours / bound,
                settings.target(at_most(1.0)),
                f"tile {tile / MIB:.1f} MiB, hidden.grad {gradient / MIB:.1f} MiB",
            )
        )
        for peer in [name for name in POLICY_HEADS if name != "fastdpo"] if case.peers and not settings.tiny else ():
            figures.append(_peer_figure(case, peer, ours, settings))
    return figures


def _peer_figure(case: HeadCase, peer: str, ours: int, settings: Settings) -> Figure:
    needed = FULL_COPIES * 4 * case.rows * case.vocab
    if needed > psutil.virtual_memory().available:
        return Figure(case.name, peer, note=f"not run: may need {needed / 2**30:.0f} GiB")
    try:
        peak = measured(case, peer, settings)
    except ModuleNotFoundError as error:
        return Figure(case.name, peer, note=f"not measured: {error}")
    return Figure(case.name, peer, peak / MIB, "MiB", "fastdpo", ours / MIB, peak / ours)


def measured(case: HeadCase, contender: str, settings: Settings) -> int:
    """Bytes, from a fresh process.

    Raises:
        ModuleNotFoundError: the contender is not installed.
        RuntimeError: the process failed otherwise.
    """
    shape = f"{case.rows},{case.hidden},{case.vocab}"
    dtype = str(settings.dtype).removeprefix("torch.")
    command = [sys.executable, "-m", "benchmarks.linear_logprob.memory", shape, contender, str(settings.threads), dtype]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode != 0:
        last = done.stderr.strip().splitlines()[-1]
        kind = ModuleNotFoundError if last.startswith("ModuleNotFoundError") else RuntimeError
        raise kind(f"{contender} on {case.name}: {last}")
    return int(done.stdout)


def growth(case: HeadCase, contender: str, dtype: torch.dtype) -> int:
    """Bytes by which the peak of this process exceeds what it holds before the call."""
    call = POLICY_HEADS[contender]
    call(cases.head_inputs(HeadCase(16, 32, 64), dtype))  # loads BLAS and its threads
    inputs = _cheap_inputs(case, dtype)
    before = reset_peak()
    gradient = call(inputs)
    peak = status("VmHWM")
    assert gradient.shape == inputs.hidden.shape
    return peak - before


def _cheap_inputs(case: HeadCase, dtype: torch.dtype) -> cases.HeadInputs:
    """Inputs whose weight repeats a small one, as drawing half a billion numbers takes longer than the call."""
    small = cases.head_inputs(HeadCase(case.rows, case.hidden, min(case.vocab, 1000)), dtype)
    weight = torch.empty(case.vocab, case.hidden, dtype=dtype)
    for part in weight.split(len(small.weight)):
        part.copy_(small.weight[: len(part)])
    return cases.HeadInputs(small.hidden, small.ref_hidden, weight, small.targets, small.grad_logps)


def main(shape: str, contender: str, threads: str, dtype: str) -> None:
    torch.set_num_threads(int(threads))
    rows, hidden, vocab = map(int, shape.split(","))
    print(growth(HeadCase(rows, hidden, vocab), contender, getattr(torch, dtype)))


if __name__ == "__main__":
    main(*sys.argv[1:])
