"""Columns that a format does not read, and which of them must not be passed over: those that hold a prompt."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from fastdpo.data.errors import PreferenceDataError
from fastdpo.data.survey import Survey
from fastdpo.shown import listed

logger = logging.getLogger(__name__)

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


def is_foreign(name: str) -> bool:
    """Whether a column of this name would be refused if it held anything."""
    return name.strip().lower() in _PROMPT_LIKE | _UNSUPPORTED | _PROMPT_RENAMED


def refuse_foreign_columns(survey: Survey, read: Sequence[str], knows_prompt: bool, form: str, label: str) -> None:
    """Logs which columns are not read. Raises PreferenceDataError for one with content that belongs to the prompt.

    read: the columns that the format reads. knows_prompt: False where the beginning that the answers happen to share
    would be taken for the prompt. form: the format's name.
    """
    others = {name: where for name, where in survey.content.items() if name not in read and name != "example_id"}
    for name, where in sorted(others.items()):
        if where is None:
            continue
        plain = name.strip().lower()
        if plain in _UNSUPPORTED:
            raise PreferenceDataError(
                f"{where}: the column {name!r} holds what is not supported (text conversations without tools only); "
                "remove the column if the prompts do not depend on it"
            )
        if plain in _PROMPT_LIKE:
            raise PreferenceDataError(
                f"{where}: the column {name!r} looks like a part of the prompt, but the format {form!r} reads "
                f"{list(read)} only; put its text into 'prompt', or remove the column"
            )
        if plain in _PROMPT_RENAMED and not knows_prompt:
            raise PreferenceDataError(
                f"{where}: the column {name!r} looks like the prompt, which is read from 'prompt'; rename it, with a "
                "string beside answers that are strings and a list of messages beside lists of messages, or remove it "
                "if chosen and rejected begin with the prompt"
            )
    if others:
        logger.warning("%s: columns not read by the format %r: %s", label, form, listed(sorted(others), limit=20))
