"""Who holds memory, and where a step needs most of it: bytes alive after every operator, by the place that called it.

A place (`Site`) is the module that was at work, the line of Python that called torch, and the operator; in the backward
the autograd node, and the module that had recorded it. Layers of a model share their sites.

Why by place: the most bytes alive over a step are no linear function of its tokens, as another moment is the fullest in
a long row than in a short one. After one place's operator they are linear, once a row is longer than the slices that
the body computes at a time; so places are extrapolated one by one, and their maximum is taken afterwards.
"""

from __future__ import annotations

import os
import re
import sys
from bisect import bisect_right
from collections.abc import Iterable
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from fastdpo.training.memory import counting
from fastdpo.training.memory.counting import LiveBytes, Workspaces

_INDEX = re.compile(r"(?<=\.)\d+(?=\.|$)")
#: Files between torch's dispatcher and whoever called it.
_PASSED = (str(Path(torch.__file__).parent), __file__, counting.__file__)
#: Who calls the forward and the backward that are counted.
_OUTSIDE = str(Path(__file__).parent)
#: Prefixes by which peft wraps a model.
_WRAPPERS = re.compile(r"^base_model\.model\.|\.base_layer$")


class Site(NamedTuple):
    """Where an operator was called. module: its path, layers as *. line: file:line. operator: torch's name for it.
    node: of autograd, where the call was in the backward; "" in a forward. recomputed: a forward in the backward."""

    module: str
    line: str
    operator: str
    node: str = ""
    recomputed: bool = False


class Holding(NamedTuple):
    """A storage that is alive: who made it, as what, and its bytes. An operator's workspace has no shape and dtype."""

    site: Site
    shape: tuple[int, ...] | None
    dtype: torch.dtype | None
    bytes: int


class SiteBytes(LiveBytes):
    """`LiveBytes` by place.

    Args:
        model: whose modules are named.
        workspaces: as of `LiveBytes`.
        apart: operators whose workspace is left out of `peaks`, as it is linear in nothing.
        snapshot_at: the place at whose fullest moment `holdings` are taken.

    Attributes:
        peaks: place → the most bytes alive after its operator, its workspace included unless it is `apart`.
        holdings: of `snapshot_at`.
    """

    def __init__(
        self,
        model: nn.Module,
        workspaces: Workspaces | None = None,
        *,
        apart: Iterable[Any] = (),
        snapshot_at: Site | None = None,
    ) -> None:
        super().__init__(workspaces)
        self.peaks: dict[Site, int] = {}
        self.holdings: list[Holding] = []
        self._apart, self._wanted = frozenset(apart), snapshot_at
        self._names = {id(module): _plain(name) for name, module in model.named_modules()}
        self._stack: list[str] = []
        # Sequence numbers of autograd's nodes from which on the module beside them was at work
        self._since: tuple[list[int], list[str]] = ([0], [""])
        self._made: dict[int, Holding] = {}
        self._site: Site | None = None

    def __enter__(self) -> SiteBytes:
        self._hooks = [
            register_module_forward_pre_hook(self._enter_module),
            register_module_forward_hook(self._leave_module, always_call=True),
        ]
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for hook in self._hooks:
            hook.remove()

    def _enter_module(self, module: nn.Module, _: Any) -> None:
        self._stack.append(self._names.get(id(module), ""))
        self._mark()

    def _leave_module(self, *_: Any) -> None:
        self._stack.pop()
        self._mark()

    def _mark(self) -> None:
        starts, modules = self._since
        number, module = torch._C._autograd._get_sequence_nr(), self._stack[-1] if self._stack else ""
        if starts[-1] == number:
            modules[-1] = module
        else:
            starts.append(number)
            modules.append(module)

    def _module_of(self, node: Any) -> str:
        """The module that was at work when a node was recorded."""
        starts, modules = self._since
        return modules[bisect_right(starts, node._sequence_nr()) - 1]

    def _found_site(self, func: Any) -> Site:
        node = torch._C._current_autograd_node()
        line = _caller(sys._getframe(1))
        if self._stack:
            return Site(self._stack[-1], line, str(func), recomputed=node is not None)
        if node is None:
            return Site("", line, str(func))
        return Site(self._module_of(node), line, str(func), node.name())

    def _note(self, func: Any, made: list[Tensor], workspace: int) -> None:
        if not made and not workspace:
            return
        site = self._found_site(func)
        for tensor in made:
            storage = tensor.untyped_storage()
            self._made[id(storage)] = Holding(site, tuple(tensor.shape), tensor.dtype, storage.nbytes())
        total = self.live + (0 if func in self._apart else workspace)
        if total > self.peaks.get(site, -1):
            self.peaks[site] = total
            if site == self._wanted:
                self.holdings = list(self._made.values())
                if total > self.live:
                    self.holdings.append(Holding(site, None, None, workspace))
        super()._note(func, made, workspace)

    def _free(self, key: int) -> None:
        super()._free(key)
        self._made.pop(key, None)


def _plain(name: str) -> str:
    return _WRAPPERS.sub("", _INDEX.sub("*", _WRAPPERS.sub("", name)))


def _caller(frame: FrameType | None) -> str:
    """File and line of the innermost frame outside of torch and of the counting; "" where the backward called."""
    while frame is not None and frame.f_code.co_filename.startswith(_PASSED):
        frame = frame.f_back
    if frame is None or frame.f_code.co_filename.startswith(_OUTSIDE):
        return ""
    return f"{os.path.basename(frame.f_code.co_filename)}:{frame.f_lineno}"
