"""Pictures: kept for the next question, fetched from allowed hosts only, never stored.

A small host of pictures on loopback plays WeChat's; a path says what it answers.
"""

import asyncio
import base64
import logging

import pytest
from aiohttp import ClientSession, web

import wxgpt
from conftest import ANN, BOB, TEXTS, UNIT, said, shown, with_session
from fake_openai import Script, fails, says
from waiting import within
from wechat import FAULT

MAGIC = {
    "image/jpeg": b"\xff\xd8\xff\xe0",
    "image/png": b"\x89PNG\r\n\x1a\n",
    "image/gif": b"GIF89a",
    "image/webp": b"RIFF\x10\x00\x00\x00WEBP",
}
PNG = MAGIC["image/png"] + b"a picture"
NOT_FETCHED = shown("failed_picture", tap=TEXTS.word_retry)
BLIND = "Invalid content type. image_url is only supported by certain models."


class PictureHost:
    """Serves pictures by path: any name is a PNG unless `bodies` has another body."""

    def __init__(self):
        self.bodies = {}
        self.fetched = []  # paths, in the order they were asked for
        self.now = self.most = 0  # requests at one time
        self.news = asyncio.Condition()
        self.gate = asyncio.Event()  # /held waits for it
        self.is_gone = False  # everything is 404
        self.elsewhere = ""  # where /moved leads to

    def url(self, path, host="127.0.0.1"):
        """Return the URL of a path, by whichever name for the host."""
        return f"http://{host}:{self.port}/{path}"

    async def arrivals(self, count):
        """Wait until so many requests have come."""
        async with self.news:
            come = self.news.wait_for(lambda: len(self.fetched) >= count)
            await within(30, f"{count} requests for pictures", come)

    async def answer(self, request):
        """Answer one request."""
        path = request.match_info["path"]
        self.now += 1
        self.most = max(self.most, self.now)
        async with self.news:
            self.fetched.append(path)
            self.news.notify_all()
        try:
            return await self.body_of(path)
        finally:
            self.now -= 1

    async def body_of(self, path):
        """Return the response that a path stands for."""
        if path.startswith("held"):
            await within(60, "opening of the gate", self.gate.wait())
        if path.startswith("moved"):
            return web.Response(status=302, headers={"Location": self.elsewhere})
        if self.is_gone or path == "missing":
            return web.Response(status=404)
        body = self.bodies.get(path, PNG + path.encode())
        return web.Response(body=body, content_type="application/octet-stream")


@pytest.fixture
async def host():
    """A host of pictures."""
    host, app = PictureHost(), web.Application()
    app.router.add_get("/{path:.*}", host.answer)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    host.port = runner.addresses[0][1]
    yield host
    host.gate.set()
    await runner.cleanup()


HOSTS = {"picture_hosts": ["127.0.0.1", "localhost"]}


@pytest.fixture
def changes():
    """The server may fetch from loopback."""
    return {"wechat": HOSTS}


async def send(server, url, openid=ANN):
    """Let a subscriber send a picture; return what they saw."""
    return await server.wechat.deliver(server.wechat.image(openid, url))


def pictures_of(asked):
    """Return the pictures that came with a question, as pairs of kind and bytes."""
    content = asked.messages[-1]["content"]
    parts = content if isinstance(content, list) else []
    urls = [part["image_url"]["url"] for part in parts if part["type"] == "image_url"]
    pairs = [url.removeprefix("data:").split(";base64,") for url in urls]
    return [(kind, base64.b64decode(body)) for kind, body in pairs]


# Kept for a question


async def test_a_picture_in_a_session_is_answered_with_a_tap(server, upstream, host):
    """描述这张图 is offered; nothing is fetched or asked before a question comes."""
    seen = await send(server, host.url("png"))
    assert seen.text == "图收到了，想问什么？十分钟内发问题就行。\n描述这张图"
    assert [tap.content for tap in seen.taps] == ["描述这张图"]
    assert upstream.requests == [] and host.fetched == []


async def test_the_tap_asks_about_the_picture(server, upstream, host):
    """The model gets the words, without our mark, and the picture inlined."""
    seen = await send(server, host.url("png"))
    upstream.will(says("一只猫。"))
    answered = await server.wechat.tap(ANN, seen.taps[0])
    assert answered.text.startswith("一只猫。")
    [words, picture] = upstream.requests[0].messages[-1]["content"]
    assert words == {"type": "text", "text": "描述这张图"}
    url = "data:image/png;base64," + base64.b64encode(PNG + b"png").decode()
    assert picture == {"type": "image_url", "image_url": {"url": url, "detail": "low"}}


