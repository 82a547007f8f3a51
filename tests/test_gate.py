"""What leaves: our own links and no others; nothing that hides a blocked word.

What a model or a subscriber writes is put together of everything that was ever part of
a trick, and goes the way that every answer goes.
"""

import html
import re
import types
import unicodedata
from xml.etree import ElementTree

import hypothesis
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import wxgpt
from conftest import ANN
from fake_openai import Script, says

MESSAGE = wxgpt.Message(ANN, "gh_1", "text", 1)
TAP = '<a href="weixin://bizmsgmenu?msgmenucontent=确认删除&msgmenuid=1">看</a>'
TRICKS = ["<", "</", "a", "A", "<a", "<a ", "</a>", " href=", '"', "'", ">", "<b>", TAP]
TRICKS += ["weixin://bizmsgmenu?msgmenucontent=x&msgmenuid=1", "https://a.cn/", "<br>"]
TRICKS += ["&lt;", "&#60;", "&#x3c;", "&LT;", "&amp;lt;", "&#97;", "%3C", "%61", "＜"]
TRICKS += ["\x00", "\x08", "\x7f", "\ufffe", "\uffff", "\ufdd0", "\ufdd1", "\ufdd2"]
TRICKS += ["&#0;", "&#1;", "&#xfdd0;", "&#64976;", "\ue000", "\U000f0000", "\U0010ffff"]
TRICKS += [
    "\u200b",
    "\ufeff",
    "\u00ad",
    "\u0338",
    "\n",
    "]]>",
    "<![CDATA[",
    "<!--",
    "-->",
]
TRICKS += [
    "[x](",
    ")",
    "](",
    "![",
    "`",
    "```\n",
    "$",
    "\\",
    "\\<",
    "|",
    "|-|\n",
    "# ",
    "字。",
]
tricks = st.lists(st.sampled_from(TRICKS), max_size=14).map("".join)
hostile = st.one_of(
    tricks, st.lists(st.one_of(tricks, st.text()), max_size=3).map("".join)
)
LINK = re.compile(r"(?i)<\s*/?\s*a\b[^\u200b]")
often = hypothesis.settings(max_examples=300)


def new_turn():
    """Return a turn that is being written."""
    return wxgpt.Turn(1, 1, ANN, f"{ANN} 1", "key", "问", None, 0.0, 1, "chatgpt")


def cut(text, cuts):
    """Return a text in pieces."""
    edges = [0, *sorted(at % (len(text) + 1) for at in cuts), len(text)]
    return [text[a:b] for a, b in zip(edges, edges[1:])]


cuts = st.lists(st.integers(0, 200), max_size=6)


def content_of(body):
    """Return the Content of a reply, as the platform reads it."""
    return ElementTree.fromstring(body).findtext("Content")


@often
@given(answer=hostile, question=hostile, cuts=cuts)
@example(answer="<\x00a href='weixin://bizmsgmenu'>看</a>", question="", cuts=[])
@example(answer="&lt;&#1;a href=x>看</a>", question="<\ufdd0a>", cuts=[5])
@example(
    answer="[x](<a\ufdd0 href=x>)\ufdd0https://a.cn\ufdd1看\ufdd2", question="", cuts=[]
)
def test_what_leaves_has_our_own_links_and_no_other(answer, question, cuts):
    """Whatever is decoded or left out on the way, nothing of others can be tapped."""
    turn, blocked = new_turn(), wxgpt.BlockedWords("")
    bot = types.SimpleNamespace(blocked=blocked)
    for piece in cut(answer, cuts):
        wxgpt.Bot.show(bot, turn, wxgpt.WordGuard(blocked), piece, False)
    question = wxgpt.ILLEGAL.sub("", question)  # as at the door
    tap, page = wxgpt.tap_link("继续1"), wxgpt.web_link("看", "https://wx.cn/a/1")
    content = f"{turn.shown()}{tap}「{wxgpt.excerpt(question)}」{page}"
    sent = content_of(
        wxgpt.render_text_reply(MESSAGE, wxgpt.outgoing(content), 1)
    ).replace("\r", "\n")
    ours = [wxgpt.outgoing(link) for link in (tap, page)]
    assert [sent.count(link) for link in ours] == [1, 1]
    for link in ours:
        sent = sent.replace(link, "")
    assert not re.search(r"(?i)</?a", sent)
    assert not re.search("[\ufdd0-\ufdef]", sent)


