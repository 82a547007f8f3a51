"""`wxgpt.py check`: test everything that usually goes wrong, and say how to fix it.

It prints one line per finding, from the settings to a model's answer and the way in
from outside. It creates nothing, not even the database.
"""

import asyncio
import contextlib
import email.utils
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
CLOCK_SECONDS = 60  # a tenth of what a push's timestamp may be off
CERTIFICATE_DAYS = 14  # automatic renewal takes place long before
PROBE_SECONDS = 0.3  # PROBE_PATH sends two events half a second apart
WORDS_CHARS = 100  # of a provider's message are shown
ONE_WORD = [{"role": "user", "content": "请只回答一个字：好"}]
THOUGHT_TOKENS = 30  # more than one word takes, even spelled out with a tag or two
UNREACHED = "this machine may not reach itself from outside: try a phone"
CONSOLE = """
在微信开发者平台填写（我的业务 → 公众号 → 消息推送）：
  URL               {url}
  Token             {token}
  EncodingAESKey    {aes_key}
  消息加解密方式    {mode}
启用后，后台的自动回复和自定义菜单会停用；[replies] 可以代替自动回复。
个人订阅号不能用：客服消息、菜单接口、素材接口、用户昵称。wxgpt 都不需要它们。"""

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
# What a provider may say with any status, in its code or message.
WORDS = {
    "balance": r"insufficient_quota|balance|arrearage|\b1113\b|(spend|usage)_limit",
    "country": r"\b(country|region)",
    "model": r"model_not_found|无可用渠道|model.{0,40}\b(not|unknown)|invalid model",
}
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
    # The words
    "balance": BALANCE,
    "country": (
        "country: {detail} → the provider does not serve this machine: set {proxy}"
    ),
    "model": "model: {host} does not know {name}: {detail} → look at {model}",
    # The status
    **dict.fromkeys((300, 301, 302, 303, 307, 308, 404, 405), NO_API),
    200: "answer: {detail} → try again later",
    401: KEY,
    402: BALANCE,
    403: KEY,
    407: (
        "proxy: it wants a user and a password → "
        'write {proxy} = "http://USER:PASSWORD@HOST:PORT"'
    ),
    429: "limit: {detail} → wait, or raise the key's rate limit",
    # The kind
    "unreachable": CONNECTION,
    "busy": "provider: {host} fails: {detail} → try again later",
    "slow": "time: no word within {seconds:.0f} s → {switch}",
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
    (r"50[234]", "is wxgpt running, on the port that the proxy names?"),
    (r"403", "has the running wxgpt the same token? Restart it after a change"),
    (r"", "the proxy must pass /a/, /h/, /healthz and server.path to wxgpt unchanged"),
)


def proxy_fix(status: int) -> str:
    """Return how to fix that a response with this status is not wxgpt's."""
    return next(fix for code, fix in PROXY_FIXES if re.match(code, str(status)))


def reason_of(error: BaseException) -> str:
    """Return why a connection failed, in a few words."""
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
    """Return how to get the first word of an assistant sooner."""
    for pattern, switch in SWITCHES:
        if re.search(pattern, f"{settings.base_url} {settings.model}"):
            how = "keep thinking short" if switch == BRIEFLY else "switch thinking off"
            return f"{how}: {switch}; or take a faster model"
    return "switch thinking off with `extra` (docs/models.md), or take a faster model"


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
    for name, pattern in WORDS.items():
        if re.search(pattern, f"{error.code} {words}", re.IGNORECASE):
            yield name
    yield error.status
    yield error.kind


def is_private(host: str) -> bool:
    """Say whether a host is certainly not reachable from the internet."""
    with contextlib.suppress(ValueError):
        return not ipaddress.ip_address(host).is_global
    return host == "localhost" or "." not in host


def serving_user(port: int) -> int:
    """Return the id of the user who listens on a port; -1 if nobody, or not known."""
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        with contextlib.suppress(OSError):
            for line in pathlib.Path(table).read_text().splitlines()[1:]:
                _, address, _, state, _, _, _, user, *_ = line.split()
                if state == "0A" and int(address.rpartition(":")[2], 16) == port:
                    return int(user)
    return -1


