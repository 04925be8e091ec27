"""Inputs of the head's fused product, and what plain torch and float64 make of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import fastdpo

#: Error beyond plain torch's, relative to the largest value: of log-probs, of gradients.
SLACK = {torch.float32: (1e-6, 2e-6), torch.bfloat16: (1e-6, 2**-7), torch.float16: (1e-6, 2**-10)}
MATMUL = torch.backends.cuda.matmul


def problem(rows: int, hidden: int, vocab: int, dtype: torch.dtype, *, spread: float = 3.0) -> dict[str, Tensor]:
    """Logits of about the standard deviation `spread`."""
    g = torch.Generator().manual_seed(rows + hidden + vocab)
    return {
        "hidden": torch.randn(rows, hidden, generator=g).to(dtype),
        "weight": (spread / hidden**0.5 * torch.randn(vocab, hidden, generator=g)).to(dtype),
        "targets": torch.randint(0, vocab, (rows,), generator=g),
        "bias": torch.randn(vocab, generator=g).to(dtype),
        "grad": torch.randn(rows, generator=g),
    }


def ours(data: dict[str, Tensor], *, biased: bool = False, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Policy's log-probs, gradient of Σ grad·logp, reference's log-probs."""
    bias = data["bias"] if biased else None
    hidden = data["hidden"].clone().requires_grad_()
    call = {"bias": bias, "backend": "triton", **options}
    logps = fastdpo.linear_logprob(hidden, data["weight"], data["targets"], **call)
    (gradient,) = torch.autograd.grad(logps, hidden, data["grad"])
    with torch.no_grad():
        scored = fastdpo.linear_logprob(data["hidden"], data["weight"], data["targets"], **call)
    return logps.detach(), gradient, scored
