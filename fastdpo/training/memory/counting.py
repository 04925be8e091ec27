"""Counts the bytes that tensors occupy while code runs: real tensors or fake ones, forward and backward.

Every operator's outputs pass through a dispatch mode. A storage counts from its first appearance until it is freed; one
that an operator is given before any operator made it (a parameter, an input), or whose first appearance is a view (of a
parameter that a fake mode has just given a fake storage), belongs to the caller and does not count.
What an operator takes and frees within itself is invisible here, so operators with a large workspace are named below,
and the head's in `head_workspace`. Counts are linear in the tokens of a row of pairs of one shape: a `Line`.
"""

from __future__ import annotations

import contextlib
import functools
import math
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.attention.varlen  # registers its operators
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastdpo.training.rows import tiled_attention

#: FlashAttention pads sequences and head sizes to multiples of these (read in its source, never measured).
_FLASH_BLOCK, _FLASH_DEPTH = 128, 32
#: Asks a fake tensor where it is, which is half of all calls.
_DEVICE = torch.ops.prim.device.default
#: Operator → bytes that it takes within itself, from its arguments.
Workspaces = Mapping[Any, Callable[..., int]]


@dataclass(frozen=True)
class Line:
    """bytes = per_token · tokens + constant."""

    per_token: float
    constant: float

    @classmethod
    def through(cls, first: tuple[int, int], second: tuple[int, int]) -> Line:
        """The line through two points (tokens, bytes)."""
        slope = (second[1] - first[1]) / (second[0] - first[0])
        return cls(slope, first[1] - slope * first[0])

    def at(self, tokens: int) -> int:
        """Bytes of so many tokens."""
        return round(self.per_token * tokens + self.constant)

    def tokens_within(self, limit: int) -> int:
        """The most tokens whose bytes are within `limit`; 0 where even one token's are not."""
        return max(0, int((limit - self.constant) / self.per_token))


class LiveBytes(TorchDispatchMode):
    """Bytes of the storages that operators made since the mode was entered and that are still alive.

    Attributes:
        live: at this moment.
        peak: the most so far, operators' workspaces included.
    """

    def __init__(self, workspaces: Workspaces | None = None) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._workspaces = workspaces or {}
        self._sizes: dict[int, int] = {}  # id of a storage → its bytes, 0 for the caller's own
        self._references: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        if func is _DEVICE:
            return func(*args, **(kwargs or {}))
        for tensor in _tensors(args):
            self._see(tensor, own=False)
        for tensor in _tensors(kwargs.values() if kwargs else ()):
            self._see(tensor, own=False)
        result = func(*args, **(kwargs or {}))
        makes = _makes(func)
        made = [x for x in _tensors((result,)) if self._see(x, own=makes) and makes]
        workspace = self._workspaces.get(func)
        self._note(func, made, workspace(*args, **(kwargs or {})) if workspace else 0)
        return result

    def _note(self, func: Any, made: list[Tensor], workspace: int) -> None:
        """After every operator: the tensors whose storages it made, and the bytes that it took within itself."""
        self.peak = max(self.peak, self.live + workspace)

    def _see(self, tensor: Tensor, own: bool) -> bool:
        """Whether its storage appears for the first time."""
        storage = tensor.untyped_storage()
        key = id(storage)
        if key in self._references:
            return False
        self._sizes[key] = storage.nbytes() if own else 0
        self._references[key] = weakref.ref(storage, lambda _: self._free(key))
        self.live += self._sizes[key]
        return True

    def _free(self, key: int) -> None:
        self.live -= self._sizes.pop(key)
        del self._references[key]


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    """The tensors in an operator's arguments or results, which hold lists and tuples of them at most."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)


@functools.cache
def _makes(func: Any) -> bool:
    """Whether an operator's results are new, not views of its arguments or these themselves."""
    return not any(each.alias_info for each in func._schema.returns)


def gemm_4bit_workspace(a: Tensor, b: Tensor, shape: Any, absmax: Tensor, blocksize: int, *_: Any, **named: Any) -> int:
    """bitsandbytes' forward through a 4-bit layer: the weight in `a`'s dtype, and its constants in float32 where they
    are quantised themselves.

    On a CPU always; on a GPU for more rows than its fused kernel takes, so an upper bound there.
    """
    count = math.prod(shape)
    nested = named.get("absmax_8bit") is not None
    return count * a.element_size() + (4 * -(-count // blocksize) if nested else 0)


def flash_backward_workspace(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *rest: Any, **named: Any) -> int:
    """FlashAttention's backward over variable lengths: query gradients in float32 and a float32 per query and head, for
    sequences that are rounded up to its block of queries; where heads share keys, key and value gradients per head."""
    tokens, heads, depth = query.shape
    sequences = len(rest[2]) - 1
    rounded = tokens + _FLASH_BLOCK * sequences
    shared = key.shape[1] != heads
    expanded = 2 * key.shape[0] * heads * depth * key.element_size() if shared else 0
    return rounded * heads * 4 * (-(-depth // _FLASH_DEPTH) * _FLASH_DEPTH + 1) + expanded


def workspaces() -> Workspaces:
    """The operators of 4-bit layers, where bitsandbytes is installed, and of attention over variable lengths."""
    known: dict[Any, Callable[..., int]] = {
        torch.ops.torch_attn._varlen_attn_backward.default: flash_backward_workspace,
        tiled_attention.segment_attention: tiled_attention.forward_workspace,
        tiled_attention.segment_attention_backward: tiled_attention.backward_workspace,
    }
    with contextlib.suppress(AttributeError):
        known[torch.ops.bitsandbytes.gemm_4bit.default] = gemm_4bit_workspace
    return known
