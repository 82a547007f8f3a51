"""Whatever the chat API does: a plain sentence, a clean log line, and no hammering.

The table of the stack notes, section 1. What a body means is asked of `make_error` and
`Completion`; some of each table go through WeChat's door, from the fake by script. What
no HTTP library would send comes from a wire of raw bytes.
"""

import asyncio
import contextlib
import dataclasses
import email.utils
import gzip
import json
import pathlib
import re
import time
import zlib

import pytest
from multidict import CIMultiDict

import wxgpt
from conftest import ANN, BOB, TEXTS, UNIT, said, shown, with_session
from fake_openai import Script
from waiting import within

LABEL = "\n（AI 生成）"
QUESTION = "我的秘密是什么"
KEY = "sk-verySecret"
# An upstream may quote what it was sent, and what it is made of.
QUOTE = f"internal-words {KEY} {QUESTION}"
PATIENCE = 30.0  # seconds an attempt lasts here: the first one brings the end
# The beginnings of the sentences, and the kinds that choose them.
SETUP, REFUSED, LONG = map(said, ("failed_setup", "failed_refused", "failed_long"))
BUSY, BROKEN, SLOW = map(said, ("failed_busy", "failed_broken", "failed_slow"))
UNREACHABLE, BLIND = map(said, ("failed_unreachable", "failed_blind"))
KIND = {SETUP: "setup", REFUSED: "refused", LONG: "long", BUSY: "busy"}
CALLS = 3  # to the upstream for one question, at most


async def talking(serve, **changes):
    """Start wxgpt with attempts that last, and open a session of Ann's."""
    wechat = {"attempt_timeout": PATIENCE} | changes.pop("wechat", {})
    return await with_session(serve, wechat=wechat, **changes)


@pytest.fixture
def changes():
    """The server has all the time to answer."""
    return {"wechat": {"attempt_timeout": PATIENCE}}


def refusal(status, body=None, **headers):
    """Script an error with a body of any shape; headers with _ for -."""
    named = {name.replace("_", "-"): str(value) for name, value in headers.items()}
    return Script(status=status, body=body or error(), headers=named)


def error(message="", **fields):
    """Word an error as OpenAI does, quoting what should never be passed on."""
    known = {"type": "invalid_request_error", "param": None, "code": None}
    return {"error": {"message": f"{message} {QUOTE}"} | known | fields}


def error_in(script):
    """Return what wxgpt makes of a scripted refusal."""
    headers = CIMultiDict(script.headers)
    return wxgpt.make_error(script.status, script.body, headers)


def read(script):
    """Return what wxgpt makes of a scripted event stream, and the text in it."""
    completion = wxgpt.Completion("some-model")
    return completion, completion.feed(script.body.encode())


def quoted(line):
    """Return what a line repeats of the upstream's words or the subscriber's."""
    return [
        word for word in ("internal-words", KEY, "秘密", "写了一半") if word in line
    ]


def told(caplog):
    """Return what the owner is told: the lines from warning up, with their level."""
    records = [r for r in caplog.records if r.name == "wxgpt" and r.levelname != "INFO"]
    return [f"{record.levelname} {record.getMessage()}" for record in records]


def assert_discreet(seen, caplog, *more):
    """Check that neither the subscriber nor the owner reads what is not theirs."""
    private = ["internal-words", KEY, "秘密", *more]
    lines = "\n".join(r.getMessage() for r in caplog.records if r.name == "wxgpt")
    assert [
        word for word in private if word in seen.content.replace(QUESTION, "")
    ] == []
    assert [word for word in private if word in lines] == []
    assert not any(r.exc_info for r in caplog.records)
    assert not seen.faulty and "http" not in seen.text and "127.0.0.1" not in seen.text


# What will not pass: told at once, after one call

FINAL = {
    "401": (refusal(401, error(code="invalid_api_key")), SETUP, "code=invalid_api_key"),
    "401 text": (refusal(401, {"error": QUOTE}), SETUP, "status 401"),
    "401 detail": (refusal(401, {"detail": QUOTE}), SETUP, "status 401"),
    "401 message": (refusal(401, {"message": QUOTE, "code": 401}), SETUP, "code=401"),
    "401 HTML": (refusal(401, f"<p>{QUOTE}</p>"), SETUP, "status 401"),
    "401 empty": (refusal(401, " "), SETUP, "status 401"),
    "401 list": (refusal(401, [QUOTE]), SETUP, "status 401"),
    "402": (refusal(402, error("Insufficient Balance")), SETUP, "status 402"),
    "403": (
        refusal(403, error(code="unsupported_country")),
        SETUP,
        "unsupported_country",
    ),
    "404": (refusal(404, error(code="model_not_found")), SETUP, "model_not_found"),
    "404 HTML": (refusal(404, f"<h1>Not Found</h1>{QUOTE}"), SETUP, "status 404"),
    "400": (refusal(400, error()), SETUP, "status 400"),
    "400 case": (refusal(400, error("Names are case-sensitive")), SETUP, "status 400"),
    "422": (refusal(422, {"detail": [{"loc": ["body"], "msg": QUOTE}]}), SETUP, "422"),
    "302": (refusal(302, "moved", Location="http://127.0.0.1:1/"), SETUP, "status 302"),
    "quota": (
        refusal(429, error(type="insufficient_quota")),
        SETUP,
        "insufficient_quota",
    ),
    "credit": (
        refusal(429, error(code="credit_balance_exhausted")),
        SETUP,
        "credit_balance",
    ),
    "spend limit": (
        refusal(429, error(code="project_spend_limit_exceeded")),
        SETUP,
        "spend_limit",
    ),
    "usage limit": (
        refusal(429, error(code="organization_usage_limit_exceeded")),
        SETUP,
        "usage_limit",
    ),
    "GLM no money": (refusal(429, error("余额不足", code="1113")), SETUP, "code=1113"),
    "Qwen no money": (refusal(400, error(code="Arrearage")), SETUP, "code=Arrearage"),
    "one-api": (
        refusal(503, error("当前分组下对于模型 x 无可用渠道")),
        SETUP,
        "status 503",
    ),
    "policy": (refusal(400, error(code="content_policy_violation")), REFUSED, "policy"),
    "Azure filter": (
        refusal(400, error(code="content_filter")),
        REFUSED,
        "content_filter",
    ),
    "Qwen filter": (
        refusal(400, error(code="data_inspection_failed")),
        REFUSED,
        "data_inspection",
    ),
    "Kimi filter": (
        refusal(400, error(type="content_filter")),
        REFUSED,
        "content_filter",
    ),
    "GLM filter": (refusal(400, error(code="1301")), REFUSED, "code=1301"),
    "GLM filter, a number": (refusal(400, error(code=1301)), REFUSED, "code=1301"),
    "new-api filter": (
        refusal(500, error(code="sensitive_words_detected")),
        REFUSED,
        "sensitive_words",
    ),
    "OpenAI long": (
        refusal(400, error(code="context_length_exceeded")),
        LONG,
        "context",
    ),
    "Kimi long": (
        refusal(400, error("Your request exceeded model token limit: 8192")),
        LONG,
        "long:",
    ),
    "GLM long": (refusal(400, error("Prompt 超长", code="1261")), LONG, "code=1261"),
    "LiteLLM long": (
        refusal(400, error("litellm.ContextWindowExceededError: x")),
        LONG,
        "long:",
    ),
    "vLLM long": (
        refusal(400, {"object": "error", "message": "maximum context length is 4096"}),
        LONG,
        "long:",
    ),
    "wait too long": (refusal(429, error(), Retry_After=121), BUSY, "status 429"),
    "wait too long, ms": (refusal(429, error(), retry_after_ms=121000), BUSY, "429"),
    "wait till morning": (
        refusal(429, error(), Retry_After=email.utils.formatdate(time.time() + 9e4)),
        BUSY,
        "status 429",
    ),
    "wait for ever": (refusal(503, error(), Retry_After="inf"), BUSY, "status 503"),
    "503 told not to": (refusal(503, error(), x_should_retry="false"), BUSY, "503"),
    "filtered at the end": (
        Script("写了一半", finish="content_filter"),
        REFUSED,
        "content_filter",
    ),
    "GLM withdraws": (Script("写了一半", finish="sensitive"), REFUSED, "sensitive"),
    "filtered, unstreamed": (
        Script("写了一半", finish="content_filter", streamed=False),
        REFUSED,
        "filter",
    ),
    "no money in a 200": (
        Script(body=error(code=402, type="billing")),
        SETUP,
        "code=402",
    ),
}


