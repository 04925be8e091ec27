"""Long rows follow from four short ones, place by place: equal to a count of their own, with and without slices."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaConfig

from fastdpo.estimate.activations import count_live, micro_batch
from fastdpo.estimate.counter import ConfigCounter, RowForm, Training
from fastdpo.estimate.holders import holders
from fastdpo.estimate.rows import PairShape, Row
from fastdpo.ops.linear_logprob.tiles import WORKSPACE
from fastdpo.training.body import Tiles
from fastdpo.training.memory.counting import LiveBytes, flash_backward_workspace, workspaces
from fastdpo.training.memory.head_workspace import head_workspace_of
from fastdpo.training.options import ModelConfig

SIZES: dict[str, Any] = {
    "vocab_size": 211, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 10**5,
}  # fmt: skip


def counter(lean: str, *, flash: bool = True) -> ConfigCounter:
    """With a lean body, in slices of 64 tokens."""
    made = ConfigCounter(
        LlamaConfig(**SIZES),
        Training(ModelConfig(lora_r=4), torch.float32, flash=flash, checkpointing=True, lean_body=lean),
    )
    for skeleton in made.skeletons:
        if skeleton.lean is not None:
            skeleton.lean.tiles = Tiles(bytes=1, least=64)
    return made


@given(st.integers(1, 300), st.integers(1, 300), st.integers(2, 50), st.integers(1, 40))
def test_weights_of_a_form_give_back_the_row(prompt: int, completion: int, size: int, pairs: int) -> None:
    shape = PairShape(prompt, completion)
    row, form = Row(pairs * shape.tokens + pairs % 3, shape), RowForm(shape, 64 * size)
    weights = form.weights(row)
    for what in ("tokens", "scored", "sequences"):
        assert sum(w * getattr(each, what) for w, each in zip(weights, form.rows, strict=True)) == getattr(row, what)
    assert sum(weights) == 1


@pytest.mark.parametrize("lean", ["off", "on"])
@pytest.mark.parametrize(
    "row",
    [  # whole slices of 64 tokens, so that all of them are of full size
        Row(64 * 45, PairShape(64 * 15, 64 * 15)),
        Row(64 * 50, PairShape(64 * 2, 64 * 24)),
        Row(64 * 48, PairShape(128, 128)),
    ],
)
def test_a_long_row_is_what_its_own_count_says(lean: str, row: Row) -> None:
    made = counter(lean)
    assert row.tokens > made.form_tokens
    (skeleton,) = made.skeletons
    assert made.count(row) == count_live(skeleton.model, row, **made.options(skeleton))


@pytest.mark.parametrize("flash", [False, True])
def test_the_fullest_place_is_the_peak_of_a_plain_count(flash: bool) -> None:
    """`LiveBytes` knows no places, and hears of the head's workspace from the operators' own arguments."""
    row, made = Row(300, PairShape(100, 100)), counter("on", flash=flash)
    (skeleton,) = made.skeletons
    head = head_workspace_of(on_gpu=flash, workspace=WORKSPACE)
    counted: dict[Any, Any] = {**workspaces(), torch.ops.fastdpo.linear_logprob.default: head}
    options = made.options(skeleton)
    with micro_batch(skeleton.model, row, **options) as forward, LiveBytes(counted) as scoring, torch.no_grad():
        forward()
    with micro_batch(skeleton.model, row, **options) as forward, LiveBytes(counted) as training:
        forward().sum().backward()
    found = made.count(row)
    assert (found.peak, found.scoring_peak) == (training.peak, scoring.peak)


def test_a_row_that_slices_do_not_divide_takes_no_more_than_is_said() -> None:
    made = counter("on")
    row = Row(64 * 40 + 27, PairShape(851, 868))
    (skeleton,) = made.skeletons
    own = count_live(skeleton.model, row, **made.options(skeleton))
    said = made.count(row)
    assert said.kept == own.kept
    assert own.peak <= said.peak <= 1.02 * own.peak


@pytest.mark.parametrize("lean", ["off", "on"])
def test_holders_are_all_that_is_alive_at_the_peak(lean: str) -> None:
    made, row = counter(lean), Row(64 * 45, PairShape(64 * 15, 64 * 15))
    place, found = holders(made, row)
    peak = made.sites(row).training[place]
    # By share of the prompt in steps of 1/32, hence the tolerance
    assert sum(each.per_token * row.tokens + each.constant for each in found) == pytest.approx(peak, rel=0.01)
    assert made.count(row).peak == peak + made.head.bytes(row.scored, place.operator)


def test_flash_backward_at_the_shape_of_llama_by_hand() -> None:
    """A pair of 2,000 + 2 x 1,000 tokens: 4,000 queries, and 6,000 keys, as the second answer sees the prompt again.
    Float32 of 32 heads of 128 and one number for (4,000 + 2 x 128) queries; two 16-bit gradients of 32 heads of 128 for
    every key, whose own are of 8 heads."""
    row = Row(4000, PairShape(2000, 1000))
    segments = row.segments()
    assert segments.key_index is not None
    assert len(segments.key_index) == 6000
    query, key = (
        torch.empty(n, heads, 128, dtype=torch.bfloat16, device="meta") for n, heads in ((4000, 32), (6000, 8))
    )
    found = flash_backward_workspace(
        query, query, key, key, query, query, segments.query_bounds, segments.key_bounds, 3000, 3000, True, None
    )
    assert found == 4256 * 32 * 129 * 4 + 2 * 6000 * 32 * 128 * 2


def test_only_what_is_needed_is_counted() -> None:
    """A pair alone takes three counts, whatever its length; rows of several pairs a fourth."""
    made = counter("on")
    for tokens in (3001, 9000, 30_000):
        made.count(Row(tokens, PairShape(1, 1).scaled(tokens)), by_form=True)
    assert len(made._counts) == 3
    made.count(Row(9000, PairShape(100, 100)), by_form=True)
    assert len(made._counts) == 4
