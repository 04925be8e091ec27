"""What `fastdpo estimate` is asked: a run, as far as its memory and time depend on it, and the cards it is to fit into.

Strings and numbers as an option file holds them come in; sizes in bytes, a `Device` and a `PairShape` go out.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch

from fastdpo.estimate.devices import GPUS, Device
from fastdpo.estimate.rows import MAX_LENGTH, PairShape
from fastdpo.training.options import FastDPOConfig
from fastdpo.training.options.fields import is_set, like
from fastdpo.training.options.kinds import check_fields
from fastdpo.training.options.sizes import (
    DEFAULT_MICRO_BATCH_TOKENS,
    bytes_of,
    check_lengths,
    check_micro_batch_tokens,
    check_offloading,
    head_workspace_bytes,
)
from fastdpo.training.options.unused import without_effect

#: The most cards that are compared, pairs of a step, and digits of a budget; more is a slip of the keyboard.
MAX_CARDS, MAX_PAIRS, MAX_DIGITS = 32, 2**24, 18
_CPU = "cpu"
_NAMES = [_CPU, *(gpu.name for gpu in GPUS)]


@dataclass
class EstimateConfig:
    """What is trained how; names and defaults as in FastDPOConfig."""

    _argument_group_name: ClassVar = "run"

    gpu_memory: list[str] = field(
        default_factory=list,
        metadata={"help": "Memory of one card or of several, such as 12GB or 8GB 24GiB: print what fits into each."},
    )
    device: str = field(
        default="auto",
        metadata={
            "help": "Whose rates the time split takes; cpu: this machine, and its memory. auto: rtx-3060 with "
            "--gpu_memory or where torch sees a GPU, else cpu.",
            "choices": ["auto", *_NAMES],
        },
    )
    max_length: int = like(FastDPOConfig, "max_length")
    max_prompt_length: int | None = like(
        FastDPOConfig, "max_prompt_length", "Prompt tokens of the longest pair. None: half of max_length."
    )
    micro_batch_tokens: str = like(
        FastDPOConfig,
        "micro_batch_tokens",
        "Tokens per forward with gradients; a longer pair goes alone. auto: the most that fits into the (first) "
        f"--gpu_memory, and {DEFAULT_MICRO_BATCH_TOKENS} without one.",
    )
    per_device_train_batch_size: int = like(FastDPOConfig, "per_device_train_batch_size", "Pairs per optimizer step.")
    gradient_checkpointing: str = like(
        FastDPOConfig, "gradient_checkpointing", "true, false, or auto: where the longest pair does not fit without."
    )
    activation_offloading: bool = like(FastDPOConfig, "activation_offloading")
    offload_embeddings: bool = like(FastDPOConfig, "offload_embeddings")
    lean_body: str = like(
        FastDPOConfig, "lean_body", "Layers of known architectures with less memory: auto, on or off, as in training."
    )
    longest_pair: bool = field(
        default=False,
        metadata={
            "help": "Print the longest pair that each --gpu_memory holds, of max_length's proportions, alone in its "
            "micro-batch, and nothing else."
        },
    )
    head_workspace: str = like(
        FastDPOConfig, "head_workspace", "On a GPU, what the head's exponentials of a chunk may take."
    )
    bf16: bool | None = like(FastDPOConfig, "bf16", "bfloat16 autocast. Default: on for a GPU.")
    router_aux_loss_coef: float | None = like(FastDPOConfig, "router_aux_loss_coef")
    ignore_unused_options: bool = like(FastDPOConfig, "ignore_unused_options")
    demo: bool = field(
        default=False,
        metadata={"help": "Start from the settings of `fastdpo demo`. Only as a flag; others override it."},
    )
    json: bool = field(default=False, metadata={"help": "Print the figures as JSON, in bytes and seconds."})

    def __post_init__(self) -> None:
        check_fields(self)
        self._check_magnitudes()
        check_lengths(
            self, least="at least 1.", names=("max_length", "max_prompt_length", "per_device_train_batch_size")
        )
        check_micro_batch_tokens(self.micro_batch_tokens)
        check_offloading(self)
        head_workspace_bytes(self.head_workspace)
        if self.on_cpu and self.head_workspace != type(self).head_workspace:
            without_effect(self, "head_workspace", "it is of a GPU, and device is the CPU; drop it.")
        if self.on_cpu and self.activation_offloading:
            without_effect(self, "activation_offloading", "it needs a GPU; on a CPU there is nowhere to move to.")
        if self.on_cpu and self.offload_embeddings:
            without_effect(self, "offload_embeddings", "it needs a GPU; on a CPU there is nowhere to move to.")
        self._check_longest_pair()
        if self.on_cpu and self.gpu_memory:
            without_effect(self, "gpu_memory", "device='cpu'; name a GPU or neither.")
        self.cards()

    def _check_longest_pair(self) -> None:
        if not self.longest_pair:
            return
        if not self.gpu_memory:
            raise ValueError("longest_pair=True is for cards: name one or several, such as --gpu_memory 12GB.")
        for name in ("micro_batch_tokens", "per_device_train_batch_size"):
            if is_set(self, name):
                without_effect(self, name, "the longest pair is alone in its micro-batch. Drop it, or longest_pair.")

    def _check_magnitudes(self) -> None:
        """Raise ValueError for what is beyond any run, before anything is computed with it."""
        most = {"max_length": MAX_LENGTH, "max_prompt_length": MAX_LENGTH, "per_device_train_batch_size": MAX_PAIRS}
        for name, bound in most.items():
            if (getattr(self, name) or 0) > bound:
                raise ValueError(f"{name} is more than {bound:,}, the most that is predicted for; lower it.")
        if len(self.gpu_memory) > MAX_CARDS:
            raise ValueError(f"gpu_memory names {len(self.gpu_memory)} cards; at most {MAX_CARDS} at once.")
        if len(self.micro_batch_tokens) > MAX_DIGITS:
            raise ValueError(f"micro_batch_tokens has more than {MAX_DIGITS} digits; 'auto' or a number of tokens.")

    @property
    def on_cpu(self) -> bool:
        """Whether the run is on this machine's CPU."""
        if self.device == "auto":
            return not self.gpu_memory and not torch.cuda.is_available()
        return self.device == _CPU

    def cards(self) -> dict[str, int]:
        """`gpu_memory` in bytes, by what was written. Raises ValueError for what is no size."""
        return {text: _size(text) for text in self.gpu_memory}

    def gpu(self) -> Device:
        """The GPU whose rates are taken."""
        return next((gpu for gpu in GPUS if gpu.name == self.device), GPUS[0])

    def shape(self) -> PairShape:
        """The longest pair."""
        return PairShape.longest(self.max_length, self.max_prompt_length)


def _size(text: str) -> int:
    size = bytes_of("gpu_memory", text)
    if size <= 0:
        raise ValueError(f"gpu_memory={text!r}: a positive size such as 12GB.")
    return size
