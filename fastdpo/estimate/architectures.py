"""The configuration of a model: from a local folder, the hub, or by the name of a known architecture."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import safe_open
from transformers import AutoConfig, PretrainedConfig

from fastdpo.estimate.skeleton import bare_model
from fastdpo.shown import shown
from fastdpo.training.models.loading import load_config

#: Ending of a name in a configuration → the most that it may be.
_BOUNDS = {
    **dict.fromkeys(("layers", "layer"), 512),
    **dict.fromkeys(("heads", "head", "experts", "blocks", "groups"), 4096),
    "vocab_size": 2**24,
    **dict.fromkeys(("hidden_size", "dim", "embd", "d_model", "rank"), 2**17),
    **dict.fromkeys(("size", "inner", "d_ff"), 2**22),
}
_FILE = Path(__file__).with_name("architectures.yaml")


@cache
def known_architectures() -> dict[str, dict[str, Any]]:
    """Name → the settings of its configuration."""
    return dict(yaml.safe_load(_FILE.read_text(encoding="utf-8")))


def find_config(name_or_path: str, revision: str | None = None, trust_remote_code: bool = False) -> PretrainedConfig:
    """The configuration of a known architecture, or of a model in a folder or on the hub.

    Raises FileNotFoundError, OSError, ValueError, naming what was looked for.
    """
    known = known_architectures()
    if name_or_path in known:
        settings = dict(known[name_or_path])
        return AutoConfig.for_model(settings.pop("model_type"), **settings)
    try:
        config = load_config(name_or_path, revision, trust_remote_code)
    except OSError as error:
        raise OSError(f"{error}\nKnown without files or the hub: {', '.join(known)}.") from error
    check_sizes(config)
    return config


def check_sizes(config: PretrainedConfig) -> None:
    """Raise ValueError for a model without layers, units or tokens, or of more than was ever built: what is predicted
    of it is counted layer by layer."""
    text = config.get_text_config()
    for name in ("num_hidden_layers", "hidden_size", "vocab_size", "num_attention_heads"):
        value = getattr(text, name, 1)
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}={shown(value)} in the configuration of {config.name_or_path!r}: at least 1.")
    stated = {"num_hidden_layers": text.num_hidden_layers} | text.to_dict()
    for name, value in stated.items():
        bound = next((bound for ending, bound in _BOUNDS.items() if name.endswith(ending)), None)
        if bound is not None and isinstance(value, int) and value > bound:
            raise ValueError(
                f"{name} in the configuration of {config.name_or_path!r} is {value:.3g}; predicted is up to {bound:,}."
            )


@dataclass(frozen=True)
class StoredWeights:
    """The weight files of a model: their bytes, and the dtype of their tensors."""

    bytes: int
    dtype: torch.dtype


def stored_weights(name_or_path: str, config: PretrainedConfig) -> StoredWeights:
    """Of a local folder as they are; of another model as its configuration says (bfloat16 where that is silent)."""
    files = sorted(Path(os.path.expanduser(name_or_path)).glob("*.safetensors"))
    if not files:
        dtype = config.dtype if isinstance(config.dtype, torch.dtype) else torch.bfloat16
        model = bare_model(config)
        return StoredWeights(sum(p.numel() for p in model.parameters()) * dtype.itemsize, dtype)
    with safe_open(files[0], "pt") as opened:
        dtype = opened.get_tensor(min(opened.keys())).dtype
    return StoredWeights(sum(file.stat().st_size for file in files), dtype)
