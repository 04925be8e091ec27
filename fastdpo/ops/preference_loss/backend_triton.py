"""The triton backend of `fastdpo.ops.preference_loss.operators`: options unpacked, launchers called."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastdpo.formulas.checks import check_plan_tensors, check_preference_tensors
from fastdpo.ops.preference_loss.operators import PackedLoss, PackedPlan, PairTensors, unpacked_together
from fastdpo.ops.preference_loss.rows import expand_rows
from fastdpo_kernels.preference_loss import dynamic_beta, sequence_logps
from fastdpo_kernels.preference_loss import loss as kernels

row_sums = sequence_logps.row_sums


def preference_margins(*arguments: Any) -> Tensor:
    check_preference_tensors(PairTensors(*arguments[:7])._asdict(), backend="triton")
    return sequence_logps.preference_margins(*arguments)


def preference_loss(*arguments: Any) -> tuple[Tensor, ...]:
    beta, _, keep = arguments[9:12]
    check_preference_tensors(PairTensors(*arguments[:9])._asdict(), beta=beta, keep=keep, backend="triton")
    return kernels.preference_loss(arguments[:9], *arguments[9:12], *PackedLoss.unpacked(*arguments[12:]))


def planned_preference_loss(*arguments: Any) -> tuple[Tensor, ...]:
    plan, loss = unpacked_together(*arguments[14:])
    all_margins, first_pair, m0, sigma, step = arguments[9:14]
    pairs = PairTensors(*arguments[:9])
    check_preference_tensors(pairs._asdict(), backend="triton")
    check_plan_tensors(pairs.chosen.new_empty(pairs.num_pairs) if all_margins is None else all_margins, m0, sigma, step)
    return kernels.planned_preference_loss(arguments[:9], all_margins, first_pair, m0, sigma, step, plan.flat(), loss)


def plan_batch(margins: Tensor, m0: Tensor, sigma: Tensor, step: Tensor, *options: Any) -> tuple[Tensor, ...]:
    check_plan_tensors(margins, m0, sigma, step, backend="triton")
    return dynamic_beta.dynamic_beta(margins, m0, sigma, step, *PackedPlan.unpacked(*options).flat())


def scale_diagonal(
    diagonal: Tensor, boundaries: Tensor | None, count: Tensor, grad_loss: Tensor | None, grad_losses: Tensor | None
) -> Tensor:
    """Derivatives of the reduced loss, (…, B) or (N,) with boundaries, times the upstream ones of loss and losses."""
    if grad_losses is None:
        assert grad_loss is not None
        return diagonal * grad_loss
    # `losses` are not divided by the count
    upstream = grad_losses * count if grad_loss is None else grad_losses * count + grad_loss
    if boundaries is not None:
        upstream = expand_rows(torch.cat([upstream, upstream]), boundaries, diagonal.shape[-1])
    return diagonal * upstream
