"""From the scores of the whole batch to the plan, the loss, dL/dlogp of every pair, and the metrics.

The result does not depend on how the batch is cut into micro-batches or spread over ranks: plan, loss and metrics see
the global batch, all pairs of all ranks in one order on every rank; and where the derivative of a pair is taken beside
those of its micro-batch alone, the mean is still the global batch's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fastdpo.formulas.losses import F_DIVERGENCES, LOSSES
from fastdpo.formulas.oracle import BetaPlan, PreferenceOutput, preference_gap
from fastdpo.loss.dynamic_beta import DynamicBeta
from fastdpo.loss.preference import preference_loss
from fastdpo.training.options.config import FastDPOConfig
from fastdpo.training.scoring.scorer import PairScores


@dataclass(frozen=True)
class Coefficients:
    """dL/dlogp of every pair, each (B,): chosen and rejected completion log-probs, and the unweighted chosen sum."""

    chosen: Tensor
    rejected: Tensor
    chosen_sums: Tensor

    def at(self, indices: Tensor) -> Coefficients:
        """Those of the pairs at `indices` (P,)."""
        return Coefficients(self.chosen[indices], self.rejected[indices], self.chosen_sums[indices])


@dataclass(frozen=True)
class BatchSize:
    """What the mean over a batch divides by. pairs: how many; chosen_tokens: 0-D, of their chosen completions."""

    pairs: int
    chosen_tokens: Tensor


class Objective:
    """The run's loss, with its options bound."""

    def __init__(self, args: FastDPOConfig) -> None:
        self.args = args
        losses = [LOSSES[name] for name in args.loss_type]
        self.needs_reference = any(loss.needs_reference for loss in losses)
        #: dL/dlogp of one pair depends on the log-probs of the others: the whole batch is scored before training on it.
        self.couples_batch = args.dynamic_beta or any(loss.sorts_batch for loss in losses)
        #: The losses by what their mean is over: pairs, or the tokens of chosen completions.
        self._per_token = [loss.name for loss in losses if loss.couples_batch and not loss.sorts_batch]
        self._per_pair = [loss.name for loss in losses if loss.name not in self._per_token]

    def plan(self, scores: PairScores, dynamic_beta: DynamicBeta | None) -> BetaPlan | None:
        """β and the pairs kept for this batch; None where β is fixed. Commits nothing."""
        return None if dynamic_beta is None else dynamic_beta.plan(self.gaps(scores))

    def gaps(self, scores: PairScores) -> Tensor:
        """(B,) raw log-ratio gaps of the first loss that β scales, length-normalised where that is."""
        return preference_gap(
            scores.chosen_logps,
            scores.rejected_logps,
            *self._reference(scores),
            loss_type=next(name for name in self.args.loss_type if LOSSES[name].uses_beta),
            chosen_lengths=scores.chosen_lengths,
            rejected_lengths=scores.rejected_lengths,
        )

    def loss(self, scores: PairScores, plan: BetaPlan | None = None, *, backend: str | None = None) -> PreferenceOutput:
        """The loss over all pairs of `scores`, differentiable in its log-probs; `backend` defaults to the run's."""
        return self._loss(
            scores,
            self.args.loss_type,
            beta=self.args.beta if plan is None else plan.beta,
            keep=None if plan is None else plan.keep,
            backend=self.args.backend if backend is None else backend,
        )

    def _loss(self, scores: PairScores, names: Sequence[str], **options: Any) -> PreferenceOutput:
        """Those of the run's losses that have these names, with the run's options as far as they read them."""
        args, losses = self.args, [LOSSES[name] for name in names]
        weights = None
        if args.loss_weights is not None:
            weights = [w for name, w in zip(args.loss_type, args.loss_weights, strict=True) if name in names]
        divergence = args.f_divergence_type if any(loss.supports_f_divergence for loss in losses) else "reverse_kl"
        taken = {name for loss in losses for name in loss.parameters} | set(F_DIVERGENCES[divergence])
        parameters: dict[str, Any] = {k: v for k, v in args.loss_parameters().items() if k in taken}
        ref_chosen_logps, ref_rejected_logps = self._reference(scores)
        return preference_loss(
            scores.chosen_logps,
            scores.rejected_logps,
            ref_chosen_logps,
            ref_rejected_logps,
            loss_type=names,
            loss_weights=weights,
            reward_beta=args.beta,
            label_smoothing=args.label_smoothing if any(loss.uses_label_smoothing for loss in losses) else 0.0,
            chosen_lengths=scores.chosen_lengths,
            rejected_lengths=scores.rejected_lengths,
            f_divergence=divergence,
            pair_weights=scores.pair_weights if args.use_weighting else None,
            sft_logps=scores.chosen_sums,
            **options,
            **parameters,
        )

    def evaluate(self, scores: PairScores, plan: BetaPlan | None) -> tuple[Coefficients, PreferenceOutput]:
        """dL/dlogp of all pairs at `scores`, and the loss itself."""
        outputs: list[PreferenceOutput] = []

        def loss(leaves: PairScores) -> Tensor:
            outputs.append(self.loss(leaves, plan))
            return outputs[0].loss

        return _derivative(loss, scores), outputs[0]

    def size(self, scores: PairScores) -> BatchSize:
        """Of the batch with these scores, of which the lengths are read."""
        return BatchSize(len(scores.chosen_lengths), scores.chosen_lengths.clamp(min=1).sum())

    def coefficients(self, scores: PairScores, whole: BatchSize) -> Coefficients:
        """dL/dlogp of the pairs of `scores`, which are a part of a batch of size `whole` that is not coupled: a pair's
        derivative then depends on that pair, and on the batch by what the mean divides by."""
        assert not self.couples_batch
        shared = {"beta": self.args.beta, "reduction": "sum", "backend": self.args.backend}

        def loss(leaves: PairScores) -> Tensor:
            total = leaves.chosen_logps.new_zeros(())
            if self._per_pair:
                total = total + self._loss(leaves, self._per_pair, **shared).loss / whole.pairs
            if self._per_token:
                own = self.size(leaves)
                # The sum of n pairs' shares is n/Σ|y_w| times that of their tokens, in this part as in the whole batch
                factor = own.chosen_tokens / own.pairs / whole.chosen_tokens
                total = total + self._loss(leaves, self._per_token, **shared).loss * factor
            return total

        return _derivative(loss, scores)

    def _reference(self, scores: PairScores) -> tuple[Tensor | None, Tensor | None]:
        return (scores.ref_chosen_logps, scores.ref_rejected_logps) if self.needs_reference else (None, None)

    def metrics(self, scores: PairScores, output: PreferenceOutput, plan: BetaPlan | None = None) -> dict[str, Tensor]:
        """0-D tensors under the field's names, averaged over all pairs of `scores`."""
        gap = output.chosen_rewards - output.rejected_rewards
        metrics = {
            "rewards/chosen": output.chosen_rewards.mean(),
            "rewards/rejected": output.rejected_rewards.mean(),
            "rewards/accuracies": (gap > 0).float().mean(),
            "rewards/margins": gap.mean(),
            "logps/chosen": scores.chosen_logps.mean(),
            "logps/rejected": scores.rejected_logps.mean(),
        }
        if plan is not None:
            metrics |= {
                "beta/value": plan.beta.mean(),
                "beta/m0": plan.mean,
                "beta/sigma": plan.std,
                "beta/kept": plan.keep.float().mean(),
            }
        return metrics


def _derivative(loss: Callable[[PairScores], Tensor], scores: PairScores) -> Coefficients:
    """That of `loss` by the policy's log-probs, at `scores`."""
    leaves = [
        x.detach().clone().requires_grad_() for x in (scores.chosen_logps, scores.rejected_logps, scores.chosen_sums)
    ]
    with torch.enable_grad():
        chosen, rejected, sums = leaves
        value = loss(replace(scores, chosen_logps=chosen, rejected_logps=rejected, chosen_sums=sums))
        grads = torch.autograd.grad(value, leaves, allow_unused=True)
    filled = [torch.zeros_like(leaf) if grad is None else grad for leaf, grad in zip(leaves, grads, strict=True)]
    return Coefficients(*filled)
