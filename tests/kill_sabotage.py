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
from transformers import TrainerCallback


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


class _OneBit(TrainerCallback):
    """Moves one weight to its neighbour among the floats, in a run that is resumed."""

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step:
            weight = next(each for each in model.parameters() if each.requires_grad).data.view(-1)
            weight[0] = torch.nextafter(weight[0], torch.tensor(torch.inf))


def one_bit(trainer: Any) -> None:
    """A resume that differs by one bit of one weight."""
    trainer.add_callback(_OneBit())


def leftover(trainer: Any) -> None:
    """A name that only a run that was killed leaves: a mark made before the weights are saved, gone after."""
    save = trainer.save_run

    def saved(*arguments: Any, **named: Any) -> Any:
        mark = Path(trainer.args.output_dir) / f"mark-{os.getpid()}"
        mark.mkdir()
        written = save(*arguments, **named)
        mark.rmdir()
        return written

    trainer.save_run = saved


KINDS: dict[str, Callable[[Any], None]] = {"in place": in_place, "one bit": one_bit, "leftover": leftover}
