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
#: What tokens of hubs look like, wherever they stand; and what gives access within an address.
_VALUE = re.compile(
    r"\b(?:hf|ghp|gho|ghs|github_pat)_\w{16,}|(?<=://)[^/@\s]+:[^/@\s]+(?=@)"
    r"|(?<=[?&])((?:access_|api_)?(?:token|key)|sig|X-Amz-(?:Signature|Credential|Security-Token))=[^&\s]+",
    re.IGNORECASE,
)
HIDDEN = "<hidden>"


def is_secret(name: str) -> bool:
    """Whether the value of an option of this name is one."""
    return _NAME.search(name) is not None


def without_secrets(value: Any) -> Any:
    """`value`, in dicts and lists too, with HIDDEN in the place of what is secret."""
    if isinstance(value, dict):
        return {
            key: HIDDEN if isinstance(key, str) and is_secret(key) and _holds(each) else without_secrets(each)
            for key, each in value.items()
        }
    if isinstance(value, (list, tuple)):
        return type(value)(without_secrets(each) for each in value)
    return _VALUE.sub(HIDDEN, value) if isinstance(value, str) else value


def _holds(value: Any) -> bool:
    """Whether the value of a secret option says anything: True asks for the token that is kept elsewhere."""
    return value is not None and not isinstance(value, bool)
