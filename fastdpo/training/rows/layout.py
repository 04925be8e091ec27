"""How examples of token ids lie in the rows of a micro-batch. An example is a prompt with K completions: 2 for a pair.

    plain                 one right-padded row per completion:    prompt | chosen         prompt | rejected
    prefix sharing        one row per example:                    prompt | chosen | rejected
    packing               one row of several examples, up to the micro-batch's budget of tokens

With prefix sharing the prompt is computed once for all completions, and so is what these have in common at their
beginning; positions restart behind it (Accelerating DPO with Prefix Sharing, arXiv 2410.20305). No token is repeated:
log-probs are gathered by row index, and the first tokens that differ are scored from the same hidden state. The last
token of a completion predicts nothing, so shared and packed rows leave it out.

Packing is first-fit decreasing: examples by length, longest first, each into the first row with room.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdpo.training.models.offloaded_embeddings import remember
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
    """P examples of K completions each, in R rows of T tokens.

    members: positions of the examples in their batch.
    indices: (P,) the same as a tensor.
    input_ids: (R, T).
    position_ids: (R, T), 0 behind a row's end; None where a row is one sequence, and the model counts for itself.
    segments: who attends to whom, or None where causality says it all.
    masked: attention is told so by a dense mask.
    score_rows: (N,) flat positions in R·T whose hidden state predicts a completion token; all examples' first
        completions first, then all second ones: of a pair, chosen and rejected.
    targets: (N,) those tokens.
    completion_mask: (K·P, C) True where a completion has a token, in the same order; its True entries are the N.
    token_index: (N,) flat positions of these entries in K·P·C.
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

    def by_example(self, values: Tensor) -> Tensor:
        """(..., K·P) values of completions, in the order of `completion_mask` → (..., K, P)."""
        return values.unflatten(-1, (-1, len(self)))


@dataclass(frozen=True)
class Example:
    """Token ids of a prompt and of its K completions, each (tokens,) int64 on the host."""

    prompt: Tensor
    completions: tuple[Tensor, ...]

    def shared_length(self) -> int:
        """Tokens at the beginning of all sequences that are the same and are read: the prompt at least."""
        first, *others = self.completions
        length = min(map(len, self.completions)) - 1
        for other in others:
            differ = torch.nonzero(first[:length] != other[:length])
            length = int(differ[0]) if len(differ) else length
        return len(self.prompt) + length

    def tokens(self, layout: Layout) -> int:
        """Tokens that the example takes in its row or rows, padding between its rows included."""
        lengths = [len(self.prompt) + len(ids) for ids in self.completions]
        if layout.plain:
            return len(lengths) * max(lengths)
        repeats = len(lengths) - 1
        return sum(lengths) - len(lengths) - (repeats * self.shared_length() if layout.sharing and repeats else 0)


@dataclass(frozen=True)
class _Placed:
    """One example in a row: ids, positions (T,), segments, and per completion the rows that predict its tokens."""

    ids: Tensor
    positions: Tensor
    segments: tuple[Segment, ...]
    score_rows: tuple[Tensor, ...]


def _place(example: Example, sharing: bool, start: int) -> _Placed:
    """`example` from the flat position `start` on: its first sequence whole, of the others what is not shared."""
    sequences = [torch.cat([example.prompt, ids[:-1]]) for ids in example.completions]
    shared = example.shared_length() if sharing and len(sequences) > 1 else 0
    prefix = (start, start + shared) if shared else (0, 0)
    first = len(example.prompt) - 1
    ids, positions, segments, score_rows = [], [], [], []
    at = start
    for index, (sequence, completion) in enumerate(zip(sequences, example.completions, strict=True)):
        seen = shared if index else 0  # tokens that stand in the row already
        ids.append(sequence[seen:])
        positions.append(torch.arange(seen, len(sequence)))
        segments.append(Segment(at, at + len(sequence) - seen, *(prefix if index else ())))
        rows = torch.arange(first, first + len(completion))
        score_rows.append(torch.where(rows < seen, start + rows, at - seen + rows))
        at += len(sequence) - seen
    return _Placed(torch.cat(ids), torch.cat(positions), tuple(segments), tuple(score_rows))


def cut(examples: Sequence[Example], order: Sequence[int], layout: Layout, budget: int) -> list[list[int]]:
    """Groups of the examples at `order`, each of at most `budget` tokens in its rows, padding included, longest first.

    One that is longer than the budget forms a group of its own.
    """
    tokens = {index: examples[index].tokens(layout) for index in order}
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


def lay_out(examples: Sequence[Example], group: Sequence[int], layout: Layout) -> MicroBatch:
    """The examples at `group` as a micro-batch on the host; `moved` brings it to a device."""
    members = [examples[index] for index in group]
    completions = [ids for column in zip(*(each.completions for each in members), strict=True) for ids in column]
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
    found = [
        replace(
            _on_device(micro, there), segments=None if micro.segments is None else _on_device(micro.segments, there)
        )
        for micro in micros
    ]
    for here, micro in zip(micros, found, strict=True):
        remember(micro.input_ids, here.input_ids)
    return found


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


def _plain_rows(members: Sequence[Example]) -> _Rows:
    columns = zip(*(each.completions for each in members), strict=True)
    parts = [(each.prompt, ids) for column in columns for each, ids in zip(members, column, strict=True)]
    width = max(len(prompt) + len(completion) for prompt, completion in parts)
    score_rows = [
        torch.arange(len(completion)) + row * width + len(prompt) - 1 for row, (prompt, completion) in enumerate(parts)
    ]
    return _Rows(_stack([torch.cat(part) for part in parts], width), None, None, score_rows)


def _segmented_rows(members: Sequence[Example], layout: Layout) -> _Rows:
    tokens = [each.tokens(layout) for each in members]
    width = sum(tokens) if layout.packing else max(tokens)
    starts = [sum(tokens[:i]) if layout.packing else i * width for i in range(len(members))]
    placed = [_place(each, layout.sharing, start) for each, start in zip(members, starts, strict=True)]
    ids, positions = ([getattr(each, name) for each in placed] for name in ("ids", "positions"))
    if layout.packing:
        ids, positions = [torch.cat(ids)], [torch.cat(positions)]
    return _Rows(
        _stack(ids, width),
        _stack(positions, width),
        Segments.build(len(ids), width, [item for each in placed for item in each.segments]),
        [rows for column in zip(*(each.score_rows for each in placed), strict=True) for rows in column],
    )
