"""Checks that every options dataclass shares, and the options that depend on what is installed."""

from __future__ import annotations

import functools
import importlib.util
import logging
from dataclasses import fields
from typing import Any

from accelerate.utils.modeling import convert_file_size_to_int

from fastdpo.ops.linear_logprob.tiles import MIN_WORKSPACE

logger = logging.getLogger(__name__)


def check_fields(config: Any) -> None:
    """What argparse checks on the command line, for options that come from YAML or Python.

    Raises ValueError where a field with `choices` holds something else, or where None stands in a field that needs a
    value. A single string in the place of a list becomes a list of one.
    """
    own = type(config).__annotations__  # not Field.type, which argument parsers rewrite
    for each in fields(config):
        value, kind = getattr(config, each.name), str(own.get(each.name))
        if value is None and each.name in own and "None" not in kind:
            raise ValueError(f"{each.name}=None: a value is needed; leave the option out for its default.")
        if isinstance(value, str) and kind.startswith("list[str]"):
            setattr(config, each.name, [value])
        accepted = each.metadata.get("choices")
        if accepted and value not in (*accepted, None):
            raise ValueError(f"{each.name}={value!r} is unknown; accepted are {', '.join(accepted)}.")


def check_conditions(config: Any, met: set[str], conditions: tuple[tuple[tuple[str, ...], str, str], ...]) -> None:
    """Raise ValueError for an option that was changed but acts only under a condition that is not in `met`."""
    for names, condition, advice in conditions:
        for name in names:
            field_ = config.__dataclass_fields__[name]
            default = field_.default_factory() if callable(field_.default_factory) else field_.default
            if getattr(config, name) != default and not met & {name, condition}:
                raise ValueError(f"{name}={getattr(config, name)!r} has no effect here: {advice}")


def head_workspace_bytes(size: str) -> int:
    """The option `head_workspace` in bytes. Raises ValueError for what is no size, or too little."""
    if (found := bytes_of("head_workspace", size)) < MIN_WORKSPACE:
        raise ValueError(f"head_workspace={size!r}: at least 64KiB, such as 256MiB.")
    return found


def bytes_of(name: str, size: str) -> int:
    """A size such as 12GB or 8GiB in bytes. Raises ValueError, naming the option, for anything else."""
    try:
        return int(convert_file_size_to_int(size.upper()))
    except ValueError as error:
        raise ValueError(f"{name}={size!r}: a size such as 12GB or 8GiB.") from error


def automatic_optimizer(on_gpu: bool) -> str:
    """What `optim="auto"` stands for, by transformers' name."""
    if not on_gpu:
        return "adamw_torch"
    # Paged 8-bit states: a quarter of the memory, and spikes of it go to the host
    if importlib.util.find_spec("bitsandbytes") is not None:
        return "paged_adamw_8bit"
    _tell_of_missing_bitsandbytes()
    return "adamw_torch_fused"


@functools.cache
def _tell_of_missing_bitsandbytes() -> None:
    logger.warning(
        "optim=auto is torch's fused AdamW, as bitsandbytes is not installed: its states take four times the memory of "
        "paged 8-bit AdamW. pip install bitsandbytes, or set optim=adamw_torch_fused."
    )
