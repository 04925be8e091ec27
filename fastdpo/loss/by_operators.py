"""A preference loss through the operators, whose kernels are Triton's.

One launch does all, except that losses which sort the batch (aot, aot_unpaired) get their sides permuted first, each
kind in a launch of its own, and that several ranks exchange margins before the plan. In: the tensors of the pairs and
the checked options. Out: a `PreferenceOutput`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor

from fastdpo.formulas import LOSSES, PARAMETERS, BetaPlan, LossOptions, PreferenceOutput
from fastdpo.formulas.checks import check_plan_tensors
from fastdpo.formulas.losses import rank_matching
from fastdpo.loss.dynamic_beta import DynamicBeta, gather_margins, plan_of
from fastdpo.ops.preference_loss import operators as ops
from fastdpo.ops.preference_loss.operators import PackedLoss, PairTensors, packed_together


class _Given(NamedTuple):
    """β as the operators take it, and the pairs kept."""

    beta: Tensor | None
    fixed_beta: float
    keep: Tensor | None


def loss_by_operators(
    pairs: PairTensors,
    options: LossOptions,
    keep: Tensor | None,
    process_group: dist.ProcessGroup | None,
    backend: str,
) -> PreferenceOutput:
    """The loss of `pairs`; `process_group` is of a `DynamicBeta`, `backend` one that serves."""
    packed = _packed(options)
    sorts = any(term.loss.sorts_batch for term in options.terms)
    beta = options.beta
    if isinstance(beta, DynamicBeta) and not sorts:
        output = _planned(pairs, packed, beta, process_group, backend)
    elif isinstance(beta, DynamicBeta):
        margins = ops.preference_margins(*_margin_inputs(pairs), packed.reference_gap, packed.mean_gap, backend)
        plan = beta(margins, process_group, backend=backend)
        output = _sorted(pairs, packed, _Given(plan.beta, 0.0, plan.keep), backend)._replace(plan=plan)
    else:
        fixed = cast(float, beta)
        given = _Given(beta.detach(), 0.0, keep) if isinstance(beta, Tensor) else _Given(None, float(fixed), keep)
        output = _sorted(pairs, packed, given, backend) if sorts else _given(pairs, packed, given, backend)
    return output._replace(loss=output.losses) if options.reduction == "none" else output


def _packed(options: LossOptions) -> PackedLoss:
    terms, base = options.terms, options.beta.beta if isinstance(options.beta, DynamicBeta) else None
    first = terms[0].loss
    return PackedLoss(
        [term.loss.name for term in terms],
        [term.weight for term in terms],
        [float(options.parameters.get(name, PARAMETERS[name].default)) for name in ops.LOSS_PARAMETERS],
        options.label_smoothing,
        options.f_divergence,
        first.needs_reference,
        first.gap == "mean",
        "mean" if options.reduction == "mean" else "sum",
        base if options.reward_beta is None else options.reward_beta,
    )


def _margin_inputs(pairs: PairTensors) -> tuple[Tensor | None, ...]:
    return tuple(None if x is None else x.detach() for x in pairs[:7])


def _output(outputs: Sequence[Tensor], plan: BetaPlan | None = None) -> PreferenceOutput:
    loss, losses, values = outputs[:3]
    chosen_rewards, rejected_rewards, margins = values.unbind(0)
    return PreferenceOutput(loss, losses, chosen_rewards, rejected_rewards, margins, plan)


def _given(pairs: PairTensors, options: PackedLoss, given: _Given, backend: str) -> PreferenceOutput:
    keep = None if given.keep is None else given.keep.detach().bool()
    return _output(ops.preference_loss(*pairs, given.beta, given.fixed_beta, keep, *options.packed(), backend))


def _planned(
    pairs: PairTensors,
    options: PackedLoss,
    module: DynamicBeta,
    process_group: dist.ProcessGroup | None,
    backend: str,
) -> PreferenceOutput:
    """One launch; over several ranks, two and an all-gather of margins between."""
    all_margins, first_pair = None, 0
    if process_group is not None:
        margins = ops.preference_margins(*_margin_inputs(pairs), options.reference_gap, options.mean_gap, backend)
        all_margins, first_pair = gather_margins(margins, process_group)
        backend = ops.serving_backend(backend, pairs.chosen, all_margins.shape[0])
    check_plan_tensors(pairs.chosen.new_empty(pairs.num_pairs), *module.state)
    packed = packed_together(module.plan_options(), options)
    outputs = ops.planned_preference_loss(*pairs, all_margins, first_pair, *module.state, *packed, backend)
    plan = ops.as_plan(outputs[6:])
    if module.training:
        module.commit(plan)
    return _output(outputs, plan_of(plan, slice(first_pair, first_pair + pairs.num_pairs)))


def _sorted(pairs: PairTensors, options: PackedLoss, given: _Given, backend: str) -> PreferenceOutput:
    """A list with losses that match pairs by rank: a call per kind of matching, the sides permuted before."""
    pairs = pairs.per_sequence(lambda values, boundaries: ops.row_sums(values, boundaries, backend))
    keep = torch.ones_like(pairs.chosen, dtype=torch.bool) if given.keep is None else given.keep.detach().bool()
    zeros = torch.zeros_like(pairs.chosen)
    sides = (pairs.chosen, pairs.rejected, pairs.ref_chosen, pairs.ref_rejected)
    w, w_l, ref, ref_l = (zeros if x is None else x.to(torch.promote_types(x.dtype, torch.float32)) for x in sides)
    kept = tuple(torch.where(keep, x, 0.0) for x in (w, w_l, ref, ref_l))
    parts = []
    for matches in dict.fromkeys(LOSSES[name].matches for name in options.loss_types):
        mine = [i for i, name in enumerate(options.loss_types) if LOSSES[name].matches == matches]
        aligned = pairs
        if matches:
            partner = rank_matching(matches, kept[0], kept[1], kept[2], kept[3], keep)
            aligned = pairs._replace(ref_rejected=ref_l[partner])
            aligned = (
                aligned._replace(ref_chosen=ref[partner])
                if matches == "reference"
                else aligned._replace(rejected=w_l[partner])
            )
        own = options._replace(
            loss_types=[options.loss_types[i] for i in mine],
            loss_weights=[options.loss_weights[i] for i in mine],
        )
        parts.append(_given(aligned, own, given._replace(keep=keep), backend))
    loss, losses = parts[0].loss, parts[0].losses
    for part in parts[1:]:
        loss, losses = loss + part.loss, losses + part.losses
    with torch.no_grad():
        margins = ops.preference_margins(*_margin_inputs(pairs), options.reference_gap, options.mean_gap, backend)
        fixed = given.fixed_beta if given.beta is None else given.beta.to(w)
        scale = fixed if options.reward_beta is None else options.reward_beta
        rewards = scale * (w - ref), scale * (w_l - ref_l)
    return PreferenceOutput(loss, losses, *rewards, margins)
