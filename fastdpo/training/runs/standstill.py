"""A run that could train nothing is refused before its folder is touched.

Evaluation and prediction need none of this, so it is asked when training starts.
"""

from __future__ import annotations

import math
from collections.abc import Sized
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import get_scheduler

from fastdpo.shown import shown
from fastdpo.training.options import FastDPOConfig


def refuse_no_steps(args: FastDPOConfig) -> None:
    """Raise ValueError for options by which no step is taken, or none moves a weight."""
    if args.max_steps == 0:
        raise ValueError("max_steps=0 trains nothing. Set the number of steps, or leave it out for num_train_epochs.")
    if args.max_steps < 0 and not args.num_train_epochs > 0:
        raise ValueError(
            f"num_train_epochs={args.num_train_epochs:g} trains nothing. Set it above 0, or set max_steps."
        )
    if args.learning_rate == 0:
        raise ValueError("learning_rate=0 trains nothing. Set it above 0, such as 1e-5; evaluate() needs no training.")


def refuse_standstill(
    args: FastDPOConfig, model: nn.Module, dataset: Sized | None, given: tuple[Any, Any] = (None, None)
) -> None:
    """Raise ValueError where `train` would leave every weight as it is, or could not begin.

    args: whose batch is the optimizer's. dataset: tokenised. given: the user's own optimizer and schedule.
    """
    if dataset is None:
        raise ValueError("train: there is no train_dataset. Build the trainer with one.")
    optimizer, schedule = given
    if optimizer is None:
        refuse_no_steps(args)
    steps = steps_of(args, len(dataset))
    if schedule is None:
        _refuse_zero_rates(args, steps)
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    if not trained:
        raise ValueError("train: every parameter of the model is frozen. Unfreeze the adapter (requires_grad_).")
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            for adapter in module.active_adapters:
                if module.scaling.get(adapter) == 0 and any(p.requires_grad for p in module.parameters()):
                    raise ValueError(
                        f"lora_alpha=0: the LoRA on {name!r} is multiplied by 0, so it neither acts nor moves. Set "
                        "lora_alpha (alpha_pattern) above 0, such as 2·lora_r."
                    )


def steps_of(args: FastDPOConfig, pairs: int) -> int:
    """Optimizer steps of a run on so many pairs. Raises ValueError where there are none."""
    batch = args.train_batch_size * args.world_size
    per_epoch = pairs // batch if args.dataloader_drop_last else math.ceil(pairs / batch)
    if not per_epoch:
        raise ValueError(
            f"dataloader_drop_last=True drops the only batch: there are {pairs} pairs, and a step takes {batch}. Set "
            "it False, or lower per_device_train_batch_size or gradient_accumulation_steps."
            if pairs
            else "train: train_dataset is empty."
        )
    steps = args.max_steps if args.max_steps >= 0 else math.ceil(args.num_train_epochs * per_epoch)
    if steps <= 0:
        refuse_no_steps(args)
    return steps


def _refuse_zero_rates(args: FastDPOConfig, steps: int) -> None:
    """A schedule whose every rate is 0, such as that of one step which is all warm-up."""
    warmup = args.get_warmup_steps(steps)
    probe = torch.optim.SGD([nn.Parameter(torch.zeros(()))], lr=1.0)
    try:
        schedule = get_scheduler(
            args.lr_scheduler_type,
            optimizer=probe,
            num_warmup_steps=warmup,
            num_training_steps=steps,
            scheduler_specific_kwargs=args.lr_scheduler_kwargs,
        )
        still = isinstance(schedule, LambdaLR) and not any(schedule.lr_lambdas[0](step) for step in range(steps))
    except (ValueError, TypeError, ArithmeticError, LookupError) as error:
        raise ValueError(
            f"lr_scheduler_type={args.lr_scheduler_type.value!r} cannot be made with lr_scheduler_kwargs="
            f"{args.lr_scheduler_kwargs!r}: {shown(error)}. Give it the arguments that transformers.get_scheduler "
            "names, or choose another."
        ) from error
    if still:
        raise ValueError(
            f"lr_scheduler_type={args.lr_scheduler_type.value!r} with {warmup} steps of warm-up gives each of the "
            f"{steps} steps a rate of 0, which trains nothing. Lower warmup_steps, or train longer."
        )
