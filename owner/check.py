"""`wxgpt.py check`: test everything that usually goes wrong, and say how to fix it.

It prints one finding after the other, from the settings to a model's answer and the way
in from outside, in the owner's language. It creates nothing, not even the database.
"""

import asyncio
import contextlib
import email.utils
import errno
import ipaddress
import logging
import os
import pathlib
import re
import secrets
import shutil
import socket
import sqlite3
import ssl
import sys
import tempfile
import time
import types
import typing
import urllib.parse
from dataclasses import replace

import aiohttp

from owner.layout import COLUMNS, width_of, wrap
from owner.service import find_others
from owner.words import tell
from wxgpt import (
    CHECK_AGENT,
    CHECK_BYTES,
    PROBE_PATH,
    SCHEMA,
    AssistantSettings,
    ChatClient,
    ChatError,
    Config,
    DatabaseSettings,
    Ending,
    ListenError,
    find_risks,
    listen,
    load_pages,
    log,
    make_blocked,
    make_cipher,
    open_chat,
    open_server,
    setting_source,
    signature_of,
)

MARKS = {"ok": ("✓", "32"), "warn": ("!", "33"), "fail": ("✗", "31")}
DISK_BYTES = 200 * 1024 * 1024  # free; below it the owner should make room
FULL_BYTES = 10 * 1024 * 1024  # below it answers fail now, or within the hour
REACH_SECONDS = 10.0  # for what answers soon, if at all
BY_SETUP = "WXGPT_SETUP"  # in the environment of the check that ends a setup
SILENT_SECONDS = 5.0  # then it is said what is waited for, and again as often
MALFORMED = "database disk image is malformed"  # as SQLite says it
NEWER = "it is of version {version}, this wxgpt knows up to {known}"
CLOCK_SECONDS = 60  # a tenth of what a push's timestamp may be off
CERTIFICATE_DAYS = 14  # automatic renewal takes place long before
PUSH = (
    b" " * 4096
)  # as long as WeChat's longest in safe mode; wxgpt reads no more of it
PROBE_SECONDS = 0.3  # PROBE_PATH sends two events half a second apart
WORDS_CHARS = 100  # of a provider's message are shown
FINISH = "finish_reason "  # an error's detail, before the provider's word
ONE_WORD = [{"role": "user", "content": "请只回答一个字：好"}]
THOUGHT_TOKENS = 30  # more than one word takes, even spelled out with a tag or two
UNREACHED = "this machine may not reach itself from outside: try a phone"
NO_NAME = (
    "add the name at your domain's DNS, with this machine's address; or is it a typo?"
)
REFUSED = (
    "nothing listens on port {port}: is the proxy running (`systemctl status nginx`), "
    "and does it listen there?"
)
EXAMPLE_NAME = r"(^|\.)example\.(com|net|org)$"
CONSOLE = """
Type into 微信开发者平台,
https://developers.weixin.qq.com/console/product/mp/{app_id}
(我的业务 → 公众号 → 基础信息 → 域名与消息推送配置 → 消息推送):
  URL               {url}
  Token             {token}
  EncodingAESKey    {aes_key}
  消息加解密方式    {mode}
  数据格式          XML
Submit; when it is verified, press 启用: a step of its own. From then on the
console's auto replies and menus stop, by WeChat's rule; [replies] can stand in
for auto replies. A personal account has no customer service messages, menu
interface, materials or nicknames: wxgpt needs none."""
# What the running service refused at its door, by words of its log: what that means.
DOOR = (
    (
        "stale push",
        "a push was refused for its time",
        "is the clock right? timedatectl set-ntp true",
    ),
    (
        "encrypted, but app_id",
        "the console is in 安全模式, the settings are not",
        "set wechat.app_id and aes_key to the console's, or choose 明文模式 there",
    ),
    (
        "not rightly encrypted",
        "the settings are for 安全模式, the console is not",
        "choose 安全模式 there, or take wechat.app_id and aes_key out",
    ),
    (
        "aes_key right",
        "a push cannot be decrypted",
        "wechat.aes_key must be the console's EncodingAESKey",
    ),
    (
        "another AppID",
        "a push is encrypted for another AppID",
        "wechat.app_id must be the AppID that the console shows",
    ),
    (
        "wrong signature",
        "a message or a test of the console came with a wrong signature",
        "the Token in the console must be wechat.token; or it was a stranger: "
        "send the account a message, and check again",
    ),
)

