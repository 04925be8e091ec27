"""Nothing that is not finite is saved or passes an evaluation, and a run that can train nothing is refused."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import yaml
from accelerate import Accelerator
from datasets import Dataset
from peft import get_peft_model
from safetensors.torch import load_file
from transformers import TrainerCallback, TrainerState

from fastdpo.commands.cli import main
from fastdpo.training.models.finite import frozen_weights, nonfinite
from fastdpo.training.models.setup import check_apart, check_optimizer
from fastdpo.training.objectives import PreferenceObjective
from fastdpo.training.runs.folder import RunFolder
from fastdpo.training.runs.nonfinite import (
    NONFINITE_FILE,
    Evaluated,
    NonFiniteLossError,
    NonFiniteWeightsError,
    SkippedSteps,
    require_finite,
)
from fastdpo.training.runs.standstill import steps_of
from fastdpo.training.runs.valid_json import valid_json


def strict(path: Path) -> Any:
    """A file as whoever is strict about JSON reads it."""

    def refuse(name: str) -> Any:
        raise AssertionError(f"{name} in {path}")

    return json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)


# Weights


def test_weights_that_are_not_finite_are_found() -> None:
    values = {
        "fine": torch.tensor([3.4e38, -1e-45]),
        "nan": torch.tensor([1.0, math.nan]),
        "inf": torch.tensor([[0.0], [-math.inf]], dtype=torch.bfloat16),
        "half": torch.full((9,), 65504.0, dtype=torch.float16),
        "double": torch.tensor([1e300], dtype=torch.float64),
        "none": torch.zeros(0),
        "whole": torch.tensor([1]),
    }
    assert nonfinite(values) == ["nan", "inf"]
    assert nonfinite({}) == []


@pytest.mark.parametrize("double", [True, False])
def test_a_weight_in_four_bits_that_was_not_finite(double: bool, tmp_path: Path) -> None:
    """Packed bits are no numbers, even where they are kept in a float dtype; the scales of their blocks are."""
    quantisation = copy.deepcopy(tiny.NF4)
    quantisation.bnb_4bit_use_double_quant, quantisation.bnb_4bit_quant_storage = double, torch.bfloat16
    found = []
    for value in (1.0, math.nan):
        model = tiny.llama()
        model.model.layers[1].mlp.up_proj.weight.data[0, 0] = value
        model.save_pretrained(tmp_path / str(value))
        loaded = type(model).from_pretrained(tmp_path / str(value), quantization_config=quantisation)
        loaded.requires_grad_(False)
        found.append(nonfinite(frozen_weights(loaded)))
    assert found == [[], ["model.layers.1.mlp.up_proj.weight"]]


class Breaks(TrainerCallback):
    """Makes one trained number infinite after a step, as an optimizer that diverges would."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step == self.step:
            first = next(p for name, p in model.named_parameters() if "lora_B" in name)
            first.data[0, 0] = math.inf


def test_weights_are_checked_before_a_checkpoint(tmp_path: Path) -> None:
    def trainer(**given: Any) -> Any:
        return tiny.trainer(tmp_path, max_steps=4, save_strategy="steps", save_steps=1, **given)

    broken = trainer(callbacks=[Breaks(3)])
    with pytest.raises(
        NonFiniteWeightsError, match=r"after step 3: 1 trained weights .*q_proj.lora_B.default.weight' first"
    ):
        broken.train()
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-2"]
    assert not (tmp_path / "adapter_model.safetensors").exists()
    with pytest.raises(NonFiniteWeightsError, match=r"Continue from .*checkpoint-2, which is intact"):
        broken.save_model()
    assert main(["verify", str(tmp_path)]) == 0
    mended = trainer()
    mended.train(resume_from_checkpoint=True)
    mended.save_model()
    assert not nonfinite(load_file(tmp_path / "adapter_model.safetensors"))


