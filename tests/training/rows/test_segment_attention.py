"""Attention within segments: the mask by hand, the path of GPUs against dense attention, and what is refused."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, ClassVar

import pytest
import tiny
import torch
from torch import Tensor

from fastdpo.training.rows import attention
from fastdpo.training.rows.attention import Segment, Segments, UnsupportedAttention, _per_segment, _varlen, dense_mask

CPU = torch.device("cpu")

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
    options = {"deterministic_attention": wanted, "micro_batch_tokens": "60", "lean_body": "off"}
    trainer = tiny.trainer(tmp_path, max_steps=1, **options)
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
    assert tiny.config(tmp_path, full_determinism=wanted).resolved().deterministic_attention is wanted


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
