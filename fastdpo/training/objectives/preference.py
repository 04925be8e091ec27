"""DPO and its family: pairs of a chosen and a rejected completion, any losses of the table, fixed or dynamic β.

From the scores of the whole batch to the plan, the loss, dL/dlogp of every pair, and the metrics. The result does not
depend on how the batch is cut into micro-batches or spread over ranks: plan, loss and metrics see the global batch, all
pairs of all ranks in one order on every rank; and where the derivative of a pair is taken beside those of its
micro-batch alone, the mean is still the global batch's.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from fastdpo.data import PreferenceCollator, TokenizationReport, tokenize_preferences
from fastdpo.formulas import LOSSES, PARAMETERS, BetaPlan, LossOptions, PreferenceOutput
from fastdpo.formulas.oracle import completion_weights, preference_gap
from fastdpo.loss import preference_loss
from fastdpo.training.objectives.objective import Objective
from fastdpo.training.options import FastDPOConfig
from fastdpo.training.options.fields import is_set
from fastdpo.training.rows import MicroBatch
from fastdpo.training.runs.artifacts import Facts
from fastdpo.training.scoring import Scores

#: A checkpoint's file of the running statistics.
DYNAMIC_BETA_FILE = "dynamic_beta.safetensors"
#: Options of the losses and of β that a resumed run cannot change.
_FIXED_OPTIONS = (
    "beta", "loss_type", "loss_weights", "label_smoothing", "f_divergence_type", *PARAMETERS, "ld_alpha",
    "use_weighting", "dynamic_beta", "beta_alpha", "beta_momentum", "keep_ratio", "min_beta", "beta_scope",
    "beta_variant",
)  # fmt: skip


def refuse_unread_options(objective: Objective, args: FastDPOConfig) -> None:
    """Raise ValueError for an option of preference losses that is set and that `objective` does not read."""
    if not isinstance(objective, PreferenceObjective):
        for name in _FIXED_OPTIONS:
            if name not in objective.reads and is_set(args, name):
                raise ValueError(
                    f"{name}={getattr(args, name)!r} has no effect with objective={type(objective).__name__}, which "
                    "does not read it. Leave it out."
                )


@dataclass(frozen=True)
class PairScores:
    """What a loss needs to know of B pairs, each field (B,).

    chosen_logps, rejected_logps: completion log-probs, tail tokens weighted by `ld_alpha`.
    chosen_sums: unweighted log-probs of the chosen completions (the likelihood terms).
    ref_chosen_logps, ref_rejected_logps: the same as the first two, under the reference.
    chosen_lengths, rejected_lengths: completion tokens.
    pair_weights: WPO's weights, 1 where they are off.
    """

    chosen_logps: Tensor
    rejected_logps: Tensor
    chosen_sums: Tensor
    ref_chosen_logps: Tensor
    ref_rejected_logps: Tensor
    chosen_lengths: Tensor
    rejected_lengths: Tensor
    pair_weights: Tensor

    @classmethod
    def of(cls, scores: Scores) -> PairScores:
        """Pairs' (K = 2)."""
        (chosen, rejected), (ref_chosen, ref_rejected) = scores.logps, scores.ref_logps
        lengths, weights = scores.lengths, _pair_weights(scores)
        return cls(chosen, rejected, scores.sums[0], ref_chosen, ref_rejected, lengths[0], lengths[1], weights)

    def stack(self) -> Tensor:
        """(B, 8), in the order of the fields."""
        return torch.stack([getattr(self, field.name) for field in fields(self)], dim=1)

    @classmethod
    def unstack(cls, table: Tensor) -> PairScores:
        """The inverse of `stack`."""
        return cls(*table.unbind(dim=1))


def _pair_weights(scores: Scores) -> Tensor:
    """(B,), WPO's (2406.11827 eq. 2): length-normalised likelihoods relative to on-policy sampling, chosen·rejected."""
    if not len(scores.statistics):
        return torch.ones_like(scores.sums[0])
    aligned = scores.sums.detach() - scores.statistics[0]  # Σ_t log p_y − log Σ_v p_v²
    chosen, rejected = (aligned / scores.lengths.clamp(min=1)).exp()
    return chosen * rejected


