"""Rows of tokens, in torch: (N,) token values with boundaries (R + 1,) in int64; row i is boundaries[i : i + 2]."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def expand_rows(values: Tensor, boundaries: Tensor, num_tokens: int) -> Tensor:
    """(R,) values → (N,), each token its row's; 0 outside the rows."""
    positions = torch.arange(num_tokens, device=values.device)
    row = torch.searchsorted(boundaries, positions, right=True)
    return torch.nn.functional.pad(values, (1, 1))[row]


def sum_rows(token_values: Tensor, boundaries: Tensor) -> Tensor:
    """(N,), boundaries (R + 1,) → (R,) sums, in float32 at least; tokens outside the rows are left."""
    values = token_values.to(torch.promote_types(token_values.dtype, torch.float32)).contiguous()
    # A compiled graph refuses other derivatives than the first itself, and takes no Function with a jvp
    sums = _row_sums if torch.compiler.is_compiling() else _RowSums.apply
    return sums(values, boundaries)


def _row_sums(values: Tensor, boundaries: Tensor) -> Tensor:
    return torch.segment_reduce(values, "sum", offsets=boundaries, unsafe=True, initial=0.0)


class _RowSums(torch.autograd.Function):
    """`segment_reduce`, which has a first derivative by backward only, with all of them: it is linear."""

    generate_vmap_rule = True

    @staticmethod
    def forward(values: Tensor, boundaries: Tensor) -> Tensor:
        return _row_sums(values, boundaries)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        values, boundaries = inputs
        ctx.save_for_backward(values, output, boundaries)
        ctx.save_for_forward(values, output, boundaries)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        values, sums, boundaries = ctx.saved_tensors
        if torch.is_grad_enabled():  # slower, and has derivatives
            return expand_rows(grad, boundaries, values.shape[0]), None
        return torch.ops.aten._segment_reduce_backward(
            grad.contiguous(), sums, values, "sum", offsets=boundaries, initial=0.0
        ), None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _: None) -> Tensor:
        *_, boundaries = ctx.saved_tensors
        return _RowSums.apply(tangent.contiguous(), boundaries)
