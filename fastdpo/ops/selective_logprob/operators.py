"""`torch.ops.fastdpo.selective_logprob`: log softmax(logits/T)[target] of logits (..., V) that exist already.

The forward reads the logits once and keeps two numbers per row, peak = max_v x_v and log Σ_v exp((x_v − peak)/T),
apart, as their sum would lose the digits of p where logits are large. The backward reads the logits once more and
writes dL/dlogits = grad/T·(1[v = y] − p_v) once, in their dtype: into new memory, or over the logits themselves for
`selective_logprob_inplace_backward`. Neither backward has a derivative (`ops.first_order`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastdpo.ops.registry import define


def check_logits(logits: Tensor, targets: Tensor) -> None:
    """Raise ValueError or TypeError where logits (..., V) and targets (...) do not fit."""
    if logits.dim() == 0 or logits.shape[:-1] != targets.shape:
        raise ValueError(
            f"logits {tuple(logits.shape)} need targets {tuple(logits.shape[:-1])}: {tuple(targets.shape)}."
        )
    if not logits.dtype.is_floating_point:
        raise TypeError(f"logits has dtype {logits.dtype}; it must be floating point.")
    if targets.dtype != torch.int64:
        raise TypeError(f"targets has dtype {targets.dtype}; it must be int64: targets.long().")
    if targets.device != logits.device:
        raise ValueError(f"targets is on {targets.device}, logits on {logits.device}; move one of them.")


def check_overwritable(logits: Tensor) -> None:
    """Raise ValueError where a backward that writes its gradient over the logits would destroy something else."""
    if not (logits.requires_grad and torch.is_grad_enabled()):
        return
    owner = logits if logits._base is None else logits._base
    if owner.is_leaf:
        raise ValueError(
            "inplace_backward=True would overwrite a leaf that requires a gradient; logits must be the output of a "
            "model. Use inplace_backward=False."
        )
    if _shares_memory(logits):
        raise ValueError(
            f"inplace_backward=True cannot write to logits that are expanded (strides {logits.stride()}): several "
            "elements share their memory. Use inplace_backward=False."
        )


def _shares_memory(x: Tensor) -> bool:
    """Whether elements of a strided view may overlap: a dimension steps no further than those below it reach."""
    reach = 0
    for stride, size in sorted(zip(x.stride(), x.shape, strict=True)):
        if size > 1 and stride <= reach:
            return True
        reach += stride * (size - 1)
    return False


def _fake_forward(
    logits: Tensor, targets: Tensor, ignore_index: int | None, temperature: float, backend: str
) -> tuple[Tensor, Tensor]:
    check_logits(logits, targets)
    logps = logits.new_empty(targets.shape, dtype=torch.promote_types(logits.dtype, torch.float32))
    return logps, logps.new_empty(2, *targets.shape)


def _fake_backward(
    grad: Tensor,
    logits: Tensor,
    targets: Tensor,
    normalizers: Tensor,
    ignore_index: int | None,
    temperature: float,
    backend: str,
) -> Tensor:
    return logits.new_empty(logits.shape)


def _fake_backward_(*args: Any) -> None:
    return None


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    logits, targets, *ctx.options = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(logits, targets, output[1])


def _backward(ctx: Any, grad: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return None, None, None, None, None
    logits, targets, normalizers = ctx.saved_tensors
    gradient = torch.ops.fastdpo.selective_logprob_backward(grad, logits, targets, normalizers, *ctx.options)
    return gradient, None, None, None, None


def _inplace_backward(ctx: Any, grad: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return None, None, None, None, None
    if torch._C._autograd._get_current_graph_task_keep_graph():
        raise RuntimeError(
            "inplace_backward=True overwrites the logits, so its graph cannot be kept for another backward: leave out "
            "retain_graph and create_graph, or use inplace_backward=False."
        )
    logits, targets, normalizers = ctx.saved_tensors
    # Without its history, but with its version counter: whoever saved these logits too is told that they changed
    logits = logits.detach()
    torch.ops.fastdpo.selective_logprob_backward_(grad, logits, targets, normalizers, *ctx.options)
    return logits, None, None, None, None


_OPTIONS = "int? ignore_index, float temperature, str backend"


def _implementations(function: str) -> dict[str, str]:
    return {name: f"fastdpo.ops.selective_logprob.backend_{name}:{function}" for name in ("torch", "triton")}


define(
    "selective_logprob_backward",
    f"(Tensor grad, Tensor logits, Tensor targets, Tensor normalizers, {_OPTIONS}) -> Tensor",
    _fake_backward,
    _implementations("backward"),
)
define(
    "selective_logprob_backward_",
    f"(Tensor grad, Tensor(a!) logits, Tensor targets, Tensor normalizers, {_OPTIONS}) -> ()",
    _fake_backward_,
    _implementations("backward_"),
)
selective_logprob = define(
    "selective_logprob",
    f"(Tensor logits, Tensor targets, {_OPTIONS}) -> (Tensor, Tensor)",
    _fake_forward,
    _implementations("forward"),
    backward=_backward,
    setup_context=_setup_context,
)
selective_logprob_inplace_backward = define(
    "selective_logprob_inplace_backward",
    f"(Tensor logits, Tensor targets, {_OPTIONS}) -> (Tensor, Tensor)",
    _fake_forward,
    _implementations("forward"),
    backward=_inplace_backward,
    setup_context=_setup_context,
    oracle="selective_logprob",
)
