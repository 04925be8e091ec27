"""Every argument that cannot be used is refused by name, early, with what is accepted."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import datasets
import pytest
import tiny
import torch
from datasets import Dataset
from peft import PromptTuningConfig, get_peft_model
from transformers import (
    LlamaModel,
    MixtralConfig,
    MixtralForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    TrainerCallback,
    TrainingArguments,
)

import fastdpo
from fastdpo import FastDPOTrainer
from fastdpo.training.models.loading import load_adapter, load_causal_lm, quantization_config
from fastdpo.training.options import FastDPOConfig, ModelConfig, optimizer
from fastdpo.training.options.optimizer import automatic_optimizer
from fastdpo.training.options.refused import REFUSED
from fastdpo.training.runs.nonfinite import NONFINITE_FILE, NonFiniteLossError

OPTIONS = {
    "unknown loss": ({"loss_type": ["sigmoud"]}, r"loss_type=\['sigmoud'\] is unknown; choose among sigmoid, "),
    "β = 0": ({"beta": 0.0}, "beta=0.0 must be positive"),
    "β < 0": ({"beta": -0.1}, "beta=-0.1 must be positive"),
    "keep_ratio 0": ({"dynamic_beta": True, "keep_ratio": 0.0}, r"keep_ratio=0.0 .*\(0, 1\]"),
    "keep_ratio > 1": ({"dynamic_beta": True, "keep_ratio": 1.1}, r"keep_ratio=1.1 .*\(0, 1\]"),
    "momentum 1": ({"dynamic_beta": True, "beta_momentum": 1.0}, "^beta_momentum=1.0"),
    "β-DPO option without β-DPO": ({"keep_ratio": 0.5}, "keep_ratio=0.5 has no effect here.*dynamic_beta=True"),
    "parameter of no loss": ({"simpo_gamma": 1.0}, "simpo_gamma=1.0 has no effect here"),
    "weights of other length": ({"loss_type": ["sigmoid"], "loss_weights": [1.0, 2.0]}, "loss_weights has 2 entries"),
    "smoothing unused": ({"loss_type": ["ipo"], "label_smoothing": 0.1}, "label_smoothing=0.1 has no effect"),
    "smoothing half": ({"label_smoothing": 0.5}, "label_smoothing=0.5 must be in"),
    "divergence of other loss": ({"loss_type": ["bco_pair"], "f_divergence_type": "forward_kl"}, "does not act on"),
    "unknown scope": (
        {"dynamic_beta": True, "beta_scope": "token"},
        "beta_scope='token' is unknown; accepted are batch",
    ),
    "WPO on sorted losses": (
        {"use_weighting": True, "loss_type": ["aot"]},
        "use_weighting=True needs losses of single",
    ),
    "ld_alpha": ({"ld_alpha": 1.5}, "ld_alpha=1.5"),
    "dynamic β of sft": ({"dynamic_beta": True, "loss_type": ["sft"]}, "dynamic_beta=True has no effect"),
    "no room for completions": ({"max_length": 64, "max_prompt_length": 64}, "leaves no room for a completion"),
    "micro_batch_tokens": ({"micro_batch_tokens": "many"}, "micro_batch_tokens='many': 'auto' or a number"),
    "prefix sharing": ({"prefix_sharing": "some"}, "prefix_sharing='some' is unknown; accepted are auto, on, off"),
    "packing": ({"packing": "some"}, "packing='some' is unknown; accepted are auto, on, off"),
    "reference": ({"reference": "cached"}, "reference='cached' is unknown; accepted are online, lazy, precompute"),
    "reference folder": (
        {"reference": "online", "reference_cache_dir": "kept"},
        "reference_cache_dir='kept' has no effect here: reference='online' keeps nothing",
    ),
    "checkpointing": (
        {"gradient_checkpointing": "some"},
        "gradient_checkpointing='some' is unknown; accepted are auto, true, false",
    ),
    "memory limit": ({"memory_limit": "12 apples"}, "memory_limit='12 apples': a size such as 12GB or 8GiB."),
    "head workspace": ({"head_workspace": "1KB"}, "head_workspace='1KB': at least 64KiB, such as 256MiB."),
    "no size": ({"head_workspace": "some"}, "head_workspace='some': a size such as 12GB or 8GiB."),
    "router loss": ({"router_aux_loss_coef": 0.1}, "router_aux_loss_coef=0.1"),
    "lomo": ({"optim": "lomo"}, "optim='lomo'"),
    "order that resume cannot repeat": (
        {"train_sampling_strategy": "group_by_length"},
        "train_sampling_strategy='group_by_length' cannot be resumed exactly",
    ),
    "layerwise": ({"optim": "galore_adamw_layerwise"}, "optim='galore_adamw_layerwise' steps inside the backward"),
    "accumulation elsewhere": (
        {"accelerator_config": {"gradient_accumulation_kwargs": {"num_steps": 2}}},
        "set gradient_accumulation_steps instead of num_steps",
    ),
    "one of two arguments of an optimizer": (
        {"optim": "sgd", "optim_args": "momentum=0.9,dampenig=1"},
        "optim_args=.*: 'dampenig' has no effect: transformers does not read it for optim='sgd'",
    ),
    "an argument of an optimizer": (
        {"optim": "sgd", "optim_args": "momentum=much"},
        "optim_args='momentum=much' cannot be used with optim='sgd': could not convert",
    ),
    "no argument of an optimizer": ({"optim_args": "momentum"}, "optim_args='momentum': name=value, several"),
    "None": ({"beta": None}, "beta=None: a value is needed"),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_option(name: str, tmp_path: Path) -> None:
    options, message = OPTIONS[name]
    with pytest.raises(ValueError, match=message):
        tiny.config(tmp_path, **options)


TRAINING_ARGUMENTS = {
    "auto_find_batch_size": True,
    "average_tokens_across_devices": False,
    "ddp_find_unused_parameters": True,
    "include_for_metrics": ["inputs"],
    "label_smoothing_factor": 0.1,
    "length_column_name": "tokens",
    "logging_nan_inf_filter": True,
    "neftune_noise_alpha": 5.0,
    "prediction_loss_only": True,
    "save_on_each_node": True,
    "torch_compile": True,
}


@pytest.mark.parametrize("name", TRAINING_ARGUMENTS)
def test_training_argument_that_cannot_be_honoured(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"{name}=.* is not supported"):
        tiny.config(tmp_path, **{name: TRAINING_ARGUMENTS[name]})


def test_refused_names_exist() -> None:
    """A name that transformers has dropped would refuse nothing."""
    assert set(REFUSED) <= set(TrainingArguments.__dataclass_fields__)


def test_explicit_backend_that_cannot_run_here_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(ValueError, match="backend='triton' cannot run here: "):
        tiny.trainer(tmp_path, backend="triton")
    with pytest.raises(ValueError, match="backend='triton' cannot run here: "):
        fastdpo.selective_logprob(torch.zeros(2, 3), torch.zeros(2, dtype=torch.long), backend="triton")
    with pytest.raises(ValueError, match="backend='cuda' is unknown; accepted are auto, torch, triton"):
        fastdpo.preference_loss(*[torch.zeros(2)] * 4, backend="cuda")


def test_lora_and_model_options() -> None:
    with pytest.raises(ValueError, match="lora_r=0"):
        ModelConfig(lora_r=0)
    with pytest.raises(ValueError, match="dtype='float8' is unknown; accepted are auto, float32"):
        ModelConfig(dtype="float8")
    with pytest.raises(ValueError, match="lora_r=64 has no effect here: a continued adapter keeps its own"):
        ModelConfig(adapter_name_or_path="a", lora_r=64)
    with pytest.raises(ValueError, match="bnb_4bit_quant_type='fp4' has no effect here: set load_in_4bit=True"):
        ModelConfig(bnb_4bit_quant_type="fp4")
    assert ModelConfig(lora_target_modules="q_proj").lora_target_modules == ["q_proj"]


@pytest.mark.parametrize("installed", [True, False])
def test_automatic_optimizer(
    installed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Of bitsandbytes on a GPU where it is there; else torch's, which is said once."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *_: object() if installed else None)
    optimizer._tell_of_missing_bitsandbytes.cache_clear()
    found = [automatic_optimizer(True), automatic_optimizer(True), automatic_optimizer(False)]
    on_gpu = "paged_adamw_8bit" if installed else "adamw_torch_fused"
    assert found == [on_gpu, on_gpu, "adamw_torch"]
    assert [record.levelname for record in caplog.records] == ["WARNING"] * (not installed)
    assert ("pip install bitsandbytes" in caplog.text) is not installed
    assert FastDPOConfig(str(tmp_path), use_cpu=True).resolved().optim == "adamw_torch"


def test_four_bit_without_bitsandbytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *_: None)
    with pytest.raises(ImportError, match="load_in_4bit=True needs bitsandbytes: pip install bitsandbytes"):
        quantization_config(ModelConfig(load_in_4bit=True))


def headless() -> Any:
    return LlamaModel(tiny.llama().config)


def encoder_decoder() -> Any:
    return T5ForConditionalGeneration(T5Config(vocab_size=64, d_model=16, d_ff=16, num_layers=1, num_heads=2, d_kv=8))


def mixture() -> Any:
    return MixtralForCausalLM(
        MixtralConfig(vocab_size=257, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
                      num_key_value_heads=2, num_local_experts=2, router_aux_loss_coef=0.02)
    )  # fmt: skip


MODELS = {
    "no head": (headless, ValueError, "without a language-model head"),
    "encoder-decoder": (encoder_decoder, ValueError, "encoder-decoder"),
    "mixture of experts": (mixture, ValueError, "router_aux_loss_coef=0.02.*Set router_aux_loss_coef=0.0"),
    "no transformers model": (lambda: torch.nn.Linear(2, 2), TypeError, "model is a Linear"),
}


@pytest.mark.parametrize("name", MODELS)
def test_model(name: str, tmp_path: Path) -> None:
    make, error, message = MODELS[name]
    with pytest.raises(error, match=message):
        tiny.trainer(tmp_path, model=make())


def test_mixture_of_experts_trains_without_its_auxiliary_loss(tmp_path: Path) -> None:
    tiny.trainer(
        tmp_path,
        model=mixture(),
        router_aux_loss_coef=0.0,
        max_steps=1,
        peft_config=tiny.lora(target_modules=["q_proj"]),
    ).train()


def test_trainer_arguments(tmp_path: Path) -> None:
    model = tiny.llama()
    with pytest.raises(ValueError, match="ref_model is the same object as model"):
        tiny.trainer(tmp_path, model=model, ref_model=model)
    with pytest.raises(ValueError, match="ref_model has a vocabulary of 99, model one of 257"):
        tiny.trainer(tmp_path, ref_model=tiny.llama(vocab_size=99))
    with pytest.raises(ValueError, match="model has an adapter already"):
        tiny.trainer(tmp_path, model=get_peft_model(tiny.llama(), tiny.lora()))
    with pytest.raises(ValueError, match="virtual tokens"):
        tiny.trainer(tmp_path, peft_config=PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"))
    with pytest.raises(TypeError, match=r"args is a TrainingArguments; give a fastdpo\.FastDPOConfig"):
        FastDPOTrainer(tiny.llama(), args=TrainingArguments(str(tmp_path), use_cpu=True))
    with pytest.raises(TypeError, match="train_dataset is a streaming IterableDataset"):
        tiny.trainer(tmp_path, data=tiny.pairs(4).to_iterable_dataset())
    with pytest.raises(TypeError, match="processing_class is a str"):
        tiny.trainer(tmp_path, processing_class="gpt2")


def test_models_by_path(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such folder"):
        load_causal_lm(str(tmp_path / "nothing"))
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        load_causal_lm(str(tmp_path))
    encoder_decoder().save_pretrained(tmp_path / "t5")
    with pytest.raises(ValueError, match="is a T5Config, which has no causal language-model head"):
        load_causal_lm(str(tmp_path / "t5"))


def test_adapter_that_does_not_fit(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"adapter=.*no such folder"):
        load_adapter(tiny.llama(), str(tmp_path / "nothing"))
    with pytest.raises(FileNotFoundError, match=r"no adapter_config\.json"):
        load_adapter(tiny.llama(), str(tmp_path))
    get_peft_model(tiny.llama(), tiny.lora()).save_pretrained(tmp_path / "adapter")
    with pytest.raises(FileNotFoundError, match="It holds a PEFT adapter: pass it as adapter_name_or_path"):
        load_causal_lm(str(tmp_path / "adapter"))
    with pytest.raises(ValueError, match="does not fit the model"):
        load_adapter(tiny.llama(hidden_size=64), str(tmp_path / "adapter"))
    with pytest.raises(ValueError, match="does not fit the model"):
        load_adapter(tiny.llama(num_hidden_layers=1), str(tmp_path / "adapter"))


DATASETS = {
    "wrong columns": (Dataset.from_dict({"question": ["a"], "answer": ["b"]}), r"question.*answer|answer.*question"),
    "empty": (Dataset.from_dict({"prompt": [], "chosen": [], "rejected": []}), "empty"),
    "all equal": (Dataset.from_dict({"prompt": ["a"] * 2, "chosen": ["b"] * 2, "rejected": ["b"] * 2}), "2"),
}


@pytest.mark.parametrize("name", DATASETS)
def test_dataset(name: str, tmp_path: Path) -> None:
    data, message = DATASETS[name]
    with pytest.raises(ValueError, match=message):
        tiny.trainer(tmp_path, data=data)


class Poison(TrainerCallback):
    """Makes a weight infinite at step 3."""

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step == 2:
            next(p for n, p in model.named_parameters() if "lora_B" in n).data.fill_(math.inf)


@pytest.mark.parametrize("dynamic", [False, True])
def test_nonfinite_loss_stops_the_run_and_names_the_batch(dynamic: bool, tmp_path: Path) -> None:
    trainer = tiny.trainer(
        tmp_path, callbacks=[Poison()], max_steps=5, save_strategy="steps", save_steps=2, dynamic_beta=dynamic
    )
    with pytest.raises(NonFiniteLossError, match=r"step 3: loss nan.*checkpoint-2, is intact"):
        trainer.train()
    report = json.loads((tmp_path / NONFINITE_FILE).read_text())
    assert report["step"] == 3
    assert len(set(report["example_ids"])) == 8
    assert set(report["example_ids"]) <= set(trainer.train_dataset["example_id"])
    assert trainer.state.global_step == 2
    if trainer.dynamic_beta is not None:
        assert trainer.dynamic_beta.step == 2
    resumed = tiny.trainer(tmp_path, max_steps=5, save_strategy="no", dynamic_beta=dynamic)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 5


def test_several_splits_are_refused_but_for_evaluation(tmp_path: Path) -> None:
    splits = datasets.DatasetDict(train=tiny.pairs(8), test=tiny.pairs(4))
    with pytest.raises(ValueError, match="is a DatasetDict; pass one of its splits: train, test"):
        tiny.trainer(tmp_path, data=splits)
    trainer = tiny.trainer(tmp_path, eval_dataset=splits)
    assert {"eval_train_loss", "eval_test_loss"} <= trainer.evaluate().keys()
    with pytest.raises(ValueError, match="is a DatasetDict; pass one of its splits"):
        trainer.predict(splits)


def test_another_model_is_not_scored_in_the_place_of_its_own(tmp_path: Path) -> None:
    """The parts and the reference belong to the model that the trainer was built with."""
    trainer = tiny.trainer(tmp_path, eval_dataset=tiny.pairs(4))
    trainer.model = tiny.llama(seed=5)
    for call in (trainer.evaluate, trainer.train):
        with pytest.raises(RuntimeError, match=r"trainer\.model was replaced after the trainer was built"):
            call()
