"""What a stage found, line by line in a file, so that what was measured before a crash or the end of its time is kept.

{"begin": case, "at": seconds}; {"case", "figures", "headline"}; {"failed": case, "reason"}; {"skipped": case,
"reason"}; and {"error"} where the stage itself ended with an exception.
"""

from __future__ import annotations

import json
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

#: A reason is a line of a table.
REASON_LENGTH = 300
#: What the first stage and the training stage say.
NO_BITSANDBYTES = (
    "bitsandbytes is not there, and the training stage's model is to be in its NF4. Run `make gpu-kit` where there is "
    "a network and carry gpu/kit here."
)


class Skipped(Exception):
    """A case has nothing to measure here; the message says why. The stage stays ok."""


def last_line(error: BaseException) -> str:
    """The last line of an exception as a traceback prints it."""
    lines = "".join(traceback.format_exception_only(error)).strip().splitlines()
    return lines[-1][:REASON_LENGTH]


class Report:
    """What a stage says. Printed too, for the log."""

    def __init__(self, lines: Path, seconds: float) -> None:
        self.lines, self.start = lines, time.monotonic()
        self.deadline = self.start + seconds

    def left(self) -> float:
        """Seconds until the stage's time is over."""
        return self.deadline - time.monotonic()

    def write(self, **entry: Any) -> None:
        text = json.dumps(entry, ensure_ascii=False)
        print(text, flush=True)
        with self.lines.open("a", encoding="utf-8") as file:
            file.write(text + "\n")

    def add(self, case: str, *, headline: str | None = None, **figures: Any) -> None:
        """Figures of a case; headline: what the closing table says of it."""
        self.write(case=case, figures=figures, **({} if headline is None else {"headline": headline}))

    def fail(self, case: str, reason: str) -> None:
        """The case is wrong or could not be measured, and with it the stage."""
        self.write(failed=case, reason=reason[:REASON_LENGTH])

    @contextmanager
    def case(self, name: str) -> Iterator[None]:
        """An exception in here fails this case alone; Skipped says that there is nothing to measure.

        Any exception: drivers, compilers and peers raise what they like (RuntimeError, OutOfMemoryError,
        CompilationError, AssertionError, AttributeError, ...), each is reported with its traceback, and the cases
        behind it may be all that the time on a card is for. An interrupt is none of them.
        """
        self.write(begin=name, at=round(time.monotonic() - self.start, 1))
        try:
            yield
        except Skipped as reason:
            self.write(skipped=name, reason=str(reason))
        except Exception as error:
            traceback.print_exc()
            self.fail(name, last_line(error))

    def skips(self, name: str, needs: float = 0.0) -> bool:
        """Whether fewer than `needs` seconds are left; says so."""
        if short := self.left() < needs:
            self.write(skipped=name, reason=f"{self.left():.0f} s of the stage's time are left")
        return short
