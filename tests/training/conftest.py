"""What one test of the trainer must not leave to the next."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from accelerate.state import GradientState


@pytest.fixture(autouse=True)
def no_dataloader_of_an_interrupted_run() -> Iterator[None]:
    """accelerate has one state for all trainers of a process; a run that was interrupted leaves its dataloader there,
    and a step that is taken by hand would be cut to the pairs that were left in that one."""
    yield
    state = GradientState()
    while state.in_dataloader:
        state._remove_dataloader(state.active_dataloader)
