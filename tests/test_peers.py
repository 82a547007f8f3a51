"""Against real peers: LiteLLM's proxy, and a small model under llama.cpp's server.

Run by `pytest -m peers` alone. The environments of both are made on the first run and
kept; nothing is asked of what a model says or how fast it is.
"""

import json
import re

import pytest

from conftest import ANN, free_port
from peers import KEY, Wiretap, litellm_proxy
from test_owner import bad, run
from test_upstream import BUSY, LABEL, LONG, SETUP

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


# LiteLLM's proxy


async def test_an_answer_comes_through_the_gateway(talk, gateway, database):
    """It is shown in plain text; the gateway's count of tokens is kept and told."""
    server, process = talk
    seen = await server.ask("/chatgpt 你是谁？")
    assert seen.text == PLAIN.replace("*", "") + LABEL and seen.attempt == 1
    [asked] = gateway.requests
    assert asked["model"] == "chatgpt" and asked["stream"] is True
    [(answer, *tokens)] = database("SELECT answer, tokens_in, tokens_out FROM turn")
    assert answer == PLAIN and min(tokens) > 0
    _, told, _ = await run(process.path, "stats", "--json")
    total = json.loads(told)["total"]
    assert [total["tokens_in"], total["tokens_out"]] == tokens


@pytest.mark.parametrize("name", FAILURES)
async def test_a_failure_behind_the_gateway_is_a_sentence(talk, gateway, name):
    """It is asked as often as it may be, and again on a tap; the owner has a line."""
    server, process = talk
    sentence, calls, line = FAILURES[name]
    first = await server.ask(f"/{name} 问")
    assert len(gateway.requests) == calls and first.taps[0].label == "重试"
    again = await server.wechat.tap(ANN, first.taps[0])
    assert len(gateway.requests) == 2 * calls
    for seen in (first, again):
        assert seen.text.startswith(sentence) and seen.text.endswith("重试")
        assert not re.search("(?i)litellm|mock|http", seen.content)
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
    status, out, err = await run(process.path, "check")
    good = re.findall(r"✓ assistant (\w+): \w+, first token after [\d.]+ s\n", out)
    assert good == ["chatgpt", "essay", "window"] and "✓ clock" in out
    assert re.findall(r"✗ assistant (\w+):", out) == [*FAILURES]
    assert len(bad(out)) == len(FAILURES) and status == 1 and err == ""
