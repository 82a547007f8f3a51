"""Pages: what a subscriber's browser gets behind the links of replies."""

import asyncio
import json
import os
import re
import shutil

import pytest

from conftest import ANN, BOB, LONG, blocks_of, said, with_session
from fake_openai import Script
from waiting import within

KINDS = ["answer", "pending", "history", "expired", "missing", "missing history"]
KINDS += ["unknown", "front"]


@pytest.fixture
def changes():
    """The server lets no attempt time out."""
    return {"wechat": {"mute_guard": 0}}


@pytest.fixture
async def addresses(server, upstream):
    """Return the address of a page of every kind."""
    gate = asyncio.Event()
    upstream.will("`码`\n```\n码\n```", Script(["写到这里。", gate, "完"]))
    answer = (await server.ask("有码吗？")).links[0][1]
    expired = (await server.ask("/history")).links[0][1]
    history = (await server.ask("/history")).links[0][1]
    pending = (await server.ask("慢慢写")).links[0][1]
    others = [server.url + place for place in ("/a/nothing", "/h/nothing", "/x/y", "/")]
    yield dict(zip(KINDS, (answer, pending, history, expired, *others), strict=True))
    gate.set()


@pytest.fixture
async def pages(server, addresses):
    """Return headers and text of a page of every kind."""
    pages = {}
    for kind, address in addresses.items():
        async with server.open(address) as response:
            pages[kind] = response.headers, await response.text()
    return pages


async def link_to(server, upstream, script, question="给安看的"):
    """Ask for an answer; return the page that its reply links to."""
    upstream.will(script)
    return server.at((await server.ask(question)).links[0][1])


async def events_of(response):
    """Read an event stream to its end; return (name, id, data) of each event."""
    blocks = (await response.text()).split("\n\n")
    return [
        read_event(block) for block in blocks if not block.startswith(":") and block
    ]


def read_event(block):
    """Return name, id and data of one event."""
    fields = dict(line.split(": ", 1) for line in block.strip().split("\n"))
    return fields.get("event", ""), fields.get("id", ""), json.loads(fields["data"])


async def next_event(response):
    """Read one event of a stream that goes on."""
    return read_event((await response.content.readuntil(b"\n\n")).decode())


# All pages


async def test_every_page_is_private(pages):
    """No cache, no referrer, no index, no other content type, no version."""
    for headers, page in pages.values():
        policy = "same-origin" if "<form" in page else "no-referrer"
        assert headers["Cache-Control"] == "no-store"
        assert headers["Referrer-Policy"] == policy
        assert headers["X-Robots-Tag"] == "noindex"
        assert headers["X-Content-Type-Options"] == "nosniff"
        assert headers["Content-Type"] == "text/html; charset=utf-8"
        assert not re.search(r"\d|aiohttp|Python", headers.get("Server", ""))


async def test_every_page_runs_nothing_but_its_own(pages):
    """The policy begins with nothing and allows only what bears the page's nonce."""
    for headers, page in pages.values():
        policy = headers["Content-Security-Policy"]
        assert policy.startswith("default-src 'none'")
        assert not re.search(r"unsafe|\*|http", policy)
        [nonce] = set(re.findall(r"'nonce-([\w-]+)'", policy))
        own = set(re.findall(r"<(?:style|script)\b([^>]*)>", page))
        assert own == {f' nonce="{nonce}"'}
        assert not re.search(r"\s(on\w+|style|src)=", page)


async def test_no_page_names_the_subscriber(pages):
    """An openid is nowhere in a page, whole or in part."""
    assert [kind for kind, (_, page) in pages.items() if ANN[:8] in page] == []


async def test_every_page_fits_a_phone_in_light_and_dark(pages):
    """It is as wide as the phone and follows its colours, with no outside resource."""
    for _, page in pages.values():
        assert '<meta name="viewport" content="width=device-width' in page
        assert "prefers-color-scheme" in page and "<link" not in page


async def test_a_page_is_light(pages):
    """Style and script go along with each page; without their comments."""
    assert len(pages["missing"][1].encode()) < 12 * 1024
    left_out = [r"/\*", r"(?m)^\s*//", r"(?m)^ ", r"{[#%{]"]
    assert [mark for mark in left_out if re.search(mark, pages["missing"][1])] == []


@pytest.mark.skipif(not shutil.which("node"), reason="needs node")
async def test_the_script_of_a_page_can_be_parsed(pages):
    """Also after what is left out."""
    [script] = re.findall(r"(?s)<script[^>]*>(.*?)</script>", pages["missing"][1])
    node = await asyncio.create_subprocess_exec(
        *("node", "--check", "-"), stdin=asyncio.subprocess.PIPE
    )
    await node.communicate(script.encode())
    assert node.returncode == 0


