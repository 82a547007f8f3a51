"""The two simulators behave like the platform and the chat API they stand for."""

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import openai
import pytest
from aiohttp import web
from openai.types.chat import ChatCompletionChunk, ChatCompletionMessageParam

from conftest import UNIT, serving
from fake_openai import FakeOpenAI, Script, Thought, fails, says
from waiting import within
from wechat import (
    FAULT,
    BadReply,
    Crypt,
    Push,
    Seen,
    Value,
    WeChat,
    parse_tap,
    parse_xml,
    sign,
)

ANNA = "oQx7Zt1BvK9mHdLr3PwYc8SgNf20"
TOKEN = "a-token"
AES = {"app_id": "wx5823bf96d3bd56c7", "aes_key": "abcdefghij" * 4 + "ABC"}
CJK = "你好，世界！👩‍🚀 C++ & 50%\n第二行 🀄"
QUESTION: list[ChatCompletionMessageParam] = [
    {"role": "user", "content": "天气怎么样？"}
]
ONCE: dict[str, Any] = {"max_retries": 0, "timeout": 30}  # the SDK has ten minutes
SECOND = 0.5 * UNIT  # one attempt of the platform where an attempt has to run out

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@contextlib.asynccontextmanager
async def platform(*replies: Handler, **options: Any) -> AsyncIterator[WeChat]:
    """Connect a platform to a server with these replies, the last one for ever."""
    left = list(replies)

    async def answer(request: web.Request) -> web.StreamResponse:
        reply = left.pop(0) if len(left) > 1 else left[0]
        return await reply(request)

    hasty: dict[str, Any] = {"handler_cancellation": True, "shutdown_timeout": 0.1}
    async with serving(answer, **hasty) as port:
        async with WeChat(
            f"http://127.0.0.1:{port}/wechat", TOKEN, **options
        ) as wechat:
            yield wechat


def reply_to(push: dict[str, str], content: str, **changes: str) -> bytes:
    """Return a passive reply to a push, with some fields changed."""
    fields = {
        "ToUserName": push["FromUserName"],
        "FromUserName": push["ToUserName"],
        "CreateTime": str(int(time.time())),
        "MsgType": "text",
        "Content": content,
    } | changes
    return Push(fields).xml


def replying(content: str, **changes: str) -> Handler:
    """Make a handler that gives a passive reply, with some fields changed."""

    async def answer(request: web.Request) -> web.Response:
        push = parse_xml(await request.read())
        return web.Response(body=reply_to(push, content, **changes))

    return answer


def saying(text: str, status: int = 200) -> Handler:
    """Make a handler that answers with this body."""

    async def answer(request: web.Request) -> web.Response:
        return web.Response(text=text, status=status)

    return answer


async def silent(request: web.Request) -> web.Response:
    """Never answer."""
    await asyncio.get_running_loop().create_future()
    return web.Response()


async def cut(request: web.Request) -> web.Response:
    """Close the connection instead of answering."""
    assert request.transport
    request.transport.abort()
    return await silent(request)


def outcomes(seen: Seen) -> list[str]:
    """Return how the requests of a delivery ended."""
    return [attempt.outcome for attempt in seen.attempts]


@pytest.fixture
async def fake() -> AsyncIterator[FakeOpenAI]:
    """Run a fake chat API."""
    async with FakeOpenAI() as server:
        yield server


@pytest.fixture
async def client(fake: FakeOpenAI) -> AsyncIterator[openai.AsyncOpenAI]:
    """Point the real SDK at the fake."""
    url, key = fake.base_url, "sk-test"
    async with openai.AsyncOpenAI(base_url=url, api_key=key, **ONCE) as sdk:
        yield sdk


async def ask(client: openai.AsyncOpenAI) -> AsyncIterator[ChatCompletionChunk]:
    """Yield the chunks that the SDK makes of a streamed answer."""
    stream = await client.chat.completions.create(
        model="m",
        messages=QUESTION,
        stream=True,
        stream_options={"include_usage": True},
    )
    async for chunk in stream:
        yield chunk


async def answer_to(client: openai.AsyncOpenAI) -> str:
    """Return the whole text of a streamed answer."""
    chunks = [chunk async for chunk in ask(client)]
    deltas = [choice.delta for chunk in chunks for choice in chunk.choices]
    return "".join(delta.content or "" for delta in deltas)


