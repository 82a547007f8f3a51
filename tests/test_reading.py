"""What a subscriber does with the history: reading, searching, taking it along."""

import asyncio
import contextlib
import itertools
import re
import socket
import time

import pytest

import wxgpt
from conftest import ANN, BOB, with_session
from fake_openai import Script
from waiting import within

LABEL = "（AI 生成）"


@pytest.fixture
def changes():
    """The server lets no attempt time out."""
    return {"wechat": {"mute_guard": 0}}


async def history_of(server, openid=ANN):
    """Return the address of a subscriber's history."""
    return server.at((await server.ask("/history", openid)).links[0][1])


async def post(server, url, status=200, **fields):
    """Send a form; return headers and text of what comes."""
    async with server.open(url, "POST", data=fields) as response:
        assert response.status == status
        return response.headers, await response.text()


async def search(server, words, **fields):
    """Return the questions that Ann's search finds, and the page."""
    url = await history_of(server) + "/search"
    _, page = await post(server, url, words=words, **fields)
    found = re.findall(r'<p class="question">(.*?)</p>', page)
    return [re.sub("</?mark>", "", question) for question in found], page


async def export(server, openid=ANN):
    """Return headers and text of a subscriber's exported file."""
    return await post(server, await history_of(server, openid) + "/export")


# Search


@pytest.fixture
async def talk(server, upstream):
    """Ann's conversation in two sessions, with a few odd signs."""
    for question, answer in {
        "苹果怎么选": "看**颜色**，闻味道。",
        "打 5 折的算法": "原价 100%，折后 50%，变量叫 my_price。",
        "路径": r"在 C:\new\table 里，变量叫 myXprice。",
    }.items():
        upstream.will(answer)
        await server.ask(question)
    await server.ask("/clear")
    upstream.will("APPLE 是苹果。<b>")
    await server.ask("apple 是什么")


@pytest.mark.parametrize(
    "words, found",
    [
        ("苹果", ["apple 是什么", "苹果怎么选"]),
        ("Apple", ["apple 是什么"]),
        ("味道 苹果", ["苹果怎么选"]),
        ("苹果　味道", ["苹果怎么选"]),
        ("100%", ["打 5 折的算法"]),
        ("%", ["打 5 折的算法"]),
        ("my_price", ["打 5 折的算法"]),
        ("C:\\new\\", ["路径"]),
        ("\\", ["路径"]),
        ("香蕉", []),
        ("苹果 香蕉", []),
        ("'; DROP TABLE turn", []),
    ],
)
async def test_a_search_finds_what_has_all_words(server, talk, words, found):
    """In questions and answers of all sessions, newest first; no sign is a wildcard."""
    assert (await search(server, words))[0] == found


async def test_the_words_are_marked(server, talk):
    """In question and answer as they are written there; the rest is text."""
    _, page = await search(server, "apple 苹果")
    assert "<mark>apple</mark> 是什么" in page
    assert "<mark>APPLE</mark> 是<mark>苹果</mark>。&lt;b&gt;" in page


async def test_what_was_found_can_be_read_whole(server, talk):
    """A link leads to the exchange by itself, another one back."""
    _, page = await search(server, "颜色")
    url = await history_of(server)
    [only] = re.findall(r'href="\.\./[\w-]+(\?only=\d+)"', page)
    _, whole = await server.get(url + only)
    assert "<strong>颜色</strong>" in whole and "apple 是什么" not in whole
    assert f'href="{url.rpartition("/")[2]}"' in whole
    assert re.search(r'href="\.\./[\w-]+">回到聊天记录', page)


async def test_a_search_of_nothing_leads_back(server, talk):
    """As does its address when it is opened as a page."""
    url = await history_of(server)
    for method, words in ("POST", " 　"), ("GET", ""):
        async with server.open(url + "/search", method, data={"words": words}) as page:
            assert str(page.url) == url and page.status == 200


async def test_a_few_words_are_looked_for(server, talk):
    """Each is looked for in much text; the same one once, and no more than nine."""
    eight = "怎 么 选 颜 色 闻 味 道"
    assert (await search(server, f"{eight} " * 4 + "苹果 香蕉"))[0] == ["苹果怎么选"]
    assert (await search(server, f"{eight} 香蕉 苹果"))[0] == []


