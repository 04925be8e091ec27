"""Attention in tiles on a CPU: against a softmax under the dense mask, bytes by hand, what is left to SDPA."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.utils.checkpoint import checkpoint

from fastdpo.training.memory.counting import LiveBytes, workspaces
from fastdpo.training.rows import attention, tiled_attention
from fastdpo.training.rows.attention import Segment, Segments, _masked, _per_segment, dense_mask, segment_attention

HEADS, DEPTH = 9, 8
#: Two rows of 40: a prompt with three answers and a lone token; a pair, in which the prefix is shorter than the answer.
ITEMS = [
    Segment(0, 19), Segment(19, 24, 0, 12), Segment(24, 33, 0, 12), Segment(33, 34),
    Segment(40, 60), Segment(60, 76, 40, 41),
]  # fmt: skip


def leaves(rows: int, width: int, kv_heads: int, seed: int = 0, depth: int = DEPTH, **options: Any) -> list[Tensor]:
    """q, k and v (R, T, heads · D), as projections give them."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(rows, width, count * depth) for count in (HEADS, kv_heads, kv_heads)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(**options) for shape in shapes]


def attend(function: Any, inputs: list[Tensor], *options: Any, depth: int = DEPTH) -> Tensor:
    """(R, T, heads · D)."""
    heads = [x.unflatten(-1, (-1, depth)).transpose(1, 2) for x in inputs]
    return function(*heads, *options).flatten(2)


