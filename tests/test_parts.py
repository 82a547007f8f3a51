"""Long answers: parts, taps, and what a later message finds of an earlier one."""

import asyncio

from conftest import ANN, BOB, LONG, SENTENCE, TEXTS, UNIT, said, shown, with_session
from fake_openai import Script, fails, says
from waiting import within


def words(seen):
    """Return the sentences that a reply carries."""
    return [line for line in seen.text.split("\n") if line.startswith("第")]


async def test_a_long_answer_is_read_to_its_end_by_taps(server, upstream):
    """The parts together are the answer, none is empty, each fits."""
    upstream.will(says(LONG))
    seen = await server.ask("写长文")
    lines = words(seen)
    while seen.taps:
        seen = await server.wechat.tap(ANN, seen.taps[0])
        assert words(seen) and len(seen.content.encode()) <= 1800
        lines += words(seen)
    assert lines == LONG.strip().split("\n\n")
    assert len(upstream.requests) == 1


async def test_every_part_ends_with_the_label_before_tap_and_page(server, upstream):
    """The label closes the model's text; then the tap, then the web link."""
    upstream.will(says(LONG))
    seen = await server.ask("写长文")
    more = shown("writing", tap=TEXTS.word_writing, page=TEXTS.word_page)
    assert seen.text.endswith(f"\n（AI 生成）\n\n{more}")
    assert seen.links[0][1].startswith("http://wx.example.com/a/")


async def test_a_full_first_part_is_sent_while_the_rest_is_written(server, upstream):
    """Rule 2: the first attempt is answered though the model goes on."""
    gate = asyncio.Event()
    upstream.will(Script([LONG[:1500], gate, LONG[1500:]]))
    seen = await server.ask("写长文")
    assert seen.attempt == 1 and words(seen)[0] == "第0句：" + SENTENCE
    assert upstream.requests[0].outcome == "running"
    gate.set()


async def test_a_tap_while_the_answer_is_written_waits_for_its_part(server, upstream):
    """继续 before the end is held, and brings the next part when it is full."""
    gate = asyncio.Event()
    upstream.will(Script([LONG[:800], gate, LONG[800:]]))
    first = await server.ask("写长文")
    tapping = asyncio.create_task(server.wechat.tap(ANN, first.taps[0]))
    gate.set()
    second = await tapping
    assert words(second)[0] == LONG.split("\n\n")[len(words(first))]


async def test_a_tap_whose_part_is_never_written_in_time_brings_patience(
    server, upstream
):
    """A fetch that brings only a word of patience offers the same number again."""
    gate = asyncio.Event()
    upstream.will(Script([gate, "好了。"]))
    first = await server.ask("慢慢来")
    second = await server.wechat.tap(ANN, first.taps[0])
    assert said("thinking") in second.text
    assert second.taps == first.taps
    gate.set()
    third = await server.wechat.tap(ANN, second.taps[0])
    assert third.text.startswith("好了。")


async def test_a_tap_twice_brings_the_same_text(server, upstream):
    """The same number is the same part, byte for byte in its text."""
    upstream.will(says(LONG))
    first = await server.ask("写长文")
    once = await server.wechat.tap(ANN, first.taps[0])
    again = await server.wechat.tap(ANN, first.taps[0])
    assert again.content == once.content


async def test_a_typed_number_is_a_tap(server, upstream):
    """Full-width digits and a space do not matter."""
    upstream.will(says(LONG))
    first = await server.ask("写长文")
    tapped = await server.wechat.tap(ANN, first.taps[0])
    assert (await server.ask("继续 １")).content == tapped.content


async def test_somebody_elses_number_brings_nothing_of_theirs(server, upstream):
    """Parts are numbered for each subscriber."""
    upstream.will(says(LONG))
    seen = await server.ask("写长文")
    other = await server.wechat.tap(BOB, seen.taps[0])
    assert other.text == shown("no_part")
    assert len(upstream.requests) == 1


