"""What the head stage asks of the fused kernels: the one place that knows how they are called.

`plans` are the environments and keywords under which the public `linear_logprob` is timed; `tile_calls` runs the GEMM
with the fold in its epilogue alone, one call per candidate tile.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from benchmarks.cases import HeadInputs
from benchmarks.gpu.sizes import Sizes
from fastdpo.ops.linear_logprob.tiles import COLUMN_STEP


@dataclass(frozen=True)
class Plan:
    """environment: set meanwhile. options: of linear_logprob."""

    environment: dict[str, str] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)


@contextmanager
def environment(values: dict[str, str]) -> Iterator[None]:
    """`values` in os.environ, and what was there before afterwards."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def plans(sizes: Sizes) -> dict[str, Plan]:
    """The fused head by its buffer, and the separate fold by its tiles."""
    made = {"default": Plan()}
    for size in sizes.workspaces:
        made[f"workspace {size / 2**20:g} MiB"] = Plan(options={"workspace": size})
    for tile in sizes.fold_tiles:
        values = {"FASTDPO_HEAD": "separate"} | ({"FASTDPO_TILE": tile} if tile else {})
        made[f"separate fold, {tile or 'its own tiles'}"] = Plan(values)
    return made


def tile_calls(x: HeadInputs, columns: int, *, store: bool) -> dict[str, Callable[[], object]]:
    """Tile → one launch over the first `columns` of the vocabulary, the table's own tile first; store: with the
    exponentials for the gradient."""
    from fastdpo_kernels.linear_logprob import gemm as kernels
    from fastdpo_kernels.linear_logprob import tiles

    hidden, weight, rows = x.hidden.detach(), x.weight[:columns], len(x.hidden)
    reference = kernels.Reference(
        hidden.new_empty(rows, dtype=torch.float32), hidden.new_empty(rows, dtype=torch.int32)
    )
    kernels.target_logits(hidden, x.weight, None, x.targets, reference)
    options: dict[str, Any] = {}
    if store:  # tiles are written whole, also the last one of a row
        exps = hidden.new_empty(rows, -(-columns // COLUMN_STEP) * COLUMN_STEP)[:, :columns]
        options = {"exps": exps, "reference": reference}
    calls: dict[str, Callable[[], object]] = {}
    for tile in dict.fromkeys((kernels.fused_tile(hidden, weight), *tiles.CANDIDATES)):
        tops, sums = hidden.new_empty(2, -(-columns // tile.columns), rows, dtype=torch.float32)
        partials = kernels.Partials(tops, sums, hidden.new_empty(rows, dtype=torch.float32))
        calls[str(tile)] = partial(kernels.head_gemm, hidden, weight, None, x.targets, partials, tile, **options)
    return calls
