"""The file operations of a process below one folder: counted, named, and one of them cut short by SIGKILL.

`Watch.install` puts itself between the interpreter and the system, in a process that has imported everything. What it
counts is what changes the disk: names made, moved and removed, files opened to be written, each write that reaches the
system (Python's buffers lie above it), and the files that libraries write from Rust or C++. A flush to the disk is
counted and not done, as a kill keeps what the kernel holds.

A watch that kills nothing also proves that it sees everything (`unseen`): an audit hook hears of every opening,
renaming and removing of Python's, and between two operations nothing may have changed on the disk.
"""

from __future__ import annotations

import builtins
import io
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from transformers import PreTrainedTokenizerFast

#: Operations that may be cut in the middle: half of the bytes are on the disk.
WRITES = ("write", "safetensors", "torch.save", "tokenizers")
#: Operations that give a name to what was written under another.
RENAMES = ("rename", "replace", "link", "symlink")
_CREATES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC


@dataclass
class Operation:
    """kind: what was called. path: below the watched folder. size: bytes of a write. changed: whether the disk was."""

    kind: str
    path: str
    size: int = 0
    changed: bool = True

    def __str__(self) -> str:
        return f"{self.kind} {self.path}" + (f" ({self.size} bytes)" if self.size else "")


@dataclass(frozen=True)
class Kill:
    """SIGKILL "before" or "after" operation `number`, counted from 0, or with it half done ("torn")."""

    number: int
    when: str


