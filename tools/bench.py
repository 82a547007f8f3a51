#!/usr/bin/env python3
"""How fast and how small wxgpt is, beside a handler that keeps nothing.

    python tools/bench.py [--quick] [--json FILE] [--only NAME ...] [--server WXGPT]

The limit is `serve_bare`: aiohttp, xmltodict, one streamed call that the attempts of a
message share, and nothing else. Both servers run in turn as a process of their own;
their processor time and memory are read from /proc. The platform is this process, the
upstream a third one, both lean (tests/sim/lean.py). All on loopback, with WeChat's own five
seconds and three attempts. Out of the way are `at_once`, the quotas and `mute_guard`,
which would turn the load down long before the machine does.

Figures of one run are to be compared with each other, and with no other machine's.
"""

import argparse
import asyncio
import compileall
import contextlib
import importlib.metadata
import itertools
import json
import os
import pathlib
import random
import re
import resource
import secrets
import socket
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import dataclass
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests" / "sim"))

import lean  # noqa: E402
from child import free_port  # noqa: E402
from lean import Delivered, deliver, fetch, get  # noqa: E402

LONG_SECONDS = 90  # for long answers to end after the chat has what it gets
SETTLE = 0.5  # seconds after the last reply, so that storing is counted too
IN_A_ROW = 5  # questions of one subscriber, each with those before as its context
TURNS, SESSION_TURNS = 40, 4  # of a subscriber, of a session, in a filled database
CONFIG = """
public_url = "http://127.0.0.1:{port}"
[server]
port = {port}
[wechat]
token = "{token}"
mute_guard = 1000000
[assistants.chatgpt]
base_url = "{base_url}"
api_key = "sk-bench"
model = "bench"
[session]
ttl = 30000000
[limits]
questions_per_day = 0
all_per_day = 0
at_once = 1000000
[database]
path = "{path}"
"""


# The limit


def serve_bare(port: int, base_url: str, ready: Callable[[], None]) -> None:
    """Serve as little as can answer at all: no session, no store, no signature."""
    import aiohttp
    import xmltodict
    from aiohttp import web

    answers: dict[str, asyncio.Task] = {}
    clients: list[aiohttp.ClientSession] = []

    async def ask(question: str) -> str:
        message = {"role": "user", "content": question}
        body = {"model": "bench", "messages": [message], "stream": True}
        headers, text = {"Authorization": "Bearer sk-bench"}, []
        url = f"{base_url}/chat/completions"
        async with clients[0].post(url, json=body, headers=headers) as response:
            async for line in response.content:
                if line.startswith(b"data: {"):
                    for choice in json.loads(line[6:])["choices"]:
                        text.append(choice["delta"].get("content") or "")
        return "".join(text)

    async def receive(request: web.Request) -> web.Response:
        push = xmltodict.parse(await request.read())["xml"]
        key = push["MsgId"]
        if key not in answers:
            answers[key] = asyncio.create_task(ask(push["Content"]))
            asyncio.get_running_loop().call_later(60, answers.pop, key, None)
        text = await asyncio.shield(answers[key])
        xml = (
            f"<xml><ToUserName><![CDATA[{push['FromUserName']}]]></ToUserName>"
            f"<FromUserName><![CDATA[{push['ToUserName']}]]></FromUserName>"
            f"<CreateTime>{int(time.time())}</CreateTime>"
            "<MsgType><![CDATA[text]]></MsgType>"
            f"<Content><![CDATA[{text}]]></Content></xml>"
        )
        return web.Response(text=xml, content_type="text/xml")

    async def serve() -> None:
        connector = aiohttp.TCPConnector(limit=0)
        clients.append(aiohttp.ClientSession(connector=connector))
        app = web.Application()
        app.router.add_post("/wechat", receive)
        runner = web.AppRunner(app, access_log=None, handler_cancellation=True)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", port, backlog=1024).start()
        ready()
        await asyncio.Event().wait()

    asyncio.run(serve())


