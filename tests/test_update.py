"""`backup`, `logs` and `update`, on a copy of the program and a systemctl of the test's own.

That one knows how to restart: it ends the process it started last and starts anew.
"""

import asyncio
import contextlib
import os
import pathlib
import re
import shutil
import sqlite3
import subprocess
import sys
import tarfile
import zipfile

import pytest

import container
from conftest import (
    PORT,
    ROOT,
    free_port,
    merged,
    platform,
    run_command,
    toml,
    write_settings,
)
from waiting import within

FILES = (
    *("wxgpt.py", "schema.sql", "texts.toml", "providers.toml", "pages", "owner"),
    "wxgpt.service",
    "requirements.lock",
)
SYSTEMCTL = """#!{python}
import os, pathlib, signal, subprocess, sys, time, urllib.request

home, pid = pathlib.Path("{home}"), pathlib.Path("{folder}/pid")


def runs(number):
    # One that ended may still wait for its parent's notice.
    try:
        return pathlib.Path(f"/proc/{{number}}/stat").read_text().split()[2] != "Z"
    except OSError:
        return False


def stop():
    if pid.exists():
        number = int(pid.read_text())
        pid.unlink()
        if runs(number):
            os.kill(number, signal.SIGTERM)
        while runs(number):
            time.sleep(0.05)


verb = sys.argv[1]
with open("{folder}/calls", "a") as calls:
    print(*sys.argv[1:], file=calls)
if verb == "show":
    print("LoadState=loaded\\nActiveState=active\\nFragmentPath={folder}/wxgpt.service")
    print("LoadCredential=wxgpt.toml:{folder}/wxgpt.toml")
if verb in ("stop", "restart"):
    stop()
if verb == "restart":
    command = [sys.executable, str(home / "wxgpt.py"), "--config", "{folder}/wxgpt.toml"]
    with open("{folder}/log", "a") as log:
        process = subprocess.Popen(
            command, stdout=log, stderr=log, start_new_session=True, cwd="{folder}"
        )
    pid.write_text(str(process.pid))
    for _ in range(400):
        if process.poll() is not None:
            pid.unlink()
            sys.exit(1)
        try:
            urllib.request.urlopen("http://127.0.0.1:{port}/healthz").close()
            break
        except OSError:
            time.sleep(0.05)
"""


class Installation:
    """A copy of the program with its settings, its database and its unit."""

    def __init__(self, folder: pathlib.Path, settings, port: int) -> None:
        self.folder, self.home, self.port = folder, folder / "program", port
        self.database = pathlib.Path(settings["database"]["path"])
        self.home.mkdir()
        for name in FILES:
            copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
            copy(ROOT / name, self.home / name)
        write_settings(folder / "wxgpt.toml", settings)
        shutil.copy(ROOT / "wxgpt.service", folder)
        values = {"python": sys.executable, "home": self.home}
        script = SYSTEMCTL.format(folder=folder, port=port, **values)
        (folder / "bin").mkdir()
        (folder / "bin/systemctl").write_text(script)
        (folder / "bin/systemctl").chmod(0o755)

    async def run(self, *words, lang="en", **env):
        """Run the command line as the owner does; return status and all that it wrote."""
        path = f"{self.folder}/bin:{os.environ['PATH']}"
        (self.folder / "elsewhere").mkdir(exist_ok=True)
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, self.home / "wxgpt.py", *words),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            cwd=self.folder / "elsewhere",
            env=os.environ | {"PATH": path, "WXGPT_LANG": lang} | env,
        )
        out, _ = await within(90, f"end of {words}", process.communicate())
        assert b"Traceback" not in out, out.decode()
        return process.returncode, out.decode()

    def systemctl(self, verb):
        """Give an order to the unit."""
        subprocess.run([self.folder / "bin/systemctl", verb], check=True)

    def questions(self):
        """Return what the database has of questions and answers."""
        with contextlib.closing(sqlite3.connect(self.database)) as db:
            return db.execute("SELECT question, answer FROM turn").fetchall()

    def schema(self):
        """Return how many steps of the schema the database has run."""
        with contextlib.closing(sqlite3.connect(self.database)) as db:
            return db.execute("PRAGMA user_version").fetchone()[0]

    def orders(self):
        """Return what was asked of systemd, but for what it shows."""
        lines = (self.folder / "calls").read_text().splitlines()
        return [line for line in lines if not line.startswith("show")]

    def release(self, *edits, steps="", suffix=".tar.gz", **files):
        """Pack a version that is edited so, with more steps of the schema; return it."""
        new = self.folder / "wxgpt-99"
        shutil.copytree(self.home, new, ignore=shutil.ignore_patterns("__pycache__"))
        text = (new / "wxgpt.py").read_text()
        for old, other in (('VERSION = "', 'VERSION = "99.'), *edits):
            assert old in text
            text = text.replace(old, other, 1)
        (new / "wxgpt.py").write_text(text)
        with (new / "schema.sql").open("a") as schema:
            schema.write(steps)
        for name, content in files.items():
            (new / name.replace("__", ".")).write_text(content)
        archive = self.folder / f"new{suffix}"
        if suffix == ".zip":
            with zipfile.ZipFile(archive, "w") as packed:
                for path in new.rglob("*"):
                    packed.write(path, path.relative_to(self.folder))
        else:
            with tarfile.open(archive, "w:gz") as packed:
                packed.add(new, new.name)
        shutil.rmtree(new)
        return str(archive)

    def files(self):
        """Return the program's files with what is in them."""
        paths = [p for p in self.home.rglob("*") if p.is_file()]
        ours = [
            p for p in paths if "__pycache__" not in p.parts and ".git" not in p.parts
        ]
        return {path.relative_to(self.home): path.read_bytes() for path in ours}


