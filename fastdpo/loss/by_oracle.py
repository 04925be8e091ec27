"""A preference loss on the torch backend, which is the oracle itself: a `DynamicBeta` plans first, then the formulas.

In: the tensors of the pairs and the checked options. Out: a `PreferenceOutput`, as often differentiable as torch makes
it, in forward mode and under torch.func too.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fastdpo.formulas import LossOptions, PreferenceOutput, oracle
from fastdpo.loss.dynamic_beta import DynamicBeta
from fastdpo.ops.preference_loss.operators import PairTensors
from fastdpo.ops.preference_loss.rows import sum_rows


def loss_by_oracle(
    pairs: PairTensors, options: LossOptions, keep: Tensor | None, process_group: dist.ProcessGroup | None
) -> PreferenceOutput:
    """The loss of `pairs`; `process_group` is of a `DynamicBeta`."""
    pairs = pairs.per_sequence(sum_rows)
    lengths: dict[str, Any] = {"chosen_lengths": pairs.chosen_lengths, "rejected_lengths": pairs.rejected_lengths}
    assert pairs.rejected is not None
    sides = (pairs.chosen, pairs.rejected, pairs.ref_chosen, pairs.ref_rejected)
    plan = None
    if isinstance(options.beta, DynamicBeta):
        module = options.beta
        with torch.no_grad():
            margins = oracle.preference_gap(*sides, loss_type=options.loss_type, **lengths)
        plan = module(margins, process_group, backend="torch")
        reward_beta = module.beta if options.reward_beta is None else options.reward_beta
        options, keep = replace(options, beta=plan.beta, reward_beta=reward_beta), plan.keep
    output = oracle.preference_loss(
        *sides, keep=keep, pair_weights=pairs.pair_weights, sft_logps=pairs.sft_logps, options=options, **lengths
    )
    return output._replace(plan=plan)
