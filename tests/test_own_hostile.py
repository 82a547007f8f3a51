"""Own pages under attack: forms of strangers, races, floods, a database that fails."""

import asyncio
import contextlib
import functools
import pathlib
import random
import re
import sqlite3
import traceback

import pytest

import wxgpt
from conftest import ANN, BOB, with_session
from fake_openai import Script, fails
from phone import Phone
from test_own_pages import URL, ended, shown
from waiting import limit, within

FORM = "application/x-www-form-urlencoded"


def faults_in(caplog):
    """Return what broke in the server, as its log tells it; the upstream logs there, too."""
    records = [r for r in caplog.records if r.exc_info and wxgpt.is_our_fault(r)]
    texts = ["".join(traceback.format_exception(*r.exc_info)) for r in records]
    return [text for text in texts if "fake_openai.py" not in text]


@pytest.fixture
def changes():
    """The pages are reached by TLS; no attempt is left to time out."""
    return {"public_url": URL, "wechat": {"mute_guard": 0}}


@contextlib.contextmanager
def locked(settings):
    """Let another process hold the database's lock."""
    with contextlib.closing(
        sqlite3.connect(settings["database"]["path"], isolation_level=None)
    ) as db:
        db.execute("BEGIN IMMEDIATE")
        yield
        db.execute("ROLLBACK")


async def confirmed(server, openid=ANN):
    """Return a phone whose number was confirmed, and which has not gone on yet."""
    phone = Phone(server)
    asked = await server.ask(f"登录 {(await phone.open()).number}", openid)
    await server.wechat.tap(openid, asked.taps[0])
    return phone


def is_in(page):
    """Say whether a page is one to ask on."""
    return page.status == 200 and 'action="/me/ask"' in page.text


# Signing in


async def test_a_browser_that_asks_twice_at_once_is_let_in_once(server, database):
    """The second is led to the page by the first one's cookie, not told of devices."""
    phone = await confirmed(server)
    other = Phone(server, cookies=dict(phone.cookies))
    pages = await asyncio.gather(phone.open(), other.open())
    assert [is_in(page) for page in pages].count(True) == 1
    assert not any("设备太多" in page.text for page in pages)
    assert database("SELECT count(*) FROM device") == [(1,)]


async def test_two_browsers_confirmed_before_either_goes_on_are_both_let_in(server):
    """WeChat holds its browser still while its reader is in the chat."""
    phones = [await confirmed(server) for _ in range(2)]
    for phone in phones:
        assert is_in(await phone.open())


async def test_signing_all_out_ends_what_was_confirmed(server):
    """Who was tricked into it gets rid of a browser that has not gone on yet, too."""
    late = await confirmed(server)
    assert "退出了" in (await server.ask("全部退出")).text
    assert not is_in(await late.open())


async def test_a_second_tap_confirms_nothing_and_asks_no_model(server, upstream):
    """A model would say that it is done."""
    phone = Phone(server)
    asked = await server.ask(f"登录 {(await phone.open()).number}")
    for _ in range(2):
        assert "登录好了" in (await server.wechat.tap(ANN, asked.taps[0])).text
    assert is_in(await phone.open())
    late = await server.wechat.tap(ANN, asked.taps[0])
    assert late.text.startswith("这个数字不对，或者已经过期")
    assert not upstream.requests


async def test_a_forgotten_tab_asks_for_no_more_numbers(server):
    """Also one that was given a second number: it reloads the page without `new`."""
    phone = Phone(server)
    await phone.open()
    server.bot.sign_ins.waiting.clear()  # as after ten minutes
    assert "换一个数字" in (await phone.open()).text
    assert (await phone.open("/me?new")).number
    server.bot.sign_ins.waiting.clear()
    assert 'content="3;url=me"' in phone.page.text


async def test_a_locked_database_keeps_a_confirmed_browser_waiting(server, settings):
    """It is let in as soon as that can be stored."""
    phone = await confirmed(server)
    with locked(settings):
        page = await phone.open()
        assert page.status == 200 and page.number
    assert is_in(await phone.open())