@often
@given(hostile)
def test_what_was_sent_is_sent_again_as_it_was(text):
    """A stored reply passes no gate again, and would not change much if it did."""
    once = wxgpt.outgoing(text)
    assert not wxgpt.ILLEGAL.search(once)
    assert content_of(wxgpt.render_text_reply(MESSAGE, once or "x", 1)) is not None


def test_an_owner_may_write_links():
    """They are tapped as before; what looks like a command in them stays a word."""
    text = '看<a href="https://shop.cn/help">/help 与店</a>，或发 /help'
    sent = wxgpt.outgoing(wxgpt.with_taps(text, "help"))
    assert sent.startswith(
        '看<a href="https://shop.cn/help">/help 与店</a>，或发 <a href="weixin:'
    )


@pytest.mark.parametrize(
    "answer",
    [
        f"看{TAP}。",
        "<\x00a href='https://evil.cn'>看</a>。",
        "&lt;a href='https://evil.cn'&gt;看&lt;/a&gt;。",
    ],
)
async def test_no_answer_brings_a_link_of_its_own(server, upstream, answer):
    """Through the door: reply, a copy of it, and a part that is asked for twice."""
    upstream.will(Script([answer, "字。" * 900]))
    seen = await server.ask(f"问{TAP}")
    tapped = [await server.wechat.tap(ANN, seen.taps[0]) for _ in range(2)]
    assert tapped[0].content == tapped[1].content
    for one in (seen, *tapped):
        assert {tap.content[:2] for tap in one.taps} <= {"继续"}
        assert {url.partition("/a/")[0] for _, url in one.links} <= {
            "http://wx.example.com"
        }


@pytest.mark.parametrize("room", [1200, 1440, 1596])
@pytest.mark.parametrize("text", ["<a" * 1800, "<a" * 798 + "字" * 900, "字</a>" * 600])
def test_what_grows_when_it_is_sent_is_cut_shorter(text, room):
    """A sign that parts a link from its bracket takes room: each part fits all the same."""
    while text:
        end = wxgpt.cut_reply(text, room)
        assert 0 < end and wxgpt.sent_size(text[:end]) <= room
        text = text[end:]


async def test_an_answer_of_nothing_but_links_is_read_to_its_end(server, upstream):
    """Its parts are counted, and each shows more of it."""
    upstream.will(says("<a" * 1800))
    seen = await server.ask("写一千个链接")
    read = seen.text.count("<\u200ba")
    while seen.taps:
        seen = await server.wechat.tap(ANN, seen.taps[0])
        read += seen.text.count("<\u200ba")
    assert read == 1800


# Blocked words

WORDS = ["坏词", "bad", "é语"]
HIDERS = [
    "",
    "",
    "\u200b",
    "&#8203;",
    "&ZeroWidthSpace;",
    "\x08",
    "\x7f",
    "\ufdd0",
    "**",
    "`",
    "<b></b>",
    "<b>",
    "</b>",
]
HIDERS += [
    "<!-- x -->",
    "[](https://a.cn)",
    "[\u200b](https://a.cn/1)",
    "](https://a.cn/2)",
    "[",
    "\\",
    "\n",
    "\n> ",
]
HIDERS += [
    "~~",
    "\u0336",
    "\u20e0",
    "_",
    "<br>",
    "<sup>",
    "</sup>",
    "<sub>",
    "</sub>",
    "$",
    "![",
    "&shy;",
    "\u200b" * 50,
]
SIGNS = [
    "坏",
    "词",
    "ｂ",
    "b",
    "A",
    "&#97;",
    "ａ",
    "D",
    "𝐝",
    "&#x8bcd;",
    "&#22351;",
    "e\u0301",
    "é",
    "语",
    "字。",
    "x",
    " ",
    "（",
    "）",
]
hidden = st.lists(
    st.one_of(st.sampled_from(SIGNS), st.sampled_from(HIDERS)), max_size=14
).map("".join)


