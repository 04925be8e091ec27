"""Which options are secrets: they are used, and get into no file."""

from __future__ import annotations

import re
from typing import Any

#: Names, in options and within options that hold further ones. Tokens of a vocabulary (eos_token) are none.
_NAME = re.compile(
    r"^token$|(^|_)(hub|hf|auth|access|api|bearer|refresh)_tokens?$"
    r"|(^|_)(password|passwd|secret|api_?key|access_?key|credentials?|authorization)$",
    re.IGNORECASE,
)
#: What a token of the hub looks like, wherever it stands; and a password within an address.
_VALUE = re.compile(r"\bhf_[A-Za-z0-9]{16,}\b|(?<=://)[^/@\s]+:[^/@\s]+(?=@)")
HIDDEN = "<hidden>"


def is_secret(name: str) -> bool:
    """Whether the value of an option of this name is one."""
    return _NAME.search(name) is not None


def without_secrets(value: Any) -> Any:
    """`value`, in dicts and lists too, with HIDDEN in the place of what is secret."""
    if isinstance(value, dict):
        return {
            key: HIDDEN if isinstance(key, str) and is_secret(key) and isinstance(each, str) else without_secrets(each)
            for key, each in value.items()
        }
    if isinstance(value, (list, tuple)):
        return type(value)(without_secrets(each) for each in value)
    return _VALUE.sub(HIDDEN, value) if isinstance(value, str) else value
