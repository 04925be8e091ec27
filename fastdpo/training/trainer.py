"""`FastDPOTrainer`: transformers' Trainer as a shell around parts that are given to one another.

One dataloader batch is one optimizer batch: `training_step` hands it to `fastdpo.training.step`, which scores, plans,
trains and sums, in micro-batches of its own:
1. the reference scores the examples whose log-probs under it are not known yet;
2. where the loss couples the examples (dynamic β, the filter, sorted losses), the policy scores all of them too, and β,
   the filter and c = dL/dlogp of every example follow from the whole batch of all ranks;
3. the kept examples are trained on by backpropagating Σ stop_grad(c)·logp, micro-batch by micro-batch;
4. gradients are summed over ranks once.
The update therefore depends neither on the cut nor on the number of ranks, and a step that runs out of memory is
repeated with a finer cut.

The host waits for the device twice: for the examples that a plan keeps, where there is one, and for the loss at the
end, with which new reference log-probs come. All else that says what to launch is the host's own. Several ranks also
wait where they have to agree: on memory that ran out, on dropout with coupled examples, and with FSDP on the number of
passes. With one row per answer, transformers looks in each forward whether rows hold several sequences, which waits
too.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from peft import PeftConfig, PeftModel
from torch import Tensor
from transformers import (
    BitsAndBytesConfig,
    EvalPrediction,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    set_seed,
)
from transformers.trainer_callback import ProgressCallback
from transformers.trainer_utils import rotate_checkpoints

from fastdpo.data import TokenizationReport
from fastdpo.loss.dynamic_beta import DynamicBeta
from fastdpo.ops.backends import resolve_backend
from fastdpo.training.memory import MemoryPlan, MemoryTrial
from fastdpo.training.models.quantized import is_quantized
from fastdpo.training.models.setup import (
    check_offloading,
    fold_accumulation,
    model_name,
    prepare_models,
    resolve_tokenizer,
)
from fastdpo.training.models.sharded import Sharding, reshard, use_on_cpus
from fastdpo.training.objectives import Objective, PreferenceObjective
from fastdpo.training.objectives.objective import Plan
from fastdpo.training.options import FastDPOConfig
from fastdpo.training.ranks import Ranks
from fastdpo.training.reference import ReferenceCache, ReferencePolicy, ReferenceStore, reference_identity
from fastdpo.training.rows import GlobalBatch, LayoutChoice, MicroBatch, TokenBatch
from fastdpo.training.rows.attention import prepare_deterministic
from fastdpo.training.runs import artifacts
from fastdpo.training.runs.callbacks import (
    CommitStatistics,
    PrecomputeReference,
    PreferenceProgress,
    StopSignals,
    TrainingInterrupted,
)
from fastdpo.training.runs.curves import plot_curves
from fastdpo.training.runs.nonfinite import NonFiniteLossError, stop_on_nonfinite
from fastdpo.training.runs.saving import Checkpoints
from fastdpo.training.scoring import BatchScores, CompletionScorer, Passes, Scores
from fastdpo.training.step import OptimizerStep

__all__ = ["FastDPOTrainer", "NonFiniteLossError"]

logger = logging.getLogger(__name__)


class FastDPOTrainer(Trainer):
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
        TrainingInterrupted: in `train`, after SIGTERM or SIGINT, once a checkpoint is saved.
    """

    _tag_names = ("fastdpo", "dpo")
    # transformers' own, which have no types
    is_fsdp_enabled: bool
    optimizer: Any

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
        *,
        objective: Objective | None = None,
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
        model, ref_model = prepare_models(model, ref_model, args, quantization_config, peft_config)
        check_offloading(args)
        self.config, self.tokenizer = args, resolve_tokenizer(processing_class, model)
        #: Data set → what tokenisation kept, dropped and cut.
        self.tokenization: dict[str, TokenizationReport] = {}
        #: Final figures, for the model card.
        self.results: dict[str, Any] = {}
        self.objective = PreferenceObjective(args) if objective is None else objective
        super().__init__(
            model=model,
            args=fold_accumulation(args),
            data_collator=self.objective.collator,
            train_dataset=self.tokenize(train_dataset, "train"),
            eval_dataset=self.tokenize_each(eval_dataset, "eval"),
            processing_class=self.tokenizer,
            compute_metrics=self.evaluation_metrics,
            callbacks=list(callbacks or []),
            optimizers=optimizers,
        )
        self._build_parts(ref_model)
        self.model.add_model_tags(list(self._tag_names))
        self.add_callback(self.stop_signals)
        self.add_callback(CommitStatistics(self.commit_plan))
        self.add_callback(PrecomputeReference(self.precompute_reference))
        if not self.args.disable_tqdm:
            self.remove_callback(ProgressCallback)
            self.add_callback(PreferenceProgress())

    def _build_parts(self, ref_model: PreTrainedModel | None) -> None:
        """The parts of a run, from the ground up; each gets what it needs."""
        args, objective, autocast = self.args, self.objective, self.accelerator.autocast
        self.ranks = Ranks(args.process_index, args.world_size, args.device)
        self.sharding = Sharding(self.accelerator, self.is_fsdp_enabled, self.ranks)
        if self.is_deepspeed_enabled:
            raise ValueError("DeepSpeed is not supported; shard with FSDP2 (fsdp=True), or launch with torchrun.")
        self.sharding.check(self.model)
        if ref_model is not None and not is_quantized(ref_model) and not self.is_fsdp_enabled:
            self._move_model_to_device(ref_model, args.device)
        self.reference = ReferencePolicy(self.model, ref_model)
        if self.is_fsdp_enabled:
            self.reference.agree_on_fingerprint(self.ranks)
        self.scorer = CompletionScorer(
            objective.token_weights, objective.statistics, args.backend, args.head_workspace_bytes
        )
        self.memory = MemoryPlan(args, self.model, self.ranks, repeats=not self.is_fsdp_enabled)
        models = [self.model] if ref_model is None else [self.model, ref_model]
        self.layouts = LayoutChoice(args, self.scorer, models, self.ranks, autocast)
        kept = args.reference != "online" and objective.needs_reference
        identity = reference_identity(self.reference, self.tokenizer, args, objective.weighting()) if kept else {}
        self.reference_cache = ReferenceCache(identity, objective.completions)
        self.references = ReferenceStore(self.reference_cache, args, self.ranks, needed=objective.needs_reference)
        self.passes = Passes(
            self.model, self.reference, self.scorer, self.layouts, self.memory, self.sharding, autocast
        )
        self.batch_scores = BatchScores(self.passes, self.references)
        self.trial = MemoryTrial(
            args, self.model, self.memory, self.layouts, self.make_batch, self._score_only, self._train_for_nothing
        )
        self.optimizer_step = OptimizerStep(
            objective, self.passes, self.batch_scores, self.references, args, self.ranks, self.accelerator.backward
        )
        self.checkpoints = Checkpoints(args, self.ranks, self.reference, objective.modules(), objective.fixed_options())
        self.stop_signals = StopSignals(self.ranks)
        self._pending_plan: Plan | None = None
        self._step_metrics: dict[str, list[float]] = defaultdict(list)
        self._parameter_count = self.model.num_parameters(exclude_embeddings=True)

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

    def tokenize_each(self, dataset: Any, name: str) -> Any:
        """`tokenize` of a data set, or of each in a dict of them."""
        if isinstance(dataset, dict):
            return {key: self.tokenize(value, f"{name}_{key}") for key, value in dataset.items()}
        return self.tokenize(dataset, name)

    def tokenize(self, dataset: Dataset | None, name: str) -> Dataset | None:
        """Token ids of a data set; one of token ids is checked and passed through."""
        if dataset is None:
            return None
        if isinstance(dataset, IterableDataset):
            raise TypeError(
                f"{name}_dataset is a streaming IterableDataset, which cannot be shuffled, counted or resumed exactly. "
                "Load it without streaming=True, or materialise a part with Dataset.from_list(list(stream.take(n)))."
            )
        with self.config.main_process_first(desc=f"tokenising the {name} pairs"):
            tokenised, report = self.objective.tokenize(dataset, self.tokenizer, self.config)
        if report is not None:
            self.tokenization.setdefault(name, report)  # what came from text; a second pass finds nothing to drop
            logger.info("%s pairs: %s", name, report.summary())
        return tokenised

    def make_batch(self, rows: list[dict[str, Any]]) -> TokenBatch:
        """Rows of a tokenised data set, as a batch of this run's device."""
        return self.objective.batch(self.data_collator(rows), self.args.device)

    # Training

    def training_step(
        self, model: PreTrainedModel, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """One optimizer batch of examples: gradients, and the loss over all ranks' examples, which is returned."""
        model.train()
        if hasattr(self.optimizer, "train") and callable(self.optimizer.train):
            self.optimizer.train()
        batch = self.objective.batch(inputs, self.args.device)
        window = GlobalBatch(len(batch), self.ranks, self._real_examples(len(batch)))
        self.layouts.settle(batch)
        self.trial.settle(self.train_dataset)
        result = self.optimizer_step(batch, window)
        figures = self.optimizer_step.read(result, batch, with_norm=self.accelerator.scaler is None)
        if not figures.finite:
            stop_on_nonfinite(
                self.args, self.ranks, self.state.global_step + 1, figures.loss_value, figures.grad_norm,
                self.objective.named(result.everyone), batch.example_ids,
            )  # fmt: skip
        for name, value in figures.metrics.items():
            self._step_metrics[name].append(value)
        self._pending_plan = result.plan
        self._empty_cache_if_due()
        return figures.loss

    def _real_examples(self, size: int) -> int:
        """Examples of the global batch that are no wrapped duplicates; the dataloader fills up the epoch's last one."""
        total = size * self.args.world_size
        if self.args.dataloader_drop_last or not self.accelerator.gradient_state.end_of_dataloader:
            return total
        # Not accelerate's own remainder: a dataloader that skips batches on resume does not know it.
        last = len(self.train_dataset) % (self.args.train_batch_size * self.args.world_size)
        return last or total

    def _score_only(self, micro: MicroBatch) -> None:
        """One micro-batch of the policy without gradients."""
        with torch.no_grad():
            self.passes.forward(self.model, micro)

    def _train_for_nothing(self, micro: MicroBatch) -> None:
        """One micro-batch of the policy forward and backward, of weight zero."""
        self.accelerator.backward(0.0 * self.passes.forward(self.model, micro).logps.sum())

    def discard_step(self) -> None:
        """Forget a training step that no optimizer step follows: its gradients, its plan and its metrics."""
        self.model.zero_grad()
        self._pending_plan = None
        self._step_metrics.clear()

    def commit_plan(self) -> None:
        """Commit what the last planned batch has taught; called once its optimizer step was taken."""
        if self._pending_plan is not None and not self.accelerator.optimizer_step_was_skipped:
            self.objective.commit(self._pending_plan)
        self._pending_plan = None

    def precompute_reference(self) -> None:
        """With reference="precompute", compute what is missing of the training set's reference log-probs."""
        if self.args.reference == "precompute" and self.references.keeps:
            self.references.fill(
                self.train_dataset,
                lambda rows: self.batch_scores.keep_reference(self.make_batch(rows)),
                lambda: self.stop_signals.agreed() is not None,
            )

    def _empty_cache_if_due(self) -> None:
        every = self.args.torch_empty_cache_steps
        if every is not None and self.state.global_step % every == 0 and torch.cuda.is_available():
            torch.cuda.empty_cache()

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:
        """As transformers' train, with exact resume. Default: `args.resume_from_checkpoint`.

        Raises CheckpointError (an unusable output folder or checkpoint), NonFiniteLossError or TrainingInterrupted.
        """
        resume = self.checkpoints.claim(resume_from_checkpoint)
        self.references.load()
        self.stop_signals.install()
        try:
            result = super().train(resume_from_checkpoint=resume, **kwargs)
        finally:
            self.stop_signals.restore()
        self.references.save()
        return result

    def _finalize_training(self, trial: Any, num_train_samples: int, start_time: float) -> Any:
        # Before the best weights are loaded and other checkpoints deleted: the step in flight must not be lost.
        if (signum := self.stop_signals.agreed()) is not None:
            folder = Path(self._get_output_dir(trial)) / f"checkpoint-{self.state.global_step}"
            if not folder.is_dir():
                self._save_checkpoint(self.model_wrapped, trial)
            self.callback_handler.on_train_end(self.args, self.state, self.control)
            interruption = TrainingInterrupted(signum, str(folder))
            logger.warning("%s", interruption)
            raise interruption
        return super()._finalize_training(trial, num_train_samples, start_time)

    # FSDP

    def create_accelerator_and_postprocess(self) -> None:
        """As transformers', and where FSDP is asked for on CPUs it is used: accelerate drops the plugin there."""
        super().create_accelerator_and_postprocess()
        if not self.is_fsdp_enabled and use_on_cpus(self.accelerator, self.args.fsdp_plugin_args):
            self.is_fsdp_enabled = True

    def shard(self) -> None:
        """Shard model and reference over ranks, once; training and evaluation call it before their first forward."""
        if self.sharding.is_due(self.model):
            self.create_optimizer()
            self.optimizer = self.sharding.shard(self.model, self.optimizer)
            self.model_wrapped = self.model
            self.reference.shard(self.sharding)
            self.sharding.settle_dtypes(self.model)

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: Any) -> Any:
        self.shard()
        reshard(self.model)  # accelerate looks for the optimizer's parameters in the model once more
        return super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)

    # Evaluation: the scores of every example are gathered through transformers' loop, and loss and metrics computed
    # once, over all of them: the figures depend neither on the evaluation batch nor on the ranks

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """As transformers', on the sharded model."""
        self.shard()
        return super().evaluation_loop(*args, **kwargs)

    def prediction_step(
        self,
        model: PreTrainedModel,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[None, Tensor, Tensor]:
        """No loss yet, the scores of the examples (`Scores.stack`), and a placeholder for labels (B,)."""
        batch = self.objective.batch(inputs, self.args.device)
        return None, self.batch_scores.evaluated(batch), batch.lengths()[0]

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
            eval_dataset = self.tokenize_each(eval_dataset, metric_key_prefix)
        return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)

    def predict(
        self, test_dataset: Dataset, ignore_keys: list[str] | None = None, metric_key_prefix: str = "test"
    ) -> Any:
        """Scores of every example as `predictions`, with their metrics; of pairs (N, 8), in the order of `PairScores`'
        fields."""
        found = super().predict(self.tokenize(test_dataset, metric_key_prefix), ignore_keys, metric_key_prefix)
        scores = Scores.unstack(torch.as_tensor(found.predictions), self.objective.completions)
        columns = torch.stack(list(self.objective.named(scores).values()), dim=1)
        return found._replace(predictions=columns.numpy())

    # Checkpoints, and what a finished run leaves

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        step = self.state.global_step
        run_dir = Path(self._get_output_dir(trial=trial))
        final = run_dir / f"checkpoint-{step}"
        staging = self.checkpoints.begin(run_dir, step)
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
        self.checkpoints.finish(staging, final, self.state, [*self.callback_handler.callbacks, self.control])
        self.references.save()
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(final))
        if self.args.should_save:
            rotate_checkpoints(
                output_dir=str(run_dir),
                save_total_limit=self.args.save_total_limit,
                best_model_checkpoint=self.state.best_model_checkpoint,
                use_mtime=True,
            )
        self.ranks.wait()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        self.checkpoints.check(resume_from_checkpoint)
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        self.checkpoints.load_modules(resume_from_checkpoint)

    def _load_best_model(self) -> None:
        # transformers looks for adapters at the top of the folder only; peft keeps named ones one level below.
        if isinstance(self.model, PeftModel):
            logger.info("loading the best weights, %s", self.state.best_model_checkpoint)
            super()._load_from_checkpoint(self.state.best_model_checkpoint)
        else:
            super()._load_best_model()

    def save_run(self, results: dict[str, Any], options: dict[str, Any] | None = None) -> list[Path]:
        """Write what a finished run leaves besides its weights, which the caller has saved, and push all if asked to.

        results: final figures, stored in metrics.json beside the log. options: further options for run.yaml.
        Returns the files written; none on other processes than the main one.
        """
        written: list[Path] = []
        self.results = results
        if self.is_world_process_zero():
            folder, history = Path(self.args.output_dir), self.state.log_history
            written = [
                artifacts.write_metrics(folder, history, results),
                artifacts.write_options(folder, self.config, options or {}),
            ]
            self.create_model_card()
            written.append(folder / artifacts.CARD_FILE)
            if plot_curves(history, folder / artifacts.CURVES_FILE):
                written.append(folder / artifacts.CURVES_FILE)
        if self.args.push_to_hub:
            self.push_to_hub(commit_message="End of training")
        return written

    def create_model_card(self, model_name: str | None = None, **kwargs: Any) -> None:
        """Write the model card: settings, the figures in `results`, sources. `kwargs`: tags, as transformers passes."""
        if self.is_world_process_zero():
            artifacts.write_card(
                Path(self.args.output_dir) / artifacts.CARD_FILE,
                self.model,
                self.args,
                self.state,
                self.objective.facts(),
                self.results,
                model_name,
                kwargs.get("tags"),
            )

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
