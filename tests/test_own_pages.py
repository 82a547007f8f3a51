"""A subscriber's own pages: signing a browser in, asking there, and who may not."""

import asyncio
import html
import re
import urllib.parse

import pytest

from conftest import ANN, BOB, with_session
from fake_openai import Script, says
from owner.stats import gather_stats
from phone import Phone
from waiting import limit

URL = "https://wx.example.com"


@pytest.fixture
def changes():
    """The pages are reached by TLS; no attempt is left to time out."""
    return {"public_url": URL, "wechat": {"mute_guard": 0}}


def shown(page):
    """Return the text of a page, question by question."""
    words = re.sub(r"(?s)<(style|script).*?</\1>|<[^>]*>", " ", page.text)
    return re.sub(r"\s+", " ", html.unescape(words))


async def ended(phone, words):
    """Open the page until it shows these words."""
    async with limit(20, f"page with {words!r}"):
        while words not in shown(page := await phone.open()):
            await asyncio.sleep(0.05)
    return page


# Signing in


async def test_a_number_confirmed_in_the_chat_signs_a_browser_in(server):
    """The page shows a number, the chat says what it gives and asks, the page goes on."""
    phone = Phone(server)
    page = await phone.open()
    assert 'http-equiv="refresh"' in page.text and "<form" not in page.text
    assert (await phone.open()).number == page.number  # it stays this browser's
    assert (await Phone(server).open()).number != page.number
    asked = await server.ask(f"登录{page.number}")
    assert "以你的名义提问" in asked.text and asked.taps[0].label == "确认登录"
    assert (await phone.open()).number == page.number  # not before it is confirmed
    assert "回到网页" in (await server.wechat.tap(ANN, asked.taps[0])).text
    assert phone.fields() if "/me/ask" in (await phone.open()).text else False
    assert set(phone.cookies) == {"__Host-wxgpt"}


async def test_the_cookie_is_kept_from_scripts_and_others(server):
    """Random, HttpOnly, Secure, SameSite=Lax; the database has only its hash."""
    phone = Phone(server)
    number = (await phone.open()).number
    asked = await server.ask(f"登录 {number}")
    await server.wechat.tap(ANN, asked.taps[0])
    headers = {"Cookie": f"__Host-wxgpt-wait={phone.cookies['__Host-wxgpt-wait']}"}
    options = {"headers": headers, "allow_redirects": False}
    async with server.open(f"{server.url}/me", **options) as response:
        assert response.status == 303
        cookie = response.cookies["__Host-wxgpt"]
    assert cookie["httponly"] and cookie["secure"] and cookie["path"] == "/"
    assert cookie["samesite"] == "Lax" and cookie["max-age"] == str(30 * 86400)
    assert not cookie["domain"] and len(cookie.value) > 40


async def test_wrong_numbers_are_few(server):
    """Five an hour a subscriber: after that even the right one is refused."""
    phone = Phone(server)
    number = int((await phone.open()).number)
    for off in range(1, 6):
        seen = await server.ask(f"登录 {(number + off) % 10**6:06}")
        assert seen.text.startswith("这个数字不对")
    assert (await server.ask(f"登录 {number:06}")).text.startswith("数字错了太多次")
    assert (
        await server.ask(f"登录 {number:06}", BOB)
    ).taps  # another's count is theirs


async def test_a_number_is_one_subscribers(server):
    """Who sends it first has it; nothing is confirmed for another."""
    phone = Phone(server)
    number = (await phone.open()).number
    await server.ask(f"登录 {number}")
    assert (await server.ask(f"登录 {number}", BOB)).text.startswith("这个数字不对")
    assert (await server.ask("确认登录", BOB)).text.startswith("这个数字不对")
    assert (await phone.open()).number == number


async def test_the_sixth_device_is_refused(server):
    """Five may be signed in; /history says how many, and a tap ends them all."""
    phones = [Phone(server) for _ in range(5)]
    for phone in phones:
        await phone.sign_in(ANN)
    number = (await Phone(server).open()).number
    full = await server.ask(f"登录 {number}")
    assert "5 台设备" in full.text and full.taps[0].label == "全部退出"
    history = await server.ask("/history")
    assert "5 台设备" in history.text
    assert "5 台设备都退出了" in (await server.wechat.tap(ANN, history.taps[0])).text
    for phone in phones:
        assert (await phone.open()).number
    assert "设备" not in (await server.ask("/history")).text


