"""One contender's optimizer steps, in a process of its own.

`python -m benchmarks.training_run '{"trainer": "trl", "options": {...}}'` prints one JSON object, see `Outcome`.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel, Trainer, TrainerCallback

from benchmarks.process import reset_peak, status
from benchmarks.training_cases import TrainingCase, preference_ids, set_lora
from fastdpo import FastDPOConfig, FastDPOTrainer
from fastdpo.demo.smollm2 import prepare_model
from fastdpo.training.models.loading import load_model, load_tokenizer, lora_config
from fastdpo.training.options import ModelConfig

LEARNING_RATE = 1e-4


@dataclass(frozen=True)
class Contender:
    """Attributes:
    trainer: "fastdpo" or "trl".
    options: of its config, over what all contenders share.
    rounded_lora: leave TRL's LoRA in bfloat16, to which it rounds that of a quantised model.
    dense_mask: give fastdpo's shared rows a dense mask in the place of segments.
    environment: variables of the process.
    tree: checkout whose fastdpo runs; "" for this one.
    """

    trainer: str
    options: dict[str, Any] = field(default_factory=dict)
    rounded_lora: bool = False
    dense_mask: bool = False
    environment: dict[str, str] = field(default_factory=dict)
    tree: str = ""

    def written(self) -> str:
        """For the command line of its process, which belongs to the tree already: JSON of what differs from the
        defaults, so that drivers of other trees read it too."""
        return json.dumps(differing(self, "tree"))


def differing(instance: Any, *left_out: str) -> dict[str, Any]:
    """Fields of a dataclass that do not hold their defaults, or have none."""
    found = {}
    for each in fields(instance):
        value = getattr(instance, each.name)
        plain = each.default if each.default_factory is MISSING else each.default_factory()
        if each.name not in left_out and value != plain:
            found[each.name] = value
    return found


@dataclass(frozen=True)
class Outcome:
    """Attributes:
    seconds: of each optimizer step, from the end of the one before; of the first from the call of `train`.
    cpu_seconds: of all threads, alike; twice `seconds` where two threads had two cores to themselves.
    growth: bytes, the peak of resident memory during `train` less `resident`.
    resident: bytes at the call of `train`.
    loss: of the first step.
    """

    seconds: list[float]
    cpu_seconds: list[float]
    growth: int
    resident: int
    loss: float

    @property
    def seconds_per_step(self) -> float:
        """Mean over the steps after the first, which warms up."""
        return sum(self.seconds[1:]) / len(self.seconds[1:])

    @property
    def busy(self) -> float:
        """Cores that it kept busy over the same steps."""
        return sum(self.cpu_seconds[1:]) / sum(self.seconds[1:])


class StepClock(TrainerCallback):
    """Notes the ends of the optimizer steps; saves the first step's gradients where a file is named."""

    def __init__(self, gradients: Path | None = None) -> None:
        self.gradients = gradients
        self.marks: list[tuple[float, float]] = []

    def mark(self) -> None:
        self.marks.append((time.perf_counter(), time.process_time()))

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.gradients is not None and len(self.marks) == 1:
            named = kwargs["model"].named_parameters()
            save_file({name: p.grad.float() for name, p in named if p.grad is not None}, self.gradients)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.mark()

    def spent(self, which: int) -> list[float]:
        """Wall (0) or CPU (1) seconds of each step."""
        return [end[which] - begin[which] for begin, end in zip(self.marks, self.marks[1:], strict=False)]


def step_arguments(case: TrainingCase, output_dir: str) -> dict[str, Any]:
    """How every contender's config takes its steps, on any device: the same pairs in the same order, nothing saved."""
    return {
        "output_dir": output_dir,
        "per_device_train_batch_size": case.pairs,
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "constant",
        "train_sampling_strategy": "sequential",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }


def shared_arguments(case: TrainingCase, output_dir: str) -> dict[str, Any]:
    """What every contender's config is given here: the steps of one epoch, on a CPU, in float32, quietly."""
    own = {"num_train_epochs": 1, "log_level": "error", "use_cpu": True, "bf16": False}
    return step_arguments(case, output_dir) | own


