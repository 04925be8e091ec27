"""Token ids of preference pairs: prompt_ids, chosen_ids, rejected_ids, as the trainer consumes them.

One row becomes one pair or is dropped and counted; nothing is lost silently. The rules of one text are in
rendering.py, those of length in truncation.py.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import datasets
import numpy as np

from fastdpo.data.canonical import CACHE_VERSION, format_of_dataset, require_dataset, rows_of_batch
from fastdpo.data.errors import PreferenceDataError
from fastdpo.data.fields import string_field
from fastdpo.data.formats import PreferenceFormat
from fastdpo.data.pretokenized import ID_COLUMNS, pass_through
from fastdpo.data.rendering import PairEncoder, PairText, PairTokens, check_tokenizer, render_conversation
from fastdpo.data.reports import ADVICE, COUNTED, DROPS, NAMED, Tally, TokenizationReport
from fastdpo.data.shared_prefix import Pair, Reading
from fastdpo.data.truncation import LengthLimits
from fastdpo.shown import shown

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


# Flags of a pair, beside why it was dropped ("" where it was kept)
_FLAGS = tuple(name for name in COUNTED if name not in DROPS.values())
_NOTES = ("repeated_prompts", "unanswered_turns", "prompt_in_answers")
_DROPPED = "_dropped"
_IDS = [datasets.Value("int32")]
_FEATURES = {
    **dict.fromkeys(ID_COLUMNS, _IDS),
    "example_id": datasets.Value("string"),
    "length": datasets.Value("int32"),
}
_FLAGGED_FEATURES = datasets.Features(
    {**_FEATURES, **dict.fromkeys(_FLAGS, datasets.Value("bool")), _DROPPED: datasets.Value("string")}
)


def tokenize_preferences(
    dataset: datasets.Dataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int | None = 1024,
    max_prompt_length: int | None = 512,
    num_proc: int | None = None,
) -> tuple[datasets.Dataset, TokenizationReport]:
    """Tokenise pairs into prompt_ids, chosen_ids, rejected_ids (lists of int), example_id and length.

    length = 2·|prompt| + |chosen| + |rejected|: the tokens of the pair when the prompt is not shared.

    dataset: the result of load_preferences, or any Dataset in TRL's preference formats or HH-RLHF's; without an
        example_id column a pair is "row:N", rows from 0. A dataset that has the three id columns already is checked
        against the limits and passed through.
    Conversations: the chat template once over prompt and completion, tokenised once, no special token added beside
        the template's own. Plain strings: BOS where the tokenizer adds one by itself. Either way a completion ends
        with one end mark: the one in its text (whitespace after it is dropped) or else EOS. An empty answer is the
        end mark alone, and is kept.
    Boundary: prompts are tokenised on their own, see PairEncoder for what happens to merges across the boundary.
    Limits: prompts lose their beginning beyond max_prompt_length (a leading BOS stays); then completions lose their
        end, so that prompt + completion ≤ max_length; a cut completion has no end mark. None means no limit.
    A pad token is neither needed nor used.
    Rows: all are looked at before any is tokenised, and held to one form, as `read_preferences` does; what it gave is
    not asked again. The report names the first pairs dropped for each reason.

    Raises PreferenceDataError (a ValueError) for limits that leave no room, a tokenizer without EOS or without the
    chat template that the data need, rows of the wrong shape or that the template cannot render, columns with a
    part of the prompt that is not read, and when no pair is left (with the counts).
    """
    limits = LengthLimits(max_length, max_prompt_length)
    dataset = require_dataset(dataset, "dataset")
    if any(name in dataset.column_names for name in ID_COLUMNS):
        passed = pass_through(dataset, limits)
        return passed, TokenizationReport(total=len(passed), kept=len(passed))
    names = _example_ids(dataset)
    data_format = format_of_dataset(dataset, "auto", "dataset", lambda i: (i, f"example {shown(names(i))}"))
    check_tokenizer(tokenizer, data_format.conversational)
    columns = [
        *data_format.read_of(dataset.column_names),
        *(["example_id"] if "example_id" in dataset.column_names else []),
    ]
    flagged = dataset.select_columns(columns).map(
        _tokenize_batch,
        batched=True,
        with_indices=True,
        num_proc=num_proc,
        features=_FLAGGED_FEATURES,
        remove_columns=columns,
        fn_kwargs={
            "tokenizer": tokenizer,
            "limits": limits,
            "data_format": data_format,
            "version": CACHE_VERSION,
        },
        desc="Tokenising preference pairs",
    )
    return _counted(flagged)


def _counted(flagged: datasets.Dataset) -> tuple[datasets.Dataset, TokenizationReport]:
    flags = flagged.select_columns(list(_FLAGS)).with_format("numpy")[:]
    why = np.asarray(flagged.select_columns(_DROPPED).with_format("arrow")[:].column(_DROPPED).to_pylist())
    kept = np.flatnonzero(why == "")
    reasons = {}
    for reason in DROPS:
        if len(at := np.flatnonzero(why == reason)):
            reasons[reason] = Tally(len(at), tuple(flagged.select(at[:NAMED])["example_id"]))
    report = TokenizationReport(
        total=len(flagged),
        kept=len(kept),
        **{name: int(np.sum(flags[name])) for name in _FLAGS},
        **{
            name: sum(tally.count for reason, tally in reasons.items() if DROPS[reason] == name)
            for name in ("dropped_empty", "dropped_identical")
        },
        reasons=reasons,
    )
    if not report.kept:
        raise PreferenceDataError(
            f"no pair is left: {report.summary()}; {'; '.join(ADVICE[reason] for reason in reasons)}"
        )
    logger.info("%s", report.summary())
    if report.header_in_completions:
        logger.warning(
            "%d pairs: the chat template opens answers differently from its generation prompt, so their completions "
            "include the answer's header",
            report.header_in_completions,
        )
    for name, told in (
        ("repeated_prompts", "both answers repeated the messages of the prompt; it was taken once"),
        ("unanswered_turns", "the turns after the last answer were dropped"),
        ("prompt_in_answers", "both answers begin with the prompt; they are kept as they are"),
    ):
        if count := getattr(report, name):
            logger.warning("%d pairs: %s", count, told)
    dataset = flagged.remove_columns([*_FLAGS, _DROPPED])
    return (dataset.select(kept) if report.kept < report.total else dataset), report


def _tokenize_batch(
    batch: dict[str, list[Any]],
    indices: list[int],
    tokenizer: PreTrainedTokenizerBase,
    limits: LengthLimits,
    data_format: PreferenceFormat,
    version: int,
) -> dict[str, list[Any]]:
    rows = rows_of_batch(batch)
    example_ids = [
        string_field(row, "example_id", f"row {i}") if "example_id" in row else f"row:{i}"
        for row, i in zip(rows, indices, strict=True)
    ]
    places = [f"example {shown(name)}" for name in example_ids]
    readings = [data_format.convert(row, where) for row, where in zip(rows, places, strict=True)]
    texts = [
        _text(reading.pair, tokenizer, data_format.conversational, where)
        for reading, where in zip(readings, places, strict=True)
    ]
    encoded = iter(PairEncoder(tokenizer).encode([text for text in texts if text], data_format.conversational))
    result = [
        _row(text, next(encoded) if text else PairTokens([], [], [], False), limits, tokenizer.bos_token_id, reading)
        for text, reading in zip(texts, readings, strict=True)
    ]
    return {"example_id": example_ids, **{name: [row[name] for row in result] for name in result[0]}}


def _example_ids(dataset: datasets.Dataset) -> Callable[[int], str]:
    """The name of each row: its example_id, which must be text, or "row:N"."""
    if "example_id" not in dataset.column_names:
        return lambda i: f"row:{i}"
    named = dataset.select_columns("example_id")
    return lambda i: string_field(named[i], "example_id", f"row {i}")


def _text(pair: Pair | None, tokenizer: PreTrainedTokenizerBase, conversational: bool, where: str) -> PairText | None:
    if pair is None:
        return None
    if conversational:
        return render_conversation(tokenizer, pair, where)
    prompt, chosen, rejected = (str(part) for part in pair)
    return PairText(prompt, prompt + chosen, prompt + rejected)


def _row(
    text: PairText | None, tokens: PairTokens, limits: LengthLimits, bos: int | None, reading: Reading
) -> dict[str, Any]:
    prompt = limits.cut_prompt(tokens.prompt, bos)
    chosen, rejected = (limits.cut_completion(ids, len(prompt)) for ids in (tokens.chosen, tokens.rejected))
    why = ""
    parts = reading.pair
    if text is None or (not prompt and "without_shared_prompt" in reading.notes):
        why = "no shared prompt"
    elif not prompt:
        why = "template writes no prompt" if parts and parts.prompt else "no prompt"
    elif not (chosen and rejected):
        why = "prompt fills max_length"
    elif text.chosen == text.rejected and parts and parts.chosen != parts.rejected:
        why = "template writes both answers alike"
    elif chosen == rejected:
        why = "same answers" if tokens.chosen == tokens.rejected else "same answers once cut"
    kept = not why
    return {
        "prompt_ids": prompt,
        "chosen_ids": chosen,
        "rejected_ids": rejected,
        "length": 2 * len(prompt) + len(chosen) + len(rejected),
        _DROPPED: why,
        "truncated_prompts": kept and len(prompt) < len(tokens.prompt),
        "truncated_completions": kept and (chosen != tokens.chosen or rejected != tokens.rejected),
        "boundary_merges": kept and tokens.boundary_merge,
        "header_in_completions": kept and text is not None and text.header_in_completion,
        **{name: kept and name in reading.notes for name in _NOTES},
    }