async def test_over_http_pages_are_only_read(serve):
    """No number, no cookie, no field; the words are a question as any other."""
    server = await with_session(serve, public_url="http://wx.example.com")
    phone = Phone(server, "http://wx.example.com")
    page = await phone.open()
    assert page.status == 404 and not phone.cookies and "https" in shown(page)
    phone.cookies["__Host-wxgpt"] = "x" * 43
    assert (await phone.send("ask", question="问", id="x" * 16)).status == 401
    assert (await server.ask("登录 123456")).text.startswith(
        "你好！关于「登录 123456」"
    )


# Asking


async def test_a_question_is_answered_in_the_session_of_the_chat(phone, upstream):
    """Half here, half there: the model gets one conversation, in order."""
    server = phone.server
    await server.ask("第一问")
    await phone.ask("第二问")
    await ended(phone, "关于「第二问」")
    await server.ask("第三问")
    asked = [m["content"] for m in upstream.requests[-1].messages[1:]]
    assert asked[::2] == ["第一问", "第二问", "第三问"]
    page = shown(await phone.open())
    assert page.index("第一问") < page.index("第二问") < page.index("第三问")


async def test_a_question_opens_a_session_with_the_assistant_used_last(
    serve, upstream, settings
):
    """If none is open, as it is after /stop."""
    spare = {"spare": settings["assistants"]["chatgpt"] | {"model": "spare-1"}}
    server = await with_session(serve, public_url=URL, assistants=spare)
    await server.ask("/spare")
    await server.ask("/stop")
    phone = Phone(server)
    await phone.sign_in(ANN)
    await phone.ask("还在吗")
    await ended(phone, "关于「还在吗」")
    assert upstream.requests[-1].body["model"] == "spare-1"


async def test_a_second_sending_joins_the_first(phone, upstream, database):
    """Also after it was answered; another form, or other words, are another question."""
    fields = phone.fields() | {"question": "只问一次"}
    both = [Phone(phone.server, cookies=dict(phone.cookies)) for _ in range(2)]
    await asyncio.gather(*(one.send("ask", **fields) for one in both))
    await ended(phone, "关于「只问一次」")
    await phone.send("ask", **fields)
    assert database("SELECT count(*) FROM turn") == [(1,)]
    assert len(upstream.requests) == 1
    await phone.ask("再问一次")
    await ended(phone, "关于「再问一次」")
    assert database("SELECT count(*) FROM turn") == [(2,)]
    await phone.send("ask", **(fields | {"question": "改过的"}))  # the browser kept it
    await ended(phone, "关于「改过的」")


async def test_a_refused_question_keeps_its_words(serve, upstream):
    """They stand in the field, with the reason; nothing is asked."""
    limits = {"question_chars": 10, "questions_per_day": 1}
    server = await with_session(serve, public_url=URL, limits=limits)
    phone = Phone(server)
    await phone.sign_in(ANN)
    page = await phone.ask("很长的问题" * 5)
    assert page.status == 409 and "问题太长了" in shown(page)
    assert f">{'很长的问题' * 5}</textarea>" in page.text
    await phone.ask("短问题")
    await ended(phone, "关于「短问题」")
    page = await phone.ask("又一个")
    assert "今天的 1 个问题用完了" in shown(page)
    actions = re.findall(r'action="([^"]*/(?:search|export))"', page.text)
    led = {urllib.parse.urljoin(f"{URL}/me/ask", action) for action in actions}
    assert led == {f"{URL}/me/search", f"{URL}/me/export"}  # from its address
    assert len(upstream.requests) == 1


async def test_a_link_in_a_refusal_is_shown_with_its_address(serve):
    """The owner may link in a line for the chat; on a page it is words to be read."""
    texts = {
        "day_over": '每天 {count} 问，<a href="https://buy.example/?a=1&b=2">加量</a>。'
    }
    limits = {"questions_per_day": 1}
    server = await with_session(serve, public_url=URL, limits=limits, texts=texts)
    phone = Phone(server)
    await phone.sign_in(ANN)
    await phone.ask("问")
    page = await phone.ask("再问")
    assert "每天 1 问，加量（https://buy.example/?a=1&b=2）。" in shown(page)


