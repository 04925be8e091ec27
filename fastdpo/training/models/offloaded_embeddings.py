"""Frozen input embeddings on the host: rows are looked up there, and T × H of them travel to the device.

A vocabulary of 128,000 rows of 4,096 takes a gigabyte of a card for a product that reads a few thousand of them. Only
the instance changes: its module stays on the host, whatever moves the model, and computes there what its class does
(scaled rows, padding), from ids of the host; what comes out is where the model is. Weights, names and dtypes of a
`state_dict` are those of before.

The host's own ids of a micro-batch are known (`remember`), so that nobody waits for the device to read them; other ids
are read from it.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from accelerate.hooks import remove_hook_from_module
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary
from transformers import PreTrainedModel

from fastdpo.training.models.unwrapped import base_model, model_class

#: Ids of a device → the host's, for as long as the former live.
_HOST_IDS = WeakTensorKeyDictionary()
_CPU = torch.device("cpu")


def remember(ids: Tensor, host_ids: Tensor) -> None:
    """`ids`, of a device, are the copy of `host_ids`."""
    if ids.device != _CPU:
        _HOST_IDS[ids] = host_ids


def obstacle(model: PreTrainedModel) -> str:
    """Why the input embedding of `model` cannot stay on the host, or ""."""
    base = base_model(model)
    module = base.get_input_embeddings()
    kind = f"{type(module).__module__}.{type(module).__qualname__}"
    if not isinstance(module, nn.Embedding):  # of modules_to_save, with a LoRA, with trained tokens, quantised
        return f"it is a {kind}, not a frozen embedding"
    if module.weight.requires_grad:
        return "it is trained"
    if module.weight.is_meta:
        return "its weight is not in memory: a device_map has placed it elsewhere"
    same = [name for name, p in base.named_parameters(remove_duplicate=False) if p is module.weight]
    if len(same) > 1:
        return f"its weight is tied: {same[0]} and {same[1]} are one tensor, and the device needs the second"
    return ""


def check_embeddings_can_stay(model: PreTrainedModel, argument: str = "model") -> None:
    """Raise ValueError where the input embedding of `model` cannot stay on the host. argument: that gave the model."""
    if reason := obstacle(model):
        raise ValueError(
            f"offload_embeddings=True: the input embedding of {argument}, a {model_class(model)}, cannot stay on the "
            f"host: {reason}. Drop offload_embeddings, or leave the embedding frozen, untied and without an adapter "
            "(lora_target_modules, lora_modules_to_save)."
        )


def offload_embeddings(model: PreTrainedModel, device: torch.device, argument: str = "model") -> None:
    """Keep the input embedding of `model` on the host from now on, with its rows looked up for `device`. Wherever the
    model is moved later, the rows follow.

    argument: that gave the model. Raises ValueError where it cannot be.
    """
    check_embeddings_can_stay(model, argument)
    module = base_model(model).get_input_embeddings()
    remove_hook_from_module(module)  # accelerate's, where it placed the model: it would send ids to the device
    was_on_gpu = module.weight.is_cuda
    module.to(_CPU)
    if was_on_gpu:
        torch.cuda.empty_cache()
    module.rows_for = device
    # Bound, so that a copy of the module looks up in its own weight
    vars(module)["forward"] = MethodType(_looked_up, module)
    vars(module)["_apply"] = MethodType(_stay, module)
    # DistributedDataParallel wants all parameters that it looks after on one kind of device
    names = [name for name, each in model.named_modules() if each is module]
    ignored = [f"{name}.{tensor}" for name in names for tensor, _ in _tensors(module)]
    model._ddp_params_and_buffers_to_ignore = [*getattr(model, "_ddp_params_and_buffers_to_ignore", ()), *ignored]


def _tensors(module: nn.Module) -> list[tuple[str, Tensor]]:
    return [*module.named_parameters(), *module.named_buffers()]


def _looked_up(self: Any, ids: Tensor) -> Tensor:
    """(..., H) rows on the device, of ids (...) that are there or on the host."""
    host_ids = _HOST_IDS.get(ids)
    rows: Tensor = type(self).forward(self, ids.to(_CPU) if host_ids is None else host_ids)
    if self.rows_for.type != "cuda":
        return rows.to(self.rows_for)
    pinned = torch.empty(rows.shape, dtype=rows.dtype, pin_memory=True).copy_(rows)
    return pinned.to(self.rows_for, non_blocking=True)  # torch reuses pinned memory after the copy only


def _stay(self: Any, convert: Any, recurse: bool = True) -> Any:
    """nn.Module's `_apply`, through which `to`, `cuda` and `half` go: other dtypes are taken over, other devices are
    where rows go."""
    probe = convert(torch.empty(0, dtype=self.weight.dtype, device=self.rows_for))
    self.rows_for = probe.device
    for _, tensor in _tensors(self):
        if tensor.is_floating_point():
            tensor.data = tensor.data.to(probe.dtype)
    return self
