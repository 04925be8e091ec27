"""Checkpoint folders that are whole or not there at all, and the output folder's rules.

Written by `FastDPOTrainer._save_checkpoint`, between `saving.Checkpoints.begin` and `finish`, which calls `publish`.

A checkpoint is written into a folder beside its place, closed by a manifest of its files and their sizes,
flushed to the disk, and only then renamed. Resume accepts only folders whose manifest agrees with what lies in them, so
neither a kill in the middle of a save nor a truncated copy is ever trained on.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

from fastdpo.training.durable import flush
from fastdpo.version import __version__

MANIFEST = "fastdpo_checkpoint.json"
#: Of a checkpoint's files. Raised by a change that cannot read older ones, which are then refused by this number; one
#: without a number is of format 1.
FORMAT = 1
_CHECKPOINT = re.compile(r"^checkpoint-(\d+)$")
_STAGING = re.compile(r"^_checkpoint-(\d+)\.(incomplete|replaced)$")  # uploads to the hub leave out _*
#: Files by which a finished run is recognised in its output folder.
_RUN_FILES = ("adapter_model.safetensors", "model.safetensors", "model.safetensors.index.json", "metrics.json")


class CheckpointError(ValueError):
    """A folder that cannot be resumed from, or an output folder that must not be written to."""


def staging_folder(run_dir: str | Path, step: int) -> Path:
    """Where the checkpoint of `step` is written before it gets its name."""
    return Path(run_dir) / f"_checkpoint-{step}.incomplete"


def publish(staging: Path, final: Path, state: dict[str, Any]) -> None:
    """Close `staging` with a manifest holding `state`, flush it, and give it its name, replacing an older `final`."""
    files = {str(p.relative_to(staging)): p.stat().st_size for p in sorted(staging.rglob("*")) if p.is_file()}
    manifest = {"fastdpo": __version__, "format": FORMAT, **state, "files": files}
    (staging / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    for path in staging.rglob("*"):
        flush(path)
    flush(staging)
    if final.exists():
        replaced = final.with_name(f"_{final.name}.replaced")
        shutil.rmtree(replaced, ignore_errors=True)
        final.rename(replaced)
        staging.rename(final)
        shutil.rmtree(replaced)
    else:
        staging.rename(final)
    flush(final.parent)


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """The manifest of a whole checkpoint. Raises CheckpointError, saying what is wrong with the folder."""
    folder = Path(folder)
    advice = "Choose another checkpoint of the run, or start anew."
    if not folder.is_dir():
        raise CheckpointError(f"resume_from_checkpoint={str(folder)!r}: no such folder. {advice}")
    if not (folder / MANIFEST).is_file():
        raise CheckpointError(
            f"resume_from_checkpoint={str(folder)!r}: {MANIFEST} is missing, so the save was cut short or the folder "
            f"was not written by fastdpo. {advice}"
        )
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise CheckpointError(f"{folder / MANIFEST} is not readable: {error}. {advice}") from error
    if (found_format := manifest.get("format", 1)) != FORMAT:
        raise CheckpointError(
            f"{folder} has checkpoint format {found_format}, saved by fastdpo {manifest.get('fastdpo', 'unknown')}; "
            f"fastdpo {__version__} reads format {FORMAT}. Continue with the version that saved it, or start anew."
        )
    for name, size in manifest["files"].items():
        found = (folder / name).stat().st_size if (folder / name).is_file() else None
        if found != size:
            seen = "is missing" if found is None else f"has {found} bytes"
            raise CheckpointError(f"{folder / name} {seen}, but {size} were saved. {advice}")
    return manifest


def checkpoints(run_dir: str | Path) -> list[Path]:
    """The folders named checkpoint-N in `run_dir`, by step."""
    run_dir = Path(run_dir)
    found = [p for p in run_dir.iterdir() if p.is_dir() and _CHECKPOINT.match(p.name)] if run_dir.is_dir() else []
    return sorted(found, key=lambda p: int(p.name.split("-")[1]))


def recover(run_dir: str | Path) -> None:
    """Clean up after a kill: drop unfinished folders, and put back one that was about to be replaced."""
    run_dir = Path(run_dir)
    if not run_dir.is_dir():
        return
    for path in sorted(run_dir.iterdir()):
        if match := _STAGING.match(path.name):
            final = run_dir / f"checkpoint-{match[1]}"
            if match[2] == "replaced" and not final.exists():
                path.rename(final)
            else:
                shutil.rmtree(path)


def resolve_resume(run_dir: str | Path, resume_from_checkpoint: str | bool | None) -> str | None:
    """The checkpoint folder to resume from, checked whole; None for a fresh start.

    True, "True", "last" and "latest" mean the newest checkpoint in `run_dir`, which has to be whole. Raises
    CheckpointError if there is none, or if the folder named is not whole or cannot be resumed from.
    """
    if resume_from_checkpoint in (None, False, "", "False", "false"):
        return None
    if resume_from_checkpoint in (True, "True", "true", "last", "latest"):
        found = checkpoints(run_dir)
        if not found:
            raise CheckpointError(f"resume_from_checkpoint: {str(run_dir)!r} holds no checkpoint. Start without it.")
        folder = found[-1]
    else:
        folder = Path(str(resume_from_checkpoint)).expanduser()
    if not read_manifest(folder).get("resumable", False):
        raise CheckpointError(
            f"{folder} was saved with save_only_model=True, so it holds no optimizer to resume with. "
            "Train its weights further as adapter_name_or_path or model_name_or_path."
        )
    return str(folder)


def check_output_dir(run_dir: str | Path, *, resuming: bool, overwrite: bool) -> None:
    """Raise CheckpointError if `run_dir` holds another run, unless that is resumed or is to be overwritten."""
    run_dir = Path(run_dir)
    if run_dir.exists() and not run_dir.is_dir():
        raise CheckpointError(f"output_dir={str(run_dir)!r} is a file. Give a folder.")
    if (held := _run_files(run_dir)) and not resuming and not overwrite:
        names = ", ".join(sorted(path.name for path in held)[:4])
        raise CheckpointError(
            f"output_dir={str(run_dir)!r} holds another run ({names}). Continue it with "
            "--resume_from_checkpoint last, replace it with --overwrite_output_dir, or give another folder."
        )


def clear_output_dir(run_dir: str | Path) -> None:
    """Delete the checkpoints and results of the run that `run_dir` holds, so that no later resume can pick up one of
    its steps; other files stay."""
    for path in _run_files(Path(run_dir)):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def _run_files(run_dir: Path) -> list[Path]:
    results = [run_dir / name for name in _RUN_FILES]
    results += [path for path in run_dir.glob(f"*/{_RUN_FILES[0]}") if not path.parent.name.startswith("checkpoint-")]
    return [*checkpoints(run_dir), *(path for path in results if path.is_file())]