async def test_bare_continue_brings_the_next_part(server, upstream):
    """继续 without a number goes on where the last reply stopped."""
    upstream.will(says(LONG))
    first = await server.ask("写长文")
    second = await server.ask("继续")
    assert words(second)[0] == LONG.split("\n\n")[len(words(first))]


async def test_bare_continue_is_a_question_when_nothing_is_left(server, upstream):
    """With no unsent part it goes to the model as any text does."""
    await server.ask("你好")
    await server.ask("继续")
    assert upstream.requests[-1].question == "继续"


async def test_bare_continue_is_left_alone_outside_a_session(serve):
    """Nothing to go on with, no session: silence."""
    server = await serve()
    assert (await server.ask("继续")).text is None


async def test_parts_can_be_fetched_after_the_session(server, upstream):
    """继续 works outside sessions."""
    upstream.will(says(LONG))
    first = await server.ask("写长文")
    await server.ask("/stop")
    second = await server.ask("继续")
    assert words(second)[0] == LONG.split("\n\n")[len(words(first))]


async def test_any_other_text_is_a_new_question(server, upstream):
    """Only 继续 fetches; a text that begins with it does not."""
    upstream.will(says(LONG))
    await server.ask("写长文")
    await server.ask("继续说说春天")
    assert upstream.requests[-1].question == "继续说说春天"


async def test_a_fence_that_is_open_at_a_cut_goes_on(server, upstream):
    """Code in the next part keeps its lines as they are."""
    code = "\n".join(
        f"    value_{n} = compute({n}) * 2  # *star* _x_" for n in range(90)
    )
    upstream.will(says(f"看代码：\n\n```python\n{code}\n```\n\n完。"))
    seen, text = await server.ask("写代码"), ""
    while seen.taps:
        text += seen.text.split("\n（AI 生成）")[0] + "\n"
        seen = await server.wechat.tap(ANN, seen.taps[0])
    text += seen.text.split("\n（AI 生成）")[0]
    lines = [line.strip() for line in text.split("\n") if "value_" in line]
    assert lines == [line.strip() for line in code.split("\n")]


async def test_a_complete_answer_with_a_table_offers_its_page(server, upstream):
    """The link leads to where the table is a table."""
    upstream.will(says("| 甲 | 乙 |\n|---|---|\n| 1 | 2 |\n"))
    seen = await server.ask("列个表")
    assert seen.text == f"甲｜乙\n1｜2\n（AI 生成）\n{TEXTS.word_page}"
    assert seen.links[0][0] == TEXTS.word_page


async def test_an_unread_answer_is_named_once(server, upstream):
    """The first reply after its end has a tap for it; the second has none."""
    gate = asyncio.Event()
    upstream.will(Script([gate, "四十二。"]))
    await server.ask("宇宙的答案")
    gate.set()
    await upstream.requests[0].wait_over()
    seen = await server.ask("第二个问题")
    assert seen.taps[-1].content == "继续1"
    assert seen.text.endswith(shown("unread", question="宇宙的答案", tap="看回答"))
    assert "宇宙" not in (await server.ask("第三个问题")).text
    assert (await server.wechat.tap(ANN, seen.taps[-1])).text.startswith("四十二。")


async def test_an_answer_read_on_its_page_is_not_named(server, upstream):
    """Who opened the link knows the answer."""
    gate = asyncio.Event()
    upstream.will(Script([gate, "四十二。"]))
    seen = await server.ask("宇宙的答案")
    gate.set()
    async with server.open(seen.links[0][1] + "/events") as events:
        await events.text()
    await server.get(seen.links[0][1])
    assert "宇宙" not in (await server.ask("第二个问题")).text


async def test_retry_asks_the_same_question_again(server, upstream):
    """The tap under a failure repeats the question, the failed answer left out."""
    upstream.will(fails(401))
    failed = await server.ask("会失败的问题")
    assert failed.taps[-1].label == TEXTS.word_retry
    upstream.will(says("这次好了。"))
    seen = await server.wechat.tap(ANN, failed.taps[-1])
    assert seen.text.startswith("这次好了。")
    assert [m["content"] for m in upstream.requests[-1].messages[1:]] == [
        "会失败的问题"
    ]


