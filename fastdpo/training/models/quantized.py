"""Quantised models: what they are known by, and what keeps them trainable."""

from __future__ import annotations

import importlib.util

from transformers import PreTrainedModel


def is_quantized(model: PreTrainedModel) -> bool:
    """Whether `model` was loaded in 4 or 8 bits."""
    return bool(getattr(model, "is_quantized", False) or getattr(model, "is_loaded_in_4bit", False))


def keep_quantized_layers_trainable(model: PreTrainedModel) -> int:
    """Keep bitsandbytes from repacking 4-bit weights for inference. Returns the number of 4-bit layers.

    On CPUs with AVX512-BF16 a `Linear4bit` that runs in eval mode without gradients repacks its weight in place and
    from then on uses a kernel without autograd: gradients would stop there in silence.
    """
    if importlib.util.find_spec("bitsandbytes") is None:
        return 0
    from bitsandbytes.nn import Linear4bit

    layers = [module for module in model.modules() if isinstance(module, Linear4bit)]
    for layer in layers:
        layer.support_avx512bf16_for_cpu = False
    return len(layers)
