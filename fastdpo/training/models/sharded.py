"""FSDP2: the trainer's model with its parameters sharded over ranks, layer by layer (`fully_shard`, by accelerate).

Three things differ from plain data parallelism:
- gradients are reduce-scattered in the backward of every micro-batch. dL/dlogp belongs to the mean over all ranks'
  pairs already, so they are summed (`set_gradient_divide_factor`) where FSDP would average;
- every forward and backward is a collective: ranks with fewer micro-batches run fillers of weight zero, and what
  decides how many there are is agreed on first;
- a parameter is a DTensor between passes and may be a whole tensor after a pass without backward: what reads or writes
  weights reshards first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.utils import (
    DistributedType,
    FullyShardedDataParallelPlugin,
    fsdp2_prepare_model,
    parse_flag_from_env,
)
from torch import Tensor, nn
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule
from torch.distributed.tensor import DTensor
from transformers import Trainer

from fastdpo.training.models.loading import without_dropout

if TYPE_CHECKING:
    from fastdpo.training.reference.policy import ReferencePolicy
    from fastdpo.training.rows.batch import TokenBatch
    from fastdpo.training.rows.choice import LayoutChoice
    from fastdpo.training.rows.layout import MicroBatch


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


class ShardedMixin(Trainer):
    """Shards the trainer's model, and keeps ranks in step."""

    model: Any
    optimizer: Any
    is_fsdp_enabled: bool
    reference: ReferencePolicy
    layouts: LayoutChoice
    cut: Callable[..., list[MicroBatch]]

    def create_accelerator_and_postprocess(self) -> None:
        """As transformers', and where FSDP is asked for on CPUs it is used: accelerate drops the plugin there."""
        super().create_accelerator_and_postprocess()
        state = self.accelerator.state
        if self.is_fsdp_enabled or state.distributed_type != DistributedType.MULTI_CPU:
            return
        if self.args.fsdp_plugin_args is not None or parse_flag_from_env("ACCELERATE_USE_FSDP"):
            plugin = FullyShardedDataParallelPlugin(**(self.args.fsdp_plugin_args or {}))
            if state.mixed_precision != "no":
                plugin.set_mixed_precision(state.mixed_precision)
            # Every new AcceleratorState() copies PartialState's
            PartialState().distributed_type = state.distributed_type = DistributedType.FSDP
            state.fsdp_plugin = plugin
            self.is_fsdp_enabled = True

    def check_sharding(self) -> None:
        """Refuse what cannot be sharded; before `shard`, and before weights are looked at."""
        if self.is_deepspeed_enabled:
            raise ValueError("DeepSpeed is not supported; shard with FSDP2 (fsdp=True), or launch with torchrun.")
        if self.is_fsdp_enabled:
            check_plugin(self.accelerator.state.fsdp_plugin, self.model)

    def shard(self) -> None:
        """Shard model and reference over ranks, once; training and evaluation call it before their first forward."""
        if not self.is_fsdp_enabled or isinstance(self.model, FSDPModule):
            return
        plugin = self.accelerator.state.fsdp_plugin
        if plugin.mixed_precision_policy is not None:
            # accelerate would sum gradients, and round what modules return, in the compute dtype
            plugin.mixed_precision_policy = replace(
                plugin.mixed_precision_policy, reduce_dtype=torch.float32, output_dtype=None
            )
        self.create_optimizer()
        self.model, self.optimizer = self.accelerator.prepare(self.model, self.optimizer)
        self.model_wrapped = self.model
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                module.set_gradient_divide_factor(1.0)
                module.set_force_sum_reduction_for_comms(True)
        if self.reference.ref_model is not None:
            plugin.set_auto_wrap_policy(self.reference.ref_model)
            self.reference.ref_model = fsdp2_prepare_model(self.accelerator, self.reference.ref_model)
        self.reference.shard()
        # FSDP settles the dtype of gradients in its first forward, from the parameters that need them then: that may
        # not be the reference's, whose adapters are off.
        with torch.no_grad(), without_dropout(self.model):
            self.model(input_ids=torch.zeros((1, 1), dtype=torch.int64, device=self.args.device), use_cache=False)

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: Any) -> Any:
        self.shard()
        reshard(self.model)  # accelerate looks for the optimizer's parameters in the model once more
        return super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """As transformers', on the sharded model."""
        self.shard()
        return super().evaluation_loop(*args, **kwargs)

    def most(self, count: int) -> int:
        """The largest `count` of any rank where ranks have to keep step (FSDP), else `count`."""
        if not self.is_fsdp_enabled:
            return count
        largest = torch.tensor(count, device=self.args.device)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
        return int(largest)

    def in_step(self, batch: TokenBatch, micros: Sequence[MicroBatch]) -> Iterator[tuple[MicroBatch, bool]]:
        """The micro-batches, each True. Where ranks have to keep step, those with fewer than others get fillers, False:
        they go through the same forwards and backwards and count for nothing."""
        missing = self.most(len(micros)) - len(micros)
        for micro in micros:
            yield micro, True
        if missing:
            shortest = min(range(len(batch)), key=lambda i: batch.pairs[i].tokens(self.layouts.layout))
            (filler,) = self.cut(batch, 1, [shortest])
            for _ in range(missing):
                yield filler, False