# Processes


def say_ready() -> None:
    """Tell who started this process that it serves, as sd_notify(3) does."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as out:
        out.sendto(b"READY=1", os.environ["NOTIFY_SOCKET"])


@dataclass
class Server:
    """A process under way; the figures are those of /proc."""

    pid: int
    port: int
    start_seconds: float  # until it said READY

    def cpu(self) -> float:
        """Return the seconds of processor time used so far, by all threads."""
        stat = pathlib.Path(f"/proc/{self.pid}/stat").read_text()
        user, system = stat.rpartition(")")[2].split()[11:13]
        return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")

    def memory(self, name: str = "VmHWM") -> float:
        """Return a figure of memory in MiB: VmHWM is the peak, VmRSS that of now."""
        status = pathlib.Path(f"/proc/{self.pid}/status").read_text()
        return int(re.findall(rf"{name}:\s+(\d+)", status)[0]) / 1024


@contextlib.asynccontextmanager
async def running(
    folder: pathlib.Path, port: int, *command: object, modules: object = ""
) -> AsyncIterator[Server]:
    """Run a Python program until the block ends, from the moment it says READY."""
    at, loop = folder / f"ready-{port}", asyncio.get_running_loop()
    environ = {k: v for k, v in os.environ.items() if not k.startswith("LISTEN_")}
    environ |= {"NOTIFY_SOCKET": str(at), "PYTHONPATH": str(modules)}
    with (
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notes,
        open(folder / "log", "ab") as log,
    ):
        notes.bind(str(at))
        notes.setblocking(False)
        began = time.monotonic()
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            *map(str, command),
            stderr=log,
            env=environ,
        )
        try:
            async with asyncio.timeout(120):
                while b"READY=1" not in await loop.sock_recv(notes, 1000):
                    pass
            yield Server(process.pid, port, time.monotonic() - began)
        finally:
            if process.returncode is None:
                process.terminate()
            try:
                await asyncio.wait_for(process.wait(), 20)
            except TimeoutError:
                process.kill()
                await process.wait()
            at.unlink()


class Bench:
    """One run: its folder, its upstream, and the rows of its table."""

    def __init__(
        self,
        folder: pathlib.Path,
        upstream: Server,
        program: pathlib.Path,
        is_quick: bool,
    ) -> None:
        self.folder, self.upstream = folder, upstream
        self.program, self.is_quick = program, is_quick
        compileall.compile_file(program, quiet=1)  # as the unit does
        self.base_url = f"http://127.0.0.1:{upstream.port}/v1"
        self.schema = program.with_name("schema.sql").read_text("utf-8")
        self.rows: list[dict[str, Any]] = []
        self.number = 0  # of the newest question

    def wxgpt(self, database: pathlib.Path) -> Any:
        """Run wxgpt on a database."""
        port, path = free_port(), self.folder / "wxgpt.toml"
        values = {"port": port, "token": lean.TOKEN, "path": database}
        path.write_text(CONFIG.format(base_url=self.base_url, **values), "utf-8")
        command = ("-P", "-m", self.program.stem, "--config", path)  # as the unit does
        return running(self.folder, port, *command, modules=self.program.parent)

    def bare(self) -> Any:
        """Run the bare handler."""
        port = free_port()
        roles = ("--role", "bare", "--port", port, "--upstream", self.base_url)
        return running(self.folder, port, __file__, *roles)

    def server(self, name: str, subscribers: int) -> Any:
        """Run one of the two; wxgpt with an open session of each subscriber."""
        if name == "bare":
            return self.bare()
        database = self.folder / f"{secrets.token_hex(4)}.db"
        fill(self.schema, database, subscribers, 0)
        return self.wxgpt(database)

    async def report(self) -> dict[str, Any]:
        """Return what the upstream saw since the last report."""
        raw = await fetch(self.upstream.port, get("/"))
        assert raw, "the upstream does not answer"
        return json.loads(raw)

    def ask(
        self, server: Server, subscriber: int, kind: str, seconds: float
    ) -> Coroutine[Any, Any, Delivered]:
        """Deliver a question that says how it is to be answered."""
        self.number += 1
        text = f"q{self.number} {kind} {seconds:.3f} 周末去哪里走走好？"
        return deliver(server.port, openid_of(subscriber), self.number, text)

    def add(
        self, section: str, name: str, unit: str, wxgpt: float, bare: float | None
    ) -> None:
        """Add a row to the table, and show it."""
        row: dict[str, Any] = {"section": section, "name": name, "unit": unit}
        row |= {"wxgpt": wxgpt, "bare": bare}
        row["ratio"] = wxgpt / bare if bare else None
        self.rows.append(row)
        print(render_row(row), flush=True)

    def add_pairs(self, section: str, runs: dict[str, list[dict[str, float]]]) -> None:
        """Add a row for each figure: the medians of both servers' runs."""
        for key in runs["wxgpt"][0]:
            name, _, unit = key.partition("|")
            both = [
                statistics.median(r[key] for r in runs[n]) for n in ("wxgpt", "bare")
            ]
            self.add(section, name, unit, *both)


