"""Attention over rows that hold several sequences, some sharing their prefix, as causal segments without a mask tensor.

A pair that shares its prefix lies in a row as  prefix (a) | chosen (b) | rejected (c)  and is two segments:

    queries [prefix, chosen]  over keys [prefix, chosen]       causal
    queries [rejected]        over keys [prefix, rejected]     causal, aligned at the last key

which is attention of variable length with different query and key boundaries (Accelerating DPO with Prefix Sharing,
arXiv 2410.20305, computes the same through a block mask). A sequence that shares nothing is one segment. Work and
memory are those of the sequences on their own: O(Σ (a+b)² + c·(a+c)) products, and q, k, v, the output and one number
per query and head are kept for the backward.

`segment_attention` is registered with transformers' AttentionInterface and gets the segments as the forward argument
`segments`; `segments_active` switches models to it. `dense_mask` writes the same as a 4-D mask: the oracle of the
tests, and what serves attention that has more to it than a softmax over keys (softcaps, dropout, sinks).
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface

from fastdpo.training.models.unwrapped import base_model
from fastdpo.training.rows import tiled_attention
from fastdpo.training.rows.transfer import to_device

#: The name in transformers' table of attention functions.
SEGMENT_ATTENTION = "fastdpo_segments"
#: Arguments of attention functions that say nothing about what is computed here: causality is the segments' own, and
#: positions are in the queries and keys already.
_KNOWN = frozenset(("is_causal", "position_ids", "use_cache", "output_attentions", "output_hidden_states"))
#: Torch refuses products on CUDA in deterministic mode without it.
_CUBLAS_WORKSPACE = ("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
#: FlashAttention, which variable lengths need, wants this and a 16-bit type.
_FLASH_CAPABILITY = (8, 0)


def asks_for_gqa(varlen: Callable[..., Any]) -> bool:
    """Whether this `varlen_attn` has to be told that keys have fewer heads than queries: from torch 2.12 on. Until 2.11
    it takes them as they are."""
    return "enable_gqa" in inspect.signature(varlen).parameters


_ASKS_FOR_GQA = asks_for_gqa(varlen_attn)


class UnsupportedAttention(TypeError):
    """A model asks of its attention what segments cannot express."""


class Segment(NamedTuple):
    """Queries at the flat positions [start, stop) see the keys at [prefix_start, prefix_stop), and themselves up to
    their own position. Flat positions count through the R rows of T tokens; a segment stays within one row."""

    start: int
    stop: int
    prefix_start: int = 0
    prefix_stop: int = 0

    @property
    def queries(self) -> int:
        return self.stop - self.start

    @property
    def prefix(self) -> int:
        return self.prefix_stop - self.prefix_start


@dataclass(frozen=True)
class Segments:
    """The segments of one micro-batch, in the order of their queries.

    rows, width: R, T. items: the segments. query_index: (Q,) flat positions of their queries in order, or None where
    these are all R·T. key_index: (K,) flat positions of their keys, prefix first, or None where these are all R·T in
    order, as nothing is shared. query_bounds, key_bounds: (S + 1,) int32, where each segment begins in them.
    in_one_call: attention of variable length serves all of them; None: where the queries' device and dtype have it.
    """

    rows: int
    width: int
    items: tuple[Segment, ...]
    query_index: Tensor | None
    key_index: Tensor | None
    query_bounds: Tensor
    key_bounds: Tensor
    in_one_call: bool | None = None

    @classmethod
    def build(cls, rows: int, width: int, items: Sequence[Segment], device: torch.device | None = None) -> Segments:
        """Segments without queries are left out. On the host, unless a `device` is named."""
        items = tuple(item for item in items if item.queries)
        queries = torch.cat([torch.arange(item.start, item.stop) for item in items])
        keys = torch.cat(
            [
                torch.arange(start, stop)
                for item in items
                for start, stop in ((item.prefix_start, item.prefix_stop), (item.start, item.stop))
            ]
        )
        lengths = torch.tensor([[item.queries, item.prefix + item.queries] for item in items])
        bounds = F.pad(lengths.cumsum(0), (0, 0, 1, 0)).to(torch.int32).T
        everything = torch.arange(rows * width)
        indices = [None if torch.equal(index, everything) else index for index in (queries, keys)]
        tensors = [*indices, *bounds]
        if device is not None:
            there = iter(to_device([x for x in tensors if x is not None], device))
            tensors = [None if x is None else next(there) for x in tensors]
        query_index, key_index, query_bounds, key_bounds = tensors
        assert query_bounds is not None
        assert key_bounds is not None
        return cls(rows, width, items, query_index, key_index, query_bounds, key_bounds)

    @property
    def max_queries(self) -> int:
        return max(item.queries for item in self.items)

    @property
    def max_keys(self) -> int:
        return max(item.prefix + item.queries for item in self.items)


def segment_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    segments: Segments | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """query (R, heads, T, D), key and value (R, kv_heads, T, D) → (R, T, heads, D); 0 where no segment has a query.

    sliding_window: a query sees this many keys, itself among them, counted within its sequence.

    Raises UnsupportedAttention for a mask, dropout, or an argument that it does not know.
    """
    name = type(module).__name__
    if segments is None:
        raise UnsupportedAttention(f"{name} called {SEGMENT_ATTENTION} without segments: its model drops arguments.")
    unknown = [each for each, given in others.items() if given is not None and each not in _KNOWN]
    if unknown or attention_mask is not None or dropout:
        unknown += ["attention_mask"] * (attention_mask is not None) + ["dropout"] * bool(dropout)
        raise UnsupportedAttention(f"{name} gives its attention {', '.join(unknown)}, which segments cannot express.")
    if query.shape[2] != segments.width or key.shape[2] != segments.width:
        raise UnsupportedAttention(
            f"{name} attends from {query.shape[2]} to {key.shape[2]} tokens where {segments.width} were given."
        )
    if torch.is_autocast_enabled(query.device.type):  # which knows SDPA, and not attention of variable length
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    if sliding_window is not None and sliding_window >= segments.max_keys:
        sliding_window = None
    in_one_call = _has_flash(query) if segments.in_one_call is None else segments.in_one_call
    attend = _varlen if in_one_call else _per_segment
    return attend(query, key, value, segments, scaling, sliding_window), None


def _has_flash(query: Tensor) -> bool:
    return (
        query.is_cuda
        and query.dtype in (torch.float16, torch.bfloat16)
        and query.shape[-1] <= 256
        and query.shape[-1] % 8 == 0
        and torch.cuda.get_device_capability(query.device) >= _FLASH_CAPABILITY
    )


def _varlen(q: Tensor, k: Tensor, v: Tensor, segments: Segments, scale: float | None, window: int | None) -> Tensor:
    """One call over all segments. Where prefixes are shared, keys are gathered in their order, a prefix once per
    segment that sees it."""
    rows, heads, width, _ = q.shape
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (q, k, v))  # (R·T, heads, D)
    if segments.query_index is not None:
        q = q.index_select(0, segments.query_index)
    if segments.key_index is not None:
        k, v = (x.index_select(0, segments.key_index) for x in (k, v))
    gqa: dict[str, Any] = {"enable_gqa": heads != k.shape[1]} if _ASKS_FOR_GQA else {}
    out = varlen_attn(
        q,
        k,
        v,
        segments.query_bounds,
        segments.key_bounds,
        segments.max_queries,
        segments.max_keys,
        scale=scale,
        window_size=(-1 if window is None else window - 1, 0),
        **gqa,
    )
    assert isinstance(out, Tensor)  # nothing beside it was asked for
    if segments.query_index is not None:
        out = out.new_zeros(rows * width, *out.shape[1:]).index_copy_(0, segments.query_index, out)
    return out.unflatten(0, (rows, width))


def _per_segment(
    q: Tensor, k: Tensor, v: Tensor, segments: Segments, scale: float | None, window: int | None
) -> Tensor:
    """One segment after the other: in tiles without masks where torch's kernel for CPUs serves; else by SDPA with
    masks, as on a GPU without FlashAttention, and for windows that hide keys."""
    if (window is not None and window < segments.max_keys) or not tiled_attention.serves(q, k, v):
        return _masked(q, k, v, segments, scale, window)
    flat = [x.transpose(1, 2).flatten(0, 1) for x in (q, k, v)]  # (R·T, heads, D), views of what models pass
    bounds = [bound for item in segments.items for bound in item]
    out, _ = tiled_attention.segment_attention(*flat, bounds, q.shape[-1] ** -0.5 if scale is None else scale, "tiles")
    return out.unflatten(0, (len(q), segments.width))


def _masked(q: Tensor, k: Tensor, v: Tensor, segments: Segments, scale: float | None, window: int | None) -> Tensor:
    """SDPA for one segment after the other, under masks.

    Heads that share a key are a batch dimension, over which it is expanded in place: keys and values are neither
    repeated nor kept repeated. `split` has one backward for all pieces, where a slice each would have one of full size.
    """
    rows, _, width, _ = q.shape
    q, k, v = (x.transpose(0, 1).flatten(1, 2) for x in (q, k, v))  # (heads, R·T, D), a view of one row
    starts = [each for item in segments.items for each in (item.start, item.stop)]
    gaps = [stop - start for start, stop in zip([0, *starts], [*starts, rows * width], strict=True)]
    # Pieces alternate: what lies before a segment, the segment, ..., what lies behind the last one
    queries, keys, values = (x.split(gaps, 1) for x in (q, k, v))
    at = {item.start: 2 * i + 1 for i, item in enumerate(segments.items)}
    outputs = [queries[0].new_zeros(queries[0].shape)]
    for item in segments.items:
        piece, shared = at[item.start], at.get(item.prefix_start)
        key, value = keys[piece], values[piece]
        if item.prefix:
            assert shared is not None  # a prefix is the beginning of a segment
            key, value = (torch.cat([x[shared][:, : item.prefix], x[piece]], 1) for x in (keys, values))
        outputs.append(_attend(queries[piece], key, value, item, scale, window))
        outputs.append(torch.zeros_like(queries[piece + 1]))
    return torch.cat(outputs, 1).unflatten(1, (rows, width)).permute(1, 2, 0, 3)


def _attend(q: Tensor, k: Tensor, v: Tensor, item: Segment, scale: float | None, window: int | None) -> Tensor:
    """q (heads, queries, D), k and v (kv_heads, keys, D) → (heads, queries, D)."""
    groups = len(q) // len(k)
    window = None if window is None or window >= item.prefix + item.queries else window
    mask = None
    if item.prefix or window is not None:
        mask = torch.ones(item.queries, item.prefix + item.queries, dtype=torch.bool, device=q.device)
        mask = mask.tril_(item.prefix)
        if window is not None:
            mask = mask.triu_(item.prefix - window + 1)
    k, v = (x.unsqueeze(1).expand(-1, groups, -1, -1) for x in (k, v))
    out = F.scaled_dot_product_attention(
        q.unflatten(0, (-1, groups)), k, v, attn_mask=mask, is_causal=mask is None, scale=scale
    )
    return out.flatten(0, 1)


AttentionInterface.register(SEGMENT_ATTENTION, segment_attention)


def dense_mask(segments: Segments, window: int | None = None) -> Tensor:
    """(R, 1, T, T) bool, True where a query sees a key. Tokens of no segment see themselves, as a softmax over nothing
    would be NaN."""
    rows, width = segments.rows, segments.width
    mask = torch.eye(width, dtype=torch.bool).repeat(rows, 1, 1)
    for item in segments.items:
        row, start, stop = item.start // width, item.start % width, item.start % width + item.queries
        first = item.prefix_start % width
        keys = torch.cat([torch.arange(first, first + item.prefix), torch.arange(start, stop)])
        queries = torch.arange(item.prefix, item.prefix + item.queries)[:, None]  # positions in the sequence
        distance = queries - torch.arange(item.prefix + item.queries)
        seen = (distance >= 0) if window is None else (distance >= 0) & (distance < window)
        mask[row][start:stop, keys] = seen
    (there,) = to_device([mask[:, None]], segments.query_bounds.device)
    return there


def mask_argument(model: nn.Module, segments: Segments) -> Tensor | dict[str, Tensor]:
    """The `attention_mask` that makes `model` attend by `segments`: one mask, or one per kind of layer."""
    base = base_model(model)
    config = base.config.get_text_config()
    additive = config._attn_implementation == "eager"

    def mask(window: int | None) -> Tensor:
        seen = dense_mask(segments, window)
        dtype = base.get_input_embeddings().weight.dtype
        return torch.zeros_like(seen, dtype=dtype).masked_fill_(~seen, torch.finfo(dtype).min) if additive else seen

    window = getattr(config, "sliding_window", None)
    kinds = set(getattr(config, "layer_types", None) or ())
    if len(kinds) > 1:
        return {kind: mask(window if kind == "sliding_attention" else None) for kind in kinds}
    return mask(None if kinds == {"full_attention"} else window)


@contextmanager
def segments_active(models: Sequence[nn.Module]) -> Iterator[None]:
    """`models` attend by segments meanwhile, in recomputations of their layers during the backward too."""
    with ExitStack() as stack:
        for model in map(base_model, models):
            own = model.config._attn_implementation
            model.set_attn_implementation(SEGMENT_ATTENTION)
            stack.callback(model.set_attn_implementation, own)
        yield


def prepare_deterministic() -> None:
    """What `deterministic` needs on CUDA, before the first product there: a workspace of cuBLAS of a fixed size. One
    that the environment states already is left, and torch says so if it won't do."""
    os.environ.setdefault(*_CUBLAS_WORKSPACE)


@contextmanager
def deterministic(wanted: bool) -> Iterator[None]:
    """torch's deterministic algorithms meanwhile, if `wanted`.

    Flash's backward adds up dq with atomics, in whatever order its blocks come, unless it finds torch in this state
    when it runs; so does the memory-efficient kernel's. An operation that has no deterministic algorithm then raises.
    """
    if not wanted:
        yield
        return
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    fill: Any = torch.utils.deterministic
    filled = fill.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    fill.fill_uninitialized_memory = False  # costs a pass over every new tensor
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        fill.fill_uninitialized_memory = filled
