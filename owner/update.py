"""`wxgpt update`: a newer version in place of this one, or this one again.

The new version is made ready in a folder beside the program, with packages of its own;
until then nothing that serves is touched. Then the files change places. The old ones
and a copy of the database stay in that folder until the new version serves; if it does
not, both come back. Once it has served, it stays.
"""

import contextlib
import fcntl
import fnmatch
import lzma
import os
import pathlib
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import tarfile
import tempfile
import time
import typing
import urllib.request
import zipfile
import zlib

from owner.layout import wrap
from owner.service import (
    HOME,
    UNIT,
    complain,
    copy_database,
    reason,
    say,
    show_unit,
    show_units,
    systemctl,
)
from wxgpt import VERSION, Config

# Beside the program, so that it lies on the same disk; root's alone. What an update
# that was killed leaves there, the next one goes back to or removes.
KEPT = HOME.with_name(f"{HOME.name}-kept")
NEW = KEPT / "new"  # empty once the new version is in place
OLD = KEPT / "program"  # exists from when the files change places
ADDED = KEPT / "added"  # names of what only the new version has
COPY = KEPT / "copy.db"
STOP_SECONDS = 12.0  # the old process ends within ten
START_SECONDS = 10.0  # then the new one has so long until it serves
KILL_SECONDS = 4.0  # one that does not serve has no answers to end
LOG_LINES = 3  # of a failed start are shown
SETTINGS = ("[", "public_url=", "serving on", "stopping")  # lines that say nothing new
# What is the owner's stays as it is, whatever becomes of the program.
OWN = ("wxgpt.toml", "*.db", "*.db-*", "__pycache__")
NOT_OURS = (".git", ".venv", *OWN)  # is not taken from an archive
RELEASE = ("wxgpt.py", "schema.sql", "wxgpt.service", "requirements.lock")
DAMAGE = (
    *(EOFError, RuntimeError, zlib.error, lzma.LZMAError),
    *(tarfile.TarError, zipfile.BadZipFile),
)
FULL = ("No space left on device", "database or disk is full")
# What others say when a newer version cannot be had, and what to do then.
HINTS = {
    "Retrying (": "is there a network? In China set a mirror: pip config set "
    "global.index-url URL",
    "unable to access": "is there a network? Or get the archive elsewhere: "
    "wxgpt update FILE.tar.gz",
    "Not possible to fast-forward": "there are commits of your own: git pull --rebase",
    "index.lock": "is another git at work? If none is: rm .git/index.lock",
    "Could not read from remote": "is its address right (git remote -v)? ssh needs a "
    "key, https none",
    "not a git repository": "git's folder is damaged: give an archive, "
    "wxgpt update FILE.tar.gz",
    "would be overwritten by merge": "files of yours have the names of new ones: move "
    "them away",
}
ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)  # SIGHUP: ssh was cut off


class UpdateError(Exception):
    """Why there is no new version: a text of words.toml and its values."""

    def __init__(self, english: str, **values: object) -> None:
        super().__init__(english)
        self.english, self.values = english, values


