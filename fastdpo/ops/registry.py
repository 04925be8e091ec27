"""Operators with one implementation per backend.

PyTorch's dispatcher chooses by device; here the caller chooses, since Triton's interpreter and PyTorch both serve CPU
tensors. So every operator takes `str backend` as its last argument, and looks its implementation up by that name. An
implementation is named as "module:function" and imported on first use: no backend costs anything until it is called.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
from collections.abc import Callable, Mapping
from typing import Any

import torch

from fastdpo.ops import first_order

NAMESPACE = "fastdpo"
#: What it registers lasts as long as it.
_LIBRARY = torch.library.Library(NAMESPACE, "FRAGMENT")


def define(
    name: str,
    schema: str,
    fake: Callable[..., Any],
    implementations: Mapping[str, str],
    *,
    backward: Callable[..., Any] | None = None,
    setup_context: Callable[..., Any] | None = None,
    oracle: str | None = None,
    advice: str = "",
) -> torch._ops.OpOverload:
    """Register `torch.ops.fastdpo.<name>` and return it.

    Args:
        schema: as torch.library takes it; the last argument is `str backend`.
        fake: shapes and dtypes of the outputs from those of the inputs; raises where they do not fit.
        implementations: backend → "module:function". The function takes the operator's arguments less the backend.
        backward, setup_context: as for `torch.library.register_autograd`. They give the first derivative; another one
            raises (`first_order`), and without them any.
        oracle: the function of `fastdpo.formulas.oracle` that computes the same, where it has another name.
        advice: the sentence on what has further derivatives, where that is not the oracle.
    """
    qualified = f"{NAMESPACE}::{name}"
    torch.library.define(qualified, schema, tags=(torch.Tag.pt2_compliant_tag,))

    def call(*args: Any) -> Any:
        *inputs, backend = args
        if backend not in implementations:
            raise ValueError(f"backend={backend!r} does not implement {name}; it has {', '.join(implementations)}.")
        first = next(x for x in inputs if isinstance(x, torch.Tensor))
        device = first.device.type
        with contextlib.ExitStack() as stack:
            if first.is_cuda:  # Triton launches on the current device, whatever its arguments are on
                stack.enter_context(torch.cuda.device_of(first))
            if torch.is_autocast_enabled(device):  # its lists of operations would round what is computed in float32
                stack.enter_context(torch.autocast(device, enabled=False))
            return implementation(implementations[backend])(*inputs)

    torch.library.impl(qualified, "default", call)
    torch.library.register_fake(qualified, fake)
    operator: torch._ops.OpOverload = getattr(getattr(torch.ops, NAMESPACE), name).default
    if "!" not in schema:  # what overwrites its input can carry no autograd
        advice = advice or first_order.see_oracle(oracle or name)
        autograd = first_order.kernel(operator, advice, backward, setup_context)
        _LIBRARY.impl(name, autograd, "Autograd", with_keyset=True)
    return operator


@functools.cache
def implementation(path: str) -> Callable[..., Any]:
    """The function at "module:function", imported on first use; every call of an operator goes through here."""
    module, _, function = path.partition(":")
    return getattr(importlib.import_module(module), function)
