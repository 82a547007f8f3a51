"""Sessions: how they open, go on, end and run out, and the commands around them."""

import asyncio

import pytest

from conftest import ANN, BOB, said, with_session
from fake_openai import Script, fails
from waiting import within

# No system prompt, so that a conversation is all that a model of these tests gets.
BARE = {"chatgpt": {"system_prompt": ""}}


@pytest.fixture
async def server(serve):
    """wxgpt as it starts."""
    return await serve(assistants=BARE)


@pytest.fixture
async def impatient(serve):
    """wxgpt that lets no attempt time out, with an open session of Ann's."""
    return await with_session(serve, assistants=BARE, wechat={"mute_guard": 0})


def talk(*lines):
    """Return a conversation as the model gets it, the subscriber first."""
    roles = ("user", "assistant") * len(lines)
    return [{"role": r, "content": line} for r, line in zip(roles, lines)]


# Opening


@pytest.mark.parametrize(
    "text", ["/chatgpt", "/ChatGPT", "  /CHATGPT \n", "／ＣｈａｔＧＰＴ", "／chatgpt　"]
)
async def test_a_session_opens_in_any_spelling(server, upstream, text):
    """Case, surrounding space and full-width forms do not matter; no call is made."""
    opened = await server.ask(text)
    assert said("introduction") in opened.text and upstream.requests == []
    assert (await server.ask("你好")).text.startswith("你好！关于「你好」")


async def test_the_opening_says_what_happens_to_messages(server):
    """It says that the text is by AI, goes to the provider, is stored, and /forget."""
    text = (await server.ask("/chatgpt")).text
    words = ("由 AI 生成", "服务商", "保存", "/forget")
    assert [word for word in words if word not in text] == []


@pytest.mark.parametrize(
    "text",
    ["/chatgpt 今天吃什么", "/chatgpt今天吃什么", "／ＣｈａｔＧＰＴ　今天吃什么", "/chatgpt\n今天吃什么"],
)  # fmt: skip
async def test_a_question_behind_the_command_is_asked_at_once(server, upstream, text):
    """The session opens and the question is its first one."""
    seen = await server.ask(text)
    assert seen.text.startswith("你好！关于「今天吃什么」")
    assert upstream.requests[0].messages == talk("今天吃什么")


async def test_opening_an_open_session_keeps_it(server, upstream):
    """The same assistant's command, alone or with a question, ends nothing."""
    upstream.will("甲答", "乙答")
    await server.ask("/chatgpt 甲问")
    assert said("still_open") in (await server.ask("/chatgpt")).text
    await server.ask("/chatgpt 乙问")
    assert upstream.requests[1].messages == talk("甲问", "甲答", "乙问")


async def test_another_assistant_begins_anew(serve, upstream):
    """Opening it ends the session; of two names that fit the longer one counts."""
    other = {"base_url": upstream.base_url, "api_key": "sk-2", "system_prompt": ""}
    server = await serve(assistants=BARE | {"chatgpt豆包": other | {"model": "bean"}})
    await server.ask("/chatgpt 甲问")
    await server.ask("/ChatGPT豆包 乙问")
    assert upstream.requests[1].body["model"] == "bean"
    assert upstream.requests[1].messages == talk("乙问")


async def test_the_system_prompt_comes_first(serve, upstream):
    """A model is told how to talk before the conversation."""
    server = await serve(assistants={"chatgpt": {"system_prompt": "少说。"}})
    await server.ask("/chatgpt 你好")
    prompt = [{"role": "system", "content": "少说。"}]
    assert upstream.requests[0].messages == prompt + talk("你好")


# Outside a session


async def test_outside_a_session_messages_are_left_alone(server, upstream):
    """Texts, pictures and voice bring silence and no call."""
    for kind in ("text", "image", "voice", "video", "location", "link"):
        push = server.wechat.raw(ANN, kind, Content="你好", MediaId="x")
        assert (kind, (await server.wechat.deliver(push)).text) == (kind, None)
    assert upstream.requests == []


async def test_keywords_are_answered_outside_a_session_only(serve, upstream):
    """The exact text brings its reply, others `outside`; in a session it is asked."""
    replies = {"keywords": {"营业时间": "九点到五点"}, "outside": "在"}
    server = await serve(replies=replies)
    assert (await server.ask("营业时间")).text == "九点到五点"
    assert (await server.ask("营业时间？")).text == "在"
    await server.ask("/chatgpt")
    assert "关于「营业时间」" in (await server.ask("营业时间")).text


async def test_any_text_may_open_a_session(serve, upstream):
    """With auto_open a text outside a session opens the first assistant with it."""
    server = await serve(assistants=BARE, session={"auto_open": True})
    upstream.will("甲答")
    assert (await server.ask("甲问")).text.startswith("甲答")
    await server.ask("乙问")
    assert upstream.requests[1].messages == talk("甲问", "甲答", "乙问")