@pytest.mark.parametrize("kind", MAGIC)
async def test_the_kind_of_a_picture_is_seen_in_its_bytes(server, upstream, host, kind):
    """Neither the name nor the header of the host counts."""
    host.bodies["x.txt"] = MAGIC[kind] + b"picture"
    await send(server, host.url("x.txt"))
    await server.ask("这是什么？")
    assert pictures_of(upstream.requests[0]) == [(kind, MAGIC[kind] + b"picture")]


async def test_the_newest_four_pictures_go_along_in_order(server, upstream, host):
    """Of five the oldest is left out."""
    for number in range(5):
        await send(server, host.url(f"p{number}"))
    await server.ask("有什么不同？")
    names = [body.removeprefix(PNG) for _, body in pictures_of(upstream.requests[0])]
    assert names == [b"p1", b"p2", b"p3", b"p4"]


@pytest.mark.parametrize(("seconds", "count"), [(540, 1), (601, 0)])
async def test_a_picture_waits_ten_minutes(
    server, upstream, host, database, seconds, count
):
    """Later the question goes alone."""
    await send(server, host.url("png"))
    database("UPDATE picture SET created_at = created_at - ?", seconds)
    await server.ask("这是什么？")
    assert len(pictures_of(upstream.requests[0])) == count


async def test_a_picture_goes_with_one_question_only(server, upstream, host):
    """The next question has none, and its context names the picture by our mark."""
    await send(server, host.url("png"))
    upstream.will(says("一只猫。"))
    await server.ask("这是什么？")
    await server.ask("它几岁？")
    assert upstream.requests[1].messages[-3:] == [
        {"role": "user", "content": "[图片]这是什么？"},
        {"role": "assistant", "content": "一只猫。"},
        {"role": "user", "content": "它几岁？"},
    ]


async def test_the_pages_name_pictures_by_our_mark(server, upstream, host):
    """Answer page and history say [图片] and load nothing."""
    await send(server, host.url("png"))
    upstream.will(says("| 猫 | 狗 |\n|---|---|\n| 一 | 二 |"))
    links = (await server.ask("这是什么？")).links
    links += (await server.ask("/history")).links
    assert len(links) == 2
    for _, link in links:
        page = (await server.get(link))[1]
        assert "[图片]这是什么？" in page and "127.0.0.1" not in page


async def test_nothing_of_a_picture_is_left_after_the_answer(server, host, stored):
    """Neither its URL nor its bytes are in the database."""
    await send(server, host.url("secretname"))
    assert "secretname" in stored()
    await server.ask("这是什么？")
    await server.ask("/help")
    assert "secretname" not in stored() and "base64" not in stored()
    assert "[图片]这是什么？" in stored()


async def test_commands_leave_a_waiting_picture_alone(server, upstream, host):
    """Only a question takes it along; another subscriber's does not."""
    await send(server, host.url("png"))
    await server.ask("/help")
    await server.ask("/chatgpt 你好", BOB)
    await server.ask("这是什么？")
    counts = [len(pictures_of(asked)) for asked in upstream.requests]
    assert counts == [0, 1]


async def test_a_picture_outside_a_session_is_left_alone(serve, host, stored):
    """Silence, and nothing is stored."""
    server = await serve(wechat=HOSTS, session={"auto_open": True})
    seen = await send(server, host.url("secretname"))
    assert seen.body == b"success"
    assert "secretname" not in stored() and ANN not in stored()


async def test_a_copy_of_a_picture_is_one_picture(server, upstream, host):
    """The attempts of one message keep it once, and get the same bytes."""
    push = server.wechat.image(ANN, host.url("png"))
    first, again = await server.wechat.deliver(push), await server.wechat.deliver(push)
    await server.ask("这是什么？")
    assert first.body == again.body
    assert len(pictures_of(upstream.requests[0])) == 1


async def test_a_picture_without_a_url_is_politely_refused(server, upstream):
    """It is no picture that could be shown to a model."""
    seen = await server.wechat.deliver(server.wechat.image(ANN, "", PicUrl=None))
    assert seen.text.startswith("现在只看得懂文字和图片")


