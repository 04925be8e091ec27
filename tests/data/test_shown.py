"""Text that a terminal is given."""

from __future__ import annotations

import unicodedata

from hypothesis import given
from hypothesis import strategies as st

from fastdpo.shown import listed, shown


@given(st.text(st.characters(categories=("Cc", "Cf", "Cs", "Lu", "Zs", "Zl", "So"))))
def test_what_is_shown_holds_nothing_that_acts(text: str) -> None:
    """No control, format or surrogate character, no separator but the space; printable text is left as it is."""
    kinds = {unicodedata.category(each) for each in shown(text)}
    assert not kinds & {"Cc", "Cf", "Cs", "Zl", "Zp"}
    shown(text).encode()
    if text.isprintable():
        assert shown(text) == text


def test_examples() -> None:
    assert shown("note\x1b[2J\u202ecalm\ud83d é海") == r"note\x1b[2J\u202ecalm\ud83d é海"
    assert shown("two\nlines\r\x07") == r"two\nlines\r\x07"
    assert shown("two\nlines\r", lines=True) == "two\nlines\\r"
    assert listed(["a\x1b", "b"]) == r"'a\x1b', 'b'"
    assert listed(range(7), limit=2) == "0, 1 and 5 more"
