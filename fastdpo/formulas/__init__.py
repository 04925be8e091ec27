"""The ground floor: the table of losses, their options, what they return, and (in `oracle`) every operation as written.

It imports torch and nothing of fastdpo above it.
"""

from fastdpo.formulas.beta_options import BETA_SCOPES, BETA_VARIANTS, BetaOptions
from fastdpo.formulas.losses import F_DIVERGENCES, LOSSES, Loss, LossTerm
from fastdpo.formulas.options import LossOptions
from fastdpo.formulas.outputs import BetaPlan, BetaState, PreferenceOutput
from fastdpo.formulas.parameters import PARAMETERS, Parameter

__all__ = [
    "BETA_SCOPES",
    "BETA_VARIANTS",
    "F_DIVERGENCES",
    "LOSSES",
    "PARAMETERS",
    "BetaOptions",
    "BetaPlan",
    "BetaState",
    "Loss",
    "LossOptions",
    "LossTerm",
    "Parameter",
    "PreferenceOutput",
]
