"""Reference log-probs in memory and in a file: exact, whole or not used, and never of another reference."""

from __future__ import annotations

import logging
import math
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import get_peft_model
from safetensors import safe_open
from safetensors.numpy import save as to_safetensors
from tiny import NF4
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from fastdpo.training.objectives import PreferenceObjective
from fastdpo.training.ranks import Ranks
from fastdpo.training.reference import ReferenceCache, ReferencePolicy, ReferenceStore, reference_identity
from fastdpo.training.reference import cache as reference_cache
from fastdpo.training.reference.cache import CachedLogps, Entry, ForeignFileError

IDENTITY = {"weights": "8c1f", "quantisation": "none", "max_length": "1024", "ld_alpha": "None"}
#: Values that text, or a detour over another dtype, would not keep.
VALUES = {1: (-0.1, -1e-30), 2: (-123.45678, 0.0), 3: (-1e30, -2.0 / 3.0), 258: (-17.0, -18.0)}


def key(number: int) -> bytes:
    return number.to_bytes(reference_cache.KEY_BYTES, "little")


def filled(values: dict[int, tuple[float, float]] = VALUES, identity: dict[str, str] = IDENTITY) -> ReferenceCache:
    cache = ReferenceCache(identity)
    logps = torch.tensor(list(values.values()), dtype=torch.float64).reshape(-1, 2)
    assert cache.put([key(number) for number in values], logps) == len(values)
    return cache


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "run" / reference_cache.REFERENCE_CACHE_FILE
    filled().save(path)
    return path


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def assert_holds(found: CachedLogps, numbers: list[int], values: dict[int, tuple[float, float]] = VALUES) -> None:
    expected = torch.tensor([values[number] for number in numbers], dtype=torch.float32)
    assert found.missing == []
    assert torch.equal(found.logps, expected)


# In memory


def test_get_says_what_is_missing_and_gives_no_number_for_it() -> None:
    cache = filled()
    found = cache.get([key(2), key(77), key(1), key(2), key(78)])
    assert found.missing == [1, 4]
    assert found.logps.isnan().tolist() == [[missing] * 2 for missing in (False, True, False, False, True)]
    assert_holds(cache.get([key(2), key(1)]), [2, 1])
    assert (cache.hits, cache.computed, len(cache)) == (3 + 2, 4, 4)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, -1e300])  # the last is infinite in float32
def test_values_that_are_not_finite_stay_missing(bad: float) -> None:
    cache = filled({})
    logps = torch.tensor([[bad, -3.0], [-1.0, bad], [-2.0, -4.0]], dtype=torch.float64)
    assert cache.put([key(0), key(1), key(2)], logps) == 1
    assert cache.get([key(0), key(1), key(2)]).missing == [0, 1]
    exchanged = float(torch.tensor(bad, dtype=torch.float64).float())  # ranks send float32 values
    assert cache.merge([Entry(key(3), (exchanged, -1.0)), Entry(key(4), (-1.0, exchanged))]) == 0


def test_a_stored_value_stays() -> None:
    cache = filled()
    assert cache.put([key(1), key(5), key(5)], torch.tensor([[-9.0, -9.0], [-1.0, -2.0], [-8.0, -8.0]])) == 1
    assert_holds(cache.get([key(1)]), [1])
    assert_holds(cache.get([key(5)]), [5], {5: (-1.0, -2.0)})


def test_wrong_shapes_are_refused_before_anything_is_stored() -> None:
    cache = filled({})
    for shape in ((3, 2), (2, 1), (4,)):
        with pytest.raises(ValueError, match=r"\(2, 2\) is needed"):
            cache.put([key(1), key(2)], torch.zeros(shape))
    with pytest.raises(ValueError, match="15 bytes"):
        cache.put([key(1)[1:]], torch.zeros(1, 2))
    assert len(cache) == 0


def test_ranks_exchange_what_each_computed() -> None:
    ranks = [filled({1: (-1.0, -2.0)}), filled({2: (-3.0, -4.0)})]
    gathered = [cache.new_entries() for cache in ranks]
    for cache in ranks:
        for entries in gathered:
            cache.merge(entries)
        assert_holds(cache.get([key(1), key(2)]), [1, 2], {1: (-1.0, -2.0), 2: (-3.0, -4.0)})
        assert cache.new_entries() == [], "merged entries go round again"
        assert cache.computed == 1


# The file


def test_file_gives_back_the_same_bits(file: Path) -> None:
    cache = ReferenceCache(IDENTITY)
    assert cache.load(file) == len(VALUES)
    assert_holds(cache.get([key(number) for number in VALUES]), list(VALUES))
    assert cache.computed == 0
    assert [path.name for path in file.parent.iterdir() if not path.name.startswith("_")] == [file.name]


