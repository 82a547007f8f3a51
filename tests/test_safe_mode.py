"""Safe mode: every push and reply in an envelope, as Tencent and two SDKs seal them.

The vectors are those of the platform's documents and of other projects' tests.
"""

import asyncio
import base64
import contextlib
import logging
import os
import re
import subprocess
import sys
import time
from dataclasses import dataclass
from xml.etree import ElementTree

import pytest
import wechatpy  # type: ignore[import-untyped]
import werobot.crypto  # type: ignore[import-untyped]
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from wechatpy.crypto import WeChatCrypto  # type: ignore[import-untyped]

import wxgpt
from conftest import ANN, LONG, ROOT, TOKEN, merged, platform, said, toml, with_session
from fake_openai import Script, says
from wechat import ACCOUNT, Crypt, WeChat, parse_xml, render_xml, sign

SAFE = {
    "app_id": "wx5823bf96d3bd56c7",
    "aes_key": "jWmYm7qr5nMoAUwZRjGtBxmz3KA1tkAj3ykkR6q2B2C",
}
KEYS = (TOKEN, SAFE["aes_key"], SAFE["app_id"])  # in the order of the SDKs
OTHER_KEY = "mNnY5GekpChwqhy2c4NBH90g3hND6GeI4gii2YCvKLY"


@dataclass(frozen=True)
class Vector:
    """An envelope that somebody else made, and what is in it."""

    token: str
    app_id: str
    aes_key: str
    stamp: tuple[str, str]  # timestamp, nonce
    msg_signature: str
    encrypted: str
    message: str
    random: str = ""  # empty: not published
    pad: int = 0
    signature: str = ""


