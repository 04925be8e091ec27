"""The output embedding of a causal LM as `linear_logprob` takes it: its weight, and what the model does to its logits.

    logits = softcap·tanh((h Wᵀ + b)·logit_scale / softcap)          h (N, H): the head's own input, at the scored rows

h is what the head is called with, whatever the model did before, so the model runs as it is, and only its head is left
out: a stand-in keeps the head's input and returns no rows. No logits are formed and the weight is not read.

What follows the head is read from the configuration, and is compared once per model with what the model itself does to
its logits. A model that does something else with them, and a head that is more than one plain linear layer (quantised,
with a LoRA, offloaded), computes its own logits instead: exact as well, at N·V logits of memory.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from accelerate.hooks import AlignDevicesHook
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from fastdpo.training.models.dropout import without_dropout
from fastdpo.training.models.unwrapped import model_class

logger = logging.getLogger(__name__)

#: model_type → the configuration's factor of the logits. One name means different things to different models (MiniCPM3
#: divides its hidden states by `logits_scaling`, MPT ignores its `logit_scale`), so it counts where it is known.
_FACTORS = {
    "cohere": "logit_scale",
    "cohere2": "logit_scale",
    "cohere2_moe": "logit_scale",
    "cohere_compass_text": "logit_scale",
    "falcon_h1": "lm_head_multiplier",
    "hyperclovax": "logits_scaling",
    "muse_glimmer_text": "output_multiplier",
    "muse_spark_text": "output_multiplier",
}
#: model_type → the configuration's divisor of the logits.
_DIVISORS = {
    "granite": "logits_scaling",
    "granite_swa": "logits_scaling",
    "granite4_vision_text": "logits_scaling",
    "granite_docling_text": "logits_scaling",
    "granitemoe": "logits_scaling",
    "granitemoe_swa": "logits_scaling",
    "granitemoehybrid": "logits_scaling",
    "granitemoeshared": "logits_scaling",
}
#: model_type → the configuration's softcap where it has a name of its own; elsewhere Gemma 2's serves.
_SOFTCAPS = {"recurrent_gemma": "logits_soft_cap", "xlstm": "output_logit_soft_cap"}
_SOFTCAP = "final_logit_softcapping"

#: Tokens of the comparison with the model's own logits.
_PROBE_TOKENS = 4
#: Largest difference of log-probs in it, per unit of the largest logit: both sides compute in float32 from the same
#: output of the head, a handful of roundings of 6e-8 each. A factor of 0.9 makes about 0.1.
_PROBE_TOLERANCE = 1e-5


@dataclass(frozen=True)
class Head:
    """A plain linear head, and how the model turns its output into logits.

    module: the linear layer that is called; its weight (V, H) and bias (V,) or None.
    logit_scale, softcap: as in `linear_logprob`.
    """

    module: nn.Linear
    logit_scale: float = 1.0
    softcap: float | None = None

    @property
    def weight(self) -> Tensor:
        return self.module.weight

    @property
    def bias(self) -> Tensor | None:
        return self.module.bias

    def logits(self, output: Tensor) -> Tensor:
        """What the model should make of the linear layer's `output` (..., V)."""
        logits = output * self.logit_scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    @contextmanager
    def left_out(self) -> Iterator[list[Tensor]]:
        """Collects the inputs of the head, (B, T, H) each, while the model runs and gets (B, 0, V) from it."""
        inputs: list[Tensor] = []
        vocab = self.module.out_features

        def stand_in(input: Tensor) -> Tensor:  # the name by which nn.Linear may be called
            inputs.append(input)
            return input.new_empty((*input.shape[:-2], 0, vocab))

        with _forward_replaced(self.module, stand_in):
            yield inputs


@dataclass(frozen=True)
class OpaqueHead:
    """A head that only the model itself can apply, and why."""

    reason: str


def find_head(model: PreTrainedModel) -> Head | OpaqueHead:
    """The head that `model` calls as it stands: of the active adapter where `modules_to_save` holds the head, of the
    base model while adapters are off."""
    module: Any = model.get_output_embeddings()
    if isinstance(module, ModulesToSaveWrapper):
        module = _acting_module(module)
    if reason := _more_than_linear(module):
        return OpaqueHead(reason)
    config = model.config.get_text_config()
    factor = _number(config, _FACTORS.get(config.model_type), 1.0)
    divisor = _number(config, _DIVISORS.get(config.model_type), 1.0)
    return Head(module, factor / divisor, _number(config, _SOFTCAPS.get(config.model_type, _SOFTCAP), None))


def _number(config: Any, name: str | None, default: Any) -> Any:
    value = None if name is None else getattr(config, name, None)
    return default if value is None else float(value)


def _acting_module(wrapper: ModulesToSaveWrapper) -> nn.Module:
    active = wrapper.active_adapters
    if wrapper.disable_adapters or not active or any(name not in wrapper.modules_to_save for name in active):
        return wrapper.original_module
    return wrapper.modules_to_save[active[0]]


