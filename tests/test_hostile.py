"""Whatever comes to the door: no 5xx, no hang, nothing stored, memory given back.

Property tests on the door itself, then a process of its own under ten thousand mutated
bodies, stalled ones, idle connections and floods. All of it from loopback, and bounded.
"""

import asyncio
import contextlib
import gzip
import itertools
import pathlib
import random
import re
import resource
import signal
import sqlite3
import time
import unicodedata
import urllib.parse

import aiohttp
import pytest
from aiohttp import web
from hypothesis import HealthCheck, given
from hypothesis import settings as examples
from hypothesis import strategies as st

import wxgpt
from conftest import ANN, BOB, PATIENT, TOKEN, platform, said
from wechat import sign

AT_ONCE = 16
NONCES = itertools.count(10**8)
IDLE = 2000
SEED = 20261122
AES_KEY, APP_ID = "abcdefghijklmnopqrstuvwxyz0123456789ABCDEFG", "wx0123456789abcdef"
# Bytes of WeChat and of TCP are no text; lone surrogates cannot be sent at all.
ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)
WORDS = [
    "/",
    "／",
    "chatgpt",
    "ChatGPT ",
    "stop",
    "clear",
    "/help",
    "/history",
    "/forget",
]
WORDS += [
    "继续",
    "重试",
    "确认删除",
    "接着问",
    "描述这张图",
    "1",
    "３",
    " ",
    "\n",
    "\x00",
    "]]>",
]
WORDS += [
    "<a href='x'>",
    "{tap}",
    "%s",
    "%00",
    "\u200b",
    "\u202e",
    "🙂",
    "é" * 40,
    "字" * 500,
]
COMMANDS = st.lists(st.sampled_from(WORDS), max_size=6).map("".join)
VALUES = st.one_of(ANY_TEXT, COMMANDS, st.integers(-(2**70), 2**70), st.none())
TYPES = ["text", "image", "voice", "video", "location", "link", "event", "odd", ""]
often = examples(
    max_examples=80,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@pytest.fixture
async def server(serve):
    """wxgpt without limits, and an open session of Ann's."""
    no_limits = {"questions_per_day": 0, "all_per_day": 0, "waiting": 1000}
    server = await serve(limits=no_limits, wechat={"attempt_timeout": 30})
    server.wechat.attempt_timeout = 30
    await server.ask("/chatgpt")
    return server


def signed(**more):
    """Return the query of a rightly signed request, another one each time."""
    stamp = str(int(time.time())), str(next(NONCES))
    query = {"timestamp": stamp[0], "nonce": stamp[1], "signature": sign(TOKEN, *stamp)}
    return query | more


def rows(path):
    """Return how many rows each table has."""
    with contextlib.closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as db:
        names = [
            n
            for (n,) in db.execute("SELECT name FROM sqlite_schema WHERE type='table'")
        ]
        return {n: db.execute(f"SELECT count(*) FROM {n}").fetchone()[0] for n in names}


# Properties


@often
@given(
    st.fixed_dictionaries({}, optional=dict.fromkeys(signed(), ANY_TEXT)), st.binary()
)
async def test_nothing_unsigned_gets_in(server, settings, query, body):
    """Any signature, timestamp and nonce that do not fit: 403, nothing stored."""
    before = rows(settings["database"]["path"])
    url = f"{server.url}/wechat"
    async with server.http.post(url, params=query, data=body) as response:
        assert (response.status, await response.read()) == (403, b"")
    async with server.http.get(url, params=query | {"echostr": "x"}) as response:
        assert (response.status, await response.read()) == (403, b"")
    assert rows(settings["database"]["path"]) == before


@given(st.text(), st.text(), st.text(), st.text())
def test_only_the_right_signature_fits(token, timestamp, nonce, other):
    """In any characters; and no other text does."""
    right = wxgpt.signature_of(token, timestamp, nonce)
    assert wxgpt.is_signed(token, right, timestamp, nonce)
    assert not wxgpt.is_signed(token, other, timestamp, nonce) or other == right
    assert (
        not wxgpt.is_signed(token, right.upper(), timestamp, nonce) or right.isdigit()
    )


TAGS = ["ToUserName", "FromUserName", "MsgType", "CreateTime", "MsgId", "Content"]
TAGS += ["Event", "EventKey", "PicUrl", "odd"]


@often
@given(
    st.dictionaries(st.sampled_from(TAGS), VALUES),
    st.sampled_from(TYPES),
    st.booleans(),
)
async def test_any_fields_are_answered(server, fields, msg_type, is_whole):
    """A signed push gets 200 and a reply that the platform reads, or `success`."""
    base = {"FromUserName": ANN, "MsgType": msg_type, "MsgId": random.random()}
    push = server.wechat.raw(ANN, "text", **(fields | base if is_whole else fields))
    response = await server.wechat.post(push, timeout=30)
    assert response.status == 200
    assert response.body == b"success" or response.body.startswith(b"<xml>")


@often
@given(
    st.one_of(ANY_TEXT, COMMANDS, st.binary().map(lambda raw: raw.decode("latin-1")))
)
async def test_any_text_is_answered_in_and_out_of_a_session(server, text):
    """In a session with something, outside with silence or a command's words."""
    for openid in (ANN, BOB):
        seen = await server.ask(text, openid)
        assert not seen.faulty, seen.reason
        assert seen.attempt == 1
    assert (await server.ask("/chatgpt 你好")).text


@given(st.binary(max_size=300))
def test_any_bytes_are_a_message_or_a_bad_one(body):
    """Parsing raises nothing else."""
    with contextlib.suppress(wxgpt.BadMessage):
        wxgpt.parse_message(body)
    head = b'<?xml version="1.0" encoding="'
    with contextlib.suppress(wxgpt.BadMessage):
        wxgpt.parse_message(head + body + b'"?><xml><a>1</a></xml>')


# Odd requests on every route

LONG = "x" * 3000
PLACES = [
    "/",
    "//",
    "/wechat",
    "/wechat/",
    "/wechat//",
    "/a/",
    "/a/x",
    "/a/x/events",
    "/h/x",
]
PLACES += [
    "/healthz",
    "/a/%00",
    "/a/%00/events",
    "/h/%00",
    "/%00",
    "/wechat%00",
    "/a/%ff%fe",
]
PLACES += [
    "/a/%ED%A0%80",
    "/h/%ED%A0%80",
    "/a/%ED%A0%80/events",
    "/h/..%2f..%2fetc",
    "/a/%",
]
PLACES += [
    "/../../etc/passwd",
    f"/a/{LONG}",
    f"/h/{LONG}",
    f"/a/{LONG}/events",
    "/a/%E5%AD%97",
]
PLACES += [
    "/a/字",
    "/a/'--",
    "/%",
    "/a/x?%",
    "/a/;/events",
    "http://evil.example/wechat",
    "*",
]
QUERIES = [
    "",
    f"?signature={LONG}",
    f"?timestamp={LONG}&nonce={LONG}",
    "?" + "a=1&" * 750,
]
QUERIES += [
    "?signature=%ff&timestamp=%00&nonce=%ED%A0%80",
    "?before=%00",
    f"?before={'9' * 3000}",
]
QUERIES += [
    "?signature[]=1&timestamp=1&timestamp=2",
    "?" + "%" * 99,
    f"?echostr={LONG}",
]
METHODS = ["GET", "POST", "HEAD", "PUT", "OPTIONS", "BREW"]
HEADERS = [
    "",
    f"Last-Event-ID: {'9' * 99}:1\r\n",
    "Content-Encoding: gzip\r\n",
    "Cookie: \xff\r\n",
]
HEADERS += [
    "Expect: 100-continue\r\n",
    "Range: bytes=5-1\r\n",
    "Upgrade: h2c\r\n",
    "X" * 3000,
]


async def exchange(port, head, body=b""):
    """Send one request of raw bytes; return the status, 0 if the line was cut."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    with contextlib.closing(writer), contextlib.suppress(ConnectionError):
        writer.write(head.encode("utf-8", "surrogateescape") + body)
        async with asyncio.timeout(60):
            line = await reader.readline()
            return int(line.split()[1]) if line else 0
    return 0


async def in_turns(works):
    """Run coroutines, a bounded number at one time; return their results."""
    slots = asyncio.Semaphore(AT_ONCE)

    async def run(work):
        async with slots:
            return await work

    return await asyncio.gather(*map(run, works))


SAFE_MODE = {"app_id": APP_ID, "aes_key": AES_KEY}


@pytest.mark.parametrize("mode", [{}, SAFE_MODE], ids=["plain", "safe"])
async def test_odd_requests_get_a_refusal_on_every_route(spawn, settings, mode):
    """Every place with every query, and with every method and header; no tracebacks."""
    server, process = await spawn(wechat=mode)
    before = rows(settings["database"]["path"])
    asked = [("GET", place + query, "") for place in PLACES for query in QUERIES]
    asked += [(method, place, "") for place in PLACES for method in METHODS]
    asked += [("GET", place, header) for place in PLACES for header in HEADERS]
    asked += [
        ("POST", "/wechat" + query, header) for query in QUERIES for header in HEADERS
    ]
    head = (
        "{} {} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: 2\r\n{}\r\n"
    )
    made = (exchange(server.port, head.format(*one), b"hi") for one in asked)
    statuses = dict(zip(asked, await in_turns(made)))
    healthy = {one for one, status in statuses.items() if status == 200}
    assert {one for one, status in statuses.items() if status >= 500} == set()
    assert {place.partition("?")[0] for _, place, _ in healthy} == {"/", "/healthz"}
    assert rows(settings["database"]["path"]) == before
    assert not any(line.startswith(("Traceback", "  File")) for line in process.log)


SIGNED = {
    "no gzip": ({"Content-Encoding": "gzip"}, b"hi", 200),
    "no deflate": ({"Content-Encoding": "deflate"}, b"hi", 200),
    "half a gzip": ({"Content-Encoding": "gzip"}, gzip.compress(b"x" * 999)[:-9], 200),
    "a bomb": ({"Content-Encoding": "gzip"}, gzip.compress(b" " * 10**8), 413),
    "too much": ({}, b"x" * 65537, 413),
    "just enough": ({}, b"x" * 65536, 200),
    "nothing": ({}, b"", 200),
    "deep": ({}, b"<xml>" + b"<a>" * 21000, 200),
    "laughs": (
        {},
        b'<!DOCTYPE x [<!ENTITY a "b">]><xml><Content>&a;</Content></xml>',
        200,
    ),
    "an encoding": (
        {},
        b'<?xml version="1.0" encoding="foo"?><xml><a>1</a></xml>',
        200,
    ),
}


def ours(caplog):
    """Return the tracebacks that tell of us, in the process's own judgement."""
    return [
        r.getMessage() for r in caplog.records if r.exc_info and wxgpt.is_our_fault(r)
    ]


@pytest.mark.parametrize("name", SIGNED)
async def test_a_signed_body_of_any_kind_is_taken(server, settings, name, caplog):
    """`success` ends its retries; only what is too long is refused, and none stored."""
    headers, body, status = SIGNED[name]
    before = rows(settings["database"]["path"])
    url = f"{server.url}/wechat"
    async with server.http.post(
        url, params=signed(), data=body, headers=headers
    ) as answer:
        assert answer.status == status
        assert status == 413 or await answer.read() == b"success"
    assert rows(settings["database"]["path"]) == before
    assert ours(caplog) == []


@pytest.mark.parametrize("name", SIGNED)
async def test_an_unsigned_body_of_any_kind_is_refused_in_safe_mode(
    serve, name, caplog
):
    """There, too, the query tells; nothing is read."""
    server = await serve(wechat=SAFE_MODE)
    headers, body, _ = SIGNED[name]
    url = f"{server.url}/wechat?signature=x&timestamp=1&nonce=2&msg_signature=x"
    async with server.http.post(url, data=body, headers=headers) as answer:
        assert answer.status == 403
    assert ours(caplog) == []


# A process under load


def resident(process):
    """Return the memory of a process now, in KiB."""
    status = pathlib.Path(f"/proc/{process.process.pid}/status").read_text()
    return int(re.search(r"VmRSS:\s+(\d+)", status)[1])


def seeds(wechat):
    """Return the bodies that are mutated: one of every kind of push."""
    pushes = [
        wechat.text(ANN, text) for text in ("你好", "/chatgpt", "/history", "继续 3")
    ]
    pushes += [wechat.image(ANN, "http://mmbiz.qpic.cn/x/0"), wechat.voice(BOB)]
    pushes += [
        wechat.event(BOB, name, "k") for name in ("subscribe", "CLICK", "unsubscribe")
    ]
    return [push.xml for push in pushes]


def mutated(chance, body):
    """Return a body with a few bytes replaced, removed, doubled or put in."""
    made = bytearray(body)
    for _ in range(chance.randint(1, 6)):
        at, size = chance.randrange(len(made) + 1), chance.choice((0, 1, 4, 30))
        junk = (
            chance.randbytes(chance.randint(0, 5)),
            b"]]>",
            b"<![CDATA[",
            b"&#0;",
            b"<xml>",
        )
        made[at : at + size] = chance.choice((*junk, bytes(made[at : at + 40])))
    return bytes(made)


async def post_all(server, bodies):
    """Post signed bodies over a few connections; return the statuses that came."""
    url, statuses = f"{server.url}/wechat", set()

    async def post(body):
        query = urllib.parse.urlencode(signed())
        async with server.http.post(f"{url}?{query}", data=body) as response:
            statuses.add((response.status, (await response.read())[:5]))

    await in_turns([post(body) for body in bodies])
    return statuses


def assert_given_back(process, before):
    """Check that memory is about where it was after a first round of the same.

    24 MiB: two or three times what the allocator keeps of a busy moment, and less than
    3 KiB for each of ten thousand requests or 12 KiB for each of two thousand lines.
    """
    assert resident(process) - before < 24 * 1024


async def test_mutated_bodies_are_taken(spawn, pytestconfig):
    """Each gets 200; afterwards it answers as before, in the memory of before.

    Attempts last, else one that a busy machine lets run over is cut, as it should be.
    """
    limits = {"questions_per_day": 0, "all_per_day": 0}
    server, process = await spawn(limits=limits, wechat=PATIENT)
    server.wechat.attempt_timeout = PATIENT["attempt_timeout"]
    chance, originals = random.Random(SEED), seeds(server.wechat)
    await server.ask("/chatgpt")
    bodies = [
        mutated(chance, chance.choice(originals))
        for _ in range(pytestconfig.getoption("mutated"))
    ]
    await post_all(server, bodies[:2000])
    before = resident(process)
    statuses = await post_all(server, bodies[2000:])
    assert statuses <= {(200, b"succe"), (200, b"<xml>")}
    assert_given_back(process, before)
    assert (await server.ask("/chatgpt 还在吗", "oCarol")).text.startswith("你好！")
    assert not any(
        word in line for line in process.log for word in ("Traceback", "broke off")
    )


@contextlib.contextmanager
def many_files(count):
    """Let this process, and those it starts, open so many files."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < count:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(count, hard), hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


STALLS = {
    "no body": "Content-Length: 500\r\n\r\n",
    "half a body": "Content-Length: 500\r\n\r\n<xml>",
    "half a chunk": "Transfer-Encoding: chunked\r\n\r\nff\r\n<xml>",
}
BEGINNINGS = [
    "",
    "GET /healthz HTTP/1.1\r\nHo",
    "POST /wechat HTTP/1.1\r\nContent-Length: 9\r\n",
]


async def stalled(port, rest):
    """Begin a signed push and stop; return the seconds until the line was cut."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    query = urllib.parse.urlencode(signed())
    writer.write(f"POST /wechat?{query} HTTP/1.1\r\nHost: x\r\n{rest}".encode())
    began = time.monotonic()
    with contextlib.closing(writer), contextlib.suppress(ConnectionError):
        async with asyncio.timeout(60):
            assert await reader.read() == b""
    return time.monotonic() - began


async def test_who_holds_connections_holds_nobody_up(spawn):
    """2,000 idle lines and stalled bodies: a question is answered all the while.

    A body gets ten seconds; stalled headers are the proxy's business.
    """
    with many_files(IDLE + 500), contextlib.ExitStack() as held:
        server, process = await spawn(wechat={"attempt_timeout": 30})
        server.wechat.attempt_timeout = 30
        await server.ask("/chatgpt")
        before = resident(process)
        stalls = [
            asyncio.create_task(stalled(server.port, rest)) for rest in STALLS.values()
        ]
        for number in range(IDLE):
            _, writer = await asyncio.open_connection("127.0.0.1", server.port)
            writer.write(BEGINNINGS[number % len(BEGINNINGS)].encode())
            held.callback(writer.close)
        assert (await server.ask("还在吗")).text.startswith("你好！")
        waited = await asyncio.gather(*stalls)
        assert all(seconds > wxgpt.BODY_SECONDS - 1 for seconds in waited)
        assert (await server.ask("现在呢")).text.startswith("你好！")
    assert (await server.get(f"{server.url}/healthz"))[0] == 200
    assert_given_back(process, before)
    assert not any("Traceback" in line for line in process.log)


async def test_a_flood_without_signatures_leaves_nothing(spawn, settings):
    """Thousands of requests, large bodies among them: 403 for each, and no trace."""
    server, process = await spawn()
    await server.ask("/chatgpt")
    query = {"signature": "0" * 40, "timestamp": str(int(time.time())), "nonce": "1"}
    bodies = [b"x" * size for size in (0, 100, 60_000, 200_000)]

    async def knock(number):
        method = "GET" if number % 5 == 0 else "POST"
        data = bodies[number % 4] if method == "POST" else None
        url = f"{server.url}/wechat"
        with contextlib.suppress(
            aiohttp.ClientError
        ):  # it need not read a body to its end
            async with server.http.request(
                method, url, params=query, data=data
            ) as answer:
                return answer.status
        return 403

    await in_turns([knock(number) for number in range(200)])
    before, stored = resident(process), rows(settings["database"]["path"])
    assert set(await in_turns([knock(number) for number in range(2000)])) == {403}
    assert rows(settings["database"]["path"]) == stored
    assert_given_back(process, before)
    assert (await server.ask("还在吗")).text.startswith("你好！")


STRANGER = "POST /wechat?signature={}&timestamp={}&nonce=1&msg_signature=0 HTTP/1.1\r\n"
STRANGER += "Host: x\r\nContent-Length: {}\r\n\r\n"
LINES = 200  # connections of strangers


def unsigned(size, sent=None):
    """Return a request that is not signed, with a body of XML, or its beginning."""
    head = STRANGER.format("0" * 40, int(time.time()), size).encode()
    return (
        head + (b"<xml>" + b"<a>1</a>" * (size // 8))[: size if sent is None else sent]
    )


async def knock_on(port, times):
    """Send unsigned requests over one connection; return the answers' first lines."""
    lines, writer = [], None
    for _ in range(times):
        if writer is None or writer.is_closing():
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(unsigned(60_000))
        lines.append((await reader.readuntil(b"\r\n\r\n")).partition(b"\r")[0])
    writer.close()
    return lines


@pytest.mark.parametrize("mode", [{}, SAFE_MODE], ids=["plain", "safe"])
async def test_strangers_cost_nobody_an_answer(serve, monkeypatch, mode):
    """200 lines with 5,800 requests of 60 KB: no body is read, and everybody answered."""
    served = await serve(wechat=mode | PATIENT)
    read, parsed = [], []
    real_read, real_parse = web.Request.read, wxgpt.parse_message

    async def count_read(request):
        read.append(request)
        return await real_read(request)

    def count_parsed(body):
        parsed.append(body)
        return real_parse(body)

    monkeypatch.setattr(web.Request, "read", count_read)
    monkeypatch.setattr(wxgpt, "parse_message", count_parsed)
    async with platform(served.port, **mode) as server:
        server.wechat.attempt_timeout = PATIENT["attempt_timeout"]
        knocking = [
            asyncio.create_task(knock_on(served.port, 29)) for _ in range(LINES)
        ]
        seen = [await server.ask("/help", f"oAsker{n}") for n in range(20)]
        answers = await asyncio.gather(*knocking)
    assert all(one.attempt == 1 and "/chatgpt" in one.text for one in seen)
    assert {line for lines in answers for line in lines} == {b"HTTP/1.1 403 Forbidden"}
    assert len(read) == len(parsed) == len(seen)


@pytest.mark.parametrize("sent", [0, 100, 60_000])
async def test_a_refused_body_that_does_not_end_ends_its_line(server, sent):
    """What is left of it has a second to come, not the ten that aiohttp gives."""
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    writer.write(unsigned(10**9, sent))
    async with asyncio.timeout(8):
        assert (await reader.readline()).split()[1] == b"403"
        await reader.read()  # to its end
    writer.close()


async def test_unread_bodies_take_little(spawn):
    """400 strangers with 250 KB each, all at the door before the first is refused."""
    server, process = await spawn()
    before, lines = resident(process), []

    async def begin():
        _, writer = await asyncio.open_connection("127.0.0.1", server.port)
        writer.write(unsigned(10**6, 250_000))
        lines.append(writer)

    process.process.send_signal(signal.SIGSTOP)
    with many_files(1000):
        await asyncio.gather(*(begin() for _ in range(400)))
        await asyncio.sleep(0.5)  # for the kernel to take what it will
        process.process.send_signal(signal.SIGCONT)
        assert not (await server.ask("/help")).faulty
    status = pathlib.Path(f"/proc/{process.process.pid}/status").read_text()
    most = int(re.search(r"VmHWM:\s+(\d+)", status)[1])
    assert most - before < 60 * 1024  # it was 100 MB more
    for writer in lines:
        writer.close()


# Combining characters


MARKS = [
    "\u0301\u0323",
    "\u0301",
    "\u3099",
    "\u0301\uff9e",
    "\u0f74\u0f73",
    "\u0345\u0301",
]


def longest_run(text):
    """Return how many marks follow one another once a text is normalised."""
    classes = map(unicodedata.combining, unicodedata.normalize("NFKD", text))
    runs = itertools.groupby(map(bool, classes))
    return max((len(list(run)) for is_mark, run in runs if is_mark), default=0)


@pytest.mark.parametrize("marks", MARKS)
async def test_long_runs_of_marks_are_cut_at_the_door(server, upstream, marks):
    """A question comes with thirty of them, and is asked as usual."""
    await server.ask("/chatgpt a" + marks * 900 + "b")
    [request] = upstream.requests
    run = wxgpt.MARKS_IN_A_ROW
    assert request.question == "a" + (marks * 30)[:run] + "b"


@given(st.text(st.sampled_from("aé字\u0301\u0323\u3099\uff9e\u0f73"), max_size=200))
def test_what_is_stream_safe_has_no_long_run(text):
    """And what has none stays as it is."""
    safe = wxgpt.stream_safe(text)
    assert longest_run(safe) <= 2 * wxgpt.MARKS_IN_A_ROW  # some become two
    assert longest_run(text) > wxgpt.MARKS_IN_A_ROW or safe == text


async def test_a_long_text_is_no_command_and_no_tap(server, upstream):
    """Commands and taps are looked for in 64 characters."""
    for text in (
        "/stop" + " " * 60 + ".",
        "继续" + " " * 60 + "123",
        "/help" + "字" * 60,
    ):
        await server.ask(text)
    assert [request.question for request in upstream.requests] == [
        "/stop" + " " * 60 + ".",
        "继续" + " " * 60 + "123",
        "/help" + "字" * 60,
    ]
    assert said("stopped") in (await server.ask("  " * 60 + "/stop")).text