A_KEYS = ("AAAAA", "wxba5fad812f8e6fb9", "A" * 43)
VECTORS = {
    "A": Vector(
        *A_KEYS,
        ("1714112445", "415670741"),
        "046e02f8204d34f8ba5fa3b1db94908f3df2e9b3",
        "+qdx1OKCy+5JPCBFWw70tm0fJGb2Jmeia4FCB7kao+/Q5c/ohsOzQHi8khUOb05JCpj0JB4RvQMk"
        "Uyus8TPxLKJGQqcvZqzDpVzazhZv6JsXUnnR8XGT740XgXZUXQ7vJVnAG+tE8NUd4yFyjPy7GgiaviN"
        "rlCTj+l5kdfMuFUPpRSrfMZuMcp3Fn2Pede2IuQrKEYwKSqFIZoNqJ4M8EajAsjLY2km32IIjdf8YL/"
        "P50F7mStwntrA2cPDrM1kb6mOcfBgRtWygb3VIYnSeOBrebufAlr7F9mFUPAJGj04=",
        '{"ToUserName":"gh_97417a04a28d","FromUserName":"o9AgO5Kd5ggOC-bXrbNODIiE3bGY",'
        '"CreateTime":1714112445,"MsgType":"event","Event":"debug_demo",'
        '"debug_str":"hello world"}',
        "a8eedb185eb2fecf",
        19,
        "6c5c811b55cc85e0e1b54100749188c20beb3f5d",
    ),
    "A2": Vector(
        *A_KEYS,
        ("1713424427", "415670741"),
        "1b9339964ed2e271e7c7b6ff2b0ef902fc94dea1",
        "ELGduP2YcVatjqIS+eZbp80MNLoAUWvzzyJxgGzxZO/5sAvd070Bs6qrLARC9nVHm48Y4hyRbtzve1L3"
        "2tmxSQ==",
        '{"demo_resp":"good luck"}',
        "707722b803182950",
        1,
    ),
    "B": Vector(
        "weixin",
        "wx669ef95216eef885",
        OTHER_KEY,
        ("1414387151", "917222494"),
        "ae70d4e343d946fc0477a5c760b95be0947fddbb",
        "2gUBUpAeuPFKBS+gkcvrR1cBq1VjTOQluB7+FQF00VnybRpYR3xko4S4wh0qD+64cWmJfF93ZNLm+HLZ"
        "BexjHLAdJBs5RBG2rP1AJnU0/1vQU/Ac9Q1Nq7vfC4l3ciF8YwhQW0o/GE4MYWWakgdwnp0hQ7aVVwqM"
        "Ld67A5bsURQHJiFY/cH0fVlsKe6J3aazGhRXFCxceOq2VTJ2Eulc8aBDVSM5/lAIUA/JPq5Z2RzomM0+"
        "aoa5XIfGyAtAdlBXD0ADTemxgfYAKI5EMfKtH5za3dKV2UWbGAlJQZ0fwrwPx6Rs8MsoEtyxeQ52gO94"
        "gafA+/kIVjamKTVLSgudLLz5rAdGneKkBVhXyfyfousm1DoDRjQdAdqMWpwbeG5hanoJyJiH+humW/1q"
        "8PAAiaEfA+BOuvBk/a5xL0Q2l2k=",
        "<xml><ToUserName><![CDATA[gh_a96a4a619366]]></ToUserName>\n"
        "<FromUserName><![CDATA[olPjZjsXuQPJoV0HlruZkNzKc91E]]></FromUserName>\n"
        "<CreateTime>1414387151</CreateTime>\n<MsgType><![CDATA[text]]></MsgType>\n"
        "<Content><![CDATA[你好]]></Content>\n<MsgId>6074746557628292943</MsgId>\n</xml>",
        "42952fe6464df535",
        3,
        "e3203b6433eb554dd2fcba78fa48cb948fcb4801",
    ),
    "C": Vector(
        "pamtest",
        "wxb11529c136998cb6",
        "abcdefghijklmnopqrstuvwxyz0123456789ABCDEFG",
        ("1409304348", "xxxxxx"),
        "82c962d39941aa48552f90ef55aa323dc620cc10",
        "jn1L23DB+6ELqJ+6bruv21Y6MD7KeIfP82D6gU39rmkgczbWwt5+3bnyg5K55bgVtVzd832WzZGMhkP7"
        "2vVOfg==",
        "我是中文abcd123",
        "aaaabbbbccccdddd",
    ),
    "D": Vector(
        "QDG6eK",
        SAFE["app_id"],
        SAFE["aes_key"],
        ("1409659813", "1372623149"),
        "477715d11cdb4164915debcba66cb864d751f3e6",
        "RypEvHKD8QQKFhvQ6QleEB4J58tiPdvo+rtK1I9qca6aM/wvqnLSV5zEPeusUiX5L5X/0lWfrf0QADHH"
        "hGd3QczcdCUpj911L3vg3W/sYYvuJTs3TUUkSUXxaccAS0qhxchrRYt66wiSpGLYL42aM6A8dTT+6k4a"
        "SknmPj48kzJs8qLjvd4Xgpue06DOdnLxAUHzM6+kDZ+HMZfJYuR+LtwGc2hgf5gsijff0ekUNXZiqATP"
        "7PF5mZxZ3Izoun1s4zG4LUMnvw2r+KqCKIw+3IQH03v+BCA9nMELNqbSf6tiWSrXJB3LAVGUcallcrw8"
        "V2t9EL4EhzJWrQUax5wLVMNS0+rUPA3k22Ncx4XXZS9o0MBH27Bo6BpNelZpS+/uh9KsNlY6bHCmJU9p"
        "8g7m3fVKn28H3KDYA5Pl/T8Z1ptDAVe0lXdQ2YoyyH2uyPIGHBZZIs2pDBS8R07+qN+E7Q==",
        "",
        pad=30,
    ),
}


def inside(aes_key, encrypted):
    """Return all bytes inside an envelope, padding included, without wxgpt's help."""
    key = base64.b64decode(aes_key + "=")
    decryptor = Cipher(algorithms.AES(key), modes.CBC(key[:16])).decryptor()
    return decryptor.update(base64.b64decode(encrypted)) + decryptor.finalize()