async def test_a_forms_address_opened_as_a_page_leads_to_the_form(phone):
    """A browser may load again what a form has led to."""
    for form in ("ask", "search", "export"):
        page = await phone.open(f"/me/{form}")
        assert page.status == 200 and 'name="question"' in page.text


async def test_a_command_is_no_question_here(phone, upstream):
    """A model would say yes to /forget, and nothing would be deleted."""
    for text in ("/forget", "／stop", "/chatgpt 你好"):
        page = await phone.ask(text)
        assert page.status == 409 and "请在公众号里发" in shown(page)
    assert not upstream.requests


async def test_an_unread_answer_is_named_in_the_next_reply(phone, upstream, database):
    """And 继续 brings it; one that was read here is not named."""
    server = phone.server
    upstream.will(says("这是网页里问的答案。", after=0.5))
    await phone.ask("没人看的问题")
    async with limit(20, "end of the answer"):
        while database("SELECT state FROM turn") != [("done",)]:
            await asyncio.sleep(0.05)
    seen = await server.ask("/help")
    assert "没人看的问题" in seen.text
    tap = next(tap for tap in seen.taps if tap.content.startswith("继续"))
    assert "这是网页里问的答案。" in (await server.wechat.tap(ANN, tap)).text
    await phone.ask("看过的问题")
    await ended(phone, "关于「看过的问题」")
    assert "看过的问题" not in (await server.ask("/help")).text
    assert "关于「继续」" in (await server.ask("继续")).text  # a question: all is read


async def test_stop_ends_a_running_answer(phone, upstream, database):
    """What is written stays, as cut; the upstream's call is closed."""
    upstream.will(Script(["写了一半。", asyncio.Event()]))
    await phone.ask("很长的")
    await ended(phone, "写了一半。")
    key = database("SELECT link_key FROM turn")[0][0]
    await phone.send("stop", **phone.fields("new"), key=key)
    page = shown(await ended(phone, "已停在这里"))
    assert "写了一半。" in page
    async with limit(20, "end of the upstream's call"):
        while database("SELECT state, reason FROM turn") != [("cut", "stopped")]:
            await asyncio.sleep(0.05)
    await phone.ask("接着")
    await ended(phone, "关于「接着」")
    messages = [m["content"] for m in upstream.requests[-1].messages]
    assert "写了一半。" in messages


async def test_a_new_topic_begins_without_what_was_before(phone, upstream):
    """The next question, here or in the chat, is the first of its session."""
    await phone.ask("旧话题")
    await ended(phone, "关于「旧话题」")
    await phone.send("new", **phone.fields("new"))
    await phone.server.ask("新的")
    messages = [m["content"] for m in upstream.requests[-1].messages]
    assert "旧话题" not in messages


async def test_leaving_signs_this_device_out(phone):
    """And no other."""
    other = Phone(phone.server)
    await other.sign_in(ANN)
    cookies = dict(phone.cookies)
    assert (await phone.send("leave", **phone.fields("new"))).number
    assert "__Host-wxgpt" not in phone.cookies
    phone.cookies = cookies  # somebody had kept a copy
    assert (await phone.open()).number
    assert "/me/ask" in (await other.open()).text


# Whose it is


async def test_only_our_own_forms_act(phone, upstream):
    """Not another site's, not one of another device, not one without its token."""
    other = Phone(phone.server)
    await other.sign_in(BOB)
    fields = phone.fields() | {"question": "不该问的"}
    for page in (
        await phone.send("ask", {"Origin": "https://evil.example"}, **fields),
        await phone.send("ask", {"Origin": "null"}, **fields),
        await phone.send("ask", **(fields | {"token": ""})),
        await phone.send("ask", **(fields | {"token": other.fields()["token"]})),
        await phone.send("stop", **(fields | {"token": "字"})),
        await phone.send("leave", {"Origin": f"{URL}.evil.example"}, **fields),
    ):
        assert page.status == 403
    assert (await Phone(phone.server).send("ask", **fields)).status == 401
    assert not upstream.requests


