"""`fastdpo estimate`: predicted peak memory and time split of a run, without its weights and without a GPU.

Options come in; tables, or JSON, go out. The prediction is `fastdpo.estimate.prediction`.
"""

from __future__ import annotations

import json
from typing import Any

from rich.console import Console
from rich.table import Table

from fastdpo.commands.options import make_parser, parse
from fastdpo.commands.stages import stage
from fastdpo.estimate.options import EstimateConfig
from fastdpo.estimate.prediction import Estimate
from fastdpo.estimate.timing import KINDS
from fastdpo.shown import markup, terminal
from fastdpo.training.options import ModelConfig
from fastdpo.training.options.unused import effective

_DESCRIPTION = """Predict the peak memory of a training run, part by part, the time split of a step, and the largest
micro-batch and pair that a card holds. Reads a configuration, no weights; needs no GPU.

  fastdpo estimate --model_name_or_path Llama-3-8B --load_in_4bit --gpu_memory 12GB
  fastdpo estimate --model_name_or_path Llama-3.1-8B --load_in_4bit --gpu_memory 12GB 24GB --longest_pair
  fastdpo estimate --model_name_or_path ./model --load_in_4bit --device cpu --micro_batch_tokens 1024"""


def main(argv: list[str]) -> int:
    """Parse, predict, print. Returns 0; raises what `fastdpo.commands.cli` reports."""
    with stage("reading the options"):
        parser = make_parser("fastdpo estimate", _DESCRIPTION, ModelConfig, EstimateConfig)
        model, config = parse(parser, argv, demo_settings() if "--demo" in argv else None)
        if config.demo and "--demo" not in argv:
            raise ValueError("demo=True acts as the flag --demo only, as it changes the other options' defaults.")
    with stage("predicting"):
        estimate = Estimate(effective(model), effective(config))
    if config.json:
        print(json.dumps(estimate.as_dict(), indent=1))
    else:
        print_estimate(estimate, terminal())
    return 0


def demo_settings() -> dict[str, Any]:
    """What `fastdpo demo` trains, and how."""
    from fastdpo.demo.run import DemoConfig, demo_model, training_arguments

    demo = DemoConfig()
    model, args = demo_model(demo), training_arguments(demo)
    settings = {name: getattr(model, name) for name in ("model_name_or_path", "dtype", "load_in_4bit", "lora_r")}
    own = ("max_length", "max_prompt_length", "micro_batch_tokens", "per_device_train_batch_size")
    return settings | {name: getattr(args, name) for name in own} | {"device": "cpu", "bf16": args.bf16}


def print_estimate(estimate: Estimate, console: Console) -> None:
    """Tables of the parts, of what fits, and of the time split."""
    if estimate.config.longest_pair:
        name = markup(estimate.model.model_name_or_path)
        console.print(f"[bold]predicted[/bold] for {name}, nothing was run; one pair, alone in its micro-batch")
        console.print(_longest_table(estimate))
        return
    shape = estimate.run.shape
    with_checkpointing = "with" if estimate.checkpointing else "without"
    console.print(
        f"[bold]predicted[/bold] for {markup(estimate.model.model_name_or_path)}, nothing was run; "
        f"{with_checkpointing} checkpointing, {estimate.run.pairs_per_step} pairs per step, the longest of "
        f"{shape.prompt} + 2 x {shape.completion} = {shape.tokens} tokens"
    )
    console.print(_memory_table(estimate))
    if estimate.fits:
        console.print(_fit_table(estimate))
    console.print(_time_table(estimate))


def _memory_table(estimate: Estimate) -> Table:
    table = Table(title="predicted peak memory", title_justify="left")
    for name in ("part", "MB", ""):
        table.add_column(name, justify="right" if name == "MB" else "left")
    for part in estimate.parts:
        table.add_row(markup(part.name), f"{part.bytes / 1e6:,.0f}", markup(part.note))
    table.add_section()
    table.add_row("peak", f"{estimate.total() / 1e6:,.0f}", f"{estimate.total() / 2**30:.2f} GiB")
    if estimate.host:
        table.add_section()
    for part in estimate.host:
        table.add_row(markup(f"host memory: {part.name}"), f"{part.bytes / 1e6:,.0f}", markup(part.note))
    return table


def _longest_table(estimate: Estimate) -> Table:
    table = Table(title="the longest pair that a card holds, predicted", title_justify="left")
    for name in ("card", "checkpointing", "tokens of the pair", "context of an answer", "host memory, MB"):
        table.add_column(name, justify="left" if name in ("card", "checkpointing") else "right")
    for fit in estimate.fits:
        pair = fit.longest_pair
        figures = (
            (f"{pair.tokens:,}", f"{pair.context:,}", f"{fit.host_bytes / 1e6:,.0f}") if pair else ("none", "", "")
        )
        table.add_row(markup(fit.gpu_memory), "on" if fit.checkpointing else "off", *figures)
    return table


def _fit_table(estimate: Estimate) -> Table:
    table = Table(title="what a card holds, predicted", title_justify="left")
    for name in ("card", "checkpointing", "micro_batch_tokens", "longest pair alone"):
        table.add_column(name, justify="right" if name == "micro_batch_tokens" else "left")
    for fit in estimate.fits:
        pair = fit.longest_pair
        table.add_row(
            markup(fit.gpu_memory),
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