async def test_who_has_sent_a_number_is_not_pushed_out(server):
    """However many strangers open the page meanwhile; memory is bounded."""
    phone = Phone(server)
    number = (await phone.open()).number
    asked = await server.ask(f"登录 {number}")
    sign_ins = server.bot.sign_ins
    for n in range(6000):
        sign_ins.begin(f"{n}")
    assert len(sign_ins.waiting) <= 5000
    await server.wechat.tap(ANN, asked.taps[0])
    assert is_in(await phone.open())


async def test_links_passed_on_show_a_stranger_nothing(phone):
    """Neither do they cost a device, nor does HEAD."""
    await phone.ask("私事")
    await ended(phone, "关于「私事」")
    for path in ("/me", "/me?new", "/me?only=1", "/me?before=99", "/me?only=x"):
        page = await Phone(phone.server).open(path)
        assert "私事" not in page.text and not is_in(page)
        assert (await Phone(phone.server).load("HEAD", path)).status == 200


async def test_six_devices_at_once_are_five(server, database):
    """Whoever is first."""
    phones = [await confirmed(server) for _ in range(6)]
    pages = await asyncio.gather(*(phone.open() for phone in phones))
    assert [is_in(page) for page in pages].count(True) == 5
    assert database("SELECT count(*) FROM device") == [(5,)]


async def test_another_subscribers_cookie_stays(phone):
    """Bob's confirmed number does not take Ann's phone over."""
    server = phone.server
    own = phone.cookies["__Host-wxgpt"]
    late = await confirmed(server, BOB)
    phone.cookies |= late.cookies
    assert is_in(await phone.open())
    assert phone.cookies["__Host-wxgpt"] == own


@pytest.mark.parametrize("cookie", ["\udcff", "x" * 7000, '"a\\012b"', "登录", ";;="])
async def test_made_up_cookies_are_nobodys(server, cookie):
    """No 5xx for them."""
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    value = cookie.encode("utf-8", "surrogateescape")
    for name in (b"__Host-wxgpt", b"__Host-wxgpt-wait"):
        head = b"GET /me HTTP/1.1\r\nHost: x\r\nCookie: " + name + b"=" + value
        writer.write(head + b"\r\n\r\n")
        status = await within(10, "response", reader.readline())
        assert b" 200 " in status, status
        await within(10, "page", reader.readuntil(b"</html>"))
    writer.close()


# Forms


@pytest.mark.parametrize("action", ["ask", "search", "new"])
async def test_a_strangers_form_is_refused_unread(server, caplog, action):
    """Its body may stall or tear: nobody waits for it, no error is logged."""
    head = f"POST /me/{action} HTTP/1.1\r\nHost: x\r\nContent-Type: {FORM}\r\n"
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    writer.write(f"{head}Content-Length: 500\r\n\r\nquestion=".encode())
    status = await within(5, "refusal", reader.readline())
    assert b" 401 " in status
    writer.close()


@pytest.mark.parametrize("action", ["ask", "search", "new"])
async def test_a_form_that_stalls_or_tears_is_dropped(
    phone, caplog, monkeypatch, action
):
    """No answer, no error in the log."""
    monkeypatch.setattr("wxgpt.BODY_SECONDS", 0.3)
    cookie = f"__Host-wxgpt={phone.cookies['__Host-wxgpt']}"
    head = f"POST /me/{action} HTTP/1.1\r\nHost: x\r\nContent-Type: {FORM}\r\n"
    head += f"Cookie: {cookie}\r\nOrigin: {URL}\r\n"
    for rest in (
        "Content-Length: 500\r\n\r\nquestion=",
        "Transfer-Encoding: chunked\r\n\r\nzz\r\n\r\n",
    ):
        port = phone.server.port
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write((head + rest).encode())
        answer = b""
        with contextlib.suppress(ConnectionResetError):
            answer = await within(10, "end of the connection", reader.read())
        assert not answer.startswith(b"HTTP/1.1 5"), answer
        writer.close()
    assert faults_in(caplog) == []


