"""What the owner runs at a shell: `check` and `stats`, as processes of their own."""

import ast
import asyncio
import collections
import contextlib
import datetime
import ipaddress
import json
import os
import pathlib
import pty
import re
import signal
import socket
import sqlite3
import ssl
import subprocess
import sys
import time
from types import SimpleNamespace

import aiohttp
import pytest
from aiohttp import ClientSession, RequestInfo, web
from aiohttp.client_reqrep import ConnectionKey
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from multidict import CIMultiDict, CIMultiDictProxy
from yarl import URL

from conftest import (
    ANN,
    BOB,
    ROOT,
    TOKEN,
    free_port,
    merged,
    run_command,
    serving,
    toml,
    write_settings,
)
from fake_openai import Script, Thought, fails, says
from owner.check import (
    CERTIFICATE_FIXES,
    CONSOLE,
    DOOR,
    OTHER,
    PROXY_FIXES,
    TROUBLES,
    Doctor,
    check_all,
    reach_fix,
    switch_of,
)
from owner.layout import width_of, wrap
from owner.stats import summarise
from owner.update import HINTS
from owner.words import read_words
from waiting import within
from wechat import WeChat
from wxgpt import (
    AssistantSettings,
    ChatError,
    Config,
    Texts,
    WeChatSettings,
    load_config,
    make_error,
    open_store,
    signature_of,
)

SAFE = {"app_id": "wx0123456789abcdef", "aes_key": "k" * 43}
PORT_LINE = "✗ public_url: port "
ROOT_LINE = "! user: root serves → use wxgpt.service, which has a user of its own"
DAY = 86400


def unwrapped(text):
    """Return what a check says with each finding on one line."""
    findings, gap, rest = text.partition("\n\n")
    return re.sub(r"\n +", " ", findings) + gap + rest


def bad(text):
    """Return the findings that are not good, but for those of where tests run.

    Loopback has no port of WeChat's, and a server that root's tests start is root's.
    """
    lines = [line for line in text.splitlines() if line[:1] in "!✗" and line]
    usual = [ROOT_LINE] if os.geteuid() == 0 else []
    usual += ["! port: ", "! pushes: none since"]  # have tests of their own
    return [line for line in lines if not line.startswith((PORT_LINE, *usual))]


@pytest.fixture
def check(settings, tmp_path):
    """Run `check` with a server address of its own; gives status and output."""

    async def start(env=None, prefix=(), **changes):
        port, path = free_port(), tmp_path / "check.toml"
        own = {
            "public_url": f"http://127.0.0.1:{port}",
            "server": {"port": port},
            "wechat": {"attempt_timeout": 5},
        }
        write_settings(path, merged(merged(settings, own), changes))
        status, out, err = await run_command(path, "check", env=env, prefix=prefix)
        assert err == ""
        return status, unwrapped(out)

    return start


async def assert_found(checking, *lines, status=1):
    """Let a check find these lines and no other, each with how to mend it."""
    code, out = await checking
    found = bad(out)
    assert len(found) == len(lines), out
    for line, pattern in zip(found, lines, strict=True):
        assert re.search(pattern, line), out
        assert " → " in line
    assert code == status


def proxy_to(port, missing=None, spoiled=None):
    """Make a proxy that reads a whole response before it passes it on."""

    async def handler(request):
        if missing and request.path.startswith(missing):
            return web.Response(status=404, text="not here")
        if spoiled:
            await spoiled(request)
        url = f"http://127.0.0.1:{port}{request.raw_path}"
        agent = {"User-Agent": request.headers["User-Agent"]}
        body = await request.read()
        async with (
            ClientSession(headers=agent) as http,
            http.request(request.method, url, data=body) as response,
        ):
            return web.Response(status=response.status, body=await response.read())

    return handler


def hang_up(listener):
    """Close every connection at once, until the listener is shut down."""
    with contextlib.suppress(OSError):
        while True:
            listener.accept()[0].close()


# check


async def test_all_is_good(check, upstream, settings):
    """Each thing has its line; only WeChat's port is missing on loopback."""
    status, out = await check()
    assert bad(out) == []
    whats = ["settings", "database", "clock", "assistant chatgpt"]
    whats += ["verification with a right", "verification with a wrong", "live pages"]
    assert all(f"✓ {what}" in out for what in whats)
    assert status == 1 and out.count(PORT_LINE) == 1
    assert len(upstream.requests) == 1


async def test_it_works_while_the_server_runs(spawn, tmp_path):
    """The server that holds the port is known, and asked."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    changes = {"server": {"port": port}, "public_url": url}
    server, _ = await spawn(wechat={"attempt_timeout": 5}, **changes)
    await server.ask("/help")
    status, out, err = await run_command(tmp_path / "wxgpt.toml", "check")
    out = unwrapped(out)
    assert bad(out) == [] and err == "" and status == 1
    assert f"✓ port: {port}, wxgpt is serving on it" in out
    assert "✓ pushes: the newest came 0 minutes ago and was read" in out
    assert re.search(r"✓ database: .*test\.db, \d+\.\d MB, ", out)
    assert "✓ live pages" in out


async def test_a_database_that_was_deleted_under_the_server_is_said(spawn, tmp_path):
    """It serves on, and all that is written is lost with the process."""
    await spawn(wechat={"attempt_timeout": 5})
    (tmp_path / "test.db").unlink()
    _, out, _ = await run_command(tmp_path / "wxgpt.toml", "check")
    assert "test.db is not there, and wxgpt is serving → was it deleted?" in unwrapped(
        out
    )


async def test_it_creates_no_database(check, settings):
    """A check before the first start leaves nothing behind."""
    _, out = await check()
    path = pathlib.Path(settings["database"]["path"])
    assert f"{path} will be created at the first start" in out
    assert [file.name for file in path.parent.iterdir()] == ["check.toml"]


async def test_it_ends_with_what_the_console_wants(check, settings):
    """The values are those of the settings, ready to be typed."""
    _, out = await check(public_url="https://127.0.0.1:9")
    assert re.search(r"URL +https://127\.0\.0\.1:9/wechat\n", out)
    assert re.search(rf"Token +{TOKEN}\n", out)
    assert re.search(r"EncodingAESKey +any, made by the form\n", out)
    assert "明文模式" in out and "A personal account has no" in out
    assert "sk-verySecret" not in out


async def test_in_safe_mode_it_ends_with_the_key(check):
    """The key and the mode are those of the settings, and verification passes."""
    safe = {"attempt_timeout": 5, "app_id": "wx0123456789abcdef", "aes_key": "k" * 43}
    _, out = await check(wechat=safe)
    assert bad(out) == []
    assert re.search(r"EncodingAESKey +k{43}\n", out) and "安全模式" in out


REFUSALS = {
    "wrong key": (fails(401), "key: .* status 401 “Incorrect API .* → .*api_key"),
    "no right": (fails(403), "key: .* status 403"),
    "no balance": (fails(402), "balance: status 402 .* → top up"),
    "no quota": (fails(429, code="insufficient_quota"), "balance: "),
    "one country": (fails(403, message="Country not supported"), "country: .*proxy"),
    "unknown model": (fails(404, code="model_not_found"), "model: .*chatgpt.model"),
    "model in words": (fails(400, message="Model Not Exist"), "model: .*Not Exist"),
    "gateway's words": (fails(503, message="对于模型 m 无可用渠道"), "model: .*渠道"),
    "no such path": (
        Script(status=404, body="<p>nginx</p>"),
        "URL: .* “nginx” → .*/v1",
    ),
    "a redirect": (Script(status=302, body="<p>Moved</p>"), "URL: .*status 302"),
    "too many": (fails(429), "limit: status 429"),
    "bad request": (fails(400), "request: .* → .*chatgpt.extra"),
    "overloaded": (fails(503), "provider: .* status 503"),
    "a web page": (Script(ending="eof"), "stream: .* chat API"),
    "thinking only": (Script([Thought("嗯……"), Thought("好")]), ".* without a word → "),
}


@pytest.mark.parametrize("script, line", REFUSALS.values(), ids=REFUSALS)
async def test_what_is_wrong_with_the_model_is_said(check, upstream, script, line):
    """The line begins with what it is, has the upstream's words, and how to mend it."""
    upstream.will(script)
    await assert_found(check(), f"✗ assistant chatgpt: {line}")


async def test_the_key_is_not_shown(check, upstream):
    """Even if the upstream repeats it."""
    upstream.will(fails(401, message="No such key: sk-verySecret\x1b[31m"))
    _, out = await check()
    assert "“No such key: *** [31m”" in out


async def test_a_refused_field_is_left_out_as_when_serving(check, upstream):
    """The question is asked again without it."""
    upstream.will(fails(400, code="unsupported_parameter", param="stream_options"))
    _, out = await check()
    assert bad(out) == [] and len(upstream.requests) == 2


async def test_settings_of_the_environment_are_named(check, upstream, settings):
    """The owner looks for a wrong key where it stands."""
    upstream.will(fails(401))
    del settings["assistants"]["chatgpt"]
    env = {"OPENAI_API_KEY": "sk-x", "OPENAI_BASE_URL": upstream.base_url}
    line = "✗ assistant chatgpt: key: .* → look at OPENAI_API_KEY in the environment"
    await assert_found(check(env=env), line)


THOUGHTS = Script([*(Thought("嗯") for _ in range(50)), "好"])


