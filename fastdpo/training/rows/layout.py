"""How pairs of token ids lie in the rows of a micro-batch.

    plain                 one right-padded row per completion:    prompt | chosen         prompt | rejected
    prefix sharing        one row per pair:                       prompt | chosen | rejected
    packing               one row of several pairs, up to the micro-batch's budget of tokens

With prefix sharing the prompt is computed once for both completions, and so is what these have in common at their
beginning; positions restart behind it (Accelerating DPO with Prefix Sharing, arXiv 2410.20305). No token is repeated:
log-probs are gathered by row index, and both first tokens that differ are scored from the same hidden state. The last
token of a completion predicts nothing, so shared and packed rows leave it out.

Packing is first-fit decreasing: pairs by length, longest first, each into the first row with room.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdpo.training.rows.attention import Segment, Segments
from fastdpo.training.rows.transfer import to_device

Part = TypeVar("Part")

#: Filler for positions behind the end of a row. Causal attention never looks there, so any valid id serves, and no
#: padding token of the tokenizer (often the end-of-sequence token) can be learnt by accident.
FILLER_ID = 0


@dataclass(frozen=True)
class Layout:
    """sharing, packing: as above. masked: attention gets a dense mask in the place of segments."""

    sharing: bool = False
    packing: bool = False
    masked: bool = False

    @property
    def plain(self) -> bool:
        return not (self.sharing or self.packing)

    def __str__(self) -> str:
        parts = ["prefix sharing"] * self.sharing + ["packing"] * self.packing
        return (
            f"{' and '.join(parts)}, {'dense mask' if self.masked else 'segments'}" if parts else "one row per answer"
        )


#: One row per completion: what every causal model takes.
PLAIN = Layout()


@dataclass(frozen=True)
class MicroBatch:
    """P pairs in R rows of T tokens.

    members: positions of the pairs in their batch.
    indices: (P,) the same as a tensor.
    input_ids: (R, T).
    position_ids: (R, T), or None where a row is one sequence.
    segments: who attends to whom, or None where causality says it all.
    masked: attention is told so by a dense mask.
    score_rows: (N,) flat positions in R·T whose hidden state predicts a completion token; chosen completions first.
    targets: (N,) those tokens.
    completion_mask: (2P, C) True where a completion has a token, chosen first; its True entries are the N in order.
    token_index: (N,) flat positions of these entries in 2P·C.
    """

    members: tuple[int, ...]
    indices: Tensor
    input_ids: Tensor
    position_ids: Tensor | None
    segments: Segments | None
    masked: bool
    score_rows: Tensor
    targets: Tensor
    completion_mask: Tensor
    token_index: Tensor

    def __len__(self) -> int:
        return len(self.members)


@dataclass(frozen=True)
class PairIds:
    """Token ids of one pair, each (tokens,) int64 on the host."""

    prompt: Tensor
    chosen: Tensor
    rejected: Tensor

    def shared_length(self) -> int:
        """Tokens at the beginning of both sequences that are the same and are read: the prompt at least."""
        length = min(len(self.chosen), len(self.rejected)) - 1
        differ = torch.nonzero(self.chosen[:length] != self.rejected[:length])
        return len(self.prompt) + (int(differ[0]) if len(differ) else length)

    def tokens(self, layout: Layout) -> int:
        """Tokens that the pair takes in its row or rows, padding between its two rows included."""
        chosen, rejected = (len(self.prompt) + len(ids) for ids in (self.chosen, self.rejected))
        if layout.plain:
            return 2 * max(chosen, rejected)
        return chosen + rejected - 2 - (self.shared_length() if layout.sharing else 0)


@dataclass(frozen=True)
class _Placed:
    """One pair in a row: ids, positions (T,), segments, rows that predict chosen (b,) and rejected (c,) tokens."""

    ids: Tensor
    positions: Tensor
    segments: tuple[Segment, ...]
    chosen_rows: Tensor
    rejected_rows: Tensor


def _place(pair: PairIds, sharing: bool, start: int) -> _Placed:
    """`pair` from the flat position `start` on."""
    chosen, rejected = (torch.cat([pair.prompt, ids[:-1]]) for ids in (pair.chosen, pair.rejected))
    shared = pair.shared_length() if sharing else 0
    middle = start + len(chosen)
    first = len(pair.prompt) - 1
    chosen_rows = torch.arange(first, first + len(pair.chosen))
    rejected_rows = torch.arange(first, first + len(pair.rejected))
    return _Placed(
        ids=torch.cat([chosen, rejected[shared:]]),
        positions=torch.cat([torch.arange(len(chosen)), torch.arange(shared, len(rejected))]),
        segments=(
            Segment(start, middle),
            Segment(middle, middle + len(rejected) - shared, start if shared else 0, start + shared if shared else 0),
        ),
        chosen_rows=start + chosen_rows,
        rejected_rows=torch.where(rejected_rows < shared, start + rejected_rows, middle - shared + rejected_rows),
    )


def cut(pairs: Sequence[PairIds], order: Sequence[int], layout: Layout, budget: int) -> list[list[int]]:
    """Groups of the pairs at `order`, each of at most `budget` tokens in its rows, padding included, longest first.

    A pair longer than the budget forms a group of its own.
    """
    tokens = {index: pairs[index].tokens(layout) for index in order}
    order = sorted(order, key=tokens.__getitem__, reverse=True)
    groups: list[list[int]] = []
    if layout.packing:
        used: list[int] = []
        for index in order:
            fit = next((i for i, taken in enumerate(used) if taken + tokens[index] <= budget), None)
            if fit is None:
                groups.append([index])
                used.append(tokens[index])
            else:
                groups[fit].append(index)
                used[fit] += tokens[index]
        return groups
    for index in order:
        if groups and (len(groups[-1]) + 1) * tokens[groups[-1][0]] <= budget:
            groups[-1].append(index)
        else:
            groups.append([index])
    return groups


def lay_out(pairs: Sequence[PairIds], group: Sequence[int], layout: Layout) -> MicroBatch:
    """The pairs at `group` as a micro-batch on the host; `moved` brings it to a device."""
    members = [pairs[index] for index in group]
    completions = [pair.chosen for pair in members] + [pair.rejected for pair in members]
    rows = _plain_rows(members) if layout.plain else _segmented_rows(members, layout)
    lengths = torch.tensor([len(ids) for ids in completions])
    mask = torch.arange(int(lengths.max())) < lengths[:, None]
    return MicroBatch(
        members=tuple(group),
        indices=torch.tensor(group),
        input_ids=rows.input_ids,
        position_ids=rows.position_ids,
        segments=rows.segments,
        masked=layout.masked,
        score_rows=torch.cat(rows.score_rows),
        targets=torch.cat(completions),
        completion_mask=mask,
        token_index=mask.flatten().nonzero().flatten(),
    )


def moved(micros: Sequence[MicroBatch], device: torch.device) -> list[MicroBatch]:
    """`micros` of the host on `device`, all of their tensors in one copy."""
    parts = [part for micro in micros for part in (micro, micro.segments) if part is not None]
    there = iter(to_device([getattr(part, name) for part in parts for name in _tensors(part)], device))
    return [
        replace(
            _on_device(micro, there), segments=None if micro.segments is None else _on_device(micro.segments, there)
        )
        for micro in micros
    ]


def _tensors(part: Any) -> list[str]:
    return [each.name for each in fields(part) if isinstance(getattr(part, each.name), Tensor)]


def _on_device(part: Part, there: Iterator[Tensor]) -> Part:
    return replace(part, **{name: next(there) for name in _tensors(part)})  # type: ignore[type-var]


@dataclass(frozen=True)
class _Rows:
    input_ids: Tensor
    position_ids: Tensor | None
    segments: Segments | None
    score_rows: list[Tensor]


def _stack(rows: Sequence[Tensor], width: int) -> Tensor:
    return torch.stack([F.pad(row, (0, width - len(row)), value=FILLER_ID) for row in rows])


def _plain_rows(members: Sequence[PairIds]) -> _Rows:
    parts = [(pair.prompt, pair.chosen) for pair in members] + [(pair.prompt, pair.rejected) for pair in members]
    width = max(len(prompt) + len(completion) for prompt, completion in parts)
    score_rows = [
        torch.arange(len(completion)) + row * width + len(prompt) - 1 for row, (prompt, completion) in enumerate(parts)
    ]
    return _Rows(_stack([torch.cat(part) for part in parts], width), None, None, score_rows)


def _segmented_rows(members: Sequence[PairIds], layout: Layout) -> _Rows:
    tokens = [pair.tokens(layout) for pair in members]
    width = sum(tokens) if layout.packing else max(tokens)
    starts = [sum(tokens[:i]) if layout.packing else i * width for i in range(len(members))]
    placed = [_place(pair, layout.sharing, start) for pair, start in zip(members, starts, strict=True)]
    ids, positions = ([getattr(each, name) for each in placed] for name in ("ids", "positions"))
    if layout.packing:
        ids, positions = [torch.cat(ids)], [torch.cat(positions)]
    return _Rows(
        _stack(ids, width),
        _stack(positions, width),
        Segments.build(len(ids), width, [item for each in placed for item in each.segments]),
        [each.chosen_rows for each in placed] + [each.rejected_rows for each in placed],
    )