def test_weights_are_checked_at_the_end_and_in_another_folder(tmp_path: Path) -> None:
    trainer = tiny.trainer(tmp_path / "run", max_steps=2, callbacks=[Breaks(2)])
    with pytest.raises(NonFiniteWeightsError, match="No checkpoint had been saved: start again with a lower"):
        trainer.train()
    with pytest.raises(NonFiniteWeightsError, match="after step 2"):
        trainer.save_model(str(tmp_path / "elsewhere"))
    assert not (tmp_path / "elsewhere").exists()


class BreaksOnceSaved(Breaks):
    """The same, once the checkpoint of the step is written."""

    def on_step_end(self, *_: Any, **__: Any) -> None:
        pass

    def on_save(self, *given: Any, **kwargs: Any) -> None:
        super().on_step_end(*given, **kwargs)


def test_the_best_weights_may_be_finite_where_the_last_are_not(tmp_path: Path) -> None:
    """What counts is what `train` leaves in the model."""
    options = {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1, "max_steps": 2}
    tiny.trainer(
        tmp_path / "best", callbacks=[BreaksOnceSaved(2)], eval_dataset=tiny.pairs(4), load_best_model_at_end=True,
        **options,
    ).train()  # fmt: skip
    with pytest.raises(NonFiniteWeightsError, match=r"Continue from .*checkpoint-2, which is intact"):
        tiny.trainer(tmp_path / "last", callbacks=[BreaksOnceSaved(2)], eval_dataset=tiny.pairs(4), **options).train()


