#!/usr/bin/env python3
# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "aiohttp~=3.14",
#     "aiosqlite~=0.22.1",
#     "xmltodict~=1.0",
#     "cryptography>=46",
#     "markdown-it-py~=4.3",
#     "latex2mathml~=3.81",
#     "jinja2~=3.1",
# ]
# ///
"""wxgpt: subscribers of a WeChat Official Account talk with a chat model.

WeChat posts each message as XML, waits five seconds, hangs up and posts the same
message again: three attempts in all, and the answer to one of them is the only way to
say anything. Models often need longer. So the first request of a message starts one
task, every request of that message waits for it, and the last one leaves in time with
what is written so far, a tap for the rest, and a link to a page that goes on live.

The path of a message, always upwards in this file:

    receive_message -> read_push: is_signed, parse_message
                    -> take_attempt -> reply_to -> render_text_reply
                                           |  waits for
    in the message's task:   write_answer -> a command, a part, or accept_question
    in the question's task:  converse -> chat_messages -> ChatClient.stream
                             -> Answer.append -> Store.finish_turn

A request only waits and a task only writes; they meet in a Delivery (the attempts of
one message and the one reply they all get) and in an Answer (what the model writes for
one question). No request does work that must outlive its connection.

In memory: deliveries of the last minute, answers being written, who waits in which
order. In SQLite: sessions, questions with their answers, parts, decided replies; a
question is stored before the model is asked, a reply before it is sent, and what a
killed process left unfinished is asked again by the next one.

Beside this file: schema.sql; texts.toml, every line people read; pages/, what a browser
shows; owner/, the commands that do not serve, which import this file and not the other
way round.

Sections: 1 constants, 2 configuration, 3 WeChat protocol, 4 formulas, 5 chat text,
6 store, 7 chat API, 8 answers in progress, 9 services, 10 commands, 11 the path of a
message, 12 pages, 13 HTTP handlers, 14 application, 15 the command line.

Vocabulary: openid (a subscriber of this account), MsgId (a message; the same on every
attempt), attempt, passive reply, session, turn (a question and its answer), part (one
reply's worth of a long answer), delta (a piece of a streamed answer).

Run `python wxgpt.py demo` to try it, `python wxgpt.py --config wxgpt.toml` to serve.
"""

import signal

if __name__ == "__main__":  # from here on Ctrl-C waits for `main`, which ends quietly
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])

import argparse
import asyncio
import base64
import bisect
import collections
import contextlib
import dataclasses
import datetime
import email.utils
import functools
import gc
import hashlib
import hmac
import html
import importlib.util
import itertools
import json
import logging
import os
import pathlib
import random
import re
import secrets
import socket
import sqlite3
import string
import sys
import time
import tomllib
import types
import typing
import unicodedata
import urllib.parse
import weakref
from collections.abc import (
    AsyncGenerator,
    AsyncIterator,
    Awaitable,
    Callable,
    Iterator,
    Sequence,
)
from dataclasses import MISSING, dataclass, field, fields, replace
from xml.etree import ElementTree
from xml.parsers.expat import ExpatError

import aiohttp
import aiosqlite
import jinja2
import xmltodict
from aiohttp import web
from markdown_it.renderer import RendererHTML
from markdown_it.token import Token
from markdown_it.utils import OptionsDict
from markupsafe import Markup

VERSION = "0.1.0"
log = logging.getLogger("wxgpt")


# ---------------------------------------------------------------------------
# 1. Constants
#
# What the platform fixes, with where that is known from.
# ---------------------------------------------------------------------------

ATTEMPTS = 3  # requests per message; the documents say "三次重试", practice is 3 in all
ATTEMPT_SECONDS = 5.0  # "五秒内" in 被动回复用户消息, developers.weixin.qq.com
REPLY_BYTES = 1800  # undocumented; reports of refused texts begin at 1884 bytes
BODY_BYTES = 64 * 1024  # far above the largest push
SIGNATURE_SECONDS = 600  # how far a push's timestamp may be off
HOLD_SECONDS = 3.0  # an attempt that ran over is held so long, then its line is cut
REPLY_HOURS = 24  # a later copy of a message gets the very same reply for so long
GRACE_SECONDS = 4.0  # what running answers get at a shutdown
LINGER_SECONDS = 0.25  # of it; who was let in last sends its request meanwhile
RESUME_SECONDS = 600  # questions older than that are not asked again after a crash
ASKINGS = 3  # processes that may take one question to the upstream: once, twice again
RETRY_PAUSES = (0.5, 1.0)  # seconds before a question is asked again
RETRY_AFTER_SECONDS = 120  # an upstream that asks for a longer wait is not asked again
ANSWER_CHARS = 200_000  # an answer that goes on and on is ended there
STORE_SECONDS = 2.0  # before the end of an answer is stored again after a failure
SAVE_SECONDS = 1.0  # text so far is stored so often
LAPSE_SECONDS = 24 * 3600  # a session that ran out is mentioned for so long
PICTURE_SECONDS = 600  # a picture waits so long for its question
PICTURE_BYTES = 4 * 1024 * 1024
PICTURE_FETCHES = 3  # at one time
PICTURE_TIMEOUT = 20  # seconds to fetch one
REPEAT_SECONDS = 60  # the same question again within this time joins the first
RECENT_SECONDS = 3600  # 继续 outside a session looks back so far
FORGET_SECONDS = 300  # 确认删除 counts for so long
CHECK_BYTES = 64 * 1024 * 1024  # a larger database is not read through at each start
BACKLOG = 1024  # connections that wait while the process is replaced
SD_FIRST_DESCRIPTOR = 3  # sd_listen_fds(3)
BEIJING = datetime.timezone(datetime.timedelta(hours=8))

# WeChat sends stickers as text with one of these (seen in many projects' reports).
STICKER_TEXTS = ("【收到不支持的消息类型，暂无法显示】", "[Unsupported Message]")

# What XML 1.0 cannot carry, lone surrogates included; WeChat shows a fault for it.
ILLEGAL = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


DEFAULT_MODEL = "gpt-6-luna"  # thinks by default: gets reasoning_effort "none"
WELCOME = "欢迎关注！发 /chatgpt 就能和 AI 聊天，发 /help 看用法。"
DEFAULT_PROMPT = (
    "你在微信里和人聊天。用对方的语言，先给结论，一般不超过 200 字，需要时再展开。"
    "少用标题和表格，公式用普通文字写。"
)


# ---------------------------------------------------------------------------
# 2. Configuration
#
# One TOML file. A setting is one field: its type, default, bounds and comment stand
# together, and the file is checked against the fields. What subscribers read stands in
# texts.toml; the settings' [texts] change it line by line.
# ---------------------------------------------------------------------------


class ConfigError(Exception):
    """A setting that cannot be used; the text is the one line an owner reads."""


def setting(
    default: object, comment: str, *bounds: float, secret: bool = False
) -> typing.Any:
    """Return the field of one setting, with its bounds; default MISSING: required."""
    meta = {"comment": comment, "bounds": bounds, "secret": secret}
    if isinstance(default, dict):
        return field(default_factory=lambda: dict(default), metadata=meta)
    return field(default=default, metadata=meta)


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerSettings:
    """Where to listen."""

    host: str = setting("127.0.0.1", "address to listen on")
    port: int = setting(8080, "port to listen on; 0: any free one", 0, 65535)
    path: str = setting("/wechat", "path of WeChat's URL, a slash behind or not")


@dataclass(frozen=True, slots=True, kw_only=True)
class WeChatSettings:
    """The account, and the platform's timing."""

    token: str = setting(MISSING, "the token typed into WeChat's console", secret=True)
    app_id: str = setting("", "AppID; together with aes_key: safe mode")
    aes_key: str = setting("", "EncodingAESKey, 43 characters", secret=True)
    attempt_timeout: float = setting(ATTEMPT_SECONDS, "seconds per attempt", 0.2, 60)
    attempts: int = setting(ATTEMPTS, "requests WeChat makes for one message", 1, 10)
    reply_margin: float = setting(
        0.8, "a reply that cannot wait leaves so many seconds before the end", 0, 30
    )
    mute_guard: int = setting(
        30, "attempts that may run over in five minutes; 0: none", 0, 1_000_000
    )
    picture_hosts: tuple[str, ...] = setting(
        ("mmbiz.qpic.cn", "mmecoa.qpic.cn", "wx.qlogo.cn"), "hosts of pictures"
    )

    @property
    def margin(self) -> float:
        """Return reply_margin in seconds, at most half of an attempt."""
        return min(self.reply_margin, self.attempt_timeout / 2)


@dataclass(frozen=True, slots=True, kw_only=True)
class AssistantSettings:
    """One assistant: an OpenAI-compatible chat API and how to ask it."""

    base_url: str = setting("https://api.openai.com/v1", "base URL of the chat API")
    api_key: str = setting(MISSING, "key of the chat API", secret=True)
    model: str = setting(DEFAULT_MODEL, "name of the model")
    system_prompt: str = setting(DEFAULT_PROMPT, "system prompt; empty: none")
    proxy: str = setting("", "http, https or socks proxy towards the API", secret=True)
    extra: dict = setting({}, "table merged into the request body")
    first_token_timeout: float = setting(60.0, "seconds to the first token", 0.05, 3600)
    idle_timeout: float = setting(60.0, "seconds between tokens", 0.05, 3600)
    timeout: float = setting(240.0, "seconds for one answer in all", 0.05, 86400)


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionSettings:
    """How long a conversation lasts, and how much of it the model gets."""

    ttl: float = setting(300.0, "idle seconds until a session ends", 1, 31_536_000)
    context_chars: int = setting(12000, "characters of it sent along", 0, 10_000_000)
    auto_open: bool = setting(False, "any text opens the first assistant")


@dataclass(frozen=True, slots=True, kw_only=True)
class LimitSettings:
    """What strangers may cost."""

    questions_per_day: int = setting(100, "per subscriber and day; 0: any", 0, 10**9)
    all_per_day: int = setting(2000, "of all together per day; 0: any", 0, 10**9)
    question_chars: int = setting(2000, "longest question", 1, 1_000_000)
    waiting: int = setting(3, "questions one subscriber may have unanswered", 1, 1000)
    at_once: int = setting(64, "upstream calls at one time", 1, 1_000_000)
    allow: tuple[str, ...] = setting((), "openids: only these")
    deny: tuple[str, ...] = setting((), "openids: never these")
    blocked_words: str = setting("", "a file, one word a line")


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplySettings:
    """Replies that no model writes."""

    subscribe: str = setting(WELCOME, "on following; empty: silence")
    outside: str = setting("", "to text outside a session; empty: silence")
    label: str = setting("（AI 生成）", "ends each part of a model's text; empty: none")
    keywords: dict[str, str] = setting({}, "exact text = reply, outside a session")

    @property
    def label_line(self) -> str:
        """Return the label as the line it ends a part with."""
        return "\n" + self.label if self.label else ""


@dataclass(frozen=True, slots=True, kw_only=True)
class HistorySettings:
    """How long things can be read."""

    link_hours: float = setting(72.0, "hours an answer's link works", 1e-6, 876_000)
    history_minutes: float = setting(120.0, "minutes a history link works", 1e-4, 1e8)
    keep_days: float = setting(0.0, "days until deletion; 0: never", 0, 36_500)


@dataclass(frozen=True, slots=True, kw_only=True)
class DatabaseSettings:
    """Where everything is kept."""

    path: str = setting("", "file; empty: wxgpt.db in the state directory")


class Texts:
    """Every line a subscriber can read, by its name in texts.toml: `texts.opened`."""

    __slots__ = ("_lines",)

    def __init__(self, lines: typing.Mapping[str, str]) -> None:
        self._lines = types.MappingProxyType(dict(lines))

    def __getattr__(self, name: str) -> str:
        try:
            return self._lines[name]
        except KeyError:
            raise AttributeError(f"no text is named {name}") from None

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Texts) and self._lines == other._lines


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """All settings, checked; `load_config` makes it."""

    public_url: str = setting(MISSING, "how a subscriber's phone reaches this server")
    server: ServerSettings = field(default_factory=ServerSettings)
    wechat: WeChatSettings
    assistants: dict[str, AssistantSettings]
    session: SessionSettings = field(default_factory=SessionSettings)
    limits: LimitSettings = field(default_factory=LimitSettings)
    replies: ReplySettings = field(default_factory=ReplySettings)
    texts: Texts
    history: HistorySettings = field(default_factory=HistorySettings)
    database: DatabaseSettings = field(default_factory=DatabaseSettings)


def all_are(kind: type) -> Callable[[typing.Iterable], bool]:
    """Return a test for every item to be of one type."""
    return lambda items: all(isinstance(item, kind) for item in items)


# A field's type: what an owner may write for it, and the test for that.
KINDS: dict[object, tuple[str, Callable[[object], bool]]] = {
    str: ("text", lambda v: isinstance(v, str)),
    bool: ("true or false", lambda v: isinstance(v, bool)),
    int: ("a whole number", lambda v: type(v) is int),
    float: ("a number", lambda v: type(v) in (int, float)),
    dict: ("a table", lambda v: isinstance(v, dict)),
    tuple[str, ...]: (
        "a list of texts",
        lambda v: isinstance(v, list) and all_are(str)(v),
    ),
    dict[str, str]: (
        "a table of texts",
        lambda v: isinstance(v, dict) and all_are(str)(v.values()),
    ),
}


