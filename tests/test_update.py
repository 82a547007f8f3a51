"""`backup`, `logs` and `update`, on a copy of the program and a systemctl of the test's own.

That one knows how to restart: it ends the process it started last and starts anew.
"""

import asyncio
import contextlib
import hashlib
import os
import pathlib
import pty
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import sysconfig
import tarfile
import venv
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
from waiting import limit, within

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
if verb == "cat":
    print("LoadCredential=wxgpt.toml:{folder}/wxgpt.toml")
if verb in ("stop", "restart"):
    stop()
if verb == "restart":
    python = str(home / ".venv/bin/python")
    command = [python, str(home / "wxgpt.py"), "--config", "{folder}/wxgpt.toml"]
    with open("{folder}/log", "a") as log:
        process = subprocess.Popen(
            command, stdout=log, stderr=log, start_new_session=True, cwd="{folder}"
        )
    pid.write_text(str(process.pid))
    while True:
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
        # Packages of its own beside those of the tests, which pip leaves alone.
        venv.create(self.home / ".venv", symlinks=True)
        paths = {"base": str(self.home / ".venv")}
        own = pathlib.Path(sysconfig.get_path("purelib", "venv", paths))
        (own / "tests.pth").write_text(sysconfig.get_path("purelib"))
        self.python, self.packages = self.home / ".venv/bin/python", own
        self.kept = folder / "program-kept"
        write_settings(folder / "wxgpt.toml", settings)
        shutil.copy(ROOT / "wxgpt.service", folder)
        values = {"python": sys.executable, "home": self.home}
        script = SYSTEMCTL.format(folder=folder, port=port, **values)
        (folder / "bin").mkdir()
        (folder / "bin/systemctl").write_text(script)
        (folder / "bin/systemctl").chmod(0o755)

    async def run(self, *words, lang="en", **env):
        """Run the command line as the owner does; return status and all that it wrote."""
        process = await self.start(*words, lang=lang, **env)
        out, _ = await within(90, f"end of {words}", process.communicate())
        assert b"Traceback" not in out, out.decode()
        return process.returncode, out.decode()

    async def start(self, *words, prefix=(), lang="en", **options):
        """Start the command line in a process group of its own."""
        streams = {
            key: options.pop(key) for key in ("stdin", "stdout") if key in options
        }
        path = f"{self.folder}/bin:{os.environ['PATH']}"
        (self.folder / "elsewhere").mkdir(exist_ok=True)
        return await asyncio.create_subprocess_exec(
            *(*prefix, self.python, self.home / "wxgpt.py", *words),
            stderr=asyncio.subprocess.STDOUT,
            cwd=self.folder / "elsewhere",
            env=os.environ | {"PATH": path, "WXGPT_LANG": lang} | options,
            start_new_session=True,
            **{"stdout": asyncio.subprocess.PIPE} | streams,
        )

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
        return [line for line in lines if not line.startswith(("show", "cat", "list-"))]

    def release(self, *edits, steps="", suffix=".tar.gz", **files):
        """Pack a version that is edited so, with more steps of the schema; return it."""
        new = self.folder / "wxgpt-99"
        ignore = shutil.ignore_patterns("__pycache__", ".venv", ".git")
        shutil.copytree(self.home, new, ignore=ignore)
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
        ours = [p for p in paths if not {"__pycache__", ".git"} & {*p.parts}]
        return {path.relative_to(self.home): path.read_bytes() for path in ours}

    def wheel(self, version):
        """Make a package of this version; return what a lock file says of it."""
        path = self.folder / f"tiny-{version}-py3-none-any.whl"
        info = f"tiny-{version}.dist-info"
        with zipfile.ZipFile(path, "w") as packed:
            packed.writestr("tiny.py", f"VERSION = {version!r}\ndef main(): pass\n")
            head = f"Metadata-Version: 2.1\nName: tiny\nVersion: {version}\n"
            packed.writestr(f"{info}/METADATA", head)
            kind = "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
            packed.writestr(f"{info}/WHEEL", kind)
            packed.writestr(
                f"{info}/entry_points.txt", "[console_scripts]\ntiny=tiny:main"
            )
            packed.writestr(f"{info}/RECORD", "")
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        return f"{path} --hash=sha256:{digest}\n"

    async def is_served(self, version="(?!99)"):
        """Fail unless this version answers, and an update has left nothing behind."""
        assert not self.kept.exists()
        assert re.match(f"wxgpt {version}", (await self.run("--version"))[1])
        async with platform(self.port) as server:
            assert not (await server.ask("还在吗")).faulty


