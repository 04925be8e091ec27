"""One run, one folder: a lock that names its holder and dies with its process. POSIX only (`fcntl`).

The kernel keeps the lock (flock) and drops it with the last descriptor, however the process ends; the file that a
killed one leaves is taken over by the next. Where flock is not to be had (some network and FUSE file systems), a file
beside it, PATH.heartbeat, is renewed every `HEARTBEAT` seconds and counts as dead after `DEAD_AFTER` without that, or
at once where its process was of this host and is gone. That is a promise and no guarantee: a process that was
suspended for longer may have lost its lock, which `Lock.check` tells. The two ways see each other, as a server may be
out of locks for one host or one moment only. All files made here have names that begin with that of the lock.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import json
import logging
import os
import secrets
import socket
import stat
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import psutil

logger = logging.getLogger(__name__)

#: Seconds between two renewals, without one until a holder counts as dead, and from a takeover to its confirmation.
HEARTBEAT, DEAD_AFTER, SETTLE = 10.0, 60.0, 1.0
#: Seconds between two tries, and tries that a new holder has to write its name.
POLL, NAMING = 0.05, 5
#: What flock answers where there are no locks, and where another has it.
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL)
_ELSEWHERE = (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES)
#: A file that was removed or replaced while it was being opened is opened anew, this often.
_ANEW = 100


class LockedError(OSError):
    """Another holds the lock, or took it over. `holder` is None where it left no name."""

    def __init__(self, message: str, holder: Holder | None = None) -> None:
        super().__init__(message)
        self.holder = holder


@dataclass(frozen=True)
class Holder:
    """Who holds a lock; `started` is when its process did, in ISO format with the zone."""

    process: int
    host: str
    started: str

    def __str__(self) -> str:
        local = datetime.fromisoformat(self.started).astimezone()
        return f"process {self.process} on {self.host}, started {local:%Y-%m-%d %H:%M:%S}"


@dataclass(frozen=True)
class _Record:
    """What a lock's file says: its holder, and what tells it from others of the same number, host or both."""

    holder: Holder
    #: Boot and namespace of process numbers: containers may share a host's name, not these.
    place: str
    #: Start of the process in seconds since that boot, which no setting of the clock moves.
    born: float
    token: str

    def gone(self) -> bool:
        """Whether the process was of this host and lives no more. False where that cannot be told."""
        if (self.holder.host, self.place) != (socket.gethostname(), _place()):
            return False
        try:
            os.kill(self.holder.process, 0)
        except ProcessLookupError:
            return True
        except PermissionError:
            pass  # another user's
        try:
            if psutil.Process(self.holder.process).status() in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD):
                return True
            return abs(_born(self.holder.process) - self.born) > 2  # the boot's time is in whole seconds
        except psutil.Error:
            return False  # it exists, hidden from this user


@functools.cache
def _place() -> str:
    try:
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""  # no Linux: the host's name has to do


def _born(process: int) -> float:
    boot = psutil.boot_time()  # first: older versions add the boot's time as last asked for
    return float(psutil.Process(process).create_time() - boot)


def _own() -> _Record:
    process = os.getpid()
    started = datetime.fromtimestamp(psutil.Process(process).create_time()).astimezone().isoformat(timespec="seconds")
    holder = Holder(process, socket.gethostname(), started)
    return _Record(holder, _place(), _born(process), secrets.token_hex(16))


def _write(descriptor: int, record: _Record) -> None:
    fields = vars(record.holder) | {"place": record.place, "born": record.born, "token": record.token}
    os.ftruncate(descriptor, 0)
    with open(descriptor, "w", encoding="utf-8", closefd=False) as file:
        file.write(json.dumps(fields) + "\n")


def _read(descriptor: int) -> _Record | None:
    """The record in a file; None where it holds none (another program's, or not written yet)."""
    try:
        fields = json.loads(os.pread(descriptor, 4096, 0))
        holder = Holder(int(fields["process"]), str(fields["host"]), str(fields["started"]))
        record = _Record(holder, str(fields["place"]), float(fields["born"]), str(fields["token"]))
        # Printed, maybe on a terminal: no escape sequences, and a time that is one
        return record if str(holder).isprintable() and 0 < holder.process < 2**31 else None
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
        return None


def _open(path: Path, flags: int) -> int:
    """Open a lock's file, following no link and accepting nothing but a file of that one name."""
    try:
        descriptor = os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK, 0o644)
    except OSError as error:
        if error.errno not in (errno.ELOOP, errno.EMLINK, errno.EISDIR, errno.ENXIO):
            raise
        raise _no_lock(path, "a symbolic link" if path.is_symlink() else "no regular file") from None
    seen = os.fstat(descriptor)
    if stat.S_ISREG(seen.st_mode) and seen.st_nlink <= 1:
        return descriptor
    os.close(descriptor)
    raise _no_lock(path, "a hard link to another file" if stat.S_ISREG(seen.st_mode) else "no regular file")


