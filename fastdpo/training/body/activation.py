"""The activation of a gated MLP, act(g)·u, with the gradient by hand and in place.

    dg = act'(g)·u·dh,   du = act(g)·dh

In the backward of a slice, `room` says where dg and du will be; `start` gives h once more and where dh goes; when that
is known, `finish` makes dg and du of it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

_ATEN = torch.ops.aten


@dataclass(frozen=True)
class Activation:
    """act: writes act(g) into `out`. gradient: writes act'(g)·d into `out`, which may be d."""

    act: Callable[[Tensor, Tensor], object]
    gradient: Callable[[Tensor, Tensor, Tensor], object]

    def forward(self, g: Tensor, u: Tensor) -> Tensor:
        """h = act(g)·u, of one shape."""
        h = torch.empty(g.shape, dtype=g.dtype, device=g.device)
        self.act(g, h)
        return h.mul_(u)

    def of(self, gate: Tensor) -> Activation:
        """What serves a tensor like this one."""
        return self

    def room(self, both: Tensor, *, spent: bool) -> Tensor:
        """Memory for dg and du, beside each other as gate and up are in `both`. spent: nobody reads these again."""
        return torch.empty_like(both)

    def start(self, dg: Tensor, du: Tensor, g: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        """h, and where dh is awaited. Here act(g) waits where du will be, and dh where dg will be."""
        self.act(g, du)
        return torch.mul(du, u), dg

    def finish(self, dh: Tensor, dg: Tensor, du: Tensor, g: Tensor, u: Tensor) -> None:
        """Writes dg and du; dh is where `start` said."""
        du.mul_(dh)
        dg.mul_(u)
        self.gradient(dg, g, dg)


def _gelu(approximate: str) -> Activation:
    return Activation(
        lambda g, out: _ATEN.gelu.out(g, approximate=approximate, out=out),
        lambda d, g, out: _ATEN.gelu_backward.grad_input(d, g, approximate=approximate, grad_input=out),
    )


_SILU = Activation(
    lambda g, out: _ATEN.silu.out(g, out=out), lambda d, g, out: _ATEN.silu_backward.grad_input(d, g, grad_input=out)
)
#: Name in a configuration → the activation.
ACTIVATIONS = {
    "silu": _SILU,
    "swish": _SILU,
    "gelu": _gelu("none"),
    "gelu_pytorch_tanh": _gelu("tanh"),
}
