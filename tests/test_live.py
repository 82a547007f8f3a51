"""An answer that is being written: its typeset blocks, and the stream of them."""

import asyncio
import contextlib
import html.parser

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import wxgpt
from conftest import ANN, BOB, blocks_of
from fake_openai import Script
from test_chat_text import SHAPES
from test_pages import events_of, next_event
from waiting import limit

TEXTS = wxgpt.read_texts({})
PIECES = [
    *(
        "字",
        "词。",
        " ",
        "\n",
        "\n\n",
        "  ",
        "# ",
        "#### ",
        "- ",
        "1. ",
        "> ",
        "| a | b |",
    ),
    *("|-|-:|", "| 1 |", "```", "```py", "$x^2$", "$$", "\\[", "\\]", "**", "`", "~~"),
    *(
        "[a](https://a.cn)",
        "<sub>",
        "</sub>",
        "&amp;",
        "---",
        "- [ ] ",
        "\r\n",
        "- 100 元",
    ),
]


def render(markdown):
    """Return the blocks of an answer so far."""
    return wxgpt.BlockRenderer(TEXTS, wxgpt.BlockedWords("")).render(
        markdown, has_ended=False
    )


@pytest.fixture
def changes():
    """The server lets no attempt time out."""
    return {"wechat": {"mute_guard": 0}}


async def test_who_opens_many_streams_keeps_none_from_others(server, upstream, gate):
    """A page that gets none looks again by itself; whoever goes makes room."""
    upstream.will(Script(["开头。", gate]), Script(["开头。", gate]))
    anns, bobs = [
        (await server.ask(f"/chatgpt 问{who}", who)).links[0][1] for who in (ANN, BOB)
    ]
    async with contextlib.AsyncExitStack() as stack:

        async def status_of(link):
            stream = server.open(f"{link}/events")
            return (await stack.enter_async_context(stream)).status

        async with contextlib.AsyncExitStack() as few:
            for _ in range(wxgpt.VIEWERS):
                await few.enter_async_context(server.open(f"{anns}/events"))
            assert await status_of(anns) == 503
            assert await status_of(bobs) == 200
            assert (await server.get(anns))[0] == 200
        async with limit(20, "end of the streams"):
            while server.bot.subscriber(ANN).viewers:
                await asyncio.sleep(0.01)
        assert await status_of(anns) == 200


async def test_many_subscribers_viewers_leave_two_for_each(
    server, upstream, gate, monkeypatch
):
    """However many accounts follow answers, memory has a bound."""
    monkeypatch.setattr(wxgpt, "ALL_VIEWERS", 3)
    upstream.will(Script(["开头。", gate]), Script(["开头。", gate]))
    anns, bobs = [
        (await server.ask(f"/chatgpt 问{who}", who)).links[0][1] for who in (ANN, BOB)
    ]
    async with contextlib.AsyncExitStack() as stack:
        seen = [
            (await stack.enter_async_context(server.open(f"{link}/events"))).status
            for link in (anns, anns, anns, anns, bobs, bobs, bobs)
        ]
    assert seen == [200, 200, 200, 503, 200, 200, 503]


async def stream_of(server, upstream, script, question="给安看的"):
    """Ask; return the address of the answer's events."""
    upstream.will(script)
    await server.ask(question)
    turn = (await server.bot.store.turns_of(ANN, 2**62, 1))[0]
    return f"{server.url}/a/{turn.link_key}/events"


async def events_until(response, words):
    """Read events until the blocks have these words; return the blocks."""
    seen = []
    while words not in blocks_of(seen):
        seen.append((await next_event(response))[2])
    return blocks_of(seen)


# Blocks


def check_growth(text, cuts):
    """Check that what is done stays, and ends as the finished page has it."""
    growing = wxgpt.BlockRenderer(TEXTS, wxgpt.BlockedWords(""))
    finished = wxgpt.BlockRenderer(TEXTS, wxgpt.BlockedWords("")).render(
        text, has_ended=True
    )
    for cut in [*sorted(cuts), len(text)]:
        growing.render(text[:cut], has_ended=False)
        assert growing.done == finished[: len(growing.done)]
    assert growing.render(text, has_ended=True) == finished


@settings(deadline=None)
@given(st.lists(st.sampled_from(PIECES), max_size=40).map("".join), st.data())
def test_a_block_that_is_done_stays_as_it_is(text, data):
    """Wherever the text is cut while it comes."""
    cut = st.integers(0, len(text))
    check_growth(text, data.draw(st.lists(cut, max_size=12)))


@pytest.mark.parametrize("shape", SHAPES)
def test_so_does_a_block_of_a_long_answer(shape):
    """Up to where typesetting ends, and beyond."""
    text = f"开头\n\n{shape * (60_000 // len(shape))}"
    check_growth(text, range(0, len(text), 7001))


class Depth(html.parser.HTMLParser):
    """Counts the elements that stand side by side."""

    def __init__(self, text):
        super().__init__()
        self.depth = self.count = 0
        self.feed(text)

    def handle_starttag(self, tag, _):
        self.count += not self.depth
        self.depth += tag not in ("br", "hr", "img")

    def handle_endtag(self, _):
        self.depth -= 1