def run(*command: str, cwd: pathlib.Path = NEW) -> str:
    """Return what a command wrote; raise UpdateError with its last words."""
    try:
        done = subprocess.run(
            command,
            check=False,
            cwd=cwd,
            # What others say is looked for in English.
            env=os.environ | {"GIT_TERMINAL_PROMPT": "0", "LC_ALL": "C.UTF-8"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        )
    except FileNotFoundError:
        words = "{name} is not here: apt install {name}"
        raise UpdateError(words, name=command[0]) from None
    if done.returncode:
        lines = (done.stderr.strip() or done.stdout.strip()).splitlines()
        errors = [line for line in lines if re.match("(?i)error:|fatal:", line)]
        what = (errors or lines or [str(done.returncode)])[-1]
        for words, hint in HINTS.items():
            if words in done.stderr:
                raise UpdateError("{what} → {hint}", what=what, hint=hint)
        raise UpdateError("{what}", what=what)
    return done.stdout.strip()


def version_of(python: str, folder: pathlib.Path) -> str:
    """Return the version of the program in a folder."""
    return run(python, "wxgpt.py", "--version", cwd=folder).removeprefix("wxgpt ")


# Getting the new files


def is_named(name: str, patterns: typing.Iterable[str]) -> bool:
    """Say whether a file's name is one of these patterns."""
    return any(fnmatch.fnmatch(name, pattern) for pattern in patterns)


def extract(archive: str, folder: pathlib.Path) -> None:
    """Extract the plain files of an archive, none of them outside the folder."""
    if zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as packed:
            packed.extractall(folder)  # which leaves out `..`
        return
    with tarfile.open(archive) as packed:
        for member in packed:
            parts = pathlib.PurePosixPath(member.name).parts
            is_plain = member.isfile() or member.isdir()
            if is_plain and ".." not in parts and parts[:1] != ("/",):
                packed.extract(member, folder, set_attrs=False)


def unpack(archive: str, folder: pathlib.Path) -> pathlib.Path:
    """Unpack a release; return the folder in it with the program."""
    try:
        extract(archive, folder)
    except (OSError, *DAMAGE) as error:
        if getattr(error, "errno", None):  # the disk's, or no such file
            raise
        words = "{path} is damaged, or no archive: get it again"
        raise UpdateError(words, path=archive) from None
    for path in folder.rglob("*"):  # the service's user reads them
        path.chmod(0o755 if path.is_dir() else 0o644)
    for program in (folder, *folder.iterdir()):
        if all((program / name).is_file() for name in RELEASE):
            return program
    raise UpdateError("{path} is no archive of wxgpt", path=archive)


def take_archive(archive: str) -> None:
    """Put the files of an archive over ours."""
    with tempfile.TemporaryDirectory(dir=KEPT) as folder:
        for new in unpack(archive, pathlib.Path(folder)).iterdir():
            if not is_named(new.name, NOT_OURS):
                remove(NEW / new.name)
                shutil.move(new, NEW / new.name)


def pull() -> None:
    """Bring the checkout to the newest commit of its branch."""
    if not (NEW / ".git").exists():
        raise UpdateError(
            "{path} is no checkout of git: give the archive of a new version, "
            "wxgpt update FILE.tar.gz",
            path=HOME,
        )
    changed = run("git", "status", "--porcelain", "--untracked-files=no")
    if re.search("(?m)^(U.|.U|AA|DD) ", changed):
        words = "git was left in a merge here: git merge --abort, or git rebase --abort"
        raise UpdateError(words)
    if changed:
        raise UpdateError(
            "these files were changed here, put them back first (git checkout FILE): "
            "{names}",
            names=", ".join(line.split(maxsplit=1)[1] for line in changed.splitlines()),
        )
    try:
        source = run("git", "rev-parse", "--abbrev-ref", "@{upstream}")
    except UpdateError:
        words = "{path} follows no branch: git switch main, or give an archive"
        raise UpdateError(words, path=HOME) from None
    url = run("git", "remote", "get-url", source.partition("/")[0])
    say("asking {url} for a newer version …", url=url)
    run("git", "pull", "--ff-only", "--quiet")


# The new version, made ready beside the old one


def remove(path: pathlib.Path) -> None:
    """Remove a file or a folder, if there is one."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def clear() -> None:
    """Remove what was kept, as far as it goes."""
    shutil.rmtree(KEPT, ignore_errors=True)


def copy_file(source: str, target: str) -> None:
    """Copy a file of a tree; what fails ends the whole copy at once."""
    try:
        shutil.copy2(source, target, follow_symlinks=False)
    except OSError as error:  # copytree would go on, and end in a list of all failures
        raise UpdateError("{path}: {why}", path=target, why=reason(error)) from None


def copy_program() -> None:
    """Copy the program and its packages, but not what is the owner's."""
    NEW.mkdir()
    for old in HOME.iterdir():
        if is_named(old.name, OWN):
            continue
        if old.is_dir() and not old.is_symlink():
            shutil.copytree(old, NEW / old.name, True, copy_function=copy_file)
        else:
            copy_file(str(old), str(NEW / old.name))


def own_python() -> pathlib.Path | None:
    """Return the new version's own Python; None if ours is not the program's own."""
    venv = HOME / ".venv"
    if venv.is_symlink() or not venv.exists() or not venv.samefile(sys.prefix):
        return None
    return NEW / ".venv/bin/python"


def install_packages() -> None:
    """Install what the new lock file asks for, if that has changed."""
    lock = "requirements.lock"
    if (NEW / lock).read_bytes() == (HOME / lock).read_bytes():
        return
    if not (python := own_python()):
        words = "other packages are needed, and those here are not in {path}: by hand"
        raise UpdateError(words, path=HOME / ".venv")
    say("installing packages …")
    pip = (str(python), "-m", "pip", "install", "--disable-pip-version-check")
    run(*pip, "--quiet", "-r", lock)
    here, there = os.fsencode(NEW), os.fsencode(HOME)
    for script in python.parent.iterdir():  # they name their Python
        if script.is_symlink() or not script.is_file():
            continue
        if here in (content := script.read_bytes()):
            script.write_bytes(content.replace(here, there))


def contents(folder: pathlib.Path) -> dict[pathlib.Path, bytes]:
    """Return the program's files in a folder, with what is in them."""
    found = {}
    for place, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not is_named(name, NOT_OURS)]
        for path in (pathlib.Path(place, name) for name in names):
            if path.is_file() and not is_named(path.name, NOT_OURS):
                found[path.relative_to(folder)] = path.read_bytes()
    return found


