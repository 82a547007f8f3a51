"""The demo lets somebody with no account and no key chat, and leaves nothing behind."""

import asyncio
import contextlib
import errno
import os
import pty
import re
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import aiohttp
import pytest

from child import free_port, usual_port
from fake_openai import FakeOpenAI
from terminal import columns

ROOT = Path(__file__).parents[1]
SECONDS = 50.0  # more than any of these takes; the demo's attempts are of real length
AGAIN_SECONDS = 5.0  # until a person presses Ctrl-C again

Start = Callable[..., Awaitable[asyncio.subprocess.Process]]


def clean() -> dict[str, str]:
    """Return the environment without a key, with which it would ask a real model."""
    return {k: v for k, v in os.environ.items() if not k.startswith("OPENAI_")}


@pytest.fixture
async def start(tmp_path: Path) -> Start:
    """Start the demo as its users do, its temporary folder inside the test's."""

    async def start(*options: str) -> asyncio.subprocess.Process:
        return await asyncio.create_subprocess_exec(
            *(sys.executable, str(ROOT / "wxgpt.py"), "demo", *options),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env=clean() | {"TMPDIR": str(tmp_path)},
        )

    return start


class Terminal:
    """The demo in a terminal of its own, where Ctrl-C is a key."""

    def __init__(self) -> None:
        self.shown = ""
        self._master, self._slave = pty.openpty()
        self._process: asyncio.subprocess.Process  # once it was started

    async def start(self, env: dict[str, str]) -> None:
        """Start the demo."""
        # Not by preexec_fn: Python code between fork and exec can hang beside threads.
        self._process = await asyncio.create_subprocess_exec(
            *("setsid", "--ctty", "--wait", sys.executable, str(ROOT / "wxgpt.py")),
            *("demo", "--seconds", "0.1"),
            stdin=self._slave,
            stdout=self._slave,
            stderr=self._slave,
            env=env,
        )
        os.close(self._slave)
        self._reader = asyncio.StreamReader()
        protocol = asyncio.StreamReaderProtocol(self._reader)
        loop = asyncio.get_running_loop()
        self._pipe, _ = await loop.connect_read_pipe(
            lambda: protocol, open(self._master, "rb", 0, closefd=False)
        )

    async def shows(self, words: str, times: int = 1) -> str:
        """Wait until it has shown these words so often; return all since the last call."""
        try:
            async with asyncio.timeout(SECONDS):
                while self.shown.count(words) < times:
                    piece = await self._reader.read(4096)
                    self.shown += piece.decode(errors="replace").replace("\r\n", "\n")
        except TimeoutError:
            raise AssertionError(f"{words!r} not shown, but {self.shown!r}") from None
        end = [match.end() for match in re.finditer(re.escape(words), self.shown)]
        at = end[times - 1]  # what came along behind it is for the next call
        shown, self.shown = self.shown[:at], self.shown[at:]
        return shown

    def types(self, keys: str) -> None:
        """Press keys."""
        os.write(self._master, keys.encode())

    async def ends(self, pressing: str = "") -> tuple[int, str]:
        """Wait for its end; return the exit status and what it still showed.

        Keys are pressed again every few seconds, as a person would: readline loses a
        Ctrl-C that comes between its prompt and its wait for a key.
        """
        rest = asyncio.ensure_future(self.read_rest())
        ended = asyncio.ensure_future(self._process.wait())
        for _ in range(int(SECONDS / AGAIN_SECONDS)):
            done, _ = await asyncio.wait({rest, ended}, timeout=AGAIN_SECONDS)
            if done:
                break
            self.types(pressing)
        async with asyncio.timeout(SECONDS):
            await rest
            return await ended, self.shown

    async def read_rest(self) -> None:
        """Read until nobody has the other end any more."""
        try:
            while piece := await self._reader.read(4096):
                self.shown += piece.decode(errors="replace").replace("\r\n", "\n")
        except OSError as error:
            if error.errno != errno.EIO:
                raise

    async def close(self) -> None:
        """Close the terminal, which ends the demo and its server if they are there."""
        self._pipe.close()
        os.close(self._master)
        await asyncio.wait_for(self._process.wait(), SECONDS)