@pytest.mark.parametrize(
    "kind", ["text/plain", "multipart/form-data; boundary=x", "application/json", ""]
)
@pytest.mark.parametrize(
    "origin",
    [
        None,
        "null",
        "",
        "https://wx.example.com.",
        "http://wx.example.com",
        "https://wx.example.com:444",
        "https://a@wx.example.com",
        "HTTPS://WX.EXAMPLE.COM",
        URL,
    ],
)
async def test_other_sites_forms_do_nothing(phone, upstream, kind, origin):
    """Whatever content type or Origin they can bring about."""
    fields = phone.fields() | {"question": "外站的"}
    body = "&".join(f"{k}={v}" for k, v in fields.items())
    headers = {
        "Cookie": f"__Host-wxgpt={phone.cookies['__Host-wxgpt']}",
        "Content-Type": kind or FORM,
    }
    headers |= {} if origin is None else {"Origin": origin}
    url = f"{phone.server.url}/me/ask"
    async with phone.server.open(
        url, "POST", data=body, headers=headers, allow_redirects=False
    ) as response:
        is_ours = not kind and origin == URL
        assert response.status == (303 if is_ours else 403)
    if not is_ours:
        assert not upstream.requests


async def test_a_locked_database_costs_a_polite_word(phone, settings, caplog):
    """Asking, stopping, a new topic, leaving: no 500, and the words stay."""
    fields = phone.fields()
    with locked(settings):
        page = await phone.send("ask", **fields, question="问")
        assert page.status == 409 and ">问</textarea>" in page.text
        for action in ("new", "leave", "stop"):
            page = await phone.send(action, token=fields["token"], key="x")
            assert page.status < 400 or page.status == 503, (action, page.status)
    assert "Traceback" not in caplog.text
    await phone.send("ask", **fields, question="问")
    await ended(phone, "关于「问」")


async def test_one_form_a_hundred_times_is_one_call(phone, upstream, database):
    """At once; and all are led to it."""
    fields = phone.fields() | {"question": "同一个"}
    phones = [Phone(phone.server, cookies=dict(phone.cookies)) for _ in range(100)]
    pages = await asyncio.gather(*(one.send("ask", **fields) for one in phones))
    assert {page.status for page in pages} == {200}
    await ended(phone, "关于「同一个」")
    assert len(upstream.requests) == 1
    assert database("SELECT questions FROM quota") == [(1,), (1,)]


async def test_a_hundred_forms_at_once_keep_to_the_limits(serve, upstream, database):
    """Three wait, seven a day; each that is taken is one call."""
    limits = {"questions_per_day": 7}
    server = await with_session(serve, public_url=URL, limits=limits)
    phone = Phone(server)
    await phone.sign_in(ANN)
    fields = phone.fields()
    for turn in range(4):
        forms = [
            fields | {"id": f"form-{turn}-{n}", "question": f"问{turn}-{n}"}
            for n in range(30)
        ]
        phones = [Phone(server, cookies=dict(phone.cookies)) for _ in forms]
        await asyncio.gather(
            *(one.send("ask", **form) for one, form in zip(phones, forms, strict=True))
        )
        async with limit(30, "end of the answers"):
            while database("SELECT 1 FROM turn WHERE state = 'open'"):
                await asyncio.sleep(0.05)
    assert database("SELECT count(*) FROM turn") == [(7,)]
    assert len(upstream.requests) == 7


async def test_refused_forms_make_a_few_pages_at_once(phone, database):
    """Fifty refusals do not render fifty histories at the same time."""
    fields, pages = phone.fields() | {"question": "/help"}, phone.server.bot.pages
    phones = [Phone(phone.server, cookies=dict(phone.cookies)) for _ in range(20)]
    for _ in range(8):
        await pages.acquire()
    asked = [asyncio.ensure_future(one.send("ask", **fields)) for one in phones]
    done, _ = await asyncio.wait(asked, timeout=1)
    assert not done
    for _ in range(8):
        pages.release()
    for page in await asyncio.gather(*asked):
        assert page.status == 409


HOSTILE = [
    "\ufdd0a\ufdd1b\ufdd2",
    "<script>alert(1)</script>",
    "a\0\x1b\u202e",
    "e" + "\u0301" * 5000,
    "%00%0d%0aSet-Cookie: a=b",
    "]]>&lt;{tap}{0}",
    "\ud7ff\uffff",
]


