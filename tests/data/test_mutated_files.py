"""Valid files of every format and encoding, with one thing changed: counts that add up, or one sentence with the place.

How many rows a file has is counted here, by other means than the library's.
"""

from __future__ import annotations

import gzip
import json
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from fastdpo.data import PreferenceDataError, tokenize_preferences
from fastdpo.data.readers import read_preferences

Row = dict[str, Any]
TOKENIZER = tiny.tokenizer()
SUFFIXES = (".jsonl", ".json", ".jsonl.gz", ".json.gz", ".parquet")


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


#: Format → its data_format, and the row of a question and two answers.
FORMATS: dict[str, tuple[str, Callable[[str, str, str], Row]]] = {
    "hh-rlhf": (
        "auto",
        lambda q, a, b: {
            "chosen": f"\n\nHuman: {q}\n\nAssistant: {a}",
            "rejected": f"\n\nHuman: {q}\n\nAssistant: {b}",
        },
    ),
    "helpful": (
        "auto",
        lambda q, a, b: {"prompt": q, "response_0": a, "response_1": b, "better_response_id": len(a) % 2},
    ),
    "harmless": (
        "beavertails-harmless",
        lambda q, a, b: {
            "prompt": q,
            "response_0": a,
            "response_1": b,
            "is_response_0_safe": True,
            "is_response_1_safe": len(b) % 2 == 0,
        },
    ),
    "explicit plain": ("auto", lambda q, a, b: {"prompt": q, "chosen": a, "rejected": b}),
    "implicit plain": ("auto", lambda q, a, b: {"chosen": f"{q} {a}", "rejected": f"{q} {b}"}),
    "explicit messages": (
        "trl",
        lambda q, a, b: {"prompt": [user(q)], "chosen": [assistant(a)], "rejected": [assistant(b)]},
    ),
    "implicit messages": (
        "auto",
        lambda q, a, b: {"chosen": [user(q), assistant(a)], "rejected": [user(q), assistant(b)]},
    ),
    "string beside messages": (
        "auto",
        lambda q, a, b: {"prompt": q, "chosen": [user(q), assistant(a)], "rejected": [user(q), assistant(b)]},
    ),
}
WORDS = st.sampled_from(
    ["sea", "Where?", "deep", "海は青い", "e\u0301t\u00e9", "no\x00thing", "\U0001f469\u200d\U0001f680", ""]
)


def _value(draw: st.DrawFn, json_only: bool) -> Any:
    """What no text column holds."""
    nested: Any = "x"
    for _ in range(draw(st.sampled_from([5, 500]))):
        nested = [nested]
    odd = [None, 7, True, 0.5, ["x"], {"a": 1}, [], "", "text", [user("q")], [{"role": "gpt", "content": "x"}], nested]
    if json_only:
        odd += ["cut \ud83d", [assistant("\udc80")], 10**4299, 10**30, float("nan")]
    return draw(st.sampled_from(odd))


@st.composite
def files(draw: st.DrawFn) -> tuple[str, list[Row], str]:
    """data_format, rows of one format of which one may be changed, and a suffix."""
    data_format, make = FORMATS[draw(st.sampled_from(sorted(FORMATS)))]
    rows = [
        make(f"{i} {draw(WORDS)}", draw(WORDS), f"{draw(WORDS)}x")
        for i in range(draw(st.integers(min_value=1, max_value=4)))
    ]
    suffix = draw(st.sampled_from(SUFFIXES))
    row = draw(st.sampled_from(rows))
    column = draw(st.sampled_from(sorted(row)))
    what = draw(st.sampled_from(["nothing", "drop", "rename", "add", "value", "value", "crlf", "other format"]))
    if what == "drop":
        del row[column]
    elif what == "rename":
        row[draw(st.sampled_from(["text", "query", "messages", "Prompt", "\x1b[2J\u202e"]))] = row.pop(column)
    elif what == "add":
        name = draw(st.sampled_from(["system", "tools", "history", "messages", "note", "prompt"]))
        row[name] = _value(draw, suffix != ".parquet")
    elif what == "value":
        row[column] = _value(draw, suffix != ".parquet")
    elif what == "crlf" and isinstance(row[column], str):
        row[column] = row[column].replace("\n", "\r\n")
    elif what == "other format":
        other = FORMATS[draw(st.sampled_from(sorted(FORMATS)))][1]("q", "a", "b")
        row.clear()
        row.update(other)
    return data_format, rows, suffix


def encoded(rows: list[Row], suffix: str, line_end: str = "\n") -> bytes:
    if suffix == ".parquet":
        try:
            names = dict.fromkeys(name for row in rows for name in row)
            table = pa.table({name: [row.get(name) for row in rows] for name in names})
        except (pa.ArrowException, TypeError, ValueError, OverflowError):
            assume(False)  # no column can hold this
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink)
        return sink.getvalue().to_pybytes()
    lines = suffix.startswith(".jsonl")
    text = line_end.join([json.dumps(row) for row in rows] + [""]) if lines else json.dumps(rows, indent=2)
    return gzip.compress(text.encode()) if suffix.endswith(".gz") else text.encode()


