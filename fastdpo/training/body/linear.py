"""`project`: frozen linear layers that share an input, with their LoRA, as one autograd function.

Kept for the backward: the input once for all layers, in the dtype that the products take, and x Aᵀ. The weights are
read again there, and dequantised again where they are 4-bit ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastdpo.training.body.products import Gradients, Products
from fastdpo.training.body.projections import Projection


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """dtype of the autocast that is on, or None."""
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None


def project(x: Tensor, projections: Sequence[Projection]) -> tuple[Tensor, ...]:
    """x (..., I) → (..., O) of each layer, with the results and gradients of peft's modules."""
    products = Products(projections, x.dtype, autocast_dtype(x.device))
    keep = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (x, *products.trained))
    found: tuple[Tensor, ...] = _Project.apply(x, products, keep, *products.trained)
    return found


class _Project(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, products: Products, keep: bool, *trained: Tensor) -> Any:
        rows = x.detach().flatten(0, -2).to(products.dtype)
        merged = products.merges(len(rows))
        with torch.autocast(x.device.type, enabled=False):
            weights = products.weights(merged=merged)
            results, xa = products.forward(rows, weights, merged=merged, keep=keep)
        products.forget()
        ctx.products, ctx.shape, ctx.dtype = products, x.shape, x.dtype
        if keep:
            # The input itself where nothing was converted: what else keeps it keeps the same memory
            kept = rows if rows.dtype != x.dtype else x
            ctx.save_for_backward(*([] if xa is None else [kept, xa]))
        return tuple(y.to(products.out_dtype).unflatten(0, x.shape[:-1]) for y in results)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        products: Products = ctx.products
        needs_x, wanted = ctx.needs_input_grad[0], ctx.needs_input_grad[3:]
        kept, xa = ctx.saved_tensors or (None, None)
        given = [None if dy is None else dy.flatten(0, -2).to(products.dtype) for dy in grads]
        rows = next(len(dy) for dy in given if dy is not None)
        device = next(dy.device for dy in given if dy is not None)
        merged = products.merges(rows)
        with torch.autocast(device.type, enabled=False):
            dx = torch.empty((rows, ctx.shape[-1]), dtype=products.dtype, device=device) if needs_x else None
            x = None if kept is None else kept.flatten(0, -2)
            gradients = Gradients(products, wanted)
            weights = products.weights(merged=merged)
            products.backward(x, given, xa, weights, gradients, merged=merged, dx=dx)
            grads_of_trained = gradients.listed()
        products.forget()
        found = None if dx is None else dx.to(ctx.dtype).view(ctx.shape)
        return found, None, None, *grads_of_trained
