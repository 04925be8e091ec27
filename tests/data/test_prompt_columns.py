"""Columns and keys of messages beside those that are read: what adds to a prompt is refused, the rest is said."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny

from fastdpo.data import ReadReport, read_preferences, tokenize_preferences

H, A = "\n\nHuman: ", "\n\nAssistant: "


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


ASKED = {"prompt": [user("q")], "chosen": [assistant("yes")], "rejected": [assistant("no")]}
ANN = [{"role": "system", "content": "Be brief.\nBe kind."}, user("Who is  Ann?")]
WHOLE = {"chosen": [*ANN, assistant("She is"), user("And?"), assistant("yes")], "rejected": [*ANN, assistant("no")]}
SAID = {"prompt": "Be brief. Who is Ann?", "chosen": "Ann, she", "rejected": "no"}
SHARED = {"chosen": "Who is Ann? She", "rejected": "Who is Ann? Ann"}
TALKS = {"chosen": f"{H}Who is Ann?{A}yes", "rejected": f"{H}Who is Ann?{A}no"}
SPLIT = {"prompt": ANN, "chosen": [assistant("yes")], "rejected": [assistant("no")]}


def read(folder: Path, *rows: dict[str, Any], **arguments: Any) -> tuple[datasets.Dataset, ReadReport]:
    path = folder / "t.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return read_preferences(path, cache_dir=folder / "cache", **arguments)


@pytest.mark.parametrize(
    ("row", "column", "value", "adds"),
    [
        *((WHOLE, name, "Who is Ann?", False) for name in ("question", "instruction", "Query ")),
        *((row, "question", "Who is\n Ann?\n", False) for row in (SPLIT, SAID, SHARED, TALKS)),
        (WHOLE, "system", "Be brief. Be kind.", False),
        (WHOLE, "system", "Be brief", False),
        (WHOLE, "system", "Be rude.", True),
        (SAID, "input", "She", True),  # of an answer
        (SAID, "input", "brief", False),
        (SAID, "input", "rie", True),  # within a word
        (SAID, "input", "f. W", True),
        ({**SAID, "prompt": "问：海是什么颜色？"}, "question", "海是什么", False),
        (WHOLE, "context", "She is", True),
        (WHOLE, "history", [["Who is Ann?", ""], []], False),
        (WHOLE, "history", [user("Who is Ann?"), assistant("Not she")], True),
        (SAID, "history", {"content": None, "turns": ["Be brief."]}, False),
        (SAID, "context", 7, True),
        *((SAID, name, empty, False) for name in ("system", "tools") for empty in (" \n", "[]", "{}", " null", [""])),
        (SAID, "tools", [{"name": None, "of": []}], False),
        (SAID, "tools", [{"name": "Ann"}], True),
        (SAID, "chat_template_kwargs", {"thinking": False}, True),
        (SHARED, "user_prompt", "Who is Ann?", False),
        (SHARED, "user_prompt", "She", True),
        (SHARED, "messages", [user("Who is Ann?"), assistant("She")], False),
        (SHARED, "messages", [user("Hi"), assistant("She")], True),
        (SAID, "messages", [user("Hi")], False),  # a prompt is known
        # No question is shared, so there is no pair that could miss it.
        ({"chosen": [user("a"), assistant("y")], "rejected": [user("b"), assistant("n")]}, "question", "a", False),
    ],
)  # fmt: skip
@pytest.mark.parametrize("parquet", [False, True])
def test_a_column_is_refused_where_it_adds_to_the_prompt(tmp_path, row, column, value, adds, parquet):
    # Beside a row that has nothing there, and gives a pair
    plain = {name: WHOLE[name] for name in ("chosen", "rejected")} if value == "a" else row
    rows = [plain, {**row, column: value}]
    arguments = {"cache_dir": tmp_path / "cache"}
    path = tmp_path / ("t.parquet" if parquet else "t.jsonl")
    if parquet:
        pq.write_table(pa.Table.from_pylist([{**rows[0], column: None}, rows[1]]), path)
    else:
        path.write_text("".join(json.dumps(each) + "\n" for each in rows))
    if adds:
        where = "row 1" if parquet else "line 2"
        with pytest.raises(ValueError, match=rf"{where}: the column '{column}' .*(remove_columns\('{column}'\)).*"):
            read_preferences(path, **arguments)
    else:
        assert read_preferences(path, **arguments)[1].rows == 2


def test_the_shape_of_orpo_dpo_mix(tmp_path):
    row = {"source": "toxic", **WHOLE, "prompt": "Who is  Ann?", "question": "Who is  Ann?"}
    dataset, report = read(tmp_path, row, {**row, "prompt": "A copy that is not read", "question": None})
    assert (dataset[1]["prompt"], report.used) == (ANN, 2)
    # The string beside conversations is not read, so it does not excuse a question that they lack.
    with pytest.raises(ValueError, match=r"line 1: the column 'question' .*found 'Who is Bob\?', but"):
        read(tmp_path, {**row, "prompt": "Who is Bob?", "question": "Who is Bob?"})


def test_keys_of_messages_that_no_template_writes_are_said(tmp_path, caplog):
    asked = {**user("q"), "weight": 0, "id": "x\x1b", "tool_calls": [], "name": None}
    row = {"prompt": [asked], "chosen": [{**assistant("yes"), "weight": 1}], "rejected": [assistant("no")]}
    dataset, _ = read(tmp_path, row, ASKED, row)
    assert dataset.to_list() == [{**ASKED, "example_id": f"t.jsonl:{line}"} for line in (1, 2, 3)]
    assert "keys of messages not read: 'id' in 2 rows, 'weight' in 2 rows" in caplog.text
    caplog.clear()
    assert tokenize_preferences(datasets.Dataset.from_list([row, ASKED, row]), tiny.tokenizer())[1].kept == 3
    assert "keys of messages not read: 'id' in 2 rows, 'weight' in 2 rows" in caplog.text
    for key in ("name", "reasoning_content", "images"):
        with pytest.raises(ValueError, match=rf"line 2: the message prompt\[0\] has the keys \['{key}'\], which chat"):
            read(tmp_path, ASKED, {**ASKED, "prompt": [{**user("q"), key: "x"}]})
