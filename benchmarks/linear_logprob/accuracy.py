"""Error of a completion's summed log-prob against float64 on the same inputs, beside plain logits in their dtype."""

from __future__ import annotations

import statistics

import torch
from torch import Tensor

from benchmarks import cases
from benchmarks.cases import HeadCase
from benchmarks.contenders import fastdpo_logps
from benchmarks.report import Figure
from benchmarks.settings import Settings

TITLE = "accuracy: median error of a completion's summed log-prob, in nats"


def logits_logps(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Logits in the inputs' dtype, their log-softmax in float32."""
    return (hidden @ weight.t()).float().log_softmax(-1).gather(1, targets[:, None]).squeeze(1)


def errors(case: HeadCase, dtype: torch.dtype, completions: int) -> tuple[list[float], list[float]]:
    """|error| of fastdpo and of plain logits, per completion of `case.rows` tokens drawn from the model itself."""
    generator = torch.Generator().manual_seed(1)
    weight = cases.head_weight(case, dtype, generator)
    exact_weight = weight.double()
    ours, plain = [], []
    for _ in range(completions):
        hidden = torch.randn(case.rows, case.hidden, generator=generator).to(dtype)
        logps = (hidden.double() @ exact_weight.t()).log_softmax(-1)
        below = logps.exp().cumsum(1)
        drawn = torch.rand(case.rows, 1, dtype=torch.float64, generator=generator) * below[:, -1:]
        targets = torch.searchsorted(below, drawn).clamp(max=case.vocab - 1)
        truth = logps.gather(1, targets).sum()
        targets = targets.squeeze(1)
        ours.append(float((fastdpo_logps(hidden, weight, targets).double().sum() - truth).abs()))
        plain.append(float((logits_logps(hidden, weight, targets).double().sum() - truth).abs()))
    return ours, plain


def run(settings: Settings) -> list[Figure]:
    case = cases.TINY_HEAD[0] if settings.tiny else cases.ACCURACY_CASE
    figures = []
    for dtype, completions in cases.ACCURACY_COMPLETIONS.items():
        ours, plain = (statistics.median(found) for found in errors(case, dtype, completions))
        name = str(dtype).removeprefix("torch.")
        note = f"{completions} completions, {plain / ours:.3g} × smaller"
        figures.append(
            Figure(f"{case.name}, {name}", "fastdpo", ours, "", f"logits in {name}", plain, ours / plain, note=note)
        )
    return figures
