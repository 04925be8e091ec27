"""Bytes that one micro-batch of training takes beyond weights, gradients and optimizer: counted, not assumed.

The body runs forward over a row of prefix-sharing pairs, `linear_logprob` scores the completions, and the backward
follows, through the modules and kernels' schemas that training uses. `SiteBytes` counts what is alive, place by place:
    kept        at the end of the forward: everything that the backward needs
    peak        the most at any moment of forward and backward
What the head takes within itself follows its plan, which is linear in nothing, and is added to its place.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from fastdpo.estimate.rows import Row
from fastdpo.estimate.sites import Site, SiteBytes
from fastdpo.estimate.skeleton import plain_head
from fastdpo.loss.logprobs import linear_logprob
from fastdpo.ops.linear_logprob.tiles import WORKSPACE
from fastdpo.training.memory.counting import workspaces
from fastdpo.training.memory.head_workspace import forward_options, head_workspace_of, trained_head_workspace
from fastdpo.training.rows.attention import segments_active
from fastdpo.training.scoring.head import Head

_FORWARD = torch.ops.fastdpo.linear_logprob.default
_BACKWARD = torch.ops.fastdpo.linear_logprob_backward.default
_HEAD = frozenset(map(str, (_FORWARD, _BACKWARD)))


@dataclass(frozen=True)
class Live:
    """Bytes at the end of the forward, at the peak of forward and backward, and at the peak of a forward alone."""

    kept: int
    peak: int
    scoring_peak: int


@dataclass(frozen=True)
class Counts:
    """What is known of one micro-batch: bytes kept at the end of the forward, and the most bytes alive after each
    place's operator, in training and in scoring; those of the head without what it takes within itself."""

    kept: int
    training: Mapping[Site, int]
    scoring: Mapping[Site, int]

    @classmethod
    def combined(cls, weights: Sequence[Fraction | int], counts: Sequence[Counts]) -> Counts:
        """The sum of weight x counts, place by place; of places that are in all of `counts`."""

        def sums(found: Sequence[Mapping[Site, int]]) -> dict[Site, int]:
            shared = set(found[0]).intersection(*found[1:])
            return {site: _weighted(weights, [each[site] for each in found]) for site in shared}

        return cls(
            _weighted(weights, [each.kept for each in counts]),
            sums([each.training for each in counts]),
            sums([each.scoring for each in counts]),
        )

    def live(self, within_head: Callable[[str, bool], int]) -> Live:
        """Their maxima. within_head: (operator, training) → bytes that the head's operators take within themselves."""

        def most(peaks: Mapping[Site, int], training: bool) -> int:
            return max(total + within_head(site.operator, training) for site, total in peaks.items())

        return Live(self.kept, most(self.training, True), most(self.scoring, False))


def _weighted(weights: Sequence[Fraction | int], values: Sequence[int]) -> int:
    return round(sum(weight * value for weight, value in zip(weights, values, strict=True)))


class HeadWorkspace:
    """Bytes that the head's operators take within themselves, by the plans that they make for so many rows.

    model, head: the model and its head. on_gpu, workspace: as of `head_workspace_of`.
    """

    def __init__(self, model: PreTrainedModel, head: Head, *, on_gpu: bool, workspace: int) -> None:
        self.weight, self.dtype = head.weight, model.get_input_embeddings().weight.dtype
        self.plan = head_workspace_of(on_gpu=on_gpu, workspace=workspace)

    def bytes(self, rows: int, operator: str = str(_FORWARD), training: bool = True) -> int:
        """Of one of its operators, in training or in scoring; 0 of any other operator."""
        if operator not in _HEAD:
            return 0
        hidden = torch.empty(rows, self.weight.shape[1], dtype=self.dtype, device="meta")
        if operator == str(_BACKWARD):
            return trained_head_workspace(self.plan, hidden, hidden, hidden, hidden, self.weight)
        return self.plan(hidden, self.weight, None, *forward_options(training and not self.weight.requires_grad))


