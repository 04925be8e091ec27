"""The part of the trainer that tokenises and scores pairs: passes without gradients, and evaluation.

Evaluation gathers the scores of every pair through transformers' loop and computes the loss and the metrics once, over
all pairs, at β0: the figures depend neither on the evaluation batch nor on the ranks, and no statistic is touched.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import torch
from datasets import Dataset, IterableDataset
from torch import Tensor
from transformers import EvalPrediction, PreTrainedModel, PreTrainedTokenizerBase

from fastdpo.data import TokenizationReport, tokenize_preferences
from fastdpo.training.memory.plan import MemoryPlan, RetryStep
from fastdpo.training.models.loading import without_dropout
from fastdpo.training.models.sharded import ShardedMixin
from fastdpo.training.objective import Objective
from fastdpo.training.options.config import FastDPOConfig
from fastdpo.training.reference.cache import ReferenceCache
from fastdpo.training.reference.policy import ReferencePolicy
from fastdpo.training.rows.batch import PairFeatures, TokenBatch
from fastdpo.training.rows.choice import LayoutChoice
from fastdpo.training.rows.layout import MicroBatch
from fastdpo.training.rows.transfer import to_device
from fastdpo.training.scoring.scorer import CompletionScorer, PairScores, TokenScores

logger = logging.getLogger(__name__)


class ScoringMicros(NamedTuple):
    """Micro-batches of pairs that the policy, the reference, or both are to score."""

    micros: list[MicroBatch]
    by_policy: bool
    by_reference: bool


class ScoringMixin(ShardedMixin):
    """Tokenises data sets and scores batches of pairs; overrides how transformers' Trainer evaluates and predicts."""

    config: FastDPOConfig
    tokenizer: PreTrainedTokenizerBase
    #: Data set → what tokenisation kept, dropped and cut.
    tokenization: dict[str, TokenizationReport]
    objective: Objective
    reference: ReferencePolicy
    scorer: CompletionScorer
    layouts: LayoutChoice
    memory: MemoryPlan
    reference_cache: ReferenceCache

    def _get_dataloader(self, *args: Any, **kwargs: Any) -> Any:
        """As transformers', but batches stay on the host, where rows are made of them."""
        own, self.accelerator.device_placement = self.accelerator.device_placement, False
        try:
            return super()._get_dataloader(*args, **kwargs)
        finally:
            self.accelerator.device_placement = own

    def policy(self) -> PreTrainedModel:
        """The model itself, not its wrapper: gradients are summed explicitly, and never by DDP's hooks."""
        return self.accelerator.unwrap_model(self.model)

    def forward_tokens(self, model: PreTrainedModel, micro: MicroBatch, *, weighting: bool = False) -> TokenScores:
        """Token log-probs of a micro-batch in the run's precision."""
        with self.accelerator.autocast():
            return self.scorer.tokens(model, micro, weighting=weighting)

    def cut(self, batch: TokenBatch, budget: int, subset: Collection[int]) -> list[MicroBatch]:
        """Micro-batches over `subset` in the layout of the run."""
        return batch.cut(budget, sorted(subset), self.layouts.layout) if subset else []

    @torch.no_grad()
    def score(
        self, batch: TokenBatch, scores: PairScores, *, policy: Collection[int] = (), reference: Collection[int] = ()
    ) -> None:
        """Fill in log-probs of the policy and of the reference for pairs of `batch`, both over the same micro-batches
        where both are asked for."""
        self.score_micros(batch, scores, self.scoring_micros(batch, policy, reference))

    def scoring_micros(
        self, batch: TokenBatch, policy: Collection[int], reference: Collection[int]
    ) -> list[ScoringMicros]:
        """What `score_micros` takes, on the device already: nothing of it is made between two forwards."""
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
    def score_micros(self, batch: TokenBatch, scores: PairScores, passes: Sequence[ScoringMicros]) -> None:
        """`score` over micro-batches that are laid out."""
        for micros, by_policy, by_reference in passes:
            for micro, counts in self.in_step(batch, micros):
                if by_policy:
                    with without_dropout(self.policy()) as model:
                        result = self.forward_tokens(model, micro, weighting=self.args.use_weighting)
                    if counts:
                        self.scorer.fill_policy(scores, result, micro)
                if by_reference:
                    with self.reference.active() as model, without_dropout(model):
                        result = self.forward_tokens(model, micro)
                    if counts:
                        self.scorer.fill_reference(scores, result, micro)

    def recall_reference(self, batch: TokenBatch, scores: PairScores) -> list[int]:
        """Fill in the reference's log-probs that are known, in one copy; the pairs whose are not."""
        if not self.objective.needs_reference:
            return []
        known = self.reference_cache.get([batch.key(i) for i in range(len(batch))])
        values = torch.stack([known.chosen, known.rejected]).nan_to_num()
        (there,) = to_device([values.to(scores.ref_chosen_logps.dtype)], batch.device)
        scores.ref_chosen_logps, scores.ref_rejected_logps = there[0], there[1]
        return known.missing

    def keep_reference(self, batch: TokenBatch, values: Tensor, computed: list[int]) -> None:
        """Keep the reference's log-probs of the pairs at `computed` out of those of the batch: (2, B), chosen and
        rejected. On a device this waits for them."""
        if computed:
            chosen, rejected = values.cpu()[:, computed]
            self.reference_cache.put([batch.key(i) for i in computed], chosen, rejected)

    @torch.no_grad()
    def prediction_step(
        self,
        model: PreTrainedModel,
        inputs: PairFeatures,
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[None, Tensor, Tensor]:
        """No loss yet, the scores of the pairs (B, 8), and a placeholder for labels (B,).

        Memory that runs out halves the scoring budget, on this rank: what the ranks compute does not depend on it.
        """
        batch = TokenBatch(inputs, self.args.device)
        self.layouts.settle(batch, self.accelerator.autocast)
        with self.layouts.active():
            while True:
                try:
                    return None, self.memory.guarded(lambda: self._scored(batch), local=True), batch.lengths()[0]
                except RetryStep as retry:
                    self.memory.shrink(self.layouts.tokens(batch), scoring=True, cause=retry.cause, local=True)

    def _scored(self, batch: TokenBatch) -> Tensor:
        """(B, 8) scores of an evaluation batch."""
        scores = PairScores.zeros(*batch.lengths())
        everything = range(len(batch))
        missing = self.recall_reference(batch, scores)
        if self.most(bool(missing)) and not self.most(not self.reference.equals_policy()):
            self.score(batch, scores, policy=everything)
            (at,) = to_device([torch.tensor(missing, dtype=torch.int64)], batch.device)
            scores.ref_chosen_logps[at] = scores.chosen_logps[at]
            scores.ref_rejected_logps[at] = scores.rejected_logps[at]
        else:
            self.score(batch, scores, policy=everything, reference=missing)
        self.keep_reference(batch, scores.reference(), missing)
        return scores.stack()

    def evaluation_metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        """Loss and metrics over all evaluation pairs, from their gathered scores (N, 8)."""
        scores = PairScores.unstack(torch.as_tensor(prediction.predictions))
        # On the host, and over any number of pairs
        output = self.objective.loss(scores, backend="torch")
        metrics = self.objective.metrics(scores, output)
        return {"loss": float(output.loss), **{name: float(value) for name, value in metrics.items()}}

    def tokenize_each(self, dataset: Any, name: str) -> Any:
        """`tokenize` of a data set, or of each in a dict of them."""
        if isinstance(dataset, dict):
            return {key: self.tokenize(value, f"{name}_{key}") for key, value in dataset.items()}
        return self.tokenize(dataset, name)

    def tokenize(self, dataset: Dataset | None, name: str) -> Dataset | None:
        """Token ids of a data set; one of token ids is checked and passed through."""
        if dataset is None:
            return None
        if isinstance(dataset, IterableDataset):
            raise TypeError(
                f"{name}_dataset is a streaming IterableDataset, which cannot be shuffled, counted or resumed exactly. "
                "Load it without streaming=True, or materialise a part with Dataset.from_list(list(stream.take(n)))."
            )
        with self.config.main_process_first(desc=f"tokenising the {name} pairs"):
            tokenised, report = tokenize_preferences(
                dataset,
                self.tokenizer,
                max_length=self.config.max_length,
                max_prompt_length=self.config.max_prompt_length,
                num_proc=self.config.dataset_num_proc,
            )
        self.tokenization.setdefault(name, report)  # what came from text; a second pass finds nothing to drop
        logger.info("%s pairs: %s", name, report.summary())
        return tokenised

    def evaluate(
        self,
        eval_dataset: Dataset | dict[str, Dataset] | str | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Loss and metrics over whole data sets (default: `eval_dataset`), at β0, without touching any statistic."""
        if isinstance(eval_dataset, (Dataset, dict)):
            eval_dataset = self.tokenize_each(eval_dataset, metric_key_prefix)
        return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)

    def predict(
        self, test_dataset: Dataset, ignore_keys: list[str] | None = None, metric_key_prefix: str = "test"
    ) -> Any:
        """Per-pair scores as `predictions` (N, 8), in the order of `PairScores`' fields, with their metrics."""
        return super().predict(self.tokenize(test_dataset, metric_key_prefix), ignore_keys, metric_key_prefix)
