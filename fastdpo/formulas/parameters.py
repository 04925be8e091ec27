"""The parameters that losses and f-divergences take by name: defaults, meaning and range, each stated here alone.

A loss names its own with `taking`. The loss functions, `LossOptions`, the operators and the trainer's options read the
rest from `PARAMETERS`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType


@dataclass(frozen=True)
class Parameter:
    """One number. `accepts` says which finite values it may have, and `range` says so in an error."""

    default: float
    help: str
    accepts: Callable[[float], bool] = math.isfinite
    range: str = "must be finite."

    def check(self, name: str, value: float) -> None:
        """Raise ValueError, naming the parameter, for a value that is out of range."""
        if not math.isfinite(value):
            raise ValueError(f"{name}={value} must be finite.")
        if not self.accepts(value):
            raise ValueError(f"{name}={value} {self.range}")


def _not_negative(value: float) -> bool:
    return value >= 0.0


def _share(value: float) -> bool:
    return 0.0 < value <= 1.0


PARAMETERS: dict[str, Parameter] = {
    # Above 1 the exponential half of DiscoPOP grows without bound for badly ranked pairs
    "discopop_tau": Parameter(0.05, "Temperature of DiscoPOP.", _share, "must be in (0, 1]; 0.05 is the paper's."),
    "simpo_gamma": Parameter(0.5, "Target margin γ of SimPO.", _not_negative, "must not be negative."),
    "cpo_alpha": Parameter(
        1.0, "Weight of CPO's likelihood term on the chosen answer.", _not_negative, "must not be negative."
    ),
    "f_alpha_divergence_coef": Parameter(0.5, "α of the α-divergence."),
}


def taking(*names: str) -> Mapping[str, float]:
    """These parameters with their defaults."""
    return MappingProxyType({name: PARAMETERS[name].default for name in names})
