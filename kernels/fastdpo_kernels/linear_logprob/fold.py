"""What is folded out of a tile of head logits: online softmax statistics, unit gradients, gradients of the logits.

A GEMM outside gives x = hidden W_tileᵀ, an (R, C) float32 tile of raw logits for C columns of the vocabulary. With
    r = (x + bias)·logit_scale,   z = cap·tanh(r/cap)/temperature   (or r/temperature without a cap),
each row keeps, over all tiles so far, a peak m and Σ_v≠y exp(z − m), z at the target y, and the statistics' sums.
m is raised only when a tile's maximum exceeds it by more than `threshold`, so that what was accumulated is seldom
rescaled and no exponential exceeds e^threshold (Milakov & Gimelshein 2018, 1805.02867, with a lazy maximum).

    fold_                  x → state, and P = exp(z − m)·(1 − tanh²), 0 at the target, for the GEMM  A += P W_tile
    rescale_rows_          A_t ← rescale_t·A_t, the rows whose peak was raised
    finish_unit_gradient_  A_t ← dlogp_t/dh_t = (1 − p_ty)·dz/dx[y]·W[y] − logit_scale/temperature·A_t/Σ_v exp(z − m)
    logit_gradient_        x → dL/dx = grad_t·(1[v = y_t] − exp(z − lse_t))·dz/dx, where the head is trained

The target stays out of the sums and of P: 1 − p_y = Σ_v≠y exp(z − m)/Σ_v exp(z − m) is then no difference of nearly
equal numbers where the row is confident, and nothing of it was rounded to 16 bits.

Bytes per element of a tile: 4 read by `fold_`, and 4 or 2 written for the policy; as much for `logit_gradient_`.
`finish_unit_gradient_`: 8 and an element of W per element of A. `rescale_rows_`: 8 in the rows that moved, else none.
A row of a tile is one block, held in registers, so that its maximum is known before the first exponential.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdpo_kernels.device_math import expm1, final_logit
from fastdpo_kernels.launch_checks import check_bias, check_rows, check_tile

#: Widest tile: at 16,384 columns a program with a cap and all statistics spills registers.
MAX_COLUMNS = 8192
#: (widest block, warps). 16 elements per thread: four 128-bit loads, enough registers for all sums.
_WARPS = ((512, 1), (1024, 2), (2048, 4), (4096, 8), (MAX_COLUMNS, 16))
#: Block over the hidden size, or over columns where elements are independent: two 128-bit accesses per thread.
_BLOCK, _BLOCK_WARPS = 1024, 4


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


# Kernels


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


@triton.jit
def _rescale_rows_kernel(
    accumulator_ptr: tl.tensor,
    rescale_ptr: tl.tensor,
    hidden: tl.tensor,
    stride_accumulator: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    rescale = tl.load(rescale_ptr + row)
    if rescale != 1.0:
        for start in tl.range(0, hidden, BLOCK):
            column = start + tl.arange(0, BLOCK)
            pointers = accumulator_ptr + row * stride_accumulator + column
            tl.store(pointers, rescale * tl.load(pointers, mask=column < hidden, other=0.0), mask=column < hidden)


@triton.jit
def _finish_unit_gradient_kernel(
    accumulator_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    targets_ptr: tl.tensor,
    peak_ptr: tl.tensor,
    others_ptr: tl.tensor,
    target_logit_ptr: tl.tensor,
    target_damping_ptr: tl.tensor,
    vocab: tl.tensor,
    hidden: tl.tensor,
    stride_accumulator: tl.tensor,
    stride_weight_row: tl.tensor,
    stride_weight_column: tl.tensor,
    scale: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < hidden
    target = tl.load(targets_ptr + row)
    # A target outside the vocabulary was never seen: its logit is NaN, and so is all that follows
    valid = (target >= 0) & (target < vocab)
    target_row = weight_ptr + tl.where(valid, target, 0) * stride_weight_row
    weight = tl.load(target_row + column.to(tl.int64) * stride_weight_column, mask=inside & valid, other=0.0).to(
        tl.float32
    )
    others = tl.load(others_ptr + row)
    total = others + tl.exp(tl.load(target_logit_ptr + row) - tl.load(peak_ptr + row))
    # 1 − p_y = Σ_v≠y e^{z−m}/Σ_v e^{z−m}
    share = others / total * tl.load(target_damping_ptr + row)
    pointers = accumulator_ptr + row * stride_accumulator + column
    accumulated = tl.load(pointers, mask=inside, other=0.0)
    # g = scale·((1 − p_y)·damping_y·W[y] − A/Σ_v e^{z−m})
    tl.store(pointers, scale * (share * weight - accumulated / total), mask=inside)


@triton.jit
def _logit_gradient_kernel(
    tile_ptr: tl.tensor,
    out_ptr: tl.tensor,
    targets_ptr: tl.tensor,
    bias_ptr: tl.tensor | None,
    lse_ptr: tl.tensor,
    logps_ptr: tl.tensor,
    grad_ptr: tl.tensor,
    columns: tl.tensor,
    first_column: tl.tensor,
    vocab: tl.tensor,
    stride_tile: tl.tensor,
    stride_out: tl.tensor,
    in_scale: tl.tensor,
    out_scale: tl.tensor,
    scale: tl.tensor,
    CAPPED: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < columns
    x = tl.load(tile_ptr + row * stride_tile + column, mask=inside, other=0.0)
    if bias_ptr is not None:
        x += tl.load(bias_ptr + first_column + column, mask=inside, other=0.0).to(tl.float32)
    z, damping = final_logit(x, in_scale, out_scale, CAPPED)
    target = tl.load(targets_ptr + row)
    grad = tl.where((target >= 0) & (target < vocab), tl.load(grad_ptr + row), float("nan"))
    # 1 − p_y from log p_y, which has its digits where p_y is nearly 1
    at_target = -expm1(tl.load(logps_ptr + row))
    # dL/dx = grad·scale·(1[v = y] − p_v)·(1 − tanh²)
    share = tl.where(column + first_column == target, at_target, -tl.exp(z - tl.load(lse_ptr + row)))
    gradient = grad * scale * share * damping
    tl.store(out_ptr + row * stride_out + column, gradient.to(out_ptr.dtype.element_ty), mask=inside)


# Launchers


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
    in_scale, out_scale = _scales(logit_scale, temperature, softcap)
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
        in_scale,
        out_scale,
        threshold,
        CAPPED=softcap is not None,
        BLOCK=block,
        num_warps=next(warps for widest, warps in _WARPS if block <= widest),
    )


def rescale_rows_(accumulator: Tensor, rescale: Tensor) -> None:
    """accumulator (R, H) float32 ← rescale (R,)·accumulator; rows whose factor is 1 are not touched."""
    check_tile("accumulator", accumulator, torch.float32)
    check_rows(accumulator.shape[0], rescale=rescale)
    if accumulator.numel() == 0:
        return
    _rescale_rows_kernel[(accumulator.shape[0],)](
        accumulator,
        rescale,
        accumulator.shape[1],
        accumulator.stride(0),
        BLOCK=_BLOCK,
        num_warps=_BLOCK_WARPS,
    )


def finish_unit_gradient_(
    accumulator: Tensor,
    weight: Tensor,
    targets: Tensor,
    state: RowState,
    *,
    logit_scale: float = 1.0,
    temperature: float = 1.0,
) -> None:
    """accumulator_t ← dlogp_t/dh_t = scale·((1 − p_y)·damping_y·W[y] − accumulator_t/Σ_v exp(z − peak)), in place.

    Args:
        accumulator: (R, H) float32, Σ_v≠y exp(z − peak)·(1 − tanh²)·W[v] over the whole vocabulary.
        weight: (V, H), any float dtype, any strides.
        targets: (R,) int64; a row whose target is outside [0, V) becomes NaN.
    """
    check_tile("accumulator", accumulator, torch.float32)
    rows, hidden = accumulator.shape
    if weight.dim() != 2 or weight.shape[1] != hidden:
        raise ValueError(f"weight has shape {tuple(weight.shape)}; (V, {hidden}) is needed.")
    check_rows(rows, targets=targets, others=state.others)
    if accumulator.numel() == 0:
        return
    _finish_unit_gradient_kernel[(rows, triton.cdiv(hidden, _BLOCK))](
        accumulator,
        weight,
        targets,
        state.peak,
        state.others,
        state.target_logit,
        state.target_damping,
        weight.shape[0],
        hidden,
        accumulator.stride(0),
        weight.stride(0),
        weight.stride(1),
        logit_scale / temperature,
        BLOCK=_BLOCK,
        num_warps=_BLOCK_WARPS,
    )


def logit_gradient_(
    tile: Tensor,
    out: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    first_column: int,
    lse: Tensor,
    logps: Tensor,
    grad: Tensor,
    *,
    vocab_size: int,
    logit_scale: float = 1.0,
    temperature: float = 1.0,
    softcap: float | None = None,
) -> None:
    """out ← dL/dx = grad·(1[v = y] − exp(z − lse))·dz/dx for the tile's columns.

    Args:
        tile: (R, C) float32 raw logits, columns contiguous.
        out: (R, C) float32, bfloat16 or float16; may be `tile`.
        targets: (R,) int64; a row whose target is outside [0, vocab_size) becomes NaN.
        lse, logps: (R,) float32, log Σ exp z over the whole vocabulary and log p_y.
        grad: (R,) float32, dL/dlogp.
    """
    rows, columns = tile.shape
    check_tile("tile", tile, torch.float32)
    check_tile("out", out, torch.float32, torch.bfloat16, torch.float16, shape=tile.shape)
    check_rows(rows, targets=targets, lse=lse, logps=logps, grad=grad)
    check_bias(bias, first_column, columns)
    if rows == 0 or columns == 0:
        return
    in_scale, out_scale = _scales(logit_scale, temperature, softcap)
    _logit_gradient_kernel[(rows, triton.cdiv(columns, _BLOCK))](
        tile,
        out,
        targets,
        bias,
        lse,
        logps,
        grad,
        columns,
        first_column,
        vocab_size,
        tile.stride(0),
        out.stride(0),
        in_scale,
        out_scale,
        logit_scale / temperature,
        CAPPED=softcap is not None,
        BLOCK=_BLOCK,
        num_warps=_BLOCK_WARPS,
    )


def _scales(logit_scale: float, temperature: float, softcap: float | None) -> tuple[float, float]:
    """(in_scale, out_scale) of `final_logit`."""
    if softcap is None:
        return logit_scale / temperature, 1.0
    return logit_scale / softcap, softcap / temperature