async def test_three_pictures_are_fetched_at_one_time(server, upstream, host):
    """Two subscribers with four each: never more than three are on their way."""
    await server.ask("/chatgpt", BOB)
    for openid in (ANN, BOB):
        for number in range(4):
            await send(server, host.url(f"held{openid}{number}"), openid)
    asking = [asyncio.create_task(server.ask("看看", who)) for who in (ANN, BOB)]
    await host.arrivals(3)
    await server.get(server.url + "/healthz")
    host.gate.set()
    await within(30, "answers to both", asyncio.gather(*asking))
    assert host.most == 3 and len(host.fetched) == 8
    assert [len(pictures_of(asked)) for asked in upstream.requests] == [4, 4]


async def test_a_tap_twice_asks_about_the_picture_once(server, upstream, host):
    """The same words again while the answer is written join the first."""
    seen, gate = await send(server, host.url("png")), asyncio.Event()
    upstream.will(Script([gate, "一只猫。"]))
    first = asyncio.create_task(server.wechat.tap(ANN, seen.taps[0]))
    await upstream.arrival("描述这张图")
    push = server.wechat.text(ANN, "描述这张图")
    assert await server.wechat.attempt(push, UNIT / 2) is None
    gate.set()
    assert (await first).text.startswith("一只猫。")
    assert (await server.wechat.attempt(push)).text.startswith("一只猫。")
    assert len(upstream.requests) == 1


async def test_the_same_words_about_another_picture_are_a_new_question(
    server, upstream, host
):
    """A second picture and the second tap on 描述这张图 belong together."""
    gate = asyncio.Event()
    upstream.will(Script([gate, "一只猫。"]))
    for name in ("cat", "dog"):
        seen = await send(server, host.url(name))
        push = server.wechat.text(ANN, seen.taps[0].content)
        assert await server.wechat.attempt(push) is None
    gate.set()
    await upstream.arrival("描述这张图", 2)
    assert pictures_of(upstream.requests[1]) == [("image/png", PNG + b"dog")]


async def test_a_refused_question_leaves_the_picture_waiting(serve, upstream, host):
    """Too long a question costs neither a call nor the picture."""
    server = await with_session(serve, wechat=HOSTS, limits={"question_chars": 5})
    await send(server, host.url("png"))
    assert (await server.ask("一二三四五六")).text.startswith("问题太长了")
    await server.ask("一二三四五")
    assert len(pictures_of(upstream.requests[0])) == 1


async def test_a_picture_may_be_sent_to_any_assistant(serve, settings, upstream, host):
    """What waits goes with the next question, whoever is asked."""
    other = settings["assistants"]["chatgpt"] | {"model": "bean"}
    server = await with_session(serve, wechat=HOSTS, assistants={"豆包": other})
    await send(server, host.url("png"))
    await server.ask("/豆包 这是什么？")
    assert upstream.requests[0].body["model"] == "bean"
    assert len(pictures_of(upstream.requests[0])) == 1


# What cannot be fetched


REFUSED = {
    "a host that ends like an allowed one": ("http://evillocalhost:{port}/png", "host"),
    "a host below an allowed one": ("http://evil.localhost:{port}/png", "host"),
    "a host that begins like one": ("http://localhost.example:{port}/png", "host"),
    "an allowed name before an at": ("http://127.0.0.1@127.0.0.2:{port}/png", "host"),
    "another spelling of the number": ("http://2130706433:{port}/png", "host"),
    "ftp": ("ftp://127.0.0.1:{port}/png", "host"),
    "file": ("file:///etc/passwd", "host"),
    "file with a host": ("file://localhost/etc/passwd", "host"),
    "no URL": ("png", "host"),
    "a data URL": ("data:image/png;base64,AAAA", "host"),
    "a broken host": ("http://[127.0.0.1/png", "not fetched"),
    "a port that is none": ("http://127.0.0.1:99999/png", "not fetched"),
    "a closed port": ("http://127.0.0.1:1/png", "not fetched"),
    "https where none is spoken": ("https://127.0.0.1:{port}/png", "not fetched"),
    "10 MB": ("http://127.0.0.1:{port}/large", "larger than 4 MB"),
    "one byte too many": ("http://127.0.0.1:{port}/brim", "larger than 4 MB"),
    "a redirect to 127.0.0.1": ("http://127.0.0.1:{port}/moved", "status 302"),
    "HTML": ("http://127.0.0.1:{port}/html", "neither JPEG"),
    "SVG": ("http://127.0.0.1:{port}/svg", "neither JPEG"),
    "nothing": ("http://127.0.0.1:{port}/empty", "neither JPEG"),
    "404": ("http://127.0.0.1:{port}/missing", "status 404"),
}
BODIES = {
    "large": MAGIC["image/jpeg"] + bytes(10 * 2**20),
    "brim": (PNG + bytes(4 * 2**20))[: 4 * 2**20 + 1],
    "html": b"<!doctype html><title>Not found</title>",
    "svg": b"<svg xmlns='http://www.w3.org/2000/svg'></svg>",
    "empty": b"",
}