async def test_many_matches_come_in_pages(server, database):
    """Twenty at once, the rest from there on; nothing is found twice or left out."""
    fill(database, 50)
    seen, before = [], str(2**62)
    for _ in range(3):
        found, page = await search(server, "问题", before=before)
        seen += found
        [before] = re.findall(r'name="before" value="(\d+)"', page) or [""]
    assert seen == [f"问题{number}" for number in range(50, 0, -1)] and before == ""


async def test_a_search_through_much_goes_on_where_it_stopped(
    server, database, monkeypatch
):
    """It looks through a bounded number of exchanges, then offers to go on."""
    monkeypatch.setattr(wxgpt, "SEARCH_SLICES", 10)
    await server.ask("头一个")
    fill(database, 150)
    found, page = await search(server, "头一个")
    assert found == [] and "没有找到" in page
    [before] = re.findall(r'name="before" value="(\d+)"', page)
    assert (await search(server, "头一个", before=before))[0] == ["头一个"]


def fill(database, count):
    """Store so many exchanges of Ann's."""
    statement = """
        WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < ?)
        INSERT INTO turn (session_id, openid, msg_key, link_key, question, answer,
            state, created_at) SELECT (SELECT max(id) FROM session), ?, 'msg ' || i,
            'link' || i, '问题' || i, '答', 'done', ? FROM n
    """
    database(statement, count, ANN, time.time())


ODD = {"long": "香" * 6000, "many": "香 " * 3000, "nul": "\0", "half": "\ud800"}
ODD |= {"percents": "%" * 99, "fields": "&&=&words=&before=x&before=" + "9" * 99}


@pytest.mark.parametrize("words", ODD.values(), ids=ODD)
async def test_odd_words_do_no_harm(server, talk, words):
    """Long ones are cut."""
    words = words.encode("utf-8", "surrogatepass")
    async with server.open(
        await history_of(server) + "/search",
        "POST",
        data=b"words=" + words,
        headers={"Content-Type": "application/x-www-form-urlencoded"},
    ) as page:
        assert page.status == 200 and "<mark>" not in await page.text()


async def test_a_form_of_another_kind_finds_nothing(server, talk):
    """Multipart, JSON, one that is too long or has no end of fields."""
    url = await history_of(server) + "/search"
    fields = [("words", "苹果"), *[("a", "1")] * 9000]
    async with server.open(url, "POST", data=fields) as page:
        assert str(page.url) == url.removesuffix("/search")
    async with server.open(url, "POST", json={"words": "苹果"}) as page:
        assert str(page.url) == url.removesuffix("/search")
    await post(server, url, status=413, words="a" * 70_000)


@pytest.mark.parametrize("head", ["Content-Length: 99", "Transfer-Encoding: chunked"])
async def test_a_form_that_does_not_come_is_not_waited_for(server, monkeypatch, head):
    """Stalled or torn: the connection is dropped, and others are served."""
    monkeypatch.setattr(wxgpt, "BODY_SECONDS", 0.2)
    url = await history_of(server)
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    place, kind = url.removeprefix(server.url), "application/x-www-form-urlencoded"
    lines = f"POST {place}/search HTTP/1.1\r\nHost: x\r\nContent-Type: {kind}\r\n{head}"
    writer.write(f"{lines}\r\n\r\nzz\r\nwords=a".encode())
    with contextlib.suppress(ConnectionResetError):
        answer = await within(20, "end of the connection", reader.read())
        assert answer == b"" or b" 400 " in answer.partition(b"\r\n")[0]
    writer.close()
    assert (await server.get(url))[0] == 200


@pytest.mark.parametrize("what", ["search", "export"])
async def test_forms_that_do_not_come_keep_no_page_back(server, monkeypatch, what):
    """More of them than pages are made at once; each may take its time."""
    monkeypatch.setattr(wxgpt, "BODY_SECONDS", 60.0)
    url = await history_of(server)
    lines = [f"POST {url.removeprefix(server.url)}/{what} HTTP/1.1", "Host: x"]
    lines += ["Content-Type: application/x-www-form-urlencoded", "Content-Length: 99"]
    async with contextlib.AsyncExitStack() as stack:
        for _ in range(wxgpt.PAGES_AT_ONCE + 1):
            _, writer = await asyncio.open_connection("127.0.0.1", server.port)
            stack.callback(writer.close)
            writer.write("\r\n".join([*lines, "", "words=a"]).encode())
        assert (await within(30, "a page meanwhile", server.get(url)))[0] == 200


