"""The chat API as it is met: many dialects, hidden thoughts, and every way to fail."""

import asyncio
import json
import math
import re
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import wxgpt
from conftest import ANN, TEXTS, UNIT, said, shown, with_session
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
    assert seen.text.startswith("写到这里") and said("cut_short") in seen.text
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
    """Let a subscriber for each name ask, all at once; none is new to the account."""
    server.wechat.attempt_timeout = PATIENT["attempt_timeout"]
    for name in texts:
        await server.bot.store.note(f"oSubscriber{name}", told_at=time.time())
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
    """Asked twice again in vain, it ends in a sentence, what came and a tap to retry."""
    server = await serve(wechat=PATIENT)
    for name, script in BROKEN.items():
        upstream.will(script, script, script, when=f"{name}？")
    seen, calls = await ask_all(server, upstream, opening(BROKEN))
    taps = {name: [tap.label for tap in one.taps] for name, one in seen.items()}
    assert taps == dict.fromkeys(BROKEN, [TEXTS.word_retry])
    assert calls == dict.fromkeys(BROKEN, 3)
    assert seen["cut"].text.startswith(f"写了一半{LABEL}\n\n{said('failed_broken')}")
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
    assert said("failed_unreachable") in seen.text


async def test_a_model_that_takes_too_long_is_given_up(serve, upstream):
    """To the first token, between tokens and in all; the call is closed each time."""
    made = {"base_url": upstream.base_url, "api_key": "sk-2"}
    slow = {name: made | limits for name, (limits, _) in SLOW.items()}
    server = await serve(assistants=slow, wechat=PATIENT)
    for name, (_, script) in SLOW.items():
        upstream.will(script, script, script, when=f"{name}？")
    seen, _ = await ask_all(server, upstream, {n: f"/{n} {n}？" for n in SLOW})
    assert {asked.outcome for asked in upstream.requests} == {"cut by client"}
    assert (
        seen["无声"].text
        == seen["只有头"].text
        == shown("failed_slow", tap=TEXTS.word_retry)
    )
    for one in seen.values():
        assert_plain_words(one, upstream)


async def test_what_was_written_when_the_time_was_up_is_shown(serve, upstream):
    """An answer that reaches `timeout` ends as broken off, with its text."""
    server = await serve(assistants={"chatgpt": {"timeout": UNIT}}, wechat=PATIENT)
    upstream.will(*[SLOW["没完"][1]] * 3)
    seen = (await ask_all(server, upstream, opening(["说吧"])))[0]["说吧"]
    assert seen.text.startswith("说说说") and said("failed_broken") in seen.text


async def test_a_model_that_thinks_aloud_is_waited_for(serve, upstream):
    """Hidden reasoning is a sign of life."""
    server = await with_assistant(serve, first_token_timeout=UNIT, idle_timeout=UNIT)
    thoughts = [Thought("想"), UNIT / 3] * 4
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
@settings(max_examples=30)
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


# What a body says: its bytes, and the text and the end that are read from it


def sse(*events, sep="\n\n", field="data: "):
    """Return an event stream of these payloads."""
    made = (e if isinstance(e, str) else json.dumps(e) for e in events)
    return "".join(f"{field}{payload}{sep}" for payload in made).encode()


def chunk(content=None, finish=None, **more):
    """Return one event of a streamed answer."""
    delta = {} if content is None else {"content": content}
    return {"choices": [{"index": 0, "delta": delta, "finish_reason": finish}], **more}


def whole(content, **more):
    """Return an answer that is not streamed."""
    message = {"role": "assistant", "content": content}
    return {
        "choices": [{"index": 0, "message": message, "finish_reason": "stop"}]
    } | more


def part(kind, text):
    """Return a content of one typed part."""
    return [{"type": kind, kind: text}]


def failure(message, **fields):
    """Return an error as it stands in a body."""
    return {"error": {"message": message} | fields}


