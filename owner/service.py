"""The installed service: `logs`, `backup`, and its settings for all owner's commands.

An owner types `wxgpt check` in any folder; what counts are the settings, the environment
and the state directory of the unit, as systemd knows them.
"""

import argparse
import asyncio
import contextlib
import os
import pathlib
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
    "EnvironmentFiles,LoadCredential"
)


def systemctl(*words: str, timeout: float = 30.0) -> subprocess.CompletedProcess[str]:
    """Run systemctl; raise OSError or subprocess.TimeoutExpired."""
    command = ["systemctl", *words]
    return subprocess.run(
        command, check=False, capture_output=True, text=True, timeout=timeout
    )


def show_unit() -> dict[str, str]:
    """Return what systemd says of the service; empty if there is none."""
    try:
        told = systemctl("show", UNIT, f"--property={SHOWN}", timeout=10).stdout
    except (OSError, subprocess.SubprocessError):
        return {}  # no systemd
    unit = dict(line.split("=", 1) for line in told.splitlines() if "=" in line)
    return unit if unit.get("LoadState") == "loaded" else {}


def settings_of(unit: typing.Mapping[str, str]) -> str:
    """Return the file with the service's settings."""
    credential, _, path = unit.get("LoadCredential", "").partition(":")
    return path.split()[0] if credential == "wxgpt.toml" and path else USUAL


def environment_of(unit: typing.Mapping[str, str]) -> dict[str, str]:
    """Return the environment that systemd gives the service."""
    pairs = shlex.split(unit.get("Environment", ""))
    for line in unit.get("EnvironmentFiles", "").splitlines():
        with contextlib.suppress(OSError):
            text = pathlib.Path(line.partition(" (")[0]).read_text("utf-8")
            pairs += shlex.split(text, comments=True)
    environ = dict(pair.split("=", 1) for pair in pairs if "=" in pair)
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


def owner_command(arguments: argparse.Namespace) -> int:
    """Run one of the owner's commands; return the exit status, or raise ConfigError."""
    unit = show_unit()
    if arguments.command == "logs":
        return follow_log(unit, arguments.lines)
    path = settings_of(unit)
    if arguments.config or not os.path.exists(path):
        path = arguments.config or "wxgpt.toml"
    elif not os.access(path, os.R_OK):
        words = "{path} is root's: run it as root, with sudo"
        print_error(tell(words, path=path))
        return 1
    environ = dict(os.environ)
    is_service = os.path.exists(path) and os.path.exists(settings_of(unit))
    if is_service and os.path.samefile(path, settings_of(unit)):
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
        print_error(tell(words))
        return 1
    command = ["journalctl", f"--unit={UNIT}", f"--lines={lines}", "--follow"]
    try:
        os.execvp(command[0], command)
    except OSError as error:
        print_error(f"journalctl: {error.strerror}")
        return 1


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
    except sqlite3.Error:
        os.unlink(target)
        raise


def backup_command(config: Config, target: str) -> int:
    """Copy the database in use; return the exit status."""
    source = config.database.path
    target = target or time.strftime("wxgpt-%Y%m%d-%H%M%S.db")
    if not os.path.exists(source):
        print_error(tell("{path}: wxgpt has not run yet", path=source))
        return 1
    try:
        copy_database(source, target)
    except FileExistsError:
        words = "{path} is there already: name another file"
        print_error(tell(words, path=target))
        return 1
    except (OSError, sqlite3.Error) as error:
        print_error(f"{target}: {getattr(error, 'strerror', None) or error}")
        return 1
    size = os.path.getsize(target) / 1e6
    words = "{path}: {size:.1f} MB, copied from {source}"
    say(words, path=target, size=size, source=source)
    say("It holds what people wrote: keep it private, and not for too long.")
    return 0


def say(english: str, **values: object) -> None:
    """Print a line in the owner's language at once."""
    print(tell(english, **values), flush=True)


def complain(english: str, **values: object) -> None:
    """Print the line that says why a command ends."""
    sys.stdout.flush()
    print_error(tell(english, **values))
