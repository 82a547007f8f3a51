"""The door: who may knock, what is understood, and what WeChat reads in return."""

import asyncio
import random
import re
import time
from urllib.parse import urlencode

import pytest

import wxgpt
from conftest import ANN, BOB, TOKEN, platform, said
from fake_openai import Script
from wechat import ACCOUNT, sign

SENDER = (
    f"<ToUserName><![CDATA[{ACCOUNT}]]></ToUserName>"
    f"<FromUserName><![CDATA[{ANN}]]></FromUserName><CreateTime>1767230001</CreateTime>"
)
TEXT = (
    f"{SENDER}<MsgType><![CDATA[text]]></MsgType>"
    "<Content><![CDATA[/chatgpt]]></Content><MsgId>25301234567890123</MsgId>"
)
BOMB = (
    '<!DOCTYPE xml [<!ENTITY a "ha"><!ENTITY b "&a;&a;&a;&a;"><!ENTITY c "&b;&b;">]>'
    f"<xml>{TEXT}<Title>&c;</Title></xml>"
)
OUTSIDE_FILE = (
    '<!DOCTYPE xml [<!ENTITY a SYSTEM "file:///etc/hostname">]>'
    f"<xml>{TEXT}<Title>&a;</Title></xml>"
)
UNREADABLE = {
    "empty": b"",
    "no XML": "你好".encode(),
    "JSON": b'{"ToUserName": "gh_1"}',
    "cut off": f"<xml>{TEXT}"[:-20].encode(),
    "no UTF-8": bytes(range(128, 256)),
    "an unknown encoding": b'<?xml version="1.0" encoding="klingon"?><xml></xml>',
    "entity bomb": BOMB.encode(),
    "entity from a file": OUTSIDE_FILE.encode(),
    "wrong root": f"<html>{TEXT}</html>".encode(),
    "nothing inside": b"<xml/>",
    "text inside": b"<xml>hello</xml>",
    "no MsgType": f"<xml>{SENDER}</xml>".encode(),
    "no sender": f"<xml>{TEXT.replace('FromUserName', 'From')}</xml>".encode(),
    "no account": f"<xml>{TEXT.replace('ToUserName', 'To')}</xml>".encode(),
    "two senders": f"<xml>{TEXT}{SENDER}</xml>".encode(),
    "sender in layers": f"<xml>{TEXT.replace(ANN, ']]><b/><![CDATA[')}</xml>".encode(),
    "very deep": b"<xml>" + b"<a>" * 9000 + b"</a>" * 9000 + b"</xml>",
    "as long as allowed": b"x" * 64 * 1024,
}


@pytest.fixture
def at(monkeypatch):
    """Set our clock to the time when an example of the documents was signed."""
    ahead = -time.time()
    now = time.time

    def change(timestamp: str) -> None:
        monkeypatch.setattr(time, "time", lambda: now() + ahead + int(timestamp))

    return change


@pytest.fixture
async def server(serve):
    """wxgpt as it starts."""
    return await serve()


# Verification


async def test_the_console_gets_its_echostr(server):
    """A rightly signed verification is answered with the bare echostr."""
    assert await server.wechat.verify("4375120948") == (200, "4375120948")
    server.wechat.url += "/"
    assert await server.wechat.verify("4375120948") == (200, "4375120948")


async def test_the_echostr_is_plain_text(serve, at):
    """Tencent's own example is verified, as text/plain and nothing more."""
    server = await serve(wechat={"token": "AAAAA"})
    query = {
        "signature": "f464b24fc39322e44b38aa78f5edd27bd1441696",
        "timestamp": "1714036504",
        "nonce": "1514711492",
        "echostr": "4375120948345356249",
    }
    at(query["timestamp"])
    async with server.open(server.wechat.url, params=query) as response:
        assert response.status == 200 and response.content_type == "text/plain"
        assert await response.read() == b"4375120948345356249"


async def test_a_verification_with_another_token_is_refused(server):
    """The echostr is not given to somebody who does not know the token."""
    assert await server.wechat.verify("4375120948", token="other") == (403, "")


async def test_a_bare_visit_is_refused(server):
    """The URL without parameters is 403, with and without a slash."""
    assert (await server.get(server.wechat.url))[0] == 403
    assert (await server.get(server.wechat.url + "/"))[0] == 403


