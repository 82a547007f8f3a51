"""Play the subscriber in a terminal: the real server, a simulated WeChat and model.

    python wxgpt.py demo
    printf '/chatgpt\n慢慢想 7 秒\n/history\n' | python wxgpt.py demo
    python wxgpt.py demo --base-url http://127.0.0.1:11434/v1 --model qwen3 --key none

The main thread reads lines. Everything else is one task on an event loop in a second
thread: it opens the fake model, the server and the phone, and closes them in reverse
order whatever happens.
"""

import signal

if __name__ == "__main__":  # Ctrl-C waits until `talk` handles it without a traceback
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])

import argparse
import asyncio
import contextlib
import functools
import getpass
import html
import json
import os
import re
import sys
import tempfile
import time
import tomllib
import urllib.parse
import webbrowser
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any, Self

import aiohttp

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / name) for name in ("", "tests/sim", "tools")]

from child import Child, ChildError, is_healthy, read_platform, usual_port
from fake_openai import FakeOpenAI, Script, fails, says
from owner.commands import Parser
from owner.words import tell
from picture_host import PictureHost
from terminal import DIM, Lines, Screen, talk
from wechat import ANCHOR, Seen, Tap, WeChat, parse_tap
from wxgpt import set_up_streams

TICK_SECONDS = 0.1  # how often the clock on the screen moves
FOLLOW_SECONDS = 30.0  # how long an answer's page is followed
HEAD_START_SECONDS = 0.5  # for a question in the background, before the next line
DELAY = re.compile(r"(\d+(?:\.\d+)?)\s*(?:秒|s)")
OUTCOMES = {
    "answered": "已应答",
    "timeout": "超时",
    "refused": "连不上：服务器没在运行",
    "reset": "断开",
}

INTRO = """\
你关注了一个公众号，回答你的是{model}。
微信每次请求只等 5 秒，一条消息最多请求 3 次。先发 /chatgpt，再随便问。
{hint}回复里的 [1] 可以点：输入 1 就是点它。网页在浏览器里打开，或者发 /open 1。
/help 是公众号的用法，/demo 是这个演示自己的命令，/quit 离开。"""
FAKE_HINT = "试试「慢慢想 7 秒」「慢慢想 20 秒」「写一篇长文」「失败」。\n"
SSH_HINT = """
网页在这台服务器上。要在自己的电脑上打开，就在那里先运行：
  ssh -N -L {port}:127.0.0.1:{port} {user}@{host}"""
HELP = """\
问题 &      在后台发送，不等回复就能发下一句
/wait       等后台的回复都到
/open N     打开网页 N，看它写完
/open me    在浏览器里接着问：打开自己的网页，用上面的数字登录
/restart    kill -9 服务器再启动，回答到一半时也行
/image FILE 发一张图片
/follow     关注公众号　/unfollow 取消关注
/quit       离开；演示启动的服务器和数据什么也不留下"""
FAKE_HELP = """
假模型：问题里写「7 秒」或「7s」就想 7 秒，写「长」答一篇长文，写「失败」出错"""
PORT = 18080  # of the server, so that an `ssh -L` stays right the next time
SHORT_ANSWER = """\
关于「{question}」：{thought}我是演示用的假模型，只会说这一段。\
想和真模型聊，加上 --base-url、--model 和 --key 再运行。"""
LONG_ANSWER = ROOT / "tests" / "sim" / "long_answer.md"


def fake_answer(question: str, speed: float, seconds: float) -> Script:
    """Return the fake model's answer; the question may ask for a delay, length, error."""
    if "失败" in question:
        return fails(500)
    thought = ""
    if delay := DELAY.search(question):
        seconds, thought = float(delay[1]), f"想了 {delay[1]} 秒。"
    text = SHORT_ANSWER.format(question=question[:40], thought=thought)
    if "长" in question:
        text = LONG_ANSWER.read_text("utf-8")
    return says(text, after=seconds, rate=speed)


