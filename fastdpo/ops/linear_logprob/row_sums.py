"""From what a fold accumulated over the vocabulary to log-probs and statistics, for every backend alike.

With m the peak that exponentials refer to, y the target and e_y = exp(z_y − m):
log p_y = −log(1 + Σ_v≠y exp(z_v − m)/e_y). The target is kept out of the sum, so that neither log p_y nor 1 − p_y of a
confident row is the difference of two numbers that are nearly equal.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class RowSums(NamedTuple):
    """Sums over the vocabulary of R rows, (R,) each; None where no statistic asked for them."""

    peak: Tensor
    others: Tensor  # Σ_v≠y exp(z_v − peak)
    target_logit: Tensor  # z_y; NaN where the target is outside the vocabulary
    weighted: Tensor | None = None  # Σ_v≠y exp(z_v − peak)·(z_v − peak)
    logits: Tensor | None = None  # Σ_v z_v
    squares: Tensor | None = None  # Σ_v≠y exp(2(z_v − peak))
    top_index: Tensor | None = None  # int64, the first maximum

    def at_target(self) -> Tensor:
        """exp(z_y − peak)."""
        return torch.exp(self.target_logit - self.peak)

    def total(self) -> Tensor:
        """Σ_v exp(z_v − peak)."""
        return self.others + self.at_target()

    def log_normalizers(self) -> Tensor:
        """log Σ_v exp(z_v)."""
        return self.peak + self.total().log()

    def logps(self) -> Tensor:
        """log p_y, at most 0."""
        at_target = self.at_target()
        likely = at_target > self.others
        odds = self.others / torch.where(likely, at_target, 1.0)
        return torch.where(likely, -torch.log1p(odds), (self.target_logit - self.peak) - self.total().log())

    def one_minus_p(self) -> Tensor:
        """1 − p_y."""
        return self.others / self.total()

    def statistic(self, name: str, targets: Tensor, vocab_size: int) -> Tensor:
        """One of `fastdpo.formulas.head_options.STATS`, as floats. Raises ValueError if its sum was not kept."""
        kept = {
            "entropy": self.weighted,
            "mean_logits": self.logits,
            "is_top1": self.top_index,
            "log_sum_sq_probs": self.squares,
        }[name]
        if kept is None:
            raise ValueError(f"{name} was not asked for when the rows were folded.")
        if name == "entropy":
            target = torch.where(self.at_target() > 0.0, self.at_target() * (self.target_logit - self.peak), 0.0)
            return self.total().log() - (kept + target) / self.total()
        if name == "mean_logits":
            return kept / vocab_size
        if name == "is_top1":
            return kept.eq(targets).to(self.peak.dtype)
        return (kept + self.at_target() ** 2).log() - 2.0 * self.total().log()
