"""The prediction: peak memory by part, what cards hold, and the time split of a step, of one model trained in one way.

In go `ModelConfig` and `EstimateConfig`; out comes an `Estimate`. It joins `memory` (parts and largest sizes), which
counts by `activations`, and `timing`; which of them is asked with or without checkpointing is decided here.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fastdpo.estimate.architectures import find_config, known_architectures, stored_weights
from fastdpo.estimate.counter import Training
from fastdpo.estimate.devices import measured_cpu
from fastdpo.estimate.memory import MemoryEstimator, Part, Run, Surroundings
from fastdpo.estimate.options import EstimateConfig
from fastdpo.estimate.rows import PairShape
from fastdpo.estimate.timing import StepTimes, optimizer_seconds, time_micro_batch
from fastdpo.training.models.setup import refuse_router_loss
from fastdpo.training.options import ModelConfig
from fastdpo.training.options.sizes import DEFAULT_MICRO_BATCH_TOKENS, head_workspace_bytes


@dataclass(frozen=True)
class Fit:
    """What a card holds: micro_batch_tokens at most, and the longest pair alone; 0 and None if nothing fits, and None
    for a budget that was not asked for. host_bytes: of the longest pair on the host."""

    gpu_memory: str
    checkpointing: bool
    micro_batch_tokens: int | None
    longest_pair: PairShape | None
    host_bytes: int = 0

    def as_dict(self) -> dict[str, Any]:
        """With tokens of the pair in its shared row, and of one answer with its prompt."""
        found = dataclasses.asdict(self)
        if self.longest_pair is not None:
            found["longest_pair"] |= {"tokens": self.longest_pair.tokens, "context": self.longest_pair.context}
        return found


class Estimate:
    """The figures of one call: `parts` sum to the predicted peak, `fits` is for the card, `times` for a step; `host` is
    what the host holds for a GPU. With `longest_pair` there are `fits` alone."""

    def __init__(self, model: ModelConfig, config: EstimateConfig) -> None:
        """Raises ValueError, OSError for a model that cannot be predicted."""
        if model.model_name_or_path is None:
            known = ", ".join(known_architectures())
            raise ValueError(f"model_name_or_path is required: a local folder, a hub name, or one of {known}.")
        self.model, self.config = model, config
        self.architecture = find_config(model.model_name_or_path, model.model_revision, model.trust_remote_code)
        refuse_router_loss(self.architecture, config.router_aux_loss_coef)
        self.surroundings = self._surroundings(model.model_name_or_path)
        self.device = measured_cpu(self._dtype()) if config.on_cpu else config.gpu()
        self._estimators: dict[bool, MemoryEstimator] = {}
        self.fits = [
            self._fit(card, memory, checkpointing)
            for card, memory in config.cards().items()
            for checkpointing in (False, True)
            if self._allowed(checkpointing)
        ]
        self.parts: list[Part] = []
        self.host: list[Part] = []
        if config.longest_pair:
            return
        self.checkpointing = self._checkpointing()
        self.run = dataclasses.replace(self._run(), micro_batch_tokens=self._budget())
        self.parts = self.estimator(self.checkpointing).parts(self.run)
        self.host = self.estimator(self.checkpointing).host_parts(self.run)
        self.times = self._times()

    def estimator(self, checkpointing: bool, memory: int | None = None) -> MemoryEstimator:
        """The estimator of this model, with or without checkpointing, on a card of `memory` bytes; by default on the
        first that is named."""
        memory = memory or next(iter(self.config.cards().values()), None)
        if checkpointing not in self._estimators:
            on_gpu = not self.config.on_cpu
            bf16 = on_gpu if self.config.bf16 is None else self.config.bf16
            training = Training(
                self.model,
                self._dtype(),
                torch.bfloat16 if bf16 else None,
                flash=on_gpu,
                checkpointing=checkpointing,
                workspace=head_workspace_bytes(self.config.head_workspace),
                lean_body=self.config.lean_body,
                offload_embeddings=self.config.offload_embeddings,
            )
            self._estimators[checkpointing] = MemoryEstimator(self.architecture, training, self.surroundings)
        found = self._estimators[checkpointing]
        return found if memory is None else found.on_card(memory)

    def total(self) -> int:
        """The predicted peak in bytes."""
        return sum(part.bytes for part in self.parts)

    def _dtype(self) -> torch.dtype:
        if self.model.dtype == "auto":
            return torch.float32 if self.config.on_cpu else torch.bfloat16
        return getattr(torch, self.model.dtype)

    def _surroundings(self, name: str) -> Surroundings:
        if not self.config.on_cpu:
            return Surroundings.of_gpu()
        folder = Path(name).expanduser()
        tokenizer = str(folder) if (folder / "tokenizer_config.json").is_file() else None
        return Surroundings.of_cpu(stored_weights(name, self.architecture), tokenizer)

    def _allowed(self, checkpointing: bool) -> bool:
        if checkpointing:
            return self.config.gradient_checkpointing != "false"
        return self.config.gradient_checkpointing != "true" and not self.config.activation_offloading

    def _run(self) -> Run:
        tokens = self.config.micro_batch_tokens
        return Run(
            self.config.shape(),
            self.config.per_device_train_batch_size,
            DEFAULT_MICRO_BATCH_TOKENS if tokens == "auto" else int(tokens),
            offload=self.config.activation_offloading,
            optimizer_8bit=not self.config.on_cpu,
        )

    def _fit(self, card: str, memory: int, checkpointing: bool) -> Fit:
        estimator, run = self.estimator(checkpointing, memory), self._run()
        budget = None if self.config.longest_pair else estimator.largest_budget(run, memory)
        pair = estimator.largest_pair(run, memory)
        host = [] if pair is None else estimator.host_parts(dataclasses.replace(run, shape=pair, micro_batch_tokens=1))
        return Fit(card, checkpointing, budget, pair, sum(part.bytes for part in host))

    def _checkpointing(self) -> bool:
        if self.config.gradient_checkpointing != "auto" or self.config.activation_offloading:
            return self._allowed(True)
        return bool(self.fits) and not self.fits[0].micro_batch_tokens

    def _budget(self) -> int:
        found = next((fit.micro_batch_tokens for fit in self.fits if fit.checkpointing == self.checkpointing), 0)
        return found if found and self.config.micro_batch_tokens == "auto" else self._run().micro_batch_tokens

    def _times(self) -> StepTimes:
        counter = self.estimator(self.checkpointing).counter
        batch = self.run.pairs_per_step * self.run.shape.tokens
        times = StepTimes.of(
            lambda row, training: time_micro_batch(counter, row, self.device, training=training),
            self.run.row(),
            self.run.scoring_row(),
            batch,
        )
        sizes = {part.name: part.bytes for part in self.parts}
        trained = sizes.get("adapters", sizes.get("trained weights", 0))
        times.training["optimizer"] = optimizer_seconds(trained, sizes["optimizer"], self.device)
        return times

    def as_dict(self) -> dict[str, Any]:
        """Everything that is printed, in bytes, tokens and seconds."""
        if self.config.longest_pair:
            return {
                "predicted": True,
                "model": self.model.model_name_or_path,
                "fits": [fit.as_dict() for fit in self.fits],
            }
        return {
            "predicted": True,
            "model": self.model.model_name_or_path,
            "device": self.device.label,
            "gradient_checkpointing": self.checkpointing,
            "micro_batch_tokens": self.run.micro_batch_tokens,
            "parts": {part.name: part.bytes for part in self.parts},
            "peak_bytes": self.total(),
            "host_parts": {part.name: part.bytes for part in self.host},
            "fits": [fit.as_dict() for fit in self.fits],
            "seconds_per_scoring_pass": self.times.scoring,
            "seconds_per_training_pass": self.times.training,
        }
