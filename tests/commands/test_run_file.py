"""What is recorded is what was asked: run.yaml given back, and `dataclasses.replace`, keep what they do not change."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import yaml
from transformers import TrainingArguments
from transformers.trainer_pt_utils import AcceleratorConfig

from fastdpo import FastDPOTrainer
from fastdpo.commands.cli import main
from fastdpo.commands.options import OptionError, make_parser, parse
from fastdpo.training.options import DataConfig, FastDPOConfig, ModelConfig
from fastdpo.training.options.fields import default_of, is_set
from fastdpo.training.options.kinds import Kind, kinds_of
from fastdpo.training.options.refused import REFUSED
from fastdpo.training.runs.option_files import resolved_yaml, run_yaml

CONFIGS = (ModelConfig, DataConfig, FastDPOConfig)
PARSER = make_parser("fastdpo train", "", *CONFIGS)
EVALUATES = {"eval_strategy": "steps"}
#: Values for options that a rule of `value` does not find one for, and what has to be set beside some.
VALUES: dict[str, Any] = {
    "accelerator_config": {"use_seedable_sampler": False}, "debug": "underflow_overflow", "disable_tqdm": True,
    "fsdp_config": {"reshard_after_forward": False}, "gradient_checkpointing": "true", "head_workspace": "1MiB",
    "hub_strategy": "end", "label_smoothing": 0.1, "ld_alpha": 0.5, "loss_type": ["ipo", "sigmoid"],
    "loss_weights": [0.5], "lr_scheduler_kwargs": {"num_cycles": 2, "of": ["1e-5", "null", None, 1e-5, True]},
    "max_length": None, "max_steps": 3, "logging_steps": 5, "save_steps": 7, "simpo_gamma": 1.0,
    "max_prompt_length": 100, "memory_limit": "4000000000", "micro_batch_tokens": "640",
    "min_beta": 0.01, "f_alpha_divergence_coef": 0.7, "model_init_kwargs": {"torch_dtype": torch.bfloat16, "e": "1e-5"},
    "optim": "sgd", "report_to": [],
    "router_aux_loss_coef": 0.0, "train_sampling_strategy": "sequential", "tf32": False, "bf16": True,
    "local_rank": 0, "output_dir": "é 'x'", "run_name": "null", "full_determinism": True,
    "activation_checkpointing_kwargs": {"use_reentrant": False}, "backend": "torch",
    "f_divergence_type": "js_divergence", "trackio_static_space_id": False,
    "include_num_input_tokens_seen": True, "save_strategy": "epoch", "optim_args": "momentum=0.9", "beta_momentum": 0.5,
    "keep_ratio": 0.5, "dtype": "float32", "resume_from_checkpoint": "last", "metric_for_best_model": "rewards/margins",
    "fsdp": True,
}  # fmt: skip
BESIDE: dict[str, dict[str, Any]] = {
    "eval_steps": EVALUATES, "eval_delay": EVALUATES, "load_best_model_at_end": EVALUATES | {"save_strategy": "steps"},
    "greater_is_better": EVALUATES | {"metric_for_best_model": "loss"}, "fsdp_config": {"fsdp": True},
    "dataloader_persistent_workers": {"dataloader_num_workers": 1}, "head_workspace": {"backend": "triton"},
    "dataloader_prefetch_factor": {"dataloader_num_workers": 1}, "eval_on_start": EVALUATES,
    "lr_scheduler_type": EVALUATES, "f_alpha_divergence_coef": {"f_divergence_type": "alpha_divergence"},
    "discopop_tau": {"loss_type": ["discopop"]}, "simpo_gamma": {"loss_type": ["simpo"]},
    "cpo_alpha": {"loss_type": ["cpo"]}, "bnb_4bit_quant_type": {"load_in_4bit": True},
    "bnb_4bit_use_double_quant": {"load_in_4bit": True}, "bnb_4bit_quant_storage": {"load_in_4bit": True},
    "max_eval_examples": {"eval_split": "test"}, "optim_args": {"optim": "sgd"},
    "hub_strategy": {"push_to_hub": True}, "hub_always_push": {"push_to_hub": True},
    "fp16": {}, "bf16": {"use_cpu": True},
    **{name: {"dynamic_beta": True} for name in (
        "beta_alpha", "beta_momentum", "keep_ratio", "min_beta", "beta_scope", "beta_variant")},
}  # fmt: skip
#: Refused by their own rules, or acting on a GPU alone.
NEVER = {*REFUSED, "activation_offloading", "expandable_segments", "offload_embeddings", "torch_empty_cache_steps",
         "use_liger_kernel"}  # fmt: skip
#: Of the call, or secret: used, and not written.
UNWRITTEN = {"local_rank", "overwrite_output_dir", "resume_from_checkpoint", "hub_token"}
#: Other names of options (the first two, by the version of transformers), and what needs a group of processes.
OTHERWISE = {"activation_checkpointing", "gradient_checkpointing_kwargs", "ddp_backend"}
OPTIONS = [(config, name) for config in CONFIGS for name in kinds_of(config) if name not in NEVER | OTHERWISE]


def value(config: type, name: str, kind: Kind) -> Any:
    """An accepted value that is not the default."""
    default = default_of(config, name)
    if name in VALUES:
        return VALUES[name]
    if kind.choices:
        return next(each for each in kind.choices if each != default)
    base = {bool: not default, str: "1e-5"}.get(kind.base)
    if base is None:
        base = (default or 0) + 1 if kind.base is int else (default or 0.0) / 2 + 0.25
    return [base] if kind.many and not kind.single else base


def made(config: type, name: str) -> Any:
    options = {name: value(config, name, kinds_of(config)[name])} | BESIDE.get(name, {})
    if config is FastDPOConfig:
        options = {"output_dir": "out", "use_cpu": True} | options
    return config(**options)


@pytest.mark.parametrize(("config", "name"), OPTIONS, ids=[name for _, name in OPTIONS])
def test_every_option_comes_back_from_run_yaml_and_from_replace(config: type, name: str, tmp_path: Path) -> None:
    asked = made(config, name)
    assert is_set(asked, name)
    assert dataclasses.replace(asked) == asked
    training = asked if config is FastDPOConfig else FastDPOConfig(output_dir="out", use_cpu=True)
    others = {each: getattr(asked, each) for each in kinds_of(config) if asked is not training and is_set(asked, each)}
    path = tmp_path / "run.yaml"
    path.write_text(run_yaml(training, others), encoding="utf-8")
    (again,) = [each for each in parse(PARSER, [str(path)]) if isinstance(each, config)]
    if name in UNWRITTEN:
        assert not is_set(again, name)
        again = dataclasses.replace(again, **{name: getattr(asked, name)})
    for each in kinds_of(config):
        assert plain(getattr(again, each)) == plain(getattr(asked, each)), each
    if config is FastDPOConfig:
        assert dataclasses.replace(asked).resolved() == asked.resolved()
        assert yaml.safe_load(resolved_yaml(asked.resolved(), {}))["optim"] == asked.resolved().optim


def plain(value: Any) -> Any:
    """A dtype as it is written."""
    if isinstance(value, dict):
        return {key: plain(each) for key, each in value.items()}
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else value


def test_replace_changes_what_it_names_and_nothing_that_follows_from_others() -> None:
    config = FastDPOConfig(output_dir="out", use_cpu=True, eval_strategy="steps", logging_steps=5)
    assert (config.optim, config.bf16, config.gradient_checkpointing, config.eval_steps) == ("auto", None, "auto", None)
    assert config.resolved().eval_steps == 5
    changed = dataclasses.replace(config, logging_steps=7, beta=0.2)
    assert changed.resolved().eval_steps == 7, "asked for was: as often as is logged"
    assert changed == FastDPOConfig(output_dir="out", use_cpu=True, eval_strategy="steps", logging_steps=7, beta=0.2)
    config.beta = -1.0
    with pytest.raises(ValueError, match=r"beta=-1\.0 must be positive"):
        config.resolved()


def test_what_yaml_cannot_say_is_named_in_a_comment() -> None:
    config = FastDPOConfig(output_dir="out", use_cpu=True, hub_token="hf_secret", model_init_kwargs={"a": object()})
    text = run_yaml(config, {})
    assert yaml.safe_load(text) == {"output_dir": "out", "use_cpu": True}
    assert "# hub_token was set and is not written: it is a secret." in text
    assert "# model_init_kwargs was set and is not written: it is, or holds, a dict that YAML cannot say." in text


def test_run_yaml_of_a_finished_run_repeats_it_to_the_bit(tmp_path: Path) -> None:
    tiny.llama().save_pretrained(tmp_path / "model")
    tiny.tokenizer().save_pretrained(tmp_path / "model")
    tiny.pairs(12).to_json(tmp_path / "pairs.jsonl")
    first, second = tmp_path / "first", tmp_path / "second"
    argv = [
        "--model_name_or_path", str(tmp_path / "model"), "--dataset_name_or_path", str(tmp_path / "pairs.jsonl"),
        "--output_dir", str(first), "--max_steps", "2", "--per_device_train_batch_size", "2", "--use_cpu",
        "--gradient_accumulation_steps", "2", "--gradient_checkpointing", "true", "--lora_r", "4",
        "--disable_tqdm", "true",
        "--simpo_gamma", "1.0", "--ignore_unused_options", "--learning_rate", "1e-2",
    ]  # fmt: skip
    assert main(["train", *argv]) == 0
    written = yaml.safe_load((first / "run.yaml").read_text())
    assert written["simpo_gamma"] == 1.0
    assert "optim" not in written
    resolved = yaml.safe_load((first / "resolved.yaml").read_text())
    assert {name: resolved[name] for name in ("optim", "bf16", "simpo_gamma", "gradient_checkpointing")} == {
        "optim": "adamw_torch", "bf16": False, "simpo_gamma": 0.5, "gradient_checkpointing": True,
    }  # fmt: skip
    assert (resolved["gradient_accumulation_steps"], resolved["per_device_train_batch_size"]) == (2, 2)
    assert main(["train", str(first / "run.yaml"), "--output_dir", str(second)]) == 0
    weights = [(folder / "adapter_model.safetensors").read_bytes() for folder in (first, second)]
    assert weights[0] == weights[1]
    again = yaml.safe_load((second / "run.yaml").read_text())
    assert again == written | {"output_dir": str(second)}


def test_a_change_of_a_bound_option_is_refused_and_of_a_live_one_recorded(tmp_path: Path) -> None:
    trainer = tiny.trainer(tmp_path, max_steps=1)
    trainer.args.beta = 0.9
    with pytest.raises(OptionError, match=r"beta=0\.9 was set in trainer\.args after the trainer was built with 0\.5"):
        trainer.train()
    trainer.args.beta = 0.5
    trainer.args.learning_rate = 0.25
    trainer.train()
    assert trainer.optimizer.defaults["lr"] == 0.25
    trainer.save_run({})
    assert yaml.safe_load((tmp_path / "run.yaml").read_text())["learning_rate"] == 0.25
    assert yaml.safe_load((tmp_path / "resolved.yaml").read_text())["learning_rate"] == 0.25


def test_args_of_a_trainer_make_another(tmp_path: Path) -> None:
    """What is asked for survives that transformers' Trainer is kept from checkpointing and from accumulating."""
    settings = AcceleratorConfig(use_seedable_sampler=False)
    first = tiny.trainer(tmp_path, gradient_checkpointing=True, report_to=None, accelerator_config=settings,
                         per_device_train_batch_size=2, gradient_accumulation_steps=3)  # fmt: skip
    assert not first.args.gradient_checkpointing, "transformers checkpoints nothing"
    again = dataclasses.replace(first.args)
    for name in kinds_of(FastDPOConfig):
        assert getattr(again, name) == getattr(first.args, name), name
    tiny.llama().save_pretrained(tmp_path / "model")
    for model, args in ((tiny.llama(), first.args), (tmp_path / "model", dataclasses.replace(first.args, beta=0.25))):
        second = FastDPOTrainer(
            model,
            args=args,
            train_dataset=tiny.pairs(16),
            processing_class=tiny.tokenizer(),
            peft_config=tiny.lora(),
        )
        assert second.args.accelerator_config == settings
        assert (second.args.beta, second.args.per_device_train_batch_size) == (args.beta, 6)
        assert second.parts.memory.checkpointing
    (tmp_path / "run.yaml").write_text(run_yaml(first.options.asked, {}))
    assert dict(parse(PARSER, [str(tmp_path / "run.yaml")])[2].accelerator_config) == settings.to_dict()
    (tmp_path / "resolved.yaml").write_text(resolved_yaml(first.options.resolved, {}))
    assert parse(PARSER, [str(tmp_path / "resolved.yaml")])[2].resolved().debug == []


