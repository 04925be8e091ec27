"""Fields of options dataclasses, taken over from others, and their defaults."""

from __future__ import annotations

from dataclasses import MISSING, Field, field
from typing import Any

from fastdpo.formulas import PARAMETERS


def like(options: Any, name: str, help: str | None = None, *, prefix: str = "") -> Any:
    """A field with default and choices of the field `name` of another dataclass; its help too, unless one is given."""
    found: Field[Any] = options.__dataclass_fields__[name]
    metadata = metadata_of(options, name, help, prefix=prefix)
    if found.default is MISSING and found.default_factory is not MISSING:
        return field(default_factory=found.default_factory, metadata=metadata)
    return field(default=found.default, metadata=metadata)


def metadata_of(options: Any, name: str, help: str | None = None, *, prefix: str = "") -> dict[str, Any]:
    """What argparse reads of that field: help and choices."""
    found = options.__dataclass_fields__[name].metadata
    metadata = {"help": prefix + (found["help"] if help is None else help)}
    return metadata | ({"choices": found["choices"]} if "choices" in found else {})


def parameter(name: str) -> Any:
    """A field for a parameter of the losses or of the f-divergences."""
    return field(default=PARAMETERS[name].default, metadata={"help": PARAMETERS[name].help})


def is_set(config: Any, name: str) -> bool:
    """Whether the option `name` differs from its default."""
    return bool(getattr(config, name) != default_of(config, name))


def default_of(config: Any, name: str) -> Any:
    """The default of the option `name`."""
    found = config.__dataclass_fields__[name]
    return found.default_factory() if callable(found.default_factory) else found.default
