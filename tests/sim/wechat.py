"""WeChat's servers and a subscriber's phone, as a server behind an account meets them.

    async with WeChat(url, token) as wechat:
        seen = await wechat.send("oQx7…", "今天吃什么？")
        assert seen.text == "饺子" and seen.attempt == 1

Every request has a TCP connection of its own. A push that is not answered in time is
hung up on and posted again; a reply is read as strictly as the platform reads it, and
`Seen` tells what the phone showed. `post`, `attempt` and `copies` send single requests.
"""

import asyncio
import base64
import hashlib
import os
import random
import re
import secrets
import struct
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Self
from urllib.parse import parse_qs, unquote_plus
from xml.etree import ElementTree

import aiohttp

from waiting import limit

FAULT = "该公众号提供的服务出现故障，请稍后再试"  # what clients show today
REPLY_BYTES = 2048  # of Content in UTF-8; what is longer is not cut but refused
VERIFY_SECONDS = 60  # a slow machine's; the console gives up after five
AES_BLOCK = 32  # WeChat pads to 32 bytes although AES has blocks of 16
ACCOUNT = "gh_5f0c1a2b3d4e"
HAND_OVER = "transfer_biz_ai_ivr"
TAGS = {"msg_id": "MsgId", "create_time": "CreateTime"}
ANCHOR = re.compile(r"""<a\s+href=(["'])(.*?)\1[^>]*>(.*?)</a>""", re.DOTALL)
BAD_PERCENT = re.compile("%(?![0-9A-Fa-f]{2})")

Value = str | int | float | None
Watcher = Callable[[int, str, float], None]
# A request made by hand is no attempt: on a busy machine it may take its time.
REQUEST_SECONDS = 30.0


class BadReply(Exception):
    """A reply that the platform does not accept; the message says why."""


@dataclass(frozen=True, slots=True)
class Push:
    """One message or event on its way to the server, the same on every attempt."""

    fields: Mapping[str, Value]

    @property
    def openid(self) -> str:
        """Return who sent it; empty in a push that does not say."""
        return str(self.fields.get("FromUserName", ""))

    @property
    def account(self) -> str:
        """Return the account it was sent to."""
        return str(self.fields.get("ToUserName", ""))

    @property
    def xml(self) -> bytes:
        """Return the body: strings in CDATA, numbers bare."""
        return render_xml(self.fields)


@dataclass(frozen=True, slots=True)
class Response:
    """The answer to one request."""

    status: int
    body: bytes


@dataclass(frozen=True, slots=True)
class Attempt:
    """One request of a delivery; seconds count from the first."""

    number: int
    started: float
    ended: float
    outcome: str  # answered, timeout, refused, reset, status 500 …
    body: bytes | None = None


@dataclass(frozen=True, slots=True)
class Tap:
    """A link that sends its content in the subscriber's name."""

    label: str
    content: str
    menu_id: str


@dataclass(frozen=True, slots=True)
class Seen:
    """What the subscriber saw of one push, and how it came about."""

    text: str | None  # the bubble; None: silence
    reason: str = ""  # why the fault text is shown
    attempt: int = 0  # number of the request that was answered; 0: none
    seconds: float = 0.0
    body: bytes = b""
    content: str = ""  # the text with its markup
    links: tuple[tuple[str, str], ...] = ()  # label, url
    taps: tuple[Tap, ...] = ()
    attempts: tuple[Attempt, ...] = ()
    handed_over: bool = False  # to WeChat's own AI, whose answer is not simulated

    @property
    def faulty(self) -> bool:
        """Tell whether the fault text is shown."""
        return bool(self.reason)


def sign(*parts: str) -> str:
    """Return the signature over these strings: SHA-1 of the sorted, joined bytes."""
    return hashlib.sha1(b"".join(sorted(part.encode() for part in parts))).hexdigest()


def render_xml(fields: Mapping[str, Value]) -> bytes:
    """Render a flat document as WeChat does."""
    return f"<xml>{''.join(map(render_field, fields.items()))}</xml>".encode()


def render_field(field: tuple[str, Value]) -> str:
    """Render one element; a text that would close its CDATA is split in two."""
    tag, value = field
    if isinstance(value, str):
        value = f"<![CDATA[{value.replace(']]>', ']]]]><![CDATA[>')}]]>"
    return f"<{tag}>{value}</{tag}>"


