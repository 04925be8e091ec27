"""A gated MLP in tiles of tokens: down(act(gate(x))·up(x)), with LoRA, forward and backward.

An MLP does not mix tokens, so a slice of them goes all the way before the next one starts, and tensors of the inner
width I exist for one slice only. What is kept for the backward:

    in a layer that is recomputed     x (N, H) alone. `_Keep` has it before the first product, so the recomputation of
                                      the layer ends there; gate and up are computed once more in the backward, slice
                                      by slice, and down is not: 2 + 3 products of 2·N·H·I for the 3 + 3 of the modules
    elsewhere                         x, gate and up (N, 2·I); act(gate)·up is formed again. No product is repeated

`Tiles` says how many tokens make a slice, and how many weights are dequantised at once: with three, each of them once
for a forward or a backward; with one, again for every slice.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastdpo.training.body.activation import Activation
from fastdpo.training.body.labels import ACTIVATION, part
from fastdpo.training.body.linear import autocast_dtype
from fastdpo.training.body.products import Gradients, Products, Weights
from fastdpo.training.body.projections import Projection

#: Bytes of a card below which its weights are dequantised one at a time.
SMALL_MEMORY = 10 * 10**9
#: Tensors of the inner width that a slice has in the backward: gate, up, act(gate), act(gate)·up, its gradient.
INNER_TENSORS = 5


@dataclass(frozen=True)
class Tiles:
    """Attributes:
    bytes: that the inner tensors of a slice may take.
    least: tokens of a slice below which products lose their rate; wins over `bytes`.
    weights_at_once: whether the weights of an MLP are dequantised together, not one after the other.
    elements: of a slice of what is done element by element, in norms and rotary positions.
    """

    bytes: int
    least: int = 256
    weights_at_once: bool = True
    elements: int = 2**20

    @classmethod
    def on_cpu(cls) -> Tiles:
        """A slice stays near the caches; a few MiB of weights are nothing. 4 MiB of float32 are in a cache for a second
        pass."""
        return cls(32 * 2**20)

    @classmethod
    def on_gpu(cls, memory: int) -> Tiles:
        """Of a card that may take `memory` bytes: about a thousand tokens of a 7B model. On the smallest cards half of
        that, and one weight at a time: three of a 7B model are 0.35 GB. Norms take as many tokens, nearly: a kernel of
        few would be shorter than its launch."""
        small = memory < SMALL_MEMORY
        size = (64 if small else 128) * 2**20
        return cls(size, weights_at_once=not small, elements=size // 32)

    def rows(self, inner: int, itemsize: int) -> int:
        """Tokens of a slice, a multiple of 64."""
        return max(self.least, self.bytes // (INNER_TENSORS * inner * itemsize) // 64 * 64)


@dataclass(frozen=True)
class Mlp:
    """The layers of one MLP, served together, for one forward and its backward.

    gate_up: two layers, or one whose results are gate and up side by side. down: one.
    """

    gate_up: Products
    down: Products
    activation: Activation
    tiles: Tiles
    merged: tuple[bool, bool]

    @property
    def trained(self) -> list[Tensor]:
        return [*self.gate_up.trained, *self.down.trained]

    @property
    def inner(self) -> int:
        return self.down.projections[0].in_features

    @property
    def dtype(self) -> torch.dtype:
        return self.gate_up.dtype

    def slices(self, rows: int) -> Iterator[slice]:
        """Slices of equal size, nearly, that cover the rows."""
        most = self.tiles.rows(self.inner, self.dtype.itemsize)
        count = max(1, -(-rows // most))
        size = -(-rows // count)
        for start in range(0, rows, size):
            yield slice(start, min(start + size, rows))

    def weights(self) -> tuple[Weights, Weights]:
        """Of gate and up, and of down; made once where they may be held together."""
        found = self.gate_up.weights(merged=self.merged[0]), self.down.weights(merged=self.merged[1])
        return (_once(found[0]), _once(found[1])) if self.tiles.weights_at_once else found

    def forget(self) -> None:
        """Free the copies of the adapters."""
        self.gate_up.forget()
        self.down.forget()

    def inner_pair(self, both: Tensor) -> tuple[list[Tensor | None], Tensor, Tensor]:
        """A tensor (N, 2·I) as what the layers write, and as gate and up: for two layers in two halves of memory."""
        if len(self.gate_up.projections) == 1:
            return [both], both[:, : self.inner], both[:, self.inner :]
        gate, up = both.view(2, -1, self.inner).unbind(0)
        return [gate, up], gate, up


def _once(weights: Weights) -> Weights:
    made: dict[int, Tensor] = {}

    def weight(j: int) -> Tensor:
        if j not in made:
            made[j] = weights(j)
        return made[j]

    return weight


def gated_mlp(
    x: Tensor,
    gate_up: Sequence[Projection],
    down: Projection,
    activation: Activation,
    tiles: Tiles,
    *,
    recomputed: bool,
) -> Tensor:
    """x (..., H) → (..., H). recomputed: the layer is checkpointed, so that only its input is worth keeping."""
    autocast = autocast_dtype(x.device)
    first = Products(gate_up, x.dtype, autocast)
    second = Products([down], first.out_dtype, autocast)
    rows = x.numel() // x.shape[-1]
    mlp = Mlp(first, second, activation, tiles, (first.merges(rows), second.merges(rows)))
    keep = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (x, *mlp.trained))
    if keep and recomputed:
        y: Tensor = _Products.apply(_Keep.apply(x, mlp, *mlp.trained), mlp)
        return y
    y = _Mlp.apply(x, mlp, keep, *mlp.trained)
    return y


def _forward(x: Tensor, mlp: Mlp, kept: Tensor | None) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """x (N, H) → y (N, H). kept (2·N·I,): gate and up of all slices go there, and the inputs' A products come back."""
    y = torch.empty((len(x), mlp.down.projections[0].out_features), dtype=mlp.down.dtype, device=x.device)
    first, second = mlp.weights()
    xas, has = [], []
    keep = kept is not None
    for rows in mlp.slices(len(x)):
        both = _pair_of(kept, rows, mlp) if kept is not None else x.new_empty(2 * (rows.stop - rows.start) * mlp.inner)
        out, gate, up = mlp.inner_pair(both.view(rows.stop - rows.start, -1))
        _, xa = mlp.gate_up.forward(x[rows], first, merged=mlp.merged[0], keep=keep, out=out)
        with part(ACTIVATION):
            h = mlp.activation.of(gate).forward(gate, up)
        del gate, up, out, both
        _, ha = mlp.down.forward(h.to(mlp.down.dtype), second, merged=mlp.merged[1], keep=keep, out=[y[rows]])
        if keep:
            xas.append(xa)
            has.append(ha)
    mlp.forget()
    return y, _stacked(xas), _stacked(has)


