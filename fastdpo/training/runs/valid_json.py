"""Valid JSON for whatever a run writes: it has no NaN and no infinity, which Python's writer writes all the same."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from typing import Any


def valid_json(value: Any, **style: Any) -> str:
    """`value` as text; null for a figure that is no finite number. style: of `json.dumps`."""
    return json.dumps(replaced(value, lambda _: None), allow_nan=False, **style)


def replaced(value: Any, by: Callable[[float], Any]) -> Any:
    """`value`, of plain types, with `by` of each number in it that is not finite in that one's place."""
    if isinstance(value, Mapping):
        return {key: replaced(each, by) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [replaced(each, by) for each in value]
    value = value.item() if hasattr(value, "item") else value  # of NumPy or torch
    return by(value) if isinstance(value, float) and not math.isfinite(value) else value
