"""TRL's preference formats: explicit or implicit prompt, plain strings or lists of messages.

Explicit: prompt, chosen, rejected. Implicit: chosen and rejected begin with the prompt. Where chosen and rejected are
conversations and `prompt` is a string (UltraFeedback has both), the conversations already hold the prompt and the
string is not read, as in TRL.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastdpo.data.errors import PreferenceDataError
from fastdpo.data.fields import Message, messages_field, string_field
from fastdpo.data.shared_prefix import Pair, Reading, answered, is_asked, split_messages, split_text

EXPLICIT_COLUMNS = ("prompt", "chosen", "rejected")
IMPLICIT_COLUMNS = ("chosen", "rejected")
_ASKING = frozenset({"developer", "function", "ipython", "system", "tool", "user"})
DROP_REASON = "no message to answer is shared by chosen and rejected, so no prompt"


def convert_explicit_plain(row: Mapping[str, Any], where: str) -> Reading:
    prompt, *answers = (string_field(row, name, where) for name in EXPLICIT_COLUMNS)
    repeated = prompt and all(answer.startswith(prompt) for answer in answers)
    return Reading(Pair(prompt, *answers), ("prompt_in_answers",) if repeated else ())


def convert_canonical_plain(row: Mapping[str, Any], where: str) -> Reading:
    """A pair that has been read already: as it is."""
    return Reading(Pair(*(string_field(row, name, where) for name in EXPLICIT_COLUMNS)))


def convert_implicit_plain(row: Mapping[str, Any], where: str) -> Reading:
    pair = split_text(*(string_field(row, name, where) for name in IMPLICIT_COLUMNS))
    return Reading(pair, () if pair.prompt else ("without_shared_prompt",))


def convert_explicit_conversational(row: Mapping[str, Any], where: str) -> Reading:
    """The pair of one row. A prompt that both answers repeat is taken once; turns after the last answer are dropped.

    Raises PreferenceDataError where one answer alone repeats the prompt, or one repeats a part of it.
    """
    prompt, *answers = (messages_field(row, name, where) for name in EXPLICIT_COLUMNS)
    repeats = [answer[: len(prompt)] == prompt for answer in answers]
    notes: tuple[str, ...] = ()
    if all(repeats):
        notes, answers = ("repeated_prompts",), [answer[len(prompt) :] for answer in answers]
    else:
        for name, answer, repeat in zip(IMPLICIT_COLUMNS, answers, repeats, strict=True):
            if repeat or (is_asked(answer[0]) and answer[0] in prompt):
                raise PreferenceDataError(
                    f"{where}: the messages of {name!r} repeat {'' if repeat else 'a part of '}the prompt, and those "
                    f"of the other answer {'do not' if repeat else 'may not'}; begin both answers after the prompt, "
                    "or repeat all of it in both"
                )
    for name, answer in zip(IMPLICIT_COLUMNS, answers, strict=True):
        _check_roles(answer, name, where, needs_answer=bool(answer))
    ends = [answered(answer) for answer in answers]
    if any(len(end) < len(answer) for end, answer in zip(ends, answers, strict=True)):
        notes = (*notes, "unanswered_turns")
    return Reading(Pair(prompt, *ends), notes)


def convert_canonical_conversational(row: Mapping[str, Any], where: str) -> Reading:
    """A pair that has been read already: as it is."""
    return Reading(Pair(*(messages_field(row, name, where) for name in EXPLICIT_COLUMNS)))


def convert_implicit_conversational(row: Mapping[str, Any], where: str) -> Reading:
    """The pair of one row, without it when the conversations share no message to answer."""
    chosen, rejected = (messages_field(row, name, where) for name in IMPLICIT_COLUMNS)
    for name, messages in zip(IMPLICIT_COLUMNS, (chosen, rejected), strict=True):
        _check_roles(messages, name, where, needs_answer=False)
        if row.get("prompt") and not any(is_asked(message) for message in messages):
            raise PreferenceDataError(
                f"{where}: 'prompt' is a {type(row['prompt']).__name__}, but {name!r} is a list of messages without "
                "the question; write the prompt as messages too: [{'role': 'user', 'content': ...}]"
            )
    return split_conversations(chosen, rejected)


def split_conversations(chosen: list[Message], rejected: list[Message]) -> Reading:
    """Two whole conversations, parted after the last shared message that is to be answered."""
    pair = split_messages(chosen, rejected)
    if pair is None:
        return Reading(None)
    after = [messages[len(pair.prompt) :] for messages in (chosen, rejected)]
    cut = any(messages and answered(messages) != messages for messages in after)
    return Reading(pair, ("unanswered_turns",) if cut else ())


def _check_roles(messages: list[Message], name: str, where: str, *, needs_answer: bool) -> None:
    """Raises where no message is an answer because answers go by another role ("gpt", "model")."""
    roles = [message["role"] for message in messages]
    if "assistant" not in roles and (needs_answer or not _ASKING.issuperset(roles)):
        raise PreferenceDataError(
            f"{where}: {name!r} holds no answer, its messages have the roles {roles}; the role of answers must be "
            "'assistant'"
        )