@pytest.mark.parametrize("text", HOSTILE)
async def test_hostile_words_are_only_words(phone, text):
    """On the page, in the chat, in a search and in a file."""
    page = await phone.ask(text)
    assert page.status in (200, 409), page.status
    page = await phone.open()
    assert "<script>alert" not in page.text and "\ufdd0" not in page.text
    async with limit(20, "end"):
        while "/me/stop" in (page := await phone.open()).text:
            await asyncio.sleep(0.05)
    found = await phone.send("search", **phone.fields("search"), words=text[:50])
    assert found.status == 200 and "<script>alert" not in found.text
    await phone.open()
    assert (await phone.send("export", **phone.fields("export"))).status == 200
    assert "\ufdd0" not in (await phone.server.ask("/help")).text


@pytest.mark.parametrize("size", [2001, 60_000])
async def test_long_words_are_refused(phone, upstream, size):
    """In a sentence."""
    page = await phone.send("ask", **phone.fields(), question="q" * size)
    assert page.status == 409 and "问题太长了" in shown(page)
    assert not upstream.requests


@pytest.mark.parametrize(
    "form",
    [
        "",
        "short",
        "x" * 65,
        "x" * 5000,
        "a b c d e f g",
        "登录登录登录登录",
        "aaaaaaaa\n",
    ],
)
async def test_made_up_form_ids_ask_nothing(phone, upstream, form):
    """Only what a page of ours makes."""
    page = await phone.send("ask", **(phone.fields() | {"id": form}), question="问")
    assert page.status == 200 and not upstream.requests


# Deletion


@pytest.mark.parametrize("seed", range(6))
async def test_a_deletion_at_any_moment_leaves_nothing(
    phone, stored, upstream, settings, caplog, seed
):
    """Questions, their answers and streams, a sign-in, pages and files are under way."""
    server, moment = phone.server, random.Random(seed)
    gap = functools.partial(moment.uniform, 0, 0.3)
    upstream.will(*(Script([gap(), "密密", gap(), "密文。"]) for _ in range(9)))
    fields = phone.fields()
    await phone.ask("头一个")
    link = re.search('data-page="(/a/[^"]*)"', phone.page.text)[1]
    late = Phone(server)
    confirm = (await server.ask(f"登录 {(await late.open()).number}")).taps[0]
    forget = (await server.ask("/forget")).taps[0]

    async def later(method, *values, **more):
        await asyncio.sleep(moment.uniform(0, 0.5))
        one = Phone(server, cookies=dict(phone.cookies))
        await getattr(one, method)(*values, **more)

    works = [later("open", path) for path in ("/me", link, link, f"{link}/events")]
    for action in ("new", "search", "export", "stop"):
        more = {"token": fields["token"], "words": "密", "key": link[3:]}
        works.append(later("send", action, **more))
    for n in range(4):
        form = fields | {"id": f"form-{n}-xx", "question": f"密问{n}"}
        works.append(later("send", "ask", **form))
    works += [late.open(), server.ask("密聊"), server.wechat.tap(ANN, confirm)]
    running = [asyncio.ensure_future(work) for work in works]
    await asyncio.sleep(moment.uniform(0, 0.6))
    if seed % 2:
        await server.wechat.tap(ANN, forget)
    else:
        await server.wechat.post(server.wechat.event(ANN, "unsubscribe"))
    await within(30, "end of all", asyncio.gather(*running))
    await asyncio.sleep(1.2)  # texts are saved every second
    kept = [line for line in stored().split("\n") if ANN in line or "密" in line]
    assert not kept and not server.bot.turns
    for file in pathlib.Path(settings["database"]["path"]).parent.glob("test.db*"):
        assert ANN.encode() not in (data := file.read_bytes()), file
        assert "密".encode() not in data, file
    assert faults_in(caplog) == []
    assert not [r for r in caplog.records if ANN in r.getMessage()]


# Answers


async def test_a_question_stopped_before_its_first_word_is_not_sent_along(
    phone, upstream
):
    """Some providers take no empty message."""
    upstream.will(Script([asyncio.Event()]))
    await phone.ask("停掉的")
    await upstream.arrival("停掉的")
    key = phone.page.text.partition('data-page="/a/')[2].partition('"')[0]
    await phone.send("stop", **phone.fields("new"), key=key)
    await ended(phone, "已停在这里")
    await phone.ask("下一个")
    await ended(phone, "关于「下一个」")
    assert all(m["content"] for m in upstream.requests[-1].messages)