@pytest.fixture
async def terminal(tmp_path: Path) -> AsyncIterator[Callable[..., Awaitable[Terminal]]]:
    """Start the demo in a terminal; changes are of its environment."""
    async with contextlib.AsyncExitStack() as stack:

        async def start(**changes: str) -> Terminal:
            terminal = Terminal()
            await terminal.start(clean() | {"TMPDIR": str(tmp_path)} | changes)
            stack.push_async_callback(terminal.close)
            return terminal

        yield start


async def talk(demo: asyncio.subprocess.Process, *lines: str) -> str:
    """Pipe lines into the demo until it ends in peace; return what it printed."""
    typed = "".join(f"{line}\n" for line in lines).encode()
    async with asyncio.timeout(SECONDS):
        out, err = await demo.communicate(typed)
    assert (demo.returncode, err.decode()) == (0, "")
    return out.decode()


def servers_in(folder: Path) -> list[str]:
    """Return the command lines that name something in this folder."""
    listed = subprocess.check_output(["ps", "-Aww", "-o", "args="], text=True)
    return [line for line in listed.splitlines() if f"{folder}/" in line]


async def test_answers_come_with_the_attempt_that_they_are_ready_for(start: Start):
    """A quick answer comes with the first request, one of seven seconds with the next."""
    said = await talk(
        await start("--seconds", "0.2"),
        *("/chatgpt", "你好", "想 7 秒", "/history", "/quit"),
    )
    assert "\x1b" not in said and "\r" not in said
    quick, slow = said.split("> 你好\n")[1].split("> 想 7 秒\n")
    assert re.search(r"第 1 次请求 · \d\.\d 秒 · 已应答\n  \| 关于「你好」", quick)
    assert re.search(r"第 1 次请求 · 5\.\d 秒 · 超时", slow)
    assert re.search(r"第 2 次请求 · \d\.\d 秒 · 已应答\n  \| 关于「想 7 秒」", slow)
    assert re.search(r"网页 1 · http://127.0.0.1:\d+/h/\S+\n  网页 1 · 状态 200", slow)


async def test_pictures_and_events_go_through_safe_mode(start: Start):
    """A file becomes a picture that can be asked about; following brings the welcome."""
    demo = await start("--safe", "--seconds", "0.1")
    picture = f"/image {ROOT / 'docs' / 'live.png'}"
    said = await talk(
        demo, *("/chatgpt", picture, "1", "/image no.png", "/follow", "/unfollow")
    )
    *_, kept, asked, missing, followed, left = said.split("> ")
    assert "图收到了，想问什么？" in kept and "描述这张图 [1]" in kept
    assert "| 关于「描述这张图」" in asked
    assert "（no.png: No such file or directory）" in missing
    assert "| 欢迎关注！" in followed and "（公众号没有回复）" in left


async def test_a_number_taps_and_the_page_is_seen_to_its_end(start: Start):
    """Typing 1 taps the first link, and a piped run waits for the whole page."""
    demo = await start("--speed", "5000", "--seconds", "0.1")
    said = await talk(demo, "/chatgpt", "失败", "1", "写一篇长文")
    failed, retried, long = said.split("> ")[2:]
    assert "  | AI 这会儿太忙。再试一次 [1]\n" in failed
    assert "（日志里的原因：busy: status 500" in failed
    assert "（点「再试一次」）" in retried and "再试一次 [1]\n" in retried
    assert re.search(r"👉 接着看 \[1\]　在网页里看 \[网页 1\]", long)
    assert re.search(r"网页 1 · 结束：done · \d+ 字 · …\S*比它聪明。\n$", long)


