"""`wxgpt update`: a newer version in place of this one, or this one again.

The program is kept aside with its packages, and so is the database, until the new
version serves. When it does not start, both come back. Once it has served, it stays.
"""

import contextlib
import fnmatch
import os
import pathlib
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

from owner.service import HOME, UNIT, complain, copy_database, say, systemctl
from wxgpt import VERSION, Config

STOP_SECONDS = 12.0  # the old process ends within ten
START_SECONDS = 10.0  # then the new one has so long until it serves
# What is the owner's stays as it is, whatever becomes of the program.
OWN = ("wxgpt.toml", "*.db", "*.db-*", "__pycache__")
NOT_OURS = (".git", ".venv", *OWN)  # is not taken from an archive


class UpdateError(Exception):
    """Why there is no new version: a text of words.toml and its values."""

    def __init__(self, english: str, **values: object) -> None:
        super().__init__(english)
        self.english, self.values = english, values


def run(*command: str, cwd: pathlib.Path = HOME) -> str:
    """Return what a command wrote; raise UpdateError with its last words."""
    try:
        done = subprocess.run(
            command, check=False, cwd=cwd, capture_output=True, text=True
        )
    except OSError as error:
        raise UpdateError("{what}", what=f"{command[0]}: {error.strerror}") from None
    if done.returncode:
        words = (done.stderr.strip() or done.stdout.strip()).splitlines()
        why = words[-1] if words else done.returncode
        name = os.path.basename(command[0])
        raise UpdateError("{what}", what=f"{name}: {why}")
    return done.stdout.strip()


# Getting the new files


def is_named(name: str, patterns: typing.Iterable[str]) -> bool:
    """Say whether a file's name is one of these patterns."""
    return any(fnmatch.fnmatch(name, pattern) for pattern in patterns)


def unpack(archive: str, folder: pathlib.Path) -> pathlib.Path:
    """Unpack a release; return the folder in it with the program."""
    try:
        if zipfile.is_zipfile(archive):
            with zipfile.ZipFile(archive) as packed:
                packed.extractall(folder)  # which leaves out `..`
        else:
            with tarfile.open(archive) as packed:
                for member in packed:
                    parts = pathlib.PurePosixPath(member.name).parts
                    is_plain = member.isfile() or member.isdir()
                    if is_plain and ".." not in parts and parts[:1] != ("/",):
                        packed.extract(member, folder, set_attrs=False)
    except (OSError, tarfile.TarError, zipfile.BadZipFile) as error:
        why = getattr(error, "strerror", None) or error
        raise UpdateError("{path}: {why}", path=archive, why=why) from None
    for path in folder.rglob("*"):  # the service's user reads them
        path.chmod(0o755 if path.is_dir() else 0o644)
    for program in (*folder.glob("wxgpt.py"), *folder.glob("*/wxgpt.py")):
        if (program.parent / "schema.sql").exists():
            return program.parent
    raise UpdateError("{path} is no archive of wxgpt", path=archive)


def take_archive(archive: str) -> None:
    """Put the files of an archive in the place of ours."""
    with tempfile.TemporaryDirectory() as folder:
        for new in unpack(archive, pathlib.Path(folder)).iterdir():
            if not is_named(new.name, NOT_OURS):
                put(new, HOME / new.name)


def pull() -> None:
    """Bring the checkout to the newest commit of its branch."""
    if not (HOME / ".git").exists():
        raise UpdateError(
            "{path} is no checkout of git: give the archive of a new version, "
            "wxgpt update FILE.tar.gz",
            path=HOME,
        )
    if changed := run("git", "status", "--porcelain", "--untracked-files=no"):
        raise UpdateError(
            "these files were changed here, put them back first (git checkout FILE): "
            "{names}",
            names=", ".join(line.split(maxsplit=1)[1] for line in changed.splitlines()),
        )
    run("git", "pull", "--ff-only", "--quiet")


# Keeping the old ones


