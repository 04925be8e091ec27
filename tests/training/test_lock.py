"""One run, one folder: who is refused and told what, what outlives a kill, and what a file system without locks has.

The other processes are real; `way` is flock, or the heartbeat that stands in where flock fails.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import multiprocessing
import os
import re
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from filelock import FileLock

from fastdpo.training import lock

SPAWN = multiprocessing.get_context("spawn")
WHAT = "output_dir='runs/a'"
LONG = 120  # seconds after which a test is stuck


def no_locks(*_: Any) -> None:
    raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))


def start(way: str) -> None:
    """In a new process: its file system has locks, or none."""
    signal.alarm(LONG)
    if way == "heartbeat":
        fcntl.flock = no_locks


@pytest.fixture(params=["flock", "heartbeat"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "heartbeat":
        monkeypatch.setattr(fcntl, "flock", no_locks)
    return str(request.param)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "_fastdpo.lock"


def beside(path: Path) -> Path:
    return path.with_name("_fastdpo.lock.heartbeat")


def file_of(path: Path, way: str) -> Path:
    return path if way == "flock" else beside(path)


def keep(path: Path, way: str, pipe: Any) -> None:
    start(way)
    with lock.hold(path, WHAT):
        pipe.send(None)
        pipe.recv()


@contextlib.contextmanager
def elsewhere(path: Path, way: str, target: Callable[..., None] = keep) -> Iterator[Any]:
    """Another process, once it has sent its first word, which is its `.said`; `.leave()` lets it go on to its end."""
    here, there = SPAWN.Pipe()
    process = SPAWN.Process(target=target, args=(path, way, there))
    process.start()
    there.close()
    try:
        said = here.recv()

        def leave() -> None:
            here.send(None)
            process.join()
            assert process.exitcode == 0

        yield SimpleNamespace(pid=process.pid, said=said, leave=leave, kill=process.kill, join=process.join)
    finally:
        process.kill()
        process.join()


def killed(path: Path, way: str) -> Path:
    """The file that a killed holder left."""
    with elsewhere(path, way) as other:
        other.kill()
        other.join()
    return file_of(path, way)


def refusal(path: Path, patience: float = 0.0) -> lock.LockedError:
    with pytest.raises(lock.LockedError) as caught, lock.hold(path, WHAT, patience):
        pass
    return caught.value


def test_the_refused_is_told_process_host_and_start(path: Path, way: str, caplog: pytest.LogCaptureFixture) -> None:
    with elsewhere(path, way) as other:
        refused = refusal(path)
        started = psutil.Process(other.pid).create_time()
        assert refused.holder is not None
        assert (refused.holder.process, refused.holder.host) == (other.pid, socket.gethostname())
        assert abs(datetime.fromisoformat(refused.holder.started).timestamp() - started) <= 1
        name = f"process {other.pid} on {socket.gethostname()}, started {refused.holder.started[:19].replace('T', ' ')}"
        age = ", whose heartbeat is \\d s old and counts as dead after 60 s" if way == "heartbeat" else ""
        assert re.fullmatch(
            f"{re.escape(f'{WHAT} is in use by {name}')}{age}. Wait for it or stop it, or give another folder.",
            str(refused),
        )
        other.leave()
    assert list(path.parent.iterdir()) == []
    with lock.hold(path, WHAT):
        assert json.loads(file_of(path, way).read_text())["process"] == os.getpid()
    warned = [record for record in caplog.records if record.name == lock.__name__]
    assert len(warned) == (way == "heartbeat")
    assert all(re.search("No locks available.*renewed every 10 s.*dead after 60 s", each.message) for each in warned)


def test_a_killed_process_holds_nothing(path: Path, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "SETTLE", 0.0)
    with elsewhere(path, way) as other:
        other.kill()
        os.waitid(os.P_PID, other.pid, os.WEXITED | os.WNOWAIT)  # dead, and its number still taken
        assert json.loads(file_of(path, way).read_text())["process"] == other.pid
        with lock.hold(path, WHAT) as held:
            assert json.loads(file_of(path, way).read_text())["process"] == os.getpid()
            held.check()
    assert list(path.parent.iterdir()) == []


def fork_and_wait(path: Path, way: str, pipe: Any) -> None:
    start(way)
    with lock.hold(path, WHAT):
        if child := os.fork():
            os.waitpid(child, 0)
        pipe.send(os.getpid())
        signal.pause()


def fork_and_leave(path: Path, way: str, pipe: Any) -> None:
    start(way)
    child = None
    with lock.hold(path, WHAT) as held:
        child = os.fork()
        if child:
            code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            held.check()
            pipe.send(code)
            pipe.recv()
        else:
            with contextlib.suppress(lock.LockedError):
                held.check()
                os._exit(3)
    if not child:
        os._exit(7)


def test_a_fork_of_a_killed_process_holds_nothing(path: Path, way: str) -> None:
    with elsewhere(path, way, fork_and_wait) as other:
        try:
            other.kill()
            other.join()
            assert psutil.pid_exists(other.said)
            with lock.hold(path, WHAT):
                pass
        finally:
            os.kill(other.said, signal.SIGKILL)


def test_a_fork_leaves_its_parent_the_lock(path: Path, way: str) -> None:
    with elsewhere(path, way, fork_and_leave) as other:
        assert other.said == 7  # check() told it, and it left the block
        holder = refusal(path).holder
        assert holder is not None
        assert holder.process == other.pid
        other.leave()


def test_the_last_to_leave_releases(path: Path, way: str, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "same").symlink_to(tmp_path)
    entered, left = threading.Event(), threading.Event()

    def another_thread() -> None:
        with lock.hold(path, WHAT):
            entered.set()
            left.wait(LONG)

    thread = threading.Thread(target=another_thread)
    with lock.hold(path, WHAT) as outer:
        with lock.hold(tmp_path / "same" / path.name, WHAT) as inner:
            assert inner is outer
        assert file_of(path, way).exists()
        thread.start()
        assert entered.wait(LONG)
    assert file_of(path, way).exists()
    outer.check()
    left.set()
    thread.join()
    assert not file_of(path, way).exists()
    with pytest.raises(lock.LockedError, match="left the lock"):
        outer.check()


@pytest.mark.parametrize("kind", ["symlink", "dangling", "hard link", "folder", "pipe"])
def test_a_planted_link_is_named_and_not_followed(path: Path, way: str, kind: str, tmp_path: Path) -> None:
    mine, planted = tmp_path / "mine.txt", file_of(path, way)
    mine.write_text("mine")
    {
        "symlink": lambda: planted.symlink_to(mine),
        "dangling": lambda: planted.symlink_to(tmp_path / "new"),
        "hard link": lambda: planted.hardlink_to(mine),
        "folder": planted.mkdir,
        "pipe": lambda: os.mkfifo(planted),
    }[kind]()
    named = {"symlink": "a symbolic link", "dangling": "a symbolic link", "hard link": "a hard link to another file"}
    expected = f"{str(planted)!r} is {named.get(kind, 'no regular file')}, where a lock's file belongs."
    with pytest.raises(OSError, match=re.escape(expected)), lock.hold(path, WHAT):
        pass
    assert mine.read_text() == "mine"
    assert sorted(tmp_path.iterdir()) == sorted([mine, planted])


def test_another_programs_lock_is_waited_for(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    left = killed(path, "flock").read_text()
    now, foreign = 0.0, FileLock(path)
    leaves_at = float("inf")

    def sleep(seconds: float) -> None:
        nonlocal now
        now += seconds
        if now >= leaves_at:
            foreign.release()

    monkeypatch.setattr(lock, "time", SimpleNamespace(monotonic=lambda: now, sleep=sleep))
    forged = json.loads(left) | {"process": os.getpid(), "host": "\x1b[31mhost", "born": 0}
    for content in (left, json.dumps(forged), "[" * 4096, ""):  # a dead one's name is not the holder's
        with foreign:
            path.write_text(content)
            now = 0.0
            refused = refusal(path, patience=3.0)
            assert refused.holder is None
            assert f"in use by a process that left no name in {str(path)!r}. Wait" in str(refused)
            assert 3 <= now < 4
    foreign.acquire()
    now, leaves_at = 0.0, 2.0
    with lock.hold(path, WHAT, patience=3.0):
        assert 2 <= now < 3


def test_a_number_given_to_another_process_is_not_the_holder(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fcntl, "flock", no_locks)
    monkeypatch.setattr(lock, "SETTLE", 0.0)
    left = killed(path, "heartbeat")
    names = json.loads(left.read_text()) | {"process": os.getpid()}
    left.write_text(json.dumps(names | {"born": psutil.Process().create_time() - psutil.boot_time()}))
    assert "in use by" in str(refusal(path))  # this one lives
    left.write_text(json.dumps(names | {"born": names["born"] - 3600}))
    with lock.hold(path, WHAT):
        pass


@pytest.mark.parametrize("field", ["host", "place"])
def test_the_silent_of_another_host_are_dead_after_a_minute(
    path: Path, monkeypatch: pytest.MonkeyPatch, field: str
) -> None:
    """Another host, or a container of the same host's name, whose processes cannot be seen from here."""
    monkeypatch.setattr(fcntl, "flock", no_locks)
    monkeypatch.setattr(lock, "SETTLE", 0.0)
    left = killed(path, "heartbeat")
    left.write_text(json.dumps(json.loads(left.read_text()) | {field: "elsewhere"}))
    os.utime(left, (time.time() - 30,) * 2)
    assert re.search(r"whose heartbeat is [34]\d s old and counts as dead after 60 s\.", str(refusal(path)))
    os.utime(left, (time.time() - 61,) * 2)
    with lock.hold(path, WHAT):
        assert json.loads(left.read_text())["process"] == os.getpid()