END = (chunk(None, "stop"), "[DONE]")
ANSWER = (chunk("好"), chunk("的。"), *END)
EMOJI = json.dumps("🙂")
THINKS = [{"type": "thinking", "thinking": part("text", "秘密")}]
FORMS = {
    "a stream": sse(*ANSWER),
    "a byte order mark": b"\xef\xbb\xbf" + sse(*ANSWER),
    "blanks and a byte order mark": b"\r\n \xef\xbb\xbf" + sse(*ANSWER),
    "no blank lines": sse(*ANSWER, sep="\n"),
    "no blank lines, CRLF": sse(*ANSWER, sep="\r\n"),
    "no space, CR": sse(*ANSWER, sep="\r\r", field="data:"),
    "an event over several lines": b"data: {\ndata: "
    + json.dumps(chunk("好的。"))[1:-1].encode()
    + b"\ndata: }\n\n"
    + sse(*END),
    "heartbeats": b": ping\n\ndata:\n\n" + sse("ping", chunk("好的。"), "pong", *END),
    "lines of JSON": b"\n".join(json.dumps(e).encode() for e in ANSWER[:-1]),
    "JSON": json.dumps(whole("好的。")).encode(),
    "JSON over several lines": json.dumps(whole("好的。"), indent=2).encode(),
    "JSON with a byte order mark": b"\xef\xbb\xbf\n"
    + json.dumps(whole("好的。")).encode(),
    "JSON behind empty lines": b"\n\n\n" + json.dumps(whole("好的。")).encode(),
    "JSON of parts": json.dumps(whole(THINKS + part("text", "好的。"))).encode(),
    "all in one event": sse(whole("好的。"), "[DONE]"),
    "all in one event, again": sse(*ANSWER[:3], whole("好的。"), "[DONE]"),
    "all so far in each event": sse(
        {"choices": [{"delta": {"content": "好"}, "message": {"content": "好"}}]},
        {"choices": [{"delta": {"content": "的。"}, "message": {"content": "好的。"}}]},
        *END,
    ),
    "parts": sse(chunk(THINKS), chunk(part("text", "好")), chunk("的。"), *END),
    "an object for a part": sse(chunk({"type": "text", "text": "好的。"}), *END),
    "an index before ours": sse(
        {
            "choices": [
                {"index": 1, "delta": {"content": "错"}},
                chunk("好的。")["choices"][0],
            ]
        },
        *END,
    ),
    "text behind the reason": sse(chunk("好", "stop"), chunk("的。"), "[DONE]"),
    "a null delta": sse({"choices": [{"delta": None}]}, {"choices": None}, *ANSWER),
    "an empty object": sse({}, [], *ANSWER),
    "a good code": sse({"code": 0, "message": "ok"}, chunk("好的。", code=0), *END),
    "a prefix twice": sse(*ANSWER, field="data: data: "),
    "blanks behind the end": sse(chunk("好的。"), "[DONE] "),
    "pings": b'event: ping\ndata: {"type": "ping"}\n\n' + sse(*ANSWER),
    "no error in each event": sse(chunk("好的。", error=None, errors=[]), *END),
    "a list for a delta": sse({"choices": [{"delta": []}]}, *ANSWER),
    "references": sse(chunk([{"type": "reference", "reference_ids": [1]}]), *ANSWER),
    "a refusal": sse({"choices": [{"delta": {"refusal": "好的。"}}]}, *END),
    "two ends": sse(*ANSWER[:3], chunk("", "stop"), "[DONE]"),
    "an error behind the end": sse(*ANSWER[:3], failure("x", code=502)),
    "another event first": sse({"status": "running"}, *ANSWER),
    "the words null and none": sse(chunk("好", "null"), chunk("的。", "None"), *END),
    "an error of empty fields": sse(chunk("好的。", **failure("", code=None)), *END),
    "two events in a line": sse(json.dumps(chunk("好")) + sse(*ANSWER[1:]).decode()),
    "an event without its end": sse('{"object":"chat.comp' + sse(*ANSWER).decode()),
    "NaN": sse(chunk("好的。", timings=math.nan), *END),
    "a token that stops": sse(chunk("好的。"), chunk("<|im_end|>"), *END),
    "a token that stops, in the text": sse(chunk("好的。<|return|>\n"), *END),
    "a tag that stops": sse(chunk("好的。"), chunk("</s>"), *END),
    "tokens that stop": sse(chunk("好的。<|im_end|>"), chunk("<|endoftext|>\n"), *END),
    "DeepSeek's token": sse(chunk("好的。"), chunk("<｜end▁of▁sentence｜>"), *END),
    "an end in a line": sse(json.dumps(chunk("好的。")) + "data: [DONE]"),
}


def outcome(raw, cuts=(), closing=""):
    """Return the text of a body read in pieces, and how it ends or the kind of error."""
    edges = [0, *sorted(cuts), len(raw)]
    thoughts, text = wxgpt.ThoughtFilter(closing), ""
    completion = wxgpt.Completion("some-model", thoughts)
    for start, end in [*zip(edges, edges[1:]), (len(raw), len(raw))]:
        more = completion.feed(raw[start:end])
        text = more if isinstance(more, wxgpt.ThoughtEnd) else text + more
        if completion.error and not completion.reason:
            return text.strip(), completion.error.kind
    if not completion.reason:
        return text.strip(), "early end"
    ending = completion.ending()
    if isinstance(ending, wxgpt.ChatError):
        return text.strip(), ending.kind
    finish = ending.finish_reason
    return (text + thoughts.flush(finish == "length")).strip(), finish


@pytest.mark.parametrize("name", FORMS)
def test_an_answer_is_told_by_what_it_says(name):
    """Whatever its content type, its line ends, and the shape of its events."""
    assert outcome(FORMS[name]) == ("好的。", "stop")


def test_a_last_delta_may_say_all_again():
    """It is not shown twice; a short word may well be said twice."""
    deltas = [chunk("<think>秘密</think>这是一个"), chunk("回答。")]
    again = chunk("<think>秘密</think>这是一个回答。", "stop")
    assert outcome(sse(*deltas, again)) == ("这是一个回答。", "stop")
    assert outcome(sse(chunk("哈哈"), chunk("哈哈", "stop"))) == ("哈哈哈哈", "stop")


def test_halves_of_a_character_become_whole():
    """Some servers cut their text by UTF-16; a half alone is dropped."""
    high, low = EMOJI[1:7], EMOJI[7:13]
    events = (
        f'{{"choices":[{{"delta":{{"content":"{x}"}}}}]}}' for x in (high, low, high)
    )
    assert outcome(sse(*events, *END)) == ("🙂", "stop")


