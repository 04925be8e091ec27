"""The head on a GPU: products with the fold in their epilogue, so that no logit reaches memory (`head_gemm`).

Without a gradient: the product over the whole vocabulary, and the merge of its partial sums; two launches.
With the unit gradient: the targets' logits, to which exponentials refer; per chunk of the vocabulary the product, which
also writes E in 16 bits, and A += E W; then merge and gradient, and flagged rows anew. 2C + 3 launches for C chunks.

Bytes per logit, GEMM operands aside: E written and read 4; the accumulator 8·H·C/V less the first chunk's reading; the
partial sums 16/256 per pass; finish and backward 10·H/V. Memory above inputs and outputs: E, within `workspace`, and
4·R·H of the accumulator, and 8 bytes per row and tile of 256 columns.

E's rounding to 16 bits, 2⁻⁹ of each element, is the largest error of the gradient, as that of the operand is with the
separate fold; log-probs have none of it.

`refusal` is the rule of what this serves; the rest, and every backward of a trained head, goes through the separate
fold of `tile_loop`. A flagged row, whose target is 64 nats below its largest logit, costs a walk of one program over
the whole weight: tens of milliseconds at 128,256 × 4,096 by estimate, for one as for a hundred.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
from torch import Tensor

from fastdpo.ops.linear_logprob.head import Head
from fastdpo.ops.linear_logprob.tiles import FusedPlan, plan_fused
from fastdpo_kernels.linear_logprob import gemm as head_gemm
from fastdpo_kernels.linear_logprob import merge as head_merge
from fastdpo_kernels.linear_logprob.gemm import Partials, Reference
from fastdpo_kernels.linear_logprob.scales import LogitScales
from fastdpo_kernels.linear_logprob.tiles import Tile

#: Environment variable: "separate" has the separate fold serve everything, "fused" refuses what is not fused.
ENVIRONMENT = "FASTDPO_HEAD"
#: Rows of an operand begin and end at multiples of so many bytes, or they cannot be copied asynchronously.
ROW_ALIGNMENT = 16


def refusal(head: Head, unit_gradient: bool, stats: Sequence[str]) -> str:
    """Why the separate fold serves this call, or "" where the fused product does. The answer depends on no value.

    Raises:
        ValueError: FASTDPO_HEAD is unknown, or is "fused" where that cannot serve.
    """
    choice = os.environ.get(ENVIRONMENT, "")
    if choice not in ("", "fused", "separate"):
        raise ValueError(f"{ENVIRONMENT}={choice!r} is unknown; accepted are fused, separate, or nothing.")
    if choice == "separate":
        return f"{ENVIRONMENT}=separate"
    reason = _refusal(head, unit_gradient, stats)
    if reason and choice == "fused":
        raise ValueError(f"{ENVIRONMENT}=fused cannot serve this head: {reason}. Unset it.")
    return reason


def _refusal(head: Head, unit_gradient: bool, stats: Sequence[str]) -> str:
    weight, dtype = head.weight, head.gemm_dtype
    if stats:
        return "statistics need every logit more than once"
    if weight.dtype != dtype:
        return f"the weight is {weight.dtype}, the products are in {dtype}"
    if dtype == torch.float32 and not tf32_allowed():
        return "float32 products are not to be rounded to TF32 (torch.backends.cuda.matmul.fp32_precision)"
    if dtype == torch.float16 and unit_gradient:
        return "float16 cannot hold exponentials of any range"
    if dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"there is no kernel for {dtype}"
    bounds = weight.data_ptr(), weight.stride(0) * weight.itemsize, weight.shape[1] * weight.itemsize
    if weight.stride(1) != 1 or any(each % ROW_ALIGNMENT for each in bounds):
        return (
            f"rows of the weight, {weight.shape[1]} elements with strides {weight.stride()}, do not begin and end at "
            f"multiples of {ROW_ALIGNMENT} bytes"
        )
    return ""


def tf32_allowed() -> bool:
    """Whether the caller has allowed float32 products to be rounded to TF32, by torch's own setting."""
    precision = torch.backends.cuda.matmul.fp32_precision
    return (torch.backends.fp32_precision if precision == "none" else precision) == "tf32"  # type: ignore[attr-defined]


