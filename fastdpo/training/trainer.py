"""`FastDPOTrainer`: transformers' Trainer as a shell. It builds the parts of a run and forwards its hooks to them.

One dataloader batch is one optimizer batch: `training_step` hands it to `fastdpo.training.step`, which scores, plans,
trains and sums, in micro-batches of its own. Evaluation gathers the scores of every example through transformers' loop
and computes loss and metrics once, over all of them: the figures depend neither on the evaluation batch nor on the
ranks, and no statistic is touched.
"""

from __future__ import annotations

import logging
import math
import os
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from datasets import Dataset
from peft import PeftConfig
from torch import Tensor
from transformers import (
    BitsAndBytesConfig,
    EvalPrediction,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
    set_seed,
)
from transformers.trainer_callback import ProgressCallback

from fastdpo.data import TokenizationReport
from fastdpo.loss.dynamic_beta import DynamicBeta
from fastdpo.ops.backends import resolve_backend
from fastdpo.shown import shown
from fastdpo.training.datasets import Tokenization
from fastdpo.training.models.limits import limits_of
from fastdpo.training.models.quantized import is_quantized
from fastdpo.training.models.setup import (
    adapter_files,
    check_optimizer,
    fold_accumulation,
    model_name,
    named_folder,
    prepare_models,
    resolve_tokenizer,
)
from fastdpo.training.models.sharded import reshard, use_on_cpus
from fastdpo.training.objectives import Objective, Plan, PreferenceObjective, refuse_unread_options
from fastdpo.training.options import FastDPOConfig
from fastdpo.training.options.best_metric import check_best_metric
from fastdpo.training.options.built import BuiltOptions
from fastdpo.training.parts import Parts
from fastdpo.training.rows import GlobalBatch
from fastdpo.training.rows.attention import prepare_deterministic
from fastdpo.training.runs.callbacks import (
    CommitStatistics,
    PrecomputeReference,
    PreferenceProgress,
    StopSignals,
)
from fastdpo.training.runs.identity import Identity, run_identity
from fastdpo.training.runs.nonfinite import (
    Evaluated,
    NonFiniteLossError,
    SkippedSteps,
    require_finite,
    stop_on_nonfinite,
)
from fastdpo.training.runs.saving_trainer import SavingTrainer
from fastdpo.training.runs.standstill import refuse_standstill
from fastdpo.training.scoring import Scores

__all__ = ["FastDPOTrainer", "NonFiniteLossError"]

logger = logging.getLogger(__name__)


