"""The oracle: every operation of fastdpo in eager PyTorch, in any floating dtype, written like its formula.

No chunking, no kernels, differentiable by autograd. 16-bit inputs are computed in float32; float64 stays float64.
Shapes: B pairs, T token positions, H hidden size, V vocabulary size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdpo.formulas.checks import (
    check_dynamic_beta_options,
    check_head_options,
    check_loss_inputs,
    check_loss_options,
    check_pair_tensors,
    check_sorted_losses,
)
from fastdpo.formulas.losses import LOSSES, PairBatch, divergence_scores, match_by_rank
from fastdpo.formulas.rng import gumbel

#: Least running spread: equal models give margins without any.
SIGMA_FLOOR = 1e-6


class PreferenceOutput(NamedTuple):
    """What `preference_loss` returns. Rewards and margins carry no gradient and cover dropped pairs too."""

    loss: Tensor  # 0-D, or (B,) with reduction="none"
    losses: Tensor  # (B,), 0 for dropped pairs
    chosen_rewards: Tensor  # (B,)
    rejected_rewards: Tensor  # (B,)
    margins: Tensor  # (B,), see `preference_gap`
    plan: BetaPlan | None = None  # where `beta` was a `DynamicBeta`


class BetaState(NamedTuple):
    """Running statistics of dynamic β: 0-D tensors. At step 0 nothing has been seen, and m0 and sigma mean nothing."""

    m0: Tensor
    sigma: Tensor
    step: Tensor  # int64


class BetaPlan(NamedTuple):
    """What dynamic β decided for a batch."""

    beta: Tensor  # 0-D, or (B,) with scope="instance"
    keep: Tensor  # (B,) bool
    mean: Tensor  # 0-D, the M0 that was used
    std: Tensor  # 0-D, the σ that was used
    state: BetaState  # to be committed with the optimizer step


# Log-probabilities


def selective_logprob(logits: Tensor, targets: Tensor, *, ignore_index: int = -100, temperature: float = 1.0) -> Tensor:
    """log softmax(logits / temperature)[target]. (..., V) logits, (...) targets → (...), 0 where ignored.

    Raises:
        ValueError: temperature is not positive, or the shapes do not fit.
    """
    if not temperature > 0.0:
        raise ValueError(f"temperature={temperature} must be positive; 1.0 leaves the logits as they are.")
    if logits.shape[:-1] != targets.shape:
        raise ValueError(
            f"logits {tuple(logits.shape)} need targets {tuple(logits.shape[:-1])}: {tuple(targets.shape)}"
        )
    ignored = targets == ignore_index
    # Ignored rows are emptied before the softmax, or a NaN there would reach other rows' gradients
    logits = _at_least_float32(logits).masked_fill(ignored.unsqueeze(-1), 0.0) / temperature
    target_logits = logits.gather(-1, targets.masked_fill(ignored, 0).unsqueeze(-1)).squeeze(-1)
    return (target_logits - logits.logsumexp(-1)).masked_fill(ignored, 0.0)


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    stats: Sequence[str] = (),
) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
    """Log-probs of the targets under the head: logits = (h Wᵀ + b)·logit_scale, softcap·tanh(·/softcap), /temperature.

    Args:
        hidden: (..., H).
        weight: (V, H).
        targets: (...), int64.
        bias: (V,).
        softcap: bound of the logits, as in Gemma 2; None for none.
        stats: names of further outputs, over the distribution that is scored: "entropy" in nats, "mean_logits" over
            the vocabulary, "is_top1" (bool; the first of equal logits counts), "log_sum_sq_probs" = log Σ_v p_v².

    Returns:
        (...) log-probs, 0 where ignored; with `stats`, also {name: (...)}, 0 or False where ignored.

    Raises:
        ValueError: an unknown stat, a softcap or temperature that is not positive, or shapes that do not fit.
    """
    check_head_options(stats, temperature=temperature, logit_scale=logit_scale, softcap=softcap)
    if hidden.shape[:-1] != targets.shape or hidden.shape[-1] != weight.shape[-1]:
        raise ValueError(
            f"hidden (..., H), weight (V, H) and targets (...) do not fit: "
            f"{tuple(hidden.shape)}, {tuple(weight.shape)}, {tuple(targets.shape)}."
        )
    dtype = torch.promote_types(torch.promote_types(hidden.dtype, weight.dtype), torch.float32)
    ignored = targets == ignore_index
    hidden = hidden.to(dtype).masked_fill(ignored.unsqueeze(-1), 0.0)
    logits = F.linear(hidden, weight.to(dtype), None if bias is None else bias.to(dtype)) * logit_scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logits = logits / temperature  # (..., V)
    logps = selective_logprob(logits, targets, ignore_index=ignore_index)
    if not stats:
        return logps
    values = distribution_statistics(logits, targets, stats)
    return logps, {name: value.masked_fill(ignored, 0) for name, value in values.items()}


def distribution_statistics(logits: Tensor, targets: Tensor, stats: Sequence[str]) -> dict[str, Tensor]:
    """`stats` of softmax(logits), by `linear_logprob`'s names. (..., V) logits, (...) targets → {name: (...)}."""
    if not stats:
        return {}
    log_probs = logits.log_softmax(-1)
    values = {
        "entropy": lambda: -(log_probs.exp() * log_probs).sum(-1),
        "mean_logits": lambda: logits.mean(-1),
        "is_top1": lambda: logits.argmax(-1) == targets,
        "log_sum_sq_probs": lambda: (2.0 * log_probs).logsumexp(-1),
    }
    return {name: values[name]() for name in stats}