@dataclass(frozen=True)
class BatchSize:
    """What the mean over a batch divides by. pairs: how many; chosen_tokens: 0-D, of their chosen completions."""

    pairs: int
    chosen_tokens: Tensor


class PreferenceObjective(Objective):
    """The run's losses, with its options bound."""

    completion_columns = ("chosen_ids", "rejected_ids")
    evaluated = (
        "loss", "rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins", "logps/chosen",
        "logps/rejected",
    )  # fmt: skip

    def __init__(self, args: FastDPOConfig) -> None:
        self.args = args
        self.options = args.loss_options()
        losses = [term.loss for term in self.options.terms]
        self.dynamic_beta = args.make_dynamic_beta().to(args.device) if args.dynamic_beta else None
        self.needs_reference = any(loss.needs_reference for loss in losses)
        self.couples_batch = args.dynamic_beta or any(loss.couples_batch for loss in losses)
        self.statistics = ("log_sum_sq_probs",) if args.use_weighting else ()
        per_token = {loss.name for loss in losses if loss.mean_over == "tokens"}
        #: The losses by what their mean is over: pairs, or the tokens of chosen completions. Each to be summed.
        self._per_pair = self._summed({loss.name for loss in losses} - per_token)
        self._per_token = self._summed(per_token)

    # What a batch is

    @property
    def collator(self) -> PreferenceCollator:
        return PreferenceCollator()

    def tokenize(
        self, dataset: Dataset, tokenizer: PreTrainedTokenizerBase, config: FastDPOConfig
    ) -> tuple[Dataset, TokenizationReport]:
        """Pairs in any format that `fastdpo.data` reads; of token ids, checked and passed through."""
        return tokenize_preferences(
            dataset,
            tokenizer,
            max_length=config.max_length,
            max_prompt_length=config.max_prompt_length,
            num_proc=config.dataset_num_proc,
        )

    # What is scored

    def token_weights(self, micro: MicroBatch) -> Tensor:
        """1 on completion tokens; `ld_alpha` beyond the length of the pair's other completion (LD-DPO)."""
        other = None
        if self.args.ld_alpha is not None:
            other = torch.cat(micro.completion_mask.sum(1).chunk(2)[::-1])
        return completion_weights(micro.completion_mask, other_lengths=other, ld_alpha=self.args.ld_alpha)

    def weighting(self) -> dict[str, str]:
        return {"ld_alpha": str(self.args.ld_alpha)}

    # The loss

    def plan(self, scores: Scores) -> BetaPlan | None:
        """β and the pairs kept for this batch; None where β is fixed. Commits nothing."""
        return None if self.dynamic_beta is None else self.dynamic_beta.plan(self.gaps(PairScores.of(scores)))

    def gaps(self, pairs: PairScores) -> Tensor:
        """(B,) raw log-ratio gaps of the first loss that β scales, length-normalised where that is."""
        return preference_gap(
            pairs.chosen_logps,
            pairs.rejected_logps,
            *self._reference(pairs),
            loss_type=next(name for name in self.args.loss_type if LOSSES[name].uses_beta),
            chosen_lengths=pairs.chosen_lengths,
            rejected_lengths=pairs.rejected_lengths,
        )

    def losses(self, scores: Scores) -> Tensor:
        """Those of `loss`, which with `share` is what a step asks here: their sum is over pairs, or over tokens."""
        return self.loss(scores).losses

    def loss(self, scores: Scores, plan: Any = None, *, backend: str | None = None) -> PreferenceOutput:
        """The loss over all pairs of `scores`, differentiable in its log-probs; `backend` defaults to the run's."""
        return self._loss(
            scores,
            self.options if plan is None else replace(self.options, beta=plan.beta),
            keep=None if plan is None else plan.keep,
            backend=self.args.backend if backend is None else backend,
        )

    def evaluation_loss(self, scores: Scores) -> PreferenceOutput:
        """At β0, over every pair."""
        return self.loss(scores, backend="torch")

    def _loss(self, scores: Scores, options: LossOptions, **call: Any) -> PreferenceOutput:
        pairs = PairScores.of(scores)
        ref_chosen_logps, ref_rejected_logps = self._reference(pairs)
        return preference_loss(
            pairs.chosen_logps,
            pairs.rejected_logps,
            ref_chosen_logps,
            ref_rejected_logps,
            chosen_lengths=pairs.chosen_lengths,
            rejected_lengths=pairs.rejected_lengths,
            pair_weights=pairs.pair_weights if self.args.use_weighting else None,
            sft_logps=pairs.chosen_sums,
            options=options,
            **call,
        )

    def _summed(self, names: set[str]) -> LossOptions | None:
        """Those of the run's losses that have these names, with the run's options as far as they read them."""
        return replace(self.options.only(names), reduction="sum") if names else None

    def _reference(self, pairs: PairScores) -> tuple[Tensor | None, Tensor | None]:
        return (pairs.ref_chosen_logps, pairs.ref_rejected_logps) if self.needs_reference else (None, None)

    def size(self, scores: Scores) -> BatchSize:
        return BatchSize(len(scores), scores.lengths[0].clamp(min=1).sum())

    def share(self, scores: Scores, whole: BatchSize) -> Tensor:
        total = scores.logps.new_zeros(())
        backend = self.args.backend
        if self._per_pair is not None:
            total = total + self._loss(scores, self._per_pair, backend=backend).loss / whole.pairs
        if self._per_token is not None:
            own = self.size(scores)
            # The sum of n pairs' shares is n/Σ|y_w| times that of their tokens, in this part as in the whole batch
            factor = own.chosen_tokens / own.pairs / whole.chosen_tokens
            total = total + self._loss(scores, self._per_token, backend=backend).loss * factor
        return total

    # What is kept of it

    def metrics(self, scores: Scores, output: Any, plan: Any = None) -> dict[str, Tensor]:
        """Rewards, log-probs, and of a plan its β, M0, σ and share of pairs kept."""
        gap = output.chosen_rewards - output.rejected_rewards
        metrics = {
            "rewards/chosen": output.chosen_rewards.mean(),
            "rewards/rejected": output.rejected_rewards.mean(),
            "rewards/accuracies": (gap > 0).float().mean(),
            "rewards/margins": gap.mean(),
            "logps/chosen": scores.logps[0].mean(),
            "logps/rejected": scores.logps[1].mean(),
        }
        if plan is not None:
            metrics |= {
                "beta/value": plan.beta.mean(),
                "beta/m0": plan.mean,
                "beta/sigma": plan.std,
                "beta/kept": plan.keep.float().mean(),
            }
        return metrics

    def named(self, scores: Scores) -> dict[str, Tensor]:
        return vars(PairScores.of(scores))

    def commit(self, plan: Any) -> None:
        """Write the plan's statistics into `dynamic_beta`."""
        if self.dynamic_beta is not None:
            self.dynamic_beta.commit(plan)

    def modules(self) -> dict[str, nn.Module]:
        return {} if self.dynamic_beta is None else {DYNAMIC_BETA_FILE: self.dynamic_beta}

    def fixed_options(self) -> dict[str, Any]:
        return {name: getattr(self.args, name) for name in _FIXED_OPTIONS}

    def facts(self) -> Facts:
        args = self.args
        dynamic = f"α = {args.beta_alpha}, momentum {args.beta_momentum}, keep {args.keep_ratio}, {args.beta_variant}"
        return Facts(
            "β-DPO" if args.dynamic_beta else "DPO",
            {
                "loss": ", ".join(args.loss_type),
                "β0": args.beta,
                "dynamic β": dynamic if args.dynamic_beta else "off",
            },
            ("fastdpo", "dpo", *(["beta-dpo"] if args.dynamic_beta else [])),
            [("DPO", "2305.18290"), *([("β-DPO", "2407.08639")] if args.dynamic_beta else [])],
        )
