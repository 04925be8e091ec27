"""The gradients of one optimizer step: scores, plan, backward passes, and the step again with less at once where memory
ran out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from fastdpo.formulas.oracle import BetaPlan, PreferenceOutput
from fastdpo.loss.dynamic_beta import DynamicBeta
from fastdpo.training.memory.plan import RetryStep, get_rng_state, set_rng_state
from fastdpo.training.objective import Coefficients
from fastdpo.training.rows.batch import TokenBatch
from fastdpo.training.rows.global_batch import GlobalBatch
from fastdpo.training.rows.layout import MicroBatch
from fastdpo.training.scoring.passes import ScoringMixin
from fastdpo.training.scoring.scorer import PairScores, TokenScores


@dataclass(frozen=True)
class StepScores:
    """What a step leaves beside its gradients.

    scores: this rank's. everyone: those of all ranks. plan, output: β's plan and the loss of all pairs, where they were
    needed on the way. new_references: this rank's pairs whose reference log-probs were not known before.
    """

    scores: PairScores
    everyone: PairScores
    plan: BetaPlan | None
    output: PreferenceOutput | None
    new_references: Sequence[int]


class GradientsMixin(ScoringMixin):
    """Computes the gradients of a step into the parameters' `grad`."""

    dynamic_beta: DynamicBeta | None
    _scoring = False  # whether memory that runs out ran out in a pass without gradients

    def step_gradients(self, batch: TokenBatch, window: GlobalBatch) -> StepScores:
        """The step's gradients. Memory that runs out on any rank makes all of them start it again with less at once:
        from the same statistics, the same random numbers and no gradients, so that nothing is lost or counted twice."""
        random_state = get_rng_state(self.args.device)
        scores = PairScores.zeros(*batch.lengths())
        if self.args.reference == "online":
            missing = list(range(len(batch))) if self.objective.needs_reference else []
        else:
            missing = self.recall_reference(batch, scores)
        to_score = missing
        while True:
            self._scoring = True
            try:
                everyone, plan, output = self._gradients_of(batch, window, scores, to_score)
                return StepScores(scores, everyone, plan, output, () if self.args.reference == "online" else missing)
            except RetryStep as retry:
                cause = retry.cause
            if not self._scoring:
                to_score = []  # the reference is in `scores`
            self.model.zero_grad()
            set_rng_state(self.args.device, random_state)
            self.memory.shrink(self.layouts.tokens(batch), scoring=self._scoring, cause=cause)

    def _gradients_of(
        self, batch: TokenBatch, window: GlobalBatch, scores: PairScores, missing: Sequence[int]
    ) -> tuple[PairScores, BetaPlan | None, PreferenceOutput | None]:
        """The scores of all ranks, the plan, and the loss where it was computed on the way. `missing`: the pairs whose
        reference is to be scored.

        All micro-batches that are known at the start go to the device before the first forward.
        """
        coupled, layout = self.objective.couples_batch, self.layouts.layout
        own = range(len(batch) if coupled else window.own_real)
        groups = batch.groups(self.memory.train_tokens, own, layout)
        # With dropout on, log-probs with and without a graph differ: either all pairs of all ranks are scored with one
        # or none
        holds = coupled and (self.args.disable_dropout or self.memory.over_ranks(len(groups)) == 1)
        if coupled:
            groups = groups[:1] if holds else []
        rest = set(range(len(batch))) - {index for group in groups for index in group}

        def score() -> list[MicroBatch]:
            micros = batch.lay_out(groups, layout)
            self.score_micros(batch, scores, self.scoring_micros(batch, rest if coupled else (), missing))
            return micros

        micros = self.memory.guarded(score)
        self._scoring = False
        if coupled:
            return self._train_coupled(batch, scores, window, micros[0] if micros else None)
        return self._train_separable(batch, scores, window, micros), None, None

    def _train_coupled(
        self, batch: TokenBatch, scores: PairScores, window: GlobalBatch, first: MicroBatch | None
    ) -> tuple[PairScores, BetaPlan | None, PreferenceOutput]:
        """`first` is a micro-batch whose pairs are not scored yet: its graph is kept from here to its backward."""
        held: TokenScores | None = None
        if first is not None:
            held = self.memory.guarded(
                lambda: self.forward_tokens(self.policy(), first, weighting=self.args.use_weighting)
            )
            self.scorer.fill_policy(scores, held, first)
        everyone = window.gather(scores)
        plan = self.objective.plan(everyone, self.dynamic_beta)
        whole, output = self.objective.evaluate(everyone, plan)
        coefficients = window.own(whole)
        kept = set(window.own_kept(None if plan is None else plan.keep))

        def train() -> None:
            # Which pairs are left is known only now
            rest = kept - set(first.members if first is not None else ())
            micros = self.cut(batch, self.memory.train_tokens, rest)
            if held is not None and first is not None and (not kept.isdisjoint(first.members) or self.is_fsdp_enabled):
                self._backward(held, first, coefficients.at(first.indices))  # with FSDP ranks go backward together
            for micro, counts in self.in_step(batch, micros):
                result = self.forward_tokens(self.policy(), micro)
                self._backward(result, micro, coefficients.at(micro.indices), counts)

        self.memory.guarded(train)
        return everyone, plan, output

    def _train_separable(
        self, batch: TokenBatch, scores: PairScores, window: GlobalBatch, micros: Sequence[MicroBatch]
    ) -> PairScores:
        whole = self.objective.size(window.gather(scores))  # lengths: c of a pair needs no other pair's log-probs

        def train() -> None:
            for micro, counts in self.in_step(batch, micros):
                result = self.forward_tokens(self.policy(), micro, weighting=self.args.use_weighting)
                if counts:
                    self.scorer.fill_policy(scores, result, micro)
                self._backward(result, micro, self.objective.coefficients(scores.at(micro.indices), whole), counts)

        self.memory.guarded(train)
        return window.gather(scores)

    def _backward(
        self, result: TokenScores, micro: MicroBatch, coefficients: Coefficients, counts: bool = True
    ) -> None:
        """Backpropagate Σ c·logp over the micro-batch, which has the gradient of the whole batch's loss; zeros where
        the micro-batch does not count. `coefficients`: of its pairs, in their order."""
        per_row = torch.cat([coefficients.chosen, coefficients.rejected])
        per_token = per_row[:, None] * self.scorer.token_weights(micro)
        per_token[: len(micro)] += coefficients.chosen_sums[:, None] * micro.completion_mask[: len(micro)]
        self.accelerator.backward((per_token * result.logps).sum() * counts)

    def sum_gradients(self) -> None:
        """Sum the trainable gradients over ranks in one all-reduce; a rank without kept pairs adds zeros.

        Those of sharded parameters are summed already.
        """
        trained = [p for p in self.policy().parameters() if p.requires_grad]
        for p in trained:
            if p.grad is None:
                p.grad = torch.zeros_like(p)
        if self.args.world_size > 1:
            for dtype in sorted({p.dtype for p in trained}, key=str):
                grads = [p.grad for p in trained if p.dtype == dtype and type(p.grad) is Tensor]
                if not grads:
                    continue
                flat = torch.cat([grad.flatten() for grad in grads])
                dist.all_reduce(flat)
                for grad, summed in zip(grads, flat.split([grad.numel() for grad in grads]), strict=True):
                    grad.copy_(summed.view_as(grad))