@pytest.mark.parametrize("name", REFUSED)
async def test_what_is_no_picture_of_an_allowed_host_is_not_fetched(host, name):
    """An error without the URL, and nothing was asked for that is not allowed."""
    host.bodies |= BODIES
    host.elsewhere = host.url("png")
    url, words = REFUSED[name]
    async with ClientSession() as http:
        pictures = wxgpt.Pictures(tuple(HOSTS["picture_hosts"]), http)
        with pytest.raises(wxgpt.ChatError) as failed:
            await pictures.fetch(url.format(port=host.port))
    line = str(failed.value)
    assert (
        failed.value.kind == "picture" and words in line and "png" not in host.fetched
    )
    assert "/png" not in line and str(host.port) not in line


@pytest.mark.parametrize(
    "name",
    ["file", "a closed port", "one byte too many", "a redirect to 127.0.0.1", "HTML"],
)
async def test_what_is_no_picture_of_an_allowed_host_is_politely_refused(
    server, upstream, host, stored, database, caplog, name
):
    """A sentence, a line in the log without the URL, no call, no bytes stored."""
    host.bodies |= BODIES
    host.elsewhere = host.url("png")
    url, words = REFUSED[name]
    await send(server, url.format(port=host.port))
    assert (await server.ask("这是什么？")).text == NOT_FETCHED
    [line] = [r.message for r in caplog.records if "failed: picture" in r.message]
    assert words in line and "/png" not in line and str(host.port) not in line
    assert upstream.requests == [] and "png" not in host.fetched
    assert "base64" not in stored().replace(url, "")
    assert database("SELECT state, answer FROM turn") == [("failed", "")]


async def test_a_redirect_to_another_port_is_not_followed(server, upstream, host):
    """What listens there is not for subscribers: nobody connects to it."""
    reached = []
    inner = await asyncio.start_server(
        lambda *line: reached.append(line), "127.0.0.1", 0
    )
    async with inner:
        port = inner.sockets[0].getsockname()[1]
        host.elsewhere = f"http://127.0.0.1:{port}/admin"
        await send(server, host.url("moved"))
        assert (await server.ask("这是什么？")).text == NOT_FETCHED
    assert reached == [] and upstream.requests == []


async def test_a_picture_of_four_megabytes_is_taken(server, upstream, host):
    """The limit itself is allowed."""
    host.bodies["brim"] = (PNG + bytes(4 * 2**20))[: 4 * 2**20]
    await send(server, host.url("brim"))
    await server.ask("这是什么？")
    assert len(pictures_of(upstream.requests[0])[0][1]) == 4 * 2**20


async def test_whatever_breaks_the_question_ends(
    server, upstream, database, host, monkeypatch
):
    """A fault of ours is a polite word, and the turn is over in the database, too."""
    monkeypatch.delattr(wxgpt.Pictures, "fetch")
    await send(server, host.url("png"))
    assert (await server.ask("这是什么？")).text.startswith("服务器这会儿有点忙")
    await server.ask("你好")
    states = database("SELECT state, reason FROM turn ORDER BY id")
    assert states[0] == ("failed", "trouble")


async def test_a_host_that_hangs_is_given_up(
    server, upstream, host, caplog, monkeypatch
):
    """The subscriber is told after a while, not left waiting."""
    monkeypatch.setattr(wxgpt, "PICTURE_TIMEOUT", UNIT / 3)
    await send(server, host.url("held"))
    assert (await server.ask("这是什么？")).text == NOT_FETCHED
    assert "failed: picture: not fetched: TimeoutError" in caplog.text
    assert upstream.requests == []


async def test_waiting_for_others_is_not_counted_as_hanging(
    server, upstream, host, monkeypatch
):
    """A fourth picture has its own time, once the first three are there."""
    monkeypatch.setattr(wxgpt, "PICTURE_TIMEOUT", UNIT * 5)
    for number in range(4):
        await send(server, host.url(f"held{number}"))
    assert said("thinking") in (await server.ask("这是什么？")).text
    host.gate.set()
    assert len(pictures_of(await upstream.arrival())) == 4