def softmax(q: Tensor, k: Tensor, v: Tensor, segments: Segments, scale: float | None, window: int | None) -> Tensor:
    """Under the dense mask, all products in full; 0 where no segment has a query."""
    k, v = (x.repeat_interleave(HEADS // x.shape[1], 1) for x in (k, v))
    scores = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    out = scores.masked_fill(~dense_mask(segments, window), -torch.inf).softmax(-1) @ v
    queried = torch.zeros(segments.rows * segments.width, 1, 1, dtype=q.dtype)
    for item in segments.items:
        queried[item.start : item.stop] = 1
    return out.transpose(1, 2) * queried.unflatten(0, (segments.rows, segments.width))


def with_gradients(function: Any, inputs: list[Tensor], upstream: Tensor, *options: Any, **named: Any) -> list[Tensor]:
    inputs = [x.detach().requires_grad_() for x in inputs]
    out = attend(function, inputs, *options, **named)
    return [out.detach(), *torch.autograd.grad(out, inputs, upstream.to(out.dtype))]


@st.composite
def rows_of_segments(draw: st.DrawFn) -> Segments:
    """Rows of prompts with up to three answers each, packed with or without gaps, and filled up."""
    lengths = st.integers(1, 14)
    every_row = []
    for _ in range(draw(st.integers(1, 2))):
        items, at = [], draw(st.integers(0, 2))
        for _ in range(draw(st.integers(1, 3))):
            prompt, first = draw(st.integers(0, 14)), draw(lengths)
            items.append((at, at + prompt + first, 0, 0))
            beginning, at = at, at + prompt + first
            for answer in draw(st.lists(lengths, max_size=2)):
                shared = (beginning, beginning + prompt) if prompt else (0, 0)
                items.append((at, at + answer, *shared))
                at += answer
            at += draw(st.integers(0, 2))
        every_row.append((items, at))
    width = max(at for _, at in every_row)
    flat = [
        Segment(
            *(
                bound + row * width if stop > 0 else 0
                for bound, stop in zip(item, (1, 1, item[3], item[3]), strict=True)
            )
        )
        for row, (items, _) in enumerate(every_row)
        for item in items
    ]
    return Segments.build(len(every_row), width, flat)


@settings(max_examples=60, deadline=None)
@given(
    segments=rows_of_segments(),
    kv_heads=st.sampled_from([1, 3, 9]),
    tile=st.sampled_from([1, 3, 5, 64]),
    scale=st.sampled_from([None, 0.7, 60.0]),
    seed=st.integers(0, 2**16),
)
def test_tiles_are_a_softmax_under_the_dense_mask(
    segments: Segments, kv_heads: int, tile: int, scale: float | None, seed: int
) -> None:
    """In float64, whatever the tiles; at a scale of 60 a hidden key's exponential would be infinite."""
    inputs = leaves(segments.rows, segments.width, kv_heads, seed)
    upstream = torch.randn(inputs[0].shape, generator=torch.Generator().manual_seed(seed + 1), dtype=torch.float64)
    expected = with_gradients(softmax, inputs, upstream, segments, scale, None)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(tiled_attention, "TILE", tile)
        found = with_gradients(_per_segment, inputs, upstream, segments, scale, None)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


def in_norm(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("few", [1, 768])
@pytest.mark.parametrize(
    ("dtype", "forward", "backward"),
    [(torch.float32, 1e-6, 1e-6), (torch.bfloat16, 8e-3, 1.2e-2), (torch.float16, 1e-3, 1.5e-3)],
)
def test_error_of_each_dtype(
    dtype: torch.dtype, forward: float, backward: float, few: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In norm, with a 16-bit tile's backward in its own dtype (few = 1) and in float32: rounding q, k, v, the weights
    of a part and what is merged or added up, each by half a unit in the last place (2⁻⁹ of bfloat16, 2⁻¹² of
    float16)."""
    monkeypatch.setattr(tiled_attention, "TILE", 7)
    monkeypatch.setattr(tiled_attention, "TILE_16_BITS", 9)
    monkeypatch.setattr(tiled_attention, "_FEW_QUERIES", few)
    kernel, computed = tiled_attention._flash_backward, set()

    def noted(*operands: Any, **options: Any) -> Any:
        computed.update(x.dtype for x in operands[:5])
        return kernel(*operands, **options)

    monkeypatch.setattr(tiled_attention, "_flash_backward", noted)
    segments = Segments.build(2, 40, ITEMS)
    inputs = leaves(2, 40, 3, dtype=dtype)
    upstream = leaves(2, 40, 3, seed=1, dtype=dtype)[0]
    expected = with_gradients(softmax, [x.double() for x in inputs], upstream, segments, None, None)
    found = with_gradients(_per_segment, inputs, upstream, segments, None, None)
    assert all(x.dtype == dtype for x in found)
    assert computed == {dtype if few == 1 else torch.float32}
    assert in_norm(found[0], expected[0]) < forward
    assert max(map(in_norm, found[1:], expected[1:])) < backward


def test_autocast_and_recomputation() -> None:
    """Autocast gives what its dtype gives; a checkpointed layer recomputes to the same gradients."""
    segments = Segments.build(2, 40, ITEMS)
    inputs = leaves(2, 40, 3, dtype=torch.float32)
    module = torch.nn.Identity()

    def layer(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return segment_attention(module, q, k, v, None, segments=segments)[0]

    with torch.autocast("cpu", torch.bfloat16):
        cast = attend(layer, inputs)
    assert torch.equal(cast, attend(layer, [x.bfloat16() for x in inputs]))
    expected = with_gradients(layer, inputs, inputs[0])

    def recomputed(*heads: Tensor) -> Tensor:
        return checkpoint(layer, *heads, use_reentrant=False)

    assert all(map(torch.equal, with_gradients(recomputed, inputs, inputs[0]), expected))


def counted(
    pair: tuple[int, int, int], kv_heads: int, depth: int, dtype: torch.dtype, *, own: bool = False
) -> tuple[LiveBytes, Tensor]:
    """Bytes alive over forward and backward of one pair, beyond q, k, v and the output's gradient. own: what is called
    within the operators, in the place of what is counted for them."""
    prompt, chosen, _ = pair
    width = sum(pair)
    items = [Segment(0, prompt + chosen), Segment(prompt + chosen, width, 0, prompt)]
    with unset_fake_temporarily():
        segments = Segments.build(1, width, items)
    inputs = [x.requires_grad_() for x in leaves(1, width, kv_heads, depth=depth, dtype=dtype)]
    upstream = torch.ones_like(inputs[0], requires_grad=False)
    with LiveBytes(None if own else workspaces()) as live:
        if own:
            flat = [x.detach()[0].unflatten(-1, (-1, depth)) for x in inputs]
            bounds = [bound for item in items for bound in item]
            out, lse = tiled_attention.forward(*flat, bounds, 1.0)
            grad = upstream[0].unflatten(-1, (-1, depth))
            kept = tiled_attention.backward(grad, *flat, out, lse, bounds, 1.0)
        else:
            out = attend(_per_segment, inputs, segments, None, None, depth=depth)
            kept = torch.autograd.grad(out, inputs, upstream)
    del kept
    return live, out


@pytest.mark.parametrize("fake", [False, True])
@pytest.mark.parametrize("prompt", [100, 700])
def test_bytes_at_the_peak(prompt: int, fake: bool) -> None:
    """Beyond q, k, v and the output's gradient, which are the caller's: the output, dq, dk, dv, a float32 per query and
    head, and a tile, of 160 queries or of 760 in two pieces: its dq, dk and dv per query head, a copy of its upstream
    gradient, dk and dv of its keys. Real and fake; the output is in the layout that its reader wants."""
    pair, kv_heads, depth = (prompt, 60, 70), 3, 64
    width = sum(pair)
    with FakeTensorMode() if fake else torch.enable_grad():
        live, out = counted(pair, kv_heads, depth, torch.float32)
    whole = 4 * width * (2 * HEADS * depth + 2 * kv_heads * depth + HEADS)
    tile = 4 * (160 if prompt == 100 else 380) * depth * (4 * HEADS + 2 * kv_heads)
    assert live.peak == whole + tile
    assert out.is_contiguous()
    assert out._base is not None, "the output was copied"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("prompt", "kv_heads"), [(500, 9), (700, 1), (700, 9)])
def test_workspaces_hold_what_the_operators_take(prompt: int, kv_heads: int, dtype: torch.dtype) -> None:
    """Counted within them, where the copy that the kernel makes of a tile's gradient is invisible: 576 numbers for each
    of up to 384 queries, or 767 where 16-bit ones are in float32, as all but one tile of 900 are. The bound may be a
    fifth above the sum."""
    pair, depth = (prompt, 400, 300), 64
    (within, _), (bound, _) = (counted(pair, kv_heads, depth, dtype, own=own) for own in (True, False))
    copy = 4 * HEADS * depth * (384 if dtype == torch.float32 else 767)
    assert within.peak <= bound.peak <= 1.2 * (within.peak + copy)


def test_what_the_kernel_does_not_serve_takes_masks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows that hide keys, values of another depth, another device, a torch without the operators; the same numbers
    come of it."""
    segments = Segments.build(2, 40, ITEMS)
    inputs = leaves(2, 40, 3)
    called = []

    def masked(*args: Any) -> Tensor:
        called.append(args)
        return _masked(*args)

    monkeypatch.setattr(attention, "_masked", masked)
    upstream = inputs[0]
    for window in (2, 100):
        expected = with_gradients(softmax, inputs, upstream, segments, None, window)
        found = with_gradients(_per_segment, inputs, upstream, segments, None, window)
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)
        assert len(called) == 1, window
    expected = with_gradients(_per_segment, inputs, upstream, segments, None, None)
    changed = tiled_attention._FORWARD_SCHEMA.replace("dropout_p=0.", "dropout_p=1.")
    assert tiled_attention._operator(tiled_attention._FORWARD_SCHEMA) is tiled_attention._flash is not None
    assert tiled_attention._operator(changed) is None
    assert tiled_attention._operator("aten::no_such_operator(Tensor x) -> Tensor") is None
    monkeypatch.setattr(tiled_attention, "_flash_backward", tiled_attention._operator(changed))
    found = with_gradients(_per_segment, inputs, upstream, segments, None, None)
    assert len(called) == 2
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)
    monkeypatch.undo()
    q, k, v = (torch.empty(1, 2, 4, 8) for _ in range(3))
    assert tiled_attention.serves(q, k, v)
    assert not tiled_attention.serves(q, k, v[..., :4])
    assert not tiled_attention.serves(q, k.double(), v)
    assert not tiled_attention.serves(q.to("meta"), k.to("meta"), v.to("meta"))


def test_a_second_derivative_is_refused() -> None:
    """Under create_graph it would be 0 without a word; the refusal says where there is one."""
    segments = Segments.build(2, 40, ITEMS)
    inputs = [x.requires_grad_() for x in leaves(2, 40, 3)]
    out = attend(_per_segment, inputs, segments, None, None)
    (grad,) = torch.autograd.grad(out.sum(), inputs[:1], create_graph=True)
    with pytest.raises(NotImplementedError, match=r"segment_attention .*create_graph.*attn_implementation='eager'"):
        grad.sum().backward()
