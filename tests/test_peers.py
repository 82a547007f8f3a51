"""Against real peers: LiteLLM's proxy, and a small model under llama.cpp's server.

Run by `pytest -m peers` alone. The environments of both are made on the first run and
kept; nothing is asked of what a model says or how fast it is.
"""

import asyncio
import html
import itertools
import json
import re

import pytest

import wxgpt
from conftest import ANN, BOB, TEXTS, blocks_of, free_port, run_command
from peers import KEY, Wiretap, litellm_proxy, small_model
from test_owner import bad
from test_pages import events_of
from test_upstream import BUSY, LABEL, LONG, SETUP
from waiting import limit, within

pytestmark = pytest.mark.peers

STRANGER = "sk-of-nobody"
ATTEMPT = 30  # seconds: the first attempt brings the end
PLAIN = "你好，我是**网关**后面的模型。"
ESSAY = "".join(
    f"第{number}件事：多喝水，早点睡，常走路。\n\n" for number in range(160)
)
WINDOW = 150  # tokens
# What the gateway's models say, and what the gateway knows of them. The names of
# LiteLLM's errors are its own way to script a failure.
MODELS = {
    "chatgpt": (PLAIN, {}),
    "essay": (ESSAY, {}),
    "window": ("记住了。", {"max_input_tokens": WINDOW}),
    "busy": ("litellm.RateLimitError", {}),
    "down": ("litellm.InternalServerError", {}),
    "long": ("litellm.ContextWindowExceededError", {}),
}
# The sentence, the calls, and the line for the owner.
FAILURES = {
    "busy": (BUSY, 3, "warning .* busy: status 429"),
    "down": (BUSY, 3, "warning .* busy: status 500"),
    "long": (LONG, 1, "warning .* long: status 400"),
    "stranger": (SETUP, 1, "error .* setup: status 40[01] "),
    "unknown": (SETUP, 1, "error .* setup: status 40[04] "),
}

QUESTIONS = [
    "What is the capital of France?",
    "What can I eat there?",
    "How do I say thank you?",
]
STORY = "Tell me a long story about a fox."
ENOUGH = 600  # tokens of a story, more than one reply holds
# Asked for in the request itself; llama.cpp's server has min_tokens beside max_tokens.
EXACT = {"max_tokens": 100, "min_tokens": 100}
BRIEF = {"max_tokens": 60}
LENGTHY = {"max_tokens": ENOUGH, "min_tokens": ENOUGH}


@pytest.fixture(scope="session")
def litellm(tmp_path_factory):
    """LiteLLM's proxy, which answers from a script behind its real door."""
    with litellm_proxy(tmp_path_factory.mktemp("litellm"), MODELS) as peer:
        yield peer


@pytest.fixture
async def gateway(litellm):
    """The way to the proxy, on which requests are kept."""
    async with Wiretap(litellm.port) as wiretap:
        yield wiretap


@pytest.fixture
async def talk(spawn, gateway):
    """wxgpt with an assistant for each model, one with a wrong key, one with none."""
    names = [*MODELS, "stranger", "unknown"]
    known = {"base_url": gateway.base_url, "api_key": KEY}
    assistants = {name: known | {"model": name} for name in names}
    assistants["stranger"] |= {"model": "chatgpt", "api_key": STRANGER}
    return await reachable(spawn, wechat=lasting(ATTEMPT), assistants=assistants)


@pytest.fixture(scope="session")
def llama(tmp_path_factory):
    """A model that really writes, under llama.cpp's server."""
    with small_model(tmp_path_factory.mktemp("llama")) as peer:
        yield peer


@pytest.fixture
async def model(llama):
    """The way to the small model, on which requests are kept."""
    async with Wiretap(llama.port) as wiretap:
        yield wiretap


@pytest.fixture
def meet(spawn, model):
    """Start wxgpt before the small model, with attempts of so many seconds."""
    known = {"base_url": model.base_url, "api_key": "any", "model": "smollm2"}
    known |= {"system_prompt": "You are a friendly assistant."}

    async def start(seconds, limits=None, **talkers):
        assistants = {name: known | {"extra": talkers[name]} for name in talkers}
        rest = {"assistants": assistants, "limits": limits or {}}
        return await reachable(spawn, wechat=lasting(seconds), **rest)

    return start


def lasting(seconds):
    """Return settings with attempts of so many seconds, none too many."""
    return {"attempt_timeout": seconds, "mute_guard": 1000}


async def reachable(spawn, **changes):
    """Start wxgpt where its public URL leads, and WeChat with its attempts."""
    port = free_port()
    own = {"server": {"port": port}, "public_url": f"http://127.0.0.1:{port}"}
    server, process = await spawn(**own, **changes)
    server.wechat.attempt_timeout = changes["wechat"]["attempt_timeout"]
    return server, process


