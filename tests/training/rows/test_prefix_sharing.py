"""Rows that hold several sequences, some with one prefix, against one sequence at a time."""

from __future__ import annotations

import os
from contextlib import nullcontext
from pathlib import Path
from typing import Any, ClassVar

import pytest
import tiny
import torch
from families import MODELS, adapted, alone, batch, made
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fastdpo.training.memory.plan import enable_checkpointing
from fastdpo.training.rows import attention
from fastdpo.training.rows.attention import (
    Segment,
    Segments,
    UnsupportedAttention,
    _per_segment,
    _varlen,
    dense_mask,
    segments_active,
)
from fastdpo.training.rows.batch import TokenBatch
from fastdpo.training.rows.layout import PLAIN, Example, Layout, cut
from fastdpo.training.scoring.scorer import CompletionScorer

CPU = torch.device("cpu")
LAYOUTS = [
    Layout(sharing=True, packing=True),
    Layout(sharing=True),
    Layout(packing=True),
    Layout(sharing=True, packing=True, masked=True),
    Layout(sharing=True, masked=True),
]


def pairs_of(*triples: tuple[list[int], list[int], list[int]]) -> TokenBatch:
    return tiny.batch_of(*triples)


#: (prompt, chosen, rejected), and how many tokens of the row both completions share beyond a prompt's own.
ALIKE = [
    ([5, 6, 7], [8, 9, 10, 11], [8, 9, 12, 13, 14], 2),
    ([5, 6, 7], [8, 9], [8, 9, 10, 11], 1),  # one is the beginning of the other; its last token is not read
    ([5, 6, 7], [8, 9, 10, 11], [8], 0),  # nothing of a single token is read
    ([5], [6], [7], 0),
    ([5], [6, 7, 8], [6, 7, 8], 2),  # the same twice
    ([9], [6, 7, 8], [7], 0),
]


def log_probs(model: Any, pair: Example) -> tuple[Tensor, Tensor]:
    """Of the chosen and of the rejected completion alone, in float64."""
    return tuple(alone(model, pair.prompt, ids) for ids in pair.completions)  # type: ignore[return-value]


def weights_of(pair: Example) -> tuple[Tensor, Tensor]:
    """Some dL/dlogp for each token of a pair."""
    return tuple(torch.linspace(-1.5, 1.0, len(ids)) + 0.1 * len(ids) for ids in pair.completions)  # type: ignore[return-value]


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


# The mask


def sequences_of(items: list[Segment]) -> list[tuple[int, list[int]]]:
    """(first own index, flat positions of a whole sequence in order) of each segment, written out."""
    return [
        (i.prefix_stop - i.prefix_start, [*range(i.prefix_start, i.prefix_stop), *range(i.start, i.stop)])
        for i in items
    ]


#: Two rows of 12, filled up with two tokens each: a pair; a lone sequence and a pair.
ROWS, WIDTH = 2, 12
ITEMS = [
    Segment(0, 6), Segment(6, 10, 0, 4),
    Segment(12, 15), Segment(15, 19), Segment(19, 22, 15, 17),
]  # fmt: skip


@pytest.mark.parametrize("window", [None, 1, 3, 100])
def test_dense_mask_by_sequence_and_position(window: int | None) -> None:
    expected = torch.zeros(ROWS * WIDTH, ROWS * WIDTH, dtype=torch.bool)
    for own, tokens in sequences_of(ITEMS):
        for i, query in enumerate(tokens):
            for j, key in enumerate(tokens):
                if i >= own and j <= i and (window is None or i - j < window):
                    expected[query, key] = True
    for row in (10, 11, 22, 23):
        expected[row, row] = True  # filler
    blocks = torch.stack([expected[:12, :12], expected[12:, 12:]])[:, None]
    assert int(expected.sum()) == int(blocks.sum()), "a token sees another row"
    assert torch.equal(dense_mask(Segments.build(ROWS, WIDTH, ITEMS, CPU), window), blocks)


# The path of GPUs


