"""Log-probabilities of completions under a causal LM, per token and per pair.

Only the positions that predict a completion token reach the head. Where the head can be read (`training.scoring.head`),
its input at these positions goes into `linear_logprob` and no logits are kept; otherwise the model computes its own
logits at these positions.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fastdpo.formulas.oracle import completion_weights
from fastdpo.loss.logprobs import linear_logprob, selective_logprob
from fastdpo.ops.linear_logprob.tiles import WORKSPACE
from fastdpo.training.rows.attention import mask_argument
from fastdpo.training.rows.layout import MicroBatch
from fastdpo.training.scoring.head import Head, HeadReader, check_calls


@dataclass
class PairScores:
    """What a loss needs to know of B pairs, each field (B,): detached or not, as their maker says.

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
    def zeros(cls, chosen_lengths: Tensor, rejected_lengths: Tensor) -> PairScores:
        """Scores of nothing yet, but of known lengths."""
        values = {field.name: torch.zeros_like(chosen_lengths) for field in fields(cls)}
        values |= {"chosen_lengths": chosen_lengths, "rejected_lengths": rejected_lengths}
        return cls(**values)

    def at(self, indices: Tensor) -> PairScores:
        """A copy of the scores of the pairs at `indices` (P,)."""
        return PairScores.unstack(self.stack()[indices])

    def reference(self) -> Tensor:
        """(2, B) reference log-probs, chosen and rejected."""
        return torch.stack([self.ref_chosen_logps, self.ref_rejected_logps])

    def stack(self) -> Tensor:
        """(B, 8) for collectives and for evaluation's gather."""
        return torch.stack([getattr(self, field.name) for field in fields(self)], dim=1)

    @classmethod
    def unstack(cls, table: Tensor) -> PairScores:
        """The inverse of `stack`."""
        return cls(*table.unbind(dim=1))


@dataclass(frozen=True)
class TokenScores:
    """Per-token results of one micro-batch.

    logps: (2P, C) completion log-probs, 0 behind the end of a row; differentiable if the pass was.
    log_sum_sq_probs: (2P, C) log Σ_v p_v², or None if not asked for.
    """

    logps: Tensor
    log_sum_sq_probs: Tensor | None


class CompletionScorer:
    """Runs micro-batches through a model and reduces token log-probs to the fields of `PairScores`."""

    def __init__(
        self,
        ld_alpha: float | None = None,
        use_weighting: bool = False,
        backend: str = "auto",
        workspace: int = WORKSPACE,
    ) -> None:
        self.ld_alpha = ld_alpha
        self.use_weighting = use_weighting
        self.backend = backend
        self.workspace = workspace
        self.heads = HeadReader()

    def tokens(self, model: PreTrainedModel, micro: MicroBatch, *, weighting: bool = False) -> TokenScores:
        """Token log-probs of `micro` under `model`; `weighting` adds what WPO's weights need."""
        head = self.heads.read(model)
        score = self._from_logits if head is None else partial(self._from_hidden, head)
        logps, log_sum_sq = score(model, micro, weighting)  # (N,) each
        return TokenScores(_to_rows(logps, micro), None if log_sum_sq is None else _to_rows(log_sum_sq, micro))

    def _from_hidden(
        self, head: Head, model: PreTrainedModel, micro: MicroBatch, weighting: bool
    ) -> tuple[Tensor, Tensor | None]:
        scored = linear_logprob(
            scored_hidden(model, head, micro),
            head.weight,
            micro.targets,
            bias=head.bias,
            logit_scale=head.logit_scale,
            softcap=head.softcap,
            ignore_index=None,
            backend=self.backend,
            stats=("log_sum_sq_probs",) if weighting else (),
            workspace=self.workspace,
        )
        return (scored, None) if isinstance(scored, Tensor) else (scored[0], scored[1]["log_sum_sq_probs"])

    def _from_logits(self, model: PreTrainedModel, micro: MicroBatch, weighting: bool) -> tuple[Tensor, Tensor | None]:
        logits = completion_logits(model, micro)
        logps = selective_logprob(logits, micro.targets, ignore_index=None, backend=self.backend)
        if not weighting:
            return logps, None
        with torch.no_grad():
            return logps, (2 * logits.detach().float().log_softmax(-1)).logsumexp(-1)

    def token_weights(self, micro: MicroBatch) -> Tensor:
        """(2P, C) weights that turn token log-probs into `chosen_logps` and `rejected_logps` by a sum."""
        other = None
        if self.ld_alpha is not None:
            other = torch.cat(micro.completion_mask.sum(1).chunk(2)[::-1])
        return completion_weights(micro.completion_mask, other_lengths=other, ld_alpha=self.ld_alpha)

    def pair_logps(self, token_logps: Tensor, micro: MicroBatch) -> tuple[Tensor, Tensor]:
        """Chosen and rejected log-probs, each (P,)."""
        chosen, rejected = (token_logps * self.token_weights(micro)).sum(1).chunk(2)
        return chosen, rejected

    def fill_policy(self, scores: PairScores, result: TokenScores, micro: MicroBatch) -> None:
        """Write the policy's detached results for `micro` into `scores`."""
        at = micro.indices
        token_logps = result.logps.detach().to(scores.chosen_logps)
        scores.chosen_logps[at], scores.rejected_logps[at] = self.pair_logps(token_logps, micro)
        scores.chosen_sums[at] = token_logps.sum(1).chunk(2)[0]
        scores.pair_weights[at] = self._pair_weights(result, micro).to(scores.pair_weights)

    def fill_reference(self, scores: PairScores, result: TokenScores, micro: MicroBatch) -> None:
        """Write the reference's results for `micro` into `scores`."""
        chosen, rejected = self.pair_logps(result.logps, micro)
        scores.ref_chosen_logps[micro.indices] = chosen.to(scores.ref_chosen_logps)
        scores.ref_rejected_logps[micro.indices] = rejected.to(scores.ref_rejected_logps)

    def _pair_weights(self, result: TokenScores, micro: MicroBatch) -> Tensor:
        if result.log_sum_sq_probs is None:
            return result.logps.new_ones(len(micro))
        # WPO, arXiv 2406.11827, eq. 2: length-normalised likelihood relative to on-policy sampling.
        aligned = (result.logps.detach() - result.log_sum_sq_probs) * micro.completion_mask
        weights = (aligned.sum(1) / micro.completion_mask.sum(1).clamp(min=1)).exp()
        chosen, rejected = weights.chunk(2)
        return chosen * rejected


