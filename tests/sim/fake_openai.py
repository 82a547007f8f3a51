"""A chat API like OpenAI's, played by script on a real loopback port.

    async with FakeOpenAI() as fake:
        fake.will(says("你好！", after=1.5, rate=20), fails(429, retry_after=1))
        ...                                       # point a client at fake.base_url
        assert fake.asked("天气")[0].outcome == "finished"

Each request takes the first script that fits; with none left the default answers. What
came in and how it ended is kept in `fake.requests`. A wait in a script is seconds or an
`asyncio.Event`, so that a test can hold the model without sleeping.
"""

import asyncio
import json
import socket
import struct
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from typing import Any, Literal, NoReturn, Self

from aiohttp import web

from waiting import limit, within

HELD_SECONDS, WAIT_SECONDS = 100.0, 30.0  # by a script; for what is to come
REQUEST_BYTES = 64 * 2**20  # a few pictures as data URLs
ROLES = ("system", "user", "assistant")
Json = dict[str, Any]
# How OpenAI words a failure: status -> type, code, message.
ERRORS = {
    400: ("invalid_request_error", None, "We could not understand your request."),
    401: ("invalid_request_error", "invalid_api_key", "Incorrect API key provided."),
    404: ("invalid_request_error", "model_not_found", "The model does not exist."),
    429: ("requests", "rate_limit_exceeded", "Rate limit reached for requests."),
    500: ("server_error", None, "The server had an error processing your request."),
    503: ("server_error", "server_is_overloaded", "The engine is overloaded."),
}
# done: finish_reason, usage if asked for, [DONE]    finish: finish_reason alone
# eof: neither, yet the body is complete             cut: a FIN inside the body
# bad json, error: a broken event, an error object   reset: a RST    hang: silence
Ending = Literal["done", "finish", "eof", "cut", "bad json", "error", "reset", "hang"]


@dataclass(frozen=True)
class Thought:
    """Hidden reasoning, sent as `reasoning_content` or what a provider calls it."""

    text: str
    name: str = "reasoning_content"


Piece = str | Thought | float | asyncio.Event


@dataclass(frozen=True)
class Script:
    """One response: what is said, after which waits, in which form, and its end."""

    pieces: str | Sequence[Piece] = ""
    _: KW_ONLY
    finish: str = "stop"
    rate: float = 0.0  # deltas a second; 0: all at once
    ending: Ending = "done"
    headless: bool = False  # reset, cut or hang before the headers
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)
    body: str | Json | None = None  # sent in place of an answer
    streamed: bool = True  # False: one JSON body although a stream was asked for
    crlf: bool = False
    comments: bool = False  # a comment line before every piece, waits included
    shred: int = 0  # bytes a write; 3 tears characters apart
    gzip: bool = False  # holds everything back until the end, as a proxy would

    async def play(self) -> AsyncIterator[str | Thought | None]:
        """Yield what is said, after the waits before it; None where a comment goes."""
        pieces: Sequence[Piece] = self.pieces
        if isinstance(pieces, str):
            pieces = split(pieces, self.rate)
        for piece in pieces:
            if self.comments:
                yield None
            if isinstance(piece, asyncio.Event):
                await within(HELD_SECONDS, "opening of a script's gate", piece.wait())
            elif isinstance(piece, int | float):
                await asyncio.sleep(piece)
            else:
                await asyncio.sleep(1 / self.rate if self.rate else 0)
                yield piece


