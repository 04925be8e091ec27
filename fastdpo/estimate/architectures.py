"""The configuration of a model: from a local folder, the hub, or by the name of a known architecture."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from transformers import AutoConfig, PretrainedConfig

from fastdpo.training.model import load_config

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
        return load_config(name_or_path, revision, trust_remote_code)
    except OSError as error:
        raise OSError(f"{error}\nKnown without files or the hub: {', '.join(known)}.") from error


def stored_bytes(name_or_path: str) -> int:
    """Bytes of the weight files in a local folder; 0 for what is no folder."""
    return sum(file.stat().st_size for file in Path(os.path.expanduser(name_or_path)).glob("*.safetensors"))
