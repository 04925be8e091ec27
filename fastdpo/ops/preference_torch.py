"""The torch backend of `fastdpo.ops.preference_loss`: the oracle's formulas, differentiated inside the operator."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fastdpo.losses import PairBatch, divergence_scores
from fastdpo.ops.preference_loss import PARAMETERS, LossOptions, PairTensors, PlanOptions
from fastdpo.reference import BetaState, dynamic_beta


def _at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


# Sums over rows


def row_sums(token_logps: Tensor, boundaries: Tensor) -> Tensor:
    """(N,) token log-probs, (R + 1,) boundaries → (R,) sums, in float32 at least."""
    return torch.segment_reduce(
        _at_least_float32(token_logps).contiguous(), "sum", offsets=boundaries, unsafe=True, initial=0.0
    )


def expand_rows(values: Tensor, boundaries: Tensor, num_tokens: int) -> Tensor:
    """(R,) values → (N,), each token its row's; 0 outside the rows."""
    positions = torch.arange(num_tokens, device=values.device)
    row = torch.searchsorted(boundaries, positions, right=True)
    return torch.nn.functional.pad(values, (1, 1))[row]


def _sequences(pairs: PairTensors) -> PairTensors:
    """The same per sequence and in float32 at least, with the rows' lengths where none are given."""
    boundaries = pairs.boundaries
    if boundaries is None:
        assert pairs.rejected is not None
        return pairs._replace(chosen=_at_least_float32(pairs.chosen), rejected=_at_least_float32(pairs.rejected))
    chosen, rejected = row_sums(pairs.chosen, boundaries).chunk(2)
    if pairs.ref_chosen is not None and pairs.ref_rejected is None:
        ref_chosen, ref_rejected = row_sums(pairs.ref_chosen, boundaries).chunk(2)
        pairs = pairs._replace(ref_chosen=ref_chosen, ref_rejected=ref_rejected)
    chosen_lengths, rejected_lengths = boundaries.diff().chunk(2)
    return pairs._replace(
        chosen=chosen,
        rejected=rejected,
        chosen_lengths=chosen_lengths if pairs.chosen_lengths is None else pairs.chosen_lengths,
        rejected_lengths=rejected_lengths if pairs.rejected_lengths is None else pairs.rejected_lengths,
    )


def _gaps(pairs: PairTensors, reference_gap: bool, mean_gap: bool) -> Tensor:
    """`fastdpo.reference.preference_gap` of pairs per sequence."""
    w, rejected = pairs.chosen, pairs.rejected
    assert rejected is not None
    if reference_gap:
        assert pairs.ref_chosen is not None
        assert pairs.ref_rejected is not None
        w, rejected = w - pairs.ref_chosen, rejected - pairs.ref_rejected
    if mean_gap:
        assert pairs.chosen_lengths is not None
        assert pairs.rejected_lengths is not None
        w, rejected = w / pairs.chosen_lengths.clamp(min=1), rejected / pairs.rejected_lengths.clamp(min=1)
    return w - rejected


# The operators


def preference_margins(*arguments: Any) -> Tensor:
    """(B,) margins of the pair tensors."""
    *tensors, reference_gap, mean_gap = arguments
    return _gaps(_sequences(PairTensors(*tensors)), reference_gap, mean_gap)


@contextlib.contextmanager
def _autograd() -> Iterator[None]:
    """Autograd inside an operator, where the dispatcher has passed its keys.

    torch.func.vjp would not do: it fails where the operator runs below a dispatch mode, as in compiled graphs.
    """
    keys = torch._C.DispatchKey
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        for key in (keys.AutogradFunctionality, keys.AutogradCPU, keys.AutogradCUDA, keys.ADInplaceOrView):
            stack.enter_context(torch._C._SetExcludeDispatchKeyGuard(key, False))
        yield


