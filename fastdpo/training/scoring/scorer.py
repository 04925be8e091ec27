"""Log-probabilities of completions under a causal LM, per token and per example.

Only the positions that predict a completion token reach the head. Where the head can be read (`training.scoring.head`),
its input at these positions goes into `linear_logprob` and no logits are kept; otherwise the model computes its own
logits at these positions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fastdpo.formulas.oracle import completion_weights, distribution_statistics
from fastdpo.loss.logprobs import linear_logprob, selective_logprob
from fastdpo.ops.linear_logprob.tiles import WORKSPACE
from fastdpo.training.rows import MicroBatch
from fastdpo.training.rows.attention import mask_argument
from fastdpo.training.scoring.head import Head, HeadReader, check_calls
from fastdpo.training.scoring.scores import Scores

#: A micro-batch of P examples → (K·P, C) weights of its tokens.
TokenWeights = Callable[[MicroBatch], Tensor]


def unweighted(micro: MicroBatch) -> Tensor:
    """(K·P, C), 1 on completion tokens and 0 elsewhere."""
    return completion_weights(micro.completion_mask)


@dataclass(frozen=True)
class TokenScores:
    """Per-token results of one micro-batch of P examples.

    logps: (K·P, C) completion log-probs, 0 behind the end of a row; differentiable if the pass was.
    statistics: (S, K·P, C), without gradient; S = 0 if none were asked for.
    """

    logps: Tensor
    statistics: Tensor


class CompletionScorer:
    """Runs micro-batches through a model, and sums token log-probs up into `Scores`.

    Args:
        weights: of tokens in their completion's log-prob.
        statistics: of the head's distributions that the policy's scores hold, by `linear_logprob`'s names.
        backend, workspace: as in `linear_logprob`.
    """

    def __init__(
        self,
        weights: TokenWeights = unweighted,
        statistics: Sequence[str] = (),
        backend: str = "auto",
        workspace: int = WORKSPACE,
    ) -> None:
        self.weights, self.statistics = weights, tuple(statistics)
        self.backend, self.workspace = backend, workspace
        self.heads = HeadReader()

    def prepare(self, model: PreTrainedModel) -> None:
        """Look at the head of `model`, which is to attend in its own way then; later calls do nothing."""
        self.heads.read(model)

    def token_logps(self, model: PreTrainedModel, micro: MicroBatch) -> Tensor:
        """(K·P, C) token log-probs of `micro` under `model`."""
        return self.tokens(model, micro).logps

    def tokens(self, model: PreTrainedModel, micro: MicroBatch, *, statistics: bool = False) -> TokenScores:
        """Token log-probs of `micro` under `model`, with the scorer's statistics if asked for."""
        head = self.heads.read(model)
        score = self._from_logits if head is None else partial(self._from_hidden, head)
        logps, values = score(model, micro, self.statistics if statistics else ())  # (N,), S of (N,)
        rows = [_to_rows(each.to(logps.dtype), micro) for each in values]
        return TokenScores(
            _to_rows(logps, micro), torch.stack(rows) if rows else logps.new_zeros(0, *micro.completion_mask.shape)
        )

    def _from_hidden(
        self, head: Head, model: PreTrainedModel, micro: MicroBatch, statistics: Sequence[str]
    ) -> tuple[Tensor, list[Tensor]]:
        scored = linear_logprob(
            scored_hidden(model, head, micro),
            head.weight,
            micro.targets,
            bias=head.bias,
            logit_scale=head.logit_scale,
            softcap=head.softcap,
            ignore_index=None,
            backend=self.backend,
            stats=statistics,
            workspace=self.workspace,
        )
        return (scored, []) if isinstance(scored, Tensor) else (scored[0], [scored[1][name] for name in statistics])

    def _from_logits(
        self, model: PreTrainedModel, micro: MicroBatch, statistics: Sequence[str]
    ) -> tuple[Tensor, list[Tensor]]:
        logits = completion_logits(model, micro)
        logps = selective_logprob(logits, micro.targets, ignore_index=None, backend=self.backend)
        with torch.no_grad():
            values = distribution_statistics(logits.detach().float(), micro.targets, statistics)
        return logps, [values[name] for name in statistics]

    def fill_policy(self, scores: Scores, result: TokenScores, micro: MicroBatch) -> None:
        """Write the policy's detached results for `micro` into `scores`."""
        at, token_logps = micro.indices, result.logps.detach().to(scores.logps)
        scores.logps[:, at] = micro.by_example((token_logps * self.weights(micro)).sum(1))
        scores.sums[:, at] = micro.by_example(token_logps.sum(1))
        if self.statistics:
            scores.statistics[..., at] = micro.by_example(result.statistics.sum(2).to(scores.statistics))

    def fill_reference(self, scores: Scores, result: TokenScores, micro: MicroBatch) -> None:
        """Write the reference's results for `micro` into `scores`."""
        logps = (result.logps * self.weights(micro)).sum(1)
        scores.ref_logps[:, micro.indices] = micro.by_example(logps).to(scores.ref_logps)


def _to_rows(values: Tensor, micro: MicroBatch) -> Tensor:
    """(N,) values in row order → (K·P, C), 0 elsewhere."""
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
