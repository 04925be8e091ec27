"""The data sets of a run: whatever the user has given, to rows of token ids that an objective makes batches of, and
that the models have embeddings and positions for.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, IterableDataset
from transformers import PreTrainedTokenizerBase

from fastdpo.data import PreferenceDataError, TokenizationReport
from fastdpo.training.models.limits import ModelLimits
from fastdpo.training.objectives import Objective
from fastdpo.training.options import FastDPOConfig

logger = logging.getLogger(__name__)

#: Rows that are checked at once.
_ROWS = 10_000


class Tokenization:
    """Tokenises data sets as the objective reads them.

    Args:
        objective: that trains on them.
        tokenizer: of the run.
        config: with its limits of lengths.
        limits: of the models that read the rows.

    Attributes:
        reports: data set → what tokenisation kept, dropped and cut.
    """

    def __init__(
        self,
        objective: Objective,
        tokenizer: PreTrainedTokenizerBase,
        config: FastDPOConfig,
        limits: Sequence[ModelLimits] = (),
    ) -> None:
        self.objective, self.tokenizer, self.config, self.limits = objective, tokenizer, config, limits
        self.reports: dict[str, TokenizationReport] = {}
        self._told_of_positions = False

    def each(self, dataset: Any, name: str) -> Any:
        """`__call__` of a data set, or of each in a dict of them."""
        if isinstance(dataset, dict):
            return {key: self(value, f"{name}_{key}") for key, value in dataset.items()}
        return self(dataset, name)

    def __call__(self, dataset: Dataset | None, name: str) -> Dataset | None:
        """Token ids of a data set; one of token ids is checked and passed through.

        Raises TypeError for a stream, ValueError for what the objective cannot read, such as several splits, and for
        ids and lengths that a model's tables do not hold.
        """
        if dataset is None:
            return None
        if isinstance(dataset, IterableDataset):
            raise TypeError(
                f"{name}_dataset is a streaming IterableDataset, which cannot be shuffled, counted or resumed exactly. "
                "Load it without streaming=True, or materialise a part with Dataset.from_list(list(stream.take(n)))."
            )
        with self.config.main_process_first(desc=f"tokenising the {name} pairs"):
            try:
                tokenised, report = self.objective.tokenize(dataset, self.tokenizer, self.config)
            except PreferenceDataError as error:
                raise PreferenceDataError(f"{name}_dataset: {error}") from error
        if report is not None:
            self.reports.setdefault(name, report)  # what came from text; a second pass finds nothing to drop
            logger.info("%s pairs: %s", name, report.summary())
        self._check(tokenised, f"{name}_dataset")
        return tokenised

    # What the models hold

    def _check(self, dataset: Dataset, name: str) -> None:
        """Hold every row's ids and length against the models' tables, a few thousand rows at a time."""
        completions = self.objective.completion_columns
        columns = ["prompt_ids", *completions]
        rows = dataset.select_columns([*columns, "example_id"]).with_format("arrow")
        for table in rows.iter(batch_size=_ROWS):
            examples = table.column("example_id")
            ids = {column: table.column(column).combine_chunks() for column in columns}
            longest = pc.max_element_wise(*(pc.list_value_length(ids[column]) for column in completions))
            longest = pc.add(pc.list_value_length(ids["prompt_ids"]), longest)
            for limits in self.limits:
                for column in columns:
                    held = limits.ids if column == "prompt_ids" else min(limits.ids, limits.predicted_ids)
                    self._check_ids(ids[column], held, f"{name}: example {{!r}}, {column}", examples, limits)
                self._check_positions(longest, name, examples, limits)

    def _check_ids(self, lists: Any, held: int, where: str, examples: Any, limits: ModelLimits) -> None:
        flat = lists.flatten()
        if not len(flat) or not pa.types.is_integer(flat.type):
            return
        least, most = (pc.min_max(flat)[end].as_py() for end in ("min", "max"))
        if least is None or (least >= 0 and most < held):
            return
        row, token = next(
            (row, token) for row, found in enumerate(lists.to_pylist()) for token in found if not 0 <= token < held
        )
        known = self.tokenizer.convert_ids_to_tokens(token) if 0 <= token < len(self.tokenizer) else None
        advice = "Tokenise with the model's own tokenizer (tokenizer_name_or_path, processing_class)."
        if known is not None:
            advice = (
                f"It is {known!r}, which the tokenizer has and the model lacks: take the model's own tokenizer, or "
                "resize the model first (model.resize_token_embeddings(len(tokenizer)), saved) and train the new rows."
            )
        raise ValueError(
            f"{where.format(examples[row].as_py())}: token id {token}, but {limits.argument} has the ids 0 to "
            f"{held - 1}. {advice}"
        )

    def _check_positions(self, longest: Any, name: str, examples: Any, limits: ModelLimits) -> None:
        row = int(pc.index(longest, pc.max(longest)).as_py())
        tokens, example = longest[row].as_py(), examples[row].as_py()
        if limits.positions is not None and tokens > limits.positions:
            raise ValueError(
                f"{name}: example {example!r} has {tokens} tokens with its longer answer, but {limits.argument} has "
                f"{limits.positions} positions (its table {limits.table}). Set max_length={limits.positions} or less."
            )
        if limits.trained_positions is not None and tokens > limits.trained_positions and not self._told_of_positions:
            self._told_of_positions = True
            logger.warning(
                "%s: example %r has %d tokens, more than the %d that %s was made for (max_position_embeddings): its "
                "figures beyond are guesses. max_length=%d cuts there.",
                name, example, tokens, limits.trained_positions, limits.argument, limits.trained_positions,
            )  # fmt: skip
