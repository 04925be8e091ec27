"""The loss functions as users call them: they take hidden states, logits or log-probs, and choose a backend.

Torch and Triton are all they need. The options of the losses are `LossOptions`, by keyword or together.
"""

from fastdpo.formulas import BetaPlan, BetaState, LossOptions, PreferenceOutput
from fastdpo.loss.dynamic_beta import DynamicBeta
from fastdpo.loss.linear_preference import LinearPreferenceOutput, linear_preference_loss
from fastdpo.loss.logprobs import linear_logprob, selective_logprob
from fastdpo.loss.modules import FusedLinearDPOLoss
from fastdpo.loss.preference import preference_loss, token_preference_loss

__all__ = [
    "BetaPlan",
    "BetaState",
    "DynamicBeta",
    "FusedLinearDPOLoss",
    "LinearPreferenceOutput",
    "LossOptions",
    "PreferenceOutput",
    "linear_logprob",
    "linear_preference_loss",
    "preference_loss",
    "selective_logprob",
    "token_preference_loss",
]