def render_row(row: dict[str, Any]) -> str:
    """Return a line of the table."""
    cells = [row["wxgpt"], row["bare"], row["ratio"]]
    texts = ["-" if cell is None else f"{cell:,.{digits(cell)}f}" for cell in cells]
    columns = "".join(f" | {text:>10}" for text in texts)
    return f"| {row['section']:<22} | {row['name']:<31} | {row['unit']:<5}{columns} |"


def digits(value: float) -> int:
    """Return how many decimals are worth printing."""
    return 0 if value == int(value) or value >= 1000 else 1 if value >= 100 else 3


# The database


def openid_of(number: int) -> str:
    """Return a subscriber's openid."""
    return f"oBench{number:022d}"


FILL = """
WITH RECURSIVE n(i) AS (SELECT 0 UNION ALL SELECT i + 1 FROM n WHERE i + 1 < :count)
"""
FILL_SESSIONS = """
INSERT INTO session (id, openid, assistant, opened_at, last_at, ended_at)
SELECT i + 1, printf('oBench%022d', i % :subscribers), 'chatgpt', :now - :count + i,
       :now, iif(i + :subscribers < :count, :now - :count + i, NULL) FROM n
"""
FILL_TURNS = """
INSERT INTO turn (session_id, openid, msg_key, link_key, question, answer, state,
    asked, replied, delivered, created_at, finished_at, model, tokens_in, tokens_out,
    seconds, first_seconds)
SELECT i / :each + 1, printf('oBench%022d', i / :each % :subscribers),
    printf('oBench%022d %d', i / :each % :subscribers, 10000000000000000 + i),
    lower(hex(randomblob(11))), '周末去哪里走走好？', :answer, 'done', 1, 1, '1',
    :now - (:count - i) * 3.0, :now - (:count - i) * 3.0 + 2, 'bench', 60, 20, 2.5, 0.8
FROM n
"""
FILL_REPLIES = """
INSERT INTO reply (key, openid, content, created)
SELECT printf('oBench%022d %d', i, 10000000000000000 + i), printf('oBench%022d', i),
    :answer, :now - :count + i FROM n
"""


def fill(schema: str, path: pathlib.Path, subscribers: int, exchanges: int) -> None:
    """Make a database with exchanges, in which each subscriber has an open session.

    With exchanges, there are as many subscribers as have TURNS each.
    """
    count = exchanges // TURNS or subscribers
    values: dict[str, object] = {"now": int(time.time()), "subscribers": count}
    values |= {"each": SESSION_TURNS, "answer": lean.SHORT * 3}
    sessions = exchanges // SESSION_TURNS or count
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as db:
        for pragma in (
            "journal_mode = WAL",
            "synchronous = OFF",
            "cache_size = -400000",
        ):
            db.execute(f"PRAGMA {pragma}")
        db.executescript(schema)
        steps = len(re.findall(r"(?m)^-- step \d+$", schema))
        db.execute(f"PRAGMA user_version = {steps}")
        db.execute(FILL + FILL_SESSIONS, values | {"count": sessions})
        if exchanges:
            db.execute(FILL + FILL_TURNS, values | {"count": exchanges})
            db.execute(FILL + FILL_REPLIES, values | {"count": min(exchanges, 2000)})


