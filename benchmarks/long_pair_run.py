"""One optimizer step over one long pair, in a process of its own, if need be within a bound of its memory.

`python -m benchmarks.long_pair_run '{"trainer": "trl"}' --case '{...}'` prints one JSON object, see `LongStep`. The
first step warms up: its pair is short and its learning rate 0, so that all meet the long pair with the same weights.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.utils.memory import should_reduce_batch_size

from benchmarks.process import reset_peak, status
from benchmarks.training_cases import TrainingCase
from benchmarks.training_run import Contender, StepClock, build, check_environment, quieten, record_losses

#: Of every contender's config: the first step's learning rate is 0, and sums over thousands of tokens do not saturate
#: the loss.
SHARED: dict[str, Any] = {
    "lr_scheduler_type": "constant_with_warmup",
    "warmup_steps": 1,
    "beta": 0.01,
    "max_length": None,
}
#: Of the config of each trainer: the pair as it is, in one piece, layers checkpointed.
OWN: dict[str, dict[str, Any]] = {
    "fastdpo": {"gradient_checkpointing": "true", "max_prompt_length": None},
    "trl": {"gradient_checkpointing": True},
}
#: What errors say of memory that is not given, beside those that accelerate knows.
REFUSED = ("can't allocate memory", "not enough memory", "bad_alloc", "could not create a memory object")


@dataclass(frozen=True)
class LongStep:
    """Attributes:
    held: whether the step got the memory that it asked for; if not, the rest is 0.
    seconds, cpu_seconds: of the step.
    growth: bytes, the peak of resident memory during the step less `resident`.
    resident: bytes at its begin, model and optimizer included.
    loss: of the pair.
    """

    held: bool
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    growth: int = 0
    resident: int = 0
    loss: float = 0.0


class LongClock(StepClock):
    """Times the last step alone, from a fresh peak of memory on and under `limit` bytes of data."""

    def __init__(self, steps: int, limit: int | None, gradients: Path | None) -> None:
        super().__init__(gradients)
        self.steps, self.limit, self.resident, self.growth = steps, limit, 0, 0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.steps - 1:
            self.resident = reset_peak()
            if self.limit is not None:
                resource.setrlimit(resource.RLIMIT_DATA, (self.limit, resource.RLIM_INFINITY))
            self.marks.clear()
            self.mark()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        super().on_step_end(args, state, control, **kwargs)
        self.growth = status("VmHWM") - self.resident


def measure(
    contender: Contender, case: TrainingCase, limit: int | None = None, gradients: Path | None = None
) -> LongStep:
    """The last of the case's steps. limit: bytes of private writable memory, which the whole process may map in it."""
    clock, options = LongClock(case.steps, limit, gradients), SHARED | OWN[contender.trainer]
    losses: list[float] = []
    whole = Contender(contender.trainer, options | contender.options)
    with tempfile.TemporaryDirectory() as folder:
        trainer = build(whole, case, folder, clock)
        record_losses(trainer, losses)
        try:
            trainer.train()
        except (RuntimeError, MemoryError) as error:
            if limit is None or not was_refused_memory(error):
                raise
            return LongStep(held=False)
    return LongStep(True, clock.spent(0)[-1], clock.spent(1)[-1], clock.growth, clock.resident, losses[-1])


def was_refused_memory(error: BaseException | None) -> bool:
    """Whether `error` or what caused it says so."""
    while error is not None:
        said = isinstance(error, MemoryError) or any(words in str(error) for words in REFUSED)
        if said or (isinstance(error, Exception) and should_reduce_batch_size(error)):
            return True
        error = error.__cause__ or error.__context__
    return False


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser("python -m benchmarks.long_pair_run", description=__doc__)
    parser.add_argument("contender", type=json.loads, help="attributes of a Contender as JSON")
    parser.add_argument("--case", type=json.loads, default={}, help="attributes of a TrainingCase as JSON")
    parser.add_argument("--threads", type=int, default=2, help="default 2")
    parser.add_argument("--limit", type=int, help="bytes of data that the process may map in the long step")
    parser.add_argument("--gradients", type=Path, help="save the long step's gradients here")
    options = parser.parse_args(arguments)
    contender = Contender(**options.contender)
    check_environment(contender)
    torch.set_num_threads(options.threads)
    quieten()
    step = measure(contender, TrainingCase(**options.case), options.limit, options.gradients)
    print(json.dumps(asdict(step)))
    sys.stdout.flush()


if __name__ == "__main__":
    main()