def read_toml(path: str | os.PathLike) -> dict[str, typing.Any]:
    """Return what a TOML file has; raise ConfigError with one line."""
    try:
        return tomllib.loads(pathlib.Path(path).read_text("utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not TOML: {error}") from None


def checked(value: object, entry: typing.Any, name: str) -> object:
    """Return the value of one setting; raise ConfigError with what is accepted."""
    if entry.type not in KINDS:  # a table that was read before
        return value
    wanted, fits = KINDS[entry.type]
    bounds = entry.metadata.get("bounds")
    if fits(value) and (not bounds or bounds[0] <= value <= bounds[1]):
        return tuple(value) if isinstance(value, list) else value
    found = repr(value) if value is not MISSING else "nothing"
    if entry.metadata.get("secret") and value is not MISSING:
        found = "something else"
    limits = f" from {bounds[0]:g} to {bounds[1]:g}" if bounds else ""
    raise ConfigError(f"{name}: found {found}, accepted is {wanted}{limits}")


def check_names(table: dict, known: typing.Iterable[str], prefix: str) -> None:
    """Raise ConfigError for a setting that there is not."""
    for key in table:
        if key not in known:
            shown = key if key.isprintable() else repr(key)  # the error is one line
            names = ", ".join(known)
            raise ConfigError(f"{prefix}{shown}: unknown setting, accepted are {names}")


def read_table(kind: type, table: object, name: str) -> typing.Any:
    """Return a TOML table as its settings class; raise ConfigError."""
    if not isinstance(table, dict):
        raise ConfigError(f"{name}: found {table!r}, accepted is a table")
    known, dot = {entry.name: entry for entry in fields(kind)}, name and name + "."
    check_names(table, known, dot)
    values = {}
    for key, entry in known.items():
        if isinstance(entry.type, type) and dataclasses.is_dataclass(entry.type):
            values[key] = read_table(entry.type, table.get(key, {}), dot + key)
        elif key in table or entry.default is entry.default_factory is MISSING:
            values[key] = checked(table.get(key, MISSING), entry, dot + key)
    return kind(**values)


VARIABLES = {"api_key": "OPENAI_API_KEY", "base_url": "OPENAI_BASE_URL"}


def place_of(
    name: str, key: str, one: AssistantSettings, environ: typing.Mapping[str, str]
) -> str:
    """Return where an assistant's setting stands: its name, or the variable's."""
    variable = VARIABLES.get(key, "") if name == "chatgpt" else ""
    if variable and environ.get(variable) == getattr(one, key):
        return f"{variable} in the environment"
    return f"assistants.{name}.{key}"


def read_assistants(table: object, environ: typing.Mapping[str, str]) -> dict:
    """Return the assistants by name, `chatgpt` filled up from the environment."""
    if not isinstance(table, dict) or not all_are(dict)(table.values()):
        # Without what was found: a key may stand in a wrong place.
        raise ConfigError("assistants: found no tables, accepted is a table of tables")
    if "chatgpt" not in table and not environ.get("OPENAI_API_KEY"):
        raise ConfigError("assistants.chatgpt: found nothing, accepted is a table")
    given = VARIABLES.items()
    filled = {key: environ[name] for key, name in given if environ.get(name)}
    table = {**table, "chatgpt": filled | table.get("chatgpt", {})}
    return {
        name: read_table(AssistantSettings, one, f"assistants.{name}")
        for name, one in table.items()
    }


def placeholders(text: str) -> set[str]:
    """Return what stands in braces, format and all; raise ValueError if broken."""
    return {
        name + (f"!{how}" if how else "") + (f":{form}" if form else "")
        for _, name, form, how in string.Formatter().parse(text)
        if name is not None
    }


def demand(holds: object, name: str, found: object, wanted: str) -> None:
    """Raise ConfigError unless something holds."""
    if not holds:
        raise ConfigError(f"{name}: found {found!r}, accepted is {wanted}")


TEXTS = pathlib.Path(__file__).with_name("texts.toml")


def read_texts(changes: object) -> Texts:
    """Return the lines of texts.toml with an owner's changes; raise ConfigError.

    A changed line may have no other placeholders than the one it replaces.
    """
    lines = read_toml(TEXTS)
    for name, line in lines.items():
        demand(isinstance(line, str), f"{TEXTS}: {name}", line, "text")
    demand(isinstance(changes, dict), "texts", changes, "a table")
    changed = typing.cast(dict, changes)
    check_names(changed, lines, "texts.")
    for name, line in changed.items():
        demand(isinstance(line, str), f"texts.{name}", line, "text")
        allowed = placeholders(lines[name])
        try:
            strange = placeholders(line) - allowed
        except ValueError as error:
            raise ConfigError(f"texts.{name}: {error}") from None
        if strange:
            names = ", ".join(f"{{{name}}}" for name in sorted(allowed)) or "none"
            found = f"found {{{strange.pop()}}}, accepted are {names}"
            raise ConfigError(f"texts.{name}: {found}")
    return Texts(lines | changed)


def check_assistant(
    name: str, one: AssistantSettings, environ: typing.Mapping[str, str]
) -> None:
    """Raise ConfigError for an assistant that cannot work."""
    where = f"assistants.{name}"
    is_name = name and not re.search(r"[\s/]", name)
    demand(is_name, where, name, "a name without spaces and slashes")
    is_url = re.match(r"https?://[^/]", one.base_url.strip())
    place = place_of(name, "base_url", one, environ)
    demand(is_url, place, one.base_url, "an http(s) URL")
    is_key = re.fullmatch(r"[!-~]+", one.api_key.strip())  # it goes into a header
    found = "something else" if one.api_key.strip() else ""
    place = place_of(name, "api_key", one, environ)
    demand(is_key, place, found, "the key of the API, without blanks")
    is_proxy = re.match(r"(https?|socks[45]h?)://|$", one.proxy)
    demand(is_proxy, f"{where}.proxy", "***", "an http, https or socks URL")
    has_socks = importlib.util.find_spec("aiohttp_socks")
    is_usable = has_socks or not one.proxy.startswith("socks")
    wanted = "http(s), or socks after: pip install aiohttp-socks"
    demand(is_usable, f"{where}.proxy", "***", wanted)
    for key in {"model", "messages", "stream"} & set(one.extra):
        demand(False, f"{where}.extra.{key}", one.extra[key], "anything but this key")


def check_values(config: Config, environ: typing.Mapping[str, str]) -> None:
    """Raise ConfigError for what cannot work."""
    url, path, token = config.public_url, config.server.path, config.wechat.token
    is_url = False
    with contextlib.suppress(ValueError):  # for a port that is none
        has_port = urllib.parse.urlsplit(url).port != 0
        pattern = r"https?://[^\s/?#@:][^\s/?#@]*(/[^\s?#]*)?"
        is_url = has_port and bool(re.fullmatch(pattern, url))
    demand(is_url, "public_url", url, "http:// or https:// and a host")
    demand(
        re.fullmatch(r"(/[\w.~-]+)+/?", path),
        "server.path",
        path,
        "a path like /wechat",
    )
    is_token = re.fullmatch(r"[A-Za-z0-9]{3,32}", token)
    demand(is_token, "wechat.token", "***", "3 to 32 letters and digits")
    app_id, aes_key = config.wechat.app_id, config.wechat.aes_key
    half = "only app_id" if app_id else "only aes_key"
    both = "app_id and aes_key, or neither"
    demand(bool(app_id) == bool(aes_key), "wechat.aes_key", half, both)
    is_key = not aes_key or re.fullmatch(r"[A-Za-z0-9]{43}", aes_key)
    demand(
        is_key, "wechat.aes_key", f"{len(aes_key)} characters", "43 letters and digits"
    )
    for name, one in config.assistants.items():
        check_assistant(name, one, environ)


def load_config(
    path: str | os.PathLike,
    environ: typing.Mapping[str, str] = types.MappingProxyType({}),
) -> Config:
    """Return the checked settings of a TOML file; raise ConfigError with one line."""
    table = read_toml(path)
    table["assistants"] = read_assistants(table.get("assistants", {}), environ)
    table["texts"] = read_texts(table.get("texts", {}))
    config = read_table(Config, table, "")
    check_values(config, environ)
    state = environ.get("STATE_DIRECTORY", "").split(":")[0]
    if not state and os.path.isdir("/var/lib/wxgpt"):
        state = "/var/lib/wxgpt"
    file = config.database.path or str(pathlib.Path(state) / "wxgpt.db")
    return replace(
        config,
        public_url=config.public_url.rstrip("/"),
        database=DatabaseSettings(path=file),
    )


def effective(config: Config) -> Iterator[str]:
    """Yield the settings as lines for the log, secrets masked, long texts left out."""
    yield f"public_url={config.public_url}"
    tables = {name: getattr(config, name) for name in ("server", "wechat", "session")}
    tables |= {
        name: getattr(config, name) for name in ("limits", "history", "database")
    }
    tables |= {f"assistants.{name}": one for name, one in config.assistants.items()}
    for name, table in tables.items():
        shown = [
            f"{e.name}={'***' if e.metadata['secret'] and value else value!r}"
            for e in fields(table)
            if (value := getattr(table, e.name)) != DEFAULT_PROMPT
        ]
        yield f"[{name}] {' '.join(shown)}"


# ---------------------------------------------------------------------------
# 3. WeChat protocol
#
# Signatures, pushes and replies: bytes to records and back, no I/O. Facts are from
# developers.weixin.qq.com, 消息与事件推送 and 被动回复用户消息.
# ---------------------------------------------------------------------------


class BadMessage(Exception):
    """A signed body that cannot be read; answered `success`, so that it ends."""


@dataclass(frozen=True, slots=True)
class Message:
    """One push of WeChat: what a subscriber sent, or an event."""

    openid: str  # FromUserName; the query's openid is not covered by the signature
    account: str  # ToUserName
    msg_type: str  # in lower case
    created: int  # CreateTime, whole seconds, the same on every attempt
    msg_id: str = ""  # none on events
    content: str = ""
    event: str = ""  # in lower case
    event_key: str = ""
    picture_url: str = ""

    @property
    def key(self) -> str:
        """Return what is the same on every attempt of this message and on no other."""
        if self.msg_id:
            return f"{self.openid} {self.msg_id}"
        return f"{self.openid} {self.created} {self.event} {self.event_key}"

    @property
    def name(self) -> str:
        """Return how the log names it: MsgId or event, and a piece of the openid."""
        return f"msg={self.msg_id or self.event or '-'} from={self.openid[:8]}"


def signature_of(token: str, *values: str) -> str:
    """Return WeChat's signature of values (消息与事件推送: sorted, joined, SHA-1)."""
    joined = b"".join(sorted(v.encode("utf-8", "replace") for v in (token, *values)))
    return hashlib.sha1(joined).hexdigest()


def is_signed(token: str, signature: str, *values: str) -> bool:
    """Say whether the signature of the values is right, in constant time."""
    expected = signature_of(token, *values).encode()
    return hmac.compare_digest(expected, signature.encode("utf-8", "replace"))


def read_xml(body: bytes) -> dict:
    """Return the fields of a push; raise BadMessage."""
    try:
        tree = xmltodict.parse(body)
    except (ExpatError, ValueError, LookupError):  # the last: an unknown encoding
        # Control characters that a subscriber pasted reach us as they are.
        try:
            tree = xmltodict.parse(ILLEGAL.sub("", body.decode("utf-8", "ignore")))
        except (ExpatError, ValueError, LookupError) as error:
            raise BadMessage(f"not readable as XML: {error}") from None
    root = tree.get("xml")
    if not isinstance(root, dict):
        raise BadMessage("no fields inside <xml>")
    return root


def parse_envelope(body: bytes) -> str:
    """Return what a push in safe mode encrypts; '' for anything else."""
    try:
        encrypted = read_xml(body).get("Encrypt")
    except BadMessage:
        return ""
    return encrypted if isinstance(encrypted, str) else ""


def parse_message(body: bytes) -> Message:
    """Return the message of a push in plain mode; raise BadMessage."""
    root = read_xml(body)

    def text(name: str) -> str:
        value = root.get(name)
        return value if isinstance(value, str) else ""

    openid, account = text("FromUserName"), text("ToUserName")
    if not openid and "Encrypt" in root:
        raise BadMessage("encrypted, but app_id and aes_key are not set")
    if not openid or not account or not text("MsgType"):
        raise BadMessage("no FromUserName, ToUserName or MsgType")
    created = text("CreateTime")
    return Message(
        openid=openid,
        account=account,
        msg_type=text("MsgType").lower(),
        created=int(created) if re.fullmatch(r"[0-9]{1,12}", created) else 0,
        msg_id=text("MsgId"),
        content=text("Content"),
        event=text("Event").lower(),
        event_key=text("EventKey"),
        picture_url=text("PicUrl"),
    )


class Cipher:
    """Safe mode (消息加解密说明): the envelope around every push and reply.

    AES-256-CBC, padded to 32 bytes, around 16 bytes of salt, a length, XML and AppID.
    """

    def __init__(self, token: str, app_id: str, aes_key: str) -> None:
        from cryptography.hazmat.primitives import ciphers, padding  # slow to import

        self.token, self.app_id = token, app_id.encode()
        # The 43rd character may carry two stray bits; this decoding does not mind them.
        key = base64.b64decode(aes_key + "=")
        algorithm, mode = ciphers.algorithms.AES(key), ciphers.modes.CBC(key[:16])
        self.key, self.aes = key, ciphers.Cipher(algorithm, mode)
        self.padding = padding.PKCS7(256)

    def open(self, encrypted: str) -> bytes:
        """Return the XML of a push whose signature was checked; raise BadMessage."""
        try:
            decryptor, unpadder = self.aes.decryptor(), self.padding.unpadder()
            sealed = base64.b64decode(encrypted, validate=True)
            padded = decryptor.update(sealed) + decryptor.finalize()
            plain = unpadder.update(padded) + unpadder.finalize()
        except ValueError as error:
            raise BadMessage(
                f"cannot be decrypted, is aes_key right? {error}"
            ) from None
        end = 20 + int.from_bytes(plain[16:20], "big")
        if len(plain) < 20 or end > len(plain):
            raise BadMessage("a wrong length inside the encrypted push")
        if not hmac.compare_digest(plain[end:], self.app_id):
            raise BadMessage("encrypted for another AppID, is app_id right?")
        return plain[20:end]

    def seal(self, body: bytes, created: int) -> bytes:
        """Return the envelope of a reply, the same bytes whenever it is made."""
        salt = hmac.digest(self.key, body, "sha256")  # in place of random bytes
        plain = salt[:16] + len(body).to_bytes(4, "big") + body + self.app_id
        encryptor, padder = self.aes.encryptor(), self.padding.padder()
        padded = padder.update(plain) + padder.finalize()
        sealed = base64.b64encode(
            encryptor.update(padded) + encryptor.finalize()
        ).decode()
        nonce, timestamp = salt.hex()[:10], str(created)
        signature = signature_of(self.token, timestamp, nonce, sealed)
        return (
            f"<xml><Encrypt><![CDATA[{sealed}]]></Encrypt>"
            f"<MsgSignature><![CDATA[{signature}]]></MsgSignature>"
            f"<TimeStamp>{timestamp}</TimeStamp>"
            f"<Nonce><![CDATA[{nonce}]]></Nonce></xml>"
        ).encode()


def cdata(text: str) -> str:
    """Return text as XML character data that WeChat's parser reads."""
    clean = ILLEGAL.sub("", text).replace("]]>", "]]]]><![CDATA[>")
    return f"<![CDATA[{clean}]]>"


def render_text_reply(message: Message, content: str, created: int) -> bytes:
    """Return the passive reply's body: XML, or `success` for an empty content."""
    if not content:
        return b"success"  # an empty Content would show the fault text
    return (
        f"<xml><ToUserName>{cdata(message.openid)}</ToUserName>"
        f"<FromUserName>{cdata(message.account)}</FromUserName>"
        f"<CreateTime>{created}</CreateTime>"
        f"<MsgType><![CDATA[text]]></MsgType>"
        f"<Content>{cdata(content)}</Content></xml>"
    ).encode()


def size_of(text: str) -> int:
    """Return the bytes WeChat counts: UTF-8."""
    return len(text.encode())


def harmless(text: str) -> str:
    """Return text in which nothing is a link for WeChat: only our own are."""
    return re.sub(r"<(?=/?a)", "<\u200b", text, flags=re.IGNORECASE)


def tap_link(words: str, content: str = "") -> str:
    """Return a link that sends `content` (or the words) as the subscriber's message.

    Android decodes the content twice and needs a non-empty id; so it stays plain.
    """
    sent = re.sub(r"[^\w()./_-]", "", content or words)
    return (
        f'<a href="weixin://bizmsgmenu?msgmenucontent={sent}&msgmenuid=1">{words}</a>'
    )


def with_taps(text: str, names: typing.Iterable[str]) -> str:
    """Return one of our own texts with each `/NAME` in it as a tap."""
    wanted = "|".join(re.escape(name) for name in sorted(names, key=len, reverse=True))
    pattern = rf"(?<![\w/\"'=.>])/(?:{wanted})(?![\w/.])"
    flags = re.ASCII | re.IGNORECASE  # Chinese is written without spaces around
    return re.sub(pattern, lambda match: tap_link(match[0]), text, flags=flags)


def web_link(words: str, url: str) -> str:
    """Return a link that opens a page."""
    return f'<a href="{url}">{words}</a>'


# ---------------------------------------------------------------------------
# 4. Formulas
#
# Rewriting rules reduce LaTeX to a smaller LaTeX. One pass over its tokens turns that
# into pieces of text, which are joined with the brackets and spaces that keep the
# meaning. Anything unknown raises ValueError, and the formula is shown as written.
# latex2mathml names the symbols and writes the pages' MathML; it is never given what
# was refused here.
# ---------------------------------------------------------------------------
SUPERSCRIPTS = str.maketrans(
    "0123456789+−=()abcdefghijklmnoprstuvwxyzABDEGHIJKLMNOPRTUVW′∘",
    "⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁼⁽⁾ᵃᵇᶜᵈᵉᶠᵍʰⁱʲᵏˡᵐⁿᵒᵖʳˢᵗᵘᵛʷˣʸᶻᴬᴮᴰᴱᴳᴴᴵᴶᴷᴸᴹᴺᴼᴾᴿᵀᵁⱽᵂ′°",
)
SUBSCRIPTS = str.maketrans(
    "0123456789+−=()aehijklmnoprstuvx", "₀₁₂₃₄₅₆₇₈₉₊₋₌₍₎ₐₑₕᵢⱼₖₗₘₙₒₚᵣₛₜᵤᵥₓ"
)
SMALL_SIGNS = "".join(map(chr, [*SUPERSCRIPTS.values(), *SUBSCRIPTS.values()]))
SCRIPTED = rf"(?:[{SMALL_SIGNS}'!%]|[_^](?:\([^()]*\)|\w))*"
IN_BRACKETS = r"\((?:[^()]|\([^()]*\))*\)"
ONE_SIGN = re.compile(  # 12 or x₁², 路程, |x|, √2 or √(a+b) or (a+b), f(x)
    rf"(?:\d+(?:[.,]\d+)*|[∞…⋯□]|[^\W\d_][\u0300-\u036f\u20d0-\u20ff]*){SCRIPTED}"
    rf"|[\u3400-\u9fff]+|\|[^|]*\||[√∛](?:\d+|[^\W\d_])|[√∛]?{IN_BRACKETS}"
    rf"|[fghFGPE]{SCRIPTED}\([^()]*\)"
)
UNDER_ROOT = re.compile(rf"\d+(?:\.\d+)?|[^\W\d_][₀-₉]*|{IN_BRACKETS}")
DIFFERENTIAL = re.compile(rf"[d∂Δ][{SMALL_SIGNS}]{{0,4}}[^\W\d_]?{SCRIPTED}")


def bracketed(text: str) -> str:
    """Put a text in brackets unless it reads as one sign beside a stroke."""
    return text if ONE_SIGN.fullmatch(text) else f"({text})"


def script_text(mark: str, script: str, base: str) -> str:
    """Write a script in small characters if all have one, else behind its mark."""
    small = SUPERSCRIPTS if mark == "^" else SUBSCRIPTS
    script = re.sub(r" ?([^\w\s]) ?", r"\1", script)
    base = re.sub(r"([_^])(.)$", r"\1(\2)", base)  # v_y^2 is not v_(y²)
    has_script = not set(small.values()).isdisjoint(map(ord, base))
    if mark in base or has_script and base[-1] not in ")]|":
        base = f"({base})"  # {x^2}^3
    if all(ord(char) in small for char in script):
        return base + script.translate(small)
    is_closed = len(script) == 1 or re.fullmatch(IN_BRACKETS, script)
    return base + mark + (script if is_closed else f"({script})")


def fraction_text(over: str, under: str) -> str:
    """Write a fraction so that its parts cannot be read otherwise."""
    is_derivative = DIFFERENTIAL.fullmatch(over) and DIFFERENTIAL.fullmatch(under)
    return "/".join((over, under) if is_derivative else map(bracketed, (over, under)))


def root_text(index: str, radicand: str) -> str:
    """Write a root; an index without a sign of its own stands in square brackets."""
    sign = {"": "√", "2": "√", "3": "∛", "4": "∜"}.get(index, f"√[{index}]")
    is_bare = UNDER_ROOT.fullmatch(radicand) and "[" not in sign
    return sign + (radicand if is_bare else f"({radicand})")


def accented_text(accent: str, text: str) -> str:
    """Put an accent on a letter, on all points of a vector, or on brackets."""
    if not text:
        raise ValueError("nothing under an accent")
    if letter := re.fullmatch(r"([^\W_])([₀-₉ᵢⱼₖₙ']*)", text):
        return letter[1] + accent + letter[2]
    is_vector = accent == "\u20d7" and text.isalpha()
    return re.sub("(.)", rf"\1{accent}", text) if is_vector else f"({text}){accent}"


PREFERRED_SIGNS = dict(  # where the table's sign is rare on phones, or another letter
    pair.split("=")
    for pair in "leqslant=≤ geqslant=≥ implies=⇒ Longrightarrow=⇒ impliedby=⇐ iff=⇔"
    " Longleftrightarrow=⇔ longrightarrow=→ dotsb=⋯ epsilon=ε phi=φ perp=⊥ sim=∼ mid=|"
    " setminus=∖ square=□".split()
)


def symbol_text(name: str) -> str:
    """Return the character that a command stands for; raise ValueError if none."""
    from latex2mathml.symbols_parser import convert_symbol  # slow, so not at start

    code = convert_symbol("\\" + name) or ""
    char = PREFERRED_SIGNS.get(name) or chr(int(code, 16) if code.isalnum() else 0)
    if unicodedata.category(char)[0] in "MCZ" or char in "√\\":
        raise ValueError(f"unknown command {name}")
    return char


def alphabet_text(alphabet: str, text: str) -> str:
    """Write one letter in its alphabet (ℝ, 𝐯), and words as they are."""
    is_letter = re.fullmatch("[A-Za-z]", text)
    return symbol_text(f"{alphabet}{{{text}}}") if is_letter else bracketed(text)


# A command's arguments, the kind of piece it makes, and what writes that. An argument m
# is mathematics on one line, M may have several; o stands in square brackets or is
# missing; t is words.
FORMULA_COMMANDS: dict[str, tuple[str, str, Callable[..., str]]] = {
    name: (arguments, kind, write)
    for names, arguments, kind, write in (
        ("frac dfrac tfrac cfrac", "mm", "fraction", fraction_text),
        ("sqrt", "om", "root", root_text),
        ("binom dbinom tbinom", "mm", "", "C({}, {})".format),
        ("boxed", "M", "box", str),
        ("operatorname", "m", "name", str),
        ("text textrm textit textbf texttt mbox hbox", "t", "", str),
        ("tag", "t", "", "  ({})".format),
        ("quad qquad", "", "", "  ".format),
        ("bmod mod", "", "", " mod ".format),
        ("pmod", "m", "", " (mod {})".format),
        ("xrightarrow", "om", "", " —{}{}→ ".format),
        ("hline", "", "", "———\n".format),
        ("\\", "", "", "\n".format),
        ("overset stackrel", "mm", "", functools.partial(script_text, "^")),
        ("underset", "mm", "", functools.partial(script_text, "_")),
        ("overbrace underbrace", "m", "", bracketed),
        ("mathbf boldsymbol bm", "m", "", functools.partial(alphabet_text, "mathbf")),
        ("mathcal mathscr", "m", "", functools.partial(alphabet_text, "mathcal")),
        ("mathbb", "m", "", functools.partial(alphabet_text, "mathbb")),
        ("not", "m", "symbol", lambda s: unicodedata.normalize("NFC", s + "\u0338")),
        ("vec overrightarrow", "m", "", functools.partial(accented_text, "\u20d7")),
        ("hat widehat", "m", "", functools.partial(accented_text, "\u0302")),
        ("tilde widetilde", "m", "", functools.partial(accented_text, "\u0303")),
        ("bar overline", "m", "", functools.partial(accented_text, "\u0304")),
        ("dot", "m", "", functools.partial(accented_text, "\u0307")),
        ("ddot", "m", "", functools.partial(accented_text, "\u0308")),
    )
    for name in names.split()
}
FORMULA_NAMES = frozenset(
    "sin cos tan cot sec csc arcsin arccos arctan sinh cosh tanh coth ln lg log exp max"
    " min sup inf lim limsup liminf det dim ker deg gcd Pr argmax argmin".split()
)
LARGE_SIGNS = "∑∏∐∫∬∭∮∯⋃⋂⨁⨂"


@dataclass(frozen=True, slots=True)
class Piece:
    """A sign or a whole construct of a formula, as text."""

    text: str
    kind: str = ""  # name, large, symbol, fraction, root, box, or a plain sign
    space: str = ""  # before it: " " is a blank of the source, "~" a space asked for


RELATION = r"\s*=+−±·×<>≤≥≠≈≡∼→⇒⇔∈,.;:|，。；：、\u3400-\u9fff"
ALONE_BEHIND = re.compile(rf"$|[{RELATION}(\[{{⌊⌈⟨‖]")  # what may stand before 1/2
ALONE_BEFORE = re.compile(rf"$|[{RELATION})\]}}⌋⌉⟩‖]")  # and what after


def needs_brackets(before: Piece, piece: Piece, after: Piece) -> bool:
    """Say whether a fraction, root or box could be read into its neighbours."""
    is_before_more = not ALONE_BEFORE.match(after.text)
    if piece.kind == "root":
        return piece.text[-1] != ")" and is_before_more
    last = before.text[-1:]
    is_behind_more = before.kind != "large" and not ALONE_BEHIND.match(last)
    is_term = piece.kind == "box" and last in tuple("+−·×")
    return is_behind_more or is_term or is_before_more


def needs_space(text: str, before: Piece, piece: Piece) -> bool:
    """Say whether a space belongs between a text and the piece that comes next."""
    is_factor = re.match(r"[^\W\u3000-\u9fff]|[√∛∜∑∫∞]", piece.text) is not None
    if before.kind == "name":
        return is_factor or piece.space != "" and piece.text[0] not in "([|"
    if before.kind == "large" or piece.kind == "name" and re.search(r"[\w)]$", text):
        return True
    if before.kind == "symbol" and piece.space == " ":  # it may only end the command
        return not is_factor if text[-1].isalpha() else text[-2:-1] == " "
    return piece.space != "" or is_factor and bool(re.search(r"[_^].$", before.text))


def render_pieces(pieces: list[Piece]) -> str:
    """Write pieces one behind another, with the brackets and spaces they need."""
    text, before, nothing = "", Piece(""), Piece("")
    for piece, after in itertools.pairwise([*pieces, nothing]):
        written = piece.text
        if "\n" in written:
            written = f"\n{written}\n"
        elif piece.kind in ("fraction", "root", "box"):
            is_mixed = re.fullmatch(r"[0-9] \d+/\d+", f"{text[-1:]} {written}")
            if is_mixed and not needs_brackets(nothing, piece, after):
                written = " " + written
            elif needs_brackets(before, piece, after):
                written = f"({written})"
        is_open = not text[-1:].strip() or written[0].isspace()
        if not is_open and needs_space(text, before, replace(piece, text=written)):
            text += " "
        text += written
        before = piece
    lines = map(str.strip, text.split("\n"))
    return "\n".join(filter(None, lines)) if "\n" in text else text


MAX_FORMULA_NESTING = 30  # a fraction in a fraction takes two; real ones stay under 12
ENVIRONMENTS = dict.fromkeys(("align*", "cases", "array"), ("", "", "\n"))
ENVIRONMENTS |= dict.fromkeys(("matrix", "pmatrix", "bmatrix"), ("[", "]", "; "))
ENVIRONMENTS |= {"vmatrix": ("|", "|", "; "), "Vmatrix": ("‖", "‖", "; ")}
LATEX_TOKEN = re.compile(r"\\[A-Za-z]+|\\.|\s+|.", re.S)
LATEX_SPACES = ("~", "\\ ", "\\,", "\\:", "\\;", "\\>")


class FormulaReader:
    """Reads one formula, token by token, and never goes back."""

    def __init__(self, latex: str) -> None:
        self.tokens: list[str] = [*LATEX_TOKEN.findall(latex), ""][::-1]  # next is last
        self.depth = 0
        self.end = ""  # the token that ended the last row

    def take_sign(self) -> str:
        """Take the next token that is no space."""
        token = self.tokens.pop()
        return self.tokens.pop() if token.isspace() else token

    def row(self, *ends: str) -> list[Piece]:
        """Read pieces up to one of the end tokens, and take that too."""
        pieces: list[Piece] = []
        space = ""
        while self.tokens[-1] not in ends:
            token = self.tokens[-1]
            if token in LATEX_SPACES or token.isspace():
                space = "~" if self.tokens.pop() in LATEX_SPACES else space or " "
                continue
            new = [] if token in ("^", "_", "'") else self.pieces()
            new = [piece for piece in self.scripted(new) if piece.text]
            if new:
                pieces += [replace(new[0], space=space or new[0].space), *new[1:]]
                space = ""
        self.end = self.tokens.pop()
        return pieces

    def scripted(self, bases: list[Piece]) -> list[Piece]:
        """Add the scripts and primes that follow to what stands before them."""
        scripts = {"_": "", "'": "", "^": ""}
        while self.tokens[-1] in scripts:
            mark = self.tokens.pop()
            if mark != "'" and scripts[mark]:
                raise ValueError("two scripts")
            scripts[mark] += mark if mark == "'" else self.argument()
        if not any(scripts.values()):
            return bases
        base = bases[0] if len(bases) == 1 else Piece(render_pieces(bases))
        text = base.text
        if "\n" in text:
            raise ValueError("a script on lines")
        if base.kind == "root":
            text = f"({text})"
        elif text and (base.kind in ("fraction", "box") or len(bases) > 1):
            text = bracketed(text)
        kind = base.kind if base.kind in ("name", "large") else ""
        for mark, script in scripts.items():
            if mark == "_" and script and text in ("lim", "limsup", "liminf"):
                text, kind = f"{text}({script})", "large"
            elif script:
                text = text + script if mark == "'" else script_text(mark, script, text)
        # a script on nothing must not become one of what stands before it
        return [replace(base, text=text if base.text else " " + text, kind=kind)]

    def argument(self, kind: str = "m") -> str:
        """Read one argument of a command as text."""
        if kind == "t":
            words = re.sub(r"\\(?:[ ,:;>]|q?quad)|~|\s+", " ", self.source())
            words = re.sub(r"\\([%&_#{}])|[{}]", r"\1", words)
            if "\\" in words or "$" in words:
                raise ValueError("mathematics among words")
            return words
        if kind == "o":
            is_given = self.tokens[-1] == "[" and self.tokens.pop()
            return render_pieces(self.row("]")) if is_given else ""
        text = render_pieces(self.pieces()).strip()
        if "\n" in text and kind != "M":
            raise ValueError("lines inside a line")
        return text

    def source(self) -> str:
        """Return the source of one argument in braces."""
        if self.take_sign() != "{":
            raise ValueError("no braces")
        taken, depth = [], 1
        while depth:
            taken.append(self.tokens.pop())
            depth += {"{": 1, "}": -1}.get(taken[-1], 0)
        return "".join(taken[:-1])

    def pieces(self) -> list[Piece]:
        """Read one sign, group or command with its arguments."""
        self.depth += 1
        if self.depth > MAX_FORMULA_NESTING:
            raise ValueError("nested too deep")
        token = self.take_sign()
        name = token[1:]
        if token in ("{", "$"):  # a bare tabular holds words and $
            pieces = self.row("}" if token == "{" else "$")
        elif token in tuple("}&^_#\\"):
            raise ValueError(f"stray {token}")
        elif token[0] != "\\":
            is_minus = token == "-" and self.tokens[-1] != ">"  # careless for an arrow
            pieces = [Piece("−" if is_minus else token)]
        elif name in FORMULA_NAMES:
            pieces = [Piece(name, "name")]
        elif name in FORMULA_COMMANDS:
            arguments, kind, write = FORMULA_COMMANDS[name]
            pieces = [Piece(write(*map(self.argument, arguments)), kind)]
        elif name == "mathrm":
            pieces = self.pieces()
        elif name == "begin":
            pieces = [Piece(self.environment())]
        else:
            char = symbol_text(name)
            pieces = [Piece(char, "large" if char in LARGE_SIGNS else "symbol")]
        self.depth -= 1
        return pieces

    def environment(self) -> str:
        r"""Read \begin{…} … \end{…}: a line a row, but a matrix on one line."""
        name = self.source()
        if name == "array":
            self.source()  # how its columns are aligned
        rows: list[list[str]] = [[]]
        while True:
            rows[-1].append(render_pieces(self.row("&", "\\\\", "\\end")).strip())
            if self.end == "\\end":
                break
            if self.end == "\\\\":
                rows.append([])
        if self.source() != name:
            raise ValueError("the end of another environment")
        rows = [row for row in rows if any(row)]
        gap = ", " if any(" " in cell for row in rows for cell in row) else " "
        if name == "align*":  # equations side by side, each in two cells
            gap = ""
            for row in rows:
                row[1::2] = [re.sub("^(?=. )", " ", cell) for cell in row[1::2]]
                row[2::2] = ["  " + cell for cell in row[2::2]]
        elif name == "cases":  # a value, a comma, its condition; or the sides of x &= 1
            for row in rows:
                line = "{ " + "\t".join(filter(None, row))
                line = re.sub(r"(?<![,，])\t(?=[=<>≤≥]\S)", "", line)
                line = re.sub(r"(?<![,，])\t(?![=<>≤≥≠+−])", ",\t", line)
                row[:] = [line.replace("\t", " ")]
        lines = [gap.join(row).rstrip() for row in rows]
        opening, closing, end = ENVIRONMENTS[name]
        return opening + re.sub("———,? ", "———\n", end.join(lines)) + closing


LATEX_ARRAY = (
    r"\\begin\{(?:array\}\s*\{[^{}]*|aligned)\}([\s\S]*?)\\end\{(?:array|aligned)\}"
)
LATEX_LOOKS = (  # they change how the same signs look, or number them
    r"\\(?:displaystyle|textstyle|limits|nolimits|nonumber|notag|middle|[bB]igg?[lrm]?"
    r"|mathop|rm|bf|underline|!)(?![A-Za-z])|\\(?:label|[hv]space|(?:text)?color)\*?\s*\{[^{}]*\}"
)
LATEX_REWRITES = (
    (rf"\\left *\\\{{\s*{LATEX_ARRAY}\s*\\right *\.", r"\\begin{cases}\1\\end{cases}"),
    (rf"\\left *\|\s*{LATEX_ARRAY}\s*\\right *\|", r"\\begin{vmatrix}\1\\end{vmatrix}"),
    (
        rf"\\left *[(\[]\s*{LATEX_ARRAY}\s*\\right *[)\]]",
        r"\\begin{bmatrix}\1\\end{bmatrix}",
    ),
    (r"\\left *([(\[|])\s*", r"\1"),
    (r"(?<!\\)\s*\\right(?![A-Za-z]) *\.?|\\left(?![A-Za-z]) *\.?", ""),
    (r"(\\\\)(?:\[-?[\d.]* ?[a-z]{2}\])?|" + LATEX_LOOKS, r"\1"),
    (r"\\cline\s*\{[^{}]*\}", r"\\hline "),
    (r"\\(operatorname|tag)\*", r"\\\1"),
    (r"\\arg(?![A-Za-z])", r"\\operatorname{arg}"),
    (r"\\mathrm\s*(?=\{[A-Za-z]{2,}\})", r"\\text"),
    (r"\{(?:align(?:ed)?|gather(?:ed)?|split|eqnarray|equation)\*?\}", "{align*}"),
    (r"\{[dr]cases\}", "{cases}"),
    (r"\{tabular\}", "{array}"),
    (r"&\s*(?=\\end\b)", "&{}"),  # or latex2mathml drops the last row
    (r"(?<!\\)\s+(?=[_^])", ""),
    (r"([_^])(\d\d+)", r"\1{\2}"),  # TeX takes the first digit; the author meant all
    (r"(?<!\\)%", r"\\%"),  # no comments in an answer
    (r"(\\text\s*\{[^{}$]*)\$([^$]*)\$", r"\1}\2\\text{"),  # $ opens mathematics
)


def reaction_source(match: re.Match[str]) -> str:
    """Write chemistry as mathematics: 2H2 + O2 -> 2H2O, SO4^2-."""
    charge = r"\^\{?(\d*[+-])\}?|(?<=[A-Za-z\d)\]])([+-])(?=\s|$)"
    source = re.sub(charge, r"^{\1\2}", match[1])
    source = re.sub(r"(?<=[A-Za-z)\]])(\d+)", r"_{\1}", source)
    source = re.sub(r"->\[([^][]*)\]", r"\\xrightarrow{\1}", source)
    source = re.sub(r" v(?=\s|$)", "↓", source)
    return rf"\mathrm{{{source}}}".replace("<=>", "⇌").replace("->", "→")


def simpler_latex(latex: str) -> str:
    """Rewrite LaTeX with fewer commands, in a form that latex2mathml reads."""
    latex = re.sub(r"\\ce\s*\{((?:[^{}]|\{[^{}]*\})*)\}", reaction_source, latex)
    for pattern, replacement in LATEX_REWRITES:
        latex = re.sub(pattern, replacement, latex, flags=re.A)
    return latex.strip()


MAX_FORMULA_CHARS = 1500  # fifteen full lines of an aligned block; longest seen: 679
NO_XML = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\ud800-\udfff\ufffe\uffff]")


@functools.lru_cache(256)
def formula_text(latex: str) -> str | None:
    """Return a formula as text without markup, or None when that would change it."""
    if len(latex) > MAX_FORMULA_CHARS or NO_XML.search(latex):
        return None
    try:
        text = render_pieces(FormulaReader(simpler_latex(latex)).row(""))
    except (ValueError, LookupError):  # a LookupError where it ends too early
        return None
    return text.strip() or None


MATHML_TAGS = (
    "math mrow mi mn mo mtext mspace mfrac msqrt mroot msub msup msubsup munder mover"
    " munderover mtable mtr mtd mstyle mpadded menclose"
).split()
MATHML_ATTRIBUTES = set(  # no style, class, href, events; colours are the page's
    "display xmlns stretchy fence form accent linethickness width height depth lspace"
    " voffset columnalign columnlines rowlines notation mathvariant".split()
)


def formula_mathml(latex: str, is_block: bool) -> str | None:
    """Return a formula as one <math> element, or None when that would change it."""
    text = formula_text(latex)
    if text is None:
        return None
    from latex2mathml.converter import Converter

    try:
        converter = Converter(display="block" if is_block else "inline")
        tree = converter.convert_to_element(simpler_latex(latex))
    except Exception:  # it breaks in many ways, some of them its own
        return None
    for node in tree.iter():
        reference = r"&#x([0-9A-F]{2,6});"
        node.text = re.sub(reference, lambda m: chr(int(m[1], 16)), node.text or "")
        is_strange = "\\" in node.text or NO_XML.search(node.text)
        if is_strange or node.tag not in MATHML_TAGS:
            return None
        for name in node.attrib.keys() - MATHML_ATTRIBUTES:
            del node.attrib[name]
    written = "".join(tree.itertext()), text.replace("∛", "3").replace("∜", "4")
    forms = (unicodedata.normalize("NFKC", form) for form in written)
    numerals = [sorted(re.findall(r"[\d\u3400-\u9fff]", form)) for form in forms]
    if numerals[0] != numerals[1]:  # which no notation may lose
        return None
    rendered: str = ElementTree.tostring(tree, encoding="unicode")
    return rendered


# ---------------------------------------------------------------------------
# 5. Chat text
#
# A model writes Markdown; WeChat shows plain text. Nothing is lost and nothing is
# changed but certain markup: a mark that may be text is text, in the chat and on the
# page, which are both written from the same markdown-it tokens. General Markdown
# parsers need a whole document. Here a line's kind is decided once, when the line is
# complete, so the chat text of a growing answer only gets longer, and a part of the
# answer is a slice of it.
# ---------------------------------------------------------------------------

CJK = re.compile(
    "[\u2e80-\u2fff\u3005-\u3007\u3031-\u9fff\uac00-\ud7af\uf900-\ufaff"
    "\U00020000-\U0003ffff]"
)
# A full stop must not follow a number, an initial, or an abbreviation.
SENTENCE_END = re.compile(
    r"[。！？…]+[”’」』）)】》]*"
    r"|(?<![!?])[!?]++[\"')\]]*(?=\s|[^\x00-\x7f])"
    r"|(?<![\d.])(?<!\.[a-z])(?<!\b[A-Z])(?<!\b(?:No|Dr|Mr|Ms|St|vs))"
    r"(?<!\b(?:Mrs|Fig|etc))(?<!\bProf)\.[\"')\]]*(?=\s)"
)

# --- When stars are emphasis
#
# CommonMark looks at white space and punctuation around a run of stars. Here a run must
# also not be an operator, a wildcard, or part of a name: `2**3`, `(a+b)**2`,
# `单价*数量`, `*.log`, `**kwargs`, `/*…*/`. The patterns match the two characters
# around the stars, where 字 stands for any CJK letter, x for any other letter or digit.

DOUBLE_OPENS = re.compile(
    r"(?![x_)\]}][x_([{+.=-]).[^ ，。：；！？、）】》」』”’,;:!?)\]}/]"
)
DOUBLE_CLOSES = re.compile(  # `**Note:**text`, but neither `f(**a,**b)` nor `ab**cd`
    r"(?![ （【《「『“‘(\[{<=|/])(?:.[^x_]|[:.!?%\x80-\U0010ffff][x_])"
)
DOUBTFUL = re.compile(r"/.|./|[字）】][x_([{+.=-]")  # `边长**2`, `/**…**/`: no pair
SINGLE_OPENS = re.compile(r"[^字x_)\]}）】》”’/\\=+<>^|&%.~-][x字“‘《「『（(\[`$\\\"']")
SINGLE_CLOSES = re.compile(r"[x字。！？….!?)）”’\"'」』】》%℃`$\]>+#][^字x_/(=\[\\:]")
BRACKETS = [("(", ")"), ("[", "]"), ("（", "）")]


def shape(char: str) -> str:
    """Return the character that stands for a character in these patterns."""
    if char.isspace():
        return " "
    return "字" if CJK.match(char) else "x" if char.isalnum() else char


# --- The marks inside a line

MAX_WINDOW = 4000  # characters read at once, which bounds what a search can cost
MAX_FORMULA = 2000
MAX_OPENERS = 20

# The HTML tags of tokens, where they are not their names.
TAGS = {"link": "a", "paragraph": "p", "list_item": "li"}
TAGS |= {"ordered_list": "ol", "bullet_list": "ul"}
EMPHASIS = {"*": ("em",), "**": ("strong",), "***": ("strong", "em"), "~~": ("s",)}
ENTITY = r"&(?:#\d{1,7}|#x[0-9a-f]{1,6}|[a-z][a-z0-9]{1,31});"
# Each is read by the method of its name: `read_code`.
INLINE_MARKS = {
    "newline": r"\n",
    "formula": r"\$\$|\\[(\[]|\\begin\{(?P<environment>\w{1,20}\*?)\}|<!--",
    "backslash": r"\\\\|\\",
    "code": r"(?<!`)(?P<ticks>`+)(?!`)(?P<inside>[^\n]{1,1000}?)(?<!`)(?P=ticks)(?!`)",
    "stars": r"\*+|＊+|~~+",
    "dollars": r"(?<![0-9A-Za-z])\$(?![\s$])"  # in a line, but not `从 $5 涨到 $10`
    r"(?P<latex>[^$\n。！？]{0,299}?[^\s$\\。！？])\$(?![0-9A-Za-z_${])",
    "open": r"`+|(?<![0-9A-Za-z])\$(?!\s)",
    "label": r"!?\[",
    "link": r"\]",
    "url": r"<(?:https?://|mailto:)[^\s<>]+>|<[\w.+-]+@[\w-]+(?:\.[\w-]+)+>"
    r"|https?://[\w./?#%&=+~:;@!$',*()-]+",
    "tag": r"<(?P<closes>/?)(?P<name>br|b|i|u|em|strong|span|div|p|center|font|mark"
    r"|kbd|details|summary|sub|sup)(?:\s+(?:open\b|[\w-]+\s*=\s*(?:\"[^\"]{0,300}\""
    r"|'[^']{0,300}'|[^\s\"'<>=]+)))*\s*/?>",
    "entity": ENTITY,
}
MARK = re.compile(
    "|".join(f"(?P<{name}>{pattern})" for name, pattern in INLINE_MARKS.items()),
    re.IGNORECASE | re.ASCII,
)
LINK = re.compile(  # behind a label: an address in round brackets, maybe with a title
    r"\([ \t]*(?:<(?P<whole>[^<>\n]*)>|(?P<plain>(?:[^\s()<>]++|\([^\s()]*+\))*+))"
    r"(?:[ \t]+(?P<title>\"[^\"\n]*\"|'[^'\n]*'|\([^()\n]*\)))?[ \t]*\)"
)
ADDRESS = re.compile(r"https?://|ftp://|mailto:|tel:|#", re.IGNORECASE)
CLOSERS = {"$": "$", "$$": "$$", "\\(": "\\)", "\\[": "\\]"}
PRICE = re.compile(r"[\d,.]+ *[A-Za-z]{2,}|.*[A-Za-z]{3,} +[A-Za-z]{3,}")
LATEX_SIGN = re.compile(r"\\[A-Za-z]|\^|_\{|_\w")
FORMULA = re.compile(  # not words in brackets
    rf".*(?:{LATEX_SIGN.pattern})|(?!.*{CJK.pattern}).*[\w+=<>-]", re.DOTALL
)
ESCAPE = re.compile(
    r"\\[*_`~$<>|\[\]&!]|(?<![^\W_])\\#|(?<=\b[A-Z])\\#"
    r"|^[ \t]*(?:\\[-+>=]|\d{1,3}\\[.)])",
    re.MULTILINE,
)
# Words with backslashes that are paths or patterns: `D:\a\_b`, `\\nas\x`, `^\d+\.$`.
WORD_WITH_SIGNS = re.compile(r"[^\s，。：；！？、（）“”…!?]+")
PATH = re.compile(
    r"\\[^\W_]|^\\\\|\b[A-Za-z]:\\|\\\W[+?{]|^[\^.]+\\|\\$|(?<!^\d)(?<!^\d\d)\\\."
)
DATA_PICTURE = re.compile(r"data:image/(?:png|jpeg|gif|webp);base64,[A-Za-z0-9+/=]+")