# Who may post


async def test_tencents_example_of_a_push_is_taken(serve, at):
    """The signature of the platform's own worked example opens the door."""
    server = await serve(wechat={"token": "AAAAA"})
    query = {
        "signature": "899cf89e464efb63f54ddac96b0a0a235f53aa78",
        "timestamp": "1714037059",
        "nonce": "486452656",
    }
    at(query["timestamp"])
    body = f"<xml>{TEXT}</xml>".encode()
    async with server.open(
        server.wechat.url, "POST", params=query, data=body
    ) as response:
        assert response.status == 200 and said("introduction") in await response.text()


NOT_SIGNED = [
    {"signature": None},
    {"signature": ""},
    {"signature": "0" * 40},
    {"signature": "签名"},
    {"timestamp": None},
    {"nonce": None},
    {"signature": None, "timestamp": None, "nonce": None},
]


async def test_a_push_that_is_not_rightly_signed_leaves_no_trace(server, stored):
    """It is answered 403 without a body, and nothing is stored."""
    before, push = stored(), server.wechat.text(ANN, "/chatgpt")
    for query in NOT_SIGNED:
        response = await server.wechat.post(push, **query)
        assert (query, response.status, response.body) == (query, 403, b"")
        assert stored() == before


async def test_a_push_signed_with_another_token_leaves_no_trace(server, stored):
    """Somebody who guesses the URL cannot speak for a subscriber."""
    before, server.wechat.token = stored(), "guessed"
    response = await server.wechat.post(server.wechat.text(ANN, "/chatgpt"))
    assert (response.status, response.body) == (403, b"")
    assert stored() == before


async def test_the_sender_is_the_one_in_the_message(server):
    """The openid in the query is not covered by the signature and does not count."""
    await server.wechat.post(server.wechat.text(ANN, "/chatgpt"), openid=BOB)
    assert (await server.ask("你好", BOB)).text is None
    assert (await server.ask("你好", ANN)).text.startswith("你好！")


async def test_a_push_above_64_kib_is_refused(server):
    """A signed push that is too long is answered 413."""
    assert (await server.wechat.post(b"x" * (64 * 1024 + 1))).status == 413


async def test_the_signature_counts_before_the_length(server):
    """A stranger learns nothing from a long body."""
    response = await server.wechat.post(b"x" * 2**20, signature="0" * 40)
    assert response.status == 403


@pytest.mark.parametrize("off", [-660, 660, -400 * 86400, 400 * 86400])
async def test_a_stale_signature_is_refused(server, stored, caplog, off):
    """Eleven minutes before or behind our clock: 403, and the log says by how much."""
    await server.ask("/help")
    before, then = stored(), int(time.time()) + off
    for _ in range(3):
        push = server.wechat.text(ANN, "/chatgpt")
        response = await server.wechat.post(push, timestamp=then)
        assert (response.status, response.body) == (403, b"")
    assert stored() == before
    said = re.findall(r"our clock is ([+-]\d+) s off", caplog.text)
    assert len(said) in (1, 2) and abs(int(said[0]) + off) <= 5  # a minute's turn


async def test_a_nonce_may_come_again(server):
    """Only the three values together belong to a message."""
    now = int(time.time())
    for seconds in range(3):
        push = server.wechat.text(ANN, "/help")
        response = await server.wechat.post(push, timestamp=now + seconds, nonce=12345)
        assert response.status == 200 and b"CDATA" in response.body


# Captured queries


def arrangements(timestamp: str, nonce: str) -> set[tuple[str, str]]:
    """Return every timestamp and nonce with the signature of these two."""
    digits = "".join(sorted([TOKEN, timestamp, nonce])).partition(TOKEN)
    assert not digits[2], "the token is sorted behind them"
    cuts = range(len(digits[0]) + 1)
    pairs = [(digits[0][:at], digits[0][at:]) for at in cuts]
    pairs += [(after, before) for before, after in pairs]
    signature = sign(TOKEN, timestamp, nonce)
    return {pair for pair in pairs if sign(TOKEN, *pair) == signature}


async def posted(server, push, stamp, query=None):
    """Post a push with this timestamp and nonce; return status and body."""
    query = {"timestamp": stamp[0], "nonce": stamp[1]} | (query or {})
    response = await server.wechat.post(push, **query)
    return response.status, response.body


