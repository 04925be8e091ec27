"""Tiny runs for `kills.py`, each in processes forked from one that has imported everything, and what they leave.

A run is what `fastdpo train` does: train, save the weights, evaluate, save the rest. A restart is what a person does
after a kill: `resume_from_checkpoint="last"` where the folder holds a checkpoint, the same call without any flag else.
Nothing here knows how a run writes its folder, beyond the names of checkpoint-N, trainer_state.json and metrics.json.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
import tiny
import torch
import torch.distributed as dist
from file_operations import Kill, Operation, Watch
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import TrainerCallback

from fastdpo.training.reference import REFERENCE_CACHE_FILE, store

#: Seconds after which a process that has not ended counts as hanging; a run takes about one.
HANGS = 120
#: Seconds that the other ranks have to end after one was killed.
OTHERS_END = 30
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
_TIMED = re.compile(r"train_.*|.*_runtime|.*_per_second")


@dataclass(frozen=True)
class Scenario:
    """A kind of run. options: FastDPOConfig's. eval_pairs: of its evaluation set. short_rounds: the reference is
    computed eight pairs at a time and saved after each time. apart: its reference is kept in a folder of its own."""

    options: dict[str, Any]
    ranks: int = 1
    eval_pairs: int = 0
    short_rounds: bool = False
    apart: bool = False


SCENARIOS = {
    "lazy": Scenario({"max_steps": 4, "save_total_limit": 1}),
    # Two epochs, so that kept references are met again; 120 tokens at once, to which their last bit is due
    "dynamic beta": Scenario(
        {"num_train_epochs": 2, "dynamic_beta": True, "keep_ratio": 0.7, "micro_batch_tokens": "120"}
    ),
    "precompute": Scenario(
        {"max_steps": 4, "reference": "precompute", "micro_batch_tokens": "120"}, short_rounds=True, apart=True
    ),
    "best model": Scenario(
        {
            "max_steps": 6,
            "save_total_limit": 1,
            "eval_strategy": "steps",
            "eval_steps": 2,
            "load_best_model_at_end": True,
            "metric_for_best_model": "rewards/margins",
            "greater_is_better": False,
        },
        eval_pairs=4,
    ),
    "two ranks": Scenario({"max_steps": 4, "per_device_train_batch_size": 4, "dynamic_beta": True}, ranks=2),
}


class Steps(TrainerCallback):
    """Counts the steps that are trained in this process."""

    count = 0

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.count += 1


@dataclass
class Ended:
    """How the processes of a run ended. codes: by rank, as `subprocess` has them. facts: what rank 0 says of a run
    that came to its end. operations, unseen: by rank, of a watched one. errors: the last of its traceback."""

    codes: list[int]
    facts: dict[str, Any] = field(default_factory=dict)
    operations: list[list[Operation]] = field(default_factory=list)
    unseen: list[str] = field(default_factory=list)
    cut: Operation | None = None
    late: list[str] = field(default_factory=list)
    errors: str = ""


def run(
    scenario: Scenario, place: Path, kill: tuple[int, Kill] | None = None, *, watched: bool = False, broken: Any = None
) -> Ended:
    """Run or restart `scenario` in `place`/files, in a process per rank; `kill`: which rank is killed, and where.

    watched: count the operations. broken: (trainer's callbacks, what is done to it), to see the harness find something.
    """
    notes = place / "notes"
    shutil.rmtree(notes, ignore_errors=True)
    notes.mkdir(parents=True)
    port = _free_port() if scenario.ranks > 1 else 0
    children = []
    for rank in range(scenario.ranks):
        child = os.fork()
        if child == 0:
            own = kill[1] if kill and kill[0] == rank else None
            _in_child(
                lambda rank=rank, own=own: _work(scenario, place, notes, rank, port, own, watched, broken),
                notes / f"stderr-{rank}",
            )
        children.append(child)
    codes, late = _wait(children)
    ended = Ended(codes, late=late)
    for rank in range(scenario.ranks):
        if (said := notes / f"watch-{rank}").is_file():
            operations, unseen = json.loads(said.read_text())
            ended.operations.append([Operation(**each) for each in operations])
            ended.unseen += unseen
        if (cut := notes / f"cut-{rank}").is_file():
            ended.cut = Operation(**json.loads(cut.read_text()))
        if codes[rank] not in (0, -signal.SIGKILL):
            text = [line for line in (notes / f"stderr-{rank}").read_text().splitlines() if line.strip()]
            ended.errors = ended.errors or (text[-1] if text else "no message")
    if (facts := notes / "facts").is_file():
        ended.facts = json.loads(facts.read_text())
    return ended


def _wait(children: list[int]) -> tuple[list[int], list[str]]:
    """The children's codes; once one is killed, the others have OTHERS_END seconds."""
    codes: dict[int, int] = {}
    late: list[str] = []
    deadline = time.monotonic() + HANGS
    while len(codes) < len(children):
        for rank, child in enumerate(children):
            if rank in codes:
                continue
            if len(children) == 1:  # HANGS is its own alarm
                codes[rank] = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            elif (ended := os.waitpid(child, os.WNOHANG))[0]:
                codes[rank] = os.waitstatus_to_exitcode(ended[1])
                if codes[rank]:
                    deadline = min(deadline, time.monotonic() + OTHERS_END)
            elif time.monotonic() > deadline:
                os.kill(child, signal.SIGKILL)
                late.append(f"rank {rank} did not end within {OTHERS_END} s of another's end")
                deadline += 5
        time.sleep(0 if len(children) == 1 else 0.01)
    return [codes[rank] for rank in range(len(children))], late


def _in_child(work: Callable[[], None], stderr: Path) -> None:
    """Do `work` in a process that was forked, and end it without the interpreter's teardown, which is its parent's."""
    code = 1
    try:
        signal.alarm(HANGS)
        for number, path in ((0, os.devnull), (1, os.devnull), (2, stderr)):
            os.dup2(os.open(path, os.O_RDWR | os.O_CREAT), number)
        work()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def _work(
    scenario: Scenario, place: Path, notes: Path, rank: int, port: int, kill: Kill | None, watched: bool, broken: Any
) -> None:
    torch.set_num_threads(1)
    if scenario.ranks > 1:
        os.environ |= {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(scenario.ranks),
            "LOCAL_WORLD_SIZE": str(scenario.ranks), "MASTER_ADDR": "localhost", "MASTER_PORT": str(port),
        }  # fmt: skip
    if scenario.short_rounds:
        assert hasattr(store, "SAVE_EVERY")
        assert hasattr(store, "ROUND")
        store.SAVE_EVERY, store.ROUND = -1.0, 8
    files = place / "files"
    files.mkdir(exist_ok=True)
    watch = Watch(files, notes / f"cut-{rank}", kill, alone=scenario.ranks == 1)
    if watched or kill:
        watch.install()
    options: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2, "save_total_limit": None}
    options |= scenario.options
    if scenario.apart:
        options["reference_cache_dir"] = str(files / "references")
    if scenario.eval_pairs:
        options["eval_dataset"] = tiny.pairs(scenario.eval_pairs, seed=9)
    steps, folder = Steps(), files / "run"
    trainer = tiny.trainer(folder, data=tiny.pairs(24), callbacks=[steps], **options)
    if broken:
        broken(trainer)
    trainer.train(resume_from_checkpoint="last" if published(folder) else None)
    trainer.save_model()
    if scenario.eval_pairs:
        trainer.evaluate()
    trainer.save_run({})
    if watched:
        operations, unseen = watch.finish()
        (notes / f"watch-{rank}").write_text(json.dumps([[asdict(each) for each in operations], unseen]))
    if rank == 0:
        told = {"log": dict(_values(untimed(trainer.state.log_history))), "steps trained": steps.count}
        told |= {name: getattr(trainer.state, name) for name in ("global_step", "best_global_step", "best_metric")}
        (notes / "facts").write_text(json.dumps(told))
    if dist.is_initialized():
        dist.barrier()


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return int(free.getsockname()[1])


