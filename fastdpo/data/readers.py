"""Preference pairs from a local file, a local folder or the hub, in one canonical form."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets
from datasets.exceptions import DatasetGenerationError

from fastdpo.data.canonical import (
    CACHE_VERSION,
    flagged_features,
    flagged_row,
    format_of_dataset,
    log_unused_columns,
    require_dataset,
    to_canonical,
    without_dropped,
)
from fastdpo.data.errors import PreferenceDataError
from fastdpo.data.formats import PreferenceFormat, check_data_format, choose_format
from fastdpo.data.raw_rows import iter_rows
from fastdpo.data.sources import SourceFile, find_source


def load_preferences(
    path: str | Path,
    *,
    split: str = "train",
    name: str | None = None,
    data_format: str = "auto",
    num_proc: int | None = None,
    cache_dir: str | Path | None = None,
    revision: str | None = None,
    max_examples: int | None = None,
) -> datasets.Dataset:
    """Read preference pairs as a `datasets.Dataset` with prompt, chosen, rejected and example_id.

    prompt, chosen and rejected are lists of messages {role, content} (a completion has one or more), or all three are
    strings: TRL's explicit-prompt forms. example_id is the file and its 1-based line ("train.jsonl.gz:17") for JSON
    lines, and the file or data set and its 0-based row for a JSON array, parquet, a saved data set and the hub.

    path: a file (.jsonl, .json, .jsonl.gz, .json.gz, .parquet), a folder (of save_to_disk, or with files or folders
        named by split), or the name of a data set on the hub. What exists locally is taken as local.
    split: a single file, like a single saved data set, has the split "train".
    name: a config, or a folder inside the data set ("harmless-base" of HH-RLHF).
    data_format: "auto", "hh-rlhf", "beavertails-helpful", "beavertails-harmless" or "trl". "auto" looks at the
        columns and the first row; the two readings of BeaverTails must be named.
    num_proc: worker processes; one local file is read by one process.
    cache_dir: where `datasets` keeps what it read (default: its own cache). Changed files are read again.
    revision: of a hub data set.
    max_examples: read only that many rows, from the first; a format that leaves pairs out may then give fewer.

    Pairs that a format leaves out by its definition are counted in a warning. Anything that cannot be read raises:
    FileNotFoundError for the path, PreferenceDataError (a ValueError) for arguments and for data, with file and line.
    """
    for argument, value in (("num_proc", num_proc), ("max_examples", max_examples)):
        if value is not None and value < 1:
            raise PreferenceDataError(f"{argument}={value} must be at least 1, or None")
    check_data_format(data_format)
    cache = None if cache_dir is None else str(cache_dir)
    source = find_source(path, split=split, name=name, cache_dir=cache, revision=revision, num_proc=num_proc)
    if isinstance(source, list):
        return _read_files(source, str(path), split, data_format, cache, num_proc, max_examples)
    dataset = require_dataset(source, f"path={str(path)!r}, split={split!r}")
    if max_examples is not None:
        dataset = dataset.select(range(min(max_examples, len(dataset))))
    label = Path(path).name if Path(path).is_dir() else str(path)
    return to_canonical(dataset, format_of_dataset(dataset, data_format, label), label, num_proc)


def _read_files(
    files: list[SourceFile],
    label: str,
    split: str,
    data_format: str,
    cache_dir: str | None,
    num_proc: int | None,
    max_examples: int | None,
) -> datasets.Dataset:
    first = next((row for file in files for row in iter_rows(file.path)), None)
    if first is None:
        raise PreferenceDataError(f"path={label!r}, split={split!r} is empty: no rows in {len(files)} file(s)")
    chosen_format = choose_format(first.fields, data_format, first.where)
    log_unused_columns(first.fields, chosen_format, label)
    # A limit counts rows over all files, so it leaves nothing to share out.
    workers = min(num_proc or 1, len(files)) if max_examples is None else 1
    # By what they hold: a file that was replaced may have kept its size and its time
    contents = [_digest(file.path) for file in files]
    # `datasets` calls the generator once for each element of lists, with any number of workers, and once for a tuple.
    shares: Callable[[Iterable[Any]], Sequence[Any]] = list if workers > 1 else tuple
    try:
        flagged = datasets.Dataset.from_generator(
            _flagged_rows,
            features=flagged_features(chosen_format.conversational),
            cache_dir=cache_dir,
            split=datasets.NamedSplit(split),
            num_proc=workers if workers > 1 else None,
            gen_kwargs={
                "files": shares(files),
                "contents": shares(contents),
                "data_format": chosen_format,
                "max_examples": max_examples,
                "version": CACHE_VERSION,
            },
        )
    except DatasetGenerationError as error:
        if isinstance(error.__cause__, PreferenceDataError):
            raise error.__cause__ from None
        raise
    return without_dropped(flagged, chosen_format, label)


def _digest(path: Path) -> str:
    digest = hashlib.blake2b(digest_size=16)
    with path.open("rb") as file:
        while chunk := file.read(1 << 24):
            digest.update(chunk)
    return digest.hexdigest()


def _flagged_rows(
    files: Sequence[SourceFile],
    contents: Sequence[str],
    data_format: PreferenceFormat,
    max_examples: int | None,
    version: int,
) -> Iterator[dict[str, Any]]:
    rows = ((file, row) for file in files for row in iter_rows(file.path, data_format.columns))
    for file, row in itertools.islice(rows, max_examples):
        pair = data_format.convert(row.fields, row.where)
        yield flagged_row(pair, data_format.conversational, f"{file.label}:{row.position}")
