"""fastdpo: preference optimisation on one GPU, with exact dynamic-β DPO under a memory-frugal QLoRA trainer."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from fastdpo.version import __version__

if TYPE_CHECKING:
    from fastdpo.data import load_preferences, tokenize_preferences
    from fastdpo.loss import (
        DynamicBeta,
        FusedLinearDPOLoss,
        PreferenceOutput,
        linear_logprob,
        linear_preference_loss,
        preference_loss,
        selective_logprob,
        token_preference_loss,
    )
    from fastdpo.ops.backends import backends
    from fastdpo.training.options import FastDPOConfig
    from fastdpo.training.trainer import FastDPOTrainer

#: public name → module. Loaded on first use: the loss functions need torch only, the trainer all of transformers.
_EXPORTS = {
    "DynamicBeta": "fastdpo.loss",
    "FastDPOConfig": "fastdpo.training.options.config",
    "FastDPOTrainer": "fastdpo.training.trainer",
    "FusedLinearDPOLoss": "fastdpo.loss",
    "PreferenceOutput": "fastdpo.loss",
    "backends": "fastdpo.ops.backends",
    "linear_logprob": "fastdpo.loss",
    "linear_preference_loss": "fastdpo.loss",
    "load_preferences": "fastdpo.data",
    "preference_loss": "fastdpo.loss",
    "selective_logprob": "fastdpo.loss",
    "token_preference_loss": "fastdpo.loss",
    "tokenize_preferences": "fastdpo.data",
}

__all__ = [
    "DynamicBeta",
    "FastDPOConfig",
    "FastDPOTrainer",
    "FusedLinearDPOLoss",
    "PreferenceOutput",
    "__version__",
    "backends",
    "linear_logprob",
    "linear_preference_loss",
    "load_preferences",
    "preference_loss",
    "selective_logprob",
    "token_preference_loss",
    "tokenize_preferences",
]


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'fastdpo' has no attribute {name!r}")
    return getattr(importlib.import_module(_EXPORTS[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
