"""Labels in fused functions: a profiler sees them in both passes; without one, and when compiled, there are none."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fastdpo.training.body.labels import BODY, LORA, PREFIX, part


class Labelled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        with part(BODY):
            return 2 * x

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        with part(LORA):
            return 2 * gradient


def test_a_profiler_sees_both_passes() -> None:
    with torch.profiler.profile() as profiler:
        Labelled.apply(torch.ones(3, requires_grad=True)).sum().backward()
    labels = [event.name for event in profiler.events() if event.name.startswith(PREFIX)]
    assert labels == [PREFIX + BODY, PREFIX + LORA]


def test_without_a_profiler_nothing_is_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.profiler, "record_function")
    x = torch.ones(3, requires_grad=True)
    Labelled.apply(x).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [2.0, 2.0, 2.0]


def test_a_compiled_graph_stays_whole_under_a_profiler() -> None:
    def labelled(x: Tensor) -> Tensor:
        with part(LORA):
            return x * 2

    compiled = torch.compile(labelled, backend="eager", fullgraph=True)
    with torch.profiler.profile() as profiler:
        assert compiled(torch.ones(2)).tolist() == [2.0, 2.0]
    assert PREFIX + LORA not in {event.name for event in profiler.events()}
