"""Nothing that one person sends or a model writes keeps the others waiting.

The server runs with a watch inside (sim/watched.py). Each test brings it something
hostile, whole and as everybody meets it: message, reply, parts, stream, page, history.
"""

import asyncio
import gzip
import itertools
import re
import signal
import sys

import pytest
from aiohttp import web

import wxgpt
from conftest import ANN, PATIENT, ROOT, serving, with_session
from fake_openai import Script, says
from test_chat_text import SHAPES
from test_pictures import HOSTS, PNG, host  # noqa: F401

MOST_UNITS = 50  # about 50 ms on the machine that this was written on
WATCHED = (sys.executable, str(ROOT / "tests" / "sim" / "watched.py"))
NO_LIMITS = {"questions_per_day": 0, "all_per_day": 0, "waiting": 1000}
WORDS = [f"{chr(0x4E00 + n % 5000)}{chr(0x5000 + n // 5000)}词" for n in range(20_000)]
MARKS = "\u0301\u0323"


class Watched:
    """The server under watch, with Ann's session open."""

    def __init__(self, server, process, upstream):
        self.server, self.process, self.upstream = server, process, upstream

    async def gap(self):
        """Return the longest gap since the last call, in units."""
        since = len(self.process.log)
        self.process.process.send_signal(signal.SIGUSR1)
        await self.process.says("longest gap", since)
        [line] = [x for x in self.process.log[since:] if "longest gap" in x]
        return float(re.search(r"gap ([\d.]+) units", line)[1])

    async def least_gap(self, bring):
        """Bring something up to five times, as something else may run; the least."""
        gaps = []
        while len(gaps) < 5 and min(gaps, default=999) > MOST_UNITS:
            await self.gap()
            await bring()
            gaps.append(await self.gap())
        return min(gaps)

    async def read_answer(self, text, question="问", script=None):
        """Let the model write this, and read it everywhere."""
        self.upstream.will(
            script or Script([text[at : at + 4000] for at in range(0, len(text), 4000)])
        )
        seen = await self.server.ask(question)
        links = [seen.links[-1][1]] if seen.links else []
        links += [(await self.server.ask("/history")).links[0][1]]
        taps = [tap for tap in seen.taps if tap.content.startswith("继续")]
        parts = [self.server.wechat.tap(ANN, tap) for tap in taps for _ in range(3)]
        paths = [*links, *(f"{link}/events" for link in links if "/a/" in link)]
        await asyncio.gather(*parts, *map(self.server.get, paths))


@pytest.fixture
def watch(spawn, upstream):
    """Start the server under watch."""

    async def start(**changes):
        settings = {"limits": NO_LIMITS | changes.pop("limits", {})}
        settings["wechat"] = PATIENT | changes.pop("wechat", {})
        server, process = await spawn(WATCHED, **settings, **changes)
        server.wechat.attempt_timeout = PATIENT["attempt_timeout"]
        await server.ask("/chatgpt")
        return Watched(server, process, upstream)

    return start


def repeated(shape, size=20_000):
    """Return a text of one shape."""
    return (shape * size)[:size]


TABLE = "|a" * 39 + "|\n" + "|-" * 39 + "|\n"
ANSWERS = {
    "a wide table": TABLE + "|a" * 39 + "|\n" + ("|b" * 39 + "|\n") * 500,
    "narrow tables": "a|b\n-|-\n" + "a|b\n" * 8000,
    "many tables": "a|b\n-|-\na|b\n\n" * 3000,
    "rules that are none": "a|b\n" + "-|" * 2000 + "…x\n" + "-|-|…x" * 3000,
    "nothing to show": "<!--#-->\n" * 20_000,
    "marks": "字" + "\u0301" * 20_000,
    "mixed marks": "字" + MARKS * 10_000,
    "what has no width": "字" + "\u200b" * 20_000 + "词",
    "wide forms": "ﷺ" * 20_000,
    "nested fractions": ("$" + "\\frac{1}{" * 60 + "}" * 60 + "$ ") * 100,
    "formulas": "$a^{b^{c^{d^{e}}}}$ " * 4000,
    "one long line": "字" * 100_000,
    "a thought at its end": "想" * 100_000 + "</think>答。",
    "marks that nothing closes": "🏻</b>\n***" * 2000,
    "tags that nothing closes": "</<b></\n" * 2500,
    "a long heading": "# " + "**a** " * 33_000,
    "a long row": "a|b\n-|-\n" + "**a** |" * 28_000,
    "ticks in a row": "a|b\n-|-\n" + "`" * 20_000 + "|\n",
    "bare list marks": "1.\n" * 3000,
}

