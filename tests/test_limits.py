"""What strangers may cost: quotas, lengths, queues, lists of openids, and forgetting.

Also what an owner may offer: several assistants.
"""

import asyncio
import contextlib
import datetime
import pathlib
import sqlite3

import pytest

import wxgpt
from conftest import ANN, BOB, UNIT, said
from fake_openai import Script, says
from waiting import limit

CID = "oCid7Zt1BvK9mHdLr3PwYc8SgNf2"
BARE = {"chatgpt": {"system_prompt": ""}}
DAY_OVER = "今天的 {} 个问题用完了，北京时间零点后再来。"
ALL_OVER = "今天大家的提问次数用完了，北京时间零点后再来。"
NOT_ALLOWED = "抱歉，这个助手暂未对你开放。"


@pytest.fixture
async def open_for(serve):
    """Start wxgpt with limits, and with a session open for each subscriber named."""

    async def start(*openids, **limits):
        server = await serve(assistants=BARE, limits=limits)
        for openid in openids:
            await server.ask("/chatgpt", openid)
        return server

    return start


@pytest.fixture
def asked_today(database):
    """Return how many questions are counted in all."""
    query = "SELECT coalesce(sum(questions), 0) FROM quota WHERE who = ''"
    return lambda: database(query)[0][0]


# Questions per day


async def test_a_subscriber_has_so_many_questions_a_day(open_for, upstream):
    """The one after the last is refused without a call; the refusal says until when."""
    server = await open_for(ANN, questions_per_day=2)
    for text in ("一", "二"):
        assert (await server.ask(text)).text.startswith("你好！")
    assert (await server.ask("三")).text == DAY_OVER.format(2)
    assert len(upstream.requests) == 2


async def test_each_subscriber_has_their_own_count(open_for, upstream):
    """Ann's questions are not Bob's."""
    server = await open_for(ANN, BOB, questions_per_day=1)
    await server.ask("一")
    assert (await server.ask("二")).text == DAY_OVER.format(1)
    assert (await server.ask("一", BOB)).text.startswith("你好！")


async def test_all_together_have_so_many_questions_a_day(open_for, upstream):
    """Who comes after the last question of all is told the same until when."""
    server = await open_for(ANN, BOB, CID, all_per_day=2)
    await server.ask("一")
    await server.ask("一", BOB)
    assert (await server.ask("一", CID)).text == ALL_OVER
    assert (await server.ask("二")).text == ALL_OVER
    assert len(upstream.requests) == 2


async def test_zero_is_no_limit(open_for, upstream):
    """Both limits can be switched off."""
    server = await open_for(ANN, questions_per_day=0, all_per_day=0)
    for number in range(5):
        assert (await server.ask(f"第{number}问")).text.startswith("你好！")


async def test_a_new_day_begins_at_midnight(open_for, upstream, database):
    """What was counted yesterday is no matter today."""
    server = await open_for(ANN, questions_per_day=1, all_per_day=1)
    await server.ask("一")
    assert (await server.ask("二")).text == DAY_OVER.format(1)
    yesterday = datetime.datetime.now(wxgpt.BEIJING) - datetime.timedelta(days=1)
    database("UPDATE quota SET day = ?", yesterday.date().isoformat())
    assert (await server.ask("二")).text.startswith("你好！")


async def test_what_is_no_new_question_does_not_count(open_for, upstream):
    """Commands, parts, copies and pictures are free."""
    server = await open_for(ANN, questions_per_day=2)
    upstream.will(says("春天来了，花都开了。\n\n" * 300))
    push = server.wechat.text(ANN, "一")
    seen = await server.wechat.deliver(push)
    await server.wechat.deliver(push)
    await server.wechat.tap(ANN, seen.taps[0])
    for text in ("继续", "/help", "/history", "/clear"):
        await server.ask(text)
    assert (await server.ask("二")).text.startswith("你好！")


