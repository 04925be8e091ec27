"""Everything after the head in one launch: margins → β and kept pairs → losses, rewards and dL/dlogp.

One program holds all B ≤ 4096 pairs of a batch, one lane per pair; sums over the batch stay in it, so nothing waits
for the host and no shape depends on data. Rules: `dynamic_beta` and `preference_loss` of fastdpo's oracle (2407.08639).
Log-probs come per sequence, (B,), or per token, (N,), with row boundaries (2B + 1,) in int64: B chosen rows, then B
rejected ones. Above `ROWS_IN_GRID_ABOVE` pairs, sums over tokens and gradients of tokens are launches of their own over
a grid of rows, and the program sees sequences. Over several ranks, lanes are the global batch's pairs, and this rank's
begin at `first_pair`.
Bytes: at most 4·(5 + 12)·B per sequence, or 4·3·N more per token. It is latency, not bandwidth, that counts here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdpo_kernels.preference_loss.dynamic_beta import PlanOutputs, block_size, empty_plan, plan_batch, store_plan
from fastdpo_kernels.preference_loss.formulas import PAIR_INPUTS, divergence_score, pair_loss
from fastdpo_kernels.preference_loss.sequence_logps import (
    expand_rows,
    fill_zero,
    flat,
    num_pairs,
    pair_gaps,
    policy_logps,
    reference_logps,
    row_lengths,
    row_sums,
    row_values,
    token_tile,
)

#: With more lanes one program has registers for fewer than four tokens of a row at a time: rows of hundreds of tokens
#: would be about as many dependent steps, six times over (both sides of policy, reference and gradient).
ROWS_IN_GRID_ABOVE = 256
#: An α this close to 1 is the reverse KL.
_ALPHA_LIMIT = 1e-6


# The kernel


@triton.jit(do_not_specialize=["n", "pairs", "first_pair", "num_tokens", "keep_count", "seed"])
def _preference_loss_fwd_kernel(
    chosen_ptr: tl.tensor,
    rejected_ptr: tl.tensor,
    ref_chosen_ptr: tl.tensor,
    ref_rejected_ptr: tl.tensor,
    boundaries_ptr: tl.tensor,
    chosen_lengths_ptr: tl.tensor,
    rejected_lengths_ptr: tl.tensor,
    pair_weights_ptr: tl.tensor,
    sft_logps_ptr: tl.tensor,
    beta_ptr: tl.tensor,
    keep_ptr: tl.tensor,
    all_margins_ptr: tl.tensor,
    m0_ptr: tl.tensor,
    sigma_ptr: tl.tensor,
    step_ptr: tl.tensor,
    loss_ptr: tl.tensor,
    losses_ptr: tl.tensor,
    values_ptr: tl.tensor,
    grads_ptr: tl.tensor,
    token_grads_ptr: tl.tensor,
    count_ptr: tl.tensor,
    beta_out_ptr: tl.tensor,
    keep_out_ptr: tl.tensor,
    stats_ptr: tl.tensor,
    step_out_ptr: tl.tensor,
    n: tl.tensor,
    pairs: tl.tensor,
    first_pair: tl.tensor,
    num_tokens: tl.tensor,
    keep_count: tl.tensor,
    beta: tl.tensor,
    alpha: tl.tensor,
    momentum: tl.tensor,
    rest: tl.tensor,
    min_beta: tl.tensor,
    seed: tl.tensor,
    reward_beta: tl.tensor,
    epsilon: tl.tensor,
    log_right: tl.tensor,
    log_flipped: tl.tensor,
    tau: tl.tensor,
    gamma: tl.tensor,
    likelihood: tl.tensor,
    alpha_minus_1: tl.tensor,
    loss_weights: tl.tuple,
    LOSSES: tl.constexpr,
    INPUTS: tl.constexpr,
    SMOOTHED: tl.constexpr,
    F_DIVERGENCE: tl.constexpr,
    REFERENCE_GAP: tl.constexpr,
    MEAN_GAP: tl.constexpr,
    MEAN: tl.constexpr,
    BETA_PER_PAIR: tl.constexpr,
    SCOPE: tl.constexpr,
    VARIANT: tl.constexpr,
    TRAINING: tl.constexpr,
    BLOCK: tl.constexpr,
    TOKENS: tl.constexpr,
) -> None:
    lanes = tl.arange(0, BLOCK)
    rows = lanes - first_pair
    mask = (rows >= 0) & (rows < pairs)
    chosen, rejected = policy_logps(chosen_ptr, rejected_ptr, boundaries_ptr, rows, pairs, mask, num_tokens, TOKENS)
    ref_chosen, ref_rejected = reference_logps(
        ref_chosen_ptr, ref_rejected_ptr, boundaries_ptr, rows, pairs, mask, num_tokens, TOKENS
    )
    chosen_lengths = row_lengths(chosen_lengths_ptr, boundaries_ptr, 0, rows, mask)
    rejected_lengths = row_lengths(rejected_lengths_ptr, boundaries_ptr, pairs, rows, mask)
    lengths = chosen_lengths, rejected_lengths
    margins = pair_gaps(chosen, rejected, ref_chosen, ref_rejected, *lengths, REFERENCE_GAP, MEAN_GAP)
    tl.store(values_ptr + 2 * pairs + rows, margins, mask=mask)

    # β and the kept pairs: planned here, or given
    keep = mask
    if m0_ptr is not None:
        gaps = margins
        if all_margins_ptr is not None:
            gaps = tl.load(all_margins_ptr + lanes, mask=lanes < n, other=0.0).to(tl.float32)
        state = m0_ptr, sigma_ptr, step_ptr
        plan = plan_batch(
            gaps, lanes, n, *state, keep_count, beta, alpha, momentum, rest, min_beta, seed, SCOPE, VARIANT, TRAINING
        )
        store_plan(beta_out_ptr, keep_out_ptr, stats_ptr, step_out_ptr, plan, lanes, n, SCOPE)
        betas = plan[0]
        keep = keep & plan[1]
    elif beta_ptr is None:
        betas = tl.zeros_like(chosen) + beta
    elif BETA_PER_PAIR:
        betas = tl.load(beta_ptr + rows, mask=mask, other=1.0).to(tl.float32)
    else:
        betas = tl.zeros_like(chosen) + tl.load(beta_ptr).to(tl.float32)
    if keep_ptr is not None:
        keep = keep & (tl.load(keep_ptr + rows, mask=mask, other=0) != 0)
    reward_scale = betas
    if reward_beta is not None:
        reward_scale = tl.zeros_like(chosen) + reward_beta
    tl.store(values_ptr + rows, reward_scale * (chosen - ref_chosen), mask=mask)
    tl.store(values_ptr + pairs + rows, reward_scale * (rejected - ref_rejected), mask=mask)

    # A dropped pair's values leave before any arithmetic, so that not even its NaN reaches a sum
    chosen, rejected = tl.where(keep, chosen, 0.0), tl.where(keep, rejected, 0.0)
    u_w, u_l = chosen - tl.where(keep, ref_chosen, 0.0), rejected - tl.where(keep, ref_rejected, 0.0)
    chosen_lengths, rejected_lengths = tl.where(keep, chosen_lengths, 1.0), tl.where(keep, rejected_lengths, 1.0)
    sft_logps = chosen
    if sft_logps_ptr is not None:
        sft_logps = tl.where(keep, tl.load(sft_logps_ptr + rows, mask=mask, other=0.0).to(tl.float32), 0.0)
    kept = tl.maximum(tl.sum(keep.to(tl.int32), axis=0).to(tl.float32), 1.0)
    sft_scale = kept / tl.maximum(tl.sum(tl.where(keep, chosen_lengths, 0.0), axis=0), 1.0)
    s_w, slope_w = divergence_score(u_w, alpha_minus_1, F_DIVERGENCE)
    s_l, slope_l = divergence_score(u_l, alpha_minus_1, F_DIVERGENCE)

    # Σ weight·loss; d_u: derivatives by the log-ratios, d_logp: by the log-probs beyond them
    losses, d_sft = tl.zeros_like(chosen), tl.zeros_like(chosen)
    d_u_w, d_u_l, d_logp_w, d_logp_l = d_sft, d_sft, d_sft, d_sft
    for i in tl.static_range(len(LOSSES)):
        if INPUTS[i] == "scores":
            w, w_l = s_w, s_l
        elif INPUTS[i] == "ratios":
            w, w_l = u_w, u_l
        else:
            w, w_l = chosen, rejected
        loss, d_w, d_l, d_s = pair_loss(
            w,
            w_l,
            chosen_lengths,
            rejected_lengths,
            sft_logps,
            sft_scale,
            betas,
            epsilon,
            log_right,
            log_flipped,
            tau,
            gamma,
            likelihood,
            tl.constexpr(LOSSES[i]),  # triton 3.6 takes a plain string for a value
            SMOOTHED,
        )
        weight = loss_weights[i]
        losses += weight * loss
        d_sft += weight * d_s
        if INPUTS[i] == "scores":
            d_u_w += weight * (d_w * slope_w)
            d_u_l += weight * (d_l * slope_l)
        elif INPUTS[i] == "ratios":
            d_u_w += weight * d_w
            d_u_l += weight * d_l
        else:
            d_logp_w += weight * d_w
            d_logp_l += weight * d_l

    scale = tl.zeros_like(chosen) + 1.0
    if pair_weights_ptr is not None:
        scale = tl.load(pair_weights_ptr + rows, mask=mask, other=0.0).to(tl.float32)
        losses = losses * scale
    losses = tl.where(keep, losses, 0.0)
    total = tl.sum(losses, axis=0)
    count = kept * 0.0 + 1.0
    if MEAN:
        count = kept
    tl.store(losses_ptr + rows, losses, mask=mask)
    tl.store(loss_ptr, total / count)
    tl.store(count_ptr, count)

    # dL/dlogp of the reduced loss
    scale = tl.where(keep, scale / count, 0.0)
    d_chosen, d_rejected = d_u_w + d_logp_w, d_u_l + d_logp_l
    if sft_logps_ptr is None:
        d_chosen, d_sft = d_chosen + d_sft, tl.zeros_like(chosen)
    d_chosen, d_rejected = tl.where(keep, d_chosen * scale, 0.0), tl.where(keep, d_rejected * scale, 0.0)
    tl.store(grads_ptr + rows, d_chosen, mask=mask)
    tl.store(grads_ptr + pairs + rows, d_rejected, mask=mask)
    tl.store(grads_ptr + 2 * pairs + rows, tl.where(keep, -d_u_w * scale, 0.0), mask=mask)
    tl.store(grads_ptr + 3 * pairs + rows, tl.where(keep, -d_u_l * scale, 0.0), mask=mask)
    tl.store(grads_ptr + 4 * pairs + rows, tl.where(keep, d_sft * scale, 0.0), mask=mask)
    if boundaries_ptr is not None:
        expand_rows(token_grads_ptr, d_chosen, boundaries_ptr, rows, mask, num_tokens, TOKENS)
        expand_rows(token_grads_ptr, d_rejected, boundaries_ptr, rows + pairs, mask, num_tokens, TOKENS)
        # Tokens outside the rows
        fill_zero(token_grads_ptr, 0, tl.minimum(tl.load(boundaries_ptr), num_tokens), lanes, BLOCK)
        fill_zero(token_grads_ptr, tl.maximum(tl.load(boundaries_ptr + 2 * pairs), 0), num_tokens, lanes, BLOCK)


# Launchers


def _launch(
    pair_tensors: Sequence[Tensor | None],
    given: tuple[Tensor | None, float, Tensor | None],
    planned: tuple[Tensor | None, int, Tensor, Tensor, Tensor] | None,
    plan_options: tuple[float, float, float, float, float, str, str, int, bool],
    loss_options: Sequence[Any],
) -> tuple[tuple[Tensor, ...], PlanOutputs | None]:
    """Check, allocate, launch: (loss, losses, values, grads, token_grads, count) and the plan."""
    names, weights, parameters, epsilon, f_divergence, reference_gap, mean_gap, reduction, reward_beta = loss_options
    beta, alpha, momentum, keep_ratio, min_beta, scope, variant, seed, training = plan_options
    beta_tensor, fixed_beta, keep = given
    all_margins, first_pair, *state = planned if planned else (None, 0, None, None, None)
    tau, gamma, likelihood, f_alpha = parameters
    if f_divergence == "alpha_divergence" and abs(f_alpha - 1.0) < _ALPHA_LIMIT:
        f_divergence = "reverse_kl"
    chosen, boundaries = pair_tensors[0], pair_tensors[4]
    assert chosen is not None
    if missing := [name for name in names if name not in PAIR_INPUTS]:
        raise ValueError(
            f"loss_type={missing} has no Triton kernel, only {', '.join(PAIR_INPUTS)}; use backend='torch'."
        )
    device, pairs = chosen.device, num_pairs(chosen, boundaries)
    n = pairs if all_margins is None else all_margins.numel()
    if boundaries is not None and n > ROWS_IN_GRID_ABOVE:
        (loss, losses, values, grads, _, count), plan = _launch(
            _summed(pair_tensors, pairs), given, planned, plan_options, loss_options
        )
        token_grads = row_values(grads[:2].view(-1), boundaries, chosen.numel())
        return (loss, losses, values, grads, token_grads, count), plan
    block, warps = block_size(n)
    tokens, warps = token_tile(boundaries, block, warps)

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=device)

    num_tokens = 0 if boundaries is None else chosen.numel()
    outputs = (empty(), empty(pairs), empty(3, pairs), empty(5, pairs), empty(num_tokens), empty())
    plan = empty_plan(n, scope, device) if planned else None
    _preference_loss_fwd_kernel[(1,)](
        *map(flat, pair_tensors),
        flat(beta_tensor),
        flat(keep),
        flat(all_margins),
        *state,
        *outputs,
        *(plan or (None,) * 4),
        n,
        pairs,
        first_pair,
        num_tokens,
        max(1, math.floor(keep_ratio * n)),
        beta if planned else fixed_beta,
        alpha,
        momentum,
        1.0 - momentum,
        min_beta,
        seed,
        reward_beta,
        epsilon,
        math.log1p(-epsilon),
        math.log(epsilon) if epsilon > 0.0 else 0.0,
        tau,
        gamma,
        likelihood,
        f_alpha - 1.0,
        tuple(weights),
        LOSSES=tuple(names),
        INPUTS=tuple(PAIR_INPUTS[name] for name in names),
        SMOOTHED=epsilon > 0.0,
        F_DIVERGENCE=f_divergence,
        REFERENCE_GAP=reference_gap,
        MEAN_GAP=mean_gap,
        MEAN=reduction == "mean",
        BETA_PER_PAIR=beta_tensor is not None and beta_tensor.dim() > 0,
        SCOPE=scope,
        VARIANT=variant,
        TRAINING=training,
        BLOCK=block,
        TOKENS=tokens,
        num_warps=warps,
    )
    return outputs, plan


def _summed(pair_tensors: Sequence[Tensor | None], pairs: int) -> tuple[Tensor | None, ...]:
    """Log-probs per token → the same inputs per sequence, with the rows' lengths where none are given."""
    chosen, _, ref_chosen, ref_rejected, boundaries, chosen_lengths, rejected_lengths, *weights = pair_tensors
    assert chosen is not None
    assert boundaries is not None
    lengths = boundaries.diff()
    chosen, rejected = row_sums(chosen, boundaries).split(pairs)
    if ref_chosen is not None and ref_rejected is None:
        ref_chosen, ref_rejected = row_sums(ref_chosen, boundaries).split(pairs)
    if chosen_lengths is None:
        chosen_lengths = lengths[:pairs]
    if rejected_lengths is None:
        rejected_lengths = lengths[pairs:]
    return chosen, rejected, ref_chosen, ref_rejected, None, chosen_lengths, rejected_lengths, *weights


def preference_loss(
    pairs: Sequence[Tensor | None], beta: Tensor | None, fixed_beta: float, keep: Tensor | None, *loss_options: Any
) -> tuple[Tensor, ...]:
    """Losses at a given β, a tensor or else `fixed_beta`; arguments, outputs: `ops.preference_loss.operators`."""
    no_plan = (0.0, 0.0, 0.0, 1.0, 0.0, "batch", "released", 0, False)
    outputs, _ = _launch(pairs, (beta, fixed_beta, keep), None, no_plan, loss_options)
    return outputs


def planned_preference_loss(
    pairs: Sequence[Tensor | None],
    all_margins: Tensor | None,
    first_pair: int,
    m0: Tensor,
    sigma: Tensor,
    step: Tensor,
    plan_options: tuple[float, float, float, float, float, str, str, int, bool],
    loss_options: Sequence[Any],
) -> tuple[Tensor, ...]:
    """Plan and losses in one launch: the outputs of `preference_loss`, then (beta, keep, stats, step)."""
    planned = all_margins, first_pair, m0, sigma, step
    outputs, plan = _launch(pairs, (None, 0.0, None), planned, plan_options, loss_options)
    assert plan is not None
    return (*outputs, *plan)