@pytest.fixture
async def installation(tmp_path, settings):
    """An installation that serves, with an answer in its database."""
    port = free_port()
    own = {"server": {"port": port}, "wechat": {"attempt_timeout": 5}}
    one = Installation(tmp_path, merged(settings, own), port)
    try:
        await asyncio.to_thread(one.systemctl, "restart")
        async with platform(port) as server:
            await server.ask("/chatgpt 你好")
        yield one
    finally:
        await asyncio.to_thread(one.systemctl, "stop")


NEXT_STEP = 1 + max(
    int(number)
    for number in re.findall(r"-- step (\d+)", (ROOT / "schema.sql").read_text())
)
MIGRATES = f"\n-- step {NEXT_STEP}\n\nCREATE TABLE fashion (a INTEGER) STRICT;\n"
# Serves nothing, after the database was brought up to date.
DIES = ('log.info("serving on', 'raise OSError("it broke"); log.info("serving on')


@pytest.mark.parametrize("suffix", [".tar.gz", ".zip"])
async def test_an_update_brings_the_new_version(installation, suffix):
    """From an archive; it serves, with the answers there were, and nothing is left."""
    before = installation.questions()
    (installation.home / "wxgpt.toml").write_text("# the owner's")
    archive = installation.release(steps=MIGRATES, suffix=suffix)
    status, out = await installation.run("update", archive)
    assert status == 0 and re.search(r"wxgpt 99\.\S+ serves\n$", out), out
    assert installation.orders()[-1:] == ["restart wxgpt.service"]
    assert installation.questions() == before and before[0][0] == "你好"
    assert installation.schema() == NEXT_STEP
    assert (await installation.run("--version"))[1].startswith("wxgpt 99.")
    assert (installation.home / "wxgpt.toml").read_text() == "# the owner's"
    assert not [p for p in installation.folder.iterdir() if "kept" in p.name]
    modes = {p: p.stat().st_mode for p in installation.home.rglob("[!_]*")}
    assert all(mode & 0o004 for mode in modes.values())  # the service's user reads
    async with platform(installation.port) as server:
        assert not (await server.ask("还在吗")).faulty


async def test_a_version_that_does_not_start_goes(installation):
    """The old one serves again, from the database as it was before."""
    before, files = installation.questions(), installation.files()
    archive = installation.release(DIES, steps=MIGRATES, extra__txt="new")
    status, out = await installation.run("update", archive)
    assert status == 1 and re.search(r"99\.\S+ does not start: going back", out), out
    assert re.search(r"wxgpt (?!99)\S+ serves again\n$", out), out
    assert "the database is the copy from before" in out
    assert installation.orders()[-3:] == [
        *("restart wxgpt.service", "stop wxgpt.service", "restart wxgpt.service")
    ]
    assert installation.files() == files
    assert installation.questions() == before
    assert installation.schema() == NEXT_STEP - 1
    async with platform(installation.port) as server:
        assert not (await server.ask("还在吗")).faulty


async def test_a_database_that_was_not_changed_stays(installation):
    """What came in meanwhile is not lost for nothing."""
    archive = installation.release(DIES)
    status, out = await installation.run("update", archive)
    assert status == 1 and "serves again" in out
    assert "the database is the copy" not in out