def prepare(archive: str) -> str:
    """Make the new version ready; return its number, empty if it is this one."""
    remove(KEPT)
    KEPT.mkdir(mode=0o700)
    say(
        "wxgpt {version} in {path}: preparing the new one …", version=VERSION, path=HOME
    )
    copy_program()
    if archive:
        take_archive(archive)
    else:
        pull()
    if contents(NEW) == contents(HOME):
        return ""
    install_packages()
    return version_of(str(own_python() or sys.executable), NEW)


# Changing places


def change_places() -> None:
    """Put the new version in place, and the old one aside."""
    names = [path.name for path in NEW.iterdir()]
    ADDED.write_text("\n".join(n for n in names if not os.path.lexists(HOME / n)))
    OLD.mkdir()
    for name in names:
        if os.path.lexists(HOME / name):
            shutil.move(HOME / name, OLD / name)
        shutil.move(NEW / name, HOME / name)


def change_back() -> None:
    """Put the old version back in place; what the new one added goes."""
    if not OLD.exists():
        return
    remove(NEW)
    for name in ADDED.read_text().splitlines():
        remove(HOME / name)
    for old in OLD.iterdir():
        remove(HOME / old.name)
        shutil.move(old, HOME / old.name)


def change_unit(old: pathlib.Path, new: pathlib.Path, installed: pathlib.Path) -> bool:
    """Install another unit; false if the installed one is not as it came."""
    if not installed.is_file() or not old.is_file() or not new.is_file():
        return True
    present = installed.read_bytes()
    if new.read_bytes() in (old.read_bytes(), present):
        return True
    if present != old.read_bytes():
        return False
    shutil.copyfile(new, installed)
    systemctl("daemon-reload")
    return True


def schema_of(path: str) -> int:
    """Return how many steps of the schema a database has run."""
    uri = f"{pathlib.Path(path).absolute().as_uri()}?mode=ro"
    with contextlib.closing(sqlite3.connect(uri, uri=True)) as db:
        return db.execute("PRAGMA user_version").fetchone()[0]


def restore_database(path: str) -> None:
    """Put the database's copy back if the new version has changed its schema.

    Else nothing is lost of what came meanwhile. Its owner and mode stay.
    """
    if not COPY.exists():
        return
    steps = schema_of(str(COPY))
    with contextlib.suppress(sqlite3.Error):  # it is broken: the copy is not
        if schema_of(path) == steps:
            return
    new, old = f"{path}-restored", os.stat(path)
    pathlib.Path(new).unlink(missing_ok=True)
    try:  # beside it, so that a full disk costs nothing
        with open(new, "xb") as target, COPY.open("rb") as source:
            os.fchown(target.fileno(), old.st_uid, old.st_gid)
            os.fchmod(target.fileno(), old.st_mode & 0o777)
            shutil.copyfileobj(source, target)
            os.fsync(target.fileno())
    except OSError:
        os.unlink(new)
        raise
    for suffix in ("-wal", "-shm"):
        pathlib.Path(path + suffix).unlink(missing_ok=True)
    os.replace(new, path)
    say("the database is the copy from before")


# The service


def serves(config: Config) -> bool:
    """Say whether wxgpt answers at its port."""
    host = config.server.host
    near = "127.0.0.1" if host in ("0.0.0.0", "::") else host
    near = f"[{near}]" if ":" in near else near
    url = f"http://{near}:{config.server.port}/healthz"
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with direct.open(url, timeout=2) as response:
            return response.headers["Server"] == "wxgpt"
    except (OSError, ValueError):
        return False