@dataclass(slots=True)
class Opener:
    """A mark that is markup if its closing mark comes."""

    mark: str
    token: int  # its index; a token of text until the mark is closed
    end: int  # of the mark, in the text
    is_doubtful: bool


class InlineReader:
    """Reads the marks inside one text, once, from left to right."""

    def __init__(self, text: str, before: str, is_whole: bool) -> None:
        self.text = before + text  # the character before it has been read
        self.is_whole = is_whole  # else more of the text may come
        self.tokens: list[Token] = []
        self.openers: list[Opener] = []
        self.line = 1  # where it begins
        self.sure = 1, 0  # the end of text, and of tokens, that nothing can change
        self.is_held = False  # something is open that can change all that follows
        self.closer = ""  # what closes the formula or comment that is open
        words = WORD_WITH_SIGNS.finditer(self.text) if "\\" in text else ()
        paths = [range(*word.span()) for word in words if PATH.search(word[0])]
        self.escapes = {found.end() - 2 for found in ESCAPE.finditer(self.text, 1)}
        self.escapes.difference_update(*paths)

    def read(self) -> None:
        begin = 1
        while mark := MARK.search(self.text, begin):
            self.add_words(begin, mark.start())
            begin = getattr(self, f"read_{mark.lastgroup}")(mark)
            if not begin:
                self.add_text(mark[0])
                begin = mark.end()
        self.add_words(begin, len(self.text))
        if self.is_whole:
            self.sure = len(self.text), len(self.tokens)

    def add_words(self, begin: int, end: int) -> None:
        """Add what stands before a mark; note the last sentence end in it."""
        if not (self.is_whole or self.openers or self.is_held):
            for found in SENTENCE_END.finditer(self.text, begin, end):
                self.add_text(self.text[begin : found.end()])
                begin = found.end()
                self.sure = begin, len(self.tokens)
        self.add_text(self.text[begin:end])

    def add_text(self, text: str) -> None:
        if text:
            self.add("text", content=text)

    def add(self, type: str, tag: str = "", nesting: int = 0, **more: object) -> None:
        self.tokens.append(Token(type, tag, nesting, **more))  # type: ignore[arg-type]

    def hold(self, closer: str = "") -> None:
        """Take nothing as final from here on: a closing mark may still come."""
        if not self.is_whole:
            self.is_held, self.closer = True, self.closer or closer

    def open(self, mark: str, text: str, end: int, is_doubtful: bool = False) -> None:
        """Add a mark that is text until it is closed."""
        if len(self.openers) < MAX_OPENERS:
            self.openers.append(Opener(mark, len(self.tokens), end, is_doubtful))
        self.add_text(text)

    def find(self, *marks: str) -> Opener | None:
        return next((o for o in reversed(self.openers) if o.mark in marks), None)

    def close(self, opener: Opener, *names: str) -> None:
        """Make pairs of an open mark and the one read; what is open inside is text."""
        del self.openers[self.openers.index(opener) :]
        opened = [Token(f"{name}_open", TAGS.get(name, name), 1) for name in names]
        self.tokens[opener.token : opener.token + 1] = opened
        for name in reversed(names):
            self.add(f"{name}_close", TAGS.get(name, name), -1)

    # A method a mark: each returns where what it has read ends, or 0 if it is text.

    def read_newline(self, mark: re.Match[str]) -> int:
        openers = [
            o for o in self.openers if o.mark not in tuple("*＊") and o.end > self.line
        ]
        if not openers and not self.is_held:
            self.sure = mark.start(), len(self.tokens)
        self.add("softbreak", "br")
        self.openers, self.line = openers, mark.end()
        return mark.end()

    def read_stars(self, mark: re.Match[str]) -> int:
        """Read a run of stars, or of two tildes: it closes, opens, or is text."""
        run, begin, end = mark[0], mark.start(), mark.end()
        names = EMPHASIS.get(run.replace("＊", "*"))
        if names is None:
            return 0
        pair = shape(self.text[begin - 1]) + shape(self.text[end : end + 1] or "\n")
        is_single, is_doubtful = len(run) == 1, bool(DOUBTFUL.fullmatch(pair))
        closes = SINGLE_CLOSES if is_single else DOUBLE_CLOSES
        opener = self.find(run) if closes.fullmatch(pair) else None
        inside = self.text[opener.end : begin] if opener else ""
        is_phrase = bool(inside.strip())
        if is_single:  # may be a footnote's, or an operator: `(*p)*(*q)`
            is_balanced = all(inside.count(a) == inside.count(b) for a, b in BRACKETS)
            is_phrase = is_balanced and any(char.isalpha() for char in inside)
        if opener and is_phrase and not (opener.is_doubtful and is_doubtful):
            self.close(opener, *names)
        elif (SINGLE_OPENS if is_single else DOUBLE_OPENS).fullmatch(pair):
            self.open(run, run, end, is_doubtful)
        else:
            return 0
        return end

    def read_code(self, mark: re.Match[str]) -> int:
        code = mark["inside"]
        if code.strip() and code[0] == code[-1] == " ":
            code = code[1:-1]
        self.add("code_inline", "code", content=code, markup=mark["ticks"])
        return mark.end()

    def read_dollars(self, mark: re.Match[str]) -> int:
        latex = mark["latex"]
        if LATEX_SIGN.search(latex) or FORMULA.match(latex) and not PRICE.match(latex):
            self.add("math_inline", "math", content=latex, markup="$")
            return mark.end()
        self.add_text("$")
        return mark.start() + 1

    def read_open(self, mark: re.Match[str]) -> int:
        """Wait for the other end of code or a formula, if it may come in this line."""
        rest = self.text[mark.end() : mark.end() + 1000]
        ends = "[\n。！？]" if mark[0] == "$" else "\n"
        if len(rest) < 1000 and not re.search(ends, rest):
            self.hold()
        return 0

    def read_formula(self, mark: re.Match[str]) -> int:
        """Read a formula or a comment; it may go on over lines."""
        opener, inside = mark[0], mark.end()
        kind = "math_inline" if opener == "\\(" else "math_block"
        closer = "-->" if opener == "<!--" else f"\\end{{{mark['environment']}}}"
        closer = CLOSERS.get(opener, closer)
        end = self.text.find(closer, inside, inside + MAX_FORMULA)
        latex = self.text[inside:end]
        if end < 0:
            if len(self.text) - inside < MAX_FORMULA:
                self.hold(closer)
            return 0
        if mark["environment"]:  # is LaTeX as a whole
            self.add(kind, "math", content=opener + latex + closer)
        elif opener in CLOSERS and FORMULA.match(latex):
            self.add(kind, "math", content=latex, markup=opener)
        elif opener in CLOSERS:  # `\[words\]` are brackets
            self.add_text(opener.removeprefix("\\"))
            self.escapes.add(end)
            return inside
        return end + len(closer)

    def read_backslash(self, mark: re.Match[str]) -> int:
        if mark.start() not in self.escapes:
            return 0
        self.add_text(self.text[mark.end()])
        return mark.end() + 1

    def read_label(self, mark: re.Match[str]) -> int:
        self.open(mark[0], mark[0], mark.end())
        return mark.end()

    def read_link(self, mark: re.Match[str]) -> int:
        """Read a link or picture at the end of its label."""
        opener = self.find("[", "![")
        if opener is None:
            return 0
        end = mark.end()
        found = LINK.match(self.text, end)
        if not found and self.text.startswith("(", end) and "\n" not in self.text[end:]:
            self.hold()
        url = (found["whole"] or found["plain"] or "") if found else ""
        before = self.text[opener.end - len(opener.mark) - 1]
        is_path = ":" not in url and re.search("[./]", url)  # not so `arr[0](x.y)`
        is_data = opener.mark == "![" and url.lower().startswith("data:image/")
        is_link = ADDRESS.match(url) or is_path and shape(before) not in "x_" or is_data
        if not found or not is_link:
            self.openers.remove(opener)
            return 0
        self.close(opener, "link")
        opening, *label, _ = self.tokens[opener.token :]
        opening.attrs = {"href": url}
        if found["title"]:
            opening.attrs["title"] = found["title"][1:-1]
        if opener.mark == "![":
            del self.tokens[opener.token :]
            attrs, source = {"src": url, "alt": ""}, self.text[opener.end : end - 1]
            self.add("image", "img", attrs=attrs, children=label, content=source)
        return found.end()

    def read_url(self, mark: re.Match[str]) -> int:
        """Read an address, bare or in angle brackets."""
        url = mark[0].rstrip("*.,;:!?'~")
        while url[-1] == ")" and url.count(")") > url.count("("):
            url = url[:-1].rstrip("*.,;:!?'~")
        end = mark.start() + len(url)
        label = re.sub("(?i)^<(?:mailto:)?|>$", "", url)
        if self.find("["):  # no link inside a link
            self.add_text(label)
            return end
        href = label if "://" in label else f"mailto:{label}"
        self.add("link_open", "a", 1, attrs={"href": href}, markup="autolink")
        self.add_text(label)
        self.add("link_close", "a", -1, markup="autolink")
        return end

    def read_entity(self, mark: re.Match[str]) -> int:
        char = html.unescape(mark[0]).replace("\xa0", " ")
        if char in ("", "\r", "\ufffd", mark[0]) or ILLEGAL.search(char):
            return 0
        self.add_text(char)
        return mark.end()

    def read_tag(self, tag: re.Match[str]) -> int:
        """Read a tag: markup in a pair, or among tags alone on a line."""
        name = tag["name"].lower()
        before = self.text[: tag.start()].rstrip(" \t")[-1:]
        after = self.text[tag.end() :].lstrip(" \t")[:1]
        is_alone = before in ("\n", ">") and after in ("", "\n", "<")
        opener = self.find(name) if tag["closes"] else None
        inside = self.text[opener.end : tag.start()] if opener else ""
        if name == "br":
            self.add("hardbreak", "br")
        elif not tag["closes"] and not is_alone:
            self.open(name, tag[0], tag.end())
        elif opener is None:
            return tag.end() if is_alone else 0
        elif not inside or inside != inside.strip(" "):
            return 0
        else:
            self.close(opener, *([name] if name in ("sub", "sup") else []))
        return tag.end()


def window_end(text: str, begin: int, is_whole: bool) -> int:
    """Return where the window that begins here ends; it never splits a data picture."""
    end, at = begin + MAX_WINDOW, begin
    while picture := DATA_PICTURE.search(text, at, end):
        at = text.find(")", picture.end()) + 1
        if not at:
            return end if is_whole else picture.start()
        end = max(end, at)
    return end


def read_inline(
    text: str, before: str = "\n", is_whole: bool = True
) -> tuple[list[Token], int, str]:
    """Return a text's sure tokens, where they end, and what would close the rest."""
    tokens: list[Token] = []
    begin, closer = 0, ""
    while begin < len(text):
        end = window_end(text, begin, is_whole)
        is_last = end >= len(text)
        reader = InlineReader(text[begin:end], before, is_whole and is_last)
        reader.read()
        (sure, count), closer = reader.sure, reader.closer
        if sure == 1 and not is_last and end - begin >= MAX_WINDOW:
            sure, count = end - begin + 1, len(reader.tokens)  # open so long: text
        tokens += reader.tokens[:count]
        begin += sure - 1
        if sure == 1 or is_last:
            break
        before = text[begin - 1]
    return tokens, begin, closer


# --- The lines of an answer

MAX_QUOTES = 3  # of quotes in quotes
MAX_COLUMNS = 40
MAX_HEADER = 500  # characters of a table's header: each record repeats it
MAX_CELLS = 4000  # of all tables of an answer; a page of more takes seconds to make

FENCE = re.compile(  # `py`, `js title="a"` and `{r}` are languages, words are not
    r"[ \t]*(?P<mark>`{3,}|~{3,})\s*+(?:(?P<language>[\w+#.:/-]++(?:\s++[^\s`]++"
    r"|[^`={]*+[={][^`]*+)?|\{[^`]*+)\s*|(?P<words>.*))",
    re.ASCII,
)
LATE_FENCE = re.compile(  # behind words: `代码如下：` and three backticks
    r"(?<=[:：])[ \t]*(?P<mark>`{3,})(?P<info>[\w+#.-]*)[ \t\r]*\Z", re.ASCII
)
HEADING = re.compile(r"[ \t]*(#{1,6})[ \t]+(\S.*)")
QUOTE = re.compile(r"[ \t]*>(?!>>|=) ?(.*)")
BLOCK = re.compile(r"[ \t]*(?:`{3}|~{3}|#{1,6}[ \t]+\S|>(?!>>|=))")
ITEM = re.compile(r"[ \t]*([-*+]|\d{1,3}[.)])[ \t]+(\S.*)", re.ASCII)
TASK = re.compile(r"\[([ xX])\][ \t]+(?=\S)")
# Behind signs: `- 100 元`, `+ 300 元`, `> 60 分`; neither `2024 年` nor `1. 甲`.
AMOUNT = re.compile(
    r"[约近]?[^\w\s`。！？…!?]{0,3}\d[\d,.]*+(?! ?[年月日号点时:：、/)）])"
)
BAR = re.compile(  # a bar, or code and formulas that may hold one
    r"(`+)(?!`).{1,300}?(?<!`)\1(?!`)|\\\(.{1,300}?\\\)"
    r"|\$(?![\s\d$])[^$]{0,300}[^\s$]\$(?!\w)|\\\||\|"
)
SIDES = {":": "center", "-": "right"}  # where a column stands whose rule ends with `:`
TABLE_RULE = re.compile(r"\s*+\|?(?:\s*+:?-++:?\s*+(?:\||\Z))++\s*")


def indent_of(line: str) -> int:
    """Return how many columns a line is indented."""
    line = line.expandtabs(4)
    return len(line) - len(line.lstrip(" "))


def split_cells(line: str) -> list[str]:
    """Return the cells of a table row; bars in code and formulas do not separate."""
    line = line.strip().removeprefix("|")
    line = BAR.sub(lambda bar: "\0" if bar[0] == "|" else bar[0], line)
    cells = line.removesuffix("\0").split("\0", MAX_COLUMNS)
    return [cell.replace("\\|", "|").replace("\0", "|").strip() for cell in cells]


def can_be_header(line: str) -> bool:
    """Say whether a line can be a table's header: a bar before any sentence end."""
    bar = line.find("|", 0, MAX_HEADER)
    return bar >= 0 and not SENTENCE_END.search(line, 0, bar + 1)


class MarkdownReader:
    """Reads a growing Markdown text, line by line, into tokens.

    A token that has been added never changes. Besides markdown-it's own there are
    hidden ones, which pages leave out: a blank line of the source, and each line of
    code as soon as it is known.
    """

    def __init__(self, depth: int = 0) -> None:
        self.depth = depth  # of quotes around it
        self.tokens: list[Token] = []  # whoever writes them clears the list
        self.rest = ""  # the line that is not complete
        self.is_in_line = False  # its beginning was known to be text, and was read
        self.is_first = True  # no line with text has been read
        self.wrapper = ""  # the fence around the whole answer
        self.fence: Token | None = None  # the open code block's
        self.code: list[str] = []  # the lines behind the fence
        self.quote: MarkdownReader | None = None
        self.lists: list[tuple[int, str]] = []  # indent of the marks; -, *, + or 1
        self.is_behind_amount = False  # the last line was one behind a sign
        self.header = ""  # a line with bars: a table's header if a rule follows
        self.row: str | None = None  # how a row of the open table begins
        self.cells = 0  # of all tables so far
        self.sides: list[str] = []  # where the cells of its columns stand
        self.paragraph: Token | None = None
        self.pending = ""  # the end of the paragraph: its marks may be open
        self.before = "\n"  # the character before that end
        self.closer = ""  # what closes the formula that is open at a line's end
        self.behind = ""  # the lines since then
        self.is_replay = False  # they are read again, as the formula was not closed

    def feed(self, text: str) -> None:
        """Read what has been added to the text."""
        text = ILLEGAL.sub("", text)
        if not text.strip(" \t-*") and not self.is_in_line:
            self.rest += text  # decides nothing, however much of it comes
            return
        *lines, self.rest = (self.rest + text).split("\n")
        for line in lines:
            self.read_line(line.removesuffix("\r"))
        if self.is_in_line:
            self.pending += self.rest
        elif self.is_settled(self.rest):
            self.is_in_line = True
            self.read_block(self.rest)
        else:
            return
        self.read_pending()
        self.rest = ""

    def finish(self) -> None:
        """Read the last line, and close whatever is open."""
        if self.rest or self.is_in_line:
            self.read_line(self.rest.removesuffix("\r"))
        self.give_up_formula()
        if self.header:
            self.read_text(self.header)
        self.close_to(0)
        self.rest = self.header = ""

    def is_settled(self, line: str) -> bool:
        """Say whether an incomplete line is certain to be text or a list item."""
        is_open = self.fence or self.closer or self.header or self.row is not None
        item = ITEM.fullmatch(line)
        if is_open or BLOCK.match(item[2] if item else line) or can_be_header(line):
            return False
        has_words = bool(line.strip(" \t-*"))  # is no rule
        return has_words and (len(line) > MAX_WINDOW or bool(SENTENCE_END.search(line)))

    def read_line(self, line: str) -> None:
        """Read a complete line, or the end of one whose beginning was read."""
        if self.is_in_line:
            self.is_in_line, self.closer = False, ""
            self.pending += line
        elif self.closer:
            self.read_in_formula(line)
        elif self.fence:
            self.read_code(self.fence, line)
        else:
            self.read_block(line)
        if self.paragraph and not self.closer:
            self.end_text_line()

    def read_block(self, line: str) -> None:
        """Decide what a line is, and read it."""
        if self.header:
            return self.read_below_header(line)
        if not line.strip():
            self.close_block()
            self.add("blank", hidden=True)
            return None
        if self.row is not None and "|" in line and line.lstrip().startswith(self.row):
            cells = split_cells(line)
            if self.cells + len(cells) <= MAX_CELLS:
                return self.add_row("td", cells)
        quote = QUOTE.fullmatch(line)
        is_new = not (self.quote or self.depth == MAX_QUOTES)
        if quote and is_new and not AMOUNT.match(quote[1]):  # not `> 60 分`
            self.close_to(indent_of(line))
            self.open("blockquote")
            self.quote = MarkdownReader(self.depth + 1)
            self.quote.tokens = self.tokens
        if quote and self.quote:
            return self.quote.read_line(quote[1])
        if self.quote or self.row is not None:
            self.close_block()
        is_first, self.is_first = self.is_first, False
        if fence := FENCE.fullmatch(line):
            self.read_fence(fence, line, is_first)
        elif heading := HEADING.fullmatch(line):
            words = re.sub(r"\s#+$", "", heading[2].rstrip()).rstrip()
            self.close_to(indent_of(line))
            self.open("heading", f"h{len(heading[1])}")
            self.add("inline", children=read_inline(words)[0], content=words)
            self.close("heading", f"h{len(heading[1])}")
        elif re.fullmatch(r"[ \t]*([-*])(?:[ \t]*\1){2,}[ \t]*", line):
            self.close_to(indent_of(line))
            self.add("hr", "hr")
        elif item := ITEM.fullmatch(line):
            self.read_item(line, item[1], item[2])
        elif can_be_header(line):
            self.header = line
        else:
            self.read_text(line)

    def add(self, type: str, tag: str = "", nesting: int = 0, **more: object) -> Token:
        token = Token(type, tag, nesting, block=True, **more)  # type: ignore[arg-type]
        self.tokens.append(token)
        return token

    def open(self, name: str, tag: str = "", **more: object) -> Token:
        return self.add(f"{name}_open", tag or TAGS.get(name, name), 1, **more)

    def close(self, name: str, tag: str = "", **more: object) -> None:
        self.add(f"{name}_close", tag or TAGS.get(name, name), -1, **more)

    def close_to(self, indent: int) -> None:
        """Close every block that a line with this indent is outside of."""
        self.close_block()
        self.is_behind_amount = False
        while self.lists and indent < self.lists[-1][0] + 2:
            self.close("list_item")
            self.close("ordered_list" if self.lists.pop()[1] == "1" else "bullet_list")

    def close_block(self) -> None:
        """Close the paragraph, quote, code block or table that is open."""
        if self.paragraph:
            self.read_pending(is_whole=True)
            self.close("paragraph", hidden=self.paragraph.hidden)
            self.paragraph, self.before = None, "\n"
        elif self.quote:
            self.quote.finish()
            self.close("blockquote")
            self.quote = None
        elif self.fence:
            code, info = "".join(f"{line}\n" for line in self.code), self.fence.info
            self.add("fence", "code", content=code, info=info, markup=self.fence.markup)
            self.fence, self.code = None, []
        elif self.row is not None:
            self.close("tbody")
            self.close("table")
            self.row = None

    def read_text(self, line: str) -> None:
        indent = indent_of(line)
        if not self.paragraph or self.lists and indent < self.lists[-1][0] + 2:
            self.close_to(indent)
            self.paragraph, self.pending = self.open("paragraph"), ""
        self.is_behind_amount = False
        self.pending += line.lstrip() if self.lists else line

    def end_text_line(self) -> None:
        """Read the paragraph's last line; open marks may continue on the next line."""
        if self.pending.endswith("\n"):
            return
        if fence := LATE_FENCE.search(self.pending):
            self.pending = self.pending[: fence.start()]
            return self.read_block(fence[0].strip())
        self.pending += "\n"
        self.read_pending()
        if self.closer and self.is_replay:
            self.read_pending(is_whole=True)

    def read_pending(self, is_whole: bool = False) -> None:
        """Add what is sure of the paragraph's end; if it is whole, all of it."""
        text = self.pending.rstrip() if is_whole else self.pending
        tokens, end, self.closer = read_inline(text, self.before, is_whole)
        if end:
            self.add("inline", children=tokens, content=text[:end])
            self.before = text[end - 1]
        self.pending = "\n" if is_whole else text[end:]

    def read_in_formula(self, line: str) -> None:
        """Read a line inside an open formula, where nothing is Markdown."""
        self.behind += line + "\n"
        is_end = not line.strip() or FENCE.match(line) or HEADING.match(line)
        if len(self.behind) > MAX_FORMULA or is_end:
            self.give_up_formula()
        elif self.closer in line:
            self.pending += self.behind[:-1]
            self.behind, self.closer = "", ""

    def give_up_formula(self) -> None:
        """Take an unclosed formula as text, and read the lines after it again."""
        if self.closer:
            self.read_pending(is_whole=True)
            lines, self.behind, self.is_replay = self.behind, "", True
            for line in lines.split("\n")[:-1]:
                self.read_line(line)
            self.is_replay = False

    def read_item(self, line: str, mark: str, content: str) -> None:
        """Read a list item, or a line whose mark is a sign."""
        indent, kind = indent_of(line), "1" if mark[0].isdigit() else mark
        above = [outer for outer in self.lists if outer[0] <= indent] or [(indent, "")]
        is_nested = indent >= above[-1][0] + 2
        is_next = not is_nested and above[-1][1] == kind
        is_amount, task = bool(AMOUNT.match(content)), TASK.match(content)
        if is_next:  # the first line of a list has decided
            is_sign = kind == "+" and is_amount
        else:
            is_plus = kind == "+" and not is_nested and not task
            is_sign = kind in "+-" and (is_amount or self.is_behind_amount or is_plus)
        if is_sign:
            self.read_text(line)
            self.is_behind_amount = True
            return
        self.close_to(indent + 2 if is_next else indent)
        if is_next:
            self.close("list_item")
        else:
            self.lists.append((indent, kind))
            self.open("ordered_list" if kind == "1" else "bullet_list")
        item = self.open("list_item", info="•")  # as the chat shows it
        if kind == "1":
            item.info, item.attrs = mark, {"value": int(mark[:-1])}
        if BLOCK.match(content):
            return self.read_block(" " * (indent + 2) + content)
        if task:
            content = ("☐ " if task[1] == " " else "☑ ") + content[task.end() :]
            item.info = mark if kind == "1" else ""
            item.attrs["class"] = "task"
        self.paragraph, self.pending = self.open("paragraph", hidden=True), content

    def read_fence(self, fence: re.Match[str], line: str, is_first: bool) -> None:
        """Read a fence's first line, or the last line of the one around the answer."""
        groups = fence.group("mark", "language", "words")
        mark, info, words = ((group or "").strip() for group in groups)
        if is_first and info.lower() in ("markdown", "md"):
            self.wrapper = mark
        elif self.wrapper and mark.startswith(self.wrapper) and not info:
            self.wrapper = ""
            self.close_to(0)
            if words:
                self.read_line(words)
        elif "`" in words or not line.isascii():
            self.read_text(line)
        else:
            indent = indent_of(line)
            if words:
                self.read_text(" " * indent + words)
            self.close_to(indent)
            self.fence = self.add("code_open", info=info, markup=mark, hidden=True)
            self.fence.level = indent

    def read_code(self, fence: Token, line: str) -> None:
        found = FENCE.fullmatch(line)
        if found and found["mark"].startswith(fence.markup) and not found["language"]:
            self.close_block()
            if found["words"]:
                self.read_line(found["words"])
            return
        indent = min(fence.level, len(line) - len(line.lstrip(" \t")))
        self.code.append(line[indent:])
        self.add("code_line", content=line[indent:], hidden=True)

    def read_below_header(self, line: str) -> None:
        """Open a table if this line is a rule; otherwise the header was text."""
        header, self.header = self.header, ""
        is_rule = "|" in line and TABLE_RULE.fullmatch(line)
        is_small = len(header) <= MAX_HEADER and self.cells < MAX_CELLS
        if not is_rule or not is_small:
            self.read_text(header)
            self.end_text_line()
            return self.read_line(line)
        self.close_to(indent_of(header))
        self.row = "|" if header.lstrip().startswith("|") else ""
        rules = split_cells(line)
        self.sides = [SIDES[cell[0]] if cell[-1:] == ":" else "" for cell in rules]
        self.open("table")
        self.open("thead")
        self.add_row("th", split_cells(header))
        self.close("thead")
        self.open("tbody")

    def add_row(self, tag: str, cells: list[str]) -> None:
        self.cells += len(cells)
        self.open("tr")
        for cell, side in itertools.zip_longest(cells, self.sides[: len(cells)]):
            self.open(tag, attrs={"style": f"text-align:{side}"} if side else {})
            self.add("inline", children=read_inline(cell)[0], content=cell)
            self.close(tag)
        self.close("tr")


def read_markdown(markdown: str) -> list[Token]:
    """Return the tokens of a whole answer, for its chat text and for its page."""
    reader = MarkdownReader()
    reader.feed(markdown)
    reader.finish()
    return reader.tokens


# --- From tokens to chat text

MAX_HEADING = 30  # characters; a longer one is shown as it is
MAX_ROW = 20  # characters of a header whose table is shown in rows
MAX_BLANKS = 10  # newlines in a row
SPACES = re.compile(r"[^\S\n]{200,}")  # a reply of nothing but spaces would be empty


def inline_text(children: list[Token]) -> str:
    """Return the chat text of the tokens of a line."""
    out: list[str] = []
    begins: list[tuple[int, str]] = []  # of open links: in `out`, and the address
    for child in children:
        match child.type:
            case "softbreak" | "hardbreak":
                out.append("\n")
            case "image":
                url, label = str(child.attrs["src"]), inline_text(child.children or [])
                shown = f"[图片：{label}] {url}" if label else f"[图片] {url}"
                out.append("[图片]" if url[:5].lower() == "data:" else shown)
            case "math_inline" | "math_block":
                source = child.markup + child.content + CLOSERS.get(child.markup, "")
                out.append(formula_text(child.content) or source)
            case "s_open" | "s_close":
                out.append("~~")  # without them the meaning turns round
            case "link_open" | "sub_open" | "sup_open":
                begins.append((len(out), str(child.attrs.get("href"))))
            case "link_close":
                begin, url = begins.pop()
                url, label = re.sub("(?i)^mailto:", "", url), "".join(out[begin:])
                if not label:
                    out.append(url)
                elif label != url and not url.startswith("#"):
                    out.append(f"（{url}）")  # phones draw other brackets into the link
            case "sub_close" | "sup_close":
                begin, _ = begins.pop()
                mark = "_" if child.tag == "sub" else "^"
                out[begin:] = [script_text(mark, "".join(out[begin:]), "")]
            case _:
                out.append(child.content)
    return "".join(out)