def render_query(params: Mapping[str, Value]) -> dict[str, str]:
    """Render a query's parameters; None leaves one out."""
    return {k: str(v) for k, v in params.items() if v is not None}


def parse_xml(body: bytes) -> dict[str, str]:
    """Return the fields of a flat document; raise BadReply for anything else."""
    try:
        root = ElementTree.fromstring(body)
    except (ElementTree.ParseError, LookupError, ValueError) as error:
        raise BadReply(f"not XML: {error}") from None
    fields = {child.tag: child.text or "" for child in root}
    if root.tag != "xml" or len(fields) != len(root):
        raise BadReply("not one <xml> with every field once")
    return fields


def is_handed_over(fields: dict[str, str], push: Push) -> bool:
    """Tell whether a reply hands the push to WeChat's own AI; only a text can be."""
    is_text = push.fields.get("MsgType") == "text"
    return fields.get("MsgType") == HAND_OVER and is_text and "Content" not in fields


def check_reply(fields: dict[str, str], push: Push) -> str:
    """Return the Content of a passive reply to this push, or raise BadReply.

    It is empty if the push is handed over.
    """
    due = {"ToUserName": push.openid, "FromUserName": push.account, "MsgType": "text"}
    if is_handed_over(fields, push):
        due["MsgType"] = HAND_OVER
    for tag, value in due.items():
        if fields.get(tag) != value:
            raise BadReply(f"{tag} is {fields.get(tag)!r} instead of {value!r}")
    if not re.fullmatch("[0-9]+", fields.get("CreateTime", "")):
        raise BadReply(f"CreateTime is {fields.get('CreateTime')!r}")
    if is_handed_over(fields, push):
        return ""
    size = len(fields.get("Content", "").encode())
    if not 0 < size <= REPLY_BYTES:
        raise BadReply(f"Content has {size} bytes")
    return fields["Content"]


def parse_tap(label: str, url: str) -> Tap | None:
    """Return what a tap sends, None if nothing; raise ValueError if it crashes."""
    query = parse_qs(url.partition("?")[2].partition("#")[0])  # leaves empty values out
    if "msgmenucontent" not in query or "msgmenuid" not in query:
        return None
    # The Android client decodes the content a second time, and fails on a bare %.
    once = query["msgmenucontent"][0]
    if BAD_PERCENT.search(once):
        raise ValueError(f"the client crashes on a tap with {once!r}")
    return Tap(label, unquote_plus(once), query["msgmenuid"][0])


def show(content: str, body: bytes) -> Seen:
    """Return what the phone makes of a reply's text."""
    anchors = [(label, url.strip()) for _, url, label in ANCHOR.findall(content)]
    links = tuple(a for a in anchors if a[1].startswith(("http://", "https://")))
    taps = (parse_tap(*a) for a in anchors if a[1].startswith("weixin://bizmsgmenu?"))
    tappable = tuple(tap for tap in taps if tap)
    text = ANCHOR.sub(r"\3", content)
    return Seen(text, body=body, content=content, links=links, taps=tappable)


class Crypt:
    """Safe mode: the envelope around every push and every reply that is not empty."""

    def __init__(self, token: str, app_id: str, aes_key: str) -> None:
        # The 43rd character may carry two stray bits; b64decode does not mind them.
        self._token, self._app_id = token, app_id.encode()
        self._key = base64.b64decode(aes_key + "=")

    def encrypt(self, message: bytes) -> str:
        """Return the base64 text that stands in Encrypt."""
        head = os.urandom(16) + struct.pack(">I", len(message))
        plain = head + message + self._app_id
        pad = AES_BLOCK - len(plain) % AES_BLOCK
        encryptor = self._cipher().encryptor()
        sealed = encryptor.update(plain + bytes([pad]) * pad) + encryptor.finalize()
        return base64.b64encode(sealed).decode()

    def decrypt(self, encrypted: str) -> bytes:
        """Return the message, or raise BadReply if it was not made for this account."""
        decryptor = self._cipher().decryptor()
        try:
            sealed = base64.b64decode(encrypted, validate=True)
            padded = decryptor.update(sealed) + decryptor.finalize()
        except ValueError as error:
            raise BadReply(f"Encrypt cannot be decrypted: {error}") from None
        pad = padded[-1] if padded else 0
        end = 20 + int.from_bytes(padded[16:20], "big")
        rest = padded[end:]
        if not 1 <= pad <= AES_BLOCK or rest != self._app_id + bytes([pad]) * pad:
            raise BadReply("padding or AppID is wrong")
        return padded[20:end]

    def open(self, envelope: dict[str, str]) -> bytes:
        """Check a reply's signature and return what is inside, or raise BadReply."""
        signed = [envelope.get(tag, "") for tag in ("TimeStamp", "Nonce", "Encrypt")]
        if not all(signed):
            raise BadReply("no envelope of TimeStamp, Nonce and Encrypt")
        if sign(self._token, *signed) != envelope.get("MsgSignature"):
            raise BadReply("MsgSignature is wrong")
        return self.decrypt(envelope["Encrypt"])

    def _cipher(self) -> Any:
        from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

        return Cipher(algorithms.AES(self._key), modes.CBC(self._key[:16]))