async def test_packages_that_cannot_be_had_change_nothing(installation):
    """The service is not touched, and the old files are back."""
    files = installation.files()
    lock = "no-such-package==1 --hash=sha256:" + "0" * 64 + "\n"
    archive = installation.release(requirements__lock=lock)
    status, out = await installation.run("update", archive, PIP_NO_INDEX="1")
    assert status == 1 and "no-such-package" in out
    assert "nothing was changed" in out
    assert installation.files() == files
    assert installation.orders() == ["restart"]


async def test_a_version_that_cannot_be_loaded_is_not_started(installation):
    """A syntax error, say; the service runs on."""
    archive = installation.release(("import argparse", "import argparse ("))
    status, out = await installation.run("update", archive)
    assert status == 1 and "SyntaxError" in out and "nothing was changed" in out
    assert installation.orders() == ["restart"]


async def test_an_archive_of_something_else_is_refused(installation):
    """Nothing of it is taken."""
    files, other = installation.files(), installation.folder / "other.tar.gz"
    with tarfile.open(other, "w:gz") as packed:
        packed.add(ROOT / "README.md", "README.md")
    for archive, words in (
        (other, "is no archive of wxgpt"),
        (ROOT / "README.md", "README.md: "),
        ("none.zip", "No such file"),
    ):
        status, out = await installation.run("update", str(archive))
        assert status == 1 and words in out, out
    assert installation.files() == files


async def test_an_archive_cannot_write_elsewhere(installation):
    """Names with `..` and links are left out."""
    archive = installation.release()
    with tarfile.open(archive[:-3].removesuffix(".tar") + ".tar", "w") as packed:
        with tarfile.open(archive) as good:
            for member in good:
                packed.addfile(member, good.extractfile(member))
        evil = tarfile.TarInfo("wxgpt-99/../../evil.txt")
        packed.addfile(evil)
        link = tarfile.TarInfo("wxgpt-99/link")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc"
        packed.addfile(link)
    status, out = await installation.run("update", str(installation.folder / "new.tar"))
    assert status == 0, out
    assert not list(installation.folder.rglob("evil.txt"))
    assert not (installation.home / "link").exists()


async def test_the_unit_follows_unless_the_owner_changed_it(installation):
    """A changed one stays, and the new one is named."""
    unit = installation.folder / "wxgpt.service"
    archive = installation.release(wxgpt__service="[Unit]\nDescription=new\n")
    unit.write_text("# the owner's")
    _, out = await installation.run("update", archive)
    assert unit.read_text() == "# the owner's" and "was changed here and stays" in out
    shutil.copy(installation.home / "wxgpt.service", unit)
    archive = installation.release(wxgpt__service="[Unit]\nDescription=newer\n")
    status, out = await installation.run("update", archive)
    assert status == 0 and "newer" in unit.read_text()
    assert installation.orders()[-2:] == ["daemon-reload", "restart wxgpt.service"]


def git(folder, *words):
    """Run git for a test's own repository."""
    name = ("-c", "user.name=x", "-c", "user.email=x@example.com")
    command = ["git", *name, "-C", str(folder), *words]
    subprocess.run(command, check=True, capture_output=True)


async def test_a_checkout_is_updated_from_its_remote(installation):
    """By git pull; and when that is already here, nothing is restarted."""
    home, origin = installation.home, installation.folder / "origin"
    git(home, "init", "-q", "-b", "main")
    (home / ".gitignore").write_text("__pycache__/\n")
    git(home, "add", ".")
    git(home, "commit", "-qm", "one")
    subprocess.run(["git", "clone", "-q", home, origin], check=True)
    git(home, "remote", "add", "origin", str(origin))
    git(home, "fetch", "-q")
    git(home, "branch", "--set-upstream-to=origin/main")
    status, out = await installation.run("update")
    assert status == 0 and "this is the newest version already" in out, out
    assert installation.orders() == ["restart"]
    text = (origin / "wxgpt.py").read_text()
    (origin / "wxgpt.py").write_text(text.replace('VERSION = "', 'VERSION = "99.', 1))
    git(origin, "commit", "-qam", "two")
    (home / "texts.toml").open("a").write("# mine\n")
    status, out = await installation.run("update")
    assert status == 1 and "texts.toml" in out and "nothing was changed" in out
    git(home, "checkout", "texts.toml")
    status, out = await installation.run("update")
    assert status == 0 and "99." in out.splitlines()[-1], out


async def test_without_git_and_archive_it_says_what_to_give(installation):
    """In the owner's language."""
    status, out = await installation.run("update", lang="zh")
    assert status == 1 and "请给出新版本的安装包，wxgpt update 文件.tar.gz" in out


# backup and logs


