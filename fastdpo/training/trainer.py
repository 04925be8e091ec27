"""`FastDPOTrainer`: transformers' Trainer with the batch of pairs as the unit of an optimizer step.

One dataloader batch is one optimizer batch. `training_step` cuts it into micro-batches itself:
1. the reference scores the pairs whose log-probs under it are not known yet;
2. where the loss couples the pairs (dynamic β, the filter, sorted losses), the policy scores all pairs too: those of
   one micro-batch with their graph kept, the others without gradients; the scores of all ranks are gathered, and β,
   the filter and c = dL/dlogp of every pair follow from the whole batch;
3. the kept pairs are trained on by backpropagating Σ stop_grad(c)·logp, micro-batch by micro-batch;
4. gradients are summed over ranks once.
The update therefore depends neither on the cut nor on the number of ranks, and a step that runs out of memory is
repeated with a finer cut.

The host waits for the device twice: for the pairs that a plan keeps, where there is one, and for the loss at the end,
with which new reference log-probs come. All else that says what to launch is the host's own. Several ranks also wait
where they have to agree: on memory that ran out, on dropout with coupled pairs, and with FSDP on the number of passes.
With one row per answer, transformers looks in each forward whether rows hold several sequences, which waits too.
"""

from __future__ import annotations

import logging
import math
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftConfig
from torch import Tensor
from transformers import (
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    set_seed,
)
from transformers.trainer_callback import ProgressCallback

from fastdpo.data import PreferenceCollator
from fastdpo.formulas.oracle import BetaPlan
from fastdpo.ops.backends import resolve_backend
from fastdpo.training.memory.plan import MemoryPlan
from fastdpo.training.memory.trial import MemoryTrialMixin
from fastdpo.training.models.loading import disable_dropout, keep_quantized_layers_trainable
from fastdpo.training.models.setup import (
    check_models,
    check_offloading,
    fold_accumulation,
    is_quantized,
    model_name,
    resolve_model,
    resolve_tokenizer,
    with_adapter,
)
from fastdpo.training.models.sharded import gradient_norm
from fastdpo.training.objective import Objective
from fastdpo.training.options.config import FastDPOConfig
from fastdpo.training.reference.cache import ReferenceCache
from fastdpo.training.reference.fingerprint import reference_identity
from fastdpo.training.reference.policy import ReferencePolicy
from fastdpo.training.reference.store import ReferenceStoreMixin
from fastdpo.training.rows.attention import deterministic, prepare_deterministic
from fastdpo.training.rows.batch import PairFeatures, TokenBatch
from fastdpo.training.rows.choice import LayoutChoice
from fastdpo.training.rows.global_batch import GlobalBatch
from fastdpo.training.runs.artifacts import CARD_FILE, write_card
from fastdpo.training.runs.callbacks import (
    CommitStatistics,
    PrecomputeReference,
    PreferenceProgress,
    StopSignals,
    TrainingInterrupted,
)
from fastdpo.training.runs.nonfinite import NonFiniteLossError, stop_on_nonfinite
from fastdpo.training.runs.saving import CheckpointMixin
from fastdpo.training.scoring.scorer import CompletionScorer
from fastdpo.training.step import GradientsMixin, StepScores

__all__ = ["FastDPOTrainer", "NonFiniteLossError"]

logger = logging.getLogger(__name__)

#: Columns of a tokenised data set; `remove_unused_columns` keeps these.
PAIR_COLUMNS = ["prompt_ids", "chosen_ids", "rejected_ids", "example_id"]


