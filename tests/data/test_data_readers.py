"""Files, folders and data sets through load_preferences: places, counts, and what every error says."""

from __future__ import annotations

import gzip
import json
import logging
import re
from pathlib import Path

import datasets
import pytest
import tiny

from fastdpo.data import load_preferences, readers, tokenize_preferences
from fastdpo.data.raw_rows import iter_rows

PAIRS = [{"prompt": f"p{i}", "chosen": f"c{i}", "rejected": f"r{i}"} for i in range(5)]


@pytest.fixture(autouse=True)
def _private_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def jsonl(rows) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def write(path: Path, rows) -> Path:
    """rows in the form that the suffix names."""
    if path.name.endswith(".parquet"):
        datasets.Dataset.from_list(rows).to_parquet(str(path))
        return path
    data = json.dumps(rows, indent=1).encode() if ".json" in path.suffixes else jsonl(rows)
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


@pytest.mark.parametrize(
    ("name", "first"),
    [("t.jsonl", 1), ("t.jsonl.gz", 1), ("t.json", 0), ("t.json.gz", 0), ("t.parquet", 0)],
)
def test_every_kind_of_file_gives_the_same_pairs(tmp_path, name, first):
    dataset = load_preferences(write(tmp_path / name, PAIRS))
    assert dataset.column_names == ["prompt", "chosen", "rejected", "example_id"]
    assert dataset.to_list() == [{**pair, "example_id": f"{name}:{first + i}"} for i, pair in enumerate(PAIRS)]


def test_json_suffix_with_json_lines_counts_lines_past_blank_ones(tmp_path):
    (tmp_path / "t.json").write_bytes(b"\n" + jsonl(PAIRS[:1]) + b"\n  \n" + jsonl(PAIRS[1:2]))
    assert load_preferences(tmp_path / "t.json")["example_id"] == ["t.json:2", "t.json:5"]