# An answer's deltas, and what of them is shown.
THOUGHTS = {
    "empty": (["<think>\n\n</think>\n\n", "好的。"], "好的。"),
    "two": (["<think>秘密</think>\n\n<think>秘密", "</think>好的。"], "好的。"),
    "attributes": (['<think time="3">秘密</think>好的。'], "好的。"),
    "capitals": (["<Thinking>秘密</thinking>好的。"], "好的。"),
    "thought": (["<thought>秘密", "</thought>好的。"], "好的。"),
    "thoughts": (["<thoughts>秘密</thought>还是</thoughts>好的。"], "好的。"),
    "reasoning": (["<reasoning>秘密</reasoning>好的。"], "好的。"),
    "Seed": (["<seed:think>秘密</seed:think>好的。"], "好的。"),
    "LongCat": (["<longcat_think>秘密</longcat_think>好的。"], "好的。"),
    "Magistral": (["[THINK]秘密", "[/THINK]好的。"], "好的。"),
    "Kimi-VL": (["◁think▷秘密◁/think▷好的。"], "好的。"),
    "Command A": (["<|START_THINKING|>秘密<|END_THINKING|>好的。"], "好的。"),
    "OpenThinker": (["<|begin_of_thought|>秘密<|end_of_thought|>好的。"], "好的。"),
    "Gemma": (["<|channel>thought\n秘密<channel|>好的。"], "好的。"),
    "Hunyuan": (["<think>秘密</think>\n<answer>\n好的。", "\n</answer>\n"], "好的。"),
    "gpt-oss": (
        ["<|channel|>analysis<|message|>秘密<|end|><|start|>assistant<|channel|>"]
        + ["commentary<|message|>秘密<|end|><|start|>assistant<|channel|>final"]
        + ["<|message|>好的。"],
        "好的。",
    ),
    "GLM-4.5V": (
        ["<think>秘密</think>", "<|begin_of_box|>", "好的。<|end_of_box|>"],
        "好的。",
    ),
    "a template": (["<|im_start|>assistant\n", "好的。", "<|im_end|>"], "好的。"),
    "gpt-oss without its marks": (
        ["analysis", "We need 秘密" + "x" * 999, ".assistantfinal", "好的。"],
        "好的。",
    ),
    "the word": (["analysis", "的意思是分析。"], "analysis的意思是分析。"),
    "ERNIE": (["<think>秘密</think>\n<response>\n好的。\n</resp", "onse>"], "好的。"),
    "Command A, wrapped": (
        ["<|START_THINKING|>秘密<|END_THINKING|><|START_RESPONSE|>好的。"]
        + ["<|END_RESPONSE|>"],
        "好的。",
    ),
    "gpt-oss without a thought": (["<|channel|>final<|message|>好的。"], "好的。"),
    "Open WebUI": (
        ['<details type="reasoning" done="true">\n<summary>秘密</summary>\n秘密\n']
        + ["</details>\n好的。"],
        "好的。",
    ),
    "a closing tag at the start": (["\n</think>\n\n", "好的。"], "好的。"),
    "a late closing tag": (["秘密", "还是秘密</think>\n\n", "好的。"], "好的。"),
    "another late closing tag": (["秘密[/THINK]好的。"], "好的。"),
    "a thought behind a late tag": (
        ["秘密</think><think>秘密</think>好的。"],
        "好的。",
    ),
    "tags that are spoken of": (["以 `</think>` 结束。"], "以 `</think>` 结束。"),
    "tags in the text": (["写 <think>x</think>。"], "写 <think>x</think>。"),
    "other tags": (["<b>好</b>", "的。"], "<b>好</b>的。"),
    "details": (["<details><summary>好</summary>"], "<details><summary>好</summary>"),
    "a link": (["[好的](https://a.b)"], "[好的](https://a.b)"),
    "brackets": (["[" * 500], "[" * 500),
    "the beginning of a tag": (["<thin"], "<thin"),
    "inner thoughts": (["<inner_thoughts>秘密</inner_thoughts>好的。"], "好的。"),
    "a thought in a thought": (
        ["<think><think>秘密</think>秘密</think>好的。"],
        "好的。",
    ),
    "code in a thought": (["秘密\n```\nx\n```\n秘密\n</think>\n\n好的。"], "好的。"),
    "a quote before the tag": (['他说："秘密。"</think>好的。'], "好的。"),
    **{
        text[:20]: ([text], text)
        for text in (
            "以此结尾：\n```\n</think>\n```\n之后是答案。",
            "以此结尾：\n```xml\n</think>\n```\n之后是答案。",
            "以此结尾：\n```html\n</think>\n```\n之后是答案。",
            "标签“</think>”表示思考结束。",
            "标签「</think>」表示思考结束。",
            '标签 "</think>" 表示思考结束。',
            "提示词里的 <thinking> 标签要闭合：</thinking>。",
            "写 [THINK] 这个词，再写 [/THINK]。",
            "`<think>` 开头，`</think>` 结尾。",
            "```xml\n<think>x</think>\n```",
            '{"error": "rate limit exceeded"}',
            "[1] 来源，[2] 另一个。",
            "[DONE]",
            "data: [DONE]",
            "< 5 的数有四个。",
            "<!DOCTYPE html>\n<p>好</p>",
            "<thead><tr></tr></thead>",
            "<p>好</p><answer>",
            "答案写在 <answer>好</answer>",
            '一行是 data: {"x": 1}',
            "最后一行是 data: [DONE]",
            "以 `<|im_end|>` 结束",
            "原价 <s>999 元</s>",
            "标签 <think> 之后，原价 <s>999 元</s>",
            "3 < 5",
            "Error: 429 too many requests 的意思是请求太多。",
        )
    },
    "no end": (["<think>秘密"], ""),
}


@pytest.mark.parametrize("name", THOUGHTS)
def test_a_thought_at_the_beginning_is_not_shown(name):
    """Whatever a model wraps it in; what only looks like one is shown."""
    deltas, shown = THOUGHTS[name]
    assert outcome(sse(*map(chunk, deltas), *END)) == (shown, "stop")


INSIDE = {
    "a thought": ("秘密</think>好的。", "stop", "好的。", True),
    "a thought with its tag": ("<think>秘密</think>好的。", "stop", "好的。", True),
    "two thoughts": ("秘密</think><think>秘密", "stop", "", False),
    "nothing but a closing tag": ("</think>好的。", "stop", "好的。", True),
    "an answer": ("好的。", "stop", "好的。", False),
    "a cut thought": ("秘密", "length", "", False),
    "a long answer": ("好" * 999, "stop", "好" * 999, False),
}


@pytest.mark.parametrize("name", INSIDE)
def test_an_answer_known_to_begin_inside_a_thought(name):
    """Nothing is shown before the closing tag; an answer without one is still shown."""
    content, finish, shown, is_so_again = INSIDE[name]
    raw = sse(chunk(content, finish))
    assert outcome(raw, closing="</think>") == (shown, finish)
    thoughts = wxgpt.ThoughtFilter("</think>")
    text = thoughts.feed(content) + thoughts.flush(finish == "length")
    assert (text, thoughts.unopened != "") == (shown, is_so_again)