@pytest.fixture(params=VECTORS.values(), ids=list(VECTORS))
def vector(request):
    """Each vector of the protocol page."""
    return request.param


@pytest.fixture
def cipher(vector):
    """wxgpt's cipher with the keys of the vector."""
    return wxgpt.Cipher(vector.token, vector.app_id, vector.aes_key)


def test_an_envelope_of_somebody_else_is_opened(cipher, vector):
    """The message comes out whole, Chinese and line ends included."""
    message = cipher.open(vector.encrypted).decode()
    assert message == vector.message or not vector.message
    assert "<![CDATA[hello]]>" in message or vector.message


def test_tencents_sample_message_is_read():
    """Vector D holds a text of which only some fields are published."""
    vector = VECTORS["D"]
    cipher = wxgpt.Cipher(vector.token, vector.app_id, vector.aes_key)
    message = wxgpt.parse_message(cipher.open(vector.encrypted))
    assert (message.content, message.msg_id) == ("hello", "4561255354251345929")


def test_the_published_signatures_are_right(vector):
    """msg_signature covers the base64 text, signature only the stamp."""
    assert wxgpt.is_signed(
        vector.token, vector.msg_signature, *vector.stamp, vector.encrypted
    )
    plain = wxgpt.signature_of(vector.token, *vector.stamp)
    assert vector.signature in ("", plain)


def test_an_envelope_is_laid_out_as_published(vector):
    """Random bytes, length, message, AppID and padding are where the page says."""
    plain = inside(vector.aes_key, vector.encrypted)
    end = 20 + int.from_bytes(plain[16:20], "big")
    assert plain[:16] == vector.random.encode() or not vector.random
    assert plain[end:].startswith(vector.app_id.encode())
    assert vector.pad in (0, plain[-1]) and len(plain) % 32 == 0


def test_a_reply_is_sealed_as_the_vectors_are(cipher, vector):
    """What wxgpt seals is laid out the same, under a right signature."""
    body = (vector.message or "hello").encode()
    envelope = parse_xml(cipher.seal(body, 1714112445))
    plain = inside(vector.aes_key, envelope["Encrypt"])
    pad = bytes([plain[-1]]) * plain[-1]
    length = len(body).to_bytes(4, "big")
    assert plain[16:] == length + body + vector.app_id.encode() + pad
    stamp = ("1714112445", envelope["Nonce"], envelope["Encrypt"])
    assert envelope["MsgSignature"] == sign(vector.token, *stamp)


@pytest.mark.parametrize("length", range(0, 70, 3))
def test_a_message_of_any_length_comes_back(length):
    """The padding of one to 32 bytes is put on and taken off."""
    cipher = wxgpt.Cipher(TOKEN, **SAFE)
    sealed = parse_xml(cipher.seal(b"x" * length, 1))["Encrypt"]
    assert cipher.open(sealed) == b"x" * length
    assert Crypt(TOKEN, **SAFE).decrypt(sealed) == b"x" * length


# Through the door


@pytest.fixture
async def open_safe(serve):
    """Start wxgpt in safe mode; gives it with a platform that seals."""
    async with contextlib.AsyncExitStack() as stack:

        async def start(**changes):
            served = await serve(**merged({"wechat": SAFE}, changes))
            server = await stack.enter_async_context(platform(served.port, **SAFE))
            server.bot = served.bot
            return server

        yield start


@pytest.fixture
async def server(open_safe):
    """wxgpt in safe mode, and a platform that seals."""
    return await open_safe()


async def post_sealed(server, encrypted):
    """Post a rightly signed envelope around any text."""
    stamp = {"timestamp": str(int(time.time())), "nonce": "415670741"}
    query = {"msg_signature": sign(TOKEN, *stamp.values(), encrypted)} | stamp
    body = render_xml({"ToUserName": ACCOUNT, "Encrypt": encrypted})
    return await server.wechat.post(body, encrypt_type="aes", **query)