class Progress:
    """Shows the attempts of one delivery while they are made and when they end."""

    def __init__(self, screen: Screen, name: str) -> None:
        self._screen, self._name = screen, name  # the name is '' in the foreground
        self._number, self._began = 1, time.monotonic()
        self._summary = ""  # of the attempt that ended last

    def note(self, number: int, event: str, seconds: float) -> None:
        """Record an event of an attempt, as WeChat reports it."""
        self._number = number
        if event == "posted":
            return
        outcome = OUTCOMES.get(event, event)
        self._summary = (
            f"  {self._name}第 {number} 次请求 · {seconds:.1f} 秒 · {outcome}"
        )
        if not self._screen.is_live:
            self._screen.line(self._summary)

    async def watch(self, delivery: Awaitable[Seen]) -> Seen:
        """Return the result of a delivery; a clock on the screen runs until then."""
        clock = asyncio.create_task(self._tick())
        try:
            seen = await delivery
        finally:
            clock.cancel()
        if self._screen.is_live:
            self._screen.line(self._summary, DIM)
        return seen

    async def _tick(self) -> None:
        while self._screen.is_live and not self._name:
            seconds = time.monotonic() - self._began
            self._screen.status(f"  第 {self._number} 次请求 · {seconds:.1f} 秒")
            await asyncio.sleep(TICK_SECONDS)


class Phone:
    """A subscriber's WeChat: messages being sent, and the links shown so far."""

    def __init__(
        self, platform: Callable[..., WeChat], openid: str, screen: Screen
    ) -> None:
        self._platform, self._openid, self._screen = platform, openid, screen
        self._taps: list[Tap] = []  # of the last reply that had any
        self._pages: list[str] = []  # URLs of all pages shown; numbers count from 1
        self._unread = 0  # number of the newest answer's page until it is opened
        self._sending: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        # A page that is opened late gets all the text so far in one line.
        self._http = aiohttp.ClientSession(read_bufsize=2**22)
        self._pictures = await PictureHost().__aenter__()
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in self._sending:
            task.cancel()
        await asyncio.gather(*self._sending, return_exceptions=True)
        await self._pictures.__aexit__()
        await self._http.close()

    async def write(self, line: str, name: str = "") -> None:
        """Send a line, or tap the link with that number, and show the reply."""
        if line.isdecimal() and 0 < int(line) <= len(self._taps):
            tap = self._taps[int(line) - 1]
            self._screen.line(f"  （点「{tap.label}」）", DIM)
            await self._deliver(lambda wechat: wechat.tap(self._openid, tap), name)
        else:
            await self._deliver(lambda wechat: wechat.send(self._openid, line), name)

    async def write_in_background(self, line: str) -> None:
        """Send a line without waiting for the reply."""
        task = asyncio.create_task(self.write(line, f"「{line[:12]}」"))
        self._sending.add(task)
        await asyncio.wait([task], timeout=HEAD_START_SECONDS)

    async def send_picture(self, path: Path) -> None:
        """Send a picture that lies in a file."""
        try:
            url = self._pictures.add(path)
        except OSError as error:
            return self._screen.line(f"  （{path}: {error.strerror}）", DIM)
        await self._deliver(
            lambda wechat: wechat.deliver(wechat.image(self._openid, url))
        )

    async def notify(self, event: str) -> None:
        """Send an event, as when the subscriber follows the account."""
        await self._deliver(
            lambda wechat: wechat.deliver(wechat.event(self._openid, event))
        )

    async def wait(self) -> None:
        """Wait for the replies to everything sent in the background."""
        await asyncio.gather(*self._sending)
        self._sending.clear()

    async def open_page(self, number: int) -> None:
        """Open a page; follow an answer that is being written on it to its end."""
        if not 0 < number <= len(self._pages):
            return self._screen.line("  （没有这个网页）", DIM)
        url, name = self._pages[number - 1], f"  网页 {number} · "
        if number == self._unread:
            self._unread = 0
        try:
            async with asyncio.timeout(FOLLOW_SECONDS):
                async with self._http.get(url) as page:
                    self._screen.line(f"{name}状态 {page.status}", DIM)
                if "/a/" in url and page.status == 200:
                    await self._follow(url, name)
        except TimeoutError:
            self._screen.line(f"{name}{FOLLOW_SECONDS:g} 秒还没写完", DIM)
        except (aiohttp.ClientError, OSError) as error:
            self._screen.line(f"{name}打不开：{error}", DIM)

    async def finish(self) -> None:
        """Wait for all replies, and for the newest answer if its page is unread."""
        await self.wait()
        if self._unread:
            await self.open_page(self._unread)

    async def _deliver(
        self, send: Callable[[WeChat], Awaitable[Seen]], name: str = ""
    ) -> None:
        progress = Progress(self._screen, name)
        async with self._platform(on_attempt=progress.note) as wechat:
            seen = await progress.watch(send(wechat))
        self._show(seen)
        for _, url in seen.links:
            number = self._page_number(url)
            self._screen.line(f"  网页 {number} · {url}", DIM)
            if "/a/" in url:
                self._unread = number
            else:
                await self.open_page(number)

    def _show(self, seen: Seen) -> None:
        if seen.text is None:
            self._screen.line("  （公众号没有回复）", DIM)
        elif seen.faulty:
            self._screen.line(f"  ！{seen.text}")
            self._screen.line(f"  （{seen.reason}）", DIM)
        else:
            self._taps = list(seen.taps) or self._taps
            number_link = functools.partial(
                self._number_link, iter(range(1, len(seen.taps) + 1))
            )
            self._screen.bubble(ANCHOR.sub(number_link, seen.content))

    def _number_link(self, numbers: Iterator[int], anchor: re.Match[str]) -> str:
        url, label = anchor[2].strip(), anchor[3]
        if url.startswith(("http://", "https://")):
            return f"{label} [网页 {self._page_number(url)}]"
        return f"{label} [{next(numbers)}]" if parse_tap(label, url) else label

    def _page_number(self, url: str) -> int:
        if url not in self._pages:
            self._pages.append(url)
        return self._pages.index(url) + 1

    async def _follow(self, url: str, name: str) -> None:
        blocks: list[str] = []
        text, state = "", "断了"
        async with self._http.get(url + "/events") as stream:
            async for data in read_events(stream):
                if "html" in data:
                    blocks[data["keep"] :] = data["html"]
                    text = html.unescape(re.sub("<[^>]*>", "", "".join(blocks)))
                state = data.get("state", state)
                self._screen.status(f"{name}在写 · {len(text)} 字")
        end = " ".join(text[-24:].split())
        self._screen.line(f"{name}结束：{state} · {len(text)} 字 · …{end}", DIM)


