"""The oracle: every operation of fastdpo in eager PyTorch, in any floating dtype, written like its formula.

No chunking, no kernels, differentiable by autograd. 16-bit inputs are computed in float32; float64 stays float64.
`logprobs`: from logits or hidden states. `losses`: from sequence log-probs. `planning`: dynamic β from margins.
"""

from fastdpo.formulas.oracle.logprobs import (
    completion_logps,
    completion_weights,
    distribution_statistics,
    linear_logprob,
    selective_logprob,
)
from fastdpo.formulas.oracle.losses import preference_gap, preference_loss
from fastdpo.formulas.oracle.planning import dynamic_beta, gumbel_top_k
from fastdpo.formulas.outputs import BetaPlan, BetaState, PreferenceOutput

__all__ = [
    "BetaPlan",
    "BetaState",
    "PreferenceOutput",
    "completion_logps",
    "completion_weights",
    "distribution_statistics",
    "dynamic_beta",
    "gumbel_top_k",
    "linear_logprob",
    "preference_gap",
    "preference_loss",
    "selective_logprob",
]