async def test_a_retry_counts(open_for, upstream, asked_today):
    """It is asked of the model again."""
    server = await open_for(ANN)
    upstream.will(Script(status=401))
    await server.ask("一")
    await server.ask("重试")
    assert asked_today() == 2


async def test_a_count_survives_a_kill(spawn, upstream):
    """It is in the database before the model is asked."""
    server, process = await spawn(limits={"questions_per_day": 2})
    await server.ask("/chatgpt 一")
    await process.kill()
    await process.start()
    assert (await server.ask("二")).text.startswith("你好！")
    assert (await server.ask("三")).text == DAY_OVER.format(2)


async def test_a_resumed_question_counts_once(spawn, upstream, asked_today):
    """A kill in mid-answer, the next process and WeChat's retry double nothing."""
    server, process = await spawn(limits={"questions_per_day": 2})
    gate = asyncio.Event()
    upstream.will(Script(["一半", gate]))
    push = server.wechat.text(ANN, "/chatgpt 一")
    assert await server.wechat.attempt(push) is None
    await process.kill()
    await process.start()
    assert (await server.wechat.deliver(push)).text.startswith("你好！")
    assert asked_today() == 1 and len(upstream.requests) == 2
    gate.set()


REFUSED = {
    "too long": ("一二三四五六七八九", "问题太长了"),
    "blocked": ("有坏词吗", "这个问题里有不便讨论的内容"),
}


@pytest.mark.parametrize("name", REFUSED)
async def test_a_refused_question_costs_and_counts_nothing(
    open_for, upstream, asked_today, tmp_path, name
):
    """Neither a call nor one of the day's questions, and nothing of it is stored."""
    (tmp_path / "words").write_text("坏词", "utf-8")
    server = await open_for(
        ANN, question_chars=8, blocked_words=str(tmp_path / "words")
    )
    text, words = REFUSED[name]
    assert (await server.ask(text)).text.startswith(words)
    assert upstream.requests == [] and asked_today() == 0
    assert text not in (tmp_path / "test.db").read_bytes().decode("utf-8", "ignore")


async def test_a_question_over_the_limit_does_not_count(open_for, asked_today):
    """The refusals of a day are not added to it."""
    server = await open_for(ANN, questions_per_day=1)
    for text in ("一", "二", "三"):
        await server.ask(text)
    assert asked_today() == 1


async def test_forgetting_does_not_bring_new_questions(open_for, upstream, database):
    """The count stays until midnight, under a hash that does not name the subscriber."""
    server = await open_for(ANN, questions_per_day=1)
    await server.ask("一")
    await server.ask("/forget")
    assert said("forgotten") in (await server.ask("确认删除")).text
    assert (await server.ask("/chatgpt 二")).text.startswith(DAY_OVER.format(1))
    assert ANN not in str(database("SELECT * FROM quota"))


async def test_following_anew_does_not_bring_new_questions(open_for, upstream):
    """Unfollowing deletes all but the count."""
    server = await open_for(ANN, questions_per_day=1)
    await server.ask("一")
    await server.wechat.post(server.wechat.event(ANN, "unsubscribe"))
    await server.wechat.post(server.wechat.event(ANN, "subscribe"))
    assert (await server.ask("/chatgpt 二")).text.startswith(DAY_OVER.format(1))


async def test_the_words_of_a_limit_are_the_owners(serve):
    """[texts] changes them, the number included where it is wanted."""
    limits, texts = {"questions_per_day": 1}, {"day_over": "Only {count} a day."}
    server = await serve(limits=limits, texts=texts)
    await server.ask("/chatgpt 一")
    assert (await server.ask("二")).text == "Only 1 a day."


# Length


