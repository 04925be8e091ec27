"""From the scores of the whole batch to the plan, the loss, dL/dlogp of every pair, and the metrics.

Everything here sees the global batch: all pairs of all ranks, in one order on every rank. So the result cannot depend
on how the batch is cut into micro-batches or spread over ranks.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fastdpo.dynamic_beta import DynamicBeta
from fastdpo.losses import LOSSES
from fastdpo.preference import preference_loss
from fastdpo.reference import BetaPlan, PreferenceOutput, preference_gap
from fastdpo.training.config import FastDPOConfig
from fastdpo.training.scoring import PairScores


@dataclass(frozen=True)
class Coefficients:
    """dL/dlogp of every pair, each (B,): chosen and rejected completion log-probs, and the unweighted chosen sum."""

    chosen: Tensor
    rejected: Tensor
    chosen_sums: Tensor


class Objective:
    """The run's loss, with its options bound."""

    def __init__(self, args: FastDPOConfig) -> None:
        self.args = args
        losses = [LOSSES[name] for name in args.loss_type]
        self.needs_reference = any(loss.needs_reference for loss in losses)
        #: dL/dlogp of one pair depends on the log-probs of the others: the whole batch is scored before training on it.
        self.couples_batch = args.dynamic_beta or any(loss.sorts_batch for loss in losses)

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
        args = self.args
        parameters: dict[str, Any] = dict(args.loss_parameters())
        return preference_loss(
            scores.chosen_logps,
            scores.rejected_logps,
            *self._reference(scores),
            loss_type=args.loss_type,
            loss_weights=args.loss_weights,
            beta=args.beta if plan is None else plan.beta,
            reward_beta=args.beta,
            keep=None if plan is None else plan.keep,
            label_smoothing=args.label_smoothing,
            chosen_lengths=scores.chosen_lengths,
            rejected_lengths=scores.rejected_lengths,
            f_divergence=args.f_divergence_type,
            pair_weights=scores.pair_weights if args.use_weighting else None,
            sft_logps=scores.chosen_sums,
            backend=self.args.backend if backend is None else backend,
            **parameters,
        )

    def coefficients(self, scores: PairScores, plan: BetaPlan | None = None) -> Coefficients:
        """dL/dlogp at `scores`. Where the batch is not coupled, a pair's entries depend on that pair and on lengths."""
        leaves = [
            x.detach().clone().requires_grad_()
            for x in (scores.chosen_logps, scores.rejected_logps, scores.chosen_sums)
        ]
        with torch.enable_grad():
            chosen, rejected, sums = leaves
            loss = self.loss(replace(scores, chosen_logps=chosen, rejected_logps=rejected, chosen_sums=sums), plan).loss
            grads = torch.autograd.grad(loss, leaves, allow_unused=True)
        filled = [torch.zeros_like(leaf) if grad is None else grad for leaf, grad in zip(leaves, grads, strict=True)]
        return Coefficients(*filled)

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
