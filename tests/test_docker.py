"""The image on a Docker engine, with compose.yaml and the commands of docs/container.md.

The base image is a Debian with Python, made here; pip finds the packages at a mirror
of the test's own. So nothing is asked of Docker Hub.
"""

import asyncio
import contextlib
import functools
import http.server
import json
import re
import shutil
import tempfile
import threading
from pathlib import Path

import pytest

import container as machine
import engine as docker
from conftest import PORT, ROOT, TOKEN, platform, said
from fake_openai import FakeOpenAI, Script
from recipes import commands

PAGE = "docs/container.md"
SETTINGS = "settings/wxgpt.toml"
SECRET = "sk-mustNotBeInTheImage"
# Of the root that the tests with systemd boot; the image brings its own of these.
NOT_OF_THE_BASE = "opt var/cache var/lib/apt usr/bin/caddy usr/lib/systemd".split()
NOT_OF_THE_BASE += [f"usr/share/{name}" for name in ("doc", "locale", "man")]
# Beside compose.yaml: pip takes a mirror without TLS only by this machine's loopback,
# and the health is asked for as often as a test wants to know it.
TESTED = """
services:
  wxgpt:
    build:
      network: host
    healthcheck:
      interval: 1s
      start_period: 1ms
"""
MODEL = 9000  # the port of the chat API, in the engine's network
URL = f"http://127.0.0.1:{PORT}"  # names would be asked of servers that are not there


def lines_of(section: str, pattern: str = "") -> list[str]:
    """Return the lines of the text's section that begin so, for a shell without user."""
    lines = [line.text for line in commands(PAGE) if line.section == section]
    found = [line for line in lines if re.match(pattern, line)]
    assert found, section
    quiet = [re.sub(r"exec (?!-T)", "exec -T ", line) for line in found]
    return [line.replace(" -it ", " ").replace("git pull", "true") for line in quiet]


@contextlib.contextmanager
def mirror(wheels: Path):
    """Serve wheels as a package index; gives its URL."""
    for wheel in list(wheels.glob("*.whl")):
        name = re.sub(r"[-_.]+", "-", wheel.name.partition("-")[0]).lower()
        (wheels / name).mkdir(exist_ok=True)
        wheel.rename(wheels / name / wheel.name)
    handler = functools.partial(Quiet, directory=str(wheels))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


class Quiet(http.server.SimpleHTTPRequestHandler):
    """Lists folders and sends files, without a word about it."""

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


class Site:
    """A checkout as an owner has it, with the engine that serves it."""

    def __init__(self, engine: docker.Engine, folder: Path) -> None:
        self.engine, self.folder = engine, folder
        self.served = ""  # the settings that the container has

    def run(self, command: str) -> str:
        """Run a line that must succeed; return what it wrote."""
        done = self.engine.run(command, self.folder)
        assert done.returncode == 0, f"{command}: {done.stdout}"
        return done.stdout

    async def do(self, *lines: str) -> str:
        """Run lines that must succeed while others work; return what they wrote."""
        return await asyncio.to_thread(self.run, "\n".join(["set -e", *lines]))

    def put_up(self) -> None:
        """Write the settings as the text says, and let a container serve with them."""
        self.run("\n".join(lines_of("1. The settings", r"install|sed")))
        model = f"http://host.docker.internal:{MODEL}/v1"
        before = self.served
        self.set(public_url=URL, token=TOKEN, base_url=model, api_key=SECRET)
        self.served = (self.folder / SETTINGS).read_text("utf-8")
        new = "" if self.served == before else " --force-recreate"
        self.run(f"docker compose up -d{new}")

    def inspect(self, what: str) -> str:
        """Return something that Docker knows about the container."""
        shown = self.run(f"docker inspect -f '{what}' $(docker compose ps -aq wxgpt)")
        return shown.strip()

    async def comes_to(self, wanted: str, what: str) -> None:
        """Wait until Docker says this about the container."""
        async with asyncio.timeout(150):
            while await asyncio.to_thread(self.inspect, what) != wanted:
                await asyncio.sleep(0.2)

    def set(self, **values: str) -> None:
        """Change lines of the settings, as an owner's editor does."""
        path = self.folder / SETTINGS
        text = path.read_text("utf-8")
        for name, value in values.items():
            text, count = re.subn(rf"(?m)^(\S*\b{name}) = .*", rf'\1 = "{value}"', text)
            assert count == 1, name
        path.write_text(text, "utf-8")
        self.served = ""