async def test_no_nonce_is_used_twice(server, addresses):
    """Two visits get two policies."""
    policies = set()
    for _ in range(2):
        async with server.open(addresses["answer"]) as response:
            policies.add(response.headers["Content-Security-Policy"])
    assert len(policies) == 2


async def test_a_page_with_an_answer_says_that_it_is_by_ai(pages):
    """China's labelling rules ask for it, and readers should know."""
    kinds = ("answer", "pending", "history")
    assert [kind for kind in kinds if "AI 生成" not in pages[kind][1]] == []


async def test_a_page_without_an_answer_does_not_say_so(pages, server, upstream):
    """An error, an empty history, a failure: no AI wrote anything there."""
    upstream.will(Script("", status=401))
    await server.ask("/chatgpt 没成的", BOB)
    history = (await server.ask("/history", BOB)).links[0][1]
    [turn] = await server.bot.store.turns_of(BOB, 2**62, 1)
    others = [pages[kind][1] for kind in ("expired", "missing", "unknown", "front")]
    for address in (history, f"{server.url}/a/{turn.link_key}"):
        others.append((await server.get(address))[1])
    assert [page for page in others if "由 AI 生成" in page] == []


async def test_the_front_page_says_how_to_begin(server, pages):
    """And an unknown place looks like the rest, with its status."""
    assert "/chatgpt" in pages["front"][1] and "/help" in pages["front"][1]
    assert (await server.get(server.url + "/"))[0] == 200
    assert (await server.get(server.url + "/x/y"))[0] == 404
    assert "没有这个页面" in pages["unknown"][1]


async def test_a_form_may_be_sent_to_us_alone(pages):
    """Where there is one; elsewhere none may be sent at all."""
    for headers, page in pages.values():
        target = "'self'" if "<form" in page else "'none'"
        assert f"form-action {target};" in headers["Content-Security-Policy"]
    assert "<form" in pages["history"][1] and "<form" not in pages["answer"][1]


async def test_the_page_of_an_answer_does_not_lead_to_the_history(pages):
    """Somebody who was shown one answer does not find the others."""
    assert "/h/" not in pages["answer"][1] and "/h/" not in pages["pending"][1]


async def test_an_unknown_link_is_404(server):
    """A key that never was is not found, on the stream as well."""
    assert (await server.get(server.url + "/a/nothing"))[0] == 404
    assert (await server.get(server.url + "/a/nothing/events"))[0] == 404
    assert (await server.get(server.url + "/h/nothing"))[0] == 404


async def test_an_owner_may_want_no_words_on_a_page_that_refuses(serve):
    """It says nothing then, with the same status."""
    server = await serve(texts={"page_signed_out": "", "page_missing": ""})
    async with server.http.post(server.url + "/me/ask") as response:
        assert response.status == 401
    assert (await server.get(server.url + "/a/nothing"))[0] == 404


async def test_an_expired_answer_is_410(serve, upstream):
    """The page says how to get a new link."""
    server = await with_session(serve, history={"link_hours": 0.0001})
    link = await link_to(server, upstream, "```\n码\n```")
    await asyncio.sleep(0.5)
    status, page = await server.get(link)
    assert status == 410 and "/history" in page and "码" not in page
    assert (await server.get(link + "/events"))[0] == 410


async def test_an_expired_history_is_410(serve):
    """The page says how to get a new link."""
    server = await serve(history={"history_minutes": 0.001})
    await server.ask("/chatgpt 今天吃什么")
    [(_, link)] = (await server.ask("/history")).links
    await asyncio.sleep(0.1)
    status, page = await server.get(link)
    assert status == 410 and "/history" in page and "今天吃什么" not in page


async def test_keys_cannot_be_guessed(server, addresses):
    """A key has at least 22 characters of base64, that is 128 bits."""
    links = [addresses[kind] for kind in ("answer", "pending", "history", "expired")]
    keys = {
        re.fullmatch(r"http://wx.example.com/[ah]/([\w-]{22,})", x)[1] for x in links
    }
    assert len(keys) == 4


# An answer


async def test_an_answer_is_typeset(server, upstream):
    """Markdown becomes HTML, the question stands above."""
    text = (
        "# 题\n\n**粗**[文](https://e.com)\n\n|名|价|\n|-|-|\n|梨|4|\n\n```\na < b\n```"
    )
    link = await link_to(server, upstream, text, "价格 & 名字")
    status, page = await server.get(link)
    pieces = (
        "<h1>题</h1>",
        "<strong>粗</strong>",
        "<td>梨</td>",
        "a &lt; b\n</code></pre>",
    )
    assert status == 200 and [piece for piece in pieces if piece not in page] == []
    assert "价格 &amp; 名字" in page


