"""Folding tiles of raw logits h·W_v into per-row statistics, and turning them into a GEMM's operand, in PyTorch.

Per row: peak, the value that exponentials refer to; others = Σ_v≠y exp(z_v − peak); the target's logit. The peak starts
at 0 and moves only where a slice's maximum is more than `rise` away: exp then stays far from overflow, fp32 keeps its
relative precision at any level, and the usual tile needs no pass for a subtraction. A tile is passed over three times:
maximum, exponential, sum.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fastdpo.ops.linear_logprob.head import Head
from fastdpo.ops.linear_logprob.row_sums import RowSums

#: How far a row's maximum may be from its peak: e^±40 leaves room for sums and products in fp32 and bf16.
RISE = 40.0
#: Squares of exponentials need twice the room.
RISE_SQUARED = 20.0
#: fp16 operands end at 65504 = e^11.
RISE_HALF = 8.0
#: Rows of target weights that are gathered at a time.
GATHER_ROWS = 128


class TorchFold:
    """The statistics of R rows over the vocabulary slices seen so far.

    Args:
        targets: (R,) int64; a row whose target lies in no slice gets the log-prob NaN.
        stats: which optional sums to keep.
    """

    def __init__(self, head: Head, targets: Tensor, stats: Sequence[str] = ()) -> None:
        self.head, self.targets, self.stats = head, targets, tuple(stats)
        self.slope = head.logit_scale / head.temperature
        self.rise = RISE_SQUARED if "log_sum_sq_probs" in stats else RISE
        if head.operand_dtype == torch.float16:
            self.rise = RISE_HALF
        self.rows = torch.arange(len(targets), device=targets.device)
        zeros = torch.zeros(len(targets), device=targets.device, dtype=head.accumulate_dtype)
        self.peak, self.others = zeros, zeros.clone()
        self.target_logit = torch.full_like(zeros, math.nan)
        #: 1 − tanh² at the target.
        self.target_damping = torch.ones_like(zeros)
        self.logits, self.weighted, self.squares = zeros.clone(), zeros.clone(), zeros.clone()
        self.top, self.top_index = torch.full_like(zeros, -math.inf), torch.full_like(targets, -1)
        self.rescale: Tensor | None = None
        self.shifted = False
        self.scratch: dict[str, Tensor] = {}

    def absorb(self, tile: Tensor, first_column: int, *, operand: bool) -> Tensor | None:
        """Fold the raw logits (R, C) of the columns from `first_column` on; the tile is overwritten.

        Returns, if asked for, the operand e^(z − peak)·(1 − tanh²) (R, C), 0 at the targets: their share is added in
        full precision by `finish_gradient_`.
        """
        tanh = self._to_logits_(tile, first_column)
        inside, column = self._find_targets(first_column, tile.shape[1])
        self.target_logit = torch.where(inside, tile[self.rows, column], self.target_logit)
        if tanh is not None:
            self.target_damping = torch.where(inside, 1.0 - tanh[self.rows, column] ** 2, self.target_damping)
        top = self._update_top(tile, first_column)
        self._move_peak(top)
        if "mean_logits" in self.stats:
            self.logits += tile.sum(1)
        if self.shifted:
            tile.sub_(self.peak.unsqueeze(1))
        if "entropy" in self.stats:
            exps = torch.exp(tile, out=self._like(tile, "exps"))
            exps[self.rows, column] = torch.where(inside, 0.0, exps[self.rows, column])
            self.weighted += torch.linalg.vecdot(exps, tile)
        tile.exp_()
        tile[self.rows, column] = torch.where(inside, 0.0, tile[self.rows, column])
        if "log_sum_sq_probs" in self.stats:
            self.squares += torch.linalg.vecdot(tile, tile)
        self.others += tile.sum(1)
        if not operand:
            return None
        if tanh is not None:
            tile.mul_(_damping_(tanh))
        return tile.to(self.head.operand_dtype)

    def rescale_(self, accumulator: Tensor) -> None:
        """Bring an accumulator (R, H) of earlier slices to the present peak."""
        if self.rescale is not None:
            accumulator.mul_(self.rescale.unsqueeze(1))

    def sums(self) -> RowSums:
        """What was accumulated."""
        return RowSums(
            self.peak, self.others, self.target_logit, self.weighted, self.logits, self.squares, self.top_index
        )

    def finish_gradient_(self, accumulator: Tensor) -> None:
        """From Σ_v≠y e^(z_v − peak)·(1 − tanh²)·W_v to the unit gradient, in place in the accumulator (R, H).

        g = s·[(1 − p_y)·(1 − tanh_y²)·W_y − Σ_v≠y p_v·(1 − tanh_v²)·W_v], s = logit_scale/temperature.
        """
        sums = self.sums()
        accumulator.mul_((-self.slope / sums.total()).unsqueeze(1))
        share = sums.one_minus_p() * self.target_damping * self.slope
        # A target outside the vocabulary has a NaN share, and must not be read
        targets = self.targets.clamp(0, len(self.head.weight) - 1)
        for start in range(0, len(targets), GATHER_ROWS):
            rows = slice(start, start + GATHER_ROWS)
            weights = self.head.operand(self.head.weight[targets[rows]]).to(accumulator.dtype)
            accumulator[rows] += weights * share[rows].unsqueeze(1)

    def logit_gradient(self, tile: Tensor, first_column: int, lse: Tensor, logps: Tensor, grad: Tensor) -> Tensor:
        """From raw logits (R, C) to dL/dx = grad·(1[v = y] − p_v)·dz_v/dx_v as an operand; the tile is overwritten.

        Args:
            lse, logps: (R,), log Σ exp(z) and log p_y of the forward.
            grad: (R,), dL/dlogp.
        """
        tanh = self._to_logits_(tile, first_column)
        inside, column = self._find_targets(first_column, tile.shape[1])
        tile.sub_(lse.unsqueeze(1)).exp_().neg_()
        # 1 − p_y from log p_y, which has its digits where p_y is nearly 1
        tile[self.rows, column] = torch.where(inside, -torch.expm1(logps), tile[self.rows, column])
        tile.mul_((grad * self.slope).unsqueeze(1))
        if tanh is not None:
            tile.mul_(_damping_(tanh))
        return tile.to(self.head.operand_dtype)

    def _to_logits_(self, tile: Tensor, first_column: int) -> Tensor | None:
        """Raw logits to final ones, in place; returns the tanh where there is a cap."""
        head = self.head
        if head.bias is not None:
            tile.add_(head.bias[first_column : first_column + tile.shape[1]].to(tile.dtype))
        if head.softcap is None:
            if self.slope != 1.0:
                tile.mul_(self.slope)
            return None
        tile.mul_(head.logit_scale / head.softcap)
        tanh = torch.tanh(tile, out=self._like(tile, "tanh"))
        torch.mul(tanh, head.softcap / head.temperature, out=tile)
        return tanh

    def _find_targets(self, first_column: int, columns: int) -> tuple[Tensor, Tensor]:
        """Which rows have their target among these columns, and in which (a valid one for the others too)."""
        column = self.targets - first_column
        return (column >= 0) & (column < columns), column.clamp(0, columns - 1)

    def _update_top(self, tile: Tensor, first_column: int) -> Tensor:
        """The slice's maximum of every row; where is_top1 is asked for, its index too, the first of equal ones."""
        if "is_top1" not in self.stats:
            return tile.amax(1)
        index = tile.argmax(1)
        top = tile[self.rows, index]
        better = top > self.top
        self.top = torch.where(better, top, self.top)
        self.top_index = torch.where(better, index + first_column, self.top_index)
        return top

    def _move_peak(self, top: Tensor) -> None:
        # Before anything was summed, a peak far above is as wrong as one far below
        empty = self.others == 0.0
        distance = torch.where(empty, (top - self.peak).abs(), top - self.peak)
        # An infinite maximum is no reference: e^(inf − inf) is NaN where the sum itself is only infinite or zero
        move = (distance > self.rise) & top.isfinite()
        self.rescale = None
        # On a CPU a look at the numbers is free, and saves passes that they turn out not to need
        if move.device.type == "cpu" and not bool(move.any()):
            return
        moved = torch.where(move, top, self.peak)
        self.rescale = torch.where(empty, 1.0, torch.exp(self.peak - moved))
        self.weighted = self.rescale * (self.weighted + torch.where(empty, 0.0, self.peak - moved) * self.others)
        self.squares = self.rescale**2 * self.squares
        self.others = self.rescale * self.others
        self.peak, self.shifted = moved, True

    def _like(self, tile: Tensor, name: str) -> Tensor:
        """A buffer of the tile's shape, the same one for every slice."""
        if name not in self.scratch:
            self.scratch[name] = torch.empty_like(tile)
        return self.scratch[name].flatten()[: tile.numel()].view(tile.shape)


def _damping_(tanh: Tensor) -> Tensor:
    """1 − tanh², in place."""
    return tanh.square_().neg_().add_(1.0)
