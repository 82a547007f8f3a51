"""Kills and stops: what a process leaves unfinished, the next one goes on with."""

import asyncio
import signal

import pytest

from conftest import ANN, LONG, TEXTS, UNIT, said
from fake_openai import Script, says


async def crash(process):
    """Kill the process and start the next one."""
    await process.kill()
    await process.start()


async def test_a_retry_after_a_kill_joins_the_resumed_question(spawn, upstream):
    """Killed between two attempts: the next process asks again, the retry gets it."""
    server, process = await spawn(wechat={"attempt_timeout": 2.0})
    await server.ask("/chatgpt")
    upstream.will(Script([asyncio.Event()]), says("活过来了。"))
    push = server.wechat.text(ANN, "会活过来吗")
    assert await server.wechat.attempt(push, UNIT) is None
    await crash(process)
    seen = await server.wechat.attempt(push, 10)
    assert seen.text.startswith("活过来了。")
    assert len(upstream.asked("会活过来吗")) == 2


async def test_queued_questions_are_resumed_in_order(spawn, upstream):
    """Killed with one running and two queued: all three are answered, in order."""
    server, process = await spawn(limits={"waiting": 5})
    await server.ask("/chatgpt")
    upstream.will(Script([asyncio.Event()]))
    pushes = [server.wechat.text(ANN, f"问题{n}") for n in "一二三"]
    for push in pushes:
        assert await server.wechat.attempt(push, UNIT / 3) is None
    await upstream.arrival("问题一")
    await crash(process)
    await upstream.arrival("问题三")
    assert [a.question for a in upstream.requests[1:]] == ["问题一", "问题二", "问题三"]
    assert "问题二" in str(upstream.requests[-1].messages)
    assert [p.openid for p in pushes] == [ANN] * 3


async def test_an_answer_written_anew_says_so(spawn, upstream):
    """Killed after the first part was sent: the next 继续 begins at the new start."""
    server, process = await spawn()
    await server.ask("/chatgpt")
    upstream.will(Script([LONG[:1500], asyncio.Event()]))
    first = await server.ask("写长文")
    upstream.will(says("新写的，很短。"))
    await crash(process)
    await upstream.arrival("写长文", 2)
    second = await server.wechat.tap(ANN, first.taps[0])
    assert second.text.startswith(f"{TEXTS.anew}\n新写的，很短。")


async def test_a_finished_question_is_never_asked_again(spawn, upstream):
    """What was stored as answered stays answered."""
    server, process = await spawn()
    await server.ask("/chatgpt")
    await server.ask("答好了的")
    await crash(process)
    await server.ask("新的")
    assert len(upstream.asked("答好了的")) == 1


async def test_a_question_that_kills_is_given_up(spawn, upstream):
    """Asked once and twice again, it is marked as failed, with a tap to retry."""
    server, process = await spawn()
    await server.ask("/chatgpt")
    upstream.will(*[Script([asyncio.Event()]) for _ in range(3)], when="致命")
    push = server.wechat.text(ANN, "致命问题")
    assert await server.wechat.attempt(push, UNIT / 2) is None
    for count in (2, 3):
        await crash(process)
        await upstream.arrival("致命", count)
    await crash(process)
    seen = await server.wechat.attempt(push, 10)
    assert said("failed_given_up") in seen.text
    assert len(upstream.asked("致命")) == 3


async def test_the_text_so_far_survives_a_kill(spawn, upstream):
    """The page of an answer cut off for good shows what had been written."""
    server, process = await spawn()
    await server.ask("/chatgpt")
    upstream.will(*[Script(["写到这里。", asyncio.Event()])] * 3, when="半截")
    seen = await server.ask("半截的")
    for _ in range(3):
        await asyncio.sleep(1.5)  # the text is stored every second
        await crash(process)
    status, page = await server.get(seen.links[0][1])
    assert status == 200 and "写到这里。" in page


async def test_a_live_page_of_another_writing_is_reset(spawn, upstream):
    """A viewer who comes back after the restart keeps nothing, and gets the new text."""
    server, process = await spawn()
    await server.ask("/chatgpt")
    upstream.will(Script(["旧的开头。", asyncio.Event()]), Script(["新的开头。"]))
    seen = await server.ask("会重写的")
    await crash(process)
    headers = {"Last-Event-ID": "0:5"}
    url = server.at(seen.links[0][1]) + "/events"
    async with server.open(url, headers=headers) as events:
        text = await events.text()
    assert (
        text.index('"keep": 0') < text.index("新的开头。") < text.index("event: done")
    )


async def test_sigterm_answers_a_last_chance_and_cuts_a_first(spawn, upstream):
    """The third attempt gets what there is; the first gets nothing, for its retry."""
    server, process = await spawn(wechat={"attempt_timeout": 2.0})
    await server.ask("/chatgpt")
    upstream.will(*[Script(["想好一半。", asyncio.Event()])] * 2)
    old, new = server.wechat.text(ANN, "第三次了"), server.wechat.text(ANN, "第一次")
    assert await server.wechat.attempt(old, 1.5) is None
    assert await server.wechat.attempt(old, 1.5) is None
    third = asyncio.create_task(server.wechat.attempt(old, 20))
    first = asyncio.create_task(server.wechat.attempt(new, 20))
    await process.says("accepted, 2 waiting")
    assert await process.end(signal.SIGTERM) == 0
    assert (await third).text.startswith("想好一半。")
    assert await first is None


async def test_sigterm_ends_with_exit_status_zero(spawn, upstream):
    """A stop in mid-answer is orderly, and the question goes on in the next process."""
    server, process = await spawn(wechat={"attempt_timeout": 30})
    await server.ask("/chatgpt")
    upstream.will(Script([asyncio.Event()]), says("下一个进程答的。"))
    push = server.wechat.text(ANN, "中途停机")
    waiting = asyncio.create_task(server.wechat.attempt(push))
    await upstream.arrival("中途停机")
    assert await process.end(signal.SIGTERM) == 0
    assert await waiting is None
    await process.start()
    seen = await server.wechat.attempt(push)
    assert seen.text.startswith("下一个进程答的。")


async def test_an_answer_that_ends_within_the_grace_time_is_delivered(spawn, upstream):
    """SIGTERM while the model writes: what is done within four seconds still goes out."""
    server, process = await spawn(wechat={"attempt_timeout": 30})
    await server.ask("/chatgpt")
    gate = asyncio.Event()
    upstream.will(Script([gate, "赶上了。"]))
    waiting = asyncio.create_task(server.ask("赶得上吗"))
    await upstream.arrival("赶得上吗")
    ending = asyncio.create_task(process.end(signal.SIGTERM))
    await process.says("stopping")
    gate.set()
    assert (await waiting).text.startswith("赶上了。")
    assert await ending == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_an_idle_server_stops(spawn, number):
    """Either signal ends it with 0."""
    _, process = await spawn()
    assert await process.end(number) == 0
