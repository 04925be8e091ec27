"""Pairs for rows that hold several sequences."""

from __future__ import annotations

import tiny

from fastdpo.training.rows import Layout, TokenBatch

LAYOUTS = [
    Layout(sharing=True, packing=True),
    Layout(sharing=True),
    Layout(packing=True),
    Layout(sharing=True, packing=True, masked=True),
    Layout(sharing=True, masked=True),
]


def pairs_of(*triples: tuple[list[int], list[int], list[int]]) -> TokenBatch:
    return tiny.batch_of(*triples)
