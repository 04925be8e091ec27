"""What is known of a batch of examples: log-probs of their completions under policy and reference, in one table."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Scores:
    """B examples with K completions each, completions first; detached or not, as their maker says.

    logps: (K, B), log-probs of the completions under the policy: sums over tokens, weighted as the objective weights
        them. ref_logps: (K, B), the same under the reference; 0 where it is not needed.
    sums: (K, B), the policy's unweighted.
    lengths: (K, B), completion tokens.
    statistics: (S, K, B), sums over a completion's tokens of the S statistics of the head that the objective asks for.
    """

    logps: Tensor
    ref_logps: Tensor
    sums: Tensor
    lengths: Tensor
    statistics: Tensor

    @classmethod
    def zeros(cls, lengths: Tensor, statistics: int = 0) -> Scores:
        """Scores of nothing yet, but of known lengths (K, B)."""
        logps, ref_logps, sums = (torch.zeros_like(lengths) for _ in range(3))
        return cls(logps, ref_logps, sums, lengths, lengths.new_zeros(statistics, *lengths.shape))

    def __len__(self) -> int:
        return self.logps.shape[1]

    def at(self, indices: Tensor) -> Scores:
        """A copy of the scores of the examples at `indices` (P,)."""
        return Scores.unstack(self.stack()[indices], len(self.logps))

    def stack(self) -> Tensor:
        """(B, (4 + S)·K), for collectives and for evaluation's gather."""
        return torch.cat([self.logps, self.ref_logps, self.sums, self.lengths, *self.statistics]).T

    @classmethod
    def unstack(cls, table: Tensor, completions: int) -> Scores:
        """The inverse of `stack`, for K completions."""
        fields = table.T.unflatten(0, (-1, completions))
        logps, ref_logps, sums, lengths = fields[:4].unbind()
        return cls(logps, ref_logps, sums, lengths, fields[4:])