async def read_events(
    stream: aiohttp.ClientResponse,
) -> AsyncIterator[dict[str, Any]]:
    """Yield the data of each event of a stream."""
    async for line in stream.content:
        name, _, value = line.decode().strip().partition(": ")
        if name == "data":
            yield json.loads(value)


async def run_line(
    line: str,
    phone: Phone,
    screen: Screen,
    server: Child | None,
    own_page: str,
    is_fake: bool,
) -> None:
    """Run a command of the demo, or send the line to the account."""
    match line.split():
        case ["/demo"]:
            screen.bubble(HELP + (FAKE_HELP if is_fake else ""))
        case ["/wait"]:
            await phone.wait()
        case ["/follow"]:
            await phone.notify("subscribe")
        case ["/unfollow"]:
            await phone.notify("unsubscribe")
        case ["/image", *words] if words:
            await phone.send_picture(Path(" ".join(words)))
        case ["/restart"]:
            await restart(server, screen)
        case ["/open", number] if number.isdecimal():
            await phone.open_page(int(number))
        case ["/open", "me"]:
            await open_own_page(own_page, screen)
        case [_, *_, "&"]:
            await phone.write_in_background(line.removesuffix("&").strip())
        case [_, *_]:
            await phone.write(line)


async def open_own_page(url: str, screen: Screen) -> None:
    """Open the subscriber's own page in this machine's browser, if it has one."""
    is_open = await asyncio.to_thread(webbrowser.open, url)
    words = "浏览器里打开了" if is_open else "请在浏览器里打开"
    screen.line(f"  {words} {url}", DIM)
    screen.line("  把那一页上的话发到这里，比如：登录 123456，再点「确认登录」。", DIM)


async def restart(server: Child | None, screen: Screen) -> None:
    """Kill the server and start it again, if the demo has started it."""
    if not server:
        return screen.line("  （服务器不是演示启动的，不能重启）", DIM)
    began = time.monotonic()
    await server.kill()
    screen.status("  kill -9，正在重新启动…")
    await server.start()
    seconds = time.monotonic() - began
    screen.line(f"  （kill -9，{seconds:.1f} 秒后服务器又在了）", DIM)