async def test_what_does_not_come_in_time_fails_in_words():
    """A time limit of somebody else's stays what it is."""
    with pytest.raises(AssertionError, match=r"^no bus within 0\.01 s$"):
        await within(0.01, "bus", asyncio.Event().wait())
    with pytest.raises(TimeoutError):
        await within(30, "bus", asyncio.wait_for(asyncio.Event().wait(), 0.01))


# ---------------------------------------------------------------- the fake chat API


@pytest.mark.parametrize(
    "form",
    [
        {},
        {"crlf": True},
        {"shred": 3},
        {"shred": 3, "crlf": True, "comments": True},
        {"comments": True},
        {"gzip": True},
        {"rate": 1000.0},
        {"ending": "finish"},
        {"ending": "eof"},
    ],
    ids=str,
)
async def test_the_sdk_reads_the_whole_answer_in_every_wire_form(fake, client, form):
    """Line ends, torn characters, comments and coding do not change the text."""
    fake.will(Script(CJK, **form))
    assert await answer_to(client) == CJK
    assert fake.requests[0].outcome == "finished"


async def test_an_unscripted_question_gets_an_answer_that_quotes_it(fake, client):
    """With no script left the default answers, and the request is on record."""
    assert "天气怎么样？" in await answer_to(client)
    assert fake.asked("天气")[0].messages == QUESTION
    assert fake.asked("天气")[0].headers["Authorization"] == "Bearer sk-test"


async def test_scripts_are_taken_in_order_if_the_question_fits(fake, client):
    """A script for other questions is left in the queue."""
    fake.will("股市", when="股票")
    fake.will("一", "二")
    assert [await answer_to(client) for _ in range(2)] == ["一", "二"]


async def test_usage_comes_last_and_counts_deltas(fake, client):
    """The usage chunk has no choices."""
    fake.will(Script(["一", "二", "三"]))
    *_, last = [chunk async for chunk in ask(client)]
    assert last.choices == []
    assert (last.usage.prompt_tokens, last.usage.completion_tokens) == (6, 3)


async def test_hidden_reasoning_is_not_part_of_the_answer(fake, client):
    """A thought arrives as reasoning_content, beside an empty content."""
    fake.will(Script([Thought("想想"), "晴"]))
    deltas = [c.choices[0].delta async for c in ask(client) if c.choices]
    assert [getattr(delta, "reasoning_content", None) for delta in deltas][1] == "想想"
    assert "".join(delta.content or "" for delta in deltas) == "晴"


async def test_a_cut_answer_says_so_in_its_finish_reason(fake, client):
    """The finish reason is the script's."""
    fake.will(Script("长", finish="length"))
    finishes = [c.choices[0].finish_reason async for c in ask(client) if c.choices]
    assert finishes[-1] == "length"


async def test_a_stream_may_be_answered_with_one_json_body(fake, client):
    """The SDK finds no events in it."""
    fake.will(Script("整段", streamed=False))
    assert await answer_to(client) == ""


async def test_a_question_without_stream_gets_the_whole_answer(fake, client):
    """One JSON body, with its usage."""
    fake.will(says("整段"))
    reply = await client.chat.completions.create(model="m", messages=QUESTION)
    assert reply.choices[0].message.content == "整段"
    assert reply.usage.completion_tokens == 2


@pytest.mark.parametrize(
    ("script", "error"),
    [
        (fails(429, retry_after=1), openai.RateLimitError),
        (fails(400, code="context_length_exceeded"), openai.BadRequestError),
        (fails(401), openai.AuthenticationError),
        (fails(503), openai.InternalServerError),
        (Script(status=502, body="<html>Bad</html>"), openai.InternalServerError),
        (Script("半", ending="error"), openai.APIError),
        (Script("半", ending="bad json"), json.JSONDecodeError),
        (Script(ending="reset", headless=True), openai.APIConnectionError),
    ],
)
async def test_a_failure_comes_out_as_the_sdks_own_error(fake, client, script, error):
    """Before the answer or inside it, the SDK knows what it is."""
    fake.will(script)
    with pytest.raises(error):
        await answer_to(client)


