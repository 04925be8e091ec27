"""The batch of pairs that the algorithm sees, and the micro-batches that memory allows.

A batch holds B pairs as ragged token ids. `TokenBatch.cut` splits any subset of them into micro-batches of at most
`budget` tokens, in the rows that `fastdpo.training.layout` makes. Nothing that is computed from a batch may depend on
the cut or on the layout.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TypedDict

import torch
from torch import Tensor

from fastdpo.training.layout import PLAIN, Layout, MicroBatch, PairIds, cut, lay_out


class PairFeatures(TypedDict):
    """What `fastdpo.data.PreferenceCollator` makes of B examples: lists of B id tensors, each (tokens,) int64."""

    pair_prompt_ids: list[Tensor]
    pair_chosen_ids: list[Tensor]
    pair_rejected_ids: list[Tensor]
    example_ids: list[str]


class TokenBatch:
    """B pairs of token ids, whose micro-batches go to `device`."""

    def __init__(self, features: PairFeatures, device: torch.device) -> None:
        # Ragged ids stay on the host, where rows are made; a micro-batch goes to the device as a whole.
        columns = (features["pair_prompt_ids"], features["pair_chosen_ids"], features["pair_rejected_ids"])
        self.pairs = [PairIds(*(ids.cpu() for ids in row)) for row in zip(*columns, strict=True)]
        self.example_ids: list[str] = features["example_ids"]
        self.device = device

    def __len__(self) -> int:
        return len(self.pairs)

    def lengths(self) -> tuple[Tensor, Tensor]:
        """Completion lengths in tokens, chosen and rejected, each (B,) float32."""
        return (
            torch.tensor([len(pair.chosen) for pair in self.pairs], dtype=torch.float32, device=self.device),
            torch.tensor([len(pair.rejected) for pair in self.pairs], dtype=torch.float32, device=self.device),
        )

    def key(self, index: int) -> bytes:
        """A digest of the pair's token ids: equal pairs have equal keys, whatever data set they stand in."""
        digest = hashlib.blake2b(digest_size=16)
        pair = self.pairs[index]
        for ids in (pair.prompt, pair.chosen, pair.rejected):
            digest.update(len(ids).to_bytes(8, "little"))
            digest.update(ids.to(torch.int64).numpy().tobytes())
        return digest.digest()

    def cut(self, budget: int, subset: Sequence[int] | None = None, layout: Layout = PLAIN) -> list[MicroBatch]:
        """Micro-batches of at most `budget` tokens, padding included, over `subset` (default: all pairs)."""
        order = range(len(self)) if subset is None else subset
        return [lay_out(self.pairs, group, layout, self.device) for group in cut(self.pairs, order, layout, budget)]
