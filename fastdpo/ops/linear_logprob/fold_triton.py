"""The fold of `fold_torch`, by Triton kernels: a tile is read once and written once."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from fastdpo.ops.linear_logprob.head import Head
from fastdpo.ops.linear_logprob.row_sums import RowSums
from fastdpo_kernels.linear_logprob.fold import RowState, fold_
from fastdpo_kernels.linear_logprob.logit_gradient import logit_gradient_
from fastdpo_kernels.linear_logprob.unit_gradient import finish_unit_gradient_, rescale_rows_


class TritonFold:
    """The statistics of R rows over the vocabulary slices seen so far, in `linear_logprob.fold.RowState`."""

    def __init__(self, head: Head, targets: Tensor, stats: Sequence[str] = ()) -> None:
        self.head, self.targets, self.stats = head, targets, stats
        self.scales = {"logit_scale": head.logit_scale, "temperature": head.temperature}
        self.narrow: Tensor | None = None

    @functools.cached_property
    def state(self) -> RowState:
        """Made with the first tile: gradients of the logits need none."""
        return RowState.fresh(len(self.targets), self.targets.device, self.stats)

    def absorb(self, tile: Tensor, first_column: int, *, operand: bool) -> Tensor | None:
        out = self._operand_buffer(tile) if operand else None
        fold_(
            tile, out, self.targets, self.head.bias, first_column, self.state, softcap=self.head.softcap, **self.scales
        )
        return out

    def rescale_(self, accumulator: Tensor) -> None:
        rescale_rows_(accumulator, self.state.rescale)

    def sums(self) -> RowSums:
        state = self.state
        return RowSums(
            state.peak,
            state.others,
            state.target_logit,
            state.weighted_sum,
            state.logit_sum,
            state.square_sum,
            state.best_index,
        )

    def finish_gradient_(self, accumulator: Tensor) -> None:
        finish_unit_gradient_(accumulator, self.head.weight, self.targets, self.state, **self.scales)

    def logit_gradient(self, tile: Tensor, first_column: int, lse: Tensor, logps: Tensor, grad: Tensor) -> Tensor:
        out = self._operand_buffer(tile)
        logit_gradient_(
            tile,
            out,
            self.targets,
            self.head.bias,
            first_column,
            lse,
            logps,
            grad,
            vocab_size=len(self.head.weight),
            softcap=self.head.softcap,
            **self.scales,
        )
        return out

    def _operand_buffer(self, tile: Tensor) -> Tensor:
        """Where the operand goes: the tile itself, or one buffer in the GEMM's narrower dtype."""
        if tile.dtype == self.head.operand_dtype:
            return tile
        if self.narrow is None:
            self.narrow = torch.empty_like(tile, dtype=self.head.operand_dtype)
        return self.narrow.flatten()[: tile.numel()].view(tile.shape)