MODES = {
    "plain": {},
    "safe": {"app_id": "wx0123456789abcdef", "aes_key": "a1B" * 14 + "c"},
}


@pytest.fixture(params=MODES)
async def either(serve, request):
    """wxgpt in plain and in safe mode, and a platform that does as it should."""
    mode = MODES[request.param]
    served = await serve(wechat=mode)
    async with platform(served.port, **mode) as server:
        server.bot = served.bot
        yield server


@pytest.mark.parametrize("seed", range(4))
async def test_a_captured_query_is_worth_nothing(either, stored, seed):
    """However its digits are arranged, it brings another's message nowhere.

    Some nonces look like a time of now, so that the two may be swapped.
    """
    chance, now, query = random.Random(seed), int(time.time()), {}
    for number in range(12):
        nonce = chance.choice(
            (chance.randrange(10**8, 2**31), now + chance.randrange(-500, 500), number)
        )
        stamp = str(now - chance.randrange(500)), str(nonce)
        push = either.wechat.text(ANN, "/help")
        first = await posted(either, push, stamp)
        assert first[0] == 200 and first[1] != b"success"
        before = stored()
        pairs = arrangements(*stamp)
        assert stamp in pairs
        for pair in chance.sample(sorted(pairs), len(pairs)):
            for openid in (BOB, ANN):
                stolen = either.wechat.text(openid, "/history")
                assert (pair, await posted(either, stolen, pair)) == (pair, (403, b""))
            assert (await posted(either, push, stamp, query)) == first
        assert stored() == before
        assert (
            await posted(either, push, (str(now), str(chance.random())[2:]))
        ) == first


async def test_a_capture_of_a_month_ago_is_worth_nothing(either, stored):
    """No arrangement of its digits is a time of now."""
    chance, then = random.Random(5), int(time.time()) - 30 * 86400
    before = stored()
    for _ in range(50):
        stamp = str(then), str(chance.randrange(10**8, 2**31))
        for pair in arrangements(*stamp):
            stolen = either.wechat.text(BOB, "/history")
            assert (pair, await posted(either, stolen, pair)) == (pair, (403, b""))
    assert stored() == before


async def test_an_event_lends_its_query_to_no_text(server, stored):
    """One that has the event's key beside its text is another message."""
    stamp, now = (str(int(time.time())), "4711"), int(time.time())
    fields = {"CreateTime": now, "EventKey": ""}
    event = server.wechat.event(ANN, "subscribe", **fields)
    assert (await posted(server, event, stamp))[0] == 200
    text = server.wechat.text(ANN, "/history", msg_id=None, Event="subscribe", **fields)
    assert await posted(server, text, stamp) == (403, b"")
    assert (await posted(server, event, stamp))[0] == 200


async def test_an_event_lends_its_query_to_no_unfollowing(server, stored):
    """One that has the event's key as its MsgId would delete all that is stored."""
    stamp, now = (str(int(time.time())), "4711"), int(time.time())
    view = server.wechat.event(ANN, "VIEW", CreateTime=now, EventKey="https://a.cn/")
    assert await posted(server, view, stamp) == (200, b"success")
    server.bot.deliveries.clear()  # as a minute later
    before = stored()
    key = f"{now} view https://a.cn/"
    forged = server.wechat.event(ANN, "unsubscribe", CreateTime=now, MsgId=key)
    assert await posted(server, forged, stamp) == (403, b"")
    assert stored() == before


@pytest.mark.parametrize("changed", [{"PicUrl": "https://a.cn/2"}, {"CreateTime": 5}])
async def test_a_query_covers_all_fields_of_its_message(server, stored, changed):
    """Another picture with the MsgId of the first one is another message."""
    stamp = str(int(time.time())), "4711"
    image = server.wechat.image(ANN, "https://a.cn/1", msg_id=7)
    assert (await posted(server, image, stamp))[0] == 200
    server.bot.deliveries.clear()
    before = stored()
    forged = server.wechat.image(ANN, "https://a.cn/1", msg_id=7, **changed)
    assert await posted(server, forged, stamp) == (403, b"")
    assert stored() == before


