"""A body that holds less: MLPs in tiles of tokens, LoRA in one function with its layer, norms that keep their input."""

from fastdpo.training.body.choice import BodyChoice
from fastdpo.training.body.lean import LeanBody
from fastdpo.training.body.mlp import Tiles

__all__ = ["BodyChoice", "LeanBody", "Tiles"]
