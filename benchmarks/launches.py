"""What a call launches, counted on real calls in Triton's interpreter.

    TRITON_INTERPRET=1 python -m benchmarks.launches 4 8      heads whose vocabulary takes 4 and 8 chunks, as JSON

A launch is a Triton grid, or an operator of torch's that is no view. Allocations without a value launch nothing, and
neither do the casts by which a CPU gets float32 products from 16-bit operands; both are counted apart.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves
from triton.runtime.interpreter import GridExecutor

import fastdpo
from fastdpo.ops import registry
from fastdpo.ops.linear_logprob.tiles import COLUMN_STEP, MIN_WORKSPACE

_ATEN = torch.ops.aten
_PRODUCTS = {_ATEN.mm, _ATEN.addmm, _ATEN.addmm_, _ATEN.bmm}
_CASTS = {_ATEN.to, _ATEN._to_copy}
_ALLOCATIONS = {_ATEN.empty, _ATEN.empty_like, _ATEN.empty_strided, _ATEN.new_empty, _ATEN.new_empty_strided}
#: A head at toy size: rows whose 16-bit exponentials fill the least workspace with the narrowest chunk.
_ROWS, _HIDDEN = MIN_WORKSPACE // (2 * COLUMN_STEP), 16


@dataclass
class Counts:
    """Triton grids, products, other operators; allocations and CPU casts, which launch nothing on a GPU."""

    grids: int = 0
    products: int = 0
    others: int = 0
    allocations: int = 0
    casts: int = 0

    @property
    def launches(self) -> int:
        return self.grids + self.products + self.others


class _Operators(TorchDispatchMode):
    """Counts operators of torch's. It sees into the project's own only where these enter it again."""

    def __init__(self) -> None:
        super().__init__()
        self.counts = Counts()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        packet = func.overloadpacket
        if func.namespace != "aten":
            return result
        if packet in _ALLOCATIONS:
            self.counts.allocations += 1
        elif _only_looks(func, args, result):
            pass
        elif packet in _CASTS:
            self.counts.casts += 1
        elif packet in _PRODUCTS:
            self.counts.products += 1
        else:
            self.counts.others += 1
        return result


def _only_looks(func: Any, args: Any, result: Any) -> bool:
    """Whether an operator gives no tensor, views of its arguments, or tensors without elements, for which torch
    launches nothing."""
    outputs = [x for x in tree_leaves(result) if isinstance(x, torch.Tensor)]
    storages = {x.untyped_storage().data_ptr() for x in tree_leaves(args) if isinstance(x, torch.Tensor)}
    new = [x for x in outputs if x.numel() and x.untyped_storage().data_ptr() not in storages]
    return not (func._schema.is_mutable or new)


@contextmanager
def counting_launches() -> Iterator[Counts]:
    """Counts what runs on this thread, backwards on a CPU too, within the project's operators and without."""
    operators = _Operators()
    load, execute = registry.implementation, GridExecutor.__call__

    def load_counted(path: str) -> Callable[..., Any]:
        def implementation(*inputs: Any) -> Any:
            with operators:
                return load(path)(*inputs)

        return implementation

    def execute_counted(executor: Any, *args: Any, **kwargs: Any) -> None:
        operators.counts.grids += 1
        with _disable_current_modes():  # the interpreter's own copies
            execute(executor, *args, **kwargs)

    with (
        mock.patch.object(registry, "implementation", load_counted),
        mock.patch.object(GridExecutor, "__call__", execute_counted),
        operators,
    ):
        yield operators.counts


def count_head(chunks: int) -> Counts:
    """A head call: policy forward and backward, and reference, whose vocabulary takes `chunks` chunks of E."""
    generator = torch.Generator().manual_seed(0)
    vocab = chunks * COLUMN_STEP - 1  # the last one is ragged
    hidden = torch.randn(_ROWS, _HIDDEN, generator=generator).bfloat16()
    weight = torch.randn(vocab, _HIDDEN, generator=generator).bfloat16()
    targets = torch.randint(0, vocab, (_ROWS,), generator=generator)
    leaf, grad = hidden.clone().requires_grad_(), torch.randn(_ROWS, generator=generator)

    def score(states: torch.Tensor) -> torch.Tensor:
        logps = fastdpo.linear_logprob(
            states, weight, targets, ignore_index=None, backend="triton", workspace=MIN_WORKSPACE
        )
        assert isinstance(logps, torch.Tensor)  # no statistics were asked for
        return logps

    # Which looks at the targets on a CPU only
    with mock.patch("fastdpo.ops.linear_logprob.backends.check_targets"), counting_launches() as counts:
        score(leaf).backward(grad)
        with torch.no_grad():
            score(hidden)
    return counts


if __name__ == "__main__":
    print(json.dumps([asdict(count_head(int(chunks))) for chunks in sys.argv[1:]]))
