"""One raw row, and checked access to its fields.

Every function takes the row, the name of the field and `where` ("train.jsonl, line 17"), and raises
PreferenceDataError naming all three when the field is missing, null, of another type, or text that is no Unicode.
"""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from typing import Any, NamedTuple

from fastdpo.data.errors import PreferenceDataError

Message = dict[str, str]

_SHORT = reprlib.Repr()  # bounded in depth and in length, whatever a row holds
_SHORT.maxstring = _SHORT.maxother = 60


class RawRow(NamedTuple):
    """One row of a file or data set: its number there, the place that a message names, and what it holds."""

    position: int
    where: str
    fields: Mapping[str, Any]


def raw_field(row: Mapping[str, Any], name: str, where: str) -> Any:
    if name not in row:
        raise PreferenceDataError(f"{where}: the field {name!r} is missing (found: {sorted(row)})")
    return row[name]


def wrong_field(name: str, value: Any, accepted: str, where: str) -> PreferenceDataError:
    seen = "null" if value is None else f"{type(value).__name__} {_SHORT.repr(value)}"
    return PreferenceDataError(f"{where}: the field {name!r} must be {accepted}, found {seen}; mend or remove the row")


def string_field(row: Mapping[str, Any], name: str, where: str) -> str:
    value = raw_field(row, name, where)
    if not isinstance(value, str):
        raise wrong_field(name, value, "a string", where)
    return _whole_text(value, name, where)


def _whole_text(value: str, name: str, where: str) -> str:
    """Raises where half of a surrogate pair stands alone, which no tokenizer and no file takes."""
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise PreferenceDataError(
            f"{where}: the field {name!r} has half of a surrogate pair, {value[error.start]!r}, at character "
            f"{error.start}, as where an emoji was cut in two; write the whole character, or remove the half"
        ) from error
    return value


def bool_field(row: Mapping[str, Any], name: str, where: str) -> bool:
    value = raw_field(row, name, where)
    if not isinstance(value, bool):
        raise wrong_field(name, value, "true or false", where)
    return value


def binary_field(row: Mapping[str, Any], name: str, where: str) -> int:
    value = raw_field(row, name, where)
    if isinstance(value, bool) or value not in (0, 1):
        raise wrong_field(name, value, "0 or 1", where)
    return int(value)


def messages_field(row: Mapping[str, Any], name: str, where: str) -> list[Message]:
    """A conversation: one or more messages with the string fields role and content, and nothing else.

    Other non-null keys (tool_calls, reasoning_content, …) would change what a chat template renders, so they are
    refused rather than dropped.
    """
    value = raw_field(row, name, where)
    if not isinstance(value, list) or not value:
        raise wrong_field(name, value, "a list with one or more messages {role, content}", where)
    messages = []
    for position, message in enumerate(value):
        label = f"{name}[{position}]"
        if not isinstance(message, Mapping):
            raise wrong_field(label, message, "a message {role, content}", where)
        extra = sorted(key for key, item in message.items() if key not in ("role", "content") and item is not None)
        if extra:
            raise PreferenceDataError(
                f"{where}: the message {label} has the keys {extra}; only 'role' and 'content' are supported, "
                "remove the others"
            )
        for key in ("role", "content"):
            if not isinstance(message.get(key), str):
                raise wrong_field(f"{label}.{key}", message.get(key), "a string", where)
            _whole_text(message[key], f"{label}.{key}", where)
        messages.append({"role": message["role"], "content": message["content"]})
    return messages