async def test_an_error_has_the_fields_of_openais(fake, client):
    """Code, type and Retry-After are where the SDK looks for them."""
    fake.will(fails(429, retry_after=1.5, code="slow_down"))
    with pytest.raises(openai.RateLimitError) as caught:
        await answer_to(client)
    assert caught.value.code == "slow_down"
    assert caught.value.response.headers["Retry-After"] == "1.5"


@pytest.mark.parametrize("ending", ["reset", "cut"])
async def test_a_broken_connection_breaks_the_stream_after_what_was_said(
    fake, client, ending
):
    """The client has the first words when the connection goes."""
    said = asyncio.Event()
    fake.will(Script(["半句", said], ending=ending))
    chunks = ask(client)
    words = [(await anext(chunks)).choices[0].delta.content for _ in range(2)]
    said.set()
    with pytest.raises(openai.APIConnectionError):
        await anext(chunks)
    assert words == ["", "半句"]


async def test_an_event_holds_the_model_until_it_is_set(fake, client):
    """Nothing ends before the test says so."""
    go = asyncio.Event()
    fake.will(Script([go, "好"]))
    task = asyncio.create_task(answer_to(client))
    asked = await fake.arrival("天气")
    assert asked.outcome == "running"
    go.set()
    assert await within(30, "answer", task) == "好"


@pytest.mark.parametrize("headless", [True, False])
async def test_a_client_that_hangs_up_is_noted_at_once(fake, client, headless):
    """The record tells it from an answer that was played to its end."""
    fake.will(Script("半", ending="hang", headless=headless))
    task = asyncio.create_task(answer_to(client))
    asked = await fake.arrival()
    task.cancel()
    await asked.wait_over()
    assert asked.outcome == "cut by client"


async def test_closing_the_fake_ends_what_hangs():
    """Neither the fake nor its client waits for ever."""
    async with FakeOpenAI(default=Script("半", ending="hang")) as fake:
        sdk = openai.AsyncOpenAI(base_url=fake.base_url, api_key="k", **ONCE)
        task = asyncio.create_task(answer_to(sdk))
        asked = await fake.arrival()
    assert asked.outcome == "cut by fake"
    with pytest.raises(openai.APIConnectionError):
        await within(30, "end", task)
    await sdk.close()


@pytest.mark.parametrize(
    "request_",
    [
        {"model": "m", "messages": []},
        {"model": "m", "messages": [{"role": "wizard", "content": "x"}]},
        {"model": "m", "messages": [{"role": "user", "content": None}]},
    ],
)
async def test_a_request_that_openai_would_refuse_is_refused(fake, client, request_):
    """What is at fault in itself takes no script and leaves no record."""
    with pytest.raises(openai.BadRequestError):
        await client.chat.completions.create(**request_)
    assert fake.requests == []


# ------------------------------------------------------------------- the platform

# One without a server, whose phone only reads.
WECHAT = WeChat("http://unused", TOKEN)
PUSH = WECHAT.text(ANNA, "在吗")
FIELDS = parse_xml(PUSH.xml)


@pytest.mark.parametrize(
    ("parts", "signature"),
    [
        (
            ("AAAAA", "1714037059", "486452656"),
            "899cf89e464efb63f54ddac96b0a0a235f53aa78",
        ),
        (
            ("AAAAA", "1714036504", "1514711492"),
            "f464b24fc39322e44b38aa78f5edd27bd1441696",
        ),
    ],
)
def test_signatures_are_the_official_ones(parts, signature):
    """The examples of the platform's own documentation."""
    assert sign(*parts) == signature


async def test_a_reply_is_shown():
    """One request, its text exact, and the record of it."""
    async with platform(replying(" 饺子 & ]]> 面\n ")) as wechat:
        seen = await wechat.send(ANNA, "今天吃什么？")
    assert (seen.text, seen.faulty, seen.attempt) == (" 饺子 & ]]> 面\n ", False, 1)
    assert outcomes(seen) == ["answered"]


@pytest.mark.parametrize("body", ["success", ""])
async def test_success_and_nothing_are_silence(body):
    """The subscriber sees nothing and no second request is made."""
    async with platform(saying(body)) as wechat:
        seen = await wechat.send(ANNA, "在吗")
    assert (seen.text, seen.faulty, seen.attempt) == (None, False, 1)


