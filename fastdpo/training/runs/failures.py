"""Failures that end a run on one rank, and how the other ranks end: by themselves, and naming it.

A rank that ends with an error leaves its message in the process group's store. The others find that out when their next
collective fails, at the latest in the agreement on stop signals that follows each optimizer step and precedes each
save, so that no checkpoint of the step is written. The first of them calls the roll in the store, which a thread of
each rank answers, whatever the rank itself waits for: one that has left no message and does not answer within `GRACE`
seconds was killed.

How long it takes until the collective fails is the backend's: with gloo the moment the other process is gone; with
NCCL, and where a rank hangs without being gone, the option `ddp_timeout`. Under torchrun (and accelerate launch) all
ranks are ended by the launcher 30 s after the first one has ended, whatever they wait for.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

from fastdpo.training.ranks import Ranks
from fastdpo.training.runs.checkpoint import CheckpointError
from fastdpo.training.runs.start import branch_in

logger = logging.getLogger(__name__)

#: Seconds that a rank whose collective has failed waits for the others' answers.
GRACE = 5.0
#: Seconds between two looks whether the roll is called.
_LOOK_EVERY = 0.5
#: Of the calls of `train` in this process, which all ranks make alike.
_calls = itertools.count()


class OptimizerOutOfMemory(RuntimeError):
    """Memory ran out while the optimizer updated the weights: some are, others are not, and none of them is saved."""


class RankStopped(RuntimeError):
    """Another rank has stopped, so this one cannot go on."""


def optimizer_out_of_memory(ranks: Ranks, step: int, output_dir: str, error: BaseException) -> OptimizerOutOfMemory:
    """The error of rank, step and last checkpoint, for memory that ran out (`error`) in the optimizer's step."""
    cause = str(error).partition("\n")[0]
    return OptimizerOutOfMemory(
        f"rank {ranks.index} of {ranks.count}: memory ran out in the optimizer's part of step {step}, which is not "
        f"saved ({cause}). {last_checkpoint(output_dir)} Its moments need less with optim='paged_adamw_8bit' or a "
        "smaller lora_r, in a new run."
    )


def last_checkpoint(output_dir: str) -> str:
    """Where a run that has failed goes on, in a sentence."""
    try:
        found = branch_in(Path(output_dir))
    except CheckpointError as error:  # this is said beside the failure itself, and must not take its place
        return f"Look at what was saved: fastdpo verify {output_dir} ({error})."
    if not found:
        return "No checkpoint had been saved yet: start again."
    return f"The last checkpoint, {found[-1]}, is whole: continue with --resume_from_checkpoint last."


class NamesStoppedRanks:
    """A context for what all ranks do together: whichever stops, the others raise RankStopped with its name.

    step: the one in flight. output_dir: of the run.
    """

    def __init__(self, ranks: Ranks, step: Callable[[], int], output_dir: str) -> None:
        self.ranks, self.step, self.output_dir = ranks, step, output_dir

    def __enter__(self) -> None:
        call = next(_calls)
        if self.ranks.count == 1:
            return
        self._store = dist.PrefixStore(f"fastdpo/failures/{call}", _get_default_store())
        self._left = threading.Event()
        self._thread = threading.Thread(target=self._answer, name="fastdpo roll call", daemon=True)
        self._thread.start()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if self.ranks.count == 1:
            return
        message = None if error is None else self._message(error)
        self._left.set()
        self._thread.join(_LOOK_EVERY)
        if message is not None:
            # Now: a launcher that has seen the other rank end may end this process before anyone prints the exception
            logger.error("%s", message)
            raise RankStopped(message) from error

    def _answer(self) -> None:
        """Answer the roll call, until this rank has left. A store that is gone ends it: nobody can call there."""
        with contextlib.suppress(dist.DistError):
            while not self._left.wait(_LOOK_EVERY):
                if self._store.check(["roll"]):
                    self._store.set(f"alive/{self.ranks.index}", "")
                    return

    def _message(self, error: BaseException) -> str | None:
        """What another rank has done to this one; None for this rank's own error, which is left for the others, and for
        one that all ranks have alike."""
        try:
            if _is_failed_collective(error):
                return self._verdict()
            self._store.set(f"reason/{self.ranks.index}", f"{type(error).__name__}: {error}")
        except dist.DistError:
            if _is_failed_collective(error):
                return f"rank 0, or the launcher, has stopped {self._where}. {last_checkpoint(self.output_dir)}"
        return None

    def _verdict(self) -> str | None:
        """Call the roll: who has stopped, and why. The first to know tells the others."""
        self._store.set("roll", "")
        self._store.set(f"alive/{self.ranks.index}", "")
        others = [rank for rank in range(self.ranks.count) if rank != self.ranks.index]
        reasons: dict[int, str] = {}
        silent = set(others)
        deadline = time.monotonic() + GRACE
        while silent and time.monotonic() < deadline:
            if self._store.check(["verdict"]):
                return self._store.get("verdict").decode()
            time.sleep(0.05)
            for rank in others:
                if rank not in reasons and self._store.check([f"reason/{rank}"]):
                    reasons[rank] = self._store.get(f"reason/{rank}").decode()
            silent -= {rank for rank in silent if rank in reasons or self._store.check([f"alive/{rank}"])}
        if not (reasons or silent):
            return None
        verdict = self._describe(reasons, sorted(silent))
        self._store.set("verdict", verdict)
        return verdict

    @property
    def _where(self) -> str:
        return f"in step {self.step()}"

    def _describe(self, reasons: Mapping[int, str], silent: Sequence[int]) -> str:
        count, where = self.ranks.count, self._where
        if reasons:
            stopped = (f"rank {rank} of {count} stopped {where}: {reason}" for rank, reason in reasons.items())
            return f"{'; '.join(stopped)} Start all ranks again."
        names = f"rank{'s' if len(silent) > 1 else ''} {', '.join(map(str, silent))} of {count}"
        again = last_checkpoint(self.output_dir)
        return f"{names} stopped {where} (killed, or its machine was lost). {again} Start all ranks again."


def _is_failed_collective(error: BaseException) -> bool:
    """Whether `error` comes out of torch.distributed; memory that ran out there is this rank's own."""
    if isinstance(error, dist.DistError):
        return True
    if not isinstance(error, RuntimeError) or isinstance(error, torch.OutOfMemoryError):
        return False
    frames = (frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__))
    return any(name.startswith("torch.distributed.") for name in frames)
