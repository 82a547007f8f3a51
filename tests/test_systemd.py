"""The unit on a booted systemd: start, crash, restart, watchdog and stop.

The platform and the upstream run here and are moved to the container's loopback.
"""

import asyncio
import re
import shutil
import subprocess

import pytest

from conftest import (
    ANN,
    BOB,
    PATIENT,
    PORT,
    ROOT,
    TOKEN,
    merged,
    platform,
    said,
    write_settings,
)
from fake_openai import Script, says
from waiting import within

STATE = "var/lib/private/wxgpt"
UNPRIVILEGED = 61184  # dynamic users begin there


async def pid_of(unit):
    """Return the pid of the unit's process, 0 if none runs."""
    return int((await unit.show("MainPID"))[0])


def test_the_unit_is_well_hardened():
    """`systemd-analyze security` rates its exposure 1.6 or less."""
    if not shutil.which("systemd-analyze"):
        pytest.skip("no systemd-analyze: apt install systemd")
    command = ["systemd-analyze", "security", "--offline=true", ROOT / "wxgpt.service"]
    output = subprocess.check_output(command, text=True, timeout=60)
    assert float(re.search(r"exposure level.*: ([0-9.]+)", output)[1]) <= 1.6


async def test_a_started_unit_answers_a_push(start):
    """When `systemctl start` returns, the server serves, as nobody in particular."""
    server, unit = await start()
    assert said("greeting") in (await server.ask("/chatgpt")).text
    assert "你好！关于「今天吃什么」" in (await server.ask("今天吃什么")).text
    shown = await unit.show("ActiveState", "SubState", "NFileDescriptorStore")
    assert shown == ["active", "running", "1"]
    assert int((await unit.says("serving on"))["_UID"]) >= UNPRIVILEGED


async def test_the_database_is_private(start, container):
    """It lies in the state directory, which only the server's user may enter."""
    server, _ = await start()
    await server.ask("/chatgpt")
    files = list(container.path(STATE).iterdir())
    assert container.path(f"{STATE}/wxgpt.db") in files
    assert {file.stat().st_mode & 0o777 for file in files} == {0o600}
    assert container.path(STATE).stat().st_mode & 0o777 == 0o700


async def test_the_server_finds_its_bytecode(start, container):
    """It may write none itself: the unit compiles it before, for everybody to read."""
    await start()
    folder = container.path("opt/wxgpt/__pycache__")
    [bytecode] = folder.glob("wxgpt.*.pyc")
    assert (folder.stat().st_mode & 0o777, bytecode.stat().st_mode & 0o777) == (
        0o755,
        0o644,
    )


async def test_a_push_that_a_kill_cuts_is_answered_by_the_next_process(start, upstream):
    """Killed in mid-answer: the retry waits at the kept socket and gets the answer."""
    server, unit = await start()
    await server.ask("/chatgpt")
    upstream.will(Script(["半句", asyncio.Event()]), says("活过来了。"))
    waiting = asyncio.create_task(server.ask("会活过来吗"))
    await upstream.arrival("会活过来吗")
    await unit.signal("KILL")
    seen = await waiting
    assert seen.text.startswith("活过来了。")
    assert [a.outcome for a in seen.attempts] == ["reset", "answered"]
    assert await unit.show("NRestarts") == ["1"]


async def test_connections_made_while_no_process_runs_are_answered(start):
    """They wait at the kept socket for the next process; nobody is refused."""
    server, unit = await start()
    await unit.signal("KILL")
    await unit.says("Main process exited, code=killed, status=9/KILL")
    assert await pid_of(unit) == 0
    asked = [server.ask("/chatgpt", openid) for openid in (ANN, BOB) for _ in range(10)]
    seen = await within(100, "answers to all", asyncio.gather(*asked))
    assert {(s.attempt, s.attempts[0].outcome) for s in seen} == {(1, "answered")}
    assert await pid_of(unit) != 0


async def test_a_push_made_during_a_restart_just_waits(start, upstream):
    """`systemctl restart`: new messages wait, cut ones come again; all are answered."""
    server, unit = await start()
    await server.ask("/chatgpt")
    upstream.will(Script([asyncio.Event()]), says("下一个进程答的。"))
    cut = asyncio.create_task(server.ask("正在写"))
    await upstream.arrival("正在写")
    before = await pid_of(unit)
    restart = asyncio.create_task(unit.systemctl("restart"))
    await unit.says("stopping")
    assert not (await server.ask("/help", BOB)).faulty
    assert (await cut).text.startswith("下一个进程答的。")
    assert await restart == 0 and await pid_of(unit) not in (0, before)