def _to_rows(values: Tensor, micro: MicroBatch) -> Tensor:
    """(N,) values in row order → (2P, C), 0 elsewhere."""
    # By index: a mask would have to be counted, forward or backward, and the host would wait for the count
    rows = values.new_zeros(micro.completion_mask.numel()).index_copy(0, micro.token_index, values)
    return rows.view_as(micro.completion_mask)


def model_inputs(model: PreTrainedModel, micro: MicroBatch) -> dict[str, Any]:
    """The arguments of the model's forward for a micro-batch, in whatever layout it is."""
    inputs: dict[str, Any] = {"input_ids": micro.input_ids, "use_cache": False}
    if micro.segments is None:
        return inputs
    inputs["position_ids"] = micro.position_ids
    if micro.masked:
        return inputs | {"attention_mask": mask_argument(model, micro.segments)}
    return inputs | {"segments": micro.segments}


def scored_hidden(model: PreTrainedModel, head: Head, micro: MicroBatch) -> Tensor:
    """The input of the model's head at the scored positions, (N, H); the head itself is left out.

    Raises RuntimeError if the model does not call its output embedding as a module, which this relies on.
    """
    with head.left_out() as inputs:
        logits = model(**model_inputs(model, micro)).logits
    check_calls(model, len(inputs), logits, (len(micro.input_ids), 0))
    return inputs[0].flatten(0, 1)[micro.score_rows]


def completion_logits(model: PreTrainedModel, micro: MicroBatch) -> Tensor:
    """The model's own logits at the scored positions, (N, V). Raises RuntimeError as `scored_hidden` does."""
    with _select_rows(model.get_output_embeddings(), micro.score_rows) as calls:
        logits = model(**model_inputs(model, micro)).logits
    check_calls(model, len(calls), logits, (1, len(micro.targets)))
    return logits[0]


@contextmanager
def _select_rows(head: nn.Module, rows: Tensor) -> Iterator[list[bool]]:
    calls: list[bool] = []

    def select(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        calls.append(True)
        # The hidden states are the first argument, by position or by whatever name
        if args:
            return (args[0].flatten(0, 1)[rows].unsqueeze(0), *args[1:]), kwargs
        name, hidden = next(iter(kwargs.items()))
        return args, kwargs | {name: hidden.flatten(0, 1)[rows].unsqueeze(0)}

    handle = head.register_forward_pre_hook(select, with_kwargs=True)
    try:
        yield calls
    finally:
        handle.remove()