async def test_a_whole_conversation_is_held_in_safe_mode(server, upstream):
    """Opening, a question, a long answer in parts and the end, all in envelopes."""
    assert said("introduction") in (await server.ask("/chatgpt")).text
    assert (await server.ask("你好")).text.startswith("你好！关于「你好」")
    upstream.will(says(LONG))
    seen = await server.ask("写长文")
    assert seen.body.startswith(b"<xml><Encrypt>") and seen.taps
    assert "第30句" in (await server.wechat.tap(ANN, seen.taps[0])).text
    assert said("stopped") in (await server.ask("/stop")).text


async def test_an_answer_on_the_third_attempt_is_sealed_too(server, upstream):
    """Patience and retries are the same in safe mode."""
    gate = asyncio.Event()
    upstream.will(Script([gate, "好。"]))
    await server.ask("/chatgpt")
    seen = await server.ask("慢问题")
    assert seen.attempt == 3 and said("thinking") in seen.text
    gate.set()


async def test_success_is_not_encrypted(server):
    """Where nothing is to be said, the bare word ends the retries."""
    response = await server.wechat.post(server.wechat.text(ANN, "有人吗"))
    assert (response.status, response.body) == (200, b"success")


async def test_a_plain_push_is_refused(server, stored):
    """Rightly signed but not encrypted is 403, and leaves no trace."""
    before = stored()
    async with WeChat(server.wechat.url, TOKEN) as plain:
        response = await plain.post(plain.text(ANN, "/chatgpt"))
    assert (response.status, response.body, stored()) == (403, b"", before)


NOT_SIGNED = [
    {"signature": "0" * 40},
    {"signature": None},
    {"signature": ""},
    {"msg_signature": "0" * 40},
    {"msg_signature": None},
    {"msg_signature": ""},
    {"msg_signature": "签名"},
    {"msg_signature": None, "encrypt_type": None},
    {"timestamp": None},
]


async def test_a_push_needs_both_signatures(server, stored):
    """The one of the query and the one of the envelope; else nothing is stored."""
    before, push = stored(), server.wechat.text(ANN, "/chatgpt")
    for query in NOT_SIGNED:
        response = await server.wechat.post(push, **query)
        assert (query, response.status, response.body) == (query, 403, b"")
        assert stored() == before


async def test_a_right_signature_of_another_text_is_refused(server, stored):
    """msg_signature covers what is encrypted: it cannot be taken along."""
    before, stamp = stored(), {"timestamp": str(int(time.time())), "nonce": "4711"}
    signature = sign(TOKEN, *stamp.values(), server.wechat._crypt.encrypt(b"<xml/>"))
    push = server.wechat.text(ANN, "/chatgpt")
    response = await server.wechat.post(push, msg_signature=signature, **stamp)
    assert (response.status, stored()) == (403, before)


PUSH = render_xml({"ToUserName": ACCOUNT, "FromUserName": ANN, "CreateTime": 1, "MsgId": 7,
                   "MsgType": "text", "Content": "/chatgpt"})  # fmt: skip
SEALED = Crypt(TOKEN, **SAFE).encrypt(PUSH)
LIES = b"A" * 16 + b"\xff\xff\xff\xff" + b"B" * 11  # a length far beyond the end
UNREADABLE = {
    "cut in mid-block": (SEALED[:-9], "cannot be decrypted"),
    "cut at a block": (SEALED[:64], "cannot be decrypted"),
    "one block": (base64.b64encode(b"x" * 32).decode(), "cannot be decrypted"),
    "no base64": ("你好", "cannot be decrypted"),
    "another AES key": (
        Crypt(TOKEN, SAFE["app_id"], OTHER_KEY).encrypt(PUSH), "is aes_key right?",
    ),
    "another AppID": (
        Crypt(TOKEN, "wx669ef95216eef885", SAFE["aes_key"]).encrypt(PUSH),
        "is app_id right?",
    ),
    "AppID and more": (
        Crypt(TOKEN, SAFE["app_id"] + "x", SAFE["aes_key"]).encrypt(PUSH),
        "is app_id right?",
    ),
    "no XML": (Crypt(TOKEN, **SAFE).encrypt(b"hello"), "not readable as XML"),
}  # fmt: skip


