"""The parts of a run, each built from those below it: the order here is the order in which they depend on one another.

From the models, the options, the objective and accelerate's accelerator to all that `FastDPOTrainer` forwards its hooks
to. A part knows what it is given and nothing of the trainer.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from accelerate import Accelerator
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fastdpo.training.body import BodyChoice
from fastdpo.training.memory import MemoryPlan, MemoryTrial
from fastdpo.training.models.sharded import Sharding
from fastdpo.training.objectives import Objective
from fastdpo.training.options import FastDPOConfig
from fastdpo.training.ranks import Ranks
from fastdpo.training.reference import (
    ReferenceCache,
    ReferencePolicy,
    ReferenceStore,
    adapters_digest,
    model_identity,
    reference_identity,
)
from fastdpo.training.rows import LayoutChoice, MicroBatch
from fastdpo.training.runs.saving import Checkpoints
from fastdpo.training.scoring import BatchScores, CompletionScorer, Passes
from fastdpo.training.step import OptimizerStep


@dataclass(frozen=True)
class Parts:
    """See each class."""

    ranks: Ranks
    sharding: Sharding
    reference: ReferencePolicy
    references: ReferenceStore
    scorer: CompletionScorer
    memory: MemoryPlan
    layouts: LayoutChoice
    passes: Passes
    batch_scores: BatchScores
    trial: MemoryTrial
    step: OptimizerStep
    checkpoints: Checkpoints
    #: What the model computes beside its weights, see `model_identity`: a first forward may settle some of it.
    settings: dict[str, str]

    @classmethod
    def build(
        cls,
        model: PreTrainedModel,
        ref_model: PreTrainedModel | None,
        tokenizer: PreTrainedTokenizerBase,
        args: FastDPOConfig,
        objective: Objective,
        accelerator: Accelerator,
        *,
        sharded: bool,
    ) -> Parts:
        """model: on its device, with its adapter. sharded: whether FSDP is on.

        Raises ValueError for what FSDP cannot shard.
        """
        ranks = Ranks(args.process_index, args.world_size, args.device)
        sharding = Sharding(accelerator, sharded, ranks)
        sharding.check(model)
        reference = ReferencePolicy(model, ref_model)
        if sharded:
            reference.agree_on_fingerprint(ranks)
        keeps = args.reference != "online" and objective.needs_reference
        weighting = objective.weighting()
        if objective.completions != 2:  # pairs' files, which do not say so, stay valid
            weighting["completions"] = str(objective.completions)
        identity = reference_identity(reference, tokenizer, args, weighting) if keeps else {}
        cache = ReferenceCache(identity, objective.completions)
        references = ReferenceStore(cache, args, ranks, needed=objective.needs_reference)
        scorer = CompletionScorer(
            objective.token_weights, objective.statistics, args.backend, args.head_workspace_bytes
        )
        memory = MemoryPlan(args, model, ranks, repeats=not sharded)
        models = [model] if ref_model is None else [model, ref_model]
        layouts = LayoutChoice(args, scorer, models, ranks, accelerator.autocast)
        bodies = BodyChoice(args, scorer, models, ranks, accelerator.autocast, sharded=sharded)
        passes = Passes(model, reference, scorer, layouts, bodies, memory, sharding, accelerator.autocast)
        batch_scores = BatchScores(passes, references)

        settings = model_identity(model, args)
        if ref_model is not None:
            theirs = {**model_identity(ref_model, args), "adapters": adapters_digest(ref_model)}
            settings |= {f"reference {name}": value for name, value in theirs.items()}

        def score(micro: MicroBatch) -> None:
            with torch.no_grad():
                passes.forward(model, micro)

        def train(micro: MicroBatch) -> None:
            accelerator.backward(0.0 * passes.forward(model, micro).logps.sum())

        make_batch = partial(objective.batch_of, device=args.device)
        trial = MemoryTrial(args, model, memory, layouts, passes.active, make_batch, score, train)
        return cls(
            ranks,
            sharding,
            reference,
            references,
            scorer,
            memory,
            layouts,
            passes,
            batch_scores,
            trial,
            OptimizerStep(objective, passes, batch_scores, references, args, ranks, accelerator.backward),
            Checkpoints(args, ranks, references, objective.modules),
            settings,
        )
