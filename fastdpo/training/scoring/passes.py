"""Forward passes of micro-batches in the run's precision: those of a step, and those that only fill in scores."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel

from fastdpo.training.body import BodyChoice
from fastdpo.training.memory import MemoryPlan
from fastdpo.training.models.dropout import without_dropout
from fastdpo.training.models.sharded import Sharding
from fastdpo.training.reference import ReferencePolicy
from fastdpo.training.rows import LayoutChoice, MicroBatch, TokenBatch
from fastdpo.training.scoring.scorer import CompletionScorer, TokenScores
from fastdpo.training.scoring.scores import Scores


class ScoringMicros(NamedTuple):
    """Micro-batches of examples that the policy, the reference, or both are to score."""

    micros: list[MicroBatch]
    by_policy: bool
    by_reference: bool


class Passes:
    """Runs policy and reference over micro-batches.

    Args:
        model: the policy itself, not its wrapper: gradients are summed explicitly, and never by DDP's hooks.
        reference: the reference policy.
        scorer: reduces what a model says of a micro-batch.
        layouts: of rows. bodies: what computes the layers. memory: of how many at once.
        sharding: which keeps ranks in step.
        autocast: the run's precision.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        reference: ReferencePolicy,
        scorer: CompletionScorer,
        layouts: LayoutChoice,
        bodies: BodyChoice,
        memory: MemoryPlan,
        sharding: Sharding,
        autocast: Callable[[], AbstractContextManager[Any]],
    ) -> None:
        self.model, self.reference, self.scorer = model, reference, scorer
        self.layouts, self.bodies, self.memory = layouts, bodies, memory
        self.sharding, self.autocast = sharding, autocast

    def settle(self, batch: TokenBatch) -> None:
        """Settle on the layout and the bodies, on the first batch; later calls do nothing."""
        layout = self.layouts.settle(batch)
        self.bodies.settle(batch, layout, self.layouts.active)

    @contextmanager
    def active(self) -> Iterator[None]:
        """Within it, forwards and backwards of micro-batches work, in the layout and with the bodies of the run."""
        with self.layouts.active(), self.bodies.active():
            yield

    def forward(self, model: PreTrainedModel, micro: MicroBatch, *, statistics: bool = False) -> TokenScores:
        """Token log-probs of a micro-batch, with the scorer's statistics if asked for."""
        with self.autocast():
            return self.scorer.tokens(model, micro, statistics=statistics)

    def cut(self, batch: TokenBatch, budget: int, subset: Collection[int]) -> list[MicroBatch]:
        """Micro-batches over `subset` in the layout of the run."""
        return batch.cut(budget, sorted(subset), self.layouts.layout) if subset else []

    def in_step(self, batch: TokenBatch, micros: Sequence[MicroBatch]) -> Iterator[tuple[MicroBatch, bool]]:
        """The micro-batches, each True: it is real. Where ranks have to keep step (FSDP), those with fewer than others
        get fillers, False: they go through the same forwards and backwards and count for nothing."""
        missing = self.sharding.most(len(micros)) - len(micros)
        for micro in micros:
            yield micro, True
        if missing:
            tokens = batch.tokens(self.layouts.layout)
            (filler,) = self.cut(batch, 1, [min(range(len(batch)), key=tokens.__getitem__)])
            for _ in range(missing):
                yield filler, False

    def to_score(
        self, batch: TokenBatch, *, policy: Collection[int] = (), reference: Collection[int] = ()
    ) -> list[ScoringMicros]:
        """What `score` takes for these examples of `batch`, on the device already: nothing of it is made between two
        forwards. Both models go over the same micro-batches where both are asked for."""
        policy, reference = set(policy), set(reference)
        return [
            ScoringMicros(self.cut(batch, self.memory.score_tokens, group), by_policy, by_reference)
            for group, by_policy, by_reference in (
                (policy & reference, True, True),
                (policy - reference, True, False),
                (reference - policy, False, True),
            )
        ]

    @torch.no_grad()
    def score(self, batch: TokenBatch, scores: Scores, passes: Sequence[ScoringMicros]) -> None:
        """Fill in the log-probs of policy and reference for micro-batches of `batch`."""
        for micros, by_policy, by_reference in passes:
            for micro, real in self.in_step(batch, micros):
                if by_policy:
                    with without_dropout(self.model) as model:
                        result = self.forward(model, micro, statistics=True)
                    if real:
                        self.scorer.fill_policy(scores, result, micro)
                if by_reference:
                    with self.reference.active() as model, without_dropout(model):
                        result = self.forward(model, micro)
                    if real:
                        self.scorer.fill_reference(scores, result, micro)
