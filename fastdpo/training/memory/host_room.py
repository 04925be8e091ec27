"""How much memory the host still has for one process of a run.

The least of what the machine says is available, and of what a container's limit leaves (cgroup v2, then v1): beyond the
first it swaps, beyond the second the process is killed. What files have in the page cache counts as free in both. The
processes of a run on one machine share it.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import psutil

from fastdpo.training.memory.layer_inputs import LayerInputs
from fastdpo.training.memory.plan import OutOfMemory
from fastdpo.training.options import FastDPOConfig

#: Share of what is free that layer inputs may take; the rest is for checkpoints and data.
_SHARE = 0.9
#: Where a container sees its own group.
_CGROUPS = Path("/sys/fs/cgroup")
#: Limit, usage, and what of the usage is the page cache's, in the two versions.
_FILES = (
    ("memory.max", "memory.current", "memory.stat", "inactive_file"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat", "total_inactive_file"),
)


def processes_here() -> int:
    """Processes of the run on this machine, as torchrun and accelerate say."""
    return max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def free_host_memory(cgroups: Path = _CGROUPS) -> int:
    """Bytes that the processes of this machine, or of this container, can still take."""
    return min([psutil.virtual_memory().available, *_left_in_container(cgroups)])


def _left_in_container(cgroups: Path) -> list[int]:
    for limit, usage, statistics, cache in _FILES:
        try:
            most = (cgroups / limit).read_text().strip()
            used = int((cgroups / usage).read_text())
            lines = (cgroups / statistics).read_text().splitlines()
        except OSError:  # the other version, or no container
            continue
        if most == "max":
            return []
        freeable = sum(int(line.split()[1]) for line in lines if line.split()[:1] == [cache])
        return [max(0, int(most) - used + freeable)]
    return []


class HostRoom:
    """What this process may take of the host's memory for layer inputs, settled before its first step.

    Args:
        args: the run's options. inputs: of the policy's layers.
        over_ranks: the largest of all ranks' values.
        free: bytes that the machine still has, before any rank takes of them.
    """

    def __init__(
        self,
        args: FastDPOConfig,
        inputs: LayerInputs,
        over_ranks: Callable[[int], int],
        free: int,
    ) -> None:
        self.args, self.inputs = args, inputs
        self.processes = processes_here()
        self.bytes = -over_ranks(-int(_SHARE * free / self.processes))
        #: The most tokens of a micro-batch whose inputs it holds.
        self.tokens = inputs.tokens_within(self.bytes)

    def check(self, longest: int, most: int) -> None:
        """longest: tokens of the longest pair. most: tokens of the largest micro-batch. Raises OutOfMemory where either
        is more than the host holds."""
        if longest > self.tokens:
            tokens, which, what = longest, "the longest pair", f"max_length ({self.args.max_length} now)"
        elif most > self.tokens:
            tokens, which = most, f"micro_batch_tokens={self.args.micro_batch_tokens!r}, a micro-batch"
            what = f"micro_batch_tokens to {self.tokens}"
        else:
            return
        shared = f" to each of {self.processes} processes" if self.processes > 1 else ""
        raise OutOfMemory(
            f"activation_offloading={self.args.activation_offloading} keeps the inputs of {self.inputs.layers} layers "
            f"on the host: {_gb(self.inputs.bytes(tokens))} for {which} of {tokens} tokens. Its free memory leaves "
            f"{_gb(self.bytes)}{shared}, which holds {self.tokens} tokens. Lower {what}, give the machine or container "
            "more memory, or drop activation_offloading."
        )


def _gb(size: int) -> str:
    return f"{size / 1e9:.2f} GB"