async def test_others_answers_are_not_stopped(phone, upstream, database):
    """Bob knows the key of Ann's answer: he can read it."""
    other = Phone(phone.server)
    await other.sign_in(BOB)
    gate = asyncio.Event()
    upstream.will(Script(["写着。", gate, "完了。"]))
    await phone.ask("安的")
    await ended(phone, "写着。")
    key = database("SELECT link_key FROM turn")[0][0]
    await other.send("stop", **other.fields("new"), key=key)
    gate.set()
    await ended(phone, "完了。")
    assert database("SELECT state FROM turn") == [("done",)]


async def test_blocked_words_are_withheld(serve, upstream, tmp_path, database):
    """In a question, which opens no session; in an answer, on every page and after."""
    (tmp_path / "words").write_text("坏词", "utf-8")
    limits = {"blocked_words": str(tmp_path / "words")}
    server = await serve(public_url=URL, limits=limits)
    phone = Phone(server)
    await phone.sign_in(ANN)
    assert "换个说法" in shown(await phone.ask("说坏 词"))
    assert "没在聊天" in (await server.ask("/stop")).text
    upstream.will("第一句。\n\n这是坏[词](https://example.com/)，完了。", "好的。")
    await phone.ask("问")
    page = await ended(phone, "不便显示")
    link = f"/a/{database('SELECT link_key FROM turn')[0][0]}"
    file = await phone.send("export", **phone.fields("export"))
    pages = [page, file, await phone.open(link), await phone.open(f"{link}/events")]
    assert "好的。" in (await server.ask("再问")).text
    for text in [one.text for one in pages] + [str(upstream.requests[-1].messages)]:
        assert "完了" not in text and "坏" not in text


async def test_a_spare_model_answers_on_the_page(serve, upstream, settings):
    """The question counts once, the page names who wrote it."""
    chatgpt = settings["assistants"]["chatgpt"]
    assistants = {
        "chatgpt": {"fallback": "spare"},
        "spare": chatgpt | {"model": "spare-1"},
    }
    server = await with_session(serve, public_url=URL, assistants=assistants)
    phone = Phone(server)
    await phone.sign_in(ANN)
    upstream.will(fails(401))
    await phone.ask("谁在")
    assert "spare-1 ·" in shown(await ended(phone, "关于「谁在」"))
    assert len(upstream.requests) == 2


async def test_pages_work_below_a_path(serve, upstream):
    """Where the proxy has them: every redirect stays there."""
    server = await with_session(serve, public_url=f"{URL}/bot")
    phone = Phone(server)
    await phone.sign_in(ANN)
    assert 'action="/bot/me/ask"' in phone.page.text
    headers = {"Cookie": f"__Host-wxgpt={phone.cookies['__Host-wxgpt']}", "Origin": URL}
    for action in ("ask", "stop", "new", "search"):
        fields = phone.fields() | {"question": "问"}
        options = {"data": fields, "headers": headers, "allow_redirects": False}
        async with server.open(f"{server.url}/me/{action}", "POST", **options) as page:
            assert (page.status, page.headers["Location"]) == (303, "../me")


async def test_a_page_question_outlives_a_kill(spawn, upstream, database):
    """It is asked again by itself, counted once, and its form joins it."""
    server, process = await spawn(public_url=URL)
    await server.ask("/chatgpt")
    phone = Phone(server)
    await phone.sign_in(ANN)
    upstream.will(Script(["写了一半。", asyncio.Event()]))
    fields = phone.fields() | {"question": "被杀的"}
    await phone.send("ask", **fields)
    await ended(phone, "写了一半。")
    await process.kill()
    await process.start()
    await ended(phone, "关于「被杀的」")
    await phone.send("ask", **fields)
    assert database("SELECT count(*) FROM turn") == [(1,)]
    assert database("SELECT questions FROM quota") == [(1,), (1,)]
    assert len(upstream.requests) == 2
    assert ANN not in "".join(process.log)


async def test_asks_that_wait_end_with_the_process(spawn, upstream, database):
    """SIGTERM: exit 0 in time, and what was taken is answered by the next one."""
    server, process = await spawn(public_url=URL)
    await server.ask("/chatgpt")
    phone = Phone(server)
    await phone.sign_in(ANN)
    upstream.will(*[Script([asyncio.Event()])] * 1)
    fields = phone.fields()
    forms = [fields | {"id": f"form-{n}-xx", "question": f"问{n}"} for n in range(3)]
    for form in forms:
        await phone.send("ask", **form)
    assert await process.end() == 0
    await process.start()
    for n in range(3):
        await ended(phone, f"关于「问{n}」")
    assert database("SELECT count(*) FROM turn") == [(3,)]


