"""The products of frozen linear layers that share an input, with their LoRA: forward, and all gradients by hand.

    forward     y_j = x W_jᵀ + b_j + s (x A_jᵀ) B_jᵀ      one product x Aᵀ for the A of all layers, one below another
    backward    u_j = s dy_j B_j,   dA = uᵀ x,   dB_j = s dy_jᵀ (x A_jᵀ),   dx = Σ_j dy_j W_j + u A,   db_j = Σ dy_j

On rows of an input, so that a caller may go slice by slice: gradients of what is trained add up in `Gradients`. Kept
for the backward: x, and x Aᵀ (N, ΣR). Nothing here knows of autograd.

LoRA by way of the weight: a float32 weight that was dequantised may take s·B·A before it is used, an O × I pass where
the products' own results would take N × O and N × I ones; `merges` says when. In 16 bits that would round it away.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastdpo.training.body.labels import BODY, LORA, part
from fastdpo.training.body.projections import Projection, is_4bit, weight_of

#: The weight of the j-th layer.
Weights = Callable[[int], Tensor]


class Products:
    """Linear layers of one input.

    Args:
        projections: the layers, with the adapters that act.
        x_dtype: of the input. autocast: dtype of the autocast that is on, or None.

    Attributes:
        dtype: of the frozen products. lora_dtype: of LoRA's. out_dtype: of the results.
        trained: the tensors that may want a gradient: layer by layer b, and A and B of each adapter.
    """

    def __init__(self, projections: Sequence[Projection], x_dtype: torch.dtype, autocast: torch.dtype | None) -> None:
        self.projections = tuple(projections)
        first = self.projections[0].layer
        self.dtype = autocast or first.weight.dtype
        self.out_dtype = self.dtype
        if is_4bit(first):  # computes in a dtype of its own, whatever autocast says, and returns its input's
            self.dtype, self.out_dtype = compute_dtype(first, x_dtype), x_dtype
        adapters = [each for projection in self.projections for each in projection.adapters]
        self.lora_dtype = autocast or (adapters[0].a.dtype if adapters else self.dtype)
        self.trained: list[Tensor] = []
        for projection in self.projections:
            self.trained += [] if projection.bias is None else [projection.bias]
            self.trained += [tensor for adapter in projection.adapters for tensor in (adapter.a, adapter.b)]
        self.ranks = [sum(len(adapter.a) for adapter in projection.adapters) for projection in self.projections]
        self._factors: tuple[Tensor | None, list[Tensor | None]] | None = None

    @property
    def a(self) -> Tensor | None:
        """All A, one below another (ΣR, I), in LoRA's dtype."""
        return self._made()[0]

    @property
    def b(self) -> list[Tensor | None]:
        """s·B of each layer (O, its ΣR), in LoRA's dtype."""
        return self._made()[1]

    def _made(self) -> tuple[Tensor | None, list[Tensor | None]]:
        if self._factors is None:
            adapters = [each for projection in self.projections for each in projection.adapters]
            a = _joined([adapter.a.detach() for adapter in adapters], 0).to(self.lora_dtype) if adapters else None
            b: list[Tensor | None] = [None] * len(self.projections)
            for j, projection in enumerate(self.projections):
                if projection.adapters:
                    scaled = [adapter.b.detach() * adapter.scaling for adapter in projection.adapters]
                    b[j] = _joined(scaled, 1).to(self.lora_dtype)
            self._factors = a, b
        return self._factors

    def forget(self) -> None:
        """Free the copies of A and B, which every layer's graph would otherwise hold until its backward."""
        self._factors = None

    def merges(self, rows: int) -> bool:
        """Whether LoRA goes by way of the weights for so many rows: O·I twice for rows·O and rows·I."""
        first, outputs = self.projections[0], sum(projection.out_features for projection in self.projections)
        served = is_4bit(first.layer) and self.dtype == self.lora_dtype == torch.float32
        inputs = first.in_features
        return served and self.a is not None and rows * (outputs + inputs) >= 2 * outputs * inputs

    def weights(self, *, merged: bool) -> Weights:
        """The weight of each layer (O, I), made anew at every call where it is not kept in `dtype`."""

        def weight(j: int) -> Tensor:
            found = weight_of(self.projections[j].layer, self.dtype)
            b = self.b[j]
            if merged and b is not None:
                with part(LORA):
                    found.addmm_(b, self._a_of(j))
            return found

        return weight

    def _start(self, j: int) -> int:
        return sum(self.ranks[:j])

    def _a_of(self, j: int) -> Tensor:
        assert self.a is not None
        return self.a[self._start(j) : self._start(j) + self.ranks[j]]

    def _share(self, values: Tensor, j: int) -> Tensor:
        return values[:, self._start(j) : self._start(j) + self.ranks[j]]

    def forward(
        self, x: Tensor, weights: Weights, *, merged: bool, keep: bool, out: Sequence[Tensor | None] | None = None
    ) -> tuple[list[Tensor], Tensor | None]:
        """x (N, I) in `dtype` → y (N, O) of each layer in `dtype`, and x Aᵀ (N, ΣR) where it is needed.

        merged: the weights hold the LoRA. keep: a backward follows. out: where the results go.
        """
        xa = self.through_a(x) if self.a is not None and (keep or not merged) else None
        results = []
        for j, projection in enumerate(self.projections):
            into = None if out is None else out[j]
            weight = weights(j)
            with part(BODY):
                if projection.bias is None:
                    y = torch.mm(x, weight.t(), out=into)
                else:
                    y = torch.addmm(projection.bias.detach().to(self.dtype), x, weight.t(), out=into)
            del weight  # before the next one is made
            b = self.b[j]
            if b is not None and not merged:
                assert xa is not None
                with part(LORA):
                    _add_product(y, self._share(xa, j), b.t())
            results.append(y)
        return results, xa

    def through_a(self, x: Tensor) -> Tensor:
        """x Aᵀ (N, ΣR), for layers with LoRA."""
        assert self.a is not None
        with part(LORA):
            return x.to(self.lora_dtype) @ self.a.t()

    def backward(
        self,
        x: Tensor | None,
        grads: Sequence[Tensor | None],
        xa: Tensor | None,
        weights: Weights,
        gradients: Gradients,
        *,
        merged: bool,
        dx: Tensor | None,
    ) -> None:
        """Adds to `gradients` what rows x (N, I) leave, and writes dx (N, I), None where nobody asks for it.

        x and xa are read for LoRA only.

        grads: dy (N, O) of each layer, in `dtype`; None where nothing came.
        """
        given = [(j, dy) for j, dy in enumerate(grads) if dy is not None]
        if dx is not None:
            for count, (j, dy) in enumerate(given):
                weight = weights(j)
                with part(BODY):
                    if count:
                        dx.addmm_(dy, weight)
                    else:
                        torch.mm(dy, weight, out=dx)
                del weight  # before the next one is made
            if not given:
                dx.zero_()
        for j, dy in given:
            gradients.add_bias(j, dy)
        if self.a is None:
            return
        assert x is not None
        assert xa is not None
        with part(LORA):
            u = x.new_zeros((len(x), len(self.a)), dtype=self.lora_dtype)
            for j, dy in given:
                b = self.b[j]
                if b is not None:
                    dy = dy.to(self.lora_dtype)
                    torch.mm(dy, b, out=self._share(u, j))
                    gradients.add_b(j, dy, self._share(xa, j))
            gradients.add_a(u, x.to(self.lora_dtype))
            if dx is not None and not merged:
                _add_product(dx, u, self.a)


