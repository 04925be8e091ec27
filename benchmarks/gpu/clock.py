"""Times of calls that work on a card, taken in turns: the device's between two events, the host's until a call returns.

Before each run the L2 is overwritten and the queue is empty; overwriting gives the host a start of some microseconds.
Where the host is slower than the device, both times are the host's. On a CPU both are the call's.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

Call = Callable[[], object]
#: Runs before those that count: the first compiles and allocates, the second finds it all there.
WARM_UP = 2
MIN_RUNS, MAX_RUNS = 5, 200
#: What is overwritten before a run, in L2s.
L2_SHARE = 2


@dataclass
class Times:
    """Milliseconds of each run."""

    device: list[float] = field(default_factory=list)
    host: list[float] = field(default_factory=list)

    @property
    def ms(self) -> float:
        """Median of the device's."""
        return statistics.median(self.device)

    @property
    def host_ms(self) -> float:
        return statistics.median(self.host)

    @property
    def spread(self) -> float:
        """Half the distance of the quartiles over the median."""
        ordered = sorted(self.device)
        return (ordered[(3 * len(ordered)) // 4] - ordered[len(ordered) // 4]) / (2 * self.ms) if self.ms else 0.0

    def figures(self) -> dict[str, Any]:
        return {"ms": self.ms, "host_ms": self.host_ms, "spread": self.spread, "runs": len(self.device)}


class Clock:
    """Measures on one device. seconds: of a contender's runs; on a CPU (`--dry`) each runs MIN_RUNS times at most."""

    def __init__(self, device: str, seconds: float) -> None:
        self.device, self.seconds = torch.device(device), seconds
        self.on_gpu = self.device.type == "cuda"
        l2 = torch.cuda.get_device_properties(self.device).L2_cache_size if self.on_gpu else 0
        self.flushed = torch.empty(L2_SHARE * l2, dtype=torch.uint8, device=self.device)

    def synchronize(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize(self.device)

    def once(self, call: Call) -> tuple[float, float]:
        """(device, host) milliseconds of one run."""
        self.synchronize()
        self.flushed.zero_()
        if not self.on_gpu:
            start = time.perf_counter()
            call()
            return (spent := 1e3 * (time.perf_counter() - start)), spent
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        before.record()
        start = time.perf_counter()
        call()
        host = 1e3 * (time.perf_counter() - start)
        after.record()
        after.synchronize()
        return before.elapsed_time(after), host

    def measure(self, calls: Mapping[str, Call]) -> dict[str, Times]:
        """All calls in turns, a run of each at a time, so that a change of clocks falls on all of them."""
        estimates = {name: max(self._warm_up(call), 1e-3) for name, call in calls.items()}
        left = {
            name: min(max(int(1e3 * self.seconds / ms), MIN_RUNS if self.on_gpu else 1), MAX_RUNS)
            for name, ms in estimates.items()
        }
        times = {name: Times() for name in calls}
        while waiting := [name for name, runs in left.items() if runs]:
            for name in waiting:
                device, host = self.once(calls[name])
                times[name].device.append(device)
                times[name].host.append(host)
                left[name] -= 1
        return times

    def time(self, call: Call) -> Times:
        return self.measure({"": call})[""]

    def _warm_up(self, call: Call) -> float:
        runs = [self.once(call) for _ in range(WARM_UP if self.on_gpu else 1)]
        return max(runs[-1])

    def peak(self, call: Call) -> int:
        """Bytes of the device's memory that a run takes above what is held before it, with its result; 0 on a CPU."""
        if not self.on_gpu:
            call()
            return 0
        torch.cuda.synchronize(self.device)
        held = torch.cuda.memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        result = call()
        torch.cuda.synchronize(self.device)
        del result
        return torch.cuda.max_memory_allocated(self.device) - held
