"""`Live` of any row of any depth, out of a few counts of short rows of shallow models.

Over layers: models of equal layers are counted with two and with three, and the rest is the same again. Where one more
layer keeps its input and nothing else, as checkpointed lean ones do, one such difference says it for every row.
Over tokens, on a GPU: beyond a few slices of the body every place's bytes are linear in the tokens of a row, in those
that are scored and in its sequences, so four counts give them all. On a CPU attention's masks grow with the square of a
sequence: there a long row of several pairs is on the line through shorter ones.
What counting takes itself is bounded, whatever is asked.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property, partial
from typing import Any

import torch
from transformers import PretrainedConfig

from fastdpo.estimate.activations import Counts, HeadWorkspace, Live, count_sites
from fastdpo.estimate.rows import PairShape, Row
from fastdpo.estimate.skeleton import Skeleton, has_equal_layers, with_layers
from fastdpo.ops.linear_logprob.tiles import WORKSPACE
from fastdpo.training.body.mlp import SMALL_MEMORY, Tiles
from fastdpo.training.options import ModelConfig
from fastdpo.training.rows.attention import UnsupportedAttention

#: Layers of the two models that stand for a deep one of equal layers.
SHALLOW = (2, 3)
#: On a CPU: tokens and pairs of the longest row that is counted, though never fewer pairs than MIN_PAIRS.
COUNTED_TOKENS, COUNTED_PAIRS, MIN_PAIRS = 2**20, 32, 4
#: On a GPU: tokens of a slice, where the body has none, and slices in the rows that are counted. Two are enough for a
#: place to see what the slice before it left.
_SLICE, _SLICES = 704, (2, 3, 4)
#: Tokens of a slice beyond which rows are counted as if there were none: of models so narrow that it does not matter.
LARGEST_SLICE = 2**16
#: Steps in which the share of prompts in a row is counted.
_SHARES = 32


@dataclass(frozen=True)
class Training:
    """How a model is trained, as far as its activations depend on it.

    options: quantisation and LoRA. dtype: of what is not quantised, and of 4-bit compute. autocast: its dtype, or None.
    flash: as `micro_batch` takes it. checkpointing: every layer is recomputed in the backward. workspace: bytes that a
    GPU's head may take for exponentials. lean_body: the option. offload_embeddings: they are looked up on the host.
    gpu_memory: of the card, from which the lean body's slices follow; None: one that is not small, or a CPU's.
    """

    options: ModelConfig
    dtype: torch.dtype
    autocast: torch.dtype | None = None
    flash: bool = False
    checkpointing: bool = False
    workspace: int = WORKSPACE
    lean_body: str = "auto"
    offload_embeddings: bool = False
    gpu_memory: int | None = None

    @property
    def tiles(self) -> Tiles:
        """Of the lean body, as a run has them."""
        return Tiles.on_gpu(self.gpu_memory or SMALL_MEMORY) if self.flash else Tiles.on_cpu()


def counted_tokens(shape: PairShape) -> int:
    """Tokens of the longest row of such pairs that is counted on a CPU, an even number of pairs; of longer ones by its
    line."""
    pairs = min(COUNTED_PAIRS, COUNTED_TOKENS // shape.tokens // 2 * 2)
    return max(MIN_PAIRS, pairs) * shape.tokens


class RowForm:
    """Rows that stand for all longer ones of about the same share of prompts, and the weights of their counts.

    A row of T tokens, N of them scored, in S sequences has the bytes a·T + b·N + c·S + d of every place.

    shape: of the rows' pairs. size: tokens of a slice, a multiple of 64; slices are of full size, as they nearly are in
    longer rows.
    """

    def __init__(self, shape: PairShape, size: int) -> None:
        share = min(max(1, round(_SHARES * shape.prompt / shape.tokens)), _SHARES - 1)
        other = share - 1 if share > 1 else share + 1

        def pair(share: int, tokens: int) -> PairShape:
            prompt = tokens // _SHARES * share
            return PairShape(prompt, (tokens - prompt) // 2)

        few, more, most = (count * size for count in _SLICES)
        self.rows = [
            Row(few, pair(share, few)),
            Row(more, pair(share, more)),
            Row(few, pair(other, few)),
            Row(most, pair(share, most // 2)),
        ]
        self.share = share

    def weights(self, row: Row) -> list[Fraction]:
        """Of the counts of `rows`, for `row`: those with which their (T, N, S, 1) sum to its own."""
        short, long, other, pairs = self.rows
        by_sequence = Fraction(row.sequences - long.sequences, pairs.sequences - long.sequences)
        longer = row.tokens - long.tokens - by_sequence * (pairs.tokens - long.tokens)
        by_length = longer / (long.tokens - short.tokens)
        scored = long.scored + by_length * (long.scored - short.scored) + by_sequence * (pairs.scored - long.scored)
        by_scored = (row.scored - scored) / (other.scored - short.scored)
        return [-by_length - by_scored, 1 + by_length - by_sequence, by_scored, by_sequence]


class ConfigCounter:
    """Counts `Live` for a configuration; the skeletons are built once."""

    def __init__(self, config: PretrainedConfig, training: Training) -> None:
        self.training = training
        self._counts: dict[Row, Counts] = {}
        self._forms: dict[int, RowForm] = {}
        #: 1 where one more layer's input is alive, 0 elsewhere, if layers keep nothing else.
        self._keepers: Counts | None = None
        text = config.get_text_config()
        self.layers, self.hidden = int(text.num_hidden_layers), int(text.hidden_size)
        depths = SHALLOW if self.layers > SHALLOW[-1] and has_equal_layers(config) else (self.layers,)
        self.skeletons = [self._skeleton(with_layers(config, depth)) for depth in depths]

    def _skeleton(self, config: PretrainedConfig) -> Skeleton:
        made = Skeleton(
            config,
            self.training.options,
            self.training.dtype,
            lean_body=self.training.lean_body,
            tiles=self.training.tiles,
        )
        if self.training.checkpointing:
            made.checkpoint_layers()
        return made

    @cached_property
    def head(self) -> HeadWorkspace:
        """What the head takes within itself."""
        one = self.skeletons[0]
        return HeadWorkspace(one.model, one.head, on_gpu=self.training.flash, workspace=self.training.workspace)

    def count(self, row: Row, *, by_form: bool = False) -> Live:
        """`count_live` at full depth. by_form: what longer rows say of it, without a count of its own, on a GPU."""
        return self.sites(row, by_form=by_form).live(partial(self.head.bytes, row.scored))

    def sites(self, row: Row, *, by_form: bool = False) -> Counts:
        """`count_sites` at full depth."""
        if self.training.flash and row.shape.prompt and (by_form or row.tokens > self.form_tokens):
            form = self.form(row.shape)
            needed = [(weight, each) for weight, each in zip(form.weights(row), form.rows, strict=True) if weight]
            return Counts.combined([weight for weight, _ in needed], [self._counted(each) for _, each in needed])
        if by_form or row.tokens > counted_tokens(row.shape):
            most = counted_tokens(row.shape) if row.tokens > counted_tokens(row.shape) else 4 * row.shape.tokens
            steps = Fraction(row.tokens - most, most - most // 2)
            ends = [self._counted(Row(size, row.shape)) for size in (most // 2, most)]
            return Counts.combined([-steps, 1 + steps], ends)
        return self._counted(row)

    @cached_property
    def slice(self) -> int:
        """Tokens that the body computes at a time, or what stands for them."""
        return min(self.skeletons[0].slice_rows() or _SLICE, LARGEST_SLICE)

    @property
    def form_tokens(self) -> int:
        """Tokens of the longest row that is counted on a GPU."""
        return _SLICES[-1] * self.slice

    def form(self, shape: PairShape) -> RowForm:
        """The form of rows of such pairs."""
        made = RowForm(shape, self.slice)
        return self._forms.setdefault(made.share, made)

    def _counted(self, row: Row) -> Counts:
        if row not in self._counts:
            shallow = self._at_depth(self.skeletons[0], row)
            if len(self.skeletons) > 1:
                more = self.layers - SHALLOW[0]
                shallow = Counts.combined([1, more], [shallow, self._one_layer(shallow, row)])
            self._counts[row] = shallow
        return self._counts[row]

    def _one_layer(self, shallow: Counts, row: Row) -> Counts:
        """What one more layer takes in a row. shallow: the row's count with the fewest layers."""
        inputs = row.tokens * self.hidden * self.training.dtype.itemsize
        if self._keepers is not None and self._keepers.training.keys() == shallow.training.keys():
            return Counts.combined([inputs], [self._keepers])
        found = Counts.combined([-1, 1], [shallow, self._at_depth(self.skeletons[1], row)])
        if {found.kept, *found.training.values()} <= {0, inputs} and not any(found.scoring.values()):
            self._keepers = Counts.combined([Fraction(1, inputs)], [found])
        return found

    def _at_depth(self, skeleton: Skeleton, row: Row) -> Counts:
        try:
            return count_sites(skeleton.model, row, **self.options(skeleton))
        except UnsupportedAttention as error:  # a model that is trained in padded rows
            raise ValueError(f"the memory of this model cannot be predicted: {error}") from error

    def options(self, skeleton: Skeleton) -> dict[str, Any]:
        """The options of `micro_batch` for one of the skeletons."""
        return {
            "head": skeleton.head,
            "flash": self.training.flash,
            "autocast": self.training.autocast,
            "mode": partial(_entered, skeleton),
            "body": skeleton.body,
        }


def _entered(skeleton: Skeleton) -> AbstractContextManager[Any]:
    return skeleton.mode
