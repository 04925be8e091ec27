"""The head's options, checked: what `linear_logprob` may be asked for beside log-probs, and how logits are scaled."""

from __future__ import annotations

import math
from collections.abc import Sequence

STATS = ("entropy", "mean_logits", "is_top1", "log_sum_sq_probs")


def check_head_options(stats: Sequence[str], *, temperature: float, logit_scale: float, softcap: float | None) -> None:
    """Raise ValueError for an option of `linear_logprob` that is unknown or out of range."""
    if unknown := sorted(set(stats) - set(STATS)):
        raise ValueError(f"stats={unknown} are unknown; choose among {', '.join(STATS)}.")
    if softcap is not None and not 0.0 < softcap < math.inf:
        raise ValueError(f"softcap={softcap} must be positive and finite, or None for no cap.")
    if not 0.0 < temperature < math.inf:
        raise ValueError(f"temperature={temperature} must be positive and finite; 1.0 leaves the logits as they are.")
    if not math.isfinite(logit_scale):
        raise ValueError(f"logit_scale={logit_scale} must be finite; 1.0 leaves the logits as they are.")
