"""A frozen linear layer with its LoRA, as the lean body computes it: what there is, and why a layer is left to peft.

    y = x Wᵀ + b + Σ_i s_i (x A_iᵀ) B_iᵀ        x (N, I), W (O, I), A (R, I), B (O, R)

W is read from the layer at every use, where a 4-bit weight is dequantised (`weight_of`). Which adapters act is asked at
every call, as peft switches them off for the reference.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from fastdpo.training.body.labels import NF4, part

#: Modules of a layer whose hooks the lean body would pass by.
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
#: Of peft: LoRA around a linear layer, in full precision or 4 bits, by class and its module.
_LORA_LAYERS = {("Linear", "peft.tuners.lora.layer"), ("Linear4bit", "peft.tuners.lora.bnb")}


@dataclass(frozen=True)
class Adapter:
    """a (R, I), b (O, R), and the factor of their product."""

    a: Tensor
    b: Tensor
    scaling: float


@dataclass(frozen=True)
class Projection:
    """A linear layer, `torch.nn.Linear` or bitsandbytes' `Linear4bit`, and the adapters that act on it now."""

    layer: Any
    adapters: tuple[Adapter, ...]

    @property
    def bias(self) -> Tensor | None:
        bias: Tensor | None = self.layer.bias
        return bias

    @property
    def in_features(self) -> int:
        return int(self.layer.in_features)

    @property
    def out_features(self) -> int:
        return int(self.layer.out_features)


def read(module: Any) -> Projection:
    """`module`, served (`obstacle`), as it acts now."""
    if not isinstance(module, LoraLayer):
        return Projection(module, ())
    names = () if module.disable_adapters else module.active_adapters
    adapters = tuple(
        Adapter(module.lora_A[name].weight, module.lora_B[name].weight, module.scaling[name])
        for name in names
        if name in module.lora_A
    )
    return Projection(module.base_layer, adapters)


def is_4bit(layer: Any) -> bool:
    """Whether a layer is bitsandbytes' 4-bit one, without importing bitsandbytes."""
    return type(layer).__name__ == "Linear4bit" and type(layer).__module__.startswith("bitsandbytes")


def obstacle(module: Any) -> str:
    """Why a linear layer is left as it is, or ""."""
    layer = module
    if reason := replaced(module):
        return reason
    if isinstance(module, LoraLayer):
        if (type(module).__name__, type(module).__module__) not in _LORA_LAYERS:
            return f"its LoRA is a {type(module).__module__}.{type(module).__name__}"
        if reason := _adapter_obstacle(module):
            return reason
        layer = module.base_layer
        if reason := replaced(layer):
            return reason
    if is_4bit(layer):
        if getattr(layer.weight, "quant_state", None) is None:
            return "its 4-bit weight is not quantised yet"
        if getattr(layer.weight.quant_state, "packing_format_for_cpu", False):
            return "its 4-bit weight is packed for inference"
    elif type(layer) is not nn.Linear:
        return f"it is a {type(layer).__module__}.{type(layer).__name__}"
    elif type(layer.weight) not in (nn.Parameter, FakeTensor):  # a fake one is what an estimate counts with
        return f"its weight is a {type(layer.weight).__name__}"
    if layer.weight.requires_grad:
        return "its weight is trained"
    return ""


def _adapter_obstacle(module: Any) -> str:
    if module.merged:
        return "its adapter is merged"
    if module.fan_in_fan_out:
        return "its weight is transposed (fan_in_fan_out)"
    for name in module.lora_A:
        if name in module.lora_variant:
            return f"its adapter is a {type(module.lora_variant[name]).__name__.removesuffix('LinearVariant')} one"
        if module.lora_bias[name]:
            return "its adapter has a bias (lora_bias)"
        if getattr(module.lora_dropout[name], "p", 0.0):
            return f"its adapter has a dropout of {module.lora_dropout[name].p:g}"
        parts = (module.lora_A[name], module.lora_B[name], module.lora_dropout[name])
        if reason := next((r for each in parts if (r := replaced(each))), ""):
            return reason
    return ""


def replaced(module: nn.Module) -> str:
    """Whether somebody else has taken a module's forward, or listens to it; "" if nobody has."""
    if "forward" in vars(module):
        return "its forward is replaced"
    if any(getattr(module, hooks) for hooks in _HOOKS):
        return "a hook is registered on it"
    return ""


def weight_of(layer: Any, dtype: torch.dtype) -> Tensor:
    """The weight (O, I) of a layer in `dtype`: itself where it is that already, else made anew.

    Not into a buffer of ours: a caching allocator hands out the same block again, and what no function needs can serve
    others meanwhile; and bitsandbytes has no dequantisation into a tensor for CPUs.
    """
    weight = layer.weight.detach()
    if not is_4bit(layer):
        converted: Tensor = weight.to(dtype)
        return converted
    from bitsandbytes.functional import dequantize_4bit

    with part(NF4):
        found: Tensor = dequantize_4bit(weight.view(-1, 1), layer.weight.quant_state).to(dtype)
    return found
