"""Datasets that hold token ids already."""

from __future__ import annotations

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from fastdpo.data.errors import PreferenceDataError
from fastdpo.data.truncation import LengthLimits

_INT32_MAX = 2**31 - 1
ID_COLUMNS = ("prompt_ids", "chosen_ids", "rejected_ids")


def pass_through(dataset: datasets.Dataset, limits: LengthLimits) -> datasets.Dataset:
    """The same rows with example_id ("row:N") and length where they are missing, and no other columns.

    Raises PreferenceDataError when an id column is missing or holds anything but lists of integers, when a list is
    null, empty or has a null, when an id is negative or beyond int32, or when a pair is longer than the limits: ids
    are not cut here, as nobody knows any more where a prompt may be cut.
    """
    missing = [name for name in ID_COLUMNS if name not in dataset.column_names]
    if missing:
        raise PreferenceDataError(
            f"dataset is tokenised only in part: {missing} missing; give all of {list(ID_COLUMNS)}, or none of them "
            "and the text columns instead"
        )
    schema = dataset.features.arrow_schema
    for name in ID_COLUMNS:
        kind = schema.field(name).type
        if not ((pa.types.is_list(kind) or pa.types.is_large_list(kind)) and pa.types.is_integer(kind.value_type)):
            raise PreferenceDataError(f"dataset: the column {name!r} must hold lists of integers, found {kind}")
    lengths = {name: _lengths(dataset, name) for name in ID_COLUMNS}
    prompt = lengths["prompt_ids"]
    longest = prompt + np.maximum(lengths["chosen_ids"], lengths["rejected_ids"])
    for limit, seen, counted in (
        ("max_prompt_length", prompt, "prompt tokens"),
        ("max_length", longest, "tokens of prompt and completion"),
    ):
        allowed = getattr(limits, limit)
        if allowed is not None and seen.max() > allowed:
            row = int(np.argmax(seen))
            raise PreferenceDataError(
                f"dataset is tokenised already, and row {row} has {seen[row]} {counted}, more than {limit}={allowed}; "
                f"tokenise the text with this limit, or pass a larger {limit} (None: no limit)"
            )
    if "example_id" not in dataset.column_names:
        dataset = dataset.add_column("example_id", [f"row:{i}" for i in range(len(dataset))])
    if "length" not in dataset.column_names:
        total = 2 * prompt + lengths["chosen_ids"] + lengths["rejected_ids"]
        dataset = dataset.add_column("length", total.tolist())
    return dataset.select_columns([*ID_COLUMNS, "example_id", "length"])


def _lengths(dataset: datasets.Dataset, name: str) -> np.ndarray:
    """Lengths of the lists of one column, (rows,) int64."""
    lengths = []
    rows = 0
    for table in dataset.select_columns(name).with_format("arrow").iter(batch_size=1000):
        column = table.column(name).combine_chunks()
        counts = pc.fill_null(pc.list_value_length(column), 0).to_numpy().astype(np.int64)
        if (counts == 0).any():
            row = rows + int(np.argmin(counts))
            raise PreferenceDataError(f"dataset: {name!r} of row {row} is null or empty; remove the row")
        _check_ids(pc.list_flatten(column), counts, name, rows)
        lengths.append(counts)
        rows += len(counts)
    return np.concatenate(lengths)


def _check_ids(ids: pa.Array, counts: np.ndarray, name: str, first: int) -> None:
    """ids: those of rows with `counts` ids each, of which the first is row `first`."""
    wrong = pc.or_kleene(pc.less(ids, 0), pc.greater(ids, _INT32_MAX))
    at = pc.index(pc.fill_null(wrong, True), True).as_py()
    if at < 0:
        return
    row = first + int(np.searchsorted(np.cumsum(counts), at, side="right"))
    value = ids[at].as_py()
    if value is None:
        raise PreferenceDataError(f"dataset: {name!r} has a null token id in row {row}; remove the row")
    raise PreferenceDataError(
        f"dataset: {name!r} has the token id {value} in row {row}; ids are 0 or more and below 2³¹, so tokenise the "
        "row again"
    )
