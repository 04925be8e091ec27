"""Sizes of memory, micro-batches and prompts: what their options may be, of a run and of an estimate alike."""

from __future__ import annotations

import re
from typing import Any

from accelerate.utils.modeling import convert_file_size_to_int

from fastdpo.ops.linear_logprob.tiles import MIN_WORKSPACE, WORKSPACE
from fastdpo.training.options.kinds import OptionError, seen
from fastdpo.training.options.unused import without_effect

#: Tokens per micro-batch when `micro_batch_tokens` is "auto" on a CPU without a stated `memory_limit`: a lean
#: body takes less for them than its modules did for 640, and every weight is dequantised less often.
DEFAULT_MICRO_BATCH_TOKENS = 1536
#: The option `head_workspace` by default.
HEAD_WORKSPACE = f"{WORKSPACE // 2**20}MiB"
#: A number of bytes such as 4e9.
_POWER = re.compile(r"\d+(\.\d+)?E\d{1,2}", re.ASCII)
#: No memory has as many bytes.
_LARGEST = 2**63


def head_workspace_bytes(size: str) -> int:
    """The option `head_workspace` in bytes. Raises ValueError for what is no size, or too little."""
    if (found := bytes_of("head_workspace", size)) < MIN_WORKSPACE:
        raise ValueError(f"head_workspace={size!r}: at least 64KiB, such as 256MiB.")
    return found


def bytes_of(name: str, size: str) -> int:
    """A size such as 12GB or 8GiB, or a plain number of bytes, as such. Raises OptionError, naming the option, for
    anything else."""
    text = size.strip().upper()
    try:
        if _POWER.fullmatch(text) and float(text).is_integer():
            found = int(float(text))
        else:
            found = int(text) if text.isdecimal() else int(convert_file_size_to_int(text))
    except (ValueError, OverflowError):
        found = -1
    if not 0 <= found < _LARGEST:
        raise OptionError(f"{name}={seen(size)}: a size such as 12GB or 8GiB, or a number of bytes, is needed.")
    return found


def check_micro_batch_tokens(tokens: str) -> None:
    """Raise OptionError for what is neither "auto" nor a number of tokens."""
    if tokens != "auto" and not (tokens.isdecimal() and len(tokens) < 19 and int(tokens) >= 1):
        raise OptionError(f"micro_batch_tokens={seen(tokens)}: 'auto' or a number of at least 1.")


def check_memory_limit(config: Any) -> None:
    """Refuse a `memory_limit` that is no size, or that nothing reads. Raises OptionError."""
    limit = config.memory_limit
    if limit is None:
        return
    if bytes_of("memory_limit", limit) == 0:
        raise OptionError(f"memory_limit={limit!r}: a positive size such as 12GB.")
    if config.micro_batch_tokens != "auto":
        without_effect(
            config, "memory_limit", f"micro_batch_tokens={config.micro_batch_tokens!r} does not ask; set that to auto."
        )


def check_offloading(config: Any) -> None:
    """Raise ValueError for `activation_offloading` without checkpointing."""
    if config.activation_offloading and config.gradient_checkpointing == "false":
        raise ValueError(
            "activation_offloading=True moves what checkpointed layers keep, but gradient_checkpointing='false'. "
            "Leave that at auto, or drop the offloading."
        )


def check_lengths(config: Any, *, least: str, names: tuple[str, ...] = ("max_length", "max_prompt_length")) -> None:
    """Raise ValueError for a length below 1 (`least` says what is accepted), or prompts that leave no completion."""
    for name in names:
        if (value := getattr(config, name)) is not None and value < 1:
            raise ValueError(f"{name}={value}: {least}")
    if config.max_length and config.max_prompt_length and config.max_prompt_length >= config.max_length:
        raise ValueError(
            f"max_prompt_length={config.max_prompt_length} leaves no room for a completion within "
            f"max_length={config.max_length}; lower the first or raise the second."
        )
