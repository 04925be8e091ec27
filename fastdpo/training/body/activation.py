"""The activation of a gated MLP, act(g)·u, with the gradient by hand and in place.

dg = act'(g)·u·dh,   du = act(g)·dh
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

    def forward(self, g: Tensor, u: Tensor, activated: Tensor | None = None) -> Tensor:
        """h = act(g)·u, of one shape; act(g) goes to `activated` where it is wanted later."""
        h = torch.empty(g.shape, dtype=g.dtype, device=g.device)
        if activated is None:
            self.act(g, h)
            return h.mul_(u)
        self.act(g, activated)
        return torch.mul(activated, u, out=h)

    def backward(self, dh: Tensor, g: Tensor, u: Tensor, activated: Tensor) -> tuple[Tensor, Tensor]:
        """(dg, du) in the memory of dh and `activated`, which is act(g)."""
        du = activated.mul_(dh)
        dh.mul_(u)
        self.gradient(dh, g, dh)
        return dh, du


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