def _diagonal_loss(
    pairs: PairTensors, beta: Tensor, keep: Tensor, options: LossOptions
) -> tuple[Tensor, Tensor, Tensor]:
    """Losses (B,), grads (5, B) of the reduced loss, and its divisor, by the oracle's formulas."""
    terms, chosen = options.terms(), pairs.chosen
    zeros, ones = torch.zeros_like(chosen), torch.ones_like(chosen)

    def kept(values: Tensor | None, default: Tensor) -> Tensor:
        # A dropped pair's values leave before any arithmetic, so that not even its NaN reaches a gradient
        return default if values is None else torch.where(keep, values.to(chosen.dtype), default)

    def lengths(values: Tensor | None) -> Tensor:
        return ones if values is None else kept(values, ones).clamp(min=1.0)

    count = num_kept = keep.sum().clamp(min=1).to(chosen.dtype)
    constants: dict[str, Any] = {
        "chosen_lengths": lengths(pairs.chosen_lengths),
        "rejected_lengths": lengths(pairs.rejected_lengths),
        "beta": kept(beta, ones) if beta.dim() else beta,
        "keep": keep,
        "num_kept": num_kept,
        "label_smoothing": options.label_smoothing,
    }
    f_alpha = options.loss_parameters[list(PARAMETERS).index("f_alpha_divergence_coef")]

    def losses_of(w: Tensor, rejected: Tensor, ref: Tensor, ref_rejected: Tensor, sft: Tensor) -> Tensor:
        batch = PairBatch(
            chosen_logps=w,
            rejected_logps=rejected,
            ref_chosen_logps=ref,
            ref_rejected_logps=ref_rejected,
            chosen_scores=divergence_scores(w - ref, options.f_divergence, f_alpha_divergence_coef=f_alpha),
            rejected_scores=divergence_scores(
                rejected - ref_rejected, options.f_divergence, f_alpha_divergence_coef=f_alpha
            ),
            sft_logps=sft,
            **constants,
        )
        values = (
            formula if weight == 1.0 else weight * formula
            for weight, formula in ((weight, loss.formula(batch, **parameters)) for loss, weight, parameters in terms)
        )
        return functools.reduce(torch.add, values)

    inputs = [kept(x, zeros) for x in (chosen, pairs.rejected, pairs.ref_chosen, pairs.ref_rejected, pairs.sft_logps)]
    own_sft = pairs.sft_logps is not None
    # Where every loss acts on log-ratios, the reference's derivative is the policy's negative
    on_ratios = all(loss.needs_reference for loss, _, _ in terms)
    active = 2 if on_ratios else 5 if own_sft else 4

    if options.reduction == "sum":
        count = torch.ones_like(num_kept)
    scale = keep / count
    weights = None if pairs.pair_weights is None else kept(pairs.pair_weights, zeros)
    if weights is not None:
        scale = scale * weights
    with _autograd():
        # Autograd saves no tensor that was made in inference mode
        constants = {name: x.clone() if torch.is_tensor(x) and x.is_inference() else x for name, x in constants.items()}
        inputs = [x.clone() if i < active or x.is_inference() else x for i, x in enumerate(inputs)]
        leaves = [x.requires_grad_() for x in inputs[:active]]
        w, rejected, ref, ref_rejected, sft = inputs
        recorded = losses_of(w, rejected, ref, ref_rejected, sft if own_sft else w)
        by_leaf = torch.autograd.grad(recorded, leaves, scale, allow_unused=True)
    losses = recorded.detach() if weights is None else recorded.detach() * weights
    rows = [zeros if grad is None else grad for grad in by_leaf]
    if on_ratios:
        rows += [-rows[0], -rows[1]]
    return torch.where(keep, losses, 0.0), torch.stack(rows + [zeros] * (5 - len(rows))), count


def _outputs(
    tensors: PairTensors, pairs: PairTensors, margins: Tensor, beta: Tensor, keep: Tensor, options: LossOptions
) -> tuple[Tensor, ...]:
    losses, grads, count = _diagonal_loss(pairs, beta, keep, options)
    scale = beta if options.reward_beta is None else options.reward_beta
    assert pairs.rejected is not None
    sides = ((pairs.chosen, pairs.ref_chosen), (pairs.rejected, pairs.ref_rejected))
    rewards = [scale * (side if ref is None else side - ref) for side, ref in sides]
    token_grads = grads.new_empty(0)
    if tensors.boundaries is not None:
        token_grads = expand_rows(grads[:2].flatten(), tensors.boundaries, tensors.chosen.numel())
    return losses.sum() / count, losses, torch.stack([*rewards, margins]), grads, token_grads, count


def preference_loss(*arguments: Any) -> tuple[Tensor, ...]:
    tensors, options = PairTensors(*arguments[:9]), LossOptions.unpacked(*arguments[12:])
    beta, fixed_beta, keep = arguments[9:12]
    pairs = _sequences(tensors)
    beta = pairs.chosen.new_full((), fixed_beta) if beta is None else beta.to(pairs.chosen)
    keep = torch.ones_like(pairs.chosen, dtype=torch.bool) if keep is None else keep.bool()
    margins = _gaps(pairs, options.reference_gap, options.mean_gap)
    return _outputs(tensors, pairs, margins, beta, keep, options)


def planned_preference_loss(*arguments: Any) -> tuple[Tensor, ...]:
    tensors, options = PairTensors(*arguments[:9]), LossOptions.unpacked(*arguments[17:])
    all_margins, first_pair, *state = arguments[9:14]
    pairs = _sequences(tensors)
    margins = _gaps(pairs, options.reference_gap, options.mean_gap)
    plan = plan_batch(margins if all_margins is None else all_margins, *state, *arguments[14:17])
    mine = slice(first_pair, first_pair + tensors.num_pairs)
    beta = (plan[0][mine] if plan[0].dim() else plan[0]).to(pairs.chosen.dtype)
    return (*_outputs(tensors, pairs, margins, beta, plan[1][mine], options), *plan)


def plan_batch(margins: Tensor, m0: Tensor, sigma: Tensor, step: Tensor, *options: Any) -> tuple[Tensor, ...]:
    """(beta, keep, stats, step) of the oracle's plan; stats = (M0 and σ used, M0 and σ after)."""
    plan = dynamic_beta(margins, BetaState(m0, sigma, step), **PlanOptions.unpacked(*options)._asdict())
    stats = torch.stack([plan.mean, plan.std, plan.state.m0.to(plan.mean.dtype), plan.state.sigma.to(plan.mean.dtype)])
    return plan.beta, plan.keep, stats, plan.state.step.clone()


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