async def stored_turns(process, database, count):
    """Wait until so many answers have ended; return what is stored of each."""
    line = -1
    for _ in range(count):
        await process.says(", tokens ", line + 1)
        told = enumerate(process.log)
        line = next(n for n, words in told if n > line and ", tokens " in words)
    return database("SELECT answer, state FROM turn ORDER BY id")


# LiteLLM's proxy


async def test_an_answer_comes_through_the_gateway(talk, gateway, database):
    """It is shown in plain text; the gateway's count of tokens is kept and told."""
    server, process = talk
    seen = await server.ask("/chatgpt 你是谁？")
    assert seen.text == PLAIN.replace("*", "") + LABEL and seen.attempt == 1
    [asked] = gateway.requests
    assert asked["model"] == "chatgpt" and asked["stream"] is True
    assert await stored_turns(process, database, 1) == [(PLAIN, "done")]
    [tokens] = database("SELECT tokens_in, tokens_out FROM turn")
    _, told, _ = await run_command(process.path, "stats", "--json")
    total = json.loads(told)["total"]
    assert (total["tokens_in"], total["tokens_out"]) == tokens and min(tokens) > 0


@pytest.mark.parametrize("name", FAILURES)
async def test_a_failure_behind_the_gateway_is_a_sentence(talk, gateway, name):
    """It is asked as often as it may be, and again on a tap; the owner has a line."""
    server, process = talk
    sentence, calls, line = FAILURES[name]
    first = await server.ask(f"/{name} 问")
    assert len(gateway.requests) == calls and first.taps[0].content.startswith("重试")
    again = await server.wechat.tap(ANN, first.taps[0])
    assert len(gateway.requests) == 2 * calls
    for seen in (first, again):
        assert seen.text.startswith(sentence) and seen.text.endswith(TEXTS.word_retry)
        assert not re.search("(?i)litellm|mock|http", seen.content)
    async with limit(30, "line of the log for each call"):
        while len(re.findall(line, "".join(process.log))) < 2 * calls:
            await asyncio.sleep(0.1)
    log = "".join(process.log)
    assert len(re.findall(line, log)) == 2 * calls
    assert not re.search(f"(?i)litellm|mock|{KEY}|{STRANGER}", log)


async def test_a_context_window_is_kept_to_by_leaving_out(talk, gateway):
    """The gateway counts the tokens and refuses; what is left out is the oldest."""
    server, _ = talk
    questions = [f"第{number}问：" + "记住这句话。" * 3 for number in range(12)]
    await server.ask("/window")
    seen = [await server.ask(question) for question in questions]
    assert [one.text for one in seen] == ["记住了。" + LABEL] * len(questions)
    assert len(questions) < len(gateway.requests) <= 3 * len(questions)
    last = [message["content"] for message in gateway.requests[-1]["messages"]]
    assert last[-1] == questions[-1] and questions[0] not in last


async def test_a_long_answer_of_the_gateway_is_read_in_parts(talk, gateway):
    """Nothing is missing and nothing comes twice; the gateway is asked once."""
    server, _ = talk
    bubbles = await read_on(server, await server.ask("/essay 怎样身体好？"))
    assert len(bubbles) > 3 and all(LABEL in bubble for bubble in bubbles)
    shown = re.findall(r"第(\d+)件事：多喝水，早点睡，常走路。", "".join(bubbles))
    assert [int(number) for number in shown] == [*range(160)]
    assert len(gateway.requests) == 1


async def read_on(server, seen):
    """Tap 继续 until there is no more; return the bubbles."""
    bubbles = [seen.text]
    while seen.taps and seen.taps[0].label.startswith("继续"):
        seen = await server.wechat.tap(ANN, seen.taps[0])
        bubbles.append(seen.text)
    return bubbles


async def test_check_judges_every_model_of_the_gateway(talk):
    """Those that answer are good, after seconds; of the others each has its line."""
    _, process = talk
    status, out, err = await run_command(process.path, "check")
    good = re.findall(r"✓ assistant (\w+): \w+, first word after [\d.]+ s\n", out)
    assert good == ["chatgpt", "essay", "window"] and "✓ clock" in out
    assert re.findall(r"✗ assistant (\w+):", out) == [*FAILURES]
    assert len(bad(out)) == len(FAILURES) and status == 1 and err == ""


# A small model under llama.cpp's server


def letters(text):
    """Return the letters a model wrote, without what wxgpt and Markdown put around."""
    return "".join(re.findall("[A-Za-z]", re.sub("「.*?」|（AI 生成）", "", text)))


