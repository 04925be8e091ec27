"""Token ids of pairs, written by hand as token strings over small byte-level vocabularies.

Without merges every character is one token; "Ġ" is a space and "Ċ" a line break.
"""

from __future__ import annotations

import logging

import datasets
import pytest
import tiny
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from fastdpo.data import PreferenceCollator, TokenizationReport, load_preferences, tokenize_preferences

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# As Llama 2's: BOS in the text, an end mark after answers only, and roles that must alternate.
INST = (
    "{{ bos_token }}{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if m.role == 'user' %}[{{ m.content }}]{% else %}{{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
BARE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
THINKING = CHATML.replace("<|im_start|>assistant\n{% endif %}", "<|im_start|>assistant\n<think>{% endif %}")
SPECIALS = ("<s>", "</s>", "<pad>", "<unk>", "<|im_start|>", "<|im_end|>")


def build(*merges, bos=None, eos="</s>", pad=None, adds_bos=False, template=None) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer with the given merges ("Ġ y" is the token "Ġy")."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = [tuple(merge.split(" ")) for merge in merges]
    vocab = {token: i for i, token in enumerate([*SPECIALS, *letters, *("".join(pair) for pair in pieces)])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=pieces))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIALS])
    if adds_bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", vocab["<s>"])]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=bos, eos_token=eos, pad_token=pad, chat_template=template
    )


def plain(*rows) -> datasets.Dataset:
    return datasets.Dataset.from_list([dict(zip(("prompt", "chosen", "rejected"), row, strict=True)) for row in rows])


def tokens_of(row, tokenizer) -> tuple[str, str, str]:
    return tuple(
        " ".join(tokenizer.convert_ids_to_tokens(row[name])) for name in ("prompt_ids", "chosen_ids", "rejected_ids")
    )


def tokenized(dataset, tokenizer, **limits):
    """The token strings of the only row, and the report."""
    result, report = tokenize_preferences(dataset, tokenizer, **limits)
    (row,) = result.to_list()
    return tokens_of(row, tokenizer), report


@pytest.mark.parametrize("adds_bos", [False, True])
@pytest.mark.parametrize("pad", [None, "<pad>", "</s>"])
def test_plain_text_has_one_bos_where_the_tokenizer_adds_it_and_one_eos(adds_bos, pad):
    tokenizer = build(bos="<s>", pad=pad, adds_bos=adds_bos)
    bos = "<s> " if adds_bos else ""
    expected = (f"{bos}h i", "Ġ y e s </s>", "Ġ n o </s>")
    assert tokenized(plain(("hi", " yes", " no")), tokenizer) == (expected, TokenizationReport(1, 1))
    if adds_bos:
        # Texts that bring their own marks get no second ones.
        assert tokenized(plain(("<s>hi", " yes</s>", " no</s>\n")), tokenizer)[0] == expected


def test_empty_answers_and_unknown_letters_end_with_eos():
    tokenizer = build()
    assert tokenized(plain(("hi", "", "\n")), tokenizer)[0] == ("h i", "</s>", "Ċ </s>")
    letters = Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1, "a": 2}, unk_token="<unk>"))
    letters.pre_tokenizer = pre_tokenizers.Whitespace()
    words = PreTrainedTokenizerFast(tokenizer_object=letters, unk_token="<unk>", eos_token="</s>")
    assert tokenized(plain(("a", " a zzz", " a")), words)[0] == ("a", "a <unk> </s>", "a </s>")


def test_merge_across_the_boundary_keeps_the_prompt_of_inference():
    tokenizer = build("Ġ y", "e s")
    # Together "A: yes" is A : Ġy es. The prompt alone ends in Ġ, so "yes" is tokenised alone: y es. " no" never merges.
    assert tokenized(plain(("A: ", "yes", "no")), tokenizer) == (
        ("A : Ġ", "y es </s>", "n o </s>"),
        TokenizationReport(1, 1, boundary_merges=1),
    )
    assert tokenized(plain(("A:", " yes", " no")), tokenizer) == (
        ("A :", "Ġy es </s>", "Ġ n o </s>"),
        TokenizationReport(1, 1),
    )


