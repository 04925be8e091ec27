"""A model with random weights, made layer by layer from its configuration, so that memory never holds it in 16 bits.

Costs depend on shapes only. What `from_pretrained` would do beside reading files is done by hand: linear layers are
replaced by bitsandbytes' 4-bit ones, and each weight is drawn where it will live and packed at once.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from benchmarks.gpu.report import NO_BITSANDBYTES
from benchmarks.gpu.sizes import TOY_LLAMA, TrainingShape
from fastdpo.estimate.architectures import find_config
from fastdpo.estimate.skeleton import is_4bit, quantize
from fastdpo.training.models.loading import quantization_config
from fastdpo.training.options import ModelConfig


def configuration(shape: TrainingShape) -> PretrainedConfig:
    if shape.architecture:
        return find_config(shape.architecture)
    return AutoConfig.for_model(**TOY_LLAMA)


def options(device: str) -> ModelConfig:
    """What is trained: NF4 with double quantisation, LoRA r = 16 on all linear layers.

    Raises ImportError, with the next step, where a card is there and bitsandbytes is not: 16 bits would be another
    measurement. On a CPU (`--dry`) the layers then stay as they are.
    """
    has_bitsandbytes = importlib.util.find_spec("bitsandbytes") is not None
    if device == "cuda" and not has_bitsandbytes:
        raise ImportError(NO_BITSANDBYTES)
    return ModelConfig(
        dtype="bfloat16" if device == "cuda" else "float32", load_in_4bit=has_bitsandbytes, lora_r=16, lora_alpha=32
    )


@torch.no_grad()
def build(config: PretrainedConfig, chosen: ModelConfig, device: str, seed: int = 0) -> PreTrainedModel:
    """A causal LM of this configuration on `device`."""
    dtype = getattr(torch, chosen.dtype)
    with init_empty_weights():  # parameters without memory; buffers, such as rotary frequencies, are real
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        quantization = quantization_config(chosen)
        if quantization is not None:
            quantize(model, quantization)
            model.config.quantization_config = quantization
    generator = torch.Generator(device).manual_seed(seed)
    for module, name, parameter in list(parameters_once(model)):
        shape = parameter.shape
        if isinstance(module, nn.Linear) and is_4bit(module) and name == "weight":
            shape = torch.Size((module.out_features, module.in_features))
        value = torch.ones(shape, dtype=dtype, device=device)
        if len(shape) > 1:
            # Smaller weights would make attention flat, which hides mistakes in it
            value.normal_(std=shape[-1] ** -0.5, generator=generator)
        module._parameters[name] = made(parameter, value)
    model.tie_weights()
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = buffer.to(device)
    return model


def parameters_once(model: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Parameter]]:
    """(module, name in it, parameter), tied ones once."""
    seen: set[int] = set()
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and id(parameter) not in seen:
                seen.add(id(parameter))
                yield module, name, parameter


def made(old: nn.Parameter, value: torch.Tensor) -> nn.Parameter:
    """`value` as a parameter of old's kind: a 4-bit one is packed here."""
    if type(old).__name__ != "Params4bit":
        return nn.Parameter(value, requires_grad=old.requires_grad)
    fields = ("blocksize", "compress_statistics", "quant_type", "quant_storage", "module")
    settings: dict[str, Any] = {name: getattr(old, name) for name in fields}
    kind: Any = type(old)
    packed: nn.Parameter = kind(value, requires_grad=False, **settings).to(value.device)
    return packed


def tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte and an end, which trainers ask for; the pairs are token ids already."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(["</s>", *alphabet])}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>", pad_token="</s>")


def save_configuration(config: PretrainedConfig, folder: Path) -> Path:
    """A folder that `fastdpo estimate` reads: config.json without the quantisation, which is an option there."""
    document = {name: value for name, value in config.to_dict().items() if name != "quantization_config"}
    (folder / "config.json").write_text(json.dumps(document, default=str), encoding="utf-8")
    return folder
