"""`selective_logprob` by Triton's kernels: one launch where logits have up to two leading strides, and no copy."""

from __future__ import annotations

import torch
from torch import Tensor

from fastdpo.ops.selective_logprob.operators import check_logits
from fastdpo.ops.selective_logprob.row_views import statistics_dtype, views
from fastdpo.ops.targets import check_targets
from fastdpo_kernels import selective_logprob as kernels


def forward(logits: Tensor, targets: Tensor, ignore_index: int | None, temperature: float) -> tuple[Tensor, Tensor]:
    """logps (...) and normalizers (2, ...)."""
    check_logits(logits, targets)
    check_targets(targets, logits.shape[-1], ignore_index)
    flat_targets = targets.reshape(-1).contiguous()
    logps = torch.empty(targets.shape, dtype=statistics_dtype(logits), device=logits.device)
    normalizers = logps.new_empty(2, *targets.shape)
    flat_logps, flat_normalizers = logps.view(-1), normalizers.view(2, -1)
    for rows, view in views(logits, 2):
        kernels.selective_logprob(
            view,
            flat_targets[rows],
            flat_logps[rows],
            flat_normalizers[0, rows],
            flat_normalizers[1, rows],
            ignore_index=ignore_index,
            temperature=temperature,
        )
    return logps, normalizers


def backward(
    grad: Tensor, logits: Tensor, targets: Tensor, normalizers: Tensor, ignore_index: int | None, temperature: float
) -> Tensor:
    """dL/dlogits (..., V) for grad = dL/dlogps (...), contiguous."""
    gradient = logits.new_empty(logits.shape)
    _backward(grad, logits, targets, normalizers, ignore_index, temperature, gradient.view(-1, logits.shape[-1]))
    return gradient


def backward_(
    grad: Tensor, logits: Tensor, targets: Tensor, normalizers: Tensor, ignore_index: int | None, temperature: float
) -> None:
    """`backward`, over the logits."""
    _backward(grad, logits, targets, normalizers, ignore_index, temperature, None)
    # A kernel tells autograd nothing: whoever else saved these logits must find them changed
    torch.autograd.graph.increment_version(logits)


def _backward(
    grad: Tensor,
    logits: Tensor,
    targets: Tensor,
    normalizers: Tensor,
    ignore_index: int | None,
    temperature: float,
    out: Tensor | None,
) -> None:
    """Write dL/dlogits into out (N, V), or over the logits."""
    grad, targets = grad.reshape(-1).contiguous(), targets.reshape(-1).contiguous()
    peak, log_total = normalizers.reshape(2, -1).unbind(0)
    for rows, view in views(logits, 2):
        kernels.selective_logprob_backward(
            grad[rows],
            view,
            targets[rows],
            peak[rows],
            log_total[rows],
            view if out is None else out[rows].view(view.shape),
            ignore_index=ignore_index,
            temperature=temperature,
        )
