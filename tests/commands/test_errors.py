"""Whatever a command meets ends it with a sentence and an exit code: errors injected at every stage of `train`."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import logging
import re
import sys
import tempfile
import types
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from fastdpo.commands import train as train_command
from fastdpo.commands.cli import main
from fastdpo.commands.output import make_output_visible
from fastdpo.training.memory.plan import OutOfMemory
from fastdpo.training.trainer import FastDPOTrainer

#: What a command may raise, by the expression that makes it.
ERRORS = (
    "ValueError('boom')", "TypeError('boom')", "KeyError('boom')", "IndexError('boom')", "AttributeError('boom')",
    "AssertionError('boom')", "RuntimeError('boom')", "NotImplementedError('boom')", "RecursionError('boom')",
    "ZeroDivisionError('boom')", "OverflowError('boom')", "StopIteration('boom')", "EOFError('boom')",
    "UnicodeDecodeError('utf-8', b'boom', 0, 1, 'boom')", "ImportError('boom')", "Exception('boom')", "OSError('boom')",
    "FileNotFoundError('boom')", "PermissionError('boom')", "TimeoutError('boom')", "ValueError('\\x1b[2Jboom')",
    "RuntimeError('')",
)  # fmt: skip
#: The types with which fastdpo refuses what it is given.
REFUSALS = (ValueError, TypeError, OSError, ImportError)
#: Stage of `train` → (what the sentence calls it, whether steps may have been taken).
STAGES = {
    "parse": ("reading the options", False),
    "begin_start": ("looking at output_dir", False),
    "load_datasets": ("reading the pairs", False),
    "load_tokenizer": ("loading the tokenizer", False),
    "load_model": ("loading the model", False),
    "FastDPOTrainer": ("preparing the run", False),
    "train": ("training", True),
    "save_model": ("saving the weights", True),
    "evaluate": ("evaluating", True),
    "save_run": ("writing figures and card", True),
}


def raiser(error: str, module: str, statement: str = "raise {}") -> Callable[..., Any]:
    """A function of `module` that raises `error`."""
    scope: dict[str, Any] = {"__name__": module, "torch": torch, "OutOfMemory": OutOfMemory}
    exec(f"def fail(*args, **kwargs):\n    {statement.format(error)}", scope)
    return scope["fail"]


@pytest.fixture
def run_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """`fastdpo train` with nothing behind its stages, one of which fails."""

    class Trainer:
        def __init__(self, *_: Any, args: Any, **__: Any) -> None:
            checkpoints = types.SimpleNamespace(protect=lambda *_, **__: None)
            self.args, self.tokenization, self.parts = args, {}, types.SimpleNamespace(checkpoints=checkpoints)

        def has_begun(self) -> bool:
            return True

        def is_world_process_zero(self) -> bool:
            return True

        def train(self) -> Any:
            return types.SimpleNamespace(metrics={"train_loss": 1.0})

        def save_model(self, **_: Any) -> None: ...

        def evaluate(self) -> dict[str, float]:
            return {"eval_loss": 1.0}

        def save_run(self, *_: Any) -> None: ...

    def run(stage: str, fail: Callable[..., Any]) -> int:
        with monkeypatch.context() as patch:
            patch.setattr(train_command, "FastDPOTrainer", Trainer)
            patch.setattr(train_command, "held_by_first", lambda *_: contextlib.nullcontext())
            patch.setattr(train_command, "load_datasets", lambda _: ((tiny.pairs(1), tiny.pairs(1)), {}))
            for name in ("load_tokenizer", "load_model", "lora_config"):
                patch.setattr(train_command, name, lambda _: None)
            patch.setattr(Trainer if hasattr(Trainer, stage) else train_command, stage, fail)
            out = tmp_path / "runs" / "mine"
            out.parent.mkdir(exist_ok=True)
            names = ["--model_name_or_path", "m", "--dataset_name_or_path", "d", "--output_dir", str(out)]
            return main(["train", *names, "--use_cpu"])

    return run


def tracebacks(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "runs").glob("mine.traceback-*.txt"))


@pytest.mark.parametrize("stage", STAGES)
def test_every_error_at_every_stage(
    stage: str,
    run_with: Callable[..., int],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Code 2 for what fastdpo refuses, and for a library's refusal before training; 3 with the traceback otherwise."""
    doing, begun = STAGES[stage]
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "runs"))
    for module in ("fastdpo.training.x", "transformers.x", "tests.x"):
        for error in ERRORS:
            before = set(tmp_path.rglob("*.txt"))
            code = run_with(stage, raiser(error, module))
            told = capsys.readouterr().err
            kind = type(eval(error))
            refused = issubclass(kind, REFUSALS) and (
                module.startswith("fastdpo") or (module.startswith("transformers") and not begun)
            )
            assert code == (2 if refused else 3), (error, module, told)
            assert "Traceback" not in told
            assert "\x1b" not in told
            assert kind.__name__ in told
            kept = set(tmp_path.rglob("*.txt")) - before
            if not (refused and module.startswith("fastdpo")):
                assert f"while {doing}" in told, (error, module, told)
            if refused:
                assert not kept, "a refused start leaves nothing"
                continue
            (file,) = kept
            assert str(file) in told.replace("\n", "")
            assert file.read_text().startswith("Traceback (most recent call last)")
            assert "in fail" in file.read_text()
            assert "This is a defect" in told


