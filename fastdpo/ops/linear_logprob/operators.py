"""`torch.ops.fastdpo.linear_logprob`: the head's log-probs, and its two backwards.

A frozen head: d logp_t/d h_t depends on no loss, so the forward computes it while a tile is in the cache (two GEMMs in
all) and the backward scales each row by dL/dlogp_t. A trainable weight or bias: the backward recomputes the tiles, and
computes only the gradients that are needed. Neither backward has a derivative (`ops.first_order`).

`unit_gradient` asks for the first of these; `disposable` says that the caller drops that output, so that the backward
may write its result there instead of holding N × H twice. `workspace` bounds the bytes of a GPU's buffer.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastdpo.ops.registry import define

#: Rows that are scaled at a time on a CPU, which copies them in the wider dtype where the dtypes differ.
SCALE_ROWS = 256
_Outputs = tuple[Tensor, Tensor, Tensor, Tensor]
_HEAD = (
    "Tensor hidden, Tensor weight, Tensor? bias, Tensor targets, int? ignore_index, float logit_scale, "
    "float temperature, float? softcap, ScalarType gemm_dtype"
)


def check_head_tensors(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> None:
    """Raise ValueError or TypeError where hidden (..., H), weight (V, H), bias (V,) and targets (...) do not fit."""
    if weight.dim() != 2 or hidden.shape[:-1] != targets.shape or hidden.shape[-1:] != weight.shape[-1:]:
        raise ValueError(
            "hidden (..., H), weight (V, H) and targets (...) do not fit: "
            f"{tuple(hidden.shape)}, {tuple(weight.shape)}, {tuple(targets.shape)}."
        )
    if weight.numel() == 0:
        raise ValueError(f"weight has shape {tuple(weight.shape)}; a head needs at least one token and one unit.")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias has shape {tuple(bias.shape)}; a weight of {tuple(weight.shape)} needs (V,).")
    for name, tensor in (("hidden", hidden), ("weight", weight), ("bias", bias)):
        if tensor is not None and not tensor.dtype.is_floating_point:
            raise TypeError(f"{name} has dtype {tensor.dtype}; it must be floating point (dequantise a packed head).")
        if tensor is not None and tensor.device != hidden.device:
            raise ValueError(f"{name} is on {tensor.device}, hidden on {hidden.device}; move one of them.")
    check_target_tensor(targets, hidden.device, "hidden")


def check_target_tensor(targets: Tensor, device: torch.device, beside: str) -> None:
    """Raise TypeError or ValueError unless `targets` is int64 and on `device`, where `beside` is."""
    if targets.dtype != torch.int64:
        raise TypeError(f"targets has dtype {targets.dtype}; it must be int64: targets.long().")
    if targets.device != device:
        raise ValueError(f"targets is on {targets.device}, {beside} on {device}; move one of them.")


def _fake_forward(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, *options: Any) -> _Outputs:
    *_, gemm_dtype, unit_gradient, _, stats, _, _ = options
    check_head_tensors(hidden, weight, bias, targets)
    logps = hidden.new_empty(targets.shape, dtype=torch.promote_types(gemm_dtype, torch.float32))
    gradient = hidden.new_empty(hidden.shape if unit_gradient else 0)
    return logps, torch.empty_like(logps), gradient, logps.new_empty(len(stats), *targets.shape)


def _fake_backward(
    grad: Tensor,
    lse: Tensor,
    logps: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    *options: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    *_, (of_hidden, of_weight, of_bias), _, _ = options
    return (
        hidden.new_empty(hidden.shape if of_hidden else 0),
        weight.new_empty(weight.shape if of_weight else 0),
        weight.new_empty(0) if bias is None or not of_bias else bias.new_empty(bias.shape),
    )


def _fake_scale(unit_gradient: Tensor, grad: Tensor, backend: str) -> Tensor:
    return torch.empty_like(unit_gradient)


def scale_rows(unit_gradient: Tensor, grad: Tensor) -> Tensor:
    """unit_gradient (N, H) times grad (N,), in unit_gradient's dtype, rounded once."""
    return scale_rows_(unit_gradient.clone(), grad)


