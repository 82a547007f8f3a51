"""Nobody is met with silence or a riddle: whole conversations, as people hold them.

Each transcript goes through the door. What our own lines say is in texts.toml.
"""

import asyncio
import json
import logging
import time

import pytest

import wxgpt
from conftest import (
    ANN,
    BOB,
    LONG,
    TEXTS,
    UNIT,
    said,
    shown,
    toml,
    with_session,
)
from fake_openai import Script, fails, says

HINT = {"replies": {"outside": wxgpt.HINT}}
LABEL = "\n（AI 生成）"
PRIVACY = TEXTS.privacy


def labels(seen):
    """Return what the taps of a reply show."""
    return [tap.label for tap in seen.taps]


async def tap(server, seen, label):
    """Tap the link with this label; return what that brings."""
    [one] = [one for one in seen.taps if one.label == label]
    return await server.wechat.tap(ANN, one)


# A newcomer


async def test_a_newcomer_is_led_to_an_answer(serve, upstream):
    """Follows, says hello, gets a hint, opens by its tap, asks by an example's."""
    server = await serve(**HINT)
    welcome = await server.wechat.deliver(server.wechat.event(ANN, "subscribe"))
    assert labels(welcome) == ["/chatgpt", "/help"]
    hint = await server.ask("你好")
    assert hint.text == wxgpt.HINT
    opened = await tap(server, hint, "/chatgpt")
    assert opened.text.startswith(TEXTS.greeting) and PRIVACY in opened.text
    assert "发图片" in opened.text and "chatgpt" in opened.text
    assert labels(opened) == [TEXTS.word_example_1, TEXTS.word_example_2, "/forget"]
    answer = await tap(server, opened, TEXTS.word_example_1)
    assert answer.text.startswith(f"你好！关于「{TEXTS.word_example_1}」")
    assert PRIVACY not in answer.text
    await server.ask("/stop")
    assert (await server.ask("/chatgpt")).text == shown("opened", assistant="chatgpt")


OPENINGS = {
    "a question": ({}, "/chatgpt 今天吃什么"),
    "auto_open": ({"session": {"auto_open": True}}, "今天吃什么"),
    "a keyword": ({"replies": {"keywords": {"开始": "/chatgpt 今天吃什么"}}}, "开始"),
    "an alias": ({"aliases": {"开始": "/chatgpt 今天吃什么"}}, "开始"),
}


@pytest.mark.parametrize("way", OPENINGS)
async def test_the_first_opening_introduces_itself_in_any_way(serve, upstream, way):
    """Below the first answer, once; the next one is without."""
    changes, text = OPENINGS[way]
    server = await serve(**changes)
    first, second = await server.ask(text), await server.ask("然后呢")
    assert first.text.startswith("你好！关于「今天吃什么」")
    assert said("introduction") in first.text and first.text.endswith(PRIVACY)
    assert PRIVACY not in second.text and upstream.requests[0].question == "今天吃什么"


async def test_a_full_reply_leaves_the_privacy_words_to_the_next(spawn, upstream):
    """The next one that has room carries them, after a kill too."""
    server, process = await spawn()
    upstream.will(says(LONG))
    first = await server.ask("/chatgpt 写长文")
    assert PRIVACY not in first.text
    await process.kill()
    await process.start()
    assert PRIVACY in (await server.ask("谢谢")).text
    assert PRIVACY not in (await server.ask("再见")).text


async def test_who_read_the_privacy_words_on_a_page_is_not_told_again(serve):
    """A page can ask and note it."""
    server = await serve()
    store, now = server.bot.store, time.time()
    assert not (await store.recall("", ANN, now)).is_told
    await store.note(ANN, told_at=now)
    assert (await store.recall("", ANN, now)).is_told
    assert (await server.ask("/chatgpt")).text == shown("opened", assistant="chatgpt")


async def test_after_forget_it_begins_again(server, stored):
    """It is said how, and the introduction comes as for a newcomer."""
    asked = await server.ask("/forget")
    gone = await tap(server, asked, TEXTS.word_forget)
    assert gone.text == shown("forgotten", tap="/chatgpt") and ANN not in stored()
    again = await tap(server, gone, "/chatgpt")
    assert again.text.startswith(TEXTS.greeting) and PRIVACY in again.text


