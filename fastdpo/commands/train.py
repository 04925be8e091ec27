"""`fastdpo train`: a user's own model and pairs, from a YAML file and flags over it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from accelerate import PartialState
from datasets import Dataset
from rich.console import Console
from rich.table import Table

from fastdpo.commands.options import make_parser, parse
from fastdpo.data import load_preferences
from fastdpo.training.models.loading import load_model, load_tokenizer, lora_config
from fastdpo.training.options import DataConfig, FastDPOConfig, ModelConfig
from fastdpo.training.runs.checkpoint import check_output_dir, recover, resolve_resume
from fastdpo.training.trainer import FastDPOTrainer

_DESCRIPTION = """Align a causal LM on preference pairs with DPO or β-DPO, with a LoRA on a quantised model or without.

  fastdpo train --model_name_or_path Qwen/Qwen2.5-0.5B-Instruct --load_in_4bit \\
      --dataset_name_or_path pairs.jsonl --dynamic_beta --output_dir runs/mine
  fastdpo train run.yaml --learning_rate 1e-5

Every flag of transformers' TrainingArguments is accepted, or refused by name; --help_all lists them too."""


def main(argv: list[str]) -> int:
    """Parse, load, train, evaluate, save. Returns 0; raises what `fastdpo.commands.cli` reports."""
    parser = make_parser("fastdpo train", _DESCRIPTION, ModelConfig, DataConfig, FastDPOConfig)
    model_config, data_config, args = parse(parser, argv)
    run(model_config, data_config, args)
    PartialState().destroy_process_group()  # nothing without one; its threads must not outlive the interpreter
    return 0


def run(model_config: ModelConfig, data_config: DataConfig, args: FastDPOConfig) -> dict[str, Any]:
    """One run; cheap checks first, the model last. Returns the final figures."""
    console = Console()
    if model_config.model_name_or_path is None:
        raise ValueError("model_name_or_path is required: a local folder or a hub name.")
    if data_config.dataset_name_or_path is None:
        raise ValueError("dataset_name_or_path is required: a local file or folder, or a hub name.")
    if args.should_save:
        recover(args.output_dir)
    resume = resolve_resume(args.output_dir, args.resume_from_checkpoint)
    check_output_dir(args.output_dir, resuming=resume is not None, overwrite=args.overwrite_output_dir)
    for name in ("model_name_or_path", "adapter_name_or_path", "tokenizer_name_or_path"):
        source = getattr(model_config, name)
        if source and Path(source).expanduser().resolve() == Path(args.output_dir).resolve():
            raise ValueError(
                f"output_dir={args.output_dir!r} is also {name}, which must not be overwritten. Give another."
            )
    train_dataset, eval_dataset = load_datasets(data_config)
    tokenizer = load_tokenizer(model_config)
    trainer = FastDPOTrainer(
        load_model(model_config),
        args=args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        processing_class=tokenizer,
        peft_config=lora_config(model_config),
    )
    main_process = trainer.is_world_process_zero()
    for name, report in trainer.tokenization.items() if main_process else ():
        console.print(f"{name} pairs: {report.summary()}", highlight=False)
    result = trainer.train(resume_from_checkpoint=resume)
    trainer.save_model(_internal_call=True)  # before the evaluation, which may be interrupted
    results = dict(result.metrics)
    if eval_dataset is not None:
        results |= trainer.evaluate()
    options = {**_set_options(model_config), **_set_options(data_config)}
    trainer.save_run(results, options)
    if main_process:
        console.print(_summary(results))
        console.print(f"saved in {args.output_dir}", highlight=False)
    return results


def load_datasets(config: DataConfig) -> tuple[Dataset, Dataset | None]:
    """Training pairs, and evaluation pairs where they are named."""
    assert config.dataset_name_or_path is not None
    common: dict[str, Any] = {
        "name": config.dataset_config,
        "revision": config.dataset_revision,
        "data_format": config.data_format,
    }
    train = load_preferences(
        config.dataset_name_or_path, split=config.train_split, max_examples=config.max_train_examples, **common
    )
    if config.eval_split is None and config.eval_dataset_name_or_path is None:
        if config.max_eval_examples is not None:
            raise ValueError("max_eval_examples has no effect without eval_split or eval_dataset_name_or_path.")
        return train, None
    path = config.eval_dataset_name_or_path or config.dataset_name_or_path
    if path != config.dataset_name_or_path:  # a configuration or revision says nothing of another data set
        common |= {"name": None, "revision": None}
    split = config.eval_split or ("train" if Path(path).is_file() else "test")  # a file has one split
    return train, load_preferences(path, split=split, max_examples=config.max_eval_examples, **common)


def _set_options(config: Any) -> dict[str, Any]:
    """The options that differ from their defaults."""
    defaults = type(config)()
    return {
        field.name: getattr(config, field.name)
        for field in dataclasses.fields(config)
        if getattr(config, field.name) != getattr(defaults, field.name)
    }


def _summary(results: dict[str, Any]) -> Table:
    table = Table(title="result", show_header=False)
    for name, value in results.items():
        if isinstance(value, float):
            table.add_row(name, f"{value:.4g}")
    return table