class FastDPOTrainer(CheckpointMixin, ReferenceStoreMixin, MemoryTrialMixin, GradientsMixin, Trainer):
    """Preference optimisation of a causal LM, called as TRL's DPOTrainer is.

    Args:
        model: a causal LM of transformers, a PEFT model around one, or a local path or hub name to load.
        ref_model: a separate reference; default: the model as it is when the trainer is built.
        args: `FastDPOConfig`.
        train_dataset, eval_dataset: pairs in any format that `fastdpo.data` reads, or tokenised by it; `eval_dataset`
            may be a dict of data sets.
        processing_class: the tokenizer; default: the model's own.
        peft_config: a fresh adapter to train; None trains an existing adapter or, without one, every weight.
        quantization_config: for a `model` given by name.
        callbacks, optimizers: as in transformers.

    Raises:
        ValueError, TypeError, FileNotFoundError: an argument cannot be used; the message says what to do instead.
        NonFiniteLossError: in `train`, with the batch's example ids saved in the output folder.
        TrainingInterrupted: in `train`, after SIGTERM or SIGINT, once a checkpoint is saved.
    """

    _tag_names = ("fastdpo", "dpo")

    def __init__(
        self,
        model: str | PreTrainedModel,
        ref_model: str | PreTrainedModel | None = None,
        args: FastDPOConfig | None = None,
        train_dataset: Dataset | None = None,
        eval_dataset: Dataset | dict[str, Dataset] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        peft_config: PeftConfig | None = None,
        quantization_config: BitsAndBytesConfig | None = None,
        callbacks: Sequence[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (None, None),
    ) -> None:
        if args is None:
            args = FastDPOConfig(output_dir=f"{model_name(model)}-FastDPO")
        elif not isinstance(args, FastDPOConfig):
            raise TypeError(f"args is a {type(args).__name__}; give a fastdpo.FastDPOConfig.")
        if args.n_gpu > 1:
            raise ValueError(
                f"{args.n_gpu} GPUs are visible to one process. Start one process per GPU (torchrun, accelerate "
                "launch), or choose one with CUDA_VISIBLE_DEVICES."
            )
        resolve_backend(args.backend, args.device)
        if args.deterministic_attention:
            prepare_deterministic()
        set_seed(args.seed)  # fresh adapters are random
        model = resolve_model(model, args, quantization_config, "model")
        ref_model = None if ref_model is None else resolve_model(ref_model, args, quantization_config, "ref_model")
        check_models(model, ref_model, args)
        model = with_adapter(model, peft_config)
        for each in (model, ref_model):
            if each is not None:
                keep_quantized_layers_trainable(each)
                if args.disable_dropout and (lost := disable_dropout(each)) and peft_config is not None:
                    logger.warning("disable_dropout=True switches off a dropout of %s. Set it False to keep it.", lost)
        check_offloading(args)
        self.config, self.tokenizer, self.tokenization = args, resolve_tokenizer(processing_class, model), {}
        #: Final figures, for the model card.
        self.results: dict[str, Any] = {}
        folded = fold_accumulation(args)
        super().__init__(
            model=model,
            args=folded,
            data_collator=PreferenceCollator(),
            train_dataset=self.tokenize(train_dataset, "train"),
            eval_dataset=self.tokenize_each(eval_dataset, "eval"),
            processing_class=self.tokenizer,
            compute_metrics=self.evaluation_metrics,
            callbacks=list(callbacks or []),
            optimizers=optimizers,
        )
        self.check_sharding()
        self.model.add_model_tags(list(self._tag_names))
        if ref_model is not None and not is_quantized(ref_model) and not self.is_fsdp_enabled:
            self._move_model_to_device(ref_model, folded.device)
        self.reference = ReferencePolicy(self.model, ref_model)
        if self.is_fsdp_enabled:
            self.reference.agree_on_fingerprint()
        self.objective = Objective(folded)
        self.scorer = CompletionScorer(
            folded.ld_alpha, folded.use_weighting, folded.backend, folded.head_workspace_bytes
        )
        self.memory = MemoryPlan(folded, self.model, repeats=not self.is_fsdp_enabled)
        models = [self.model] if ref_model is None else [self.model, ref_model]
        self.layouts = LayoutChoice(folded, self.scorer, models)
        kept = folded.reference != "online" and self.objective.needs_reference
        self.reference_cache = ReferenceCache(
            reference_identity(self.reference, self.tokenizer, folded) if kept else {}
        )
        self.dynamic_beta = folded.make_dynamic_beta().to(folded.device) if folded.dynamic_beta else None
        self._pending_plan: BetaPlan | None = None
        self._step_metrics: dict[str, list[float]] = defaultdict(list)
        self._parameter_count = self.model.num_parameters(exclude_embeddings=True)

        self.stop_signals = StopSignals()
        self.add_callback(self.stop_signals)
        self.add_callback(CommitStatistics(self))
        self.add_callback(PrecomputeReference(self))
        if not folded.disable_tqdm:
            self.remove_callback(ProgressCallback)
            self.add_callback(PreferenceProgress())

    def _set_signature_columns_if_needed(self) -> None:
        self._signature_columns = PAIR_COLUMNS

    # Training

    def training_step(
        self, model: PreTrainedModel, inputs: PairFeatures, num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """One optimizer batch of pairs: plan, micro-batches, gradients. Returns the loss over all ranks' pairs."""
        model.train()
        if hasattr(self.optimizer, "train") and callable(self.optimizer.train):
            self.optimizer.train()
        batch = TokenBatch(inputs, self.args.device)
        window = GlobalBatch(batch, self.args.process_index, self.args.world_size, self._real_pairs(len(batch)))
        self.layouts.settle(batch, self.accelerator.autocast)
        self.settle_memory()
        with self.layouts.active(), deterministic(self.args.deterministic_attention):
            step = self.step_gradients(batch, window)
        self.sum_gradients()
        loss = self._record(step, batch)
        self._pending_plan = step.plan
        self._empty_cache_if_due()
        return loss

    def _real_pairs(self, size: int) -> int:
        """Pairs of the global batch that are no wrapped duplicates; the dataloader fills up the epoch's last batch."""
        total = size * self.args.world_size
        if self.args.dataloader_drop_last or not self.accelerator.gradient_state.end_of_dataloader:
            return total
        # Not accelerate's own remainder: a dataloader that skips batches on resume does not know it.
        last = len(self.train_dataset) % (self.args.train_batch_size * self.args.world_size)
        return last or total

    @torch.no_grad()
    def _record(self, step: StepScores, batch: TokenBatch) -> Tensor:
        """The step's one look at its numbers: keep new reference log-probs, refuse what is not finite, keep the
        metrics, return the loss."""
        output = self.objective.loss(step.everyone, step.plan) if step.output is None else step.output
        metrics = self.objective.metrics(step.everyone, output, step.plan)
        grads = [p.grad for p in self.policy().parameters() if p.grad is not None]
        # With fp16 a loss scaler looks for infinite gradients itself and skips the step.
        grad_norm = torch.zeros_like(output.loss)
        if self.accelerator.scaler is None and grads:
            grad_norm = gradient_norm(grads)
        numbers = torch.stack([output.loss, grad_norm.to(output.loss), *metrics.values()])
        references = step.scores.reference()
        read = torch.cat([numbers, references.flatten().to(numbers)]).cpu()  # all that the host wants to know, at once
        self.keep_reference(batch, read[len(numbers) :].view_as(references), list(step.new_references))
        self.share_reference()
        loss, norm, *values = read[: len(numbers)].tolist()
        if not (math.isfinite(loss) and math.isfinite(norm)):
            stop_on_nonfinite(self.args, self.state.global_step + 1, loss, norm, step.everyone, batch.example_ids)
        for name, value in zip(metrics, values, strict=True):
            self._step_metrics[name].append(value)
        return output.loss.detach()

    def discard_step(self) -> None:
        """Forget a training step that no optimizer step follows: its gradients, its plan and its metrics."""
        self.model.zero_grad()
        self._pending_plan = None
        self._step_metrics.clear()

    def commit_plan(self) -> None:
        """Commit the statistics of the last planned batch; called once its optimizer step was taken."""
        if self.dynamic_beta is not None and self._pending_plan is not None:
            if not self.accelerator.optimizer_step_was_skipped:
                self.dynamic_beta.commit(self._pending_plan)
            self._pending_plan = None

    def _empty_cache_if_due(self) -> None:
        every = self.args.torch_empty_cache_steps
        if every is not None and self.state.global_step % every == 0 and torch.cuda.is_available():
            torch.cuda.empty_cache()

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:
        """As transformers' train, with exact resume. Default: `args.resume_from_checkpoint`.

        Raises CheckpointError (an unusable output folder or checkpoint), NonFiniteLossError or TrainingInterrupted.
        """
        resume = self.prepare_output_dir(resume_from_checkpoint)
        self.load_reference()
        self.stop_signals.install()
        try:
            result = super().train(resume_from_checkpoint=resume, **kwargs)
        finally:
            self.stop_signals.restore()
        self.save_reference()
        return result

    def _finalize_training(self, trial: Any, num_train_samples: int, start_time: float) -> Any:
        # Before the best weights are loaded and other checkpoints deleted: the step in flight must not be lost.
        if (signum := self.stop_signals.agreed(self.args)) is not None:
            folder = Path(self._get_output_dir(trial)) / f"checkpoint-{self.state.global_step}"
            if not folder.is_dir():
                self._save_checkpoint(self.model_wrapped, trial)
            self.callback_handler.on_train_end(self.args, self.state, self.control)
            interruption = TrainingInterrupted(signum, str(folder))
            logger.warning("%s", interruption)
            raise interruption
        return super()._finalize_training(trial, num_train_samples, start_time)

    # Logging

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the metrics of the steps since the last log, averaged."""
        if "loss" in logs and self._step_metrics:
            logs |= {name: sum(values) / len(values) for name, values in self._step_metrics.items()}
            self._step_metrics.clear()
        super().log(logs, start_time)

    def create_model_card(self, model_name: str | None = None, **kwargs: Any) -> None:
        """Write the model card: settings, the figures in `results`, sources. `kwargs`: tags, as transformers passes."""
        if self.is_world_process_zero():
            write_card(self, self.results, Path(self.args.output_dir) / CARD_FILE, model_name, kwargs.get("tags"))

    def floating_point_ops(self, inputs: PairFeatures) -> int:
        """6 × parameters × tokens, transformers' convention, over both rows of every pair."""
        return 6 * self._parameter_count * _tokens(inputs)

    def _track_num_input_tokens(self, inputs: PairFeatures) -> None:
        if self.args.include_num_input_tokens_seen != "no":
            tokens = torch.tensor(_tokens(inputs), device=self.args.device)
            self.state.num_input_tokens_seen += int(self.accelerator.gather(tokens).sum())


def _tokens(inputs: PairFeatures) -> int:
    return sum(
        2 * len(prompt) + len(chosen) + len(rejected)
        for prompt, chosen, rejected in zip(
            inputs["pair_prompt_ids"], inputs["pair_chosen_ids"], inputs["pair_rejected_ids"], strict=True
        )
    )
