"""Triton kernels of fastdpo and their launchers: no autograd, no transformers, no state.

Each submodule is one operation and imports Triton itself; importing this package does not, so that it is there on
platforms without Triton too.
"""

__all__ = [
    "device_math",
    "dynamic_beta",
    "launch_checks",
    "linear_logprob",
    "loss_formulas",
    "preference_loss",
    "rng",
    "selective_logprob",
    "sequence_logps",
]
