"""From log-probs per token or per sequence to margins: the parts that all loss kernels begin with, and two alone.

Log-probs come per sequence, (B,), or per token, (N,), with row boundaries (2B + 1,) in int64: B chosen rows, then B
rejected ones. A margin is u_w − u_l, of log-ratios or log-probs, per token where the loss is.
Bytes: 4·N per token tensor that is summed, 4 per sequence; `row_sums` and `preference_margins` write 4 per row,
`row_values` 8 per token.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

# Parts of the kernels


@triton.jit
def _row_bounds(
    boundaries_ptr: tl.tensor, rows: tl.tensor, mask: tl.tensor, num_tokens: tl.tensor
) -> tuple[tl.tensor, tl.tensor]:
    """First token and end of these rows, within [0, num_tokens]: unchecked boundaries read nothing else."""
    start = tl.load(boundaries_ptr + rows, mask=mask, other=0)
    end = tl.load(boundaries_ptr + rows + 1, mask=mask, other=0)
    return tl.minimum(tl.maximum(start, 0), num_tokens), tl.minimum(tl.maximum(end, 0), num_tokens)


@triton.jit
def _row_sums(logps_ptr: tl.tensor, start: tl.tensor, end: tl.tensor, TOKENS: tl.constexpr) -> tl.tensor:
    """Σ logps[start … end) of every lane; (BLOCK,) int64 bounds → (BLOCK,) fp32."""
    longest = tl.max(end - start, axis=0).to(tl.int32)
    columns = tl.arange(0, TOKENS)[None, :]
    total = tl.zeros_like(start).to(tl.float32)
    for offset in range(0, longest, TOKENS):
        position = start[:, None] + offset + columns  # (BLOCK, TOKENS)
        tile = tl.load(logps_ptr + position, mask=position < end[:, None], other=0.0)
        total += tl.sum(tile.to(tl.float32), axis=1)
    return total


@triton.jit
def expand_rows(
    out_ptr: tl.tensor,
    values: tl.tensor,
    boundaries_ptr: tl.tensor,
    rows: tl.tensor,
    mask: tl.tensor,
    num_tokens: tl.tensor,
    TOKENS: tl.constexpr,
) -> None:
    """The value of every lane, on all tokens of its row."""
    start, end = _row_bounds(boundaries_ptr, rows, mask, num_tokens)
    longest = tl.max(end - start, axis=0).to(tl.int32)
    columns = tl.arange(0, TOKENS)[None, :]
    for offset in range(0, longest, TOKENS):
        position = start[:, None] + offset + columns
        tile = tl.broadcast_to(values[:, None], position.shape)
        tl.store(out_ptr + position, tile, mask=position < end[:, None])


@triton.jit
def fill_zero(out_ptr: tl.tensor, start: tl.tensor, end: tl.tensor, lanes: tl.tensor, BLOCK: tl.constexpr) -> None:
    for offset in range(0, (end - start).to(tl.int32), BLOCK):
        position = start + offset + lanes
        tl.store(out_ptr + position, tl.zeros_like(lanes).to(tl.float32), mask=position < end)


@triton.jit
def _sequence_logps(
    logps_ptr: tl.tensor,
    boundaries_ptr: tl.tensor,
    rows: tl.tensor,
    mask: tl.tensor,
    num_tokens: tl.tensor,
    TOKENS: tl.constexpr,
) -> tl.tensor:
    """(BLOCK,) log-probs of these rows, in fp32: read, or summed over each row's tokens."""
    if boundaries_ptr is None:
        return tl.load(logps_ptr + rows, mask=mask, other=0.0).to(tl.float32)
    else:
        start, end = _row_bounds(boundaries_ptr, rows, mask, num_tokens)
        return _row_sums(logps_ptr, start, end, TOKENS)


