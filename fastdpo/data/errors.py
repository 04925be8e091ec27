"""The error that every reader, format and tokenisation step raises for data it cannot use."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pyarrow as pa
import yaml
from datasets.exceptions import DatasetsError

from fastdpo.shown import shown


class PreferenceDataError(ValueError):
    """Preference data that is corrupt, of the wrong shape, or empty; the message names the file and the line."""


#: What libraries raise for files that are damaged or hold something else: parsers, and code that met another type.
DAMAGE = (
    ArithmeticError,
    AttributeError,
    DatasetsError,
    LookupError,
    RecursionError,
    TypeError,
    ValueError,
    pa.ArrowException,
    yaml.YAMLError,
)


@contextmanager
def damage_is_named(what: str, advice: str) -> Iterator[None]:
    """Turns what a library raises for damaged files into one PreferenceDataError; one of ours passes as it is."""
    try:
        yield
    except PreferenceDataError:
        raise
    except DAMAGE as error:
        raise PreferenceDataError(f"{what} ({cause(error)}); {advice}") from error


def cause(error: BaseException) -> str:
    """The kind of an error and the first line of what it says."""
    said = str(error).strip().split("\n")[0]
    return shown(f"{type(error).__name__}: {said}" if said else type(error).__name__)
