"""Two files of a run's options: run.yaml, which repeats it, and resolved.yaml, which says what they came to."""

from __future__ import annotations

import math
from collections.abc import Mapping
from enum import Enum
from typing import Any

import torch
import yaml
from transformers.trainer_pt_utils import AcceleratorConfig

from fastdpo.training.options import FastDPOConfig
from fastdpo.training.options.fields import is_set
from fastdpo.training.options.kinds import kinds_of
from fastdpo.training.options.secrets import is_secret, without_secrets

#: Options that say how this call met an existing run: a file that repeats them would delete the very run it describes.
#: The rank is the launcher's.
_OF_THE_CALL = ("local_rank", "overwrite_output_dir", "resume_from_checkpoint")
_RESOLVED_HEADER = (
    "# What the training options of run.yaml came to, on this machine and beside each other: for reading.\n"
    "# `fastdpo train` takes run.yaml, which repeats the run.\n"
)


class _NotPlain(Exception):
    """A value that YAML cannot say."""


class _Text(str):
    """Text within a mapping, which is quoted: unquoted, 1e-5 would be read as a number."""


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True  # one list in two places is written twice


_Dumper.add_representer(_Text, lambda dumper, text: dumper.represent_scalar("tag:yaml.org,2002:str", text, style='"'))


def run_yaml(config: FastDPOConfig, others: Mapping[str, Any]) -> str:
    """Every option that was set, of `config` and the `others`, for `fastdpo train`. What cannot be written is named in
    a comment: secrets, and objects."""
    asked = dict(others) | {name: getattr(config, name) for name in kinds_of(type(config)) if is_set(config, name)}
    written, left_out = _written(asked)
    comment = "".join(f"# {name} was set and is not written: {why}.\n" for name, why in left_out.items())
    return comment + _dump(written)


def resolved_yaml(config: FastDPOConfig, found: Mapping[str, Any]) -> str:
    """Every option of a config that was resolved, and what was `found` for those that follow the memory."""
    values = {name: getattr(config, name) for name in kinds_of(type(config))} | dict(found)
    written, _ = _written({name: value for name, value in values.items() if not is_secret(name)})
    return _RESOLVED_HEADER + _dump(written)


def _written(options: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    written, left_out = {}, {}
    for name, value in options.items():
        if name in _OF_THE_CALL:
            continue
        if is_secret(name):
            left_out[name] = "it is a secret"
            continue
        try:
            written[name] = without_secrets(_plain(value))
        except _NotPlain:
            left_out[name] = f"it is, or holds, a {type(value).__name__} that YAML cannot say"
    return written, left_out


def _plain(value: Any) -> Any:
    if isinstance(value, Enum):
        return _plain(value.value)
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    if isinstance(value, AcceleratorConfig):
        return _plain(value.to_dict())
    if isinstance(value, Mapping):
        if not all(type(key) is str for key in value):
            raise _NotPlain
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    if isinstance(value, float) and not math.isfinite(value):
        raise _NotPlain
    if isinstance(value, str):
        return str(value)
    if value is None or isinstance(value, (bool, int, float)):
        return value
    raise _NotPlain


def _dump(options: Mapping[str, Any]) -> str:
    quoted = {name: _quoted(value) if isinstance(value, dict) else value for name, value in options.items()}
    return yaml.dump(quoted, Dumper=_Dumper, sort_keys=False, allow_unicode=True) if quoted else ""


def _quoted(value: Any) -> Any:
    if isinstance(value, dict):
        return {_Text(key): _quoted(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_quoted(each) for each in value]
    return _Text(value) if isinstance(value, str) else value