@pytest.mark.parametrize("name", UNREADABLE)
def test_what_cannot_be_opened_says_why(name):
    """In one kind of error, without the key and without what may be inside."""
    encrypted, words = UNREADABLE[name]
    with pytest.raises(wxgpt.BadMessage, match=re.escape(words)) as bad:
        wxgpt.parse_message(wxgpt.Cipher(TOKEN, **SAFE).open(encrypted))
    assert SAFE["aes_key"] not in str(bad.value) and "chatgpt" not in str(bad.value)


@pytest.mark.parametrize("name", ["cut in mid-block", "another AppID", "no XML"])
async def test_what_cannot_be_opened_ends_with_success_and_a_line(
    server, stored, caplog, name
):
    """Signed but unreadable: WeChat is to stop, the owner learns why, nothing is kept."""
    await server.ask("/help")
    before, (encrypted, words) = stored(), UNREADABLE[name]
    response = await post_sealed(server, encrypted)
    assert (response.status, response.body, stored()) == (200, b"success", before)
    [line] = [r.message for r in caplog.records if "unreadable push" in r.message]
    assert words in line and SAFE["aes_key"] not in line and "chatgpt" not in line


async def test_a_wrong_length_inside_is_unreadable(server, caplog):
    """A length beyond the end does not read what is not there."""
    key = base64.b64decode(SAFE["aes_key"] + "=")
    encryptor = Cipher(algorithms.AES(key), modes.CBC(key[:16])).encryptor()
    sealed = encryptor.update(LIES + b"\x01") + encryptor.finalize()
    response = await post_sealed(server, base64.b64encode(sealed).decode())
    assert (response.status, response.body) == (200, b"success")
    assert "a wrong length inside the encrypted push" in caplog.text


async def test_an_empty_envelope_is_refused(server):
    """Without anything encrypted there is nothing that msg_signature could cover."""
    assert (await post_sealed(server, "")).status == 403


async def test_a_stranger_with_a_long_body_is_refused(server):
    """403 comes before 413 in safe mode, too."""
    body = b"x" * (64 * 1024 + 1)
    assert (await server.wechat.post(body, signature="0" * 40)).status == 403
    assert (await server.wechat.post(body)).status == 413


ENVELOPES = {
    "<xml><ToUserName><![CDATA[gh_1]]></ToUserName><Encrypt><![CDATA[a+/=]]></Encrypt></xml>": "a+/=",
    "<xml><Encrypt>a+/=</Encrypt></xml>": "a+/=",
    "<xml>\n<Encrypt>\n<![CDATA[a+/=]]>\n</Encrypt>\n</xml>": "a+/=",
    "<xml><Content><![CDATA[<Encrypt>b</Encrypt>]]></Content><Encrypt>a</Encrypt></xml>": "a",
    "<xml><Encrypt>a": "a",
    "<xml><Encrypt></Encrypt></xml>": "",
    "<xml><Encrypt><![CDATA[]]></Encrypt></xml>": "",
    "<xml><encrypt>a</encrypt></xml>": "",
    "</Encrypt>a<Encrypt>": "",
    "a": "",
    "": "",
}


@pytest.mark.parametrize("body", ENVELOPES)
def test_the_encrypted_part_is_found(body):
    """Without parsing; nothing is found where nothing is."""
    assert wxgpt.find_encrypted(body.encode()) == ENVELOPES[body]


async def test_what_a_subscriber_wrote_is_no_envelope(server):
    """In 兼容模式 a text about XML stands before the real one."""
    stamp = {"timestamp": str(int(time.time())), "nonce": "4711"}
    encrypted = server.wechat._crypt.encrypt(server.wechat.text(ANN, "/help").xml)
    fields = server.wechat.text(ANN, "<Encrypt>x</Encrypt>").fields
    signature = sign(TOKEN, *stamp.values(), encrypted)
    response = await server.wechat.post(
        render_xml(fields | {"Encrypt": encrypted}), msg_signature=signature, **stamp
    )
    assert (response.status, response.body[:14]) == (200, b"<xml><Encrypt>")


