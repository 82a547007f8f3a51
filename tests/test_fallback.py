"""`fallback`: another assistant's model answers when the first one fails."""

import asyncio
import json

import pytest

from conftest import ANN, LONG, TEXTS, UNIT, run_command, said, with_session
from fake_openai import Script, fails, says


@pytest.fixture
async def pair(serve, upstream):
    """wxgpt with an assistant whose model is `first`, its fallback's is `second`."""

    async def pair(**changes):
        common = {"base_url": upstream.base_url, "api_key": "sk-verySecret"}
        first = {**common, "model": "first", "fallback": "spare", **changes}
        spare = {**common, "model": "second"}
        return await with_session(serve, assistants={"chatgpt": first, "spare": spare})

    return pair


def models(upstream):
    """Return which models were asked, in order."""
    return [asked.body["model"] for asked in upstream.requests]


async def test_a_failure_is_answered_by_the_other_model(pair, upstream, database):
    """Nobody notices; the page and the database name who wrote, both calls count."""
    server = await pair()
    upstream.will(fails(401), says("我来答。"))
    seen = await server.ask("问一个")
    assert seen.text == "我来答。\n（AI 生成）"
    assert models(upstream) == ["first", "second"]
    columns = "state, model, calls, asked FROM turn"
    assert database(f"SELECT {columns}") == [("done", "second", 2, 1)]
    assert database("SELECT questions FROM quota WHERE who = ''") == [(1,)]


async def test_what_may_pass_is_not_asked_again_where_another_waits(pair, upstream):
    """A busy model is left at once: two calls, no pause."""
    server = await pair()
    upstream.will(fails(503, retry_after=60), says("我来答。"))
    assert (await server.ask("问一个")).text.startswith("我来答。")
    assert models(upstream) == ["first", "second"]


async def test_when_both_fail_the_sentence_is_about_the_other(pair, upstream):
    """Each was asked once, and the question can be asked again."""
    server = await pair()
    upstream.will(fails(401), fails(503))
    seen = await server.ask("问一个")
    assert said("failed_busy") in seen.text and seen.taps[-1].label == TEXTS.word_retry
    assert models(upstream) == ["first", "second"]


async def test_who_has_not_begun_in_time_is_left(pair, upstream):
    """After fallback_after seconds the slow call is closed and the other one answers."""
    server = await pair(fallback_after=UNIT / 2)
    upstream.will(Script([asyncio.Event()]), says("我先说。"))
    assert (await server.ask("问一个")).text.startswith("我先说。")
    await upstream.requests[0].wait_over()
    assert upstream.requests[0].outcome == "cut by client"


async def test_comments_are_no_beginning(pair, upstream):
    """A provider that only says it is alive keeps nobody waiting for it."""
    server = await pair(fallback_after=UNIT)
    pieces = [UNIT / 4] * 30
    upstream.will(Script([*pieces, "太晚了"], comments=True), says("我先说。"))
    seen = await server.ask("问一个")
    assert seen.text.startswith("我先说。")
    assert models(upstream) == ["first", "second"]


async def test_the_log_names_the_setting_of_the_one_that_failed(pair, upstream, caplog):
    """Each by its own assistant."""
    server = await pair()
    upstream.will(fails(401), fails(401))
    await server.ask("问一个")
    assert "assistants.chatgpt.api_key" in caplog.text
    assert "assistants.spare.api_key" in caplog.text


async def test_who_has_begun_is_waited_for(pair, upstream):
    """The seconds are those to the first word."""
    server = await pair(fallback_after=UNIT / 2)
    gate = asyncio.Event()
    upstream.will(Script(["先说一半，", gate, "再说一半。"]))
    seen = await server.ask("问一个")
    gate.set()
    await server.wechat.tap(ANN, seen.taps[0])
    assert models(upstream) == ["first"]


async def test_a_break_after_text_was_sent_is_the_end(pair, upstream):
    """Two models do not write one answer."""
    server = await pair()
    gate = asyncio.Event()
    upstream.will(Script([LONG[:1500], gate], ending="reset"))
    seen = await server.ask("写长文")
    gate.set()
    while seen.taps[0].content.startswith("继续"):
        seen = await server.wechat.tap(ANN, seen.taps[0])
    assert said("failed_broken") in seen.text
    assert models(upstream) == ["first"]


async def test_a_break_before_text_was_sent_is_begun_anew(pair, upstream):
    """Of the first writing nothing is left."""
    server = await pair()
    upstream.will(Script(["写到一半"], ending="reset"), says("从头写的。"))
    assert (await server.ask("问一个")).text == "从头写的。\n（AI 生成）"


async def test_a_long_conversation_is_shortened_for_the_first(pair, upstream):
    """The same model is asked again with less: the other one would not remember it."""
    server = await pair()
    await server.ask("第一个")
    await server.ask("第二个")
    upstream.will(fails(400, code="context_length_exceeded"), says("短了就行。"))
    assert (await server.ask("第三个")).text.startswith("短了就行。")
    assert models(upstream) == ["first"] * 4


async def test_a_blocked_word_is_not_asked_of_another(pair, upstream, tmp_path, serve):
    """What may not be said by one may not be said by the other."""
    words = tmp_path / "words"
    words.write_text("坏词\n", "utf-8")
    common = {"base_url": upstream.base_url, "api_key": "sk-verySecret"}
    server = await with_session(
        serve,
        assistants={"chatgpt": {**common, "fallback": "spare"}, "spare": common},
        limits={"blocked_words": str(words)},
    )
    upstream.will(says("这里有坏词。"), says("干净的。"))
    assert "后面的内容不便显示" in (await server.ask("问一个")).text
    assert len(upstream.requests) == 1


async def test_stats_count_both_calls_and_name_the_models(pair, upstream, tmp_path):
    """One question, two calls, under the name of the model that wrote."""
    server = await pair()
    upstream.will(fails(401), says("我来答。"))
    await server.ask("问一个")
    await asyncio.sleep(UNIT / 5)
    status, out, _ = await run_command(tmp_path / "wxgpt.toml", "stats", "--json")
    stats = json.loads(out)
    assert status == 0 and [row["model"] for row in stats["models"]] == ["second"]
    assert (stats["total"]["questions"], stats["total"]["calls"]) == (1, 2)