async def test_tasks_have_boxes(server, upstream):
    """Ticked or not, in place of the list's marks."""
    link = await link_to(server, upstream, "- [ ] 待办\n- [x] 完成\n\n```\n码\n```")
    _, page = await server.get(link)
    assert '<li class="task">☐ 待办' in page and '<li class="task">☑ 完成' in page


async def test_an_answer_says_how_to_ask_on(server, upstream):
    """Below it, with what can be done with it."""
    _, page = await server.get(await link_to(server, upstream, "# 题\n\n```\n码\n```"))
    assert "想接着问？回到公众号直接发消息就行。" in page
    [text] = re.findall("(?s)<template>(.*?)</template>", page)
    assert text == "给安看的\n\n【题】\n\n码\n（AI 生成）"


async def test_a_hostile_question_is_text(server, upstream):
    """Tags in a question are shown, not followed, in every kind of page."""
    evil = "<script>alert(1)</script><img src=x onerror=alert(2)>\"'"
    link = await link_to(server, upstream, "```\n码\n```", evil)
    [(_, history)] = (await server.ask("/history")).links
    for address in (link, history):
        _, page = await server.get(address)
        assert "<script>alert" not in page and "<img" not in page
        assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page


async def test_a_hostile_answer_is_text(server, upstream):
    """No tag of a model, no script address, no breaking out of an attribute."""
    link = await link_to(
        server,
        upstream,
        "<script>alert(1)</script> [点](javascript:alert(2)) <svg onload=alert(3)>\n\n"
        '[点](https://e.com/"onclick="alert(4)) [点](data:text/html,<b>)\n\n'
        '```"><i>\n码\n```',
    )
    _, page = await server.get(link)
    assert "<script>alert" not in page and "<svg" not in page and "<i>" not in page
    assert not re.search(r'href="(javascript|data|vbscript):', page)
    assert 'e.com/"' not in page


async def test_an_image_is_a_link(server, upstream):
    """Loading it would tell a stranger who reads."""
    text = '![一只"猫"](https://e.com/cat.png)\n```\n码\n```'
    _, page = await server.get(await link_to(server, upstream, text))
    assert "<img" not in page and '<a href="https://e.com/cat.png"' in page
    assert "一只&quot;猫&quot;</a>" in page


async def test_links_tell_nothing_of_where_they_were(server, upstream):
    """A link of an answer opens apart and sends no referrer."""
    link = await link_to(server, upstream, "[文](https://e.com)\n```\n码\n```")
    [tag] = re.findall(r'<a href="https://e\.com"[^>]*>', (await server.get(link))[1])
    assert "noopener" in tag and "noreferrer" in tag


async def test_a_pending_answer_is_hostile_text_too(server, upstream):
    """What is written so far is shown as text."""
    gate = asyncio.Event()
    link = await link_to(server, upstream, Script(["<script>alert(1)。", gate, "完"]))
    _, page = await server.get(link)
    assert "<script>alert" not in page and "&lt;script&gt;alert(1)" in page
    gate.set()


async def test_a_pending_page_refreshes_itself_without_script(server, addresses):
    """Every three seconds, until the answer is complete."""
    refresh = '<noscript><meta http-equiv="refresh" content="3">'
    assert refresh in (await server.get(addresses["pending"]))[1]
    assert "写到这里。" in (await server.get(addresses["pending"]))[1]
    assert "refresh" not in (await server.get(addresses["answer"]))[1]


async def test_a_broken_answer_says_so(server, upstream):
    """Below what was written stand the words of the reply."""
    gate = asyncio.Event()
    script = Script(["写了一半。", gate], ending="eof")
    link = await link_to(server, upstream, script)
    gate.set()
    await server.get(link + "/events")
    _, page = await server.get(link)
    assert "写了一半。" in page and said("failed_broken") in page


# The event stream


async def test_a_late_viewer_gets_what_was_written_so_far(server, upstream):
    """Then what follows as it is written, and `done` ends it."""
    gate = asyncio.Event()
    link = await link_to(server, upstream, Script(["前半句。", gate, "后半句。"]))
    async with server.open(link + "/events") as response:
        assert response.content_type == "text/event-stream"
        assert response.headers["Cache-Control"] == "no-store"
        first = (await next_event(response))[2]
        assert first == {"keep": 0, "html": ["<p>前半句。</p>\n"]}
        gate.set()
        *rest, done = await events_of(response)
    seen = blocks_of([first, *(data for _, _, data in rest)])
    assert seen == "<p>前半句。后半句。</p>\n"
    assert done[0] == "done" and done[2]["state"] == "done"