async def test_an_older_retry_asks_its_own_question(server, upstream):
    """Of two failures each tap knows its question."""
    upstream.will(fails(401), fails(401))
    first = await server.ask("甲问题")
    await server.ask("乙问题")
    await server.wechat.tap(ANN, first.taps[-1])
    assert upstream.requests[-1].question == "甲问题"


async def test_somebody_elses_question_cannot_be_retried(server, upstream):
    """The tap carries the question's id, which counts for its subscriber alone."""
    upstream.will(fails(401))
    failed = await server.ask("安的问题")
    seen = await server.wechat.tap(BOB, failed.taps[-1])
    assert seen.text == TEXTS.no_retry
    assert len(upstream.requests) == 1


async def test_an_answer_that_ended_well_is_not_retried(server, upstream, database):
    """重试 with the id of a good answer asks nothing again."""
    await server.ask("好问题")
    [(number,)] = database("SELECT id FROM turn")
    assert (await server.ask(f"重试{number}")).text == TEXTS.no_retry
    assert len(upstream.requests) == 1


async def test_the_same_question_again_fetches_the_first(server, upstream):
    """Impatience costs no second call, and brings the answer when it is there."""
    gate = asyncio.Event()
    upstream.will(Script([gate, "好了。"]))
    asking = asyncio.create_task(server.ask("同一个问题"))
    await upstream.arrival("同一个问题")
    push = server.wechat.text(ANN, "同一个问题")
    assert await server.wechat.attempt(push, UNIT / 2) is None
    gate.set()
    assert (await asking).text.startswith("好了。")
    assert (await server.wechat.attempt(push)).text.startswith("好了。")
    assert len(upstream.requests) == 1


async def test_clear_in_mid_answer_lets_a_new_question_in_at_once(server, upstream):
    """The new session does not wait for the old, nor know of it."""
    gate = asyncio.Event()
    upstream.will(Script([gate, "旧的答完了。"]))
    old = await server.ask("旧问题")
    await server.ask("/clear")
    assert (await server.ask("新问题")).attempt == 1
    assert "旧问题" not in str(upstream.requests[-1].messages)
    gate.set()
    assert (await server.wechat.tap(ANN, old.taps[0])).text.startswith("旧的答完了。")


async def test_a_queued_question_is_not_asked_after_stop(server, upstream):
    """It is answered 会话已结束 at once, without a call."""
    gate = asyncio.Event()
    upstream.will(Script([gate, "好。"]))
    first = asyncio.create_task(server.ask("第一个"))
    await upstream.arrival("第一个")
    second = asyncio.create_task(server.ask("第二个"))
    await asyncio.sleep(UNIT / 4)
    await server.ask("/stop")
    assert said("session_ended") in (await second).text
    gate.set()
    assert (await first).text.startswith("好。")
    assert len(upstream.requests) == 1


async def test_a_session_with_a_queued_question_does_not_run_out(serve, upstream):
    """Queued for longer than ttl, it is asked in its session all the same."""
    server = await with_session(serve, session={"ttl": 1})
    gate = asyncio.Event()
    upstream.will(Script([gate, "第一个好了。"]))
    await server.ask("第一个")
    queued = await server.ask("第二个")
    assert said("queued") in queued.text
    gate.set()
    await upstream.arrival("第二个")
    assert "第一个好了。" in str(upstream.requests[-1].messages)


async def test_with_no_guard_left_the_first_attempt_is_answered(serve, upstream):
    """mute_guard = 0: no attempt is left to time out."""
    server = await with_session(serve, wechat={"mute_guard": 0})
    gate = asyncio.Event()
    upstream.will(Script([gate, "好。"]))
    assert (await server.ask("慢问题")).attempt == 1
    gate.set()