def spelled(text: str) -> str:
    return " ".join("Ċ" if c == "\n" else "Ġ" if c == " " else c for c in text)


@pytest.mark.parametrize("adds_bos", [False, True])
def test_chatml_ends_with_its_end_of_turn(adds_bos):
    tokenizer = build(bos="<s>", eos="<|im_end|>", pad="<|im_end|>", adds_bos=adds_bos, template=CHATML)
    dataset = datasets.Dataset.from_list([tiny.conversation(["q"], ["yes"], [""])])
    prompt = f"<|im_start|> {spelled('user')} Ċ q <|im_end|> Ċ <|im_start|> {spelled('assistant')} Ċ"
    # No BOS even from a tokenizer that adds one: the template's text is the whole text.
    assert tokenized(dataset, tokenizer) == ((prompt, "y e s <|im_end|>", "<|im_end|>"), TokenizationReport(1, 1))


def test_end_of_turn_that_is_not_eos_ends_the_completion_too():
    tokenizer = build(eos="</s>", template=CHATML)
    dataset = datasets.Dataset.from_list([tiny.conversation(["q"], ["y"], ["n"])])
    assert tokenized(dataset, tokenizer)[0][1:] == ("y <|im_end|>", "n <|im_end|>")


def test_template_with_bos_and_tokenizer_with_bos_give_one():
    tokenizer = build(bos="<s>", adds_bos=True, template=INST)
    dataset = datasets.Dataset.from_list([tiny.conversation(["q"], ["y"], ["n"])])
    assert tokenized(dataset, tokenizer)[0] == ("<s> [ q ]", "y </s>", "n </s>")


def test_template_without_end_mark_gets_eos():
    tokenizer = build(template=BARE)
    dataset = datasets.Dataset.from_list([tiny.conversation(["q"], ["y"], ["n"])])
    assert tokenized(dataset, tokenizer)[0] == (spelled("user: q\nassistant: "), "y Ċ </s>", "n Ċ </s>")


def test_generation_prompt_unlike_the_answer_moves_the_header_to_the_completions(caplog):
    tokenizer = build(eos="<|im_end|>", template=THINKING)
    dataset = datasets.Dataset.from_list([tiny.conversation(["q"], ["y"], ["n"])])
    header = f"<|im_start|> {spelled('assistant')} Ċ"
    with caplog.at_level(logging.WARNING, logger="fastdpo"):
        (prompt, *completions), report = tokenized(dataset, tokenizer)
    assert prompt.endswith("q <|im_end|> Ċ")
    assert completions == [f"{header} y <|im_end|>", f"{header} n <|im_end|>"]
    assert report == TokenizationReport(1, 1, header_in_completions=1)
    assert "include the answer's header" in caplog.text


def trained_tokenizer(template) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=list(SPECIALS), initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(["user assistant the answer is yes", "the question was: is it so? no"] * 9, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="<|im_end|>", chat_template=template
    )


@pytest.mark.parametrize("template", [CHATML, THINKING, BARE, INST])
def test_ids_decode_to_the_templates_own_text(template):
    tokenizer = trained_tokenizer(template)
    row = tiny.conversation(["the question", "it was", "is it?\n\nso"], ["yes é漢", "why", " the answer\n"], ["no"])
    result, _ = tokenize_preferences(datasets.Dataset.from_list([row]), tokenizer)
    for name in ("chosen", "rejected"):
        text = tokenizer.apply_chat_template(row["prompt"] + row[name], tokenize=False)
        # What follows the last end mark is dropped; a text without one gets it.
        text = text[: text.rindex("<|im_end|>")] if "<|im_end|>" in text else text
        ids = result[0]["prompt_ids"] + result[0][f"{name}_ids"]
        assert tokenizer.decode(ids) == text + "<|im_end|>"


