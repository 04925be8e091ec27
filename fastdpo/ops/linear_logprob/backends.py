"""The implementations of `linear_logprob`: the tile loop with each backend's fold, or Triton's fused product."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from fastdpo.ops.linear_logprob import tile_loop
from fastdpo.ops.linear_logprob.fold_torch import TorchFold
from fastdpo.ops.linear_logprob.head import Head
from fastdpo.ops.linear_logprob.operators import check_head_tensors
from fastdpo.ops.linear_logprob.tile_loop import MakeFold
from fastdpo.ops.targets import check_targets

logger = logging.getLogger(__name__)


def _scored_rows(targets: Tensor, ignore_index: int | None) -> Tensor | None:
    """Indices of the rows that are not ignored; None for all of them. On a GPU this waits for the count."""
    if ignore_index is None:
        return None
    scored = (targets != ignore_index).nonzero().squeeze(1)
    return None if len(scored) == len(targets) else scored


def _head(weight: Tensor, bias: Tensor | None, options: Sequence[Any]) -> Head:
    # Kernels read a bias without a stride
    return Head(weight, None if bias is None else bias.contiguous(), *options)


def _forward(
    make_fold: MakeFold,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    ignore_index: int | None,
    *options: Any,
    fused: Callable[[Head, bool, Sequence[str]], bool] = lambda *_: False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """fused: whether the fused product serves a head, a unit gradient and statistics."""
    *head_options, unit_gradient, _, stats, workspace = options
    check_head_tensors(hidden, weight, bias, targets)
    check_targets(targets, len(weight), ignore_index)
    targets, head = targets.contiguous(), _head(weight, bias, head_options)
    scored = _scored_rows(targets, ignore_index)
    if fused(head, unit_gradient, stats):
        from fastdpo.ops.linear_logprob import fused as fused_head

        return fused_head.forward(head, hidden, targets, scored, unit_gradient, workspace)
    return tile_loop.forward(make_fold, head, hidden, targets, scored, unit_gradient, stats, workspace)


def _backward(
    make_fold: MakeFold,
    grad: Tensor,
    lse: Tensor,
    logps: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    ignore_index: int | None,
    *options: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    *head_options, needs, workspace = options
    targets, head = targets.contiguous(), _head(weight, bias, head_options)
    scored = _scored_rows(targets, ignore_index)
    return tile_loop.backward(make_fold, head, hidden, targets, scored, lse, logps, grad, needs, workspace)


torch_forward = functools.partial(_forward, TorchFold)
torch_backward = functools.partial(_backward, TorchFold)


def triton_forward(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `torch_forward`; Triton is imported here."""
    from fastdpo.ops.linear_logprob import fused as fused_head
    from fastdpo.ops.linear_logprob.fold_triton import TritonFold

    def fused(head: Head, unit_gradient: bool, stats: Sequence[str]) -> bool:
        reason = fused_head.refusal(head, unit_gradient, stats)
        if reason:
            _tell(reason)
        return not reason

    return _forward(TritonFold, *args, fused=fused)


@functools.cache
def _tell(reason: str) -> None:
    """Once per reason: the numbers are as good, the time is not."""
    logger.warning("linear_logprob folds tiles of logits in memory, not within the product: %s.", reason)


def triton_backward(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    """As `torch_backward`; Triton is imported here."""
    from fastdpo.ops.linear_logprob.fold_triton import TritonFold

    return _backward(TritonFold, *args)
