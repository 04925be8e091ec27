"""Whether a run may start in a folder, and from which checkpoint. A refused start leaves no trace; only of a run that
is resumed, what a killed process had begun is finished first (`begin_start`).
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastdpo.training.runs.checkpoint import (
    MANIFEST,
    CheckpointError,
    Manifest,
    checkpoints,
    read_manifest,
    read_whole,
    step_in,
    step_of,
)
from fastdpo.training.runs.folder import RunFolder
from fastdpo.training.runs.run_list import RUN_FILE, RunList, SavedCheckpoint
from fastdpo.training.runs.sealed import BrokenSealError

logger = logging.getLogger(__name__)

#: Files of a model that a run writes beside its checkpoints: one that is no run's would be lost, or be mixed with ours.
_MODEL_FILES = (
    "adapter_config.json", "adapter_model.safetensors", "chat_template.jinja", "config.json", "generation_config.json",
    "model.safetensors", "model.safetensors.index.json", "tokenizer.json", "tokenizer_config.json",
)  # fmt: skip
#: Files of a run that say how it went. Alone they are no run that another one must not replace.
REPORTS = ("nonfinite_batch.json", "demo_plan.json")


@dataclass(frozen=True)
class Start:
    """resume: the checkpoint, whole, and its manifest; None for a fresh start. in_place: it lies in the folder."""

    resume: Path | None = None
    manifest: Manifest | None = None
    in_place: bool = False


def check_start(
    folder: RunFolder,
    resume_from_checkpoint: str | bool | None,
    *,
    overwrite: bool,
    sources: Mapping[str, str | Path | None] | None = None,
    needed: Iterable[str] = (),
) -> Start:
    """How a run starts in `folder`. sources: option → where the model, the data, ... of the run are. needed: names of
    files that the run will write, beside those that every run does.

    Raises CheckpointError if the checkpoint cannot be resumed from, if the folder holds another run that is neither
    resumed nor to be overwritten, if overwriting it would touch one of the sources, and if files that are no run's
    have names that the run needs.
    """
    path = folder.path
    if path.exists() and not path.is_dir():
        raise CheckpointError(f"output_dir={str(path)!r} is a file. Give a folder.")
    folder = RunFolder(path)
    folder.list = run = read_list(path)
    resume = resolve_resume(path, resume_from_checkpoint)
    manifest = None if resume is None else read_manifest(resume)
    in_place = manifest is not None and resume is not None and _is_own(resume, manifest, path, run)
    if not in_place:
        for option, source in (sources or {}).items():
            if source is not None and Path(source).expanduser().resolve() == path.resolve():
                raise CheckpointError(
                    f"output_dir={str(path)!r} is also {option}, which must not be overwritten. Give another."
                )
        held = _results(folder) if run else []
        if held and not overwrite:
            raise CheckpointError(
                f"output_dir={str(path)!r} holds another run ({', '.join(held[:4])}). Continue it with "
                "--resume_from_checkpoint last, replace it with --overwrite_output_dir, or give another folder."
            )
        if held:
            _refuse_sources(path, {**(sources or {}), "resume_from_checkpoint": resume})
    _refuse_foreign(folder, run, needed, after=manifest.step if in_place and manifest else -1)
    return Start(resume, manifest, in_place)


def _is_own(resume: Path, manifest: Manifest, path: Path, run: RunList | None) -> bool:
    """Whether a checkpoint is the folder's own, under its own name; of a folder without a list it may be any run's."""
    named = resume.resolve() == path.resolve() / f"checkpoint-{manifest.step}"
    return named and (run is None or run.run == manifest.run)


def begin_start(folder: RunFolder, resume_from_checkpoint: str | bool | None, **rules: Any) -> Start:
    """`check_start` under the folder's lock: of a run that is resumed, what a killed process had begun is finished
    first."""
    if is_resume(resume_from_checkpoint):
        folder.list = read_list(folder.path)
        if folder.list is not None:
            folder.recover()
    return check_start(folder, resume_from_checkpoint, **rules)


def is_resume(resume_from_checkpoint: str | bool | None) -> bool:
    """Whether the option asks for a checkpoint."""
    return resume_from_checkpoint not in (None, False, "", "False", "false")


def read_list(path: Path) -> RunList | None:
    """The run's list in the folder. Raises CheckpointError where it is not what was written."""
    try:
        return RunList.read(path)
    except BrokenSealError as error:
        raise CheckpointError(
            f"{error}. Resume from one of its checkpoints into another output_dir, or move {RUN_FILE} away."
        ) from error


def resolve_resume(run_dir: str | Path, resume_from_checkpoint: str | bool | None) -> Path | None:
    """The checkpoint folder to resume from, every byte of it checked; None for a fresh start.

    True, "True", "last" and "latest" mean the newest checkpoint of the branch that the run in `run_dir` trained last;
    of a run that was stopped before its first one, the start.
    Raises CheckpointError if there is none, or if the folder is not whole or cannot be resumed from; where the newest
    is torn, with the newest whole one.
    """
    if not is_resume(resume_from_checkpoint):
        return None
    if resume_from_checkpoint in (True, "True", "true", "last", "latest"):
        if _has_only_begun(Path(run_dir)):
            return None
        folder = _last(Path(run_dir))
    else:
        folder = Path(str(resume_from_checkpoint)).expanduser()
    if not read_whole(folder).resumable:
        raise CheckpointError(
            f"{folder} was saved with save_only_model=True, so it holds no optimizer to resume with. "
            "Train its weights further as adapter_name_or_path or model_name_or_path."
        )
    return folder


