"""Loading: from a `ModelConfig` to the model, its quantisation, its adapter and its tokenizer."""

from __future__ import annotations

import importlib.util
import logging
import os
import re
from collections.abc import Mapping
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
from fastdpo.shown import listed, shown
from fastdpo.training.models.files import fault_in, one_line, reading
from fastdpo.training.options import ModelConfig
from fastdpo.training.options.model_config import is_pattern

logger = logging.getLogger(__name__)

#: Of layers and experts, in the name of a weight.
_NUMBERS = re.compile(r"\b\d+\b")


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


def load_causal_lm(name_or_path: str, *, argument: str = "model", **kwargs: Any) -> PreTrainedModel:
    """from_pretrained, with every weight from the file. argument: that names the model, for messages.

    Raises FileNotFoundError, OSError, ValueError: what was looked for, which file is broken, which weight is missing.
    """
    name_or_path = os.path.expanduser(name_or_path)
    revision = kwargs.get("revision")
    load_config(name_or_path, revision, kwargs.get("trust_remote_code", False), argument=argument)
    with reading(argument, name_or_path, revision):
        # Weights of other shapes are refused below, by name; transformers logs them
        kwargs |= {"ignore_mismatched_sizes": True, "output_loading_info": True}
        model, found = AutoModelForCausalLM.from_pretrained(name_or_path, **kwargs)
    check_weights(model, found, f"{argument}={name_or_path!r}")
    return model


def check_weights(model: PreTrainedModel, found: Mapping[str, Any], source: str) -> None:
    """Refuse a model with weights that its file did not give, which are random, and a file with more layers than the
    model; say what else is in the file. found: the loading info of from_pretrained. source: of the model.

    Raises ValueError.
    """
    wrong_file = "Give the folder of this very model, whole, or train a copy that was saved with all its weights."
    if missing := sorted(found["missing_keys"]):
        raise ValueError(
            f"{source}: its files lack {len(missing)} weights of the {type(model).__name__}, {missing[0]!r} first: "
            f"they would be random. {wrong_file}"
        )
    if mismatched := sorted(found["mismatched_keys"]):
        name, there, needed = mismatched[0]
        raise ValueError(
            f"{source}: {len(mismatched)} weights have another shape than the {type(model).__name__} of its "
            f"config.json, {name!r} first: {tuple(there)} in the file, {tuple(needed)} in the model. {wrong_file}"
        )
    unexpected = sorted(found["unexpected_keys"])
    own = {_NUMBERS.sub("#", name) for name in model.state_dict()}
    if layers := [name for name in unexpected if _NUMBERS.sub("#", name) in own]:
        raise ValueError(
            f"{source}: its files hold more layers than its config.json says: {layers[0]!r} and {len(layers) - 1} more "
            f"weights would be left out. {wrong_file}"
        )
    if unexpected:
        logger.warning(
            "%s: %d weights of its files are none of the %s's and are not read: %s",
            source, len(unexpected), type(model).__name__, listed(unexpected),
        )  # fmt: skip


def load_config(
    name_or_path: str, revision: str | None = None, trust_remote_code: bool = False, *, argument: str = "model"
) -> PretrainedConfig:
    """The configuration of a causal LM. Raises FileNotFoundError, OSError, ValueError."""
    name_or_path = os.path.expanduser(name_or_path)
    _check_model_path(name_or_path, argument)
    try:
        with reading(argument, name_or_path, revision):
            config = AutoConfig.from_pretrained(name_or_path, revision=revision, trust_remote_code=trust_remote_code)
    except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError) as error:
        raise ValueError(
            f"{argument}={name_or_path!r}: transformers can read no configuration from its config.json: "
            f"{type(error).__name__}: {shown(error)}. Compare the file with the original's."
        ) from error
    if type(config) not in AutoModelForCausalLM._model_mapping and not getattr(config, "auto_map", None):
        raise ValueError(
            f"{argument}={name_or_path!r} is a {type(config).__name__}, which has no causal language-model head. "
            "Give a decoder-only model, such as a Llama, Mistral, Qwen or Gemma."
        )
    return config


def _check_model_path(name_or_path: str, argument: str) -> None:
    path = Path(name_or_path)
    _check_exists(name_or_path, argument)
    if path.is_dir() and not (path / "config.json").is_file():
        hint = " It holds a PEFT adapter: pass it as adapter_name_or_path." if _is_adapter(path) else ""
        raise FileNotFoundError(f"{argument}={name_or_path!r}: the folder has no config.json.{hint}")


def _check_exists(name_or_path: str, argument: str) -> None:
    looks_local = name_or_path.startswith((".", "/", "~")) or name_or_path.count("/") > 1
    if looks_local and not Path(name_or_path).exists():
        raise FileNotFoundError(f"{argument}={name_or_path!r}: no such folder. Give a local folder or a hub name.")


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
    _check_exists(name_or_path, "adapter")
    advice = "Give the base model that the adapter was trained on (base_model_name_or_path in its adapter_config.json)."
    misfit = f"adapter={name_or_path!r} does not fit the model {getattr(model.config, '_name_or_path', '')!r}"
    with reading("adapter", name_or_path):
        try:
            adapted = PeftModel.from_pretrained(model, name_or_path, is_trainable=True)
        except (RuntimeError, ValueError) as error:
            raise ValueError(f"{misfit}: {one_line(error)}. {advice}") from error
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
        target_modules=modules[0] if modules == ["all-linear"] or is_pattern(modules[0]) else modules,
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
    option = "tokenizer_name_or_path" if own else "model_name_or_path"
    tokenizer = read_tokenizer(source, option, revision=revision, trust_remote_code=config.trust_remote_code)
    if config.chat_template:
        set_chat_template(tokenizer, Path(config.chat_template).expanduser())
    return tokenizer


def read_tokenizer(source: str, option: str, **kwargs: Any) -> PreTrainedTokenizerBase:
    """AutoTokenizer's of the folder or hub name `source`, which `option` gives. Raises FileNotFoundError, OSError,
    ValueError."""
    _check_exists(source, option)
    with reading(option, source, kwargs.get("revision")):
        try:
            return AutoTokenizer.from_pretrained(source, **kwargs)
        except ValueError as error:
            if Path(source).is_dir() and fault_in(Path(source)) is None:
                raise ValueError(
                    f"{option}={source!r}: no tokenizer can be made of the files there "
                    f"({listed(sorted(path.name for path in Path(source).iterdir()))}): "
                    f"{one_line(error)} Give a folder with tokenizer.json and tokenizer_config.json."
                ) from error
            raise
