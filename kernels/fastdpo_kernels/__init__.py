"""Triton kernels of fastdpo and their launchers: no autograd, no transformers, no state.

An operation bears the name that it has in `fastdpo.ops`: `linear_logprob/`, `selective_logprob.py`, `preference_loss/`
(dynamic β in it). In go tensors that exist, outputs among them; a launcher checks their shapes and launches. What they
share: `device_math`, `rng`, `launch_checks`. Each module imports Triton itself; importing this package does not, so
that it is there on platforms without Triton too.
"""

__all__ = ["device_math", "launch_checks", "linear_logprob", "preference_loss", "rng", "selective_logprob"]
