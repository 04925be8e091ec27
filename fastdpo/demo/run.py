"""The demo: align SmolLM2-135M-Instruct with QLoRA β-DPO on a CPU, and show what changed (`fastdpo demo`).

The number of training pairs is chosen so that the whole command takes about `minutes`: evaluation and generation before
training are timed, and two training steps on trial.
"""

from __future__ import annotations

import json
import logging
import time
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import psutil
import torch
import transformers
from rich.console import Console

from fastdpo.data import load_preferences
from fastdpo.demo.baseline import bag_of_words_accuracy
from fastdpo.demo.report import Snapshot, print_report, results_of, take_snapshot
from fastdpo.demo.smollm2 import prepare_model
from fastdpo.shown import markup, terminal
from fastdpo.training.models.loading import load_model, load_tokenizer, lora_config
from fastdpo.training.options import FastDPOConfig, ModelConfig
from fastdpo.training.options.kinds import OptionError, check_fields, seen
from fastdpo.training.options.ranges import check_ranges
from fastdpo.training.options.sizes import check_micro_batch_tokens
from fastdpo.training.runs.artifacts import METRICS_FILE, metrics_of
from fastdpo.training.runs.folder import RunFolder
from fastdpo.training.runs.start import begin_start
from fastdpo.training.trainer import FastDPOTrainer

DATA = Path(__file__).parent / "data"
PLAN_FILE = "demo_plan.json"
#: Seconds for the report, the baseline and saving at the end.
CLOSING_SECONDS = 12.0
#: Share of the remaining time that is planned for; the rest absorbs a machine that slows down.
PLANNED_SHARE = 0.85


@dataclass
class DemoConfig:
    """Options of the demo."""

    output_dir: str = field(default="runs/demo", metadata={"help": "Where the adapter, metrics and curves go."})
    pairs: str = field(
        default="auto", metadata={"help": "Training pairs: auto (as many as fit into --minutes), all, or a number."}
    )
    minutes: float = field(default=5.5, metadata={"help": "Time the whole command may take, for --pairs auto."})
    pairs_per_step: int = field(default=8, metadata={"help": "Batch that β, the filter and the loss see."})
    learning_rate: float = field(default=5e-4, metadata={"help": "Peak learning rate of the LoRA."})
    micro_batch_tokens: str = field(default="384", metadata={"help": "Padded tokens per forward with gradients."})
    dtype: str = field(
        default="auto",
        metadata={
            "help": "float32, bfloat16, or auto: bfloat16 on CPUs with matrix tiles for it (AMX), else float32.",
            "choices": ["auto", "float32", "bfloat16"],
        },
    )
    seed: int = field(default=42, metadata={"help": "Seed of the adapter, the data order and the filter."})
    resume_from_checkpoint: str | None = field(default=None, metadata={"help": "last, or a checkpoint folder."})
    overwrite_output_dir: bool = field(default=False, metadata={"help": "Replace the run that output_dir holds."})

    def __post_init__(self) -> None:
        check_fields(self)
        check_ranges(self)
        check_micro_batch_tokens(self.micro_batch_tokens)
        if self.pairs not in ("auto", "all") and not (
            self.pairs.isdecimal() and len(self.pairs) < 19 and int(self.pairs) >= 1
        ):
            raise OptionError(f"pairs={seen(self.pairs)}: auto, all, or a number of at least 1.")


def run(config: DemoConfig, console: Console | None = None) -> dict[str, Any]:
    """The demo; returns the figures that it prints."""
    console = console or terminal()
    started = psutil.Process().create_time()  # importing torch and transformers counts
    _quieten()
    folder = RunFolder(config.output_dir)
    with folder.held():
        start = begin_start(folder, config.resume_from_checkpoint, overwrite=config.overwrite_output_dir)
        return _run(config, console, started, None if start.resume is None else str(start.resume))


