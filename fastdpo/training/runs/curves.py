"""The run's curves as a picture: loss, β with M0 and σ, the kept share, and the reward accuracy."""

from __future__ import annotations

import importlib.util
import logging
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

_PANELS: tuple[tuple[str, tuple[tuple[str, str], ...]], ...] = (
    ("loss", (("loss", "training"), ("eval_loss", "evaluation"))),
    ("dynamic β", (("beta/value", "β"),)),
    ("share of pairs kept", (("beta/kept", "kept"),)),
    ("reward accuracy", (("rewards/accuracies", "training"), ("eval_rewards/accuracies", "evaluation"))),
)
_STATISTICS = (("beta/m0", "M0"), ("beta/sigma", "σ"))


def plot_curves(history: list[dict[str, Any]], path: Path) -> bool:
    """Draw `history` (the trainer's log) into the PNG `path`; False where there is nothing to draw or, with a
    warning, where matplotlib is missing."""
    if importlib.util.find_spec("matplotlib") is None:
        logger.warning("no %s: matplotlib is missing (pip install fastdpo[demo])", path.name)
        return False
    from matplotlib.figure import Figure

    panels = [(title, lines) for title, lines in _PANELS if any(_series(history, key)[0] for key, _ in lines)]
    if not panels:
        return False
    figure = Figure(figsize=(9, 2.6 * ((len(panels) + 1) // 2)), layout="constrained")
    axes = figure.subplots((len(panels) + 1) // 2, 2, squeeze=False).flatten()
    for axis, (title, lines) in zip(axes, panels, strict=False):
        for key, label in lines:
            steps, values = _series(history, key)
            if steps:
                axis.plot(steps, values, marker=".", label=label)
        axis.set_title(title)
        axis.set_xlabel("step")
        if title == "dynamic β":
            _plot_statistics(axis, history)
        if len(lines) > 1 or title == "dynamic β":
            axis.legend(fontsize="small")
    for axis in axes[len(panels) :]:
        axis.set_visible(False)
    figure.savefig(path, dpi=120)
    return True


def _plot_statistics(axis: Any, history: list[dict[str, Any]]) -> None:
    """M0 and σ live on another scale than β: a second axis, its lines listed in the first one's legend."""
    twin = axis.twinx()
    for (key, label), style in zip(_STATISTICS, ("--", ":"), strict=True):
        steps, values = _series(history, key)
        twin.plot(steps, values, style, color="gray")
        axis.plot([], [], style, color="gray", label=f"{label} (right)")


def _series(history: list[dict[str, Any]], key: str) -> tuple[list[int], list[float]]:
    points = [(entry["step"], entry[key]) for entry in history if key in entry]
    return [step for step, _ in points], [value for _, value in points]
