"""Tiny models of every architecture whose body can be lean, with norms that matter, and their gradients."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable
from typing import Any

import torch
from families import MODELS, SIZES, adapted
from peft import PeftModel
from tiny import NF4
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    SmolLM3Config,
    SmolLM3ForCausalLM,
)

from fastdpo.training.body import LeanBody, Tiles
from fastdpo.training.models.dropout import disable_dropout
from fastdpo.training.models.quantized import keep_quantized_layers_trainable

ARCHITECTURES: dict[str, Callable[[], Any]] = {
    **{name: MODELS[name] for name in ("Llama", "Mistral", "Qwen3", "Gemma2", "Gemma3", "OLMo2", "Granite")},
    # Half of a head's numbers have no position
    "Phi3": lambda: Phi3ForCausalLM(Phi3Config(**SIZES, rope_parameters=PARTIAL)),
    "Qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES)),  # biases
    "SmolLM3": lambda: SmolLM3ForCausalLM(SmolLM3Config(**SIZES, no_rope_layers=[1, 0])),
}
PARTIAL = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
#: Slices of five tokens, weights one at a time; and everything at once.
SMALL, LARGE = Tiles(bytes=1, least=5, weights_at_once=False), Tiles.on_cpu()


def untouched(name: str) -> Any:
    """A model without adapters, whose norms' weights and biases are not what they start with."""
    torch.manual_seed(0)
    model = ARCHITECTURES[name]().train()
    disable_dropout(model)
    for key, parameter in model.named_parameters():
        if "norm" in key or key.endswith("bias"):
            nn.init.normal_(parameter, mean=float(parameter.detach().mean()), std=0.3)
    return model


def with_lora(name: str, *, quantized: bool = False, dtype: torch.dtype = torch.float32, **options: Any) -> PeftModel:
    """The same with a LoRA on all linear layers, in NF4 if asked for."""
    model = untouched(name).to(dtype)
    if quantized:
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=NF4, dtype=dtype).train()
        keep_quantized_layers_trainable(model)
        disable_dropout(model)
    return adapted(model, **options)


def gradients(
    model: Any, body: LeanBody | None, forward: Callable[[], Tensor] | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """Of a weighted sum of what `forward` gives (default: logits of fixed ids), and that itself."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1, 97, (2, 23), generator=generator)
    model.zero_grad()
    with contextlib.nullcontext() if body is None else body.active():
        out = model(input_ids=ids, use_cache=False).logits if forward is None else forward()
        (out.float() * torch.randn(out.shape, generator=generator)).sum().backward()
    return out.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def errors(found: tuple[Tensor, dict[str, Tensor]], expected: tuple[Tensor, dict[str, Tensor]]) -> tuple[float, float]:
    """Largest relative differences in norm, of the output and of a parameter's gradient."""
    (out, grads), (true_out, true_grads) = found, expected
    assert grads.keys() == true_grads.keys()
    assert all(float(each.norm()) > 0 for each in true_grads.values())
    return relative(out, true_out), max(relative(grads[name], true_grads[name]) for name in grads)


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())
