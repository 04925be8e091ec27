"""The checkpoints of one run: its folder claimed, whole checkpoints written, and what a resume must share compared.

What a checkpoint holds beside transformers' own files is given: modules by file name, and the options that are fixed.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import nn
from transformers import TrainerState
from transformers.trainer_callback import ExportableState

from fastdpo.training.options import FastDPOConfig
from fastdpo.training.ranks import Ranks
from fastdpo.training.reference import ReferencePolicy
from fastdpo.training.runs.checkpoint import (
    CheckpointError,
    check_output_dir,
    clear_output_dir,
    publish,
    read_manifest,
    recover,
    resolve_resume,
    staging_folder,
)

#: Options that a resumed run cannot change, whatever its objective: those that decide which examples come next, and in
#: which order sums are taken.
_FIXED_OPTIONS = (
    "max_length", "max_prompt_length", "seed", "data_seed", "train_sampling_strategy", "deterministic_attention",
    "head_workspace_bytes",
)  # fmt: skip
TRAINER_STATE_FILE = "trainer_state.json"


class Checkpoints:
    """The output folder of a run and what is saved there.

    Args:
        args, ranks: of the run.
        reference: whose fingerprint a checkpoint holds.
        modules: gives file name → module whose state belongs to a checkpoint, as they are when it is called.
        fixed: options by name, of the objective, that a resumed run must share; the run's own are added.
    """

    def __init__(
        self,
        args: FastDPOConfig,
        ranks: Ranks,
        reference: ReferencePolicy,
        modules: Callable[[], Mapping[str, nn.Module]],
        fixed: Mapping[str, Any],
    ) -> None:
        self.args, self.ranks, self.reference, self.modules = args, ranks, reference, modules
        self.fixed = {
            **fixed,
            **{name: getattr(args, name) for name in _FIXED_OPTIONS},
            "pairs per step": args.train_batch_size * args.world_size,
        }
        self._claimed = False

    def claim(self, resume_from_checkpoint: str | bool | None) -> str | None:
        """Apply the output folder's rules once; the checkpoint folder to resume from, or None.

        Raises CheckpointError: see `check_output_dir` and `resolve_resume`.
        """
        if resume_from_checkpoint is None:
            resume_from_checkpoint = self.args.resume_from_checkpoint
        if self.args.should_save:
            recover(self.args.output_dir)
        self.ranks.wait()
        resume = resolve_resume(self.args.output_dir, resume_from_checkpoint)
        if not self._claimed:
            resuming, overwrite = resume is not None, self.args.overwrite_output_dir
            check_output_dir(self.args.output_dir, resuming=resuming, overwrite=overwrite)
            self.ranks.wait()
            if self.args.should_save and overwrite and not resuming:
                clear_output_dir(self.args.output_dir)
        self._claimed = True
        self.ranks.wait()
        return resume

    def begin(self, run_dir: Path, step: int) -> Path:
        """An empty folder for the checkpoint of `step`, which all ranks write into."""
        staging = staging_folder(run_dir, step)
        if self.args.should_save:
            shutil.rmtree(staging, ignore_errors=True)
            staging.mkdir(parents=True)
        self.ranks.wait()
        return staging

    def finish(self, staging: Path, final: Path, state: TrainerState, callbacks: Iterable[Any]) -> None:
        """Add the states of trainer, callbacks and modules, wait for all ranks' files, and publish it as `final`."""
        if self.args.should_save:
            for name, module in self.modules().items():
                save_file(module.state_dict(), str(staging / name))
            _export_states(state, callbacks)
            state.save_to_json(str(staging / TRAINER_STATE_FILE))
        self.ranks.wait()  # every rank's random state is written
        if self.args.should_save:
            publish(
                staging,
                final,
                {
                    "resumable": not self.args.save_only_model,
                    "reference": self.reference.fingerprint(),
                    "options": self.fixed,
                },
            )

    def check(self, folder: str) -> None:
        """Raise CheckpointError where this run cannot continue from the checkpoint `folder`."""
        manifest = read_manifest(folder)
        if manifest["reference"] != self.reference.fingerprint():
            raise CheckpointError(
                f"{folder} was trained against another reference than this trainer has "
                f"({self.reference.kind}). Give the model, the adapter and the ref_model that the run was started with."
            )
        for name, value in self.fixed.items():
            if (saved := manifest["options"].get(name)) != value:
                raise CheckpointError(
                    f"{folder} was trained with {name}={saved!r}, this run has {name}={value!r}. "
                    "Resume with the run's own options, or start a new run from its weights."
                )

    def load_modules(self, folder: str) -> None:
        """The modules' states as the checkpoint `folder` has them."""
        for name, module in self.modules().items():
            module.load_state_dict(load_file(str(Path(folder) / name)))


def _export_states(state: TrainerState, callbacks: Iterable[Any]) -> None:
    """Write what callbacks keep into `state`, as transformers does."""
    for callback in callbacks:
        if isinstance(callback, ExportableState):
            name, exported = type(callback).__name__, callback.state()
            saved = state.stateful_callbacks[name]
            if isinstance(saved, list):
                saved.append(exported)
            else:
                state.stateful_callbacks[name] = exported