class Gradients:
    """Sums of the gradients of `Products.trained`, over slices of rows, in the tensors' own dtypes.

    wanted: for each of them, whether its gradient is asked for.
    """

    def __init__(self, products: Products, wanted: Sequence[bool]) -> None:
        self.products, self.wanted = products, tuple(wanted)
        adapters = [each for projection in products.projections for each in projection.adapters]
        self._a: Tensor | None = None
        self._b: list[Tensor | None] = [None] * len(products.projections)
        self._bias: list[Tensor | None] = [None] * len(products.projections)
        if products.a is not None and any(wanted):
            dtype = adapters[0].a.dtype
            self._a = products.a.new_zeros(products.a.shape, dtype=dtype)
            # (ΣR, O): a product of a few rows runs at twice the rate of one of a few columns
            self._b = [None if b is None else b.new_zeros(b.shape[::-1], dtype=dtype) for b in products.b]
        at = 0
        for j, projection in enumerate(products.projections):
            if projection.bias is not None:
                self._bias[j] = torch.zeros_like(projection.bias) if self.wanted[at] else None
                at += 1
            at += 2 * len(projection.adapters)

    def add_bias(self, j: int, dy: Tensor) -> None:
        """db += Σ dy."""
        bias = self._bias[j]
        if bias is not None:
            bias += dy.sum(0, dtype=bias.dtype)

    def add_a(self, u: Tensor, x: Tensor) -> None:
        """dA += uᵀ x."""
        if self._a is not None:
            _add_product(self._a, u.t(), x)

    def add_b(self, j: int, dy: Tensor, xa: Tensor) -> None:
        """(dB)ᵀ/s += (x Aᵀ)ᵀ dy."""
        b = self._b[j]
        if b is not None:
            _add_product(b, xa.t(), dy)

    def listed(self) -> list[Tensor | None]:
        """In the order of `Products.trained`."""
        found: list[Tensor | None] = []
        row = 0
        for j, projection in enumerate(self.products.projections):
            found += [] if projection.bias is None else [self._bias[j]]
            b, column = self._b[j], 0
            for adapter in projection.adapters:
                rank = len(adapter.a)
                if b is None or self._a is None:
                    found += [None, None]
                else:
                    found += [self._a[row : row + rank], b[column : column + rank].t() * adapter.scaling]
                row, column = row + rank, column + rank
        return [grad if wanted else None for grad, wanted in zip(found, self.wanted, strict=True)]


def compute_dtype(layer: Any, x_dtype: torch.dtype) -> torch.dtype:
    """As the layer itself settles it in its first forward."""
    if not layer.compute_type_is_set and x_dtype in (torch.float32, torch.bfloat16):
        return x_dtype
    found: torch.dtype = layer.compute_dtype or x_dtype
    return found


def _joined(tensors: Sequence[Tensor], dim: int) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(list(tensors), dim)


def _add_product(total: Tensor, first: Tensor, second: Tensor) -> None:
    """total += first @ second, in the product's dtype."""
    if total.dtype == first.dtype:
        total.addmm_(first, second)
    else:
        total += first @ second
