"""One look at all rows of a data set, before its format is chosen: what is there, and where it was seen first."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import datasets

from fastdpo.data import parquet_rows
from fastdpo.data.fields import RawRow, has_content, unread_keys
from fastdpo.data.hh_rlhf import is_transcript
from fastdpo.data.prompt_columns import adds_text, is_foreign
from fastdpo.data.reports import NO_ROWS, Tally

Kind = Literal["none", "string", "list", "other"]


class Shape(NamedTuple):
    """What the three columns of one row hold; "none": the column is absent or null, or a prompt without message."""

    prompt: Kind
    chosen: Kind
    rejected: Kind


class FirstRow(NamedTuple):
    """The first row of a kind, and how many rows were before it."""

    number: int
    row: RawRow


@dataclass
class Survey:
    """What rows hold, in whatever order they come: only which row is named first depends on it.

    rows: how many. content: column → where it holds something first (not null, not empty); None where no row does.
    adds: column named like a part of the prompt → where it first holds text that the prompt does not, and the value.
    unread_keys: keys of messages beside role and content → the rows with something in them.
    shapes: kinds of prompt, chosen and rejected → the first row of these.
    transcript, no_transcript: the first row whose two answers are HH-RLHF transcripts, and the first where one is not.
    prompted: rows with a prompt that is text with something in it; repeated: those whose answers both begin with it;
    longest_repeated: characters of the longest of these prompts, without the space around it.
    """

    rows: int = 0
    content: dict[str, str | None] = field(default_factory=dict)
    adds: dict[str, tuple[str, Any]] = field(default_factory=dict)
    unread_keys: dict[str, Tally] = field(default_factory=dict)
    shapes: dict[Shape, FirstRow] = field(default_factory=dict)
    transcript: FirstRow | None = None
    no_transcript: FirstRow | None = None
    prompted: int = 0
    repeated: Tally = NO_ROWS
    longest_repeated: int = 0

    def add(self, row: RawRow) -> None:
        """One row with all its columns."""
        for name, value in row.fields.items():
            if self.content.get(name) is None:
                self.content[name] = row.where if has_content(value) else None
        self.add_pair(row)

    def add_pair(self, row: RawRow) -> None:
        """One row, of which prompt, chosen and rejected are looked at, and what is named like a part of a prompt."""
        prompt, chosen, rejected = (row.fields.get(name) for name in ("prompt", "chosen", "rejected"))
        for name, value in row.fields.items():
            asked = is_foreign(name) and name != "prompt" and name not in self.adds and has_content(value)
            if asked and adds_text(name, value, row.fields):
                self.adds[name] = row.where, value
        for key in {key for each in (prompt, chosen, rejected) for key in _keys(each)}:
            self.unread_keys[key] = self.unread_keys.get(key, NO_ROWS).plus(row.where)
        first = FirstRow(self.rows, row)
        self.rows += 1
        shape = Shape("none" if prompt == [] else _kind(prompt), _kind(chosen), _kind(rejected))
        self.shapes.setdefault(shape, first)
        if is_transcript(chosen) and is_transcript(rejected):
            self.transcript = self.transcript or first
        else:
            self.no_transcript = self.no_transcript or first
        if prompt and isinstance(prompt, str) and isinstance(chosen, str) and isinstance(rejected, str):
            self.prompted += 1
            if chosen.startswith(prompt) and rejected.startswith(prompt):
                self.repeated = self.repeated.plus(row.where)
                self.longest_repeated = max(self.longest_repeated, len(prompt.strip()))


def _keys(messages: Any) -> Iterator[str]:
    """The keys of messages that are not read."""
    for message in messages if isinstance(messages, list) else ():
        if isinstance(message, Mapping) and len(message) > 2:
            yield from unread_keys(message)


def _kind(value: Any) -> Kind:
    if value is None:
        return "none"
    return "string" if isinstance(value, str) else "list" if isinstance(value, list) else "other"


class Columns(NamedTuple):
    """What is looked at in Arrow data: the values of `read`, and of those that are `watched` where they hold any."""

    read: frozenset[str]
    watched: Callable[[str], bool]

    def of(self, names: Iterable[str]) -> list[str]:
        return [name for name in names if name in self.read or self.watched(name)]


def survey_batch(survey: Survey, batch: Any, columns: Columns, place: Callable[[int], tuple[int, str]]) -> None:
    """Adds Arrow data to a survey. place(i): the position of row i and how a message names it."""
    names = batch.schema.names
    for name in names:
        if survey.content.get(name) is None:
            found = parquet_rows.first_content(batch.column(name))
            survey.content[name] = None if found is None else place(found)[1]
    compared = [
        name
        for name in names
        if columns.watched(name)
        and name not in survey.adds
        and parquet_rows.first_content(batch.column(name)) is not None
    ]
    looked_at = [name for name in names if name in columns.read or name in compared]
    for row in parquet_rows.rows_of(batch.select(looked_at), place):
        survey.add_pair(row)


def survey_dataset(dataset: datasets.Dataset, columns: Columns, place: Callable[[int], tuple[int, str]]) -> Survey:
    """The survey of a Dataset: nulls and empty values are read as in JSON."""
    survey = Survey(content=dict.fromkeys(dataset.column_names))
    looked_at = columns.of(dataset.column_names) or dataset.column_names[:1]
    for batch in dataset.select_columns(looked_at).with_format("arrow").iter(batch_size=1000):
        start = survey.rows
        survey_batch(survey, batch, columns, parquet_rows.shifted(place, start))
    return survey


def survey_parquet(survey: Survey, path: Path, columns: Columns, limit: int | None) -> None:
    """Adds the first `limit` rows of a parquet file (None: all)."""
    names = parquet_rows.column_names(path)
    survey.content = {**dict.fromkeys(names), **survey.content}
    for start, batch in parquet_rows.iter_batches(path, columns.of(names) or names[:1]):
        if limit is not None and start >= limit:
            return
        rows = batch if limit is None else batch.slice(0, limit - start)
        survey_batch(survey, rows, columns, parquet_rows.shifted(functools.partial(parquet_rows.place, path), start))
