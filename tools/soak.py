#!/usr/bin/env python3
"""Ten minutes of mixed traffic with faults against a real process; is it flat?

    python tools/soak.py --minutes 10 [--subscribers 50]

Every minute the traffic pauses until the server has nothing to do any more; then its
memory, open files and threads are read from /proc. Exit status 1 if they grow: at the
end more than three files, or a tenth and 6 MiB of memory, above the first pause (the
first minute warms up), more threads than its pools may have; or if the process ended or
logged a traceback.
"""

import argparse
import asyncio
import contextlib
import logging
import os
import pathlib
import random
import sqlite3
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / name) for name in ("tests/sim", "tests", "")]

import aiohttp  # noqa: E402

from conftest import TOKEN, Process, free_port, toml  # noqa: E402
from fake_openai import Ending, FakeOpenAI, Script, fails, says, split  # noqa: E402
from wechat import Seen, WeChat  # noqa: E402

ATTEMPT = 0.8  # seconds
# A delivery is remembered for four times three attempts; an upstream's connection is
# kept for 15 seconds, and aiohttp looks every 15; then nothing is left to do.
PAUSE = max(4 * 3 * ATTEMPT, 30) + 2
TRAFFIC = 60 - PAUSE - 5  # seconds of each minute; the rest lets questions end
SPARE_FILES, SPARE_MEMORY = 3, 6.0  # MiB, beside a tenth
# The loop, SQLite, and the executor that renders pages, which fills up by and by.
MOST_THREADS = 2 + min(32, (os.cpu_count() or 1) + 4)
LONG = "".join(
    f"第{n}句：春天来了，花都开了，鸟也叫了，人们去看风景。\n\n" for n in range(60)
)
FAULTS: tuple[Ending, ...] = ("eof", "cut", "bad json", "error", "reset", "hang")


def script_for(question: str) -> Script:
    """Return a random fate of a question; the kind is its last character."""
    if question.endswith("长"):
        return Script(split(LONG, 1.0), rate=400)
    if question.endswith("慢"):
        return says(f"{question}：想了很久。", after=random.uniform(0, 4 * ATTEMPT))
    if question.endswith("坏"):
        broken = Script("写到一半，" * 20, ending=random.choice(FAULTS))
        refusal = fails(random.choice((400, 401, 429, 500, 503)), retry_after=0.1)
        return random.choice((broken, refusal, Script(headless=True, ending="reset")))
    return Script(f"**{question}**：好的。\n\n| 一 | 二 |\n|---|---|\n| 三 | 四 |")


@dataclass
class Sample:
    """What /proc says of a process."""

    memory: float  # MiB
    files: int
    threads: int

    @classmethod
    def of(cls, pid: int) -> "Sample":
        """Read it now."""
        folder = pathlib.Path(f"/proc/{pid}")
        status = (folder / "status").read_text()
        fields = dict(line.split(":", 1) for line in status.splitlines())
        memory = int(fields["VmRSS"].split()[0]) / 1024
        return cls(memory, len(os.listdir(folder / "fd")), int(fields["Threads"]))

    def outgrows(self, other: "Sample") -> list[str]:
        """Return what has grown beyond what the other allows."""
        most = {
            "memory": other.memory * 1.1 + SPARE_MEMORY,
            "files": other.files + SPARE_FILES,
            "threads": MOST_THREADS,
        }
        return [name for name, limit in most.items() if getattr(self, name) > limit]


def has_open_turns(database: pathlib.Path) -> bool:
    """Say whether a question is still being answered."""
    with contextlib.closing(sqlite3.connect(database)) as db:
        query = "SELECT 1 FROM turn WHERE state = 'open' LIMIT 1"
        return db.execute(query).fetchone() is not None


