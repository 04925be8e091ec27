"""Two runs that must be one: three kinds of run, what is kept of a step, and how far two may differ."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import TrainerCallback

CUTS = {
    "plain": {},
    "dynamic": {"dynamic_beta": True, "keep_ratio": 0.7},
    "weighted": {"use_weighting": True, "ld_alpha": 0.5, "loss_type": ["sigmoid", "sft"], "learning_rate": 5.0},
}


class KeepGradients(TrainerCallback):
    """Stores the first step's gradients."""

    def __init__(self) -> None:
        self.grads: dict[str, torch.Tensor] = {}

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if not self.grads:
            self.grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_run(one: Any, other: Any) -> None:
    """Weights to 1e-5, and every logged metric to 1e-4 relative."""
    assert one[0].keys() == other[0].keys()
    for name, value in one[0].items():
        torch.testing.assert_close(
            other[0][name], value, rtol=1e-5, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
        )
    for a, b in zip(one[1], other[1], strict=True):
        untimed = a.keys() - {"train_runtime", "train_samples_per_second", "train_steps_per_second"}
        # At the first step the policy is its reference, and the sign of a gap is the sign of its rounding
        equal_models = abs(a.get("rewards/margins", 1.0)) < 1e-5
        for key in untimed - ({"rewards/accuracies"} if equal_models else set()):
            assert b[key] == pytest.approx(a[key], rel=1e-4, abs=1e-5), key
