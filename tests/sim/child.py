"""The real server as a child process, with its settings, log and data in a folder."""

import asyncio
import contextlib
import functools
import json
import random
import secrets
import socket
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import aiohttp

from waiting import within
from wechat import WeChat

WXGPT = Path(__file__).parents[2] / "wxgpt.py"
START_SECONDS = 20.0
STOP_SECONDS = 10.0
LOOK_SECONDS = 0.1
TAIL_LINES = 15
# The platform makes no known pause after a refused connection. With this one its next
# attempt meets the process that comes up after a crash.
REFUSED_PAUSE_SECONDS = 2.5
OPTIONS = ("app_id", "aes_key", "attempt_timeout", "attempts")


class ChildError(Exception):
    """A server that cannot be used, in words for whoever started it."""


class Child:
    """wxgpt as a process of its own; whoever starts it must stop it."""

    def __init__(
        self,
        folder: Path,
        assistant: dict[str, str],
        show_log: bool,
        is_safe: bool,
        port: int,
    ) -> None:
        self.config = folder / "wxgpt.toml"
        self._log = None if show_log else folder / "wxgpt.log"  # None: our stderr
        self._process: asyncio.subprocess.Process | None = None
        self._read = 0  # bytes of the log that `failures` has read
        settings = render_settings(folder, assistant, is_safe, port)
        self.config.write_text(settings, "utf-8")

    async def start(self) -> None:
        """Start the process and wait until it answers, or raise ChildError."""
        with self._log.open("ab") if self._log else contextlib.nullcontext() as log:
            await self._launch(log)
        health, _ = read_platform(self.config)
        try:
            async with asyncio.timeout(START_SECONDS):
                while not await is_healthy(health):
                    self.check()
                    await asyncio.sleep(LOOK_SECONDS)
        except TimeoutError:
            raise ChildError(f"the server did not come up\n{self._tail()}") from None

    def check(self) -> None:
        """Raise ChildError if the process has ended by itself."""
        assert self._process, "not started"
        if (status := self._process.returncode) is not None:
            raise ChildError(f"the server ended with status {status}\n{self._tail()}")

    def failures(self) -> list[str]:
        """Return why questions failed since the last call, as the log says it."""
        text = self._log.read_bytes()[self._read :] if self._log else b""
        self._read += len(text)
        lines = text.decode("utf-8", "replace").splitlines()
        return [line.partition(" failed: ")[2] for line in lines if " failed: " in line]

    async def kill(self) -> None:
        """End the process as a power failure would."""
        assert self._process, "not started"
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()
        await within(STOP_SECONDS, "end of a killed server", self._process.wait())

    async def stop(self) -> None:
        """End the process in order, or by force when that takes too long."""
        if not self._process:
            return
        with contextlib.suppress(ProcessLookupError, TimeoutError):
            self._process.terminate()
            await asyncio.wait_for(self._process.wait(), STOP_SECONDS)
        await self.kill()

    async def _launch(self, log: IO[bytes] | None) -> None:
        self._process = await asyncio.create_subprocess_exec(
            *(sys.executable, str(WXGPT), "--config", str(self.config)),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=log or sys.stderr,
            stderr=log,
            start_new_session=True,  # Ctrl-C in the terminal is not for the server
        )

    def _tail(self) -> str:
        text = self._log.read_text("utf-8", "replace") if self._log else ""
        return "\n".join(text.splitlines()[-TAIL_LINES:])


# Below those that Linux hands out (net.ipv4.ip_local_port_range): such a one may become
# an outgoing connection's before the server has it, or while it is started again.
PORTS, BLOCK = range(20_000, 32_000), 100


def claimed_ports() -> Iterator[int]:
    """Yield ports that no other process which asks here gets while this one lives.

    A block of them is claimed by listening on its first port to the end of the process.
    """
    blocks = PORTS[::BLOCK]
    for first in random.sample(blocks, len(blocks)):
        with contextlib.suppress(OSError):
            CLAIMS.append(socket.create_server(("127.0.0.1", first)))
            yield from range(first + 1, first + BLOCK)


CLAIMS: list[socket.socket] = []
FREE = claimed_ports()


def free_port() -> int:
    """Return a port that is free, and another one each time."""
    for port in FREE:
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port
    raise ChildError("no port is free")


def usual_port(port: int) -> int:
    """Return this port, or any free one if it is taken.

    As with a block, who gets it listens on the one before it to the end of the process.
    """
    with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
        CLAIMS.append(socket.create_server(("127.0.0.1", port - 1)))
        return port
    return free_port()


def render_settings(
    folder: Path, assistant: dict[str, str], is_safe: bool, port: int
) -> str:
    """Return the settings; what the assistant leaves out is the environment's."""
    safe = {"app_id": "wx0123456789demo00", "aes_key": secrets.token_hex(22)[:43]}
    tables: dict[str, dict[str, Any]] = {
        "server": {"port": port},
        "wechat": {"token": secrets.token_hex(16), "picture_hosts": ["127.0.0.1"]}
        | (safe if is_safe else {}),
        "assistants.chatgpt": assistant,
        "database": {"path": str(folder / "wxgpt.db")},
    }
    lines = [f'public_url = "http://127.0.0.1:{port}"']
    for name, table in tables.items():
        # What JSON calls a string, a number or a list, TOML does too.
        lines += [f"[{name}]", *(f"{k} = {json.dumps(v)}" for k, v in table.items())]
    return "\n".join(lines) + "\n"


def read_platform(path: Path) -> tuple[str, Callable[..., WeChat]]:
    """Return a server's /healthz and what makes a WeChat for it, from its settings."""
    try:
        table = tomllib.loads(path.read_text("utf-8"))
        wechat, server = table["wechat"], table.get("server", {})
        token, port = wechat["token"], server.get("port", 8080)
    except OSError as error:
        raise ChildError(f"{path}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ChildError(f"{path}: no settings to go by: {error!r}") from None
    host = server.get("host", "127.0.0.1")
    host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, host)
    root = f"http://{host}:{port}"
    options = {name: wechat[name] for name in OPTIONS if name in wechat}
    options["refused_pause"] = REFUSED_PAUSE_SECONDS
    url = root + server.get("path", "/wechat")
    return f"{root}/healthz", functools.partial(WeChat, url, token, **options)


async def is_healthy(url: str) -> bool:
    """Tell whether the server at this address answers and is well."""
    try:
        async with aiohttp.request("GET", url) as response:
            return response.status == 200
    except (aiohttp.ClientError, OSError):
        return False
