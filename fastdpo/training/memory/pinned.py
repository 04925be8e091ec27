"""Pinned memory of exactly the size that is asked for, and copies on a stream of their own: `arena.Copies` for CUDA.

Memory comes from torch's allocator of the CPU and is registered with the driver (`cudaHostRegister`). `pin_memory=True`
would take it from torch's pinned allocator, which rounds up to powers of two and keeps what is freed: 18 GB of layer
inputs take 34 there. Registered memory belongs to no allocator that knows of copies in flight, so it is given back
behind the last of them. The driver locks the pages itself: a limit of locked memory (ulimit -l) does not count.
"""

from __future__ import annotations

import mmap
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

#: Pinned for all contexts of the process (cudaHostRegisterPortable).
_PORTABLE = 1


class PinnedBuffer:
    """`size` bytes of host memory, from a page's beginning on, that `runtime` has pinned.

    Args:
        runtime: CUDA's, `torch.cuda.cudart()`.
        wait: for all copies that use it.

    Raises MemoryError where the host or the driver has not that much.
    """

    def __init__(self, size: int, runtime: Any, wait: Callable[[], None]) -> None:
        try:
            whole = torch.empty(size + mmap.PAGESIZE, dtype=torch.uint8)
        except RuntimeError as error:  # torch's allocator of the CPU has no type of its own
            raise MemoryError(f"the host has no {size} bytes for the inputs of checkpointed layers") from error
        start = -whole.data_ptr() % mmap.PAGESIZE
        self.tensor = whole[start : start + size]
        if code := int(runtime.cudaHostRegister(self.tensor.data_ptr(), size, _PORTABLE)):
            raise MemoryError(
                f"{size} bytes of host memory cannot be pinned for the inputs of checkpointed layers: cudaHostRegister "
                f"returned {code}"
            )
        self._closed = weakref.finalize(self, _unpin, self.tensor.data_ptr(), runtime, wait)
        self._closed.atexit = False  # the process gives all of it back

    def close(self) -> None:
        """Unpin the memory, once no copy uses it; it is freed with the last tensor on it."""
        self._closed()


def _unpin(address: int, runtime: Any, wait: Callable[[], None]) -> None:
    wait()
    if code := int(runtime.cudaHostUnregister(address)):
        raise RuntimeError(f"cudaHostUnregister returned {code}")


class CudaCopies:
    """Copies between the GPU `device` and the host, beside its computing streams."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device)

    def computing(self) -> torch.cuda.Stream:
        return torch.cuda.current_stream(self.device)

    def copy(self, target: Tensor, source: Tensor) -> None:
        with torch.cuda.stream(self.stream), torch.no_grad():
            target.copy_(source, non_blocking=True)

    def buffer(self, size: int) -> PinnedBuffer:
        return PinnedBuffer(size, torch.cuda.cudart(), self.stream.synchronize)

    def empty_like(self, host: Tensor, device: torch.device) -> Tensor:
        return torch.empty_like(host, device=device)
