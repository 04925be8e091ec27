"""`fastdpo_run.json`: the list of what a run has written into its folder, its checkpoints and the branch it trained.

Written ahead: a file is listed before it gets its name. So whatever has a name and is no user's is listed, after a kill
too; and what is listed but not there was cut short.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastdpo.training.durable import FileDigest, write_whole
from fastdpo.training.runs.sealed import BrokenSealError, sealed, unsealed
from fastdpo.version import __version__

RUN_FILE = "fastdpo_run.json"
#: Of the list. One of another format is refused by this number.
LIST_FORMAT = 1


@dataclass(frozen=True)
class SavedCheckpoint:
    """seal: of its manifest, which holds digests of its files. files: their names, the manifest's among them."""

    seal: str
    files: tuple[str, ...]


@dataclass
class RunList:
    """run: an id that no other run has, which its checkpoints carry too.
    files: name in the folder → what was written there.
    checkpoints: name → each that may be there.
    branch: the names of those that were trained one from the other, the last of them the run's newest.
    finished: the step after which the files of the finished run were written; None before.
    """

    run: str = field(default_factory=lambda: uuid.uuid4().hex)
    files: dict[str, FileDigest] = field(default_factory=dict)
    checkpoints: dict[str, SavedCheckpoint] = field(default_factory=dict)
    branch: list[str] = field(default_factory=list)
    finished: int | None = None

    def write(self, folder: Path) -> None:
        """Into `folder`. Raises OSError."""
        content = {
            "fastdpo": __version__,
            "format": LIST_FORMAT,
            "run": self.run,
            "finished": self.finished,
            "branch": self.branch,
            "files": as_entries(self.files),
            "checkpoints": {
                name: {"seal": saved.seal, "files": list(saved.files)} for name, saved in self.checkpoints.items()
            },
        }
        write_whole(folder / RUN_FILE, sealed(content))

    @classmethod
    def read(cls, folder: Path) -> RunList | None:
        """The list in `folder`; None without one. Raises BrokenSealError, or OSError where it cannot be read."""
        path = folder / RUN_FILE
        if not path.is_file():
            return None
        content = unsealed(path)
        if content["format"] != LIST_FORMAT:
            raise BrokenSealError(
                f"{path} has format {content['format']}, of fastdpo {content['fastdpo']}; fastdpo {__version__} reads "
                f"format {LIST_FORMAT}"
            )
        return cls(
            content["run"],
            digests_in(content["files"]),
            {
                name: SavedCheckpoint(each["seal"], tuple(each["files"]))
                for name, each in content["checkpoints"].items()
            },
            list(content["branch"]),
            content["finished"],
        )


def as_entries(digests: Mapping[str, FileDigest]) -> dict[str, Any]:
    """Digests in plain types."""
    return {name: digest._asdict() for name, digest in digests.items()}


def digests_in(entries: Mapping[str, Any]) -> dict[str, FileDigest]:
    """The inverse of `as_entries`."""
    return {name: FileDigest(**entry) for name, entry in entries.items()}