def _run(config: DemoConfig, console: Console, started: float, resume: str | None) -> dict[str, Any]:
    console.print("[bold]1.[/bold] preparing SmolLM2-135M-Instruct")
    model_config = demo_model(config)
    tokenizer = load_tokenizer(model_config)
    console.print(
        f"[bold]2.[/bold] loading it in NF4 with double quantisation, {model_config.dtype} compute, LoRA r = 16 on all "
        "linear layers"
    )
    trainer = FastDPOTrainer(
        load_model(model_config),
        args=training_arguments(config),
        train_dataset=load_preferences(DATA / "train.jsonl.gz"),
        eval_dataset=load_preferences(DATA / "eval.jsonl.gz"),
        processing_class=tokenizer,
        peft_config=lora_config(model_config),
    )
    console.print(f"[bold]3.[/bold] training pairs: {markup(trainer.tokenization['train'].summary())}")
    console.print(f"   evaluation pairs: {markup(trainer.tokenization['eval'].summary())}")
    before = take_snapshot(trainer, DATA / "eval.meta.jsonl")
    count = _choose_pairs(config, trainer, before, started, resume)
    available = len(trainer.train_dataset)
    note = "" if count == available else "; --pairs all takes every one"
    console.print(f"[bold]4.[/bold] β-DPO on {count} of {available} pairs, {config.pairs_per_step} per step{note}")
    trainer.train_dataset = trainer.train_dataset.select(range(count))
    training = trainer.train(resume_from_checkpoint=resume)
    if not training.metrics and trainer.parts.checkpoints.is_complete(trainer.state.global_step):
        console.print(f"{markup(config.output_dir)} holds the finished run, whole; nothing was changed")
        return metrics_of(Path(config.output_dir))
    trainer.save_model()
    console.print("[bold]5.[/bold] evaluating and generating again")
    after = take_snapshot(trainer, DATA / "eval.meta.jsonl")
    words = bag_of_words_accuracy(DATA / "train.jsonl.gz", DATA / "eval.jsonl.gz", limit=count)
    results = results_of(before, after, words, count, training.metrics)
    files = trainer.save_run(results, {"model_name_or_path": model_config.model_name_or_path, "load_in_4bit": True})
    results["seconds"] = time.time() - started
    _add_total_time(trainer, files, results)
    print_report(console, before, after, results)
    saved = ", ".join(path.name for path in files)
    console.print(f"saved in {markup(config.output_dir)}: adapter_model.safetensors, tokenizer, {saved}")
    return results


def demo_model(config: DemoConfig) -> ModelConfig:
    """The model and its adapter; prepares the model's files."""
    return ModelConfig(model_name_or_path=prepare_model(), dtype=_compute_dtype(config), load_in_4bit=True, lora_r=16)


def _compute_dtype(config: DemoConfig) -> str:
    """bfloat16 only where it is fast: elsewhere a CPU emulates it."""
    if config.dtype != "auto":
        return config.dtype
    return "bfloat16" if torch.cpu.get_capabilities().get("amx_bf16", False) else "float32"


def _quieten() -> None:
    """The demo's own lines and the progress bars say what happens."""
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers|peft")


def training_arguments(config: DemoConfig) -> FastDPOConfig:
    """The settings of its training."""
    return FastDPOConfig(
        output_dir=config.output_dir,
        overwrite_output_dir=config.overwrite_output_dir,
        per_device_train_batch_size=config.pairs_per_step,
        per_device_eval_batch_size=32,
        num_train_epochs=1,
        learning_rate=config.learning_rate,
        lr_scheduler_type="cosine",
        logging_steps=1,
        save_strategy="steps",
        save_steps=5,
        save_total_limit=1,
        micro_batch_tokens=config.micro_batch_tokens,
        max_length=256,
        max_prompt_length=160,
        dynamic_beta=True,
        seed=config.seed,
        disable_tqdm=False,
        log_level="error",
        use_cpu=True,
    )


def _choose_pairs(
    config: DemoConfig,
    trainer: FastDPOTrainer,
    before: Snapshot,
    started: float,
    resume: str | None,
) -> int:
    """How many of the training pairs to train on. A resumed run keeps the number it began with."""
    folder, available = trainer.parts.checkpoints.folder, len(trainer.train_dataset)
    if resume is not None:
        planned = int(json.loads((folder.path / PLAN_FILE).read_text(encoding="utf-8"))["pairs"])
        if config.pairs not in ("auto", str(planned)):
            raise ValueError(f"pairs={config.pairs!r}: the run to resume began with {planned}; leave --pairs out.")
        return planned
    if config.pairs == "auto":
        pair_seconds = _time_training(trainer) / config.pairs_per_step
        closing = before.scoring_seconds + before.generation_seconds + CLOSING_SECONDS
        remaining = 60 * config.minutes - (time.time() - started) - closing
        count = int(PLANNED_SHARE * remaining / pair_seconds)
        count = max(1, count // config.pairs_per_step) * config.pairs_per_step
    else:
        count = available if config.pairs == "all" else int(config.pairs)
    count = min(count, available)
    trainer.parts.checkpoints.claim(False)
    folder.put(PLAN_FILE, json.dumps({"pairs": count}).encode())
    return count


def _time_training(trainer: FastDPOTrainer) -> float:
    """Seconds of one training step, measured on two whose gradients are thrown away. No statistic is committed."""
    data, size = trainer.train_dataset, trainer.args.train_batch_size
    for step in range(2):  # the first one also warms up
        rows = [data[i % len(data)] for i in range(step * size, (step + 1) * size)]
        begun = time.time()
        trainer.training_step(trainer.model, trainer.data_collator(rows))
    seconds = time.time() - begun
    trainer.discard_step()
    return seconds


def _add_total_time(trainer: FastDPOTrainer, files: list[Path], results: dict[str, Any]) -> None:
    path = next(file for file in files if file.name.startswith(Path(METRICS_FILE).stem))
    metrics = json.loads(path.read_text(encoding="utf-8"))
    metrics["results"]["seconds"] = results["seconds"]
    trainer.parts.checkpoints.folder.put(path.name, json.dumps(metrics, indent=1).encode())
