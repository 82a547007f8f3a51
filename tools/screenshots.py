"""Takes the screenshots of docs/: python tools/screenshots.py [FOLDER].

Needs Chromium at CHROMIUM (default /usr/bin/chromium) and the package playwright.
"""

import argparse
import asyncio
import contextlib
import os
import pathlib
import sys
import tempfile

from playwright.async_api import Browser, async_playwright

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / name) for name in ("tests/sim", "tests", "")]

import wxgpt
from conftest import ANN, TOKEN, platform, toml
from fake_openai import FakeOpenAI, Script, says

CHROMIUM = os.environ.get("CHROMIUM", "/usr/bin/chromium")
ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
ARGUMENTS += ["--disable-background-networking", "--disable-component-update"]
FINISHED = """快速排序的思路是**分而治之**：挑一个基准，小的放左边，大的放右边，再对两边做同样的事。

```python
def quicksort(items: list[int]) -> list[int]:
    if len(items) < 2:
        return items
    pivot, rest = items[0], items[1:]
    small = [item for item in rest if item < pivot]
    large = [item for item in rest if item >= pivot]
    return quicksort(small) + [pivot] + quicksort(large)
```

| 情况 | 比较次数 | 说明 |
|---|---|---|
| 平均 | n log n | 基准大致居中 |
| 最坏 | n² | 已经排好序，又总挑第一个 |

1. 基准**随机**挑，最坏情况几乎不会出现；
2. 短列表（十几个以内）改用插入排序；
3. 重复元素多时用三路划分。

> 标准库的 `sorted` 用的是 Timsort，日常直接用它就好。
"""
LIVE = """去青岛三天，**一天一个片区**最省心：

| 天 | 去哪儿 | 花费 |
|---|---|--:|
| 一 | 老城 | 120 元 |
| 二 | 崂山 | 260 元 |
| 三 | 海边 | 80 元 |

## 第一天：老城

从栈桥走到信号山，红瓦绿树尽收眼底，傍晚在大学路喝杯咖啡。

## 第二天：崂山

1. 早上坐车到仰口，上午人少；
2. 山上风大，记得带一件"""
DINNER = """试试**番茄炒蛋**，十分钟就好：

- 番茄两个，切块
- 鸡蛋三个，打散先炒
"""
POEM = "用「春」字开头的诗句有 $3$ 句常见：春眠不觉晓；春色满园关不住；春江水暖鸭先知。"


async def shoot(browser: Browser, url: str, path: pathlib.Path, dark: bool) -> None:
    """Take one page as a phone shows it."""
    page = await browser.new_page(
        color_scheme="dark" if dark else "light",
        viewport={"width": 390, "height": 780},
        device_scale_factor=2,
    )
    await page.goto(url)
    await asyncio.sleep(2)
    await page.screenshot(path=path)
    await page.close()


async def main(folder: pathlib.Path) -> None:
    """Ask what the pictures show, and take them."""
    async with contextlib.AsyncExitStack() as stack:
        fake = await stack.enter_async_context(FakeOpenAI())
        state = stack.enter_context(tempfile.TemporaryDirectory())
        table = {
            "public_url": "http://127.0.0.1",
            "server": {"port": 0},
            "wechat": {"token": TOKEN, "attempt_timeout": 0.5},
            "assistants": {
                "chatgpt": {
                    "base_url": fake.base_url,
                    "api_key": "-",
                    "model": "gpt-6-luna",
                }
            },
            "database": {"path": f"{state}/wxgpt.db"},
        }
        settings = pathlib.Path(state) / "wxgpt.toml"
        settings.write_text(toml(table), "utf-8")
        opened = wxgpt.open_server(wxgpt.load_config(settings))
        bot, port = await stack.enter_async_context(opened)
        server = await stack.enter_async_context(platform(port))
        tools = await stack.enter_async_context(async_playwright())
        browser = await tools.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        fake.will(says(POEM), when="诗")
        await server.ask("/chatgpt 哪些诗用「春」字开头？")
        await bot.store.rows("UPDATE turn SET created_at = created_at - 86400")
        await server.ask("/clear")
        fake.will(says(DINNER), when="晚饭")
        await server.ask("晚饭做什么好？家里只有番茄和鸡蛋")
        fake.will(says(FINISHED), when="快速排序")
        done = await server.wechat.send(ANN, "讲讲快速排序，给一段 Python 代码")
        fake.will(Script([LIVE, asyncio.Event()]), when="青岛")
        live = await server.ask("周末去青岛玩三天，怎么安排？")
        history = await server.ask("/history")
        shots = {
            "live": (live.links[0][1], False),
            "answer": (done.links[0][1], False),
            "answer-dark": (done.links[0][1], True),
            "history": (history.links[0][1], False),
        }
        for name, (url, dark) in shots.items():
            await shoot(browser, server.at(url), folder / f"{name}.png", dark)
        await browser.close()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", nargs="?", default="docs", type=pathlib.Path)
    target = parser.parse_args().folder
    target.mkdir(exist_ok=True)
    asyncio.run(main(target))
