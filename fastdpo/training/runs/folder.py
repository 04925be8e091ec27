"""The output folder of a run: one run at a time, a list of what is the run's, and every change of it.

Whatever a run writes there is first written aside, into a folder of its own with an unguessable name, then listed
(`fastdpo.training.runs.run_list`), and then renamed into its place. Only what is listed and holds what was listed is
ever replaced or removed, and no link is followed: what the user has put there, or has changed, stays. A kill between
any two of these steps is mended by `recover`, forwards: what had been listed gets its name.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from fastdpo.training.durable import (
    FileDigest,
    digest_of,
    digests_of,
    flush,
    flush_tree,
    names_below,
    remove_incomplete,
)
from fastdpo.training.lock import Lock, hold
from fastdpo.training.runs.checkpoint import MANIFEST, CheckpointError, Manifest, read_manifest, step_in
from fastdpo.training.runs.run_list import RUN_FILE, RunList, SavedCheckpoint

logger = logging.getLogger(__name__)

LOCK_FILE = "_fastdpo.lock"  # uploads to the hub leave out _*
#: Bytes up to which a file of a checkpoint that is removed is read first.
_READ_BYTES = 1 << 24
#: Without these no file of weights can be read: they get their names last.
_LAST = ("adapter_model.safetensors", "model.safetensors.index.json", "model.safetensors")


class RunFolder:
    """The folder at `path`; used by the process that writes it.

    Attributes:
        list: of the run that has claimed it; None before.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.list: RunList | None = None
        self._lock: Lock | None = None

    # One run at a time

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keep every other process out; may be nested. Raises LockedError, naming the process that is there."""
        if self.path.exists() and not self.path.is_dir():
            raise CheckpointError(f"output_dir={str(self.path)!r} is a file. Give a folder.")
        made = not self.path.exists()
        self.path.mkdir(parents=True, exist_ok=True)
        outer = self._lock
        try:
            with hold(self.path / LOCK_FILE, f"output_dir={str(self.path)!r}") as self._lock:
                if outer is None and self.list is not None:
                    self._follow()
                try:
                    yield
                finally:
                    if outer is None and self.list is not None:
                        self._leave_aside()
        finally:
            self._lock = outer
            if made and _is_empty(self.path):
                self.path.rmdir()

    def _follow(self) -> None:
        """Take up the list as it is by now: the folder was free since this process left it."""
        found = RunList.read(self.path)
        if found is not None and found.run != self._run.run:
            raise CheckpointError(
                f"output_dir={str(self.path)!r} holds another run since this one has left it. Give another folder "
                "(save_model takes one)."
            )
        self.list = found or self.list

    def begin(self, run: RunList) -> None:
        """Claim the folder for a run. Raises OSError."""
        run.write(self.path)
        self.list = run

    # What is whose

    def owns(self, name: str) -> bool:
        """Whether the file of this name is the run's: listed, no link, and with the bytes that the run wrote."""
        path, listed = self.path / name, self._run.files
        return name in listed and self._is_plain(name) and path.is_file() and digest_of(path) == listed[name]

    def is_pending(self, name: str) -> bool:
        """Whether a killed process had listed the file and not yet given it its name."""
        return any(self._aside.glob(f"file*/{name}"))

    def owns_checkpoint(self, name: str) -> bool:
        """Whether the folder of this name is a checkpoint of the run: listed, no link, and no other run's."""
        path = self.path / name
        if name not in self._run.checkpoints or path.is_symlink() or not path.is_dir():
            return False
        try:
            return read_manifest(path).run == self._run.run
        except CheckpointError:
            return True  # torn, or what is left of one

    def owned_checkpoints(self) -> list[str]:
        """Those of the list that are there: first those beside the branch, by step, then the branch."""
        there = [name for name in self._run.checkpoints if self.owns_checkpoint(name)]
        beside = [name for name in there if name not in self._run.branch]
        return [
            *sorted(beside, key=lambda name: step_in(name) or 0),
            *(name for name in self._run.branch if name in there),
        ]

    def newest(self) -> Path | None:
        """The newest checkpoint of the branch that is trained."""
        there = [name for name in self._run.branch if (self.path / name / MANIFEST).is_file()] if self.list else []
        return self.path / there[-1] if there else None

    @property
    def _run(self) -> RunList:
        assert self.list is not None, "the folder was not claimed"
        return self.list

    def _is_plain(self, name: str) -> bool:
        """Whether no part of the name below the folder is a link."""
        parts = PurePosixPath(name)
        return not any((self.path / part).is_symlink() for part in (parts, *list(parts.parents)[:-1]))

    # Files

    def stage(self, name: str) -> Path:
        """An empty folder aside. Files in one named `file*` are given their names by `publish`, or by `recover`."""
        self._make_aside()
        staged = self._aside / name
        if staged.exists():
            shutil.rmtree(staged)
        staged.mkdir()
        return staged

    def publish(self, staged: Path, *, finished: int | None = None) -> list[Path]:
        """Give all files below `staged` their names in the folder, those of the run replaced, weights last.

        A name that is the user's, or whose file was changed since the run wrote it, is left alone: the run's file then
        has `.fastdpo` in its name, and a warning says so. finished: the step, where these are the last of a
        finished run. Returns where the files are.
        """
        self._check_lock()
        for name in names_below(staged):
            if (free := self._free_name(name)) != name:
                logger.warning("%s is not this run's and stays; the run's own is %s", self.path / name, free)
                (staged / name).rename(staged / free)
        digests = digests_of(staged, names_below(staged))
        flush_tree(staged)
        self._run.files.update(digests)
        self._run.finished = self._run.finished if finished is None else finished
        self._run.write(self.path)
        return self._move(staged, digests)

    def put(self, name: str, content: bytes) -> Path:
        """`publish` of one file."""
        with self.held():
            staged = self.stage(f"file-{name}")
            (staged / name).write_bytes(content)
            (path,) = self.publish(staged)
            staged.rmdir()
        return path

    def _move(self, staged: Path, names: Collection[str]) -> list[Path]:
        placed = []
        for name in sorted(names, key=lambda name: (PurePosixPath(name).name in _LAST, name)):
            target = self.path / name
            if not self._is_plain(name):
                raise CheckpointError(f"{target} is, or lies behind, a link, which is not followed. Remove the link.")
            target.parent.mkdir(parents=True, exist_ok=True)
            (staged / name).replace(target)
            placed.append(target)
        for folder in {path.parent for path in placed}:
            flush(folder)
        return placed

    def _free_name(self, name: str) -> str:
        path, count, free = PurePosixPath(name), 1, name
        while os.path.lexists(self.path / free) and not self.owns(free):
            count += 1
            free = str(path.with_suffix(f".fastdpo{'' if count == 2 else f'-{count - 1}'}{path.suffix}"))
        return free

    # Checkpoints

    def publish_checkpoint(self, staged: Path, manifest: Manifest) -> Path:
        """Give the closed checkpoint at `staged` its name, in the place of an older one of the run."""
        self._check_lock()
        run, name = self._run, f"checkpoint-{manifest.step}"
        if os.path.lexists(self.path / name) and not self.owns_checkpoint(name):
            raise CheckpointError(f"{self.path / name} is not this run's, so it stays. Move it away and resume.")
        run.branch = [*(run.branch[: run.branch.index(name)] if name in run.branch else run.branch), name]
        run.checkpoints[name] = SavedCheckpoint(manifest.seal, (*manifest.files, MANIFEST))
        run.finished = None
        run.write(self.path)
        self._exchange(staged, name)
        return self.path / name

    def _exchange(self, staged: Path, name: str) -> None:
        final, replaced = self.path / name, self._aside / f"replaced-{name}"
        if final.exists():
            final.rename(replaced)
        staged.rename(final)
        flush(self.path)
        if replaced.exists():
            self._discard(replaced, name)

    def rotate(self, limit: int | None, best: str | None) -> None:
        """Remove checkpoints of the run beyond `limit`: those beside the branch first, then the branch's oldest; never
        its newest, nor `best`."""
        names = self.owned_checkpoints()
        kept = {names[-1], *([] if best is None else [Path(best).name])} if names else set()
        excess = 0 if not limit or limit < 1 else len(names) - max(limit, len(kept & set(names)))
        for name in [name for name in names if name not in kept][: max(0, excess)]:
            self._drop(name)
        if excess > 0:
            self._run.write(self.path)

    def _drop(self, name: str) -> None:
        self._make_aside()
        removed = self._aside / f"removed-{name}"
        (self.path / name).rename(removed)
        self._discard(removed, name)
        del self._run.checkpoints[name]
        self._run.branch = [other for other in self._run.branch if other != name]

    def _discard(self, folder: Path, name: str) -> None:
        """Remove the run's files in a checkpoint's folder that lies aside; what else is in it, or was changed since, is
        given back."""
        own = {MANIFEST, *self._run.checkpoints[name].files}
        changed: set[str] = set()
        try:
            files = read_manifest(folder).files
            own |= set(files)
            changed = {
                found for found in names_below(folder) if found in files and _is_changed(folder / found, files[found])
            }
        except CheckpointError:
            logger.debug("%s has no manifest to read", folder)
        foreign = [found for found in names_below(folder) if found not in own or found in changed]
        if not foreign:
            shutil.rmtree(folder)
            return
        for found in set(names_below(folder)) - set(foreign):
            (folder / found).unlink()
        kept = self.path / f"{name}.kept"
        while os.path.lexists(kept):
            kept = kept.with_name(f"{kept.name}_")
        folder.rename(kept)
        logger.warning("%s is not this run's and stays, in %s", ", ".join(foreign), kept)

    # Other runs and killed ones

    def clear(self, keep: Collection[Path] = ()) -> None:
        """Remove everything that the run of the list has written, but the files in `keep` and those that were changed
        since."""
        for name in self.owned_checkpoints():
            self._drop(name)
        kept = {path.resolve() for path in keep}
        for name in list(self._run.files):
            if self.owns(name):
                if (self.path / name).resolve() in kept:
                    continue
                (self.path / name).unlink()
            elif os.path.lexists(self.path / name):
                logger.warning("%s was changed since the run wrote it, and stays", self.path / name)
            del self._run.files[name]
        self._run.write(self.path)
        self._leave_aside()

    def recover(self) -> None:
        """Finish what a killed process had begun, and remove what it has left aside. Call it under the lock."""
        remove_incomplete(self.path / RUN_FILE)
        aside = self._aside
        if aside.is_symlink() or not aside.is_dir():
            return
        for name, saved in list(self._run.checkpoints.items()):
            staged, replaced, final = aside / name, aside / f"replaced-{name}", self.path / name
            if _seal_of(staged) == saved.seal:
                self._exchange(staged, name)
            elif replaced.is_dir() and not os.path.lexists(final):
                replaced.rename(final)
            for left in (replaced, aside / f"removed-{name}"):
                if left.is_dir():
                    self._discard(left, name)
        for staged in sorted(aside.glob("file*")):
            found = digests_of(staged, names_below(staged))
            self._move(staged, [name for name, digest in found.items() if self._run.files.get(name) == digest])
        shutil.rmtree(aside)

    def _check_lock(self) -> None:
        assert self._lock is not None, "the folder is not held"
        self._lock.check()

    def _make_aside(self) -> None:
        if self._aside.is_symlink():
            raise CheckpointError(f"{self._aside} is a link, which is not followed. Remove it.")
        self._aside.mkdir(exist_ok=True)

    def _leave_aside(self) -> None:
        if _is_empty(self._aside):
            self._aside.rmdir()

    @property
    def _aside(self) -> Path:
        return self.path / f"_fastdpo-{self._run.run}"


def _seal_of(folder: Path) -> str | None:
    try:
        return read_manifest(folder).seal
    except CheckpointError:
        return None


def _is_changed(path: Path, written: FileDigest) -> bool:
    """Whether a file holds something else than the run wrote. Of large ones, which nobody edits, the size tells."""
    size = path.lstat().st_size
    return path.is_symlink() or size != written.bytes or (size <= _READ_BYTES and digest_of(path) != written)


def _is_empty(folder: Path) -> bool:
    return folder.is_dir() and not folder.is_symlink() and not any(folder.iterdir())
