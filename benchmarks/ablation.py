"""What each part of the training step contributes: they are switched on one after the other, on the same pairs."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

from benchmarks.report import Figure
from benchmarks.settings import Settings
from benchmarks.training import GIB, Bench, chosen, training_case
from benchmarks.training_run import Contender

TITLE = "ablation: seconds per step and growth of memory as parts are added (workload of the training section)"


@dataclass(frozen=True)
class Stage:
    """Attributes:
    contender: what runs.
    after: the stage it is compared with.
    cached: an earlier run over the same pairs has filled the reference cache.
    """

    contender: Contender
    after: str | None = None
    cached: bool = False


_OFF = {"prefix_sharing": "off", "packing": "off", "gradient_checkpointing": "true", "reference": "online"}
_SHARED = _OFF | {"prefix_sharing": "on"}
_PACKED = _SHARED | {"packing": "on"}
_KEPT = _PACKED | {"gradient_checkpointing": "false"}
_BETA = _KEPT | {"dynamic_beta": True}

STAGES = {
    "scored rows only": Stage(Contender("fastdpo", _OFF)),
    "+ prefix sharing, dense mask": Stage(Contender("fastdpo", _SHARED, dense_mask=True), "scored rows only"),
    "+ segment attention": Stage(Contender("fastdpo", _SHARED), "+ prefix sharing, dense mask"),
    "+ packing": Stage(Contender("fastdpo", _PACKED), "+ segment attention"),
    "+ no checkpointing": Stage(Contender("fastdpo", _KEPT), "+ packing"),
    "+ references kept": Stage(Contender("fastdpo", _KEPT | {"reference": "lazy"}), "+ no checkpointing", cached=True),
    "beta-DPO, every pair": Stage(Contender("fastdpo", _BETA | {"keep_ratio": 1.0}), "+ no checkpointing"),
    "beta-DPO, filter": Stage(Contender("fastdpo", _BETA), "beta-DPO, every pair"),
}


def run(settings: Settings) -> list[Figure]:
    names = chosen(settings.plans, tuple(STAGES))
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(training_case(settings), settings, Path(folder))
        for _ in range(settings.rounds):
            for name in names:
                contender = STAGES[name].contender
                bench.run(name, bench.filled(contender) if STAGES[name].cached else contender)
            bench.round += 1
        return [figure for name in names for figure in _figures(name, bench)]


def _figures(name: str, bench: Bench) -> list[Figure]:
    after = STAGES[name].after
    if after is None or after not in bench.outcomes:
        return [
            Figure(name, "step", bench.seconds(name), "s"),
            Figure(name, "growth of memory", bench.growth(name) / GIB, "GiB"),
        ]
    ours, before = bench.seconds(name), bench.seconds(after)
    growth, growth_before = bench.growth(name) / GIB, bench.growth(after) / GIB
    return [
        Figure(name, "step", ours, "s", after, before, before / ours),
        Figure(name, "growth of memory", growth, "GiB", after, growth_before, growth / growth_before),
    ]
