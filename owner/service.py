"""The installed service: `logs`, `backup`, and its settings for all owner's commands.

An owner types `wxgpt check` in any folder; what counts are the settings, the environment
and the state directory of the unit, as systemd knows them.
"""

import argparse
import asyncio
import contextlib
import glob
import os
import pathlib
import re
import shlex
import sqlite3
import subprocess
import sys
import time
import typing

from owner.words import tell
from wxgpt import Config, print_error, read_settings

UNIT = "wxgpt.service"
USUAL = "/etc/wxgpt/wxgpt.toml"  # the settings of a service, as in docs/deploy.md
HOME = pathlib.Path(__file__).resolve().parents[1]  # where the program lies
SHOWN = (
    "LoadState,ActiveState,MainPID,FragmentPath,StateDirectory,Environment,"
    "EnvironmentFiles,ExecStart"
)


def systemctl(*words: str, timeout: float = 30.0) -> subprocess.CompletedProcess[str]:
    """Run systemctl; raise OSError or subprocess.TimeoutExpired."""
    command = ["systemctl", *words]
    return subprocess.run(
        command, check=False, capture_output=True, text=True, timeout=timeout
    )


def show_unit(name: str = UNIT) -> dict[str, str]:
    """Return what systemd says of a service, and its settings; empty without it."""
    try:
        told = systemctl("show", name, f"--property={SHOWN}", timeout=10).stdout
        written = systemctl("cat", name).stdout
    except (OSError, subprocess.SubprocessError):
        return {}  # no systemd
    unit = {"Id": name}
    for line in told.splitlines():
        key, _, value = line.partition("=")
        # A line for each file of the environment.
        unit[key] = f"{unit[key]}\n{value}" if key in unit else value
    # `show` has no credentials before systemd 254.
    lines = re.findall(r"(?m)^LoadCredential=wxgpt\.toml:(\S+)", written)[-1:]
    lines += re.findall(r"--config[ =](\S+)", unit.get("ExecStart", ""))
    unit["settings"] = (lines or [USUAL])[0]
    return unit if unit.get("LoadState") == "loaded" else {}


def show_units() -> list[dict[str, str]]:
    """Return the services that run this program, the usual one first."""
    words = ("list-units", "--all", "--type=service", "--plain", "--no-legend")
    try:
        told = systemctl(*words, "*wxgpt*").stdout
    except (OSError, subprocess.SubprocessError):
        return []  # no systemd
    names = [line.split()[0] for line in told.splitlines() if line.strip()]
    others = (show_unit(name) for name in names if name != UNIT)
    ours = [unit for unit in others if str(HOME) in unit.get("ExecStart", "")]
    return [unit for unit in (show_unit(), *ours) if unit]


def read_environment(path: str) -> dict[str, str]:
    """Return what a file of a service's environment sets; see systemd.exec(5)."""
    values = {}
    with contextlib.suppress(OSError, UnicodeDecodeError):
        for line in pathlib.Path(path).read_text("utf-8").splitlines():
            name, equals, value = line.strip().partition("=")
            if equals and not name.startswith(("#", ";")):
                value = value.strip()
                is_quoted = (
                    len(value) > 1 and value[0] == value[-1] and value[0] in "'\""
                )
                values[name.strip()] = value[1:-1] if is_quoted else value
    return values


def environment_of(unit: typing.Mapping[str, str]) -> dict[str, str]:
    """Return the environment that systemd gives a service."""
    pairs = shlex.split(unit.get("Environment", ""))
    environ = dict(pair.split("=", 1) for pair in pairs if "=" in pair)
    for line in unit.get("EnvironmentFiles", "").splitlines():
        environ |= read_environment(line.partition(" (")[0])
    if folder := unit.get("StateDirectory", ""):
        environ["STATE_DIRECTORY"] = f"/var/lib/{folder.split()[0]}"
    return environ


def find_others(path: str, database: str) -> typing.Iterator[tuple[str, str]]:
    """Yield a used file and another like it, which an owner may take for it."""
    for used, name in ((path, "wxgpt.toml"), (database, "wxgpt.db")):
        for folder in dict.fromkeys((os.getcwd(), str(HOME), os.path.dirname(USUAL))):
            other = os.path.join(folder, name)
            is_other = os.path.exists(other) and os.path.exists(used)
            if is_other and not os.path.samefile(other, used):
                yield used, other


def is_closed(path: str) -> bool:
    """Say whether a file, or a folder above it, is closed to who asks."""
    try:
        os.stat(path)
    except OSError as error:
        return isinstance(error, PermissionError)
    return not os.access(path, os.R_OK)


def is_same(path: str, other: str) -> bool:
    """Say whether two names are of one file that is there."""
    return all(map(os.path.exists, (path, other))) and os.path.samefile(path, other)


