"""Loading: from a `ModelConfig` to the model, its quantisation, its adapter and its tokenizer."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model_state_dict
from peft.utils import load_peft_weights
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from fastdpo.data.rendering import set_chat_template
from fastdpo.training.options import ModelConfig


def resolve_dtype(name: str) -> torch.dtype:
    """The dtype that `ModelConfig.dtype` names; "auto" is bfloat16 on a GPU that has it and float32 elsewhere."""
    if name == "auto":
        return torch.bfloat16 if torch.cuda.is_available() and torch.cuda.is_bf16_supported() else torch.float32
    return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[name]


def quantization_config(config: ModelConfig) -> BitsAndBytesConfig | None:
    """4-bit settings for from_pretrained, or None. Raises ImportError where bitsandbytes is missing."""
    if not config.load_in_4bit:
        return None
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ImportError("load_in_4bit=True needs bitsandbytes: pip install bitsandbytes, or drop --load_in_4bit.")
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=config.bnb_4bit_quant_type,
        bnb_4bit_use_double_quant=config.bnb_4bit_use_double_quant,
        bnb_4bit_compute_dtype=resolve_dtype(config.dtype),
        bnb_4bit_quant_storage=getattr(torch, config.bnb_4bit_quant_storage),
    )


def load_causal_lm(name_or_path: str, **kwargs: Any) -> PreTrainedModel:
    """from_pretrained, with errors that say what was looked for. Raises FileNotFoundError, ValueError."""
    name_or_path = os.path.expanduser(name_or_path)
    load_config(name_or_path, kwargs.get("revision"), kwargs.get("trust_remote_code", False))
    return AutoModelForCausalLM.from_pretrained(name_or_path, **kwargs)


def load_config(name_or_path: str, revision: str | None = None, trust_remote_code: bool = False) -> PretrainedConfig:
    """The configuration of a causal LM. Raises FileNotFoundError, OSError, ValueError."""
    name_or_path = os.path.expanduser(name_or_path)
    _check_model_path(name_or_path)
    config = AutoConfig.from_pretrained(name_or_path, revision=revision, trust_remote_code=trust_remote_code)
    if type(config) not in AutoModelForCausalLM._model_mapping and not getattr(config, "auto_map", None):
        raise ValueError(
            f"model={name_or_path!r} is a {type(config).__name__}, which has no causal language-model head. "
            "Give a decoder-only model, such as a Llama, Mistral, Qwen or Gemma."
        )
    return config


def _check_model_path(name_or_path: str) -> None:
    path = Path(name_or_path)
    looks_local = name_or_path.startswith((".", "/", "~")) or name_or_path.count("/") > 1
    if looks_local and not path.exists():
        raise FileNotFoundError(f"model={name_or_path!r}: no such folder. Give a local folder or a hub name.")
    if path.is_dir() and not (path / "config.json").is_file():
        hint = " It holds a PEFT adapter: pass it as adapter_name_or_path." if _is_adapter(path) else ""
        raise FileNotFoundError(f"model={name_or_path!r}: the folder has no config.json.{hint}")


def _is_adapter(path: Path) -> bool:
    return (path / "adapter_config.json").is_file()


def load_model(config: ModelConfig) -> PreTrainedModel:
    """The model that `config` names, with its existing adapter if one is named (trainable)."""
    if config.model_name_or_path is None:
        raise ValueError("model_name_or_path is required: a local folder or a hub name.")
    model = load_causal_lm(
        config.model_name_or_path,
        revision=config.model_revision or "main",
        dtype=resolve_dtype(config.dtype),
        quantization_config=quantization_config(config),
        trust_remote_code=config.trust_remote_code,
        **({"attn_implementation": config.attn_implementation} if config.attn_implementation else {}),
    )
    return load_adapter(model, config.adapter_name_or_path) if config.adapter_name_or_path else model


def load_adapter(model: PreTrainedModel, name_or_path: str) -> PeftModel:
    """`model` with the adapter at `name_or_path`, trainable.

    Raises FileNotFoundError where there is none, ValueError where it does not fit the model.
    """
    name_or_path = os.path.expanduser(name_or_path)
    path = Path(name_or_path)
    if path.is_dir() and not _is_adapter(path):
        raise FileNotFoundError(f"adapter={name_or_path!r}: the folder has no adapter_config.json.")
    if not path.exists() and (name_or_path.startswith((".", "/", "~")) or name_or_path.count("/") > 1):
        raise FileNotFoundError(f"adapter={name_or_path!r}: no such folder. Give a local folder or a hub name.")
    advice = "Give the base model that the adapter was trained on (base_model_name_or_path in its adapter_config.json)."
    misfit = f"adapter={name_or_path!r} does not fit the model {getattr(model.config, '_name_or_path', '')!r}"
    try:
        adapted = PeftModel.from_pretrained(model, name_or_path, is_trainable=True)
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"{misfit}: {error}. {advice}") from error
    # peft only warns of layers that the adapter has and the model lacks, or the reverse.
    stray = load_peft_weights(name_or_path, device="cpu").keys() ^ get_peft_model_state_dict(adapted).keys()
    if stray:
        raise ValueError(f"{misfit}: {len(stray)} weights are in one only, such as {min(stray)}. {advice}")
    return adapted


def lora_config(config: ModelConfig) -> PeftConfig | None:
    """A fresh LoRA as `config` describes; None where an existing adapter is trained further or every weight is."""
    if not config.use_lora or config.adapter_name_or_path:
        return None
    modules = config.lora_target_modules
    return LoraConfig(
        r=config.lora_r,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=modules[0] if modules == ["all-linear"] else modules,
        modules_to_save=config.lora_modules_to_save,
        use_rslora=config.use_rslora,
        use_dora=config.use_dora,
        task_type="CAUSAL_LM",
    )


def load_tokenizer(config: ModelConfig) -> PreTrainedTokenizerBase:
    """The tokenizer that `config` names, with its chat template replaced where one is given."""
    own = config.tokenizer_name_or_path
    source = os.path.expanduser(own or config.model_name_or_path or "")
    revision = "main" if own else config.model_revision or "main"  # the model's revision says nothing of another repo
    tokenizer = AutoTokenizer.from_pretrained(source, revision=revision, trust_remote_code=config.trust_remote_code)
    if config.chat_template:
        set_chat_template(tokenizer, Path(config.chat_template).expanduser())
    return tokenizer
