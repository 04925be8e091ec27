"""JSON that says itself whether it is whole: one changed bit anywhere in the file is noticed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastdpo.training.reference.fingerprint import json_digest

#: The entry that holds the digest of all others.
SEAL = "seal"


class BrokenSealError(ValueError):
    """A file that is not what was written; the message says how."""


def sealed(content: Mapping[str, Any]) -> bytes:
    """`content`, in plain types, as the bytes of a file."""
    return json.dumps({**content, SEAL: json_digest(content)}, indent=1, allow_nan=False).encode()


def unsealed(path: Path) -> dict[str, Any]:
    """What `sealed` was given, with its SEAL. Raises OSError, or BrokenSealError where the bytes are others."""
    raw = path.read_bytes()
    try:
        content = json.loads(raw)
    except (ValueError, RecursionError) as error:  # nested without end
        raise BrokenSealError(f"{path} is not readable ({error})") from error
    if not isinstance(content, dict) or sealed({k: v for k, v in content.items() if k != SEAL}) != raw:
        raise BrokenSealError(f"{path} was changed since it was written: its seal does not fit")
    return content
