"""What a command is doing, for the sentence about an error that ends it; written onto the error as it leaves."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_ATTRIBUTE = "fastdpo_circumstances"


@contextmanager
def stage(doing: str, *, begun: Callable[[], bool] = lambda: False) -> Iterator[None]:
    """An error that leaves this context was raised while `doing` ("loading the model"); the innermost stage counts.

    begun: asked then, whether the run may have taken a step.
    """
    with _circumstances(lambda: {"doing": doing, "begun": begun()}):
        yield


@contextmanager
def beside(run: str | Path) -> Iterator[None]:
    """What is kept of an error that leaves this context lies beside the folder of this run."""
    with _circumstances(lambda: {"run": Path(run)}):
        yield


@contextmanager
def _circumstances(facts: Callable[[], dict[str, Any]]) -> Iterator[None]:
    try:
        yield
    except BaseException as error:
        setattr(error, _ATTRIBUTE, {**facts(), **_of(error)})
        raise


def _of(error: BaseException) -> dict[str, Any]:
    return dict(getattr(error, _ATTRIBUTE, {}))


def doing(error: BaseException) -> str | None:
    """What was being done when `error` was raised."""
    return _of(error).get("doing")


def begun(error: BaseException) -> bool:
    """Whether the run may have taken a step when `error` was raised."""
    return bool(_of(error).get("begun", False))


def run_of(error: BaseException) -> Path | None:
    """The folder of the run that `error` has ended."""
    return _of(error).get("run")
