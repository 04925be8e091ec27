"""transformers' training loop, which a signal ends in any of its phases without a trace in the run that is resumed.

phase              how it is left                                        what the resumed run does
before a step      none is taken, nothing is saved                       the same command starts again
a step             after it, with its checkpoint                         trains on
an evaluation      at its next batch, with the checkpoint of its step    repeats all of it, then trains on
after the last     before the best weights are loaded                    trains nothing, and ends as it would have

What is no signal (memory that runs out in the optimizer, a rank that stops) ends it without a checkpoint, see
`failures`; the resumed run starts from the last one.

A run that has no step left, because it is finished or a callback has stopped it, takes none; transformers' would.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, NoReturn

from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import Trainer, TrainerControl, TrainerState
from transformers.trainer_utils import TrainOutput

from fastdpo.training.memory.plan import get_rng_state, is_out_of_memory, set_rng_state
from fastdpo.training.runs.callbacks import EvaluationStopped, StopSignals, TrainingInterrupted
from fastdpo.training.runs.checkpoint import CheckpointError
from fastdpo.training.runs.failures import NamesStoppedRanks, optimizer_out_of_memory
from fastdpo.training.runs.saving import TRAINER_STATE_FILE

logger = logging.getLogger(__name__)


class InterruptibleTrainer(Trainer):
    """A Trainer whose `stop_signals` is also among its callbacks, after those that decide what is due."""

    stop_signals: StopSignals
    #: The checkpoint that this call of `train` has loaded.
    resumed_from: str | bool | None = None
    #: The step that this call of `train` starts after.
    first_step: int = -1
    # transformers' own, which have no types
    _tr_loss: Tensor
    control: TrainerControl
    optimizer: Any
    lr_scheduler: Any

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> TrainOutput:
        """As transformers', from a folder that exists.

        Raises TrainingInterrupted, OptimizerOutOfMemory, or RankStopped where another rank has ended.
        """
        self.resumed_from = resume_from_checkpoint or None
        ranks = self.stop_signals.ranks
        self.stop_signals.install()
        try:
            with NamesStoppedRanks(ranks, lambda: self.stop_signals.step, self.args.output_dir):
                return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)
        finally:
            self.stop_signals.restore()

    def has_begun(self) -> bool:
        """Whether a call of `train` has come to its first step."""
        return self.first_step >= 0

    def _has_trained(self) -> bool:
        """Whether this call of `train` has taken a step."""
        return self.state.global_step > self.first_step

    def _load_callback_state(self) -> None:
        """As transformers', which would warn of what is no callback's state."""
        kept = {StopSignals.OWED, StopSignals.BESIDE} & self.state.stateful_callbacks.keys()
        own = {name: self.state.stateful_callbacks.pop(name) for name in kept}
        super()._load_callback_state()
        self.state.stateful_callbacks |= own

    def _init_training_state(self, max_steps: int, *args: Any, **kwargs: Any) -> Any:
        """As transformers', which would go on at the intervals of logs, evaluations and saves of the checkpoint."""
        result = super()._init_training_state(max_steps, *args, **kwargs)
        self.state.compute_steps(self.args, max_steps)
        self.first_step = self.state.global_step
        if self.resumed_from:
            self.state.best_model_checkpoint = self._best_of(Path(str(self.resumed_from)))
        return result

    def _best_of(self, resumed_from: Path) -> str | None:
        """The best checkpoint so far, where it is now: its folder may have been moved, or copied, since."""
        saved = TrainerState.load_from_json(str(resumed_from / TRAINER_STATE_FILE)).best_model_checkpoint
        if saved is None:
            return None
        for folder in (Path(self.args.output_dir), resumed_from.parent):
            if (folder / Path(saved).name).is_dir():
                return str(folder / Path(saved).name)
        if self.args.load_best_model_at_end:
            raise CheckpointError(
                f"load_best_model_at_end: the best checkpoint so far is {Path(saved).name}, which lies neither in "
                f"output_dir={self.args.output_dir!r} nor beside {resumed_from}. Put it back, or set it False."
            )
        return None

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """As transformers', but the next step has the rate of this run's schedule, not of the one that was saved: they
        differ where more steps were asked for."""
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None and isinstance(self.lr_scheduler, LambdaLR):
            scheduler = self.lr_scheduler
            rates = zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
            for group, (base, factor) in zip(self.optimizer.param_groups, rates, strict=True):
                group["lr"] = base * factor(scheduler.last_epoch)
            scheduler._last_lr = [group["lr"] for group in self.optimizer.param_groups]  # what is logged

    def _run_epoch(self, **kwargs: Any) -> None:
        self._evaluate_what_is_owed(kwargs["trial"], kwargs["ignore_keys_for_eval"])
        # transformers' takes a step before it looks
        if self.state.global_step >= self.state.max_steps or self.stop_signals.agreed() is not None:
            self.control.should_training_stop = True
        if self.control.should_training_stop:
            return
        try:
            super()._run_epoch(**kwargs)
        except (RuntimeError, MemoryError) as error:
            if self.stop_signals.updating and is_out_of_memory(error):
                ranks, step = self.stop_signals.ranks, self.stop_signals.step
                raise optimizer_out_of_memory(ranks, step, self.args.output_dir, error) from error
            raise

    def _evaluate_what_is_owed(self, trial: Any, ignore_keys: list[str] | None) -> None:
        """Do what the run that is resumed was stopped before: the evaluation of its last step, with all that follows:
        the best metric, a checkpoint where one was due, a stop that a callback asks for."""
        if self.stop_signals.agreed() is not None or (save := self.stop_signals.pay(self.state)) is None:
            return
        self._load_rng_state(self.resumed_from)  # the checkpoint that may follow holds it
        self.control.should_evaluate, self.control.should_save = True, save
        self._maybe_log_save_evaluate(
            self._tr_loss, None, self.model_wrapped, trial, self.state.epoch or 0.0, ignore_keys, 0.0
        )

    def _maybe_log_save_evaluate(
        self, tr_loss: Tensor, grad_norm: Any, model: nn.Module, trial: Any, *args: Any, **kwargs: Any
    ) -> None:
        save = self.control.should_save
        try:
            super()._maybe_log_save_evaluate(tr_loss, grad_norm, model, trial, *args, **kwargs)
        except EvaluationStopped:
            # As before the evaluation: the first of several data sets has changed them
            self.control.should_evaluate, self.control.should_save = True, save
            self.stop_signals.stop(self.state, self.control)
            if self._has_trained():
                self._save_checkpoint(model, trial)
                self.control = self.callback_handler.on_save(self.args, self.state, self.control)

    def _evaluate(
        self, trial: Any, ignore_keys_for_eval: list[str] | None, skip_scheduler: bool = False
    ) -> dict[str, float]:
        at_start = skip_scheduler  # `eval_on_start`, of which transformers reads nothing
        if at_start and self.state.global_step > 0:
            return {}
        logged = len(self.state.log_history)
        try:
            return super()._evaluate(trial, ignore_keys_for_eval, skip_scheduler)
        except EvaluationStopped:
            del self.state.log_history[logged:]  # the first of several data sets
            if at_start:
                return {}
            raise

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """As transformers', but random states are left as they were: whether an evaluation was left, and is repeated
        when the run is resumed, must not show in the steps after it."""
        before = get_rng_state(self.args.device)
        try:
            return super().evaluation_loop(*args, **kwargs)
        finally:
            set_rng_state(self.args.device, before)

    def _finalize_training(self, trial: Any, num_train_samples: int, start_time: float) -> TrainOutput:
        self._evaluate_what_is_owed(trial, None)  # where no epoch is left to begin
        # Before the best weights are loaded and other checkpoints deleted: the step in flight must not be lost.
        if (signum := self.stop_signals.agreed()) is not None:
            self._interrupt(signum, trial)
        limit = self.args.save_total_limit
        self.args.save_total_limit = None  # by which transformers removes whatever has the name of a checkpoint
        try:
            result = super()._finalize_training(trial, num_train_samples, start_time)
        finally:
            self.args.save_total_limit = limit
        if self._has_trained():
            return result
        step, last = self.state.global_step, self.state.max_steps
        why = "this run is finished" if step >= last else "a callback has stopped this run"
        logger.warning("checkpoint at step %d of %d: %s, nothing is trained.", step, last, why)
        return TrainOutput(step, float("nan"), {})

    def _interrupt(self, signum: int, trial: Any) -> NoReturn:
        """Leave `train`, once the last step that it has taken is saved."""
        step = self.state.global_step
        if self._has_trained() and self.stop_signals.saved_step != step:
            self.stop_signals.stop(self.state, self.control)
            self._save_checkpoint(self.model_wrapped, trial)
        self.callback_handler.on_train_end(self.args, self.state, self.control)
        saved = str(Path(self._get_output_dir(trial)) / f"checkpoint-{step}") if self._has_trained() else None
        interruption = TrainingInterrupted(signum, step, saved)
        logger.warning("%s", interruption)
        raise interruption

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """No step, no loss of a training."""
        if "train_loss" not in logs or self._has_trained():
            super().log(logs, start_time)
