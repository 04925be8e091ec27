"""Runs that are stopped in any phase, by a signal, memory or another rank: resumed, they are the undisturbed one."""

from __future__ import annotations

import itertools
import json
import logging
import re
import signal
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import torch.distributed as dist
from launched import WORKER, Forks, on_two_ranks
from transformers import EarlyStoppingCallback, TrainerCallback
from worker import Event, state

from fastdpo.commands import cli
from fastdpo.training.ranks import Ranks
from fastdpo.training.runs import failures
from fastdpo.training.runs.callbacks import TrainingInterrupted
from fastdpo.training.runs.checkpoint import checkpoints
from fastdpo.training.runs.failures import OptimizerOutOfMemory
from fastdpo.training.runs.saving import TRAINER_STATE_FILE

pytestmark = pytest.mark.slow

#: 24 pairs, 8 per step: three steps an epoch. The default AdamW keeps moments.
OPTIONS: dict[str, Any] = {
    "max_steps": 8,
    "save_strategy": "steps",
    "save_steps": 4,
    "dynamic_beta": True,
    "keep_ratio": 0.7,
    "lr_scheduler_type": "constant",
}
TIMES = ("runtime", "per_second")


def assert_same(one: Any, other: Any) -> None:
    """The weights and statistics of two runs, bitwise."""
    expected, found = state(one), state(other)
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        assert torch.equal(value, found[name]), name


@pytest.mark.parametrize(
    "length", [{"max_steps": 8}, {"max_steps": -1, "num_train_epochs": 2}], ids=["inside an epoch", "epochs"]
)
def test_a_finished_run_resumed_says_so_and_trains_nothing(
    length: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = tiny.trainer(tmp_path, data=tiny.pairs(24), **(OPTIONS | length))
    run.train()
    last = run.state.max_steps
    again = tiny.trainer(tmp_path, data=tiny.pairs(24), **(OPTIONS | length))
    with caplog.at_level(logging.WARNING):
        result = again.train(resume_from_checkpoint=True)
    assert f"checkpoint at step {last} of {last}: this run is finished, nothing is trained." in caplog.text
    assert_same(run, again)
    assert (result.global_step, result.metrics) == (last, {})
    assert again.state.log_history == [entry for entry in run.state.log_history if "train_loss" not in entry]


def test_a_finished_run_trains_on_where_more_steps_are_asked_for(tmp_path: Path) -> None:
    straight = tiny.trainer(tmp_path / "straight", data=tiny.pairs(24), **(OPTIONS | {"max_steps": 12}))
    straight.train()
    tiny.trainer(tmp_path / "run", data=tiny.pairs(24), **OPTIONS).train()
    longer = tiny.trainer(tmp_path / "run", data=tiny.pairs(24), **(OPTIONS | {"max_steps": 12}))
    assert longer.train(resume_from_checkpoint=True).metrics["train_loss"] > 0
    assert_same(straight, longer)


class Stops(TrainerCallback):
    """Marks a stop signal as received in step n, ("step", n), or where one batch is left of the evaluation after it,
    ("evaluation", n): the first of `events` that has not been yet, over all the trainers that share them."""

    def __init__(self, events: list[tuple[str, int]], batches: int) -> None:
        self.events, self.batches, self.trainer = events, batches, None

    def _stop(self, *event: Any) -> None:
        if self.events[:1] == [event]:
            del self.events[0]
            self.trainer.stop_signals.received = signal.SIGTERM

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.left = self.batches

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.left = self.batches
        self._stop("step", state.global_step + 1)

    def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.left -= 1
        if self.left == 1:
            self._stop("evaluation", state.global_step)


def untimed(history: list[dict[str, float]]) -> list[dict[str, float]]:
    return [{k: v for k, v in entry.items() if not k.endswith(TIMES)} for entry in history if "train_loss" not in entry]


EVERY_TWO = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2}
BEST = {"metric_for_best_model": "rewards/margins", "greater_is_better": False}
SIX = [("step", 2), ("evaluation", 4), ("step", 6), ("evaluation", 6)]
#: Options, and where the run is stopped. Margins grow, so with the lowest as the best the first evaluation is the best.
EVALUATED: dict[str, tuple[dict[str, Any], list[tuple[str, int]]]] = {
    "save the best": (EVERY_TWO | BEST | {"save_strategy": "best", "save_steps": 500}, SIX),
    "load the best": (
        EVERY_TWO | BEST | {"greater_is_better": True, "load_best_model_at_end": True, "save_total_limit": 1},
        SIX,
    ),
    "plateau": (
        EVERY_TWO
        | {
            "eval_on_start": True,
            "save_steps": 3,
            "lr_scheduler_type": "reduce_lr_on_plateau",
            "lr_scheduler_kwargs": {"patience": 0},
        }
        | BEST,
        [("evaluation", 0), *SIX],
    ),
    "early stop": (EVERY_TWO | BEST | {"load_best_model_at_end": True}, [("step", 2), ("evaluation", 4), ("step", 6)]),
    "saves less often": (
        EVERY_TWO | BEST | {"eval_steps": 1, "load_best_model_at_end": True},
        [("step", 1), ("evaluation", 3)],
    ),
    "two sets, at the end of an epoch": (
        {"eval_strategy": "epoch", "save_strategy": "epoch"},
        [("step", 3), ("evaluation", 3), ("step", 4), ("evaluation", 6)],
    ),
}


