"""Pairs that tokenisation drops all at once: a batch without any left, and templates that pass over the messages."""

from __future__ import annotations

import datasets
import pytest
import tiny

from fastdpo.data import TokenizationReport, tokenize_preferences


@pytest.mark.parametrize("num_proc", [None, 2])
@pytest.mark.parametrize("transcripts", [False, True])
def test_a_batch_whose_rows_are_all_left_out_is_counted(transcripts, num_proc):
    def row(first, second):
        if transcripts:
            return {
                "chosen": f"\n\nHuman: {first}\n\nAssistant: y",
                "rejected": f"\n\nHuman: {second}\n\nAssistant: n",
            }
        whole = tiny.conversation([first], ["y"], []), tiny.conversation([second], ["n"], [])
        return {name: each["prompt"] + each["chosen"] for name, each in zip(("chosen", "rejected"), whole, strict=True)}

    good, odd = row("q", "q"), row("a", "b")
    # Batches are of 1000 rows, or of each worker's share
    rows = [good] * 1000 if num_proc is None else [good]
    _, report = tokenize_preferences(datasets.Dataset.from_list([*rows, odd]), tiny.tokenizer(), num_proc=num_proc)
    assert report == TokenizationReport(len(rows) + 1, len(rows), dropped_empty=1)
    with pytest.raises(ValueError, match=r"no pair is left: kept 0 of 2 pairs, dropped empty 2 \(no shared prompt"):
        tokenize_preferences(datasets.Dataset.from_list([odd] * 2), tiny.tokenizer(), num_proc=num_proc)


@pytest.mark.parametrize(
    ("template", "says"),
    [
        ("{# nothing #}", r"dropped empty 1 \(template writes no prompt: row:0\); set another chat template"),
        ("{{ 'x' }}", r"dropped identical 1 \(template writes both answers alike: row:0\); set another chat template"),
        (
            "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}",
            r"dropped identical 1 \(template writes both answers alike: row:0\); set another chat template",
        ),
    ],
)
def test_templates_that_pass_over_the_messages_are_blamed(template, says):
    dataset = datasets.Dataset.from_list([tiny.conversation(["q"], ["y"], ["n"])])
    made = tiny.tokenizer()
    made.chat_template = template
    with pytest.raises(ValueError, match=says):
        tokenize_preferences(dataset, made)
    same = datasets.Dataset.from_list([tiny.conversation(["q"], ["y"], ["y"])])
    with pytest.raises(ValueError, match=r"\(same answers: row:0\); pairs with the same answers"):
        tokenize_preferences(same, tiny.tokenizer())