def test_users_files_of_these_names_stay(tmp_path: Path) -> None:
    for name in ("run.yaml", "resolved.yaml"):
        (tmp_path / name).write_text("mine")
    trainer = tiny.trainer(tmp_path, max_steps=1)
    trainer.train()
    trainer.save_run({})
    assert [(tmp_path / name).read_text() for name in ("run.yaml", "resolved.yaml")] == ["mine", "mine"]
    assert "max_steps: 1" in (tmp_path / "run.fastdpo.yaml").read_text()
    assert "max_steps: 1" in (tmp_path / "resolved.fastdpo.yaml").read_text()


def test_never_is_refused_or_another_name() -> None:
    """What the law above leaves out: a name that could be set would be missed by it."""
    kinds = kinds_of(FastDPOConfig)
    for name in sorted(NEVER & set(kinds) - {"deepspeed", "parallelism_config"}):
        with pytest.raises(ValueError, match=name):
            made(FastDPOConfig, name)
    old = FastDPOConfig(output_dir="out", use_cpu=True, gradient_checkpointing_kwargs={"use_reentrant": False})
    new = "activation" if "activation_checkpointing" in kinds else "gradient"
    assert getattr(dataclasses.replace(old), f"{new}_checkpointing_kwargs") == {"use_reentrant": False}
    assert FastDPOConfig("out", use_cpu=True, gradient_checkpointing=True).gradient_checkpointing == "true"
    assert set(TrainingArguments.__dataclass_fields__) <= set(kinds_of(FastDPOConfig))
