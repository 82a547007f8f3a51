"""Blocked words: refused in questions, never visible in answers, wherever they are cut.

Words are compared after NFKC and case folding, without white space, zero-width
characters and markup.
"""

import asyncio
import html
import os
import re
import subprocess
import sys
import unicodedata

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import wxgpt
from conftest import ANN, BOB, LONG, ROOT, toml, with_session
from fake_openai import Script, says
from wechat import FAULT

WORDS = "# 不许说的\n坏词\n\n  Bad Word  \n#也是注释\nCafé\n한국\n"
REFUSED = "这个问题里有不便讨论的内容，换个说法试试吧。"
WITHHELD = "（后面的内容不便显示）"
FIRST = "第一句。这里还有几个字，"  # more than is held back for the longest word
VARIANTS = [
    "坏词",
    "一个坏词在中间",
    "坏 词",
    "坏\u3000\n\t词",
    "坏\u200b\u200c\u2060\ufeff词",
    "坏\ufe0f词",
    "坏\u00ad\u2063\u034f\u180e词",
    "坏**词**",
    "**坏**_词_",
    "坏~~词~~",
    "坏`词`",
    "坏\\*词",
    "BADWORD",
    "bad\nword",
    "ｂａｄ ｗｏｒｄ",
    "𝐛𝐚𝐝𝒘𝒐𝒓𝒅",
    "b*a*d_word",
    "CAFÉ",
    "cafe\u0301",
    "ＣＡＦＥ\u0301",
    "한국",
    unicodedata.normalize("NFD", "한국"),
]
HARMLESS = [
    "坏的词",
    "词坏",
    "bad. word",
    "cafe",
    "caf",
    "#",
    "不许说的",
    "也是注释",
    "한",
]


@pytest.fixture
def words_file(tmp_path):
    """The list of blocked words."""
    path = tmp_path / "words.txt"
    path.write_text(WORDS, "utf-8")
    return path


@pytest.fixture
def blocked(words_file):
    """The words, as the server reads them."""
    blocked = wxgpt.BlockedWords(str(words_file))
    blocked.refresh()
    return blocked


@pytest.fixture
def changes(words_file):
    """The server has blocked words."""
    return {"limits": {"blocked_words": str(words_file)}}


def rewrite(path, text):
    """Write the list anew, at a time that is surely another."""
    before = os.stat(path).st_mtime_ns if path.exists() else 0
    path.write_text(text, "utf-8")
    os.utime(path, ns=(before + 10**9, before + 10**9))


# Questions


@pytest.mark.parametrize("text", VARIANTS, ids=ascii)
def test_a_blocked_word_is_found_in_any_spelling(blocked, text):
    """White space, invisible characters, markup, case and width do not hide it."""
    assert blocked.are_in(text)


@pytest.mark.parametrize("text", HARMLESS, ids=ascii)
def test_what_is_no_blocked_word_is_not_found(blocked, text):
    """Parts of words, comments and other characters in between block nothing."""
    assert not blocked.are_in(text)


@pytest.mark.parametrize("text", VARIANTS[:4], ids=ascii)
async def test_a_question_with_a_blocked_word_is_refused(server, upstream, text):
    """In any spelling, without a call."""
    assert (await server.ask(text)).text == REFUSED
    assert upstream.requests == []


async def test_a_question_without_one_is_asked(server, upstream):
    """As it is written, though it may look like one."""
    for text in HARMLESS:
        assert REFUSED not in (await server.ask(text)).text
    assert [asked.question for asked in upstream.requests] == HARMLESS


async def test_a_blocked_word_behind_a_command_is_refused(server, upstream):
    """Opening with a question is asking it."""
    assert (await server.ask("/chatgpt 坏词", BOB)).text.startswith(REFUSED)
    assert upstream.requests == []


async def test_a_refused_question_is_not_stored(server, words_file, settings):
    """Neither in history nor in the context of the next."""
    await server.ask("坏词XYZZY")
    link = (await server.ask("/history")).links[0][1]
    assert "XYZZY" not in (await server.get(link))[1]