# How an assistant is kept from thinking, by its base URL and model; the first counts.
DISABLED = 'extra.thinking.type = "disabled"'
BRIEFLY = 'extra.reasoning_effort = "low"'  # for models that always think
SWITCHES = (
    (r"moonshot\.\S+ kimi-k3|minimaxi?\.\S+ MiniMax-M3\.1", BRIEFLY),
    (r"(bigmodel\.cn|z\.ai)\S* glm-(4|5(?!\.[3-9]))", DISABLED),
    (r"bigmodel\.cn|z\.ai|generativelanguage\.googleapis\.com", BRIEFLY),
    (
        r"api\.openai\.com|\.azure\.com|api\.mistral\.ai|:11434\b",
        'extra.reasoning_effort = "none"',
    ),
    (r"deepseek\.com|moonshot\.|volces\.com|minimaxi?\.", DISABLED),
    (r"dashscope|siliconflow\.", "extra.enable_thinking = false"),
    # vLLM and llama.cpp
    (r":8000\b", "extra.chat_template_kwargs.enable_thinking = false"),
)

# The faults of a certificate, by OpenSSL's X509_V_ERR_… (9: not valid yet, 64: of an IP)
FAULTS = {9: "expired", 10: "expired", 20: "issuer", 62: "mismatch", 64: "mismatch"}
# What a provider says when it refuses the key for want of money.
MONEY = (
    r"^402|quota|balance|arrear|overdue|credits?\b|fund|budget|\b1113\b"
    r"|(spend\w*|usage)[ _]limit|[余额]|欠费|充值|资源包|套餐"
)
BALANCE = "balance: {detail} → top up the account, or raise its limit"
CONNECTION = (
    "connection: {host}: {detail} → look at {way}; "
    "where the provider is blocked, set {proxy}"
)
KEY = "key: {host} refuses it: {detail} → look at {api_key}: is it a key of {url}?"
NO_API = (
    "URL: no chat API at {url}: {detail} → look at {way}: "
    "it ends with the version, as in https://api.openai.com/v1"
)
TLS = "TLS: {host}: {detail} → "
OTHER = "request: {host} refuses it: {detail} → look at {extra}"
# Why a question to a model failed, and how to fix it, by the signs of its error. The
# first word names the step that failed.
TROUBLES: dict[object, str] = {
    # The type of the cause, or a type it derives from
    aiohttp.ClientConnectorDNSError: (
        "name: {host} does not resolve → look at {way}, and at the DNS here"
    ),
    aiohttp.ClientConnectorCertificateError: TLS
    + "apt install ca-certificates; for an authority of your own set SSL_CERT_FILE",
    aiohttp.ClientSSLError: TLS + "look at {way}: http://, or another port?",
    aiohttp.ClientHttpProxyError: (
        "proxy: it does not lead to {host}: {detail} → look at the proxy's log and rules"
    ),
    aiohttp.ClientProxyConnectionError: (
        "proxy: {host}: {detail} → is it running? Look at {way}"
    ),
    aiohttp.ClientOSError: CONNECTION,
    aiohttp.ServerDisconnectedError: (
        "connection: {host} hangs up without an answer → "
        "look at {url}: https://, or another port?"
    ),
    ValueError: NO_API,  # not JSON, or aiohttp.InvalidURL
    RecursionError: NO_API,  # JSON nested too deeply
    # The fault of a certificate
    "expired": TLS + "is the date here right? Then its owner must renew it",
    "mismatch": TLS + "look at the host in {way}",
    # The words, or the setting that they are about
    "balance": BALANCE,
    "api_key": KEY,
    "base_url": NO_API,
    "extra": OTHER,
    "proxy": (
        "country: {detail} → the provider does not serve this machine: set {proxy}"
    ),
    "model": "model: {host} does not know {name}: {detail} → look at {model}",
    # The status
    200: "answer: {detail} → try again later",
    407: (
        "proxy: it wants a user and a password → "
        'write {proxy} = "http://USER:PASSWORD@HOST:PORT"'
    ),
    429: "limit: {detail} → wait, or raise the key's rate limit",
    # The kind
    "unreachable": CONNECTION,
    "busy": "provider: {host} fails: {detail} → try again later",
    "slow": "time: no word within {seconds:.0f} s → {switch}",
    "silent": (
        "connection: {host} takes the question and sends no byte → is it blocked here? "
        "Set {proxy}, or look at {way}"
    ),
    "broken": (
        "stream: {detail} → is there a chat API at {url}? Or does a gateway cut streams?"
    ),
}
# How to fix the public certificate, by its fault.
CERTIFICATE_FIXES = {
    "expired": "renew it, and load it into the proxy",
    "issuer": "the proxy must send the full chain (fullchain.pem)",
    "mismatch": "it must be for the host of public_url",
    "": "WeChat takes only one of a public authority, as Let's Encrypt's",
}
# How to fix that something other than wxgpt answers, by the status.
PROXY_FIXES = (
    (r"3..", "give public_url as the address that answers by itself"),
    (r"50[234]|52.", "is wxgpt running, on the port that the proxy names?"),
    (r"401", "the proxy wants a password, which WeChat has not: ask for none here"),
    (
        r"403",
        "has the running wxgpt the same token? Restart it after a change; "
        "or does a firewall or CDN refuse requests? Let WeChat's pass",
    ),
    (r"413", "the proxy must take bodies of 64 KB: client_max_body_size 64k;"),
    (r"429", "the proxy limits the rate: let WeChat's requests pass"),
    (
        r"",
        "the proxy must pass /a/, /h/, /healthz and server.path to wxgpt unchanged, "
        "for this name (server_name)",
    ),
)


