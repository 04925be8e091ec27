"""The head's product with the softmax's sums taken in its epilogue, where the logits are still in registers.

For R rows and C columns of the vocabulary, from `first_column` on, one launch computes
    x = h W_vᵀ + b_v,   z = final_logit(x)                                     (see `device_math`)
tile by tile (BLOCK_M × BLOCK_N), and keeps of each tile, per row, in units of log 2:
    tops   t = max_v z_v / log 2                sums   Σ_v≠y 2^(z_v/log 2 − t)
and of the target x_y. With an E buffer it also stores, in the operand's dtype,
    E = e^(z − m̂)·(1 − tanh²), 0 at the target,
for one product E W that follows. m̂ is the target's logit from a dot product of its own (`target_logits`), so all chunks
of the vocabulary share one reference and nothing is ever rescaled. bfloat16 has float32's range: the relative error of
E is 2⁻⁹ for any m̂. Where a logit exceeds m̂ by more than LIFT_LIMIT, its row is flagged, and computed anew by
`merge.rescue_`, whatever E became. Log-probs take tops and sums only, never m̂.

FLOPs: 2·R·H·C. Bytes: 2 per element of E, and 8 per row and tile. No atomics, no locks: every run gives the same bits.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdpo_kernels.device_math import tanh
from fastdpo_kernels.launch_checks import check_bias, check_rows, check_tile
from fastdpo_kernels.linear_logprob.scales import PLAIN, LogitScales
from fastdpo_kernels.linear_logprob.tiles import Tile, tile_for, variant

#: How far above m̂ a logit may be, in units of log 2: E stays below 2^92 then, and the sum of a row over any vocabulary,
#: times a weight, within float32.
LIFT_LIMIT = 92.0
LOG_2 = math.log(2.0)
#: Columns that a search of tiles runs over; rows from which on it is one, and at most.
_SEARCHED_COLUMNS, _SEARCHED_ROWS, _SEARCHED_MOST_ROWS = 32768, 1024, 8192


class Partials(NamedTuple):
    """What the tiles of R rows leave behind, all float32. T = number of tiles over the vocabulary."""

    tops: Tensor  # (T, R), the largest logit of a tile's columns, over log 2
    sums: Tensor  # (T, R), Σ_v≠y 2^(z_v/log 2 − top)
    target_raw: Tensor  # (R,), x at the target; not written where the target is in no column


class Reference(NamedTuple):
    """What the exponentials of R rows refer to."""

    estimate: Tensor  # (R,) float32, m̂ over log 2
    flags: Tensor  # (R,) int32, 1 where a logit was more than LIFT_LIMIT above


# Kernels


# Sizes that change from call to call: one compiled kernel serves them all
@triton.jit(do_not_specialize=["rows", "columns", "hidden_units"])
def _head_gemm_kernel(
    hidden_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    bias_ptr: tl.tensor | None,
    targets_ptr: tl.tensor,
    estimate_ptr: tl.tensor,
    tops_ptr: tl.tensor,
    sums_ptr: tl.tensor,
    target_raw_ptr: tl.tensor,
    exps_ptr: tl.tensor | None,
    flags_ptr: tl.tensor,
    rows: tl.tensor,
    hidden_units: tl.tensor,
    first_column: tl.tensor,
    columns: tl.tensor,
    stride_hidden_units: tl.tensor,
    stride_weight_units: tl.tensor,
    stride_exps: tl.tensor,
    in_scale: tl.tensor,
    out_scale: tl.tensor,
    lift_limit: tl.tensor,
    CAPPED: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    UNIT: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
) -> None:
    # Programs in groups of GROUP_M row tiles, column by column: a group's slices of the weight stay in the L2
    pid = tl.program_id(0)
    tiles_m, tiles_n = tl.cdiv(rows, BLOCK_M), tl.cdiv(columns, BLOCK_N)
    group = pid // (GROUP_M * tiles_n)
    in_group = pid % (GROUP_M * tiles_n)
    height = tl.minimum(tiles_m - group * GROUP_M, GROUP_M)
    pid_m = group * GROUP_M + in_group % height
    pid_n = in_group // height

    # Hidden sizes and strides come in units of 16 bytes: what begins and ends where is known, and copies stay whole
    hidden = hidden_units * UNIT
    stride_hidden, stride_weight = stride_hidden_units * UNIT, stride_weight_units * UNIT
    # Offsets within a tile are 32-bit, from a 64-bit base. Rows and columns beyond the end read the last one, so that
    # no load of the loop needs a mask for them
    first_row, first = pid_m * BLOCK_M, pid_n * BLOCK_N
    r, c, k = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    inside_row, inside_column = r < rows - first_row, c < columns - first
    a_row, b_row = tl.minimum(r, rows - first_row - 1), tl.minimum(c, columns - first - 1)
    a_ptrs = hidden_ptr + first_row.to(tl.int64) * stride_hidden + (a_row[:, None] * stride_hidden + k[None, :])
    b_base = weight_ptr + (first_column + first).to(tl.int64) * stride_weight
    b_ptrs = b_base + (b_row[None, :] * stride_weight + k[:, None])
    x = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for start in range(0, hidden, BLOCK_K):
        if EVEN_K:
            a, b = tl.load(a_ptrs), tl.load(b_ptrs)
        else:
            a = tl.load(a_ptrs, mask=(k < hidden - start)[None, :], other=0.0)
            b = tl.load(b_ptrs, mask=(k < hidden - start)[:, None], other=0.0)
        if UPCAST:  # Triton's interpreter multiplies the bit patterns of bfloat16
            a, b = a.to(tl.float32), b.to(tl.float32)
        x = tl.dot(a, b, x, input_precision=PRECISION)
        a_ptrs += BLOCK_K
        b_ptrs += BLOCK_K

    if bias_ptr is not None:
        bias = tl.load(bias_ptr + first_column + first + c, mask=inside_column, other=0.0)
        x += bias.to(tl.float32)[None, :]
    # The target's raw logit, where this tile holds it
    row = first_row + r
    target = tl.load(targets_ptr + row, mask=inside_row, other=-1) - (first_column + first)
    here = (target >= 0) & (target < tl.minimum(columns - first, BLOCK_N))
    target = tl.where(here, target, -1).to(tl.int32)
    at_target = c[None, :] == target[:, None]
    tl.store(target_raw_ptr + row, tl.sum(tl.where(at_target, x, 0.0), axis=1), mask=inside_row & here)

    if CAPPED:
        x, _ = tanh(x * in_scale)
        z = x * out_scale
    else:
        z = x * in_scale
    z = tl.where(inside_column[None, :], z, -float("inf"))
    top = tl.max(z, axis=1)
    # A tile without a finite logit has top = −∞: its exponentials then refer to 0, and vanish
    centre = tl.where(top == -float("inf"), 0.0, top)
    exps = tl.exp2(tl.where(at_target, -float("inf"), z - centre[:, None]))
    partial = (first_column // BLOCK_N + pid_n).to(tl.int64) * rows + row
    tl.store(tops_ptr + partial, top, mask=inside_row)
    tl.store(sums_ptr + partial, tl.sum(exps, axis=1), mask=inside_row)
    if exps_ptr is not None:
        # E = 2^(z − t)·2^(t − m̂)·(1 − tanh²)
        lift = top - tl.load(estimate_ptr + row, mask=inside_row, other=0.0)
        tl.store(flags_ptr + row, tl.full((BLOCK_M,), 1, tl.int32), mask=inside_row & (lift > lift_limit))
        exps = exps * tl.exp2(lift)[:, None]
        if CAPPED:  # x is the tanh: its own derivative would be 64 more numbers alive, and spill
            exps *= 1.0 - x * x
        out = exps_ptr + first_row.to(tl.int64) * stride_exps + first + (r[:, None] * stride_exps + c[None, :])
        # Zeros in the columns beyond the end: a mask of any length would split the stores into single elements
        tl.store(out, exps.to(exps_ptr.dtype.element_ty), mask=inside_row[:, None])


@triton.jit
def _target_logits_kernel(
    hidden_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    bias_ptr: tl.tensor | None,
    targets_ptr: tl.tensor,
    estimate_ptr: tl.tensor,
    flags_ptr: tl.tensor,
    hidden: tl.tensor,
    vocab: tl.tensor,
    stride_hidden: tl.tensor,
    stride_weight: tl.tensor,
    in_scale: tl.tensor,
    out_scale: tl.tensor,
    CAPPED: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets_ptr + row)
    # A target outside the vocabulary reads nothing; its row is NaN from here on
    valid = (target >= 0) & (target < vocab)
    read = tl.where(valid, target, 0)
    products = tl.zeros((BLOCK,), dtype=tl.float32)
    for start in range(0, hidden, BLOCK):
        k = start + tl.arange(0, BLOCK)
        h = tl.load(hidden_ptr + row * stride_hidden + k, mask=k < hidden, other=0.0).to(tl.float32)
        w = tl.load(weight_ptr + read * stride_weight + k, mask=k < hidden, other=0.0).to(tl.float32)
        products += h * w
    x = tl.sum(products, axis=0)
    if bias_ptr is not None:
        x += tl.load(bias_ptr + read).to(tl.float32)
    if CAPPED:
        x, _ = tanh(x * in_scale)
        z = x * out_scale
    else:
        z = x * in_scale
    tl.store(estimate_ptr + row, tl.where(valid, z, float("nan")))
    tl.store(flags_ptr + row, 0)


#: Whether Triton's interpreter runs the kernels of this process: it decides when it decorates.
_INTERPRETED = not isinstance(_head_gemm_kernel, triton.runtime.JITFunction)


# Launchers


def fused_tile(hidden: Tensor, weight: Tensor, bias: Tensor | None = None, scales: LogitScales = PLAIN) -> Tile:
    """The tile of `head_gemm` for these operands, from the table or by a search over the first columns of `weight`."""

    def run(tile: Tile) -> None:
        states = hidden[:_SEARCHED_MOST_ROWS]
        rows, columns = len(states), min(len(weight), _SEARCHED_COLUMNS)
        sums = hidden.new_empty(2, -(-columns // tile.columns), rows, dtype=torch.float32)
        partials = Partials(sums[0], sums[1], hidden.new_empty(rows, dtype=torch.float32))
        reference = Reference(hidden.new_zeros(rows, dtype=torch.float32), hidden.new_zeros(rows, dtype=torch.int32))
        targets = torch.zeros(rows, dtype=torch.int64, device=hidden.device)
        exps = hidden.new_empty(rows, sums.shape[1] * tile.columns)[:, :columns]
        head_gemm(
            states, weight, bias, targets, partials, tile,
            columns=columns, exps=exps, reference=reference, scales=scales,
        )  # fmt: skip

    adjusted = bias is not None or scales.softcap is not None
    searched = run if len(hidden) >= _SEARCHED_ROWS else None
    return tile_for(hidden.device, variant(hidden.dtype, adjusted=adjusted), searched)


def target_logits(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    out: Reference,
    scales: LogitScales = PLAIN,
) -> None:
    """m̂ of every row, the target's logit by a dot product in float32, into `out`, with no row flagged.

    Args:
        hidden: (R, H), columns contiguous.
        weight: (V, H), columns contiguous.
        targets: (R,) int64; a row whose target is outside [0, V) gets NaN.
    """
    _check_operands(hidden, weight)
    check_rows(len(hidden), targets=targets, estimate=out.estimate)
    check_bias(bias, 0, len(weight))
    if len(hidden) == 0:
        return
    _target_logits_kernel[(len(hidden),)](
        hidden, weight, bias, targets, out.estimate, out.flags,
        hidden.shape[1], len(weight), hidden.stride(0), weight.stride(0),
        *scales.arguments(LOG_2),
        CAPPED=scales.softcap is not None, BLOCK=1024, num_warps=4,
    )  # fmt: skip


def head_gemm(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    partials: Partials,
    tile: Tile,
    *,
    first_column: int = 0,
    columns: int | None = None,
    exps: Tensor | None = None,
    reference: Reference | None = None,
    scales: LogitScales = PLAIN,
) -> None:
    """One launch over `columns` columns of the vocabulary (default: all), as the module says.

    Args:
        hidden: (R, H), columns contiguous; bfloat16, float16, or float32, which is rounded to TF32.
        weight: (V, H), of the same dtype, columns contiguous.
        targets: (R,) int64.
        partials: takes the sums of the tiles from first_column / tile.columns on.
        first_column: a multiple of tile.columns.
        tile: of `fused_tile`.
        exps: (R, columns), takes E in its dtype; with it `reference` must be given. Its rows lie apart by whole tiles,
            which are written, or more.

    Raises:
        ValueError, TypeError: a shape, stride or dtype that does not fit, named.
    """
    rows, vocab = len(hidden), len(weight)
    columns = vocab - first_column if columns is None else columns
    _check_operands(hidden, weight)
    check_rows(rows, targets=targets, target_raw=partials.target_raw)
    check_bias(bias, first_column, columns)
    if (exps is None) != (reference is None):
        raise ValueError("exps and reference go together; pass both or neither.")
    if exps is not None:
        check_tile("exps", exps, hidden.dtype, shape=torch.Size((rows, columns)))
    if rows == 0 or columns == 0:
        return
    unit = 16 // hidden.itemsize
    for name, size in (
        ("hidden has columns", hidden.shape[1]),
        ("hidden has a row stride", hidden.stride(0)),
        ("weight has a row stride", weight.stride(0)),
    ):
        if size % unit:
            raise ValueError(f"{name} of {size}; a multiple of {unit}, 16 bytes, is needed.")
    tiles = -(-columns // tile.columns)
    if first_column % tile.columns or partials.tops.shape[0] < first_column // tile.columns + tiles:
        raise ValueError(
            f"first_column={first_column} and tops of {partials.tops.shape[0]} tiles do not fit {columns} columns in "
            f"tiles of {tile.columns}: a chunk begins at a multiple of it and needs {tiles} tiles from there on."
        )
    if exps is not None:
        room = exps.untyped_storage().nbytes() // exps.itemsize - exps.storage_offset() - (rows - 1) * exps.stride(0)
        if min(room, exps.stride(0)) < tiles * tile.columns:
            raise ValueError(
                f"exps has a row stride of {exps.stride(0)} and {room} elements from its last row on; whole tiles, "
                f"{tiles * tile.columns} columns, are written."
            )
    estimate, flags = (None, None) if reference is None else reference
    _head_gemm_kernel[(triton.cdiv(rows, tile.rows) * tiles,)](
        hidden, weight, bias, targets, estimate, *partials, exps, flags,
        rows, hidden.shape[1] // unit, first_column, columns,
        hidden.stride(0) // unit, weight.stride(0) // unit, 0 if exps is None else exps.stride(0),
        *scales.arguments(LOG_2), LIFT_LIMIT,
        CAPPED=scales.softcap is not None,
        PRECISION="tf32" if hidden.dtype == torch.float32 else "ieee",
        UPCAST=hidden.dtype == torch.bfloat16 and _INTERPRETED,
        UNIT=unit,
        EVEN_K=hidden.shape[1] % tile.depth == 0,
        BLOCK_M=tile.rows, BLOCK_N=tile.columns, BLOCK_K=tile.depth, GROUP_M=tile.group,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip


def _check_operands(hidden: Tensor, weight: Tensor) -> None:
    check_tile("hidden", hidden, torch.bfloat16, torch.float16, torch.float32)
    check_tile("weight", weight, hidden.dtype)
    if hidden.shape[1] != weight.shape[1]:
        raise ValueError(f"weight has shape {tuple(weight.shape)}; (V, {hidden.shape[1]}) is needed.")
