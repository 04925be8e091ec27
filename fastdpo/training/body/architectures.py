"""The architectures whose bodies can be lean: how their modules are told, and what each computes.

A module is known by its class, of transformers' own file of the architecture: what a user has put in its place is not.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from fastdpo.training.body.attention import AttentionKind
from fastdpo.training.body.norm import NormKind

_PLAIN_ATTENTION, _PLAIN_NORM = AttentionKind(), NormKind()
_GEMMA_NORM = NormKind(eps="eps", offset=1.0, rounds_first=False)
_OLMO_NORM = NormKind(rounds_first=False)


@dataclass(frozen=True)
class Architecture:
    """Attributes:
    prefix: of its class names; file: its folder in transformers.models.
    attention, norm: what its modules compute.
    gate_up: the names of the layers that make gate and up; activation: the MLP's attribute.
    """

    prefix: str
    file: str
    attention: AttentionKind = _PLAIN_ATTENTION
    norm: NormKind = _PLAIN_NORM
    gate_up: tuple[str, ...] = ("gate_proj", "up_proj")
    activation: str = "act_fn"

    def kind_of(self, module: nn.Module) -> Literal["attention", "mlp", "norm"] | None:
        """What a module is to the architecture, None where it is nothing of it."""
        if type(module).__module__ != self.module:
            return None
        kinds: dict[str, Literal["attention", "mlp", "norm"]] = {
            f"{self.prefix}Attention": "attention",
            f"{self.prefix}MLP": "mlp",
            f"{self.prefix}RMSNorm": "norm",
        }
        return kinds.get(type(module).__name__)

    def is_layer(self, module: nn.Module) -> bool:
        """Whether a module is a decoder layer of the architecture's own."""
        return type(module).__module__ == self.module and type(module).__name__ == f"{self.prefix}DecoderLayer"

    def patched(self, module: nn.Module) -> str:
        """Whether a class's forward, or the rotary positions of its file, come from elsewhere; "" if they do not."""
        file = sys.modules[self.module]
        for name, function in (
            (f"the forward of {type(module).__name__}", type(module).forward),
            ("apply_rotary_pos_emb", getattr(file, "apply_rotary_pos_emb", None)),
        ):
            code = getattr(inspect.unwrap(function), "__code__", None) if callable(function) else None
            if code is not None and code.co_filename != file.__file__:
                return f"{name} is not {self.module}'s own"
        return ""

    @property
    def module(self) -> str:
        """Where its classes are."""
        return f"transformers.models.{self.file}.modeling_{self.file}"


#: model_type → the architecture.
ARCHITECTURES = {
    "llama": Architecture("Llama", "llama"),
    "mistral": Architecture("Mistral", "mistral", AttentionKind(window="config")),
    "qwen2": Architecture("Qwen2", "qwen2", AttentionKind(window="module")),
    "qwen3": Architecture("Qwen3", "qwen3", AttentionKind(norms="head", window="module")),
    "gemma2": Architecture("Gemma2", "gemma2", AttentionKind(window="module", softcap=True), _GEMMA_NORM),
    "gemma3_text": Architecture("Gemma3", "gemma3", AttentionKind(norms="head", window="module"), _GEMMA_NORM),
    "phi3": Architecture(
        "Phi3", "phi3", AttentionKind(fused=True, window="config"), _PLAIN_NORM, ("gate_up_proj",), "activation_fn"
    ),
    "smollm3": Architecture("SmolLM3", "smollm3", AttentionKind(window="module")),
    "granite": Architecture("Granite", "granite"),
    "olmo2": Architecture("Olmo2", "olmo2", AttentionKind(norms="all"), _OLMO_NORM),
}


def eager_of(module: nn.Module) -> Callable[..., Any]:
    """The eager attention function of a module's own file."""
    found: Callable[..., Any] = vars(sys.modules[type(module).__module__])["eager_attention_forward"]
    return found