async def test_a_copy_of_the_confirmation_has_its_tap_too(server):
    """The stored reply is the one that was sent."""
    await server.ask("/forget")
    push = server.wechat.text(ANN, TEXTS.word_forget)
    first = await server.wechat.deliver(push)
    server.bot.deliveries.clear()
    again = await server.wechat.deliver(push)
    assert again.content == first.content and labels(again) == ["/chatgpt"]


# Outside a session


async def test_the_hint_comes_once_in_its_hours(spawn, database):
    """To each subscriber; a restart does not bring it again, a day does."""
    server, process = await spawn(**HINT)
    assert (await server.ask("你好")).text == wxgpt.HINT
    await process.kill()
    await process.start()
    assert (await server.ask("在吗")).text is None
    await process.says("left alone: a hint was sent within 24 h")
    assert "在吗" not in "".join(process.log)
    assert (await server.ask("你好", BOB)).text == wxgpt.HINT
    database("UPDATE subscriber SET hinted_at = hinted_at - 86401")
    assert (await server.ask("有人吗")).text == wxgpt.HINT


REASONS = {
    "text": "replies.outside is empty",
    "sticker": "no words, and no session is open",
    "voice": "no text, and no session is open",
    "denied": "the sender is in limits.deny",
}


async def test_the_log_says_why_something_was_left_alone(serve, caplog):
    """The reason, and not what was written."""
    caplog.set_level(logging.INFO, "wxgpt")
    server = await serve(limits={"deny": [BOB]})
    await server.ask("有个秘密")
    await server.ask("[Unsupported Message]")
    await server.wechat.deliver(server.wechat.voice(ANN))
    await server.ask("有个秘密", BOB)
    lines = [r.message for r in caplog.records if "left alone" in r.message]
    assert [line.partition("left alone: ")[2] for line in lines] == [*REASONS.values()]
    assert "秘密" not in caplog.text


@pytest.mark.parametrize("auto_open", [False, True])
@pytest.mark.parametrize("text", ["/chatgtp", "／ｍｅｎｕ", "/chatgtp 你好"])
async def test_an_unknown_command_is_told_so(serve, upstream, auto_open, text):
    """It may be a slip of the finger, and is no question; in a session it is one."""
    server = await serve(session={"auto_open": auto_open})
    seen = await server.ask(text)
    assert seen.text == shown("no_command", word=text.split()[0])
    assert labels(seen) == ["/help"] and not upstream.requests
    await server.ask("/chatgpt")
    await server.ask(text)
    assert upstream.requests[0].question == text


async def test_an_unknown_command_is_no_way_to_write_a_link(serve):
    """What is repeated of it stays a text."""
    seen = await (await serve()).ask('/<a\u3000href="https://example.com">x</a>')
    assert seen.links == () and labels(seen) == ["/help"]


async def test_a_keyword_carries_out_its_command(serve, upstream):
    """Outside a session; in one it is a question."""
    keywords = {
        "笑话": "/chatgpt 讲个笑话",
        "怎么用": "/help",
        "价格": "免费，见 /help",
    }
    server = await serve(replies={"keywords": keywords})
    assert said("help_begin") in (await server.ask("怎么用")).text
    assert (await server.ask("价格")).text == keywords["价格"]
    await server.ask("笑话")
    await server.ask("笑话")
    asked = [request.question for request in upstream.requests]
    assert asked == ["讲个笑话", "笑话"]


async def test_texts_may_go_to_wechats_own_ai(serve, stored, upstream):
    """Only texts, each of them, the same for every copy; events stay ours."""
    server = await serve(replies={"outside": "wechat_ai"})
    for text in ("你好", "在吗"):
        assert (await server.ask(text)).handed_over
    push = server.wechat.text(ANN, "几点开门")
    first = await server.wechat.post(push)
    server.bot.deliveries.clear()
    assert (await server.wechat.post(push)).body == first.body
    for other in (server.wechat.voice(ANN), server.wechat.event(ANN, "CLICK", "k")):
        seen = await server.wechat.deliver(other)
        assert (seen.text, seen.handed_over) == (None, False)
    await server.ask("/chatgpt")
    assert "关于「你好」" in (await server.ask("你好")).text


async def test_nothing_else_looks_like_a_hand_over(serve, upstream):
    """A model that writes the sign of it writes a text."""
    server = await with_session(serve)
    upstream.will(says(wxgpt.WECHAT_AI + "好"))
    assert (await server.ask("问")).text == "好" + LABEL


