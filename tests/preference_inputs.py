"""Random pairs for the loss operators, and what they give of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastdpo.formulas import PARAMETERS
from fastdpo.ops.preference_loss import operators as ops

BACKENDS = ["torch", "triton"]
SIDES = ("chosen_logps", "rejected_logps", "ref_chosen_logps", "ref_rejected_logps")
DEFAULTS = [PARAMETERS[name].default for name in ops.LOSS_PARAMETERS]


def random_pairs(n: int, seed: int = 0, spread: float = 3.0, equal: bool = False) -> dict[str, Tensor]:
    """float64; log-ratios of the order of `spread`, or none; lengths 1 … 30."""
    g = torch.Generator().manual_seed(seed)
    ref = -40 + 8 * torch.randn(2, n, generator=g, dtype=torch.float64)
    policy = ref if equal else ref + spread * torch.randn(2, n, generator=g, dtype=torch.float64)
    lengths = torch.randint(1, 30, (2, n), generator=g)
    values = (*policy.clone(), *ref.clone(), *lengths)
    return dict(zip((*SIDES, "chosen_lengths", "rejected_lengths"), values, strict=True))


def cast(data: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """Leaves in `dtype`; the values are those of fp32, so that every precision sees the same problem."""
    return {
        key: value.float().to(dtype).requires_grad_() if value.is_floating_point() else value
        for key, value in data.items()
    }


def results(function: Any, data: dict[str, Any], **options: Any) -> dict[str, Tensor]:
    """Outputs, and the gradients of loss + Σ i·losses_i, so that both ways into the backward count."""
    output = function(**data, **options)
    leaves = [value for value in data.values() if value.requires_grad]
    objective = output.loss.sum() + (torch.arange(len(output.losses)) * output.losses).sum()
    grads = torch.autograd.grad(objective, leaves, allow_unused=True)
    named = {
        f"grad {i}": torch.zeros_like(leaf) if g is None else g
        for i, (leaf, g) in enumerate(zip(leaves, grads, strict=True))
    }
    return {**dict(zip(output._fields[:5], output[:5], strict=True)), **named}


def ragged(lengths: list[int], seed: int = 0, before: int = 0, after: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    boundaries = torch.tensor([before, *lengths]).cumsum(0)
    n = before + sum(lengths) + after
    return -torch.rand(n, generator=g).double(), -torch.rand(n, generator=g).double(), boundaries
