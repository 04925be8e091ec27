"""Names of transformers and peft that they deprecate: an error where our own code uses one.

Both warn without saying whose call it was, and peft and TRL use what transformers deprecates; so no filter of pytest
can tell them from us. The caller is looked for on the stack instead.
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
OURS = tuple(str(ROOT / folder) for folder in ("fastdpo", "kernels", "benchmarks", "tests"))
LIBRARIES = ("transformers", "peft")

_warn = warnings.warn


def caller_of(library: str) -> str:
    """The file that called into `library`, whose function is on top of the stack above ours; attributes that a wrapper
    hands on (`__getattr__`) are asked for by who asked the wrapper."""
    frame = sys._getframe(2)
    while frame.f_back is not None:
        inside = frame.f_globals.get("__name__", "").split(".")[0] == library
        if not inside and frame.f_code.co_name != "__getattr__":
            break
        frame = frame.f_back
    return frame.f_code.co_filename


def warn(message: Any, category: Any = None, stacklevel: int = 1, *rest: Any, **options: Any) -> None:
    """`warnings.warn`, but a deprecation that our code met is raised."""
    kind = type(message) if isinstance(message, Warning) else category or UserWarning
    library = sys._getframe(1).f_globals.get("__name__", "").split(".")[0]
    deprecation = issubclass(kind, (FutureWarning, DeprecationWarning)) and library in LIBRARIES
    if deprecation and (file := caller_of(library)).startswith(OURS):
        raise kind(f"{message} (called in {file})")
    _warn(message, category, stacklevel + 1, *rest, **options)
