"""Peak memory of a training run, part by part, and the largest micro-batch or pair that a given memory holds.

    peak = runtime + weights + quantisation constants + adapters + reference copy + gradients + optimizer
           + activations + head + workspace + allocator                                       (a training micro-batch)
or, where that is more, the same with a scoring micro-batch in the place of the last line, which is then a part of its
own. On a CPU the loading of the model may take more than either, and the files that it maps may stay.

Weights, adapters and activations are counted (`fastdpo.estimate.activations`). What cannot be counted without the
device is assumed, in the constants below, and says so in its note.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace

import psutil
import torch
from torch import nn
from torch.nn import functional
from transformers import AutoTokenizer, PretrainedConfig

from fastdpo.estimate.activations import Live
from fastdpo.estimate.architectures import StoredWeights
from fastdpo.estimate.counter import ConfigCounter, Training
from fastdpo.estimate.rows import MAX_LENGTH, PairShape, Row
from fastdpo.estimate.skeleton import Skeleton, quantization_constants, resident_bytes
from fastdpo.training.memory.arena import ON_DEVICE, arena_bytes
from fastdpo.training.memory.host import HEAP_SHARE
from fastdpo.training.memory.plan import SCORING_BUDGET_FACTOR
from fastdpo.training.models.offloaded_embeddings import check_embeddings_can_stay

MIB = 2**20
#: A CUDA context with the kernels of torch and bitsandbytes, and cuBLAS' workspace. Assumed, never measured.
GPU_RUNTIME = 600 * MIB
#: Share of what comes and goes that the caching allocator loses to fragments. Assumed, never measured.
GPU_FRAGMENTS = 0.1
#: Parts that exist once a model is loaded.
_LOADED = ("runtime", "weights", "quantisation constants")
#: Largest budgets and lengths are found to this many tokens; the shortest pair that is tried.
TOKEN_STEP, MIN_PAIR = 8, 16
#: The most counts by which a size that the form found is corrected.
REFINEMENTS = 8
#: bitsandbytes' 8-bit optimizers: smaller parameters keep float32 states; one float32 constant per block and state.
MIN_8BIT_SIZE, OPTIMIZER_BLOCK = 4096, 256


@dataclass(frozen=True)
class Part:
    """A share of the memory, in bytes."""

    name: str
    bytes: int
    note: str = ""


@dataclass(frozen=True)
class Surroundings:
    """What a run takes beside its tensors.

    runtime: bytes of the process, or of the GPU's context, before a model is loaded; runtime_note: where it comes from.
    stored: the weight files, which are mapped into a process while it loads them; None on a GPU.
    allocator_share: bytes lost to the allocator per byte of what comes and goes.
    """

    runtime: int
    runtime_note: str
    stored: StoredWeights | None = None
    allocator_share: float = 0.0
    allocator_note: str = ""

    @classmethod
    def of_gpu(cls) -> Surroundings:
        """Assumed, as there is none here."""
        return cls(GPU_RUNTIME, "assumed", None, GPU_FRAGMENTS, f"{GPU_FRAGMENTS:.0%} of what comes and goes, assumed")

    @classmethod
    def of_cpu(cls, stored: StoredWeights, tokenizer: str | None = None) -> Surroundings:
        """This process, with what training imports, after a small step of it; tokenizer: a local folder."""
        from fastdpo.training import trainer

        held = [trainer, small_step()]
        if tokenizer is not None:
            held.append(AutoTokenizer.from_pretrained(tokenizer))
        note = f"{HEAP_SHARE:.0%} of what comes and goes stays in the heap"
        return cls(process_bytes(), "this process now", stored, HEAP_SHARE, note)


def process_bytes() -> int:
    """Resident bytes of this process."""
    return int(psutil.Process().memory_info().rss)


def small_step() -> torch.optim.Optimizer:
    """Loads the code that a step of training runs: a 4-bit layer, attention, a backward, an optimizer."""
    from bitsandbytes.nn import Linear4bit

    layer, adapter = Linear4bit(64, 64, bias=False, compute_dtype=torch.float32).to("cpu"), nn.Linear(64, 64)
    optimizer = torch.optim.AdamW(adapter.parameters())
    hidden = (layer(adapter(torch.ones(64, 64)))).view(1, 4, 64, 16)
    functional.scaled_dot_product_attention(hidden, hidden, hidden, is_causal=True).sum().backward()
    optimizer.step()
    return optimizer


@dataclass(frozen=True)
class Run:
    """How much of what is trained at once.

    shape: the longest pair. pairs_per_step: the batch. micro_batch_tokens: the budget; a longer pair goes alone.
    offload: layer inputs, kept by checkpointing, go to the host. optimizer_8bit: paged 8-bit AdamW, else torch's.
    """

    shape: PairShape
    pairs_per_step: int
    micro_batch_tokens: int
    offload: bool = False
    optimizer_8bit: bool = False

    def row(self) -> Row:
        """The largest micro-batch of a training pass."""
        return self._row(self.micro_batch_tokens)

    def scoring_row(self) -> Row:
        """The largest micro-batch of a scoring pass."""
        return self._row(SCORING_BUDGET_FACTOR * self.micro_batch_tokens)

    def _row(self, budget: int) -> Row:
        batch = self.pairs_per_step * self.shape.tokens
        return Row(max(self.shape.tokens, min(budget, batch)), self.shape)


class MemoryEstimator:
    """Predicts a configuration's memory.

    Args:
        config: of the model. training: its quantisation, LoRA, dtypes and checkpointing.
        surroundings: what is there beside the tensors.
    """

    def __init__(self, config: PretrainedConfig, training: Training, surroundings: Surroundings) -> None:
        self.config, self.training, self.surroundings = config, training, surroundings
        self.skeleton = Skeleton(config, training.options, training.dtype)
        if training.offload_embeddings:
            check_embeddings_can_stay(self.skeleton.model, "model_name_or_path")
        self.counter = ConfigCounter(config, training)
        self._of_cards = {training.tiles: self}
        self._resident: dict[bool, list[Part]] = {}

    def on_card(self, memory: int) -> MemoryEstimator:
        """The same for a card of `memory` bytes, which decides how the lean body slices."""
        training = replace(self.training, gpu_memory=memory)
        if training.tiles not in self._of_cards:
            other = copy.copy(self)
            other.training, other.counter = training, ConfigCounter(self.config, training)
            self._of_cards[training.tiles] = other
        return self._of_cards[training.tiles]

    def resident(self, optimizer_8bit: bool) -> list[Part]:
        """What is there at every moment of training."""
        if optimizer_8bit not in self._resident:
            self._resident[optimizer_8bit] = self._count_resident(optimizer_8bit)
        return self._resident[optimizer_8bit]

    def _count_resident(self, optimizer_8bit: bool) -> list[Part]:
        parameters = list(self.skeleton.model.parameters())
        trained, frozen = [p for p in parameters if p.requires_grad], [p for p in parameters if not p.requires_grad]
        size = resident_bytes(iter(trained))
        options = self.training.options
        copied = 0 if options.use_lora and not options.lora_modules_to_save else size
        kind = "paged 8-bit AdamW" if optimizer_8bit else "AdamW"
        return [
            Part("runtime", self.surroundings.runtime, self.surroundings.runtime_note),
            Part("mapped weight file", self._mapped(frozen), "pages that the system can take back"),
            Part("weights", resident_bytes(iter(frozen)) - self._embedding_bytes(), "frozen"),
            Part("quantisation constants", resident_bytes(quantization_constants(self.skeleton.model))),
            Part("adapters" if options.use_lora else "trained weights", size, f"{_count(trained):,} parameters"),
            Part("reference copy", copied, "the trained weights at the start"),
            Part("gradients", size),
            Part("optimizer", sum(_state_bytes(p, optimizer_8bit) for p in trained), kind),
        ]

    def _mapped(self, frozen: list[nn.Parameter]) -> int:
        """Bytes of the weight file that stay mapped beside the weights.

        A weight that is used as it was stored is a view into the file's mapping, and keeps all of it.
        """
        stored = self.surroundings.stored
        if stored is None or stored.dtype != self.training.dtype:
            return 0
        views = resident_bytes(p for p in frozen if p.is_floating_point())
        return stored.bytes - views if views else 0

    def parts(self, run: Run, *, by_form: bool = False) -> list[Part]:
        """All parts; their sum is the predicted peak. by_form: as of `ConfigCounter.count`."""
        row, scoring_row = run.row(), run.scoring_row()
        live = self._offloaded(self.counter.count(row, by_form=by_form), row, run)
        scoring = self.counter.count(scoring_row, by_form=by_form).scoring_peak
        head = self.skeleton.head
        tile = self.counter.head.bytes(row.scored)
        trained = head.weight.requires_grad
        unit = 0 if trained else row.scored * head.weight.shape[1] * self.training.dtype.itemsize
        of_tile = "a chunk of exponentials with its sums" if self.training.flash else "one tile of logits"
        workspace = max(0, live.peak - live.kept - tile)
        above = f"{scoring_row.tokens:,} tokens; what it takes above these"
        moving = [
            Part("activations", live.kept - unit, f"{row.tokens:,} tokens in a micro-batch"),
            Part("head", unit + tile, f"{row.scored:,} scored rows: their gradients, and {of_tile}"),
            Part("workspace of the backward", workspace, "dequantised weights, gradients of activations"),
            Part("scoring pass", max(0, scoring - live.kept - tile - workspace), above),
        ]
        lost = sum(part.bytes for part in moving) * self.surroundings.allocator_share
        moving.append(Part("allocator", round(lost), self.surroundings.allocator_note))
        parts = [*self.resident(run.optimizer_8bit), *moving]
        parts.append(Part("loading", self._loading_above(parts), "mapped weight file; what it takes above these"))
        return [part for part in parts if part.bytes]

    def _loading_above(self, parts: list[Part]) -> int:
        """What loading takes above all of `parts`: on a CPU the whole weight file beside the weights made of it."""
        if self.surroundings.stored is None:
            return 0
        there = sum(part.bytes for part in parts if part.name in _LOADED)
        return max(0, there + self.surroundings.stored.bytes - sum(part.bytes for part in parts))

    def host_parts(self, run: Run) -> list[Part]:
        """What a run on a GPU takes of the host's memory beside the process."""
        text, row = self.config.get_text_config(), run.row()
        inputs = arena_bytes(text.num_hidden_layers, row.tokens, text.hidden_size, self.training.dtype.itemsize)
        parts = [
            Part("layer inputs", inputs if run.offload else 0, f"{row.tokens:,} tokens in a micro-batch, pinned"),
            Part("embeddings", self._embedding_bytes(), "frozen"),
        ]
        return [part for part in parts if part.bytes]

    def _embedding_bytes(self) -> int:
        """Of the embeddings that are kept on the host."""
        if not self.training.offload_embeddings:
            return 0
        return resident_bytes(iter([self.skeleton.model.get_input_embeddings().weight]))

    def total(self, run: Run, *, by_form: bool = False) -> int:
        """The predicted peak in bytes."""
        return sum(part.bytes for part in self.parts(run, by_form=by_form))

    def largest_budget(self, run: Run, memory: int) -> int:
        """The most `micro_batch_tokens` with which `run` fits into `memory` bytes; 0 if not even its longest pair does.

        More than a batch holds is not asked for.
        """
        batch = run.pairs_per_step * run.shape.tokens
        return self._largest(lambda size: replace(run, micro_batch_tokens=size), run.shape.tokens, batch, memory)

    def largest_pair(self, run: Run, memory: int) -> PairShape | None:
        """The longest pair of the same proportions that fits alone, or None.

        Never longer than the model's positions.
        """

        def alone(tokens: int) -> Run:
            return replace(run, shape=run.shape.scaled(tokens), micro_batch_tokens=1)

        stated = getattr(self.config.get_text_config(), "max_position_embeddings", None)
        positions = min(stated or MAX_LENGTH, MAX_LENGTH)
        most = run.shape.tokens * positions // run.shape.context
        tokens = self._largest(alone, min(MIN_PAIR, most), most, memory)
        return run.shape.scaled(tokens) if tokens else None

    def _largest(self, run_of: Callable[[int], Run], least: int, most: int, memory: int) -> int:
        """The largest size in [least, most] whose run fits into `memory`, to TOKEN_STEP; 0 if none does."""
        if sum(part.bytes for part in self.resident(run_of(least).optimizer_8bit)) > memory:
            return 0
        fits, fails = least, most + 1
        if self.total(run_of(most), by_form=True) <= memory:
            fits = most
        while fails - fits > TOKEN_STEP:
            middle = (fits + fails) // 2
            if self.total(run_of(middle), by_form=True) <= memory:
                fits = middle
            else:
                fails = middle
        return self._confirmed(run_of, fits, least, most, memory)

    def _confirmed(self, run_of: Callable[[int], Run], size: int, least: int, most: int, memory: int) -> int:
        """The largest size that fits by a count of its own, near `size`, which the form found.

        For long rows the two are one. Short ones may take less than the form says, which is of whole slices.
        """
        slope = max(1, (self.total(run_of(2 * size), by_form=True) - self.total(run_of(size), by_form=True)) // size)
        fits, fails = 0, most + 1
        last: tuple[int, int] | None = None
        for _ in range(REFINEMENTS):
            total = self.total(run_of(size))
            if total <= memory:
                fits = max(fits, size)
            else:
                fails = min(fails, size)
            if last is not None:  # below a slice rows grow faster than the form says
                slope = max(1, (total - last[1]) // (size - last[0]))
            last = size, total
            steps = (memory - total) // slope
            nearer = int(min(max(size + steps, least, fits), most, fails - 1))
            if 0 <= steps < TOKEN_STEP or nearer == size:
                break
            size = nearer
        return fits

    def _offloaded(self, live: Live, row: Row, run: Run) -> Live:
        """`live` with the inputs of layers on the host, but that of the layer at work and the one that comes next."""
        if not run.offload:
            return live
        text = self.config.get_text_config()
        away = max(0, text.num_hidden_layers - ON_DEVICE)
        moved = away * row.tokens * text.hidden_size * self.training.dtype.itemsize
        return Live(live.kept - moved, live.peak - moved, live.scoring_peak)


def _count(parameters: list[nn.Parameter]) -> int:
    return sum(p.numel() for p in parameters)


def _state_bytes(parameter: nn.Parameter, in_8_bit: bool) -> int:
    """AdamW's two states of a parameter."""
    count = parameter.numel()
    if not in_8_bit:
        return 2 * count * parameter.element_size()
    if count < MIN_8BIT_SIZE:
        return 2 * 4 * count
    return 2 * (count + 4 * -(-count // OPTIMIZER_BLOCK))
