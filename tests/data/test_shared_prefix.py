"""The prompt that two plain texts share, in scripts with and without spaces; graphemes and words stay whole."""

from __future__ import annotations

import unicodedata

import pytest
import regex
from hypothesis import example, given
from hypothesis import strategies as st

from fastdpo.data.shared_prefix import split_text

ASTRONAUT, FAMILY = "\U0001f469\u200d\U0001f680", "\U0001f469\u200d\U0001f469\u200d\U0001f466"
FRANCE, GERMANY, DENMARK = "\U0001f1eb\U0001f1f7", "\U0001f1e9\U0001f1ea", "\U0001f1e9\U0001f1f0"


@pytest.mark.parametrize(
    ("chosen", "rejected", "prompt"),
    [
        ("问：海是什么颜色？答：蓝色", "问：海是什么颜色？答：红色", "问：海是什么颜色？答："),
        ("海は青い", "海は赤い", "海は"),
        ("カレー", "カレイ", "カレ"),
        ("ทะเลสีฟ้า", "ทะเลสีแดง", "ทะเลสี"),
        ("သမုဒ္ဒရာအပြာ", "သမုဒ္ဒရာအနီ", "သမုဒ္ဒရာအ"),
        # Korean has spaces, and so do words of Latin letters and of digits, within Chinese too.
        ("하늘은 파랗다", "하늘은 파랑", "하늘은"),
        ("答案是Mars", "答案是Mare", "答案是"),
        ("答案是ＡＢ", "答案是ＡＣ", "答案是"),
        ("答案是12", "答案是13", "答案是"),
        ("答：yes", "答：no", "答："),
        ("答案", "答案是", "答案"),
        ("abc 海", "abc海", "abc"),
        # か with a voicing mark of its own is another letter than か.
        ("海か\u3099青い", "海か青い", "海"),
        ("海か\u3099青", "海か\u3099赤", "海か\u3099"),
        # Emoji of several code points, flags of two, an accent, and a line end of two.
        (f"ok {ASTRONAUT}", f"ok {FAMILY}", "ok"),
        (f"海{ASTRONAUT}", f"海{FAMILY}", "海"),
        (f"海{FRANCE}{GERMANY}", f"海{FRANCE}{DENMARK}", f"海{FRANCE}"),
        ("cafe\u0301 noir", "cafe noir", ""),
        ("so\r\nyes", "so\rno", "so"),
        ("so\r\nyes", "so\r\nno", "so\r\n"),
    ],
)
def test_prompts_of_every_script(chosen, rejected, prompt):
    assert split_text(chosen, rejected) == (prompt, chosen[len(prompt) :], rejected[len(prompt) :])


text = st.text(
    st.sampled_from(
        ["a", "b", "é", "e", "\u0301", "海", "青", "か", "\u3099", "ท", "ะ", "ี", "한", "\u1112", "\u1161", " ", "\n"]
    )
    | st.sampled_from(
        ["\r", "\u200d", "\U0001f469", "\U0001f680", "\U0001f1eb", "\U0001f1f7", "\ufe0f", "：", "。", "1", "\u0600"]
    ),
    max_size=8,
)


def is_latin(character: str) -> bool:
    return unicodedata.name(character, "").startswith("LATIN ")


@given(text, text, text)
@example("a", "\u0301", "b")
def test_a_split_restores_both_texts_and_cuts_no_grapheme(shared, first, second):
    chosen, rejected = shared + first, shared + second
    prompt, *rest = split_text(chosen, rejected)
    assert [prompt + part for part in rest] == [chosen, rejected]
    assert split_text(rejected, chosen).prompt == prompt
    for whole in (chosen, rejected):
        graphemes = regex.findall(r"\X", whole)
        assert len(prompt) in {len("".join(graphemes[:count])) for count in range(len(graphemes) + 1)}
        inside = prompt and len(prompt) < len(whole)
        assert not (inside and is_latin(prompt[-1]) and is_latin(whole[len(prompt)]))