async def test_a_real_model_is_asked_and_nothing_speaks_of_the_fake(
    start: Start, upstream: FakeOpenAI
):
    """With its address, name and key."""
    real = ("--base-url", upstream.base_url, "--model", "m-1", "--key", "sk-1")
    said = await talk(await start(*real), "/chatgpt 你好", "/demo")
    assert "真模型 m-1" in said and "关于「你好」" in said
    assert [word for word in ("假模型", "慢慢想") if word in said] == []
    [asked] = upstream.requests
    assert asked.body["model"] == "m-1"
    assert asked.headers["Authorization"] == "Bearer sk-1"


async def test_a_model_that_cannot_be_reached_is_told_with_the_reason(start: Start):
    """The account's words, and below them the log's."""
    demo = await start("--base-url", f"http://127.0.0.1:{free_port()}/v1")
    said = await talk(demo, "/chatgpt 你好")
    assert "| 暂时连不上 AI" in said and "（日志里的原因：unreachable" in said


async def test_over_ssh_it_says_how_to_open_the_pages(start: Start, monkeypatch):
    """By a tunnel to the very port that its links name."""
    monkeypatch.setenv("SSH_CONNECTION", "198.51.100.2 50000 203.0.113.7 22")
    said = await talk(await start("--seconds", "0.1"), "/chatgpt", "/history")
    tunnel = re.search(r"ssh -N -L (\d+):127\.0\.0\.1:(\d+) \S+@203\.0\.113\.7", said)
    link = re.search(r"http://127\.0\.0\.1:(\d+)/h/", said)
    assert tunnel and link and tunnel[1] == tunnel[2] == link[1]


async def test_a_browser_signs_in_to_ones_own_page(terminal):
    """`/open me` says where; the number of that page is sent and confirmed here."""
    demo = await terminal(BROWSER="true")
    await demo.shows("离开。")
    demo.types("/open me\r")
    shown = await demo.shows("登录 123456")
    url = re.search(r"http://127\.0\.0\.1:(\d+)/me", shown)
    assert url, shown
    async with aiohttp.ClientSession(cookie_jar=aiohttp.DummyCookieJar()) as http:
        async with http.get(url[0]) as page:
            number = re.search("登录 ([0-9]{6})", await page.text())
            cookie = page.cookies["__Host-wxgpt-wait"]
        assert number
        demo.types(f"登录 {number[1]}\r")
        await demo.shows("[1]")
        demo.types("1\r")
        await demo.shows("登录好了")
        waits = {"Cookie": f"{cookie.key}={cookie.value}"}
        async with http.get(url[0], headers=waits, allow_redirects=False) as page:
            assert page.status == 303 and "__Host-wxgpt" in page.cookies


def test_the_usual_port_is_taken_unless_somebody_has_it():
    """A second demo gets another one."""
    before, port = free_port(), free_port()
    while port != before + 1:  # what stands before the first of a block is taken
        before, port = port, free_port()
    assert usual_port(port) == port and usual_port(port) != port


async def test_a_narrow_terminal_breaks_lines_between_words(terminal):
    """A Chinese character takes two columns; nothing is left to the terminal."""
    demo = await terminal(COLUMNS="40")
    first = (await demo.shows("> ")).replace("\r\x1b[K", "")
    assert max(map(columns, first.split("\n"))) <= 40


async def test_a_killed_server_is_back_before_the_next_attempt(start: Start):
    """A question under way when the server is killed is answered by the next process."""
    said = await talk(await start(), "/chatgpt", "想 1 秒 &", "/restart", "/wait")
    assert "「想 1 秒」第 1 次请求" in said and "秒后服务器又在了" in said
    assert "关于「想 1 秒」" in said.split("/wait\n")[1]


# What a terminal shows, imports with their times included, and how often by then.
MOMENTS = {
    "the command's imports": ("aiohttp.web\n", 1),
    "a new interpreter": ("| encodings\n", 2),
    "the demo's imports": ("aiohttp.web\n", 2),
    "the server's start": ("正在启动", 1),
    "the prompt": ("> ", 1),
}


