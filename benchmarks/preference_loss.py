"""`preference_loss` with all that follows the head: sums, margins, dynamic β (plan and commit), and the gradient."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks import cases
from benchmarks.cases import LossCase
from benchmarks.report import Figure, at_most
from benchmarks.settings import Settings
from benchmarks.timing import interleave, synchronizer
from fastdpo import DynamicBeta, preference_loss
from fastdpo.loss import token_preference_loss

TITLE = "loss: all that follows the head, dynamic β included, forward + backward, torch backend"
#: Calls per repeat, as one takes less than a millisecond.
CALLS = 60
#: Where: `benchmarks.gpu.preference_loss` asks a card.
DEVICE = "cpu"


def steps(case: LossCase, device: str = DEVICE) -> dict[str, Callable[[], Tensor]]:
    """The work from summed log-probs, and from those per token; each returns the gradient."""
    tokens, ref_tokens, boundaries = cases.loss_inputs(case, device=device)
    lengths = boundaries.diff().tolist()
    sums = torch.stack([part.sum() for part in tokens.detach().split(lengths)]).requires_grad_()
    references = torch.stack([part.sum() for part in ref_tokens.split(lengths)])
    dynamic_beta = DynamicBeta(backend="torch").to(device)

    def from_sums() -> Tensor:
        loss = preference_loss(*sums.chunk(2), *references.chunk(2), beta=dynamic_beta, backend="torch").loss
        return torch.autograd.grad(loss, sums)[0]

    def from_tokens() -> Tensor:
        loss = token_preference_loss(tokens, boundaries, ref_tokens, beta=dynamic_beta, backend="torch").loss
        return torch.autograd.grad(loss, tokens)[0]

    return {"from sums": from_sums, "from tokens": from_tokens}


def run(settings: Settings) -> list[Figure]:
    figures = []
    for case in cases.TINY_LOSS if settings.tiny else cases.LOSS_CASES:
        timings = interleave(steps(case), CALLS * settings.repeats, settings.budget, synchronizer(DEVICE))
        for name, timing in timings.items():
            best, median = 1e3 * timing.best, 1e3 * timing.median
            for what, value in (("best", best), ("median", median)):
                figures.append(
                    Figure(
                        f"{case.pairs} pairs",
                        f"{name}, {what}",
                        value,
                        "ms",
                        "target" if case.target_ms else "",
                        case.target_ms,
                        value / case.target_ms if case.target_ms else None,
                        settings.target(at_most(1.0 if case.target_ms else None)),
                        f"{len(timing.seconds)} calls",
                    )
                )
    return figures
