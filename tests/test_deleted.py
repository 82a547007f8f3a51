"""An exchange deleted between two statements of whoever is about to read it."""

import asyncio

import pytest

from conftest import ANN, LONG, shown
from fake_openai import Script, says
from waiting import within


async def all_stored(server):
    """Wait until no answer is being written, and the end of each is stored."""
    ended = asyncio.gather(*[turn.task for turn in server.bot.turns.values()])
    await within(10, "end of the answers", ended)


@pytest.fixture
async def first(server, upstream):
    """What Ann saw first of a long answer that was written and stored to its end."""
    upstream.will(says(LONG))
    first = await server.ask("写长文")
    await all_stored(server)
    return first


@pytest.fixture
def gate():
    """An event that holds back what the model says; deleting opens it before."""
    return asyncio.Event()


@pytest.fixture
def delete_after(server, gate, monkeypatch):
    """Let a method of the store return only when every exchange is deleted."""
    store = server.bot.store

    def delete_after(name):
        method = getattr(store, name)

        async def find_and_delete(*values):
            found = await method(*values)
            gate.set()
            await all_stored(server)
            await store.rows("DELETE FROM turn")
            return found

        monkeypatch.setattr(store, name, find_and_delete)

    return delete_after


async def test_a_numbered_part_is_not_found(server, first, delete_after):
    """继续N says that it may be deleted, as of one that was never there."""
    delete_after("part")
    seen = await server.wechat.tap(ANN, first.taps[0])
    assert seen.text == shown("no_part")


@pytest.mark.parametrize("method", ["next_unsent", "unsent_part"])
async def test_bare_continue_finds_nothing(server, first, delete_after, method):
    """继续 outside a session is left alone, as when nothing is unsent."""
    await server.ask("/stop")
    delete_after(method)
    assert (await server.ask("继续")).text is None


async def test_bare_continue_is_a_question_in_a_session(server, first, delete_after):
    """继续 goes to the model, as when nothing is unsent."""
    delete_after("next_unsent")
    assert (await server.ask("继续")).text.startswith("你好！关于「继续」")


async def test_a_question_repeated_meanwhile_is_asked_anew(
    server, upstream, gate, delete_after
):
    """With the first asking gone, the same words have nothing to join."""
    upstream.will(Script([gate, "第一次的回答。"]))
    asking = asyncio.create_task(server.ask("同一句"))
    await upstream.arrival("同一句")
    delete_after("unsent_part")
    assert (await server.ask("同一句")).text.startswith("你好！关于「同一句」")
    assert (await asking).text.startswith("第一次的回答。")


async def test_a_late_copy_of_its_message_is_met_with_silence(
    server, upstream, database, delete_after
):
    """Nothing is said, and the deleted question is neither asked nor stored again."""
    push = server.wechat.text(ANN, "会删掉的")
    await server.wechat.deliver(push)
    await all_stored(server)
    database("DELETE FROM reply")  # as if it had not been decided before a restart
    server.bot.deliveries.clear()
    delete_after("recall")
    assert (await server.wechat.attempt(push)).text is None
    assert (len(upstream.requests), database("SELECT * FROM turn")) == (1, [])


async def test_its_live_page_is_not_found(server, first, delete_after):
    """The event stream answers 404 with the page of an unknown link."""
    delete_after("turn_by_link")
    status, page = await server.get(first.links[0][1] + "/events")
    assert status == 404 and "没有这个页面" in page
