"""The range of targets, checked where that is free."""

from __future__ import annotations

import os

from torch import Tensor

#: Set to 1 to check targets on a GPU too, which waits for the device.
ENVIRONMENT = "FASTDPO_CHECK_TARGETS"


def check_targets(targets: Tensor, vocab_size: int, ignore_index: int | None) -> None:
    """Raise ValueError for a target outside [0, vocab_size) that is not `ignore_index`.

    Always on a CPU; on a GPU only if FASTDPO_CHECK_TARGETS=1. Unchecked, such a row reads nothing and becomes NaN.
    """
    if targets.device.type != "cpu" and os.environ.get(ENVIRONMENT) != "1":
        return
    wrong = (targets < 0) | (targets >= vocab_size)
    if ignore_index is not None:
        wrong &= targets != ignore_index
    if wrong.any():
        values = targets[wrong]
        raise ValueError(
            f"targets has {values.numel()} values outside [0, {vocab_size}), the first is {int(values[0])}; "
            f"only ignore_index={ignore_index} may be outside. Do the tokenizer and the head's weight belong together?"
        )
