"""What `FastDPOTrainer` does to its arguments before it can train: load what is named, refuse what cannot be used."""

from __future__ import annotations

import copy
import logging
import os
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from transformers import BitsAndBytesConfig, PreTrainedModel, PreTrainedTokenizerBase

from fastdpo.shown import listed
from fastdpo.training.models.adapters import with_adapter
from fastdpo.training.models.dropout import disable_dropout
from fastdpo.training.models.finite import frozen_weights, nonfinite, trained_weights
from fastdpo.training.models.loading import load_causal_lm, read_tokenizer
from fastdpo.training.models.offloaded_embeddings import offload_embeddings
from fastdpo.training.models.quantized import keep_quantized_layers_trainable
from fastdpo.training.options import FastDPOConfig

logger = logging.getLogger(__name__)


def model_name(model: str | os.PathLike[str] | PreTrainedModel) -> str:
    name = (
        os.fspath(model)
        if isinstance(model, (str, os.PathLike))
        else getattr(getattr(model, "config", None), "_name_or_path", "")
    )
    return Path(name).name or "model"


def named_folder(source: Any) -> str | None:
    """The local folder that a model or tokenizer was loaded from; None where it is of the hub, or made by hand."""
    name = getattr(source, "name_or_path", None)  # transformers keeps it there for both
    return str(name) if name and Path(name).is_dir() else None


def adapter_files(model: PreTrainedModel) -> list[str]:
    """The weights of adapters with names of their own, which peft keeps in folders of these names."""
    named = model.peft_config if isinstance(model, PeftModel) else ()
    return [f"{name}/adapter_model.safetensors" for name in named if name != "default"]


def prepare_models(
    model: str | os.PathLike[str] | PreTrainedModel,
    ref_model: str | os.PathLike[str] | PreTrainedModel | None,
    args: FastDPOConfig,
    quantization: BitsAndBytesConfig | None,
    peft_config: PeftConfig | None,
) -> tuple[PreTrainedModel, PreTrainedModel | None]:
    """The policy with its adapter, and the separate reference if there is one, ready to be trained and scored.

    Raises ValueError, TypeError, FileNotFoundError.
    """
    model = resolve_model(model, args, quantization, "model")
    ref_model = None if ref_model is None else resolve_model(ref_model, args, quantization, "ref_model")
    check_models(model, ref_model, args)
    model = with_adapter(model, peft_config)
    if ref_model is not None:
        ref_model.requires_grad_(False)
    for argument, each in (("model", model), ("ref_model", ref_model)):
        if each is not None:
            check_finite(each, argument, args)
            keep_quantized_layers_trainable(each)
            if args.disable_dropout and (lost := disable_dropout(each)) and peft_config is not None:
                logger.warning("disable_dropout=True switches off a dropout of %s. Set it False to keep it.", lost)
            if args.offload_embeddings:
                offload_embeddings(each, args.device, argument)
    return model, ref_model


def resolve_model(
    model: str | os.PathLike[str] | PreTrainedModel,
    args: FastDPOConfig,
    quantization: BitsAndBytesConfig | None,
    argument: str,
) -> PreTrainedModel:
    if isinstance(model, (str, os.PathLike)):
        assert not isinstance(args.model_init_kwargs, str)  # parsed by TrainingArguments
        kwargs = dict(args.model_init_kwargs or {})
        if quantization is not None:
            kwargs["quantization_config"] = quantization
        return load_causal_lm(os.fspath(model), argument=argument, **kwargs)
    if quantization is not None and argument == "model":
        raise ValueError(
            "quantization_config acts while a model is loaded, but model is an object. Pass model by name."
        )
    if args.model_init_kwargs and argument == "model":
        raise ValueError("model_init_kwargs acts while a model is loaded, but model is an object. Pass model by name.")
    return model


def check_trainable_causal_lm(model: PreTrainedModel, argument: str = "model") -> None:
    """Refuse models that preference losses cannot be computed on. Raises TypeError or ValueError."""
    config = getattr(model, "config", None)
    if config is None or not hasattr(model, "get_output_embeddings"):
        raise TypeError(
            f"{argument} is a {type(model).__name__}; a transformers causal LM or its PEFT wrapper is needed."
        )
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(
            f"{argument} is an encoder-decoder ({type(model).__name__}); only decoder-only models are supported."
        )
    if model.get_output_embeddings() is None:
        raise ValueError(
            f"{argument} is a {type(model).__name__} without a language-model head. Load it with AutoModelForCausalLM."
        )
    if isinstance(model, PeftModel) and model.active_peft_config.is_prompt_learning:
        raise ValueError(
            f"{argument} has a {model.active_peft_config.peft_type.value} adapter, whose virtual tokens shift every "
            "position. Use LoRA or another adapter of weights."
        )


def refuse_router_loss(config: Any, coefficient: float | None) -> None:
    """Mixture-of-experts models whose auxiliary loss would be dropped are refused unless it is switched off."""
    text = config.get_text_config()
    declared = getattr(text, "router_aux_loss_coef", 0.0) if hasattr(text, "output_router_logits") else 0.0
    if coefficient is None and declared:
        raise ValueError(
            f"{type(config).__name__} declares router_aux_loss_coef={declared}, and the auxiliary loss of a mixture of "
            "experts is not supported. Set router_aux_loss_coef=0.0 to train without it."
        )


