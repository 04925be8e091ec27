"""The processes that a run is spread over, and what they agree on.

Every method is a collective: all ranks call it at the same place. A single process answers for itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """index: of this process. count: of all. device: where this one's tensors are."""

    index: int
    count: int
    device: torch.device

    def largest(self, value: int) -> int:
        """The largest of the ranks' values, so that all of them decide alike."""
        if self.count == 1:
            return value
        held = torch.tensor(value, device=self.device)
        dist.all_reduce(held, op=dist.ReduceOp.MAX)
        return int(held)

    def gathered(self, rows: Tensor) -> Tensor:
        """Every rank's (B, ...) in one (ranks·B, ...), in their order."""
        if self.count == 1:
            return rows
        rows = rows.contiguous()  # or the parts would take over its strides
        parts = [torch.empty_like(rows) for _ in range(self.count)]
        dist.all_gather(parts, rows)
        return torch.cat(parts)

    def gathered_objects(self, value: T) -> list[T]:
        """Every rank's value, in their order; pickled on the way."""
        if self.count == 1:
            return [value]
        found: list[Any] = [None] * self.count
        dist.all_gather_object(found, value)
        return found

    def of_first(self, value: T) -> T:
        """The first rank's value."""
        if self.count == 1:
            return value
        found: list[Any] = [value]
        dist.broadcast_object_list(found)
        return found[0]

    def by_first(self, work: Callable[[], T] | None) -> T:
        """What the first rank's `work` gives, on all ranks; an error of its is raised on all of them. Others pass
        None."""
        result: tuple[Any, Exception | None] = (None, None)
        if work is not None:
            try:
                result = work(), None
            except BaseException as error:  # whatever it is, the others wait to hear of it
                plain = isinstance(error, ValueError) or type(error) is OSError
                self.of_first((None, error if plain else RuntimeError(f"rank 0: {type(error).__name__}: {error}")))
                raise
        value, failed = self.of_first(result)
        if failed is not None:
            raise failed
        return value

    def sum_(self, tensors: Sequence[Tensor]) -> None:
        """Sum each of the tensors, of one dtype, over the ranks in place; one all-reduce for all of them."""
        if self.count > 1 and tensors:
            flat = torch.cat([tensor.flatten() for tensor in tensors])
            dist.all_reduce(flat)
            for tensor, summed in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
                tensor.copy_(summed.view_as(tensor))

    def wait(self) -> None:
        """Until all are here."""
        if self.count > 1:
            dist.barrier()
