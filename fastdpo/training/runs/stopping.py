"""How a run ends without having trained to its end just now: it was finished before, or something stops it."""

from __future__ import annotations

import logging

from transformers import TrainerState
from transformers.trainer_utils import TrainOutput

logger = logging.getLogger(__name__)


def without_a_step(state: TrainerState) -> TrainOutput:
    """What a call of `train` returns that has trained nothing: no figures, and a warning that says why."""
    finished = state.global_step >= state.max_steps
    why = "this run is finished" if finished else "a callback has stopped this run"
    logger.warning("checkpoint at step %d of %d: %s, nothing is trained.", state.global_step, state.max_steps, why)
    return TrainOutput(state.global_step, float("nan"), {})
