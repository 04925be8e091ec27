"""The loops over tiles: log-probs with the unit gradient, and the gradients of a trainable head.

One loop serves every backend: the GEMMs are PyTorch's, and a *fold* (`fold_torch`, `fold_triton`) does the rest. GEMMs
of 2·N·H·V FLOPs: 1 for log-probs, 2 with the unit gradient; 1 + (hidden) + (weight) for the recomputed gradients.
Memory above inputs and outputs: the tile, as many bytes again for a softcap or an entropy, the slice of a weight that
must be converted, and R × H of the rows at work where they cannot be used in place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

from fastdpo.ops.linear_logprob.head import Head
from fastdpo.ops.linear_logprob.row_sums import RowSums
from fastdpo.ops.linear_logprob.tiles import TilePlan, plan_tiles


class Fold(Protocol):
    """What the loops ask of a backend; `fold_torch.TorchFold` says what each of them does."""

    def absorb(self, tile: Tensor, first_column: int, *, operand: bool) -> Tensor | None: ...
    def rescale_(self, accumulator: Tensor) -> None: ...
    def sums(self) -> RowSums: ...
    def finish_gradient_(self, accumulator: Tensor) -> None: ...
    def logit_gradient(self, tile: Tensor, first_column: int, lse: Tensor, logps: Tensor, grad: Tensor) -> Tensor: ...


MakeFold = Callable[[Head, Tensor, Sequence[str]], Fold]


class _Tiles:
    """The plan for a head and the one buffer that its tiles use."""

    def __init__(self, head: Head, rows: int, workspace: int) -> None:
        self.head = head
        vocab, hidden = head.weight.shape
        item = head.operand_dtype.itemsize
        self.plan: TilePlan = plan_tiles(rows, vocab, hidden, head.weight.device, itemsize=item, workspace=workspace)
        size = self.plan.rows * self.plan.columns
        self.buffer = torch.empty(size, dtype=head.accumulate_dtype, device=head.weight.device)

    def raw(self, hidden: Tensor, weight: Tensor) -> Tensor:
        """hidden (R, H) @ weight (C, H)ᵀ in the buffer, (R, C)."""
        tile = self.buffer[: len(hidden) * len(weight)].view(len(hidden), len(weight))
        self.head.matmul(hidden, weight.t(), tile)
        return tile


def _chunks(scored: Tensor | None, total: int, size: int) -> Iterator[slice | Tensor]:
    """Indices of at most `size` scored rows at a time: slices where every row is scored (None)."""
    if scored is None:
        yield from (slice(start, min(start + size, total)) for start in range(0, total, size))
    else:
        yield from scored.split(size)


def forward(
    make_fold: MakeFold,
    head: Head,
    hidden: Tensor,
    targets: Tensor,
    scored: Tensor | None,
    unit_gradient: bool,
    stats: Sequence[str],
    workspace: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log-probs of the targets, and with `unit_gradient` their derivatives with respect to the hidden states.

    Args:
        hidden: (N, H).
        targets: (N,).
        scored: indices of the rows to score, None for all. The others get zeros and reach no GEMM.
        workspace: bytes that a GPU's tile may take.

    Returns:
        logps (N,); log-normalizers (N,); unit gradient (N, H) in hidden's dtype, or (0,); statistics (len(stats), N).
    """
    logps = torch.zeros(len(targets), dtype=head.accumulate_dtype, device=hidden.device)
    lse, values = torch.zeros_like(logps), logps.new_zeros(len(stats), len(targets))
    gradient = hidden.new_empty(0)
    if unit_gradient:
        gradient = hidden.new_empty(hidden.shape) if scored is None else hidden.new_zeros(hidden.shape)
    count = len(targets) if scored is None else len(scored)
    if count == 0:
        return logps, lse, gradient, values
    tiles = _Tiles(head, count, workspace)
    in_place = scored is None and gradient.dtype == head.accumulate_dtype
    buffer = logps.new_empty(tiles.plan.rows if unit_gradient and not in_place else 0, hidden.shape[1])
    for rows in _chunks(scored, len(targets), tiles.plan.rows):
        inputs = head.operand(hidden[rows])
        fold = make_fold(head, targets[rows], stats)
        accumulator = gradient[rows] if in_place else buffer[: len(inputs)]
        for first, weight in head.slices(tiles.plan):
            operand = fold.absorb(tiles.raw(inputs, weight), first, operand=unit_gradient)
            if operand is None:
                continue
            if first == 0:
                head.matmul(operand, weight, accumulator)
            else:
                fold.rescale_(accumulator)
                head.matmul_add(operand, weight, accumulator)
        if unit_gradient:
            fold.finish_gradient_(accumulator)
            if not in_place:
                gradient[rows] = accumulator.to(gradient.dtype)
        sums = fold.sums()
        logps[rows], lse[rows] = sums.logps(), sums.log_normalizers()
        for i, name in enumerate(stats):
            values[i, rows] = sums.statistic(name, targets[rows], len(head.weight))
    return logps, lse, gradient, values


