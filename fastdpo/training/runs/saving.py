"""The part of the trainer that saves and restores: whole checkpoints, exact resume, the output folder's rules."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import Trainer
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import rotate_checkpoints

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

if TYPE_CHECKING:
    from torch import nn

    from fastdpo.loss.dynamic_beta import DynamicBeta
    from fastdpo.training.reference.policy import ReferencePolicy

logger = logging.getLogger(__name__)

#: Options that a resumed run cannot change.
_FIXED_OPTIONS = (
    "beta", "loss_type", "loss_weights", "label_smoothing", "f_divergence_type", "f_alpha_divergence_coef",
    "discopop_tau", "simpo_gamma", "cpo_alpha", "ld_alpha", "use_weighting", "dynamic_beta", "beta_alpha",
    "beta_momentum", "keep_ratio", "min_beta", "beta_scope", "beta_variant", "max_length", "max_prompt_length",
    "seed", "data_seed", "train_sampling_strategy", "deterministic_attention", "head_workspace_bytes",
)  # fmt: skip
DYNAMIC_BETA_FILE = "dynamic_beta.safetensors"
TRAINER_STATE_FILE = "trainer_state.json"


class CheckpointMixin(Trainer):
    """Overrides how transformers' Trainer writes and reads checkpoint folders."""

    reference: ReferencePolicy
    dynamic_beta: DynamicBeta | None
    save_reference: Callable[[], None]
    _claimed = False

    def prepare_output_dir(self, resume_from_checkpoint: str | bool | None) -> str | None:
        """Apply the output folder's rules once; the checkpoint folder to resume from, or None.

        Raises CheckpointError: see `check_output_dir` and `resolve_resume`.
        """
        if resume_from_checkpoint is None:
            resume_from_checkpoint = self.args.resume_from_checkpoint
        if self.args.should_save:
            recover(self.args.output_dir)
        self._barrier()
        resume = resolve_resume(self.args.output_dir, resume_from_checkpoint)
        if not self._claimed:
            resuming, overwrite = resume is not None, self.args.overwrite_output_dir
            check_output_dir(self.args.output_dir, resuming=resuming, overwrite=overwrite)
            self._barrier()
            if self.args.should_save and overwrite and not resuming:
                clear_output_dir(self.args.output_dir)
        self._claimed = True
        self._barrier()
        return resume

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        step = self.state.global_step
        run_dir = Path(self._get_output_dir(trial=trial))
        staging, final = staging_folder(run_dir, step), run_dir / f"checkpoint-{step}"
        if self.args.should_save:
            shutil.rmtree(staging, ignore_errors=True)
            staging.mkdir(parents=True)
        self._barrier()
        if self.hp_search_backend is None and trial is None:
            self.store_flos()
        self.save_model(str(staging), _internal_call=True)
        if self.state.best_global_step:
            best = run_dir / f"checkpoint-{self.state.best_global_step}"
            if best == final or best.is_dir():
                self.state.best_model_checkpoint = str(best)
        if not self.args.save_only_model:
            self._save_optimizer_and_scheduler(str(staging))
            self._save_scaler(str(staging))
            self._save_rng_state(str(staging))
        if self.args.should_save:
            self._save_states(staging)
        self._barrier()  # every rank's random state is written
        if self.args.should_save:
            state = {"resumable": not self.args.save_only_model, "reference": self.reference.fingerprint()}
            publish(staging, final, {**state, "options": self._fixed_options()})
        self.save_reference()
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(final))
        if self.args.should_save:
            rotate_checkpoints(
                output_dir=str(run_dir),
                save_total_limit=self.args.save_total_limit,
                best_model_checkpoint=self.state.best_model_checkpoint,
                use_mtime=True,
            )
        self._barrier()

    def _save_states(self, staging: Path) -> None:
        if self.dynamic_beta is not None:
            save_file(self.dynamic_beta.state_dict(), str(staging / DYNAMIC_BETA_FILE))
        for callback in [*self.callback_handler.callbacks, self.control]:
            if isinstance(callback, ExportableState):
                name, state = type(callback).__name__, callback.state()
                saved = self.state.stateful_callbacks[name]
                if isinstance(saved, list):
                    saved.append(state)
                else:
                    self.state.stateful_callbacks[name] = state
        self.state.save_to_json(str(staging / TRAINER_STATE_FILE))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        manifest = read_manifest(resume_from_checkpoint)
        if manifest["reference"] != self.reference.fingerprint():
            raise CheckpointError(
                f"{resume_from_checkpoint} was trained against another reference than this trainer has "
                f"({self.reference.kind}). Give the model, the adapter and the ref_model that the run was started with."
            )
        for name, value in self._fixed_options().items():
            if (saved := manifest["options"].get(name)) != value:
                raise CheckpointError(
                    f"{resume_from_checkpoint} was trained with {name}={saved!r}, this run has {name}={value!r}. "
                    "Resume with the run's own options, or start a new run from its weights."
                )
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        if self.dynamic_beta is not None:
            self.dynamic_beta.load_state_dict(load_file(str(Path(resume_from_checkpoint) / DYNAMIC_BETA_FILE)))

    def _fixed_options(self) -> dict[str, Any]:
        """What a resumed run must share with the run it continues: the objective, and which pairs come next."""
        options = {name: getattr(self.args, name) for name in _FIXED_OPTIONS}
        return options | {"pairs per step": self.args.train_batch_size * self.args.world_size}

    def _load_best_model(self) -> None:
        # transformers looks for adapters at the top of the folder only; peft keeps named ones one level below.
        if isinstance(self.model, PeftModel):
            logger.info("loading the best weights, %s", self.state.best_model_checkpoint)
            super()._load_from_checkpoint(self.state.best_model_checkpoint)
        else:
            super()._load_best_model()

    def _barrier(self) -> None:
        if self.args.world_size > 1:
            dist.barrier()