def count_sites(model: PreTrainedModel, row: Row, **options: Any) -> Counts:
    """One micro-batch trained on, and only scored. `options`: as `micro_batch`'s."""
    with micro_batch(model, row, **options) as forward, site_bytes(model) as scoring, torch.no_grad():
        forward()
    with micro_batch(model, row, **options) as forward, site_bytes(model) as training:
        loss = forward().sum()
        kept = training.live
        loss.backward()
    return Counts(kept, training.peaks, scoring.peaks)


def count_live(model: PreTrainedModel, row: Row, *, workspace: int = WORKSPACE, **options: Any) -> Live:
    """Bytes alive while one micro-batch is trained on, and while it is only scored. `options`: as `micro_batch`'s."""
    head = HeadWorkspace(
        model, options.get("head") or plain_head(model), on_gpu=options.get("flash", False), workspace=workspace
    )
    return count_sites(model, row, **options).live(partial(head.bytes, row.scored))


def site_bytes(model: PreTrainedModel, snapshot_at: Site | None = None) -> SiteBytes:
    """The counting mode, with the workspaces that are known but those of the head."""
    return SiteBytes(model, workspaces(), apart=(_FORWARD, _BACKWARD), snapshot_at=snapshot_at)


@contextlib.contextmanager
def micro_batch(
    model: PreTrainedModel,
    row: Row,
    *,
    head: Head | None = None,
    flash: bool = False,
    autocast: torch.dtype | None = None,
    mode: Callable[[], AbstractContextManager[Any]] = contextlib.nullcontext,
    body: Callable[[], AbstractContextManager[Any]] = contextlib.nullcontext,
) -> Iterator[Callable[[], Tensor]]:
    """A function that gives the log-probs (N,) of a micro-batch's completions, to be called within the context.

    Gradients of earlier micro-batches exist meanwhile; the model's own are put back afterwards.

    Args:
        model: a causal LM in training mode, of real tensors on a CPU or of fake ones.
        row: the micro-batch; its ids are 0.
        head: the model's, where it is known; by default it is looked up.
        flash: attention as on a GPU with FlashAttention, not as on a CPU. Only for fake tensors.
        autocast: dtype of autocast, or None.
        mode: the fake tensor mode.
        body: what makes the model's forwards those of training, around the whole.

    Raises ValueError where the head is more than one linear layer.
    """
    head = head or plain_head(model)
    scored = torch.arange(row.tokens - row.scored, row.tokens)
    inputs = {
        "input_ids": torch.zeros(1, row.tokens, dtype=torch.int64),
        "position_ids": torch.arange(row.tokens)[None],
        "segments": replace(row.segments(), in_one_call=flash),
    }
    trained = [p for p in model.parameters() if p.requires_grad]
    own = [p.grad for p in trained]
    with segments_active([model]), body(), mode():
        targets = torch.zeros(row.scored, dtype=torch.int64)
        for p in trained:
            p.grad = torch.zeros_like(p)

        def forward() -> Tensor:
            # Around the forward only, as in a step: what autocast keeps of its casts is freed before the backward
            with _autocast(autocast):
                with head.left_out() as found:
                    model(**inputs, use_cache=False)
                logps = linear_logprob(
                    found[0].flatten(0, 1)[scored],
                    head.weight,
                    targets,
                    bias=head.bias,
                    logit_scale=head.logit_scale,
                    softcap=head.softcap,
                    ignore_index=None,
                    backend="torch",
                )
            assert isinstance(logps, Tensor)
            return logps

        try:
            yield forward
        finally:
            for p, grad in zip(trained, own, strict=True):
                p.grad = grad


def _autocast(dtype: torch.dtype | None) -> AbstractContextManager[Any]:
    return contextlib.nullcontext() if dtype is None else torch.autocast("cpu", dtype)
