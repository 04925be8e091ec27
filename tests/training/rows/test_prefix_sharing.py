"""Rows that hold several sequences, some with one prefix, against one sequence at a time."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import tiny
import torch
from families import MODELS, adapted, alone, batch, made
from packed_rows import LAYOUTS, pairs_of
from torch import Tensor

from fastdpo.training.memory.plan import enable_checkpointing
from fastdpo.training.rows import Example, Layout, TokenBatch
from fastdpo.training.rows.attention import Segment, UnsupportedAttention, segments_active
from fastdpo.training.scoring import CompletionScorer

#: (prompt, chosen, rejected), and how many tokens of the row both completions share beyond a prompt's own.
ALIKE = [
    ([5, 6, 7], [8, 9, 10, 11], [8, 9, 12, 13, 14], 2),
    ([5, 6, 7], [8, 9], [8, 9, 10, 11], 1),  # one is the beginning of the other; its last token is not read
    ([5, 6, 7], [8, 9, 10, 11], [8], 0),  # nothing of a single token is read
    ([5], [6], [7], 0),
    ([5], [6, 7, 8], [6, 7, 8], 2),  # the same twice
    ([9], [6, 7, 8], [7], 0),
]


def log_probs(model: Any, pair: Example) -> tuple[Tensor, ...]:
    """Of the chosen and of the rejected completion alone, in float64."""
    return tuple(alone(model, pair.prompt, ids) for ids in pair.completions)


def weights_of(pair: Example) -> tuple[Tensor, ...]:
    """Some dL/dlogp for each token of a pair."""
    return tuple(torch.linspace(-1.5, 1.0, len(ids)) + 0.1 * len(ids) for ids in pair.completions)


class Truth:
    """Token log-probs of every pair, and the gradients of their weighted sum, one sequence in each forward."""

    def __init__(self, model: Any, pairs: TokenBatch) -> None:
        self.pairs = pairs
        logps = [log_probs(model, pair) for pair in pairs.examples]
        self.logps = [[each.detach() for each in pair] for pair in logps]
        model.zero_grad()
        sum(
            (weight * each).sum()
            for pair, found in zip(pairs.examples, logps, strict=True)
            for weight, each in zip(weights_of(pair), found, strict=True)
        ).backward()
        self.grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    def compare(self, model: Any, scorer: CompletionScorer, layout: Layout, budget: int) -> None:
        """Log-probs to 1e-4, gradients to 1e-4 of the largest."""
        model.zero_grad()
        seen = []
        with nullcontext() if layout.masked or layout.plain else segments_active([model]):
            for micro in self.pairs.cut(budget, None, layout):
                logps = scorer.tokens(model, micro).logps
                weights = torch.zeros_like(logps)
                for row, index in enumerate(micro.indices.tolist()):
                    seen.append(index)
                    of_pair = weights_of(self.pairs.examples[index])
                    for side, at in enumerate((row, row + len(micro))):
                        expected = self.logps[index][side]
                        torch.testing.assert_close(
                            logps[at, : len(expected)].double(), expected, rtol=0, atol=1e-4, msg=f"pair {index}"
                        )
                        weights[at, : len(expected)] = of_pair[side]
                (weights * logps).sum().backward()
        assert sorted(seen) == list(range(len(self.pairs)))
        scale = max(float(grad.abs().max()) for grad in self.grads.values())
        found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        assert found.keys() == self.grads.keys()
        for name, grad in self.grads.items():
            torch.testing.assert_close(
                found[name], grad, rtol=0, atol=1e-4 * scale, msg=lambda text, name=name: f"{name}: {text}"
            )


@pytest.mark.parametrize("name", MODELS)
def test_log_probs_and_gradients_of_every_layout(name: str) -> None:
    model = adapted(made(name))
    scorer = CompletionScorer()
    scorer.heads.read(model)  # it probes the model, which attends in its own way there
    truth = Truth(model, batch())
    own = model.config._attn_implementation
    for layout in LAYOUTS:
        for budget in (60, 10_000):
            if name == "Gemma2" and not layout.masked:
                with pytest.raises(UnsupportedAttention, match="Gemma2Attention gives its attention softcap"):
                    truth.compare(model, scorer, layout, budget)
            else:
                truth.compare(model, scorer, layout, budget)
            assert model.config._attn_implementation == own


@pytest.mark.parametrize("name", ["Llama", "Gemma3", "GPT-2"])
def test_recomputed_layers_get_the_segments_too(name: str) -> None:
    model = adapted(made(name))
    scorer = CompletionScorer()
    scorer.heads.read(model)
    truth = Truth(model, batch())
    enable_checkpointing(model, {"use_reentrant": False})
    calls = []
    layer = next(m for n, m in model.named_modules() if n.endswith((".layers.0", ".h.0")))
    recomputed = next(m for m in layer.modules() if isinstance(m, torch.nn.Linear) or type(m).__name__ == "Conv1D")
    recomputed.register_forward_hook(lambda *_: calls.append(True))
    for layout in LAYOUTS:
        truth.compare(model, scorer, layout, 10_000)
    assert len(calls) == 2 * len(LAYOUTS), "nothing was recomputed"


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_completions_that_begin_alike(layout: Layout) -> None:
    pairs = pairs_of(*(each[:3] for each in ALIKE))
    model = adapted(made("Gemma3"))
    scorer = CompletionScorer()
    scorer.heads.read(model)
    truth = Truth(model, pairs)
    for budget in (1, 20, 10_000):
        truth.compare(model, scorer, layout, budget)
    for pair, (prompt, chosen, rejected, shared) in zip(pairs.examples, ALIKE, strict=True):
        # The last token of a completion predicts nothing and is left out
        whole = 2 * len(prompt) + len(chosen) - 1 + len(rejected) - 1
        assert pair.tokens(layout) == whole - (len(prompt) + shared) * layout.sharing


def test_the_row_of_a_pair() -> None:
    """prompt 5 6 7, chosen 8 9 10, rejected 8 11 12 13: both read 5 6 7 8, then 9, and 11 12."""
    (micro,) = pairs_of(([5, 6, 7], [8, 9, 10], [8, 11, 12, 13])).cut(100, None, Layout(True, True))
    assert micro.input_ids.tolist() == [[5, 6, 7, 8, 9, 11, 12]]
    assert micro.position_ids.tolist() == [[0, 1, 2, 3, 4, 4, 5]]
    # 8 is predicted at 7, 9 at 8, 10 at 9; then 8 at 7, 11 at 8, 12 at 11, 13 at 12
    assert micro.score_rows.tolist() == [2, 3, 4, 2, 3, 5, 6]
    assert micro.targets.tolist() == [8, 9, 10, 8, 11, 12, 13]
    assert micro.completion_mask.tolist() == [[True] * 3 + [False], [True] * 4]
    assert micro.segments.items == (Segment(0, 5), Segment(5, 7, 0, 4))
    (apart,) = pairs_of(([5, 6, 7], [8, 9, 10], [8, 11, 12, 13])).cut(100, None, Layout(packing=True))
    assert apart.input_ids.tolist() == [[5, 6, 7, 8, 9, 5, 6, 7, 8, 11, 12]]
    assert apart.position_ids.tolist() == [[0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 5]]
    assert apart.score_rows.tolist() == [2, 3, 4, 7, 8, 9, 10]
    assert apart.segments.items == (Segment(0, 5), Segment(5, 11))


def test_rows_of_two_pairs() -> None:
    """The longer pair first; packed side by side, or in a row each, which is filled up."""
    pairs = pairs_of(([1], [2, 3], [4]), ([5, 6], [7, 8], [9, 10, 11]))
    (packed,) = pairs.cut(100, None, Layout(True, True))
    assert packed.indices.tolist() == [1, 0]
    assert packed.input_ids.tolist() == [[5, 6, 7, 9, 10, 1, 2]]
    assert packed.position_ids.tolist() == [[0, 1, 2, 2, 3, 0, 1]]
    # Chosen of both pairs, then rejected of both
    assert packed.score_rows.tolist() == [1, 2, 5, 6, 1, 3, 4, 5]
    assert packed.targets.tolist() == [7, 8, 2, 3, 9, 10, 11, 4]
    (rows,) = pairs.cut(100, None, Layout(True))
    assert rows.input_ids.tolist() == [[5, 6, 7, 9, 10], [1, 2, 0, 0, 0]]
    assert rows.score_rows.tolist() == [1, 2, 5, 6, 1, 3, 4, 5]


# The cut


def test_no_token_of_another_sequence_is_seen() -> None:
    """Other ids in one pair of a packed row leave the others' log-probs as they were, to the bit."""
    model = tiny.llama(vocab_size=97).eval()
    scorer = CompletionScorer()
    scorer.heads.read(model)
    first, second = batch(), batch()
    for ids in (second.examples[2].prompt, *second.examples[2].completions):
        ids.fill_(50)
    with torch.no_grad(), segments_active([model]):
        (micro,), (changed,) = (each.cut(10_000, None, Layout(packing=True)) for each in (first, second))
        expected, found = scorer.tokens(model, micro).logps, scorer.tokens(model, changed).logps
    others = [i for i, index in enumerate(micro.indices.tolist() * 2) if index != 2]
    assert micro.indices.tolist() == changed.indices.tolist()
    assert torch.equal(expected[others], found[others])
    assert not torch.equal(expected, found)