# A finish_reason, what is behind it in the stream, and how the answer ends.
ENDS = {
    **dict.fromkeys(("stop", "STOP", "eos", "end_turn", "stop_sequence"), "stop"),
    **dict.fromkeys(("tool_calls", "completed", "FINISH_REASON_STOP"), "stop"),
    **dict.fromkeys(("FinishReason.STOP", "success", "eot_id"), "stop"),
    **dict.fromkeys(("COMPLETE", "eos_token", "normal", "end_of_turn"), "stop"),
    **dict.fromkeys(("length", "max_tokens", "MAX_TOKENS", "model_length"), "length"),
    **dict.fromkeys(("max_output_tokens", "token_limit"), "length"),
    **dict.fromkeys(("max_new_tokens", "max_length", "truncated"), "length"),
    **dict.fromkeys(("content_filter", "sensitive", "SAFETY", "refusal"), "refused"),
    **dict.fromkeys(("content_filter: PROHIBITED_CONTENT", "RECITATION"), "refused"),
    **dict.fromkeys(("BLOCKLIST", "content-filter", "IMAGE_SAFETY"), "refused"),
    **dict.fromkeys(("ERROR_TOXIC", "guardrail_intervened"), "refused"),
    **dict.fromkeys(("error", "network_error", "abort", "OTHER", "odd"), "broken"),
    **dict.fromkeys(("MALFORMED_FUNCTION_CALL", "user_cancelled"), "broken"),
    **dict.fromkeys(("engine_overloaded", "context_canceled", "unknown"), "broken"),
    **dict.fromkeys(("insufficient_system_resource", "rate_limit"), "broken"),
    "model_context_window_exceeded": "length",
}


@pytest.mark.parametrize("reason", ENDS)
def test_only_a_known_reason_is_a_good_end(reason):
    """Limits and filters are told by their kin, anything else has broken off."""
    assert outcome(sse(chunk("写到"), chunk("", reason))) == ("写到", ENDS[reason])


NATIVE = {"choices": [{"delta": {}, "finish_reason": "stop"}]}
ENDINGS = {
    "null, a sentence": (sse(chunk("好的。"), "[DONE]"), "stop"),
    "null, code": (sse(chunk("```\nx\n```\n"), "[DONE]"), "stop"),
    "null, in mid-sentence": (sse(chunk("好的，"), "[DONE]"), "length"),
    "null, in mid-word": (sse(chunk("好的"), chunk("\n"), "[DONE]"), "length"),
    "never named": (sse({"choices": [{"delta": {"content": "好"}}]}, "[DONE]"), "stop"),
    "nothing": (sse(chunk("好的。")), "early end"),
    "a reason that is empty": (sse(chunk("好", ""), chunk("", "stop")), "stop"),
    "a filter behind a stop": (
        sse(chunk("好", "stop"), chunk("", "content_filter")),
        "refused",
    ),
    "a window without room": (sse(chunk("", "model_context_window_exceeded")), "long"),
    "no room": (sse(chunk("", "length", usage={"completion_tokens": 0})), "long"),
    "thoughts alone": (
        sse(chunk("", "length", usage={"completion_tokens": 9})),
        "length",
    ),
    **{
        f"stop for {native}": (
            sse(
                chunk("好"),
                {"choices": [NATIVE["choices"][0] | {"native_finish_reason": native}]},
            ),
            kind,
        )
        for native, kind in (
            ("network_error", "broken"),
            ("SAFETY", "refused"),
            ("MAX_TOKENS", "length"),
            ("whatever", "stop"),
        )
    },
}


@pytest.mark.parametrize("name", ENDINGS)
def test_an_end_is_told_by_all_that_was_said(name):
    """Null reasons, none at all, and those that hide another one."""
    raw, kind = ENDINGS[name]
    assert outcome(raw)[1] == kind


# What comes with a status of 200 and is no answer, and the kind of its error.
FAILED_200 = {
    "a web page": (b"\n<!doctype html><title>New API</title>", "setup"),
    "an error": (json.dumps(failure("Insufficient Balance")).encode(), "setup"),
    "a text for an error": (b'{"error": "Invalid API key"}', "setup"),
    "a list": (json.dumps([failure("Quota", code=429)]).encode(), "busy"),
    "errors": (b'{"errors": [{"code": 401, "message": "x"}]}', "setup"),
    "base_resp, money": (
        b'{"choices":null,"base_resp":{"status_code":1008,"status_msg":"insufficient balance"}}',
        "setup",
    ),
    "base_resp, refused": (
        b'{"choices":null,"base_resp":{"status_code":1027,"status_msg":"x"}}',
        "refused",
    ),
    "base_resp, rate": (
        sse(
            {
                "choices": None,
                "base_resp": {"status_code": 1002, "status_msg": "rate limit"},
            }
        ),
        "busy",
    ),
    "a field of its own": (b'error: {"code":400,"message":"x"}\n\n', "setup"),
    "an event without choices": (
        b'event:error\n:HTTP_STATUS/400\ndata:{"code":"InvalidParameter","message":'
        b'"Range of input length should be [1, 30720]"}\n\n',
        "long",
    ),
    "a choice": (sse({"choices": [{"error": {"code": 502, "message": "x"}}]}), "busy"),
    "a kind of event": (sse({"type": "error", "message": "Overloaded"}), "busy"),
    "behind text": (
        sse(chunk("写"), failure("x", code="data_inspection_failed")),
        "refused",
    ),
    "behind text, its provider": (
        sse(chunk("写"), failure("Upstream idle timeout", code=502)),
        "busy",
    ),
    "a web page behind text": (
        sse(chunk("写")) + b"<html>\n<title>504 Gateway Time-out</title>\n</html>",
        "early end",
    ),
    "words in an event": (
        b"event: error\ndata: Internal Server Error\n\n",
        "early end",
    ),
    "JSON of words": (b'"insufficient balance"', "early end"),
    "nothing but the words of it": (b'{"detail": "Not Found"}', "early end"),
    "words without an error": (sse({"detail": "Content Exists Risk"}), "early end"),
    "a code by another name": (
        sse({"error_code": 18, "error_msg": "qps limit"}),
        "busy",
    ),
    "nobody knows": (sse(failure("x")), "broken"),
    "half an event": (sse(chunk("写"), '{"choi'), "broken"),
    "nothing": (b"", "early end"),
    "words": (b"insufficient balance", "early end"),
}


@pytest.mark.parametrize("name", FAILED_200)
def test_an_error_in_a_200_is_told_by_what_it_says(name):
    """Wherever it stands, and whatever shape it has."""
    raw, kind = FAILED_200[name]
    assert outcome(raw)[1] == kind


