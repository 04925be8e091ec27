"""`linear_preference_loss` on a preference batch beside its peers: inputs, loss and gradients alike, checked first."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from benchmarks import cases, contenders
from benchmarks.cases import PairInputs
from benchmarks.contenders import Outcome
from benchmarks.report import Figure, Target, at_least, at_most
from benchmarks.settings import Settings
from benchmarks.timing import interleave, synchronizer

TITLE = "peers: policy forward + backward to the hidden states, reference forward, sigmoid DPO loss"
#: Largest relative error of the loss, and of the gradient in its own norm, against float64 on the same inputs.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-1}


@dataclass(frozen=True)
class Peer:
    """Attributes:
    call: the contender.
    gemms: head GEMMs it needs.
    all_rows: it scores prompt and padding rows too.
    target: how many times fastdpo's time it takes at least.
    """

    call: Callable[[PairInputs], Outcome]
    gemms: int
    all_rows: bool
    target: Target | None = None


PEERS = {
    "fastdpo": Peer(contenders.fastdpo_pairs, 3, False),
    "Liger": Peer(contenders.liger_pairs, 3, True, at_least(6.5)),
    "TRL's head on this CPU": Peer(contenders.trl_pairs, 4, True, at_least(16)),
    "TRL's head, scored rows": Peer(contenders.trl_scored_pairs, 4, False, at_least(3.8)),
    "full logits": Peer(contenders.full_logits_pairs, 3, True),
}


def run(settings: Settings) -> list[Figure]:
    case = cases.TINY_PAIR if settings.tiny else cases.PAIR_CASE
    inputs = cases.pair_inputs(case, settings.dtype)
    sequences, length, hidden = inputs.hidden.shape
    scored = inputs.scored_rows
    name = f"{sequences} sequences × {length}, {scored} rows scored, H = {hidden}, V = {case.vocab:,}"
    available, figures = importable(name)
    timings = interleave(
        {peer: partial(PEERS[peer].call, inputs) for peer in available},
        settings.repeats,
        settings.budget,
        synchronizer(inputs.hidden.device),
    )
    truth = contenders.true_pairs(inputs)
    for peer, timing in timings.items():
        assert timing.result is not None
        figures.append(agreement(name, peer, timing.result, truth, settings.dtype))
    ours = timings["fastdpo"].best
    for peer, timing in timings.items():
        rows = sequences * length if PEERS[peer].all_rows else scored
        figures.append(
            Figure(
                name,
                peer,
                1e3 * timing.best,
                "ms",
                "" if peer == "fastdpo" else "fastdpo",
                None if peer == "fastdpo" else 1e3 * ours,
                None if peer == "fastdpo" else timing.best / ours,
                settings.target(PEERS[peer].target),
                f"{rows} rows, {PEERS[peer].gemms} GEMMs, {case.flops(rows, PEERS[peer].gemms) / 1e9:.0f} GFLOP; "
                f"best of {len(timing.seconds)}",
            )
        )
    return figures


def importable(case: str) -> tuple[list[str], list[Figure]]:
    """The peers that are installed, and a figure without a number for each of the others."""
    available, missing = [], []
    requirements = {"Liger": "liger_kernel.chunked_loss", "TRL's head": "trl.trainer.utils"}
    for peer in PEERS:
        module = next((module for prefix, module in requirements.items() if peer.startswith(prefix)), None)
        try:
            if module is not None:
                __import__(module)
        except ImportError as error:
            missing.append(Figure(case, peer, note=f"not measured: {error}"))
        else:
            available.append(peer)
    return available, missing


def agreement(case: str, peer: str, outcome: Outcome, truth: Outcome, dtype: torch.dtype) -> Figure:
    """The larger of two relative errors, of the loss and of the gradient, beside what is allowed.

    Raises:
        ValueError: it is larger: what computes something else is not timed against.
    """
    gap = (outcome.hidden_grad.double() - truth.hidden_grad.double()).norm()
    errors = float((outcome.loss - truth.loss).abs() / truth.loss.abs()), float(gap / truth.hidden_grad.double().norm())
    allowed = TOLERANCE[dtype]
    if not max(errors) <= allowed:
        raise ValueError(f"{peer} differs from float64: loss by {errors[0]:.1e}, gradient by {errors[1]:.1e}.")
    note = f"loss {float(outcome.loss):.6f} off by {errors[0]:.0e}, gradient by {errors[1]:.0e}"
    return Figure(
        case, f"{peer}: error", max(errors), "", "allowed", allowed, max(errors) / allowed, at_most(1.0), note
    )
