"""Single answers, and two objectives on them that the package does not know."""

from __future__ import annotations

import random
from typing import Any

from datasets import Dataset
from torch import Tensor

from fastdpo.training.objectives import Objective
from fastdpo.training.scoring import Scores


class MeanLikelihood(Objective):
    """−log π(y|x) per token, mean over answers."""

    completion_columns = ("answer_ids",)
    statistics = ("is_top1",)

    def losses(self, scores: Scores) -> Tensor:
        return -scores.logps[0] / scores.lengths[0]

    def metrics(self, scores: Scores, output: Any, plan: Any = None) -> dict[str, Tensor]:
        tokens = scores.lengths[0].sum()
        return {"accuracy": scores.statistics[0, 0].sum() / tokens, "nll": -scores.sums[0].sum() / tokens}


class Relative(MeanLikelihood):
    """The same of log-ratios to the reference: equal gradients, and a loss of 0 at the start."""

    needs_reference = True

    def losses(self, scores: Scores) -> Tensor:
        return -(scores.logps[0] - scores.ref_logps[0]) / scores.lengths[0]


class Focused(MeanLikelihood):
    """The same weighted by softmax(losses) over the batch: the weights of one answer depend on all of them."""

    couples_batch = True

    def losses(self, scores: Scores) -> Tensor:
        losses = super().losses(scores)
        return losses * losses.detach().softmax(0) * len(losses)


def answers(count: int, seed: int = 0) -> Dataset:
    """Token ids of prompts and answers of ragged lengths; the answers are of few letters."""
    draw = random.Random(seed)

    def ids(low: int, high: int, letters: range) -> list[int]:
        return [draw.choice(letters) for _ in range(draw.randint(low, high))]

    rows = [
        {"prompt_ids": ids(2, 14, range(1, 200)), "answer_ids": ids(1, 12, range(20, 40)), "example_id": str(i)}
        for i in range(count)
    ]
    return Dataset.from_list(rows)