def test_array_elements_longer_than_the_read_window(tmp_path):
    # Three-byte characters and 200 kB elements: both are cut by the 64 KiB reads.
    rows = [{"prompt": "漢" * 70_000 + str(i), "chosen": '"]},{', "rejected": "\\"} for i in range(3)]
    path = tmp_path / "t.json"
    path.write_text("\ufeff" + json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    assert [row.fields for row in iter_rows(path)] == rows


@pytest.mark.parametrize("window", [1, 2, 3, 5, 7, 11, 64])
def test_array_elements_cut_anywhere(tmp_path, monkeypatch, window):
    rows = [{"a": [True, None, -1.5e-7, i], "b": {"c": "\\ \U0001f600 é"}, "d": False} for i in range(9)]
    monkeypatch.setattr("fastdpo.data.json_rows._CHUNK", window)
    (tmp_path / "t.json").write_text(json.dumps(rows))
    assert [row.fields for row in iter_rows(tmp_path / "t.json")] == rows


def test_conversations_in_parquet(tmp_path):
    question, answers = {"role": "user", "content": "q"}, [{"role": "assistant", "content": c} for c in "ab"]
    write(tmp_path / "t.parquet", [{"chosen": [question, answers[0]], "rejected": [question, answers[1]]}])
    (row,) = load_preferences(tmp_path / "t.parquet").to_list()
    assert (row["prompt"], row["chosen"], row["rejected"]) == ([question], [answers[0]], [answers[1]])


def test_a_changed_file_is_read_again(tmp_path):
    path = write(tmp_path / "t.jsonl", PAIRS)
    assert load_preferences(path)[0]["chosen"] == "c0"
    write(path, [{**PAIRS[0], "chosen": "changed"}])
    assert load_preferences(path)["chosen"] == ["changed"]


def test_max_examples_reads_no_further(tmp_path):
    path = tmp_path / "t.jsonl"
    path.write_bytes(jsonl(PAIRS[:2]) + b"corrupt\n")
    assert load_preferences(path, max_examples=2)["prompt"] == ["p0", "p1"]
    # The limit is over all files, whatever the number of workers.
    (tmp_path / "two").mkdir()
    for part in ("0", "1"):
        write(tmp_path / "two" / f"train-{part}.jsonl", PAIRS[:2])
    limited = load_preferences(tmp_path / "two", max_examples=3, num_proc=2)
    assert limited["example_id"] == ["train-0.jsonl:1", "train-0.jsonl:2", "train-1.jsonl:1"]


def test_folder_by_split_config_folder_and_workers(tmp_path):
    for i, (folder, split) in enumerate([("base", "train"), ("base", "test"), ("online", "train")]):
        (tmp_path / folder).mkdir(exist_ok=True)
        write(tmp_path / folder / f"{split}.jsonl.gz", PAIRS[i : i + 1])
    train = load_preferences(tmp_path, num_proc=2)
    assert train["example_id"] == ["base/train.jsonl.gz:1", "online/train.jsonl.gz:1"]
    assert train["prompt"] == ["p0", "p2"]
    assert load_preferences(tmp_path, split="test")["prompt"] == ["p1"]
    assert load_preferences(tmp_path, name="online")["prompt"] == ["p2"]
    with pytest.raises(ValueError, match=r"split='dev' does not exist in .*; accepted: test, train"):
        load_preferences(tmp_path, split="dev")
    with pytest.raises(ValueError, match=r"name='none'.*one of its folders"):
        load_preferences(tmp_path, name="none")


def test_folder_of_readme_configs_behind_a_relative_link(tmp_path, monkeypatch):
    (tmp_path / "real").mkdir()
    write(tmp_path / "real" / "first.parquet", PAIRS[:1])
    write(tmp_path / "real" / "second.parquet", PAIRS[1:])
    (tmp_path / "real" / "README.md").write_text(
        "---\nconfigs:\n- config_name: one\n  data_files:\n  - split: dev\n    path: second.parquet\n---\n"
    )
    (tmp_path / "link").symlink_to("real")
    monkeypatch.chdir(tmp_path)
    assert load_preferences("link", name="one", split="dev", max_examples=1)["example_id"] == ["second.parquet:0"]


def test_saved_datasets(tmp_path):
    one = datasets.Dataset.from_list(PAIRS)
    one.save_to_disk(tmp_path / "one")
    datasets.DatasetDict(train=one, test=one.select([4])).save_to_disk(tmp_path / "two")
    assert load_preferences(tmp_path / "one", max_examples=2)["example_id"] == ["one:0", "one:1"]
    assert load_preferences(tmp_path / "two", split="test", num_proc=1)["prompt"] == ["p4"]
    for folder, accepted in (("one", "train"), ("two", "test, train")):
        with pytest.raises(ValueError, match=f"split='dev' does not exist.*accepted: {accepted}$"):
            load_preferences(tmp_path / folder, split="dev")
    with pytest.raises(ValueError, match=r"name='x' has no meaning"):
        load_preferences(tmp_path / "one", name="x")


def test_hub_names_go_to_the_hub_and_say_so_when_it_fails(tmp_path, monkeypatch):
    calls = []

    def load(path, config, **arguments):
        calls.append((path, config, arguments["data_dir"], arguments["split"], arguments["revision"]))
        return datasets.Dataset.from_list(PAIRS)

    monkeypatch.setattr(datasets, "get_dataset_config_names", lambda path, revision: ["default", "en"])
    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.chdir(tmp_path)
    assert load_preferences("org/pairs", name="en", revision="v1")[2]["example_id"] == "org/pairs:2"
    load_preferences("org/pairs", name="harmless-base", split="test")
    assert calls == [("org/pairs", "en", None, "train", "v1"), ("org/pairs", None, "harmless-base", "test", None)]

    def unreachable(path, revision):
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "get_dataset_config_names", unreachable)
    (tmp_path / "pairs2").mkdir()
    with pytest.raises(FileNotFoundError, match=r"neither a local file or folder .*pairs2.*no network"):
        load_preferences("pairs")


def test_harmless_pairs_left_out_are_counted_on_every_load(tmp_path, caplog):
    # Safe flags of the four rows: (1,0) kept, (0,1) kept, (1,1) and (0,0) left out.
    rows = [
        {
            "prompt": str(i),
            "response_0": "a",
            "response_1": "b",
            "is_response_0_safe": first,
            "is_response_1_safe": second,
            "better_response_id": 0,
        }
        for i, (first, second) in enumerate([(True, False), (False, True), (True, True), (False, False)])
    ]
    path = write(tmp_path / "t.jsonl", rows)
    for _ in range(2):
        caplog.clear()
        with caplog.at_level(logging.INFO, logger="fastdpo"):
            dataset = load_preferences(path, data_format="beavertails-harmless")
        assert dataset["example_id"] == ["t.jsonl:1", "t.jsonl:2"]
        assert "used 2 of 4 rows, left out 2 (both responses safe, or both unsafe: t.jsonl:3, t.jsonl:4)" in caplog.text
        unused = [r.message for r in caplog.records if "not read" in r.message]
        assert [m.endswith(": 'better_response_id'") for m in unused] == [True]
    write(path, rows[2:])
    with pytest.raises(ValueError, match=r"all 2 pairs were left out"):
        load_preferences(path, data_format="beavertails-harmless")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"prompt": "p", "chosen": "c"\n', r"line 3: not valid JSON"),
        (b'{"prompt": "\xff", "chosen": "c"}\n', r"line 3: not UTF-8 \(invalid start byte at byte 12\)"),
        (b'["p", "c", "r"]\n', r"line 3: expected a JSON object .* found list"),
        (
            b'{"prompt": "p", "chosen": "c"}\n',
            r"line 3: the field 'rejected' is missing \(found: \['chosen', 'prompt'\]",
        ),
        (b'{"prompt": "p", "chosen": null, "rejected": "r"}\n', r"line 3: the field 'chosen' .* found null"),
        (
            b'{"prompt": "p", "chosen": ["c"], "rejected": "r"}\n',
            r"line 3: the field 'chosen' must be a string, found l",
        ),
    ],
)
def test_bad_lines_are_named(tmp_path, line, message):
    path = tmp_path / "t.jsonl.gz"
    path.write_bytes(gzip.compress(jsonl(PAIRS[:2]) + line + jsonl(PAIRS[2:])))
    with pytest.raises(ValueError, match=rf"t\.jsonl\.gz, {message}"):
        load_preferences(path)


