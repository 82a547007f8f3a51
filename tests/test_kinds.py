"""Every kind of message and event that WeChat knows, and some that it does not.

Pictures have a file of their own.
"""

import asyncio
import logging
import time

import pytest

import wxgpt
from conftest import ANN, BOB, TEXTS, said, shown, with_session
from fake_openai import Script
from wechat import WeChat

POLITE = TEXTS.unsupported
KEPT = {  # what has words is kept for a question
    "link": shown("words_kept", tap=TEXTS.word_article),
    "location": shown("words_kept", tap=TEXTS.word_place),
}
STICKERS = ["【收到不支持的消息类型，暂无法显示】", "[Unsupported Message]"]
VOICE = {"MediaId": "id_8k", "Format": "amr", "MediaId16K": "id_16k"}
KINDS = {
    "voice": VOICE | {"Recognition": ""},
    "voice with words": VOICE | {"MsgType": "voice", "Recognition": "你好"},
    "video": {"MediaId": "id", "ThumbMediaId": "thumb"},
    "shortvideo": {"MediaId": "id", "ThumbMediaId": "thumb"},
    "location": {
        "Location_X": 23.13,
        "Location_Y": 113.26,
        "Scale": 20,
        "Label": "广州",
    },
    "link": {"Title": "题", "Description": "述", "Url": "https://example.com/"},
    "file": {"Title": "a.pdf", "FileKey": "k", "FileMd5": "m", "FileTotalLen": 7},
    "hologram": {"Depth": 3},  # does not exist yet
    "transfer_customer_service": {},
    "image": {"MediaId": "no URL"},
    "text": {},  # without Content
}
BARE_EVENT = {"EventKey": None}
EVENTS = {
    "SCAN": {"EventKey": "scene", "Ticket": "ticket"},
    "LOCATION": BARE_EVENT | {"Latitude": 23.1, "Longitude": 113.3, "Precision": 119},
    "CLICK": {"EventKey": "key"},
    "VIEW": {"EventKey": "https://example.com/", "MenuId": 7},
    "TEMPLATESENDJOBFINISH": BARE_EVENT | {"MsgID": 200163836, "Status": "success"},
    "MASSSENDJOBFINISH": BARE_EVENT | {"MsgID": 1000001625, "SentCount": 75},
    "scancode_push": {"EventKey": "6"},
    "scancode_waitmsg": {"EventKey": "6"},
    "pic_sysphoto": {"EventKey": "6"},
    "pic_photo_or_album": {"EventKey": "6"},
    "pic_weixin": {"EventKey": "6"},
    "location_select": {"EventKey": "6"},
    "view_miniprogram": {"EventKey": "pages/index"},
    "subscribe_msg_popup_event": BARE_EVENT,
    "subscribe_msg_change_event": BARE_EVENT,
    "subscribe_msg_sent_event": BARE_EVENT,
    "user_info_modified": BARE_EVENT,
    "user_authorization_revoke": BARE_EVENT,
    "invented_in_2031": {"EventKey": "?"},
    "": {},
}
NESTED = (
    "<xml><ToUserName>gh_1</ToUserName><FromUserName>{openid}</FromUserName>"
    "<CreateTime>{now}</CreateTime><MsgType>event</MsgType>"
    "<Event>pic_weixin</Event><EventKey>6</EventKey><SendPicsInfo><Count>2</Count>"
    "<PicList><item><PicMd5Sum>a</PicMd5Sum></item><item><PicMd5Sum>b</PicMd5Sum></item>"
    "</PicList></SendPicsInfo></xml>"
)


@pytest.fixture
async def server(serve, caplog):
    """wxgpt as it starts, with what it logs."""
    caplog.set_level(logging.INFO, "wxgpt")
    return await serve()


WECHAT = WeChat("http://unused", "")  # only makes pushes


def push_of(kind):
    """Return a push of a kind, its type the first word of the name."""
    return WECHAT.raw(ANN, kind.split()[0], **KINDS[kind])


