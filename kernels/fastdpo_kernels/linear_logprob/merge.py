"""From the partial sums of `gemm.head_gemm` to log-probs, log-normalizers and unit gradients.

Per row, with t the largest of its tiles' tops, in units of log 2, and e_y = 2^(z_y − t) at the target y:
    others = Σ_tiles 2^(top − t)·sum,   log p_y = −log(1 + others/e_y),   lse = (t + log₂(others + e_y))·log 2
and with A = Σ_chunks E W, which refers to m̂:
    dlogp/dh = scale·((1 − p_y)·(1 − tanh_y²)·W[y] − e^(m̂ − lse)·A),   1 − p_y = others/(others + e_y)
The target's share is added in float32 and stays out of A, so 1 − p_y of a confident row keeps its digits.

`merge` is one launch: 8 bytes per row and tile read; with a gradient, per element of it, 4 of A and an element of W
read, an element written. `rescue_` is one launch of a program per row that returns at once unless the row is flagged,
and else reads the weight twice; how many are flagged is never read on the host. No atomics, no locks.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdpo_kernels.device_math import final_logit, log1p, tanh
from fastdpo_kernels.launch_checks import check_rows, check_tile
from fastdpo_kernels.linear_logprob.gemm import LOG_2, Partials, Reference
from fastdpo_kernels.linear_logprob.scales import PLAIN, LogitScales

_LOG_2 = tl.constexpr(0.6931471805599453)
#: Rows of a program: a sector of 32 bytes of every tile's partial sums.
_ROWS = 8
#: Tiles that are merged at a time, and elements of a row that are finished at a time.
_TILES, _BLOCK = 64, 512
#: Tokens and hidden units of a flagged row's products.
_RESCUE_TOKENS, _RESCUE_BLOCK = 32, 1024

# Kernels


# Sizes that change from call to call: one compiled kernel serves them all
@triton.jit(do_not_specialize=["rows", "tiles"])
def _merge_kernel(
    tops_ptr: tl.tensor,
    sums_ptr: tl.tensor,
    target_raw_ptr: tl.tensor,
    targets_ptr: tl.tensor,
    estimate_ptr: tl.tensor | None,
    logps_ptr: tl.tensor,
    lse_ptr: tl.tensor,
    accumulator_ptr: tl.tensor | None,
    weight_ptr: tl.tensor | None,
    gradient_ptr: tl.tensor | None,
    rows: tl.tensor,
    tiles: tl.tensor,
    vocab: tl.tensor,
    hidden: tl.tensor,
    stride_accumulator: tl.tensor,
    stride_weight: tl.tensor,
    stride_gradient: tl.tensor,
    in_scale: tl.tensor,
    out_scale: tl.tensor,
    scale: tl.tensor,
    CAPPED: tl.constexpr,
    ROWS: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = row < rows
    peak = tl.full((ROWS,), -float("inf"), tl.float32)
    others = tl.zeros((ROWS,), dtype=tl.float32)
    for start in range(0, tiles, TILES):
        tile = start + tl.arange(0, TILES)
        at = tile.to(tl.int64)[:, None] * rows + row[None, :]
        mask = (tile < tiles)[:, None] & inside[None, :]
        tops = tl.load(tops_ptr + at, mask=mask, other=-float("inf"))
        sums = tl.load(sums_ptr + at, mask=mask, other=0.0)
        new_peak = tl.maximum(peak, tl.max(tops, axis=0))
        # No finite logit so far: exponentials refer to 0, and vanish
        centre = tl.where(new_peak == -float("inf"), 0.0, new_peak)
        others = others * tl.exp2(peak - centre) + tl.sum(sums * tl.exp2(tops - centre[None, :]), axis=0)
        peak = new_peak
    target = tl.load(targets_ptr + row, mask=inside, other=-1)
    valid = (target >= 0) & (target < vocab)
    # A target outside the vocabulary was in no tile: its row is NaN
    z = tl.load(target_raw_ptr + row, mask=inside & valid, other=float("nan"))
    damping = tl.full((ROWS,), 1.0, tl.float32)
    if CAPPED:
        z, damping = tanh(z * in_scale)
        z = z * out_scale
    else:
        z = z * in_scale
    at_target = tl.exp2(z - peak)
    total = others + at_target
    likely = at_target > others
    odds = others / tl.where(likely, at_target, 1.0)
    unlikely = (z - peak) * _LOG_2 - tl.log(total)
    tl.store(logps_ptr + row, tl.where(likely, -log1p(tl.where(likely, odds, 0.0)), unlikely), mask=inside)
    tl.store(lse_ptr + row, peak * _LOG_2 + tl.log(total), mask=inside)
    if gradient_ptr is not None:
        # e^(m̂ − lse) = 2^(m̂ − t)/Σ_v 2^(z_v − t)
        factor = scale * tl.exp2(tl.load(estimate_ptr + row, mask=inside, other=0.0) - peak) / total
        share = scale * damping * others / total
        read = tl.where(valid, target, 0)
        for start in range(0, hidden, BLOCK):
            k = start + tl.arange(0, BLOCK)
            mask = inside[:, None] & (k < hidden)[None, :]
            sums = tl.load(accumulator_ptr + row[:, None] * stride_accumulator + k[None, :], mask=mask, other=0.0)
            w = tl.load(weight_ptr + read[:, None] * stride_weight + k[None, :], mask=mask, other=0.0).to(tl.float32)
            g = share[:, None] * w - factor[:, None] * sums
            out = gradient_ptr + row[:, None] * stride_gradient + k[None, :]
            tl.store(out, g.to(gradient_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _rescue_kernel(
    flags_ptr: tl.tensor,
    hidden_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    bias_ptr: tl.tensor | None,
    targets_ptr: tl.tensor,
    target_raw_ptr: tl.tensor,
    lse_ptr: tl.tensor,
    accumulator_ptr: tl.tensor,
    gradient_ptr: tl.tensor,
    vocab: tl.tensor,
    hidden: tl.tensor,
    stride_hidden: tl.tensor,
    stride_weight: tl.tensor,
    stride_accumulator: tl.tensor,
    stride_gradient: tl.tensor,
    in_scale: tl.tensor,
    out_scale: tl.tensor,
    scale: tl.tensor,
    CAPPED: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    if tl.load(flags_ptr + row) != 0:
        target = tl.load(targets_ptr + row)
        lse = tl.load(lse_ptr + row)
        sums = accumulator_ptr + row * stride_accumulator
        for first in range(0, vocab, TOKENS):
            token = first + tl.arange(0, TOKENS)
            weight = weight_ptr + token.to(tl.int64)[:, None] * stride_weight
            x = tl.zeros((TOKENS,), dtype=tl.float32)
            for start in range(0, hidden, BLOCK):
                k = start + tl.arange(0, BLOCK)
                mask = (token < vocab)[:, None] & (k < hidden)[None, :]
                w = tl.load(weight + k[None, :], mask=mask, other=0.0).to(tl.float32)
                h = tl.load(hidden_ptr + row * stride_hidden + k, mask=k < hidden, other=0.0).to(tl.float32)
                x += tl.sum(w * h[None, :], axis=1)
            if bias_ptr is not None:
                x += tl.load(bias_ptr + token, mask=token < vocab, other=0.0).to(tl.float32)
            z, damping = final_logit(x, in_scale, out_scale, CAPPED)
            # p_v·(1 − tanh²); of a flagged row's target it is nothing: p_y < 2^−LIFT_LIMIT
            p = tl.where(token < vocab, tl.exp(z - lse) * damping, 0.0)
            for start in range(0, hidden, BLOCK):
                k = start + tl.arange(0, BLOCK)
                mask = (token < vocab)[:, None] & (k < hidden)[None, :]
                w = tl.load(weight + k[None, :], mask=mask, other=0.0).to(tl.float32)
                before = tl.load(sums + k, mask=(k < hidden) & (first > 0), other=0.0)
                tl.store(sums + k, before + tl.sum(w * p[:, None], axis=0), mask=k < hidden)
            tl.debug_barrier()  # the next block of tokens reads what other threads may have written
        # 1 − p_y = 1
        share = 1.0
        if CAPPED:
            _, share = tanh(tl.load(target_raw_ptr + row) * in_scale)
        for start in range(0, hidden, BLOCK):
            k = start + tl.arange(0, BLOCK)
            w = tl.load(weight_ptr + target * stride_weight + k, mask=k < hidden, other=0.0).to(tl.float32)
            g = scale * (share * w - tl.load(sums + k, mask=k < hidden, other=0.0))
            out = gradient_ptr + row * stride_gradient + k
            tl.store(out, g.to(gradient_ptr.dtype.element_ty), mask=k < hidden)


# Launchers


def merge(
    partials: Partials,
    targets: Tensor,
    logps: Tensor,
    lse: Tensor,
    *,
    vocab_size: int,
    weight: Tensor | None = None,
    reference: Reference | None = None,
    accumulator: Tensor | None = None,
    gradient: Tensor | None = None,
    scales: LogitScales = PLAIN,
) -> None:
    """Log-probs and log-normalizers of R rows, and with `gradient` the unit gradients from the accumulated E W.

    Args:
        partials: tops and sums of T tiles, contiguous (T, R).
        targets: (R,) int64; a row whose target is outside [0, vocab_size) becomes NaN.
        logps, lse: (R,) float32, written.
        weight: (V, H), columns contiguous.
        accumulator: (R, H) float32, Σ E W over the vocabulary.
        gradient: (R, H), written in its dtype.
    """
    tiles, rows = partials.tops.shape
    check_rows(rows, targets=targets, target_raw=partials.target_raw, logps=logps, lse=lse)
    _check_partials(partials)
    if len({each is None for each in (weight, reference, accumulator, gradient)}) > 1:
        raise ValueError("weight, reference, accumulator and gradient go together; pass all or none.")
    if gradient is not None and accumulator is not None:
        check_tile("accumulator", accumulator, torch.float32, shape=gradient.shape)
        check_tile("gradient", gradient, torch.float32, torch.bfloat16, torch.float16)
    if rows == 0:
        return
    _merge_kernel[(triton.cdiv(rows, _ROWS),)](
        *partials, targets, None if reference is None else reference.estimate, logps, lse,
        accumulator, weight, gradient, rows, tiles, vocab_size,
        0 if gradient is None else gradient.shape[1],
        *(0 if each is None else each.stride(0) for each in (accumulator, weight, gradient)),
        *scales.arguments(LOG_2), scales.slope,
        CAPPED=scales.softcap is not None, ROWS=_ROWS, TILES=_TILES, BLOCK=_BLOCK, num_warps=8,
    )  # fmt: skip


def rescue_(
    flags: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    target_raw: Tensor,
    lse: Tensor,
    accumulator: Tensor,
    gradient: Tensor,
    scales: LogitScales = PLAIN,
) -> None:
    """The unit gradients of flagged rows anew, in float32 products; other rows are not touched.

    Args:
        flags: (R,) int32.
        target_raw, lse: (R,), of `head_gemm` and `merge`, which hold for flagged rows too.
        accumulator: (R, H) float32; a flagged row's is overwritten.
        gradient: (R, H), written where flagged.
    """
    rows = len(hidden)
    check_rows(rows, targets=targets, target_raw=target_raw, lse=lse)
    check_tile("accumulator", accumulator, torch.float32, shape=gradient.shape)
    if rows == 0:
        return
    _rescue_kernel[(rows,)](
        flags, hidden, weight, bias, targets, target_raw, lse, accumulator, gradient,
        len(weight), hidden.shape[1], hidden.stride(0), weight.stride(0), accumulator.stride(0), gradient.stride(0),
        *scales.arguments(), scales.slope,
        CAPPED=scales.softcap is not None, TOKENS=_RESCUE_TOKENS, BLOCK=_RESCUE_BLOCK, num_warps=16,
    )  # fmt: skip


def _check_partials(partials: Partials) -> None:
    for name, tensor in (("tops", partials.tops), ("sums", partials.sums)):
        if tensor.shape != partials.tops.shape or not tensor.is_contiguous() or tensor.dtype != torch.float32:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, {tensor.dtype}; contiguous float32 (T, R).")
