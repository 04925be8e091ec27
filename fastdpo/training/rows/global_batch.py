"""The batch of all ranks: every rank's examples in one order, rank by rank."""

from __future__ import annotations

from torch import Tensor, nn

from fastdpo.training.ranks import Ranks


class GlobalBatch:
    """This rank's window on the batch of all ranks, rank by rank, without the wrapped duplicates at its end.

    size: examples of each rank. real: examples of the whole that are no duplicates.
    """

    def __init__(self, size: int, ranks: Ranks, real: int) -> None:
        self.size, self.ranks, self.real = size, ranks, real
        self.offset = ranks.index * size

    @property
    def own_real(self) -> int:
        """How many of this rank's examples are real."""
        return max(0, min(self.size, self.real - self.offset))

    def gathered(self, rows: Tensor) -> Tensor:
        """Every rank's (B, ...), a copy, real examples only."""
        return self.ranks.gathered(rows)[: self.real].clone()

    def own(self, values: Tensor) -> Tensor:
        """This rank's slice (..., B) of the whole batch's, with zeros for its wrapped duplicates."""
        return nn.functional.pad(values[..., self.offset : self.offset + self.own_real], (0, self.size - self.own_real))

    def own_kept(self, keep: Tensor | None) -> list[int]:
        """Positions in this rank's batch of the real examples that are kept. Waits for `keep`, where there is one."""
        if keep is None:
            return list(range(self.own_real))
        own = keep[self.offset : self.offset + self.own_real].tolist()
        return [index for index, kept in enumerate(own) if kept]