def remove(path: pathlib.Path) -> None:
    """Remove a file or a folder, if there is one."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def put(source: pathlib.Path, target: pathlib.Path) -> None:
    """Copy a file or a folder over what is there."""
    remove(target)
    if source.is_dir() and not source.is_symlink():
        shutil.copytree(source, target, symlinks=True)
    else:
        shutil.copy2(source, target, follow_symlinks=False)


def bring_back(kept: pathlib.Path) -> None:
    """Put the kept program back; what the new version brought goes."""
    for new in HOME.iterdir():
        if not is_named(new.name, OWN) and not (kept / new.name).exists():
            remove(new)
    for old in kept.iterdir():
        remove(HOME / old.name)
        shutil.move(old, HOME / old.name)


def schema_of(path: str) -> int:
    """Return how many steps of the schema a database has run."""
    uri = f"{pathlib.Path(path).absolute().as_uri()}?mode=ro"
    with contextlib.closing(sqlite3.connect(uri, uri=True)) as db:
        return db.execute("PRAGMA user_version").fetchone()[0]


def restore_database(copy: pathlib.Path, path: str) -> None:
    """Put the database's copy back if the new version has changed its schema.

    Else nothing is lost of what came meanwhile. Its owner and rights stay.
    """
    if copy.exists() and schema_of(path) != schema_of(str(copy)):
        for suffix in ("-wal", "-shm"):
            pathlib.Path(path + suffix).unlink(missing_ok=True)
        shutil.copyfile(copy, path)
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


def restart(config: Config) -> bool:
    """Restart the service; say whether it serves in time."""
    end = time.monotonic() + STOP_SECONDS + START_SECONDS
    try:  # returns when it says READY
        seconds = STOP_SECONDS + START_SECONDS
        done = systemctl("restart", UNIT, timeout=seconds)
    except subprocess.TimeoutExpired:
        return False
    while not done.returncode and time.monotonic() < end:
        if serves(config):
            return True
        time.sleep(0.2)
    return False


def replace_unit(kept: pathlib.Path, unit: typing.Mapping[str, str]) -> None:
    """Install the new unit, if the installed one is as the old version had it."""
    installed = pathlib.Path(unit.get("FragmentPath") or "/nowhere")
    new, old = HOME / "wxgpt.service", kept / "wxgpt.service"
    if not installed.exists() or new.read_bytes() == old.read_bytes():
        return
    if installed.read_bytes() != old.read_bytes():
        words = "{path} was changed here and stays; the new version's is {new}"
        say(words, path=installed, new=new)
        return
    shutil.copyfile(new, installed)
    systemctl("daemon-reload")


def return_unit(kept: pathlib.Path, unit: typing.Mapping[str, str]) -> None:
    """Install the old unit again, if the new one was installed."""
    installed = pathlib.Path(unit.get("FragmentPath") or "/nowhere")
    new, old = HOME / "wxgpt.service", kept / "wxgpt.service"
    is_new = installed.exists() and installed.read_bytes() == new.read_bytes()
    if is_new and new.read_bytes() != old.read_bytes():
        shutil.copyfile(old, installed)
        systemctl("daemon-reload")


# The command


def bring_new(archive: str, kept: pathlib.Path) -> str:
    """Bring the new files and their packages; return the version, raise UpdateError."""
    if archive:
        take_archive(archive)
    else:
        pull()
    new, old = HOME / "requirements.lock", kept / "requirements.lock"
    if new.read_bytes() != old.read_bytes():
        say("installing packages …")
        pip = (sys.executable, "-m", "pip", "install", "--disable-pip-version-check")
        run(*pip, "--quiet", "-r", "requirements.lock")
    return run(sys.executable, "wxgpt.py", "--version").removeprefix("wxgpt ")


def contents(folder: pathlib.Path) -> dict[pathlib.Path, bytes]:
    """Return the program's files in a folder, with what is in them."""
    found = {}
    for place, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not is_named(name, NOT_OURS)]
        for path in (pathlib.Path(place, name) for name in names):
            if path.is_file() and not is_named(path.name, NOT_OURS):
                found[path.relative_to(folder)] = path.read_bytes()
    return found


def update_command(config: Config, unit: typing.Mapping[str, str], archive: str) -> int:
    """Bring a newer version, or this one again; return the exit status."""
    archive = os.path.abspath(archive) if archive else ""
    os.umask(0o022)  # the service's user reads the program
    try:  # beside the program, so that it stays on the same disk; root's alone
        keeping = tempfile.TemporaryDirectory(prefix="wxgpt-kept-", dir=HOME.parent)
    except OSError as error:
        complain("{path}: {why}", path=HOME.parent, why=error.strerror)
        return 1
    with keeping as folder:
        kept, copy = pathlib.Path(folder, "program"), pathlib.Path(folder, "copy.db")
        say("wxgpt {version} in {path}: keeping it aside …", version=VERSION, path=HOME)
        ignore = shutil.ignore_patterns(*OWN)
        shutil.copytree(HOME, kept, symlinks=True, ignore=ignore)
        try:
            version = bring_new(archive, kept)
            if contents(HOME) == contents(kept):
                say("this is the newest version already")
                return 0
            if os.path.exists(config.database.path):
                copy_database(config.database.path, str(copy))
        except (UpdateError, OSError, sqlite3.Error) as error:
            bring_back(kept)
            if isinstance(error, UpdateError):
                complain(error.english, **error.values)
            else:
                complain("{what}", what=error)
            say("nothing was changed; wxgpt {version} runs on", version=VERSION)
            return 1
        except KeyboardInterrupt:
            bring_back(kept)
            raise
        if not unit:
            say("wxgpt {version} is in place: restart it yourself", version=version)
            return 0
        return switch(config, unit, version, kept, copy)


def switch(
    config: Config,
    unit: typing.Mapping[str, str],
    version: str,
    kept: pathlib.Path,
    copy: pathlib.Path,
) -> int:
    """Restart with the new version, or go back to what was kept; return the status."""
    # From here on a Ctrl-C would leave neither the one nor the other.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    replace_unit(kept, unit)
    say("wxgpt {version} is in place, restarting …", version=version)
    if restart(config):
        say("wxgpt {version} serves", version=version)
        return 0
    complain("wxgpt {version} does not start: going back", version=version)
    systemctl("stop", UNIT)
    return_unit(kept, unit)
    bring_back(kept)
    restore_database(copy, config.database.path)
    if restart(config):
        say("wxgpt {version} serves again", version=VERSION)
    else:
        complain("it does not start either: journalctl -u wxgpt -n 20")
    return 1