def proxy_fix(status: int) -> str:
    """Return how to fix that a response with this status is not wxgpt's."""
    return next(fix for code, fix in PROXY_FIXES if re.match(code, str(status)))


def reason_of(error: BaseException) -> str:
    """Return why a connection failed, in a few words of the owner's language."""
    inner = getattr(error, "certificate_error", getattr(error, "os_error", error))
    if isinstance(inner, ssl.SSLCertVerificationError):
        return tell(inner.verify_message.partition(",")[0])
    if isinstance(inner, ssl.SSLError):
        return tell("it speaks no TLS there ({reason})", reason=inner.reason)
    if isinstance(inner, socket.gaierror):
        return tell("the name does not resolve")
    if isinstance(inner, TimeoutError):
        return tell("no answer in time")
    if isinstance(inner, ValueError):
        return tell("InvalidURL")
    if isinstance(inner, OSError) and inner.errno:
        return tell(os.strerror(inner.errno))
    if isinstance(inner, aiohttp.ClientHttpProxyError):
        return tell("status {status}", status=inner.status)
    return str(inner) or type(inner).__name__


def switch_of(settings: AssistantSettings) -> str:
    """Return how to get the first word of an assistant sooner."""
    for pattern, switch in SWITCHES:
        if re.search(pattern, f"{settings.base_url} {settings.model}"):
            how = "switch thinking off: {switch}; or take a faster model"
            if switch == BRIEFLY:
                how = "keep thinking short: {switch}; or take a faster model"
            return tell(how, switch=switch)
    return tell(
        "switch thinking off with `extra` (docs/models.md), or take a faster model"
    )


def fault_of(error: BaseException) -> str:
    """Return what is wrong with a certificate, "" if that is unusual."""
    return FAULTS.get(getattr(error, "verify_code", 0), "")


def signs_of(error: ChatError, words: str) -> typing.Iterator[object]:
    """Yield all keys that TROUBLES may have for an error, the most telling first."""
    cause = error.__cause__
    if isinstance(cause, aiohttp.ClientConnectorCertificateError):
        yield fault_of(cause.certificate_error)
    if isinstance(cause, aiohttp.ClientHttpProxyError) and cause.status == 407:
        yield cause.status
    yield from type(cause).__mro__
    said = f"{error.status} {error.code} {words}"
    if error.setting == "api_key" and re.search(MONEY, said, re.IGNORECASE):
        yield "balance"
    yield error.setting
    yield error.status
    yield error.kind


def is_private(host: str) -> bool:
    """Say whether a host is certainly not reachable from the internet."""
    with contextlib.suppress(ValueError):
        return not ipaddress.ip_address(host).is_global
    return host == "localhost" or "." not in host


def reach_fix(error: BaseException, port: int) -> tuple[str, str]:
    """Return how bad it is that our own address is not reached, and how to fix it."""
    inner = getattr(error, "os_error", error)
    if isinstance(inner, socket.gaierror | ValueError):
        return "fail", tell(NO_NAME)
    if getattr(inner, "errno", 0) == errno.ECONNREFUSED:
        return "fail", tell(REFUSED, port=port)
    return "warn", tell(UNREACHED)


def serving_user(port: int) -> int:
    """Return the id of the user who listens on a port; -1 if nobody, or not known."""
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        with contextlib.suppress(OSError):
            for line in pathlib.Path(table).read_text().splitlines()[1:]:
                _, address, _, state, _, _, _, user, *_ = line.split()
                if state == "0A" and int(address.rpartition(":")[2], 16) == port:
                    return int(user)
    return -1


UNSTEADY = "failed", "activating", "reloading"  # states of a unit that does not start