async def test_words_that_are_looked_for_are_not_logged(spawn, upstream):
    """They are in the body, and nothing of a page's address is logged either."""
    server, process = await spawn(wechat={"mute_guard": 0})
    await server.ask("/chatgpt 苹果怎么选")
    url = await history_of(server)
    await post(server, url + "/search", words="苹果")
    await post(server, url + "/export")
    await process.end()
    assert not re.search(f"苹果|{url.rpartition('/')[2]}", "".join(process.log))


# Export


async def test_an_export_is_a_file_with_all_exchanges(server, talk):
    """Oldest first, a heading for each session, and a name to find it by."""
    headers, text = await export(server)
    assert headers["Content-Type"] == "text/markdown; charset=utf-8"
    name = r"attachment; filename\*=UTF-8''%E8%81%8A%E5%A4%A9[%\w]+-\d{4}-\d\d-\d\d\.md"
    assert re.fullmatch(name, headers["Content-Disposition"])
    questions = ["苹果怎么选", "打 5 折的算法", "路径", "apple 是什么"]
    assert re.findall("(?m)^> (.*)$", text) == questions
    assert len(re.findall(r"(?m)^## \d{4}-\d\d-\d\d \d\d:\d\d · chatgpt$", text)) == 2
    assert "看**颜色**，闻味道。" in text and ANN[:8] not in text


async def test_an_export_says_that_it_is_by_ai(server, talk):
    """In each answer, and in the head by the fields of GB 45438."""
    _, text = await export(server)
    assert text.count(f"\n{LABEL}\n") == 4
    head = re.match(
        r'---\ndate: \d{4}-\d\d-\d\dT[\d:]{8}\+08:00\nAIGC:\n  Label: "1"\n'
        r'  ContentProducer: "wx\.example\.com"\n  ProduceID: "[0-9a-f]{32}"\n---\n\n',
        text,
    )
    assert head and "内容由 AI 生成" in text


async def test_an_export_without_a_label_has_one_all_the_same(serve, upstream):
    """The rules ask for it in the file, whatever the chat does."""
    server = await with_session(serve, replies={"label": ""})
    await server.ask("苹果怎么选")
    assert (await export(server))[1].count("\n内容由 AI 生成") == 2


async def test_an_export_tells_how_answers_ended(server, upstream):
    """Failed, broken off in code, still being written."""
    gate = asyncio.Event()
    upstream.will(Script("", status=401))
    await server.ask("没成的")
    upstream.will(Script(["写：\n```\n" + "x = 1\n" * 300, gate], ending="eof"))
    broken = (await server.ask("断掉的")).links[0][1]
    gate.set()
    await server.get(broken + "/events")
    upstream.will(Script(["写到", hold := asyncio.Event()]))
    await server.ask("没完的")
    _, text = await export(server)
    hold.set()
    assert "> 没成的\n\n*AI 暂时用不了" in text
    assert re.search(rf"x = 1\n+```\n\n{LABEL}\n", text)
    assert "*写到这里断了。" in text and "*正在写…*" in text


async def test_a_long_export_is_whole(server, database):
    """It is read a few exchanges at a time."""
    await server.ask("头一个")
    fill(database, 55)
    _, text = await export(server)
    numbers = [f"问题{number}" for number in range(1, 56)]
    assert re.findall("(?m)^> (.*)$", text) == ["头一个", *numbers]


# Whose it is


async def test_search_and_export_are_one_subscribers(server):
    """Nothing of Bob's is found or taken along by Ann's link."""
    await server.ask("/chatgpt 鲍的秘密", BOB)
    await server.ask("安的问题")
    assert (await search(server, "秘密"))[0] == []
    assert "秘密" not in (await export(server))[1]
    assert "安的问题" not in (await export(server, BOB))[1]