def _no_lock(path: Path, kind: str) -> OSError:
    return OSError(f"{str(path)!r} is {kind}, where a lock's file belongs. Remove it, or give another folder.")


def _is_at(path: Path, descriptor: int) -> bool:
    """Whether the open file is still the one of that name."""
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(descriptor), os.lstat(path))
    return False


class _Refused(Exception):
    """The lock is another's; the text names it."""

    def __init__(self, path: Path, holder: Holder | None, sign: str = "") -> None:
        super().__init__(f"{holder or f'a process that left no name in {str(path)!r}'}{sign}")
        self.holder = holder


class Lock:
    """A lock that this process holds, `holds` times."""

    def __init__(self, path: Path, what: str, descriptor: int) -> None:
        self.path, self.what, self.descriptor, self.holds = path, what, descriptor, 0

    def is_ours(self) -> bool:
        """Whether the file of the lock's name is still the one that this process locked."""
        return _is_at(self.path, self.descriptor)

    def check(self) -> None:
        """Raises LockedError where this process holds it no more: the file was removed or taken over, the lock was
        left, or this is a fork of the holder."""
        with _GUARD:
            if self not in _HELD.values():
                raise LockedError(f"{self.what} is not locked by process {os.getpid()}: it left the lock.")
            if self.is_ours():
                return
            record = _seen(self.path)[0]
        holder = record.holder if record else None
        raise LockedError(
            f"{self.what} is no longer locked by this process: {str(self.path)!r} was "
            f"{f'taken over by {holder}' if holder else 'removed or replaced'}. What both write there would be mixed: "
            "stop one of them, then resume from a checkpoint that is whole.",
            holder,
        )

    def release(self) -> None:
        """Remove the file while it is locked, so that nobody is left with a lock on a file of no name."""
        try:
            if self.is_ours():
                self.path.unlink()
        except OSError as error:  # the work under the lock is done: no reason to fail it
            logger.warning("The lock %s could not be removed, and is harmless: %s", self.path, error)
        finally:
            os.close(self.descriptor)


class _Heartbeat(Lock):
    """The lock of a file system that has none; its file's time is renewed by a thread."""

    def __init__(self, path: Path, what: str, descriptor: int, token: str) -> None:
        super().__init__(path, what, descriptor)
        self.token, self.left = token, threading.Event()
        self.thread = threading.Thread(target=self.beat, name=f"heartbeat of {path.name}", daemon=True)
        self.thread.start()

    def beat(self) -> None:
        warned = False
        while not self.left.wait(HEARTBEAT):
            try:
                os.utime(self.descriptor)  # of the file that is ours, should another have taken its name
            except OSError as error:
                if not warned:
                    logger.warning("The heartbeat %s cannot be renewed; trying on: %s", self.path, error)
                warned = True

    def is_ours(self) -> bool:
        with contextlib.suppress(OSError):  # a server may know it no more
            os.utime(self.descriptor)  # after a suspension the thread's turn may be seconds away
        record = _seen(self.path)[0]
        return record is not None and record.token == self.token

    def release(self) -> None:
        self.left.set()
        self.thread.join()  # it uses the descriptor
        super().release()


#: By path, what this process holds; a fork waits for a try to end, and its child holds nothing.
_HELD: dict[Path, Lock] = {}
_GUARD = threading.RLock()


def _forget() -> None:
    """In a forked child: close what keeps the parent's lock alive. LOCK_UN would take it from the parent."""
    for lock in _HELD.values():
        os.close(lock.descriptor)
    _HELD.clear()
    _GUARD.release()


os.register_at_fork(before=_GUARD.acquire, after_in_parent=_GUARD.release, after_in_child=_forget)


@contextlib.contextmanager
def hold(path: Path, what: str, patience: float = 0.0) -> Iterator[Lock]:
    """Hold the lock whose file is `path`, in a folder that exists; `what` it locks is for the message.

    A process may hold it several times, in any of its threads; the last to leave releases it. Another process's is
    waited for `patience` seconds, then LockedError names it. OSError: a link, or no file, is in its place.
    """
    path = Path(os.path.realpath(path.parent), path.name)
    lock = _taken(path, what, patience)
    try:
        yield lock
    finally:
        with _GUARD:
            lock.holds -= 1
            if not lock.holds and _HELD.get(path) is lock:  # not in a forked child
                del _HELD[path]
                lock.release()


def _taken(path: Path, what: str, patience: float) -> Lock:
    deadline, tries = time.monotonic() + patience, 0
    while True:
        try:
            with _GUARD:
                if path in _HELD:
                    _HELD[path].check()
                else:
                    _HELD[path] = _flocked(path, what)
                _HELD[path].holds += 1
                return _HELD[path]
        except _Refused as refused:
            tries += 1
            if time.monotonic() >= deadline and (refused.holder or tries >= NAMING):
                raise LockedError(
                    f"{what} is in use by {refused}. Wait for it or stop it, or give another folder.", refused.holder
                ) from None
        time.sleep(POLL)


