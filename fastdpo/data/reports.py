"""What became of every row: counts that add up, and the first rows of each kind."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from fastdpo.data.errors import PreferenceDataError
from fastdpo.shown import shown

NAMED = 5


@dataclass(frozen=True)
class Tally:
    """How many rows, and the names of the first ones."""

    count: int = 0
    first: tuple[str, ...] = ()

    def plus(self, name: str) -> Tally:
        return Tally(self.count + 1, (*self.first, name) if len(self.first) < NAMED else self.first)

    def names(self) -> str:
        more = f" and {self.count - len(self.first)} more" if self.count > len(self.first) else ""
        return ", ".join(shown(name) for name in self.first) + more


NO_ROWS = Tally()


@dataclass(frozen=True)
class ReadReport:
    """What `read_preferences` did with every row: rows = used + left_out.count; the others count used rows.

    left_out: rows that the format leaves out by its definition, for `left_out_reason`.
    repeated_prompts: conversations whose two answers began with the prompt's messages; it was taken once.
    unanswered_turns: conversations with turns after the last answer, which were dropped.
    prompt_in_answers: plain texts whose two answers begin with the prompt, which not all do, or only a few rows
        with a short one; they are kept as they are.
    without_shared_prompt: plain texts without a prompt column that share no beginning; their prompt is empty.
    """

    rows: int
    used: int
    left_out: Tally = NO_ROWS
    left_out_reason: str = ""
    repeated_prompts: Tally = NO_ROWS
    unanswered_turns: Tally = NO_ROWS
    prompt_in_answers: Tally = NO_ROWS
    without_shared_prompt: Tally = NO_ROWS

    def __post_init__(self) -> None:
        _check_sum(self.rows, self.used, self.left_out.count)

    @property
    def is_plain(self) -> bool:
        """Every row was used as it is, so that there is nothing to say."""
        notes = (self.repeated_prompts, self.unanswered_turns, self.prompt_in_answers, self.without_shared_prompt)
        return self.used == self.rows and not any(tally.count for tally in notes)

    def summary(self) -> str:
        parts = [f"used {self.used} of {self.rows} rows"]
        if self.left_out.count:
            parts.append(f"left out {self.left_out.count} ({self.left_out_reason}: {self.left_out.names()})")
        for text, tally in (
            ("prompt repeated in both answers, taken once", self.repeated_prompts),
            ("turns after the last answer dropped", self.unanswered_turns),
            ("both answers begin with the prompt, kept as they are", self.prompt_in_answers),
            ("no prompt shared by the answers", self.without_shared_prompt),
        ):
            if tally.count:
                parts.append(f"{text} {tally.count} ({tally.names()})")
        return ", ".join(parts)


#: Why a pair is dropped: what is said of it → the count it belongs to.
DROPS = {
    "no prompt": "dropped_empty",
    "no shared prompt": "dropped_empty",
    "template writes no prompt": "dropped_empty",
    "prompt fills max_length": "dropped_empty",
    "template writes both answers alike": "dropped_identical",
    "same answers": "dropped_identical",
    "same answers once cut": "dropped_identical",
}
#: What helps where all pairs are dropped for a reason.
ADVICE = {
    "no prompt": "give every row a prompt, or a tokenizer that adds BOS",
    "no shared prompt": "put the prompt into a column 'prompt'",
    "template writes no prompt": "set another chat template, as this one passes over the messages",
    "prompt fills max_length": "shorten the prompts, raise max_length, or lower max_prompt_length",
    "template writes both answers alike": "set another chat template, as this one passes over the answers' text",
    "same answers": "pairs with the same answers carry no preference",
    "same answers once cut": "raise max_length, as the answers differ only beyond it",
}


@dataclass(frozen=True)
class TokenizationReport:
    """Counts of pairs. total = kept + dropped_empty + dropped_identical; the others count kept pairs.

    dropped_empty: no prompt token to condition on (no shared prompt, an empty one without BOS, or a template that
        writes none), or a prompt that fills max_length. dropped_identical: chosen and rejected have the same ids,
        perhaps after the cut.
    truncated_prompts, truncated_completions: cut in the prompt, in one completion or both.
    boundary_merges: the tokens of prompt + completion did not begin with the prompt's; see PairEncoder.
    header_in_completions: the completions begin with the template's answer header; see render_conversation.
    repeated_prompts, unanswered_turns, prompt_in_answers: as in ReadReport, where the data set did not come through it.
    reasons: reason → the pairs dropped for it. The counts of all reasons are the dropped ones'.
    """

    total: int
    kept: int
    dropped_empty: int = 0
    dropped_identical: int = 0
    truncated_prompts: int = 0
    truncated_completions: int = 0
    boundary_merges: int = 0
    header_in_completions: int = 0
    repeated_prompts: int = 0
    unanswered_turns: int = 0
    prompt_in_answers: int = 0
    reasons: Mapping[str, Tally] = field(default_factory=dict, compare=False)

    def __post_init__(self) -> None:
        _check_sum(self.total, self.kept, self.dropped_empty, self.dropped_identical)

    def summary(self) -> str:
        parts = [f"kept {self.kept} of {self.total} pairs"]
        for name in COUNTED:
            if count := getattr(self, name):
                parts.append(f"{name.replace('_', ' ')} {count}{self._why(name)}")
        return ", ".join(parts)

    def _why(self, name: str) -> str:
        reasons = {reason: tally for reason, tally in self.reasons.items() if DROPS[reason] == name}
        if not reasons:
            return ""
        several = len(reasons) > 1
        said = [f"{why}{f' {tally.count}' if several else ''}: {tally.names()}" for why, tally in reasons.items()]
        return f" ({'; '.join(said)})"


COUNTED = tuple(name for name in TokenizationReport.__dataclass_fields__ if name not in ("total", "kept", "reasons"))


def _check_sum(total: int, *parts: int) -> None:
    if total != sum(parts):
        raise PreferenceDataError(f"{total} rows were read, but {' + '.join(map(str, parts))} are accounted for")