def _pair_of(kept: Tensor, rows: slice, mlp: Mlp) -> Tensor:
    return kept[2 * rows.start * mlp.inner : 2 * rows.stop * mlp.inner]


def _stacked(parts: list[Tensor | None]) -> Tensor | None:
    found = [each for each in parts if each is not None]
    if not found:
        return None
    return found[0] if len(found) == 1 else torch.cat(found)


def _backward(
    x: Tensor,
    dy: Tensor,
    mlp: Mlp,
    wanted: Sequence[bool],
    kept: tuple[Tensor, Tensor | None, Tensor | None] | None,
    *,
    needs_x: bool,
) -> tuple[Tensor | None, list[Tensor | None]]:
    """dx (N, H), and the gradients of `mlp.trained`. kept: what the forward left; without it, gate and up are computed
    once more."""
    first, second = mlp.weights()
    count = len(mlp.gate_up.trained)
    gradients = Gradients(mlp.gate_up, wanted[:count]), Gradients(mlp.down, wanted[count:])
    dx = torch.empty_like(x) if needs_x else None
    for rows in mlp.slices(len(x)):
        size = rows.stop - rows.start
        xs, dys = x[rows], dy[rows].to(mlp.down.dtype)
        if kept is None:
            both, xa, ha = x.new_empty(2 * size * mlp.inner), None, None
        else:
            both, xa, ha = _pair_of(kept[0], rows, mlp), *(None if each is None else each[rows] for each in kept[1:])
        out, gate, up = mlp.inner_pair(both.view(size, -1))
        if kept is None:
            _, xa = mlp.gate_up.forward(xs, first, merged=mlp.merged[0], keep=True, out=out)
        activation = mlp.activation.of(gate)
        with part(ACTIVATION):
            d_both = activation.room(both, spent=kept is None)
            d_out, d_gate, d_up = mlp.inner_pair(d_both.view(size, -1))
            h, awaited = activation.start(d_gate, d_up, gate, up)
            h = h.to(mlp.down.dtype)
        if ha is None and mlp.down.a is not None:
            ha = mlp.down.through_a(h)
        dh = awaited if awaited.dtype == mlp.down.dtype else torch.empty_like(h)
        mlp.down.backward(h, [dys], ha, second, gradients[1], merged=mlp.merged[1], dx=dh)
        del h
        with part(ACTIVATION):
            if dh is not awaited:
                awaited.copy_(dh)
            activation.finish(awaited, d_gate, d_up, gate, up)
        del gate, up, out, both, dh, awaited
        into = None if dx is None else dx[rows]
        mlp.gate_up.backward(xs, d_out, xa, first, gradients[0], merged=mlp.merged[0], dx=into)
    mlp.forget()
    return dx, [*gradients[0].listed(), *gradients[1].listed()]


