"""Which options of training act only beside others: where those are not set, they are refused or noted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fastdpo.training.options.fields import is_set
from fastdpo.training.options.kinds import OptionError
from fastdpo.training.options.unused import without_effect

#: Whether a GPU is in it.
_OnGPU = bool
_EVALUATES = "set eval_strategy to steps or epoch, or drop it."
#: (options, whether they act, what to do).
_RULES: tuple[tuple[tuple[str, ...], Callable[[Any, _OnGPU], Any], str], ...] = (
    (("eval_steps",), lambda args, gpu: args.eval_strategy == "steps", "set eval_strategy=steps or drop it."),
    (("eval_delay",), lambda args, gpu: args.eval_strategy != "no", _EVALUATES),
    (("save_steps",), lambda args, gpu: args.save_strategy == "steps", "set save_strategy=steps or drop it."),
    (
        ("logging_steps",),
        lambda args, gpu: "steps" in (args.logging_strategy, args.eval_strategy),
        "set logging_strategy=steps or drop it.",
    ),
    (
        ("greater_is_better",),
        lambda args, gpu: args.metric_for_best_model or args.load_best_model_at_end or _reads_metric(args),
        "set metric_for_best_model or drop it.",
    ),
    (
        ("warmup_steps",),
        lambda args, gpu: args.lr_scheduler_type != "constant",
        "set lr_scheduler_type=constant_with_warmup or drop it.",
    ),
    (("fsdp_config",), lambda args, gpu: args.fsdp or not args.fsdp_config, "set fsdp=True or drop it."),
    (("hub_strategy", "hub_always_push"), lambda args, gpu: args.push_to_hub, "set push_to_hub=True or drop it."),
    (
        ("dataloader_persistent_workers",),
        lambda args, gpu: args.dataloader_num_workers,
        "set dataloader_num_workers or drop it.",
    ),
    (
        ("gradient_checkpointing_kwargs", "activation_checkpointing_kwargs"),
        lambda args, gpu: args.gradient_checkpointing != "false",
        "gradient_checkpointing='false' checkpoints no layer; leave that at auto, or drop it.",
    ),
    (("torch_empty_cache_steps",), lambda args, gpu: gpu, "this run is on a CPU, which has no such cache. Drop it."),
    (
        ("head_workspace",),
        lambda args, gpu: gpu or args.backend == "triton",
        "on a CPU the head takes no workspace. Drop it.",
    ),
    (
        ("activation_offloading",),
        lambda args, gpu: gpu,
        "it moves activations from a GPU to the host, where this run is already. Drop it; "
        "gradient_checkpointing=True saves memory here.",
    ),
    (
        ("offload_embeddings",),
        lambda args, gpu: gpu,
        "it keeps the embedding from a GPU, and this run is on the host. Drop it.",
    ),
    (
        ("expandable_segments",),
        lambda args, gpu: gpu,
        "this run is on a CPU, whose memory torch takes in another way. Drop it.",
    ),
    (
        ("use_liger_kernel",),
        lambda args, gpu: gpu,
        "liger-kernel's functions are for GPUs, and this run is on a CPU. Drop it.",
    ),
    (
        ("use_liger_kernel",),
        lambda args, gpu: args.lean_body != "off",
        "its functions serve in the lean body, and lean_body='off'. Set lean_body to auto or on, or drop it.",
    ),
    (
        ("reference_cache_dir",),
        lambda args, gpu: args.reference != "online",
        "reference='online' keeps nothing. Choose lazy or precompute.",
    ),
)


def _reads_metric(args: Any) -> bool:
    return args.lr_scheduler_type in ("reduce_lr_on_plateau", "greedy") or args.save_strategy == "best"


def check_effects(args: Any, on_gpu: bool) -> None:
    """Refuse or note each option that is set and does not act. Raises OptionError."""
    for names, acts, advice in _RULES:
        for name in names:
            if name in args.__dataclass_fields__ and is_set(args, name) and not acts(args, on_gpu):
                without_effect(args, name, advice)
    if args.load_best_model_at_end and args.eval_strategy == "no":
        raise OptionError(
            "load_best_model_at_end=True compares checkpoints by their evaluations, but eval_strategy='no'. Set "
            "eval_strategy and save_strategy to the same, steps or epoch."
        )
