"""Callbacks of a run: stop signals, what follows the optimizer's step and precedes the first one, the progress bar."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

from transformers import TrainerCallback, TrainerControl, TrainerState
from transformers.trainer_callback import ProgressCallback
from transformers.trainer_utils import SaveStrategy

from fastdpo.training.options import FastDPOConfig
from fastdpo.training.ranks import Ranks

if TYPE_CHECKING:
    from types import FrameType

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class TrainingInterrupted(SystemExit):
    """Raised out of `train()` after a stop signal. The exit code is 128 + the signal.

    step: the last one that was trained. checkpoint: where it is saved; None where this call of `train` has taken no
    step, so that what it started from is what there is.
    """

    def __init__(self, signum: int, step: int, checkpoint: str | None) -> None:
        super().__init__(128 + signum)
        self.signum, self.step, self.checkpoint = signum, step, checkpoint

    def __str__(self) -> str:
        name = signal.Signals(self.signum).name
        if self.checkpoint is None:
            return f"{name}: stopped before step {self.step + 1}, nothing is trained. Start the same command again."
        return f"{name}: saved {self.checkpoint}. Continue with --resume_from_checkpoint last."


class EvaluationStopped(Exception):
    """Raised out of an evaluation within `train()`, on all ranks, once a stop signal was received."""


class StopSignals(TrainerCallback):
    """SIGTERM and SIGINT end training after the step in flight, with a checkpoint. A second signal acts at once.

    `ranks` agree on the step to stop at: any rank's signal stops all of them.

    Whoever stops a run may not wait for an evaluation. One that is due then is owed: the checkpoint says so (`OWED`),
    and the run that is resumed from it evaluates first. A checkpoint that is written for a stop alone is never the best
    one (`BESIDE`): the undisturbed run has none there.

    Attributes:
        received: the signal.
        training: whether a `train()` is running, whose evaluations are left.
        step: that is in flight, until the next one begins.
        updating: whether the optimizer is at work on the weights.
        saved_step: of the last checkpoint in this call of `train()`.
    """

    #: Key in `TrainerState.stateful_callbacks` → {"save": whether a checkpoint was due after the evaluation owed}.
    OWED = "fastdpo.EvaluationOwed"
    #: The same → {"steps": of checkpoints that the run's strategy had not asked for}.
    BESIDE = "fastdpo.SavedForAStop"

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks
        self.received: int | None = None
        self.training = False
        self.step = 1
        self.updating = False
        self.saved_step: int | None = None
        self._stopped = self._cut_short = False
        self._previous: dict[int, Any] = {}

    def install(self) -> None:
        """Take over the signals; only the main thread may, elsewhere they keep their handlers."""
        self.received, self.saved_step, self._stopped, self._cut_short = None, None, False, False
        self.training, self.updating, self.step = True, False, 1
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._handle) for number in STOP_SIGNALS}

    def restore(self) -> None:
        """Give the signals back to the handlers that had them."""
        self.training = False
        self._give_back()

    def _give_back(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}

    def _handle(self, number: int, _: FrameType | None) -> None:
        self.received = number
        self._give_back()

    def agreed(self) -> int | None:
        """The signal that any rank has received; every rank calls this at the same place."""
        self.received = self.ranks.largest(self.received or 0) or None
        return self.received

    def leave_evaluation(self) -> None:
        """Raise EvaluationStopped where a signal was received in training; all ranks call it at each batch."""
        if self.training and self.agreed() is not None:
            raise EvaluationStopped

    def stop(self, state: TrainerState, control: TrainerControl) -> None:
        """End training here, with a checkpoint; an evaluation that is due is owed."""
        self._cut_short |= not control.should_training_stop
        owed = state.stateful_callbacks.get(self.OWED)
        if control.should_evaluate or owed is not None:
            state.stateful_callbacks[self.OWED] = {"save": control.should_save or (owed is not None and owed["save"])}
        beside = {*state.stateful_callbacks.get(self.BESIDE, {}).get("steps", ())}
        if control.should_save:
            beside.discard(state.global_step)
        elif not self._stopped and self.saved_step != state.global_step:
            beside.add(state.global_step)
        self._stopped = True
        state.stateful_callbacks[self.BESIDE] = {"steps": sorted(beside)}
        control.should_evaluate, control.should_save, control.should_training_stop = False, True, True

    def pay(self, state: TrainerState) -> bool | None:
        """Take the evaluation that is owed off `state`. Returns whether a checkpoint is due after it; None: none is
        owed."""
        owed = state.stateful_callbacks.pop(self.OWED, None)
        return None if owed is None else bool(owed["save"])

    def may_be_best(self, args: FastDPOConfig, state: TrainerState) -> bool:
        """Whether the undisturbed run has a checkpoint of the best step; with save_strategy="best" always."""
        beside = state.stateful_callbacks.get(self.BESIDE, {}).get("steps", ())
        return args.save_strategy == SaveStrategy.BEST or state.best_global_step not in beside

    def on_train_begin(self, args: FastDPOConfig, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.step = state.global_step + 1

    on_step_begin = on_train_begin

    def on_pre_optimizer_step(
        self, args: FastDPOConfig, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self.updating = True

    def on_optimizer_step(self, args: FastDPOConfig, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.updating = False

    def on_step_end(
        self, args: FastDPOConfig, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        if self.agreed() is not None:
            self.stop(state, control)
        return control

    def on_epoch_end(
        self, args: FastDPOConfig, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        if self.agreed() is not None:
            inside = state.epoch is not None and state.epoch != int(state.epoch)
            if self._cut_short and inside:  # the epoch has not ended, so nothing of its end is due
                control.should_log = control.should_evaluate = control.should_save = False
            else:
                self.stop(state, control)
        return control

    def on_evaluate(
        self, args: FastDPOConfig, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        if self.training and self.agreed() is not None:
            self.stop(state, control)
        return control

    def on_save(self, args: FastDPOConfig, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.saved_step = state.global_step


class CommitStatistics(TrainerCallback):
    """Calls `commit` once the optimizer has stepped: what a plan has learnt of its batch counts from then on."""

    def __init__(self, commit: Callable[[], None]) -> None:
        self.commit = commit

    def on_optimizer_step(
        self, args: FastDPOConfig, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.commit()


class PrecomputeReference(TrainerCallback):
    """Calls `fill` ahead of training, once the model is in place and a checkpoint is loaded."""

    def __init__(self, fill: Callable[[], None]) -> None:
        self.fill = fill

    def on_train_begin(self, args: FastDPOConfig, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.fill()


class PreferenceProgress(ProgressCallback):
    """transformers' progress bar, with the figures of preference training beside it in place of printed dicts."""

    #: metric → label and format in the bar
    FIGURES: ClassVar = {
        "loss": ("loss", "{:.4f}"),
        "beta/value": ("β", "{:.3f}"),
        "beta/kept": ("kept", "{:.0%}"),
        "rewards/accuracies": ("acc", "{:.0%}"),
        "rewards/margins": ("margin", "{:+.3f}"),
    }

    def on_log(
        self,
        args: FastDPOConfig,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if self.training_bar is None or not logs:
            return
        if any(key.startswith("eval_") for key in logs):
            self.training_bar.write(describe_evaluation(logs, state.global_step))
        elif "loss" in logs:
            shown = {label: fmt.format(logs[key]) for key, (label, fmt) in self.FIGURES.items() if key in logs}
            self.training_bar.set_postfix(shown, refresh=True)


def describe_evaluation(logs: dict[str, Any], step: int) -> str:
    """One line of an evaluation's figures."""
    accuracy, margin = logs.get("eval_rewards/accuracies"), logs.get("eval_rewards/margins")
    if accuracy is None or margin is None:
        return f"step {step}: " + ", ".join(f"{key} {value:.4g}" for key, value in logs.items() if key != "epoch")
    return f"step {step}: evaluation loss {logs['eval_loss']:.4f}, accuracy {accuracy:.1%}, margin {margin:+.3f}"
