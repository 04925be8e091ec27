"""What a step needs to know of an objective: where another kind of data or of step meets the trainer.

(Another loss of pairs is no objective, but an entry of the table in `fastdpo/formulas/losses.py`.)

In the order in which a step asks:
    batch                   what an example is: a prompt with K completions, from the columns of a tokenised data set
    token_weights           how a completion's log-prob is summed up from its tokens, for `Scores.logps`
    needs_reference, couples_batch, statistics      what has to be scored, and whether before anything is trained on
    plan                    what is decided on the whole batch: the examples that are kept, and whatever the loss takes
    evaluate, coefficients  c = dL/dlogp of every example, of the whole batch or of a part of it
    metrics                 what is logged
    commit                  called once the optimizer has stepped

The step backpropagates Σ stop_grad(c)·logp, which has the gradient of L however the batch is cut. Rows, heads, memory,
reference and checkpoints do not know which objective it is.

A new objective says what its completions are and gives `losses`; the rest has defaults that hold where an example's
loss depends on that example alone (and on the batch by what the mean divides by). See CONTRIBUTING.md.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from fastdpo.data import ExampleCollator, TokenizationReport
from fastdpo.training.options import FastDPOConfig
from fastdpo.training.rows import Example, MicroBatch, TokenBatch
from fastdpo.training.runs.artifacts import Facts
from fastdpo.training.scoring import Scores
from fastdpo.training.scoring.scorer import unweighted


class Plan(Protocol):
    """What is decided on a batch before it is trained on."""

    @property
    def keep(self) -> Tensor:
        """(B,) bool: the examples that are trained on."""


class Output(Protocol):
    """What a loss computes of a batch."""

    @property
    def loss(self) -> Tensor:
        """0-D."""


class MeanLoss(NamedTuple):
    """The output of objectives that say no more."""

    loss: Tensor  # 0-D
    losses: Tensor  # (B,)


@dataclass(frozen=True)
class Coefficients:
    """c of B examples with K completions, (K, B) each: dL/dlogp of `Scores.logps` and of `Scores.sums`."""

    logps: Tensor
    sums: Tensor

    def at(self, indices: Tensor) -> Coefficients:
        """Those of the examples at `indices` (P,)."""
        return Coefficients(self.logps[:, indices], self.sums[:, indices])


class Objective(ABC):
    """See the module's docstring. What a step asks is on the run's device, and may not wait for it; of an evaluation,
    `evaluation_loss`, `metrics` and `named` get scores of the host."""

    #: Columns of the completions' token ids in a tokenised data set, beside prompt_ids, example_id and length.
    completion_columns: ClassVar[tuple[str, ...]]
    #: The loss reads `Scores.ref_logps`.
    needs_reference: bool = False
    #: c of one example depends on the log-probs of others: the whole batch is scored before training on it.
    couples_batch: bool = False
    #: Options of preference losses in `FastDPOConfig` that it reads; others that are set are refused.
    reads: tuple[str, ...] = ()
    #: What an evaluation reports, for `metric_for_best_model` to be checked early; None: that is not known ahead.
    evaluated: tuple[str, ...] | None = None
    #: Statistics of the head in `Scores.statistics`, by `linear_logprob`'s names.
    statistics: tuple[str, ...] = ()

    # What a batch is

    @property
    def completions(self) -> int:
        """Of an example, K."""
        return len(self.completion_columns)

    @property
    def columns(self) -> list[str]:
        """Of a tokenised data set, that a batch is made from."""
        return ["prompt_ids", *self.completion_columns, "example_id"]

    @property
    def collator(self) -> ExampleCollator:
        """Rows of a tokenised data set → features for `batch`."""
        return ExampleCollator(self.completion_columns)

    def tokenize(
        self, dataset: Dataset, tokenizer: PreTrainedTokenizerBase, config: FastDPOConfig
    ) -> tuple[Dataset, TokenizationReport | None]:
        """A data set with `columns` and `length`, and what became of its rows. By default it holds token ids already.

        Raises ValueError where it is several splits, a column is missing, a row has no token to predict from or none to
        predict, or is longer than `max_length`.
        """
        if isinstance(dataset, dict):
            raise ValueError(
                f"the data set is a {type(dataset).__name__}; pass one of its splits: {', '.join(dataset)}."
            )
        if missing := [name for name in self.columns if name not in dataset.column_names]:
            raise ValueError(f"the data set has no {missing} (found: {dataset.column_names}); give it token ids.")
        columns = ("prompt_ids", *self.completion_columns)
        lengths = [[len(ids) for ids in dataset[name]] for name in columns]
        for row, (prompt, *completions) in zip(dataset["example_id"], zip(*lengths, strict=True), strict=True):
            if empty := [name for name, length in zip(columns, (prompt, *completions), strict=True) if not length]:
                raise ValueError(f"example {row!r} has no token in {empty}; leave it out, or give it one.")
            longest = prompt + max(completions)
            if config.max_length is not None and longest > config.max_length:
                raise ValueError(
                    f"example {row!r} has {longest} tokens, more than max_length={config.max_length}; cut its ids, as "
                    "they are not cut here, or raise max_length."
                )
        if "length" in dataset.column_names:
            return dataset, None
        return dataset.add_column("length", [sum(row) for row in zip(*lengths, strict=True)]), None

    def batch(self, features: Mapping[str, Any], device: torch.device) -> TokenBatch:
        """What `collator` made, as a batch whose micro-batches go to `device`."""
        prompts, *completions = (features[self.collator.key(name)] for name in ("prompt_ids", *self.completion_columns))
        examples = [Example(prompt, tuple(ids)) for prompt, *ids in zip(prompts, *completions, strict=True)]
        return TokenBatch(examples, features["example_ids"], device)

    def batch_of(self, rows: Sequence[Mapping[str, Any]], device: torch.device) -> TokenBatch:
        """Rows of a tokenised data set as a batch."""
        return self.batch(self.collator(rows), device)

    # What is scored

    def token_weights(self, micro: MicroBatch) -> Tensor:
        """(K·P, C) weights of the tokens in `Scores.logps`, 0 behind a completion."""
        return unweighted(micro)

    def weighting(self) -> dict[str, str]:
        """Name → value of what `token_weights` depend on: kept reference log-probs are used with the same only."""
        return {}

    # The loss

    @abstractmethod
    def losses(self, scores: Scores) -> Tensor:
        """(B,), whose sum over the batch, divided by `size`, is the loss; differentiable in `logps` and `sums`."""

    def size(self, scores: Scores) -> Any:
        """What the sum over a batch with these scores is divided by; of the scores the lengths are known."""
        return len(scores)

    def plan(self, scores: Scores) -> Plan | None:
        """What is decided on the whole batch, asked with `couples_batch` only; None: nothing is. Commits nothing."""
        return None

    def loss(self, scores: Scores, plan: Plan | None = None) -> Output:
        """The loss over all examples of `scores`, differentiable in its log-probs. Those that `plan` drops add nothing;
        what the sum is divided by stays the `size` of all."""
        losses = self.losses(scores)
        if plan is not None:
            losses = torch.where(plan.keep, losses, 0.0)
        return MeanLoss(losses.sum() / self.size(scores), losses)

    def evaluation_loss(self, scores: Scores) -> Output:
        """The same over an evaluation set, on the host and of any size."""
        return self.loss(scores)

    def share(self, scores: Scores, whole: Any) -> Tensor:
        """0-D, what the examples of `scores` add to the loss of a batch of `size` `whole`, where it is not coupled."""
        return self.losses(scores).sum() / whole

    def evaluate(self, scores: Scores, plan: Plan | None) -> tuple[Coefficients, Output]:
        """c of all examples at `scores`, and the loss itself."""
        outputs: list[Output] = []

        def loss(leaves: Scores) -> Tensor:
            outputs.append(self.loss(leaves, plan))
            return outputs[0].loss

        return _derivative(loss, scores), outputs[0]

    def coefficients(self, scores: Scores, whole: Any) -> Coefficients:
        """c of the examples of `scores`, a part of a batch of `size` `whole` that is not coupled."""
        assert not self.couples_batch
        return _derivative(lambda leaves: self.share(leaves, whole), scores)

    # What is kept of it

    def metrics(self, scores: Scores, output: Output, plan: Plan | None = None) -> dict[str, Tensor]:
        """0-D tensors by the names that are logged beside the loss, over all examples of `scores`."""
        return {}

    def named(self, scores: Scores) -> dict[str, Tensor]:
        """(B,) columns by name: what `predict` returns, and what the report of a loss that is not finite holds."""
        fields = {"logps": scores.logps, "ref_logps": scores.ref_logps, "lengths": scores.lengths}
        return {f"{name}_{k}": values[k] for name, values in fields.items() for k in range(self.completions)}

    def commit(self, plan: Plan) -> None:
        """Take over what `plan` has learnt of its batch: its optimizer step was taken. By default nothing was."""
        del plan

    def modules(self) -> dict[str, nn.Module]:
        """File name → module whose state belongs to a checkpoint."""
        return {}

    def fixed_options(self) -> dict[str, Any]:
        """Options by name that a resumed run must share with the run it continues."""
        return {"objective": type(self).__name__}

    def facts(self) -> Facts:
        """For the model card."""
        return Facts(type(self).__name__, {})


def _derivative(loss: Callable[[Scores], Tensor], scores: Scores) -> Coefficients:
    """That of `loss` by the policy's log-probs, at `scores`."""
    leaves = [x.detach().clone().requires_grad_() for x in (scores.logps, scores.sums)]
    with torch.enable_grad():
        value = loss(replace(scores, logps=leaves[0], sums=leaves[1]))
        grads = torch.autograd.grad(value, leaves, allow_unused=True)
    filled = [torch.zeros_like(leaf) if grad is None else grad for leaf, grad in zip(leaves, grads, strict=True)]
    return Coefficients(*filled)
