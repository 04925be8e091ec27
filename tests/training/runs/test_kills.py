"""Runs killed at their own file operations resume to the bit; and the harness that says so finds what is wrong."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[2]


def kills(*arguments: str) -> tuple[int, str]:
    """Exit status and output of `kills.py`."""
    command = [sys.executable, str(TESTS / "kills.py"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    return done.returncode, done.stdout + done.stderr[-2000:]


@pytest.mark.slow
def test_killed_runs_resume_to_the_bit() -> None:
    """At 40 points of five kinds of runs; `make test-kills` tries all of them."""
    code, said = kills("--points", "40", "--seed", "11")
    assert "40 of 40 resume to the bit" in said, said
    assert code == 0, said


@pytest.mark.slow
@pytest.mark.parametrize(
    ("defect", "point", "finding"),
    [
        # A checkpoint that holds half of its optimizer is refused, or its two steps are trained again
        ("in place", "torn write run/checkpoint-2/optimizer.pt", r"restart ended with \[1\]|trained: 4 and not 2"),
        ("one bit", "file-run/metrics.json", r"run/adapter_model.safetensors: 1 of \d+ values differ, .* by up to \d"),
        ("leftover", "before rmdir run/mark-", r"run/mark-\d+ is left over"),
    ],
)  # fmt: skip
def test_a_defect_is_found(defect: str, point: str, finding: str) -> None:
    """Planted into each trainer by `kill_sabotage.py`; no point of these but for the defect would fail so."""
    code, said = kills("--scenario", "lazy", "--broken", defect, "--matching", point)
    assert code == 1
    assert re.search(r"^0 of [1-9]\d* resume to the bit", said, re.MULTILINE), said
    assert re.search(finding, said), said


#: Forked for each [folder, kill's number or null, when, whether some operations pass the watch by].
_OPERATIONS = """
import io, json, os, shutil, sys, tempfile
from pathlib import Path
import safetensors.torch, torch
from safetensors.torch import save_file
import tiny
from file_operations import Kill, Watch

tokens, passes_by = tiny.tokenizer(), io.open

def work(place, number, when, unseen):
    files = place / "files"
    watch = Watch(files, place / "cut", None if number is None else Kill(number, when))
    watch.install()
    (files / "a").mkdir()
    (files / "a" / "text").write_text("0123456789")
    with open(files / "a" / "blocks", "wb") as file:  # Python's buffer holds 8192 bytes, so operation 4 holds 5000
        file.write(bytes(5000))
        file.write(bytes(5000))
    descriptor = os.open(files / "a" / "low", os.O_WRONLY | os.O_CREAT)
    os.write(descriptor, b"abcd")
    os.fsync(descriptor)
    os.ftruncate(descriptor, 2)
    save_file({"x": torch.ones(8)}, files / "x.safetensors")
    torch.save(torch.ones(8), files / "x.pt")
    shutil.copyfile(files / "a" / "text", files / "copied")
    os.replace(files / "copied", files / "text")
    os.symlink("text", files / "link")
    tempfile.NamedTemporaryFile(dir=files, delete=False).close()
    tokens.save_pretrained(files / "tokens")
    shutil.rmtree(files / "a")
    (place / "elsewhere").write_text("nothing of the folder's")
    if unseen:
        passes_by(files / "heard", "w").close()
        torch._C.PyTorchFileWriter(str(files / "native")).write_end_of_file()
    done, unseen = watch.finish()
    seen = [[each.kind, each.path, each.size, each.changed] for each in done]
    (place / "seen").write_text(json.dumps([seen, unseen]))

for place, *arguments in json.loads(sys.argv[1]):
    (Path(place) / "files").mkdir(parents=True)
    child = os.fork()
    if not child:
        work(Path(place), *arguments)
        os._exit(0)
    (Path(place) / "code").write_text(str(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])))
"""
#: The kills of `_OPERATIONS`, and the bytes that each file then has.
_CUT = {
    (2, "before"): {"a/text": 0},
    (2, "torn"): {"a/text": 5},
    (2, "after"): {"a/text": 10},
    (5, "torn"): {"a/text": 10, "a/blocks": 5000 + 2500},
    (14, "before"): {"a/text": 10, "a/blocks": 10000, "a/low": 2, "copied": 10},
    (14, "after"): {"a/text": 10, "a/blocks": 10000, "a/low": 2, "text": 10},
}


@pytest.fixture(scope="module")
def worked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("operations")
    jobs = [[str(place / "all"), None, "", False], [str(place / "unseen"), None, "", True]]
    jobs += [[str(place / f"{number} {when}"), number, when, False] for number, when in _CUT]
    path = os.pathsep.join([str(TESTS), str(TESTS.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-c", _OPERATIONS, json.dumps(jobs)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": path}, timeout=300)
    assert done.returncode == 0, done.stderr
    return place


def test_every_operation_is_counted(worked: Path) -> None:
    found, unseen = json.loads((worked / "all" / "seen").read_text())
    assert unseen == []
    libraries = ("safetensors", "torch.save", "tokenizers")
    assert [(kind, path, size) for kind, path, size, _ in found[:16] if kind not in libraries] == [
        ("mkdir", "a", 0),
        ("open", "a/text", 0), ("write", "a/text", 10),
        ("open", "a/blocks", 0), ("write", "a/blocks", 5000), ("write", "a/blocks", 5000),
        ("open", "a/low", 0), ("write", "a/low", 4), ("fsync", "a/low", 0), ("truncate", "a/low", 0),
        ("open", "copied", 0), ("write", "copied", 10),
        ("replace", "copied to text", 0), ("symlink", "text to link", 0),
    ]  # fmt: skip
    whole = {path: size for kind, path, size, _ in found if kind in libraries}
    assert whole.keys() == {"x.safetensors", "x.pt", "tokens/tokenizer.json"}
    assert whole == {path: (worked / "all" / "files" / path).stat().st_size for path in whole}
    assert [kind for kind, *_ in found[-4:]] == ["unlink", "unlink", "unlink", "rmdir"]
    assert [path for _, path, _, changed in found if not changed and path.startswith("a/")] == ["a/low"]  # flushed


def test_what_passes_the_watch_by_is_said(worked: Path) -> None:
    assert json.loads((worked / "unseen" / "seen").read_text())[1] == [
        "open heard was not counted",
        "heard changed on the disk without an operation",
        "native changed on the disk without an operation",
    ]


@pytest.mark.parametrize(("number", "when"), _CUT)
def test_a_kill_leaves_what_was_done(number: int, when: str, worked: Path) -> None:
    place = worked / f"{number} {when}"
    assert int((place / "code").read_text()) == -signal.SIGKILL
    sizes = {str(p.relative_to(place / "files")): p.stat().st_size for p in place.glob("files/**/*") if p.is_file()}
    assert {name: size for name, size in sizes.items() if not name.startswith("x.")} == _CUT[number, when]
    cut = json.loads((place / "cut").read_text())
    assert cut["kind"] == ("write" if number < 14 else "replace")
