"""Numbers that are not finite stop the run, with the examples or the weight named and the last checkpoint intact."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from fastdpo.shown import listed
from fastdpo.training.models.finite import nonfinite, trained_weights
from fastdpo.training.ranks import Ranks
from fastdpo.training.runs.folder import RunFolder

logger = logging.getLogger(__name__)

NONFINITE_FILE = "nonfinite_batch.json"
#: Examples of an evaluation that are named.
_NAMED = 20
#: So many steps without one that the loss scaler lets pass: it has halved 65,536 down to 2^-24 by then.
_SKIPPED = 40


class NonFiniteLossError(FloatingPointError):
    """The loss or a gradient is not finite. The batch's example ids are saved; no optimizer step was taken on it.

    Of an evaluation: a loss or a score.
    """


class NonFiniteWeightsError(NonFiniteLossError):
    """A trained weight is not finite, and was not saved."""


def stop_on_nonfinite(
    folder: RunFolder,
    ranks: Ranks,
    step: int,
    loss: float,
    grad_norm: float,
    scores: Mapping[str, Tensor],
    example_ids: list[str],
) -> NoReturn:
    """Save example ids and scores of the global batch (`scores`: all ranks', by name; `example_ids`: this rank's) in
    `folder` and raise NonFiniteLossError."""
    report: dict[str, Any] = {
        "step": step,
        "loss": repr(loss),
        "grad_norm": repr(grad_norm),
        "example_ids": [example for rank in ranks.gathered_objects(example_ids) for example in rank],
        "scores": _as_text(scores),
    }
    recorded = _record(folder, ranks, report, "The batch's example ids and scores")
    where = recorded or f"The batch's example ids are {listed(report['example_ids'], len(report['example_ids']))}."
    raise NonFiniteLossError(
        f"step {step}: loss {loss}, gradient norm {grad_norm}. {where} Look at those examples, lower "
        "learning_rate, or use bf16 instead of fp16."
    )


@dataclass(frozen=True)
class Evaluated:
    """name: of the data set. loss: over all examples. scores: (N,) each, by name. losses: (N,), where there are such.
    example_ids: all N."""

    name: str
    loss: float
    scores: Mapping[str, Tensor]
    losses: Tensor | None
    example_ids: Sequence[str]

    def bad(self) -> list[int]:
        """Rows whose scores are not finite; without any, those whose loss is not."""
        bad = torch.stack([~values.isfinite() for values in self.scores.values()]).any(dim=0)
        if not bad.any() and self.losses is not None and self.losses.shape == bad.shape:
            bad = ~self.losses.isfinite()
        return bad.nonzero().flatten().tolist()


def require_finite(evaluated: Evaluated, folder: RunFolder, ranks: Ranks, step: int, *, only_warn: bool) -> None:
    """As `stop_on_nonfinite` where a score or the loss of an evaluation is not finite. All ranks call it with the same.

    only_warn: of a prediction, which returns the scores.
    """
    rows = evaluated.bad()
    if not rows and math.isfinite(evaluated.loss):
        return
    ids = [evaluated.example_ids[row] for row in rows]
    if only_warn:
        logger.warning("%s: %d examples are not finite: %s", evaluated.name, len(ids), listed(ids, _NAMED))
        return
    report = {
        "step": step,
        "data set": evaluated.name,
        "loss": repr(evaluated.loss),
        "examples": len(ids),
        "example_ids": ids[:_NAMED],
        "scores": _as_text({name: values[rows[:_NAMED]] for name, values in evaluated.scores.items()}),
    }
    recorded = _record(folder, ranks, report, "Their scores")
    who = f"{len(ids)} examples are not finite: {listed(ids, _NAMED)}." if ids else "Each example alone is finite."
    raise NonFiniteLossError(
        f"step {step}: the evaluation of {evaluated.name} has the loss {evaluated.loss}. "
        f"{' '.join(filter(None, (who, recorded)))} Look at those examples and at the weights that their tokens read, "
        "or lower learning_rate if they were finite before."
    )


def refuse_nonfinite_weights(model: nn.Module, ranks: Ranks | None, folder: RunFolder, step: int) -> None:
    """Raise NonFiniteWeightsError where a trained weight is not finite, before anything of it is saved. ranks: of a
    run whose ranks call this together; None for this process's own weights alone."""
    own = nonfinite(trained_weights(model))
    found = sorted({name for names in (ranks.gathered_objects(own) if ranks else [own]) for name in names})
    if found:
        newest = ranks.of_first(folder.newest()) if ranks else folder.newest()
        before = f"Continue from {newest}, which is intact," if newest else "No checkpoint had been saved: start again"
        raise NonFiniteWeightsError(
            f"after step {step}: {len(found)} trained weights are not finite, {found[0]!r} first. They are not saved. "
            f"{before} with a lower learning_rate or max_grad_norm."
        )


class SkippedSteps:
    """Counts the optimizer steps that fp16's loss scaler skips, as gradients overflow at its scale."""

    def __init__(self) -> None:
        self.taken = self.skipped = self.in_a_row = 0

    def count(self, skipped: bool) -> None:
        """One step. Raises NonFiniteLossError where the scaler cannot find a scale any more."""
        self.skipped += skipped
        self.taken += not skipped
        self.in_a_row = self.in_a_row + 1 if skipped else 0
        if self.in_a_row >= _SKIPPED:
            self._stop(f"{self.in_a_row} steps in a row")

    def finish(self) -> None:
        """At the end of a call of `train`. Raises NonFiniteLossError where every step was skipped."""
        if self.skipped and not self.taken:
            self._stop(f"all {self.skipped} steps")

    def _stop(self, which: str) -> NoReturn:
        raise NonFiniteLossError(
            f"fp16: {which} were skipped, as gradients were not finite at any loss scale that was tried: nothing was "
            "trained in them. Use bf16, or train more steps where there were only a few."
        )


def _as_text(scores: Mapping[str, Tensor]) -> dict[str, list[str]]:
    return {name: [repr(value) for value in values.tolist()] for name, values in scores.items()}


def _record(folder: RunFolder, ranks: Ranks, report: Mapping[str, Any], what: str) -> str:
    """Where the report is, and which checkpoint is intact; empty where no folder is this run's."""
    said = ""
    if folder.list is not None:  # on the rank that writes, once it trains
        path = folder.put(NONFINITE_FILE, json.dumps(report, indent=1, allow_nan=False).encode())
        newest = folder.newest()
        last = f"The last checkpoint, {newest}, is intact." if newest else "No checkpoint had been saved yet."
        said = f"{what} are in {path}. {last}"
    return ranks.of_first(said)
