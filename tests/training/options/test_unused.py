"""Options without effect are refused by name; in a sweep they are named in one warning, and left at their defaults."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
from transformers.integrations import get_available_reporting_integrations

from fastdpo.commands.options import OptionError, make_parser, parse
from fastdpo.commands.train import check_together, run
from fastdpo.training.options import DataConfig, FastDPOConfig, ModelConfig
from fastdpo.training.options.best_metric import check_best_metric
from fastdpo.training.options.fields import is_set
from fastdpo.training.options.unused import effective

PARSER = make_parser("fastdpo train", "", ModelConfig, DataConfig, FastDPOConfig)
UNUSED: dict[str, dict[str, Any]] = {
    "activation_offloading": {"activation_offloading": True},
    "beta_alpha": {"beta_alpha": 0.5},
    "beta_momentum": {"beta_momentum": 0.5, "loss_type": ["sft"]},
    "dataloader_persistent_workers": {"dataloader_persistent_workers": True},
    "dynamic_beta": {"dynamic_beta": True, "loss_type": ["sft"]},
    "eval_delay": {"eval_delay": 2},
    "eval_steps": {"eval_steps": 2},
    "expandable_segments": {"expandable_segments": False},
    "f_divergence_type": {"f_divergence_type": "forward_kl", "loss_type": ["bco_pair"]},
    "fsdp_config": {"fsdp_config": {"version": 2}},
    "greater_is_better": {"greater_is_better": True},
    "head_workspace": {"head_workspace": "1MiB"},
    "hub_strategy": {"hub_strategy": "end"},
    "hub_always_push": {"hub_always_push": True},
    "label_smoothing": {"label_smoothing": 0.1, "loss_type": ["ipo"]},
    "logging_steps": {"logging_steps": 3, "logging_strategy": "epoch"},
    "memory_limit": {"memory_limit": "12GB", "micro_batch_tokens": "640"},
    "offload_embeddings": {"offload_embeddings": True},
    "optim_args": {"optim_args": "beta1=0.5", "optim": "adafactor"},
    "reference_cache_dir": {"reference_cache_dir": "kept", "reference": "online"},
    "save_steps": {"save_steps": 3, "save_strategy": "epoch"},
    "simpo_gamma": {"simpo_gamma": 1.0},
    "torch_empty_cache_steps": {"torch_empty_cache_steps": 3},
    "use_liger_kernel": {"use_liger_kernel": True},
    "warmup_steps": {"warmup_steps": 3, "lr_scheduler_type": "constant"},
}


@pytest.mark.parametrize("name", UNUSED)
def test_unused_option_is_refused_or_named_and_left_out(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    options = {"output_dir": str(tmp_path), "use_cpu": True} | UNUSED[name]
    with pytest.raises(OptionError, match=f"^{name}=.* has no effect here: "):
        FastDPOConfig(**options)
    config = FastDPOConfig(**options, ignore_unused_options=True)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert f"{name}=" in caplog.text
    assert is_set(config, name), "what was asked is recorded"
    assert (
        config.resolved()
        == FastDPOConfig(
            **{each: value for each, value in options.items() if each != name}, ignore_unused_options=True
        ).resolved()
    )
    assert len(caplog.records) == 1, "resolving says nothing again"


def test_one_warning_for_all_configs_of_a_command(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "pairs.jsonl").touch()
    argv = [
        "--output_dir", "out", "--use_cpu", "--bnb_4bit_quant_type", "fp4", "--simpo_gamma", "1.0", "--lora_dropout",
        "0.5", "--dataset_name_or_path", str(tmp_path / "pairs.jsonl"), "--dataset_config", "main",
        "--model_name_or_path",
        str(tmp_path), "--model_revision", "v1", "--max_eval_examples", "3",
    ]  # fmt: skip
    with pytest.raises(OptionError, match="has no effect here"):
        parse(PARSER, argv, check=check_together)
    model, data, args = parse(PARSER, [*argv, "--ignore_unused_options"], check=check_together)
    (warning,) = caplog.records
    named = ("bnb_4bit_quant_type='fp4'", "simpo_gamma=1.0", "lora_dropout=0.5", "dataset_config='main'",
             "model_revision='v1'", "max_eval_examples=3")  # fmt: skip
    assert all(each in warning.getMessage() for each in named)
    assert (model.lora_dropout, effective(model).lora_dropout, effective(model).bnb_4bit_quant_type) == (
        0.5,
        0.0,
        "nf4",
    )
    assert (effective(data).dataset_config, args.resolved().simpo_gamma) == (None, 0.5)


def test_template_that_is_ignored_is_not_opened(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tiny.llama().save_pretrained(tmp_path / "model")
    tiny.tokenizer().save_pretrained(tmp_path / "model")
    tiny.pairs(8).to_json(tmp_path / "pairs.jsonl")
    argv = [
        "--model_name_or_path", str(tmp_path / "model"), "--dataset_name_or_path", str(tmp_path / "pairs.jsonl"),
        "--output_dir", str(tmp_path / "out"), "--max_steps", "1", "--use_cpu", "--lora_r", "4",
        "--disable_tqdm", "true", "--chat_template", str(tmp_path / "nothing.jinja"),
    ]  # fmt: skip
    configs = parse(PARSER, argv, check=check_together)
    with pytest.raises(OptionError, match=r"chat_template=.*nothing\.jinja. has no effect here: the pairs are plain"):
        run(*configs)
    run(*parse(PARSER, [*argv, "--ignore_unused_options"], check=check_together))
    assert len([record for record in caplog.records if "ignore_unused_options" in record.getMessage()]) == 1
    assert f"chat_template: {tmp_path}/nothing.jinja" in (tmp_path / "out" / "run.yaml").read_text(), "as it was asked"


def test_only_options_without_effect_are_ignored() -> None:
    with pytest.raises(OptionError, match="beta='x'"):
        FastDPOConfig(output_dir="out", use_cpu=True, beta="x", ignore_unused_options=True)
    with pytest.raises(ValueError, match=r"keep_ratio=2"):
        FastDPOConfig(output_dir="out", use_cpu=True, dynamic_beta=True, keep_ratio=2.0, ignore_unused_options=True)


def test_trackers_and_packages_of_optimizers_are_asked_for_early(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "tensorboard" not in get_available_reporting_integrations(), "or this test says nothing"
    with pytest.raises(OptionError, match=r"report_to='tensorboard' needs tensorboard, .*pip install tensorboard"):
        FastDPOConfig(output_dir="out", use_cpu=True, report_to=["tensorboard"])
    with pytest.raises(OptionError, match=r"report_to='wandbb' is unknown; .* Did you mean wandb"):
        FastDPOConfig(output_dir="out", use_cpu=True, report_to="wandbb")
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *_: None)
    for optim, package in {
        "galore_adamw_8bit": "galore-torch", "paged_lion_32bit": "bitsandbytes", "adamw_torch_8bit": "torchao",
        "schedule_free_sgd": "schedulefree", "ademamix": "bitsandbytes", "apollo_adamw": "apollo-torch",
    }.items():  # fmt: skip
        with pytest.raises(OptionError, match=f"^optim='{optim}' needs {package}, .*pip install {package}"):
            FastDPOConfig(output_dir="out", use_cpu=True, optim=optim)
    assert FastDPOConfig(output_dir="out", use_cpu=True, optim="adamw_torch").optim == "adamw_torch"


def test_metric_of_the_best_model_is_looked_for_before_training(tmp_path: Path) -> None:
    best = {"eval_strategy": "steps", "save_strategy": "best"}
    splits = {"a": tiny.pairs(4), "b": tiny.pairs(4, seed=1)}
    with pytest.raises(
        OptionError, match=r"metric_for_best_model='accuracies' is no .* Did you mean rewards/accuracies"
    ):
        tiny.trainer(tmp_path, eval_dataset=tiny.pairs(4), metric_for_best_model="accuracies", **best)
    with pytest.raises(OptionError, match=r"metric_for_best_model='loss' is no metric.* which has a_loss, .*b_loss"):
        tiny.trainer(tmp_path, eval_dataset=splits, metric_for_best_model="loss", **best)
    trainer = tiny.trainer(tmp_path, eval_dataset=splits, metric_for_best_model="eval_b_rewards/margins", **best)
    found = {name.removeprefix("eval_") for name in trainer.evaluate()} - {"epoch"}
    assert {f"{each}_{name}" for each in splits for name in trainer.objective.evaluated} <= found
    for name in (name for name in found if "preparation" not in name):  # which a training does not repeat
        check_best_metric(name, trainer.objective.evaluated, splits)
    with pytest.raises(OptionError, match="load_best_model_at_end=True compares checkpoints"):
        tiny.config(tmp_path, load_best_model_at_end=True)