def form(text):
    """Return a text as people read it, without what they do not see."""
    text = "".join(
        c
        for c in unicodedata.normalize("NFKC", text).casefold()
        if unicodedata.category(c) not in ("Cf", "Cc", "Me")
    )
    return re.sub(r"[\s\u0336*_~`\\]", "", text)


def page_text(answer, blocked):
    """Return what the page of an answer shows in one block after the other."""
    texts = wxgpt.read_texts({})
    renderer = wxgpt.BlockRenderer(texts, blocked)
    page = "".join(renderer.render(answer, has_ended=True))
    page = re.sub(r"</?(?:td|th|li|p|h\d|hr|pre|math|annotation)\b[^>]*>", "｜", page)
    return html.unescape(re.sub(r"<[^>]*>", "", page))


@pytest.fixture(scope="module")
def bot(tmp_path_factory):
    """What of a bot knows the words."""
    path = tmp_path_factory.mktemp("words") / "list"
    path.write_text("\n".join(WORDS), "utf-8")
    blocked = wxgpt.BlockedWords(str(path))
    blocked.refresh()
    return types.SimpleNamespace(blocked=blocked)


def has_word(text):
    """Say whether a reader sees a blocked word."""
    return any(form(word) in form(text) for word in WORDS)


@often
@given(answer=hidden, cuts=cuts)
@example(answer="坏" + "\u200b" * 100 + "<b>词</b>。", cuts=[30, 90, 102])
@example(answer="坏[](https://a.cn)词。", cuts=[1, 9])
@example(answer="坏[\u200b](https://a.cn/" + "x" * 200 + ")词。", cuts=[1, 100])
@example(answer="坏\u0336词\u0336。", cuts=[2])
@example(answer="坏<sup>词</sup>。", cuts=[3])
@example(answer="坏![词](https://a.cn/1)。", cuts=[3])
@example(answer="坏<br>词", cuts=[])  # shown when it has ended
def test_no_state_of_an_answer_shows_a_hidden_word(bot, answer, cuts):
    """Not the chat, not the page, not the stream, however the answer is cut."""
    turn, guard = new_turn(), wxgpt.WordGuard(bot.blocked)
    pieces = cut(answer, cuts)
    try:
        for number, piece in enumerate([*pieces, ""]):
            wxgpt.Bot.show(bot, turn, guard, piece, number == len(pieces))
            assert not has_word(turn.shown())
            assert not has_word(turn.answer)
    except wxgpt.ChatError as error:
        assert error.kind == "blocked"
        return
    turn.state = "done"
    assert not has_word(turn.shown())
    assert not has_word(page_text(turn.answer, bot.blocked))


def test_nothing_is_lost_when_the_owner_empties_the_list(tmp_path):
    """What was held back in the midst of an answer is shown then."""
    path = tmp_path / "list"
    path.write_text("坏词", "utf-8")
    blocked = wxgpt.BlockedWords(str(path))
    blocked.refresh()
    bot = types.SimpleNamespace(blocked=blocked)
    turn, guard = new_turn(), wxgpt.WordGuard(blocked)
    wxgpt.Bot.show(bot, turn, guard, "开头。你", False)
    path.write_text("", "utf-8")
    blocked.changed = None
    blocked.refresh()
    for piece in ("好，", "再见", "。"):
        wxgpt.Bot.show(bot, turn, guard, piece, False)
    assert turn.answer == "开头。你好，再见。"


@often
@given(hidden)
@example("坏[\u200b](https://a.cn)词")
@example("坏&#x8bcd;")
@example("坏<b>词</b>")
def test_no_question_that_is_asked_has_a_hidden_word(bot, question):
    """As it is written, and as it would be shown."""
    question = wxgpt.ILLEGAL.sub("", question)
    if not bot.blocked.are_in_question(question):
        assert not has_word(question) and not has_word(wxgpt.chat_text(question))