@pytest.mark.parametrize("opening", ["", "/chatgpt "])
async def test_the_longest_question_is_taken_and_one_more_is_not(
    open_for, upstream, opening
):
    """Characters count, not bytes, and a command before them does not."""
    server = await open_for(ANN, question_chars=5)
    assert (await server.ask(opening + "一二三四😀")).text.startswith("你好！")
    refused = await server.ask(opening + "一二三四五六")
    assert refused.text == "问题太长了（6 字），请缩短到 5 字以内。"
    assert len(upstream.requests) == 1


# Waiting


async def test_a_subscriber_may_have_so_many_questions_waiting(open_for, upstream):
    """One more is refused with their number; once one is answered there is room."""
    server, gate = await open_for(ANN, BOB, waiting=2), asyncio.Event()
    upstream.will(Script([gate, "好。"]), when="一")
    for text in ("一", "二"):
        assert await server.wechat.attempt(server.wechat.text(ANN, text)) is None
    refused = await server.ask("三")
    assert refused.text.startswith("前面还有 2 个问题没答完")
    assert (await server.ask("别人的", BOB)).text.startswith("你好！")
    gate.set()
    await upstream.arrival("二")
    assert (await server.ask("四")).text.startswith("你好！")
    assert upstream.asked("三") == []


async def test_a_refused_one_leaves_the_queue_alone(open_for, upstream):
    """Commands and 继续 are answered while the queue is full."""
    server, gate = await open_for(ANN, waiting=1), asyncio.Event()
    upstream.will(Script([gate, "好。"]))
    waiting = await server.ask("一")
    assert "聊天记录" in (await server.ask("/help")).text
    gate.set()
    assert (await server.wechat.tap(ANN, waiting.taps[0])).text.startswith("好。")


# At once


async def test_calls_beyond_at_once_are_served_in_the_order_they_came(
    open_for, upstream
):
    """With one call at a time Bob's is before Cid's, who asked later."""
    server, gate = await open_for(ANN, BOB, CID, at_once=1), asyncio.Event()
    upstream.will(Script([gate, "好。"]), when="一")
    for openid, text in ((ANN, "一"), (BOB, "二"), (CID, "三")):
        assert await server.wechat.attempt(server.wechat.text(openid, text)) is None
    assert [asked.question for asked in upstream.requests] == ["一"]
    gate.set()
    await upstream.arrival("三")
    assert [asked.question for asked in upstream.requests] == ["一", "二", "三"]


async def test_waiting_for_a_slot_is_not_counted_as_a_slow_model(serve, upstream):
    """first_token_timeout begins when the call does."""
    chatgpt = {"first_token_timeout": 2 * UNIT}
    server = await serve(assistants={"chatgpt": chatgpt}, limits={"at_once": 1})
    upstream.will(Script(["慢", *[0.5 * UNIT, "慢"] * 7]), when="一")
    for openid, text in ((ANN, "/chatgpt 一"), (BOB, "/chatgpt 二")):
        assert await server.wechat.attempt(server.wechat.text(openid, text)) is None
    assert (await upstream.arrival("二")).messages[-1]["content"] == "二"
    assert len(upstream.asked("二")) == 1


async def test_a_failed_call_gives_its_slot_back(open_for, upstream):
    """Whatever becomes of a question, the next one is asked."""
    server = await open_for(ANN, at_once=1)
    upstream.will(Script(status=401))
    await server.ask("一")
    assert (await server.ask("二")).text.startswith("你好！")


# Allow and deny


async def test_a_denied_subscriber_gets_silence(open_for, upstream, database):
    """To text, commands, taps, pictures and following; nothing of them is stored."""
    server = await open_for(deny=[BOB])
    url = "http://mmbiz.qpic.cn/x"
    pushes = [
        server.wechat.text(BOB, text) for text in ("/chatgpt 你好", "/help", "继续1")
    ]
    pushes += [server.wechat.image(BOB, url), server.wechat.event(BOB, "subscribe")]
    for push in pushes:
        assert (await server.wechat.deliver(push)).body == b"success"
    assert upstream.requests == []
    assert database("SELECT * FROM session") == database("SELECT * FROM reply") == []