def _flocked(path: Path, what: str) -> Lock:
    """Lock `path` by flock, or by a heartbeat where there is none; _Refused where another has it."""
    own = _own()
    for _ in range(_ANEW):
        with contextlib.ExitStack() as undo:
            try:
                descriptor, made = _open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL), True
            except FileExistsError:
                try:
                    descriptor, made = _open(path, os.O_RDWR), False
                except FileNotFoundError:
                    continue
            undo.callback(os.close, descriptor)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno in _ELSEWHERE:
                    record = _read(descriptor)
                    # The name of a killed process stays until the next has written its own
                    raise _Refused(path, record.holder if record and not record.gone() else None) from None
                if error.errno == errno.ESTALE:  # its name was removed, says a server
                    continue
                if error.errno not in _NO_LOCKS:
                    raise
                if made:
                    path.unlink(missing_ok=True)
                return _beating(path, what, own, error.strerror or str(error))
            if not _is_at(path, descriptor):
                continue
            undo.callback(path.unlink, missing_ok=True)
            _write(descriptor, own)
            _refuse_heartbeat(_beside(path))  # after our name is there to see
            undo.pop_all()
            return Lock(path, what, descriptor)
    raise _Refused(path, None)


def _beating(path: Path, what: str, own: _Record, cause: str) -> Lock:
    """Lock `path` by a heartbeat beside it; _Refused where another has that, or has `path` by flock."""
    beat = _beside(path)
    _say_once(path, cause)
    for _ in range(_ANEW):
        with contextlib.ExitStack() as undo:
            try:
                descriptor = _made(beat, own, undo)
            except FileExistsError:
                if not _refuse_heartbeat(beat):
                    continue  # it was left just now
                descriptor = _taken_over(beat, own, undo)
            record = _seen(path)[0]  # after our name is there to see
            if record and not record.gone():
                sign = f", by flock, which fails here ({cause}); should it be no more, remove {str(path)!r}"
                raise _Refused(path, record.holder, sign)
            undo.pop_all()
            return _Heartbeat(beat, what, descriptor, own.token)
    raise _Refused(beat, None)


def _made(path: Path, own: _Record, undo: contextlib.ExitStack) -> int:
    """Make a file that names its holder; FileExistsError where there is one. Returns its descriptor."""
    descriptor = _open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL)
    undo.callback(os.close, descriptor)
    undo.callback(path.unlink, missing_ok=True)
    _write(descriptor, own)
    return descriptor


def _taken_over(beat: Path, own: _Record, undo: contextlib.ExitStack) -> int:
    """Put an own file in the place of a dead one; of several that do, the last has it. Returns its descriptor."""
    aside = beat.with_name(f"{beat.name}.{own.token}")
    descriptor = _made(aside, own, undo)
    _refuse_heartbeat(beat)  # somebody was quicker
    aside.rename(beat)
    time.sleep(SETTLE)
    record = _seen(beat)[0]
    if record is None or record.token != own.token:
        raise _Refused(beat, record.holder if record else None)
    undo.callback(beat.unlink, missing_ok=True)
    return descriptor


def _refuse_heartbeat(beat: Path) -> bool:
    """_Refused while the holder of a heartbeat lives; else whether there is a dead one's."""
    if not os.path.lexists(beat):
        return False
    # The clock of the file system, since hosts' differ; read first, so that a pause in between makes nobody older
    with tempfile.NamedTemporaryFile(dir=beat.parent, prefix=f"{beat.name}.") as clock:
        now = os.fstat(clock.fileno()).st_mtime
    record, renewed = _seen(beat)
    if renewed is None:
        return False
    age = max(now - renewed, 0.0)
    if age > DEAD_AFTER or (record and record.gone()):
        return True
    sign = f", whose heartbeat is {age:.0f} s old and counts as dead after {DEAD_AFTER:g} s"
    raise _Refused(beat, record.holder if record else None, sign)


def _seen(path: Path) -> tuple[_Record | None, float | None]:
    """The record in a file and the time of its last renewal; None for what is not there."""
    try:
        descriptor = _open(path, os.O_RDONLY)  # which has a network file system ask its server; lstat need not
    except FileNotFoundError:
        return None, None
    try:
        return _read(descriptor), os.fstat(descriptor).st_mtime
    finally:
        os.close(descriptor)


def _beside(path: Path) -> Path:
    return path.with_name(f"{path.name}.heartbeat")


@functools.cache
def _say_once(path: Path, cause: str) -> None:
    logger.warning(
        "%s: its file system has no locks (%s). %r takes their place: renewed every %g s, it counts as dead after %g s "
        "without, or at once where its process was of this host and is gone.",
        *(str(path.parent), cause, _beside(path).name, HEARTBEAT, DEAD_AFTER),
    )