def test_weights_that_are_given(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Those that would be trained, and saved, must be finite; of others it is said, as no pair may read them."""
    model = tiny.llama()
    model.model.embed_tokens.weight.data[200, 3] = math.nan
    trainer = tiny.trainer(tmp_path, model=copy.deepcopy(model), max_steps=1)
    assert (
        "model: 1 weights hold numbers that are not finite: 'base_model.model.model.embed_tokens.weight'" in caplog.text
    )
    trainer.train()
    with pytest.raises(ValueError, match=r"model: 1 of the weights to be trained .*: 'model\.embed_tokens"):
        tiny.trainer(tmp_path, model=model, peft_config=None)


# Evaluations


@pytest.fixture
def poisoned() -> Any:
    """A model that gives NaN for every pair with a Z."""
    model = tiny.llama()
    (letter,) = tiny.tokenizer()("Z")["input_ids"]
    model.model.embed_tokens.weight.data[letter] = math.nan
    return model


def with_z(count: int, *bad: int) -> Dataset:
    rows = tiny.pairs(count, seed=4).to_list()
    return Dataset.from_list(
        [row | {"chosen": row["chosen"] + "Z" * (n in bad), "example_id": f"own:{n}"} for n, row in enumerate(rows)]
    )


def test_a_nonfinite_evaluation_stops_the_run(poisoned: Any, tmp_path: Path) -> None:
    sets = {"fine": tiny.pairs(4), "bad": with_z(24, 3, 20)}
    trainer = tiny.trainer(
        tmp_path, model=poisoned, eval_dataset=sets, max_steps=4, per_device_eval_batch_size=5, dynamic_beta=True,
        save_strategy="steps", save_steps=1, eval_strategy="steps", eval_steps=2,
    )  # fmt: skip
    with pytest.raises(NonFiniteLossError, match=r"step 2: the evaluation of eval_bad_dataset has the loss nan\. 2 "
                       r"examples are not finite: 'own:3', 'own:20'. Their scores .*checkpoint-1, is"):  # fmt: skip
        trainer.train()
    report = strict(tmp_path / NONFINITE_FILE)
    assert (report["step"], report["data set"], report["examples"]) == (2, "eval_bad_dataset", 2)
    assert report["example_ids"] == ["own:3", "own:20"]
    assert report["scores"]["chosen_logps"] == ["nan", "nan"]
    assert all(math.isfinite(float(value)) for value in report["scores"]["chosen_lengths"])
    assert not any("eval_bad_loss" in entry for entry in trainer.state.log_history)
    assert trainer.dynamic_beta.step == 2  # of two training steps, and no evaluation


def test_a_nonfinite_evaluation_alone(poisoned: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer = tiny.trainer(tmp_path, model=poisoned)
    with pytest.raises(NonFiniteLossError, match=r"25 examples are not finite: 'own:0', .*'own:19' and 5 more. Look"):
        trainer.evaluate(with_z(25, *range(25)))
    assert not (tmp_path / NONFINITE_FILE).exists()  # the folder is not this trainer's yet
    assert math.isfinite(trainer.evaluate(with_z(6))["eval_loss"])
    # A prediction returns what was asked for, each example's scores
    found = trainer.predict(with_z(6, 4)).predictions
    assert torch.from_numpy(found).isfinite().all(dim=1).tolist() == [True, True, True, True, False, True]
    assert "test_dataset: 1 examples are not finite: 'own:4'" in caplog.text


def test_the_loss_alone_or_a_metric_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A loss that overflows names the examples of which it does; a metric that is undefined is null in the file."""
    trainer = tiny.trainer(tmp_path, max_steps=1)
    metrics, loss = PreferenceObjective.metrics, PreferenceObjective.evaluation_loss
    monkeypatch.setattr(
        PreferenceObjective, "metrics", lambda *given: metrics(*given) | {"undefined": torch.tensor(math.nan)}
    )
    trainer.train()
    trainer.save_model()
    trainer.save_run(trainer.evaluate(tiny.pairs(4)))
    written = strict(tmp_path / "metrics.json")
    assert written["results"]["eval_undefined"] is None
    assert written["log"][0]["undefined"] is None
    assert written["results"]["eval_loss"] > 0

    def overflows(self: Any, scores: Any) -> Any:
        output = loss(self, scores)
        losses = output.losses.clone()
        losses[2:] = math.inf
        return output._replace(losses=losses, loss=losses.mean())

    monkeypatch.setattr(PreferenceObjective, "evaluation_loss", overflows)
    with pytest.raises(NonFiniteLossError, match=r"has the loss inf\. 23 examples are not finite: 'own:2'.*and 3 more"):
        trainer.evaluate(with_z(25))
    report = strict(tmp_path / NONFINITE_FILE)
    assert report["example_ids"] == [f"own:{n}" for n in range(2, 22)]
    assert len(report["scores"]["chosen_logps"]) == 20


def test_a_score_alone(tmp_path: Path) -> None:
    """A hinge of 0 hides a score that is no number."""
    scores = {"logps": torch.tensor([0.0, -math.inf]), "lengths": torch.ones(2)}
    evaluated = Evaluated("eval_dataset", 0.25, scores, torch.zeros(2), ["a", "b"])
    with pytest.raises(NonFiniteLossError, match=r"has the loss 0\.25\. 1 examples are not finite: 'b'\. Look"):
        require_finite(evaluated, RunFolder(tmp_path), tiny.ranks(), 3, only_warn=False)


# JSON


def test_json_is_valid_whatever_is_written() -> None:
    value = {
        "a": [math.nan, 1.5, (math.inf,)],
        "b": {"c": -math.inf},
        "d": "NaN",
        "e": torch.tensor(math.nan),
        "f": True,
    }
    assert json.loads(valid_json(value)) == {
        "a": [None, 1.5, [None]],
        "b": {"c": None},
        "d": "NaN",
        "e": None,
        "f": True,
    }


class LogsNan(TrainerCallback):
    """As transformers logs the gradient norm of a step that fp16 has skipped."""

    def on_log(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        state.log_history[-1]["grad_norm"] = math.nan


def test_states_of_checkpoints_are_valid_json(tmp_path: Path) -> None:
    options = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1, "max_grad_norm": math.inf}
    tiny.trainer(tmp_path, callbacks=[LogsNan()], **options).train()
    for path in [*tmp_path.glob("checkpoint-*/*.json"), *tmp_path.glob("*.json")]:
        strict(path)
    state = strict(tmp_path / "checkpoint-2" / "trainer_state.json")
    assert [entry["grad_norm"] for entry in state["log_history"]] == [None, None]
    # max_grad_norm is part of what a resume compares
    resumed = tiny.trainer(tmp_path, **options | {"max_steps": 3})
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 3


# A run that can train nothing


def frozen(trainer: Any) -> None:
    trainer.model.requires_grad_(False)


def malformed(trainer: Any) -> None:
    trainer.args.optim_args = "foo"  # a config would refuse it


STILL: dict[str, tuple[dict[str, Any], Callable[[Any], None] | None, str]] = {
    "no step": ({"max_steps": 0}, None, "max_steps=0 trains nothing"),
    "no epoch": ({"num_train_epochs": 0}, None, "num_train_epochs=0 trains nothing"),
    "no rate": ({"learning_rate": 0.0}, None, "learning_rate=0 trains nothing"),
    "all warm-up": ({"max_steps": 1, "warmup_steps": 3}, None, "'linear' with 3 steps of warm-up gives each of the 1 "),
    "no scale": ({"peft_config": tiny.lora(lora_alpha=0)}, None, "lora_alpha=0: the LoRA on '.*q_proj' is multiplied"),
    "no scale of one": (
        {"peft_config": tiny.lora(alpha_pattern={r".*1\.mlp\.up_proj": 0})}, None,
        "lora_alpha=0: the LoRA on '.*1.mlp.up_proj'",
    ),
    "one batch, dropped": (
        {"dataloader_drop_last": True, "per_device_train_batch_size": 6, "gradient_accumulation_steps": 3}, None,
        "dataloader_drop_last=True drops the only batch: there are 16 pairs, and a step takes 18",
    ),
    "schedule without its arguments": (
        {"lr_scheduler_type": "warmup_stable_decay"}, None,
        "lr_scheduler_type='warmup_stable_decay' cannot be made with lr_scheduler_kwargs=None: .*num_decay_steps",
    ),
    "schedule with others": (
        {"lr_scheduler_type": "cosine_with_restarts", "lr_scheduler_kwargs": {"num_cycles": "a"}}, None,
        "cannot be made with lr_scheduler_kwargs={'num_cycles': 'a'}",
    ),
    "optimizer with others": (
        {"optim": "adafactor"}, malformed, "optim='adafactor' cannot be made with optim_args='foo'",
    ),
    "frozen since": ({}, frozen, "every parameter of the model is frozen"),
}  # fmt: skip


@pytest.mark.parametrize("name", STILL)
def test_a_run_that_can_train_nothing_is_refused(name: str, tmp_path: Path) -> None:
    """Before its folder is touched; an evaluation needs none of it."""
    options, change, message = STILL[name]
    trainer = tiny.trainer(tmp_path, **options)
    if change is not None:
        change(trainer)
    with pytest.raises(ValueError, match=message):
        trainer.train()
    assert not list(tmp_path.iterdir())
    if name in ("no step", "no scale"):
        assert trainer.evaluate(tiny.pairs(4))["eval_loss"] == pytest.approx(math.log(2))  # at the reference


def test_a_scale_of_zero_does_not_move(tmp_path: Path) -> None:
    """Why it is refused: y = W x + (α/r) B A x has no gradient by A and B at α = 0, whatever they are."""
    model = get_peft_model(tiny.llama(), tiny.lora(lora_alpha=0, init_lora_weights=False))
    model(input_ids=torch.tensor([[1, 2, 3]]), labels=torch.tensor([[1, 2, 3]])).loss.backward()
    gradients = [p.grad for p in model.parameters() if p.requires_grad]
    assert len(gradients) == 28
    assert not any(bool(gradient.any()) for gradient in gradients)


@pytest.mark.parametrize(("options", "steps"), [
    ({}, 6),  # three epochs of two batches
    ({"num_train_epochs": 0.1}, 1),
    ({"max_steps": 5}, 5),
    ({"per_device_train_batch_size": 5}, 12),
    ({"per_device_train_batch_size": 5, "dataloader_drop_last": True}, 9),
])  # fmt: skip
def test_steps_are_those_that_transformers_takes(options: dict[str, Any], steps: int, tmp_path: Path) -> None:
    trainer = tiny.trainer(tmp_path, **options)
    assert steps_of(trainer.args, 16) == steps
    trainer.train()
    assert trainer.state.global_step == steps


def test_the_command_refuses_before_anything_is_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = {"model_name_or_path": "./no-model", "dataset_name_or_path": "./no-data.jsonl", "use_cpu": True}
    path = tmp_path / "run.yaml"
    for more, message in (({"max_steps": 0}, "max_steps=0"), ({"learning_rate": 0.0}, "learning_rate=0")):
        path.write_text(yaml.safe_dump(options | more | {"output_dir": str(tmp_path / "run")}))
        assert main(["train", str(path)]) == 2
        assert f"{message} trains nothing" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_an_optimizer_that_leaves_weights_where_they_are() -> None:
    model = get_peft_model(tiny.llama(), tiny.lora())
    trained = [p for p in model.parameters() if p.requires_grad]
    with pytest.raises(ValueError, match="SGD holds 27 parameters, 0 of which are not trained, and lacks 1 that are"):
        check_optimizer(torch.optim.SGD(trained[1:], lr=0.1), model)
    still = torch.optim.SGD([{"params": trained[:2], "lr": 0.0}, {"params": trained[2:]}], lr=0.1)
    with pytest.raises(ValueError, match="a group of the SGD has lr=0 and holds 2 parameters that are to be trained"):
        check_optimizer(still, model)
    warm = torch.optim.SGD(trained, lr=0.1)
    torch.optim.lr_scheduler.LambdaLR(warm, lambda step: step / 10)
    assert warm.param_groups[0]["lr"] == 0
    check_optimizer(warm, model)


def test_a_reference_shares_no_weight_with_the_policy(tmp_path: Path) -> None:
    base = tiny.llama()
    with pytest.raises(ValueError, match=r"ref_model shares 25 weights with model, .*Leave ref_model out"):
        tiny.trainer(tmp_path, model=base, ref_model=get_peft_model(base, tiny.lora(target_modules=["q_proj"])))
    other = tiny.llama(seed=2)
    check_apart(tiny.llama(), other)
    one = tiny.llama()
    one.model.norm.weight = other.model.norm.weight
    with pytest.raises(ValueError, match=r"shares 1 weights with model, 'model\.norm.weight' first"):
        check_apart(one, other)
    view = tiny.llama()
    view.model.norm.weight.data = other.lm_head.weight.data[1]
    with pytest.raises(
        ValueError, match=r"shares 1 weights with model, 'lm_head.weight' first \(there 'model.norm.weight'\)"
    ):
        check_apart(view, other)
    other.save_pretrained(tmp_path / "saved")  # two models of one file are two
    check_apart(*(type(other).from_pretrained(tmp_path / "saved") for _ in range(2)))


# fp16's loss scaler


def test_steps_that_the_scaler_skips() -> None:
    counted = SkippedSteps()
    for skipped in (True, True, False, *[True] * 39):
        counted.count(skipped)
    counted.finish()  # one was taken
    with pytest.raises(NonFiniteLossError, match="fp16: 40 steps in a row were skipped"):
        counted.count(True)
    SkippedSteps().finish()


def test_a_run_whose_every_step_was_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = tiny.trainer(tmp_path, max_steps=2)
    monkeypatch.setattr(Accelerator, "optimizer_step_was_skipped", property(lambda _: True))
    with pytest.raises(NonFiniteLossError, match="fp16: all 2 steps were skipped"):
        trainer.train()