# 1. Subscribers who ask and wait


def quantile(values: list[float], share: float) -> float:
    """Return the value below which this share of the values lies."""
    return sorted(values)[int(share * (len(values) - 1))] if values else float("nan")


async def settle(server: Server) -> None:
    """Wait until what follows the replies is done."""
    await asyncio.sleep(SETTLE)


async def wait_in_chat(
    bench: Bench, name: str, subscribers: int, within: float, slowest: float
) -> dict[str, float]:
    """Let subscribers ask within some seconds; return the figures."""
    chance = random.Random(subscribers)  # the same questions for both
    async with bench.server(name, subscribers) as server:
        await bench.report()
        resting, cpu = server.memory("VmRSS"), server.cpu()

        async def subscribe(number: int) -> Delivered:
            delay = chance.uniform(0.5, slowest)
            await asyncio.sleep(within * number / subscribers)
            return await bench.ask(server, number, "short", delay)

        seen = await asyncio.gather(*map(subscribe, range(subscribers)))
        await settle(server)
        cpu, peak = server.cpu() - cpu, server.memory()
        report = await bench.report()
    answered = [d for d in seen if d.is_answered]
    ended = report["ended"]
    added = [1000 * (d.ended - ended[d.name]) for d in answered if d.name in ended]
    return {
        "answered in chat|%": 100 * len(answered) / subscribers,
        "left without any reply|%": 100
        * sum(d.body is None for d in seen)
        / subscribers,
        "upstream calls per message|": sum(report["calls"].values()) / subscribers,
        "processor time per message|ms": 1000 * cpu / subscribers,
        "added delay, median|ms": quantile(added, 0.5),
        "added delay, p99|ms": quantile(added, 0.99),
        "peak memory|MiB": peak,
        "memory per subscriber|KiB": 1024 * (peak - resting) / subscribers,
    }


async def measure_waiting(bench: Bench) -> None:
    """Measure 1 to 5,000 subscribers, the servers in turn."""
    sizes = [(1, 2, 2, 1), (100, 2, 12, 1), (1000, 2, 12, 3), (5000, 10, 12, 1)]
    if bench.is_quick:
        sizes = [(1, 1, 1, 1), (50, 1, 6, 1)]
    for subscribers, within, slowest, rounds in sizes:
        runs: dict[str, list[dict[str, float]]] = {"wxgpt": [], "bare": []}
        for name in ("wxgpt", "bare") * rounds:
            figures = await wait_in_chat(bench, name, subscribers, within, slowest)
            runs[name].append(figures)
        bench.add_pairs(f"1. {subscribers} in {within} s", runs)


# 2. Short answers as fast as they go