REFUSALS = [name for name, (script, *_) in FINAL.items() if script.status != 200]


@pytest.mark.parametrize("name", REFUSALS)
def test_what_will_not_pass_is_known_by_its_status_and_words(name):
    """The right kind, no second call, and a cause for the log that quotes nobody."""
    script, sentence, cause = FINAL[name]
    error = error_in(script)
    assert (error.kind, error.is_retryable) == (KIND[sentence], False)
    assert cause in str(error) and quoted(str(error)) == []


# One of each kind, and what is more than a status and a body.
AT_THE_DOOR = ["401 HTML", "policy", "OpenAI long", "wait too long", "302"]
AT_THE_DOOR += [name for name in FINAL if name not in REFUSALS]


@pytest.mark.parametrize("name", AT_THE_DOOR)
async def test_what_will_not_pass_is_told_at_once(server, upstream, caplog, name):
    """One call, the right sentence, and a log line that names the cause alone."""
    script, sentence, cause = FINAL[name]
    upstream.will(script)
    seen = await server.ask(QUESTION)
    assert seen.text.startswith(sentence) and "写了一半" not in seen.text
    assert len(upstream.requests) == 1
    assert_discreet(seen, caplog, "写了一半")
    [line] = told(caplog)
    assert cause in line and "failed" in line
    assert line.startswith("ERROR" if sentence == SETUP else "WARNING")


async def test_the_request_id_of_a_failure_is_logged(server, upstream, caplog):
    """It is what a provider's support asks for."""
    upstream.will(refusal(401, x_request_id="req_7f3a"))
    await server.ask(QUESTION)
    assert "req_7f3a" in told(caplog)[0]


# The fields of an error

# A refusal, and the status and code of its error.
FIELDS = {
    "a code": (refusal(401, error(code="invalid_api_key")), 401, "invalid_api_key"),
    "a type": (refusal(429, error(type="slow_down")), 429, "slow_down"),
    "a code before a type": (
        refusal(429, error(type="insufficient_quota", code="credit_exhausted")),
        429,
        "credit_exhausted",
    ),
    "a number": (refusal(400, error(code=1261)), 400, "1261"),
    "the status again": (refusal(429, error(type="quota", code="429")), 429, "quota"),
    "an error in a 200": (Script(body=error(type="billing", code=402)), 402, "billing"),
    "a sentence": (refusal(400, {"error": {"code": QUOTE}}), 400, ""),
    "a page": (refusal(502, f"<h1>{QUOTE}</h1>"), 502, ""),
    "a list": (refusal(500, [QUOTE]), 500, ""),
}


@pytest.mark.parametrize("name", FIELDS)
def test_an_error_has_its_status_and_code(name):
    """Whatever the body is; a type stands in for a code that says nothing."""
    script, status, code = FIELDS[name]
    error = error_in(script)
    assert (error.status, error.code) == (status, code)
    assert str(error).startswith(f"{error.kind}: status {status} ")


def test_the_words_of_a_provider_are_kept_apart_from_the_log_line():
    """`check` shows them to the owner."""
    error = error_in(refusal(401, {"error": {"message": QUOTE}}))
    assert error.words == QUOTE
    assert quoted(str(error)) == [] and quoted(repr(error)) == []


@pytest.mark.parametrize(
    ("headers", "wait"),
    [
        ({}, (True, None)),
        ({"Retry_After": "0"}, (True, None)),
        ({"Retry_After": "7"}, (True, 7.0)),
        ({"Retry_After": "120"}, (True, 120.0)),
        ({"Retry_After": "121"}, (False, None)),
        ({"Retry_After": "121", "x_should_retry": "true"}, (True, None)),
        ({"Retry_After": "7", "x_should_retry": "false"}, (False, 7.0)),
    ],
    ids=str,
)
def test_an_error_says_whether_and_when_to_ask_again(headers, wait):
    """Whether that may help is one thing, how long to wait first another."""
    error = error_in(refusal(503, **headers))
    assert (error.is_retryable, error.retry_in) == wait


@pytest.mark.parametrize(
    ("message", "wait"),
    [
        ("Please try again in 1.2s.", 1.2),
        ("Please retry after 6 seconds.", 6.0),
        ("please try again after 250ms", 0.25),
        ("Please wait 2 minutes before retrying", 120.0),
        ("try again later", None),
    ],
)
def test_a_message_may_say_how_long_to_wait(message, wait):
    """Where no header does; a header counts more."""
    body = {"error": {"message": message}}
    assert error_in(refusal(429, body)).retry_in == wait
    assert error_in(refusal(429, body, Retry_After="3")).retry_in == 3.0