def test_truncation_from_the_left_and_the_right():
    dataset = plain(("abcdef", "uvwxyz", "u"))
    cut = TokenizationReport(1, 1, truncated_prompts=1, truncated_completions=1)
    # Prompt of 6 to 4, completion of 6 + EOS to 7 - 4 = 3; u + EOS fits.
    assert tokenized(dataset, build(), max_length=7, max_prompt_length=4) == (("c d e f", "u v w", "u </s>"), cut)
    with_bos = build(bos="<s>", adds_bos=True)
    assert tokenized(dataset, with_bos, max_length=7, max_prompt_length=4) == (("<s> d e f", "u v w", "u </s>"), cut)
    assert tokenized(dataset, with_bos, max_length=7, max_prompt_length=1)[0][0] == "<s>"
    whole = ("a b c d e f", "u v w x y z </s>", "u </s>")
    for max_length in (13, None):
        limits = {"max_length": max_length, "max_prompt_length": None}
        assert tokenized(dataset, build(), **limits) == (whole, TokenizationReport(1, 1))
    limits = {"max_length": 12, "max_prompt_length": None}
    assert tokenized(dataset, build(), **limits) == (
        (whole[0], "u v w x y z", "u </s>"),
        TokenizationReport(1, 1, truncated_completions=1),
    )


def test_a_turn_mark_used_as_bos_is_cut_like_other_tokens():
    tokenizer = build(bos="<|im_start|>", eos="<|im_end|>", template=CHATML)
    dataset = datasets.Dataset.from_list([tiny.conversation(["q"], ["y"], ["n"])])
    (prompt, *_), _ = tokenized(dataset, tokenizer, max_prompt_length=12)
    assert prompt == f"Ċ <|im_start|> {spelled('assistant')} Ċ"


def test_drops_are_counted_and_named():
    rows = [
        ("abc", "x", "y"),
        ("", "x", "y"),  # no prompt token
        ("abcdef", "x", "y"),  # the prompt alone fills max_length
        ("abcdefgh", "uvwxyz", "zyxwvu"),  # and more than fills it
        ("abc", "x", "x"),
        ("abc", "xyz1", "xyz2"),  # the same once cut to three tokens
        ("abcd", "x", "y"),  # x </s> is 2 tokens: 6 in all
        ("abcd", "xyz", "y"),  # cut
    ]
    result, report = tokenize_preferences(plain(*rows), build(), max_length=6, max_prompt_length=None)
    assert report == TokenizationReport(total=8, kept=3, dropped_empty=3, dropped_identical=2, truncated_completions=1)
    assert report.summary() == (
        "kept 3 of 8 pairs, dropped empty 3 (no prompt 1: row:1; prompt fills max_length 2: row:2, row:3), "
        "dropped identical 2 (same answers 1: row:4; same answers once cut 1: row:5), truncated completions 1"
    )
    assert list(result["example_id"]) == ["row:0", "row:6", "row:7"]
    # 2·3 + 2 + 2, 2·4 + 2 + 2, 2·4 + 2 + 2
    assert list(result["length"]) == [10, 12, 12]
    # Dropped pairs are not counted as cut.
    _, report = tokenize_preferences(plain(("abcdef", "x", "x"), rows[0]), build(), max_length=9, max_prompt_length=4)
    assert report == TokenizationReport(2, 1, dropped_identical=1)
    # With a BOS there is a token to condition on.
    _, report = tokenize_preferences(plain(rows[1]), build(bos="<s>", adds_bos=True))
    assert report == TokenizationReport(1, 1)


@pytest.mark.parametrize(
    ("rows", "counts"),
    [
        ([("p", "x", "x"), ("p", "y", "y")], r"kept 0 of 2 pairs, dropped identical 2 \(same answers: row:0, row:1\)"),
        (
            [("", "x", "y"), ("p", "y", "y")],
            r"kept 0 of 2 pairs, dropped empty 1 \(no prompt: row:0\), dropped identical 1 \(same answers: row:1\)",
        ),
    ],
)
def test_nothing_left_is_an_error_with_the_counts(rows, counts):
    with pytest.raises(ValueError, match=f"no pair is left: {counts};"):
        tokenize_preferences(plain(*rows), build())