@pytest.mark.parametrize("form", ["search", "export"])
async def test_a_link_that_shows_nothing_does_nothing(serve, form):
    """Unknown, expired, of somebody who is being deleted."""
    server = await with_session(serve, history={"history_minutes": 0.02})
    await server.ask("苹果怎么选")
    url = f"{await history_of(server)}/{form}"
    _, found = await post(server, url, words="苹果")
    assert "苹果怎么选" in found.replace("<mark>", "").replace("</mark>", "")
    server.bot.store.due[ANN] = ("key", "reply")
    _, due = await post(server, url, status=404, words="苹果")
    del server.bot.store.due[ANN]
    await asyncio.sleep(1.3)
    _, expired = await post(server, url, status=410, words="苹果")
    _, unknown = await post(
        server, f"{server.url}/h/x/{form}", status=404, words="苹果"
    )
    assert "苹果" not in due + expired + unknown


async def test_who_does_not_read_keeps_no_page_from_others(server, database):
    """A file has a minute to be written, but not all the places that there are."""
    url = (await history_of(server)).removeprefix(server.url)
    others = await history_of(server, BOB)
    fill(database, 60)
    database("UPDATE turn SET answer = ?", "字" * 150_000)
    head = f"POST {url}/export HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n"
    async with contextlib.AsyncExitStack() as stack:
        begun = []
        for _ in range(wxgpt.PAGES_AT_ONCE + 1):
            reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
            stack.callback(writer.close)
            writer.write(head.encode())
            begun.append(reader.readline())
        for first in itertools.islice(asyncio.as_completed(begun), 2):
            assert b" 200 " in await within(20, "beginning of a file", first)
        for _ in range(5):  # by the last one all files have begun that may
            page = server.get(others)
            assert (await within(30, "a page of Bob's", page))[0] == 200


STALLED = """
    INSERT INTO turn (session_id, openid, msg_key, link_key, question, answer, state,
        created_at, asked)
    SELECT session_id, :1, msg_key || :1, link_key || :1, '', :2, 'done', created_at, 1
    FROM turn LIMIT 1
"""


