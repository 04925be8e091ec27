"""All rows decide what a data set is, in whatever order they come, and every row that was read is accounted for."""

from __future__ import annotations

import itertools
import json
import os
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny
from hypothesis import given
from hypothesis import strategies as st

from fastdpo.data import ReadReport, read_preferences, tokenize_preferences
from fastdpo.data.hh_rlhf import _TURN, is_transcript
from fastdpo.data.rendering import set_chat_template
from fastdpo.data.reports import NO_ROWS, Tally

H, A = "\n\nHuman: ", "\n\nAssistant: "
PLAIN = {"prompt": "q ", "chosen": "yes", "rejected": "no"}
IMPLICIT = {"chosen": "The sea is deep", "rejected": "The sea is red"}
TRANSCRIPTS = {"chosen": f"{H}q{A}yes", "rejected": f"{H}q{A}no"}


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


ASKED = {"prompt": [user("q")], "chosen": [assistant("yes")], "rejected": [assistant("no")]}


def read(folder: Path, *rows: dict[str, Any], **arguments: Any) -> tuple[datasets.Dataset, ReadReport]:
    path = folder / "t.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return read_preferences(path, cache_dir=folder / "cache", **arguments)


@pytest.mark.parametrize(
    ("odd", "others", "says"),
    [
        ({**PLAIN, "system": "Be brief."}, PLAIN, r"^\S*t.jsonl, line {odd}: the column 'system' looks like a part"),
        ({**PLAIN, "History": ["before"]}, PLAIN, r"line {odd}: the column 'History' looks like a part of the prompt"),
        ({**PLAIN, "tools": [{"name": "f"}]}, PLAIN, r"line {odd}: the column 'tools' holds what is not supported"),
        ({**IMPLICIT, "messages": [user("q")]}, IMPLICIT, r"line {odd}: the column 'messages' .*'prompt'; rename it"),
        (PLAIN, IMPLICIT, r"line {odd} has a prompt.*line {other} has answers.*give every row its prompt, or none|"
         r"line {other} has answers.*line {odd} has a prompt.*give every row its prompt, or none"),
        (
            {"chosen": f"{H}hello", "rejected": f"{H}hi"},
            TRANSCRIPTS,
            r"line {odd}: .*'chosen' is not an HH-RLHF transcript.*data_format='trl'.*line {other}, which has two HH",
        ),
        ({**PLAIN, "chosen": None}, PLAIN, r"line {odd}: the field 'chosen' .*null.*that of \S*t.jsonl, line {other}"),
        ({**PLAIN, "chosen": [assistant("y")]}, PLAIN, r"line {odd}: the field 'chosen' .*a string.*line {other}"),
        (
            {**ASKED, "chosen": [user("q"), assistant("y")]},
            ASKED,
            r"line {odd}: the messages of 'chosen' repeat the prompt, and those of the other answer do not",
        ),
        ({**ASKED, "rejected": [{"role": "gpt", "content": "n"}]}, ASKED, r"line {odd}: 'rejected' .*no answer"),
    ],
)  # fmt: skip
def test_one_odd_row_is_named_wherever_it_stands(tmp_path, odd, others, says):
    for place in range(3):
        rows = [others, others]
        rows.insert(place, odd)
        with pytest.raises(ValueError, match=says.format(odd=place + 1, other=2 if place == 0 else 1)):
            read(tmp_path, *rows)


@pytest.mark.parametrize("name", ["system", "tools", "context", "prompt", "messages"])
@pytest.mark.parametrize("empty", [None, [], {}])
def test_columns_that_are_empty_everywhere_count_as_absent(tmp_path, name, empty):
    if name == "prompt" and empty == {}:
        return
    for order in itertools.permutations([IMPLICIT, {**IMPLICIT, name: empty}]):
        dataset, report = read(tmp_path, *order)
        assert dataset["prompt"] == ["The sea is"] * 2
        assert report == ReadReport(2, 2)
    arrow = datasets.Dataset.from_dict({**{key: [value] * 2 for key, value in IMPLICIT.items()}, name: [None, None]})
    assert tokenize_preferences(arrow, tiny.tokenizer())[1].kept == 2


@pytest.mark.parametrize(
    ("row", "says"),
    [
        (
            {**ASKED, "prompt": "q"},
            r"line 1: 'prompt' is a str, but 'chosen' is a list of messages without the question",
        ),
        (
            {**PLAIN, "prompt": [user("q")]},
            r"line 1: 'prompt' is a list of messages, but 'chosen' and 'rejected' are str",
        ),
        ({**PLAIN, "chosen": [assistant("y")]}, r"line 1: 'chosen' is a list and 'rejected' is a string; write both"),
        (
            {
                "prompt": "Which colour has the sea?",
                "chosen": "Which colour has the sea? Blue",
                "rejected": "Which colour has the sea? Red",
            },
            r"in every row both answers begin with the prompt \(\S*t.jsonl, line 1\).*remove the column 'prompt'",
        ),
        (
            {**IMPLICIT, "Prompt": "Why?"},
            r"line 1: the column 'Prompt' looks like the prompt, which is read from 'prompt'",
        ),
    ],
)
def test_kinds_that_do_not_go_together(tmp_path, row, says):
    with pytest.raises(ValueError, match=says):
        read(tmp_path, row)


