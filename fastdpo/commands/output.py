"""What libraries print around a command, so that nothing in it acts on the terminal and nothing fails to be printed."""

from __future__ import annotations

import io
import logging
import sys
import warnings

from fastdpo.shown import shown


class VisibleRecord(logging.LogRecord):
    """A log record whose message has escapes in the place of control characters, whichever handler prints it."""

    def getMessage(self) -> str:
        return shown(super().getMessage(), lines=True)


def _format_warning(message: Warning | str, category: type[Warning], *_: object, **__: object) -> str:
    return f"{category.__name__}: {shown(message, lines=True)}\n"


def make_output_visible() -> None:
    """For this process: log records and warnings show escapes, and a stream gets the escape of what it lacks."""
    logging.setLogRecordFactory(VisibleRecord)
    # At import, with Hugging Face's `kernels` installed: an inference kernel cannot be fetched. It is never used here.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    warnings.formatwarning = _format_warning
    # How libraries will call each other one day is nothing that the person at the terminal can change
    warnings.filterwarnings("ignore", category=FutureWarning, module="accelerate|datasets|peft|torch|transformers")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