async def test_copies_of_a_sealed_push_get_the_same_bytes(server, upstream):
    """The envelope around the one reply is always the same."""
    await server.ask("/chatgpt")
    bodies = await server.wechat.copies(server.wechat.text(ANN, "你好"), 5)
    assert len(set(bodies)) == 1 and bodies[0].startswith(b"<xml><Encrypt>")
    assert len(upstream.requests) == 1


async def test_a_copy_after_a_kill_gets_the_same_envelope(spawn, upstream):
    """The envelope is made again from what is stored, byte for byte."""
    served, process = await spawn(wechat=SAFE)
    async with platform(served.port, **SAFE) as server:
        push = server.wechat.text(ANN, "/help")
        first = await server.wechat.deliver(push)
        await process.kill()
        await process.start()
        again = await server.wechat.deliver(push)
    assert again.body == first.body and first.text


@pytest.mark.parametrize("mode", [{}, SAFE], ids=["plain", "safe"])
async def test_a_stale_push_is_refused(serve, stored, caplog, mode):
    """More than ten minutes off the clock: 403, and a line that says by how much."""
    served = await serve(wechat=mode)
    async with platform(served.port, **mode) as server:
        before, then = stored(), int(time.time()) - 660
        push = server.wechat.text(ANN, "/chatgpt")
        response = await server.wechat.post(push, timestamp=then)
    assert (response.status, stored()) == (403, before)
    assert re.search(r"our clock is \+66\d s off", caplog.text)


@pytest.mark.parametrize("mode", [{}, SAFE], ids=["plain", "safe"])
async def test_pushes_of_another_day_are_refused(serve, caplog, mode):
    """Agreeing among themselves does not help them; the log says so once a minute."""
    served, then = await serve(wechat=mode), int(time.time()) + 86400
    async with platform(served.port, **mode) as server:
        for seconds in range(3):
            push = server.wechat.text(ANN, "/help")
            response = await server.wechat.post(push, timestamp=then + seconds)
            assert response.status == 403
    assert caplog.text.count("our clock is -86") in (1, 2)  # a minute's turn


@pytest.mark.parametrize("mode", [{}, SAFE], ids=["plain", "safe"])
async def test_a_verification_is_of_now(serve, caplog, mode):
    """An old one gets no echostr, and the log says how old."""
    served, then = await serve(wechat=mode), str(int(time.time()) - 86400)
    query = {"timestamp": then, "nonce": "1", "signature": sign(TOKEN, then, "1")}
    async with platform(served.port, **mode) as server:
        url = server.wechat.url
        async with server.open(url, params=query | {"echostr": "1"}) as response:
            assert (response.status, await response.read()) == (403, b"")
    assert "our clock is +864" in caplog.text


async def test_a_push_in_the_clear_is_told_in_the_log(serve, caplog):
    """In safe mode it is refused, and the owner reads why; a stranger's leaves no line."""
    served = await serve(wechat=SAFE)
    async with platform(served.port) as server:
        push = server.wechat.text(ANN, "/chatgpt")
        for _ in range(2):
            assert (await server.wechat.post(push)).status == 403
        server.wechat.token = "guessed"
        assert (await server.wechat.post(push)).status == 403
    assert caplog.text.count("is the console in 安全模式?") in (1, 2)  # a minute's turn


async def test_verification_stays_plain_in_safe_mode(server):
    """The console's GET has the four plain parameters, and its bare echostr back."""
    assert await server.wechat.verify("4375120948") == (200, "4375120948")
    assert (await server.wechat.verify(token="guessed"))[0] == 403