def test_answers_that_begin_with_a_short_prompt_by_chance(tmp_path):
    row = {"prompt": "Say hi", "chosen": "Say hi back", "rejected": "Say hi"}
    dataset, report = read(tmp_path, *[row] * 9)
    assert (report.prompt_in_answers.count, report.is_plain) == (9, False)
    assert dataset[8]["chosen"] == "Say hi back"
    assert tokenize_preferences(datasets.Dataset.from_list([row]), tiny.tokenizer())[1].prompt_in_answers == 1
    twenty = {"prompt": "q" * 20, "chosen": "q" * 21, "rejected": "q" * 22}  # no accident
    for rows in ([row] * 10, [row, twenty], [twenty]):
        with pytest.raises(ValueError, match="in every row both answers begin with the prompt"):
            read(tmp_path, *rows)


def test_every_row_is_accounted_for(tmp_path):
    twice = {**ASKED, "chosen": [user("q"), assistant("yes")], "rejected": [user("q"), assistant("no")]}
    after = {**ASKED, "chosen": [assistant("yes"), user("thanks")]}
    dataset, report = read(tmp_path, ASKED, twice, after)
    assert [row["chosen"] for row in dataset] == [[assistant("yes")]] * 3
    assert [row["rejected"] for row in dataset] == [[assistant("no")]] * 3
    assert report == ReadReport(
        3, 3, repeated_prompts=Tally(1, ("t.jsonl:2",)), unanswered_turns=Tally(1, ("t.jsonl:3",))
    )
    assert not report.is_plain
    # The same rows without the reader; and through it, with nothing left to take out.
    direct = datasets.Dataset.from_list([ASKED, twice, after])
    tokenizer = tiny.tokenizer()
    of_direct, told = tokenize_preferences(direct, tokenizer)
    of_read, plain = tokenize_preferences(dataset, tokenizer)
    assert (told.repeated_prompts, told.unanswered_turns, plain.repeated_prompts, plain.unanswered_turns) == (
        1,
        1,
        0,
        0,
    )
    assert [of_direct[name] for name in ("prompt_ids", "chosen_ids")] == [
        of_read[name] for name in ("prompt_ids", "chosen_ids")
    ]

    stray = {"chosen": f"{H}q{A}yes", "rejected": f"{H}other{A}no"}
    _, report = read(tmp_path, *[TRANSCRIPTS, stray] * 7)
    assert (report.rows, report.used) == (14, 7)
    assert report.summary().endswith(
        "left out 7 (no Human turn shared by chosen and rejected, so no prompt: t.jsonl:2, t.jsonl:4, t.jsonl:6, "
        "t.jsonl:8, t.jsonl:10 and 2 more)"
    )
    _, report = read(tmp_path, PLAIN, {**PLAIN, "chosen": "q yes", "rejected": "q no"})
    assert report.prompt_in_answers == Tally(1, ("t.jsonl:2",))
    _, report = read(tmp_path, IMPLICIT, {"chosen": "yes", "rejected": "no"})
    assert report.without_shared_prompt == Tally(1, ("t.jsonl:2",))
    with pytest.raises(ValueError, match=r"5 rows were read, but 3 \+ 0 are accounted for"):
        ReadReport(5, 3)


def test_a_repeated_question_of_a_conversation_that_was_read_is_none_of_the_prompt(tmp_path):
    """Read once, the prompt is "q", and only one answer begins with it; that is no prompt repeated in one answer."""
    row = {"chosen": [user("q"), user("q"), assistant("yes")], "rejected": [user("q"), assistant("no")]}
    dataset, report = read(tmp_path, row)
    assert report == ReadReport(1, 1, unanswered_turns=NO_ROWS)
    assert tokenize_preferences(dataset, tiny.tokenizer())[1].kept == 1


@given(st.lists(st.sampled_from(["\r", "\n", "\n\n", "Human:", "Assistant:", " ", "x"]), max_size=9).map("".join))
def test_transcripts_are_what_the_parser_finds(text):
    assert is_transcript(text) == ({mark.group(1) for mark in _TURN.finditer(text)} == {"Human", "Assistant"})