async def test_a_late_text_with_a_blocked_word_is_refused_when_it_is_asked(
    serve, words_file, upstream
):
    """接着问 is asking, too."""
    limits = {"blocked_words": str(words_file)}
    server = await with_session(serve, limits=limits, session={"ttl": 1})
    await asyncio.sleep(1.1)
    seen = await server.ask("坏词")
    assert (await server.wechat.tap(ANN, seen.taps[0])).text == REFUSED
    assert upstream.requests == []


# Answers


async def test_an_answer_with_a_blocked_word_is_withheld(server, upstream):
    """Nothing of it was sent: the subscriber reads that it is not shown."""
    upstream.will(says("这里有个坏词，还有别的。"))
    assert (await server.ask("说点什么")).text == WITHHELD


def pieces_of(text, size):
    """Cut a text into pieces of so many characters."""
    return [text[at : at + size] for at in range(0, len(text), size)]


@pytest.mark.parametrize("text", VARIANTS, ids=ascii)
@pytest.mark.parametrize("size", [1, 3])
def test_a_word_is_seen_across_the_borders_of_a_stream(blocked, text, size):
    """However the model cuts it, nothing of it is let through before it is seen."""
    pieces = pieces_of(f"开头。{text}结尾。", size)
    *_, (seen, is_blocked) = shown(wxgpt.WordGuard(blocked), pieces)
    assert is_blocked and "开头。".startswith(seen)


@pytest.mark.parametrize("text", HARMLESS, ids=ascii)
def test_a_harmless_stream_is_whole(blocked, text):
    """What was held back comes at the end, unchanged."""
    *_, last = shown(wxgpt.WordGuard(blocked), list(f"开头。{text}"))
    assert last == (f"开头。{text}", False)


@pytest.mark.parametrize("text", VARIANTS[2:5], ids=ascii)
@pytest.mark.parametrize("size", [1, 3])
async def test_an_answer_with_a_word_across_its_pieces_is_withheld(
    server, upstream, text, size
):
    """One to three characters at a time, the subscriber reads none of it."""
    upstream.will(Script(pieces_of(f"开头。{text}结尾。", size)))
    assert (await server.ask("说点什么")).text == WITHHELD


async def test_a_harmless_answer_is_whole(server, upstream):
    """Every character of it reaches the subscriber."""
    for text in HARMLESS:
        upstream.will(Script(list(f"开头。{text}")))
        assert (await server.ask("说点什么")).text == f"开头。{text}\n（AI 生成）"


async def test_an_invisible_control_character_hides_no_word(server, upstream):
    """It is left out of the answer, so it is left out of the comparison."""
    upstream.will(says("坏\x08词"))
    assert (await server.ask("说点什么")).text == WITHHELD


async def test_the_call_is_closed(server, upstream):
    """No token is paid for behind the word."""
    gate = asyncio.Event()
    upstream.will(Script(["有个坏词。", gate, "后面很长。"]))
    await server.ask("说点什么")
    await upstream.requests[0].wait_over()
    assert upstream.requests[0].outcome == "cut by client"
    assert len(upstream.requests) == 1


async def test_what_was_sent_stays_and_the_next_part_says_so(server, upstream):
    """The first part was read before the word came; 继续 brings only the notice."""
    gate = asyncio.Event()
    upstream.will(Script([LONG, gate, "坏词。", LONG]))
    first = await server.ask("写长文")
    assert first.text.startswith("第0句") and first.attempt == 1
    gate.set()
    await upstream.requests[0].wait_over()
    assert (await server.wechat.tap(ANN, first.taps[0])).text == WITHHELD
    assert (await server.wechat.tap(ANN, first.taps[0])).text == WITHHELD


async def test_a_part_that_waits_says_so_at_once(server, upstream):
    """Who tapped before the word came is answered when it comes."""
    gate = asyncio.Event()
    upstream.will(Script([FIRST, gate, "第二句。坏词。"]))
    first = await server.ask("说三句")
    tapping = asyncio.create_task(server.wechat.tap(ANN, first.taps[0]))
    await server.get(server.url + "/healthz")
    gate.set()
    seen = await tapping
    assert first.text.startswith("第一句。") and seen.text == WITHHELD


