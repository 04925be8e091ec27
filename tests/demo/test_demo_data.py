"""The demo preference set keeps every promise made about it, and its files are what the generator writes."""

import gzip
import json
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest

from fastdpo.demo.baseline import bag_of_words_accuracy
from fastdpo.demo.generate import FILE_NAMES, build_split, render_files
from fastdpo.demo.generate.__main__ import main

DATA = Path(__file__).parents[2] / "fastdpo" / "demo" / "data"
KINDS = {"correct", "polite", "to_the_point", "safe"}
SPLITS = ("train", "eval")


@dataclass(frozen=True)
class Row:
    """One pair, with the flip undone: ``good`` and ``bad`` are the completions as they were written."""

    messages: tuple[str, ...]
    good: str
    bad: str
    kind: str
    flipped: bool
    turns: int

    @property
    def stored_chosen(self) -> str:
        return self.bad if self.flipped else self.good

    @property
    def stored_rejected(self) -> str:
        return self.good if self.flipped else self.bad


def messages_of(transcript: str) -> list[str]:
    """The messages of an HH transcript, which must begin with the human and alternate."""
    parts = re.split(r"\n\n(Human|Assistant): ", transcript)
    assert parts[0] == ""
    assert parts[1::2] == ["Human", "Assistant"] * (len(parts) // 4), transcript
    return parts[2::2]


def read_split(split: str) -> list[Row]:
    with gzip.open(DATA / f"{split}.jsonl.gz", "rt", encoding="utf-8") as stream:
        pairs = [json.loads(line) for line in stream]
    metas = [json.loads(line) for line in (DATA / f"{split}.meta.jsonl").read_text(encoding="utf-8").splitlines()]
    rows = []
    for pair, meta in zip(pairs, metas, strict=True):
        assert pair.keys() == {"chosen", "rejected"}
        assert meta.keys() == {"kind", "flipped", "turns"}
        *prompt, good = messages_of(pair["chosen"])
        *other_prompt, bad = messages_of(pair["rejected"])
        assert prompt == other_prompt
        if meta["flipped"]:
            good, bad = bad, good
        rows.append(Row(tuple(prompt), good, bad, meta["kind"], meta["flipped"], meta["turns"]))
    return rows


@pytest.fixture(scope="module")
def rows() -> dict[str, list[Row]]:
    return {split: read_split(split) for split in SPLITS}


def normal(text: str) -> str:
    return " ".join(text.lower().split())


def test_counts_shares_and_turns(rows: dict[str, list[Row]]) -> None:
    for split, count in (("train", 640), ("eval", 160)):
        assert len(rows[split]) == count
        assert Counter(row.kind for row in rows[split]) == dict.fromkeys(KINDS, count // 4)
        assert all(len(row.messages) == 2 * row.turns - 1 for row in rows[split])
        assert sum(row.turns > 1 for row in rows[split]) == count // 5
        # Any prefix that a short run trains on is mixed as well.
        assert set(Counter(row.kind for row in rows[split][:64]).values()) == {16}


def test_fifteen_percent_of_the_training_labels_are_flipped(rows: dict[str, list[Row]]) -> None:
    assert not any(row.flipped for row in rows["eval"])
    # 15 % of 640 is 96, 24 for each kind; of the first 160 pairs 24, give or take one for each kind.
    assert Counter(row.kind for row in rows["train"] if row.flipped) == dict.fromkeys(KINDS, 24)
    assert abs(sum(row.flipped for row in rows["train"][:160]) - 24) <= 4


def test_the_meta_file_tells_which_side_is_good() -> None:
    """Rebuilt without flips, each pair is the stored one with its sides exchanged exactly where the meta says so."""
    for clean, row in zip(build_split("train", 640, 20260101), read_split("train"), strict=True):
        assert (messages_of(clean.chosen)[-1], messages_of(clean.rejected)[-1]) == (row.good, row.bad)
        assert clean.kind == row.kind


def test_splits_share_no_prompt_and_no_message_of_the_assistant(rows: dict[str, list[Row]]) -> None:
    prompts, questions, answers = (
        [{normal(text) for row in rows[split] for text in texts(row)} for split in SPLITS]
        for texts in (
            lambda row: ["\n".join(row.messages)],
            lambda row: row.messages[::2],
            lambda row: [row.good, row.bad, *row.messages[1::2]],
        )
    )
    for train, evaluation in (prompts, questions, answers):
        assert train.isdisjoint(evaluation)
    # Nor does one split contain the other's sentence inside a longer message.
    sentences = [
        {part for text in texts for part in re.split(r"(?<=[.?!]) ", text) if len(part.split()) >= 5}
        for texts in answers
    ]
    assert sentences[0].isdisjoint(sentences[1])


def test_prompts_are_unique_and_sides_differ(rows: dict[str, list[Row]]) -> None:
    for split in SPLITS:
        assert all(normal(row.good) != normal(row.bad) for row in rows[split])
        for kind in KINDS:
            prompts = [normal("\n".join(row.messages)) for row in rows[split] if row.kind == kind]
            assert len(set(prompts)) == len(prompts)


def test_texts_are_short(rows: dict[str, list[Row]]) -> None:
    for row in rows["train"] + rows["eval"]:
        assert all(5 <= len(message.split()) <= 30 for message in row.messages[::2]), row
        assert all(8 <= len(text.split()) <= 30 for text in (row.good, row.bad)), row
        for text in (*row.messages, row.good, row.bad):
            assert text[0].isupper() or text[0].isdigit(), text
            assert text[-1] in ".?!", text
            assert not re.search(r"[{}|]|  ", text), text


@pytest.mark.parametrize("side", ["good", "bad"])
def test_no_phrase_marks_a_kind(rows: dict[str, list[Row]], side: str) -> None:
    for split in SPLITS:
        for kind in KINDS:
            texts = [normal(getattr(row, side)) for row in rows[split] if row.kind == kind]
            shares = Counter()
            for text in texts:
                words = re.findall(r"[a-z0-9']+", text)
                shares.update({tuple(words[start : start + 3]) for start in range(len(words) - 2)})
            phrase, uses = shares.most_common(1)[0]
            assert uses <= 0.1 * len(texts), (split, kind, phrase)


@pytest.mark.parametrize("measure", [len, lambda text: len(text.split())], ids=["characters", "words"])
def test_length_does_not_give_the_answer_away(rows: dict[str, list[Row]], measure) -> None:
    for split in SPLITS:
        for kinds, limit in [(KINDS, 0.6), *(({kind}, 0.75) for kind in KINDS)]:
            signs = [
                measure(row.stored_chosen) - measure(row.stored_rejected) for row in rows[split] if row.kind in kinds
            ]
            for right in (sum(sign > 0 for sign in signs), sum(sign < 0 for sign in signs)):
                assert right + signs.count(0) / 2 <= limit * len(signs), (split, kinds)


def test_wrong_statements_are_made_of_true_ones(rows: dict[str, list[Row]]) -> None:
    """In the kind correct the words of a false ending also stand in a true statement, sums aside."""
    for split in SPLITS:
        correct = [row for row in rows[split] if row.kind == "correct"]
        true_endings = {" ".join(normal(row.good).split()[-5:]) for row in correct}
        false_endings = [" ".join(normal(row.bad).split()[-5:]) for row in correct]
        assert sum(ending in true_endings for ending in false_endings) >= 0.9 * len(correct)


def test_files_are_what_the_generator_writes(tmp_path: Path) -> None:
    assert main(["--out", str(tmp_path)]) == 0
    for name in FILE_NAMES:
        written, stored = (folder.joinpath(name).read_bytes() for folder in (tmp_path, DATA))
        if name.endswith(".gz"):
            # RFC 1952: no optional header field, no time. The packed bytes vary with zlib, the content must not.
            assert stored[3:8] == bytes(5)
            written, stored = gzip.decompress(written), gzip.decompress(stored)
        assert written == stored, name
    assert render_files() == render_files()
    assert render_files(seed=1)["eval.jsonl.gz"] != render_files()["eval.jsonl.gz"]


def test_check_notices_a_changed_file(tmp_path: Path) -> None:
    assert main(["--out", str(DATA), "--check"]) == 0
    assert main(["--out", str(tmp_path), "--check"]) == 1
    assert not list(tmp_path.iterdir())
    main(["--out", str(tmp_path)])
    meta = tmp_path / "train.meta.jsonl"
    meta.write_bytes(meta.read_bytes().replace(b"true", b"false", 1))
    assert main(["--out", str(tmp_path), "--check"]) == 1


def test_pairs_must_divide_among_the_kinds() -> None:
    with pytest.raises(ValueError, match="pairs=6 is not a multiple of 4"):
        build_split("eval", 6, seed=0)


def test_word_counts_alone_do_not_solve_it() -> None:
    pytest.importorskip("sklearn")
    for limit in (None, 208):
        for max_ngram in (1, 2):
            accuracy = bag_of_words_accuracy(
                DATA / "train.jsonl.gz", DATA / "eval.jsonl.gz", limit, max_ngram=max_ngram
            )
            assert accuracy.keys() == {"overall"} | KINDS
            assert 0.5 <= accuracy["overall"] <= 0.97
            # The kinds have equal shares, so their mean is the overall value.
            assert accuracy["overall"] == pytest.approx(sum(accuracy[kind] for kind in KINDS) / 4)


def test_word_counts_solve_a_set_that_one_word_decides(tmp_path: Path) -> None:
    """By hand: "good" stands on the chosen side of every training pair, so the third pair is a tie and counts half."""
    pytest.importorskip("sklearn")
    prompt = "\n\nHuman: Well?\n\nAssistant: "
    sides = [("good tea", "bad tea"), ("bad milk", "good milk"), ("unseen", "unknown")]
    for split, rows in (("train", [("good tea", "bad tea"), ("good milk", "bad milk")]), ("eval", sides)):
        lines = [json.dumps({"chosen": prompt + chosen, "rejected": prompt + rejected}) for chosen, rejected in rows]
        (tmp_path / f"{split}.jsonl.gz").write_bytes(gzip.compress("\n".join(lines).encode()))
    (tmp_path / "eval.meta.jsonl").write_text('{"kind": "a"}\n{"kind": "a"}\n{"kind": "b"}\n')
    accuracy = bag_of_words_accuracy(tmp_path / "train.jsonl.gz", tmp_path / "eval.jsonl.gz")
    assert accuracy == {"overall": 0.5, "a": 0.5, "b": 0.5}
    with pytest.raises(ValueError, match="limit=0"):
        bag_of_words_accuracy(tmp_path / "train.jsonl.gz", tmp_path / "eval.jsonl.gz", 0)


def test_limit_trains_on_the_first_pairs_only(tmp_path: Path) -> None:
    """By hand: the first pair prefers good, the two after it prefer bad."""
    pytest.importorskip("sklearn")
    prompt = "\n\nHuman: Well?\n\nAssistant: "
    for split, sides in (("train", ["good bad", "bad good", "bad good"]), ("eval", ["good bad"])):
        pairs = (
            dict(zip(("chosen", "rejected"), (prompt + word for word in side.split()), strict=True)) for side in sides
        )
        (tmp_path / f"{split}.jsonl.gz").write_bytes(gzip.compress("\n".join(map(json.dumps, pairs)).encode()))
    (tmp_path / "eval.meta.jsonl").write_text('{"kind": "a"}\n')
    paths = tmp_path / "train.jsonl.gz", tmp_path / "eval.jsonl.gz"
    assert bag_of_words_accuracy(*paths, 1)["overall"] == 1.0
    assert bag_of_words_accuracy(*paths)["overall"] == 0.0