def restart(config: Config, name: str) -> bool:
    """Restart the service; say whether it serves in time."""
    pid = show_unit(name).get("MainPID", "0")
    command = ["systemctl", "restart", name]  # returns when it says READY
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    end = time.monotonic() + STOP_SECONDS
    while os.path.exists(f"/proc/{pid}") and time.monotonic() < end:
        time.sleep(0.1)
    end = time.monotonic() + START_SECONDS
    try:
        status = process.wait(START_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()  # systemd itself goes on, until it is told to stop
        process.wait()
        return False
    while not status and time.monotonic() < end:
        if serves(config):
            return True
        time.sleep(0.2)
    return False


def stop(name: str) -> None:
    """Stop the service, by force if it does not listen."""
    try:
        systemctl("stop", name, timeout=KILL_SECONDS)
    except subprocess.TimeoutExpired:
        systemctl("kill", "--signal=KILL", name)
        systemctl("stop", name)


def show_log(name: str, since: float) -> None:
    """Show the last of what the service has written in that time, but its settings."""
    command = ["journalctl", f"_SYSTEMD_UNIT={name}", "--no-pager", "--output=cat"]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        subprocess.run(["journalctl", "--sync"], capture_output=True, timeout=20)
        command.append(f"--since=@{since:.6f}")
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
        lines = done.stdout.splitlines()
        news = [line for line in lines if not line.startswith(SETTINGS)]
        for line in news[-LOG_LINES:]:
            say("{line}", line=wrap(line, "    ", "  | "))


def switch(config: Config, unit: typing.Mapping[str, str], version: str) -> int:
    """Restart with the new version, or go back to what was kept; return the status."""
    if not unit:
        clear()
        say("wxgpt {version} is in place: restart it yourself", version=version)
        return 0
    say(
        "wxgpt {version} is in place, restarting (half a minute at most) …",
        version=version,
    )
    began, is_up, name = time.time(), False, unit["Id"]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        installed = pathlib.Path(unit.get("FragmentPath") or "/nowhere")
        if not change_unit(OLD / UNIT, HOME / UNIT, installed):
            words = "{path} was changed here and stays; the new version's is {new}"
            say(words, path=installed, new=HOME / UNIT)
        is_up = restart(config, name)
    if not is_up:
        complain("wxgpt {version} does not start: going back", version=version)
        show_log(name, began)
        return go_back(config, unit)
    clear()
    say("wxgpt {version} serves", version=version)
    for other in (one["Id"] for one in show_units() if one["Id"] != name):
        say("{other} runs this program, too: systemctl restart {other}", other=other)
    return 0


def go_back(config: Config, unit: typing.Mapping[str, str]) -> int:
    """Put everything back as it was kept, and restart; return the exit status, 1."""
    try:
        if unit:
            stop(unit["Id"])
            installed = pathlib.Path(unit.get("FragmentPath") or "/nowhere")
            change_unit(HOME / UNIT, OLD / UNIT, installed)
        change_back()
        restore_database(config.database.path)
    except (OSError, sqlite3.Error, subprocess.SubprocessError) as error:
        complain_of(error)
        words = (
            "what was kept is in {path}; free what is in the way, then: wxgpt update"
        )
        complain(words, path=KEPT)
        return 1
    clear()
    if not unit:
        say("wxgpt is as it was: restart it yourself")
    elif restart(config, unit["Id"]):
        say("wxgpt {version} serves again", version=version_of(sys.executable, HOME))
    else:
        complain("it does not start either: journalctl -u wxgpt -n 20")
    return 1


# The command


def complain_of(error: Exception) -> None:
    """Say why there is no new version."""
    if not isinstance(error, UpdateError):
        path = getattr(error, "filename", None) or KEPT
        error = UpdateError("{path}: {why}", path=path, why=reason(error))
    complain(error.english, **error.values)
    if error.values.get("why") in FULL:
        complain(
            "an update takes room for one more copy of program and database: df -h"
        )


def catch(handler: typing.Any) -> None:
    """Handle a Ctrl-C so, and the end of the terminal."""
    for number in ENDING:
        signal.signal(number, handler)


@contextlib.contextmanager
def alone() -> typing.Iterator[bool]:
    """Keep other updates of this program out; says whether there is none yet."""
    lock = os.open(HOME, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        is_alone = True
    except BlockingIOError:
        is_alone = False
    try:
        yield is_alone
    finally:
        os.close(lock)


def update_command(config: Config, unit: typing.Mapping[str, str], archive: str) -> int:
    """Bring a newer version, or this one again; return the exit status."""
    archive = os.path.abspath(archive) if archive else ""
    os.umask(0o022)  # the service's user reads the program
    with alone() as is_alone:
        if not is_alone:
            complain("another update is at work: wait for its end")
            return 1
        if OLD.exists():
            complain("the last update was interrupted: ending it first")
            catch(signal.SIG_IGN)
            if NEW.exists() and not any(NEW.iterdir()):
                return switch(config, unit, VERSION)
            return go_back(config, unit)
        return update(config, unit, archive)


def update(config: Config, unit: typing.Mapping[str, str], archive: str) -> int:
    """Bring a newer version, if no earlier update is in the way."""
    catch(signal.default_int_handler)
    status = 1
    try:
        version = prepare(archive)
        if version and unit and os.path.exists(config.database.path):
            copy_database(config.database.path, str(COPY))
        catch(signal.SIG_IGN)  # from here on: the new one, or the old one again
        if version:
            change_places()
    except (UpdateError, OSError, sqlite3.Error) as error:
        complain_of(error)
    except KeyboardInterrupt:
        status = 128 + signal.SIGINT
    else:
        if version:
            return switch(config, unit, version)
        say("this is the newest version already")
        status = 0
    catch(signal.SIG_IGN)
    change_back()
    clear()
    if status:
        say("nothing was changed; wxgpt {version} runs on", version=VERSION)
    return status