@contextlib.asynccontextmanager
async def serving(folder, settings):
    """Give an installation that serves, with an answer in its database."""
    port = free_port()
    own = {"server": {"port": port}, "wechat": {"attempt_timeout": 5}}
    one = Installation(folder, merged(settings, own), port)
    try:
        await asyncio.to_thread(one.systemctl, "restart")
        async with platform(port) as server:
            await server.ask("/chatgpt 你好")
        yield one
    finally:
        await asyncio.to_thread(one.systemctl, "stop")


@pytest.fixture
async def installation(tmp_path, settings):
    """An installation that serves."""
    async with serving(tmp_path, settings) as one:
        yield one


NEXT_STEP = 1 + max(
    int(number)
    for number in re.findall(r"-- step (\d+)", (ROOT / "schema.sql").read_text())
)
MIGRATES = f"\n-- step {NEXT_STEP}\n\nCREATE TABLE fashion (a INTEGER) STRICT;\n"
# Serves nothing, after the database was brought up to date.
HANGS = ('log.info("serving on', 'time.sleep(600); log.info("serving on')
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
    modes = {p: p.stat().st_mode for p in installation.home.rglob("[!_]*")}
    assert all(mode & 0o004 for mode in modes.values())  # the service's user reads
    await installation.is_served("99")


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
    await installation.is_served()


async def test_a_database_that_was_not_changed_stays(installation):
    """What came in meanwhile is not lost for nothing."""
    archive = installation.release(DIES)
    status, out = await installation.run("update", archive)
    assert status == 1 and "serves again" in out
    assert "the database is the copy" not in out


async def test_packages_that_cannot_be_had_change_nothing(installation):
    """The service is not touched, and the old files are there."""
    files = installation.files()
    lock = "no-such-package==1 --hash=sha256:" + "0" * 64 + "\n"
    archive = installation.release(requirements__lock=lock)
    status, out = await installation.run("update", archive, PIP_NO_INDEX="1")
    assert status == 1 and "no-such-package" in out
    assert "nothing was changed" in out
    alone = {"PIP_INDEX_URL": "http://127.0.0.1:9", "PIP_RETRIES": "1"}
    status, out = await installation.run("update", archive, lang="zh", **alone)
    assert status == 1 and "网络通吗？在国内可以设镜像" in out, out
    assert installation.files() == files
    assert installation.orders() == ["restart"]
    await installation.is_served()


IMPORTS = ("import asyncio\n", "import asyncio\nimport tiny\n")


async def test_packages_come_and_go_with_their_version(installation):
    """A new one is installed for a new version; the old one has its own again."""
    lock = installation.wheel("1.0")
    archive = installation.release(IMPORTS, requirements__lock=lock)
    status, out = await installation.run("update", archive, PIP_NO_INDEX="1")
    assert status == 0 and "installing packages …" in out, out
    script = installation.python.with_name("tiny").read_text()
    assert script.startswith(f"#!{installation.python}\n")
    await installation.is_served("99")
    files = installation.files()
    lock = installation.wheel("2.0")
    archive = installation.release(DIES, requirements__lock=lock)
    status, out = await installation.run("update", archive, PIP_NO_INDEX="1")
    assert status == 1 and re.search(r"wxgpt 99\S+ serves again\n$", out), out
    assert installation.files() == files
    assert "VERSION = '1.0'" in (installation.packages / "tiny.py").read_text()
    await installation.is_served("99")


async def test_packages_outside_the_program_are_the_owners(installation, tmp_path):
    """They could not be brought back."""
    shutil.move(installation.home / ".venv", tmp_path / "venv")
    installation.python = tmp_path / "venv/bin/python"
    archive = installation.release(requirements__lock="x\n")
    status, out = await installation.run("update", archive)
    assert status == 1 and f"are not in {installation.home}/.venv: by hand" in out
    assert installation.orders() == ["restart"]


async def test_a_version_that_cannot_be_loaded_is_not_started(installation):
    """A syntax error, say; the service runs on."""
    archive = installation.release(("import asyncio", "import asyncio ("))
    status, out = await installation.run("update", archive)
    assert status == 1 and "SyntaxError" in out and "nothing was changed" in out
    assert installation.orders() == ["restart"]