def backward(
    make_fold: MakeFold,
    head: Head,
    hidden: Tensor,
    targets: Tensor,
    scored: Tensor | None,
    lse: Tensor,
    logps: Tensor,
    grad: Tensor,
    needs: Sequence[bool],
    workspace: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of Σ grad·logps by recomputing the tiles; those not in `needs` are (0,).

    Args:
        lse, logps: (N,), as `forward` gave them.
        grad: (N,), dL/dlogp.
        needs: whether hidden, weight and bias need theirs.

    Returns:
        (N, H), (V, H), (V,), each in its tensor's dtype; sums are kept in `accumulate_dtype`.
    """
    of_hidden, of_weight, of_bias = needs
    rows = slice(None) if scored is None else scored
    inputs, targets = head.operand(hidden[rows]), targets[rows]
    lse, logps, grad = lse[rows], logps[rows], grad[rows].contiguous()  # grad may be expanded
    weight, bias = head.weight, head.bias
    grad_inputs = lse.new_empty(inputs.shape if of_hidden else 0)
    if len(targets) == 0:
        return hidden.new_zeros(hidden.shape if of_hidden else 0), *_no_gradients(weight, bias, of_weight, of_bias)
    grad_weight = weight.new_empty(weight.shape if of_weight else 0)
    grad_bias = weight.new_empty(0) if bias is None or not of_bias else bias.new_empty(bias.shape)
    tiles = _Tiles(head, len(targets), workspace)
    chunks = list(_chunks(None, len(targets), tiles.plan.rows))
    for first, part in head.slices(tiles.plan):
        columns = slice(first, first + len(part))
        of_part = lse.new_empty(part.shape if of_weight else 0)
        of_columns: Tensor | None = None
        for i, chunk in enumerate(chunks):
            fold = make_fold(head, targets[chunk], ())
            raw = tiles.raw(inputs[chunk], part)
            logit_gradient = fold.logit_gradient(raw, first, lse[chunk], logps[chunk], grad[chunk])
            if of_hidden:
                (head.matmul if first == 0 else head.matmul_add)(logit_gradient, part, grad_inputs[chunk])
            if of_weight:
                (head.matmul if i == 0 else head.matmul_add)(logit_gradient.t(), inputs[chunk], of_part)
            if of_bias:
                summed = logit_gradient.sum(0, dtype=lse.dtype)
                of_columns = summed if of_columns is None else of_columns.add_(summed)
        if of_weight:
            grad_weight[columns] = of_part.to(weight.dtype)
        if of_columns is not None:
            grad_bias[columns] = of_columns.to(grad_bias.dtype)
    if not of_hidden:
        return hidden.new_empty(0), grad_weight, grad_bias
    if scored is None:
        return grad_inputs.to(hidden.dtype), grad_weight, grad_bias
    return hidden.new_zeros(hidden.shape).index_copy_(0, scored, grad_inputs.to(hidden.dtype)), grad_weight, grad_bias


def _no_gradients(weight: Tensor, bias: Tensor | None, of_weight: bool, of_bias: bool) -> tuple[Tensor, Tensor]:
    """Zeros in the shapes that are asked for: no row is scored."""
    of_no_bias = bias is None or not of_bias
    return weight.new_zeros(weight.shape if of_weight else 0), weight.new_zeros(0 if of_no_bias else len(weight))