async def test_a_silent_server_gets_three_requests_and_the_subscriber_the_fault_text():
    """Each begins when the one before ran out, and carries the same message."""
    told = []

    def tell(number: int, event: str, seconds: float) -> None:
        told.append((number, event))

    async with platform(silent, attempt_timeout=SECOND, on_attempt=tell) as wechat:
        seen = await wechat.send(ANNA, "在吗")
    assert (seen.text, seen.faulty, seen.attempt) == (FAULT, True, 0)
    assert outcomes(seen) == ["timeout"] * 3
    assert seen.seconds >= 2.9 * SECOND
    assert told == [(n, event) for n in (1, 2, 3) for event in ("posted", "timeout")]


async def test_every_attempt_is_the_same_message_newly_signed():
    """The body is repeated, nonce and signature are not."""
    bodies, nonces = set(), set()

    async def collect(request: web.Request) -> web.StreamResponse:
        bodies.add(await request.read())
        nonces.add(request.query["nonce"])
        return await saying("no", status=500)(request)

    async with platform(collect) as wechat:
        await wechat.send(ANNA, "在吗")
    assert (len(bodies), len(nonces)) == (1, 4)


async def test_the_platform_hangs_up_when_the_attempt_is_over():
    """The connection is closed, not merely forgotten."""
    closed = asyncio.Event()

    async def wait(request: web.Request) -> web.StreamResponse:
        try:
            return await silent(request)
        finally:
            closed.set()

    async with platform(wait, attempt_timeout=4 * UNIT) as wechat:
        assert await wechat.attempt(wechat.text(ANNA, "在吗")) is None
        await within(5, "end of the connection", closed.wait())


async def test_a_late_attempt_may_still_be_answered():
    """The reply to the third request is shown."""
    replies = (silent, silent, replying("来了"))
    async with platform(*replies, attempt_timeout=2 * SECOND) as wechat:
        seen = await wechat.send(ANNA, "在吗")
    assert (seen.text, seen.attempt) == ("来了", 3)
    assert seen.attempts[2].started >= seen.attempts[1].ended


@pytest.mark.parametrize(
    ("reply", "outcome"), [(saying("x", status=500), "status 500"), (cut, "reset")]
)
async def test_what_fails_at_once_is_sent_four_times_in_all(reply, outcome):
    """A status other than 200 or a broken connection does not end it."""
    async with platform(reply) as wechat:
        seen = await wechat.send(ANNA, "在吗")
    assert outcomes(seen) == [outcome] * 4
    assert seen.text == FAULT


async def test_a_refused_connection_counts_as_a_request():
    """Nobody listens there any more."""
    async with platform(silent) as gone:
        url = gone.url
    async with WeChat(url, TOKEN, refused_pause=0.01) as wechat:
        seen = await wechat.send(ANNA, "在吗")
    assert outcomes(seen) == ["refused"] * 4


def test_the_longest_reply_has_2048_bytes():
    """Content is counted in UTF-8, and not cut."""
    fits = WECHAT.read(PUSH, reply_to(FIELDS, "字" * 682 + "ab"))
    too_long = WECHAT.read(PUSH, reply_to(FIELDS, "字" * 683))
    assert fits.text == "字" * 682 + "ab"
    assert (too_long.text, too_long.reason) == (FAULT, "Content has 2049 bytes")


@pytest.mark.parametrize(
    "body",
    [
        b"<xml>",
        b'{"text": "hi"}',
        b"success\n",
        reply_to(FIELDS, ""),
        reply_to(FIELDS, "x", ToUserName="somebody"),
        reply_to(FIELDS, "x", FromUserName=""),
        reply_to(FIELDS, "x", MsgType="image"),
        reply_to(FIELDS, "x", CreateTime="now"),
        reply_to(FIELDS, "bell\b"),
    ],
    ids=range(9),  # not the bodies: they hold the time of day
)
def test_what_is_no_passive_reply_is_a_fault(body):
    """The subscriber sees the fault text, and the test why."""
    seen = WECHAT.read(PUSH, body)
    assert (seen.text, seen.faulty) == (FAULT, True)


@pytest.mark.parametrize(
    "reply", [saying("<xml>"), saying("success\n"), replying("x", MsgType="image")]
)
async def test_what_is_no_passive_reply_is_a_fault_at_once(reply):
    """The subscriber sees the fault text after one request."""
    async with platform(reply) as wechat:
        seen = await wechat.send(ANNA, "在吗")
    assert (seen.text, seen.faulty, seen.attempt) == (FAULT, True, 1)


