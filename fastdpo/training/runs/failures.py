"""Failures that end a run on one rank, and how the other ranks end: by themselves, and naming it.

A rank that ends with an error leaves its message in the process group's store. The others find that out when their next
collective fails, at the latest in the agreement on stop signals that follows each optimizer step and precedes each
save, so that no checkpoint of the step is written. They wait for `GRACE` seconds for what the others leave in the
store: one that leaves nothing was killed.

How long it takes until the collective fails is the backend's: with gloo the moment the other process is gone; with
NCCL, and where a rank hangs without being gone, the option `ddp_timeout`. Under torchrun (and accelerate launch) all
ranks are ended by the launcher 30 s after the first one has ended, whatever they wait for.
"""

from __future__ import annotations

import itertools
import logging
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

from fastdpo.training.ranks import Ranks
from fastdpo.training.runs.start import branch_in

logger = logging.getLogger(__name__)

#: Seconds that a rank whose collective has failed waits for the others' messages.
GRACE = 5.0
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
    found = branch_in(Path(output_dir))
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
        self._call = next(_calls)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if error is None or self.ranks.count == 1:
            return
        own = None if _is_failed_collective(error) else f"{type(error).__name__}: {error}"
        said = self._exchange(own)
        if own is not None or (None not in said.values() and not any(said.values())):
            return  # this rank's error, or one that all ranks have alike
        message = self._describe(said)
        # Now: a launcher that has seen the other rank end may end this process before anyone prints the exception
        logger.error("%s", message)
        raise RankStopped(message) from error

    def _exchange(self, own: str | None) -> dict[int, str | None]:
        """Leave `own` error for the others. Returns theirs, where this rank has none: "" of one whose collective
        failed, None of one that has left nothing."""
        others = [rank for rank in range(self.ranks.count) if rank != self.ranks.index]
        said: dict[int, str | None] = dict.fromkeys(others)
        deadline = time.monotonic() + GRACE
        try:
            store = dist.PrefixStore(f"fastdpo/failures/{self._call}", _get_default_store())
            store.set(str(self.ranks.index), own or "")
            while own is None and None in said.values() and time.monotonic() < deadline:
                for rank in others:
                    if said[rank] is None and store.check([str(rank)]):
                        said[rank] = store.get(str(rank)).decode()
                time.sleep(0.05)
        except dist.DistError:
            logger.warning("The ranks' store, which their launcher or rank 0 keeps, cannot be reached any more.")
        return said

    def _describe(self, said: dict[int, str | None]) -> str:
        failed = {rank: text for rank, text in said.items() if text}
        where = f"in step {self.step()}"
        if failed:
            why = "; ".join(
                f"rank {rank} of {self.ranks.count} stopped {where}: {text}" for rank, text in failed.items()
            )
            return f"{why} Start all ranks again."
        silent = [rank for rank, text in said.items() if text is None]
        names = f"rank{'s' if len(silent) > 1 else ''} {', '.join(map(str, silent))} of {self.ranks.count}"
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
