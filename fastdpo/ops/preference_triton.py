"""The triton backend of `fastdpo.ops.preference_loss`: options unpacked, launchers called."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fastdpo.ops.preference_loss import LossOptions, PlanOptions
from fastdpo_kernels import dynamic_beta
from fastdpo_kernels import preference_loss as kernels

preference_margins = kernels.preference_margins
row_sums = kernels.row_sums


def preference_loss(*arguments: Any) -> tuple[Tensor, ...]:
    return kernels.preference_loss(arguments[:9], *arguments[9:12], *LossOptions.unpacked(*arguments[12:]))


def planned_preference_loss(*arguments: Any) -> tuple[Tensor, ...]:
    plan_options, loss_options = PlanOptions.unpacked(*arguments[14:17]), LossOptions.unpacked(*arguments[17:])
    all_margins, first_pair, m0, sigma, step = arguments[9:14]
    return kernels.planned_preference_loss(
        arguments[:9], all_margins, first_pair, m0, sigma, step, plan_options, loss_options
    )


def plan_batch(margins: Tensor, m0: Tensor, sigma: Tensor, step: Tensor, *options: Any) -> tuple[Tensor, ...]:
    return dynamic_beta.dynamic_beta(margins, m0, sigma, step, *PlanOptions.unpacked(*options))