LONGER = {
    "a table of 200 KB": "| 名 | 值 |\n|-|-|\n" + "| 甲乙丙 | $x_1^2$ |\n" * 8000,
    "nested lists": "".join("  " * (n % 20) + f"- 第{n}项\n" for n in range(3000)),
    "code without an end": "```py\n" + "x = 'abc'  # 字\n" * 8000,
    "one paragraph": "**字** `x` [a](https://a.cn)\n" * 3000,
}


@pytest.mark.parametrize("first", range(0, len(SHAPES), 10))
async def test_no_repeated_shape_holds_the_others_up(watch, first):
    """Twenty thousand characters of each."""
    watched, gaps = await watch(), {}
    for shape in SHAPES[first : first + 10]:
        text = repeated(shape)
        gaps[shape] = await watched.least_gap(lambda: watched.read_answer(text))  # noqa: B023
    print(gaps)
    assert {shape: gap for shape, gap in gaps.items() if gap > MOST_UNITS} == {}


@pytest.mark.parametrize("name", ANSWERS)
async def test_no_hostile_answer_holds_the_others_up(watch, tmp_path, name):
    """While 20,000 words are blocked."""
    (tmp_path / "words").write_text("\n".join(WORDS), "utf-8")
    watched = await watch(limits={"blocked_words": str(tmp_path / "words")})
    gap = await watched.least_gap(lambda: watched.read_answer(ANSWERS[name]))
    print(gap)
    assert gap <= MOST_UNITS


@pytest.mark.parametrize(
    "formula",
    ["x^{" * 28 + "NUMBER" + "+" * 480 + "}" * 28, "a" + " " * 1400 + "_{NUMBER}"],
)
async def test_no_long_formula_holds_the_others_up(watch, formula):
    """Others each time: what one means is remembered."""
    watched, numbers = await watch(), itertools.count(100)

    async def bring():
        formulas = [formula.replace("NUMBER", str(next(numbers))) for _ in range(20)]
        await watched.read_answer("".join(rf"\({one}\) " for one in formulas))

    gap = await watched.least_gap(bring)
    print(gap)
    assert gap <= MOST_UNITS


@pytest.mark.parametrize("name", [*ANSWERS, *LONGER])
async def test_a_live_page_of_it_holds_nobody_up(watch, tmp_path, name):
    """Twenty viewers, to whom it comes in forty pieces."""
    (tmp_path / "words").write_text("\n".join(WORDS), "utf-8")
    watched = await watch(limits={"blocked_words": str(tmp_path / "words")})
    text = "开头一段。\n\n" * 150 + (ANSWERS | LONGER)[name]
    size = len(text) // 40 + 1
    pieces = [text[at : at + size] for at in range(0, len(text), size)]

    async def follow(link, begun):
        async with watched.server.open(f"{link}/events") as stream:
            first = await stream.content.readuntil(b'"keep"')
            begun.release()
            return (first + await stream.content.read()).decode()

    async def bring():
        steps, gate = (
            itertools.chain(*zip(pieces, itertools.repeat(0.1))),
            asyncio.Event(),
        )
        watched.upstream.will(Script(["开头一段。\n\n" * 150, gate, *steps]))
        link = (await watched.server.ask("问")).links[0][1]
        begun = asyncio.Semaphore(0)
        streams = asyncio.gather(*(follow(link, begun) for _ in range(20)))
        for _ in range(20):
            await begun.acquire()
        gate.set()  # all twenty are there
        for stream in await streams:
            assert stream.count('"keep"') > 2 and "event: done" in stream

    gap = await watched.least_gap(bring)
    print(gap)
    assert gap <= MOST_UNITS


@pytest.mark.parametrize("unit", ["*a* $x_1$ 字。\n", "think"])
@pytest.mark.parametrize("piece", ["whole", "json"])
async def test_a_long_answer_at_once_holds_nobody_up(watch, unit, piece):
    """One event, or one body of JSON."""
    watched, text = await watch(), "<" + repeated(unit, 80_000)
    script = Script([text]) if piece == "whole" else says(text, streamed=False)
    gap = await watched.least_gap(lambda: watched.read_answer(text, script=script))
    print(gap)
    assert gap <= MOST_UNITS


