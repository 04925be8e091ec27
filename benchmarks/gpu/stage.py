"""One stage in a process of its own: `python -m benchmarks.gpu.stage MODULE --lines FILE --seconds S [--dry]`.

A stage is a module with `run(report, sizes)`; what it finds goes to FILE (`benchmarks.gpu.report`).
"""

from __future__ import annotations

import argparse
import importlib
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

from benchmarks.gpu.report import Report, last_line
from benchmarks.gpu.sizes import REAL, TOY


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m benchmarks.gpu.stage", description=__doc__)
    parser.add_argument("module")
    parser.add_argument("--lines", type=Path, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--dry", action="store_true")
    options = parser.parse_args(arguments)
    report = Report(options.lines, options.seconds)
    try:
        importlib.import_module(options.module).run(report, TOY if options.dry else REAL)
    except Exception as error:  # the process's one backstop: results.json says how it ended
        traceback.print_exc()
        report.write(error=last_line(error))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
