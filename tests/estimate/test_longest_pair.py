"""`--longest_pair`: what it refuses, what the host holds, and how a card's memory decides the lean body's slices."""

from __future__ import annotations

import mmap
from typing import Any

import pytest
import torch
from transformers import LlamaConfig

from fastdpo.estimate.counter import Training
from fastdpo.estimate.memory import MemoryEstimator, Run, Surroundings
from fastdpo.estimate.options import EstimateConfig
from fastdpo.estimate.rows import PairShape
from fastdpo.training.options import ModelConfig

SIZES: dict[str, Any] = {
    "vocab_size": 211, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 10**5,
}  # fmt: skip
RUN = Run(PairShape(10, 7), 1, 1, offload=True)


def estimator(tied: bool = False, **overrides: Any) -> MemoryEstimator:
    training = Training(ModelConfig(lora_r=4), torch.float32, flash=True, checkpointing=True, **overrides)
    return MemoryEstimator(LlamaConfig(**SIZES, tie_word_embeddings=tied), training, Surroundings(10**6, "a test"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "longest_pair=True is for cards: name one or several, such as --gpu_memory 12GB"),
        (
            {"gpu_memory": ["8GB"], "micro_batch_tokens": "64"},
            "micro_batch_tokens='64' has no effect here: the longest",
        ),
        ({"gpu_memory": ["8GB"], "per_device_train_batch_size": 3}, "per_device_train_batch_size=3 has no effect here"),
    ],
)
def test_what_the_longest_pair_does_not_depend_on_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EstimateConfig(longest_pair=True, **options)


def test_the_longest_pair_fits_and_a_longer_one_does_not() -> None:
    made = estimator().on_card(10**8)
    pair = made.largest_pair(RUN, 10**8)
    assert pair is not None
    longer = [Run(pair.scaled(pair.tokens + more), 1, 1, offload=True) for more in (0, 32)]
    assert made.total(longer[0]) <= 10**8 < made.total(longer[1])


def test_a_card_that_the_weights_fill_is_told_without_a_count(monkeypatch: pytest.MonkeyPatch) -> None:
    made = estimator()
    monkeypatch.setattr(made.counter, "count", None)
    assert made.largest_pair(RUN, 10**6) is None


def test_the_host_holds_the_inputs_of_all_layers_and_the_embeddings_in_whole_pages() -> None:
    """4 layers of 24 tokens of 64 float32; the embedding has 211 rows of 64, which leave the card."""
    parts = {part.name: part.bytes for part in estimator(offload_embeddings=True).host_parts(RUN)}
    assert parts == {
        "layer inputs": -(-4 * 24 * 64 * 4 // mmap.PAGESIZE) * mmap.PAGESIZE,
        "embeddings": 211 * 64 * 4,
    }

    def weights(offload: bool) -> int:
        return {part.name: part.bytes for part in estimator(offload_embeddings=offload).resident(True)}["weights"]

    assert weights(False) - weights(True) == 211 * 64 * 4


def test_tied_embeddings_are_refused_as_in_training() -> None:
    with pytest.raises(ValueError, match=r"model_name_or_path, a LlamaForCausalLM, cannot stay .* its weight is tied"):
        estimator(tied=True, offload_embeddings=True)


def test_slices_are_those_of_each_card_and_two_kinds_are_counted() -> None:
    """64 MiB below 10 GB and 128 MiB from there on, for five float32 tensors of 96, in multiples of 64 tokens."""
    made = estimator(lean_body="on")
    slices = {memory: made.on_card(memory * 10**9).counter.skeletons[0].slice_rows() for memory in (6, 8, 12, 24)}
    small, large = 64 * 2**20 // (5 * 96 * 4) // 64 * 64, 128 * 2**20 // (5 * 96 * 4) // 64 * 64
    assert slices == {6: small, 8: small, 12: large, 24: large}
    assert len({id(made.on_card(memory * 10**9)) for memory in (6, 8, 12, 24)}) == 2


def test_two_inputs_of_layers_stay_on_the_card() -> None:
    """Of 4 layers: that of the layer at work, and the one that is on its way."""
    made = estimator()
    kept, away = (
        {part.name: part.bytes for part in made.parts(Run(PairShape(100, 70), 1, 1, offload=offload))}
        for offload in (False, True)
    )
    assert kept["activations"] - away["activations"] == 2 * 240 * 64 * 4


def test_one_more_layer_is_counted_for_one_row_and_says_what_counts_of_their_own_say() -> None:
    made = estimator(lean_body="on").counter
    rows = made.form(PairShape(100, 100)).rows
    found = [made._counted(row) for row in rows]
    assert made._keepers is not None
    for row, each in zip(rows, found, strict=True):
        few, more = (made._at_depth(skeleton, row) for skeleton in made.skeletons)
        layer = {site: more.training[site] - few.training[site] for site in few.training}
        assert each.training == {site: few.training[site] + 2 * layer[site] for site in layer}
