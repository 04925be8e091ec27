"""`fastdpo estimate`: predicted peak memory and time split of a run, without its weights and without a GPU."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from accelerate.utils.modeling import convert_file_size_to_int
from rich.console import Console
from rich.table import Table

from fastdpo.commands.options import make_parser, parse
from fastdpo.estimate.activations import ConfigCounter, PairShape, Training
from fastdpo.estimate.architectures import find_config, known_architectures, stored_weights
from fastdpo.estimate.devices import GPUS, Device, measured_cpu
from fastdpo.estimate.memory import MemoryEstimator, Part, Run, Surroundings
from fastdpo.estimate.timing import KINDS, StepTimes, optimizer_seconds, time_micro_batch
from fastdpo.training.options import FastDPOConfig, ModelConfig
from fastdpo.training.options.fields import check_fields, like
from fastdpo.training.options.sizes import (
    DEFAULT_MICRO_BATCH_TOKENS,
    check_lengths,
    check_micro_batch_tokens,
    check_offloading,
    head_workspace_bytes,
)

_DESCRIPTION = """Predict the peak memory of a training run, part by part, the time split of a step, and the largest
micro-batch and pair that a card holds. Reads a configuration, no weights; needs no GPU.

  fastdpo estimate --model_name_or_path Llama-3-8B --load_in_4bit --gpu_memory 12GB
  fastdpo estimate --model_name_or_path ./model --load_in_4bit --device cpu --micro_batch_tokens 1024"""
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
    head_workspace: str = like(
        FastDPOConfig, "head_workspace", "On a GPU, what the head's exponentials of a chunk may take."
    )
    bf16: bool | None = like(FastDPOConfig, "bf16", "bfloat16 autocast. Default: on for a GPU.")
    demo: bool = field(
        default=False,
        metadata={"help": "Start from the settings of `fastdpo demo`. Only as a flag; others override it."},
    )
    json: bool = field(default=False, metadata={"help": "Print the figures as JSON, in bytes and seconds."})

    def __post_init__(self) -> None:
        check_fields(self)
        check_lengths(
            self, least="at least 1.", names=("max_length", "max_prompt_length", "per_device_train_batch_size")
        )
        check_micro_batch_tokens(self.micro_batch_tokens)
        check_offloading(self)
        head_workspace_bytes(self.head_workspace)
        if self.on_cpu and self.head_workspace != type(self).head_workspace:
            raise ValueError(f"head_workspace={self.head_workspace!r} has no effect with device='cpu'; drop it.")
        if self.on_cpu and self.activation_offloading:
            raise ValueError("activation_offloading=True needs a GPU; on a CPU there is nowhere to move to.")
        if self.on_cpu and self.gpu_memory:
            raise ValueError(f"gpu_memory={self.gpu_memory!r} has no effect with device='cpu'; name a GPU or neither.")
        self.cards()

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
    try:
        size = convert_file_size_to_int(text.upper().replace("IB", "iB"))
    except ValueError as error:
        raise ValueError(f"gpu_memory={text!r}: a size such as 12GB, 24GiB or 8000MB.") from error
    if size <= 0:
        raise ValueError(f"gpu_memory={text!r}: a positive size such as 12GB.")
    return size


@dataclass(frozen=True)
class Fit:
    """What a card holds: micro_batch_tokens at most, and the longest pair alone; 0 and None if nothing fits."""

    gpu_memory: str
    checkpointing: bool
    micro_batch_tokens: int
    longest_pair: PairShape | None


class Estimate:
    """The figures of one call: `parts` sum to the predicted peak, `fits` is for the card, `times` for a step."""

    def __init__(self, model: ModelConfig, config: EstimateConfig) -> None:
        """Raises ValueError, OSError for a model that cannot be predicted."""
        if model.model_name_or_path is None:
            known = ", ".join(known_architectures())
            raise ValueError(f"model_name_or_path is required: a local folder, a hub name, or one of {known}.")
        self.model, self.config = model, config
        self.architecture = find_config(model.model_name_or_path, model.model_revision, model.trust_remote_code)
        self.surroundings = self._surroundings(model.model_name_or_path)
        self.device = measured_cpu(self._dtype()) if config.on_cpu else config.gpu()
        self._estimators: dict[bool, MemoryEstimator] = {}
        self.fits = [
            self._fit(card, memory, checkpointing)
            for card, memory in config.cards().items()
            for checkpointing in (False, True)
            if self._allowed(checkpointing)
        ]
        self.checkpointing = self._checkpointing()
        self.run = dataclasses.replace(self._run(), micro_batch_tokens=self._budget())
        self.parts: list[Part] = self.estimator(self.checkpointing).parts(self.run)
        self.times = self._times()

    def estimator(self, checkpointing: bool) -> MemoryEstimator:
        """The estimator of this model, with or without checkpointing."""
        if checkpointing not in self._estimators:
            on_gpu = not self.config.on_cpu
            bf16 = on_gpu if self.config.bf16 is None else self.config.bf16
            training = Training(
                self.model,
                self._dtype(),
                torch.bfloat16 if bf16 else None,
                flash=on_gpu,
                checkpointing=checkpointing,
                workspace=head_workspace_bytes(self.config.head_workspace),
            )
            self._estimators[checkpointing] = MemoryEstimator(self.architecture, training, self.surroundings)
        return self._estimators[checkpointing]

    def total(self) -> int:
        """The predicted peak in bytes."""
        return sum(part.bytes for part in self.parts)

    def _dtype(self) -> torch.dtype:
        if self.model.dtype == "auto":
            return torch.float32 if self.config.on_cpu else torch.bfloat16
        return getattr(torch, self.model.dtype)

    def _surroundings(self, name: str) -> Surroundings:
        if not self.config.on_cpu:
            return Surroundings.of_gpu()
        folder = Path(name).expanduser()
        tokenizer = str(folder) if (folder / "tokenizer_config.json").is_file() else None
        return Surroundings.of_cpu(stored_weights(name, self.architecture), tokenizer)

    def _allowed(self, checkpointing: bool) -> bool:
        if checkpointing:
            return self.config.gradient_checkpointing != "false"
        return self.config.gradient_checkpointing != "true" and not self.config.activation_offloading

    def _run(self) -> Run:
        tokens = self.config.micro_batch_tokens
        return Run(
            self.config.shape(),
            self.config.per_device_train_batch_size,
            DEFAULT_MICRO_BATCH_TOKENS if tokens == "auto" else int(tokens),
            offload=self.config.activation_offloading,
            optimizer_8bit=not self.config.on_cpu,
        )

    def _fit(self, card: str, memory: int, checkpointing: bool) -> Fit:
        estimator, run = self.estimator(checkpointing), self._run()
        return Fit(card, checkpointing, estimator.largest_budget(run, memory), estimator.largest_pair(run, memory))

    def _checkpointing(self) -> bool:
        if self.config.gradient_checkpointing != "auto" or self.config.activation_offloading:
            return self._allowed(True)
        return bool(self.fits) and not self.fits[0].micro_batch_tokens

    def _budget(self) -> int:
        found = next((fit.micro_batch_tokens for fit in self.fits if fit.checkpointing == self.checkpointing), 0)
        return found if found and self.config.micro_batch_tokens == "auto" else self._run().micro_batch_tokens

    def _times(self) -> StepTimes:
        counter: ConfigCounter = self.estimator(self.checkpointing).counter
        batch = self.run.pairs_per_step * self.run.shape.tokens
        times = StepTimes.of(
            lambda row, training: time_micro_batch(counter, row, self.device, training=training),
            self.run.row(),
            self.run.scoring_row(),
            batch,
        )
        sizes = {part.name: part.bytes for part in self.parts}
        trained = sizes.get("adapters", sizes.get("trained weights", 0))
        times.training["optimizer"] = optimizer_seconds(trained, sizes["optimizer"], self.device)
        return times

    def as_dict(self) -> dict[str, Any]:
        """Everything that is printed, in bytes, tokens and seconds."""
        return {
            "predicted": True,
            "model": self.model.model_name_or_path,
            "device": self.device.label,
            "gradient_checkpointing": self.checkpointing,
            "micro_batch_tokens": self.run.micro_batch_tokens,
            "parts": {part.name: part.bytes for part in self.parts},
            "peak_bytes": self.total(),
            "fits": [dataclasses.asdict(fit) for fit in self.fits],
            "seconds_per_scoring_pass": self.times.scoring,
            "seconds_per_training_pass": self.times.training,
        }


def main(argv: list[str]) -> int:
    """Parse, predict, print. Returns 0; raises what `fastdpo.commands.cli` reports."""
    parser = make_parser("fastdpo estimate", _DESCRIPTION, ModelConfig, EstimateConfig)
    if "--demo" in argv:
        parser.set_defaults(**demo_settings())
    model, config = parse(parser, argv)
    if config.demo and "--demo" not in argv:
        raise ValueError("demo=True acts as the flag --demo only, as it changes the other options' defaults.")
    estimate = Estimate(model, config)
    if config.json:
        print(json.dumps(estimate.as_dict(), indent=1))
    else:
        print_estimate(estimate, Console(highlight=False, soft_wrap=True))
    return 0


def demo_settings() -> dict[str, Any]:
    """What `fastdpo demo` trains, and how."""
    from fastdpo.demo.run import DemoConfig, demo_model, training_arguments

    demo = DemoConfig()
    model, args = demo_model(demo), training_arguments(demo)
    settings = {name: getattr(model, name) for name in ("model_name_or_path", "dtype", "load_in_4bit", "lora_r")}
    own = ("max_length", "max_prompt_length", "micro_batch_tokens", "per_device_train_batch_size")
    return settings | {name: getattr(args, name) for name in own} | {"device": _CPU, "bf16": args.bf16}


def print_estimate(estimate: Estimate, console: Console) -> None:
    """Tables of the parts, of what fits, and of the time split."""
    shape = estimate.run.shape
    with_checkpointing = "with" if estimate.checkpointing else "without"
    console.print(
        f"[bold]predicted[/bold] for {estimate.model.model_name_or_path}, nothing was run; "
        f"{with_checkpointing} checkpointing, {estimate.run.pairs_per_step} pairs per step, the longest of "
        f"{shape.prompt} + 2 x {shape.completion} = {shape.tokens} tokens"
    )
    console.print(_memory_table(estimate))
    if estimate.fits:
        console.print(_fit_table(estimate))
    console.print(_time_table(estimate))


def _memory_table(estimate: Estimate) -> Table:
    table = Table(title="predicted peak memory", title_justify="left")
    for name, justify in (("part", "left"), ("MB", "right"), ("", "left")):
        table.add_column(name, justify=justify)  # type: ignore[arg-type]
    for part in estimate.parts:
        table.add_row(part.name, f"{part.bytes / 1e6:,.0f}", part.note)
    table.add_section()
    table.add_row("peak", f"{estimate.total() / 1e6:,.0f}", f"{estimate.total() / 2**30:.2f} GiB")
    return table


def _fit_table(estimate: Estimate) -> Table:
    table = Table(title="what a card holds, predicted", title_justify="left")
    for name, justify in (
        ("card", "left"),
        ("checkpointing", "left"),
        ("micro_batch_tokens", "right"),
        ("longest pair alone", "left"),
    ):
        table.add_column(name, justify=justify)  # type: ignore[arg-type]
    for fit in estimate.fits:
        pair = fit.longest_pair
        table.add_row(
            fit.gpu_memory,
            "on" if fit.checkpointing else "off",
            f"{fit.micro_batch_tokens:,}" if fit.micro_batch_tokens else "none",
            f"{pair.tokens:,} tokens, max_length {pair.prompt + pair.completion:,}" if pair else "none",
        )
    return table


def _time_table(estimate: Estimate) -> Table:
    title = f"lower bound of the seconds per step on {estimate.device.label}: a model from counted FLOPs and bytes"
    table = Table(title=title, title_justify="left")
    for name in ("part", "one scoring pass", "one training pass", "share of training"):
        table.add_column(name, justify="left" if name == "part" else "right")
    scoring, training = estimate.times.scoring, estimate.times.training
    whole = sum(training.values())
    for kind in KINDS:
        if kind in training:
            share = f"{training[kind] / whole:.0%}"
            table.add_row(kind, _seconds(scoring.get(kind, 0.0)), _seconds(training[kind]), share)
    table.add_section()
    table.add_row("all", _seconds(sum(scoring.values())), _seconds(whole), "")
    return table


def _seconds(value: float) -> str:
    return f"{value:.3g}" if value else ""