@pytest.mark.parametrize("name", EVALUATED)
def test_a_run_stopped_at_its_evaluations_evaluates_when_it_is_resumed(name: str, tmp_path: Path) -> None:
    """With dropout on: an evaluation that is repeated must not move the random state."""
    options, stops = EVALUATED[name]
    stops = list(stops)
    evaluated: Any = tiny.pairs(6, seed=9)
    batches = 3
    if "two sets" in name:
        evaluated, batches = {"a": evaluated, "b": tiny.pairs(4, seed=8)}, 5

    def made(folder: Path) -> Any:
        callbacks = [Stops([] if folder.name == "straight" else stops, batches)]
        callbacks += [EarlyStoppingCallback(1)] if name == "early stop" else []
        trainer = tiny.trainer(
            folder,
            data=tiny.pairs(24),
            eval_dataset=evaluated,
            peft_config=tiny.lora(lora_dropout=0.2),
            callbacks=callbacks,
            **{"max_steps": 6, "disable_dropout": False, "per_device_eval_batch_size": 2, **options},
        )
        callbacks[0].trainer = trainer
        return trainer

    straight = made(tmp_path / "straight")
    straight.train()
    while True:
        trainer = made(tmp_path / "stopped")
        planned = len(stops)
        try:
            trainer.train(resume_from_checkpoint=bool(checkpoints(tmp_path / "stopped")))
            break
        except TrainingInterrupted:
            assert len(stops) == planned - 1
    assert stops == ([("step", 6)] if name == "early stop" else [])
    assert trainer.state.global_step == (4 if name == "early stop" else 6)
    assert untimed(trainer.state.log_history) == untimed(straight.state.log_history)
    for field in ("best_metric", "best_global_step", "global_step"):
        assert getattr(trainer.state, field) == getattr(straight.state, field)
    assert_same(straight, trainer)
    for saved in checkpoints(tmp_path / "straight"):
        pair = [tmp_path / folder / saved.name / TRAINER_STATE_FILE for folder in ("straight", "stopped")]
        expected, found = (untimed(json.loads(path.read_text())["log_history"]) for path in pair)
        assert expected == found


def test_memory_that_runs_out_in_the_optimizer_saves_no_torn_weights(tmp_path: Path) -> None:
    straight = tiny.trainer(tmp_path / "straight", data=tiny.pairs(24), **OPTIONS)
    straight.train()
    run = tiny.trainer(tmp_path / "run", data=tiny.pairs(24), callbacks=[Event("oom in the optimizer", 8)], **OPTIONS)
    last = re.escape(str(tmp_path / "run" / "checkpoint-4"))
    message = rf"rank 0 of 1: memory ran out in the optimizer's part of step 8, .*\(injected\).* {last}, is whole: "
    with pytest.raises(OptimizerOutOfMemory, match=message):
        run.train()
    assert [path.name for path in checkpoints(tmp_path / "run")] == ["checkpoint-4"]
    again = tiny.trainer(tmp_path / "run", data=tiny.pairs(24), **OPTIONS)
    again.train(resume_from_checkpoint=True)
    assert_same(straight, again)