# What comes instead of an answer: its status, its meaning (a kind, or the setting to look
# at; later: not over while somebody waits), a name, a code, and words or a whole body.
ANSWERS = r"""
429 | busy | OpenAI, minute | rate_limit_exceeded | Rate limit reached for gpt-x on tokens per min (TPM): Limit 200000, Used 199000, Requested 5000. Please try again in 1.2s.
429 | later | OpenAI, day | - | Rate limit reached on requests per day (RPD): Limit 200, Used 200.
403 | proxy | OpenAI, place | unsupported_country_region_territory | x
429 | api_key | OpenAI, billing | billing_hard_limit_reached | x
400 | refused | OpenAI, safety | - | Your request was rejected as a result of our safety system.
400 | long | OpenAI, one string | string_above_max_length | Invalid 'messages[1].content': string too long. Expected a string with maximum length 10485760.
404 | model | OpenAI, no chat model | - | This is not a chat model and thus not supported in the v1/chat/completions endpoint.
404 | model | OpenAI, responses only | - | This model is only supported in v1/responses and not in v1/chat.
429 | busy | Azure, minute | 429 | Requests to the ChatCompletions_Create Operation under Azure OpenAI API have exceeded token rate limit of your current S0 pricing tier. Please retry after 6 seconds.
401 | api_key | Azure, key | - | Access denied due to invalid subscription key or wrong endpoint.
400 | model | DeepSeek, model | - | Model Not Exist
401 | api_key | DeepSeek, key | - | Authentication Fails, Your api key: ****x is invalid
422 | blind | DeepSeek, a picture | - | Failed to deserialize the JSON body into the target type: messages[1]: unknown variant `image_url`, expected `text` at line 1 column 123
429 | busy | Qwen, rate | limit_burst_rate | Request rate increased too quickly.
429 | later | Qwen, week | - | week allocated quota exceeded.
429 | later | Qwen, hours | - | hour allocated quota exceeded.
400 | model | Qwen, plan | - | model 'qwen-x' is not supported
400 | refused | Qwen, inspected | - | <400> InternalError.Algo.DataInspectionFailed: x
400 | refused | Qwen, inspected, in Chinese | - | 输入文本数据可能包含不适当的内容！
500 | busy | Qwen, internal | - | An internal error has occured.
429 | busy | Kimi, at once | rate_limit_reached_error | Your account org-x request reached max organization concurrency: 1, please try again after 1 seconds
429 | later | Kimi, day | - | Your account request reached TPD rate limit, current: 2, limit: 1
404 | model | Kimi, model | - | Not found the model kimi-x or Permission denied
400 | long | Kimi, long | - | Input token length too long
400 | model | GLM, model | 1211 | 模型不存在，请检查模型代码。
429 | busy | GLM, crowded | 1312 | 该模型当前访问量过大，请您稍后再试
429 | later | GLM, week | 1310 | 您已达到每周/每月使用上限，您的限额将在周一重置
429 | api_key | GLM, plan | 1311 | 当前订阅套餐暂未开放GLM-5权限
401 | api_key | GLM, locked | 1121 | 账户存违规行为，账号已被锁定
401 | api_key | GLM, token | 401 | 令牌已过期或验证不正确！
429 | busy | Ark, minute | RateLimitExceeded.EndpointTPMExceeded | The request failed because you have exceeded the Tokens Per Minute limit of the associated endpoint for your account.
429 | api_key | Ark, free trial | QuotaExceeded | Your account 1 has exhausted its free trial quota for the model doubao-x, and its service has been paused.
429 | api_key | Ark, own limit | SetLimitExceeded | Your account 1 has reached the set inference limit for the doubao-x model, and the model service has been paused.
404 | model | Ark, not open | ModelNotOpen | Your account has not activated the model.
400 | model | Ark, closed | InvalidEndpoint.ClosedEndpoint | The request targeted an endpoint that is currently closed.
400 | refused | Ark, output | OutputTextSensitiveContentDetected | x
400 | long | Ark, long | - | Total tokens of image and text exceed max message tokens.
400 | long | MiniMax, long | - | invalid params, context window exceeds limit (2013)
200 | busy | MiniMax, minute | - | {"base_resp": {"status_code": 1039, "status_msg": "token limit"}}
200 | api_key | MiniMax, key | - | {"base_resp": {"status_code": 1004, "status_msg": "login fail: no secret key"}}
200 | broken | MiniMax, time | - | {"base_resp": {"status_code": 1001, "status_msg": "request timeout"}}
400 | api_key | Hunyuan, pack | FailedOperation.FreeResourcePackExhausted | 免费资源包余量已用尽，请购买资源包或开通后付费。
400 | api_key | Hunyuan, who | FailedOperation.UserUnAuthError | 用户未实名认证
400 | api_key | Hunyuan, not open | FailedOperation | 服务未开通，请前往控制台申请开通。
400 | refused | Hunyuan, refused | OperationDenied.TextIllegalDetected | 文本包含违法信息
400 | long | Qianfan, tokens | tokens_too_long | Prompt tokens too long
400 | long | Qianfan, characters | characters_too_long | the max input characters is 10000
200 | busy | Qianfan, rate | - | {"code": 336501, "msg": "Rate limit reached for RPM"}
200 | api_key | Qianfan, old | - | {"error_code": 110, "error_msg": "Access token invalid or no longer valid"}
498 | busy | Groq, flex | capacity_exceeded | Flex tier x
403 | proxy | Groq, network | - | Access denied. Please check your network settings.
400 | extra | Groq, a field and the window | - | `max_tokens` must be less than or equal to `8192`, the maximum value for `max_tokens` is less than the `context_window` for this model
400 | extra | vLLM, a field and the window | - | 'max_tokens' or 'max_completion_tokens' is too large: 9000. This model's maximum context length is 8192 tokens
400 | blind | vLLM, a picture | - | At most 0 image(s) may be provided in one prompt.
400 | long | vLLM, long | - | The decoder prompt (length 5000) is longer than the maximum model length
422 | long | Together, long | - | Input validation error: `inputs` tokens + `max_new_tokens` must be <= 32769. Given: 40000 `inputs` tokens
404 | model | Together, model | model_not_available | Unable to access x. See the list.
412 | api_key | Fireworks, suspended | - | Account x is suspended, possibly due to reaching the spending limit.
404 | model | Fireworks, model | - | Model not found, inaccessible, and/or not deployed
402 | api_key | OpenRouter, credits | - | This request requires more credits, or fewer max_tokens. You requested up to 65536 tokens, but can only afford 1200.
429 | later | OpenRouter, free models | - | Rate limit exceeded: free-models-per-day. Add 10 credits
403 | api_key | OpenRouter, key limit | - | Key limit exceeded (total limit).
404 | model | OpenRouter, data policy | - | {"error": {"message": "No endpoints available matching your guardrail restrictions and data policy.", "code": 404}}
404 | blind | OpenRouter, a picture | - | {"error": {"message": "No endpoints found that support image input", "code": 404}}
400 | long | OpenRouter, inner words | - | {"error": {"message": "Provider returned error", "code": 400, "metadata": {"raw": "{\"message\": \"prompt is too long: 9 > 8\"}"}}}
403 | proxy | Cloudflare, a challenge | - | <p>Just a moment... Enable JavaScript
403 | proxy | Cloudflare, a wall | - | <p>Sorry, you have been blocked
429 | busy | Cloudflare, 1015 | - | <p>Error 1015 You are being rate limited
524 | busy | Cloudflare, 524 | - | <p>524: A timeout occurred
429 | later | Cloudflare, day | - | {"errors": [{"message": "you have used up your daily free allocation"}]}
400 | model | Cloudflare, model | - | {"errors": [{"message": "No such model @cf/x or task", "code": 5007}]}
424 | refused | Cloudflare, blocked | - | {"error": [{"code": 2016, "message": "Prompt blocked due to security settings"}]}
429 | busy | Cloudflare, crowded | - | {"errors": [{"message": "Capacity temporarily exceeded", "code": 3040}]}
502 | busy | nginx, 502 | - | <p>502 Bad Gateway nginx/1.22.1
413 | long | nginx, 413 | - | <p>413 Request Entity Too Large nginx
405 | base_url | nginx, 405 | - | <p>405 Not Allowed nginx
500 | blind | llama.cpp, a picture | - | image input is not supported - hint: you may need the mmproj
503 | busy | llama.cpp, loading | - | {"error": {"message": "Loading model", "code": 503, "type": "unavailable_error"}}
404 | model | Ollama, model | not_found | model 'x' not found
429 | api_key | LiteLLM, budget | - | Budget has been exceeded! Current cost: 1.2, Max budget: 1.0
429 | busy | LiteLLM, no deployment | - | No deployments available for selected model, Try again in 5 seconds.
400 | model | LiteLLM, model | - | Invalid model name passed in model=x.
400 | api_key | Anthropic, money | - | Your credit balance is too low
429 | busy | Bedrock, rate | - | Too many tokens, please wait before trying again.
403 | api_key | new-api, used up | - | 该令牌额度已用尽
500 | model | new-api, no price | model_price_error | 模型 x 倍率或价格未配置，请联系管理员设置
403 | api_key | new-api, forbidden | - | 该令牌无权访问模型 x
400 | refused | a policy | - | The prompt violates our content policies.
400 | extra | not a refusal | - | Names are case-insensitive.
400 | refused | blocked, in Chinese | - | 您的输入已被内容安全拦截
400 | proxy | Gemini, place | - | [{"error": {"message": "User location is not supported for the API use.", "code": 400, "status": "FAILED_PRECONDITION"}}]
404 | model | Gemini, model | - | [{"error": {"message": "models/gemini-x is not found for API version v1main, or is not supported for generateContent.", "code": 404, "status": "NOT_FOUND"}}]
503 | busy | Gemini, overloaded | - | [{"error": {"message": "The model is overloaded.", "code": 503, "status": "UNAVAILABLE"}}]
403 | api_key | Gemini, not enabled | - | [{"error": {"message": "Generative Language API has not been used in project 1 before."}}]
403 | refused | ModelArts, refused | - | {"error_code": "ModelArts.81011", "error_msg": "May contain sensitive information."}
429 | busy | ModelArts, rate | - | {"error_code": "ModelArts.81101", "error_msg": "Too many requests, exceeded rate limit is 3 times per minute."}
200 | long | Spark, length | - | {"code": 10907, "message": "token数超过上限"}
200 | busy | Spark, busy | - | {"code": 10110, "message": "服务忙，请稍后再试"}
403 | api_key | SiliconFlow, money | - | {"code": 30001, "message": "Sorry, your account balance is insufficient"}
429 | busy | SiliconFlow, rate | - | {"message": "Request was rejected due to rate limiting. TPM limit reached."}
403 | model | SiliconFlow, model | - | {"code": 30003, "message": "Model disabled."}
403 | api_key | PPIO, money | - | {"code": 403, "reason": "NOT_ENOUGH_BALANCE", "message": "x"}
429 | busy | PPIO, minute | - | {"code": 429, "reason": "TOKEN_LIMIT_EXCEEDED", "message": "Token limit exceeded"}
429 | busy | Mistral, tier | - | {"object": "error", "message": "Service tier capacity exceeded for this model."}
400 | long | Mistral, long | - | {"object": "error", "message": "Prompt contains 40000 tokens and 0 draft tokens, too large for model with 32768 maximum context length", "code": "3051"}
400 | model | Mistral, model | - | {"object": "error", "message": "Invalid model: x", "type": "invalid_model"}
400 | long | Cerebras, long | - | {"message": "Please reduce the length of the messages or completion."}
400 | api_key | xAI, key | - | {"code": "Client specified an invalid argument", "error": "Incorrect API key"}
429 | later | Cohere, trial | - | {"message": "You are using a Trial key, limited to 1000 API calls / month."}
400 | long | Cohere, long | - | {"message": "too many tokens: tokens in the prompt cannot exceed 128000"}
402 | api_key | NVIDIA, money | - | {"status": 402, "title": "Payment Required", "detail": "Cloud credits expired"}
429 | busy | NVIDIA, a title | - | {"status": 429, "title": "Too Many Requests"}
400 | long | SGLang, long | - | {"object": "error", "message": "The input_ids length 140000 exceeds 131072"}
404 | model | LM Studio, model | - | {"error": {"message": "No models loaded.", "param": "model", "code": "model_not_found"}}
400 | blind | LM Studio, a picture | - | {"error": "Model does not support images."}
200 | broken | TGI, in a stream | - | {"error": "Request failed during generation: CUDA", "error_type": "generation"}
200 | api_key | FastGPT, key | - | {"code": 514, "statusText": "unAuthApiKey", "message": "Key is illegal"}
400 | api_key | Dify, quota | - | {"code": "provider_quota_exceeded", "message": "Your quota for Dify Hosted OpenAI has been exhausted."}
200 | api_key | a body of its own | - | {"success": false, "message": "Insufficient credits"}
429 | busy | Groq, minute, and an offer | rate_limit_exceeded | Rate limit reached on tokens per minute (TPM): Limit 6000, Used 5900. Please try again in 8s. Upgrade to Dev Tier today at x
429 | later | Gemini, day | - | [{"error": {"code": 429, "message": "You exceeded your current quota. Please retry in 40.1s.", "details": [{"quotaId": "GenerateRequestsPerDayPerProjectPerModel-FreeTier"}]}}]
429 | later | ModelScope, day | - | {"errors": {"message": "You have exceeded today's quota for model X, please try again tomorrow"}}
429 | later | MiniMax, hours | - | usage limit exceeded, 5-hour usage limit reached for Token Plan (2056)
429 | later | a long wait | - | Rate limit reached. Please try again in 11m31s.
400 | busy | a gateway, what is behind it | - | Error from provider (Console Go): Upstream request failed
400 | busy | a crowd, in Chinese | - | 请求过快，请稍后再试
200 | busy | any failure, in Chinese | - | {"code": -1, "msg": "服务器开小差了，请稍后重试"}
200 | busy | Qianfan, per second | - | {"error_code": 18, "error_msg": "Open api qps request limit reached"}
200 | busy | Qianfan, busy | - | {"error_code": 336100, "error_msg": "Server is busy, try again later"}
499 | busy | 499 | - | x
503 | busy | DeepSeek, resources | - | Insufficient system resources
200 | api_key | Spark, licence | - | {"code": 11200, "message": "licc failed"}
401 | api_key | ModelScope, token | - | Authentication failed, please make sure that a valid ModelScope token is supplied.
401 | api_key | Azure, key and region | - | Access denied due to invalid subscription key. Use a correct regional API endpoint.
403 | api_key | Gemini, a method | - | Requests to this API method StreamGenerateContent are blocked.
400 | api_key | Dify, quota | - | The quota has been exceeded.
400 | api_key | money, in Chinese | - | 账户资金不足
400 | api_key | a pack | - | 当前账号没有可用的资源包
429 | api_key | used up | - | 您的套餐用量已耗尽，请升级套餐
400 | api_key | revoked | - | This key has been revoked
404 | model | Azure, deployment | DeploymentNotFound | The API deployment for this resource does not exist.
404 | model | Anthropic, model | not_found_error | model: claude-9
410 | model | NVIDIA, gone | - | {"status": 410, "title": "Gone", "detail": "The model has reached its end of life"}
404 | model | Cohere, gone | - | {"message": "model 'command-r' was removed on September 15, 2025."}
400 | model | Groq, terms | model_terms_required | The model x requires terms acceptance.
400 | model | Cloudflare, access | - | {"errors": [{"message": "This account is not allowed to access this model", "code": 5018}]}
404 | model | Ark, plan | UnsupportedModel | The x model does not support the coding plan feature.
400 | model | a model, in Chinese | - | 不支持的模型: x
400 | model | a model that is off | - | 请求的模型不可用
400 | refused | Hunyuan, rules | - | 内容不合规，请检查
400 | refused | a safety check, in Chinese | - | 内容未通过安全检测
400 | refused | a review, in Chinese | - | 文本审查未通过
400 | refused | forbidden words, in Chinese | - | 提问中包含违禁词
400 | refused | an audit | - | 10013:input content audit failed
400 | refused | terms | - | This request violates our terms of service
400 | refused | filtered | - | The content is filtered
400 | refused | a safety filter | - | Request rejected by safety filter
200 | long | Qianfan, question | - | {"error_code": 336007, "error_msg": "the max length of current question is 2000"}
400 | long | Gemini, payload | - | Request payload size exceeds the limit: 20971520 bytes.
500 | long | llama.cpp, shift | - | context shift is disabled
422 | long | TGI, long | - | {"error": "Input validation error: `inputs` must have less than 4095 tokens. Given: 5000"}
400 | long | vLLM, model length | - | num_tokens 40000 > max_model_len 32768
400 | long | too long, in Chinese | - | 消息长度超过最大限制
400 | long | talk, in Chinese | - | 历史消息过多
400 | blind | GLM, a picture | 1210 | content.type 参数非法，取值范围 ['text']
400 | blind | Groq, a picture | - | messages[1].content must be a string
422 | blind | FastAPI, a picture | - | {"detail": [{"type": "string_type", "loc": ["body", "messages", 0, "content"], "msg": "Input should be a valid string"}]}
400 | blind | vLLM, an extra picture | - | 1 validation error: [{'type': 'extra_forbidden', 'loc': ('body', 'messages', 1, 'content', 1, 'image_url'), 'msg': 'Extra inputs are not permitted'}]
400 | blind | pictures | - | Images are not supported by this model
400 | blind | pictures, in Chinese | - | 当前模型无法识别图片
400 | picture | OpenAI, not read | image_parse_error | You uploaded an unsupported image. Please make sure your image is valid.
400 | picture | Anthropic, not read | - | Could not process image
400 | picture | Ark, too large | InvalidParameter.OversizedImage | The size of the input image exceeds the limit.
400 | picture | GLM, not read | 1210 | 图片输入格式/解析错误
400 | picture | Qwen, too small | - | The image length and width do not meet the model restrictions.
403 | proxy | Anthropic, place | - | Request not allowed
403 | proxy | Cloudflare, 1020 | - | <p>error code: 1020
426 | base_url | https, 426 | - | <p>Upgrade Required
400 | base_url | https, 400 | - | <p>400 The plain HTTP request was sent to HTTPS port
500 | extra | one-api, a field behind it | - | Unrecognized request argument supplied: stream_options
400 | extra | a role | - | Last message must have role user
400 | extra | a field of safety | - | safety_identifier is not known
200 | api_key | Coze, token | - | {"code": 700012006, "msg": "access token invalid"}
"""


