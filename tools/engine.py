"""A Docker engine of its own, to build and run the image on.

    with Engine(folder) as engine, engine.network():
        engine.run("docker compose up -d", folder)

It has a network of its own, as a fresh machine has: its ports and addresses meet nobody
else's, and an engine that this machine runs is left alone. Images and containers lie in
memory, some 600 MB, and are gone with it.
"""

import contextlib
import os
import shutil
import subprocess
import time
from pathlib import Path
from typing import Self

from container import Container

GATEWAY = "172.29.0.1"  # how containers reach the engine's network; of no one else's
START_SECONDS = 60
STOP_SECONDS = 60
COMMAND_SECONDS = 240
PROGRAMS = "dockerd docker docker-init setpriv unshare ip iptables".split()
ALONE = ("setpriv", "--pdeathsig=TERM", "unshare", "--net", "--mount", "sh", "-ec")
START = (
    'ip link set lo up; mount -t tmpfs none "$0"; exec dockerd --data-root="$0" "$@"'
)


def compose_command() -> str:
    """Return what `docker compose` is called here, empty if it is missing."""
    plugin = ["docker", "compose", "version"]
    if shutil.which("docker"):
        done = subprocess.run(plugin, check=False, capture_output=True)
        if done.returncode == 0:
            return "docker compose"
    return "docker-compose" if shutil.which("docker-compose") else ""


def obstacle() -> str:
    """Return why no engine can be started here, empty if one can."""
    if os.geteuid() != 0:
        return "only root can start a Docker engine"
    missing = [name for name in PROGRAMS if not shutil.which(name)]
    missing += [] if compose_command() else ["docker compose"]
    remedy = "apt install docker.io docker-compose iproute2"
    return f"no {', '.join(missing)}: {remedy}" if missing else ""


class Engine:
    """A running engine; leaving the block ends it, and its containers."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder  # of a short name: sockets lie in it
        self.environ = os.environ | {
            "DOCKER_HOST": f"unix://{folder}/engine.sock",
            "DOCKER_CLI_HINTS": "false",
        }
        self.compose = compose_command()
        self.process: subprocess.Popen[bytes]

    def __enter__(self) -> Self:
        (self.folder / "daemon.json").write_text("{}")  # not this machine's
        (data := self.folder / "data").mkdir()
        options = {"config-file": "daemon.json", "exec-root": "exec", "pidfile": "pid"}
        command = [f"--{name}={self.folder / file}" for name, file in options.items()]
        command += [f"--host=unix://{self.folder}/engine.sock", f"--bip={GATEWAY}/24"]
        with (self.folder / "log").open("wb") as log:
            self.process = subprocess.Popen(
                [*ALONE, START, str(data), *command],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        try:
            self.wait_until_up()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        try:
            self.process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def wait_until_up(self) -> None:
        """Return once it takes orders; raise RuntimeError with the end of its log."""
        until = time.monotonic() + START_SECONDS
        while self.process.poll() is None and time.monotonic() < until:
            asked = ["docker", "version"]
            done = subprocess.run(
                asked, check=False, capture_output=True, env=self.environ
            )
            if done.returncode == 0:
                return
            time.sleep(0.2)
        log = (self.folder / "log").read_text("utf-8", "replace")
        raise RuntimeError(f"dockerd does not start: {log[-2000:]}")

    def network(self) -> contextlib.AbstractContextManager[None]:
        """Open this thread's sockets in the engine's network, inside the block."""
        return Container(self.process.pid).network()

    def run(self, command: str, folder: Path) -> subprocess.CompletedProcess[str]:
        """Run a shell's line in a folder; return its end and what it wrote."""
        return subprocess.run(
            ["bash", "-c", command.replace("docker compose", self.compose)],
            check=False,
            cwd=folder,
            env=self.environ,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=COMMAND_SECONDS,
        )