@dataclass
class Traffic:
    """Subscribers who write, tap, read, and misbehave while `open` is set."""

    wechat: WeChat
    http: aiohttp.ClientSession
    url: str
    open: asyncio.Event = field(default_factory=asyncio.Event)
    busy: int = 0  # subscribers in the middle of something
    did: Counter = field(default_factory=Counter)
    faults: Counter = field(default_factory=Counter)  # why fault texts were seen

    async def live(self, openid: str) -> None:
        """Do one thing after another, for ever."""
        kinds = [getattr(self, name) for name in dir(self) if name.startswith("do_")]
        while True:
            await self.open.wait()
            action = random.choice(kinds)
            self.busy += 1
            with contextlib.suppress(aiohttp.ClientError, OSError, TimeoutError):
                await action(openid)
            self.busy -= 1
            self.did[action.__name__.removeprefix("do_")] += 1
            await asyncio.sleep(random.uniform(0.05, 0.5))

    async def quiet(self, database: pathlib.Path) -> None:
        """Stop the traffic and wait until the server has forgotten it."""
        self.open.clear()
        while self.busy or has_open_turns(database):
            await asyncio.sleep(0.2)
        await asyncio.sleep(PAUSE)

    async def send(self, openid: str, text: str) -> Seen:
        """Write a text; count what was seen of it."""
        seen = await self.wechat.send(openid, text)
        self.did["messages"] += 1
        self.did["fault texts"] += seen.faulty
        self.faults[seen.reason] += seen.faulty
        return seen

    async def ask(self, openid: str, kinds: Iterable[str]) -> Seen:
        """Ask a question of one of the kinds; open the session if need be."""
        kind = random.choice(list(kinds))
        return await self.send(openid, f"/chatgpt 问{random.randrange(10**9)}{kind}")

    async def do_questions(self, openid: str) -> None:
        """Ask one to four at once."""
        count = random.randint(1, 4)
        await asyncio.gather(*(self.ask(openid, "快快慢坏") for _ in range(count)))

    async def do_long(self, openid: str) -> None:
        """Read a long answer by taps."""
        seen = await self.ask(openid, "长")
        while seen.taps and "继续" in seen.taps[0].content:
            seen = await self.send(openid, seen.taps[0].content)

    async def do_pages(self, openid: str) -> None:
        """Look at an answer's page and follow it, mostly not to its end."""
        seen = await self.ask(openid, "快慢长")
        for _, link in seen.links:
            page = self.url + "/" + link.split("/", 3)[3]
            async with self.http.get(page) as response:
                await response.read()
            async with asyncio.timeout(random.uniform(0, 2)):
                async with self.http.get(page + "/events") as events:
                    await events.read()

    async def do_commands(self, openid: str) -> None:
        """Use some commands, and look at the history."""
        for command in random.sample(("/stop", "/clear", "/help", "继续", "重试"), 3):
            await self.send(openid, command)
        seen = await self.send(openid, "/history")
        for _, link in seen.links:
            async with self.http.get(
                self.url + "/" + link.split("/", 3)[3]
            ) as response:
                await response.read()

    async def do_forget(self, openid: str) -> None:
        """Have everything deleted while a question runs."""
        asking = asyncio.create_task(self.ask(openid, "慢长"))
        await self.send(openid, "/forget")
        await self.send(openid, "确认删除")
        await asking

    async def do_mischief(self, openid: str) -> None:
        """Send what is not signed, not XML, not complete; knock and go."""
        for body in (b"<xml>", b"\xff" * 900, b"x" * 70_000, b"<xml><a/></xml>"):
            await self.wechat.post(body, timeout=5)
        async with self.http.post(
            self.url + "/wechat?signature=1", data=b"<xml/>"
        ) as no:
            assert no.status == 403
        host = self.url.removeprefix("http://").split(":")
        _, writer = await asyncio.open_connection(*host)
        writer.write(b"POST /wechat HTTP/1.1\r\nContent-Length: 9\r\n")
        writer.close()

    async def do_hanging_up(self, openid: str) -> None:
        """Post one message often and hang up at any time."""
        push = self.wechat.text(openid, f"/chatgpt 挂断{random.random()}慢")
        waits = [random.uniform(0.01, ATTEMPT) for _ in range(5)]
        await asyncio.gather(*(self.wechat.attempt(push, wait) for wait in waits))


