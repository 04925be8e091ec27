"""What `FastDPOTrainer` does to its arguments before it can train: load what is named, refuse what cannot be used."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model
from transformers import AutoTokenizer, BitsAndBytesConfig, PreTrainedModel, PreTrainedTokenizerBase

from fastdpo.training.models.dropout import disable_dropout
from fastdpo.training.models.loading import load_causal_lm
from fastdpo.training.models.quantized import is_quantized, keep_quantized_layers_trainable
from fastdpo.training.options import FastDPOConfig

logger = logging.getLogger(__name__)


def model_name(model: str | PreTrainedModel) -> str:
    name = model if isinstance(model, str) else getattr(getattr(model, "config", None), "_name_or_path", "")
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
    model: str | PreTrainedModel,
    ref_model: str | PreTrainedModel | None,
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
    for each in (model, ref_model):
        if each is not None:
            keep_quantized_layers_trainable(each)
            if args.disable_dropout and (lost := disable_dropout(each)) and peft_config is not None:
                logger.warning("disable_dropout=True switches off a dropout of %s. Set it False to keep it.", lost)
    return model, ref_model


def resolve_model(
    model: str | PreTrainedModel, args: FastDPOConfig, quantization: BitsAndBytesConfig | None, argument: str
) -> PreTrainedModel:
    if isinstance(model, str):
        assert not isinstance(args.model_init_kwargs, str)  # parsed by TrainingArguments
        kwargs = dict(args.model_init_kwargs or {})
        if quantization is not None:
            kwargs["quantization_config"] = quantization
        return load_causal_lm(model, **kwargs)
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
        ours, theirs = (m.config.get_text_config().vocab_size for m in (model, ref_model))
        if ours != theirs:
            raise ValueError(
                f"ref_model has a vocabulary of {theirs}, model one of {ours}; they must share a tokenizer."
            )


def resolve_tokenizer(processing_class: Any, model: PreTrainedModel) -> PreTrainedTokenizerBase:
    if processing_class is None:
        if not model.config._name_or_path:
            raise ValueError("processing_class is missing, and model was not loaded by a name that says which it is.")
        return AutoTokenizer.from_pretrained(model.config._name_or_path)
    if not isinstance(processing_class, PreTrainedTokenizerBase):
        raise TypeError(f"processing_class is a {type(processing_class).__name__}; a text tokenizer is needed.")
    return processing_class


def with_adapter(model: PreTrainedModel, peft_config: PeftConfig | None) -> PreTrainedModel:
    if peft_config is None:
        if is_quantized(model) and not isinstance(model, PeftModel):
            raise ValueError("model is quantised, so its weights cannot be trained. Pass peft_config=LoraConfig(...).")
        if not any(p.requires_grad for p in model.parameters()):
            raise ValueError(
                "model has no trainable parameter. Load the adapter with is_trainable=True, or pass peft_config."
            )
        return model
    if not isinstance(peft_config, PeftConfig):
        raise TypeError(f"peft_config is a {type(peft_config).__name__}; give a peft.LoraConfig.")
    if isinstance(model, PeftModel):
        raise ValueError(
            "model has an adapter already. Train that further without peft_config, or merge_and_unload() it first."
        )
    if peft_config.is_prompt_learning:
        raise ValueError(f"peft_config={type(peft_config).__name__} adds virtual tokens; use LoRA.")
    return get_peft_model(model, peft_config)


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


def fold_accumulation(args: FastDPOConfig) -> FastDPOConfig:
    """A copy of `args` whose dataloader batch is the whole optimizer batch: transformers accumulates nothing, and
    checkpoints no layers."""
    folded = copy.copy(args)
    folded.per_device_train_batch_size = args.per_device_train_batch_size * args.gradient_accumulation_steps
    folded.gradient_accumulation_steps = 1
    # transformers would switch it on at once; here it belongs to the memory plan, which reads `checkpointing`
    folded.checkpointing, folded.gradient_checkpointing = args.gradient_checkpointing, False  # type: ignore[assignment]
    return folded
