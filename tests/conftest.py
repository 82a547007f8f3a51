"""Fixtures: a fake upstream, the platform, and wxgpt serving on loopback.

Time is counted in UNIT: one attempt lasts so long in tests. A slow machine sets
WXGPT_UNIT; no test asserts that something was fast.
"""

import asyncio
import contextlib
import json
import os
import pathlib
import re
import signal
import sqlite3
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import pytest

import container as machine
import wxgpt
from child import free_port
from fake_openai import FakeOpenAI
from wechat import Seen, WeChat

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # As a shell's background job; what the tests start is to hear Ctrl-C all the same.
    signal.signal(signal.SIGINT, signal.default_int_handler)

UNIT = float(os.environ.get("WXGPT_UNIT", "0.6"))
TOKEN = "secretToken42"
ROOT = pathlib.Path(__file__).parent.parent
PORT = 8080  # in a container
PATIENT = {"attempt_timeout": 30}  # a first attempt outlasts any restart
ANN, BOB = "oAnn7Zt1BvK9mHdLr3PwYc8SgNf2", "oBob7Zt1BvK9mHdLr3PwYc8SgNf2"


def pytest_addoption(parser: pytest.Parser) -> None:
    """Let `--crash-rounds N` say how often test_crash kills the server."""
    parser.addoption("--crash-rounds", type=int, default=5, metavar="N")


def toml(table: dict[str, Any], name: str = "") -> str:
    """Return nested tables as TOML."""
    plain = {k: v for k, v in table.items() if not isinstance(v, dict)}
    lines = [f"[{name}]"] if name else []
    lines += [f"{json.dumps(k)} = {json.dumps(v)}" for k, v in plain.items()]
    for key, value in table.items():
        if isinstance(value, dict):
            lines.append(toml(value, f"{name}.{json.dumps(key)}".lstrip(".")))
    return "\n".join(lines)


