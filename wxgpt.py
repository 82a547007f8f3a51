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

The path of a message; a function stands above its callers, but the methods of Bot
stand in the order of the path:

    receive_message -> read_push: is_signed, parse_message
                    -> Bot.deliver -> Bot.reply_to -> render_text_reply
                                          |  waits for
    in the message's task:   Bot.find_source -> handle_message -> handle_text
                             -> a command, a part, or accept_question
    in the question's task:  Bot.converse -> ask_models -> ChatClient.stream
                             -> Turn.append -> Store.finish_turn

A question from a subscriber's own page comes by ask_on_page -> Bot.ask_here and goes
the same way from Bot.find_source on; its answer is read on the page.

A request only waits and a task only writes. They meet in a Delivery (the requests of
one message and the one reply they all get) and in a Turn (a question and its answer,
which grows while the model writes). No request does work that must outlive its
connection.

In memory: deliveries of the last minute, open turns, who waits for what. In SQLite:
sessions, turns, parts, decided replies; a question is stored before the model is asked,
a reply before it is sent, and what a killed process left unfinished is asked again by
the next one.

Beside this file: schema.sql; texts.toml, every line people read; providers.toml, what
chat APIs mean by their words; pages/, what a browser shows, and the tables of formulas;
owner/, the commands that do not serve, which import this file and not the other way
round.

Glossary: openid (a subscriber of this account), message (what came; its MsgId is the
same every time it is sent), request or attempt (one time it is sent), delivery (all
requests of a message), passive reply, session (a conversation with one assistant), turn
(a question and its answer), delta (a piece of a streamed answer), chat text (what the
chat shows of the model's Markdown), part (a slice of the chat text that one reply
shows).

Run `python wxgpt.py demo` to try it, `python wxgpt.py --config wxgpt.toml` to serve.
"""

import signal
import sys

# One before 3.10 does not get here: it stops at the first `match`, which says the same.
if sys.version_info < (3, 11):  # noqa: UP036
    found = ".".join(map(str, sys.version_info[:2]))
    sys.exit(f"wxgpt: 需要 Python 3.11 或更新，这里是 {found} (Python is too old)")
if __name__ == "__main__":  # hold Ctrl-C during the imports; `main` ends quietly on it
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])

import argparse
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
    place = pathlib.Path(__file__).parent
    better = f"{place}/.venv/bin/python {place}/wxgpt.py"
    if not (place / ".venv/bin/python").exists():
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
BEIJING = datetime.timezone(datetime.timedelta(hours=8))

# WeChat delivers a sticker as one of these texts (from reports to many projects).
STICKER_TEXTS = ("【收到不支持的消息类型，暂无法显示】", "[Unsupported Message]")

# What no text of others keeps: what XML 1.0 cannot contain, lone surrogates included
# (WeChat shows an error for it), and Unicode's characters for internal use: our links.
ILLEGAL = re.compile("[\0-\x08\x0b\x0c\x0e-\x1f\ud800-\udfff\ufdd0-\ufdef\ufffe\uffff]")


# ---------------------------------------------------------------------------
# 2. Configuration
#
# One TOML file. Each setting is one dataclass field with its type, default, bounds and
# comment, and the file is checked against these fields. What subscribers read is in
# texts.toml; [texts] in the settings replaces single lines of it.
# ---------------------------------------------------------------------------


class OwnerError(Exception):
    """What an owner reads when the program cannot go on, in lines."""

    def __init__(self, words: str = "", **values: object) -> None:
        # The words of each line, and what is filled in: see `tell`.
        self.lines = [(words, values)]

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

    def require(self, is_met: object, name: str, found: object, expected: str) -> None:
        """Note that the named setting is not as expected unless a condition is met."""
        if not is_met:
            shown = "nothing" if found is None else repr(found)
            self.add(name, FOUND, found=shown, expected=expected)


def bounded(default: float, least: float, most: float) -> Any:
    """Return the field of a number with the range it may have."""
    return field(default=default, metadata={"bounds": (least, most)})


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
    fallback: str = ""  # the assistant whose model is asked when this one fails
    fallback_after: float = bounded(20.0, 0, 3600)  # or is silent so long; 0: never


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
    outside_hours: float = bounded(24.0, 0, 87_600)  # once in so many; 0: each time
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

    path: str = ""  # a file; empty: wxgpt.db in the state directory


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
        """Say whether nobody between a phone and us can read along or change anything.

        Browsers take loopback for that too, without TLS.
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
    mistakes.require(isinstance(table, dict), name, table, "a table")
    table = table if isinstance(table, dict) else {}
    prefix = f"{name}." if name else ""
    check_names(table, [entry.name for entry in fields(kind)], prefix, mistakes)
    values = {}
    for entry in fields(kind):
        key, where, value = entry.name, prefix + entry.name, table.get(entry.name)
        is_required = entry.default is MISSING and entry.default_factory is MISSING
        bounds = entry.metadata.get("bounds", ())
        if dataclasses.is_dataclass(entry.type):
            values[key] = read_table(entry.type, table.get(key, {}), where, mistakes)
        elif entry.type not in TYPE_NAMES:  # read by load_config
            values[key] = value
        elif has_type(value, entry.type) and (
            not bounds or bounds[0] <= value <= bounds[1]
        ):
            values[key] = tuple(value) if isinstance(value, list) else value
        elif key in table or is_required:
            found, words = "nothing", FOUND_WITHIN if bounds else FOUND
            if key in table:
                is_secret = entry.metadata.get("secret")
                found = "something else" if is_secret else repr(value)
            plain = (f"{bound:f}".rstrip("0").rstrip(".") for bound in bounds)
            ends = dict(zip(("least", "most"), plain, strict=False))
            expected = TYPE_NAMES[entry.type]
            mistakes.add(where, words, found=found, expected=expected, **ends)
            if is_required:
                values[key] = ""  # there is no default to go on with
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
    tables = table.values() if isinstance(table, dict) else [table]
    if not all(isinstance(one, dict) for one in tables):
        # What was found is not shown: it may be a misplaced API key.
        mistakes.require(False, "assistants", "no tables", "a table of tables")
        return {}
    filled = {k: environ[v] for k, v in CHATGPT_VARIABLES.items() if environ.get(v)}
    if "chatgpt" in table or "api_key" in filled:
        table = {**table, "chatgpt": filled | table.get("chatgpt", {})}
    else:
        expected = "a table of this name, whichever model it asks"
        mistakes.require(False, "assistants.chatgpt", None, expected)
    return {
        name: read_table(AssistantSettings, one, f"assistants.{name}", mistakes)
        for name, one in table.items()
    }


TEXTS = pathlib.Path(__file__).with_name("texts.toml")


def read_texts(changes: Any, mistakes: Mistakes | None = None) -> Texts:
    """Return the lines of texts.toml with an owner's changes, if any are expected.

    A changed line may leave out placeholders of the default, but not add any.
    """
    lines, mistakes = read_toml(TEXTS), mistakes or Mistakes()
    for name, line in lines.items():
        if not isinstance(line, str):
            where, found = f"{TEXTS}: {name}", repr(line)
            raise ConfigError(FOUND, name=where, found=found, expected="text")
    mistakes.require(isinstance(changes, dict), "texts", changes, "a table")
    changes = changes if isinstance(changes, dict) else {}
    check_names(changes, lines, "texts.", mistakes)
    for name, line in changes.items():
        mistakes.require(isinstance(line, str), f"texts.{name}", line, "text")
        if name not in lines or not isinstance(line, str):
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
            mistakes.add(f"texts.{name}", FOUND, found=found, expected=names)
        except (ValueError, LookupError, AttributeError) as error:
            mistakes.add(f"texts.{name}", "{name}: wrong braces: {why}", why=error)
    return Texts(lines)


# What an HTTP header may be called, but for those that describe the request's body.
HEADER_NAME = r"(?i)(?!content-|transfer-)[!#$%&'*+.^_`|~0-9a-z-]+"


def is_public_url(url: str) -> bool:
    """Say whether links can begin with a URL: a host, maybe a port and a path."""
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
    mistakes: Mistakes,
) -> None:
    """Note values of an assistant that cannot work."""
    require, hidden = mistakes.require, "something else"  # in place of a secret
    where, url, key = f"assistants.{name}", one.base_url, one.api_key.strip()
    is_name = name and not re.search(r"[\s/]", name)
    require(is_name, where, name, "a name without spaces and slashes")
    source = setting_source(name, "base_url", one, environ)
    plain = re.sub("//[^/@]*@", "//", url.strip().partition("?")[0])
    is_url = is_public_url(plain)
    require(is_url, source, url, "an http(s) URL")
    source, found = setting_source(name, "api_key", one, environ), key and hidden
    is_key = re.fullmatch(r"[!-~]+", key)  # it goes into a header
    require(is_key, source, found, "the key of the API, without blanks")
    is_model = one.model and one.model == one.model.strip()
    expected = "the name of a model, without blanks around it"
    require(is_model, f"{where}.model", one.model, expected)
    for header, content in one.headers.items():
        place, is_header = f"{where}.headers", re.fullmatch(HEADER_NAME, header)
        require(is_header, place, header, "names of further HTTP headers")
        is_line = re.fullmatch(r"[!-~]([ -~]*[!-~])?", content)
        wanted = "one line of letters, digits and signs"
        require(is_line, f"{place}.{header}", hidden, wanted)
    proxy = re.sub(r"^(https?|socks[45]h?)://([^/]*@)?", "http://", one.proxy)
    is_proxy = not proxy or is_public_url(proxy)
    require(is_proxy, f"{where}.proxy", "***", "an http, https or socks URL")
    if one.proxy.startswith("socks"):
        has_package = importlib.util.find_spec("aiohttp_socks")
        wanted = "http(s), or socks after: pip install aiohttp-socks"
        require(has_package, f"{where}.proxy", "***", wanted)
    is_other = not one.fallback or one.fallback in others
    require(is_other, f"{where}.fallback", one.fallback, "another assistant's name")
    for own in ("model", "messages", "stream"):
        is_free, place = own not in one.extra, f"{where}.extra.{own}"
        require(is_free, place, one.extra.get(own), "anything but this key")
    try:
        json.dumps(one.extra, allow_nan=False)
    except (TypeError, ValueError):  # a date, nan
        expected = "what JSON has: texts, numbers, true, lists, tables"
        require(False, f"{where}.extra", hidden, expected)


def check_values(
    config: Config, environ: Mapping[str, str], mistakes: Mistakes
) -> None:
    """Note values that cannot work."""
    require = mistakes.require
    url, path, wechat = config.public_url, config.server.path, config.wechat
    require(is_public_url(url), "public_url", url, "http:// or https:// and a host")
    is_own = not url.endswith(path.rstrip("/") or "//")
    require(is_own, "public_url", url, "the address without the path of server.path")
    host = config.server.host
    is_host = re.fullmatch(r"(?a)[\w.-]*|[\da-fA-F.]*(:[\da-fA-F.]*){2,}(%\w+)?", host)
    require(is_host, "server.host", host, "an address like 127.0.0.1 or 0.0.0.0")
    is_path = re.fullmatch(r"(?a)(?!/(me|healthz)\b)(/[\w.~-]+)+/?", path)
    require(is_path, "server.path", path, "a path like /wechat")
    folder = config.server.root_files
    is_folder = not folder or os.access(folder, os.X_OK) and os.path.isdir(folder)
    require(is_folder, "server.root_files", folder, "a folder that can be read")
    is_token = re.fullmatch(r"[A-Za-z0-9]{3,32}", wechat.token)
    found = wechat.token and "***"
    require(is_token, "wechat.token", found, "3 to 32 letters and digits")
    # Not the account's original id, nor AppSecret, which stand beside it.
    is_app_id = not re.fullmatch(r"gh_\w*|[0-9a-f]{32}|.*\s.*", wechat.app_id)
    found = wechat.app_id if wechat.app_id.startswith("gh_") else "***"
    require(is_app_id, "wechat.app_id", found, "wx and 16 letters and digits")
    is_complete = bool(wechat.app_id) == bool(wechat.aes_key)
    found = "only app_id" if wechat.app_id else "only aes_key"
    require(is_complete, "wechat.aes_key", found, "app_id and aes_key, or neither")
    if not re.fullmatch(r"([A-Za-z0-9]{43})?", wechat.aes_key):
        words = "{name}: found {count} characters, expected {expected}"
        values = {"count": len(wechat.aes_key), "expected": "43 letters and digits"}
        mistakes.add("wechat.aes_key", words, **values)
    for name, one in config.assistants.items():
        others = config.assistants.keys() - {name}
        check_assistant(name, one, others, environ, mistakes)


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
            shown = "***" if value and entry.metadata.get("secret") else repr(value)
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
    said: str = ""  # title and summary of an article, or the name of a place

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


MARKS_IN_A_ROW = 30  # combining ones, of Unicode's stream-safe format (UAX #15)
LATE_MARKS = "\u0f73\u0f75\u0f81\uff9e\uff9f"  # become marks when they are normalised
RARE_RUN = re.compile(f"[^\0-\u02ff\u3100-\u9fff\uac00-\ud7a3]{{{MARKS_IN_A_ROW},}}.")


def stream_safe(text: str) -> str:
    """Return text without what is over 30 combining marks in a row.

    Unicode's normalising sorts them, in the square of their number.
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
    text = stream_safe(ILLEGAL.sub("", body.decode("utf-8", "ignore")))
    try:
        xml = xmltodict.parse(text).get("xml")
    except (ExpatError, ValueError) as error:
        raise BadMessage(f"not readable as XML: {error}") from None
    if not isinstance(xml, dict):
        raise BadMessage("no fields inside <xml>")
    root = {name: value for name, value in xml.items() if isinstance(value, str)}
    if "FromUserName" not in root and "Encrypt" in root:
        raise BadMessage("encrypted, but app_id and aes_key are not set")
    if not all(map(root.get, ("FromUserName", "ToUserName", "MsgType"))):
        raise BadMessage("no FromUserName, ToUserName or MsgType")
    created = root.get("CreateTime", "")
    return Message(
        openid=root["FromUserName"],
        account=root["ToUserName"],
        msg_type=root["MsgType"].lower(),
        created=int(created) if re.fullmatch(r"[0-9]{1,12}", created) else 0,
        msg_id=root.get("MsgId", ""),
        content=stream_safe(root.get("Content", "")),
        event=root.get("Event", "").lower(),
        event_key=root.get("EventKey", ""),
        picture_url=root.get("PicUrl", ""),
        said="\n".join(filter(None, map(root.get, ("Title", "Description", "Label")))),
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


def cdata(text: str) -> str:
    """Return text as XML character data that WeChat's parser reads."""
    clean = ILLEGAL.sub("\ufffd", text).replace("]]>", "]]]]><![CDATA[>")
    return f"<![CDATA[{clean}]]>"


# The content of a reply that hands a text to WeChat's own AI (转接AI回复). `outgoing`
# takes the character out of all others.
WECHAT_AI = "\ufdd3"


def render_text_reply(message: Message, content: str, created: int) -> bytes:
    """Return the passive reply's body: XML, or `success` for an empty content."""
    if not content:
        return b"success"  # WeChat shows its error text for an empty Content
    kind = f"<MsgType><![CDATA[text]]></MsgType><Content>{cdata(content)}</Content>"
    if content == WECHAT_AI:
        kind = "<MsgType><![CDATA[transfer_biz_ai_ivr]]></MsgType>"
    return (
        f"<xml><ToUserName>{cdata(message.openid)}</ToUserName>"
        f"<FromUserName>{cdata(message.account)}</FromUserName>"
        f"<CreateTime>{created}</CreateTime>{kind}</xml>"
    ).encode()


def size_of(text: str) -> int:
    """Return the size of a text as WeChat counts it: in bytes of UTF-8."""
    return len(text.encode())


# Our links are made of these until a reply leaves: nobody else can write them.
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


def no_link(text: str) -> str:
    """Return text in which WeChat finds no link, and our XML nothing illegal."""
    return re.sub(r"(?i)<(?=/?a)", "<\u200b", ILLEGAL.sub("", text))


def outgoing(text: str) -> str:
    """Return a reply's text as it is sent: our own links in it, and no others.

    Nothing is removed or decoded behind this gate, which could join others' characters
    to a link.
    """
    kept, at = [], 0
    for link in OUR_LINK.finditer(text):
        anchor = f'<a href="{ILLEGAL.sub("", link[1])}">{no_link(link[2])}</a>'
        kept += [no_link(text[at : link.start()]), anchor]
        at = link.end()
    return "".join([*kept, no_link(text[at:])])


def sent_size(text: str) -> int:
    """Return the size that a text has when it is sent."""
    return size_of(outgoing(text))


def excerpt(text: str, length: int = 12) -> str:
    """Return the beginning of a question as one line in which WeChat finds no link."""
    line = " ".join(text.split())
    return line if len(line) <= length else line[:length] + "…"


def tap_link(words: str, content: str = "") -> str:
    """Return a link that sends `content`, or else its words, for the subscriber.

    Android decodes the content twice, so only characters that survive that are kept,
    and it ignores a link whose msgmenuid is empty.
    """
    sent = re.sub(r"[^\w()./_-]", "", content or words)
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

FORMULAS = pathlib.Path(__file__).parent / "pages" / "formulas.toml"
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
    return read_toml(FORMULAS)


def bracketed(text: str) -> str:
    """Put a text in brackets if a slash beside it would take only a part of it."""
    return text if ONE_SIGN.fullmatch(text) else f"({text})"


