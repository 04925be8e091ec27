r"""Anthropic HH-RLHF: {"chosen": transcript, "rejected": transcript} with "\n\nHuman: " and "\n\nAssistant: " turns.

Source: Bai et al., 2022 (arXiv 2204.05862) and the data set's card.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from fastdpo.data.errors import PreferenceDataError
from fastdpo.data.fields import Message, string_field
from fastdpo.data.shared_prefix import Reading
from fastdpo.data.trl_format import split_conversations

COLUMNS = ("chosen", "rejected")
DROP_REASON = "no Human turn shared by chosen and rejected, so no prompt"

_ROLES = {"Human": "user", "Assistant": "assistant"}
# The blank line belongs to the mark, so a text may hold "\nHuman:" of its own. The space after the colon is missing
# where an empty answer was stripped. A transcript may begin without its blank line, and have the line ends of Windows.
_TURN = re.compile(r"(?:\n\n|\r\n\r\n|\A(?:\r?\n)?)(Human|Assistant): ?")


def is_transcript(text: Any) -> bool:
    """Whether a text has a Human turn and an Assistant turn: what `_TURN` finds, by searches that cost less."""
    return isinstance(text, str) and all(
        f"\n\n{role}:" in text
        or f"\r\n\r\n{role}:" in text
        or text.startswith((f"{role}:", f"\n{role}:", f"\r\n{role}:"))
        for role in _ROLES
    )


def parse_transcript(text: str, name: str, where: str) -> list[Message]:
    """The turns of a transcript as messages, texts unchanged; text before the first turn is a system message.

    Raises PreferenceDataError where there is no Human turn or no Assistant turn.
    """
    marks = list(_TURN.finditer(text))
    missing = sorted(set(_ROLES) - {mark.group(1) for mark in marks})
    if missing:
        raise PreferenceDataError(
            f"{where}: the field {name!r} is not an HH-RLHF transcript, it has no turn that begins with "
            rf"'\n\n{missing[0]}: '; mend or remove the row, or pass data_format='trl' if the texts are plain"
        )
    leading = text[: marks[0].start()]
    messages = [{"role": "system", "content": leading}] if leading.strip() else []
    ends = [mark.start() for mark in marks[1:]] + [len(text)]
    for mark, end in zip(marks, ends, strict=True):
        messages.append({"role": _ROLES[mark.group(1)], "content": text[mark.end() : end]})
    return messages


def convert(row: Mapping[str, Any], where: str) -> Reading:
    """The pair of one row, without it when the transcripts share no Human turn."""
    chosen, rejected = (parse_transcript(string_field(row, name, where), name, where) for name in COLUMNS)
    return split_conversations(chosen, rejected)
