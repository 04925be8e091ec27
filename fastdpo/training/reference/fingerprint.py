"""Digests of what reference log-probs depend on: weights, tokenizer, settings.

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
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers import PreTrainedTokenizerBase

_DIGEST_BYTES = 16
#: Bytes that are brought to the host at a time, by each thread.
_CHUNK_BYTES = 1 << 26
#: Hashing leaves the interpreter's lock; beyond this many threads memory is the limit.
_MAX_THREADS = 8


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
    special = without(tokenizer.special_tokens_map, ("pad_token",))
    flags = {
        name: getattr(tokenizer, name, None) for name in ("add_bos_token", "add_eos_token", "split_special_tokens")
    }
    return json_digest([rules, special, flags, tokenizer.chat_template])


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


def without(settings: Mapping[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    """`settings` without these names and without private ones, in nested settings too."""
    return {
        name: without(value, names) if isinstance(value, Mapping) else value
        for name, value in settings.items()
        if name not in names and not str(name).startswith("_")
    }


def as_json(value: Any) -> str:
    """`value` as one text, whatever order its entries came in."""
    return json.dumps(value, sort_keys=True, default=lambda each: sorted(each) if isinstance(each, set) else str(each))


def json_digest(value: Any) -> str:
    """A digest of `as_json`."""
    return hashlib.blake2b(as_json(value).encode(), digest_size=_DIGEST_BYTES).hexdigest()
