"""Shared settings of the tests: one thread per process, no hub, helpers importable, and where kernels run.

FASTDPO_TEST_DEVICE=cuda runs the tests marked `gpu`, on the card. Without it (or with cpu) all others run, kernels in
Triton's interpreter. One process cannot do both, as Triton chooses when a kernel is imported; what is deselected is
said in the summary.
"""

from __future__ import annotations

import importlib.metadata
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest

DEVICE = os.environ.get("FASTDPO_TEST_DEVICE", "cpu")
#: How many tests belong to the other device.
_DROPPED = pytest.StashKey[int]()

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if DEVICE != "cuda":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    # Before any kernel is imported: Triton decides when it decorates
    os.environ.setdefault("TRITON_INTERPRET", "1")
# Their folder is no name of a package that is installed (`kernels`, `fastdpo_kernels`): on this path it would shadow it
sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(1, str(Path(__file__).parent.parent))  # `benchmarks`, whose checks the GPU's tests share

pytest.register_assert_rewrite("same_run")  # a helper whose assertions should explain themselves


def pytest_configure() -> None:
    """No test runs unless on what was asked for: with FASTDPO_TEST_DEVICE a card, with FASTDPO_TEST_FLOOR, the folder
    of the oldest versions, these."""
    from deprecations import warn

    warnings.warn = warn  # before any of our modules is imported
    if folder := os.environ.get("FASTDPO_TEST_FLOOR"):
        from floor import wrong_versions

        if wrong := wrong_versions(Path(folder)):
            raise pytest.UsageError(" ".join([*wrong, "Run `make test-floor`."]))
    if DEVICE not in ("cpu", "cuda"):
        raise pytest.UsageError(f"FASTDPO_TEST_DEVICE={DEVICE!r}: cpu or cuda.")
    if DEVICE == "cuda":
        import torch

        from benchmarks.gpu import NO_CARD  # the status of `python -m benchmarks.gpu`

        if not torch.cuda.is_available():
            pytest.exit(
                f"FASTDPO_TEST_DEVICE=cuda, but torch {torch.__version__} sees no card; `python -m benchmarks.gpu` "
                "says why. Unset the variable for the tests on the CPU.",
                returncode=NO_CARD,
            )
        if os.environ.get("TRITON_INTERPRET", "") not in ("", "0"):
            raise pytest.UsageError(
                "FASTDPO_TEST_DEVICE=cuda with TRITON_INTERPRET would test the CPU; unset that one."
            )


def pytest_report_header() -> str:
    """The versions that a run is about."""
    names = ("torch", "triton", "transformers", "numpy")
    return ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    on_gpu = [item for item in items if item.get_closest_marker("gpu") is not None]
    elsewhere = [item for item in items if item.get_closest_marker("gpu") is None]
    kept, dropped = (on_gpu, elsewhere) if DEVICE == "cuda" else (elsewhere, on_gpu)
    if dropped:
        config.hook.pytest_deselected(items=dropped)
        config.stash[_DROPPED] = len(dropped)
        items[:] = kept


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    if count := config.stash.get(_DROPPED, 0):
        which = "tests of the CPU" if DEVICE == "cuda" else "GPU tests"
        how = "without FASTDPO_TEST_DEVICE" if DEVICE == "cuda" else "on a card: make test-gpu"
        terminalreporter.write_line(f"{count} {which} were deselected; they run {how}.")
