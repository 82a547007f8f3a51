"""`wxgpt.py check`: try each thing that usually goes wrong, and say how to mend it.

One line a finding, from the settings to the model's answer and the way from outside.
Nothing is created, the database neither.
"""

import asyncio
import contextlib
import email.utils
import functools
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
import typing
import urllib.parse
from dataclasses import replace

import aiohttp

from wxgpt import (
    PROBE_PATH,
    AssistantSettings,
    ChatClient,
    ChatError,
    Config,
    DatabaseSettings,
    Ending,
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

ITSELF = "this machine may not reach itself from outside: try a phone"
MARKS = {"ok": ("✓", "32"), "warn": ("!", "33"), "fail": ("✗", "31")}
DISK_BYTES = 200 * 1024 * 1024
CLOCK_SECONDS = 60
CERTIFICATE_DAYS = 14
SLOW_STREAM_SECONDS = 0.3  # of the half second between the two events of PROBE_PATH
WORDS_CHARS = 100  # of an upstream's refusal are shown
ONE_WORD = [{"role": "user", "content": "请只回答一个字：好"}]
THOUGHT_TOKENS = 30  # more than one word takes, even spelled out with a tag or two
CONSOLE = """
在微信开发者平台填写（我的业务 → 公众号 → 消息推送）：
  URL               {url}
  Token             {token}
  EncodingAESKey    {aes_key}
  消息加解密方式    {mode}
启用后，后台的自动回复和自定义菜单会停用；[replies] 可以代替自动回复。
个人订阅号不能用：客服消息、菜单接口、素材接口、用户昵称。wxgpt 都不需要它们。"""

# How the models of known providers are kept from thinking, by their base URL.
SWITCHES = (
    (r"api\.openai\.com|:11434\b", 'extra.reasoning_effort = "none"'),
    (r"deepseek\.com|moonshot\.|bigmodel\.cn", 'extra.thinking.type = "disabled"'),
    (r"dashscope", "extra.enable_thinking = false"),
)
CERTIFICATE = "ConnectorCertificateError.*"
# What a failed question to a model means, and how to mend it, by the first pattern
# that its error has. The first word says at which step it failed.
TROUBLES = (
    (
        r"DNSError",
        "name: {host} does not resolve",
        "look at {way}, and at the DNS here",
    ),
    (
        CERTIFICATE + r"expired|Certificate.*not yet",
        "TLS: {host}: {detail}",
        "is the date here right? Then its owner must renew it",
    ),
    (
        CERTIFICATE + r"mismatch|Certificate.*not valid for",
        "TLS: {host}: {detail}",
        "look at the host in {way}",
    ),
    (
        CERTIFICATE,
        "TLS: {host}: {detail}",
        "apt install ca-certificates; for an authority of your own set SSL_CERT_FILE",
    ),
    (r"SSLError", "TLS: {host}: {detail}", "look at {way}: http://, or another port?"),
    (
        r"HttpProxyError.* 407|status 407",
        "proxy: it wants a user and a password",
        'write {proxy} = "http://USER:PASSWORD@HOST:PORT"',
    ),
    (
        r"HttpProxyError",
        "proxy: it does not lead to {host}: {detail}",
        "look at the proxy's log and rules",
    ),
    (
        r"ProxyConnectionError",
        "proxy: {host}: {detail}",
        "is it running? Look at {way}",
    ),
    (
        r"ConnectorError|ConnectionTimeout",
        "connection: {host}: {detail}",
        "look at {way}; where the provider is blocked, set {proxy}",
    ),
    (
        r"ServerDisconnected",
        "connection: {host} hangs up without an answer",
        "look at {url}: https://, or another port?",
    ),
    (
        r"insufficient_quota|balance|arrearage|=1113\b|(spend|usage)_limit|status 402",
        "balance: {detail}",
        "top up the account, or raise its limit",
    ),
    (
        r"\b(country|region)",
        "country: {detail}",
        "the provider does not serve this machine: set {proxy}",
    ),
    (
        r"model_not_found|无可用渠道|model.{0,40}\b(not|unknown)|invalid model",
        "model: {host} does not know {name}: {detail}",
        "look at {model}",
    ),
    (
        r"status 40[13]",
        "key: {host} refuses it: {detail}",
        "look at {api_key}: is it a key of {url}?",
    ),
    (
        r"status (3..|404|405)|InvalidURL|not JSON|not an object",
        "URL: no chat API at {url}: {detail}",
        "look at {way}: it ends with the version, as in https://api.openai.com/v1",
    ),
    (
        r"without an end",
        "stream: {detail}",
        "is there a chat API at {url}? Or does a gateway cut streams?",
    ),
    (r"status 429", "limit: {detail}", "wait, or raise the key's rate limit"),
    (r"status 4", "request: {host} refuses it: {detail}", "look at {extra}"),
    (r"^busy", "provider: {host} fails: {detail}", "try again later"),
    (r"^slow", "time: no word within {seconds:.0f} s", "{switch}"),
    (r"", "answer: {detail}", "try again later"),
)
# What is wrong with the public certificate, by OpenSSL's words.
CERTIFICATES = (
    ("expired", "renew it, and load it into the proxy"),
    ("local issuer", "the proxy must send the full chain (fullchain.pem)"),
    ("mismatch", "it must be for the host of public_url"),
    ("", "WeChat takes only one of a public authority, as Let's Encrypt's"),
)
# What it means when something else than wxgpt answers, by the status.
ANSWERS = (
    (r"3..", "give public_url as the address that answers by itself"),
    (r"50[234]", "is wxgpt running, on the port that the proxy names?"),
    (r"403", "has the running wxgpt the same token? Restart it after a change"),
    (r"", "the proxy must pass /a/, /h/, /healthz and server.path to wxgpt unchanged"),
)


def mend_of(status: int) -> str:
    """Return what to do when a status is not wxgpt's."""
    return next(mend for code, mend in ANSWERS if re.match(code, str(status)))


def reason_of(error: BaseException) -> str:
    """Return in a few words why a connection failed."""
    inner = getattr(error, "certificate_error", getattr(error, "os_error", error))
    if isinstance(inner, ssl.SSLCertVerificationError):
        return inner.verify_message
    if isinstance(inner, ssl.SSLError):
        return f"it speaks no TLS there ({inner.reason})"
    if isinstance(inner, socket.gaierror):
        return "the name does not resolve"
    if isinstance(inner, TimeoutError):
        return "no answer in time"
    if isinstance(inner, OSError) and inner.errno:
        return os.strerror(inner.errno)
    if isinstance(inner, aiohttp.ClientHttpProxyError):
        return f"status {inner.status}"
    return str(inner) or type(inner).__name__


def switch_of(settings: AssistantSettings) -> str:
    """Return how to get an assistant's first word sooner."""
    for pattern, switch in SWITCHES:
        if re.search(pattern, settings.base_url):
            return f"switch thinking off: {switch}; or take a faster model"
    return "switch thinking off with `extra` (docs/models.md), or take a faster model"


async def date_at(client: ChatClient) -> str:
    """Return the date that an upstream tells, asked the way a question goes."""
    url, proxy = client.settings.base_url.strip(), client.settings.proxy or None
    async with (
        asyncio.timeout(15),
        client.http.get(url, proxy=proxy, allow_redirects=False) as response,
    ):
        return response.headers["Date"]


def evidence_of(error: ChatError, one: AssistantSettings) -> tuple[str, str, str]:
    """Return who did not answer as wanted, with what, and all signs to go by."""
    cause = error.__context__
    if isinstance(cause, aiohttp.ClientConnectionError | aiohttp.ClientHttpProxyError):
        detail = reason_of(cause)
        hostname = urllib.parse.urlsplit(one.base_url).hostname or ""
        host = getattr(cause, "host", hostname)
        return host, detail, f"{type(cause).__name__} {detail}"
    words = error.words.replace(one.api_key.strip(), "***")
    words = "".join(c if c.isprintable() else " " for c in words)[:WORDS_CHARS]
    found = re.search(r"status \d+|(?<=: ).*", str(error))
    detail = found[0] if found else str(error)
    detail += f" “{words}”" if words else ""
    return urllib.parse.urlsplit(one.base_url).netloc, detail, f"{error} {words}"


def is_private(host: str) -> bool:
    """Say whether a host is surely not reached from the internet."""
    with contextlib.suppress(ValueError):
        return not ipaddress.ip_address(host).is_global
    return host == "localhost" or "." not in host


class Doctor:
    """Prints one line a finding, and remembers whether anything failed."""

    def __init__(self, config: Config, environ: typing.Mapping[str, str]) -> None:
        self.config = config
        self.environ = environ
        self.failures = 0
        self.is_colourful = sys.stdout.isatty()

    def say(self, grade: str, what: str, found: str, mend: str = "") -> None:
        """Print a finding: ok, warn or fail, and how to mend it."""
        mark, colour = MARKS[grade]
        self.failures += grade == "fail"
        mark = f"\033[{colour}m{mark}\033[0m" if self.is_colourful else mark
        print(f"{mark} {what}: {found}" + (f" → {mend}" if mend else ""), flush=True)

    def check_database(self) -> None:
        """Check that the database can be written, and the disk has room."""
        path = pathlib.Path(self.config.database.path)
        folder = path.parent
        try:
            if path.exists():
                with contextlib.closing(sqlite3.connect(path, timeout=2)) as db:
                    db.execute("BEGIN IMMEDIATE").execute("ROLLBACK")
                found = f"{path}, {path.stat().st_size / 1e6:.1f} MB"
            else:
                with tempfile.TemporaryFile(dir=folder):
                    found = f"{path} will be created at the first start"
            free = shutil.disk_usage(folder).free
        except (OSError, sqlite3.Error) as error:
            mend = "run check as the service's user; database.path must be writable"
            if not folder.exists():
                mend = "make that folder, or change database.path"
            elif "locked" in str(error):
                mend = "another program is writing to it: end that"
            words = getattr(error, "strerror", None) or error
            self.say("fail", "database", f"{path}: {words}", mend)
            return
        grade, mend = ("ok", "") if free > DISK_BYTES else ("warn", "make room")
        self.say(grade, "database", f"{found}, {free / 1e9:.1f} GB free", mend)

    async def check_port(self, http: aiohttp.ClientSession) -> bool:
        """Check who holds the port; say whether it is free."""
        host, port = self.config.server.host, self.config.server.port
        near = "127.0.0.1" if host in ("0.0.0.0", "::") else host
        near = f"[{near}]" if ":" in near else near
        try:
            async with http.get(f"http://{near}:{port}/healthz") as response:
                if response.headers.get("Server") == "wxgpt":
                    self.say("ok", "port", f"{port}, wxgpt is serving on it")
                    return False
            mend = "another program holds it: end that, or change server.port"
            self.say("fail", "port", f"{port} answers, but not as wxgpt", mend)
        except (aiohttp.ClientError, OSError):
            try:
                listen(host, port).close()
                self.say("ok", "port", f"{port} is free; wxgpt is not running")
                return True
            except OSError as error:
                mend = "end what holds it, or change server.host or server.port"
                self.say("fail", "port", str(error), mend)
        return False

    async def check_clock(self, clients: typing.Iterable[ChatClient]) -> None:
        """Check our clock against the date of the first upstream that tells one."""
        for client in clients:
            try:
                date = await date_at(client)
                off = time.time() - email.utils.parsedate_to_datetime(date).timestamp()
                break
            except (aiohttp.ClientError, OSError, KeyError, ValueError):
                continue
        else:
            mend = "compare `date -u` with a clock that is right"
            self.say("warn", "clock", "not compared, no upstream tells the time", mend)
            return
        grade, mend = "ok", ""
        if abs(off) > CLOCK_SECONDS:
            grade, mend = "fail", "set up NTP: timedatectl set-ntp true"
        side = "ahead of" if off > 0 else "behind"
        self.say(grade, "clock", f"{abs(off):.0f} s {side} the upstream's", mend)

    def diagnose(self, name: str, error: ChatError) -> tuple[str, str]:
        """Return at which step a question failed and how, and how to mend it."""
        one = self.config.assistants[name]
        place = functools.partial(setting_source, name, one=one, environ=self.environ)
        host, detail, signs = evidence_of(error, one)
        is_proxy = host == urllib.parse.urlsplit(one.proxy).hostname
        names = ("proxy", "base_url", "api_key", "model")
        facts: dict[str, object] = {key: place(key) for key in names}
        facts["way"] = facts["proxy" if is_proxy else "base_url"]
        facts |= {
            "host": host,
            "detail": detail,
            "url": one.base_url,
            "name": one.model,
        }
        facts |= {"seconds": one.first_token_timeout, "switch": switch_of(one)}
        facts["extra"] = f"assistants.{name}.extra"
        for pattern, found, mend in TROUBLES:
            if re.search(pattern, signs, re.IGNORECASE):
                return found.format(**facts), mend.format(**facts)
        raise AssertionError("the last pattern fits everything")

    async def check_assistant(self, name: str, client: ChatClient) -> None:
        """Ask an assistant one word, and see whether it would fit WeChat's seconds."""
        began, first, text, tokens = time.monotonic(), 0.0, "", 0
        end = asyncio.get_running_loop().time() + client.settings.timeout
        try:
            async for item in client.stream(ONE_WORD, end):
                if isinstance(item, Ending):
                    tokens = item.tokens_out or 0
                else:
                    first, text = first or time.monotonic() - began, text + item
        except ChatError as error:
            if error.after == 0.0:  # a field was refused; questions go on without it
                await self.check_assistant(name, client)
                return
            self.say("fail", f"assistant {name}", *self.diagnose(name, error))
            return
        self.say_speed(name, first, tokens, len(text))

    def say_speed(self, name: str, first: float, tokens: int, chars: int) -> None:
        """Say whether an answer's first word, and hidden thinking, fit the seconds."""
        one, wechat = self.config.assistants[name], self.config.wechat
        found = f"{one.model}, first word after {first:.1f} s"
        if not chars:
            found = f"{one.model} answered without a word"
            self.say("fail", f"assistant {name}", found, switch_of(one))
        elif tokens > THOUGHT_TOKENS + 2 * chars:
            found += f", {tokens} tokens for {chars} characters: it thinks first"
            self.say("warn", f"assistant {name}", found, switch_of(one))
        elif first > wechat.attempt_timeout - wechat.margin:
            self.say("warn", f"assistant {name}", found, switch_of(one))
        else:
            self.say("ok", f"assistant {name}", found)

    def check_url(self) -> None:
        """Check that WeChat takes the public URL: its port and its host."""
        url = urllib.parse.urlsplit(self.config.public_url)
        wanted = {"http": 80, "https": 443}[url.scheme]
        if url.port not in (None, wanted):
            mend = "WeChat posts to port 80 or 443 only: put a proxy in front"
            self.say("fail", "public_url", f"port {url.port}", mend)
        elif is_private(url.hostname or ""):
            mend = "WeChat needs an address that the whole internet reaches"
            self.say("fail", "public_url", f"{url.hostname} is not public", mend)
        elif url.port:
            mend = "leave the port out: an explicit one made verification fail for some"
            self.say("warn", "public_url", self.config.public_url, mend)
        else:
            self.say("ok", "public_url", self.config.public_url)

    async def check_certificate(self) -> None:
        """Check that the certificate's chain is whole and good for two weeks."""
        url = urllib.parse.urlsplit(self.config.public_url)
        if url.scheme != "https":
            return
        try:
            async with asyncio.timeout(10):
                context, port = ssl.create_default_context(), url.port or 443
                opening = asyncio.open_connection(url.hostname, port, ssl=context)
                _, writer = await opening
            certificate = writer.get_extra_info("peercert")
            writer.close()
        except ssl.SSLError as error:
            found = reason_of(error)
            mend = next(m for words, m in CERTIFICATES if words in found)
            self.say("fail", "certificate", found, mend)
            return
        except OSError as error:
            self.say("warn", "certificate", reason_of(error), ITSELF)
            return
        until = ssl.cert_time_to_seconds(certificate["notAfter"])
        days = (until - time.time()) / 86400
        is_long = days > CERTIFICATE_DAYS
        grade, mend = ("ok", "") if is_long else ("warn", "see that it is renewed")
        self.say(grade, "certificate", f"good for {days:.0f} days", mend)

    async def check_verification(self, http: aiohttp.ClientSession) -> None:
        """Ask what WeChat's console asks, through the public URL."""
        base = self.config.public_url + self.config.server.path.rstrip("/")
        token, echo = self.config.wechat.token, secrets.token_hex(8)
        stamp, nonce = str(int(time.time())), secrets.token_hex(4)
        right = signature_of(token, stamp, nonce)
        tries = ((base, right, 200), (base + "/", right, 200), (base, "0" * 40, 403))
        for path, signature, status in tries:
            query = {"signature": signature, "timestamp": stamp, "nonce": nonce}
            kind = "right signature" if status == 200 else "wrong signature"
            what = f"verification with a {kind} at {path}"
            query["echostr"] = echo
            try:  # a redirect is no answer to WeChat
                async with http.get(
                    path, params=query, allow_redirects=False
                ) as response:
                    text, found = await response.text(), response.status
            except (aiohttp.ClientError, OSError, UnicodeError) as error:
                self.say("warn", what, reason_of(error), ITSELF)
                return
            if found == status and (status == 403 or text == echo):
                self.say("ok", what, f"status {found}")
                continue
            self.say(
                "fail", what, f"status {found}, not wxgpt's answer", mend_of(found)
            )

    async def check_stream(self, http: aiohttp.ClientSession) -> None:
        """Check that the proxy passes events on as they come."""
        times = []
        try:
            async with http.get(self.config.public_url + PROBE_PATH) as response:
                async for _ in response.content.iter_any():
                    times.append(time.monotonic())
        except (aiohttp.ClientError, OSError):
            return  # said before
        if response.status != 200:
            status = response.status
            self.say("fail", "live pages", f"status {status}", mend_of(status))
        elif len(times) > 1 and times[-1] - times[0] > SLOW_STREAM_SECONDS:
            self.say("ok", "live pages", "events come through as they are written")
        else:
            mend = "switch the proxy's buffering off for /a/ (docs/deploy.md)"
            self.say("fail", "live pages", "events come all at once", mend)


async def run_check(config: Config, environ: typing.Mapping[str, str]) -> int:
    """Check everything in order; return the exit status."""
    doctor = Doctor(config, environ)
    log.setLevel(logging.CRITICAL)  # findings only
    make_cipher(config)
    make_blocked(config)
    load_pages()
    doctor.say("ok", "settings", f"assistants {', '.join(config.assistants)}")
    doctor.check_database()
    timeout = aiohttp.ClientTimeout(total=15)
    async with contextlib.AsyncExitStack() as stack:
        # The public certificate has a line of its own; the others shall be seen, too.
        connector = aiohttp.TCPConnector(ssl=False)
        opening = aiohttp.ClientSession(timeout=timeout, connector=connector)
        http = await stack.enter_async_context(opening)
        is_free = await doctor.check_port(http)
        clients, _ = await stack.enter_async_context(open_chat(config))
        await doctor.check_clock(clients.values())
        for name, client in clients.items():
            await doctor.check_assistant(name, client)
        doctor.check_url()
        await doctor.check_certificate()
        if is_free:  # serve for the next questions only
            folder = stack.enter_context(tempfile.TemporaryDirectory())
            database = DatabaseSettings(path=f"{folder}/check.db")
            await stack.enter_async_context(
                open_server(replace(config, database=database))
            )
        await doctor.check_verification(http)
        await doctor.check_stream(http)
    wechat = config.wechat
    values = {"url": config.public_url + config.server.path, "token": wechat.token}
    values["aes_key"] = wechat.aes_key or "随机生成即可"
    values["mode"] = "安全模式" if wechat.aes_key else "明文模式"
    print(CONSOLE.format(**values))
    return 1 if doctor.failures else 0
