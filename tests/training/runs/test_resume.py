"""Checkpoints: exact resume after a kill, torn and truncated folders, stop signals, the output folder's rules."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from launched import Forks
from peft import get_peft_model
from safetensors.torch import load_file
from transformers import TrainerCallback
from worker import state

from fastdpo import DynamicBeta
from fastdpo.training.reference import REFERENCE_CACHE_FILE
from fastdpo.training.runs.callbacks import TrainingInterrupted
from fastdpo.training.runs.checkpoint import MANIFEST, CheckpointError, checkpoints
from fastdpo.training.runs.start import resolve_resume

#: 24 pairs, 8 per step: three steps an epoch, so step 10 lies inside one. The default AdamW keeps moments.
OPTIONS = {
    "max_steps": 20,
    "save_strategy": "steps",
    "save_steps": 10,
    "dynamic_beta": True,
    "keep_ratio": 0.7,
    "micro_batch_tokens": "120",
    "lr_scheduler_type": "cosine",
}


#: Runs a job in a process of its own: return code and stderr.
Work = Callable[..., tuple[int, str]]


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Work]:
    forks = Forks()

    def one(folder: Path, **job: Any) -> tuple[int, str]:
        stderr = tmp_path_factory.mktemp("stderr") / "stderr"
        return forks.run({"folder": str(folder), "options": OPTIONS, **job}, stderr)

    yield one
    forks.close()


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory, work: Work) -> Path:
    """A run of 20 steps, killed with SIGKILL in step 14, after the checkpoint of step 10."""
    folder = tmp_path_factory.mktemp("killed")
    code, stderr = work(folder, event="kill", at=14)
    assert code == -signal.SIGKILL, stderr[-2000:]
    assert [p.name for p in folder.glob("checkpoint-*")] == ["checkpoint-10"]
    return folder


def test_resume_after_a_kill_is_bitwise_equal(killed: Path, tmp_path: Path) -> None:
    straight = tiny.trainer(tmp_path, data=tiny.pairs(24), **OPTIONS)
    straight.train()
    resumed = tiny.trainer(killed, data=tiny.pairs(24), **OPTIONS)
    resumed.train(resume_from_checkpoint=True)
    expected, found = state(straight), state(resumed)
    assert expected["dynamic_beta.step"] == 20
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        assert torch.equal(value, found[name]), name
    figures = [
        [{k: v for k, v in entry.items() if not k.startswith("train_")} for entry in trainer.state.log_history[:-1]]
        for trainer in (straight, resumed)
    ]
    assert figures[0] == figures[1]


@pytest.mark.parametrize("reference", ["lazy", "precompute"])
@pytest.mark.parametrize("step", [2, 4])
def test_resume_with_a_reference_cache_is_bitwise_equal(step: int, reference: str, work: Work, tmp_path: Path) -> None:
    """Killed in the step after checkpoint 2, in the first epoch, where a lazy cache holds 16 of 24 pairs; and after
    checkpoint 4, in the second, where it is full. Once with a lean body that is recomputed."""
    options = OPTIONS | {"max_steps": 6, "save_steps": 2, "reference": reference, "micro_batch_tokens": "90"}
    options |= {"lean_body": "on", "gradient_checkpointing": "true"} if reference == "precompute" else {}
    folder = tmp_path / "killed"
    code, stderr = work(folder, event="kill", at=step + 1, options=options)
    assert code == -signal.SIGKILL, stderr[-2000:]
    assert resolve_resume(folder, True) == folder / f"checkpoint-{step}"
    kept = load_file(folder / REFERENCE_CACHE_FILE)["logps"]
    assert len(kept) == (16 if (step, reference) == (2, "lazy") else 24)
    straight = tiny.trainer(tmp_path / "straight", data=tiny.pairs(24), **options)
    straight.train()
    resumed = tiny.trainer(folder, data=tiny.pairs(24), **options)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.parts.references.cache.computed == 24 - len(kept)
    expected, found = state(straight), state(resumed)
    for name, value in expected.items():
        assert torch.equal(value, found[name]), name
    names = [trainer.parts.references.file for trainer in (straight, resumed)]
    assert names[0].read_bytes() == names[1].read_bytes()


def test_continued_adapter_resumes_against_the_reference_it_started_with(tmp_path: Path) -> None:
    """The adapter in the checkpoint is not the reference; another start than the run's is refused."""
    trainer = tiny.trainer(tmp_path, peft_config=None, model=_adapted(seed=3), **(OPTIONS | {"max_steps": 10}))
    trainer.train()
    with pytest.raises(CheckpointError, match="another reference"):
        tiny.trainer(tmp_path, peft_config=None, model=_adapted(seed=4), **OPTIONS).train(resume_from_checkpoint=True)
    again = tiny.trainer(tmp_path, peft_config=None, model=_adapted(seed=3), **OPTIONS)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 20