@pytest.mark.parametrize(
    "host, switch",
    {
        "api.openai.com": 'extra.reasoning_effort = "none"',
        "api.deepseek.com": 'extra.thinking.type = "disabled"',
        "api.moonshot.cn": 'extra.thinking.type = "disabled"',
        "open.bigmodel.cn": 'short: extra.reasoning_effort = "low"',
        "dashscope.aliyuncs.com": "extra.enable_thinking = false",
        "ollama.example:11434": 'extra.reasoning_effort = "none"',
        "gateway.example:4000": "`extra` (docs/models.md)",
    }.items(),
)
async def test_hidden_thinking_is_a_warning(check, upstream, host, switch):
    """It tells the switch of the provider that base_url names."""
    upstream.will(THOUGHTS)
    proxy = upstream.base_url.removesuffix("/v1")
    known = {"chatgpt": {"base_url": f"http://{host}/v1", "proxy": proxy}}
    line = f"! .* s, 51 tokens for 1 characters: .* thinking .*{re.escape(switch)}"
    await assert_found(check(assistants=known), line)


@pytest.mark.parametrize(
    "host, model, advice",
    [
        ("api.moonshot.cn", "kimi-k2.6", "off: extra.thinking"),
        ("api.moonshot.cn", "kimi-k3", "short: extra.reasoning_effort"),
        ("open.bigmodel.cn", "glm-5-turbo", "off: extra.thinking"),
        ("open.bigmodel.cn", "glm-5.2", "off: extra.thinking"),
        ("open.bigmodel.cn", "glm-5.3-flash", "short: extra.reasoning_effort"),
        ("api.z.ai", "glm-6", "short: extra.reasoning_effort"),
        ("api.minimax.io", "MiniMax-M3", "off: extra.thinking"),
        ("api.minimaxi.com", "MiniMax-M3.1-Flash", "short: extra.reasoning_effort"),
        ("api.siliconflow.cn", "deepseek-ai/DeepSeek-V4", "off: extra.enable_thinking"),
    ],
)
def test_the_switch_for_thinking_depends_on_the_model_too(host, model, advice):
    """A provider's models that always think are asked to do so briefly."""
    one = AssistantSettings(base_url=f"https://{host}/v1", api_key="k", model=model)
    assert advice in switch_of(one)


@pytest.mark.parametrize(
    "script",
    [
        says("好", after=0.9),
        Script([Thought("嗯"), 0.9, "好"]),
        Script([Thought("嗯", "reasoning"), 0.9, "好"]),
        Script(["<think>嗯", 0.9, "</think>好"]),
    ],
    ids=["slow", "reasoning_content", "reasoning", "tag"],
)
async def test_a_slow_first_word_is_a_warning(check, upstream, script):
    """What counts is the first word that a subscriber can read."""
    upstream.will(script)
    slow = check(wechat={"attempt_timeout": 1})
    await assert_found(slow, r"! .*first word after .* s → switch thinking off")


@contextlib.asynccontextmanager
async def answering(raw):
    """Answer raw bytes to whatever comes in on loopback; gives the port."""

    async def answer(reader, writer):
        await reader.readuntil(b"\r\n\r\n")
        writer.write(raw)
        writer.close()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
        yield server.sockets[0].getsockname()[1]


def another(settings, **changes):
    """Return assistants with a second one that differs, so that one works."""
    return settings["assistants"] | {"x": {"api_key": "sk-x", "model": "m"} | changes}


@pytest.mark.parametrize(
    "change, line",
    [
        (
            {"base_url": "http://api.invalid/v1"},
            "name: api.invalid does not resolve → .*x.base_url",
        ),
        ({"proxy": "http://proxy.invalid:3128"}, "name: proxy.invalid .* → .*x.proxy"),
        ({"proxy": "http://127.0.0.1:{free}"}, "proxy: .*refused → .*x.proxy"),
        (
            {"base_url": "http://127.0.0.1:{free}/v1"},
            "connection: .*refused → look at assistants.x.base_url",
        ),
    ],
    ids=["name", "proxy's name", "proxy", "port"],
)
async def test_the_step_that_fails_is_named(check, settings, change, line):
    """The one setting to look at is that of the name or port which is wrong."""
    change = {key: url.format(free=free_port()) for key, url in change.items()}
    checking = check(assistants=another(settings, **change))
    await assert_found(checking, f"✗ assistant x: {line}")


@pytest.mark.parametrize(
    "status, line",
    [
        ("407 Proxy Authentication Required", "proxy: it wants a user and a password"),
        ("502 Bad Gateway", "proxy: it does not lead to api.invalid: status 502"),
    ],
)
async def test_a_proxy_that_refuses_is_said(check, settings, status, line):
    """The tunnel to the upstream was not made."""
    raw = f"HTTP/1.1 {status}\r\nContent-Length: 0\r\n\r\n".encode()
    async with answering(raw) as port:
        urls = {"base_url": "https://api.invalid/v1"}
        urls["proxy"] = f"http://user:secret@127.0.0.1:{port}"
        checking = check(assistants=another(settings, **urls))
        await assert_found(checking, f"✗ assistant x: {line} → .*proxy")


async def test_a_port_without_tls_is_said(check, settings, upstream):
    """It was https:// where http:// is spoken."""
    url = upstream.base_url.replace("http", "https")
    line = r"✗ assistant x: TLS: .*speaks no TLS .* → look at .*x.base_url: http://"
    await assert_found(check(assistants=another(settings, base_url=url)), line)


async def test_the_clock_is_asked_through_the_proxy(check, upstream):
    """As the questions are: the upstream may be reached in no other way."""
    proxy = upstream.base_url.removesuffix("/v1")
    hidden = {"chatgpt": {"base_url": "http://api.invalid/v1", "proxy": proxy}}
    _, out = await check(assistants=hidden)
    assert bad(out) == [] and "✓ clock: " in out


async def test_an_upstream_that_is_down_is_said(check):
    """The clock cannot be read from it, and the model cannot be asked."""
    down = {"chatgpt": {"base_url": f"http://127.0.0.1:{free_port()}/v1"}}
    lines = [
        "! clock: not compared",
        "✗ .* connection: .* refused → .*chatgpt.base_url",
    ]
    await assert_found(check(assistants=down), *lines)


async def test_each_assistant_is_asked(check, upstream, settings):
    """A broken one does not hide the others."""
    broken = {"base_url": upstream.base_url, "api_key": "sk-x", "model": "none"}
    upstream.will("好", fails(404))
    checking = check(assistants={"broken": broken})
    await assert_found(checking, r"✗ assistant broken: .*model")


async def test_a_clock_that_is_off_is_said(check):
    """The upstream's Date header is what counts."""

    async def late(request):
        message = {"message": {"content": "好"}, "finish_reason": "stop"}
        date = "Wed, 01 Jan 2020 00:00:00 GMT"
        return web.json_response({"choices": [message]}, headers={"Date": date})

    async with serving(late) as port:
        off = {"chatgpt": {"base_url": f"http://127.0.0.1:{port}/v1"}}
        line = r"✗ clock: \d{9} s ahead of the upstream's → set up NTP"
        await assert_found(check(assistants=off), line)


async def test_a_database_folder_that_is_missing_is_said(check, tmp_path):
    """It is not made, either."""
    path = tmp_path / "none" / "wxgpt.db"
    checking = check(database={"path": str(path)})
    await assert_found(checking, r"✗ database: .*No such file .* make that folder")
    assert not path.parent.exists()


async def test_a_database_folder_that_cannot_be_written_is_said(check, tmp_path):
    """For root, too, once it has no more power than others."""
    folder = tmp_path / "closed"
    folder.mkdir(mode=0o500)
    prefix = []
    if os.geteuid() == 0:
        prefix = ["setpriv", "--bounding-set=-dac_override,-dac_read_search"]
        if subprocess.run([*prefix, "true"], capture_output=True).returncode:
            pytest.skip("setpriv cannot drop a capability here")
    checking = check(prefix=prefix, database={"path": str(folder / "wxgpt.db")})
    await assert_found(checking, r"✗ database: .*denied.*service's user")


async def test_a_database_that_another_program_holds_is_said(check, tmp_path):
    """It is to be let go, its rights are good."""
    path = tmp_path / "held.db"
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as holder:
        holder.execute("BEGIN EXCLUSIVE")
        line = r"✗ database: .*locked → another program"
        await assert_found(check(database={"path": str(path)}), line)


async def test_a_file_that_is_no_database_is_said(check, tmp_path):
    """It is left as it is."""
    path = tmp_path / "notes.db"
    path.write_text("Not a database at all. " * 100)
    checking = check(database={"path": str(path)})
    await assert_found(checking, r"✗ database: .*not a database")
    assert path.read_text().startswith("Not a database")


async def test_a_port_that_another_web_server_holds_is_said(check):
    """It answers, but it is not wxgpt; what else fails has the same reason."""

    async def hello(request):
        return web.Response(text="hello")

    async with serving(hello) as port:
        url = f"http://127.0.0.1:{port}"
        line = r"✗ port: .* not as wxgpt → .*server\.port"
        await assert_found(check(server={"port": port}, public_url=url), line)


async def test_a_port_that_another_program_holds_is_said(check):
    """One that hangs up without a word of HTTP."""
    with socket.create_server(("127.0.0.1", 0), backlog=1) as holder:
        port = holder.getsockname()[1]
        hanging_up = asyncio.create_task(asyncio.to_thread(hang_up, holder))
        url = f"http://127.0.0.1:{free_port()}"
        checking = check(server={"port": port}, public_url=url)
        line = rf"✗ port: cannot listen on .* {port}.*Address already in use"
        try:
            await assert_found(checking, line)
        finally:
            holder.shutdown(socket.SHUT_RDWR)
            await hanging_up