async def texts_to(server, texts):
    """Return what Ann sees of each text that she writes, one after the other."""
    return [(await server.ask(text)).text for text in texts]


def line_of(caplog, push):
    """Return what the owner reads about a push, behind its name."""
    name = push.fields.get("MsgId") or str(push.fields["Event"]).lower() or "-"
    start = f"msg={name} from={ANN[:8]} attempt=1 "
    [line] = [r.message for r in caplog.records if r.message.startswith(start)]
    return line.removeprefix(start).rpartition(" after ")[0]


# Messages


@pytest.mark.parametrize("kind", KINDS)
def test_a_message_of_any_kind_is_read(kind):
    """Type, sender and MsgId are there, and nothing that was not sent."""
    push = push_of(kind)
    message = wxgpt.parse_message(push.xml)
    assert (message.msg_type, message.openid) == (push.fields["MsgType"], ANN)
    assert message.msg_id == str(push.fields["MsgId"])
    assert message.content == message.event == message.picture_url == ""


async def test_other_kinds_in_a_session_bring_a_polite_word(server, upstream, caplog):
    """No call is made, and the owner sees that there was a reply."""
    await server.ask("/chatgpt")
    pushes = {kind: push_of(kind) for kind in KINDS}
    seen = {kind: await server.wechat.deliver(push) for kind, push in pushes.items()}
    lines = {kind: line_of(caplog, push) for kind, push in pushes.items()}
    texts = {kind: one.text for kind, one in seen.items()}
    assert texts == dict.fromkeys(KINDS, POLITE) | KEPT
    assert lines == dict.fromkeys(KINDS, "replied")
    assert upstream.requests == []


async def test_other_kinds_outside_a_session_are_left_alone(
    server, upstream, caplog, stored
):
    """Silence; the owner sees that there was nothing to say; nothing is stored."""
    pushes = {kind: push_of(kind) for kind in KINDS}
    answers = {kind: await server.wechat.post(push) for kind, push in pushes.items()}
    lines = {kind: line_of(caplog, push) for kind, push in pushes.items()}
    found = {kind: (one.status, one.body) for kind, one in answers.items()}
    assert found == dict.fromkeys(KINDS, (200, b"success"))
    assert lines == dict.fromkeys(KINDS, "nothing to say")
    assert upstream.requests == [] and ANN not in stored()


@pytest.mark.parametrize("kind", ["voice", "hologram"])
async def test_other_kinds_open_no_session(serve, upstream, kind):
    """auto_open and `outside` are for text."""
    server = await serve(session={"auto_open": True}, replies={"outside": "发文字吧"})
    assert (await server.wechat.deliver(push_of(kind))).text is None
    assert upstream.requests == []


async def test_other_kinds_keep_a_session_alive(server, database):
    """Whatever the subscriber sends, the idle time begins anew."""
    await server.ask("/chatgpt")
    database("UPDATE session SET last_at = last_at - 290")
    await server.wechat.deliver(push_of("voice"))
    [(last_at,)] = database("SELECT last_at FROM session")
    assert time.time() - last_at < 60


async def test_a_sticker_in_a_session_brings_a_polite_word(server, upstream):
    """WeChat sends a sentence in its place, in Chinese or English."""
    await server.ask("/chatgpt")
    assert await texts_to(server, STICKERS) == [POLITE] * 2
    assert upstream.requests == []


async def test_a_sticker_outside_a_session_is_left_alone(server, upstream):
    """It is no text of the subscriber's."""
    assert await texts_to(server, STICKERS) == [None] * 2


async def test_a_sticker_opens_no_session(serve, upstream):
    """With auto_open WeChat's own sentence, or an empty one, never reaches the model."""
    server = await serve(session={"auto_open": True})
    assert await texts_to(server, [*STICKERS, "", " "]) == [None] * 4
    assert upstream.requests == []


