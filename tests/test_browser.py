"""Pages in a real Chromium: what people see, with and without script, and how fast.

Needs Chromium (CHROMIUM, default /usr/bin/chromium), the package playwright, and for
the accessibility runs axe-core (see AXE). Without them a test is skipped; with
WXGPT_REQUIRE_BROWSER=1 it fails instead. Whatever a test is about: no page may log an
error, break its policy or ask another host (see `browse`).
"""

import asyncio
import contextlib
import os
import pathlib
import re
import subprocess
import tempfile
import threading
import time

import pytest

from conftest import ANN, BOB, ROOT, TEXTS, free_port, said, with_session
from fake_openai import Script

try:
    from playwright.async_api import async_playwright, expect
except ImportError:
    async_playwright = None  # type: ignore[assignment]  # an optional package
else:
    expect.set_options(timeout=20_000)

CHROMIUM = os.environ.get("CHROMIUM", "/usr/bin/chromium")
ARGUMENTS = "--headless=new --remote-debugging-port=0 --no-sandbox --disable-gpu"
ARGUMENTS += " --disable-quic --no-first-run --disable-background-networking"
ARGUMENTS += " --hide-scrollbars --disable-component-update"
ARGUMENTS += " --disable-sync --disable-dev-shm-usage"
CACHE = pathlib.Path(tempfile.gettempdir()) / "wxgpt-axe"  # npm install --prefix
AXE = "node_modules/axe-core/axe.min.js"
REFUSED = "Failed to load resource"  # Chromium's line for any status of 400 and above
# Runs before a page's own script: what breaks the policy is told as an error.
WATCH = """document.addEventListener('securitypolicyviolation', event =>
console.error(`policy: ${event.violatedDirective} ${event.blockedURI}`))"""

CODE = "def double(x):\n    return x * 2  # " + "很长的注释" * 30 + "\n"
TABLE = "\n".join(
    ["| |" + "列名|" * 12, "|-|" + "-:|" * 12, "|行|" + "一二三四五六|" * 12]
)
RICH = f"""## 小标题

见[文档](https://e.com/doc)，还有![一只猫](https://e.com/cat.png)与公式 \\(a_1 * b * c\\)。

```python
{CODE}```

{TABLE}

#### 更小的标题

> ~~旧的~~ **新的**，{"https://e.com/" + "x" * 200}
"""
LONG = "第一段很普通。\n\n" + RICH + "\n" + "长长的一段话，说个没完。" * 30


def need(condition, what, remedy):
    """Skip the test without what it needs, or fail it where that was promised."""
    if not condition:
        is_promised = os.environ.get("WXGPT_REQUIRE_BROWSER") == "1"
        (pytest.fail if is_promised else pytest.skip)(f"no {what}: {remedy}")