class Watch:
    """Counts the operations below `folder`, and kills this process as `kill` says.

    report: a file outside of `folder` into which the operation that was cut short is written.
    alone: whether no other process writes below `folder`, without which changes cannot be laid at this one's door.
    """

    def __init__(self, folder: Path, report: Path, kill: Kill | None = None, *, alone: bool = True) -> None:
        self.folder, self.kill, self.alone = os.path.realpath(folder), kill, alone
        self.operations: list[Operation] = []
        self.unseen: list[str] = []
        self._report, self._inside, self._seen = report, 0, self._disk()
        self._real_open = io.open

    def inside(self, path: Any, dir_fd: int | None = None) -> str | None:
        """`path` (a name, or a descriptor) relative to the folder; None where it lies elsewhere."""
        if isinstance(path, int):
            path = os.readlink(f"/proc/self/fd/{path}")
        path = os.fsdecode(path)
        if dir_fd is not None:
            path = os.path.join(os.readlink(f"/proc/self/fd/{dir_fd}"), path)
        path = os.path.join(os.path.realpath(os.path.dirname(os.path.abspath(path))), os.path.basename(path))
        return os.path.relpath(path, self.folder) if path.startswith(self.folder + os.sep) else None

    @contextmanager
    def operation(self, kind: str, path: str, size: int = 0) -> Iterator[bool]:
        """Around what does it; gives whether only half of it is to be done."""
        done = Operation(kind, path, size)
        here = self.kill.when if self.kill and self.kill.number == len(self.operations) else None
        self.operations.append(done)
        if here == "before":
            self._die(done)
        before = self._look()
        self._inside += 1
        try:
            yield here == "torn"
        except OSError:
            done.changed = False
            raise
        finally:
            self._inside -= 1
            if self._checks:
                self._seen = self._disk()
        if here:
            self._die(done)
        if kind == "fsync" or (kind == "open" and self._checks and before.keys() == self._seen.keys()):
            # An opening that neither makes a file nor empties one
            done.changed = kind == "open" and _sizes(before) != _sizes(self._seen)

    def finish(self) -> tuple[list[Operation], list[str]]:
        """What was done, and what was seen on the disk or heard of without having been counted."""
        self._look()
        return self.operations, self.unseen

    @property
    def _checks(self) -> bool:
        return self.kill is None and self.alone

    def _look(self) -> dict[str, tuple[int, ...]]:
        """What is on the disk before an operation, which must be what the last one left there."""
        if not self._checks:
            return {}
        found = self._disk()
        changes = sorted(dict(found.items() ^ self._seen.items()))
        self.unseen += [f"{name} changed on the disk without an operation" for name in changes]
        return found

    def _disk(self) -> dict[str, tuple[int, ...]]:
        found: dict[str, tuple[int, ...]] = {}
        for place, folders, files in os.walk(self.folder):
            found |= {os.path.relpath(os.path.join(place, name), self.folder): (0,) for name in folders}
            for name in files:
                status = os.lstat(os.path.join(place, name))
                key = os.path.relpath(os.path.join(place, name), self.folder)
                found[key] = (status.st_size, status.st_ino, status.st_mtime_ns)
        return found

    def _die(self, done: Operation) -> None:
        self._inside += 1
        with self._real_open(self._report, "w") as file:
            json.dump(asdict(done), file)
        os.kill(os.getpid(), signal.SIGKILL)

    def _heard(self, event: str, arguments: tuple[Any, ...]) -> None:
        """The audit hook."""
        if self._inside:
            return
        if event == "open":
            path, _, flags = arguments
            written = not isinstance(path, int) and path is not None and flags & _CREATES
            places = [(path, None)] if written else []
        elif event in ("os.remove", "os.rmdir"):
            places = [(arguments[0], arguments[1])]
        elif event == "os.mkdir":
            places = [(arguments[0], arguments[2])]
        elif event in ("os.rename", "os.link"):
            places = [(arguments[0], arguments[2]), (arguments[1], arguments[3])]
        elif event == "os.symlink":
            places = [(arguments[1], arguments[2])]
        elif event == "os.truncate":
            places = [(arguments[0], None)]
        else:
            return
        for path, dir_fd in places:
            if name := self.inside(path, dir_fd if dir_fd != -1 else None):
                self.unseen.append(f"{event} {name} was not counted")

    # Between the interpreter and the system

    def install(self) -> None:
        """From here on, for the rest of this process."""
        self._install_names()
        self._install_descriptors()
        self._install_libraries()
        builtins.open = io.open = self._opened  # type: ignore[assignment]
        if self.kill is None:
            sys.addaudithook(self._heard)

    def _install_names(self) -> None:
        for name in ("unlink", "remove", "mkdir", "rmdir", "truncate", "utime"):
            setattr(os, name, self._on_first(name, getattr(os, name)))
        for name in RENAMES:
            setattr(os, name, self._on_second(name, getattr(os, name)))

    def _on_first(self, kind: str, real: Callable[..., Any]) -> Callable[..., Any]:
        """A function of os whose first argument is the path that it changes."""

        def counted(path: Any, *rest: Any, dir_fd: int | None = None, **named: Any) -> Any:
            given = {} if dir_fd is None else {"dir_fd": dir_fd}
            if (name := self.inside(path, dir_fd)) is None:
                return real(path, *rest, **given, **named)
            with self.operation(kind, name):
                return real(path, *rest, **given, **named)

        return counted

    def _on_second(self, kind: str, real: Callable[..., Any]) -> Callable[..., Any]:
        """One that gives a name, its second argument, to what its first one names."""

        def counted(source: Any, target: Any, *rest: Any, **named: Any) -> Any:
            of_source = self.inside(source, named.get("src_dir_fd")) or os.fsdecode(source)
            name = self.inside(target, named.get("dst_dir_fd", named.get("dir_fd")))
            if name is None:
                return real(source, target, *rest, **named)
            with self.operation(kind, f"{of_source} to {name}"):
                return real(source, target, *rest, **named)

        return counted

    def _install_descriptors(self) -> None:
        real_open, real_write, real_sendfile = os.open, os.write, os.sendfile

        def opened(path: Any, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
            name = self.inside(path, dir_fd) if flags & _CREATES else None
            if name is None:
                return real_open(path, flags, mode, dir_fd=dir_fd)
            with self.operation("open", name):
                return real_open(path, flags, mode, dir_fd=dir_fd)

        def write(fd: int, data: Any) -> int:
            if (name := self.inside(fd)) is None:
                return real_write(fd, data)
            view = memoryview(data).cast("B")
            with self.operation("write", name, len(view)) as torn:
                return real_write(fd, view[: len(view) // 2] if torn else view)

        def sendfile(out_fd: int, in_fd: int, offset: int, count: int, *rest: Any) -> int:
            size = min(count, os.fstat(in_fd).st_size - offset)
            if (name := self.inside(out_fd)) is None or size <= 0:  # shutil asks until there is no more
                return real_sendfile(out_fd, in_fd, offset, count, *rest)
            with self.operation("write", name, size) as torn:
                return real_sendfile(out_fd, in_fd, offset, size // 2 if torn else count, *rest)

        def fsync(fd: Any) -> None:
            if name := self.inside(fd if isinstance(fd, int) else fd.fileno()):
                with self.operation("fsync", name):
                    pass

        os.open, os.write, os.sendfile, os.fsync = opened, write, sendfile, fsync  # type: ignore[assignment]
        os.fdatasync = fsync
        os.ftruncate = self._on_first("truncate", os.ftruncate)

    def _install_libraries(self) -> None:
        real_serialize, real_zip = safetensors.torch.serialize_file, torch.serialization._open_zipfile_writer
        real_save = PreTrainedTokenizerFast._save_pretrained

        def serialize(tensors: Any, filename: Any, *rest: Any, **named: Any) -> Any:
            with self._written("safetensors", filename):
                return real_serialize(tensors, filename, *rest, **named)

        @contextmanager
        def zip_writer(target: Any) -> Iterator[Any]:
            with self._written("torch.save", target), real_zip(target) as opened:
                yield opened

        def save_pretrained(tokenizer: Any, *arguments: Any, **named: Any) -> Any:
            core = tokenizer._tokenizer
            tokenizer._tokenizer = _CountedTokenizer(core, self._written)
            try:
                return real_save(tokenizer, *arguments, **named)
            finally:
                tokenizer._tokenizer = core

        safetensors.torch.serialize_file = serialize
        torch.serialization._open_zipfile_writer = zip_writer
        PreTrainedTokenizerFast._save_pretrained = save_pretrained

    @contextmanager
    def _written(self, kind: str, path: Any) -> Iterator[None]:
        """Around a library's own writing of the file at `path`; one operation, as the file never lies there open."""
        name = self.inside(path) if isinstance(path, (str, bytes, os.PathLike)) else None
        if name is None:
            yield
            return
        with self.operation(kind, name) as torn:
            yield
            size = os.stat(path).st_size
            self.operations[-1].size = size
            if torn:
                with self._real_open(path, "r+b") as file:
                    file.truncate(size // 2)

    def _opened(
        self,
        file: Any,
        mode: str = "r",
        buffering: int = -1,
        encoding: str | None = None,
        errors: str | None = None,
        newline: str | None = None,
        closefd: bool = True,
        opener: Any = None,
    ) -> Any:
        """As `open`, with what it makes for a file to be written laid over `_CountedFile`."""
        name = self.inside(file) if set(mode) & set("wax+") and not self._inside else None
        if name is None:
            return self._real_open(file, mode, buffering, encoding, errors, newline, closefd, opener)
        letters, arguments = "".join(letter for letter in mode if letter not in "bt"), (closefd, opener)
        if isinstance(file, int) or opener is not None:  # whose opening os.open has counted
            raw = _CountedFile(file, letters, *arguments)
        else:
            with self.operation("open", name):
                raw = _CountedFile(file, letters, *arguments)
        raw.watch, raw.relative = self, self.inside(raw.fileno()) or name
        if buffering == 0:
            return raw
        lines, size = buffering == 1, io.DEFAULT_BUFFER_SIZE if buffering in (-1, 1) else buffering
        buffered = io.BufferedRandom(raw, size) if "+" in mode else io.BufferedWriter(raw, size)
        if "b" in mode:
            return buffered
        text = io.TextIOWrapper(buffered, encoding, errors, newline, line_buffering=lines)
        text.mode = mode  # type: ignore[misc]
        return text


class _CountedFile(io.FileIO):
    """A file whose writes are operations of `watch`."""

    watch: Watch
    relative: str

    def write(self, data: Any, /) -> int:
        view = memoryview(data).cast("B")
        with self.watch.operation("write", self.relative, len(view)) as torn:
            return super().write(view[: len(view) // 2] if torn else view)

    def truncate(self, size: int | None = None, /) -> int:
        with self.watch.operation("truncate", self.relative):
            return super().truncate(size)


class _CountedTokenizer:
    """A tokenizer of Rust's, whose `save` is one operation; its type takes no other method."""

    def __init__(self, core: Any, written: Callable[..., Any]) -> None:
        self._core, self._written = core, written

    def save(self, path: Any, *rest: Any, **named: Any) -> Any:
        with self._written("tokenizers", path):
            return self._core.save(path, *rest, **named)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._core, name)


def _sizes(disk: dict[str, tuple[int, ...]]) -> dict[str, int]:
    return {name: status[0] for name, status in disk.items()}
