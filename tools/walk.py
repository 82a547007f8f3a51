"""Walks the text as a reader who has nothing else, and says how long that takes.

    .venv/bin/python tools/walk.py     # README.zh-CN.md, docs/deploy.md and setup alone
    .venv/bin/python tools/walk.py README.md --suite trixie
    .venv/bin/python tools/walk.py setup --suite noble --with=--components=main,universe

`setup` is the quick start's first way: its questions are answered at a terminal, in
Chinese, while WeChat's console waits. Ubuntu needs its keyring (mmdebstrap's --keyring).

Every line of the pages' shell blocks is run, in the text's order, or told with the
reason why not. Each page has a small Debian of its own, fresh, without Python, in which
systemd is booted first. It has no network but its loopback: only what calls `apt` or
`pip` runs with this machine's, and with its certificates and its settings for pip. What
a reader does by hand (the checkout, the editor, WeChat's console) is done between the
commands and marked with a star. Ends with 1 where a reader would be stuck.
"""

import argparse
import asyncio
import contextlib
import functools
import json
import os
import re
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "sim"))

import container as machine
from container import NAME, PEM, PROJECT, Container
from fake_openai import FakeOpenAI
from recipes import BLOCKS, Block, Line, commands, read
from typist import Typist, typing_at
from wechat import WeChat

PAGES = ("README.zh-CN.md", "docs/deploy.md")
WALKS = (*PAGES, "setup")
ANN, TOKEN = "oAnn7Zt1BvK9mHdLr3PwYc8SgNf2", "readersToken42"
COMMAND_SECONDS = 600
SETUP_SECONDS = 60  # until setup asks the next thing
NEW = ("*.db*", "wxgpt.toml", ".git", ".venv", "__pycache__", ".*_cache", ".hypothesis")
MACHINE = re.compile(r"PIP_|(?i:\w+_proxy$)|SSL_CERT_|REQUESTS_CA_BUNDLE$")
SHELL = (
    'trap : INT; cd "$1" && umask "$2"; eval "$3"; s=$?; { pwd; umask; } >"$4"; exit $s'
)
STATE = "run/reader"  # where the reader's shell stands, and its umask
ONLINE = re.compile(r"\b(apt|pip)\b")
TYPED = {" demo$": "/chatgpt\n天空为什么是蓝的？\n/quit\n", "apt": "y\n"}
NOT_RUN = {
    "certbot certonly": "asks Let's Encrypt for a certificate",
    "pytest$": "the tests are for developers; `.ci/run` runs this line",
}
SHOWN = re.compile(r" (demo|check|stats)\b|journalctl")  # their output is printed


REPOSITORY = "srv/wxgpt.git"
APP_ID = "wx0123456789abcdef"
OWN_NAME = "wx.reader.test"
# What setup asks, and what a reader types.
ANSWERS = {
    "网址，如 https://wx.example.com：": f"http://{OWN_NAME}",
    "AppID（回车：先用明文模式）：": APP_ID,
    "编号：": "其他",
    "接口的地址，含版本号：": "BASE_URL",
    "模型名：": "m",
    "密钥（输入时不显示）：": "sk-reader",
    "不用先发 /chatgpt，好吗？ [Y/n]：": "",
    "编号 [3]：": "nginx",
}
ENGLISH = r"[A-Za-z']+(?: [a-z']+){3,}"  # a sentence

OWN = "    (not in the text: the walk's own)"
SETTINGS = "--config /etc/wxgpt/wxgpt.toml"
# Not --all: for a while systemd remembers a unit that is neither there nor active.
LEFT = "find / -xdev -name '*wxgpt*'; systemctl list-units '*wxgpt*'"
QUESTIONS = (
    "python3 -c \"import sqlite3; db = sqlite3.connect('/var/lib/wxgpt/wxgpt.db');"
    " print(*(q for q, in db.execute('SELECT question FROM turn ORDER BY id')),"
    " sep='\\n')\""
)


class Stuck(Exception):
    """A reader cannot go on; the message says at what."""