@pytest.mark.parametrize("request_line", ["GET {}", "POST {}/export"])
async def test_subscribers_who_do_not_read_keep_no_page_from_others(
    serve, database, monkeypatch, request_line
):
    """More of them than there are places, with two pages or files each."""
    listen, loop = wxgpt.listen, asyncio.get_running_loop()

    def listen_with_little_room(*where):
        listener = listen(*where)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        return listener

    monkeypatch.setattr(wxgpt, "listen", listen_with_little_room)
    server = await with_session(serve)
    await server.ask("问")
    others = await history_of(server, BOB)
    with contextlib.ExitStack() as stack:
        for number in range(wxgpt.PAGES_AT_ONCE // 2 + 1):
            database(STALLED, f"oStalls{number}", "a" * 1_000_000)
            path = (await history_of(server, f"oStalls{number}")).split("/", 3)[3]
            head = f"{request_line.format('/' + path)} HTTP/1.1\r\nHost: x\r\n"
            for _ in range(2):
                line = stack.enter_context(socket.socket())
                line.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
                line.setblocking(False)
                await loop.sock_connect(line, ("127.0.0.1", server.port))
                await loop.sock_sendall(
                    line, f"{head}Content-Length: 0\r\n\r\n".encode()
                )
        await asyncio.sleep(0.5)  # by now all are stalled that will be
        assert (await within(20, "a page of Bob's", server.get(others)))[0] == 200


async def test_an_export_stops_when_its_subscriber_is_deleted(server, monkeypatch):
    """What is not yet sent is not sent any more."""
    for number in range(12):
        await server.ask(f"问题{number}")
    store, read = server.bot.store, server.bot.store.turns_after

    async def turns_after(openid, after):
        turns = await read(openid, after)
        store.due[openid] = ("key", "reply")
        return turns

    monkeypatch.setattr(store, "turns_after", turns_after)
    _, text = await export(server)
    store.due.clear()
    assert "问题9" in text and "问题10" not in text


# Pure


@pytest.mark.parametrize(
    "text, words, shown",
    [
        ("甲**乙**丙", ["乙"], "甲<mark>乙</mark>丙"),
        ("def f(**kwargs)", ["**kwargs"], "def f(<mark>**kwargs</mark>)"),
        ("# 题\n- 甲\n\n- 乙", ["乙"], "题 甲 <mark>乙</mark>"),
        ("A&B a&b", ["a&b"], "<mark>A&amp;B</mark> <mark>a&amp;b</mark>"),
        ("aab", ["a", "aa"], "<mark>aa</mark>b"),
        ("没有", ["乙"], "没有"),
        ("前" * 50 + "乙", ["乙"], "…" + "前" * 20 + "<mark>乙</mark>"),
        ("(.*", ["(.*"], "<mark>(.*</mark>"),
    ],
)
def test_a_snippet_shows_the_words_where_they_are(text, words, shown):
    """One line around the first of them; each is marked."""
    assert wxgpt.snippet(text, words, wxgpt.BlockedWords("")) == shown


@pytest.mark.parametrize(
    "markdown, shown",
    [
        ("# 题\n\n**粗** `码`", "【题】 粗 码"),
        ("设 $x^2$，见[文](https://e.com/long)", "设 x²，见文"),
        ("先看：\n\n```\n码\n```", "先看："),
        ("看表\n|甲|乙|\n|-|-|", "看表"),
        ("字" * 300, "字" * 80 + "…"),
    ],
)
def test_a_preview_is_a_line_of_plain_words(markdown, shown):
    """As the chat shows them, up to the first code or table."""
    assert wxgpt.preview(markdown, wxgpt.BlockedWords("")) == shown


def test_days_are_named_as_people_name_them():
    """Today, yesterday, a weekday, a year."""
    now = time.time()
    assert re.fullmatch(r"今天 \d\d:\d\d", wxgpt.day_and_time(now))
    assert re.fullmatch(r"昨天 \d\d:\d\d", wxgpt.day_and_time(now - 86400))
    assert wxgpt.day_and_time(1_600_000_000) == "2020年9月13日 20:26"
    recent = wxgpt.day_and_time(now - 86400 * 3)
    assert re.fullmatch(r"\d+月\d+日 周[一二三四五六日] \d\d:\d\d|\d{4}年.*", recent)


def spans(code, language):
    """Return what is coloured in code, by kind."""
    html = wxgpt.highlight(code, language)
    return [(kind, text) for kind, text in re.findall('"(.)">(.*?)</span>', html, re.S)]


@pytest.mark.parametrize(
    "language, code, coloured",
    [
        ("python", "if x: # a", [("k", "if"), ("c", "# a")]),
        ("py", "s = 'a#b' + 1.5e3", [("s", "&#x27;a#b&#x27;"), ("n", "1.5e3")]),
        (
            "Python",
            'f("""a\nb""")',
            [("s", "&quot;&quot;&quot;a\nb&quot;&quot;&quot;")],
        ),
        ("js", "let a = `b${c}` // d", [("k", "let"), ("s", "`b${c}`"), ("c", "// d")]),
        ("ts", "a1.b2 /* c\nd */", [("c", "/* c\nd */")]),
        ("java", "new A(2)", [("k", "new"), ("n", "2")]),
        ("cpp", "return 0x1F;", [("k", "return"), ("n", "0x1F")]),
        ("go", "func f() {}", [("k", "func")]),
        ("rust", "fn f<'a>(x: &'a str)", [("k", "fn"), ("k", "str")]),
        ("sh", "cd $# # a", [("k", "cd"), ("c", "# a")]),
        ("sql", "SELECT 1 -- a", [("k", "SELECT"), ("n", "1"), ("c", "-- a")]),
        (
            "html",
            '<a href="b">',
            [("k", "&lt;a"), ("s", "&quot;b&quot;"), ("k", "&gt;")],
        ),
        ("css", "a { color: red } /* b */", [("k", "color"), ("c", "/* b */")]),
        ("json", '{"a": "b"}', [("k", "&quot;a&quot;"), ("s", "&quot;b&quot;")]),
        ("yaml", "a: 1 # b", [("k", "a"), ("n", "1"), ("c", "# b")]),
        ('js title="a"', "let", [("k", "let")]),
        ("", "if", []),
        ("unknown", "if", []),
    ],
)
def test_code_is_coloured(language, code, coloured):
    """Comments, strings, numbers and keywords of the usual languages."""
    assert spans(code, language) == coloured


@pytest.mark.parametrize("language", sorted({*wxgpt.code_rules()}))
def test_colours_change_no_character_of_code(language):
    """Nor does code of hostile signs take a second to read, whatever its language."""
    for sign in "\"'`#/-*<>=\\a1 \n\t.@[{:;%":
        code = (sign + "x" + sign * 3) * 3000
        html = wxgpt.highlight(code, language)
        bare = re.sub(r'<span class="[cksn]">|</span>', "", html)
        assert wxgpt.html.unescape(bare) == code
