"""Inputs of `linear_logprob`, and one call with its gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

BACKENDS = ("torch", "triton")


def problem(
    rows: int, hidden: int, vocab: int, dtype: torch.dtype, *, ignored: bool = False, scale: float = 1.0
) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(rows + hidden + vocab)
    targets = torch.randint(0, vocab, (rows,), generator=g)
    targets[:2] = torch.tensor([0, vocab - 1])[:rows]
    if ignored:
        targets[::3] = -100
    return {
        "hidden": (scale * torch.randn(rows, hidden, generator=g)).to(dtype),
        "weight": torch.randn(vocab, hidden, generator=g).to(dtype),
        "bias": torch.randn(vocab, generator=g).to(dtype),
        "targets": targets,
    }


def plain(hidden: Tensor, weight: Tensor, targets: Tensor, *, bias: Tensor | None = None, **options: Any) -> Any:
    """What everybody writes: logits in the inputs' dtype, softmax in float32."""
    softcap, scale = options.get("softcap"), options.get("logit_scale", 1.0)
    logits = torch.nn.functional.linear(hidden, weight, bias) * scale
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    logits = logits.float() / options.get("temperature", 1.0)
    log_probs = logits.log_softmax(-1)
    ignored = targets == -100
    logps = log_probs.gather(1, targets.clamp(min=0)[:, None])[:, 0].masked_fill(ignored, 0.0)
    return logps, {}