# What `extra` adds to a request, and the words of a refusal with the field it means.
EXTRA = {
    "top_p": 0.5,
    "thinking": {"type": "disabled"},
    "extra_body": {"google": {"budget_tokens": 0}},
}
PYDANTIC = {
    "type": "extra_forbidden",
    "loc": ["body", "stream_options", "include_usage"],
}
LITERAL = {"loc": ["body", "top_p"], "msg": "Input should be less than 1"}
REFUSALS_OF_A_FIELD = {
    "a parameter": (error(param="top_p", code="unsupported_parameter"), "top_p"),
    "its inside": (error(param="thinking.type", code="unknown"), "thinking"),
    "a name in the message": (
        error("Unrecognized argument: stream_options"),
        "stream_options",
    ),
    "in one word": (error("does not support parameter topP."), "top_p"),
    "in capitals": (error("TOP_P is out of range"), "top_p"),
    "the first of several": (error("Unknown top_p; known: thinking"), "top_p"),
    "FastAPI": ({"detail": [PYDANTIC]}, "stream_options"),
    "Mistral": ({"object": "error", "message": {"detail": [LITERAL]}}, "top_p"),
    "Gemini": ([error('Unknown name "thinking": Cannot find field.')], "thinking"),
    "deep inside": (error("budgetTokens is not known"), "extra_body"),
    "a code": (error(code="NotSupportThinking.top_p"), "top_p"),
    "thinking": (error("This model is always reasoning"), "thinking"),
    "思考": (error("该模型始终思考，不支持关闭", code="1210"), "thinking"),
    "none": (error("Something is odd"), ""),
    "a part of a word": (error("stopped at top_position"), ""),
    "what must stay": (error("Unknown model", param="messages"), ""),
}


@pytest.mark.parametrize("name", REFUSALS_OF_A_FIELD)
def test_a_refused_field_is_found_by_its_name(name):
    """In any wording and case; what turns thinking off also by a word about it."""
    body, field = REFUSALS_OF_A_FIELD[name]
    one = wxgpt.AssistantSettings(api_key="x", model="m", extra=EXTRA)
    client = wxgpt.ChatClient(one, None)
    error, sent = error_in(refusal(400, body)), client.options
    assert client.leave_out(error, sent) == field
    assert set(sent) - set(client.options) == ({field} if field else set())


REFUSED_FIELD = refusal(400, error(param="top_p", code="unsupported_value"))


@pytest.mark.parametrize("script", [REFUSED_FIELD, refusal(503)], ids=["field", "503"])
def test_no_field_of_an_error_can_be_set(script):
    """But contextlib and others may say where it was raised, and why."""
    error = error_in(script)
    for name in (field.name for field in dataclasses.fields(error)):
        with pytest.raises(AttributeError, match=f"{name} of an error"):
            setattr(error, name, getattr(error, name))
    error.__cause__, error.__traceback__ = OSError("why"), None


# What may pass: asked again, and the second answer is the answer


def sse(*payloads):
    """Return an event stream of these payloads."""
    made = (p if isinstance(p, str) else json.dumps(p) for p in payloads)
    return "".join(f"data: {payload}\n\n" for payload in made)


def in_stream(payload):
    """Script an event inside a 200, after some text."""
    begun = {"choices": [{"delta": {"content": "写了一半"}}]}
    headers = {"Content-Type": "text/event-stream"}
    return Script(body=sse(begun, payload, "[DONE]"), headers=headers)


SOON = {"retry_after_ms": "20"}  # the usual pauses are met below
PASSING = {
    "408": refusal(408, **SOON),
    "409": refusal(409, **SOON),
    "429": refusal(429, **SOON),
    "429 as text": refusal(429, error(code="429", type="throttling_error"), **SOON),
    "429 with a wait": refusal(429, error(), Retry_After="0.2"),
    "429 with milliseconds": refusal(
        429, error(), retry_after_ms="50", Retry_After="90"
    ),
    "500 text": refusal(500, {"error": QUOTE}, **SOON),
    "500 detail": refusal(500, {"detail": QUOTE}, **SOON),
    "500 message": refusal(500, {"message": QUOTE}, **SOON),
    "500 number": refusal(500, {"error": {"code": 500, "message": QUOTE}}, **SOON),
    "500 plain": refusal(500, QUOTE, Content_Type="text/plain", **SOON),
    "500 nothing": refusal(500, {"error": {}}, **SOON),
    "502 of a load balancer": refusal(502, f"<h1>Load balancer</h1>{QUOTE}", **SOON),
    "504": refusal(504, "<html>504 Gateway Time-out</html>", **SOON),
    "529": refusal(529, error(type="overloaded_error"), **SOON),
    "400 told to": refusal(400, error(), x_should_retry="true", **SOON),
    "vLLM in a 200": Script(body={"object": "error", "message": QUOTE, "code": 500}),
    "vLLM in a stream": in_stream({"object": "error", "message": QUOTE}),
    "OpenRouter in a stream": in_stream({"error": {"code": 502, "message": QUOTE}}),
    "a word in a stream": in_stream({"error": QUOTE}),
    "a list in a stream": in_stream([QUOTE]),
    "half an event": in_stream('{"choices": [{"del'),
    "a deep event": in_stream("[" * 100_000),
    "a deep body": Script(
        body="[" * 100_000, headers={"Content-Type": "application/json"}
    ),
    "null": Script(body="null", headers={"Content-Type": "application/json"}),
    "no choices": Script(body={"choices": []}),
}


STREAMS = ["vLLM in a stream", "OpenRouter in a stream", "a word in a stream"]
STREAMS += ["a list in a stream", "half an event", "a deep event"]


@pytest.mark.parametrize("name", [n for n in PASSING if PASSING[n].status != 200])
def test_what_may_pass_is_known_by_its_status_and_headers(name):
    """It is worth a second call, and the wait is what the upstream says."""
    error = error_in(PASSING[name])
    assert error.is_retryable and error.kind == ("setup" if "400" in name else "busy")
    assert error.retry_in in (0.02, 0.05, 0.2) and quoted(str(error)) == []


@pytest.mark.parametrize("name", STREAMS)
def test_an_error_in_a_stream_is_worth_a_second_call(name):
    """The text before it is there, no end is, and the log quotes nobody."""
    completion, text = read(PASSING[name])
    assert (text, completion.reason) == ("写了一半", "")
    assert completion.error.is_retryable and quoted(str(completion.error)) == []


# A status, a wait, an error in a stream, and what is no stream at all.
AGAIN_AT_THE_DOOR = ["502 of a load balancer", "429 with milliseconds", STREAMS[0]]
AGAIN_AT_THE_DOOR += ["vLLM in a 200", "a deep body", "null", "no choices"]