def completion_weights(
    completion_mask: Tensor,
    *,
    other_lengths: Tensor | None = None,
    ld_alpha: float | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Weight of every token in its sequence's log-prob, so that Σ_t weight·logp is `completion_logps`.

    1 on completion tokens and 0 elsewhere; with `ld_alpha` the tokens of a completion beyond the length of the other
    one of its pair weigh `ld_alpha` (LD-DPO, 2409.06411 eq. 11).

    Args:
        completion_mask: (B, T), nonzero on completion tokens.
        other_lengths: (B,), length in tokens of the other completion of the pair.
        ld_alpha: in [0, 1]; 1 is plain DPO.

    Returns:
        (B, T) weights in `dtype`.

    Raises:
        ValueError: ld_alpha is outside [0, 1], or only one of ld_alpha and other_lengths is given.
    """
    mask = completion_mask != 0
    if (ld_alpha is None) != (other_lengths is None):
        raise ValueError(f"ld_alpha={ld_alpha} and other_lengths go together: pass both for LD-DPO, or neither.")
    if ld_alpha is None or other_lengths is None:
        return mask.to(dtype)
    if not 0.0 <= ld_alpha <= 1.0:
        raise ValueError(f"ld_alpha={ld_alpha} must be in [0, 1]; 1 is plain DPO.")
    beyond = mask.cumsum(dim=1) > other_lengths.unsqueeze(1)
    return mask.to(dtype).masked_fill(mask & beyond, ld_alpha)


def completion_logps(
    token_logps: Tensor,
    completion_mask: Tensor,
    *,
    other_lengths: Tensor | None = None,
    ld_alpha: float | None = None,
) -> Tensor:
    """log π(y|x), summed over the completion's tokens. (B, T), (B, T) → (B,). Options as in `completion_weights`."""
    token_logps = _at_least_float32(token_logps)
    weights = completion_weights(
        completion_mask, other_lengths=other_lengths, ld_alpha=ld_alpha, dtype=token_logps.dtype
    )
    return (weights * token_logps.masked_fill(completion_mask == 0, 0.0)).sum(dim=1)


# Losses


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
    chosen, rejected = _at_least_float32(chosen_logps), _at_least_float32(rejected_logps)
    if loss.needs_reference:
        if ref_chosen_logps is None or ref_rejected_logps is None:
            raise ValueError(f"loss_type={name!r} needs ref_chosen_logps and ref_rejected_logps; pass both.")
        chosen, rejected = chosen - ref_chosen_logps, rejected - ref_rejected_logps
    if loss.gap == "mean":
        if chosen_lengths is None or rejected_lengths is None:
            raise ValueError(f"loss_type={name!r} needs chosen_lengths and rejected_lengths; pass both.")
        chosen, rejected = chosen / chosen_lengths.clamp(min=1), rejected / rejected_lengths.clamp(min=1)
    return chosen - rejected


def preference_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor | None = None,
    ref_rejected_logps: Tensor | None = None,
    *,
    loss_type: str | Sequence[str] = "sigmoid",
    loss_weights: Sequence[float] | None = None,
    beta: float | Tensor = 0.1,
    keep: Tensor | None = None,
    label_smoothing: float = 0.0,
    chosen_lengths: Tensor | None = None,
    rejected_lengths: Tensor | None = None,
    f_divergence: str = "reverse_kl",
    reduction: Literal["mean", "sum", "none"] = "mean",
    reward_beta: float | None = None,
    pair_weights: Tensor | None = None,
    sft_logps: Tensor | None = None,
    **loss_parameters: float,
) -> PreferenceOutput:
    """A preference loss, or a weighted sum of several, over B pairs. Formulas and sources are in `formulas.losses`.

    Args:
        chosen_logps, rejected_logps: (B,), log-probs of the completions under the policy, summed over tokens.
        ref_chosen_logps, ref_rejected_logps: (B,), the same under the reference. Losses without a reference use them
            for the rewards only.
        beta: float, 0-D or (B,) tensor; carries no gradient.
        keep: (B,) bool; dropped pairs take no part in the loss or in its mean, whatever their values.
        label_smoothing: ε in [0, 0.5), assumed share of flipped labels.
        chosen_lengths, rejected_lengths: (B,), in tokens; a length of 0 counts as 1.
        f_divergence: reverse_kl, forward_kl, js_divergence or alpha_divergence (with f_alpha_divergence_coef).
        reduction: "mean" over kept pairs, "sum" over them, or "none".
        reward_beta: β0 of the rewards reward_beta·(log-ratio); default `beta`.
        pair_weights: (B,), factors of the pairs' losses (WPO, 2406.11827 eq. 2); carry no gradient.
        sft_logps: (B,), log-probs of the chosen completions in the likelihood terms of sft, orpo, cpo and cpo_simpo,
            where `chosen_logps` are weighted by token; default `chosen_logps`.
        loss_parameters: parameters of the losses and of the f-divergence, by name.

    Raises:
        ValueError: as `check_loss_options`; missing reference or lengths; shapes other than (B,); pair weights or one
            β per pair with a loss that sorts the batch.
    """
    terms = check_loss_options(
        loss_type,
        loss_weights=loss_weights,
        beta=beta,
        label_smoothing=label_smoothing,
        f_divergence=f_divergence,
        **loss_parameters,
    )
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
    chosen, rejected = _at_least_float32(chosen_logps), _at_least_float32(rejected_logps)
    beta = beta.detach().to(chosen) if isinstance(beta, Tensor) else chosen.new_full((), beta)
    check_sorted_losses(terms, beta, chosen.shape, pair_weights)
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction={reduction!r} is unknown; choose mean, sum or none.")
    keep = torch.ones_like(chosen, dtype=torch.bool) if keep is None else keep.detach().bool()

    def kept(values: Tensor | None, default: Tensor) -> Tensor:
        # A dropped pair's values leave before any arithmetic, so that not even its NaN reaches a gradient
        return default if values is None else torch.where(keep, values.to(chosen.dtype), default)

    zeros, ones = torch.zeros_like(chosen), torch.ones_like(chosen)
    chosen_kept, rejected_kept = kept(chosen, zeros), kept(rejected, zeros)
    ref_chosen_kept, ref_rejected_kept = kept(ref_chosen_logps, zeros), kept(ref_rejected_logps, zeros)
    alpha = {name: value for name, value in loss_parameters.items() if name == "f_alpha_divergence_coef"}
    num_kept = keep.sum().clamp(min=1).to(chosen.dtype)
    batch = PairBatch(
        chosen_logps=chosen_kept,
        rejected_logps=rejected_kept,
        ref_chosen_logps=ref_chosen_kept,
        ref_rejected_logps=ref_rejected_kept,
        chosen_scores=divergence_scores(chosen_kept - ref_chosen_kept, f_divergence, **alpha),
        rejected_scores=divergence_scores(rejected_kept - ref_rejected_kept, f_divergence, **alpha),
        chosen_lengths=kept(chosen_lengths, ones).clamp(min=1.0),
        rejected_lengths=kept(rejected_lengths, ones).clamp(min=1.0),
        sft_logps=chosen_kept if sft_logps is None else kept(sft_logps, zeros),
        beta=beta,
        keep=keep,
        num_kept=num_kept,
        label_smoothing=label_smoothing,
    )
    losses = sum(
        (weight * loss.formula(match_by_rank(loss, batch), **parameters) for loss, weight, parameters in terms),
        start=zeros,
    )
    if pair_weights is not None:
        losses = losses * pair_weights.detach().to(chosen.dtype)
    losses = torch.where(keep, losses, 0.0)
    reduced = losses if reduction == "none" else losses.sum() / (num_kept if reduction == "mean" else 1.0)

    with torch.no_grad():
        scale = beta if reward_beta is None else reward_beta
        margins = preference_gap(
            chosen,
            rejected,
            ref_chosen_logps,
            ref_rejected_logps,
            loss_type=loss_type,
            chosen_lengths=chosen_lengths,
            rejected_lengths=rejected_lengths,
        )
        chosen_rewards = scale * (chosen - (zeros if ref_chosen_logps is None else ref_chosen_logps))
        rejected_rewards = scale * (rejected - (zeros if ref_rejected_logps is None else ref_rejected_logps))
    return PreferenceOutput(reduced, losses, chosen_rewards, rejected_rewards, margins)