class Browse:
    """One browser; opens pages as phones show them, and keeps what went wrong."""

    def __init__(self, browser):
        self.browser = browser
        self.troubles, self.hosts = [], set()
        self.excused = "nothing"  # what a trouble may contain in this test

    async def open(self, url, init="", **options):
        """Open a page in a context of its own."""
        size = {"width": 390, "height": 780}
        context = await self.browser.new_context(**{"viewport": size} | options)
        await context.add_init_script(WATCH + ";" + init)
        page = await context.new_page()
        self.watch(page)
        await page.goto(url)
        return page

    def watch(self, page):
        """Note errors, dialogs and hosts of a page."""
        page.on("console", lambda line: self.note(line.type, line.text))
        page.on("pageerror", lambda error: self.note("error", str(error)))
        page.on("dialog", lambda dialog: self.note("error", dialog.message))
        page.on("request", lambda request: self.hosts.add(request.url.split(":")[1]))

    def note(self, kind, text):
        """Keep an error that is not excused."""
        if kind == "error" and self.excused not in text:
            self.troubles.append(text)


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    """Chromium as a process, for all tests of this file: starting it takes a second."""
    need(os.access(CHROMIUM, os.X_OK), CHROMIUM, "apt install chromium")
    need(async_playwright, "playwright", "pip install -r tests/requirements.txt")
    profile = f"--user-data-dir={tmp_path_factory.mktemp('chromium')}"
    command = [CHROMIUM, *ARGUMENTS.split(), profile, "about:blank"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    too_late = threading.Timer(60, process.kill)  # which ends what is read here
    too_late.start()
    while "DevTools listening on " not in (line := process.stderr.readline()):
        assert line, "Chromium ended, or did not listen within 60 s"
    too_late.cancel()
    yield line.split()[-1]
    process.terminate()
    process.communicate(timeout=30)


@pytest.fixture
async def browse(chromium):
    """Open pages; none of them may err, break its policy or ask another host."""
    async with async_playwright() as tools:
        browse = Browse(await tools.chromium.connect_over_cdp(chromium))
        yield browse
        for context in browse.browser.contexts[1:]:
            await context.close()
    assert browse.troubles == [] and browse.hosts <= {"//127.0.0.1"}


@pytest.fixture
def changes():
    """The server lets no attempt time out."""
    return {"wechat": {"mute_guard": 0}}


async def page_of(server, upstream, script, question="给安看的"):
    """Ask; return the address of the answer's page, linked by the reply or not."""
    upstream.will(script)
    await server.ask(question)
    [turn] = await server.bot.store.turns_of(ANN, 2**62, 1)
    return f"{server.url}/a/{turn.link_key}"


async def history_of(server, openid=ANN):
    """Return the address of a subscriber's history."""
    return server.at((await server.ask("/history", openid)).links[0][1])


async def folded_history_of(server, upstream):
    """Return the address of a history in which all but a failed question is folded."""
    await server.ask("/clear")
    upstream.will(Script("", status=401))
    await server.ask("没成的")
    return await history_of(server)


async def all_pages(server, upstream, gate):
    """Return the address of a page of every kind."""
    pages = {"finished": await page_of(server, upstream, RICH)}
    pages["typeset"] = await page_of(server, upstream, "`码`\n# 题\n\n### 小题\n\n字")
    upstream.will(Script("", status=401))
    pages["failed"] = await page_of(server, upstream, Script("", status=401))
    await page_of(server, upstream, LONG, "说来话长" * 40 + "x" * 200)
    await server.ask("/clear")  # the newest session is not folded
    await page_of(server, upstream, "短的")
    pages["410"] = await history_of(server)
    pages["history"] = await history_of(server)
    pages["empty"] = await history_of(server, BOB)
    pages["404"] = server.url + "/a/nothing"
    pages["front"] = server.url + "/"
    pages["found"] = pages["history"]  # and searched
    pages["live"] = await page_of(
        server, upstream, Script(["字" * 60 + "x" * 99, gate])
    )
    return pages


async def visit(page, kind, url):
    """Open a page of `all_pages` as its readers see it."""
    await page.goto(url)
    if kind == "history":
        await page.locator("summary:not(.question *)").first.click()
        await expect(page.locator("details .scroll")).to_be_visible()
    if kind == "found":
        await page.get_by_role("searchbox").fill("小标题")
        await page.get_by_role("button", name="搜索").click()
        await expect(page.locator("mark").first).to_have_text("小标题")


# A live answer


async def test_an_answer_grows_and_ends_typeset_in_its_place(
    browse, server, upstream, gate
):
    """No reload and no jump: the page stays where its reader has scrolled to."""
    text = "第一段。\n\n" + "下一段很长。\n\n" * 40
    script = Script([text, gate, "\n\n**完**\n\n" + "结尾。\n\n" * 40])
    page = await browse.open(await page_of(server, upstream, script))
    await expect(page.locator(".live")).to_contain_text("下一段很长。")
    await expect(page.locator(".asking")).to_have_text("正在写… ")
    where = "[scrollY, document.querySelector('.answer').getBoundingClientRect().top]"
    await page.evaluate("scrollTo(0, 300); window.stays = true")
    before = await page.evaluate(where)
    gate.set()
    await expect(page.locator(".answer strong")).to_have_text("完")
    await expect(page.locator(".live, .asking")).to_have_count(0)
    assert await page.evaluate(where) == before and before[0] == 300
    assert await page.evaluate("window.stays")


async def test_text_comes_while_it_is_written(browse, server, upstream):
    """Each piece is shown before the next is there."""
    gates = [asyncio.Event(), asyncio.Event()]
    script = Script(["一。", gates[0], "二。", gates[1], "三。"])
    page = await browse.open(await page_of(server, upstream, script))
    await expect(page.locator(".live")).to_have_text("一。")
    gates[0].set()
    await expect(page.locator(".live")).to_have_text("一。二。")
    gates[1].set()
    await expect(page.locator(".answer p")).to_have_text("一。二。三。")


async def test_a_sign_of_life_counts_the_seconds(browse, server, upstream, gate):
    """Before the first token; a screen reader hears the words, not every second."""
    page = await browse.open(await page_of(server, upstream, Script([gate, "好了。"])))
    note = page.locator(".asking")
    await expect(note).to_have_text(re.compile(r"正在想… \d+ 秒"))
    await expect(note).to_have_text(re.compile(r"正在想… [2-9]\d* 秒"))
    await expect(page.get_by_role("status")).to_have_text("正在想…")
    gate.set()
    await expect(page.locator(".answer")).to_have_text("好了。")


async def test_a_reload_in_mid_stream_goes_on(browse, server, upstream, gate):
    """What was there is there again, once."""
    script = Script(["前半句。", gate, "后半句。"])
    page = await browse.open(await page_of(server, upstream, script))
    await expect(page.locator(".live")).to_have_text("前半句。")
    await page.reload()
    await expect(page.locator(".live")).to_have_text("前半句。")
    gate.set()
    await expect(page.locator(".answer p")).to_have_text("前半句。后半句。")


async def test_viewers_who_come_early_and_late_see_the_same(
    browse, server, upstream, gate
):
    """Whoever opens the page, and whenever, ends with the whole answer."""
    url = await page_of(server, upstream, Script([gate, "前半句。", gate, "后半句。"]))
    early = await browse.open(url)
    await expect(early.locator(".asking")).to_contain_text("正在想")
    late = await browse.open(url)
    gate.set()
    after = await browse.open(url)
    for page in (early, late, after):
        await expect(page.locator(".answer p")).to_have_text("前半句。后半句。")


async def test_a_restart_in_mid_stream_starts_the_answer_over(
    browse, spawn, upstream, gate
):
    """The new process writes it anew; the page takes back what it had."""
    server, process = await spawn(wechat={"mute_guard": 0})
    await server.ask("/chatgpt")
    upstream.will(Script(["旧的一半", gate]), Script(["新的", gate, "整个。"]))
    seen = await server.ask("给安看的")
    page = await browse.open(server.at(seen.links[0][1]))
    await expect(page.locator(".live")).to_have_text("旧的一半")
    browse.excused = "ERR_"  # the connection is gone for a while
    await process.kill()
    await process.start()
    await expect(page.locator(".live")).to_have_text("新的")
    gate.set()
    await expect(page.locator(".answer p")).to_have_text("新的整个。")


class Relay:
    """A connection in between, to be cut."""

    def __init__(self, port):
        self.port, self.heard, self.writers = port, b"", []

    async def join(self, reader, writer):
        """Carry one connection."""
        back, forth = await asyncio.open_connection("127.0.0.1", self.port)
        self.writers += [writer, forth]
        await asyncio.gather(self.carry(reader, forth), self.carry(back, writer, False))

    async def carry(self, reader, writer, is_asking=True):
        """Carry one direction; keep what the browser asked."""
        with contextlib.suppress(ConnectionError):
            while piece := await reader.read(65536):
                self.heard += piece * is_asking
                writer.write(piece)
        writer.close()

    def cut(self):
        """Lose all connections."""
        for writer in self.writers:
            writer.transport.abort()


async def test_a_lost_connection_resumes_where_it_was(browse, server, upstream, gate):
    """By Last-Event-ID: nothing is missing, nothing comes twice."""
    script = Script(["第一段。\n\n前半句。", gate, "后半句。"])
    url = await page_of(server, upstream, script)
    relay = Relay(server.port)
    async with await asyncio.start_server(relay.join, "127.0.0.1", 0) as between:
        port = between.sockets[0].getsockname()[1]
        page = await browse.open(url.replace(str(server.port), str(port)))
        await expect(page.locator(".live p")).to_have_text(["第一段。", "前半句。"])
        await expect(page.locator(".asking")).to_contain_text("正在写")
        browse.excused = "ERR_"
        relay.cut()
        gate.set()
        texts = ["第一段。", "前半句。后半句。"]
        await expect(page.locator(".answer p")).to_have_text(texts)
        relay.cut()
    assert re.search(rb"last-event-id: [0-9a-f]{8}:1\b", relay.heard.lower())


async def test_a_stream_that_is_refused_is_asked_for_again(
    browse, server, upstream, gate
):
    """A proxy that meets nobody answers 502, after which EventSource gives up."""
    url = await page_of(server, upstream, Script(["前半句。", gate, "后半句。"]))
    page = await browse.open("about:blank")
    browse.excused = REFUSED
    await page.route("**/events", lambda route: route.fulfill(status=502), times=1)
    await page.goto(url)
    async with page.expect_request("**/events"):
        pass
    gate.set()
    await expect(page.locator(".answer p")).to_have_text("前半句。后半句。")


async def test_without_script_the_page_refreshes_itself(browse, server, upstream, gate):
    """It shows what is written so far, and ends with the whole answer."""
    url = await page_of(server, upstream, Script(["前半句。", gate, "**后半句。**"]))
    page = await browse.open(url, java_script_enabled=False)
    await expect(page.locator(".live")).to_have_text("前半句。")
    gate.set()
    await expect(page.locator(".answer strong")).to_have_text("后半句。")


async def test_a_failed_answer_says_so_and_how_to_ask_again(
    browse, server, upstream, gate
):
    """In the place where the answer would have been, without a reload."""
    script = Script([gate], status=401)
    page = await browse.open(await page_of(server, upstream, script))
    await expect(page.locator(".asking")).to_contain_text("正在想")
    gate.set()
    failed = page.locator(".failed")
    await expect(failed).to_contain_text(said("failed_setup"))
    await expect(failed).to_contain_text(TEXTS.page_retry)
    await expect(page.locator(".answer, .asking, .failed a")).to_have_count(0)


async def test_an_answer_that_broke_off_keeps_what_was_written(
    browse, server, upstream, gate
):
    """With a word about what happened below it."""
    broken = Script(["写了**一半**。" * 300, gate], ending="eof")
    page = await browse.open(await page_of(server, upstream, broken))
    await expect(page.locator(".live")).to_contain_text("一半")
    gate.set()
    await expect(page.locator(".failed")).to_contain_text(said("failed_broken"))
    await expect(page.locator(".answer strong").first).to_have_text("一半")


MATHS = r"""## 顶点在哪里

先配方：$y = x^2 - 4x + 7 = (x-2)^2 + 3$，于是顶点是 $(2, 3)$。

$$
\frac{-b \pm \sqrt{b^2 - 4ac}}{2a}
$$

### 小结

1. 看 $a$ 的正负；
2. 再看 $\Delta$。
"""
LISTS = """### 出门前

- [ ] **身份证**，还有
  1. 充电器
  2. `雨伞`
- 水和干粮

> 早点睡，
> 别赶最后一班车。

---

最后再看一眼*煤气*。
"""
ENDINGS = {
    "text": "一段普通的话，写得不短。\n\n" * 30,
    "a table": "先看表。\n\n" * 20 + TABLE,
    "formulas": "配方要一步一步来。\n\n" * 20 + MATHS,
    "code": "代码在下面。\n\n" * 20 + f"```python\n{CODE}{CODE}```",
    "lists": "东西不多。\n\n" * 20 + LISTS,
    "all": "什么都有一点。\n\n" * 10 + RICH + MATHS + LISTS,
    "plain text": "这一段没有完。" * 6000,
}
# Notes each time that something on the screen moves, and by how much.
SHIFTS = """window.shifts = []; new PerformanceObserver(list => {
    for (const entry of list.getEntries()) shifts.push(entry.value);
}).observe({type: 'layout-shift', buffered: true});"""
PLACES = """[scrollY, ...[...document.querySelectorAll('.answer > *')]
    .flatMap(block => [block.offsetTop, block.offsetHeight])]"""


@pytest.mark.parametrize("to", [200, 99_999])
@pytest.mark.parametrize("name", ENDINGS)
async def test_nothing_moves_when_an_answer_ends(
    browse, server, upstream, gate, name, to
):
    """Text, tables, formulas and code stay to the pixel; so does what is selected."""
    script = Script([ENDINGS[name], gate])
    page = await browse.open(await page_of(server, upstream, script), init=SHIFTS)
    await expect(page.locator(".asking")).to_contain_text("正在写")
    await page.evaluate(f"scrollTo(0, {to})")
    await page.evaluate("getSelection().selectAllChildren(document.querySelector('p'))")
    await page.locator(".scroll, pre").evaluate_all(
        "all => all.map(box => box.scrollLeft = 50)"
    )
    looks = [
        PLACES,
        "`${getSelection()}`",
        "document.querySelector('.answer').innerHTML",
    ]
    looks += [
        "[...document.querySelectorAll('.scroll, pre')].map(box => box.scrollLeft)"
    ]
    before = [await page.evaluate(look) for look in looks]
    await page.evaluate("shifts.length = 0")
    gate.set()
    await expect(page.get_by_role("status")).to_have_text("写完了")
    await expect(page.locator("main time")).to_be_visible()
    await page.evaluate(
        "new Promise(done => requestAnimationFrame(() => setTimeout(done)))"
    )
    assert [await page.evaluate(look) for look in looks] == before
    assert await page.evaluate("shifts") == []
    await page.goto("about:blank")
    await page.go_back()
    assert (await page.evaluate(PLACES))[1:] == before[0][1:]


async def test_an_answer_that_comes_in_pieces_moves_nothing_either(
    browse, server, upstream, gate
):
    """Blocks become what they are where they stand: only the last one changes."""
    text = ENDINGS["all"]
    pieces = [text[at : at + 40] for at in range(0, len(text), 40)]
    script = Script(
        [pieces[0], gate, *(step for p in pieces[1:] for step in (p, 0.02))]
    )
    page = await browse.open(await page_of(server, upstream, script), init=SHIFTS)
    await page.evaluate("window.first = document.querySelector('.answer').firstChild")
    gate.set()
    await expect(page.locator("main time")).to_be_visible()
    assert await page.evaluate("first === document.querySelector('.answer').firstChild")
    places = await page.evaluate(PLACES)
    await page.reload()
    assert await page.evaluate(PLACES) == places


AT_END = "innerHeight + scrollY >= document.documentElement.scrollHeight - 1"


async def test_the_page_follows_the_text_of_who_is_at_its_end(
    browse, server, upstream, gate
):
    """And of nobody else."""
    end, more = asyncio.Event(), "后来的话。\n\n" * 40
    script = Script(["开头的话。\n\n" * 40, gate, more, end])
    url = await page_of(server, upstream, script)
    pages = [await browse.open(url) for _ in range(3)]
    for page, to in zip(pages, (99_999, 300, 0), strict=True):
        await expect(page.locator(".asking")).to_contain_text("正在写")
        await page.evaluate(f"scrollTo(0, {to})")
    gate.set()
    for page in pages:
        await expect(page.locator(".live")).to_contain_text("后来的话。")
    assert await pages[0].evaluate(AT_END)
    assert [await page.evaluate("scrollY") for page in pages[1:]] == [300, 0]
    end.set()
    for page in pages:
        await expect(page.locator("main time")).to_be_visible()


async def test_a_button_leads_to_the_end_of_what_is_still_written(
    browse, server, upstream, gate
):
    """From above it; there it is of no use, and when the answer has ended, gone."""
    script = Script(["一段话。\n\n" * 40, gate, "完"])
    page = await browse.open(await page_of(server, upstream, script))
    button = page.get_by_role("button", name="还在写 ↓")
    await expect(button).to_be_visible()
    box = await button.bounding_box()
    assert box["height"] >= 44 and box["width"] >= 44
    await button.click()
    await expect(button).to_be_hidden()
    assert await page.evaluate(AT_END)
    await page.evaluate("scrollTo(0, 0)")
    await expect(button).to_be_visible()
    gate.set()
    await expect(page.locator("main time")).to_be_visible()
    await expect(page.locator(".below")).to_have_count(0)
    await expect(page.locator(".written")).to_have_count(0)


async def test_a_queued_page_says_so_and_when_its_turn_comes(
    browse, server, upstream, gate
):
    """By itself."""
    second = asyncio.Event()
    upstream.will(Script([gate, "一。"]), Script([second, "二。"]))
    await asyncio.gather(server.ask("先问的"), server.ask("后问的"))
    turns = {turn.question: turn for turn in server.bot.turns.values()}
    page = await browse.open(f"{server.url}/a/{turns['后问的'].link_key}")
    await expect(page.get_by_role("status")).to_contain_text("排队中")
    gate.set()
    await expect(page.get_by_role("status")).to_have_text("正在想…")
    second.set()
    await expect(page.locator(".answer p")).to_have_text("二。")


async def test_a_lost_line_is_said_until_it_holds_again(browse, server, upstream, gate):
    """In words, and with what is written meanwhile."""
    script = Script(["前半句。", gate, "后半句。", asyncio.Event()])
    url = await page_of(server, upstream, script)
    relay = Relay(server.port)
    between = await asyncio.start_server(relay.join, "127.0.0.1", 0)
    port = between.sockets[0].getsockname()[1]
    page = await browse.open(url.replace(str(server.port), str(port)))
    state = page.get_by_role("status")
    await expect(state).to_have_text("正在写…")
    browse.excused = "ERR_"
    between.close()
    relay.cut()
    await expect(state).to_have_text("网络断了，正在重连…")
    gate.set()
    async with await asyncio.start_server(relay.join, "127.0.0.1", port):
        await expect(page.locator(".live")).to_have_text("前半句。后半句。")
        await expect(state).to_have_text("正在写…")
        relay.cut()


# A finished answer


async def test_the_finished_page_says_who_wrote_it_and_when(browse, server, upstream):
    """Question, answer, model and time; AI notice; no way to the history."""
    page = await browse.open(await page_of(server, upstream, RICH, "问 & 答"))
    await expect(page.get_by_role("main").locator(".question")).to_have_text("问 & 答")
    await expect(page.locator("article .note")).to_have_text(
        re.compile(r"gpt-6-luna · \d{4}-\d\d-\d\d \d\d:\d\d")
    )
    await expect(page.get_by_role("contentinfo")).to_contain_text("AI 生成")
    await expect(page.locator("a[href*='/h/']")).to_have_count(0)


async def test_links_and_pictures_open_apart_and_tell_nothing(browse, server, upstream):
    """A picture is a link; loading it would tell a stranger who reads."""
    page = await browse.open(await page_of(server, upstream, RICH))
    for words, address in (("文档", "doc"), ("一只猫", "cat.png")):
        link = page.get_by_role("link", name=words)
        await expect(link).to_have_attribute("href", f"https://e.com/{address}")
        await expect(link).to_have_attribute("rel", "noopener noreferrer nofollow")
        await expect(link).to_have_attribute("target", "_blank")
    await expect(page.locator("img")).to_have_count(0)


async def test_a_formula_is_typeset(browse, server, upstream):
    """As MathML, with no mark of it taken for Markdown; if it is none, as its source."""
    text = RICH + "\n\n" + r"还有 $\frac{1}{2}$ 和 $\unknown{x}$。"
    page = await browse.open(await page_of(server, upstream, text))
    await expect(page.locator("math").first).to_have_text("a1*b*c")
    await expect(page.locator("math mfrac")).to_have_count(1)
    await expect(page.locator("p code").last).to_have_text(r"$\unknown{x}$")


FORMULAS = r"""$$f(x)=\begin{cases}x^2 & x\ge 0\\-x & x<0\\0 & x=9\end{cases}$$

$$\begin{aligned}a &= b+c\\ &= d\end{aligned}$$

所以 $\boxed{x=3}$，还有 $$12345678901234567890+12345678901234567890+12345678901234567890$$
"""


COUNT_STREAMS = """streams = 0;
EventSource = class extends EventSource {
  constructor(address) { super(address); streams += 1; }
}"""


async def test_a_page_whose_answer_is_deleted_asks_no_more(
    browse, server, upstream, gate
):
    """It says so once, and does not look for it every three seconds."""
    browse.excused = REFUSED
    url = await page_of(server, upstream, Script(["写着。", gate]))
    page = await browse.open(url, init=COUNT_STREAMS)
    await expect(page.locator(".live")).to_have_text("写着。")
    for text in ("/forget", TEXTS.word_forget):
        await server.ask(text)
    await expect(page.locator(".notice")).to_be_visible()
    assert await page.evaluate("streams") == 1


async def test_a_formula_looks_right_without_a_font_for_formulas(
    browse, server, upstream
):
    """Brackets as high as what is in them, lines below each other, a box; one that is
    wide scrolls and says so."""
    page = await browse.open(await page_of(server, upstream, FORMULAS))
    parts = "mo:has(+ mtable)", "mtable", "mtd[columnalign=left]", ".boxed"
    brace, cases, aligned, boxed = [page.locator(f"math {p}").first for p in parts]
    heights = [(await box.bounding_box())["height"] for box in (brace, cases)]
    assert abs(heights[0] - heights[1]) < 5
    await expect(cases.locator("mtd").first).to_have_css("text-align", "left")
    await expect(aligned).to_have_css("text-align", "left")
    await expect(boxed).to_have_css("border-top-width", "1px")
    wide = page.locator("math").last
    assert await wide.evaluate("box => box.scrollWidth > box.clientWidth")
    shadow = "box => getComputedStyle(box).backgroundAttachment"
    assert await wide.evaluate(shadow) == "local, scroll"


async def test_a_formula_looks_right_where_it_came_later(browse, server, upstream):
    """In an answer that was folded, and in one that a search has found."""
    await page_of(server, upstream, FORMULAS + LONG)
    history = await folded_history_of(server, upstream)
    page = await browse.open(history)
    await page.locator("article > details:not(.question) > summary").last.click()
    stretched = page.locator("mo[style]").first
    await expect(stretched).to_be_visible()
    await page.get_by_role("searchbox").fill("cases")
    await page.get_by_role("button", name="搜索").click()
    await page.get_by_role("link", name="看整条").click()
    await expect(stretched).to_be_visible()


async def test_the_copy_button_copies(browse, server, upstream):
    """The code and nothing but the code; the button says that it did."""
    page = await browse.open(await page_of(server, upstream, RICH))
    await page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    await page.get_by_role("button", name="复制", exact=True).click()
    await expect(page.locator(".toast")).to_have_text("已复制")
    assert await page.evaluate("navigator.clipboard.readText()") == CODE
    await expect(page.locator(".toast")).to_be_hidden()


async def test_the_copy_button_copies_in_an_old_browser(browse, server, upstream):
    """On a page without TLS, too: there is no navigator.clipboard."""
    old = "Object.defineProperty(navigator, 'clipboard', {value: undefined});"
    old += "document.addEventListener("
    old += "'copy', () => {window.copied = `${getSelection()}`})"
    url = await page_of(server, upstream, RICH)
    page = await browse.open(url, old)
    await page.get_by_role("button", name="复制", exact=True).click()
    await expect(page.locator(".toast")).to_have_text("已复制")
    assert (await page.evaluate("window.copied")).strip() == CODE.strip()
    assert await page.evaluate("[`${getSelection()}`, scrollY]") == ["", 0]


async def test_what_cannot_be_copied_is_selected(browse, server, upstream):
    """With a word that a long press does the rest."""
    none = "Object.defineProperty(navigator, 'clipboard', {value: undefined});"
    none += "document.execCommand = () => false"
    page = await browse.open(await page_of(server, upstream, RICH), none)
    await page.get_by_role("button", name="复制", exact=True).click()
    await expect(page.locator(".toast")).to_contain_text("请长按")
    assert (await page.evaluate("`${getSelection()}`")).strip() == CODE.strip()


async def copied(page, button):
    """Press a button, or click what is given; return what is copied then."""
    await page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    await page.evaluate("navigator.clipboard.writeText('')")
    await (
        page.get_by_role("button", name=button)
        if button
        else page.locator("math").first
    ).click()
    await expect(page.locator(".toast")).to_have_text("已复制")
    return await page.evaluate("navigator.clipboard.readText()")


async def test_an_answer_is_taken_along(browse, server, upstream):
    """Its text as the chat shows it, its link, a table for a spreadsheet, a formula."""
    text = "**粗** $a^2$\n\n| 甲 | 乙 |\n|-|-|\n| 1 | 二<br>三 |"
    url = await page_of(server, upstream, text, "给安看的")
    page = await browse.open(url + "#x")
    whole = await copied(page, "复制全文")
    assert whole == "给安看的\n\n粗 a²\n\n甲｜乙\n1｜二 三\n（AI 生成）"
    assert await copied(page, "复制链接") == url
    assert await copied(page, "复制表格") == "甲\t乙\n1\t二 三"
    assert await copied(page, "") == "a^2"


async def test_an_exchange_of_the_history_is_taken_along(browse, server, upstream):
    """Its link is its own page's, never the history's, and works as long as that."""
    url = await page_of(server, upstream, LONG, "给安看的")
    history = await folded_history_of(server, upstream)
    page = await browse.open(history)
    await page.locator("summary").click()
    assert (await copied(page, "复制全文")).startswith(
        "给安看的\n\n第一段很普通。\n\n【小标题】"
    )
    assert await copied(page, "复制链接") == url
    await page.get_by_role("link", name="单独看").click()
    await expect(page).to_have_url(url)
    await server.bot.store.rows("UPDATE turn SET created_at = created_at - 86400 * 4")
    await page.goto(history)
    await page.locator("summary").click()
    await expect(page.locator("table")).to_be_visible()
    await expect(page.locator("[data-do=link]")).to_have_count(0)
    await expect(page.get_by_role("link", name="单独看")).to_have_count(0)


async def test_long_lines_of_code_are_wrapped_on_request(browse, server, upstream):
    """And back; short ones have no button for it."""
    page = await browse.open(await page_of(server, upstream, RICH + "\n```\n短\n```"))
    button, code = page.get_by_role("button", name="换行"), page.locator("pre").first
    wide = "pre => pre.scrollWidth > pre.clientWidth"
    assert await code.evaluate(wide)
    await button.click()
    await expect(button).to_have_attribute("aria-pressed", "true")
    assert not await code.evaluate(wide)
    await button.click()
    assert await code.evaluate(wide)


async def test_the_first_column_stays_in_sight(browse, server, upstream):
    """And what scrolls says so by a shadow."""
    page = await browse.open(await page_of(server, upstream, RICH))
    left = "() => document.querySelector('tbody td').getBoundingClientRect().left"
    before = await page.evaluate(left)
    await page.locator(".scroll").evaluate("box => { box.scrollLeft = 200 }")
    assert abs(await page.evaluate(left) - before) <= 1  # the table's own border
    shadow = "box => getComputedStyle(box).backgroundAttachment"
    assert await page.locator(".scroll").evaluate(shadow) == "local, scroll"


async def test_a_wide_table_uses_a_wide_screen(browse, server, upstream):
    """It is wider than the column of text, in the middle, and the page does not scroll."""
    url = await page_of(server, upstream, RICH)
    page = await browse.open(url, viewport={"width": 1280, "height": 800})
    text, table = await page.evaluate(
        "['.answer', '.table'].map(name => document.querySelector(name))"
        ".map(box => box.getBoundingClientRect()).map(box => [box.left, box.right])"
    )
    assert table[0] < text[0] - 50 and table[1] > text[1] + 50 and table[1] < 1280
    assert abs(sum(table) - sum(text)) < 2
    assert await page.evaluate("document.documentElement.scrollWidth") == 1280


PLAN = "".join(
    f"## 第{n}天\n\n" + "慢慢走，慢慢看。" * 60 + "\n\n" for n in range(1, 6)
)


async def test_a_long_answer_has_contents(browse, server, upstream):
    """Out of the text's way: a round button, whose list leads to each heading."""
    page = await browse.open(await page_of(server, upstream, PLAN))
    contents = page.locator(".contents")
    await expect(contents).to_have_css("position", "fixed")
    await contents.locator("summary").click()
    await expect(page.locator("nav button")).to_have_count(5)
    await page.get_by_role("button", name="第4天").click()
    await expect(page.locator("nav")).to_be_hidden()
    place = await page.locator("h2", has_text="第4天").bounding_box()
    assert abs(place["y"]) < 40
    await contents.locator("summary").click()
    await page.locator(".answer").click(position={"x": 5, "y": 5})
    await expect(page.locator("nav")).to_be_hidden()
    await page.get_by_role("link", name="回到顶部").click()
    await page.wait_for_function("scrollY == 0")


async def test_a_short_answer_has_no_contents(browse, server, upstream):
    """Nor has one with few headings."""
    for text in ("## 题\n\n字\n\n" * 5, "## 题\n\n" + "长。" * 2000):
        page = await browse.open(await page_of(server, upstream, text))
        await expect(page.locator(".answer h2").first).to_be_visible()
        await expect(page.locator(".contents")).to_have_count(0)


async def test_a_long_question_is_folded(browse, server, upstream, gate):
    """To six lines on each page, live ones too; it opens without script."""
    script = Script(["写着。", gate, "完"])
    live = await page_of(server, upstream, script, "很长的问题，" * 100)
    history = await history_of(server)
    for url in (live, history):
        page = await browse.open(url, java_script_enabled=False)
        question = page.locator(".question")
        assert (await question.bounding_box())["height"] < 9 * 1.6 * 17
        await question.locator("summary").click()
        assert (await question.bounding_box())["height"] > 20 * 1.6 * 17
    gate.set()
    await server.get(live + "/events")
    done = await browse.open(live)
    assert (await done.locator(".question").bounding_box())["height"] < 9 * 1.6 * 17


async def test_the_keyboard_reaches_what_scrolls_and_folds(browse, server, upstream):
    """Code and tables take the focus and scroll; a folded answer opens by Enter."""
    await page_of(server, upstream, LONG)
    page = await browse.open(await folded_history_of(server, upstream))
    for place in ("input", ".search button", "summary"):
        await page.keyboard.press("Tab")
        await expect(page.locator(place)).to_be_focused()
    await page.keyboard.press("Enter")
    await expect(page.get_by_role("group", name="表格")).to_be_visible()
    await page.keyboard.press("Tab")
    await expect(page.locator(".answer a").first).to_be_focused()
    code = page.get_by_role("group", name="代码")
    await code.focus()
    await page.keyboard.press("ArrowRight")
    await expect(code).not_to_have_js_property("scrollLeft", 0)


# All pages


async def test_a_dark_phone_gets_dark_pages(browse, server, upstream):
    """Paper, ink and question have other colours."""
    url = await page_of(server, upstream, RICH)
    colours = """['body', '.question', '.code', 'th'].map(name => {
        const style = getComputedStyle(document.querySelector(name));
        return [style.backgroundColor, style.color]})"""
    light = await (await browse.open(url, color_scheme="light")).evaluate(colours)
    dark = await (await browse.open(url, color_scheme="dark")).evaluate(colours)
    for (paper, ink), (dark_paper, dark_ink) in zip(light, dark, strict=True):
        assert paper != dark_paper and ink != dark_ink


async def test_no_page_scrolls_sideways(browse, server, upstream, gate):
    """At 320 px, and with fonts twice as large; what is wide scrolls in its own box."""
    browse.excused = REFUSED
    page = await browse.open("about:blank", viewport={"width": 320, "height": 600})
    for kind, url in (await all_pages(server, upstream, gate)).items():
        await page.set_viewport_size({"width": 320, "height": 600})
        await visit(page, kind, url)
        for size in ("106.25%", "212.5%"):
            await page.evaluate(f"document.documentElement.style.fontSize = '{size}'")
            assert await page.evaluate(WIDTHS) == [320, []], (kind, size)
            await page.set_viewport_size({"width": 1280, "height": 800})
            assert (await page.evaluate(WIDTHS))[0] == 1280, (kind, size)
            await page.set_viewport_size({"width": 320, "height": 600})


# The width of a page, and what is cut off by its own box without a way to scroll there.
WIDTHS = """[document.documentElement.scrollWidth,
    [...document.querySelectorAll('main *, footer *')].filter(box =>
        box.scrollWidth > box.clientWidth + 1 && box.clientWidth
        && getComputedStyle(box).display != 'inline'
        && !box.closest('pre, .scroll, summary')).map(box => box.outerHTML)]"""


async def test_wide_tables_and_code_scroll_in_their_box(browse, server, upstream):
    """They are wider than the phone, and the page is not."""
    page = await browse.open(await page_of(server, upstream, RICH))
    for box in (".scroll", "pre"):
        wide = "box => [box.scrollWidth > 2 * box.clientWidth, box.clientWidth < 390]"
        assert await page.locator(box).evaluate(wide) == [True, True]
    await expect(page.locator("td").nth(2)).to_have_css("text-align", "right")


FAULTS = """axe.run().then(result => result.violations.map(
    fault => [fault.id, fault.nodes[0].html]))"""


@pytest.fixture
def axe():
    """The text of axe-core."""
    places = [pathlib.Path(os.environ.get("WXGPT_AXE", "nowhere"))]
    places += [place / AXE for place in (ROOT, ROOT.parent, CACHE)]
    remedy = f"npm install --prefix {CACHE} axe-core"
    need(found := [place for place in places if place.is_file()], "axe-core", remedy)
    return found[0].read_text("utf-8")


async def test_axe_finds_nothing_on_any_page(browse, server, upstream, gate, axe):
    """In light and dark; all of its rules, best practice included."""
    browse.excused = REFUSED
    page = await browse.open("about:blank", init=axe)
    for kind, url in (await all_pages(server, upstream, gate)).items():
        await visit(page, kind, url)
        for scheme, width in (("light", 360), ("dark", 1280)):
            await page.set_viewport_size({"width": width, "height": 800})
            await page.emulate_media(color_scheme=scheme)
            assert await page.evaluate(FAULTS) == [], (kind, scheme)


SMALL = """[...document.querySelectorAll('button, input, summary, .actions a, a.wide, .typeset')]
    .filter(box => box.checkVisibility() && box.type != 'hidden'
        && box.getBoundingClientRect().height < 44).map(box => box.outerHTML)"""


async def test_what_is_tapped_is_as_large_as_a_thumb(browse, server, upstream, gate):
    """Buttons, fields and what folds are at least 44 pixels high."""
    browse.excused = REFUSED
    page = await browse.open("about:blank", viewport={"width": 360, "height": 740})
    for kind, url in (await all_pages(server, upstream, gate)).items():
        await visit(page, kind, url)
        assert await page.evaluate(SMALL) == [], kind


async def test_without_script_there_is_no_dead_button(browse, server, upstream, gate):
    """Forms and what folds work; the rest is not there."""
    browse.excused = REFUSED
    page = await browse.open("about:blank", java_script_enabled=False)
    for url in (await all_pages(server, upstream, gate)).values():
        await page.goto(url)
        for button in await page.locator("button:not(form button)").all():
            await expect(button).to_be_hidden()


# Hostile content

EVIL = (
    "<script>alert(1)</script><img src=x onerror=alert(2)><svg onload=alert(3)>"
    "<style>*{display:none}</style><base href=//evil.example><!-- </textarea></main>"
)
HOSTILE = f"""{EVIL}

[点](javascript:alert(4)) [点](JaVa&#x0A;Script:alert(5)) <javascript:alert(6)>
[点](data:text/html,<script>alert(7)</script>) ![x](https://evil.example/x.png)
![x](javascript:alert(8)) [点](https://e.com/"onclick="alert(9))

```"><script>alert(10)</script>
</code></pre><script>alert(11)</script>
```

| <i>a</i> | b" onfocus="alert(12) |
|:--|-:|
| </td></table><script>alert(13)</script> | 2 |

\u202e反着写的字\u202d和\u2066没关上的

</article></main></body> 最后一句
"""


async def test_hostile_content_is_text(browse, server, upstream, gate):
    """Live, finished and in the history; nothing runs, nothing is loaded."""
    script = Script([HOSTILE, gate, "完"])
    page = await browse.open(await page_of(server, upstream, script, EVIL))
    await expect(page.locator(".live")).to_contain_text("最后一句")
    gate.set()
    await expect(page.locator(".answer table")).to_be_visible()
    await is_harmless(page)
    await page.goto(await folded_history_of(server, upstream))
    await page.locator("article > details > summary").last.click()
    await expect(page.locator(".answer table")).to_be_visible()
    await is_harmless(page)


async def is_harmless(page):
    """Check that hostile content is where it belongs, as text."""
    question, answer = page.locator(".question").last, page.locator("main .answer")
    await expect(question).to_contain_text("<script>alert(1)</script>")
    for words in (
        "<script>alert(1)</script>",
        "<script>alert(11)</script>",
        "最后一句",
    ):
        await expect(answer).to_contain_text(words)
    await expect(page.locator("body > footer")).to_contain_text("AI 生成")
    await expect(page.locator("body > script[nonce]")).to_have_count(
        await page.locator("script").count()
    )
    inside = "main :is(img, svg, style, base, script, i, [onclick], [onfocus], [style])"
    await expect(page.locator(inside)).to_have_count(0)
    addresses = "links => links.map(link => new URL(link.href).protocol)"
    protocols = await page.locator("a").evaluate_all(addresses)
    assert set(protocols) <= {"https:", "http:"}


@pytest.mark.parametrize("piece", ["x" * 100_000, "[" * 50_000])
async def test_what_is_beyond_measure_stays_readable(
    browse, server, upstream, gate, piece
):
    """100 KB without a space, brackets without end: whole, as wide as a phone."""
    script = Script([piece, gate, "\n\n```\n码\n```\n完"])
    page = await browse.open(await page_of(server, upstream, script))
    await expect(page.locator(".asking")).to_contain_text("正在写")
    assert await page.evaluate("document.documentElement.scrollWidth") == 390
    gate.set()
    await expect(page.locator("main > article > .note")).to_be_visible()
    text = await page.evaluate("document.querySelector('.answer').textContent")
    assert piece in text.replace("\n", "") and text.strip().endswith("完")
    assert await page.evaluate("document.documentElement.scrollWidth") == 390


# History

TURNS = """
    WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < :count)
    INSERT INTO turn (session_id, openid, msg_key, link_key, question, answer, state,
        created_at) SELECT (SELECT max(id) FROM session WHERE openid = :o), :o,
        'msg ' || i, 'link' || i, '问题' || i, '答**案**' || i, 'done',
        :at + i * 60 FROM n
"""


async def test_the_history_is_readable_at_a_glance(browse, server, upstream):
    """Sessions newest first, each oldest first; a long answer folded; a failed one marked."""
    await page_of(server, upstream, "短", "头一个")
    await page_of(server, upstream, LONG, "接着的")
    store = server.bot.store
    await store.rows("UPDATE turn SET created_at = created_at - 86400")
    await server.ask("/clear")
    await page_of(server, upstream, Script("", status=401), "没成的")
    page = await browse.open(await history_of(server))
    await expect(page.locator(".note").first).to_contain_text("只给自己看")
    days = [re.compile(rf"^{day} \d\d:\d\d · chatgpt$") for day in ("今天", "昨天")]
    await expect(page.locator("section > h2")).to_have_text(days)
    questions = ["没成的", "头一个", "接着的"]
    await expect(page.locator(".question")).to_have_text(questions)
    await expect(page.locator("article").first.locator(".failed")).to_be_visible()
    await expect(page.locator("article").last.locator(".failed")).to_have_count(0)
    await expect(page.locator("summary")).to_contain_text(
        "第一段很普通。 【小标题】 见文档，还有[图片：一只猫]与公式 a₁"
    )
    await expect(page.locator("details .answer")).to_be_hidden()


async def test_a_folded_answer_is_typeset_when_it_is_opened(browse, server, upstream):
    """In its place, with copy buttons; nothing is fetched before."""
    await page_of(server, upstream, LONG)
    page = await browse.open(await folded_history_of(server, upstream))
    await page.locator("summary").click()
    await expect(page.locator("details table")).to_be_visible()
    await expect(page.get_by_role("button", name="复制", exact=True)).to_have_count(1)
    await expect(page.locator("details .typeset, .plain")).to_have_count(0)


async def test_who_comes_back_to_a_history_finds_their_place(browse, server, upstream):
    """What was open is open again, and as far scrolled."""
    for number in range(4):
        await page_of(server, upstream, LONG * 3, f"第{number}个")
    url = await folded_history_of(server, upstream)
    # A browser may keep the page as it was; this one does not.
    page = await browse.open(url, init="addEventListener('unload', () => 0)")
    fold = page.locator("article > details").nth(2)
    await fold.locator("summary").click()
    await expect(fold.locator("table").first).to_be_visible()
    link = fold.get_by_role("link", name="单独看")
    await link.scroll_into_view_if_needed()
    place = await page.evaluate("scrollY")
    await link.click()
    await expect(page).not_to_have_url(url)
    await page.evaluate("history.back()")
    await page.wait_for_function(f"scrollY == {place}")
    await expect(fold.locator("table").first).to_be_visible()
    await expect(page.locator("article > details[open]")).to_have_count(1)


async def test_a_folded_answer_opens_without_script(browse, server, upstream):
    """As it was written, with a link to where it is typeset."""
    await page_of(server, upstream, LONG)
    url = await folded_history_of(server, upstream)
    page = await browse.open(url, java_script_enabled=False)
    await page.locator("summary").click()
    await expect(page.locator("details .answer")).to_contain_text("## 小标题")
    await page.locator(".typeset").click()
    await expect(page.locator(".answer table")).to_be_visible()
    await expect(page.locator("details")).to_have_count(0)


async def test_older_exchanges_are_behind_a_link(browse, server):
    """Fifty on the first page, the rest behind it."""
    await server.bot.store.rows(TURNS, count=51, o=ANN, at=time.time())
    page = await browse.open(await history_of(server))
    await expect(page.locator("article")).to_have_count(50)
    await page.get_by_role("link", name="更早的记录").click()
    await expect(page.locator(".question")).to_have_text(["问题1"])
    await expect(page.get_by_role("link", name="更早的记录")).to_have_count(0)


async def test_sixty_exchanges_are_browsed_and_searched(browse, server):
    """Also without script: what was found is marked, and leads there and back."""
    await server.bot.store.rows(TURNS, count=60, o=ANN, at=time.time() - 3600)
    url = await history_of(server)
    for script in (True, False):
        page = await browse.open(url, java_script_enabled=script)
        await expect(page.locator("article")).to_have_count(50)
        await page.get_by_role("searchbox").fill("案** 问题7")
        await page.get_by_role("button", name="搜索").click()
        await expect(page.locator("mark")).to_have_text(["问题7", "案**"])
        await page.get_by_role("link", name="看整条").click()
        await expect(page.locator(".question")).to_have_text("问题7")
        await expect(page.locator(".answer strong")).to_have_text("案")
        await page.get_by_role("link", name="回到聊天记录").click()
        await expect(page).to_have_url(url)
        await page.get_by_role("searchbox").fill("答")
        await page.keyboard.press("Enter")
        await expect(page.locator("article")).to_have_count(20)
        await page.get_by_role("button", name="更早的记录").click()
        await expect(page.locator(".question", has_text="问题40")).to_be_visible()
        await expect(page.locator("article")).to_have_count(40 if script else 20)


async def test_a_search_leaves_no_way_back_that_shows_nothing(browse, server):
    """A browser does not come back to what was sent: all that follows is in its place."""
    await server.bot.store.rows(TURNS, count=30, o=ANN, at=time.time() - 3600)
    history = await history_of(server)
    page = await browse.open(history)
    for words in ("没有的", "问题"):
        await page.get_by_role("searchbox").fill(words)
        await page.get_by_role("button", name="搜索").click()
    await expect(page.get_by_role("contentinfo")).to_contain_text("AI 生成")
    await page.get_by_role("button", name="更早的记录").click()
    await expect(page.locator("article")).to_have_count(30)
    await expect(page.get_by_role("button", name="更早的记录")).to_have_count(0)
    await page.get_by_role("link", name="看整条").nth(1).click()
    await expect(page.locator("article strong")).to_have_text("案")
    await expect(page.locator("h2")).to_have_count(30)
    assert "/search" in page.url
    await page.evaluate("history.back()")
    await expect(page).to_have_url(history)
    await expect(page.locator("article")).to_have_count(30)


async def test_the_history_is_saved_as_a_file(browse, server, upstream):
    """Under a name that says what it is."""
    await page_of(server, upstream, RICH)
    page = await browse.open(await history_of(server))
    async with page.expect_download() as download:
        await page.get_by_role("button", name="导出全部记录").click()
    file = await download.value
    assert re.fullmatch(r"聊天记录-\d{4}-\d\d-\d\d\.md", file.suggested_filename)
    await file.delete()


async def test_an_answer_being_written_is_live_in_the_history(
    browse, server, upstream, gate
):
    """It grows there as on its own page."""
    await page_of(server, upstream, Script(["写着。", gate, "完"]))
    page = await browse.open(await history_of(server))
    await expect(page.locator(".live")).to_have_text("写着。")
    gate.set()
    await expect(page.locator(".answer p")).to_have_text("写着。完")


# Asking on the page


@pytest.fixture
async def mine(serve):
    """wxgpt with pages to ask on: to a browser loopback is as good as TLS."""
    port = free_port()
    address = {"public_url": f"http://127.0.0.1:{port}", "server": {"port": port}}
    return await with_session(serve, wechat={"mute_guard": 0}, **address)


async def signed_in(browse, server, openid=ANN, **options):
    """Open the own page of a subscriber, who confirms its number in the chat."""
    page = await browse.open(server.url + "/me", **options)
    number = (await page.locator(".number").text_content()).split()[-1]
    asked = await server.ask(f"登录 {number}", openid)
    await server.wechat.tap(openid, asked.taps[0])
    await expect(page.locator(".ask textarea")).to_be_visible()
    return page


async def put(page, question):
    """Write a question into the field and send it."""
    await page.locator(".ask textarea").fill(question)
    await page.get_by_role("button", name="发送").click()


async def test_two_browsers_and_the_chat_are_one_conversation(browse, mine, upstream):
    """Ten questions here and there: one session, in order, each knowing the others."""
    phone, desk = [await signed_in(browse, mine) for _ in range(2)]
    for number in range(10):
        question = f"第{number}问"
        if number % 3 == 2:
            await mine.ask(question)
        else:
            page = (phone, desk)[number % 3]
            await put(page, question)
            answer = page.locator("article", has_text=question).locator(".answer")
            await expect(answer.last).to_contain_text(f"关于「{question}」")
            await expect(page.locator(".asking")).to_have_count(0)
    asked = [
        m["content"] for m in upstream.requests[-1].messages if m["role"] == "user"
    ]
    assert asked == [f"第{number}问" for number in range(10)]
    await phone.reload()
    await expect(phone.locator("section")).to_have_count(1)
    await expect(phone.locator(".question")).to_have_text(asked)
    await put(desk, "桌上这一问")  # in a page that was open all the while
    await expect(desk.locator(".answer").last).to_contain_text("关于「桌上这一问」")


async def test_a_question_appears_at_once_and_its_answer_streams(
    browse, mine, upstream, gate
):
    """Typeset under it, without a reload; the field is empty for the next."""
    page = await signed_in(browse, mine)
    await page.evaluate("window.stays = true")
    upstream.will(Script(["**先写**\n\n", gate, "- 后写\n"]))
    await put(page, "一个问题")
    article = page.locator("article").last
    await expect(article.locator("h3.question")).to_have_text("一个问题")
    await expect(article.locator(".answer strong")).to_have_text("先写")
    await expect(page.locator(".ask textarea")).to_have_value("")
    gate.set()
    await expect(article.locator(".answer li")).to_have_text("后写")
    await expect(article.get_by_role("button", name="复制全文")).to_be_visible()
    assert await page.evaluate("window.stays")


async def test_stop_ends_the_answer_in_its_place(browse, mine, upstream, gate):
    """What is written stays; the upstream's call is closed."""
    page = await signed_in(browse, mine)
    upstream.will(Script(["写了一半。", gate]))
    await put(page, "很长的")
    await expect(page.locator(".answer")).to_have_text("写了一半。")
    await page.get_by_role("button", name="停").click()
    await expect(page.locator("article")).to_contain_text("已停在这里")
    await expect(page.locator(".answer")).to_have_text("写了一半。")
    async with asyncio.timeout(20):
        await upstream.requests[-1].over.wait()
    assert upstream.requests[-1].outcome == "cut by client"


async def test_words_that_were_not_sent_stay_in_the_field(browse, mine, upstream):
    """A refusal and a lost line leave them there, with the reason."""
    browse.excused = REFUSED
    page = await signed_in(browse, mine)
    field, failed = page.locator(".ask textarea"), page.locator(".ask .failed")
    await put(page, "太长" * 2000)
    await expect(failed).to_contain_text("问题太长了")
    await expect(field).to_have_value("太长" * 2000)
    await page.route("**/me/ask", lambda route: route.abort())
    await put(page, "断了线")
    await expect(failed).to_have_text("没发出去，请再试一次。")
    await expect(field).to_have_value("断了线")
    await expect(page.locator("article")).to_have_count(0)
    await page.unroute("**/me/ask")
    await page.get_by_role("button", name="发送").click()
    await expect(page.locator(".answer")).to_contain_text("关于「断了线」")
    await expect(failed).to_have_count(0)


async def test_without_script_a_page_asks_too(browse, mine, upstream, gate):
    """The form posts, the page comes back and reloads itself until it is answered."""
    page = await signed_in(browse, mine, java_script_enabled=False)
    upstream.will(Script(["先写。", gate, "后写。"]))
    await put(page, "没有脚本")
    await expect(page.locator(".answer")).to_have_text("先写。")
    gate.set()
    await expect(page.locator(".answer")).to_have_text("先写。后写。")
    await page.get_by_role("button", name="退出登录").click()
    await expect(page.locator(".number")).to_be_visible()


async def test_without_script_no_reload_takes_what_is_typed(
    browse, mine, upstream, gate
):
    """A page that reloads itself has no field; one with a field does not reload."""
    browse.excused = REFUSED
    page = await signed_in(browse, mine, java_script_enabled=False)
    field, reload = page.locator(".ask textarea"), page.locator("[http-equiv=refresh]")
    await expect(reload).to_have_count(0)
    await field.fill("太长" * 2000)
    upstream.will(Script(["写着。", gate, "完"]))
    await mine.ask("从公众号问的")
    await page.get_by_role("button", name="发送").click()
    await expect(page.locator(".live")).to_have_text("写着。")
    await expect(field).to_have_value("太长" * 2000)
    await expect(reload).to_have_count(0)
    await page.goto(mine.url + "/me")
    for typed in (field, page.get_by_role("searchbox"), page.locator(".menu")):
        await expect(typed).to_be_hidden()
    await expect(page.get_by_role("button", name="停")).to_be_visible()
    gate.set()
    await expect(field).to_be_visible()
    await expect(reload).to_have_count(0)


@pytest.mark.parametrize("script", [True, False])
async def test_a_question_that_failed_is_asked_once_more(
    browse, mine, upstream, script
):
    """By a button; what is typed meanwhile stays, if nothing is loaded for that."""
    page = await signed_in(browse, mine, java_script_enabled=script)
    upstream.will(Script("", status=401))
    await put(page, "两行的\n问题")
    await expect(page.locator(".failed")).to_contain_text(said("failed_setup"))
    await expect(page.locator(".failed")).not_to_contain_text(TEXTS.page_retry)
    await expect(page.locator("main h1")).to_have_count(1)
    await page.locator(".ask textarea").fill("草稿")
    await page.get_by_role("button", name="再试一次").click()
    await expect(page.locator(".answer")).to_contain_text("关于「两行的")
    await expect(page.locator(".question")).to_have_text(["两行的\n问题"] * 2)
    await expect(page.locator(".ask textarea")).to_have_value("草稿" if script else "")


async def test_nothing_lies_over_the_field(browse, mine, upstream, gate):
    """However many lines are in it, and also in a browser where it does not grow."""
    browse.excused = REFUSED  # the icon, which only the policy keeps it from asking for
    old = "CSS.supports = () => false"
    page = await signed_in(browse, mine, init=old, bypass_csp=True)
    await page.add_style_tag(content="textarea { field-sizing: fixed !important }")
    upstream.will(Script(["一段话。\n\n" * 40, gate, "完"]))
    await put(page, "很长的")
    await expect(page.locator(".live")).to_contain_text("一段话。")
    await page.locator(".ask textarea").fill("一行\n" * 9)
    await page.evaluate("scrollTo(0, 0)")
    foot = await page.locator(".ask").bounding_box()
    assert foot["height"] > 200
    button = page.get_by_role("button", name="还在写 ↓")
    for over in (button, page.locator(".written")):
        await expect(over).to_be_visible()
        box = await over.bounding_box()
        assert box["y"] + box["height"] < foot["y"]
        gate.set()
    await page.get_by_role("button", name="发送").click()
    await expect(page.locator(".ask textarea")).to_have_value("")
    assert (await page.locator(".ask").bounding_box())["height"] < 90


async def test_the_own_page_says_that_ai_writes_before_it_does(browse, mine):
    """The first answer comes without a reload."""
    page = await signed_in(browse, mine)
    await expect(page.get_by_role("contentinfo")).to_contain_text("AI 生成")


async def test_the_words_that_sign_in_are_copied(browse, mine):
    """On a phone nobody can look at the number while they type it."""
    page = await browse.open(mine.url + "/me")
    words = await page.locator(".number").text_content()
    assert await copied(page, "复制") == words


async def test_axe_finds_nothing_where_one_asks(browse, mine, upstream, gate, axe):
    """The number, the empty page, an answer that grows, a refusal, on any screen."""
    browse.excused = REFUSED
    number = await browse.open(mine.url + "/me", init=axe)
    page = await signed_in(browse, mine, init=axe)
    for width, scheme in ((360, "light"), (1280, "dark")):
        for one in (number, page):
            await one.set_viewport_size({"width": width, "height": 740})
            await one.emulate_media(color_scheme=scheme)
            assert await one.evaluate(FAULTS) == []
            assert await one.evaluate(SMALL) == []
        upstream.will(Script([RICH + "\n\n", gate]))
        await put(page, "问" * width)
        await expect(page.locator(".asking").last).to_contain_text("正在写")
        assert await page.evaluate(FAULTS) == []
        assert await page.evaluate(SMALL) == []
        assert await page.evaluate("document.body.scrollWidth") <= width
        await page.get_by_role("button", name="停").click()
        await expect(page.locator(".asking")).to_have_count(0)
    await put(page, "太长" * 2000)
    await expect(page.locator(".ask .failed")).to_be_visible()
    assert await page.evaluate(FAULTS) == []


async def test_a_new_topic_begins_a_section(browse, mine, upstream):
    """Its questions stand apart, and do not know those before."""
    page = await signed_in(browse, mine)
    await put(page, "旧的")
    await expect(page.locator(".answer")).to_contain_text("关于「旧的」")
    async with page.expect_navigation():
        await page.get_by_role("button", name="新话题").click()
    await put(page, "新的")
    await expect(page.locator("section").first.locator(".question")).to_have_text(
        "新的"
    )
    await expect(page.locator("section")).to_have_count(2)
    messages = (await upstream.arrival("新的")).messages
    assert [m["content"] for m in messages if m["role"] == "user"] == ["新的"]


async def test_an_answers_page_leads_on_to_the_own_page(browse, mine, upstream):
    """With a field if the browser is signed in; else with a link to sign in."""
    url = await page_of(mine, upstream, "一个回答。")
    stranger = await browse.open(url)
    await expect(stranger.locator("form")).to_have_count(0)
    await stranger.get_by_role("link", name="在网页里接着问").click()
    await expect(stranger.locator(".number")).to_be_visible()
    page = await signed_in(browse, mine)
    await page.goto(url)
    await put(page, "再问一句")
    await expect(page).to_have_url(mine.url + "/me")
    await expect(page.locator(".answer").last).to_contain_text("关于「再问一句」")


# Size and speed, without a browser


async def test_a_page_weighs_less_than_12_kb(server, upstream, gate):
    """Style and script included, for want of content; a live one has its own, too."""
    live = await page_of(server, upstream, Script([gate, "完"]), "问")
    for url, most in (
        (live, 15),
        (await history_of(server, BOB), 12),
        (server.url + "/a/nothing", 12),
    ):
        _, text = await server.get(url)
        assert len(text.encode()) < most * 1024


async def test_the_history_is_found_by_its_index(server):
    """No table is read through and nothing is sorted, whatever is in there."""
    store, queries = server.bot.store, []
    await store.db.set_trace_callback(queries.append)
    await store.turns_of(ANN, 2**62, 50)
    await store.db.set_trace_callback(None)
    [query] = [query for query in queries if "FROM exchange" in query]
    plan = [row[-1] for row in await store.rows(f"EXPLAIN QUERY PLAN {query}")]
    assert any("turn USING INDEX turn_by_openid" in step for step in plan)
    # The subquery that is gone through has no more rows than a page.
    wrong = re.compile(r"SCAN (?!\(subquery)|TEMP B-TREE")
    assert [step for step in plan if wrong.search(step)] == []
