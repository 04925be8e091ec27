"""What kept reference log-probs belong to: the reference, the tokenizer, and how token ids come about."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from peft import PeftModel
from torch import nn
from transformers import PreTrainedTokenizerBase

from fastdpo.training.options import FastDPOConfig
from fastdpo.training.reference.fingerprint import as_json, json_digest, tokenizer_digest, without
from fastdpo.training.reference.policy import ReferencePolicy

#: Entries of a model's config that change no log-prob: labels, and what loading and training write into it.
_CONFIG_WITHOUT_EFFECT = (
    "architectures", "attn_implementation", "bos_token_id", "dtype", "eos_token_id", "experts_implementation",
    "initializer_range", "pad_token_id", "quantization_config", "torch_dtype", "transformers_version", "use_cache",
)  # fmt: skip
#: Entries of an adapter's config that change no log-prob of the adapter as its weights are.
_ADAPTER_WITHOUT_EFFECT = (
    "auto_mapping", "base_model_name_or_path", "inference_mode", "init_lora_weights", "lora_dropout", "peft_version",
    "revision", "task_type",
)  # fmt: skip


def reference_identity(
    reference: ReferencePolicy,
    tokenizer: PreTrainedTokenizerBase,
    config: FastDPOConfig,
    weighting: Mapping[str, str],
) -> dict[str, str]:
    """Name → value of everything that reference log-probs and token ids depend on, for `ReferenceCache`.

    weighting: what the weights of tokens in a completion's log-prob depend on.

    Left out is what changes them by rounding only: devices, backends, micro-batches, packing, attention kernels. Built
    before the first forward: some quantised layers settle their compute dtype there.
    """
    model: Any = reference.model if reference.ref_model is None else reference.ref_model
    return {
        "weights": reference.fingerprint(),
        "adapters": "off" if reference.kind == "adapters off" else adapters_digest(model),
        **model_identity(model, config),
        "tokenizer": tokenizer_digest(tokenizer),
        "max_length": str(config.max_length),
        "max_prompt_length": str(config.max_prompt_length),
        **weighting,
    }


def model_identity(model: Any, config: FastDPOConfig) -> dict[str, str]:
    """What a model computes beside its weights and adapters: its config, quantisation and precision."""
    autocast = "bf16" if config.bf16 else "fp16" if config.fp16 else os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    return {
        # What differs from the defaults: another version has other entries
        "model config": json_digest(without(model.config.to_diff_dict(), _CONFIG_WITHOUT_EFFECT)),
        "quantisation": _quantisation(model),
        "precision": f"{model.dtype}, autocast {autocast}, tf32 {config.tf32}".replace("torch.", ""),
    }


def adapter_settings(model: PeftModel) -> dict[str, dict[str, Any]]:
    """Adapter → the settings that decide what it computes in training."""
    dropped = tuple(name for name in _ADAPTER_WITHOUT_EFFECT if name != "lora_dropout")
    return {name: without(config.to_dict(), dropped) for name, config in model.peft_config.items()}


def adapters_digest(model: nn.Module) -> str:
    """Of all that adapters are beside their weights; "none" without one."""
    if not isinstance(model, PeftModel):
        return "none"
    settings = {name: without(each, ("lora_dropout",)) for name, each in adapter_settings(model).items()}
    return json_digest([settings, list(model.base_model.active_adapters)])


def _quantisation(model: Any) -> str:
    """The quantiser's settings that are not off, and the dtypes that its layers compute in."""
    config = getattr(model.config, "quantization_config", None) or {}
    settings = config if isinstance(config, dict) else config.to_dict()
    used = {name: value for name, value in without(settings, ()).items() if value not in (None, False)}
    # The layers' own, as layers may be built or changed by hand
    compute = {
        str(m.compute_dtype) for m in model.modules() if isinstance(m, nn.Linear) and hasattr(m, "compute_dtype")
    }
    return as_json({**used, "computes in": sorted(compute)}) if used or compute else "none"