def test_links_and_taps_are_read_from_the_text():
    """The bubble shows labels; what does nothing on the phone is no tap."""
    content = (
        '好\n<a href="weixin://bizmsgmenu?msgmenucontent=继续3&msgmenuid=1">下文</a> '
        "<a href='https://x.example/a/K'>看</a>"
        '<a href="weixin://bizmsgmenu?msgmenucontent=x&msgmenuid=">没用</a>'
    )
    seen = WECHAT.read(PUSH, reply_to(FIELDS, content))
    assert (seen.text, seen.content) == ("好\n下文 看没用", content)
    assert seen.links == (("看", "https://x.example/a/K"),)
    assert [(tap.content, tap.menu_id) for tap in seen.taps] == [("继续3", "1")]


@pytest.mark.parametrize(
    ("raw", "sent"),
    [
        ("继续", "继续"),
        ("%E7%BB%A7%E7%BB%AD", "继续"),
        ("a%20b", "a b"),
        ("C++", "C  "),
        ("C%2B%2B", "C  "),
        ("C%252B%252B", "C++"),
        ("50%2525", "50%"),
    ],
)
def test_the_client_decodes_a_tap_twice(raw, sent):
    """What comes out is what the subscriber says."""
    url = f"weixin://bizmsgmenu?msgmenuid=7&msgmenucontent={raw}"
    assert parse_tap("x", url).content == sent


@pytest.mark.parametrize("raw", ["50%", "50%25", "%25zz"])
def test_a_bare_percent_crashes_the_client(raw):
    """A tap that would end the app is an error in the test."""
    with pytest.raises(ValueError, match="crashes"):
        parse_tap("x", f"weixin://bizmsgmenu?msgmenucontent={raw}&msgmenuid=1")


async def test_a_tap_is_a_message_of_its_own():
    """It comes with a fresh MsgId and names the menu."""
    came = []

    async def offer(request: web.Request) -> web.StreamResponse:
        came.append(parse_xml(await request.read()))
        link = '<a href="weixin://bizmsgmenu?msgmenucontent=继续&msgmenuid=m1">+</a>'
        return await replying(link)(request)

    async with platform(offer) as wechat:
        seen = await wechat.send(ANNA, "在吗")
        await wechat.tap(ANNA, seen.taps[0])
    assert (came[1]["Content"], came[1]["bizmsgmenuid"]) == ("继续", "m1")
    assert came[0]["MsgId"] != came[1]["MsgId"]


async def test_pushes_have_the_fields_of_their_kind():
    """Events have no MsgId; overrides go by short name or by tag."""
    wechat = WeChat("http://unused", TOKEN)
    text = wechat.text(ANNA, "a]]>b", msg_id=7, create_time=9).xml.decode()
    event = parse_xml(wechat.event(ANNA, "CLICK", "k").xml)
    assert "<MsgId>7</MsgId>" in text and "<CreateTime>9</CreateTime>" in text
    assert parse_xml(text.encode())["Content"] == "a]]>b"
    assert "MsgId" not in event and event["EventKey"] == "k"
    assert parse_xml(wechat.voice(ANNA).xml)["Recognition"] == ""


async def test_a_single_request_shows_what_stands_at_the_door():
    """Signature, body and parameters can be replaced; the response comes as it is."""
    asked = []

    async def door(request: web.Request) -> web.Response:
        asked.append((dict(request.query), await request.read()))
        return web.Response(status=403)

    async with platform(door) as wechat:
        forged = await wechat.post(b"junk", signature="bad", timestamp=5, nonce=None)
    (query, body), *_ = asked
    assert (forged.status, forged.body, body) == (403, b"", b"junk")
    assert query == {"signature": "bad", "timestamp": "5"}


async def test_the_console_verifies_with_a_signed_echostr():
    """The server's text comes back; another token makes another signature."""

    async def check(request: web.Request) -> web.Response:
        query = request.query
        due = sign(TOKEN, query["timestamp"], query["nonce"])
        return web.Response(text=f"{query['echostr']} {query['signature'] == due}")

    async with platform(check) as wechat:
        assert await wechat.verify("123") == (200, "123 True")
        assert await wechat.verify("123", token="other") == (200, "123 False")