@pytest.mark.parametrize("name", AGAIN_AT_THE_DOOR)
async def test_what_may_pass_is_asked_again(server, upstream, caplog, name):
    """The second answer comes without a trace of the first, which is logged."""
    upstream.will(PASSING[name], "这次好了。")
    seen = await server.ask(QUESTION)
    assert seen.text == "这次好了。" + LABEL
    assert len(upstream.requests) == 2
    assert_discreet(seen, caplog, "写了一半")
    [line] = told(caplog)
    assert line.startswith("WARNING") and "asked again after" in line


LASTING = {
    "529": (refusal(529, "<html>overloaded</html>"), BUSY),
    "429 in a 200": (Script(body=error(code=429)), BUSY),
    "hang before the headers": (Script(ending="hang", headless=True), SLOW),
    "hang in mid-stream": (Script("写了一半", ending="hang"), "写了一半" + LABEL),
}


@pytest.mark.parametrize("name", LASTING)
async def test_what_lasts_is_given_up_after_three_calls(serve, upstream, caplog, name):
    """No hammering: two pauses, each longer than the one before, then a sentence."""
    limits = {"first_token_timeout": UNIT / 2, "idle_timeout": UNIT / 2}
    server = await talking(serve, assistants={"chatgpt": limits})
    script, sentence = LASTING[name]
    upstream.will(*[script] * 9)
    seen = await server.ask(QUESTION)
    assert seen.text.startswith(sentence) and [t.label for t in seen.taps] == [
        TEXTS.word_retry
    ]
    assert_discreet(seen, caplog)
    asked = upstream.requests
    assert len(asked) == CALLS
    pauses = [b.started - a.started for a, b in zip(asked, asked[1:])]
    assert pauses[0] > 0.37 and pauses[1] > 0.74
    assert ["again" in line for line in told(caplog)] == [True, True, False]


async def test_an_unreachable_upstream_is_tried_three_times(serve, caplog):
    """Nobody listens: the owner reads where, the subscriber does not."""
    address = {"base_url": "http://127.0.0.1:9/v1"}
    server = await talking(serve, assistants={"chatgpt": address})
    seen = await server.ask(QUESTION)
    assert seen.text.startswith(UNREACHABLE)
    assert_discreet(seen, caplog)
    assert len(told(caplog)) == CALLS and "127.0.0.1:9" in told(caplog)[-1]


# Retry-After

WAITS = {
    "seconds": ({"Retry-After": "1"}, 0.99),
    "milliseconds": ({"retry-after-ms": "1200"}, 1.19),
    "milliseconds first": ({"retry-after-ms": "900", "Retry-After": "30"}, 0.89),
    "a date": ({"Retry-After": 3}, 1.0),
    "bad milliseconds": ({"retry-after-ms": "soon", "Retry-After": "1"}, 0.99),
    "zero": ({"Retry-After": "0"}, 0.37),
    "negative": ({"Retry-After": "-5"}, 0.37),
    "no number": ({"Retry-After": "nan"}, 0.37),
    "no date": ({"Retry-After": "Fri, 31 Dec 99999999999 23:59:59 GMT"}, 0.37),
    "a date gone by": ({"Retry-After": "Thu, 01 Jan 1970 00:00:00 GMT"}, 0.37),
    "too long, but told to": ({"Retry-After": "999", "x-should-retry": "true"}, 0.37),
}


async def test_the_upstream_says_how_long_to_wait(server, upstream):
    """It is asked no earlier; what makes no sense counts as nothing said."""
    in_three = email.utils.formatdate(time.time() + 3, usegmt=True)
    for name, (headers, _) in WAITS.items():
        named = {
            key: in_three if value == 3 else value for key, value in headers.items()
        }
        upstream.will(
            Script(status=429, headers=named), "这次好了。", when=f"（{name}）"
        )
    await asyncio.gather(
        *(server.bot.store.note(f"o{name}", told_at=time.time()) for name in WAITS)
    )
    asking = (server.ask(f"/chatgpt 问（{name}）", f"o{name}") for name in WAITS)
    seen = await within(60, "answers to all", asyncio.gather(*asking))
    assert {one.text for one in seen} == {"这次好了。" + LABEL}
    calls = {name: upstream.asked(f"（{name}）") for name in WAITS}
    pauses = {
        name: second.started - first.started for name, (first, second) in calls.items()
    }
    assert [name for name, (_, least) in WAITS.items() if pauses[name] < least] == []


# Refused parameters


def unsupported(param, code="unsupported_parameter"):
    """Script OpenAI's refusal of one field of the request."""
    return refusal(400, error(f"Unsupported: {param}", param=param, code=code))


PARAMETERS = {
    "extra": ("top_p", "unsupported_parameter", "top_p"),
    "its value": ("top_p", "unsupported_value", "top_p"),
    "unknown": ("thinking", "unknown_parameter", "thinking"),
    "inside": ("thinking.type", "unknown_parameter", "thinking"),
    "stream options": ("stream_options", "unknown_parameter", "stream_options"),
    "inside those": (
        "stream_options.include_usage",
        "unsupported_value",
        "stream_options",
    ),
    "thinking": ("reasoning_effort", "unsupported_value", "reasoning_effort"),
}


@pytest.mark.parametrize("name", PARAMETERS)
async def test_a_refused_parameter_is_left_out_from_then_on(
    serve, upstream, caplog, name
):
    """Asked once more without it, logged once, and never sent again."""
    param, code, key = PARAMETERS[name]
    extra = {"top_p": 0.5, "thinking": {"type": "disabled"}}
    server = await talking(serve, assistants={"chatgpt": {"extra": extra}})
    upstream.will(unsupported(param, code), "这次好了。", "又好了。")
    assert (await server.ask("甲问")).text == "这次好了。" + LABEL
    assert (await server.ask("乙问")).text == "又好了。" + LABEL
    assert [key in asked.body for asked in upstream.requests] == [True, False, False]
    others = {"top_p", "thinking", "stream_options", "reasoning_effort"} - {key}
    assert all(others <= set(asked.body) for asked in upstream.requests)
    assert len([line for line in told(caplog) if f"refuses {key}" in line]) == 1


async def test_two_questions_may_meet_the_same_refusal(server, upstream, caplog):
    """Both were asked before the refusal came; both are asked again without it."""
    await server.ask("/chatgpt", BOB)
    gate = asyncio.Event()
    body = error(param="reasoning_effort", code="unsupported_value")
    upstream.will(*[Script([gate], status=400, body=body)] * 2)
    asking = [asyncio.create_task(server.ask("问", who)) for who in (ANN, BOB)]
    await upstream.arrival(count=2)
    gate.set()
    for one in asking:
        assert (await one).text.startswith("你好！")
    assert len(upstream.requests) == 4
    assert len([line for line in told(caplog) if "refuses" in line]) == 1


