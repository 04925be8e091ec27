"""A model's dropout: off for a pass, or for good."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from transformers import PreTrainedModel

#: Attributes under which transformers' attention and feed-forward modules keep a dropout probability of their own.
_DROPOUT_ATTRIBUTES = ("attention_dropout", "attn_dropout", "hidden_dropout", "activation_dropout", "dropout")


@contextmanager
def without_dropout(model: PreTrainedModel) -> Iterator[PreTrainedModel]:
    """`model` in eval mode, put back into the mode it was in afterwards."""
    training = model.training
    model.eval()
    try:
        yield model
    finally:
        model.train(training)


def disable_dropout(model: PreTrainedModel) -> float:
    """Switch off dropout in `nn.Dropout` modules and in modules that keep a probability of their own.

    Returns the largest probability that was switched off.
    """
    largest = 0.0
    for module in model.modules():
        names = ("p",) if isinstance(module, nn.modules.dropout._DropoutNd) else _DROPOUT_ATTRIBUTES
        for name in names:
            if isinstance(probability := getattr(module, name, None), float):
                largest = max(largest, probability)
                setattr(module, name, 0.0)
    return largest
