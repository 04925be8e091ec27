"""dL/dlogp of a part of the batch, evaluated alone, is that of the whole batch's loss."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from fastdpo.formulas import oracle
from fastdpo.training.objectives import PreferenceObjective
from fastdpo.training.scoring import Scores

PAIRS = 7
#: Options of a run, and what the oracle is called with besides.
RUNS: dict[str, dict[str, Any]] = {
    "sigmoid": {},
    "label smoothing": {"label_smoothing": 0.2},
    "sft": {"loss_type": ["sft"]},
    "WPO": {"use_weighting": True, "loss_type": ["sigmoid", "sft"], "loss_weights": [0.7, 0.3]},
    "a mixture": {
        "loss_type": ["cpo_simpo", "sft", "robust", "sigmoid"],
        "loss_weights": [0.5, 2.0, 0.25, 1.0],
        "label_smoothing": 0.1,
        "simpo_gamma": 0.3,
        "cpo_alpha": 0.8,
    },
    "the same twice": {"loss_type": ["sft", "ipo", "sft"], "loss_weights": [1.0, 0.5, 0.25]},
    "divergence": {
        "loss_type": ["sigmoid", "sft"],
        "f_divergence_type": "alpha_divergence",
        "f_alpha_divergence_coef": 0.3,
    },
    "discopop": {"loss_type": ["discopop"], "discopop_tau": 0.2},
}
_PARAMETERS = ("simpo_gamma", "cpo_alpha", "f_alpha_divergence_coef", "discopop_tau")


def scores() -> Scores:
    """Of unequal lengths, one of them 0, in float64."""
    generator = torch.Generator().manual_seed(3)
    drawn = [torch.randn(2, PAIRS, generator=generator, dtype=torch.float64) for _ in range(4)]
    lengths = torch.tensor([3.0, 1.0, 0.0, 8.0, 2.0, 5.0, 13.0], dtype=torch.float64)
    return Scores(*drawn[:3], torch.stack([lengths, lengths.flip(0)]), drawn[3][None])


@pytest.mark.parametrize("name", RUNS)
def test_parts_have_the_derivatives_of_the_whole(name: str, tmp_path: Path) -> None:
    options = RUNS[name]
    objective = PreferenceObjective(tiny.config(tmp_path, backend="torch", **options))
    everyone = scores()
    leaves = [x.clone().requires_grad_() for x in (everyone.logps, everyone.sums)]
    # WPO, 2406.11827 eq. 2: of both completions exp(mean of log p_y − log Σ p²)
    weights = ((everyone.sums - everyone.statistics[0]) / everyone.lengths.clamp(min=1)).sum(0).exp()
    loss = oracle.preference_loss(
        *leaves[0],
        *everyone.ref_logps,
        sft_logps=leaves[1][0],
        beta=0.5,
        chosen_lengths=everyone.lengths[0],
        rejected_lengths=everyone.lengths[1],
        pair_weights=weights if options.get("use_weighting") else None,
        f_divergence=options.get("f_divergence_type", "reverse_kl"),
        **{
            key: options[key]
            for key in ("loss_type", "loss_weights", "label_smoothing", *_PARAMETERS)
            if key in options
        },
    ).loss
    expected = torch.autograd.grad(loss, leaves, allow_unused=True)
    whole, output = objective.evaluate(everyone, None)
    torch.testing.assert_close(output.loss, loss, rtol=1e-12, atol=0.0)
    parts = [torch.tensor(part) for part in ([4], [6, 0, 2], [5, 1, 3])]
    size = objective.size(everyone)
    found = [objective.coefficients(everyone.at(part), size) for part in parts]
    order = torch.argsort(torch.cat(parts))
    for key, truth in zip(("logps", "sums"), expected, strict=True):
        truth = torch.zeros(2, PAIRS, dtype=torch.float64) if truth is None else truth
        assert truth.any() or key == "sums" or options.get("loss_type") == ["sft"]
        torch.testing.assert_close(getattr(whole, key), truth, rtol=1e-12, atol=1e-15)
        torch.testing.assert_close(
            torch.cat([getattr(part, key) for part in found], dim=1)[:, order], truth, rtol=1e-12, atol=1e-15
        )
