"""The preference losses of a batch of pairs, in eager PyTorch: sequence log-probs in, a `PreferenceOutput` out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from fastdpo.formulas.checks import check_loss_inputs, check_pair_tensors, check_sorted_losses
from fastdpo.formulas.losses import F_DIVERGENCES, LOSSES, PairBatch, divergence_scores, match_by_rank
from fastdpo.formulas.options import LossKeywords, LossOptions, takes_loss_options
from fastdpo.formulas.oracle.precision import at_least_float32
from fastdpo.formulas.outputs import PreferenceOutput

if TYPE_CHECKING:
    from typing_extensions import Unpack


def preference_gap(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor | None = None,
    ref_rejected_logps: Tensor | None = None,
    *,
    loss_type: str | Sequence[str] = "sigmoid",
    chosen_lengths: Tensor | None = None,
    rejected_lengths: Tensor | None = None,
) -> Tensor:
    """The margin that dynamic β follows: what the loss multiplies by β. All (B,) → (B,); differentiable.

    u_w − u_l of the raw log-ratios, or of the log-probs for losses without a reference; u_w/|y_w| − u_l/|y_l| for
    losses on length-normalised gaps (`Loss.gap == "mean"`). Of several losses, the first decides.

    Raises:
        ValueError: the loss is unknown, or lacks the reference or the lengths that its gap needs.
    """
    name = loss_type if isinstance(loss_type, str) else next(iter(loss_type), "")
    if name not in LOSSES:
        raise ValueError(f"loss_type={name!r} is unknown; choose among {', '.join(LOSSES)}.")
    loss = LOSSES[name]
    chosen, rejected = at_least_float32(chosen_logps), at_least_float32(rejected_logps)
    if loss.needs_reference:
        if ref_chosen_logps is None or ref_rejected_logps is None:
            raise ValueError(f"loss_type={name!r} needs ref_chosen_logps and ref_rejected_logps; pass both.")
        chosen, rejected = chosen - ref_chosen_logps, rejected - ref_rejected_logps
    if loss.gap == "mean":
        if chosen_lengths is None or rejected_lengths is None:
            raise ValueError(f"loss_type={name!r} needs chosen_lengths and rejected_lengths; pass both.")
        chosen, rejected = chosen / chosen_lengths.clamp(min=1), rejected / rejected_lengths.clamp(min=1)
    return chosen - rejected


@takes_loss_options()
def preference_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor | None = None,
    ref_rejected_logps: Tensor | None = None,
    *,
    keep: Tensor | None = None,
    chosen_lengths: Tensor | None = None,
    rejected_lengths: Tensor | None = None,
    pair_weights: Tensor | None = None,
    sft_logps: Tensor | None = None,
    options: LossOptions | None = None,
    **named: Unpack[LossKeywords],
) -> PreferenceOutput:
    """A preference loss, or a weighted sum of several, over B pairs. Formulas and sources are in `formulas.losses`.

    Args:
        chosen_logps, rejected_logps: (B,), log-probs of the completions under the policy, summed over tokens.
        ref_chosen_logps, ref_rejected_logps: (B,), the same under the reference. Losses without a reference use them
            for the rewards only.
        keep: (B,) bool; dropped pairs take no part in the loss or in its mean, whatever their values.
        chosen_lengths, rejected_lengths: (B,), in tokens; a length of 0 counts as 1.
        pair_weights: (B,), factors of the pairs' losses (WPO, 2406.11827 eq. 2); carry no gradient.
        sft_logps: (B,), log-probs of the chosen completions in the likelihood terms of sft, orpo, cpo and cpo_simpo,
            where `chosen_logps` are weighted by token; default `chosen_logps`.

    Raises:
        ValueError: as `LossOptions`; missing reference or lengths; shapes other than (B,); pair weights or one β per
            pair with a loss that sorts the batch.
        TypeError: β is a `DynamicBeta`, which `fastdpo.preference_loss` takes.
    """
    options = LossOptions.of(options, named)
    terms, given_beta = options.terms, cast(Any, options.beta)
    if hasattr(given_beta, "beta"):
        raise TypeError(f"beta is a {type(given_beta).__name__}; the oracle takes a float or a tensor.")
    if (ref_chosen_logps is None) != (ref_rejected_logps is None):
        raise ValueError("ref_chosen_logps and ref_rejected_logps go together; pass both or neither.")
    has_lengths = chosen_lengths is not None and rejected_lengths is not None
    check_loss_inputs(terms, has_reference=ref_chosen_logps is not None, has_lengths=has_lengths)
    check_pair_tensors(
        chosen_logps=chosen_logps,
        rejected_logps=rejected_logps,
        ref_chosen_logps=ref_chosen_logps,
        ref_rejected_logps=ref_rejected_logps,
        keep=keep,
        chosen_lengths=chosen_lengths,
        rejected_lengths=rejected_lengths,
        pair_weights=pair_weights,
        sft_logps=sft_logps,
    )
    chosen, rejected = at_least_float32(chosen_logps), at_least_float32(rejected_logps)
    beta = given_beta.detach().to(chosen) if isinstance(given_beta, Tensor) else chosen.new_full((), given_beta)
    check_sorted_losses(terms, beta, chosen.shape, pair_weights)
    keep = torch.ones_like(chosen, dtype=torch.bool) if keep is None else keep.detach().bool()

    def kept(values: Tensor | None, default: Tensor) -> Tensor:
        # A dropped pair's values leave before any arithmetic, so that not even its NaN reaches a gradient
        return default if values is None else torch.where(keep, values.to(chosen.dtype), default)

    zeros, ones = torch.zeros_like(chosen), torch.ones_like(chosen)
    chosen_kept, rejected_kept = kept(chosen, zeros), kept(rejected, zeros)
    ref_chosen_kept, ref_rejected_kept = kept(ref_chosen_logps, zeros), kept(ref_rejected_logps, zeros)
    divergence, of_divergence = options.f_divergence, F_DIVERGENCES[options.f_divergence]
    alpha = {name: options.parameters.get(name, default) for name, default in of_divergence.items()}
    num_kept = keep.sum().clamp(min=1).to(chosen.dtype)
    batch = PairBatch(
        chosen_logps=chosen_kept,
        rejected_logps=rejected_kept,
        ref_chosen_logps=ref_chosen_kept,
        ref_rejected_logps=ref_rejected_kept,
        chosen_scores=divergence_scores(chosen_kept - ref_chosen_kept, divergence, **alpha),
        rejected_scores=divergence_scores(rejected_kept - ref_rejected_kept, divergence, **alpha),
        chosen_lengths=kept(chosen_lengths, ones).clamp(min=1.0),
        rejected_lengths=kept(rejected_lengths, ones).clamp(min=1.0),
        sft_logps=chosen_kept if sft_logps is None else kept(sft_logps, zeros),
        beta=beta,
        keep=keep,
        num_kept=num_kept,
        label_smoothing=options.label_smoothing,
    )
    losses = sum(
        (weight * loss.formula(match_by_rank(loss, batch), **parameters) for loss, weight, parameters in terms),
        start=zeros,
    )
    if pair_weights is not None:
        losses = losses * pair_weights.detach().to(chosen.dtype)
    losses = torch.where(keep, losses, 0.0)
    total = losses.sum() / (num_kept if options.reduction == "mean" else 1.0)
    reduced = losses if options.reduction == "none" else total

    with torch.no_grad():
        scale = beta if options.reward_beta is None else options.reward_beta
        margins = preference_gap(
            chosen,
            rejected,
            ref_chosen_logps,
            ref_rejected_logps,
            loss_type=options.loss_type,
            chosen_lengths=chosen_lengths,
            rejected_lengths=rejected_lengths,
        )
        chosen_rewards = scale * (chosen - (zeros if ref_chosen_logps is None else ref_chosen_logps))
        rejected_rewards = scale * (rejected - (zeros if ref_rejected_logps is None else ref_rejected_logps))
    return PreferenceOutput(reduced, losses, chosen_rewards, rejected_rewards, margins)
