"""How much of the host's memory layer inputs may take, and buffers of it that are pinned to the byte."""

from __future__ import annotations

import mmap
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from late_copies import LateCopies
from transformers import LlamaConfig, LlamaForCausalLM

from fastdpo.training.memory import OutOfMemory
from fastdpo.training.memory.host_room import HostRoom, free_host_memory
from fastdpo.training.memory.layer_inputs import LayerInputs
from fastdpo.training.memory.pinned import PinnedBuffer
from fastdpo.training.memory.plan import enable_checkpointing

GB = 10**9


@pytest.fixture(scope="module")
def inputs() -> LayerInputs:
    """Of 32 layers of 4,096 numbers in bfloat16: 262,144 bytes a token."""
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(vocab_size=128, intermediate_size=16, dtype=torch.bfloat16)).bfloat16()
    enable_checkpointing(model, {"use_reentrant": False})
    return LayerInputs(model, LateCopies())


def room(inputs: LayerInputs, free: int, **options: Any) -> HostRoom:
    args = SimpleNamespace(**{"activation_offloading": True, "max_length": 50_000, "micro_batch_tokens": "9"} | options)
    return HostRoom(args, inputs, lambda value: value, free)  # type: ignore[arg-type]


def test_tokens_that_the_host_holds(inputs: LayerInputs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert inputs.bytes(70_000) == 70_000 * 262_144
    assert room(inputs, 20 * GB).tokens == int(0.9 * 20 * GB / 262_144)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert room(inputs, 20 * GB).tokens == int(0.9 * 20 * GB / 8 / 262_144)
    # Where another rank's machine has less, all take its
    assert HostRoom(room(inputs, 1).args, inputs, lambda value: max(value, -GB), 80 * GB).bytes == GB


def test_too_little_is_refused_by_name(inputs: LayerInputs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    held = room(inputs, 20 * GB)  # 9 GB each, 34,332 tokens
    held.check(34_332, 34_332)
    with pytest.raises(OutOfMemory) as refused:
        held.check(34_333, 34_333)
    assert str(refused.value) == (
        "activation_offloading=True keeps the inputs of 32 layers on the host: 9.00 GB for the longest pair of 34333 "
        "tokens. Its free memory leaves 9.00 GB to each of 2 processes, which holds 34332 tokens. Lower max_length "
        "(50000 now), give the machine or container more memory, or drop activation_offloading."
    )
    other = r"18\.35 GB for micro_batch_tokens='9', a micro-batch of 70000 tokens.*Lower micro_batch_tokens to 34332, "
    with pytest.raises(OutOfMemory, match=other):
        held.check(30_000, 70_000)


# What a container has


def group(folder: Path, version: int, limit: str, usage: int, cache: int) -> Path:
    files = {
        1: (
            "memory/memory.limit_in_bytes",
            "memory/memory.usage_in_bytes",
            "memory/memory.stat",
            "total_inactive_file",
        ),
        2: ("memory.max", "memory.current", "memory.stat", "inactive_file"),
    }[version]
    (folder / files[0]).parent.mkdir(exist_ok=True)
    for name, text in zip(files, (limit, usage, f"cache 9\n{files[3]} {cache}\nanon 7"), strict=False):
        (folder / name).write_text(f"{text}\n")
    return folder


@pytest.mark.parametrize("version", [1, 2])
def test_a_container_s_limit_counts(version: int, tmp_path: Path) -> None:
    assert free_host_memory(group(tmp_path, version, "1000000", 700_000, 50_000)) == 350_000
    assert free_host_memory(group(tmp_path, version, "1000000", 1_100_000, 50_000)) == 0
    assert free_host_memory(group(tmp_path, version, str(2**62), 700_000, 0)) < 2**60, "the machine has less"


def test_without_a_limit_the_machine_counts(tmp_path: Path) -> None:
    for folder in (group(tmp_path, 2, "max", 700_000, 0), tmp_path / "none"):
        assert free_host_memory(folder) == pytest.approx(psutil.virtual_memory().available, rel=0.2)


# Pinned buffers


class Runtime:
    """CUDA's, as far as it pins: what was asked of it, in order."""

    def __init__(self, code: int = 0) -> None:
        self.code, self.asked = code, []  # type: ignore[var-annotated]

    def cudaHostRegister(self, address: int, size: int, flags: int) -> int:
        self.asked.append(("pin", address, size))
        return self.code

    def cudaHostUnregister(self, address: int) -> int:
        self.asked.append(("unpin", address))
        return 0


def test_a_buffer_pins_whole_pages_of_its_own_and_unpins_them_behind_the_copies() -> None:
    runtime = Runtime()
    size = 3 * mmap.PAGESIZE
    buffer = PinnedBuffer(size, runtime, lambda: runtime.asked.append(("wait",)))
    address = buffer.tensor.data_ptr()
    assert address % mmap.PAGESIZE == 0
    assert buffer.tensor.shape == (size,)
    inside = buffer.tensor.untyped_storage()
    assert inside.data_ptr() <= address
    assert address + size <= inside.data_ptr() + inside.nbytes() <= address + size + mmap.PAGESIZE
    for _ in range(2):
        buffer.close()
    expected = [("pin", address, size), ("wait",), ("unpin", address)]
    assert runtime.asked == expected
    del buffer
    assert runtime.asked == expected, "once"
    other = PinnedBuffer(size, runtime, lambda: None)
    del other
    assert runtime.asked[-1][0] == "unpin", "nobody has to close it"


def test_memory_that_cannot_be_had_or_pinned_ran_out() -> None:
    with pytest.raises(MemoryError, match=r"4096 bytes of host memory cannot be pinned .*cudaHostRegister returned 2"):
        PinnedBuffer(4096, Runtime(2), lambda: None)
    with pytest.raises(MemoryError, match="the host has no"):
        PinnedBuffer(2**60, Runtime(), lambda: None)
