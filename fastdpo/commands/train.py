"""`fastdpo train`: a user's own model and pairs, from a YAML file and flags over it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from accelerate import PartialState
from datasets import Dataset, Value
from rich.console import Console
from rich.table import Table

from fastdpo.commands.options import make_parser, option_file, parse
from fastdpo.commands.stages import beside, stage
from fastdpo.data import ReadReport, read_preferences
from fastdpo.shown import markup, shown, terminal
from fastdpo.training.memory.segments import use_expandable_segments
from fastdpo.training.models.loading import load_model, load_tokenizer, lora_config
from fastdpo.training.options import DataConfig, FastDPOConfig, ModelConfig
from fastdpo.training.options.fields import is_set
from fastdpo.training.options.unused import effective, unused_ignored_together, without_effect
from fastdpo.training.ranks import Ranks
from fastdpo.training.runs.artifacts import metrics_of
from fastdpo.training.runs.folder import RunFolder
from fastdpo.training.runs.saving import held_by_first
from fastdpo.training.runs.standstill import refuse_no_steps
from fastdpo.training.runs.start import begin_start
from fastdpo.training.trainer import FastDPOTrainer

_DESCRIPTION = """Align a causal LM on preference pairs with DPO or β-DPO, with a LoRA on a quantised model or without.

  fastdpo train --model_name_or_path Qwen/Qwen2.5-0.5B-Instruct --load_in_4bit \\
      --dataset_name_or_path pairs.jsonl --dynamic_beta --output_dir runs/mine
  fastdpo train run.yaml --learning_rate 1e-5

Every flag of transformers' TrainingArguments is accepted, or refused by name; --help_all lists them too."""


def main(argv: list[str]) -> int:
    """Parse, load, train, evaluate, save. Returns 0; raises what `fastdpo.commands.cli` reports."""
    with stage("reading the options"):
        parser = make_parser("fastdpo train", _DESCRIPTION, ModelConfig, DataConfig, FastDPOConfig)
        model_config, data_config, args = parse(parser, argv, check=check_together)
    with beside(args.output_dir):
        run(model_config, data_config, args, option_file(argv))
    PartialState().destroy_process_group()  # nothing without one; its threads must not outlive the interpreter
    return 0


def check_together(model: ModelConfig, data: DataConfig, args: FastDPOConfig) -> None:
    """Refuse or note options of one config that act only beside those of another. Raises OptionError."""
    if model.lora_dropout and args.disable_dropout:
        without_effect(model, "lora_dropout", "disable_dropout=True switches it off; set disable_dropout=False.")
    for name in ("hub_model_id", "hub_private_repo", "hub_revision") if not args.push_to_hub else ():
        if is_set(args, name):  # in Python it tells a later trainer.push_to_hub() where to
            without_effect(args, name, "set push_to_hub=True or drop it.")
    if args.model_init_kwargs:
        without_effect(
            args,
            "model_init_kwargs",
            "the model is loaded as dtype, attn_implementation, model_revision, ... say. Set these.",
        )


def run(
    model_config: ModelConfig, data_config: DataConfig, args: FastDPOConfig, option_file: str | None = None
) -> dict[str, Any]:
    """One run; cheap checks first, the model last. Returns the final figures.

    option_file: where the options were read from; it stays also where it is the run's that is overwritten.
    """
    options = {**_set_options(model_config), **_set_options(data_config)}
    model_config, data_config = effective(model_config), effective(data_config)
    if model_config.model_name_or_path is None:
        raise ValueError("model_name_or_path is required: a local folder or a hub name.")
    if data_config.dataset_name_or_path is None:
        raise ValueError("dataset_name_or_path is required: a local file or folder, or a hub name.")
    refuse_no_steps(args)
    sources = _sources(model_config, data_config)
    folder, ranks = RunFolder(args.output_dir), Ranks(args.process_index, args.world_size, args.device)
    with stage("looking at output_dir"), held_by_first(folder, ranks, args.should_save):
        # Before anything is read or changed; the trainer looks again when it takes the folder over
        def check() -> None:
            begin_start(folder, args.resume_from_checkpoint, overwrite=args.overwrite_output_dir, sources=sources)

        ranks.by_first(check if args.should_save else None)
        with stage("reading the pairs"):
            (train_dataset, eval_dataset), reports = load_datasets(data_config)
            with unused_ignored_together(args.ignore_unused_options):
                _check_template(model_config, [train_dataset, eval_dataset])
            model_config = effective(model_config)
        for name, report in reports.items() if args.process_index == 0 else ():
            if not report.is_plain:
                terminal().print(f"{name} rows: {shown(report.summary())}", markup=False)
        with stage("loading the tokenizer"):
            tokenizer = load_tokenizer(model_config)
        with stage("loading the model"):
            use_expandable_segments(args)
            model = load_model(model_config)
        with stage("preparing the run"):
            trainer = FastDPOTrainer(
                model,
                args=args,
                train_dataset=train_dataset,
                eval_dataset=eval_dataset,
                processing_class=tokenizer,
                peft_config=lora_config(model_config),
            )
        trainer.parts.checkpoints.protect(sources, keep=[Path(option_file)] if option_file else [])
        return _train(trainer, terminal(), options, evaluates=eval_dataset is not None)