async def test_page_and_history_show_what_was_sent_only(server, upstream):
    """Unsent text before the word is withheld there as well."""
    gate = asyncio.Event()
    upstream.will(Script([FIRST, gate, "第二句。坏词。第三句。"]))
    first = await server.ask("说三句")
    gate.set()
    await upstream.requests[0].wait_over()
    links = [first.links[0][1], (await server.ask("/history")).links[0][1]]
    for link in links:
        page = (await server.get(link))[1]
        assert "第一句。" in page and WITHHELD in page
        assert not re.search("第二句|坏词|第三句", page)


async def test_a_live_page_never_shows_the_word(server, upstream):
    """The stream holds back enough, starts over when the rest is withheld, and ends."""
    gate, end = asyncio.Event(), asyncio.Event()
    upstream.will(Script([FIRST + "坏", gate, "词。", end]))
    link = (await server.ask("说点什么")).links[0][1]
    async with server.open(link + "/events") as events:
        begin = await events.content.readuntil(b"\n\n")
        gate.set()
        rest = await events.content.read()
    assert "第一句。" in begin.decode() and "坏" not in begin.decode()
    assert "坏" not in rest.decode() and "词" not in rest.decode()
    assert '"state": "blocked"' in rest.decode()


@pytest.mark.parametrize("mark", ["**", "[", "$"])
async def test_a_live_page_never_shows_the_word_behind_an_open_mark(
    server, upstream, mark
):
    """The chat does not show yet what a mark may change; on the page it would be text."""
    gate = asyncio.Event()
    late = f"{mark}这里 [坏](https://a.cn/)词，又写了十来个字还没写到头，"
    upstream.will(Script([f"{FIRST}写完一段。\n\n{late}", gate, f"{mark}。\n"]))
    link = (await server.ask("说点什么")).links[0][1]
    async with server.open(link + "/events") as events:
        begin = (await events.content.readuntil(b"\n\n")).decode()
        gate.set()
        rest = (await events.content.read()).decode()
    assert "写完一段。" in begin and "坏" not in begin + rest


async def test_a_live_page_takes_back_what_was_not_sent(server, upstream):
    """Text behind the sent part disappears from the page."""
    gate, late = asyncio.Event(), asyncio.Event()
    upstream.will(Script([FIRST, gate, "第二句说来话长，还没完。", late, "坏词。"]))
    link = (await server.ask("说点什么")).links[0][1]
    async with server.open(link + "/events") as events:
        gate.set()
        await events.content.readuntil("第二句".encode())
        late.set()
        rest = (await events.content.read()).decode()
    _, _, after = rest.partition('"keep": 0, "html": []')
    assert "第一句。" in after and "第二句" not in after and "坏" not in after


async def test_a_withheld_answer_is_not_context(server, upstream):
    """Neither its question nor what was sent of it goes to the model again."""
    upstream.will(says("有个坏词。"))
    await server.ask("说点什么")
    await server.ask("说别的")
    assert "说点什么" not in str(upstream.requests[1].messages)
    assert "坏" not in str(upstream.requests[1].messages)


async def test_the_words_are_not_in_the_database(server, upstream, settings):
    """What is withheld is not stored, and the question may be."""
    upstream.will(says("第一句XYZZY。坏词。"))
    await server.ask("说点什么")
    await server.ask("/help")
    with open(settings["database"]["path"] + "-wal", "rb") as wal:
        content = wal.read()
    assert "说点什么".encode() in content
    assert "坏词".encode() not in content and b"XYZZY" not in content


async def test_the_owner_reads_that_an_answer_was_stopped(server, upstream, caplog):
    """A line in the log, without the word."""
    upstream.will(says("有个坏词。"))
    await server.ask("说点什么")
    assert "failed: blocked: a blocked word in the answer" in caplog.text
    assert "坏词" not in caplog.text


async def test_a_stopped_answer_is_not_asked_again(server, upstream):
    """The same model would say it again."""
    upstream.will(says("有个坏词。"), says("这次没有。"))
    assert (await server.ask("说点什么")).taps == ()
    assert len(upstream.requests) == 1