async def test_a_refused_parameter_that_must_stay_is_told(server, upstream):
    """Without it there is no request: one call, and the owner's matter."""
    params = ["model", "messages", "stream", "odd", "", None, 7]
    upstream.will(*map(unsupported, params))
    for calls, param in enumerate(params, 1):
        assert (param, (await server.ask(QUESTION)).text[: len(SETUP)]) == (
            param,
            SETUP,
        )
        assert len(upstream.requests) == calls


async def test_a_parameter_refused_again_and_again_is_no_loop(serve, upstream):
    """An upstream that refuses what was not sent is asked no more than twice."""
    server = await talking(serve)
    upstream.will(*[unsupported("reasoning_effort")] * 9)
    assert (await server.ask(QUESTION)).text.startswith(SETUP)
    assert len(upstream.requests) == 2
    assert (await server.ask("再问")).text.startswith(SETUP)
    assert len(upstream.requests) == 3


async def test_all_optional_fields_may_be_refused_in_turn(serve, upstream, caplog):
    """The first question learns it without a pause, the second one need not."""
    extra = {"top_p": 0.5, "thinking": {"type": "disabled"}}
    server = await talking(serve, assistants={"chatgpt": {"extra": extra}})
    fields = ("top_p", "thinking", "stream_options", "reasoning_effort")
    upstream.will(*map(unsupported, fields), "这次好了。")
    began = time.monotonic()
    assert (await server.ask("甲问")).text == "这次好了。" + LABEL
    assert time.monotonic() - began < 0.37  # the first pause of an asking again
    await server.ask("乙问")
    assert len(upstream.requests) == len(fields) + 2
    assert not set(fields) & set(upstream.requests[-1].body)
    assert len(told(caplog)) == len(fields)


@pytest.mark.parametrize(
    ("status", "code"), [(200, 400), (200, "unknown"), (500, None)], ids=str
)
async def test_a_field_may_be_refused_with_any_status(server, upstream, status, code):
    """Asked again at once without it."""
    refused = error("Unknown field stream_options", code=code)
    upstream.will(Script(status=status, body=refused), "这次好了。")
    assert (await server.ask(QUESTION)).text == "这次好了。" + LABEL
    assert "stream_options" not in upstream.requests[1].body


# What the owner must mend

MEND = {
    "key": (refusal(401, error("Incorrect API key provided")), "api_key"),
    "money": (refusal(402, error("Insufficient Balance")), "api_key"),
    "model": (refusal(404, error("The model x does not exist")), "model"),
    "address": (refusal(404, "<h1>Not Found</h1>"), "base_url"),
    "web page": (Script(body="<!doctype html>"), "base_url"),
    "field": (refusal(400, error("Something is odd")), "extra"),
    "country": (refusal(403, error("Country not supported")), "proxy"),
}


@pytest.mark.parametrize("name", MEND)
async def test_the_owner_reads_which_setting_to_look_at(server, upstream, caplog, name):
    """And the command that says more; after one call, and without a quotation."""
    script, setting = MEND[name]
    upstream.will(script)
    seen = await server.ask(QUESTION)
    assert seen.text.startswith(SETUP) and len(upstream.requests) == 1
    [line] = told(caplog)
    assert f"look at assistants.chatgpt.{setting}, " in line and "check" in line
    assert_discreet(seen, caplog)


# What an error means: a body, its status, and the kind

SAID = {
    "OpenAI prompt": ("your prompt was flagged as potentially", "refused"),
    "DeepSeek": ("Content Exists Risk", "refused"),
    "xAI": ("Content violates usage guidelines", "refused"),
    "GLM": ("系统检测到输入可能包含不安全或敏感内容", "refused"),
    "Spark": ("输入内容审核不通过，涉嫌违规", "refused"),
    "Doubao money": ("your account has an overdue balance", "setup"),
    "Kimi money": ("Your account org-x is suspended, please check", "setup"),
    "xAI money": ("Your team has used all available credits", "setup"),
    "one-api money": ("该令牌额度已用尽", "setup"),
    "GLM plan": ("您的套餐已到期", "setup"),
    "locked": ("账户因违规行为已被锁定", "setup"),
    "rate": ("Rate limit reached for requests", "busy"),
    "GLM rate": ("您的账户已达到速率限制", "busy"),
    "Kimi": ("The engine is currently overloaded", "busy"),
    "one-api": ("当前分组上游负载已饱和", "busy"),
    "Gemini long": ("The input token count (9) exceeds the maximum number", "long"),
    "Qwen long": ("Range of input length should be [1, 983616]", "long"),
    "xAI long": ("This model's maximum prompt length is 131072", "long"),
    "Anthropic long": ("prompt is too long: 9 tokens > 8 maximum", "long"),
    "llama.cpp long": ("request (9 tokens) exceeds the available context", "long"),
    "SiliconFlow long": (
        "length of prompt_tokens must be less than max_seq_len",
        "long",
    ),
    "Mistral long": ("Prompt contains 9 tokens, too large for model x", "long"),
    "Groq long": ("Request too large for model on tokens per minute (TPM)", "long"),
    "Doubao long": ("Total tokens of image and text exceed max tokens", "long"),
    "Qwen free": ("The free tier of the model has been exhausted", "setup"),
    "OpenRouter": ("x is not a valid model ID", "setup"),
    "GLM long": ("输入超过了模型的上下文长度", "long"),
    "gone": ("The model `x-vision` has been decommissioned", "setup"),
    "VLM": ("The model is not a VLM. Please use text-only prompts.", "blind"),
    "无视觉": ("该模型不支持图片输入", "blind"),
}


@pytest.mark.parametrize("status", [400, 429])
@pytest.mark.parametrize("name", SAID)
def test_an_error_is_known_by_its_words(name, status):
    """Whatever the status: providers do not agree on that."""
    message, kind = SAID[name]
    assert error_in(refusal(status, {"error": {"message": message}})).kind == kind


@pytest.mark.parametrize(("status", "kind"), [(413, "long"), (451, "refused")])
def test_an_error_may_be_known_by_its_status(status, kind):
    """Whatever it says."""
    assert error_in(refusal(status)).kind == kind


def test_a_limit_of_a_day_is_not_tried_again():
    """It will not pass while somebody waits."""
    error = error_in(refusal(429, {"error": "Rate limit exceeded: 50 per day"}))
    assert (error.kind, error.is_retryable) == ("busy", False)


def test_a_quota_of_dashscope_is_one_of_the_minute():
    """It says so in OpenAI's words for a lack of money."""
    error, asked = error_in(FINAL["quota"][0]), [{"role": "user", "content": "问"}]
    kinds = []
    for path in ("/v1", "/compatible-mode/v1"):
        base_url = f"https://api.example{path}"
        one = wxgpt.AssistantSettings(api_key="x", base_url=base_url)
        found = wxgpt.ChatClient(one, None).explain(error, asked)
        kinds.append((found.kind, found.is_retryable))
    assert kinds == [("setup", False), ("busy", True)]