def say(mark: str, text: str) -> None:
    """Print a line of the report."""
    print(f"{mark:>8}  {text}", flush=True)


def show(output: str) -> None:
    """Print what a command wrote, without what pip said before."""
    before, installed, after = output.rpartition("Successfully installed")
    output = after.partition("\n")[2] if installed else before + after
    for line in output.rstrip().splitlines():
        print(f"{'':>8}  | {line}", flush=True)


class Reader:
    """One reader at one server: a shell that keeps its folder, and a page to follow."""

    def __init__(self, container: Container, page: str) -> None:
        self.container, self.page = container, page
        self.lines = commands(page)
        self.done: list[Line] = []
        self.folder, self.umask = "/root", "0022"
        self.seconds = 0.0
        self.hands: dict[str, Callable[[], None]] = {}  # a comment, and what it asks

    async def follow(self, section: str, part: slice = slice(None)) -> None:
        """Do what the lines of a section say."""
        lines = [line for line in self.lines if line.section == section][part]
        if not lines:
            raise Stuck(f"{self.page} has no commands under {section}")
        print(f"\n{self.page} · {section or 'the top'}", flush=True)
        for line in lines:
            self.done.append(line)
            await self.obey(line.text)

    async def obey(self, text: str, **own: str) -> None:
        """Run a line, or do by hand what it asks for; some words are the reader's."""
        for pattern, reason in NOT_RUN.items():
            if re.search(pattern, text):
                return say("not run", f"{text}    ({reason})")
        if text.startswith(("#", "editor ")):
            say("*", text)
            if text not in self.hands:
                raise Stuck(f"nobody here knows how to: {text}")
            self.hands[text]()
        else:
            for word, meant in own.items():
                text = text.replace(word, meant)
            await self.run(text)

    async def run(self, text: str) -> str:
        """Run a command to its end; return what it wrote."""
        async with self.running(text) as shell:
            typed = next((t for p, t in TYPED.items() if re.search(p, text)), "")
            raw, _ = await shell.communicate(typed.encode())
        output = raw.decode()
        if SHOWN.search(text) or shell.returncode:
            show(output)
        if shell.returncode:
            raise Stuck(f"{text}: status {shell.returncode}")
        return output

    @contextlib.asynccontextmanager
    async def running(self, text: str) -> AsyncIterator[asyncio.subprocess.Process]:
        """Start a command where the one before left the shell; note how it ends."""
        began = time.monotonic()
        command, environ = self.command(text)
        shell = await asyncio.create_subprocess_exec(
            *command,
            env=environ,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        try:
            async with asyncio.timeout(COMMAND_SECONDS):
                yield shell
                await shell.wait()
        except TimeoutError:
            raise Stuck(f"{text}: no end after {COMMAND_SECONDS} s") from None
        state = self.container.path(STATE).read_text().split()
        self.folder, self.umask = state
        spent = time.monotonic() - began
        self.seconds += spent
        say(f"{spent:.1f} s", text + ("" if text in read(self.page) else OWN))

    def command(self, text: str) -> tuple[list[str], dict[str, str]]:
        """Return how to run a line in the container's shell, and its environment."""
        enter, settings = self.container.enter, {}
        if ONLINE.search(text):
            enter, settings = self.container.enter_partly, machine_settings()
        arguments = (self.folder, self.umask, text, f"/{STATE}")
        environ = {
            "PATH": f"/usr/local/bin:{os.defpath}:/usr/sbin:/sbin",
            "HOME": "/root",
            "LC_ALL": "C.UTF-8",
            "DEBIAN_FRONTEND": "noninteractive",
        }
        return [*enter, "bash", "-c", SHELL, "bash", *arguments], environ | settings

    @contextlib.asynccontextmanager
    async def typing(self, text: str) -> AsyncIterator[Typist]:
        """Start a command at a terminal; gives who types there."""
        say("started", text)
        command, environ = self.command(text)
        try:
            async with typing_at(*command, env=environ) as typist:
                yield typist
        except AssertionError as error:  # what it waited for
            raise Stuck(str(error)) from None

    @contextlib.asynccontextmanager
    async def watching(self, text: str, words: str) -> AsyncIterator[list[str]]:
        """Run a command that does not end; leave it with Ctrl-C at the block's end."""
        say("started", text)
        async with self.running(text) as shell:
            assert shell.stdout
            output: list[str] = []
            await read_until(shell.stdout, words, output)
            yield output
            interrupt(shell.pid)
            output += (await shell.stdout.read()).decode().splitlines()
        show("\n".join(output))

    def take(self, text: str) -> str:
        """Return a line of the page that is run otherwise than by `follow`."""
        line = next((line for line in self.lines if line.text == text), None)
        if line is None:
            raise Stuck(f"{self.page} does not say: {text}")
        self.done.append(line)
        return text

    async def run_inline(self, command: str) -> str:
        """Run a command that the text's prose names."""
        if f"`{command}`" not in read(self.page):
            raise Stuck(f"{self.page} does not say: {command}")
        return await self.run(command)

    def put_checkout(self, folder: str = "opt/wxgpt") -> None:
        """Put the files where the text wants them, over those that are there."""
        say("*", f"the checkout is put into /{folder}")
        place = self.container.path(folder)
        ignored = shutil.ignore_patterns(*NEW)
        shutil.copytree(PROJECT, place, ignore=ignored, dirs_exist_ok=True)

    def edit(self, place: str, **values: str | int) -> None:
        """Change settings in a file as an editor does."""
        say("*", f"in /{place}: {', '.join(values)}")
        path = self.container.path(place)
        text = path.read_text("utf-8")
        for name, value in values.items():
            found = re.search(rf"(?m)^(?:[\w.]+\.)?{name} = (.*)$", text)
            if not found:
                raise Stuck(f"/{place} has no line for {name}")
            begin, end = found.span(1)
            text = text[:begin] + json.dumps(value) + text[end:]
        path.write_text(text, "utf-8")

    def put_block(self, block: Block) -> None:
        """Paste a proxy's block."""
        self.container.path(block.place).write_text(block.text(), "utf-8")

    def wechat(self, url: str, token: str, **safe: Any) -> WeChat:
        """Return the platform for the account that is served at an address."""
        connection: dict[str, Any] = {"resolver": machine.Here()}
        if url.startswith("https:"):
            connection = self.container.connection()
        return WeChat(f"{url}/wechat", token, connection=connection, **safe)

    async def verify(self, url: str, token: str = TOKEN) -> None:
        """Be WeChat's console, where the URL is entered."""
        async with self.wechat(url, token) as wechat:
            if await wechat.verify("8765") != (200, "8765"):
                raise Stuck(f"{url} is not verified")
        say("*", f"WeChat's console verifies {url}/wechat")

    async def ask(self, url: str, text: str, token: str = TOKEN, **safe: Any) -> None:
        """Be a subscriber who is answered."""
        async with self.wechat(url, token, **safe) as wechat:
            seen = await wechat.send(ANN, text)
        if seen.attempt != 1 or seen.faulty or seen.text is None:
            raise Stuck(f"{text} is not answered: {seen}")
        shown = seen.text.partition("\n")[0]
        say("*", f"pushed in {seen.seconds:.2f} s: {text} → {shown}")

    async def be_served(self, url: str, question: str) -> None:
        """Enter the URL in the console, follow, open a session and ask."""
        await self.verify(url)
        for text in ("/chatgpt", question):
            await self.ask(url, text)

    def finish(self) -> None:
        """Say what was left out; raise if that is a line of the text."""
        if left := [line.text for line in self.lines if line not in self.done]:
            raise Stuck(f"{self.page} has lines that nobody tried: {left}")
        print(
            f"\n{self.page}: every line; the commands took {self.seconds / 60:.1f} min"
        )


def by_the_next_line() -> None:
    """Do nothing yet."""


async def read_until(
    stream: asyncio.StreamReader, words: str, output: list[str]
) -> None:
    """Read lines until one has these words."""
    async for line in stream:
        output.append(line.decode().rstrip())
        if words in output[-1]:
            return
    raise Stuck("\n".join([*output[-5:], f"it never said: {words}"]))


def interrupt(pid: int) -> None:
    """Send what Ctrl-C sends to the last child of a row."""
    while children := Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        pid = int(children[-1])
    os.kill(pid, signal.SIGINT)


def machine_settings() -> dict[str, str]:
    """Return what this machine's pip and apt need to reach their registries."""
    return {name: value for name, value in os.environ.items() if MACHINE.match(name)}


def put_machine(container: Container) -> None:
    """Put this machine's certificates and pip's settings where Debian has them."""
    for name in ("usr/local/share/ca-certificates", "etc/pip.conf"):
        theirs, ours = container.path(name), Path("/", name)
        if ours.is_dir():
            shutil.copytree(ours, theirs, dirs_exist_ok=True)
        elif ours.exists():
            shutil.copy(ours, theirs)


def put_repository(container: Container) -> str:
    """Put what a reader clones into the container; return its address there."""
    with tempfile.TemporaryDirectory() as folder:
        copy, bare = Path(folder, "wxgpt"), Path(folder, "wxgpt.git")
        shutil.copytree(PROJECT, copy, ignore=shutil.ignore_patterns(*NEW))
        git = ["git", "-C", str(copy), "-c", "user.name=x", "-c", "user.email=x"]
        for words in ("init -q", "add -A", "commit -qm x", f"clone -q --bare . {bare}"):
            machine.build([*git, *words.split()])
        shutil.copytree(bare, container.path(REPOSITORY))
    return f"/{REPOSITORY}"


async def get_code(reader: Reader) -> None:
    """Do the first three lines of the quick start; the fourth is setup's."""
    lines = [line for line in reader.lines if line.section == quick_start(reader)]
    address = put_repository(reader.container)
    print(f"\n{reader.page} · {quick_start(reader)}", flush=True)
    for line in lines[:3]:
        reader.done.append(line)
        await reader.obey(line.text, ADDRESS=address)
    if not lines[3].text.endswith(" setup"):
        raise Stuck(f"{reader.page} does not say: setup")
    reader.done.append(lines[3])


def quick_start(reader: Reader) -> str:
    """Return the heading of the section that begins with the code."""
    return next(line.section for line in reader.lines if "ADDRESS" in line.text)


async def walk_readme(reader: Reader, upstream: FakeOpenAI) -> None:
    """The demo, a server started by hand, and the unit, all as the README says."""
    demo, quick, service, tests = dict.fromkeys(line.section for line in reader.lines)
    url, home = f"http://{NAME}", "opt/wxgpt"
    values: dict[str, str | int] = {"public_url": url, "token": TOKEN}
    values |= {"base_url": upstream.base_url}
    values |= {"host": "0.0.0.0", "port": 80}  # its way without a proxy
    for fill_in in (
        "# set public_url, wechat.token and assistants.chatgpt.api_key, then",
        "# 填好 public_url、wechat.token 和 assistants.chatgpt.api_key，然后",
    ):
        reader.hands[fill_in] = lambda: reader.edit(
            f"{home}/wxgpt.toml", api_key="sk-reader", **values
        )
    reader.put_checkout("root/wxgpt")
    reader.folder = "/root/wxgpt"
    await reader.run_inline("apt update && apt install python3-venv ca-certificates")
    await reader.follow(demo)
    await get_code(reader)
    say("*", f"{NAME} leads here")
    await reader.container.certify()
    by_hand = reader.take(".venv/bin/python wxgpt.py --config wxgpt.toml")
    await reader.follow(quick, slice(4, 6))
    async with reader.watching(by_hand, "serving on"):
        await reader.be_served(url, "手动启动了吗？")
    await reader.run_inline(".venv/bin/python wxgpt.py check")
    await reader.follow(service, slice(2))
    starts = [line.text for line in reader.lines if line.section == service][2]
    async with reader.watching(reader.take(starts), "serving on"):
        await reader.be_served(url, "天空为什么是蓝的？")
    for command in ("check", "stats"):
        await reader.run(f".venv/bin/python wxgpt.py {command} {SETTINGS}")
    await reader.run_inline("wxgpt backup wxgpt-copy.db")
    await reader.follow(tests)


async def walk_setup(reader: Reader, upstream: FakeOpenAI) -> None:
    """From nothing to a served message by `setup` alone, in Chinese."""
    url = f"http://{OWN_NAME}"
    began = time.monotonic()
    await get_code(reader)
    say("*", f"{OWN_NAME} leads here")
    await reader.container.run(
        "sh", "-c", f"echo 127.0.0.1 {OWN_NAME} localhost >/etc/hosts"
    )
    await reader.run("apt install nginx")  # with a network, which setup has not here
    async with reader.typing(reader.done[-1].text) as typist:

        async def type_in(question: str, answer: str) -> str:
            before = await typist.answer(question, answer + "\n", SETUP_SECONDS)
            say("*", f"{question} {answer}")
            return before

        for question, answer in ANSWERS.items():
            await type_in(question, answer.replace("BASE_URL", upstream.base_url))
        await type_in("现在就依次运行吗？ [Y/n]：", "")
        shown = await typist.answer("正在等微信来验证", "", SETUP_SECONDS)
        fields = dict(re.findall(r"(?m)^  (URL|Token|EncodingAESKey) +(\S+)$", shown))
        safe = {"app_id": APP_ID, "aes_key": fields["EncodingAESKey"]}
        if fields["URL"] != f"{url}/wechat" or "安全模式" not in shown:
            raise Stuck(f"setup shows something else for the console: {shown}")
        say("*", "a slip of the pen: WeChat's console has another token")
        with contextlib.suppress(Stuck):
            await reader.verify(url, TOKEN)
        await typist.answer("后台的 Token 要和 wechat.token 一样", "", SETUP_SECONDS)
        await reader.verify(url, fields["Token"])
        await typist.answer("✓ 验证成功", "", SETUP_SECONDS)
        status = await typist.ends()
        show(typist.all_shown)
        if status or " 0 ✗" not in typist.all_shown:
            raise Stuck(f"setup ends with {status}, not in a check that is all well")
    await reader.ask(url, "天空为什么是蓝的？", fields["Token"], **safe)
    minutes = (time.monotonic() - began) / 60
    print(f"\nfrom nothing to a served message by setup: {minutes:.1f} min")
    # What apt and nginx say is theirs.
    theirs = r"(?s)(?<=现在就依次运行吗).*?(?=✓ 服务)|(?m:^    .*$|→ .*$)"
    if english := re.findall(ENGLISH, re.sub(theirs, "", typist.all_shown)):
        raise Stuck(f"setup speaks English: {english}")
    await reader.run("wxgpt check")


async def walk_deploy(reader: Reader, upstream: FakeOpenAI) -> None:
    """All of docs/deploy.md, with nginx and then with Caddy."""
    learn_deploy(reader, upstream)
    for section in ("2. The program", "3. The settings", "4. The unit"):
        await reader.follow(section)
    say("*", f"{NAME} leads here; a certificate of our own lies in {PEM}")
    await reader.container.certify()
    for proxy in ("nginx", "Caddy"):
        await reader.follow(proxy)
        await reader.follow("6. Check")
        await reader.be_served(f"https://{NAME}", f"经过 {proxy} 吗？")
        if proxy == "nginx":
            await reader.run("systemctl disable --now nginx")  # Caddy wants its ports
    await keep(reader)
    await reader.follow("Uninstall")
    await reader.run("rm /etc/nginx/conf.d/wxgpt.conf && systemctl disable --now caddy")
    if "wxgpt" in (left := await reader.run(LEFT)):
        raise Stuck(f"left behind: {left}")


OLD_FILES = (
    "# put the old files into /opt/wxgpt (a checkout: git reset --hard ORIG_HEAD), then"
)


def learn_deploy(reader: Reader, upstream: FakeOpenAI) -> None:
    """Tell the reader what the page wants done by hand, and how."""
    place = "etc/wxgpt/wxgpt.toml"
    values = {"public_url": f"https://{NAME}", "token": TOKEN, "api_key": "sk-reader"}
    values |= {"base_url": upstream.base_url}
    paste = "# put the block below into this file"
    reader.hands |= {
        "# put the checkout at /opt/wxgpt, then": reader.put_checkout,
        "# put the new files into /opt/wxgpt, then": reader.put_checkout,
        OLD_FILES: reader.put_checkout,
        f"editor /{place}": lambda: reader.edit(place, **values),
        paste: by_the_next_line,
        f"{paste}, in place of what is there": by_the_next_line,
    }
    for block in (BLOCKS["nginx"], BLOCKS["caddy"]):
        do = functools.partial(reader.put_block, block)
        reader.hands[f"editor /{block.place}"] = do


async def keep(reader: Reader) -> None:
    """Copy the database, upgrade, restore the copy; see that it is what was copied."""
    before = await reader.run(QUESTIONS)
    await reader.follow("Backup and restore", slice(1))
    copy = reader.container.path(f"{reader.folder[1:]}/wxgpt-copy.db")
    if copy.stat().st_mode & 0o077:
        raise Stuck("others may read the copy")
    await reader.be_served(f"https://{NAME}", "复制以后的问题")
    await reader.follow("Upgrade")
    await reader.be_served(f"https://{NAME}", "升级以后的问题")
    if await reader.run(QUESTIONS) != f"{before}复制以后的问题\n升级以后的问题\n":
        raise Stuck("the upgrade lost something")
    await reader.follow("Back to an older version")
    await reader.follow("Backup and restore", slice(1, None))
    await reader.be_served(f"https://{NAME}", "恢复以后的问题")
    if await reader.run(QUESTIONS) != f"{before}恢复以后的问题\n":
        raise Stuck("what was restored is not what was copied")
    await reader.run(f".venv/bin/python wxgpt.py stats {SETTINGS}")


async def walk(container: Container, page: str) -> None:
    """Follow one page, or setup, with a fake model behind the server."""
    put_machine(container)
    reader = Reader(container, PAGES[0] if page == "setup" else page)
    async with FakeOpenAI() as upstream:
        if page == "setup":
            return await walk_setup(reader, upstream)
        way = walk_deploy if page == "docs/deploy.md" else walk_readme
        await way(reader, upstream)
    reader.finish()


@contextlib.contextmanager
def bare_debian(suite: str, options: list[str]) -> Iterator[Path]:
    """Give a folder with a Debian as a provider installs it, but smaller."""
    with tempfile.TemporaryDirectory() as folder:
        began, root = time.monotonic(), Path(folder, "root")
        machine.build_debian(root, f"{machine.BARE},apt", suite, *options)
        say(f"{time.monotonic() - began:.1f} s", f"{suite} was installed")
        yield root


def main() -> int:
    """Walk the pages; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    words = f"a README, docs/deploy.md, or setup for the walk by it alone ({' '.join(WALKS)})"
    parser.add_argument("pages", nargs="*", default=WALKS, metavar="PAGE", help=words)
    words = "Debian's (%(default)s), or Ubuntu's"
    parser.add_argument("--suite", default=machine.SUITE, help=words)
    words = "option of mmdebstrap, as --with=--components=main,universe for Ubuntu"
    parser.add_argument(
        "--with", action="append", default=[], dest="options", help=words
    )
    options, began = parser.parse_args(), time.monotonic()
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        # As a shell's background job; the reader presses Ctrl-C all the same.
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if reason := machine.obstacle():
        print(f"cannot walk here: {reason}")
        return 1
    with bare_debian(options.suite, options.options) as root:
        for page in options.pages:
            with machine.boot(root, files={}) as container, container.network():
                try:
                    asyncio.run(walk(container, page))
                except Stuck as stuck:
                    print(f"\nstuck: {stuck}")
                    return 1
    print(f"\n{(time.monotonic() - began) / 60:.1f} minutes in all")
    return 0


if __name__ == "__main__":
    sys.exit(main())