HEALTH = "{{.State.Health.Status}}"


@pytest.fixture(scope="module")
def site(debian):
    """The image, built in a checkout with settings, and keys where they do not belong."""
    if reason := docker.obstacle():
        pytest.skip(reason)
    with tempfile.TemporaryDirectory(prefix="wx") as top:
        folder, wheels = Path(top, "wxgpt"), Path(top, "wheels")
        ours = shutil.ignore_patterns(".*cache", ".venv", ".git", "__pycache__")
        shutil.copytree(ROOT, folder, ignore=ours)
        for name in ("wxgpt.toml", "wxgpt.db", "owner/__pycache__/x.pyc", "tests/key"):
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text(SECRET)
        folder.chmod(0o700)
        wheels.mkdir()
        machine.download_wheels(debian, wheels)
        with contextlib.ExitStack() as stack:
            try:
                engine = stack.enter_context(docker.Engine(Path(top)))
            except RuntimeError as error:  # a kernel without what it needs
                pytest.skip(str(error))
            stack.enter_context(engine.network())
            site = Site(engine, folder)
            build(site, debian, wheels)
            yield site
            site.run("docker compose down --volumes --timeout 1")


def build(site: Site, debian: Path, wheels: Path) -> None:
    """Import the base, and build the image with the text's settings beside it."""
    left_out = " ".join(f"--exclude=./{name}" for name in NOT_OF_THE_BASE)
    site.run(f"set -o pipefail; tar -C {debian} {left_out} -c . | docker import - base")
    (site.folder / "compose.override.yaml").write_text(TESTED)
    with mirror(wheels) as url:
        (site.folder / ".env").write_text(f"BASE_IMAGE=base\nPIP_INDEX_URL={url}\n")
        site.run("docker compose build")


@pytest.fixture
async def upstream():
    """A chat API on the machine that the container runs on."""
    async with FakeOpenAI(host=docker.GATEWAY, port=MODEL) as fake:
        yield fake


@pytest.fixture
async def server(site, upstream):
    """A platform before a healthy container, which goes from test to test."""
    await asyncio.to_thread(site.put_up)
    await site.comes_to("healthy", HEALTH)
    async with platform(PORT, attempt_timeout=5.0) as server:
        yield server


def test_the_image_has_the_program_alone(site):
    """No settings, keys, databases or tests; nothing that belongs to its user."""
    found = site.run("docker run --rm wxgpt ls -A /opt/wxgpt").split()
    program = {"wxgpt.py", "owner", "pages", "docs", "schema.sql"}
    program |= {"providers.toml", "texts.toml"}
    around = {"LICENSE", "requirements.lock", ".venv", "wxgpt.example.toml"}
    assert {*found} == program | around | {"__pycache__"}
    look = f"grep -rlF {SECRET} /opt /etc /var/lib/wxgpt; find /opt -user wxgpt; true"
    assert site.run(f"docker run --rm --user 0 wxgpt sh -c '{look}'") == ""


async def test_a_push_is_answered(server, site):
    """A question goes to a model on this machine; the port is the loopback's alone."""
    assert await server.wechat.verify("123") == (200, "123")
    assert said("greeting") in (await server.ask("/chatgpt")).text
    assert "你好！关于「今天吃什么」" in (await server.ask("今天吃什么")).text
    ports = json.loads(site.inspect("{{json .NetworkSettings.Ports}}"))
    assert ports == {"8080/tcp": [{"HostIp": "127.0.0.1", "HostPort": str(PORT)}]}


async def test_the_owners_commands_work(server, site):
    """`check` finds the settings and the service, `stats` the database."""
    await server.ask("/chatgpt")
    await server.ask("今天吃什么")
    check, stats = lines_of("4. The short commands", "docker compose exec")
    findings = await site.do(f"{check} --lang en || test $? = 1")
    for words in ("✓ settings: /etc/wxgpt/wxgpt.toml", "8080, wxgpt is serving on it"):
        assert words in findings, findings
    assert '"questions": ' in await site.do(f"{stats} --json")


