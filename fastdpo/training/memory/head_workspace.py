"""Bytes that `linear_logprob` takes within itself, which `counting.LiveBytes` cannot see: by device, from the plans.

In go the operator's own arguments, so that the functions can be named to `LiveBytes` as they are; out come bytes.
Read by the memory trial of a run and by `fastdpo estimate`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor

from fastdpo.ops.linear_logprob.tiles import (
    GPU_COLUMNS,
    MAX_CACHE,
    MAX_COLUMNS,
    MAX_ROWS,
    TILE_SHARE,
    plan_fused,
    plan_gpu_tiles,
)

#: Where `linear_logprob`'s `unit_gradient` stands among its arguments, behind hidden, weight and bias.
_UNIT_GRADIENT = 6


def cpu_head_workspace(hidden: Tensor, weight: Tensor, bias: Tensor | None, *options: Any) -> int:
    """What `linear_logprob` takes within itself on a CPU: the tile, its copy as the GEMM's operand where the dtype is
    another one, and the rows at work. The tile's size is the planner's upper bound, as the cache is not known."""
    item, rows = weight.element_size(), min(len(hidden), MAX_ROWS)
    columns = min(MAX_COLUMNS, len(weight))
    tile = min(4 * rows * columns, int(MAX_CACHE * TILE_SHARE))
    converted = 0 if item == 4 else tile * item // 4 + 4 * rows * hidden.shape[1]
    return tile + converted


def gpu_head_workspace(hidden: Tensor, weight: Tensor, bias: Tensor | None, *options: Any, workspace: int) -> int:
    """The same on a GPU, for a workspace of so many bytes: exponentials of a chunk, accumulator and partial sums of the
    fused product, without a gradient the sums alone; for float32 a tile of the separate fold.

    options: of the operator; without them, those of a policy's pass.
    """
    rows, (vocab, width), item = len(hidden), weight.shape, min(hidden.element_size(), weight.element_size())
    if item == 4:
        return plan_gpu_tiles(rows, vocab, newer=True, itemsize=item, workspace=workspace).bytes()
    unit_gradient = bool(options[_UNIT_GRADIENT]) if options else True
    plan = plan_fused(rows, vocab, item, workspace, unit_gradient=unit_gradient)
    return plan.bytes(vocab, width, item, unit_gradient=unit_gradient)


def forward_options(unit_gradient: bool) -> tuple[Any, ...]:
    """Options of the operator as far as they are read here, for who plans without calling it."""
    return (*[None] * _UNIT_GRADIENT, unit_gradient)


def trained_head_workspace(
    head: Callable[..., int], grad: Tensor, lse: Tensor, logps: Tensor, hidden: Tensor, weight: Tensor, *options: Any
) -> int:
    """A trained head's backward: no more than a forward's workspace for its tiles, and the float32 sums of the hidden
    states' gradient and of one slice of the weight's."""
    return head(hidden, weight, None) + 4 * (hidden.numel() + min(GPU_COLUMNS, len(weight)) * weight.shape[1])


def head_workspace_of(*, on_gpu: bool, workspace: int) -> Callable[..., int]:
    """The function of the two above that serves a device."""
    return partial(gpu_head_workspace, workspace=workspace) if on_gpu else cpu_head_workspace
