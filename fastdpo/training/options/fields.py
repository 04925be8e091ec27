"""Fields of options dataclasses: taken over from others, and checked as argparse would."""

from __future__ import annotations

from dataclasses import MISSING, Field, field, fields
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


def check_fields(config: Any) -> None:
    """What argparse checks on the command line, for options that come from YAML or Python.

    Raises ValueError where a field with `choices` holds something else, or where None stands in a field that needs a
    value. A single string in the place of a list becomes a list of one.
    """
    own = type(config).__annotations__  # not Field.type, which argument parsers rewrite
    for each in fields(config):
        value, kind = getattr(config, each.name), str(own.get(each.name))
        if value is None and each.name in own and "None" not in kind:
            raise ValueError(f"{each.name}=None: a value is needed; leave the option out for its default.")
        if isinstance(value, str) and kind.startswith("list[str]"):
            setattr(config, each.name, [value])
        accepted = each.metadata.get("choices")
        if accepted and value not in (*accepted, None):
            raise ValueError(f"{each.name}={value!r} is unknown; accepted are {', '.join(accepted)}.")


def is_set(config: Any, name: str) -> bool:
    """Whether the option `name` differs from its default."""
    found = config.__dataclass_fields__[name]
    default = found.default_factory() if callable(found.default_factory) else found.default
    return bool(getattr(config, name) != default)


def check_conditions(config: Any, met: set[str], conditions: tuple[tuple[tuple[str, ...], str, str], ...]) -> None:
    """Raise ValueError for an option that was changed but acts only under a condition that is not in `met`."""
    for names, condition, advice in conditions:
        for name in names:
            if is_set(config, name) and not met & {name, condition}:
                raise ValueError(f"{name}={getattr(config, name)!r} has no effect here: {advice}")