async def test_the_guard_counts_over_the_whole_account(serve, upstream):
    """What Ann's waits used up, Bob's cannot."""
    server = await with_session(serve, wechat={"mute_guard": 2})
    await server.ask("/chatgpt", BOB)
    gate = asyncio.Event()
    upstream.will(Script([gate, "好。"]), Script([gate, "好。"]))
    assert (await server.ask("安的慢问题")).attempt == 3
    assert (await server.ask("鲍的慢问题", BOB)).attempt == 1
    gate.set()


async def test_forget_deletes_after_a_tap(server, upstream):
    """确认删除 within five minutes: sessions, questions, parts and links are gone."""
    upstream.will(says(LONG))
    await server.ask("记住这件事")
    link = (await server.ask("/history")).links[0][1]
    seen = await server.ask("/forget")
    assert said("forgotten") in (await server.wechat.tap(ANN, seen.taps[0])).text
    assert (await server.get(link))[0] == 404
    assert said("no_part") in (await server.ask("继续1")).text
    assert (await server.ask("还在吗")).text is None


async def test_confirming_without_asking_is_an_ordinary_text(server, upstream):
    """确认删除 alone deletes nothing: it is a question."""
    await server.ask("确认删除")
    assert upstream.requests[-1].question == "确认删除"


async def test_forget_leaves_nothing_in_the_files(server, upstream, settings):
    """The words are gone from the database and its WAL."""
    await server.ask("独一无二的秘密XYZZY")
    await server.ask("/forget")
    await server.ask("确认删除")
    path = settings["database"]["path"]
    with open(path, "rb") as file, open(path + "-wal", "rb") as wal:
        content = file.read() + wal.read()
    assert b"XYZZY" not in content and ANN.encode() not in content


async def test_forget_in_mid_answer_ends_the_call(server, upstream):
    """Running work of the subscriber is given up."""
    gate = asyncio.Event()
    upstream.will(Script([gate, "好。"]))
    await server.ask("慢问题")
    await server.ask("/forget")
    await server.ask("确认删除")
    await upstream.requests[0].wait_over()
    assert upstream.requests[0].outcome == "cut by client"


async def test_continue_after_patience_brings_the_failure(serve, upstream):
    """An answer that failed after the word of patience is told by 继续, without a call."""
    server = await with_session(serve, assistants={"chatgpt": {"timeout": UNIT * 4}})
    upstream.will(Script([asyncio.Event()]))
    assert said("thinking") in (await server.ask("慢问题")).text
    await upstream.requests[0].wait_over()
    assert said("failed_slow") in (await server.ask("继续")).text
    assert len(upstream.requests) == 1


async def test_a_copy_of_an_early_reply_gets_it_at_once(serve, upstream):
    """What was decided is not waited for again, though the model still writes."""
    server = await serve(wechat={"mute_guard": 0, "attempt_timeout": 4})
    await server.ask("/chatgpt")
    gate = asyncio.Event()
    upstream.will(Script([gate, "好。"]))
    push = server.wechat.text(ANN, "慢问题")
    first = await server.wechat.attempt(push, 10)
    assert (await server.wechat.attempt(push, 1)).body == first.body
    gate.set()


async def test_two_taps_at_once_offer_the_same_next_part(server, upstream):
    """A part has one number, whoever offers it."""
    gate = asyncio.Event()
    upstream.will(Script([LONG[:1500], gate, LONG[1500:]]))
    first = await server.ask("写长文")
    taps = [asyncio.create_task(server.wechat.tap(ANN, first.taps[0])) for _ in "二次"]
    gate.set()
    one, other = await within(30, "answers to both", asyncio.gather(*taps))
    assert one.taps == other.taps and words(one) == words(other)


async def test_the_same_question_in_a_new_session_is_another(server, upstream):
    """After /clear it is asked again: the old answer belongs to the old conversation."""
    gate = asyncio.Event()
    upstream.will(Script([gate, "旧的。"]), says("新的。"))
    await server.ask("天为什么蓝")
    await server.ask("/clear")
    assert (await server.ask("天为什么蓝")).text.startswith("新的。")
    gate.set()