class Doctor:
    """Prints one finding after the other, and counts them by grade."""

    def __init__(
        self,
        config: Config,
        environ: typing.Mapping[str, str],
        unit: typing.Mapping[str, str] = types.MappingProxyType({}),
    ) -> None:
        self.config = config
        self.environ = environ
        self.unit = unit  # what systemd says of the service; empty: there is none
        self.counts = dict.fromkeys(MARKS, 0)
        self.server_user = -1  # the id of the user under whom wxgpt serves, if it does
        self.is_colourful = sys.stdout.isatty()
        self.doing = ""  # what may take long
        self.spoke_at = time.monotonic()

    def report(
        self, grade: str, what: str, found: str, fix: str = "", /, **values: object
    ) -> None:
        """Print a finding, graded ok, warn or fail, and how to fix it.

        The three texts are in English; each is translated, then gets the values.
        """
        self.counts[grade] += 1
        self.spoke_at = time.monotonic()
        what, found, fix = (tell(t, **values) for t in (what, found, fix))
        mark, colour = MARKS[grade]
        told = what + tell(": ") + found
        line = told + (f" → {fix}" if fix else "")
        if fix and width_of(line) > COLUMNS - 2:  # what to do has a line of its own
            line = wrap(told, first=f"{mark} ") + "\n"
            line += wrap(f"→ {fix}", "    ", "  ")
        else:
            line = wrap(line, first=f"{mark} ")
        if self.is_colourful:
            line = f"\033[{colour}m{mark}\033[0m" + line.removeprefix(mark)
        print(line, flush=True)

    @contextlib.asynccontextmanager
    async def talking(self) -> typing.AsyncIterator[None]:
        """Say inside the block what is waited for."""
        task = asyncio.create_task(self.keep_talking())
        try:
            yield
        finally:
            task.cancel()

    async def keep_talking(self) -> None:
        """Say what is waited for whenever nothing was said for a while."""
        while True:
            silent = time.monotonic() - self.spoke_at
            if silent < SILENT_SECONDS:
                await asyncio.sleep(SILENT_SECONDS - silent)
                continue
            self.spoke_at = time.monotonic()
            print(
                wrap("… " + tell("still waiting: {doing}", doing=self.doing)),
                flush=True,
            )

    def check_risks(self, path: str) -> None:
        """Warn of what lets others in; the server's log says the same at its start."""
        for place, found, fix in find_risks(self.config, path, self.server_user):
            # The path is no part of the texts that have a translation.
            found, fix = (text.replace(path, "{path}") for text in (found, fix))
            self.report("warn", place, found, fix, path=path)

    def check_settings(self, path: str) -> None:
        """Report which file counts, and which others may be taken for it."""
        names = ", ".join(self.config.assistants)
        self.report(
            "ok", "settings", "{path}, assistants {names}", path=path, names=names
        )
        others = find_others(path, self.config.database.path)
        for used, other in others if self.unit else ():
            fix = "delete it, so that you never edit or read the wrong one"
            self.report(
                "warn",
                "second file",
                "{other} is not used, {used} is",
                fix,
                other=other,
                used=used,
            )

    def check_database(self) -> None:
        """Check that the database can be written, and the disk has room."""
        path = pathlib.Path(self.config.database.path)
        folder = path.parent
        known = SCHEMA.read_text("utf-8").count("\n-- step ")
        try:
            if path.exists():
                with contextlib.closing(sqlite3.connect(path, timeout=2)) as db:
                    db.execute("BEGIN IMMEDIATE").execute("ROLLBACK")
                    [(version,)] = db.execute("PRAGMA user_version")
                    if path.stat().st_size <= CHECK_BYTES:
                        [(words,)] = db.execute("PRAGMA quick_check(1)")
                        if words != "ok":
                            raise sqlite3.DatabaseError(MALFORMED)
                if version > known:
                    values = {"version": version, "known": known}
                    return self.report(
                        "fail", "database", NEWER, "wxgpt update", **values
                    )
                found = "{path}, {size:.1f} MB, {free:.1f} GB free"
            else:
                with tempfile.TemporaryFile(dir=folder):
                    found = (
                        "{path} will be created at the first start, {free:.1f} GB free"
                    )
            size = path.stat().st_size if path.exists() else 0
            free = shutil.disk_usage(folder).free
        except (OSError, sqlite3.Error) as error:
            fix = "run check as the service's user; database.path must be writable"
            if not folder.exists():
                fix = "make that folder, or change database.path"
            elif re.search("malformed|not a database", str(error)):
                fix = "put a backup in its place; or move it away, to start afresh"
            elif "locked" in str(error):
                fix = "another program is writing to it: end that"
            elif "full" in str(error) or getattr(error, "errno", 0) == errno.ENOSPC:
                fix = "make room: `df -h` shows which disk is full"
            words = tell(getattr(error, "strerror", None) or str(error))
            self.report(
                "fail", "database", "{path}: {words}", fix, path=path, words=words
            )
            return
        grade, fix = "ok", ""
        if free < DISK_BYTES:
            grade = "fail" if free < FULL_BYTES else "warn"
            fix = "make room: `df -h` shows which disk is full"
        self.report(
            grade, "database", found, fix, path=path, size=size / 1e6, free=free / 1e9
        )

    async def check_port(self, http: aiohttp.ClientSession) -> bool | None:
        """Check who holds the port; say whether it is free, None if others have it."""
        host, port = self.config.server.host, self.config.server.port
        near = "127.0.0.1" if host in ("0.0.0.0", "::") else host
        near = f"[{near}]" if ":" in near else near
        self.doing = tell("port {port}", port=port)
        try:
            health = f"http://{near}:{port}/healthz"
            async with http.get(health, params=self.signed()) as response:
                if response.headers.get("Server") == "wxgpt":
                    self.report(
                        "ok", "port", "{port}, wxgpt is serving on it", port=port
                    )
                    self.server_user = serving_user(port)
                    self.report_door(await response.json())
                    return False
            fix = (
                "another program holds it (`ss -ltnp`): end that, or change server.port"
            )
            found = "{port} answers, but not as wxgpt"
            self.report("fail", "port", found, fix, port=port)
        except (aiohttp.ClientError, OSError, ValueError):
            try:
                listen(host, port).close()
                self.report_stopped(port)
                return True
            except ListenError as error:
                if self.unit.get("ActiveState") in UNSTEADY:  # systemd holds the socket
                    self.report_stopped(port)
                    return None
                fix = (
                    "end what holds it (`ss -ltnp`), "
                    "or change server.host or server.port"
                )
                found = "cannot listen on port {port}: {why}"
                [(_, values)] = error.lines
                why = values["why"]
                self.report("fail", "port", found, fix, port=port, why=why)
        return None

    def report_stopped(self, port: int) -> None:
        """Report that wxgpt does not run: nobody gets an answer."""
        found, grade = "{port} is free: wxgpt is not running", "fail"
        fix = "systemctl start wxgpt"
        state = self.unit.get("ActiveState", "")
        if not state:
            grade, fix = "warn", "start it; until then check answers in its place"
        elif state in UNSTEADY:
            found = "nobody answers at {port}: the service does not start"
            fix = "journalctl -u wxgpt -n 20 says why; then systemctl restart wxgpt"
        self.report(grade, "port", found, fix, port=port)

    def signed(self) -> dict[str, str]:
        """Return a query that is signed as WeChat signs."""
        stamp, nonce = str(int(time.time())), secrets.token_hex(4)
        right = signature_of(self.config.wechat.token, stamp, nonce)
        return {"signature": right, "timestamp": stamp, "nonce": nonce}

    def report_door(self, health: dict[str, typing.Any]) -> None:
        """Report what the running service last heard from WeChat, and refused."""
        if "warned" not in health:
            fix = "restart it after a change of the settings"
            if self.unit:  # not in a container
                fix += ": systemctl restart wxgpt"
            found = "the running wxgpt has another token, or is of another version"
            self.report("fail", "pushes", found, fix)
            return
        heard = health["heard"]
        newer = [
            words
            for age, words in sorted(health["warned"])
            if heard is None or age < heard
        ]
        for sign, found, fix in DOOR:
            if any(sign in words for words in newer):
                # A wrong signature may be a stranger's, if others were right.
                is_sure = heard is None or sign != "wrong signature"
                self.report("fail" if is_sure else "warn", "pushes", found, fix)
                return
        if heard is None:
            found = "none since the start of the service"
            fix = "send the account a message, and check again"
            self.report("warn", "pushes", found, fix)
        else:
            found = "the newest came {minutes:.0f} minutes ago and was read"
            self.report("ok", "pushes", found, minutes=heard / 60)

    async def check_clock(self, clients: typing.Iterable[ChatClient]) -> None:
        """Compare our clock with the first provider's that says what time it is."""
        fix = "compare `date -u` with a clock that is right"
        for client in clients:
            url, proxy = client.settings.base_url.strip(), client.settings.proxy or None
            self.doing = tell("the clock of {url}", url=url)
            opening = client.http.get(url, proxy=proxy, allow_redirects=False)
            try:
                async with asyncio.timeout(REACH_SECONDS), opening as response:
                    date = email.utils.parsedate_to_datetime(response.headers["Date"])
                break
            except (aiohttp.ClientError, OSError, KeyError, ValueError):
                continue
        else:
            found = "not compared, no upstream tells the time"
            self.report("warn", "clock", found, fix)
            return
        off = time.time() - date.timestamp()
        grade, fix = "ok", ""
        if abs(off) > CLOCK_SECONDS:
            grade, fix = "fail", "set up NTP: timedatectl set-ntp true"
        found = "{seconds:.0f} s behind the upstream's"
        if off > 0:
            found = "{seconds:.0f} s ahead of the upstream's"
        self.report(grade, "clock", found, fix, seconds=abs(off))

    def diagnose(self, name: str, error: ChatError) -> str:
        """Return why a question to an assistant failed, and how to fix it."""
        one, cause = self.config.assistants[name], error.__cause__
        base = urllib.parse.urlsplit(one.base_url)
        words = error.words.replace(one.api_key.strip(), "***")
        words = "".join(c if c.isprintable() else " " for c in words)[:WORDS_CHARS]
        if isinstance(
            cause, aiohttp.ClientConnectionError | aiohttp.ClientHttpProxyError
        ):
            host, detail = getattr(cause, "host", base.hostname), reason_of(cause)
        else:
            host = base.netloc
            detail = tell(error.detail)
            if error.status:
                detail = tell("status {status}", status=error.status)
            elif error.detail.startswith(FINISH):
                word = error.detail.removeprefix(FINISH)
                detail = tell("it ended with finish_reason {word}", word=word)
            detail += f" “{words}”" if words else ""
        places = {
            key: tell(setting_source(name, key, one, self.environ))
            for key in ("proxy", "base_url", "api_key", "model", "extra")
        }
        is_proxy = host == urllib.parse.urlsplit(one.proxy).hostname
        signs = signs_of(error, words)
        trouble = next((TROUBLES[sign] for sign in signs if sign in TROUBLES), OTHER)
        return tell(
            trouble,
            **places,
            way=places["proxy" if is_proxy else "base_url"],
            host=host,
            detail=detail,
            url=one.base_url,
            name=one.model,
            seconds=one.first_token_timeout,
            switch=switch_of(one),
        )

    async def check_assistant(self, name: str, client: ChatClient) -> None:
        """Ask an assistant for one word, and check that WeChat would wait for it."""
        what = "assistant {name}"
        one = self.config.assistants[name]
        self.doing = tell(
            "one word of {name}'s model, {seconds:.0f} s at most",
            name=name,
            seconds=one.first_token_timeout,
        )
        began, first, text, tokens = time.monotonic(), 0.0, "", 0
        end = asyncio.get_running_loop().time() + client.settings.timeout
        try:
            async for item in client.stream(ONE_WORD, end):
                if isinstance(item, Ending):
                    tokens = item.tokens_out or 0
                else:
                    first, text = first or time.monotonic() - began, text + item
        except ChatError as error:
            if error.kind == "slow" and not text and await is_silent(client):
                error = replace(error, kind="silent")
            found, _, fix = self.diagnose(name, error).partition(" → ")
            self.report(
                "fail", what, "{found}", "{fix}", name=name, found=found, fix=fix
            )
            return
        self.report_speed(name, first, tokens, len(text))

    def report_speed(self, name: str, first: float, tokens: int, chars: int) -> None:
        """Report whether the first word comes in time, and whether the model thinks."""
        one, wechat = self.config.assistants[name], self.config.wechat
        grade, found = "warn", "{model}, first word after {first:.1f} s"
        if not chars:
            grade, found = "fail", "{model} answered without a word"
        elif tokens > THOUGHT_TOKENS + 2 * chars:
            found = (
                "{model}, first word after {first:.1f} s, "
                "{tokens} tokens for {chars} characters: it thinks first"
            )
        elif first <= wechat.attempt_timeout - wechat.margin:
            grade = "ok"
        self.report(
            grade,
            "assistant {name}",
            found,
            "" if grade == "ok" else "{switch}",
            name=name,
            model=one.model,
            first=first,
            tokens=tokens,
            chars=chars,
            switch=switch_of(one),
        )

    async def check_url(self) -> bool:
        """Check that WeChat takes the public URL; say whether it can be tried."""
        url = urllib.parse.urlsplit(self.config.public_url)
        wanted = {"http": 80, "https": 443}[url.scheme]
        self.doing = tell("the address of {host}", host=url.hostname)
        is_example = re.search(EXAMPLE_NAME, url.hostname or "")
        if is_example and not await resolves(url.hostname or ""):
            found, fix = "{url} is only an example", "put in the name of this machine"
            self.report("fail", "public_url", found, fix, url=self.config.public_url)
            return False
        if url.port not in (None, wanted):
            fix = "WeChat posts to port 80 or 443 only: put a proxy in front"
            self.report("fail", "public_url", "port {port}", fix, port=url.port)
        elif is_private(url.hostname or ""):
            fix = "WeChat needs an address that the whole internet reaches"
            found = "{host} is not public"
            self.report("fail", "public_url", found, fix, host=url.hostname)
        elif url.port:
            fix = "leave the port out: an explicit one made verification fail for some"
            self.report("warn", "public_url", "{url}", fix, url=self.config.public_url)
        else:
            self.report("ok", "public_url", "{url}", url=self.config.public_url)
        return True

    async def check_certificate(self) -> bool:
        """Check the certificate: its chain, and two weeks left; say if it was seen."""
        url = urllib.parse.urlsplit(self.config.public_url)
        if url.scheme != "https":
            return True
        port = url.port or 443
        self.doing = tell("the certificate of {host}", host=url.hostname)
        try:
            certificate = await shake_hands(
                url.hostname, port, ssl.create_default_context()
            )
        except ssl.SSLError as error:
            fix = CERTIFICATE_FIXES[fault_of(error)]
            self.report("fail", "certificate", "{why}", fix, why=reason_of(error))
            return True
        except OSError as error:
            grade, fix = reach_fix(error, port)
            self.report(
                grade, "certificate", "{why}", "{fix}", why=reason_of(error), fix=fix
            )
            return False
        until = ssl.cert_time_to_seconds(certificate["notAfter"])
        days = (until - time.time()) / 86400
        is_long = days > CERTIFICATE_DAYS
        grade, fix = ("ok", "") if is_long else ("warn", "see that it is renewed")
        self.report(grade, "certificate", "good for {days:.0f} days", fix, days=days)
        await self.check_old_tls(url.hostname, port)
        return True

    async def check_old_tls(self, host: str | None, port: int) -> None:
        """Check that TLS 1.2 is spoken, too: WeChat's servers know no newer one."""
        context = ssl.create_default_context()
        context.maximum_version = ssl.TLSVersion.TLSv1_2
        try:
            await shake_hands(host, port, context)
        except OSError:
            fix = "WeChat speaks 1.2: in nginx `ssl_protocols TLSv1.2 TLSv1.3;`"
            self.report("fail", "TLS", "only version 1.3 is spoken", fix)

    async def check_verification(self, http: aiohttp.ClientSession) -> bool:
        """Send what WeChat's console sends, through the public URL; say if all is well.

        The first answer that is not wxgpt's is told, as others have the same reason.
        """
        base = self.config.public_url + self.config.server.path.rstrip("/")
        echo, right = secrets.token_hex(8), self.signed()
        wrong = right | {"signature": "0" * 40}
        url = urllib.parse.urlsplit(base)
        port = url.port or {"http": 80, "https": 443}[url.scheme]
        for method, path, signed, status, wanted in (
            ("GET", base, right, 200, echo),
            ("GET", base + "/", right, 200, echo),
            ("GET", base, wrong, 403, None),
            ("POST", base, right, 200, "success"),
        ):
            what = "verification with a wrong signature at {path}"
            if status == 200:
                what = "verification with a right signature at {path}"
            if method == "POST":
                what = "a message to {path}"
            query = signed | {"echostr": echo}
            self.doing, began = tell("an answer of {path}", path=path), time.monotonic()
            data = PUSH if method == "POST" else None
            try:  # a redirect is no answer to WeChat
                async with http.request(
                    method, path, params=query, data=data, allow_redirects=False
                ) as response:
                    text, found = await response.text(), response.status
            except (aiohttp.ClientError, OSError, UnicodeError) as error:
                grade, fix = reach_fix(error, port)
                why = reason_of(error)
                self.report(grade, what, "{why}", "{fix}", path=path, why=why, fix=fix)
                return False
            took, limit = time.monotonic() - began, self.config.wechat.attempt_timeout
            words, fix = "status {status}, not wxgpt's answer", proxy_fix(found)
            if found == status and wanted in (None, text):
                if took < limit:
                    self.report("ok", what, "status {status}", path=path, status=found)
                    continue
                words = "an answer after {took:.0f} s, WeChat waits {limit:g} s"
                fix = "what makes it slow: the proxy, a tunnel, the CDN?"
            self.report(
                "fail",
                what,
                words,
                fix,
                path=path,
                status=found,
                took=took,
                limit=limit,
            )
            return False
        return True

    async def check_stream(self, http: aiohttp.ClientSession) -> None:
        """Check that the proxy does not buffer event streams."""
        times = []
        try:
            async with http.get(self.config.public_url + PROBE_PATH) as response:
                async for _ in response.content.iter_any():
                    times.append(time.monotonic())
        except (aiohttp.ClientError, OSError):
            return  # check_verification has reported it
        if response.status != 200:
            status = response.status
            fix = proxy_fix(status)
            self.report("fail", "live pages", "status {status}", fix, status=status)
        elif len(times) > 1 and times[-1] - times[0] > PROBE_SECONDS:
            self.report("ok", "live pages", "events come through as they are written")
        else:
            fix = "switch the proxy's buffering off for /a/ (docs/deploy.md)"
            self.report("fail", "live pages", "events come all at once", fix)


