"""Runs that are stopped in any phase, by a signal, by memory or by another rank: resumed, they are the undisturbed run."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from worker import state

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
