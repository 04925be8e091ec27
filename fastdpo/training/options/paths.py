"""Paths that users name: what no file system holds, or nobody means, is refused by the option's name at once."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

#: Option → what it has to be where it exists on this machine; None: a file or a folder. Other names are the hub's.
PATHS: dict[str, str | None] = {
    "model_name_or_path": "folder",
    "adapter_name_or_path": "folder",
    "tokenizer_name_or_path": "folder",
    "chat_template": "file",
    "dataset_name_or_path": None,
    "eval_dataset_name_or_path": None,
    "output_dir": "folder",
    "resume_from_checkpoint": "folder",
    "reference_cache_dir": None,  # one that cannot be written to costs the cache, which is a warning
}
#: What the system says of a path that cannot be one.
_IMPOSSIBLE = {
    errno.ELOOP: "its links lead in a circle; mend them, or name what they were to lead to",
    errno.ENAMETOOLONG: "it is longer than the file system allows; choose a shorter one",
}


def check_paths(config: Any) -> None:
    """Raise ValueError for a path among the options of `config` that cannot be one, or is of the wrong kind."""
    for name, kind in PATHS.items():
        value = getattr(config, name, None)
        if isinstance(value, (str, os.PathLike)):
            check_path(name, os.fspath(value), kind)


def check_path(name: str, value: str, kind: str | None = None) -> None:
    """Raise ValueError, naming the option, where `value` cannot be a path or exists as something else than `kind`."""
    if not value.strip():
        raise ValueError(f"{name}={value!r} is empty; name a path, or leave the option out.")
    if "\0" in value:
        raise ValueError(f"{name}={value!r} holds a NUL character, which no path does; name another.")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{name}={value!r} is not UTF-8, so it cannot be written down; rename it.") from error
    path = os.path.expanduser(value)
    if path.startswith("~"):
        raise ValueError(f"{name}={value!r}: there is no user {path.split('/')[0][1:]!r}; write the path out.")
    try:
        os.stat(path)
    except OSError as error:
        if error.errno in _IMPOSSIBLE:
            raise ValueError(f"{name}={value!r}: {_IMPOSSIBLE[error.errno]}.") from error
        return  # there is none: a hub's name, or what others have more to say of
    if kind == "folder" and not Path(path).is_dir():
        raise ValueError(f"{name}={value!r} is a file; name a folder.")
    if kind == "file" and not Path(path).is_file():
        raise ValueError(f"{name}={value!r} is no file; name one.")
