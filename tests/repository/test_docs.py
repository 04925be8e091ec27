"""Every code block of the README runs, and it says what it must within its length."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tiny

from fastdpo.commands.cli import COMMANDS
from fastdpo.commands.options import make_parser, parse
from fastdpo.training.options import DataConfig, FastDPOConfig, ModelConfig

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks_of(text: str) -> list[tuple[str, str]]:
    """Kind and text of each code block."""
    return re.findall(r"```(\w+)\n(.*?)```", text, flags=re.DOTALL)


BLOCKS = blocks_of(README)


def test_readme_is_short_and_its_blocks_are_of_known_kinds() -> None:
    assert len(README.splitlines()) < 150
    assert {kind for kind, _ in BLOCKS} <= {"python", "bash", "yaml", "text"}
    assert sum(kind == "python" for kind, _ in BLOCKS) >= 2


@pytest.mark.parametrize("code", [text for kind, text in BLOCKS if kind == "python"])
def test_python_block_runs(code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a tiny model, tiny data and few steps in the place of the ones named; everything else runs as it stands."""
    monkeypatch.chdir(tmp_path)
    tiny.llama(max_position_embeddings=2048).save_pretrained("model")
    tiny.tokenizer().save_pretrained("model")
    tiny.pairs(6).to_json("pairs.jsonl")
    code = code.replace("Qwen/Qwen2.5-0.5B-Instruct", "./model")
    exec(compile(code, "README.md", "exec"), {"__name__": "__main__"})


def commands() -> list[str]:
    """Of the README and the documents."""
    blocks = BLOCKS + [block for path in (ROOT / "docs").glob("*.md") for block in blocks_of(path.read_text("utf-8"))]
    joined = "\n".join(text for kind, text in blocks if kind == "bash").replace("\\\n", " ")
    return [line.split("#")[0].strip() for line in joined.splitlines() if line.split("#")[0].strip()]


@pytest.mark.parametrize("command", commands())
def test_shell_command_exists(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`make` targets exist, `fastdpo train` options parse; the two main commands are what CI runs."""
    words = shlex.split(command)
    if words[0] == "make":
        makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
        assert re.search(rf"^{words[1]}:", makefile, flags=re.MULTILINE), f"no target {words[1]}"
    elif words[:2] == ["fastdpo", "train"]:
        monkeypatch.chdir(tmp_path)
        for kind, text in BLOCKS:
            if kind == "yaml":
                Path("run.yaml").write_text(text, encoding="utf-8")
        monkeypatch.setattr("torch.cuda.is_available", lambda: False)
        parse(make_parser("fastdpo train", "", ModelConfig, DataConfig, FastDPOConfig), words[2:])
    elif words[0] == "fastdpo":
        assert words[1] in COMMANDS
    else:
        assert words[0] in ("git", "cd", "pip", "python")
        assert shutil.which(words[0]) or words[0] == "cd" or Path(sys.executable).with_name(words[0]).exists()


def test_every_test_that_is_named_exists() -> None:
    """In documents, comments and docstrings: a reader who follows a name finds its file."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    names = {Path(name).name for name in listed}
    stale = []
    for name in listed:
        if not name.endswith((".md", ".py", ".toml", ".sh")) or name == "CHANGELOG.md":
            continue
        text = (ROOT / name).read_text(encoding="utf-8")
        stale += [f"{name}: {test}" for test in re.findall(r"tests/(?:\w+/)*\w+\.py", text) if test not in listed]
        stale += [f"{name}: {test}" for test in re.findall(r"\btest_\w+\.py", text) if test not in names]
    assert not stale, stale