def _train(trainer: FastDPOTrainer, console: Console, options: dict[str, Any], *, evaluates: bool) -> dict[str, Any]:
    """Train, save the weights, and only then what can be done without."""
    main_process, folder = trainer.is_world_process_zero(), trainer.args.output_dir
    for name, report in trainer.tokenization.items() if main_process else ():
        console.print(f"{name} pairs: {shown(report.summary())}", markup=False)
    with stage("training", begun=trainer.has_begun):
        results = dict(trainer.train().metrics)
    if not results:  # the run that was resumed had taken its last step
        results = metrics_of(Path(folder))
        if trainer.parts.checkpoints.is_complete(trainer.state.global_step):
            if main_process:
                console.print(f"{shown(folder)} holds the finished run, whole; nothing was changed", markup=False)
            return results
    with stage("saving the weights", begun=trainer.has_begun):
        trainer.save_model(_internal_call=True)  # before the evaluation, which may be interrupted
    if evaluates:
        with stage("evaluating", begun=trainer.has_begun):
            results |= trainer.evaluate()
    with stage("writing figures and card", begun=trainer.has_begun):
        trainer.save_run(results, options)
    if main_process:
        console.print(_summary(results))
        console.print(f"saved in {shown(folder)}", markup=False)
    return results


def _check_template(model: ModelConfig, data: list[Dataset | None]) -> None:
    """Refuse, or note, a chat template that nothing is rendered with. Raises OptionError."""
    plain = all(isinstance(each.features["prompt"], Value) for each in data if each is not None)
    if model.chat_template is not None and plain:
        without_effect(model, "chat_template", "the pairs are plain text, which no template renders; drop it.")


def _sources(model: ModelConfig, data: DataConfig) -> dict[str, str | Path | None]:
    """Option → where the run starts from: what it must not overwrite."""
    names = ("model_name_or_path", "adapter_name_or_path", "tokenizer_name_or_path", "chat_template")
    found = {name: getattr(model, name) for name in names}
    return found | {name: getattr(data, name) for name in ("dataset_name_or_path", "eval_dataset_name_or_path")}


def load_datasets(config: DataConfig) -> tuple[tuple[Dataset, Dataset | None], dict[str, ReadReport]]:
    """Training pairs, and evaluation pairs where they are named; what became of the rows of each."""
    assert config.dataset_name_or_path is not None
    common: dict[str, Any] = {
        "name": config.dataset_config,
        "revision": config.dataset_revision,
        "data_format": config.data_format,
    }
    train, report = read_preferences(
        config.dataset_name_or_path, split=config.train_split, max_examples=config.max_train_examples, **common
    )
    if config.eval_split is None and config.eval_dataset_name_or_path is None:
        if config.max_eval_examples is not None:
            raise ValueError("max_eval_examples has no effect without eval_split or eval_dataset_name_or_path.")
        return (train, None), {"train": report}
    path = config.eval_dataset_name_or_path or config.dataset_name_or_path
    if path != config.dataset_name_or_path:  # a configuration or revision says nothing of another data set
        common |= {"name": None, "revision": None}
    split = config.eval_split or ("train" if Path(path).is_file() else "test")  # a file has one split
    evaluation, of_evaluation = read_preferences(path, split=split, max_examples=config.max_eval_examples, **common)
    return (train, evaluation), {"train": report, "eval": of_evaluation}


def _set_options(config: Any) -> dict[str, Any]:
    """The options that differ from their defaults."""
    names = [field.name for field in dataclasses.fields(config)]
    return {name: getattr(config, name) for name in names if is_set(config, name)}


def _summary(results: dict[str, Any]) -> Table:
    table = Table(title="result", show_header=False)
    for name, value in results.items():
        if isinstance(value, float):
            table.add_row(markup(name), f"{value:.4g}")
    return table
