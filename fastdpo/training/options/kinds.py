"""What an option accepts, read from the annotation of its field: one reader for flags, YAML and Python.

A flag and a scalar of a YAML file are text, and text becomes a value here; a Python value is held to the same rule, and
converted where the text that says the same would be (8 for "8", a path for its name). Nothing is rounded or guessed:
8.5 and True are no whole numbers, NaN and infinity no numbers.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import json
import math
import os
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any, Literal, Union

from transformers.trainer_pt_utils import AcceleratorConfig

from fastdpo.shown import shown
from fastdpo.training.options.secrets import HIDDEN

#: Text of true and of false, lower case: what argparse's helpers of transformers take, and YAML's on and off.
_TRUE, _FALSE = ("true", "yes", "on", "t", "y", "1"), ("false", "no", "off", "f", "n", "0")
#: Text of None, for options whose values are no text.
_NONE = ("none", "null")
#: A whole number is less than this.
_LARGEST = 2**63
#: Characters of a value that a message repeats, and levels of mappings and lists in one.
_SEEN, _DEEPEST = 120, 20
_ACCEPTED = {
    bool: "true or false",
    int: "a whole number, such as 8",
    float: "a finite number, such as 0.1",
    str: "text",
    dict: 'a mapping, in YAML or as JSON such as {"name": 1}',
}
#: Options of transformers that its annotations say less of than it takes, and those whose text stands for something
#: else: name → types beside the annotated ones.
_ALSO: dict[str, tuple[type, ...]] = {
    "accelerator_config": (AcceleratorConfig,),  # what the args of a built trainer hold
    "fsdp": (bool, list),
    "debug": (list,),
    "resume_from_checkpoint": (bool,),
    "include_num_input_tokens_seen": (bool,),
    "trackio_static_space_id": (bool,),
}
_CHOICES = {"include_num_input_tokens_seen": ("all", "non_padding", "no")}
#: Where the path of a JSON file stands for what it holds.
_FILES = ("accelerator_config", "fsdp_config", "deepspeed")
#: Numbers that may be infinite: gradients whose norm is logged and not clipped.
_UNBOUNDED = ("max_grad_norm",)
#: What an option that is no bool calls true and false: they may be spelled in all ways.
_SWITCHES = (("true", "false"), ("on", "off"))
#: Sizes, which Python may give as whole floats such as 4e9.
_SIZES = ("memory_limit", "head_workspace")


class OptionError(ValueError):
    """An option that is unknown, or a value that it does not accept. The message begins with its name."""


def suggestion(name: str, known: Iterable[str], prefix: str = "") -> str:
    """ "Did you mean ...?" with the names that are near, each after `prefix`; "" where none is."""
    names = list(known)
    begun = [each for each in names if each.startswith(name)] if len(name) > 2 else []
    near = [*begun, *(each for each in difflib.get_close_matches(name, names, n=3) if each not in begun)][:3]
    return f" Did you mean {' or '.join(prefix + each for each in near)}?" if near else ""


def seen(value: object) -> str:
    """`repr(value)`, cut where it is long."""
    try:
        text = shown(repr(value))
    except ValueError:  # a number of more digits than Python writes
        text = f"a {type(value).__name__} of many digits"
    return text if len(text) <= _SEEN else f"{text[:_SEEN]}… ({len(text)} characters)"


@dataclass(frozen=True)
class Kind:
    """base: bool, int, float, str or dict; None for what only Python can say. single, many: whether one value, or a
    list of them, is accepted. optional: whether None is. choices: the texts accepted. also: further Python types."""

    base: type | None
    single: bool = True
    many: bool = False
    optional: bool = False
    choices: tuple[str, ...] = ()
    also: tuple[type, ...] = ()

    @property
    def accepted(self) -> str:
        """In words."""
        if self.base is None:
            return " or ".join(each.__name__ for each in self.also) + ", in Python only"
        one = f"one of {', '.join(self.choices)}" if self.choices else _ACCEPTED[self.base]
        if self.many:
            one = f"{one}, or a list of such values" if self.single else f"a list; each of its values {one}"
        return f"{one}; or none" if self.optional else one

    def read(self, name: str, value: Any) -> Any:
        """`value` as the option `name` holds it. Raises OptionError."""
        if value is None:
            if self.optional:
                return None
            raise OptionError(f"{name}=None: a value is needed; leave the option out for its default.")
        if self.also and isinstance(value, self.also) and not isinstance(value, str):
            return value
        if isinstance(value, (list, tuple)):
            if not self.many:
                raise OptionError(f"{name}={seen(value)}: {self.accepted}, and no list.")
            return [self._one(name, each, value) for each in value]
        if isinstance(value, str) and self._says_none(value):
            return None
        found = self._one(name, value, value)
        return found if self.single else [found]

    def _switch(self, value: Any) -> Any:
        """The one of the choices that is true or false, where there is one and `value` spells it otherwise."""
        for on, off in _SWITCHES:
            if on in self.choices and off in self.choices and isinstance(value, (str, bool)):
                plain = str(value).strip().lower()
                return on if plain in _TRUE else off if plain in _FALSE else value
        return value

    def _says_none(self, text: str) -> bool:
        return self.optional and self.base is not str and text.strip().lower() in _NONE

    def _one(self, name: str, value: Any, whole: Any) -> Any:
        value = self._switch(_item(value))
        if isinstance(value, str) and "\0" in value:
            raise OptionError(f"{name}={seen(value)}: a NUL character is in no name and no path. Take it out.")
        try:
            found = None if self.base is None else _READERS[self.base](name, value)
        except OptionError:
            raise
        except (ValueError, TypeError, OverflowError):
            found = None
        if found is None:
            within = "" if value is whole else f" ({seen(value)} in it is none)"
            raise OptionError(f"{name}={seen(whole)}: {self.accepted}, is needed{within}.")
        if self.choices and found not in self.choices and not isinstance(found, self.also):
            near = suggestion(str(found), self.choices)
            accepted = ", ".join(self.choices)
            raise OptionError(f"{name}={seen(value)} is unknown; accepted are {accepted}.{near}")
        if HIDDEN in str(found):
            raise OptionError(
                f"{name}={seen(value)} holds {HIDDEN}, which a run writes in the place of a secret. Give the secret."
            )
        return found


def _item(value: Any) -> Any:
    """The number of Python that a scalar of numpy, or a tensor without dimensions, holds."""
    return value.item() if hasattr(value, "item") and getattr(value, "ndim", None) == 0 else value


def _bool(name: str, value: Any) -> bool | None:
    text = str(int(value) if isinstance(value, int) else value).strip().lower()
    if not isinstance(value, (str, int)) or text not in (*_TRUE, *_FALSE):
        return None
    return text in _TRUE


def _int(name: str, value: Any) -> int | None:
    if isinstance(value, bool) or not (isinstance(value, str) or hasattr(value, "__index__")):
        return None
    found = int(value)
    return found if -_LARGEST < found < _LARGEST else None


def _float(name: str, value: Any) -> float | None:
    if isinstance(value, bool) or not (isinstance(value, str) or hasattr(value, "__float__")):
        return None
    found = float(value)
    unbounded = name in _UNBOUNDED and found == math.inf
    return found if math.isfinite(found) or unbounded else None


def _str(name: str, value: Any) -> str | bool | None:
    if isinstance(value, str) and bool in _ALSO.get(name, ()) and value.lower() in ("true", "false"):
        return value.lower() == "true"
    if isinstance(value, str):  # enums of text among them
        return value
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, float) and name in _SIZES and value.is_integer():
        return str(int(value))
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else None


def _dict(name: str, value: Any) -> Any:
    if isinstance(value, Mapping):
        return dict(value)
    if not isinstance(value, str):
        return None
    text = value.strip()
    if name in _FILES and not text.startswith("{"):
        try:
            text = Path(text).expanduser().read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            cause = getattr(error, "strerror", None) or "not UTF-8"
            raise OptionError(f"{name}={seen(value)}: JSON, or a file of it, is needed ({cause}).") from error
    try:
        found = json.loads(text, object_pairs_hook=functools.partial(_pairs, name), parse_constant=_refuse_constant)
        return found if isinstance(found, dict) and _depth(found) <= _DEEPEST else None
    except RecursionError:
        return None


def _pairs(name: str, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        twice = next(key for key in found if [each for each, _ in pairs].count(key) > 1)
        raise OptionError(f"{name}: {seen(twice)} stands twice in one mapping. Keep one.")
    return found


def _refuse_constant(text: str) -> None:
    raise ValueError(f"{text} is no JSON")


def _depth(value: Any) -> int:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return 1 + max((_depth(each) for each in inner), default=0)


_READERS: dict[type, Any] = {bool: _bool, int: _int, float: _float, str: _str, dict: _dict}


def kind_of(name: str, annotation: Any, choices: Iterable[Any] = ()) -> Kind:
    """The kind that an annotation describes."""
    union = typing.get_origin(annotation) in (Union, types.UnionType)
    members = list(typing.get_args(annotation)) if union else [annotation]
    optional = type(None) in members
    members = [each for each in members if each is not type(None)]
    lists = [each for each in members if (typing.get_origin(each) or each) is list]
    many = [each for each in lists if not _is_enum(*typing.get_args(each))]
    also = tuple(_ALSO.get(name, ())) + tuple(list for each in lists if each not in many)
    singles = [each for each in members if each not in lists]
    bases, found = [], [str(each) for each in choices]
    for each in singles or [typing.get_args(many[0])[0]]:
        origin = typing.get_origin(each) or each
        if origin is Literal:
            also += tuple({type(value) for value in typing.get_args(each) if not isinstance(value, str)})
        elif _is_enum(each):
            found += [value.value for value in each]
            bases.append(str)
        elif origin in _READERS:
            bases.append(origin)
        else:
            also += (origin,)
    if bool in bases and str in bases:
        also += (bool,)
    # One that says everything in text; dict before str, which is its JSON
    base = next((each for each in (dict, str, float, int, bool) if each in bases), None)
    return Kind(base, bool(singles), bool(many), optional, _CHOICES.get(name, tuple(found)), also)


def _is_enum(*annotation: Any) -> bool:
    return len(annotation) == 1 and isinstance(annotation[0], type) and issubclass(annotation[0], Enum)


def kinds_of(config: Any) -> dict[str, Kind]:
    """Option → its kind, of a dataclass of options."""
    return _kinds_of(config)


@functools.cache
def _kinds_of(config: Any) -> dict[str, Kind]:
    hints = typing.get_type_hints(config)  # not Field.type, which argument parsers rewrite
    return {
        each.name: kind_of(each.name, hints[each.name], each.metadata.get("choices") or ())
        for each in dataclasses.fields(config)
        if each.init
    }


def check_fields(config: Any) -> None:
    """Hold every option of a dataclass to its kind, and convert it where its text would be. Raises OptionError."""
    for name, kind in kinds_of(type(config)).items():
        setattr(config, name, kind.read(name, getattr(config, name)))
