"""The rows of one local file (.jsonl, .json, either gzipped, or .parquet), one at a time.

Every row comes with its position and with `where`, the place a message can name. The position is the 1-based line for
JSON lines, and the 0-based row for a JSON array and for parquet. No file is held in memory as a whole.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from fastdpo.data import json_rows, parquet_rows
from fastdpo.data.errors import PreferenceDataError
from fastdpo.data.fields import RawRow

SUFFIXES = (".jsonl", ".json", ".jsonl.gz", ".json.gz", ".parquet")


def has_known_suffix(path: Path) -> bool:
    return path.name.lower().endswith(SUFFIXES)


def is_parquet(path: Path) -> bool:
    return path.name.lower().endswith(".parquet")


def iter_rows(path: Path, columns: Sequence[str] | None = None) -> Iterator[RawRow]:
    """Rows in file order. columns: those to read from a parquet file (None: all); JSON rows come whole.

    Raises PreferenceDataError for an unknown suffix, and for a corrupt or truncated file with the line or row; OSError
    for a file that cannot be opened.
    """
    check_readable(path)
    return parquet_rows.iter_rows(path, columns) if is_parquet(path) else json_rows.iter_rows(path)


def check_readable(path: Path) -> None:
    """Raises for what is no file with a suffix that is read."""
    if not has_known_suffix(path):
        raise PreferenceDataError(
            f"path={str(path)!r} has an unsupported suffix; accepted: {', '.join(SUFFIXES)}. Convert the file, for "
            "example with datasets.Dataset.to_json"
        )
    if not path.exists():
        raise FileNotFoundError(f"path={str(path)!r} does not exist")
    if not path.is_file():
        # Opening a pipe waits for a writer, and it could not be read twice
        raise PreferenceDataError(f"path={str(path)!r} is no regular file; write the rows into one")
