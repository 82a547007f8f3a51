"""Both ends of a benchmark, lean enough that the server in between is what is measured.

The platform (`deliver`, `watch`) and the upstream (`serve_upstream`) speak just enough
HTTP over bare sockets: a twentieth of what a simulator made for tests costs. A question
says how it is to be answered: "q17 short 3.5 …" is number 17 of a run, answered with a
short text after 3.5 seconds; "long 0.2" asks for a fifth of 20 KB. Both ends tell time
by the machine's monotonic clock.
"""

import asyncio
import hashlib
import json
import pathlib
import re
import time
from collections.abc import Callable
from dataclasses import dataclass

TOKEN = "benchToken42"
ATTEMPT_SECONDS, ATTEMPTS = 5.0, 3
LONG_BYTES = 20_000
TOKEN_CHARS = 3
TICK = 0.01  # seconds between two tokens of a long answer
SHORT = "春天适合去郊外走走：上午看花，中午找一家小馆，下午沿河慢慢走回来。带件外套。"
MARKDOWN = pathlib.Path(__file__).with_name("long_answer.md").read_text("utf-8")
LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)


# The upstream


def chunk(text: str) -> bytes:
    """Return one chunk of a chunked body."""
    raw = text.encode()
    return b"%x\r\n%s\r\n" % (len(raw), raw)


def event(delta: dict | None, **more: object) -> bytes:
    """Return one event of a chat completion's stream, as OpenAI words it."""
    finish = None if delta else "stop"
    choice = {"index": 0, "delta": delta or {}, "logprobs": None}
    body: dict[str, object] = {"id": "chatcmpl-DkQ1"}
    body |= {"object": "chat.completion.chunk"}
    body |= {"created": 1790000000, "model": "bench", "service_tier": "default"}
    body |= {"choices": [choice | {"finish_reason": finish}], "usage": None}
    return chunk(f"data: {json.dumps(body | more, ensure_ascii=False)}\n\n")


HEAD = (
    b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream; charset=utf-8\r\n"
    b"Transfer-Encoding: chunked\r\n\r\n"
)
USAGE = {"prompt_tokens": 60, "completion_tokens": 20, "total_tokens": 80}
TAIL = event(None) + event({}, choices=[], usage=USAGE) + chunk("data: [DONE]\n\n")
TAIL += b"0\r\n\r\n"


def tokens_of(text: str) -> list[bytes]:
    """Return the events of a text, a few characters each."""
    starts = range(0, len(text), TOKEN_CHARS)
    return [event({"content": text[at : at + TOKEN_CHARS]}) for at in starts]


def long_text() -> str:
    """Return 20 KB of Markdown."""
    copies = LONG_BYTES // len(MARKDOWN.encode()) + 1
    return (MARKDOWN * copies).encode()[:LONG_BYTES].decode("utf-8", "ignore")


@dataclass(slots=True)
class Stream:
    """A long answer under way."""

    name: str  # of the question
    began: float
    count: int  # tokens in all
    sent: int = 0


class Upstream:
    """What the chat API did: calls, when each answer's last byte left, its streams."""

    def __init__(self) -> None:
        self.calls: dict[str, int] = {}  # by question
        self.ended: dict[str, float] = {}
        self.short = tokens_of(SHORT)
        self.long = tokens_of(long_text())
        self.streams: dict[UpstreamLine, Stream] = {}

    def report(self) -> bytes:
        """Return what was seen since the last report, as JSON."""
        body = {"calls": self.calls, "ended": self.ended, "tokens": len(self.long)}
        raw = json.dumps(body).encode()
        self.calls, self.ended = {}, {}
        return raw

    def answer(self, line: "UpstreamLine", question: str) -> None:
        """Begin to answer a question."""
        name, kind, seconds, *_ = question.split()
        self.calls[name] = self.calls.get(name, 0) + 1
        loop = asyncio.get_running_loop()
        if kind == "long":
            line.write(HEAD + event({"role": "assistant", "content": ""}))
            count = int(float(seconds) * len(self.long))
            self.streams[line] = Stream(name, loop.time(), count)
            return
        # The first token after its delay, the others in three writes more.
        pieces, size = tokens_of(f"{name}。") + self.short, len(self.short) // 3
        head = HEAD + event({"role": "assistant", "content": ""}) + pieces[0]
        rest = [b"".join(pieces[1 + size * n : 1 + size * (n + 1)]) for n in range(3)]
        rest[-1] = b"".join(pieces[1 + size * 2 :]) + TAIL
        loop.call_later(float(seconds), line.write, head)
        for number, piece in enumerate(rest, 1):
            last = name if number == len(rest) else ""
            delay = float(seconds) + 0.005 * number
            loop.call_later(delay, self.finish, line, piece, last)

    def finish(self, line: "UpstreamLine", piece: bytes, name: str) -> None:
        """Write a piece of an answer; with a name, its last one."""
        if name:
            self.ended[name] = time.monotonic()
        line.write(piece)

    async def keep_streaming(self) -> None:
        """Write what is due of every long answer, a hundred times a second."""
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(TICK)
            for line, stream in list(self.streams.items()):
                due = min(stream.count, int((loop.time() - stream.began) / TICK))
                line.write(b"".join(self.long[stream.sent : due]))
                stream.sent = due
                if due == stream.count:
                    del self.streams[line]
                    self.finish(line, TAIL, stream.name)


