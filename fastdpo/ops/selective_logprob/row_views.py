"""Logits (..., V) of any strides as a few views with one or two leading dimensions, and as blocks of wanted rows."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor


def views(logits: Tensor, leading: int) -> Iterator[tuple[slice, Tensor]]:
    """Views of `logits` (..., V) with `leading` dimensions before V, and the flat rows that each of them holds.

    Leading dimensions are merged where their strides allow it, and looped over where they do not; nothing is copied.
    """
    shape = _merged(logits)
    if len(shape) <= leading:
        view = logits.view(*[1] * (leading - len(shape)), *shape, logits.shape[-1])
        yield slice(0, view.shape[:-1].numel()), view
        return
    first = 0
    for part in logits.view(*shape, logits.shape[-1]):
        for rows, view in views(part, leading):
            yield slice(first + rows.start, first + rows.stop), view
        first += part.shape[:-1].numel()


def _merged(logits: Tensor) -> list[int]:
    """The leading sizes, with neighbours multiplied where one stride serves both."""
    sizes: list[int] = []
    next_stride = 0
    for size, stride in zip(logits.shape[:-1], logits.stride()[:-1], strict=True):
        if size == 1:
            continue
        if sizes and next_stride == size * stride:
            sizes[-1] *= size
        else:
            sizes.append(size)
        next_stride = stride
    return sizes


def blocks(logits: Tensor, scored: Tensor | None, size: int) -> Iterator[tuple[slice, Tensor, bool | None]]:
    """Blocks of at most `size` rows: which flat rows, their logits (R, V), and whether they are scored.

    Args:
        scored: (N,) bool, None for all. On a CPU each block is all True or all False; elsewhere a look at the values
            would wait for the device, and blocks may be mixed (None).
    """
    for rows, matrix in views(logits, 1):
        for start, stop, wanted in _runs(None if scored is None else scored[rows], len(matrix)):
            for i in range(start, stop, size):
                j = min(i + size, stop)
                yield slice(rows.start + i, rows.start + j), matrix[i:j], wanted


def _runs(scored: Tensor | None, count: int) -> list[tuple[int, int, bool | None]]:
    """(start, stop, value) of the runs of equal values among `count` rows."""
    if scored is None or scored.device.type != "cpu":
        return [(0, count, True if scored is None else None)]
    edges = [0, *((scored[1:] != scored[:-1]).nonzero().squeeze(1) + 1).tolist(), count]
    return [(i, j, bool(scored[i])) for i, j in itertools.pairwise(edges) if j > i]


def scored_rows(targets: Tensor, ignore_index: int | None) -> Tensor | None:
    """(N,) bool, whether a row counts, for targets (...); None if all do."""
    return None if ignore_index is None else targets.reshape(-1) != ignore_index


def statistics_dtype(logits: Tensor) -> torch.dtype:
    """Of log-probs and sums: float32, or float64 for float64 logits."""
    return torch.promote_types(logits.dtype, torch.float32)
