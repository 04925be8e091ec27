"""Options that the sections share."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.report import Target


@dataclass(frozen=True)
class Settings:
    """See the command's --help."""

    threads: int = 2
    repeats: int = 5
    budget: float = 10.0
    dtype: torch.dtype = torch.float32
    full: bool = False
    tiny: bool = False
    plot: Path | None = None
    plans: tuple[str, ...] = ()
    steps: int = 3
    rounds: int = 1
    outcomes: Path | None = None
    against: Path | None = None

    def target(self, target: Target | None) -> Target | None:
        """Targets hold for float32 and real shapes."""
        return None if self.tiny or self.dtype != torch.float32 else target
