"""Bytes that one micro-batch of training takes beyond weights, gradients and optimizer: counted, not assumed.

The body runs forward over a row of prefix-sharing pairs, `linear_logprob` scores the completions, and the backward
follows, through the modules and kernels' schemas that training uses. `LiveBytes` counts what is alive:
    kept        at the end of the forward: everything that the backward needs
    peak        the most at any moment of forward and backward
Both are linear in the tokens of a row of pairs of one shape. `ConfigCounter` counts without weights, on two shallow
models, and extrapolates over the layers; and rows of up to `counted_tokens`, beyond which it draws the line on: what it
takes itself is bounded, whatever is asked.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from fastdpo.estimate.skeleton import Skeleton, has_equal_layers, plain_head, with_layers
from fastdpo.loss.logprobs import linear_logprob
from fastdpo.ops.linear_logprob.tiles import WORKSPACE
from fastdpo.training.memory.counting import Line, LiveBytes, workspaces
from fastdpo.training.memory.head_workspace import head_workspace_of, trained_head_workspace
from fastdpo.training.options import ModelConfig
from fastdpo.training.rows.attention import Segment, Segments, UnsupportedAttention, segments_active
from fastdpo.training.scoring.head import Head

#: The longest sequence that is counted.
MAX_LENGTH = 2**20
#: Tokens and pairs of the longest row that is counted, though never fewer pairs than MIN_PAIRS.
COUNTED_TOKENS, COUNTED_PAIRS, MIN_PAIRS = 2**20, 32, 4


@dataclass(frozen=True)
class PairShape:
    """Tokens of a pair's prompt and of each of its completions."""

    prompt: int
    completion: int

    @property
    def tokens(self) -> int:
        """Of the pair in a row that shares the prompt."""
        return self.prompt + 2 * self.completion

    def scaled(self, tokens: int) -> PairShape:
        """A pair of `tokens` tokens and the same proportions, to the token."""
        completion = max(1, round(tokens * self.completion / self.tokens))
        return PairShape(max(0, tokens - 2 * completion), completion)

    @classmethod
    def longest(cls, max_length: int, max_prompt_length: int | None) -> PairShape:
        """Both rows at `max_length`, the prompt at `max_prompt_length` (half of `max_length` where there is none)."""
        prompt = min(max_prompt_length or max_length // 2, max_length - 1)
        return cls(prompt, max_length - prompt)


@dataclass(frozen=True)
class Row:
    """A row of `tokens` tokens: pairs of one shape side by side, and the last one cut to what is left."""

    tokens: int
    shape: PairShape

    def pairs(self) -> list[tuple[int, int, int]]:
        """(prompt, chosen, rejected) tokens of each."""
        whole, rest = divmod(self.tokens, self.shape.tokens)
        pairs = [(self.shape.prompt, self.shape.completion, self.shape.completion)] * whole
        if rest:
            prompt = -(-rest * self.shape.prompt // self.shape.tokens)
            pairs.append((prompt, (rest - prompt + 1) // 2, (rest - prompt) // 2))
        return pairs

    def segments(self) -> Segments:
        """Two per pair."""
        items, start = [], 0
        for prompt, chosen, rejected in self.pairs():
            middle = start + prompt + chosen
            items.append(Segment(start, middle))
            items.append(Segment(middle, middle + rejected, start, start + prompt))
            start = middle + rejected
        return Segments.build(1, self.tokens, items, torch.device("cpu"))

    @property
    def scored(self) -> int:
        """Completion tokens: rows that reach the head."""
        whole, rest = divmod(self.tokens, self.shape.tokens)
        return whole * 2 * self.shape.completion + rest - -(-rest * self.shape.prompt // self.shape.tokens)


def counted_tokens(shape: PairShape) -> int:
    """Tokens of the longest row of such pairs that is counted, an even number of pairs; of longer ones by its line."""
    pairs = min(COUNTED_PAIRS, COUNTED_TOKENS // shape.tokens // 2 * 2)
    return max(MIN_PAIRS, pairs) * shape.tokens


@dataclass(frozen=True)
class Live:
    """Bytes at the end of the forward, at the peak of forward and backward, and at the peak of a forward alone."""

    kept: int
    peak: int
    scoring_peak: int

    def extrapolated(self, other: Live, steps: int) -> Live:
        """`steps` times the difference to `other` further on."""
        return Live(
            *(
                getattr(other, each.name) + steps * (getattr(other, each.name) - getattr(self, each.name))
                for each in fields(self)
            )
        )


@dataclass(frozen=True)
class ActivationModel:
    """`Live` as lines over the tokens of a row."""

    kept: Line
    peak: Line
    scoring_peak: Line

    @classmethod
    def through(cls, first: tuple[int, Live], second: tuple[int, Live]) -> ActivationModel:
        """The lines through two counts (tokens, `Live`)."""
        return cls(
            *(
                Line.through((first[0], getattr(first[1], name)), (second[0], getattr(second[1], name)))
                for name in ("kept", "peak", "scoring_peak")
            )
        )

    def at(self, tokens: int) -> Live:
        """What a row of `tokens` tokens takes."""
        return Live(self.kept.at(tokens), self.peak.at(tokens), self.scoring_peak.at(tokens))


def count_live(model: PreTrainedModel, row: Row, *, workspace: int = WORKSPACE, **options: Any) -> Live:
    """Bytes alive while one micro-batch is trained on, and while it is only scored. `options`: as `micro_batch`'s."""
    head = head_workspace_of(on_gpu=options.get("flash", False), workspace=workspace)
    counted: dict[Any, Callable[..., int]] = {
        **workspaces(),
        torch.ops.fastdpo.linear_logprob.default: head,
        torch.ops.fastdpo.linear_logprob_backward.default: partial(trained_head_workspace, head),
    }
    with micro_batch(model, row, **options) as forward:
        with LiveBytes(counted) as scoring, torch.no_grad():
            forward()
        with LiveBytes(counted) as training:
            loss = forward().sum()
            kept = training.live
            loss.backward()
    return Live(kept, training.peak, scoring.peak)


@contextlib.contextmanager
def micro_batch(
    model: PreTrainedModel,
    row: Row,
    *,
    head: Head | None = None,
    flash: bool = False,
    autocast: torch.dtype | None = None,
    mode: Callable[[], AbstractContextManager[Any]] = contextlib.nullcontext,
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
    with segments_active([model]), mode(), _autocast(autocast):
        targets = torch.zeros(row.scored, dtype=torch.int64)
        for p in trained:
            p.grad = torch.zeros_like(p)

        def forward() -> Tensor:
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


#: Layers of the two models that stand for a deep one of equal layers.
SHALLOW = (2, 3)


@dataclass(frozen=True)
class Training:
    """How a model is trained, as far as its activations depend on it.

    options: quantisation and LoRA. dtype: of what is not quantised, and of 4-bit compute. autocast: its dtype, or None.
    flash: as `micro_batch` takes it. checkpointing: every layer is recomputed in the backward. workspace: bytes that a
    GPU's head may take for exponentials.
    """

    options: ModelConfig
    dtype: torch.dtype
    autocast: torch.dtype | None = None
    flash: bool = False
    checkpointing: bool = False
    workspace: int = WORKSPACE


class ConfigCounter:
    """Counts `Live` for a configuration; the skeletons are built once."""

    def __init__(self, config: PretrainedConfig, training: Training) -> None:
        self.training = training
        self._counts: dict[Row, Live] = {}
        self._lines: dict[tuple[PairShape, int], ActivationModel] = {}
        self.layers: int = config.get_text_config().num_hidden_layers
        depths = SHALLOW if self.layers > SHALLOW[-1] and has_equal_layers(config) else (self.layers,)
        self.skeletons = [self._skeleton(with_layers(config, depth)) for depth in depths]

    def _skeleton(self, config: PretrainedConfig) -> Skeleton:
        made = Skeleton(config, self.training.options, self.training.dtype)
        if self.training.checkpointing:
            made.checkpoint_layers()
        return made

    def count(self, row: Row) -> Live:
        """`count_live` at full depth."""
        if row.tokens > (most := counted_tokens(row.shape)):
            return self._lines_between(row.shape, most // 2, most).at(row.tokens)
        if row not in self._counts:
            found = [self._counted(each, row) for each in self.skeletons]
            deep = len(found) > 1
            self._counts[row] = found[0].extrapolated(found[1], self.layers - SHALLOW[1]) if deep else found[0]
        return self._counts[row]

    def _counted(self, skeleton: Skeleton, row: Row) -> Live:
        try:
            return count_live(skeleton.model, row, workspace=self.training.workspace, **self.options(skeleton))
        except UnsupportedAttention as error:  # a model that is trained in padded rows
            raise ValueError(f"the memory of this model cannot be predicted: {error}") from error

    def options(self, skeleton: Skeleton) -> dict[str, Any]:
        """The options of `micro_batch` for one of the skeletons."""
        return {
            "head": skeleton.head,
            "flash": self.training.flash,
            "autocast": self.training.autocast,
            "mode": lambda: skeleton.mode,
        }

    def lines(self, shape: PairShape) -> ActivationModel:
        """Through a row of two pairs and a row of four."""
        return self._lines_between(shape, 2 * shape.tokens, 4 * shape.tokens)

    def _lines_between(self, shape: PairShape, first: int, second: int) -> ActivationModel:
        if (shape, first) not in self._lines:
            ends = ((size, self.count(Row(size, shape))) for size in (first, second))
            self._lines[shape, first] = ActivationModel.through(*ends)
        return self._lines[shape, first]


def _autocast(dtype: torch.dtype | None) -> AbstractContextManager[Any]:
    return contextlib.nullcontext() if dtype is None else torch.autocast("cpu", dtype)
