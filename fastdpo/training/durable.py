"""Files that are whole or not there, outlive a crash of the machine, and are known by what they hold."""

from __future__ import annotations

import hashlib
import os
import re
import secrets
import shutil
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

#: Bytes of a file that are read at a time, by each thread.
_CHUNK_BYTES = 1 << 24
#: Hashing leaves the interpreter's lock; beyond this many threads the disk or memory is the limit.
_MAX_THREADS = 8


class FileDigest(NamedTuple):
    """What a file holds: its size in bytes and the BLAKE2b of them."""

    bytes: int
    blake2b: str


def flush(path: Path) -> None:
    """Have the disk hold the file, or the folder's list of names, at `path`."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def flush_tree(folder: Path) -> None:
    """The same for everything below `folder`, and for itself."""
    for path in sorted(folder.rglob("*")):
        flush(path)
    flush(folder)


def write_whole(path: Path, content: bytes) -> None:
    """Give `path` this content at once: written beside it into a file that nothing else can have made (no link is
    followed), flushed, renamed. Raises OSError, and leaves no part of it behind."""
    aside = path.with_name(f"_{path.name}.{secrets.token_hex(8)}.incomplete")  # uploads to the hub leave out _*
    try:
        with os.fdopen(os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666), "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
    flush(path.parent)


@contextmanager
def placed_whole(folder: Path, writes: bool = True) -> Iterator[Path]:
    """A new folder inside `folder`, which is made; what is in it afterwards takes its place there, file by file.

    writes: False gives a name that is not there, to ranks that write nothing.
    """
    aside = folder / f"_{secrets.token_hex(8)}.incomplete"
    if not writes:
        yield aside
        return
    aside.mkdir(parents=True)
    try:
        yield aside
        flush_tree(aside)
        for name in names_below(aside):
            if any((folder / part).is_symlink() for part in list(Path(name).parents)[:-1]):
                raise OSError(f"{folder / name} lies behind a link, which is not followed. Remove the link.")
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (aside / name).replace(folder / name)
        flush(folder)
    finally:
        shutil.rmtree(aside)


def remove_incomplete(path: Path) -> None:
    """Remove what killed processes have left of a `write_whole` to `path`. Nobody else may be writing it."""
    own = re.compile(rf"_{re.escape(path.name)}\.[0-9a-f]{{16}}\.incomplete")
    for left in [entry for entry in path.parent.iterdir() if own.fullmatch(entry.name)]:
        left.unlink()


def digest_of(path: Path) -> FileDigest:
    """Of a file. Raises OSError."""
    digest, size = hashlib.blake2b(digest_size=16), 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
            size += len(chunk)
    return FileDigest(size, digest.hexdigest())


def digests_of(folder: Path, names: Iterable[str]) -> dict[str, FileDigest]:
    """Of the files of these names below `folder`, by several threads. Raises OSError."""
    names = list(names)
    with ThreadPoolExecutor(min(_MAX_THREADS, os.cpu_count() or 1)) as threads:
        return dict(zip(names, threads.map(lambda name: digest_of(folder / name), names), strict=True))


def names_below(folder: Path) -> list[str]:
    """The files below `folder`, links among them, as relative names in a fixed order."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if not _is_folder(path))


def _is_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()
