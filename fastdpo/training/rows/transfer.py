"""Host tensors to the device: one buffer, one copy, and nobody waits for it.

A copy from pageable memory makes the host wait until the device has caught up with all that is queued, so a step that
makes a handful of them per micro-batch never runs ahead of its device. Here the tensors are laid side by side in one
pinned buffer, which is copied without waiting, and are views of it there.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

#: Bytes that a tensor begins at a multiple of: what Triton takes for aligned.
ALIGNMENT = 16


def to_device(tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """Copies of `tensors`, of the host and of any shapes and dtypes, on `device`; they share their memory's lifetime.

    The host's buffer may be dropped at once: torch reuses pinned memory after the copies from it only.
    """
    starts, size = [], 0
    for tensor in tensors:
        starts.append(size)
        size += -(-tensor.numel() * tensor.element_size() // ALIGNMENT) * ALIGNMENT
    packed = torch.empty(size, dtype=torch.uint8, pin_memory=device.type == "cuda")
    for start, tensor in zip(starts, tensors, strict=True):
        _view(packed, start, tensor).copy_(tensor)
    there = packed.to(device, non_blocking=True)
    return [_view(there, start, tensor) for start, tensor in zip(starts, tensors, strict=True)]


def _view(packed: Tensor, start: int, like: Tensor) -> Tensor:
    """What lies in the bytes of `packed` from `start` on, as a tensor like `like`."""
    size = math.prod(like.shape) * like.element_size()
    return packed[start : start + size].view(like.dtype).view(like.shape)
