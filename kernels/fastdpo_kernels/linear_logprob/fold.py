"""The online fold of a tile of head logits: softmax statistics per row, and exponentials for the gradient's GEMM.

A GEMM outside gives x = hidden W_tileᵀ, an (R, C) float32 tile of raw logits for C columns of the vocabulary. With
    r = (x + bias)·logit_scale,   z = cap·tanh(r/cap)/temperature   (or r/temperature without a cap),
each row keeps, over all tiles so far, a peak m and Σ_v≠y exp(z − m), z at the target y, and the statistics' sums:
`fold_` takes x into that state, and writes P = exp(z − m)·(1 − tanh²), 0 at the target, for the GEMM  A += P W_tile.
m is raised only when a tile's maximum exceeds it by more than `threshold`, so that what was accumulated is seldom
rescaled and no exponential exceeds e^threshold (Milakov & Gimelshein 2018, 1805.02867, with a lazy maximum).
`unit_gradient` rescales A between tiles and finishes it.

The target stays out of the sums and of P: 1 − p_y = Σ_v≠y exp(z − m)/Σ_v exp(z − m) is then no difference of nearly
equal numbers where the row is confident, and nothing of it was rounded to 16 bits.

Bytes per element of a tile: 4 read, and 4 or 2 written for the policy.
A row of a tile is one block, held in registers, so that its maximum is known before the first exponential.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdpo_kernels.device_math import final_logit
from fastdpo_kernels.launch_checks import check_bias, check_rows, check_tile
from fastdpo_kernels.linear_logprob.scales import LogitScales

#: Widest tile: at 16,384 columns a program with a cap and all statistics spills registers.
MAX_COLUMNS = 8192
#: (widest block, warps). 16 elements per thread: four 128-bit loads, enough registers for all sums.
_WARPS = ((512, 1), (1024, 2), (2048, 4), (4096, 8), (MAX_COLUMNS, 16))


class RowState(NamedTuple):
    """Online statistics of R rows. All (R,) and float32 but `best_index`; None where no statistic needs it.

    Sums of exponentials leave the target y out. With e = exp(target_logit − peak): Σ exp(z − peak) = others + e,
    logp = −log(1 + others/e), 1 − p = others/(others + e). Statistics add the target's term to their sums.
    """

    peak: Tensor  # m, what the exponentials refer to; within `threshold` of the maximum so far
    others: Tensor  # Σ_v≠y exp(z − m)
    target_logit: Tensor  # z at the target; NaN until its column was seen
    target_damping: Tensor  # 1 − tanh² at the target, 1 without a cap; NaN until its column was seen
    rescale: Tensor  # exp(old m − new m) of the last fold; 1 where the peak stayed, or nothing came before
    weighted_sum: Tensor | None  # Σ_v≠y exp(z − m)·(z − m): about the peak, so large logits cancel unrounded
    logit_sum: Tensor | None  # Σ z
    square_sum: Tensor | None  # Σ_v≠y exp(2(z − m))
    best_logit: Tensor | None  # the maximum of z, exactly
    best_index: Tensor | None  # int64, where it is; the first of equals

    @classmethod
    def fresh(cls, rows: int, device: torch.device | str, stats: Collection[str] = ()) -> RowState:
        """The state before the first tile, for the log-prob and the named statistics of `linear_logprob`."""

        def filled(value: float, needed: bool = True) -> Tensor | None:
            return torch.full((rows,), value, dtype=torch.float32, device=device) if needed else None

        top1 = "is_top1" in stats
        return cls(
            peak=torch.full((rows,), -torch.inf, dtype=torch.float32, device=device),
            others=torch.zeros(rows, dtype=torch.float32, device=device),
            target_logit=torch.full((rows,), torch.nan, dtype=torch.float32, device=device),
            target_damping=torch.full((rows,), torch.nan, dtype=torch.float32, device=device),
            rescale=torch.ones(rows, dtype=torch.float32, device=device),
            weighted_sum=filled(0.0, "entropy" in stats),
            logit_sum=filled(0.0, "mean_logits" in stats),
            square_sum=filled(0.0, "log_sum_sq_probs" in stats),
            best_logit=filled(-torch.inf, top1),
            best_index=torch.zeros(rows, dtype=torch.int64, device=device) if top1 else None,
        )


# Kernel


@triton.jit
def _fold_kernel(
    tile_ptr: tl.tensor,
    probs_ptr: tl.tensor | None,
    targets_ptr: tl.tensor,
    bias_ptr: tl.tensor | None,
    peak_ptr: tl.tensor,
    others_ptr: tl.tensor,
    target_logit_ptr: tl.tensor,
    target_damping_ptr: tl.tensor,
    rescale_ptr: tl.tensor,
    weighted_sum_ptr: tl.tensor | None,
    logit_sum_ptr: tl.tensor | None,
    square_sum_ptr: tl.tensor | None,
    best_logit_ptr: tl.tensor | None,
    best_index_ptr: tl.tensor | None,
    columns: tl.tensor,
    first_column: tl.tensor,
    stride_tile: tl.tensor,
    stride_probs: tl.tensor,
    in_scale: tl.tensor,
    out_scale: tl.tensor,
    threshold: tl.tensor,
    CAPPED: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < columns
    tile_row = tile_ptr + row * stride_tile
    x = tl.load(tile_row + column, mask=inside, other=0.0)
    # The target's logit is read alone: before the row's maximum, at whose barrier no column was overwritten yet
    target = tl.load(targets_ptr + row)
    seen = (target >= first_column) & (target < first_column + columns)
    target_column = tl.where(seen, target - first_column, 0)
    target_x = tl.load(tile_row + target_column, mask=seen, other=0.0)
    if bias_ptr is not None:
        x += tl.load(bias_ptr + first_column + column, mask=inside, other=0.0).to(tl.float32)
        target_x += tl.load(bias_ptr + first_column + target_column, mask=seen, other=0.0).to(tl.float32)
    z, damping = final_logit(x, in_scale, out_scale, CAPPED)
    target_z, target_damping = final_logit(target_x, in_scale, out_scale, CAPPED)
    tl.store(target_logit_ptr + row, target_z, mask=seen)
    tl.store(target_damping_ptr + row, target_damping, mask=seen)

    masked = tl.where(inside, z, -float("inf"))
    row_max = tl.max(masked, axis=0)
    old_peak = tl.load(peak_ptr + row)
    # m' = row_max if row_max > m + threshold, else m
    peak = tl.where(row_max > old_peak + threshold, row_max, old_peak)
    # No finite logit so far leaves m at −∞: the exponentials then refer to 0, and vanish
    centre = tl.where(peak == -float("inf"), 0.0, peak)
    shift = tl.where(old_peak == -float("inf"), centre, old_peak) - centre
    rescale = tl.exp(shift)
    centred = masked - centre
    exps = tl.where(seen & (column == target_column), 0.0, tl.exp(centred))
    old_others = tl.load(others_ptr + row)
    # Σ' = exp(m − m')·Σ + Σ_v≠y exp(z − m')
    tl.store(others_ptr + row, rescale * old_others + tl.sum(exps, axis=0))
    tl.store(peak_ptr + row, peak)
    tl.store(rescale_ptr + row, rescale)
    if weighted_sum_ptr is not None:
        # Σ e^{z−m'}(z − m') = exp(m − m')·(Σ e^{z−m}(z − m) + (m − m')·Σ e^{z−m}) + the tile's; 0·log 0 counts as 0
        weighted = tl.load(weighted_sum_ptr + row) + shift * old_others
        terms = exps * tl.where(exps == 0.0, 0.0, centred)
        tl.store(weighted_sum_ptr + row, rescale * weighted + tl.sum(terms, axis=0))
    if logit_sum_ptr is not None:
        tl.store(logit_sum_ptr + row, tl.load(logit_sum_ptr + row) + tl.sum(z, axis=0))  # x = z = 0 beyond C
    if square_sum_ptr is not None:
        squares = rescale * rescale * tl.load(square_sum_ptr + row)
        tl.store(square_sum_ptr + row, squares + tl.sum(exps * exps, axis=0))
    if best_logit_ptr is not None:
        better = row_max > tl.load(best_logit_ptr + row)
        index = tl.min(tl.where(masked == row_max, column, BLOCK), axis=0)
        tl.store(best_logit_ptr + row, row_max, mask=better)
        tl.store(best_index_ptr + row, first_column + index.to(tl.int64), mask=better)
    if probs_ptr is not None:
        # P = e^{z−m'}·(1 − tanh²)
        out = (exps * damping).to(probs_ptr.dtype.element_ty)
        tl.store(probs_ptr + row * stride_probs + column, out, mask=inside)


# Launcher


def fold_(
    tile: Tensor,
    probs_out: Tensor | None,
    targets: Tensor,
    bias: Tensor | None,
    first_column: int,
    state: RowState,
    *,
    logit_scale: float = 1.0,
    temperature: float = 1.0,
    softcap: float | None = None,
    threshold: float = 8.0,
) -> None:
    """Fold the columns first_column … first_column + C − 1 of the vocabulary into `state`.

    Args:
        tile: (R, C) float32 raw logits, columns contiguous, C ≤ MAX_COLUMNS. Only read, unless it is `probs_out` too.
        probs_out: (R, C), takes exp(z − peak)·(1 − tanh²) in its dtype, 0 at the targets; may be `tile`. None writes
            nothing.
        targets: (R,) int64; those outside [0, V) leave target_logit and target_damping NaN.
        bias: (V,), contiguous, any float dtype.
        state: of R rows; what it holds decides which statistics are kept. After a call, rows of the accumulator must
            be multiplied by `state.rescale` before the product with `probs_out` is added.
        threshold: how far z may rise above the peak; e^8 leaves room in float16.

    Raises:
        ValueError, TypeError: a shape, stride or dtype that does not fit, named.
    """
    rows, columns = tile.shape
    check_tile("tile", tile, torch.float32)
    if columns > MAX_COLUMNS:
        raise ValueError(f"tile has {columns} columns; a program holds at most {MAX_COLUMNS}. Plan narrower tiles.")
    if probs_out is not None:
        check_tile("probs_out", probs_out, torch.float32, torch.bfloat16, torch.float16, shape=tile.shape)
    check_rows(rows, targets=targets, peak=state.peak)
    check_bias(bias, first_column, columns)
    if rows == 0 or columns == 0:
        return
    scales = LogitScales(logit_scale, temperature, softcap)
    block = triton.next_power_of_2(columns)
    _fold_kernel[(rows,)](
        tile,
        probs_out,
        targets,
        bias,
        *state,
        columns,
        first_column,
        tile.stride(0),
        0 if probs_out is None else probs_out.stride(0),
        *scales.arguments(),
        threshold,
        CAPPED=softcap is not None,
        BLOCK=block,
        num_warps=next(warps for widest, warps in _WARPS if block <= widest),
    )
