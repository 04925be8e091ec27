"""Columns named like the prompt or a part of it, and whether a value adds text that the model would not see."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from typing import Any, Literal

from fastdpo.data.fields import Message
from fastdpo.data.shared_prefix import inside_word, split_messages, split_text

#: Columns of other data sets that hold what the model must see: dropping them would train on half a prompt.
_PROMPT_LIKE = frozenset(
    {
        "chat_history",
        "context",
        "contexts",
        "dialogue_history",
        "history",
        "input",
        "inputs",
        "instruction",
        "instructions",
        "query",
        "question",
        "system",
        "system_message",
        "system_prompt",
    }
)
#: A chat template renders these into the prompt, or needs them to; without them the text would be another one.
_UNSUPPORTED = frozenset({"chat_template_kwargs", "documents", "image", "images", "tools"})
#: The prompt, or the prompt and an answer, under another name. Beside a prompt they are only a copy of it.
_PROMPT_RENAMED = frozenset(
    {
        "chat",
        "conversation",
        "conversations",
        "dialog",
        "dialogs",
        "dialogue",
        "dialogues",
        "messages",
        "prompt",
        "prompt_text",
        "prompts",
        "turns",
        "user_prompt",
    }
)
#: What an empty value is written as where a column holds JSON as text.
_EMPTY = frozenset({"[]", "{}", "null"})


@functools.lru_cache(maxsize=1024)
def kind_of(name: str) -> Literal["part", "unsupported", "renamed"] | None:
    """What a column of this name holds: a part of the prompt, what is not supported, or the prompt; None: neither."""
    plain = name.strip().lower()
    if plain in _PROMPT_LIKE:
        return "part"
    if plain in _UNSUPPORTED:
        return "unsupported"
    return "renamed" if plain in _PROMPT_RENAMED else None


def is_foreign(name: str) -> bool:
    """Whether a column of this name would be refused if it added anything."""
    return kind_of(name) is not None


def adds_text(name: str, value: Any, row: Mapping[str, Any]) -> bool:
    """Whether the value of a foreign column has a text that stands nowhere in the prompt of its row.

    Compared are whole texts, white space made one space, and not within a word: "no" is not in "know". Each text of
    a list or an object counts, for messages their content. A row of conversations without a shared question gives no
    pair, so nothing is missing there. The last text of a conversation may be one of the answers.
    """
    texts = [text for text in map(_plain, _texts(value)) if text and text not in _EMPTY]
    if not texts:
        return False
    kind = kind_of(name)
    if kind == "unsupported" and not isinstance(value, str):
        return True
    seen = _seen(row)
    if seen is None:
        return False
    seen = [_plain(text) for text in seen]
    if kind == "renamed" and len(texts) > 1:
        answers = [_plain(text) for field in ("chosen", "rejected") for text in _texts(row.get(field))]
        if any(_holds(answer, texts[-1]) for answer in answers):
            texts = texts[:-1]
    return not all(any(_holds(whole, text) for whole in seen) for text in texts)


def _plain(text: str) -> str:
    return " ".join(text.split())


def _texts(value: Any) -> Iterator[str]:
    """The texts in a value, depth first: of a message its content, under one name or another."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        content = next((value[key] for key in ("content", "value") if key in value), None)
        for each in value.values() if content is None else [content]:
            yield from _texts(each)
    elif isinstance(value, (list, tuple)):
        for each in value:
            yield from _texts(each)
    elif value is not None:
        yield str(value)


def _seen(row: Mapping[str, Any]) -> list[str] | None:
    """The texts of a row's prompt, each on its own; None where the row gives no pair."""
    prompt, chosen, rejected = (row.get(name) for name in ("prompt", "chosen", "rejected"))
    if isinstance(chosen, list) and isinstance(rejected, list):
        messages = _messages(prompt)
        pair = split_messages(_messages(chosen), _messages(rejected))
        if pair is None and not messages:
            return None
        shared = _messages(pair.prompt) if pair else []
        return [message["content"] for message in (*messages, *shared)]
    if isinstance(prompt, str) and prompt:
        return [prompt]
    if isinstance(chosen, str) and isinstance(rejected, str):
        return [str(split_text(chosen, rejected).prompt)]
    return []


def _messages(value: Any) -> list[Message]:
    """What a list has of messages; whatever else it holds is refused where it is read."""
    messages = value if isinstance(value, list) else []
    return [
        {"role": str(message.get("role")), "content": str(message.get("content"))}
        for message in messages
        if isinstance(message, Mapping)
    ]


def _holds(whole: str, text: str) -> bool:
    at = whole.find(text)
    while at >= 0:
        if not inside_word(whole, at) and not inside_word(whole, at + len(text)):
            return True
        at = whole.find(text, at + 1)
    return False
