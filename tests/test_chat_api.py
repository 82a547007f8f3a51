"""The chat API as it is met: many dialects, hidden thoughts, and every way to fail."""

import asyncio
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import wxgpt
from conftest import ANN, with_session
from fake_openai import Script, Thought, fails
from waiting import within

LABEL = "\n（AI 生成）"
PATIENT = {"attempt_timeout": 6.0}  # longer than it takes to ask three times


async def with_assistant(serve, **assistant):
    """Start wxgpt with other settings of its assistant, and open a session."""
    return await with_session(serve, assistants={"chatgpt": assistant})


# The request


async def test_the_request_is_a_streamed_chat_completion(server, upstream):
    """Model, messages, the wish for a stream and for counts, the key as a bearer."""
    await server.ask("你好")
    [asked] = upstream.requests
    assert asked.headers["Authorization"] == "Bearer sk-verySecret"
    assert asked.body["model"] == "gpt-6-luna" and asked.body["stream"] is True
    assert asked.body["stream_options"] == {"include_usage": True}
    assert [message["role"] for message in asked.messages] == ["system", "user"]
    assert not {"temperature", "max_tokens", "user", "n"} & set(asked.body)


async def test_the_default_model_is_told_not_to_think(server, upstream):
    """Thinking takes longer than WeChat waits."""
    await server.ask("你好")
    assert upstream.requests[0].body["reasoning_effort"] == "none"


async def test_another_model_is_told_nothing_about_thinking(serve, upstream):
    """Most models refuse the field."""
    server = await with_assistant(serve, model="bean-2")
    await server.ask("你好")
    assert upstream.requests[0].body["model"] == "bean-2"
    assert "reasoning_effort" not in upstream.requests[0].body


async def test_extra_is_merged_into_the_request(serve, upstream):
    """Whatever a provider wants can be set, and replaces what would be sent."""
    extra = {"thinking": {"type": "disabled"}, "reasoning_effort": "low", "top_p": 0.5}
    server = await with_assistant(serve, extra=extra)
    await server.ask("你好")
    body = upstream.requests[0].body
    assert {name: body.get(name) for name in extra} == extra
    assert body["stream"] is True and body["messages"][-1]["content"] == "你好"


async def test_an_empty_system_prompt_sends_none(serve, upstream):
    """The conversation then begins with the question."""
    server = await with_assistant(serve, system_prompt="")
    await server.ask("你好")
    assert upstream.requests[0].messages == [{"role": "user", "content": "你好"}]


@pytest.mark.parametrize(
    "form", ["{}/", " {} ", "{}/chat/completions", "{}/chat/completions/", "{}//"]
)
async def test_a_base_url_is_understood_in_every_usual_form(serve, upstream, form):
    """Slashes, spaces and the end of the address make no difference."""
    server = await with_assistant(serve, base_url=form.format(upstream.base_url))
    assert (await server.ask("你好")).text.startswith("你好！")


@pytest.mark.parametrize("end", ["?v=1", "/?v=1", "/chat/completions?v=1"])
def test_the_query_of_a_base_url_stays_behind_the_path(end):
    """Classic Azure wants `?api-version=` with every request."""
    one = wxgpt.AssistantSettings(api_key="x", base_url=f"https://a.example/gpt{end}")
    client = wxgpt.ChatClient(one, None)
    assert client.url == "https://a.example/gpt/chat/completions?v=1"


async def test_further_headers_are_sent(serve, upstream):
    """They come with every request; one that we send is replaced, in any case."""
    headers = {"X-Title": "wxgpt", "authorization": "Basic c2VjcmV0"}
    server = await with_assistant(serve, headers=headers)
    await server.ask("你好")
    [asked] = upstream.requests
    assert asked.headers["X-Title"] == headers["X-Title"]
    assert asked.headers.getall("Authorization") == ["Basic c2VjcmV0"]


# The answer


@pytest.mark.parametrize(
    "options",
    [
        {"crlf": True},
        {"comments": True},
        {"shred": 1},
        {"shred": 3},
        {"crlf": True, "shred": 1, "comments": True},
        {"gzip": True},
        {"ending": "finish"},
        {"streamed": False},
        {"rate": 200.0},
    ],
    ids=str,
)
async def test_an_answer_is_read_in_every_form(server, upstream, options):
    """Line ends, comments, torn characters, compression, or no stream at all."""
    upstream.will(Script("你好，世界🙂！\n第二行。", **options))
    assert (await server.ask("说")).text == "你好，世界🙂！\n第二行。" + LABEL
    assert len(upstream.requests) == 1