class WeChat:
    """The platform for one account: owns its connections, and hangs up on them."""

    def __init__(
        self,
        url: str,
        token: str,
        *,
        attempt_timeout: float = 5.0,
        attempts: int = 3,
        account: str = ACCOUNT,
        app_id: str = "",
        aes_key: str = "",
        refused_pause: float = 0.0,
        on_attempt: Watcher | None = None,
        connection: Mapping[str, Any] | None = None,
    ) -> None:
        self.url, self.token, self.account = url, token, account
        self.attempt_timeout, self.attempts = attempt_timeout, attempts
        self._crypt = Crypt(token, app_id, aes_key) if aes_key else None
        self._refused_pause = refused_pause  # the platform itself makes none
        self._on_attempt = on_attempt
        self._connection = connection or {}  # of TCPConnector: certificates, names

    async def __aenter__(self) -> Self:
        options: dict[str, Any] = {"limit": 0, "force_close": True}
        options |= self._connection
        connector = aiohttp.TCPConnector(**options)
        self._http = aiohttp.ClientSession(connector=connector)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._http.close()

    def text(self, openid: str, content: str, **overrides: Value) -> Push:
        """Make a text message; overrides are msg_id, create_time, or tags by name."""
        return self.raw(openid, "text", **{"Content": content} | overrides)

    def image(self, openid: str, url: str, **overrides: Value) -> Push:
        """Make a picture that lies at this URL."""
        fields = {"PicUrl": url, "MediaId": "mEdIa-Id_example_01"}
        return self.raw(openid, "image", **fields | overrides)

    def voice(self, openid: str, **overrides: Value) -> Push:
        """Make a voice message, its Recognition empty as it has been since 2023."""
        fields = {"MediaId": "mEdIa-Id_example_8k", "Format": "amr", "Recognition": ""}
        return self.raw(openid, "voice", **fields | overrides)

    def event(self, openid: str, name: str, key: str = "", **overrides: Value) -> Push:
        """Make an event, which has no MsgId."""
        fields = {"Event": name, "EventKey": key, "msg_id": None}
        return self.raw(openid, "event", **fields | overrides)

    def raw(self, openid: str, msg_type: str, **fields: Value) -> Push:
        """Make a push of any type from tags by name; None leaves one out."""
        made: dict[str, Value] = {"ToUserName": self.account, "FromUserName": openid}
        made |= {"CreateTime": int(time.time()), "MsgType": msg_type}
        made |= {"MsgId": random.randrange(10**16, 9 * 10**18)}  # 17 to 19 digits
        made |= {TAGS.get(name, name): value for name, value in fields.items()}
        return Push({tag: value for tag, value in made.items() if value is not None})

    async def verify(
        self, echostr: str = "4375120948345356249", token: str = ""
    ) -> tuple[int, str]:
        """Ask as the console does when the URL is entered; return status and text."""
        params = self._signed({"echostr": echostr}, token or self.token)
        async with (
            limit(VERIFY_SECONDS, "answer to the console"),
            self._http.get(self.url, params=render_query(params)) as response,
        ):
            return response.status, await response.text()

    async def post(
        self, push: Push | bytes, *, timeout: float | None = None, **query: Value
    ) -> Response:
        """Send one request, for a push or any body; hang up with TimeoutError.

        A query parameter given here replaces the usual one, None leaves it out; a
        given timestamp or nonce is signed like a fresh one.
        """
        params, body = self._seal(push, query)
        # Leaving the request early, by this timeout too, closes its connection.
        async with asyncio.timeout(timeout or REQUEST_SECONDS):
            async with self._http.post(
                self.url, params=params, data=body, allow_redirects=False
            ) as response:
                return Response(response.status, await response.read())

    async def copies(self, push: Push, n: int) -> list[bytes | None]:
        """Post one message n times at once; return the bodies, None for what failed."""
        began = time.monotonic()
        requests = (self._request(push, number, began) for number in range(1, n + 1))
        return [attempt.body for attempt in await asyncio.gather(*requests)]

    async def attempt(self, push: Push, timeout: float | None = None) -> Seen | None:
        """Send one request; return what it brought, None if it was not answered."""
        attempt = await self._request(push, 1, time.monotonic(), timeout)
        return None if attempt.body is None else self._conclude(push, [attempt])

    async def deliver(self, push: Push) -> Seen:
        """Send a push until it is answered or given up; return what was seen."""
        attempts: list[Attempt] = []
        began, limit = time.monotonic(), self.attempts
        while len(attempts) < limit:
            attempt = await self._request(push, len(attempts) + 1, began)
            attempts.append(attempt)
            if attempt.body is not None:
                break
            if attempt.outcome != "timeout":
                # What fails at once is sent again at once, four times in all.
                limit = self.attempts + 1
            if attempt.outcome == "refused":
                await asyncio.sleep(self._refused_pause)
        return self._conclude(push, attempts)

    async def send(self, openid: str, content: str) -> Seen:
        """Let a subscriber write a text."""
        return await self.deliver(self.text(openid, content))

    async def tap(self, openid: str, tap: Tap) -> Seen:
        """Let a subscriber tap a link: its content goes out as a new message."""
        push = self.text(openid, tap.content, bizmsgmenuid=tap.menu_id)
        return await self.deliver(push)

    def _signed(self, query: dict[str, Value], token: str) -> dict[str, Value]:
        nonce = 10**8 + secrets.randbelow(10**10 - 10**8)  # no two, whatever the seed
        params = {"timestamp": int(time.time()), "nonce": nonce} | query
        stamp = (str(params["timestamp"]), str(params["nonce"]))
        return {"signature": sign(token, *stamp)} | params

    def _seal(
        self, push: Push | bytes, query: dict[str, Value]
    ) -> tuple[dict[str, str], bytes]:
        params = self._signed(query, self.token)
        body = push if isinstance(push, bytes) else push.xml
        if isinstance(push, Push):
            params = {"openid": push.openid, **params}
        if isinstance(push, Push) and self._crypt:
            encrypted = self._crypt.encrypt(body)
            stamp = (str(params["timestamp"]), str(params["nonce"]))
            signature = sign(self.token, *stamp, encrypted)
            params = {"encrypt_type": "aes", "msg_signature": signature, **params}
            body = render_xml({"ToUserName": push.account, "Encrypt": encrypted})
        return render_query(params), body

    async def _request(
        self, push: Push, number: int, began: float, timeout: float | None = None
    ) -> Attempt:
        body, started = None, self._tell(number, "posted", began)
        try:
            response = await self.post(push, timeout=timeout or self.attempt_timeout)
        except TimeoutError:
            outcome = "timeout"
        except aiohttp.ClientConnectorError:
            outcome = "refused"
        except (aiohttp.ClientError, OSError):
            outcome = "reset"
        else:
            is_taken = response.status == 200
            outcome = "answered" if is_taken else f"status {response.status}"
            body = response.body if is_taken else None
        ended = self._tell(number, outcome, began)
        return Attempt(number, started, ended, outcome, body)

    def _tell(self, number: int, event: str, began: float) -> float:
        seconds = time.monotonic() - began
        if self._on_attempt:
            self._on_attempt(number, event, seconds)
        return seconds

    def _conclude(self, push: Push, attempts: list[Attempt]) -> Seen:
        last = attempts[-1]
        seen = Seen(FAULT, reason=f"given up: {last.outcome}")
        if last.body is not None:
            seen = replace(self.read(push, last.body), attempt=last.number)
        return replace(seen, seconds=last.ended, attempts=tuple(attempts))

    def read(self, push: Push, body: bytes) -> Seen:
        """Return what the phone shows when a push is answered with this body."""
        if body in (b"", b"success"):  # never encrypted
            return Seen(None, body=body)
        try:
            fields = parse_xml(body)
            if self._crypt:
                fields = parse_xml(self._crypt.open(fields))
            content = check_reply(fields, push)
        except BadReply as bad:
            return Seen(FAULT, reason=str(bad), body=body)
        return (
            show(content, body) if content else Seen(None, body=body, handed_over=True)
        )
