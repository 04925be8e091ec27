"""A model as training has it, quantised and with its LoRA, but without weights.

The modules are transformers', bitsandbytes' and peft's own, built on the meta device and given fake tensors afterwards:
a forward and a backward then run through the same Python code as in training and allocate nothing, so that what they
would keep can be counted (`training.memory.counting`). Fake tensors say that they are on the CPU: a build of torch
without CUDA cannot run a backward over fake CUDA tensors, and shapes and dtypes are the same.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PretrainedConfig, PreTrainedModel

from fastdpo.shown import shown
from fastdpo.training.body import LeanBody, Tiles
from fastdpo.training.body.choice import cannot_be_had
from fastdpo.training.body.projections import is_4bit
from fastdpo.training.memory.plan import enable_checkpointing
from fastdpo.training.models.dropout import disable_dropout
from fastdpo.training.models.loading import lora_config, quantization_config
from fastdpo.training.models.setup import check_trainable_causal_lm, with_adapter
from fastdpo.training.options import ModelConfig
from fastdpo.training.rows.choice import obstacle, segment_obstacle
from fastdpo.training.scoring.head import Head, find_head

#: Weights per quantisation constant, and constants per constant of the second quantisation; bitsandbytes' defaults.
BLOCK, NESTED_BLOCK = 64, 256

#: Options of the adapter → the most that is counted with.
_LARGEST = {"lora_r": 2**17, "lora_alpha": 2**53}


class Skeleton:
    """A model of fake tensors, and the mode in which it runs.

    Attributes:
        model: a causal LM, with an adapter where `ModelConfig.use_lora` says so; its parameters are fake tensors.
        head: its output embedding.
        mode: enter it to call the model.
        dtype: of the weights that are not quantised and of 4-bit compute.
        lean: its lean body, or None.
    """

    def __init__(
        self,
        config: PretrainedConfig,
        options: ModelConfig,
        dtype: torch.dtype,
        *,
        lean_body: str = "off",
        tiles: Tiles | None = None,
    ) -> None:
        """lean_body: the option; with its `tiles`, by default those of a CPU.

        Raises ValueError for an adapter that exists already, as what it holds is known only from its files, for
        DoRA, for a head that is more than one linear layer, and for attention that is more than causal segments."""
        if options.adapter_name_or_path is not None:
            raise ValueError(
                f"adapter_name_or_path={options.adapter_name_or_path!r} is not read by the estimate. Give the lora_r "
                "and lora_target_modules that it was made with."
            )
        if options.use_dora:
            raise ValueError(
                "use_dora=True cannot be predicted: it starts from the norms of the weights, which are not read."
            )
        for name, most in _LARGEST.items():
            if getattr(options, name) > most:
                raise ValueError(f"{name} is more than {most:,}, the most that is predicted for; lower it.")
        self.dtype, self.mode = dtype, FakeTensorMode(allow_non_fake_inputs=True)
        with torch.device("meta"):
            model = bare_model(config, dtype)
            check_trainable_causal_lm(model)
            if quantization := quantization_config(options):
                quantization.bnb_4bit_compute_dtype = dtype
                quantize(model, quantization)
            model = with_adapter(model, lora_config(options))
        if reason := obstacle(model) or segment_obstacle(model, keeps_dropout=False):
            raise ValueError(
                f"the memory of a model with {type(config).__name__} cannot be predicted, as rows of it do not hold "
                f"several sequences by segments: {reason}."
            )
        self.model: PreTrainedModel = model
        self.head = plain_head(model)  # now: a fake parameter is not of a parameter's type
        disable_dropout(model)
        with self.mode:
            _fill(model)
        model.train()
        self.lean = _lean_body(model, lean_body, tiles or Tiles.on_cpu())

    def body(self) -> AbstractContextManager[None]:
        """Within it the model's forwards are those of training."""
        return contextlib.nullcontext() if self.lean is None else self.lean.active()

    def slice_rows(self) -> int | None:
        """Tokens that its MLPs compute at a time; None where that is all of them."""
        if self.lean is None:
            return None
        inner = getattr(self.model.config.get_text_config(), "intermediate_size", None)
        return None if inner is None else self.lean.tiles.rows(inner, self.dtype.itemsize)

    def checkpoint_layers(self) -> None:
        """Recompute every layer in the backward, as training does it."""
        enable_checkpointing(self.model, {"use_reentrant": False})


def _lean_body(model: PreTrainedModel, option: str, tiles: Tiles) -> LeanBody | None:
    """As a run chooses (`BodyChoice`), the check on its first batch aside. Raises ValueError for an "on" that cannot be
    had."""
    if option == "off":
        return None
    body = LeanBody(model, tiles)
    if body.reason or (body.foreign and option == "on"):
        if option == "on":
            raise cannot_be_had(body.reason or body.told())
        return None
    return body