def _at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


# Dynamic β


def gumbel_top_k(log_weights: Tensor, noise: Tensor, count: int) -> Tensor:
    """Draw `count` of N without replacement, with probabilities proportional to e^log_weights: the largest sums with
    Gumbel noise (1903.06059). (N,), (N,) → (N,) bool. Of equal sums the lower index wins."""
    order = torch.argsort(log_weights + noise, descending=True, stable=True)
    return torch.zeros_like(order, dtype=torch.bool).index_fill(0, order[:count], True)


def dynamic_beta(
    margins: Tensor,
    state: BetaState,
    *,
    beta: float = 0.1,
    alpha: float = 0.6,
    momentum: float = 0.9,
    keep_ratio: float = 0.8,
    min_beta: float = 1e-3,
    scope: str = "batch",
    variant: str = "released",
    seed: int = 0,
    training: bool = True,
) -> BetaPlan:
    """β-DPO's β and filter for a batch of N raw margins (2407.08639), as a function of the running statistics.

    1. M0 ← m·M0 + (1−m)·mean(M) and σ ← max(m·σ + (1−m)·std(M), 1e-6); the first batch sets both (std unbiased, 0
       for one pair). 2. keep max(1, ⌊keep_ratio·N⌋) pairs, drawn with weights exp(−½((M_i − M0)/σ)²) and the noise of
       (seed, step before this batch, pair index). 3. β = max(beta·(1 + alpha·(M̄ − M0)), min_beta).

    M̄ is the mean over kept pairs ("released") or over all pairs ("paper", where M is beta·margin throughout), or with
    scope="instance" the pair's own M. A non-finite margin leaves the state as it was, keeps every pair and makes β NaN.
    With training=False the state is left as it was and every pair is kept; M0 is the frozen one, or the batch's own
    mean before any training. No host sync, no shape that depends on data.

    Args:
        margins: (N,), N ≥ 1, raw log-ratio gaps; taken without gradient.
        state: 0-D tensors on the device of `margins`.

    Raises:
        ValueError: an option out of range, or margins that are not (N,) with N ≥ 1.
    """
    check_dynamic_beta_options(
        beta=beta,
        alpha=alpha,
        momentum=momentum,
        keep_ratio=keep_ratio,
        min_beta=min_beta,
        scope=scope,
        variant=variant,
        seed=seed,
    )
    if margins.dim() != 1 or margins.numel() == 0:
        raise ValueError(f"margins have shape {tuple(margins.shape)}; pass one margin per pair, of at least one pair.")
    gaps = _at_least_float32(margins.detach()) * (beta if variant == "paper" else 1.0)
    n = gaps.numel()
    finite = gaps.isfinite().all()
    batch_mean = gaps.mean()
    batch_std = gaps.std() if n > 1 else torch.zeros_like(batch_mean)
    old_m0, old_sigma = state.m0.to(gaps.dtype), state.sigma.to(gaps.dtype)
    first = state.step == 0
    if training:
        m0 = torch.where(first, batch_mean, momentum * old_m0 + (1.0 - momentum) * batch_mean)
        sigma = torch.where(first, batch_std, momentum * old_sigma + (1.0 - momentum) * batch_std)
        sigma = sigma.clamp(min=SIGMA_FLOOR)
        noise = gumbel(seed, state.step, n, gaps.device)
        keep = gumbel_top_k(-0.5 * ((gaps - m0) / sigma) ** 2, noise, max(1, math.floor(keep_ratio * n))) | ~finite
        m0, sigma = torch.where(finite, m0, old_m0), torch.where(finite, sigma, old_sigma)
        state = BetaState(m0, sigma, state.step + finite.to(state.step.dtype))
    else:
        m0, sigma = torch.where(first, batch_mean, old_m0), torch.where(first, batch_std, old_sigma)
        state = BetaState(*(x.clone() for x in state))  # not the module's own buffers, which change later
        keep = torch.ones_like(gaps, dtype=torch.bool)
    if scope == "instance":
        level = gaps
    elif variant == "paper":
        level = batch_mean
    else:
        level = torch.where(keep, gaps, 0.0).sum() / keep.sum()
    planned = (beta * (1.0 + alpha * (level - m0))).clamp(min=min_beta)
    return BetaPlan(torch.where(finite, planned, math.nan), keep, m0, sigma, state)
