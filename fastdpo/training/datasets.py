"""The data sets of a run: whatever the user has given, to rows of token ids that an objective makes batches of."""

from __future__ import annotations

import logging
from typing import Any

from datasets import Dataset, IterableDataset
from transformers import PreTrainedTokenizerBase

from fastdpo.data import TokenizationReport
from fastdpo.training.objectives import Objective
from fastdpo.training.options import FastDPOConfig

logger = logging.getLogger(__name__)


class Tokenization:
    """Tokenises data sets as the objective reads them.

    Attributes:
        reports: data set → what tokenisation kept, dropped and cut.
    """

    def __init__(self, objective: Objective, tokenizer: PreTrainedTokenizerBase, config: FastDPOConfig) -> None:
        self.objective, self.tokenizer, self.config = objective, tokenizer, config
        self.reports: dict[str, TokenizationReport] = {}

    def each(self, dataset: Any, name: str) -> Any:
        """`__call__` of a data set, or of each in a dict of them."""
        if isinstance(dataset, dict):
            return {key: self(value, f"{name}_{key}") for key, value in dataset.items()}
        return self(dataset, name)

    def __call__(self, dataset: Dataset | None, name: str) -> Dataset | None:
        """Token ids of a data set; one of token ids is checked and passed through.

        Raises TypeError for a stream, ValueError for what the objective cannot read, such as several splits.
        """
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
            self.reports.setdefault(name, report)  # what came from text; a second pass finds nothing to drop
            logger.info("%s pairs: %s", name, report.summary())
        return tokenised