def _adapted(seed: int) -> Any:
    model = tiny.llama()
    torch.manual_seed(seed)
    return get_peft_model(model, tiny.lora(init_lora_weights=False))


def test_kill_in_a_save_leaves_nothing_that_resume_accepts(work: Work, tmp_path: Path) -> None:
    code, stderr = work(tmp_path, event="kill in save", at=20)
    assert code == -signal.SIGKILL, stderr[-2000:]
    (torn,) = tmp_path.glob("_fastdpo-*/checkpoint-20")
    assert (torn / "adapter_model.safetensors").is_file(), "the kill came too early to test anything"
    with pytest.raises(CheckpointError, match=MANIFEST):
        resolve_resume(tmp_path, str(torn))
    assert resolve_resume(tmp_path, True) == tmp_path / "checkpoint-10"
    resumed = tiny.trainer(tmp_path, data=tiny.pairs(24), **OPTIONS)
    resumed.train(resume_from_checkpoint=True)
    assert not list(tmp_path.glob("_*"))
    assert resolve_resume(tmp_path, True) == tmp_path / "checkpoint-20"


@pytest.mark.parametrize("name", ["sigterm", "sigint"])
def test_stop_signal_saves_a_checkpoint_and_says_so(name: str, work: Work, tmp_path: Path) -> None:
    number = {"sigterm": signal.SIGTERM, "sigint": signal.SIGINT}[name]
    code, stderr = work(tmp_path, event=name, at=3)
    assert code == 128 + number, stderr[-2000:]
    assert resolve_resume(tmp_path, True) == tmp_path / "checkpoint-3"
    assert f"{name.upper()}: saved {tmp_path / 'checkpoint-3'}" in stderr


@pytest.mark.parametrize(
    "strategy",
    [
        {"save_strategy": "no"},
        {"save_strategy": "best", "eval_strategy": "steps", "eval_steps": 1, "metric_for_best_model": "loss"},
        {
            "save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1, "save_total_limit": 1,
            "load_best_model_at_end": True, "metric_for_best_model": "loss", "greater_is_better": True,
        },
    ],
    ids=["no", "best", "best at end"],
)  # fmt: skip
def test_stop_signal_saves_the_step_in_flight_under_every_strategy(
    strategy: dict[str, Any], work: Work, tmp_path: Path
) -> None:
    code, stderr = work(
        tmp_path, event="sigterm", at=3, eval_pairs=4, options={"max_steps": 20, "dynamic_beta": True, **strategy}
    )
    assert code == 128 + signal.SIGTERM, stderr[-2000:]
    assert f"saved {tmp_path / 'checkpoint-3'}" in stderr
    assert resolve_resume(tmp_path, True) == tmp_path / "checkpoint-3"


class Signal(TrainerCallback):
    """Marks a stop signal as received at the start of step 2, once the last step has ended, or in an evaluation."""

    def __init__(self, when: str) -> None:
        self.when, self.trainer = when, None

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.when == "step 2" and state.global_step == 1:
            self.trainer.stop_signals.received = signal.SIGTERM

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **kwargs: Any) -> None:
        if self.when == "after the last step" and "train_loss" not in logs and state.global_step == state.max_steps:
            self.trainer.stop_signals.received = signal.SIGTERM

    def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.when == "evaluation" and state.global_step == 4:
            self.trainer.stop_signals.received = signal.SIGTERM


def test_stop_in_an_evaluation_saves_what_the_strategy_would_not(tmp_path: Path) -> None:
    """Margins grow, so with the lowest as the best no second checkpoint is due; the stop saves one all the same."""
    callback = Signal("evaluation")
    trainer = tiny.trainer(
        tmp_path,
        callbacks=[callback],
        eval_dataset=tiny.pairs(4, seed=9),
        eval_strategy="epoch",
        save_strategy="best",
        metric_for_best_model="rewards/margins",
        greater_is_better=False,
        num_train_epochs=3,
    )
    callback.trainer = trainer
    with pytest.raises(TrainingInterrupted, match=r"SIGTERM: saved .*checkpoint-4"):
        trainer.train()
    assert [p.name for p in checkpoints(tmp_path)] == ["checkpoint-2", "checkpoint-4"]