async def test_a_public_url_where_nothing_listens_is_said(check):
    """Refused is refused, from outside too: it is the proxy that is missing."""
    checking = check(public_url=f"http://127.0.0.1:{free_port()}")
    line = (
        r"^✗ verification .*: Connection refused → nothing .*`systemctl status nginx`"
    )
    await assert_found(checking, line)


async def test_a_public_url_that_does_not_answer_is_a_warning():
    """Many machines cannot reach themselves from outside, and only then it times out."""
    grade, fix = reach_fix(TimeoutError(), 443)
    assert grade == "warn" and "try a phone" in fix


async def test_a_public_url_without_a_port_is_as_wechat_wants_it(check):
    """The name alone is wrong then; and that is no matter of the way back in."""
    status, out = await check(public_url="http://wx.invalid")
    assert "✓ public_url: http://wx.invalid\n" in out
    warned = ["! public_url: h", "✗ verification "]
    assert [line[:15] for line in bad(out)] == warned and status == 1
    assert "the name does not resolve → add the name at your domain's DNS" in out


async def test_settings_that_others_can_read_are_a_warning(check, tmp_path):
    """With the command that closes them."""
    path = tmp_path / "check.toml"
    path.touch(0o640)
    _, out = await check()
    found = f"! settings: others on this machine can read {path} → chmod 600 {path}"
    assert bad(out) == [found]


async def test_plain_pushes_over_http_are_a_warning(check):
    """Not over https, and not in safe mode."""
    line = "! public_url: http:// in 明文模式: who is on the way can read pushes and "
    line += "repeat them → https://, or 安全模式 (app_id and aes_key)"
    safe = {"app_id": "wx0123456789abcdef", "aes_key": "a" * 43, "attempt_timeout": 5}
    assert line in (await check(public_url="http://wx.invalid"))[1]
    assert line not in (await check(public_url="https://wx.invalid"))[1]
    assert line not in (await check(public_url="http://wx.invalid", wechat=safe))[1]


@pytest.mark.skipif(os.geteuid() != 0, reason="root alone can serve as root")
async def test_a_server_of_roots_is_a_warning(spawn, check):
    """It is the server's user that counts, not that of the check."""
    port = free_port()
    _, out = await check()
    assert ROOT_LINE not in out
    server, _ = await spawn(server={"port": port}, wechat={"attempt_timeout": 5})
    _, out = await check(public_url=server.url, server={"port": port})
    assert out.count(ROOT_LINE) == 1


@pytest.mark.parametrize("host", ["192.168.1.5", "[::1]", "localhost", "raspberry"])
async def test_an_address_that_is_not_public_is_said(check, host):
    """WeChat's servers are not at home."""
    url = f"http://{host}"
    _, out = await check(public_url=url)
    assert f"✗ public_url: {host.strip('[]')} is not public → WeChat needs" in out


async def test_another_token_than_the_servers_is_said(spawn, check):
    """The settings were changed, and the server still runs with the old ones."""
    server, _ = await spawn()
    changed = {"token": "anotherToken", "attempt_timeout": 5}
    checking = check(
        public_url=server.url, server={"port": server.port}, wechat=changed
    )
    lines = [
        "✗ pushes: the running wxgpt has another token.* → restart it after a change of the settings$"
    ]
    lines += ["✗ verification .* 403, not .* same token. Restart it"]
    await assert_found(checking, *lines)


async def test_a_proxy_that_meets_nobody_is_said(check):
    """The proxy answers in wxgpt's place."""
    async with answering(b"HTTP/1.0 502 Bad Gateway\r\n\r\n") as front:
        url = f"http://127.0.0.1:{front}"
        line = "✗ verification .* 502, not .* is wxgpt running"
        await assert_found(check(public_url=url), line)


async def test_a_proxy_that_buffers_is_said(check):
    """WeChat's requests pass, the live page would not live."""
    port = free_port()
    async with serving(proxy_to(port)) as front:
        url = f"http://127.0.0.1:{front}"
        line = r"✗ live pages: events come all at once → .*buffering"
        await assert_found(check(server={"port": port}, public_url=url), line)


async def test_a_proxy_that_does_not_know_the_path_is_said(check):
    """The answer is another one than wxgpt's; it is told once."""
    port = free_port()
    async with serving(proxy_to(port, "/wechat")) as front:
        url = f"http://127.0.0.1:{front}"
        line = r"✗ verification .* status 404, not .* → the proxy must pass"
        await assert_found(check(server={"port": port}, public_url=url), line)


async def test_a_proxy_that_knows_only_wechats_path_is_said(check):
    """Pages would be missing."""
    port = free_port()
    async with serving(proxy_to(port, "/healthz")) as front:
        url = f"http://127.0.0.1:{front}"
        line = r"✗ live pages: status 404 → the proxy must pass /a/"
        await assert_found(check(server={"port": port}, public_url=url), line)


@pytest.mark.parametrize(
    "error, mend",
    [
        (web.HTTPForbidden(), "status 403, .* a firewall or CDN"),
        (web.HTTPRequestEntityTooLarge(9, 9), "status 413, .* client_max_body_size"),
    ],
    ids=["firewall", "body size"],
)
async def test_a_proxy_that_lets_no_message_pass_is_said(check, error, mend):
    """The console's verification passes: it posts nothing."""
    port = free_port()

    async def refuse_posts(request):
        if request.method == "POST":
            raise error

    async with serving(proxy_to(port, spoiled=refuse_posts)) as front:
        url = f"http://127.0.0.1:{front}"
        line = f"✗ a message to .*: {mend}"
        await assert_found(check(server={"port": port}, public_url=url), line)


async def test_an_answer_too_slow_for_wechat_is_said(check):
    """It comes, but WeChat has hung up."""
    port = free_port()

    async def dawdle(request):
        await asyncio.sleep(0.5)

    async with serving(proxy_to(port, spoiled=dawdle)) as front:
        url, line = f"http://127.0.0.1:{front}", "✗ verification .* WeChat waits 0.4 s"
        short = {"attempt_timeout": 0.4}
        checking = check(server={"port": port}, public_url=url, wechat=short)
        await assert_found(checking, line)


@pytest.mark.parametrize("mode", [{}, SAFE], ids=["plain", "safe"])
async def test_the_message_of_check_is_no_news(spawn, tmp_path, mode):
    """The next check still waits for one of WeChat's."""
    port = free_port()
    changes = {"server": {"port": port}, "public_url": f"http://127.0.0.1:{port}"}
    await spawn(wechat={"attempt_timeout": 5} | mode, **changes)
    for _ in range(2):
        _, out, _ = await run_command(tmp_path / "wxgpt.toml", "check")
        assert "✓ a message to " in out
        assert "! pushes: none since the start of the service" in out


@pytest.mark.parametrize(
    "break_it, line",
    [
        ("PRAGMA user_version = 999", "it is of version 999, .* → wxgpt update"),
        (None, "malformed → put a backup in its place"),
    ],
    ids=["newer", "corrupt"],
)
async def test_a_database_that_keeps_wxgpt_from_starting_is_said(
    check, settings, break_it, line
):
    """The start says it too, but the owner asks `check` why nothing answers."""
    path = pathlib.Path(settings["database"]["path"])
    async with open_store(str(path)):
        pass
    if break_it:
        with contextlib.closing(sqlite3.connect(path)) as db:
            db.execute(break_it)
    else:
        with path.open("r+b") as file:
            file.seek(4096)
            file.write(b"x" * 20_000)
    _, out = await check()
    assert re.search(f"(?m)^✗ database: .*{line}", out), out


@pytest.mark.parametrize(
    "encoding, mark", [("gbk", "√"), ("ascii", "✓"), ("utf-8", "✓")]
)
async def test_a_terminal_of_any_encoding_shows_the_findings(settings, encoding, mark):
    """GBK has Chinese, but no ✓; what is called ASCII is mostly UTF-8."""
    path = pathlib.Path(settings["database"]["path"]).with_name("wxgpt.toml")
    write_settings(path, settings)
    environ = os.environ | {"PYTHONIOENCODING": encoding, "WXGPT_LANG": "zh"}
    command = [sys.executable, str(ROOT / "wxgpt.py"), "check", "--config", str(path)]
    process = await asyncio.create_subprocess_exec(*command, env=environ, stdout=-1)
    out, _ = await process.communicate()
    read = out.decode("gbk" if encoding == "gbk" else "utf-8")
    assert read.startswith(f"{mark} 设置：")


@pytest.mark.parametrize(
    "words, status, told",
    [
        ("check --config FILE >&-", 1, ""),
        ("setup <&-", 2, "without a terminal these options are needed"),
        ("check --config FILE >/dev/full", 1, "wxgpt: No space left on device"),
        ("--help >/dev/full", 1, "wxgpt: No space left on device"),
    ],
)
async def test_a_stream_that_cannot_be_used_is_no_traceback(
    settings, tmp_path, words, status, told
):
    """Closed, or on a full disk."""
    write_settings(tmp_path / "its.toml", settings)
    words = words.replace("FILE", str(tmp_path / "its.toml"))
    command = f"exec {sys.executable} {ROOT}/wxgpt.py {words}"
    process = await asyncio.create_subprocess_shell(command, stderr=-1, cwd=tmp_path)
    _, err = await process.communicate()
    assert process.returncode == status
    assert told in err.decode() and len(err.splitlines()) == bool(told)


async def test_a_redirect_is_no_answer(check):
    """The console wants the echo itself."""

    async def redirect(request):
        raise web.HTTPMovedPermanently("/elsewhere")

    async with serving(redirect) as front:
        status, out = await check(public_url=f"http://127.0.0.1:{front}")
    assert out.count("status 301, not wxgpt's answer") == 1 and status == 1


