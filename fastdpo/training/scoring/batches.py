"""Scores of whole batches without gradients: an evaluation's, and the reference's ahead of training.

Memory that runs out halves the scoring budget, on this rank: what the ranks compute does not depend on it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from fastdpo.training.reference import ReferenceStore
from fastdpo.training.rows import TokenBatch
from fastdpo.training.rows.transfer import to_device
from fastdpo.training.scoring.passes import Passes
from fastdpo.training.scoring.scores import Scores

T = TypeVar("T")


class BatchScores:
    """Scores batches by `passes`, and asks `references` before the reference is run."""

    def __init__(self, passes: Passes, references: ReferenceStore) -> None:
        self.passes, self.references = passes, references

    def begin(self, batch: TokenBatch, *, recall: bool = True) -> tuple[Scores, Sequence[int]]:
        """Scores of nothing but what is known of the reference, and the examples whose is still to be computed.

        recall: False asks for nothing that is known.
        """
        scores = Scores.zeros(batch.lengths(), len(self.passes.scorer.statistics))
        if not self.references.needed:
            return scores, ()
        if not recall:
            return scores, range(len(batch))
        known = self.references.recall(batch)
        (scores.ref_logps,) = to_device([known.logps.T.nan_to_num().to(scores.ref_logps.dtype)], batch.device)
        return scores, known.missing

    @torch.no_grad()
    def evaluated(self, batch: TokenBatch) -> Tensor:
        """`Scores.stack` of every example of an evaluation batch under policy and reference."""
        return self._fitting(batch, lambda: self._evaluated(batch))

    @torch.no_grad()
    def keep_reference(self, batch: TokenBatch) -> None:
        """Compute and keep the reference's log-probs that are not known."""

        def work() -> None:
            scores, missing = self.begin(batch)
            self.passes.score(batch, scores, self.passes.to_score(batch, reference=missing))
            self.references.keep(batch, scores.ref_logps, list(missing))

        self._fitting(batch, work)

    def _fitting(self, batch: TokenBatch, work: Callable[[], T]) -> T:
        passes = self.passes
        passes.settle(batch)
        with passes.active():
            return passes.memory.until_it_fits(work, batch.tokens(passes.layouts.layout), batch.example_ids)

    def _evaluated(self, batch: TokenBatch) -> Tensor:
        scores, missing = self.begin(batch)
        everything, most = range(len(batch)), self.passes.sharding.most
        if most(bool(missing)) and not most(not self.passes.reference.equals_policy()):
            self.passes.score(batch, scores, self.passes.to_score(batch, policy=everything))
            (at,) = to_device([torch.tensor(missing, dtype=torch.int64)], batch.device)
            scores.ref_logps[:, at] = scores.logps[:, at]
        else:
            self.passes.score(batch, scores, self.passes.to_score(batch, policy=everything, reference=missing))
        self.references.keep(batch, scores.ref_logps, list(missing))
        return scores.stack()
