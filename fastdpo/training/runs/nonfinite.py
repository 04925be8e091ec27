"""A loss or gradient that is not finite stops the run, with the batch on record and the last checkpoint intact."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import NoReturn

from torch import Tensor

from fastdpo.training.options import FastDPOConfig
from fastdpo.training.ranks import Ranks
from fastdpo.training.runs.checkpoint import checkpoints

NONFINITE_FILE = "nonfinite_batch.json"


class NonFiniteLossError(FloatingPointError):
    """The loss or a gradient is not finite. The batch's example ids are saved; no optimizer step was taken on it."""


def stop_on_nonfinite(
    args: FastDPOConfig,
    ranks: Ranks,
    step: int,
    loss: float,
    grad_norm: float,
    scores: Mapping[str, Tensor],
    example_ids: list[str],
) -> NoReturn:
    """Save example ids and scores of the global batch (`scores`: all ranks', by name; `example_ids`: this rank's) and
    raise NonFiniteLossError."""
    path = Path(args.output_dir) / NONFINITE_FILE
    report = {
        "step": step,
        "loss": repr(loss),
        "grad_norm": repr(grad_norm),
        "example_ids": [example for rank in ranks.gathered_objects(example_ids) for example in rank],
        "scores": {name: [repr(value) for value in values.tolist()] for name, values in scores.items()},
    }
    if args.should_save:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(report, indent=1), encoding="utf-8")
    found = checkpoints(args.output_dir)
    last = f"The last checkpoint, {found[-1]}, is intact." if found else "No checkpoint had been saved yet."
    raise NonFiniteLossError(
        f"step {step}: loss {loss}, gradient norm {grad_norm}. The batch's example ids and scores are in {path}. "
        f"{last} Look at those examples, lower learning_rate, or use bf16 instead of fp16."
    )
