"""`torch.ops.fastdpo.segment_attention`: causal segments on a CPU, by torch's fused kernel, in tiles without a mask.

    out_i = Σ_j p_ij v_j,   p_ij = exp(s_ij − lse_i),   s_ij = scale · q_i·k_j,   lse_i = log Σ_j exp(s_ij)

over the keys j that a query i sees: its segment's prefix, and its own segment up to itself. A softmax over several
sets of keys is their softmaxes, weighted by what each holds of Σ_j exp(s_ij); so a block of queries attends to the
prefix, to its segment before the block and, causally, to itself, each by one call of the kernel, and the three are
merged by their lse. Backward, ∂s_ij = p_ij (∂out_i·v_j − ∂out_i·out_i) needs the merged out and lse only: any set of
pairs, handed with these to the kernel's backward, gives exactly its share of dq, dk and dv (FlashAttention-2, arXiv
2307.08691, section 3.1), and the shares are added up in place.

The kernel computes all pairs of a causal tile of up to 512 keys. Work: n²/2 + n·prefix pairs of a segment's n queries,
and at most n·tile/2 that are computed and dropped. Memory: q, k, v, out, their gradients, one number per query and
head, and a tile (`forward_workspace`, `backward_workspace`). Of 16-bit tensors, whose products are slow in the backward
of short tiles and whose sums would be rounded at every step, such tiles are computed in float32.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from fastdpo.ops.registry import define

#: Queries and keys of a tile, at most; of 16-bit tensors. More than half as many, in a longer segment: from 192 queries
#: on the kernel works in blocks of 64 queries, from 768 on of 256.
TILE, TILE_16_BITS = 384, 1024
#: Fewer queries of 16-bit tensors than these are differentiated in float32: the kernel's 16-bit products of fewer rows
#: take longer than float32's.
_FEW_QUERIES = 768
_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
#: What is called, to the letter: private operators, which another torch may change.
_FORWARD_SCHEMA = (
    "aten::_scaled_dot_product_flash_attention_for_cpu(Tensor query, Tensor key, Tensor value, float dropout_p=0., "
    "bool is_causal=False, *, Tensor? attn_mask=None, float? scale=None) -> (Tensor output, Tensor logsumexp)"
)
_BACKWARD_SCHEMA = (
    "aten::_scaled_dot_product_flash_attention_for_cpu_backward(Tensor grad_out, Tensor query, Tensor key, "
    "Tensor value, Tensor out, Tensor logsumexp, float dropout_p, bool is_causal, *, Tensor? attn_mask=None, "
    "float? scale=None) -> (Tensor grad_query, Tensor grad_key, Tensor grad_value)"
)


def _operator(schema: str) -> Any:
    """The operator of this schema, or None where this torch has none."""
    packet = getattr(torch.ops.aten, schema.partition("(")[0].removeprefix("aten::"), None)
    return packet.default if packet is not None and str(packet.default._schema) == schema else None


_flash, _flash_backward = _operator(_FORWARD_SCHEMA), _operator(_BACKWARD_SCHEMA)


def serves(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether this torch has the kernel for these: on a CPU, in one floating dtype, of one depth."""
    return (
        _flash is not None
        and _flash_backward is not None
        and query.device.type == "cpu"
        and query.dtype in _DTYPES
        and query.dtype == key.dtype == value.dtype
        and query.shape[-1] == key.shape[-1] == value.shape[-1]
    )


def _quadruples(segments: Sequence[int]) -> list[tuple[int, int, int, int]]:
    """(start, stop, prefix_start, prefix_stop) of each segment."""
    return list(zip(*(segments[i::4] for i in range(4)), strict=True))


