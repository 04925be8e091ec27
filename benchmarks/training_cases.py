"""The workload of the training step: pairs of token ids shaped like HH, in optimizer batches, and the model's weights.

Costs depend on lengths only, so ids are random; every contender trains on exactly these ids.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import datasets
import torch
from torch import nn

#: Of the trained LoRA before the first step: with B = 0 every margin is 0, and agreement would say little.
LORA_B_STD = 0.01


@dataclass(frozen=True)
class TrainingCase:
    """Attributes:
    pairs: per optimizer step.
    steps: optimizer steps, of which the first warms up.
    prompt, completion: bounds of the uniform lengths in tokens.
    warm_up: length of prompts and answers in the first step; None: as in the others.
    """

    pairs: int = 8
    steps: int = 3
    prompt: tuple[int, int] = (60, 240)
    completion: tuple[int, int] = (20, 120)
    seed: int = 0
    warm_up: int | None = None

    def tiny(self) -> TrainingCase:
        return replace(self, prompt=(6, 12), completion=(3, 8))


def preference_ids(case: TrainingCase, vocab: int) -> datasets.Dataset:
    """Columns prompt_ids, chosen_ids, rejected_ids and example_id; case.pairs × case.steps rows, in training order."""
    generator = torch.Generator().manual_seed(case.seed)

    def draw(bounds: tuple[int, int]) -> list[int]:
        length = int(torch.randint(bounds[0], bounds[1] + 1, (), generator=generator))
        ids: list[int] = torch.randint(0, vocab, (length,), generator=generator).tolist()
        return ids

    rows = []
    for index in range(case.pairs * case.steps):
        lengths = case.prompt, case.completion, case.completion
        if case.warm_up is not None and index < case.pairs:
            lengths = ((case.warm_up, case.warm_up),) * 3
        prompt, chosen, rejected = (draw(bounds) for bounds in lengths)
        rows.append({"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected, "example_id": f"{index}"})
    return datasets.Dataset.from_list(rows)


@dataclass(frozen=True)
class Tokens:
    """Positions that a step's body runs over, per optimizer step: what its GEMMs are proportional to.

    padded: 2·pairs rows of the longest row's length, as TRL pads a whole batch.
    rows: prompt + completion of each row, without padding.
    shared: prompt + chosen + rejected of each pair.
    scored: completion tokens, which are all that the head needs.
    """

    padded: float
    rows: float
    shared: float
    scored: float


def count_tokens(data: datasets.Dataset, case: TrainingCase, steps: range) -> Tokens:
    """Means over the given steps."""
    counts = []
    for step in steps:
        batch: list[dict[str, Any]] = data.select(range(step * case.pairs, (step + 1) * case.pairs)).to_list()
        lengths = [tuple(len(row[f"{name}_ids"]) for name in ("prompt", "chosen", "rejected")) for row in batch]
        padded = 2 * len(batch) * max(p + max(c, r) for p, c, r in lengths)
        shared, scored = sum(p + c + r for p, c, r in lengths), sum(c + r for _, c, r in lengths)
        counts.append((padded, shared + sum(p for p, _, _ in lengths), shared, scored))
    return Tokens(*(sum(column) / len(counts) for column in zip(*counts, strict=True)))


@torch.no_grad()
def set_lora(model: nn.Module, seed: int = 0) -> None:
    """The same LoRA weights in float32 whichever trainer built them.

    TRL rounds the LoRA of a quantised model to bfloat16, which would hide an error of 1e-4.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in sorted(model.named_parameters()):
        if parameter.requires_grad:
            std = LORA_B_STD if "lora_B" in name else parameter.shape[-1] ** -0.5
            parameter.data = torch.empty(parameter.shape).normal_(std=std, generator=generator)
