"""Our own texts: how a question is named, and what a tap sends."""

import pytest

from wechat import show
from wxgpt import excerpt, tap_link


@pytest.mark.parametrize(
    ("text", "short"),
    [
        ("短问题", "短问题"),
        ("一二三四五六七八九十甲乙", "一二三四五六七八九十甲乙"),
        ("一二三四五六七八九十甲乙丙", "一二三四五六七八九十甲乙…"),
        ("  两行\n  问题 ", "两行 问题"),
        ("<a href=x>", "<\u200ba href=x>"),
    ],
)
def test_a_question_is_named_by_its_first_characters(text, short):
    """Twelve characters in one line, of which none can be a link."""
    assert excerpt(text) == short


def test_a_tap_sends_its_words():
    """The visible words are what may be typed instead."""
    tap = '<a href="weixin://bizmsgmenu?msgmenucontent=继续3&msgmenuid=1">继续3</a>'
    assert tap_link("继续3") == tap


@pytest.mark.parametrize(
    ("words", "content", "sent"),
    [
        ("/chatgpt", "", "/chatgpt"),
        ("重试", "重试12", "重试12"),
        ("折扣", "50%+1&2#3", "50123"),
    ],
)
def test_a_tap_survives_being_decoded_twice(words, content, sent):
    """No sign is sent that the Android client would stumble over."""
    [tap] = show(tap_link(words, content), b"").taps
    assert (tap.label, tap.content) == (words, sent)
    assert tap.menu_id