def test_a_heartbeat_is_renewed(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fcntl, "flock", no_locks)
    monkeypatch.setattr(lock, "HEARTBEAT", 0.01)
    with lock.hold(path, WHAT):
        for _ in range(2):
            os.utime(beside(path), (0, 0))
            for _ in range(3000):
                if renewed := beside(path).stat().st_mtime:
                    break
                time.sleep(0.01)
            assert renewed


def test_check_tells_who_took_the_lock(path: Path, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Removed under flock; under the heartbeat, taken over while this process did not renew it."""
    monkeypatch.setattr(lock, "HEARTBEAT", 1e6)
    with lock.hold(path, WHAT) as held:
        if way == "flock":
            path.unlink()
        else:
            os.utime(beside(path), (time.time() - 61,) * 2)
        with elsewhere(path, way) as other:
            for again in (held.check, lambda: refusal_of_nested(path)):
                with pytest.raises(lock.LockedError, match=f"taken over by process {other.pid} on ") as caught:
                    again()
                assert caught.value.holder is not None
            names = json.loads(file_of(path, way).read_text())
            assert names["process"] == other.pid
    assert file_of(path, way).exists()  # the other's: it was killed


def refusal_of_nested(path: Path) -> None:
    with lock.hold(path, WHAT):
        pass


def contend(path: Path, barrier: Any, results: Any) -> None:
    """Take a dead one over, once all contenders have found it dead."""
    start("heartbeat")
    rename = Path.rename

    def together(self: Path, target: Path) -> Path:
        barrier.wait(LONG)
        return rename(self, target)

    Path.rename = together  # type: ignore[method-assign, assignment]
    try:
        with lock.hold(path, WHAT) as held:
            results.put(os.getpid())
            barrier.wait(LONG)
            held.check()
    except lock.LockedError as error:
        results.put(str(error))
        barrier.wait(LONG)


def test_of_several_that_take_over_one_has_it(path: Path) -> None:
    killed(path, "heartbeat")
    barrier, results = SPAWN.Barrier(3), SPAWN.Queue()
    processes = [SPAWN.Process(target=contend, args=(path, barrier, results)) for _ in range(3)]
    for process in processes:
        process.start()
    said = [results.get(timeout=LONG) for _ in processes]
    for process in processes:
        process.join()
        assert process.exitcode == 0
    (winner,) = [each for each in said if isinstance(each, int)]
    assert sum(f"in use by process {winner} on" in str(each) for each in said) == 2
    assert list(path.parent.iterdir()) == []


def count(path: Path, way: str, rounds: int, together: Any) -> None:
    start(way)
    lock.POLL = 0.002
    counter = path.with_name("counter")
    together.wait(LONG)
    for _ in range(rounds):
        with lock.hold(path, WHAT, patience=LONG):
            seen = int(counter.read_text())
            time.sleep(0.001)
            counter.write_text(str(seen + 1))


def test_no_increment_is_lost(path: Path, way: str) -> None:
    counter = path.with_name("counter")
    counter.write_text("0")
    together = SPAWN.Barrier(4)
    processes = [SPAWN.Process(target=count, args=(path, way, 100, together)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert counter.read_text() == "400"
    assert list(path.parent.iterdir()) == [counter]


@pytest.mark.parametrize(("theirs", "ours"), [("flock", "heartbeat"), ("heartbeat", "flock")])
def test_the_two_ways_see_each_other(path: Path, theirs: str, ours: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server may be out of locks for one of two hosts."""
    with elsewhere(path, theirs) as other:
        with monkeypatch.context() as patch:
            if ours == "heartbeat":
                patch.setattr(fcntl, "flock", no_locks)
            holder = refusal(path).holder
        assert holder is not None
        assert holder.process == other.pid
        assert list(path.parent.iterdir()) == [file_of(path, theirs)]
        other.leave()
