"""A preference loss on the torch backend, which is the oracle itself: a `DynamicBeta` plans first, then the formulas.

In: the tensors of the pairs and the checked options. Out: a `PreferenceOutput`, differentiable once.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastdpo.formulas import LossOptions, PreferenceOutput, oracle
from fastdpo.loss.dynamic_beta import DynamicBeta
from fastdpo.ops.preference_loss.operators import PairTensors


def loss_by_oracle(
    pairs: PairTensors, options: LossOptions, keep: Tensor | None, process_group: dist.ProcessGroup | None
) -> PreferenceOutput:
    """The loss of `pairs`; `process_group` is of a `DynamicBeta`."""
    pairs = _once_differentiable(pairs).per_sequence(_sum_rows)
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


class _OnceDifferentiable(torch.autograd.Function):
    """The identity, whose derivative cannot be differentiated: as with the operators, a second derivative raises."""

    @staticmethod
    def forward(ctx: Any, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(x.view_as(x) for x in tensors)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        return grads


def _once_differentiable(pairs: PairTensors) -> PairTensors:
    # A compiled graph refuses the second derivative itself
    names = [name for name, x in zip(pairs._fields, pairs, strict=True) if x is not None and x.requires_grad]
    if not names or torch.compiler.is_compiling():
        return pairs
    guarded = _OnceDifferentiable.apply(*(getattr(pairs, name) for name in names))
    return pairs._replace(**dict(zip(names, guarded, strict=True)))


def _sum_rows(token_logps: Tensor, boundaries: Tensor) -> Tensor:
    """(N,) token log-probs, (R + 1,) boundaries → (R,) sums, in float32 at least; tokens outside the rows are left."""
    values = token_logps.to(torch.promote_types(token_logps.dtype, torch.float32))
    return torch.segment_reduce(values.contiguous(), "sum", offsets=boundaries, unsafe=True, initial=0.0)