@pytest.mark.parametrize("streamed", [True, False])
async def test_thoughts_in_the_answer_are_dropped(server, upstream, streamed):
    """`<think>…</think>` at the beginning is not shown, however it is cut up."""
    pieces = ["\n<thi", "nk>先", "想<b>", "</thi", "nk", ">\n", "\n答", "案<think>。"]
    upstream.will(Script(pieces, streamed=streamed))
    assert (await server.ask("说")).text == "答案<think>。" + LABEL


async def test_a_beginning_that_only_looks_like_a_thought_is_shown(server, upstream):
    """`<th` may be a table's tag."""
    upstream.will(Script(["<th", "ead> 是标签。"]))
    assert (await server.ask("说")).text == "<thead> 是标签。" + LABEL


async def test_thoughts_are_not_sent_back(server, upstream):
    """The next question comes with the answer alone."""
    upstream.will(Script("<think>秘密</think>答案。"))
    await server.ask("甲问")
    await server.ask("乙问")
    assert upstream.requests[1].messages[2] == {
        "role": "assistant",
        "content": "答案。",
    }


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning"])
async def test_hidden_reasoning_is_neither_shown_nor_sent_back(server, upstream, name):
    """What a provider sends in a field of its own stays there."""
    upstream.will(Script([Thought("秘密", name), "答案。", Thought("又想", name)]))
    assert (await server.ask("甲问")).text == "答案。" + LABEL
    await server.ask("乙问")
    assert "秘密" not in str(upstream.requests[1].body)
    assert "reasoning" not in str(upstream.requests[1].messages)


async def test_what_no_xml_can_carry_is_left_out(server, upstream):
    """Control characters and half characters of a model are neither sent nor stored."""
    upstream.will(Script("好\ud800的\x00\x1b。", streamed=False))
    assert (await server.ask("说")).text == "好的。" + LABEL


async def test_a_thought_without_its_opening_tag_is_dropped_late(server, upstream):
    """What was sent stays, the answer follows; the next one is known to begin in one."""
    gate = asyncio.Event()
    upstream.will(Script(["秘密想法。\n想", "法", gate, "。</think>\n\n好的。"]))
    seen = await server.ask("甲问")
    assert seen.text.startswith("秘密想法。")
    gate.set()
    assert (await server.ask("继续")).text == "好的。" + LABEL
    upstream.will(Script(["又是想法。", "</thi", "nk>", "答案。"]))
    assert (await server.ask("乙问")).text == "答案。" + LABEL
    [before] = [
        m["content"] for m in upstream.requests[1].messages if m["role"] == "assistant"
    ]
    assert before.endswith("好的。")


async def test_an_answer_at_its_length_limit_says_so(server, upstream):
    """The text counts, with a word that it was cut."""
    upstream.will(Script("写到这里", finish="length"))
    seen = await server.ask("甲问")
    assert seen.text.startswith("写到这里") and "长度上限" in seen.text
    await server.ask("乙问")
    assert upstream.requests[1].messages[2]["content"] == "写到这里"


# Failures

BROKEN = {
    "bare end": Script("写了一半", ending="eof"),
    "cut": Script("写了一半", ending="cut"),
    "reset": Script("写了一半", ending="reset"),
    "bad JSON": Script("写了一半", ending="bad json"),
    "error in a stream": Script("写了一半", ending="error"),
    "error in a 200": Script(body={"error": {"message": "internal-words"}}),
    "no answer in a 200": Script(""),
    "reset before the headers": Script(ending="reset", headless=True),
    "cut before the headers": Script(ending="cut", headless=True),
    "500": fails(500, message="internal-words"),
    "502 in HTML": Script(status=502, body="<html>internal-words</html>"),
    "503": fails(503),
    "429": fails(429, message="internal-words"),
    "endless thought": Script("<think>internal-words"),
}
FINAL = {
    "401": fails(401, message="internal-words"),
    "402": fails(402, message="internal-words"),
    "403": fails(403, message="internal-words"),
    "404": fails(404, message="internal-words"),
    "400": fails(400, message="internal-words"),
    "no money": fails(429, type="insufficient_quota", code="insufficient_quota"),
    "filtered": fails(400, code="content_filter", message="internal-words"),
    "HTML in a 200": Script(body="<html>internal-words</html>"),
}


