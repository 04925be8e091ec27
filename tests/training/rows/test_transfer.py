"""Host tensors reach a device in one copy, each as it was."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastdpo.training.rows import transfer
from fastdpo.training.rows.transfer import ALIGNMENT, to_device

TENSORS = [
    torch.arange(7),
    torch.tensor([[True, False, True]]),
    torch.zeros(0, 4),
    torch.arange(6, dtype=torch.int32).view(2, 3).T,
    torch.tensor(2.5, dtype=torch.float64),
    torch.arange(5, dtype=torch.uint8),
    torch.tensor([[float("nan"), -1.0]], dtype=torch.bfloat16),
]


def test_every_tensor_arrives_as_it_was() -> None:
    found = to_device(TENSORS, torch.device("cpu"))
    for one, other in zip(found, TENSORS, strict=True):
        torch.testing.assert_close(one, other, rtol=0.0, atol=0.0, equal_nan=True)
        assert one.is_contiguous()
        assert one.storage_offset() * one.element_size() % ALIGNMENT == 0
    assert len({each.untyped_storage().data_ptr() for each in found}) == 1, "one copy"
    found[0].fill_(5)
    assert TENSORS[0].tolist() == [0, 1, 2, 3, 4, 5, 6]
    assert to_device([], torch.device("cpu")) == []


def test_the_host_does_not_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of pinned memory on CUDA, and without blocking. There is no such device here: the copy goes to "meta"."""
    pinned, copies, make, to = [], [], torch.empty, Tensor.to

    def empty(size: int, *, dtype: torch.dtype, pin_memory: bool) -> Tensor:
        pinned.append(pin_memory)
        return make(size, dtype=dtype)

    def recorded(tensor: Tensor, device: torch.device, *, non_blocking: bool) -> Tensor:
        copies.append((device.type, non_blocking))
        return to(tensor, "meta")

    monkeypatch.setattr(torch, "empty", empty)
    monkeypatch.setattr(Tensor, "to", recorded)
    found = transfer.to_device(TENSORS, torch.device("cuda"))
    assert (pinned, copies) == ([True], [("cuda", True)])
    assert [(each.shape, each.dtype) for each in found] == [(each.shape, each.dtype) for each in TENSORS]
