"""Preference pairs from a local file, a local folder or the hub, in one canonical form."""

from __future__ import annotations

import collections
import hashlib
import itertools
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
from datasets.exceptions import DatasetGenerationError

from fastdpo.data.canonical import (
    CACHE_VERSION,
    counted,
    flagged_features,
    flagged_row,
    format_of_dataset,
    require_dataset,
    to_canonical,
)
from fastdpo.data.errors import PreferenceDataError, cause
from fastdpo.data.formats import COLUMNS, PreferenceFormat, check_data_format, choose_format
from fastdpo.data.raw_rows import check_readable, is_parquet, iter_rows
from fastdpo.data.reports import ReadReport
from fastdpo.data.sources import SourceFile, find_source
from fastdpo.data.survey import Survey, survey_parquet
from fastdpo.shown import shown

logger = logging.getLogger(__name__)


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
    """Preference pairs as a `datasets.Dataset` with prompt, chosen, rejected and example_id.

    The arguments, what is read and what raises are those of `read_preferences`, whose report is logged as a warning
    where rows were left out or changed.
    """
    dataset, report = read_preferences(
        path,
        split=split,
        name=name,
        data_format=data_format,
        num_proc=num_proc,
        cache_dir=cache_dir,
        revision=revision,
        max_examples=max_examples,
    )
    if not report.is_plain:
        logger.warning("%s: %s", shown(path), report.summary())
    return dataset


def read_preferences(
    path: str | Path,
    *,
    split: str = "train",
    name: str | None = None,
    data_format: str = "auto",
    num_proc: int | None = None,
    cache_dir: str | Path | None = None,
    revision: str | None = None,
    max_examples: int | None = None,
) -> tuple[datasets.Dataset, ReadReport]:
    """Read preference pairs as a `datasets.Dataset` with prompt, chosen, rejected and example_id, and what became of
    each row: rows = used + left out.

    prompt, chosen and rejected are lists of messages {role, content} (a completion has one or more), or all three are
    strings: TRL's explicit-prompt forms. example_id is the file and its 1-based line ("train.jsonl.gz:17") for JSON
    lines, and the file or data set and its 0-based row for a JSON array, parquet, a saved data set and the hub.

    path: a file (.jsonl, .json, .jsonl.gz, .json.gz, .parquet; JSON in UTF-8), a folder (of save_to_disk, or with files
        or folders named by split), or the name of a data set on the hub. What exists locally is taken as local.
    split: a single file, like a single saved data set, has the split "train".
    name: a config, or a folder inside the data set ("harmless-base" of HH-RLHF).
    data_format: "auto", "hh-rlhf", "beavertails-helpful", "beavertails-harmless" or "trl". "auto" looks at the
        columns and at every row; the two readings of BeaverTails must be named. All rows must have one form: with a
        prompt or without, strings or lists of messages, HH-RLHF transcripts or plain texts. A column that is null or
        empty in every row counts as absent.
    num_proc: worker processes; one local file is read by one process.
    cache_dir: where `datasets` keeps what it read (default: its own cache). Changed files are read again.
    revision: of a hub data set.
    max_examples: read only that many rows, from the first; a format that leaves pairs out may then give fewer.

    A prompt that both answers of a conversation repeat is taken once, and turns after its last answer are dropped;
    rows so changed, and those that a format leaves out by its definition, are counted in the report.
    Anything that cannot be read, or not without guessing, raises: OSError (FileNotFoundError) for the path,
    PreferenceDataError (a ValueError) for arguments and for data, with file and line. So does a column that
    is named like a part of the prompt (`system`, `history`, `tools`, ...), where its text is not in the prompt.
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
    label = shown(label)
    chosen_format = format_of_dataset(dataset, data_format, label, lambda i: (i, f"{label}, row {i}"))
    return to_canonical(dataset, chosen_format, label, num_proc)


def _read_files(
    files: list[SourceFile],
    label: str,
    split: str,
    data_format: str,
    cache_dir: str | None,
    num_proc: int | None,
    max_examples: int | None,
) -> tuple[datasets.Dataset, ReadReport]:
    survey = _survey(files, max_examples)
    if not survey.rows:
        raise PreferenceDataError(f"path={label!r}, split={split!r} is empty: no rows in {len(files)} file(s)")
    chosen_format = choose_format(survey, data_format, shown(label))
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
        if workers > 1:  # a worker's error comes without its cause: meet it again here
            collections.deque(_flagged_rows(files, contents, chosen_format, max_examples, CACHE_VERSION), maxlen=0)
        raise _root(error) from None
    return counted(flagged, chosen_format, survey.rows, shown(label))


def _root(error: BaseException) -> BaseException:
    """What `datasets` wraps, as it is; what Arrow cannot hold as a PreferenceDataError."""
    causes = [error]
    while causes[-1].__cause__ is not None:
        causes.append(causes[-1].__cause__)
    first = next((each for each in causes if not isinstance(each, DatasetGenerationError)), error)
    if isinstance(first, pa.ArrowException) and not isinstance(first, (OSError, MemoryError)):
        return PreferenceDataError(f"the pairs cannot be kept by `datasets`: {cause(first)}")
    return first


def _survey(files: Sequence[SourceFile], max_examples: int | None) -> Survey:
    """One look at the rows that will be read; of parquet, only the columns that some format reads become values."""
    survey = Survey()
    for file in files:
        left = None if max_examples is None else max_examples - survey.rows
        if left is not None and left <= 0:
            break
        if is_parquet(file.path):
            check_readable(file.path)
            survey_parquet(survey, file.path, COLUMNS, left)
        else:
            for row in itertools.islice(iter_rows(file.path), left):
                survey.add(row)
    return survey


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
    rows = (
        (file, row) for file in files for row in iter_rows(file.path, (*data_format.columns, *data_format.optional))
    )
    for file, row in itertools.islice(rows, max_examples):
        reading = data_format.convert(row.fields, row.where)
        yield flagged_row(reading, data_format.conversational, f"{shown(file.label)}:{row.position}")
