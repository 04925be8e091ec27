"""A loss or gradient that is not finite stops the run, with the batch on record and the last checkpoint intact."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, NoReturn

from torch import Tensor

from fastdpo.training.ranks import Ranks
from fastdpo.training.runs.folder import RunFolder

NONFINITE_FILE = "nonfinite_batch.json"


class NonFiniteLossError(FloatingPointError):
    """The loss or a gradient is not finite. The batch's example ids are saved; no optimizer step was taken on it."""


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
        "scores": {name: [repr(value) for value in values.tolist()] for name, values in scores.items()},
    }
    where, newest = f"The batch's example ids are {', '.join(report['example_ids'])}.", None
    if folder.list is not None:  # on the rank that writes, while it trains
        path, newest = folder.put(NONFINITE_FILE, json.dumps(report, indent=1).encode()), folder.newest()
        where = f"The batch's example ids and scores are in {path}."
    where, newest = ranks.of_first((where, newest))
    last = f"The last checkpoint, {newest}, is intact." if newest else "No checkpoint had been saved yet."
    raise NonFiniteLossError(
        f"step {step}: loss {loss}, gradient norm {grad_norm}. {where} {last} Look at those examples, lower "
        "learning_rate, or use bf16 instead of fp16."
    )
