"""`BetaOptions`: the settings of β-DPO's dynamic β and filter; each named, explained and checked once.

`fastdpo.DynamicBeta`, the oracle's `dynamic_beta`, the operators and the trainer's options build on it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from fastdpo.formulas.signatures import about

BETA_SCOPES = ("batch", "instance")
BETA_VARIANTS = ("released", "paper")


@dataclass(frozen=True)
class BetaOptions:
    """The settings of dynamic β (2407.08639). An instance is checked: ValueError for a setting that is out of range."""

    beta: float = field(default=0.1, metadata=about("β0."))
    alpha: float = field(default=0.6, metadata=about("How strongly β follows the batch's gap.", "0 keeps it fixed."))
    momentum: float = field(default=0.9, metadata=about("Momentum of the running mean and spread, in [0, 1)."))
    keep_ratio: float = field(default=0.8, metadata=about("Share of pairs the filter keeps, in (0, 1]."))
    min_beta: float = field(default=1e-3, metadata=about("Lower bound of β.", "At most `beta`."))
    scope: str = field(default="batch", metadata=about("One β per batch or per pair.", choices=BETA_SCOPES))
    variant: str = field(
        default="released", metadata=about("As the authors' code or as the paper's formulas.", choices=BETA_VARIANTS)
    )
    seed: int = field(
        default=0,
        metadata=about("Of the filter's draws.", "They depend on nothing but it, the step and the pair's index."),
    )

    def __post_init__(self) -> None:
        beta = self.beta
        if not 0.0 < beta < math.inf:
            raise ValueError(f"beta={beta} must be positive and finite; 0.1 is the usual choice.")
        if not 0.0 <= self.alpha < math.inf:
            raise ValueError(f"alpha={self.alpha} must be at least 0 and finite; 0.6 is the paper's, 0 keeps β fixed.")
        if not 0.0 <= self.momentum < 1.0:
            raise ValueError(f"momentum={self.momentum} must be in [0, 1); 0.9 is the paper's.")
        if not 0.0 < self.keep_ratio <= 1.0:
            raise ValueError(f"keep_ratio={self.keep_ratio} must be in (0, 1]; 0.8 is the paper's, 1 keeps every pair.")
        if not 0.0 < self.min_beta <= beta:
            raise ValueError(f"min_beta={self.min_beta} must be positive and at most beta={beta}; 1e-3 is the paper's.")
        if self.scope not in BETA_SCOPES:
            raise ValueError(f"scope={self.scope!r} is unknown; choose one of {', '.join(BETA_SCOPES)}.")
        if self.variant not in BETA_VARIANTS:
            raise ValueError(f"variant={self.variant!r} is unknown; choose one of {', '.join(BETA_VARIANTS)}.")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed={self.seed} must be in [0, 2**63).")
