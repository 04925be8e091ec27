"""Paths that cannot be what an option needs, refused by its name before anything is looked for."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from fastdpo.training.options import DataConfig, FastDPOConfig, ModelConfig
from fastdpo.training.options.paths import PATHS

CONFIGS = (ModelConfig, DataConfig, FastDPOConfig)


def config_of(option: str) -> type:
    return next(config for config in CONFIGS if option in config.__dataclass_fields__)


@pytest.mark.parametrize("option", PATHS)
def test_impossible_paths(option: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each option and each kind: an empty shell variable, NUL, bytes that are no UTF-8, a circle of links, no user."""
    monkeypatch.chdir(tmp_path)
    Path("ring").symlink_to("other")
    Path("other").symlink_to("ring")
    Path("file").touch()
    impossible = {
        "": "is empty",
        "  ": "is empty",
        "a\0b": "NUL",
        os.fsdecode(b"caf\xe9"): "not UTF-8",
        "ring": "in a circle",
        "ring/below": "in a circle",
        "x" * 300: "longer than the file system allows",
        "~no-such-user/x": "no user 'no-such-user'",
    }
    if PATHS[option] is not None:
        impossible["file" if PATHS[option] == "folder" else "."] = (
            "is a file" if PATHS[option] == "folder" else "no file"
        )
    for value, problem in impossible.items():
        with pytest.raises(ValueError, match=problem) as caught:
            config_of(option)(**{option: value})
        assert str(caught.value).startswith(f"{option}={value!r}")


def test_possible_paths(tmp_path: Path) -> None:
    """Names of the hub, what is not there yet, and odd names that exist are left to those who look for them."""
    odd = tmp_path / "[/b] \x1b[2J\n海"
    odd.mkdir(parents=True)
    for value in ("org/name", "last", str(tmp_path / "later" / "run"), str(odd), "~/runs/mine"):
        for option, kind in PATHS.items():
            if not (kind == "file" and value == str(odd)):
                config_of(option)(**{option: value})
