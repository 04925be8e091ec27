"""Inputs of checkpointed layers on the host: a pinned buffer for those of a micro-batch, and the way there and back.

Forward: an input's copy to the host begins before its layer and travels while the layer computes; behind the layer the
device waits for it, so that the input can be freed at once. Backward: a layer's input is asked for when the layer is
recomputed, and that of the layer below it then starts on its way, to be there when its turn comes. All copies share one
stream of their own, so that what is read from a place on the host is read before the place is written again.

    bytes = L · ⌈T · H · itemsize⌉₂₅₆, rounded up to pages      L checkpointed layers, T tokens, H hidden

The device holds one input beside the one at work. Places are taken from the buffer's beginning on and given back when
their graph is freed; with the last one the buffer is empty again.
"""

from __future__ import annotations

import mmap
import weakref
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

#: Bytes that an input begins at a multiple of, as torch's allocators do.
ALIGNMENT = 256
#: Inputs that the device holds in the backward: of the layer at work, and of the next one, on its way.
ON_DEVICE = 2


def _rounded(size: int, unit: int) -> int:
    return -(-size // unit) * unit


def arena_bytes(layers: int, tokens: int, hidden: int, itemsize: int) -> int:
    """Bytes of host memory for the inputs of `layers` checkpointed layers of a micro-batch of `tokens` tokens, whose
    hidden states have `hidden` numbers of `itemsize` bytes."""
    return _rounded(layers * _rounded(tokens * hidden * itemsize, ALIGNMENT), mmap.PAGESIZE)


class Stream(Protocol):
    """A queue of work on the device, as torch.cuda.Stream."""

    def record_event(self) -> Any:
        """An event behind all that is queued."""

    def wait_event(self, event: Any) -> None:
        """Nothing that is queued later begins before `event`."""


class Buffer(Protocol):
    """Pinned host memory."""

    #: (bytes,) uint8.
    tensor: Tensor

    def close(self) -> None:
        """Give the memory back, once no copy uses it."""


class Copies(Protocol):
    """Copies between a device and the host."""

    @property
    def stream(self) -> Stream:
        """On which they run, one after the other."""

    def computing(self) -> Stream:
        """The stream on which the caller's kernels are queued."""

    def copy(self, target: Tensor, source: Tensor) -> None:
        """Queue a copy on `stream`. Both tensors stay, and `source` as it is, until the copy is done."""

    def buffer(self, size: int) -> Buffer:
        """Pinned memory of `size` bytes, whole pages. Raises MemoryError where there is too little."""

    def empty_like(self, host: Tensor, device: torch.device) -> Tensor:
        """Memory on `device` for a copy of `host`."""


@dataclass(eq=False)
class Place:
    """Where one input lies on the host.

    stored: event behind its copy to the host. below: the input that the backward wants next.
    tensor, arrived, stream: of a copy on its way back, the event behind it, and the stream that its memory belongs to.
    """

    host: Tensor
    device: torch.device
    below: Place | None = None
    stored: Any = None
    tensor: Tensor | None = None
    arrived: Any = None
    stream: Any = None
    released: bool = False


class Ticket:
    """What a graph holds in the place of an input: with it, the place is given back."""

    def __init__(self, place: Place) -> None:
        self.place = place


class Arena:
    """Host memory for the inputs of `inputs` checkpointed layers.

    One buffer holds them: of the size that the first input of a micro-batch foretells, or that was reserved, and
    replaced by a larger one only while it is empty. Inputs that it does not foresee (a second graph that is alive, a
    wider layer) go into a further buffer; once all are given back, one buffer of the sum takes their place.
    """

    def __init__(self, copies: Copies, inputs: int) -> None:
        self.copies, self.inputs = copies, inputs
        self._blocks: list[Buffer] = []
        self._top = 0  # of the last buffer
        self._kept: set[Place] = set()
        self._last: Place | None = None  # the input that was stored last, of the same micro-batch
        self._stored = 0  # of this micro-batch

    @property
    def size(self) -> int:
        """Bytes of host memory that are taken."""
        return sum(each.tensor.numel() for each in self._blocks)

    @property
    def live(self) -> int:
        """Inputs that are kept."""
        return len(self._kept)

    def reserve(self, size: int) -> None:
        """Hold `size` bytes in one buffer, or what there is where that is more. Only while nothing is kept."""
        assert not self._kept
        size = max(_rounded(size, mmap.PAGESIZE), self.size)
        if [each.tensor.numel() for each in self._blocks] == [size]:
            return
        self.release()
        self._blocks = [self.copies.buffer(size)]

    def release(self) -> None:
        """Give the host's memory back. Only while nothing is kept."""
        assert not self._kept
        self._last = None
        while self._blocks:
            self._blocks.pop().close()

    def store(self, tensor: Tensor) -> Ticket:
        """Begin to copy `tensor` to the host. It has to stay as it is until `stored` was called."""
        host = self._take(tensor)
        place = Place(host, tensor.device, self._last)
        ticket = Ticket(place)
        self._kept.add(place)
        weakref.finalize(ticket, self._give_back, place).atexit = False
        self._last = place
        self._stored += 1
        self.copies.stream.wait_event(self.copies.computing().record_event())  # by then the input is computed
        self.copies.copy(place.host, tensor)
        place.stored = self.copies.stream.record_event()
        return ticket

    def stored(self, ticket: Ticket) -> None:
        """Have the device wait for the copy to the host, so that whatever comes next may overwrite the input."""
        self.copies.computing().wait_event(ticket.place.stored)

    def fetch(self, ticket: Ticket) -> Tensor:
        """The input on its device, for what is queued from now on; the one below it starts on its way."""
        place = ticket.place
        if place.tensor is None:
            self._start(place)
        self.copies.computing().wait_event(place.arrived)
        tensor, place.tensor = place.tensor, None
        below = place.below
        if below is not None and not below.released and below.tensor is None:
            self._start(below)
        assert tensor is not None
        return tensor

    def _start(self, place: Place) -> None:
        place.stream = self.copies.computing()
        tensor = self.copies.empty_like(place.host, place.device)
        # What was queued before may still use that memory
        self.copies.stream.wait_event(place.stream.record_event())
        self.copies.copy(tensor, place.host)
        place.tensor, place.arrived = tensor, self.copies.stream.record_event()

    def _take(self, tensor: Tensor) -> Tensor:
        size = _rounded(tensor.numel() * tensor.element_size(), ALIGNMENT)
        if not self._kept:
            self._top, self._last, self._stored = 0, None, 0
            self.reserve(self.inputs * size)
        elif self._stored == self.inputs:  # of another micro-batch, whose graph is still there
            self._last, self._stored = None, 0
        if self._top + size > self._blocks[-1].tensor.numel():
            rest = max(1, self.inputs - self._stored) * size
            self._blocks.append(self.copies.buffer(_rounded(rest, mmap.PAGESIZE)))
            self._top = 0
        start, self._top = self._top, self._top + size
        held = self._blocks[-1].tensor[start : start + tensor.numel() * tensor.element_size()]
        return held.view(tensor.dtype).view(tensor.shape)

    def _give_back(self, place: Place) -> None:
        if place.tensor is not None:  # nobody has asked for it, and it may still be written to
            place.stream.wait_event(place.arrived)
        place.tensor, place.below, place.released = None, None, True
        self._kept.discard(place)