async def test_a_sticker_is_not_offered_to_be_asked(server, database):
    """After a session ran out the first text counts, and a sticker is none."""
    await server.ask("/chatgpt 你好")
    database("UPDATE session SET last_at = last_at - 301")
    assert await texts_to(server, [*STICKERS, ""]) == [None] * 3
    assert said("session_lapsed") in (await server.ask("再见")).text


async def test_a_sentence_about_stickers_is_a_question(server, upstream):
    """Only the whole sentence stands for a sticker."""
    await server.ask("/chatgpt")
    await server.ask(f"为什么有人发{STICKERS[0]}")
    assert len(upstream.requests) == 1


async def test_an_emoji_is_a_question(server, upstream):
    """Codes of WeChat's keyboard and Unicode's arrive at the model as they are."""
    emoji = ["/::)", "[微笑]", "😀", "👨‍👩‍👧‍👦"]
    await server.ask("/chatgpt")
    await texts_to(server, emoji)
    assert [asked.question for asked in upstream.requests] == emoji


# Events


@pytest.mark.parametrize("name", EVENTS)
def test_any_event_is_read(name):
    """Its name is known in lower case; a MsgID with a capital D is no MsgId."""
    message = wxgpt.parse_message(WECHAT.event(ANN, name, **EVENTS[name]).xml)
    assert (message.msg_type, message.event) == ("event", name.lower())
    assert (message.event_key, message.msg_id) == (
        EVENTS[name].get("EventKey") or "",
        "",
    )


@pytest.mark.parametrize("opening", ["/chatgpt", "/help"])
async def test_other_events_bring_success_and_a_line(
    server, upstream, caplog, stored, opening
):
    """In a session or not: nothing is said, asked or stored."""
    await server.ask(opening)
    before = stored()
    pushes = {name: WECHAT.event(ANN, name, **EVENTS[name]) for name in EVENTS}
    answers = {name: await server.wechat.post(push) for name, push in pushes.items()}
    lines = {name: line_of(caplog, push) for name, push in pushes.items()}
    found = {name: (one.status, one.body) for name, one in answers.items()}
    assert found == dict.fromkeys(EVENTS, (200, b"success"))
    assert lines == dict.fromkeys(EVENTS, "nothing to say")
    assert upstream.requests == [] and stored() == before


async def test_an_event_with_nested_blocks_is_read(server, caplog):
    """What we do not need may have any shape."""
    push = NESTED.format(openid=ANN, now=int(time.time()))  # else it is a last chance
    response = await server.wechat.post(push.encode())
    assert (response.status, response.body) == (200, b"success")
    assert "unreadable" not in caplog.text


async def test_following_brings_a_welcome_with_taps(server, caplog):
    """The commands in it can be tapped, and the first tap opens a session."""
    push = server.wechat.event(ANN, "subscribe")
    seen = await server.wechat.deliver(push)
    assert [tap.content for tap in seen.taps] == ["/chatgpt", "/help"]
    assert said("introduction") in (await server.wechat.tap(ANN, seen.taps[0])).text
    assert line_of(caplog, push) == "replied"


async def test_following_by_a_code_is_following(server):
    """A scene in EventKey changes nothing."""
    for openid, key in ((ANN, None), (BOB, ""), ("oCid", "qrscene_123123")):
        push = server.wechat.event(openid, "subscribe", EventKey=key)
        assert (await server.wechat.deliver(push)).text.startswith("欢迎关注")


async def test_a_welcome_of_the_owners_has_taps_too(serve):
    """Commands and assistants are found in any text of the owner's; addresses stay."""
    text = "欢迎！发/豆包开始，/HELP 看用法，https://a.example/help 是官网"
    other = {"api_key": "sk-2"}
    server = await serve(assistants={"豆包": other}, replies={"subscribe": text})
    seen = await server.wechat.deliver(server.wechat.event(ANN, "subscribe"))
    assert seen.text == text
    assert [tap.content for tap in seen.taps] == ["/豆包", "/HELP"]


