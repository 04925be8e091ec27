"""Options without effect: refused by name, or, with `ignore_unused_options`, said in one warning and left at their
defaults."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

from fastdpo.training.options.fields import default_of, is_set
from fastdpo.training.options.kinds import OptionError, seen

logger = logging.getLogger(__name__)

T = TypeVar("T")
#: What a command collects from all of its configs; None outside of one.
_ignored: ContextVar[dict[str, str] | None] = ContextVar("ignored", default=None)


@contextmanager
def unused_ignored_together(ignore: bool) -> Iterator[None]:
    """Around the making of a command's configs: with `ignore`, options of any of them that have no effect are said in
    one warning at the end."""
    token = _ignored.set({} if ignore else None)
    try:
        yield
        warn_of_ignored(_ignored.get() or {})
    finally:
        _ignored.reset(token)


def warn_of_ignored(ignored: dict[str, str]) -> None:
    """One warning that names them all; none where there is nothing to name."""
    if ignored:
        listed = "; ".join(f"{option}: {reason}" for option, reason in ignored.items())
        logger.warning("ignore_unused_options: without effect here, and left at their defaults: %s", listed)


def without_effect(config: Any, name: str, reason: str) -> None:
    """Refuse the option `name`, which is set and does nothing, or note that it is ignored. reason: how to go on, a
    sentence.

    Raises OptionError.
    """
    together = _ignored.get()
    value = seen(getattr(config, name))
    if together is None and not getattr(config, "ignore_unused_options", False):
        raise OptionError(f"{name}={value} has no effect here: {reason}")
    (ignored_in(config) if together is None else together)[f"{name}={value}"] = reason.rstrip(".")
    ignored_in(config)[f"{name}={value}"] = reason.rstrip(".")


def ignored_in(config: Any) -> dict[str, str]:
    """Option=value → why it was ignored, of a config."""
    found: dict[str, str] = vars(config).setdefault("ignored", {})
    return found


def is_collecting() -> bool:
    """Whether a command says what is ignored, rather than each config."""
    return _ignored.get() is not None


def check_conditions(config: Any, met: set[str], conditions: tuple[tuple[tuple[str, ...], str, str], ...]) -> None:
    """Refuse or note an option that was changed but acts only under a condition that is not in `met`."""
    for names, condition, advice in conditions:
        for name in names:
            if is_set(config, name) and not met & {name, condition}:
                without_effect(config, name, advice)


def effective(config: T) -> T:
    """A copy with the ignored options at their defaults."""
    found = copy.copy(config)
    for option in ignored_in(config):
        name = option.partition("=")[0]
        setattr(found, name, default_of(found, name))
    return found
