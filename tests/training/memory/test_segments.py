"""Expandable segments are asked for on a GPU, unless the option or the environment says otherwise."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from fastdpo.training.memory.segments import use_expandable_segments


@pytest.mark.parametrize(
    ("device", "wanted", "environment", "expected"),
    [
        ("cuda", True, {}, ["expandable_segments:True"]),
        ("cuda", True, {"PYTORCH_TUNABLEOP": "1"}, ["expandable_segments:True"]),
        ("cuda", False, {}, []),
        ("cuda", True, {"PYTORCH_ALLOC_CONF": "max_split_size_mb:512"}, []),
        ("cuda", True, {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:False"}, []),
        ("cuda", True, {"PYTORCH_ALLOC_CONF": ""}, []),
        ("cpu", True, {}, []),
    ],
)
def test_who_decides(device: str, wanted: bool, environment: dict[str, str], expected: list[str]) -> None:
    asked: list[str] = []
    args = SimpleNamespace(device=torch.device(device), expandable_segments=wanted)
    assert use_expandable_segments(args, environment, asked.append) is bool(expected)  # type: ignore[arg-type]
    assert asked == expected


def test_torch_takes_the_setting() -> None:
    """Without a GPU it only reads it: a word that it does not know is an error."""
    args = SimpleNamespace(device=torch.device("cuda"), expandable_segments=True)
    assert use_expandable_segments(args, {})  # type: ignore[arg-type]
    with pytest.raises((RuntimeError, ValueError)):
        torch._C._accelerator_setAllocatorSettings("expandable_segments:Perhaps")
