"""Rows of every preference format against pairs written by hand."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastdpo.data.errors import PreferenceDataError
from fastdpo.data.fields import RawRow
from fastdpo.data.formats import choose_format
from fastdpo.data.hh_rlhf import convert as convert_hh
from fastdpo.data.hh_rlhf import parse_transcript
from fastdpo.data.survey import Survey


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def chosen_format(*rows, data_format="auto"):
    survey = Survey()
    for number, row in enumerate(rows, 1):
        survey.add(RawRow(number, f"file, line {number}", row))
    return choose_format(survey, data_format, "file")


def convert(row, data_format="auto"):
    return chosen_format(row, data_format=data_format).convert(row, "file, line 1").pair


H, A = "\n\nHuman: ", "\n\nAssistant: "


@pytest.mark.parametrize(
    ("chosen", "rejected", "expected"),
    [
        # One turn, and the last of several turns.
        (f"{H}q{A}yes", f"{H}q{A}no", ([user("q")], [assistant("yes")], [assistant("no")])),
        (
            f"{H}q{A}a{H}r{A}yes",
            f"{H}q{A}a{H}r{A}no",
            ([user("q"), assistant("a"), user("r")], [assistant("yes")], [assistant("no")]),
        ),
        # A text with blank lines and a "Human:" of its own after a single line break.
        (
            f"{H}a\n\nb\nHuman: c{A}1.\n\n2.\n",
            f"{H}a\n\nb\nHuman: c{A}no",
            ([user("a\n\nb\nHuman: c")], [assistant("1.\n\n2.\n")], [assistant("no")]),
        ),
        # They part at the first answer: everything after the shared question is completion.
        (
            f"{H}q{A}a{H}r{A}yes",
            f"{H}q{A}b{H}r{A}no",
            ([user("q")], [assistant("a"), user("r"), assistant("yes")], [assistant("b"), user("r"), assistant("no")]),
        ),
        # They part at the second question: a prompt ends with a question, so the shared answer is in both.
        (
            f"{H}q{A}a{H}r{A}yes",
            f"{H}q{A}a{H}s{A}no",
            ([user("q")], [assistant("a"), user("r"), assistant("yes")], [assistant("a"), user("s"), assistant("no")]),
        ),
        # An empty last answer, with and without the space after the colon.
        (f"{H}q{A}", f"{H}q{A}no", ([user("q")], [assistant("")], [assistant("no")])),
        (f"{H}q\n\nAssistant:", f"{H}q{A}no", ([user("q")], [assistant("")], [assistant("no")])),
        # Ends with a Human turn: shared with the other (an empty answer), or nobody's to answer (dropped).
        (
            f"{H}q{A}a{H}r",
            f"{H}q{A}a{H}r{A}no",
            ([user("q"), assistant("a"), user("r")], [assistant("")], [assistant("no")]),
        ),
        (f"{H}q{A}yes{H}bye", f"{H}q{A}no{H}ok", ([user("q")], [assistant("yes")], [assistant("no")])),
        # One transcript is the beginning of the other, and both are the same.
        (
            f"{H}q{A}a",
            f"{H}q{A}a{H}r{A}b",
            ([user("q")], [assistant("a")], [assistant("a"), user("r"), assistant("b")]),
        ),
        (f"{H}q{A}a", f"{H}q{A}a", ([user("q")], [assistant("a")], [assistant("a")])),
        # Leading text, and a transcript stripped of its first blank line.
        (
            f"Be kind.{H}q{A}yes",
            f"Be kind.{H}q{A}no",
            ([{"role": "system", "content": "Be kind."}, user("q")], [assistant("yes")], [assistant("no")]),
        ),
        (f"Human: q{A}yes", f"{H}q{A}no", ([user("q")], [assistant("yes")], [assistant("no")])),
        # No shared question: no prompt.
        (f"{H}q{A}yes", f"{H}other{A}no", None),
    ],
)
def test_hh_pairs(chosen, rejected, expected):
    assert convert_hh({"chosen": chosen, "rejected": rejected}, "here").pair == expected
    # The same with the line ends of Windows between the turns, whose texts are left as they are.
    crlf = [re.sub(r"\n\n(Human|Assistant):", r"\r\n\r\n\1:", text) for text in (chosen, rejected)]
    assert convert_hh(dict(zip(("chosen", "rejected"), crlf, strict=True)), "here").pair == expected


turn_text = st.text(st.sampled_from("aé \n:H漢"), max_size=12).map(lambda t: t + "uman") | st.text(max_size=20).filter(
    lambda t: not re.search(r"\n\r?\n(Human|Assistant):", t)
)


@given(st.lists(st.tuples(st.sampled_from(["user", "assistant"]), turn_text), min_size=1, max_size=6))
def test_hh_transcripts_round_trip(turns):
    turns = [("user", "q"), *turns, ("assistant", "a")]
    names = {"user": "Human", "assistant": "Assistant"}
    transcript = "".join(f"\n\n{names[role]}: {text}" for role, text in turns)
    assert parse_transcript(transcript, "chosen", "here") == [{"role": r, "content": t} for r, t in turns]


@pytest.mark.parametrize(("text", "missing"), [("no turns", "Assistant"), (f"{H}only a question", "Assistant")])
def test_hh_transcript_that_does_not_parse(text, missing):
    with pytest.raises(PreferenceDataError, match=rf"train.jsonl, line 3: the field 'rejected' .*{missing}"):
        convert_hh({"chosen": f"{H}q{A}a", "rejected": text}, "train.jsonl, line 3")


def beavertails(safe_0, safe_1, better):
    return {
        "prompt": "p",
        "response_0": "r0",
        "response_1": "r1",
        "is_response_0_safe": safe_0,
        "is_response_1_safe": safe_1,
        "better_response_id": better,
        "safer_response_id": 0,
    }


@pytest.mark.parametrize(
    ("row", "data_format", "chosen", "rejected"),
    [
        (beavertails(False, True, 0), "beavertails-helpful", "r0", "r1"),
        (beavertails(False, True, 1), "beavertails-helpful", "r1", "r0"),
        (beavertails(False, True, 0), "beavertails-harmless", "r1", "r0"),
        (beavertails(True, False, 1), "beavertails-harmless", "r0", "r1"),
        (beavertails(True, True, 0), "beavertails-harmless", None, None),
        (beavertails(False, False, 0), "beavertails-harmless", None, None),
    ],
)
def test_beavertails_readings(row, data_format, chosen, rejected):
    expected = None if chosen is None else ([user("p")], [assistant(chosen)], [assistant(rejected)])
    assert convert(row, data_format) == expected


def test_beavertails_must_be_named():
    with pytest.raises(PreferenceDataError, match=r"'beavertails-helpful'.*'beavertails-harmless'"):
        convert(beavertails(True, False, 0))


@pytest.mark.parametrize(
    ("chosen", "rejected", "expected"),
    [
        # The cut is between words, and the space goes with the completion.
        ("sky is blue", "sky is black", ("sky is", " blue", " black")),
        ("Q: hi\nA: yes", "Q: hi\nA: no", ("Q: hi\nA:", " yes", " no")),
        ("Q\nyes", "Q\nno", ("Q\n", "yes", "no")),
        ("say hi", "say hip", ("say", " hi", " hip")),
        ("say hi", "say hi there", ("say hi", "", " there")),
        ("The cat", "A dog", ("", "The cat", "A dog")),
        ("yes", "yet", ("", "yes", "yet")),
    ],
)
def test_implicit_plain_prompt_ends_between_words(chosen, rejected, expected):
    assert convert({"chosen": chosen, "rejected": rejected}) == expected


word_text = st.text(st.sampled_from("ab \n"), max_size=12)


@given(word_text, word_text, word_text)
def test_implicit_plain_split_loses_nothing(shared, first, second):
    chosen, rejected = shared + first, shared + second
    prompt, *rest = convert({"chosen": chosen, "rejected": rejected})
    assert [prompt + part for part in rest] == [chosen, rejected]
    if prompt and not prompt[-1].isspace():
        assert all(not part or part[0].isspace() for part in rest)


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "p", "chosen": "c", "rejected": "r"}, ("p", "c", "r")),
        (
            {"prompt": [user("p")], "chosen": [assistant("c")], "rejected": [assistant("r")]},
            ([user("p")], [assistant("c")], [assistant("r")]),
        ),
        # A string prompt beside whole conversations, as UltraFeedback has it, and none at all.
        *(
            (
                {
                    **extra,
                    "chosen": [user("p"), assistant("same"), user("q"), assistant("c")],
                    "rejected": [user("p"), assistant("same"), user("q"), assistant("r")],
                },
                ([user("p"), assistant("same"), user("q")], [assistant("c")], [assistant("r")]),
            )
            for extra in ({}, {"prompt": "p"})
        ),
        # Whole messages only: "c1" and "c2" share no letter of the prompt.
        (
            {"chosen": [user("p"), assistant("c1")], "rejected": [user("p"), assistant("c2")]},
            ([user("p")], [assistant("c1")], [assistant("c2")]),
        ),
        # Transcripts beside an explicit prompt are plain strings.
        ({"prompt": "p", "chosen": f"{H}q{A}a", "rejected": f"{H}q{A}b"}, ("p", f"{H}q{A}a", f"{H}q{A}b")),
    ],
)
def test_trl_forms(row, expected):
    assert convert(row) == expected


def test_named_trl_reads_transcripts_as_plain_text():
    row = {"chosen": f"{H}q{A}yes", "rejected": f"{H}q{A}no"}
    assert convert(row, "trl") == (f"{H}q\n\nAssistant:", " yes", " no")
    assert convert(row).prompt == [user("q")]


@pytest.mark.parametrize(
    ("row", "data_format", "message"),
    [
        (
            {"question": "q", "answer": "a"},
            "auto",
            r"columns found: \['answer', 'question'\]; accepted: hh-rlhf: chosen",
        ),
        ({"prompt": "p", "chosen": "c"}, "trl", r"needs \['rejected'\]; columns found: \['chosen', 'prompt'\]"),
        ({"chosen": "c", "rejected": "r"}, "beavertails-helpful", r"needs \['prompt', 'response_0'"),
        ({"chosen": "c", "rejected": "r"}, "hh", r"data_format='hh' is unknown; accepted: auto, hh-rlhf"),
        ({"chosen": "c", "rejected": "r", "tools": [{"type": "f"}]}, "auto", "'tools' holds what is not supported"),
        ({"chosen": "c", "rejected": 7}, "auto", "'rejected' must be a string, found int 7"),
        ({"chosen": [user("p"), "c"], "rejected": [user("p")]}, "auto", r"'chosen\[1\]' must be a message"),
        (
            {"chosen": [{"role": "user", "content": None}], "rejected": []},
            "auto",
            r"'chosen\[0\].content' must be a str",
        ),
        ({"chosen": [user("p")], "rejected": []}, "auto", "'rejected' must be a list with one or more messages"),
        (
            {"chosen": [{**user("p"), "tool_calls": [1]}], "rejected": [user("p")]},
            "auto",
            r"chosen\[0\] has the keys \['tool_calls'\]",
        ),
        (
            {"chosen": [{**user("p"), "Name": "Ann", "weight": 1}], "rejected": [user("p")]},
            "auto",
            r"chosen\[0\] has the keys \['Name'\], which chat templates write",
        ),
        (beavertails(None, True, 0), "beavertails-harmless", "'is_response_0_safe' must be true or false, found null"),
        (beavertails(True, True, 2), "beavertails-helpful", "'better_response_id' must be 0 or 1, found int 2"),
        ({**beavertails(True, False, 0), "response_1": None}, "beavertails-harmless", "'response_1' must be a string"),
    ],
)
def test_rows_that_do_not_fit(row, data_format, message):
    with pytest.raises(PreferenceDataError, match=message):
        convert(row, data_format)
