"""Timing in turns: A, B, A, B, …, so that whatever else the machine does falls on all of them alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Generic, TypeVar

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


def interleave(
    contenders: Mapping[str, Callable[[], Result]], repeats: int, budget: float
) -> dict[str, Timing[Result]]:
    """Run all contenders in turns, each at most `repeats` times, and no more once it took `budget` seconds."""
    timings: dict[str, Timing[Result]] = {name: Timing() for name in contenders}
    while waiting := [name for name, timing in timings.items() if timing.wants_more(repeats, budget)]:
        for name in waiting:
            timings[name].result = None  # not held while the next run measures its own allocations
            start = time.perf_counter()
            result = contenders[name]()
            timings[name].seconds.append(time.perf_counter() - start)
            timings[name].result = result
    return timings
