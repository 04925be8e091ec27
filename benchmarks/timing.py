"""Timing in turns: A, B, A, B, …, so that whatever else the machine does falls on all of them alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Generic, TypeVar

import torch

Result = TypeVar("Result")
#: The first run pays for page faults and lazy initialisation, so nobody is judged by it alone,
MIN_RUNS = 2
#: unless it took so many seconds that those are lost in it.
LONG_RUN = 15.0


@dataclass
class Timing(Generic[Result]):
    """Seconds of each run, and what the last one returned."""

    seconds: list[float] = field(default_factory=list)
    result: Result | None = None

    @property
    def best(self) -> float:
        return min(self.seconds)

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    def wants_more(self, repeats: int, budget: float) -> bool:
        runs, spent = len(self.seconds), sum(self.seconds)
        return spent < LONG_RUN if runs < MIN_RUNS else runs < repeats and spent < budget


def nothing_to_wait_for() -> None:
    """A CPU's work is done when its call returns."""


def synchronizer(device: torch.device | str) -> Callable[[], None]:
    """What waits until `device` has done the work that was given to it."""
    device = torch.device(device)
    return nothing_to_wait_for if device.type == "cpu" else partial(torch.accelerator.synchronize, device)


def interleave(
    contenders: Mapping[str, Callable[[], Result]],
    repeats: int,
    budget: float,
    synchronize: Callable[[], None] = nothing_to_wait_for,
) -> dict[str, Timing[Result]]:
    """Run all contenders in turns, each at most `repeats` times, and no more once it took `budget` seconds.

    synchronize: waits for the device that the contenders work on, before and after each run (see `synchronizer`).
    """
    timings: dict[str, Timing[Result]] = {name: Timing() for name in contenders}
    while waiting := [name for name, timing in timings.items() if timing.wants_more(repeats, budget)]:
        for name in waiting:
            timings[name].result = None  # not held while the next run measures its own allocations
            synchronize()
            start = time.perf_counter()
            result = contenders[name]()
            synchronize()
            timings[name].seconds.append(time.perf_counter() - start)
            timings[name].result = result
    return timings