async def test_a_session_is_one_subscribers(server):
    """Ann's session is not Bob's."""
    await server.ask("/chatgpt")
    assert (await server.ask("你好", BOB)).text is None


# Commands


@pytest.mark.parametrize("text", ["/stop", "/STOP", " ／ｓｔｏｐ　", "／Stop"])
async def test_stop_ends_the_session(server, upstream, text):
    """Afterwards texts are left alone again."""
    await server.ask("/chatgpt")
    assert said("stopped") in (await server.ask(text)).text
    assert (await server.ask("还在吗")).text is None
    assert upstream.requests == []


async def test_clear_starts_without_context(server, upstream):
    """The same assistant goes on, and what was said before is not sent along."""
    await server.ask("/chatgpt 甲问")
    assert "换个话题" in (await server.ask("/clear")).text
    await server.ask("乙问")
    assert upstream.requests[1].messages == talk("乙问")


@pytest.mark.parametrize("text", ["/stop", "/clear"])
async def test_without_a_session_there_is_nothing_to_end(server, text):
    """The word says how to begin, with a tap that does."""
    seen = await server.ask(text)
    assert [tap.content for tap in seen.taps] == ["/chatgpt"]
    assert (await server.ask("你好")).text is None


async def test_history_brings_a_link_and_ends_the_one_before(server):
    """The newest link opens the history, the older one is gone."""
    await server.ask("/chatgpt 今天吃什么")
    [(_, old)] = (await server.ask("/history")).links
    [(_, new)] = (await server.ask("／ＨＩＳＴＯＲＹ")).links
    status, page = await server.get(new)
    assert status == 200 and "今天吃什么" in page
    assert (await server.get(old))[0] == 410


async def test_help_names_the_commands_and_assistants(serve):
    """Each assistant has a tap that opens it; sessions are not needed."""
    server = await serve(assistants={"豆包": {"api_key": "sk-2"}})
    seen = await server.ask("/help")
    assert {"/chatgpt", "/豆包"} <= {tap.content for tap in seen.taps}
    commands = ("/stop", "/clear", "/history", "/forget", "/help", "继续")
    assert [name for name in commands if name not in seen.text] == []


@pytest.mark.parametrize("text", ["/fly", "/stop 现在", "/", "//stop", "1/2 是多少"])
async def test_a_slash_without_a_known_command_is_a_question(server, upstream, text):
    """In a session it is asked as it is."""
    await server.ask("/chatgpt")
    await server.ask(text)
    assert [asked.question for asked in upstream.requests] == [text]


async def test_an_unknown_command_outside_a_session_is_told_so(server, upstream):
    """With a tap for what there is."""
    seen = await server.ask("/fly")
    assert seen.text.startswith("没有「/fly」这个命令。")
    assert [tap.content for tap in seen.taps] == ["/help"]
    assert upstream.requests == []


# Running out


@pytest.fixture
async def lapsed(serve, upstream):
    """wxgpt with a session of Ann's that ran out after one exchange."""
    server = await serve(assistants=BARE, session={"ttl": 1})
    upstream.will("饺子。")
    await server.ask("/chatgpt 吃什么？")
    await asyncio.sleep(1.1)
    return server


async def test_the_first_text_after_a_session_ran_out_can_be_asked_in_it(
    lapsed, upstream
):
    """It is told so, and the tap asks that very text with the conversation."""
    seen = await lapsed.ask("那蘸什么？")
    assert said("session_lapsed") in seen.text and "那蘸什么？" in seen.text
    assert len(upstream.requests) == 1
    [tap] = seen.taps
    assert tap.label == "接着问"
    asked = await lapsed.wechat.tap(ANN, tap)
    assert asked.text.startswith("你好！关于「那蘸什么？」")
    assert upstream.requests[1].messages == talk("吃什么？", "饺子。", "那蘸什么？")


async def test_each_text_after_a_session_ran_out_is_offered(lapsed, upstream):
    """A voice is left alone; whichever tap is tapped, it asks the newest text."""
    assert (await lapsed.wechat.deliver(lapsed.wechat.voice(ANN))).text is None
    [tap] = (await lapsed.ask("那蘸什么？")).taps
    for text in ("喂？", "蘸酱油还是醋？"):
        assert text in (await lapsed.ask(text)).text
    await lapsed.wechat.tap(ANN, tap)
    assert upstream.requests[1].question == "蘸酱油还是醋？"


async def test_after_stop_nothing_is_offered_any_more(lapsed, upstream):
    """Who ends what had run out is not asked again."""
    await lapsed.ask("那蘸什么？")
    assert said("stopped") in (await lapsed.ask("/stop")).text
    assert (await lapsed.ask("喂？")).text is None


