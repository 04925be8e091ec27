"""`torch.ops.fastdpo.segment_attention`: causal segments on a CPU, by torch's fused kernel, in tiles without a mask.

    out_i = Σ_j p_ij v_j,   p_ij = exp(s_ij − lse_i),   s_ij = scale · q_i·k_j,   lse_i = log Σ_j exp(s_ij)

over the keys j that a query i sees: its segment's prefix, and its own segment up to itself. A softmax over several sets
of keys is their softmaxes, weighted by what each holds of Σ_j exp(s_ij); so a block of queries attends to the prefix, to
its segment before the block and, causally, to itself, each by one call of the kernel, and the three are merged by their
lse. Backward, ∂s_ij = p_ij (∂out_i·v_j − ∂out_i·out_i) needs the merged out and lse only: any set of pairs, handed with
these to the kernel's backward, gives exactly its share of dq, dk and dv (FlashAttention-2, arXiv 2307.08691, section
3.1), and the shares are added up in place.

The kernel computes all pairs of a causal tile of up to 512 keys, so tiles on the diagonal are small, of about 4.5 √n of
a segment's n queries: a smaller one wastes less, and adds up more often. Work: n²/2 + n·prefix pairs and about n·4.5 √n/2
that are computed and dropped. Memory: q, k, v, out, their gradients, one number per query and head, and tiles of at
most BLOCK queries or keys (`forward_workspace`, `backward_workspace`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from fastdpo.ops.registry import define

#: Queries and keys of a tile, at most.
BLOCK = 512
#: Queries of a tile on the diagonal, at least: below, calls cost more than they save.
_MIN_BLOCK = 96
_ALIGNED = 16
#: c in √(c·n) queries of a block: what a pair costs that is computed and dropped against one that is added up.
_ADDING = 20.0
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
    return zip(edges, edges[1:], strict=False)


def _block(queries: int) -> int:
    """Queries of a block of a segment of so many."""
    wanted = -(-math.sqrt(_ADDING * queries) // _ALIGNED) * _ALIGNED
    return int(min(max(wanted, _MIN_BLOCK), BLOCK))


def _gaps(tokens: int, segments: Sequence[int]) -> list[tuple[int, int]]:
    """Where no segment has a query."""
    edges = [0, *(edge for start, stop, *_ in _quadruples(segments) for edge in (start, stop)), tokens]
    return [(a, b) for a, b in zip(edges[::2], edges[1::2], strict=True) if a < b]


def _by_heads(x: Tensor, kv_heads: int) -> Tensor:
    """(n, heads, D) → (kv_heads, groups, n, D), a view."""
    return x.unflatten(1, (kv_heads, -1)).permute(1, 2, 0, 3)


def _shared(x: Tensor, groups: int) -> Tensor:
    """(n, kv_heads, D) → (kv_heads, groups, n, D), a view."""
    return x.transpose(0, 1).unsqueeze(1).expand(-1, groups, -1, -1)


def forward(
    query: Tensor, key: Tensor, value: Tensor, segments: Sequence[int], scale: float
) -> tuple[Tensor, Tensor]:
    """(N, heads, D), twice (N, kv_heads, D) → out (N, heads, D), 0 in gaps, and lse (N, heads) in float32 or float64."""
    heads, kv_heads = query.shape[1], key.shape[1]
    query, key, value = map(_dense, (query, key, value))
    out, lse = _fake_forward(query, key, value)
    for start, stop in _gaps(len(query), segments):
        out[start:stop], lse[start:stop] = 0, 0

    def attend(a: int, b: int, c: int, d: int, causal: bool) -> tuple[Tensor, Tensor]:
        """Queries [a, b) to keys [c, d): (b - a, heads, D), (b - a, heads)."""
        keys = [_shared(x[c:d], heads // kv_heads) for x in (key, value)]
        part, its_lse = _flash(_by_heads(query[a:b], kv_heads), *keys, 0.0, causal, scale=scale)
        return part.permute(2, 0, 1, 3).flatten(1, 2), its_lse.permute(2, 0, 1).flatten(1, 2)

    for start, stop, prefix_start, prefix_stop in _quadruples(segments):
        for a, b in _cuts(start, stop, _block(stop - start)):
            merged, its_lse = attend(a, b, a, b, True)
            for c, d in ((start, a), (prefix_start, prefix_stop)):
                if c < d:
                    part, other = attend(a, b, c, d, False)
                    share = torch.sigmoid(other - its_lse).unsqueeze(-1)
                    merged = merged.to(lse.dtype).lerp_(part.to(lse.dtype), share)
                    its_lse = torch.logaddexp(its_lse, other)
            out[a:b], lse[a:b] = merged, its_lse
    return out, lse


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
    grad, query, key, value = map(_dense, (grad, query, key, value))
    for start, stop in _gaps(len(query), segments):
        for x in grads:
            x[start:stop] = 0

    def add(a: int, b: int, c: int, d: int, causal: bool) -> None:
        """The share of queries [a, b) and keys [c, d); a causal tile's is the first of its queries and keys."""
        by_heads = [_by_heads(x[a:b], kv_heads) for x in (grad, query, out)]
        keys = [_shared(x[c:d], heads // kv_heads) for x in (key, value)]
        its_lse = lse[a:b].unflatten(1, (kv_heads, -1)).permute(1, 2, 0)
        d_query, *d_keys = _flash_backward(
            by_heads[0], by_heads[1], *keys, by_heads[2], its_lse, 0.0, causal, scale=scale
        )
        into = [_by_heads(grads[0][a:b], kv_heads), *(x[c:d].transpose(0, 1) for x in grads[1:])]
        for whole, share in zip(into, (d_query, *(x.sum(1) if x.shape[1] > 1 else x[:, 0] for x in d_keys)), strict=True):
            if causal:
                whole.copy_(share)
            else:
                whole.add_(share)

    for start, stop, *_ in _quadruples(segments):
        for a, b in _cuts(start, stop, _block(stop - start)):
            add(a, b, a, b, True)
            for c, d in _cuts(start, a, BLOCK):
                add(a, b, c, d, False)
    for start, stop, prefix_start, prefix_stop in _quadruples(segments):  # once every key has its first share
        for a, b in _cuts(start, stop, BLOCK):
            for c, d in _cuts(prefix_start, prefix_stop, BLOCK):
                add(a, b, c, d, False)
    return grads


def _dense(x: Tensor) -> Tensor:
    """What the kernel reads: a head's numbers side by side."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _fake_forward(query: Tensor, key: Tensor, value: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    out = query.new_empty(query.shape)
    return out, query.new_empty(query.shape[:2], dtype=torch.promote_types(query.dtype, torch.float32))


def _fake_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
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