@pytest.mark.parametrize("name", ["t.jsonl", "t.json", "t.jsonl.gz", "t.json.gz"])
def test_what_json_can_hold_and_text_cannot(tmp_path, name):
    """A mark at the beginning is fine, line ends of Windows are; the rest is named, as is what a decoder chokes on."""
    at = "line 2" if ".jsonl" in name else r"(line 1 \(row 1\)|row 1)"

    def load(second: str, mark: bytes = b"", encoding: str = "utf-8"):
        rows = [json.dumps(PAIRS[0]), second]
        text = "\r\n".join(rows) if ".jsonl" in name else f"[{', '.join(rows)}]"
        data = mark + text.encode(encoding)
        (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
        return load_preferences(tmp_path / name)

    assert load(json.dumps(PAIRS[1]), b"\xef\xbb\xbf")["prompt"] == ["p0", "p1"]
    for second, message in (
        (
            '{"prompt": "p", "chosen": "ok \\ud83d", "rejected": "r"}',
            r"'chosen' has half of a surrogate pair, '\\ud83d'",
        ),
        ('{"prompt": "p", "chosen": "c", "chosen": "d", "rejected": "r"}', "the key 'chosen' is there more than once"),
        (f'{{"prompt": "p", "chosen": {"[" * 99999}{"]" * 99999}, "rejected": "r"}}', "nested too deeply"),
        (f'{{"prompt": "p", "chosen": "c", "rejected": "r", "id": {"9" * 5000}}}', "not readable .*4300 digits"),
    ):
        with pytest.raises(ValueError, match=rf"{re.escape(name)}, {at}: .*{message}"):
            load(second)
    with pytest.raises(ValueError, match=rf"{re.escape(name)}, line 1: .* UTF-16 and not UTF-8; save it as UTF-8"):
        load(json.dumps(PAIRS[1]), encoding="utf-16")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[{"a": 1}]\n[{"a": 2}]', r"line 2 \(row 1\): the array has ended, but '\[\{\"a\": 2\}\]' follows"),
        ('[{"a": 1},\n {"a": }]', r"line 2 \(row 1\): not valid JSON"),
        ('[{"a": 1}\n {"a": 2}]', r"line 2 \(row 1\): expected ',', found '{'"),
        ('[{"a": 1}, 7]', r"line 1 \(row 1\): expected an object, found '7"),
        ('[{"a": 1},\n\n {"a": "cut', r"line 3 \(row 1\): not valid JSON"),
        ('[{"a": 1}', r"line 1 \(row 1\): the array ends without '\]', so the file is truncated"),
    ],
)
def test_bad_arrays_are_named(tmp_path, text, message):
    (tmp_path / "t.json").write_text(text)
    with pytest.raises(ValueError, match=rf"t\.json, {message}"):
        list(iter_rows(tmp_path / "t.json"))


def test_damaged_compressed_files(tmp_path):
    path = tmp_path / "t.jsonl.gz"
    whole = gzip.compress(jsonl(PAIRS * 2000))
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"t\.jsonl\.gz: the gzip stream is truncated, it ends after line [1-9]\d+ "):
        load_preferences(path)
    path.write_bytes(jsonl(PAIRS))
    with pytest.raises(ValueError, match=r"t\.jsonl\.gz: not a sound gzip file after line 0"):
        load_preferences(path)
    parquet = write(tmp_path / "t.parquet", PAIRS)
    parquet.write_bytes(parquet.read_bytes()[:-20])
    with pytest.raises(ValueError, match=r"t\.parquet: not a sound parquet file"):
        load_preferences(parquet)


def test_null_in_parquet_names_the_row(tmp_path):
    path = write(tmp_path / "t.parquet", [*PAIRS, {**PAIRS[0], "rejected": None}])
    with pytest.raises(ValueError, match=r"t\.parquet, row 5: the field 'rejected' must be a string, found null"):
        load_preferences(path)