async def test_a_denied_subscriber_who_leaves_is_forgotten(serve, database, settings):
    """What was stored before the denial goes with them."""
    first = await serve()
    await first.ask("/chatgpt 一个秘密", BOB)
    second = await serve(limits={"deny": [BOB]})
    await second.wechat.post(second.wechat.event(BOB, "unsubscribe"))
    assert database("SELECT * FROM turn") == database("SELECT * FROM session") == []


async def test_who_is_not_allowed_gets_a_polite_word(open_for, upstream, database):
    """Opening, asking or retrying makes no call; who is allowed notices nothing."""
    server = await open_for(allow=[ANN])
    for text in ("/chatgpt", "/chatgpt 你好", "／ChatGPT你好"):
        assert (await server.ask(text, BOB)).text == NOT_ALLOWED
    assert upstream.requests == [] and database("SELECT * FROM session") == []
    assert (await server.ask("/chatgpt 你好", ANN)).text.startswith("你好！")


async def test_who_is_not_allowed_any_more_gets_a_polite_word(serve, upstream):
    """A session from before does not help."""
    first = await serve()
    await first.ask("/chatgpt 你好", BOB)
    second = await serve(limits={"allow": [ANN]})
    assert (await second.ask("还在吗", BOB)).text == NOT_ALLOWED
    assert len(upstream.requests) == 1


async def test_auto_open_is_for_the_allowed(serve, upstream):
    """Others read the polite word at any text."""
    server = await serve(session={"auto_open": True}, limits={"allow": [ANN]})
    assert (await server.ask("你好", BOB)).text == NOT_ALLOWED
    assert (await server.ask("你好", ANN)).text.startswith("你好！")
    assert len(upstream.requests) == 1


async def test_denied_counts_more_than_allowed(open_for):
    """Who is in both lists gets silence."""
    server = await open_for(allow=[BOB], deny=[BOB])
    assert (await server.ask("/chatgpt", BOB)).text is None


# Several assistants


@pytest.fixture
async def three(serve, upstream):
    """wxgpt with three assistants, one of a Chinese name."""
    bean = {"base_url": upstream.base_url, "api_key": "sk-bean", "model": "bean-1"}
    bean |= {"system_prompt": "你是豆包。", "extra": {"thinking": {"type": "disabled"}}}
    other = {"base_url": upstream.base_url + "/", "api_key": " sk-4 ", "model": "gpt-4"}
    other |= {"system_prompt": "", "extra": {"temperature": 0.5}}
    return await serve(assistants={"豆包": bean, "gpt4": other})


async def test_each_assistant_has_its_own_model_key_prompt_and_extra(three, upstream):
    """What one is asked with is not seen by another."""
    for name in ("chatgpt", "豆包", "gpt4"):
        await three.ask(f"/{name} 你好")
    first, bean, other = upstream.requests
    keys = [asked.headers["Authorization"] for asked in upstream.requests]
    assert keys == ["Bearer sk-verySecret", "Bearer sk-bean", "Bearer sk-4"]
    models = [asked.body["model"] for asked in upstream.requests]
    assert models == [wxgpt.DEFAULT_MODEL, "bean-1", "gpt-4"]
    assert bean.messages[0] == {"role": "system", "content": "你是豆包。"}
    assert bean.body["thinking"] == {"type": "disabled"}
    assert other.messages == [{"role": "user", "content": "你好"}]
    assert other.body["temperature"] == 0.5
    assert "thinking" not in first.body and "temperature" not in first.body