async def test_settings_that_cannot_be_used_are_one_line(settings, tmp_path):
    """Nothing is tried with them."""
    path = tmp_path / "wxgpt.toml"
    path.write_text(toml(merged(settings, {"wechat": {"token": "?"}})), "utf-8")
    for word in ("check", "stats"):
        status, out, err = await run_command(path, word)
        assert (status, out) == (2, "")
        assert re.fullmatch(r"wxgpt: .*wechat\.token.*\n", err)


@pytest.mark.parametrize("words", ["check", "stats", "stats --json", "check --help"])
async def test_a_closed_pipe_ends_it_quietly(stats, check, tmp_path, words):
    """As in `check | head -1`, also where the last line alone meets nobody."""
    await check(public_url="http://wx.invalid")
    pipe = os.pipe()
    os.close(pipe[0])
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, ROOT / "wxgpt.py", *words.split()),
        *("--config", tmp_path / "check.toml"),
        stdout=pipe[1],
        stderr=asyncio.subprocess.PIPE,
        env=os.environ | {"PYTHONUNBUFFERED": ""},
    )
    os.close(pipe[1])
    _, err = await within(60, f"end of {words}", process.communicate())
    assert (process.returncode, err) == (1, b"")


# Tells which modules of ours a run of the command line has loaded.
LOADED = """
import runpy, sys
try:
    runpy.run_path({program!r}, run_name="__main__")
finally:
    ours = {{n: m for n, m in sys.modules.items() if n.startswith(("owner", "wxgpt"))}}
    print(*sorted(f"{{name}}={{module.__name__}}" for name, module in ours.items()))
"""