async def test_three_questions_to_a_model_are_one_conversation(meet, model, database):
    """Each answer is shown once with its label, and known to the next question."""
    server, process = await meet(ATTEMPT, chatgpt=BRIEF)
    assert "由 AI 生成" in (await server.ask("/chatgpt")).text
    seen = [await server.ask(question) for question in QUESTIONS]
    assert [one.text.count("（AI 生成）") for one in seen] == [1, 1, 1]
    stored = [answer for answer, _ in await stored_turns(process, database, 3)]
    assert all(map(letters, stored))
    assert [letters(one.text) for one in seen] == [*map(letters, stored)]
    said = [*itertools.chain(*zip(QUESTIONS, stored))]
    for number, asked in enumerate(model.requests):
        heard = [message["content"] for message in asked["messages"]]
        assert heard == ["You are a friendly assistant.", *said[: 2 * number + 1]]
    assert len(model.requests) == 3


async def test_a_story_is_read_on_while_the_model_writes(meet, model, database):
    """Longer than a reply and than three attempts: 继续 brings all of it, once."""
    server, process = await meet(0.4, chatgpt=LENGTHY)
    seen = await server.ask(f"/chatgpt {STORY}")
    assert seen.taps[0].label.startswith("继续")
    bubbles = await read_on(server, seen)
    [(answer, state)] = await stored_turns(process, database, 1)
    assert state in ("done", "cut") and len(answer) > ENOUGH
    assert letters("".join(bubbles)) == letters(answer)
    assert len(bubbles) > 1 and len(model.requests) == 1


async def test_a_story_is_seen_on_its_page_as_it_is_written(meet, model, database):
    """The page's events are the answer, block by block, and end with its state."""
    server, process = await meet(0.3, chatgpt=LENGTHY)
    [(_, link)] = (await server.ask(f"/chatgpt {STORY}")).links
    async with server.open(f"{link}/events") as response:
        *pieces, (name, _, end) = await events_of(response)
    [(answer, state)] = await stored_turns(process, database, 1)
    assert name == "done" and end == {"state": state} and state in ("done", "cut")
    seen = blocks_of(data for _, _, data in pieces)
    renderer = wxgpt.BlockRenderer(wxgpt.read_texts({}), wxgpt.BlockedWords(""))
    assert seen == "".join(renderer.render(answer, has_ended=True))
    assert len(pieces) > 1 and len(model.requests) == 1


async def test_a_chat_with_a_model_is_in_the_history(meet, database):
    """The page shows every question and answer; after /stop nobody answers."""
    server, process = await meet(ATTEMPT, chatgpt=BRIEF)
    for question in QUESTIONS[:2]:
        await server.ask(f"/chatgpt {question}")
    [(_, link)] = (await server.ask("/history")).links
    status, page = await server.get(link)
    shown = letters(html.unescape(re.sub("<[^>]*>", "", page)))
    answers = [answer for answer, _ in await stored_turns(process, database, 2)]
    missing = [t for t in (*QUESTIONS[:2], *answers) if letters(t) not in shown]
    assert status == 200 and missing == []
    assert "结束" in (await server.ask("/stop")).text
    assert (await server.ask("Are you there?")).text is None


@pytest.mark.parametrize("at_once", [1, 2])
async def test_no_half_of_an_answer_passes_for_the_whole(meet, database, at_once):
    """The server breaks an answer off for the next question, unless that waits.

    It names no reason then: only where a sentence has just ended can that be taken for
    the end of the answer.
    """
    server, process = await meet(ATTEMPT, limits={"at_once": at_once}, chatgpt=EXACT)
    asking = [server.ask(f"/chatgpt {STORY}", who) for who in (ANN, BOB)]
    seen = await within(100, "answers to both", asyncio.gather(*asking))
    turns = await stored_turns(process, database, 2)
    cut = sorted(letters(answer) for answer, state in turns if state == "cut")
    told = sorted(letters(one.text) for one in seen if "接着说" in one.text)
    assert len(cut) == len(told) >= 2 // at_once
    for answer, state in turns:
        is_whole = at_once == 2 and re.search(r"[.!?][\"'*)]*$", answer.rstrip())
        assert letters(answer) and (state == "cut" or is_whole)


async def test_check_asks_the_model(meet, model):
    """It says after how many seconds the first word came."""
    _, process = await meet(ATTEMPT, chatgpt=BRIEF)
    _, out, err = await run_command(process.path, "check")
    assert re.search(r"✓ assistant chatgpt: smollm2, first word after [\d.]+ s\n", out)
    assert "✓ verification with a right" in out and "✓ live pages" in out
    assert bad(out) == [] and err == "" and len(model.requests) == 1