async def test_copies_of_a_message_are_posted_at_once():
    """All of them are open at one time."""
    together = asyncio.Barrier(3)

    async def meet(request: web.Request) -> web.StreamResponse:
        await within(5, "three requests at a time", together.wait())
        return await saying("success")(request)

    async with platform(meet) as wechat:
        bodies = await wechat.copies(wechat.text(ANNA, "在吗"), 3)
    assert bodies == [b"success"] * 3


# -------------------------------------------------------------------- safe mode


def test_a_real_push_is_decrypted():
    """A captured message with Chinese text, in the padding that WeChat uses."""
    key = "mNnY5GekpChwqhy2c4NBH90g3hND6GeI4gii2YCvKLY"
    crypt = Crypt("weixin", "wx669ef95216eef885", key)
    signature = sign("weixin", "1414387151", "917222494", CAPTURED)
    assert signature == "ae70d4e343d946fc0477a5c760b95be0947fddbb"
    assert parse_xml(crypt.decrypt(CAPTURED))["Content"] == "你好"
    assert crypt.decrypt(crypt.encrypt("好".encode() * 10)) == "好".encode() * 10


def test_a_message_for_another_account_is_not_accepted():
    """The AppID at the end must be ours."""
    with pytest.raises(BadReply):
        Crypt(TOKEN, "wx-other", AES["aes_key"]).decrypt(
            Crypt(TOKEN, **AES).encrypt(b"<xml/>")
        )


def sealed(content: str, token: str = TOKEN) -> Handler:
    """Make a handler that opens an encrypted push and seals its reply."""
    crypt = Crypt(token, **AES)

    async def answer(request: web.Request) -> web.Response:
        outer, query = parse_xml(await request.read()), request.query
        stamp = (query["timestamp"], query["nonce"])
        assert query["msg_signature"] == sign(TOKEN, *stamp, outer["Encrypt"])
        push = parse_xml(crypt.decrypt(outer["Encrypt"]))
        reply: dict[str, Value] = {"ToUserName": ANNA}
        reply |= {"FromUserName": push["ToUserName"], "CreateTime": 1}
        reply |= {"MsgType": "text", "Content": content}
        encrypted = crypt.encrypt(Push(reply).xml)
        fields: dict[str, Value] = {"Encrypt": encrypted, "TimeStamp": 2}
        fields |= {"Nonce": query["nonce"]}
        fields["MsgSignature"] = sign(token, "2", query["nonce"], encrypted)
        return web.Response(body=Push(fields).xml)

    return answer


async def test_safe_mode_works_in_both_directions():
    """Push and reply are encrypted and signed."""
    async with platform(sealed("保密"), **AES) as wechat:
        assert (await wechat.send(ANNA, "在吗")).text == "保密"


@pytest.mark.parametrize("reply", [replying("x"), sealed("x", token="other")])
async def test_in_safe_mode_a_reply_must_be_sealed_with_our_token(reply):
    """Plain text, or a signature that does not fit, is a fault."""
    async with platform(reply, **AES) as wechat:
        assert (await wechat.send(ANNA, "在吗")).faulty


async def test_in_safe_mode_success_stays_plain():
    """It is not encrypted."""
    async with platform(saying("success"), **AES) as wechat:
        assert (await wechat.send(ANNA, "在吗")).text is None


CAPTURED = (
    "2gUBUpAeuPFKBS+gkcvrR1cBq1VjTOQluB7+FQF00VnybRpYR3xko4S4wh0qD+64cWmJfF93ZNLm+HLZ"
    "BexjHLAdJBs5RBG2rP1AJnU0/1vQU/Ac9Q1Nq7vfC4l3ciF8YwhQW0o/GE4MYWWakgdwnp0hQ7aVVwqM"
    "Ld67A5bsURQHJiFY/cH0fVlsKe6J3aazGhRXFCxceOq2VTJ2Eulc8aBDVSM5/lAIUA/JPq5Z2RzomM0+"
    "aoa5XIfGyAtAdlBXD0ADTemxgfYAKI5EMfKtH5za3dKV2UWbGAlJQZ0fwrwPx6Rs8MsoEtyxeQ52gO94"
    "gafA+/kIVjamKTVLSgudLLz5rAdGneKkBVhXyfyfousm1DoDRjQdAdqMWpwbeG5hanoJyJiH+humW/1q"
    "8PAAiaEfA+BOuvBk/a5xL0Q2l2k="
)