def _cuts(start: int, stop: int, size: int) -> Iterator[tuple[int, int]]:
    """[start, stop) in pieces of about equal length, none longer than `size`."""
    count = -(-(stop - start) // size)
    edges = [start + (stop - start) * i // count for i in range(count + 1)] if count else []
    return pairwise(edges)


def tile_of(x: Tensor) -> int:
    """Queries and keys of a tile of such tensors, at most."""
    return TILE_16_BITS if x.element_size() == 2 else TILE


def _dtype_of_tile(queries: int, dtype: torch.dtype) -> torch.dtype:
    """What a tile of so many queries of this dtype is differentiated in."""
    return torch.promote_types(dtype, torch.float32) if queries < _FEW_QUERIES else dtype


def _gaps(tokens: int, segments: Sequence[int]) -> list[tuple[int, int]]:
    """Where no segment has a query."""
    edges = [0, *(edge for start, stop, *_ in _quadruples(segments) for edge in (start, stop)), tokens]
    return [(a, b) for a, b in zip(edges[::2], edges[1::2], strict=True) if a < b]


def _by_heads(x: Tensor, kv_heads: int) -> Tensor:
    """(N, heads, D) or (N, heads) → (kv_heads, groups, N, D) or without the D, a view."""
    return x.unflatten(1, (kv_heads, -1)).movedim(0, 2)


def _shared(x: Tensor, groups: int) -> Tensor:
    """(N, kv_heads, D) → (kv_heads, groups, N, D), a view."""
    return x.transpose(0, 1).unsqueeze(1).expand(-1, groups, -1, -1)


def forward(query: Tensor, key: Tensor, value: Tensor, segments: Sequence[int], scale: float) -> tuple[Tensor, Tensor]:
    """(N, heads, D), twice (N, kv_heads, D) → out (N, heads, D), 0 in gaps, and lse (N, heads) in float32 at least."""
    heads, kv_heads = query.shape[1], key.shape[1]
    outputs = _fake_forward(query, key, value)
    for start, stop in _gaps(len(query), segments):
        for x in outputs:
            x[start:stop] = 0
    q = _by_heads(_dense(query), kv_heads)
    k, v = (_shared(_dense(x), heads // kv_heads) for x in (key, value))
    out, lse = (_by_heads(x, kv_heads) for x in outputs)
    for start, stop, prefix_start, prefix_stop in _quadruples(segments):
        for a, b in _cuts(start, stop, tile_of(query)):
            queries = q[:, :, a:b]
            merged, its_lse = _flash(queries, k[:, :, a:b], v[:, :, a:b], 0.0, True, scale=scale)
            for c, d in ((start, a), (prefix_start, prefix_stop)):
                if c < d:
                    part, other = _flash(queries, k[:, :, c:d], v[:, :, c:d], 0.0, False, scale=scale)
                    share = torch.sigmoid(other - its_lse).unsqueeze(-1)
                    merged = merged.to(lse.dtype).lerp_(part.to(lse.dtype), share)
                    its_lse = torch.logaddexp(its_lse, other)
            out[:, :, a:b] = merged
            lse[:, :, a:b] = its_lse
    return outputs


def backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    segments: Sequence[int],
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """grad and out (N, heads, D), lse (N, heads) → gradients of query, key and value."""
    heads, kv_heads = query.shape[1], key.shape[1]
    grads = _fake_backward(grad, query, key, value)
    for start, stop in _gaps(len(query), segments):
        for x in grads:
            x[start:stop] = 0
    g, q, o, normalizer = (_by_heads(x, kv_heads) for x in (_dense(grad), _dense(query), out, lse))
    k, v = _dense(key), _dense(value)
    d_query, d_key, d_value = _by_heads(grads[0], kv_heads), grads[1].transpose(0, 1), grads[2].transpose(0, 1)
    tile = tile_of(query)

    def add(a: int, b: int, c: int, d: int, causal: bool) -> None:
        """The share of queries [a, b) and keys [c, d); a causal tile's is the first of its queries and keys."""
        i, j = slice(a, b), slice(c, d)
        dtype = _dtype_of_tile(b - a, query.dtype)
        its_g, its_q, its_o = (x[:, :, i].to(dtype) for x in (g, q, o))
        its_k, its_v = (_shared(x[j].to(dtype), heads // kv_heads) for x in (k, v))
        of_query, *of_keys = _flash_backward(
            its_g, its_q, its_k, its_v, its_o, normalizer[:, :, i], 0.0, causal, scale=scale
        )
        of_keys = [x.sum(1) if heads > kv_heads else x[:, 0] for x in of_keys]
        into = d_query[:, :, i], d_key[:, j], d_value[:, j]
        for whole, share in zip(into, (of_query, *of_keys), strict=True):
            if causal:
                whole.copy_(share)
            else:
                whole.add_(share)

    for start, stop, *_ in _quadruples(segments):
        for a, b in _cuts(start, stop, tile):
            add(a, b, a, b, True)
            for c, d in _cuts(start, a, tile):
                add(a, b, c, d, False)
    for start, stop, prefix_start, prefix_stop in _quadruples(segments):  # once every key has its first share
        for a, b in _cuts(start, stop, tile):
            for c, d in _cuts(prefix_start, prefix_stop, tile):
                add(a, b, c, d, False)
    return grads


def _lengths(start: int, stop: int, size: int) -> set[int]:
    return {b - a for a, b in _cuts(start, stop, size)}


def forward_workspace(
    query: Tensor, key: Tensor, value: Tensor, segments: Sequence[int], scale: float, backend: str
) -> int:
    """Bytes that the operator takes within itself: two parts of a block of queries and their log-sums, and in float32
    once more where they are 16-bit; and the share of one in the other."""
    queries = max(max(_lengths(start, stop, tile_of(query))) for start, stop, *_ in _quadruples(segments))
    log = torch.promote_types(query.dtype, torch.float32).itemsize
    per_number = 2 * query.element_size() + (0 if log == query.element_size() else 2 * log)
    return queries * query.shape[1] * (query.shape[2] * per_number + 4 * log)


def backward_workspace(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    segments: Sequence[int],
    scale: float,
    backend: str,
) -> int:
    """The same of the backward. A tile's shares of dq, dk and dv for every query head, the copy of its upstream
    gradient that the kernel makes, dk and dv summed over the heads that share a key; in float32 where the tile is, with
    copies of its five operands."""
    (heads, depth), kv_heads = query.shape[1:], key.shape[1]
    summed = 2 * kv_heads if heads > kv_heads else 0

    def of_tile(queries: int, keys: int) -> int:
        dtype = _dtype_of_tile(queries, query.dtype)
        numbers = 2 * queries * heads + keys * (2 * heads + summed)
        if dtype != query.dtype:
            numbers += 3 * queries * heads + 2 * keys * kv_heads
        return numbers * depth * dtype.itemsize

    tile = tile_of(query)
    return max(
        of_tile(queries, keys)
        for start, stop, prefix_start, prefix_stop in _quadruples(segments)
        for queries in _lengths(start, stop, tile)
        for keys in {queries, *_lengths(prefix_start, prefix_stop, tile)}
    )


def _dense(x: Tensor) -> Tensor:
    """What the kernel reads: a head's numbers side by side."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _fake_forward(query: Tensor, key: Tensor, value: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    out = query.new_empty(query.shape)
    return out, query.new_empty(query.shape[:2], dtype=torch.promote_types(query.dtype, torch.float32))


def _fake_backward(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, value, *ctx.options = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(query, key, value, *output)


def _differentiate(ctx: Any, grad: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 6
    return *segment_attention_backward(grad, *ctx.saved_tensors, *ctx.options), None, None, None


_ADVICE = "Attention that is written out has them all: attn_implementation='eager' and prefix_sharing='off'."
_OPTIONS = "int[] segments, float scale, str backend"
segment_attention_backward = define(
    "segment_attention_backward",
    f"(Tensor grad, Tensor query, Tensor key, Tensor value, Tensor out, Tensor lse, {_OPTIONS}) "
    "-> (Tensor, Tensor, Tensor)",
    _fake_backward,
    {"tiles": f"{__name__}:backward"},
    advice=_ADVICE,
)
segment_attention = define(
    "segment_attention",
    f"(Tensor query, Tensor key, Tensor value, {_OPTIONS}) -> (Tensor, Tensor)",
    _fake_forward,
    {"tiles": f"{__name__}:forward"},
    backward=_differentiate,
    setup_context=_save,
    advice=_ADVICE,
)
