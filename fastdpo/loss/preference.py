"""`preference_loss` and `token_preference_loss`: arguments checked, backend chosen.

The torch backend is the oracle itself. On Triton one launch does all, except that losses which sort the batch (aot,
aot_unpaired) get their sides permuted first, each kind in a launch of its own, and that several ranks exchange margins
before the plan.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastdpo.formulas import oracle
from fastdpo.formulas.checks import (
    check_boundaries,
    check_loss_inputs,
    check_loss_options,
    check_pair_tensors,
    check_plan_tensors,
    check_preference_tensors,
    check_sorted_losses,
)
from fastdpo.formulas.losses import LOSSES, LossTerm, rank_matching
from fastdpo.formulas.oracle import BetaPlan, PreferenceOutput, preference_gap
from fastdpo.loss.dynamic_beta import DynamicBeta, gather_margins, plan_of
from fastdpo.ops.preference_loss import operators as ops
from fastdpo.ops.preference_loss.operators import PARAMETERS, LossOptions, PairTensors, packed_together

Reduction = Literal["mean", "sum", "none"]


class _Given(NamedTuple):
    """β as the operators take it, and the pairs kept."""

    beta: Tensor | None
    fixed_beta: float
    keep: Tensor | None


def preference_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor | None = None,
    ref_rejected_logps: Tensor | None = None,
    *,
    loss_type: str | Sequence[str] = "sigmoid",
    loss_weights: Sequence[float] | None = None,
    beta: float | Tensor | DynamicBeta = 0.1,
    keep: Tensor | None = None,
    label_smoothing: float = 0.0,
    chosen_lengths: Tensor | None = None,
    rejected_lengths: Tensor | None = None,
    f_divergence: str = "reverse_kl",
    reduction: Reduction = "mean",
    reward_beta: float | None = None,
    pair_weights: Tensor | None = None,
    sft_logps: Tensor | None = None,
    process_group: dist.ProcessGroup | None = None,
    backend: str = "auto",
    **loss_parameters: float,
) -> PreferenceOutput:
    """A preference loss, or a weighted sum of several, over B pairs. Formulas and sources are in `formulas.losses`.

    Args:
        chosen_logps, rejected_logps: (B,), log-probs of the completions under the policy, summed over tokens.
        ref_chosen_logps, ref_rejected_logps: (B,), the same under the reference. Losses without a reference use them
            for the rewards only.
        beta: float, 0-D or (B,) tensor, without gradient; or a `DynamicBeta`, which then plans this batch in the same
            call and, in training mode, commits its statistics.
        keep: (B,) bool; dropped pairs take no part in the loss or in its mean, whatever their values. Not with a
            `DynamicBeta`, which decides it.
        label_smoothing: ε in [0, 0.5), assumed share of flipped labels.
        chosen_lengths, rejected_lengths: (B,), in tokens; a length of 0 counts as 1.
        f_divergence: reverse_kl, forward_kl, js_divergence or alpha_divergence (with f_alpha_divergence_coef).
        reduction: "mean" over kept pairs (of this rank), "sum" over them, or "none". No pair at all is a loss of 0.
        reward_beta: β0 of the rewards reward_beta·(log-ratio); default `beta`, or the β0 of the `DynamicBeta`.
        pair_weights: (B,), factors of the pairs' losses (WPO, 2406.11827 eq. 2); carry no gradient.
        sft_logps: (B,), log-probs of the chosen completions in the likelihood terms of sft, orpo, cpo and cpo_simpo,
            where `chosen_logps` are weighted by token; default `chosen_logps`.
        process_group: ranks that share the batch of a `DynamicBeta`, each with B pairs.
        backend: "auto", "torch" or "triton", which takes up to 4096 pairs and computes in float32. "auto" takes torch
            where triton cannot serve.
        loss_parameters: parameters of the losses and of the f-divergence, by name.

    Returns:
        Loss, losses, rewards, margins; with a `DynamicBeta` also its plan, for this rank's pairs. Loss and losses are
        differentiable once; a second derivative raises.

    Raises:
        ValueError: an option unknown, out of range or without effect; missing reference or lengths; shapes other than
            (B,); pair weights or one β per pair with a loss that sorts the batch; a backend that cannot serve.
        TypeError: a dtype that does not fit.
    """
    check_pair_tensors(chosen_logps=chosen_logps, rejected_logps=rejected_logps)
    if (ref_chosen_logps is None) != (ref_rejected_logps is None):
        raise ValueError("ref_chosen_logps and ref_rejected_logps go together; pass both or neither.")
    pairs = PairTensors(
        chosen_logps,
        rejected_logps,
        ref_chosen_logps,
        ref_rejected_logps,
        None,
        chosen_lengths,
        rejected_lengths,
        None if pair_weights is None else pair_weights.detach(),
        sft_logps,
    )
    return _preference_loss(
        pairs,
        loss_type=loss_type,
        loss_weights=loss_weights,
        beta=beta,
        keep=keep,
        label_smoothing=label_smoothing,
        f_divergence=f_divergence,
        reduction=reduction,
        reward_beta=reward_beta,
        process_group=process_group,
        backend=backend,
        parameters=loss_parameters,
    )


def token_preference_loss(
    token_logps: Tensor,
    boundaries: Tensor,
    ref_token_logps: Tensor | None = None,
    *,
    ref_logps: Tensor | None = None,
    loss_type: str | Sequence[str] = "sigmoid",
    loss_weights: Sequence[float] | None = None,
    beta: float | Tensor | DynamicBeta = 0.1,
    keep: Tensor | None = None,
    label_smoothing: float = 0.0,
    chosen_lengths: Tensor | None = None,
    rejected_lengths: Tensor | None = None,
    f_divergence: str = "reverse_kl",
    reduction: Reduction = "mean",
    reward_beta: float | None = None,
    pair_weights: Tensor | None = None,
    sft_logps: Tensor | None = None,
    process_group: dist.ProcessGroup | None = None,
    backend: str = "auto",
    **loss_parameters: float,
) -> PreferenceOutput:
    """`preference_loss` of log-probs per token, summed over rows in the same call; options as there.

    Args:
        token_logps: (N,), of the completions' tokens, row after row.
        boundaries: (2B + 1,) int64, not falling, in [0, N] (checked on a CPU): row i is
            token_logps[boundaries[i] : boundaries[i + 1]]; B chosen rows, then their B rejected ones. Tokens before the
            first and after the last take no part.
        ref_token_logps: (N,), the same under the reference, without gradient.
        ref_logps: (2B,), the reference's log-probs summed over rows, instead.
        chosen_lengths, rejected_lengths: (B,); default the rows' lengths.

    Raises:
        As `preference_loss`; ValueError also for both references at once.
    """
    if ref_token_logps is not None and ref_logps is not None:
        raise ValueError("ref_token_logps and ref_logps are the same thing twice; pass one of them.")
    if token_logps.dim() != 1:
        raise ValueError(f"token_logps has shape {tuple(token_logps.shape)}; pass (N,), row after row.")
    if ref_logps is not None and ref_logps.shape != (boundaries.numel() - 1,):
        raise ValueError(f"ref_logps has shape {tuple(ref_logps.shape)}; boundaries say ({boundaries.numel() - 1},).")
    if not torch.compiler.is_compiling():
        check_boundaries(boundaries, token_logps)
    ref_chosen, ref_rejected = (None, None) if ref_logps is None else ref_logps.chunk(2)
    pairs = PairTensors(
        token_logps,
        None,
        ref_chosen if ref_token_logps is None else ref_token_logps.detach(),
        ref_rejected,
        boundaries,
        chosen_lengths,
        rejected_lengths,
        None if pair_weights is None else pair_weights.detach(),
        sft_logps,
    )
    return _preference_loss(
        pairs,
        loss_type=loss_type,
        loss_weights=loss_weights,
        beta=beta,
        keep=keep,
        label_smoothing=label_smoothing,
        f_divergence=f_divergence,
        reduction=reduction,
        reward_beta=reward_beta,
        process_group=process_group,
        backend=backend,
        parameters=loss_parameters,
    )


def _preference_loss(
    pairs: PairTensors,
    *,
    loss_type: str | Sequence[str],
    loss_weights: Sequence[float] | None,
    beta: float | Tensor | DynamicBeta,
    keep: Tensor | None,
    label_smoothing: float,
    f_divergence: str,
    reduction: str,
    reward_beta: float | None,
    process_group: dist.ProcessGroup | None,
    backend: str,
    parameters: Mapping[str, float],
) -> PreferenceOutput:
    module = beta if isinstance(beta, DynamicBeta) else None
    terms = check_loss_options(
        loss_type,
        loss_weights=loss_weights,
        beta=beta.beta if isinstance(beta, DynamicBeta) else beta,
        label_smoothing=label_smoothing,
        f_divergence=f_divergence,
        **parameters,
    )
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction={reduction!r} is unknown; choose mean, sum or none.")
    if module is not None and keep is not None:
        raise ValueError("keep and a DynamicBeta exclude each other, as it decides which pairs are kept; pass one.")
    if module is None and process_group is not None:
        raise ValueError("process_group has no effect without a DynamicBeta as beta; leave it out.")
    _check_tensors(pairs, terms, None if module is not None else beta, keep)
    if module is not None:
        backend = module.backend_for(backend)
    backend = ops.serving_backend(backend, pairs.chosen, pairs.num_pairs)
    if backend == "torch":
        return _by_oracle(
            _once_differentiable(pairs),
            module,
            process_group,
            loss_type=loss_type,
            loss_weights=loss_weights,
            beta=beta,
            keep=keep,
            label_smoothing=label_smoothing,
            f_divergence=f_divergence,
            reduction=reduction,
            reward_beta=reward_beta,
            **parameters,
        )
    first = LOSSES[terms[0].loss.name]
    options = LossOptions(
        [term.loss.name for term in terms],
        [term.weight for term in terms],
        [float(parameters.get(name, default)) for name, default in PARAMETERS.items()],
        label_smoothing,
        f_divergence,
        first.needs_reference,
        first.gap == "mean",
        "mean" if reduction == "mean" else "sum",
        module.beta if module is not None and reward_beta is None else reward_beta,
    )
    sorts = any(term.loss.sorts_batch for term in terms)
    if module is not None and not sorts:
        output = _planned(pairs, options, module, process_group, backend)
    elif module is not None:
        margins = ops.preference_margins(*_margin_inputs(pairs), first.needs_reference, options.mean_gap, backend)
        plan = module(margins, process_group, backend=backend)
        output = _sorted(pairs, options, _Given(plan.beta, 0.0, plan.keep), backend)._replace(plan=plan)
    else:
        assert not isinstance(beta, DynamicBeta)
        given = _Given(beta.detach(), 0.0, keep) if isinstance(beta, Tensor) else _Given(None, float(beta), keep)
        output = _sorted(pairs, options, given, backend) if sorts else _given(pairs, options, given, backend)
    return output._replace(loss=output.losses) if reduction == "none" else output


def _check_tensors(pairs: PairTensors, terms: Sequence[LossTerm], beta: Any, keep: Tensor | None) -> None:
    has_lengths = pairs.chosen_lengths is not None and pairs.rejected_lengths is not None
    check_loss_inputs(
        terms, has_reference=pairs.ref_chosen is not None, has_lengths=has_lengths or pairs.boundaries is not None
    )
    beta = beta if isinstance(beta, Tensor) else None
    if beta is not None and beta.dim() > 0:
        check_sorted_losses(terms, beta, torch.Size((pairs.num_pairs,)), pairs.pair_weights)
    elif pairs.pair_weights is not None:
        check_sorted_losses(terms, pairs.pair_weights.new_empty(()), torch.Size(), pairs.pair_weights)
    check_preference_tensors(pairs._asdict(), beta=beta, keep=keep)


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


def _by_oracle(
    pairs: PairTensors, module: DynamicBeta | None, process_group: dist.ProcessGroup | None, **options: Any
) -> PreferenceOutput:
    pairs = _per_sequence(pairs, _sum_rows)
    lengths: dict[str, Any] = {"chosen_lengths": pairs.chosen_lengths, "rejected_lengths": pairs.rejected_lengths}
    assert pairs.rejected is not None
    policy, references = (pairs.chosen, pairs.rejected), (pairs.ref_chosen, pairs.ref_rejected)
    plan = None
    if module is not None:
        with torch.no_grad():
            margins = preference_gap(*policy, *references, loss_type=options["loss_type"], **lengths)
        plan = module(margins, process_group, backend="torch")
        reward_beta = module.beta if options["reward_beta"] is None else options["reward_beta"]
        options |= {"beta": plan.beta, "keep": plan.keep, "reward_beta": reward_beta}
    options |= {"pair_weights": pairs.pair_weights, "sft_logps": pairs.sft_logps, **lengths}
    return oracle.preference_loss(*policy, *references, **options)._replace(plan=plan)


def _sum_rows(token_logps: Tensor, boundaries: Tensor) -> Tensor:
    """(N,) token log-probs, (R + 1,) boundaries → (R,) sums, in float32 at least; tokens outside the rows are left."""
    values = token_logps.to(torch.promote_types(token_logps.dtype, torch.float32))
    return torch.segment_reduce(values.contiguous(), "sum", offsets=boundaries, unsafe=True, initial=0.0)


def _margin_inputs(pairs: PairTensors) -> tuple[Tensor | None, ...]:
    return tuple(None if x is None else x.detach() for x in pairs[:7])


def _output(outputs: Sequence[Tensor], plan: BetaPlan | None = None) -> PreferenceOutput:
    loss, losses, values = outputs[:3]
    chosen_rewards, rejected_rewards, margins = values.unbind(0)
    return PreferenceOutput(loss, losses, chosen_rewards, rejected_rewards, margins, plan)


def _given(pairs: PairTensors, options: LossOptions, given: _Given, backend: str) -> PreferenceOutput:
    keep = None if given.keep is None else given.keep.detach().bool()
    return _output(ops.preference_loss(*pairs, given.beta, given.fixed_beta, keep, *options.packed(), backend))


def _planned(
    pairs: PairTensors,
    options: LossOptions,
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


def _sorted(pairs: PairTensors, options: LossOptions, given: _Given, backend: str) -> PreferenceOutput:
    """A list with losses that match pairs by rank: a call per kind of matching, the sides permuted before."""
    pairs = _per_sequence(pairs, lambda values, boundaries: ops.row_sums(values, boundaries, backend))
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


def _per_sequence(pairs: PairTensors, sum_rows: Callable[[Tensor, Tensor], Tensor]) -> PairTensors:
    """The same with log-probs summed over rows, differentiably."""
    boundaries = pairs.boundaries
    if boundaries is None:
        return pairs
    chosen, rejected = sum_rows(pairs.chosen, boundaries).chunk(2)
    if pairs.ref_chosen is not None and pairs.ref_rejected is None:
        ref_chosen, ref_rejected = sum_rows(pairs.ref_chosen, boundaries).chunk(2)
        pairs = pairs._replace(ref_chosen=ref_chosen, ref_rejected=ref_rejected)
    chosen_lengths, rejected_lengths = boundaries.diff().chunk(2)
    return pairs._replace(
        chosen=chosen,
        rejected=rejected,
        boundaries=None,
        chosen_lengths=chosen_lengths if pairs.chosen_lengths is None else pairs.chosen_lengths,
        rejected_lengths=rejected_lengths if pairs.rejected_lengths is None else pairs.rejected_lengths,
    )
