"""transformers' Trainer that saves whole, and finite weights only: checkpoints, weights, uploads, what a finished run
leaves. All of it goes through the run's folder.

A base class of the trainer, with `parts` and what it is built from.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers.trainer_utils import HubStrategy
from transformers.utils import PushInProgress

from fastdpo.training.durable import placed_whole
from fastdpo.training.options.built import BuiltOptions
from fastdpo.training.ranks import Ranks
from fastdpo.training.reference import ReferenceStore
from fastdpo.training.runs import artifacts
from fastdpo.training.runs.checkpoint import read_whole
from fastdpo.training.runs.hub import push_checkpoint
from fastdpo.training.runs.loop import InterruptibleTrainer
from fastdpo.training.runs.nonfinite import refuse_nonfinite_weights
from fastdpo.training.runs.saving import Checkpoints

logger = logging.getLogger(__name__)


class SavingTrainer(InterruptibleTrainer):
    """saving: of the run. references: whose log-probs are saved beside it. options: as they were given, and what they
    came to. objective: whose facts the card holds. results: final figures, for the card."""

    saving: Checkpoints
    references: ReferenceStore
    options: BuiltOptions
    objective: Any
    results: dict[str, Any]
    # transformers' own, which have no types
    is_fsdp_enabled: bool
    push_in_progress: Any

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        saving, step = self.saving, self.state.global_step
        self.refuse_nonfinite_weights(saving.ranks)
        run_dir = Path(self.args.output_dir)
        staged = saving.begin(step)
        with saving.written(staged):
            self.store_flos()
            super().save_model(str(staged), _internal_call=True)
            if self.state.best_global_step and self.stop_signals.may_be_best(self.args, self.state):
                best = run_dir / f"checkpoint-{self.state.best_global_step}"
                if self.state.best_global_step == step or best.is_dir():
                    self.state.best_model_checkpoint = str(best)
            if not self.args.save_only_model:
                self._save_optimizer_and_scheduler(str(staged))
                self._save_scaler(str(staged))
                self._save_rng_state(str(staged))
            self.references.share()
            final = saving.finish(staged, self.state, [*self.callback_handler.callbacks, self.control])
        self.references.save()
        if self.args.push_to_hub:
            self._push_from_checkpoint(final)
        saving.rotate(self.state.best_model_checkpoint)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """As transformers', without its pickle of the options: that would hold tokens, and run code when it is read."""
        if self.args.should_save:
            self.model.save_pretrained(output_dir, state_dict=state_dict)
            self.processing_class.save_pretrained(output_dir)

    def refuse_nonfinite_weights(self, ranks: Ranks | None) -> None:
        """Raise NonFiniteWeightsError for a trained weight that is not finite. ranks: that call it together, if any."""
        refuse_nonfinite_weights(self.model, ranks, self.saving.folder, self.state.global_step)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Weights and tokenizer, in `args.output_dir` by default: they get their names once all are written.

        Raises NonFiniteWeightsError.
        """
        in_run = output_dir is None or Path(output_dir).resolve() == Path(self.args.output_dir).resolve()
        self.refuse_nonfinite_weights(self.saving.ranks if in_run or self.is_fsdp_enabled else None)
        if in_run:
            with self.saving.published("file-model") as staged:
                super().save_model(str(staged), _internal_call=True)
        else:
            with placed_whole(Path(str(output_dir)), self.args.should_save) as staged:
                super().save_model(str(staged), _internal_call=True)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """transformers' would copy over the files of the output folder, and pickle the options there."""
        if not self.is_world_process_zero() or self.args.hub_strategy == HubStrategy.END:
            return
        if not self.args.hub_always_push and self.push_in_progress is not None and not self.push_in_progress.is_done():
            return
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        with artifacts.optional(f"upload of {checkpoint_folder}"):
            stage = self.saving.folder.stage
            jobs = push_checkpoint(self.args, Path(checkpoint_folder), str(self.hub_model_id), stage)
            self.push_in_progress = PushInProgress([*getattr(self.push_in_progress, "jobs", []), *jobs])

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        self.saving.load_modules(resume_from_checkpoint)

    def _load_best_model(self) -> None:
        read_whole(Path(str(self.state.best_model_checkpoint)))
        # transformers looks for adapters at the top of the folder only; peft keeps named ones one level below.
        if isinstance(self.model, PeftModel):
            logger.info("loading the best weights, %s", self.state.best_model_checkpoint)
            super()._load_from_checkpoint(self.state.best_model_checkpoint)
        else:
            super()._load_best_model()

    # What a finished run leaves

    def save_run(self, results: dict[str, Any], options: dict[str, Any] | None = None) -> list[Path]:
        """Write what a finished run leaves besides its weights, which the caller has saved, and push all if asked to.

        results: final figures, stored in metrics.json beside the log. options: further options for run.yaml.
        Returns the files written; none on other processes than the main one.
        """
        self.results = results
        ended = 0 < self.state.max_steps <= self.state.global_step
        finished = self.state.global_step if ended else None
        with self.saving.published("file-run", finished=finished) as staged:
            if self.args.should_save:
                artifacts.write_figures(staged, self.state.log_history, results)
                asked, resolved = self.options.asked, self.options.resolved
                artifacts.write_options(staged, asked, options or {}, resolved, self.found_by_trial())
                self._write_card(staged)
        written = self.saving.placed if self.args.should_save else []
        if self.args.push_to_hub:
            with artifacts.optional("upload of the finished run"):
                self.push_to_hub(commit_message="End of training")
        return written

    def found_by_trial(self) -> dict[str, Any]:
        """Option → what was found for it while the run was going on, for resolved.yaml."""
        return {}

    def create_model_card(self, model_name: str | None = None, **kwargs: Any) -> None:
        """Write the model card: settings, the figures in `results`, sources. `kwargs`: tags, as transformers passes."""
        if self.is_world_process_zero():  # transformers' push_to_hub calls it on this rank alone
            self.saving.publish_alone(
                "file-card", lambda staged: self._write_card(staged, model_name, kwargs.get("tags"))
            )

    def _write_card(self, folder: Path, name: str | None = None, tags: Any = None) -> None:
        with artifacts.optional(artifacts.CARD_FILE):
            artifacts.write_card(
                folder / artifacts.CARD_FILE,
                self.model,
                self.args,
                self.state,
                self.objective.facts(),
                self.results,
                name,
                tags,
            )
