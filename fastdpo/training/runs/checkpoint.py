"""A checkpoint's manifest: what its files hold, which run and which checkpoint it comes from, what it was trained with.

A checkpoint is written aside, closed by its manifest, flushed to the disk, and only then gets its name
(`fastdpo.training.runs.folder`). Resume accepts only folders that hold what their manifest says, so neither a kill in
the middle of a save nor a truncated copy or a changed bit is ever trained on.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastdpo.training.durable import FileDigest, digests_of, flush_tree, names_below
from fastdpo.training.runs.run_list import as_entries, digests_in
from fastdpo.training.runs.sealed import SEAL, BrokenSealError, sealed, unsealed
from fastdpo.version import __version__

MANIFEST = "fastdpo_checkpoint.json"
#: Of a checkpoint's files. Raised by a change that cannot read older ones, which are then refused by this number; one
#: without a number is of format 1, which had no digests.
FORMAT = 2
_CHECKPOINT = re.compile(r"^checkpoint-(\d+)$")


class CheckpointError(ValueError):
    """A folder that cannot be resumed from, or an output folder that must not be written to."""


@dataclass(frozen=True)
class Manifest:
    """run: whose. step: after which. parent: name and seal of the checkpoint that it was trained from, or None.
    resumable: whether it holds the optimizer. identity: see `fastdpo.training.runs.identity`. files: what they hold.
    seal: of the manifest itself.
    """

    run: str
    step: int
    parent: tuple[str, str] | None
    resumable: bool
    identity: Mapping[str, Any]
    files: dict[str, FileDigest]
    seal: str


def close(
    folder: Path, *, run: str, step: int, parent: tuple[str, str] | None, resumable: bool, identity: Mapping[str, Any]
) -> Manifest:
    """Write the manifest of what lies in `folder`, and flush all of it to the disk. Raises OSError."""
    content = {
        "fastdpo": __version__,
        "format": FORMAT,
        "run": run,
        "step": step,
        "parent": parent,
        "resumable": resumable,
        "identity": identity,
        "files": as_entries(digests_of(folder, names_below(folder))),
    }
    (folder / MANIFEST).write_bytes(sealed(content))
    flush_tree(folder)
    return read_manifest(folder)


def read_manifest(folder: Path) -> Manifest:
    """The manifest in `folder`, as it was written. Raises CheckpointError, saying what is wrong with it."""
    advice = "Choose another checkpoint of the run, or start anew."
    if not folder.is_dir():
        raise CheckpointError(f"resume_from_checkpoint={str(folder)!r}: no such folder. {advice}")
    if not (folder / MANIFEST).is_file():
        raise CheckpointError(
            f"resume_from_checkpoint={str(folder)!r}: {MANIFEST} is missing, so the save was cut short or the folder "
            f"was not written by fastdpo. {advice}"
        )
    path = folder / MANIFEST
    try:
        _refuse_other_format(path)
        content = unsealed(path)
    except (BrokenSealError, OSError) as error:
        raise CheckpointError(f"{error}. {advice}") from error
    parent = content["parent"]
    return Manifest(
        content["run"],
        content["step"],
        None if parent is None else (parent[0], parent[1]),
        content["resumable"],
        content["identity"],
        digests_in(content["files"]),
        content[SEAL],
    )


def _refuse_other_format(path: Path) -> None:
    """Before the seal is looked at: another format may have none."""
    try:
        content = json.loads(path.read_bytes())
        found = content.get("format", 1)
    except (ValueError, AttributeError, RecursionError) as error:
        raise BrokenSealError(f"{path} is not readable ({error})") from error
    if found != FORMAT:
        raise CheckpointError(
            f"{path} has checkpoint format {found}, saved by fastdpo {content.get('fastdpo', 'unknown')}; fastdpo "
            f"{__version__} reads format {FORMAT}. Continue with the version that saved it, or start anew."
        )


def faults(folder: Path, files: Mapping[str, FileDigest]) -> list[str]:
    """What is wrong with the files below `folder`, each fault with its file's name; none where all hold what they
    should. Every byte of them is read."""
    there = {name: folder / name for name in files if (folder / name).is_file()}
    # Sizes first: most of what is torn shows there, without reading anything
    whole = [name for name, path in there.items() if path.stat().st_size == files[name].bytes]
    found = digests_of(folder, whole)
    result = []
    for name, digest in files.items():
        if name not in there:
            result.append(f"{folder / name} is missing, but {digest.bytes} bytes were saved")
        elif name not in found:
            result.append(f"{folder / name} has {there[name].stat().st_size} bytes, but {digest.bytes} were saved")
        elif found[name] != digest:
            result.append(f"{folder / name} holds other bytes than were saved")
    return result


def read_whole(folder: Path) -> Manifest:
    """The manifest of a checkpoint whose files all hold what it says. Raises CheckpointError naming what does not."""
    manifest = read_manifest(folder)
    if wrong := faults(folder, manifest.files):
        more = "" if len(wrong) == 1 else f" (and {len(wrong) - 1} more)"
        raise CheckpointError(f"{wrong[0]}{more}. Choose another checkpoint of the run, or start anew.")
    return manifest


def step_in(name: str) -> int | None:
    """N of the name checkpoint-N; None of any other."""
    match = _CHECKPOINT.match(name)
    return int(match[1]) if match else None


def step_of(folder: Path) -> int | None:
    """N of a folder named checkpoint-N that is no link; None for any other path."""
    return step_in(folder.name) if folder.is_dir() and not folder.is_symlink() else None


def checkpoints(run_dir: str | Path) -> list[Path]:
    """The folders named checkpoint-N in `run_dir`, by step."""
    run_dir = Path(run_dir)
    found = [path for path in run_dir.iterdir() if step_of(path) is not None] if run_dir.is_dir() else []
    return sorted(found, key=lambda path: step_of(path) or 0)