class ChatWriter:
    """Writes tokens as chat text; what it has written never changes."""

    def __init__(self) -> None:
        self.out: list[str] = []  # whoever shows it clears the list
        self.is_empty = True  # nothing has been written
        self.newlines = 0  # before the next text
        self.spaces = ""  # before the next text, if it is on the same line
        self.prefixes: list[str] = []  # of quotes and items; a mark until it is written
        self.captured: list[str] | None = None  # of a heading, or a row's cells
        self.columns: list[str] = []  # of the table's header
        self.is_wide = False  # the table is written as records
        self.has_rows = False  # below its header
        self.is_code = False  # in a code block, which is not indented
        self.is_hidden = False  # it is a diagram

    def write(self, token: Token) -> None:
        """Write a token; each but the text inside a block begins a line."""
        if token.type != "inline":
            self.break_line()
        match token.type:
            case "inline" if self.captured is not None:
                text = inline_text(token.children or [])
                self.captured.append(text.replace("\n", " "))
            case "inline":
                self.put(inline_text(token.children or []))
            case "blank":
                self.break_line(2)
            case "hr":
                self.put("———")
            case "list_item_open":
                self.prefixes.append(f"{token.info} " if token.info else "")
            case "blockquote_open":
                self.prefixes.append("│ ")
            case "list_item_close":
                self.put(self.prefixes.pop().rstrip())  # its mark, if it has no text
            case "blockquote_close":
                self.prefixes.pop()
            case "code_open":
                self.is_code = True
                self.is_hidden = token.info.split(" ")[0].lower() == "mermaid"
                self.put("（流程图，在网页里看）" if self.is_hidden else "")
            case "code_line" if token.content.strip() and not self.is_hidden:
                self.put(token.content)
            case "code_line" if not self.is_hidden:
                self.newlines = min(self.newlines + 1, MAX_BLANKS)
            case "fence":
                self.is_code = False  # its lines have been written
            case "heading_open" | "tr_open":
                self.captured = []
            case "heading_close":
                text = "".join(self.take_captured()).strip()
                is_plain = len(text) > MAX_HEADING or re.search("[【】《》]|^$", text)
                self.put(text if is_plain else f"【{text}】")
            case "table_open":
                self.columns, self.has_rows = [], False
            case "tr_close":
                self.write_row(self.take_captured())
            case "table_close" if self.is_wide and not self.has_rows:
                self.put("｜".join(self.columns))

    def take_captured(self) -> list[str]:
        captured, self.captured = self.captured or [], None
        return captured

    def write_row(self, cells: list[str]) -> None:
        """Write a row, or a record of the cells below their columns."""
        if not self.columns:
            self.columns = cells
            self.is_wide = len(cells) > 3 or len("".join(cells)) > MAX_ROW
        elif self.is_wide:
            self.break_line(2 if self.has_rows else 1)
            pairs = itertools.zip_longest(self.columns, cells, fillvalue="")
            lines = [f"{a}：{b}" if a and b else b for a, b in pairs]
            lines[0] = f"【{lines[0]}】" if lines[0] else ""
            self.put("\n".join(filter(None, lines)))
            self.has_rows = True
        if not self.is_wide:
            self.put("｜".join(cells))

    def break_line(self, newlines: int = 1) -> None:
        """Begin the next text on a new line, or after a blank one."""
        self.newlines = max(self.newlines, newlines)

    def put(self, text: str) -> None:
        """Append text to the current line; white space at line ends is dropped."""
        for index, line in enumerate(text.split("\n")):
            if index:
                self.break_line()
            words = line.rstrip()
            if words:
                self.begin()
                self.out.append(SPACES.sub(" ", self.spaces + words))
                self.spaces = ""
            self.spaces += line[len(words) :]

    def begin(self) -> None:
        """Write the newlines and prefixes that come before a text."""
        if not (self.newlines or self.is_empty):
            return
        kept = [p for p in self.prefixes if not (self.is_code and p == "  ")]
        newlines = 0 if self.is_empty else self.newlines
        self.out.append("\n" * newlines + "".join(kept))
        self.newlines, self.is_empty, self.spaces = 0, False, ""
        self.prefixes = [prefix if prefix == "│ " else "  " for prefix in self.prefixes]


# --- The chat text of an answer

MAX_UNREAD = 8_000  # characters: most answers are shorter, and read when asked for
MAX_HEADINGS = 2000  # characters of headings in a row that go with what follows
# Lines that no part may end with: headings and list marks go with what follows.
LEADING = re.compile(r"[ │•]*(?:【[^\n]*】|\d{1,4}[.)、）]|[•☐☑│])")


def end_before_leading(text: str) -> int:
    """Return where a text ends without the headings and list marks at its end."""
    end = len(text)
    while end > len(text) - MAX_HEADINGS:
        last = len(text[:end].rstrip())
        begin = text.rfind("\n", 0, last) + 1
        if not LEADING.fullmatch(text, begin, last):
            return end
        end = begin
    return end if end <= 0 else len(text)


class ChatText:
    """The chat text of an answer that is being written; it only gets longer."""

    def __init__(self, markdown: str = "") -> None:
        self.reader, self.writer = MarkdownReader(), ChatWriter()
        self.kinds: collections.Counter[str] = collections.Counter()  # of its tokens
        self.unread = markdown  # read in bulk: the text is rarely asked for
        self.shown = ""

    def feed(self, delta: str) -> None:
        """Add what the model has written."""
        self.unread += delta
        if len(self.unread) > MAX_UNREAD:  # or too much work would come at once
            self.read(MAX_UNREAD - MAX_WINDOW)

    def read(self, left: int) -> None:
        """Read what has been added, except for the last `left` characters."""
        end = max(0, len(self.unread) - left)
        for begin in range(0, end, MAX_WINDOW):
            self.reader.feed(self.unread[begin : min(end, begin + MAX_WINDOW)])
            self.write()  # the tokens take far more memory than the text
        self.unread = self.unread[end:]

    def write(self) -> None:
        """Write what has been read."""
        for token in self.reader.tokens:
            self.writer.write(token)
            self.kinds.update([token.type, *(t.type for t in token.children or [])])
        self.reader.tokens.clear()
        self.shown += "".join(self.writer.out)
        self.writer.out.clear()

    def text(self, has_ended: bool) -> str:
        """Return the chat text; while the answer grows, the part that is final."""
        self.read(0)
        if has_ended:
            self.reader.finish()
            self.write()
        return self.shown if has_ended else self.shown[: end_before_leading(self.shown)]

    def has_more_on_page(self) -> bool:
        """Say whether the page shows more: code, a table, formulas, pictures, links."""
        self.read(0)
        shown = {"table_open", "code_open", "image", "math_inline", "math_block"}
        is_long = self.kinds["heading_open"] >= 2 or self.kinds["link_open"] >= 3
        return is_long or not shown.isdisjoint(self.kinds)


def chat_text(markdown: str) -> str:
    """Return the chat text of a whole answer."""
    return ChatText(markdown).text(has_ended=True)


def stable_text(markdown: str) -> str:
    """Return the part of a growing answer's chat text that can no longer change."""
    return ChatText(markdown).text(has_ended=False)


def has_more_on_page(markdown: str) -> bool:
    """Say whether the page shows more of a whole answer than the chat can."""
    chat = ChatText(markdown)
    chat.text(has_ended=True)
    return chat.has_more_on_page()


# --- Cuts

UNFINISHED = re.compile(r"(?:.*\W)?(?:No|Dr|Mr|Mrs|Ms|St|Prof|Fig|vs|第 ?\d{1,4})\.")
RECORD = re.compile(r"【[^\n]*】(?:\n[^\n：]*+：[^\n]*+)*+")
TABLE_ROW = re.compile(r"[^\n]*｜[^\n]*")
SHOWN_URL = re.compile(r"https?://[^\s（），。；：！？、】》」”’]+")
FLAG = "".join(map(chr, range(0x1F1E6, 0x1F200)))  # two of these letters are one
# Joiners and what they bind, colours of skin, the flags of regions.
EMOJI_TAIL = re.compile("(?<=\u200d)|[\u200d🏻-🏿\U000e0020-\U000e007f]")
PAUSE = (  # not where a formula may be
    r"[，、；：](?!\d)|[,;] |(?<=[A-Za-z]{2}) (?=[A-Za-z]{2})"
    rf"|(?<={CJK.pattern})(?={CJK.pattern})"
)
# Where a part may end, best first, each with how much of the room must be filled.
BLOCK_END = r"\n\n+", 1 / 2
OTHER_ENDS = [
    (r"\n+", 1 / 3),
    (rf"(?:{SENTENCE_END.pattern}) *", 1 / 4),
    (PAUSE, 1 / 4),
    (r"(?s).(?<!\0(?=\0))", 0.0),  # a character's, not in an address
]


def tears_character(text: str, at: int) -> bool:
    """Say whether a cut would tear an accented letter, an emoji or a flag."""
    after = text[at : at + 1] or "\n"
    flags = at - len(text[:at].rstrip(FLAG))
    is_in_flag = after in FLAG and flags % 2 == 1
    is_accent = unicodedata.category(after)[0] == "M"
    return is_in_flag or is_accent or EMOJI_TAIL.match(text, at) is not None


def last_end(pattern: str, least: float, text: str, most: int) -> int:
    """Return the last end between least * most and most where a part may end, or 0."""
    ends = [match.end() for match in re.finditer(pattern, text[: most + 1])]
    for end in reversed(ends):
        line = text[:end].rstrip().rpartition("\n")[2]
        if not least * most <= end <= most or not line or UNFINISHED.fullmatch(line):
            continue
        if end_before_leading(text[:end]) == end and not tears_character(text, end):
            return end
    return 0


def torn_begin(text: str, at: int, room: int) -> int:
    """Return where the record or table row begins that a cut would tear, or 0."""
    for blank, kind in (("\n\n", RECORD), ("\n", TABLE_ROW)):
        begin = text.rfind(blank, 0, at) + len(blank)
        piece = text[begin : begin + room + len(blank)].partition(blank)[0]
        is_known = begin >= len(blank) and kind.fullmatch(piece)
        if is_known and size_of(piece) <= room:
            if end := end_before_leading(text[:begin]):
                return end
    return 0


def cut_text(text: str, room: int) -> int:
    """Return where the part that begins a text ends, at most `room` bytes of UTF-8."""
    most = len(text[:room].encode()[:room].decode(errors="ignore"))
    if most == len(text):
        return most
    text = text[: most + room]
    masked = SHOWN_URL.sub(lambda url: "\0" * len(url[0]), text)
    end = last_end(*BLOCK_END, masked, most) or torn_begin(text, most, room)
    for pattern, least in OTHER_ENDS:
        end = end or last_end(pattern, least, masked, most)
    return end or most


# --- Blocked words
#
# Words and texts are compared as people read them: in Unicode's compatibility form,
# without case, white space, what has no width, and the marks of Markdown.

IGNORED = re.compile(
    r"[\s\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f"
    r"\u202a-\u202e\u2060-\u206f\ufe00-\ufe0f\ufeff\U000e0000-\U000e0fff*_~`\\]"
)
ENTITY_OR_CHARACTER = re.compile(rf"{ENTITY}|.", re.DOTALL | re.IGNORECASE | re.ASCII)
OPEN_ENTITY = re.compile(r"&[^;&]{0,33}\Z")  # none is longer
MARKS_IN_A_ROW = 30  # of Unicode's stream-safe format (UAX #15)


def compared(text: str) -> str:
    """Return a text as blocked words are compared with it."""
    text = re.sub(ENTITY, lambda entity: html.unescape(entity[0]), text, flags=re.I)
    kept, marks = [], 0  # normalising a long run of combining marks is quadratic
    for char in text:
        marks = marks + 1 if unicodedata.combining(char) else 0
        if marks <= MARKS_IN_A_ROW:
            kept.append(char)
    return IGNORED.sub("", unicodedata.normalize("NFKC", "".join(kept)).casefold())


def combines(before: str, after: str) -> bool:
    """Say whether a character merges into the one before: accents, Hangul, kana."""
    if after < "\u0300" or "\u3400" <= after <= "\u9fff":
        return False
    alone = [unicodedata.normalize("NFKC", text) for text in (before, after)]
    together = unicodedata.normalize("NFKC", before + after)
    first = unicodedata.normalize("NFKD", after)[0]
    return unicodedata.combining(first) > 0 or together != "".join(alone)


def clusters(text: str) -> Iterator[str]:
    """Yield each character, or entity, with the marks that change it."""
    cluster = ""
    for sign in ENTITY_OR_CHARACTER.findall(text):
        if cluster and not combines(cluster, sign):
            yield cluster
            cluster = ""
        cluster += sign
    if cluster:
        yield cluster


class BlockedWords:
    """The words of a file, read again when it changes; if it vanishes they stay."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.changed: int | None = None  # the file's time when it was read, ns
        self.words: set[str] = set()
        self.lengths: dict[str, set[int]] = {}  # of the words, by first character
        self.longest = 0

    def refresh(self) -> None:
        """Read the file if it has changed; raise OSError or UnicodeError."""
        if not self.path or self.changed == (changed := os.stat(self.path).st_mtime_ns):
            return
        lines = pathlib.Path(self.path).read_text("utf-8-sig").splitlines()
        words = (line for line in lines if not line.lstrip().startswith("#"))
        self.words = set(map(compared, words)) - {""}
        self.lengths = collections.defaultdict(set)
        for word in self.words:
            self.lengths[word[0]].add(len(word))
        self.longest = max(map(len, self.words), default=0)
        self.changed = changed
        log.info("%d blocked words read", len(self.words))

    def are_in_form(self, form: str) -> bool:
        """Say whether a text, as it is compared, has one of the words."""
        return any(
            form[at : at + length] in self.words
            for at, first in enumerate(form)
            for length in self.lengths.get(first, ())
        )

    def are_in(self, text: str) -> bool:
        """Say whether a text has one of the words."""
        return bool(self.words) and self.are_in_form(compared(text))


class WordGuard:
    """Delays a stream just enough that no blocked word is shown in pieces."""

    def __init__(self, blocked: BlockedWords) -> None:
        self.blocked = blocked
        self.open = ""  # the end of the text: what follows may still combine with it
        # Clusters held back, with their lengths as compared; `form` is all of them.
        self.held: collections.deque[tuple[str, int]] = collections.deque()
        self.form = ""

    def feed(self, delta: str, is_end: bool = False) -> tuple[str, bool]:
        """Return what may be shown now, and whether a blocked word came."""
        if not self.blocked.words:
            return delta, False
        text = self.open + ILLEGAL.sub("", delta)  # nobody will see it in between
        entity = None if is_end else OPEN_ENTITY.search(text)
        settled = list(clusters(text[: entity.start()] if entity else text))
        self.open = entity[0] if entity else ""
        if settled and not entity and not is_end:
            self.open = settled.pop()  # it may get an accent
        for cluster in settled:
            form = compared(cluster)
            self.held.append((cluster, len(form)))
            self.form += form
        if self.blocked.are_in_form(self.form):
            return "", True
        keep, shown = 0 if is_end else self.blocked.longest, []
        while self.held and len(self.form) - self.held[0][1] >= keep:
            cluster, length = self.held.popleft()
            self.form = self.form[length:]
            shown.append(cluster)
        return "".join(shown), False


def excerpt(text: str, length: int = 12) -> str:
    """Return the first characters of a question in one line, harmless."""
    line = " ".join(text.split())
    return harmless(line if len(line) <= length else line[:length] + "…")


# ---------------------------------------------------------------------------
# 6. Store
#
# SQLite behind one aiosqlite connection. A hop to its thread costs ten times the
# statement and a commit twice, so a step is one statement where it can be,
# triggers in schema.sql keep what always goes along, and all that waits hops together
# and shares one commit. A transaction is one job of the thread: nobody's statement gets
# between, and nobody's cancellation leaves it open.
# ---------------------------------------------------------------------------

SCHEMA = pathlib.Path(__file__).with_name("schema.sql")


class StoreError(Exception):
    """A database that cannot be used; the text is the one line an owner reads."""


@dataclass(frozen=True, slots=True)
class Session:
    """A subscriber's conversation with one assistant."""

    id: int
    openid: str
    assistant: str
    last_at: float  # Unix seconds
    is_busy: bool = False  # a question of it is unanswered: it does not end by itself
    lapsed_text: str | None = None  # what was said first after it ran out


@dataclass(frozen=True, slots=True)
class Turn:
    """One question and its answer, as stored; see schema.sql."""

    id: int
    session_id: int
    openid: str
    msg_key: str
    link_key: str
    question: str
    pictures: str | None  # JSON list of URLs, until it is answered
    created_at: float
    asked: int
    assistant: str
    answer: str = ""
    state: str = "open"
    reason: str | None = None
    model: str | None = None

    @property
    def name(self) -> str:
        """Return how the log names this question."""
        return f"turn={self.id} msg={self.msg_key.split()[1]} from={self.openid[:8]}"


TURN = """
    SELECT turn.id, session_id, turn.openid, msg_key, link_key, question, pictures,
           created_at, asked, assistant, answer, state, reason, model
    FROM turn JOIN session ON session.id = session_id
"""


@dataclass(frozen=True, slots=True)
class Part:
    """A numbered part of a long answer; `reply` is what was sent of it, if it was."""

    number: int
    turn_id: int
    start: int  # offset in the chat text
    is_anew: bool = False  # the answer was written again since it was offered
    reply: str | None = None


PART = "SELECT number, turn_id, start, is_anew, reply FROM part"


@dataclass(frozen=True, slots=True)
class Reply:
    """The decided reply of a message key, with all that is stored along with it."""

    key: str
    openid: str
    content: str  # '' is `success`, which is not stored
    created: int  # CreateTime
    turn_id: int | None = None  # the question whose own reply this is
    delivered: str | None = None  # the attempt, when it carries text of the answer
    early: bool = False  # the answer was not ready: name it later if nobody fetches it
    offered: Part | None = None  # the part that its tap asks for
    sent: Part | None = None  # the numbered part it carries
    stop: int = 0  # where that part ends
    read: int | None = None  # a turn that needs no mention any more


@dataclass(frozen=True, slots=True)
class Memory:
    """What is stored around one message: its reply, its turn, its sender's state."""

    reply: tuple[str, int, str | None] | None  # content, CreateTime, delivered
    turn_id: int | None
    session: Session | None
    parts: int  # the sender's highest part number
    unread: tuple[int, int, str] | None  # part number, turn, question
    pictures: str  # JSON list of URLs that wait for a question


def beijing_day(now: float) -> str:
    """Return the Beijing day of a time: quotas begin anew at its midnight."""
    return datetime.datetime.fromtimestamp(now, BEIJING).date().isoformat()


def split_statements(script: str) -> Iterator[str]:
    """Yield the statements of an SQL script, each whole (triggers hold semicolons)."""
    statement = ""
    for line in script.splitlines(keepends=True):
        statement += line
        if sqlite3.complete_statement(statement):
            yield statement
            statement = ""
    if statement.strip():
        yield statement


Statement = tuple[str, dict[str, object]]
BUSY = "busy_timeout = 2000"  # milliseconds for another process's lock
WAIT: list[Statement] = [(f"PRAGMA {BUSY}", {})]
NO_WAIT: list[Statement] = [("PRAGMA busy_timeout = 0", {})]


def run_job(db: sqlite3.Connection, job: list[Statement]) -> list[list]:
    """Run one statement, or several as a transaction; return the rows of each."""
    if len(job) == 1:
        return [db.execute(*job[0]).fetchall()]
    try:
        db.execute("BEGIN IMMEDIATE")
        rows = [db.execute(*statement).fetchall() for statement in job]
        db.execute("COMMIT")
        return rows
    finally:
        if db.in_transaction:  # it failed; a full disk may have ended it already
            db.execute("ROLLBACK")


def run_each(db: sqlite3.Connection, jobs: list[list[Statement]]) -> list:
    """Run jobs in their order; return the rows or the error of each."""
    results: list = []
    for job in jobs:
        try:
            results.append(run_job(db, job))
        except (sqlite3.Error, ValueError, OverflowError) as error:
            results.append(error)
    return results


def run_jobs(db: sqlite3.Connection, jobs: list[list[Statement]]) -> list:
    """Run jobs with one commit, since that costs more than a statement.

    If one fails, nothing was done, and each runs for itself. If another process holds
    the lock, who only reads gets rows all the same, and nobody waits a second time.
    """
    if len(jobs) == 1:
        return run_each(db, jobs)
    try:
        rows = iter(run_job(db, [statement for job in jobs for statement in job]))
    except sqlite3.OperationalError as error:
        if getattr(error, "sqlite_errorname", "").startswith("SQLITE_BUSY"):
            return run_each(db, [NO_WAIT, *jobs, WAIT])[1:-1]
        return run_each(db, jobs)
    except (sqlite3.Error, ValueError, OverflowError):
        return run_each(db, jobs)
    return [list(itertools.islice(rows, len(job))) for job in jobs]