def test_memory_that_runs_out_elsewhere_is_no_error_of_the_optimizer(tmp_path: Path) -> None:
    class Elsewhere(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            raise torch.OutOfMemoryError("elsewhere")

    with pytest.raises(torch.OutOfMemoryError, match="elsewhere"):
        tiny.trainer(tmp_path, callbacks=[Elsewhere()], max_steps=1).train()


def test_a_rank_that_stops_is_named_by_the_other_and_the_run_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    """Rank 1 is killed in step 3; rank 1 runs out of memory in the optimizer in step 4."""
    options = OPTIONS | {"max_steps": 5, "save_steps": 2, "per_device_train_batch_size": 4}
    straight = {"folder": str(tmp_path / "straight"), "options": options, "result": str(tmp_path / "straight.pt")}
    killed = {"folder": str(tmp_path / "run"), "options": options, "event": "kill", "at": 3, "of": 1}
    stderr = on_two_ranks(WORKER, [straight, killed], fails=True)
    last = f"The last checkpoint, {tmp_path / 'run' / 'checkpoint-2'}, is whole"
    assert f"RankStopped: rank 1 of 2 stopped in step 3 (killed, or its machine was lost). {last}: " in stderr
    resumed = {"folder": str(tmp_path / "run"), "options": options, "resume": True, "result": str(tmp_path / "run.pt")}
    torn = {"folder": str(tmp_path / "torn"), "options": options, "event": "oom in the optimizer", "at": 4, "of": 1}
    stderr = on_two_ranks(WORKER, [resumed, torn], fails=True)
    assert "RankStopped: rank 1 of 2 stopped in step 4: OptimizerOutOfMemory: rank 1 of 2: memory ran out" in stderr
    assert [path.name for path in checkpoints(tmp_path / "torn")] == ["checkpoint-2"]
    expected, found = (torch.load(tmp_path / f"{name}.pt")["state"] for name in ("straight", "run"))
    for name, value in expected.items():
        assert torch.equal(value, found[name]), name


def test_a_rank_that_only_waits_is_not_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 0's collective fails, rank 3 still waits in its own, ranks 1 and 2 are gone. What rank 0 has found out, rank
    3 says too, without a roll call of its own in step 10."""
    store = dist.HashStore()
    monkeypatch.setattr(failures, "_get_default_store", lambda: store)
    monkeypatch.setattr(failures, "_calls", itertools.repeat(0))
    monkeypatch.setattr(failures, "GRACE", 2.0)
    first, last = (
        failures.NamesStoppedRanks(Ranks(rank, 4, torch.device("cpu")), lambda step=7 + rank: step, str(tmp_path))
        for rank in (0, 3)
    )
    verdict = r"^ranks 1, 2 of 4 stopped in step 7 \(killed.*No checkpoint had been saved yet: start again. Start all"
    closed = dist.DistBackendError("connection closed")
    last.__enter__()
    with pytest.raises(failures.RankStopped, match=verdict), first:
        raise closed
    with pytest.raises(failures.RankStopped, match=verdict):
        last.__exit__(type(closed), closed, None)


def test_a_signal_in_the_tokenisation_ends_the_process_and_leaves_nothing(tmp_path: Path) -> None:
    forks = Forks()
    job = {"folder": str(tmp_path / "run"), "options": OPTIONS, "event": "sigterm in the tokenisation"}
    code, stderr = forks.run(job, tmp_path / "stderr")
    forks.close()
    assert code == -signal.SIGTERM, stderr[-2000:]
    assert checkpoints(tmp_path / "run") == []
    tiny.trainer(tmp_path / "run", **(OPTIONS | {"max_steps": 1})).train()
    assert [path.name for path in checkpoints(tmp_path / "run")] == ["checkpoint-1"]


@pytest.mark.parametrize(("error", "printed"), [(OptimizerOutOfMemory, True), (failures.RankStopped, False)])
def test_the_command_line_ends_with_1(
    error: type[RuntimeError], printed: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In a line of its own, unless the trainer has said it where a launcher could not cut it off."""

    def fails(_: list[str]) -> int:
        raise error("rank 1 of 2 stopped")

    monkeypatch.setitem(cli.COMMANDS, "info", fails)
    assert cli.main(["info"]) == 1
    assert ("rank 1 of 2 stopped" in capsys.readouterr().err) is printed