@triton.jit
def policy_logps(
    chosen_ptr: tl.tensor,
    rejected_ptr: tl.tensor,
    boundaries_ptr: tl.tensor,
    rows: tl.tensor,
    pairs: tl.tensor,
    mask: tl.tensor,
    num_tokens: tl.tensor,
    TOKENS: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """Log-probs of chosen and rejected; per token, both sides are behind the first pointer."""
    chosen = _sequence_logps(chosen_ptr, boundaries_ptr, rows, mask, num_tokens, TOKENS)
    if boundaries_ptr is None:
        return chosen, _sequence_logps(rejected_ptr, None, rows, mask, num_tokens, TOKENS)
    else:
        return chosen, _sequence_logps(chosen_ptr, boundaries_ptr, rows + pairs, mask, num_tokens, TOKENS)


@triton.jit
def reference_logps(
    ref_chosen_ptr: tl.tensor,
    ref_rejected_ptr: tl.tensor,
    boundaries_ptr: tl.tensor,
    rows: tl.tensor,
    pairs: tl.tensor,
    mask: tl.tensor,
    num_tokens: tl.tensor,
    TOKENS: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """Reference log-probs of chosen and rejected; per token where there is no second pointer; 0 without a reference."""
    if ref_chosen_ptr is None:
        none = tl.zeros_like(rows).to(tl.float32)
        return none, none
    elif ref_rejected_ptr is None:
        chosen = _sequence_logps(ref_chosen_ptr, boundaries_ptr, rows, mask, num_tokens, TOKENS)
        return chosen, _sequence_logps(ref_chosen_ptr, boundaries_ptr, rows + pairs, mask, num_tokens, TOKENS)
    else:
        chosen = _sequence_logps(ref_chosen_ptr, None, rows, mask, num_tokens, TOKENS)
        return chosen, _sequence_logps(ref_rejected_ptr, None, rows, mask, num_tokens, TOKENS)


@triton.jit
def row_lengths(
    lengths_ptr: tl.tensor, boundaries_ptr: tl.tensor, first_row: tl.tensor, rows: tl.tensor, mask: tl.tensor
) -> tl.tensor:
    """(BLOCK,) lengths in tokens, at least 1: given, or those of the rows, or 1 where no loss reads them."""
    if lengths_ptr is not None:
        lengths = tl.load(lengths_ptr + rows, mask=mask, other=1).to(tl.float32)
    elif boundaries_ptr is not None:
        end = tl.load(boundaries_ptr + first_row + rows + 1, mask=mask, other=1)
        lengths = (end - tl.load(boundaries_ptr + first_row + rows, mask=mask, other=0)).to(tl.float32)
    else:
        lengths = tl.zeros_like(rows).to(tl.float32) + 1.0
    return tl.maximum(lengths, 1.0)


@triton.jit
def pair_gaps(
    chosen: tl.tensor,
    rejected: tl.tensor,
    ref_chosen: tl.tensor,
    ref_rejected: tl.tensor,
    chosen_lengths: tl.tensor,
    rejected_lengths: tl.tensor,
    REFERENCE_GAP: tl.constexpr,
    MEAN_GAP: tl.constexpr,
) -> tl.tensor:
    """The margin M: u_w − u_l, of log-probs where the loss has no reference, per token where it normalises."""
    w, rejected_w = chosen, rejected
    if REFERENCE_GAP:
        w, rejected_w = chosen - ref_chosen, rejected - ref_rejected
    if MEAN_GAP:
        w, rejected_w = w / chosen_lengths, rejected_w / rejected_lengths
    return w - rejected_w


# Kernels


@triton.jit(do_not_specialize=["n", "num_tokens"])
def _row_sums_kernel(
    logps_ptr: tl.tensor,
    boundaries_ptr: tl.tensor,
    out_ptr: tl.tensor,
    n: tl.tensor,
    num_tokens: tl.tensor,
    BLOCK: tl.constexpr,
    TOKENS: tl.constexpr,
) -> None:
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = rows < n
    tl.store(out_ptr + rows, _sequence_logps(logps_ptr, boundaries_ptr, rows, mask, num_tokens, TOKENS), mask=mask)


@triton.jit(do_not_specialize=["n", "num_tokens"])
def _expand_rows_kernel(
    values_ptr: tl.tensor,
    boundaries_ptr: tl.tensor,
    out_ptr: tl.tensor,
    n: tl.tensor,
    num_tokens: tl.tensor,
    BLOCK: tl.constexpr,
    TOKENS: tl.constexpr,
) -> None:
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = rows < n
    values = tl.load(values_ptr + rows, mask=mask, other=0.0)
    expand_rows(out_ptr, values, boundaries_ptr, rows, mask, num_tokens, TOKENS)


@triton.jit(do_not_specialize=["pairs", "num_tokens"])
def _margins_kernel(
    chosen_ptr: tl.tensor,
    rejected_ptr: tl.tensor,
    ref_chosen_ptr: tl.tensor,
    ref_rejected_ptr: tl.tensor,
    boundaries_ptr: tl.tensor,
    chosen_lengths_ptr: tl.tensor,
    rejected_lengths_ptr: tl.tensor,
    margins_ptr: tl.tensor,
    pairs: tl.tensor,
    num_tokens: tl.tensor,
    REFERENCE_GAP: tl.constexpr,
    MEAN_GAP: tl.constexpr,
    BLOCK: tl.constexpr,
    TOKENS: tl.constexpr,
) -> None:
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = rows < pairs
    chosen, rejected = policy_logps(chosen_ptr, rejected_ptr, boundaries_ptr, rows, pairs, mask, num_tokens, TOKENS)
    references = reference_logps(
        ref_chosen_ptr, ref_rejected_ptr, boundaries_ptr, rows, pairs, mask, num_tokens, TOKENS
    )
    chosen_lengths = row_lengths(chosen_lengths_ptr, boundaries_ptr, 0, rows, mask)
    rejected_lengths = row_lengths(rejected_lengths_ptr, boundaries_ptr, pairs, rows, mask)
    lengths = chosen_lengths, rejected_lengths
    margins = pair_gaps(chosen, rejected, *references, *lengths, REFERENCE_GAP, MEAN_GAP)
    tl.store(margins_ptr + rows, margins, mask=mask)


# Launchers


def token_tile(boundaries: Tensor | None, block: int, warps: int) -> tuple[int, int]:
    """(tokens per row and iteration, warps): eight positions per thread, in int64, leave registers for the rest."""
    if boundaries is None:
        return 1, warps
    warps = max(warps, 4)
    return max(8 * 32 * warps // block, 1), warps


def flat(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def num_pairs(logps: Tensor, boundaries: Tensor | None) -> int:
    return logps.numel() if boundaries is None else (boundaries.numel() - 1) // 2


def row_sums(token_logps: Tensor, boundaries: Tensor) -> Tensor:
    """Σ over each row: (N,) and (R + 1,) int64 → (R,) fp32."""
    out = torch.empty(boundaries.numel() - 1, dtype=torch.float32, device=token_logps.device)
    _over_rows(_row_sums_kernel, token_logps.contiguous(), boundaries, out, token_logps.numel())
    return out


def row_values(values: Tensor, boundaries: Tensor, num_tokens: int) -> Tensor:
    """The inverse: (R,) contiguous fp32 → (N,), each token its row's value; 0 outside the rows."""
    out = torch.zeros(num_tokens, dtype=torch.float32, device=values.device)
    _over_rows(_expand_rows_kernel, values, boundaries, out, num_tokens)
    return out


def _over_rows(kernel: Any, source: Tensor, boundaries: Tensor, out: Tensor, num_tokens: int) -> None:
    """One program per block of rows."""
    rows, block = boundaries.numel() - 1, 32
    tokens, warps = token_tile(boundaries, block, 1)
    kernel[(triton.cdiv(rows, block),)](
        source, boundaries.contiguous(), out, rows, num_tokens, BLOCK=block, TOKENS=tokens, num_warps=warps
    )


def preference_margins(
    chosen: Tensor,
    rejected: Tensor | None,
    ref_chosen: Tensor | None,
    ref_rejected: Tensor | None,
    boundaries: Tensor | None,
    chosen_lengths: Tensor | None,
    rejected_lengths: Tensor | None,
    reference_gap: bool,
    mean_gap: bool,
) -> Tensor:
    """(B,) margins, the first of two launches over several ranks."""
    pairs = num_pairs(chosen, boundaries)
    margins = torch.empty(pairs, dtype=torch.float32, device=chosen.device)
    block = 32
    tokens, warps = token_tile(boundaries, block, 1)
    inputs = (chosen, rejected, ref_chosen, ref_rejected, boundaries, chosen_lengths, rejected_lengths)
    _margins_kernel[(triton.cdiv(pairs, block),)](
        *map(flat, inputs),
        margins,
        pairs,
        chosen.numel(),
        REFERENCE_GAP=reference_gap,
        MEAN_GAP=mean_gap,
        BLOCK=block,
        TOKENS=tokens,
        num_warps=warps,
    )
    return margins