class Doctor:
    """Prints one line per finding, and remembers whether anything failed."""

    def __init__(self, config: Config, environ: typing.Mapping[str, str]) -> None:
        self.config = config
        self.environ = environ
        self.has_failed = False
        self.server_user = -1  # the id of the user under whom wxgpt serves, if it does
        self.is_colourful = sys.stdout.isatty()

    def report(self, grade: str, what: str, found: str, fix: str = "") -> None:
        """Print a finding, graded ok, warn or fail, and how to fix it."""
        if grade == "fail":
            self.has_failed = True
        mark, colour = MARKS[grade]
        mark = f"\033[{colour}m{mark}\033[0m" if self.is_colourful else mark
        print(f"{mark} {what}: {found}" + (f" → {fix}" if fix else ""), flush=True)

    def check_risks(self, path: str) -> None:
        """Warn of what lets others in; the server's log says the same at its start."""
        for place, found, fix in find_risks(self.config, path, self.server_user):
            self.report("warn", place, found, fix)

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
            fix = "run check as the service's user; database.path must be writable"
            if not folder.exists():
                fix = "make that folder, or change database.path"
            elif "locked" in str(error):
                fix = "another program is writing to it: end that"
            words = getattr(error, "strerror", None) or error
            self.report("fail", "database", f"{path}: {words}", fix)
            return
        grade, fix = ("ok", "") if free > DISK_BYTES else ("warn", "make room")
        self.report(grade, "database", f"{found}, {free / 1e9:.1f} GB free", fix)

    async def check_port(self, http: aiohttp.ClientSession) -> bool:
        """Check who holds the port; say whether it is free."""
        host, port = self.config.server.host, self.config.server.port
        near = "127.0.0.1" if host in ("0.0.0.0", "::") else host
        near = f"[{near}]" if ":" in near else near
        try:
            async with http.get(f"http://{near}:{port}/healthz") as response:
                if response.headers.get("Server") == "wxgpt":
                    self.report("ok", "port", f"{port}, wxgpt is serving on it")
                    self.server_user = serving_user(port)
                    return False
            fix = "another program holds it: end that, or change server.port"
            self.report("fail", "port", f"{port} answers, but not as wxgpt", fix)
        except (aiohttp.ClientError, OSError):
            try:
                listen(host, port).close()
                self.report("ok", "port", f"{port} is free; wxgpt is not running")
                return True
            except OSError as error:
                fix = "end what holds it, or change server.host or server.port"
                self.report("fail", "port", str(error), fix)
        return False

    async def check_clock(self, clients: typing.Iterable[ChatClient]) -> None:
        """Compare our clock with the first provider's that says what time it is."""
        fix = "compare `date -u` with a clock that is right"
        for client in clients:
            url, proxy = client.settings.base_url.strip(), client.settings.proxy or None
            opening = client.http.get(url, proxy=proxy, allow_redirects=False)
            try:
                async with asyncio.timeout(15), opening as response:
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
        side = "ahead of" if off > 0 else "behind"
        self.report(grade, "clock", f"{abs(off):.0f} s {side} the upstream's", fix)

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
            detail = f"status {error.status}" if error.status else error.detail
            detail += f" “{words}”" if words else ""
        places = {
            key: setting_source(name, key, one, self.environ)
            for key in ("proxy", "base_url", "api_key", "model", "extra")
        }
        is_proxy = host == urllib.parse.urlsplit(one.proxy).hostname
        signs = signs_of(error, words)
        trouble = next((TROUBLES[sign] for sign in signs if sign in TROUBLES), OTHER)
        return trouble.format(
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
        began, first, text, tokens = time.monotonic(), 0.0, "", 0
        end = asyncio.get_running_loop().time() + client.settings.timeout
        try:
            async for item in client.stream(ONE_WORD, end):
                if isinstance(item, Ending):
                    tokens = item.tokens_out or 0
                else:
                    first, text = first or time.monotonic() - began, text + item
        except ChatError as error:
            self.report("fail", f"assistant {name}", self.diagnose(name, error))
            return
        self.report_speed(name, first, tokens, len(text))

    def report_speed(self, name: str, first: float, tokens: int, chars: int) -> None:
        """Report whether the first word comes in time, and whether the model thinks."""
        one, wechat = self.config.assistants[name], self.config.wechat
        grade, found = "warn", f"{one.model}, first word after {first:.1f} s"
        if not chars:
            grade, found = "fail", f"{one.model} answered without a word"
        elif tokens > THOUGHT_TOKENS + 2 * chars:
            found += f", {tokens} tokens for {chars} characters: it thinks first"
        elif first <= wechat.attempt_timeout - wechat.margin:
            grade = "ok"
        fix = "" if grade == "ok" else switch_of(one)
        self.report(grade, f"assistant {name}", found, fix)

    def check_url(self) -> None:
        """Check that WeChat takes the public URL: its port and its host."""
        url = urllib.parse.urlsplit(self.config.public_url)
        wanted = {"http": 80, "https": 443}[url.scheme]
        if url.port not in (None, wanted):
            fix = "WeChat posts to port 80 or 443 only: put a proxy in front"
            self.report("fail", "public_url", f"port {url.port}", fix)
        elif is_private(url.hostname or ""):
            fix = "WeChat needs an address that the whole internet reaches"
            self.report("fail", "public_url", f"{url.hostname} is not public", fix)
        elif url.port:
            fix = "leave the port out: an explicit one made verification fail for some"
            self.report("warn", "public_url", self.config.public_url, fix)
        else:
            self.report("ok", "public_url", self.config.public_url)

    async def check_certificate(self) -> None:
        """Check that the certificate has a full chain and two weeks left."""
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
            fix = CERTIFICATE_FIXES[fault_of(error)]
            self.report("fail", "certificate", reason_of(error), fix)
            return
        except OSError as error:
            self.report("warn", "certificate", reason_of(error), UNREACHED)
            return
        until = ssl.cert_time_to_seconds(certificate["notAfter"])
        days = (until - time.time()) / 86400
        is_long = days > CERTIFICATE_DAYS
        grade, fix = ("ok", "") if is_long else ("warn", "see that it is renewed")
        self.report(grade, "certificate", f"good for {days:.0f} days", fix)

    async def check_verification(self, http: aiohttp.ClientSession) -> None:
        """Send what WeChat's console sends, through the public URL."""
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
                self.report("warn", what, reason_of(error), UNREACHED)
                return
            if found == status and (status == 403 or text == echo):
                self.report("ok", what, f"status {found}")
                continue
            wrong = f"status {found}, not wxgpt's answer"
            self.report("fail", what, wrong, proxy_fix(found))

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
            self.report("fail", "live pages", f"status {status}", proxy_fix(status))
        elif len(times) > 1 and times[-1] - times[0] > PROBE_SECONDS:
            self.report("ok", "live pages", "events come through as they are written")
        else:
            fix = "switch the proxy's buffering off for /a/ (docs/deploy.md)"
            self.report("fail", "live pages", "events come all at once", fix)


async def run_check(
    config: Config, environ: typing.Mapping[str, str], path: str
) -> int:
    """Check everything in order; return the exit status."""
    doctor = Doctor(config, environ)
    log.setLevel(logging.CRITICAL)  # findings only
    make_cipher(config)
    make_blocked(config)
    load_pages()
    doctor.report("ok", "settings", f"assistants {', '.join(config.assistants)}")
    doctor.check_database()
    timeout = aiohttp.ClientTimeout(total=15)
    async with contextlib.AsyncExitStack() as stack:
        # A bad certificate has a line of its own, and must not hide other findings.
        connector = aiohttp.TCPConnector(ssl=False)
        opening = aiohttp.ClientSession(timeout=timeout, connector=connector)
        http = await stack.enter_async_context(opening)
        is_free = await doctor.check_port(http)
        doctor.check_risks(path)
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
    print(
        CONSOLE.format(
            url=config.public_url + config.server.path,
            token=wechat.token,
            aes_key=wechat.aes_key or "随机生成即可",
            mode="安全模式" if wechat.aes_key else "明文模式",
        )
    )
    return 1 if doctor.has_failed else 0
