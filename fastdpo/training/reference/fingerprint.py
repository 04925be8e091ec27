"""What reference log-probs depend on: digests of weights, tokenizer and settings.

`state_digest` reads a model's whole state: parameters, persistent buffers, and what a quantiser keeps beside its packed
weights, as far as `state_dict` shows it (bitsandbytes: absmax, code book, nested statistics, block size). A weight has
the same name whether or not an adapter wraps its layer, so that the base model under any LoRA, the same model as
`ref_model`, and the same model at the start of full training have equal digests.

Cost: BLAKE2b over every byte once, about 1 GB/s for each thread, beside reading the weights.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers import PreTrainedTokenizerBase

from fastdpo.training.options.config import FastDPOConfig

if TYPE_CHECKING:
    from fastdpo.training.reference.policy import ReferencePolicy

_DIGEST_BYTES = 16
#: Bytes that are brought to the host at a time, by each thread.
_CHUNK_BYTES = 1 << 26
#: Hashing leaves the interpreter's lock; beyond this many threads memory is the limit.
_MAX_THREADS = 8
#: Entries of a model's config that change no log-prob: labels, and what loading and training write into it.
_CONFIG_WITHOUT_EFFECT = (
    "architectures", "attn_implementation", "bos_token_id", "dtype", "eos_token_id", "experts_implementation",
    "initializer_range", "pad_token_id", "quantization_config", "torch_dtype", "transformers_version", "use_cache",
)  # fmt: skip
#: Entries of an adapter's config that change no log-prob of the adapter as its weights are.
_ADAPTER_WITHOUT_EFFECT = (
    "auto_mapping", "base_model_name_or_path", "inference_mode", "init_lora_weights", "lora_dropout", "peft_version",
    "revision", "task_type",
)  # fmt: skip


def reference_identity(
    reference: ReferencePolicy, tokenizer: PreTrainedTokenizerBase, config: FastDPOConfig
) -> dict[str, str]:
    """Name → value of everything that reference log-probs and token ids depend on, for `ReferenceCache`.

    Left out is what changes them by rounding only: devices, backends, micro-batches, packing, attention kernels. Built
    before the first forward: some quantised layers settle their compute dtype there.
    """
    model: Any = reference.model if reference.ref_model is None else reference.ref_model
    autocast = "bf16" if config.bf16 else "fp16" if config.fp16 else os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    return {
        "weights": reference.fingerprint(),
        "model config": _json_digest(_without(model.config.to_dict(), _CONFIG_WITHOUT_EFFECT)),
        "adapters": "off" if reference.kind == "adapters off" else _adapters(model),
        "quantisation": _quantisation(model),
        "precision": f"{model.dtype}, autocast {autocast}, tf32 {config.tf32}".replace("torch.", ""),
        "tokenizer": tokenizer_digest(tokenizer),
        "max_length": str(config.max_length),
        "max_prompt_length": str(config.max_prompt_length),
        "ld_alpha": str(config.ld_alpha),
    }


def state_digest(model: nn.Module, *, adapters: bool) -> str:
    """A digest of `model`'s state as it is now; tied weights are read once.

    adapters: False leaves LoRA weights out, which do not act where adapters are switched off.
    """
    state: dict[str, Tensor] = {
        _plain_name(name): value
        for name, value in model.state_dict(keep_vars=True).items()  # the parameters themselves, so that ties show
        if isinstance(value, Tensor) and (adapters or not _is_lora(name))
    }
    once = {id(value): value for value in state.values()}
    with ThreadPoolExecutor(min(_MAX_THREADS, os.cpu_count() or 1)) as threads:
        digests = dict(zip(once, threads.map(_tensor_digest, once.values()), strict=True))
    whole = hashlib.blake2b(digest_size=_DIGEST_BYTES)
    for name in sorted(state):
        whole.update(f"{len(name)} {name}".encode())
        whole.update(digests[id(state[name])])
    return whole.hexdigest()


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """A digest of what turns text into ids: vocabulary, rules, special tokens and chat template.

    Padding and truncation, which calls leave behind in a tokenizer, are no part of it.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    pieces = getattr(tokenizer, "sp_model", None)
    if backend is not None:
        rules = json.loads(backend.to_str()) | {"padding": None, "truncation": None}
    elif pieces is not None:
        rules = {"sentencepiece": pieces.serialized_model_proto().hex(), "added": tokenizer.get_added_vocab()}
    else:
        rules = {"class": type(tokenizer).__name__, "vocabulary": tokenizer.get_vocab()}
    special = _without(tokenizer.special_tokens_map, ("pad_token",))
    flags = {
        name: getattr(tokenizer, name, None) for name in ("add_bos_token", "add_eos_token", "split_special_tokens")
    }
    return _json_digest([rules, special, flags, tokenizer.chat_template])


def _tensor_digest(tensor: Tensor) -> bytes:
    """A digest of shape, dtype and every byte, on whatever device the tensor lies."""
    digest = hashlib.blake2b(f"{tuple(tensor.shape)} {tensor.dtype}".encode(), digest_size=_DIGEST_BYTES)
    if is_traceable_wrapper_subclass(tensor):  # as torchao's quantised tensors: plain tensors and a description
        names, context = tensor.__tensor_flatten__()
        digest.update(f"{type(tensor).__name__} {context}".encode())
        for name in names:
            digest.update(_tensor_digest(getattr(tensor, name)))
        return digest.digest()
    values = tensor.detach().reshape(-1).view(torch.uint8)
    for chunk in values.split(_CHUNK_BYTES):
        digest.update(chunk.cpu().numpy())
    return digest.digest()


def _is_lora(name: str) -> bool:
    return any(part.startswith("lora_") for part in name.split("."))


def _plain_name(name: str) -> str:
    """The name of a parameter as it is without PEFT's wrappers around the model and around the layer."""
    return name.removeprefix("base_model.model.").replace(".base_layer.", ".")


def _adapters(model: nn.Module) -> str:
    if not isinstance(model, PeftModel):
        return "none"
    settings = {name: _without(config.to_dict(), _ADAPTER_WITHOUT_EFFECT) for name, config in model.peft_config.items()}
    return _json_digest([settings, list(model.base_model.active_adapters)])


def _quantisation(model: Any) -> str:
    """The quantiser's settings that are not off, and the dtypes that its layers compute in."""
    config = getattr(model.config, "quantization_config", None) or {}
    settings = config if isinstance(config, dict) else config.to_dict()
    used = {name: value for name, value in _without(settings, ()).items() if value not in (None, False)}
    # The layers' own, as layers may be built or changed by hand
    compute = {
        str(m.compute_dtype) for m in model.modules() if isinstance(m, nn.Linear) and hasattr(m, "compute_dtype")
    }
    return _json({**used, "computes in": sorted(compute)}) if used or compute else "none"


def _without(settings: Mapping[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    """`settings` without these names and without private ones, in nested settings too."""
    return {
        name: _without(value, names) if isinstance(value, Mapping) else value
        for name, value in settings.items()
        if name not in names and not str(name).startswith("_")
    }


def _json(value: Any) -> str:
    return json.dumps(value, sort_keys=True, default=lambda each: sorted(each) if isinstance(each, set) else str(each))


def _json_digest(value: Any) -> str:
    return hashlib.blake2b(_json(value).encode(), digest_size=_DIGEST_BYTES).hexdigest()
