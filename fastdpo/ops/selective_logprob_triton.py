"""`selective_logprob` by Triton's kernels: one launch where logits have up to two leading strides, and no copy."""

from __future__ import annotations

import torch
from torch import Tensor

from fastdpo.ops.row_views import statistics_dtype, views
from fastdpo.ops.selective_logprob import check_logits
from fastdpo.ops.targets import check_targets
from fastdpo_kernels import selective_logprob as kernels


def forward(logits: Tensor, targets: Tensor, ignore_index: int | None, temperature: float) -> tuple[Tensor, Tensor]:
    """logps and lse, both (...)."""
    check_logits(logits, targets)
    check_targets(targets, logits.shape[-1], ignore_index)
    flat_targets = targets.reshape(-1).contiguous()
    logps = torch.empty(targets.shape, dtype=statistics_dtype(logits), device=logits.device)
    lse = torch.empty_like(logps)
    flat_logps, flat_lse = logps.view(-1), lse.view(-1)
    with torch.cuda.device_of(logits):
        for rows, view in views(logits, 2):
            kernels.selective_logprob(
                view,
                flat_targets[rows],
                flat_logps[rows],
                flat_lse[rows],
                ignore_index=ignore_index,
                temperature=temperature,
            )
    return logps, lse


def backward(
    grad: Tensor, logits: Tensor, targets: Tensor, lse: Tensor, ignore_index: int | None, temperature: float
) -> Tensor:
    """dL/dlogits (..., V) for grad = dL/dlogps (...), contiguous."""
    gradient = logits.new_empty(logits.shape)
    _backward(grad, logits, targets, lse, ignore_index, temperature, gradient.view(-1, logits.shape[-1]))
    return gradient


def backward_(
    grad: Tensor, logits: Tensor, targets: Tensor, lse: Tensor, ignore_index: int | None, temperature: float
) -> None:
    """`backward`, over the logits."""
    _backward(grad, logits, targets, lse, ignore_index, temperature, None)
    # A kernel tells autograd nothing: whoever else saved these logits must find them changed
    torch.autograd.graph.increment_version(logits)


def _backward(
    grad: Tensor,
    logits: Tensor,
    targets: Tensor,
    lse: Tensor,
    ignore_index: int | None,
    temperature: float,
    out: Tensor | None,
) -> None:
    """Write dL/dlogits into out (N, V), or over the logits."""
    grad, targets, lse = (tensor.reshape(-1).contiguous() for tensor in (grad, targets, lse))
    with torch.cuda.device_of(logits):
        for rows, view in views(logits, 2):
            kernels.selective_logprob_backward(
                grad[rows],
                view,
                targets[rows],
                lse[rows],
                view if out is None else out[rows].view(view.shape),
                ignore_index=ignore_index,
                temperature=temperature,
            )