async def test_each_assistant_has_its_own_timeouts(serve, upstream):
    """The hasty one gives up where the patient one still waits."""
    hasty = {"base_url": upstream.base_url, "api_key": "sk-2"}
    hasty |= {"first_token_timeout": UNIT / 6, "timeout": UNIT / 3}
    server, gate = await serve(assistants={"hasty": hasty}), asyncio.Event()
    upstream.will(*[Script([gate, "好。"])] * 9)
    patient = asyncio.create_task(server.ask("/chatgpt 慢问题", BOB))
    seen = await server.ask("/hasty 慢问题")
    while said("thinking") in seen.text:
        seen = await server.wechat.tap(ANN, seen.taps[0])
    assert said("failed_slow") in seen.text
    gate.set()
    assert (await patient).text[:2] in ("好。", "「慢")


@pytest.mark.parametrize(
    "text", ["/豆包 你好", "/豆包你好", "／豆包　你好", " /豆包\n你好"]
)
async def test_a_chinese_name_is_a_command(three, upstream, text):
    """Full-width forms and space do not matter there, either."""
    await three.ask(text)
    assert upstream.requests[0].body["model"] == "bean-1"
    assert upstream.requests[0].question == "你好"


async def test_help_lists_the_assistants_as_taps(three):
    """Each with the tap that opens it, in the order of the file."""
    seen = await three.ask("/help")
    names = ["/chatgpt", "/豆包", "/gpt4"]
    assert [tap.content for tap in seen.taps][:3] == names
    opened = await three.wechat.tap(ANN, seen.taps[1])
    assert said("greeting") in opened.text and "豆包" in opened.text


async def test_opening_another_assistant_ends_the_session(three, upstream):
    """The new one knows nothing of the talk, and /stop offers the one that was open."""
    await three.ask("/chatgpt 甲问题")
    await three.ask("/gpt4 乙问题")
    assert "甲问题" not in str(upstream.requests[1].messages)
    assert "/gpt4" in (await three.ask("/stop")).text
    await three.ask("/chatgpt 丙问题")
    assert "甲问题" not in str(upstream.requests[2].messages)


async def test_what_is_queued_at_the_old_assistant_is_not_asked(three, upstream):
    """What is being written is finished; what waits is answered without a call."""
    gate = asyncio.Event()
    upstream.will(Script([gate, "好。"]))
    first = asyncio.create_task(three.ask("/chatgpt 甲问题"))
    await upstream.arrival("甲问题")
    queued = three.wechat.text(ANN, "乙问题")
    assert await three.wechat.attempt(queued, UNIT / 2) is None
    await three.ask("/豆包")
    assert said("session_ended") in (await three.wechat.attempt(queued)).text
    gate.set()
    assert (await first).text.startswith("好。")
    assert upstream.asked("乙问题") == []


async def test_a_limit_is_one_for_all_assistants(serve, upstream):
    """Going from one to the next brings no new questions."""
    other = {"base_url": upstream.base_url, "api_key": "sk-2"}
    server = await serve(assistants={"豆包": other}, limits={"questions_per_day": 1})
    await server.ask("/chatgpt 一")
    assert (await server.ask("/豆包 二")).text == DAY_OVER.format(1)


# Deletion after keep_days

AGE = (
    "UPDATE turn SET created_at = created_at - 345600, finished_at = finished_at - 345600",
    "UPDATE session SET opened_at = opened_at - 345600, last_at = last_at - 345600,"
    " ended_at = ended_at - 345600",
    "UPDATE reply SET created = created - 345600",
    "UPDATE part SET offered_at = offered_at - 345600",
    "UPDATE subscriber SET told_at = told_at - 345600, hinted_at = hinted_at - 345600",
)


@pytest.fixture
def words_in_files(settings):
    """Say which words the database file and its WAL still hold."""
    path = pathlib.Path(settings["database"]["path"])

    def found(*words):
        files = [path, path.with_name(path.name + "-wal")]
        held = b"".join(file.read_bytes() for file in files if file.exists())
        return [word for word in words if word.encode() in held]

    return found