async def test_the_process_may_do_little(server, site):
    """Its user is nobody else, has no capability and cannot gain any, nor write."""
    look = "cat /proc/[0-9]*/status; for place in /opt/wxgpt /etc/wxgpt /var/tmp;"
    look += " do touch $place/x 2>/dev/null || echo read-only; done"
    seen = await site.do(f"docker compose exec -T wxgpt sh -c '{look}'")
    ours = seen[seen.index("Name:\tpython") :]
    found = dict(re.findall(r"(?m)^(Uid|CapBnd|CapEff|NoNewPrivs):\t(\w+)", ours))
    none = dict.fromkeys(("CapBnd", "CapEff"), "0" * 16)
    assert found == {"Uid": "10001", "NoNewPrivs": "1"} | none
    assert seen.count("read-only\n") == 3


async def test_a_session_outlives_the_container(server, site):
    """A new container goes on with the database of the one before."""
    await server.ask("/chatgpt")
    await site.do("docker compose up -d --force-recreate")
    await site.comes_to("healthy", HEALTH)
    assert "你好！关于「还在吗」" in (await server.ask("还在吗")).text


async def test_a_stop_is_orderly(server, site, upstream):
    """In mid-answer, too, it ends by itself: exit status 0, not that of a kill."""
    await server.ask("/chatgpt")
    upstream.will(Script(["半句", asyncio.Event()]))
    asked = asyncio.create_task(server.ask("慢慢想"))
    await upstream.arrival("慢慢想")
    await site.do("docker compose stop")
    assert site.inspect("{{.State.Status}} {{.State.ExitCode}}") == "exited 0"
    assert "info stopping" in await site.do("docker compose logs")
    asked.cancel()


async def test_listening_on_its_own_loopback_is_not_healthy(server, site):
    """Docker says so, since nobody outside would be answered."""
    site.set(host="127.0.0.1")
    await site.do("docker compose restart")
    await site.comes_to("unhealthy", HEALTH)


async def test_setup_writes_settings_for_the_container(server, site):
    """By options instead of a terminal; they are its user's, and can be served."""
    begin, setup = lines_of("1. The settings", "echo|docker run")
    options = "--public-url=https://wx.example.com --mode=plain --provider=deepseek --key=sk-x"
    site.served = ""
    await site.do(begin, f"{setup} {options} --token={TOKEN} --skip-test --yes")
    assert (site.folder / SETTINGS).stat().st_uid == 10001
    await site.do("docker compose restart")
    await site.comes_to("healthy", HEALTH)
    assert await server.wechat.verify("123") == (200, "123")


async def test_a_backup_is_restored(server, site):
    """What came after the copy is gone, what was before is back."""
    await server.ask("/chatgpt")
    copy, restore = (
        lines_of("Backup and restore")[:3],
        lines_of("Backup and restore")[3:],
    )
    await site.do(*copy)
    assert (site.folder / "wxgpt-copy.db").stat().st_mode & 0o077 == 0
    await server.ask("/stop")
    await site.do(*restore)
    await site.comes_to("healthy", HEALTH)
    assert "你好！关于「还开着吗」" in (await server.ask("还开着吗")).text


async def test_an_upgrade_goes_forward_and_back(server, site):
    """The old image and the database from before come back by the text's commands."""
    lines = lines_of("Upgrade, and going back")
    forward, back, forget = lines[:5], lines[5:-2], lines[-2:]
    await server.ask("/chatgpt")
    program = site.folder / "wxgpt.py"
    text = program.read_text("utf-8")
    program.write_text(text.replace('\nVERSION = "', '\nVERSION = "9.'), "utf-8")
    version = "docker compose exec -T wxgpt wxgpt --version"
    await site.do(*forward)
    assert "wxgpt 9." in await site.do(version)
    await server.ask("/stop")
    await site.do(*back)
    await site.comes_to("healthy", HEALTH)
    assert "wxgpt 9." not in await site.do(version)
    assert "你好！关于「还开着吗」" in (await server.ask("还开着吗")).text
    await site.do(*forget)
