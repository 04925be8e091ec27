"""Deprecated names of transformers and peft are an error where our code uses one, whatever is installed."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

#: A library that warns, and two through which it is called: by a function, and as an attribute that is handed on.
LIBRARY = "import warnings\ndef old(): warnings.warn('old is deprecated', FutureWarning)"
CALLS = "def call(function): function()"
HANDS_ON = "class Wrapper:\n  def __getattr__(self, name): return library.old()"


def module(name: str, code: str, **known: Any) -> SimpleNamespace:
    names: dict[str, Any] = {"__name__": name, **known}
    exec(compile(code, f"/site-packages/{name}.py", "exec"), names)
    return SimpleNamespace(**names)


def test_a_deprecated_name_is_an_error_in_our_code_alone() -> None:
    library = module("transformers.models", LIBRARY)
    with pytest.raises(FutureWarning, match=r"old is deprecated \(called in .*test_deprecations.py\)"):
        library.old()
    with pytest.raises(FutureWarning, match=r"called in .*test_deprecations.py"):
        module("peft.tuners", HANDS_ON, library=library).Wrapper().anything  # noqa: B018
    with pytest.warns(FutureWarning, match="^old is deprecated$"):
        module("peft.model", CALLS).call(library.old)
    with pytest.warns(FutureWarning, match="^old is deprecated$"):
        module("numpy.old", LIBRARY).old()