def test_an_operation_that_fails_in_fastdpo_is_a_defect(
    run_with: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    """A ValueError that no statement of fastdpo has raised says nothing that a user can mend."""
    for statement in ("return int('boom')", "return {}['a']", "return 1 / 0"):
        assert run_with("load_datasets", raiser("", "fastdpo.data.x", statement)) == 3
        assert "This is a defect of fastdpo" in capsys.readouterr().err


def test_causes_of_the_machine(
    run_with: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """File, cause, stage and next step, whoever raises it."""
    causes = {
        f"OSError({errno.ENOSPC}, 'No space left on device', 'a/model.bin')": (2, "'a/model.bin'", "free some space"),
        f"OSError({errno.ELOOP}, 'Too many levels of symbolic links', 'ring')": (2, "'ring'", "in a circle"),
        f"OSError({errno.EACCES}, 'Permission denied', 'x\\x1b[2J')": (2, r"'x\x1b[2J'", "give this user the right"),
        "ModuleNotFoundError('no', name='tensorboard.summary')": (2, "'tensorboard'", "pip install tensorboard"),
        "torch.OutOfMemoryError('CUDA out of memory. Tried')": (1, "CUDA out of memory", "Lower max_length"),
        "OutOfMemory('one pair of 9 tokens does not fit: lower max_length')": (1, "one pair of 9 tokens", "lower"),
        "MemoryError()": (1, "memory ran out", "fastdpo estimate predicts"),
    }
    for stage in ("load_model", "train"):
        for error, (code, cause, step) in causes.items():
            assert run_with(stage, raiser(error, "somewhere.x")) == code, error
            told = capsys.readouterr().err.replace("\n", " ")
            assert cause in told, told
            assert step in told, told
            assert f"while {STAGES[stage][0]}" in told or "OutOfMemory" in error, told
            assert "defect" not in told
            assert "\x1b" not in told


def test_where_the_traceback_goes(
    run_with: Callable[..., int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Beside the run's folder, which it does not enter; without secrets; and raised where the user asks to see it."""
    assert run_with("train", raiser("KeyError('hf_abcdefghijklmnopqrstuvwxyz')", "tests.x")) == 3
    (file,) = tracebacks(tmp_path)
    assert not (tmp_path / "runs" / "mine").exists()
    assert "hf_abc" not in file.read_text()
    assert "KeyError: '<hidden>'" in file.read_text()
    monkeypatch.setenv("FASTDPO_TRACEBACK", "1")
    with pytest.raises(KeyError):
        run_with("train", raiser("KeyError('boom')", "tests.x"))
    assert len(tracebacks(tmp_path)) == 1
    capsys.readouterr()


def test_a_defect_in_a_forward(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    """The real trainer: the stage is named, and the last checkpoint stays."""
    tiny.llama().save_pretrained(tmp_path / "model")
    tiny.tokenizer().save_pretrained(tmp_path / "model")
    data = tmp_path / "pairs.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in tiny.pairs(16)))
    steps: list[int] = []
    whole = FastDPOTrainer.training_step

    def fails_late(self: FastDPOTrainer, *args: Any, **kwargs: Any) -> torch.Tensor:
        steps.append(1)
        return whole(self, *args, **kwargs) if len(steps) < 3 else raiser("KeyError('layer')", "transformers.x")()

    monkeypatch.setattr(FastDPOTrainer, "training_step", fails_late)
    given = {
        "model_name_or_path": tmp_path / "model",
        "dataset_name_or_path": data,
        "output_dir": tmp_path / "[/b]",
        "per_device_train_batch_size": 4,
        "save_steps": 1,
        "use_cpu": True,
    }
    code = main(["train", *(word for name, value in given.items() for word in (f"--{name}", str(value)))])
    told = capsys.readouterr().err.replace("\n", " ")
    assert code == 3
    assert "KeyError while training" in told
    assert re.search(r"The last checkpoint, .*checkpoint-2, is whole", told), told
    (file,) = tmp_path.rglob("*.txt")
    assert "in fails_late" in file.read_text()
    assert "[/b].traceback-" in told


def test_libraries_messages_show_escapes(capfd: pytest.CaptureFixture[str]) -> None:
    """Log records of any logger, and warnings: nothing of a name acts on the terminal."""
    make_output_visible()
    logger = logging.getLogger("a.library")  # transformers' own may be quiet by now
    logger.setLevel(logging.WARNING)
    handler = logging.StreamHandler()
    logger.addHandler(handler)
    try:
        logger.warning("column %s\nsecond line", "note\x1b[2J\u202e")
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.warn("of \x1b]0;title\x07", UserWarning, stacklevel=1)
    finally:
        logger.removeHandler(handler)
    told = capfd.readouterr().err
    assert "column note\\x1b[2J\\u202e\nsecond line" in told
    assert "\x1b" not in told


def test_a_stream_that_lacks_letters_gets_escapes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The help names β; a terminal of ASCII is no reason for a traceback."""
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stream)
    assert main(["--help"]) == 0
    stream.flush()
    assert "exact \\u03b2-DPO" in stream.buffer.getvalue().decode()