async def keep_asking(
    bench: Bench, server: Server, lanes: int, messages: int
) -> list[Delivered]:
    """Let subscribers ask one question after another, a few each."""
    seen = []

    async def lane(number: int) -> None:
        for count in range(messages // lanes):
            subscriber = number + lanes * (count // IN_A_ROW)
            seen.append(await bench.ask(server, subscriber, "short", 0))

    await asyncio.gather(*map(lane, range(lanes)))
    return seen


async def ask_fast(bench: Bench, name: str, lanes: int, messages: int) -> dict:
    """Ask as fast as answers come; return the figures."""
    async with bench.server(name, messages) as server:
        await keep_asking(bench, server, lanes, 2 * lanes)  # warm
        cpu, began = server.cpu(), time.monotonic()
        seen = await keep_asking(bench, server, lanes, messages)
        seconds = time.monotonic() - began
        await settle(server)
        cpu = server.cpu() - cpu
    return {
        "answered in chat|%": 100 * sum(d.is_answered for d in seen) / len(seen),
        "messages per second|": len(seen) / seconds,
        "messages per second of a core|": len(seen) / cpu,
        "processor time per message|ms": 1000 * cpu / len(seen),
    }


async def measure_short(bench: Bench) -> None:
    """Measure short answers, fifty at a time."""
    rounds, messages = (1, 250) if bench.is_quick else (3, 1000)
    runs: dict[str, list[dict[str, float]]] = {"wxgpt": [], "bare": []}
    for name in ("wxgpt", "bare") * rounds:
        runs[name].append(await ask_fast(bench, name, 50, messages))
    bench.add_pairs("2. short, 50 at a time", runs)


# 3. Long answers and their pages


async def view(server: Server, body: bytes | None) -> int:
    """Follow the live page that a reply links to, to its end; return its events."""
    key = re.search(rb"/a/([\w-]+)", body or b"")
    if not key:
        return 0
    events = await fetch(server.port, get(f"/a/{key[1].decode()}/events"), 120)
    return (events or b"").count(b"\n\n")


async def keep_pinging(server: Server, waits: list[float]) -> None:
    """Let another subscriber send a command ten times a second; note what it waits."""
    for number in itertools.count(10**9):  # far from the numbers of the questions
        began = time.monotonic()
        await deliver(server.port, openid_of(number), number, "/help")
        waits.append(1000 * (time.monotonic() - began))
        await asyncio.sleep(0.1)


async def write_long(
    bench: Bench, name: str, count: int, viewers: int
) -> dict[str, Any]:
    """Let long answers be written, the first of them watched; return the figures."""
    share = 0.2 if bench.is_quick else 1.0  # of the 20 KB
    waits: list[float] = []
    async with bench.server(name, count) as server:
        await bench.report()
        cpu = server.cpu()

        async def read(number: int) -> int:
            seen = await bench.ask(server, number, "long", share)
            return await view(server, seen.body) if number < viewers else 0

        limit = 0 if name == "bare" else LONG_SECONDS  # it knows no commands
        pinging = asyncio.create_task(
            asyncio.wait_for(keep_pinging(server, waits), limit)
        )
        events = await asyncio.gather(*map(read, range(count)))
        ended: dict[str, float] = {}
        for _ in range(LONG_SECONDS):  # what nobody watches is written to its end, too
            report = await bench.report()
            ended |= report["ended"]
            if len(ended) == count:
                break
            await asyncio.sleep(1)
        pinging.cancel()
        await settle(server)
        cpu, peak = server.cpu() - cpu, server.memory()
    tokens = int(share * report["tokens"])
    figures = {"cpu": cpu, "peak": peak, "events": sum(events), "tokens": tokens}
    return figures | {"waits": waits}


async def measure_long(bench: Bench) -> None:
    """Measure answers of 20 KB, without and with all of them watched."""
    count, section = (10 if bench.is_quick else 200), "3. 20 KB, 100 tokens/s"
    bare = await write_long(bench, "bare", count, 0)
    alone = await write_long(bench, "wxgpt", count, 0)
    seen = await write_long(bench, "wxgpt", count, count)
    tokens = count * bare["tokens"]
    pair = [1e6 * run["cpu"] / tokens for run in (alone, bare)]
    bench.add(section, "processor time per token", "µs", *pair)
    bench.add(section, "peak memory", "MiB", alone["peak"], bare["peak"])
    extra = 1000 * (seen["cpu"] - alone["cpu"]) / count
    bench.add(section, "processor time per viewer", "ms", extra, None)
    bench.add(section, "events per viewer", "", seen["events"] / count, None)
    for run, name in ((alone, "nobody views"), (seen, "all are viewed")):
        for part, words in ((0.5, "median"), (0.99, "99 %")):
            wait = quantile(run["waits"], part)
            bench.add(
                section, f"a command meanwhile, {name}, {words}", "ms", wait, None
            )


# 4. Much stored


async def timed(work: Coroutine) -> tuple[float, Any]:
    """Return how many milliseconds a coroutine took, and what it returned."""
    began = time.monotonic()
    result = await work
    return 1000 * (time.monotonic() - began), result


def run_stats(bench: Bench) -> float:
    """Return the seconds that `stats` takes."""
    command = [sys.executable, str(bench.program), "stats", "--json", "--config"]
    began = time.monotonic()
    path = bench.folder / "wxgpt.toml"
    subprocess.run([*command, str(path)], check=True, stdout=subprocess.DEVNULL)
    return time.monotonic() - began


async def use_stored(bench: Bench, database: pathlib.Path) -> dict[str, float]:
    """Start on a filled database, ask and read; return the figures."""
    key = secrets.token_urlsafe(16)
    with contextlib.closing(sqlite3.connect(database)) as db:
        row = (key, openid_of(7), time.time(), time.time() + 3600)
        db.execute("INSERT INTO history_link VALUES (?, ?, ?, ?)", row)
        db.commit()
    async with bench.wxgpt(database) as server:
        await keep_asking(bench, server, 5, 25)
        await asyncio.sleep(1)  # pruning ends
        cpu, pages = server.cpu(), []
        seen = []
        for _ in range(1 if bench.is_quick else 4):
            seen += await keep_asking(bench, server, 5, 100)
        await settle(server)
        cpu = server.cpu() - cpu
        before = server.cpu()
        for _ in range(30 if bench.is_quick else 100):
            pages.append(await timed(fetch(server.port, get(f"/h/{key}"))))
        assert all(body and "周末".encode() in body for _, body in pages)
        assert all(delivered.is_answered for delivered in seen)
        page_cpu = server.cpu() - before
    return {
        "a question, processor time|ms": 1000 * cpu / len(seen),
        "a question, median|ms": quantile(
            [1000 * (d.ended - d.began) for d in seen], 0.5
        ),
        "a history page, processor time|ms": 1000 * page_cpu / len(pages),
        "a history page, median|ms": quantile([ms for ms, _ in pages], 0.5),
        "start|s": server.start_seconds,
        "`stats` of a week|s": run_stats(bench),
    }


async def measure_stored(bench: Bench) -> None:
    """Measure databases of several sizes; beside them stands the smallest, not bare.

    The best of three counts: what a neighbour takes from the machine only adds.
    """
    sizes = (1000, 10_000) if bench.is_quick else (1000, 100_000, 1_000_000)
    rounds = 1 if bench.is_quick else 3
    databases = {size: bench.folder / f"stored-{size}.db" for size in sizes}
    runs: dict[int, list[dict[str, float]]] = {size: [] for size in sizes}
    for size, database in databases.items():
        await asyncio.to_thread(fill, bench.schema, database, 0, size)
    for size in sizes * rounds:
        runs[size].append(await use_stored(bench, databases[size]))
    for size in sizes:
        for key in runs[size][0]:
            name, _, unit = key.partition("|")
            both = [min(r[key] for r in runs[s]) for s in (size, sizes[0])]
            smallest = None if size == sizes[0] else both[1]
            bench.add(f"4. {size} stored", name, unit, both[0], smallest)
        databases[size].unlink()


# 5. Idle


def environment_size() -> float:
    """Return the MiB of the packages that requirements.txt asks for, and of theirs."""
    text = (ROOT / "requirements.txt").read_text("utf-8")
    names, known, size = re.findall(r"(?m)^[\w-]+", text), set(), 0
    while names:
        name = re.sub("[-_.]+", "-", names.pop()).lower()
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            if name not in known:
                package = importlib.metadata.distribution(name)
                wanted = (r for r in package.requires or () if "extra ==" not in r)
                names += [re.split(r"[^\w.-]", r, maxsplit=1)[0] for r in wanted]
                paths = (pathlib.Path(file.locate()) for file in package.files or ())
                size += sum(path.stat().st_size for path in paths if path.exists())
        known.add(name)
    return size / 2**20


async def rest(bench: Bench, name: str, seconds: float) -> dict[str, float]:
    """Let a server do nothing; return the figures."""
    starts = []
    for _ in range(0 if bench.is_quick else 4):
        async with bench.server(name, 1) as server:
            starts.append(server.start_seconds)
    async with bench.server(name, 1) as server:
        await asyncio.sleep(1)
        cpu = server.cpu()
        await asyncio.sleep(seconds)
        per_minute = 1000 * (server.cpu() - cpu) * 60 / seconds
        starts.append(server.start_seconds)
        memory = server.memory("VmRSS")
    return {
        "memory|MiB": memory,
        "processor time per minute|ms": per_minute,
        "start-up to READY|s": statistics.median(starts),
    }


async def measure_idle(bench: Bench) -> None:
    """Measure both servers with nothing to do, and what is installed."""
    seconds = 2 if bench.is_quick else 20
    runs = {name: [await rest(bench, name, seconds)] for name in ("wxgpt", "bare")}
    bench.add_pairs("5. idle", runs)
    bench.add("5. idle", "installed packages", "MiB", environment_size(), None)


MEASURES = {
    "waiting": measure_waiting,
    "short": measure_short,
    "long": measure_long,
    "stored": measure_stored,
    "idle": measure_idle,
}


async def run_bench(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Run what is asked for; return the rows of the table."""
    with tempfile.TemporaryDirectory(prefix="wxgpt-bench-") as name:
        folder, port = pathlib.Path(name), free_port()
        command = (__file__, "--role", "upstream", "--port", port)
        async with running(folder, port, *command) as upstream:
            bench = Bench(folder, upstream, arguments.server, arguments.quick)
            for title in arguments.only or MEASURES:
                await MEASURES[title](bench)
    return bench.rows


def make_parser() -> argparse.ArgumentParser:
    """Return the command line's parser."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="see that it works")
    parser.add_argument("--json", metavar="FILE", help="write the rows there, too")
    parser.add_argument("--only", nargs="+", choices=MEASURES, metavar="NAME")
    parser.add_argument(
        "--server",
        type=pathlib.Path,
        default=ROOT / "wxgpt.py",
        help="the wxgpt.py, with its files beside it",
    )
    parser.add_argument("--role", help=argparse.SUPPRESS)  # of the other processes
    parser.add_argument("--port", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--upstream", help=argparse.SUPPRESS)
    return parser


def machine() -> str:
    """Return what ran this, in general words."""
    version = ".".join(map(str, sys.version_info[:3]))
    load = " ".join(f"{x:.1f}" for x in os.getloadavg())
    kind = f"{os.cpu_count()} cores {os.uname().machine}, Python {version}"
    return f"{kind}, SQLite {sqlite3.sqlite_version}, load average {load}"


def main() -> None:
    """Run the benchmark, or one of its other processes."""
    arguments = make_parser().parse_args()
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    if arguments.role == "bare":
        return serve_bare(arguments.port, arguments.upstream, say_ready)
    if arguments.role == "upstream":
        return asyncio.run(lean.serve_upstream(arguments.port, say_ready))
    before = machine()
    print(f"{before}; at_once, quotas and mute_guard out of the way\n")
    names = ("wxgpt", "bare", "ratio")
    print(
        f"| {'':<22} | {'':<31} | {'':<5}"
        + "".join(f" | {n:>10}" for n in names)
        + " |"
    )
    print("|---|---|---|--:|--:|--:|")
    rows = asyncio.run(run_bench(arguments))
    print(f"\nAfterwards: {machine()}")
    if arguments.json:
        text = json.dumps(
            {"machine": before, "rows": rows}, ensure_ascii=False, indent=1
        )
        pathlib.Path(arguments.json).write_text(text + "\n", "utf-8")


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        main()
