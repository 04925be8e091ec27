"""What an optimizer step needs of a batch of examples: its gradients, and its figures.

    known      the reference's log-probs that were computed before
    scored     the others by the reference; where c of an example depends on the others' log-probs, all by the policy
               too: those of one micro-batch with their graph kept, the rest without gradients
    planned    what the objective decides on the whole batch of all ranks: β and the examples that are kept
    trained    Σ stop_grad(c)·logp backpropagated over the kept examples, micro-batch by micro-batch, c = dL/dlogp
    summed     the gradients over ranks, once for each dtype
    read       loss, gradient norm, metrics and new reference log-probs, in the host's one look at them
    committed  not here: transformers clips and steps, then `runs/callbacks.CommitStatistics` has the objective take
               over what its plan has learnt (`FastDPOTrainer.commit_plan`)

Neither the cut into micro-batches nor the number of ranks changes the gradients. So memory that runs out in a pass on
any rank makes all of them start again with less at once, from the same statistics, the same random numbers and no
gradients; with FSDP the run ends there, as ranks wait for each other within a pass.

The host waits for the device twice: for the examples that a plan keeps, where there is one, and for the last look. All
else that says what to launch is the host's own. Several ranks also wait where they have to agree: on memory that ran
out, on dropout with coupled examples, and with FSDP on the number of passes. With one row per answer, transformers
looks in each forward whether rows hold several sequences, which waits too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from fastdpo.training.memory import MemoryPlan, RetryStep
from fastdpo.training.memory.plan import get_rng_state, set_rng_state
from fastdpo.training.models.sharded import gradient_norm
from fastdpo.training.objectives import Coefficients, Objective, Plan
from fastdpo.training.objectives.objective import Output
from fastdpo.training.options import FastDPOConfig
from fastdpo.training.ranks import Ranks
from fastdpo.training.reference import ReferenceStore
from fastdpo.training.rows import GlobalBatch, LayoutChoice, MicroBatch, TokenBatch
from fastdpo.training.rows.attention import deterministic
from fastdpo.training.scoring import BatchScores, Passes, Scores, TokenScores


@dataclass(frozen=True)
class StepResult:
    """What a step leaves beside its gradients.

    scores: this rank's. everyone: those of all ranks. plan, output: of all examples, where they were needed on the way.
    new_references: this rank's examples whose reference log-probs were not known before.
    """

    scores: Scores
    everyone: Scores
    plan: Plan | None
    output: Output | None
    new_references: Sequence[int]


class StepFigures(NamedTuple):
    """A step's numbers over all ranks' examples, on the host; `loss` is the same as a 0-D tensor of the device."""

    loss: Tensor
    loss_value: float
    grad_norm: float
    metrics: dict[str, float]

    @property
    def finite(self) -> bool:
        return math.isfinite(self.loss_value) and math.isfinite(self.grad_norm)


class OptimizerStep:
    """Computes the gradients of a batch into the parameters' `grad`.

    Args:
        objective: what is scored, planned, differentiated and logged.
        passes: forwards of micro-batches, with the layout of their rows and the memory plan that cuts them.
        batch_scores: where the scores of a batch begin: with what is known of the reference.
        references: which keeps what is new of it.
        args, ranks: of the run.
        backward: accelerate's, which scales the loss where fp16 needs that.
    """

    def __init__(
        self,
        objective: Objective,
        passes: Passes,
        batch_scores: BatchScores,
        references: ReferenceStore,
        args: FastDPOConfig,
        ranks: Ranks,
        backward: Callable[[Tensor], None],
    ) -> None:
        self.objective, self.passes, self.batch_scores, self.references = objective, passes, batch_scores, references
        self.args, self.ranks, self.backward = args, ranks, backward
        self.memory: MemoryPlan = passes.memory
        self.layouts: LayoutChoice = passes.layouts
        self.model: PreTrainedModel = passes.model

    def __call__(self, batch: TokenBatch, window: GlobalBatch) -> StepResult:
        """The gradients of `batch`, summed over ranks. window: where this rank's batch lies in that of all ranks."""
        attempt = _Attempt(self, batch, window)
        with self.passes.active(), deterministic(self.args.deterministic_attention):
            result = self._repeated(attempt)
        self._sum_gradients()
        return result

    def _repeated(self, attempt: _Attempt) -> StepResult:
        """The attempt, again with less at once as long as memory runs out."""
        random_state = get_rng_state(self.args.device)
        while True:
            try:
                return attempt.run()
            except RetryStep as retry:
                cause = retry.cause
            self.model.zero_grad()
            set_rng_state(self.args.device, random_state)
            batch = attempt.batch
            tokens = batch.tokens(self.layouts.layout)
            self.memory.shrink(tokens, batch.example_ids, scoring=attempt.is_scoring, cause=cause)

    def _sum_gradients(self) -> None:
        """Sum the trainable gradients over ranks; a rank without kept examples adds zeros.

        Those of sharded parameters, which are DTensors, were summed in the backward.
        """
        trained = [p for p in self.model.parameters() if p.requires_grad]
        for p in trained:
            if p.grad is None:
                p.grad = torch.zeros_like(p)
        for dtype in sorted({p.dtype for p in trained}, key=str):
            self.ranks.sum_([p.grad for p in trained if p.dtype == dtype and type(p.grad) is Tensor])

    @torch.no_grad()
    def read(self, result: StepResult, batch: TokenBatch, *, with_norm: bool) -> StepFigures:
        """The step's numbers, all that the host wants to know at once; keeps new reference log-probs.

        with_norm: look for gradients that are not finite. With fp16 a loss scaler does, and skips the step.
        """
        objective = self.objective
        output = objective.loss(result.everyone, result.plan) if result.output is None else result.output
        metrics = objective.metrics(result.everyone, output, result.plan)
        grads = [p.grad for p in self.model.parameters() if p.grad is not None]
        norm = gradient_norm(grads) if with_norm and grads else torch.zeros_like(output.loss)
        numbers = torch.stack([output.loss, norm.to(output.loss), *metrics.values()])
        ref_logps = result.scores.ref_logps
        found = torch.cat([numbers, ref_logps.flatten().to(numbers)]).cpu()
        self.references.keep(batch, found[len(numbers) :].view_as(ref_logps), list(result.new_references))
        self.references.share()
        loss, grad_norm, *values = found[: len(numbers)].tolist()
        return StepFigures(output.loss.detach(), loss, grad_norm, dict(zip(metrics, values, strict=True)))


