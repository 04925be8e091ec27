"""Splitting two whole texts, or two whole conversations, into their common prompt and two completions."""

from __future__ import annotations

from typing import NamedTuple, TypeVar

import regex

from fastdpo.data.fields import Message

Part = TypeVar("Part", str, list[Message])

_GRAPHEME = regex.compile(r"\X")
# Scripts written without spaces, after Unicode's line breaking classes (UAX 14): ideographs, kana, South-East Asian.
# Two letters of Latin, or two digits, are never parted, whatever their width.
_NO_SPACES = regex.compile(
    r"[[\p{Line_Break=ID}\p{Line_Break=CJ}\p{Line_Break=SA}\p{Line_Break=AK}\p{Han}\p{Hiragana}\p{Katakana}"
    r"\p{Regional_Indicator}]"
    r"--[\p{Hangul}\p{Latin}\p{Nd}\p{P}]]",
    regex.V1,
)
# After these a word has ended though no space follows: wide punctuation ("：", "。"), the tsheg of Tibetan, the
# wordspace of Ethiopic, and the space without width.
_ENDS_WORD = regex.compile("[[\\p{P}&&[\\p{East_Asian_Width=W}\\p{East_Asian_Width=F}]]\u0f0b\u1361\u200b]", regex.V1)


class Pair(NamedTuple):
    """One preference pair; the three parts are all strings or all lists of messages."""

    prompt: str | list[Message]
    chosen: str | list[Message]
    rejected: str | list[Message]


class Reading(NamedTuple):
    """What a format makes of one row: its pair, or None where it leaves the row out, and what was done to it.

    notes: names of the counts of ReadReport that the row belongs to.
    """

    pair: Pair | None
    notes: tuple[str, ...] = ()


def common_length(first: Part, second: Part) -> int:
    limit = min(len(first), len(second))
    return next((i for i in range(limit) if first[i] != second[i]), limit)


def split_text(chosen: str, rejected: str) -> Pair:
    """The longest common prefix that ends between two words is the prompt.

    A word is a run of non-whitespace, so "sky is blue" and "sky is black" share "sky is", not "sky is bl"; in scripts
    written without spaces it is a grapheme, so "海是蓝色" and "海是红色" share "海是". No grapheme (an emoji of several
    code points, a letter with its accents, a line end of two characters) is ever parted. A single space at the cut
    goes to the completions, because BPE vocabularies hold words with their leading space.
    The prompt is empty where the first words differ.
    """
    common = common_length(chosen, rejected)
    # Whether a grapheme ends somewhere depends on what is before it and on the next character alone
    ends = _grapheme_ends(chosen[: common + 1]) & _grapheme_ends(rejected[: common + 1])
    ended = all(common == len(text) or text[common].isspace() for text in (chosen, rejected))
    cut = common
    if not (ended and common in ends):
        while cut and not (cut in ends and _parts_words(chosen, cut) and _parts_words(rejected, cut)):
            cut -= 1
        if cut and chosen[cut - 1] == " " and cut - 1 in ends:
            cut -= 1
    return Pair(chosen[:cut], chosen[cut:], rejected[cut:])


def _grapheme_ends(text: str) -> set[int]:
    if text.isascii() and "\r" not in text:
        return set(range(len(text) + 1))
    return {0, *(found.end() for found in _GRAPHEME.finditer(text))}


def _parts_words(text: str, cut: int) -> bool:
    """Whether a word ends or begins at `cut` > 0, the end of a grapheme."""
    if cut == len(text) or text[cut].isspace() or text[cut - 1].isspace():
        return True
    if _ENDS_WORD.match(text[cut - 1]) or _NO_SPACES.match(text[cut]):
        return True
    start = cut - 1  # of the grapheme's base, before its marks
    while start and regex.match(r"[\p{M}\p{Cf}]", text[start]):
        start -= 1
    return bool(_NO_SPACES.match(text[start]))


def inside_word(text: str, cut: int) -> bool:
    """Whether a cut parts two letters or digits of one word; in scripts without spaces none does."""
    return 0 < cut < len(text) and all(c.isalnum() and not _NO_SPACES.match(c) for c in text[cut - 1 : cut + 1])


def split_messages(chosen: list[Message], rejected: list[Message]) -> Pair | None:
    """The shared messages, up to and including the last one that is to be answered, are the prompt.

    "To be answered" is any role but assistant and system: where the two conversations part at a later question, the
    shared answer before it belongs to both completions (it cancels in their difference), so that a prompt always
    ends where the model speaks next. Unanswered questions at the end of a completion are dropped, and a completion
    with nothing left is an empty answer. None when no question is shared, as no prompt exists then.
    """
    shared = common_length(chosen, rejected)
    questions = [i for i in range(shared) if is_asked(chosen[i])]
    if not questions:
        return None
    cut = questions[-1] + 1
    return Pair(chosen[:cut], answered(chosen[cut:]), answered(rejected[cut:]))


def is_asked(message: Message) -> bool:
    """Whether a message is to be answered."""
    return message["role"] not in ("assistant", "system")


def answered(completion: list[Message]) -> list[Message]:
    """The completion up to its last answer; an empty answer where there is none."""
    while completion and completion[-1]["role"] != "assistant":
        completion = completion[:-1]
    return completion or [{"role": "assistant", "content": ""}]
