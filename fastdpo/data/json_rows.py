"""The rows of a file of JSON lines, or of one JSON array of objects; either may be gzipped, both are UTF-8."""

from __future__ import annotations

import gzip
import itertools
import json
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast

from fastdpo.data.errors import PreferenceDataError
from fastdpo.data.fields import RawRow
from fastdpo.shown import shown

# Each element slices the window once, so a small one keeps that copy cheap.
_CHUNK = 1 << 16
_SPACE = " \t\r\n"  # what JSON allows between values
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


def iter_rows(path: Path) -> Iterator[RawRow]:
    """Rows in file order; a .json may hold an array or lines. Raises PreferenceDataError with the line or row."""
    _check_encoding(path)
    return _array_rows(path) if _holds_array(path) else _line_rows(path)


class _DoubledKey(ValueError):
    pass


def _unique(items: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(items)
    if len(fields) != len(items):
        names = [name for name, _ in items]
        doubled = next(name for name in names if names.count(name) > 1)
        raise _DoubledKey(f"the key {doubled!r} is there more than once")
    return fields


_DECODER = json.JSONDecoder(object_pairs_hook=_unique)


def _problem(error: Exception) -> str:
    """What is wrong with a text that the decoder refused."""
    if isinstance(error, RecursionError):
        return "nested too deeply to be read"
    if isinstance(error, UnicodeDecodeError):
        return f"not UTF-8 ({error.reason} at byte {error.start})"
    if isinstance(error, json.JSONDecodeError):
        return f"not valid JSON ({error.msg} at character {error.pos})"
    if isinstance(error, _DoubledKey):
        return f"not valid JSON ({error})"
    return f"not readable ({shown(str(error).split(';')[0])})"  # an integer of thousands of digits


def _open(path: Path) -> BinaryIO:
    return cast(BinaryIO, gzip.open(path, "rb")) if path.name.lower().endswith(".gz") else path.open("rb")


@contextmanager
def _gzip_errors(path: Path, after: str) -> Iterator[None]:
    try:
        yield
    except EOFError as error:
        raise PreferenceDataError(
            f"{shown(path)}: the gzip stream is truncated, it ends after {after} without its end mark; fetch or write "
            "the file again"
        ) from error
    except (gzip.BadGzipFile, zlib.error) as error:
        raise PreferenceDataError(
            f"{shown(path)}: not a sound gzip file after {after} ({error}); fetch it again, or drop the .gz if it is "
            "not compressed"
        ) from error


def _check_encoding(path: Path) -> None:
    """UTF-16 and UTF-32 betray themselves by their mark, or by the zeros beside the first ASCII character."""
    with _open(path) as stream, _gzip_errors(path, "line 0"):
        head = stream.read(4)
    encoding = json.detect_encoding(head)
    if encoding not in ("utf-8", "utf-8-sig"):
        raise PreferenceDataError(
            f"{shown(path)}, line 1: the file begins with the bytes {head.hex(' ')}, which are {encoding.upper()} and "
            "not UTF-8; save it as UTF-8"
        )


def _holds_array(path: Path) -> bool:
    if not path.name.lower().endswith((".json", ".json.gz")):
        return False
    with _open(path) as stream, _gzip_errors(path, "byte 0"):
        while byte := stream.read(1):
            if byte not in _SPACE.encode() + _BYTE_ORDER_MARK:
                return byte == b"["
    return False


def _line_rows(path: Path) -> Iterator[RawRow]:
    with _open(path) as stream:
        for number in itertools.count(1):
            with _gzip_errors(path, f"line {number - 1}"):
                line = stream.readline()
            if not line:
                return
            if number == 1:
                line = line.removeprefix(_BYTE_ORDER_MARK)
            if not line.strip(_SPACE.encode()):
                continue
            where = f"{shown(path)}, line {number}"
            try:
                # Never json.loads(bytes), which guesses the encoding of each line
                fields = _DECODER.decode(line.decode())
            except (ValueError, RecursionError) as error:
                raise PreferenceDataError(
                    f"{where}: {_problem(error)}; each line must be one JSON object in UTF-8, so mend or remove this "
                    "line"
                ) from error
            if not isinstance(fields, dict):
                hint = "; a JSON array needs the suffix .json" if isinstance(fields, list) else ""
                raise PreferenceDataError(
                    f"{where}: expected a JSON object with the columns of one pair, found {type(fields).__name__}{hint}"
                )
            yield RawRow(number, where, fields)


def _array_rows(path: Path) -> Iterator[RawRow]:
    """Elements of a top-level JSON array, decoded from a sliding window of the text."""
    index, line = 0, 1
    window, size, at_end, at_start = "", _CHUNK, False, True
    expected = "["
    pending = b""
    name = shown(path)

    def corrupt(problem: str) -> PreferenceDataError:
        return PreferenceDataError(
            f"{name}, line {line} (row {index}): {problem}; the file must be one JSON array of objects, or JSON lines"
        )

    with _open(path) as stream:
        while True:
            stripped = window.lstrip(_SPACE)
            line += window[: len(window) - len(stripped)].count("\n")
            window = stripped
            if window and expected == "end":
                raise corrupt(f"the array has ended, but {window[:20]!r} follows")
            if window and expected != "object":
                if window[0] == "]" and expected != "[":
                    window, expected = window[1:], "end"
                    continue
                if window[0] != expected[0]:
                    raise corrupt(f"expected {expected[0]!r}, found {window[0]!r}")
                window, expected = window[1:], "object"
                continue
            if window and window[0] == "]" and index == 0:
                window, expected = window[1:], "end"
                continue
            if window:
                if window[0] != "{":
                    raise corrupt(f"expected an object, found {window[:20]!r}")
                try:
                    fields, end = _DECODER.raw_decode(window)
                except json.JSONDecodeError as error:
                    if at_end or not _may_continue(error, window):
                        raise corrupt(f"not valid JSON ({error.msg})") from error
                except (ValueError, RecursionError) as error:
                    raise corrupt(_problem(error)) from error
                else:
                    yield RawRow(index, f"{name}, row {index}", fields)
                    line += window[:end].count("\n")
                    window, expected, index, size = window[end:], ",", index + 1, _CHUNK
                    continue
            if at_end and expected == "end":
                return
            if at_end:
                raise corrupt("the array ends without ']', so the file is truncated")
            with _gzip_errors(path, f"row {index}"):
                chunk = stream.read(size)
            at_end = not chunk
            # Read in doubling steps: an element longer than the window is decoded again only O(log length) times.
            size *= 2
            try:
                text, pending = _decode(pending + chunk, at_end)
            except UnicodeDecodeError as error:
                raise corrupt(f"not UTF-8 ({error.reason})") from error
            if text and at_start:
                text, at_start = text.removeprefix("\ufeff"), False
            window += text


def _decode(data: bytes, final: bool) -> tuple[str, bytes]:
    """The text of data, and the bytes of a character that its end cuts."""
    try:
        return data.decode(), b""
    except UnicodeDecodeError as error:
        if final or len(data) - error.start > 3:
            raise
        return data[: error.start].decode(), data[error.start :]


def _may_continue(error: json.JSONDecodeError, window: str) -> bool:
    # An escape or a literal that the window cuts is reported at most 12 characters before the window's end.
    return error.msg.startswith("Unterminated string") or error.pos >= len(window) - 12