async def test_only_who_sent_a_picture_is_told_that_it_is_not_seen(server, upstream):
    """A provider may say so about a text; that is the owner's matter."""
    upstream.will(refusal(400, error(SAID["VLM"][0])))
    assert (await server.ask(QUESTION)).text.startswith(SETUP)
    assert len(upstream.requests) == 1


# An end without a reason

CUT = "\n\n" + shown("cut_short", tap="接着说")
UNNAMED: dict[str, None] = {}
NAMED = {"finish_reason": None}


@pytest.mark.parametrize(
    "choice, text, note",
    [(UNNAMED, "写到这里", ""), (NAMED, "写到这里。", ""), (NAMED, "写到这里", CUT)],
)
async def test_an_answer_broken_off_with_done_is_not_whole(
    server, upstream, choice, text, note
):
    """A server that names reasons, but none at [DONE], may have been interrupted."""
    delta = {"delta": {"content": text}} | choice
    headers = {"Content-Type": "text/event-stream"}
    upstream.will(Script(body=sse({"choices": [delta]}, "[DONE]"), headers=headers))
    assert (await server.ask(QUESTION)).text == text + LABEL + note
    assert len(upstream.requests) == 1


# A conversation that is too long


@pytest.mark.parametrize("name", ["OpenAI long", "vLLM long"])
async def test_a_long_conversation_is_asked_again_without_its_oldest(
    server, upstream, caplog, name
):
    """The oldest exchanges go, prompt and question stay; the wordings are above."""
    for number in "甲乙丙":
        await server.ask(f"{number}问")
    upstream.will(FINAL[name][0], "这次好了。")
    assert (await server.ask(QUESTION)).text == "这次好了。" + LABEL
    long, short = (asked.messages for asked in upstream.requests[3:])
    assert short[0] == long[0] and short[0]["role"] == "system"
    assert len(short) < len(long) and short[1:] == long[len(long) - len(short) + 1 :]
    assert short[-1]["content"] == QUESTION and "甲问" not in str(short)
    assert len(upstream.requests) == 5 and len(told(caplog)) == 1


async def test_at_last_a_question_is_asked_alone(server, upstream, monkeypatch):
    """The model may hold less than a quarter; no pause is made to ask with less."""
    for number in range(8):
        await server.ask(f"第 {number} 问")
    monkeypatch.setattr(wxgpt, "RETRY_PAUSES", (2 * PATIENCE, 3 * PATIENCE))
    upstream.will(*[FINAL["OpenAI long"][0]] * 2, "这次好了。")
    assert (await server.ask(QUESTION)).text == "这次好了。" + LABEL
    system, alone = upstream.requests[-1].messages
    assert system["role"] == "system" and alone["content"] == QUESTION
    assert len(upstream.requests) == 8 + CALLS


async def test_a_conversation_that_stays_too_long_is_told(server, upstream):
    """Three calls at most, though something could be left out still."""
    for number in range(8):
        await server.ask(f"第 {number} 问")
    upstream.will(*[FINAL["OpenAI long"][0]] * 9)
    seen = await server.ask(QUESTION)
    assert seen.text.startswith(LONG) and "/clear" in seen.text
    assert len(upstream.requests) - 8 <= CALLS


async def test_a_refused_question_does_not_enter_the_conversation(server, upstream):
    """A provider would refuse every question after it."""
    upstream.will(FINAL["policy"][0], FINAL["GLM withdraws"][0])
    await server.ask("禁问")
    await server.ask("又禁问")
    await server.ask("好问")
    assert [m["role"] for m in upstream.requests[-1].messages] == ["system", "user"]


# What stands in the fields

ODD = {
    "tokens": {"usage": {"prompt_tokens": 10**30, "completion_tokens": -1}},
    "no counts": {"usage": [1, 2]},
    "model": {"model": "\ud800" * 9 + "x" * 5000},
    "a model of another kind": {"model": {"name": ["x"]}},
    "choices": {"choices": [None], "usage": "many"},
    "index": {"choices": [{"index": None, "delta": None}]},
}


def with_odd(fields):
    """Script an answer with odd values in an event of their own, and at its end."""
    begun = {"choices": [{"delta": {"content": "好的。"}}]}
    ended = {"choices": [{"delta": {}, "finish_reason": "stop"}]}
    body = sse(begun, fields, fields | ended, "[DONE]")
    return Script(body=body, headers={"Content-Type": "text/event-stream"})


@pytest.mark.parametrize("name", ODD)
def test_odd_fields_are_read_over(name):
    """Text and end are there, and what is stored beside them can be stored."""
    completion, text = read(with_odd(ODD[name]))
    ending = completion.ending()
    assert (text, completion.error, ending.finish_reason) == ("好的。", None, "stop")
    assert (ending.tokens_in, ending.tokens_out) == (None, None)
    assert len(ending.model.encode()) <= 300  # and has no lone surrogates


@pytest.mark.parametrize("name", ["tokens", "model", "choices"])
async def test_odd_fields_do_no_harm(server, upstream, caplog, name):
    """An answer with odd values beside it is delivered, stored, and sent along."""
    upstream.will(with_odd(ODD[name]))
    assert (await server.ask(QUESTION)).text == "好的。" + LABEL
    await server.ask("再问")
    assert upstream.requests[-1].messages[-2]["content"] == "好的。"
    assert told(caplog) == []


ODD_WORDS = [f"{QUOTE}\nERROR", {"a": QUOTE}, [QUOTE] * 999]


@pytest.mark.parametrize("field", ["code", "type", "param"])
@pytest.mark.parametrize("value", ODD_WORDS, ids=["lines", "object", "list"])
def test_odd_error_fields_are_not_repeated(field, value):
    """A code is a word; anything else may be what somebody wrote."""
    line = str(error_in(refusal(400, error(**{field: value}))))
    assert quoted(line) == [] and "\n" not in line and len(line) < 300


@pytest.mark.parametrize("value", ODD_WORDS, ids=["lines", "object", "list"])
async def test_odd_error_fields_are_not_logged(server, upstream, caplog, value):
    """Nor does the subscriber read them."""
    upstream.will(refusal(400, error(code=value)))
    seen = await server.ask(QUESTION)
    assert_discreet(seen, caplog)
    [line] = told(caplog)
    assert "\n" not in line and len(line) < 300


# Bytes that no library sends


async def for_ever(piece):
    """Yield a piece over and over, slowly."""
    while True:
        yield piece
        await asyncio.sleep(0.02)


async def whole(pieces):
    """Yield pieces at once."""
    for piece in pieces:
        yield piece
        await asyncio.sleep(0)