async def test_a_new_session_after_one_ran_out_begins_anew(lapsed, upstream):
    """The command opens a session of its own, which knows nothing of the old one."""
    await lapsed.ask("/chatgpt 几点了？")
    assert upstream.requests[1].messages == talk("几点了？")


async def test_every_message_extends_the_session(serve, upstream):
    """The idle time counts from the last message, whichever it was."""
    server = await with_session(serve, session={"ttl": 1.5})
    await asyncio.sleep(0.9)
    await server.ask("/help")
    await asyncio.sleep(0.9)
    assert (await server.ask("还在吗")).text.startswith("你好！关于「还在吗」")


async def test_a_session_does_not_end_while_a_question_is_unanswered(serve, upstream):
    """Nor at the end of a long answer: the idle time counts from there."""
    server, gate = await serve(assistants=BARE, session={"ttl": 1}), asyncio.Event()
    upstream.will(Script([gate, "甲答"]))
    first = asyncio.create_task(server.ask("/chatgpt 甲问"))
    await upstream.arrival("甲问")
    await asyncio.sleep(1.1)
    second = server.wechat.text(ANN, "乙问")
    assert await server.wechat.attempt(second) is None
    gate.set()
    both = asyncio.gather(first, server.wechat.deliver(second))
    await within(30, "answers to both", both)
    assert upstream.requests[1].messages == talk("甲问", "甲答", "乙问")


async def test_an_answer_extends_the_session(serve, upstream):
    """A question right after a long answer is still in the session."""
    server, gate = await serve(session={"ttl": 1}), asyncio.Event()
    upstream.will(Script([gate, "甲答"]))
    first = asyncio.create_task(server.ask("/chatgpt 甲问"))
    await upstream.arrival("甲问")
    await asyncio.sleep(1.1)
    gate.set()
    await first
    assert (await server.ask("乙问")).text.startswith("你好！关于「乙问」")


# What the model knows


async def test_the_conversation_goes_along_in_order(server, upstream):
    """Every question comes with all exchanges before it, the oldest first."""
    upstream.will("甲答", "乙答", "丙答")
    await server.ask("/chatgpt 甲问")
    await server.ask("乙问")
    await server.ask("丙问")
    assert upstream.requests[2].messages == talk("甲问", "甲答", "乙问", "乙答", "丙问")


async def test_the_oldest_exchanges_are_left_out_whole(serve, upstream):
    """Of the conversation goes along what fits, the newest first, never halves."""
    server = await serve(assistants=BARE, session={"context_chars": 25})
    upstream.will("甲甲甲甲答", "乙乙乙乙答", "丙丙丙丙答")
    await server.ask("/chatgpt 甲甲甲甲问")
    await server.ask("乙乙乙乙问")
    await server.ask("丙丙丙丙问")
    await server.ask("丁问")
    known = ("乙乙乙乙问", "乙乙乙乙答", "丙丙丙丙问", "丙丙丙丙答")
    assert upstream.requests[3].messages == talk(*known, "丁问")


async def test_without_room_for_context_the_question_goes_alone(serve, upstream):
    """context_chars = 0 makes every question the first one."""
    server = await serve(assistants=BARE, session={"context_chars": 0})
    await server.ask("/chatgpt 甲问")
    await server.ask("乙问")
    assert upstream.requests[1].messages == talk("乙问")


async def test_a_failed_answer_never_enters_the_context(server, upstream):
    """Neither the question that failed nor a piece of its answer goes along."""
    upstream.will("甲答", fails(401))
    await server.ask("/chatgpt 甲问")
    await server.ask("乙问")
    await server.ask("丙问")
    assert upstream.requests[2].messages == talk("甲问", "甲答", "丙问")


async def test_a_broken_answer_never_enters_the_context(server, upstream):
    """What was written before a stream broke is not sent back to the model."""
    upstream.will(*[Script("写了一半", ending="eof")] * 3)
    await server.ask("/chatgpt 甲问")
    await upstream.arrival("甲问", 3)
    await server.ask("乙问")
    assert upstream.requests[-1].messages == talk("乙问")


# Order


async def test_questions_are_answered_one_after_another(server, upstream):
    """One sent while another is written is asked after it, and knows its answer."""
    gate = asyncio.Event()
    await server.ask("/chatgpt")
    upstream.will(Script([gate, "甲答"]))
    first = asyncio.create_task(server.ask("甲问"))
    await upstream.arrival("甲问")
    second = server.wechat.text(ANN, "乙问")
    assert await server.wechat.attempt(second) is None
    assert upstream.asked("乙问") == []
    gate.set()
    both = asyncio.gather(first, server.wechat.deliver(second))
    await within(30, "answers to both", both)
    assert upstream.requests[1].messages == talk("甲问", "甲答", "乙问")


