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
#: Keys of a message that chat templates write into the text, under the names of several families of models.
_RENDERED = frozenset(
    {
        "audio",
        "audio_url",
        "audios",
        "channel",
        "content_type",
        "documents",
        "file",
        "files",
        "function_call",
        "image",
        "image_url",
        "images",
        "name",
        "prefix",
        "reasoning",
        "reasoning_content",
        "recipient",
        "thinking",
        "thought",
        "thoughts",
        "tool",
        "tool_call_id",
        "tool_calls",
        "tool_responses",
        "tools",
        "video",
        "video_url",
        "videos",
    }
)

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


def has_content(value: Any) -> bool:
    """False for null, an empty text or list, and an object whose values are all null."""
    if isinstance(value, dict):
        return any(each is not None for each in value.values())
    return value is not None and not (isinstance(value, (str, bytes, list)) and not value)


def unread_keys(message: Mapping[str, Any]) -> list[str]:
    """The keys of a message with content, beside its role and its content."""
    return [key for key, value in message.items() if key not in ("role", "content") and has_content(value)]


def is_rendered(key: str) -> bool:
    """Whether chat templates are known to write this key of a message into the text."""
    return key.strip().lower() in _RENDERED


def brief(value: Any) -> str:
    """A value in a few words for a message, whatever a row holds."""
    return _SHORT.repr(value)


def messages_field(row: Mapping[str, Any], name: str, where: str) -> list[Message]:
    """A conversation: one or more messages with the string fields role and content.

    Keys with content that chat templates write (tool_calls, reasoning_content, images, …) would change the text, so
    they are refused rather than dropped; so is `name`, which some templates put into a turn's header. Other keys
    (weight, id, timestamp, …) are bookkeeping: they are not read, and the survey says which they are.
    """
    value = raw_field(row, name, where)
    if not isinstance(value, list) or not value:
        raise wrong_field(name, value, "a list with one or more messages {role, content}", where)
    messages = []
    for position, message in enumerate(value):
        label = f"{name}[{position}]"
        if not isinstance(message, Mapping):
            raise wrong_field(label, message, "a message {role, content}", where)
        extra = sorted(key for key in unread_keys(message) if is_rendered(key))
        if extra:
            raise PreferenceDataError(
                f"{where}: the message {label} has the keys {extra}, which chat templates write into the text; only "
                "'role' and 'content' are supported, write what the model must see into the content and remove the "
                "others"
            )
        for key in ("role", "content"):
            if not isinstance(message.get(key), str):
                raise wrong_field(f"{label}.{key}", message.get(key), "a string", where)
            _whole_text(message[key], f"{label}.{key}", where)
        messages.append({"role": message["role"], "content": message["content"]})
    return messages