def bare_model(config: PretrainedConfig, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """The causal LM of a configuration, on the meta device. Raises ValueError where transformers can make none."""
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, dtype=dtype)
    except (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(
            f"transformers can build no model from the {type(config).__name__} of {config.name_or_path!r}: "
            f"{type(error).__name__}: {shown(error)}. Compare its config.json with the original's."
        ) from error


def with_layers(config: PretrainedConfig, count: int) -> PretrainedConfig:
    """A copy of `config` with its first `count` layers."""
    shallow = copy.deepcopy(config)
    text = shallow.get_text_config()
    text.num_hidden_layers = count
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:count]
    return shallow


def has_equal_layers(config: PretrainedConfig) -> bool:
    """Whether all decoder layers of a model hold the same parameters and attend in the same way."""
    text = config.get_text_config()
    if len(set(getattr(text, "layer_types", None) or [None])) > 1:
        return False
    model = bare_model(config)
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == text.num_hidden_layers:
            kinds = {tuple((name, p.shape) for name, p in layer.named_parameters()) for layer in module}
            return len(kinds) == 1
    return False


def plain_head(model: PreTrainedModel) -> Head:
    """The head of `model`. Raises ValueError where it is more than one linear layer."""
    head = find_head(model)
    if isinstance(head, Head):
        return head
    raise ValueError(f"the memory of this model's head cannot be predicted: {head.reason}.")


def quantize(model: PreTrainedModel, quantization: BitsAndBytesConfig) -> None:
    """Replace the linear layers of a meta model that `from_pretrained` would load in 4 bits."""
    from transformers.integrations.bitsandbytes import replace_with_bnb_linear
    from transformers.quantizers.base import get_keys_to_not_convert

    replace_with_bnb_linear(model, get_keys_to_not_convert(model), quantization)
    model.is_loaded_in_4bit = True  # peft then wraps the layers as 4-bit ones


def _fill(model: nn.Module) -> None:
    """Fake tensors in the place of meta ones. Tied parameters stay tied, 4-bit layers get their packed weight."""
    made: dict[int, Tensor] = {}
    for module in model.modules():
        packed = is_4bit(module)
        for name, old in module._parameters.items():
            if old is not None and id(old) not in made:
                if packed and name == "weight":
                    made[id(old)] = _packed_weight(module)
                else:
                    fake = torch.empty(old.shape, dtype=old.dtype)
                    made[id(old)] = nn.Parameter(fake, requires_grad=old.requires_grad)
            if old is not None:
                module._parameters[name] = made[id(old)]  # type: ignore[assignment]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)


def _packed_weight(layer: Any) -> nn.Parameter:
    """The 4-bit weight of a layer (out, in) with its constants: two values per byte, one uint8 constant per 64 values
    and one float32 per 256 of these with double quantisation, one float32 per 64 values without."""
    from bitsandbytes.functional import QuantState

    count = layer.out_features * layer.in_features
    blocks = -(-count // BLOCK)
    nested = None
    if layer.weight.compress_statistics:
        nested = QuantState(
            absmax=torch.empty(-(-blocks // NESTED_BLOCK)),
            blocksize=NESTED_BLOCK,
            code=torch.empty(256),
            dtype=torch.float32,
        )
    state = QuantState(
        absmax=torch.empty(blocks, dtype=torch.float32 if nested is None else torch.uint8),
        shape=torch.Size((layer.out_features, layer.in_features)),
        code=torch.empty(16),
        blocksize=BLOCK,
        quant_type=layer.weight.quant_type,
        dtype=layer.compute_dtype,
        offset=None if nested is None else torch.empty(()),
        state2=nested,
    )
    # Not a Params4bit: a fake tensor cannot be of another subclass. The layer reads nothing but this attribute.
    weight = nn.Parameter(torch.empty((count + 1) // 2, 1, dtype=torch.uint8), requires_grad=False)
    weight.quant_state = state  # type: ignore[attr-defined]
    return weight


def quantization_constants(model: nn.Module) -> Iterator[Tensor]:
    """The tensors that 4-bit layers keep beside their packed weights."""
    for module in model.modules():
        state = getattr(module.weight, "quant_state", None) if is_4bit(module) else None
        if state is not None:
            nested = state.state2
            tensors = (state.absmax, state.code, state.offset, *((nested.absmax, nested.code) if nested else ()))
            yield from (tensor for tensor in tensors if tensor is not None)


def resident_bytes(tensors: Iterator[Tensor]) -> int:
    """Bytes of the distinct storages behind `tensors`."""
    return sum({s._cdata: s.nbytes() for s in (tensor.untyped_storage() for tensor in tensors)}.values())
