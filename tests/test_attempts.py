"""Three attempts: every request of a message waits for the same work."""

import asyncio

import aiohttp
import pytest

from conftest import ANN, BOB, UNIT, said
from fake_openai import Script, says
from waiting import within


@pytest.mark.parametrize("number", [1, 2, 3])
async def test_an_answer_is_given_on_the_attempt_on_which_it_is_ready(
    server, upstream, number
):
    """The model begins to write when attempt N is posted, and attempt N is answered."""
    server.posted.clear()
    upstream.will(Script([server.nth_attempt(number), "饺子。"]))
    seen = await server.ask("今天吃什么？")
    assert seen.text.startswith("饺子。")
    assert seen.attempt == number
    assert len(upstream.requests) == 1


async def test_the_last_attempt_brings_what_is_written_so_far(server, upstream):
    """At the deadline the finished sentences go out, with a tap and a link."""
    gate = asyncio.Event()
    upstream.will(Script(["第一句写好了。第二句还没", gate, "有写完。"]))
    seen = await server.ask("讲两句")
    assert seen.attempt == 3
    assert seen.text.startswith("第一句写好了。\n（AI 生成）")
    assert "第二句" not in seen.text
    assert [tap.content for tap in seen.taps] == ["继续1"]
    gate.set()


async def test_a_question_still_thought_about_is_answered_with_patience(
    server, upstream
):
    """Nothing is written at the deadline: the question is named, and the link given."""
    gate = asyncio.Event()
    upstream.will(Script([gate, "想好了。"]))
    seen = await server.ask("宇宙的终极答案到底是什么呢？")
    assert said("thinking") in seen.text
    assert seen.links[0][1].startswith("http://wx.example.com/a/")
    gate.set()


async def test_an_answer_that_ends_after_the_last_attempt_is_on_its_page(
    server, upstream
):
    """The link of the last reply shows the whole answer when it is written."""
    gate = asyncio.Event()
    upstream.will(Script([gate, "**终于**写完了。"]))
    seen = await server.ask("慢慢写")
    gate.set()
    await upstream.requests[-1].wait_over()
    async with server.open(seen.links[0][1] + "/events") as events:
        assert "event: done" in await events.text()
    status, page = await server.get(seen.links[0][1])
    assert status == 200 and "<strong>终于</strong>写完了。" in page


async def test_twenty_copies_at_once_are_one_question(server, upstream):
    """One call to the model, twenty equal replies."""
    bodies = await server.wechat.copies(server.wechat.text(ANN, "你好"), 20)
    assert len(set(bodies)) == 1 and b"CDATA" in bodies[0]
    assert len(upstream.requests) == 1


async def test_a_copy_after_delivery_gets_the_same_bytes(server, upstream):
    """A message that was answered is not asked again."""
    push = server.wechat.text(ANN, "你好")
    first = await server.wechat.deliver(push)
    again = await server.wechat.deliver(push)
    assert again.body == first.body
    assert len(upstream.requests) == 1


async def test_a_copy_of_a_command_does_not_run_it_again(server):
    """A repeated /history brings the same link, not another one."""
    push = server.wechat.text(ANN, "/history")
    first = await server.wechat.deliver(push)
    again = await server.wechat.deliver(push)
    assert again.body == first.body


async def test_a_copy_after_a_restart_gets_the_same_bytes(spawn, upstream):
    """The decided reply is in the database, CreateTime included."""
    server, process = await spawn()
    await server.ask("/chatgpt")
    push = server.wechat.text(ANN, "你好")
    first = await server.wechat.deliver(push)
    await process.kill()
    await process.start()
    again = await server.wechat.deliver(push)
    assert again.body == first.body
    assert len(upstream.requests) == 1


async def test_a_third_attempt_may_come_a_little_early(server, upstream):
    """Three requests not too close together are three attempts, however early."""
    gate = asyncio.Event()
    upstream.will(Script([gate, "好。"]))
    push = server.wechat.text(ANN, "早到的第三次")
    assert await server.wechat.attempt(push, UNIT * 0.8) is None
    assert await server.wechat.attempt(push, UNIT * 0.8) is None
    third = await server.wechat.attempt(push)
    assert said("thinking") in third.text
    gate.set()


async def test_a_late_second_request_is_the_last_chance(server, upstream):
    """A request long after the first is answered: an attempt between got lost."""
    gate = asyncio.Event()
    upstream.will(Script([gate, "好。"]))
    push = server.wechat.text(ANN, "丢了一次")
    assert await server.wechat.attempt(push) is None
    await asyncio.sleep(UNIT)
    late = await server.wechat.attempt(push)
    assert said("thinking") in late.text
    gate.set()


async def test_a_quick_copy_does_not_count_as_an_attempt(server, upstream):
    """Three requests at once are one attempt: none of them is the last chance."""
    gate = asyncio.Event()
    upstream.will(Script([gate, "好。"]))
    push = server.wechat.text(ANN, "三份")
    assert await server.wechat.copies(push, 3) == [None, None, None]
    gate.set()
    assert (await server.wechat.attempt(push)).text.startswith("好。")


async def test_an_answer_that_ends_between_attempts_waits_for_the_next(
    server, upstream
):
    """Nobody waited when it ended; the retry gets it at once."""
    gate = asyncio.Event()
    upstream.will(Script([gate, "写好了。"]))
    push = server.wechat.text(ANN, "没人等的时候")
    assert await server.wechat.attempt(push, UNIT / 2) is None
    gate.set()
    await upstream.requests[-1].wait_over()
    seen = await server.wechat.attempt(push)
    assert seen.text.startswith("写好了。")


async def test_two_subscribers_are_never_mixed(server, upstream):
    """Ann and Bob ask at the same time, and each gets their own answer."""
    await server.ask("/chatgpt", BOB)
    upstream.will(says("给安的。"), when="安问")
    upstream.will(says("给鲍的。"), when="鲍问")
    asking = asyncio.gather(server.ask("安问"), server.ask("鲍问", BOB))
    ann, bob = await within(30, "answers to both", asking)
    assert ann.text.startswith("给安的。") and bob.text.startswith("给鲍的。")
    assert "鲍问" not in str(upstream.asked("安问")[0].messages)


async def test_a_request_that_runs_over_is_held_without_an_answer(server, upstream):
    """The first attempt gets no byte: an answer would end WeChat's retries."""
    gate = asyncio.Event()
    upstream.will(Script([gate, "好。"]))
    push = server.wechat.text(ANN, "等等")
    with pytest.raises(aiohttp.ClientError):
        await server.wechat.post(push, timeout=60)
    gate.set()
    assert (await server.wechat.attempt(push)).text.startswith("好。")