async def writing_of(server, link):
    """Return what the ids of an answer's events begin with."""
    async with server.open(link + "/events") as response:
        return (await next_event(response))[1].partition(":")[0]


async def test_a_stream_resumes_where_it_was_broken(server, upstream):
    """Last-Event-ID says which blocks the viewer has for good, of which writing."""
    gate = asyncio.Event()
    script = Script(["一\n\n二\n\n三", gate, "四\n\n五"])
    link = await link_to(server, upstream, script)
    writing = await writing_of(server, link)
    last = {"Last-Event-ID": f"{writing}:1"}
    async with server.open(link + "/events", headers=last) as more:
        data = {"keep": 1, "html": ["<p>二</p>\n", "<p>三</p>\n"]}
        assert await next_event(more) == ("", f"{writing}:2", data)
        gate.set()
        *rest, (name, _, _) = await events_of(more)
    data = {"keep": 2, "html": ["<p>三四</p>\n", "<p>五</p>\n"]}
    assert rest[-1] == ("", f"{writing}:4", data) and name == "done"


@pytest.mark.parametrize("known", ["7:2", "0:999"])
async def test_a_viewer_of_another_writing_starts_over(server, upstream, known):
    """What they have is not a beginning of this text: nothing of it is kept."""
    link = await link_to(server, upstream, "一二三\n```\n```")
    async with server.open(link + "/events", headers={"Last-Event-ID": known}) as all_:
        (_, _, data), done = await events_of(all_)
    assert data["keep"] == 0 and data["html"][0] == "<p>一二三</p>\n"
    assert len(data["html"]) == 2 and done[0] == "done"


@pytest.mark.parametrize("known", ["", "nonsense", "-1:-1", "0:" + "9" * 50])
async def test_an_id_that_makes_no_sense_begins_at_the_start(server, upstream, known):
    """The text comes whole."""
    link = await link_to(server, upstream, "一二三\n```\n```")
    async with server.open(link + "/events", headers={"Last-Event-ID": known}) as all_:
        (_, _, data), done = await events_of(all_)
    assert data["keep"] == 0 and data["html"][0] == "<p>一二三</p>\n"
    assert len(data["html"]) == 2 and done[0] == "done"


async def test_a_viewer_sees_an_answer_begin_anew(server, upstream):
    """When a stream breaks before a reply, what was shown is taken back."""
    gate = asyncio.Event()
    script = Script(["这里写了一半就", gate], ending="cut")
    link = await link_to(server, upstream, script)
    upstream.will("重新写完了。")
    async with server.open(link + "/events") as response:
        _, before, data = await next_event(response)
        assert data == {"keep": 0, "html": ["<p>这里写了一半就</p>\n"]}
        gate.set()
        events = await events_of(response)
    assert events[0][2] == {"keep": 0, "html": []} and events[-1][0] == "done"
    assert blocks_of(data for _, _, data in events) == "<p>重新写完了。</p>\n"
    first, last = (events[at][1].partition(":")[0] for at in (0, -2))
    assert first == last != before.partition(":")[0]


async def test_two_viewers_see_the_same(server, upstream):
    """Each stream has the whole answer, whenever it began."""
    gate = asyncio.Event()
    link = await link_to(server, upstream, Script(["前半句。", gate, "后半句。"]))
    known = {"Last-Event-ID": f"{await writing_of(server, link)}:0"}
    async with (
        server.open(link + "/events") as early,
        server.open(link + "/events", headers=known) as late,
    ):
        assert (await next_event(early))[2]["html"] == ["<p>前半句。</p>\n"]
        gate.set()
        both = await asyncio.gather(events_of(early), events_of(late))
    seen = [blocks_of(data for _, _, data in events) for events in both]
    assert seen == ["<p>前半句。后半句。</p>\n"] * 2


async def test_the_stream_of_a_failed_answer_ends(server, upstream):
    """The last event tells how it ended."""
    gate = asyncio.Event()
    link = await link_to(server, upstream, Script([gate], status=401))
    async with server.open(link + "/events") as response:
        gate.set()
        *_, (name, _, data) = await events_of(response)
    assert (name, data["state"]) == ("done", "failed")


# History


async def test_an_empty_history_says_so(server):
    """A subscriber who asked nothing yet gets a page, too."""
    status, page = await server.get((await server.ask("/history")).links[0][1])
    assert status == 200 and "还没有聊天记录" in page