async def test_an_answer_that_does_not_stream_is_looked_through(server, upstream):
    """One JSON body is no way around."""
    upstream.will(says("这里有个坏词。", streamed=False))
    assert (await server.ask("说点什么")).text == WITHHELD


async def test_an_answer_after_a_kill_is_looked_through(spawn, words_file, upstream):
    """The next process knows the list as well."""
    server, process = await spawn(limits={"blocked_words": str(words_file)})
    gate = asyncio.Event()
    upstream.will(Script(["坏", gate]), says("又是坏词。"))
    push = server.wechat.text(ANN, "/chatgpt 说点什么")
    assert await server.wechat.attempt(push) is None
    await process.kill()
    await process.start()
    assert (await server.wechat.deliver(push)).text.startswith(WITHHELD)
    gate.set()


# The file


@pytest.mark.parametrize("text", ["", "\n\n", "# 坏词\n", "***\n \u200b\n"], ids=ascii)
async def test_a_list_without_words_blocks_nothing(serve, words_file, upstream, text):
    """An empty file, comments and lines of nothing comparable."""
    words_file.write_text(text, "utf-8")
    server = await serve(limits={"blocked_words": str(words_file)})
    upstream.will(says("坏词没事。"))
    assert (await server.ask("/chatgpt 坏词")).text.startswith("坏词没事。")


async def test_without_a_list_nothing_is_held_back(serve, upstream):
    """A live page has each character as soon as it is written."""
    server, gate = await serve(), asyncio.Event()
    upstream.will(Script(["坏词", gate]))
    link = (await server.ask("/chatgpt 你好")).links[0][1]
    async with server.open(link + "/events") as events:
        assert "坏词" in (await events.content.readuntil(b"\n\n")).decode()
    gate.set()


async def test_a_changed_list_is_read_while_running(server, words_file, caplog):
    """The next question is compared with the new words."""
    caplog.set_level("INFO", "wxgpt")
    rewrite(words_file, "新词\n")
    assert (await server.ask("新词")).text == REFUSED
    assert (await server.ask("坏词")).text != REFUSED
    assert "1 blocked words read" in caplog.text


async def test_an_older_file_put_in_its_place_is_read(server, words_file):
    """Any other time counts as changed, not only a newer one."""
    words_file.write_text("新词\n", "utf-8")
    os.utime(words_file, (1000, 1000))
    assert (await server.ask("新词")).text == REFUSED


async def test_a_vanished_list_stays_in_force(server, words_file, upstream, caplog):
    """Questions and answers are compared with the last words; the owner is told."""
    words_file.unlink()
    assert (await server.ask("坏词")).text == REFUSED
    upstream.will(says("有个坏词。"))
    assert (await server.ask("说点什么")).text == WITHHELD
    assert "blocked words not read, the last ones stay in force" in caplog.text
    rewrite(words_file, "新词\n")
    assert (await server.ask("新词")).text == REFUSED


async def test_a_list_that_becomes_unreadable_stays_in_force(
    server, words_file, caplog
):
    """Bytes of another encoding do not empty it."""
    words_file.write_bytes("新词".encode("gb18030"))
    os.utime(words_file, (1000, 1000))
    assert (await server.ask("坏词")).text == REFUSED
    assert "the last ones stay in force" in caplog.text


@pytest.mark.parametrize(
    "answer",
    [
        "坏\n- 词。",
        "坏\n# 词\n好",
        "一个坏\n\n- **词**",
        "`坏[词](https://a.cn)" + "字" * 300 + "`。",
        "$x^{a坏}$词。",
    ],
)
async def test_no_page_joins_what_the_chat_shows_apart(server, upstream, answer):
    """A search, an answer's page and stream, a history with it open and folded."""
    upstream.will(answer + "\n\n" + "字" * 300)
    shown = await server.ask("问")
    assert WITHHELD not in shown.text
    history = (await server.ask("/history")).links[0][1]
    search = server.open(f"{history}/search", "POST", data={"words": "坏"})
    async with search as response:
        pages = [await response.text()]
    for _ in range(2):  # the second time in an older session
        pages += [(await server.get(history))[1]]
        await server.ask("/clear")
        await server.ask("问")
    pages += [(await server.get(link))[1] for _, link in shown.links]
    for page in pages:
        page = re.sub(r"(?s)<(style|script).*?</\1>|<template>.*?</template>", "", page)
        page = re.sub("</?(?:a|strong|mark|m[a-z]+|code|span)\\b[^>]*>", "", page)
        page = html.unescape(re.sub("<[^>]*>", "|", page))
        assert "坏" in page and "坏词" not in re.sub("\\s", "", page)


