"""The files that a model, an adapter or a tokenizer is read from: which of them is broken, where reading fails.

What reads them raises whatever it runs into (a KeyError, an EOFError, "header too large"), and names no file. So where
it fails, the files are looked at one by one.
"""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open

from fastdpo.shown import shown

#: JSON files that a reader takes for granted, with the keys that it needs.
_DOCUMENTS: dict[str, tuple[str, ...]] = {
    "config.json": ("model_type",),
    "adapter_config.json": ("peft_type",),
    "tokenizer.json": ("added_tokens", "model"),
    "tokenizer_config.json": (),
    "special_tokens_map.json": (),
    "model.safetensors.index.json": ("weight_map",),
    "pytorch_model.bin.index.json": ("weight_map",),
}
_TEXTS = ("chat_template.jinja",)
_WEIGHTS = (".safetensors", ".bin")
#: What reading of broken files has been seen to raise; most of them may be a defect as well.
_ERRORS = (
    SafetensorError, StrictDataclassError, pickle.UnpicklingError, EOFError, OSError, ValueError, RuntimeError,
    KeyError, TypeError, AttributeError,
)  # fmt: skip
_ALWAYS_FILES = (SafetensorError, pickle.UnpicklingError, EOFError, json.JSONDecodeError)
_LFS = b"version https://git-lfs"


@contextmanager
def reading(option: str, name: str, revision: str | None = None) -> Iterator[None]:
    """Around what reads the files of `name`, a folder or hub name that `option` gives.

    Raises ValueError with the broken file and the next step where one is found. Errors that no file explains pass,
    those of formats in a sentence of their own.
    """
    try:
        yield
    except _ERRORS as error:
        folder = folder_of(name, revision)
        found = None if folder is None else fault_in(folder)
        if found is not None:
            raise ValueError(f"{option}={name!r}: {found} Copy or download it again.") from error
        cause = one_line(error)
        if isinstance(error, StrictDataclassError):
            raise ValueError(f"{option}={name!r}: config.json: {cause} Mend it, or copy it again.") from error
        if isinstance(error, _ALWAYS_FILES):
            raise ValueError(f"{option}={name!r} cannot be read: {cause}. Copy or download it again.") from error
        raise


def one_line(error: BaseException) -> str:
    """The text of an error that another library has written."""
    return shown(" ".join(str(error).split())) or type(error).__name__


def folder_of(name: str, revision: str | None = None) -> Path | None:
    """Where the files are: the folder itself, or the hub's cache as far as it holds them."""
    path = Path(os.path.expanduser(name))
    if path.is_dir():
        return path
    if name.count("/") > 1 or not name:
        return None
    for file in _DOCUMENTS:
        cached = try_to_load_from_cache(name, file, revision=revision) if _is_repository(name) else None
        if isinstance(cached, str):
            return Path(cached).parent
    return None


def _is_repository(name: str) -> bool:
    return not name.startswith((".", "/", "~")) and all(name.split("/"))


def fault_in(folder: Path) -> str | None:
    """A sentence about the first file of the folder that is broken or missing; None where all can be read."""
    for path in sorted(folder.iterdir()):
        if path.name in _DOCUMENTS:
            found = _fault_of_document(path)
        elif path.name in _TEXTS:
            found = _fault_of_text(path)
        elif path.suffix in _WEIGHTS and path.is_file():
            found = _fault_of_weights(path)
        else:
            found = None
        if found is not None:
            return f"{path.name!r} {found}."
    return None


def _fault_of_text(path: Path) -> str | None:
    try:
        path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        return f"is no UTF-8 text ({error.reason} at byte {error.start})"
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    return None


def _fault_of_document(path: Path) -> str | None:
    if (found := _fault_of_text(path)) is not None:
        return found
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        return f"is no JSON ({one_line(error)})" if path.stat().st_size else "is empty"
    if not isinstance(content, dict):
        return f"holds a {type(content).__name__}, not a JSON object"
    if missing := [key for key in _DOCUMENTS[path.name] if key not in content]:
        return f"has no {', '.join(map(repr, missing))}"
    return _missing_shard(path.parent, content) if "weight_map" in content else None


def _missing_shard(folder: Path, index: dict[str, Any]) -> str | None:
    shards = index["weight_map"].values() if isinstance(index["weight_map"], dict) else ()
    missing = sorted({str(shard) for shard in shards if not (folder / str(shard)).is_file()})
    return f"names {missing[0]!r}, which is not there ({len(missing)} of {len(set(shards))} files)" if missing else None


def _fault_of_weights(path: Path) -> str | None:
    try:
        with path.open("rb") as file:
            start = file.read(len(_LFS))
        if not start:
            return "is empty"
        if start == _LFS:
            return "is a pointer of Git LFS, not the weights (git lfs pull fetches them)"
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as weights:
                weights.keys()
        else:
            torch.load(path, map_location="meta", weights_only=True, mmap=False)
    except (SafetensorError, pickle.UnpicklingError, EOFError, OSError, RuntimeError, ValueError) as error:
        return f"is torn or no file of weights ({one_line(error)[:120]})"
    return None