async def resolves(host: str) -> bool:
    """Say whether a name leads to an address."""
    try:
        return bool(await asyncio.get_running_loop().getaddrinfo(host, None))
    except OSError:
        return False


async def shake_hands(
    host: str | None, port: int, context: ssl.SSLContext
) -> dict[str, typing.Any]:
    """Return the certificate that a server shows; raise OSError."""
    async with asyncio.timeout(REACH_SECONDS):
        _, writer = await asyncio.open_connection(host, port, ssl=context)
    certificate = writer.get_extra_info("peercert")
    writer.close()
    return certificate


async def is_silent(client: ChatClient) -> bool:
    """Say whether a provider's host sends no byte, whatever it is asked."""
    url, proxy = client.settings.base_url.strip(), client.settings.proxy or None
    try:
        async with asyncio.timeout(REACH_SECONDS), client.http.get(url, proxy=proxy):
            return False
    except (aiohttp.ClientError, OSError, ValueError) as error:
        return isinstance(error, TimeoutError)


def console_words(config: Config) -> str:
    """Return what to type into which field of WeChat's console."""
    wechat = config.wechat
    return tell(
        CONSOLE,
        url=config.public_url + config.server.path,
        token=wechat.token,
        aes_key=wechat.aes_key or tell("any, made by the form"),
        mode="安全模式" if wechat.aes_key else "明文模式",
        app_id=wechat.app_id or "<AppID>",
    )


