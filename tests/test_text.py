"""Our own texts: how a question is named, what a tap sends, and where each is used."""

import ast
import re
import tomllib

import pytest

from conftest import ROOT
from wechat import show
from wxgpt import Texts, excerpt, outgoing, tap_link

SOURCE = (ROOT / "wxgpt.py").read_text("utf-8")
LINES = tomllib.loads((ROOT / "texts.toml").read_text("utf-8"))
FAILED = "failed_"  # before the reason why a question failed


def names_used():
    """Return the names of texts that the server and its pages read, but for failures."""
    attributes = [
        x for x in ast.walk(ast.parse(SOURCE)) if isinstance(x, ast.Attribute)
    ]
    owners = {
        x: getattr(x.value, "attr", getattr(x.value, "id", "")) for x in attributes
    }
    found = {x.attr for x, owner in owners.items() if owner == "texts"}
    for page in (ROOT / "pages").iterdir():
        found |= set(re.findall(r"\btexts\.(\w+)", page.read_text("utf-8")))
    return found - {"append", "items"}  # of a list and a dict with the same name


def test_each_text_that_is_used_is_there_and_the_other_way_round():
    """No type checker sees the names of texts.toml."""
    assert names_used() == {name for name in LINES if not name.startswith(FAILED)}


def test_each_failure_has_a_text_and_the_other_way_round():
    """The reasons are the kinds of errors, and what ends an answer otherwise."""
    raised = set(re.findall(r'ChatError\(\s*"(\w+)"', SOURCE))
    reasons = {name.removeprefix(FAILED) for name in LINES if name.startswith(FAILED)}
    assert raised - {"blocked"} <= reasons  # a blocked answer did not fail
    assert {reason for reason in reasons if f'"{reason}"' not in SOURCE} == set()


def test_a_text_cannot_be_changed_while_the_server_runs():
    """A name that is not there is an error, too."""
    texts = Texts({"opened": "你好"})
    assert texts.opened == "你好"
    with pytest.raises(AttributeError):
        texts.opened = "再见"
    with pytest.raises(AttributeError, match="no text is named hello"):
        _ = texts.hello


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
    assert outgoing(excerpt(text)) == short


def test_a_tap_sends_its_words():
    """The visible words are what may be typed instead."""
    tap = '<a href="weixin://bizmsgmenu?msgmenucontent=继续3&msgmenuid=1">继续3</a>'
    assert outgoing(tap_link("继续3")) == tap


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
    [tap] = show(outgoing(tap_link(words, content)), b"").taps
    assert (tap.label, tap.content) == (words, sent)
    assert tap.menu_id
