"""The part of the trainer that keeps reference log-probs: filled ahead, shared by ranks, saved beside the run.

`reference="lazy"` computes a pair's in the step that first sees it, "precompute" all of them before the first step.
Both read and write one file (`fastdpo.training.reference.cache`); what it holds for this reference and tokenisation is
not computed again, by later epochs, resumed runs and later runs on the same data.
"""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from tqdm.auto import tqdm

from fastdpo.training.memory.plan import RetryStep
from fastdpo.training.reference.cache import REFERENCE_CACHE_FILE
from fastdpo.training.rows.batch import TokenBatch
from fastdpo.training.scoring.passes import ScoringMixin
from fastdpo.training.scoring.scorer import PairScores

if TYPE_CHECKING:
    from fastdpo.training.runs.callbacks import StopSignals

logger = logging.getLogger(__name__)

#: Pairs of each rank between two exchanges in `precompute_reference`.
_ROUND = 64
#: Seconds between two saves in it: what a kill can lose.
_SAVE_EVERY = 60.0


class ReferenceStoreMixin(ScoringMixin):
    """What the trainer does with its `ReferenceCache` besides asking it."""

    stop_signals: StopSignals

    @property
    def keeps_reference(self) -> bool:
        """Whether reference log-probs of training pairs are kept."""
        return self.args.reference != "online" and self.objective.needs_reference

    @property
    def reference_file(self) -> Path:
        return Path(self.args.reference_cache_dir or self.args.output_dir) / REFERENCE_CACHE_FILE

    def load_reference(self) -> None:
        """Take over what an earlier run, or this one before it was stopped, has kept."""
        if self.keeps_reference and (count := self.reference_cache.load(self.reference_file)):
            logger.info("reference log-probs of %d pairs are known from %s", count, self.reference_file)

    def share_reference(self) -> None:
        """Exchange what the ranks have computed since the last call; a pair may go to another rank next time."""
        if self.keeps_reference and self.args.world_size > 1:
            gathered: list[Any] = [None] * self.args.world_size
            dist.all_gather_object(gathered, self.reference_cache.new_entries())
            self.reference_cache.merge(entry for entries in gathered for entry in entries)

    def save_reference(self) -> None:
        """Write everything that is known; all ranks call it."""
        self.share_reference()
        if self.keeps_reference and self.args.should_save and len(self.reference_cache):
            self.reference_cache.save(self.reference_file)

    def precompute_reference(self) -> None:
        """Compute what is missing of the training set, longest pairs first; touches no random state and no data order.

        A stop signal ends it early: what is missing then is computed by the steps that need it.
        """
        if self.args.reference != "precompute" or not self.keeps_reference:
            return
        dataset, ranks = self.train_dataset, self.args.world_size
        lengths = list(dataset["length"])
        order = sorted(range(len(dataset)), key=lengths.__getitem__, reverse=True)
        per_round, saved = _ROUND * ranks, time.monotonic()
        starts = range(0, len(order), per_round)
        progress = tqdm(starts, desc="reference log-probs", disable=self.args.disable_tqdm or not self.args.should_save)
        for start in progress:
            own = order[start : start + per_round][self.args.process_index :: ranks]
            # The layout is settled by all ranks together, so each needs a pair
            self._keep_reference_of([dataset[i] for i in own or order[:1]])
            self.share_reference()
            if self.args.should_save and time.monotonic() - saved > _SAVE_EVERY:
                self.reference_cache.save(self.reference_file)
                saved = time.monotonic()
            if self.stop_signals.agreed(self.args) is not None:
                break
        self.save_reference()

    def _keep_reference_of(self, rows: list[dict[str, Any]]) -> None:
        batch = TokenBatch(self.data_collator(rows), self.args.device)
        self.layouts.settle(batch, self.accelerator.autocast)

        def compute() -> None:
            scores = PairScores.zeros(*batch.lengths())
            missing = self.recall_reference(batch, scores)
            self.score(batch, scores, reference=missing)
            self.keep_reference(batch, scores.reference(), missing)

        with self.layouts.active():
            while True:
                try:
                    return self.memory.guarded(compute, local=True)
                except RetryStep as retry:
                    self.memory.shrink(self.layouts.tokens(batch), scoring=True, cause=retry.cause, local=True)