async def test_one_bad_picture_of_four_fails_the_question(server, upstream, host):
    """The model is not asked about half of what was sent."""
    for name in ("a", "missing", "b"):
        await send(server, host.url(name))
    assert (await server.ask("有什么不同？")).text == NOT_FETCHED
    assert upstream.requests == []


async def test_a_retry_brings_the_picture_again(server, upstream, host, stored):
    """重试 after the host was away asks the same words with the same picture."""
    host.is_gone = True
    await send(server, host.url("png"))
    await server.ask("这是什么？")
    host.is_gone = False
    assert (await server.ask("重试")).text.startswith("你好！关于「这是什么？」")
    assert pictures_of(upstream.requests[0]) == [("image/png", PNG + b"png")]
    assert upstream.requests[0].question == "这是什么？"
    assert "[图片][图片]" not in stored()


async def test_a_retry_of_the_longest_question_is_not_too_long(serve, upstream, host):
    """Our mark before the words does not count among their characters."""
    server = await with_session(serve, wechat=HOSTS, limits={"question_chars": 5})
    host.is_gone = True
    await send(server, host.url("png"))
    assert (await server.ask("一二三四五")).text == NOT_FETCHED
    host.is_gone = False
    assert (await server.ask("重试")).text.startswith("你好！关于「一二三四五」")


async def test_a_retry_after_the_model_failed_brings_the_picture(
    server, upstream, host
):
    """The tap under a failure of the upstream, too."""
    await send(server, host.url("png"))
    upstream.will(fails(401))
    failed = await server.ask("这是什么？")
    await server.wechat.tap(ANN, failed.taps[-1])
    assert [len(pictures_of(asked)) for asked in upstream.requests] == [1, 1]


async def test_a_model_that_cannot_see_says_so(server, upstream, host, caplog):
    """A 400 that names image_url is no mystery to the subscriber."""
    await send(server, host.url("png"))
    upstream.will(fails(400, message=BLIND))
    seen = await server.ask("这是什么？")
    assert said("failed_blind") in seen.text
    assert "failed: blind" in caplog.text and BLIND not in caplog.text
    assert len(upstream.requests) == 1


async def test_an_answer_that_was_stopped_keeps_no_picture(
    serve, upstream, host, tmp_path, stored
):
    """What will not be asked again needs no URL any more."""
    (tmp_path / "words.txt").write_text("坏词", "utf-8")
    server = await with_session(
        serve, wechat=HOSTS, limits={"blocked_words": str(tmp_path / "words.txt")}
    )
    await send(server, host.url("secretname"))
    upstream.will(says("图上有坏词。"))
    await server.ask("这是什么？")
    await server.ask("/help")
    assert "secretname" not in stored()


async def test_a_picture_question_survives_a_kill(spawn, upstream, host):
    """It is asked again by itself with its picture, and only then let go."""
    server, process = await spawn(wechat=HOSTS)
    gate = asyncio.Event()
    upstream.will(Script([gate, "一只猫。"]))
    await server.ask("/chatgpt")
    await send(server, host.url("png"))
    push = server.wechat.text(ANN, "这是什么？")
    assert await server.wechat.attempt(push) is None
    await process.kill()
    upstream.will(says("还是一只猫。"))
    await process.start()
    assert (await server.wechat.deliver(push)).text.startswith("还是一只猫。")
    assert [len(pictures_of(asked)) for asked in upstream.requests] == [1, 1]
    gate.set()


async def test_a_waiting_picture_survives_a_kill(spawn, upstream, host):
    """It waits in the database."""
    server, process = await spawn(wechat=HOSTS)
    await server.ask("/chatgpt")
    await send(server, host.url("png"))
    await process.kill()
    await process.start()
    assert (await server.ask("这是什么？")).text != FAULT
    assert len(pictures_of(upstream.requests[0])) == 1


async def test_the_log_has_a_line_for_a_picture_and_never_its_url(server, host, caplog):
    """MsgId and outcome, as for every message."""
    caplog.set_level(logging.INFO, "wxgpt")
    push = server.wechat.image(ANN, host.url("secretname"))
    await server.wechat.deliver(push)
    await server.ask("这是什么？")
    assert f"msg={push.fields['MsgId']} from={ANN[:8]} attempt=1 replied" in caplog.text
    assert "secretname" not in caplog.text
