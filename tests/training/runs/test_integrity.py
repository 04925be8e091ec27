"""Torn and changed checkpoints: every flipped bit is named, and `last` offers what is whole."""

from __future__ import annotations

import json
import random
import shutil
from itertools import pairwise
from pathlib import Path

import pytest
import tiny

from fastdpo.commands.cli import main
from fastdpo.training.durable import names_below
from fastdpo.training.runs.checkpoint import FORMAT, MANIFEST, CheckpointError, read_whole
from fastdpo.training.runs.run_list import RUN_FILE
from fastdpo.training.runs.start import resolve_resume

#: Parts of a file, each of which gets a flipped bit.
RANGES = 8


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with checkpoints of steps 2, 4 and 6."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    trainer = tiny.trainer(folder, max_steps=6, save_steps=2, save_strategy="steps", dynamic_beta=True)
    trainer.train()
    trainer.save_model()
    trainer.save_run({})
    return folder


@pytest.fixture
def copy(run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(run, tmp_path / "run"))


def flipped(raw: bytes, byte: int, bit: int) -> bytes:
    changed = bytearray(raw)
    changed[byte] ^= 1 << bit
    return bytes(changed)


def test_one_flipped_bit_in_each_range_of_each_file_is_named(copy: Path) -> None:
    rng, folder = random.Random(0), copy / "checkpoint-4"
    names = names_below(folder)
    assert {"adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"} < {
        *names
    }
    assert {"dynamic_beta.safetensors", "reference_logps.safetensors", "tokenizer.json", MANIFEST} < {*names}
    for name in names:
        path = folder / name
        raw = path.read_bytes()
        edges = sorted({len(raw) * part // RANGES for part in range(RANGES)} | {len(raw)})
        for low, high in pairwise(edges):
            path.write_bytes(flipped(raw, rng.randrange(low, high), rng.randrange(8)))
            with pytest.raises(CheckpointError, match=name):
                read_whole(folder)
        path.write_bytes(raw)
    read_whole(folder)


def test_any_flipped_bit_of_a_manifest_is_noticed(copy: Path) -> None:
    """It holds the digests of all others."""
    path, rng = copy / "checkpoint-4" / MANIFEST, random.Random(1)
    raw = path.read_bytes()
    for byte in range(0, len(raw), 5):
        path.write_bytes(flipped(raw, byte, rng.randrange(8)))
        with pytest.raises(CheckpointError, match=MANIFEST):
            read_whole(path.parent)
    for content in (b"[" * 99_999, b"9" * 9_999, b"\xff{}", b"NaN", b"\0" * 99, b"[]", b""):  # nor what is no manifest
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=MANIFEST):
            read_whole(path.parent)


@pytest.mark.parametrize("how", ["cut", "gone", "bit", "no manifest"])
def test_last_names_what_is_torn_and_offers_the_newest_whole_one(how: str, copy: Path) -> None:
    torn = copy / "checkpoint-6" / ("optimizer.pt" if how != "no manifest" else MANIFEST)
    raw = torn.read_bytes()
    torn.unlink() if how in ("gone", "no manifest") else torn.write_bytes(
        raw[:-9] if how == "cut" else flipped(raw, 99, 0)
    )
    offers = rf"{torn.name}.*The newest whole checkpoint is {copy / 'checkpoint-4'}: --resume_from_checkpoint"
    with pytest.raises(CheckpointError, match=offers):
        resolve_resume(copy, "last")
    (copy / "checkpoint-4" / "adapter_model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=rf"{torn.name}.*newest whole checkpoint is {copy / 'checkpoint-2'}: "):
        resolve_resume(copy, "last")
    assert resolve_resume(copy, str(copy / "checkpoint-2")) == copy / "checkpoint-2"


def test_a_checkpoint_says_its_format(copy: Path) -> None:
    """One without a number is from before there were any, which is format 1 and has no digests: refused by number."""
    path = copy / "checkpoint-6" / MANIFEST
    manifest = json.loads(path.read_text())
    assert manifest["format"] == FORMAT
    for found, said in (
        ({"format": 9, "fastdpo": "9.9"}, "9, saved by fastdpo 9.9"),
        ({}, "1, saved by fastdpo unknown"),
    ):
        path.write_text(json.dumps(found))
        message = (
            rf"{MANIFEST} has checkpoint format {said}; fastdpo \S+ reads format {FORMAT}\. Continue with the version"
        )
        with pytest.raises(CheckpointError, match=message):
            read_whole(path.parent)


def test_a_changed_list_of_the_run_is_refused(copy: Path) -> None:
    path = copy / RUN_FILE
    path.write_text(path.read_text().replace('"checkpoint-6"', '"checkpoint-4"'))
    with pytest.raises(CheckpointError, match=f"{RUN_FILE} was changed since it was written"):
        resolve_resume(copy, "last")


def test_verify_says_what_is_whole_and_what_a_resume_compares(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (copy / "notes.txt").write_text("mine")
    assert main(["verify", str(copy)]) == 0
    said = capsys.readouterr().out
    assert "finished at step 6" in said
    assert "not the run's: notes.txt" in said
    assert f"--resume_from_checkpoint last takes {copy / 'checkpoint-6'}" in said
    for part in ("training data", "16 rows, ", "adapter lora_alpha", "learning_rate", "micro_batch_tokens"):
        assert part in said
    assert main(["verify", str(copy / "checkpoint-2")]) == 0
    for name in ("checkpoint-4/scheduler.pt", "metrics.json"):
        (copy / name).write_bytes(flipped((copy / name).read_bytes(), 7, 3))
    capsys.readouterr()
    assert main(["verify", str(copy)]) == 1
    said = capsys.readouterr().out
    assert f"{copy / 'checkpoint-4/scheduler.pt'} holds other bytes than were saved" in said
    assert f"{copy / 'metrics.json'} holds other bytes than were saved" in said
    assert main(["verify", str(copy / "checkpoint-4")]) == 1
    assert main(["verify", str(copy.parent)]) == 2
    assert "no run and no checkpoint of fastdpo" in capsys.readouterr().err.replace("\n", " ")
