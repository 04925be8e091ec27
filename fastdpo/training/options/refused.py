"""Options of transformers' TrainingArguments that this trainer cannot honour, each refused by name with what to do."""

from __future__ import annotations

import inspect
from typing import Any

from torch.utils.checkpoint import checkpoint
from transformers import TrainingArguments
from transformers.debug_utils import DebugOption
from transformers.trainer_pt_utils import AcceleratorConfig

from fastdpo.training.options.kinds import OptionError, kinds_of, seen, suggestion
from fastdpo.version import __version__

_ADAPTER_HELP = "`{}` acts on how transformers' Trainer {}, which this trainer replaces. Leave it unset."
_RECOMPILES = "Micro-batches vary in shape from step to step, so every step would recompile."
#: TrainingArguments that cannot be honoured: name -> (accepted values, reason and next step).
REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    "auto_find_batch_size": (
        (False,),
        "It changes the batch that β is computed on. Lower `micro_batch_tokens` instead.",
    ),
    "average_tokens_across_devices": ((True,), "Losses are always averaged over the global batch of pairs."),
    "batch_eval_metrics": ((False,), "Preference metrics need the whole evaluation set."),
    "bf16_full_eval": ((False,), "It would cast the reference too. Load the model in that dtype with `--dtype`."),
    "fp16_full_eval": ((False,), "It would cast the reference too. Load the model in that dtype with `--dtype`."),
    "ddp_bucket_cap_mb": ((None,), _ADAPTER_HELP.format("ddp_bucket_cap_mb", "reduces gradients")),
    "ddp_find_unused_parameters": (
        (None, False),
        _ADAPTER_HELP.format("ddp_find_unused_parameters", "reduces gradients"),
    ),
    "ddp_static_graph": ((None, False), _ADAPTER_HELP.format("ddp_static_graph", "reduces gradients")),
    "deepspeed": ((None,), "Run with plain data parallelism (torchrun, accelerate launch)."),
    "do_predict": ((False,), "Use `trainer.predict(dataset)`."),
    "enable_jit_checkpoint": ((False,), "SIGTERM and SIGINT save a checkpoint already."),
    "eval_do_concat_batches": ((True,), "Preference metrics need the whole evaluation set."),
    "include_for_metrics": (([],), "The metrics are computed from log-probabilities only."),
    "label_names": ((None,), "Pairs have no labels."),
    "label_smoothing_factor": ((0.0,), "It smooths token labels. For noisy preferences set `label_smoothing`."),
    "length_column_name": (("length",), "Batches are not grouped by length; micro-batches are sorted by it."),
    "liger_kernel_config": ((None,), "It says what liger-kernel patches, and here nothing is patched."),
    "logging_nan_inf_filter": (
        (False,),
        "It would hide a non-finite loss, which stops the run here. It is on in transformers: leave it out of what "
        "TrainingArguments(...).to_dict() gives, or set it False.",
    ),
    "neftune_noise_alpha": ((None,), "Noise on the embeddings would differ between the scored and the trained pass."),
    "parallelism_config": ((None,), "Run with plain data parallelism (torchrun, accelerate launch)."),
    "prediction_loss_only": ((False,), "Evaluation always reports the preference metrics."),
    "save_on_each_node": ((False,), "A run has one folder, which every node must see."),
    "torch_compile": ((False,), _RECOMPILES),
    "torch_compile_backend": ((None,), _RECOMPILES),
    "torch_compile_mode": ((None,), _RECOMPILES),
}
REFUSED_OPTIMIZERS = ("lomo", "adalomo")


def refuse_optimizer(optim: str) -> None:
    """Raise OptionError for an optimizer that cannot be used."""
    name = str(getattr(optim, "value", optim))
    if name in REFUSED_OPTIMIZERS or name.endswith("_layerwise"):
        raise OptionError(
            f"optim={name!r} steps inside the backward pass, before gradients are summed. Set optim=auto, or another."
        )