def merged(table: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """Return nested tables with the other's values in place of the first's."""
    result = dict(table)
    for key, value in other.items():
        inner = isinstance(value, dict) and isinstance(table.get(key), dict)
        result[key] = merged(table[key], value) if inner else value
    return result


@pytest.fixture
async def upstream() -> AsyncIterator[FakeOpenAI]:
    """A chat API that answers at once unless a test scripts it."""
    async with FakeOpenAI() as fake:
        yield fake


@pytest.fixture
def settings(tmp_path: pathlib.Path, upstream: FakeOpenAI) -> dict[str, Any]:
    """Settings that work, with shrunk time; tests change what they are about."""
    return {
        "public_url": "http://wx.example.com",
        "server": {"port": 0},
        "wechat": {"token": TOKEN, "attempt_timeout": UNIT, "mute_guard": 1000},
        "assistants": {
            "chatgpt": {"base_url": upstream.base_url, "api_key": "sk-verySecret"}
        },
        "database": {"path": str(tmp_path / "test.db")},
    }


@dataclass
class Server:
    """wxgpt as it serves, with the platform pointed at it."""

    port: int
    wechat: WeChat
    http: aiohttp.ClientSession
    services: wxgpt.Services | None = None
    process: asyncio.subprocess.Process | None = None
    log: list[str] = field(default_factory=list)
    posted: dict[int, asyncio.Event] = field(default_factory=dict)
    proxy: str = ""  # the URL of one in front

    @property
    def url(self) -> str:
        """Return where it is reached."""
        return self.proxy or f"http://127.0.0.1:{self.port}"

    def at(self, url: str) -> str:
        """Return a link of a reply as it is reached in the test."""
        return re.sub(r"^https?://[^/]+", self.url, url)

    async def get(self, url: str) -> tuple[int, str]:
        """Return status and text of a page."""
        async with self.http.get(self.at(url)) as response:
            return response.status, await response.text()

    async def ask(self, text: str, openid: str = ANN) -> Seen:
        """Let a subscriber write a text; return what they saw."""
        return await self.wechat.send(openid, text)

    def on_attempt(self, number: int, event: str, seconds: float) -> None:
        """Note that a numbered request was posted, so that a test can wait for it."""
        if event == "posted":
            self.posted.setdefault(number, asyncio.Event()).set()

    def nth_attempt(self, number: int) -> asyncio.Event:
        """Return the event that the numbered request of any message was posted."""
        return self.posted.setdefault(number, asyncio.Event())


@contextlib.asynccontextmanager
async def platform(port: int, proxy: str = "", **options: Any) -> AsyncIterator[Server]:
    """Point a platform at a port, or at the URL of a proxy before it."""
    server = Server(port, None, None, proxy=proxy)
    options = {"attempt_timeout": UNIT, "on_attempt": server.on_attempt} | options
    connector = aiohttp.TCPConnector(**options.get("connection", {}))
    async with (
        WeChat(f"{server.url}/wechat", TOKEN, **options) as server.wechat,
        aiohttp.ClientSession(connector=connector) as server.http,
    ):
        yield server


@pytest.fixture
def stored(settings: dict[str, Any]) -> Callable[[], str]:
    """Return all that the database holds, as text."""

    def stored() -> str:
        with contextlib.closing(sqlite3.connect(settings["database"]["path"])) as db:
            return "\n".join(db.iterdump())

    return stored


@pytest.fixture
def database(settings: dict[str, Any]) -> Callable[..., list]:
    """Run a statement in the database, as an owner could."""

    def run(statement: str, *values: object) -> list:
        path = settings["database"]["path"]
        with contextlib.closing(sqlite3.connect(path, timeout=10)) as db, db:
            return db.execute(statement, values).fetchall()

    return run


@pytest.fixture
async def serve(
    settings: dict[str, Any], tmp_path: pathlib.Path
) -> AsyncIterator[Callable[..., Any]]:
    """Start wxgpt in this process; `await serve(session={"ttl": 9})` changes settings."""
    async with contextlib.AsyncExitStack() as stack:

        async def start(**changes: Any) -> Server:
            path = tmp_path / "wxgpt.toml"
            path.write_text(toml(merged(settings, changes)), "utf-8")
            config = wxgpt.load_config(path)
            opened = wxgpt.open_server(config)
            services, port = await stack.enter_async_context(opened)
            server = await stack.enter_async_context(platform(port))
            server.services = services
            return server

        yield start


class Process:
    """wxgpt as a process of its own, which a test can kill and start again."""

    def __init__(self, path: pathlib.Path, port: int) -> None:
        self.path, self.port = path, port
        self.process: asyncio.subprocess.Process | None = None
        self.log: list[str] = []
        self.reader: asyncio.Task | None = None
        self.news = asyncio.Event()

    async def start(self) -> None:
        """Start it and wait until it serves."""
        before = len(self.log)
        self.process = await asyncio.create_subprocess_exec(
            sys.executable,
            str(ROOT / "wxgpt.py"),
            "--config",
            str(self.path),
            stderr=asyncio.subprocess.PIPE,
            cwd=self.path.parent,
        )
        self.reader = asyncio.create_task(self.read_log(self.process.stderr))
        await self.says("serving on", before)

    async def read_log(self, stream: asyncio.StreamReader) -> None:
        """Keep the log's lines."""
        async for line in stream:
            self.log.append(line.decode())
            self.news.set()

    async def says(self, words: str, since: int = 0) -> None:
        """Wait until a line of the log has these words."""
        async with asyncio.timeout(30):
            while not any(words in line for line in self.log[since:]):
                self.news.clear()
                await self.news.wait()

    async def end(self, number: int = signal.SIGTERM) -> int:
        """Send a signal; return the exit status."""
        if self.process.returncode is None:
            self.process.send_signal(number)
        status = await asyncio.wait_for(self.process.wait(), 30)
        await self.reader
        return status

    async def kill(self) -> None:
        """Kill it as a crash would."""
        await self.end(signal.SIGKILL)


@pytest.fixture
async def spawn(
    settings: dict[str, Any], tmp_path: pathlib.Path
) -> AsyncIterator[Callable[..., Any]]:
    """Start wxgpt as a process; gives the server and the process."""
    async with contextlib.AsyncExitStack() as stack:

        async def start(**changes: Any) -> tuple[Server, Process]:
            changes = merged({"server": {"port": free_port()}}, changes)
            port, path = changes["server"]["port"], tmp_path / "wxgpt.toml"
            path.write_text(toml(merged(settings, changes)), "utf-8")
            process = Process(path, port)
            await process.start()
            stack.push_async_callback(process.kill)
            return await stack.enter_async_context(platform(port)), process

        yield start


@pytest.fixture(scope="session")
def debian() -> Iterator[pathlib.Path]:
    """A folder with Debian and the server's packages; skipped where none can boot."""
    if reason := machine.obstacle():
        pytest.skip(reason)
    with machine.debian_root() as root:
        yield root


@pytest.fixture(scope="module")
def container(debian: pathlib.Path) -> Iterator[machine.Container]:
    """A booted Debian whose loopback is ours."""
    with machine.boot(debian) as booted, booted.network():
        yield booted


@pytest.fixture
async def install(
    container: machine.Container, settings: dict[str, Any]
) -> AsyncIterator[Callable[..., Any]]:
    """Put settings in place; gives the platform and the unit, not yet started."""
    async with contextlib.AsyncExitStack() as stack:

        async def put(**changes: Any) -> tuple[Server, machine.Unit]:
            table = {"server": {"port": PORT}, "database": {"path": ""}}
            table = merged(merged(settings, table), changes)
            write_settings(container, table)
            unit = await stack.enter_async_context(container.follow("wxgpt.service"))
            return await stack.enter_async_context(platform(PORT, **PATIENT)), unit

        yield put


@pytest.fixture
async def start(install: Callable[..., Any]) -> Callable[..., Any]:
    """Start the unit as the README does; `await start(session={"ttl": 9})`."""

    async def started(**changes: Any) -> tuple[Server, machine.Unit]:
        server, unit = await install(**{"wechat": PATIENT} | changes)
        assert await unit.systemctl("enable", "--runtime", "--now") == 0
        return server, unit

    return started


def write_settings(container: machine.Container, table: dict[str, Any]) -> None:
    """Write the settings where LoadCredential finds them, readable for root alone."""
    container.settings.touch(0o600)
    container.settings.write_text(toml(table), "utf-8")
