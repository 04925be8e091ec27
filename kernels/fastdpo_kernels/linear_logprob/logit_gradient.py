"""The gradient of a tile of logits, where the head is trained: what the weight's and the bias' gradients are made of.

    logit_gradient_        x → dL/dx = grad_t·(1[v = y_t] − exp(z − lse_t))·dz/dx

x is the raw tile that `fold` read in the forward, formed once more; z and dz/dx are those of `scales`. In go lse and
log p_y (R,) of the whole vocabulary and grad = dL/dlogp (R,).
Bytes per element of a tile: 4 read, 4 or 2 written.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdpo_kernels.device_math import expm1, final_logit
from fastdpo_kernels.launch_checks import check_bias, check_rows, check_tile
from fastdpo_kernels.linear_logprob.scales import LogitScales

#: Block over the columns: two 128-bit accesses per thread.
_BLOCK, _WARPS = 1024, 4

# Kernel


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


# Launcher


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
    scales = LogitScales(logit_scale, temperature, softcap)
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
        *scales.arguments(),
        scales.slope,
        CAPPED=softcap is not None,
        BLOCK=_BLOCK,
        num_warps=_WARPS,
    )