@pytest.mark.parametrize(
    ("words", "loaded"),
    [
        (
            "--version",
            [
                "owner.commands=owner.commands",
                "owner.words=owner.words",
                "owner=owner",
                "wxgpt=__main__",
            ],
        ),
        (
            "stats --config wxgpt.toml",
            [
                "owner.commands=owner.commands",
                "owner.layout=owner.layout",
                "owner.service=owner.service",
                "owner.stats=owner.stats",
                "owner.words=owner.words",
                "owner=owner",
                "wxgpt=__main__",
            ],
        ),
    ],
)
def test_what_is_the_owners_is_imported_only_when_asked_for(
    settings, tmp_path, words, loaded
):
    """It imports the server, which is the one that runs and not a second copy."""
    (tmp_path / "wxgpt.toml").write_text(toml(settings), "utf-8")
    code = LOADED.format(program=str(ROOT / "wxgpt.py"))
    ended = subprocess.run(
        [sys.executable, "-c", code, *words.split()],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert ended.stdout.splitlines()[-1].split() == loaded


HEADINGS = {
    "": ["选项：", "命令："],
    "check": ["选项："],
    "update": ["参数：", "选项："],
    "backup": ["参数：", "选项："],
    "setup": ["选项："],
    "demo": ["选项："],
}


@pytest.mark.parametrize("command", HEADINGS)
async def test_the_help_is_chinese(command):
    """The headings with their colon, and each line; all of the usage is explained."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, ROOT / "wxgpt.py", *command.split(), "--help"),
        env=os.environ | {"WXGPT_LANG": "zh", "COLUMNS": "80"},
        stdout=asyncio.subprocess.PIPE,
    )
    out = (await within(30, "end", process.communicate()))[0].decode()
    usage, _, rest = out.partition("\n\n")
    assert usage.startswith("用法：wxgpt.py")
    assert re.findall(r"(?m)^\S+[:：]$", rest) == HEADINGS[command]
    assert re.findall(r"[A-Za-z']+(?: [a-z']+){2,}", rest) == [] and "None" not in rest
    options = re.findall(r"\[?(--?[a-z][a-z-]*|ARCHIVE|FILE(?=\]$))", usage)
    assert [name for name in options if name not in rest] == []


@pytest.mark.parametrize("moment", ["asyncio.events", "aiohttp.web", "markdown_it"])
@pytest.mark.parametrize("words", ["serve", "check", "stats", "--help"])
async def test_an_interrupted_start_ends_quietly(settings, tmp_path, words, moment):
    """Ctrl-C while the modules are imported is heard as soon as it can be."""
    path = tmp_path / "wxgpt.toml"
    path.write_text(toml(settings), "utf-8")
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-X", "importtime", ROOT / "wxgpt.py", words),
        *("--config", path),
        stderr=asyncio.subprocess.PIPE,
    )
    imported = process.stderr.readuntil(f" {moment}\n".encode())
    await within(30, f"import of {moment}", imported)
    process.send_signal(signal.SIGINT)
    err = (await within(30, "end", process.communicate()))[1].decode()
    assert [line for line in err.splitlines() if "import time:" not in line] == []
    assert process.returncode == 128 + signal.SIGINT


# check: certificates


def certificate(folder, days, issuer=None):
    """Make a certificate for loopback; return its file and (name, key) to sign with."""
    key = ec.generate_private_key(ec.SECP256R1())
    text = "wxgpt test authority" if issuer is None else "127.0.0.1"
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])
    signer = issuer or (name, key)
    now = datetime.datetime.now(datetime.UTC)
    host = x509.SubjectAlternativeName(
        [x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
    )
    made = (
        x509.CertificateBuilder(signer[0], name, key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=60))
        .not_valid_after(now + datetime.timedelta(days=days, hours=1))
        .add_extension(x509.BasicConstraints(issuer is None, None), critical=True)
        .add_extension(host, critical=False)
        .sign(signer[1], hashes.SHA256())
    )
    path = folder / f"{text.split()[0]}.pem"
    private = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    path.write_bytes(made.public_bytes(serialization.Encoding.PEM) + private)
    return path, (name, key)


def authority(tmp_path, days):
    """Return a server's TLS with a certificate of so many days, and its issuer's file."""
    folder = tmp_path / "tls"
    folder.mkdir()
    root, issuer = certificate(folder, 365)
    path, _ = certificate(folder, days, issuer)
    tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    tls.load_cert_chain(path)
    return tls, root


@pytest.mark.parametrize(
    "days, is_known, line",
    [
        (90, True, "✓ certificate: good for 90 days\n"),
        (5, True, "! certificate: good for 5 days → see that it is renewed\n"),
        (-3, True, "✗ certificate: certificate has expired → renew it"),
        (
            90,
            False,
            "✗ certificate: unable to get local issuer certificate → the proxy must",
        ),
    ],
    ids=["good", "about to expire", "expired", "unknown issuer"],
)
async def test_the_certificate_is_looked_at(check, tmp_path, days, is_known, line):
    """Its chain must lead to a known authority, and it must not be at its end."""
    tls, root = authority(tmp_path, days)
    port = free_port()
    async with serving(proxy_to(port), tls=tls) as front:
        url = f"https://127.0.0.1:{front}"
        env = {"SSL_CERT_FILE": str(root)} if is_known else {}
        _, out = await check(env=env, server={"port": port}, public_url=url)
    assert line in out
    assert out.count("✓ verification") == 3 and "✗ live pages" in out


@pytest.mark.parametrize(
    "host, days, is_known, line",
    [
        ("127.0.0.1", -3, True, "certificate has expired → is the date here right"),
        ("127.0.0.1", 90, False, "unable to get local issuer .* → .*SSL_CERT_FILE"),
        ("localhost", 90, True, "mismatch.* → look at the host in assistants.x.base_"),
    ],
    ids=["expired", "unknown issuer", "wrong name"],
)
async def test_an_upstreams_certificate_is_looked_at(
    check, settings, tmp_path, host, days, is_known, line
):
    """What is wrong with it is said, and who can mend it."""
    tls, root = authority(tmp_path, days)
    async with serving(proxy_to(0), tls=tls) as port:
        urls = {"base_url": f"https://{host}:{port}/v1"}
        env = {"SSL_CERT_FILE": str(root)} if is_known else {}
        checking = check(env=env, assistants=another(settings, **urls))
        await assert_found(checking, f"✗ assistant x: TLS: {host}: .*{line}")


async def test_an_https_address_where_nothing_listens_is_said_once(check):
    """What would fail for the same reason is not tried."""
    checking = check(public_url=f"https://127.0.0.1:{free_port()}")
    await assert_found(
        checking, r"^✗ certificate: Connection refused → nothing listens"
    )


# check: what an error means, without a provider


def failed(kind="setup", cause=None, detail="some detail", **fields):
    """Make an error of a chat API, raised from a cause."""
    error = ChatError(kind, detail, **fields)
    error.__cause__ = cause
    return error


def answered(status, message="x", code=None):
    """Make the error that a provider's answer means."""
    return make_error(status, {"error": {"message": message, "code": code}}, {})


def unconnected(kind, os_error, host="api.example"):
    """Make one of aiohttp's errors about a connection that was not made."""
    key = ConnectionKey(host, 443, True, True, None, None, None, None)
    return kind(key, os_error)


def untrusted(code, message):
    """Make the error for a certificate that OpenSSL finds wrong."""
    error = ssl.SSLCertVerificationError(1, message)
    error.verify_code, error.verify_message = code, message
    return unconnected(aiohttp.ClientConnectorCertificateError, error)


def refused_by_proxy(status):
    """Make the error for a tunnel that a proxy did not open."""
    info = RequestInfo(
        URL("https://api.example"), "CONNECT", CIMultiDictProxy(CIMultiDict())
    )
    return aiohttp.ClientHttpProxyError(info, (), status=status)


BROKEN, AWAY = "broken", "unreachable"
GAI = socket.gaierror(-2, "Name or service not known")
REFUSED = ConnectionRefusedError(111, "Connection refused")
TOO_DEEP, NO_JSON = RecursionError(), json.JSONDecodeError("no", "<p>", 0)
TLS = ssl.SSLError(1, "wrong version number")
TLS.reason = "WRONG_VERSION_NUMBER"
FINDINGS = {
    "no name": (
        failed(AWAY, unconnected(aiohttp.ClientConnectorDNSError, GAI)),
        "name: api.example does not resolve → look at assistants.x.base_url, and",
    ),
    "no name of a proxy": (
        failed(
            AWAY, unconnected(aiohttp.ClientConnectorDNSError, GAI, "proxy.example")
        ),
        "name: proxy.example does not resolve → look at assistants.x.proxy, and",
    ),
    "expired": (
        failed(AWAY, untrusted(10, "has expired")),
        "TLS: .*has expired → is the",
    ),
    "not valid yet": (
        failed(AWAY, untrusted(9, "not yet")),
        "TLS: .*not yet → is the date",
    ),
    "another host": (
        failed(AWAY, untrusted(62, "bad host")),
        "TLS: .* → look at the host",
    ),
    "another IP": (
        failed(AWAY, untrusted(64, "bad IP")),
        "TLS: .* → look at the host in",
    ),
    "no issuer": (failed(AWAY, untrusted(20, "no issuer")), "TLS: .* → apt install"),
    "no TLS": (
        failed(AWAY, unconnected(aiohttp.ClientConnectorSSLError, TLS)),
        "TLS: api.example: it speaks no TLS there .* → look at .*: http://",
    ),
    "no proxy": (
        failed(AWAY, unconnected(aiohttp.ClientProxyConnectionError, REFUSED)),
        "proxy: api.example: Connection refused → is it running",
    ),
    "password for a tunnel": (
        failed(BROKEN, refused_by_proxy(407)),
        "proxy: it wants a user",
    ),
    "password for a proxy": (failed(status=407), "proxy: it wants a user"),
    "no tunnel": (
        failed(BROKEN, refused_by_proxy(403)),
        "proxy: it does not lead to api.example: status 403 → look at the proxy's",
    ),
    "nobody listens": (
        failed(AWAY, unconnected(aiohttp.ClientConnectorError, REFUSED)),
        "connection: api.example: Connection refused → look at assistants.x.base_url; where",
    ),
    "nobody answers": (
        failed(AWAY, aiohttp.ConnectionTimeoutError()),
        "connection: .* → ",
    ),
    "reset": (
        failed(BROKEN, aiohttp.ClientOSError(104, "x")),
        "connection: .*: Connection reset by peer → ",
    ),
    "hangs up": (
        failed(BROKEN, aiohttp.ServerDisconnectedError()),
        "connection: api.example hangs up .* https://, or another port",
    ),
    "no URL": (
        failed(BROKEN, aiohttp.InvalidURL("x")),
        "URL: no chat API at https://api",
    ),
    "no JSON": (failed(BROKEN, NO_JSON), "URL: no chat API .*some detail → "),
    "deep JSON": (failed(BROKEN, TOO_DEEP), "URL: no chat API .*some detail → "),
    "cut": (
        failed(BROKEN, aiohttp.ClientPayloadError()),
        "stream: some detail → is there",
    ),
    "no end": (failed(BROKEN), "stream: some detail → is there a chat API at https"),
    "in a 200": (failed(BROKEN, status=200, words="x"), "answer: status 200 “x” → try"),
    "402": (answered(402), "balance: status 402 “x” → top up"),
    "quota": (answered(429, code="insufficient_quota"), "balance: status 429"),
    "GLM": (answered(429, "余额", "1113"), "balance: status 429 “余额” →"),
    "limit": (answered(400, code="project_spend_limit_exceeded"), "balance: "),
    "in words": (answered(403, "Insufficient Balance"), "balance: "),
    "plan": (answered(429, "您的套餐用量已耗尽"), "balance: "),
    "country": (answered(403, "Country not supported"), "country: .*proxy"),
    "model": (answered(404, code="model_not_found"), "model: .* not know m: .*x.model"),
    "gateway": (answered(503, "无可用渠道"), "model: "),
    "model, retired": (answered(400, "The model has been retired"), "model: "),
    "401": (answered(401), "key: api.example refuses it: status 401 “x” → look at .*x"),
    "403": (answered(403), "key: "),
    "key in words": (answered(400, "API key expired"), "key: "),
    "302": (answered(302), "URL: no chat API at https://api.example/v1: status 302"),
    "404": (answered(404), "URL: .*: it ends with the version"),
    "405": (answered(405), "URL: "),
    "429": (answered(429), "limit: status 429 “x” → wait"),
    "400": (answered(400), "request: .* → look at assistants.x.extra"),
    "422": (answered(422), "request: "),
    "filtered": (failed("refused", status=400), "request: "),
    "408": (failed("busy", status=408), "provider: "),
    "503": (
        failed("busy", status=503),
        "provider: api.example fails: status 503 → try",
    ),
    "slow": (
        failed("slow", TimeoutError()),
        "time: no word within 60 s → switch thinking",
    ),
}


CONFIG = Config(
    public_url="http://wx.example.com",
    wechat=WeChatSettings(token=TOKEN),
    assistants={
        "x": AssistantSettings(
            base_url="https://api.example/v1",
            proxy="http://proxy.example:3128",
            api_key="sk-x",
            model="m",
        )
    },
    texts=Texts({}),
)


@pytest.mark.parametrize("error, line", FINDINGS.values(), ids=FINDINGS)
def test_an_error_has_its_finding(error, line):
    """By its cause, then by what the provider says, its status, and its kind."""
    found = Doctor(CONFIG, {}).diagnose("x", error)
    assert re.match(line, found) and found.count(" → ") == 1


# check: colour


async def test_marks_have_colour_on_a_terminal_only(check, tmp_path):
    """A pipe gets none."""
    _, out = await check(public_url="http://wx.invalid")
    assert "\033" not in out
    parent, child = pty.openpty()
    command = [sys.executable, ROOT / "wxgpt.py", "check", "--config"]
    command.append(tmp_path / "check.toml")
    process = await asyncio.create_subprocess_exec(*command, stdout=child, stderr=child)
    os.close(child)
    seen = bytearray()
    assert await within(60, "end of check", process.wait()) == 1
    with contextlib.suppress(OSError):  # EIO: the terminal's other end is closed
        while piece := os.read(parent, 4096):
            seen += piece
    os.close(parent)
    assert "\033[32m✓\033[0m settings" in seen.decode()


# stats

BEIJING = datetime.timezone(datetime.timedelta(hours=8))
NOW = time.time()
# openid, age in days, state, tokens in and out, seconds, delivered
ROWS = [
    (ANN, 0, "done", 100, 10, 1.0, "1"),
    (ANN, 0, "done", 100, 10, 2.0, "1"),
    (ANN, 0, "done", 100, 10, 7.0, "2"),
    (ANN, 1, "done", 100, 10, 12.0, "3"),
    (ANN, 1, "failed", None, None, 15.0, None),
    (BOB, 1, "done", 200, 99, 40.0, "part"),
    (BOB, 1, "cut", 200, 99, 60.0, "page"),
    (BOB, 1, "broken", None, None, None, None),
    (BOB, 30, "done", 999, 999, 1.0, "1"),
]


@pytest.fixture
async def database(spawn, settings, tmp_path):
    """A database with known rows; each was asked, then made what ROWS says."""
    server, process = await spawn(wechat={"attempt_timeout": 5})
    for openid in (ANN, BOB):
        await server.ask("/chatgpt", openid)
    for number, row in enumerate(ROWS):
        await server.ask(f"问题 {number}", row[0])
    await process.end()
    path = settings["database"]["path"]
    with contextlib.closing(sqlite3.connect(path)) as db, db:
        for number, (_, age, *values) in enumerate(ROWS, 1):
            query = """UPDATE turn SET created_at = ?, state = ?, tokens_in = ?,
                tokens_out = ?, seconds = ?, delivered = ? WHERE id = ?"""
            db.execute(query, (NOW - age * DAY, *values, number))
    return path


@pytest.fixture
def stats(database, tmp_path):
    """Run `stats`; gives its output."""

    async def start(*words):
        status, out, err = await run_command(tmp_path / "wxgpt.toml", "stats", *words)
        assert (status, err) == (0, "")
        return out

    return start


def ways(**counts):
    """Return how answers were delivered, with the ways that nobody took."""
    names = {f"n{number}": str(number) for number in (1, 2, 3)}
    none = dict.fromkeys(["1", "2", "3", "part", "page", "lost", "none"], 0)
    return none | {names.get(name, name): count for name, count in counts.items()}


async def test_stats_count_by_day_and_by_subscriber(stats):
    """Failures, tokens, seconds and ways of delivery are those of the rows."""
    found = json.loads(await stats("--json"))
    assert [day["questions"] for day in found["days"]] == [5, 3]
    assert (
        found["subscribers"]
        == [
            {
                "openid": ANN[:8] + "…",
                "questions": 5,
                "calls": 5,
                "failures": 1,
                "fallback": 0,
                "tokens_in": 400,
                "tokens_out": 40,
                "cost": 0,
                "median_seconds": 4.5,  # of the answers: the failed one took 15 s
                "p95_seconds": 12.0,
                "delivered": ways(n1=2, n2=1, n3=1, none=1),
            },
            {
                "openid": BOB[:8] + "…",
                "questions": 3,
                "calls": 3,
                "failures": 1,
                "fallback": 0,
                "tokens_in": 400,
                "tokens_out": 198,
                "cost": 0,
                "median_seconds": 50.0,
                "p95_seconds": 60.0,
                "delivered": ways(part=1, page=1, none=1),
            },
        ]
    )
    total = found["total"]
    assert total["questions"] == 8 and total["tokens_in"] == 800
    assert total["delivered"] == ways(n1=2, n2=1, n3=1, part=1, page=1, none=2)


async def test_stats_go_as_far_back_as_asked(stats):
    """Whole openids are shown only with --full, so that one can be denied."""
    found = json.loads(await stats("--days", "60", "--full", "--json"))
    assert [who["openid"] for who in found["subscribers"]] == [ANN, BOB]
    assert [day["questions"] for day in found["days"]] == [1, 5, 3]
    assert json.loads(await stats("--days", "0", "--full", "--json")) == found
    today = json.loads(await stats("--days", "1", "--json"))
    assert [day["questions"] for day in today["days"]] == [3]


async def test_stats_are_tables_for_people(stats):
    """A row a day, a row a subscriber, and what is to be said of reply_margin."""
    out = await stats()
    assert re.search(rf"{ANN[:8]}… +5 +1 +400 +40 +4\.5s +12\.0s\n", out)
    ways = "1st request 2, 2nd 1, 3rd 1, fetched by 继续 1, on a page 1, not fetched 2"
    assert f"\nanswers delivered: {ways}\n" in out.replace("\n  ", " ")
    assert "\nfailures: " in out and "cost" not in out
    assert re.search(
        r"\nslow: 2\S+ \d\d:\d\d, 60\.0 s, gpt-6-luna\nslow: .* 40\.0 s", out
    )
    assert "问题" not in out
    assert ANN not in out and "\033" not in out
    today = datetime.datetime.fromtimestamp(NOW, BEIJING).strftime("%Y-%m-%d")
    assert re.search(rf"{today} +3 +0 +300 +30 +2\.0s +7\.0s", out)
    assert out.endswith(
        "reply_margin 0.8 s fits; 0 of 8 replies met a line that was gone\n"
    )
    assert ANN in await stats("--full")


async def test_the_columns_of_stats_stand_under_their_names(stats):
    """Cells end where the name of their column ends; the last row is the sum."""
    days, subscribers, models, _ = (await stats("--full")).split("\n\n")
    for table in (days, subscribers, models):
        head, *rows = table.splitlines()
        ends = [cell.end() for cell in re.finditer(r"\S+( \S+)*", head)][1:]
        for row in rows:
            assert [row[end - 1].isspace() for end in ends] == [False] * 6
            assert [row[end : end + 1] in ("", " ") for end in ends] == [True] * 6
        assert re.match("all +8 +2 +800 +238 ", rows[-1])


@pytest.mark.parametrize("lang", ["zh", "en"])
async def test_stats_fit_80_columns(stats, lang, monkeypatch, database):
    """Chinese headings stand over their columns, also with whole openids and cost."""
    with contextlib.closing(sqlite3.connect(database)) as db, db:
        db.execute("UPDATE turn SET tokens_in = 123456789, reason = 'busy'")
    monkeypatch.setenv("WXGPT_LANG", lang)
    out = await stats("--full")
    assert max(map(width_of, out.splitlines())) <= 80
    if lang == "zh":
        assert (
            "\n送达：第 1 次请求 2，第 2 次 1，" in out
            and "\n失败：服务商太忙 2\n" in out
        )
        for table in out.split("\n\n")[:3]:
            assert len({width_of(line) for line in table.splitlines()}) == 1


@pytest.mark.parametrize("lang", ["zh", "en"])
async def test_stats_of_many_fit_80_columns(stats, lang, monkeypatch, database):
    """Long names of models are cut, the busiest subscribers stand alone, all is summed."""
    names = ["slow", "unreachable", "busy", "setup", "refused", "long", "blind"]
    with contextlib.closing(sqlite3.connect(database)) as db, db:
        db.row_factory = sqlite3.Row
        db.execute("UPDATE turn SET model = 'a-model/' || hex(zeroblob(40))")
        row = dict(db.execute("SELECT * FROM turn WHERE state = 'failed'").fetchone())
        query = (
            f"INSERT INTO turn ({', '.join(row)}) VALUES ({', '.join('?' * len(row))})"
        )
        for number in range(3000):
            row["id"] = row["msg_key"] = row["link_key"] = 1000 + number
            row |= {"openid": f"o{number % 100:02}", "reason": names[number % 7]}
            db.execute(query, tuple(row.values()))
    monkeypatch.setenv("WXGPT_LANG", lang)
    out = await stats()
    assert max(map(width_of, out.splitlines())) <= 80
    assert "\na-model/0000" in out and "00…  " in out
    people, *_ = [block for block in out.split("\n\n") if block.startswith("openid")]
    assert len(people.splitlines()) == 1 + 20 + 1 + 1  # head, rows, sum, note
    others = {
        "zh": "还有 82 人没有列出，加 --full 看全部",
        "en": "… and 82 more people: --full",
    }
    assert people.endswith(f"\n{others[lang]}")
    if lang == "zh":
        for words in ("太慢 429", "服务商太忙 429", "密钥、余额或设置 429"):
            assert words in out  # none is broken at a line's end
    whole = await stats("--full")
    assert "--full" not in whole and all(f"\no{n:02} " in whole for n in range(100))
    assert len(json.loads(await stats("--json"))["subscribers"]) == 102
    assert await stats("--days", "999999999", "--full")


def row_of(model, tokens=(1_000_000, 500_000), assistant="chatgpt"):
    """Return a row as stats reads it."""
    names = ("tokens_in", "tokens_out", "model", "assistant", "calls", "state")
    row = dict(zip(names, (*tokens, model, assistant, 1, "done"), strict=True))
    return row | {"seconds": 1.0, "delivered": "1"}


def test_an_answer_costs_what_its_writers_model_does():
    """The fallback's answers have its price, and are counted as its own."""
    priced = {
        "chatgpt": SimpleNamespace(
            model="big", fallback="small", price_in=4.0, price_out=8.0
        ),
        "small": SimpleNamespace(
            model="big-mini", fallback="", price_in=1, price_out=2
        ),
    }
    config = SimpleNamespace(assistants=priced)
    rows = [row_of("big-2026"), row_of("big-mini-2026"), row_of(None, (None, None))]
    rows += [row_of("big-mini", assistant="small"), row_of("x", assistant="gone")]
    assert [summarise(config, [row])["cost"] for row in rows] == [8, 2, 0, 2, 0]
    assert [summarise(config, [row])["fallback"] for row in rows] == [0, 1, 0, 0, 0]


async def test_stats_of_no_time_are_one_line(stats, database):
    """Nobody needs a table without rows."""
    with contextlib.closing(sqlite3.connect(database)) as db, db:
        db.execute("UPDATE turn SET created_at = 0")
    assert await stats() == "no questions in that time\n"
    assert json.loads(await stats("--json"))["total"]["questions"] == 0


async def test_the_figures_of_stats_are_documented(stats):
    """Each key of the JSON has its row."""
    found, text = (
        json.loads(await stats("--json")),
        (ROOT / "docs/stats.md").read_text(),
    )
    keys = [*found, *found["days"][0], *found["total"], *found["total"]["delivered"]]
    keys += found["slowest"][0]
    assert [key for key in keys if f"`{key}`" not in text] == []


async def test_stats_say_when_reply_margin_is_too_small(stats, database):
    """A reply that came too late for its line is a reason to raise it."""
    with contextlib.closing(sqlite3.connect(database)) as db, db:
        db.execute("UPDATE turn SET delivered = 'lost' WHERE id = 3")
    out = await stats()
    assert "reply_margin 0.8 s is too small: raise it; 1 of 8 replies" in out


async def test_stats_work_while_the_server_runs(spawn, tmp_path):
    """What was asked a moment ago is counted."""
    server, _ = await spawn(wechat={"attempt_timeout": 5})
    await server.ask("/chatgpt 你好")
    _, out, _ = await run_command(tmp_path / "wxgpt.toml", "stats", "--json")
    total = json.loads(out)["total"]
    assert total["questions"] == 1 and total["delivered"] == ways(n1=1)


async def test_stats_without_a_database_are_one_line(settings, tmp_path):
    """It names the file, creates none, and ends with status 1."""
    path = tmp_path / "wxgpt.toml"
    path.write_text(toml(settings), "utf-8")
    status, out, err = await run_command(path, "stats")
    assert (status, out) == (1, "")
    assert re.fullmatch(r"wxgpt: .*test\.db: wxgpt has not run yet\n", err)
    assert [file.name for file in tmp_path.iterdir()] == ["wxgpt.toml"]


# the installed service: a systemctl of the test's own says what systemd would

SYSTEMCTL = """#!/bin/sh
printf '%s\\n' "LoadState=loaded" "ActiveState={state}" "StateDirectory=" \\
    "Environment=OPENAI_API_KEY=sk-ofTheUnit" "LoadCredential=wxgpt.toml:{settings}"
"""


@pytest.fixture
def installed(tmp_path, monkeypatch, settings):
    """Install a unit with the settings of the test; gives a function that runs wxgpt."""
    programs, elsewhere = tmp_path / "bin", tmp_path / "elsewhere"
    programs.mkdir()
    elsewhere.mkdir()
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")

    async def run(*words, state="inactive", lang="zh", is_raw=False, **changes):
        path, script = tmp_path / "wxgpt.toml", programs / "systemctl"
        own = {"server": {"port": free_port()}, "wechat": {"attempt_timeout": 5}}
        write_settings(path, merged(merged(settings, own), changes))
        script.write_text(SYSTEMCTL.format(state=state, settings=path))
        script.chmod(0o755)
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, ROOT / "wxgpt.py", *words),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            cwd=elsewhere,
            env=os.environ | {"WXGPT_LANG": lang},
        )
        out, err = await within(60, f"end of {words}", process.communicate())
        assert b"Traceback" not in out + err, err.decode()
        out = out.decode() if is_raw else unwrapped(out.decode())
        return process.returncode, out, err.decode()

    run.elsewhere = elsewhere
    return run


