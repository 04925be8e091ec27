"""The rows of a parquet file, and of any other Arrow data, as Python values; a value that cannot be one is named."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from fastdpo.data.errors import DAMAGE, PreferenceDataError, cause
from fastdpo.data.fields import RawRow
from fastdpo.shown import listed, shown

_BATCH = 1024


def iter_rows(path: Path, columns: Sequence[str] | None) -> Iterator[RawRow]:
    """Rows with the columns named (None: all). Raises PreferenceDataError with the row."""
    for first, batch in iter_batches(path, columns):
        yield from rows_of(batch, shifted(functools.partial(place, path), first))


def place(path: Path, row: int) -> tuple[int, str]:
    """The position of a row, from 0, and how a message names it."""
    return row, f"{shown(path)}, row {row}"


def shifted(place: Callable[[int], tuple[int, str]], start: int) -> Callable[[int], tuple[int, str]]:
    """`place` for rows that are counted from `start`."""
    return lambda i: place(start + i)


def iter_batches(path: Path, columns: Sequence[str] | None = None) -> Iterator[tuple[int, pa.RecordBatch]]:
    """The number of the first row of each batch, and the batch. Raises PreferenceDataError for a damaged file."""
    index = 0
    file = _opened(path)
    with _damage(path, index):
        names = file.schema_arrow.names
        wanted = names if columns is None else [name for name in columns if name in names]
        batches = file.iter_batches(batch_size=_BATCH, columns=wanted)
    while True:
        with _damage(path, index):
            batch = next(batches, None)
        if batch is None:
            break
        yield index, batch
        index += batch.num_rows
    if index != file.metadata.num_rows:
        raise PreferenceDataError(
            f"{shown(path)}: not a sound parquet file after row {index} (it says that it has {file.metadata.num_rows} "
            "rows); fetch or write it again"
        )


def column_names(path: Path) -> list[str]:
    """Names of the columns, each once. Raises PreferenceDataError for a damaged file and for doubled names."""
    names: list[str] = _opened(path).schema_arrow.names
    return names


def _opened(path: Path) -> pq.ParquetFile:
    with _damage(path, 0):
        file = pq.ParquetFile(path)
        names = file.schema_arrow.names
        if doubled := sorted({name for name in names if names.count(name) > 1}):
            raise PreferenceDataError(f"{shown(path)}: more than one column is called {listed(doubled)}; rename them")
    return file


@contextmanager
def _damage(path: Path, row: int) -> Iterator[None]:
    try:
        yield
    except PreferenceDataError:
        raise
    except (*DAMAGE, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:  # not the file's contents
            raise
        raise PreferenceDataError(
            f"{shown(path)}: not a sound parquet file after row {row} ({cause(error)}); fetch or write it again"
        ) from error


def rows_of(batch: pa.RecordBatch | pa.Table, place: Callable[[int], tuple[int, str]]) -> Iterator[RawRow]:
    """Rows of Arrow data. place(i): the position of row i and how a message names it."""
    values = {name: _python(batch.column(name), name, place) for name in batch.schema.names}
    for i in range(batch.num_rows):
        position, where = place(i)
        yield RawRow(position, where, {name: column[i] for name, column in values.items()})


def _python(column: Any, name: str, place: Callable[[int], tuple[int, str]]) -> list[Any]:
    try:
        values: list[Any] = column.to_pylist()
    except DAMAGE:
        for i in range(len(column)):
            try:
                column[i].as_py()
            except DAMAGE as error:  # bytes that are no UTF-8, a date before the year 1
                raise PreferenceDataError(
                    f"{place(i)[1]}: the field {name!r} cannot be read ({cause(error)}); mend or remove the row"
                ) from error
        raise
    return values


def first_content(column: Any) -> int | None:
    """The first row of an Arrow column that holds anything: not null, and no empty text or list. None: no row."""
    kind = column.type
    if pa.types.is_null(kind):
        return None
    if pa.types.is_dictionary(kind):
        column, kind = column.cast(kind.value_type), kind.value_type
    filled = pc.is_valid(column)
    if pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_binary(kind):
        filled = pc.and_(filled, pc.fill_null(pc.greater(pc.binary_length(column), 0), False))
    elif pa.types.is_list(kind) or pa.types.is_large_list(kind):
        filled = pc.and_(filled, pc.fill_null(pc.greater(pc.list_value_length(column), 0), False))
    elif pa.types.is_struct(kind):  # as a JSON object whose values are all null
        parts = [pc.is_valid(pc.struct_field(column, [i])) for i in range(kind.num_fields)]
        filled = pc.and_(filled, functools.reduce(pc.or_, parts, pa.scalar(False)))
    found = pc.index(filled, True).as_py()
    return None if found < 0 else found