async def test_a_form_id_is_its_subscribers(phone, upstream, database):
    """Bob's form with Ann's id is Bob's question."""
    other = Phone(phone.server)
    await other.sign_in(BOB)
    form = phone.fields()["id"]
    await phone.ask("安的秘密")
    await ended(phone, "关于「安的秘密」")
    page = await other.send(
        "ask", **(other.fields() | {"id": form, "question": "鲍的"})
    )
    assert "安的秘密" not in page.text
    await ended(other, "关于「鲍的」")
    assert database("SELECT openid, question FROM turn") == [
        (ANN, "安的秘密"),
        (BOB, "鲍的"),
    ]


async def test_a_link_that_was_passed_on_never_acts(phone):
    """/a/KEY and /h/KEY show no field to a browser that is not its subscriber's."""
    server = phone.server
    await server.ask("问题")
    link = (await server.ask("/history")).links[0][1]
    path = re.sub(r"^https?://[^/]+", "", link)
    for reader in (Phone(server), phone):
        page = await reader.open(path)
        assert "/me/ask" not in page.text
        assert page.headers["Content-Security-Policy"].count("frame-ancestors 'none'")


async def test_forgetting_ends_all_devices(phone, database):
    """Also a browser that was confirmed and has not gone on yet."""
    server = phone.server
    late = Phone(server)
    asked = await server.ask(f"登录 {(await late.open()).number}")
    await server.wechat.tap(ANN, asked.taps[0])
    fields = phone.fields() | {"question": "删了以后"}
    await server.wechat.tap(ANN, (await server.ask("/forget")).taps[0])
    assert (await phone.send("ask", **fields)).status == 401
    assert "数字过期了" in shown(await late.open())
    assert (await phone.open()).number
    assert database("SELECT count(*) FROM device") == [(0,)]
    assert database("SELECT count(*) FROM turn") == [(0,)]


async def test_unfollowing_ends_all_devices(phone, database):
    """Without a word."""
    server = phone.server
    await server.wechat.post(server.wechat.event(ANN, "unsubscribe"))
    async with limit(20, "end of the device"):
        while database("SELECT 1 FROM device"):
            await asyncio.sleep(0.05)
    assert (await phone.open()).number


async def test_who_is_denied_or_not_allowed_is_not_answered(serve, settings):
    """At the next start: their device reads nothing, or may not ask."""
    server = await with_session(serve, public_url=URL)
    phone = Phone(server)
    await phone.sign_in(ANN)
    phone.server = await serve(public_url=URL, limits={"allow": [BOB]})
    await phone.open()
    assert "暂未对你开放" in shown(await phone.ask("问"))
    phone.server = await serve(public_url=URL, limits={"deny": [ANN]})
    assert "/me/ask" not in (await phone.open()).text


async def test_pages_with_forms_say_whose_they_are(phone):
    """The policy allows forms to us alone, and nobody may frame the page."""
    headers = (await phone.open()).headers
    policy = headers["Content-Security-Policy"]
    assert "form-action 'self'" in policy and "frame-ancestors 'none'" in policy
    assert headers["Referrer-Policy"] == "same-origin"
    assert headers["Cache-Control"] == "no-store"


async def test_own_exchanges_are_searched_and_taken_along(phone):
    """By forms of the page, as by a history link."""
    await phone.ask("苹果怎么选")
    await ended(phone, "关于「苹果怎么选」")
    found = await phone.send("search", **phone.fields("search"), words="苹果")
    assert "<mark>苹果</mark>" in found.text
    await phone.open()
    file = await phone.send("export", **phone.fields("export"))
    assert file.headers["Content-Type"].startswith("text/markdown")
    assert "苹果怎么选" in file.text
    assert (await phone.send("export")).status == 403


async def test_questions_asked_on_the_page_count_in_stats(server, phone, upstream):
    """They are delivered there."""
    upstream.will("答在这里。")
    await phone.ask("网页上问的")
    await ended(phone, "答在这里。")
    total = gather_stats(server.bot.config, 7, False)["total"]
    assert total["questions"] == 1 and total["delivered"]["page"] == 1