class Store:
    """All that outlives the process. `open_store` opens it; `close` ends its thread.

    Coroutines may use it at the same time; their statements run in the order given.
    """

    def __init__(self, db: aiosqlite.Connection) -> None:
        self.db = db
        self.waiting: list[tuple[list[Statement], asyncio.Future]] = []  # to be run
        self.hop: asyncio.Future | None = None  # the thread is at work
        self.is_wal_behind = False  # it holds deleted text still
        self.newest_push = 0  # newest timestamp of a signed push, seconds
        self.saved_push = 0  # the one in the database, up to a minute older
        self.secret = b""  # keys the hashes under which questions are counted

    def run(self, job: list[Statement]) -> asyncio.Future[list[list]]:
        """Run one statement, or several as a transaction; the rows of each come later.

        They are run even if nobody waits for that any more.
        """
        result = asyncio.get_running_loop().create_future()
        self.waiting.append((job, result))
        if self.hop is None:
            self.start_hop()
        return result

    def start_hop(self) -> None:
        """Let the thread run all that waits.

        Together, by aiosqlite's inner call: a hop for each statement took as much
        processor time as all else that wxgpt adds to a bare handler, see
        docs/benchmark.md.
        """
        batch, self.waiting = self.waiting, []
        jobs = [job for job, _ in batch]
        work = self.db._execute(run_jobs, self.db._conn, jobs)
        self.hop = asyncio.ensure_future(work)
        self.hop.add_done_callback(functools.partial(self.end_hop, batch))

    def end_hop(self, batch: list, hop: asyncio.Future) -> None:
        """Hand out what the thread brought; send it what waits meanwhile."""
        error = asyncio.CancelledError() if hop.cancelled() else hop.exception()
        results = [error] * len(batch) if error else hop.result()
        for (_, result), found in zip(batch, results, strict=True):
            if result.done():  # cancelled; its statements were run all the same
                continue
            if isinstance(found, BaseException):
                result.set_exception(found)
            else:
                result.set_result(found)
        self.hop = None
        if self.waiting:
            self.start_hop()

    async def rows(self, query: str, **values: object) -> list:
        """Return all rows of a statement; no cursor stays open."""
        [rows] = await self.run([(query, values)])
        return rows

    async def migrate(self) -> None:
        """Run the new steps of schema.sql; raise StoreError for a newer database."""
        steps = re.split(r"(?m)^-- step \d+$", SCHEMA.read_text("utf-8"))[1:]
        [(version,)] = await self.rows("PRAGMA user_version")
        if version > len(steps):
            known = f"this wxgpt knows up to {len(steps)}: install a newer one"
            raise StoreError(f"the database is of version {version}, {known}")
        for number, step in enumerate(steps[version:], version + 1):
            statements = [*split_statements(step), f"PRAGMA user_version = {number}"]
            await self.run([(statement, {}) for statement in statements])
        [(newest, secret)] = await self.rows("SELECT newest_push, secret FROM platform")
        self.newest_push = self.saved_push = newest
        self.secret = secret

    async def close(self) -> None:
        """End the connection and its thread, without which the process lives on."""
        while self.hop:
            await asyncio.wait({self.hop})
        await self.db.close()

    # Messages and replies

    async def note_push(self, timestamp: int) -> None:
        """Keep the newest timestamp of a signed push, written once a minute."""
        self.newest_push = max(self.newest_push, timestamp)
        if self.newest_push >= self.saved_push + 60:
            self.saved_push = self.newest_push
            await self.rows("UPDATE platform SET newest_push = :at", at=timestamp)

    async def recall(self, key: str, openid: str, now: float) -> Memory:
        """Return what is stored around a message, in one hop."""
        query = """
            SELECT reply.content, reply.created, reply.delivered, turn.id,
                   (SELECT max(number) FROM part WHERE part.openid = :openid),
                   missed.unread, missed.id, missed.question,
                   session.id, session.openid, session.assistant, session.last_at,
                   EXISTS (SELECT 1 FROM turn AS open
                           WHERE open.session_id = session.id AND open.state = 'open'),
                   (SELECT json_group_array(url) FROM (
                        SELECT url FROM picture
                        WHERE openid = :openid AND created_at > :since ORDER BY id))
            FROM (SELECT 1)
            LEFT JOIN reply ON reply.key = :key
            LEFT JOIN turn ON turn.msg_key = :key
            LEFT JOIN session ON session.openid = :openid AND session.ended_at IS NULL
            LEFT JOIN turn AS missed ON missed.id = (
                SELECT min(id) FROM turn WHERE openid = :openid AND unread IS NOT NULL)
        """
        since = now - PICTURE_SECONDS
        [row] = await self.rows(query, key=key, openid=openid, since=since)
        return Memory(
            reply=row[0:3] if row[0] is not None else None,
            turn_id=row[3],
            parts=row[4] or 0,
            unread=row[5:8] if row[5] is not None else None,
            session=Session(*row[8:13]) if row[8] is not None else None,
            pictures=row[13],
        )

    def save_reply(self, reply: Reply) -> asyncio.Future:
        """Store a decided reply, and what it says about parts, as one."""
        unread = reply.offered.number if reply.offered and reply.early else None
        insert = """
            INSERT OR IGNORE INTO reply
                (key, openid, content, created, turn_id, delivered, unread)
            VALUES (:key, :openid, :content, :created, :turn_id, :delivered, :unread)
        """
        values = {name: getattr(reply, name) for name in ("key", "openid", "content")}
        values |= {n: getattr(reply, n) for n in ("created", "turn_id", "delivered")}
        values |= {"unread": unread}
        return self.run([(insert, values), *self.part_statements(reply)])

    def part_statements(self, reply: Reply) -> Iterator[Statement]:
        """Yield what stores what a reply says about parts, in its transaction."""
        for part in filter(None, (reply.sent, reply.offered)):
            insert = """
                INSERT OR IGNORE INTO part (openid, number, turn_id, start, offered_at)
                VALUES (:openid, :number, :turn_id, :start, :at)
            """
            yield (
                insert,
                {
                    "openid": reply.openid,
                    "number": part.number,
                    "turn_id": part.turn_id,
                    "start": part.start,
                    "at": reply.created,
                },
            )
        if reply.sent:
            update = """
                UPDATE part SET reply = :reply, stop = :stop
                WHERE openid = :openid AND number = :number AND reply IS NULL
            """
            values = {"openid": reply.openid, "number": reply.sent.number}
            yield update, values | {"reply": reply.content, "stop": reply.stop}
            update = """
                UPDATE turn SET unread = NULL, replied = 1,
                    delivered = coalesce(delivered, 'part') WHERE id = :id
            """
            yield update, {"id": reply.sent.turn_id}
        if reply.read:
            yield "UPDATE turn SET unread = NULL WHERE id = :id", {"id": reply.read}

    async def mark_delivered(self, turn_id: int, how: str | None) -> None:
        """Correct how an answer was delivered: another attempt took it, or none."""
        query = "UPDATE turn SET delivered = :how WHERE id = :id"
        await self.rows(query, how=how, id=turn_id)

    async def mark_read(self, turn_id: int) -> None:
        """Note that an answer was read on its page."""
        query = """
            UPDATE turn SET unread = NULL, delivered = coalesce(delivered, 'page')
            WHERE id = :id
        """
        await self.rows(query, id=turn_id)

    # Sessions

    async def start_session(self, openid: str, assistant: str, now: float) -> Session:
        """Open a session; a trigger ends one that was open for this subscriber."""
        query = """
            INSERT INTO session (openid, assistant, opened_at, last_at)
            VALUES (:openid, :assistant, :now, :now) RETURNING id
        """
        [(number,)] = await self.rows(
            query, openid=openid, assistant=assistant, now=now
        )
        return Session(number, openid, assistant, now)

    async def end_session(self, session_id: int, now: float, text: str | None) -> None:
        """End a session, with the text that found it run out."""
        query = "UPDATE session SET ended_at = :now, lapsed_text = :text WHERE id = :id"
        await self.rows(query, now=now, text=text, id=session_id)

    async def touch_session(self, session_id: int, now: float) -> None:
        """Let the idle time count from now; a full disk costs only that."""
        query = "UPDATE session SET last_at = :now WHERE id = :id"
        with contextlib.suppress(sqlite3.OperationalError):
            await self.rows(query, now=now, id=session_id)

    async def lapsed_session(self, openid: str, since: float) -> Session | None:
        """Return the newest session; with its text if it ran out and was not asked."""
        query = """
            SELECT id, openid, assistant, last_at, 0, lapsed_text FROM session
            WHERE openid = :openid AND coalesce(ended_at, :since + 1) > :since
            ORDER BY id DESC LIMIT 1
        """
        rows = await self.rows(query, openid=openid, since=since)
        return Session(*rows[0]) if rows else None

    async def reopen_session(self, session_id: int, now: float) -> None:
        """Open a lapsed session again, with its conversation."""
        query = "UPDATE session SET ended_at = NULL, last_at = :now WHERE id = :id"
        await self.rows(query, now=now, id=session_id)

    async def add_picture(self, openid: str, url: str, now: float) -> None:
        """Keep a picture for the next question; a trigger drops those beyond four."""
        query = "INSERT INTO picture (openid, url, created_at) VALUES (:o, :url, :now)"
        await self.rows(query, o=openid, url=url, now=now)

    # Turns

    async def add_turn(self, turn: Turn, most: int, most_of_all: int) -> Turn | None:
        """Store an accepted question and count it; return it with its id.

        None, and nothing is stored, when the day's questions are used up (0: any).
        Triggers count under a keyed hash, which outlives a deletion until midnight.
        """
        query = """
            INSERT INTO turn (session_id, openid, msg_key, link_key, question, pictures,
                              asked, created_at, day, counted_as)
            SELECT :session_id, :openid, :msg_key, :link_key, :question, :pictures,
                   :asked, :created_at, :day, :counted_as
            WHERE NOT EXISTS (
                SELECT 1 FROM quota WHERE day = :day
                AND (who = :counted_as AND questions >= :most AND :most > 0
                     OR who = '' AND questions >= :most_of_all AND :most_of_all > 0))
            RETURNING id
        """
        names = ("session_id", "openid", "msg_key", "link_key", "question", "pictures")
        columns = {
            name: getattr(turn, name) for name in (*names, "asked", "created_at")
        }
        columns |= {"day": beijing_day(turn.created_at), "most": most}
        columns |= {
            "counted_as": self.counted_as(turn.openid),
            "most_of_all": most_of_all,
        }
        rows = await self.rows(query, **columns)
        return replace(turn, id=rows[0][0]) if rows else None

    def counted_as(self, openid: str) -> str:
        """Return the hash under which a subscriber's questions are counted."""
        return hmac.new(self.secret, openid.encode(), "sha256").hexdigest()[:32]

    async def questions_of_day(self, openid: str, now: float) -> int:
        """Return how many questions a subscriber asked on this Beijing day."""
        query = "SELECT questions FROM quota WHERE day = :day AND who = :who"
        day, who = beijing_day(now), self.counted_as(openid)
        rows = await self.rows(query, day=day, who=who)
        return rows[0][0] if rows else 0

    async def count_asking(self, turn_id: int) -> None:
        """Count that a stored question now goes to the model, before it does."""
        await self.rows("UPDATE turn SET asked = asked + 1 WHERE id = :id", id=turn_id)

    async def save_texts(self, texts: list[tuple[int, str]]) -> None:
        """Store what is written so far of turns."""
        query = "UPDATE turn SET answer = :text WHERE id = :id AND state = 'open'"
        await self.run([(query, {"id": turn, "text": text}) for turn, text in texts])

    async def begin_anew(self, turn_id: int) -> None:
        """Let what is not sent of a turn begin at its start: it is written again."""
        query = """
            UPDATE part SET start = 0, is_anew = 1
            WHERE turn_id = :id AND reply IS NULL AND start > 0
        """
        await self.rows(query, id=turn_id)

    async def finish_turn(self, turn_id: int, columns: dict[str, object]) -> None:
        """Store the end of an answer: its columns by name, in one statement."""
        query = """
            UPDATE turn SET answer = :answer, chat_chars = :chat_chars, state = :state,
                reason = :reason, finished_at = :finished_at, model = :model,
                tokens_in = :tokens_in, tokens_out = :tokens_out, seconds = :seconds,
                first_seconds = :first_seconds,
                pictures = iif(:state IN ('failed', 'broken'), pictures, NULL)
            WHERE id = :id
        """
        await self.rows(query, id=turn_id, **columns)

    async def history(self, turn: Turn, chars: int) -> list[tuple[str, str]]:
        """Return whole exchanges before a turn, oldest first, within `chars`."""
        query = """
            SELECT question, answer FROM turn WHERE session_id = :session AND id < :id
            AND state IN ('done', 'cut') ORDER BY id DESC LIMIT 200
        """
        chosen: list[tuple[str, str]] = []
        for row in await self.rows(query, session=turn.session_id, id=turn.id):
            chars -= len(row[0]) + len(row[1])
            if chars < 0:
                break
            chosen.append(row)
        return chosen[::-1]

    async def turns(self, where: str, **values: object) -> list[Turn]:
        """Return the turns that a condition names."""
        return [
            Turn(*row) for row in await self.rows(f"{TURN} WHERE {where}", **values)
        ]

    async def turn(self, turn_id: int) -> Turn | None:
        """Return a turn."""
        return next(iter(await self.turns("turn.id = :id", id=turn_id)), None)

    async def turn_by_link(self, link_key: str) -> Turn | None:
        """Return the turn that an answer's link shows."""
        return next(iter(await self.turns("link_key = :key", key=link_key)), None)

    async def open_turns(self) -> tuple[list[Turn], set[int]]:
        """Return the unfinished turns in order, and their sessions that are open."""
        turns = await self.turns("state = 'open' ORDER BY turn.id")
        query = """
            SELECT session_id FROM turn JOIN session ON session.id = session_id
            WHERE state = 'open' AND ended_at IS NULL
        """
        return turns, {number for (number,) in await self.rows(query)}

    async def newest_failed(self, openid: str, since: float) -> Turn | None:
        """Return the newest question if it failed and is not older than `since`."""
        where = "turn.openid = :openid ORDER BY turn.id DESC LIMIT 1"
        for turn in await self.turns(where, openid=openid):
            if turn.created_at > since and turn.state in ("failed", "broken"):
                return turn
        return None

    async def turns_of(self, openid: str, before: int, count: int) -> list[Turn]:
        """Return a subscriber's turns below an id, newest first."""
        where = "turn.openid = :o AND turn.id < :b ORDER BY turn.id DESC LIMIT :n"
        return await self.turns(where, o=openid, b=before, n=count)

    # Parts

    async def part(self, openid: str, number: int) -> Part | None:
        """Return a numbered part of this subscriber."""
        query = f"{PART} WHERE openid = :openid AND number = :number"
        rows = await self.rows(query, openid=openid, number=number)
        return Part(*rows[0]) if rows else None

    async def unsent_part(self, turn_id: int) -> Part | None:
        """Return the part of a turn that is offered and not sent."""
        query = f"{PART} WHERE turn_id = :id AND reply IS NULL ORDER BY number LIMIT 1"
        rows = await self.rows(query, id=turn_id)
        return Part(*rows[0]) if rows else None

    async def oldest_unsent(
        self, openid: str, session_id: int | None, since: float
    ) -> int | None:
        """Return the oldest turn of which something was not sent yet.

        Of one session, or of all turns asked after `since` when there is none.
        """
        query = """
            SELECT turn.id FROM turn
            LEFT JOIN part ON turn_id = turn.id AND reply IS NULL
            WHERE turn.openid = :openid
              AND (replied = 0 OR number IS NOT NULL
                   AND (state IN ('open', 'cut', 'blocked', 'ended')
                        OR unread IS NOT NULL
                        OR coalesce(chat_chars, length(answer)) > start))
              AND CASE WHEN :session IS NULL THEN created_at > :since
                       ELSE session_id = :session END
            ORDER BY turn.id LIMIT 1
        """
        rows = await self.rows(query, openid=openid, session=session_id, since=since)
        return rows[0][0] if rows else None

    # Links and deletion

    async def add_history_link(self, openid: str, expires_at: float) -> str:
        """Return the key of a new history link; a trigger ends the ones before."""
        key = secrets.token_urlsafe(16)
        query = """
            INSERT INTO history_link (key, openid, created_at, expires_at)
            VALUES (:key, :openid, :now, :at)
        """
        await self.rows(query, key=key, openid=openid, now=time.time(), at=expires_at)
        return key

    async def history_owner(self, key: str) -> tuple[str, float] | None:
        """Return whose history a link shows and until when it works."""
        query = "SELECT openid, expires_at FROM history_link WHERE key = :key"
        return next(iter(await self.rows(query, key=key)), None)

    async def ask_forget(self, openid: str, now: float) -> None:
        """Note that a subscriber asked for deletion and has yet to confirm it."""
        query = "REPLACE INTO forget_request (openid, asked_at) VALUES (:openid, :at)"
        await self.rows(query, openid=openid, at=now)

    async def forget_asked_at(self, openid: str) -> float:
        """Return when a subscriber asked for deletion, in Unix seconds; 0: never."""
        query = "SELECT asked_at FROM forget_request WHERE openid = :openid"
        rows = await self.rows(query, openid=openid)
        return rows[0][0] if rows else 0.0

    async def forget(self, openid: str) -> None:
        """Delete all that is stored about a subscriber, from the files too."""
        tables = ["session", "turn", "part", "reply", "picture", "history_link"]
        tables += ["forget_request"]
        values: dict[str, object] = {"o": openid}
        await self.run([(f"DELETE FROM {t} WHERE openid = :o", values) for t in tables])
        await self.truncate_wal()

    async def truncate_wal(self) -> None:
        """Take deleted text out of the WAL; a reader may prevent it for a while.

        In the database itself secure_delete has overwritten it.
        """
        self.is_wal_behind = True
        checkpoint: list[Statement] = [("PRAGMA wal_checkpoint(TRUNCATE)", {})]
        jobs = [NO_WAIT, checkpoint, WAIT]  # all that is stored would wait with it
        _, [[(is_busy, *_)]], _ = await asyncio.gather(*map(self.run, jobs))
        self.is_wal_behind = bool(is_busy)

    async def prune(self, now: float, link_seconds: float, keep_days: float) -> None:
        """Delete what has served its time: replies, links, counts, old exchanges."""
        query = "DELETE FROM quota WHERE day < :day"
        await self.rows(query, day=beijing_day(now))
        for table, column, seconds in (
            ("reply", "created", REPLY_HOURS * 3600),
            ("history_link", "expires_at", link_seconds),
            ("forget_request", "asked_at", LAPSE_SECONDS),
            ("picture", "created_at", PICTURE_SECONDS),
        ):
            query = f"DELETE FROM {table} WHERE {column} < :at"
            await self.rows(query, at=now - seconds)
        if keep_days:
            await self.delete_before(now - keep_days * 86400)

    async def delete_before(self, at: float) -> None:
        """Delete the exchanges before a time, from the files too."""
        queries = (
            "DELETE FROM turn WHERE created_at < :at AND state <> 'open' RETURNING 1",
            "DELETE FROM reply WHERE created < :at",
            "DELETE FROM session WHERE opened_at < :at AND last_at < :at"
            " AND NOT EXISTS (SELECT 1 FROM turn WHERE session_id = session.id)",
        )
        gone, *_ = await self.run([(query, {"at": at}) for query in queries])
        count = len(gone)
        await self.truncate_wal()
        log.info("%d exchanges older than keep_days deleted", count)


PRAGMAS: tuple[str, ...] = (BUSY, "journal_mode = WAL", "synchronous = NORMAL")
PRAGMAS += ("foreign_keys = ON", "secure_delete = ON", "journal_size_limit = 16777216")


async def open_store(path: str) -> Store:
    """Return the store of a file, made or brought up to date; raise StoreError."""
    try:
        # -wal and -shm copy its mode: nobody else reads what people wrote
        os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
        with contextlib.suppress(PermissionError):  # another user's, lent to us
            os.chmod(path, 0o600)  # a restored copy may have come with any mode
    except OSError as error:
        raise StoreError(f"database {path}: {error.strerror}") from None
    async with contextlib.AsyncExitStack() as undo:
        store = Store(await aiosqlite.connect(path, isolation_level=None))
        undo.push_async_callback(store.close)
        try:
            # Before anything is written. It reads the whole file, so a start with a
            # million answers would take many seconds: a large one goes unchecked.
            is_small = os.path.getsize(path) <= CHECK_BYTES
            check = await store.rows("PRAGMA quick_check(1)") if is_small else []
            if check not in ([], [("ok",)]):
                words = " ".join(check[0][0].split())
                raise StoreError(f"database {path}: corrupt: {words}")
            for pragma in PRAGMAS:
                await store.rows(f"PRAGMA {pragma}")
            await store.migrate()
        except sqlite3.Error as error:
            raise StoreError(f"database {path}: {error}") from None
        undo.pop_all()  # it stays open
        return store


# ---------------------------------------------------------------------------
# 7. Chat API
#
# POST {base_url}/chat/completions, streamed. Providers differ in small things: read
# every field with care, and take only a finish_reason or [DONE] for the end, since a
# connection that closes in mid-answer raises nothing.
# ---------------------------------------------------------------------------


class ChatError(Exception):
    """A failed answer: the kind chooses the sentence, the detail is for the log."""

    def __init__(
        self, kind: str, detail: str, passing: bool = False, after: float | None = None
    ) -> None:
        super().__init__(f"{kind}: {detail}")
        # slow, unreachable, busy, setup, refused, long, blind, picture, empty, broken
        self.kind = kind
        self.passing = passing  # asking again may help
        self.after = after  # seconds the upstream asks to wait before
        self.parameter = ""  # a field of the request that the upstream refuses
        self.words = ""  # the upstream's, for `check` only


@dataclass(frozen=True, slots=True)
class Ending:
    """How a streamed answer ended."""

    finish_reason: str
    model: str
    tokens_in: int | None
    tokens_out: int | None


class EventDecoder:
    """Event-stream payloads out of bytes in any pieces, as the HTML standard parses.

    But for a byte order mark at the beginning, which no chat API was seen to send.
    """

    def __init__(self, limit: int = 1 << 20) -> None:
        self.rest = b""  # of a line that is not complete
        self.data: list[bytes] = []  # of an event that is not complete
        self.size = 0  # its bytes
        self.limit = limit
        self.after_cr = False  # a LF that comes next belongs to the CR before

    def feed(self, chunk: bytes) -> list[str]:
        """Return the payloads that are complete with this chunk; raise ChatError."""
        if self.after_cr and chunk[:1] == b"\n":
            chunk = chunk[1:]
        text = self.rest + chunk
        self.after_cr = text.endswith(b"\r")
        lines = text.replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n")
        self.rest = lines.pop()
        payloads = []
        for line in lines:
            if line.startswith(b"data:") or line == b"data":
                self.data.append(line[6:] if line[5:6] == b" " else line[5:])
                self.size += len(line)
            elif not line and self.data:
                payloads.append(b"\n".join(self.data).decode("utf-8", "replace"))
                self.data, self.size = [], 0
        if len(self.rest) + self.size > self.limit:
            raise ChatError("broken", "an event of the stream is longer than 1 MiB")
        return payloads


class ThoughtFilter:
    """Leaves out `<think>…</think>` at the beginning of an answer, in any pieces."""

    def __init__(self) -> None:
        self.held = ""  # what may still turn out to be a thought
        self.state = "start"

    def feed(self, delta: str) -> str:
        """Return what of the text so far is visible and was not returned before."""
        if self.state == "answer":
            return delta
        self.held = (self.held + delta).lstrip()
        if self.state == "start":
            if self.held.startswith("<think>"):
                self.state = "thought"
            elif "<think>".startswith(self.held):
                return ""
            else:
                self.state = "answer"
                return self.held
        _, end, after = self.held.partition("</think>")
        if after.strip():
            self.state = "answer"
            return after.lstrip()
        # Of a thought only what may be the beginning of its end is kept.
        self.held = end or self.held[-len("</think>") :]
        return ""

    def flush(self) -> str:
        """Return what was held back at the end: a thought never closed is no answer."""
        return self.held if self.state == "start" else ""


# What providers say in the code, type or message of an error, and what it means here.
MEANINGS = (
    ("long", r"context_(length|size)|context ?window|maximum context|code=1261\b"),
    ("long", r"model token limit|available context"),
    ("blind", r"image_url|image input|support.{0,20} images?\b|\bvision\b"),
    ("refused", r"content_?(policy|filter)|data_inspection_failed|code=1301\b"),
    ("refused", r"(?<!case.)sensitive"),
    ("setup", r"insufficient_quota|balance(?!r)|spend_limit|usage_limit"),
    ("setup", r"arrearage|code=1113\b"),
    ("setup", r"model_not_found|无可用渠道"),
)
REFUSED_PARAMETER = r"unsupported_parameter|unsupported_value|unknown_parameter"
WORD = re.compile(r"[A-Za-z0-9_.:\[\]-]{1,64}")  # more may be what somebody wrote


def retry_after(headers: typing.Mapping[str, str]) -> float | None:
    """Return how many seconds the upstream asks to wait, None if it does not say."""
    text, seconds = headers.get("retry-after", ""), 0.0
    with contextlib.suppress(ValueError, OverflowError):
        seconds = email.utils.parsedate_to_datetime(text).timestamp() - time.time()
    with contextlib.suppress(ValueError):
        seconds = float(text)
    with contextlib.suppress(KeyError, ValueError):
        seconds = float(headers["retry-after-ms"]) / 1000
    return seconds if seconds > 0 else None  # nor is NaN


def error_of(
    status: int, body: object, headers: typing.Mapping[str, str] = {}
) -> ChatError:
    """Return the error that a status and a body mean; the words may be of any shape."""
    error = body.get("error") or body if isinstance(body, dict) else body
    error = error if isinstance(error, dict) else {"message": error}
    message = str(error.get("message") or error.get("detail") or "")[:300]
    words = {name: str(error.get(name) or "") for name in ("code", "type", "param")}
    words = {name: word for name, word in words.items() if WORD.fullmatch(word)}
    known = " ".join(f"{name}={word}" for name, word in words.items())
    if status == 200 and re.fullmatch("[45][0-9]{2}", words.get("code", "")):
        status = int(words["code"])  # a gateway tells what it met behind itself
    kind = "busy" if status in (408, 409, 429) or status >= 500 else "setup"
    kind = "broken" if status == 200 else kind
    for meaning, pattern in MEANINGS:
        if re.search(pattern, f"{known} {message}", re.IGNORECASE):
            kind = meaning
            break
    # The message is not logged: it may repeat the key, or what was asked.
    request_id = WORD.match(headers.get("x-request-id", "")) or ["-"]
    detail = f"status {status} {known} request {request_id[0]}"
    result = ChatError(kind, detail, kind in ("busy", "broken"), retry_after(headers))
    result.words = message
    if result.after is not None and result.after > RETRY_AFTER_SECONDS:
        result.passing, result.after = False, None
    if headers.get("x-should-retry") in ("true", "false"):
        result.passing = headers["x-should-retry"] == "true"
    if re.search(REFUSED_PARAMETER, known):
        result.parameter = words.get("param", "")
    return result


def read_event(payload: str) -> dict:
    """Return the JSON object of one event; raise ChatError, also for an error in it."""
    try:
        event = json.loads(payload)
    except (ValueError, RecursionError):
        raise ChatError("broken", "an event is not JSON", True) from None
    if not isinstance(event, dict):
        raise ChatError("broken", "an event is not an object", True)
    if event.get("error") or event.get("object") == "error":
        raise error_of(200, event)
    return event


def first_choice(event: dict) -> dict:
    """Return the first choice of an event, or an empty one."""
    choices = event.get("choices")
    first = choices[0] if isinstance(choices, list) and choices else None
    return first if isinstance(first, dict) else {}


def visible_text(part: object) -> str:
    """Return the text of a delta or message; hidden reasoning is in other fields."""
    if not isinstance(part, dict):
        return ""
    text = part.get("content") or part.get("refusal")
    return text if isinstance(text, str) else ""


def is_thinking(delta: object) -> bool:
    """Say whether a delta has hidden reasoning."""
    names = ("reasoning_content", "reasoning")
    return isinstance(delta, dict) and any(delta.get(name) for name in names)


def make_ending(reason: str, model: object, usage: object) -> Ending:
    """Return the Ending of the loosely typed values of a stream."""
    usage = usage if isinstance(usage, dict) else {}
    tokens = [usage.get(name) for name in ("prompt_tokens", "completion_tokens")]
    is_count = [isinstance(n, int) and 0 <= n < 2**31 for n in tokens]
    given, taken = (
        n if fits else None for n, fits in zip(tokens, is_count, strict=True)
    )
    reason = reason if WORD.fullmatch(reason) else "odd"
    return Ending(reason, ILLEGAL.sub("", str(model)[:100]), given, taken)


class Completion:
    """What a stream has said so far; fed with its bytes in any pieces."""

    def __init__(self, model: str) -> None:
        self.decoder = EventDecoder()
        self.thoughts = ThoughtFilter()
        self.reason = ""  # why the text ended, once it has
        self.names_reasons = False  # the upstream has a field for it
        self.usage: object = {}
        self.model: object = model
        self.is_alive = False  # the newest piece had text or hidden reasoning
        self.is_over = False  # nothing more is to come
        self.error: ChatError | None = None  # raised when the text before is shown

    def feed(self, chunk: bytes) -> str:
        """Return the visible text of a piece; what is wrong in it is in `error`."""
        texts: list[str] = []
        self.is_alive = False
        try:
            for payload in self.decoder.feed(chunk):
                texts.append(self.read(payload))
        except ChatError as error:
            self.error = error
        return "".join(texts)

    def read(self, payload: str) -> str:
        """Return the visible text of an event; behind the reason only usage counts."""
        if payload.strip() == "[DONE]":
            # llama.cpp's server ends an answer so when it turns to another.
            missing = "length" if self.names_reasons else "stop"
            self.reason, self.is_over = self.reason or missing, True
        if self.is_over:
            return ""
        event = read_event(payload)
        self.usage = event.get("usage") or self.usage
        if self.reason:
            return ""
        self.model = event.get("model") or self.model
        choice = first_choice(event)
        text = visible_text(choice.get("delta"))
        self.is_alive = self.is_alive or bool(text) or is_thinking(choice.get("delta"))
        self.names_reasons |= "finish_reason" in choice
        self.reason = str(choice.get("finish_reason") or "")
        return self.thoughts.feed(text)

    def ending(self) -> Ending:
        """Return how it ended."""
        return make_ending(self.reason, self.model, self.usage)


async def read_body(response: aiohttp.ClientResponse, limit: int) -> str:
    """Return at most `limit` bytes of a body as text."""
    body = b""
    async for chunk in response.content.iter_any():
        body += chunk
        if len(body) >= limit:
            break
    return body[:limit].decode("utf-8", "replace")


async def read_error(response: aiohttp.ClientResponse) -> ChatError:
    """Return the error of a response that is not a 200; its body gets two seconds."""
    text = ""
    with contextlib.suppress(TimeoutError, aiohttp.ClientError, ConnectionError):
        async with asyncio.timeout(2):
            text = await read_body(response, BODY_BYTES)
    try:
        body = json.loads(text)
    except (ValueError, RecursionError):
        body = re.sub(r"<[^>]*>|\s+", " ", text).strip()
    return error_of(response.status, body, response.headers)


async def read_unstreamed(
    response: aiohttp.ClientResponse,
) -> AsyncIterator[str | Ending]:
    """Yield the answer of a server that does not stream; raise ChatError."""
    event = read_event(await read_body(response, 8 * ANSWER_CHARS))
    choice = first_choice(event)
    thoughts = ThoughtFilter()
    if text := thoughts.feed(visible_text(choice.get("message"))) + thoughts.flush():
        yield text
    reason = str(choice.get("finish_reason") or "stop")
    yield make_ending(reason, event.get("model"), event.get("usage"))


async def read_usage(content: aiohttp.StreamReader, completion: Completion) -> None:
    """Read the usage behind a finish_reason; it gets two seconds to come."""
    with contextlib.suppress(TimeoutError, aiohttp.ClientError, ConnectionError):
        async with asyncio.timeout(2):
            while not (completion.is_over or completion.error):
                chunk = await content.readany()
                completion.feed(chunk)
                completion.is_over = completion.is_over or not chunk


class Deadline:
    """The time limits of one answer: to the first token, between tokens, in all."""

    def __init__(self, settings: AssistantSettings, end: float) -> None:
        self.idle = settings.idle_timeout
        self.end = end  # loop's clock
        first = asyncio.get_running_loop().time() + settings.first_token_timeout
        self.timeout = asyncio.timeout_at(min(end, first))
        self.moved_at = -1e9  # loop's clock; a timer for every token costs too much

    def extend(self) -> None:
        """Let the idle time begin again: the model is at work.

        It lasts up to a tenth longer, so that the timer is seldom moved.
        """
        now = asyncio.get_running_loop().time()
        if now - self.moved_at >= 0.1 * self.idle:
            self.moved_at = now
            self.timeout.reschedule(min(self.end, now + 1.1 * self.idle))


class ChatClient:
    """One assistant's chat API. Holds no connection; any number may stream."""

    def __init__(
        self, settings: AssistantSettings, http: aiohttp.ClientSession
    ) -> None:
        self.settings = settings
        self.http = http
        base = settings.base_url.strip().rstrip("/").removesuffix("/chat/completions")
        self.url = f"{base}/chat/completions"
        self.refused: set[str] = set()  # fields that the upstream does not take

    def request_body(self, messages: list[dict]) -> dict:
        """Return the request's JSON, without the fields that were refused before."""
        body = {"model": self.settings.model, "messages": messages, "stream": True}
        body["stream_options"] = {"include_usage": True}
        if self.settings.model == DEFAULT_MODEL:
            # It thinks unless told not to; other models refuse the field.
            body["reasoning_effort"] = "none"
        body |= self.settings.extra
        return {name: value for name, value in body.items() if name not in self.refused}

    def learn(self, error: ChatError, left_out: set[str]) -> None:
        """Leave out a field that was refused from now on, and let the question pass.

        `left_out` is what the request went without: refused all the same, it is no use.
        """
        name = error.parameter.partition(".")[0]
        optional = {*self.settings.extra, "stream_options", "reasoning_effort"}
        if name not in optional - left_out:
            return
        error.passing, error.after = True, 0.0
        if name not in self.refused:
            self.refused.add(name)
            log.warning("%s refuses %s, asked without it from now on", self.url, name)

    async def stream(
        self, messages: list[dict], end: float
    ) -> AsyncGenerator[str | Ending, None]:
        """Yield the visible deltas, then the Ending, before `end`; raise ChatError.

        Leaving the iterator early closes the connection and ends the upstream's work.
        """
        deadline, left_out = Deadline(self.settings, end), set(self.refused)
        try:
            async with deadline.timeout, self.post(messages) as response:
                async for item in self.read(response, deadline):
                    yield item
        except ChatError as error:
            self.learn(error, left_out)
            raise
        except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError) as error:
            raise ChatError("unreachable", str(error), True) from None
        except TimeoutError:
            is_left = asyncio.get_running_loop().time() < end  # to ask again
            raise ChatError("slow", "time limit", is_left) from None
        except (aiohttp.ClientError, ConnectionError) as error:
            # Its words may quote the answer.
            raise ChatError("broken", type(error).__name__, True) from None

    def post(self, messages: list[dict]) -> typing.Any:
        """Return the request as a context manager."""
        return self.http.post(
            self.url,
            json=self.request_body(messages),
            headers={"Authorization": f"Bearer {self.settings.api_key.strip()}"},
            proxy=self.settings.proxy or None,
            allow_redirects=False,
        )

    async def read(
        self, response: aiohttp.ClientResponse, deadline: Deadline
    ) -> AsyncIterator[str | Ending]:
        """Yield a response's visible deltas and its Ending; raise ChatError."""
        if response.status != 200:
            raise await read_error(response)
        if response.content_type == "application/json":
            async for item in read_unstreamed(response):
                yield item
            return
        completion, chunk = Completion(self.settings.model), b"\n"
        while chunk and not completion.reason:
            chunk = await response.content.readany()
            # Some servers omit the blank line behind the last event.
            text = completion.feed(chunk or b"\n\n")
            if completion.is_alive:
                deadline.extend()
            if text:
                yield text
            if completion.error and not completion.reason:
                raise completion.error
        if not completion.reason:
            raise ChatError("broken", "the stream ended without an end", True)
        deadline.timeout.reschedule(None)  # the answer is whole
        if not completion.is_over:
            await read_usage(response.content, completion)
        if text := completion.thoughts.flush():
            yield text
        yield completion.ending()


MAGIC = {
    "image/jpeg": rb"\xff\xd8\xff",
    "image/png": rb"\x89PNG\r\n\x1a\n",
    "image/gif": rb"GIF8[79]a",
    "image/webp": rb"RIFF....WEBP",
}


class Pictures:
    """Fetches what subscribers sent, from WeChat's hosts only, a few at one time."""

    def __init__(self, hosts: tuple[str, ...], http: aiohttp.ClientSession) -> None:
        self.hosts, self.http = hosts, http
        self.slots = asyncio.Semaphore(PICTURE_FETCHES)

    async def fetch(self, url: str) -> str:
        """Return a picture as a data URL; raise ChatError.

        Inlined since the upstream may not reach WeChat's hosts.
        """
        try:
            parts = urllib.parse.urlsplit(url)
            if (
                parts.scheme not in ("http", "https")
                or parts.hostname not in self.hosts
            ):
                raise ChatError("picture", "its host is not in picture_hosts")
            async with self.slots, asyncio.timeout(PICTURE_TIMEOUT):
                body = await self.read(url)
        except (aiohttp.ClientError, OSError, ValueError) as error:
            raise ChatError("picture", f"not fetched: {type(error).__name__}") from None
        for kind, magic in MAGIC.items():
            if re.match(magic, body, re.DOTALL):
                return f"data:{kind};base64,{base64.b64encode(body).decode()}"
        raise ChatError("picture", "neither JPEG, PNG, GIF nor WebP")

    async def read(self, url: str) -> bytes:
        """Return the bytes behind a URL, without redirects; raise ChatError."""
        async with self.http.get(url, allow_redirects=False) as response:
            if response.status != 200:
                raise ChatError("picture", f"status {response.status}")
            body = b""
            async for chunk in response.content.iter_any():
                body += chunk
                if len(body) > PICTURE_BYTES:
                    raise ChatError("picture", "larger than 4 MB")
            return body


