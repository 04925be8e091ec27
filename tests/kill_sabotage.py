"""Defects that `kills.py --broken` plants into a trainer, to see that they are found.

They use what a trainer has in any case, so that they stay defects however it writes its folder.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def in_place(trainer: Any) -> None:
    """A checkpoint grows under its final name, file by file: a kill on the way leaves half of one."""
    save = trainer._save_checkpoint

    def saved(*arguments: Any, **named: Any) -> None:
        save(*arguments, **named)
        final = Path(trainer.args.output_dir) / f"checkpoint-{trainer.state.global_step}"
        with tempfile.TemporaryDirectory() as aside:
            whole = shutil.copytree(final, Path(aside) / "whole")
            shutil.rmtree(final)
            shutil.copytree(whole, final)

    trainer._save_checkpoint = saved


def one_bit(trainer: Any) -> None:
    """One weight that is its neighbour among the floats, where the run was resumed."""
    train = trainer.train

    def trained(resume_from_checkpoint: Any = None, **named: Any) -> Any:
        result = train(resume_from_checkpoint=resume_from_checkpoint, **named)
        if resume_from_checkpoint:
            weight = next(each for each in trainer.model.parameters() if each.requires_grad).data.view(-1)
            weight[0] = torch.nextafter(weight[0], torch.tensor(torch.inf))
        return result

    trainer.train = trained


def leftover(trainer: Any) -> None:
    """A name that only a run that was killed leaves: a mark made before the last files are written, gone after."""
    save = trainer.save_run

    def saved(*arguments: Any, **named: Any) -> Any:
        mark = Path(trainer.args.output_dir) / f"mark-{os.getpid()}"
        mark.mkdir()
        written = save(*arguments, **named)
        mark.rmdir()
        return written

    trainer.save_run = saved


KINDS: dict[str, Callable[[Any], None]] = {"in place": in_place, "one bit": one_bit, "leftover": leftover}