def test_any_safetensors_reader_reads_the_file(file: Path) -> None:
    with safe_open(file, "pt") as reader:
        keys, logps = reader.get_tensor("keys"), reader.get_tensor("logps")
    assert keys.dtype == torch.uint8
    assert [bytes(row.tolist()) for row in keys] == sorted(key(number) for number in VALUES)
    by_key = {bytes(row.tolist()): pair for row, pair in zip(keys, logps, strict=True)}
    for number, pair in VALUES.items():
        assert torch.equal(by_key[key(number)], torch.tensor(pair))


@given(st.permutations(list(VALUES)))
@settings(max_examples=10, deadline=None)
def test_equal_content_gives_equal_bytes(tmp_path_factory: pytest.TempPathFactory, order: list[int]) -> None:
    folder = tmp_path_factory.mktemp("order")
    filled().save(folder / "one")
    filled({number: VALUES[number] for number in order}).save(folder / "other")
    assert (folder / "one").read_bytes() == (folder / "other").read_bytes()


def test_empty_cache_and_missing_file(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert ReferenceCache(IDENTITY).load(tmp_path / "nothing") == 0
    ReferenceCache(IDENTITY).save(tmp_path / "empty")
    assert (tmp_path / "empty").is_file()
    assert ReferenceCache(IDENTITY).load(tmp_path / "empty") == 0
    assert not warnings(caplog)


def test_what_is_no_readable_file_raises(tmp_path: Path) -> None:
    with pytest.raises(IsADirectoryError):
        ReferenceCache(IDENTITY).load(tmp_path)


def assert_unused_then_replaced(path: Path, caplog: pytest.LogCaptureFixture, reason: str) -> None:
    """The file adds nothing, one warning says why, and a run that goes on leaves a whole file."""
    caplog.clear()
    cache = ReferenceCache(IDENTITY)
    assert cache.load(path) == 0
    assert len(cache) == 0
    cache.put([key(9)], torch.tensor([[-1.0, -2.0]]))
    cache.save(path)
    messages = warnings(caplog)
    assert len(messages) == 1
    assert str(path) in messages[0]
    assert reason in messages[0]
    again = ReferenceCache(IDENTITY)
    assert again.load(path) == 1
    assert_holds(again.get([key(9)]), [9], {9: (-1.0, -2.0)})


CUTS: dict[str, Callable[[bytes, int], bytes]] = {
    "nothing": lambda content, data: b"",
    "one byte": lambda content, data: content[:1],
    "no whole length": lambda content, data: content[:7],
    "length only": lambda content, data: content[:8],
    "half a header": lambda content, data: content[: 8 + (data - 8) // 2],
    "header only": lambda content, data: content[:data],
    "half the data": lambda content, data: content[: (data + len(content)) // 2],
    "last byte": lambda content, data: content[:-1],
    "a byte too many": lambda content, data: content + b"\0",
    "twice": lambda content, data: content * 2,
    "zeros": lambda content, data: bytes(len(content)),
    "header, then zeros": lambda content, data: content[:data] + bytes(len(content) - data),
}


@pytest.mark.parametrize("name", CUTS)
def test_torn_file_is_not_used(file: Path, caplog: pytest.LogCaptureFixture, name: str) -> None:
    content = file.read_bytes()
    file.write_bytes(CUTS[name](content, 8 + int.from_bytes(content[:8], "little")))
    reason = "checksum" if name == "header, then zeros" else "torn"
    assert_unused_then_replaced(file, caplog, reason)


@pytest.mark.parametrize("mask", [0x01, 0x20, 0x80])
def test_no_flipped_bit_passes(file: Path, mask: int) -> None:
    """In any byte of length, header or data: names, dtypes, shapes, identity and checksum too."""
    content = file.read_bytes()
    for position in range(len(content)):
        damaged = bytearray(content)
        damaged[position] ^= mask
        file.write_bytes(damaged)
        assert ReferenceCache(IDENTITY).load(file) == 0, f"byte {position}"


@given(st.binary(max_size=200))
@settings(max_examples=200, deadline=None)
def test_garbage_never_raises(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "garbage"
    path.write_bytes(content)
    assert ReferenceCache(IDENTITY).load(path) == 0


@pytest.mark.parametrize("part", IDENTITY)
def test_stale_file_is_not_used_and_the_warning_names_the_part(
    file: Path, caplog: pytest.LogCaptureFixture, part: str
) -> None:
    filled(identity=IDENTITY | {part: "before"}).save(file)
    assert_unused_then_replaced(file, caplog, f"{part} was before, is {IDENTITY[part]}.")


def test_part_that_only_one_side_knows_makes_a_file_stale(file: Path, caplog: pytest.LogCaptureFixture) -> None:
    filled(identity=IDENTITY | {"softcap": "30"}).save(file)
    assert_unused_then_replaced(file, caplog, "softcap was 30, is absent.")
    filled(identity={"weights": "8c1f"}).save(file)
    assert_unused_then_replaced(file, caplog, "quantisation was absent, is none; max_length was absent")


def test_other_format_version_is_not_used(
    file: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reference_cache, "FORMAT_VERSION", 2)
    assert_unused_then_replaced(file, caplog, "format version 1, this is version 2")


@pytest.mark.parametrize("kind", ["weights", "text"])
def test_a_file_that_no_cache_has_written_is_not_used_and_stays(
    kind: str, file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tiny.llama().save_pretrained(file.parent)
    (file.parent / "model.safetensors").replace(file)
    if kind == "text":
        file.write_text("version https://git-lfs.github.com/spec/v1\n")
    content, cache = file.read_bytes(), filled()
    assert ReferenceCache(IDENTITY).load(file) == 0
    assert ("no reference cache" if kind == "weights" else "no safetensors file") in caplog.text
    with pytest.raises(ForeignFileError, match="no reference cache, so it stays"):
        cache.save(file)
    assert file.read_bytes() == content, "weights that somebody has put there"


def test_file_of_values_that_are_not_finite_is_not_used(file: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Even with a checksum that agrees."""
    file.write_bytes(reference_cache._encode({key(1): (-1.0, math.nan), key(2): (-1.0, -2.0)}, IDENTITY, 2))
    assert_unused_then_replaced(file, caplog, "not finite")


def test_file_of_another_dtype_is_not_used(
    file: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same bytes, checksum included, under another dtype."""

    def as_integers(tensors: dict[str, Any], metadata: dict[str, str]) -> bytes:
        return to_safetensors({name: array.view(f"i{array.itemsize}") for name, array in tensors.items()}, metadata)

    with monkeypatch.context() as patched:
        patched.setattr(reference_cache, "to_safetensors", as_integers)
        file.write_bytes(reference_cache._encode({key(1): (-1.0, -2.0)}, IDENTITY, 2))
    assert_unused_then_replaced(file, caplog, "'I32'")


# Several savers


def test_second_saver_keeps_what_the_first_wrote(file: Path) -> None:
    filled({1: (-5.0, -6.0), 4: (-1.0, -2.0)}).save(file)
    cache = ReferenceCache(IDENTITY)
    assert cache.load(file) == 5
    assert_holds(cache.get([key(2), key(4)]), [2, 4], VALUES | {4: (-1.0, -2.0)})


def test_savers_at_the_same_time_lose_nothing(tmp_path: Path) -> None:
    path, start = tmp_path / "shared", threading.Barrier(4)
    failures: list[BaseException] = []

    def run(saver: int) -> None:
        cache = ReferenceCache(IDENTITY)
        try:
            start.wait()
            for number in range(100 * saver, 100 * saver + 10):
                cache.put([key(number)], torch.tensor([[-1.0 * number, -2.0 * number]]))
                cache.save(path)
        except BaseException as error:
            failures.append(error)
            raise

    threads = [threading.Thread(target=run, args=(saver,)) for saver in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    cache = ReferenceCache(IDENTITY)
    assert cache.load(path) == 40
    numbers = [100 * saver + number for saver in range(4) for number in range(10)]
    assert_holds(cache.get([key(n) for n in numbers]), numbers, {n: (-1.0 * n, -2.0 * n) for n in numbers})


def test_save_of_nothing_new_leaves_the_file_alone(file: Path) -> None:
    before = file.stat()
    cache = ReferenceCache(IDENTITY)
    cache.load(file)
    cache.save(file)
    assert (file.stat().st_ino, file.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


@pytest.mark.parametrize("moment", ["fsync", "replace"])
def test_kill_before_the_rename_leaves_the_old_file(file: Path, moment: str) -> None:
    """kill -9 in the middle of a save: the old file is whole, and the next save is not held up."""
    before = file.read_bytes()

    def die(*_: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def save_and_die() -> None:
        if moment == "fsync":
            os.fsync = die
        else:
            Path.replace = die
        filled({7: (-1.0, -2.0)}).save(file)

    process = multiprocessing.get_context("fork").Process(target=save_and_die)
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    assert file.read_bytes() == before
    assert list(file.parent.glob("*.incomplete"))
    filled({8: (-3.0, -4.0)}).save(file)
    assert ReferenceCache(IDENTITY).load(file) == len(VALUES) + 1
    assert not list(file.parent.glob("*.incomplete"))


def test_failed_write_raises_and_leaves_the_old_file(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = file.read_bytes()

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        filled({7: (-1.0, -2.0)}).save(file)
    assert file.read_bytes() == before
    assert not list(file.parent.glob("*.incomplete"))


# The identity


def identity(
    model: Any = None, *, lora: Any = None, ref_model: Any = None, tokenizer: Any = None, **options: Any
) -> dict[str, str]:
    torch.manual_seed(3)
    model = get_peft_model(tiny.llama() if model is None else model, lora or tiny.lora())
    config = tiny.config("unused", **options)
    weighting = PreferenceObjective(config).weighting()
    return reference_identity(ReferencePolicy(model, ref_model), tokenizer or tiny.tokenizer(), config, weighting)


def trained_lora(**overrides: Any) -> Any:
    return tiny.lora(init_lora_weights=False, **overrides)


def other_template() -> Any:
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template += " "
    return tokenizer


def other_special_tokens() -> Any:
    tokenizer = tiny.tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    return tokenizer


CHANGES: dict[str, tuple[dict[str, Any], Callable[[], dict[str, Any]]]] = {
    "max_length": ({}, lambda: {"max_length": 127}),
    "max_prompt_length": ({}, lambda: {"max_prompt_length": None}),
    "ld_alpha": ({}, lambda: {"ld_alpha": 0.5}),
    "precision": ({}, lambda: {"bf16": True}),
    "tokenizer": ({}, lambda: {"tokenizer": other_template()}),
    "tokenizer ": ({}, lambda: {"tokenizer": other_special_tokens()}),
    "weights": ({}, lambda: {"model": tiny.llama(seed=1)}),
    "weights ": ({}, lambda: {"ref_model": tiny.llama(seed=1)}),
    "model config": ({}, lambda: {"model": tiny.llama(rms_norm_eps=1e-3)}),
    "adapters": ({"lora": trained_lora()}, lambda: {"lora": trained_lora(lora_alpha=16)}),
}


@pytest.mark.parametrize("part", CHANGES)
def test_identity_changes_in_the_part_that_changed(part: str) -> None:
    base, change = CHANGES[part]
    before, after = identity(**base), identity(**(base | change()))
    changed = {name for name in before if before[name] != after[name]}
    # A separate reference is no "adapters off" any more, whatever its weights
    assert changed - ({"adapters"} if part == "weights " else set()) == {part.strip()}


def test_identity_of_a_quantised_reference_has_its_compute_dtype(tmp_path: Path) -> None:
    tiny.llama(hidden_size=64).save_pretrained(tmp_path)
    settings = NF4.to_dict() | {"bnb_4bit_compute_dtype": "bfloat16"}
    bfloat16 = BitsAndBytesConfig(**{k: v for k, v in settings.items() if k.startswith(("bnb", "load_in_4bit"))})
    found = [
        identity(AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=quantised))
        for quantised in (NF4, NF4, bfloat16)
    ]
    by_hand = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=NF4)
    by_hand.model.layers[1].mlp.up_proj.compute_dtype = torch.bfloat16
    found.append(identity(by_hand))
    assert found[0] == found[1]
    for other in found[2:]:
        assert {name for name in found[0] if found[0][name] != other[name]} == {"quantisation"}


def test_identity_leaves_out_what_changes_no_reference_logp() -> None:
    """A later run with another LoRA, objective or plan reuses the values, and a run's own side effects keep them."""
    padded = tiny.tokenizer(pad_token="</s>")
    padded(["a", "abc"], padding=True, truncation=True, max_length=2)
    cached = tiny.llama()
    cached.config.use_cache, cached.config.pad_token_id = False, 0
    assert identity() == identity(
        cached,
        lora=tiny.lora(r=8, lora_alpha=1, target_modules=["q_proj"]),
        tokenizer=padded,
        beta=0.01,
        seed=7,
        learning_rate=1e-5,
        micro_batch_tokens="64",
        dynamic_beta=True,
        gradient_checkpointing=True,
    )


def test_the_folder_of_a_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """`~` is the user's home, as in every other path; no folder of that name."""
    monkeypatch.setenv("HOME", str(tmp_path))
    args, ranks = tiny.config(tmp_path / "run", reference_cache_dir="~/kept"), Ranks(0, 1, torch.device("cpu"))
    assert ReferenceStore(ReferenceCache({}, 2), args, ranks, needed=True).file.parent == tmp_path / "kept"
