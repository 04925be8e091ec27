"""Rows of a tokenised data set to the features of a batch; the trainer cuts and pads micro-batches itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from fastdpo.data.errors import PreferenceDataError
from fastdpo.data.pretokenized import ID_COLUMNS


class ExampleCollator:
    """Examples of a tokenised data set to one batch, without padding.

    Called with B examples that have prompt_ids, the completions' columns and example_id, it gives for each column of
    token ids, under `key(column)`, a list of B int64 CPU tensors, each (tokens,), and "example_ids": a list of B
    strings. Raises PreferenceDataError when a column is missing or the list is empty.

    Args:
        completion_columns: columns of token ids beside prompt_ids.
        prefix: of the keys.
    """

    def __init__(self, completion_columns: Sequence[str], prefix: str = "example_") -> None:
        self.columns, self.prefix = ("prompt_ids", *completion_columns), prefix

    def key(self, column: str) -> str:
        """The key of a column of token ids.

        Never `input_ids`: transformers.Trainer counts tokens through that key and expects a tensor there.
        """
        return self.prefix + column

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, list[torch.Tensor] | list[str]]:
        if not examples:
            raise PreferenceDataError("a batch needs at least one example")
        missing = [name for name in (*self.columns, "example_id") if name not in examples[0]]
        if missing:
            raise PreferenceDataError(
                f"the examples have no {missing} (found: {sorted(examples[0])}); pass the dataset through "
                "tokenize_preferences, and keep remove_unused_columns off"
            )
        batch: dict[str, list[torch.Tensor] | list[str]] = {
            self.key(name): [torch.as_tensor(example[name], dtype=torch.int64) for example in examples]
            for name in self.columns
        }
        batch["example_ids"] = [str(example["example_id"]) for example in examples]
        return batch


class PreferenceCollator(ExampleCollator):
    """Pairs of a tokenised data set to one batch: "pair_prompt_ids", "pair_chosen_ids", "pair_rejected_ids" and
    "example_ids"."""

    def __init__(self) -> None:
        super().__init__(ID_COLUMNS[1:], prefix="pair_")
