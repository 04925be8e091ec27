"""Columns that a format does not read, and which of them must not be passed over: those that add to a prompt."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from fastdpo.data.errors import PreferenceDataError
from fastdpo.data.fields import brief
from fastdpo.data.prompt_columns import kind_of
from fastdpo.data.survey import Survey
from fastdpo.shown import listed

logger = logging.getLogger(__name__)


def refuse_foreign_columns(survey: Survey, read: Sequence[str], knows_prompt: bool, form: str, label: str) -> None:
    """Logs which columns, and which keys of messages, are not read.

    Raises PreferenceDataError for a column with text that belongs to the prompt and is not in it.

    read: the columns that the format reads. knows_prompt: False where the beginning that the answers happen to share
    would be taken for the prompt. form: the format's name.
    """
    others = sorted(name for name in survey.content if name not in read and name != "example_id")
    for name in others:
        if name not in survey.adds:
            continue
        where, value = survey.adds[name]
        column, kind = f"the column {name!r}", kind_of(name)
        without = (
            f"read the data set without it (in Python: remove_columns({name!r}) and save_to_disk of `datasets`, then "
            "give that folder)"
        )
        if kind == "unsupported":
            raise PreferenceDataError(
                f"{where}: {column} holds what is not supported (text conversations without tools only), found "
                f"{brief(value)}; if the prompts do not depend on it, {without}"
            )
        if kind == "part":
            raise PreferenceDataError(
                f"{where}: {column} looks like a part of the prompt and holds text that is not in it, found "
                f"{brief(value)}, but the format {form!r} reads {list(read)} only; put its text into 'prompt', or "
                f"{without}"
            )
        if kind == "renamed" and not knows_prompt:
            raise PreferenceDataError(
                f"{where}: {column} looks like the prompt, which is read from 'prompt'; rename "
                "it, with a string beside answers that are strings and a list of messages beside lists of messages; "
                f"or, if chosen and rejected begin with the prompt, {without}; found {brief(value)}"
            )
    if others:
        logger.warning("%s: columns not read by the format %r: %s", label, form, listed(others, limit=20))
    if keys := survey.unread_keys:
        said = ", ".join(f"{name!r} in {keys[name].count} rows" for name in sorted(keys)[:20])
        logger.warning("%s: keys of messages not read: %s%s", label, said, " and others" if len(keys) > 20 else "")
