"""The reference log-probs of a run that are kept: shared by ranks, saved beside the run, filled ahead of training.

`reference="lazy"` computes an example's in the step that first sees it, "precompute" all of them before the first step.
Both read and write one file (`fastdpo.training.reference.cache`); what it holds for this reference and tokenisation is
not computed again, by later epochs, resumed runs and later runs on the same data.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from datasets import Dataset
from torch import Tensor
from tqdm.auto import tqdm

from fastdpo.training.lock import LockedError
from fastdpo.training.options import FastDPOConfig
from fastdpo.training.ranks import Ranks
from fastdpo.training.reference.cache import REFERENCE_CACHE_FILE, CachedLogps, ReferenceCache
from fastdpo.training.rows import TokenBatch

logger = logging.getLogger(__name__)

#: Examples of each rank between two exchanges in `fill`.
ROUND = 64
#: Seconds between two saves in it: what a kill can lose.
SAVE_EVERY = 60.0


class ReferenceStore:
    """A `ReferenceCache` with its file and the other ranks'.

    Args:
        cache: of this rank.
        args: the run's options: where the file is, and who writes it.
        ranks: that share.
        needed: whether the objective reads a reference.
    """

    def __init__(self, cache: ReferenceCache, args: FastDPOConfig, ranks: Ranks, *, needed: bool) -> None:
        self.cache, self.args, self.ranks, self.needed = cache, args, ranks, needed

    @property
    def keeps(self) -> bool:
        """Whether reference log-probs of training examples are kept."""
        return self.args.reference != "online" and self.needed

    @property
    def file(self) -> Path:
        """Where they are saved."""
        return Path(self.args.reference_cache_dir or self.args.output_dir).expanduser() / REFERENCE_CACHE_FILE

    def recall(self, batch: TokenBatch) -> CachedLogps:
        """What is known of the examples of `batch`."""
        return self.cache.get(batch.keys())

    def keep(self, batch: TokenBatch, logps: Tensor, computed: list[int]) -> None:
        """Keep the log-probs of the examples at `computed` out of those of `batch`, (K, B). On a device this waits."""
        if computed:
            self.cache.put([batch.key(i) for i in computed], logps.cpu().T[computed])

    def load(self, checkpoint: str | None = None) -> None:
        """Take over what an earlier run has kept; or exactly what this one knew when it saved `checkpoint`, so that
        what comes next is what would have come without a stop."""
        if not self.keeps:
            return
        saved = None if checkpoint is None else Path(checkpoint) / REFERENCE_CACHE_FILE
        file = self.file if saved is None or not saved.is_file() else saved
        try:
            count = self.cache.load(file)
        except OSError as error:
            logger.warning("reference log-probs are computed again: %s cannot be read: %s", file, error)
        else:
            if count:
                logger.info("reference log-probs of %d pairs are known from %s", count, file)

    def share(self) -> None:
        """Exchange what the ranks have computed since the last call; an example may go to another rank next time."""
        if self.keeps and self.ranks.count > 1:
            gathered = self.ranks.gathered_objects(self.cache.new_entries())
            self.cache.merge(entry for entries in gathered for entry in entries)

    def save(self) -> None:
        """Write everything that is known for later runs; all ranks call it. A run loses nothing where that fails, so it
        is a warning then."""
        self.share()
        self._write()

    def _write(self) -> None:
        if not (self.keeps and self.args.should_save and len(self.cache)):
            return
        try:
            self.cache.save(self.file)
        except OSError as error:
            if isinstance(error, LockedError):
                self.cache.patience = 0.0  # waited for once
            logger.warning("reference log-probs are not kept for later runs in %s: %s", self.file, error)

    def save_into(self, checkpoint: Path) -> None:
        """Everything that is known, `share`d before, into a checkpoint that is written. Raises OSError."""
        if self.keeps and len(self.cache):
            (checkpoint / REFERENCE_CACHE_FILE).write_bytes(self.cache.encoded())

    def fill(
        self, dataset: Dataset, compute: Callable[[list[dict[str, Any]]], None], stopped: Callable[[], bool]
    ) -> None:
        """Compute what is missing of a training set, longest first; touches no random state and no data order.

        compute: keeps the log-probs of rows of the set. stopped: whether the ranks agreed to stop; that ends it after a
        round, and the run with it, before a step: the log-probs of an example differ in their last bits with those
        that are computed beside it, so only a start that computes the rest in the same rounds gives the same run.
        """
        lengths = list(dataset["length"])
        order = sorted(range(len(dataset)), key=lengths.__getitem__, reverse=True)
        per_round, saved = ROUND * self.ranks.count, time.monotonic()
        starts = range(0, len(order), per_round)
        progress = tqdm(starts, desc="reference log-probs", disable=self.args.disable_tqdm or not self.args.should_save)
        for start in progress:
            own = order[start : start + per_round][self.ranks.index :: self.ranks.count]
            # The layout is settled by all ranks together, so each needs an example
            compute([dataset[i] for i in own or order[:1]])
            self.share()
            if time.monotonic() - saved > SAVE_EVERY:
                self._write()
                saved = time.monotonic()
            if stopped():
                break
        self.save()
