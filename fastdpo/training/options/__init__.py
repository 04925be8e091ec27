"""The options of a run, from flags, YAML or Python."""

from fastdpo.training.options.config import FastDPOConfig
from fastdpo.training.options.model_config import DataConfig, ModelConfig

__all__ = ["DataConfig", "FastDPOConfig", "ModelConfig"]