def test_what_parquet_holds_beside_text(tmp_path):
    text = pa.array(["p", "q"])
    good = {"prompt": text.dictionary_encode(), "chosen": pa.array(["a", "b"], pa.large_string()), "rejected": text}
    broken = pa.array([b"p", b"\xff"]).view(pa.string())
    path = tmp_path / "t.parquet"

    def write(**columns: Any) -> Path:
        pq.write_table(pa.table({**good, **columns}), path)
        return path

    cache = tmp_path / "cache"
    dataset, _ = read_preferences(write(note=broken, system=pa.array([None, ""])), cache_dir=cache)
    assert (dataset["prompt"][:], dataset["chosen"][:]) == (["p", "q"], ["a", "b"])
    for columns, says in (
        ({"rejected": broken}, r"t.parquet, row 1: the field 'rejected' cannot be read \(UnicodeDecodeError"),
        ({"system": pa.array(["", "s"])}, r"t.parquet, row 1: the column 'system'"),
        ({"tools": pa.array([{"a": None}, {"a": 1}])}, r"t.parquet, row 1: the column 'tools'"),
        ({"chosen": pa.array([0, 1], pa.date32())}, r"row 0: the field 'chosen' must be a string, found date"),
    ):
        with pytest.raises(ValueError, match=says):
            read_preferences(write(**columns), cache_dir=cache)
    pq.write_table(pa.table([text, text, text], names=["chosen", "rejected", "chosen"]), path)
    with pytest.raises(ValueError, match="more than one column is called 'chosen'"):
        read_preferences(path, cache_dir=cache)


def test_paths_that_cannot_be_read(tmp_path):
    os.mkfifo(tmp_path / "pipe.jsonl")
    (tmp_path / "round.jsonl").symlink_to("round.jsonl")
    for name, says in (("pipe.jsonl", "neither a file nor a folder"), ("round.jsonl", "is a link to 'round.jsonl'")):
        with pytest.raises((ValueError, FileNotFoundError), match=says):
            read_preferences(tmp_path / name)
    broken = {
        "dict/dataset_dict.json": "{",
        "missing/dataset_dict.json": '{"splits": ["train"]}',
        "state/state.json": "{}",
        "yaml/README.md": "---\nconfigs:\n- [\n---\n",
    }
    for name, text in broken.items():
        file = tmp_path / name
        file.parent.mkdir()
        file.write_text(text)
        (file.parent / "train.jsonl").write_text(json.dumps(PLAIN))
        with pytest.raises((ValueError, FileNotFoundError), match=rf"path='.*{file.parent.name}'.* cannot be read \("):
            read_preferences(file.parent)


def test_a_worker_says_which_row(tmp_path):
    for number, text in enumerate(["no", "\ud83d"]):
        (tmp_path / f"train-{number}.jsonl").write_text(json.dumps({**PLAIN, "rejected": text}))
    with pytest.raises(
        ValueError, match=r"train-1.jsonl, line 1: the field 'rejected' has half of a surrogate pair, '\\ud83d'"
    ):
        read_preferences(tmp_path, num_proc=2, cache_dir=tmp_path / "cache")


@pytest.mark.parametrize(
    ("template", "says"),
    [
        ("{{ 1 / 0 }}", "fails for .*ZeroDivisionError: division by zero"),
        ("{{ messages + 1 }}", "fails for .*TypeError"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "fails for .*RecursionError"),
        ("{{ raise_exception('no \x1b[2J') }}", r"refuses .*\(no \\x1b\[2J\)"),
    ],
)
def test_whatever_a_template_raises_names_the_row(template, says):
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = template
    row = {**ASKED, "prompt": [{"role": "us\u202eer", "content": "q"}]}
    with pytest.raises(ValueError, match=rf"^example row:0: the chat template {says}") as caught:
        tokenize_preferences(datasets.Dataset.from_list([row]), tokenizer)
    assert "'us\\u202eer', 'assistant'" in str(caught.value)


def test_template_files(tmp_path):
    path = tmp_path / "chat.jinja"
    for content, says in ((b"\xff", "is not UTF-8"), (b"a\n{% if %}", "line 2: not a valid Jinja template")):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=rf"chat_template='.*chat.jinja'.*{says}"):
            set_chat_template(tiny.tokenizer(), path)
    with pytest.raises(FileNotFoundError, match=r"chat_template='.*none.jinja': no such file"):
        set_chat_template(tiny.tokenizer(), tmp_path / "none.jinja")
    path.write_text("{{ raise_exception('only with a system message') }}")  # the rows will tell
    set_chat_template(tokenizer := tiny.tokenizer(), path)
    assert tokenizer.chat_template == path.read_text()


@pytest.mark.parametrize(("wrong", "shown"), [(-1, "-1"), (2**31, "2147483648"), (None, "null")])
def test_ids_that_no_vocabulary_has(wrong, shown):
    columns = {"prompt_ids": [[1], [1], [1]], "chosen_ids": [[1, 2], [3], [4, wrong]], "rejected_ids": [[5], [6], [7]]}
    with pytest.raises(ValueError, match=rf"'chosen_ids' has (the|a) .*{shown}.* in row 2"):
        tokenize_preferences(datasets.Dataset.from_dict(columns), tiny.tokenizer())