SLOW = {
    "无声": ({"first_token_timeout": 0.2}, Script(ending="hang", headless=True)),
    "只有头": ({"first_token_timeout": 0.2}, Script(ending="hang")),
    "说一半": ({"idle_timeout": 0.2}, Script("写了一半", ending="hang")),
    "没完": ({"timeout": 0.5}, Script("说" * 2000, rate=20)),
}


def assert_plain_words(seen, upstream):
    """Check that a failure is told in plain words, which give nothing away."""
    assert not seen.faulty and re.search("[\u4e00-\u9fff]", seen.text)
    secrets = ("internal-words", "sk-", "http://127", "Error", "error", "The ")
    assert [word for word in secrets if word in seen.text] == []
    assert upstream.base_url not in seen.content


async def ask_all(server, upstream, texts):
    """Let a subscriber for each name ask their question, all at once."""
    server.wechat.attempt_timeout = PATIENT["attempt_timeout"]
    asking = [server.ask(text, f"oSubscriber{name}") for name, text in texts.items()]
    answered = await within(60, "answers to all", asyncio.gather(*asking))
    seen = dict(zip(texts, answered))
    return seen, {name: len(upstream.asked(f"{name}？")) for name in texts}


def opening(names):
    """Return for each name the text that opens a session with a question of it."""
    return {name: f"/chatgpt {name}？" for name in names}


async def test_what_may_pass_is_asked_again(serve, upstream):
    """The second answer is the answer, without a trace of the first."""
    server = await serve(wechat=PATIENT)
    for name, script in BROKEN.items():
        upstream.will(script, "这次好了。", when=f"{name}？")
    seen, calls = await ask_all(server, upstream, opening(BROKEN))
    texts = {name: one.text for name, one in seen.items()}
    assert texts == dict.fromkeys(BROKEN, "这次好了。" + LABEL)
    assert calls == dict.fromkeys(BROKEN, 2)


async def test_what_does_not_pass_is_told_in_plain_words(serve, upstream):
    """Asked twice again in vain, it ends in a sentence, with what came and a tap 重试."""
    server = await serve(wechat=PATIENT)
    for name, script in BROKEN.items():
        upstream.will(script, script, script, when=f"{name}？")
    seen, calls = await ask_all(server, upstream, opening(BROKEN))
    taps = {name: [tap.label for tap in one.taps] for name, one in seen.items()}
    assert taps == dict.fromkeys(BROKEN, ["重试"])
    assert calls == dict.fromkeys(BROKEN, 3)
    assert seen["cut"].text.startswith(f"写了一半{LABEL}\n\n回答中断了")
    for one in seen.values():
        assert_plain_words(one, upstream)


async def test_what_will_not_pass_is_not_asked_again(serve, upstream):
    """The subscriber gets a sentence at once."""
    server = await serve(wechat=PATIENT)
    for name, script in FINAL.items():
        upstream.will(script, when=f"{name}？")
    seen, calls = await ask_all(server, upstream, opening(FINAL))
    assert calls == dict.fromkeys(FINAL, 1)
    for one in seen.values():
        assert_plain_words(one, upstream)


async def test_the_tap_of_a_failure_asks_the_same_question(server, upstream):
    """重试 brings the answer, and the failure is not part of the conversation."""
    upstream.will(fails(401), "这次好了。")
    [tap] = (await server.ask("行吗？")).taps
    seen = await server.wechat.tap(ANN, tap)
    assert seen.text.startswith("这次好了。")
    assert upstream.requests[1].question == "行吗？"
    assert len(upstream.requests[1].messages) == 2


async def test_an_unreachable_api_is_told_in_plain_words(serve, upstream):
    """Nobody listens at the address."""
    away = {"chatgpt": {"base_url": "http://127.0.0.1:9/v1"}}
    server = await serve(assistants=away, wechat=PATIENT)
    seen = (await ask_all(server, upstream, opening(["行吗"])))[0]["行吗"]
    assert_plain_words(seen, upstream)
    assert seen.text.startswith("暂时连不上模型")


async def test_a_model_that_takes_too_long_is_given_up(serve, upstream):
    """To the first token, between tokens and in all; the call is closed each time."""
    made = {"base_url": upstream.base_url, "api_key": "sk-2"}
    slow = {name: made | limits for name, (limits, _) in SLOW.items()}
    server = await serve(assistants=slow, wechat=PATIENT)
    for name, (_, script) in SLOW.items():
        upstream.will(script, script, script, when=f"{name}？")
    seen, _ = await ask_all(server, upstream, {n: f"/{n} {n}？" for n in SLOW})
    assert {asked.outcome for asked in upstream.requests} == {"cut by client"}
    assert seen["无声"].text == seen["只有头"].text == "模型太久没有回应。重试"
    for one in seen.values():
        assert_plain_words(one, upstream)