async def run_check(
    config: Config,
    environ: typing.Mapping[str, str],
    path: str,
    unit: typing.Mapping[str, str],
) -> int:
    """Check everything in order; return the exit status."""
    doctor = Doctor(config, environ, unit)
    log.setLevel(logging.CRITICAL)  # findings only
    make_cipher(config)
    make_blocked(config)
    load_pages()
    async with doctor.talking():
        await check_all(doctor, config, path)
    if BY_SETUP not in environ:  # which has shown it just before
        print(console_words(config))
    counts = (f"{doctor.counts[grade]} {mark}" for grade, (mark, _) in MARKS.items())
    print("\n" + "  ".join(counts))
    return 1 if doctor.counts["fail"] else 0


async def check_all(doctor: Doctor, config: Config, path: str) -> None:
    """Report every finding, from the settings outwards."""
    doctor.check_settings(path)
    doctor.check_database()
    timeout = aiohttp.ClientTimeout(total=REACH_SECONDS)
    async with contextlib.AsyncExitStack() as stack:
        # A bad certificate has a line of its own, and must not hide other findings.
        connector = aiohttp.TCPConnector(ssl=False)
        opening = aiohttp.ClientSession(
            timeout=timeout, connector=connector, headers={"User-Agent": CHECK_AGENT}
        )
        http = await stack.enter_async_context(opening)
        is_free = await doctor.check_port(http)
        file = config.database.path
        if is_free is False and not os.path.exists(file):
            found = "{path} is not there, and wxgpt is serving"
            fix = "was it deleted? Then restart wxgpt; or it runs with other settings"
            doctor.report("fail", "database", found, fix, path=file)
        doctor.check_risks(path)
        clients, _ = await stack.enter_async_context(open_chat(config))
        await doctor.check_clock(clients.values())
        for name, client in clients.items():
            await doctor.check_assistant(name, client)
        is_well = await doctor.check_url() and await doctor.check_certificate()
        if not is_well or is_free is None:
            return  # the rest would fail for the same reason
        if is_free:  # serve for the next questions only
            folder = stack.enter_context(tempfile.TemporaryDirectory())
            database = DatabaseSettings(path=f"{folder}/check.db")
            await stack.enter_async_context(
                open_server(replace(config, database=database))
            )
        if await doctor.check_verification(http):
            await doctor.check_stream(http)
