"""From the accumulator A = Σ_tiles P W_tile to the unit gradient: rescaled between tiles, finished after the last.

    rescale_rows_          A_t ← rescale_t·A_t, the rows whose peak the last fold raised
    finish_unit_gradient_  A_t ← dlogp_t/dh_t = (1 − p_ty)·dz/dx[y]·W[y] − logit_scale/temperature·A_t/Σ_v exp(z − m)

In go A (R, H) float32, `fold.RowState`, and for the end the weight (V, H) and the targets (R,). Bytes per element of A:
8 in the rows that moved, else none; at the end 8 and an element of W.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdpo_kernels.launch_checks import check_rows, check_tile
from fastdpo_kernels.linear_logprob.fold import RowState
from fastdpo_kernels.linear_logprob.scales import LogitScales

#: Block over the hidden size: two 128-bit accesses per thread.
_BLOCK, _WARPS = 1024, 4

# Kernels


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


# Launchers


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
        num_warps=_WARPS,
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
        LogitScales(logit_scale, temperature).slope,
        BLOCK=_BLOCK,
        num_warps=_WARPS,
    )
