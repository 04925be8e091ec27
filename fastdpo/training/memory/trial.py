"""Finding the budget of `micro_batch_tokens="auto"`: the most tokens per forward and backward that memory holds.

On a GPU by trial: micro-batches of the training set's longest examples go forward and backward, twice as many tokens
each time, until memory runs out or a whole batch fits; their gradients are thrown away. On a CPU, where running out of
memory ends the process, from `memory_limit`: what is alive at the peak of a forward and backward is counted on a few
tokens (`fastdpo.estimate.activations`), and is linear in them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import psutil
import torch
from datasets import Dataset
from torch import nn

from fastdpo.training.memory.counting import Line, LiveBytes, workspaces
from fastdpo.training.memory.head_workspace import cpu_head_workspace
from fastdpo.training.memory.host import HEAP_SHARE, map_large_blocks
from fastdpo.training.memory.plan import (
    ADVICE,
    SCORING_BUDGET_FACTOR,
    MemoryPlan,
    OutOfMemory,
    RetryStep,
    get_rng_state,
    release_memory,
    set_rng_state,
)
from fastdpo.training.options import FastDPOConfig
from fastdpo.training.rows import LayoutChoice, MicroBatch, TokenBatch

logger = logging.getLogger(__name__)

#: Of a tokenised data set.
Rows = list[dict[str, Any]]

#: Share of the tokens that passed a trial which is used: later micro-batches fragment memory differently.
_TRIAL_SHARE = 0.9
#: Share of a CPU's `memory_limit` that is planned for; the rest is the allocator's.
_LIMIT_SHARE = 0.9
#: Bytes per trained parameter and byte of it that follow the first step: its gradient and AdamW's two states.
_STATE_FACTOR = 3


def largest_that_fits(attempt: Callable[[int], bool], start: int, cap: int) -> int:
    """The largest of start, 2·start, 4·start, …, cap for which `attempt` is true, refined once by the middle of the
    last step; 0 if it is false for `start`."""
    fits, tokens = 0, min(start, cap)
    while attempt(tokens):
        fits = tokens
        if tokens == cap:
            return fits
        tokens = min(2 * tokens, cap)
    middle = (fits + tokens) // 2
    return middle if fits and middle > fits and attempt(middle) else fits


class MemoryTrial:
    """Settles the budget of a run before its first step.

    Args:
        args: the run's options.
        model: the policy.
        memory: the plan that gets the budget.
        layouts: of rows, settled before. active: within it, forwards and backwards work.
        make_batch: rows of a tokenised data set → a batch.
        score, train: one micro-batch of the policy without gradients; forward and backward, of weight zero.
    """

    def __init__(
        self,
        args: FastDPOConfig,
        model: nn.Module,
        memory: MemoryPlan,
        layouts: LayoutChoice,
        active: Callable[[], AbstractContextManager[None]],
        make_batch: Callable[[Rows], TokenBatch],
        score: Callable[[MicroBatch], object],
        train: Callable[[MicroBatch], object],
    ) -> None:
        self.args, self.model, self.memory, self.layouts, self.active = args, model, memory, layouts, active
        self.make_batch, self.score, self.train = make_batch, score, train

    def settle(self, dataset: Dataset) -> None:
        """Find the budget where it is to be found. dataset: tokenised, to be trained on."""
        if self.memory.settled:
            return
        if self.args.device.type == "cuda" and self.memory.repeats:
            self.memory.settle(self._found_by_trial(dataset))
        elif self.args.device.type == "cuda" and self.args.memory_limit is not None:
            raise ValueError(
                f"memory_limit={self.args.memory_limit!r} cannot be tried out with FSDP, where ranks wait for each "
                "other in the middle of a forward. Set micro_batch_tokens to a number."
            )
        elif self.args.memory_limit_bytes is not None:
            self.memory.settle(self._found_by_counting(dataset, self.args.memory_limit_bytes))
        else:
            self.memory.settle(self.memory.train_tokens)
            return
        logger.info(
            "micro-batches of %d tokens%s", self.memory.train_tokens, ", checkpointed" * self.memory.checkpointing
        )

    def longest(self, dataset: Dataset) -> tuple[Rows, int]:
        """The longest examples of the training set, a batch of them, and the most tokens that one takes."""
        lengths = list(dataset["length"])
        order = sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True)
        rows = [dataset[i] for i in order[: self.args.train_batch_size]]
        return rows, max(self.make_batch(rows).tokens(self.layouts.layout))

    def _trained_bytes(self) -> int:
        return sum(p.numel() * p.element_size() for p in self.model.parameters() if p.requires_grad)

    # On a GPU

    def _found_by_trial(self, dataset: Dataset) -> int:
        rows, longest = self.longest(dataset)
        if self.args.memory_limit_bytes is not None:
            total = torch.cuda.get_device_properties(self.args.device).total_memory
            share = min(1.0, self.args.memory_limit_bytes / total)
            torch.cuda.set_per_process_memory_fraction(share, self.args.device)
        cap = longest * self.args.train_batch_size
        found = largest_that_fits(lambda tokens: self.try_micro_batch(rows, tokens), longest, cap)
        if not found and self.args.checkpointing == "auto" and not self.memory.checkpointing:
            self.memory.checkpoint_layers()
            found = largest_that_fits(lambda tokens: self.try_micro_batch(rows, tokens), longest, cap)
        if not found:
            raise OutOfMemory(f"the longest pair, of {longest} tokens, does not fit into memory. {ADVICE}")
        return found if found == cap else max(longest, int(_TRIAL_SHARE * found))

    def try_micro_batch(self, rows: Rows, tokens: int) -> bool:
        """Whether a micro-batch of `tokens` tokens of the examples `rows` goes forward and backward on every rank.

        Its gradients are not kept, and what the optimizer will hold is held meanwhile. Random numbers are as before.
        """

        def work() -> None:
            reserve = torch.empty(_STATE_FACTOR * self._trained_bytes(), dtype=torch.uint8, device=self.args.device)
            layout = self.layouts.layout
            batch = self.make_batch(rows)
            repeats = -(-SCORING_BUDGET_FACTOR * tokens // sum(batch.tokens(layout)))
            batch = self.make_batch(rows * max(1, repeats))
            self.score(batch.cut(SCORING_BUDGET_FACTOR * tokens, layout=layout)[0])
            self.train(batch.cut(tokens, layout=layout)[0])
            del reserve

        random_state = get_rng_state(self.args.device)
        try:
            with self.active():
                self.memory.guarded(work)
        except RetryStep:
            return False
        finally:
            set_rng_state(self.args.device, random_state)
            self.model.zero_grad()
            release_memory()
        return True

    # On a CPU

    def _found_by_counting(self, dataset: Dataset, limit: int) -> int:
        rows, longest = self.longest(dataset)
        # Or freed activations stay with the process: twice of what they take at once (fastdpo.training.memory.host)
        heap = 1.0 if map_large_blocks() else 1.0 + HEAP_SHARE
        held = psutil.Process().memory_info().rss + _STATE_FACTOR * self._trained_bytes()
        room = int((_LIMIT_SHARE * limit - held) / heap)
        tokens = self.tokens_within(room, rows[0])
        if tokens < longest and self.args.checkpointing == "auto" and not self.memory.checkpointing:
            self.memory.checkpoint_layers()
            tokens = self.tokens_within(room, rows[0])
        tokens = -self.memory.over_ranks(-tokens)  # the least of all ranks'
        if tokens < longest:
            raise OutOfMemory(
                f"memory_limit={self.args.memory_limit!r}: {held / 1e9:.2f} GB are taken by the model, its optimizer "
                f"and the process, and what is left holds {tokens} tokens; the longest pair has {longest}. {ADVICE}"
            )
        return min(tokens, longest * self.args.train_batch_size)

    def tokens_within(self, room: int, longest: dict[str, Any]) -> int:
        """The most tokens that `room` bytes hold: a line through one and two of the longest example."""
        random_state = get_rng_state(self.args.device)  # dropout draws from it
        with self.active():
            (few, *one), (many, *two) = (self._count_live(longest, count) for count in (1, 2))
        set_rng_state(self.args.device, random_state)
        self.model.zero_grad()
        scoring, training = (Line.through((few, a), (many, b)) for a, b in zip(one, two, strict=True))
        return min(training.tokens_within(room), scoring.tokens_within(room) // SCORING_BUDGET_FACTOR)

    def _count_live(self, longest: dict[str, Any], count: int) -> tuple[int, int, int]:
        """Tokens of a micro-batch of `count` examples, and its peaks: without gradients, and forward and backward."""
        batch = self.make_batch([longest] * count)
        tokens = sum(batch.tokens(self.layouts.layout))
        (micro,) = batch.cut(tokens, layout=self.layouts.layout)
        counted = {**workspaces(), torch.ops.fastdpo.linear_logprob.default: cpu_head_workspace}
        with LiveBytes(counted) as scoring:
            self.score(micro)
        with LiveBytes(counted) as training:
            self.train(micro)
        return tokens, scoring.peak, training.peak
