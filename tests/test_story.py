"""One subscriber's day, and what the log tells of it."""

import asyncio

from conftest import ANN, LONG, SENTENCE, TEXTS, TOKEN, said
from fake_openai import Script, fails


async def test_a_subscribers_day(spawn, upstream):
    """From the first hello to the history; the log then gives nothing of it away."""
    hint = {"outside": "在的！发 /chatgpt"}
    server, process = await spawn(wechat={"reply_margin": 0.2}, replies=hint)
    gate, links = asyncio.Event(), []

    async def ask(text):
        seen = await server.ask(text)
        links.extend(url for _, url in seen.links)
        assert not seen.faulty
        return seen

    async def tap(seen):
        return await ask(seen.taps[0].content)

    # Morning: follows, says hello, is told how to begin, and opens a conversation.
    welcome = await server.wechat.deliver(server.wechat.event(ANN, "subscribe"))
    assert "/chatgpt" in welcome.text
    assert (await ask("早上好呀")).text == hint["outside"]
    assert "由 AI 生成" in (await ask("/chatgpt")).text

    # A quick answer, then one that takes longer than WeChat waits.
    upstream.will("吃**热汤面**吧。", Script([gate, "因为天气冷。"]))
    assert (await ask("中午吃什么好？")).text == "吃热汤面吧。\n（AI 生成）"
    patience = await ask("为什么呢？")
    assert said("thinking") in patience.text and patience.attempt == 3
    gate.set()
    assert (await tap(patience)).text.startswith("因为天气冷。")
    assert upstream.requests[1].messages[-2]["content"] == "吃**热汤面**吧。"

    # A long answer is read in parts, each by a tap.
    upstream.will(LONG)
    part = await ask("怎样身体好？")
    shown = part.text
    while part.taps:
        part = await tap(part)
        shown += part.text
    assert [n for n in range(60) if shown.count(f"第{n}句：{SENTENCE}") != 1] == []

    # The model fails, though not for ever.
    upstream.will(fails(401), "想好了。")
    failed = await ask("还有别的吗？")
    assert failed.taps[0].label == TEXTS.word_retry
    assert (await tap(failed)).text.startswith("想好了。")

    # Evening: reads everything again, and ends the conversation.
    [(_, history)] = (await ask("/history")).links
    status, page = await server.get(history)
    assert status == 200 and "<strong>热汤面</strong>" in page and ANN not in page
    assert said("stopped") in (await ask("/stop")).text
    assert (await ask("晚安啦")).text is None
    assert await process.end() == 0

    log = "".join(process.log)
    words = ["早上好", "中午吃", "热汤面", "为什么", "天气冷", "身体好", "风景", "晚安"]
    keys = [url.rpartition("/")[2] for url in links]
    secrets = [ANN, TOKEN, "sk-verySecret", "还有别的", "想好了", *words, *keys]
    assert [secret for secret in secrets if secret in log] == []
    assert len(keys) > 2 and log.count(ANN[:8]) > 5
