"""A device's streams on a CPU, as unkind as they may be: what `fastdpo.training.memory.arena.Arena` copies with.

Copies run as late as the waits allow, one after the other: not before the computing stream waits for an event behind
them. Until then their target holds NaN, and neither of their tensors is kept alive. The computing stream is the CPU
itself, whose operators a dispatch mode counts; a copy may only be queued once its stream waits for the last of them.
What goes wrong otherwise is in `faults`.
"""

from __future__ import annotations

import weakref
from collections import deque
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


@dataclass
class Event:
    """behind: operators of the computing stream, or copies, that are done by then."""

    behind: int


@dataclass
class Buffer:
    """Host memory that is not pinned. closed: whether it was given back."""

    tensor: Tensor
    owner: LateCopies
    closed: bool = False

    def close(self) -> None:
        self.closed = True
        self.owner.run(self.owner.queued)  # a stream is waited for before its memory is unpinned


class _Computing:
    def __init__(self, owner: LateCopies) -> None:
        self.owner = owner

    def record_event(self) -> Event:
        return Event(self.owner.operators)

    def wait_event(self, event: Event) -> None:
        self.owner.run(event.behind)


class _Copying:
    def __init__(self, owner: LateCopies) -> None:
        self.owner = owner
        self.waited_for = 0

    def record_event(self) -> Event:
        return Event(self.owner.queued)

    def wait_event(self, event: Event) -> None:
        self.waited_for = max(self.waited_for, event.behind)


class LateCopies(TorchDispatchMode):
    """`arena.Copies`, and a context in which the computing stream's operators are seen.

    buffers: sizes of all that were asked for. out, back: copies to the host and from it, by the host's address.
    most_on_device: bytes of inputs on their way back at a time.
    """

    def __init__(self) -> None:
        super().__init__()
        self.stream, self._computing = _Copying(self), _Computing(self)
        self.operators = self.queued = self.done = 0
        self.faults: list[str] = []
        self.buffers: list[Buffer] = []
        self.out: list[int] = []
        self.back: list[int] = []
        self._waiting: deque[Any] = deque()
        self._own = False
        self._travelling: weakref.WeakSet[Any] = weakref.WeakSet()
        self.most_travelling = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        self.operators += not self._own
        return func(*args, **(kwargs or {}))

    def computing(self) -> _Computing:
        return self._computing

    def buffer(self, size: int) -> Buffer:
        self.buffers.append(Buffer(torch.zeros(size, dtype=torch.uint8), self))
        return self.buffers[-1]

    def empty_like(self, host: Tensor, device: torch.device) -> Tensor:
        made = torch.full_like(host, float("nan"), device=device)
        self._travelling.add(made.untyped_storage())
        self.most_travelling = max(self.most_travelling, len(self._travelling))
        return made

    def copy(self, target: Tensor, source: Tensor) -> None:
        if self.stream.waited_for < self.operators:
            self.faults.append(f"copy {self.queued}: queued before what came before it was waited for")
        self._waiting.append((_Kept(target), _Kept(source)))
        self.queued += 1
        inside = [each.tensor.untyped_storage().data_ptr() for each in self.buffers if not each.closed]
        if target.untyped_storage().data_ptr() in inside:
            self.out.append(target.data_ptr())
        else:
            self.back.append(source.data_ptr())

    def run(self, behind: int) -> None:
        """Run the copies up to the `behind`-th."""
        self._own = True
        while self.done < behind:
            target, source = self._waiting.popleft()
            into, out_of = target.tensor(), source.tensor()
            if into is None or out_of is None:
                self.faults.append(f"copy {self.done}: its {'target' if into is None else 'source'} was freed before")
            else:
                into.copy_(out_of)
            self.done += 1
        self._own = False


class _Kept:
    """A tensor as a queue of copies knows it: its memory and shape, which it does not keep alive."""

    def __init__(self, tensor: Tensor) -> None:
        self.storage = weakref.ref(tensor.untyped_storage())
        self.dtype = tensor.dtype
        self.where = (tensor.storage_offset(), tensor.shape, tensor.stride())

    def tensor(self) -> Tensor | None:
        storage = self.storage()
        with torch.no_grad():
            return None if storage is None else torch.empty(0, dtype=self.dtype).set_(storage, *self.where)