@pytest.mark.parametrize("moment", MOMENTS)
async def test_it_can_be_interrupted_at_any_moment(terminal, tmp_path: Path, moment):
    """Ctrl-C ends it without a word, and nothing stays."""
    demo = await terminal(PYTHONPROFILEIMPORTTIME="1")
    await demo.shows(*MOMENTS[moment])
    demo.types("\x03")
    status, rest = await demo.ends(pressing="\x03")
    words = [line for line in rest.splitlines() if "import time:" not in line]
    assert "Traceback" not in rest and status == 128 + signal.SIGINT, words
    assert servers_in(tmp_path) == [] and list(tmp_path.iterdir()) == []


async def test_a_terminal_shows_one_line_that_ticks(terminal):
    """The attempt's seconds change in place; five lines that fit say what this is."""
    demo = await terminal()
    first = await demo.shows("> ")
    lines = first.split("正在启动")[0].replace("\r\x1b[K", "").split("\n")
    assert len(lines) == 6 and max(map(columns, lines)) <= 80
    demo.types("/chatgpt 想 1 秒\n")
    ticking = await demo.shows("已应答")
    assert len(re.findall(r"\r\x1b\[K\S*  第 1 次请求 · \d\.\d 秒", ticking)) > 1
    await demo.shows("> ")
    demo.types("\x04")
    status, rest = await demo.ends()
    assert status == 0 and "Traceback" not in rest


async def test_an_interrupted_demo_leaves_nothing_behind(start: Start, tmp_path: Path):
    """Stopped by Ctrl-C in the middle of an answer, it tidies up without a complaint."""
    demo = await start()
    assert demo.stdin and demo.stdout
    demo.stdin.write("/chatgpt 想 1 秒\n".encode())
    async with asyncio.timeout(SECONDS):
        await demo.stdout.readuntil("> /chatgpt 想 1 秒\n".encode())
        assert servers_in(tmp_path) and any(tmp_path.iterdir())
        demo.send_signal(signal.SIGINT)
        _, err = await demo.communicate()
    assert (demo.returncode, err) == (128 + signal.SIGINT, b"")
    assert servers_in(tmp_path) == [] and list(tmp_path.iterdir()) == []


async def test_a_demo_that_nobody_reads_leaves_nothing_behind(
    start: Start, tmp_path: Path
):
    """A reader who closes the pipe ends it without a word."""
    demo = await start()
    assert demo.stdout
    async with asyncio.timeout(SECONDS):
        await demo.stdout.readline()
        # There is no public way to close it.
        demo.stdout._transport.close()  # type: ignore[attr-defined]
        await demo.communicate(b"/chatgpt\n/help\n")
    assert demo.returncode == 0
    assert servers_in(tmp_path) == [] and list(tmp_path.iterdir()) == []


async def test_a_server_that_runs_can_be_asked(start: Start, spawn, tmp_path: Path):
    """With its settings the demo is one more subscriber of it."""
    await spawn(wechat={"attempt_timeout": 5})
    demo = await start("--config", str(tmp_path / "wxgpt.toml"))
    said = await talk(demo, "/chatgpt", "你好", "/restart")
    assert "wxgpt.toml 运行着的服务器" in said and "| 你好！关于「你好」" in said
    assert "（服务器不是演示启动的，不能重启）" in said


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--config", "none.toml"], "demo: none.toml: No such file or directory\n"),
        (["--config", str(ROOT / "wxgpt.example.toml")], "demo: no server answers at "),
        (["--speed", "fast"], "argument --speed: invalid float value: 'fast'"),
    ],
)
async def test_what_cannot_be_is_said_in_one_line(start: Start, options, words):
    """Without a traceback."""
    demo = await start(*options)
    _, err = await asyncio.wait_for(demo.communicate(), SECONDS)
    assert demo.returncode in (1, 2) and words in err.decode()
    assert "Traceback" not in err.decode()