@pytest.mark.parametrize("name", ["B", "D"])
async def test_a_real_push_of_the_vectors_is_answered(open_safe, name, monkeypatch):
    """The recorded query and body open the door; the reply opens with the same keys."""
    vector, now = VECTORS[name], time.time
    ahead = int(vector.stamp[0]) - now()
    monkeypatch.setattr(time, "time", lambda: now() + ahead)
    keys = {"app_id": vector.app_id, "aes_key": vector.aes_key}
    server = await open_safe(
        wechat={"token": vector.token} | keys, replies={"outside": "在的"}
    )
    timestamp, nonce = vector.stamp
    query = {"timestamp": timestamp, "nonce": nonce, "encrypt_type": "aes"}
    query["msg_signature"] = vector.msg_signature
    query["signature"] = vector.signature or sign(vector.token, *vector.stamp)
    body = render_xml({"ToUserName": "gh_1", "Encrypt": vector.encrypted})
    async with server.open(
        server.wechat.url, "POST", params=query, data=body
    ) as response:
        envelope = parse_xml(await response.read())
    reply = parse_xml(Crypt(vector.token, **keys).open(envelope))
    assert reply["Content"] == "在的"


async def test_compatible_mode_sends_both_and_the_envelope_counts(server):
    """Plain fields beside Encrypt are not covered by msg_signature and do not count."""
    stamp = {"timestamp": str(int(time.time())), "nonce": "4711"}
    encrypted = server.wechat._crypt.encrypt(server.wechat.text(ANN, "/help").xml)
    fields = server.wechat.text(ANN, "/chatgpt").fields | {"Encrypt": encrypted}
    signature = sign(TOKEN, *stamp.values(), encrypted)
    response = await server.wechat.post(
        render_xml(fields), msg_signature=signature, **stamp
    )
    reply = parse_xml(server.wechat._crypt.open(parse_xml(response.body)))
    assert (
        "聊天记录" in reply["Content"] and said("introduction") not in reply["Content"]
    )


async def test_an_encrypted_push_without_the_keys_is_told_in_the_log(serve, caplog):
    """An owner who chose safe mode at WeChat only reads what is missing."""
    served = await serve()
    async with platform(served.port, **SAFE) as server:
        response = await server.wechat.post(server.wechat.text(ANN, "/chatgpt"))
    assert (response.status, response.body) == (200, b"success")
    assert "encrypted, but app_id and aes_key are not set" in caplog.text


async def test_the_log_of_a_sealed_push_is_that_of_a_plain_one(server, caplog):
    """MsgId, a piece of the openid, attempt, outcome; neither key nor words."""
    caplog.set_level(logging.INFO, "wxgpt")
    push = server.wechat.text(ANN, "/help")
    await server.wechat.deliver(push)
    name = f"msg={push.fields['MsgId']} from={ANN[:8]} attempt=1 replied after"
    assert name in caplog.text
    assert SAFE["aes_key"] not in caplog.text and ANN not in caplog.text


# Independent peers


async def post_envelope(server, envelope):
    """Post an envelope that an SDK made, with its own signature in the query."""
    fields = parse_xml(envelope.encode())
    query = {"timestamp": fields["TimeStamp"], "nonce": fields["Nonce"]}
    query |= {"msg_signature": fields["MsgSignature"], "encrypt_type": "aes"}
    response = await server.wechat.post(envelope.encode(), **query)
    return response.body.decode()


async def test_wechatpy_and_wxgpt_understand_each_other(server, upstream):
    """wechatpy seals a push and opens the reply to it."""
    peer = WeChatCrypto(*KEYS)
    await server.ask("/chatgpt")
    upstream.will(says("三点半。]]> & <b>"))
    push = server.wechat.text(ANN, "几点了？😀").xml.decode()
    sealed = await post_envelope(server, peer.encrypt_message(push, "4711"))
    root = ElementTree.fromstring(sealed)
    signed = [root.findtext(tag) for tag in ("MsgSignature", "TimeStamp", "Nonce")]
    reply = wechatpy.parse_message(peer.decrypt_message(sealed, *signed))
    assert (reply.source, reply.target) == (ACCOUNT, ANN)
    assert reply.content.startswith("三点半。]]> & <b>")
    assert upstream.requests[0].question == "几点了？😀"


