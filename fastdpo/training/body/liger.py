"""liger-kernel's functions in a lean body: norms, activations and rotary positions, each in one pass on a GPU.

Its functions are called on tensors; nothing of transformers is patched, and a model that is not trained here stays as
it is. Where a function does not serve a tensor (`_..._obstacle`), ours does, and `Functions.told` says so. What is kept
for the backward is what ours keep. Second derivatives are refused, as everywhere in the body: liger's own autograd
functions would give wrong ones in silence.
"""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fastdpo.training.body.activation import ACTIVATIONS, Activation
from fastdpo.training.body.functions import Functions
from fastdpo.training.body.labels import ATTENTION, NORMS, part
from fastdpo.training.body.norm import NormKind, rms_norm
from fastdpo.training.body.rotary import rotate

#: What we call it → its module in `liger_kernel.ops` and the name that its two functions start with.
_TABLE = {
    "RMSNorm": ("rms_norm", "rms_norm"),
    "SwiGLU": ("swiglu", "swiglu"),
    "GeGLU": ("geglu", "geglu"),
    "RoPE": ("rope", "rope"),
}
#: Name in a configuration → the function of gate and up that has this activation.
_GATED = {"silu": "SwiGLU", "swish": "SwiGLU", "gelu_pytorch_tanh": "GeGLU"}
#: Whether x·r is rounded before the weight is applied → liger's name for that.
_CASTING = {True: "llama", False: "gemma"}
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
#: Numbers of a row, which one program of a kernel holds.
_WIDEST = 65536


@cache
def _functions(name: str) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Forward and backward, imported when they are first needed."""
    module, prefix = _TABLE[name]
    found = importlib.import_module(f"liger_kernel.ops.{module}")
    return getattr(found, f"{prefix}_forward"), getattr(found, f"{prefix}_backward")


def liger_functions() -> Functions:
    """A set that records what it served."""
    served: set[str] = set()
    left: dict[str, str] = {}

    def norm(x: Tensor, module: nn.Module, kind: NormKind) -> Tensor:
        weight: Any = module.weight
        if reason := _norm_obstacle(x, weight, kind):
            left["RMSNorm"] = reason
            return rms_norm(x, module, kind)
        served.add("RMSNorm")
        y: Tensor = _Norm.apply(x, weight, getattr(module, kind.eps), kind)
        return y

    def rotated(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        if reason := _rotary_obstacle(query, key, cos):
            left["RoPE"] = reason
            return rotate(query, key, cos, sin)
        served.add("RoPE")
        both: tuple[Tensor, Tensor] = _Rotate.apply(query, key, cos, sin)
        return both

    def gated(name: str, own: Activation) -> Activation:
        if name in _GATED:
            return LigerActivation(own.act, own.gradient, _GATED[name], served, left)
        return UnservedActivation(own.act, own.gradient, name, left)

    return Functions(
        norm,
        rotated,
        {name: gated(name, own) for name, own in ACTIVATIONS.items()},
        f"liger-kernel {importlib.metadata.version('liger-kernel')}",
        served,
        left,
    )


def _row_obstacle(dtype: torch.dtype, width: int) -> str:
    if dtype not in _DTYPES:
        return f"liger-kernel has none for {dtype}"
    return f"rows of {width} numbers are wider than {_WIDEST}" if width > _WIDEST else ""


def _norm_obstacle(x: Tensor, weight: Tensor, kind: NormKind) -> str:
    if kind.rounds_first and weight.dtype != x.dtype:  # the module's result is of the wider dtype, liger's of x's
        return f"a weight in {weight.dtype} meets {x.dtype}"
    return _row_obstacle(x.dtype, x.shape[-1])


def _rotary_obstacle(query: Tensor, key: Tensor, cos: Tensor) -> str:
    if cos.shape[-1] != query.shape[-1]:
        return "a part of each head has no position"
    for x in (query, key):  # which liger rounds to the dtype of cosines and sines
        if torch.promote_types(x.dtype, cos.dtype) != cos.dtype:
            return f"positions in {cos.dtype} meet {x.dtype}"
    return _row_obstacle(cos.dtype, query.shape[-1]) or _row_obstacle(query.dtype, query.shape[-1])


class _Norm(torch.autograd.Function):
    """x (..., H) → (..., H); keeps x and a factor per row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, kind: NormKind) -> Tensor:
        forward, _ = _functions("RMSNorm")
        with part(NORMS):
            rows = x.detach().contiguous()
            y, _, factor, *settings = forward(
                rows, weight.detach(), eps, kind.offset, _CASTING[kind.rounds_first], None
            )
        ctx.kind, ctx.settings = kind, settings
        ctx.save_for_backward(x, weight, factor)
        found: Tensor = y
        return found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Any:
        _, backward = _functions("RMSNorm")
        x, weight, factor = ctx.saved_tensors
        block, warps, casting = ctx.settings
        with part(NORMS):
            # Not in place: a norm behind a layer shares its gradient with the sum that follows
            dx, _ = backward(
                dy.contiguous(), x.contiguous().flatten(0, -2), weight, factor, ctx.kind.offset, casting, block, warps,
                False, None, needs_dw=False,
            )  # fmt: skip
        return dx, None, None, None