async def test_a_backup_holds_what_the_database_in_use_does(installation):
    """It is private, and a second one does not replace it."""
    status, out = await installation.run("backup", "copy.db")
    copy = installation.folder / "elsewhere/copy.db"
    assert status == 0 and "copy.db: 0." in out
    assert copy.stat().st_mode & 0o777 == 0o600
    with contextlib.closing(sqlite3.connect(copy)) as db:
        found = db.execute("SELECT question, answer FROM turn").fetchall()
    assert found == installation.questions()
    status, out = await installation.run("backup", "copy.db")
    assert status == 1 and "copy.db is there already" in out
    status, out = await installation.run("backup")
    named = list((installation.folder / "elsewhere").glob("wxgpt-2*.db"))
    assert status == 0 and len(named) == 1


async def test_a_backup_before_the_first_start_is_one_line(settings, tmp_path):
    """Nothing is created."""
    path = tmp_path / "wxgpt.toml"
    path.write_text(toml(settings), "utf-8")
    status, out, err = await run_command(path, "backup")
    assert (status, out) == (1, "") and err.endswith("wxgpt has not run yet\n")
    assert [file.name for file in tmp_path.iterdir()] == ["wxgpt.toml"]


async def test_logs_follow_the_journal_of_the_unit(installation):
    """With the newest lines first, as many as asked for."""
    journalctl = installation.folder / "bin/journalctl"
    journalctl.write_text('#!/bin/sh\necho "$@"\n')
    journalctl.chmod(0o755)
    status, out = await installation.run("logs", "-n", "7")
    assert (status, out) == (0, "--unit=wxgpt.service --lines=7 --follow\n")


# on a booted systemd


@pytest.fixture
def machine(debian):
    """A booted Debian with the program in /opt/wxgpt, as files that can be changed."""
    with container.boot(debian, files={}) as booted, booted.network():
        home = booted.path(container.HOME)
        for name in FILES:
            copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
            copy(ROOT / name, home / name)
        shutil.copy(ROOT / "wxgpt.service", booted.path("etc/systemd/system"))
        shutil.copy(ROOT / "owner/wxgpt", booted.path("usr/local/bin/wxgpt"))
        yield booted


@pytest.mark.xdist_group(name="debian")
@pytest.mark.timeout(container.BUILD_SECONDS)
async def test_the_short_command_updates_the_service_and_goes_back(
    machine, settings, tmp_path
):
    """With systemd itself, the database of a dynamic user, and the real unit."""
    archive = Installation(tmp_path, settings, 0).release
    table = {"server": {"port": PORT}, "database": {"path": ""}}
    write_settings(machine.settings, merged(settings, table))
    await machine.run("systemctl", "daemon-reload")
    status, out = await machine.run("systemctl", "start", "wxgpt")
    assert status == 0, out

    async def update(path):
        shutil.copy(path, machine.path("root/new.tar.gz"))
        return await machine.run(
            "env", "WXGPT_LANG=en", "wxgpt", "update", "/root/new.tar.gz"
        )

    async with platform(PORT, attempt_timeout=30) as server:
        await server.ask("/chatgpt 你好")
        status, out = await update(archive(DIES, steps=MIGRATES))
        assert status == 1 and "the database is the copy from before" in out, out
        assert re.search(r"wxgpt (?!99)\S+ serves again\n$", out), out
        status, out = await update(archive(steps=MIGRATES))
        assert status == 0 and re.search(r"wxgpt 99\S+ serves\n$", out), out
        assert not (await server.ask("还在吗")).faulty
    status, out = await machine.run("wxgpt", "backup", "/root/copy.db")
    shutil.copy(machine.path("root/copy.db"), tmp_path)  # SQLite leaves /proc/N/root
    with contextlib.closing(sqlite3.connect(tmp_path / "copy.db")) as db:
        found = [question for (question,) in db.execute("SELECT question FROM turn")]
    assert status == 0 and found == ["你好", "还在吗"], out
    state = machine.path("var/lib/private/wxgpt")
    assert {file.stat().st_uid for file in state.iterdir()} != {0}
    _, out = await machine.run("env", "WXGPT_LANG=zh", "wxgpt", "check")
    assert f"✓ 端口：{PORT}，wxgpt 正在运行" in out
    assert "✓ 微信的消息：最近一条在 0 分钟前，读懂了" in out
    await machine.run("systemctl", "stop", "wxgpt")
    _, out = await machine.run("env", "WXGPT_LANG=zh", "wxgpt", "check")
    assert "wxgpt 没有运行" in out and "systemctl start wxgpt" in out