async def test_what_was_written_when_the_time_was_up_is_shown(serve, upstream):
    """An answer that reaches `timeout` ends as broken off, with its text."""
    server = await serve(assistants={"chatgpt": {"timeout": 0.5}}, wechat=PATIENT)
    upstream.will(*[SLOW["没完"][1]] * 3)
    seen = (await ask_all(server, upstream, opening(["说吧"])))[0]["说吧"]
    assert seen.text.startswith("说说说") and "回答中断了" in seen.text


async def test_a_model_that_thinks_aloud_is_waited_for(serve, upstream):
    """Hidden reasoning is a sign of life."""
    server = await with_assistant(serve, first_token_timeout=0.5, idle_timeout=0.5)
    thoughts = [Thought("想"), 0.2] * 4
    upstream.will(Script([*thoughts, "想好了。"]))
    assert (await server.ask("难题")).text == "想好了。" + LABEL
    assert len(upstream.requests) == 1


async def test_an_error_is_logged_without_what_people_wrote(serve, upstream, caplog):
    """An API may quote the question and the key in its errors; the log does not."""
    server, statuses = await serve(wechat=PATIENT), ("200", "400", "401", "500")
    leaks = [f"秘密{status}" for status in statuses]
    for status in statuses:
        error = {"message": f"sk-verySecret: no 秘密{status}", "code": "odd"}
        failed = Script(status=int(status), body={"error": error})
        upstream.will(failed, failed, failed, when=f"秘密{status}")
    await ask_all(server, upstream, opening(leaks))
    assert caplog.text.count("failed") >= len(statuses)
    assert [leak for leak in ["sk-verySecret", *leaks] if leak in caplog.text] == []


# Event streams: the examples of the HTML standard, section "Server-sent events"

EXAMPLES = {
    "lines of one event": ("data: YHOO\ndata: +2\ndata: 10\n\n", ["YHOO\n+2\n10"]),
    "comment, id, no space": (
        ": test stream\n\ndata: first event\nid: 1\n\ndata:second event\nid\n\n"
        "data:  third event\n\n",
        ["first event", "second event", " third event"],
    ),
    "empty data": ("data\n\ndata\ndata\n\ndata:", ["", "\n"]),
    "one space is no text": ("data:test\n\ndata: test\n\n", ["test", "test"]),
    "event names": (
        "event: add\ndata: 73857293\n\nevent: remove\ndata: 2153\n\n",
        ["73857293", "2153"],
    ),
    "Chinese and emoji": ("data: 你好🙂\n\ndata: [DONE]\n\n", ["你好🙂", "[DONE]"]),
    "other fields": ("retry: 10\ndatax: no\n: data: no\ndata: a:b\n\n", ["a:b"]),
}


def decode(raw, cuts):
    """Feed a stream in pieces; return its payloads."""
    decoder, edges = wxgpt.EventDecoder(), [0, *sorted(cuts), len(raw)]
    pieces = [raw[start:end] for start, end in zip(edges, edges[1:])]
    return [payload for piece in pieces if piece for payload in decoder.feed(piece)]


@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("name", EXAMPLES)
@settings(deadline=None, max_examples=30)
@given(st.data())
def test_the_standards_examples_are_read_in_any_pieces(name, newline, data):
    """Wherever a stream is torn, its events are the same."""
    text, payloads = EXAMPLES[name]
    raw = text.replace("\n", newline).encode()
    cuts = data.draw(st.sets(st.integers(1, len(raw) - 1)))
    assert decode(raw, cuts) == payloads


def test_a_last_event_without_its_blank_line_is_read():
    """Some servers omit it; the end of the stream ends the event."""
    decoder = wxgpt.EventDecoder()
    assert decoder.feed(b"data: a\n\ndata: b\n") == ["a"]
    assert decoder.feed(b"\n\n") == ["b"]


def test_a_line_without_an_end_is_refused():
    """A server cannot fill the memory."""
    decoder = wxgpt.EventDecoder()
    with pytest.raises(wxgpt.ChatError):
        for _ in range(40):
            decoder.feed(b"data: " + b"x" * 65536)