async def test_unfollowing_brings_success_and_a_line(server, caplog, stored):
    """Everything is deleted, without a reply that nobody would see."""
    await server.ask("/chatgpt 一个秘密")
    push = server.wechat.event(ANN, "unsubscribe", "")
    response = await server.wechat.post(push)
    assert response.body == b"success" and ANN not in stored()
    assert line_of(caplog, push) == "nothing to say"


async def test_following_again_brings_the_welcome_again(server):
    """Unfollowing and following in one second are two events."""
    now = int(time.time())
    texts = []
    for name in ("subscribe", "unsubscribe", "subscribe"):
        push = server.wechat.event(ANN, name, create_time=now)
        texts.append((await server.wechat.deliver(push)).text)
        now += name == "unsubscribe"
    assert texts[0] == texts[2] and texts[1] is None


# Copies of events, which have no MsgId


async def test_a_repeated_event_is_one(server, stored):
    """The same four fields get the same bytes, and one reply is stored."""
    push = server.wechat.event(ANN, "subscribe")
    first = await server.wechat.deliver(push)
    again = await server.wechat.deliver(push)
    assert again.body == first.body and first.text
    assert stored().count('INSERT INTO "reply"') == 1


async def test_a_repeated_event_is_one_after_a_kill_too(spawn):
    """The welcome is stored: the same bytes, CreateTime included."""
    server, process = await spawn()
    push = server.wechat.event(ANN, "subscribe", create_time=int(time.time()))
    first = await server.wechat.deliver(push)
    await process.kill()
    await process.start()
    assert (await server.wechat.deliver(push)).body == first.body


OTHERS = [
    {},
    {"FromUserName": BOB},
    {"create_time": 1767230002},
    {"Event": "SCAN"},
    {"EventKey": "qrscene_2"},
]


def events_that_differ():
    """Return pushes of which each differs from the first in one field."""
    fields = {"create_time": 1767230001, "EventKey": "qrscene_1"}
    return [WECHAT.event(ANN, "subscribe", **(fields | other)) for other in OTHERS]


def test_openid_time_name_and_key_together_name_an_event():
    """Two events that differ in one of them are two."""
    keys = {wxgpt.parse_message(push.xml).key for push in events_that_differ()}
    assert len(keys) == len(OTHERS)


async def test_two_events_that_differ_in_one_field_are_two(server, caplog, stored):
    """Each welcome is a reply of its own, and the scan is taken note of."""
    for push in events_that_differ():
        assert (await server.wechat.post(push)).status == 200
    assert stored().count('INSERT INTO "reply"') == len(OTHERS) - 1
    assert caplog.text.count(f"msg=scan from={ANN[:8]} attempt=1") == 1


async def test_copies_of_an_event_at_once_are_one(server, stored):
    """Twenty requests, one welcome."""
    bodies = await server.wechat.copies(server.wechat.event(ANN, "subscribe"), 20)
    assert len(set(bodies)) == 1 and b"CDATA" in bodies[0]
    assert stored().count('INSERT INTO "reply"') == 1


async def test_a_job_id_is_no_message_id(server, caplog):
    """MsgID with a capital D numbers a mass mailing, not a push."""
    for created in (1767230001, 1767230002):
        push = server.wechat.event(
            ANN, "MASSSENDJOBFINISH", create_time=created, MsgID=1000001625
        )
        await server.wechat.post(push)
    assert caplog.text.count("left alone: no event of its kind is answered") == 2


# Auto-replies outside a session

REPLIES = {
    "outside": "发 /chatgpt 开始",
    "outside_hours": 0,
    "keywords": {"营业时间": "九点到五点", "说明": "发 /help", "/chatgpt价格": "免费"},
}


async def test_text_outside_a_session_brings_outside(serve, upstream):
    """With its commands as taps, every time."""
    server = await serve(replies=REPLIES)
    for _ in range(2):
        seen = await server.ask("有人吗")
        assert seen.text == "发 /chatgpt 开始"
        assert [tap.content for tap in seen.taps] == ["/chatgpt"]
    assert upstream.requests == []