def split(text: str, rate: float = 0.0) -> list[str]:
    """Cut a text into deltas: of two characters at a rate, else into four at most."""
    size = 2 if rate else max(1, -(-len(text) // 4))
    return [text[start : start + size] for start in range(0, len(text), size)]


def says(text: str, *, after: float = 0.0, rate: float = 0.0, **options: Any) -> Script:
    """Make an answer that begins after some seconds, at so many deltas a second."""
    return Script([after, *split(text, rate)], rate=rate, **options)


def fails(
    status: int, *, after: float = 0.0, retry_after: float | None = None, **fields: str
) -> Script:
    """Make a refusal in OpenAI's words; fields (code, type, …) replace some of them."""
    headers = {} if retry_after is None else {"Retry-After": f"{retry_after:g}"}
    body = error_body(status, **fields)
    return Script([after], status=status, headers=headers, body=body)


def error_body(status: int, **fields: str | None) -> Json:
    """Word an error as OpenAI does; fields replace its message, type, param or code."""
    kind, code, message = ERRORS.get(status, ERRORS[500])
    error = {"message": message, "type": kind, "param": None, "code": code}
    return {"error": error | fields}


@dataclass(eq=False)
class Asked:
    """A request and its fate; `over` is set once the fake has done with it."""

    body: Json
    headers: Mapping[str, str]
    started: float  # loop time, as is `ended`
    ended: float | None = None
    outcome: str = "running"  # then "finished", "cut by client" or "cut by fake"
    over: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def messages(self) -> list[Json]:
        """Return the conversation that was sent."""
        return self.body["messages"]

    @property
    def question(self) -> str:
        """Return the text of the last user message, empty if there is none."""
        asked = [text_of(m) for m in self.messages if m["role"] == "user"]
        return asked[-1] if asked else ""

    def end(self, outcome: str) -> None:
        """Note how it ended; the first call counts."""
        if self.ended is None:
            self.outcome, self.ended = outcome, asyncio.get_running_loop().time()
            self.over.set()

    async def wait_over(self) -> None:
        """Wait until the fake has done with it."""
        await within(WAIT_SECONDS, "end of a call", self.over.wait())


def text_of(message: Json) -> str:
    """Return a message's text, without its pictures."""
    content = message["content"]
    if isinstance(content, str):
        return content
    return "\n".join(part["text"] for part in content if part["type"] == "text")


def is_message(message: Any) -> bool:
    """Tell whether every provider would know this message's role and content."""
    is_known = isinstance(message, dict) and message.get("role") in ROLES
    return is_known and isinstance(message.get("content"), str | list)


def objection(headers: Mapping[str, str], body: Any) -> tuple[int, str] | None:
    """Return status and message for a request that OpenAI would not take, else None."""
    if not headers.get("Authorization", "").removeprefix("Bearer ").strip():
        return 401, "You didn't provide an API key."
    if not headers.get("Content-Type", "").startswith("application/json"):
        return 415, "Unsupported content type."
    if not isinstance(body, dict):
        return 400, "We could not parse the JSON body of your request."
    if not isinstance(body.get("model"), str):
        return 400, "you must provide a model parameter"
    messages = body.get("messages")
    if not isinstance(messages, list) or not all(map(is_message, messages or [None])):
        return 400, "Invalid 'messages'."
    return None


def parse_json(raw: bytes) -> Any:
    """Return the decoded body, or None if it is not JSON."""
    try:
        return json.loads(raw)
    except ValueError:
        return None


class Reply:
    """One answer on its way, from the headers to the end that its script asks for."""

    def __init__(self, request: web.Request, script: Script, asked: Asked) -> None:
        self._request, self._script, self._asked = request, script, asked
        self._response = web.StreamResponse(headers=script.headers)
        self._deltas = 0

    async def send(self) -> web.StreamResponse:
        """Play the script to its end; cancelled when the client hangs up."""
        script = self._script
        if script.headless:
            await self._break_off()
        if script.body is not None or script.status != 200:
            return await self._at_once(script.body or error_body(script.status))
        if not script.streamed or not self._asked.body.get("stream"):
            return await self._at_once(None)
        return await self._stream()

    async def _at_once(self, body: str | Json | None) -> web.Response:
        said = [piece async for piece in self._script.play() if isinstance(piece, str)]
        self._deltas = len(said)
        self._asked.end("finished")
        if isinstance(body, str):
            text, kind = body, "text/html"
        else:
            text, kind = json.dumps(body or self._whole(said)), "application/json"
        headers = {"Content-Type": kind} | dict(self._script.headers)
        return web.Response(status=self._script.status, headers=headers, text=text)

    async def _stream(self) -> web.StreamResponse:
        self._response.content_type = "text/event-stream"
        if self._script.gzip:
            self._response.enable_compression(web.ContentCoding.gzip)
        await self._response.prepare(self._request)
        await self._events(self._chunk({"role": "assistant", "content": ""}))
        async for piece in self._script.play():
            await self._say(piece)
        if self._script.ending in ("cut", "reset", "hang"):
            await self._break_off()
        # Noted before the last bytes: a client may hang up the moment it has them.
        self._asked.end("finished")
        await self._events(*self._last_events())
        await self._response.write_eof()
        return self._response

    async def _say(self, piece: str | Thought | None) -> None:
        if piece is None:
            return await self._write(": keep-alive\n\n")
        self._deltas += 1
        delta: Json = {"content": piece}
        if isinstance(piece, Thought):
            delta = {"content": None, piece.name: piece.text}
        await self._events(self._chunk(delta))

    async def _break_off(self) -> NoReturn:
        transport = self._request.transport  # None: the client is gone
        if transport and self._script.ending != "hang":
            self._asked.end("finished")
            transport.close()
        if transport and self._script.ending == "reset":
            # Closing a socket that lingers for zero seconds sends a RST, not a FIN.
            sock = transport.get_extra_info("socket")
            linger = struct.pack("ii", 1, 0)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        # The handler is cancelled once the connection is lost or the fake closes.
        await asyncio.get_running_loop().create_future()
        raise AssertionError("nobody sets this future")

    async def _events(self, *payloads: Json | str) -> None:
        await self._write("".join(map(render_event, payloads)))

    async def _write(self, text: str) -> None:
        raw = text.replace("\n", "\r\n" if self._script.crlf else "\n").encode()
        size = self._script.shred or len(raw) or 1
        for start in range(0, len(raw), size):
            await self._response.write(raw[start : start + size])
            await asyncio.sleep(0)  # a client in this process reads in between

    def _last_events(self) -> list[Json | str]:
        finish = self._chunk({}, self._script.finish)
        options = self._asked.body.get("stream_options") or {}
        counts = finish | {"choices": [], "usage": self._usage()}
        usage = [counts] if options.get("include_usage") else []
        endings: dict[Ending, list[Json | str]] = {
            "done": [finish, *usage, "[DONE]"],
            "finish": [finish],
            "bad json": ['{"choices": [{"delta": {"cont', finish, "[DONE]"],
            "error": [error_body(503), "[DONE]"],
        }
        return endings.get(self._script.ending, [])

    def _chunk(self, delta: Json, finish: str | None = None) -> Json:
        choice = {"index": 0, "delta": delta, "finish_reason": finish}
        return self._reply("chat.completion.chunk", choice)

    def _whole(self, said: list[str]) -> Json:
        message = {"role": "assistant", "content": "".join(said)}
        choice = {"index": 0, "message": message, "finish_reason": self._script.finish}
        return self._reply("chat.completion", choice) | {"usage": self._usage()}

    def _reply(self, kind: str, choice: Json) -> Json:
        head = {"id": "chatcmpl-1", "object": kind, "created": int(time.time())}
        return head | {"model": self._asked.body["model"], "choices": [choice]}

    def _usage(self) -> dict[str, int]:
        prompt = sum(len(text_of(message)) for message in self._asked.messages)
        counts = {"prompt_tokens": prompt, "completion_tokens": self._deltas}
        return counts | {"total_tokens": prompt + self._deltas}


def render_event(payload: Json | str) -> str:
    """Render an event with its characters as they are, so that UTF-8 is on the wire."""
    is_text = isinstance(payload, str)
    text = payload if is_text else json.dumps(payload, ensure_ascii=False)
    return f"data: {text}\n\n"


def friendly(question: str) -> Script:
    """Answer when no script is left."""
    return Script(f"你好！关于「{question}」，我是这样想的：这是个好问题，慢慢来就好。")


class FakeOpenAI:
    """The server: owns its port, the scripts to come and the requests that came."""

    def __init__(
        self,
        default: Script | Callable[[str], Script] = friendly,
        host: str = "127.0.0.1",
        port: int = 0,
    ) -> None:
        self.host, self.port = host, port
        self.requests: list[Asked] = []
        self.base_url = ""  # known once open
        self._default = default
        self._scripts: list[tuple[str, Script]] = []  # with what the question contains
        self._news = asyncio.Condition()  # notified of every request
        self._handlers: set[asyncio.Task[Any]] = set()
        self._closing = False
        app = web.Application(client_max_size=REQUEST_BYTES)
        app.router.add_post("/v1/chat/completions", self._completions)
        # Cancelling is how a handler hears at once that its client hung up.
        self._runner = web.AppRunner(
            app, handler_cancellation=True, access_log=None, shutdown_timeout=0.5
        )

    async def __aenter__(self) -> Self:
        await self._runner.setup()
        await web.TCPSite(self._runner, self.host, self.port).start()
        self.base_url = f"http://{self.host}:{self._runner.addresses[0][1]}/v1"
        return self

    async def __aexit__(self, *_: object) -> None:
        self._closing = True
        for handler in self._handlers:
            handler.cancel()
        await self._runner.cleanup()

    def will(self, *scripts: Script | str, when: str | None = None) -> None:
        """Queue answers; with `when`, only for questions that contain it."""
        made = (Script(s) if isinstance(s, str) else s for s in scripts)
        self._scripts += [(when or "", script) for script in made]

    def asked(self, substring: str = "") -> list[Asked]:
        """Return the requests whose question contains this, oldest first."""
        return [asked for asked in self.requests if substring in asked.question]

    async def arrival(self, substring: str = "", count: int = 1) -> Asked:
        """Wait until so many such questions have come; return the last of them."""
        news = f"question number {count} with {substring!r}"
        async with limit(WAIT_SECONDS, news), self._news:
            await self._news.wait_for(lambda: len(self.asked(substring)) >= count)
        return self.asked(substring)[count - 1]

    async def _completions(self, request: web.Request) -> web.StreamResponse:
        body = parse_json(await request.read())
        if refusal := objection(request.headers, body):
            status, message = refusal
            return web.json_response(error_body(status, message=message), status=status)
        asked = Asked(body, request.headers, asyncio.get_running_loop().time())
        handler = asyncio.current_task()
        assert handler
        self._handlers.add(handler)
        try:
            await self._announce(asked)
            return await Reply(request, self._script_for(asked.question), asked).send()
        except (asyncio.CancelledError, ConnectionResetError):
            asked.end("cut by fake" if self._closing else "cut by client")
            raise
        finally:
            self._handlers.discard(handler)

    async def _announce(self, asked: Asked) -> None:
        async with self._news:
            self.requests.append(asked)
            self._news.notify_all()

    def _script_for(self, question: str) -> Script:
        for position, (when, script) in enumerate(self._scripts):
            if when in question:
                del self._scripts[position]
                return script
        default = self._default
        return default if isinstance(default, Script) else default(question)