def check_models(model: PreTrainedModel, ref_model: PreTrainedModel | None, args: FastDPOConfig) -> None:
    if ref_model is model:
        raise ValueError(
            "ref_model is the same object as model, so it would be trained too. Leave it out: the reference "
            "is then the model as it is now."
        )
    check_trainable_causal_lm(model)
    refuse_router_loss(model.config, args.router_aux_loss_coef)
    if ref_model is not None:
        check_trainable_causal_lm(ref_model, "ref_model")
        check_apart(model, ref_model)
        ours, theirs = (m.config.get_text_config().vocab_size for m in (model, ref_model))
        if ours != theirs:
            raise ValueError(
                f"ref_model has a vocabulary of {theirs}, model one of {ours}; they must share a tokenizer."
            )


def check_finite(model: PreTrainedModel, argument: str, args: FastDPOConfig) -> None:
    """Refuse trained weights that are not finite, and say which others are not: pairs that never read them train."""
    if args.fsdp and args.process_index:  # whose weights may come from the first rank, later
        return
    if bad := nonfinite(trained_weights(model) if argument == "model" else {}):
        raise ValueError(
            f"{argument}: {len(bad)} of the weights to be trained are not finite: {listed(bad)}. Load weights that "
            "are, such as an earlier checkpoint of the run that they come from."
        )
    if bad := nonfinite(frozen_weights(model)):
        logger.warning(
            "%s: %d weights hold numbers that are not finite: %s. A pair that reads one stops the run.",
            argument, len(bad), listed(bad),
        )  # fmt: skip


def check_apart(model: PreTrainedModel, ref_model: PreTrainedModel) -> None:
    """Refuse a reference that would be trained with the policy, as it holds some of the same tensors."""
    own = {_memory(p): name for name, p in model.named_parameters()}
    shared = [(name, own[key]) for name, p in ref_model.named_parameters() if (key := _memory(p)) in own]
    if shared:
        name, ours = shared[0]
        raise ValueError(
            f"ref_model shares {len(shared)} weights with model, {name!r} first (there {ours!r}), so it would change "
            "as model is trained. Leave ref_model out: the reference is then the model as it is now; or give a copy "
            "(copy.deepcopy, or loaded again)."
        )


def _memory(parameter: torch.Tensor) -> tuple[str, int]:
    """What two parameters have in common that share memory, or are one."""
    start = 0 if parameter.is_meta else parameter.untyped_storage().data_ptr()
    return (str(parameter.device), start) if start else ("object", id(parameter))


def resolve_tokenizer(processing_class: Any, model: PreTrainedModel) -> PreTrainedTokenizerBase:
    if processing_class is None:
        if not model.config._name_or_path:
            raise ValueError("processing_class is missing, and model was not loaded by a name that says which it is.")
        return read_tokenizer(model.config._name_or_path, "processing_class")
    if not isinstance(processing_class, PreTrainedTokenizerBase):
        raise TypeError(f"processing_class is a {type(processing_class).__name__}; a text tokenizer is needed.")
    return processing_class


def check_optimizer(optimizer: torch.optim.Optimizer | None, model: PreTrainedModel) -> None:
    """Refuse an optimizer that would not move what is trained: made before the adapter was, or from another model."""
    if optimizer is None:
        return
    trained = {id(p): name for name, p in model.named_parameters() if p.requires_grad}
    held = [id(p) for group in optimizer.param_groups for p in group["params"]]
    if missing := [name for key, name in trained.items() if key not in set(held)]:
        others = sum(key not in trained for key in held)
        raise ValueError(
            f"optimizers: the {type(optimizer).__name__} holds {len(held)} parameters, {others} of which are not "
            f"trained, and lacks {len(missing)} that are, {missing[0]} among them. Make it from the parameters of the "
            "model with its adapter (peft.get_peft_model first), or leave it out."
        )
    for group in optimizer.param_groups:
        rate = group.get("initial_lr", group["lr"])  # a schedule of the user's own has set lr to its first rate
        still = [trained[id(p)] for p in group["params"] if id(p) in trained]
        if rate == 0 and still:
            raise ValueError(
                f"optimizers: a group of the {type(optimizer).__name__} has lr=0 and holds {len(still)} parameters "
                f"that are to be trained, {still[0]} among them. Give it a rate, or freeze them."
            )


class _Withheld(str):
    """An option that transformers reads as off, and that says what was asked to whoever builds options from it."""

    def __bool__(self) -> bool:
        return False


def fold_accumulation(args: FastDPOConfig) -> FastDPOConfig:
    """A copy of `args` whose dataloader batch is the whole optimizer batch: transformers accumulates nothing,
    checkpoints no layers, and has liger-kernel patch nothing."""
    folded = copy.copy(args)
    folded.per_device_train_batch_size = args.per_device_train_batch_size * args.gradient_accumulation_steps
    folded.gradient_accumulation_steps = 1
    # transformers would switch it on at once; here it belongs to the memory plan, which reads `checkpointing`
    folded.checkpointing = args.gradient_checkpointing
    folded.gradient_checkpointing = _Withheld(args.gradient_checkpointing)
    if args.use_liger_kernel:  # the lean body reads `liger`
        folded.use_liger_kernel = _Withheld("true")  # type: ignore[assignment]
    return folded