def refuse_unsupported(args: TrainingArguments) -> None:
    """Raise ValueError for an option that would be ignored or change what a step computes."""
    for name, (accepted, reason) in REFUSED.items():
        value = getattr(args, name, accepted[0])
        if value not in accepted:
            raise OptionError(f"{name}={value!r} is not supported by fastdpo {__version__}. {reason}")
    if args.train_sampling_strategy not in ("random", "sequential"):
        raise ValueError(
            f"train_sampling_strategy={args.train_sampling_strategy!r} cannot be resumed exactly, and "
            "micro-batches are sorted by length anyway. Accepted are 'random' and 'sequential'."
        )
    if args.router_aux_loss_coef not in (None, 0.0):
        raise ValueError(f"router_aux_loss_coef={args.router_aux_loss_coef}: only 0.0 is supported.")


def read_accelerator_config(settings: Any) -> Any:
    """A mapping with its values as accelerate's settings hold them. Raises OptionError for one that there is not."""
    if not isinstance(settings, dict):
        return settings
    kinds = kinds_of(AcceleratorConfig)
    for name in settings:
        if name not in kinds:
            near = suggestion(str(name), kinds)
            raise OptionError(f"accelerator_config: {seen(name)} is unknown; accepted are {', '.join(kinds)}.{near}")
    return {name: kinds[name].read(f"accelerator_config: {name}", value) for name, value in settings.items()}


def check_debug(debug: Any) -> None:
    """Raise OptionError for a word that transformers' `debug` does not know."""
    known = [each.value for each in DebugOption]
    for word in debug.split() if isinstance(debug, str) else debug or ():
        if word not in known:
            raise OptionError(f"debug={seen(word)} is unknown; accepted are {', '.join(known)}.")


def check_checkpointing_arguments(option: str, settings: Any) -> None:
    """Raise OptionError for a word that torch's checkpointing does not take."""
    parameters = inspect.signature(checkpoint).parameters.values()
    # Read by torch from its **kwargs, whose others it gives to the layer
    known = ["preserve_rng_state"]
    known += [each.name for each in parameters if each.kind is each.POSITIONAL_OR_KEYWORD and each.name != "function"]
    known += [each.name for each in parameters if each.kind is each.KEYWORD_ONLY]
    for name in settings or ():
        if name not in known:
            near = suggestion(str(name), known)
            raise OptionError(f"{option}: {seen(name)} is unknown; accepted are {', '.join(sorted(known))}.{near}")


def refuse_unsupported_sharing(args: TrainingArguments) -> None:
    """Raise ValueError for ways to share the work that cannot be honoured; of options that transformers has read."""
    version = (args.fsdp_config or {}).get("version", 2)
    if args.fsdp and int(version) != 2:
        raise ValueError(
            f"fsdp_config: version={version!r} is not supported by fastdpo {__version__}: FSDP1 flattens the "
            "parameters of a layer into one. Leave version out, or set it to 2."
        )
    if args.fsdp:
        refuse_sharded_embeddings(args)
    if (args.accelerator_config.gradient_accumulation_kwargs or {}).get("num_steps", 1) != 1:
        raise ValueError("accelerator_config: set gradient_accumulation_steps instead of num_steps.")
    if args.accelerator_config.split_batches or args.accelerator_config.dispatch_batches:
        raise ValueError("accelerator_config: split_batches and dispatch_batches are not supported; leave them off.")
    if not args.accelerator_config.even_batches:
        raise ValueError("accelerator_config: even_batches must stay on; wrapped pairs get zero weight here.")


def refuse_sharded_embeddings(args: Any) -> None:
    """Raise ValueError for `offload_embeddings` of a run with FSDP."""
    if args.offload_embeddings:
        raise ValueError(
            "offload_embeddings=True: FSDP shards the embedding over the GPUs, and gathers it there. Drop "
            "offload_embeddings, or fsdp."
        )