def published(folder: Path) -> list[int]:
    """The steps N of the folders checkpoint-N."""
    names = [path.name for path in folder.iterdir() if path.is_dir()] if folder.is_dir() else []
    return sorted(int(found[1]) for name in names if (found := _CHECKPOINT.fullmatch(name)))


def untimed(log: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A log without times and without the summary of one call of `train`."""
    entries = [entry for entry in log if "train_runtime" not in entry]
    return [{key: value for key, value in entry.items() if not _TIMED.fullmatch(key)} for entry in entries]


def left(place: Path) -> dict[str, Any]:
    """What a run has left in `place`/files: name → None, or the values that a resume must give to the bit.

    Tensors, arrays and numbers of the final weights and of the last checkpoint; its trainer state and the metrics' log.
    """
    files = place / "files"
    found: dict[str, Any] = {str(path.relative_to(files)): None for path in files.rglob("*")}
    folder = files / "run"
    found["the last checkpoint"] = published(folder)[-1] if published(folder) else None
    last = folder / f"checkpoint-{published(folder)[-1]}" if published(folder) else None
    paths = [*folder.iterdir(), *(last.iterdir() if last else ()), *files.glob("references/*")]
    for path in sorted(paths):
        try:
            values = _read(path, str(place))
        except (ValueError, RuntimeError, EOFError, SafetensorError, UnpicklingError) as error:
            values = {"unreadable": str(error)}
        found[str(path.relative_to(files))] = None if values is None else dict(_values(values))
    return found


def _read(path: Path, place: str) -> Any:
    """What of a file must be the same after a resume; None for other files."""
    if path.name == REFERENCE_CACHE_FILE:
        kept = load_file(path)
        return {key.numpy().tobytes().hex(): logps for key, logps in zip(kept["keys"], kept["logps"], strict=True)}
    if path.suffix == ".safetensors":
        return load_file(path)
    if path.suffix in (".pt", ".pth") or path.name in ("adapter_model.bin", "pytorch_model.bin"):
        return torch.load(path, weights_only=False)
    if path.name == "trainer_state.json":
        state = json.loads(path.read_text().replace(place, ""))
        return state | {"log_history": untimed(state["log_history"])}
    return untimed(json.loads(path.read_text())["log"]) if path.name == "metrics.json" else None


def _values(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Every number of nested lists and dicts under its own name; arrays as dtype, shape and bytes."""
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu().numpy()
    if isinstance(value, dict):
        for key, each in value.items():
            yield from _values(each, f"{name}.{key}")
    elif isinstance(value, (list, tuple)):
        yield f"{name}.length", len(value)
        for index, each in enumerate(value):
            yield from _values(each, f"{name}.{index}")
    elif isinstance(value, np.ndarray):
        yield name, (str(value.dtype), value.shape, value.tobytes())
    else:
        yield name, value


def differences(expected: dict[str, Any], found: dict[str, Any]) -> list[str]:
    """What differs between what two runs left, or between their facts; in words, by file."""
    said = []
    for name in sorted(expected.keys() & found.keys()):
        ours, theirs = expected[name], found[name]
        readable = isinstance(ours, dict) and isinstance(theirs, dict) and "unreadable" not in theirs
        if name.endswith(REFERENCE_CACHE_FILE) and readable:  # it may hold less, but nothing else
            ours = {key: value for key, value in ours.items() if key in theirs}
        if ours == theirs:
            continue
        if not isinstance(ours, dict) or not isinstance(theirs, dict):
            if not isinstance(ours, dict) and not isinstance(
                theirs, dict
            ):  # a file is read in the last checkpoint only
                said.append(f"{name}: {theirs!r} and not {ours!r}")
            continue
        other = [key for key in sorted(ours.keys() | theirs.keys()) if ours.get(key) != theirs.get(key)]
        said.append(
            f"{name}: {len(other)} of {len(ours)} values differ, the first {other[0]}{_gap(ours, theirs, other)}"
        )
    for word, names in (("left over", found.keys() - expected.keys()), ("missing", expected.keys() - found.keys())):
        said += [f"{name} is {word}" for name in sorted(names) if os.path.dirname(name) not in names]
    return said


def _gap(ours: dict[str, Any], theirs: dict[str, Any], names: list[str]) -> str:
    """By how much the arrays of floats among `names` differ at most."""
    gaps = []
    for name in names:
        one, other = ours.get(name), theirs.get(name)
        if isinstance(one, tuple) and isinstance(other, tuple) and one[:2] == other[:2] and "float" in one[0]:
            arrays = [np.frombuffer(each[2], dtype=each[0]).astype(float) for each in (one, other)]
            gaps.append(float(np.abs(arrays[0] - arrays[1]).max()))
    return f", by up to {max(gaps):.1e}" if gaps else ""
