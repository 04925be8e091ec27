"""The batch of examples that the algorithm sees, and the micro-batches that memory allows.

A batch holds B examples as ragged token ids, on the host. `TokenBatch.cut` splits any subset of them into micro-batches
of at most `budget` tokens, in the rows that `training.rows.layout` makes. Nothing that is computed from a batch may
depend on the cut or on the layout.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from fastdpo.training.rows.layout import PLAIN, Example, Layout, MicroBatch, cut, lay_out, moved
from fastdpo.training.rows.transfer import to_device


class TokenBatch:
    """B examples of token ids, whose micro-batches go to `device`.

    The ids are the host's, where rows are made, and so is all that says which examples a micro-batch has: the device is
    never asked. All examples have the same number K of completions.
    """

    def __init__(self, examples: Sequence[Example], example_ids: Sequence[str], device: torch.device) -> None:
        self.examples, self.example_ids, self.device = list(examples), list(example_ids), device

    def __len__(self) -> int:
        return len(self.examples)

    def lengths(self) -> Tensor:
        """Completion lengths in tokens, (K, B) float32 on the device."""
        columns = zip(*(example.completions for example in self.examples), strict=True)
        rows = [[len(ids) for ids in column] for column in columns]
        (lengths,) = to_device([torch.tensor(rows, dtype=torch.float32)], self.device)
        return lengths

    def tokens(self, layout: Layout) -> list[int]:
        """Of each example in its rows."""
        return [example.tokens(layout) for example in self.examples]

    def sequence_tokens(self) -> int:
        """Of all prompts with each of their completions, however they lie in rows."""
        return sum(len(each.prompt) + len(ids) for each in self.examples for ids in each.completions)

    def key(self, index: int) -> bytes:
        """A digest of the example's token ids: equal ones have equal keys, whatever data set they stand in."""
        digest = hashlib.blake2b(digest_size=16)
        example = self.examples[index]
        for ids in (example.prompt, *example.completions):
            digest.update(len(ids).to_bytes(8, "little"))
            digest.update(ids.to(torch.int64).numpy().tobytes())
        return digest.digest()

    def keys(self) -> list[bytes]:
        """`key` of every example."""
        return [self.key(index) for index in range(len(self))]

    def groups(self, budget: int, subset: Sequence[int] | None = None, layout: Layout = PLAIN) -> list[list[int]]:
        """The examples of each micro-batch of at most `budget` tokens, padding included; over `subset`, or all."""
        return cut(self.examples, range(len(self)) if subset is None else subset, layout, budget)

    def lay_out(self, groups: Sequence[Sequence[int]], layout: Layout = PLAIN) -> list[MicroBatch]:
        """A micro-batch on the device of each group of examples, all of them in one copy that nobody waits for."""
        return moved([lay_out(self.examples, group, layout) for group in groups], self.device)

    def cut(self, budget: int, subset: Sequence[int] | None = None, layout: Layout = PLAIN) -> list[MicroBatch]:
        """`lay_out` of `groups`."""
        return self.lay_out(self.groups(budget, subset, layout), layout)