class FastDPOTrainer(SavingTrainer):
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
        objective: what is optimised (`fastdpo.training.objectives`); default: the preference losses that `args` name.

    Raises:
        ValueError, TypeError, FileNotFoundError: an argument cannot be used; the message says what to do instead.
        NonFiniteLossError: in `train`, with the batch's example ids saved in the output folder.
        TrainingInterrupted: in `train`, after SIGTERM or SIGINT, once the last step is saved.
    """

    # transformers' own, which have no types
    optimizer: Any

    def __init__(
        self,
        model: str | os.PathLike[str] | PreTrainedModel,
        ref_model: str | os.PathLike[str] | PreTrainedModel | None = None,
        args: FastDPOConfig | None = None,
        train_dataset: Dataset | None = None,
        eval_dataset: Dataset | dict[str, Dataset] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        peft_config: PeftConfig | None = None,
        quantization_config: BitsAndBytesConfig | None = None,
        callbacks: Sequence[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (None, None),
        *,
        objective: Objective | None = None,
    ) -> None:
        if args is None:
            args = FastDPOConfig(output_dir=f"{model_name(model)}-FastDPO")
        elif not isinstance(args, FastDPOConfig):
            raise TypeError(f"args is a {type(args).__name__}; give a fastdpo.FastDPOConfig.")
        asked, args = args, args.resolved()
        if args.n_gpu > 1:
            raise ValueError(
                f"{args.n_gpu} GPUs are visible to one process. Start one process per GPU (torchrun, accelerate "
                "launch), or choose one with CUDA_VISIBLE_DEVICES."
            )
        resolve_backend(args.backend, args.device)
        if args.deterministic_attention:
            prepare_deterministic()
        set_seed(args.seed)  # fresh adapters are random
        model, ref_model = prepare_models(model, ref_model, args, quantization_config, peft_config)
        self.tokenizer = resolve_tokenizer(processing_class, model)
        check_optimizer(optimizers[0], model)
        self._given = optimizers
        folded = fold_accumulation(args)
        self.objective = PreferenceObjective(folded) if objective is None else objective
        refuse_unread_options(self.objective, folded)
        self.results = {}
        self.tokenize = Tokenization(self.objective, self.tokenizer, args, limits_of(model, ref_model))
        super().__init__(
            model=model,
            args=folded,
            data_collator=self.objective.collator,
            train_dataset=self.tokenize(train_dataset, "train"),
            eval_dataset=self.tokenize.each(eval_dataset, "eval"),
            processing_class=self.tokenizer,
            compute_metrics=self.evaluation_metrics,
            callbacks=list(callbacks or []),
            optimizers=optimizers,
        )
        self.options = BuiltOptions(asked, args, self.args)
        if self.eval_dataset is not None:
            sets = self.eval_dataset if isinstance(self.eval_dataset, dict) else None
            check_best_metric(self.args.metric_for_best_model, self.objective.evaluated, sets)
        if self.is_deepspeed_enabled:
            raise ValueError("DeepSpeed is not supported; shard with FSDP2 (fsdp=True), or launch with torchrun.")
        if ref_model is not None and not is_quantized(ref_model) and not self.is_fsdp_enabled:
            self._move_model_to_device(ref_model, self.args.device)
        self.parts = Parts.build(
            self.model,
            ref_model,
            self.tokenizer,
            self.args,
            self.objective,
            self.accelerator,
            sharded=self.is_fsdp_enabled,
        )
        self.saving, self.references = self.parts.checkpoints, self.parts.references
        self.saving.protect(
            {
                "model": named_folder(model),
                "ref_model": named_folder(ref_model),
                "processing_class": named_folder(self.tokenizer),
            },
            needed=adapter_files(self.model),
        )
        self.model.add_model_tags(list(self.objective.facts().tags))
        self._pending_plan: Plan | None = None
        self._skips = SkippedSteps()
        self._predicting = False
        self._step_metrics: dict[str, list[float]] = defaultdict(list)
        self._parameter_count = self.model.num_parameters(exclude_embeddings=True)
        self.stop_signals = StopSignals(self.parts.ranks)
        self.add_callback(self.stop_signals)
        self.add_callback(CommitStatistics(self.commit_plan))
        self.add_callback(PrecomputeReference(self.precompute_reference))
        if not self.args.disable_tqdm:
            self.remove_callback(ProgressCallback)
            self.add_callback(PreferenceProgress())

    @property
    def tokenization(self) -> dict[str, TokenizationReport]:
        """Data set → what tokenisation kept, dropped and cut."""
        return self.tokenize.reports

    @property
    def dynamic_beta(self) -> DynamicBeta | None:
        """The running statistics of β, where the objective has them."""
        return getattr(self.objective, "dynamic_beta", None)

    # Data

    def _set_signature_columns_if_needed(self) -> None:
        self._signature_columns = self.objective.columns

    def _get_dataloader(self, *args: Any, **kwargs: Any) -> Any:
        """As transformers', but batches stay on the host, where rows are made of them."""
        own, self.accelerator.device_placement = self.accelerator.device_placement, False
        try:
            return super()._get_dataloader(*args, **kwargs)
        finally:
            self.accelerator.device_placement = own

    # Training

    def training_step(
        self, model: PreTrainedModel, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """One optimizer batch of examples: gradients, and the loss over all ranks' examples, which is returned."""
        self._refuse_another_model()
        model.train()
        if hasattr(self.optimizer, "train") and callable(self.optimizer.train):
            self.optimizer.train()
        batch = self.objective.batch(inputs, self.args.device)
        window = GlobalBatch(len(batch), self.parts.ranks, self._real_examples(len(batch)))
        self.parts.passes.settle(batch)
        self.parts.trial.settle(self.train_dataset)
        result = self.parts.step(batch, window)
        figures = self.parts.step.read(result, batch, with_norm=self.accelerator.scaler is None)
        if not figures.finite:
            stop_on_nonfinite(
                self.saving.folder, self.parts.ranks, self.state.global_step + 1, figures.loss_value,
                figures.grad_norm, self.objective.named(result.everyone), batch.example_ids,
            )  # fmt: skip
        for name, value in figures.metrics.items():
            self._step_metrics[name].append(value)
        self._pending_plan = result.plan
        self._empty_cache_if_due()
        return figures.loss

    def _refuse_another_model(self) -> None:
        if self.model is not self.parts.passes.model:
            raise RuntimeError(
                "trainer.model was replaced after the trainer was built, whose parts and reference belong to the model "
                "that it was given. Build a new FastDPOTrainer with this model."
            )

    def _real_examples(self, size: int) -> int:
        """Examples of the global batch that are no wrapped duplicates; the dataloader fills up the epoch's last one."""
        total = size * self.args.world_size
        if self.args.dataloader_drop_last or not self.accelerator.gradient_state.end_of_dataloader:
            return total
        # Not accelerate's own remainder: a dataloader that skips batches on resume does not know it.
        last = len(self.train_dataset) % (self.args.train_batch_size * self.args.world_size)
        return last or total

    def discard_step(self) -> None:
        """Forget a training step that no optimizer step follows: its gradients, its plan and its metrics."""
        self.model.zero_grad()
        self._pending_plan = None
        self._step_metrics.clear()

    def commit_plan(self) -> None:
        """Commit what the last planned batch has taught; called once its optimizer step was taken."""
        skipped = self.accelerator.optimizer_step_was_skipped
        if self._pending_plan is not None and not skipped:
            self.objective.commit(self._pending_plan)
        self._pending_plan = None
        self._skips.count(skipped)

    def precompute_reference(self) -> None:
        """With reference="precompute", compute what is missing of the training set's reference log-probs."""
        if self.args.reference == "precompute" and self.parts.references.keeps:
            self.parts.references.fill(
                self.train_dataset,
                lambda rows: self.parts.batch_scores.keep_reference(self.objective.batch_of(rows, self.args.device)),
                lambda: self.stop_signals.agreed() is not None,
            )

    def _empty_cache_if_due(self) -> None:
        every = self.args.torch_empty_cache_steps
        if every is not None and self.state.global_step % every == 0 and torch.cuda.is_available():
            torch.cuda.empty_cache()

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:
        """As transformers' train, with exact resume. Default: `args.resume_from_checkpoint`.

        Raises OptionError for an option that was changed in `args` and is bound since the trainer was built, ValueError
        where nothing could be trained, CheckpointError (an unusable output folder or checkpoint), NonFiniteLossError,
        TrainingInterrupted, or, from `runs.failures`, OptimizerOutOfMemory and RankStopped.
        """
        self.options.check()
        refuse_standstill(self.args, self.model, self.train_dataset, self._given)
        if not self.is_fsdp_enabled:  # where `shard` does it
            self.create_optimizer()  # before the folder is taken: its options may be refused
        saving, self._skips = self.saving, SkippedSteps()
        with saving.held():
            resume = saving.claim(resume_from_checkpoint, self._identity())
            self.references.load(resume)
            result = super().train(resume_from_checkpoint=resume, **kwargs)
            saving.rotate(self.state.best_model_checkpoint)  # a kill may have come before it did
            self.references.save()
            self.refuse_nonfinite_weights(self.parts.ranks)
            self._skips.finish()
        return result

    def _identity(self) -> Identity:
        """What the result of the run depends on."""
        return run_identity(
            self.args,
            self.model,
            self.tokenizer,
            self.parts.reference,
            self.parts.settings,
            self.objective.fixed_options(),
            train=self.train_dataset,
            evaluation=self.eval_dataset,
            columns=[name for name in self.objective.columns if name != "example_id"],
            given=self._given,
        )

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """As transformers', with errors that name the options."""
        try:
            return super().create_optimizer(*args, **kwargs)
        except (ValueError, TypeError) as error:
            raise ValueError(
                f"optim={str(getattr(self.args.optim, 'value', self.args.optim))!r} cannot be made with optim_args="
                f"{self.args.optim_args!r}, optim_target_modules={self.args.optim_target_modules!r}: {shown(error)}. "
                "Give optim_args as name=value,name=value, with names that the optimizer takes."
            ) from error

    # FSDP

    def create_accelerator_and_postprocess(self) -> None:
        """As transformers', and where FSDP is asked for on CPUs it is used: accelerate drops the plugin there."""
        super().create_accelerator_and_postprocess()
        if not self.is_fsdp_enabled and use_on_cpus(self.accelerator, self.args.fsdp_plugin_args):
            self.is_fsdp_enabled = True

    def shard(self) -> None:
        """Shard model and reference over ranks, once; training and evaluation call it before their first forward."""
        if self.parts.sharding.is_due(self.model):
            self.create_optimizer()
            self.optimizer = self.parts.sharding.shard(self.model, self.optimizer)
            self.model_wrapped = self.model
            self.parts.reference.shard(self.parts.sharding)
            self.parts.sharding.settle_dtypes(self.model)

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: Any) -> Any:
        self.shard()
        reshard(self.model)  # accelerate looks for the optimizer's parameters in the model once more
        return super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)

    # Evaluation

    def evaluation_loop(self, dataloader: Any, description: str, *args: Any, **kwargs: Any) -> Any:
        """As InterruptibleTrainer's, on the sharded model.

        Raises NonFiniteLossError where a score or the loss is not finite; a prediction warns of it.
        """
        self.shard()
        found = super().evaluation_loop(dataloader, description, *args, **kwargs)
        scores = Scores.unstack(torch.as_tensor(found.predictions), self.objective.completions)
        name = kwargs.get("metric_key_prefix", "eval")
        loss = found.metrics[f"{name}_loss"]
        losses = None if math.isfinite(loss) else getattr(self.objective.evaluation_loss(scores), "losses", None)
        everything = self.objective.named(scores), losses, dataloader.dataset["example_id"]
        require_finite(
            Evaluated(f"{name}_dataset", loss, *everything), self.saving.folder, self.parts.ranks,
            self.state.global_step, only_warn=self._predicting,
        )  # fmt: skip
        return found

    def prediction_step(
        self,
        model: PreTrainedModel,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[None, Tensor, Tensor]:
        """No loss yet, the scores of the examples (`Scores.stack`), and a placeholder for labels (B,)."""
        self._refuse_another_model()
        self.stop_signals.leave_evaluation()
        batch = self.objective.batch(inputs, self.args.device)
        return None, self.parts.batch_scores.evaluated(batch), batch.lengths()[0]

    def evaluation_metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        """Loss and metrics over all evaluation examples, from their gathered scores."""
        scores = Scores.unstack(torch.as_tensor(prediction.predictions), self.objective.completions)
        output = self.objective.evaluation_loss(scores)
        metrics = self.objective.metrics(scores, output)
        return {"loss": float(output.loss), **{name: float(value) for name, value in metrics.items()}}

    def evaluate(
        self,
        eval_dataset: Dataset | dict[str, Dataset] | str | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Loss and metrics over whole data sets (default: `eval_dataset`), at β0, without touching any statistic."""
        if isinstance(eval_dataset, (Dataset, dict)):
            eval_dataset = self.tokenize.each(eval_dataset, metric_key_prefix)
        return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)

    def predict(
        self, test_dataset: Dataset, ignore_keys: list[str] | None = None, metric_key_prefix: str = "test"
    ) -> Any:
        """Scores of every example as `predictions`, with their metrics; of pairs (N, 8), in the order of `PairScores`'
        fields. Scores that are not finite are returned, with a warning that names the examples."""
        self._predicting = True
        try:
            found = super().predict(self.tokenize(test_dataset, metric_key_prefix), ignore_keys, metric_key_prefix)
        finally:
            self._predicting = False
        scores = Scores.unstack(torch.as_tensor(found.predictions), self.objective.completions)
        columns = torch.stack(list(self.objective.named(scores).values()), dim=1)
        return found._replace(predictions=columns.numpy())

    def found_by_trial(self) -> dict[str, Any]:
        """What the memory plan has come to."""
        memory = self.parts.memory
        return {"micro_batch_tokens": memory.train_tokens, "gradient_checkpointing": memory.checkpointing}

    # Logging

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the metrics of the steps since the last log, averaged."""
        if "loss" in logs and self._step_metrics:
            logs |= {name: sum(values) / len(values) for name, values in self._step_metrics.items()}
            self._step_metrics.clear()
        super().log(logs, start_time)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """6 × parameters × tokens, transformers' convention, over the sequences of every example."""
        return 6 * self._parameter_count * self._tokens(inputs)

    def _track_num_input_tokens(self, inputs: dict[str, Any]) -> None:
        if self.args.include_num_input_tokens_seen != "no":
            tokens = torch.tensor(self._tokens(inputs), device=self.args.device)
            self.state.num_input_tokens_seen += int(self.accelerator.gather(tokens).sum())

    def _tokens(self, inputs: dict[str, Any]) -> int:
        return self.objective.batch(inputs, self.args.device).sequence_tokens()
