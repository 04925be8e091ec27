"""Whether an evaluation will have the metric that `metric_for_best_model` names, asked before anything is trained."""

from __future__ import annotations

from collections.abc import Iterable

from fastdpo.training.options.kinds import OptionError, seen, suggestion

#: What transformers adds to the metrics of every evaluation.
_SPEED = ("runtime", "samples_per_second", "steps_per_second")


def check_best_metric(metric: str | None, names: Iterable[str] | None, sets: Iterable[str] | None) -> None:
    """Raise OptionError for a metric that no evaluation has.

    names: of the objective's metrics; None where it does not say. sets: names of the data sets evaluated on, each with
    metrics of its own; None for one without a name.
    """
    if metric is None or names is None:
        return
    prefixes = [""] if sets is None else [f"{each}_" for each in sets]
    known = [f"{prefix}{name}" for prefix in prefixes for name in names]
    speed = [f"{prefix}{name}" for prefix in prefixes for name in _SPEED]
    if metric.removeprefix("eval_") not in (*known, *speed):
        near = suggestion(metric.removeprefix("eval_"), known)
        raise OptionError(
            f"metric_for_best_model={seen(metric)} is no metric of the evaluation, which has {', '.join(known)}.{near}"
        )
