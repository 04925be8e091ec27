"""Names of a body's parts, which its fused functions give to a profiler: `with part(LORA): ...`.

A function that dequantises a weight, multiplies by it and adds LoRA's share is one operator to whoever looks from
outside; with labels around its pieces `benchmarks.profile_step` books each on the part that it belongs to. The
innermost label counts. `ctx.saved_tensors` is read outside of labels, as reading may recompute a layer.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch

#: Starts the name of every label among a profiler's events.
PREFIX = "part: "
BODY = "matrix products of the body"
NF4 = "NF4 dequantisation"
LORA = "LoRA"
ATTENTION = "attention with rotary positions"
NORMS = "norms"
ACTIVATION = "activation of the MLP"

_UNLABELLED: AbstractContextManager[object] = nullcontext()


def part(name: str) -> AbstractContextManager[object]:
    """Labels what runs within as `name` while a profiler records this thread; else a shared context that does nothing.

    A compiled graph holds no labels: to ask whether a profiler is on would break it.
    """
    if torch.compiler.is_compiling() or not torch.autograd._profiler_enabled():
        return _UNLABELLED
    return torch.profiler.record_function(PREFIX + name)