def read_answers():
    """Return for each name of the table a status, a body, and what it means."""
    for line in ANSWERS.strip().splitlines():
        status, meaning, name, code, words = line.split(" | ")
        body = failure(words) if code == "-" else failure(words, code=code)
        if words[0] in "{[":
            body = json.loads(words)
        yield name, (int(status), words if words[0] == "<" else body, meaning)


ANSWER_OF = dict(read_answers())


def meaning_of(error):
    """Return the kind of an error, or its setting, or that it passes later."""
    if error.kind == "busy" and not error.is_retryable:
        return "later"
    assert error.is_retryable == (error.kind in ("busy", "broken"))
    return error.setting or error.kind


@pytest.mark.parametrize("name", ANSWER_OF)
def test_an_error_is_told_by_its_words(name):
    """Whatever a provider calls what went wrong."""
    status, body, meaning = ANSWER_OF[name]
    if status != 200:
        assert meaning_of(wxgpt.make_error(status, body, {})) == meaning
        return
    completion = wxgpt.Completion("some-model")
    completion.feed(json.dumps(body).encode())
    with pytest.raises(wxgpt.ChatError) as raised:
        completion.feed(b"")
        raise completion.error or completion.ending()
    assert meaning_of(raised.value) == meaning


# The words of a refusal, the fields of a request, and the one that is refused.
FIELDS = {
    "Go": ('json: unknown field "stream_options"', {}, "stream_options"),
    "words": ("Stream options are not supported.", {}, "stream_options"),
    "a schema": (
        "Additional properties are not allowed ('reasoning_effort' was unexpected)",
        {"reasoning_effort": "none"},
        "reasoning_effort",
    ),
    "vLLM": (
        "1 validation error for ChatCompletionRequest\nenable_thinking\n  Extra inputs",
        {"enable_thinking": False},
        "enable_thinking",
    ),
    "Fireworks": (
        "Extra inputs are not permitted, field: 'thinking', value: {}",
        {"thinking": {}},
        "thinking",
    ),
    "Groq": (
        "`reasoning_effort` must be one of `low`, `medium`, or `high`",
        {"reasoning_effort": "none"},
        "reasoning_effort",
    ),
    "OpenRouter": (
        "Reasoning is mandatory for this endpoint and cannot be disabled.",
        {"reasoning": {"enabled": False}},
        "reasoning",
    ),
    "Ollama": (
        'invalid think value: "none" (must be "high", "medium", "low")',
        {"reasoning_effort": "none"},
        "reasoning_effort",
    ),
    "xAI": (
        "Argument not supported on this model: presencePenalty",
        {"presence_penalty": 1},
        "presence_penalty",
    ),
    "Kimi": (
        "invalid temperature: only 1 is allowed for this model",
        {"temperature": 0.5},
        "temperature",
    ),
    "Anthropic": (
        "`temperature` and `top_p` cannot both be specified for this model.",
        {"top_p": 1, "temperature": 1},
        "temperature",
    ),
    "Qwen": (
        'The incremental_output parameter must be "true" when enable_thinking is true',
        {"enable_thinking": True},
        "enable_thinking",
    ),
    "GLM": ("do_sample参数非法。请检查文档。", {"do_sample": 1}, "do_sample"),
    "LiteLLM": (
        "UnsupportedParamsError: openai does not support parameters: ['top_k'], for x",
        {"top_k": 1},
        "top_k",
    ),
    "Ark": (
        "当前模型不支持关闭深度思考",
        {"thinking": {"type": "disabled"}},
        "thinking",
    ),
    "safety": (
        "Unrecognized request argument supplied: safety_identifier",
        {"safety_identifier": "x"},
        "safety_identifier",
    ),
    "a name alone": ("Invalid 'user': string too long.", {"user": "x" * 99}, "user"),
    "roles": ("user and assistant roles should be alternating", {}, ""),
}