async def test_another_port_takes_effect_at_a_restart(start, container, settings):
    """The kept socket is given up for one at the new port."""
    _, unit = await start()
    table = {"server": {"port": PORT + 1}, "database": {"path": ""}}
    write_settings(container.settings, merged(settings, table))
    assert await unit.systemctl("restart") == 0
    async with platform(PORT + 1) as moved, platform(PORT) as left:
        assert not (await moved.ask("/chatgpt")).faulty
        assert (await left.ask("/chatgpt")).attempts[0].outcome == "refused"
    assert await unit.show("NFileDescriptorStore") == ["1"]


async def test_another_address_takes_effect_at_a_restart(start, container, settings):
    """The kept socket is given up for one at the new address and the same port."""
    _, unit = await start()
    table = {"server": {"port": PORT, "host": "0.0.0.0"}, "database": {"path": ""}}
    write_settings(container.settings, merged(settings, table))
    assert await unit.systemctl("restart") == 0
    async with platform(PORT) as server:
        server.wechat.url = server.wechat.url.replace("127.0.0.1", "127.0.0.2")
        assert not (await server.ask("/chatgpt")).faulty
    assert await unit.show("NFileDescriptorStore") == ["1"]


async def test_the_watchdog_restarts_a_process_that_hangs(install, upstream):
    """One that waits for a model is left alone; one that stands still is killed."""
    server, unit = await install(wechat=PATIENT)
    await unit.change("WatchdogSec=2")
    assert await unit.systemctl("start") == 0
    await server.ask("/chatgpt")
    upstream.will(says("慢慢来。", after=4.5))
    assert (await server.ask("不急")).text.startswith("慢慢来。")
    assert await unit.show("NRestarts") == ["0"]
    await unit.signal("STOP")
    await unit.says("Watchdog timeout")
    assert not (await server.ask("还在吗")).faulty
    assert await unit.show("NRestarts") == ["1"]


async def test_a_stop_is_a_success(start):
    """`systemctl stop` ends it with exit status 0, and then nobody listens."""
    server, unit = await start()
    await server.ask("/chatgpt")
    assert await unit.systemctl("stop") == 0
    shown = await unit.show("ActiveState", "Result", "ExecMainCode", "ExecMainStatus")
    assert shown == ["inactive", "success", "1", "0"]  # 1: CLD_EXITED
    assert (await server.ask("有人吗")).attempts[0].outcome == "refused"


async def test_journal_lines_have_priorities(start):
    """An event is 6, a warning 4; the prefixes are gone, and the token never shows."""
    server, unit = await start()
    await server.wechat.verify(token="wrong")
    warning = await unit.says("verification with a wrong signature")
    ours = [e for e in unit.journal if e.get("_PID") == warning["_PID"]]
    assert warning["PRIORITY"] == "4"
    assert {e["PRIORITY"] for e in ours} == {"4", "6"}
    assert not any(re.match(r"<\d>", e["MESSAGE"]) for e in ours)
    assert not any(TOKEN in e["MESSAGE"] for e in ours)


async def test_a_setting_that_cannot_be_used_ends_the_start(install):
    """Exit status 2 and one line in the journal; systemd does not try again."""
    _, unit = await install(server={"port": 99999})
    assert await unit.systemctl("start") != 0
    await unit.says("wxgpt: server.port")
    shown = await unit.show("ActiveState", "ExecMainStatus", "NRestarts")
    assert shown == ["failed", "2", "0"]


async def test_setup_puts_the_service_up(container, upstream):
    """As root: settings, unit and a short command; it hears WeChat's verification."""
    home = container.path("opt/wxgpt")
    shutil.copytree(ROOT / "docs", home / "docs", dirs_exist_ok=True)
    shutil.copy(ROOT / "wxgpt.service", home)
    container.settings.unlink(missing_ok=True)
    options = f"--public-url=https://wx.example.com --mode=plain --token={TOKEN}"
    options += f" --provider=other --base-url={upstream.base_url} --model=m --key=sk-x"
    options += " --proxy=other --wait=60"
    program = ("/opt/wxgpt/.venv/bin/python", "/opt/wxgpt/wxgpt.py", "setup")
    async with container.follow("wxgpt.service") as unit, platform(PORT) as server:
        setup = asyncio.create_task(container.run(*program, *options.split()))
        await unit.says("serving on")
        assert await server.wechat.verify("echo8765") == (200, "echo8765")
        status, output = await setup
        for words in ("✓ the service runs", "✓ verified", "wxgpt is serving on it"):
            assert words in output, output
        assert status == 1 and "wx.example.com" in output  # a name that leads nowhere
        assert container.settings.stat().st_mode & 0o777 == 0o600
        link = "etc/systemd/system/multi-user.target.wants/wxgpt.service"
        assert container.path(link).is_symlink()
        assert (await container.run("sh", "-c", "cd / && wxgpt --version"))[0] == 0
        assert await unit.systemctl("disable", "--now") == 0