def _trl(model: PreTrainedModel, options: dict[str, Any], **kwargs: Any) -> Trainer:
    from trl import DPOConfig, DPOTrainer

    class TokenisedDPOTrainer(DPOTrainer):
        """DPOTrainer over token ids: its collator takes them as they are."""

        def _prepare_dataset(self, dataset: datasets.Dataset, *_: Any) -> datasets.Dataset:
            return dataset

    trainer: Trainer = TokenisedDPOTrainer(model, args=DPOConfig(**options), **kwargs)
    return trainer


def _fastdpo(model: PreTrainedModel, options: dict[str, Any], **kwargs: Any) -> Trainer:
    return FastDPOTrainer(model, args=FastDPOConfig(**options), **kwargs)


TRAINERS: dict[str, Callable[..., Trainer]] = {"trl": _trl, "fastdpo": _fastdpo}


def build(contender: Contender, case: TrainingCase, output_dir: str, clock: StepClock) -> Trainer:
    """The contender's trainer on SmolLM2-135M: NF4, float32 arithmetic, LoRA r = 16 on all linear layers."""
    config = ModelConfig(
        model_name_or_path=prepare_model(), dtype="float32", load_in_4bit=True, lora_r=16, lora_alpha=32
    )
    model = load_model(config)
    if contender.dense_mask:
        from fastdpo.training.rows import choice as layout_choice

        layout_choice.segment_obstacle = lambda *_: "the benchmark asks for a dense mask"
    trainer = TRAINERS[contender.trainer](
        model,
        shared_arguments(case, output_dir) | contender.options,
        train_dataset=preference_ids(case, model.config.vocab_size),
        processing_class=load_tokenizer(config),
        peft_config=lora_config(config),
        callbacks=[clock],
    )
    if not contender.rounded_lora:
        set_lora(trainer.model)
    return trainer


def measure(contender: Contender, case: TrainingCase, gradients: Path | None = None) -> Outcome:
    """Train over all pairs once. `gradients`: a safetensors file for those of the first step."""
    clock = StepClock(gradients)
    losses: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        trainer = build(contender, case, folder, clock)
        record_losses(trainer, losses)
        resident = reset_peak()
        clock.mark()
        trainer.train()
        growth = status("VmHWM") - resident
    taken, expected = len(clock.marks) - 1, contender.options.get("max_steps", case.steps)
    if taken != expected:
        raise RuntimeError(f"{taken} optimizer steps were taken, {expected} were expected.")
    micro_batches = len(losses) // taken  # TRL returns each one's share of the mean
    return Outcome(clock.spent(0), clock.spent(1), growth, resident, sum(losses[:micro_batches]))


def record_losses(trainer: Trainer, losses: list[float]) -> None:
    """Append to `losses` what every later call of `training_step` returns."""
    step = trainer.training_step

    def recorded(*args: Any, **kwargs: Any) -> Tensor:
        loss = step(*args, **kwargs)
        losses.append(float(loss))
        return loss

    trainer.training_step = recorded


def quieten() -> None:
    """Nothing but the outcome goes to the output."""
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")


def check_environment(contender: Contender) -> None:
    """Raises ValueError where this process does not have the contender's variables."""
    if missing := {name for name, value in contender.environment.items() if os.environ.get(name) != value}:
        raise ValueError(f"start this process with {', '.join(sorted(missing))} as in the contender's environment")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser("python -m benchmarks.training_run", description=__doc__)
    parser.add_argument("contender", type=json.loads, help="attributes of a Contender as JSON")
    parser.add_argument("--case", type=json.loads, default={}, help="attributes of a TrainingCase as JSON")
    parser.add_argument("--threads", type=int, default=2, help="default 2")
    parser.add_argument("--gradients", type=Path, help="save the first step's gradients here")
    options = parser.parse_args(arguments)
    contender = Contender(**options.contender)
    check_environment(contender)
    torch.set_num_threads(options.threads)
    quieten()
    outcome = measure(contender, TrainingCase(**options.case), options.gradients)
    print(json.dumps(asdict(outcome)))
    sys.stdout.flush()


if __name__ == "__main__":
    main()