@pytest.mark.parametrize("name", FIELDS)
def test_a_refused_field_is_left_out(name):
    """However its refusal is worded."""
    words, extra, field = FIELDS[name]
    made = wxgpt.AssistantSettings(api_key="x", model="m", extra=extra)
    client = wxgpt.ChatClient(made, None)
    error, sent = wxgpt.make_error(400, failure(words), {}), client.options
    assert client.leave_out(error, sent) == field
    assert set(sent) - set(client.options) == ({field} if field else set())


EVERYTHING = {
    **FORMS,
    **{f"ending: {name}": raw for name, (raw, _) in ENDINGS.items()},
    **{f"error: {name}": raw for name, (raw, _) in FAILED_200.items()},
    **{
        f"thought: {name}": sse(*map(chunk, deltas), *END)
        for name, (deltas, _) in THOUGHTS.items()
    },
}


@pytest.mark.parametrize("name", EVERYTHING)
@settings(max_examples=20)
@given(st.data())
def test_a_body_is_read_in_any_pieces(name, data):
    """Wherever it is torn, its text and its end are the same."""
    raw = EVERYTHING[name]
    cuts = data.draw(st.sets(st.integers(1, max(1, len(raw) - 1)), max_size=40))
    cuts = [cut for cut in cuts if cut < len(raw)]
    assert outcome(raw, cuts) == outcome(raw)


@pytest.mark.parametrize("name", THOUGHTS)
@settings(deadline=None)
@given(st.data())
def test_a_thought_is_dropped_in_any_deltas(name, data):
    """Wherever a provider cuts its text."""
    deltas, shown = THOUGHTS[name]
    text = "".join(deltas)
    cuts = sorted(data.draw(st.sets(st.integers(1, len(text) - 1), max_size=40)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)])]
    assert outcome(sse(*map(chunk, pieces), *END)) == (shown, "stop")
