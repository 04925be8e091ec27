"""Raw rows to the canonical form: prompt, chosen, rejected (all strings or all lists of messages) and example_id."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import datasets
import numpy as np

from fastdpo.data.errors import PreferenceDataError
from fastdpo.data.formats import (
    CANONICAL_CONVERSATIONAL,
    CANONICAL_PLAIN,
    COLUMNS,
    PreferenceFormat,
    choose_format,
)
from fastdpo.data.reports import NAMED, ReadReport, Tally
from fastdpo.data.shared_prefix import Pair, Reading
from fastdpo.data.survey import survey_dataset

# Part of what `datasets` hashes into its cache keys. Library functions are hashed by name, so without it a change of
# this code would go on serving old results: raise it whenever reading or tokenisation gives other rows.
CACHE_VERSION = 3

_DROPPED = "_dropped"
_NOTES = ("repeated_prompts", "unanswered_turns", "prompt_in_answers", "without_shared_prompt")
# Travels with a Dataset: what was read once is not asked again whether its answers repeat the prompt.
_MARK = "preference pairs in fastdpo's canonical form"


def require_dataset(dataset: Any, argument: str) -> datasets.Dataset:
    """Raises PreferenceDataError for anything but a non-empty map-style Dataset, saying what to pass instead."""
    if isinstance(dataset, (datasets.IterableDataset, datasets.IterableDatasetDict)):
        raise PreferenceDataError(
            f"{argument} is a streaming {type(dataset).__name__}; the trainer needs its length and random access, so "
            "load it with streaming=False (rows stay on disk, not in memory)"
        )
    if isinstance(dataset, datasets.DatasetDict):
        raise PreferenceDataError(f"{argument} is a DatasetDict; pass one of its splits: {', '.join(dataset)}")
    if not isinstance(dataset, datasets.Dataset):
        raise PreferenceDataError(f"{argument} must be a datasets.Dataset, found {type(dataset).__name__}")
    if len(dataset) == 0:
        raise PreferenceDataError(f"{argument} is empty; check the split and the filters before it")
    return dataset


def canonical_features(conversational: bool) -> datasets.Features:
    text = datasets.Value("string")
    part = [{"role": text, "content": text}] if conversational else text
    return datasets.Features({"prompt": part, "chosen": part, "rejected": part, "example_id": text})


def flagged_features(conversational: bool) -> datasets.Features:
    """Canonical features plus what was done to each row, so that the cache keeps the counts."""
    return datasets.Features(
        {**canonical_features(conversational), **dict.fromkeys((_DROPPED, *_NOTES), datasets.Value("bool"))}
    )


def flagged_row(reading: Reading, conversational: bool, example_id: str) -> dict[str, Any]:
    empty: Any = [] if conversational else ""
    parts = reading.pair or Pair(empty, empty, empty)
    notes = {name: name in reading.notes for name in _NOTES}
    return {**parts._asdict(), "example_id": example_id, _DROPPED: reading.pair is None, **notes}


def counted(
    flagged: datasets.Dataset, data_format: PreferenceFormat, rows: int, label: str
) -> tuple[datasets.Dataset, ReadReport]:
    """The rows that are not left out, and what was done to all.

    rows: how many the survey has seen. Raises PreferenceDataError when none is left, or when the counts differ.
    """
    flags = flagged.select_columns([_DROPPED, *_NOTES]).with_format("numpy")[:]
    at = {name: np.flatnonzero(np.asarray(flags[name], dtype=bool)) for name in (_DROPPED, *_NOTES)}
    if len(flagged) != rows:
        raise PreferenceDataError(
            f"{label}: {rows} rows were there at first, and {len(flagged)} when they were read; start again when "
            "nothing writes to the data any more"
        )
    dropped = at[_DROPPED]
    dataset = flagged.remove_columns([_DROPPED, *_NOTES])
    if len(dropped) == rows:
        raise PreferenceDataError(
            f"{label}: all {rows} pairs were left out by the format {data_format.name!r} ({data_format.drop_reason}); "
            "choose another data_format or split"
        )
    report = ReadReport(
        rows=rows,
        used=rows - len(dropped),
        left_out=_tally(dataset, dropped),
        left_out_reason=data_format.drop_reason if len(dropped) else "",
        **{name: _tally(dataset, at[name]) for name in _NOTES},
    )
    if len(dropped):
        dataset = dataset.select(np.setdiff1d(np.arange(rows), dropped))
    dataset.info.description = _MARK
    return dataset, report


def _tally(dataset: datasets.Dataset, rows: np.ndarray) -> Tally:
    first = dataset.select(rows[:NAMED])["example_id"] if len(rows) else []
    return Tally(len(rows), tuple(first))


def is_canonical(dataset: datasets.Dataset) -> bool:
    """Whether a data set came from here, with nothing added to it."""
    return dataset.info.description == _MARK and any(
        dataset.features == canonical_features(conversational) for conversational in (True, False)
    )


def format_of_dataset(
    dataset: datasets.Dataset, data_format: str, label: str, place: Callable[[int], tuple[int, str]]
) -> PreferenceFormat:
    """The format of all rows of a Dataset. place(i): the position of row i and how a message names it."""
    if is_canonical(dataset):
        conversational = dataset.features == canonical_features(True)
        return CANONICAL_CONVERSATIONAL if conversational else CANONICAL_PLAIN
    return choose_format(survey_dataset(dataset, COLUMNS, place), data_format, label)


def rows_of_batch(batch: dict[str, list[Any]]) -> list[dict[str, Any]]:
    return [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]


def to_canonical(
    dataset: datasets.Dataset, data_format: PreferenceFormat, label: str, num_proc: int | None
) -> tuple[datasets.Dataset, ReadReport]:
    """The canonical form of a Dataset whose rows have `data_format`; example_id is "label:row", rows from 0."""
    columns = data_format.read_of(dataset.column_names)
    flagged = dataset.select_columns(columns).map(
        _flag_batch,
        batched=True,
        with_indices=True,
        num_proc=num_proc,
        features=flagged_features(data_format.conversational),
        remove_columns=columns,
        fn_kwargs={"data_format": data_format, "label": label, "version": CACHE_VERSION},
        desc="Reading preference pairs",
    )
    return counted(flagged, data_format, len(dataset), label)


def _flag_batch(
    batch: dict[str, list[Any]], indices: list[int], data_format: PreferenceFormat, label: str, version: int
) -> dict[str, list[Any]]:
    rows = [
        flagged_row(data_format.convert(row, f"{label}, row {i}"), data_format.conversational, f"{label}:{i}")
        for row, i in zip(rows_of_batch(batch), indices, strict=True)
    ]
    return {name: [row[name] for row in rows] for name in flagged_features(data_format.conversational)}
