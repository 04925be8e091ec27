"""The preference formats that can be read, and the choice among them from all rows of a data set."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from fastdpo.data import beavertails, hh_rlhf, trl_format
from fastdpo.data.errors import PreferenceDataError
from fastdpo.data.foreign_columns import refuse_foreign_columns
from fastdpo.data.prompt_columns import is_foreign
from fastdpo.data.shared_prefix import Reading
from fastdpo.data.survey import Columns, FirstRow, Shape, Survey


@dataclass(frozen=True)
class PreferenceFormat:
    """How the rows of one data set become pairs.

    columns: the columns that are read; optional: those that may be missing. conversational: whether pairs hold lists
    of messages or strings. convert(row, where): what the row gives, without a pair where this format leaves it out,
    for `drop_reason`. shapes: those of TRL's rows that have this form. holds: what such a row holds, for messages.
    """

    name: str
    columns: tuple[str, ...]
    conversational: bool
    convert: Callable[[Mapping[str, Any], str], Reading]
    drop_reason: str = ""
    optional: tuple[str, ...] = ()
    shapes: tuple[Shape, ...] = ()
    holds: str = ""

    def read_of(self, columns: Iterable[str]) -> list[str]:
        """The columns to read of a data set that has `columns`."""
        there = set(columns)
        return [*self.columns, *(name for name in self.optional if name in there)]


HH_RLHF = PreferenceFormat("hh-rlhf", hh_rlhf.COLUMNS, True, hh_rlhf.convert, hh_rlhf.DROP_REASON)
BEAVERTAILS_HELPFUL = PreferenceFormat(
    "beavertails-helpful", beavertails.HELPFUL_COLUMNS, True, beavertails.convert_helpful
)
BEAVERTAILS_HARMLESS = PreferenceFormat(
    "beavertails-harmless",
    beavertails.HARMLESS_COLUMNS,
    True,
    beavertails.convert_harmless,
    beavertails.HARMLESS_DROP_REASON,
)
EXPLICIT_PLAIN = PreferenceFormat(
    "trl",
    trl_format.EXPLICIT_COLUMNS,
    False,
    trl_format.convert_explicit_plain,
    shapes=(Shape("string", "string", "string"),),
    holds="a prompt and answers that are strings",
)
IMPLICIT_PLAIN = PreferenceFormat(
    "trl",
    trl_format.IMPLICIT_COLUMNS,
    False,
    trl_format.convert_implicit_plain,
    shapes=(Shape("none", "string", "string"),),
    holds="answers that are strings, without a prompt",
)
EXPLICIT_CONVERSATIONAL = PreferenceFormat(
    "trl",
    trl_format.EXPLICIT_COLUMNS,
    True,
    trl_format.convert_explicit_conversational,
    shapes=(Shape("list", "list", "list"),),
    holds="a prompt and answers that are lists of messages",
)
IMPLICIT_CONVERSATIONAL = PreferenceFormat(
    "trl",
    trl_format.IMPLICIT_COLUMNS,
    True,
    trl_format.convert_implicit_conversational,
    trl_format.DROP_REASON,
    optional=("prompt",),
    shapes=tuple(Shape(kind, "list", "list") for kind in ("none", "string", "other")),
    holds="answers that are lists of messages, without a prompt of messages",
)
_TRL_FORMS = (EXPLICIT_PLAIN, IMPLICIT_PLAIN, EXPLICIT_CONVERSATIONAL, IMPLICIT_CONVERSATIONAL)
#: What `load_preferences` gives: read once already, so that nothing is taken out of it again.
CANONICAL_PLAIN = PreferenceFormat("trl", trl_format.EXPLICIT_COLUMNS, False, trl_format.convert_canonical_plain)
CANONICAL_CONVERSATIONAL = PreferenceFormat(
    "trl", trl_format.EXPLICIT_COLUMNS, True, trl_format.convert_canonical_conversational
)

#: From so many rows on, or with a prompt of so many characters, both answers begin with it by no accident.
_FEW, _LONG = 10, 20

_NAMED = {f.name: f for f in (HH_RLHF, BEAVERTAILS_HELPFUL, BEAVERTAILS_HARMLESS)}
_ACCEPTED_COLUMNS = {**{name: f.columns for name, f in _NAMED.items()}, "trl": trl_format.IMPLICIT_COLUMNS}
DATA_FORMATS = ("auto", *_ACCEPTED_COLUMNS)
#: What a survey must look at.
COLUMNS = Columns(frozenset(name for f in (*_NAMED.values(), *_TRL_FORMS) for name in f.columns), is_foreign)


def check_data_format(data_format: str) -> None:
    if data_format not in DATA_FORMATS:
        raise PreferenceDataError(f"data_format={data_format!r} is unknown; accepted: {', '.join(DATA_FORMATS)}")


def choose_format(survey: Survey, data_format: str, label: str) -> PreferenceFormat:
    """The format named, or for "auto" the one that fits the columns and every row.

    chosen and rejected without prompt are HH-RLHF when both texts of some row are transcripts, and then those of
    every row must be; else they are TRL's implicit form. The two readings of BeaverTails have the same columns and
    must be named. Which rows come first does not matter. label: names the data set in messages.
    Raises PreferenceDataError for an unknown name, columns that fit no format (or not the one named), a row that does
    not fit, rows of two forms, and a column with content that belongs to the prompt and is not read.
    """
    check_data_format(data_format)
    named = _detect(survey, label) if data_format == "auto" else data_format
    if missing := [name for name in _ACCEPTED_COLUMNS[named] if name not in survey.content]:
        raise _wrong_columns(survey, label, f"data_format={named!r} needs {missing}")
    chosen = _trl_form(survey) if named == "trl" else _NAMED[named]
    refuse_foreign_columns(survey, chosen.read_of(survey.content), chosen is not IMPLICIT_PLAIN, named, label)
    if chosen is HH_RLHF and data_format == "auto" and survey.no_transcript:
        assert survey.transcript is not None
        _refuse(survey.no_transcript, chosen, survey.transcript, "two HH-RLHF transcripts")
    if chosen is EXPLICIT_PLAIN:
        _refuse_repeated_prompts(survey, label)
    return chosen


def _detect(survey: Survey, label: str) -> str:
    columns = set(survey.content)
    if columns >= set(trl_format.IMPLICIT_COLUMNS):
        messages = any(shape in survey.shapes for form in _TRL_FORMS if form.conversational for shape in form.shapes)
        transcripts = survey.transcript and not survey.content.get("prompt") and not messages
        return "hh-rlhf" if transcripts else "trl"
    readings = [
        name for name in ("beavertails-helpful", "beavertails-harmless") if columns >= set(_ACCEPTED_COLUMNS[name])
    ]
    if len(readings) == 1:
        return readings[0]
    if readings:
        raise PreferenceDataError(
            f"{label}: the columns are those of BeaverTails, which has two readings; pass "
            "data_format='beavertails-helpful' (chosen is the better response) or 'beavertails-harmless' (chosen is "
            "the only safe response)"
        )
    raise _wrong_columns(survey, label, "no format fits")


def _trl_form(survey: Survey) -> PreferenceFormat:
    """The one form that all rows have."""
    first = {
        form: min(survey.shapes[shape] for shape in form.shapes if shape in survey.shapes)
        for form in _TRL_FORMS
        if any(shape in survey.shapes for shape in form.shapes)
    }
    strays = sorted((row, shape) for shape, row in survey.shapes.items() if not any(shape in f.shapes for f in first))
    if not first:
        _refuse_kinds(*strays[0])
    if len(first) > 1:
        (one, here), (other, there) = sorted(first.items(), key=lambda item: item[1].number)[:2]
        prompts = {one, other} in ({EXPLICIT_PLAIN, IMPLICIT_PLAIN}, {EXPLICIT_CONVERSATIONAL, IMPLICIT_CONVERSATIONAL})
        advice = "give every row its prompt, or none" if prompts else "write all rows in one way"
        raise PreferenceDataError(
            f"{there.row.where} has {other.holds}, but {here.row.where} has {one.holds}; {advice}, or put them into "
            "data sets of their own"
        )
    ((form, example),) = first.items()
    if strays:
        _refuse(strays[0][0], form, example, form.holds)
    return form


def _refuse(stray: FirstRow, form: PreferenceFormat, example: FirstRow, holds: str) -> NoReturn:
    """Raises what the format says of a row that does not fit it, with the row that does beside it."""
    beside = f"; the format of all rows is that of {example.row.where}, which has {holds}"
    try:
        form.convert(stray.row.fields, stray.row.where)
    except PreferenceDataError as error:
        raise PreferenceDataError(f"{error}{beside}") from None
    raise PreferenceDataError(f"{stray.row.where}: this row has another form{beside}")


def _refuse_kinds(stray: FirstRow, shape: Shape) -> NoReturn:
    """Raises for a row whose columns do not go together, where no row shows what was meant."""
    where, kinds = stray.row.where, {shape.chosen, shape.rejected}
    as_messages = "[{'role': 'assistant', 'content': ...}]"
    if kinds == {"list", "string"}:
        lists, strings = ("chosen", "rejected") if shape.chosen == "list" else ("rejected", "chosen")
        raise PreferenceDataError(
            f"{where}: {lists!r} is a list and {strings!r} is a string; write both as strings, or both as lists of "
            f"messages: {as_messages}"
        )
    if shape.prompt == "list" and kinds == {"string"}:
        raise PreferenceDataError(
            f"{where}: 'prompt' is a list of messages, but 'chosen' and 'rejected' are strings; write the answers as "
            f"messages too: {as_messages}, or the prompt as a string"
        )
    explicit = EXPLICIT_CONVERSATIONAL if shape.prompt == "list" else IMPLICIT_CONVERSATIONAL
    plain = IMPLICIT_PLAIN if shape.prompt == "none" else EXPLICIT_PLAIN
    (explicit if "list" in kinds else plain).convert(stray.row.fields, where)
    raise PreferenceDataError(f"{where}: the row has no form that is known")


def _refuse_repeated_prompts(survey: Survey, label: str) -> None:
    """Raises where the answers of every row begin with its prompt, as in a data set that holds whole texts.

    A few answers may well begin with a short prompt ("Say hi": "Say hi back"): those are kept, counted and said.
    """
    by_chance = survey.repeated.count < _FEW and survey.longest_repeated < _LONG
    if survey.repeated.count == survey.prompted and not by_chance:
        raise PreferenceDataError(
            f"{label}: in every row both answers begin with the prompt ({survey.repeated.names()}), which would be "
            "trained on twice; remove the column 'prompt', or take the prompt out of the answers"
        )


def _wrong_columns(survey: Survey, label: str, problem: str) -> PreferenceDataError:
    accepted = "; ".join(f"{name}: {', '.join(needed)}" for name, needed in _ACCEPTED_COLUMNS.items())
    return PreferenceDataError(
        f"{label}: {problem}; columns found: {sorted(survey.content)}; accepted: {accepted} (with or without prompt). "
        "Rename the columns, or name the right data_format"
    )