# A lapse


async def test_each_text_after_a_lapse_is_offered(serve, upstream, database):
    """Three texts, three offers; the tap asks the newest in the old conversation."""
    server = await with_session(serve, **HINT)
    await server.ask("红烧肉怎么做")
    database("UPDATE session SET last_at = last_at - 400")
    for text in ("说详细点", "在吗", "要放糖吗"):
        seen = await server.ask(text)
        assert seen.text == shown("session_lapsed", tap="接着问", question=text)
    answer = await tap(server, seen, "接着问")
    assert answer.text.startswith("你好！关于「要放糖吗」")
    assert "红烧肉" in str(upstream.requests[1].messages)


async def test_an_offer_ends_after_a_day(serve, database):
    """Then it is text outside a session like any other."""
    server = await with_session(serve, **HINT)
    database("UPDATE session SET last_at = last_at - 86800")
    assert (await server.ask("在吗")).text == wxgpt.HINT
    assert (await server.ask("接着问")).text is None


# Answers


async def test_a_slow_answer_is_one_tap_away(server, upstream):
    """看回答, by the tap or typed, and no number to be understood."""
    gate = asyncio.Event()
    upstream.will(Script([gate, "想好了。"]))
    seen = await server.ask("宇宙有多大")
    age = TEXTS.age_10 if 3 * UNIT < 10 else TEXTS.age_20
    words = {"question": "宇宙有多大", "time": age, "page": TEXTS.word_page}
    assert seen.text == shown("thinking", tap=TEXTS.word_answer, **words)
    gate.set()
    assert (await tap(server, seen, TEXTS.word_answer)).text == "想好了。" + LABEL


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0, "几秒"), (14, "十几秒"), (20, "几十秒"), (61, "一分多钟"), (600, "好几分钟")],
)
def test_an_age_is_told_in_words(seconds, words):
    """Nobody needs the number."""
    assert wxgpt.spoken_age(TEXTS, seconds) == words


async def test_a_queued_question_says_how_many_are_before_it(server, upstream):
    """Each its own number."""
    gate = asyncio.Event()
    upstream.will(Script([gate, "好。"]))
    server.bot.guard.limit = 0
    await server.ask("第一个")
    for before, question in enumerate(("第二个", "第三个"), 1):
        seen = await server.ask(question)
        words = {"question": question, "before": before, "page": TEXTS.word_page}
        assert seen.text == shown("queued", tap=TEXTS.word_answer, **words)
    assert said("too_many") in (await server.ask("第四个")).text
    gate.set()


async def test_a_tap_does_what_its_words_say_whatever_signs_they_have(serve):
    """Android drops signs from what a tap sends: it means the same without them."""
    server = await serve(texts={"word_forget": "确认删除！"})
    asked = await server.ask("/forget")
    assert [tap.content for tap in asked.taps] == ["确认删除"]
    assert said("forgotten") in (await server.wechat.tap(ANN, asked.taps[0])).text


async def read_all(server, first):
    """Tap on from an ended answer's part; return what each tap showed, and the end."""
    seen, shown_taps = first, []
    while seen.taps:
        shown_taps += labels(seen)
        seen = await server.wechat.tap(ANN, seen.taps[0])
    return shown_taps, seen


async def test_the_parts_of_a_long_answer_are_counted(server, upstream):
    """看下一段（2/4） and so on to 4/4, which is the last, whatever was read when."""
    upstream.will(says(LONG))
    await server.ask("写长文")
    await upstream.requests[0].wait_over()
    first = await server.ask("继续")
    taps, _ = await read_all(server, first)
    assert taps == ["看下一段（3/4）", "看下一段（4/4）"]


async def test_the_count_is_right_after_an_early_cut_and_a_restart(spawn, upstream):
    """A short first part makes one more, and the next process knows its place."""
    server, process = await spawn(wechat={"mute_guard": 0, "attempt_timeout": 1.0})
    await server.ask("/chatgpt")
    gate = asyncio.Event()
    upstream.will(Script([LONG[:100], gate, LONG[100:]]))
    first = await server.ask("写长文")
    assert labels(first) == [TEXTS.word_writing]
    gate.set()
    await process.says(" done after")
    await process.kill()
    await process.start()
    taps, end = await read_all(server, await tap(server, first, TEXTS.word_writing))
    assert taps == [f"看下一段（{n}/5）" for n in (3, 4, 5)]
    assert "第59句" in end.text