MAX_SCRIPT_CHARS = 200  # or it would be gone through again for each around it


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
    return "/".join((over, under) if is_derivative else map(bracketed, (over, under)))


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
    """Return the arguments of each command, what writes it, and its kind of piece."""
    rules = formula_rules()
    commands: dict[str, tuple[str, Callable[..., str], str]] = {
        "frac": ("mm", fraction_text, "fraction"),
        "sqrt": ("om", root_text, "root"),
        "overset": ("mm", over_text, ""),
        "substack": ("M", lambda lines: lines.replace("\n", ", "), ""),
        "underset": ("mm", functools.partial(script_text, "_"), ""),
        "overbrace": ("m", bracketed, ""),
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
        # a script on nothing must not attach to what stands before it
        return [replace(base, text=text if base.text else " " + text, kind=kind)]

    def argument(self, kind: str = "m") -> str:
        """Read one argument of a command as text."""
        if kind == "t":
            words = re.sub(r"\\(?:[ ,:;>]|q?quad)|~|\s+", " ", self.source())
            if re.search(r"\\[^%&_#{}$]|(?<!\\)\$", words):
                raise ValueError("mathematics among words")
            return re.sub(r"\\([%&_#{}$])|[{}]", r"\1", words)
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
        name = formula_rules()["same"].get(token[1:], token[1:])
        if token in ("{", "$"):  # a bare tabular holds words and $
            pieces = self.row("}" if token == "{" else "$")
        elif token in tuple("}&^_#\\"):
            raise ValueError(f"stray {token}")
        elif token[0] != "\\":
            is_minus = token == "-" and self.tokens[-1] != ">"  # "->" is an arrow
            pieces = [Piece("−" if is_minus else token)]
        elif name in formula_commands():
            arguments, write, kind = formula_commands()[name]
            pieces = [Piece(write(*map(self.argument, arguments)), kind)]
        elif name == "mathrm":
            pieces = self.pieces()
        elif name in formula_rules()["alphabets"]:  # of one letter: ℝ, 𝐯
            pieces = self.pieces()
            if len(pieces) == 1 and re.fullmatch("[A-Za-z]", pieces[0].text):
                pieces = [Piece(symbol_text(f"{name}{{{pieces[0].text}}}"))]
        elif name == "begin":
            pieces = [Piece(self.environment())]
        else:
            char = symbol_text(name)
            is_large = char in formula_rules()["large_signs"]
            pieces = [Piece(char, "large" if is_large else "symbol")]
        self.depth -= 1
        return pieces

    def environment(self) -> str:
        r"""Read \begin{…} … \end{…}: a line a row, but a matrix on one line."""
        name = self.source()
        if name == "array":
            self.source()  # the alignment of its columns
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
        elif name == "cases":  # "value, condition", or the two sides of x &= 1
            for row in rows:
                line = "{ " + "\t".join(filter(None, row))
                line = re.sub(r"(?<![,，])\t(?=[=<>≤≥]\S)", "", line)
                line = re.sub(r"(?<![,，])\t(?![=<>≤≥≠+−])", ",\t", line)
                row[:] = [line.replace("\t", " ")]
        lines = [re.sub(f"(?:{gap})+$", "", gap.join(row)).rstrip() for row in rows]
        opening, closing, end = formula_rules()["environments"][name]
        return opening + re.sub("———,? ", "———\n", end.join(lines)) + closing


def rewritten(latex: str, rules: str) -> str:
    """Return LaTeX after the rewrites of that name, one after the other."""
    for pattern, replacement in formula_rules()["rewrites"][rules]:
        latex = re.sub(pattern, replacement, latex, flags=re.A)
    return latex


def simpler_latex(latex: str) -> str:
    """Rewrite LaTeX with fewer commands, in a form that latex2mathml reads."""
    latex = re.sub(
        r"\\ce\s*\{((?:[^{}]|\{[^{}]*\})*)\}",
        lambda reaction: rf"\mathrm{{{rewritten(reaction[1], 'chemistry')}}}",
        latex,
    )
    latex = re.sub(
        r"\\textcircled\s*\{?([1-9])\}?", lambda n: chr(0x245F + int(n[1])), latex
    )
    return rewritten(latex, "latex").strip()


MAX_FORMULA_CHARS = 1500  # fifteen full lines of an aligned block; longest seen: 679


@functools.lru_cache(256)
def formula_text(latex: str) -> str | None:
    """Return a formula as text without markup, or None if its meaning would change."""
    if len(latex) > MAX_FORMULA_CHARS or ILLEGAL.search(latex):
        return None
    try:
        plain = rewritten(simpler_latex(latex), "fences")
        text = render_pieces(FormulaReader(plain).row(""))
    except (ValueError, LookupError):  # LookupError: it ends too early
        return None
    return text.strip() or None


def formula_mathml(latex: str, is_block: bool) -> str | None:
    """Return a formula as one <math> element, or None if its meaning would change."""
    text = formula_text(latex)
    if text is None:
        return None
    from latex2mathml.converter import Converter

    latex = simpler_latex(latex)
    if latex.count(r"\left") != latex.count(r"\right"):
        latex = rewritten(latex, "fences")
    try:
        converter = Converter(display="block" if is_block else "inline")
        tree = converter.convert_to_element(latex)
    except Exception:  # it breaks in many ways, some of them its own
        return None
    allowed = formula_rules()["mathml"]
    for node in tree.iter():
        reference = r"&#x([0-9A-F]{2,6});"
        node.text = re.sub(reference, lambda m: chr(int(m[1], 16)), node.text or "")
        is_strange = "\\" in node.text or ILLEGAL.search(node.text)
        if is_strange or node.tag not in allowed["tags"]:
            return None
        for name in node.attrib.keys() - allowed["attributes"]:
            del node.attrib[name]
    written = "".join(tree.itertext()), text.replace("∛", "3").replace("∜", "4")
    forms = (unicodedata.normalize("NFKC", form) for form in written)
    kept = [sorted(re.findall(r"[\d\u3400-\u9fff]", form)) for form in forms]
    if kept[0] != kept[1]:  # the library lost a digit or a Chinese character
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
# `2**3`, `单价*数量`, `*.log`, `**kwargs`, `/*…*/`. The patterns match the signs before
# and after them; 字 stands for any CJK letter, x for any other letter or digit.

DOUBLE_OPENS = re.compile(
    r"(?![x_)\]}][x_([{+.=-]).[^ ，。：；！？、）】》」』”’,;:!?)\]}/]"
)
DOUBLE_CLOSES = re.compile(  # `**Note:**text`, but neither `f(**a,**b)` nor `ab**cd`
    r"(?![ （【《「『“‘(\[{<=|/])(?:.[^x_]|[:.!?%\x80-\U0010ffff][x_])"
)
DOUBTFUL = re.compile(r"/.|./|[字）】][x_([{+.=-]")  # `边长**2`, `/**…**/`: no pair
SINGLE_OPENS = re.compile(
    r"[^字x_)\]}）】》”’/\\=+<>^|&%.~-][x字“‘《「『（(\[`$\\\"'—]"
)
SINGLE_CLOSES = re.compile(  # `*Note:* text`, `*注*说明`, but not `5*，6*，`
    r"[x字。！？….!?)）”’\"'」』】》%℃`$\]>+#:：,，][^字x_/(=\[\\]|[字：。！？]字"
)


def shape(char: str) -> str:
    """Return the character that stands for a character in these patterns."""
    if char.isspace():
        return " "
    return "字" if CJK.match(char) else "x" if char.isalnum() else char


# --- The marks inside a line

MAX_WINDOW = 4000  # characters read at once, which bounds what a search can cost
MAX_FORMULA_SPAN = 2000  # characters up to its closing mark, or a comment's
MAX_OPENERS = 20  # in a line

# The HTML tags of tokens, where the two names differ.
TAGS = {"link": "a", "paragraph": "p", "list_item": "li"}
TAGS |= {"ordered_list": "ol", "bullet_list": "ul"}
EMPHASIS = {"*": ("em",), "**": ("strong",), "***": ("strong", "em"), "~~": ("s",)}
ENTITY = r"&(?:#\d{1,7}|#x[0-9a-f]{1,6}|[a-z][a-z0-9]{1,31});"
# Of a link: words, maybe with a picture, code, escaped signs or brackets in them.
LABEL = (
    r"(?:!\[[^\[\]\n]*\]\([^()\n]*\)|`[^`\n]*`|\\[^\n]|[^\[\]\n\\]"
    r"|\[[^\[\]\n]*\](?!\())*+"
)
# The first that matches counts; it is read by the method of its name: `read_code`.
INLINE_MARKS = {
    "newline": r"\n|(?:(?<=[\n，。！？；：、…”’）」』》,!?])"
    rf"|(?<={CJK.pattern}))\\\n",  # a backslash that only stands for the line's end
    "formula": r"\$\$|\\[(\[]|\\begin\{(?P<environment>\w{1,20}\*?)\}|<!--",
    "backslash": r"\\\\|\\",
    "code": r"(?<!`)(?P<ticks>`+)(?!`)(?P<inside>[^\n]{1,1000}?)(?<!`)(?P=ticks)(?!`)",
    "stars": r"\*+|＊+|~~+",
    "dollars": r"(?<![0-9A-Za-z])\$(?:"  # in a line, but not `从 $5 涨到 $10`
    r"(?![\s$])(?P<latex>(?:\\\$|[^$\n。！？]){0,299}?(?:\\\$|[^\s$\\。！？]))"
    r"|(?<!\d \$)(?P<spaced> [^$\n。！？]{1,298}? ))\$(?![0-9A-Za-z${]|_(?!_))",
    "link": rf"(?P<picture>!?)\[(?P<label>{LABEL})\]"
    r"(?u:\([ \t]*(?:<(?P<whole>[^<>\n]*)>|(?P<plain>(?:[^\s()<>]++|\([^\s()]*+\))*+))"
    r"(?:[ \t]+(?P<title>\"[^\"\n]*\"|'[^'\n]*'|\([^()\n]*\)))?[ \t]*\))",
    # Nothing comes behind it yet but what may become code, a link or a formula.
    "open": r"`++(?=.{0,999}+\Z)|(?<![0-9A-Za-z])\$(?=[^\n。！？]{0,999}+\Z)"
    rf"|!?\[(?={LABEL}(?:!?\[[^\[\]\n]*+)?(?:\](?:\(.*+)?)?\Z)",
    "url": r"<(?:https?://|mailto:)[^\s<>]+>|<[\w.+-]+@[\w-]+(?:\.[\w-]+)+>"
    r"|https?://[\w./?#%&=+~:;@!$',*()-]+",
    "break": r"</?br\s*/?>[ \t]*",
    "tag": r"<(?P<closes>/?)(?P<name>b|i|u|em|strong|span|div|p|center|font|mark"
    r"|kbd|details|summary|sub|sup)(?:\s+(?:open\b|[\w-]+\s*=\s*(?:\"[^\"]{0,300}\""
    r"|'[^']{0,300}'|[^\s\"'<>=]+)))*\s*/?>",
    "entity": ENTITY,
}
MARK = re.compile(
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
SPACED = re.compile(
    r"(?i).*(?:\\[a-z]|[_^]\{).*|(?=.*[a-z])(?:[^a-z\u2e80-\u9fff]|(?<![a-z])[a-z])+"
)
ESCAPE = re.compile(
    r"\\[*_`~$<>|\[\]&!]|(?<![^\W_])\\#|(?<=\b[A-Z])\\#"
    r"|^[ \t]*(?:\\[-+>=]|\d{1,3}\\[.)])",
    re.MULTILINE,
)
# Words with backslashes that are paths, patterns, faces: `D:\_b`, `^\d+\.$`, `¯\_(ツ)`.
WORD_WITH_SIGNS = re.compile(r"[^\s，。：；！？、（）“”…!?]+")
PATH = re.compile(
    r"\\[^\W_]|^\\\\|\b[A-Za-z]:\\|\\\W[+?{]|^[\^.¯]+\\|[\\/].*\\$"
    r"|(?<!^\d)(?<!^\d\d)\\\.|\.[*+?]|\[\^"
)
DATA_PICTURE = re.compile(r"data:image/(?:png|jpeg|gif|webp);base64,[A-Za-z0-9+/=]+")


@dataclass(slots=True)
class Opener:
    """A mark that is markup if its closing mark comes."""

    mark: str
    index: int  # of its token, which is text until the mark is closed
    end: int  # of the mark, in the text
    is_doubtful: bool


class InlineReader:
    """Reads the marks inside one text, once, from left to right."""

    def __init__(self, text: str, before: str, is_whole: bool) -> None:
        self.text = before + text  # so positions in it are one higher than in `text`
        self.is_whole = is_whole  # else more of the text may come
        self.tokens: list[Token] = []
        self.openers: list[Opener] = []
        self.line_start = 1
        self.sure = 1, 0  # the text and the tokens before these ends cannot change
        # The end of the line before, unless a mark was closed across it.
        self.line_before = 1, 0
        self.is_held = False  # something is open that can change all that follows
        self.closer = ""  # what closes the formula or comment that is open
        words = WORD_WITH_SIGNS.finditer(self.text) if "\\" in text else ()
        paths = [range(*word.span()) for word in words if PATH.search(word[0])]
        self.in_paths = set(itertools.chain(*paths))
        # Where a backslash, the last but one character of a match, escapes the last.
        self.escapes = {found.end() - 2 for found in ESCAPE.finditer(self.text, 1)}
        self.escapes -= self.in_paths

    def read(self) -> None:
        """Read all of the text, as far as it can be told by now."""
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
        if sum(one.end > self.line_start for one in self.openers) < MAX_OPENERS:
            self.openers.append(Opener(mark, len(self.tokens), end, is_doubtful))
        self.add("text", content=text)

    def find(self, mark: str) -> Opener | None:
        return next((o for o in reversed(self.openers) if o.mark == mark), None)

    def close(self, opener: Opener, *names: str) -> None:
        """Pair an open mark with the one just read; marks open in between are text."""
        if opener.end < self.line_start:
            self.line_before = self.sure
        del self.openers[self.openers.index(opener) :]
        opened = [Token(f"{name}_open", TAGS.get(name, name), 1) for name in names]
        self.tokens[opener.index : opener.index + 1] = opened
        for name in reversed(names):
            self.add(f"{name}_close", TAGS.get(name, name), -1)

    # One method for each mark, which returns where the markup ends, or 0 if it is text.

    def read_newline(self, mark: re.Match[str]) -> int:
        """Read a line's end; a mark may close one line later, but not a single star."""
        if mark.start() in self.in_paths:  # a backslash that is part of a path
            self.add_text("\\")
        openers = [o for o in self.openers if o.end > self.line_start]
        openers = [o for o in openers if o.mark not in ("*", "＊")]
        here = mark.start(), len(self.tokens)
        if not self.is_held:
            self.sure = max(self.sure, self.line_before if openers else here)
        self.line_before = here
        self.add("softbreak", "br")
        self.openers, self.line_start = openers, mark.end()
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
            pairs = ("()", "[]", "（）")
            is_balanced = all(inside.count(p[0]) == inside.count(p[1]) for p in pairs)
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
        latex, spaced = mark["latex"] or "", mark["spaced"] or ""
        is_formula = FORMULA.match(latex) and not PRICE.match(latex)
        if is_formula or LATEX_SIGN.search(latex) or SPACED.fullmatch(spaced):
            self.add("math_inline", "math", content=latex + spaced, markup="$")
            return mark.end()
        self.add_text("$")
        return mark.start() + 1

    def read_open(self, mark: re.Match[str]) -> int:
        self.hold()
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
                self.hold(closer)
            return 0
        if mark["environment"]:  # is LaTeX as a whole
            self.add(kind, "math", content=opener + latex + closer)
        elif opener in CLOSERS and FORMULA.match(latex):
            self.add(kind, "math", content=latex, markup=opener)
        elif opener in CLOSERS:  # `\[words\]` are brackets, but not in a pattern
            if mark.start() in self.in_paths:
                return 0
            self.add_text(opener.removeprefix("\\"))
            self.escapes.add(end)
            return inside
        return end + len(closer)

    def read_backslash(self, mark: re.Match[str]) -> int:
        if mark.start() not in self.escapes:
            return 0
        self.add_text(self.text[mark.end()])
        return mark.end() + 1

    def read_link(self, mark: re.Match[str]) -> int:
        """Read a link or a picture."""
        url = mark["whole"] or mark["plain"] or ""
        before, is_picture = self.text[mark.start() - 1], mark["picture"] == "!"
        is_path = ":" not in url and re.search("[./]", url)  # not so `arr[0](x.y)`
        is_data = is_picture and url.lower().startswith("data:image/")
        if not (ADDRESS.match(url) or is_path and shape(before) not in "x_" or is_data):
            self.add_text(mark["picture"] + "[")
            return mark.start("label")
        inside = InlineReader(mark["label"], "[", is_whole=True)
        inside.read()  # but no link is inside a link
        label = [token for token in inside.tokens if token.tag != "a"]
        if is_picture:
            attrs = {"src": url, "alt": ""}
            self.add("image", "img", attrs=attrs, children=label, content=mark["label"])
            return mark.end()
        title = {"title": mark["title"][1:-1]} if mark["title"] else {}
        self.add("link_open", "a", 1, attrs={"href": url} | title)
        self.tokens += label
        self.add("link_close", "a", -1)
        return mark.end()

    def read_url(self, mark: re.Match[str]) -> int:
        """Read an address, bare or in angle brackets."""
        url = mark[0].rstrip("*.,;:!?'~")
        while url[-1] == ")" and url.count(")") > url.count("("):
            url = url[:-1].rstrip("*.,;:!?'~")
        end = mark.start() + len(url)
        label = re.sub("(?i)^<(?:mailto:)?|>$", "", url)
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

    def read_break(self, mark: re.Match[str]) -> int:
        self.add("hardbreak", "br")
        return mark.end()

    def read_tag(self, tag: re.Match[str]) -> int:
        """Read a tag: markup in a pair, or among tags alone on a line."""
        name = tag["name"].lower()
        before = self.text[: tag.start()].rstrip(" \t")[-1:]
        after = self.text[tag.end() :].lstrip(" \t")[:1]
        is_alone = before in ("\n", ">") and after in ("", "\n", "<")
        opener = self.find(name) if tag["closes"] else None
        inside = self.text[opener.end : tag.start()] if opener else ""
        if not tag["closes"] and (after == "<" or not is_alone):
            self.open(name, "" if is_alone else tag[0], tag.end())
        elif not opener or not inside or inside != inside.strip(" "):
            return tag.end() if is_alone else 0
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
    """Return a text's final tokens, where they end, and what would close the rest."""
    tokens: list[Token] = []
    begin, closer = 0, ""
    while begin < len(text):
        end = window_end(text, begin, is_whole)
        is_last = end >= len(text)
        reader = InlineReader(text[begin:end], before, is_whole and is_last)
        reader.read()
        (sure, count), closer = reader.sure, reader.closer
        if sure == 1 and not is_last and end - begin >= MAX_WINDOW:
            sure, count = end - begin + 1, len(reader.tokens)  # it never closed
        tokens += reader.tokens[:count]
        begin += sure - 1
        if sure == 1 or is_last:
            break
        before = text[begin - 1]
    return tokens, begin, closer


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
QUOTE_IN_TWO = re.compile(r"[ \t]*>(?!=) ?(.*)")  # where `>>>` is not Python's prompt
BLOCK = re.compile(r"[ \t]*(?:`{3}|~{3}|#{1,6}[ \t]+\S|>(?!>>|=))")
ITEM = re.compile(r"[ \t]*([-*+]|\d{1,3}[.)])[ \t]+(\S.*)", re.ASCII)
TASK = re.compile(r"\[([ xX])\][ \t]+(?=\S)")
# After a sign: `- 100 元`, `+ 300 元`, `> 60 分`; neither `2024 年` nor `1. 甲`.
AMOUNT = re.compile(
    r"[约近]?[^\w\s`。！？…!?]{0,3}\d[\d,.]*+(?<!\.)(?! ?[年月日号点时:：、/)）])"
)
BAR = re.compile(  # a bar, or code and formulas that may hold one
    r"(?<!`)(`++).{1,300}?(?<!`)\1(?!`)|\\\(.{1,300}?\\\)"
    r"|\$(?![\s\d$])[^$]{0,300}[^\s$]\$(?!\w)|\\\||\|"
)
SIDES = {":": "center", "-": "right"}  # by how a column's rule begins that ends with :
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
        self.tokens: list[Token] = []  # cleared by whoever writes them
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

    def feed(self, text: str) -> None:
        """Read what has been added to the text."""
        text = ILLEGAL.sub("", text)
        *lines, self.rest = (self.rest + text).split("\n")
        for line in lines:
            self.read_line(line.removesuffix("\r"))
        self.rest = self.read_pieces(self.rest)
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

    def copy(self, tokens: list[Token]) -> "MarkdownReader":
        """Return a reader that reads on by itself, and adds to these tokens."""
        twin = copy.copy(self)
        twin.tokens, twin.code, twin.lists = tokens, [*self.code], [*self.lists]
        twin.quote = self.quote and self.quote.copy(tokens)
        return twin

    def is_settled(self, line: str) -> bool:
        """Say whether an incomplete line is certain to be text or a list item."""
        is_open = self.fence or self.closer or self.header or self.row is not None
        item = ITEM.fullmatch(line)
        if is_open or BLOCK.match(item[2] if item else line) or can_be_header(line):
            return False
        has_words = bool(line.strip(" \t-*"))  # is no rule
        return has_words and (len(line) > MAX_WINDOW or bool(SENTENCE_END.search(line)))

    def read_pieces(self, line: str) -> str:
        """Read a heading, quote or row that is too long as lines; return the rest."""
        while not (self.is_in_line or self.fence) and len(line) > MAX_WINDOW:
            if self.is_settled(line[: MAX_WINDOW + 1]):
                break
            self.read_line(line[:MAX_WINDOW])
            line = line[MAX_WINDOW:]
        return line

    def read_line(self, line: str) -> None:
        """Read a complete line, or the end of one whose beginning was read."""
        line = self.read_pieces(line)
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
        is_in_two = self.quote and self.quote.quote
        quote = (QUOTE_IN_TWO if is_in_two else QUOTE).fullmatch(line)
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
        self.is_after_amount = False
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
        self.is_after_amount = False
        self.pending += line.lstrip() if self.lists else line

    def end_text_line(self) -> None:
        """Read the paragraph's last line; open marks may continue on the next line."""
        if self.pending.endswith("\n"):  # has been read
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
        self.later_lines += line + "\n"
        is_end = not line.strip() or FENCE.match(line) or HEADING.match(line)
        if len(self.later_lines) > MAX_FORMULA_SPAN or is_end:
            self.give_up_formula()
        elif self.closer in line:
            self.pending += self.later_lines[:-1]
            self.later_lines, self.closer = "", ""

    def give_up_formula(self) -> None:
        """Take an unclosed formula as text, and read the lines after it again."""
        if self.closer:
            self.read_pending(is_whole=True)
            lines, self.later_lines, self.is_replay = self.later_lines, "", True
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
            is_sign = kind in "+-" and (is_amount or self.is_after_amount or is_plus)
        if is_sign:
            self.read_text(line)
            self.is_after_amount = True
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
            self.fence.level = indent  # which its lines lose

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
            self.open(tag, info=side or "")
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
                if "\n" in text:  # on lines of its own; \v: but for a comma behind it
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


class ChatWriter:
    """Writes tokens as chat text; what it has written never changes."""

    def __init__(self) -> None:
        self.out: list[str] = []  # cleared by whoever shows it
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

    def write(self, token: Token) -> None:
        """Write a token; each but the text inside a block begins a line."""
        if token.type != "inline":
            self.break_line()
        match token.type:
            case "inline" if self.captured is not None:
                text = inline_text(token.children or [])
                self.captured.append(text.strip().replace("\n", " "))
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
                is_long = len(text) > MAX_HEADING_CHARS
                is_plain = is_long or re.search("[【】《》]|^$", text)
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
            self.is_wide = len(cells) > 3 or len("".join(cells)) > MAX_ROW_CHARS
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

MAX_UNREAD = 2000  # characters: what is asked for at once takes a few milliseconds
MAX_LEADING = 2000  # characters of such lines in a row
# Lines that no part may end with: headings and list marks go with what follows.
LEADING = re.compile(r"[ │•]*(?:【[^\n【】]*】|\d{1,4}[.)、）]|[•☐☑│])")


def end_before_leading(text: str) -> int:
    """Return where a text ends without the headings and list marks at its end."""
    kept = tail = text[-2 * MAX_LEADING :]
    while len(tail) - len(kept) < MAX_LEADING:
        above, newline, last = kept.rstrip().rpartition("\n")
        if not LEADING.fullmatch(last):
            return len(text) - len(tail) + len(kept)
        kept = above + newline
    return len(text)


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
            self.read()

    def read(self) -> None:
        """Read what has been added."""
        for begin in range(0, len(self.unread), MAX_WINDOW):
            self.reader.feed(self.unread[begin : begin + MAX_WINDOW])
            self.write()  # the tokens take far more memory than the text
        self.unread = ""

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
        self.read()
        if has_ended:
            self.reader.finish()
            self.write()
            return self.shown
        return self.shown[: end_before_leading(self.shown)]

    def has_more_on_page(self) -> bool:
        """Say whether the page shows more: code, a table, formulas, pictures, links."""
        self.read()
        shown = {"table_open", "code_open", "image", "math_inline", "math_block"}
        is_long = self.kinds["heading_open"] >= 2 or self.kinds["link_open"] >= 3
        return is_long or not shown.isdisjoint(self.kinds)


def chat_text(markdown: str) -> str:
    """Return the chat text of a whole answer."""
    return ChatText(markdown).text(has_ended=True)


def stable_text(markdown: str) -> str:
    """Return what may be shown of an answer that grows: no more text changes it."""
    return ChatText(markdown).text(has_ended=False)


TEXT_END = re.compile(rf"\n|{SENTENCE_END.pattern}")


def markdown_length(markdown: str, chat_length: int) -> int:
    """Return how much of a text has a chat text of at most `chat_length` characters."""

    def length(end: int) -> int:
        return len(chat_text(markdown[:end]))

    most = 2 * chat_length + 100
    while most < len(markdown) and length(most) <= chat_length:
        most *= 2
    ends = [0, *(found.end() for found in TEXT_END.finditer(markdown, 0, most))]
    if most >= len(markdown):
        ends.append(len(markdown))
    return ends[bisect.bisect_right(ends, chat_length, lo=1, key=length) - 1]


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
FLAG = "".join(map(chr, range(0x1F1E6, 0x1F200)))  # two of these letters are one
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
    after, flags = text[end : end + 1] or "\n", end - len(text[:end].rstrip(FLAG))
    is_in_sign = after in FLAG and flags % 2 or is_combining(after)
    return is_last and not (is_in_heading or is_in_sign or EMOJI_TAIL.match(text, end))


def best_end(masked: str, most: int) -> int:
    """Return the best end of a part of at most `most` characters, or 0."""
    for pattern, least in PART_ENDS:
        ends = [found.end() for found in re.finditer(pattern, masked[: most + 1])]
        for end in reversed(ends):
            if least * most <= end <= most and may_end(masked, end):
                return end
    return 0


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
    ends = (best_end(masked, most) for masked in dict.fromkeys((kept, whole)))
    return next(filter(None, ends), most)


# --- Blocked words
#
# Words and texts are compared as people read them: in Unicode's compatibility form,
# without case, white space, what has no width or is written over a character, and the
# marks of Markdown.

IGNORED = re.compile(
    r"[\s\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f"
    r"\u202a-\u202e\u2060-\u206f\ufe00-\ufe0f\ufeff\U000e0000-\U000e0fff*_~`\\"
    r"\x7f-\x9f\ufff9-\ufffb"  # and what is written over a character, or around it:
    r"\u0334-\u0338\u20d2-\u20d3\u20d8-\u20da\u20dd-\u20e0\u20e2-\u20e6\u20ea-\u20eb]"
)
ENTITY_OR_CHARACTER = re.compile(rf"{ENTITY}|.", re.DOTALL | re.IGNORECASE | re.ASCII)
OPEN_ENTITY = re.compile(r"&[^;&]{0,33}\Z")  # none is longer


def compared(text: str) -> str:
    """Return a text as blocked words are compared with it."""
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
        if not self.path or self.changed == (changed := os.stat(self.path).st_mtime_ns):
            return
        lines = pathlib.Path(self.path).read_text("utf-8-sig").splitlines()
        words = (line for line in lines if not line.lstrip().startswith("#"))
        self.words = set(compared("\0".join(words)).split("\0")) - {""}
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
        self.open = ""  # the end of the text: what follows may still combine with it
        # Clusters held back, with their lengths as compared; `form` is all of them.
        self.held: collections.deque[tuple[str, int]] = collections.deque()
        self.form = ""
        self.seen = ["", ""]  # the ends of what chat and page show, as compared

    def sees(self, shown: str) -> bool:
        """Say whether a blocked word is in what is shown, of which this is new."""
        new = zip(self.seen, (shown, CHAT_ONLY.sub("", shown)), strict=True)
        both = [end + text for end, text in new]  # mostly the same
        forms = {text: compared(text) for text in both}
        self.seen = [forms[text][-self.blocked.longest :] for text in both]
        return any(map(self.blocked.are_in_form, forms.values()))

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


# ---------------------------------------------------------------------------
# 6. Sessions, turns, parts, replies
#
# A Turn is written by one task and read by any number of replies and pages, which wait
# for its Signals. The others are records.
# ---------------------------------------------------------------------------


@dataclass(slots=True, eq=False)
class Signal:
    """A change that others wait for with Tasks.until, each with their own condition."""

    # Condition and wake-up of each; Tasks.until adds them and takes them out.
    waiting: list[tuple[Callable[[], bool], asyncio.Future]] = field(
        default_factory=list
    )

    def look(self) -> None:
        """Wake those whose condition is met; to be called after every change."""
        for is_wanted, future in self.waiting:
            if not future.done() and is_wanted():
                future.set_result(None)


@dataclass(frozen=True, slots=True)
class Session:
    """A subscriber's conversation with one assistant."""

    id: int
    assistant: str
    last_at: float  # Unix seconds
    is_busy: bool = False  # a question of it is unanswered: it does not end by itself
    late_text: str | None = None  # the newest text after it ran out


@dataclass(frozen=True, slots=True)
class Part:
    """What one reply shows of an answer: its chat text from `start` on."""

    number: int  # 继续N, counted for each subscriber; 0: a question's own reply
    turn_id: int
    start: int = 0  # offset in the chat text
    is_anew: bool = False  # the answer was written again since it was offered
    reply: str | None = None  # what was sent of it: a second tap gets the same
    place: int = 1  # among the parts of its answer; 0: not known (an older version's)


@dataclass(frozen=True, slots=True)
class Reply:
    """The decided reply of a message; every request of it gets the same bytes."""

    content: str  # '': `success`, which is not stored
    created: int  # CreateTime
    part: Part | None = None  # what it shows of an answer; None: no model wrote it
    stop: int = 0  # where in the chat text that ends
    offered: Part | None = None  # the part that its tap asks for
    is_early: bool = False  # neither all that is left nor a full part
    mentions: int | None = None  # a turn whose unread answer is named under it
    introduces: bool = False  # it says who answers here, and the privacy words

    @property
    def is_patience(self) -> bool:
        """Say whether it only asks for patience: nothing can be shown yet."""
        return self.is_early and self.part is not None and self.stop <= self.part.start


@dataclass(frozen=True, slots=True)
class Ending:
    """How a streamed answer ended."""

    finish_reason: str = ""
    model: str | None = None
    tokens_in: int | None = None
    tokens_out: int | None = None


SENTENCE_SIGN = re.compile(r"[。！？…!?.\n]")


@dataclass(slots=True, eq=False)
class Turn:
    """A question and its answer.

    While it is open there is one object, written by the turn's task alone; of a turn
    that has ended every reader makes one from the row (see schema.sql).
    """

    id: int
    session_id: int
    openid: str
    msg_key: str
    link_key: str
    question: str
    pictures: str | None  # JSON list of URLs, until it is answered
    created_at: float
    asked: int  # times it was sent upstream, before a restart and after
    assistant: str
    answer: str = ""  # Markdown
    state: str = "open"
    reason: str | None = None  # a kind of ChatError
    model: str | None = None
    chat: ChatText = field(default_factory=ChatText)  # what the chat shows of `answer`
    stops: dict[int, int] = field(default_factory=dict)  # ends of sent parts, by start
    left: dict[int, int] = field(default_factory=dict)  # parts from a start to the end
    # Random, and new when the answer is started over: then live pages start over, too.
    writing: str = field(default_factory=functools.partial(secrets.token_hex, 4))
    # Questions and answers of its session, the newest first; None: not read yet.
    context: list[tuple[str, str]] | None = None
    earlier: str | None = None  # asked again after a restart: the text before that
    is_queued: bool = False  # the question before it is not answered yet
    asked_at: float = 0.0  # created_at by the monotonic clock, which does not jump
    first_seconds: float | None = None  # from the question to the first text
    calls: int = 0  # how often this process asked an upstream
    task: asyncio.Task | None = None  # writes it
    news: Signal = field(default_factory=Signal)  # a sentence more, or the end
    deltas: Signal = field(default_factory=Signal)  # any change: live pages
    page: "LivePage | None" = None  # what viewers of this writing share

    def __post_init__(self) -> None:
        self.asked_at = time.monotonic() - max(0.0, time.time() - self.created_at)

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
        return time.monotonic() - self.asked_at

    def shown(self) -> str:
        """Return the chat text; of a growing answer what will not change any more."""
        return self.chat.text(has_ended=not self.is_open)

    def has_part(self, start: int) -> bool:
        """Say whether a reply from `start` on is full, or the answer has ended."""
        if not self.is_open:
            return True
        return size_of(self.shown()[start : start + REPLY_BYTES + 1]) > REPLY_BYTES

    def read(self) -> "Turn":
        """Read the answer that came with the row, for seconds at worst."""
        self.chat = ChatText(self.answer)
        self.shown()
        return self

    def append(self, delta: str) -> None:
        """Add a delta."""
        delta = ILLEGAL.sub("", delta)
        if not self.answer:
            delta = delta.lstrip()
            self.first_seconds = round(self.age, 3)
        self.answer += delta
        self.chat.feed(delta)
        # What a reply shows grows with a line or a sentence, not with every token.
        if self.news.waiting and SENTENCE_SIGN.search(delta):
            self.news.look()
        self.deltas.look()

    def restart(self) -> None:
        """Start the answer over; nothing of it has been sent yet."""
        self.writing = secrets.token_hex(4)
        self.answer, self.chat, self.page = "", ChatText(), None
        self.deltas.look()

    def as_sent(self, text: str) -> str:
        """Return what of a text was sent in replies."""
        return text[: markdown_length(text, max(self.stops.values(), default=0))]

    def without_thought(self, text: str) -> str:
        """Return what of a text was sent; the rest turned out to be a thought."""
        sent, kept = max(self.stops.values(), default=0), self.as_sent(text)
        # Sent in the midst of a mark:
        kept += ChatText(text).text(has_ended=False)[len(chat_text(kept)) : sent]
        return kept and f"{kept}\n\n"

    def finish(self, state: str, reason: str | None = None) -> None:
        """End the answer, and wake all who wait for it."""
        self.state, self.reason = state, reason
        self.news.look()
        self.deltas.look()


# ---------------------------------------------------------------------------
# 7. Store
#
# SQLite behind one connection of aiosqlite. Each method is one question or one change,
# and all of its SQL stands in it:
#
#   a message     recall, which knows its sender, too; save_reply, mark_delivered
#   a subscriber  note, mark_read; devices; links to the history
#   a session     start_, end_, touch_session; newest_session, keep_late_text
#   a turn        add_turn and count_asking, which bring what the model gets with it;
#                 questions_of_day, save_texts, begin_anew, finish_turn; what is read
#   a part        part, unsent_part, next_unsent, offer_unread
#   deletion      ask_forget, forget, forget_due; prune
#
# Triggers in schema.sql keep what always goes along with a change. Beside the database
# lies the file NAME-duty, locked by the process that serves: the deletions that are
# promised and not done yet, since the database may be locked or full just then.
# ---------------------------------------------------------------------------

SCHEMA = pathlib.Path(__file__).with_name("schema.sql")


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

    reply: Reply | None
    turn_id: int | None  # of its question
    session: Session | None  # the open one
    last_part: int  # the highest part number
    mention: tuple[int, int, str] | None  # part, turn and question of an unread answer
    pictures: str  # that wait for a question: a JSON list of URLs and words
    is_told: bool  # the privacy words were said
    hinted_at: float  # the newest hint outside a session, Unix seconds; 0: none
    forget_asked_at: float  # for deletion, not confirmed yet; 0: not asked


PICTURE_SECONDS = 600  # how long a picture waits for its question
REPLY_HOURS = 24  # how long a later copy of a message gets the same reply
LAPSE_SECONDS = 24 * 3600  # how long a session that ran out is mentioned
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

    Coroutines may use it at the same time; their statements run in the order given.
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
        return Recalled(reply, row[4], session, row[10] or 0, mention, *row[14:])

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

    async def keep_late_text(self, session_id: int, text: str) -> None:
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

    # slow, unreachable, busy, setup, refused, long, blind, picture, empty, broken
    kind: str
    detail: str  # for the log
    is_retryable: bool = False  # asking again may help
    retry_in: float | None = None  # seconds the provider wants us to wait, if it says
    status: int | None = None  # of the response, None if there was none
    code: str = ""  # the provider's code for the failure, or else its type
    words: str = ""  # its message, for `check` only: may repeat the key or a question
    setting: str = ""  # of the assistant, which the owner should look at

    def __str__(self) -> str:
        notes = getattr(self, "__notes__", ())
        return "; ".join([f"{self.kind}: {self.detail}", *notes])

    def __setattr__(self, name: str, value: object) -> None:
        # frozen=True would refuse __traceback__, too, which contextlib sets.
        if name in vars(self):
            raise AttributeError(f"{name} of an error cannot be changed")
        super().__setattr__(name, value)


EVENT_BYTES = 1 << 20  # more in one event would only fill the memory
BLANKS = b" \t\r\n\xef\xbb\xbf"  # may stand before a body, the last as byte order mark
# What begins a second event in a line: GLM loses the end of the one before it. Inside
# JSON the quote had a backslash.
GLUED = re.compile(rb'data: ?(?=\{"\w)')
# The fields of an event stream that matter (llama.cpp has errors in one of that name),
# those that do not, and the lines of a body that is JSON.
DATA = re.compile(rb"(?:data: ?)+|(?:data|error)(?:: ?|$)")
OTHER_FIELD = re.compile(rb"(?:event|id|retry)?(?::|$)")
JSON_LINE = re.compile(rb"(?=.)")


class EventDecoder:
    """Cuts a body into payloads, from chunks of any size.

    Its first byte says what it is, since content types are often wrong. An event stream
    is parsed as the HTML standard does, but an object ends where the next one begins,
    too. JSON is taken line by line in the same way.
    """

    def __init__(self) -> None:
        self.first = b""  # the first byte of the body
        self.field = DATA
        self.line = b""  # the unfinished line
        self.data: list[bytes] = []  # the data lines of the unfinished event
        self.size = 0  # their bytes
        self.after_cr = False  # a LF that comes next belongs to the CR before
        self.has_comment = False  # the last chunk had one: the server is alive
        self.stray = ""  # the last line that is none of an event stream

    def feed(self, chunk: bytes) -> list[str]:
        """Return the payloads that a chunk completes, b"" all; raise ChatError."""
        payloads, self.has_comment = [], False
        for line in self.split(chunk or b"\n\n"):
            if found := self.field.match(line):
                payloads += self.read_data(line[found.end() :])
                self.size += len(line)
            elif not line and self.data and self.field is DATA:
                payloads.append(self.take())
            elif not OTHER_FIELD.match(line):
                self.stray = line.decode("utf-8", "replace")
            self.has_comment |= line.startswith(b":")
        if not chunk and self.data:
            payloads.append(self.take())
        if len(self.line) + self.size > EVENT_BYTES:
            is_json = self.field is JSON_LINE
            raise ChatError("broken", "an event is longer than 1 MiB", is_json)
        return payloads

    def read_data(self, data: bytes) -> list[str]:
        """Keep a data line; return the payloads of events that are glued to it."""
        payloads = []
        for number, value in enumerate(GLUED.split(data)):
            is_new = value.startswith((b"{", b"[DONE]"))
            if is_new and self.data and self.data[-1].rstrip().endswith(b"}"):
                payloads.append(self.take())
            if number:
                self.data.clear()  # without its end
            self.data.append(value)
        return payloads

    def split(self, chunk: bytes) -> list[bytes]:
        """Return the lines that a chunk completes; raise ChatError for a web page."""
        if not self.first:
            chunk = chunk.lstrip(BLANKS)
            self.first = chunk[:1]
        if self.first == b"<":
            page = ChatError("setup", "a web page, not an answer", setting="base_url")
            raise page from ValueError("not JSON")
        if self.first in (b"{", b"["):
            self.field = JSON_LINE
        if self.after_cr:
            chunk = chunk.removeprefix(b"\n")
        self.after_cr = chunk.endswith(b"\r")
        text = (self.line + chunk).replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        *lines, self.line = text.split(b"\n")
        return lines

    def take(self) -> str:
        """Return the payload of the event that ends here."""
        payload = b"\n".join(self.data).decode("utf-8", "replace")
        self.data, self.size = [], 0
        return payload


TAG = r"[\w:]{0,40}(?:think|thought|reasoning)\w{0,40}"
CHANNEL = r"(?:<\|start\|>assistant)?<\|channel\|>"
# How thoughts begin and end.
THOUGHTS = (
    (rf"<(?P<tag>{TAG})(?:\s[^<>]*)?>", r"</(?P=tag)>"),  # DeepSeek, Qwen, Seed
    (r"\[THINK\]", r"\[/THINK\]"),  # Magistral
    (r"◁think▷", r"◁/think▷"),  # Kimi-VL
    (r'<details\s[^<>]{0,99}type="reasoning"[^<>]{0,99}>', r"</details>"),  # Open WebUI
    (r"<\|begin_of_thought\|>", r"<\|end_of_thought\|>"),  # OpenThinker
    (r"<\|START_THINKING\|>", r"<\|END_THINKING\|>"),  # Command A
    (r"<\|channel>thought", r"<channel\|>"),  # Gemma
    (rf"{CHANNEL}(?:analysis|commentary)[^<]*<\|message\|>", r"<\|end\|>"),  # gpt-oss
    (r"analysis(?-i:[A-Z])", "assistantfinal"),  # the same, its tags dropped
)
CLOSING = rf"</{TAG}>|\[/THINK\]|◁/think▷|<channel\|>"
OPEN = re.compile("|".join(opening for opening, _ in THOUGHTS), re.IGNORECASE)
# Hunyuan, ERNIE, Command A, GLM-4.5V, and models whose template is not known.
WRAPPER = r"<(?:answer|response)>|<\|(?:START_RESPONSE|begin_of_box)\|>"
WRAPPER += r"|<\|im_start\|>assistant"
# What comes before an answer: a thought, what is left of one, or how it is wrapped.
BEFORE = "|".join(f"{opening}.*?{closing}" for opening, closing in THOUGHTS)
BEFORE += rf"|{CLOSING}|{CHANNEL}final[^<]*<\|message\|>|(?P<wrapper>{WRAPPER})"
BEFORE_ANSWER = re.compile(rf"\s*(?:{BEFORE})", re.IGNORECASE | re.DOTALL)
TAG_CHARS = 200  # no tag is longer
TAG_BEGUN = re.compile(rf"(?s:<\|.{{0,{TAG_CHARS}}})|[<\[◁][^>\]▷\n]{{0,{TAG_CHARS}}}")
# The first tag inside an answer. One that is quoted, or code, is only spoken of.
QUOTED = r"""(?<![`“‘「『])(?<!\s["'])(?<!`\n)(?<!`xml\n)(?<!`(?:html|text)\n)"""
LATE = re.compile(rf"(?i){QUOTED}({CLOSING})|(?<!`)(?:<{TAG}[\s>]|\[THINK\]|◁think▷)")
# What may follow an answer: the end of its wrapper, or a token that stops a model.
STOPPED = re.compile(r"\s*(?:</(?:answer|response)>|<\|\w+\|>)\s*$")
STOP = re.compile(r"\s*(?:</s>|<\|\w+\|>)\s*$")
STOP_BEGUN = re.compile(r"<(?:[/|][\w|]{0,20}>?\s*)?$")
ANSWER_CHARS = 200_000  # an answer that goes on and on is cut there


class ThoughtFilter:
    """Removes the thoughts from the start of an answer, however they are split.

    Some servers swallow the opening tag. Then only the closing one shows that the text
    before it was a thought; who knows that beforehand gives the `opening`.
    """

    def __init__(self, opening: str = "") -> None:
        self.held = opening  # text that may still turn out to be a thought
        self.kept = ""  # the text before it, an answer if no closing tag comes
        self.opening = opening  # of a thought that came without it
        self.is_inside = opening != ""  # as we believe
        self.is_answer = False
        self.is_wrapped = False  # the answer, in a tag of its own
        self.is_late = False  # the text returned before was a thought: just found out
        self.tail: str | None = ""  # of the answer; None: no tag is looked for

    def feed(self, delta: str) -> str:
        """Return the text that is now known to be visible."""
        self.held, self.is_late = self.held + delta, False
        self.is_answer = self.is_answer or self.has_answer()
        if not self.is_answer:
            return ""
        text, found = "" if self.tail is None else self.tail + self.held, None
        if any(sign in text for sign in "<[◁"):  # searching is expensive
            found = LATE.search(text)
        if found:
            self.tail = None
        if found and found[1]:
            self.held, self.is_answer = text[found.end() :], False
            self.opening = found[1].replace("/", "")
            text, self.is_late = self.feed(""), True
            return text
        begun = STOP_BEGUN.search(self.held)
        end = begun.start() if begun else len(self.held)
        text, self.held = self.held[:end], self.held[end:]
        self.tail = None if self.tail is None else (self.tail + text)[-TAG_CHARS:]
        return text

    def has_answer(self) -> bool:
        """Drop what has ended before the answer; say whether that has begun."""
        while found := BEFORE_ANSWER.match(self.held):
            self.held, self.is_inside = self.held[found.end() :], False
            self.is_wrapped = found["wrapper"] is not None
        self.held = self.held.lstrip()
        if found := OPEN.match(self.held):
            end = max(found.end(), len(self.held) - TAG_CHARS)
            if self.is_inside:
                self.kept = (self.kept + self.held[found.end() : end])[:ANSWER_CHARS]
            self.held = found[0] + self.held[end:]
            return False
        if "analysis".startswith(self.held):  # of gpt-oss, perhaps
            return False
        return not TAG_BEGUN.fullmatch(self.held)

    def flush(self, is_cut: bool) -> str:
        """Return the text still held at the end; an unclosed thought is not shown."""
        if self.is_answer or not OPEN.match(self.held):
            if "<s>" in (self.tail or "") + self.held:  # </s> ends what is struck out
                return self.held
            return (STOPPED if self.is_wrapped else STOP).sub("", self.held)
        text = self.kept + self.held.removeprefix(self.opening)
        is_shown, self.opening = self.is_inside and not is_cut, ""
        return text if is_shown else ""


PROVIDERS = pathlib.Path(__file__).with_name("providers.toml")


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


def meaning_of(text: str, table: str) -> str:
    """Return what the first row of a table means that fits a text, "" if none does."""
    rows = load_meanings()[table]
    return next((meaning for meaning, words in rows if words.search(text)), "")


KINDS = ("refused", "busy", "long", "blind", "picture", "broken")  # others: settings
# A limit that is not over within the minutes that somebody waits for an answer.
LASTING = re.compile(
    r"(?i)\b[rt]pd|hour|(?<!to)day|today's|daily|tomorrow|week|month"
    r"|[每今当][日天周月]|使用上限|日流控"
)
# How long to wait, in a message.
WAIT = re.compile(r"(?i)(?:again in|after|wait|retry in) *(\d+(?:\.\d+)?) *(ms|[mh])?")
ERROR_NAMES = ("code", "status_code", "http_code", "type", "status", "param")
MESSAGE_NAMES = ("message", "detail", "msg", "status_msg", "error_msg", "statusText")
# A code or an id. Anything longer or with blanks may be what a subscriber wrote.
WORD = re.compile(r"[A-Za-z0-9_.:\[\]-]{1,64}")
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


def as_dict(value: object) -> dict:
    """Return a dict, also if it is the first item of a list, otherwise an empty one."""
    value = value[0] if isinstance(value, list) and value else value
    return value if isinstance(value, dict) else {}


def make_error(status: int, body: object, headers: Mapping[str, str]) -> ChatError:
    """Return the error that a response means; its body may have any shape."""
    outer = as_dict(body)
    inner = outer.get("error") or outer.get("errors") or outer.get("base_resp")
    error = outer | as_dict(inner)
    texts = [error.get(name) for name in MESSAGE_NAMES]
    texts.append(as_dict(error.get("metadata")).get("raw"))  # OpenRouter's source
    message = " ".join(str(x)[:300] for x in texts if x) or str(inner or body)[:300]
    names = {name: str(error.get(name) or "") for name in ERROR_NAMES}
    names = {name: word for name, word in names.items() if WORD.fullmatch(word)}
    if status == 200:  # a gateway passes on the status that it received
        found = (w for w in names.values() if re.fullmatch("[45][0-9]{2}", w))
        status = int(next(found, status))
    code = names.get("code") or names.get("status_code", "")
    if code in ("", str(status)):  # which says nothing more
        code = names.get("type", "")
    summary = " ".join(f"{name}={word}" for name, word in names.items())
    meaning = meaning_of(f"status {status} {summary} {message}", "errors")
    kind, setting = (meaning, "") if meaning in KINDS else ("setup", meaning)
    retry_in = retry_after(headers)
    words = f"{message} {error.get('details')}"  # Gemini's name the limit
    is_passing = retry_in is not None or not LASTING.search(words)
    if retry_in is None and (wait := WAIT.search(message)):
        unit = {"ms": 0.001, "m": 60, "h": 3600}
        retry_in = float(wait[1]) * unit.get(str(wait[2]).lower(), 1)
    is_retryable = kind in ("busy", "broken") and is_passing
    if retry_in is not None and retry_in > RETRY_AFTER_SECONDS:
        is_retryable, retry_in = False, None
    if headers.get("x-should-retry") in ("true", "false"):
        is_retryable = headers["x-should-retry"] == "true"
    request_id = WORD.match(headers.get("x-request-id", ""))
    detail = f"status {status} {summary} request {request_id[0] if request_id else '-'}"
    known = (kind, detail, is_retryable, retry_in, status, code)
    return ChatError(*known, words=message, setting=setting)  # by name: args are shown


LENIENT = json.JSONDecoder(strict=False)  # a string may hold a raw tab or line end


def read_event(payload: str) -> dict:
    """Return the JSON object of an event; raise ChatError, also for an error in it."""
    try:
        event = LENIENT.decode(payload)
    except (ValueError, RecursionError) as error:
        raise ChatError("broken", "an event is not JSON", is_retryable=True) from error
    fields = as_dict(event)
    code = as_dict(fields.get("base_resp")).get("status_code")
    if "choices" not in fields:
        code = code or fields.get("code") or fields.get("error_code")
    inner = fields.get("error") or fields.get("errors") or (event and not fields)
    is_failed = any(inner.values()) if isinstance(inner, dict) else inner
    is_named = "error" in (fields.get("object"), fields.get("type"))
    if is_failed or is_named or code not in (None, "", 0, "0", 200, "200"):
        raise make_error(200, event, {})
    return fields


def as_count(value: object) -> int | None:
    """Return a value if it is a number that the database can hold, otherwise None."""
    return value if isinstance(value, int) and 0 <= value < 2**31 else None


def text_of(content: object) -> str:
    """Return the text of a content: a string, or parts of which some are thoughts."""
    if isinstance(content, str):
        return content
    parts = map(as_dict, content if isinstance(content, list) else [content])
    shown = ("text", "output_text", None)
    texts = (part.get("text") for part in parts if part.get("type") in shown)
    return "".join(text for text in texts if isinstance(text, str))


MID_SENTENCE = re.compile(r"[\w,，、:：;；(（《“-]\s*$")
REPEATED_CHARS = 8  # a last delta that says all again is longer; some gateways send one
# The fields of a delta that show that the model is at work.
ALIVE = re.compile("content|refusal|reason|think|thought")


class Completion:
    """Everything a response has said so far; fed with its chunks, b"" at its end."""

    def __init__(self, model: str, opening: str = "") -> None:
        self.decoder = EventDecoder()
        self.thoughts = ThoughtFilter(opening)
        self.reason = ""  # the finish_reason; empty while the answer goes on
        self.is_named = False  # there was a finish_reason, if only null
        self.usage: object = {}
        self.model: object = model
        # Puts a character together of which the next event has the other half.
        self.utf16 = codecs.getincrementaldecoder("utf-16-le")("ignore")
        self.last = ""  # the last visible text
        self.said = hashlib.sha256()  # of all text, thoughts included
        self.stray: object = ""  # the last payload that is no part of an answer
        self.has_progress = False  # the last chunk had text, thoughts or a comment
        self.has_begun = False  # some event had text or thoughts
        self.is_late = False  # all text before this chunk was a thought
        self.is_over = False  # [DONE] was read
        self.error: ChatError | None = None  # to be raised behind the text before it

    def feed(self, chunk: bytes) -> str:
        """Return the visible text of a chunk; set `error` if something is wrong."""
        texts: list[str] = []
        self.has_progress = self.is_late = False
        try:
            for payload in self.decoder.feed(chunk):
                text = self.read(payload.strip())
                if self.thoughts.is_late:
                    texts, self.is_late, self.thoughts.is_late = [], True, False
                texts.append(text)
        except ChatError as error:
            self.error = error
        self.has_progress |= self.decoder.has_comment
        return "".join(texts)

    def read(self, payload: str) -> str:
        """Return the visible text of an event; raise ChatError."""
        if payload == "[DONE]":
            is_cut = self.is_named and MID_SENTENCE.search(self.last)
            self.reason = self.reason or ("length" if is_cut else "stop")
            self.is_over = True
        if self.is_over:
            return ""
        if not payload.startswith(("{", "[")):  # a heartbeat, or words of a failure
            self.stray = payload or self.stray
            return ""
        event = read_event(payload)
        if "choices" not in event:
            is_told = any(name in event for name in MESSAGE_NAMES)
            if is_told or self.decoder.field is JSON_LINE:
                self.stray = event  # it may say why there is no answer
        choices = event.get("choices")
        items = choices if isinstance(choices, list) else []
        dicts = (item for item in items if isinstance(item, dict))
        choice = next((item for item in dicts if not item.get("index")), {})
        if choice.get("error"):
            raise make_error(200, choice, {})
        self.usage = event.get("usage") or choice.get("usage") or self.usage
        self.model = event.get("model") or self.model
        self.read_reason(choice)
        delta = as_dict(choice.get("delta"))
        if not delta and not self.has_begun:  # an answer that is not streamed
            delta = as_dict(choice.get("message"))
            self.reason = self.reason or ("stop" if delta else "")
        return self.read_delta(delta)

    def read_reason(self, choice: dict) -> None:
        """Take the finish_reason of an event; a filter's may follow another one."""
        self.is_named |= "finish_reason" in choice
        reason = str(choice.get("finish_reason") or "")
        if reason.lower() in ("", "null", "none"):
            return
        # OpenRouter says stop for some failures of the providers behind it.
        native = str(choice.get("native_finish_reason") or "")
        if meaning_of(native, "ends") in ("refused", "broken", "length"):
            reason = native
        if not self.reason or meaning_of(reason, "ends") == "refused":
            self.reason = reason

    def read_delta(self, delta: dict) -> str:
        """Return the visible text of a delta."""
        text = text_of(delta.get("content")) or text_of(delta.get("refusal"))
        if text or any(delta[name] for name in delta if ALIVE.search(name)):
            self.has_progress = self.has_begun = True
        raw = text.encode("utf-16-le", "surrogatepass")
        if self.reason and len(text) > REPEATED_CHARS:
            if hashlib.sha256(raw).digest() == self.said.digest():
                return ""
        self.said.update(raw)
        text = self.utf16.decode(raw)
        text = self.thoughts.feed(text)
        self.last = text if text.strip() else self.last
        return text

    def ending(self) -> Ending:
        """Return how the answer ended; raise ChatError unless it is good, or cut."""
        if not self.reason:
            if stray := self.stray or self.decoder.stray:
                raise make_error(200, stray, {})
            raise ChatError("broken", "the stream ended early", is_retryable=True)
        usage = as_dict(self.usage)
        given = as_count(usage.get("prompt_tokens", usage.get("input_tokens")))
        taken = as_count(usage.get("completion_tokens", usage.get("output_tokens")))
        kind = meaning_of(self.reason, "ends") or "broken"
        is_full = "context" in self.reason.lower() or not (self.has_begun or taken)
        if kind == "length" and is_full and not self.last:
            kind = "long"  # not a word fitted behind the question
        if kind not in ("stop", "length"):
            word = self.reason if WORD.fullmatch(self.reason) else "odd"
            raise ChatError(kind, f"finish_reason {word}", kind == "broken")
        return Ending(kind, ILLEGAL.sub("", str(self.model)[:100]), given, taken)


async def read_body(response: aiohttp.ClientResponse, limit: int) -> bytes:
    """Return a body, cut after `limit` bytes."""
    try:
        return await response.content.readexactly(limit)
    except asyncio.IncompleteReadError as whole:
        return whole.partial


CHUNK_BYTES = 16 * 1024  # at once: gzip may hold a thousand times its size


async def read_chunk(response: aiohttp.ClientResponse) -> bytes:
    """Return what came of a body, b"" at its end; in between others have a turn."""
    chunk = await response.content.read(CHUNK_BYTES)
    await asyncio.sleep(0)
    return chunk


ERROR_BYTES = 64 * 1024  # it may be a web page, which says all in its first lines
ERROR_SECONDS = 2  # for its body: the status alone says most


async def read_error(response: aiohttp.ClientResponse) -> ChatError:
    """Return the error that a response other than a 200 means."""
    text = ""
    with contextlib.suppress(TimeoutError, aiohttp.ClientError, ConnectionError):
        async with asyncio.timeout(ERROR_SECONDS):
            body = await read_body(response, ERROR_BYTES)
            text = body.decode("utf-8-sig", "replace")
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError):
        fields = re.sub(r"<[^<>]*>|\s+", " ", text).strip()
    return make_error(response.status, fields, response.headers)


def refused_field(text: str, body: dict) -> str:
    """Return the optional field of a request that an error is about, or "".

    Its name, or one with `_` inside it, may be there in any case and without any `_`;
    what turns thinking off is also meant by a word about thinking.
    """
    places, switch = {}, ""
    for name in [name for name in body if name not in ("model", "messages", "stream")]:
        inner = re.findall(r'"(\w+_\w+)":', json.dumps(body[name]))
        words = "|".join(map(re.escape, [name, *inner])).replace("_", "[ _]?")
        pattern = rf"(?i)(?<![a-z0-9_])({words})(?![a-z0-9_])"
        if found := re.search(pattern, text):
            places[name] = found.start()
        if re.search("(?i)think|reason", f"{name} {inner}"):
            switch = name
    if not places and re.search("(?i)思考|推理|think|reasoning", text):
        return switch
    return min(places, key=places.__getitem__, default="")


class ThoughtEnd(str):
    """An empty delta that says: all the text before it was a thought."""


USAGE_SECONDS = 2  # how long a complete answer waits for its usage


@dataclass(frozen=True, slots=True)
class Picture:
    """A picture among messages; it becomes base64 only while a request is written."""

    kind: str
    body: bytes


PIECE_BYTES = 48 * 1024  # of a picture that is encoded at once; a multiple of three
PLACE = secrets.token_hex(16)  # where a picture belongs; nobody's text has it


def render_request(body: dict) -> tuple[int, bytes | AsyncIterator[bytes]]:
    """Return the length of a request's JSON, and it, with pictures in pieces."""
    pictures: list[bytes] = []

    def place(picture: Picture) -> str:
        pictures.append(picture.body)
        return f"data:{picture.kind};base64,{PLACE}"

    text = json.dumps(body, default=place)
    if not pictures:
        return len(text), text.encode()
    texts = text.split(PLACE)
    length = sum(map(len, texts)) + sum((len(one) + 2) // 3 * 4 for one in pictures)

    async def pieces() -> AsyncIterator[bytes]:
        for part, picture in zip(texts, [*pictures, b""], strict=True):
            yield part.encode()
            for at in range(0, len(picture), PIECE_BYTES):
                yield base64.b64encode(picture[at : at + PIECE_BYTES])

    return length, pieces()


class ChatClient:
    """One assistant's chat API. Any number of answers may stream at the same time."""

    def __init__(
        self, settings: AssistantSettings, http: aiohttp.ClientSession
    ) -> None:
        self.settings = settings
        self.http = http
        # Classic Azure has a query behind its path: ?api-version=…
        base, mark, query = settings.base_url.strip().partition("?")
        self.base = base.rstrip("/").removesuffix("/chat/completions")
        self.url = f"{self.base}/chat/completions{mark}{query}"
        # In one case: a header of the settings replaces ours, whatever case it has.
        headers = {name.title(): value for name, value in settings.headers.items()}
        own = {
            "Authorization": f"Bearer {settings.api_key.strip()}",
            "Content-Type": "application/json",
        }
        self.headers = own | headers
        self.refused: set[str] = set()  # fields that the provider does not accept
        self.opening = ""  # of the thoughts that its answers begin with, and lack

    def request_body(self, messages: list[dict]) -> dict:
        """Return the JSON of a request, without the fields refused before."""
        body = {"model": self.settings.model, "messages": messages, "stream": True}
        body["stream_options"] = {"include_usage": True}
        if self.settings.model == DEFAULT_MODEL:
            # It thinks unless told not to; other models refuse the field.
            body["reasoning_effort"] = "none"
        body |= self.settings.extra
        return {name: value for name, value in body.items() if name not in self.refused}

    async def post(self, messages: list[dict]) -> aiohttp.ClientResponse:
        """Return the response to a question, to be closed; raise ChatError."""
        while True:
            body = self.request_body(messages)
            length, pieces = render_request(body)
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
            if not self.leaves_out(error, body):
                raise error

    def leaves_out(self, error: ChatError, body: dict) -> bool:
        """Leave out what an error refuses from now on; say whether that may help."""
        if error.setting != "extra":
            return False
        name = refused_field(f"{error.detail} {error.words}", body)
        if name and name not in self.refused:  # else another question found it out
            self.refused.add(name)
            log.warning("%s refuses %s: no longer sent", self.base, name)
        return bool(name)

    def judged(self, error: ChatError, messages: list[dict]) -> ChatError:
        """Return an error as this provider means it about this question."""
        if error.code == "insufficient_quota" and "/compatible-mode/" in self.url:
            # DashScope: too many tokens within a minute.
            return replace(error, kind="busy", is_retryable=True, setting="")
        if error.kind == "blind" and isinstance(messages[-1]["content"], str):
            return replace(error, kind="setup", setting="model")  # no picture was sent
        if self.leaves_out(error, self.request_body(messages)):  # it came in a 200
            return replace(error, is_retryable=True, retry_in=0.0)
        return error

    async def stream(
        self, messages: list[dict], end: float, begin_within: float | None = None
    ) -> AsyncGenerator[str | Ending, None]:
        """Yield the visible deltas, then the Ending, before `end`; raise ChatError.

        The first token may take `begin_within` seconds, if that is less than usual.
        Leaving the iterator early closes the connection, which stops the provider.
        """
        loop = asyncio.get_running_loop()
        usual = self.settings.first_token_timeout
        first = loop.time() + min(usual, begin_within or usual)
        try:
            async with (
                asyncio.timeout_at(min(end, first)) as limit,
                await self.post(messages) as response,
            ):
                # Where another model waits, a comment is no beginning.
                is_patient = begin_within is None
                async for item in self.read(response, limit, end, is_patient):
                    yield item
        except ChatError as error:
            raise self.judged(error, messages) from error.__cause__
        except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError) as error:
            raise ChatError("unreachable", str(error), is_retryable=True) from error
        except TimeoutError as error:
            is_time_left = loop.time() < end
            raise ChatError("slow", "time limit", is_retryable=is_time_left) from error
        except (aiohttp.ClientError, ConnectionError) as error:
            words = type(error).__name__  # its message may quote the answer
            raise ChatError("broken", words, is_retryable=True) from error

    async def read(
        self,
        response: aiohttp.ClientResponse,
        limit: asyncio.Timeout,
        end: float,
        is_patient: bool,
    ) -> AsyncIterator[str | Ending]:
        """Yield a response's visible deltas and its Ending; raise ChatError."""
        completion, chunk = Completion(self.settings.model, self.opening), b"\n"
        loop, idle = asyncio.get_running_loop(), self.settings.idle_timeout
        while chunk and not completion.reason:
            chunk = await read_chunk(response)
            text = completion.feed(chunk)
            if completion.has_progress and (is_patient or completion.has_begun):
                over = min(end, loop.time() + idle)
                if abs(over - (limit.when() or 0)) > idle / 20:  # timers are expensive
                    limit.reschedule(over)
            if completion.is_late:
                yield ThoughtEnd()
            if text:
                yield text
            if completion.error and not completion.reason:
                raise completion.error
        # The answer is complete, whatever happens while its usage is awaited.
        limit.reschedule(None)
        text = ""
        with contextlib.suppress(TimeoutError, aiohttp.ClientError, ConnectionError):
            async with asyncio.timeout(USAGE_SECONDS):
                while chunk and not completion.is_over and not completion.error:
                    chunk = await read_chunk(response)
                    text += completion.feed(chunk)
        ending = completion.ending()
        text += completion.thoughts.flush(ending.finish_reason == "length")
        self.opening = completion.thoughts.opening
        if text:
            yield text
        yield ending


PICTURE_BYTES = 4 * 1024 * 1024  # a third more in a request, as base64
PICTURE_FETCHES = 3  # at the same time, for all subscribers
PICTURE_TIMEOUT = 20  # seconds for one picture
PICTURES_BYTES = 8 * PICTURE_BYTES  # of questions that are being answered, in all
MAGIC = {
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
        self.room = PICTURES_BYTES  # that is left
        self.news = asyncio.Condition()  # there is more room

    @contextlib.asynccontextmanager
    async def fetch_all(self, urls: list[str]) -> AsyncIterator[list[Picture]]:
        """Give a question's pictures, once there is room; raise ChatError.

        Inside the block they take their room.
        """
        size = len(urls) * PICTURE_BYTES
        async with self.news:
            await self.news.wait_for(lambda: self.room >= size)
            self.room -= size
        try:
            pictures = await asyncio.gather(*map(self.fetch, urls))
            used = sum(len(picture.body) for picture in pictures)
            await self.give_back(size - used)
            size = used
            yield pictures
        finally:
            await self.give_back(size)

    async def give_back(self, size: int) -> None:
        """Let others have room that was taken."""
        self.room += size
        async with self.news:
            self.news.notify_all()

    async def fetch(self, url: str) -> Picture:
        """Return a picture; raise ChatError.

        Its own URL would not do: a provider abroad may not reach WeChat's hosts.
        """
        try:
            target = urllib.parse.urlsplit(url)
            is_web = target.scheme in ("http", "https")
            if not is_web or target.hostname not in self.hosts:
                raise ChatError("picture", "its host is not in picture_hosts")
            async with self.slots, asyncio.timeout(PICTURE_TIMEOUT):
                body = await self.read(url)
        except (aiohttp.ClientError, OSError, ValueError) as error:
            words = f"not fetched: {type(error).__name__}"  # no message, no URL
            raise ChatError("picture", words) from error
        for kind, magic in MAGIC.items():
            if re.match(magic, body, re.DOTALL):
                return Picture(kind, body)
        raise ChatError("picture", "neither JPEG, PNG, GIF nor WebP")

    async def read(self, url: str) -> bytes:
        """Return the bytes behind a URL, without redirects; raise ChatError."""
        async with self.http.get(url, allow_redirects=False) as response:
            if response.status != 200:
                raise ChatError("picture", f"status {response.status}")
            body = await read_body(response, PICTURE_BYTES + 1)
        if len(body) > PICTURE_BYTES:
            raise ChatError("picture", "larger than 4 MB")
        return body


# ---------------------------------------------------------------------------
# 9. Live state
#
# What lives in memory while something goes on, and is gone after a restart: the tasks
# and those who wait, a subscriber's open questions, the requests of one message.
# ---------------------------------------------------------------------------


def wake(future: asyncio.Future[None]) -> None:
    """Let a wait look at its condition and its deadline."""
    if not future.done():
        future.set_result(None)


class Tasks:
    """Every task of the process, and every wait, so that a shutdown can end them."""

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.running: set[asyncio.Task] = set()
        self.waits: set[asyncio.Future[None]] = set()
        self.closes_at: float | None = None  # loop's clock; set at a shutdown

    def start(
        self,
        work: Coroutine[None, None, None],
        name: str,
        fail: Callable[[], None] | None = None,
    ) -> asyncio.Task:
        """Run work as a task; if it raises, `fail` is called, so nobody waits on."""
        task = self.loop.create_task(work)
        self.running.add(task)
        task.add_done_callback(functools.partial(self.end, name, fail))
        return task

    def end(
        self, name: str, fail: Callable[[], None] | None, task: asyncio.Task
    ) -> None:
        """Log what a task raised: nobody awaits it."""
        self.running.discard(task)
        if error := None if task.cancelled() else task.exception():
            is_known = isinstance(error, sqlite3.Error)  # a full or locked disk
            trace = None if is_known else error
            log.error("%s broke off: %s", name, error, exc_info=trace)
            if fail:
                fail()

    async def until(
        self, news: Signal, is_wanted: Callable[[], bool], deadline: float
    ) -> bool:
        """Wait for a condition that `news` may bring about; say whether it is met.

        The wait ends at the deadline (loop's clock), or before that at a shutdown.
        """
        while not is_wanted():
            if self.closes_at is not None:
                deadline = min(deadline, self.closes_at)
            if self.loop.time() >= deadline:
                return False
            future: asyncio.Future[None] = self.loop.create_future()
            timer = self.loop.call_at(deadline, wake, future)
            self.waits.add(future)
            news.waiting.append((is_wanted, future))
            try:
                await future
            finally:
                timer.cancel()
                self.waits.remove(future)
                news.waiting.remove((is_wanted, future))
        return True

    def end_waits(self, at: float) -> None:
        """End all waits at that time at the latest, those to come as well."""
        self.closes_at = at
        for future in self.waits:
            self.loop.call_at(at, wake, future)

    async def close(self) -> None:
        """Cancel all tasks, and wait until they have ended."""
        for task in list(self.running):
            task.cancel()
        await asyncio.gather(*self.running, return_exceptions=True)


LONG_WORKS = 8  # results that are kept


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
        """Return what a function gives, or gave for this key a short time ago."""
        if key not in self.results:
            self.results[key] = self.run(work, *args)
        if len(self.results) > LONG_WORKS:
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
    # Few of their pages are made or written at once, so that readers who stall leave
    # places for others' pages.
    pages: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(2))
    viewers: int = 0  # event streams of their answers
    turns: list[Turn] = field(default_factory=list)  # unfinished, the oldest first
    last_part: int | None = None  # the highest number; None: not read yet
    is_told: bool = True  # the privacy words were said; the store may know better
    # Numbers of the parts offered lately, by turn and start.
    offered: dict[tuple[int, int], int] = field(default_factory=dict)
    # By turn, answers of which only an early reply was read: next part, question.
    to_mention: dict[int, tuple[int, str]] = field(default_factory=dict)

    def offer(self, turn_id: int, start: int, place: int = 1) -> Part:
        """Return the part of a turn from `start` on, each time with the same number."""
        if (turn_id, start) not in self.offered:
            self.last_part = (self.last_part or 0) + 1
            self.offered[turn_id, start] = self.last_part
        return Part(self.offered[turn_id, start], turn_id, start, place=place)

    def forget(self) -> None:
        """Forget what the store forgets; the lock and who reads stay."""
        self.last_part = 0
        self.is_told = False
        self.turns.clear()
        self.offered.clear()
        self.to_mention.clear()


# A text of ours ('' says nothing), part of an answer, or a reply to be sent as it is.
Source = str | tuple[Turn, Part] | Reply


@dataclass(slots=True, eq=False)
class Delivery:
    """The requests of one message, what answers it, and the one reply they all get."""

    message: Message
    subscriber: Subscriber
    first: float  # loop's clock at the first request, or an estimate
    cookie_hash: str = ""  # of the device it comes from; '': from WeChat
    newest: float = -math.inf  # loop's clock at the newest request
    seen: int = 0  # requests that count as attempts
    seen_before: int = 0  # attempts that an earlier process saw, at least: 0 or 1
    session: Session | None = None  # open, and not idle for too long
    lapsed: Session | None = None  # open in the store, but it ran out lately
    pictures: str = "[]"  # JSON list of URLs and words that wait for a question
    hinted_at: float = 0.0  # Unix seconds of the newest hint outside a session
    source: Source | None = None  # what answers it, once known; in the end the reply
    is_kept: bool = True  # False: nothing about this message is to be stored
    reply: Reply | None = None  # as decided
    stored: asyncio.Future | None = None  # storing the decided reply
    news: Signal = field(default_factory=Signal)  # `source` or `reply` is there

    def arrive(self, now: float, half_attempt: float) -> int:
        """Count a request; return which attempt it is in this process.

        One that comes within half an attempt of the one before is a duplicate.
        """
        if now - self.newest >= half_attempt:
            self.seen += 1
        self.newest = now
        return self.seen

    def is_answered(self) -> bool:
        """Say whether it is known what answers the message."""
        return self.reply is not None or self.source is not None

    def is_ready(self) -> bool:
        """Say whether the reply can be complete."""
        # A reply may be decided before it is known what would have answered.
        if self.reply or not isinstance(self.source, tuple):
            return self.is_answered()
        turn, part = self.source
        return turn.has_part(part.start)

    def answer_with(self, source: Source) -> None:
        """Answer with a fixed text, or with what a model writes."""
        self.source = source
        self.news.look()


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
SIGN_INS = 5000  # browsers that may show one: the oldest goes that nobody has sent
WRONG_NUMBERS, WRONG_SECONDS = 5, 3600.0  # that a subscriber may send in so long


@dataclass(slots=True)
class SignIn:
    """A browser that shows a number, and who has sent it to the account."""

    number: str  # six digits; no other browser shows them
    cookie_hash: str  # of the browser's own cookie for this
    until: float  # by the loop's clock
    openid: str = ""
    is_confirmed: bool = False


class SignIns:
    """Browsers that wait to be signed in; after a restart they get new numbers."""

    def __init__(self, loop_time: Callable[[], float]) -> None:
        self.loop_time = loop_time
        self.waiting: dict[str, SignIn] = {}  # by hash of the cookie, oldest first
        self.wrong: collections.deque[tuple[float, str]] = collections.deque()

    def begin(self, cookie_hash: str) -> SignIn:
        """Return a number for a browser."""
        now, numbers = self.loop_time(), {one.number for one in self.waiting.values()}
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
        return one if one and one.until > self.loop_time() else None

    def sent_by(self, openid: str) -> list[SignIn]:
        """Return the sign-ins whose numbers a subscriber has sent."""
        return [one for one in self.waiting.values() if one.openid == openid]

    def claim(self, openid: str, number: str) -> bool:
        """Note who sent a number; False if no browser shows it."""
        now = self.loop_time()
        for one in self.sent_by(openid):
            if not one.is_confirmed:
                one.openid = ""  # only the newest number counts
        for one in self.sent_by(""):
            if one.number == number and one.until > now:
                one.openid = openid
                return True
        self.wrong.append((now, openid))
        return False

    def is_tried_too_often(self, openid: str) -> bool:
        """Say whether a subscriber has sent too many wrong numbers."""
        since = self.loop_time() - WRONG_SECONDS
        while self.wrong and self.wrong[0][0] < since:
            self.wrong.popleft()
        return sum(who == openid for _, who in self.wrong) >= WRONG_NUMBERS

    def confirm(self, openid: str) -> bool:
        """Let the browser in whose number a subscriber sent; False if there is none."""
        now = self.loop_time()
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
    """Knows which signed requests are of now, and whose message came with a signature.

    A query does not cover its body, and digits moved between timestamp and nonce leave
    its signature right: so that belongs to one message. 100 pushes a second take 25 MB.
    """

    SECONDS = 600  # how far a timestamp may be off

    def __init__(
        self, loop_time: Callable[[], float], warn: Callable[..., None]
    ) -> None:
        self.loop_time, self.warn = loop_time, warn  # the loop's clock; Bot.warn
        self.began = time.time() - loop_time()  # the wall clock when that was 0
        # A signature's message, hashed, for 20 to 30 minutes: timestamps may be ahead.
        self.owners: collections.ChainMap[int, int] = collections.ChainMap()
        self.next_map_at = loop_time()

    def is_fresh(self, timestamp: str) -> bool:
        """Say whether a timestamp is near our clock, or near it had it never jumped."""
        signed = int(timestamp) if re.fullmatch("[0-9]{10}", timestamp) else -1e9
        clocks = time.time(), self.began + self.loop_time()
        seconds = min((now - signed for now in clocks), key=abs)
        if abs(seconds) > self.SECONDS:
            self.warn("stale push refused: our clock is %+.0f s off its time", seconds)
        return abs(seconds) <= self.SECONDS

    def is_first(self, signature: str, message: Message | str) -> bool:
        """Say whether no other message, or other use, had this signature before."""
        if self.loop_time() >= self.next_map_at:
            self.next_map_at = self.loop_time() + self.SECONDS
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
# its path: what answers a message (deliver, find_source, handle_), the question's task
# (converse), what a request gets (reply_to, compose). It knows nothing of HTTP.
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


def find_command(text: str) -> Command | None:
    """Return the command that a whole text is, or None."""
    name = folded(text)
    return COMMANDS.get(name[1:].strip()) if name.startswith("/") else None


def find_assistant(text: str, names: Iterable[str]) -> tuple[str, str] | None:
    """Return the assistant a text opens and the question after it, or None.

    `/chatgpt 问题` and `/chatgpt问题` are the same; of two names the longer one counts.
    """
    text = text.strip()
    if not folded(text[:1]).startswith("/"):
        return None
    for name in sorted(names, key=len, reverse=True):
        wanted = folded("/" + name)
        for end in range(1, min(len(text), 2 * len(wanted)) + 1):
            if folded(text[:end]) == wanted:
                return name, text[end:].strip()
    return None


def is_command(text: str, names: Iterable[str]) -> bool:
    """Say whether a whole text is a command, or opens one of these assistants."""
    return bool(find_command(text) or find_assistant(text, names))


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
    words = {folded(word): name for name, these in shown.items() for word in these}
    return {"下一段": "continue", **words}


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


def failed_state(turn: Turn, kind: str) -> str:
    """Return the state of an answer that did not end well."""
    if kind == "blocked":
        return "blocked"
    return "broken" if turn.answer else "failed"


def ending_words(texts: Texts, turn: Turn, retry: str, go_on: str = "") -> str:
    """Return what is said after the text of an ended answer; '' if it ended well.

    `retry` is how its question is asked again, where that may help, and `go_on` how the
    rest of one is asked for that reached the limit of its length.
    """
    fixed = {
        "done": "",
        "cut": texts.stopped_here
        if turn.reason == "stopped"
        else texts.cut_short.format(tap=go_on),
        "ended": texts.session_ended,
        "blocked": texts.blocked_answer,
    }
    if turn.state in fixed:
        return fixed[turn.state]
    name = "broken" if turn.state == "broken" else turn.reason or "empty"
    return getattr(texts, f"failed_{name}").format(tap=retry)


def cut_reply(text: str, room: int) -> int:
    """Return how much of a chat text fits `room` bytes once links are escaped."""
    cut = cut_text(text, room)
    while (over := sent_size(text[:cut]) - room) > 0:
        cut = cut_text(text, size_of(text[:cut]) - over)
    return cut


def log_failure(name: str, stored: asyncio.Future) -> None:
    """Log that something about a message could not be stored."""
    if error := stored.exception():
        log.error("%s not stored: %s", name, error)


ASKINGS = 3  # how many times a question is sent upstream across restarts
RESUME_SECONDS = 600  # a question older than that is not asked again after a crash
STORE_SECONDS = 2.0  # pause before trying again to store how an answer ended
SAVE_SECONDS = 1.0  # how often the text so far is stored
REPEAT_SECONDS = 60  # the same question again within this time joins the first
RETRY_PAUSES = (0.5, 1.0)  # seconds before a question is asked again
RECENT_SECONDS = 3600  # how far back 继续 and 重试 look
FORGET_SECONDS = 300  # how long 确认删除 is accepted
PRUNE_SECONDS = 600.0  # how often what has served its time is deleted
HOLD_SECONDS = 3.0  # how long a timed-out request is kept open before it is dropped
PAGES_AT_ONCE = 8  # that are loaded and rendered
PAGE_BYTES = 16 * 2**20  # of pages that are being written besides
EXPORTS_AT_ONCE = 4  # files; each holds ten exchanges
PAGE_SECONDS = 60.0  # for making a page and writing it
SHARED_CHARS = 400  # of what an article or a place says
SURE_CHARS = 300  # so many fit one reply with whatever stands below them
DELTA_CHARS = 500  # what is appended at once; between two pieces others have a turn


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
        self.page_room = PAGE_BYTES  # that is left
        self.guard = MuteGuard(config.wechat.mute_guard)
        self.replays = ReplayGuard(self.tasks.loop.time, self.warn)
        self.sign_ins = SignIns(self.tasks.loop.time)
        self.slots = asyncio.Semaphore(config.limits.at_once)  # first come first
        self.deliveries: dict[str, Delivery] = {}  # of the last minute, by message key
        self.turns: dict[int, Turn] = {}  # being written or waiting
        self.subscribers = weakref.WeakValueDictionary[str, Subscriber]()
        # By session: its questions are answered one after another.
        self.locks = weakref.WeakValueDictionary[int, asyncio.Lock]()
        self.opened_at = self.tasks.loop.time()
        self.wechat_ahead = -math.inf  # WeChat's clock less the loop's, by the pushes
        # When something was warned of last, by the loop's clock, and in which words.
        self.warned: dict[str, tuple[float, str]] = {}
        self.heard_at: float | None = None  # the newest push that could be read

    def end_waits(self, at: float) -> None:
        """End all waits at that time at the latest (loop's clock), live pages now."""
        self.tasks.end_waits(at)
        for turn in self.turns.values():
            turn.deltas.look()

    async def close(self) -> None:
        """Let running answers go on until the time given to `end_waits`; cancel all."""
        writing = [t.task for t in self.turns.values() if t.task and not t.is_queued]
        if writing and self.tasks.closes_at:
            left = self.tasks.closes_at - self.tasks.loop.time()
            await asyncio.wait(writing, timeout=max(0, left))
        await self.tasks.close()
        self.work.threads.shutdown(wait=False, cancel_futures=True)

    def subscriber(self, openid: str) -> Subscriber:
        """Return a subscriber's state, new if nothing of theirs is in progress."""
        return self.subscribers.setdefault(openid, Subscriber())

    def warn(self, words: str, *values: object) -> None:
        """Log a warning, but not twice in a minute."""
        now, known = self.tasks.loop.time(), self.warned.get(words)
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

    def leave_alone(self, delivery: Delivery, reason: str) -> str:
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
            trouble = functools.partial(delivery.answer_with, self.texts.trouble)
            self.tasks.start(self.find_source(delivery), message.name, trouble)
        return delivery, delivery.arrive(arrived, wechat.attempt_timeout / 2)

    async def find_source(self, delivery: Delivery) -> None:
        """Find out what answers a message; a subscriber's messages take turns.

        A message that is new extends its session.
        """
        message, subscriber = delivery.message, delivery.subscriber
        async with subscriber.lock:
            openid = message.openid
            if openid in self.store.due:
                await self.store.forget_due()
            if openid in self.store.due:
                delivery.is_kept = False
                delivery.answer_with(self.texts.forget_noted)
                return
            recalled = await self.store.recall(message.key, openid, time.time())
            if subscriber.last_part is None:
                subscriber.last_part = recalled.last_part
                subscriber.is_told = recalled.is_told
                if recalled.mention:
                    number, missed_id, question = recalled.mention
                    subscriber.to_mention[missed_id] = (number, question)
            if recalled.reply:  # a copy of a message that was answered before
                delivery.seen_before, delivery.reply = 1, recalled.reply
                delivery.news.look()
                return
            if recalled.turn_id is not None:  # asked by a process before this one
                delivery.seen_before = 1
                # If the turn was deleted meanwhile, nothing is said: to ask it again
                # would store it again.
                source = await self.source_of(Part(0, recalled.turn_id)) or ""
                if isinstance(source, tuple):
                    delivery.first = min(delivery.first, source[0].asked_at)
                delivery.answer_with(source)
                return
            session, delivery.pictures = recalled.session, recalled.pictures
            delivery.hinted_at = recalled.hinted_at
            if session and session.assistant in self.config.assistants:
                idle = time.time() - session.last_at - self.config.session.ttl
                if idle <= 0 or session.is_busy:
                    delivery.session = session
                elif idle < LAPSE_SECONDS:
                    delivery.lapsed = session
            source = await self.handle_message(delivery)
            # Storing a question has extended the session.
            is_question = isinstance(source, tuple) and source[1].number == 0
            if delivery.session and message.msg_type != "event" and not is_question:
                self.store.touch_session(delivery.session.id, time.time())
        delivery.answer_with(source)

    async def source_of(self, part: Part) -> Source | None:
        """Return a part with its turn; None if that was deleted meanwhile."""
        turn = self.turns.get(part.turn_id)
        if turn is None:
            turn = await self.store.turn(part.turn_id)
            if turn is None:
                return None
            turn = await self.work.once(("turn", turn.id), turn.read)
        return turn, part

    async def handle_message(self, delivery: Delivery) -> Source:
        """Return what answers a message that has no reply yet."""
        message, limits = delivery.message, self.config.limits
        if message.openid in limits.deny and message.event != "unsubscribe":
            return self.leave_alone(delivery, "the sender is in limits.deny")
        if delivery.cookie_hash:
            return await self.ask_on_page(delivery)
        match message.msg_type, message.event:
            case "text", _:
                return await self.handle_text(delivery)
            case "event", "subscribe":
                return self.with_notice(self.config.replies.subscribe)
            case "event", "unsubscribe":
                await self.forget_all(delivery, "")
                return ""
            case "event", _:
                return self.leave_alone(delivery, "no event of its kind is answered")
        if delivery.session is None:
            return self.leave_alone(delivery, "no text, and no session is open")
        texts, said = self.texts, message.said.strip()[:SHARED_CHARS]
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

    async def handle_text(self, delivery: Delivery) -> Source:
        """Return what answers a text: the first of these cases that applies."""
        text, session = delivery.message.content.strip(), delivery.session
        config, is_words = self.config, bool(text) and text not in STICKER_TEXTS
        meant = self.aliases.get(folded(text), text)
        keyword = "" if session else config.replies.keywords.get(text, "")
        if keyword and is_command(keyword, config.assistants):
            meant = keyword
        if method := find_command(meant):
            log.info("%s command %s", delivery.message.name, method.__name__)
            return await method(self, delivery)
        if opened := find_assistant(meant, config.assistants):
            return await self.open_and_ask(delivery, *opened)
        if session and not is_words:
            return self.texts.unsupported
        if (source := await self.handle_tap(delivery, folded(text))) is not None:
            return source
        if session:
            return await self.accept_question(delivery, text)
        if text in config.replies.keywords:
            return self.tappable(config.replies.keywords[text])
        if not is_words:
            return self.leave_alone(delivery, "no words, and no session is open")
        return await self.handle_outside(delivery, text)

    async def handle_tap(self, delivery: Delivery, words: str) -> Source | None:
        """Return what answers a tap, or the same words typed; None if they are a text.

        继续 and 重试 with a number never are; the others if nothing is left to act on.
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
        match self.tap_words.get(re.sub(r"\s*\(\d+/\d+\)$", "", words)):
            case "continue":  # of the answer shown last, else the oldest not sent
                session_id = delivery.session.id if delivery.session else None
                unsent = await self.store.next_unsent(openid, session_id, since)
                return await self.unsent_source(delivery, unsent) if unsent else None
            case "retry":
                newest = await self.store.turns_of(openid, 2**62, 1)
                late = next((t for t in newest if t.created_at > since), None)
                return await self.retry(delivery, late)
            case "forget":
                return await self.confirm_forget(delivery)
            case "resume" if session and session.late_text:
                delivery.session = session
                return await self.accept_question(delivery, session.late_text)
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
        if turn is None or turn.openid != delivery.message.openid:
            return None
        is_known = turn.assistant in self.config.assistants
        if not is_known or turn.state not in ("failed", "broken"):
            return None
        if delivery.session is None:
            await self.open_session(delivery, turn.assistant)
        words, pictures = self.question_words(turn), turn.pictures or "[]"
        return await self.accept_question(delivery, words, pictures)

    async def open_and_ask(
        self, delivery: Delivery, assistant: str, question: str
    ) -> Source:
        """Open a session unless this assistant has one open; ask any question."""
        session, allow = delivery.session, self.config.limits.allow
        if allow and delivery.message.openid not in allow:
            return self.texts.not_allowed
        is_open = session is not None and session.assistant == assistant
        if not is_open:
            await self.open_session(delivery, assistant)
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
            await self.store.keep_late_text(lapsed.id, text)
            tap, question = tap_link(texts.word_resume), excerpt(text)
            return texts.session_lapsed.format(tap=tap, question=question)
        if replies.outside == "wechat_ai":
            return Reply(WECHAT_AI, int(now))
        if not replies.outside:
            return self.leave_alone(delivery, "replies.outside is empty")
        hours = replies.outside_hours
        if hours and now - delivery.hinted_at < hours * 3600:
            return self.leave_alone(delivery, f"a hint was sent within {hours:g} h")
        if hours:
            self.store.note(delivery.message.openid, hinted_at=now)
        return self.tappable(replies.outside)

    async def open_session(self, delivery: Delivery, assistant: str) -> None:
        """Open a session; one that was open ends."""
        openid, now = delivery.message.openid, time.time()
        delivery.session = await self.store.start_session(openid, assistant, now)
        delivery.lapsed = None
        self.end_queued(delivery.subscriber)

    async def accept_question(
        self, delivery: Delivery, question: str, pictures: str | None = None
    ) -> Source:
        """Store a question of the delivery's session, start its answer; or say why not.

        `pictures` are those of a question that is asked again.
        """
        subscriber, session = delivery.subscriber, delivery.session
        limits = self.config.limits
        assert session  # whoever calls this has found or opened it
        before = [t for t in subscriber.turns if t.session_id == session.id]
        # With a picture that came since, the same words are a new question.
        for turn in before if delivery.pictures == "[]" else []:
            if self.question_words(turn) == question and turn.age < REPEAT_SECONDS:
                if source := await self.unsent_source(delivery, turn.id):
                    return source
        kept = json.loads(delivery.pictures if pictures is None else pictures)
        urls = [one for one in kept if not one.startswith("\n")]
        said = "".join(one for one in kept if one.startswith("\n"))
        checked = (question, said) if pictures is None else ("", question)
        if refusal := self.refuse_question(delivery, *checked):
            return refusal
        marks = self.texts.word_picture * len(urls)
        turn = Turn(
            id=0,
            session_id=session.id,
            openid=delivery.message.openid,
            msg_key=delivery.message.key,
            link_key=secrets.token_urlsafe(16),
            question=f"{marks}{question}\n{said}" if said else marks + question,
            pictures=json.dumps(urls) if kept else None,
            created_at=time.time(),
            asked=0 if before else 1,  # it goes to the upstream at once
            assistant=session.assistant,
        )
        chars, cookie_hash = self.config.session.context_chars, delivery.cookie_hash
        most, of_all = limits.questions_per_day, limits.all_per_day
        if not await self.store.add_turn(turn, chars, most, of_all, cookie_hash):
            if cookie_hash and not await self.store.device_owner(cookie_hash):
                return self.texts.page_signed_out
            asked = await self.store.questions_of_day(turn.openid, turn.created_at)
            day_over = self.texts.day_over.format(count=most)
            return day_over if most and asked >= most else self.texts.all_over
        self.start_turn(turn, subscriber)
        log.info("%s accepted, %d waiting", turn.name, len(subscriber.turns))
        return turn, Part(0, turn.id)

    def refuse_question(self, delivery: Delivery, question: str, said: str) -> str:
        """Return why a question is not accepted, '' if it is; nothing is counted.

        `said` may have any length: what it is about, or one that is asked again.
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
        is_blocked = self.blocked.are_in_question(question + said)
        return texts.blocked_question if is_blocked else ""

    # The question's task

    def start_turn(self, turn: Turn, subscriber: Subscriber) -> None:
        """Start the task that answers a question, after those before it."""

        def fail() -> None:
            self.end_unwritten(turn, failed_state(turn, "trouble"), "trouble")

        self.turns[turn.id] = turn
        subscriber.turns.append(turn)
        turn.is_queued = True
        turn.task = self.tasks.start(self.converse(turn, subscriber), turn.name, fail)

    async def converse(self, turn: Turn, subscriber: Subscriber) -> None:
        """Answer a question after those before it, and store how that ended.

        Until then it keeps alive the subscriber's state and the session's lock.
        """
        async with self.locks.setdefault(turn.session_id, asyncio.Lock()):
            if not turn.is_open:  # its session has ended meanwhile
                return
            turn.is_queued = False
            turn.deltas.look()
            ending: Ending | None = None
            try:
                ending = await self.ask_models(turn)
                turn.model = ending.model
                turn.finish("cut" if ending.finish_reason == "length" else "done")
            except ChatError as error:
                level = logging.ERROR if error.kind == "setup" else logging.WARNING
                log.log(level, "%s failed: %s", turn.name, error)
                if error.kind == "blocked":
                    await self.rewrite(turn, turn.as_sent)
                elif turn.earlier and not turn.answer:
                    await self.rewrite(turn, lambda _: turn.earlier or "")
                turn.finish(failed_state(turn, error.kind), error.kind)
            finally:
                if turn.is_open:  # cancelled: the next process goes on from this text
                    await self.save_texts([turn])
                else:
                    await self.store_end(turn, ending)

    async def ask_models(self, turn: Turn) -> Ending:
        """Let the assistant's model answer, or its fallback's, once there is a slot.

        Raise ChatError if both fail, or the first one did when text of it was sent.
        """
        settings = self.config.assistants[turn.assistant]
        fallback, urls = settings.fallback, json.loads(turn.pictures or "[]")
        within = settings.fallback_after or None if fallback else None
        async with self.slots, self.pictures.fetch_all(urls) as pictures:
            if turn.context is None:  # it has waited, or is asked again after a restart
                chars = self.config.session.context_chars
                await self.store.count_asking(turn, chars)
            messages = self.messages_for(turn, pictures)
            try:
                return await self.ask_model(turn, turn.assistant, messages, within)
            except ChatError as error:
                if not fallback or turn.stops or error.kind == "blocked":
                    raise
                log.warning("%s goes to %s after %s", turn.name, fallback, error)
            turn.restart()
            return await self.ask_model(turn, fallback, messages, None)

    def messages_for(self, turn: Turn, pictures: list[Picture]) -> list[dict]:
        """Return what the model gets: prompt, the session so far, the question."""
        prompt = self.config.assistants[turn.assistant].system_prompt
        messages: list[dict] = []
        if prompt:
            messages.append({"role": "system", "content": prompt})
        for question, answer in reversed(turn.context or []):
            messages.append({"role": "user", "content": question})
            messages.append({"role": "assistant", "content": answer})
        content: str | list[dict] = turn.question
        if pictures:
            content = [{"type": "text", "text": self.question_words(turn)}]
            urls = [{"url": url, "detail": "low"} for url in pictures]
            content += [{"type": "image_url", "image_url": url} for url in urls]
        return [*messages, {"role": "user", "content": content}]

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
        client, settings = self.chat[name], self.config.assistants[turn.assistant]
        end = self.tasks.loop.time() + client.settings.timeout
        for pause in (*RETRY_PAUSES, None):
            turn.calls += 1
            stream = client.stream(messages, end, begin_within)
            try:
                return await self.write_text(turn, stream)
            except ChatError as error:
                if error.setting:
                    place = f"assistants.{name}.{error.setting}"
                    error.add_note(f"look at {place}, and run wxgpt.py check")
                if error.kind == "refused" and not turn.stops:
                    turn.restart()  # withdrawn
                if pause is None or turn.stops:
                    raise
                fewer = messages
                if error.kind == "long":
                    fewer = shortened(messages, is_last=pause == RETRY_PAUSES[-1])
                if len(fewer) < len(messages):
                    messages, pause = fewer, 0.0
                elif settings.fallback or not error.is_retryable:
                    raise
                elif error.retry_in is not None:
                    pause = error.retry_in
                else:
                    pause *= random.uniform(0.75, 1)
                if self.tasks.loop.time() + pause > end:
                    raise
                log.warning("%s asked again after %s", turn.name, error)
            turn.restart()
            await asyncio.sleep(pause)
        raise AssertionError("the last attempt returns or raises")

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
                    await self.begin_anew(turn)
                if isinstance(item, ThoughtEnd):
                    await self.rewrite(turn, turn.without_thought)
                    guard = WordGuard(self.blocked)
                rest = item[: ANSWER_CHARS - len(turn.answer)]
                while len(rest) > DELTA_CHARS:
                    self.show(turn, guard, rest[:DELTA_CHARS], False)
                    rest = rest[DELTA_CHARS:]
                    await asyncio.sleep(0)
                self.show(turn, guard, rest, False)
                if len(turn.answer) >= ANSWER_CHARS:
                    break
        self.show(turn, guard, "", True)
        if not turn.answer.strip():
            reason = f"finish_reason {ending.finish_reason}"
            # A limit that thoughts alone reach will be reached again.
            is_retryable = ending.finish_reason != "length"
            raise ChatError("empty", reason, is_retryable)
        return ending

    async def begin_anew(self, turn: Turn) -> None:
        """Move unsent parts of what an earlier process wrote to the answer's start."""
        await self.store.begin_anew(turn.id)
        for delivery in self.deliveries.values():
            if isinstance(delivery.source, tuple) and delivery.source[0] is turn:
                part = delivery.source[1]
                is_anew = part.is_anew or part.start > 0
                delivery.source = turn, replace(part, start=0, is_anew=is_anew)

    def show(self, turn: Turn, guard: WordGuard, delta: str, is_end: bool) -> None:
        """Append what of a stream may be shown; raise ChatError for a blocked word.

        Links and tags part a word in the Markdown that is whole in the chat or on the
        page: so what they show is looked through as well, before anybody is told.
        """
        text, is_blocked = guard.feed(delta, is_end)
        answer, has_words = turn.answer, bool(self.blocked.words)
        before = len(turn.shown()) if has_words else 0
        if text and not is_blocked:
            turn.append(text)
        if has_words and not is_blocked:
            # The end is final now: no sign waits any more for what may follow it.
            is_blocked = guard.sees(turn.chat.text(is_end)[before:])
        if is_blocked:
            turn.answer = answer  # nobody is told before it is rewritten
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
        turn.deltas.look()

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

    def end_unwritten(self, turn: Turn, state: str, reason: str | None = None) -> None:
        """End an answer that no task is writing, unless it has ended."""
        if turn.is_open:
            turn.finish(state, reason)
            self.tasks.start(self.store_end(turn), turn.name)

    def end_queued(self, subscriber: Subscriber) -> None:
        """End the questions that still wait in a session that has ended.

        What is being written is finished, and stays readable by its links.
        """
        for turn in list(subscriber.turns):
            if turn.is_open and turn.is_queued:
                self.end_unwritten(turn, "ended")

    async def resume_turns(self) -> None:
        """Take up the questions that the process before this one left unfinished."""
        now = time.time()
        for turn, is_session_open in await self.store.open_turns():
            if turn.asked >= ASKINGS or now - turn.created_at > RESUME_SECONDS:
                self.turns[turn.id] = await self.work.run(turn.read)
                self.end_unwritten(turn, failed_state(turn, "given_up"), "given_up")
            elif not turn.asked and not is_session_open:
                self.turns[turn.id] = turn
                self.end_unwritten(turn, "ended")
            else:
                turn.earlier, turn.answer = turn.answer if turn.asked else None, ""
                self.start_turn(turn, self.subscriber(turn.openid))
                log.info("%s resumed, asked %d times before", turn.name, turn.asked)

    # What a request gets

    async def reply_to(
        self, delivery: Delivery, number: int, arrived: float
    ) -> Reply | None:
        """Return the reply for this request, or None: WeChat is to ask again."""
        wechat, loop = self.config.wechat, self.tasks.loop
        over, margin = arrived + wechat.attempt_timeout, wechat.margin
        # 1. Wait until the reply can be complete.
        is_ready = await self.until_ready(delivery, over - margin)
        # 2. If it is not, and WeChat will ask again, wait on. The last attempt is also
        #    one that comes later than halfway between the last but one and the last. A
        #    timeout is charged now: a burst of them, charged when WeChat hangs up,
        #    would all pass the guard.
        late = (wechat.attempts - 1.5) * wechat.attempt_timeout
        is_last = number + delivery.seen_before >= wechat.attempts
        is_last = is_last or arrived - delivery.first > late
        if not (is_ready or is_last) and self.guard.charge(loop.time()):
            if not await self.until_ready(delivery, over):
                # WeChat has stopped reading, but an answer here would end its retries:
                # say nothing, unless another request gets the reply, and hang up.
                news = delivery.news
                await self.tasks.until(
                    news, lambda: delivery.reply is not None, over + HOLD_SECONDS
                )
                if delivery.reply is None:
                    return None
        # 3. Decide once for all requests: all there is, or a word of patience. Before
        #    that, the parts of a long answer are counted unless it takes too long.
        if delivery.reply is None and isinstance(delivery.source, tuple):
            turn, part = delivery.source
            is_long = not turn.is_open and len(turn.shown()) - part.start > SURE_CHARS
            if is_long and part.start not in turn.left:
                counted = self.work.run(self.count_parts, turn, part.start)
                await asyncio.wait({counted}, timeout=margin / 4)
        if delivery.reply is None:
            self.decide(delivery)
        # 4. It is stored before it is sent, if that does not take too long.
        if delivery.stored and not delivery.stored.done():
            left = over - margin / 2 - loop.time()
            await asyncio.wait({delivery.stored}, timeout=max(0, left))
            if not delivery.stored.done():
                name = delivery.message.name
                log.warning("%s replied before it was stored: a slow disk?", name)
        return delivery.reply

    async def until_ready(self, delivery: Delivery, deadline: float) -> bool:
        """Wait until a message's reply can be complete; False at the deadline."""
        news, tasks = delivery.news, self.tasks
        if not await tasks.until(news, delivery.is_answered, deadline):
            return False
        if isinstance(delivery.source, tuple):
            news = delivery.source[0].news
        return await tasks.until(news, delivery.is_ready, deadline)

    def decide(self, delivery: Delivery) -> None:
        """Fix the reply of a message for all its requests, and start to store it."""
        subscriber, message = delivery.subscriber, delivery.message
        source, reply = delivery.source, self.compose(delivery)
        if reply.content and reply is not source:
            for words, changes in self.footers(delivery, reply):
                content = f"{reply.content}\n\n{words}"
                if not reply.mentions and sent_size(content) <= REPLY_BYTES:
                    reply = replace(reply, content=content, **changes)
            reply = replace(reply, content=outgoing(reply.content))
        subscriber.is_told |= reply.introduces
        if reply.mentions:
            del subscriber.to_mention[reply.mentions]
        if isinstance(source, tuple):
            turn, part = source
            if reply.stop > part.start:
                turn.stops[part.start] = reply.stop
            if reply.offered and reply.is_early and part.number == 0:
                subscriber.to_mention[turn.id] = (reply.offered.number, turn.question)
            elif not reply.is_patience:
                subscriber.to_mention.pop(turn.id, None)
        if reply.content and delivery.is_kept:
            delivery.stored = self.store.save_reply(message.key, message.openid, reply)
            failed = functools.partial(log_failure, f"{message.name} reply")
            delivery.stored.add_done_callback(failed)
        # Later copies need the reply alone; the answer would stay in memory with them.
        delivery.source = delivery.reply = reply
        delivery.news.look()
        if isinstance(source, tuple):  # others wait for more of the answer
            source[0].news.look()

    def compose(self, delivery: Delivery) -> Reply:
        """Return the reply a message gets now: a fixed text, or part of an answer."""
        now, source = int(time.time()), delivery.source
        if isinstance(source, Reply):
            return source
        if not isinstance(source, tuple):
            return Reply(self.texts.trouble if source is None else source, now)
        turn, part = source
        shown, subscriber = turn.shown(), delivery.subscriber
        head = self.texts.anew + "\n" if part.is_anew else ""
        if not turn.is_open:
            content = self.rest_of(turn, part.start, head)
            if sent_size(content) <= REPLY_BYTES:
                return Reply(content, now, part, stop=len(shown))
        # Not all of it. The first reply that shows a part fixes where it ends.
        is_early = not turn.has_part(part.start)
        room = self.room_in(turn) - sent_size(head)
        rest = shown[part.start : part.start + 2 * REPLY_BYTES]
        stop = turn.stops.get(part.start) or part.start + cut_reply(rest, room)
        text = shown[part.start : stop].strip("\n")
        if text:
            place = part.place and part.place + 1
            offered = subscriber.offer(turn.id, stop, place)
            left = None if turn.is_open else turn.left.get(stop, 0)
            content = head + text + self.tail(turn, offered, left)
            return Reply(content, now, part, stop, offered, is_early)
        offered = part if part.number else subscriber.offer(turn.id, part.start)
        content = self.patience(delivery, turn, offered.number)
        return Reply(content, now, part, part.start, offered, is_early=True)

    def rest_of(self, turn: Turn, start: int, head: str) -> str:
        """Return all that is left to say of an ended answer, of any size."""
        text = turn.shown()[start:].strip("\n")
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

    def count_parts(self, turn: Turn, start: int) -> None:
        """Count the parts of an ended answer from a start on; it may take a second."""
        starts, shown, room = [start], turn.shown(), self.room_in(turn)
        while (at := starts[-1]) not in turn.left:
            is_short = len(shown) - at <= REPLY_BYTES
            if is_short and sent_size(self.rest_of(turn, at, "")) <= REPLY_BYTES:
                turn.left[at] = 1
            else:
                rest = shown[at : at + 2 * REPLY_BYTES]
                starts.append(turn.stops.get(at) or at + cut_reply(rest, room))
        for number, start in enumerate(reversed(starts), turn.left[at]):
            turn.left[start] = number

    def patience(self, delivery: Delivery, turn: Turn, number: int) -> str:
        """Return what is said while nothing can be shown yet."""
        texts, session_id = self.texts, turn.session_id
        turns = [t for t in delivery.subscriber.turns if t.session_id == session_id]
        before = sum(t.is_open and t.id < turn.id for t in turns)
        text = texts.queued if turn.is_queued else texts.thinking
        return text.format(
            question=excerpt(turn.question),
            before=max(1, before),
            time=spoken_age(texts, turn.age),
            tap=tap_link(texts.word_answer, f"{CONTINUE}{number}"),
            page=self.page_link(turn, texts.word_page),
        )

    def footers(
        self, delivery: Delivery, reply: Reply
    ) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield what may stand below a reply, and the fields that this changes in it.

        In a conversation the introduction comes first; nobody reads the privacy words
        twice, except after /forget. Then come answers that were not read yet.
        """
        texts, source, subscriber = self.texts, delivery.source, delivery.subscriber
        talk = source[0] if isinstance(source, tuple) else delivery.session
        if talk and delivery.is_kept and not subscriber.is_told:
            one, two = tap_link(texts.word_example_1), tap_link(texts.word_example_2)
            words = texts.introduction.format(
                assistant=talk.assistant, one=one, two=two
            )
            yield f"{words}\n{self.tappable(texts.privacy)}", {"introduces": True}
        own_id = reply.part.turn_id if reply.part else None
        for turn_id, (number, question) in subscriber.to_mention.items():
            if turn_id != own_id and turn_id not in self.turns:
                tap = tap_link(texts.word_answer, f"{CONTINUE}{number}")
                line = texts.unread.format(question=excerpt(question), tap=tap)
                yield line, {"mentions": turn_id}

    def note_delivery(self, delivery: Delivery, number: int, is_taken: bool) -> None:
        """Store for `stats` how text of an answer was delivered, or that it was not."""
        reply = delivery.reply
        part = reply.part if reply and delivery.is_kept else None
        if reply is None or part is None or reply.stop <= part.start:
            return
        how = "part" if part.number else str(number + delivery.seen_before)
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
        await self.open_session(delivery, session.assistant)
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
        message, now = delivery.message, time.time()
        recalled = await self.store.recall(message.key, message.openid, now)
        if not recalled.forget_asked_at:
            return None
        if now - recalled.forget_asked_at > FORGET_SECONDS:
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
        subscriber.forget()
        self.sign_ins.end(message.openid)
        self.work.results.clear()
        await self.store.forget(message.openid, message.key, outgoing(reply))
        self.work.results.clear()
        is_due = message.openid in self.store.due
        return self.texts.forget_noted if is_due else reply

    # What a page does

    async def ask_here(
        self, openid: str, cookie_hash: str, form: str, text: str
    ) -> tuple[Turn, Part] | str:
        """Take up a question from a device as if it were a message of the chat.

        `form` is the random id of the form: a second sending of its words joins the
        first; others, in a form that the browser had kept, are another question.
        """
        now, name = int(time.time()), f"page-{form}-{self.store.keyed_hash(text)[:8]}"
        message = Message(openid, "", "text", now, msg_id=name, content=text)
        arrived = self.tasks.loop.time()
        delivery, _ = self.deliver(message, arrived, cookie_hash)
        until = arrived + PAGE_SECONDS
        await self.tasks.until(delivery.news, delivery.is_answered, until)
        if isinstance(delivery.source, tuple):
            return delivery.source
        self.deliveries.pop(message.key, None)  # another try may be accepted
        return str(delivery.source or self.texts.trouble)

    async def ask_on_page(self, delivery: Delivery) -> Source:
        """Ask what was written on a page, in the session that runs or in a new one."""
        text, openid = delivery.message.content, delivery.message.openid
        if await self.store.device_owner(delivery.cookie_hash) != openid:
            return self.texts.page_signed_out
        if is_command(self.aliases.get(folded(text), text), self.config.assistants):
            return self.texts.page_command.format(text=excerpt(text))
        if delivery.session is None:
            if refusal := self.refuse_question(delivery, text, ""):
                return refusal
            _, assistant, _ = await self.newest_session(openid)
            await self.open_session(delivery, assistant)
        source = await self.accept_question(delivery, text)
        if not isinstance(source, tuple) or source[0].msg_key != delivery.message.key:
            return source  # refused, or the chat asks the same and will be answered
        turn, subscriber = source[0], delivery.subscriber
        if not subscriber.is_told:  # the words stood above the field
            subscriber.is_told = True
            self.store.note(openid, told_at=time.time())
        part = subscriber.offer(turn.id, 0)  # nobody may stay on the page for it
        self.store.offer_unread(openid, part, time.time())
        subscriber.to_mention.setdefault(turn.id, (part.number, turn.question))
        return source

    async def newest_session(self, openid: str) -> tuple[int, str, float]:
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
        subscriber = self.subscriber(openid)
        if assistant not in self.config.assistants:
            _, assistant, _ = await self.newest_session(openid)
        async with subscriber.lock:
            if await self.store.device_owner(cookie_hash) == openid:
                await self.store.start_session(openid, assistant, time.time())
                self.end_queued(subscriber)

    def stop_turn(self, openid: str, link_key: str) -> None:
        """End an answer that is being written: what is there of it stays, as cut."""
        for turn in list(self.turns.values()):
            is_theirs = turn.link_key == link_key and turn.openid == openid
            if is_theirs and turn.is_open and turn.is_queued:
                self.end_unwritten(turn, "cut", "stopped")
            elif is_theirs and turn.is_open and turn.task:
                turn.finish("cut", "stopped")
                turn.task.cancel()  # which closes the upstream's call

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
            if await self.save_texts(changed):
                saved = states
            if self.store.is_wal_behind:
                await self.store.truncate_wal()
            if self.store.due:
                await self.store.forget_due()

    async def save_texts(self, turns: list[Turn]) -> bool:
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

        That is what is due by our clock and by WeChat's, which the newest push told: a
        clock that jumps deletes nothing, nor does a process before its first push.
        """
        link_seconds = self.config.history.link_hours * 3600
        days = self.config.history.keep_days
        while True:
            await asyncio.sleep(PRUNE_SECONDS)
            now = min(time.time(), self.wechat_ahead + self.tasks.loop.time())
            try:
                if now > 0:
                    await self.store.prune(now, link_seconds, days)
            except sqlite3.Error as error:
                log.error("old replies not deleted: %s", error)


def check_commands(config: Config, mistakes: Mistakes) -> None:
    """Note names that mean two things, and replies that are too long."""
    require = mistakes.require
    replies, names = config.replies, [*config.assistants, *COMMANDS]
    notice, wanted = config.texts.model_notice, "at most 100 characters"
    require(len(notice) <= 100, "replies.model_notice", notice, wanted)  # for /help
    welcome = f"{replies.subscribe}\n\n{notice}"
    for text in (welcome, replies.outside, *replies.keywords.values()):
        size = sent_size(with_taps(text, *names))
        wanted = "at most 1800 bytes with taps"
        require(size <= REPLY_BYTES, "replies", f"{size} bytes", wanted)
    for name in config.assistants:
        is_free = folded(name) not in COMMANDS
        require(is_free, f"assistants.{name}", name, "a name that is no command's")
    taken = {folded(word): "replies.keywords" for word in replies.keywords}
    taken |= dict.fromkeys(tap_words(config.texts), "the words of taps")
    for name, text in config.aliases.items():
        where, key = f"aliases.{name}", folded(name)
        require(key and not key.startswith("/"), where, name, "a short text without /")
        if key in taken:
            words = "{name}: found {found}, expected a text that is not in {taken}"
            mistakes.add(where, words, found=repr(name), taken=taken[key])
        is_known = is_command(text, config.assistants)
        require(is_known, where, text, "a command, or the name of an assistant after /")
        taken[key] = "the aliases"


# ---------------------------------------------------------------------------
# 11. Pages
#
# Minimal HTML for a phone, with no outside resource. Without script, a pending answer
# reloads itself every three seconds. How pages look is in pages/; here records become
# what the templates there ask for.
# ---------------------------------------------------------------------------

PAGES = pathlib.Path(__file__).with_name("pages")
TEMPLATES = """page.html parts.html blocks.html answer.html history.html found.html
    sign_in.html error.html export.md""".split()
# What a page has of style and script; it takes no more of them than it needs.
PIECES = """page.css notice.css history.css ask.css
    page.js live.js ask.js fold.js found.js sign_in.js""".split()
POLICY = (
    "default-src 'none'; style-src 'nonce-{nonce}'; script-src 'nonce-{nonce}'; "
    "connect-src 'self'; img-src data:; base-uri 'none'; form-action {forms}; "
    "frame-ancestors 'none'"
)
RENDER_CHARS = 32_768  # the rest of a longer answer stays plain: rendering takes time
PLAIN_CHARS = 8192  # of that rest in one block
FOLD_CHARS = 300  # longer answers are folded in the history, and typeset when opened
HISTORY_COUNT = 50
FOUND_COUNT = 20  # on a page of what a search found
EVENT_CHARS = 32_768  # in one event of a stream, unless a single block has more
RECONNECT_MS = 1000  # how long a viewer waits whose stream was lost


def element(tag: str, words: str, kind: str = "") -> str:
    """Return an element around escaped words."""
    attribute = f' class="{kind}"' if kind else ""
    return f"<{tag}{attribute}>{html.escape(words)}</{tag}>"


LONG_LINE = 30  # characters of code that a phone shows without scrolling
SHORT_CELL = 8  # characters of a table's cell that are not broken into lines


def fix_headings(tokens: list[Token], above: int, level: int) -> int:
    """Leave no heading level out and no header cell empty, for screen readers.

    `level` is that of the heading before these tokens; return that of their last one.
    """
    for index, token in enumerate(tokens):
        if token.type == "heading_open":
            level = min(above + int(token.tag[1]), level + 1, 6)
            token.tag = tokens[index + 2].tag = f"h{level}"  # the one that closes it
        if token.type == "th_open" and not tokens[index + 1].content:
            token.tag = tokens[index + 2].tag = "td"
    return level


COLOURED_CHARS = 20_000  # a longer block of code stays plain


@functools.cache
def code_rules() -> dict[str, tuple[re.Pattern[str], frozenset[str]]]:
    """Return by a language's name what finds its tokens, and its keywords."""
    rules: dict[str, tuple[re.Pattern[str], frozenset[str]]] = {}
    for table in read_toml(PAGES / "code.toml")["languages"]:
        words = frozenset(table.get("words", "").split())
        keywords = table.get("pattern", r"(?!)")
        pattern = re.compile(
            f"(?P<k>{keywords})|(?P<c>{table['comment']})|(?P<s>{table['string']})"
            r"|(?P<n>(?<![\w.])\d[\w.]*+)|(?P<w>[^\W\d]\w*+)"
        )
        rules |= dict.fromkeys(table["names"].split(), (pattern, words))
    return rules


def coloured(code: str, info: str) -> str:
    """Return code as HTML, its comments, strings, numbers and keywords in spans."""
    language = re.split(r"[^\w+#]", info.strip().lower())[0]
    if language not in code_rules() or len(code) > COLOURED_CHARS:
        return html.escape(code)
    pattern, words = code_rules()[language]
    out, end, is_sql = [], 0, "select" in words
    for found in pattern.finditer(code):
        kind, word = str(found.lastgroup), found[0]
        if kind == "w":
            if word not in words and not (is_sql and word.lower() in words):
                continue
            kind = "k"
        out += [html.escape(code[end : found.start()]), element("span", word, kind)]
        end = found.end()
    return "".join(out) + html.escape(code[end:])


def clock(seconds: float, form: str = "%Y-%m-%d %H:%M") -> str:
    """Return a time as people in China read it."""
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

    As it was written, which was compared, if without its marks it has a blocked word.
    """
    begin = re.split(r"\n(?:```|~~~|\|)", markdown[:FOLD_CHARS].strip())[0]
    text = re.sub(r"（https?://[^）]*）|(?<=]) https?://[!-~]*", "", chat_text(begin))
    return excerpt(begin if blocked.are_in(text) else text.replace("】", "】 "), 80)


SEARCH_CHARS, SEARCH_WORDS = 100, 9  # of what is looked for
SNIPPET_CHARS = 80  # shown after the first of them


def snippet(text: str, words: list[str], blocked: BlockedWords) -> Markup:
    """Return the place in a text where the words begin, as a line with them marked.

    Its own marks stay if a word would be lost with them, or a blocked one appear.
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


COMMENT = r"(?ms)^\s*(//[^\n]*|/\*((?!\*/).)*\*/)\s*$|  // [^\n]*"
# A string of a script, or a sign that needs no spaces around it.
SCRIPT_SIGN = r"('[^'\n]*'|`[^`]*`)| *([=,{}()?:&|<>]+) *"


def minified(path: pathlib.Path) -> Markup:
    """Return a style or script without comments, indents and spaces between signs."""
    text = re.sub(r"(?m)^\s+", "", re.sub(COMMENT, "", path.read_text("utf-8")))
    if path.suffix == ".css":
        text = re.sub(r"\s*([{},;>]|:(?= ))\s*", r"\1", text).replace(";}", "}")
    else:
        text = re.sub(SCRIPT_SIGN, r"\1\2", text)
    return Markup(text)


def closed(markdown: str) -> str:
    """Return an answer with its code closed: it may have broken off in it."""
    fences = re.findall(r"(?m)^[ \t]*(`{3,}|~{3,})", markdown)
    return markdown + "\n" + fences[-1] if len(fences) % 2 else markdown


@functools.cache
def load_pages() -> jinja2.Environment:
    """Return the templates; raise ConfigError if one is missing or cannot be parsed.

    First called at the start; files changed later wait for the next start. Compiling
    all of them would take a tenth of it: each waits until it is shown.
    """
    folder = jinja2.FileSystemLoader(PAGES)
    pages = jinja2.Environment(
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        auto_reload=False,
    )
    pages.filters |= {"clock": clock, "day": day_and_time, "excerpt": excerpt}
    pages.filters |= {"preview": preview, "closed": closed, "snippet": snippet}
    pages.globals |= {"ending_words": ending_words, "now": time.time}
    pages.globals |= {"random_hex": secrets.token_hex}
    try:
        for name in PIECES:
            pages.globals[name.replace(".", "_")] = minified(PAGES / name)
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
DATA_PICTURE_CHARS = 4 * 1024 * 1024 * 4 // 3
BOX = re.compile(r'<menclose notation="box">((?:(?!<menclose).)*?)</menclose>')
RENDER_OPTIONS = MarkdownIt("zero", {"breaks": True}).options


class AnswerRenderer(RendererHTML):
    """Renders an answer; a method for each token the library renders otherwise."""

    def __init__(self, texts: Texts) -> None:
        super().__init__()
        blocks = load_pages().get_template("blocks.html")
        self.made: Any = blocks.make_module({"texts": texts})  # its macros
        self.formulas = 0  # so far

    def link_open(self, tokens: Sequence[Token], index: int, *_: object) -> str:
        address = tokens[index].attrGet("href") or ""
        is_empty = tokens[index + 1].type == "link_close"
        return str(self.made.link_open(address, address if is_empty else ""))

    def image(self, tokens: Sequence[Token], index: int, *_: object) -> str:
        # As a link, unless the answer holds it: loading one tells a stranger who reads.
        token = tokens[index]
        source, label = str(token.attrGet("src")), Markup(html.escape(token.content))
        if len(source) <= DATA_PICTURE_CHARS and DATA_PICTURE.fullmatch(source):
            return f'<img src="{source}" alt="{label}">'
        return str(self.made.picture_link(source, label))

    def math_inline(self, tokens: Sequence[Token], index: int, *_: object) -> str:
        token = tokens[index]
        self.formulas += 1
        is_block = token.markup in ("$$", "\\[", "")
        if self.formulas <= MAX_FORMULAS:
            if rendered := formula_mathml(token.content, is_block):
                source = html.escape(token.content)
                rendered = BOX.sub(r'<mrow class="boxed">\1</mrow>', rendered)
                return rendered.replace("<math ", f'<math data-copy="{source}" ', 1)
        written = token.markup + token.content + CLOSERS.get(token.markup, "")
        return element("code", written)

    math_block = math_inline

    def fence(self, tokens: Sequence[Token], index: int, *_: object) -> str:
        content, info = tokens[index].content, tokens[index].info
        is_wide = max(map(len, content.split("\n"))) > LONG_LINE
        return str(self.made.code(info.strip()[:20], coloured(content, info), is_wide))

    def table_open(self, *_: object) -> str:
        return str(self.made.table_open())

    def table_close(self, *_: object) -> str:
        return str(self.made.table_close())

    def td_open(self, tokens: Sequence[Token], index: int, *_: object) -> str:
        kinds = [tokens[index].info] if tokens[index].info else []
        if len(tokens[index + 1].content) > SHORT_CELL:
            kinds.append("long")
        kind = f' class="{" ".join(kinds)}"' if kinds else ""
        return f"<{tokens[index].tag}{kind}>"

    th_open = td_open


def piece_end(text: str, begin: int, most: int) -> int:
    """Return where a piece of a text ends, behind a line if the rest is too long."""
    if len(text) - begin <= most:
        return len(text)
    return text.rfind("\n", begin + most // 2, begin + most) + 1 or begin + most


def split_blocks(tokens: list[Token]) -> list[list[Token]]:
    """Return the tokens of each block, and at last those of one that is open."""
    blocks: list[list[Token]] = [[]]
    depth = 0
    for token in tokens:
        if token.nesting or not token.hidden:  # the others are for the chat
            blocks[-1].append(token)
            depth += token.nesting
            if not depth:
                blocks.append([])
    return blocks


MARKS = re.compile(r"[\s*#>|`~:+-]*|\s*\d{1,3}[.)]?\s*")  # all that a line has so far


class BlockRenderer:
    """Typesets an answer that grows, block by block; each block is one HTML element.

    A block that is done is never read again. The text beyond RENDER_CHARS stays plain.
    `above` is the level of the heading that the answer stands under.
    """

    def __init__(
        self, texts: Texts, above: int = 0, blocked: BlockedWords | None = None
    ) -> None:
        self.reader, self.renderer = MarkdownReader(), AnswerRenderer(texts)
        self.blocked = blocked or BlockedWords("")
        self.above, self.level = above, max(above, 1)
        self.done: list[str] = []
        self.tokens: list[Token] = []  # of the block that is not done
        self.begin = 0  # of what has not been read: the last line, or plain text
        self.is_plain = False

    def render(self, markdown: str, has_ended: bool) -> list[str]:
        """Read what was added; return all blocks, as they are if the answer ends."""
        if not self.is_plain:
            self.is_plain = len(markdown) > RENDER_CHARS
            end = len(markdown) if has_ended else markdown.rfind("\n") + 1
            if self.is_plain:
                end = piece_end(markdown, 0, RENDER_CHARS)
            self.read(markdown[self.begin : end], has_ended or self.is_plain)
            self.begin = end
            if not (has_ended or self.is_plain):
                return self.done + self.open_blocks(markdown[end:])
        while len(markdown) - self.begin > PLAIN_CHARS:
            end = piece_end(markdown, self.begin, PLAIN_CHARS)
            self.done.append(element("p", markdown[self.begin : end], "plain"))
            self.begin = end
        rest = markdown[self.begin :]
        return self.done + ([element("p", rest, "plain")] if rest else [])

    def read(self, text: str, is_end: bool) -> None:
        """Read complete lines, and render the blocks that they complete."""
        tokens = self.reader.tokens
        self.reader.feed(text)
        if is_end:
            self.reader.finish()
        self.level = fix_headings(tokens, self.above, self.level)
        *done, self.tokens = split_blocks(self.tokens + tokens)
        self.done += map(self.render_block, done)
        tokens.clear()

    def render_block(self, tokens: list[Token]) -> str:
        rendered = self.renderer.render(tokens, RENDER_OPTIONS, {})
        if self.blocked.are_in_html(rendered):  # a formula is set without its brackets
            self.renderer.formulas = MAX_FORMULAS
            rendered = self.renderer.render(tokens, RENDER_OPTIONS, {})
        return str(rendered)

    def open_blocks(self, line: str) -> list[str]:
        """Return what is not done, and a line that is not complete."""
        reader, formulas = self.reader.copy([]), self.renderer.formulas
        if not MARKS.fullmatch(line):  # which become something else with the next sign
            reader.feed(line)
        reader.finish()
        fix_headings(reader.tokens, self.above, self.level)
        *tokens, _ = split_blocks(self.tokens + reader.tokens)
        blocks = list(map(self.render_block, tokens))
        self.renderer.formulas = formulas
        return blocks


def render_blocks(
    texts: Texts, markdown: str, above: int = 0, blocked: BlockedWords | None = None
) -> list[str]:
    """Return the blocks of a whole answer as HTML; see BlockRenderer."""
    return BlockRenderer(texts, above, blocked).render(markdown, has_ended=True)


def render(config: Config, template: str, **values: object) -> str:
    """Return what a template makes of these values."""
    page = load_pages().get_template(template)
    return page.render(config=config, texts=config.texts, **values)


def page_response(
    config: Config, name: str, status: int = 200, **values: object
) -> web.Response:
    """Return a page made from a template, with the headers that keep it private."""
    nonce = secrets.token_urlsafe(12)
    text = render(config, f"{name}.html", nonce=nonce, **values)
    response = web.Response(text=text, status=status, content_type="text/html")
    forms = "'none'"
    if "<form" in text:  # whose Origin would be null without a referrer
        response.headers["Referrer-Policy"], forms = "same-origin", "'self'"
    policy = POLICY.format(nonce=nonce, forms=forms)
    response.headers["Content-Security-Policy"] = policy
    return response


@dataclass(frozen=True, slots=True)
class Asking:
    """What a page needs to ask for its reader, who is signed in."""

    token: str  # proves that a form is ours, and of this device
    form: str  # a random id: a second sending of the same words joins the first
    assistant: str  # of the newest session
    session: int  # that runs, 0: none
    opened_at: float
    is_told: bool  # what happens to what they write
    typed: str = ""  # what could not be asked
    refusal: str = ""


@dataclass(frozen=True, slots=True)
class Shown:
    """An exchange on a page, with what is made for it."""

    turn: Turn
    blocks: list[str]  # of the typeset answer; none if it is folded
    text: str  # what 复制全文 copies: both as the chat would show them, with the label
    address: str  # of its own page; '': that cannot be opened any more
    is_live: bool  # it was being written when this was made


def exchange_of(
    config: Config,
    blocked: BlockedWords,
    turn: Turn,
    live: list[str] | None = None,
    above: int = 0,
    is_folded: bool = False,
) -> Shown:
    """Return an exchange for a page; `live`: the blocks of an answer being written."""
    blocks, text = live or [], ""
    if live is None and not is_folded:
        blocks = render_blocks(config.texts, turn.answer, above, blocked)
        end = piece_end(turn.answer, 0, RENDER_CHARS)
        answer = chat_text(turn.answer[:end]) + turn.answer[end:]
        text = f"{turn.question}\n\n{answer}\n{config.replies.label}".strip()
    is_linked = time.time() - turn.created_at < config.history.link_hours * 3600
    address = f"{config.root}/a/{turn.link_key}" if is_linked else ""
    return Shown(turn, blocks, text, address, live is not None)


OPEN_CHARS = 20_000  # of the newest session's answers that are not folded


def open_turns(turns: list[Turn]) -> list[Turn]:
    """Return the turns whose answers a history shows; the others are folded.

    The newest session is shown as the conversation it is.
    """
    chars, shown = 0, []
    for turn in turns:
        chars += len(turn.answer)
        is_newest = turn.session_id == turns[0].session_id and chars < OPEN_CHARS
        if is_newest or len(turn.answer) <= FOLD_CHARS:
            shown.append(turn)
    return shown


def sse_event(data: dict, event: str = "", number: str = "") -> bytes:
    """Return one event of an event stream."""
    lines = [f"event: {event}"] if event else []
    lines += [f"id: {number}"] if number else []
    lines += [f"retry: {RECONNECT_MS}", f"data: {json.dumps(data, ensure_ascii=False)}"]
    return ("\n".join(lines) + "\n\n").encode()


LIVE_SECONDS = 0.25  # at least, between two typesettings of an answer
QUICK_SECONDS, QUICK_CHARS = 0.005, 1000  # what the loop may do itself
FORMULA_SIGN = re.compile(r"[$\\]")  # a formula takes long, the first one most of all


async def finished(bot: Bot, turn: Turn) -> Shown:
    """Return an exchange whose answer has ended, made once for all who want it."""
    values = bot.config, bot.blocked, turn
    return await bot.work.once(("page", turn.id), exchange_of, *values)


class LivePage:
    """One writing of an answer as all who follow it see it; typeset once for them."""

    def __init__(self, bot: Bot, writing: str) -> None:
        self.writing, self.blocked = writing, bot.blocked
        self.renderer = BlockRenderer(bot.texts, blocked=bot.blocked)
        self.blocks: list[str] = []  # replaced, never changed
        self.done = 0  # of the blocks; these stay as they are
        self.shows = 0, False  # characters of the answer, and whether it has ended
        self.seconds = 0.0  # of processor time for the last typesetting
        self.next_at = 0.0  # when the next may be (loop's clock)
        self.task: asyncio.Task | None = None  # typesets; no viewer cancels it

    async def refresh(self, bot: Bot, turn: Turn) -> None:
        """Typeset what was added; up to four times a second, in a thread if long."""
        loop = bot.tasks.loop
        await asyncio.sleep(self.next_at - loop.time())
        self.next_at = loop.time() + LIVE_SECONDS
        if turn.page is not self:
            return  # it is written anew, and this is nobody's
        text, has_ended = turn.answer, not turn.is_open
        added = text[self.shows[0] :]
        is_quick = self.seconds < QUICK_SECONDS and len(added) < QUICK_CHARS
        if has_ended and not self.shows[0]:
            blocks = (await finished(bot, turn)).blocks
        elif is_quick and not FORMULA_SIGN.search(added):
            blocks = self.render(text, has_ended)
        else:
            blocks = await bot.work.run(self.render, text, has_ended)
        self.blocks, self.done = blocks, len(self.renderer.done)
        self.shows = len(text), has_ended
        self.next_at = loop.time() + max(LIVE_SECONDS, 4 * self.seconds)

    def render(self, text: str, has_ended: bool) -> list[str]:
        """Return the blocks of the answer so far.

        The chat does not show yet what an open mark may change, so nobody has looked
        for blocked words in there.
        """
        began = time.thread_time()
        blocks = self.renderer.render(text, has_ended)
        done = len(self.renderer.done)
        if not has_ended and self.blocked.are_in_html("".join(blocks[done:])):
            del blocks[done:]
        self.seconds = time.thread_time() - began
        return blocks

    def events(self, begin: int) -> Iterator[bytes]:
        """Yield the events that bring the blocks from one on, so many as fit at once.

        `more` says that the next one follows at once; nothing is taken away before.
        """
        blocks, done, end = self.blocks, self.done, -1
        while end < len(blocks):
            end, chars = begin, 0
            while end < len(blocks) and chars < EVENT_CHARS:
                chars += len(blocks[end])
                end += 1
            more = {"more": True} if end < len(blocks) else {}
            data = {"keep": begin, "html": blocks[begin:end], **more}
            yield sse_event(data, number=f"{self.writing}:{min(end, done)}")
            begin = end


async def live_page(bot: Bot, turn: Turn) -> LivePage:
    """Return an answer typeset so far, as it is or was a moment ago."""
    while True:
        page = turn.page = turn.page or LivePage(bot, turn.writing)
        if page.shows != turn.extent:
            if not page.task or page.task.done():
                page.task = bot.tasks.start(page.refresh(bot, turn), turn.name)
            await asyncio.wait([page.task])
        if page is turn.page:  # not written anew meanwhile
            return page


# ---------------------------------------------------------------------------
# 12. HTTP handlers
# ---------------------------------------------------------------------------

BOT = web.AppKey("bot", Bot)


def is_from_wechat(request: web.Request, name: str, encrypted: str = "") -> bool:
    """Say whether a request is rightly signed and of now; its body stays unread."""
    bot, query = request.app[BOT], request.query
    timestamp, nonce = query.get("timestamp", ""), query.get("nonce", "")
    signature, token = query.get(name, ""), bot.config.wechat.token
    is_right = is_signed(token, signature, timestamp, nonce, encrypted)
    return is_right and bot.replays.is_fresh(timestamp)


CHECK_AGENT = "wxgpt check"  # User-Agent of `check`, whose probes are no news


async def verify_url(request: web.Request) -> web.Response:
    """Answer the console's verification with the echostr; no push may be signed so."""
    bot, is_right = request.app[BOT], is_from_wechat(request, "signature")
    is_check = request.headers.get("User-Agent") == CHECK_AGENT
    if not (is_right or is_check):
        bot.warn("verification with a wrong signature or time: is the token the same?")
    if not (is_right and bot.replays.is_first(request.query["signature"], "GET")):
        return web.Response(status=403)
    log.info("verified by %s", "`check`" if is_check else "WeChat's console")
    if not is_check:  # the console has our token now
        for words in [words for words in bot.warned if "wrong signature" in words]:
            del bot.warned[words]
    return web.Response(text=request.query.get("echostr", ""))


def outcome_of(reply: Reply) -> str:
    """Return how the log names what a reply brought."""
    if not reply.content:
        return "nothing to say"
    if reply.is_patience:
        return "asked for patience"
    if reply.part and reply.part.number:
        return f"part {reply.part.number} sent"
    return "answered early" if reply.is_early else "replied"


def drop_connection(request: web.Request) -> web.Response:
    """Close the connection without an answer: a reply would end WeChat's retries."""
    if request.transport:
        request.transport.abort()
    return web.Response()


async def answer_request(
    request: web.Request, delivery: Delivery, number: int, arrived: float
) -> web.StreamResponse:
    """Wait for the reply and write it, or drop the connection; log the outcome."""
    bot, message, loop = request.app[BOT], delivery.message, asyncio.get_running_loop()
    name = f"{message.name} attempt={number}"
    try:
        reply = await bot.reply_to(delivery, number, arrived)
        if reply is None:
            log.info("%s held to the end, cut", name)
            return drop_connection(request)
        body = render_text_reply(message, reply.content, reply.created)
        if bot.cipher and reply.content:  # `success` is never encrypted
            body = bot.cipher.seal(body, reply.created)
        response = web.Response(body=body, content_type="text/xml", charset="utf-8")
        await response.prepare(request)
        await response.write_eof()
    except (asyncio.CancelledError, ConnectionResetError) as gone:
        log.info("%s WeChat hung up after %.1f s", name, loop.time() - arrived)
        bot.note_delivery(delivery, number, is_taken=False)
        if isinstance(gone, asyncio.CancelledError):
            raise
        return web.Response()
    bot.note_delivery(delivery, number, is_taken=True)
    log.info("%s %s after %.1f s", name, outcome_of(reply), loop.time() - arrived)
    return response


BODY_SECONDS = 10.0  # how long a push's body may take to arrive


async def read_push(request: web.Request) -> Message | web.Response:
    """Return the message of a rightly signed push, or the response to anything else."""
    bot = request.app[BOT]
    if not is_from_wechat(request, "signature"):
        if "signature" in request.query:  # else it is a stranger's
            bot.warn("push with a wrong signature or time: is the token the same?")
        return web.Response(status=403)
    try:
        async with asyncio.timeout(BODY_SECONDS):
            body = await request.read()
    except (TimeoutError, ConnectionResetError):  # stalled, or hung up in the middle
        return drop_connection(request)
    except web.RequestPayloadError:
        body = b""  # torn: nothing that can be read
    if request.headers.get("User-Agent") == CHECK_AGENT:  # does a POST come through?
        return web.Response(body=b"success")
    try:
        if bot.cipher:
            sealed = find_encrypted(body)
            if not sealed or not is_from_wechat(request, "msg_signature", sealed):
                bot.warn("a push is not rightly encrypted: is the console in 安全模式?")
                return web.Response(status=403)
            body = bot.cipher.open(sealed)
        message = parse_message(body)
    except BadMessage as error:
        bot.warn("unreadable push: %s", error)
        return web.Response(body=b"success")
    if not bot.replays.is_first(request.query["signature"], message):
        return web.Response(status=403)
    bot.heard_at = bot.tasks.loop.time()
    bot.wechat_ahead = max(bot.wechat_ahead, message.created - bot.heard_at)
    return message


async def receive_message(request: web.Request) -> web.StreamResponse:
    """Answer a push with a passive reply, or with `success` whatever breaks."""
    bot, arrived = request.app[BOT], asyncio.get_running_loop().time()
    try:
        message = await read_push(request)
        if isinstance(message, web.Response):
            return message
        delivery, number = bot.deliver(message, arrived)
        return await answer_request(request, delivery, number, arrived)
    except web.HTTPException:
        raise  # 413: no push of WeChat's is so long
    except Exception:
        log.exception("a push broke off at the door")
        return web.Response(body=b"success")


def redirect(location: str) -> web.Response:
    """Lead a browser to another page of ours."""
    return web.Response(status=303, headers={"Location": location})


def wants_json(request: web.Request) -> bool:
    """Say whether the page's script asks; without it the browser does."""
    return request.headers.get("Accept", "").startswith("application/json")


class Refusal(web.HTTPException):
    """Why nothing is shown or done, in words for a page or for the page's script."""

    def __init__(self, request: web.Request, status: int, words: str = "") -> None:
        self.status_code, config = status, request.app[BOT].config
        usual = {404: config.texts.page_missing, 410: config.texts.page_expired}
        words, glyph = words or usual[status], "…" if status == 410 else "?"
        if wants_json(request):
            response = web.json_response({"error": words})
        else:
            response = page_response(config, "error", words=words, glyph=glyph)
        super().__init__(headers=response.headers, text=response.text)


Handler = Callable[..., Awaitable[web.StreamResponse]]


@web.middleware
async def refuse_kindly(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Answer what keeps a page from being made; a push is answered all the same."""
    try:
        return await handler(request)
    # Nobody reads it any more, or sends the rest of a form.
    except (TimeoutError, ConnectionResetError, web.RequestPayloadError):
        return drop_connection(request)
    except sqlite3.Error as error:  # a full or locked disk
        if request.writer.output_size:  # in the midst of a file
            raise
        log.error("%s not done: %s", request.path, error)
        raise Refusal(request, 503, request.app[BOT].texts.page_failed) from None


async def front_page(request: web.Request) -> web.Response:
    """Say that the account works here and how to begin; nothing about anybody."""
    config = request.app[BOT].config
    words, glyph = config.texts.page_front, config.texts.page_hello
    return page_response(config, "error", words=words, glyph=glyph)


async def missing_page(request: web.Request) -> web.Response:
    """Answer what leads nowhere."""
    raise Refusal(request, 404)


async def find_linked(request: web.Request) -> Turn:
    """Return the turn of a link; raise Refusal if there is none."""
    bot = request.app[BOT]
    turn = await bot.store.turn_by_link(request.match_info["key"])
    if turn is None:
        raise Refusal(request, 404)
    if time.time() - turn.created_at > bot.config.history.link_hours * 3600:
        raise Refusal(request, 410)
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
    """Let a browser keep a cookie so long; not at all for 0 seconds."""
    age = int(seconds)
    flags = {"path": "/", "secure": True, "httponly": True, "samesite": "Lax"}
    response.set_cookie(name, value, max_age=age, **flags)  # type: ignore[arg-type]


class Reader(NamedTuple):
    """Whose exchanges are shown or added to, and by what right."""

    openid: str
    cookie_hash: str = ""  # of the device that is signed in; '': by a link


async def find_device(request: web.Request) -> Reader | None:
    """Return the reader whose device asks; None if it is not signed in."""
    bot, cookie = request.app[BOT], request.cookies.get(COOKIE, "")
    if not cookie or not bot.config.is_secure:
        return None
    cookie_hash = cookie_hash_of(cookie)
    openid = await bot.store.device_owner(cookie_hash)
    if openid is None or openid in bot.config.limits.deny:
        return None
    return Reader(openid, cookie_hash)


async def find_reader(request: web.Request) -> Reader | None:
    """Return who reads by a history's link, or else by a device, if it is signed in.

    Raise Refusal for a link that does not work.
    """
    key = request.match_info.get("key")
    if key is None:
        return await find_device(request)
    owner = await request.app[BOT].store.history_owner(key)
    if owner is None:
        raise Refusal(request, 404)
    openid, expires_at = owner
    if time.time() > expires_at:
        raise Refusal(request, 410)
    return Reader(openid)


def form_token(bot: Bot, reader: Reader) -> str:
    """Return what proves that a form is ours, and of this device."""
    return bot.store.keyed_hash(f"form {reader.cookie_hash}")


Form = dict[str, str]
FORM_FIELDS = 9


async def read_form(request: web.Request) -> tuple[Reader, Form]:
    """Return who sends a form, and its fields; raise Refusal unless they may.

    A device's cookie alone would not do: a page of somebody else may send it, too.
    """
    bot, reader = request.app[BOT], await find_reader(request)
    if reader is None:
        raise Refusal(request, 401, bot.texts.page_signed_out)
    form: Form = {}
    if request.content_type == "application/x-www-form-urlencoded":
        async with asyncio.timeout(BODY_SECONDS):
            text = (await request.read()).decode("utf-8", "replace")
        with contextlib.suppress(ValueError):  # more fields than any form of ours has
            form = dict(urllib.parse.parse_qsl(text, max_num_fields=FORM_FIELDS))
    if reader.cookie_hash:
        token, given = form_token(bot, reader), form.get("token", "")
        is_ours = hmac.compare_digest(token.encode(), given.encode())
        origin = str(yarl.URL(bot.config.public_url).origin())
        if not is_ours or request.headers.get("Origin") != origin:
            raise Refusal(request, 403, bot.texts.page_failed)
    return reader, form


def by_form(act: Handler) -> Handler:
    """Let a handler have who sends a form, and its fields, once they are read."""

    @functools.wraps(act)
    async def read(request: web.Request) -> web.StreamResponse:
        return await act(request, *await read_form(request))

    return read


def a_few_at_once(make: Handler) -> Handler:
    """Let pages be loaded and rendered a few at once, two of a subscriber.

    They are written elsewhere, while PAGE_BYTES last: who does not read keeps no place.
    The second argument says whose they are by its `openid`.
    """

    @functools.wraps(make)
    async def write(
        request: web.Request, whose: Turn | Reader, *values: object, **named: object
    ) -> web.StreamResponse:
        bot = request.app[BOT]
        subscriber = bot.subscriber(whose.openid)
        async with subscriber.pages:
            async with bot.pages, asyncio.timeout(PAGE_SECONDS):
                response = await make(request, whose, *values, **named)
                size = response.content_length or 0
                if size > bot.page_room:
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

    return write


async def asking_of(
    bot: Bot, device: Reader, typed: str = "", refusal: str = ""
) -> Asking:
    """Return what a page needs to ask for a device's subscriber."""
    session, assistant, opened_at = await bot.newest_session(device.openid)
    recalled = await bot.store.recall("", device.openid, time.time())
    return Asking(
        token=form_token(bot, device),
        form=secrets.token_urlsafe(12),
        assistant=assistant,
        session=session,
        opened_at=opened_at,
        is_told=recalled.is_told,
        typed=typed,
        refusal=refusal,
    )


@a_few_at_once
async def show_answer(request: web.Request, turn: Turn) -> web.Response:
    """Return the page of an answer."""
    bot = request.app[BOT]
    turn = bot.turns.get(turn.id, turn)  # newer than what is stored
    device = await find_device(request)
    is_theirs = device is not None and device.openid == turn.openid
    asking = await asking_of(bot, device) if device and is_theirs else None
    live = (await live_page(bot, turn)).blocks if turn.is_open else None
    if turn.is_open:
        one = exchange_of(bot.config, bot.blocked, turn, live)
    else:  # by now
        await note_read(bot, [turn])
        one = await finished(bot, turn)
    values = {"one": one, "asking": asking}
    return await bot.work.run(page_response, bot.config, "answer", **values)


async def answer_page(request: web.Request) -> web.StreamResponse:
    """Show one question and its answer, live while it is being written."""
    return await show_answer(request, await find_linked(request))


VIEWERS = 50  # who may follow answers of one subscriber at the same time
ALL_VIEWERS = 1000  # who do not read hold 80 KB each; beyond, each subscriber has two
PING_SECONDS = 15.0  # how long a live page's stream may be silent
EVENT_HEADERS = {
    "Content-Type": "text/event-stream; charset=utf-8",
    "X-Accel-Buffering": "no",
}


async def follow(bot: Bot, turn: Turn, last: str) -> AsyncIterator[bytes]:
    """Yield the events of an answer that a viewer lacks, until it ends.

    `last` is the id of the newest event a viewer got, WRITING:DONE: so many of the
    blocks it has were done, and have not changed since.
    """
    writing, _, known = last.partition(":")
    done = int(known) if re.fullmatch("[0-9]{1,9}", known) else 0
    is_queued: bool | None = None  # as the viewer knows
    seen = 0, False  # how much of this writing

    def has_news() -> bool:
        is_told = bool(turn.answer) or is_queued == turn.is_queued
        is_same = writing == turn.writing and seen == turn.extent
        return not (is_told and is_same and bot.tasks.closes_at is None)

    while bot.tasks.closes_at is None:
        page = await live_page(bot, turn)
        is_behind = bool(page.shows[0]) and seen != page.shows
        if writing != page.writing or done > page.done:
            is_behind = is_behind or bool(writing)  # what the viewer has is taken back
            writing, done = page.writing, 0
        seen = page.shows
        if is_behind:
            begin, done = done, page.done
            for event in page.events(begin):
                yield event
        if not turn.answer and is_queued != turn.is_queued:
            is_queued = turn.is_queued
            yield sse_event({"queued": is_queued}, "queued")
        if seen[1]:
            yield sse_event({"state": turn.state}, "done")
            return
        until = bot.tasks.loop.time() + PING_SECONDS
        if not await bot.tasks.until(turn.deltas, has_news, until):
            yield b": ping\n\n"


async def answer_events(request: web.Request) -> web.StreamResponse:
    """Stream an answer as it is written; end with its final state."""
    bot, found = request.app[BOT], await find_linked(request)
    turn = bot.turns.get(found.id) or await bot.store.turn(found.id)  # if it has ended
    if turn is None:  # deleted meanwhile
        raise Refusal(request, 404)
    subscriber = bot.subscriber(turn.openid)
    viewers = sum(one.viewers for one in bot.subscribers.values())
    most = VIEWERS if viewers < ALL_VIEWERS else 2
    if subscriber.viewers >= most:  # their pages look again by themselves
        raise Refusal(request, 503, bot.texts.page_failed)
    response = web.StreamResponse(headers=EVENT_HEADERS)
    subscriber.viewers += 1
    try:
        await response.prepare(request)
        async for event in follow(bot, turn, request.headers.get("Last-Event-ID", "")):
            async with asyncio.timeout(PAGE_SECONDS):
                await response.write(event)
    finally:
        subscriber.viewers -= 1
    return response


def number_in(fields: Mapping[str, str], name: str, missing: int) -> int:
    """Return a number of a query or form, or another if it is missing or made up."""
    value = fields.get(name, "")
    return int(value) if re.fullmatch(r"[0-9]{1,15}", value) else missing


async def let_in(request: web.Request, sign_in: SignIn) -> web.Response:
    """Give a browser whose number was confirmed its cookie."""
    bot = request.app[BOT]
    cookie, response = await bot.let_in(sign_in), redirect("me")
    if cookie == "":
        raise Refusal(request, 403, bot.texts.page_devices_full)
    if cookie:
        set_cookie(response, COOKIE, cookie, bot.config.history.device_days * 86400)
        set_cookie(response, WAIT_COOKIE, "", 0)
    return response


async def sign_in_page(request: web.Request) -> web.Response:
    """Show the number that signs a browser in, or let it in once that was confirmed.

    Who only opens a link becomes nobody by that: the number is sent to the account.
    """
    bot, cookie = request.app[BOT], request.cookies.get(WAIT_COOKIE, "")
    if not bot.config.is_secure:
        raise Refusal(request, 404, bot.texts.page_not_secure)
    sign_in, fresh = bot.sign_ins.find(cookie_hash_of(cookie)), ""
    if sign_in and sign_in.is_confirmed:
        try:
            return await let_in(request, sign_in)
        except sqlite3.Error as error:  # it asks again in a moment
            log.error("a browser was not signed in: %s", error)
    if not sign_in and (not cookie or "new" in request.query):
        fresh = secrets.token_urlsafe(32)
        sign_in = bot.sign_ins.begin(cookie_hash_of(fresh))
    number = sign_in.number if sign_in else ""
    response = page_response(bot.config, "sign_in", number=number)
    if fresh:
        set_cookie(response, WAIT_COOKIE, fresh, SIGN_IN_SECONDS)
    return response


@a_few_at_once
async def show_history(
    request: web.Request, reader: Reader, typed: str = "", refusal: str = ""
) -> web.Response:
    """Return a page of a reader's history, or one exchange of it.

    On a device there is a field to ask, with what was `typed` there and refused.
    """
    bot, query, openid = request.app[BOT], request.query, reader.openid
    if (only := number_in(query, "only", -1)) >= 0:
        turns = await bot.store.turns_of(openid, only + 1, 1)
        turns = [turn for turn in turns if turn.id == only]
    else:
        below = number_in(query, "before", 2**62)
        turns = await bot.store.turns_of(openid, below, HISTORY_COUNT + 1)
    chars, older = sum(len(turn.question + turn.answer) for turn in turns), 0
    if len(turns) > HISTORY_COUNT or len(turns) > 1 and chars > PAGE_CHARS:
        turns.pop()
        older = turns[-1].id
    turns = [bot.turns.get(turn.id, turn) for turn in turns]
    live = {t.id: (await live_page(bot, t)).blocks for t in turns if t.is_open}
    shown = turns if only >= 0 else open_turns(turns)
    await note_read(bot, shown)
    asking = None
    if reader.cookie_hash:
        asking = await asking_of(bot, reader, typed, refusal)
        if query:  # what has just begun stands on the first page
            asking = replace(asking, session=0)
    exchanges = await bot.work.run(
        lambda: [
            exchange_of(
                bot.config, bot.blocked, turn, live.get(turn.id), 3, turn not in shown
            )
            for turn in turns
        ]
    )
    return await bot.work.run(
        page_response,
        bot.config,
        "history",
        409 if refusal else 200,
        home=request.match_info.get("key") or f"{bot.config.root}/me",
        exchanges=exchanges,
        older=older,
        is_whole=only < 0,
        asking=asking,
        blocked=bot.blocked,
    )


async def history_page(request: web.Request) -> web.StreamResponse:
    """Show a history by its link, or by a device, with a field to ask."""
    reader = await find_reader(request)
    if reader is None:
        return await sign_in_page(request)
    return await show_history(request, reader)


def led_back(request: web.Request, **values: str) -> web.Response:
    """Return what was done to the script, or lead the browser back."""
    return web.json_response(values) if wants_json(request) else redirect("../me")


@by_form
async def ask_on_page(
    request: web.Request, device: Reader, form: Form
) -> web.StreamResponse:
    """Take up a question; a refused one stays in its field."""
    bot, form_id = request.app[BOT], form.get("id", "")
    text = stream_safe(ILLEGAL.sub("", form.get("question", ""))).strip()
    if not text or not re.fullmatch(r"[A-Za-z0-9_-]{8,64}", form_id):
        return led_back(request)
    source = await bot.ask_here(*device, form_id, text)
    if isinstance(source, tuple):
        turn = source[0]
        return led_back(request, key=turn.link_key, session=str(turn.session_id))
    if wants_json(request):
        raise Refusal(request, 409, source)
    return await show_history(request, device, text, source)


@by_form
async def stop_answer(request: web.Request, device: Reader, form: Form) -> web.Response:
    """End an answer that is being written for a device's subscriber."""
    request.app[BOT].stop_turn(device.openid, form.get("key", ""))
    return led_back(request)


@by_form
async def begin_topic(request: web.Request, device: Reader, form: Form) -> web.Response:
    """Open a new session, with another assistant if one is named."""
    await request.app[BOT].begin_topic(*device, form.get("assistant", ""))
    return led_back(request)


@by_form
async def leave(request: web.Request, device: Reader, _: Form) -> web.Response:
    """Sign this device out."""
    await request.app[BOT].store.sign_out(*device)
    response = led_back(request)
    set_cookie(response, COOKIE, "", 0)
    return response


@by_form
@a_few_at_once
async def search_page(request: web.Request, reader: Reader, form: Form) -> web.Response:
    """Show where in all of a subscriber's exchanges the words of a form are.

    Without words lead to the history.
    """
    bot, home = request.app[BOT], "../" + request.match_info.get("key", "me")
    words = form.get("words", "")[:SEARCH_CHARS].replace("\0", "").split()
    words = list(dict.fromkeys(words))[:SEARCH_WORDS]
    if not words:
        return redirect(home)
    before, token = number_in(form, "before", 2**62), form.get("token", "")
    turns, older = await bot.store.search(reader.openid, words, before, FOUND_COUNT)
    return await bot.work.run(
        page_response,
        bot.config,
        "found",
        home=home,
        token=token,
        words=words,
        turns=turns,
        older=older,
        blocked=bot.blocked,
    )


@by_form
async def export(request: web.Request, reader: Reader, _: Form) -> web.StreamResponse:
    """Send all of a subscriber's exchanges as a Markdown file, a few at a time."""
    bot = request.app[BOT]
    last, session, day = 0, 0, clock(time.time(), "%Y-%m-%d")
    name = urllib.parse.quote(f"{bot.texts.page_history}-{day}.md")
    response = web.StreamResponse()
    response.content_type, response.charset = "text/markdown", "utf-8"
    response.headers["Content-Disposition"] = f"attachment; filename*=UTF-8''{name}"
    host = yarl.URL(bot.config.public_url).host
    head = render(bot.config, "export.md", turn=None, host=host)
    subscriber = bot.subscriber(reader.openid)
    async with subscriber.pages, bot.exports, asyncio.timeout(PAGE_SECONDS):
        await response.prepare(request)
        await response.write(head.encode())
        while turns := await bot.store.turns_after(reader.openid, last):
            for turn in turns:
                values = {"turn": turn, "is_first": turn.session_id != session}
                text = await bot.work.run(render, bot.config, "export.md", **values)
                await response.write(text.encode())
                last, session = turn.id, turn.session_id
    return response


async def form_page(request: web.Request) -> web.Response:
    """Lead whoever opens a form's address as a page, or reloads it, to the form."""
    return redirect("../" + request.match_info.get("key", "me"))


async def health(request: web.Request) -> web.Response:
    """Say whether the database answers; to `check`, which signs, what came lately."""
    bot, query = request.app[BOT], request.query
    try:
        await bot.store.rows("SELECT 1")
    except sqlite3.Error as error:
        return web.json_response({"status": str(error)}, status=503)
    found: dict[str, object] = {"status": "ok"}
    is_check = "signature" in query and is_from_wechat(request, "signature")
    if is_check and bot.replays.is_first(query["signature"], "healthz"):
        now, heard = bot.tasks.loop.time(), bot.heard_at
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
    """Say whether aiohttp logs more than that a stranger sent what is not HTTP."""
    error = record.exc_info[1] if record.exc_info else None
    not_http = (aiohttp.http_exceptions.HttpProcessingError, web.RequestPayloadError)
    return not isinstance(error, not_http)


ROOT_FILE_BYTES = 4096  # far more than the platform's MP_verify_….txt have


def open_quickly(path: str, flags: int) -> int:
    """Open a file, but follow no link out of its folder and wait for no pipe."""
    return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK)


async def root_file(request: web.Request) -> web.Response:
    """Send a small text file of the owner's, which proves that the domain is theirs."""
    folder = request.app[BOT].config.server.root_files
    path = pathlib.Path(folder, request.match_info["name"])
    with contextlib.suppress(OSError), open(path, "rb", opener=open_quickly) as file:
        is_file = stat.S_ISREG(os.fstat(file.fileno()).st_mode)
        body = file.read(ROOT_FILE_BYTES + 1)
        if folder and is_file and len(body) <= ROOT_FILE_BYTES:
            return web.Response(body=body, content_type="text/plain")
    raise Refusal(request, 404)


PRIVATE = {
    "Cache-Control": "no-store",
    "Referrer-Policy": "no-referrer",
    "X-Robots-Tag": "noindex",
    "X-Content-Type-Options": "nosniff",
}


async def set_headers(request: web.Request, response: web.StreamResponse) -> None:
    """Keep private what is sent, and hide the versions of Python and aiohttp."""
    for name, value in PRIVATE.items():
        response.headers.setdefault(name, value)  # a page with a form has its own
    response.headers["Server"] = "wxgpt"


# ---------------------------------------------------------------------------
# 13. Application
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
    app = web.Application(client_max_size=BODY_BYTES, middlewares=[refuse_kindly])
    app[BOT] = bot
    path = bot.config.server.path.rstrip("/")
    routes = [
        web.get(path + "{slash:/?}", verify_url),
        web.post(path + "{slash:/?}", receive_message),
        web.get("/a/{key}", answer_page),
        web.get("/a/{key}/events", answer_events, allow_head=False),
        web.get("/h/{key}", history_page),
        web.get("/me", history_page),
        web.post("/me/ask", ask_on_page),
        web.post("/me/stop", stop_answer),
        web.post("/me/new", begin_topic),
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
    until = loop.time() + LINGER_SECONDS  # they may be without end
    with contextlib.suppress(OSError):  # none is left
        while loop.time() < until:
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
        loop = bot.tasks.loop
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
        stack.callback(lambda: bot.end_waits(loop.time() + grace))
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
# Without a command the server runs. The other commands are in owner/ and are imported
# only when they are called: `check` tests what usually goes wrong, `stats` shows who
# asked how much, and with `demo` an owner can play the subscriber.
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


def serve_command(config: Config, path: str) -> int:
    """Run the server; return the exit status."""
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


def demo_command(arguments: list[str]) -> int:
    """Replace this process by owner/demo.py, where Ctrl-C is still blocked at first.

    Returns the exit status only if that file is missing.
    """
    demo = pathlib.Path(__file__).with_name("owner") / "demo.py"
    for needed in (demo, demo.parents[1] / "tests" / "sim" / "child.py"):
        if not needed.exists():
            print_error(OwnerError("{path}: not found", path=needed))
            return 1
    os.execv(sys.executable, [sys.executable, str(demo), *arguments])


LANGUAGE = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
LANGUAGE.add_argument("--lang", choices=("zh", "en"), help=argparse.SUPPRESS)


class Parser(argparse.ArgumentParser):
    """A command line's parser, which speaks the owner's language."""

    def __init__(self, **options: Any) -> None:
        # argparse's own words, and the description that its commands have not
        argparse._ = lambda text: text and tell(text)  # type: ignore[attr-defined]
        super().__init__(**options)

    def format_help(self) -> str:
        """Return the help; argparse writes the colon of a heading itself."""
        colon = tell(": ").rstrip()
        return re.sub(r"(?m)^(\S+):(?=\S*$)", rf"\1{colon}", super().format_help())


COMMAND_HELP = {
    "serve": "serve (the default)",
    "check": "test each thing that usually goes wrong, and say how to mend it",
    "stats": "who asked how much",
    "logs": "follow the service's log",
    "update": "bring a newer version, or this one again if it does not start",
    "backup": "copy the database",
    "setup": "from nothing to a served account",
    "demo": "try it all with no account and no key",
}
COMMAND_WORDS = (*COMMAND_HELP, "--version", "-h", "--help")


def make_parser() -> Parser:
    """Return the command line's parser."""
    common = Parser(add_help=False)
    text = tell("settings (the service's, else wxgpt.toml)")
    common.add_argument("--config", metavar="FILE", help=text)
    parser = Parser(
        parents=[common],
        prog="wxgpt.py",
        usage="wxgpt.py [COMMAND] [--config FILE] [--lang en] [-h] [--version]",
        description=tell("Subscribers of a WeChat Official Account talk with a model."),
    )
    version, text = f"wxgpt {VERSION}", tell("show program's version number and exit")
    parser.add_argument("--version", action="version", version=version, help=text)
    text = tell("zh: Chinese (the default), en: English")  # LANGUAGE has taken it
    parser.add_argument("--lang", metavar="zh|en", help=text)
    commands = parser.add_subparsers(
        title=tell("commands"), dest="command", metavar="COMMAND", prog="wxgpt.py"
    )
    add = {}
    for name, words in COMMAND_HELP.items():
        parents = [] if name in ("setup", "demo") else [common]
        one = commands.add_parser(name, parents=parents, help=tell(words))
        add[name] = one.add_argument
    text = tell("Beijing days, today included (7); 0: all")
    add["stats"]("--days", type=int, default=7, metavar="N", help=text)
    text = tell("all subscribers, with whole openids")
    add["stats"]("--full", action="store_true", help=text)
    add["stats"]("--json", action="store_true", help=tell("for machines"))
    text = tell("older lines (50)")
    add["logs"]("-n", dest="lines", type=int, default=50, help=text)
    text = tell("the new version (.tar.gz or .zip); without one: git pull")
    add["update"]("archive", nargs="?", default="", metavar="ARCHIVE", help=text)
    text = tell("new file; without one it is named by the time")
    add["backup"]("file", nargs="?", default="", metavar="FILE", help=text)
    return parser


def check_placeholders(config: Config, mistakes: Mistakes) -> None:
    """Note what still is as in the example.

    The address alone is no mistake: in a trial the name may lead here.
    """
    others = len(mistakes.lines)
    expected = "one of your own: everybody knows this one"
    is_own = config.wechat.token != EXAMPLE_TOKEN
    mistakes.require(is_own, "wechat.token", EXAMPLE_TOKEN, expected)
    for name, one in config.assistants.items():
        is_own, where = one.api_key not in EXAMPLE_KEYS, f"assistants.{name}.api_key"
        mistakes.require(is_own, where, one.api_key, "the key your provider gave you")
    if len(mistakes.lines) > others:
        is_own = config.public_url != EXAMPLE_URL
        expected = "the address of this machine"
        mistakes.require(is_own, "public_url", EXAMPLE_URL, expected)


def read_settings(path: str, environ: Mapping[str, str]) -> Config:
    """Return the settings to serve with; raise ConfigError."""
    return load_config(path, environ, check_commands, check_placeholders)


def run_command(words: list[str]) -> int:
    """Run a command line, `serve` if it names no command; return the exit status."""
    # owner/ imports `wxgpt`: it is to find this module, not to load it a second time.
    sys.modules.setdefault("wxgpt", sys.modules[__name__])
    if words[:1] == ["setup"]:
        from owner.setup import setup_command

        return setup_command(words[1:])
    if not words or words[0] not in COMMAND_WORDS:
        words = ["serve", *words]
    arguments = make_parser().parse_args(words)
    if arguments.command == "serve":
        path = arguments.config or "wxgpt.toml"
        return serve_command(read_settings(path, os.environ), path)
    from owner.service import owner_command

    return owner_command(arguments)


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
    options, words = LANGUAGE.parse_known_args()
    os.environ.update({"WXGPT_LANG": options.lang} if options.lang else {})
    if words[:1] == ["demo"]:
        return demo_command(words[1:])
    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
        try:
            return run_command(words)
        finally:
            print(end="", flush=True)  # raises BrokenPipeError here, not at the exit
    except ConfigError as error:
        print_error(error)
        return 2
    except ModuleNotFoundError as error:  # wxgpt.py was copied without owner/
        line = "the program is not whole ({why}): get it anew"
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
