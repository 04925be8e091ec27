"""Time over rows and over the vocabulary: a straight line, beside that of the bare GEMMs."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks import cases, contenders
from benchmarks.cases import HeadCase
from benchmarks.report import Figure
from benchmarks.settings import Settings
from benchmarks.timing import interleave, synchronizer

TITLE = "scaling: policy forward + backward and reference forward, least-squares line through the times"
#: A point of the sweep takes at most this part of a case's seconds, as there are many.
BUDGET_SHARE = 0.25


@dataclass(frozen=True)
class Sweep:
    """Times in milliseconds over one field of `HeadCase`."""

    axis: str
    fixed: str
    at: list[int]
    ours: list[float]
    floor: list[float]


@dataclass(frozen=True)
class Line:
    """y = intercept + slope·x, with R² and the largest |y − line|/line."""

    intercept: float
    slope: float
    r_squared: float
    largest_deviation: float


def fit(x: Sequence[float], y: Sequence[float]) -> Line:
    slope, intercept = statistics.linear_regression(x, y)
    line = [intercept + slope * at for at in x]
    mean = statistics.fmean(y)
    residual = sum((a - b) ** 2 for a, b in zip(y, line, strict=True))
    total = sum((a - mean) ** 2 for a in y)
    deviation = max(abs(a - b) / abs(b) for a, b in zip(y, line, strict=True))
    return Line(intercept, slope, 1.0 - residual / total, deviation)


def run(settings: Settings) -> list[Figure]:
    rows = cases.TINY_ROW_SCALING if settings.tiny else cases.ROW_SCALING
    vocab = cases.TINY_VOCAB_SCALING if settings.tiny else cases.VOCAB_SCALING
    sweeps = [
        _sweep("rows", f"H = {rows[0].hidden}, V = {rows[0].vocab:,}", rows, settings),
        _sweep("vocab", f"{vocab[0].rows:,} rows, H = {vocab[0].hidden}", vocab, settings),
    ]
    if settings.plot is not None:
        plot(sweeps, settings.plot)
    return [figure for sweep in sweeps for figure in _figures(sweep)]


def _sweep(axis: str, fixed: str, swept: Sequence[HeadCase], settings: Settings) -> Sweep:
    sweep = Sweep(axis, fixed, [getattr(case, axis) for case in swept], [], [])
    for case in swept:
        inputs = cases.head_inputs(case, settings.dtype)
        timings = interleave(
            contenders.against_floor(inputs),
            settings.repeats,
            BUDGET_SHARE * settings.budget,
            synchronizer(inputs.hidden.device),
        )
        sweep.ours.append(1e3 * timings["fastdpo"].best)
        sweep.floor.append(1e3 * timings["floor"].best)
    return sweep


def _figures(sweep: Sweep) -> list[Figure]:
    case = f"over {sweep.axis}, {sweep.fixed}"
    figures = [
        Figure(case, f"at {at:,}", ours, "ms", "3 bare GEMMs", floor, ours / floor)
        for at, ours, floor in zip(sweep.at, sweep.ours, sweep.floor, strict=True)
    ]
    ours, floor = fit(sweep.at, sweep.ours), fit(sweep.at, sweep.floor)
    note = f"{ours.intercept:.1f} ms + {1e3 * ours.slope:.3f} µs each"
    return [
        *figures,
        Figure(case, "R² of the line", ours.r_squared, "", "of the GEMMs'", floor.r_squared, note=note),
        Figure(
            case, "largest deviation", 100 * ours.largest_deviation, "%", "of the GEMMs'", 100 * floor.largest_deviation
        ),
    ]


def plot(sweeps: Sequence[Sweep], path: Path) -> None:
    """A panel per sweep: times, their line, and the bare GEMMs."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, len(sweeps), figsize=(4.6 * len(sweeps), 3.4), layout="constrained")
    for panel, sweep in zip(panels, sweeps, strict=True):
        line = fit(sweep.at, sweep.ours)
        ends = [0, max(sweep.at)]
        panel.plot(ends, [(line.intercept + line.slope * x) / 1e3 for x in ends], color="tab:blue", linewidth=1)
        panel.plot(
            sweep.at, [t / 1e3 for t in sweep.ours], "o", color="tab:blue", label=f"fastdpo (R² = {line.r_squared:.5f})"
        )
        panel.plot(sweep.at, [t / 1e3 for t in sweep.floor], "x", color="tab:orange", label="three bare GEMMs")
        panel.set(xlabel=sweep.axis, ylabel="seconds", title=sweep.fixed, xlim=0, ylim=0)
        panel.legend(frameon=False)
        panel.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