def forward(
    head: Head,
    hidden: Tensor,
    targets: Tensor,
    scored: Tensor | None,
    unit_gradient: bool,
    workspace: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `tile_loop.forward`, without statistics."""
    inputs, own = (hidden, targets) if scored is None else (hidden[scored], targets[scored])
    inputs = _aligned(inputs.to(head.gemm_dtype))
    logps, lse = (torch.empty(len(own), dtype=torch.float32, device=hidden.device) for _ in range(2))
    gradient = torch.empty(inputs.shape if unit_gradient else 0, dtype=hidden.dtype, device=hidden.device)
    if len(own):
        _fill(head, inputs, own, logps, lse, gradient if unit_gradient else None, workspace)
    values = logps.new_empty(0, len(targets))
    if scored is None:
        return logps, lse, gradient, values

    def spread(part: Tensor) -> Tensor:
        return part.new_zeros(len(targets), *part.shape[1:]).index_copy_(0, scored, part)

    return spread(logps), spread(lse), spread(gradient) if unit_gradient else gradient, values


def _scales(head: Head) -> LogitScales:
    return LogitScales(head.logit_scale, head.temperature, head.softcap)


def _aligned(hidden: Tensor) -> Tensor:
    """Rows that begin at multiples of ROW_ALIGNMENT bytes where the weight's do; a copy only of odd strides."""
    bounds = hidden.data_ptr(), hidden.stride(0) * hidden.itemsize
    aligned = hidden.stride(1) == 1 and not any(each % ROW_ALIGNMENT for each in bounds)
    return hidden if aligned else hidden.clone(memory_format=torch.contiguous_format)


def _fill(
    head: Head, hidden: Tensor, targets: Tensor, logps: Tensor, lse: Tensor, gradient: Tensor | None, workspace: int
) -> None:
    """Write log-probs, log-normalizers and unit gradients of all rows, a balanced part of them at a time."""
    tile = head_gemm.fused_tile(hidden, head.weight, head.bias, _scales(head))
    plan = plan_fused(len(hidden), len(head.weight), hidden.itemsize, workspace, unit_gradient=gradient is not None)
    room = _Room(plan, tile, hidden, len(head.weight), gradient is not None)
    for start in range(0, len(hidden), plan.rows):
        rows = slice(start, start + plan.rows)
        part = None if gradient is None else gradient[rows]
        _fill_rows(head, plan, room, hidden[rows], targets[rows], logps[rows], lse[rows], part)


def _fill_rows(
    head: Head,
    plan: FusedPlan,
    room: _Room,
    hidden: Tensor,
    targets: Tensor,
    logps: Tensor,
    lse: Tensor,
    gradient: Tensor | None,
) -> None:
    weight, bias, vocab, scales = head.weight, head.bias, len(head.weight), _scales(head)
    partials = room.partials(len(hidden))
    if gradient is None:
        head_gemm.head_gemm(hidden, weight, bias, targets, partials, room.tile, scales=scales)
        head_merge.merge(partials, targets, logps, lse, vocab_size=vocab, scales=scales)
        return
    reference, accumulator = room.reference(len(hidden)), room.accumulator(len(hidden))
    head_gemm.target_logits(hidden, weight, bias, targets, reference, scales)
    for first in range(0, vocab, plan.columns):
        part = weight[first : first + plan.columns]
        exps = room.exps(len(hidden), len(part))
        head_gemm.head_gemm(
            hidden, weight, bias, targets, partials, room.tile,
            first_column=first, columns=len(part), exps=exps, reference=reference, scales=scales,
        )  # fmt: skip
        # On a CPU, where Triton interprets, no product of 16-bit operands has a float32 result
        exps, part = head.upcast(exps), head.upcast(part)
        (head.matmul if first == 0 else head.matmul_add)(exps, part, accumulator)
    head_merge.merge(
        partials, targets, logps, lse,
        vocab_size=vocab, weight=weight, reference=reference, accumulator=accumulator, gradient=gradient, scales=scales,
    )  # fmt: skip
    head_merge.rescue_(
        reference.flags, hidden, weight, bias, targets, partials.target_raw, lse, accumulator, gradient, scales
    )


class _Room:
    """One allocation that holds everything a call needs beside its outputs."""

    def __init__(self, plan: FusedPlan, tile: Tile, hidden: Tensor, vocab: int, unit_gradient: bool) -> None:
        rows, self.depth, self.dtype = plan.rows, hidden.shape[1], hidden.dtype
        self.tile, self.columns = tile, plan.columns
        self.tiles = -(-vocab // tile.columns)  # chunks begin at multiples of a tile
        sizes = {"tops": 4 * rows * self.tiles, "sums": 4 * rows * self.tiles, "target_raw": 4 * rows}
        if unit_gradient:
            exps = rows * plan.columns * hidden.itemsize
            sizes |= {"exps": exps, "accumulator": 4 * rows * self.depth, "estimate": 4 * rows, "flags": 4 * rows}
        self.at: dict[str, int] = {}
        total = 0
        for name, size in sizes.items():
            self.at[name] = total
            total += -(-size // 256) * 256
        self.bytes = torch.empty(total, dtype=torch.uint8, device=hidden.device)

    def _view(self, name: str, dtype: torch.dtype, *shape: int, stride: int | None = None) -> Tensor:
        flat = self.bytes[self.at[name] :]
        flat = flat[: len(flat) // dtype.itemsize * dtype.itemsize].view(dtype)
        return flat.as_strided(shape, (stride or shape[-1], 1)[-len(shape) :])

    def partials(self, rows: int) -> Partials:
        tops, sums = (self._view(name, torch.float32, self.tiles, rows) for name in ("tops", "sums"))
        return Partials(tops, sums, self._view("target_raw", torch.float32, rows))

    def reference(self, rows: int) -> Reference:
        return Reference(self._view("estimate", torch.float32, rows), self._view("flags", torch.int32, rows))

    def accumulator(self, rows: int) -> Tensor:
        return self._view("accumulator", torch.float32, rows, self.depth)

    def exps(self, rows: int, columns: int) -> Tensor:
        return self._view("exps", self.dtype, rows, columns, stride=self.columns)