async def restart_aged(server, process, database):
    """Make all four days older while no process runs; wait until the next deleted it."""
    await process.end()
    for statement in AGE:
        database(statement)
    before = len(process.log)
    await process.start()
    await server.wechat.post(server.wechat.event(BOB, "view"))  # says what time it is
    await process.says("exchanges older than keep_days deleted", before)


async def test_old_exchanges_are_deleted_from_the_files(
    prune_often, spawn, upstream, database, words_in_files
):
    """Question, answer, reply, parts and session of four days ago are gone; new stay."""
    server, process = await spawn(history={"keep_days": 3})
    upstream.will(says("旧答案PLUGH。" * 200))
    await server.wechat.tap(ANN, (await server.ask("/chatgpt 旧问题XYZZY")).taps[0])
    await server.ask("/stop")
    await server.ask("/chatgpt 旁人的FROTZ", BOB)
    assert words_in_files("XYZZY", "PLUGH", "FROTZ", BOB) != []
    await restart_aged(server, process, database)
    await server.ask("/chatgpt 新问题NITFOL")
    assert words_in_files("XYZZY", "PLUGH", "FROTZ", "NITFOL", BOB) == ["NITFOL"]
    assert database("SELECT question FROM turn") == [("新问题NITFOL",)]
    assert database("SELECT count(*) FROM part") == [(0,)]


async def test_a_reader_of_what_is_deleted_holds_nobody_up(
    spawn, settings, words_in_files
):
    """The words go from the files when it ends; no message waits for that."""
    patience = 1.7  # seconds; a wait for the reader takes nearly two
    server, _ = await spawn(wechat={"attempt_timeout": patience})
    server.wechat.attempt_timeout = patience
    await server.ask("/chatgpt 旧问题XYZZY")
    path, loop = settings["database"]["path"], asyncio.get_running_loop()
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as reader:
        reader.execute("BEGIN")
        reader.execute("SELECT * FROM turn").fetchall()
        await server.wechat.tap(ANN, (await server.ask("/forget")).taps[0])
        until = loop.time() + 3 * wxgpt.SAVE_SECONDS
        while loop.time() < until:
            assert (await server.ask("/help", BOB)).attempt == 1
    assert words_in_files("XYZZY") == ["XYZZY"]
    async with limit(30, "end of the words in the files"):
        while words_in_files("XYZZY"):
            await server.ask("/help", BOB)


async def test_a_text_that_came_too_late_is_deleted_too(
    prune_often, spawn, upstream, database, words_in_files
):
    """What a session keeps to be asked later goes, even without any exchange left."""
    server, process = await spawn(history={"keep_days": 3})
    await server.ask("/chatgpt")
    database("UPDATE session SET last_at = last_at - 301")
    await server.ask("太晚的问题XYZZY")
    await restart_aged(server, process, database)
    assert words_in_files("XYZZY", ANN) == []


async def test_without_keep_days_nothing_is_deleted(serve, database, monkeypatch):
    """Zero keeps exchanges for ever, also when their replies go after a day."""
    monkeypatch.setattr(wxgpt, "PRUNE_SECONDS", 0.1)
    server = await serve()
    await server.ask("/chatgpt 旧问题")
    for statement in AGE:
        database(statement)
    async with limit(30, "end of the old replies"):
        while database("SELECT 1 FROM reply"):
            await asyncio.sleep(0.05)
    assert (await server.ask("/history")).links
    assert database("SELECT question FROM turn") == [("旧问题",)]


async def test_a_link_to_a_deleted_answer_is_unknown(
    prune_often, spawn, upstream, database
):
    """Its page is 404, and 继续 finds nothing."""
    server, process = await spawn(history={"keep_days": 3})
    upstream.will(says("春天来了，花都开了。\n\n" * 100))
    seen = await server.ask("/chatgpt 旧问题")
    await restart_aged(server, process, database)
    assert (await server.get(seen.links[0][1]))[0] == 404
    tapped = await server.wechat.tap(ANN, seen.taps[0])
    assert said("no_part") in tapped.text