@pytest.mark.parametrize(("when", "step"), [("step 2", 2), ("after the last step", 3)])
def test_stop_does_not_wait_for_an_evaluation_and_loses_no_step(when: str, step: int, tmp_path: Path) -> None:
    callback = Signal(when)
    trainer = tiny.trainer(
        tmp_path,
        callbacks=[callback],
        eval_dataset=tiny.pairs(4, seed=9),
        eval_strategy="epoch",
        max_steps=3,
        data=tiny.pairs(24),
    )
    callback.trainer = trainer
    with pytest.raises(TrainingInterrupted, match=f"SIGTERM: saved .*checkpoint-{step}"):
        trainer.train()
    assert resolve_resume(tmp_path, True) == tmp_path / f"checkpoint-{step}"
    assert not any("eval_loss" in entry for entry in trainer.state.log_history)


def test_output_folder_of_another_run_is_refused(tmp_path: Path) -> None:
    options = OPTIONS | {"max_steps": 4, "save_steps": 2}
    first = tiny.trainer(tmp_path, **options)
    first.train()
    first.train()  # its own folder
    with pytest.raises(CheckpointError, match=r"holds another run \(checkpoint-2, checkpoint-4\)"):
        tiny.trainer(tmp_path, **options).train()
    tiny.trainer(tmp_path, overwrite_output_dir=True, **(options | {"max_steps": 1})).train()
    assert [p.name for p in tmp_path.glob("checkpoint-*")] == ["checkpoint-1"], "a stale later step would be resumed"


@pytest.mark.parametrize(
    ("resume", "message"),
    [(True, "holds no checkpoint"), ("/no/such/checkpoint-3", "no such folder")],
)
def test_resume_without_a_checkpoint(resume: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=message):
        tiny.trainer(tmp_path, max_steps=1).train(resume_from_checkpoint=resume)


def test_weights_only_checkpoint_and_other_options_are_not_resumed(tmp_path: Path) -> None:
    options = {"max_steps": 1, "save_strategy": "steps", "save_steps": 1}
    tiny.trainer(tmp_path / "weights", save_only_model=True, **options).train()
    with pytest.raises(CheckpointError, match="no optimizer"):
        tiny.trainer(tmp_path / "weights", **options).train(resume_from_checkpoint=True)
    tiny.trainer(tmp_path / "plain", **options).train()
    changes = {"dynamic_beta=False": {"dynamic_beta": True}, "beta=0.5": {"beta": 0.1}, "seed=42": {"seed": 1}}
    changes["deterministic_attention=False"] = {"deterministic_attention": True}
    changes["head_workspace_bytes=268435456"] = {"head_workspace": "1MiB", "backend": "triton"}
    changes["pairs per step=8"] = {"per_device_train_batch_size": 4}
    for saved, change in changes.items():
        with pytest.raises(CheckpointError, match=f"was trained with {saved}, this run has"):
            tiny.trainer(tmp_path / "plain", **options, **change).train(resume_from_checkpoint=True)
    with pytest.raises(CheckpointError, match="another reference"):
        tiny.trainer(tmp_path / "plain", model=tiny.llama(seed=7), **options).train(resume_from_checkpoint=True)


@pytest.mark.parametrize("adapter", ["default", "preferences"])
def test_best_checkpoint_is_kept_and_loaded(adapter: str, tmp_path: Path) -> None:
    """The learning rate makes every step worse, so the first checkpoint is the best."""
    model = get_peft_model(tiny.llama(), tiny.lora(), adapter_name=adapter)
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1}
    trainer = tiny.trainer(
        tmp_path,
        eval_dataset=tiny.pairs(8, seed=9),
        model=model,
        peft_config=None,
        load_best_model_at_end=True,
        metric_for_best_model="rewards/margins",
        greater_is_better=False,
        save_total_limit=2,
        **options,
    )
    trainer.train()
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-1")
    history = {
        entry["step"]: entry["eval_rewards/margins"] for entry in trainer.state.log_history if "eval_loss" in entry
    }
    assert history[1] < history[4]
    assert trainer.evaluate()["eval_rewards/margins"] == pytest.approx(history[1], abs=1e-6)


def test_a_checkpoint_holds_the_statistics_that_are_in_use(tmp_path: Path) -> None:
    trainer = tiny.trainer(
        tmp_path, data=tiny.pairs(16), dynamic_beta=True, max_steps=2, save_steps=2, save_strategy="steps"
    )
    trainer.objective.dynamic_beta = DynamicBeta(0.5, momentum=0.2)
    trainer.train()
    saved = load_file(str(tmp_path / "checkpoint-2" / "dynamic_beta.safetensors"))
    assert saved["step"] == 2
    assert all(torch.equal(saved[name], value) for name, value in trainer.dynamic_beta.state_dict().items())
