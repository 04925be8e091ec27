"""Sees, on a CPU, where a GPU's host would wait for its device.

What a step computes with is taken for the device's: the tensors named to `SyncWatch`, those that `to_device` brings
there, those made with a stated `device`, and everything that an operation makes of any of these. The rest is the
host's. Then the host waits
- where it reads a device tensor: `item`, `tolist`, `cpu`, `numpy`, `bool`, `int`, `float`;
- where an operation's result has a size that depends on values: `nonzero`, `masked_select`, an index by a mask, ...;
- where a host tensor becomes the device's other than by `to_device`, or meets one in an operation: a pageable copy.
Methods that dispatch nothing on a CPU are patched; operators, those of a backward and those inside fastdpo's own too,
are seen by a dispatch mode.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastdpo.formulas import rng

REPOSITORY = Path(__file__).parent.parent
#: Functions that look at values on a CPU only, as a condition in each of them says.
ON_A_CPU_ONLY = ("check_targets", "check_boundaries", "_move_peak", "philox_word")
#: Triton's interpreter is no part of what it interprets.
INTERPRETER = "triton/runtime/interpreter.py"

_READS = ("item", "tolist", "cpu", "numpy", "__bool__", "__int__", "__float__", "__index__", "__complex__")
_FACTORIES = ("zeros", "ones", "empty", "full", "arange", "eye", "rand", "randn", "randint", "linspace")
#: Functions that copy Python values or host arrays to their `device`.
_PAGEABLE = ("tensor", "as_tensor", "asarray")
#: Operators whose result's size, or whose kernel, waits for values.
_WAITING = {
    "_local_scalar_dense", "item", "nonzero", "masked_select", "masked_scatter_backward", "equal", "is_nonzero",
    "_unique", "_unique2", "unique_dim", "unique_consecutive", "bincount", "histc", "argwhere", "allclose",
}  # fmt: skip
_INDEXING = ("index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index")


class Event(NamedTuple):
    """kind: the operation. function: the innermost function of this repository on the stack."""

    kind: str
    function: str


class SyncWatch(TorchDispatchMode):
    """A context in which `syncs` gathers the waits and `copies` the asynchronous copies to the device, in order.

    Args:
        device: tensors that lie on the device from the start.
    """

    def __init__(self, device: Iterable[Tensor]) -> None:
        super().__init__()
        self.syncs: list[Event] = []
        self.copies: list[Event] = []
        #: By address; kept alive, so that no address is used again.
        self._storages: dict[int, Any] = {}
        self._called = False  # within a patched function, which says itself what it does
        self.put(device)

    def put(self, tensors: Any) -> Any:
        """Take them for the device's."""
        for each in tree_leaves(tensors):
            if isinstance(each, Tensor):
                storage = each.untyped_storage()
                self._storages[storage._cdata] = storage
        return tensors

    def holds(self, tensor: Any) -> bool:
        return isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata in self._storages

    def wait(self, kind: str) -> None:
        names, files = _stack()
        if not set(names) & set(ON_A_CPU_ONLY) and not any(file.endswith(INTERPRETER) for file in files):
            self.syncs.append(Event(kind, names[0] if names else "?"))

    def __enter__(self) -> SyncWatch:
        self._patches = ExitStack()
        for name in _READS:
            self._patch(Tensor, name, self._read)
        self._patch(Tensor, "to", self._move)
        self._patch(Tensor, "new_tensor", self._made_from_values)
        for name in _FACTORIES:
            self._patch(torch, name, self._make)
        for name in _PAGEABLE:
            self._patch(torch, name, self._made_from_values)
        # Its branch for a CPU goes through NumPy; what the other one makes is the device's
        self._patch(rng, "philox_word", lambda function, *args: self.put(function(*args)))
        super().__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        self._patches.close()

    def _patch(self, owner: Any, name: str, seen: Any) -> None:
        function = getattr(owner, name)

        @functools.wraps(function)
        def patched(*args: Any, **kwargs: Any) -> Any:
            return function(*args, **kwargs) if self._called else seen(function, *args, **kwargs)

        self._patches.enter_context(mock.patch.object(owner, name, patched))

    def _quietly(self, function: Any, *args: Any, **kwargs: Any) -> Any:
        self._called = True
        try:
            return function(*args, **kwargs)
        finally:
            self._called = False

    def _host_copy(self, tensor: Any) -> Any:
        """Of its own memory, and the host's."""
        return self._quietly(lambda: tensor.detach().clone()) if isinstance(tensor, Tensor) else tensor

    def _read(self, function: Any, tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        result = self._quietly(function, tensor, *args, **kwargs)
        if not self.holds(tensor):
            return result
        self.wait(function.__name__)
        return self._host_copy(result)

    def _make(self, function: Any, *args: Any, **kwargs: Any) -> Any:
        result = self._quietly(function, *args, **kwargs)
        return result if kwargs.get("device") is None else self.put(result)

    def _made_from_values(self, function: Any, *args: Any, **kwargs: Any) -> Any:
        result = self._quietly(function, *args, **kwargs)
        if kwargs.get("device") is None and not self.holds(args[0]):
            return result
        self.wait(function.__name__)
        return self.put(result)

    def _move(self, function: Any, tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        """A stated device is the device, but for "cpu" by name."""
        targets = [x for x in (*args, *kwargs.values()) if isinstance(x, (torch.device, str, Tensor))]
        was_there = there = self.holds(tensor)
        if targets:
            there = self.holds(targets[0]) if isinstance(targets[0], Tensor) else targets[0] != "cpu"
        result = self._quietly(function, tensor, *args, **kwargs)
        if there == was_there:
            return self.put(result) if there else result
        names = [name for name in _stack()[0] if name not in ("to_device", "moved")]
        if there and _stack()[0][0] == "to_device" and kwargs.get("non_blocking"):
            self.copies.append(Event("to", names[0]))
        else:
            self.wait("to")
        result = self._host_copy(result)
        return self.put(result) if there else result

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._called:
            return func(*args, **kwargs)
        inputs = [each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
        there = [self.holds(each) for each in inputs]
        name = func.overloadpacket.__name__
        if any(there):
            if any(not held and each.dim() for held, each in zip(there, inputs, strict=True)):
                self.wait(f"{name} of a host tensor")
            elif name in _WAITING or (name == "repeat_interleave" and kwargs.get("output_size") is None):
                self.wait(name)
            elif name in _INDEXING and any(
                isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8) for index in args[1]
            ):
                self.wait(f"{name} by a mask")
        if func.namespace == "fastdpo":
            with self._again():  # what it is made of
                result = func.redispatch(torch._C.DispatchKeySet(torch._C.DispatchKey.CPU), *args, **kwargs)
        else:
            result = func(*args, **kwargs)
        # Autograd fills in zeros where its gradients are
        own_zeros = not inputs and torch._C._current_graph_task_id() != -1
        return self.put(result) if any(there) or own_zeros else result

    def _again(self) -> Any:
        stack = ExitStack()
        TorchDispatchMode.__enter__(self)
        stack.push(lambda *exception: TorchDispatchMode.__exit__(self, *exception))
        return stack


def _stack() -> tuple[list[str], list[str]]:
    """Functions of this repository, innermost first, and the files of all frames."""
    names, files = [], []
    frame = sys._getframe(1)
    while frame is not None:
        path = frame.f_code.co_filename
        files.append(path)
        if path.startswith((str(REPOSITORY / "fastdpo"), str(REPOSITORY / "kernels"))):
            names.append(frame.f_code.co_name)
        frame = frame.f_back
    return [name for name in names if not name.startswith("<")], files