class Wire:
    """An upstream of raw bytes: each request gets the next script, at last an answer.

    A script is a function that returns the pieces; then the connection is closed.
    """

    def __init__(self):
        self.scripts = []
        self.named = {}  # scripts for one question each, played once
        self.always = {}  # scripts for one question each, at every call
        self.calls = 0
        self.port = 0

    @property
    def settings(self):
        """Return what points an assistant here."""
        return {"base_url": f"http://127.0.0.1:{self.port}/v1"}

    async def answer(self, reader, writer):
        """Read one request and play its script."""
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            head = await reader.readuntil(b"\r\n\r\n")
            length = re.search(rb"(?i)content-length: (\d+)", head)
            body = json.loads(await reader.readexactly(int(length[1])))
            self.calls += 1
            question = body["messages"][-1]["content"]
            script = self.named.pop(question, None) or self.always.get(question)
            script = script or (self.scripts.pop(0) if self.scripts else GOOD)
            async for piece in script():
                writer.write(piece)
                await writer.drain()
        writer.close()


@pytest.fixture
async def wire():
    """A chat API of raw bytes."""
    wire = Wire()
    listener = await asyncio.start_server(wire.answer, "127.0.0.1", 0)
    wire.port = listener.sockets[0].getsockname()[1]
    async with listener:
        yield wire


HEAD = b"HTTP/1.1 %s\r\nContent-Type: text/event-stream\r\n%s\r\n"
OK = HEAD % (b"200 OK", b"Connection: close\r\n")
CHUNKED = HEAD % (b"200 OK", b"Transfer-Encoding: chunked\r\n")
ZIPPED = HEAD % (b"200 OK", b"Content-Encoding: gzip\r\n")
LATE = b"HTTP/1.1 401 No\r\nContent-Length: 999\r\n\r\n{"


def delta(text):
    """Return one event with a piece of an answer."""
    return sse({"choices": [{"delta": {"content": text}}]}).encode()


END = sse({"choices": [{"delta": {}, "finish_reason": "stop"}]}, "[DONE]").encode()


def bytes_of(*pieces):
    """Script these pieces and a close."""
    return lambda: whole(pieces)


GOOD = bytes_of(OK, delta("这次好了。"), END)
GOOD_END = bytes_of(delta("这次好了。"), END)
BEGUN = delta("写了一半")
GARBLED = {
    "no HTTP": bytes_of(f"{QUOTE}\r\n\r\n".encode()),
    "a huge header": bytes_of(b"HTTP/1.1 200 OK\r\nX: " + b"y" * 100_000 + b"\r\n\r\n"),
    "nothing": bytes_of(b""),
    "half a head": bytes_of(b"HTTP/1.1 200 OK\r\nContent-Ty"),
    "a bad chunk": bytes_of(CHUNKED, f"{QUOTE}\r\n".encode(), BEGUN),
    "a chunk cut short": bytes_of(CHUNKED, b"fff\r\n", BEGUN),
    "no gzip": bytes_of(ZIPPED, BEGUN),
    "gzip cut short": bytes_of(ZIPPED, gzip.compress(BEGUN * 99)[:-20]),
    "a body cut short": bytes_of(
        HEAD % (b"200 OK", b"Content-Length: 9999\r\n"), BEGUN
    ),
    "an end without a word": bytes_of(OK, BEGUN),
    "half an event": bytes_of(OK, BEGUN, b'data: {"choices'),
}


async def test_garbled_bytes_are_asked_again(serve, wire, caplog):
    """Whatever HTTP makes of them, the second answer is the answer."""
    server = await talking(serve, assistants={"chatgpt": wire.settings})
    wire.named = dict(GARBLED)
    await asyncio.gather(
        *(server.bot.store.note(f"o{name}", told_at=time.time()) for name in GARBLED)
    )
    asking = [server.ask(f"/chatgpt {name}", f"o{name}") for name in GARBLED]
    answered = await within(60, "answers to all", asyncio.gather(*asking))
    for name, seen in zip(GARBLED, answered):
        assert (name, seen.text) == (name, "这次好了。" + LABEL)
        assert_discreet(seen, caplog, "写了一半")
    assert wire.calls == 2 * len(GARBLED) and len(told(caplog)) == len(GARBLED)


async def test_gzip_in_single_bytes_is_read(serve, wire):
    """Torn apart in every layer, an answer is the same."""
    server = await talking(serve, assistants={"chatgpt": wire.settings})
    body = gzip.compress(delta("你好，世界🙂！") + END)
    wire.scripts = [bytes_of(ZIPPED, *(bytes([byte]) for byte in body))]
    assert (await server.ask(QUESTION)).text == "你好，世界🙂！" + LABEL


@pytest.mark.parametrize("rest", [whole, for_ever])
async def test_an_error_whose_body_does_not_come_is_known_by_its_status(
    serve, wire, rest
):
    """A bad key is a bad key, though the server breaks off or hangs as it says so."""
    server = await talking(serve, assistants={"chatgpt": wire.settings})
    wire.scripts = [lambda: chained(whole([LATE]), rest(b""))]
    seen = await server.ask(QUESTION)
    assert seen.text.startswith(SETUP) and wire.calls == 1


DRIPS = {
    "nothing": b"",
    "events without text": sse({"choices": [{"delta": {"content": ""}}]}).encode(),
    "a line without an end": b"x",
    "an event without an end": b"data: x\n",
}


@pytest.mark.parametrize("name", DRIPS)
async def test_a_drip_without_a_word_is_given_up(serve, wire, caplog, name):
    """Bytes are no sign of life; words and comments are."""
    limits = {"first_token_timeout": 0.5 * UNIT}
    server = await talking(serve, assistants={"chatgpt": wire.settings | limits})
    wire.scripts = [lambda: chained(bytes_of(OK)(), for_ever(DRIPS[name]))]
    seen = await server.ask(QUESTION)
    assert seen.text == "这次好了。" + LABEL and wire.calls == 2
    assert "slow" in told(caplog)[0]


async def test_comments_are_a_sign_of_life(serve, wire):
    """Providers send them while a model has not begun; only the total ends them."""
    limits = {"first_token_timeout": UNIT, "idle_timeout": UNIT, "timeout": 4 * UNIT}
    server = await talking(serve, assistants={"chatgpt": wire.settings | limits})

    async def patience():
        for _ in range(15):
            yield b": keep-alive\n\n"
            await asyncio.sleep(0.1 * UNIT)

    wire.scripts = [lambda: chained(bytes_of(OK)(), patience(), GOOD_END())]
    assert (await server.ask(QUESTION)).text == "这次好了。" + LABEL
    wire.scripts = [lambda: chained(bytes_of(OK)(), for_ever(b": keep-alive\n\n"))]
    assert (await server.ask("再问")).text.startswith(SLOW) and wire.calls == 2


