"""The batch of all ranks: every rank's pairs in one order, rank by rank."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastdpo.training.objective import Coefficients
from fastdpo.training.rows.batch import TokenBatch
from fastdpo.training.scoring.scorer import PairScores


class GlobalBatch:
    """This rank's window on the batch of all ranks, rank by rank, without the wrapped duplicates at its end."""

    def __init__(self, batch: TokenBatch, rank: int, world_size: int, real: int) -> None:
        self.size, self.world_size, self.real = len(batch), world_size, real
        self.offset = rank * self.size

    @property
    def own_real(self) -> int:
        """How many of this rank's pairs are real."""
        return max(0, min(self.size, self.real - self.offset))

    def gather(self, scores: PairScores) -> PairScores:
        """Every rank's scores, a copy, real pairs only."""
        table = scores.stack()
        if self.world_size > 1:
            parts = [torch.empty_like(table) for _ in range(self.world_size)]
            dist.all_gather(parts, table.contiguous())
            table = torch.cat(parts)
        return PairScores.unstack(table[: self.real].clone())

    def own(self, coefficients: Coefficients) -> Coefficients:
        """This rank's slice, with zeros for its wrapped duplicates."""
        stop = self.offset + self.own_real

        def slice_of(values: Tensor) -> Tensor:
            return nn.functional.pad(values[self.offset : stop], (0, self.size - self.own_real))

        return Coefficients(
            *(slice_of(v) for v in (coefficients.chosen, coefficients.rejected, coefficients.chosen_sums))
        )

    def own_kept(self, keep: Tensor | None) -> list[int]:
        """Positions in this rank's batch of the real pairs that are kept. Waits for `keep`, where there is one."""
        if keep is None:
            return list(range(self.own_real))
        own = keep[self.offset : self.offset + self.own_real].tolist()
        return [index for index, kept in enumerate(own) if kept]
