"""Sizes of memory, micro-batches and prompts: what their options may be, of a run and of an estimate alike."""

from __future__ import annotations

from typing import Any

from accelerate.utils.modeling import convert_file_size_to_int

from fastdpo.ops.linear_logprob.tiles import MIN_WORKSPACE, WORKSPACE

#: Tokens per micro-batch when `micro_batch_tokens` is "auto" on a CPU without a stated `memory_limit`: more of them
#: make no product faster there.
DEFAULT_MICRO_BATCH_TOKENS = 640
#: The option `head_workspace` by default.
HEAD_WORKSPACE = f"{WORKSPACE // 2**20}MiB"


def head_workspace_bytes(size: str) -> int:
    """The option `head_workspace` in bytes. Raises ValueError for what is no size, or too little."""
    if (found := bytes_of("head_workspace", size)) < MIN_WORKSPACE:
        raise ValueError(f"head_workspace={size!r}: at least 64KiB, such as 256MiB.")
    return found


def bytes_of(name: str, size: str) -> int:
    """A size such as 12GB or 8GiB in bytes. Raises ValueError, naming the option, for anything else."""
    try:
        return int(convert_file_size_to_int(size.upper()))
    except (ValueError, OverflowError) as error:  # the latter of an infinite one
        raise ValueError(f"{name}={size!r}: a size such as 12GB or 8GiB.") from error


def check_micro_batch_tokens(tokens: str) -> None:
    """Raise ValueError for what is neither "auto" nor a number of tokens."""
    if tokens != "auto" and (not str(tokens).isdecimal() or int(tokens) < 1):
        raise ValueError(f"micro_batch_tokens={tokens!r}: 'auto' or a number of at least 1.")


def check_memory_limit(limit: str | None, micro_batch_tokens: str) -> None:
    """Raise ValueError for a `memory_limit` that is no size, or that nothing reads."""
    if limit is None:
        return
    found = bytes_of("memory_limit", limit)
    if micro_batch_tokens != "auto":
        raise ValueError(
            f"memory_limit={limit!r} has no effect with micro_batch_tokens={micro_batch_tokens}; set that to auto."
        )
    if found <= 0:
        raise ValueError(f"memory_limit={limit!r}: a positive size such as 12GB.")


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
