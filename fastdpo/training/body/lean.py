"""`LeanBody`: one model's layers, computed with less memory and fewer passes, while it is active.

What changes is the forward of single modules of this one instance, and only within `active()`: attention, MLP and norms
of a known architecture (`architectures`). A module that cannot be served stays as it is, and `left` says why: LoRA with
dropout, DoRA, a layer that somebody has replaced. What may change between two steps is asked each time: adapters that
are merged or of another kind, weights that are trained by now. Outside of it the model is what transformers and peft
made it.

Checkpointing is transformers' own: its layers call the same forwards again in the backward, where `mlp` stops early.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.activations import ACT2FN

from fastdpo.shown import listed
from fastdpo.training.body.architectures import ARCHITECTURES, Architecture, eager_of
from fastdpo.training.body.attention import attention_forward, qkv_modules
from fastdpo.training.body.functions import Functions, own_functions
from fastdpo.training.body.mlp import Tiles, gated_mlp
from fastdpo.training.body.products import compute_dtype
from fastdpo.training.body.projections import is_4bit, obstacle, read, replaced
from fastdpo.training.models.unwrapped import base_model, model_class

logger = logging.getLogger(__name__)

_FOREIGN = "not the architecture's own, or with a forward or hook of somebody else"


class LeanBody:
    """The lean forwards of one model.

    Args:
        model: a causal LM, with or without adapters.
        tiles: of its MLPs, norms and rotary positions. functions: that compute norms, activations and positions.

    Attributes:
        served: names of the modules that have a lean forward.
        left: reason → names of those that keep theirs. foreign: names of those that are not the architecture's own.
        reason: why nothing is served, or "".
    """

    def __init__(self, model: PreTrainedModel, tiles: Tiles, functions: Functions | None = None) -> None:
        self.model, self.tiles = model, tiles
        self.functions = functions or own_functions(tiles.elements)
        self.served: list[str] = []
        self.left: dict[str, list[str]] = {}
        self.foreign: list[str] = []
        self._forwards: list[tuple[nn.Module, Callable[..., Any], Callable[[], str]]] = []
        self._given_up: set[str] = set()
        self.reason = self._look()

    def _look(self) -> str:
        """Sort the modules; why nothing can be lean, or ""."""
        config = base_model(self.model).config.get_text_config()
        architecture = ARCHITECTURES.get(config.model_type)
        if architecture is None:
            known = ", ".join(ARCHITECTURES)
            return f"model_type={config.model_type!r} of {model_class(self.model)} is not one of those known: {known}"
        layers = _layers(self.model, config.num_hidden_layers)
        if not layers:
            return f"the decoder layers of {model_class(self.model)} were not found"
        owners: dict[int, nn.Module] = {}
        for name, layer in layers.items():
            if not architecture.is_layer(layer) or replaced(layer):
                self.foreign.append(name)
                continue
            owners |= {id(module): layer for module in layer.modules()}
            for child, module in layer.named_children():
                if isinstance(module, ModulesToSaveWrapper):
                    self.left.setdefault("it is trained as a whole (modules_to_save)", []).append(f"{name}.{child}")
                elif not isinstance(module, nn.Dropout) and (architecture.kind_of(module) is None or replaced(module)):
                    self.foreign.append(f"{name}.{child}")
        makes = {"attention": self._attention, "mlp": self._mlp, "norm": self._norm}
        obstacles = {"attention": _attention_obstacle, "mlp": self._mlp_obstacle, "norm": _norm_obstacle}
        self._activation = str(getattr(config, "hidden_activation", None) or getattr(config, "hidden_act", None))
        for name, module in self.model.named_modules():
            kind = architecture.kind_of(module)
            if kind is None or name in self.foreign or (kind != "norm" and id(module) not in owners):
                continue
            obstacle_of = partial(_obstacle, module, architecture, obstacles[kind])
            if reason := obstacle_of():
                self.left.setdefault(reason, []).append(name)
            else:
                self._forwards.append((module, makes[kind](architecture, module, owners.get(id(module))), obstacle_of))
                self.served.append(name)
        return "" if self.served else f"none of its modules can be served ({self.told()})"

    def told(self) -> str:
        """What keeps its own forward, and why; "" where nothing does."""
        others = {_FOREIGN: self.foreign} if self.foreign else {}
        return "; ".join(f"{listed(names)}: {reason}" for reason, names in (self.left | others).items())

    def _attention(self, architecture: Architecture, module: Any, layer: Any) -> Callable[..., Any]:
        def forward(
            hidden_states: Tensor,
            position_embeddings: Any = None,
            attention_mask: Tensor | None = None,
            past_key_values: Any = None,
            **kwargs: Any,
        ) -> tuple[Tensor, Tensor | None]:
            if self._is_mixed(module.o_proj, hidden_states):
                found: tuple[Tensor, Tensor | None] = type(module).forward(
                    module, hidden_states, position_embeddings, attention_mask, past_key_values, **kwargs
                )
                return found
            return attention_forward(
                module, architecture.attention, architecture.norm, self.functions, eager_of(module),
                hidden_states, position_embeddings, attention_mask, past_key_values, kwargs,
            )  # fmt: skip

        return forward

    def _mlp(self, architecture: Architecture, module: Any, layer: Any) -> Callable[..., Any]:
        gate_up = [getattr(module, name) for name in architecture.gate_up]
        activation = self.functions.activations[self._activation]

        def forward(x: Tensor | None = None, hidden_states: Tensor | None = None) -> Tensor:
            given = hidden_states if x is None else x
            assert given is not None
            if self._is_mixed(module.down_proj, given):
                own: Tensor = type(module).forward(module, given)
                return own
            recomputed = bool(getattr(layer, "gradient_checkpointing", False)) and layer.training
            return gated_mlp(
                given, [read(each) for each in gate_up], read(module.down_proj), activation, self.tiles,
                recomputed=recomputed,
            )  # fmt: skip

        return forward

    def _mlp_obstacle(self, module: Any, architecture: Architecture) -> str:
        if reason := _alike([*(getattr(module, name) for name in architecture.gate_up), module.down_proj]):
            return reason
        if self._activation not in self.functions.activations:
            return f"its activation {self._activation!r} is not served"
        own = getattr(module, architecture.activation)
        if type(own) is not type(ACT2FN[self._activation]):
            return f"its activation is a {type(own).__name__}, not the configuration's {self._activation!r}"
        return ""

    def _norm(self, architecture: Architecture, module: Any, layer: Any) -> Callable[..., Any]:
        norm, kind = self.functions.norm, architecture.norm
        return lambda x: norm(x, module, kind)

    def _give_up(self, reason: str, what: str) -> None:
        """Say once that something is computed by its modules after all."""
        if reason not in self._given_up:
            self._given_up.add(reason)
            logger.warning("%s: %s: %s. Computed as they are.", model_class(self.model), what, reason)

    def _is_mixed(self, module: Any, x: Tensor) -> bool:
        """Whether a 4-bit layer computes in another dtype than its input's and output's: its LoRA, added in the wider
        one, would lose digits in products of the narrower."""
        layer = getattr(module, "base_layer", module)
        mixed = is_4bit(layer) and compute_dtype(layer, x.dtype) != x.dtype
        if mixed:
            self._give_up(
                f"4-bit layers compute in {layer.compute_dtype} for inputs of {x.dtype}", "attention and MLPs"
            )
        return mixed

    @contextmanager
    def active(self) -> Iterator[None]:
        """The lean forwards are in place meanwhile, for forwards, recomputations and backwards."""
        changed = []
        reasons = [obstacle_of() for *_, obstacle_of in self._forwards]
        for reason in sorted(set(reasons) - {""}):
            self._give_up(reason, f"{reasons.count(reason)} modules, since the trainer was built")
        try:
            for (module, forward, _), reason in zip(self._forwards, reasons, strict=True):
                if not reason:
                    vars(module)["forward"] = forward
                    changed.append(module)
            yield
        finally:
            for module in changed:
                del vars(module)["forward"]


def _layers(model: PreTrainedModel, count: int) -> dict[str, nn.Module]:
    """Name → decoder layer."""
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return {f"{name}.{i}": layer for i, layer in enumerate(module)}
    return {}


def _obstacle(module: nn.Module, architecture: Architecture, obstacle_of: Callable[[Any, Architecture], str]) -> str:
    """Why a module keeps its forward, or "". Modules below it, none of which is called, count as well."""
    below = next((reason for each in module.modules() if (reason := replaced(each))), "")
    return below or architecture.patched(module) or obstacle_of(module, architecture)


def _alike(modules: Sequence[Any]) -> str:
    """Why linear layers cannot be served together, or ""."""
    if reason := next((r for each in modules if (r := obstacle(each))), ""):
        return reason
    layers = [getattr(each, "base_layer", each) for each in modules]
    if len({(is_4bit(each), each.weight.dtype, getattr(each, "compute_dtype", None)) for each in layers}) > 1:
        return "its layers are kept in different dtypes"
    adapters = {w.weight.dtype for each in modules for w in getattr(each, "lora_A", {}).values()}
    return "its adapters are of different dtypes" if len(adapters) > 1 else ""


def _attention_obstacle(module: Any, architecture: Architecture) -> str:
    kind = architecture.attention
    if reason := _alike(qkv_modules(module, kind)) or _alike([module.o_proj]):
        return reason
    norms = () if kind.norms == "none" else (module.q_norm, module.k_norm)
    reason = next((r for each in norms if (r := _norm_obstacle(each, architecture))), "")
    return f"of its norms, {reason}" if reason else ""


def _norm_obstacle(module: nn.Module, architecture: Architecture) -> str:
    if architecture.kind_of(module) != "norm":
        return f"it is a {type(module).__name__}"
    if reason := replaced(module):
        return reason
    weight: Any = module.weight
    return "its weight is trained" if weight.requires_grad else ""