def rows_in(data: bytes, suffix: str) -> int:
    if suffix == ".parquet":
        return len(pq.read_table(pa.BufferReader(data)))
    text = (gzip.decompress(data) if suffix.endswith(".gz") else data).decode("utf-8-sig")
    return (
        sum(1 for line in text.split("\n") if line.strip(" \t\r"))
        if suffix.startswith(".jsonl")
        else len(json.loads(text))
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("files")


def outcome(folder: Path, data: bytes, suffix: str, data_format: str) -> tuple[str, Counter[str]]:
    """What was said, and the pairs that were read, none where the file was refused."""
    path = folder / f"pairs{suffix}"
    path.write_bytes(data)
    try:
        dataset, report = read_preferences(path, data_format=data_format, cache_dir=folder / "cache")
    except PreferenceDataError as error:
        said = str(error)
        assert said.isprintable(), said
        assert path.name in said, said
        assert re.search(
            r"(line|row|byte) \d+|is empty|columns found|the columns are|all \d+ pairs were left out", said
        ), said
        return said, Counter()
    count = rows_in(data, suffix)
    assert report.rows == count == report.used + report.left_out.count
    assert len(dataset) == report.used == len(set(dataset["example_id"]))
    try:
        kept, tokens = tokenize_preferences(dataset, TOKENIZER, max_length=40, max_prompt_length=20)
    except PreferenceDataError as error:
        said = str(error)
        assert f"kept 0 of {report.used} pairs" in said, said
    else:
        assert tokens.total == report.used
        assert len(kept) == tokens.kept == tokens.total - sum(tally.count for tally in tokens.reasons.values())
    pairs = Counter(json.dumps({**row, "example_id": None}) for row in dataset)
    return f"{report.used} of {report.rows}", pairs


def without_places(said: str) -> list[str]:
    """The words of a message, without the place and the value that is seen there."""
    return sorted(re.findall(r"\w+", re.sub(r"(line|row|character) \d+|found .*?;", "", said)))


@settings(max_examples=200, deadline=None)
@given(files())
def test_one_changed_row(folder: Path, made: tuple[str, list[Row], str]) -> None:
    """Also in the other order of rows, which changes nothing but which row is named."""
    data_format, rows, suffix = made
    said, pairs = outcome(folder, encoded(rows, suffix), suffix, data_format)
    other_said, other_pairs = outcome(folder, encoded(rows[::-1], suffix), suffix, data_format)
    assert pairs == other_pairs
    assert without_places(said) == without_places(other_said)


@settings(max_examples=400, deadline=None)
@given(files(), st.data())
def test_damaged_bytes(folder: Path, made: tuple[str, list[Row], str], data: st.DataObject) -> None:
    """Bytes that were cut, flipped, or put in; with the line ends of Windows, or a mark at the beginning."""
    data_format, rows, suffix = made
    whole = encoded(rows, suffix, data.draw(st.sampled_from(["\n", "\r\n", "\n\n \t\n"])))
    packed = suffix.endswith(".gz") and data.draw(st.booleans())  # damage below the compression
    inner = gzip.decompress(whole) if packed else whole
    at = data.draw(st.integers(0, len(inner) - 1))
    how = data.draw(st.sampled_from(["cut", "flip", "insert", "mark", "utf-16", "deep", "long", "twice"]))
    text = suffix != ".parquet" and (packed or not suffix.endswith(".gz"))
    assume(text or how in ("cut", "flip", "insert"))
    changed = {
        "cut": lambda: inner[:at],
        "flip": lambda: inner[:at] + bytes([inner[at] ^ data.draw(st.integers(1, 255))]) + inner[at + 1 :],
        "insert": lambda: (
            inner[:at] + data.draw(st.sampled_from([b"\0", b"\xff", b"\xed\xa0\xbd", b"\n"])) + inner[at:]
        ),
        "mark": lambda: b"\xef\xbb\xbf" + inner,
        "utf-16": lambda: inner.decode().encode("utf-16"),
        "deep": lambda: inner.replace(b"{", b'{"a":' + b"[" * 3000 + b"]" * 3000 + b",", 1),
        "long": lambda: inner.replace(b"{", b'{"a":' + b"9" * 5000 + b",", 1),
        "twice": lambda: re.sub(rb'"(chosen|response_0)":', rb'"\1": 1, "\1":', inner, count=1),
    }[how]()
    outcome(folder, gzip.compress(changed) if packed else changed, suffix, data_format)