async def test_a_queued_question_is_answered_that_it_waits(impatient, upstream):
    """The word of patience says that another question is before it."""
    gate = asyncio.Event()
    upstream.will(Script([gate, "甲答"]))
    await impatient.ask("甲问")
    seen = await impatient.ask("乙问")
    assert said("queued") in seen.text
    assert len(seen.taps) == len(seen.links) == 1
    gate.set()


async def test_commands_do_not_wait_for_answers(server, upstream):
    """While an answer is written, /help is answered on its first attempt."""
    gate = asyncio.Event()
    upstream.will(Script([gate, "甲答"]))
    first = asyncio.create_task(server.ask("/chatgpt 甲问"))
    await upstream.arrival("甲问")
    assert not (await server.ask("/help")).faulty
    gate.set()
    assert (await first).text.startswith("甲答")


async def test_too_many_questions_at_once_are_politely_refused(serve, upstream):
    """Beyond `waiting` a question gets a word, and no call."""
    server = await serve(limits={"waiting": 2}, wechat={"mute_guard": 0})
    gate = asyncio.Event()
    upstream.will(Script([gate, "甲答"]))
    await server.ask("/chatgpt 甲问")
    await server.ask("乙问")
    assert (await server.ask("丙问")).text.startswith("前面还有 2 个问题没答完")
    gate.set()
    await upstream.arrival("乙问")
    assert upstream.asked("丙问") == []


async def test_the_same_question_again_joins_the_first(impatient, upstream):
    """Asked twice while it is written, it is one question with one call."""
    gate = asyncio.Event()
    upstream.will(Script([gate, "甲答"]))
    await impatient.ask("甲问")
    again = await impatient.ask("甲问")
    assert said("thinking") in again.text
    gate.set()
    await upstream.requests[0].wait_over()
    assert (await impatient.wechat.tap(ANN, again.taps[0])).text.startswith("甲答")
    assert len(upstream.requests) == 1


async def test_stop_ends_what_is_queued_and_finishes_what_runs(impatient, upstream):
    """The queued question is not asked; the running answer stays to be read."""
    gate = asyncio.Event()
    upstream.will(Script([gate, "**甲**答"]))
    first = await impatient.ask("甲问")
    queued = await impatient.ask("乙问")
    await impatient.ask("/stop")
    ended = await impatient.wechat.tap(ANN, queued.taps[0])
    assert said("session_ended") in ended.text
    gate.set()
    await upstream.requests[0].wait_over()
    assert (await impatient.wechat.tap(ANN, first.taps[0])).text.startswith("甲答")
    assert "<strong>甲</strong>答" in (await impatient.get(first.links[0][1]))[1]
    assert len(upstream.requests) == 1


async def test_a_queued_question_learns_at_once_that_its_session_ended(
    server, upstream
):
    """The request that waits for it is answered 会话已结束."""
    gate = asyncio.Event()
    upstream.will(Script([gate, "甲答"]))
    first = asyncio.create_task(server.ask("/chatgpt 甲问"))
    await upstream.arrival("甲问")
    queued = server.wechat.text(ANN, "乙问")
    assert await server.wechat.attempt(queued) is None
    await server.ask("/stop")
    seen = await server.wechat.deliver(queued)
    assert said("session_ended") in seen.text and seen.attempt == 1
    gate.set()
    assert (await first).text.startswith("甲答")


async def test_a_new_session_does_not_wait_for_the_old(impatient, upstream):
    """After /clear a question is asked although the old session still writes."""
    gate = asyncio.Event()
    upstream.will(Script([gate, "甲答"]), "乙答")
    await impatient.ask("甲问")
    await impatient.ask("/clear")
    assert (await impatient.ask("乙问")).text.startswith("乙答")
    assert upstream.requests[1].messages == talk("乙问")
    gate.set()


async def test_an_assistant_named_like_the_beginning_of_a_command_leaves_it(
    serve, upstream
):
    """/clear clears although /c opens an assistant."""
    server = await with_session(
        serve, assistants={"c": {"base_url": upstream.base_url, "api_key": "k"}}
    )
    assert (await server.ask("/clear")).text.startswith("好，换个话题")
    assert not upstream.requests


async def test_a_late_text_that_is_refused_can_still_be_asked(serve, upstream):
    """接着问 keeps its text until it is accepted: it never becomes a question itself."""
    limits = {"question_chars": 8}
    server = await with_session(serve, session={"ttl": 1}, limits=limits)
    await asyncio.sleep(1.2)
    await server.ask("这是一个明显太长了的问题啊")
    first, second = await server.ask("接着问"), await server.ask("接着问")
    assert first.text == second.text and first.text.startswith("问题太长了")
    assert not upstream.requests
