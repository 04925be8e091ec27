"""What a function that takes options as `**named` shows of them: each with its default, in signature and docs.

In: an options dataclass whose fields say what they are (`about`). Out: the function itself, not a wrapper, which
torch.compile would have to trace through.
"""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Callable, Collection, Mapping
from dataclasses import MISSING, Field, fields
from typing import Any, TypeVar

_Function = TypeVar("_Function", bound=Callable[..., Any])
_Class = TypeVar("_Class", bound=type)


def about(help: str, note: str = "", choices: Collection[str] = ()) -> dict[str, Any]:
    """What a field is, as its metadata. `help` is read on the command line too, `note` in Python only."""
    return {"help": help, "note": note} | ({"choices": list(choices)} if choices else {})


def options_of(options: type) -> dict[str, Field[Any]]:
    """name → field, of the options that a caller gives by keyword."""
    return {each.name: each for each in fields(options) if each.init and each.default is not MISSING}


def shows_options(
    options: type, parameters: Mapping[str, str], *, without: Collection[str] = ()
) -> Callable[[_Function], _Function]:
    """Put the fields of `options` in the place of `**named`, in the function's signature and under its docs.

    parameters: further keywords by name, with what they are: they stay `**loss_parameters` in the signature.
    without: fields that the function does not take. Those that it names itself stay where they are.
    """

    def decorate(function: _Function) -> _Function:
        signature = inspect.signature(function)
        own = {name: each for name, each in signature.parameters.items() if name != "named"}
        shown = {name: each for name, each in options_of(options).items() if name not in without}
        keywords = [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=each.default, annotation=each.type)
            for name, each in shown.items()
            if name not in own
        ]
        rest = inspect.Parameter("loss_parameters", inspect.Parameter.VAR_KEYWORD, annotation="float")
        function.__signature__ = signature.replace(parameters=[*own.values(), *keywords, rest])  # type: ignore[attr-defined]
        del function.__annotations__["named"]  # a name that is there for type checkers only
        lines = {f"{name}={each.default!r}": _text(each) for name, each in shown.items()}
        title = f"Options, by keyword or together as `options`, a `{options.__name__}`:"
        _append(function, title, lines | dict(parameters))
        return function

    return decorate


def documents_options(options: type) -> Callable[[_Class], _Class]:
    """Append the docs of `options` to those of a class whose constructor takes them."""

    def decorate(cls: _Class) -> _Class:
        _append(cls, "Options:", {name: _text(each) for name, each in options_of(options).items()})
        return cls

    return decorate


def _text(each: Field[Any]) -> str:
    choices = each.metadata.get("choices", ())
    accepted = f"One of {', '.join(choices)}." if choices else ""
    return " ".join(filter(None, (each.metadata["help"], accepted, each.metadata["note"])))


def _append(target: Any, title: str, lines: Mapping[str, str]) -> None:
    if target.__doc__ is None and inspect.isclass(target):
        return  # python -OO
    entries = (
        textwrap.fill(f"{name}: {text}", 110, initial_indent="    ", subsequent_indent="        ")
        for name, text in lines.items()
    )
    target.__doc__ = "\n\n".join(filter(None, (inspect.cleandoc(target.__doc__ or ""), "\n".join((title, *entries)))))
