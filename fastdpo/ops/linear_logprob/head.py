"""The head as the tile loop sees it: one vocabulary slice at a time, by one GEMM into a reused buffer.

z = softcap·tanh((h Wᵀ + b)·logit_scale / softcap) / temperature, the cap only where there is one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fastdpo.ops.linear_logprob.tiles import TilePlan


@dataclass(frozen=True)
class Head:
    """A linear head and what happens to its logits.

    Attributes:
        weight: (V, H).
        bias: (V,), or None.
        logit_scale, temperature, softcap: see the module.
        gemm_dtype: what the GEMM's operands are rounded to (under autocast, autocast's).
    """

    weight: Tensor
    bias: Tensor | None
    logit_scale: float
    temperature: float
    softcap: float | None
    gemm_dtype: torch.dtype

    @property
    def accumulate_dtype(self) -> torch.dtype:
        """Of tiles, statistics and accumulators: float32, or float64 for float64 inputs."""
        return torch.promote_types(self.gemm_dtype, torch.float32)

    @property
    def operand_dtype(self) -> torch.dtype:
        """Of the GEMM's operands. No CPU GEMM gives float32 from 16-bit operands, so they are upcast there, exactly."""
        return self.accumulate_dtype if self.weight.device.type == "cpu" else self.gemm_dtype

    def operand(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """x as a GEMM operand; a copy, into `out` if given, only where its dtype is another one."""
        if x.dtype == self.operand_dtype == self.gemm_dtype:
            return x
        x = x.to(self.gemm_dtype)
        if out is None or x.dtype == self.operand_dtype:
            return x.to(self.operand_dtype)
        return out.copy_(x)

    def matmul(self, a: Tensor, b: Tensor, out: Tensor) -> None:
        """out = a @ b, of operands, in `accumulate_dtype`."""
        if a.dtype == out.dtype:
            torch.mm(a, b, out=out)
        else:
            torch.mm(a, b, out_dtype=out.dtype, out=out)

    def matmul_add(self, a: Tensor, b: Tensor, out: Tensor) -> None:
        """out += a @ b, of operands, in `accumulate_dtype`."""
        if a.dtype == out.dtype:
            out.addmm_(a, b)
        else:
            torch.addmm(out, a, b, out_dtype=out.dtype, out=out)

    def upcast(self, x: Tensor) -> Tensor:
        """x, of `gemm_dtype`, in `operand_dtype`: itself, but on a CPU."""
        return x.to(self.operand_dtype)

    def slices(self, plan: TilePlan) -> Iterator[tuple[int, Tensor]]:
        """(first column, (columns, H) operand) for each vocabulary slice; the operand may live in a reused buffer."""
        vocab, hidden = self.weight.shape
        upcast = self.weight.dtype != self.operand_dtype or self.gemm_dtype != self.operand_dtype
        buffer = self.weight.new_empty(plan.columns if upcast else 0, hidden, dtype=self.operand_dtype)
        for first in range(0, vocab, plan.columns):
            rows = self.weight[first : first + plan.columns]
            yield first, self.operand(rows, buffer[: len(rows)] if upcast else None)