def test_raw_hh_rows_and_loaded_ones_give_the_same_ids(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    head = "\n\nHuman: q\n\nAssistant: a\n\nHuman: r\n\nAssistant: "
    raw = datasets.Dataset.from_list(
        [
            {"chosen": f"{head}yes", "rejected": f"{head}no", "score": 1},
            {"chosen": "\n\nHuman: q\n\nAssistant: yes", "rejected": "\n\nHuman: other\n\nAssistant: no", "score": 1},
        ]
    )
    raw.to_json(tmp_path / "t.jsonl")
    tokenizer = build(eos="<|im_end|>", template=CHATML)
    direct, report = tokenize_preferences(raw, tokenizer)
    # The second pair shares no question: without prompt it is counted here, and left out by the reader.
    assert report == TokenizationReport(2, 1, dropped_empty=1)
    loaded, report = tokenize_preferences(load_preferences(tmp_path / "t.jsonl"), tokenizer)
    assert report == TokenizationReport(1, 1)
    assert (direct[0].pop("example_id"), loaded[0].pop("example_id")) == ("row:0", "t.jsonl:1")
    assert tokens_of(direct[0], tokenizer) == tokens_of(loaded[0], tokenizer)


def test_workers_and_a_changed_template_on_a_cached_dataset(tmp_path):
    datasets.Dataset.from_list([tiny.conversation([f"q{i}"], ["y"], ["n"]) for i in range(4)]).save_to_disk(
        tmp_path / "d"
    )
    dataset = datasets.load_from_disk(str(tmp_path / "d"))
    chatml, _ = tokenize_preferences(dataset, build(template=CHATML))
    bare, _ = tokenize_preferences(dataset, build(template=BARE))
    assert chatml[0]["prompt_ids"] != bare[0]["prompt_ids"]
    two, _ = tokenize_preferences(dataset, build(template=BARE), num_proc=2)
    assert two.to_list() == bare.to_list()


def test_tokenised_datasets_pass_through():
    once, _ = tokenize_preferences(plain(("ab", "x", "y"), ("abc", "xx", "y")), build())
    again, report = tokenize_preferences(once.add_column("note", [1, 2]), build())
    assert again.to_list() == once.to_list()
    assert report == TokenizationReport(2, 2)
    bare = once.select([1, 0]).remove_columns(["example_id", "length"])
    named, _ = tokenize_preferences(bare, build())
    assert list(named["example_id"]) == ["row:0", "row:1"]
    assert list(named["length"]) == [2 * 3 + 3 + 2, 2 * 2 + 2 + 2]
    assert list(named["chosen_ids"]) == list(bare["chosen_ids"])


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"prompt_ids": [[1]], "chosen_ids": [[1]]}, r"only in part: \['rejected_ids'\] missing"),
        (
            {"prompt_ids": [[1]], "chosen_ids": [[1]], "rejected_ids": ["a"]},
            "'rejected_ids' must hold lists of integers",
        ),
        (
            {"prompt_ids": [[1], [2]], "chosen_ids": [[1], []], "rejected_ids": [[1], [2]]},
            "'chosen_ids' of row 1 is null or",
        ),
        (
            {"prompt_ids": [[1], None], "chosen_ids": [[1], [1]], "rejected_ids": [[1], [2]]},
            "'prompt_ids' of row 1 is null",
        ),
        ({"prompt_ids": [[1, None]], "chosen_ids": [[1]], "rejected_ids": [[2]]}, "'prompt_ids' has a null token id"),
        (
            {"prompt_ids": [[1]], "chosen_ids": [[1]], "rejected_ids": [[2] * 9]},
            "row 0 has 10 tokens of prompt and completion, more than max_length=9",
        ),
        (
            {"prompt_ids": [[1], [1] * 5], "chosen_ids": [[1]] * 2, "rejected_ids": [[2]] * 2},
            "row 1 has 5 prompt tokens, more than max_prompt_length=4",
        ),
    ],
)
def test_tokenised_datasets_that_cannot_pass(columns, message):
    with pytest.raises(ValueError, match=message):
        tokenize_preferences(datasets.Dataset.from_dict(columns), build(), max_length=9, max_prompt_length=4)


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"max_length": 512}, "max_prompt_length=512 must be smaller than max_length=512"),
        ({"max_length": 1, "max_prompt_length": None}, "max_length=1 must be at least 2, or None"),
        ({"max_prompt_length": 0}, "max_prompt_length=0 must be at least 1, or None"),
    ],
)
def test_limits_without_room(limits, message):
    with pytest.raises(ValueError, match=message):
        tokenize_preferences(plain(("p", "x", "y")), build(), **limits)


