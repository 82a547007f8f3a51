"""A stranger's fake chat API, llmock, which breaks on demand and judges its client.

It shares no idea of the protocol with us: its verdict is that of the retry rules which
the providers' own libraries follow.
"""

import asyncio

import pytest

from conftest import UNIT
from test_upstream import BUSY, LABEL, LONG, PATIENCE, SETUP, SLOW, talking

ANSWER = "今天 宜 吃 饺子 。"
FAULTS = {
    "rate limit": lambda m: m.rate_limit(retry_after=1.2),
    "two rate limits": lambda m: m.rate_limit(times=2, retry_after=0.3),
    "429 in passing": lambda m: m.fail(429),
    "overloaded": lambda m: m.fail(529),
    "503, then cut": lambda m: m.fail(503, retry_after=0.1).disconnect(after_chunks=2),
    "cut at once": lambda m: m.disconnect(after_chunks=0),
    "cut in the middle": lambda m: m.disconnect(after_chunks=3),
    "truncated": lambda m: m.truncate(after_chunks=3),
    "truncated before a word": lambda m: m.truncate(after_chunks=1),
    "truncated before its end": lambda m: m.truncate(after_chunks=6),
    # Paced: the verdict asks whether we hung up before the whole answer was written.
    "malformed": lambda m: m.corrupt(after_chunks=3).pace(200),
    "malformed at once": lambda m: m.corrupt(after_chunks=0).pace(200),
    "stalled": lambda m: m.stall(after_chunks=3, seconds=30),
    "stalled at once": lambda m: m.stall(after_chunks=0, seconds=30),
    "slow to begin": lambda m: m.slow_first_token(0.3),
    "slow in all": lambda m: m.delay(0.3).pace(20),
}
FINAL = {
    "no key": (lambda m: m.fail(401, times=None), SETUP),
    "no permission": (lambda m: m.fail(403, times=None), SETUP),
    "no model": (lambda m: m.fail(404, code="model_not_found", times=None), SETUP),
    "bad request": (lambda m: m.fail(422, times=None), SETUP),
    "no money": (lambda m: m.fail(429, code="insufficient_quota", times=None), SETUP),
    "too long": (lambda m: m.context_overflow(times=None), LONG),
    "wait too long": (lambda m: m.rate_limit(retry_after=300, times=None), BUSY),
}


@pytest.fixture
async def server(serve, llmock):
    """wxgpt, its assistant at llmock, with little patience for silence."""
    limits = {"first_token_timeout": 2 * UNIT, "idle_timeout": 2 * UNIT}
    assistant = {"base_url": llmock.base_url()} | limits
    return await talking(serve, assistants={"chatgpt": assistant})


async def verdict(llmock):
    """Return what llmock holds against us."""
    judged = await asyncio.to_thread(llmock.verdict)
    return [finding.code for finding in judged.findings]


@pytest.mark.parametrize("name", FAULTS)
async def test_a_fault_that_passes_costs_the_subscriber_nothing(server, llmock, name):
    """The whole answer arrives, and the way there is found correct."""
    FAULTS[name](llmock).reply(ANSWER, times=None)
    seen = await server.ask("吃什么？")
    assert seen.text == ANSWER + LABEL
    assert await verdict(llmock) == []
    assert len(llmock.requests) > 1 or name.startswith("slow")


@pytest.mark.parametrize("name", FINAL)
async def test_a_fault_that_will_not_pass_is_asked_once(server, llmock, name):
    """No finding but, at most, that a 429 which cannot pass was given up."""
    fault, sentence = FINAL[name]
    fault(llmock)
    assert (await server.ask("吃什么？")).text.startswith(sentence)
    assert set(await verdict(llmock)) <= {"gave_up"}
    assert len(llmock.requests) == 1


async def test_an_outage_is_no_reason_to_hammer(server, llmock):
    """Three attempts with growing pauses, then a sentence."""
    llmock.fail(503, times=None, retry_after=0.1)
    assert (await server.ask("吃什么？")).text.startswith(BUSY)
    assert await verdict(llmock) == []
    assert len(llmock.requests) == 3


async def test_a_stall_that_lasts_is_ended(server, llmock):
    """Nobody sits through it."""
    llmock.stall(after_chunks=0, seconds=30, times=None)
    assert (await server.ask("吃什么？")).text.startswith(SLOW)
    assert await verdict(llmock) == []
    assert all(one.duration < PATIENCE for one in llmock.requests)


async def test_a_quota_is_waited_for(serve, llmock):
    """Sixty a minute, all used up but one: the second waits as long as it is told.

    With the usual patience: a second to the first token is too short for 61 at once.
    """
    assistant = {"base_url": llmock.base_url()}
    server = await talking(serve, assistants={"chatgpt": assistant})
    llmock.reply(ANSWER, times=None).limits(rpm=60)
    asked = [server.wechat.send(f"o{number}", "/chatgpt 问") for number in range(61)]
    seen = await asyncio.gather(*asked)
    assert all(one.text.startswith(ANSWER + LABEL) for one in seen)
    assert await verdict(llmock) == []
    assert len(llmock.requests) <= 64


async def test_the_context_window_is_found_by_leaving_out(server, llmock):
    """Too much history for the model: asked again with less, and answered."""
    llmock.reply("长" * 300, times=4).reply(ANSWER, times=None)
    for number in range(4):
        await server.ask(f"第 {number} 问")
    llmock.limits(context_window=400)
    assert (await server.ask("吃什么？")).text == ANSWER + LABEL
    assert await verdict(llmock) == []
