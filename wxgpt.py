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

WeChat posts each message as XML, waits five seconds, hangs up and posts it again, three
times in all. The only way to say anything is to answer one of these requests. Models
often need longer. So the first request of a message starts one task, every request of
that message waits for it, and the last one is answered in time with what is written so
far, a tap for the rest, and a link to a page that goes on live.

The path of a message. Functions stand above their callers, a class's methods in the
order of what happens to it, and those of Bot in the order of this path:

    receive_message -> read_push: is_signed_now, parse_message
                    -> Bot.deliver: the message's Delivery, and at first its task
                    -> Bot.reply_to: waits for the two tasks below, then compose
                    -> render_text_reply
    in the message's task:   Bot.find_source -> handle_message -> handle_text
                             -> a command, a part, or accept_question -> start_turn
    in the question's task:  Bot.converse -> ask_models -> ask_model
                             -> write_text, which reads ChatClient.stream
                             -> show -> Turn.append
                             -> store_end -> Store.finish_turn

A question from a subscriber's own page comes by submit_question -> Bot.ask_here and
goes the same way from Bot.find_source on; its answer is read on the page.

A request only waits, and the first that has waited enough decides the reply; a task
only writes. They meet in a Delivery (the requests of one message and the one reply they
all get) and in a Turn (a question and its answer, which grows while the model writes).
No request does work that must outlive its connection.

In memory: deliveries of the last minute, open turns, who waits for what. In SQLite:
sessions, turns, parts, decided replies; a question is stored before the model is asked,
a reply before it is sent, and what a killed process left unfinished is asked again by
the next one.

Beside this file: schema.sql; texts.toml, every line people read; providers.toml, what
chat APIs mean by their words and put around answers; pages/, what a browser shows, and
the tables of formulas; owner/, the commands that do not serve, which import this file
and not the other way round.