async def test_the_history_has_the_newest_session_first(server):
    """Sessions and their exchanges, with when they were."""
    await server.ask("头一个问题")
    await server.ask("/clear")
    await server.ask("后一个问题")
    _, page = await server.get((await server.ask("/history")).links[0][1])
    assert page.index("后一个问题") < page.index("头一个问题")
    assert re.search(r"\d{4}-\d\d-\d\d \d\d:\d\d", page)


async def test_a_history_is_one_subscribers(server):
    """Nothing of Bob's is in Ann's."""
    await server.ask("/chatgpt 鲍的秘密", BOB)
    await server.ask("安的问题")
    _, page = await server.get((await server.ask("/history")).links[0][1])
    assert "安的问题" in page and "鲍的秘密" not in page


async def test_a_long_history_is_read_in_pages(serve):
    """The newest fifty exchanges on the first page, and a link to older ones."""
    server = await with_session(serve)
    for number in range(51):
        await server.ask(f"问题{number:03}")
    [(_, link)] = (await server.ask("/history")).links
    _, first = await server.get(link)
    [older] = re.findall(r'href="[\w-]+(\?before=\d+)">更早的记录</a>', first)
    _, second = await server.get(link + older)
    shown = [
        list(dict.fromkeys(re.findall(r"问题\d+", page))) for page in (first, second)
    ]
    assert shown[0] == [f"问题{number:03}" for number in range(1, 51)]
    assert shown[1] == ["问题000"] and "更早的记录" not in second


async def test_a_history_of_one_full_page_has_no_older_ones(serve):
    """A link never leads to an empty page."""
    server = await with_session(serve)
    for number in range(50):
        await server.ask(f"问题{number:03}")
    _, page = await server.get((await server.ask("/history")).links[0][1])
    assert "问题000" in page and "更早的记录" not in page


@pytest.mark.parametrize("before", ["x", "-1", "1;DROP TABLE turn", "9" * 40])
async def test_a_made_up_page_number_does_no_harm(server, before):
    """It shows the newest exchanges, or none."""
    await server.ask("安的问题")
    [(_, link)] = (await server.ask("/history")).links
    async with server.open(link, params={"before": before}) as response:
        assert response.status == 200 and ANN not in await response.text()


# Health


@pytest.mark.parametrize("path", ["", "/events", "/healthz", "/healthz/stream"])
async def test_what_answers_head_has_no_body(server, upstream, path):
    """A proxy would take it for the next response on its connection."""
    if not path.startswith("/healthz"):
        upstream.will(Script(LONG))
        path = server.at((await server.ask("问")).links[-1][1] + path)
        path = path.removeprefix(server.url)
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    writer.write(f"HEAD {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
    head = await within(10, "head", reader.readuntil(b"\r\n\r\n"))
    assert b" 200 " in head or b" 404 " in head
    writer.write(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
    assert b"HTTP/1.1 200 OK\r\n" == await within(
        10, "next response", reader.readline()
    )
    writer.close()


async def test_health_is_told(server):
    """A watchdog learns that the database answers."""
    status, text = await server.get(server.url + "/healthz")
    assert status == 200 and json.loads(text) == {"status": "ok"}


ROOT_FILES = {  # what lies in the folder, and what is sent
    "MP_verify_aB3.txt": ("aB3", 200),
    "full.txt": ("x" * 4096, 200),
    "large.txt": ("x" * 4097, 404),
    "notes.md": ("mine", 404),
    ".hidden.txt": ("mine", 404),
}


async def test_files_for_the_root_are_small_texts_of_one_folder(serve, tmp_path):
    """What the platform's forms want to find there; nothing that lies elsewhere."""
    folder = tmp_path / "root"
    folder.mkdir()
    for name, (text, _) in ROOT_FILES.items():
        (folder / name).write_text(text, "utf-8")
    (tmp_path / "secret.txt").write_text("mine", "utf-8")
    (folder / "link.txt").symlink_to(tmp_path / "secret.txt")
    (folder / "folder.txt").mkdir()
    os.mkfifo(folder / "pipe.txt")
    server = await serve(server={"root_files": str(folder)})
    for name, (text, status) in ROOT_FILES.items():
        found, page = await server.get(f"{server.url}/{name}")
        assert found == status and (page == text) is (status == 200), name
    names = ("link.txt", "folder.txt", "pipe.txt", "..%2Fsecret.txt", "secret.txt")
    for name in names:
        assert (await server.get(f"{server.url}/{name}"))[0] == 404, name


async def test_without_a_folder_there_are_no_files_at_the_root(server):
    """Those where the server was started least of all."""
    assert (await server.get(f"{server.url}/requirements.txt"))[0] == 404