class UpstreamLine(asyncio.Protocol):
    """A connection to the upstream; requests come one after another."""

    def __init__(self, upstream: Upstream) -> None:
        self.upstream = upstream
        self.rest = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep where to write."""
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    def connection_lost(self, error: Exception | None) -> None:
        """Let go of a stream nobody reads."""
        self.upstream.streams.pop(self, None)

    def write(self, raw: bytes) -> None:
        """Write unless the line is gone."""
        if raw and not self.transport.is_closing():
            self.transport.write(raw)

    def data_received(self, raw: bytes) -> None:
        """Take a request when it is whole."""
        self.rest += raw
        head, gap, body = self.rest.partition(b"\r\n\r\n")
        length = LENGTH.search(head)
        if not gap or len(body) < (int(length[1]) if length else 0):
            return
        self.rest = b""
        if head.startswith(b"GET"):
            report = self.upstream.report()
            status = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
            self.write(b"%sContent-Length: %d\r\n\r\n" % (status, len(report)) + report)
            return
        self.upstream.answer(self, json.loads(body)["messages"][-1]["content"])


async def serve_upstream(port: int, ready: Callable[[], None]) -> None:
    """Serve for ever."""
    upstream, loop = Upstream(), asyncio.get_running_loop()
    server = await loop.create_server(
        lambda: UpstreamLine(upstream), "127.0.0.1", port, backlog=1024
    )
    ready()
    async with server:
        await upstream.keep_streaming()


# The platform


@dataclass(frozen=True, slots=True)
class Delivered:
    """What became of a message."""

    name: str  # of the question
    body: bytes | None  # None: all attempts failed
    attempt: int
    began: float  # monotonic clock
    ended: float

    @property
    def is_answered(self) -> bool:
        """Say whether the chat shows the answer's own text."""
        return self.body is not None and f"{self.name}。".encode() in self.body


def push(port: int, openid: str, number: int, text: str) -> bytes:
    """Return a signed request with a text message."""
    stamp, nonce = str(int(time.time())), str(10**9 + number)
    signature = hashlib.sha1("".join(sorted((TOKEN, stamp, nonce))).encode())
    body = (
        "<xml><ToUserName><![CDATA[gh_5f0c1a2b3d4e]]></ToUserName>"
        f"<FromUserName><![CDATA[{openid}]]></FromUserName>"
        f"<CreateTime>{stamp}</CreateTime><MsgType><![CDATA[text]]></MsgType>"
        f"<Content><![CDATA[{text}]]></Content><MsgId>{2 * 10**16 + number}</MsgId></xml>"
    ).encode()
    query = f"signature={signature.hexdigest()}&timestamp={stamp}&nonce={nonce}"
    head = (
        f"POST /wechat?{query}&openid={openid} HTTP/1.0\r\nHost: 127.0.0.1:{port}\r\n"
        "User-Agent: Mozilla/4.0\r\nAccept: */*\r\nContent-Type: text/xml\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


def get(path: str) -> bytes:
    """Return a request for a page."""
    return f"GET {path} HTTP/1.0\r\nHost: 127.0.0.1\r\n\r\n".encode()


class Line(asyncio.Protocol):
    """One request on a connection of its own; `body` is a future, None for a failure."""

    def __init__(self, raw: bytes) -> None:
        self.raw, self.received = raw, b""
        self.body = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Send the request."""
        assert isinstance(transport, asyncio.Transport)
        transport.write(self.raw)

    def data_received(self, raw: bytes) -> None:
        """Take the response when it is whole."""
        self.received += raw
        head, gap, body = self.received.partition(b"\r\n\r\n")
        length = LENGTH.search(head)
        if gap and length and len(body) >= int(length[1]):
            self.end(body if b" 200 " in head[:20] else None)

    def connection_lost(self, error: Exception | None) -> None:
        """End; a body without a length ends with its line."""
        _, gap, body = self.received.partition(b"\r\n\r\n")
        self.end(body if gap else None)

    def end(self, body: bytes | None) -> None:
        """Set the body, the first time."""
        if not self.body.done():
            self.body.set_result(body)


async def fetch(port: int, raw: bytes, seconds: float = 60.0) -> bytes | None:
    """Return the body of the response to a request, None if there was none in time."""
    loop, line = asyncio.get_running_loop(), None
    try:
        async with asyncio.timeout(seconds):
            make = lambda: Line(raw)  # noqa: E731
            transport, line = await loop.create_connection(make, "127.0.0.1", port)
            return await line.body
    except (TimeoutError, OSError):
        return None
    finally:
        if line:
            transport.abort()


async def deliver(port: int, openid: str, number: int, text: str) -> Delivered:
    """Post a message as WeChat does, up to three times; the first answer counts."""
    began, raw, attempt = time.monotonic(), push(port, openid, number, text), 0
    body, name = None, text.split()[0]
    while body is None and attempt < ATTEMPTS:
        attempt += 1
        body = await fetch(port, raw, ATTEMPT_SECONDS)
    return Delivered(name, body, attempt, began, time.monotonic())
