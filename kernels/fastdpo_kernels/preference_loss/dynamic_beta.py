"""β-DPO's plan of a batch on the device: margins and running statistics → β, kept pairs, new statistics.

M0 ← m·M0 + (1 − m)·mean(M), σ ← max(m·σ + (1 − m)·std(M), 1e-6); Gumbel-top-k with weights e^(−½((M − M0)/σ)²);
β = max(β0·(1 + α·(M̄ − M0)), least β). Rules and edge cases: `formulas.oracle.dynamic_beta` (2407.08639, 1903.06059).
One program holds all N ≤ 4096 margins, one lane each; 4·N bytes in, at most 5·N out.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdpo_kernels.rng import gumbel_noise

#: More pairs than one program can hold.
MAX_PAIRS = 4096
_SIGMA_FLOOR = tl.constexpr(1e-6)
_INFINITY = tl.constexpr(float("inf"))


@triton.jit
def _top_k(keys: tl.tensor, live: tl.tensor, count: tl.tensor) -> tl.tensor:
    """The `count` largest of the live keys, the lower index first among equals; (BLOCK,) fp32 → (BLOCK,) bool.

    Bisection for the count-th largest, one bit at a time, over integers in the keys' order.
    """
    bits = tl.where(keys == 0.0, 0.0, keys).to(tl.int32, bitcast=True)
    ordered = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.int64) + 2147483648
    ordered = tl.where(live, ordered, -1)
    threshold = tl.full((), 0, tl.int64)
    step = tl.full((), 2147483648, tl.int64)
    for _ in range(32):
        enough = tl.sum((ordered >= threshold + step).to(tl.int32), axis=0) >= count
        threshold += tl.where(enough, step, 0)
        step = step >> 1
    above, equal = ordered > threshold, ordered == threshold
    free = count - tl.sum(above.to(tl.int32), axis=0)
    return above | (equal & (tl.cumsum(equal.to(tl.int32), axis=0) <= free))


@triton.jit
def plan_batch(
    gaps: tl.tensor,
    lanes: tl.tensor,
    n: tl.tensor,
    m0_ptr: tl.tensor,
    sigma_ptr: tl.tensor,
    step_ptr: tl.tensor,
    keep_count: tl.tensor,
    beta: tl.tensor,
    alpha: tl.tensor,
    momentum: tl.tensor,
    rest: tl.tensor,
    min_beta: tl.tensor,
    seed: tl.tensor,
    SCOPE: tl.constexpr,
    VARIANT: tl.constexpr,
    TRAINING: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """β per lane, keep, the M0 and σ used, and the state after: M0, σ, step. `rest` is 1 − momentum."""
    live = lanes < n
    if VARIANT == "paper":
        gaps = gaps * beta
    # NaN compares false
    finite = tl.sum((live & ~(tl.abs(gaps) < _INFINITY)).to(tl.int32), axis=0) == 0
    values = tl.where(live & finite, gaps, 0.0)
    # The second sum takes back the rounding of the first; equal margins then have no spread
    mean = tl.sum(values, axis=0) / n
    mean += tl.sum(tl.where(live & finite, values - mean, 0.0), axis=0) / n
    centred = tl.where(live & finite, values - mean, 0.0)
    std = tl.sqrt_rn(tl.sum(centred * centred, axis=0) / tl.maximum(n - 1, 1))
    old_m0, old_sigma, step = tl.load(m0_ptr).to(tl.float32), tl.load(sigma_ptr).to(tl.float32), tl.load(step_ptr)
    first = step == 0
    if TRAINING:
        # M0 ← m·M0 + (1 − m)·mean, σ ← m·σ + (1 − m)·std; the first batch sets both
        m0 = tl.where(first, mean, momentum * old_m0 + rest * mean)
        sigma = tl.maximum(tl.where(first, std, momentum * old_sigma + rest * std), _SIGMA_FLOOR)
        # Draws with weights e^(−½z²), z = (M − M0)/σ
        z = tl.div_rn(tl.where(live & finite, gaps - m0, 0.0), tl.zeros_like(gaps) + sigma)
        keep = _top_k(-0.5 * (z * z) + gumbel_noise(seed, step, lanes), live, keep_count)
        keep = live & (keep | (finite == 0))
        m0, sigma = tl.where(finite, m0, old_m0), tl.where(finite, sigma, old_sigma)
        new_m0, new_sigma, new_step = m0, sigma, step + finite.to(tl.int64)
    else:
        m0, sigma = tl.where(first, mean, old_m0), tl.where(first, std, old_sigma)
        keep = live
        new_m0, new_sigma, new_step = old_m0, old_sigma, step
    if SCOPE == "instance":
        level = values
    elif VARIANT == "paper":
        level = tl.zeros_like(values) + mean
    else:
        kept = tl.sum(keep.to(tl.int32), axis=0).to(tl.float32)
        level = tl.zeros_like(values) + tl.sum(tl.where(keep, values, 0.0), axis=0) / kept
    # β = max(β0·(1 + α·(level − M0)), least β)
    planned = beta * (1.0 + alpha * (level - m0))
    planned = tl.where(planned < min_beta, min_beta, planned)
    return tl.where(finite, planned, float("nan")), keep, m0, sigma, new_m0, new_sigma, new_step


@triton.jit
def store_plan(
    beta_out_ptr: tl.tensor,
    keep_out_ptr: tl.tensor,
    stats_ptr: tl.tensor,
    step_out_ptr: tl.tensor,
    plan: tl.tuple,
    lanes: tl.tensor,
    n: tl.tensor,
    SCOPE: tl.constexpr,
) -> None:
    """β, keep (n,), and stats = (M0 used, σ used, M0 after, σ after)."""
    beta, keep, m0, sigma, new_m0, new_sigma, step = plan
    tl.store(keep_out_ptr + lanes, keep, mask=lanes < n)
    tl.store(beta_out_ptr + lanes, beta, mask=lanes < (n if SCOPE == "instance" else 1))
    tl.store(stats_ptr, m0)
    tl.store(stats_ptr + 1, sigma)
    tl.store(stats_ptr + 2, new_m0)
    tl.store(stats_ptr + 3, new_sigma)
    tl.store(step_out_ptr, step)


@triton.jit(do_not_specialize=["n", "keep_count", "seed"])
def _dynamic_beta_kernel(
    margins_ptr: tl.tensor,
    m0_ptr: tl.tensor,
    sigma_ptr: tl.tensor,
    step_ptr: tl.tensor,
    beta_out_ptr: tl.tensor,
    keep_out_ptr: tl.tensor,
    stats_ptr: tl.tensor,
    step_out_ptr: tl.tensor,
    n: tl.tensor,
    keep_count: tl.tensor,
    beta: tl.tensor,
    alpha: tl.tensor,
    momentum: tl.tensor,
    rest: tl.tensor,
    min_beta: tl.tensor,
    seed: tl.tensor,
    SCOPE: tl.constexpr,
    VARIANT: tl.constexpr,
    TRAINING: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    lanes = tl.arange(0, BLOCK)
    gaps = tl.load(margins_ptr + lanes, mask=lanes < n, other=0.0).to(tl.float32)
    state = m0_ptr, sigma_ptr, step_ptr
    plan = plan_batch(
        gaps, lanes, n, *state, keep_count, beta, alpha, momentum, rest, min_beta, seed, SCOPE, VARIANT, TRAINING
    )
    store_plan(beta_out_ptr, keep_out_ptr, stats_ptr, step_out_ptr, plan, lanes, n, SCOPE)


class PlanOutputs(NamedTuple):
    """Where a plan is written."""

    beta: Tensor  # 0-D, or (N,) with scope="instance"; fp32
    keep: Tensor  # (N,) bool
    stats: Tensor  # (4,) fp32: M0 and σ used, M0 and σ after
    step: Tensor  # 0-D int64


def empty_plan(n: int, scope: str, device: torch.device) -> PlanOutputs:
    return PlanOutputs(
        torch.empty((n,) if scope == "instance" else (), dtype=torch.float32, device=device),
        torch.empty(n, dtype=torch.bool, device=device),
        torch.empty(4, dtype=torch.float32, device=device),
        torch.empty((), dtype=torch.int64, device=device),
    )


def block_size(n: int) -> tuple[int, int]:
    """(lanes, warps) of the one program that holds n pairs."""
    if n > MAX_PAIRS:
        raise ValueError(f"{n} pairs in one batch; the triton kernels hold up to {MAX_PAIRS}. Use backend='torch'.")
    block = max(triton.next_power_of_2(n), 32)
    return block, min(max(block // 128, 1), 16)


def dynamic_beta(
    margins: Tensor,
    m0: Tensor,
    sigma: Tensor,
    step: Tensor,
    beta: float,
    alpha: float,
    momentum: float,
    keep_ratio: float,
    min_beta: float,
    scope: str,
    variant: str,
    seed: int,
    training: bool,
) -> PlanOutputs:
    """Plan the batch of these (N,) margins; arguments and rules as in `fastdpo.formulas.oracle.dynamic_beta`."""
    n = margins.numel()
    block, warps = block_size(n)
    out = empty_plan(n, scope, margins.device)
    _dynamic_beta_kernel[(1,)](
        margins.contiguous(),
        m0,
        sigma,
        step,
        *out,
        n,
        max(1, math.floor(keep_ratio * n)),
        beta,
        alpha,
        momentum,
        1.0 - momentum,
        min_beta,
        seed,
        SCOPE=scope,
        VARIANT=variant,
        TRAINING=training,
        BLOCK=block,
        num_warps=warps,
    )
    return out


@triton.jit
def _top_k_kernel(keys_ptr: tl.tensor, out_ptr: tl.tensor, n: tl.tensor, count: tl.tensor, BLOCK: tl.constexpr) -> None:
    lanes = tl.arange(0, BLOCK)
    keys = tl.load(keys_ptr + lanes, mask=lanes < n, other=0.0)
    tl.store(out_ptr + lanes, _top_k(keys, lanes < n, count), mask=lanes < n)


def top_k(keys: Tensor, count: int) -> Tensor:
    """Which of (N,) fp32 keys are the `count` largest, the lower index first among equals; (N,) bool."""
    out = torch.empty(keys.numel(), dtype=torch.bool, device=keys.device)
    block, warps = block_size(keys.numel())
    _top_k_kernel[(1,)](keys.contiguous(), out, keys.numel(), count, BLOCK=block, num_warps=warps)
    return out