class _Mlp(torch.autograd.Function):
    """All in one node: what is kept are x, gate and up."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, mlp: Mlp, keep: bool, *trained: Tensor) -> Tensor:
        rows = x.detach().flatten(0, -2).to(mlp.dtype)
        with torch.autocast(x.device.type, enabled=False):
            kept = rows.new_empty(2 * len(rows) * mlp.inner) if keep else None
            y, xa, ha = _forward(rows, mlp, kept)
        ctx.mlp, ctx.shape, ctx.dtype = mlp, x.shape, x.dtype
        if keep:
            ctx.save_for_backward(rows if rows.dtype != x.dtype else x, kept, xa, ha)
        return y.to(mlp.down.out_dtype).unflatten(0, x.shape[:-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Any:
        x, *kept = ctx.saved_tensors
        needs = ctx.needs_input_grad
        with torch.autocast(dy.device.type, enabled=False):
            flat = x.flatten(0, -2), dy.flatten(0, -2)
            dx, grads = _backward(*flat, ctx.mlp, needs[3:], tuple(kept), needs_x=needs[0])
        return None if dx is None else dx.to(ctx.dtype).view(ctx.shape), None, None, *grads


class _Keep(torch.autograd.Function):
    """Keeps x, and does the whole backward of the MLP that follows it, whose gradient `_Products` hands on."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, mlp: Mlp, *trained: Tensor) -> Tensor:
        ctx.mlp = mlp
        ctx.save_for_backward(x)
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Any:
        (x,) = ctx.saved_tensors
        mlp: Mlp = ctx.mlp
        needs = ctx.needs_input_grad
        with torch.autocast(dy.device.type, enabled=False):
            rows = x.flatten(0, -2).to(mlp.dtype)
            dx, grads = _backward(rows, dy.flatten(0, -2), mlp, needs[2:], None, needs_x=needs[0])
        return None if dx is None else dx.to(x.dtype).view(x.shape), None, *grads


class _Products(torch.autograd.Function):
    """x → y, with nothing kept; its backward passes dy (..., H) to `_Keep`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, mlp: Mlp) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            y, _, _ = _forward(x.detach().flatten(0, -2).to(mlp.dtype), mlp, None)
        return y.to(mlp.down.out_dtype).unflatten(0, x.shape[:-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Any:
        return dy, None
