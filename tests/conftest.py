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
import shutil
import signal
import sqlite3
import ssl
import sys
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import hypothesis
import pytest
from aiohttp import web

import container as machine
import wxgpt
from child import free_port
from fake_openai import FakeOpenAI
from phone import Phone
from waiting import limit, within
from wechat import Seen, WeChat

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # As a shell's background job; what the tests start is to hear Ctrl-C all the same.
    signal.signal(signal.SIGINT, signal.default_int_handler)

hypothesis.settings.register_profile(
    "any machine",
    deadline=None,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("any machine")

# No test is about this machine's disk: where there is room, all is written to memory,
# or whatever else writes to that disk would hold up commits for seconds.
MEMORY = "/dev/shm"
if os.path.isdir(MEMORY) and shutil.disk_usage(MEMORY).free > 2 << 30:
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", MEMORY)

# Most tests read the English of the code; those of the Chinese set another value.
os.environ["WXGPT_LANG"] = "en"

UNIT = float(os.environ.get("WXGPT_UNIT", "1.0"))
TOKEN = "secretToken42"
ROOT = pathlib.Path(__file__).parent.parent
PORT = 8080  # in a container
# A first attempt outlasts any restart.
PEERS_SECONDS = 1800  # to compile llama.cpp
PATIENT: dict[str, Any] = {"attempt_timeout": 30}
ANN, BOB = "oAnn7Zt1BvK9mHdLr3PwYc8SgNf2", "oBob7Zt1BvK9mHdLr3PwYc8SgNf2"
SENTENCE = "春天来了，花都开了，鸟也叫了，人们走出门去看风景。"
LONG = "".join(f"第{n}句：{SENTENCE}\n\n" for n in range(60))  # some four parts


# What needs more than Python: `-m "not system"` leaves it out.
SYSTEM = "bounds browser clock crash demo disk docker hostile owner proxies".split()
SYSTEM += ["restart", "shutdown", "systemd", "update"]
DEBIAN = {
    "docker": "docker",
    "proxies": "debian",
    "systemd": "debian",
}  # groups, of one root


def pytest_addoption(parser: pytest.Parser) -> None:
    """Let options say how often, how many and how long."""
    parser.addoption("--crash-rounds", type=int, default=5, metavar="N")
    parser.addoption("--mutated", type=int, default=10_000, metavar="N")
    parser.addoption("--shape-chars", type=int, default=40_000, metavar="N")


def pytest_xdist_auto_num_workers() -> int:
    """Return how many workers `-n auto` starts: tests wait more than they compute."""
    return min(4 * (os.cpu_count() or 1), 16)


@pytest.hookimpl(tryfirst=True)  # before xdist reads the groups
def pytest_collection_modifyitems(
    config: pytest.Config, items: list[pytest.Item]
) -> None:
    """Mark tests by their files; leave out the peers unless `-m` names them."""
    for item in items:
        name = item.path.stem.removeprefix("test_")
        if name in SYSTEM:
            item.add_marker(pytest.mark.system)
        if name == "browser":  # one Chromium takes a core to itself
            item.add_marker(pytest.mark.xdist_group(name="browser"))
        if name in DEBIAN:
            item.add_marker(pytest.mark.xdist_group(name=DEBIAN[name]))
            item.add_marker(pytest.mark.timeout(machine.BUILD_SECONDS))
        if item.get_closest_marker("peers"):  # the first of them installs and compiles
            item.add_marker(pytest.mark.xdist_group(name="peers"))
            item.add_marker(pytest.mark.timeout(PEERS_SECONDS))
    if "peers" not in config.option.markexpr:
        peers = [item for item in items if item.get_closest_marker("peers")]
        config.hook.pytest_deselected(items=peers)
        items[:] = [item for item in items if item not in peers]
    # The slow ones first: at the end no worker is left alone with one of them.
    items.sort(key=lambda item: not item.get_closest_marker("system"))


TEXTS = wxgpt.read_texts({})


def said(name: str) -> str:
    """Return the longest piece of one of our texts that has nothing filled in."""
    pieces = re.split(r"\{\w+\}|\n", getattr(TEXTS, name))
    return max(pieces, key=len)


def shown(name: str, **values: object) -> str:
    """Return one of our texts as a phone shows it."""
    return getattr(TEXTS, name).format(**values)


def toml(table: dict[str, Any], name: str = "") -> str:
    """Return nested tables as TOML."""
    plain = {k: v for k, v in table.items() if not isinstance(v, dict)}
    lines = [f"[{name}]"] if name else []
    lines += [f"{json.dumps(k)} = {json.dumps(v)}" for k, v in plain.items()]
    for key, value in table.items():
        if isinstance(value, dict):
            lines.append(toml(value, f"{name}.{json.dumps(key)}".lstrip(".")))
    return "\n".join(lines)


def write_settings(path: pathlib.Path, table: dict[str, Any]) -> None:
    """Write settings as an owner should: readable for nobody else."""
    path.touch(0o600)
    path.write_text(toml(table), "utf-8")


def merged(table: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """Return nested tables with the other's values in place of the first's."""
    result = dict(table)
    for key, value in other.items():
        inner = isinstance(value, dict) and isinstance(table.get(key), dict)
        result[key] = merged(table[key], value) if inner else value
    return result


def blocks_of(events: Iterable[dict[str, Any]]) -> str:
    """Return the HTML that a page has after these events of a stream."""
    blocks: list[str] = []
    for data in events:
        if "html" in data:
            blocks[data["keep"] :] = data["html"]
    return "".join(blocks)


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
        "replies": {"outside": ""},  # tests about the hint set it
        "database": {"path": str(tmp_path / "test.db")},
    }


@dataclass
class Server:
    """wxgpt as it serves, with the platform pointed at it."""

    port: int
    wechat: WeChat = field(init=False)  # these two are open as long as `platform`
    http: aiohttp.ClientSession = field(init=False)
    bot: wxgpt.Bot | None = None
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
        async with self.open(url) as page:
            return page.status, await page.text()

    @contextlib.asynccontextmanager
    async def open(
        self, url: str, method: str = "GET", **options: Any
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        """Make a request; what is read of the response has a minute to come."""
        answer = self.http.request(method, self.at(url), **options)
        async with limit(60, f"end of what is read at {url}"), answer as response:
            yield response

    async def ask(self, text: str, openid: str = ANN) -> Seen:
        """Let a subscriber write a text; return what they saw, in three attempts' time."""
        return await self.wechat.send(openid, text)

    def on_attempt(self, number: int, event: str, seconds: float) -> None:
        """Note that a numbered request was posted, so that a test can wait for it."""
        if event == "posted":
            self.posted.setdefault(number, asyncio.Event()).set()

    def nth_attempt(self, number: int) -> asyncio.Event:
        """Return the event that the numbered request of any message was posted."""
        return self.posted.setdefault(number, asyncio.Event())


@contextlib.asynccontextmanager
async def serving(
    handler: Callable[..., Any],
    port: int = 0,
    tls: ssl.SSLContext | None = None,
    **options: Any,
) -> AsyncIterator[int]:
    """Serve every request with one handler on loopback; gives the port."""
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", handler)
    runner = web.AppRunner(app, access_log=None, **options)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", port, ssl_context=tls).start()
    try:
        yield runner.addresses[0][1]
    finally:
        await runner.cleanup()


@contextlib.asynccontextmanager
async def platform(port: int, proxy: str = "", **options: Any) -> AsyncIterator[Server]:
    """Point a platform at a port, or at the URL of a proxy before it."""
    server = Server(port, proxy=proxy)
    options = {"attempt_timeout": UNIT, "on_attempt": server.on_attempt, **options}
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
        return rows(settings["database"]["path"], statement, *values)

    return run


def rows(path: str | pathlib.Path, statement: str, *values: object) -> list[tuple]:
    """Run a statement in any database; return its rows."""
    with contextlib.closing(sqlite3.connect(path, timeout=10)) as db, db:
        return db.execute(statement, values).fetchall()


@pytest.fixture
async def serve(
    settings: dict[str, Any], tmp_path: pathlib.Path
) -> AsyncIterator[Callable[..., Any]]:
    """Start wxgpt in this process; `await serve(session={"ttl": 9})` changes settings."""
    async with contextlib.AsyncExitStack() as stack:

        async def start(**changes: Any) -> Server:
            await stack.aclose()  # the server before this one: a database has one
            path = tmp_path / "wxgpt.toml"
            write_settings(path, merged(settings, changes))
            config = wxgpt.load_config(path)
            opened = wxgpt.open_server(config)
            bot, port = await stack.enter_async_context(opened)
            server = await stack.enter_async_context(platform(port))
            server.bot = bot
            return server

        yield start


@pytest.fixture
def changes() -> dict[str, Any]:
    """Settings that `server` has besides the usual; a file may have its own."""
    return {}


@pytest.fixture
async def server(serve: Callable[..., Any], changes: dict[str, Any]) -> Server:
    """wxgpt with an open session of Ann's."""
    return await with_session(serve, **changes)


@pytest.fixture
def gate() -> Iterator[asyncio.Event]:
    """Hold a model until a test lets it go on, at the latest at its end."""
    gate = asyncio.Event()
    yield gate
    gate.set()


@pytest.fixture
async def phone(server: Server) -> Phone:
    """Ann's phone, signed in to her own pages."""
    phone = Phone(server)
    await phone.sign_in(ANN)
    return phone


async def with_session(serve: Callable[..., Any], **changes: Any) -> Server:
    """Start wxgpt with these settings and open a session of Ann's.

    A given `attempt_timeout` is the platform's, too.
    """
    server = await serve(**changes)
    patience = changes.get("wechat", {}).get("attempt_timeout", UNIT)
    server.wechat.attempt_timeout = patience
    await server.ask("/chatgpt")
    return server


def copy_server(folder: pathlib.Path) -> None:
    """Copy what the server needs to a new folder; `check` and `stats` are left out."""
    shutil.copytree(ROOT / "pages", folder / "pages")
    for name in ("wxgpt.py", "schema.sql", "texts.toml", "providers.toml"):
        shutil.copy(ROOT / name, folder)


@pytest.fixture
def prune_often(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the tests run a copy of the program that deletes old things every moment."""
    folder = tmp_path / "often"
    copy_server(folder)
    program = (folder / "wxgpt.py").read_text("utf-8")
    assert "\nPRUNE_SECONDS = 600.0 " in program
    program = program.replace("\nPRUNE_SECONDS = 600.0 ", "\nPRUNE_SECONDS = 0.2 ")
    (folder / "wxgpt.py").write_text(program, "utf-8")
    monkeypatch.setattr(sys.modules[__name__], "ROOT", folder)


async def run_command(
    path: pathlib.Path,
    *words: str,
    env: dict[str, str] | None = None,
    prefix: Sequence[str] = (),
) -> tuple[int, str, str]:
    """Run the command line to its end; return exit status, stdout and stderr."""
    process = await asyncio.create_subprocess_exec(
        *(*prefix, sys.executable, str(ROOT / "wxgpt.py")),
        *(*words, "--config", str(path)),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        cwd=path.parent,
        env=os.environ | (env or {}),
    )
    out, err = await within(60, f"end of {words}", process.communicate())
    assert b"Traceback" not in out + err, err.decode()
    return await process.wait(), out.decode(), err.decode()


class Process:
    """wxgpt as a process of its own, which a test can kill and start again."""

    def __init__(
        self, path: pathlib.Path, port: int, program: Sequence[str] = ()
    ) -> None:
        self.path, self.port = path, port
        self.program = program or (sys.executable, str(ROOT / "wxgpt.py"))
        self.process: asyncio.subprocess.Process  # once it was started
        self.log: list[str] = []
        self.reader: asyncio.Task[None]
        self.news = asyncio.Event()

    async def start(self) -> None:
        """Start it and wait until it serves."""
        before = len(self.log)
        self.process = await asyncio.create_subprocess_exec(
            *self.program,
            "--config",
            str(self.path),
            stderr=asyncio.subprocess.PIPE,
            cwd=self.path.parent,
        )
        assert self.process.stderr
        self.reader = asyncio.create_task(self.read_log(self.process.stderr))
        await self.says("serving on", before)

    async def read_log(self, stream: asyncio.StreamReader) -> None:
        """Keep the log's lines."""
        async for line in stream:
            self.log.append(line.decode())
            self.news.set()

    async def says(self, words: str, since: int = 0) -> None:
        """Wait until a line of the log has these words."""
        async with limit(30, f"line of the log with {words!r}"):
            while not any(words in line for line in self.log[since:]):
                self.news.clear()
                await self.news.wait()

    async def end(self, number: int = signal.SIGTERM) -> int:
        """Send a signal; return the exit status."""
        if self.process.returncode is None:
            self.process.send_signal(number)
        status = await within(30, f"end after signal {number}", self.process.wait())
        await within(30, "end of the log", self.reader)
        return status

    async def kill(self) -> None:
        """Kill it as a crash would."""
        await self.end(signal.SIGKILL)


@pytest.fixture
async def spawn(
    settings: dict[str, Any], tmp_path: pathlib.Path
) -> AsyncIterator[Callable[..., Any]]:
    """Start wxgpt, or another program, as a process; gives the server and the process."""
    async with contextlib.AsyncExitStack() as stack:

        async def start(
            program: Sequence[str] = (), **changes: Any
        ) -> tuple[Server, Process]:
            changes = merged({"server": {"port": free_port()}}, changes)
            port, path = changes["server"]["port"], tmp_path / "wxgpt.toml"
            write_settings(path, merged(settings, changes))
            process = Process(path, port, program)
            await process.start()
            stack.push_async_callback(process.kill)
            return await stack.enter_async_context(platform(port)), process

        yield start


@pytest.fixture(scope="session")
def debian() -> pathlib.Path:
    """A folder with Debian and the server's packages; skipped where none can boot."""
    if reason := machine.obstacle():
        pytest.skip(reason)
    return machine.debian_root()


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
            write_settings(container.settings, table)
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
