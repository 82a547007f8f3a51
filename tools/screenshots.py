"""Takes the screenshots of docs/: python tools/screenshots.py [FOLDER].

Needs Chromium at CHROMIUM (default /usr/bin/chromium) and the package playwright.
"""

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
LIVE = """去青岛三天，可以这样安排：

- **第一天看老城**：从栈桥走到信号山，红瓦绿树尽收眼底，傍晚在大学路喝杯咖啡。
- **第二天去崂山**：早上坐车到仰口，上午人少。

| 要带的 | 为什么 |
|---|---|
| 薄外套 | 山上风大 |
| 公交卡 | 去仰口要换"""


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
        _, port = await stack.enter_async_context(opened)
        server = await stack.enter_async_context(platform(port))
        tools = await stack.enter_async_context(async_playwright())
        browser = await tools.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        await server.ask("/chatgpt")
        await server.ask("你好，你能做什么？")
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
    target = pathlib.Path(sys.argv[1] if len(sys.argv) > 1 else "docs")
    target.mkdir(exist_ok=True)
    asyncio.run(main(target))