async def open_server(
    options: argparse.Namespace, stack: contextlib.AsyncExitStack
) -> Child:
    """Start the server, and a fake model unless a real one is named."""
    given = {"base_url": options.base_url, "model": options.model}
    given["api_key"] = options.key
    if options.base_url and not options.key and not os.environ.get("OPENAI_API_KEY"):
        given["api_key"] = "none"  # many local servers want none, and we want one
    if is_fake(options):
        answer = functools.partial(
            fake_answer, speed=options.speed, seconds=options.seconds
        )
        fake = await stack.enter_async_context(FakeOpenAI(answer))
        given = {"base_url": fake.base_url, "api_key": "sk-demo", "model": "demo"}
    folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="wxgpt-demo-"))
    assistant = {name: value for name, value in given.items() if value}
    port = usual_port(PORT)
    server = Child(Path(folder), assistant, options.log, options.safe, port)
    stack.push_async_callback(server.stop)
    await server.start()
    return server


def is_fake(options: argparse.Namespace) -> bool:
    """Say whether the fake model answers."""
    is_named = options.config or options.base_url or options.key
    return not (is_named or os.environ.get("OPENAI_API_KEY"))


def introduction(options: argparse.Namespace) -> str:
    """Return who answers, and what to try."""
    name = "演示用的假模型" if is_fake(options) else f"真模型 {options.model or ''}"
    if options.config:
        name = f"按 {options.config} 运行着的服务器"
    hint = FAKE_HINT if is_fake(options) else ""
    return INTRO.format(model=name.strip(), hint=hint)


def ssh_hint(health: str) -> str:
    """Return how the pages are opened from the other end of an ssh; '' without one."""
    ends = os.environ.get("SSH_CONNECTION", "").split()  # client, port, server, port
    if len(ends) != 4:
        return ""
    port, user = urllib.parse.urlsplit(health).port, getpass.getuser()
    return SSH_HINT.format(port=port, user=user, host=ends[2]).strip("\n")


async def run_demo(options: argparse.Namespace, screen: Screen, lines: Lines) -> None:
    """Open everything, run the typed lines until the last, close everything."""
    screen.line(introduction(options))
    screen.status("  正在启动…")
    async with contextlib.AsyncExitStack() as stack:
        stack.callback(screen.status)
        server = None if options.config else await open_server(options, stack)
        config = server.config if server else options.config
        health, platform = read_platform(config)
        if not await is_healthy(health):
            raise ChildError(f"no server answers at {health}")
        settings = tomllib.loads(config.read_text("utf-8"))
        own_page = settings.get("public_url", "").rstrip("/") + "/me"
        if hint := ssh_hint(health):
            screen.line(hint)
        phone = await stack.enter_async_context(Phone(platform, options.openid, screen))
        stack.callback(screen.status, "  正在收拾…")
        while (line := await lines.next()) not in (None, "/quit"):
            await run_line(line, phone, screen, server, own_page, is_fake(options))
            if server:
                server.check()
                for reason in server.failures():
                    screen.line(f"  （日志里的原因：{reason}）", DIM)
        await phone.finish()


def parse_options() -> argparse.Namespace:
    """Return the options of the command line."""
    text = tell("Try wxgpt without an account or a key.")
    parser = Parser(prog="wxgpt.py demo", description=text)

    def add(name: str, words: str, **options: Any) -> None:
        parser.add_argument(name, help=tell(words), **options)

    add("--config", "ask the server that runs with FILE", type=Path, metavar="FILE")
    add("--base-url", "of a real model's chat API", default="", metavar="URL")
    model = os.environ.get("OPENAI_MODEL", "")
    add("--model", "name of the real model", default=model, metavar="NAME")
    add("--key", "its key; otherwise OPENAI_API_KEY counts", default="")
    add("--openid", "who is chatting", default="oDemo0friend0of0wxgpt0000000")
    add("--speed", "fake model's tokens a second (60)", type=float, default=60)
    add("--seconds", "seconds to its first token (1)", type=float, default=1)
    add("--safe", "in safe mode: pushes are encrypted", action="store_true")
    add("--log", "show the server's log on stderr", action="store_true")
    return parser.parse_args()


def main() -> int:
    """Run the command line; return the exit status."""
    set_up_streams()
    try:
        try:
            options = parse_options()
        finally:
            print(end="", flush=True)  # raises BrokenPipeError here, not at the exit
        talk(lambda screen, lines: run_demo(options, screen, lines))
    except BrokenPipeError:
        # Nobody reads the rest: drop it, or Python would report it at the exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ChildError, OSError) as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
