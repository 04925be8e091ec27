"""The batch of pairs that the algorithm sees, and the micro-batches that memory allows.

A batch holds B pairs as ragged token ids, on the host. `TokenBatch.cut` splits any subset of them into micro-batches of
at most `budget` tokens, in the rows that `training.rows.layout` makes. Nothing that is computed from a batch may
depend on the cut or on the layout.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TypedDict

import torch
from torch import Tensor

from fastdpo.training.rows.layout import PLAIN, Layout, MicroBatch, PairIds, cut, lay_out, moved
from fastdpo.training.rows.transfer import to_device


class PairFeatures(TypedDict):
    """What `fastdpo.data.PreferenceCollator` makes of B examples: lists of B id tensors, each (tokens,) int64."""

    pair_prompt_ids: list[Tensor]
    pair_chosen_ids: list[Tensor]
    pair_rejected_ids: list[Tensor]
    example_ids: list[str]


class TokenBatch:
    """B pairs of token ids, whose micro-batches go to `device`.

    The ids are the host's, where rows are made, and so is all that says which pairs a micro-batch has: the device is
    never asked.
    """

    def __init__(self, features: PairFeatures, device: torch.device) -> None:
        columns = (features["pair_prompt_ids"], features["pair_chosen_ids"], features["pair_rejected_ids"])
        self.pairs = [PairIds(*row) for row in zip(*columns, strict=True)]
        self.example_ids: list[str] = features["example_ids"]
        self.device = device

    def __len__(self) -> int:
        return len(self.pairs)

    def lengths(self) -> tuple[Tensor, Tensor]:
        """Completion lengths in tokens, chosen and rejected, each (B,) float32 on the device."""
        rows = [[len(pair.chosen) for pair in self.pairs], [len(pair.rejected) for pair in self.pairs]]
        (lengths,) = to_device([torch.tensor(rows, dtype=torch.float32)], self.device)
        return lengths[0], lengths[1]

    def key(self, index: int) -> bytes:
        """A digest of the pair's token ids: equal pairs have equal keys, whatever data set they stand in."""
        digest = hashlib.blake2b(digest_size=16)
        pair = self.pairs[index]
        for ids in (pair.prompt, pair.chosen, pair.rejected):
            digest.update(len(ids).to_bytes(8, "little"))
            digest.update(ids.to(torch.int64).numpy().tobytes())
        return digest.digest()

    def groups(self, budget: int, subset: Sequence[int] | None = None, layout: Layout = PLAIN) -> list[list[int]]:
        """The pairs of each micro-batch of at most `budget` tokens, padding included, over `subset` (default: all)."""
        return cut(self.pairs, range(len(self)) if subset is None else subset, layout, budget)

    def lay_out(self, groups: Sequence[Sequence[int]], layout: Layout = PLAIN) -> list[MicroBatch]:
        """A micro-batch on the device of each group of pairs, all of them in one copy that nobody waits for."""
        return moved([lay_out(self.pairs, group, layout) for group in groups], self.device)

    def cut(self, budget: int, subset: Sequence[int] | None = None, layout: Layout = PLAIN) -> list[MicroBatch]:
        """`lay_out` of `groups`."""
        return self.lay_out(self.groups(budget, subset, layout), layout)
