"""The server stays within its memory, whatever a hundred readers and senders bring.

The kernel's counter of the process is watched (VmHWM, the most that was ever resident),
which needs no cgroup and no root; RLIMIT_DATA sets a hard limit below which the process
must live, as the unit's MemoryMax would.
"""

import asyncio
import gc
import pathlib
import re
import sys

import pytest

import wxgpt
from conftest import PATIENT, ROOT
from test_bounds import NO_LIMITS, long_history, send_pictures
from test_pictures import HOSTS, PNG, host  # noqa: F401
from waiting import limit

MEMORY = 300 * 2**20
LIMITED = f"""
import resource, runpy, sys
resource.setrlimit(resource.RLIMIT_DATA, ({MEMORY} * 2, {MEMORY} * 2))
sys.argv[0] = {str(ROOT / "wxgpt.py")!r}
runpy.run_path(sys.argv[0], run_name="__main__")
"""
READERS = 100


def most_resident(process):
    """Return the most memory that a process ever had, in bytes."""
    status = pathlib.Path(f"/proc/{process.process.pid}/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+)", status)[1]) * 1024


class Limited:
    """The server below its limit, with Ann's session open."""

    def __init__(self, server, process):
        self.server, self.process = server, process


@pytest.fixture
async def limited(spawn):
    """Start the server below its limit."""
    program = (sys.executable, "-c", LIMITED)
    server, process = await spawn(program, limits=NO_LIMITS, wechat=PATIENT | HOSTS)
    server.wechat.attempt_timeout = PATIENT["attempt_timeout"]
    await server.ask("/chatgpt")
    return Limited(server, process)


async def read_slowly(server, url):
    """Ask for a page and read none of it for a while."""
    path = re.sub("^https?://[^/]+", "", url)
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    writer.write(f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
    await asyncio.sleep(3)
    writer.close()


WORST = "[a](b.c) $x_1$ *字*\n" * 1500 + '"&<\n' * 42_000


async def test_a_hundred_readers_and_large_pictures_fit(limited, database, host):  # noqa: F811
    """Answer, stream and history of the worst, read and not read, and eight questions."""
    large = (PNG + bytes(4 * 2**20))[: 4 * 2**20]
    host.bodies |= {f"large{n}": large for n in range(4)}
    server = limited.server
    answer, history = await long_history(limited, database, WORST)
    urls = [answer, history, f"{answer}/events", server.url + "/healthz"]
    reading = [server.get(urls[n % 4]) for n in range(READERS)]
    reading += [read_slowly(server, urls[n % 3]) for n in range(READERS // 2)]
    sending = send_pictures(limited, host, [f"oSender{n}" for n in range(8)])
    async with limit(100, "end of all that is read"):
        read, _ = await asyncio.gather(asyncio.gather(*reading), sending)
    statuses = [one[0] for one in read if one]
    print(most_resident(limited.process) / 2**20)
    assert set(statuses) == {200}
    assert (await server.ask("还在吗")).text.startswith("你好！")
    assert most_resident(limited.process) < MEMORY


async def test_an_answered_message_keeps_no_answer(serve, upstream):
    """Its reply stays for later copies; what was written is in the database."""
    server = await serve(wechat=PATIENT)
    server.wechat.attempt_timeout = PATIENT["attempt_timeout"]
    await server.ask("/chatgpt 只问这一次", "oOnce")
    async with limit(20, "end of the turn"):
        while any(
            isinstance(one, wxgpt.Turn) and one.question == "只问这一次"
            for one in gc.get_objects()
        ):
            await asyncio.sleep(0.1)
            gc.collect()