async def test_without_outside_text_brings_silence(server, caplog):
    """Other people's replies are not disturbed; the owner sees the line."""
    push = server.wechat.text(ANN, "有人吗")
    assert (await server.wechat.post(push)).body == b"success"
    assert line_of(caplog, push) == "nothing to say"


async def test_a_keyword_brings_its_reply(serve, upstream):
    """The exact text, space around it aside."""
    server = await serve(replies=REPLIES)
    assert await texts_to(server, ["营业时间", " 营业时间\n"]) == ["九点到五点"] * 2
    assert upstream.requests == []


async def test_a_text_that_only_contains_a_keyword_is_none(serve):
    """Anything else is text outside a session."""
    server = await serve(replies=REPLIES)
    near = ["营业时间？", "营业", "请问营业时间", "营业 时间"]
    assert await texts_to(server, near) == ["发 /chatgpt 开始"] * 4


async def test_a_reply_to_a_keyword_has_taps(serve):
    """Commands in it can be tapped."""
    server = await serve(replies=REPLIES)
    assert [tap.content for tap in (await server.ask("说明")).taps] == ["/help"]


async def test_a_keyword_in_a_session_is_a_question(serve, upstream):
    """Keywords and `outside` count outside a session only."""
    server = await with_session(serve, replies=REPLIES)
    assert "关于「营业时间」" in (await server.ask("营业时间")).text
    await server.ask("/stop")
    assert (await server.ask("营业时间")).text == "九点到五点"


async def test_a_keyword_counts_more_than_auto_open(serve, upstream):
    """What an owner answered by hand costs no call."""
    server = await serve(replies=REPLIES, session={"auto_open": True})
    assert (await server.ask("营业时间")).text == "九点到五点"
    assert upstream.requests == []


async def test_auto_open_asks_the_first_assistant(serve, settings, upstream):
    """Any text opens a session with it, and is its first question."""
    chatgpt = settings["assistants"].pop("chatgpt")
    settings["assistants"] = {"豆包": chatgpt | {"model": "bean"}, "chatgpt": chatgpt}
    server = await serve(session={"auto_open": True})
    await server.ask("第一问")
    await server.ask("第二问")
    assert [asked.body["model"] for asked in upstream.requests] == ["bean", "bean"]
    assert "第一问" in str(upstream.requests[1].messages)


async def test_auto_open_leaves_commands_and_events_alone(serve, upstream):
    """/help is help, an event is an event."""
    server = await serve(session={"auto_open": True})
    assert "聊天记录" in (await server.ask("/help")).text
    assert said("no_session") in (await server.ask("/stop")).text
    await server.wechat.post(server.wechat.event(ANN, "CLICK", "key"))
    assert upstream.requests == []


async def test_auto_open_begins_anew_after_a_session_ran_out(serve, database, upstream):
    """The text opens a new session instead of being offered for the old one."""
    server = await serve(session={"auto_open": True})
    await server.ask("旧问题")
    database("UPDATE session SET last_at = last_at - 301")
    assert (await server.ask("新问题")).text.startswith("你好！关于「新问题」")
    assert "旧问题" not in str(upstream.requests[1].messages)


async def test_messages_and_events_of_one_second_are_answered_in_order(
    server, upstream
):
    """A subscriber who follows and writes at once gets both answers."""
    gate = asyncio.Event()
    upstream.will(Script([gate, "好。"]))
    await server.ask("/chatgpt")
    asking = asyncio.create_task(server.ask("慢问题"))
    await upstream.arrival("慢问题")
    seen = await server.wechat.deliver(server.wechat.event(ANN, "subscribe"))
    assert seen.text.startswith("欢迎关注") and seen.attempt == 1
    gate.set()
    assert (await asking).text.startswith("好。")
