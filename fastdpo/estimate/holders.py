"""Who holds memory at the fullest moment of a step: what was made where, in bytes per token and beside that.

The place whose moment it is follows from the counts of a long row; what is alive there is looked up in two short rows
of shallow models, and lies on a line over tokens and over layers.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import torch

from fastdpo.estimate.activations import micro_batch, site_bytes
from fastdpo.estimate.counter import SHALLOW, ConfigCounter
from fastdpo.estimate.rows import Row
from fastdpo.estimate.sites import Holding, Site
from fastdpo.estimate.skeleton import Skeleton
from fastdpo.training.memory.arena import ON_DEVICE


@dataclass(frozen=True)
class Holder:
    """Storages of one kind. shape: T, N, K for the row's tokens, those scored, and the keys that attention gathers; ""
    for what an operator takes within itself. per_token, constant: bytes."""

    site: Site
    shape: str
    dtype: str
    per_token: float
    constant: float


def holders(counter: ConfigCounter, row: Row, *, offload: bool = False) -> tuple[Site, list[Holder]]:
    """The place at which a training micro-batch takes most, and who holds memory there, the largest first. offload:
    layer inputs but those of two layers are on the host."""
    peaks = counter.sites(row).training
    place = max(peaks, key=lambda site: peaks[site] + counter.head.bytes(row.scored, site.operator))
    depth = min(ON_DEVICE, counter.layers) if offload else counter.layers
    short, long = (
        [_held(counter, skeleton, each, place) for skeleton in counter.skeletons]
        for each in counter.form(row.shape).rows[:2]
    )
    first, second = counter.form(row.shape).rows[:2]
    found = []
    for key in set().union(*short, *long):
        few, many = (_at_depth([held[key] for held in each], depth) for each in (short, long))
        slope = (many - few) / (second.tokens - first.tokens)
        found.append(Holder(*key, slope, few - slope * first.tokens))
    return place, sorted(found, key=lambda each: (-each.per_token, -each.constant))


def _at_depth(counts: list[int], depth: int) -> int:
    return counts[0] if len(counts) == 1 else counts[0] + (depth - SHALLOW[0]) * (counts[1] - counts[0])


def _held(counter: ConfigCounter, skeleton: Skeleton, row: Row, place: Site) -> Counter[tuple[Site, str, str]]:
    """Bytes by place, shape and dtype."""
    with (
        micro_batch(skeleton.model, row, **counter.options(skeleton)) as forward,
        site_bytes(skeleton.model, snapshot_at=place) as counted,
    ):
        forward().sum().backward()
    found: Counter[tuple[Site, str, str]] = Counter()
    for each in counted.holdings:
        found[each.site, _shape(each, row), _dtype(each.dtype)] += each.bytes
    return found


def _shape(holding: Holding, row: Row) -> str:
    names = {row.tokens: "T", row.scored: "N", 2 * row.tokens - row.scored: "K"}
    return "" if holding.shape is None else " x ".join(str(names.get(size, size)) for size in holding.shape)


def _dtype(dtype: torch.dtype | None) -> str:
    return "workspace" if dtype is None else str(dtype).removeprefix("torch.")