def _more_than_linear(module: Any) -> str:
    """Why `module` is not a linear layer whose weight can be read, or ""."""
    kind = f"{type(module).__module__}.{type(module).__qualname__}"
    if type(module).forward is not nn.Linear.forward:
        return f"its output embedding is a {kind}, not a plain linear layer"
    hook = getattr(module, "_hf_hook", None)
    if hook is not None and (not isinstance(hook, AlignDevicesHook) or hook.offload or hook.no_grad):
        return f"accelerate's {type(hook).__name__} manages the weight of its output embedding"
    if hook is None and "forward" in vars(module):
        return "the forward of its output embedding is replaced"
    # Sharded by FSDP it is a DTensor, which the forward turns into the whole weight: it is read after that
    if type(module.weight) not in (nn.Parameter, Tensor, DTensor) or not module.weight.is_floating_point():
        return f"the weight of its output embedding is a {type(module.weight).__name__} of {module.weight.dtype}"
    return ""


@contextmanager
def _forward_replaced(module: nn.Module, forward: Callable[[Tensor], Tensor]) -> Iterator[None]:
    own = vars(module).get("forward")  # accelerate's, where it placed the model
    vars(module)["forward"] = forward
    try:
        yield
    finally:
        del vars(module)["forward"]
        if own is not None:
            vars(module)["forward"] = own


class HeadReader:
    """Says of each model whether its head can be read, which is settled on first sight and logged once."""

    def __init__(self) -> None:
        self._agrees: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()
        self._told: WeakKeyDictionary[nn.Module, str] = WeakKeyDictionary()

    def read(self, model: PreTrainedModel) -> Head | None:
        """The head of `model`, or None where log-probs have to come from the model's own logits."""
        head = find_head(model)
        if isinstance(head, OpaqueHead):
            if self._told.get(model) != head.reason:
                logger.info("%s scores with its own logits: %s.", model_class(model), head.reason)
                self._told[model] = head.reason
            return None
        if model not in self._agrees:
            self._agrees[model] = _agrees_with_model(model, head)
        return head if self._agrees[model] else None


def _agrees_with_model(model: PreTrainedModel, head: Head) -> bool:
    """Compare `head` with the model's own logits, and warn where they differ.

    A few tokens run through the model, in eval mode and without gradients. They are the same for every batch and rank,
    so that all ranks decide alike without asking each other. From the output of the linear layer on, both sides compute
    in float32 at least: the run's precision hides nothing.
    """
    rows = len(model.get_input_embeddings().weight)
    # Ordinary tokens: special ones stand at either end of a vocabulary. The embedding itself may be on the host
    tokens = torch.arange(1, _PROBE_TOKENS + 1, device=head.weight.device) * rows // (_PROBE_TOKENS + 1)
    outputs: list[Tensor] = []
    linear = head.module.forward

    def upcast(input: Tensor) -> Tensor:
        output = linear(input)
        outputs.append(output.to(torch.promote_types(output.dtype, torch.float32)))
        return outputs[-1].clone()  # models may write into their logits

    with torch.no_grad(), without_dropout(model), _forward_replaced(head.module, upcast):
        found = model(input_ids=tokens[None], use_cache=False).logits
    check_calls(model, len(outputs), found, (1, _PROBE_TOKENS))
    difference = _largest_difference(found.to(outputs[0].dtype), head.logits(outputs[0]))
    tolerance = _PROBE_TOLERANCE * max(1.0, float(outputs[0].abs().max()))
    if agrees := difference <= tolerance:
        return agrees
    logger.warning(
        "%s does something to its logits that its configuration does not tell: log-probs of the vocabulary differ by "
        "up to %.3g from those of its output embedding with logit_scale=%g and softcap=%s. It scores with its own "
        "logits, which is exact and takes more memory.",
        model_class(model), difference, head.logit_scale, head.softcap,
    )  # fmt: skip
    return False


def _largest_difference(found: Tensor, expected: Tensor) -> float:
    """Of log-probs, both from logits (B, T, V); infinite where the vocabularies differ."""
    if found.shape != expected.shape:
        return float("inf")
    found, expected = found.log_softmax(-1), expected.log_softmax(-1)
    # Equal infinities differ by NaN; a model full of NaN is the step's matter, not the head's
    equal = (found == expected) | (found.isnan() & expected.isnan())
    return float((found - expected).abs().masked_fill(equal, 0.0).nan_to_num(nan=float("inf")).max())


def check_calls(model: PreTrainedModel, calls: int, logits: Tensor, shape: tuple[int, int]) -> None:
    """Refuse models that don't call their output embedding once, as a module, on all hidden states.

    Raises RuntimeError.
    """
    if calls != 1 or logits.shape[:2] != shape:
        raise RuntimeError(
            f"{model_class(model)} did not call its output embedding once on the hidden states "
            f"(calls seen: {calls}, logits of shape {tuple(logits.shape)}); such a model cannot be scored."
        )