class _Attempt:
    """One batch on its way through a step. What the reference has said of it survives a repetition, once all of it was
    said."""

    def __init__(self, step: OptimizerStep, batch: TokenBatch, window: GlobalBatch) -> None:
        self.batch, self.window = batch, window
        self.objective, self.passes, self.memory = step.objective, step.passes, step.memory
        self.args, self.model, self.backward = step.args, step.model, step.backward
        keeps = step.references.keeps
        #: missing: examples that the reference is to score, none where no reference is read.
        self.scores, self.missing = step.batch_scores.begin(batch, recall=keeps)
        self.new_references = self.missing if keeps else ()
        #: Whether memory that runs out runs out in a pass without gradients.
        self.is_scoring = True

    def run(self) -> StepResult:
        """One way through scoring, plan and training, which memory may end anywhere (RetryStep).

        All micro-batches that are known at the start go to the device before the first forward.
        """
        self.is_scoring = True
        coupled, layout = self.objective.couples_batch, self.passes.layouts.layout
        own = range(len(self.batch) if coupled else self.window.own_real)
        groups = self.batch.groups(self.memory.train_tokens, own, layout)
        if coupled:
            groups = groups[:1] if self._may_hold(len(groups)) else []
        unheld = set(range(len(self.batch))) - {index for group in groups for index in group}
        micros = self.memory.guarded(lambda: self._score(groups, unheld if coupled else ()))
        self.is_scoring, self.missing = False, ()  # the reference is in `scores`
        if coupled:
            return self._train_coupled(micros[0] if micros else None)
        return self._train_separable(micros)

    def _may_hold(self, groups: int) -> bool:
        """Whether one micro-batch's graph may be kept from its scoring to its backward. With dropout on, log-probs with
        and without a graph differ: either all examples of all ranks are scored with one or none."""
        return self.args.disable_dropout or self.memory.over_ranks(groups) == 1

    def _score(self, groups: Sequence[Sequence[int]], by_policy: Sequence[int] | set[int]) -> list[MicroBatch]:
        """The micro-batches of `groups`, on the device, after the passes without gradients."""
        micros = self.batch.lay_out(groups, self.passes.layouts.layout)
        to_score = self.passes.to_score(self.batch, policy=by_policy, reference=self.missing)
        self.passes.score(self.batch, self.scores, to_score)
        return micros

    def _train_coupled(self, first: MicroBatch | None) -> StepResult:
        """`first` is a micro-batch whose examples are not scored yet: its graph is kept from here to its backward, and
        dropped examples among them have c = 0. None: all are scored."""
        held: TokenScores | None = None
        if first is not None:
            held = self.memory.guarded(lambda: self.passes.forward(self.model, first, statistics=True))
            self.passes.scorer.fill_policy(self.scores, held, first)
        everyone = self._everyone()
        plan = self.objective.plan(everyone)
        whole, output = self.objective.evaluate(everyone, plan)
        coefficients = Coefficients(self.window.own(whole.logps), self.window.own(whole.sums))
        kept = set(self.window.own_kept(None if plan is None else plan.keep))

        def train() -> None:
            # Which examples are left is known only now
            rest = kept - set(first.members if first is not None else ())
            micros = self.passes.cut(self.batch, self.memory.train_tokens, rest)
            together = self.passes.sharding.enabled  # ranks then go backward together
            if held is not None and first is not None and (not kept.isdisjoint(first.members) or together):
                self._backward(held, first, coefficients.at(first.indices))
            for micro, real in self.passes.in_step(self.batch, micros):
                result = self.passes.forward(self.model, micro)
                self._backward(result, micro, coefficients.at(micro.indices), real)

        self.memory.guarded(train)
        return StepResult(self.scores, everyone, plan, output, self.new_references)

    def _train_separable(self, micros: Sequence[MicroBatch]) -> StepResult:
        size = self.objective.size(self._everyone())  # of which only the lengths are known yet

        def train() -> None:
            for micro, real in self.passes.in_step(self.batch, micros):
                result = self.passes.forward(self.model, micro, statistics=True)
                if real:
                    self.passes.scorer.fill_policy(self.scores, result, micro)
                part = self.scores.at(micro.indices)
                self._backward(result, micro, self.objective.coefficients(part, size), real)

        self.memory.guarded(train)
        return StepResult(self.scores, self._everyone(), None, None, self.new_references)

    def _everyone(self) -> Scores:
        """The scores of all ranks."""
        return Scores.unstack(self.window.gathered(self.scores.stack()), self.objective.completions)

    def _backward(self, result: TokenScores, micro: MicroBatch, coefficients: Coefficients, real: bool = True) -> None:
        """Backpropagate Σ c·logp over the micro-batch: its share of the gradient of the whole batch's loss; nothing of
        one that is not real. `coefficients`: of its examples, in their order."""
        per_token = coefficients.logps.flatten()[:, None] * self.passes.scorer.weights(micro)  # (K·P, C)
        per_token += coefficients.sums.flatten()[:, None] * micro.completion_mask
        self.backward((per_token * result.logps).sum() * real)