@settings(deadline=None)
@given(st.lists(st.sampled_from(PIECES), max_size=40).map("".join))
def test_each_block_is_one_element(text):
    """A page counts its blocks by its elements."""
    for block in render(text):
        found = Depth(block)
        assert (found.count, found.depth) == (1, 0)


OPEN = {
    "a paragraph": ("一。\n\n**二", "<p>**二</p>"),
    "a formula": ("一。\n\n二 $x^2", "<p>二 $x^2</p>"),
    "a link": ("一。\n\n[二](https://a", "<p>[二]"),
    "code": ("```py\na = 1\nb", '<code>a = <span class="n">1</span>\nb\n</code>'),
    "a table": ("| 名 | 数 |\n|-|-|\n| 甲 | 1 |\n| 乙", "<td>乙</td>"),
    "a list": ("- 一\n- 二\n  - 三", "<li>三</li>"),
    "a quote": ("> 一\n> 二", "<blockquote>"),
    "a heading": ("一。\n\n## 二", "<h2>二</h2>"),
}


@pytest.mark.parametrize("name", OPEN)
def test_the_block_being_written_is_shown_as_if_it_ended(name):
    """What an open mark may become is not known yet."""
    markdown, shown = OPEN[name]
    assert shown in "".join(render(markdown))


@pytest.mark.parametrize("mark", ["- ", "#", "##", "```", "|", "3.", "---", "> ", "**"])
def test_a_line_of_marks_alone_waits_for_its_words(mark):
    """It would be text for a moment, and then something else."""
    assert render(f"- 一\n{mark}") == render("- 一\n")


# The stream


async def test_what_is_done_comes_once(server, upstream):
    """Only the block that can still change comes again."""
    gates = [asyncio.Event(), asyncio.Event()]
    script = Script(["一。\n\n二", gates[0], "。\n\n| 甲 |\n|-", gates[1], "|\n| 1 |"])
    url = await stream_of(server, upstream, script)
    async with server.open(url) as response:
        assert await events_until(response, "二") == "<p>一。</p>\n<p>二</p>\n"
        gates[0].set()
        *_, (_, _, data) = [await next_event(response)]
        assert data["keep"] == 1 and data["html"][0] == "<p>二。</p>\n"
        gates[1].set()
        *_, (_, _, data), done = await events_of(response)
    assert data["keep"] == 2 and "<td>1</td>" in data["html"][0]
    assert len(data["html"]) == 1 and done[0] == "done"


async def test_many_viewers_cost_one_typesetting(server, upstream, gate, monkeypatch):
    """Whoever comes first does it for all."""
    texts, render = [], wxgpt.BlockRenderer.render

    def count(self, markdown, has_ended):
        texts.append(markdown)
        return render(self, markdown, has_ended)

    monkeypatch.setattr(wxgpt.BlockRenderer, "render", count)
    url = await stream_of(server, upstream, Script(["一半。", gate, "另一半。"]))

    async def view():
        async with server.open(url) as response:
            return [data for *_, data in await events_of(response)]

    viewers = [asyncio.create_task(view()) for _ in range(20)]
    async with server.open(url) as response:
        await events_until(response, "一半")
    gate.set()
    seen = await asyncio.gather(*viewers)
    assert {blocks_of(events) for events in seen} == {"<p>一半。另一半。</p>\n"}
    assert texts.count("一半。另一半。") == 1 and len(texts) <= 4


async def test_a_viewer_who_goes_takes_nothing_along(server, upstream, gate):
    """Hanging up in the middle of the typesetting does not stop it for others."""
    formulas = "".join(f"$x_{{{n}}}$ " for n in range(400))
    url = await stream_of(server, upstream, Script([formulas, gate, "\n\n完"]))
    for _ in range(5):
        (await server.http.get(server.at(url))).close()
    async with server.open(url) as response:
        assert (await events_until(response, "<math")).count("<math") == 400
        gate.set()
        await response.read()


async def test_a_queued_question_says_so_until_its_turn_comes(server, upstream, gate):
    """On its page and in its stream."""
    upstream.will(Script([gate, "第一个答案。"]), Script(["第二个答案。"]))
    await asyncio.gather(server.ask("先问的"), server.ask("后问的"))
    turns = {turn.question: turn for turn in server.bot.turns.values()}
    url = f"{server.url}/a/{turns['后问的'].link_key}"
    assert "排队中" in (await server.get(url))[1]
    async with server.open(url + "/events") as response:
        assert await next_event(response) == ("queued", "", {"queued": True})
        gate.set()
        events = await events_of(response)
    said = [data for name, _, data in events if name == "queued"]
    assert said in ([{"queued": False}], [])  # not if the answer was there as soon
    assert "第二个答案。" in blocks_of(data for *_, data in events)


async def test_the_page_without_script_is_typeset_too(server, upstream, gate):
    """The blocks so far are in the page itself."""
    script = Script(["**一**\n\n| 甲 |\n|-|\n| 1", gate])
    url = await stream_of(server, upstream, script)
    _, page = await server.get(url.removesuffix("/events"))
    assert "<strong>一</strong>" in page and "<td>1</td>" in page
