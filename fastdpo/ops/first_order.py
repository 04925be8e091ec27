"""Operations that have a first derivative, by backward, and no other: what else is asked of them raises.

Left to itself autograd gives zeros there. A gradient that was computed outside its sight, as every kernel's is, looks
like a constant to a second backward (`create_graph`, Hessians, gradient penalties) wherever the incoming gradient is
one; and below autograd an operator's outputs have no tangents. So `kernel` does three things. Under `create_graph` the
gradients that a backward returns hang on a node that raises, which leads to the incoming gradients and to the inputs
(by an `_anchor` of each), so that every path to one of them is refused. Tangents of forward mode are refused wherever
they meet an operator, without a gradient too. And torch.func's transforms are refused, which hide both from operators.

A first backward costs what it did: an anchor is empty, and nothing is saved beside it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad


def see_oracle(name: str) -> str:
    """The advice of an operator that has an oracle of this name in `fastdpo.formulas.oracle`."""
    return f"fastdpo.formulas.oracle.{name} has them all, in plain PyTorch."


def refusal(function: str, advice: str, asked: str) -> NotImplementedError:
    """The sentence, which is a RuntimeError as torch's own are. advice: a sentence on what has every derivative."""
    return NotImplementedError(
        f"fastdpo's {function} has a first derivative by backward, and no other: {asked}. {advice}"
    )


def kernel(
    operator: torch._ops.OpOverload,
    advice: str,
    backward: Callable[..., Any] | None,
    setup_context: Callable[..., Any] | None,
) -> Callable[..., Any]:
    """The autograd kernel of `operator`, for `Library.impl(..., "Autograd", with_keyset=True)`.

    Args:
        advice: what a refusal says on what has further derivatives.
        backward, setup_context: as for `torch.library.register_autograd`; without them there is no derivative at all.
    """
    name = operator._opname

    def below(keyset: Any, *args: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return operator.redispatch(keyset & torch._C._after_autograd_keyset, *args)

    class FirstOrder(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, keyset: Any, anchors: list[Tensor], *args: Any) -> Any:
            output = below(keyset, *args)
            ctx.anchors = anchors
            if setup_context is not None:
                setup_context(ctx, args, output)
            return output

        @staticmethod
        def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
            if backward is None:
                raise refusal(name, advice, "a derivative was asked for")
            needed = ctx.needs_input_grad
            ctx.needs_input_grad = needed[2:]
            try:
                with torch.no_grad():
                    found = backward(ctx, *grads)
            finally:
                ctx.needs_input_grad = needed
            if torch.is_grad_enabled():
                found = _refusing(name, advice, found, [*grads, *ctx.anchors])
            return None, None, *found

        @staticmethod
        def jvp(ctx: Any, *tangents: Any) -> Any:
            raise refusal(name, advice, "forward mode (tangents, jvp) was asked for")

    def dispatch(keyset: Any, *args: Any) -> Any:
        recorded = torch.is_grad_enabled() and torch._C._any_requires_grad(*args)
        if torch._C._are_functorch_transforms_active() and (recorded or any(map(_is_transformed, args))):
            raise refusal(name, advice, "a transform of torch.func was asked for")
        if not recorded and forward_ad._current_level < 0:
            return below(keyset, *args)
        return FirstOrder.apply(keyset, [_anchor(x) for x in args if recorded and _is_recorded(x)], *args)

    return dispatch


def _is_recorded(x: Any) -> bool:
    return isinstance(x, Tensor) and x.requires_grad


def _is_transformed(x: Any) -> bool:
    return isinstance(x, Tensor) and torch._C._functorch.is_functorch_wrapped_tensor(x)


def _anchor(x: Tensor) -> Tensor:
    """An empty tensor that autograd leads to x from; it holds none of x's memory."""
    return (x if x.dim() else x[None])[:0].clone()


class _Refusing(torch.autograd.Function):
    """The identity of gradients (`count` of them), whose derivative raises. Further tensors are what they depend on."""

    @staticmethod
    def forward(ctx: Any, name: str, advice: str, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.name, ctx.advice = name, advice
        return tuple(x.view_as(x) for x in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Any:
        raise refusal(ctx.name, ctx.advice, "a second one (create_graph, a Hessian, a gradient penalty) was asked for")

    @staticmethod
    def jvp(ctx: Any, *_: Tensor) -> Any:
        raise refusal(ctx.name, ctx.advice, "forward mode over its gradient was asked for")


def _refusing(
    name: str, advice: str, found: tuple[Tensor | None, ...], reasons: list[Tensor | None]
) -> list[Tensor | None]:
    gradients = [x for x in found if x is not None]
    if not gradients:
        return list(found)
    refused = iter(_Refusing.apply(name, advice, len(gradients), *gradients, *(x for x in reasons if x is not None)))
    return [None if x is None else next(refused) for x in found]