async def test_an_answer_that_unpacks_to_much_holds_nobody_up(watch):
    """Two megabytes of events that say nothing come in one packet."""
    body = gzip.compress(b"data: {}\n\n" * 200_000)
    headers = {"Content-Encoding": "gzip", "Content-Type": "text/event-stream"}

    async def answer(request):
        return web.Response(body=body, headers=headers)

    async with serving(answer) as port:
        chatgpt = {"base_url": f"http://127.0.0.1:{port}/v1"}
        watched = await watch(assistants={"chatgpt": chatgpt})
        gap = await watched.least_gap(lambda: watched.server.ask("问"))
    print(gap)
    assert gap <= MOST_UNITS


async def test_an_error_of_many_tags_holds_nobody_up(watch):
    """A gateway's page that is no JSON, as long as we read it."""
    watched = await watch()

    async def bring():
        watched.upstream.will(Script(status=400, body="<" * 65_000))
        assert (await watched.server.ask("问")).text.startswith("AI 暂时用不了")

    gap = await watched.least_gap(bring)
    print(gap)
    assert gap <= MOST_UNITS


async def test_a_blocked_word_behind_much_text_holds_nobody_up(watch, tmp_path):
    """What was sent is found again in what was written."""
    (tmp_path / "words").write_text("\n".join(WORDS), "utf-8")
    watched = await watch(limits={"blocked_words": str(tmp_path / "words")})
    text, gate = "[a](https://a.cn/) *b* $x_1$ 字。\n" * 500, asyncio.Event()

    async def bring():
        gate.clear()
        watched.upstream.will(Script([text, gate, WORDS[0], text]))
        seen = await watched.server.ask("问")
        for _ in range(5):
            seen = await watched.server.wechat.tap(ANN, seen.taps[0])
        gate.set()
        await watched.server.ask("/history")
        await watched.server.wechat.tap(ANN, seen.taps[0])

    gap = await watched.least_gap(bring)
    print(gap)
    assert gap <= MOST_UNITS


MESSAGES = {
    "marks": "字" + "\u0301" * 20_000,
    "mixed marks": "/" + MARKS * 10_000,
    "wide forms": "ﷺ" * 20_000,
    "the longest question": "坏&lt;词" * 333,
    "commands": "/chatgpt" * 4000,
}


@pytest.mark.parametrize("name", MESSAGES)
async def test_no_hostile_message_holds_the_others_up(watch, tmp_path, name):
    """In a session and outside, with a list that is read again."""
    path = tmp_path / "words"
    path.write_text("\n".join(WORDS), "utf-8")
    watched = await watch(limits={"blocked_words": str(path)})

    async def bring():
        path.write_text("\n".join(WORDS), "utf-8")
        for openid in (ANN, "oStranger"):
            await watched.server.ask(MESSAGES[name], openid)
            await watched.server.ask(MESSAGES[name][:2000], openid)

    gap = await watched.least_gap(bring)
    print(gap)
    assert gap <= MOST_UNITS


COPY = """
    INSERT INTO turn (session_id, openid, msg_key, link_key, question, answer, state,
        created_at, asked)
    SELECT session_id, openid, msg_key || ?, link_key || ?, question, ?, 'done',
        created_at, 1 FROM turn ORDER BY id LIMIT 1
"""


async def long_history(watched, database, text, count=51):
    """Store so many answers; return the links of the first one and of the history."""
    await watched.server.ask("问")
    for number in range(count):
        database(COPY, number, number, text)
    [(key,)] = database("SELECT link_key FROM turn ORDER BY id DESC LIMIT 1")
    history = (await watched.server.ask("/history")).links[0][1]
    return watched.server.at(f"http://x/a/{key}"), history


async def test_a_history_of_long_answers_holds_nobody_up(watch, database):
    """Fifty-one of them, read by thirty at once."""
    watched = await watch()
    _, history = await long_history(watched, database, '*a* & "b"\n' * 18_000)
    get = watched.server.get
    gap = await watched.least_gap(
        lambda: asyncio.gather(*(get(history) for _ in range(30)))
    )
    print(gap)
    assert gap <= MOST_UNITS