async def test_a_drip_of_words_ends_with_the_time_for_all(serve, wire):
    """Every word begins the idle time again, but not the total."""
    limits = {"first_token_timeout": 5, "idle_timeout": 5, "timeout": UNIT}
    server = await talking(serve, assistants={"chatgpt": wire.settings | limits})
    wire.scripts = [lambda: chained(bytes_of(OK)(), for_ever(delta("说")))] * 9
    seen = await server.ask(QUESTION)
    assert seen.text.startswith("说说") and BROKEN in seen.text
    assert seen.taps[0].label == TEXTS.word_retry and wire.calls == 1


async def test_an_answer_is_whole_though_its_tokens_are_never_counted(serve, wire):
    """Silence behind its end is no reason to ask again, nor to call it broken off."""
    limits = {"idle_timeout": 0.5 * UNIT, "timeout": 2 * UNIT}
    server = await talking(serve, assistants={"chatgpt": wire.settings | limits})
    end = sse({"choices": [{"delta": {}, "finish_reason": "stop"}]}).encode()
    begun = bytes_of(OK, delta("一二三。"), end)
    wire.scripts = [lambda: chained(begun(), for_ever(b": still here\n"))] * 3
    seen = await server.ask(QUESTION)
    assert seen.text == "一二三。" + LABEL and wire.calls == 1


STALLS = DRIPS | {
    "comments": b": keep-alive\n\n",
    "words": delta("说"),
    "thoughts": sse({"choices": [{"delta": {"reasoning_content": "想"}}]}).encode(),
    "an end that does not come": END.partition(b"data: [DONE]")[0] + b": here\n\n",
}


@pytest.mark.parametrize("name", STALLS)
async def test_a_stalled_question_holds_the_next_within_its_limits(serve, wire, name):
    """However both models of an assistant stall, the questions behind it are asked."""
    limits = {"first_token_timeout": UNIT, "idle_timeout": UNIT, "timeout": 2 * UNIT}
    chatgpt = wire.settings | limits | {"fallback": "spare", "fallback_after": UNIT / 2}
    spare = wire.settings | limits | {"api_key": KEY}
    assistants = {"chatgpt": chatgpt, "spare": spare}
    server = await talking(serve, assistants=assistants)
    wire.always["停住了"] = lambda: chained(bytes_of(OK)(), for_ever(STALLS[name]))
    texts = ["/chatgpt 停住了", "第二问", "第三问"]
    asking = [asyncio.create_task(server.ask(text)) for text in texts[:1]]
    await asyncio.sleep(0.1)
    asking += [asyncio.create_task(server.ask(text)) for text in texts[1:]]
    _, second, third = await within(30, "answers to all", asyncio.gather(*asking))
    assert [second.text, third.text] == ["这次好了。" + LABEL] * 2


async def chained(*streams):
    """Yield the pieces of one stream after the other."""
    for stream in streams:
        async for piece in stream:
            yield piece


# Ten megabytes

MUCH = 10 * 2**20


def flood(piece, *head):
    """Script a head and ten megabytes of one piece."""
    block = piece * (65536 // len(piece))
    return bytes_of(*(head or [OK]), *[block] * (MUCH // len(block)))


def zipped(piece):
    """Script forty megabytes of one piece, packed into a few kilobytes."""
    packer = zlib.compressobj(wbits=31)
    block = piece * (MUCH // len(piece))
    packed = [packer.compress(block) for _ in range(4)]
    return bytes_of(ZIPPED, b"".join([*packed, packer.flush()]))


JSON = b"HTTP/1.1 %d X\r\nContent-Type: application/json\r\n\r\n"
AGAIN = "这次好了。"
FLOODS = {
    "text": (lambda: flood(delta("很长的一句话。" * 9)), "很长的一句话。"),
    "text in one event": (lambda: flood(b"x", OK, b'data: {"choices'), BROKEN),
    "one line": (lambda: flood(b"x"), BROKEN),
    "one event": (lambda: flood(b"data: xxxxxxxx\n"), BROKEN),
    "empty lines of data": (lambda: flood(b"data:\n"), BROKEN),
    "comments": (lambda: flood(b": keep-alive\n\n"), AGAIN),
    "a thought": (lambda: flood(delta("想" * 99), OK, delta("<think>")), AGAIN),
    "blanks": (lambda: flood(delta(" \n" * 99)), AGAIN),
    "blanks after a thought": (
        lambda: flood(delta(" \n" * 99), OK, delta("<think>x</think>")),
        AGAIN,
    ),
    "newlines": (lambda: flood(delta("\n" * 99), OK, delta("好")), "好"),
    "backticks": (lambda: flood(delta("`" * 99)), ""),
    "brackets": (lambda: flood(delta("[" * 99)), "[["),
    "an error": (lambda: flood(b"x", JSON % 500), AGAIN),
    "a refusal": (lambda: flood(b"x", JSON % 401), SETUP),
    "unstreamed": (
        lambda: flood(b"x", JSON % 200, b'{"choices": [{"message": {"content": "'),
        AGAIN,
    ),
    "zipped line": (lambda: zipped(b"x"), BROKEN),
    "zipped events": (lambda: zipped(delta("字" * 99)), "字"),
}
SPARE = 64 * 1024  # KiB


def peak(process):
    """Return the most memory a process ever had, in KiB."""
    status = pathlib.Path(f"/proc/{process.process.pid}/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+)", status)[1])


async def test_ten_megabytes_are_ended_and_never_kept(spawn, wire):
    """Every flood gets its sentence, all at once, and no answer stays in memory.

    An event may have 1 MiB and an answer 200,000 characters; some copies of them are
    made on the way. All floods together are seven times the memory allowed here.
    """
    settings = {"chatgpt": wire.settings}
    server, process = await spawn(wechat={"attempt_timeout": 60}, assistants=settings)
    server.wechat.attempt_timeout = 60
    wire.named = {name: make() for name, (make, _) in FLOODS.items()}
    who = {name: f"o{number}" for number, name in enumerate(FLOODS)}
    opening = (server.ask("/chatgpt", one) for one in who.values())
    await within(30, "sessions for all", asyncio.gather(*opening))
    before = peak(process)
    asking = (server.ask(name, who[name]) for name in FLOODS)
    seen = await within(100, "answers to all", asyncio.gather(*asking))
    wanted = [sentence for _, sentence in FLOODS.values()]
    assert [one.text[: len(start)] for one, start in zip(seen, wanted)] == wanted
    assert peak(process) - before < SPARE
    assert wire.calls == len(FLOODS) + wanted.count(AGAIN)
    assert not any("broke off" in line for line in process.log)
