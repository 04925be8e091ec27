r"""What comes from data, files and names, as text that a terminal can be given: nothing in it acts, everything is seen.

A column may be called "\x1b]0;title\x07", a file "a\nb", a role may hold U+202E, which turns what follows around.
Python's `repr` has the right rule (what is not printable becomes an escape) and adds quotes; `shown` is without them.
"""

from __future__ import annotations

from collections.abc import Iterable

from rich.console import Console
from rich.markup import escape


def shown(value: object, *, lines: bool = False) -> str:
    r"""`str(value)` with every character that is not printable as its escape ("\x1b", "\u202e", "\ud83d").

    lines: keep line breaks and tabs, for messages of several lines.
    """
    text = str(value)
    if text.isprintable():
        return text
    kept = "\n\t" if lines else ""
    return "".join(c if c.isprintable() or c in kept else _escape(c) for c in text)


def listed(names: Iterable[object], limit: int = 5) -> str:
    """The first `limit` names, quoted, and how many more there are."""
    found = list(names)
    more = f" and {len(found) - limit} more" if len(found) > limit else ""
    return ", ".join(repr(name) for name in found[:limit]) + more


def markup(value: object) -> str:
    """`shown` for a text in which rich reads markup: brackets in it stay brackets."""
    return escape(shown(value))


def terminal(*, stderr: bool = False) -> Console:
    """The console that commands print to: no colours that depend on the text, no emoji codes, no lines broken."""
    return Console(stderr=stderr, highlight=False, emoji=False, soft_wrap=True)


def _escape(character: str) -> str:
    return ascii(character)[1:-1]
