"""`fastdpo verify FOLDER`: whether a run or a checkpoint is whole, and what a resume of it would compare."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from fastdpo.shown import markup, terminal
from fastdpo.training.durable import names_below
from fastdpo.training.runs.checkpoint import MANIFEST, CheckpointError, faults, read_manifest
from fastdpo.training.runs.folder import RunFolder
from fastdpo.training.runs.run_list import RUN_FILE, RunList
from fastdpo.training.runs.start import branch_in, read_list

_DESCRIPTION = """Read every byte of a run, or of one checkpoint, and compare it with what was written.

Names each file that is missing, torn or changed, the checkpoint that `--resume_from_checkpoint last` takes, and what a
resume compares. Changes nothing.

exit codes: 0 whole; 1 something is not; 2 the folder is no run and no checkpoint of fastdpo"""


def main(argv: list[str]) -> int:
    """Check one folder. Returns the exit code; raises CheckpointError where there is nothing to check."""
    parser = argparse.ArgumentParser(
        "fastdpo verify", description=_DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", metavar="FOLDER", help="an output_dir, or a checkpoint in it")
    folder = Path(parser.parse_args(argv).folder).expanduser()
    console = terminal()
    if (folder / MANIFEST).is_file():
        wrong = check_checkpoint(folder, console)
        if not wrong:
            _print_identity(read_manifest(folder).identity, console)
    elif (run := read_list(folder)) is not None:
        wrong = check_run(folder, run, console)
    else:
        raise CheckpointError(
            f"{str(folder)!r} holds neither {RUN_FILE} nor {MANIFEST}, so it is no run and no checkpoint of fastdpo. "
            "Give an output_dir of fastdpo train, or a checkpoint in it."
        )
    console.print("[bold red]not whole[/bold red]" if wrong else "[bold green]whole[/bold green]")
    return 1 if wrong else 0


def check_checkpoint(folder: Path, console: Console) -> list[str]:
    """Print what is wrong with a checkpoint, or that nothing is; returns the faults."""
    try:
        manifest = read_manifest(folder)
        wrong = faults(folder, manifest.files)
    except CheckpointError as error:
        manifest, wrong = None, [str(error)]
    for fault in wrong:
        console.print(f"  [red]{markup(fault)}[/red]")
    if manifest is not None:
        parent = "the start" if manifest.parent is None else manifest.parent[0]
        state = f"{len(wrong)} of {len(manifest.files)} files are not" if wrong else f"{len(manifest.files)} files are"
        resumable = "" if manifest.resumable else "; it holds no optimizer to resume with"
        console.print(f"{markup(folder)}: step {manifest.step}, from {parent}: {state} what was saved{resumable}")
        _print_others(folder, {*manifest.files, MANIFEST}, console)
    return wrong


def check_run(folder: Path, run: RunList, console: Console) -> list[str]:
    """Print the same of a run: its files, every checkpoint, and from which it would be resumed; returns the faults."""
    wrong = faults(folder, run.files)
    for fault in wrong:
        console.print(f"  [red]{markup(fault)}[/red]")
    if any(folder.glob(f"_fastdpo-{run.run}/*")):
        wrong.append("cut short")
        console.print("  [red]a save was cut short (or is going on): the next start of the run finishes it[/red]")
    finished = "not finished" if run.finished is None else f"finished at step {run.finished}"
    console.print(f"{markup(folder)}: {finished}, {len(run.files)} files beside its checkpoints")
    own = RunFolder(folder)
    own.list = run
    for name in own.owned_checkpoints():
        wrong += check_checkpoint(folder / name, console)
        if name not in run.branch:
            console.print("  beside the branch that was trained last")
    listed = {
        *run.files,
        RUN_FILE,
        *(f"{name}/{file}" for name, each in run.checkpoints.items() for file in each.files),
    }
    _print_others(folder, listed, console)
    branch = branch_in(folder)
    if branch:
        console.print(f"--resume_from_checkpoint last takes {markup(branch[-1])}")
        try:
            _print_identity(read_manifest(branch[-1]).identity, console)
        except CheckpointError as error:
            wrong.append(str(error))
    return wrong


def _print_others(folder: Path, own: set[str], console: Console) -> None:
    others = [name for name in names_below(folder) if name not in own and not name.startswith("_")]
    if others:
        more = f" and {len(others) - 5} more" if len(others) > 5 else ""
        console.print(f"  not the run's: {markup(', '.join(others[:5]))}{more}")


def _print_identity(identity: Mapping[str, Any], console: Console) -> None:
    table = Table(title=f"what a resume compares ({identity['digest']})", show_header=False, title_justify="left")
    for kind, title in (("fixed", "must be the same"), ("noted", "honoured, and said")):
        table.add_row(f"[bold]{title}[/bold]", "")
        for name, value in identity[kind].items():
            table.add_row(f"  {markup(name)}", markup(value))
    console.print(table)
