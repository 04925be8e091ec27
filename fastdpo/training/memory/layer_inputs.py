"""Layer inputs on the host: what checkpointed layers keep goes into an `Arena` in the place of the device's memory.

transformers has each layer call `_gradient_checkpointing_func(forward, hidden_states, ...)`, torch's `checkpoint`, and
that saves the tensors which it is given by position. Hooks around the call see them: the hidden states go into the
arena, as they are a layer's own; what all layers share (positions, masks) stays on the device, once. What the layer
computes inside is recomputed and never saved, so it does not pass the hooks. With `use_reentrant=True` torch saves
behind the layer: nothing hides the copy then, and the rest is the same. With FSDP2, whose hooks are outside of what is
recomputed, each rank keeps its own inputs.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from fastdpo.training.memory.arena import Arena, Copies, Ticket, arena_bytes
from fastdpo.training.models.unwrapped import base_model, model_class


class LayerInputs:
    """The inputs of a model's checkpointed layers, kept on the host from now on.

    Args:
        model: whose checkpointing is switched on, in whatever way (every so many layers, reentrant or not).
        copies: between its device and the host.

    Raises ValueError where no layer of the model can be checkpointed this way.
    """

    def __init__(self, model: PreTrainedModel, copies: Copies) -> None:
        self.model = model
        callers = [each for each in model.modules() if hasattr(each, "_gradient_checkpointing_func")]
        layers = [each for each in callers if isinstance(each, GradientCheckpointingLayer)]
        self.layers = sum(each.gradient_checkpointing for each in layers)
        if not self.layers:
            raise ValueError(
                f"activation_offloading=True: the layers of {model_class(model)} are not checkpointed in transformers' "
                "way (GradientCheckpointingLayer), so what they keep cannot be moved. Drop activation_offloading; "
                "gradient_checkpointing=True saves memory as well."
            )
        self.arena = Arena(copies, self.layers)
        for each in callers:
            each._gradient_checkpointing_func = partial(self._call, each._gradient_checkpointing_func)

    def bytes(self, tokens: int) -> int:
        """Host memory for a micro-batch of so many tokens, padding included."""
        base = base_model(self.model)
        # Hidden states are what the embedding gives: later layers add to them in that dtype
        itemsize = base.get_input_embeddings().weight.element_size()
        return arena_bytes(self.layers, tokens, base.config.get_text_config().hidden_size, itemsize)

    def tokens_within(self, room: int) -> int:
        """The most tokens of a micro-batch whose inputs `room` bytes of host memory hold."""
        per_token = self.bytes(2**20) / 2**20
        tokens = max(0, int(room / per_token))
        while tokens and self.bytes(tokens) > room:  # by rounding
            tokens -= 1
        return tokens

    def _call(self, checkpoint: Callable[..., Any], function: Callable[..., Any], *args: Any) -> Any:
        if not torch.is_grad_enabled():  # nothing is kept
            return checkpoint(function, *args)
        hidden = next((each for each in args if isinstance(each, Tensor) and each.is_floating_point()), None)
        if hidden is None:
            raise ValueError(
                f"activation_offloading=True: {_layer_of(function)} is not given its hidden states by position, so "
                "they cannot be moved. Drop activation_offloading."
            )
        seen = _Seen(self.arena, hidden)
        del hidden
        try:
            with saved_tensors_hooks(seen.pack, self._unpack):
                output = checkpoint(function, *args)
            seen.check_untouched(_layer_of(function))
            return output
        finally:
            seen.close()

    def _unpack(self, packed: Tensor | Ticket) -> Tensor:
        return self.arena.fetch(packed) if isinstance(packed, Ticket) else packed


class _Seen:
    """One layer's input on its way to the host. The graph keeps `pack`, and with it this object, so that `close` has to
    forget the input."""

    def __init__(self, arena: Arena, hidden: Tensor) -> None:
        self.arena = arena
        self.hidden: Tensor | None = hidden
        self.ticket: Ticket | None = None
        self.version = hidden._version

    def pack(self, tensor: Tensor) -> Tensor | Ticket:
        hidden = self.hidden
        if hidden is None or self.ticket is not None or not _same(tensor, hidden):
            return tensor
        self.ticket = self.arena.store(tensor.detach())
        return self.ticket

    def check_untouched(self, layer: str) -> None:
        """Raises RuntimeError where the layer wrote into its input, whose copy then may hold what was written."""
        if self.hidden is not None and self.hidden._version != self.version:
            raise RuntimeError(
                f"{layer} has written into its own input, which is copied to the host meanwhile and read again in the "
                "backward. Drop activation_offloading, and gradient_checkpointing, for this model."
            )

    def close(self) -> None:
        """Behind the layer: whoever else has its input may free it now, or write into it."""
        ticket, self.ticket, self.hidden = self.ticket, None, None
        if ticket is not None:
            self.arena.stored(ticket)


def _same(tensor: Tensor, other: Tensor) -> bool:
    """Whether both are one tensor: torch saves another object than it was given."""
    return tensor.shape == other.shape and tensor.dtype == other.dtype and tensor.data_ptr() == other.data_ptr()


def _layer_of(function: Callable[..., Any]) -> str:
    """The class of the layer whose forward a checkpoint is given, for messages."""
    bound = getattr(function, "args", ()) or (getattr(function, "__self__", None),)
    return type(bound[0]).__name__ if isinstance(bound[0], nn.Module) else "a layer"
