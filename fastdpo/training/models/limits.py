"""What a model's tables hold: token ids, and positions."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from fastdpo.training.models.unwrapped import base_model

_POSITIONS = re.compile(r"pos|wpe")


@dataclass(frozen=True)
class ModelLimits:
    """argument: that gave the model. ids: rows of the input embedding. predicted_ids: of the head. Both may be padded
    beyond the tokenizer's. positions: of a learned table, whose name is `table`; None without one. trained_positions:
    what the configuration says of a model that computes its positions, and could go on; None where it says nothing.
    """

    argument: str
    ids: int
    predicted_ids: int
    positions: int | None = None
    table: str = ""
    trained_positions: int | None = None

    @classmethod
    def of(cls, model: PreTrainedModel, argument: str = "model") -> ModelLimits:
        """Those of a causal LM, with or without an adapter."""
        ids = model.get_input_embeddings().weight.shape[0]
        head: Any = model.get_output_embeddings()
        predicted = getattr(head, "out_features", None) or head.weight.shape[0]  # weights in 4 bit have another shape
        declared = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        tables = {
            name: table.num_embeddings - offset
            for name, table in base_model(model).named_modules()
            if isinstance(table, nn.Embedding) and _POSITIONS.search(name.rsplit(".", 1)[-1])
            for offset in (_offset(table),)
        }
        if tables:
            table = min(tables, key=tables.__getitem__)
            return cls(argument, ids, predicted, tables[table], table)
        return cls(argument, ids, predicted, trained_positions=declared if isinstance(declared, int) else None)


def _offset(table: nn.Embedding) -> int:
    """Rows before that of the first position: OPT's two, or BERT's relatives' padding and what is before it."""
    if isinstance(own := getattr(table, "offset", 0), int) and own:
        return own
    return 0 if table.padding_idx is None else table.padding_idx + 1


def limits_of(model: PreTrainedModel, ref_model: PreTrainedModel | None) -> list[ModelLimits]:
    """Of the models that read a run's rows."""
    return [ModelLimits.of(model), *([] if ref_model is None else [ModelLimits.of(ref_model, "ref_model")])]
