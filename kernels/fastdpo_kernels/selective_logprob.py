"""log softmax(logits/T)[target] of logits that exist, and its gradient: one program per row, online softmax.

With peak = max_v x_v of the logits x and log_total = log Σ_v exp((x_v − peak)/T) over V columns:
    forward   logp = (x_y − peak)/T − log_total        reads the logits once, (V·itemsize + 20) bytes per row
    backward  dL/dx_v = grad/T·(1[v = y] − exp((x_v − peak)/T − log_total))    reads them once, writes the gradient once
Rows whose target is `ignore_index` are not read: all that is written for them is 0. A target outside [0, V) reads
nothing either and makes its row NaN. Logits are (B, T, V) views with any strides, so that logits[:, :-1] is no copy.
Online softmax: Milakov & Gimelshein 2018, 1805.02867.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

#: (widest block, warps): 16 elements per thread, two 128-bit loads in 16 bits, four in float32.
_WARPS = ((512, 1), (1024, 2), (2048, 4), (4096, 8))
MAX_BLOCK = _WARPS[-1][0]

# Kernels


@triton.jit
def _row_pointer(
    base_ptr: tl.tensor, row: tl.tensor, inner: tl.tensor, stride_b: tl.tensor, stride_t: tl.tensor
) -> tl.tensor:
    """Pointer to row b·T + t of a (B, T, V) view; row is int64, as B·T·V overflows int32."""
    return base_ptr + (row // inner) * stride_b + (row % inner) * stride_t


@triton.jit(do_not_specialize=["ignore_index", "inner"])
def _selective_logprob_fwd_kernel(
    logits_ptr: tl.tensor,
    targets_ptr: tl.tensor,
    logps_ptr: tl.tensor,
    peak_ptr: tl.tensor,
    log_total_ptr: tl.tensor,
    inner: tl.tensor,
    vocab: tl.tensor,
    stride_b: tl.tensor,
    stride_t: tl.tensor,
    stride_v: tl.tensor,
    ignore_index: tl.tensor,
    scale_high: tl.tensor,
    scale_low: tl.tensor,
    HAS_IGNORED: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    dtype = peak_ptr.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    logits_row = _row_pointer(logits_ptr, row, inner, stride_b, stride_t)
    # 1/T to 48 bits: scalars arrive in float32, which is too coarse for float64 logits
    scale = tl.cast(scale_high, dtype) + tl.cast(scale_low, dtype)
    target = tl.load(targets_ptr + row)
    if HAS_IGNORED:
        ignored = target == ignore_index
        columns = tl.where(ignored, 0, vocab)
    else:
        columns = vocab
    valid = (target >= 0) & (target < columns)
    peak = tl.full((), -float("inf"), dtype)
    sums = tl.zeros((BLOCK,), dtype)
    for start in tl.range(0, columns, BLOCK):
        column = start + tl.arange(0, BLOCK)
        x = tl.load(logits_row + column.to(tl.int64) * stride_v, mask=column < columns, other=-float("inf"))
        x = x.to(dtype)
        new_peak = tl.maximum(peak, tl.max(x, axis=0))
        # Nothing finite so far: exponentials refer to 0, and vanish
        centre = tl.where(new_peak == -float("inf"), 0.0, new_peak)
        # Σ' = exp((m − m')/T)·Σ + exp((x − m')/T), lane by lane
        sums = sums * tl.exp((peak - centre) * scale) + tl.exp((x - centre) * scale)
        peak = new_peak
    log_total = tl.log(tl.sum(sums, axis=0))
    target_x = tl.load(logits_row + tl.where(valid, target, 0) * stride_v, mask=valid, other=float("nan"))
    # Exact where the target is the maximum, however large it is
    logp = (target_x.to(dtype) - peak) * scale - log_total
    if HAS_IGNORED:
        logp = tl.where(ignored, 0.0, logp)
        peak = tl.where(ignored, 0.0, peak)
        log_total = tl.where(ignored, 0.0, log_total)
    tl.store(logps_ptr + row, logp)
    tl.store(peak_ptr + row, peak)
    tl.store(log_total_ptr + row, log_total)


@triton.jit(do_not_specialize=["ignore_index", "inner"])
def _selective_logprob_bwd_kernel(
    grad_ptr: tl.tensor,
    logits_ptr: tl.tensor,
    targets_ptr: tl.tensor,
    peak_ptr: tl.tensor,
    log_total_ptr: tl.tensor,
    out_ptr: tl.tensor,
    inner: tl.tensor,
    vocab: tl.tensor,
    stride_b: tl.tensor,
    stride_t: tl.tensor,
    stride_v: tl.tensor,
    stride_out_b: tl.tensor,
    stride_out_t: tl.tensor,
    stride_out_v: tl.tensor,
    ignore_index: tl.tensor,
    scale_high: tl.tensor,
    scale_low: tl.tensor,
    HAS_IGNORED: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    dtype = peak_ptr.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    offset = column.to(tl.int64)
    logits_row = _row_pointer(logits_ptr, row, inner, stride_b, stride_t)
    out_row = _row_pointer(out_ptr, row, inner, stride_out_b, stride_out_t)
    scale = tl.cast(scale_high, dtype) + tl.cast(scale_low, dtype)
    target = tl.load(targets_ptr + row)
    valid = (target >= 0) & (target < vocab)
    grad = tl.where(valid, tl.load(grad_ptr + row) * scale, float("nan"))
    inside = column < vocab
    scored = inside
    if HAS_IGNORED:
        scored = inside & (target != ignore_index)
    x = tl.load(logits_row + offset * stride_v, mask=scored, other=0.0)
    hit = tl.where(column == target, 1.0, 0.0).to(dtype)
    # dL/dx = grad/T·(1[v = y] − exp((x − m)/T − log Σ))
    centred = (x.to(dtype) - tl.load(peak_ptr + row)) * scale
    gradient = grad * (hit - tl.exp(centred - tl.load(log_total_ptr + row)))
    gradient = tl.where(scored, gradient, 0.0)
    tl.store(out_row + offset * stride_out_v, gradient.to(out_ptr.dtype.element_ty), mask=inside)


# Launchers


def selective_logprob(
    logits: Tensor,
    targets: Tensor,
    logps: Tensor,
    peak: Tensor,
    log_total: Tensor,
    *,
    ignore_index: int | None,
    temperature: float,
) -> None:
    """Fill logps, peak and log_total, (B·T,), from logits (B, T, V) and targets (B·T,).

    Args:
        logits: any floating dtype, any strides.
        targets: int64, contiguous.
        logps, peak, log_total: contiguous, float32, or float64 for float64 logits.
        ignore_index: the target of rows to leave out; None if there are none.
    """
    _check(logits, targets=targets, logps=logps, peak=peak, log_total=log_total)
    _, inner, vocab = logits.shape
    if targets.numel() == 0:
        return
    block, warps = _block(vocab)
    _selective_logprob_fwd_kernel[(targets.numel(),)](
        logits,
        targets,
        logps,
        peak,
        log_total,
        inner,
        vocab,
        *logits.stride(),
        0 if ignore_index is None else ignore_index,
        *_split_reciprocal(temperature),
        HAS_IGNORED=ignore_index is not None,
        BLOCK=block,
        num_warps=warps,
    )


def selective_logprob_backward(
    grad: Tensor,
    logits: Tensor,
    targets: Tensor,
    peak: Tensor,
    log_total: Tensor,
    out: Tensor,
    *,
    ignore_index: int | None,
    temperature: float,
) -> None:
    """Fill out (B, T, V), which may be `logits`, with dL/dlogits for grad = dL/dlogps (B·T,). Others as forward."""
    _check(logits, targets=targets, grad=grad, peak=peak, log_total=log_total)
    if out.shape != logits.shape:
        raise ValueError(f"out has shape {tuple(out.shape)}; logits have {tuple(logits.shape)}.")
    _, inner, vocab = logits.shape
    if logits.numel() == 0:
        return
    block, warps = _block(vocab)
    _selective_logprob_bwd_kernel[(targets.numel(), triton.cdiv(vocab, block))](
        grad,
        logits,
        targets,
        peak,
        log_total,
        out,
        inner,
        vocab,
        *logits.stride(),
        *out.stride(),
        0 if ignore_index is None else ignore_index,
        *_split_reciprocal(temperature),
        HAS_IGNORED=ignore_index is not None,
        BLOCK=block,
        num_warps=warps,
    )


def _block(vocab: int) -> tuple[int, int]:
    """Columns per block, and warps."""
    block = min(triton.next_power_of_2(max(vocab, 1)), MAX_BLOCK)
    return block, next(warps for widest, warps in _WARPS if block <= widest)


def _split_reciprocal(temperature: float) -> tuple[float, float]:
    """1/temperature as the sum of two float32 numbers."""
    exact = 1.0 / temperature
    high = torch.tensor(exact, dtype=torch.float32).item()
    return high, exact - high


def _check(logits: Tensor, **rows: Tensor) -> None:
    if logits.dim() != 3:
        raise ValueError(f"logits have shape {tuple(logits.shape)}; (B, T, V) is needed.")
    count = logits.shape[0] * logits.shape[1]
    statistics = torch.promote_types(logits.dtype, torch.float32)
    for name, tensor in rows.items():
        dtype = torch.int64 if name == "targets" else statistics
        if tensor.shape != (count,) or not tensor.is_contiguous():
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}; contiguous ({count},) is needed.")
        if tensor.dtype != dtype:
            raise TypeError(f"{name} is {tensor.dtype}; logits in {logits.dtype} need {dtype}.")
