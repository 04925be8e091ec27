"""Shared settings of the tests: one thread per process, no hub, Triton interpreted, helpers importable."""

from __future__ import annotations

import importlib.metadata
import os
import sys
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Before any kernel is imported: Triton decides when it decorates
os.environ.setdefault("TRITON_INTERPRET", "1")
sys.path.insert(0, str(Path(__file__).parent))


def pytest_configure() -> None:
    """With FASTDPO_TEST_FLOOR, the folder of the oldest versions: no test runs unless they are the ones imported."""
    if folder := os.environ.get("FASTDPO_TEST_FLOOR"):
        from floor import wrong_versions

        if wrong := wrong_versions(Path(folder)):
            raise pytest.UsageError(" ".join([*wrong, "Run `make test-floor`."]))


def pytest_report_header() -> str:
    """The versions that a run is about."""
    names = ("torch", "triton", "transformers", "numpy")
    return ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names)