async def test_the_services_settings_and_environment_are_found(installed, settings):
    """In any folder, without a word of where they are."""
    del settings["assistants"]
    status, out, _ = await installed("check", public_url="https://wx.invalid")
    assert status == 1 and "✓ 设置：" in out
    assert "sk-ofTheUnit" not in out and "助手 chatgpt" in out


async def test_a_second_settings_file_and_database_are_a_warning(
    installed, settings, tmp_path
):
    """An owner would edit the one and wonder about the other."""
    for name in ("wxgpt.toml", "wxgpt.db"):
        (installed.elsewhere / name).touch()
    pathlib.Path(settings["database"]["path"]).touch()
    _, out, _ = await installed("check", public_url="https://wx.invalid")
    for name, used in (("wxgpt.toml", "wxgpt.toml"), ("wxgpt.db", "test.db")):
        line = f"! 另一个文件：{installed.elsewhere / name} 没有用到，用的是 {tmp_path / used}"
        assert line.replace(" ", "") in out.replace(" ", "")


@pytest.mark.parametrize(
    "state, line",
    {
        "inactive": "没有程序应答：wxgpt 没有运行 → systemctl start wxgpt",
        "failed": "没有程序应答：服务启动不了 → journalctl -u wxgpt -n 20 看原因",
        "activating": "没有程序应答：服务启动不了 → journalctl -u wxgpt -n 20 看原因",
    }.items(),
)
async def test_a_stopped_service_is_a_failure(installed, state, line):
    """Nobody gets an answer, whatever else is right."""
    status, out, _ = await installed("check", state=state)
    assert status == 1 and re.search(f"✗ 端口：\\d+ {line}", out)