def test_tokenizers_that_cannot_serve():
    with pytest.raises(ValueError, match=r"no EOS token.*set tokenizer\.eos_token"):
        tokenize_preferences(plain(("p", "x", "y")), build(eos=None))
    dataset = datasets.Dataset.from_list([tiny.conversation(["q"], ["y"], ["n"])])
    with pytest.raises(ValueError, match=r"no chat template; .*--chat_template.*plain strings"):
        tokenize_preferences(dataset, build())


def test_rows_that_the_template_cannot_render_are_named():
    good, bad = tiny.conversation(["q"], ["y"], ["n"]), tiny.conversation(["q"], ["y"], ["n"])
    bad["prompt"] = bad["prompt"] * 2
    dataset = datasets.Dataset.from_list([good, bad])
    with pytest.raises(ValueError, match=r"example row:1: .*refuses .*\['user', 'user', 'assistant'\].*must alternate"):
        tokenize_preferences(dataset, build(bos="<s>", template=INST))
    counting = "{{ messages | length }} messages" + CHATML
    with pytest.raises(ValueError, match=r"example row:0: .*renders the prompt differently"):
        tokenize_preferences(dataset, build(template=counting))


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        (plain(("p", "x", "y")).to_iterable_dataset(), "streaming IterableDataset.*streaming=False"),
        (datasets.DatasetDict(train=plain(("p", "x", "y"))), "is a DatasetDict; pass one of its splits: train"),
        ([{"prompt": "p"}], r"must be a datasets\.Dataset, found list"),
        (plain(("p", "x", "y")).select([]), "dataset is empty"),
        (plain(("p", "x", "y"), ("p", None, "y")), "example row:1: the field 'chosen' must be a string, found null"),
        (
            plain(("p", "x", "y")).add_column("example_id", [3]),
            "row 0: the field 'example_id' must be a string, found int",
        ),
        (datasets.Dataset.from_list([{"text": "a"}]), r"columns found: \['text'\]"),
    ],
)
def test_datasets_that_cannot_be_tokenised(dataset, message):
    with pytest.raises(ValueError, match=message):
        tokenize_preferences(dataset, build())


def test_collator_gives_unpadded_int64_tensors():
    dataset, _ = tokenize_preferences(plain(("ab", "x", "y"), ("abc", "xx", "y")), build())
    batch = PreferenceCollator()([dataset[i] for i in range(2)])
    assert set(batch) == {"pair_prompt_ids", "pair_chosen_ids", "pair_rejected_ids", "example_ids"}
    assert batch["example_ids"] == ["row:0", "row:1"]
    for name in ("prompt", "chosen", "rejected"):
        tensors = batch[f"pair_{name}_ids"]
        assert [tensor.tolist() for tensor in tensors] == list(dataset[f"{name}_ids"])
        assert {(tensor.dtype, tensor.device.type) for tensor in tensors} == {(torch.int64, "cpu")}


def test_collator_names_missing_columns():
    with pytest.raises(ValueError, match=r"no \['chosen_ids', 'rejected_ids', 'example_id'\].*tokenize_preferences"):
        PreferenceCollator()([{"prompt_ids": [1]}])
    with pytest.raises(ValueError, match="at least one example"):
        PreferenceCollator()([])
