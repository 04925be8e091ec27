"""liger-kernel's Triton kernels in the interpreter, which lacks what three of its lines call.

Kernels that are handed a Python number call its `.to`, which a compiled kernel's scalar has and the interpreter's
number has not; `rsqrt` and `tanh` of libdevice do nothing there. Each gets a stand-in: a number with `.to`, the same
functions from Triton's own language. Everything else runs as it is written: loads, masks, strides, casts, sums, stores.
"""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import triton
import triton.language as tl


class Number(float):
    """A scalar argument as a compiled kernel sees it."""

    def to(self, dtype: Any) -> Number:
        return self


class Launched:
    """A kernel whose launches pass numbers as `Number`."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel

    def __getitem__(self, grid: Any) -> Any:
        launch = self.kernel[grid]
        return lambda *args, **options: launch(
            *(Number(each) if type(each) is float else each for each in args), **options
        )


@triton.jit
def _rsqrt(x):  # type: ignore[no-untyped-def]
    return tl.rsqrt(x)


@triton.jit
def _tanh(x):  # type: ignore[no-untyped-def]
    return 2 * tl.sigmoid(2 * x) - 1


def interpret(monkeypatch: pytest.MonkeyPatch) -> None:
    """Until the test ends, liger's functions take tensors on the CPU."""
    for name in ("rms_norm", "swiglu", "geglu", "rope"):
        module = importlib.import_module(f"liger_kernel.ops.{name}")
        for key, value in list(vars(module).items()):
            if key.endswith("_kernel") and hasattr(value, "run"):
                monkeypatch.setattr(module, key, Launched(value))
    monkeypatch.setattr("liger_kernel.ops.rms_norm.rsqrt", _rsqrt)
    monkeypatch.setattr("liger_kernel.ops.geglu.tanh", _tanh)
