"""Dynamic β and the filter of β-DPO for one batch, in eager PyTorch: margins and statistics in, a `BetaPlan` out."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fastdpo.formulas.beta_options import BetaOptions
from fastdpo.formulas.oracle.precision import at_least_float32
from fastdpo.formulas.outputs import BetaPlan, BetaState
from fastdpo.formulas.rng import gumbel

#: Least running spread: equal models give margins without any.
SIGMA_FLOOR = 1e-6


def gumbel_top_k(log_weights: Tensor, noise: Tensor, count: int) -> Tensor:
    """Draw `count` of N without replacement, with probabilities proportional to e^log_weights: the largest sums with
    Gumbel noise (1903.06059). (N,), (N,) → (N,) bool. Of equal sums the lower index wins."""
    order = torch.argsort(log_weights + noise, descending=True, stable=True)
    return torch.zeros_like(order, dtype=torch.bool).index_fill(0, order[:count], True)


def dynamic_beta(
    margins: Tensor,
    state: BetaState,
    *,
    options: BetaOptions | None = None,
    training: bool = True,
    **named: Any,
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
        options: the settings, or the fields of `BetaOptions` by keyword.

    Raises:
        ValueError: an option out of range, or margins that are not (N,) with N ≥ 1.
    """
    if options is not None and named:
        raise ValueError(f"options and {sorted(named)} say the same thing twice; pass one.")
    options = BetaOptions(**named) if options is None else options
    if margins.dim() != 1 or margins.numel() == 0:
        raise ValueError(f"margins have shape {tuple(margins.shape)}; pass one margin per pair, of at least one pair.")
    beta, alpha, momentum = options.beta, options.alpha, options.momentum
    gaps = at_least_float32(margins.detach()) * (beta if options.variant == "paper" else 1.0)
    n = gaps.numel()
    num_kept = max(1, math.floor(options.keep_ratio * n))
    finite = gaps.isfinite().all()
    batch_mean = gaps.mean()
    batch_std = gaps.std() if n > 1 else torch.zeros_like(batch_mean)
    old_m0, old_sigma = state.m0.to(gaps.dtype), state.sigma.to(gaps.dtype)
    first = state.step == 0
    if training:
        m0 = torch.where(first, batch_mean, momentum * old_m0 + (1.0 - momentum) * batch_mean)
        sigma = torch.where(first, batch_std, momentum * old_sigma + (1.0 - momentum) * batch_std)
        sigma = sigma.clamp(min=SIGMA_FLOOR)
        noise = gumbel(options.seed, state.step, n, gaps.device)
        keep = gumbel_top_k(-0.5 * ((gaps - m0) / sigma) ** 2, noise, num_kept) | ~finite
        m0, sigma = torch.where(finite, m0, old_m0), torch.where(finite, sigma, old_sigma)
        state = BetaState(m0, sigma, state.step + finite.to(state.step.dtype))
    else:
        m0, sigma = torch.where(first, batch_mean, old_m0), torch.where(first, batch_std, old_sigma)
        state = BetaState(*(x.clone() for x in state))  # not the module's own buffers, which change later
        keep = torch.ones_like(gaps, dtype=torch.bool)
    if options.scope == "instance":
        level = gaps
    elif options.variant == "paper":
        level = batch_mean
    else:
        level = torch.where(keep, gaps, 0.0).sum() / keep.sum()
    planned = (beta * (1.0 + alpha * (level - m0))).clamp(min=options.min_beta)
    return BetaPlan(torch.where(finite, planned, math.nan), keep, m0, sigma, state)