@pytest.mark.parametrize("size", [1700, 1790, 1799, 1800, 1801, 3500, 9000])
@pytest.mark.parametrize("reason", ["stop", "length"])
async def test_every_tail_fits(server, upstream, size, reason):
    """1800 bytes hold a part with whatever tail it has, and no part is empty."""
    text = "".join(f"{n:05}，" for n in range(size // 8 + 1)).encode()[:size]
    script = Script([text.decode(errors="ignore")], finish=reason)
    upstream.will(script)
    seen = await server.ask("写")
    await upstream.requests[0].wait_over()
    count = 1  # what has an early end is cut there
    while seen.taps and seen.taps[0].content.startswith("继续"):
        seen = await server.wechat.tap(ANN, seen.taps[0])
        assert len(seen.content.encode()) <= 1800 and TEXTS.no_more not in seen.text
        count += 1
    assert labels(seen) == ([TEXTS.word_go_on] if reason == "length" else [])
    assert count >= size / 1800


async def test_the_worst_tail_is_what_cuts_are_measured_with(server):
    """Whatever number, place and state an answer has."""
    turn = wxgpt.Turn(1, 1, ANN, f"{ANN} 1", "k" * 22, "问", None, time.time(), 1, "c")
    room = server.bot.room_in(turn)
    part = wxgpt.Part(10**9 - 1, 1, 0, place=500)
    sizes = []
    for left in (None, 400):
        sizes.append(wxgpt.sent_size(server.bot.tail(turn, part, left)))
    assert room + max(sizes) == wxgpt.REPLY_BYTES


CONTINUES = ["继续", "看下一段", "下一段", "接着看", "看回答", "看下一段（2/4）"]
CONTINUES += ["看下一段(2/4)", "　看下一段（２/４） ", "继续1", "继续 １"]


@pytest.mark.parametrize("text", CONTINUES)
async def test_what_a_tap_shows_may_be_typed(server, upstream, text):
    """In full or half width, with the count or without."""
    upstream.will(says(LONG))
    first = await server.ask("写长文")
    await upstream.requests[0].wait_over()
    seen = await server.ask(text)
    assert labels(seen) == ["看下一段（3/4）"] and seen.text[:8] not in first.text


@pytest.mark.parametrize(
    "text", ["继续讲讲", "看下一段吧", "下一段是什么", "再试一次吧"]
)
async def test_what_only_begins_like_a_tap_is_a_question(server, upstream, text):
    """Exact words only."""
    upstream.will(says(LONG))
    await server.ask("写长文")
    await server.ask(text)
    assert upstream.requests[-1].question == text


async def test_continue_goes_on_with_the_answer_shown_last(server, upstream):
    """Not with an older one that waits; that one's turn comes after it."""
    gate = asyncio.Event()
    upstream.will(Script([gate, "慢的。"]), says(LONG))
    slow = await server.ask("慢问题")
    gate.set()
    await upstream.requests[0].wait_over()
    await server.ask("写长文")
    await upstream.requests[1].wait_over()
    for words in ("看下一段（3/4）", "看下一段（4/4）"):
        assert labels(await server.ask("继续"))[0] == words
    assert "第59句" in (await server.ask("继续")).text
    assert (await server.ask("继续")).text.startswith("慢的。")
    assert labels(slow) == [TEXTS.word_answer]


async def test_a_part_read_again_is_the_answer_shown_last(server, upstream):
    """Going back to an older answer, 继续 goes on there."""
    upstream.will(says("甲" + LONG), says("乙" + LONG))
    first = await server.ask("甲文")
    await upstream.requests[0].wait_over()
    again = await server.wechat.tap(ANN, first.taps[0])
    await server.ask("乙文")
    await upstream.requests[1].wait_over()
    assert (await server.wechat.tap(ANN, first.taps[0])).content == again.content
    third = await server.ask("继续")
    assert third.text == (await server.wechat.tap(ANN, again.taps[0])).text


async def test_a_cut_answer_goes_on_as_a_question(server, upstream):
    """接着说 is asked in the conversation, which has what was written."""
    upstream.will(Script(["第一章。"], finish="length"), "第二章。")
    cut = await server.ask("写小说")
    assert cut.text == f"第一章。{LABEL}\n\n" + shown("cut_short", tap="接着说")
    assert (await tap(server, cut, "接着说")).text == "第二章。" + LABEL
    messages = [one["content"] for one in upstream.requests[1].messages[-3:]]
    assert messages == ["写小说", "第一章。", "接着说"]


async def test_a_cut_answer_goes_on_after_a_lapse(server, upstream, database):
    """The tap needs no second one."""
    upstream.will(Script(["第一章。"], finish="length"), "第二章。")
    cut = await server.ask("写小说")
    database("UPDATE session SET last_at = last_at - 400")
    assert (await tap(server, cut, "接着说")).text == "第二章。" + LABEL


@pytest.mark.parametrize("typed", ["再试一次", "重试", " 再试一次 "])
async def test_a_failed_question_is_tried_again(server, upstream, typed):
    """By the tap's words or the old ones."""
    upstream.will(fails(401), "好了。")
    failed = await server.ask("会失败")
    assert labels(failed) == ["再试一次"]
    assert (await server.ask(typed)).text == "好了。" + LABEL


async def test_a_broken_answer_promises_nothing(server, upstream):
    """It says where it broke, and nothing about what would be above."""
    gate = asyncio.Event()
    upstream.will(Script(["第一句。" * 3, gate], ending="reset"))
    first = await server.ask("说三句")
    gate.set()
    await upstream.requests[0].wait_over()
    rest = await server.wechat.tap(ANN, first.taps[0])
    assert rest.text == shown("failed_broken", tap="再试一次")


async def test_a_limit_is_told_with_the_hour(serve):
    """A day's questions are used up: until when."""
    server = await with_session(serve, limits={"questions_per_day": 1})
    await server.ask("一")
    assert (await server.ask("二")).text == shown("day_over", count=1)


# Aliases


ALIASES = {"帮助": "help", "菜单": "help", "用法": "help", " 帮助　": "help"}
ALIASES |= {"聊天记录": "history", "历史记录": "history", "网页聊天": "history"}
ALIASES |= {"换个话题": "clear", "新话题": "clear", "结束对话": "stop"}
ALIASES |= {"删除我的记录": "forget"}


@pytest.mark.parametrize("text", ALIASES)
async def test_plain_words_are_commands(server, upstream, caplog, text):
    """In a session and outside."""
    caplog.set_level(logging.INFO, "wxgpt")
    await server.ask(text)
    await server.ask(text, BOB)
    lines = [r.message for r in caplog.records]
    found = [line for line in lines if line.endswith(f"command {ALIASES[text]}")]
    assert len(found) == 2 and not upstream.requests


async def test_aliases_are_the_owners(serve, upstream):
    """Their table replaces ours, and an empty one is none."""
    server = await with_session(serve, aliases={"求助": "/help"})
    assert said("help_ask") in (await server.ask("求助")).text
    assert "关于「帮助」" in (await server.ask("帮助")).text


WRONG = {
    "no command": ({"aliases": {"帮助": "/hilfe"}}, "aliases.帮助: found '/hilfe'"),
    "a sentence": ({"aliases": {"帮助": "看 /help"}}, "expected a command"),
    "a tap's words": ({"aliases": {"看回答": "/help"}}, "the words of taps"),
    "继续": ({"aliases": {"继续": "/help"}}, "the words of taps"),
    "twice": ({"aliases": {"AI": "/help", "ａｉ": "/stop"}}, "the aliases"),
    "a slash": ({"aliases": {"/help": "/stop"}}, "a short text without /"),
    "empty": ({"aliases": {" ": "/stop"}}, "a short text without /"),
    "a keyword": ({"replies": {"keywords": {"菜单": "鱼"}}}, "replies.keywords"),
    "hours": ({"replies": {"outside_hours": -1}}, "replies.outside_hours"),
    "a long notice": (
        {"replies": {"model_notice": "长" * 101}},
        "at most 100 characters",
    ),
    "no table": ({"aliases": "帮助"}, "aliases: found '帮助'"),
}


@pytest.mark.parametrize("name", WRONG)
def test_names_that_mean_two_things_end_the_start(tmp_path, settings, name):
    """With one line that names them."""
    changes, words = WRONG[name]
    path = tmp_path / "wxgpt.toml"
    path.write_text(toml(settings | changes), "utf-8")
    with pytest.raises(wxgpt.ConfigError, match=words) as error:
        wxgpt.load_config(path, {}, wxgpt.check_commands)
    assert "\n" not in str(error.value)


# The notice, articles and places


async def test_the_notice_stands_in_welcome_help_and_pages(serve):
    """An owner who must name the filed model can."""
    notice = "本服务使用某某大模型，备案号 Beijing-XX-2026"
    server = await with_session(serve, replies={"model_notice": notice})
    welcome = await server.wechat.deliver(server.wechat.event(ANN, "subscribe"))
    assert welcome.text.endswith(notice)
    assert (await server.ask("/help")).text.endswith(notice)
    await server.ask("你好")
    [(_, link)] = (await server.ask("/history")).links
    assert notice in (await server.get(link))[1]


ARTICLE = {
    "Title": "立秋养生",
    "Description": "早睡早起",
    "Url": "https://example.com/",
}


async def test_an_article_goes_along_with_the_next_question(server, upstream):
    """Its title and summary, once; the tap asks what it says."""
    seen = await server.wechat.deliver(server.wechat.raw(ANN, "link", **ARTICLE))
    assert labels(seen) == [TEXTS.word_article]
    await tap(server, seen, TEXTS.word_article)
    await server.ask("还有呢")
    first, second = (asked.messages[-1]["content"] for asked in upstream.requests)
    assert first == f"{TEXTS.word_article}\n\n【文章】立秋养生\n早睡早起"
    assert second == "还有呢" and "立秋" in str(upstream.requests[1].messages[:-1])


async def test_a_place_goes_along_with_the_next_question(server, upstream):
    """By its name."""
    where = {"Location_X": 23.13, "Location_Y": 113.26, "Label": "广州市天河区"}
    await server.wechat.deliver(server.wechat.raw(ANN, "location", **where))
    await server.ask("附近吃什么")
    assert upstream.requests[0].question == "附近吃什么\n\n【位置】广州市天河区"


async def test_a_long_article_is_shortened(server, upstream):
    """What it adds to a question is bounded."""
    long = {"Title": "题" * 5000, "Description": "述" * 5000}
    await server.wechat.deliver(server.wechat.raw(ANN, "link", **long))
    await server.ask("讲什么")
    assert len(upstream.requests[0].question) < 450


async def test_what_waits_for_a_question_is_kept_ten_minutes(
    server, database, upstream
):
    """Then it is gone, as a picture is."""
    await server.wechat.deliver(server.wechat.raw(ANN, "link", **ARTICLE))
    database("UPDATE picture SET created_at = created_at - 601")
    await server.ask("讲什么")
    assert upstream.requests[0].question == "讲什么"


async def test_an_article_is_asked_about_again(server, upstream):
    """A retry has its words once."""
    upstream.will(fails(401))
    await server.wechat.deliver(server.wechat.raw(ANN, "link", **ARTICLE))
    await server.ask("讲什么")
    await server.ask("再试一次")
    one, two = (asked.question for asked in upstream.requests)
    assert one == two and one.count("立秋养生") == 1


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        ("link", {"Url": "https://example.com/"}),
        ("location", {"Location_X": 1, "Location_Y": 2, "Label": " "}),
        ("miniprogrampage", {"Title": "小程序", "AppId": "wx0"}),
    ],
)
async def test_what_has_no_words_for_us_brings_a_polite_one(server, kind, fields):
    """A link without a title, a place without a name, a card."""
    seen = await server.wechat.deliver(server.wechat.raw(ANN, kind, **fields))
    assert seen.text == TEXTS.unsupported


async def test_blocked_words_of_an_article_are_refused(serve, tmp_path, upstream):
    """As those of the question."""
    path = tmp_path / "words.txt"
    path.write_text("早睡", "utf-8")
    server = await with_session(serve, limits={"blocked_words": str(path)})
    await server.wechat.deliver(server.wechat.raw(ANN, "link", **ARTICLE))
    assert (await server.ask("讲什么")).text == TEXTS.blocked_question
    assert not upstream.requests


# The lines


TECHNICAL = ("模型", "会话", "排版", "token", "接口", "上下文", "下文")


def test_no_line_speaks_like_a_technician():
    """People read them, of whatever age."""
    lines = json.dumps(vars(TEXTS), ensure_ascii=False)
    assert [word for word in TECHNICAL if word in lines] == []