async def test_a_list_from_windows_is_read(serve, words_file):
    """A byte order mark and CRLF are no part of a word."""
    words_file.write_bytes("\ufeff坏词\r\n新词\r\n".encode())
    server = await serve(limits={"blocked_words": str(words_file)})
    for text in ("坏词", "新词"):
        assert (await server.ask(f"/chatgpt {text}")).text.startswith(REFUSED)


@pytest.mark.parametrize("name", ["nowhere.txt", "."])
def test_a_list_that_cannot_be_read_at_start_ends_it(settings, tmp_path, name):
    """The last line names the setting and the file; exit 2, no traceback."""
    settings["limits"] = {"blocked_words": str(tmp_path / name)}
    path = tmp_path / "wxgpt.toml"
    path.write_text(toml(settings), "utf-8")
    command = [sys.executable, str(ROOT / "wxgpt.py"), "--config", str(path)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60)
    line = ended.stderr.splitlines()[-1]
    assert ended.returncode == 2 and "Traceback" not in ended.stderr
    assert line.startswith("wxgpt: limits.blocked_words: ") and str(tmp_path) in line


# However it is cut


def form(text):
    """Return a text as the contract compares it."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    return re.sub("[\\s\u00ad\u200b-\u200f\u2060\ufeff*_~]", "", folded)


def guard_of(folder, words):
    """Return a guard for these words."""
    path = folder.mktemp("words") / "list"
    path.write_text("\n".join(words), "utf-8")
    blocked = wxgpt.BlockedWords(str(path))
    blocked.refresh()
    return lambda: wxgpt.WordGuard(blocked)


def shown(guard, pieces):
    """Yield all that is visible after each piece, and at the end."""
    text = ""
    for piece in [*pieces, None]:
        more, is_blocked = guard.feed(piece or "", is_end=piece is None)
        text += more
        yield text, is_blocked
        if is_blocked:
            return


BLOCKED = ["坏词", "abcé", "ABBA", "ﬃx", "한국", "バカ", "ß", "a\u0323\u0307b", "が"]
SCRAPS = [*"坏词的abcexABsSkß", "é", "\u0301", "\u0323", "\u0307", "ﬃ", "ﬀ", "i", "㎏"]
SCRAPS += [*"*_~ \n", "\u200b", "\ufeff", "\u00ad", "ａ", "Ｂ", "𝐜", "한", "국"]
SCRAPS += [*"\u1112\u1161\u11ab\u1100\u116e\u11a8", *"ﾊﾞｶバカハ\u3099\u309aｶﾞ"]
SCRAPS += ["abc", "坏\u200b", "AB", "BA", *BLOCKED]
streams = st.lists(
    st.lists(st.sampled_from(SCRAPS), max_size=5).map("".join), max_size=12
)


@pytest.fixture(scope="module")
def new_guard(tmp_path_factory):
    """Make guards for words that are hard to see coming."""
    return guard_of(tmp_path_factory, BLOCKED)


@given(pieces=streams)
@example(pieces=["abce", "\u0301"])
@example(pieces=["坏", "\u200b", "词"])
@example(pieces=["ﾊ", "ﾞ", "ｶ"])
@example(pieces=["\u1112", "\u1161", "\u11ab", "국"])
def test_no_blocked_word_is_ever_visible(new_guard, pieces):
    """Whatever a model says in whatever pieces, no state of the page has a word."""
    for text, _ in shown(new_guard(), pieces):
        assert not any(form(word) in form(text) for word in BLOCKED)


@given(pieces=streams)
def test_what_is_shown_is_what_was_said(new_guard, pieces):
    """It only grows, is always the beginning, and is whole unless a word is in it."""
    said, states = "".join(pieces), list(shown(new_guard(), pieces))
    text, is_blocked = states[-1]
    assert said.startswith(text)
    assert is_blocked or text == said
    assert is_blocked == any(form(word) in form(said) for word in BLOCKED)


@given(text=st.lists(st.sampled_from(SCRAPS), max_size=20).map("".join), data=st.data())
def test_cuts_do_not_matter(new_guard, text, data):
    """The same text is blocked or not, however it is cut."""
    cuts = data.draw(st.lists(st.integers(0, len(text)), max_size=8).map(sorted))
    edges = [0, *cuts, len(text)]
    pieces = [text[a:b] for a, b in zip(edges, edges[1:])]
    *_, (_, cut) = shown(new_guard(), pieces)
    *_, (_, whole) = shown(new_guard(), [text])
    assert cut == whole


@given(st.text(max_size=12), st.text(max_size=12), st.integers(0, 30))
def test_any_word_is_seen_anywhere(tmp_path_factory, before, after, cut):
    """A word of any list in any text of any characters."""
    text = wxgpt.ILLEGAL.sub("", f"{before}坏ａe\u0301词{after}")  # as at the door
    guard = guard_of(tmp_path_factory, ["坏aé词"])()
    *_, (seen, is_blocked) = shown(guard, [text[:cut], text[cut:]])
    assert is_blocked == (form("坏aé词") in form(text))
    assert form("坏aé词") not in form(seen)


@given(st.text(max_size=30))
def test_words_are_compared_the_same_piece_by_piece_and_whole(text):
    """Cutting into characters with their accents changes nothing of NFKC."""
    pieces = "".join(map(wxgpt.comparison_form, wxgpt.clusters(text)))
    assert wxgpt.IGNORED.sub("", form(text)) == pieces


@pytest.mark.parametrize(
    "answer",
    [
        "这里有坏<b>词</b>。\n\n还有。",
        "这里有[坏](https://a.cn)词。\n\n还有。",
        "这里有坏&#x8bcd;。\n\n还有。",
        "这里有&#22351;\n词。\n\n还有。",
        "这里有坏**词**。\n\n还有。",
    ],
)
async def test_markup_hides_no_word(server, upstream, answer):
    """What is shown is what is compared."""
    upstream.will(answer)
    seen = await server.ask("说点什么")
    assert "坏" not in seen.text and WITHHELD in seen.text


def test_twenty_thousand_words_are_found_by_their_first_characters(tmp_path):
    """The work grows with the text and not with the list: a lookup per length."""
    words = [
        f"{chr(0x4E00 + n % 5000)}{chr(0x5000 + n // 5000)}词" for n in range(20_000)
    ]
    (tmp_path / "words").write_text("\n".join(words), "utf-8")
    blocked = wxgpt.BlockedWords(str(tmp_path / "words"))
    blocked.refresh()
    assert max(map(len, blocked.lengths.values())) == 1
    assert all(blocked.are_in(f"好{word}好") for word in words[::997])
    assert not blocked.are_in("好" * 2000)


@pytest.mark.parametrize("seed", range(4))
async def test_through_the_door_no_cut_lets_a_word_slip(server, upstream, seed):
    """Reply, page and its stream, with the word cut at every place."""
    text = "开头一句。坏\u200b*词*，再来一句。"
    at = text.index("坏") + seed
    gate = asyncio.Event()
    upstream.will(Script([text[:at], gate, text[at:]]))
    seen = await server.ask("说点什么")
    async with server.open(seen.links[0][1] + "/events") as events:
        gate.set()
        stream = (await events.content.read()).decode()
    page = (await server.get(seen.links[0][1]))[1]
    rest = await server.wechat.tap(ANN, seen.taps[0])
    assert seen.text != FAULT and rest.text == WITHHELD
    assert not [s for s in (seen.text, stream, page, rest.text) if "坏" in s]