async def test_a_socket_that_systemd_keeps_hides_no_failing_service(installed):
    """Nobody else holds the port: the service does not start."""
    with socket.create_server(("127.0.0.1", free_port())) as kept:
        kept.listen(0)
        server = {"port": kept.getsockname()[1]}
        _, out, _ = await installed("check", state="activating", server=server)
    assert re.search(r"✗ 端口：\d+ 没有程序应答：服务启动不了 → journalctl", out)


async def test_without_a_service_a_free_port_is_a_warning(check):
    """Before the first start nothing is broken."""
    _, out = await check(env={"WXGPT_LANG": "zh"})
    assert re.search(r"! 端口：\d+ 没有程序应答：wxgpt 没有运行 → 启动它", out)


# check: what the running service heard


@pytest.fixture
async def running(spawn, tmp_path):
    """Start wxgpt; gives the server, the process, and what `check` says then."""

    async def start(**changes):
        port = free_port()
        own = {"server": {"port": port}, "public_url": f"http://127.0.0.1:{port}"}
        own["wechat"] = {"attempt_timeout": 5}
        server, process = await spawn(**merged(own, changes))

        async def check():
            path, env = tmp_path / "wxgpt.toml", {"WXGPT_LANG": "zh"}
            _, out, _ = await run_command(path, "check", env=env)
            return unwrapped(out)

        return server, process, check

    return start


async def post_wrongly(server, token):
    """Post a message as a WeChat with another token does; it is refused."""
    stamp, nonce = str(int(time.time())), "42"
    query = {"timestamp": stamp, "nonce": nonce}
    query["signature"] = signature_of(token, stamp, nonce)
    async with server.http.post(server.wechat.url, params=query) as response:
        assert response.status == 403


async def test_a_wrong_token_in_the_console_is_told(running):
    """By a line in the log, and by `check`, until a right one has come."""
    server, process, check = await running()
    assert "! 微信的消息：这次启动以来还没有收到 → 给公众号发一条消息" in await check()
    await post_wrongly(server, "anotherToken")
    await process.says("push with a wrong signature")
    line = "微信的消息：收到的消息（或后台的验证）签名不对 → 后台的 Token 要和"
    assert f"✗ {line}" in await check()
    await server.ask("/help")
    assert "✓ 微信的消息：最近一条在 0 分钟前" in await check()


async def test_a_token_that_was_mended_in_the_console_is_no_news(running):
    """What it verified last is what counts; a probe of check's mends nothing."""
    server, process, check = await running()
    await server.wechat.verify(token="anotherToken")
    await process.says("verification with a wrong signature")
    assert "✗ 微信的消息：" in await check()
    assert "✗ 微信的消息：" in await check()
    assert (await server.wechat.verify())[0] == 200
    assert "! 微信的消息：这次启动以来还没有收到" in await check()


async def test_wrong_signatures_are_a_line_a_minute(running):
    """However many a stranger sends; and none for one that has no signature at all."""
    server, process, _ = await running()
    async with server.http.post(server.wechat.url) as response:
        assert response.status == 403
    for _ in range(3):
        await post_wrongly(server, "anotherToken")
    await process.end()
    assert "".join(process.log).count("push with a wrong signature") == 1


async def test_the_probes_of_check_are_no_news(running):
    """A wrong token that the console tries a moment later still leaves its line."""
    server, process, check = await running()
    await check()
    assert (await server.wechat.verify(token="wrong"))[0] == 403
    await process.says("verification with a wrong signature")
    await process.end()
    assert "".join(process.log).count("verification with a wrong signature") == 1
    assert "verified by `check`" in "".join(process.log)
    assert "verified by WeChat's console" not in "".join(process.log)


MODES = {
    "console safe, settings plain": (
        {},
        SAFE,
        "✗ .*后台选的是安全模式，设置里却没有密钥",
    ),
    "settings safe, console plain": (SAFE, {}, "✗ .*设置里是安全模式，后台选的却不是"),
    "another key": (SAFE, SAFE | {"aes_key": "z" * 43}, "✗ .*有一条消息解不开"),
    "another AppID": (SAFE, SAFE | {"app_id": "wx1"}, "✗ .*是给另一个 AppID 的"),
}


@pytest.mark.parametrize("ours, theirs, line", MODES.values(), ids=MODES)
async def test_another_mode_in_the_console_is_told(running, ours, theirs, line):
    """The newest push shows it, to `check` too."""
    server, _, check = await running(wechat=ours)
    async with WeChat(server.wechat.url, TOKEN, **theirs) as wechat:
        push = wechat.text(ANN, "你好")
        with contextlib.suppress(TimeoutError):
            await wechat.post(push)
    assert re.search(line, await check())


async def test_health_says_more_to_check_alone(running):
    """Who cannot sign learns that it runs."""
    server, _, _ = await running()
    assert await server.get(server.url + "/healthz") == (200, '{"status": "ok"}')
    wrong = server.url + "/healthz?signature=00&timestamp=1&nonce=2"
    assert await server.get(wrong) == (200, '{"status": "ok"}')


# check: its words


async def test_check_fits_80_columns(installed):
    """Chinese characters take two; what is longer is a single word, as a path."""
    for lang in ("zh", "en"):
        url = "http://wx.invalid"
        _, out, _ = await installed("check", lang=lang, is_raw=True, public_url=url)
        for line in out.splitlines():
            assert width_of(line) <= 80 or " " not in line.strip()


@pytest.mark.parametrize(
    "text", ["短", "很长的一句话，" * 20, "没有取走 2，" * 30, "a b " * 60, "x" * 200]
)
def test_a_wrapped_line_has_80_columns_and_every_word(text):
    """Only a word that is longer stands out."""
    lines = wrap(text, "  ", "! ").splitlines()
    assert all(width_of(line) <= 80 or "x" * 200 in line for line in lines)
    assert "".join(lines).replace(" ", "") == "!" + text.replace(" ", "")
    assert not any(re.match(r" *[\d，]", line) for line in lines)


async def test_the_last_line_counts_the_findings(installed):
    """So that one sees at a glance how it stands."""
    status, out, _ = await installed("check")
    marks = collections.Counter(line[0] for line in out.splitlines() if line)
    counts = (f"{marks[mark]} {mark}" for mark in "✓!✗")
    assert out.endswith("\n" + "  ".join(counts) + "\n") and status == 1


async def test_it_says_what_it_waits_for(monkeypatch, capsys):
    """Again and again, while nothing else is said."""
    monkeypatch.setattr("owner.check.SILENT_SECONDS", 0.02)
    doctor = Doctor(CONFIG, {})
    doctor.doing = "the moon"
    talking = asyncio.create_task(doctor.keep_talking())
    async with asyncio.timeout(10):
        while capsys.readouterr().out.count("… still waiting: the moon") < 1:
            await asyncio.sleep(0.02)
    talking.cancel()


@contextlib.contextmanager
def black_hole():
    """Give a port where nobody takes a connection up, and nobody refuses it."""
    with contextlib.ExitStack() as stack:
        full = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=0))
        for _ in range(3):
            waiting = stack.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(full.getsockname())
        yield full.getsockname()[1]