async def test_another_message_with_a_signature_is_told_once_a_minute(server, caplog):
    """The owner reads that somebody sends captured queries."""
    stamp = str(int(time.time())), "4711"
    await posted(server, server.wechat.text(ANN, "/help"), stamp)
    for _ in range(5):
        await posted(server, server.wechat.text(BOB, "/help"), stamp)
    assert caplog.text.count("another message had its signature") in (1, 2)


async def test_a_verification_is_no_push_and_a_push_no_verification(either):
    """Each signature is good for one of them, and there as often as it comes."""
    stamp = {"timestamp": int(time.time()), "nonce": 4711}
    values = tuple(map(str, stamp.values()))
    query = stamp | {"signature": sign(TOKEN, *values), "echostr": "123"}
    for _ in range(2):
        assert await either.get(f"{either.wechat.url}?{urlencode(query)}") == (
            200,
            "123",
        )
    push = either.wechat.text(ANN, "/help")
    assert (await posted(either, push, values))[0] == 403
    values = values[0], "4712"
    assert (await posted(either, push, values))[0] == 200
    query |= {"nonce": values[1], "signature": sign(TOKEN, *values)}
    assert (await either.get(f"{either.wechat.url}?{urlencode(query)}"))[0] == 403


async def test_of_two_at_once_one_gets_in(either):
    """Whichever was read first; its copies still do."""
    stamp = str(int(time.time())), "4711"
    pushes = [either.wechat.text(openid, "/help") for openid in (ANN, BOB)]
    seen = await asyncio.gather(*(posted(either, push, stamp) for push in pushes * 4))
    statuses = [status for status, _ in seen]
    assert sorted(statuses) == [200] * 4 + [403] * 4
    assert len(set(statuses[0::2])) == len(set(statuses[1::2])) == 1


async def test_an_unreadable_push_keeps_no_signature(server):
    """What was torn on its way comes again, whole."""
    stamp, push = (str(int(time.time())), "4711"), server.wechat.text(ANN, "/help")
    assert await posted(server, push.xml[:-9], stamp) == (200, b"success")
    assert b"CDATA" in (await posted(server, push, stamp))[1]


def test_signatures_are_forgotten_in_time():
    """Each is kept for twenty minutes at least, and for thirty at most."""
    now, said = 0.0, []
    one = [f"{second:040x}"[::-1] for second in range(7200)]
    guard = wxgpt.ReplayGuard(lambda: now, said.append)
    for second in range(7200):
        now = float(second)
        assert guard.is_first(one[second], "a")
        assert second < 1200 or not guard.is_first(one[second - 1200], "b")
        assert len(guard.owners) <= 1800
    assert guard.is_first(one[0], "b") and len(said) == 6000


# What is understood


@pytest.mark.parametrize("name", UNREADABLE)
def test_what_is_no_push_is_not_read(name):
    """Whatever comes, there is one kind of error, and it does not quote the sender."""
    with pytest.raises(wxgpt.BadMessage) as bad:
        wxgpt.parse_message(UNREADABLE[name])
    assert ANN not in str(bad.value)


@pytest.mark.parametrize(
    "name", ["no XML", "entity bomb", "no sender", "as long as allowed"]
)
async def test_an_unreadable_push_is_ended_with_success(server, stored, caplog, name):
    """WeChat is told `success`, the log gets a line, and nothing is stored."""
    caplog.clear()
    response = await server.wechat.post(UNREADABLE[name])
    assert (response.status, response.body) == (200, b"success")
    assert [record.name for record in caplog.records] == ["wxgpt"]
    assert ANN not in stored()


async def test_control_characters_do_not_hide_a_message(server, upstream):
    """What XML cannot carry is left out, and the rest is the question."""
    await server.ask("/chatgpt")
    body = server.wechat.text(ANN, "你_好").xml.replace(b"_", b"\x08\x00\x1f")
    response = await server.wechat.post(body)
    assert response.status == 200 and b"CDATA" in response.body
    assert upstream.requests[0].question == "你好"


def test_no_reference_brings_what_our_links_are_made_of():
    """A character that is written as a number is left out like any other."""
    text = "看&#xFDD0;https://a.cn&#xfdd1;我&#64978;&#xFDD3;"
    xml = f"<Content>{text}</Content><ToUserName>gh_1</ToUserName>"
    xml += "<FromUserName>o_1</FromUserName><MsgType>text</MsgType>"
    message = wxgpt.parse_message(f"<xml>{xml}</xml>".encode())
    assert message.content == "看https://a.cn我"


