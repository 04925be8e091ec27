"""Rotary positions, without the copies that the rotated halves make, and with nothing kept but cosines and sines.

    (y₁, y₂) = (x₁ cos₁ − x₂ sin₁, x₂ cos₂ + x₁ sin₂)          x₁, x₂ the halves of the first `cos.shape[-1]` numbers
    (dx₁, dx₂) = (dy₁ cos₁ + dy₂ sin₂, dy₂ cos₂ − dy₁ sin₁)

Numbers of a head behind the rotated ones pass through. Computed in the wider of x's and cos' dtypes, rounded once.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastdpo.training.body.labels import ATTENTION, part


def rotate(x: Tensor, cos: Tensor, sin: Tensor, elements: int = 2**20) -> Tensor:
    """x (R, T, heads, D), cos and sin (R or 1, T, D' ≤ D) → (R, T, heads, D). elements: of a slice of tokens."""
    y: Tensor = _Rotate.apply(x, cos, sin, elements)
    return y


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, elements: int) -> Tensor:
        ctx.elements = elements
        ctx.save_for_backward(cos, sin)
        return _rotated(x.detach(), cos, sin, elements, backward=False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Any:
        cos, sin = ctx.saved_tensors
        return _rotated(dy, cos, sin, ctx.elements, backward=True), None, None, None


def _rotated(x: Tensor, cos: Tensor, sin: Tensor, elements: int, *, backward: bool) -> Tensor:
    width = cos.shape[-1]
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    dtype = torch.promote_types(x.dtype, cos.dtype)
    # A row of positions serves all rows, or each has its own
    cos, sin = (each.unsqueeze(2).expand(len(x), -1, 1, -1) for each in (cos, sin))
    size = max(1, elements // (x.shape[0] * x.shape[2] * x.shape[3]))
    with part(ATTENTION), torch.autocast(x.device.type, enabled=False):
        for start in range(0, x.shape[1], size):
            at = (slice(None), slice(start, start + size))
            _rotate_slice(x[at][..., :width].to(dtype), cos[at], sin[at], y[at][..., :width], backward)
        if width < x.shape[-1]:
            y[..., width:] = x[..., width:]
    return y


def _rotate_slice(x: Tensor, cos: Tensor, sin: Tensor, y: Tensor, backward: bool) -> None:
    half = x.shape[-1] // 2
    (x1, x2), (c1, c2), (s1, s2) = (each.split(half, -1) for each in (x, cos, sin))
    y1, y2 = y.split(half, -1)
    # The transposed rotation turns the other way
    s1, s2, sign = (s2, s1, 1) if backward else (s1, s2, -1)
    into = (y1, y2) if y.dtype == x.dtype else (None, None)
    first = torch.mul(x1, c1, out=into[0]).addcmul_(x2, s1, value=sign)
    second = torch.mul(x2, c2, out=into[1]).addcmul_(x1, s2, value=-sign)
    if into[0] is None:
        y1.copy_(first)
        y2.copy_(second)
