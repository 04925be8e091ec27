"""Root mean square norm that keeps its input and a factor per row, (N, 1), and works on a slice of rows at a time.

    r = (mean(x²) + ε)^(−1/2),   y = w·(x r)            w stands for 1 + w in Gemma's form
    dx = r·(w dy) − x·r³·mean(x·(w dy))

In float32 whatever the input's dtype is, so its copies exist for one slice. Where the product with w is rounded
differs: LLaMA's modules round x r first and multiply in the input's dtype, Gemma's and OLMo 2's multiply in float32.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fastdpo.training.body.labels import NORMS, part


@dataclass(frozen=True)
class NormKind:
    """eps: the attribute of ε. offset: added to the weight. rounds_first: x r is rounded before w is applied."""

    eps: str = "variance_epsilon"
    offset: float = 0.0
    rounds_first: bool = True


def rms_norm(x: Tensor, module: nn.Module, kind: NormKind, elements: int = 2**20) -> Tensor:
    """x (..., H) → (..., H), as a module of this kind with a frozen weight computes it. elements: of a slice."""
    y: Tensor = _RmsNorm.apply(x, module.weight, getattr(module, kind.eps), kind, elements)
    return y


def _slices(x: Tensor, elements: int) -> list[slice]:
    size = max(1, elements // x.shape[-1])
    return [slice(start, start + size) for start in range(0, len(x), size)]


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, kind: NormKind, elements: int) -> Tensor:
        rows, width = x.detach().flatten(0, -2), x.shape[-1]
        w = weight.detach().float() + kind.offset if kind.offset else weight.detach()
        dtype = torch.promote_types(w.dtype, x.dtype) if kind.rounds_first else x.dtype
        y = torch.empty(rows.shape, dtype=dtype, device=x.device)
        factor = torch.empty((len(rows), 1), dtype=torch.float32, device=x.device)
        with part(NORMS), torch.autocast(x.device.type, enabled=False):
            for at in _slices(rows, elements):
                piece, r = rows[at].float(), factor[at]
                torch.linalg.vector_norm(piece, dim=-1, keepdim=True, out=r)
                r.square_().div_(width).add_(eps).rsqrt_()
                if dtype == torch.float32:
                    torch.mul(piece, r, out=y[at]).mul_(w)
                elif kind.rounds_first:
                    torch.mul((piece * r).to(x.dtype), w, out=y[at])
                else:
                    y[at] = (piece * r).mul_(w)
        ctx.kind, ctx.elements = kind, elements
        ctx.save_for_backward(x, weight, factor)
        return y.view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Any:
        x, weight, factor = ctx.saved_tensors
        rows, grads, width = x.flatten(0, -2), dy.flatten(0, -2), x.shape[-1]
        w = weight.float() + ctx.kind.offset
        dx = torch.empty(rows.shape, dtype=x.dtype, device=x.device)
        with part(NORMS), torch.autocast(x.device.type, enabled=False):
            for at in _slices(rows, ctx.elements):
                piece, r = rows[at].float(), factor[at]
                into = dx[at] if dx.dtype == torch.float32 else None
                scaled = torch.mul(grads[at].float(), w, out=into)
                mean = torch.linalg.vecdot(scaled, piece)[:, None].div_(width)
                scaled.mul_(r).addcmul_(piece, mean.mul_(r.pow(3)), value=-1)
                if into is None:
                    dx[at] = scaled
        return dx.view(x.shape), None, None, None, None