def _has_only_begun(run_dir: Path) -> bool:
    """Whether the folder is a run's that has saved nothing yet."""
    run = read_list(run_dir)
    return run is not None and not run.checkpoints and set(run.files) <= set(REPORTS)


def _last(run_dir: Path) -> Path:
    branch = branch_in(run_dir)
    if not branch:
        raise CheckpointError(f"resume_from_checkpoint: {str(run_dir)!r} holds no checkpoint. Start without it.")
    try:
        read_whole(branch[-1])
    except CheckpointError as torn:
        for folder in reversed(branch[:-1]):
            try:
                read_whole(folder)
            except CheckpointError as error:
                logger.warning("%s", error)
                continue
            raise CheckpointError(
                f"{_cause(torn)}. The newest whole checkpoint is {folder}: --resume_from_checkpoint {folder}"
            ) from torn
        raise
    return branch[-1]


def _cause(error: CheckpointError) -> str:
    return str(error).partition(". Choose another")[0].removeprefix("resume_from_checkpoint=")


def branch_in(run_dir: Path) -> list[Path]:
    """The checkpoints of the branch that the run in `run_dir` trained last, as far as they are there. One that was
    listed but whose place an older one still has (the save was cut short) is none of them. In a folder without a list,
    into which checkpoints were copied: all of them, by step."""
    run = read_list(run_dir)
    if run is None:
        return checkpoints(run_dir)
    folders = [(run_dir / name, run.checkpoints[name]) for name in run.branch]
    return [folder for folder, saved in folders if step_of(folder) is not None and not _is_older(folder, saved)]


def _is_older(folder: Path, saved: SavedCheckpoint) -> bool:
    try:
        return read_manifest(folder).seal != saved.seal
    except CheckpointError:
        return False  # torn: that is to be said, not passed over


def _results(folder: RunFolder) -> list[str]:
    assert folder.list is not None
    files = [name for name in folder.list.files if name not in REPORTS and os.path.lexists(folder.path / name)]
    weights = sorted(name for name in files if name.endswith(".safetensors"))
    return [*weights, *folder.owned_checkpoints(), *sorted(set(files) - set(weights))]


def list_of_start(folder: RunFolder, start: Start, *, keep: bool = False) -> RunList:
    """The list that a run begins with: of the run that it continues in place, cut after the checkpoint; else a new one,
    with what was kept when another run was cleared. In a folder without a list the checkpoints say whose they are.

    keep: the list stays, with an empty branch, as the folder is this run's already.
    """
    held = folder.list
    if not start.in_place:
        if keep and held is not None:
            held.branch = []
            return held
        return RunList(files=dict(held.files) if held else {})
    assert start.manifest is not None, "what is resumed has one"
    run = held or RunList(run=start.manifest.run)
    for found in checkpoints(folder.path):
        if found.name not in run.checkpoints and (own := _manifest_of(found, run.run)) is not None:
            run.checkpoints[found.name] = SavedCheckpoint(own.seal, (*own.files, MANIFEST))
    name = f"checkpoint-{start.manifest.step}"
    run.checkpoints[name] = SavedCheckpoint(start.manifest.seal, (*start.manifest.files, MANIFEST))
    run.branch = [name for name in _ancestors(run, folder.path, start.manifest) if name in run.checkpoints]
    return run


def _manifest_of(folder: Path, run: str) -> Manifest | None:
    try:
        manifest = read_manifest(folder)
    except CheckpointError:
        return None
    return manifest if manifest.run == run and manifest.step == step_of(folder) else None


def _ancestors(run: RunList, path: Path, last: Manifest) -> list[str]:
    """The branch that ends with `last`: from each checkpoint to the one that it was trained from, as far as these are
    there."""
    branch, found = [f"checkpoint-{last.step}"], last
    while found.parent is not None:
        name, seal = found.parent
        older = _manifest_of(path / name, run.run)
        if older is None or older.seal != seal:
            break
        branch.insert(0, name)
        found = older
    return branch


def _refuse_sources(path: Path, sources: Mapping[str, str | Path | None]) -> None:
    """Overwriting must not delete what the run starts from."""
    own = path.resolve()
    for option, source in sources.items():
        if source is None or not Path(source).expanduser().exists():
            continue  # of the hub
        found = Path(source).expanduser().resolve()
        if own in found.parents or found in own.parents:
            where = "inside" if own in found.parents else "around"
            raise CheckpointError(
                f"{option}={str(source)!r} lies {where} output_dir={str(path)!r}, which --overwrite_output_dir would "
                "clear. Give another output_dir."
            )


def _refuse_foreign(folder: RunFolder, run: RunList | None, needed: Iterable[str], *, after: int) -> None:
    """Names that the run needs and that are not its own, nor of the run that is to be overwritten."""
    path = folder.path
    folder.list = run or RunList()
    there = [name for name in (*_MODEL_FILES, *needed) if os.path.lexists(path / name)]
    foreign = [name for name in there if not folder.owns(name) and not folder.is_pending(name)]
    for each in path.iterdir() if path.is_dir() else ():
        taken = step_in(each.name)
        if taken is not None and taken > after and not folder.owns_checkpoint(each.name):
            foreign.append(each.name)
    if foreign:
        raise CheckpointError(
            f"output_dir={str(path)!r} holds {', '.join(sorted(foreign)[:4])}, which no run wrote there, or which was "
            "changed since: that stays, and this run needs the names. Move it away, or give another folder."
        )