async def test_the_same_words_in_the_chat_and_on_the_page_are_named_once(
    phone, upstream, serve
):
    """Whose answer the chat has brought is not named as unread there."""
    server = phone.server
    gate = asyncio.Event()
    upstream.will(Script([gate, "都一样。"]))
    chat = asyncio.ensure_future(server.ask("同样的"))
    await upstream.arrival("同样的")
    await phone.ask("同样的")
    gate.set()
    assert "都一样" in (await chat).text
    server.bot.subscribers.clear()  # as a while later
    assert "写好了" not in (await server.ask("/help")).text


async def test_two_phones_and_the_chat_keep_one_order(phone, upstream):
    """With a slow model; the last knows both others."""
    other = Phone(phone.server)
    await other.sign_in(ANN)
    gates = [asyncio.Event() for _ in range(3)]
    upstream.will(*[Script([gate, "答。"]) for gate in gates])
    await phone.ask("甲")
    await other.ask("乙")
    chat = asyncio.ensure_future(phone.server.ask("丙"))
    for gate in gates:
        await asyncio.sleep(0.2)
        gate.set()
    await chat
    await upstream.arrival("丙")
    asked = [m["content"] for m in upstream.requests[-1].messages[1:]]
    assert asked[::2] == ["甲", "乙", "丙"]


async def test_every_response_is_private(phone):
    """Pages, JSON, redirects and refusals: not kept, not sniffed, not framed."""
    fields = phone.fields()
    headers = {"Origin": URL, "Cookie": f"__Host-wxgpt={phone.cookies['__Host-wxgpt']}"}
    for accept in ("application/json", "text/html"):
        for action in ("ask", "stop", "new", "search", "export"):
            for token in (fields["token"], "x"):
                form = {"token": token, "id": fields["id"], "question": "问"}
                options = {
                    "data": form,
                    "headers": headers | {"Accept": accept},
                    "allow_redirects": False,
                }
                url = f"{phone.server.url}/me/{action}"
                async with phone.server.open(url, "POST", **options) as response:
                    assert response.headers.get("Cache-Control") == "no-store", (
                        action,
                        response.status,
                    )
                    assert response.headers["X-Content-Type-Options"] == "nosniff"
                    assert "Referrer-Policy" in response.headers


@pytest.mark.parametrize(
    "public", ["https://WX.example.com", "https://wx.example.com:443"]
)
async def test_the_origin_is_as_a_browser_says_it(serve, upstream, public):
    """In lower case and without https's own port."""
    server = await with_session(serve, public_url=public)
    phone = Phone(server)
    await phone.sign_in(ANN)
    await phone.ask("问")
    await ended(phone, "关于「问」")


async def test_who_may_not_ask_opens_no_session(serve, database):
    """Nor do refused questions."""
    server = await serve(public_url=URL, limits={"allow": [BOB]})
    phone = Phone(server)
    await phone.sign_in(ANN)
    assert "暂未对你开放" in shown(await phone.ask("问"))
    assert database("SELECT count(*) FROM session") == [(0,)]


async def test_the_log_names_nobody(spawn, upstream):
    """No openid whole, no number, no cookie, no token, no key, no words."""
    server, process = await spawn(public_url=URL)
    await server.ask("/chatgpt")
    phone = Phone(server)
    number = (await phone.open()).number
    wait = phone.cookies["__Host-wxgpt-wait"]
    await phone.sign_in(ANN)
    fields = phone.fields()
    await phone.ask("悄悄话")
    await ended(phone, "关于「悄悄话」")
    await phone.send("ask", **(fields | {"token": "x"}), question="悄悄话")
    await phone.send("leave", **fields)
    await process.end()
    log = "".join(process.log)
    for secret in (
        ANN,
        number,
        wait,
        phone.cookies.get("__Host-wxgpt", "悄"),
        fields["token"],
        "悄悄话",
    ):
        assert secret not in log
