"""Which layout of rows a run uses: what the options ask for, what the models allow, and a check on the first batch.

Prefix sharing and packing need attention that keeps the sequences of a row apart, and positions that restart. Models
that mix tokens otherwise (a recurrent state, convolutions, ALiBi, virtual tokens) cannot have them. Where the models
can, attention goes by segments, or by a dense mask where it has more to it than a softmax over keys. Either is compared
once with one row per completion, on examples of the first batch; what differs is not used.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from fastdpo.training.models.dropout import without_dropout
from fastdpo.training.models.unwrapped import base_model, model_class
from fastdpo.training.options import FastDPOConfig
from fastdpo.training.ranks import Ranks
from fastdpo.training.rows.attention import UnsupportedAttention, segments_active
from fastdpo.training.rows.batch import TokenBatch
from fastdpo.training.rows.layout import PLAIN, Layout, MicroBatch

logger = logging.getLogger(__name__)

#: Kinds of layers in transformers' `layer_types` whose tokens meet in attention only.
_LAYER_TYPES = frozenset(("full_attention", "sliding_attention"))
#: Attention implementations of transformers that take a dense 4-D mask.
_MASKED_ATTENTION = ("sdpa", "eager")
#: Examples and tokens of the comparison.
_CHECKED_EXAMPLES, _CHECKED_TOKENS = 2, 1024
#: Largest mean difference per token log-prob in it. Float32 differs by rounding, 1e-6 to 1e-5 a token; in 16 bits every
#: layer rounds, and sums in another order differ by about 0.01. A row that sees a wrong token differs by 0.1 and more.
_TOLERANCES = {torch.float32: 1e-3, torch.float64: 1e-6}
_TOLERANCE_16_BITS = 5e-2


def obstacle(model: nn.Module) -> str:
    """Why rows of `model` cannot hold more than one sequence, whatever its attention, or ""."""
    base = base_model(model)
    config = base.config.get_text_config()
    if isinstance(model, PeftModel) and model.active_peft_config.is_prompt_learning:
        return "its adapter prepends virtual tokens"
    if getattr(base, "_is_stateful", False):
        return "it carries a recurrent state along the row"
    if other := sorted(set(getattr(config, "layer_types", None) or ()) - _LAYER_TYPES):
        return f"it has layers of type {', '.join(other)}"
    if getattr(config, "alibi", False) or config.model_type in ("bloom", "mpt"):
        return "its ALiBi counts distances along the row"
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = {each.get("rope_type") for each in (rope, *(v for v in rope.values() if isinstance(v, dict)))}
    if kinds & {"dynamic", "longrope"}:
        return "its rotary frequencies depend on the longest position in the micro-batch"
    return ""


def segment_obstacle(model: nn.Module, keeps_dropout: bool) -> str:
    """Why the attention of `model` cannot go by segments, or ""."""
    base = base_model(model)
    config = base.config.get_text_config()
    if not all(m._supports_attention_backend for m in base.modules() if isinstance(m, PreTrainedModel)):
        return "it does not call its attention through transformers' AttentionInterface"
    if getattr(config, "attn_logit_softcapping", None) is not None:
        return "it caps its attention logits"
    if keeps_dropout and any(getattr(config, name, 0.0) for name in ("attention_dropout", "attn_pdrop")):
        return "it drops attention weights at random"
    return ""


class TokenScorer(Protocol):
    """What the comparison scores with."""

    def prepare(self, model: PreTrainedModel) -> None:
        """What is settled on the first sight of a model, while it attends in its own way."""

    def token_logps(self, model: PreTrainedModel, micro: MicroBatch) -> Tensor:
        """(K·P, C) token log-probs of a micro-batch."""


class LayoutChoice:
    """Settles on one layout for all models of a run, on the first batch, alike on all ranks.

    Args:
        args: the run's options.
        scorer: of token log-probs.
        models: that are to score in the layout.
        ranks: that choose together.
        autocast: the run's precision.

    Raises ValueError, from `settle`, where prefix_sharing="on" or packing="on" cannot be had; the message says why.
    """

    def __init__(
        self,
        args: FastDPOConfig,
        scorer: TokenScorer,
        models: Sequence[PreTrainedModel],
        ranks: Ranks,
        autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        self.args, self.scorer, self.models, self.ranks, self.autocast = args, scorer, list(models), ranks, autocast
        self._settled: Layout | None = None
        self._demanded = [name for name in ("prefix_sharing", "packing") if getattr(args, name) == "on"]

    @property
    def layout(self) -> Layout:
        """The layout in use; `settle` comes first."""
        assert self._settled is not None
        return self._settled

    def active(self) -> AbstractContextManager[None]:
        """Within it, forwards and backwards of micro-batches in this layout work."""
        return nullcontext() if self.layout.plain or self.layout.masked else segments_active(self.models)

    def settle(self, batch: TokenBatch) -> Layout:
        """Choose and check on the examples of `batch`; later calls return the same."""
        if self._settled is None:
            for model in self.models:
                self.scorer.prepare(model)
            self._settled = self._choose(batch)
            logger.info("rows of a micro-batch: %s", self._settled)
        return self._settled

    def _choose(self, batch: TokenBatch) -> Layout:
        wanted = Layout(self.args.prefix_sharing != "off", self.args.packing != "off")
        if wanted.plain:
            return PLAIN
        refusals: list[str] = []
        for candidate, reason in self._candidates(wanted):
            if not reason:
                reason = self._mismatch(candidate, batch)
                if not reason:
                    if refusals:
                        logger.info("%s: %s", candidate, "; ".join(refusals))
                    return candidate
                logger.warning("%s is not used: %s.", candidate, reason)
            refusals.append(f"{candidate}: {reason}")
        told = "; ".join(refusals)
        if self._demanded:
            raise ValueError(f"{self._demanded[0]}='on' cannot be had: {told}. Set it to 'auto' or 'off'.")
        logger.info("one row per answer: %s", told)
        return PLAIN

    def _candidates(self, wanted: Layout) -> list[tuple[Layout, str]]:
        """Layouts in the order of preference, each with what speaks against it or ""."""
        # A dense mask over several examples costs more than padding, so packing then waits to be asked for
        packed = self.args.packing == "on"
        masked = Layout(wanted.sharing, packed, masked=True)
        named = [(model_class(model), model) for model in self.models]
        for name, model in named:
            if reason := obstacle(model):
                return [(wanted, f"{name}: {reason}")]
        keeps_dropout = not self.args.disable_dropout
        by_segments = [f"{name}: {r}" for name, model in named if (r := segment_obstacle(model, keeps_dropout))]
        by_mask = [
            f"{name}: its attention implementation {own!r} takes no dense mask"
            for name, model in named
            if (own := base_model(model).config._attn_implementation) not in _MASKED_ATTENTION
        ]
        candidates = [(wanted, "; ".join(by_segments)), (masked, "; ".join(by_mask))]
        return [(layout, reason) for layout, reason in candidates if not layout.plain]

    def _mismatch(self, layout: Layout, batch: TokenBatch) -> str:
        """How log-probs in `layout` differ from those with one row per completion, on any rank, or ""."""
        reason = ""
        try:
            found = self._logps(layout, batch)
        except UnsupportedAttention as error:
            reason = str(error)
        else:
            expected = self._logps(PLAIN, batch)
            difference = float((found - expected).abs().mean())
            tolerance = _TOLERANCES.get(self._dtype(), _TOLERANCE_16_BITS)
            both_unfinite = not (bool(found.isfinite().all()) or bool(expected.isfinite().all()))
            # A model full of NaN is the step's matter, not the layout's
            if not (difference <= tolerance or both_unfinite):
                reason = f"log-probs differ from those of unshared rows by {difference:.3g} a token on average"
        return next((each for each in self.ranks.gathered_objects(reason) if each), "")

    def _logps(self, layout: Layout, batch: TokenBatch) -> Tensor:
        """(N,) token log-probs of a few short examples of `batch` under every model."""
        tokens = batch.tokens(PLAIN)
        by_length = sorted(range(len(batch)), key=tokens.__getitem__)
        subset = by_length[:_CHECKED_EXAMPLES]
        if tokens[subset[-1]] > _CHECKED_TOKENS:
            subset = subset[:1]
        context = nullcontext() if layout.plain or layout.masked else segments_active(self.models)
        logps = []
        with torch.no_grad(), context:
            for model in self.models:
                for micro in batch.cut(10**9, subset, layout):
                    with without_dropout(model), self.autocast():
                        rows = self.scorer.token_logps(model, micro)
                    lengths = micro.completion_mask.sum(1).tolist()
                    completions = [row[:length].float() for row, length in zip(rows, lengths, strict=True)]
                    count = len(micro)
                    for member in sorted(range(count), key=micro.members.__getitem__):
                        logps += completions[member::count]
        return torch.cat(logps)

    def _dtype(self) -> torch.dtype:
        with self.autocast():
            kind = self.ranks.device.type  # the embedding's own may be on the host
            if torch.is_autocast_enabled(kind):
                return torch.get_autocast_dtype(kind)
        return base_model(self.models[0]).get_input_embeddings().weight.dtype
