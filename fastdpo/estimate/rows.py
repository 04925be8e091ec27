"""What goes through a model at once, in tokens: pairs of one shape side by side in a row. No model is read here."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fastdpo.training.rows.attention import Segment, Segments

#: The longest sequence that is counted.
MAX_LENGTH = 2**20


@dataclass(frozen=True)
class PairShape:
    """Tokens of a pair's prompt and of each of its completions."""

    prompt: int
    completion: int

    @property
    def tokens(self) -> int:
        """Of the pair in a row that shares the prompt."""
        return self.prompt + 2 * self.completion

    @property
    def context(self) -> int:
        """Of one answer: the prompt and a completion."""
        return self.prompt + self.completion

    def scaled(self, tokens: int) -> PairShape:
        """A pair of `tokens` tokens and the same proportions, to the token."""
        completion = max(1, round(tokens * self.completion / self.tokens))
        return PairShape(max(0, tokens - 2 * completion), completion)

    @classmethod
    def longest(cls, max_length: int, max_prompt_length: int | None) -> PairShape:
        """Both rows at `max_length`, the prompt at `max_prompt_length` (half of `max_length` where there is none)."""
        prompt = min(max_prompt_length or max_length // 2, max_length - 1)
        return cls(prompt, max_length - prompt)


@dataclass(frozen=True)
class Row:
    """A row of `tokens` tokens: pairs of one shape side by side, and the last one cut to what is left."""

    tokens: int
    shape: PairShape

    def _whole_and_rest(self) -> tuple[int, tuple[int, int, int]]:
        """Whole pairs, and (prompt, chosen, rejected) tokens of the last one, all 0 where nothing is left."""
        whole, rest = divmod(self.tokens, self.shape.tokens)
        prompt = -(-rest * self.shape.prompt // self.shape.tokens)
        return whole, (prompt, (rest - prompt + 1) // 2, (rest - prompt) // 2)

    def pairs(self) -> list[tuple[int, int, int]]:
        """(prompt, chosen, rejected) tokens of each."""
        whole, rest = self._whole_and_rest()
        pairs = [(self.shape.prompt, self.shape.completion, self.shape.completion)] * whole
        return [*pairs, rest] if any(rest) else pairs

    def segments(self) -> Segments:
        """Two per pair."""
        items, start = [], 0
        for prompt, chosen, rejected in self.pairs():
            middle = start + prompt + chosen
            items.append(Segment(start, middle))
            items.append(Segment(middle, middle + rejected, start, start + prompt))
            start = middle + rejected
        return Segments.build(1, self.tokens, items, torch.device("cpu"))

    @property
    def scored(self) -> int:
        """Completion tokens: rows that reach the head."""
        whole, (_, chosen, rejected) = self._whole_and_rest()
        return whole * 2 * self.shape.completion + chosen + rejected

    @property
    def sequences(self) -> int:
        """Segments with a query."""
        whole, (prompt, chosen, rejected) = self._whole_and_rest()
        return 2 * whole + (prompt + chosen > 0) + (rejected > 0)

    @property
    def visible(self) -> int:
        """Pairs of a query and a key that it sees."""
        whole, rest = self._whole_and_rest()
        one = (self.shape.prompt, self.shape.completion, self.shape.completion)
        return whole * _visible(*one) + _visible(*rest)


def _visible(prompt: int, chosen: int, rejected: int) -> int:
    first = prompt + chosen
    return first * (first + 1) // 2 + rejected * prompt + rejected * (rejected + 1) // 2