class _Rotate(torch.autograd.Function):
    """Queries and keys (R, T, heads, D), each where it is, and so their gradients: in a body nobody else reads them.

    cos and sin (R or 1, T, D): every row may count its positions in its own way. liger reads the first half of them,
    as both halves are alike.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        forward, _ = _functions("RoPE")
        with part(ATTENTION):
            # It wants (R, heads, T, D), and works on the memory of (R, T, heads, D)
            query, key, cos, sin = forward(query.detach().transpose(1, 2), key.detach().transpose(1, 2), cos, sin)
        ctx.save_for_backward(cos, sin)
        return query.transpose(1, 2), key.transpose(1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_query: Tensor, d_key: Tensor) -> Any:
        _, backward = _functions("RoPE")
        cos, sin = ctx.saved_tensors
        with part(ATTENTION):
            d_query, d_key = backward(d_query.transpose(1, 2), d_key.transpose(1, 2), cos, sin)
        return d_query.transpose(1, 2), d_key.transpose(1, 2), None, None


@dataclass(frozen=True)
class UnservedActivation(Activation):
    """Ours, which says so."""

    name: str
    left: dict[str, str]

    def of(self, gate: Tensor) -> Activation:
        self.left["activation"] = f"liger-kernel has none for {self.name!r}"
        return self


@dataclass(frozen=True)
class LigerActivation(Activation):
    """act(g)·u and its gradients, each in one pass; act(g) is not kept, and the gradients go where g and u are."""

    name: str
    served: set[str]
    left: dict[str, str]

    def of(self, gate: Tensor) -> Activation:
        reason = _row_obstacle(gate.dtype, gate.shape[-1])
        if gate.stride(-2) != gate.shape[-1]:  # one stride is taken for gate, up and result
            reason = "gate and up come side by side from one layer"
        if reason:
            self.left[self.name] = reason
            return Activation(self.act, self.gradient)
        self.served.add(self.name)
        return self

    def forward(self, g: Tensor, u: Tensor) -> Tensor:
        h: Tensor = _functions(self.name)[0](g, u)[2]
        return h

    def room(self, both: Tensor, *, spent: bool) -> Tensor:
        return both if spent else both.clone()

    def start(self, dg: Tensor, du: Tensor, g: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        return self.forward(g, u), torch.empty_like(g)

    def finish(self, dh: Tensor, dg: Tensor, du: Tensor, g: Tensor, u: Tensor) -> None:
        _functions(self.name)[1](dg, du, dh)  # which hold g and u until then
