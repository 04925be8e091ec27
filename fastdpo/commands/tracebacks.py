"""The traceback of a defect, in a file beside the run."""

from __future__ import annotations

import os
import tempfile
import traceback
from contextlib import suppress
from pathlib import Path

from fastdpo.commands.stages import run_of
from fastdpo.shown import shown
from fastdpo.training.options.secrets import without_secrets


def keep_traceback(error: BaseException) -> Path | None:
    """Write the traceback of `error` to a new file, beside the folder of the run where that can be, else in the folder
    for temporary files. None where neither can be written to."""
    lines = "".join(traceback.format_exception(type(error), error, error.__traceback__))
    content = shown(without_secrets(lines), lines=True).encode()
    run = run_of(error)
    places = [] if run is None else [(run.parent, f"{run.name}.traceback-")]
    for folder, prefix in [*places, (Path(tempfile.gettempdir()), "fastdpo.traceback-")]:
        with suppress(OSError):  # a full disk, a folder of somebody else
            handle, name = tempfile.mkstemp(".txt", prefix, folder)  # exclusively, and readable by this user alone
            with os.fdopen(handle, "wb") as file:
                file.write(content)
            return Path(name)
    return None