async def test_types_and_events_are_known_in_any_case(server):
    """Providers of pushes differ in capitals."""
    opened = await server.wechat.deliver(
        server.wechat.raw(ANN, "TEXT", Content="/chatgpt")
    )
    assert said("introduction") in opened.text
    welcome = await server.wechat.deliver(server.wechat.event(BOB, "SUBSCRIBE"))
    assert "/chatgpt" in welcome.text


async def test_following_brings_the_welcome(server):
    """The welcome says how to begin."""
    seen = await server.wechat.deliver(server.wechat.event(ANN, "subscribe"))
    assert seen.text.startswith("欢迎关注") and "/chatgpt" in seen.text


async def test_the_welcome_may_be_silence(serve):
    """An empty welcome is no message."""
    server = await serve(replies={"subscribe": ""})
    seen = await server.wechat.deliver(server.wechat.event(ANN, "subscribe"))
    assert seen.body == b"success"


async def test_unfollowing_deletes_everything(server, stored):
    """The session is over, and nothing of the subscriber is stored any more."""
    await server.ask("/chatgpt 一个秘密")
    await server.ask("/history")
    left = await server.wechat.post(server.wechat.event(ANN, "unsubscribe"))
    assert (left.status, left.body) == (200, b"success")
    assert ANN not in stored() and "秘密" not in stored()
    assert (await server.ask("还在吗？")).text is None


async def test_unfollowing_ends_what_is_being_written(server, upstream, stored):
    """The call is closed, and its answer is not stored afterwards."""
    gate = asyncio.Event()
    upstream.will(Script(["一个秘密", gate]))
    asking = asyncio.create_task(server.ask("/chatgpt 说个秘密"))
    running = await upstream.arrival("秘密")
    await server.wechat.post(server.wechat.event(ANN, "unsubscribe"))
    await running.wait_over()
    await asking
    assert running.outcome == "cut by client"
    assert ANN not in stored() and "秘密" not in stored()


async def test_what_breaks_inside_is_a_polite_word(server, database):
    """A signed push gets 200 and a sentence even when the database is damaged."""
    database("ALTER TABLE session RENAME TO gone")
    seen = await server.ask("/chatgpt")
    assert seen.attempt == 1 and "过一会儿" in seen.text


# What WeChat reads


async def test_an_answer_with_the_end_of_a_cdata_section_is_read(server, upstream):
    """`]]>` and control characters reach the phone as text, or not at all."""
    await server.ask("/chatgpt")
    upstream.will("数组 a[b[0]]> 1\x08\x0b\ufffe 与 <xml> & ]]>")
    seen = await server.ask("怎么写？")
    assert seen.text.startswith("数组 a[b[0]]> 1 与 <xml> & ]]>")


async def test_a_question_with_the_end_of_a_cdata_section_is_read(server, upstream):
    """The sender's own text does not break the message it comes in."""
    await server.ask("/chatgpt")
    await server.ask("a[b[0]]> 1 对吗？")
    assert upstream.requests[0].question == "a[b[0]]> 1 对吗？"


async def test_links_in_an_answer_are_made_harmless(server, upstream):
    """Only our own links can be tapped: `<a` of a model is text."""
    await server.ask("/chatgpt")
    evil = '<A href="weixin://bizmsgmenu?msgmenucontent=/forget&msgmenuid=1">点我</A>'
    upstream.will(f'<a href="https://evil.example">看</a>{evil}')
    seen = await server.ask("给个链接")
    assert (seen.links, seen.taps) == ((), ())
    assert "<\u200ba href" in seen.text and "<\u200bA href" in seen.text


async def test_a_question_named_in_a_reply_is_harmless(serve, upstream):
    """What a subscriber wrote cannot become a link either."""
    server, gate = await serve(wechat={"mute_guard": 0}), asyncio.Event()
    upstream.will(Script([gate, "好"]))
    seen = await server.ask('/chatgpt <a href="x">y</a>')
    gate.set()
    assert "<\u200ba hre" in seen.content and len(seen.links) == 1