def scale_rows_(unit_gradient: Tensor, grad: Tensor) -> Tensor:
    """`scale_rows` in place."""
    for rows, factors in zip(unit_gradient.split(SCALE_ROWS), grad.split(SCALE_ROWS), strict=True):
        rows.mul_(factors.unsqueeze(1))
    return unit_gradient


def scale_rows_at_once(unit_gradient: Tensor, grad: Tensor) -> Tensor:
    """`scale_rows` in one launch."""
    return torch.mul(unit_gradient, grad.unsqueeze(1), out=torch.empty_like(unit_gradient))


def scale_rows_at_once_(unit_gradient: Tensor, grad: Tensor) -> Tensor:
    """`scale_rows_` in one launch."""
    return unit_gradient.mul_(grad.unsqueeze(1))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: _Outputs) -> None:
    hidden, weight, bias, targets, *options, unit_gradient, disposable, _, workspace, backend = inputs
    logps, lse, gradient, values = output
    ctx.mark_non_differentiable(lse, gradient, values)
    ctx.set_materialize_grads(False)
    ctx.options, ctx.unit_gradient, ctx.disposable = options, unit_gradient, disposable
    ctx.workspace, ctx.backend = workspace, backend
    # The caller may write into the log-probs that it got
    ctx.save_for_backward(
        *((gradient, targets) if unit_gradient else (lse, logps.clone(), hidden, weight, bias, targets))
    )


def _backward(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    nothing = (None,) * 11
    if grad is None:
        return None, None, None, *nothing
    if not ctx.unit_gradient:
        needs = list(ctx.needs_input_grad[:3])
        lse, logps, *tensors = ctx.saved_tensors
        found = torch.ops.fastdpo.linear_logprob_backward(
            grad, lse, logps, *tensors, *ctx.options, needs, ctx.workspace, ctx.backend
        )
        return *(x if needed else None for x, needed in zip(found, needs, strict=True)), *nothing
    gradient, targets = ctx.saved_tensors
    ignore_index = ctx.options[0]
    if ignore_index is not None:
        grad = grad.masked_fill(targets == ignore_index, 0.0)
    if ctx.disposable and _is_plain(grad) and _is_freed_afterwards(gradient):
        scale = scale_rows_ if ctx.backend == "torch" else scale_rows_at_once_
        return scale(gradient, grad), None, None, *nothing
    return torch.ops.fastdpo.linear_logprob_scale(gradient, grad, ctx.backend), None, None, *nothing


def _is_freed_afterwards(saved: Tensor) -> bool:
    """Whether nobody can ask for a saved tensor again, so that its memory may take the result.

    Not if the graph is kept, nor if the backward is traced.
    """
    return _is_plain(saved) and not torch._C._autograd._get_current_graph_task_keep_graph()


def _is_plain(x: Tensor) -> bool:
    """Whether x is neither a tracer's, which are of a subclass, nor a batch of vmap's, which stands for its parts."""
    return type(x) is Tensor and torch._C._has_storage(x)


_BACKENDS = "fastdpo.ops.linear_logprob.backends"

define(
    "linear_logprob_scale",
    "(Tensor unit_gradient, Tensor grad, str backend) -> Tensor",
    _fake_scale,
    {
        "torch": "fastdpo.ops.linear_logprob.operators:scale_rows",
        "triton": "fastdpo.ops.linear_logprob.operators:scale_rows_at_once",
    },
)
define(
    "linear_logprob_backward",
    f"(Tensor grad, Tensor lse, Tensor logps, {_HEAD}, bool[] needs, int workspace, str backend) "
    "-> (Tensor, Tensor, Tensor)",
    _fake_backward,
    {"torch": f"{_BACKENDS}:torch_backward", "triton": f"{_BACKENDS}:triton_backward"},
)
linear_logprob = define(
    "linear_logprob",
    f"({_HEAD}, bool unit_gradient, bool disposable, str[] stats, int workspace, str backend) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    _fake_forward,
    {"torch": f"{_BACKENDS}:torch_forward", "triton": f"{_BACKENDS}:triton_forward"},
    backward=_backward,
    setup_context=_setup_context,
)