# ---------------------------------------------------------------------------
# 8. Answers in progress
#
# Two things live as long as they are needed and are never polled: an Answer, which one
# task writes and any number read, and a Delivery, in which the attempts of one message
# meet. Answers owns both and every task.
# ---------------------------------------------------------------------------


class Subscriber:
    """What is known in memory of a subscriber while something of theirs is going on.

    Lives in a weak dictionary: deliveries and answers keep it alive.
    """

    def __init__(self, openid: str) -> None:
        self.openid = openid
        self.lock = asyncio.Lock()  # messages are taken up in the order they came
        self.answers: list[typing.Any] = []  # unfinished Answers, the oldest first
        self.parts: int | None = None  # highest part number; None: not read yet
        self.unread: dict[int, tuple[int, str]] = {}  # part number: turn, question
        # Numbers of the parts offered lately, by turn and start.
        self.offers: dict[tuple[int, int], int] = {}

    def number_of(self, turn_id: int, start: int) -> int:
        """Return the number a part was offered by before, or a new one."""
        at = (turn_id, start)
        if at not in self.offers:
            self.offers[at] = self.next_part()
        return self.offers[at]

    def next_part(self) -> int:
        """Return a part number that was never used."""
        self.parts = (self.parts or 0) + 1
        return self.parts

    def remember(self, memory: Memory) -> None:
        """Take over from the store what only changes here from now on."""
        if self.parts is None:
            self.parts = memory.parts
            if memory.unread:
                number, turn_id, question = memory.unread
                self.unread[number] = (turn_id, question)

    def has_read(self, turn_id: int) -> bool:
        """Note that an answer needs no mention; say whether it did."""
        numbers = [n for n, (turn, _) in self.unread.items() if turn == turn_id]
        for number in numbers:
            del self.unread[number]
        return bool(numbers)


LONG_CHARS = 10_000  # of an answer take some ten milliseconds to read
SENTENCE_SIGN = re.compile(r"[。！？…!?.\n]")


def markdown_length(markdown: str, chat_length: int) -> int:
    """Return how much of a text shows no more than so much of its chat text."""

    def length(end: int) -> int:
        return len(chat_text(markdown[:end]))

    chat, begin, line = ChatText(), 0, ""  # of the last line that may fit
    for following in markdown.splitlines(keepends=True):
        begin, line = begin + len(line), following
        chat.feed(line)
        if len(chat.text(has_ended=False)) > chat_length:
            break
    ends = [begin, *(begin + found.end() for found in SENTENCE_END.finditer(line))]
    ends.append(begin + len(line))
    end = ends[bisect.bisect_right(ends, chat_length, lo=1, key=length) - 1]
    # A mark that is open shows more than the same mark once it is closed.
    while end > 0 and length(end) > chat_length:
        end = markdown.rfind("\n", 0, end)
    return max(0, end)


def read_whole(markdown: str) -> ChatText:
    """Return the chat text of an answer that has ended."""
    chat = ChatText(markdown)
    chat.text(has_ended=True)
    return chat


class Answer:
    """The text a model writes for one turn.

    Written by the turn's task alone; read by replies, parts and live pages.
    """

    def __init__(self, turn: Turn, subscriber: Subscriber) -> None:
        self.turn = turn
        self.subscriber = subscriber
        self.text = ""  # Markdown
        self.chat = ChatText()  # what is shown of it in the chat
        self.writing = secrets.token_hex(4)  # tells live pages if it is written anew
        self.state = "open"  # as in schema.sql
        self.reason: str | None = None  # a kind of ChatError
        self.first_seconds: float | None = None  # from the question to the first text
        # Loop's clock when it was asked: the wall's may jump while it is written.
        asked_ago = max(0.0, time.time() - turn.created_at)
        self.asked_at = asyncio.get_running_loop().time() - asked_ago
        self.task: asyncio.Task | None = None  # writes it
        self.is_resumed = False  # a process before this one asked it, too
        self.is_sent = False  # some of this writing was sent in a reply
        self.seen = 0  # how much of the chat text `newly_shown` has returned
        self.stops: dict[int, int] = {}  # where the part from an offset ends, once sent
        self.turn_came: asyncio.Future[bool] = (
            asyncio.get_running_loop().create_future()
        )
        self.readings: list[Reading] = []  # of replies that are not decided
        self.followers: set[asyncio.Event] = set()  # live pages

    @classmethod
    async def stored(cls, turn: Turn, subscriber: Subscriber) -> "Answer":
        """Return the answer of a turn that ended before.

        A long one is read in a thread: it takes up to a second, and pushes cannot wait.
        """
        answer = cls(turn, subscriber)
        is_long = len(turn.answer) > LONG_CHARS
        read = asyncio.to_thread(read_whole, turn.answer) if is_long else None
        answer.chat = await read if read else read_whole(turn.answer)
        answer.text, answer.state, answer.reason = turn.answer, turn.state, turn.reason
        return answer

    @property
    def is_open(self) -> bool:
        """Say whether it is still being written, or waits to be."""
        return self.state == "open"

    @property
    def age(self) -> float:
        """Return the seconds since the question."""
        return asyncio.get_running_loop().time() - self.asked_at

    def shown(self) -> str:
        """Return its chat text; of a growing answer what will not change any more."""
        return self.chat.text(has_ended=not self.is_open)

    def newly_shown(self, before: int) -> str:
        """Return what the chat text gained since the last call, and some before it."""
        shown = self.shown()
        start, self.seen = max(0, self.seen - 4 * before), len(shown)
        return shown[start:]

    def append(self, delta: str) -> None:
        """Add a delta."""
        delta = ILLEGAL.sub("", delta)
        if not self.text:
            delta = delta.lstrip()
            self.first_seconds = round(self.age, 3)
        self.text += delta
        self.chat.feed(delta)
        # What is shown grows with a line or a sentence, not with every token.
        if self.readings and SENTENCE_SIGN.search(delta):
            self.tell_readings()
        self.wake_followers()

    def replace_text(self, text: str) -> None:
        """Take another text in place of what was written."""
        self.text, self.chat, self.seen = text, ChatText(), 0
        self.chat.feed(text)

    def withhold(self) -> None:
        """Take back what was not sent in a reply."""
        sent = max(self.stops.values(), default=0)
        self.replace_text(self.text[: markdown_length(self.text, sent)])

    def drop_thought(self) -> None:
        """Leave out a thought whose opening tag the server swallowed."""
        if "</think>" in self.text and "<think>" not in self.text and not self.is_sent:
            rest = self.text.partition("</think>")[2].lstrip()
            self.restart()
            self.append(rest)

    def restart(self) -> None:
        """Begin a new writing, after one of which nothing was sent."""
        self.writing = secrets.token_hex(4)
        self.replace_text("")
        for reading in self.readings:
            reading.ready.clear()
        self.wake_followers()

    def begin_anew(self) -> None:
        """Let who waits for a later part of an earlier writing begin again."""
        for reading in self.readings:
            reading.is_anew = reading.is_anew or reading.start > 0
            reading.start = 0

    def finish(self, state: str, reason: str | None = None) -> None:
        """End the writing; everybody who waits learns of it."""
        self.state, self.reason = state, reason
        for reading in self.readings:
            reading.ready.set()
        self.readings.clear()
        self.wake_followers()

    def add_reading(self, reading: "Reading") -> None:
        """Let a reading know when its part is full, or the answer has ended."""
        if not self.is_open:
            reading.ready.set()
            return
        self.readings.append(reading)
        self.tell_readings()

    def tell_readings(self) -> None:
        """Tell those whose part is full."""
        for reading in self.readings:
            if not reading.ready.is_set() and self.is_full(reading.start):
                reading.ready.set()

    def is_full(self, start: int) -> bool:
        """Say whether more is shown from `start` than one reply holds."""
        return size_of(self.shown()[start:]) > REPLY_BYTES

    def wake_followers(self) -> None:
        """Let the live pages look."""
        for news in self.followers:
            news.set()


@dataclass(slots=True)
class Reading:
    """What a reply is made of: the chat text of an answer from an offset on."""

    answer: Answer
    start: int = 0
    part: Part | None = None  # the numbered part, None for the question's own reply
    is_anew: bool = False  # the answer was written again since the part was offered
    ready: asyncio.Event = field(default_factory=asyncio.Event)

    def note_sent(self, reply: Reply) -> None:
        """Keep in memory what a decided reply means for the answer."""
        answer = self.answer
        if reply.stop > self.start:
            answer.is_sent = True
            answer.stops[self.start] = reply.stop
        if reply.early and reply.offered:
            mention = (answer.turn.id, answer.turn.question)
            answer.subscriber.unread[reply.offered.number] = mention
        if reply.sent:
            answer.subscriber.has_read(answer.turn.id)


class Delivery:
    """The attempts of one message, and the one reply that all of them get."""

    def __init__(self, message: Message, subscriber: Subscriber, first: float) -> None:
        self.message = message
        self.subscriber = subscriber
        self.first = first  # loop's clock at the first request, or as reckoned
        self.newest = -1e9  # loop's clock at the newest request
        self.seen = 0  # requests that count as attempts
        self.earlier = 0  # 1: a process before this one saw some, too
        self.fixed: str | None = None  # a reply that no model writes
        self.reading: Reading | None = None  # or what it is made of
        self.is_own = False  # the reading is of the question that this message asked
        self.exact = False  # the fixed reply is a repeat: nothing is added to it
        self.keep = True  # False: nothing about this message is to be stored
        self.ready = asyncio.Event()  # the reply can be decided
        self.reply: Reply | None = None  # as decided
        self.decided = asyncio.Event()
        self.stored: asyncio.Future | None = None  # storing the decided reply
        self.delivered: str | None = None  # newest attempt that took it, or lost

    def arrive(self, now: float, half_attempt: float) -> int:
        """Count a request; return which attempt it is in this process.

        One that comes within half an attempt of the one before is a mere copy.
        """
        if now - self.newest >= half_attempt:
            self.seen += 1
        self.newest = now
        return self.seen

    def answer_with(self, found: str | Reading) -> None:
        """Answer with a fixed text ('' says nothing), or with what a model writes."""
        if isinstance(found, str):
            self.fixed = found
            self.ready.set()
            return
        self.reading, found.ready = found, self.ready
        found.answer.add_reading(found)

    def repeat(self, before: tuple[str, int, str | None], turn_id: int | None) -> None:
        """Answer with the reply that was decided before."""
        content, created, delivered = before
        key, openid = self.message.key, self.message.openid
        self.reply = Reply(key, openid, content, created, turn_id, delivered)
        self.earlier = 1
        self.decided.set()
        self.ready.set()


class MuteGuard:
    """Counts attempts left to run over; WeChat mutes an account that fails too often.

    (接口报警和排查指引: no pushes for one minute; the threshold is not published.)
    """

    def __init__(self, limit: int, seconds: float = 300.0) -> None:
        self.limit = limit
        self.seconds = seconds
        self.charges: collections.deque[float] = collections.deque()

    def charge(self, now: float) -> bool:
        """Charge one attempt; say no, and charge nothing, when that were too many."""
        while self.charges and self.charges[0] <= now - self.seconds:
            self.charges.popleft()
        if len(self.charges) >= self.limit:
            return False
        self.charges.append(now)
        return True


class Answers:
    """All deliveries, answers, subscribers and tasks of the process.

    Open it after the store, and `close` it before.
    """

    def __init__(self, config: Config) -> None:
        self.attempts = config.wechat.attempts
        self.attempt_timeout = config.wechat.attempt_timeout
        self.all_attempts = self.attempt_timeout * config.wechat.attempts
        self.guard = MuteGuard(config.wechat.mute_guard)
        self.slots = asyncio.Semaphore(config.limits.at_once)  # first come first
        self.deliveries: dict[str, Delivery] = {}
        self.answers: dict[int, Answer] = {}  # being written or waiting, by turn
        self.queues: dict[int, collections.deque[Answer]] = {}  # by session, in order
        self.subscribers: weakref.WeakValueDictionary[str, Subscriber] = (
            weakref.WeakValueDictionary()
        )
        self.tasks: set[asyncio.Task] = set()
        self.loop = asyncio.get_running_loop()
        self.opened = self.loop.time()
        self.waits: set[asyncio.Timeout] = set()
        self.closes_at: float | None = None  # loop's clock; set at a shutdown

    # Tasks

    def start(
        self, work: Awaitable[None], name: str, fail: Callable[[], None] = lambda: None
    ) -> asyncio.Task:
        """Run work as a task; if it breaks, `fail` is called, so nobody waits on."""
        task = self.loop.create_task(self.edge(work, name, fail))
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)
        return task

    async def edge(
        self, work: Awaitable[None], name: str, fail: Callable[[], None]
    ) -> None:
        """Await work at the edge of its task."""
        try:
            await work
        except Exception as error:
            is_known = isinstance(error, sqlite3.Error)  # a full or locked disk
            log.error("%s broke off: %s", name, error, exc_info=not is_known)
            fail()

    def shut(self, at: float) -> None:
        """Let all waits end by then, live pages now, and everything else by `close`."""
        self.closes_at = at
        for answer in self.answers.values():
            answer.wake_followers()
        for wait in self.waits:
            if not wait.expired():  # else its task is about to run
                wait.reschedule(min(at, wait.when() or at))

    async def close(self) -> None:
        """Let running answers end until the time given by `shut`; then cancel all."""
        writing = [
            a.task for a in self.answers.values() if a.task and a.turn_came.done()
        ]
        if writing and self.closes_at:
            await asyncio.wait(
                writing, timeout=max(0, self.closes_at - self.loop.time())
            )
        for task in list(self.tasks):
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)

    async def wait_for(self, event: asyncio.Event, until: float) -> bool:
        """Wait for an event; False when `until` or the shutdown came first."""
        if event.is_set():
            return True
        if self.closes_at is not None:
            until = min(until, self.closes_at)
        wait = asyncio.timeout_at(until)
        self.waits.add(wait)
        try:
            async with wait:
                while not event.is_set():  # a restart may have cleared it
                    await event.wait()
        except TimeoutError:
            pass
        finally:
            self.waits.discard(wait)
        return event.is_set()

    def running(self) -> list[Answer]:
        """Return the answers that are being written and have text."""
        return [a for a in self.answers.values() if a.text and a.is_open]

    # Deliveries

    def subscriber(self, openid: str) -> Subscriber:
        """Return the record of a subscriber, a new one if nothing of theirs goes on."""
        found = self.subscribers.get(openid)
        if found is None:
            found = self.subscribers[openid] = Subscriber(openid)
        return found

    def new_delivery(self, message: Message, now: float) -> Delivery:
        """Return the delivery of a message key that was not seen lately."""
        first = now
        if now - self.opened < 2 * self.attempt_timeout:
            # Attempts before this one may have met nobody: reckon from CreateTime, a
            # whole second that began up to one second before.
            age = time.time() - message.created - 1
            first = now - max(0, age)
        delivery = Delivery(message, self.subscriber(message.openid), first)
        self.deliveries[message.key] = delivery
        # Long after the last attempt a copy is answered from the store.
        self.loop.call_later(
            4 * self.all_attempts, self.deliveries.pop, message.key, None
        )
        return delivery

    def is_last_chance(self, delivery: Delivery, attempt: int, arrived: float) -> bool:
        """Say whether WeChat will not ask again after this request."""
        late = self.all_attempts - 1.5 * self.attempt_timeout
        count = attempt + delivery.earlier
        return count >= self.attempts or arrived - delivery.first > late

    # Answers

    def add_answer(self, answer: Answer) -> None:
        """Queue an answer in its session; it is its turn if nobody is before."""
        self.answers[answer.turn.id] = answer
        answer.subscriber.answers.append(answer)
        queue = self.queues.setdefault(answer.turn.session_id, collections.deque())
        queue.append(answer)
        if len(queue) == 1:
            answer.turn_came.set_result(True)

    def remove_answer(self, answer: Answer) -> None:
        """Take an ended answer out; the next question of its session begins."""
        self.answers.pop(answer.turn.id, None)
        if answer in answer.subscriber.answers:
            answer.subscriber.answers.remove(answer)
        queue = self.queues.get(answer.turn.session_id)
        if queue and answer in queue:
            queue.remove(answer)
        if queue and not queue[0].turn_came.done():
            queue[0].turn_came.set_result(True)
        if not queue:
            self.queues.pop(answer.turn.session_id, None)

    def close_session(self, session_id: int) -> None:
        """Let the queued questions of an ended session know that they are not asked."""
        for answer in self.queues.get(session_id, ()):
            if not answer.turn_came.done():
                answer.turn_came.set_result(False)


# ---------------------------------------------------------------------------
# 9. Services
# ---------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Services:
    """The long-lived parts of the process, built once by the application."""

    config: Config
    store: Store
    chat: dict[str, ChatClient]  # by assistant
    pictures: Pictures
    answers: Answers
    cipher: Cipher | None  # in safe mode
    blocked: BlockedWords

    @property
    def texts(self) -> Texts:
        """Return the lines a subscriber reads."""
        return self.config.texts

    def page_link(self, turn: Turn, words: str) -> str:
        """Return a link to an answer's page."""
        return web_link(words, f"{self.config.public_url}/a/{turn.link_key}")


@dataclass(frozen=True, slots=True)
class Visit:
    """One message being answered: who came, and to which session."""

    services: Services
    delivery: Delivery
    session: Session | None  # open, and not idle for too long
    lapsed: Session | None  # open in the store, but it ran out
    pictures: str  # JSON list of URLs that wait for a question

    @property
    def openid(self) -> str:
        """Return who sent the message."""
        return self.delivery.message.openid

    @property
    def texts(self) -> Texts:
        """Return the lines a subscriber reads."""
        return self.services.config.texts


# ---------------------------------------------------------------------------
# 10. Commands
#
# A command is one coroutine: a visit in, the reply's text out. Its name in COMMANDS and
# its line in `texts.help` are all there is to it. Assistants are commands too: `/NAME`
# opens a session with it.
# ---------------------------------------------------------------------------

Command = Callable[[Visit], Awaitable[str]]
COMMANDS: dict[str, Command] = {}


def command(name: str) -> Callable[[Command], Command]:
    """Enter a coroutine as the command `/name`."""

    def enter(function: Command) -> Command:
        COMMANDS[name] = function
        return function

    return enter


def folded(text: str) -> str:
    """Return text as commands are compared: full-width forms and case do not matter."""
    return unicodedata.normalize("NFKC", text).strip().casefold()


def find_command(text: str) -> Command | None:
    """Return the command that a whole text is."""
    name = folded(text)
    return COMMANDS.get(name[1:].strip()) if name.startswith("/") else None


def find_assistant(text: str, names: typing.Iterable[str]) -> tuple[str, str] | None:
    """Return the assistant a text opens and the question behind, or None.

    `/chatgpt 问题` and `/chatgpt问题` are the same; of two names the longer one counts.
    """
    text = text.strip()
    if not folded(text[:1]).startswith("/"):
        return None
    for name in sorted(names, key=len, reverse=True):
        wanted = "/" + folded(name)
        for end in range(1, min(len(text), 2 * len(wanted)) + 1):
            if folded(text[:end]) == wanted:
                return name, text[end:].strip()
    return None


def check_commands(config: Config) -> None:
    """Raise ConfigError for an assistant named like a command, or a reply too long."""
    replies, names = config.replies, [*config.assistants, *COMMANDS]
    for text in (replies.subscribe, replies.outside, *replies.keywords.values()):
        size = size_of(with_taps(text, names))
        wanted = f"at most {REPLY_BYTES} bytes with taps"
        demand(size <= REPLY_BYTES, "replies", f"{size} bytes", wanted)
    for name in config.assistants:
        is_free = folded(name) not in COMMANDS
        demand(is_free, f"assistants.{name}", name, "a name that is no command's")


def tappable(visit: Visit, text: str) -> str:
    """Return one of our own texts with the commands in it as taps."""
    return with_taps(text, [*visit.services.config.assistants, *COMMANDS])


async def open_session(visit: Visit, assistant: str) -> Session:
    """Open a session; one that was open ends, and what is queued there is not asked."""
    answers = visit.services.answers
    session = await visit.services.store.start_session(
        visit.openid, assistant, time.time()
    )
    for answer in visit.delivery.subscriber.answers:
        answers.close_session(answer.turn.session_id)
    return session


@command("stop")
async def stop(visit: Visit) -> str:
    """End the session: what is being written goes on, what is queued is not asked."""
    if visit.session is None:
        return visit.texts.no_session.format(tap=tap_link("/chatgpt"))
    await visit.services.store.end_session(visit.session.id, time.time(), None)
    visit.services.answers.close_session(visit.session.id)
    return visit.texts.stopped.format(tap=tap_link(f"/{visit.session.assistant}"))


@command("clear")
async def clear(visit: Visit) -> str:
    """End the session and open a new one with the same assistant."""
    if visit.session is None:
        return visit.texts.no_session.format(tap=tap_link("/chatgpt"))
    await open_session(visit, visit.session.assistant)
    return visit.texts.cleared


@command("history")
async def history(visit: Visit) -> str:
    """Return a link to the subscriber's history; the one before ends."""
    minutes = visit.services.config.history.history_minutes
    until = time.time() + minutes * 60
    key = await visit.services.store.add_history_link(visit.openid, until)
    url = f"{visit.services.config.public_url}/h/{key}"
    page = web_link(visit.texts.word_history, url)
    return visit.texts.history.format(minutes=f"{minutes:g}", page=page)


@command("help")
async def show_help(visit: Visit) -> str:
    """List the assistants and commands."""
    line, names = visit.texts.help_assistant, visit.services.config.assistants
    lines = [line.format(tap=tap_link(f"/{name}"), assistant=name) for name in names]
    text = visit.texts.help.format(assistants="\n".join(lines))
    return tappable(visit, text)


@command("forget")
async def forget(visit: Visit) -> str:
    """Ask for the confirmation without which nothing is deleted."""
    await visit.services.store.ask_forget(visit.openid, time.time())
    tap = tap_link(visit.texts.word_forget)
    return visit.texts.forget_ask.format(minutes=f"{FORGET_SECONDS / 60:g}", tap=tap)


async def forget_all(visit: Visit) -> None:
    """Delete a subscriber's data, end what runs, and keep nothing of this message."""
    answers, subscriber = visit.services.answers, visit.delivery.subscriber
    for delivery in answers.deliveries.values():
        delivery.keep = delivery.keep and delivery.subscriber is not subscriber
    for answer in list(subscriber.answers):
        answer.finish("ended")
        answer.task.cancel()
        answers.remove_answer(answer)
    await visit.services.store.forget(visit.openid)
    subscriber.parts = 0
    subscriber.unread.clear()
    subscriber.offers.clear()


async def confirm_forget(visit: Visit) -> str | None:
    """Delete all about the sender; None when nobody asked for it in the last day."""
    asked_at = await visit.services.store.forget_asked_at(visit.openid)
    if not asked_at:
        return None
    if time.time() - asked_at > FORGET_SECONDS:
        return visit.texts.forget_late
    await forget_all(visit)
    return visit.texts.forgotten


# ---------------------------------------------------------------------------
# 11. The path of a message
#
# converse writes the answer of one question, in the question's own task. write_answer
# finds out, in the message's own task, what answers it. reply_to is what a request
# does: wait, decide, hand out.
# ---------------------------------------------------------------------------


def words_of(texts: Texts, turn: Turn) -> str:
    """Return a question without the marks of its pictures."""
    return turn.question.removeprefix(
        texts.word_picture * len(json.loads(turn.pictures or "[]"))
    )


async def question_content(services: Services, turn: Turn) -> str | list[dict]:
    """Return a question as the model gets it, with its pictures; raise ChatError."""
    urls = json.loads(turn.pictures or "[]")
    if not urls:
        return turn.question
    pictures = await asyncio.gather(*map(services.pictures.fetch, urls))
    content: list[dict] = [{"type": "text", "text": words_of(services.texts, turn)}]
    for url in pictures:
        content.append(
            {"type": "image_url", "image_url": {"url": url, "detail": "low"}}
        )
    return content


async def chat_messages(services: Services, turn: Turn) -> list[dict]:
    """Return what the model gets: system prompt, the session so far, the question."""
    prompt = services.config.assistants[turn.assistant].system_prompt
    messages = [{"role": "system", "content": prompt}] if prompt else []
    chars = services.config.session.context_chars
    for question, answer in await services.store.history(turn, chars):
        messages.append({"role": "user", "content": question})
        messages.append({"role": "assistant", "content": answer})
    content = await question_content(services, turn)
    return [*messages, {"role": "user", "content": content}]


SHOWN_ADDRESS = re.compile("（[!-~]{1,2000}）")


def show(answer: Answer, guard: WordGuard, delta: str, is_end: bool = False) -> None:
    """Append what of a stream may be shown; raise ChatError for a blocked word.

    Links and tags part a word in the Markdown that is whole in the chat: so what is
    shown is looked through as well, before anybody who waits can be told.
    """
    text, is_blocked = guard.feed(delta, is_end)
    if text and not is_blocked:
        answer.append(text)
    if text and not is_blocked and guard.blocked.words:
        shown = answer.newly_shown(guard.blocked.longest)
        on_page = SHOWN_ADDRESS.sub("", shown)  # where a link shows its label alone
        is_blocked = guard.blocked.are_in(shown) or guard.blocked.are_in(on_page)
    if is_blocked:
        raise ChatError("blocked", "a blocked word in the answer")


async def begin_anew(services: Services, answer: Answer) -> None:
    """Let what was not sent of an earlier process's writing begin at the start."""
    await services.store.begin_anew(answer.turn.id)
    answer.begin_anew()


async def write_text(
    services: Services, answer: Answer, stream: AsyncGenerator[str | Ending, None]
) -> Ending:
    """Append what the model streams; return the Ending, or raise ChatError."""
    guard = WordGuard(services.blocked)
    ending = Ending("length", "", None, None)  # of an answer that goes on for ever
    async with contextlib.aclosing(stream):
        async for item in stream:
            if isinstance(item, Ending):
                ending = item
                break
            if answer.is_resumed and not answer.text:  # before its text is seen
                await begin_anew(services, answer)
            show(answer, guard, item[: ANSWER_CHARS - len(answer.text)])
            if len(answer.text) >= ANSWER_CHARS:
                break
    show(answer, guard, "", is_end=True)
    if ending.finish_reason in ("content_filter", "sensitive"):
        if not answer.is_sent:
            answer.restart()  # withdrawn
        raise ChatError("refused", f"finish_reason {ending.finish_reason}")
    answer.drop_thought()
    if not answer.text.strip():
        raise ChatError("empty", f"finish_reason {ending.finish_reason}", True)
    return ending