Glossary. What comes: openid (a subscriber of this account), message (its MsgId is the
same every time it is sent), request or attempt (one time it is sent), delivery (all
requests of a message), tap (a link in a reply that sends words as if they were typed),
kept (pictures and shared words, which wait for the question about them).
What it means: session (a conversation with one assistant), lapsed (a session that ran
out so lately that a tap resumes it), turn (a question and its answer), delta (a piece
of a streamed answer), source (what answers a message: words, a part, a stored reply).
What goes out: passive reply, chat text (what the chat shows of the model's Markdown),
part (a slice of the chat text that one reply shows, from its start to its stop; its
number is what a tap for it sends, 0 in a question's own reply; its place is counted
within the answer).

Run `python wxgpt.py demo` to try it, `python wxgpt.py --config wxgpt.toml` to serve.
"""

import signal
import sys

# One before 3.10 does not get here: it stops at the first `match`, in inline_text, and
# shows that line, whose comment says the same.
if sys.version_info < (3, 11):  # noqa: UP036
    found = ".".join(map(str, sys.version_info[:2]))
    sys.exit(f"wxgpt: 需要 Python 3.11 或更新，这里是 {found} (Python is too old)")
if __name__ == "__main__":  # hold Ctrl-C during the imports; `main` ends quietly on it
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])

import asyncio
import base64
import bisect
import codecs
import collections
import concurrent.futures
import contextlib
import copy
import dataclasses
import datetime
import email.utils
import fcntl
import functools
import gc
import hashlib
import hmac
import html
import importlib.util
import itertools
import json
import logging
import math
import os
import pathlib
import random
import re
import secrets
import socket
import sqlite3
import stat
import time
import tomllib
import types
import unicodedata
import urllib.parse
import weakref
from collections.abc import (
    AsyncGenerator,
    AsyncIterator,
    Awaitable,
    Callable,
    Coroutine,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
    Set,
)
from dataclasses import MISSING, dataclass, field, fields, replace
from typing import Any, NamedTuple
from xml.etree import ElementTree
from xml.parsers.expat import ExpatError

HERE = pathlib.Path(__file__).parent  # the program's folder

try:
    import aiohttp
    import aiosqlite
    import jinja2
    import xmltodict
    import yarl
    from aiohttp import web
    from markdown_it import MarkdownIt
    from markdown_it.renderer import RendererHTML
    from markdown_it.token import Token
    from markupsafe import Markup
except ModuleNotFoundError as error:
    if __name__ != "__main__":
        raise
    better = f"{HERE}/.venv/bin/python {HERE}/wxgpt.py"
    if not (HERE / ".venv/bin/python").exists():
        better = "python3 -m venv .venv && .venv/bin/pip install -r requirements.lock"
    sys.exit(f"wxgpt: 缺少 {error.name} 包 (package missing): {better}")

VERSION = "0.1.0"
log = logging.getLogger("wxgpt")


# ---------------------------------------------------------------------------
# 1. Constants
#
# Facts about the platform, with their source. Other constants stand above the function
# that uses them.
# ---------------------------------------------------------------------------

ATTEMPTS = 3  # requests per message; the documents say "三次重试", practice is 3 in all
ATTEMPT_SECONDS = 5.0  # "五秒内" in 被动回复用户消息, developers.weixin.qq.com
REPLY_BYTES = 1800  # undocumented; reports of refused texts begin at 1884 bytes
BODY_BYTES = 64 * 1024  # far more than the largest push has
# The reply that shows nothing, and ends WeChat's attempts: sent too early, it costs the
# answer.
SUCCESS = b"success"
BEIJING = datetime.timezone(datetime.timedelta(hours=8))

# WeChat delivers a sticker as one of these texts (from reports to many projects).
STICKER_TEXTS = ("【收到不支持的消息类型，暂无法显示】", "[Unsupported Message]")

# Left out of whatever others write: what XML 1.0 cannot contain, lone surrogates too
# (WeChat shows an error for it), and Unicode's noncharacters, which our links are made
# of. That is done where a text comes in: parse_message, submit_question, Bot.show for
# the model's. read_entity and formula_mathml let none through; `outgoing` drops them
# from the owner's words, and MarkdownReader from everything: it needs \0 for itself.
ILLEGAL = re.compile("[\0-\x08\x0b\x0c\x0e-\x1f\ud800-\udfff\ufdd0-\ufdef\ufffe\uffff]")


# ---------------------------------------------------------------------------
# 2. Configuration
#
# One TOML file. Each setting is one dataclass field with its type, default, bounds and
# comment, and the file is checked against these fields. What subscribers read is in
# texts.toml; [texts] in the settings replaces single lines of it.
# ---------------------------------------------------------------------------


class OwnerError(Exception):
    """Why the program cannot go on, for its owner; `tell` translates the lines."""

    def __init__(self, words: str = "", **values: object) -> None:
        self.lines = [(words, values)]  # formats, each with what is filled in

    def __str__(self) -> str:
        return "\n".join(words.format(**values) for words, values in self.lines)


class ConfigError(OwnerError):
    """Settings that cannot be used."""


FOUND = "{name}: found {found}, expected {expected}"
FOUND_WITHIN = "{name}: found {found}, expected {expected} from {least} to {most}"


class Mistakes:
    """What is wrong with a settings file: the first mistake of each setting."""

    def __init__(self) -> None:
        self.lines: dict[str, tuple[str, dict[str, object]]] = {}

    def add(self, name: str, words: str, **values: object) -> None:
        """Note a mistake of the named setting."""
        self.lines.setdefault(name, (words, {"name": name} | values))

    def wrong(self, name: str, found: object, expected: str, **values: object) -> None:
        """Note that the named setting is not what was expected; None: it is missing."""
        words = FOUND_WITHIN if "least" in values else FOUND
        shown = "nothing" if found is None else repr(found)
        self.add(name, words, found=shown, expected=expected, **values)


def bounded(default: float, least: float, most: float) -> Any:
    """Return the field of a number with the range it may have."""
    return field(default=default, metadata={"bounds": (least, most)})


MASK = "something else"  # in place of what may be a secret


def secret(default: object = MISSING) -> Any:
    """Return the field of a value that is never shown; without a default: required."""
    return field(default=default, metadata={"secret": True})


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerSettings:
    """Where to listen."""

    host: str = "127.0.0.1"  # address to listen on
    port: int = bounded(8080, 0, 65535)  # port to listen on; 0: any free one
    path: str = "/wechat"  # path of WeChat's URL, with or without a slash at its end
    root_files: str = ""  # a folder of small text files, served as /NAME.txt


@dataclass(frozen=True, slots=True, kw_only=True)
class WeChatSettings:
    """The account, and the platform's timing."""

    token: str = secret()  # the token typed into WeChat's console
    app_id: str = ""  # AppID; together with aes_key it turns on safe mode
    aes_key: str = secret("")  # EncodingAESKey, 43 characters
    attempt_timeout: float = bounded(ATTEMPT_SECONDS, 0.2, 60)  # seconds per attempt
    attempts: int = bounded(ATTEMPTS, 1, 10)  # requests WeChat makes for one message
    # Seconds before its timeout at which a request is answered with what there is.
    reply_margin: float = bounded(0.8, 0, 30)
    # How many attempts may time out within five minutes (see MuteGuard); 0: none.
    mute_guard: int = bounded(30, 0, 1_000_000)
    # Hosts from which pictures may be fetched.
    picture_hosts: tuple[str, ...] = ("mmbiz.qpic.cn", "mmecoa.qpic.cn", "wx.qlogo.cn")

    @property
    def margin(self) -> float:
        """Return reply_margin in seconds, at most half of an attempt."""
        return min(self.reply_margin, self.attempt_timeout / 2)


DEFAULT_MODEL = "gpt-6-luna"  # thinks by default: gets reasoning_effort "none"
DEFAULT_PROMPT = (
    "你在微信里和人聊天。用对方的语言，先给结论，一般不超过 200 字，需要时再展开。"
    "少用标题和表格，公式用普通文字写。"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class AssistantSettings:
    """One assistant: an OpenAI-compatible chat API and how to ask it."""

    base_url: str = "https://api.openai.com/v1"  # base URL of the chat API
    api_key: str = secret()  # key of the chat API
    model: str = DEFAULT_MODEL  # name of the model
    system_prompt: str = DEFAULT_PROMPT  # empty: none
    price_in: float = bounded(0.0, 0, 1e9)  # money per million tokens of questions
    price_out: float = bounded(0.0, 0, 1e9)  # and of answers
    # Further HTTP headers, masked in the log: they may hold keys.
    headers: dict[str, str] = field(default_factory=dict, metadata={"secret": True})
    proxy: str = secret("")  # http, https or socks proxy to reach the API through
    extra: dict = field(default_factory=dict)  # merged into the request body
    first_token_timeout: float = bounded(60.0, 0.05, 3600)  # seconds to the first token
    idle_timeout: float = bounded(60.0, 0.05, 3600)  # seconds between two tokens
    timeout: float = bounded(240.0, 0.05, 86400)  # seconds for a whole answer
    fallback: str = ""  # the assistant whose model is asked when this one fails,
    fallback_after: float = bounded(20.0, 0, 3600)  # or after this silence; 0: never


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionSettings:
    """How long a conversation lasts, and how much of it the model gets."""

    ttl: float = bounded(300.0, 1, 31_536_000)  # idle seconds until a session ends
    context_chars: int = bounded(12000, 0, 10_000_000)  # of it, sent with a question
    auto_open: bool = False  # any text outside a session opens the first assistant


@dataclass(frozen=True, slots=True, kw_only=True)
class LimitSettings:
    """What strangers may cost."""

    questions_per_day: int = bounded(100, 0, 10**9)  # for each subscriber; 0: no limit
    all_per_day: int = bounded(2000, 0, 10**9)  # for all together; 0: no limit
    question_chars: int = bounded(2000, 1, 1_000_000)  # longest question
    waiting: int = bounded(3, 1, 1000)  # unanswered questions one subscriber may have
    at_once: int = bounded(64, 1, 1_000_000)  # upstream calls at the same time
    allow: tuple[str, ...] = ()  # openids: only these may ask
    deny: tuple[str, ...] = ()  # openids: these get no answer
    blocked_words: str = ""  # a file, one word a line


WELCOME = "欢迎关注！想和 AI 聊天，点 /chatgpt 就行；怎么用，点 /help 看看。"
HINT = "在的！想和 AI 聊天，点 /chatgpt 就行；怎么用，点 /help 看看。"


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplySettings:
    """Replies that no model writes."""

    subscribe: str = WELCOME  # to a new subscriber; empty: silence
    # To text outside a session; empty: silence, "wechat_ai": WeChat's own AI reply.
    outside: str = HINT
    outside_hours: float = bounded(24.0, 0, 87_600)  # once in this many; 0: each time
    # A line that names the filed model, in the welcome, /help and below pages.
    model_notice: str = ""
    label: str = "（AI 生成）"  # ends each part of a model's text; empty: none
    # Outside a session: exact text = reply; one that is a command is carried out.
    keywords: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class HistorySettings:
    """How long things can be read."""

    link_hours: float = bounded(72.0, 1e-6, 876_000)  # how long an answer's link works
    history_minutes: float = bounded(120.0, 1e-4, 1e8)  # how long a history link works
    device_days: float = bounded(30.0, 1e-6, 3650)  # how long a device stays signed in
    keep_days: float = bounded(0.0, 0, 36_500)  # days until deletion; 0: never


@dataclass(frozen=True, slots=True, kw_only=True)
class DatabaseSettings:
    """Where everything is kept."""

    path: str = ""  # a file; empty: wxgpt.db in the state directory, else here


class Texts(types.SimpleNamespace):
    """Every line a subscriber can read, by its name in texts.toml: `texts.opened`."""

    def __init__(self, lines: Mapping[str, str]) -> None:
        super().__init__(**lines)

    def __getattr__(self, name: str) -> str:  # only called for a name that is missing
        raise AttributeError(f"no text is named {name}")

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"{name} cannot be changed while the server runs")


# Exact texts that mean a command, everywhere.
ALIASES = {
    **dict.fromkeys(("帮助", "菜单", "用法"), "/help"),
    **dict.fromkeys(("聊天记录", "历史记录", "网页聊天"), "/history"),
    **dict.fromkeys(("换个话题", "新话题"), "/clear"),
    "结束对话": "/stop",
    "删除我的记录": "/forget",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """All settings, checked; `load_config` makes it."""

    public_url: str  # how a subscriber's phone reaches this server
    server: ServerSettings = field(default_factory=ServerSettings)
    wechat: WeChatSettings
    assistants: dict[str, AssistantSettings]
    session: SessionSettings = field(default_factory=SessionSettings)
    limits: LimitSettings = field(default_factory=LimitSettings)
    replies: ReplySettings = field(default_factory=ReplySettings)
    aliases: dict[str, str] = field(default_factory=ALIASES.copy)
    texts: Texts
    history: HistorySettings = field(default_factory=HistorySettings)
    database: DatabaseSettings = field(default_factory=DatabaseSettings)

    @property
    def is_secure(self) -> bool:
        """Say whether nobody between a phone and our pages can read or change them.

        Browsers take loopback for that too, without TLS. It is not WeChat's safe mode.
        """
        near = r"http://(localhost|127\.[\d.]+|\[::1\])([:/].*)?|https://.*"
        return re.fullmatch(near, self.public_url) is not None

    @property
    def root(self) -> str:
        """Return the path under which a phone finds our pages; mostly ''."""
        return urllib.parse.urlsplit(self.public_url).path


def read_toml(path: str | os.PathLike) -> dict[str, Any]:
    """Return the contents of a TOML file; raise ConfigError with one line."""
    try:
        return tomllib.loads(pathlib.Path(path).read_text("utf-8-sig"))
    except OSError as error:
        words, why = "{path}: {why}", error.strerror
        raise ConfigError(words, path=path, why=why) from error
    except (ValueError, RecursionError) as error:
        words = "{path}: not TOML: {why}"
        raise ConfigError(words, path=path, why=error) from error


# The types of settings in an owner's words.
TYPE_NAMES: dict[object, str] = {
    str: "text",
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    dict: "a table",
    tuple[str, ...]: "a list of texts",
    dict[str, str]: "a table of texts",
}


def has_type(value: Any, kind: object) -> bool:
    """Say whether a TOML value has the type of a setting."""
    if kind == tuple[str, ...]:
        return isinstance(value, list) and all(isinstance(item, str) for item in value)
    if kind == dict[str, str]:
        return isinstance(value, dict) and has_type([*value.values()], tuple[str, ...])
    return type(value) is kind or (kind is float and type(value) is int)


def check_names(
    table: dict, known: Iterable[str], prefix: str, mistakes: Mistakes
) -> None:
    """Note settings that do not exist."""
    for key in table:
        if key not in known:
            shown = key if key.isprintable() else repr(key)  # the error is one line
            words = "{name}: unknown setting, expected one of {known}"
            mistakes.add(prefix + shown, words, known=", ".join(known))


def read_table(kind: Any, table: Any, name: str, mistakes: Mistakes) -> Any:
    """Return a TOML table as its settings class; note what cannot be used in it."""
    if not isinstance(table, dict):
        mistakes.wrong(name, table, "a table")
        table = {}
    prefix = f"{name}." if name else ""
    check_names(table, [entry.name for entry in fields(kind)], prefix, mistakes)
    values = {}
    for entry in fields(kind):
        where, value = prefix + entry.name, table.get(entry.name)
        is_required = entry.default is MISSING and entry.default_factory is MISSING
        bounds = entry.metadata.get("bounds", ())
        if dataclasses.is_dataclass(entry.type):
            inner = table.get(entry.name, {})
            values[entry.name] = read_table(entry.type, inner, where, mistakes)
        elif entry.type not in TYPE_NAMES:  # already read: load_config put it here
            values[entry.name] = value
        elif value is None and not is_required:
            pass  # its default
        elif has_type(value, entry.type) and (
            not bounds or bounds[0] <= value <= bounds[1]
        ):
            values[entry.name] = tuple(value) if isinstance(value, list) else value
        else:
            found = MASK if value is not None and "secret" in entry.metadata else value
            plain = (f"{bound:f}".rstrip("0").rstrip(".") for bound in bounds)
            ends = dict(zip(("least", "most"), plain, strict=False))
            mistakes.wrong(where, found, TYPE_NAMES[entry.type], **ends)
            if is_required:
                values[entry.name] = ""  # there is no default to go on with
    return kind(**values)


# The environment variables that fill in what the file leaves out of `chatgpt`.
CHATGPT_VARIABLES = {"api_key": "OPENAI_API_KEY", "base_url": "OPENAI_BASE_URL"}


def setting_source(
    name: str, key: str, one: AssistantSettings, environ: Mapping[str, str]
) -> str:
    """Return where an assistant's setting comes from: its name, or a variable."""
    variable = CHATGPT_VARIABLES.get(key, "")
    if name == "chatgpt" and environ.get(variable) == getattr(one, key) != "":
        return f"{variable} in the environment"
    return f"assistants.{name}.{key}"


def read_assistants(
    table: Any, environ: Mapping[str, str], mistakes: Mistakes
) -> dict[str, AssistantSettings]:
    """Return the assistants by name."""
    if not isinstance(table, dict) or not all(
        isinstance(one, dict) for one in table.values()
    ):
        mistakes.wrong("assistants", MASK, "a table of tables")  # a misplaced API key?
        return {}
    filled = {k: environ[v] for k, v in CHATGPT_VARIABLES.items() if environ.get(v)}
    if "chatgpt" in table or "api_key" in filled:
        table = {**table, "chatgpt": filled | table.get("chatgpt", {})}
    else:
        expected = "a table of this name, whichever model it asks"
        mistakes.wrong("assistants.chatgpt", None, expected)
    return {
        name: read_table(AssistantSettings, one, f"assistants.{name}", mistakes)
        for name, one in table.items()
    }


TEXTS = HERE / "texts.toml"


def read_texts(changes: Any, mistakes: Mistakes | None = None) -> Texts:
    """Return the lines of texts.toml with an owner's changes, if any are expected.

    A changed line may leave out placeholders of the default, but not add any.
    """
    mistakes = mistakes or Mistakes()
    lines = read_toml(TEXTS)
    for name, line in lines.items():
        if not isinstance(line, str):
            where, found = f"{TEXTS}: {name}", repr(line)
            raise ConfigError(FOUND, name=where, found=found, expected="text")
    if not isinstance(changes, dict):
        mistakes.wrong("texts", changes, "a table")
        changes = {}
    check_names(changes, lines, "texts.", mistakes)
    for name, line in changes.items():
        where = f"texts.{name}"
        if not isinstance(line, str):
            mistakes.wrong(where, line, "text")
            continue
        if name not in lines:  # check_names has noted it
            continue
        known = sorted(set(re.findall(r"\{(\w+)\}", lines[name])))
        lines[name] = line
        try:
            # A placeholder gets a text or a number: its format must suit both.
            line.format_map(dict.fromkeys(known, ""))
            line.format_map(dict.fromkeys(known, 0))
        except KeyError as error:
            names = ", ".join(f"{{{name}}}" for name in known) or "no braces"
            found = f"{{{error.args[0]}}}"
            mistakes.add(where, FOUND, found=found, expected=names)
        except (ValueError, LookupError, AttributeError) as error:
            mistakes.add(where, "{name}: wrong braces: {why}", why=error)
    return Texts(lines)


# What an HTTP header may be called, but for those that describe the request's body.
HEADER_NAME = r"(?i)(?!content-|transfer-)[!#$%&'*+.^_`|~0-9a-z-]+"


def is_http_url(url: str) -> bool:
    """Say whether a URL is http(s) and a host, maybe with a port and a path."""
    try:
        port = urllib.parse.urlsplit(url).port
    except ValueError:  # not a number, or above 65535
        return False
    host = r"(\[[\da-fA-F:.]+\]|[\w-]+(\.[\w-]+)*\.?)"
    pattern = rf"https?://{host}(:\d+)?(/[^\s?#]*)?"
    return port != 0 and re.fullmatch(pattern, url) is not None


def check_assistant(
    name: str,
    one: AssistantSettings,
    others: Set[str],
    environ: Mapping[str, str],
    wrong: Callable[[str, object, str], None],
) -> None:
    """Note values of an assistant that cannot work."""
    where = f"assistants.{name}"
    if not name or re.search(r"[\s/]", name):
        wrong(where, name, "a name without spaces and slashes")
    # Without a user's name and the query, which only the API reads.
    url = re.sub("//[^/@]*@", "//", one.base_url.strip().partition("?")[0])
    if not is_http_url(url):
        source = setting_source(name, "base_url", one, environ)
        wrong(source, one.base_url, "an http(s) URL")
    key = one.api_key.strip()
    if not re.fullmatch(r"[!-~]+", key):  # it goes into a header
        source = setting_source(name, "api_key", one, environ)
        wrong(source, key and MASK, "the key of the API, without blanks")
    if not re.fullmatch(r"(?s)\S(.*\S)?", one.model):
        wanted = "the name of a model, without blanks around it"
        wrong(f"{where}.model", one.model, wanted)
    for header, content in one.headers.items():
        if not re.fullmatch(HEADER_NAME, header):
            wrong(f"{where}.headers", header, "names of further HTTP headers")
        if not re.fullmatch(r"[!-~]([ -~]*[!-~])?", content):
            wanted = "one line of letters, digits and signs"
            wrong(f"{where}.headers.{header}", MASK, wanted)
    proxy = re.sub(r"^(https?|socks[45]h?)://([^/]*@)?", "http://", one.proxy)
    if proxy and not is_http_url(proxy):
        wrong(f"{where}.proxy", "***", "an http, https or socks URL")
    elif proxy and one.proxy.startswith("socks"):
        if not importlib.util.find_spec("aiohttp_socks"):
            wanted = "http(s), or socks after: pip install aiohttp-socks"
            wrong(f"{where}.proxy", "***", wanted)
    if one.fallback and one.fallback not in others:
        wrong(f"{where}.fallback", one.fallback, "another assistant's name")
    for own in ("model", "messages", "stream"):
        if own in one.extra:
            wrong(f"{where}.extra.{own}", one.extra[own], "anything but this key")
    try:
        json.dumps(one.extra, allow_nan=False)
    except (TypeError, ValueError):  # a date, nan
        wanted = "what JSON has: texts, numbers, true, lists, tables"
        wrong(f"{where}.extra", MASK, wanted)


def check_values(
    config: Config, environ: Mapping[str, str], mistakes: Mistakes
) -> None:
    """Note values that cannot work."""
    wrong, server, wechat = mistakes.wrong, config.server, config.wechat
    url = config.public_url
    if not is_http_url(url):
        wrong("public_url", url, "http:// or https:// and a host")
    if url.endswith(server.path.rstrip("/") or "//"):
        wrong("public_url", url, "the address without the path of server.path")
    address = r"(?a)[\w.-]*|[\da-fA-F.]*(:[\da-fA-F.]*){2,}(%\w+)?"
    if not re.fullmatch(address, server.host):
        wrong("server.host", server.host, "an address like 127.0.0.1 or 0.0.0.0")
    if not re.fullmatch(r"(?a)(?!/(me|healthz)\b)(/[\w.~-]+)+/?", server.path):
        wrong("server.path", server.path, "a path like /wechat")
    folder = server.root_files
    if folder and not (os.access(folder, os.X_OK) and os.path.isdir(folder)):
        wrong("server.root_files", folder, "a folder that can be read")
    if not re.fullmatch(r"[A-Za-z0-9]{3,32}", wechat.token):
        wrong("wechat.token", wechat.token and "***", "3 to 32 letters and digits")
    # Not the account's original id, nor AppSecret, which stand beside it.
    if re.fullmatch(r"gh_\w*|[0-9a-f]{32}|.*\s.*", wechat.app_id):
        found = wechat.app_id if wechat.app_id.startswith("gh_") else "***"
        wrong("wechat.app_id", found, "wx and 16 letters and digits")
    if bool(wechat.app_id) != bool(wechat.aes_key):
        found = "only app_id" if wechat.app_id else "only aes_key"
        wrong("wechat.aes_key", found, "app_id and aes_key, or neither")
    if not re.fullmatch(r"([A-Za-z0-9]{43})?", wechat.aes_key):
        words = "{name}: found {count} characters, expected {expected}"
        values = {"count": len(wechat.aes_key), "expected": "43 letters and digits"}
        mistakes.add("wechat.aes_key", words, **values)
    for name, one in config.assistants.items():
        others = config.assistants.keys() - {name}
        check_assistant(name, one, others, environ, wrong)


def load_config(
    path: str | os.PathLike,
    environ: Mapping[str, str] = types.MappingProxyType({}),
    *checks: Callable[[Config, Mistakes], None],
) -> Config:
    """Return the checked settings of a TOML file; raise ConfigError with all mistakes.

    `checks` are further ones, which know more than this section.
    """
    table, mistakes = read_toml(path), Mistakes()
    assistants = table.get("assistants", {})
    table["assistants"] = read_assistants(assistants, environ, mistakes)
    table["texts"] = read_texts(table.get("texts", {}), mistakes)
    config = read_table(Config, table, "", mistakes)
    folder = environ.get("STATE_DIRECTORY", "").split(":")[0]
    if not folder and os.path.isdir("/var/lib/wxgpt"):
        folder = "/var/lib/wxgpt"
    database = config.database.path or str(pathlib.Path(folder) / "wxgpt.db")
    notice = config.replies.model_notice or config.texts.model_notice
    config = replace(
        config,
        texts=Texts(vars(config.texts) | {"model_notice": notice}),
        public_url=config.public_url.rstrip("/"),
        database=DatabaseSettings(path=database),
    )
    check_values(config, environ, mistakes)
    for check in checks:
        check(config, mistakes)
    if mistakes.lines:
        error = ConfigError()
        error.lines = [*mistakes.lines.values()]
        raise error
    return config


def effective_settings(config: Config) -> Iterator[str]:
    """Yield the settings for the log, without secrets or the default prompt."""
    yield f"public_url={config.public_url}"
    names = ("server", "wechat", "session", "limits", "history", "database")
    tables = [(name, getattr(config, name)) for name in names]
    tables += [(f"assistants.{name}", one) for name, one in config.assistants.items()]
    for name, table in tables:
        line = f"[{name}]"
        for entry in fields(table):
            value = getattr(table, entry.name)
            shown = "***" if value and "secret" in entry.metadata else repr(value)
            line += f" {entry.name}={shown}" if value != DEFAULT_PROMPT else ""
        yield line


# ---------------------------------------------------------------------------
# 3. WeChat protocol
#
# Signatures, pushes and replies: bytes to records and back, no I/O. Facts are from
# developers.weixin.qq.com, 消息与事件推送 and 被动回复用户消息.
# ---------------------------------------------------------------------------


class BadMessage(Exception):
    """A signed body that cannot be read; answering `success` ends WeChat's retries."""


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
    caption: str = ""  # title and summary of an article, or the name of a place

    @property
    def key(self) -> str:
        """Return what every attempt of this message has in common, and no other has."""
        if self.msg_id:
            return f"{self.openid} {self.msg_id}"
        return f"{self.openid} {self.created} {self.event} {self.event_key}"

    @property
    def name(self) -> str:
        """Return its name in the log: MsgId or event, and the start of the openid."""
        return f"msg={self.msg_id or self.event or '-'} from={self.openid[:8]}"


def signature_of(token: str, *values: str) -> str:
    """Return WeChat's signature (消息与事件推送): the SHA-1 of the values, sorted."""
    joined = b"".join(sorted(v.encode("utf-8", "replace") for v in (token, *values)))
    return hashlib.sha1(joined).hexdigest()


def is_signed(token: str, signature: str, *values: str) -> bool:
    """Say whether the signature of the values is right, in constant time."""
    expected = signature_of(token, *values).encode()
    return hmac.compare_digest(expected, signature.encode("utf-8", "replace"))


MARKS_IN_A_ROW = 30  # combining ones: Unicode's stream-safe format (UAX #15)
LATE_MARKS = "\u0f73\u0f75\u0f81\uff9e\uff9f"  # become marks when they are normalised
RARE_RUN = re.compile(f"[^\0-\u02ff\u3100-\u9fff\uac00-\ud7a3]{{{MARKS_IN_A_ROW},}}.")


def stream_safe(text: str) -> str:
    """Return text without the combining marks beyond the 30th in a row.

    To normalise them is to sort them, which takes the square of their number.
    """

    def shorter(run: re.Match[str]) -> str:
        kept, marks = [], 0
        for char in run[0]:
            is_mark = unicodedata.combining(char) or char in LATE_MARKS
            marks = marks + 1 if is_mark else 0
            if marks <= MARKS_IN_A_ROW:
                kept.append(char)
        return "".join(kept)

    return RARE_RUN.sub(shorter, text)


def find_encrypted(body: bytes) -> str:
    """Return the encrypted part of a push in safe mode, without parsing; '' if none."""
    # The last one: in 兼容模式 what a subscriber wrote stands before it.
    _, tag, rest = body.rpartition(b"<Encrypt>")
    value = rest.partition(b"</Encrypt>")[0].strip() if tag else b""
    value = value.removeprefix(b"<![CDATA[").removesuffix(b"]]>")
    return value.decode(errors="replace")


def parse_message(body: bytes) -> Message:
    """Return the message of a push in plain mode; raise BadMessage."""
    # Control characters that a subscriber pasted arrive as they are.
    readable = ILLEGAL.sub("", body.decode("utf-8", "ignore"))
    try:
        xml = xmltodict.parse(readable).get("xml")
    except (ExpatError, ValueError) as error:
        raise BadMessage(f"not readable as XML: {error}") from None
    if not isinstance(xml, dict):
        raise BadMessage("no fields inside <xml>")
    root = {  # cleaned again: a reference (&#xFDD0;) may stand for any character
        name: stream_safe(ILLEGAL.sub("", value))
        for name, value in xml.items()
        if isinstance(value, str)
    }
    if "FromUserName" not in root and "Encrypt" in root:
        raise BadMessage("encrypted, but app_id and aes_key are not set")
    if not all(map(root.get, ("FromUserName", "ToUserName", "MsgType"))):
        raise BadMessage("no FromUserName, ToUserName or MsgType")
    created = root.get("CreateTime", "")
    captions = map(root.get, ("Title", "Description", "Label"))
    return Message(
        openid=root["FromUserName"],
        account=root["ToUserName"],
        msg_type=root["MsgType"].lower(),
        created=int(created) if re.fullmatch(r"[0-9]{1,12}", created) else 0,
        msg_id=root.get("MsgId", ""),
        content=root.get("Content", ""),
        event=root.get("Event", "").lower(),
        event_key=root.get("EventKey", ""),
        picture_url=root.get("PicUrl", ""),
        caption="\n".join(filter(None, captions)),
    )


class Cipher:
    """Opens and seals the envelope of safe mode (消息加解密说明).

    Inside it are 16 bytes of salt, a length, the XML and the AppID, padded to 32 bytes
    and encrypted with AES-256-CBC.
    """

    def __init__(self, token: str, app_id: str, aes_key: str) -> None:
        from cryptography.hazmat.primitives import ciphers, padding  # slow to import

        self.token, self.app_id = token, app_id.encode()
        # The 43rd character may have two bits too many, which b64decode ignores.
        self.key = key = base64.b64decode(aes_key + "=")
        self.aes = ciphers.Cipher(
            ciphers.algorithms.AES(key), ciphers.modes.CBC(key[:16])
        )
        self.padding = padding.PKCS7(256)

    def open(self, encrypted: str) -> bytes:
        """Return the XML of a push whose signature was checked; raise BadMessage."""
        decryptor, unpadder = self.aes.decryptor(), self.padding.unpadder()
        try:
            sealed = base64.b64decode(encrypted, validate=True)
            padded = decryptor.update(sealed) + decryptor.finalize()
            plain = unpadder.update(padded) + unpadder.finalize()
        except ValueError as error:
            words = f"cannot be decrypted, is aes_key right? {error}"
            raise BadMessage(words) from None
        end = 20 + int.from_bytes(plain[16:20], "big")
        if len(plain) < 20 or end > len(plain):
            raise BadMessage("a wrong length inside the encrypted push")
        if not hmac.compare_digest(plain[end:], self.app_id):
            raise BadMessage("encrypted for another AppID, is app_id right?")
        return plain[20:end]

    def seal(self, body: bytes, created: int) -> bytes:
        """Return the envelope of a reply, the same bytes for every attempt."""
        salt = hmac.digest(self.key, body, "sha256")  # hence not random
        plain = salt[:16] + len(body).to_bytes(4, "big") + body + self.app_id
        encryptor, padder = self.aes.encryptor(), self.padding.padder()
        padded = padder.update(plain) + padder.finalize()
        encrypted = encryptor.update(padded) + encryptor.finalize()
        sealed = base64.b64encode(encrypted).decode()
        nonce, timestamp = salt.hex()[:10], str(created)
        signature = signature_of(self.token, timestamp, nonce, sealed)
        return (
            f"<xml><Encrypt><![CDATA[{sealed}]]></Encrypt>"
            f"<MsgSignature><![CDATA[{signature}]]></MsgSignature>"
            f"<TimeStamp>{timestamp}</TimeStamp>"
            f"<Nonce><![CDATA[{nonce}]]></Nonce></xml>"
        ).encode()


# The content of a reply that hands a text to WeChat's own AI (转接AI回复). `outgoing`
# takes the character out of all others.
WECHAT_AI = "\ufdd3"


def render_text_reply(message: Message, content: str, created: int) -> bytes:
    """Return the passive reply's body: XML, or `success` for an empty content."""
    if not content:
        return SUCCESS  # WeChat shows its error text for an empty Content
    values = (message.openid, message.account, content)
    openid, account, text = (one.replace("]]>", "]]]]><![CDATA[>") for one in values)
    if content == WECHAT_AI:
        kind = "<MsgType><![CDATA[transfer_biz_ai_ivr]]></MsgType>"
    else:
        kind = "<MsgType><![CDATA[text]]></MsgType>"
        kind += f"<Content><![CDATA[{text}]]></Content>"
    return (
        f"<xml><ToUserName><![CDATA[{openid}]]></ToUserName>"
        f"<FromUserName><![CDATA[{account}]]></FromUserName>"
        f"<CreateTime>{created}</CreateTime>{kind}</xml>"
    ).encode()


# --- Links and sizes
#
# A link of ours (web_link; tap_link, which sends words) is made of characters nobody
# else can write, until `outgoing` writes it as the HTML that WeChat reads, and breaks
# whatever else looks like a link. with_links and with_taps make those in owners' lines.

LINK_BEGIN, LINK_WORDS, LINK_END = "\ufdd0", "\ufdd1", "\ufdd2"
OUR_LINK = re.compile(
    f"{LINK_BEGIN}([^\ufdd0-\ufdd2]*){LINK_WORDS}([^\ufdd0-\ufdd2]*){LINK_END}"
)
ANCHOR = re.compile(r"""(?is)<a\s[^<>]*?href=(["'])(.*?)\1[^<>]*>(.*?)</a>""")


def web_link(words: str, url: str) -> str:
    """Return a link that opens a page; `outgoing` writes it as WeChat reads it."""
    return f"{LINK_BEGIN}{url}{LINK_WORDS}{words}{LINK_END}"


def with_links(text: str) -> str:
    """Return a text of the owner's with its HTML links as links of ours."""
    return ANCHOR.sub(lambda link: web_link(link[3], link[2]), text)


def outgoing(text: str) -> str:
    """Return a reply's text as it is sent: our own links in it, and no others.

    Nothing is removed or decoded after this gate, which could join others' characters
    to a link.
    """
    sent = []
    for at, piece in enumerate(OUR_LINK.split(text)):  # a text, URL, words, a text ...
        legal = ILLEGAL.sub("", piece)
        no_link = re.sub(r"(?i)<(?=/?a)", "<\u200b", legal)
        if at % 3 == 0:
            sent.append(no_link)
        elif at % 3 == 1:
            sent.append(f'<a href="{legal}">')
        else:
            sent.append(f"{no_link}</a>")
    return "".join(sent)


def size_of(text: str) -> int:
    """Return the size of a text as WeChat counts it: in bytes of UTF-8."""
    return len(text.encode())


def sent_size(text: str) -> int:
    """Return the size that a text has when it is sent."""
    return len(outgoing(text).encode())


def excerpt(text: str, length: int = 12) -> str:
    """Return the beginning of a text as one line."""
    line = " ".join(text.split())
    return line if len(line) <= length else line[:length] + "…"


def sent_by_tap(words: str) -> str:
    """Return what a tap sends of words: Android decodes them twice, and these last."""
    return re.sub(r"[^\w()./_-]", "", words)


def tap_link(words: str, content: str = "") -> str:
    """Return a link that sends `content`, or else its words, for the subscriber.

    Android ignores a link whose msgmenuid is empty.
    """
    sent = sent_by_tap(content or words)
    return web_link(words, f"weixin://bizmsgmenu?msgmenucontent={sent}&msgmenuid=1")


@functools.lru_cache
def with_taps(text: str, *names: str) -> str:
    """Return one of our own texts with each `/NAME` in it as a tap."""
    text = with_links(text)
    longest_first = sorted(map(re.escape, names), key=len, reverse=True)
    pattern = rf"(?<![\w/\"'=.>{LINK_WORDS}])/(?:{'|'.join(longest_first)})(?![\w/.])"
    # ASCII, so that \w is no Chinese character: Chinese puts no spaces around a name.
    flags = re.ASCII | re.IGNORECASE
    return re.sub(pattern, lambda match: tap_link(match[0]), text, flags=flags)


# ---------------------------------------------------------------------------
# 4. Formulas
#
# Rewriting rules reduce LaTeX to a smaller LaTeX. One pass over its tokens turns that
# into pieces of text, which are joined with the brackets and spaces that keep the
# meaning. Anything unknown raises ValueError, and the formula is shown as written.
# pages/formulas.toml has the rules and the commands. latex2mathml names the symbols and
# writes the pages' MathML; it is never given what was refused here.
# ---------------------------------------------------------------------------

FORMULA_TABLES = HERE / "pages" / "formulas.toml"
SUPERSCRIPTS = str.maketrans(
    "0123456789+−-=()abcdefghijklmnoprstuvwxyzABDEGHIJKLMNOPRTUVW′∘",
    "⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁻⁼⁽⁾ᵃᵇᶜᵈᵉᶠᵍʰⁱʲᵏˡᵐⁿᵒᵖʳˢᵗᵘᵛʷˣʸᶻᴬᴮᴰᴱᴳᴴᴵᴶᴷᴸᴹᴺᴼᴾᴿᵀᵁⱽᵂ′°",
)
SUBSCRIPTS = str.maketrans(
    "0123456789+−-=()aehijklmnoprstuvx", "₀₁₂₃₄₅₆₇₈₉₊₋₋₌₍₎ₐₑₕᵢⱼₖₗₘₙₒₚᵣₛₜᵤᵥₓ"
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


@functools.cache
def formula_rules() -> dict[str, Any]:
    """Return the tables of formulas.toml, which explains them; raise ConfigError."""
    return read_toml(FORMULA_TABLES)


def bracket_if_needed(text: str) -> str:
    """Put a text in brackets if a slash beside it would take only a part of it."""
    return text if ONE_SIGN.fullmatch(text) else f"({text})"


MAX_SCRIPT_CHARS = 200  # or each script around it would go through it again


def script_text(mark: str, script: str, base: str) -> str:
    """Write a script in small characters if all have one, else after its mark."""
    small = SUPERSCRIPTS if mark == "^" else SUBSCRIPTS
    base = re.sub(r"([_^])(.)$", r"\1(\2)", base)  # v_y^2 is not v_(y²)
    has_script = not set(small.values()).isdisjoint(map(ord, base))
    if mark in base or has_script and base[-1] not in ")]|":
        base = f"({base})"  # {x^2}^3
    if len(script) > MAX_SCRIPT_CHARS:
        return f"{base}{mark}({script})"
    script = re.sub(r" ?([^\w\s]) ?", r"\1", script)
    if all(ord(char) in small for char in script):
        return base + script.translate(small)
    is_closed = len(script) == 1 or re.fullmatch(IN_BRACKETS, script)
    return base + mark + (script if is_closed else f"({script})")


def over_text(over: str, under: str) -> str:
    """Write words over a sign: in an arrow (—Δ→), beside others as a power."""
    form = formula_rules()["over"].get(under)
    return form.format(over) if form else script_text("^", over, under)


def fraction_text(over: str, under: str) -> str:
    """Write a fraction so that its parts cannot be read otherwise."""
    is_derivative = DIFFERENTIAL.fullmatch(over) and DIFFERENTIAL.fullmatch(under)
    if not is_derivative:
        over, under = bracket_if_needed(over), bracket_if_needed(under)
    return f"{over}/{under}"


def root_text(index: str, radicand: str) -> str:
    """Write a root; an index other than 2, 3 and 4 stands in square brackets."""
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


def symbol_text(name: str) -> str:
    """Return the character that a command stands for; raise ValueError if none."""
    from latex2mathml.symbols_parser import convert_symbol  # slow, so not at start

    code = convert_symbol("\\" + name) or ""
    char = chr(int(code, 16) if code.isalnum() else 0)
    if unicodedata.category(char)[0] in "MCZ" or char in "√\\":
        raise ValueError(f"unknown command {name}")
    return char


@functools.cache
def formula_commands() -> dict[str, tuple[str, Callable[..., str], str]]:
    """Return what each command reads, what writes that, and its kind of piece.

    It reads a letter an argument: m is mathematics, M may have lines, o may be left out
    and stands in square brackets, t is words.
    """
    rules = formula_rules()
    commands: dict[str, tuple[str, Callable[..., str], str]] = {
        "frac": ("mm", fraction_text, "fraction"),
        "sqrt": ("om", root_text, "root"),
        "overset": ("mm", over_text, ""),
        "substack": ("M", lambda lines: lines.replace("\n", ", "), ""),
        "underset": ("mm", functools.partial(script_text, "_"), ""),
        "overbrace": ("m", bracket_if_needed, ""),
        "not": ("m", lambda s: unicodedata.normalize("NFC", s + "\u0338"), "symbol"),
    }
    for name, (arguments, text, kind) in rules["commands"].items():
        commands[name] = arguments, text.format, kind
    for name in rules["names"].split():
        commands[name] = "", name.format, "name"
    for name, accent in rules["accents"].items():
        commands[name] = "m", functools.partial(accented_text, accent), ""
    return commands


@dataclass(frozen=True, slots=True)
class Piece:
    """A sign or a whole construct of a formula, as text."""

    text: str
    kind: str = ""  # name, large, symbol, fraction, root, box, or a plain sign
    space: str = ""  # before it: " " is a blank of the source, "~" a space command


# What may stand before or after a fraction without brackets, as characters of a class.
SEPARATORS = r"\s*=+−±·×<>≤≥≠≈≡∼→⇒⇔∈,.;:|，。；：、\u3400-\u9fff"
CLEAR_BEFORE = re.compile(rf"$|[{SEPARATORS}(\[{{⌊⌈⟨‖]")
CLEAR_AFTER = re.compile(rf"$|[{SEPARATORS})\]}}⌋⌉⟩‖]")


def needs_brackets(before: Piece, piece: Piece, after: Piece) -> bool:
    """Say whether a fraction, root or box could be misread with its neighbours."""
    joins_next = not CLEAR_AFTER.match(after.text)
    if piece.kind == "root":
        return piece.text[-1] != ")" and joins_next
    last = before.text[-1:]
    joins_last = before.kind != "large" and not CLEAR_BEFORE.match(last)
    is_term = piece.kind == "box" and last in tuple("+−·×")
    return joins_last or is_term or joins_next


def needs_space(text: str, before: Piece, piece: Piece) -> bool:
    """Say whether a space belongs between a text and the piece that comes next."""
    is_factor = re.match(r"[^\W\u3000-\u9fff]|[√∛∜∑∫∞]", piece.text) is not None
    if before.kind == "name":
        return is_factor or piece.space != "" and piece.text[0] not in "([|"
    if before.kind == "large" or piece.kind == "name" and re.search(r"[\w)]$", text):
        return True
    if before.kind == "symbol" and piece.space == " ":  # perhaps just the command's end
        return not is_factor if text[-1].isalpha() else text[-2:-1] == " "
    return piece.space != "" or is_factor and bool(re.search(r"[_^].$", before.text))


def render_pieces(pieces: list[Piece]) -> str:
    """Write pieces one after another, with the brackets and spaces they need."""
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

    def read_row(self, *ends: str) -> list[Piece]:
        """Read pieces up to one of the end tokens, and take that too."""
        pieces: list[Piece] = []
        space = ""
        while self.tokens[-1] not in ends:
            token = self.tokens[-1]
            if token in LATEX_SPACES or token.isspace():
                self.tokens.pop()
                space = "~" if token in LATEX_SPACES else space or " "
                continue
            new = [] if token in ("^", "_", "'") else self.read_pieces()
            new = [piece for piece in self.read_scripts(new) if piece.text]
            if new:
                pieces += [replace(new[0], space=space or new[0].space), *new[1:]]
                space = ""
        self.end = self.tokens.pop()
        return pieces

    def read_scripts(self, bases: list[Piece]) -> list[Piece]:
        """Add the scripts and primes that follow to what stands before them."""
        scripts = {"_": "", "'": "", "^": ""}
        while self.tokens[-1] in scripts:
            mark = self.tokens.pop()
            if mark != "'" and scripts[mark]:
                raise ValueError("two scripts")
            scripts[mark] += mark if mark == "'" else self.read_argument()
        if not any(scripts.values()):
            return bases
        base = bases[0] if len(bases) == 1 else Piece(render_pieces(bases))
        text = base.text
        if "\n" in text:
            raise ValueError("a script on lines")
        if base.kind == "root":
            text = f"({text})"
        elif text and (base.kind in ("fraction", "box") or len(bases) > 1):
            text = bracket_if_needed(text)
        kind = base.kind if base.kind in ("name", "large") else ""
        for mark, script in scripts.items():
            if mark == "_" and script and text in ("lim", "limsup", "liminf"):
                text, kind = f"{text}({script})", "large"
            elif script:
                text = text + script if mark == "'" else script_text(mark, script, text)
        # a script on nothing must not attach to what stands before it
        return [replace(base, text=text if base.text else " " + text, kind=kind)]

    def read_argument(self, kind: str = "m") -> str:
        """Read one argument of a command as text; formula_commands has its kinds."""
        if kind == "t":
            words = re.sub(r"\\(?:[ ,:;>]|q?quad)|~|\s+", " ", self.read_source())
            if re.search(r"\\[^%&_#{}$]|(?<!\\)\$", words):
                raise ValueError("mathematics among words")
            return re.sub(r"\\([%&_#{}$])|[{}]", r"\1", words)
        if kind == "o":
            if self.tokens[-1] != "[":
                return ""
            self.tokens.pop()
            return render_pieces(self.read_row("]"))
        text = render_pieces(self.read_pieces()).strip()
        if "\n" in text and kind != "M":
            raise ValueError("lines inside a line")
        return text

    def read_source(self) -> str:
        """Return the source of one argument in braces."""
        if self.take_sign() != "{":
            raise ValueError("no braces")
        taken, depth = [], 1
        while depth:
            taken.append(self.tokens.pop())
            depth += {"{": 1, "}": -1}.get(taken[-1], 0)
        return "".join(taken[:-1])

    def read_pieces(self) -> list[Piece]:
        """Read one sign, group or command with its arguments."""
        self.depth += 1
        if self.depth > MAX_FORMULA_NESTING:
            raise ValueError("nested too deep")
        token = self.take_sign()
        name = formula_rules()["same"].get(token[1:], token[1:])
        if token in ("{", "$"):  # a bare tabular holds words and $
            pieces = self.read_row("}" if token == "{" else "$")
        elif token in tuple("}&^_#\\"):
            raise ValueError(f"stray {token}")
        elif token[0] != "\\":
            is_minus = token == "-" and self.tokens[-1] != ">"  # "->" is an arrow
            pieces = [Piece("−" if is_minus else token)]
        elif name in formula_commands():
            arguments, write, kind = formula_commands()[name]
            pieces = [Piece(write(*map(self.read_argument, arguments)), kind)]
        elif name == "mathrm":
            pieces = self.read_pieces()
        elif name in formula_rules()["alphabets"]:  # of one letter: ℝ, 𝐯
            pieces = self.read_pieces()
            if len(pieces) == 1 and re.fullmatch("[A-Za-z]", pieces[0].text):
                pieces = [Piece(symbol_text(f"{name}{{{pieces[0].text}}}"))]
        elif name == "begin":
            pieces = [Piece(self.read_environment())]
        else:
            char = symbol_text(name)
            is_large = char in formula_rules()["large_signs"]
            pieces = [Piece(char, "large" if is_large else "symbol")]
        self.depth -= 1
        return pieces

    def read_environment(self) -> str:
        r"""Read \begin{…} … \end{…}: a line a row, but a matrix on one line."""
        # Read its rows.
        name = self.read_source()
        if name == "array":
            self.read_source()  # the alignment of its columns
        rows: list[list[str]] = [[]]
        while True:
            rows[-1].append(render_pieces(self.read_row("&", "\\\\", "\\end")).strip())
            if self.end == "\\end":
                break
            if self.end == "\\\\":
                rows.append([])
        if self.read_source() != name:
            raise ValueError("the end of another environment")
        # Lay them out.
        rows = [row for row in rows if any(row)]
        gap = ", " if any(" " in cell for row in rows for cell in row) else " "
        if name == "align*":  # equations side by side, each in two cells
            gap = ""
            for row in rows:
                row[1::2] = [re.sub("^(?=. )", " ", cell) for cell in row[1::2]]
                row[2::2] = ["  " + cell for cell in row[2::2]]
        elif name == "cases":  # "value, condition", or the two sides of x &= 1
            for row in rows:
                line = "{ " + "\t".join(filter(None, row))
                line = re.sub(r"(?<![,，])\t(?=[=<>≤≥]\S)", "", line)
                line = re.sub(r"(?<![,，])\t(?![=<>≤≥≠+−])", ",\t", line)
                row[:] = [line.replace("\t", " ")]
        lines = [re.sub(f"(?:{gap})+$", "", gap.join(row)).rstrip() for row in rows]
        opening, closing, end = formula_rules()["environments"][name]
        text = re.sub("———,? ", "———\n", end.join(lines))  # \hline has its own line
        return opening + text + closing


def rewrite(latex: str, rules: str) -> str:
    """Return LaTeX after the rewrites of that name, one after the other."""
    for pattern, replacement in formula_rules()["rewrites"][rules]:
        latex = re.sub(pattern, replacement, latex, flags=re.A)
    return latex


def simplify_latex(latex: str) -> str:
    """Rewrite LaTeX with fewer commands, in a form that latex2mathml reads."""
    latex = re.sub(
        r"\\ce\s*\{((?:[^{}]|\{[^{}]*\})*)\}",
        lambda reaction: rf"\mathrm{{{rewrite(reaction[1], 'chemistry')}}}",
        latex,
    )
    latex = re.sub(
        r"\\textcircled\s*\{?([1-9])\}?", lambda n: chr(0x245F + int(n[1])), latex
    )
    return rewrite(latex, "latex").strip()


MAX_FORMULA_CHARS = 1500  # fifteen full lines of an aligned block; longest seen: 679


@functools.lru_cache(256)
def formula_text(latex: str) -> str | None:
    """Return a formula as text without markup, or None if its meaning would change."""
    if len(latex) > MAX_FORMULA_CHARS:
        return None
    try:
        plain = rewrite(simplify_latex(latex), "fences")
        text = render_pieces(FormulaReader(plain).read_row(""))
    except (ValueError, LookupError):  # LookupError: it ends too early
        return None
    return text.strip() or None


def formula_mathml(latex: str, is_block: bool) -> str | None:
    """Return a formula as one <math> element, or None if its meaning would change."""
    text = formula_text(latex)
    if text is None:
        return None
    from latex2mathml.converter import Converter

    latex = simplify_latex(latex)
    if latex.count(r"\left") != latex.count(r"\right"):
        latex = rewrite(latex, "fences")
    try:
        converter = Converter(display="block" if is_block else "inline")
        tree = converter.convert_to_element(latex)
    except Exception:  # it breaks in many ways, some of them its own
        return None
    allowed = formula_rules()["mathml"]
    for node in tree.iter():
        reference = r"&#x(10[0-9A-F]{4}|[0-9A-F]{2,5});"  # of a Unicode character
        node.text = re.sub(reference, lambda m: chr(int(m[1], 16)), node.text or "")
        is_strange = "\\" in node.text or ILLEGAL.search(node.text)
        if is_strange or node.tag not in allowed["tags"]:
            return None
        for name in node.attrib.keys() - allowed["attributes"]:
            del node.attrib[name]
    signs = []
    for form in ("".join(tree.itertext()), text.replace("∛", "3").replace("∜", "4")):
        normal = unicodedata.normalize("NFKC", form)
        signs.append(sorted(re.findall(r"[\d\u3400-\u9fff]", normal)))
    if signs[0] != signs[1]:  # the library lost a digit or a Chinese character
        return None
    rendered: str = ElementTree.tostring(tree, encoding="unicode")
    return rendered


# ---------------------------------------------------------------------------
# 5. Chat text
#
# Only what is certain to be markup is changed: a mark that may be text is text, in the
# chat and on the page, which are written from the same markdown-it tokens. What a line
# is, is decided once, when it is complete: so the chat text of a growing answer only
# gets longer, and a part of the answer is a slice of it.
#
# ChatText.feed takes what the model writes. ChatText.text gives it to a MarkdownReader,
# which tells lines apart, and an InlineReader the marks in them; then it writes their
# tokens. An early reply shows that text up to where no mark is open: see `sure`.
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
# Unlike in CommonMark, they must be no operator, no wildcard and no part of a name:
# `2**3`, `单价*数量`, `*.log`, `**kwargs`, `/*…*/`. The patterns match a pair, the sign
# before the mark and the one after it; 字 stands for any CJK letter, x for any other
# letter or digit.

DOUBLE_OPENS = re.compile(  # 字x in `值**3**`; neither xx in `2**3` nor `对** 的`
    r"(?![x_)\]}][x_([{+.=-]).[^ ，。：；！？、）】》」』”’,;:!?)\]}/]"
)
DOUBLE_CLOSES = re.compile(  # :x in `**Note:**text`; neither ,x in `(**a,**b)` nor xx
    r"(?![ （【《「『“‘(\[{<=|/])(?:.[^x_]|[:.!?%\x80-\U0010ffff][x_])"
)
# Of `边长**2+高**2`, `/**…**/`: marks that are both such are text.
DOUBTFUL = re.compile(r"/.|./|[字）】][x_([{+.=-]")
SINGLE_OPENS = re.compile(  # （字 in `（*注*）`; not 字字 in `单价*数量`
    r"[^字x_)\]}）】》”’/\\=+<>^|&%.~-][x字“‘《「『（(\[`$\\\"'—]"
)
SINGLE_CLOSES = re.compile(  # 字字 in `*注*说明`, : and a blank in `*Note:* a`; no xx
    r"[x字。！？….!?)）”’\"'」』】》%℃`$\]>+#:：,，][^字x_/(=\[\\]|[字：。！？]字"
)


def char_class(char: str) -> str:
    """Return the character that stands for a character in these patterns."""
    if char.isspace():
        return " "
    return "字" if CJK.match(char) else "x" if char.isalnum() else char


# --- The marks inside a line

MAX_WINDOW = 4000  # characters read at once, which bounds what a search can cost
MAX_FORMULA_SPAN = 2000  # characters up to its closing mark, or a comment's
MAX_OPENERS = 20  # in a line

EMPHASIS = {"*": ("em",), "**": ("strong",), "***": ("strong", "em"), "~~": ("s",)}
ENTITY = r"&(?:#\d{1,7}|#x[0-9a-f]{1,6}|[a-z][a-z0-9]{1,31});"
# Of a link: words, maybe with a picture, code, escaped signs or brackets in them.
LINK_LABEL = (
    r"(?:!\[[^\[\]\n]*\]\([^()\n]*\)|`[^`\n]*`|\\[^\n]|[^\[\]\n\\]"
    r"|\[[^\[\]\n]*\](?!\())*+"
)
# The first that matches counts; it is read by the method of its name: `read_code`.
INLINE_MARKS = {
    # a line's end, maybe with a backslash that only stands for it
    "newline": r"\n|(?:(?<=[\n，。！？；：、…”’）」』》,!?])"
    rf"|(?<={CJK.pattern}))\\\n",
    # $$x$$  \(x\)  \[x\]  \begin{cases} x \end{cases}  <!-- x -->
    "formula": r"\$\$|\\[(\[]|\\begin\{(?P<environment>\w{1,20}\*?)\}|<!--",
    # \*  \#  and any other
    "backslash": r"\\\\|\\",
    # `x`  ``a ` b``
    "code": r"(?<!`)(?P<ticks>`+)(?!`)(?P<inside>[^\n]{1,1000}?)(?<!`)(?P=ticks)(?!`)",
    # *x*  **x**  ***x***  ＊＊x＊＊  ~~x~~
    "stars": r"\*+|＊+|~~+",
    # $x^2$  $ x = 1 $  in a line, but not `从 $5 涨到 $10`
    "dollars": r"(?<![0-9A-Za-z])\$(?:"
    r"(?![\s$])(?P<latex>(?:\\\$|[^$\n。！？]){0,299}?(?:\\\$|[^\s$\\。！？]))"
    r"|(?<!\d \$)(?P<spaced> [^$\n。！？]{1,298}? ))\$(?![0-9A-Za-z${]|_(?!_))",
    # [words](https://a.cn)  ![a picture](<a b.png> "its title")
    "link": rf"(?P<picture>!?)\[(?P<label>{LINK_LABEL})\]"
    r"(?u:\([ \t]*(?:<(?P<whole>[^<>\n]*)>|(?P<plain>(?:[^\s()<>]++|\([^\s()]*+\))*+))"
    r"(?:[ \t]+(?P<title>\"[^\"\n]*\"|'[^'\n]*'|\([^()\n]*\)))?[ \t]*\))",
    # `x  $x  [x  [x](y  at the end of what there is: may become one of those above
    "unclosed": r"`++(?=.{0,999}+\Z)|(?<![0-9A-Za-z])\$(?=[^\n。！？]{0,999}+\Z)"
    rf"|!?\[(?={LINK_LABEL}(?:!?\[[^\[\]\n]*+)?(?:\](?:\(.*+)?)?\Z)",
    # <https://a.cn/水>  <me@a.cn>  https://a.cn/b_c?d=e
    "url": r"<(?:https?://|mailto:)[^\s<>]+>|<[\w.+-]+@[\w-]+(?:\.[\w-]+)+>"
    r"|https?://[\w./?#%&=+~:;@!$',*()-]+",
    # <br>  <br />  </br>
    "break": r"</?br\s*/?>[ \t]*",
    # <b>  </b>  <p align="center">  <details open>, but not `List<int>`
    "tag": r"<(?P<closes>/?)(?P<name>b|i|u|em|strong|span|div|p|center|font|mark"
    r"|kbd|details|summary|sub|sup)(?:\s+(?:open\b|[\w-]+\s*=\s*(?:\"[^\"]{0,300}\""
    r"|'[^']{0,300}'|[^\s\"'<>=]+)))*\s*/?>",
    # &lt;  &#65;  &#x4e2d;
    "entity": ENTITY,
}
INLINE_MARK = re.compile(
    "|".join(f"(?P<{name}>{pattern})" for name, pattern in INLINE_MARKS.items()),
    re.IGNORECASE | re.ASCII,
)
ADDRESS = re.compile(r"https?://|ftp://|mailto:|tel:|#", re.IGNORECASE)
CLOSERS = {"$": "$", "$$": "$$", "\\(": "\\)", "\\[": "\\]"}
PRICE = re.compile(r"[\d,.]+ *[A-Za-z]{2,}|.*[A-Za-z]{3,} +[A-Za-z]{3,}")
LATEX_SIGN = re.compile(r"\\[A-Za-z]|\^|_\{|_\w")
FORMULA = re.compile(  # not words in brackets
    rf".*(?:{LATEX_SIGN.pattern})|(?!.*{CJK.pattern}).*[\w+=<>-]", re.DOTALL
)
# Between spaces: LaTeX, or single letters among signs, but not a shell's `$ ls`.
SPACED_FORMULA = re.compile(
    r"(?i).*(?:\\[a-z]|[_^]\{).*|(?=.*[a-z])(?:[^a-z\u2e80-\u9fff]|(?<![a-z])[a-z])+"
)
ESCAPE = re.compile(
    r"\\[*_`~$<>|\[\]&!]|(?<![^\W_])\\#|(?<=\b[A-Z])\\#"
    r"|^[ \t]*(?:\\[-+>=]|\d{1,3}\\[.)])",
    re.MULTILINE,
)
# Words with backslashes that are paths, patterns, faces: `D:\_b`, `^\d+\.$`, `¯\_(ツ)`.
WORD_WITH_SIGNS = re.compile(r"[^\s，。：；！？、（）“”…!?]+")
PATH_SIGN = re.compile(
    r"\\[^\W_]|^\\\\|\b[A-Za-z]:\\|\\\W[+?{]|^[\^.¯]+\\|[\\/].*\\$"
    r"|(?<!^\d)(?<!^\d\d)\\\.|\.[*+?]|\[\^"
)
DATA_PICTURE = re.compile(r"data:image/(?:png|jpeg|gif|webp);base64,[A-Za-z0-9+/=]+")


# The HTML tags of tokens, where the two names differ.
HTML_TAGS = {"link": "a", "paragraph": "p", "list_item": "li"}
HTML_TAGS |= {"ordered_list": "ol", "bullet_list": "ul"}
NESTING: dict[str, Any] = {"open": 1, "close": -1}


class TokenReader:
    """What the two readers below share: they turn a text into markdown-it's tokens."""

    is_block: bool  # these tokens are blocks, and not marks inside a line
    tokens: list[Token]

    def add(self, type: str, content: str = "", tag: str = "", **more: Any) -> Token:
        """Add a token, which opens or closes what its type says."""
        name, _, end = type.rpartition("_")
        tag, nesting = tag or HTML_TAGS.get(name, name), NESTING.get(end, 0)
        values = more | {"content": content, "block": self.is_block}
        token = Token(type, tag, nesting, **values)
        self.tokens.append(token)
        return token


@dataclass(slots=True)
class Opener:
    """A mark that is markup if its closing mark comes."""

    mark: str
    index: int  # of its token, which is text until the mark is closed
    end: int  # of the mark, in the text
    is_doubtful: bool


class InlineReader(TokenReader):
    """Reads the marks inside one text, once, from left to right.

    An open mark is text until its closing mark comes. What may yet become markup must
    not be shown: `sure` is how far in the text, and in the tokens, nothing can change
    any more, mostly the last end of a line or sentence at which no mark was open. It
    moves no further once `is_held`: a formula, comment, code or link is open that may
    take in all that follows.
    """

    is_block = False

    def __init__(self, text: str, before: str = "\n", is_whole: bool = True) -> None:
        self.tokens = []
        self.text = before + text  # so positions in it are one higher than in `text`
        self.is_whole = is_whole  # else more of the text may come
        self.openers: list[Opener] = []
        self.line_start = 1
        self.sure = 1, 0
        # Where the line before ends. It is sure when this line ends, too, as a mark is
        # closed on the next line or never; close_mark takes it back if a pair spans it.
        self.line_before = 1, 0
        self.is_held = False
        self.closer = ""  # what closes the formula or comment that is open
        words = WORD_WITH_SIGNS.finditer(self.text) if "\\" in text else ()
        paths = [range(*word.span()) for word in words if PATH_SIGN.search(word[0])]
        self.in_paths = set(itertools.chain(*paths))
        # Where a backslash, the last but one character of a match, escapes the last.
        self.escapes = {found.end() - 2 for found in ESCAPE.finditer(self.text, 1)}
        self.escapes -= self.in_paths

    def open_mark(
        self, mark: str, text: str, end: int, is_doubtful: bool = False
    ) -> None:
        """Add a mark that is text until it is closed."""
        if sum(one.end > self.line_start for one in self.openers) < MAX_OPENERS:
            self.openers.append(Opener(mark, len(self.tokens), end, is_doubtful))
        self.add("text", text)

    def find_open(self, mark: str) -> Opener | None:
        return next((o for o in reversed(self.openers) if o.mark == mark), None)

    def close_mark(self, opener: Opener, *names: str) -> None:
        """Pair an open mark with the one just read; marks open in between are text."""
        if opener.end < self.line_start:  # the line before is not sure without this one
            self.line_before = self.sure
        del self.openers[self.openers.index(opener) :]
        del self.tokens[opener.index]
        for name in reversed(names):
            self.add(f"{name}_open")
            self.tokens.insert(opener.index, self.tokens.pop())
            self.add(f"{name}_close")

    # One method for each mark, which returns where the markup ends, or 0 if it is text.

    def read_newline(self, mark: re.Match[str]) -> int:
        """Read a line's end; a mark may close one line later, but not a single star."""
        if mark.start() in self.in_paths:  # a backslash that is part of a path
            self.add("text", "\\")
        openers = [o for o in self.openers if o.end > self.line_start]
        openers = [o for o in openers if o.mark not in ("*", "＊")]
        here = mark.start(), len(self.tokens)
        if not self.is_held:
            self.sure = max(self.sure, self.line_before if openers else here)
        self.line_before = here
        self.add("softbreak")
        self.openers, self.line_start = openers, mark.end()
        return mark.end()

    def read_stars(self, mark: re.Match[str]) -> int:
        """Read a run of stars, or of two tildes: it closes, opens, or is text."""
        run, begin, end = mark[0], mark.start(), mark.end()
        names = EMPHASIS.get(run.replace("＊", "*"))
        if names is None:
            return 0
        before, after = self.text[begin - 1], self.text[end : end + 1] or "\n"
        pair = char_class(before) + char_class(after)
        is_single, is_doubtful = len(run) == 1, bool(DOUBTFUL.fullmatch(pair))
        closes = SINGLE_CLOSES if is_single else DOUBLE_CLOSES
        opener = self.find_open(run) if closes.fullmatch(pair) else None
        inside = self.text[opener.end : begin] if opener else ""
        is_phrase = bool(inside.strip())
        if is_single:  # may be a footnote's, or an operator: `(*p)*(*q)`
            pairs = ("()", "[]", "（）")
            is_balanced = all(inside.count(p[0]) == inside.count(p[1]) for p in pairs)
            is_phrase = is_balanced and any(char.isalpha() for char in inside)
        if opener and is_phrase and not (opener.is_doubtful and is_doubtful):
            self.close_mark(opener, *names)
        elif (SINGLE_OPENS if is_single else DOUBLE_OPENS).fullmatch(pair):
            self.open_mark(run, run, end, is_doubtful)
        else:
            return 0
        return end

    def read_code(self, mark: re.Match[str]) -> int:
        code = mark["inside"]
        if code.strip() and code[0] == code[-1] == " ":
            code = code[1:-1]
        self.add("code_inline", code, markup=mark["ticks"])
        return mark.end()

    def read_dollars(self, mark: re.Match[str]) -> int:
        latex, spaced = mark["latex"] or "", mark["spaced"] or ""
        is_formula = FORMULA.match(latex) and not PRICE.match(latex)
        if is_formula or LATEX_SIGN.search(latex) or SPACED_FORMULA.fullmatch(spaced):
            self.add("math_inline", latex + spaced, markup="$")
            return mark.end()
        self.add("text", "$")
        return mark.start() + 1

    def read_unclosed(self, mark: re.Match[str]) -> int:
        self.is_held = True
        return 0

    def read_formula(self, mark: re.Match[str]) -> int:
        """Read a formula or a comment; it may go on over lines."""
        opener, inside = mark[0], mark.end()
        kind = "math_inline" if opener == "\\(" else "math_block"
        closer = "-->" if opener == "<!--" else f"\\end{{{mark['environment']}}}"
        closer = CLOSERS.get(opener, closer)
        end = self.text.find(closer, inside, inside + MAX_FORMULA_SPAN)
        latex = self.text[inside:end]
        if end < 0:
            if len(self.text) - inside < MAX_FORMULA_SPAN:
                self.is_held, self.closer = True, self.closer or closer
            return 0
        if mark["environment"]:  # is LaTeX as a whole
            self.add(kind, opener + latex + closer)
        elif opener in CLOSERS and FORMULA.match(latex):
            self.add(kind, latex, markup=opener)
        elif opener in CLOSERS:  # `\[words\]` are brackets, but not in a pattern
            if mark.start() in self.in_paths:
                return 0
            self.add("text", opener.removeprefix("\\"))
            self.escapes.add(end)
            return inside
        return end + len(closer)

    def read_backslash(self, mark: re.Match[str]) -> int:
        if mark.start() not in self.escapes:
            return 0
        self.add("text", self.text[mark.end()])
        return mark.end() + 1

    def read_link(self, mark: re.Match[str]) -> int:
        """Read a link or a picture."""
        url = mark["whole"] or mark["plain"] or ""
        before = char_class(self.text[mark.start() - 1])
        is_picture = mark["picture"] == "!"
        is_path = ":" not in url and re.search("[./]", url)  # not so `arr[0](x.y)`
        is_data = is_picture and url.lower().startswith("data:image/")
        if not (ADDRESS.match(url) or is_path and before not in "x_" or is_data):
            self.add("text", mark["picture"] + "[")
            return mark.start("label")
        inside = InlineReader(mark["label"], before="[").read()
        label = [token for token in inside if token.tag != "a"]  # no link in a link
        if is_picture:
            attrs = {"src": url, "alt": ""}
            self.add("image", mark["label"], attrs=attrs, children=label)
            return mark.end()
        title = {"title": mark["title"][1:-1]} if mark["title"] else {}
        self.add("link_open", attrs={"href": url} | title)
        self.tokens += label
        self.add("link_close")
        return mark.end()

    def read_url(self, mark: re.Match[str]) -> int:
        """Read an address, bare or in angle brackets."""
        url = mark[0].rstrip("*.,;:!?'~")
        while url[-1] == ")" and url.count(")") > url.count("("):
            url = url[:-1].rstrip("*.,;:!?'~")
        end = mark.start() + len(url)
        label = re.sub("(?i)^<(?:mailto:)?|>$", "", url)
        href = label if "://" in label else f"mailto:{label}"
        self.add("link_open", attrs={"href": href}, markup="autolink")
        self.add("text", label)
        self.add("link_close", markup="autolink")
        return end

    def read_entity(self, mark: re.Match[str]) -> int:
        char = html.unescape(mark[0]).replace("\xa0", " ")
        if char in ("", "\r", "\ufffd", mark[0]) or ILLEGAL.search(char):
            return 0
        self.add("text", char)
        return mark.end()

    def read_break(self, mark: re.Match[str]) -> int:
        self.add("hardbreak")
        return mark.end()

    def read_tag(self, tag: re.Match[str]) -> int:
        """Read a tag: markup in a pair, or among tags alone on a line."""
        name = tag["name"].lower()
        before = self.text[: tag.start()].rstrip(" \t")[-1:]
        after = self.text[tag.end() :].lstrip(" \t")[:1]
        is_alone = before in ("\n", ">") and after in ("", "\n", "<")
        opener = self.find_open(name) if tag["closes"] else None
        inside = self.text[opener.end : tag.start()] if opener else ""
        if not tag["closes"] and (after == "<" or not is_alone):
            self.open_mark(name, "" if is_alone else tag[0], tag.end())
        elif not opener or not inside or inside != inside.strip(" "):
            return tag.end() if is_alone else 0
        else:
            self.close_mark(opener, *([name] if name in ("sub", "sup") else []))
        return tag.end()

    def read(self) -> list[Token]:
        """Read all of the text, as far as it can be told by now; return its tokens."""
        begin = 1
        while begin < len(self.text):
            mark = INLINE_MARK.search(self.text, begin)
            end = mark.start() if mark else len(self.text)
            # Before the mark, a sentence that ends is sure if nothing is open.
            if not (self.is_whole or self.openers or self.is_held):
                for found in SENTENCE_END.finditer(self.text, begin, end):
                    self.add("text", self.text[begin : found.end()])
                    begin = found.end()
                    self.sure = begin, len(self.tokens)
            if begin < end:
                self.add("text", self.text[begin:end])
            if not mark:
                break
            begin = getattr(self, f"read_{mark.lastgroup}")(mark)
            if not begin:  # it is text
                self.add("text", mark[0])
                begin = mark.end()
        if self.is_whole:
            self.sure, self.closer = (len(self.text), len(self.tokens)), ""
        return self.tokens


# --- The lines of an answer

MAX_QUOTES = 3  # of a quote in a quote
MAX_COLUMNS = 40
MAX_HEADER = 500  # characters of a table's header: each record repeats it
MAX_CELLS = 4000  # of all tables of an answer; a page of more takes seconds to make

FENCE = re.compile(  # `py`, `js title="a"` and `{r}` are languages, words are not
    r"[ \t]*(?P<mark>`{3,}|~{3,})\s*+(?:(?P<language>[\w+#.:/-]++(?:\s++[^\s`]++"
    r"|[^`={]*+[={][^`]*+)?|\{[^`]*+)\s*|(?P<words>.*))",
    re.ASCII,
)
LATE_FENCE = re.compile(  # after words: `代码如下：` and three backticks
    r"(?<=[:：])[ \t]*(?P<mark>`{3,})(?P<info>[\w+#.-]*)[ \t\r]*\Z", re.ASCII
)
HEADING = re.compile(r"[ \t]*(#{1,6})[ \t]+(\S.*)")
QUOTE = re.compile(r"[ \t]*>(?!>>|=) ?(.*)")
NESTED_QUOTE = re.compile(r"[ \t]*>(?!=) ?(.*)")  # where `>>>` is not Python's prompt
BLOCK_START = re.compile(r"[ \t]*(?:`{3}|~{3}|#{1,6}[ \t]+\S|>(?!>>|=))")
ITEM = re.compile(r"[ \t]*([-*+]|\d{1,3}[.)])[ \t]+(\S.*)", re.ASCII)
HORIZONTAL_RULE = re.compile(r"[ \t]*([-*])(?:[ \t]*\1){2,}[ \t]*")
TASK = re.compile(r"\[([ xX])\][ \t]+(?=\S)")
# After a sign: `- 100 元`, `+ 300 元`, `> 60 分`; neither `2024 年` nor `1. 甲`.
AMOUNT = re.compile(
    r"[约近]?[^\w\s`。！？…!?]{0,3}\d[\d,.]*+(?<!\.)(?! ?[年月日号点时:：、/)）])"
)
CELL_BAR = re.compile(  # a bar, or code and formulas that may hold one
    r"(?<!`)(`++).{1,300}?(?<!`)\1(?!`)|\\\(.{1,300}?\\\)"
    r"|\$(?![\s\d$])[^$]{0,300}[^\s$]\$(?!\w)|\\\||\|"
)
# By how a column's rule begins that ends with a colon.
ALIGNMENTS = {":": "center", "-": "right"}
# Of what can be a table's header: a bar, and no sentence end before it.
TABLE_HEADER = re.compile(rf"(?:[^|。！？…!?.]|(?!{SENTENCE_END.pattern})[^|])*+\|")
TABLE_RULE = re.compile(r"\s*+\|?(?:\s*+:?-++:?\s*+(?:\||\Z))++\s*")


def indent_of(line: str) -> int:
    """Return how many columns a line is indented."""
    line = line.expandtabs(4)
    return len(line) - len(line.lstrip(" "))


def split_cells(line: str) -> list[str]:
    """Return the cells of a table row; bars in code and formulas do not separate."""
    line = line.strip().removeprefix("|")
    line = CELL_BAR.sub(lambda bar: "\0" if bar[0] == "|" else bar[0], line)
    cells = line.removesuffix("\0").split("\0", MAX_COLUMNS)
    return [cell.replace("\\|", "|").replace("\0", "|").strip() for cell in cells]


class MarkdownReader(TokenReader):
    """Reads a growing Markdown text, line by line, into tokens.

    A token that has been added never changes. Besides markdown-it's own there are
    hidden ones, which pages leave out: a blank line of the source, and each line of
    code as soon as it is known.
    """

    is_block = True

    def __init__(self, depth: int = 0) -> None:
        self.tokens = []  # cleared by whoever writes them
        self.depth = depth  # of quotes around it
        self.rest = ""  # the line that is not complete
        self.is_in_line = False  # its beginning has been read, as text
        self.is_first = True  # no line with text has been read
        self.wrapper = ""  # the fence around the whole answer
        self.fence: Token | None = None  # the open code block's
        self.code: list[str] = []  # its lines
        self.quote: MarkdownReader | None = None
        self.lists: list[tuple[int, str]] = []  # indent of the marks; -, *, + or 1
        self.is_after_amount = False  # the last line was a sign and an amount
        self.header = ""  # a line with bars: a table's header if a rule follows
        self.row: str | None = None  # how a row of the open table begins
        self.cells = 0  # of all tables so far
        self.sides: list[str] = []  # how its columns are aligned
        self.paragraph: Token | None = None
        self.pending = ""  # its end, which is not read while a mark in it is open
        self.before = "\n"  # the character before that end
        self.closer = ""  # what closes the formula that is open at a line's end
        self.later_lines = ""  # the lines after that one
        self.is_replay = False  # they are read again: the formula was never closed

    def copy(self, tokens: list[Token]) -> "MarkdownReader":
        """Return a reader that reads on by itself, and adds to these tokens."""
        twin = copy.copy(self)
        twin.tokens, twin.code, twin.lists = tokens, [*self.code], [*self.lists]
        twin.quote = self.quote and self.quote.copy(tokens)
        return twin

    def close_to(self, indent: float = math.inf) -> None:
        """Close the block that is open, and lists that this indent is outside of."""
        if self.paragraph:
            self.read_pending(is_end=True)
            self.add("paragraph_close", hidden=self.paragraph.hidden)
            self.paragraph, self.before = None, "\n"
        elif self.quote:
            self.quote.read("", has_ended=True)
            self.add("blockquote_close")
            self.quote = None
        elif self.fence:
            code, info = "".join(f"{line}\n" for line in self.code), self.fence.info
            self.add("fence", code, info=info, markup=self.fence.markup)
            self.fence, self.code = None, []
        elif self.row is not None:
            self.add("tbody_close")
            self.add("table_close")
            self.row = None
        while self.lists and indent < self.lists[-1][0] + 2:
            _, kind = self.lists.pop()
            self.add("list_item_close")
            self.add("ordered_list_close" if kind == "1" else "bullet_list_close")

    def read_pending(self, is_end: bool = False) -> None:
        """Add what is sure of the paragraph's end; when it ends, all of it."""
        text = self.pending.rstrip() if is_end else self.pending
        tokens: list[Token] = []
        begin, self.closer = 0, ""
        while begin < len(text):
            # A window, which bounds what a search costs; no data picture is split.
            end, at = begin + MAX_WINDOW, begin
            while picture := DATA_PICTURE.search(text, at, end):
                at = text.find(")", picture.end()) + 1
                if not at:
                    end = end if is_end else picture.start()
                    break
                end = max(end, at)
            is_last = end >= len(text)
            reader = InlineReader(text[begin:end], self.before, is_end and is_last)
            read = reader.read()
            sure, count = reader.sure
            self.closer = reader.closer
            if sure == 1 and not is_last and end - begin >= MAX_WINDOW:
                sure, count = end - begin + 1, len(read)  # it never closed
            if sure == 1:
                break
            tokens += read[:count]
            begin += sure - 1
            self.before = text[begin - 1]
            if is_last:
                break
        if begin:
            self.add("inline", text[:begin], children=tokens)
        self.pending = "\n" if is_end else text[begin:]

    def read_text(self, line: str) -> None:
        indent = indent_of(line)
        if not self.paragraph or self.lists and indent < self.lists[-1][0] + 2:
            self.close_to(indent)
            self.paragraph, self.pending = self.add("paragraph_open"), ""
        self.pending += line.lstrip() if self.lists else line

    def read_item(self, line: str, mark: str, content: str, is_after: bool) -> None:
        """Read a list item, or a line that begins with a sign, maybe after another."""
        indent, kind = indent_of(line), "1" if mark[0].isdigit() else mark
        above = [outer for outer in self.lists if outer[0] <= indent] or [(indent, "")]
        is_nested = indent >= above[-1][0] + 2
        is_next = not is_nested and above[-1][1] == kind
        is_amount, task = bool(AMOUNT.match(content)), TASK.match(content)
        if is_next:  # the first line of a list has decided
            is_sign = kind == "+" and is_amount
        else:
            is_plus = kind == "+" and not is_nested and not task
            is_sign = kind in "+-" and (is_amount or is_after or is_plus)
        if is_sign:
            self.read_text(line)
            self.is_after_amount = True
            return
        self.close_to(indent + 2 if is_next else indent)
        if is_next:
            self.add("list_item_close")
        else:
            self.lists.append((indent, kind))
            self.add("ordered_list_open" if kind == "1" else "bullet_list_open")
        item = self.add("list_item_open", info="•")  # as the chat shows it
        if kind == "1":
            item.info, item.attrs = mark, {"value": int(mark[:-1])}
        if BLOCK_START.match(content):
            return self.read_block(" " * (indent + 2) + content)
        if task:
            content = ("☐ " if task[1] == " " else "☑ ") + content[task.end() :]
            item.info = mark if kind == "1" else ""
            item.attrs["class"] = "task"
        self.paragraph, self.pending = self.add("paragraph_open", hidden=True), content

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
            self.fence = self.add("code_begin", info=info, markup=mark, hidden=True)
            self.fence.level = indent  # which its lines lose

    def read_code(self, fence: Token, line: str) -> None:
        found = FENCE.fullmatch(line)
        if found and found["mark"].startswith(fence.markup) and not found["language"]:
            self.close_to()
            if found["words"]:
                self.read_line(found["words"])
            return
        indent = min(fence.level, len(line) - len(line.lstrip(" \t")))
        self.code.append(line[indent:])
        self.add("code_line", line[indent:], hidden=True)

    def add_row(self, tag: str, cells: list[str]) -> None:
        self.cells += len(cells)
        self.add("tr_open")
        for cell, side in itertools.zip_longest(cells, self.sides[: len(cells)]):
            self.add(f"{tag}_open", info=side or "")
            self.add("inline", cell, children=InlineReader(cell).read())
            self.add(f"{tag}_close")
        self.add("tr_close")

    def read_below_header(self, line: str) -> None:
        """Open a table if this line is a rule; otherwise the header was text."""
        header, self.header = self.header, ""
        is_rule = "|" in line and TABLE_RULE.fullmatch(line)
        is_small = len(header) <= MAX_HEADER and self.cells < MAX_CELLS
        if not is_rule or not is_small:
            # It was text; this line is read again, as one below text.
            self.read_text(header)
            self.is_in_line = True  # in the header's, which ends here
            self.read_line("")
            return self.read_line(line)
        self.close_to(indent_of(header))
        self.row = "|" if header.lstrip().startswith("|") else ""
        rules = split_cells(line)
        self.sides = [ALIGNMENTS[cell[0]] if cell[-1:] == ":" else "" for cell in rules]
        self.add("table_open")
        self.add("thead_open")
        self.add_row("th", split_cells(header))
        self.add("thead_close")
        self.add("tbody_open")

    def read_block(self, line: str) -> None:
        """Decide what a line is, and read it."""
        if self.header:
            return self.read_below_header(line)
        if not line.strip():
            self.close_to()
            self.add("blank", hidden=True)
            return None
        is_after_amount, self.is_after_amount = self.is_after_amount, False
        if self.row is not None and "|" in line and line.lstrip().startswith(self.row):
            cells = split_cells(line)
            if self.cells + len(cells) <= MAX_CELLS:
                return self.add_row("td", cells)
        is_nested_quote = self.quote and self.quote.quote
        quote = (NESTED_QUOTE if is_nested_quote else QUOTE).fullmatch(line)
        is_new = not (self.quote or self.depth == MAX_QUOTES)
        if quote and is_new and not AMOUNT.match(quote[1]):  # not `> 60 分`
            self.close_to(indent_of(line))
            self.add("blockquote_open")
            self.quote = MarkdownReader(self.depth + 1)
            self.quote.tokens = self.tokens
        if quote and self.quote:
            return self.quote.read_line(quote[1])
        if self.quote or self.row is not None:
            self.close_to()
        is_first, self.is_first = self.is_first, False
        if fence := FENCE.fullmatch(line):
            self.read_fence(fence, line, is_first)
        elif heading := HEADING.fullmatch(line):
            words = re.sub(r"\s#+$", "", heading[2].rstrip()).rstrip()
            tag = f"h{len(heading[1])}"
            self.close_to(indent_of(line))
            self.add("heading_open", tag=tag)
            self.add("inline", words, children=InlineReader(words).read())
            self.add("heading_close", tag=tag)
        elif HORIZONTAL_RULE.fullmatch(line):
            self.close_to(indent_of(line))
            self.add("hr", tag="hr")
        elif item := ITEM.fullmatch(line):
            self.read_item(line, item[1], item[2], is_after_amount)
        elif TABLE_HEADER.match(line, 0, MAX_HEADER):
            self.header = line
        else:
            self.read_text(line)

    def read_in_formula(self, line: str | None = None) -> None:
        """Read a line inside an open formula, where nothing is Markdown, or the end."""
        self.later_lines += "" if line is None else line + "\n"
        is_end = not (line and line.strip()) or FENCE.match(line) or HEADING.match(line)
        if is_end or len(self.later_lines) > MAX_FORMULA_SPAN:
            # It is never closed, so it is text, and the lines after it are read again.
            self.read_pending(is_end=True)
            lines, self.later_lines, self.is_replay = self.later_lines, "", True
            for later in lines.split("\n")[:-1]:
                self.read_line(later)
            self.is_replay = False
        elif line and self.closer in line:
            self.pending += self.later_lines[:-1]
            self.later_lines, self.closer = "", ""

    def is_settled(self, line: str) -> bool:
        """Say whether an incomplete line is certain to be text or a list item."""
        is_open = self.fence or self.closer or self.header or self.row is not None
        is_sentence = len(line) > MAX_WINDOW or SENTENCE_END.search(line)
        if is_open or not is_sentence or not line.strip(" \t-*"):  # or a rule
            return False
        item = ITEM.fullmatch(line)
        is_block = BLOCK_START.match(item[2] if item else line)
        return not (is_block or TABLE_HEADER.match(line, 0, MAX_HEADER))

    def read_line(self, line: str, is_whole: bool = True) -> None:
        """Read a line, or of one that is not complete as much as is certain."""
        # A heading, quote or row that is too long is read as lines.
        while not (self.is_in_line or self.fence) and len(line) > MAX_WINDOW:
            if self.is_settled(line[: MAX_WINDOW + 1]):
                break
            self.read_line(line[:MAX_WINDOW])
            line = line[MAX_WINDOW:]
        # What is it? That is decided once.
        if not (is_whole or self.is_in_line or self.is_settled(line)):
            self.rest = line
            return
        if self.is_in_line:
            self.pending += line
            self.closer = ""  # it is looked for again
        elif self.closer:
            self.read_in_formula(line)
        elif self.fence:
            self.read_code(self.fence, line)
        else:
            self.read_block(line)
        self.rest, self.is_in_line = "", not is_whole
        # Then its marks are read; those that are open may be closed on the next line.
        if not is_whole:
            self.read_pending()
        elif self.paragraph and not (self.closer or self.pending.endswith("\n")):
            if fence := LATE_FENCE.search(self.pending):
                self.pending = self.pending[: fence.start()]
                return self.read_block(fence[0].strip())
            self.pending += "\n"
            self.read_pending()
            if self.closer and self.is_replay:
                self.read_pending(is_end=True)

    def read(self, text: str, has_ended: bool = False) -> None:
        """Read what has been added to the text; at its end close whatever is open."""
        *lines, rest = (self.rest + ILLEGAL.sub("", text)).split("\n")
        for line in lines:
            self.read_line(line.removesuffix("\r"))
        if rest:
            self.read_line(rest, is_whole=False)
        if has_ended:
            if self.rest or self.is_in_line:
                self.read_line(self.rest.removesuffix("\r"))
            if self.closer:
                self.read_in_formula()
            if self.header:
                self.read_text(self.header)
                self.header = ""
            self.close_to(0)


# --- From tokens to chat text

MAX_HEADING_CHARS = 30  # a longer one is shown as it is
MAX_ROW_CHARS = 20  # of a header whose table is shown in rows
MAX_BLANKS = 10  # newlines in a row
# A reply of nothing but spaces would be empty.
SPACES = re.compile(r"(?<![^\S\n])[^\S\n]{200,}")


def inline_text(children: list[Token]) -> str:
    """Return the chat text of the tokens of a line."""
    out: list[str] = []
    begins: list[tuple[int, str]] = []  # open links: index in `out`, and address
    for child in children:
        match child.type:  # SyntaxError? 需要 Python 3.11 或更新 (Python is too old)
            case "softbreak" | "hardbreak":
                out.append("\n")
            case "image":
                url, label = str(child.attrs["src"]), inline_text(child.children or [])
                shown = f"[图片：{label}] {url}" if label else f"[图片] {url}"
                out.append("[图片]" if url[:5].lower() == "data:" else shown)
            case "math_inline" | "math_block":
                source = child.markup + child.content + CLOSERS.get(child.markup, "")
                text = formula_text(child.content) or source
                if "\n" in text:  # on lines of its own; \v: or a comma ends it
                    text = ("" if re.match(".*=\n", text) else "\n") + text + "\v"
                out.append(text)
            case "s_open" | "s_close":
                out.append("~~")  # without them it would say the opposite
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
                mark, script = "_" if child.tag == "sub" else "^", "".join(out[begin:])
                is_note = script.startswith("[")  # the number of a source
                out[begin:] = [script if is_note else script_text(mark, script, "")]
            case _:
                out.append(child.content)
    return re.sub(r"\v\s*([，。；：、,.;:）)]?)", lambda m: m[1] or "\n", "".join(out))


MAX_UNREAD = 2000  # characters: what is asked for at once takes a few milliseconds
MAX_LEADING = 2000  # characters of such lines in a row
# Lines that no part may end with: headings and list marks go with what follows.
LEADING = re.compile(r"[ │•]*(?:【[^\n【】]*】|\d{1,4}[.)、）]|[•☐☑│])")


class ChatText:
    """The chat text of an answer that is being written; it only gets longer."""

    def __init__(self, markdown: str = "") -> None:
        self.unread = markdown  # read in bulk: the text is rarely asked for
        self.reader = MarkdownReader()
        self.kinds: collections.Counter[str] = collections.Counter()  # of its tokens
        self.shown = ""
        self.out: list[str] = []  # what has been written since
        self.is_empty = True  # nothing has been written
        self.newlines = 0  # before the next text
        self.spaces = ""  # before the next text, if it is on the same line
        self.prefixes: list[str] = []  # of open quotes and items, marks only once
        self.captured: list[str] | None = None  # of a heading, or a row's cells
        self.columns: list[str] = []  # of the table's header
        self.is_wide = False  # the table is written as records
        self.has_rows = False  # below its header
        self.is_code = False  # in a code block, which is not indented
        self.is_hidden = False  # it is a diagram

    def feed(self, delta: str) -> None:
        """Add what the model has written."""
        self.unread += delta
        if len(self.unread) > MAX_UNREAD:  # or too much work would come at once
            self.text()

    def text(self, has_ended: bool = False) -> str:
        """Return the chat text; while the answer grows, the part that is final."""
        # Read and write what has been added. Tokens take far more memory than text.
        for begin in range(0, len(self.unread) + 1, MAX_WINDOW):
            end = begin + MAX_WINDOW
            is_end = has_ended and end > len(self.unread)
            self.reader.read(self.unread[begin:end], is_end)
            for token in self.reader.tokens:
                self.kinds.update([token.type, *(t.type for t in token.children or [])])
                self.write(token)
            self.reader.tokens.clear()
        self.unread = ""
        self.shown += "".join(self.out)
        self.out.clear()
        # Leave out headings and list marks at the end, until something follows them.
        tail = kept = "" if has_ended else self.shown[-2 * MAX_LEADING :]
        while (left_out := len(tail) - len(kept)) < MAX_LEADING:
            above, newline, last = kept.rstrip().rpartition("\n")
            if not LEADING.fullmatch(last):
                return self.shown[: len(self.shown) - left_out]
            kept = above + newline
        return self.shown

    def write(self, token: Token) -> None:
        """Write a token; each but the text inside a block begins a line."""
        if token.type != "inline":
            self.newlines = max(self.newlines, 1)
        match token.type:
            case "inline" if self.captured is not None:
                text = inline_text(token.children or [])
                self.captured.append(text.strip().replace("\n", " "))
            case "inline":
                self.put(inline_text(token.children or []))
            case "blank":
                self.newlines = max(self.newlines, 2)
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
            case "code_begin":
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
                text, self.captured = "".join(self.captured or []).strip(), None
                is_long = len(text) > MAX_HEADING_CHARS
                is_plain = is_long or re.search("[【】《》]|^$", text)
                self.put(text if is_plain else f"【{text}】")
            case "table_open":
                self.columns, self.has_rows = [], False
            case "tr_close":
                cells, self.captured = self.captured or [], None
                self.write_row(cells)
            case "table_close" if self.is_wide and not self.has_rows:
                self.put("｜".join(self.columns))

    def write_row(self, cells: list[str]) -> None:
        """Write a row, or a record of the cells below their columns."""
        if not self.columns:
            self.columns = cells
            self.is_wide = len(cells) > 3 or len("".join(cells)) > MAX_ROW_CHARS
        elif self.is_wide:
            self.newlines = max(self.newlines, 2 if self.has_rows else 1)
            pairs = itertools.zip_longest(self.columns, cells, fillvalue="")
            lines = [f"{a}：{b}" if a and b else b for a, b in pairs]
            lines[0] = f"【{lines[0]}】" if lines[0] else ""
            self.put("\n".join(filter(None, lines)))
            self.has_rows = True
        if not self.is_wide:
            self.put("｜".join(cells))

    def put(self, text: str) -> None:
        """Append text to the current line; white space at line ends is dropped."""
        for index, line in enumerate(text.split("\n")):
            if index:
                self.newlines = max(self.newlines, 1)
            words = line.rstrip()
            if words and (self.newlines or self.is_empty):
                kept = [p for p in self.prefixes if not (self.is_code and p == "  ")]
                newlines = 0 if self.is_empty else self.newlines
                self.out.append("\n" * newlines + "".join(kept))
                self.newlines, self.is_empty, self.spaces = 0, False, ""
                self.prefixes = [p if p == "│ " else "  " for p in self.prefixes]
            if words:
                self.out.append(SPACES.sub(" ", self.spaces + words))
                self.spaces = ""
            self.spaces += line[len(words) :]

    def has_more_on_page(self) -> bool:
        """Say whether the page shows more: code, a table, formulas, pictures, links."""
        shown = {"table_open", "code_begin", "image", "math_inline", "math_block"}
        is_long = self.kinds["heading_open"] >= 2 or self.kinds["link_open"] >= 3
        return is_long or not shown.isdisjoint(self.kinds)


def chat_text(markdown: str) -> str:
    """Return the chat text of a whole answer."""
    return ChatText(markdown).text(has_ended=True)


def stable_text(markdown: str) -> str:
    """Return what may be shown of an answer that grows: no more text changes it."""
    return ChatText(markdown).text()


# --- Cuts

# A line that ends with an abbreviation or a number, not with a sentence.
UNFINISHED = re.compile(r"(?:.*\W)?(?:No|Dr|Mr|Mrs|Ms|St|Prof|Fig|vs|第 ?\d{1,4})\.")
# What a cut does not tear: an address; a record, or a row of a table, that fits.
SHOWN_URL = re.compile(r"https?://[^\s（），。；：！？、】》」』”’]+")
RECORD_OR_ROW = re.compile(
    r"(?:\A|(?<=\n\n))【[^\n]*】(?:\n[^\n：]*+：[^\n]*+)++(?=\n\n|\Z)"
    r"|(?m:^(?!【)[^\n｜]*+｜[^\n]*+$)"
)
# A heading that a cut would tear.
OPEN_HEADING, HEADING_REST = re.compile(r"[ │•]*【[^【】]*"), re.compile(r"[^\n】]*】")
FLAG_LETTERS = "".join(map(chr, range(0x1F1E6, 0x1F200)))  # a flag is two of them
# Joiners and what they bind, colours of skin, the flags of regions.
EMOJI_TAIL = re.compile("(?<=\u200d)|[\u200d🏻-🏿\U000e0020-\U000e007f]")
PAUSE = (  # not where a formula may be
    r"[，、；：](?!\d)|[,;] |(?<=[A-Za-z]{2}) (?=[A-Za-z]{2})"
    rf"|(?<={CJK.pattern})(?={CJK.pattern})"
)
# Where a part may end, best first, each with how much of the room must be filled.
PART_ENDS = [
    (r"\n\n+", 1 / 2),
    (r"\n+", 1 / 3),
    (rf"(?:{SENTENCE_END.pattern}) *", 1 / 4),
    (PAUSE, 1 / 4),
    (r"(?s).(?<!\0(?=\0))", 0.0),  # any character outside what is not torn
]


def is_combining(char: str) -> bool:
    """Say whether a character may merge into the one before: accents, Hangul, kana."""
    first = unicodedata.normalize("NFKD", char)[0]
    return unicodedata.category(first)[0] == "M" or "\u1160" <= first <= "\u11ff"


def may_end(text: str, end: int) -> bool:
    """Say whether a part may end here, where a sentence, a line, a sign is whole."""
    line = text[:end].rstrip().rpartition("\n")[2]
    is_sentence = line != "" and not UNFINISHED.fullmatch(line)
    is_last = is_sentence and not LEADING.fullmatch(line)
    is_in_heading = OPEN_HEADING.fullmatch(line) and HEADING_REST.match(text, end)
    after = text[end : end + 1] or "\n"
    flag_letters = end - len(text[:end].rstrip(FLAG_LETTERS))  # right before the end
    is_in_flag = after in FLAG_LETTERS and flag_letters % 2 == 1
    is_in_sign = is_in_flag or is_combining(after) or EMOJI_TAIL.match(text, end)
    return is_last and not (is_in_heading or is_in_sign)


def cut_text(text: str, room: int) -> int:
    """Return where the part that begins a text ends, at most `room` bytes of UTF-8."""
    most = len(text[:room].encode()[:room].decode(errors="ignore"))
    if most == len(text):
        return most

    def mask(found: re.Match[str]) -> str:
        return "\0" * len(found[0]) if size_of(found[0]) <= room else found[0]

    whole = SHOWN_URL.sub(mask, text[: most + room])
    kept = RECORD_OR_ROW.sub(mask, whole)
    # A heading goes with its record, even if that must be torn.
    texts = dict.fromkeys((kept, whole))
    for masked, (pattern, least) in itertools.product(texts, PART_ENDS):
        ends = [found.end() for found in re.finditer(pattern, masked[: most + 1])]
        for end in reversed(ends):
            if least * most <= end <= most and may_end(masked, end):
                return end
    return most


# --- Blocked words
#
# Words and texts are compared as people read them: in Unicode's compatibility form,
# without case, white space, what has no width or is written over a character, and the
# marks of Markdown.
#
# An answer is looked through twice: WordGuard.feed looks at what the model writes, and
# holds so much of it back that no word is shown in pieces; WordGuard.scan at what chat
# and page show of that, where no link or tag parts a word any more.

IGNORED = re.compile(
    r"[\s\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f"
    r"\u202a-\u202e\u2060-\u206f\ufe00-\ufe0f\ufeff\U000e0000-\U000e0fff*_~`\\"
    r"\x7f-\x9f\ufff9-\ufffb"  # and what is written over a character, or around it:
    r"\u0334-\u0338\u20d2-\u20d3\u20d8-\u20da\u20dd-\u20e0\u20e2-\u20e6\u20ea-\u20eb]"
)
ENTITY_OR_CHARACTER = re.compile(rf"{ENTITY}|.", re.DOTALL | re.IGNORECASE | re.ASCII)
UNFINISHED_ENTITY = re.compile(r"&[^;&]{0,33}\Z")  # none is longer


def comparison_form(text: str) -> str:
    """Return a text in the form in which it and blocked words are compared."""
    text = re.sub(ENTITY, lambda entity: html.unescape(entity[0]), text, flags=re.I)
    normal = unicodedata.normalize("NFKC", stream_safe(text))
    return IGNORED.sub("", normal.casefold())


# What the chat shows and the page does not: addresses, and what stands for its layout.
CHAT_ONLY = re.compile(
    r"（[!-~]{1,4000}）|\[图片：|\] [!-~]{1,4000}|│|(?<=[_^])\(|\^\(?"
)


def clusters(text: str) -> Iterator[str]:
    """Yield each character, or entity, with the marks that change it."""
    cluster = ""
    for sign in ENTITY_OR_CHARACTER.findall(text):
        if len(cluster) > MARKS_IN_A_ROW or cluster and not is_combining(sign):
            yield cluster
            cluster = ""
        cluster += sign
    if cluster:
        yield cluster


INLINE_TAG = re.compile(r"</?(?:a|strong|em|s|code|su[bp]|span|m[a-z]+)\b[^>]*>")


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
        changed = os.stat(self.path).st_mtime_ns if self.path else None
        if changed == self.changed:
            return
        lines = pathlib.Path(self.path).read_text("utf-8-sig").splitlines()
        words = (line for line in lines if not line.lstrip().startswith("#"))
        self.words = set(comparison_form("\0".join(words)).split("\0")) - {""}
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
        return bool(self.words) and self.are_in_form(comparison_form(text))

    def are_in_html(self, shown: str) -> bool:
        """Say whether a page has one of them, not parted by more than inline tags."""
        inline = INLINE_TAG.sub("", shown) if self.words else ""
        return self.are_in(html.unescape(re.sub("<[^>]*>", "|", inline)))

    def are_in_question(self, text: str) -> bool:
        """Say whether a question has one, as it is written or as it would be shown."""
        if not self.words:
            return False
        read = chat_text(text)
        return any(map(self.are_in, (text, read, CHAT_ONLY.sub("", read))))


class WordGuard:
    """Delays a stream just enough that no blocked word is shown in pieces."""

    def __init__(self, blocked: BlockedWords) -> None:
        self.blocked = blocked
        self.tail = ""  # the end of the text: what follows may still combine with it
        # The clusters before it that are held back, each with how it is compared.
        self.held: collections.deque[tuple[str, str]] = collections.deque()
        self.shown_ends = ["", ""]  # of what chat and page show, in comparison form

    def scan(self, shown: str) -> bool:
        """Look through what is newly shown; return whether a blocked word is in it."""
        new = zip(self.shown_ends, (shown, CHAT_ONLY.sub("", shown)), strict=True)
        both = [end + text for end, text in new]  # mostly the same
        forms = {text: comparison_form(text) for text in both}
        self.shown_ends = [forms[text][-self.blocked.longest :] for text in both]
        return any(map(self.blocked.are_in_form, forms.values()))

    def feed(self, delta: str, is_end: bool = False) -> tuple[str, bool]:
        """Return what may be shown now, and whether a blocked word came."""
        is_end |= not self.blocked.words  # the file is empty now: nothing waits
        text = self.tail + delta
        entity = None if is_end else UNFINISHED_ENTITY.search(text)
        settled = list(clusters(text[: entity.start()] if entity else text))
        self.tail = entity[0] if entity else ""
        if settled and not entity and not is_end:
            self.tail = settled.pop()  # it may get an accent
        self.held += [(cluster, comparison_form(cluster)) for cluster in settled]
        form = "".join(form for _, form in self.held)
        if self.blocked.are_in_form(form):
            return "", True
        keep = 0 if is_end else self.blocked.longest
        left, shown = len(form), ""
        while self.held and left - len(self.held[0][1]) >= keep:
            cluster, form = self.held.popleft()
            left -= len(form)
            shown += cluster
        return shown, False


# ---------------------------------------------------------------------------
# 6. Sessions, turns, parts, replies
#
# A Turn is written by one task and read by any number of replies and pages, which wait
# for its Signals. The others are records.
# ---------------------------------------------------------------------------


class Signal(asyncio.Event):
    """Wakes those who wait in Tasks.until, each for a condition of their own."""

    def notify(self) -> None:
        """Let all who wait check their condition; to be called after every change."""
        self.set()
        self.clear()


@dataclass(frozen=True, slots=True)
class Session:
    """A subscriber's conversation with one assistant."""

    id: int
    assistant: str
    last_at: float  # Unix seconds
    is_busy: bool = False  # a question of it is unanswered: it does not end by itself
    lapsed_text: str | None = None  # the newest text that came after it had lapsed


@dataclass(frozen=True, slots=True)
class Part:
    """What one reply shows of an answer: its chat text from `start` on.

    It starts where the part before was cut; its first reply decides where it ends.
    """

    number: int  # 继续N, counted for each subscriber; 0: a question's own reply
    turn_id: int
    start: int = 0  # offset in the chat text
    is_anew: bool = False  # the answer was started over after this part was offered
    reply: str | None = None  # what was sent of it: a second tap gets the same
    place: int = 1  # 1: the answer's first part; 0: not known (an older version's)


@dataclass(frozen=True, slots=True)
class Reply:
    """The decided reply of a message; every request of it gets the same bytes."""

    content: str  # '': `success`, which is not stored
    created: int  # CreateTime
    part: Part | None = None  # what it shows of an answer; None: no model wrote it
    stop: int = 0  # where in the chat text that ends
    offered: Part | None = None  # the part that its tap asks for: the next, mostly
    is_early: bool = False  # neither all that is left nor a full part
    is_patience: bool = False  # it only asks to wait: nothing can be shown yet
    mentions: int | None = None  # a turn whose unread answer is named under it
    introduces: bool = False  # it says who answers here, and the privacy words


@dataclass(frozen=True, slots=True)
class Ending:
    """How a streamed answer ended."""

    finish_reason: str = ""
    model: str | None = None
    tokens_in: int | None = None
    tokens_out: int | None = None


SENTENCE_SIGN = re.compile(r"[。！？…!?.\n]")
TEXT_END = re.compile(rf"\n|{SENTENCE_END.pattern}")


@dataclass(slots=True, eq=False)
class Turn:
    """A question and its answer.

    While it is open there is one object, written by the turn's task alone; of a turn
    that has ended readers make one from its row.

    Its state is `open` until the answer has ended: `done`; `cut` at a limit or by the
    reader; `broken`, off in its midst; `failed`, with no text; `blocked` for a word in
    it; `ended`, never asked as its session ended before.
    """

    # The columns of the view `exchange`, in its order.
    id: int
    session_id: int
    openid: str
    msg_key: str
    link_key: str
    question: str
    pictures: str | None  # JSON list of URLs, until it is answered
    created_at: float
    asked: int  # times a process took it to the upstream; 0: it waits for another
    assistant: str
    answer: str = ""  # Markdown
    state: str = "open"
    # A kind of ChatError; `stopped` by the reader; `given_up` after too many restarts;
    # `trouble`: a mistake of ours.
    reason: str | None = None
    model: str | None = None

    # What the chat shows of the answer, and how it is cut into parts.
    chat: ChatText = field(default_factory=ChatText)
    stops: dict[int, int] = field(default_factory=dict)  # ends of sent parts, by start
    left: dict[int, int] = field(default_factory=dict)  # parts to the end, by start

    # The work on it.
    task: asyncio.Task | None = None  # writes it
    is_queued: bool = False  # the question before it is not answered yet
    calls: int = 0  # requests to upstreams by this process: retries, the fallback
    # Questions and answers of its session, the newest first; None: not read yet.
    context: list[tuple[str, str]] | None = None
    earlier: str | None = None  # what a process before this one wrote, if it asked
    # A random id, new when the answer is started over: then live pages start over, too.
    writing: str = field(default_factory=functools.partial(secrets.token_hex, 4))
    # created_at by the monotonic clock, which does not jump.
    accepted_at: float = field(default_factory=time.monotonic)
    first_seconds: float | None = None  # from then to the first text

    # Those who wait for it.
    news: Signal = field(default_factory=Signal)  # the subscriber's, while it is open
    deltas: Signal = field(default_factory=Signal)  # any change: live pages
    page: "LivePage | None" = None  # what viewers of this writing share

    @property
    def name(self) -> str:
        """Return how the log names this question."""
        return f"turn={self.id} msg={self.msg_key.split()[1]} from={self.openid[:8]}"

    @property
    def is_open(self) -> bool:
        """Say whether it is still being written, or waits to be."""
        return self.state == "open"

    @property
    def extent(self) -> tuple[int, bool]:
        """Return how long the answer is, and whether it has ended."""
        return len(self.answer), not self.is_open

    @property
    def age(self) -> float:
        """Return the seconds since the question."""
        return time.monotonic() - self.accepted_at

    def shown(self) -> str:
        """Return the chat text; of a growing answer what will not change any more."""
        return self.chat.text(has_ended=not self.is_open)

    def read(self) -> "Turn":
        """Read the answer that came with the row, for seconds at worst; return self."""
        self.chat = ChatText(self.answer)
        self.shown()
        return self

    def append(self, delta: str) -> None:
        """Add a delta."""
        if not self.answer:
            delta = delta.lstrip()
            self.first_seconds = round(self.age, 3)
        self.answer += delta
        self.chat.feed(delta)
        # What a reply shows grows with a line or a sentence, not with every token.
        if SENTENCE_SIGN.search(delta):
            self.news.notify()
        self.deltas.notify()

    def restart(self) -> None:
        """Start the answer over; `stops` keeps what was sent of it."""
        self.writing = secrets.token_hex(4)
        self.answer, self.chat, self.page = "", ChatText(), None
        self.deltas.notify()

    def as_sent(self, text: str) -> str:
        """Return the lines and sentences of a text that were sent in replies."""
        sent = max(self.stops.values(), default=0)
        ends = [0, *(found.end() for found in TEXT_END.finditer(text)), len(text)]
        count = bisect.bisect(ends, sent, key=lambda end: len(chat_text(text[:end])))
        return text[: ends[count - 1]]

    def without_thought(self, text: str) -> str:
        """Return what of a text was sent; the rest turned out to be a thought."""
        sent = max(self.stops.values(), default=0)
        kept = self.as_sent(text)
        # What was sent may end in the midst of a mark.
        kept += stable_text(text)[len(chat_text(kept)) : sent]
        return kept and f"{kept}\n\n"

    def finish(self, state: str, reason: str | None = None) -> None:
        """End the answer, and wake all who wait for it."""
        if state == "failed" and self.answer:
            state = "broken"
        self.state, self.reason = state, reason
        self.news.notify()
        self.deltas.notify()


# ---------------------------------------------------------------------------
# 7. Store
#
# SQLite behind one connection of aiosqlite. Each method is one question or one change,
# and its SQL stands in it, or above Store where several share it:
#
#   a message     recall, which knows its sender, too; save_reply, mark_delivered
#   a subscriber  note, mark_read; devices; links to the history
#   a session     start_, end_, touch_session; newest_session, keep_lapsed_text
#   a turn        add_turn and count_asking, which bring what the model gets with it;
#                 questions_of_day, save_texts, begin_anew, finish_turn; what is read
#   a part        part, unsent_part, next_unsent, offer_unread
#   deletion      ask_forget, forget, forget_due; prune
#
# Triggers in schema.sql keep what always goes along with a change. Beside the database
# lies the file NAME-duty, locked by the process that serves: the deletions that are
# promised and not done yet, since the database may be locked or full just then.
# ---------------------------------------------------------------------------

SCHEMA = HERE / "schema.sql"


class StoreError(OwnerError):
    """A database that cannot be used."""


Statement = tuple[str, dict[str, object]]  # SQL and its parameters
Job = list[Statement]  # one transaction, if there are several
BUSY_MILLISECONDS = 2000  # to wait for another process's lock
# A full or locked disk; a value that SQLite cannot hold.
DATABASE_ERRORS = (sqlite3.Error, ValueError, OverflowError)


def run_jobs(
    db: sqlite3.Connection, jobs: list[Job], is_patient: bool = True
) -> list[Any]:
    """Run jobs with one commit; return the rows or the error of each.

    If one fails, nothing was done, and each runs by itself. If another process holds
    the lock, those that only read get their rows, and nobody waits for it again:
    whatever else is to be stored would wait as well.
    """
    # A statement by itself needs no transaction, nor the lock if it only reads.
    is_transaction = len(jobs) > 1 or len(jobs[0]) > 1
    try:
        if not is_patient:
            db.execute("PRAGMA busy_timeout = 0")
        if is_transaction:
            db.execute("BEGIN IMMEDIATE")
        rows = [[db.execute(*one).fetchall() for one in job] for job in jobs]
        if is_transaction:
            db.execute("COMMIT")
        return rows
    except DATABASE_ERRORS as error:
        if len(jobs) == 1:
            return [error]
    finally:
        if db.in_transaction:  # it failed; a full disk may have ended it already
            db.execute("ROLLBACK")
        if not is_patient:
            db.execute(f"PRAGMA busy_timeout = {BUSY_MILLISECONDS}")
    return [run_jobs(db, [job], is_patient=False)[0] for job in jobs]


class Batch:
    """Jobs on their way to the database's thread: all that wait go together.

    A hop to the thread costs ten times a statement and a commit twice, so everything
    that comes while the thread is at work shares the next hop and one commit; see
    docs/benchmark.md. Jobs run in the order given, even if their caller was cancelled,
    and no other statement gets into a job of several.
    """

    def __init__(self, db: aiosqlite.Connection) -> None:
        self.db = db
        self.waiting: list[tuple[Job, asyncio.Future]] = []
        self.is_due = asyncio.Event()  # what waits is to go now
        self.is_closed = False
        self.carrier = asyncio.create_task(self.carry())

    def run(self, job: Job, within: float = 0.0) -> asyncio.Future[list[list]]:
        """Run a job; the rows of its statements come later.

        One that nobody waits for may go with others that come `within` some seconds.
        """
        loop = asyncio.get_running_loop()
        result = loop.create_future()
        self.waiting.append((job, result))
        if within:
            loop.call_later(within, self.is_due.set)
        else:
            self.is_due.set()
        return result

    async def run_at_once(self, job: Job) -> list[list]:
        """Run a job, before those that wait, unless another process holds the lock."""
        [found] = await self.call(run_jobs, [job], False)
        if isinstance(found, Exception):
            raise found
        return found

    async def call(self, function: Callable, *values: object) -> Any:
        """Run a function in the connection's thread, with the connection.

        aiosqlite has no public way to run more than one statement in a hop; a test
        fails if a new version of it does this differently.
        """
        return await self.db._execute(function, self.db._conn, *values)

    async def carry(self) -> None:
        """Take waiting jobs to the thread, and hand out the results, until `close`."""
        while self.waiting or not self.is_closed:
            await self.is_due.wait()
            self.is_due.clear()
            batch, self.waiting = self.waiting, []
            if not batch:
                continue
            try:
                results = await self.call(run_jobs, [job for job, _ in batch])
            except DATABASE_ERRORS as error:  # the connection is closed
                results = [error] * len(batch)
            for (_, result), found in zip(batch, results, strict=True):
                if result.done():  # cancelled
                    continue
                if isinstance(found, Exception):
                    result.set_exception(found)
                else:
                    result.set_result(found)

    async def close(self) -> None:
        """Let all jobs end, then the connection and its thread."""
        self.is_closed = True
        self.is_due.set()
        await self.carrier
        await self.db.close()


class Recalled(NamedTuple):
    """What is stored about a message and its sender."""

    reply: Reply | None = None
    turn_id: int | None = None  # of its question
    session: Session | None = None  # the open one, however long it has been idle
    last_part: int = 0  # the highest part number
    # Part, turn and question of an unread answer.
    mention: tuple[int, int, str] | None = None
    pictures: Sequence[str] = ()  # URLs that wait for a question
    attached: str = ""  # articles and places that wait for it, each after a newline
    is_told: bool = False  # the privacy words were said
    hinted_at: float = 0.0  # the newest hint outside a session, Unix seconds; 0: none
    forget_asked_at: float = 0.0  # for deletion, not confirmed yet; 0: not asked


PICTURE_SECONDS = 600  # how long a picture waits for its question
REPLY_HOURS = 24  # how long a later copy of a message gets the same reply
# How long a session that ran out is mentioned, and what waits for 确认删除 is kept.
LAPSE_SECONDS = 24 * 3600
SOON_SECONDS = 0.1  # how long what nobody waits for stays here: `stats` may look
DEVICES = 5  # that one subscriber may have signed in

Due = dict[str, tuple[str, str]]  # openid: key of the message that asked, its reply
DUTY_BYTES = 4096  # of the file at least: on a full disk some thirty lines have room
LOCK_SECONDS = 12.0  # how long we wait for the process before us, which ends in ten


async def lock_file(file: int, path: str) -> None:
    """Wait until no other process serves a database; raise StoreError if one stays."""
    until = time.monotonic() + LOCK_SECONDS
    while True:
        try:
            return fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > until:
                words = "database {path}: another wxgpt serves it, end that one first"
                raise StoreError(words, path=path) from None
        except OSError as error:
            words = "no lock can be had, see that only one wxgpt serves it"
            log.warning("database %s: %s: %s", path, error.strerror, words)
            return
        await asyncio.sleep(0.1)


def read_due(file: int) -> Due:
    """Return the deletions that a process before this one left undone."""
    due = {}
    for line in os.pread(file, os.fstat(file).st_size, 0).strip().splitlines():
        # A torn line was not promised yet; one that is not ours must not end the start.
        with contextlib.suppress(ValueError, TypeError, RecursionError):
            openid, key, reply = map(str, json.loads(line))
            due[openid] = (key, reply)
    return due


def write_due(_: sqlite3.Connection, file: int, due: Due) -> None:
    """Let the file hold these deletions; in the database's thread, one by one."""
    lines = "".join(json.dumps([openid, *due[openid]]) + "\n" for openid in due)
    text = lines.encode().ljust(DUTY_BYTES, b"\n")
    os.pwrite(file, text, 0)
    os.ftruncate(file, len(text))
    os.fsync(file)


SEARCH_SLICE = 10  # exchanges that are looked through in one go
SEARCH_SLICES = 200  # of them for one page
PAGE_CHARS = 100_000  # of questions and answers on a page of the history


def columns_of(record: Any) -> dict[str, object]:
    """Return a record's fields by name; a statement takes those that it names."""
    return {name: getattr(record, name) for name in record.__slots__}


def noted(openid: str, **values: float | None) -> Statement:
    """Return the statement that notes what is given about a subscriber."""
    query = """
        INSERT INTO subscriber (openid, told_at, hinted_at, shown_turn)
        VALUES (:openid, :told_at, :hinted_at, :shown_turn)
        ON CONFLICT DO UPDATE SET told_at = coalesce(told_at, excluded.told_at),
            hinted_at = coalesce(excluded.hinted_at, hinted_at),
            shown_turn = coalesce(excluded.shown_turn, shown_turn)
    """
    nothing = dict.fromkeys(("told_at", "hinted_at", "shown_turn"))
    return query, {"openid": openid} | nothing | values


def context_of(turn: Turn, chars: int) -> Statement:
    """Return the statement for the whole exchanges before a turn within `chars`.

    The newest comes first. None after the turn has ended: they wait for each other.
    """
    query = """
        SELECT question, answer FROM (
            SELECT question, answer, sum(length(question) + length(answer))
                OVER (ORDER BY id DESC) AS chars
            FROM turn WHERE session_id = :session_id
            AND state IN ('done', 'cut') AND answer <> '' ORDER BY id DESC LIMIT 200)
        WHERE chars <= :chars
    """
    return query, {"session_id": turn.session_id, "chars": chars}


def keep_part(openid: str, part: Part, at: float, **values: object) -> Statement:
    """Return the statement that keeps a part: offered, or sent if `reply` is given.

    What was sent of it before stays.
    """
    query = """
        INSERT INTO part (openid, number, turn_id, start, place, offered_at, to_mention,
                          reply, stop)
        VALUES (:openid, :number, :turn_id, :start, :place, :at, :to_mention,
                :reply, :stop)
        ON CONFLICT DO UPDATE SET reply = excluded.reply, stop = excluded.stop
        WHERE part.reply IS NULL AND excluded.reply IS NOT NULL
    """
    nothing = {"to_mention": False, "reply": None, "stop": None}
    return query, columns_of(part) | nothing | {"openid": openid, "at": at} | values


class Store:
    """All that outlives the process. `open_store` opens and closes it.

    Coroutines may use it at the same time; their statements run in the order given,
    but those of `run_at_once` before them.
    """

    def __init__(self, db: aiosqlite.Connection, file: int, due: Due) -> None:
        self.db = db
        self.batch = Batch(db)
        self.run = self.batch.run
        self.is_wal_behind = True  # deleted text may still be in the WAL
        self.file = file  # NAME-duty, locked
        self.due = due
        self.forgetting = asyncio.Lock()  # one deletion at a time
        self.keyed = hmac.new(b"", digestmod="sha256")  # keyed in `migrate`

    async def rows(self, query: str, **values: object) -> list:
        """Return all rows of a statement; no cursor stays open."""
        [rows] = await self.run([(query, values)])
        return rows

    def run_soon(self, job: Job) -> asyncio.Future:
        """Run a job that nobody waits for, with what comes next.

        A full disk or a kill in this moment prevents only that.
        """
        result = self.run(job, SOON_SECONDS)
        result.add_done_callback(lambda done: done.cancelled() or done.exception())
        return result

    async def migrate(self) -> None:
        """Run the new steps of schema.sql; raise StoreError for a newer database."""
        steps = re.split(r"(?m)^-- step \d+$", SCHEMA.read_text("utf-8"))[1:]
        [(version,)] = await self.rows("PRAGMA user_version")
        if version > len(steps):
            words = (
                "the database is of version {version}, this wxgpt knows up to {known}: "
                "install a newer one"
            )
            raise StoreError(words, version=version, known=len(steps))
        for number, step in enumerate(steps[version:], version + 1):
            script = f"BEGIN IMMEDIATE;{step};PRAGMA user_version = {number};COMMIT"
            await self.db.executescript(script)
        [(secret,)] = await self.rows("SELECT secret FROM platform")
        self.keyed = hmac.new(secret, digestmod="sha256")

    # A message and its reply

    async def recall(self, key: str, openid: str, now: float) -> Recalled:
        """Return what is stored about a message and its sender, in one hop."""
        query = """
            SELECT reply.content, reply.created, reply.turn_id, reply.stop, turn.id,
                   session.id, session.assistant, session.last_at,
                   EXISTS (SELECT 1 FROM turn AS open
                           WHERE open.session_id = session.id AND open.state = 'open'),
                   session.lapsed_text,
                   (SELECT max(number) FROM part WHERE part.openid = :openid),
                   missed.number, missed.turn_id, asked.question,
                   (SELECT json_group_array(url) FROM (
                        SELECT url FROM picture
                        WHERE openid = :openid AND created_at > :since ORDER BY id)),
                   told_at IS NOT NULL, coalesce(hinted_at, 0), coalesce(asked_at, 0)
            FROM (SELECT 1)
            LEFT JOIN subscriber ON subscriber.openid = :openid
            LEFT JOIN forget_request ON forget_request.openid = :openid
            LEFT JOIN reply ON reply.key IN (:key, :hash)
            LEFT JOIN turn ON turn.msg_key = :key
            LEFT JOIN session ON session.openid = :openid AND session.ended_at IS NULL
            LEFT JOIN part AS missed ON missed.openid = :openid AND missed.number = (
                SELECT min(number) FROM part WHERE openid = :openid AND to_mention = 1)
            LEFT JOIN turn AS asked ON asked.id = missed.turn_id
        """
        values: dict[str, object] = {"key": key, "hash": self.keyed_hash(key)}
        values |= {"openid": openid, "since": now - PICTURE_SECONDS}
        [[row]] = await self.run([(query, values)])
        reply = None
        if row[0] is not None:
            own = None if row[2] is None else Part(0, row[2])
            reply = Reply(row[0], row[1], own, row[3])
        session = None if row[5] is None else Session(*row[5:10])
        mention = None if row[11] is None else row[11:14]
        kept = json.loads(row[14])
        pictures = [url for url in kept if not url.startswith("\n")]
        attached = "".join(words for words in kept if words.startswith("\n"))
        last_part, rest = row[10] or 0, (mention, pictures, attached, *row[15:])
        return Recalled(reply, row[4], session, last_part, *rest)

    def save_reply(self, key: str, openid: str, reply: Reply) -> asyncio.Future:
        """Store a decided reply, and the parts it sends and offers.

        Triggers note that its question was replied to, and that an answer whose part
        was sent needs no mention.
        """
        part, at = reply.part, reply.created
        is_own = part is not None and part.number == 0
        turn_id = part.turn_id if part else None
        query = """
            INSERT OR IGNORE INTO reply (key, openid, content, created, turn_id, stop)
            VALUES (:key, :openid, :content, :created, :turn_id, :stop)
        """
        values = columns_of(reply) | {"key": key, "openid": openid}
        values |= {"turn_id": turn_id} if is_own else {"turn_id": None, "stop": 0}
        job: Job = [(query, values)]
        if reply.offered:
            to_mention = is_own and reply.is_early
            job.append(keep_part(openid, reply.offered, at, to_mention=to_mention))
        if part and not is_own and not reply.is_patience:
            job.append(
                keep_part(openid, part, at, reply=reply.content, stop=reply.stop)
            )
        if reply.mentions:
            query = "UPDATE part SET to_mention = 0 WHERE turn_id = :id"
            job.append((query, {"id": reply.mentions}))
        if part or reply.introduces:
            told_at = at if reply.introduces else None
            job.append(noted(openid, told_at=told_at, shown_turn=turn_id))
        return self.run(job)

    def mark_delivered(self, turn_id: int, how: str) -> asyncio.Future:
        """Store how an answer was delivered.

        The newest attempt that took it counts; 'part' and 'lost' only if none did.
        """
        query = """
            UPDATE turn SET delivered = iif(:how IN ('part', 'lost'),
                coalesce(delivered, :how), :how) WHERE id = :id
        """
        return self.run([(query, {"id": turn_id, "how": how})], SOON_SECONDS)

    async def mark_read(self, turn_ids: list[int]) -> None:
        """Note that answers were read on a page."""
        queries = (
            "UPDATE turn SET delivered = 'page' WHERE delivered IS NULL"
            " AND id IN (SELECT value FROM json_each(:ids))",
            "UPDATE part SET to_mention = 0 WHERE to_mention = 1"
            " AND turn_id IN (SELECT value FROM json_each(:ids))",
        )
        await self.run([(query, {"ids": json.dumps(turn_ids)}) for query in queries])

    def note(self, openid: str, **values: float) -> asyncio.Future:
        """Note what a subscriber was told or shown."""
        return self.run_soon([noted(openid, **values)])

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
        return Session(number, assistant, now)

    async def newest_session(
        self, openid: str, since: float
    ) -> tuple[int, str, float, bool] | None:
        """Return id, assistant and time of the newest session, and whether it runs.

        It does not if its last message is older than `since`, unless one is unanswered.
        """
        query = """
            SELECT id, assistant, opened_at, ended_at IS NULL AND (
                last_at > :since OR EXISTS (SELECT 1 FROM turn
                    WHERE session_id = session.id AND state = 'open'))
            FROM session WHERE openid = :openid ORDER BY id DESC LIMIT 1
        """
        rows = await self.rows(query, openid=openid, since=since)
        return rows[0] if rows else None

    async def end_session(self, session_id: int, now: float) -> None:
        """End a session."""
        query = "UPDATE session SET ended_at = :now, lapsed_text = NULL WHERE id = :id"
        await self.rows(query, now=now, id=session_id)

    async def keep_lapsed_text(self, session_id: int, text: str) -> None:
        """Keep the newest text that came after a session ran out."""
        query = "UPDATE session SET lapsed_text = :text WHERE id = :id"
        await self.rows(query, text=text, id=session_id)

    def touch_session(self, session_id: int, now: float) -> asyncio.Future:
        """Let the idle time begin now."""
        query = "UPDATE session SET last_at = :now WHERE id = :id"
        return self.run_soon([(query, {"now": now, "id": session_id})])

    async def add_picture(self, openid: str, url: str, now: float) -> None:
        """Keep a picture for the next question; a trigger drops those beyond four.

        In place of a URL it may be words, which begin with a newline.
        """
        query = "INSERT INTO picture (openid, url, created_at) VALUES (:o, :url, :now)"
        await self.rows(query, o=openid, url=url, now=now)

    # Turns

    async def add_turn(
        self,
        turn: Turn,
        context_chars: int,
        most: int,
        most_of_all: int,
        cookie_hash: str = "",
    ) -> bool:
        """Store and count an accepted question, and give it its id.

        With it comes its context, if it goes to the upstream at once.
        False, with nothing stored, if the day's questions are used up (0 is no limit)
        or the device that it comes from is signed out by now.
        Triggers count under a keyed hash, which outlives a deletion until midnight.
        """
        query = """
            INSERT INTO turn (session_id, openid, msg_key, link_key, question, pictures,
                              asked, created_at, day, counted_as)
            SELECT :session_id, :openid, :msg_key, :link_key, :question, :pictures,
                   :asked, :created_at, today, :counted_as
            FROM (SELECT date(:created_at, 'unixepoch', '+8 hours') AS today)
            WHERE NOT EXISTS (
                SELECT 1 FROM quota WHERE quota.day = today
                AND (who = :counted_as AND questions >= :most AND :most > 0
                     OR who = '' AND questions >= :most_of_all AND :most_of_all > 0))
              AND (:cookie_hash = '' OR EXISTS (
                SELECT 1 FROM device WHERE cookie_hash = :cookie_hash
                AND openid = :openid AND expires_at > :created_at))
            RETURNING id
        """
        values = columns_of(turn) | {
            "counted_as": self.keyed_hash(turn.openid),
            "most": most,
            "most_of_all": most_of_all,
            "cookie_hash": cookie_hash,
        }
        job: Job = [(query, values)]
        if turn.asked:
            job.append(context_of(turn, context_chars))
        ids, *context = await self.run(job)
        if ids:
            [(turn.id,)] = ids
            turn.context = context[0] if context else None
        return bool(ids)

    def keyed_hash(self, name: str) -> str:
        """Return what outlives a deletion in place of an openid or a message's key."""
        keyed = self.keyed.copy()  # hmac.digest would give the interpreter lock away
        keyed.update(name.encode())
        return keyed.hexdigest()[:32]

    async def questions_of_day(self, openid: str, now: float) -> int:
        """Return how many questions a subscriber asked on this Beijing day."""
        query = """
            SELECT questions FROM quota
            WHERE day = date(:now, 'unixepoch', '+8 hours') AND who = :who
        """
        rows = await self.rows(query, now=now, who=self.keyed_hash(openid))
        return rows[0][0] if rows else 0

    async def count_asking(self, turn: Turn, context_chars: int) -> None:
        """Count that a stored question now goes to the model, and read its context."""
        query = "UPDATE turn SET asked = asked + 1 WHERE id = :id"
        job: Job = [(query, {"id": turn.id}), context_of(turn, context_chars)]
        _, turn.context = await self.run(job)

    async def save_texts(self, turns: list[Turn]) -> None:
        """Store the text so far of turns."""
        query = "UPDATE turn SET answer = :text WHERE id = :id AND state = 'open'"
        await self.run([(query, {"id": t.id, "text": t.answer}) for t in turns])

    async def begin_anew(self, turn_id: int) -> None:
        """Move the unsent parts of a turn to its start: it is being written again."""
        query = """
            UPDATE part SET start = 0, is_anew = 1, place = 1
            WHERE turn_id = :id AND reply IS NULL AND start > 0
        """
        await self.rows(query, id=turn_id)

    async def finish_turn(self, turn: Turn, ending: Ending | None) -> None:
        """Store how an answer ended, in one statement."""
        query = """
            UPDATE turn SET answer = :answer, state = :state, reason = :reason,
                finished_at = :finished_at, model = :model,
                tokens_in = :tokens_in, tokens_out = :tokens_out, seconds = :seconds,
                calls = coalesce(calls, 0) + :calls, first_seconds = :first_seconds,
                pictures = iif(:state IN ('failed', 'broken'), pictures, NULL)
            WHERE id = :id
        """
        values = columns_of(turn) | columns_of(ending or Ending())
        values |= {"finished_at": time.time(), "seconds": round(turn.age, 3)}
        await self.run([(query, values)])

    async def turns(self, query: str, **values: object) -> list[Turn]:
        """Return the turns of a query; none that is about to be deleted."""
        rows = await self.rows(query, **values)
        return [turn for row in rows if (turn := Turn(*row)).openid not in self.due]

    async def turn(self, turn_id: int) -> Turn | None:
        """Return a turn."""
        query = "SELECT * FROM exchange WHERE id = :id"
        return next(iter(await self.turns(query, id=turn_id)), None)

    async def turn_by_link(self, link_key: str) -> Turn | None:
        """Return the turn that an answer's link shows."""
        query = "SELECT * FROM exchange WHERE link_key = :key"
        return next(iter(await self.turns(query, key=link_key)), None)

    async def open_turns(self) -> list[tuple[Turn, bool]]:
        """Return the unfinished turns in order, each with whether its session is."""
        query = """
            SELECT exchange.*, ended_at IS NULL
            FROM exchange JOIN session ON session.id = session_id
            WHERE state = 'open'
        """
        rows = sorted(await self.rows(query))
        return [(Turn(*row), runs) for *row, runs in rows if row[2] not in self.due]

    async def turns_of(self, openid: str, before: int, count: int) -> list[Turn]:
        """Return a subscriber's turns below an id, newest first.

        The last one is that in which their characters exceed PAGE_CHARS.
        """
        query = """
            SELECT * FROM exchange WHERE openid = :openid AND id < :before AND id >= (
                SELECT min(id) FROM (
                    SELECT id, sum(length(question) + length(answer))
                        OVER (ORDER BY id DESC) - length(question) - length(answer)
                        AS chars_above
                    FROM turn WHERE openid = :openid AND id < :before
                    ORDER BY id DESC LIMIT :count)
                WHERE chars_above <= :most)
            ORDER BY id DESC
        """
        values = {"openid": openid, "before": before, "count": count}
        return await self.turns(query, most=PAGE_CHARS, **values)

    async def turns_after(self, openid: str, after: int) -> list[Turn]:
        """Return a few of a subscriber's turns above an id, oldest first."""
        query = """
            SELECT * FROM exchange WHERE openid = :openid AND id > :after
            ORDER BY id LIMIT 10
        """
        return await self.turns(query, openid=openid, after=after)

    async def search(
        self, openid: str, words: list[str], before: int, count: int
    ) -> tuple[list[Turn], int]:
        """Return turns below an id in which all words are, newest first.

        With them comes the id below which to go on, 0 if there are no more. They are
        looked through a few at a time, so that nobody else waits for the database.
        """
        query = """
            SELECT min(id) FROM (SELECT id FROM turn
            WHERE openid = :openid AND id < :before ORDER BY id DESC LIMIT :slice)
        """
        matching = """
            SELECT * FROM exchange
            WHERE openid = :openid AND id < :before AND id >= :first AND NOT EXISTS (
                SELECT 1 FROM json_each(:words)
                WHERE instr(lower(question || char(10) || answer), lower(value)) = 0)
            ORDER BY id DESC LIMIT :count
        """
        found: list[Turn] = []
        for _ in range(SEARCH_SLICES):
            values = {"openid": openid, "before": before}
            [(first,)] = await self.rows(query, slice=SEARCH_SLICE, **values)
            if first is None or openid in self.due:
                return found, 0
            values |= {"first": first, "words": json.dumps(words)}
            found += await self.turns(matching, count=count - len(found), **values)
            before = first
            if len(found) == count:
                before = found[-1].id
                break
        return found, before

    # Parts

    async def part(self, openid: str, number: int) -> Part | None:
        """Return a numbered part of this subscriber."""
        query = """
            SELECT number, turn_id, start, is_anew, reply, place FROM part
            WHERE openid = :openid AND number = :number
        """
        rows = await self.rows(query, openid=openid, number=number)
        return Part(*rows[0]) if rows else None

    async def unsent_part(self, turn_id: int) -> Part | None:
        """Return the part of a turn that is offered and not sent."""
        query = """
            SELECT number, turn_id, start, is_anew, reply, place FROM part
            WHERE turn_id = :id AND reply IS NULL ORDER BY number LIMIT 1
        """
        rows = await self.rows(query, id=turn_id)
        return Part(*rows[0]) if rows else None

    async def next_unsent(
        self, openid: str, session_id: int | None, since: float
    ) -> int | None:
        """Return the id of the turn of which something is to be sent next.

        That is the one shown last, else the oldest of the session, else the oldest
        asked after `since`; none that was asked and read on a page.
        """
        query = """
            SELECT coalesce(min(iif(turn.id = shown_turn, turn.id, NULL)),
                            min(iif(session_id = :session, turn.id, NULL)),
                            min(iif(created_at > :since, turn.id, NULL)))
            FROM turn
            LEFT JOIN part ON turn_id = turn.id AND reply IS NULL
            LEFT JOIN subscriber ON subscriber.openid = turn.openid
            WHERE turn.openid = :openid AND iif(
                replied, number IS NOT NULL, coalesce(delivered, '') <> 'page')
        """
        rows = await self.rows(query, openid=openid, session=session_id, since=since)
        return rows[0][0]

    def offer_unread(self, openid: str, part: Part, now: float) -> asyncio.Future:
        """Store a part that nobody has asked for, to be named in the chat if unread."""
        return self.run_soon([keep_part(openid, part, now, to_mention=True)])

    # Devices

    async def add_device(self, openid: str, cookie_hash: str, until: float) -> bool:
        """Sign a device in; False, with nothing stored, if there are DEVICES."""
        query = """
            INSERT INTO device (cookie_hash, openid, expires_at)
            SELECT :cookie_hash, :openid, :until
            WHERE (SELECT count(*) FROM device
                   WHERE openid = :openid AND expires_at > :now) < :most
            RETURNING 1
        """
        values = {"openid": openid, "until": until, "now": time.time()}
        rows = await self.rows(query, cookie_hash=cookie_hash, most=DEVICES, **values)
        return bool(rows)

    async def device_owner(self, cookie_hash: str) -> str | None:
        """Return whose device has a cookie, None if it is not signed in."""
        query = (
            "SELECT openid FROM device WHERE cookie_hash = :hash AND expires_at > :now"
        )
        rows = await self.rows(query, hash=cookie_hash, now=time.time())
        return rows[0][0] if rows and rows[0][0] not in self.due else None

    async def count_devices(self, openid: str) -> int:
        """Return how many devices a subscriber has signed in."""
        query = (
            "SELECT count(*) FROM device WHERE openid = :openid AND expires_at > :now"
        )
        [(count,)] = await self.rows(query, openid=openid, now=time.time())
        return count

    async def sign_out(self, openid: str, cookie_hash: str = "") -> int:
        """Sign out a device, or all of a subscriber's; return how many there were."""
        query = """
            DELETE FROM device WHERE openid = :openid
            AND (:hash = '' OR cookie_hash = :hash) RETURNING 1
        """
        return len(await self.rows(query, openid=openid, hash=cookie_hash))

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
        found = next(iter(await self.rows(query, key=key)), None)
        return found if found and found[0] not in self.due else None

    async def ask_forget(self, openid: str, now: float) -> None:
        """Note that a subscriber asked for deletion and has yet to confirm it."""
        query = "REPLACE INTO forget_request (openid, asked_at) VALUES (:openid, :at)"
        await self.rows(query, openid=openid, at=now)

    async def forget(self, openid: str, key: str, reply: str) -> None:
        """Delete all that is stored about a subscriber, later if that cannot be now.

        As long as it is due, nothing of theirs may be stored: all there is is deleted.
        A later copy of the message `key`, which asked for it, gets `reply`.
        """
        async with self.forgetting:
            self.due[openid] = (self.keyed_hash(key), reply)
            try:
                await self.delete(openid, self.run)
            except (OSError, *DATABASE_ERRORS) as error:
                log.error("a deletion is due, and tried every second: %s", error)

    async def forget_due(self) -> None:
        """Try the deletions that are due again; nobody waits if they cannot be done."""
        async with self.forgetting:
            for openid in list(self.due):
                with contextlib.suppress(OSError, *DATABASE_ERRORS):
                    await self.delete(openid, self.batch.run_at_once)
                    log.info("a deletion that was due is done")

    async def delete(self, openid: str, run: Callable[[Job], Awaitable]) -> None:
        """Delete a subscriber's data, from the files too.

        It is written down before, and crossed out before anything new can be stored.
        """
        queries = (
            "DELETE FROM session WHERE openid = :openid",  # and its turns, their parts
            "DELETE FROM reply WHERE openid = :openid",
            "DELETE FROM picture WHERE openid = :openid",
            "DELETE FROM history_link WHERE openid = :openid",
            "DELETE FROM forget_request WHERE openid = :openid",
            "DELETE FROM device WHERE openid = :openid",
            "DELETE FROM subscriber WHERE openid = :openid",
            "REPLACE INTO reply (key, openid, content, created)"
            " VALUES (:key, '', :reply, :now)",
        )
        key, reply = self.due[openid]
        values = {"openid": openid, "key": key, "reply": reply, "now": int(time.time())}
        with contextlib.suppress(OSError):  # memory keeps it
            await self.batch.call(write_due, self.file, self.due)
        await run([(query, dict(values)) for query in queries])
        await self.truncate_wal()
        others = {who: self.due[who] for who in self.due if who != openid}
        await self.batch.call(write_due, self.file, others)
        del self.due[openid]

    async def truncate_wal(self) -> None:
        """Take deleted text out of the WAL; a reader may prevent it for a while.

        In the database itself secure_delete has overwritten it.
        """
        self.is_wal_behind = True
        job: Job = [("PRAGMA wal_checkpoint(TRUNCATE)", {})]
        with contextlib.suppress(sqlite3.Error):  # locked or full: it is tried again
            [[(is_busy, *_)]] = await self.batch.run_at_once(job)
            self.is_wal_behind = bool(is_busy)

    async def prune(self, now: float, link_seconds: float, keep_days: float) -> None:
        """Delete what has served its time: replies, links, counts.

        With `keep_days` also old exchanges, from the files too.
        """
        for query, at in (
            ("DELETE FROM quota WHERE day < date(:at, 'unixepoch', '+8 hours')", now),
            ("DELETE FROM reply WHERE created < :at", now - REPLY_HOURS * 3600),
            ("DELETE FROM history_link WHERE expires_at < :at", now - link_seconds),
            ("DELETE FROM forget_request WHERE asked_at < :at", now - LAPSE_SECONDS),
            ("DELETE FROM device WHERE expires_at < :at", now),
            ("DELETE FROM picture WHERE created_at < :at", now - PICTURE_SECONDS),
        ):
            await self.rows(query, at=at)
        if not keep_days:
            return
        queries = (
            "DELETE FROM turn WHERE created_at < :at AND state <> 'open' RETURNING 1",
            "DELETE FROM reply WHERE created < :at",
            "DELETE FROM session WHERE opened_at < :at AND last_at < :at"
            " AND NOT EXISTS (SELECT 1 FROM turn WHERE session_id = session.id)"
            " RETURNING 1",
            "DELETE FROM subscriber WHERE max(coalesce(told_at, 0), coalesce(hinted_at,"
            " 0)) < :at AND NOT EXISTS"
            " (SELECT 1 FROM session WHERE session.openid = subscriber.openid)",
        )
        values: dict[str, object] = {"at": now - keep_days * 86400}
        turns, _, sessions, _ = await self.run([(query, values) for query in queries])
        await self.truncate_wal()
        if turns or sessions:
            log.info("%d exchanges older than keep_days deleted", len(turns))


PRAGMAS = f"""
    PRAGMA busy_timeout = {BUSY_MILLISECONDS};
    PRAGMA journal_mode = WAL;
    PRAGMA synchronous = FULL;
    PRAGMA foreign_keys = ON;
    PRAGMA secure_delete = ON;
    PRAGMA journal_size_limit = 16777216;
"""
CHECK_BYTES = 64 * 1024 * 1024  # larger databases are not checked: it takes seconds


@contextlib.contextmanager
def store_errors(path: str) -> Iterator[None]:
    """Raise StoreError for what keeps a file from being used."""
    try:
        yield
    except (OSError, sqlite3.Error) as error:
        why = getattr(error, "strerror", None) or str(error)
        raise StoreError("database {path}: {why}", path=path, why=why) from None


@contextlib.asynccontextmanager
async def open_store(path: str) -> AsyncIterator[Store]:
    """Open the store of a file, made or brought up to date; raise StoreError."""
    async with contextlib.AsyncExitStack() as stack:
        with store_errors(path):
            # -wal and -shm copy its mode: nobody else reads what people wrote
            os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
            with contextlib.suppress(PermissionError):  # another user's
                os.chmod(path, 0o600)  # a restored copy may have come with any mode
            file = os.open(path + "-duty", os.O_RDWR | os.O_CREAT, 0o600)
        stack.callback(os.close, file)
        await lock_file(file, path)
        with store_errors(path + "-duty"):
            due = read_due(file)
        with store_errors(path):
            db = await aiosqlite.connect(path, isolation_level=None)
            store = Store(db, file, due)
            stack.push_async_callback(store.batch.close)
            # Checked before anything is written. This reads the whole file.
            is_small = os.path.getsize(path) <= CHECK_BYTES
            check = await store.rows("PRAGMA quick_check(1)") if is_small else []
            if check not in ([], [("ok",)]):
                words, why = "database {path}: corrupt: {why}", check[0][0].split()
                raise StoreError(words, path=path, why=" ".join(why))
            await db.executescript(PRAGMAS)
            await store.migrate()
            await store.truncate_wal()
            with contextlib.suppress(OSError):  # full: it is written again when needed
                await store.batch.call(write_due, file, due)
            await store.forget_due()
        yield store


# ---------------------------------------------------------------------------
# 8. Chat API
#
# POST {base_url}/chat/completions, streamed. Providers differ in many small things, so
# each field of their JSON is checked before it is used. Only a finish_reason or [DONE]
# ends an answer: a connection that closes halfway raises nothing.
# ---------------------------------------------------------------------------


@dataclass(eq=False, repr=False)
class ChatError(Exception):
    """A failed answer: its kind selects the text that the subscriber gets.

    As a string it is fit for the log: it quotes neither provider nor subscriber.
    """

    # slow, unreachable, busy, setup, refused, long, blind, picture, empty, broken; or
    # blocked, where the owner's list of words ended the answer
    kind: str
    detail: str  # for the log
    is_retryable: bool = False  # asking again may help
    retry_in: float | None = None  # seconds the provider wants us to wait, if it says
    status: int | None = None  # of the response, None if there was none
    code: str = ""  # the provider's code for the failure, or else its type
    # Its message, for `check` only: may repeat the key or a question. It is given by
    # name, since the repr of an exception shows its other arguments.
    words: str = field(default="", kw_only=True)
    setting: str = ""  # of the assistant, which the owner should look at

    def __str__(self) -> str:
        notes = getattr(self, "__notes__", ())
        return "; ".join([f"{self.kind}: {self.detail}", *notes])

    def __setattr__(self, name: str, value: object) -> None:
        # frozen=True would refuse __traceback__, too, which contextlib sets.
        if name in vars(self):
            raise AttributeError(f"{name} of an error cannot be changed")
        super().__setattr__(name, value)


NETWORK_ERRORS = (aiohttp.ClientError, OSError)  # which a TimeoutError is, too
NO_CONNECTION = (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError)


async def read_body(response: aiohttp.ClientResponse, limit: int) -> bytes:
    """Return a body, cut after `limit` bytes."""
    try:
        return await response.content.readexactly(limit)
    except asyncio.IncompleteReadError as whole:
        return whole.partial


@dataclass(frozen=True, slots=True)
class Picture:
    """A picture among messages; it becomes base64 only while a request is written."""

    kind: str
    body: bytes


PICTURE_BYTES = 4 * 1024 * 1024  # a third more in a request, as base64
PICTURE_FETCHES = 3  # at the same time, for all subscribers
PICTURE_TIMEOUT = 20  # seconds for one picture
PICTURES_ROOM = 8 * PICTURE_BYTES  # for the questions that are being answered
PICTURE_STARTS = {
    "image/jpeg": rb"\xff\xd8\xff",
    "image/png": rb"\x89PNG\r\n\x1a\n",
    "image/gif": rb"GIF8[79]a",
    "image/webp": rb"RIFF....WEBP",
}


class Pictures:
    """Fetches subscribers' pictures, from WeChat's hosts only, a few at a time."""

    def __init__(self, hosts: tuple[str, ...], http: aiohttp.ClientSession) -> None:
        self.hosts, self.http = hosts, http
        self.slots = asyncio.Semaphore(PICTURE_FETCHES)
        self.room = PICTURES_ROOM  # that is left
        self.room_freed = asyncio.Condition()

    @contextlib.asynccontextmanager
    async def fetch_all(self, urls: list[str]) -> AsyncIterator[list[Picture]]:
        """Yield a question's pictures, once there is room for them; raise ChatError.

        They take that room until the block ends.
        """
        size = len(urls) * PICTURE_BYTES
        async with self.room_freed:
            await self.room_freed.wait_for(lambda: self.room >= size)
            self.room -= size
        try:
            pictures = await asyncio.gather(*map(self.fetch, urls))
            spare = size - sum(len(picture.body) for picture in pictures)
            size -= spare
            await self.give_back(spare)
            yield pictures
        finally:
            await self.give_back(size)

    async def give_back(self, size: int) -> None:
        """Give back room that was taken, and wake those who wait for it."""
        self.room += size
        async with self.room_freed:
            self.room_freed.notify_all()

    async def fetch(self, url: str) -> Picture:
        """Return a picture; raise ChatError.

        Sending its URL would not do: a provider abroad may not reach WeChat's hosts.
        """
        try:
            target = urllib.parse.urlsplit(url)
            is_web = target.scheme in ("http", "https")
            if not is_web or target.hostname not in self.hosts:
                raise ChatError("picture", "its host is not in picture_hosts")
            async with (
                self.slots,
                asyncio.timeout(PICTURE_TIMEOUT),
                self.http.get(url, allow_redirects=False) as response,
            ):
                if response.status != 200:
                    raise ChatError("picture", f"status {response.status}")
                body = await read_body(response, PICTURE_BYTES + 1)
        except (*NETWORK_ERRORS, ValueError) as error:
            detail = f"not fetched: {type(error).__name__}"  # no message, no URL
            raise ChatError("picture", detail) from error
        if len(body) > PICTURE_BYTES:
            raise ChatError("picture", "larger than 4 MB")
        for kind, start in PICTURE_STARTS.items():
            if re.match(start, body, re.DOTALL):
                return Picture(kind, body)
        raise ChatError("picture", "neither JPEG, PNG, GIF nor WebP")


PIECE_BYTES = 48 * 1024  # of a picture that is encoded at once; a multiple of three
PICTURE_MARK = secrets.token_hex(16)  # stands for a picture; nobody's text has it


def render_request(body: dict) -> tuple[int, bytes | AsyncIterator[bytes]]:
    """Return the length of a request's JSON, and the JSON, with pictures in pieces."""
    pictures: list[bytes] = []

    def set_aside(picture: Picture) -> str:
        pictures.append(picture.body)
        return f"data:{picture.kind};base64,{PICTURE_MARK}"

    text = json.dumps(body, default=set_aside)
    if not pictures:
        return len(text), text.encode()
    texts = text.split(PICTURE_MARK)
    length = sum(map(len, texts)) + sum((len(x) + 2) // 3 * 4 for x in pictures)

    async def pieces() -> AsyncIterator[bytes]:
        for part, picture in zip(texts, [*pictures, b""], strict=True):
            yield part.encode()
            for at in range(0, len(picture), PIECE_BYTES):
                yield base64.b64encode(picture[at : at + PIECE_BYTES])

    return length, pieces()


PROVIDERS = HERE / "providers.toml"


@functools.cache
def load_meanings() -> dict[str, list[tuple[str, re.Pattern[str]]]]:
    """Return the tables of providers.toml: what words mean, and what finds them.

    First called at the start; raise ConfigError if the file cannot be read.
    """
    tables: dict[str, list[tuple[str, re.Pattern[str]]]] = {}
    for table, rows in read_toml(PROVIDERS).items():
        try:
            rows = [(name, re.compile(words, re.IGNORECASE)) for name, words in rows]
        except (re.error, ValueError, TypeError) as error:
            words, path = "{path}: {why}", f"{PROVIDERS}: {table}"
            raise ConfigError(words, path=path, why=error) from None
        tables[table] = rows
    return tables


def look_up(table: str, text: str) -> tuple[str, re.Match[str] | None]:
    """Return the meaning and the match of the first row that finds something."""
    for meaning, words in load_meanings()[table]:
        if found := words.search(text):
            return meaning, found
    return "", None


class ThoughtEnd(str):
    """A delta, maybe empty, before which all text was a thought: it starts over."""


TAG_CHARS = 200  # no tag is longer
# What may become a tag, or a token that stops a model after up to three others.
TAG_BEGUN = re.compile(rf"(?s:<\|.{{0,{TAG_CHARS}}})|[<\[◁][^>\]▷\n]{{0,{TAG_CHARS}}}")
STOP_TOKEN = r"<[/|｜][\w|｜▁]{0,20}"
STOP_BEGUN = re.compile(rf"(?:{STOP_TOKEN}>\s*){{0,3}}(?:<|{STOP_TOKEN})?$")
ANSWER_CHARS = 200_000  # an answer that goes on and on is cut there


@dataclass(slots=True)
class ThoughtFilter:
    """Removes the thoughts from the start of an answer, however they are split.

    state    text is                              until
    assumed  kept, and shown if there is no tag   the closing tag: then `before`
    before   held while it may become a tag       a tag: `thought`, or else `answer`
    thought  dropped                              the closing tag: then `before`
    answer   visible                              a closing tag, the first one: `before`

    Some servers swallow the opening tag. Then only the closing one shows that all the
    text before it was a thought. If the last answer of a provider did so, the next is
    assumed to begin in a thought, too: `closing` is how the provider spells the tag.
    """

    closing: str = ""  # the tag that ends the thought we are in
    state: str = "assumed"  # which is over at once if `closing` is empty
    held: str = ""  # text of which it is not known yet what it is
    kept: str = ""  # of an assumed thought
    is_wrapped: bool = False  # the answer, in a tag of its own
    is_searched: bool = True  # the answer, for the first tag of a thought in it
    tail: str = ""  # the end of the visible answer, where such a tag may begin
    unopened: str = ""  # the closing tag of a thought that came without an opening one

    def feed(self, delta: str) -> str:
        """Return the text that is now known to be visible, perhaps as a ThoughtEnd."""
        self.held += delta
        # Before the answer: what stands there is dropped as soon as it is whole.
        while self.state != "answer":
            if self.state == "before":
                self.held = self.held.lstrip()
                meaning, tag = look_up("before", self.held)
            else:
                closing = re.escape(self.closing)
                meaning, tag = "", re.search(closing, self.held, re.IGNORECASE)
            if tag:
                if self.state == "assumed":
                    self.unopened = self.closing
                self.held = self.held[tag.end() :]
                self.is_wrapped = meaning == "wrapper"
                names = tag.groupdict()
                self.closing = "" if self.is_wrapped else meaning.format(**names)
                self.state = "thought" if self.closing else "before"
            elif self.state != "before":
                if self.state == "assumed":
                    self.kept = (self.kept + self.held[:-TAG_CHARS])[:ANSWER_CHARS]
                self.held = self.held[-TAG_CHARS:]
                return ""
            elif "analysis".startswith(self.held) or TAG_BEGUN.fullmatch(self.held):
                return ""  # a tag perhaps; the word begins a thought of gpt-oss
            else:
                self.state = "answer"
        # In the answer: a closing tag shows that all the text before it was a thought.
        text, tag = self.tail + self.held, None
        if self.is_searched and ("<" in text or "[" in text or "◁" in text):
            _, tag = look_up("late", text)  # which is expensive
            self.is_searched = not tag
        if tag and tag[1]:
            self.unopened, self.tail = tag[1], ""
            self.held, self.state = text[tag.end() :], "before"
            return ThoughtEnd(self.feed(""))
        # At its end: what may become a token that stops the model is held back.
        begun = STOP_BEGUN.search(self.held)
        end = begun.start() if begun else len(self.held)
        text, self.held = self.held[:end], self.held[end:]
        self.tail = (self.tail + text)[-TAG_CHARS:]
        return text

    def flush(self, is_cut: bool) -> str:
        """Return the text still held at the end; an unclosed thought is not shown."""
        if self.state in ("assumed", "thought"):
            self.unopened = ""  # this answer says nothing about the next one
            is_shown = self.state == "assumed" and not is_cut
            return self.kept + self.held if is_shown else ""
        if "<s>" in self.tail + self.held:  # </s> ends what is struck out
            return self.held
        meaning, token = look_up("after", self.held)
        if not token or meaning == "wrapper" and not self.is_wrapped:
            return self.held
        return self.held[: token.start()]


EVENT_BYTES = 1 << 20  # more in one event would only fill the memory
BLANKS = b" \t\r\n\xef\xbb\xbf"  # may stand before a body, the last as byte order mark
# The fields of an event stream that matter (llama.cpp has errors in one of that name),
# those that do not, and the lines of a body that is JSON.
DATA_FIELD = re.compile(rb"(?:data: ?)+|(?:data|error)(?:: ?|$)")
OTHER_FIELD = re.compile(rb"(?:event|id|retry)?(?::|$)")
JSON_LINE = re.compile(rb"(?=.)")
# What begins a second event in a line: GLM loses the end of the one before it. Inside
# JSON the quote had a backslash, and a [DONE] would not be at the end.
NEXT_EVENT = re.compile(rb'data: ?(?=\{"\w|\[DONE\]\s*$)')


@dataclass(slots=True)
class EventDecoder:
    """Cuts a body into payloads, from chunks of any size.

    Its first byte says what it is, since content types are often wrong. An event stream
    is parsed as the HTML standard does, but an object ends where the next one begins,
    too. JSON is taken line by line in the same way.
    """

    prefix: re.Pattern[bytes] | None = None  # of lines with data; None: nothing came
    line: bytes = b""  # the unfinished line
    data: list[bytes] = field(default_factory=list)  # lines of the unfinished event
    after_cr: bool = False  # a LF that comes next belongs to the CR before
    has_comment: bool = False  # the last chunk had one: the server is alive
    stray: str = ""  # the last line that is none of an event stream

    def feed(self, chunk: bytes) -> list[str]:
        """Return the payloads that a chunk completes, b"" all; raise ChatError."""
        text = chunk or b"\n\n"  # the end of a body ends its last line and event
        self.has_comment = False
        if self.prefix is None:
            text = text.lstrip(BLANKS)
            if text.startswith(b"<"):
                raise ChatError(
                    "setup", "a web page, not an answer", setting="base_url"
                ) from ValueError("not JSON")  # by which `check` knows it
            if not text:
                return []
            self.prefix = JSON_LINE if text.startswith((b"{", b"[")) else DATA_FIELD
        # Lines end with LF, CR or both, of which a chunk may have the first alone.
        if self.after_cr:
            text = text.removeprefix(b"\n")
        self.after_cr = text.endswith(b"\r")
        text = (self.line + text).replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        *lines, self.line = text.split(b"\n")
        events = [self.data]
        for line in lines:
            if found := self.prefix.match(line):
                value = line[found.end() :]
                is_start = value.startswith((b"{", b"[DONE]"))
                if is_start and events[-1] and events[-1][-1].rstrip().endswith(b"}"):
                    events.append([])
                events[-1].append(value)
            elif not line and self.prefix is DATA_FIELD:
                events.append([])
            elif not OTHER_FIELD.match(line):
                self.stray = line.decode("utf-8", "replace")
            self.has_comment |= line.startswith(b":")
        self.data = events.pop() if chunk else []
        size = sum(len(line) + 8 for line in self.data)  # empty ones take room, too
        if len(self.line) + size > EVENT_BYTES:
            is_json = self.prefix is JSON_LINE
            raise ChatError("broken", "an event is longer than 1 MiB", is_json)
        payloads: list[bytes] = []
        for event in filter(None, events):
            *glued, last = NEXT_EVENT.split(b"\n".join(event))
            payloads += [one for one in glued if one.rstrip().endswith(b"}")]
            payloads.append(last)
        return [payload.decode("utf-8", "replace") for payload in payloads]


ERROR_KINDS = ("refused", "busy", "long", "blind", "picture", "broken")  # or settings
# How long to wait, in a message.
WAIT = re.compile(r"(?i)(?:again in|after|wait|retry in) *(\d+(?:\.\d+)?) *(ms|[mh])?")
CODE_NAMES = ("code", "status_code", "http_code", "type", "status", "param")
MESSAGE_NAMES = ("message", "detail", "msg", "status_msg", "error_msg", "statusText")
# A code or an id. Anything longer or with blanks may be what a subscriber wrote.
CODE = re.compile(r"[A-Za-z0-9_.:\[\]-]{1,64}")
RETRY_AFTER_SECONDS = 120  # nobody waits longer: then the question has failed


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Return how many seconds the provider wants us to wait, None if it names none."""
    text, seconds = headers.get("retry-after", ""), 0.0
    with contextlib.suppress(ValueError, OverflowError):
        seconds = email.utils.parsedate_to_datetime(text).timestamp() - time.time()
    with contextlib.suppress(ValueError):
        seconds = float(text)
    with contextlib.suppress(KeyError, ValueError):
        seconds = float(headers["retry-after-ms"]) / 1000
    return seconds if seconds > 0 else None  # nor is NaN


def first_dict(value: object) -> dict:
    """Return a dict, or the one that a list begins with; otherwise an empty one."""
    value = value[0] if isinstance(value, list) and value else value
    return value if isinstance(value, dict) else {}


def make_error(status: int, body: object, headers: Mapping[str, str]) -> ChatError:
    """Return the error that a body of any shape means; its status may be 200."""
    outer = first_dict(body)
    inner = outer.get("error") or outer.get("errors") or outer.get("base_resp")
    fields = outer | first_dict(inner)
    # What it says, in fields of various names, or else as a text.
    texts = [fields.get(name) for name in MESSAGE_NAMES]
    texts.append(first_dict(fields.get("metadata")).get("raw"))  # OpenRouter's source
    message = " ".join(str(x)[:300] for x in texts if x) or str(inner or body)[:300]
    # Its codes, as far as they are fit for the log.
    codes = {name: str(fields.get(name) or "") for name in CODE_NAMES}
    codes = {name: code for name, code in codes.items() if CODE.fullmatch(code)}
    if status == 200:  # a gateway passes on the status that it received
        received = (x for x in codes.values() if re.fullmatch("[45][0-9]{2}", x))
        status = int(next(received, status))
    code = codes.get("code") or codes.get("status_code", "")
    if code in ("", str(status)):  # which says nothing more
        code = codes.get("type", "")
    summary = " ".join(f"{name}={code}" for name, code in codes.items())
    # What kind of failure that is, or which setting is to blame.
    meaning, _ = look_up("errors", f"status {status} {summary} {message}")
    kind, setting = (meaning, "") if meaning in ERROR_KINDS else ("setup", meaning)
    # Whether asking again may help, and when. Gemini's `details` name the limit.
    retry_in = retry_after(headers)
    _, lasting = look_up("lasting", f"{message} {fields.get('details')}")
    is_passing = retry_in is not None or not lasting
    is_retryable = kind in ("busy", "broken") and is_passing
    if retry_in is None and (wait := WAIT.search(message)):
        unit = {"ms": 0.001, "m": 60, "h": 3600}
        retry_in = float(wait[1]) * unit.get(str(wait[2]).lower(), 1)
    if retry_in is not None and retry_in > RETRY_AFTER_SECONDS:
        is_retryable, retry_in = False, None
    if headers.get("x-should-retry") in ("true", "false"):
        is_retryable = headers["x-should-retry"] == "true"
    request_id = CODE.match(headers.get("x-request-id", ""))
    detail = f"status {status} {summary} request {request_id[0] if request_id else '-'}"
    found = (kind, detail, is_retryable, retry_in, status, code)
    return ChatError(*found, words=message, setting=setting)


ERROR_BYTES = 64 * 1024  # it may be a web page, which says all in its first lines
ERROR_SECONDS = 2  # for its body: the status alone says most


async def read_error(response: aiohttp.ClientResponse) -> ChatError:
    """Return the error that a response other than a 200 means."""
    text = ""
    with contextlib.suppress(*NETWORK_ERRORS):
        async with asyncio.timeout(ERROR_SECONDS):
            body = await read_body(response, ERROR_BYTES)
            text = body.decode("utf-8-sig", "replace")
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError):
        fields = re.sub(r"<[^<>]*>|\s+", " ", text).strip()
    return make_error(response.status, fields, response.headers)


LENIENT_JSON = json.JSONDecoder(strict=False)  # a string may hold a raw tab or line end
MID_SENTENCE = re.compile(r"[\w,，、:：;；(（《“-]\s*$")
REPEATED_CHARS = 8  # a last delta that says all again is longer; some gateways send one
# The fields of a delta that show that the model is at work.
WORK_FIELD = re.compile("content|refusal|reason|think|thought")


@dataclass(slots=True)
class Completion:
    """Everything a response has said so far; fed with its chunks, b"" at its end."""

    model: object
    thoughts: ThoughtFilter = field(default_factory=ThoughtFilter)
    decoder: EventDecoder = field(default_factory=EventDecoder)
    # Puts a character together of which the next event has the other half.
    utf16: codecs.IncrementalDecoder = field(
        default_factory=lambda: codecs.getincrementaldecoder("utf-16-le")("ignore")
    )
    text_hash: Any = field(default_factory=hashlib.sha256)  # thoughts included
    last_text: str = ""  # that is visible
    reason: str = ""  # the finish_reason; empty while the answer goes on
    has_reason_field: bool = False  # there was a finish_reason, if only null
    usage: object = None
    stray: object = ""  # the last payload that is no part of an answer
    has_progress: bool = False  # the last chunk had text, thoughts or a comment
    has_begun: bool = False  # some event had text or thoughts
    is_over: bool = False  # [DONE] was read
    error: Exception | None = None  # what broke it off; the text before it counts

    def feed(self, chunk: bytes) -> str:
        """Return the visible text of a chunk; set `error` if something is wrong."""
        texts: list[str] = []
        kind: type[str] = str
        self.has_progress = False
        try:
            for payload in self.decoder.feed(chunk):
                text = self.read(payload.strip())
                if isinstance(text, ThoughtEnd):
                    texts, kind = [], ThoughtEnd
                texts.append(text)
        except ChatError as error:
            self.error = error
        self.has_progress |= self.decoder.has_comment
        return kind("".join(texts))

    def read(self, payload: str) -> str:
        """Return the visible text of an event; raise ChatError, also for one in it."""
        # What is not JSON: the end, and what does not count.
        if payload == "[DONE]":
            is_cut = self.has_reason_field and MID_SENTENCE.search(self.last_text)
            self.reason = self.reason or ("length" if is_cut else "stop")
            self.is_over = True
        if self.is_over:
            return ""
        if not payload.startswith(("{", "[")):  # a heartbeat, or words of a failure
            self.stray = payload or self.stray
            return ""
        try:
            value = LENIENT_JSON.decode(payload)
        except (ValueError, RecursionError) as error:
            raise ChatError(
                "broken", "an event is not JSON", is_retryable=True
            ) from error
        # Errors, which come in many shapes.
        event = first_dict(value)
        code = first_dict(event.get("base_resp")).get("status_code")
        if "choices" not in event:
            code = code or event.get("code") or event.get("error_code")
            has_message = any(name in event for name in MESSAGE_NAMES)
            if has_message or self.decoder.prefix is JSON_LINE:
                self.stray = event  # it may say why there is no answer
        inner = event.get("error") or event.get("errors") or (value and not event)
        is_failed = any(inner.values()) if isinstance(inner, dict) else inner
        is_failed = is_failed or "error" in (event.get("object"), event.get("type"))
        if is_failed or code not in (None, "", 0, "0", 200, "200"):
            raise make_error(200, value, {})
        # The answer: the first choice, or rather the one with the index 0.
        choices = event.get("choices")
        items = choices if isinstance(choices, list) else []
        ours = [x for x in items if isinstance(x, dict) and not x.get("index")]
        choice = first_dict(ours)
        if choice.get("error"):
            raise make_error(200, choice, {})
        self.usage = event.get("usage") or choice.get("usage") or self.usage
        self.model = event.get("model") or self.model
        return self.read_choice(choice)

    def read_choice(self, choice: dict) -> str:
        """Note the finish_reason of a choice; return its visible text."""
        self.has_reason_field |= "finish_reason" in choice
        reason = str(choice.get("finish_reason") or "")
        if reason.lower() not in ("", "null", "none"):
            # OpenRouter says stop for some failures of the providers behind it.
            native = str(choice.get("native_finish_reason") or "")
            if look_up("ends", native)[0] in ("refused", "broken", "length"):
                reason = native
            # A filter's may follow another one.
            if not self.reason or look_up("ends", reason)[0] == "refused":
                self.reason = reason
        delta = first_dict(choice.get("delta"))
        if not delta and not self.has_begun:  # an answer that is not streamed
            delta = first_dict(choice.get("message"))
            self.reason = self.reason or ("stop" if delta else "")
        text = delta.get("content") or delta.get("refusal") or ""
        if not isinstance(text, str):  # parts, of which some may be thoughts
            parts = map(first_dict, text if isinstance(text, list) else [text])
            shown = ("text", "output_text", None)
            texts = (part.get("text") for part in parts if part.get("type") in shown)
            text = "".join(x for x in texts if isinstance(x, str))
        if text or any(delta[name] for name in delta if WORK_FIELD.search(name)):
            self.has_progress = self.has_begun = True
        raw = text.encode("utf-16-le", "surrogatepass")
        if self.reason and len(text) > REPEATED_CHARS:
            if hashlib.sha256(raw).digest() == self.text_hash.digest():
                return ""
        self.text_hash.update(raw)
        text = self.thoughts.feed(self.utf16.decode(raw))
        self.last_text = text if text.strip() else self.last_text
        return text

    def ending(self) -> Ending | Exception:
        """Return how the answer ended: well, or cut; or else why not."""
        if not self.reason:
            stray = self.stray or self.decoder.stray
            if stray and not self.error:
                return make_error(200, stray, {})
            early = ChatError("broken", "the stream ended early", is_retryable=True)
            return self.error or early
        # A number that the database cannot hold does not count.
        usage = first_dict(self.usage).items()
        counts = {k: n for k, n in usage if isinstance(n, int) and 0 <= n < 2**31}
        tokens_in = counts.get("prompt_tokens", counts.get("input_tokens"))
        tokens_out = counts.get("completion_tokens", counts.get("output_tokens"))
        kind = look_up("ends", self.reason)[0] or "broken"
        is_full = "context" in self.reason.lower() or not (self.has_begun or tokens_out)
        if kind == "length" and is_full and not self.last_text:
            kind = "long"  # there was no room for a word after the question
        if kind not in ("stop", "length"):
            word = self.reason if CODE.fullmatch(self.reason) else "odd"
            return ChatError(kind, f"finish_reason {word}", kind == "broken")
        model = ILLEGAL.sub("", str(self.model)[:100])
        return Ending(kind, model, tokens_in, tokens_out)


USAGE_SECONDS = 2  # how long a complete answer waits for its usage
CHUNK_BYTES = 16 * 1024  # at once: gzip may hold a thousand times its size


class ChatClient:
    """One assistant's chat API. Any number of answers may stream at the same time."""

    def __init__(
        self, settings: AssistantSettings, http: aiohttp.ClientSession
    ) -> None:
        self.settings, self.http = settings, http
        # Classic Azure has a query behind its path: ?api-version=…
        base, mark, query = settings.base_url.strip().partition("?")
        self.base = base.rstrip("/").removesuffix("/chat/completions")
        self.url = f"{self.base}/chat/completions{mark}{query}"
        # In one case: a header of the settings replaces ours, whatever case it has.
        headers = {name.title(): value for name, value in settings.headers.items()}
        key = settings.api_key.strip()
        own = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
        self.headers = own | headers
        # Further fields of a request; those that the provider refuses are taken out.
        self.options: dict[str, object] = {"stream_options": {"include_usage": True}}
        if settings.model == DEFAULT_MODEL:
            # It thinks unless told not to; other models refuse the field.
            self.options["reasoning_effort"] = "none"
        self.options |= settings.extra
        self.closing = ""  # tag of thoughts that its answers begin with, unopened

    async def read(
        self,
        response: aiohttp.ClientResponse,
        completion: Completion,
        timeout: asyncio.Timeout,
        deadline: float,
        begin_within: float | None,
    ) -> AsyncIterator[str]:
        """Yield a response's visible deltas; move the timeout while it is alive."""
        idle = self.settings.idle_timeout
        while not completion.is_over and not completion.error:
            chunk = await response.content.read(CHUNK_BYTES)
            if len(chunk) == CHUNK_BYTES:  # there may be more: others have a turn
                await asyncio.sleep(0)
            was_complete = completion.reason != ""
            text = completion.feed(chunk)
            if text or isinstance(text, ThoughtEnd):
                yield text
            if not chunk:
                break
            if completion.reason and not was_complete:
                # From here on nothing can break it, only its usage is awaited.
                timeout.reschedule(time.monotonic() + USAGE_SECONDS)
            elif completion.has_progress and not was_complete:
                # Where another model waits, a comment is no beginning.
                has_begun = completion.has_begun or begin_within is None
                moved = min(deadline, time.monotonic() + idle)
                is_far = abs(moved - (timeout.when() or 0)) > idle / 20
                if has_begun and is_far:
                    timeout.reschedule(moved)  # timers are expensive

    def leave_out(self, error: ChatError, sent: Mapping[str, object]) -> str:
        """Send no more the option that an error is about; return it, '' for none.

        Its name, or one with `_` inside it, may be there in any case and without any
        `_`; the option that turns thinking off is also meant by a word about thinking.
        """
        if error.setting != "extra":
            return ""
        said = f"{error.detail} {error.words}"
        is_about_thinking = re.search("(?i)思考|推理|think|reasoning", said)
        places: dict[str, int] = {}  # of names in what it says: the first one counts
        switch = ""
        for name, value in sent.items():
            inner = re.findall(r'"(\w+_\w+)":', json.dumps(value))
            words = "|".join(map(re.escape, [name, *inner])).replace("_", "[ _]?")
            pattern = rf"(?i)(?<![a-z0-9_])({words})(?![a-z0-9_])"
            if found := re.search(pattern, said):
                places[name] = found.start()
            if is_about_thinking and re.search("(?i)think|reason", f"{name} {inner}"):
                switch = name
        refused = min(places, key=places.__getitem__, default=switch)
        if refused in self.options:  # else another question found it out
            self.options = {k: v for k, v in self.options.items() if k != refused}
            log.warning("%s refuses %s: no longer sent", self.base, refused)
        return refused

    async def post(self, messages: list[dict]) -> aiohttp.ClientResponse:
        """Return the response to a question, to be closed; raise ChatError."""
        while True:
            options = self.options
            body = {"model": self.settings.model, "messages": messages, "stream": True}
            length, pieces = render_request(body | options)
            response = await self.http.post(
                self.url,
                data=pieces,
                headers=self.headers | {"Content-Length": str(length)},
                proxy=self.settings.proxy or None,
                allow_redirects=False,
            )
            if 200 <= response.status < 300:
                return response
            async with response:
                error = await read_error(response)
            if not self.leave_out(error, options):
                raise error

    def explain(self, error: Exception, messages: list[dict]) -> ChatError:
        """Return what a failure means with this provider and about this question."""
        if isinstance(error, NO_CONNECTION):
            return ChatError("unreachable", str(error), is_retryable=True)
        if isinstance(error, TimeoutError):
            return ChatError("slow", "time limit", is_retryable=True)
        if not isinstance(error, ChatError):
            detail = type(error).__name__  # its message may quote the answer
            return ChatError("broken", detail, is_retryable=True)
        if error.code == "insufficient_quota" and "/compatible-mode/" in self.url:
            # DashScope: too many tokens within a minute.
            return replace(error, kind="busy", is_retryable=True, setting="")
        if error.kind == "blind" and isinstance(messages[-1]["content"], str):
            return replace(error, kind="setup", setting="model")  # no picture was sent
        return error

    async def stream(
        self, messages: list[dict], deadline: float, begin_within: float | None = None
    ) -> AsyncGenerator[str | Ending, None]:
        """Yield the visible deltas, then the Ending; raise ChatError, by the deadline.

        The first token may take `begin_within` seconds, if that is less than usual.
        Leaving the iterator early closes the connection, which stops the provider.
        """
        completion = Completion(self.settings.model, ThoughtFilter(self.closing))
        patience = min(self.settings.first_token_timeout, begin_within or math.inf)
        first_deadline = min(deadline, time.monotonic() + patience)
        try:
            async with (
                asyncio.timeout_at(first_deadline) as timeout,
                await self.post(messages) as response,
            ):
                async for text in self.read(
                    response, completion, timeout, deadline, begin_within
                ):
                    yield text
        except (ChatError, *NETWORK_ERRORS) as error:
            completion.error = error
        ending = completion.ending()
        if not isinstance(ending, Ending):
            cause = ending.__cause__ if isinstance(ending, ChatError) else ending
            failure = self.explain(ending, messages)
            if self.leave_out(failure, self.options):  # it came in a 200
                failure = replace(failure, is_retryable=True, retry_in=0.0)
            raise failure from cause
        text = completion.thoughts.flush(ending.finish_reason == "length")
        self.closing = completion.thoughts.unopened
        if text:
            yield text
        yield ending


# ---------------------------------------------------------------------------
# 9. Live state
#
# What lives in memory while something goes on, and is gone after a restart: the tasks
# and those who wait, a subscriber's open questions, the requests of one message. Its
# instants are by time.monotonic(), which is the event loop's clock, too.
# ---------------------------------------------------------------------------


class Tasks:
    """The tasks of messages, questions and upkeep, and when waits end at a shutdown."""

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.running: set[asyncio.Task] = set()
        self.closes_at: float | None = None  # set at a shutdown

    def start(self, work: Coroutine[None, None, None], name: str) -> asyncio.Task:
        """Run work as a task; what it raises is logged, since nobody awaits it."""

        def end(task: asyncio.Task) -> None:
            self.running.discard(task)
            if error := None if task.cancelled() else task.exception():
                is_known = isinstance(error, sqlite3.Error)  # a full or locked disk
                trace = None if is_known else error
                log.error("%s broke off: %s", name, error, exc_info=trace)

        task = self.loop.create_task(work)
        self.running.add(task)
        task.add_done_callback(end)
        return task

    async def until(
        self, news: Signal, is_wanted: Callable[[], bool], deadline: float
    ) -> bool:
        """Wait for a condition that `news` may bring about; say whether it is met.

        The wait ends at the deadline, or before that at a shutdown.
        """
        while not is_wanted():
            if self.closes_at is not None:
                deadline = min(deadline, self.closes_at)
            if time.monotonic() >= deadline:
                return False
            timer = self.loop.call_at(deadline, news.notify)
            try:
                await news.wait()
            finally:
                timer.cancel()
        return True

    async def close(self) -> None:
        """Cancel all tasks, and wait until they have ended."""
        for task in list(self.running):
            task.cancel()
        await asyncio.gather(*self.running, return_exceptions=True)


KEPT_RESULTS = 8  # the newest of `once`, failures too


class LongWork:
    """Work that would hold up everybody: in two threads, once for all who want it."""

    def __init__(self) -> None:
        self.threads = concurrent.futures.ThreadPoolExecutor(2)
        self.results: dict[object, asyncio.Future] = {}  # the newest, by their keys

    def run(self, work: Callable, *args: object, **named: object) -> asyncio.Future:
        """Run a function in a thread."""
        call = functools.partial(work, *args, **named)
        return asyncio.get_running_loop().run_in_executor(self.threads, call)

    async def once(self, key: object, work: Callable, *args: object) -> Any:
        """Return what a function gives, or gave or raised for this key just now."""
        if key not in self.results:
            self.results[key] = self.run(work, *args)
        if len(self.results) > KEPT_RESULTS:
            del self.results[next(iter(self.results))]
        return await asyncio.shield(self.results[key])


@dataclass(slots=True, eq=False, weakref_slot=True)
class Subscriber:
    """What memory holds of a subscriber with a message or a question in progress.

    Lives in a weak dictionary: what uses it keeps it alive, which are deliveries, the
    tasks of questions, and requests for pages.
    """

    # Messages are taken up in the order they came.
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    # A message is answered, a sentence is written, an answer has ended.
    news: Signal = field(default_factory=Signal)
    # Few of their pages are made or written at once, so that readers who stall leave
    # places for others' pages.
    pages: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(2))
    viewers: int = 0  # event streams of their answers
    turns: list[Turn] = field(default_factory=list)  # unfinished, the oldest first
    last_part: int | None = None  # the highest number; None: not read yet
    is_told: bool | None = None  # the privacy words were said; None: not read yet
    # Numbers of the parts offered lately, by turn and start.
    offered: dict[tuple[int, int], int] = field(default_factory=dict)
    # By turn, answers of which only an early reply was read: next part, question.
    to_mention: dict[int, tuple[int, str]] = field(default_factory=dict)

    def offer(self, turn_id: int, start: int, place: int = 1) -> Part:
        """Return the part of a turn from `start` on, by the number it has if any."""
        if (turn_id, start) not in self.offered:
            self.last_part = (self.last_part or 0) + 1
            self.offered[turn_id, start] = self.last_part
        return Part(self.offered[turn_id, start], turn_id, start, place=place)


class TurnPart(NamedTuple):
    """A model's answer, from a part on, as what answers a message."""

    turn: Turn
    part: Part


# A text of ours ('' says nothing), part of an answer, or a reply to be sent as it is.
Source = str | TurnPart | Reply


@dataclass(slots=True, eq=False)
class Delivery:
    """The requests of one message, what answers it, and the one reply they all get."""

    message: Message
    subscriber: Subscriber
    first_at: float  # when the first request came, or an estimate
    cookie_hash: str = ""  # of the device it comes from; '': from WeChat
    newest_at: float = -math.inf  # when the newest request came
    attempts: int = 0  # requests, less duplicates
    earlier_attempts: int = 0  # attempts that an earlier process saw, at least: 0 or 1
    session: Session | None = None  # open, and not idle for too long
    lapsed: Session | None = None  # open in the store, but idle for too long, lately
    recalled: Recalled = Recalled()  # what was stored before it
    # What answers it, once known. When the reply is decided it takes this place: copies
    # that come later need no more, and an answer would stay in memory.
    source: Source | None = None
    is_kept: bool = True  # False: nothing about this message is to be stored
    reply: Reply | None = None  # as decided
    stored: asyncio.Future | None = None  # storing the decided reply

    def is_ready(self) -> bool:
        """Say whether the reply can be complete: its part is full, or all is there."""
        if self.reply:  # it may be decided before it is known what would have answered
            return True
        if not isinstance(self.source, TurnPart):
            return self.source is not None
        turn, part = self.source
        if not turn.is_open:
            return True
        rest = turn.shown()[part.start : part.start + REPLY_BYTES + 1]
        return len(rest.encode()) > REPLY_BYTES


class MuteGuard:
    """Counts attempts left to time out; WeChat mutes an account that fails too often.

    (接口报警和排查指引: no pushes for one minute; the threshold is not published.)
    """

    def __init__(self, limit: int, seconds: float = 300.0) -> None:
        self.limit = limit
        self.seconds = seconds
        self.charges: collections.deque[float] = collections.deque()

    def charge(self, now: float) -> bool:
        """Count one attempt and return True; count nothing if it is one too many."""
        while self.charges and self.charges[0] <= now - self.seconds:
            self.charges.popleft()
        if len(self.charges) >= self.limit:
            return False
        self.charges.append(now)
        return True


def cookie_hash_of(cookie: str) -> str:
    """Return what is kept of a device's cookie."""
    return hashlib.sha256(cookie.encode("utf-8", "replace")).hexdigest()


SIGN_IN_SECONDS = 600.0  # how long a number works
SIGN_INS = 5000  # browsers that may show one; more push out the oldest, if unsent
WRONG_NUMBERS = 5  # that a subscriber may send
WRONG_SECONDS = 3600.0  # within this time


@dataclass(slots=True)
class SignIn:
    """A browser that shows a number, and who has sent it to the account."""

    number: str  # six digits; no other browser shows them
    cookie_hash: str  # of the browser's own cookie for this
    until: float
    openid: str = ""
    is_confirmed: bool = False


class SignIns:
    """Browsers that wait to be signed in; after a restart they get new numbers."""

    def __init__(self) -> None:
        self.waiting: dict[str, SignIn] = {}  # by hash of the cookie, oldest first
        self.wrong: collections.deque[tuple[float, str]] = collections.deque()

    def begin(self, cookie_hash: str) -> SignIn:
        """Return a number for a browser."""
        now, numbers = time.monotonic(), {one.number for one in self.waiting.values()}
        for old in list(self.waiting.values()):
            is_one_too_many = len(self.waiting) >= SIGN_INS and not old.openid
            if old.until <= now or is_one_too_many:
                del self.waiting[old.cookie_hash]
        number = f"{secrets.randbelow(10**6):06}"
        while number in numbers:
            number = f"{secrets.randbelow(10**6):06}"
        one = SignIn(number, cookie_hash, now + SIGN_IN_SECONDS)
        self.waiting[cookie_hash] = one
        return one

    def find(self, cookie_hash: str) -> SignIn | None:
        """Return the sign-in of a browser whose number still works."""
        one = self.waiting.get(cookie_hash)
        return one if one and one.until > time.monotonic() else None

    def sent_by(self, openid: str) -> list[SignIn]:
        """Return the sign-ins whose numbers a subscriber has sent."""
        return [one for one in self.waiting.values() if one.openid == openid]

    def claim(self, openid: str, number: str) -> bool:
        """Note who sent a number; False if no browser shows it."""
        now = time.monotonic()
        for one in self.sent_by(openid):
            if not one.is_confirmed:
                one.openid = ""  # only the newest number counts
        for one in self.sent_by(""):
            if one.number == number and one.until > now:
                one.openid = openid
                return True
        while self.wrong and self.wrong[0][0] < now - WRONG_SECONDS:
            self.wrong.popleft()
        self.wrong.append((now, openid))
        return False

    def is_tried_too_often(self, openid: str) -> bool:
        """Say whether a subscriber has sent too many wrong numbers."""
        since = time.monotonic() - WRONG_SECONDS
        wrong = sum(who == openid and at >= since for at, who in self.wrong)
        return wrong >= WRONG_NUMBERS

    def confirm(self, openid: str) -> bool:
        """Let the browser in whose number a subscriber sent; False if there is none."""
        now = time.monotonic()
        sent = [one for one in self.sent_by(openid) if one.until > now]
        for one in sent:
            one.is_confirmed = True
        return bool(sent)

    def end(self, openid: str) -> int:
        """Let no browser in for a subscriber; return how many were confirmed."""
        sent = self.sent_by(openid)
        for one in sent:
            del self.waiting[one.cookie_hash]
        return sum(one.is_confirmed for one in sent)


class ReplayGuard:
    """Refuses signed requests that are stale, or whose signature came before.

    A signature does not cover the body, and stays right when digits move between
    timestamp and nonce: so each belongs to one message. 100 pushes a second take 25 MB.
    """

    SECONDS = 600  # how far a timestamp may be off

    def __init__(
        self, monotonic: Callable[[], float], warn: Callable[..., None]
    ) -> None:
        self.monotonic = monotonic
        self.warn = warn
        self.began = time.time() - monotonic()  # the wall clock when that was 0
        # A signature's message, hashed, for 20 to 30 minutes: timestamps may be ahead.
        self.owners: collections.ChainMap[int, int] = collections.ChainMap()
        self.next_map_at = monotonic()

    def is_fresh(self, timestamp: str) -> bool:
        """Say whether a timestamp is near our clock, or near it had it never jumped."""
        signed = int(timestamp) if re.fullmatch("[0-9]{10}", timestamp) else -1e9
        clocks = time.time(), self.began + self.monotonic()
        seconds = min((now - signed for now in clocks), key=abs)
        if abs(seconds) > self.SECONDS:
            self.warn("stale push refused: our clock is %+.0f s off its time", seconds)
        return abs(seconds) <= self.SECONDS

    def is_first(self, signature: str, message: Message | str) -> bool:
        """Say whether no other message, or other use, had this signature before."""
        if self.monotonic() >= self.next_map_at:
            self.next_map_at = self.monotonic() + self.SECONDS
            self.owners = collections.ChainMap({}, *self.owners.maps[:2])
        key, owner = int(signature[:15], 16), hash(message)  # numbers are small
        is_its_own = self.owners.setdefault(key, owner) == owner
        if not is_its_own:
            self.warn("replayed push refused: another message had its signature")
        return is_its_own


# ---------------------------------------------------------------------------
# 10. The bot
#
# Everything between a message and its reply, as methods of one class, in the order of
# its path: what answers a message (deliver, find_source, handle_...), the question's
# task (converse), what a request gets (reply_to, compose). It knows nothing of HTTP.
#
# A command is one method, decorated with @command, and its line in `texts.help`.
# Assistants are commands too: `/NAME` opens a session with it.
# ---------------------------------------------------------------------------

Command = Callable[["Bot", Delivery], Awaitable[str]]
COMMANDS: dict[str, Command] = {}
COMMAND_CHARS = 64  # what is longer is no command and no tap


def command(method: Command) -> Command:
    """Register a method as the command of its name."""
    COMMANDS[method.__name__] = method
    return method


def folded(text: str) -> str:
    """Return text as commands are compared, without width and case; '' if too long."""
    is_short = len(text) <= COMMAND_CHARS
    return unicodedata.normalize("NFKC", text).strip().casefold() if is_short else ""


def find_command(text: str, assistants: Iterable[str]) -> tuple[str, str] | None:
    """Return the command or the assistant a text names, and the question after it.

    A command is the whole text. `/chatgpt 问题` and `/chatgpt问题` are the same; of two
    assistants' names the longer one counts.
    """
    text = text.strip()
    if not folded(text[:1]).startswith("/"):
        return None
    if (name := folded(text)[1:].strip()) in COMMANDS:
        return name, ""
    for name in sorted(assistants, key=len, reverse=True):
        wanted = folded("/" + name)
        for end in range(1, min(len(text), 2 * len(wanted)) + 1):
            if folded(text[:end]) == wanted:
                return name, text[end:].strip()
    return None


CONTINUE = "继续"  # what a tap for a part sends, with its number
RETRY = "重试"  # what a tap for a failed question sends, with its number


def tap_words(texts: Texts) -> dict[str, str]:
    """Return what taps send or show, as commands are compared, and what it does."""
    shown = {
        "continue": (CONTINUE, texts.word_next, texts.word_writing, texts.word_answer),
        "retry": (RETRY, texts.word_retry),
        "forget": (texts.word_forget,),
        "resume": (texts.word_resume,),
        "go_on": (texts.word_go_on,),
        "sign_in": (texts.word_sign_in,),
        "let_in": (texts.word_let_in,),
        "sign_out": (texts.word_sign_out,),
    }
    words = {"下一段": "continue"}
    for name, these in shown.items():
        for word in these:
            words |= {folded(word): name, folded(sent_by_tap(word)): name}
    return words


def spoken_age(texts: Texts, seconds: float) -> str:
    """Return in words how long something has taken."""
    ages = {10: texts.age_10, 20: texts.age_20, 60: texts.age_60, 120: texts.age_120}
    return next((ages[most] for most in ages if seconds < most), texts.age_more)


def shortened(messages: list[dict], is_last: bool) -> list[dict]:
    """Return messages without the older half of the conversation, or all of it."""
    head = [m for m in messages if m["role"] == "system"]
    rest = messages[len(head) :]
    begin = len(rest) if is_last else (len(rest) // 4 + 1) * 2  # whole exchanges
    return head + rest[min(begin, len(rest) - 1) :]


def ending_words(texts: Texts, turn: Turn, retry: str, go_on: str = "") -> str:
    """Return what is said after the text of an ended answer; '' if it ended well.

    `retry` is how its question is asked again, where that may help, and `go_on` how the
    rest of one is asked for that reached the limit of its length.
    """
    match turn.state:
        case "done":
            return ""
        case "cut" if turn.reason == "stopped":
            return texts.stopped_here
        case "cut":
            return texts.cut_short.format(tap=go_on)
        case "ended":
            return texts.session_ended
        case "blocked":
            return texts.blocked_answer
    name = "broken" if turn.state == "broken" else turn.reason or "empty"
    return getattr(texts, f"failed_{name}").format(tap=retry)


def cut_reply(text: str, room: int) -> int:
    """Return how much of a chat text fits `room` bytes once links are escaped."""
    cut = cut_text(text, room)
    while (sent := sent_size(text[:cut])) > room:
        cut = cut_text(text, size_of(text[:cut]) * room // sent)  # shorter, but not 0
    return cut


def log_failure(name: str, stored: asyncio.Future) -> None:
    """Log that something about a message could not be stored."""
    if error := stored.exception():
        log.error("%s not stored: %s", name, error)


SHARED_CHARS = 400  # of what an article or a place says
RECENT_SECONDS = 3600  # how far back 继续 and 重试 look
REPEAT_SECONDS = 60  # the same question again within this time joins the first
FORGET_SECONDS = 300  # how long 确认删除 is accepted
RETRY_PAUSES = (0.5, 1.0)  # seconds before a question is asked again
DELTA_CHARS = 500  # what is appended at once; between two pieces others have a turn
STORE_SECONDS = 2.0  # pause before trying again to store how an answer ended
ASKINGS = 3  # how many times a question is sent upstream across restarts
RESUME_SECONDS = 600  # a question older than that is not asked again after a crash
HOLD_SECONDS = 3.0  # how long a timed-out request is kept open before it is dropped
SURE_CHARS = 300  # these fit one reply with whatever stands below them
PAGE_SECONDS = 60.0  # for taking up a question, for making a page, for writing it
PAGES_AT_ONCE = 8  # that are loaded and rendered
PAGE_BYTES = 16 * 2**20  # of pages that are being written besides
EXPORTS_AT_ONCE = 4  # files; each holds ten exchanges
SAVE_SECONDS = 1.0  # how often the text so far is stored
PRUNE_SECONDS = 600.0  # how often what has served its time is deleted


class Bot:
    """The bot of one account. `open_server` opens it; `close` ends all that goes on."""

    def __init__(
        self,
        config: Config,
        store: Store,
        chat: dict[str, ChatClient],  # by assistant
        pictures: Pictures,
        blocked: BlockedWords,
        cipher: Cipher | None,  # in safe mode
    ) -> None:
        self.config = config
        # For the chat: an owner's <a> is a link in them. Pages show config.texts.
        lines = vars(config.texts).items()
        self.texts = Texts({name: with_links(line) for name, line in lines})
        label = config.replies.label
        self.label = "\n" + label if label else ""  # the line that ends a part
        self.tap_words = tap_words(config.texts)
        self.aliases = {folded(name): text for name, text in config.aliases.items()}
        self.store = store
        self.chat = chat
        self.pictures = pictures
        self.blocked = blocked
        self.cipher = cipher
        self.tasks = Tasks()
        self.work = LongWork()
        self.pages = asyncio.Semaphore(PAGES_AT_ONCE)
        self.exports = asyncio.Semaphore(EXPORTS_AT_ONCE)
        self.page_room = PAGE_BYTES  # what is left of it
        self.guard = MuteGuard(config.wechat.mute_guard)
        self.replays = ReplayGuard(time.monotonic, self.warn)
        self.sign_ins = SignIns()
        self.slots = asyncio.Semaphore(config.limits.at_once)  # first come first
        self.deliveries: dict[str, Delivery] = {}  # of the last minute, by message key
        self.turns: dict[int, Turn] = {}  # being written or waiting
        self.subscribers = weakref.WeakValueDictionary[str, Subscriber]()
        # By session: its questions are answered one after another.
        self.locks = weakref.WeakValueDictionary[int, asyncio.Lock]()
        self.opened_at = time.monotonic()
        self.wechat_ahead = -math.inf  # WeChat's clock less time.monotonic(), by pushes
        # When something was warned of last, and in which words.
        self.warned: dict[str, tuple[float, str]] = {}
        self.heard_at: float | None = None  # the newest push that could be read

    def end_waits(self, at: float) -> None:
        """End all waits at that time at the latest, and live pages now."""
        self.tasks.closes_at = at
        for subscriber in self.subscribers.values():
            subscriber.news.notify()
        for turn in self.turns.values():
            turn.deltas.notify()

    async def close(self) -> None:
        """Let running answers go on until the time given to `end_waits`; cancel all."""
        writing = [t.task for t in self.turns.values() if t.task and not t.is_queued]
        if writing and self.tasks.closes_at:
            left = self.tasks.closes_at - time.monotonic()
            await asyncio.wait(writing, timeout=max(0, left))
        await self.tasks.close()
        self.work.threads.shutdown(wait=False, cancel_futures=True)

    def subscriber(self, openid: str) -> Subscriber:
        """Return a subscriber's state, new if nothing of theirs is in progress."""
        return self.subscribers.setdefault(openid, Subscriber())

    def warn(self, words: str, *values: object) -> None:
        """Log a warning, but not twice in a minute."""
        now, known = time.monotonic(), self.warned.get(words)
        if known is None or now - known[0] >= 60:
            self.warned[words] = now, words % values
            log.warning(words, *values)

    def tappable(self, text: str) -> str:
        """Return one of our own texts with the commands in it as taps."""
        return with_taps(text, *self.config.assistants, *COMMANDS)

    def page_link(self, turn: Turn, words: str) -> str:
        """Return a link to an answer's page."""
        return web_link(words, f"{self.config.public_url}/a/{turn.link_key}")

    def with_notice(self, text: str) -> str:
        """Return one of our own texts, unless it is empty, with the model's notice."""
        notice = self.texts.model_notice
        return self.tappable(f"{text}\n\n{notice}" if text and notice else text)

    def ignore(self, delivery: Delivery, reason: str) -> str:
        """Log why a message is not answered; return the empty reply."""
        log.info("%s left alone: %s", delivery.message.name, reason)
        return ""

    # What answers a message

    def deliver(
        self, message: Message, arrived: float, cookie_hash: str = ""
    ) -> tuple[Delivery, int]:
        """Return a request's delivery, made by the first, and which attempt it is.

        The first one also starts the task that finds out what answers the message.
        """
        wechat, key = self.config.wechat, message.key
        delivery = self.deliveries.get(key)
        if delivery is None:
            first = arrived
            if arrived - self.opened_at < 2 * wechat.attempt_timeout:
                # Attempts before this one may have found no server: estimate the first
                # from CreateTime, which is rounded down to a second.
                first -= max(0, time.time() - message.created - 1)
            subscriber = self.subscriber(message.openid)
            delivery = Delivery(message, subscriber, first, cookie_hash)
            self.deliveries[key] = delivery
            # Long after the last attempt a copy is answered from the store.
            seconds = 4 * wechat.attempts * wechat.attempt_timeout
            self.tasks.loop.call_later(seconds, self.deliveries.pop, key, None)
            self.tasks.start(self.find_source(delivery), message.name)
        # One that comes within half an attempt of the one before is a duplicate.
        if arrived - delivery.newest_at >= wechat.attempt_timeout / 2:
            delivery.attempts += 1
        delivery.newest_at = arrived
        return delivery, delivery.attempts

    async def find_source(self, delivery: Delivery) -> None:
        """Find out what answers a message, and extend its session.

        A subscriber's messages take turns. Whatever breaks, nobody waits for ever.
        """
        message, subscriber = delivery.message, delivery.subscriber
        source: Source = self.texts.trouble
        try:
            async with subscriber.lock:
                source = await self.handle_message(delivery)
                # Storing a question has extended the session.
                is_question = isinstance(source, TurnPart) and source.part.number == 0
                if delivery.session and message.msg_type != "event" and not is_question:
                    self.store.touch_session(delivery.session.id, time.time())
        finally:
            delivery.source = source
            subscriber.news.notify()

    async def source_of(self, part: Part) -> Source | None:
        """Return a part with its turn; None if that was deleted meanwhile."""
        turn = self.turns.get(part.turn_id)
        if turn is None:
            turn = await self.store.turn(part.turn_id)
            if turn is None:
                return None
            turn = await self.work.once(("turn", turn.id), turn.read)
        return TurnPart(turn, part)

    async def handle_message(self, delivery: Delivery) -> Source:
        """Return what answers a message: what is known of it, or what it means."""
        message, subscriber, store = delivery.message, delivery.subscriber, self.store
        openid = message.openid
        # 1. Nothing about a subscriber is stored until a deletion that is due is done.
        if openid in store.due:
            await store.forget_due()
        if openid in store.due:  # the database is still locked, or the disk full
            delivery.is_kept = False
            return self.texts.forget_noted
        # 2. What is stored of it and its sender; memory may know better of the latter.
        recalled = await store.recall(message.key, openid, time.time())
        delivery.recalled = recalled
        if subscriber.last_part is None:
            subscriber.last_part = recalled.last_part
            subscriber.is_told = recalled.is_told
            if recalled.mention:
                number, missed_id, question = recalled.mention
                subscriber.to_mention[missed_id] = (number, question)
        # 3. A copy of one that was answered, or was asked by a process before this one.
        #    If the turn was deleted meanwhile, nothing is said: to ask it again would
        #    store it again.
        if recalled.reply:
            delivery.earlier_attempts = 1
            delivery.reply = recalled.reply
            return recalled.reply
        if recalled.turn_id is not None:
            delivery.earlier_attempts = 1
            source = await self.source_of(Part(0, recalled.turn_id)) or ""
            if isinstance(source, TurnPart):
                delivery.first_at = min(delivery.first_at, source.turn.accepted_at)
            return source
        # 4. A new one, in its session unless that was idle for too long.
        session = recalled.session
        if session and session.assistant in self.config.assistants:
            idle = time.time() - session.last_at - self.config.session.ttl
            if idle <= 0 or session.is_busy:
                delivery.session = session
            elif idle < LAPSE_SECONDS:
                delivery.lapsed = session
        if openid in self.config.limits.deny and message.event != "unsubscribe":
            return self.ignore(delivery, "the sender is in limits.deny")
        if message.msg_type == "text":
            return await self.handle_text(delivery)
        return await self.handle_other(delivery)

    async def handle_text(self, delivery: Delivery) -> Source:
        """Return what answers a text: the first of these cases that applies."""
        if delivery.cookie_hash:
            return await self.handle_page(delivery)
        text, session = delivery.message.content.strip(), delivery.session
        config, is_words = self.config, bool(text) and text not in STICKER_TEXTS
        words = folded(text)
        meant = self.aliases.get(words, text)
        keyword = "" if session else config.replies.keywords.get(text, "")
        if keyword and find_command(keyword, config.assistants):
            meant = keyword
        if found := find_command(meant, config.assistants):
            name, question = found
            if name not in COMMANDS:
                return await self.open_and_ask(delivery, name, question)
            log.info("%s command %s", delivery.message.name, name)
            return await COMMANDS[name](self, delivery)
        if session and not is_words:
            return self.texts.unsupported
        if (source := await self.handle_tap(delivery, words)) is not None:
            return source
        if session:
            return await self.accept_question(delivery, text)
        if text in config.replies.keywords:
            return self.tappable(config.replies.keywords[text])
        if not is_words:
            return self.ignore(delivery, "no words, and no session is open")
        return await self.handle_outside(delivery, text)

    async def handle_other(self, delivery: Delivery) -> Source:
        """Return what answers an event, or what is no text."""
        message = delivery.message
        match message.msg_type, message.event:
            case "event", "subscribe":
                return self.with_notice(self.config.replies.subscribe)
            case "event", "unsubscribe":
                await self.forget_all(delivery, "")
                return ""
            case "event", _:
                return self.ignore(delivery, "no event of its kind is answered")
        if delivery.session is None:
            return self.ignore(delivery, "no text, and no session is open")
        texts, said = self.texts, message.caption.strip()[:SHARED_CHARS]
        kept, reply, tap = "", texts.words_kept, texts.word_place
        match message.msg_type:  # words begin with a newline, which no URL does
            case "image":
                kept, reply = message.picture_url.strip(), texts.picture_kept
                tap = texts.word_describe
            case "link" if said:
                kept, tap = "\n" + texts.article.format(words=said), texts.word_article
            case "location" if said:
                kept = "\n" + texts.place.format(words=said)
        if not kept:
            return texts.unsupported
        await self.store.add_picture(message.openid, kept, time.time())
        return reply.format(tap=tap_link(tap))

    async def handle_tap(self, delivery: Delivery, words: str) -> Source | None:
        """Return what answers a tap, or the same words typed; None if they are a text.

        继续 and 重试 with a number never are, nor what signs a browser in or out; the
        others if nothing is left to act on.
        """
        openid, texts, lapsed = delivery.message.openid, self.texts, delivery.lapsed
        if numbered := re.fullmatch(r"(.+?)\s*([0-9]{1,9})", words):
            word, number = numbered[1], int(numbered[2])
            if word == CONTINUE:
                return await self.continue_part(delivery, number)
            if self.tap_words.get(word) == "retry":
                turn = await self.store.turn(number)
                return await self.retry(delivery, turn) or texts.no_retry
            if self.tap_words.get(word) == "sign_in" and self.config.is_secure:
                return await self.claim_sign_in(openid, numbered[2])
        session, since = delivery.session or lapsed, time.time() - RECENT_SECONDS
        # Without the （2/5） of a tap, whose brackets `folded` has made ASCII.
        match self.tap_words.get(re.sub(r"\s*\(\d+/\d+\)$", "", words)):
            case "continue":  # of the answer shown last, else the oldest not sent
                session_id = delivery.session.id if delivery.session else None
                unsent = await self.store.next_unsent(openid, session_id, since)
                return await self.unsent_source(delivery, unsent) if unsent else None
            case "retry":
                newest = await self.store.turns_of(openid, 2**62, 1)
                recent = next((t for t in newest if t.created_at > since), None)
                return await self.retry(delivery, recent)
            case "forget":
                return await self.confirm_forget(delivery)
            case "resume" if session and session.lapsed_text:
                delivery.session = session
                return await self.accept_question(delivery, session.lapsed_text)
            case "go_on" if lapsed:
                delivery.session = lapsed
                return await self.accept_question(delivery, texts.word_go_on)
            # Never a question: a model would say that it is done.
            case "let_in" if self.config.is_secure:
                is_in = self.sign_ins.confirm(openid)
                return texts.signed_in if is_in else texts.sign_in_wrong
            case "sign_out" if self.config.is_secure:
                count = self.sign_ins.end(openid) + await self.store.sign_out(openid)
                return texts.signed_out.format(count=count) if count else texts.all_out
        return None

    async def continue_part(self, delivery: Delivery, number: int) -> Source:
        """Return part N of this subscriber: the same text again if it was sent."""
        part = await self.store.part(delivery.message.openid, number)
        if part and part.reply is not None:
            self.store.note(delivery.message.openid, shown_turn=part.turn_id)
            return Reply(part.reply, int(time.time()))
        source = await self.source_of(part) if part else None
        return source or self.texts.no_part.format(number=number)

    async def unsent_source(self, delivery: Delivery, turn_id: int) -> Source | None:
        """Return what a turn has unsent, with a number; None if it was deleted."""
        part = await self.store.unsent_part(turn_id)
        return await self.source_of(part or delivery.subscriber.offer(turn_id, 0))

    async def retry(self, delivery: Delivery, turn: Turn | None) -> Source | None:
        """Ask a failed question of theirs again; None if there is none to be asked."""
        openid = delivery.message.openid
        if turn is None or turn.openid != openid:
            return None
        is_known = turn.assistant in self.config.assistants
        if not is_known or turn.state not in ("failed", "broken"):
            return None
        if delivery.session is None:
            delivery.session = await self.open_session(openid, turn.assistant)
        words, pictures = self.question_words(turn), json.loads(turn.pictures or "[]")
        return await self.accept_question(delivery, words, pictures)

    async def open_and_ask(
        self, delivery: Delivery, assistant: str, question: str
    ) -> Source:
        """Open a session unless one with this assistant is; ask the question if any."""
        session, openid = delivery.session, delivery.message.openid
        allow = self.config.limits.allow
        if allow and openid not in allow:
            return self.texts.not_allowed
        is_open = session is not None and session.assistant == assistant
        if not is_open:
            delivery.session = await self.open_session(openid, assistant)
        if question:
            return await self.accept_question(delivery, question)
        if is_open:
            return self.texts.still_open
        if not delivery.subscriber.is_told:
            return self.texts.greeting  # and the introduction below it
        return self.tappable(self.texts.opened.format(assistant=assistant))

    async def handle_outside(self, delivery: Delivery, text: str) -> Source:
        """Return what answers words outside a session that mean nothing else."""
        config, texts, now = self.config, self.texts, time.time()
        replies, lapsed = config.replies, delivery.lapsed
        if folded(text[:1]) == "/":
            word = excerpt(text.split()[0])
            return self.tappable(texts.no_command).format(word=word)
        if config.session.auto_open:
            first = next(iter(config.assistants))
            return await self.open_and_ask(delivery, first, text)
        if lapsed:
            await self.store.keep_lapsed_text(lapsed.id, text)
            tap, question = tap_link(texts.word_resume), excerpt(text)
            return texts.session_lapsed.format(tap=tap, question=question)
        if replies.outside == "wechat_ai":
            return Reply(WECHAT_AI, int(now))
        if not replies.outside:
            return self.ignore(delivery, "replies.outside is empty")
        hours = replies.outside_hours
        if hours and now - delivery.recalled.hinted_at < hours * 3600:
            return self.ignore(delivery, f"a hint was sent within {hours:g} h")
        if hours:
            self.store.note(delivery.message.openid, hinted_at=now)
        return self.tappable(replies.outside)

    async def open_session(self, openid: str, assistant: str) -> Session:
        """Open a session; one that was open ends."""
        session = await self.store.start_session(openid, assistant, time.time())
        self.end_queued(self.subscriber(openid))
        return session

    async def accept_question(
        self, delivery: Delivery, question: str, pictures: Sequence[str] | None = None
    ) -> Source:
        """Store a question and start its answer; or return why not.

        `pictures` are those of a question that is asked again, which has passed before
        and may have any length. Without a session, as on a page, one is opened.
        """
        subscriber, session = delivery.subscriber, delivery.session
        openid, recalled = delivery.message.openid, delivery.recalled
        before = [t for t in subscriber.turns if session and t.session_id == session.id]
        # 1. A repeated question joins the first, unless a picture has come since.
        for turn in [] if recalled.pictures or recalled.attached else before:
            if self.question_words(turn) == question and turn.age < REPEAT_SECONDS:
                if source := await self.unsent_source(delivery, turn.id):
                    return source
        # 2. A refused one changes nothing.
        if pictures is not None:
            attached, refusal = "", self.refuse_question(delivery, "", question)
        else:
            pictures, attached = recalled.pictures, recalled.attached
            refusal = self.refuse_question(delivery, question, attached)
        if refusal:
            return refusal
        # 3. It is stored, unless the day's questions are used up.
        if session is None:
            _, assistant, _ = await self.page_session(openid)
            session = delivery.session = await self.open_session(openid, assistant)
        marks = self.texts.word_picture * len(pictures)
        turn = Turn(
            id=0,
            session_id=session.id,
            openid=openid,
            msg_key=delivery.message.key,
            link_key=secrets.token_urlsafe(16),
            question=marks + question + (attached and f"\n{attached}"),
            # A list, even an empty one, lets a trigger drop what waited for a question.
            pictures=json.dumps(pictures) if pictures or attached else None,
            created_at=time.time(),
            asked=0 if before else 1,  # 0: it waits, and is counted by ask_models
            assistant=session.assistant,
        )
        chars, limits = self.config.session.context_chars, self.config.limits
        most, of_all = limits.questions_per_day, limits.all_per_day
        device = delivery.cookie_hash
        if not await self.store.add_turn(turn, chars, most, of_all, device):
            if device and not await self.store.device_owner(device):
                return self.texts.page_signed_out
            asked = await self.store.questions_of_day(turn.openid, turn.created_at)
            day_over = self.texts.day_over.format(count=most)
            return day_over if most and asked >= most else self.texts.all_over
        self.start_turn(turn, subscriber)
        log.info("%s accepted, %d waiting", turn.name, len(subscriber.turns))
        return TurnPart(turn, Part(0, turn.id))

    def refuse_question(self, delivery: Delivery, question: str, more: str) -> str:
        """Return why a question is not accepted, '' if it is; nothing is counted.

        `more` may have any length: what it is about, or one that is asked again.
        """
        texts, limits = self.texts, self.config.limits
        waiting = sum(turn.is_open for turn in delivery.subscriber.turns)
        try:
            self.blocked.refresh()
        except (OSError, UnicodeError) as error:
            log.error("blocked words not read, the last ones stay in force: %s", error)
        if limits.allow and delivery.message.openid not in limits.allow:
            return texts.not_allowed
        if len(question) > limits.question_chars:
            most = limits.question_chars
            return texts.too_long.format(count=len(question), most=most)
        if waiting >= limits.waiting:
            return texts.too_many.format(count=waiting)
        is_blocked = self.blocked.are_in_question(question + more)
        return texts.blocked_question if is_blocked else ""

    # The question's task

    def start_turn(self, turn: Turn, subscriber: Subscriber) -> None:
        """Start the task that answers a question, after those before it."""
        self.turns[turn.id] = turn
        subscriber.turns.append(turn)
        turn.news = subscriber.news
        turn.is_queued = True
        turn.task = self.tasks.start(self.converse(turn, subscriber), turn.name)

    async def converse(self, turn: Turn, subscriber: Subscriber) -> None:
        """Answer a question after those before it, and store how that ended.

        Until then it keeps alive the subscriber's state and the session's lock.
        Whatever breaks, the answer ends, so that nobody waits for ever.
        """
        async with self.locks.setdefault(turn.session_id, asyncio.Lock()):
            if not turn.is_open:  # its session has ended meanwhile
                return
            turn.is_queued = False
            turn.deltas.notify()
            ending: Ending | None = None
            try:
                ending = await self.ask_models(turn)
                turn.model = ending.model
                turn.finish("cut" if ending.finish_reason == "length" else "done")
            except ChatError as error:
                level = logging.ERROR if error.kind == "setup" else logging.WARNING
                log.log(level, "%s failed: %s", turn.name, error)
                state = "failed"
                if error.kind == "blocked":
                    state = "blocked"
                    await self.rewrite(turn, turn.as_sent)
                elif turn.earlier and not turn.answer:
                    await self.rewrite(turn, lambda _: turn.earlier or "")
                turn.finish(state, error.kind)
            finally:
                is_cancelled = turn.task and turn.task.cancelling()
                if turn.is_open and not is_cancelled:
                    turn.finish("failed", "trouble")
                if turn.is_open:  # a shutdown: the next process goes on from this text
                    await self.save_open_answers([turn])
                else:
                    await self.store_end(turn, ending)

    async def ask_models(self, turn: Turn) -> Ending:
        """Let the assistant's model answer, or its fallback's, once there is a slot.

        Raise ChatError if both fail, or the first one did when text of it was sent.
        """
        settings = self.config.assistants[turn.assistant]
        fallback, urls = settings.fallback, json.loads(turn.pictures or "[]")
        fetched: contextlib.AbstractAsyncContextManager[list[Picture]]
        fetched = self.pictures.fetch_all(urls) if urls else contextlib.nullcontext([])
        async with self.slots, fetched as pictures:
            if turn.context is None:  # it has waited, or is asked again after a restart
                chars = self.config.session.context_chars
                await self.store.count_asking(turn, chars)
            # What a model gets: the prompt, the session so far, the question.
            messages: list[dict] = []
            if settings.system_prompt:
                messages.append({"role": "system", "content": settings.system_prompt})
            for question, answer in reversed(turn.context or []):
                messages.append({"role": "user", "content": question})
                messages.append({"role": "assistant", "content": answer})
            content: str | list[dict] = turn.question
            if pictures:
                content = [{"type": "text", "text": self.question_words(turn)}]
                shown = [{"url": picture, "detail": "low"} for picture in pictures]
                content += [{"type": "image_url", "image_url": one} for one in shown]
            messages.append({"role": "user", "content": content})
            within = (settings.fallback_after or None) if fallback else None
            try:
                return await self.ask_model(turn, turn.assistant, messages, within)
            except ChatError as error:
                if not fallback or turn.stops or error.kind == "blocked":
                    raise
                log.warning("%s goes to %s after %s", turn.name, fallback, error)
            turn.restart()
            return await self.ask_model(turn, fallback, messages, None)

    def question_words(self, turn: Turn) -> str:
        """Return a question without the marks of its pictures."""
        count = len(json.loads(turn.pictures or "[]"))
        return turn.question.removeprefix(self.texts.word_picture * count)

    async def ask_model(
        self, turn: Turn, name: str, messages: list[dict], begin_within: float | None
    ) -> Ending:
        """Let an assistant's model write the answer; raise ChatError.

        The only model there is gets up to three calls. Others are called again only
        with fewer messages, where the conversation is too long for them.
        """
        client = self.chat[name]
        has_fallback = self.config.assistants[turn.assistant].fallback != ""
        deadline = time.monotonic() + client.settings.timeout
        pauses = list(RETRY_PAUSES)
        while True:
            turn.calls += 1
            stream = client.stream(messages, deadline, begin_within)
            try:
                return await self.write_text(turn, stream)
            except ChatError as error:
                if error.setting:
                    place = f"assistants.{name}.{error.setting}"
                    error.add_note(f"look at {place}, and run wxgpt.py check")
                if error.kind == "refused" and not turn.stops:
                    turn.restart()  # withdrawn
                if turn.stops or not pauses:
                    raise
                pause, fewer = pauses.pop(0), messages
                if error.kind == "long":
                    fewer = shortened(messages, is_last=not pauses)
                if len(fewer) < len(messages):
                    messages, pause = fewer, 0.0
                elif has_fallback or not error.is_retryable:
                    raise
                elif error.retry_in is not None:
                    pause = error.retry_in
                else:
                    pause *= random.uniform(0.75, 1)
                if time.monotonic() + pause > deadline:
                    raise
                log.warning("%s asked again after %s", turn.name, error)
            turn.restart()
            await asyncio.sleep(pause)

    async def write_text(
        self, turn: Turn, stream: AsyncGenerator[str | Ending, None]
    ) -> Ending:
        """Append what the model streams; return the Ending, or raise ChatError."""
        guard = WordGuard(self.blocked)
        ending = Ending("length", "")  # of an answer that goes on for ever
        async with contextlib.aclosing(stream):
            async for item in stream:
                if isinstance(item, Ending):
                    ending = item
                    break
                if turn.earlier is not None and not turn.answer:
                    await self.move_unsent_parts(turn)
                if isinstance(item, ThoughtEnd):
                    await self.rewrite(turn, turn.without_thought)
                    guard = WordGuard(self.blocked)
                text = item[: ANSWER_CHARS - len(turn.answer)]
                self.show(turn, guard, text[:DELTA_CHARS], False)
                for at in range(DELTA_CHARS, len(text), DELTA_CHARS):
                    await asyncio.sleep(0)
                    self.show(turn, guard, text[at : at + DELTA_CHARS], False)
                if len(turn.answer) >= ANSWER_CHARS:
                    break
        self.show(turn, guard, "", True)
        if not turn.answer.strip():
            reason = f"finish_reason {ending.finish_reason}"
            # A limit that thoughts alone reach will be reached again.
            is_retryable = ending.finish_reason != "length"
            raise ChatError("empty", reason, is_retryable)
        return ending

    async def move_unsent_parts(self, turn: Turn) -> None:
        """Let the unsent parts of an earlier process's text begin at the new start."""
        await self.store.begin_anew(turn.id)
        for delivery in self.deliveries.values():
            source = delivery.source
            if isinstance(source, TurnPart) and source.turn is turn:
                is_anew = source.part.is_anew or source.part.start > 0
                part = replace(source.part, start=0, is_anew=is_anew)
                delivery.source = TurnPart(turn, part)

    def show(self, turn: Turn, guard: WordGuard, delta: str, is_end: bool) -> None:
        """Append what of a stream may be shown; raise ChatError for a blocked word.

        A word that links or tags split in the Markdown is whole in the chat or on the
        page: so what these show is looked through as well, before anybody sees it.
        """
        delta = ILLEGAL.sub("", delta)
        if not (self.blocked.words or guard.tail or guard.held):
            if delta:
                turn.append(delta)
            return
        text, is_blocked = guard.feed(delta, is_end)
        answer, before = turn.answer, len(turn.shown())
        if text and not is_blocked:
            turn.append(text)
        if not is_blocked:
            # The end is final now: no sign waits any more for what may follow it.
            is_blocked = guard.scan(turn.chat.text(is_end)[before:])
        if is_blocked:
            # Who was woken by this finds the text before it, until it is rewritten.
            turn.answer, turn.chat = answer, ChatText(answer)
            raise ChatError("blocked", "a blocked word in the answer")

    async def rewrite(self, turn: Turn, change: Callable[[str], str]) -> None:
        """Change what was written; nobody sees any of it meanwhile."""
        text = turn.answer
        turn.restart()

        def read() -> tuple[str, ChatText]:
            changed = change(text)
            chat = ChatText(changed)
            chat.text(has_ended=False)
            return changed, chat

        turn.answer, turn.chat = await self.work.run(read)
        turn.deltas.notify()

    async def store_end(self, turn: Turn, ending: Ending | None = None) -> None:
        """Store how an answer ended, and log it; readers have it from memory before."""
        try:
            # The next question of the session needs it stored, unless all is forgotten.
            while turn.id in self.turns:
                try:
                    await self.store.finish_turn(turn, ending)
                    break
                except sqlite3.Error as error:
                    log.error("%s not stored yet: %s", turn.name, error)
                    await asyncio.sleep(STORE_SECONDS)
            state = f"{turn.state} {turn.reason or ''}".strip()
            ending, line = ending or Ending(), "%s %s after %.1f s, tokens %s in %s out"
            tokens = ending.tokens_in, ending.tokens_out
            log.info(line, turn.name, state, turn.age, *tokens)
        finally:
            self.turns.pop(turn.id, None)
            subscriber = self.subscribers.get(turn.openid)
            if subscriber and turn in subscriber.turns:
                subscriber.turns.remove(turn)

    def end_turn(self, turn: Turn, state: str, reason: str | None = None) -> None:
        """End an answer before its time, unless it has ended; what is there stays."""
        if not turn.is_open:
            return
        turn.finish(state, reason)
        if turn.is_queued or turn.task is None:
            self.tasks.start(self.store_end(turn), turn.name)
        else:
            turn.task.cancel()  # which closes the upstream's call, and stores the end

    def end_queued(self, subscriber: Subscriber) -> None:
        """End the questions that still wait in a session that has ended.

        What is being written is finished, and stays readable by its links.
        """
        for turn in subscriber.turns:
            if turn.is_queued:
                self.end_turn(turn, "ended")

    async def resume_turns(self) -> None:
        """Take up the questions that the process before this one left unfinished."""
        now = time.time()
        for turn, is_session_open in await self.store.open_turns():
            turn.accepted_at -= max(0.0, now - turn.created_at)
            if turn.asked >= ASKINGS or now - turn.created_at > RESUME_SECONDS:
                self.turns[turn.id] = await self.work.run(turn.read)
                self.end_turn(turn, "failed", "given_up")
            elif not turn.asked and not is_session_open:
                self.turns[turn.id] = turn
                self.end_turn(turn, "ended")
            else:
                turn.earlier = turn.answer if turn.asked else None
                turn.answer = ""
                self.start_turn(turn, self.subscriber(turn.openid))
                log.info("%s resumed, asked %d times before", turn.name, turn.asked)

    # What a request gets

    async def reply_to(
        self, delivery: Delivery, attempt: int, arrived: float
    ) -> Reply | None:
        """Return the reply for this request, or None: WeChat is to ask again."""
        wechat, until = self.config.wechat, self.tasks.until
        news, is_ready = delivery.subscriber.news, delivery.is_ready
        hangs_up_at, margin = arrived + wechat.attempt_timeout, wechat.margin
        # 1. Wait until the reply can be complete.
        await until(news, is_ready, hangs_up_at - margin)
        # 2. If it is not, and WeChat will ask again, wait on. The last attempt is also
        #    one that comes later than halfway between the last but one and the last. A
        #    timeout is charged now: a burst of them, charged when WeChat hangs up,
        #    would all pass the guard; one that it refuses is answered now.
        late = delivery.first_at + (wechat.attempts - 1.5) * wechat.attempt_timeout
        attempts = attempt + delivery.earlier_attempts
        is_last = attempts >= wechat.attempts or arrived > late
        if not (is_ready() or is_last) and self.guard.charge(time.monotonic()):
            if not await until(news, is_ready, hangs_up_at):
                # WeChat has stopped reading, but an answer here would end its retries:
                # say nothing, unless another request gets the reply, and hang up.
                drop_at = hangs_up_at + HOLD_SECONDS
                if not await until(news, lambda: delivery.reply is not None, drop_at):
                    return None
        # 3. Decide once for all requests: all there is, or a word of patience. Before
        #    that, count the parts of a long answer, unless it takes too long.
        if delivery.reply is None and isinstance(delivery.source, TurnPart):
            turn, part = delivery.source
            is_long = not turn.is_open and len(turn.shown()) - part.start > SURE_CHARS
            if is_long and part.start not in turn.left:
                counted = self.work.run(self.count_parts, turn, part.start)
                await asyncio.wait({counted}, timeout=margin / 4)
        if delivery.reply is None:
            message, reply = delivery.message, self.compose(delivery)
            if reply.content and delivery.is_kept:
                stored = self.store.save_reply(message.key, message.openid, reply)
                failed = functools.partial(log_failure, f"{message.name} reply")
                stored.add_done_callback(failed)
                delivery.stored = stored
            delivery.source = delivery.reply = reply
            news.notify()
        # 4. It is stored before it is sent, if that does not take too long.
        if delivery.stored and not delivery.stored.done():
            left = hangs_up_at - margin / 2 - time.monotonic()
            await asyncio.wait({delivery.stored}, timeout=max(0, left))
            if not delivery.stored.done():
                name = delivery.message.name
                log.warning("%s replied before it was stored: a slow disk?", name)
        return delivery.reply

    def compose(self, delivery: Delivery) -> Reply:
        """Fix the reply of a message: what it says now, and what is said once below."""
        texts, source, subscriber = self.texts, delivery.source, delivery.subscriber
        if isinstance(source, Reply):  # as it is
            return source
        assistant = delivery.session and delivery.session.assistant
        if isinstance(source, TurnPart):
            turn, part = source
            assistant = turn.assistant
            reply = self.compose_part(delivery, turn, part)
            if reply.stop > part.start:
                turn.stops[part.start] = reply.stop
            if reply.offered and reply.is_early and part.number == 0:
                subscriber.to_mention[turn.id] = (reply.offered.number, turn.question)
            elif not reply.is_patience:
                subscriber.to_mention.pop(turn.id, None)
        else:
            words = texts.trouble if source is None else source
            reply = Reply(words, int(time.time()))
        if not reply.content:
            return reply
        # In a conversation the introduction comes first; nobody reads the privacy
        # words twice, except after /forget.
        if assistant and delivery.is_kept and not subscriber.is_told:
            one, two = tap_link(texts.word_example_1), tap_link(texts.word_example_2)
            words = texts.introduction.format(assistant=assistant, one=one, two=two)
            words = f"{reply.content}\n\n{words}\n{self.tappable(texts.privacy)}"
            if sent_size(words) <= REPLY_BYTES:
                reply = replace(reply, content=words, introduces=True)
                subscriber.is_told = True
        # Then an answer that was not read yet.
        for turn_id, (number, question) in subscriber.to_mention.items():
            tap = tap_link(texts.word_answer, f"{CONTINUE}{number}")
            words = texts.unread.format(question=excerpt(question), tap=tap)
            words = f"{reply.content}\n\n{words}"
            if turn_id not in self.turns and sent_size(words) <= REPLY_BYTES:
                reply = replace(reply, content=words, mentions=turn_id)
                del subscriber.to_mention[turn_id]
                break
        return replace(reply, content=outgoing(reply.content))

    def compose_part(self, delivery: Delivery, turn: Turn, part: Part) -> Reply:
        """Return what shows an answer from a part on, or asks for patience."""
        texts, now, subscriber = self.texts, int(time.time()), delivery.subscriber
        head, shown = texts.anew + "\n" if part.is_anew else "", turn.shown()
        # 1. All that is left of an ended answer, if it fits.
        if not turn.is_open:
            content = self.rest_of(turn, shown[part.start :], head)
            if sent_size(content) <= REPLY_BYTES:
                return Reply(content, now, part, stop=len(shown))
        # 2. What fits of it, or was shown of this part before.
        stop = self.part_end(turn, shown, part.start, head)
        if text := shown[part.start : stop].strip("\n"):
            place = part.place and part.place + 1
            offered = subscriber.offer(turn.id, stop, place)
            left = None if turn.is_open else turn.left.get(stop, 0)
            content = head + text + self.tail(turn, offered, left)
            is_early = not delivery.is_ready()
            return Reply(content, now, part, stop, offered, is_early)
        # 3. Nothing can be shown yet: ask for patience.
        offered = part if part.number else subscriber.offer(turn.id, part.start)
        turns = [t for t in subscriber.turns if t.session_id == turn.session_id]
        before = sum(t.is_open and t.id < turn.id for t in turns)
        words = texts.queued if turn.is_queued else texts.thinking
        content = words.format(
            question=excerpt(turn.question),
            before=max(1, before),
            time=spoken_age(texts, turn.age),
            tap=tap_link(texts.word_answer, f"{CONTINUE}{offered.number}"),
            page=self.page_link(turn, texts.word_page),
        )
        return Reply(content, now, part, part.start, offered, True, is_patience=True)

    def rest_of(self, turn: Turn, text: str, head: str) -> str:
        """Return the last text of an ended answer and how it ended, of any size."""
        text, words = text.strip("\n"), ""
        if turn.state != "done":
            retry = tap_link(self.texts.word_retry, f"{RETRY}{turn.id}")
            go_on = tap_link(self.texts.word_go_on)
            words = ending_words(self.texts, turn, retry, go_on)
        if not text:
            return words or self.texts.no_more
        content = f"{head}{text}{self.label}"
        if words:
            content += f"\n\n{words}"
        if turn.chat.has_more_on_page():
            link = "\n" + self.page_link(turn, self.texts.word_page)
            content += link if sent_size(content + link) <= REPLY_BYTES else ""
        return content

    def tail(self, turn: Turn, part: Part, left: int | None) -> str:
        """Return the lines under a part that another one, `part`, follows.

        `left` is how many there are from that on, 0 if that is not known; None: the
        answer is being written.
        """
        texts, page = self.texts, self.page_link(turn, self.texts.word_page)
        line, words = texts.more, texts.word_next
        if left is None:
            line, words = texts.writing, texts.word_writing
        elif left and part.place:
            words += f"（{part.place}/{part.place - 1 + left}）"
        tap = tap_link(words, f"{CONTINUE}{part.number}")
        return f"{self.label}\n\n{line.format(tap=tap, page=page)}"

    def room_in(self, turn: Turn) -> int:
        """Return how many bytes a part may have beside its tail, whichever that is."""
        last = Part(10**9 - 1, turn.id, place=999)
        tails = [self.tail(turn, last, left) for left in (None, 1)]
        return REPLY_BYTES - max(map(sent_size, tails))

    def part_end(self, turn: Turn, shown: str, start: int, head: str = "") -> int:
        """Return where a part ends that more follows: as in its first reply, if any."""
        room = self.room_in(turn) - sent_size(head)
        rest = shown[start : start + 2 * REPLY_BYTES]
        return turn.stops.get(start) or start + cut_reply(rest, room)

    def count_parts(self, turn: Turn, start: int) -> None:
        """Count an ended answer's parts from a start on; it may take a second."""
        starts, shown = [start], turn.shown()
        while (at := starts[-1]) not in turn.left:
            rest = shown[at : at + REPLY_BYTES + 1]
            is_short = len(rest) <= REPLY_BYTES
            if is_short and sent_size(self.rest_of(turn, rest, "")) <= REPLY_BYTES:
                turn.left[at] = 1
            else:
                starts.append(self.part_end(turn, shown, at))
        for number, start in enumerate(reversed(starts), turn.left[at]):
            turn.left[start] = number

    def note_delivery(self, delivery: Delivery, attempt: int, is_taken: bool) -> None:
        """Store for `stats` how text of an answer was delivered, or that it was not."""
        reply = delivery.reply
        part = reply.part if reply and delivery.is_kept else None
        if reply is None or part is None or reply.stop <= part.start:
            return
        how = "part" if part.number else str(attempt + delivery.earlier_attempts)
        stored = self.store.mark_delivered(part.turn_id, how if is_taken else "lost")
        stored.add_done_callback(functools.partial(log_failure, delivery.message.name))

    # Commands

    @command
    async def stop(self, delivery: Delivery) -> str:
        """End the session; what is being written goes on, what waits is not asked."""
        session = delivery.session or delivery.lapsed
        if session is None:
            return self.texts.no_session.format(tap=tap_link("/chatgpt"))
        await self.store.end_session(session.id, time.time())
        self.end_queued(delivery.subscriber)
        return self.texts.stopped.format(tap=tap_link(f"/{session.assistant}"))

    @command
    async def clear(self, delivery: Delivery) -> str:
        """End the session and open a new one with the same assistant."""
        session = delivery.session or delivery.lapsed
        if session is None:
            return self.texts.no_session.format(tap=tap_link("/chatgpt"))
        openid = delivery.message.openid
        delivery.session = await self.open_session(openid, session.assistant)
        return self.texts.cleared

    @command
    async def history(self, delivery: Delivery) -> str:
        """Return a link to the subscriber's history; the one before ends."""
        minutes = self.config.history.history_minutes
        until = time.time() + minutes * 60
        key = await self.store.add_history_link(delivery.message.openid, until)
        page = web_link(self.texts.word_history, f"{self.config.public_url}/h/{key}")
        text = self.texts.history.format(minutes=f"{minutes:g}", page=page)
        if count := await self.store.count_devices(delivery.message.openid):
            tap = tap_link(self.texts.word_sign_out)
            text += "\n" + self.texts.history_devices.format(count=count, tap=tap)
        return text

    @command
    async def help(self, delivery: Delivery) -> str:
        """Say how to ask, and list the assistants and commands."""
        texts, names = self.texts, self.config.assistants
        line = texts.help_assistant
        lines = [line.format(tap=tap_link(f"/{n}"), assistant=n) for n in names]
        is_open = delivery.session or self.config.session.auto_open
        ask = texts.help_ask if is_open else texts.help_begin
        return self.with_notice(texts.help.format(ask=ask, assistants="\n".join(lines)))

    @command
    async def forget(self, delivery: Delivery) -> str:
        """Ask for the confirmation without which nothing is deleted."""
        await self.store.ask_forget(delivery.message.openid, time.time())
        minutes, tap = f"{FORGET_SECONDS / 60:g}", tap_link(self.texts.word_forget)
        return self.texts.forget_ask.format(minutes=minutes, tap=tap)

    async def confirm_forget(self, delivery: Delivery) -> str | None:
        """Delete all about the sender; None if they did not ask for it before."""
        asked_at = delivery.recalled.forget_asked_at
        if not asked_at:
            return None
        if time.time() - asked_at > FORGET_SECONDS:
            return self.texts.forget_late
        reply = self.texts.forgotten.format(tap=tap_link("/chatgpt"))
        return await self.forget_all(delivery, reply)

    async def forget_all(self, delivery: Delivery, reply: str) -> str:
        """End what runs for a sender and delete their data; return what to reply."""
        message, subscriber = delivery.message, delivery.subscriber
        for one in self.deliveries.values():
            if one.subscriber is subscriber:
                one.is_kept = False
        for turn in subscriber.turns:
            turn.restart()  # nothing of it is shown any more
            turn.finish("ended")
            if turn.task:
                turn.task.cancel()
            self.turns.pop(turn.id, None)
        subscriber.turns.clear()
        subscriber.offered.clear()
        subscriber.to_mention.clear()
        subscriber.last_part, subscriber.is_told = 0, False
        self.sign_ins.end(message.openid)
        self.work.results.clear()
        await self.store.forget(message.openid, message.key, outgoing(reply))
        self.work.results.clear()  # of pages that were asked for meanwhile
        is_due = message.openid in self.store.due
        return self.texts.forget_noted if is_due else reply

    # What a page does

    async def ask_here(
        self, openid: str, cookie_hash: str, form: str, text: str
    ) -> TurnPart | str:
        """Take up a question from a device as if it were a message of the chat.

        `form` is the random id of the form: a second sending of its words joins the
        first; others, in a form that the browser had kept, are another question.
        """
        now, name = int(time.time()), f"page-{form}-{self.store.keyed_hash(text)[:8]}"
        message = Message(openid, "", "text", now, msg_id=name, content=text)
        arrived = time.monotonic()
        delivery, _ = self.deliver(message, arrived, cookie_hash)
        news, until = delivery.subscriber.news, arrived + PAGE_SECONDS
        await self.tasks.until(news, lambda: delivery.source is not None, until)
        source = delivery.source
        if isinstance(source, TurnPart):
            return source
        self.deliveries.pop(message.key, None)  # another try may be accepted
        refusal = source if source and isinstance(source, str) else self.texts.trouble
        return OUR_LINK.sub(r"\2（\1）", refusal)  # a page shows it as plain text

    async def handle_page(self, delivery: Delivery) -> Source:
        """Ask what was written on a page, in the session that runs or in a new one."""
        text, openid = delivery.message.content, delivery.message.openid
        if await self.store.device_owner(delivery.cookie_hash) != openid:
            return self.texts.page_signed_out
        if find_command(self.aliases.get(folded(text), text), self.config.assistants):
            return self.texts.page_command.format(text=excerpt(text))
        source = await self.accept_question(delivery, text)
        if not isinstance(source, TurnPart):
            return source
        turn, subscriber = source.turn, delivery.subscriber
        if turn.msg_key != delivery.message.key:
            return source  # the chat asks the same, and will be answered
        if not subscriber.is_told:  # the words stood above the field
            subscriber.is_told = True
            self.store.note(openid, told_at=time.time())
        part = subscriber.offer(turn.id, 0)  # nobody may stay on the page for it
        self.store.offer_unread(openid, part, time.time())
        subscriber.to_mention.setdefault(turn.id, (part.number, turn.question))
        return source

    async def page_session(self, openid: str) -> tuple[int, str, float]:
        """Return the session that runs, or 0; the newest one's assistant and start."""
        since = time.time() - self.config.session.ttl
        newest = await self.store.newest_session(openid, since)
        number, name, opened_at, runs = newest or (0, "", 0.0, False)
        if name not in self.config.assistants:
            name = next(iter(self.config.assistants))
        return number if runs else 0, name, opened_at

    async def begin_topic(self, openid: str, cookie_hash: str, assistant: str) -> None:
        """Open a session, if no such assistant is there with the one used last.

        Nothing is done for a device that was signed out.
        """
        subscriber = self.subscriber(openid)  # held here, or another could be made
        if assistant not in self.config.assistants:
            _, assistant, _ = await self.page_session(openid)
        async with subscriber.lock:
            if await self.store.device_owner(cookie_hash) == openid:
                await self.open_session(openid, assistant)

    def stop_turn(self, openid: str, link_key: str) -> None:
        """End an answer that is being written: what is there of it stays, as cut."""
        for turn in self.turns.values():
            if turn.link_key == link_key and turn.openid == openid:
                self.end_turn(turn, "cut", "stopped")

    async def claim_sign_in(self, openid: str, number: str) -> str:
        """Return what is said to a number that a browser shows, or does not."""
        texts = self.texts
        if self.sign_ins.is_tried_too_often(openid):
            return texts.sign_in_later
        if await self.store.count_devices(openid) >= DEVICES:
            tap = tap_link(texts.word_sign_out)
            return texts.sign_in_full.format(count=DEVICES, tap=tap)
        if not self.sign_ins.claim(openid, number):
            return texts.sign_in_wrong
        return texts.sign_in_ask.format(tap=tap_link(texts.word_let_in))

    async def let_in(self, sign_in: SignIn) -> str | None:
        """Sign a confirmed browser in; return its cookie.

        '' if there are too many, None if a deletion has ended this, or the same browser
        was let in just now.
        """
        cookie, openid = secrets.token_urlsafe(32), sign_in.openid
        subscriber = self.subscriber(openid)
        async with subscriber.lock:
            if self.sign_ins.find(sign_in.cookie_hash) is not sign_in:
                return None
            until = time.time() + self.config.history.device_days * 86400
            is_in = await self.store.add_device(openid, cookie_hash_of(cookie), until)
            self.sign_ins.waiting.pop(sign_in.cookie_hash, None)
        return cookie if is_in else ""

    # What goes on beside the messages

    async def keep_saving(self) -> None:
        """Store the texts of running answers every second, until cancelled."""
        saved: dict[int, tuple[str, int]] = {}  # turn: writing, characters
        while True:
            await asyncio.sleep(SAVE_SECONDS)
            running = [turn for turn in self.turns.values() if turn.is_open]
            states = {turn.id: (turn.writing, len(turn.answer)) for turn in running}
            changed = [t for t in running if saved.get(t.id) != states[t.id]]
            if await self.save_open_answers(changed):
                saved = states
            if self.store.is_wal_behind:
                await self.store.truncate_wal()
            if self.store.due:
                await self.store.forget_due()

    async def save_open_answers(self, turns: list[Turn]) -> bool:
        """Store the text of unfinished answers; say whether that worked."""
        turns = [turn for turn in turns if turn.answer]
        try:
            if turns:
                await self.store.save_texts(turns)
            return True
        except sqlite3.Error as error:
            log.error("text so far not stored: %s", error)
            return False

    async def keep_pruning(self) -> None:
        """Delete what has served its time, every ten minutes, until cancelled.

        That is by our clock and by WeChat's, whichever is behind: a clock that jumps
        deletes nothing, nor does a process before its first push.
        """
        link_seconds = self.config.history.link_hours * 3600
        days = self.config.history.keep_days
        while True:
            await asyncio.sleep(PRUNE_SECONDS)
            now = min(time.time(), self.wechat_ahead + time.monotonic())
            try:
                if now > 0:
                    await self.store.prune(now, link_seconds, days)
            except sqlite3.Error as error:
                log.error("old replies not deleted: %s", error)


def check_commands(config: Config, mistakes: Mistakes) -> None:
    """Note names that mean two things, and replies that are too long."""
    wrong, replies = mistakes.wrong, config.replies
    notice = config.texts.model_notice
    if len(notice) > 100:  # it stands below /help, too
        wrong("replies.model_notice", notice, "at most 100 characters")
    welcome = f"{replies.subscribe}\n\n{notice}"
    for text in (welcome, replies.outside, *replies.keywords.values()):
        size = sent_size(with_taps(text, *config.assistants, *COMMANDS))
        if size > REPLY_BYTES:
            wrong("replies", f"{size} bytes", "at most 1800 bytes with taps")
    for name in config.assistants:
        if folded(name) in COMMANDS:
            wrong(f"assistants.{name}", name, "a name that is no command's")
        if name != sent_by_tap(name):  # it is opened by taps, too
            wanted = "a name of letters, digits, dots, - and _"
            wrong(f"assistants.{name}", name, wanted)
    taken = {folded(word): "replies.keywords" for word in replies.keywords}
    taken |= dict.fromkeys(tap_words(config.texts), "the words of taps")
    for name, text in config.aliases.items():
        where, key = f"aliases.{name}", folded(name)
        if not key or key.startswith("/"):
            wrong(where, name, "a short text without /")
        if key in taken:
            words = "{name}: found {found}, expected a text that is not in {taken}"
            mistakes.add(where, words, found=repr(name), taken=taken[key])
        if not find_command(text, config.assistants):
            wrong(where, text, "a command, or the name of an assistant after /")
        taken[key] = "the aliases"


# ---------------------------------------------------------------------------
# 11. Pages
#
# Minimal HTML for a phone, with no outside resource. Without script, a pending answer
# reloads itself every three seconds. How pages look is in pages/; here records become
# what the templates there ask for. An answer becomes blocks, each one HTML element; one
# that grows is typeset block by block, once for all who follow it (LivePage).
# ---------------------------------------------------------------------------

PAGES = HERE / "pages"
TEMPLATES = """page.html parts.html blocks.html answer.html history.html found.html
    sign_in.html error.html export.md""".split()
# Each page holds those that it needs, so that one request brings it whole.
ASSETS = """page.css notice.css history.css ask.css
    page.js live.js ask.js fold.js found.js sign_in.js""".split()
RENDER_CHARS = 32_768  # the rest of a longer answer stays plain: rendering takes time
PLAIN_CHARS = 8192  # of that rest in one block
FOLD_CHARS = 300  # longer answers are folded in the history, and typeset when opened
UNFOLDED_CHARS = 20_000  # of the newest session; its answers beyond are folded, too
HISTORY_COUNT = 50
FOUND_COUNT = 20  # on a page of what a search found
EVENT_CHARS = 32_768  # in one event of a stream, unless a single block has more
RECONNECT_MS = 1000  # how long a viewer waits after its stream broke off


def element(tag: str, words: str, kind: str = "") -> str:
    """Return an element around escaped words."""
    attribute = f' class="{kind}"' if kind else ""
    return f"<{tag}{attribute}>{html.escape(words)}</{tag}>"


SHORT_CELL = 8  # characters of a table's cell that are not broken into lines


def fix_tokens(tokens: list[Token], above: int, level: int) -> int:
    """Let no heading skip a level and no header cell be empty, for screen readers.

    `above` is the level of the heading that the answer stands under, `level` that of
    the heading before these tokens; return the level of their last one.
    """
    for token, content, end in zip(tokens, tokens[1:], tokens[2:], strict=False):
        if token.type == "heading_open":
            level = min(above + int(token.tag[1]), level + 1, 6)
            token.tag = end.tag = f"h{level}"
        if token.type in ("th_open", "td_open"):
            if not content.content:
                token.tag = end.tag = "td"
            is_long = len(content.content) > SHORT_CELL
            if kind := f"{token.info} long" if is_long else token.info:
                token.attrSet("class", kind.strip())
    return level


HIGHLIGHT_CHARS = 20_000  # a longer block of code stays plain


@functools.cache
def code_rules() -> dict[str, re.Pattern[str]]:
    """Return by a language's name the pattern of its tokens and of signs to escape."""
    rules: dict[str, re.Pattern[str]] = {}
    for table in read_toml(PAGES / "code.toml")["languages"]:
        words, flags = "|".join(table.get("words", "").split()), table.get("flags", "")
        keywords = table.get("pattern") or rf"(?=[^\W\d])(?{flags}:{words})(?!\w)"
        pattern = re.compile(
            f"(?P<k>{keywords})|(?P<c>{table['comment']})|(?P<s>{table['string']})"
            r"""|(?P<n>(?<![\w.])\d[\w.]*+)|[^\W\d]\w*+|[&<>"']"""
        )
        rules |= dict.fromkeys(table["names"].split(), pattern)
    return rules


def highlight(code: str, info: str) -> str:
    """Return code as HTML, its comments, strings, numbers and keywords in spans."""
    language = re.split(r"[^\w+#]", info.strip().lower())[0]
    if language not in code_rules() or len(code) > HIGHLIGHT_CHARS:
        return html.escape(code)

    def as_html(found: re.Match[str]) -> str:
        kind = found.lastgroup
        return element("span", found[0], kind) if kind else html.escape(found[0])

    return code_rules()[language].sub(as_html, code)


def clock(seconds: float, form: str = "%Y-%m-%d %H:%M") -> str:
    """Return a time as the clocks in China show it."""
    return datetime.datetime.fromtimestamp(seconds, BEIJING).strftime(form)


def day_and_time(seconds: float) -> str:
    """Return 今天 14:48, 昨天 09:05, 11月22日 周日 20:10 or 2025年3月1日 08:00."""
    at = datetime.datetime.fromtimestamp(seconds, BEIJING)
    now = datetime.datetime.now(BEIJING)
    day = f"{at.month}月{at.day}日 周{'一二三四五六日'[at.weekday()]}"
    if at.year != now.year:
        day = f"{at.year}年{at.month}月{at.day}日"
    day = {0: "今天", 1: "昨天"}.get((now.date() - at.date()).days, day)
    return f"{day} {at:%H:%M}"


def preview(markdown: str, blocked: BlockedWords) -> str:
    """Return the beginning of a long answer in one line, up to its code or table.

    Its marks stay if a blocked word would appear without them.
    """
    begin = re.split(r"\n(?:```|~~~|\|)", markdown[:FOLD_CHARS].strip())[0]
    text = re.sub(r"（https?://[^）]*）|(?<=]) https?://[!-~]*", "", chat_text(begin))
    return excerpt(begin if blocked.are_in(text) else text.replace("】", "】 "), 80)


SEARCH_CHARS, SEARCH_WORDS = 100, 9  # looked for at most
SNIPPET_CHARS = 80  # shown of a text around the first word found


def snippet(text: str, words: list[str], blocked: BlockedWords) -> Markup:
    """Return a line of a text around the first of the words, with all of them marked.

    Its Markdown stays if without it no word were left, or a blocked one appeared.
    """
    longest_first = sorted(words, key=len, reverse=True)
    pattern = re.compile(f"({'|'.join(map(re.escape, longest_first))})", re.IGNORECASE)
    found = pattern.search(text)
    begin = max(0, found.start() - SNIPPET_CHARS // 4) if found else 0
    part = text[begin : begin + SNIPPET_CHARS + SEARCH_CHARS]
    bare = re.sub(r"\*\*|`+|(?m:^\s*(?:[#>*+-]+ |\|))", "", part)
    is_same = pattern.search(bare) and not blocked.are_in(bare)
    line = excerpt(bare if is_same else part, len(part))
    pieces = enumerate(pattern.split(("…" if begin else "") + line))
    marked = [element("mark", p) if i % 2 else html.escape(p) for i, p in pieces]
    return Markup("".join(marked))


ASSET_COMMENT = r"(?ms)^\s*(//[^\n]*|/\*((?!\*/).)*\*/)\s*$|  // [^\n]*"
# A string of a script, or a sign that needs no spaces around it.
SCRIPT_SIGN = r"('[^'\n]*'|`[^`]*`)| *([=,{}()?:&|<>]+) *"


def minify(path: pathlib.Path) -> Markup:
    """Return a style or script without comments, indents and spaces between signs.

    Pages are sent uncompressed with all they need: this takes a third of it away, which
    keeps a live page under 15 KB, all others under 12.
    """
    text = re.sub(r"(?m)^\s+", "", re.sub(ASSET_COMMENT, "", path.read_text("utf-8")))
    if path.suffix == ".css":
        text = re.sub(r"\s*([{},;>]|:(?= ))\s*", r"\1", text).replace(";}", "}")
    else:
        text = re.sub(SCRIPT_SIGN, r"\1\2", text)
    return Markup(text)


def close_fence(markdown: str) -> str:
    """Return an answer with its last code closed: it may have broken off there."""
    fences = re.findall(r"(?m)^[ \t]*(`{3,}|~{3,})", markdown)
    return markdown + "\n" + fences[-1] if len(fences) % 2 else markdown


@functools.cache
def load_pages() -> jinja2.Environment:
    """Return the templates; raise ConfigError if one is missing or cannot be parsed.

    First called at the start; files changed later wait for the next start. All are
    parsed, but each is compiled when first shown: all at once take a tenth of a start.
    """
    folder = jinja2.FileSystemLoader(PAGES)
    pages = jinja2.Environment(
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        auto_reload=False,
    )
    for one in (clock, day_and_time, excerpt, preview, close_fence, snippet, highlight):
        pages.filters[one.__name__] = one
    pages.globals |= {"ending_words": ending_words, "now": time.time}
    pages.globals |= {"random_hex": secrets.token_hex}
    try:
        for name in ASSETS:
            pages.globals[name.replace(".", "_")] = minify(PAGES / name)
        code_rules()
        formula_rules()
        sources = {name: folder.get_source(pages, name)[0] for name in TEMPLATES}
        for name, source in sources.items():
            pages.parse(source, name)
        pages.loader = jinja2.DictLoader(sources)
    except jinja2.TemplateNotFound as error:
        raise ConfigError("{path}: not found", path=PAGES / str(error.name)) from None
    except jinja2.TemplateSyntaxError as error:
        place = f"{PAGES / str(error.name)}, line {error.lineno}"
        raise ConfigError("{path}: {why}", path=place, why=error.message) from None
    except OSError as error:
        words, why = "{path}: {why}", error.strerror
        raise ConfigError(words, path=error.filename, why=why) from None
    return pages


MAX_FORMULAS = 500  # typeset on a page; each takes a fifth of a millisecond
BOXED = re.compile(r'<menclose notation="box">((?:(?!<menclose).)*?)</menclose>')
# The library's renderer wants the options of its parser, which we do not use.
RENDER_OPTIONS = MarkdownIt("zero", {"breaks": True}).options


def by_macro(macro: Callable, tokens: Sequence[Token], index: int, *_: object) -> str:
    """Render a token by a macro of blocks.html, which gets the next one, too."""
    return str(macro(*tokens[index : index + 2]))


class AnswerRenderer(RendererHTML):
    """The library's renderer, with methods and macros where we want other HTML."""

    def __init__(self, texts: Texts) -> None:
        super().__init__()
        blocks = load_pages().get_template("blocks.html")
        self.macros: Any = blocks.make_module({"texts": texts})
        for name in ("link_open", "fence", "table_open", "table_close"):
            self.rules[name] = types.MethodType(by_macro, getattr(self.macros, name))
        self.formulas = 0  # so far

    def image(self, tokens: Sequence[Token], index: int, *_: object) -> str:
        # As a link, unless the answer holds it: loading one tells a stranger who reads.
        token = tokens[index]
        source, label = str(token.attrGet("src")), Markup(html.escape(token.content))
        if DATA_PICTURE.fullmatch(source):
            return f'<img src="{source}" alt="{label}">'
        return str(self.macros.picture_link(source, label))

    def math_inline(self, tokens: Sequence[Token], index: int, *_: object) -> str:
        token = tokens[index]
        self.formulas += 1
        is_block = token.markup in ("$$", "\\[", "")
        if self.formulas <= MAX_FORMULAS:
            if rendered := formula_mathml(token.content, is_block):
                source = html.escape(token.content)
                rendered = BOXED.sub(r'<mrow class="boxed">\1</mrow>', rendered)
                return rendered.replace("<math ", f'<math data-copy="{source}" ', 1)
        written = token.markup + token.content + CLOSERS.get(token.markup, "")
        return element("code", written)

    math_block = math_inline


def piece_end(text: str, begin: int, most: int) -> int:
    """Return where a piece of a text ends: after a line if the rest is too long."""
    if len(text) - begin <= most:
        return len(text)
    return text.rfind("\n", begin + most // 2, begin + most) + 1 or begin + most


def split_blocks(tokens: list[Token]) -> list[list[Token]]:
    """Return the tokens of each block; the last list has those of one not complete."""
    blocks: list[list[Token]] = [[]]
    depth = 0
    for token in tokens:
        if token.nesting or not token.hidden:  # the others are for the chat
            blocks[-1].append(token)
            depth += token.nesting
            if not depth:
                blocks.append([])
    return blocks


# A line of which no more has come: its next sign decides what the marks are.
ONLY_MARKS = re.compile(r"[\s*#>|`~:+-]*|\s*\d{1,3}[.)]?\s*")


class BlockRenderer:
    """Typesets an answer that grows, block by block; each block is one HTML element.

    A block that is done is never read again. The text beyond RENDER_CHARS stays plain.
    `above` is the level of the heading that the answer stands under.
    """

    def __init__(self, texts: Texts, blocked: BlockedWords, above: int = 0) -> None:
        self.reader, self.renderer = MarkdownReader(), AnswerRenderer(texts)
        self.blocked = blocked
        self.above, self.level = above, max(above, 1)
        self.done: list[str] = []
        self.tokens: list[Token] = []  # of the block that is not done
        self.begin = 0  # where in the Markdown begins what has not been read
        self.is_plain = False
        self.seconds = 0.0  # of processor time for the last rendering

    def render(self, markdown: str, has_ended: bool) -> list[str]:
        """Read what was added; return all blocks, the last of them as if it ended here.

        Until the answer ends, blocks that are not done are left out if they show a
        blocked word: the chat, where words are looked for, does not show them yet.
        """
        began = time.thread_time()
        if not self.is_plain:
            self.is_plain = len(markdown) > RENDER_CHARS
            end = len(markdown) if has_ended else markdown.rfind("\n") + 1
            if self.is_plain:
                end = piece_end(markdown, 0, RENDER_CHARS)
            # Read complete lines, and render the blocks that they complete.
            tokens = self.reader.tokens
            self.reader.read(markdown[self.begin : end], has_ended or self.is_plain)
            self.level = fix_tokens(tokens, self.above, self.level)
            *done, self.tokens = split_blocks(self.tokens + tokens)
            self.done += map(self.render_block, done)
            tokens.clear()
            self.begin = end
        if self.is_plain or has_ended:
            while len(markdown) - self.begin > PLAIN_CHARS:
                end = piece_end(markdown, self.begin, PLAIN_CHARS)
                self.done.append(element("p", markdown[self.begin : end], "plain"))
                self.begin = end
            rest = markdown[self.begin :]
            blocks = [element("p", rest, "plain")] if rest else []
        else:
            blocks = self.unfinished_blocks(markdown[self.begin :])
        if not has_ended and self.blocked.are_in_html("".join(blocks)):
            blocks = []
        self.seconds = time.thread_time() - began
        return self.done + blocks

    def render_block(self, tokens: list[Token]) -> str:
        rendered = self.renderer.render(tokens, RENDER_OPTIONS, {})
        if self.blocked.are_in_html(rendered):  # a formula is set without its brackets
            self.renderer.formulas = MAX_FORMULAS
            rendered = self.renderer.render(tokens, RENDER_OPTIONS, {})
        return str(rendered)

    def unfinished_blocks(self, line: str) -> list[str]:
        """Return the blocks that are not done, with a line that is not complete."""
        reader, formulas = self.reader.copy([]), self.renderer.formulas
        reader.read("" if ONLY_MARKS.fullmatch(line) else line, has_ended=True)
        fix_tokens(reader.tokens, self.above, self.level)
        *tokens, _ = split_blocks(self.tokens + reader.tokens)
        blocks = list(map(self.render_block, tokens))
        self.renderer.formulas = formulas
        return blocks


def render(bot: Bot, template: str, **values: object) -> str:
    """Return what a template makes of these values."""
    page, config = load_pages().get_template(template), bot.config
    return page.render(config=config, texts=config.texts, blocked=bot.blocked, **values)


POLICY = (
    "default-src 'none'; style-src 'nonce-{nonce}'; script-src 'nonce-{nonce}'; "
    "connect-src 'self'; img-src data:; base-uri 'none'; form-action {forms}; "
    "frame-ancestors 'none'"
)


def page_response(
    bot: Bot, name: str, status: int = 200, **values: object
) -> web.Response:
    """Return a page made from a template, with the headers that keep it private."""
    nonce = secrets.token_urlsafe(12)
    text = render(bot, f"{name}.html", nonce=nonce, status=status, **values)
    response = web.Response(text=text, status=status, content_type="text/html")
    forms = "'none'"
    if "<form" in text:  # whose Origin would be null without a referrer
        response.headers["Referrer-Policy"], forms = "same-origin", "'self'"
    policy = POLICY.format(nonce=nonce, forms=forms)
    response.headers["Content-Security-Policy"] = policy
    return response


@dataclass(frozen=True, slots=True)
class AskForm:
    """What a page's field to ask in needs, for a visitor who is signed in."""

    token: str  # proves that a form is ours, and of this device
    session: int  # that runs, 0: none
    assistant: str  # of the newest session
    opened_at: float
    is_told: bool  # has read what happens to what they write
    typed: str  # and refused
    refusal: str


@dataclass(frozen=True, slots=True)
class ShownExchange:
    """An exchange as a page shows it."""

    turn: Turn
    blocks: list[str]  # of the typeset answer; none if it is folded
    text: str = ""  # what 复制全文 copies: as the chat would show both, with the label
    is_live: bool = False  # was being written when this was made


def typeset(bot: Bot, turn: Turn, above: int = 0) -> ShownExchange:
    """Return an exchange whose answer has ended, for a page."""
    label = bot.config.replies.label
    renderer = BlockRenderer(bot.config.texts, bot.blocked, above)
    blocks = renderer.render(turn.answer, has_ended=True)
    end = piece_end(turn.answer, 0, RENDER_CHARS)
    answer = chat_text(turn.answer[:end]) + turn.answer[end:]
    return ShownExchange(turn, blocks, f"{turn.question}\n\n{answer}\n{label}".strip())


def sse_event(data: dict, event: str = "", event_id: str = "") -> bytes:
    """Return one event of an event stream."""
    lines = [f"event: {event}"] if event else []
    lines += [f"id: {event_id}"] if event_id else []
    lines += [f"retry: {RECONNECT_MS}", f"data: {json.dumps(data, ensure_ascii=False)}"]
    return ("\n".join(lines) + "\n\n").encode()


LIVE_SECONDS = 0.25  # at least, between two typesettings of an answer
QUICK_SECONDS, QUICK_CHARS = 0.005, 1000  # typeset in the loop; more in a thread
FORMULA_SIGN = re.compile(r"[$\\]")  # a formula takes long, the first one most of all


async def typeset_once(bot: Bot, turn: Turn) -> ShownExchange:
    """Return an exchange whose answer has ended, typeset once for all who want it."""
    return await bot.work.once(("page", turn.id), typeset, bot, turn)


class LivePage:
    """One writing of an answer as all who follow it see it; typeset once for them."""

    def __init__(self, bot: Bot, writing: str) -> None:
        self.writing = writing
        self.renderer = BlockRenderer(bot.config.texts, bot.blocked)
        self.blocks: list[str] = []  # replaced, never changed
        self.done = 0  # how many of the blocks are final
        self.extent = 0, False  # Turn.extent of what the blocks show
        self.next_at = 0.0  # when it may be typeset next
        self.task: asyncio.Task | None = None  # of `refresh`; no viewer cancels it

    async def refresh(self, bot: Bot, turn: Turn) -> None:
        """Typeset what was added; up to four times a second, in a thread if long."""
        await asyncio.sleep(self.next_at - time.monotonic())
        self.next_at = time.monotonic() + LIVE_SECONDS
        if turn.page is not self:
            return  # the answer is written again, and nobody looks at this page
        text, has_ended = turn.answer, not turn.is_open
        shown, _ = self.extent
        added = text[shown:]
        is_quick = self.renderer.seconds < QUICK_SECONDS and len(added) < QUICK_CHARS
        if has_ended and not shown:
            blocks = (await typeset_once(bot, turn)).blocks
        elif is_quick and not FORMULA_SIGN.search(added):
            blocks = self.renderer.render(text, has_ended)
        else:
            blocks = await bot.work.run(self.renderer.render, text, has_ended)
        self.blocks, self.done = blocks, len(self.renderer.done)
        self.extent = len(text), has_ended
        self.next_at = time.monotonic() + max(LIVE_SECONDS, 4 * self.renderer.seconds)

    def events(self, begin: int) -> Iterator[bytes]:
        """Yield the events that replace all blocks from one on, EVENT_CHARS in each.

        `more` says that another follows at once; the viewer removes nothing before.
        """
        blocks, done, end = self.blocks, self.done, -1
        while end < len(blocks):
            end, chars = begin, 0
            while end < len(blocks) and chars < EVENT_CHARS:
                chars += len(blocks[end])
                end += 1
            more = {"more": True} if end < len(blocks) else {}
            data = {"keep": begin, "html": blocks[begin:end], **more}
            yield sse_event(data, event_id=f"{self.writing}:{min(end, done)}")
            begin = end


async def live_page(bot: Bot, turn: Turn) -> LivePage:
    """Return an answer typeset so far, as it is or was a moment ago."""
    while True:  # once, or again when the answer was begun again meanwhile
        page = turn.page = turn.page or LivePage(bot, turn.writing)
        if page.extent != turn.extent:
            if not page.task or page.task.done():
                page.task = bot.tasks.start(page.refresh(bot, turn), turn.name)
            await asyncio.wait([page.task])
        if page is turn.page:
            return page


# ---------------------------------------------------------------------------
# 12. HTTP handlers
#
# Each takes a request and returns the response. Whether it may comes first: a push must
# be signed (read_push), a page needs a link's key or a device's cookie (find_linked,
# find_visitor), a form on a device its token besides (read_form).
#
# A push that is not signed gets a bare 403, one that cannot be read `success`, and one
# that is to come again a dropped connection. Pages and forms raise Refusal, and
# `answer_errors` says why.
# ---------------------------------------------------------------------------

BOT = web.AppKey("bot", Bot)


def is_signed_now(request: web.Request) -> bool:
    """Say whether WeChat, or `check`, has signed a request's URL, and lately."""
    bot, query = request.app[BOT], request.query
    timestamp, nonce = query.get("timestamp", ""), query.get("nonce", "")
    signature, token = query.get("signature", ""), bot.config.wechat.token
    is_right = is_signed(token, signature, timestamp, nonce)
    return is_right and bot.replays.is_fresh(timestamp)


CHECK_AGENT = "wxgpt check"  # User-Agent of `check`, whose probes are no news
# `check` repeats these to the owner until the console's verification is right.
UNVERIFIED = "verification with a wrong signature or time: is the token the same?"
UNSIGNED = "push with a wrong signature or time: is the token the same?"


async def verify_url(request: web.Request) -> web.Response:
    """Answer the console's verification with the echostr; no push may be signed so."""
    bot, is_right = request.app[BOT], is_signed_now(request)
    is_check = request.headers.get("User-Agent") == CHECK_AGENT
    if not (is_right or is_check):
        bot.warn(UNVERIFIED)
    if not (is_right and bot.replays.is_first(request.query["signature"], "GET")):
        raise web.HTTPForbidden(text="")
    log.info("verified by %s", "`check`" if is_check else "WeChat's console")
    if not is_check:  # the console has our token now
        for words in (UNVERIFIED, UNSIGNED):
            bot.warned.pop(words, None)
    return web.Response(text=request.query.get("echostr", ""))


def drop_connection(request: web.Request) -> web.Response:
    """Close the connection without a response: any would end WeChat's retries."""
    if request.transport:
        request.transport.abort()
    return web.Response()


BODY_SECONDS = 10.0  # how long a push's body may take to arrive


async def read_push(request: web.Request) -> Message | None:
    """Return the message of a push; None if all it gets is `success`.

    Raise HTTPForbidden for one that WeChat did not sign, ConnectionResetError for a
    body that does not arrive.
    """
    bot, query = request.app[BOT], request.query
    if not is_signed_now(request):
        if "signature" in query:  # else it is a stranger's
            bot.warn(UNSIGNED)
        raise web.HTTPForbidden(text="")
    try:
        async with asyncio.timeout(BODY_SECONDS):
            body = await request.read()
    except TimeoutError:
        raise ConnectionResetError from None
    except web.RequestPayloadError:
        body = b""  # torn: nothing that can be read
    if request.headers.get("User-Agent") == CHECK_AGENT:  # does a POST come through?
        return None
    try:
        if bot.cipher:
            sealed, token = find_encrypted(body), bot.config.wechat.token
            signature, nonce = query.get("msg_signature", ""), query.get("nonce", "")
            signed = query["timestamp"], nonce, sealed
            if not sealed or not is_signed(token, signature, *signed):
                bot.warn("a push is not rightly encrypted: is the console in 安全模式?")
                raise web.HTTPForbidden(text="")
            body = bot.cipher.open(sealed)
        message = parse_message(body)
    except BadMessage as error:
        bot.warn("unreadable push: %s", error)
        return None
    if not bot.replays.is_first(query["signature"], message):
        raise web.HTTPForbidden(text="")
    bot.heard_at = time.monotonic()
    bot.wechat_ahead = max(bot.wechat_ahead, message.created - bot.heard_at)
    return message


async def receive_message(request: web.Request) -> web.StreamResponse:
    """Answer a push with a passive reply, or with `success` whatever breaks."""
    bot, arrived = request.app[BOT], time.monotonic()
    delivery, number = None, 0  # until the push is read
    try:
        message = await read_push(request)
        if message is None:
            return web.Response(body=SUCCESS)
        # Wait for the reply.
        delivery, number = bot.deliver(message, arrived)
        name = f"{message.name} attempt={number}"
        reply = await bot.reply_to(delivery, number, arrived)
        if reply is None:
            log.info("%s held to the end, cut", name)
            return drop_connection(request)
        # Write it.
        body = render_text_reply(message, reply.content, reply.created)
        if bot.cipher and reply.content:  # `success` is never encrypted
            body = bot.cipher.seal(body, reply.created)
        response = web.Response(body=body, content_type="text/xml", charset="utf-8")
        await response.prepare(request)
        await response.write_eof()
        # Note what it brought.
        bot.note_delivery(delivery, number, is_taken=True)
        outcome = "answered early" if reply.is_early else "replied"
        if not reply.content:
            outcome = "nothing to say"
        elif reply.is_patience:
            outcome = "asked for patience"
        elif reply.part and reply.part.number:
            outcome = f"part {reply.part.number} sent"
        log.info("%s %s after %.1f s", name, outcome, time.monotonic() - arrived)
        return response
    except web.HTTPException:
        raise  # 403, or 413: no push of WeChat's is that long
    except (asyncio.CancelledError, ConnectionResetError):
        if delivery:
            seconds = time.monotonic() - arrived
            log.info("%s WeChat hung up after %.1f s", name, seconds)
            bot.note_delivery(delivery, number, is_taken=False)
        raise
    except Exception:
        log.exception("a push broke off at the door")
        return web.Response(body=SUCCESS)


def redirect(location: str) -> web.Response:
    """Send a browser on to another page of ours."""
    return web.Response(status=303, headers={"Location": location})


def home_of(request: web.Request) -> str:
    """Return the address of the history that a form stands on, seen from the form's."""
    return "../" + request.match_info.get("key", "me")


def wants_json(request: web.Request) -> bool:
    """Say whether a page's script sends this, and not the browser itself."""
    return request.headers.get("Accept", "").startswith("application/json")


class Refusal(Exception):
    """Why a page or form is refused: a status, and words if the status has none."""

    def __init__(self, status: int, words: str = "") -> None:
        super().__init__(status, words)


Handler = Callable[..., Awaitable[web.StreamResponse]]


@web.middleware
async def answer_errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Say on a page, or to its script, what was refused or broke; of a push never."""
    bot = request.app[BOT]
    try:
        return await handler(request)
    # Nobody reads the response any more, or sends the rest of a form.
    except (TimeoutError, ConnectionResetError, web.RequestPayloadError):
        return drop_connection(request)
    except sqlite3.Error as error:  # a full or locked disk
        if request.writer.output_size:  # in the middle of an export
            raise
        log.error("%s not done: %s", request.path, error)
        status, words = 503, bot.config.texts.page_failed
    except Refusal as refusal:
        status, words = refusal.args
        usual = {404: bot.config.texts.page_missing, 410: bot.config.texts.page_expired}
        words = words or usual.get(status, "")  # an owner may want no words
    if wants_json(request):
        return web.json_response({"error": words}, status=status)
    return page_response(bot, "error", status, words=words)


async def front_page(request: web.Request) -> web.Response:
    """Say that the account works here and how to begin; nothing about anybody."""
    bot = request.app[BOT]
    return page_response(bot, "error", words=bot.config.texts.page_front)


async def missing_page(request: web.Request) -> web.Response:
    """Refuse an address that leads nowhere."""
    raise Refusal(404)


async def find_linked(request: web.Request) -> Turn:
    """Return the turn of a link; raise Refusal if there is none."""
    bot = request.app[BOT]
    turn = await bot.store.turn_by_link(request.match_info["key"])
    if turn is None:
        raise Refusal(404)
    if time.time() - turn.created_at > bot.config.history.link_hours * 3600:
        raise Refusal(410)
    return turn


async def note_read(bot: Bot, turns: list[Turn]) -> None:
    """Note that answers which have ended were read on a page."""
    turns = [turn for turn in turns if not turn.is_open]
    for turn in turns:
        if subscriber := bot.subscribers.get(turn.openid):
            subscriber.to_mention.pop(turn.id, None)
    try:
        await bot.store.mark_read([turn.id for turn in turns])
    except sqlite3.Error as error:  # a full disk does not keep people from reading
        log.error("not stored as read: %s", error)


# __Host-: neither another host nor a page over http can set these.
COOKIE, WAIT_COOKIE = "__Host-wxgpt", "__Host-wxgpt-wait"


def set_cookie(response: web.Response, name: str, value: str, seconds: float) -> None:
    """Set a cookie that lasts this long; 0 seconds delete it."""
    age = int(seconds)
    flags = {"path": "/", "secure": True, "httponly": True, "samesite": "Lax"}
    response.set_cookie(name, value, max_age=age, **flags)  # type: ignore[arg-type]


class Visitor(NamedTuple):
    """The subscriber whose pages a request may see, and by what right."""

    openid: str
    cookie_hash: str = ""  # of the signed-in device; '': by a history's link
    token: str = ""  # proves that a form is ours, and of this device


async def find_device(request: web.Request) -> Visitor | None:
    """Return the visitor whose device asks; None if it is not signed in."""
    bot, cookie = request.app[BOT], request.cookies.get(COOKIE, "")
    if not cookie or not bot.config.is_secure:
        return None
    cookie_hash = cookie_hash_of(cookie)
    openid = await bot.store.device_owner(cookie_hash)
    if openid is None or openid in bot.config.limits.deny:
        return None
    token = bot.store.keyed_hash(f"form {cookie_hash}")
    return Visitor(openid, cookie_hash, token)


async def find_visitor(request: web.Request) -> Visitor | None:
    """Return the visitor of a history, by its link or by a signed-in device.

    Raise Refusal for a link that does not work; None if the device is not signed in.
    """
    key = request.match_info.get("key")
    if key is None:
        return await find_device(request)
    owner = await request.app[BOT].store.history_owner(key)
    if owner is None:
        raise Refusal(404)
    openid, expires_at = owner
    if time.time() > expires_at:
        raise Refusal(410)
    return Visitor(openid)


FORM_FIELDS = 9


async def read_form(request: web.Request) -> tuple[Visitor, dict[str, str]]:
    """Return who sends a form, and its fields; raise Refusal unless they may.

    A device's cookie alone does not prove it: somebody else's page can send it along.
    """
    bot, visitor = request.app[BOT], await find_visitor(request)
    if visitor is None:
        raise Refusal(401, bot.config.texts.page_signed_out)
    form: dict[str, str] = {}
    if request.content_type == "application/x-www-form-urlencoded":
        async with asyncio.timeout(BODY_SECONDS):
            text = (await request.read()).decode("utf-8", "replace")
        with contextlib.suppress(ValueError):  # more fields than any form of ours has
            form = dict(urllib.parse.parse_qsl(text, max_num_fields=FORM_FIELDS))
    if visitor.cookie_hash:
        given = form.get("token", "").encode()
        is_ours = hmac.compare_digest(visitor.token.encode(), given)
        origin = str(yarl.URL(bot.config.public_url).origin())
        if not is_ours or request.headers.get("Origin") != origin:
            raise Refusal(403, bot.config.texts.page_failed)
    return visitor, form


async def send_page(
    request: web.Request, openid: str, make: Callable[[], Awaitable[web.Response]]
) -> web.StreamResponse:
    """Make a subscriber's page and send it, when it is its turn.

    PAGES_AT_ONCE are made at the same time, and two of a subscriber made or sent. While
    one is sent it takes room of PAGE_BYTES, not a place: slow readers hold up nobody.
    """
    bot = request.app[BOT]
    subscriber = bot.subscriber(openid)  # held, or its places would be forgotten
    async with subscriber.pages:
        async with bot.pages, asyncio.timeout(PAGE_SECONDS):
            response = await make()
            size = response.content_length or 0
            if size > bot.page_room:  # then it keeps its place until it is sent
                await response.prepare(request)
                await response.write_eof()
                return response
            bot.page_room -= size
        try:
            async with asyncio.timeout(PAGE_SECONDS):
                await response.prepare(request)
                await response.write_eof()
        finally:
            bot.page_room += size
    return response


async def ask_form(
    bot: Bot, device: Visitor, typed: str = "", refusal: str = ""
) -> AskForm:
    """Return what a page needs to ask for a device's subscriber."""
    newest = await bot.page_session(device.openid)
    recalled = await bot.store.recall("", device.openid, time.time())
    return AskForm(device.token, *newest, recalled.is_told, typed, refusal)


async def answer_page(request: web.Request) -> web.StreamResponse:
    """Show one question and its answer, live while it is being written."""
    bot, stored = request.app[BOT], await find_linked(request)

    async def make() -> web.Response:
        turn = bot.turns.get(stored.id, stored)  # newer than what is stored
        device, asking = await find_device(request), None
        if device and device.openid == turn.openid:
            asking = await ask_form(bot, device)
        live = await live_page(bot, turn) if turn.is_open else None
        if live and turn.is_open:
            one = ShownExchange(turn, live.blocks, is_live=True)
        else:  # it has ended, perhaps just now
            await note_read(bot, [turn])
            one = await typeset_once(bot, turn)
        return await bot.work.run(page_response, bot, "answer", one=one, asking=asking)

    return await send_page(request, stored.openid, make)


VIEWERS = 50  # that may follow answers of one subscriber at the same time
# In all; beyond it each subscriber has two. One that does not read holds 80 KB.
ALL_VIEWERS = 1000
PING_SECONDS = 15.0  # how long a live page's stream may be silent
EVENT_HEADERS = {
    "Content-Type": "text/event-stream; charset=utf-8",
    "X-Accel-Buffering": "no",
}


def whole_number(text: str, otherwise: int) -> int:
    """Return the number a browser sent, or another if it is missing or made up."""
    return int(text) if re.fullmatch("[0-9]{1,15}", text) else otherwise


class Viewer:
    """What a browser that follows an answer has of it, from the events it was sent."""

    def __init__(self, last: str) -> None:
        # `last`: the id of the newest event it got, WRITING:DONE as in LivePage, or ''.
        self.writing, _, done = last.partition(":")  # whose blocks it has; '': none
        self.done = whole_number(done, 0)  # how many of them are final and stay
        self.extent = 0, False  # of what it was shown, as in LivePage
        self.is_queued: bool | None = None  # what its page says; None: nothing yet

    def catch_up(self, turn: Turn, page: LivePage) -> Iterator[bytes]:
        """Yield the events that it lacks."""
        has_news = page.extent[0] > 0 and self.extent != page.extent
        if self.writing != page.writing or self.done > page.done:
            # What it has, if anything, goes, even if nothing takes its place yet.
            has_news = has_news or self.writing != ""
            self.writing, self.done = page.writing, 0
        self.extent = page.extent
        if has_news:
            begin, self.done = self.done, page.done
            yield from page.events(begin)
        if not turn.answer and self.is_queued != turn.is_queued:
            self.is_queued = turn.is_queued
            yield sse_event({"queued": self.is_queued}, "queued")
        if self.extent[1]:
            yield sse_event({"state": turn.state}, "done")


async def follow(bot: Bot, turn: Turn, viewer: Viewer) -> AsyncIterator[bytes]:
    """Yield the events of an answer that a viewer lacks, until the answer ends."""
    tasks = bot.tasks

    def has_news() -> bool:
        is_waiting = not turn.answer and viewer.is_queued != turn.is_queued
        is_same = viewer.writing == turn.writing and viewer.extent == turn.extent
        return is_waiting or not is_same or tasks.closes_at is not None

    while tasks.closes_at is None:
        for event in viewer.catch_up(turn, await live_page(bot, turn)):
            yield event
        if viewer.extent[1]:
            return
        until = time.monotonic() + PING_SECONDS
        if not await tasks.until(turn.deltas, has_news, until):
            yield b": ping\n\n"


async def answer_events(request: web.Request) -> web.StreamResponse:
    """Stream an answer as it is written; end with its final state."""
    bot, found = request.app[BOT], await find_linked(request)
    turn = bot.turns.get(found.id) or await bot.store.turn(found.id)  # if it has ended
    if turn is None:  # deleted meanwhile
        raise Refusal(404)
    subscriber = bot.subscriber(turn.openid)
    viewers = sum(one.viewers for one in bot.subscribers.values())
    most = VIEWERS if viewers < ALL_VIEWERS else 2
    if subscriber.viewers >= most:  # the page reloads itself instead
        raise Refusal(503, bot.config.texts.page_failed)
    response = web.StreamResponse(headers=EVENT_HEADERS)
    subscriber.viewers += 1
    try:
        await response.prepare(request)
        viewer = Viewer(request.headers.get("Last-Event-ID", ""))
        async for event in follow(bot, turn, viewer):
            async with asyncio.timeout(PAGE_SECONDS):
                await response.write(event)
    finally:
        subscriber.viewers -= 1
    return response


async def sign_in_page(request: web.Request) -> web.Response:
    """Show the number that signs a browser in, or let it in once that was confirmed.

    Opening a link alone signs nobody in: the number has to be sent to the account.
    """
    bot, cookie = request.app[BOT], request.cookies.get(WAIT_COOKIE, "")
    texts = bot.config.texts
    if not bot.config.is_secure:
        raise Refusal(404, texts.page_not_secure)
    sign_in, fresh = bot.sign_ins.find(cookie_hash_of(cookie)), ""
    if sign_in and sign_in.is_confirmed:
        try:
            device_cookie = await bot.let_in(sign_in)
        except sqlite3.Error as error:  # the page asks again in a moment
            log.error("a browser was not signed in: %s", error)
        else:
            if device_cookie == "":
                raise Refusal(403, texts.page_devices_full)
            response = redirect("me")
            if device_cookie:
                seconds = bot.config.history.device_days * 86400
                set_cookie(response, COOKIE, device_cookie, seconds)
                set_cookie(response, WAIT_COOKIE, "", 0)
            return response
    if not sign_in and (not cookie or "new" in request.query):
        fresh = secrets.token_urlsafe(32)
        sign_in = bot.sign_ins.begin(cookie_hash_of(fresh))
    number = sign_in.number if sign_in else ""
    response = page_response(bot, "sign_in", number=number)
    if fresh:
        set_cookie(response, WAIT_COOKIE, fresh, SIGN_IN_SECONDS)
    return response


async def make_history(
    request: web.Request, visitor: Visitor, typed: str = "", refusal: str = ""
) -> web.Response:
    """Return a page of a visitor's history, or one exchange of it.

    On a device there is a field to ask, with what was `typed` there and refused.
    """
    bot, query, openid = request.app[BOT], request.query, visitor.openid
    only = whole_number(query.get("only", ""), -1)
    if only >= 0:
        turns = await bot.store.turns_of(openid, only + 1, 1)
        turns = [turn for turn in turns if turn.id == only]
    else:
        below = whole_number(query.get("before", ""), 2**62)
        turns = await bot.store.turns_of(openid, below, HISTORY_COUNT + 1)
    chars, older = sum(len(turn.question + turn.answer) for turn in turns), 0
    if len(turns) > HISTORY_COUNT or len(turns) > 1 and chars > PAGE_CHARS:
        turns.pop()
        older = turns[-1].id
    turns = [bot.turns.get(turn.id, turn) for turn in turns]
    # What is long is folded, but not in the newest session: one goes on reading there.
    made: dict[int, ShownExchange] = {}
    ended: list[Turn] = []
    chars = 0
    for turn in turns:
        chars += len(turn.answer)
        is_newest = turn.session_id == turns[0].session_id and chars < UNFOLDED_CHARS
        if turn.is_open:
            blocks = (await live_page(bot, turn)).blocks
            made[turn.id] = ShownExchange(turn, blocks, is_live=True)
        elif is_newest or len(turn.answer) <= FOLD_CHARS or only >= 0:
            ended.append(turn)
    await note_read(bot, ended)
    asking = None
    if visitor.cookie_hash:
        asking = await ask_form(bot, visitor, typed, refusal)
    home = request.match_info.get("key") or f"{bot.config.root}/me"
    values: dict[str, Any] = {"home": home, "older": older, "asking": asking}
    values |= {"is_first": not query, "is_whole": only < 0}

    def make_page() -> web.Response:
        made.update((turn.id, typeset(bot, turn, above=3)) for turn in ended)
        exchanges = [made.get(turn.id) or ShownExchange(turn, []) for turn in turns]
        status = 409 if refusal else 200
        return page_response(bot, "history", status, exchanges=exchanges, **values)

    return await bot.work.run(make_page)


async def history_page(request: web.Request) -> web.StreamResponse:
    """Show a history by its link, or by a device, with a field to ask."""
    visitor = await find_visitor(request)
    if visitor is None:
        return await sign_in_page(request)
    make = functools.partial(make_history, request, visitor)
    return await send_page(request, visitor.openid, make)


def form_done(request: web.Request, **values: str) -> web.Response:
    """Tell a page's script what came of its form, or send the browser back."""
    return web.json_response(values) if wants_json(request) else redirect("../me")


async def submit_question(request: web.Request) -> web.StreamResponse:
    """Take up a question; a refused one stays in its field."""
    bot, (device, form) = request.app[BOT], await read_form(request)
    text = stream_safe(ILLEGAL.sub("", form.get("question", ""))).strip()
    form_id = form.get("id", "")
    if not text or not re.fullmatch(r"[A-Za-z0-9_-]{8,64}", form_id):
        return form_done(request)
    source = await bot.ask_here(device.openid, device.cookie_hash, form_id, text)
    if isinstance(source, TurnPart):
        turn = source.turn
        return form_done(request, key=turn.link_key, session=str(turn.session_id))
    if wants_json(request):
        raise Refusal(409, source)
    make = functools.partial(make_history, request, device, text, source)
    return await send_page(request, device.openid, make)


async def stop_answer(request: web.Request) -> web.Response:
    """End an answer that is being written for a device's subscriber."""
    bot, (device, form) = request.app[BOT], await read_form(request)
    bot.stop_turn(device.openid, form.get("key", ""))
    return form_done(request)


async def new_topic(request: web.Request) -> web.Response:
    """Open a new session, with another assistant if one is named."""
    bot, (device, form) = request.app[BOT], await read_form(request)
    await bot.begin_topic(device.openid, device.cookie_hash, form.get("assistant", ""))
    return form_done(request)


async def leave(request: web.Request) -> web.Response:
    """Sign this device out."""
    bot, (device, _) = request.app[BOT], await read_form(request)
    await bot.store.sign_out(device.openid, device.cookie_hash)
    response = form_done(request)
    set_cookie(response, COOKIE, "", 0)
    return response


async def search_page(request: web.Request) -> web.StreamResponse:
    """Show where in a history all words of a form are; without words, the history."""
    bot, (visitor, form) = request.app[BOT], await read_form(request)
    words = form.get("words", "")[:SEARCH_CHARS].replace("\0", "").split()
    words = list(dict.fromkeys(words))[:SEARCH_WORDS]
    before = whole_number(form.get("before", ""), 2**62)
    if not words:
        return redirect(home_of(request))

    async def make() -> web.Response:
        openid, token, home = visitor.openid, visitor.token, home_of(request)
        turns, older = await bot.store.search(openid, words, before, FOUND_COUNT)
        values = {"words": words, "turns": turns, "older": older, "token": token}
        return await bot.work.run(page_response, bot, "found", home=home, **values)

    return await send_page(request, visitor.openid, make)


async def export(request: web.Request) -> web.StreamResponse:
    """Send all of a subscriber's exchanges as a Markdown file, a few at a time."""
    bot, (visitor, _) = request.app[BOT], await read_form(request)
    last, session = 0, 0  # the newest turn sent, and its session
    day = clock(time.time(), "%Y-%m-%d")
    name = urllib.parse.quote(f"{bot.config.texts.page_history}-{day}.md")
    headers = {
        "Content-Type": "text/markdown; charset=utf-8",
        "Content-Disposition": f"attachment; filename*=UTF-8''{name}",
    }
    response = web.StreamResponse(headers=headers)
    host = yarl.URL(bot.config.public_url).host
    head = render(bot, "export.md", turns=[], host=host)
    subscriber = bot.subscriber(visitor.openid)  # held, as in send_page
    async with subscriber.pages, bot.exports, asyncio.timeout(PAGE_SECONDS):
        await response.prepare(request)
        await response.write(head.encode())
        while turns := await bot.store.turns_after(visitor.openid, last):
            values = {"turns": turns, "session": session}
            text = await bot.work.run(render, bot, "export.md", **values)
            await response.write(text.encode())
            last, session = turns[-1].id, turns[-1].session_id
    return response


async def form_page(request: web.Request) -> web.Response:
    """Send whoever opens or reloads a form's address as a page to where the form is."""
    return redirect(home_of(request))


async def health(request: web.Request) -> web.Response:
    """Say whether the database answers; tell `check`, by its signature, what came."""
    bot, query = request.app[BOT], request.query
    try:
        await bot.store.rows("SELECT 1")
    except sqlite3.Error as error:
        return web.json_response({"status": str(error)}, status=503)
    found: dict[str, object] = {"status": "ok"}
    is_check = "signature" in query and is_signed_now(request)
    if is_check and bot.replays.is_first(query["signature"], "healthz"):
        now, heard = time.monotonic(), bot.heard_at
        found["heard"] = None if heard is None else now - heard
        found["warned"] = [[now - at, words] for at, words in bot.warned.values()]
    return web.json_response(found)


PROBE_PATH = "/healthz/stream"


async def probe_stream(request: web.Request) -> web.StreamResponse:
    """Send two events half a second apart: `check` sees if a proxy buffers."""
    response = web.StreamResponse(headers=EVENT_HEADERS)
    await response.prepare(request)
    await response.write(sse_event({"event": 1}))
    await asyncio.sleep(0.5)
    await response.write(sse_event({"event": 2}))
    return response


def is_our_fault(record: logging.LogRecord) -> bool:
    """Say whether an error that aiohttp logs is more than a stranger's bad HTTP."""
    error = record.exc_info[1] if record.exc_info else None
    not_http = (aiohttp.http_exceptions.HttpProcessingError, web.RequestPayloadError)
    return not isinstance(error, not_http)


ROOT_FILE_BYTES = 4096  # far more than the platform's MP_verify_….txt have


async def root_file(request: web.Request) -> web.Response:
    """Send a small text file of the owner's, which proves that the domain is theirs."""
    folder = request.app[BOT].config.server.root_files
    path = pathlib.Path(folder, request.match_info["name"])

    def follow_no_link(path: str, flags: int) -> int:  # nor wait for a pipe
        return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK)

    with contextlib.suppress(OSError), open(path, "rb", opener=follow_no_link) as file:
        is_file = stat.S_ISREG(os.fstat(file.fileno()).st_mode)
        body = file.read(ROOT_FILE_BYTES + 1)
        if folder and is_file and len(body) <= ROOT_FILE_BYTES:
            return web.Response(body=body, content_type="text/plain")
    raise Refusal(404)


PRIVATE_HEADERS = {
    "Cache-Control": "no-store",
    "Referrer-Policy": "no-referrer",
    "X-Robots-Tag": "noindex",
    "X-Content-Type-Options": "nosniff",
}


async def set_headers(request: web.Request, response: web.StreamResponse) -> None:
    """Keep private what is sent, and hide the versions of Python and aiohttp."""
    for name, value in PRIVATE_HEADERS.items():
        response.headers.setdefault(name, value)  # a page with a form has its own
    response.headers["Server"] = "wxgpt"


# ---------------------------------------------------------------------------
# 13. Application
#
# What lives as long as the process, opened and closed in order; the socket that under
# systemd outlives it; the log.
# ---------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def open_chat(
    config: Config,
) -> AsyncIterator[tuple[dict[str, ChatClient], Pictures]]:
    """Open the HTTP sessions; give a client for each assistant, and one for pictures.

    Connections are not limited, since `at_once` limits the calls.
    """
    timeout = aiohttp.ClientTimeout(total=None, connect=15, sock_connect=10)
    async with contextlib.AsyncExitStack() as stack:

        async def open_http(connector: aiohttp.BaseConnector) -> aiohttp.ClientSession:
            http = aiohttp.ClientSession(connector=connector, timeout=timeout)
            return await stack.enter_async_context(http)

        direct = await open_http(aiohttp.TCPConnector(limit=0))
        clients = {}
        for name, assistant in config.assistants.items():
            http = direct
            if assistant.proxy.startswith("socks"):
                # Optional; load_config has checked that it is installed.
                import aiohttp_socks  # type: ignore[import-not-found, unused-ignore]

                proxy = aiohttp_socks.ProxyConnector.from_url(assistant.proxy, limit=0)
                http, assistant = await open_http(proxy), replace(assistant, proxy="")
            clients[name] = ChatClient(assistant, http)
        yield clients, Pictures(config.wechat.picture_hosts, direct)


def make_cipher(config: Config) -> Cipher | None:
    """Return the cipher of safe mode, None in plain mode; raise ConfigError."""
    wechat = config.wechat
    if not wechat.aes_key:
        return None
    try:
        return Cipher(wechat.token, wechat.app_id, wechat.aes_key)
    except ImportError:
        words = "wechat.aes_key: safe mode needs: pip install cryptography"
        raise ConfigError(words) from None


def make_blocked(config: Config) -> BlockedWords:
    """Return the blocked words; raise ConfigError if their file cannot be read."""
    blocked = BlockedWords(config.limits.blocked_words)
    try:
        blocked.refresh()
    except (OSError, UnicodeError) as error:
        why = getattr(error, "strerror", "") or "save the file as UTF-8"
        words, path = "limits.blocked_words: {path}: {why}", blocked.path
        raise ConfigError(words, path=path, why=why) from None
    return blocked


def make_app(bot: Bot) -> web.Application:
    """Return the application with all its routes."""
    app = web.Application(client_max_size=BODY_BYTES, middlewares=[answer_errors])
    app[BOT] = bot
    path = bot.config.server.path.rstrip("/")
    routes = [
        web.get(path + "{slash:/?}", verify_url),
        web.post(path + "{slash:/?}", receive_message),
        web.get("/a/{key}", answer_page),
        web.get("/a/{key}/events", answer_events, allow_head=False),
        web.get("/h/{key}", history_page),
        web.get("/me", history_page),
        web.post("/me/ask", submit_question),
        web.post("/me/stop", stop_answer),
        web.post("/me/new", new_topic),
        web.post("/me/leave", leave),
        web.post("/me/search", search_page),
        web.post("/me/export", export),
        web.post("/h/{key}/search", search_page),
        web.post("/h/{key}/export", export),
        web.get("/h/{key}/{form:search|export}", form_page),
        web.get("/me/{form:ask|stop|new|leave|search|export}", form_page),
        web.get("/healthz", health),
        web.get(PROBE_PATH, probe_stream, allow_head=False),
        web.get("/{name:[A-Za-z0-9_-]+[.]txt}", root_file),
        web.get("/", front_page),
        web.get("/{path:.*}", missing_page),
    ]
    app.add_routes(routes)
    app.on_response_prepare.append(set_headers)
    return app


def sd_notify(state: str, *descriptors: int) -> None:
    """Send systemd a state, and descriptors to keep for the next process.

    See sd_notify(3). Nothing is sent, and nothing fails, if systemd does not listen.
    """
    address = re.sub("^@", "\0", os.environ.get("NOTIFY_SOCKET", ""))  # @: abstract
    if not address:
        return
    kind = socket.AF_UNIX, socket.SOCK_DGRAM
    with contextlib.suppress(OSError), socket.socket(*kind) as out:
        out.connect(address)
        socket.send_fds(out, [state.encode()], descriptors)


BACKLOG = 1024  # connections that may wait in the socket during a restart
UNREAD_BYTES = 16 * 1024  # of a connection; 1,000 with long bodies at once take 70 MB
SD_FIRST_DESCRIPTOR = 3  # the first one that systemd passes on; sd_listen_fds(3)


class ListenError(OwnerError):
    """An address that cannot be listened on."""


def listen(host: str, port: int) -> socket.socket:
    """Return the listening socket, kept by systemd or new; raise ListenError.

    systemd keeps it during a restart. Without it, a proxy would answer WeChat with 502
    at once, and WeChat would use up its attempts within a second.
    """
    is_kept = os.environ.get("LISTEN_PID") == str(os.getpid())
    if is_kept and os.environ.get("LISTEN_FDNAMES") == "listen":
        kept = socket.socket(fileno=SD_FIRST_DESCRIPTOR)
        wanted = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        if kept.getsockname()[:2] in [address[:2] for *_, address in wanted]:
            return kept
        # The settings have changed; systemd's copy would listen on, so shut it down.
        kept.shutdown(socket.SHUT_RDWR)
        kept.close()
        sd_notify("FDSTOREREMOVE=1\nFDNAME=listen")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        new = socket.create_server((host, port), family=family, backlog=BACKLOG)
    except OSError as error:
        why = os.strerror(error.errno) if error.errno else str(error)
        if isinstance(error, socket.gaierror):  # its numbers are no errnos
            why = "the name does not resolve"
        words = "cannot listen on {host} port {port}: {why}"
        raise ListenError(words, host=host, port=port, why=why) from None
    new.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, UNREAD_BYTES)
    sd_notify("FDSTORE=1\nFDNAME=listen", new.fileno())
    return new


async def keep_watchdog() -> None:
    """Tell systemd that the event loop runs, until cancelled.

    Returns at once if it does not ask for that; sd_watchdog_enabled(3).
    """
    pid = str(os.getpid())
    seconds = float(os.environ.get("WATCHDOG_USEC", 0)) / 1e6
    if not seconds or os.environ.get("WATCHDOG_PID", pid) != pid:
        return
    while True:
        sd_notify("WATCHDOG=1")
        await asyncio.sleep(seconds / 2)


GRACE_SECONDS = 4.0  # how long running answers may go on after SIGTERM
LINGER_SECONDS = 0.25  # part of it, for requests on connections accepted last


async def stop_listening(runner: web.AppRunner, listener: socket.socket) -> None:
    """Take in who waits at the socket, which closing it would reset, and close it.

    Connections accepted last get a moment to send their request.
    """
    loop = asyncio.get_running_loop()
    assert runner.server
    loop.remove_reader(listener)
    for _ in range(2):  # the event loop needs two rounds to accept a connection
        await asyncio.sleep(0)
    until = time.monotonic() + LINGER_SECONDS  # they may be without end
    with contextlib.suppress(OSError):  # none is left
        while time.monotonic() < until:
            connection, _ = listener.accept()
            connection.setblocking(False)
            await loop.connect_accepted_socket(runner.server, connection)
    for site in list(runner.sites):
        await site.stop()
    if runner.server.connections:
        await asyncio.sleep(LINGER_SECONDS)


@contextlib.asynccontextmanager
async def open_server(config: Config) -> AsyncIterator[tuple[Bot, int]]:
    """Serve inside the block, which gets the bot and the port.

    All that lives as long as the process is opened here, and closed in reverse order.
    """
    async with contextlib.AsyncExitStack() as stack:
        store = await stack.enter_async_context(open_store(config.database.path))
        chat = await stack.enter_async_context(open_chat(config))
        bot = Bot(config, store, *chat, make_blocked(config), make_cipher(config))
        stack.push_async_callback(bot.close)
        runner = web.AppRunner(
            make_app(bot),
            access_log=None,
            handler_cancellation=True,  # ends a hung-up request; its work goes on
            auto_decompress=False,  # WeChat compresses nothing; bombs stay shut
            lingering_time=1.0,  # for what is left of a refused request's body
            # aiohttp waits this long twice for a client that does not read; in all, a
            # shutdown takes less than ten seconds.
            shutdown_timeout=GRACE_SECONDS + LINGER_SECONDS,
        )
        await runner.setup()
        stack.push_async_callback(runner.cleanup)
        grace = GRACE_SECONDS - LINGER_SECONDS
        stack.callback(lambda: bot.end_waits(time.monotonic() + grace))
        listener = listen(config.server.host, config.server.port)
        site = web.SockSite(runner, listener, backlog=BACKLOG)
        await bot.resume_turns()  # before a retry can ask for one of them
        await site.start()
        for work in (bot.keep_saving(), bot.keep_pruning(), keep_watchdog()):
            bot.tasks.start(work, "upkeep")
        yield bot, runner.addresses[0][1]
        await stop_listening(runner, listener)


class JournalFormatter(logging.Formatter):
    """Formats one line an event: with its priority for journald, else with the time."""

    PRIORITIES = {"DEBUG": 7, "INFO": 6, "WARNING": 4, "ERROR": 3, "CRITICAL": 2}

    def format(self, record: logging.LogRecord) -> str:
        """Return the text of a record; each line of a traceback has its priority."""
        text = super().format(record)
        if "JOURNAL_STREAM" not in os.environ:
            return f"{time.strftime('%H:%M:%S')} {record.levelname.lower()} {text}"
        priority = self.PRIORITIES.get(record.levelname, 5)
        return "\n".join(f"<{priority}>{line}" for line in text.split("\n"))


def set_up_log() -> None:
    """Send the log to stderr."""
    handler = logging.StreamHandler()
    handler.setFormatter(JournalFormatter())
    # No line shows these, so do not look them up (Logging HOWTO, Optimization).
    logging._srcfile = None
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    logging.getLogger("aiohttp").setLevel(logging.WARNING)
    logging.getLogger("aiohttp.server").addFilter(is_our_fault)


def tell(words: object) -> str:
    """Return English words, or an error, in the owner's language, if owner/ is here."""
    try:
        from owner.words import explain
    except ImportError:  # the server alone was copied
        return str(words)
    return explain(words)


# What wxgpt.example.toml and the documents have in place of an owner's own.
EXAMPLE_URL = "http://wx.example.com"
EXAMPLE_TOKEN = "replaceThisToken"
EXAMPLE_KEYS = ("sk-replace-this", "sk-...")
STILL_EXAMPLE = "public_url is still the example's: no phone can reach it"
NEXT_STEP = (
    "next: open {url}/healthz on a phone, which must show ok; give WeChat's console "
    "the URL {url}{path}; or let `wxgpt.py check` test it all"
)


async def run_server(config: Config) -> None:
    """Serve until SIGTERM or SIGINT; a second one exits at once."""
    stop, loop = asyncio.Event(), asyncio.get_running_loop()

    def on_signal() -> None:
        if stop.is_set():
            os._exit(1)
        stop.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal)
    # The database's thread waits for the interpreter lock at every statement. With the
    # default of 5 ms the slowest of 1,000 waiting requests was answered 2 s later.
    sys.setswitchinterval(0.0005)
    # What is loaded by now stays, so the garbage collector need not look at it; and a
    # message leaves little garbage, so fewer collections save 0.1 ms a message.
    gc.freeze()
    gc.set_threshold(5000)
    async with open_server(config) as (_, port):
        log.info("serving on %s port %d", config.server.host, port)
        if sys.stderr.isatty():
            url, path = config.public_url, config.server.path
            words = STILL_EXAMPLE if url == EXAMPLE_URL else NEXT_STEP
            print(tell(words).format(url=url, path=path), file=sys.stderr)
        sd_notify("READY=1")
        await stop.wait()
        log.info("stopping")
        sd_notify("STOPPING=1")


# ---------------------------------------------------------------------------
# 14. The command line
#
# Without a command the server runs. Every other command line is read in owner/, where
# its commands are: what is here, it imports.
# ---------------------------------------------------------------------------


def print_error(error: object) -> None:
    """Print why the process ends, line by line; journald takes them as errors."""
    priority = "<3>" if "JOURNAL_STREAM" in os.environ else ""
    for line in tell(error).splitlines():
        print(f"{priority}wxgpt: {line}", file=sys.stderr)


def find_risks(config: Config, path: str, user: int) -> Iterator[tuple[str, str, str]]:
    """Yield where others may get in if `user` serves: the place, why, how to fix it."""
    # systemd lets nobody else into its folder of credentials.
    is_credential = os.path.dirname(path) == os.environ.get("CREDENTIALS_DIRECTORY")
    if os.stat(path).st_mode & 0o077 and not is_credential:
        found, fix = "others on this machine can read {path}", "chmod 600 {path}"
        yield "settings", found.format(path=path), fix.format(path=path)
    if user == 0:
        yield "user", "root serves", "use wxgpt.service, which has a user of its own"
    if not config.wechat.aes_key and not config.is_secure:
        found = "http:// in 明文模式: who is on the way can read pushes and repeat them"
        yield "public_url", found, "https://, or 安全模式 (app_id and aes_key)"


def check_placeholders(config: Config, mistakes: Mistakes) -> None:
    """Note what still is as in the example.

    The address alone is no mistake: in a trial the name may lead here.
    """
    others = len(mistakes.lines)
    if config.wechat.token == EXAMPLE_TOKEN:
        wanted = "one of your own: everybody knows this one"
        mistakes.wrong("wechat.token", EXAMPLE_TOKEN, wanted)
    for name, one in config.assistants.items():
        if one.api_key in EXAMPLE_KEYS:
            wanted = "the key your provider gave you"
            mistakes.wrong(f"assistants.{name}.api_key", one.api_key, wanted)
    if len(mistakes.lines) > others and config.public_url == EXAMPLE_URL:
        mistakes.wrong("public_url", EXAMPLE_URL, "the address of this machine")


def read_settings(path: str, environ: Mapping[str, str]) -> Config:
    """Return the settings to serve with; raise ConfigError."""
    return load_config(path, environ, check_commands, check_placeholders)


def serve_command(path: str) -> int:
    """Serve with these settings; return the exit status, or raise ConfigError."""
    config = read_settings(path, os.environ)
    load_pages()
    load_meanings()
    set_up_log()
    for line in effective_settings(config):
        log.info("%s", line)
    for risk in find_risks(config, path, os.geteuid()):
        log.warning("%s: %s; better: %s", *risk)
    if config.public_url == EXAMPLE_URL:
        log.warning(STILL_EXAMPLE)
    try:
        asyncio.run(run_server(config))
    except (StoreError, ListenError) as error:
        print_error(error)
        return 1
    return 0


def set_up_streams() -> None:
    """Let the terminal take every text: GBK has no ✓, and a closed stream is None."""

    def similar(error: UnicodeError) -> tuple[str, int]:
        assert isinstance(error, UnicodeEncodeError)
        char = error.object[error.start]
        return {"✓": "√", "✗": "×"}.get(char, "?"), error.start + 1

    codecs.register_error("similar", similar)
    for name in ("stdin", "stdout", "stderr"):
        stream = getattr(sys, name) or open(os.devnull, "r+", encoding="utf-8")
        setattr(sys, name, stream)
        if name != "stdin":
            is_ascii = codecs.lookup(stream.encoding).name == "ascii"
            encoding = "utf-8" if is_ascii else stream.encoding
            stream.reconfigure(encoding=encoding, errors="similar")


def main() -> int:
    """Run the command line; return the exit status."""
    set_up_streams()
    # owner/ imports `wxgpt`: it is to find this module, not to load it a second time.
    sys.modules.setdefault("wxgpt", sys.modules[__name__])
    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
        try:
            match sys.argv[1:]:
                case [] | ["serve"]:
                    return serve_command("wxgpt.toml")
                case ["--config", path] | ["serve", "--config", path]:
                    return serve_command(path)
                case words:
                    from owner.commands import run_command

                    return run_command(words)
        finally:
            print(end="", flush=True)  # raises BrokenPipeError here, not at the exit
    except ConfigError as error:
        print_error(error)
        return 2
    except ModuleNotFoundError as error:  # wxgpt.py was copied without owner/
        line = "the installation is incomplete ({why}): download it again"
        print_error(OwnerError(line, why=str(error)))
        return 1
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except OSError as error:  # also of `check | head`, which needs no words
        if not isinstance(error, BrokenPipeError):
            line = "{path}: {why}" if error.filename else "{why}"
            why = error.strerror or str(error)
            print_error(OwnerError(line, path=error.filename, why=why))
        # Drop what is still in the buffer.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    finally:  # a late Ctrl-C kills quietly; Python would print a traceback
        signal.signal(signal.SIGINT, signal.SIG_DFL)


if __name__ == "__main__":
    sys.exit(main())