def choose_unit(named: str) -> dict[str, str]:
    """Return the service whose settings are named, else the usual or only one.

    Empty if there is none. Says what others there are, when none is named.
    """
    units = show_units()
    if named:
        units = [unit for unit in units if is_same(named, unit["settings"])]
    elif len(units) > 1:
        others = ", ".join(f"--config {unit['settings']}" for unit in units[1:])
        words = "there are several services; this is {name}, for another: {others}"
        complain(words, name=units[0]["Id"], others=others)
    return units[0] if units else {}


def owner_command(arguments: argparse.Namespace) -> int:
    """Run one of the owner's commands; return the exit status, or raise ConfigError."""
    try:
        os.getcwd()
    except FileNotFoundError:  # an update has replaced the folder one is in
        os.chdir(HOME)
    unit = choose_unit(arguments.config or "")
    if arguments.command == "logs":
        return follow_log(unit, arguments.lines)
    path = arguments.config or unit.get("settings", USUAL)
    if is_closed(path):
        complain("{path} is root's: run it as root, with sudo", path=path)
        return 1
    if not arguments.config and not os.path.exists(path):
        path = "wxgpt.toml"
    environ = dict(os.environ)
    if unit and is_same(path, unit["settings"]):
        # What the owner's shell sets, the service does not see.
        environ = {k: v for k, v in environ.items() if not k.startswith("OPENAI_")}
        environ |= environment_of(unit)
    else:
        unit = {}
    config = read_settings(path, environ)
    if arguments.command == "check":
        from owner.check import run_check

        return asyncio.run(run_check(config, environ, path, unit))
    if arguments.command == "stats":
        from owner.stats import stats_command

        return stats_command(config, arguments.days, arguments.full, arguments.json)
    if arguments.command == "backup":
        return backup_command(config, arguments.file)
    from owner.update import update_command

    return update_command(config, unit, arguments.archive)


def follow_log(unit: typing.Mapping[str, str], lines: int) -> int:
    """Show the newest lines of the service's log, and what follows, until Ctrl-C."""
    if not unit:
        words = (
            "there is no service wxgpt here; without one the log is where it started"
        )
        complain(words)
        return 1
    journals = glob.glob("/*/log/journal/*/system.journal")  # in /var or /run
    if journals and not any(os.access(path, os.R_OK) for path in journals):
        complain("{path} is root's: run it as root, with sudo", path="the log")
        return 1
    name = unit["Id"]
    command = ["journalctl", f"--unit={name}", f"--lines={lines}", "--follow"]
    try:
        os.execvp(command[0], command)
    except OSError as error:
        complain("{path}: {why}", path="journalctl", why=reason(error))
        return 1


def reason(error: Exception) -> str:
    """Return why something failed, as the system or SQLite says it."""
    return getattr(error, "strerror", None) or str(error)


def missing(database: str) -> str:
    """Return why a database cannot be read, with {path}; empty if it can."""
    if is_closed(database):
        return "{path} is root's: run it as root, with sudo"
    return "" if os.path.exists(database) else "{path}: wxgpt has not run yet"


def copy_database(source: str, target: str) -> None:
    """Copy a database that may be in use to a new file of ours; raise if it exists.

    Raises OSError or sqlite3.Error, and leaves no half of a copy.
    """
    os.close(os.open(target, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
    uri = f"{pathlib.Path(source).absolute().as_uri()}?mode=ro"
    try:
        with (
            contextlib.closing(sqlite3.connect(uri, uri=True)) as old,
            contextlib.closing(sqlite3.connect(target)) as new,
        ):
            old.backup(new)
    except BaseException:  # also a Ctrl-C
        os.unlink(target)
        raise


def backup_command(config: Config, target: str) -> int:
    """Copy the database in use; return the exit status."""
    source = config.database.path
    name = time.strftime("wxgpt-%Y%m%d-%H%M%S.db")
    target = os.path.join(target, name) if os.path.isdir(target) else target or name
    if why := missing(source):
        complain(why, path=source)
        return 1
    try:
        copy_database(source, target)
    except FileExistsError:
        complain("{path} is there already: name another file", path=target)
        return 1
    except (OSError, sqlite3.Error) as error:
        path = target if isinstance(error, OSError) else f"{source} → {target}"
        complain("{path}: {why}", path=path, why=reason(error))
        return 1
    size = os.path.getsize(target) / 1e6
    words = "{path}: {size:.1f} MB, copied from {source}"
    say(words, path=target, size=size, source=source)
    say("It holds what people wrote: keep it private, and not for too long.")
    return 0


def say(english: str, **values: object) -> None:
    """Print a line in the owner's language at once."""
    with contextlib.suppress(OSError):  # the terminal is gone; the work goes on
        print(tell(english, **values), flush=True)


def complain(english: str, **values: object) -> None:
    """Print a line that says why a command ends, or what to beware of."""
    with contextlib.suppress(OSError):
        sys.stdout.flush()
        print_error(tell(english, **values))