def shortened(messages: list[dict], is_last: bool) -> list[dict]:
    """Return messages without the older half of the conversation, at last all of it."""
    head = [m for m in messages if m["role"] == "system"]
    rest = messages[len(head) :]
    begin = len(rest) if is_last else (len(rest) // 4 + 1) * 2
    return head + rest[min(begin, len(rest) - 1) :]


async def ask_model(services: Services, answer: Answer, messages: list[dict]) -> Ending:
    """Write the answer, up to twice again if that may help; raise ChatError."""
    client = services.chat[answer.turn.assistant]
    end = services.answers.loop.time() + client.settings.timeout
    for pause in (*RETRY_PAUSES, None):
        try:
            return await write_text(services, answer, client.stream(messages, end))
        except ChatError as error:
            is_last, fewer = pause == RETRY_PAUSES[-1], messages
            if error.kind == "long":
                fewer = shortened(messages, is_last)
            if len(fewer) < len(messages):
                error.passing, error.after = True, 0.0
            if not error.passing or answer.is_sent or pause is None:
                raise
            pause *= random.uniform(0.75, 1)
            pause = pause if error.after is None else error.after
            if services.answers.loop.time() + pause > end:
                raise
            log.warning("%s asked again after %s", answer.turn.name, error)
            messages = fewer
        answer.restart()
        await asyncio.sleep(pause)
    raise AssertionError("the last try returns or raises")


async def store_text_so_far(services: Services, answers: list[Answer]) -> None:
    """Store the text of unfinished answers; a failure costs only that."""
    texts = [(answer.turn.id, answer.text) for answer in answers if answer.text]
    try:
        if texts:
            await services.store.save_texts(texts)
    except sqlite3.Error as error:
        log.error("text so far not stored: %s", error)


async def store_end(services: Services, answer: Answer, ending: Ending | None) -> None:
    """Store how an answer ended, and log it."""
    now, seconds = time.time(), answer.age
    columns: dict[str, object] = {"state": answer.state, "reason": answer.reason}
    columns["answer"] = answer.text
    # An unsent part of what is done is sure to have text; the tap that asks a failed
    # question again is a part behind the end.
    is_done = answer.state == "done"
    columns["chat_chars"] = None if is_done else len(answer.shown())
    columns |= {"finished_at": now, "seconds": round(seconds, 3)}
    for name in ("model", "tokens_in", "tokens_out"):
        columns[name] = getattr(ending, name, None)
    columns["first_seconds"] = answer.first_seconds
    while True:  # readers have the answer already; what is next needs it stored
        try:
            await services.store.finish_turn(answer.turn.id, columns)
            break
        except sqlite3.Error as error:
            log.error("%s not stored yet: %s", answer.turn.name, error)
            await asyncio.sleep(STORE_SECONDS)
    tokens = f"{columns['tokens_in']} in {columns['tokens_out']} out"
    state = f"{answer.state} {answer.reason or ''}".strip()
    log.info("%s %s after %.1f s, tokens %s", answer.turn.name, state, seconds, tokens)


def failed_state(answer: Answer, kind: str) -> str:
    """Return the state of an answer that did not end well."""
    if kind == "blocked":
        return "blocked"
    return "broken" if answer.text else "failed"


async def converse(services: Services, answer: Answer) -> None:
    """Answer one question: wait for its turn, ask the model, store the end."""
    turn, answers = answer.turn, services.answers
    ending: Ending | None = None
    try:
        if not await answer.turn_came:
            answer.finish("ended")
            return
        async with answers.slots:
            messages = await chat_messages(services, turn)
            if not turn.asked or answer.is_resumed:
                await services.store.count_asking(turn.id)
            ending = await ask_model(services, answer, messages)
        answer.finish("cut" if ending.finish_reason == "length" else "done")
    except ChatError as error:
        level = logging.ERROR if error.kind == "setup" else logging.WARNING
        log.log(level, "%s failed: %s", turn.name, error)
        if error.kind == "blocked":
            answer.withhold()
        elif turn.answer and not answer.text:  # better what an earlier process wrote
            answer.replace_text(turn.answer)
        answer.finish(failed_state(answer, error.kind), error.kind)
    finally:
        if answer.is_open:  # cancelled: the next process goes on from what is stored
            await store_text_so_far(services, [answer])
        else:
            await store_end(services, answer, ending)
            answers.remove_answer(answer)


async def end_unwritten(services: Services, answer: Answer) -> None:
    """Store the end of an answer that nobody writes; readers have it until then."""
    await store_end(services, answer, None)
    services.answers.remove_answer(answer)


def start_writing(services: Services, answer: Answer) -> None:
    """Queue an answer and start the task that writes it."""

    def fail() -> None:
        if answer.is_open:
            answer.finish(failed_state(answer, "trouble"), "trouble")
            services.answers.start(end_unwritten(services, answer), answer.turn.name)
        else:
            services.answers.remove_answer(answer)

    services.answers.add_answer(answer)
    work = converse(services, answer)
    answer.task = services.answers.start(work, answer.turn.name, fail)


async def resume_answers(services: Services) -> None:
    """Take up the questions that the process before this one left unfinished."""
    now = time.time()
    turns, open_sessions = await services.store.open_turns()
    for turn in turns:
        answer = Answer(turn, services.answers.subscriber(turn.openid))
        answer.is_resumed = turn.asked > 0
        if turn.asked >= ASKINGS or now - turn.created_at > RESUME_SECONDS:
            answer.replace_text(turn.answer)
            answer.finish("broken" if turn.answer else "failed", "given_up")
        elif not turn.asked and turn.session_id not in open_sessions:
            answer.finish("ended")
        if answer.is_open:
            start_writing(services, answer)
            log.info("%s resumed, asked %d times before", turn.name, turn.asked)
        else:  # beside the start, which a full disk must not stop
            services.answers.answers[turn.id] = answer
            services.answers.start(end_unwritten(services, answer), turn.name)


# Finding out what answers a message

Found = str | Reading  # a fixed text, or something to read; '' says nothing


async def reading_of(
    visit: Visit, turn_id: int, part: Part | None = None
) -> Reading | None:
    """Return a reading of a turn, being written or stored, from a part on.

    None if the turn was deleted since its id was read.
    """
    answer = visit.services.answers.answers.get(turn_id)
    if answer is None:
        turn = await visit.services.store.turn(turn_id)
        if turn is None:
            return None
        answer = await Answer.stored(turn, visit.delivery.subscriber)
    if part is None:
        return Reading(answer)
    return Reading(answer, part.start, part, part.is_anew)


async def continue_turn(visit: Visit, turn_id: int) -> Reading | None:
    """Return the unsent part of a turn, numbered now if it was not offered before.

    None if the turn was deleted meanwhile.
    """
    part = await visit.services.store.unsent_part(turn_id)
    if part is None:
        part = Part(visit.delivery.subscriber.number_of(turn_id, 0), turn_id, 0)
    return await reading_of(visit, turn_id, part)


def refuse_question(visit: Visit, question: str) -> str:
    """Return why a question is not accepted, '' if it is; refusals cost nothing."""
    texts, limits = visit.texts, visit.services.config.limits
    waiting, blocked = len(visit.delivery.subscriber.answers), visit.services.blocked
    try:
        blocked.refresh()
    except (OSError, UnicodeError) as error:
        log.error("blocked words not read, the last ones stay in force: %s", error)
    if limits.allow and visit.openid not in limits.allow:
        return texts.not_allowed
    if len(question) > limits.question_chars:
        return texts.too_long.format(count=len(question), most=limits.question_chars)
    if waiting >= limits.waiting:
        return texts.too_many.format(count=waiting)
    return texts.blocked_question if blocked.are_in(question) else ""


async def refuse_for_today(visit: Visit, now: float) -> str:
    """Return which of the day's limits is used up."""
    most = visit.services.config.limits.questions_per_day
    asked = await visit.services.store.questions_of_day(visit.openid, now)
    if most and asked >= most:
        return visit.texts.day_over.format(count=most)
    return visit.texts.all_over


async def accept_question(
    visit: Visit, session: Session, question: str, pictures: str | None = None
) -> Found:
    """Store a question and start its answer; or say why not."""
    services, subscriber, now = visit.services, visit.delivery.subscriber, time.time()
    for answer in subscriber.answers:
        is_same = words_of(visit.texts, answer.turn) == question
        is_same = is_same and answer.turn.session_id == session.id
        # With a picture that came since, the same words are a new question.
        if is_same and answer.age < REPEAT_SECONDS and visit.pictures == "[]":
            if reading := await continue_turn(visit, answer.turn.id):
                return reading
    if refusal := refuse_question(visit, question):
        await services.store.touch_session(session.id, now)
        return refusal
    pictures = visit.pictures if pictures is None else pictures
    pictures = None if pictures == "[]" else pictures
    if pictures:
        question = visit.texts.word_picture * len(json.loads(pictures)) + question
    turn = await services.store.add_turn(
        Turn(
            id=0,
            session_id=session.id,
            openid=visit.openid,
            msg_key=visit.delivery.message.key,
            link_key=secrets.token_urlsafe(16),
            question=question,
            pictures=pictures,
            created_at=now,
            asked=0 if services.answers.queues.get(session.id) else 1,
            assistant=session.assistant,
        ),
        services.config.limits.questions_per_day,
        services.config.limits.all_per_day,
    )
    if turn is None:
        return await refuse_for_today(visit, now)
    answer = Answer(turn, subscriber)
    start_writing(services, answer)
    visit.delivery.is_own = True
    log.info("%s accepted, %d waiting", turn.name, len(subscriber.answers))
    return Reading(answer)


async def continue_part(visit: Visit, number: int) -> Found:
    """Return part N of this subscriber: the very text again if it was sent before."""
    part = await visit.services.store.part(visit.openid, number)
    if part and part.reply is not None:
        visit.delivery.exact = True
        return part.reply
    reading = await reading_of(visit, part.turn_id, part) if part else None
    return reading or visit.texts.no_part.format(number=number)


async def continue_oldest(visit: Visit) -> Found | None:
    """Return the oldest part not sent yet, of the session or of the last hour."""
    session_id = visit.session.id if visit.session else None
    since = time.time() - RECENT_SECONDS
    store = visit.services.store
    turn_id = await store.oldest_unsent(visit.openid, session_id, since)
    return None if turn_id is None else await continue_turn(visit, turn_id)


async def retry(visit: Visit, number: str | None) -> Found | None:
    """Ask a failed question again: the one behind a tap, or the newest."""
    store = visit.services.store
    if number:
        part = await store.part(visit.openid, int(number))
        turn = await store.turn(part.turn_id) if part else None
    else:
        turn = await store.newest_failed(visit.openid, time.time() - RECENT_SECONDS)
    if turn is None or turn.assistant not in visit.services.config.assistants:
        return visit.texts.no_retry if number else None
    session = visit.session or await open_session(visit, turn.assistant)
    words = words_of(visit.texts, turn)
    return await accept_question(visit, session, words, turn.pictures or "[]")


async def resume_session(visit: Visit) -> Found | None:
    """Open the session that ran out again, and ask the text that came too late."""
    store, since = visit.services.store, time.time() - LAPSE_SECONDS
    session = await store.lapsed_session(visit.openid, since)
    if session is None or session.lapsed_text is None:
        return None
    if session.assistant not in visit.services.config.assistants:
        return None
    await store.reopen_session(session.id, time.time())
    return await accept_question(visit, session, session.lapsed_text)


async def answer_tap(visit: Visit, text: str) -> Found | None:
    """Return what answers a tap, which may be typed, too; None when it is none now."""
    words, again = folded(text), folded(visit.texts.word_retry)
    pattern = rf"(继续|{re.escape(again)})\s*([0-9]{{1,9}})?"
    if match := re.fullmatch(pattern, words):
        if match[1] == again:
            return await retry(visit, match[2])
        if match[2]:
            return await continue_part(visit, int(match[2]))
        return await continue_oldest(visit)
    if words == folded(visit.texts.word_forget):
        return await confirm_forget(visit)
    if words == folded(visit.texts.word_resume):
        return await resume_session(visit)
    return None


async def answer_command(visit: Visit, text: str) -> Found | None:
    """Return what answers a text that is not a question; None for one that may be."""
    if function := find_command(text):
        log.info("%s command %s", visit.delivery.message.name, function.__name__)
        return await function(visit)
    if visit.session and (text in STICKER_TEXTS or not text):
        return visit.texts.unsupported
    return await answer_tap(visit, text)


async def open_and_ask(visit: Visit, assistant: str, question: str) -> Found:
    """Open a session unless one with this assistant is open; ask what came along."""
    session, allow = visit.session, visit.services.config.limits.allow
    if allow and visit.openid not in allow:
        return visit.texts.not_allowed
    is_new = False
    if session is None or session.assistant != assistant:
        session, is_new = await open_session(visit, assistant), True
    if question:
        return await accept_question(visit, session, question)
    if not is_new:
        await visit.services.store.touch_session(session.id, time.time())
        return visit.texts.still_open
    minutes = f"{round(visit.services.config.session.ttl / 60, 1):g}"
    text = visit.texts.opened.format(assistant=assistant, minutes=minutes)
    return tappable(visit, text)


async def answer_outside(visit: Visit, text: str) -> Found:
    """Return what answers a text outside a session; mostly nothing."""
    config, lapsed = visit.services.config, visit.lapsed
    if text in config.replies.keywords:
        return tappable(visit, config.replies.keywords[text])
    if not text or text in STICKER_TEXTS:
        return ""
    if config.session.auto_open:
        return await open_and_ask(visit, next(iter(config.assistants)), text)
    if lapsed:  # it ran out, and nobody was told yet
        await visit.services.store.end_session(lapsed.id, time.time(), text)
        if time.time() - lapsed.last_at < LAPSE_SECONDS:
            tap = tap_link(visit.texts.word_resume)
            return visit.texts.session_lapsed.format(tap=tap, question=excerpt(text))
    return tappable(visit, config.replies.outside)


async def answer_text(visit: Visit) -> Found:
    """Return what answers a text: a command, a part, a question, or nothing."""
    text, session = visit.delivery.message.content.strip(), visit.session
    names = () if find_command(text) else visit.services.config.assistants
    if opened := find_assistant(text, names):
        return await open_and_ask(visit, *opened)
    found = await answer_command(visit, text)
    if found is None and session:
        return await accept_question(visit, session, text)
    if found is None:
        return await answer_outside(visit, text)
    if session:
        await visit.services.store.touch_session(session.id, time.time())
    return found


async def find_answer(visit: Visit) -> Found:
    """Return what answers a message that has no reply yet."""
    message = visit.delivery.message
    is_denied = visit.openid in visit.services.config.limits.deny
    if is_denied and message.event != "unsubscribe":
        return ""
    match message.msg_type, message.event:
        case "text", _:
            return await answer_text(visit)
        case "event", "subscribe":
            return tappable(visit, visit.services.config.replies.subscribe)
        case "event", "unsubscribe":
            await forget_all(visit)
            return ""
        case "event", _:
            return ""
    if visit.session is None:
        return ""
    store, now = visit.services.store, time.time()
    await store.touch_session(visit.session.id, now)
    if message.msg_type != "image" or not message.picture_url:
        return visit.texts.unsupported
    await store.add_picture(visit.openid, message.picture_url, now)
    return visit.texts.picture_kept.format(tap=tap_link(visit.texts.word_describe))


async def join_turn(visit: Visit, turn_id: int) -> Found:
    """Return a reading of the turn that this message asked longer ago.

    Nothing is said of one that was deleted meanwhile: asking it again would store it.
    """
    delivery, reading = visit.delivery, await reading_of(visit, turn_id)
    if reading is None:
        return ""
    delivery.is_own, delivery.earlier = True, 1
    delivery.first = min(delivery.first, reading.answer.asked_at)
    return reading


async def write_answer(services: Services, delivery: Delivery) -> None:
    """Find out what answers a message, one message of a subscriber after the other."""
    message, subscriber = delivery.message, delivery.subscriber
    async with subscriber.lock:
        now = time.time()
        memory = await services.store.recall(message.key, message.openid, now)
        subscriber.remember(memory)
        session, lapsed = memory.session, None
        if session and session.assistant not in services.config.assistants:
            session = None  # it was taken out of the settings
        idle = now - session.last_at if session else 0
        if session and not session.is_busy and idle > services.config.session.ttl:
            session, lapsed = None, session
        visit = Visit(services, delivery, session, lapsed, memory.pictures)
        if memory.reply:
            delivery.repeat(memory.reply, memory.turn_id)
            return
        if memory.turn_id is not None:
            found = await join_turn(visit, memory.turn_id)
        else:
            found = await find_answer(visit)
    delivery.answer_with(found)


# Deciding a reply


@dataclass(frozen=True, slots=True)
class Draft:
    """The text of a reply that reads an answer."""

    content: str
    stop: int  # offset at which the next part begins
    carries: bool  # it has text of the answer
    offered: Part | None = None  # what its tap asks for
    early: bool = False  # neither complete nor a full part


def continue_tap(number: int) -> str:
    """Return the tap for a numbered part; its visible words may be typed as well."""
    return tap_link(f"继续{number}")


def ending_words(texts: Texts, state: str, reason: str | None, number: int) -> str:
    """Return what is said after the text of an ended answer; '' if it ended well.

    The tap for the retry carries a part's number.
    """
    fixed = {"done": "", "cut": texts.cut_short, "ended": texts.session_ended}
    fixed["blocked"] = texts.blocked_answer
    if state in fixed:
        return fixed[state]
    name = reason or "empty"
    if state == "broken" and name != "given_up":
        name = "broken"
    tap = tap_link(texts.word_retry, f"{texts.word_retry}{number}")
    return getattr(texts, f"failed_{name}").format(tap=tap)


def word_of_patience(services: Services, answer: Answer, number: int) -> str:
    """Return what is said while nothing can be shown yet."""
    texts, turn = services.texts, answer.turn
    text = texts.thinking if answer.turn_came.done() else texts.queued
    return text.format(
        question=excerpt(turn.question),
        seconds=round(answer.age),
        tap=continue_tap(number),
        page=services.page_link(turn, texts.word_page),
    )


def draft_ending(
    services: Services, reading: Reading, subscriber: Subscriber, head: str
) -> Draft:
    """Return the reply with all that is left of an ended answer, of any size."""
    answer, shown = reading.answer, reading.answer.shown()
    text, stop = harmless(shown[reading.start :].strip("\n")), len(shown)
    words, part = ending_words(services.texts, answer.state, answer.reason, 0), None
    if "msgmenucontent" in words:  # the retry finds the question by a part's number
        part = Part(subscriber.number_of(answer.turn.id, stop), answer.turn.id, stop)
        words = ending_words(services.texts, answer.state, answer.reason, part.number)
    if not text and not words:
        return Draft(services.texts.no_more, stop, True)
    body = text and f"{head}{text}{services.config.replies.label_line}"
    content = "\n\n".join(filter(None, (body, words)))
    if text and has_more_on_page(answer.text):
        link = "\n" + services.page_link(answer.turn, services.texts.word_typeset)
        content += link if size_of(content + link) <= REPLY_BYTES else ""
    return Draft(content, stop, bool(text), part)


def cut_reply(text: str, room: int) -> int:
    """Return how much of a chat text goes into `room` bytes once it is harmless."""
    cut = cut_text(text, room)
    while (over := size_of(harmless(text[:cut])) - room) > 0:
        cut = cut_text(text, size_of(text[:cut]) - over)
    return cut


def tail_of(services: Services, turn: Turn, number: int) -> str:
    """Return the lines under a part that has another one behind it."""
    texts = services.texts
    page = services.page_link(turn, texts.word_page)
    more = texts.more.format(tap=continue_tap(number), page=page)
    return f"{services.config.replies.label_line}\n\n{more}"


def draft_reply(services: Services, reading: Reading, subscriber: Subscriber) -> Draft:
    """Return the reply that shows an answer from where it is read."""
    answer, begin, turn = reading.answer, reading.start, reading.answer.turn
    head = services.texts.anew + "\n" if reading.is_anew else ""
    if not answer.is_open:
        ended = draft_ending(services, reading, subscriber, head)
        if size_of(ended.content) <= REPLY_BYTES:
            return ended
    longest = tail_of(services, turn, (subscriber.parts or 0) + 1)
    is_full = not answer.is_open or answer.is_full(begin)
    shown, room = answer.shown(), REPLY_BYTES - size_of(head + longest)
    # Where a part ends is fixed once, for all who read it.
    stop = answer.stops.get(begin) or begin + cut_reply(shown[begin:], room)
    text = harmless(shown[begin:stop].strip("\n"))
    if not text and reading.part:
        words = word_of_patience(services, answer, reading.part.number)
        return Draft(words, begin, False, reading.part, early=True)
    part = Part(subscriber.number_of(turn.id, stop), turn.id, stop)
    if not text:
        words = word_of_patience(services, answer, part.number)
        return Draft(words, begin, False, part, early=True)
    text = head + text + tail_of(services, turn, part.number)
    return Draft(text, stop, True, part, early=not is_full)


def mention_unread(
    services: Services, delivery: Delivery, content: str
) -> tuple[str, int | None]:
    """Return a reply with an unread answer named under it, and that answer's turn."""
    if not content or delivery.exact:
        return content, None
    own = delivery.reading.answer.turn.id if delivery.reading else None
    for number, (turn_id, question) in delivery.subscriber.unread.items():
        if turn_id == own or turn_id in services.answers.answers:
            continue
        tap = continue_tap(number)
        line = services.texts.unread.format(question=excerpt(question), tap=tap)
        if size_of(f"{content}\n\n{line}") <= REPLY_BYTES:
            return f"{content}\n\n{line}", turn_id
    return content, None


def compose(services: Services, delivery: Delivery, attempt: int) -> Reply:
    """Return the reply that a message gets now."""
    message, reading, now = delivery.message, delivery.reading, int(time.time())
    if reading is None:
        text = services.texts.trouble if delivery.fixed is None else delivery.fixed
        content, read = mention_unread(services, delivery, text)
        return Reply(message.key, message.openid, content, now, read=read)
    draft = draft_reply(services, reading, delivery.subscriber)
    content, read = mention_unread(services, delivery, draft.content)
    is_own, has_ended = delivery.is_own, not reading.answer.is_open
    return Reply(
        message.key,
        message.openid,
        content,
        now,
        turn_id=reading.answer.turn.id if is_own else None,
        delivered=str(attempt) if is_own and draft.carries else None,
        early=is_own and draft.early,
        offered=draft.offered,
        sent=reading.part if has_ended or draft.carries else None,
        stop=draft.stop,
        read=read,
    )


def note_stored(delivery: Delivery, stored: asyncio.Future) -> None:
    """Log a reply that could not be stored."""
    if error := stored.exception():
        log.error("%s reply not stored: %s", delivery.message.name, error)


def decide(services: Services, delivery: Delivery, attempt: int) -> None:
    """Fix the reply of a message for all its copies, and begin to store it."""
    reply = delivery.reply = compose(services, delivery, attempt)
    delivery.decided.set()
    delivery.ready.set()  # open copies wait for this one
    if delivery.reading:
        delivery.reading.note_sent(reply)
    if reply.read is not None:
        delivery.subscriber.has_read(reply.read)
    if reply.content and delivery.keep:
        delivery.stored = services.store.save_reply(reply)
        delivery.stored.add_done_callback(functools.partial(note_stored, delivery))


# What a request does


@dataclass(frozen=True, slots=True)
class Attempt:
    """One request of WeChat for one message."""

    delivery: Delivery
    number: int
    arrived: float  # loop's clock

    @property
    def name(self) -> str:
        """Return how the log names it."""
        return f"{self.delivery.message.name} attempt={self.number}"


def take_attempt(services: Services, message: Message, arrived: float) -> Attempt:
    """Return the attempt that a request is; the first one starts the work."""
    answers = services.answers
    delivery = answers.deliveries.get(message.key)
    if delivery is None:
        delivery = answers.new_delivery(message, arrived)
        work = write_answer(services, delivery)
        trouble = services.texts.trouble
        answers.start(work, message.name, lambda: delivery.answer_with(trouble))
    number = delivery.arrive(arrived, answers.attempt_timeout / 2)
    return Attempt(delivery, number, arrived)


async def reply_to(services: Services, attempt: Attempt) -> Reply | None:
    """Return the reply for this request, or None: WeChat is to ask again.

    Decided while this request waits, as soon as the answer is complete or its first
    part full; or with what there is when nobody will ask again.
    """
    answers, wechat = services.answers, services.config.wechat
    delivery, over = attempt.delivery, attempt.arrived + wechat.attempt_timeout
    is_ready = delivery.reply or await answers.wait_for(
        delivery.ready, over - wechat.margin
    )
    if not is_ready:
        last = answers.is_last_chance(delivery, attempt.number, attempt.arrived)
        # Charged now: a burst of waits charged when WeChat hangs up would all pass.
        if not last and answers.guard.charge(answers.loop.time()):
            in_time = await answers.wait_for(delivery.ready, over)
            # Later than that WeChat does not read this line any more, but an answer
            # here would end its retries: hold it, and say nothing.
            held = in_time or await answers.wait_for(
                delivery.decided, over + HOLD_SECONDS
            )
            if not held:
                return None
    if delivery.reply is None:
        decide(services, delivery, attempt.number + delivery.earlier)
    if delivery.stored:
        left = over - wechat.margin / 2 - answers.loop.time()
        await asyncio.wait({delivery.stored}, timeout=max(0, left))
    return delivery.reply


def note_delivery(services: Services, attempt: Attempt, is_taken: bool) -> None:
    """Correct how an answer was delivered: the newest line that took it counts.

    The reply was stored as delivered by the attempt that decided it.
    """
    delivery, reply = attempt.delivery, attempt.delivery.reply
    if reply is None or reply.turn_id is None or reply.delivered is None:
        return
    number = str(attempt.number + delivery.earlier)
    before = delivery.delivered or reply.delivered
    if is_taken:
        delivery.delivered = number
    elif before == number:
        delivery.delivered = "lost"
    if delivery.delivered not in (None, before):
        work = services.store.mark_delivered(reply.turn_id, delivery.delivered)
        services.answers.start(work, attempt.name)


async def keep_saving(services: Services) -> None:
    """Store the texts of running answers every second, until cancelled."""
    saved: dict[int, tuple[str, int]] = {}  # turn: writing, characters
    while True:
        await asyncio.sleep(SAVE_SECONDS)
        running = {a: (a.writing, len(a.text)) for a in services.answers.running()}
        news = [a for a, state in running.items() if saved.get(a.turn.id) != state]
        await store_text_so_far(services, news)
        saved = {a.turn.id: state for a, state in running.items()}
        if services.store.is_wal_behind:
            with contextlib.suppress(sqlite3.Error):  # next time; saving must go on
                await services.store.truncate_wal()


async def keep_pruning(services: Services) -> None:
    """Delete what has served its time, every hour, until cancelled."""
    link_seconds = services.config.history.link_hours * 3600
    days = services.config.history.keep_days
    while True:
        try:
            await services.store.prune(time.time(), link_seconds, days)
        except sqlite3.Error as error:
            log.error("old replies not deleted: %s", error)
        await asyncio.sleep(3600)


# ---------------------------------------------------------------------------
# 12. Pages
#
# Minimal HTML, made for a phone, no outside resource. They work without script: a
# pending answer then reloads itself every three seconds. How they look stands in
# pages/; here records become what the templates there ask for.
# ---------------------------------------------------------------------------

PAGES = pathlib.Path(__file__).with_name("pages")
TEMPLATES = ("page", "parts", "answer", "live", "history", "error")
POLICY = (
    "default-src 'none'; style-src 'nonce-{nonce}'; script-src 'nonce-{nonce}'; "
    "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'"
)
RENDER_CHARS = 32_768  # longer answers go on as plain text: rendering takes time
FOLD_CHARS = 300  # longer answers are folded in the history, and typeset when opened
HISTORY_COUNT = 50
RECONNECT_MS = 1000  # a viewer whose stream was lost waits so long


def element(tag: str, words: str, kind: str = "") -> str:
    """Return an element around escaped words."""
    attribute = f' class="{kind}"' if kind else ""
    return f"<{tag}{attribute}>{html.escape(words)}</{tag.split()[0]}>"


def link_tag(address: object, words: str = "") -> str:
    """Return a link in an answer; its target learns nothing of our page."""
    rel = 'rel="noopener noreferrer nofollow" target="_blank"'
    return f'<a href="{html.escape(str(address or ""))}" {rel}>{html.escape(words)}'


def mend_tokens(tokens: list[Token], above: int) -> None:
    """Let headings step down one by one from a level, and empty headers be cells.

    So a screen reader's outline has no holes, whatever a model writes.
    """
    level = max(above, 1)
    for index, token in enumerate(tokens):
        if token.type == "heading_open":
            level = min(above + int(token.tag[1]), level + 1, 6)
            token.tag = tokens[index + 2].tag = f"h{level}"
        if token.type == "th_open" and not tokens[index + 1].content:
            token.tag = tokens[index + 2].tag = "td"


MAX_FORMULAS = 500  # of a page are typeset: each takes a fifth of a millisecond
DATA_PICTURE_CHARS = 4 * 1024 * 1024 * 4 // 3
RENDER_OPTIONS = OptionsDict(
    {
        "maxNesting": 20,
        "html": False,
        "linkify": False,
        "typographer": False,
        "quotes": "",
        "xhtmlOut": False,
        "breaks": True,
        "langPrefix": "",
        "highlight": None,
    }
)


class AnswerRenderer(RendererHTML):
    """Renders an answer; a method per token that the library would write otherwise."""

    def __init__(self, texts: Texts) -> None:
        super().__init__()
        self.texts = texts
        self.formulas = 0  # so far

    def link_open(self, tokens: Sequence[Token], index: int, *_: object) -> str:
        return link_tag(tokens[index].attrGet("href"))

    def image(self, tokens: Sequence[Token], index: int, *_: object) -> str:
        # As a link, unless the answer holds it: loading one tells a stranger who reads.
        token = tokens[index]
        source, label = str(token.attrGet("src")), token.content
        if len(source) <= DATA_PICTURE_CHARS and DATA_PICTURE.fullmatch(source):
            return f'<img src="{source}" alt="{html.escape(label)}">'
        return link_tag(source, label or self.texts.word_picture) + "</a>"

    def math_inline(self, tokens: Sequence[Token], index: int, *_: object) -> str:
        token = tokens[index]
        self.formulas += 1
        is_block = token.markup in ("$$", "\\[", "")
        if self.formulas <= MAX_FORMULAS:
            if rendered := formula_mathml(token.content, is_block):
                source = html.escape(token.content)
                return rendered.replace("<math ", f'<math data-tex="{source}" ', 1)
        written = token.markup + token.content + CLOSERS.get(token.markup, "")
        return element("code", written)

    math_block = math_inline

    def fence(self, tokens: Sequence[Token], index: int, *_: object) -> str:
        code = element("code", tokens[index].content)
        language = element("span", tokens[index].info.strip()[:20])
        name = html.escape(self.texts.page_code)
        return (
            f'<div class="code"><div class="bar">{language}</div>'
            f'<pre tabindex="0" role="group" aria-label="{name}">{code}</pre></div>\n'
        )

    def table_open(self, *_: object) -> str:
        label = f'role="group" aria-label="{html.escape(self.texts.page_table)}"'
        return f'<div class="scroll" tabindex="0" {label}><table>\n'

    def table_close(self, *_: object) -> str:
        return "</table></div>\n"

    def td_open(self, tokens: Sequence[Token], index: int, *_: object) -> str:
        # The library would write a style, which the policy forbids.
        side = str(tokens[index].attrGet("style") or "").removeprefix("text-align:")
        kind = f' class="{side}"' if side in ("right", "center") else ""
        return f"<{tokens[index].tag}{kind}>"

    th_open = td_open


def render_markdown(texts: Texts, markdown: str, above: int = 0) -> str:
    """Return an answer as HTML; what is beyond all measure as plain text.

    `above` is the level of the heading that the answer stands under.
    """
    end = len(markdown)
    if end > RENDER_CHARS:
        end = markdown.rfind("\n", RENDER_CHARS // 2, RENDER_CHARS) + 1 or RENDER_CHARS
    tokens, rest = read_markdown(markdown[:end]), markdown[end:]
    mend_tokens(tokens, above)
    body = AnswerRenderer(texts).render(tokens, RENDER_OPTIONS, {})
    return body + (element("p", rest, "plain") if rest else "")


def plain_words(text: str) -> str:
    """Return a reply's words without its links; one at the end goes altogether."""
    return re.sub(r"<[^>]*>", "", re.sub(r"<a [^>]*>[^<]*</a>\s*$", "", text)).strip()


def clock(seconds: float, form: str = "%Y-%m-%d %H:%M") -> str:
    """Return a time as people in China read it."""
    return datetime.datetime.fromtimestamp(seconds, BEIJING).strftime(form)


def glance(markdown: str) -> str:
    """Return how a long answer begins, in one line without marks and unparsed."""
    marks = r"(?m)^\s*(?:[#>*+-]+ |```.*|~~~.*)|[*`|]+|!?\[(?=[^]]*\]\()|\]\([^)\s]*\)"
    words = re.split(r"\n(?:```|~~~|\|)", markdown[:FOLD_CHARS].strip())[0]
    return excerpt(re.sub(marks, "", words), 80)


def lean(text: str) -> str:
    """Return a style or script without indentation and whole lines of comment."""
    comment = r"(?ms)^\s*(//[^\n]*|/\*((?!\*/).)*\*/)\s*$"
    return re.sub(r"(?m)^\s+", "", re.sub(comment, "", text))


@functools.cache
def load_pages() -> jinja2.Environment:
    """Return the templates, compiled; raise ConfigError if one is missing or broken.

    The first call is the start's: what is changed later waits for the next start.
    """
    pages = jinja2.Environment(
        loader=jinja2.FileSystemLoader(PAGES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        auto_reload=False,
    )
    pages.filters |= {"clock": clock, "glance": glance}
    try:
        for name, file in (("style", "page.css"), ("script", "page.js")):
            pages.globals[name] = Markup(lean((PAGES / file).read_text("utf-8")))
        for name in TEMPLATES:
            pages.get_template(f"{name}.html")
    except jinja2.TemplateNotFound as error:
        raise ConfigError(f"{PAGES / str(error.name)}: not found") from None
    except jinja2.TemplateSyntaxError as error:
        place = f"{PAGES / str(error.name)}, line {error.lineno}"
        raise ConfigError(f"{place}: {error.message}") from None
    except OSError as error:
        raise ConfigError(f"{error.filename}: {error.strerror}") from None
    return pages


@dataclass(frozen=True, slots=True)
class Page:
    """A rendered page and the policy its nonce belongs to."""

    html: str
    policy: str


def render_page(name: str, texts: Texts, **values: object) -> Page:
    """Return a page made from a template, with a nonce of its own."""
    nonce = secrets.token_urlsafe(12)
    template = load_pages().get_template(f"{name}.html")
    text = template.render(texts=texts, nonce=nonce, **values)
    return Page(text, POLICY.format(nonce=nonce))


def bad_ending(texts: Texts, turn: Turn) -> str:
    """Return what a page says below an answer; '' if it ended well."""
    told = ending_words(texts, turn.state, turn.reason, 0)
    return plain_words(told) + ("\n" + texts.page_retry if "<a " in told else "")


def render_answer(texts: Texts, turn: Turn) -> Page:
    """Return the page of one question and its finished answer."""
    return render_page(
        "answer",
        texts,
        title=excerpt(turn.question, 30),
        turn=turn,
        answer=Markup(render_markdown(texts, turn.answer)),
        ended=bad_ending(texts, turn),
    )


def render_live(texts: Texts, turn: Turn, seconds: float) -> Page:
    """Return the page of an answer that is being written, with the text so far."""
    title = excerpt(turn.question, 30)
    return render_page("live", texts, title=title, turn=turn, seconds=round(seconds))


def render_history(texts: Texts, turns: list[Turn], older: str, folds: bool) -> Page:
    """Return a page of a subscriber's exchanges; `older` is the next page's query.

    If it `folds`, long answers are not typeset.
    """
    exchanges: list[tuple[Turn, Markup | None, str]] = []
    for turn in turns:
        answer = None
        if turn.answer and not (folds and len(turn.answer) > FOLD_CHARS):
            answer = Markup(render_markdown(texts, turn.answer, 3))
        exchanges.append((turn, answer, bad_ending(texts, turn)))
    title = texts.page_history
    return render_page("history", texts, title=title, exchanges=exchanges, older=older)


def render_error(texts: Texts, words: str) -> Page:
    """Return the page of a link that shows nothing."""
    title, _, rest = words.partition("。")
    return render_page("error", texts, title=title, words=rest)


def sse_event(data: dict, event: str = "", number: str = "") -> bytes:
    """Return one event of an event stream."""
    lines = [f"event: {event}"] if event else []
    lines += [f"id: {number}"] if number else []
    lines += [f"retry: {RECONNECT_MS}", f"data: {json.dumps(data, ensure_ascii=False)}"]
    return ("\n".join(lines) + "\n\n").encode()


# ---------------------------------------------------------------------------
# 13. HTTP handlers
# ---------------------------------------------------------------------------

SERVICES = web.AppKey("services", Services)
BODY_SECONDS = 10.0
PING_SECONDS = 15.0
PROBE_PATH = "/healthz/stream"
FOLLOW_SECONDS = 0.1  # a live page is told of new text so often at most


@functools.lru_cache(maxsize=8)
def warn_once(words: str, minute: int) -> None:
    """Warn once a minute: the cache remembers the words and the minute."""
    log.warning("%s", words)


def is_fresh(services: Services, timestamp: str) -> bool:
    """Say whether a signed timestamp is near our clock or near the newest push.

    If only our clock is off, pushes stay accepted.
    """
    if not re.fullmatch(r"[0-9]{1,12}", timestamp):
        return False
    at, newest = int(timestamp), services.store.newest_push
    if abs(time.time() - at) <= SIGNATURE_SECONDS:
        return True
    if at < newest - SIGNATURE_SECONDS:
        return False
    words = "our clock and WeChat's timestamps are more than ten minutes apart"
    warn_once(words, int(time.monotonic() // 60))
    return True


def is_from_wechat(
    services: Services, request: web.Request, encrypted: str | None = None
) -> bool:
    """Say whether a request is rightly signed and fresh.

    In safe mode a push has a signature of its own, which covers what it encrypts.
    """
    query, sealed = request.query, () if encrypted is None else (encrypted,)
    timestamp, nonce = query.get("timestamp", ""), query.get("nonce", "")
    signature = query.get("msg_signature" if sealed else "signature", "")
    token = services.config.wechat.token
    if not is_signed(token, signature, timestamp, nonce, *sealed):
        return False
    if not is_fresh(services, timestamp):
        log.warning("a signed request with a stale timestamp was refused")
        return False
    return True


async def verify_url(request: web.Request) -> web.Response:
    """Answer the console's verification with the echostr."""
    services = request.app[SERVICES]
    if not is_from_wechat(services, request):
        words = "verification with a wrong signature: is the token the same?"
        warn_once(words, int(time.monotonic() // 60))
        return web.Response(status=403)
    log.info("verified by WeChat's console")
    return web.Response(text=request.query.get("echostr", ""))


def outcome_of(reply: Reply) -> str:
    """Return how the log names what a reply brought."""
    if not reply.content:
        return "nothing to say"
    if reply.sent:
        return f"part {reply.sent.number} sent"
    if reply.early:
        return "answered early" if reply.delivered else "asked for patience"
    return "replied"


def cut_line(request: web.Request) -> web.Response:
    """Close the connection without an answer: a reply would end WeChat's retries."""
    if request.transport:
        request.transport.abort()
    return web.Response()


async def answer_attempt(request: web.Request, attempt: Attempt) -> web.StreamResponse:
    """Wait for the reply and write it, or cut the line; log what became of it."""
    services, loop = request.app[SERVICES], asyncio.get_running_loop()
    try:
        reply = await reply_to(services, attempt)
        if reply is None:
            log.info("%s held to the end, cut", attempt.name)
            return cut_line(request)
        body = render_text_reply(attempt.delivery.message, reply.content, reply.created)
        if services.cipher and reply.content:  # `success` is never encrypted
            body = services.cipher.seal(body, reply.created)
        response = web.Response(body=body, content_type="text/xml", charset="utf-8")
        await response.prepare(request)
        await response.write_eof()
    except (asyncio.CancelledError, ConnectionResetError) as gone:
        seconds = loop.time() - attempt.arrived
        log.info("%s WeChat hung up after %.1f s", attempt.name, seconds)
        note_delivery(services, attempt, False)
        if isinstance(gone, asyncio.CancelledError):
            raise
        return web.Response()
    note_delivery(services, attempt, True)
    log.info(
        "%s %s after %.1f s",
        attempt.name,
        outcome_of(reply),
        loop.time() - attempt.arrived,
    )
    return response


def refuse_plain(services: Services, request: web.Request) -> web.Response:
    """Refuse a push in the clear; of a rightly signed one the owner reads why."""
    if is_from_wechat(services, request):
        words = "a push that is not encrypted was refused: is the console in 安全模式?"
        warn_once(words, int(time.monotonic() // 60))
    return web.Response(status=403)


async def note_time(services: Services, timestamp: int) -> None:
    """Note when a push was signed; one that cannot be stored is taken all the same."""
    try:
        await services.store.note_push(timestamp)
    except sqlite3.Error as error:
        log.error("newest timestamp not stored: %s", error)


async def read_push(request: web.Request) -> Message | web.Response:
    """Return the message of a rightly signed push, or the response to anything else."""
    services, encrypted = request.app[SERVICES], ""
    if not services.cipher and not is_from_wechat(services, request):
        return web.Response(status=403)
    try:
        async with asyncio.timeout(BODY_SECONDS):
            body = await request.read()
    except (TimeoutError, ConnectionResetError):  # stalled, or hung up in the middle
        return cut_line(request)
    except web.RequestPayloadError:
        body = b""  # torn or badly packed: nothing that can be read
    except web.HTTPRequestEntityTooLarge:
        # Too long to be opened; the plain signature still tells a stranger.
        if services.cipher and not is_from_wechat(services, request):
            return web.Response(status=403)
        raise
    if services.cipher:
        encrypted = parse_envelope(body)
        if not encrypted:
            return refuse_plain(services, request)
        if not is_from_wechat(services, request, encrypted):
            return web.Response(status=403)
    await note_time(services, int(request.query["timestamp"]))
    try:
        if services.cipher:
            body = services.cipher.open(encrypted)
        return parse_message(body)
    except BadMessage as error:
        log.warning("unreadable push: %s", error)
        return web.Response(body=b"success")


async def receive_message(request: web.Request) -> web.StreamResponse:
    """Answer a push with a passive reply; a signed one never gets another status."""
    services, arrived = request.app[SERVICES], asyncio.get_running_loop().time()
    try:
        message = await read_push(request)
        if isinstance(message, web.Response):
            return message
        return await answer_attempt(request, take_attempt(services, message, arrived))
    except web.HTTPException:
        raise  # 413
    except Exception:
        log.exception("a push broke off at the door")
        return web.Response(body=b"success")


def html_response(page: Page, status: int = 200) -> web.Response:
    """Return a page with the headers that keep it private."""
    headers = {
        "Content-Security-Policy": page.policy,
        "Cache-Control": "no-store",
        "Referrer-Policy": "no-referrer",
        "X-Robots-Tag": "noindex",
        "X-Content-Type-Options": "nosniff",
    }
    return web.Response(
        text=page.html, status=status, content_type="text/html", headers=headers
    )


def error_page(services: Services, status: int) -> web.Response:
    """Return the page of an unknown (404) or expired (410) link."""
    texts = services.texts
    words = texts.page_expired if status == 410 else texts.page_missing
    return html_response(render_error(texts, words), status)


async def find_linked(request: web.Request) -> Turn | web.Response:
    """Return the turn of a link, or the page that says why there is none."""
    services = request.app[SERVICES]
    turn = await services.store.turn_by_link(request.match_info["key"])
    if turn is None:
        return error_page(services, 404)
    hours = services.config.history.link_hours
    if time.time() - turn.created_at > hours * 3600:
        return error_page(services, 410)
    return turn


async def answer_page(request: web.Request) -> web.Response:
    """Show one question and its answer, live while it is being written."""
    services, turn = request.app[SERVICES], await find_linked(request)
    if isinstance(turn, web.Response):
        return turn
    answer = services.answers.answers.get(turn.id)
    if answer:  # newer than what is stored
        turn = replace(
            turn, answer=answer.text, state=answer.state, reason=answer.reason
        )
    if turn.state == "open":
        seconds = answer.age if answer else time.time() - turn.created_at
        return html_response(render_live(services.texts, turn, seconds))
    if subscriber := services.answers.subscribers.get(turn.openid):
        subscriber.has_read(turn.id)
    try:
        await services.store.mark_read(turn.id)
    except sqlite3.Error as error:  # a full disk does not keep people from reading
        log.error("%s not stored as read: %s", turn.name, error)
    # In a thread: the worst of answers takes most of a second, and pushes cannot wait.
    return html_response(await asyncio.to_thread(render_answer, services.texts, turn))


async def follow(services: Services, answer: Answer, last: str) -> AsyncIterator[bytes]:
    """Yield an answer's events from what the viewer has until it ends."""
    writing, _, known = last.partition(":")
    offset = int(known) if re.fullmatch("[0-9]{1,9}", known) else 0
    news = asyncio.Event()
    answer.followers.add(news)
    try:
        while services.answers.closes_at is None:
            news.clear()
            if writing not in ("", answer.writing) or offset > len(answer.text):
                offset = 0
                yield sse_event({}, "reset", f"{answer.writing}:0")
            writing = answer.writing
            if delta := answer.text[offset:]:
                offset += len(delta)
                yield sse_event({"text": delta}, number=f"{writing}:{offset}")
            if not answer.is_open:
                yield sse_event({"state": answer.state}, "done")
                return
            if offset:
                await asyncio.sleep(FOLLOW_SECONDS)  # several tokens, one event
            until = asyncio.get_running_loop().time() + PING_SECONDS
            if not await services.answers.wait_for(news, until):
                yield b": ping\n\n"
    finally:
        answer.followers.discard(news)


async def answer_events(request: web.Request) -> web.StreamResponse:
    """Stream an answer as it is written; end with its final state."""
    services, turn = request.app[SERVICES], await find_linked(request)
    if isinstance(turn, web.Response):
        return turn
    answer = services.answers.answers.get(turn.id)
    if answer is None:
        stored = await services.store.turn(turn.id)
        if stored is None:  # deleted since its link was looked up
            return error_page(services, 404)
        answer = await Answer.stored(stored, Subscriber(stored.openid))
    response = web.StreamResponse(
        headers={
            "Content-Type": "text/event-stream; charset=utf-8",
            "Cache-Control": "no-store",
            "X-Accel-Buffering": "no",
        }
    )
    with contextlib.suppress(ConnectionResetError):
        await response.prepare(request)
        last = request.headers.get("Last-Event-ID", "")
        async for event in follow(services, answer, last):
            await response.write(event)
        await response.write_eof()
    return response


def number_in(request: web.Request, name: str) -> int | None:
    """Return a number of the query; None if it is missing or made up."""
    value = request.query.get(name, "")
    return int(value) if re.fullmatch(r"[0-9]{1,15}", value) else None


async def history_page(request: web.Request) -> web.Response:
    """Show a subscriber's history, newest first."""
    services, key = request.app[SERVICES], request.match_info["key"]
    owner = await services.store.history_owner(key)
    if owner is None:
        return error_page(services, 404)
    openid, expires_at = owner
    if time.time() > expires_at:
        return error_page(services, 410)
    only, below = number_in(request, "only"), number_in(request, "before")
    if only is not None:
        turns = await services.store.turns_of(openid, only + 1, 1)
        turns = [turn for turn in turns if turn.id == only]
    else:
        below = 2**62 if below is None else below
        turns = await services.store.turns_of(openid, below, HISTORY_COUNT + 1)
    older = f"?before={turns[HISTORY_COUNT - 1].id}" if turns[HISTORY_COUNT:] else ""
    page = (services.texts, turns[:HISTORY_COUNT], older, only is None)
    return html_response(await asyncio.to_thread(render_history, *page))


async def health(request: web.Request) -> web.Response:
    """Say whether the database answers."""
    try:
        await request.app[SERVICES].store.rows("SELECT 1")
    except sqlite3.Error as error:
        return web.json_response({"status": str(error)}, status=503)
    return web.json_response({"status": "ok"})


async def probe_stream(request: web.Request) -> web.StreamResponse:
    """Send two events half a second apart: `check` sees if a proxy buffers."""
    response = web.StreamResponse(headers={"X-Accel-Buffering": "no"})
    response.content_type = "text/event-stream"
    await response.prepare(request)
    await response.write(sse_event({"event": 1}))
    await asyncio.sleep(0.5)
    await response.write(sse_event({"event": 2}))
    return response


def is_our_fault(record: logging.LogRecord) -> bool:
    """Say whether a line of aiohttp's tells more than that a stranger sent no HTTP."""
    error = record.exc_info[1] if record.exc_info else None
    not_http = (aiohttp.http_exceptions.HttpProcessingError, web.RequestPayloadError)
    return not isinstance(error, not_http)


async def hide_server(request: web.Request, response: web.StreamResponse) -> None:
    """Leave out which versions serve."""
    response.headers["Server"] = "wxgpt"


# ---------------------------------------------------------------------------
# 14. Application
# ---------------------------------------------------------------------------


def socks_connector(proxy: str) -> aiohttp.BaseConnector:
    """Return a connector through a socks proxy."""
    # Optional; its lack was found when the settings were read.
    import aiohttp_socks  # type: ignore[import-not-found, unused-ignore]

    return aiohttp_socks.ProxyConnector.from_url(proxy, limit=0)


@contextlib.asynccontextmanager
async def open_chat(
    config: Config,
) -> AsyncIterator[tuple[dict[str, ChatClient], Pictures]]:
    """Open the connections to the chat APIs: one client session, no cap on connections.

    `at_once` bounds the number of calls; a socks proxy needs a session of its own.
    """
    async with contextlib.AsyncExitStack() as stack:
        timeout = aiohttp.ClientTimeout(total=None, connect=15, sock_connect=10)
        plain = await stack.enter_async_context(
            aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=0), timeout=timeout
            )
        )
        clients = {}
        for name, assistant in config.assistants.items():
            http = plain
            if assistant.proxy.startswith("socks"):
                connector = socks_connector(assistant.proxy)
                http = await stack.enter_async_context(
                    aiohttp.ClientSession(connector=connector, timeout=timeout)
                )
                assistant = replace(assistant, proxy="")
            clients[name] = ChatClient(assistant, http)
        yield clients, Pictures(config.wechat.picture_hosts, plain)


def make_cipher(config: Config) -> Cipher | None:
    """Return the cipher of safe mode, None in plain mode; raise ConfigError."""
    wechat = config.wechat
    if not wechat.aes_key:
        return None
    try:
        return Cipher(wechat.token, wechat.app_id, wechat.aes_key)
    except ImportError:
        raise ConfigError(
            "wechat.aes_key: safe mode needs: pip install cryptography"
        ) from None


def make_blocked(config: Config) -> BlockedWords:
    """Return the list of blocked words; raise ConfigError if it cannot be read."""
    blocked = BlockedWords(config.limits.blocked_words)
    try:
        blocked.refresh()
    except (OSError, UnicodeError) as error:
        raise ConfigError(f"limits.blocked_words: {error}") from None
    return blocked


@contextlib.asynccontextmanager
async def open_services(config: Config) -> AsyncIterator[Services]:
    """Open everything that lives as long as the process, closed in reverse order."""
    store = await open_store(config.database.path)
    try:
        async with open_chat(config) as chat:
            services = Services(
                config,
                store,
                *chat,
                Answers(config),
                make_cipher(config),
                make_blocked(config),
            )
            try:
                yield services
            finally:
                await services.answers.close()
    finally:
        await store.close()


def make_app(services: Services) -> web.Application:
    """Return the application with all its routes."""
    app = web.Application(client_max_size=BODY_BYTES)
    app[SERVICES] = services
    path = services.config.server.path.rstrip("/")
    app.add_routes(
        [
            web.get(path, verify_url),
            web.get(path + "/", verify_url),
            web.post(path, receive_message),
            web.post(path + "/", receive_message),
            web.get("/a/{key}", answer_page),
            web.get("/a/{key}/events", answer_events),
            web.get("/h/{key}", history_page),
            web.get("/healthz", health),
            web.get(PROBE_PATH, probe_stream),
        ]
    )
    app.on_response_prepare.append(hide_server)
    return app


def sd_notify(state: str, *descriptors: int) -> None:
    """Tell systemd a state, and which descriptors to keep (sd_notify(3))."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address:
        return
    address = "\0" + address[1:] if address.startswith("@") else address
    with (
        contextlib.suppress(OSError),
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as out,
    ):
        out.connect(address)
        socket.send_fds(out, [state.encode()], descriptors)


def listen(host: str, port: int) -> socket.socket:
    """Return the listening socket: one that systemd kept, or a new one.

    It is kept across restarts, since a proxy that meets nobody answers WeChat 502 at
    once, and WeChat then burns its attempts within a second.
    """
    is_kept = os.environ.get("LISTEN_PID") == str(os.getpid())
    if is_kept and os.environ.get("LISTEN_FDNAMES") == "listen":
        kept = socket.socket(fileno=SD_FIRST_DESCRIPTOR)
        wanted = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        if kept.getsockname()[:2] in [address[:2] for *_, address in wanted]:
            return kept
        # The settings have changed. systemd's copy listens on until it is shut down.
        kept.shutdown(socket.SHUT_RDWR)
        kept.close()
        sd_notify("FDSTOREREMOVE=1\nFDNAME=listen")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        new = socket.create_server((host, port), family=family, backlog=BACKLOG)
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else error
        raise OSError(f"cannot listen on {host} port {port}: {reason}") from None
    sd_notify("FDSTORE=1\nFDNAME=listen", new.fileno())
    return new


async def keep_watchdog(seconds: float) -> None:
    """Tell systemd that the event loop turns, until cancelled."""
    while True:
        sd_notify("WATCHDOG=1")
        await asyncio.sleep(seconds)


def start_upkeep(services: Services) -> None:
    """Start what goes on beside the messages."""
    works = [keep_saving(services), keep_pruning(services)]
    if os.environ.get("WATCHDOG_PID", str(os.getpid())) == str(os.getpid()):
        if seconds := float(os.environ.get("WATCHDOG_USEC", 0)) / 2e6:
            works.append(keep_watchdog(seconds))
    for work in works:
        services.answers.start(work, "upkeep")


async def hear_out(runner: web.AppRunner) -> None:
    """Leave those who were let in last, if any, a moment to send their request."""
    for _ in range(2):  # turns of the loop, which letting somebody in takes
        await asyncio.sleep(0)
    if runner.server and runner.server.connections:
        await asyncio.sleep(LINGER_SECONDS)


@contextlib.asynccontextmanager
async def open_server(config: Config) -> AsyncIterator[tuple[Services, int]]:
    """Serve inside the block; give the services and the port. Ends in order."""
    async with open_services(config) as services:
        answers = services.answers
        runner = web.AppRunner(
            make_app(services),
            access_log=None,
            handler_cancellation=True,  # a hung-up request ends; its work is elsewhere
            # Twice so long for a client that does not read, and ten seconds in all.
            shutdown_timeout=GRACE_SECONDS + LINGER_SECONDS,
        )
        await runner.setup()
        try:
            listener = listen(config.server.host, config.server.port)
            site = web.SockSite(runner, listener, backlog=BACKLOG)
            await resume_answers(services)  # before a retry can ask for one of them
            await site.start()
            start_upkeep(services)
            yield services, runner.addresses[0][1]
            await site.stop()
            await hear_out(runner)
        finally:
            answers.shut(answers.loop.time() + GRACE_SECONDS - LINGER_SECONDS)
            await runner.cleanup()


class JournalFormatter(logging.Formatter):
    """One line an event; under journald with its priority instead of the time."""

    PRIORITIES = {"DEBUG": 7, "INFO": 6, "WARNING": 4, "ERROR": 3, "CRITICAL": 2}

    def __init__(self, is_journal: bool) -> None:
        super().__init__("%(message)s")
        self.is_journal = is_journal

    def format(self, record: logging.LogRecord) -> str:
        """Return the record's lines, each with a priority under journald."""
        text = super().format(record)
        if not self.is_journal:
            return f"{time.strftime('%H:%M:%S')} {record.levelname.lower()} {text}"
        priority = self.PRIORITIES.get(record.levelname, 5)
        return "\n".join(f"<{priority}>{line}" for line in text.split("\n"))


def set_up_log() -> None:
    """Send the log to stderr."""
    handler = logging.StreamHandler()
    handler.setFormatter(JournalFormatter("JOURNAL_STREAM" in os.environ))
    # What no line shows is not looked up (Logging HOWTO, Optimization).
    logging._srcfile = None
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    logging.getLogger("aiohttp").setLevel(logging.WARNING)
    logging.getLogger("aiohttp.server").addFilter(is_our_fault)


async def run_server(config: Config) -> None:
    """Serve until SIGTERM or SIGINT; a second one ends at once."""
    stop, loop = asyncio.Event(), asyncio.get_running_loop()

    def on_signal() -> None:
        if stop.is_set():
            os._exit(1)
        stop.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal)
    # The database's thread asks a busy loop for the interpreter at every statement;
    # with the usual 5 ms the slowest of 1,000 waiting got its reply 2 s later.
    sys.setswitchinterval(0.0005)
    # What is loaded stays: no collection needs to look through it, nor many through the
    # little that a message leaves (0.1 ms of processor time a message).
    gc.freeze()
    gc.set_threshold(5000)
    async with open_server(config) as (_, port):
        log.info("serving on %s port %d", config.server.host, port)
        sd_notify("READY=1")
        await stop.wait()
        log.info("stopping")
        sd_notify("STOPPING=1")


# ---------------------------------------------------------------------------
# 15. The command line
#
# What is not serving stands in owner/ and is loaded only when it is asked for: `check`
# tries each thing that usually goes wrong, `stats` says who asked how much, `demo` lets
# an owner be a subscriber.
# ---------------------------------------------------------------------------


def complain(error: Exception) -> None:
    """Print the one line that ends the process, as an error in the journal."""
    priority = "<3>" if "JOURNAL_STREAM" in os.environ else ""
    print(f"{priority}wxgpt: {error}", file=sys.stderr)


def serve_command(config: Config) -> int:
    """Run the server; return the exit status."""
    load_pages()
    set_up_log()
    for line in effective(config):
        log.info("%s", line)
    try:
        asyncio.run(run_server(config))
    except (StoreError, OSError) as error:
        complain(error)
        return 1
    return 0


def demo_command(arguments: list[str]) -> int:
    """Run owner/demo.py in this process's place; it takes over the held Ctrl-C."""
    demo = pathlib.Path(__file__).with_name("owner") / "demo.py"
    if not demo.exists():
        print(f"wxgpt: {demo} is not there", file=sys.stderr)
        return 1
    os.execv(sys.executable, [sys.executable, str(demo), *arguments])


def make_parser() -> argparse.ArgumentParser:
    """Return the command line's parser."""
    parser = argparse.ArgumentParser(
        prog="wxgpt.py",
        usage="wxgpt.py [COMMAND] [--config FILE] [-h] [--version]",
        description="Subscribers of a WeChat Official Account talk with a chat model.",
    )
    parser.add_argument("--version", action="version", version=f"wxgpt {VERSION}")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument(
        "--config", metavar="FILE", default="wxgpt.toml", help="settings"
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", prog="wxgpt.py")
    commands.add_parser("serve", parents=[common], help="serve (the default)")
    text = "test each thing that usually goes wrong, and say how to mend it"
    commands.add_parser("check", parents=[common], help=text)
    stats = commands.add_parser("stats", parents=[common], help="who asked how much")
    text = "Beijing days, today included (7); 0: all"
    stats.add_argument("--days", type=int, default=7, metavar="N", help=text)
    stats.add_argument("--full", action="store_true", help="whole openids")
    stats.add_argument("--json", action="store_true", help="for machines")
    commands.add_parser("demo", help="try it all with no account and no key")
    return parser


EXAMPLE_TOKEN = "replaceThisToken"  # of wxgpt.example.toml
COMMAND_WORDS = ("serve", "check", "stats", "--version", "-h", "--help")


def run_command(words: list[str]) -> int:
    """Do what the words of a command line say; return the exit status."""
    if not words or words[0] not in COMMAND_WORDS:
        words = ["serve", *words]
    arguments = make_parser().parse_args(words)
    config = load_config(arguments.config, os.environ)
    wanted = "one of your own: everybody knows this one"
    is_own = config.wechat.token != EXAMPLE_TOKEN
    demand(is_own, "wechat.token", EXAMPLE_TOKEN, wanted)
    check_commands(config)
    # What stands in owner/ imports wxgpt: this module, which is not to be loaded twice.
    sys.modules.setdefault("wxgpt", sys.modules[__name__])
    if arguments.command == "check":
        from owner.check import run_check

        return asyncio.run(run_check(config, os.environ))
    if arguments.command == "stats":
        from owner.stats import stats_command

        return stats_command(config, arguments.days, arguments.full, arguments.json)
    return serve_command(config)


def main() -> int:
    """Run the command line; return the exit status."""
    words = sys.argv[1:]
    if words[:1] == ["demo"]:
        return demo_command(words[1:])
    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
        with contextlib.ExitStack() as stack:
            stack.callback(print, end="", flush=True)  # a closed pipe is met here
            return run_command(words)
    except ConfigError as error:
        complain(error)
        return 2
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except BrokenPipeError:  # as in `check | head`; what is left goes nowhere
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    finally:  # Python's own end would complain of a Ctrl-C
        signal.signal(signal.SIGINT, signal.SIG_DFL)


if __name__ == "__main__":
    sys.exit(main())