def reference_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
) -> Tensor:
    """What torch documents of `varlen_attn`: (tokens, heads, D); sequence s has queries [cu_seq_q[s], cu_seq_q[s + 1])
    and keys likewise; query i of m sees key j of n if −left ≤ j − i − (n − m) ≤ right, where −1 is no bound."""
    assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32
    if query.shape[1] != key.shape[1]:
        assert enable_gqa
        key, value = (x.repeat_interleave(query.shape[1] // key.shape[1], 1) for x in (key, value))
    left, right = window_size
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    outputs = []
    bounds = zip(cu_seq_q.tolist(), cu_seq_q.tolist()[1:], cu_seq_k.tolist(), cu_seq_k.tolist()[1:], strict=False)
    for q_start, q_stop, k_start, k_stop in bounds:
        m, n = q_stop - q_start, k_stop - k_start
        assert 0 < m <= max_q
        assert n <= max_k
        distance = torch.arange(n)[None] - torch.arange(m)[:, None] - (n - m)
        seen = torch.ones(m, n, dtype=torch.bool)
        if left >= 0:
            seen &= distance >= -left
        if right >= 0:
            seen &= distance <= right
        scores = torch.einsum("qhd,khd->hqk", query[q_start:q_stop], key[k_start:k_stop]) * scale
        weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
        outputs.append(torch.einsum("hqk,khd->qhd", weights, value[k_start:k_stop]))
    assert q_stop == len(query)
    assert k_stop == len(key)
    return torch.cat(outputs)


@pytest.mark.parametrize("scale", [None, 0.7])
@pytest.mark.parametrize("window", [None, 1, 3])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("filler", [True, False])
def test_both_kernels_compute_the_same(
    filler: bool, kv_heads: int, window: int | None, scale: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Values and gradients of `_varlen`, over plain attention of variable lengths, and of `_per_segment`; and both are
    a softmax under the dense mask."""
    monkeypatch.setattr(attention, "varlen_attn", reference_varlen)
    items, rows = (ITEMS, ROWS) if filler else ([Segment(0, 7), Segment(7, 12, 0, 4)], 1)
    segments = Segments.build(rows, WIDTH, items, CPU)
    assert (segments.query_index is None) is not filler
    generator = torch.Generator().manual_seed(0)

    def leaf(heads: int) -> Tensor:
        return torch.randn(rows, heads, WIDTH, 8, generator=generator, dtype=torch.float64).requires_grad_()

    inputs = leaf(4), leaf(kv_heads), leaf(kv_heads)

    def masked(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> Tensor:
        k, v = (x.repeat_interleave(4 // kv_heads, 1) for x in (k, v))
        scores = q @ k.transpose(-1, -2) * (8**-0.5 if scale is None else scale)
        out = scores.masked_fill(~dense_mask(segments, window), -torch.inf).softmax(-1) @ v
        queried = torch.zeros(rows * WIDTH, 1, 1, dtype=torch.float64)
        for item in items:
            queried[item.start : item.stop] = 1
        return out.transpose(1, 2) * queried.unflatten(0, (rows, WIDTH))

    weights = torch.randn(rows, WIDTH, 4, 8, generator=generator, dtype=torch.float64)
    results = []
    for attend in (masked, _per_segment, _varlen):
        out = attend(*inputs, segments, scale, window)
        results.append((out, *torch.autograd.grad((weights * out).sum(), inputs)))
    for other in results[1:]:
        for found, expected in zip(other, results[0], strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kv_heads", [2, 4])
def test_varlen_of_torch_2_11(kv_heads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which takes fewer heads of keys as they are and has no argument to say so; from 2.12 on it has to be told."""
    told = []

    def varlen_2_11(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        cu_seq_q: Tensor,
        cu_seq_k: Tensor,
        max_q: int,
        max_k: int,
        *,
        return_aux: Any = None,
        scale: float | None = None,
        window_size: tuple[int, int] = (-1, -1),
    ) -> Tensor:
        assert return_aux is None
        bounds = cu_seq_q, cu_seq_k, max_q, max_k
        return reference_varlen(query, key, value, *bounds, scale=scale, window_size=window_size, enable_gqa=True)

    def varlen_2_12(*args: Any, enable_gqa: bool = False, **kwargs: Any) -> Tensor:
        told.append(enable_gqa)
        return reference_varlen(*args, enable_gqa=enable_gqa, **kwargs)

    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(ROWS, heads, WIDTH, 8, generator=generator) for heads in (4, kv_heads, kv_heads))
    segments = Segments.build(ROWS, WIDTH, ITEMS, CPU)
    expected = _per_segment(q, k, v, segments, None, 3)
    for varlen in (varlen_2_11, varlen_2_12):
        monkeypatch.setattr(attention, "varlen_attn", varlen)
        monkeypatch.setattr(attention, "_ASKS_FOR_GQA", attention.asks_for_gqa(varlen))
        torch.testing.assert_close(_varlen(q, k, v, segments, None, 3), expected)
    assert told == [kv_heads != 4]
    installed = torch.torch_version.TorchVersion(torch.__version__)
    assert attention.asks_for_gqa(torch.nn.attention.varlen.varlen_attn) is (installed >= (2, 12))


def test_nothing_is_gathered_where_nothing_is_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys and values are the model's own memory then; a filler position or a shared prefix takes a copy."""
    given: list[Tensor] = []

    def varlen(*args: Any, **kwargs: Any) -> Tensor:
        given.extend(args[:3])
        return reference_varlen(*args, **kwargs)

    monkeypatch.setattr(attention, "varlen_attn", varlen)
    q, k, v = (torch.randn(1, 2, 9, 8, generator=torch.Generator().manual_seed(i)) for i in range(3))
    cases = {
        (Segment(0, 4), Segment(4, 9)): (True, True),
        (Segment(0, 4), Segment(4, 9, 0, 2)): (True, False),
        (Segment(0, 4), Segment(4, 8)): (False, False),
    }
    for items, (queries, keys) in cases.items():
        segments = Segments.build(1, 9, items, CPU)
        given.clear()
        torch.testing.assert_close(_varlen(q, k, v, segments, None, None), _per_segment(q, k, v, segments, None, None))
        shared = [x.data_ptr() == own.data_ptr() for x, own in zip(given, (q, k, v), strict=True)]
        assert shared == [queries, keys, keys]
        assert (segments.query_index is None, segments.key_index is None) == (queries, keys)


class _Deterministic(torch.autograd.Function):
    """The identity, whose backward notes whether torch is deterministic then."""

    seen: ClassVar[list[tuple[bool, bool]]] = []

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        warns = torch.is_deterministic_algorithms_warn_only_enabled()
        _Deterministic.seen.append((torch.are_deterministic_algorithms_enabled(), warns))
        return grad


@pytest.mark.parametrize("wanted", [False, True])
def test_deterministic_attention(wanted: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Flash's backward reads torch's flag when it runs; afterwards the flag is as it was."""
    monkeypatch.setattr(_Deterministic, "seen", [])
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "taken back afterwards")
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    attend = attention._per_segment
    monkeypatch.setattr(attention, "_per_segment", lambda *args: _Deterministic.apply(attend(*args)))
    trainer = tiny.trainer(tmp_path, max_steps=1, deterministic_attention=wanted, micro_batch_tokens="60")
    trainer.train()
    assert set(_Deterministic.seen) == {(wanted, False)}
    assert os.environ.get("CUBLAS_WORKSPACE_CONFIG") == (":4096:8" if wanted else None)
    filled = torch.utils.deterministic.fill_uninitialized_memory

    def failing() -> None:
        with attention.deterministic(wanted):
            raise KeyError(torch.are_deterministic_algorithms_enabled())

    with pytest.raises(KeyError, match=str(wanted)):
        failing()
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.utils.deterministic.fill_uninitialized_memory is filled
    assert tiny.config(tmp_path, full_determinism=wanted).deterministic_attention is wanted


def test_what_segments_cannot_express_is_refused() -> None:
    segments = Segments.build(1, 4, [Segment(0, 4)], CPU)
    q = torch.zeros(1, 2, 4, 8)
    module = torch.nn.Linear(1, 1)
    cases = [
        ({"segments": None}, "Linear called fastdpo_segments without segments"),
        ({"dropout": 0.1}, "dropout"),
        ({"softcap": 30.0}, "softcap"),
        ({"s_aux": torch.zeros(2)}, "s_aux"),
        ({"attention_mask": torch.ones(1, 1, 4, 4)}, "attention_mask"),
    ]
    for change, message in cases:
        arguments = {"segments": segments, "attention_mask": None, "is_causal": True, "softcap": None} | change
        mask = arguments.pop("attention_mask")
        with pytest.raises(UnsupportedAttention, match=message):
            attention.segment_attention(module, q, q, q, mask, **arguments)
    with pytest.raises(UnsupportedAttention, match="attends from 4 to 6 tokens where 4 were given"):
        attention.segment_attention(module, q, torch.zeros(1, 2, 6, 8), q, None, segments=segments)


# The cut


def of_lengths(*lengths: int) -> list[Example]:
    """Pairs of so many tokens in a row that shares their prompt, with nothing else in common."""
    return [Example(torch.arange(n - 2), (torch.tensor([1, 2]), torch.tensor([3, 4]))) for n in lengths]


def test_first_fit_decreasing() -> None:
    """Lengths 3 9 5 4 6 12 2 against a budget of 10: 12 alone | 9 | 6 4 | 5 3 2."""
    pairs = of_lengths(3, 9, 5, 4, 6, 12, 2)
    layout = Layout(sharing=True, packing=True)
    assert [pair.tokens(layout) for pair in pairs] == [3, 9, 5, 4, 6, 12, 2]
    assert cut(pairs, range(7), layout, 10) == [[5], [1], [4, 3], [2, 0, 6]]
    assert cut(pairs, [0, 2, 3], layout, 8) == [[2, 0], [3]]
    assert cut(pairs, range(7), layout, 1) == [[5], [1], [4], [2], [3], [0], [6]]
    # In rows of their own, padded to the longest: 12 | 9 | 6 | 5 4 | 3 2
    assert cut(pairs, range(7), Layout(sharing=True), 10) == [[5], [1], [4], [2, 3], [0, 6]]


IDS = st.lists(st.integers(1, 3), min_size=1, max_size=9).map(torch.tensor)
PAIRS = st.lists(st.builds(Example, IDS, st.tuples(IDS, IDS)), min_size=1, max_size=12)


@given(pairs=PAIRS, budget=st.integers(1, 80), layout=st.sampled_from([PLAIN, *LAYOUTS]))
def test_every_pair_is_cut_once_and_within_the_budget(pairs: list[Example], budget: int, layout: Layout) -> None:
    pairs_batch = pairs_of(*((p.prompt.tolist(), *(ids.tolist() for ids in p.completions)) for p in pairs))
    micros = pairs_batch.cut(budget, None, layout)
    assert sorted(index for micro in micros for index in micro.indices.tolist()) == list(range(len(pairs)))
    for micro in micros:
        assert len(micro) == 1 or micro.input_ids.numel() <= budget
        if len(micro) == 1:
            assert micro.input_ids.numel() == pairs[int(micro.indices)].tokens(layout)
        completions = [pairs[i].completions[side] for side in (0, 1) for i in micro.indices.tolist()]
        assert micro.targets.tolist() == torch.cat(completions).tolist()
        # What is read to predict a token is the token before it, and its position is that of the sequence
        read, place = [], []
        for index, completion in zip(micro.indices.tolist() * 2, completions, strict=True):
            prompt = pairs[index].prompt
            whole = torch.cat([prompt, completion])
            read += whole[len(prompt) - 1 : -1].tolist()
            place += range(len(prompt) - 1, len(whole) - 1)
        assert micro.input_ids.flatten()[micro.score_rows].tolist() == read
        if micro.position_ids is not None:
            assert micro.position_ids.flatten()[micro.score_rows].tolist() == place


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