@pytest.mark.parametrize("scheme", ["http", "https"])
async def test_it_is_never_silent_for_long(
    monkeypatch, capsys, settings, tmp_path, scheme
):
    """Whatever does not answer, it says that it waits, and for what."""
    monkeypatch.setattr("owner.check.SILENT_SECONDS", 0.05)
    monkeypatch.setattr("owner.check.REACH_SECONDS", 0.5)
    path = tmp_path / "check.toml"
    with black_hole() as port:
        here = f"127.0.0.1:{port}"
        upstream = {"base_url": f"http://{here}/v1", "first_token_timeout": 0.5}
        own = {"server": {"port": free_port()}, "assistants": {"chatgpt": upstream}}
        own |= {"public_url": f"{scheme}://{here}"}
        write_settings(path, merged(settings, own))
        doctor = Doctor(load_config(path), {})
        async with doctor.talking():
            checking = check_all(doctor, doctor.config, str(path))
            await within(60, "end of check", checking)
    out = unwrapped(capsys.readouterr().out)
    assert f"… still waiting: the clock of http://{here}/v1\n" in out
    assert "… still waiting: one word of chatgpt's model, 0 s at most\n" in out
    last = {"http": f"an answer of http://{here}/wechat", "https": "the certificate of"}
    assert f"… still waiting: {last[scheme]}" in out


async def test_an_example_address_is_a_failure(check):
    """It is not even tried, unless its name leads somewhere."""
    line = "✗ public_url: https://wx.example.com is only an example"
    await assert_found(check(public_url="https://wx.example.com"), line)


async def test_only_tls_1_3_is_a_failure(check, tmp_path):
    """WeChat's servers speak 1.2."""
    tls, root = authority(tmp_path, 90)
    tls.minimum_version = ssl.TLSVersion.TLSv1_3
    port = free_port()
    async with serving(proxy_to(port), tls=tls) as front:
        url = f"https://127.0.0.1:{front}"
        changes = {"public_url": url, "server": {"port": port}}
        _, out = await check(env={"SSL_CERT_FILE": str(root)}, **changes)
    assert "✗ TLS: only version 1.3 is spoken → WeChat speaks 1.2" in out


async def test_a_provider_that_sends_no_byte_is_said(check, settings):
    """It is no matter of thinking then."""

    async def say_nothing(reader, writer):
        await reader.read()
        writer.close()

    async with await asyncio.start_server(say_nothing, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        silent = {"base_url": f"http://127.0.0.1:{port}/v1", "first_token_timeout": 0.5}
        checking = check(assistants=another(settings, **silent))
        line = "✗ assistant x: connection: 127.0.0.1:.* sends no byte → is it blocked"
        await assert_found(checking, line)


@pytest.mark.parametrize("size, mark", [("4m", "✗"), ("64m", "!")])
async def test_a_full_disk_is_a_failure(check, tmp_path, size, mark):
    """A nearly full one is a warning."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size},mode=700", "tmpfs", folder]
    if os.getuid() or subprocess.run(mount, stderr=subprocess.DEVNULL).returncode:
        pytest.skip("no tmpfs can be mounted here: run the tests as root")
    try:
        _, out = await check(database={"path": str(folder / "wxgpt.db")})
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)
    assert re.search(f"{mark} database: .* 0.. GB free → make room: `df -h`", out)


def test_all_words_of_the_owner_have_their_chinese():
    """Each text that is given to `tell` or to what calls it is translated."""
    words, missing = read_words(), []
    for name in ("check", "service", "setup", "update", "stats", "demo"):
        tree = ast.parse((ROOT / f"owner/{name}.py").read_text("utf-8"))
        for call in (n for n in ast.walk(tree) if isinstance(n, ast.Call)):
            known = getattr(call.func, "attr", getattr(call.func, "id", ""))
            if known in ("tell", "report", "say", "complain", "UpdateError", "add"):
                texts = [a.value for a in call.args if isinstance(a, ast.Constant)]
                missing += [
                    t for t in texts if t not in words and re.search("[a-z] ", t)
                ]
    found = [*TROUBLES.values(), *(text for row in DOOR for text in row[1:]), OTHER]
    found += HINTS.values()
    found += [fix for _, fix in PROXY_FIXES] + [*CERTIFICATE_FIXES.values(), CONSOLE]
    assert missing + [text for text in found if text not in words] == []


def test_our_own_words_about_a_models_failure_have_their_chinese():
    """What a provider says stays as it says it."""
    tree = ast.parse((ROOT / "wxgpt.py").read_text("utf-8"))
    details = [
        call.args[1].value
        for call in ast.walk(tree)
        if isinstance(call, ast.Call)
        and getattr(call.func, "id", "") == "ChatError"
        and len(call.args) > 1
        and isinstance(call.args[1], ast.Constant)
        and call.args[0].value not in ("picture", "blocked")
    ]
    assert "time limit" in details
    assert [text for text in details if text not in read_words()] == []


CHINESE = {
    "an end": (
        failed("refused", detail="finish_reason content_filter"),
        "回答以 finish_reason content_filter 结束",
    ),
    "no JSON": (
        failed(BROKEN, NO_JSON, detail="an event is not JSON"),
        "回答的格式不是 JSON",
    ),
    "cut": (
        failed(BROKEN, aiohttp.ClientPayloadError(), detail="ClientPayloadError"),
        "回答没传完就断了",
    ),
    "a certificate": (
        failed(AWAY, untrusted(10, "certificate has expired")),
        "证书过期了",
    ),
    "its name": (
        failed(AWAY, untrusted(62, "Hostname mismatch, certificate is not valid for")),
        "证书不是给这个域名的",
    ),
}


@pytest.mark.parametrize("error, words", CHINESE.values(), ids=CHINESE)
def test_a_models_failure_is_told_in_chinese(monkeypatch, error, words):
    """Our own words for it, too."""
    monkeypatch.setenv("WXGPT_LANG", "zh")
    found = Doctor(CONFIG, {}).diagnose("x", error)
    assert words in found and not re.search("[a-z]{3,} [a-z]{3,} [a-z]{3,}", found)


# check: the things that break most often, each in the words that an owner reads


async def broken_model(case, **changes):
    """Check with an assistant that differs."""
    return await case.check(assistants={"chatgpt": changes})


def away(**changes):
    """Return a case whose assistant is asked in vain."""
    return lambda case: broken_model(case, **changes)


def refused(*answers):
    """Return a case whose provider refuses."""

    async def run(case):
        case.upstream.will(*answers)
        return await case.check()

    return run


def moved(url, **changes):
    """Return a case with another public address."""
    return lambda case: case.check(public_url=url, **changes)


async def behind(case, status):
    """Check behind a proxy that answers by itself."""
    async with answering(f"HTTP/1.0 {status} x\r\n\r\n".encode()) as front:
        return await case.check(public_url=f"http://127.0.0.1:{front}")


async def held(case):
    """Check while another program holds the port."""

    async def hello(request):
        return web.Response(text="hello")

    async with serving(hello) as port:
        return await case.check(server={"port": port})


async def self_signed(case):
    """Check with a certificate that nobody knows."""
    tls, root = authority(case.tmp_path, 90)
    tls.load_cert_chain(root)
    async with serving(proxy_to(0), tls=tls) as front:
        return await case.check(public_url=f"https://127.0.0.1:{front}")


# What is broken, and the line it leads to. Stopped services, wrong tokens and modes in
# the console, full disks and silent providers have tests of their own above.
BREAKAGES = {
    "1 key": (refused(fails(401)), "密钥：.* 不认：状态码 401 .* → 检查 .*api_key"),
    "2 model": (refused(fails(404, code="model_not_found")), "模型：.* → 检查 .*model"),
    "3 no version": (
        refused(Script(status=404, body="<p>nginx</p>")),
        "网址：.* 没有聊天接口：.* → 检查 .*base_url：结尾是版本号",
    ),
    "3 dead port": (
        away(base_url="http://127.0.0.1:1/v1"),
        "连接：.*：连接被拒绝 → 检查 assistants.chatgpt.base_url",
    ),
    "8 port": (held, "端口：\\d+ 有应答，但不是 wxgpt → 被别的程序占用（ss -ltnp"),
    "9 wrong port": (lambda case: behind(case, 502), "状态码 502.* → wxgpt 在运行吗"),
    "9 redirect": (lambda case: behind(case, 301), "状态码 301.* → .*写成 https://"),
    "9 other block": (
        lambda case: behind(case, 404),
        "状态码 404.* → 反向代理要把这个域名",
    ),
    "10 no TLS": (
        moved("https://127.0.0.1:1"),
        "证书：连接被拒绝 → 1 端口没有程序在听：反向代理在运行吗",
    ),
    "10 typo": (
        moved("http://wx.invalid"),
        "验证 .*：这个域名解析不了 → 在域名的 DNS 里加一条",
    ),
    "13 no network": (
        away(base_url="http://api.invalid/v1"),
        "域名：api.invalid 解析不了 → 检查 .*这台机器的 DNS",
    ),
    "15 self-signed": (self_signed, "证书：.* → 微信只认公开机构签发的证书"),
}


@pytest.mark.parametrize("run, line", BREAKAGES.values(), ids=BREAKAGES)
async def test_each_breakage_leads_to_its_mend(check, upstream, tmp_path, run, line):
    """A ✗ in Chinese, with what to do."""

    async def in_chinese(**changes):
        return await check(env={"WXGPT_LANG": "zh"}, **changes)

    case = SimpleNamespace(check=in_chinese, upstream=upstream, tmp_path=tmp_path)
    status, out = await run(case)
    assert status == 1 and re.search(rf"(?m)^✗ .*{line}", out), out
