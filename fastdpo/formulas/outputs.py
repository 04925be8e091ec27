"""What the losses and dynamic β return: `PreferenceOutput`, `BetaPlan`, and the statistics in it, `BetaState`."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class PreferenceOutput(NamedTuple):
    """What `preference_loss` returns. Rewards and margins carry no gradient and cover dropped pairs too."""

    loss: Tensor  # 0-D, or (B,) with reduction="none"
    losses: Tensor  # (B,), 0 for dropped pairs
    chosen_rewards: Tensor  # (B,)
    rejected_rewards: Tensor  # (B,)
    margins: Tensor  # (B,), see `preference_gap`
    plan: BetaPlan | None = None  # where `beta` was a `DynamicBeta`


class BetaState(NamedTuple):
    """Running statistics of dynamic β: 0-D tensors. At step 0 nothing has been seen, and m0 and sigma mean nothing."""

    m0: Tensor
    sigma: Tensor
    step: Tensor  # int64


class BetaPlan(NamedTuple):
    """What dynamic β decided for a batch."""

    beta: Tensor  # 0-D, or (B,) with scope="instance"
    keep: Tensor  # (B,) bool
    mean: Tensor  # 0-D, the M0 that was used
    std: Tensor  # 0-D, the σ that was used
    state: BetaState  # to be committed with the optimizer step
