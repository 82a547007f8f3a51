"""The proxies' blocks of README.md and docs/deploy.md, before the unit on systemd.

Names, ports and paths are those of the text, since the container has a loopback of its
own, where the name leads to it. The certificate is one that the container trusts. One
line is put in: Caddy's `tls`, because it would ask Let's Encrypt for a certificate.
"""

import asyncio
import contextlib
import re

import aiohttp
import pytest

from conftest import ANN, PATIENT, PORT, UNIT, platform
from fake_openai import Script, says
from recipes import BLOCKS
from waiting import within

# What the short command does there, which is not installed in this container.
CHECK = "/opt/wxgpt/.venv/bin/python /opt/wxgpt/wxgpt.py check --lang en"


@pytest.fixture(scope="module")
def connection(container):
    """How the platform connects to the name: options of aiohttp's connector."""
    asyncio.run(container.certify())
    return container.connection()


@pytest.fixture(params=BLOCKS)
async def proxy(request, container, connection):
    """A proxy that runs; gives its block and its unit, and the journal with it."""
    block = BLOCKS[request.param]
    place = container.path(block.place)
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_text(block.text())
    async with container.follow(block.unit) as unit:
        assert await unit.systemctl("start") == 0
        yield block, unit
    place.unlink()


@pytest.fixture
async def serve_behind(proxy, start, connection):
    """Start wxgpt behind the proxy; gives the platform before it, and wxgpt's unit."""
    async with contextlib.AsyncExitStack() as stack:

        async def serve(**wechat):
            _, unit = await start(wechat=wechat, public_url=proxy[0].url)
            options = {"connection": connection, **wechat}
            opened = platform(PORT, proxy[0].url, **options)
            return await stack.enter_async_context(opened), unit

        yield serve


async def question_in_writing(server, upstream):
    """Ask; return the task that waits for an answer of which half is written."""
    await server.ask("/chatgpt")
    upstream.will(Script(["半句", asyncio.Event()]), says("下一个进程答的。"))
    waiting = asyncio.create_task(server.ask("正在写吗"))
    await upstream.arrival("正在写吗")
    return waiting


async def ask_until(server, task):
    """Post messages, a hundred a second at most, until a task is done.

    Returns what was seen of each, of one at least.
    """
    asked = []
    while not task.done():
        asked.append(asyncio.create_task(server.ask("/help", f"o{len(asked):027}")))
        await asyncio.wait([task], timeout=0.01)
    return await within(100, "answers to all", asyncio.gather(*asked))


async def test_a_push_is_served(serve_behind):
    """Verification, command and question go through, whatever the path's end."""
    server, _ = await serve_behind(**PATIENT)
    assert await server.wechat.verify("123") == (200, "123")
    assert (await server.wechat.verify("123", token="wrong"))[0] == 403
    assert not (await server.ask("/chatgpt")).faulty
    assert "你好！关于「今天吃什么」" in (await server.ask("今天吃什么")).text


async def test_check_finds_nothing_wrong(serve_behind, container):
    """All its lines have a ✓, about certificate and event stream too; over http a warning."""
    server, _ = await serve_behind(**PATIENT)
    await server.ask("/help")  # it tells when WeChat was heard last
    status, output = await container.run("sh", "-c", CHECK)
    lines = output.partition("\n\n")[0].splitlines()
    findings = [line for line in lines if line[0] != " "]  # one may have several
    warned = ["! public_url"] if server.proxy.startswith("http:") else []
    others = [line for line in findings if line[0] != "✓"]
    assert (status, [line[:12] for line in others]) == (0, warned)
    assert findings[-1] == "✓ live pages: events come through as they are written"


async def test_events_come_as_they_are_written(serve_behind, upstream):
    """Each is read before the model is allowed to write the next."""
    server, _ = await serve_behind(attempt_timeout=UNIT)
    await server.ask("/chatgpt")
    gates = [asyncio.Event(), asyncio.Event()]
    upstream.will(Script(["一", gates[0], "二", gates[1], "三"]))
    link = (await server.ask("数到三")).links[0][1]
    async with server.open(link + "/events") as response:
        assert "<p>一</p>" in await next_event(response)
        gates[0].set()
        assert "<p>一二</p>" in await next_event(response)
        gates[1].set()
        assert "<p>一二三</p>" in await next_event(response)


async def next_event(response):
    """Return the next event's lines."""
    return (await response.content.readuntil(b"\n\n")).decode()


async def test_a_push_that_a_kill_cuts_is_answered_by_the_next_process(
    serve_behind, upstream
):
    """WeChat gets 502, and posts it again: that waits at the kept socket."""
    server, unit = await serve_behind(**PATIENT)
    waiting = await question_in_writing(server, upstream)
    await unit.signal("KILL")
    seen = await waiting
    assert [a.outcome for a in seen.attempts] == ["status 502", "answered"]
    assert seen.text.startswith("下一个进程答的。")
    assert await unit.show("NRestarts") == ["1"]


async def test_a_restart_refuses_nobody(serve_behind, upstream):
    """New messages are held until the next process answers; WeChat sees no failure.

    The one being written gets 502 in the end, and is answered when it comes again.
    """
    server, unit = await serve_behind(**PATIENT)
    cut = await question_in_writing(server, upstream)
    restart = asyncio.create_task(unit.systemctl("restart"))
    held = await ask_until(server, restart)
    assert {(s.attempt, len(s.attempts)) for s in held} == {(1, 1)}
    assert restart.result() == 0
    assert [a.outcome for a in (await cut).attempts] == ["status 502", "answered"]


async def test_an_idle_restart_refuses_nobody(serve_behind):
    """No message is sent on a connection that the restart closes at that moment."""
    server, unit = await serve_behind(**PATIENT)
    for _ in range(5):
        restart = asyncio.create_task(unit.systemctl("restart"))
        held = await ask_until(server, restart)
        assert {(s.attempt, len(s.attempts)) for s in held} == {(1, 1)}
        assert restart.result() == 0


async def test_no_log_has_what_opens_a_page(serve_behind, upstream, proxy, container):
    """No link's key and no query, even of what fails because wxgpt is gone."""
    server, served = await serve_behind(attempt_timeout=UNIT)
    await server.ask("/chatgpt")
    upstream.will(Script(["一", asyncio.Event()]))
    link = (await server.ask("数到三")).links[0][1]
    async with server.open(link + "/events") as live:
        await served.signal("KILL")
        with contextlib.suppress(aiohttp.ClientError):  # Caddy ends it in order
            await live.read()
    await served.systemctl("stop")
    assert (await server.get(link))[0] == 502 and (await server.ask("在吗")).faulty
    logs = await logs_of(container, proxy[1])
    assert not re.search(f"{re.escape(link[-22:])}|signature=|{ANN}", logs)


async def logs_of(container, unit):
    """Stop a proxy; return all that it wrote."""
    await unit.systemctl("stop")
    await unit.says("Deactivated successfully")
    files = container.path("var/log/nginx").iterdir()
    texts = [file.read_text() for file in files] + [e["MESSAGE"] for e in unit.journal]
    return "\n".join(texts)