async def test_who_waits_for_the_same_answer_waits_once(watch, database):
    """Ten taps on a stored answer that takes seconds to read."""
    watched = await watch()
    link, _ = await long_history(watched, database, "<!--#-->\n" * 20_000, 1)
    [(turn,)] = database("SELECT max(id) FROM turn")
    for number in range(1, 11):
        database(
            "INSERT INTO part (openid, number, turn_id, start, offered_at) VALUES (?, ?, ?, 0, 0)",
            ANN,
            100 + number,
            turn,
        )
    wechat = watched.server.wechat

    async def tap_all():
        taps = (wechat.send(ANN, f"继续{100 + n}") for n in range(1, 11))
        texts = {seen.text for seen in await asyncio.gather(*taps)}
        assert texts == {"这个回答已经全部发给你了。"}

    gap = await watched.least_gap(tap_all)
    print(gap)
    assert gap <= MOST_UNITS


async def test_an_answer_is_read_once_for_all_who_wait(serve, database, monkeypatch):
    """Ten taps on it at once, and ten readers of its page."""
    server = await with_session(serve, wechat=PATIENT)
    await server.ask("问")
    database(COPY, 1, 1, "字。" * 5000)
    [(turn, key)] = database("SELECT id, link_key FROM turn ORDER BY id DESC LIMIT 1")
    statement = "INSERT INTO part (openid, number, turn_id, start, offered_at) VALUES (?, ?, ?, 0, 0)"
    for number in range(100, 110):
        database(statement, ANN, number, turn)
    calls, read, render = [], wxgpt.Turn.read, wxgpt.typeset
    monkeypatch.setattr(
        wxgpt.Turn, "read", lambda self: calls.append("read") or read(self)
    )
    monkeypatch.setattr(
        wxgpt, "typeset", lambda *given: calls.append("page") or render(*given)
    )
    pages = [server.get(f"{server.url}/a/{key}") for _ in range(10)]
    taps = [server.ask(f"继续{number}") for number in range(100, 110)]
    seen = await asyncio.gather(*taps, *pages)
    assert all(one.text.startswith("字。") for one in seen[:10])
    # Typeset, and once more to be copied.
    assert all(text.count("字。") == 10_000 for _, text in seen[10:])
    assert sorted(calls) == ["page", "read"]


async def test_a_history_of_long_answers_is_read_in_more_pages(server, database):
    """No page is far above the budget, and none of the exchanges is left out."""
    await server.ask("问")
    for number in range(9):
        database(COPY, number, number, f"答案{number}" + "字" * 39_000)
    [(_, link)] = (await server.ask("/history")).links
    query, pages = "", []
    while query is not None:
        _, page = await server.get(link + query)
        pages.append(re.findall(r"(?<=>)答案\d", page))
        found = re.search(r'href="[\w-]+(\?before=\d+)"', page)
        query = found[1] if found else None
    assert sum((page[::-1] for page in pages), []) == [
        f"答案{number}" for number in range(8, -1, -1) for _ in "12"
    ]
    assert max(map(len, pages)) <= 2 * 3


async def test_a_long_answer_comes_in_several_events(server, database):
    """Nobody who follows it takes all of its memory at once."""
    await server.ask("问")
    database(COPY, 1, 1, "字" * 100_000)
    [(key,)] = database("SELECT link_key FROM turn ORDER BY id DESC LIMIT 1")
    _, text = await server.get(f"{server.url}/a/{key}/events")
    assert text.count("字") == 100_000 and text.count("data: ") == 5
    assert text.endswith('data: {"state": "done"}\n\n')


async def send_pictures(watched, host, openids):  # noqa: F811
    """Let each ask about four large pictures at once."""
    wechat = watched.server.wechat
    for openid in openids:
        await watched.server.ask("/chatgpt", openid)
        for number in range(4):
            await wechat.deliver(wechat.image(openid, host.url(f"large{number}")))
    seen = await asyncio.gather(*(watched.server.ask("看看", who) for who in openids))
    assert all(one.text.startswith("你好！") for one in seen)


async def test_pictures_hold_nobody_up(watch, host):  # noqa: F811
    """Twelve of the largest at once."""
    host.bodies |= {
        f"large{n}": (PNG + bytes(4 * 2**20))[: 4 * 2**20] for n in range(4)
    }
    watched = await watch(wechat=HOSTS)
    gap = await watched.least_gap(
        lambda: send_pictures(watched, host, ["oA", "oB", "oC"])
    )
    print(gap)
    assert gap <= MOST_UNITS
