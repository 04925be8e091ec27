"""What a run optimises: `Objective` is what a step asks for, `PreferenceObjective` is DPO and its family."""

from fastdpo.training.objectives.objective import Coefficients, Objective, Plan
from fastdpo.training.objectives.preference import PairScores, PreferenceObjective, refuse_unread_options

__all__ = ["Coefficients", "Objective", "PairScores", "Plan", "PreferenceObjective", "refuse_unread_options"]
