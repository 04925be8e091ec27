"""A YAML file of options: each value as the text that a flag would have, with the line that it stands in.

YAML's own types are not asked: `packing: off`, `save_strategy: no`, `learning_rate: 1e-5` mean what the flags with
these words mean. Only null (and nothing at all) is None, and the values within a mapping, which no flag has, are
numbers, true, false, null or text as they look. What YAML offers beside lists and mappings is refused: tags, anchors,
merge keys, several documents.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from fastdpo.shown import shown
from fastdpo.training.options.kinds import Kind, OptionError, seen, suggestion

#: Bytes of a file, and lists and mappings within one another.
_LARGEST, _DEEPEST = 1 << 20, 20
_NULL = ("", "~", "null", "Null", "NULL")
_TRUE, _FALSE = ("true", "yes", "on"), ("false", "no", "off")
#: YAML's own words for what text and Python spell without the point.
_BEYOND = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
_NUMBER = re.compile(r"[-+]?(\d+|(\d+\.?\d*|\.\d+)(e[-+]?\d+)?)", re.IGNORECASE | re.ASCII)
#: How a message names an option: in front, or as transformers does.
_NAMED = re.compile(r"(?:^|--|`)(\w+)")


@dataclass(frozen=True)
class OptionFile:
    """values: option → text, list of texts, mapping or None. lines: option → where it stands, from 1."""

    path: str = ""
    values: Mapping[str, Any] = field(default_factory=dict)
    lines: Mapping[str, int] = field(default_factory=dict)

    def placed(self, error: ValueError, flags: Collection[str]) -> ValueError:
        """The error with file and line in front, where it names an option that is of this file and none of the
        `flags`."""
        named = [name for name in _NAMED.findall(str(error)) if name in self.lines and name not in flags]
        if not named:
            return error
        name = named[0]
        return OptionError(f"{_place(self.path, self.lines[name])}: {error}")


def read_option_file(path: str, kinds: Mapping[str, Kind]) -> OptionFile:
    """The options in the YAML file at `path`, of those in `kinds`. Raises OptionError for what is none, or no YAML."""
    text = _read(path)
    try:
        _refuse_beyond(path, text)
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = _place(path, mark.line + 1) if mark else f"option file {path!r}"
        raise OptionError(f"{place}: not valid YAML: {shown(error.problem or error.context)}.") from error
    except yaml.YAMLError as error:
        raise OptionError(f"option file {path!r} is not valid YAML: {shown(str(error).splitlines()[0])}.") from error
    if root is None:
        return OptionFile(path)
    if not isinstance(root, yaml.MappingNode):
        what = "a list" if isinstance(root, yaml.SequenceNode) else "text"
        raise OptionError(f"option file {path!r} holds {what}; lines of the form 'name: value' are needed.")
    values: dict[str, Any] = {}
    lines: dict[str, int] = {}
    for key, node in root.value:
        place = _place(path, key.start_mark.line + 1)
        name = _name(key, place, kinds)
        if name in values:
            raise OptionError(f"{place}: {name} stands in line {lines[name]} already. Keep one of them.")
        lines[name] = key.start_mark.line + 1
        values[name] = _value(name, node, kinds[name], place)
    return OptionFile(path, values, lines)


def _place(path: str, line: int) -> str:
    return f"{shown(path)}, line {line}"


def _read(path: str) -> str:
    hint = "The first argument is a YAML file of options, or a flag."
    try:
        file = Path(path).expanduser()
        if not file.is_file():
            file.stat()
            raise OptionError(f"option file {path!r}: no file, but a folder or a device. {hint}")
        if file.stat().st_size > _LARGEST:
            raise OptionError(f"option file {path!r}: larger than {_LARGEST >> 20} MiB, which no file of options is.")
        return file.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise OptionError(
            f"{_place(path, line)}: not UTF-8 (byte {error.object[error.start]:#04x}). Save it as UTF-8."
        ) from error
    except FileNotFoundError as error:
        raise OptionError(f"option file {path!r}: no such file. {hint}") from error
    except (OSError, RuntimeError, ValueError) as error:
        if isinstance(error, OptionError):
            raise
        cause = getattr(error, "strerror", None) or str(error)
        raise OptionError(f"option file {path!r}: it cannot be read: {cause}. {hint}") from error


def _refuse_beyond(path: str, text: str) -> None:
    """What YAML can do beside lists and mappings of text, and nesting without end."""
    depth = documents = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        place = _place(path, event.start_mark.line + 1 if event.start_mark else 1)
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
            raise OptionError(f"{place}: anchors and aliases (& and *) are not read. Write the value out.")
        if tag := getattr(event, "tag", None):
            raise OptionError(f"{place}: the tag {tag!r} is not read. Write the value alone.")
        documents += isinstance(event, yaml.DocumentStartEvent)
        if documents > 1:
            raise OptionError(f"{place}: a second document begins here (---). Give one file for one run.")
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > _DEEPEST:
            raise OptionError(f"{place}: more than {_DEEPEST} lists and mappings within one another.")


def _name(key: yaml.Node, place: str, kinds: Mapping[str, Kind]) -> str:
    if not isinstance(key, yaml.ScalarNode):
        raise OptionError(f"{place}: the name of an option is needed before the colon.")
    if key.value == "<<" and key.style is None:
        raise OptionError(f"{place}: merge keys (<<) are not read. Write the options out.")
    name = str(key.value).replace("-", "_")
    if name not in kinds:
        if name.startswith("no_") and kinds.get(name[3:], Kind(str)).base is bool:
            raise OptionError(f"{place}: {seen(key.value)} is a flag only. Write {name[3:]}: false.")
        near = suggestion(name, kinds) or " `fastdpo train --help_all` lists the options."
        raise OptionError(f"{place}: {seen(key.value)} is no option.{near}")
    return name


def _value(name: str, node: yaml.Node, kind: Kind, place: str) -> Any:
    if isinstance(node, yaml.ScalarNode):
        return None if _is_null(node) else _text(node, kind)
    if isinstance(node, yaml.SequenceNode):
        if not kind.many and list not in kind.also:
            raise OptionError(f"{place}: {name} is a list here: {kind.accepted}, and no list.")
        if wrong := [each for each in node.value if not isinstance(each, yaml.ScalarNode) or _is_null(each)]:
            what = "nothing" if isinstance(wrong[0], yaml.ScalarNode) else "a list or mapping"
            raise OptionError(f"{place}: {name} holds {what} within its list: {kind.accepted}, is needed.")
        return [_text(each, kind) for each in node.value]
    if kind.base is not dict:
        raise OptionError(f"{place}: {name} is a mapping here: {kind.accepted}, and no mapping.")
    return _plain(node, place)


def _text(node: yaml.ScalarNode, kind: Kind) -> str:
    """As a flag would have it."""
    text = str(node.value)
    return text.replace(".", "") if kind.base is float and node.style is None and _BEYOND.fullmatch(text) else text


def _is_null(node: yaml.ScalarNode) -> bool:
    return node.style is None and node.value in _NULL


def _plain(node: yaml.Node, place: str) -> Any:
    """What stands within a mapping."""
    if isinstance(node, yaml.SequenceNode):
        return [_plain(each, place) for each in node.value]
    if isinstance(node, yaml.MappingNode):
        found: dict[str, Any] = {}
        for key, each in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.value in found:
                what = (
                    f"{seen(key.value)} stands twice in one mapping" if isinstance(key, yaml.ScalarNode) else "no name"
                )
                raise OptionError(f"{place}: {what}, in line {key.start_mark.line + 1}. A name stands once, as text.")
            found[str(key.value)] = _plain(each, place)
        return found
    assert isinstance(node, yaml.ScalarNode)
    text = str(node.value)
    if node.style is not None:
        return text
    if text in _NULL:
        return None
    if text.lower() in (*_TRUE, *_FALSE):
        return text.lower() in _TRUE
    if _BEYOND.fullmatch(text):
        return float(text.replace(".", ""))
    if _NUMBER.fullmatch(text) and len(text) < 40:
        return int(text) if text.lstrip("+-").isdigit() else float(text)
    return text