def settings(folder: pathlib.Path, port: int, base_url: str) -> dict:
    """Return settings with shrunk time."""
    times = {"first_token_timeout": 4, "idle_timeout": 0.5, "timeout": 5}
    return {
        "public_url": f"http://127.0.0.1:{port}",
        "server": {"port": port},
        "wechat": {"token": TOKEN, "attempt_timeout": ATTEMPT},
        "assistants": {"chatgpt": {"base_url": base_url, "api_key": "sk-soak"} | times},
        "session": {"ttl": 30},
        "limits": {"questions_per_day": 0, "all_per_day": 0, "at_once": 32},
        "database": {"path": str(folder / "soak.db")},
    }


def report(minute: int, sample: Sample, traffic: Traffic, process: Process) -> None:
    """Print a line of figures."""
    done = traffic.did
    print(
        f"minute {minute:2d}: {sample.memory:6.1f} MiB, {sample.files} files, "
        f"{sample.threads} threads, {done['messages']} messages, "
        f"{done['fault texts']} fault texts, {len(process.log)} log lines",
        flush=True,
    )


async def measure(minutes: int, traffic: Traffic, process: Process) -> list[Sample]:
    """Let the traffic run for so many minutes; return a sample of each pause."""
    samples = [Sample.of(process.process.pid)]
    report(0, samples[0], traffic, process)
    for minute in range(1, minutes + 1):
        began = time.monotonic()
        traffic.open.set()
        await asyncio.sleep(TRAFFIC)
        await traffic.quiet(process.path.with_name("soak.db"))
        await asyncio.sleep(max(0, 60 - (time.monotonic() - began)))
        if process.process.returncode is not None:
            break
        samples.append(Sample.of(process.process.pid))
        report(minute, samples[-1], traffic, process)
    return samples


def verdict(samples: list[Sample], process: Process, status: int) -> int:
    """Say whether all is well; return the exit status."""
    wrong = samples[-1].outgrows(samples[1]) if len(samples) > 2 else ["too few pauses"]
    for number, line in enumerate(process.log):
        if "Traceback" in line:
            wrong.append("a traceback in the log")
            print("".join(process.log[number - 1 : number + 30]))
    if status != 0:
        wrong.append(f"the process ended with status {status}")
    print("not flat: " + ", ".join(wrong) if wrong else "flat", flush=True)
    return 1 if wrong else 0


async def soak(
    minutes: int, subscribers: int, folder: pathlib.Path, log: pathlib.Path | None
) -> int:
    """Start everything, measure, stop; return the exit status."""
    port, limitless = free_port(), aiohttp.TCPConnector(limit=0, force_close=True)
    process = Process(folder / "wxgpt.toml", port)
    async with (
        FakeOpenAI(script_for) as fake,
        WeChat(
            f"http://127.0.0.1:{port}/wechat", TOKEN, attempt_timeout=ATTEMPT
        ) as wechat,
        aiohttp.ClientSession(connector=limitless) as http,
    ):
        process.path.write_text(toml(settings(folder, port, fake.base_url)), "utf-8")
        await process.start()
        traffic = Traffic(wechat, http, f"http://127.0.0.1:{port}")
        living = [
            asyncio.create_task(traffic.live(f"oSoak{n:04d}K9mHdLr3PwYc8SgNf2"))
            for n in range(subscribers)
        ]
        try:
            samples = await measure(minutes, traffic, process)
        finally:
            for task in living:
                task.cancel()
            status = await process.end()
            if log:
                log.write_text("".join(process.log), "utf-8")
        for counted in (traffic.did, +traffic.faults):
            print(", ".join(f"{count} {name}" for name, count in counted.most_common()))
        return verdict(samples, process, status)


def main() -> int:
    """Read the command line and soak."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--minutes", type=int, default=10)
    parser.add_argument("--subscribers", type=int, default=50)
    parser.add_argument(
        "--log", type=pathlib.Path, help="where to keep the server's log"
    )
    arguments = parser.parse_args()
    # The fake upstream's streams break on purpose.
    logging.getLogger("aiohttp.server").setLevel(logging.CRITICAL)
    with tempfile.TemporaryDirectory() as folder:
        options = (arguments.minutes, arguments.subscribers, pathlib.Path(folder))
        return asyncio.run(soak(*options, arguments.log))


if __name__ == "__main__":
    sys.exit(main())