async def test_werobot_and_wxgpt_understand_each_other(server, upstream):
    """WeRoBot seals a push and opens the reply to it."""
    peer = werobot.crypto.MessageCrypt(*KEYS)
    await server.ask("/chatgpt")
    upstream.will(says("三点半。"))
    push = server.wechat.text(ANN, "几点了？😀").xml.decode()
    sealed = await post_envelope(server, peer.encrypt_message(push))
    envelope, tags = parse_xml(sealed.encode()), ("TimeStamp", "Nonce", "MsgSignature")
    signed = [envelope[tag] for tag in (*tags, "Encrypt")]
    reply = parse_xml(peer.decrypt_message(*signed))
    assert reply["Content"].startswith("三点半。") and reply["ToUserName"] == ANN
    assert upstream.requests[0].question == "几点了？😀"


def test_wechatpy_opens_what_wxgpt_seals_of_any_length():
    """Its unpadding takes every padding of ours."""
    peer, cipher = WeChatCrypto(*KEYS), wxgpt.Cipher(TOKEN, **SAFE)
    for length in range(1, 40):
        sealed = cipher.seal(b"x" * length, 1)
        fields = parse_xml(sealed)
        signed = [fields[tag] for tag in ("MsgSignature", "TimeStamp", "Nonce")]
        opened = peer.decrypt_message(sealed.decode(), *signed)
        assert opened in ("x" * length, b"x" * length)


async def test_wechatpy_reads_plain_replies(serve, upstream):
    """A plain reply is a text message to an SDK, with its links and label."""
    server = await with_session(serve)
    upstream.will(says("三点半。]]> & <b>"))
    response = await server.wechat.post(server.wechat.text(ANN, "几点了？"))
    reply = wechatpy.parse_message(response.body)
    assert (reply.type, reply.source, reply.target) == ("text", ACCOUNT, ANN)
    assert reply.content == "三点半。]]> & <b>\n（AI 生成）"
    assert abs(reply.time - time.time()) < 60


# Settings


@pytest.mark.parametrize(
    ("wechat", "words"),
    [
        ({"app_id": "wx0123456789abcdef", "aes_key": "A" * 42}, "42 characters"),
        ({"app_id": "wx0123456789abcdef", "aes_key": "A" * 44}, "44 characters"),
        (
            {"app_id": "wx0123456789abcdef", "aes_key": "A" * 42 + "="},
            "43 letters and digits",
        ),
        ({"app_id": "wx0123456789abcdef"}, "found 'only app_id'"),
        ({"aes_key": "A" * 43}, "found 'only aes_key'"),
    ],
)
def test_half_a_safe_mode_is_refused_in_one_line(tmp_path, settings, wechat, words):
    """The line names the setting and what is accepted, never the key."""
    path = tmp_path / "wxgpt.toml"
    path.write_text(toml(merged(settings, {"wechat": wechat})), "utf-8")
    with pytest.raises(wxgpt.ConfigError) as refused:
        wxgpt.load_config(path)
    line = str(refused.value)
    assert "wechat.aes_key" in line and words in line
    assert len(line.splitlines()) == 1 and "A" * 40 not in line


def test_half_a_safe_mode_ends_the_start_with_one_line(tmp_path, settings):
    """Exit 2, and no database."""
    path = tmp_path / "wxgpt.toml"
    path.write_text(toml(merged(settings, {"wechat": {"aes_key": "A" * 42}})), "utf-8")
    command = [sys.executable, str(ROOT / "wxgpt.py"), "--config", str(path)]
    environ = os.environ | {"PYTHONUTF8": "1"}
    ended = subprocess.run(
        command, capture_output=True, text=True, env=environ, timeout=60
    )
    assert ended.returncode == 2 and len(ended.stderr.splitlines()) == 1
    assert "wechat.aes_key" in ended.stderr
    assert "A" * 40 not in ended.stderr
    assert not (tmp_path / "test.db").exists()