async def test_an_archive_of_something_else_is_refused(installation):
    """Nothing of it is taken; nor of one that was not got whole."""
    folder, files = installation.folder, installation.files()
    with tarfile.open(folder / "other.tar.gz", "w:gz") as packed:
        packed.add(ROOT / "README.md", "README.md")
    (folder / "page.zip").write_text("<!doctype html>")
    for suffix in (".tar.gz", ".zip"):
        whole = pathlib.Path(installation.release(suffix=suffix)).read_bytes()
        (folder / f"half{suffix}").write_bytes(whole[: len(whole) // 2])
    for archive, words in (
        ("other.tar.gz", "other.tar.gz 不是 wxgpt 的安装包"),
        ("page.zip", "page.zip 不是安装包，或者没有下载完整：重新下载"),
        ("half.tar.gz", "没有下载完整"),
        ("half.zip", "没有下载完整"),
        ("none.zip", "none.zip：没有这个文件"),
        ("bin", "bin：是一个文件夹"),
    ):
        status, out = await installation.run("update", str(folder / archive), lang="zh")
        assert status == 1 and words in out and "什么也没有改，仍是 wxgpt" in out, out
    assert installation.files() == files
    await installation.is_served()


async def test_an_archive_cannot_write_elsewhere(installation):
    """Names with `..`, or what leads elsewhere in them, and links are left out."""
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
    archive = installation.release(suffix=".zip")
    with zipfile.ZipFile(archive, "a") as packed:
        packed.writestr("wxgpt-99/../../../evil.txt", "")
        packed.writestr("/evil.txt", "")
    status, out = await installation.run("update", archive)
    assert status == 0, out
    evil = [p.parent for p in installation.folder.rglob("evil.txt")]
    assert evil == [installation.home]  # zipfile leaves out what leads elsewhere
    assert not os.path.lexists("/evil.txt")
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


@pytest.fixture
def origin(installation):
    """Make the program a checkout; gives the repository that it was got from."""
    home, origin = installation.home, installation.folder / "origin"
    git(home, "init", "-q", "-b", "main")
    (home / ".gitignore").write_text("__pycache__/\n.venv\n")
    git(home, "add", ".")
    git(home, "commit", "-qm", "one")
    subprocess.run(["git", "clone", "-q", home, origin], check=True)
    git(home, "remote", "add", "origin", str(origin))
    git(home, "fetch", "-q")
    git(home, "branch", "--set-upstream-to=origin/main")
    return origin


async def test_a_checkout_is_updated_from_its_remote(installation, origin):
    """By git pull; and when that is already here, nothing is restarted."""
    home = installation.home
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
    (home / ".git/index.lock").touch()
    status, out = await installation.run("update")
    assert status == 1 and "index.lock': File exists. → is another git at" in out, out
    (home / ".git/index.lock").unlink()
    status, out = await installation.run("update")
    assert status == 0 and "99." in out.splitlines()[-1], out
    await installation.is_served("99")


async def test_a_checkout_that_cannot_be_pulled_is_explained(installation, origin):
    """Commits of the owner's, a remote that is not reached, a tag, and no git."""
    home = installation.home

    async def said():
        status, out = await installation.run("update", lang="zh")
        assert status == 1 and "什么也没有改，仍是 wxgpt" in out, out
        return out

    for folder in (home, origin):
        (folder / "pages/page.css").open("a").write(f"/* {folder} */\n")
        git(folder, "commit", "-qam", "mine")
    assert "→ 这里有你自己的提交：git pull --rebase" in await said()
    git(home, "remote", "set-url", "origin", "http://127.0.0.1:9/wxgpt")
    out = await said()
    assert "正在从 http://127.0.0.1:9/wxgpt 取新版本" in out
    assert "→ 网络通吗？也可以在别处下载安装包：wxgpt update 文件.tar.gz" in out
    git(home, "remote", "set-url", "origin", str(home.with_name("nobody")))
    assert "→ 地址对吗（git remote -v）？" in await said()
    git(home, "remote", "set-url", "origin", str(origin))
    git(home, "fetch", "-q")
    with pytest.raises(subprocess.CalledProcessError):  # a conflict
        git(home, "merge", "-q", "origin/main")
    assert "wxgpt: git 的合并没有做完：git merge --abort" in await said()
    git(home, "merge", "--abort")
    git(home, "checkout", "-q", "--detach")
    assert "没有跟着哪个分支：先 git switch main，或者给出安装包" in await said()
    os.symlink(sys.executable, installation.folder / "bin/python3")
    status, out = await installation.run("update", PATH=f"{installation.folder}/bin")
    assert status == 1 and "git is not here: apt install git" in out
    await installation.is_served()


# An update that is interrupted, and others in the way


class Watched:
    """A command that runs, and what it has said so far."""

    def __init__(self, process, reader):
        self.process, self.reader, self.out = process, reader, ""

    async def says(self, words):
        """Wait until it has said this."""
        async with limit(60, f"{words!r} after {self.out!r}"):
            while words not in self.out:
                self.out += (await self.reader.read(4096)).decode()
                assert not self.reader.at_eof(), self.out

    async def ends(self):
        """Wait for its end; return its exit status and all that it said."""
        self.out += (await within(90, "end of output", self.reader.read())).decode()
        assert "Traceback" not in self.out, self.out
        return await within(30, "end", self.process.wait()), self.out

    def signal(self, *numbers):
        """Send signals to the process and its children, as a terminal does."""
        for number in numbers:
            os.killpg(self.process.pid, number)


@pytest.fixture
async def silent_server():
    """The URL of a server that takes a question and says nothing."""

    async def say_nothing(reader, writer):
        asked.set()
        await reader.read()
        writer.close()

    asked = asyncio.Event()
    async with await asyncio.start_server(say_nothing, "127.0.0.1", 0) as server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", asked


async def stuck_in_pip(installation, url, **options):
    """Start an update that waits for packages until it is interrupted."""
    lock = "no-such-package==1 --hash=sha256:" + "0" * 64 + "\n"
    archive = installation.release(requirements__lock=lock)
    return await installation.start("update", archive, PIP_INDEX_URL=url, **options)


@pytest.mark.parametrize(
    "phase, number", [("git", signal.SIGINT), ("pip", signal.SIGTERM)]
)
async def test_ctrl_c_before_the_restart_changes_nothing(
    installation, origin, silent_server, phase, number
):
    """Whatever it waits for; it says so, and the service runs on."""
    files, (url, asked) = installation.files(), silent_server
    if phase == "pip":
        process = await stuck_in_pip(installation, url)
    else:
        git(installation.home, "remote", "set-url", "origin", f"{url}/wxgpt")
        process = await installation.start("update")
    update = Watched(process, process.stdout)
    await within(60, "question", asked.wait())
    update.signal(number)
    status, out = await update.ends()
    assert status == 130 and re.search("nothing was changed; .* runs on\n$", out), out
    assert installation.files() == files and installation.orders() == ["restart"]
    await installation.is_served()


async def test_ctrl_c_in_the_restart_is_not_heard(installation):
    """The update goes on to its end."""
    archive = installation.release(steps=MIGRATES)
    process = await installation.start("update", archive)
    update = Watched(process, process.stdout)
    await update.says("is in place, restarting")
    update.signal(signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    status, out = await update.ends()
    assert status == 0 and re.search(r"wxgpt 99\S+ serves\n$", out), out
    await installation.is_served("99")


@contextlib.contextmanager
def terminal():
    """Give both ends of a terminal; closing the first is the end of an SSH session."""
    ours, theirs = pty.openpty()
    try:
        yield ours, theirs
    finally:
        for end in (ours, theirs):
            with contextlib.suppress(OSError):
                os.close(end)


ON_TERMINAL = ("setsid", "--ctty", "--wait")


async def test_a_cut_session_before_the_restart_changes_nothing(
    installation, silent_server
):
    """As Ctrl-C does."""
    files, (url, asked) = installation.files(), silent_server
    with terminal() as (ours, theirs):
        streams = {"stdin": theirs, "stdout": theirs, "prefix": ON_TERMINAL}
        process = await stuck_in_pip(installation, url, **streams)
        await within(60, "question", asked.wait())
        os.close(theirs)
        os.close(ours)
        await within(60, "end", process.wait())
    assert installation.files() == files and installation.orders() == ["restart"]
    await installation.is_served()


@pytest.mark.parametrize("is_good", [True, False])
async def test_a_cut_session_in_the_restart_is_not_heard(installation, is_good):
    """The update goes on to its end, forward or back, with nobody to tell."""
    archive = installation.release(*([] if is_good else [DIES]), steps=MIGRATES)
    with terminal() as (ours, theirs):
        streams = {"stdin": theirs, "stdout": theirs, "prefix": ON_TERMINAL}
        process = await installation.start("update", archive, **streams)
        out = b""
        while b"restarting" not in out:
            out += await within(60, "restart", asyncio.to_thread(os.read, ours, 4096))
        os.close(theirs)
        os.close(ours)
        await within(60, "end", process.wait())
    await installation.is_served("99" if is_good else "(?!99)")
    assert installation.schema() == NEXT_STEP - (not is_good)


async def test_two_updates_do_not_run_at_once(installation, silent_server):
    """The second is told to wait; the first is not disturbed."""
    url, asked = silent_server
    process = await stuck_in_pip(installation, url)
    first = Watched(process, process.stdout)
    await within(60, "question", asked.wait())
    status, out = await installation.run("update", lang="zh")
    assert (status, out) == (1, "wxgpt: 另一个更新正在进行：等它结束\n")
    assert installation.kept.exists()
    first.signal(signal.SIGINT)
    assert (await first.ends())[0] == 130
    await installation.is_served()


async def test_what_a_killed_preparation_left_is_no_obstacle(
    installation, silent_server
):
    """The next update begins anew."""
    url, asked = silent_server
    process = await stuck_in_pip(installation, url)
    await within(60, "question", asked.wait())
    os.killpg(process.pid, signal.SIGKILL)
    await process.wait()
    assert installation.kept.exists()
    status, out = await installation.run("update", installation.release())
    assert status == 0 and re.search(r"wxgpt 99\S+ serves\n$", out), out
    await installation.is_served("99")


@pytest.mark.parametrize("is_good", [True, False])
async def test_an_update_that_was_killed_in_the_restart_is_ended(installation, is_good):
    """By the next one: with the new version if it serves, else with the old one."""
    archive = installation.release(*([] if is_good else [DIES]), steps=MIGRATES)
    before = installation.questions()
    process = await installation.start("update", archive)
    update = Watched(process, process.stdout)
    await update.says("is in place, restarting")
    update.signal(signal.SIGKILL)
    await update.ends()
    status, out = await installation.run("update", lang="zh")
    assert status == (not is_good) and "上次的更新中断了：先把它做完" in out, out
    end = r"wxgpt 99\S+ 已在运行\n$" if is_good else r"wxgpt (?!99)\S+ 又在运行了\n$"
    assert re.search(end, out), out
    assert installation.questions() == before
    assert installation.schema() == NEXT_STEP - (not is_good)
    await installation.is_served("99" if is_good else "(?!99)")


async def test_half_a_change_of_places_goes_back(installation):
    """As after a power failure just then."""
    files, kept = installation.files(), installation.kept
    for folder in ("new", "program"):
        (kept / folder).mkdir(parents=True)
    (kept / "added").write_text("extra.txt")
    (installation.home / "extra.txt").touch()
    shutil.move(installation.home / "wxgpt.py", kept / "program")
    source = (kept / "program/wxgpt.py").read_text()
    new = source.replace('VERSION = "', 'VERSION = "99.', 1)
    (installation.home / "wxgpt.py").write_text(new)
    (kept / "new/schema.sql").write_text("new")
    status, out = await installation.run("update")
    assert status == 1 and re.search(r"wxgpt (?!99)\S+ serves again\n$", out), out
    assert installation.files() == files
    await installation.is_served()


@pytest.fixture
def small_disk(tmp_path):
    """A folder on a disk of its own, of 32 MB."""
    (folder := tmp_path / "disk").mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=32m", "tmpfs", str(folder)]
    if os.getuid() or subprocess.run(mount, stderr=subprocess.DEVNULL).returncode:
        pytest.skip("no tmpfs can be mounted here: run the tests as root")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(folder, but):
    """Fill a folder's disk, but for so many bytes."""
    (folder / "filler").unlink(missing_ok=True)
    free = shutil.disk_usage(folder).free
    (folder / "filler").write_bytes(bytes(free - but))


async def test_a_full_disk_changes_nothing(small_disk, settings):
    """It is said, with what an update needs."""
    async with serving(small_disk, settings) as one:
        files, archive = one.files(), one.release()
        pages = sum(-(-len(content) // 4096) for content in files.values())
        for room in (100_000, pages * 4096 + 300_000):  # for neither; for one of two
            fill(small_disk, room)
            status, out = await one.run("update", archive, lang="zh")
            assert status == 1 and "：磁盘满了\n" in out, out
            assert "先腾出空间（df -h 看哪个磁盘满了）" in out
            assert "什么也没有改，仍是 wxgpt" in out
        (small_disk / "filler").unlink()
        assert one.files() == files and one.orders() == ["restart"]
        await one.is_served()


FILLS = (
    'log.info("serving on',
    "f = open(config.database.path + '-filler', 'wb', 0)\n"
    "        while True: f.write(bytes(4096))\n"
    '        log.info("serving on',
)


async def test_a_database_that_cannot_be_put_back_is_kept(
    installation, settings, small_disk
):
    """For the next try, once there is room."""
    installation.systemctl("stop")
    path = small_disk / "wxgpt.db"
    shutil.copy(installation.database, path)
    installation.database, before = path, installation.questions()
    own = {"server": {"port": installation.port}, "database": {"path": str(path)}}
    write_settings(installation.folder / "wxgpt.toml", merged(settings, own))
    installation.systemctl("restart")
    archive = installation.release(FILLS, steps=MIGRATES)
    status, out = await installation.run("update", archive, lang="zh")
    assert status == 1 and "：磁盘满了" in out, out
    words = f"原来的程序和数据库还在 {installation.kept}：排除上面的问题，再运行 wxgpt update"
    assert words in out
    (small_disk / "wxgpt.db-filler").unlink()
    status, out = await installation.run("update", lang="zh")
    assert status == 1 and "数据库已换回更新前的副本" in out, out
    assert installation.questions() == before
    assert installation.schema() == NEXT_STEP - 1
    await installation.is_served()


async def test_without_a_service_the_owner_restarts(installation):
    """The new version is in place; nothing is asked of systemd."""
    show = installation.folder / "bin/systemctl"
    show.rename(hidden := show.with_name("hidden"))
    own = ("--config", f"{installation.folder}/wxgpt.toml")
    archive = installation.release()
    status, out = await installation.run("update", archive, *own, lang="zh")
    assert status == 0 and re.search(r"wxgpt 99\S+ 已放好：请自己重启它\n$", out), out
    assert not installation.kept.exists()
    status, out = await installation.run("update", archive, *own, lang="zh")
    assert status == 0 and out.endswith("已经是最新版本\n"), out
    hidden.rename(show)
    assert installation.orders() == ["restart"]
    await installation.is_served("99")


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
    status, out = await installation.run("backup", str(installation.folder))
    named = list(installation.folder.glob("wxgpt-2*.db"))
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


# the short command finds its service

UNITS = """#!{python}
import pathlib, sys

verb, *words = sys.argv[1:]
units = sorted(pathlib.Path("{folder}/units").iterdir())
if verb == "list-units":
    for unit in units:
        print(unit.name, "loaded active running wxgpt")
for unit in units:
    if unit.name in words:
        print(unit.read_text())
"""
SHOWN = "LoadState=loaded\nExecStart={{ argv[]={root}/.venv/bin/python -m wxgpt }}\n"


@pytest.fixture
def units(tmp_path, settings, monkeypatch):
    """Make systemd know the units that a test writes; gives a function to write one."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "units").mkdir()
    script = tmp_path / "bin/systemctl"
    script.write_text(UNITS.format(python=sys.executable, folder=tmp_path))
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    monkeypatch.setenv("OPENAI_API_KEY", "sk-ofTheShell")

    def write(name, lines="", **changes):
        path = tmp_path / f"{name}.toml"
        own = {"database": {"path": str(tmp_path / f"{name}.db")}}
        write_settings(path, merged(merged(settings, own), changes))
        lines += f"\nLoadCredential=wxgpt.toml:{path}"
        text = SHOWN.format(root=ROOT) + lines
        (tmp_path / f"units/{name}.service").write_text(text)
        return path

    return write


async def command(*words, **env):
    """Run the command line in no folder of its own; return status and output."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, ROOT / "wxgpt.py", *map(str, words)),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        cwd="/",
        env=os.environ | env,
    )
    out, _ = await within(60, f"end of {words}", process.communicate())
    assert b"Traceback" not in out, out.decode()
    return process.returncode, out.decode()


async def test_of_several_services_the_usual_one_is_meant(units, tmp_path):
    """And the others are named; --config chooses one of them."""
    units("wxgpt")
    other = units("wxgpt-b")
    _, out = await command("stats", WXGPT_LANG="zh")
    assert f"有几个服务，这是 wxgpt.service；看别的：--config {other}\n" in out
    assert f"{tmp_path}/wxgpt.db：wxgpt 还没有运行过" in out
    _, out = await command("stats", "--config", other, WXGPT_LANG="zh")
    assert out == f"wxgpt: {tmp_path}/wxgpt-b.db：wxgpt 还没有运行过\n"
    journalctl = tmp_path / "bin/journalctl"
    journalctl.write_text('#!/bin/sh\necho "$@"\n')
    journalctl.chmod(0o755)
    _, out = await command("logs", "--config", other)
    assert out == "--unit=wxgpt-b.service --lines=50 --follow\n"


async def test_the_only_service_may_have_another_name(units, tmp_path):
    """It is the one that is meant."""
    units("my-wxgpt")
    _, out = await command("stats", WXGPT_LANG="en")
    assert out == f"wxgpt: {tmp_path}/my-wxgpt.db: wxgpt has not run yet\n"


async def test_the_environment_is_the_services(units, tmp_path, settings):
    """From its files too, as systemd reads them; what the shell sets does not count."""
    del settings["assistants"]["chatgpt"]["api_key"]
    (tmp_path / "one").write_text("; a comment\n# another\nOPENAI_API_KEY=overruled\n")
    (tmp_path / "two").write_text("X=it's\n OPENAI_API_KEY='sk two' \n")
    lines = "\n".join(
        f"EnvironmentFiles={tmp_path / name} (ignore_errors=no)"
        for name in ("one", "two", "none")
    )
    units("wxgpt", lines)
    _, out = await command("stats", WXGPT_LANG="zh")
    assert "环境变量 OPENAI_API_KEY：现在是" in out, out  # a key has no space
    (tmp_path / "two").write_text("OPENAI_API_KEY=sk-two\n")
    _, out = await command("stats", WXGPT_LANG="zh")
    assert "还没有运行过" in out
    (tmp_path / "two").unlink()
    (tmp_path / "one").unlink()
    _, out = await command("stats", WXGPT_LANG="zh")
    assert "assistants.chatgpt.api_key" in out  # that of the shell is not its


async def test_settings_in_the_command_of_a_unit_are_found(units, tmp_path):
    """Where no credential hands them over."""
    path = units("wxgpt")
    unit = tmp_path / "units/wxgpt.service"
    shown = SHOWN.format(root=ROOT).replace("wxgpt }", f"wxgpt --config {path} ; }}")
    unit.write_text(shown)
    _, out = await command("stats", WXGPT_LANG="en")
    assert out == f"wxgpt: {tmp_path}/wxgpt.db: wxgpt has not run yet\n"


async def test_a_folder_that_is_gone_is_no_obstacle(installation):
    """An update has replaced it while the owner's shell stood there."""
    elsewhere = installation.folder / "elsewhere"
    code = "import os, sys; os.rmdir(os.getcwd()); os.execv(sys.argv[1], sys.argv[1:])"
    elsewhere.mkdir()
    process = await installation.start("stats", prefix=(sys.executable, "-c", code))
    out, _ = await within(60, "end", process.communicate())
    assert process.returncode == 0 and b"1st request 1" in out, out


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
        assert "\n  | wxgpt: it broke\n" in out
        assert re.search(r"wxgpt (?!99)\S+ serves again\n$", out), out
        status, out = await update(archive(HANGS, steps=MIGRATES))
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
    assert "✓ 微信的消息：最近一条在 0 分钟前，能解读" in out
    await machine.run("systemctl", "stop", "wxgpt")
    _, out = await machine.run("env", "WXGPT_LANG=zh", "wxgpt", "check")
    assert "wxgpt 没有运行" in out and "systemctl start wxgpt" in out

    async def as_nobody(name):
        nobody = ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups")
        status, out = await machine.run(*nobody, "env", "WXGPT_LANG=zh", "wxgpt", name)
        assert status == 1
        return out

    for name in ("check", "stats", "update", "backup"):
        assert "/etc/wxgpt/wxgpt.toml 只有 root 能读：前面加 sudo" in await as_nobody(
            name
        )
    assert "日志 只有 root 能读：前面加 sudo" in await as_nobody("logs")
    machine.settings.chmod(0o644)
    for name in ("stats", "backup"):
        words = "/var/lib/wxgpt/wxgpt.db 只有 root 能读：前面加 sudo"
        assert words in await as_nobody(name)
