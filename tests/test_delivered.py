"""How an answer was delivered is noted once that is known, for `stats`."""

import asyncio
import contextlib
import sqlite3

import pytest

from conftest import ANN, LONG, TEXTS, UNIT, rows, with_session
from fake_openai import Script, says
from waiting import limit


@pytest.fixture
def delivered(database):
    """Wait until it is noted how each question was delivered; return the notes."""

    async def delivered(*expected):
        async with limit(30, f"delivered as {expected}"):
            while (found := database("SELECT delivered FROM turn")) != [*expected]:
                await asyncio.sleep(UNIT / 20)
        return found

    return lambda *expected: delivered(*[(one,) for one in expected])


async def test_by_the_attempt_that_took_it(server, upstream, delivered):
    """A quick answer by the first, one of more than an attempt by the second."""
    await server.ask("快问题")
    upstream.will(says("想好了。", after=UNIT * 1.4))
    assert (await server.ask("慢问题")).attempt == 2
    await delivered("1", "2")


async def test_a_stop_just_after_it_loses_nothing(spawn, settings):
    """What may wait a moment to be stored is stored before the process ends."""
    server, process = await spawn()
    await server.ask("/chatgpt 快问题")
    assert await process.end() == 0
    assert rows(settings["database"]["path"], "SELECT delivered FROM turn") == [("1",)]


async def test_by_a_part_when_the_reply_had_only_patience(server, upstream, delivered):
    """继续 fetched it; the early reply had no text of the answer."""
    gate = asyncio.Event()
    upstream.will(Script([gate, "好了。"]))
    seen = await server.ask("慢慢来")
    await delivered(None)
    gate.set()
    await server.wechat.tap(ANN, seen.taps[0])
    await delivered("part")


async def test_by_the_attempt_when_a_later_part_is_fetched_too(
    server, upstream, delivered
):
    """The first text counts."""
    upstream.will(says(LONG))
    seen = await server.ask("写长文")
    await server.wechat.tap(ANN, seen.taps[0])
    await delivered("1")


async def test_by_the_page(server, upstream, delivered):
    """It was read there, and nowhere else."""
    gate = asyncio.Event()
    upstream.will(Script([gate, "好了。"]))
    seen = await server.ask("慢慢来")
    gate.set()
    await upstream.requests[0].wait_over()
    await server.get(seen.links[0][1])
    await delivered("page")


async def test_not_at_all_when_it_failed(server, upstream, delivered):
    """A sentence about the failure is no answer."""
    upstream.will(Script([], status=401))
    assert TEXTS.word_retry in (await server.ask("会失败的")).text
    await delivered(None)


async def test_lost_when_wechat_hangs_up_on_a_decided_reply(
    serve, upstream, settings, delivered
):
    """The reply waits for a locked database, and the line is gone before it is sent."""
    server = await with_session(serve, wechat={"attempt_timeout": 10})
    gate = asyncio.Event()
    upstream.will(Script([gate, "好了。"]))
    push = server.wechat.text(ANN, "问一下")
    # Shorter than the two seconds for which another's lock is waited for.
    asking = asyncio.create_task(server.wechat.attempt(push, 1.5))
    await upstream.arrival("问一下")
    path = settings["database"]["path"]
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        gate.set()
        assert await asking is None
        other.execute("ROLLBACK")
    await delivered("lost")
    assert (await server.wechat.attempt(push)).text.startswith("好了。")
    await delivered("1")
