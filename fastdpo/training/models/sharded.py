"""FSDP2: a model with its parameters sharded over ranks, layer by layer (`fully_shard`, by accelerate).

Three things differ from plain data parallelism:
- gradients are reduce-scattered in the backward of every micro-batch. dL/dlogp belongs to the mean over all ranks'
  examples already, so they are summed (`set_gradient_divide_factor`) where FSDP would average;
- every forward and backward is a collective: ranks with fewer micro-batches run fillers of weight zero, and what
  decides how many there are is agreed on first;
- a parameter is a DTensor between passes and may be a whole tensor after a pass without backward: what reads or writes
  weights reshards first.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator, PartialState
from accelerate.utils import (
    DistributedType,
    FullyShardedDataParallelPlugin,
    fsdp2_prepare_model,
    parse_flag_from_env,
)
from torch import Tensor, nn
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule
from torch.distributed.tensor import DTensor

from fastdpo.training.models.dropout import without_dropout
from fastdpo.training.ranks import Ranks


def check_plugin(plugin: FullyShardedDataParallelPlugin, model: nn.Module) -> None:
    """Raise ValueError for what FSDP cannot do here; `plugin` comes from `fsdp_config` or from accelerate's file."""
    if plugin.fsdp_version != 2:
        raise ValueError(
            f"FSDP version {plugin.fsdp_version} is not supported: it flattens the parameters of a layer "
            "into one. Set version 2 (fsdp_config={'version': 2}, or fsdp_version: 2 in accelerate's file)."
        )
    if plugin.activation_checkpointing:
        raise ValueError(
            "FSDP's activation_checkpointing renames parameters, and the reference is kept by their names. Set "
            "gradient_checkpointing=True instead."
        )
    if "FULL_STATE_DICT" not in str(plugin.state_dict_type):
        raise ValueError(
            f"FSDP's state_dict_type is {plugin.state_dict_type}: no adapter or model could be saved at the end. Set "
            "FULL_STATE_DICT."
        )
    if isinstance(plugin.cpu_offload, CPUOffloadPolicy):
        raise ValueError(
            "FSDP's cpu_offload is not supported: gradients would be clipped by collectives on the CPU. Drop it; "
            "gradient_checkpointing=True and a lower micro_batch_tokens save memory as well."
        )
    kinds = {type(p).__name__: p for p in model.parameters()}
    if "Int8Params" in kinds:
        raise ValueError(
            "model is quantised to 8 bits, whose scales FSDP2 loses when it shards. Use load_in_4bit with "
            "bnb_4bit_quant_storage, or plain data parallelism (drop fsdp)."
        )
    if "Params4bit" in kinds and not kinds["Params4bit"].is_floating_point():
        raise ValueError(
            f"model keeps its 4-bit weights in {kinds['Params4bit'].dtype}, which FSDP2 does not shard and whose "
            "checkpoints it cannot load. Set bnb_4bit_quant_storage to the dtype of the other weights, e.g. bfloat16."
        )


def reshard(model: nn.Module) -> None:
    """Free gathered parameters of `model`: its parameters are DTensors again where they are sharded."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a sharded tensor, sharing its memory; any other tensor itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def gradient_norm(grads: Iterable[Tensor]) -> Tensor:
    """L2 norm (0-D, float32) over all ranks' parts of `grads`; tensors that are not sharded count once."""
    grads = list(grads)
    sharded = [grad.to_local() for grad in grads if isinstance(grad, DTensor)]
    norm = _norm([grad for grad in grads if not isinstance(grad, DTensor)], grads[0].device)
    if not sharded:
        return norm
    squared = _norm(sharded, grads[0].device).square()
    dist.all_reduce(squared)
    return (norm.square() + squared).sqrt()


def _norm(grads: list[Tensor], device: torch.device) -> Tensor:
    if not grads:
        return torch.zeros((), device=device)
    return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads, 2, torch.float32)))


def use_on_cpus(accelerator: Accelerator, plugin_args: dict[str, Any] | None) -> bool:
    """Use FSDP on CPUs where it is asked for, as accelerate drops the plugin there; whether it is used now.

    plugin_args: of `fsdp_config`, or None where accelerate's own file decides.
    """
    state = accelerator.state
    if state.distributed_type != DistributedType.MULTI_CPU:
        return False
    if plugin_args is None and not parse_flag_from_env("ACCELERATE_USE_FSDP"):
        return False
    plugin = FullyShardedDataParallelPlugin(**(plugin_args or {}))
    if state.mixed_precision != "no":
        plugin.set_mixed_precision(state.mixed_precision)
    # Every new AcceleratorState() copies PartialState's
    PartialState().distributed_type = state.distributed_type = DistributedType.FSDP
    state.fsdp_plugin = plugin
    return True


class Sharding:
    """Shards a run's models, and keeps its ranks in step; without FSDP neither is done.

    Args:
        accelerator: of the run.
        enabled: whether FSDP is on.
        ranks: of the run.
    """

    def __init__(self, accelerator: Accelerator, enabled: bool, ranks: Ranks) -> None:
        self.accelerator, self.enabled, self.ranks = accelerator, enabled, ranks

    def check(self, model: nn.Module) -> None:
        """Refuse what cannot be sharded; before `shard`, and before weights are looked at."""
        if self.enabled:
            check_plugin(self.accelerator.state.fsdp_plugin, model)

    def is_due(self, model: nn.Module) -> bool:
        """Whether `model` is still to be sharded."""
        return self.enabled and not isinstance(model, FSDPModule)

    def shard(self, model: nn.Module, optimizer: Any) -> Any:
        """Shard `model` over ranks, in place; returns its optimizer, whose parameters are the sharded ones."""
        plugin = self.accelerator.state.fsdp_plugin
        if plugin.mixed_precision_policy is not None:
            # accelerate would sum gradients, and round what modules return, in the compute dtype
            plugin.mixed_precision_policy = replace(
                plugin.mixed_precision_policy, reduce_dtype=torch.float32, output_dtype=None
            )
        prepared, optimizer = self.accelerator.prepare(model, optimizer)
        if prepared is not model:
            raise RuntimeError(
                f"accelerate prepared a {type(prepared).__name__} beside the model, whose parts hold the model itself."
            )
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.set_gradient_divide_factor(1.0)
                module.set_force_sum_reduction_for_comms(True)
        return optimizer

    def shard_frozen(self, model: nn.Module) -> nn.Module:
        """A model that is not trained, sharded."""
        self.accelerator.state.fsdp_plugin.set_auto_wrap_policy(model)
        return fsdp2_prepare_model(self.accelerator, model)

    @torch.no_grad()
    def settle_dtypes(self, model: nn.Module) -> None:
        """One forward of the policy. FSDP settles the dtype of gradients in its first one, from the parameters that
        need them then: that may not be the reference's, whose adapters are off."""
        with without_dropout(model):
            model(input_ids=torch.zeros((1, 1), dtype=torch.int64, device=self.ranks.device), use_cache=False)

    def most(self, count: int) -> int:
        """The largest `count` of any rank where ranks have to keep step (FSDP), else `count`."""
        return self.ranks.largest(count) if self.enabled else count