@pytest.mark.parametrize("name", ["t.jsonl", "t.json", "t.jsonl.gz", "t.parquet"])
def test_empty_files(tmp_path, name):
    path = write(tmp_path / name, [])
    with pytest.raises(ValueError, match=rf"path='.*{name}', split='train' is empty"):
        load_preferences(path)


def test_paths_that_are_not_there(tmp_path, monkeypatch):
    write(tmp_path / "train.jsonl", PAIRS)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"path='.*trian\.jsonl' does not exist; .*near-by names: train\.jsonl"):
        load_preferences(tmp_path / "trian.jsonl")
    with pytest.raises(FileNotFoundError, match=r"near-by names: empty"):
        load_preferences(tmp_path / "emty" / "deeper")
    with pytest.raises(FileNotFoundError, match=r"holds no data files; accepted: \.jsonl"):
        load_preferences(tmp_path / "empty")
    # A name of two parts whose folder is here is a slip of the pen, not a hub name.
    monkeypatch.chdir(tmp_path.parent)
    with pytest.raises(FileNotFoundError, match=r"does not exist; .*train\.jsonl"):
        load_preferences(f"{tmp_path.name}/train")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"split": "test"}, "a single file has the split 'train' only"),
        ({"split": "train[:10%]"}, r"split='train\[:10%\]' must be the name of one split; .*max_examples"),
        ({"name": "x"}, "name='x' needs a folder or a hub name"),
        ({"revision": "main"}, "revision='main' needs a hub name"),
        ({"data_format": "json"}, "data_format='json' is unknown; accepted: auto, hh-rlhf, beavertails-helpful"),
        ({"data_format": "beavertails-harmless"}, r"needs \['response_0'.*columns found: \['chosen'"),
        ({"max_examples": 0}, "max_examples=0 must be at least 1"),
        ({"num_proc": 0}, "num_proc=0 must be at least 1"),
    ],
)
def test_arguments_without_meaning(tmp_path, arguments, message):
    path = write(tmp_path / "t.jsonl", PAIRS)
    with pytest.raises(ValueError, match=message):
        load_preferences(path, **arguments)


def test_unsupported_suffix(tmp_path):
    (tmp_path / "train.csv").write_text("prompt,chosen,rejected\np,c,r\n")
    for path in (tmp_path / "train.csv", tmp_path):
        with pytest.raises(ValueError, match=r"unsupported suffix.*accepted: \.jsonl, \.json, \.jsonl\.gz"):
            load_preferences(path)


def test_what_goes_wrong_within_the_reader_is_no_mistake_of_the_data(tmp_path, monkeypatch):
    """An error of our own code keeps its type, so that the command calls it a defect; a full disk keeps its cause."""
    (tmp_path / "t.jsonl").write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n')
    for error in (KeyError("ours"), OSError(28, "No space left on device")):

        def fails(*_, error=error):
            raise error

        monkeypatch.setattr(readers, "flagged_row", fails)
        with pytest.raises(type(error), match=str(error.args[-1])):
            load_preferences(tmp_path / "t.jsonl", cache_dir=tmp_path / "cache")


@pytest.mark.parametrize("odd", [3, 1100])
def test_rows_are_counted_over_batches_of_arrow(odd, tmp_path):
    """In parquet and in a Dataset, beyond the 1,000 or so rows that are looked at together."""
    rows = [{"prompt": f"p{i}", "chosen": "c", "rejected": "r"} for i in range(1200)]
    pairs = load_preferences(write(tmp_path / "t.parquet", rows), cache_dir=tmp_path / "cache")
    assert pairs["example_id"] == [f"t.parquet:{i}" for i in range(1200)]
    rows[odd] = {"prompt": None, "chosen": "c", "rejected": "r"}
    with pytest.raises(ValueError, match=rf"u\.parquet, row {odd}\b"):
        load_preferences(write(tmp_path / "u.parquet", rows), cache_dir=tmp_path / "cache")
    with pytest.raises(ValueError, match=rf"^example row:{odd} has answers"):
        tokenize_preferences(datasets.Dataset.from_list(rows), tiny.tokenizer())


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_transcripts_beside_a_prompt_are_plain_text(suffix, tmp_path):
    """Where the column says something in any row; an empty one says nothing, and the rows are HH-RLHF's."""
    turns = {side: f"\n\nHuman: q\n\nAssistant: {side}" for side in ("chosen", "rejected")}
    for prompt, conversational in (("", True), ("p", False)):
        path = write(tmp_path / f"{conversational}.{suffix}", [{"prompt": prompt, **turns}] * 2)
        found = load_preferences(path, cache_dir=tmp_path / "cache")[1]
        assert isinstance(found["prompt"], list) is conversational
