"""The transformers model within what wraps it."""

from __future__ import annotations

from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel


def base_model(model: nn.Module) -> PreTrainedModel:
    """The transformers model, below an adapter if there is one."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def model_class(model: nn.Module) -> str:
    """The class of a model, or of the model that an adapter is on."""
    return type(base_model(model)).__name__
