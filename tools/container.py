"""A small Debian with systemd as its first process, to try the unit on.

    with boot(debian_root()) as container, container.network():
        async with container.follow("wxgpt.service") as unit:
            assert await unit.systemctl("start") == 0

The root is made once for a list of packages and kept in the folder that WXGPT_ROOTFS
names (default ~/.cache/wxgpt-debian). A container only reads it: what it changes lies
over it in memory, the server's files are those of this checkout, and it has a loopback
of its own. It works on machines whose own first process is not systemd, too.
"""

import asyncio
import contextlib
import ctypes
import fcntl
import hashlib
import json
import os
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from pathlib import Path
from typing import Any

from aiohttp.abc import AbstractResolver, ResolveResult

PROJECT = Path(__file__).parents[1]
LOCK = PROJECT / "requirements.lock"
SUITE = "bookworm"
BARE = "systemd,systemd-sysv,dbus"  # what every rented server has
PACKAGES = f"{BARE},python3,python3-venv,ca-certificates,nginx,caddy"
PROGRAMS = ("mmdebstrap", "systemd-nspawn", "unshare", "nsenter", "chroot")
HOME, VENV = "opt/wxgpt", "/opt/wxgpt/.venv"
SETTINGS = Path("etc/wxgpt/wxgpt.toml")
# What the container gets from the checkout, and where it lies there.
FILES = {
    "wxgpt.py": f"{HOME}/wxgpt.py",
    "schema.sql": f"{HOME}/schema.sql",
    "texts.toml": f"{HOME}/texts.toml",
    "providers.toml": f"{HOME}/providers.toml",
    "pages": f"{HOME}/pages",
    "owner": f"{HOME}/owner",
    "wxgpt.service": "etc/systemd/system/wxgpt.service",
}
# systemd-nspawn wants to see the second version of control groups, and nothing else.
# $1 is the root; at $2/root the container finds it, to change as it likes, in memory.
MOUNT = """
    lower=$1 top=$2 && shift 2 && mount --make-rprivate / &&
    { umount -R /sys/fs/cgroup || true; } && mount -t cgroup2 cgroup2 /sys/fs/cgroup &&
    mount -t tmpfs tmpfs "$top" && mkdir "$top/new" "$top/work" "$top/root" &&
    mount -t overlay -o "lowerdir=$lower,upperdir=$top/new,workdir=$top/work" \\
        overlay "$top/root" && exec "$@"
"""
MOUNTED = ("unshare", "-m", "-C", "sh", "-c", MOUNT, "sh")
NAMESPACES = ("-m", "-u", "-i", "-p", "-C")  # all but the users and the network
# The name of the text leads to the container's loopback, with a certificate where
# Let's Encrypt's would lie; the container trusts it.
NAME = "wx.example.com"
PEM = f"/etc/letsencrypt/live/{NAME}"
CERTIFY = f"""
    mkdir -p {PEM} && cd {PEM} && openssl req -x509 -newkey rsa:2048 -nodes -days 60 \\
        -subj /CN={NAME} -addext subjectAltName=DNS:{NAME} \\
        -out fullchain.pem -keyout privkey.pem &&
    chmod a+r privkey.pem && cp fullchain.pem /usr/local/share/ca-certificates/wx.crt &&
    update-ca-certificates && echo "127.0.0.1 {NAME} localhost" >/etc/hosts
"""
BUILD_SECONDS = 900
BOOT_SECONDS = 120
COMMAND_SECONDS = 90
CLONE_NEWNET = 0x40000000  # setns(2); os.setns came with Python 3.12


def obstacle() -> str:
    """Return why no container can be booted here, empty if one can."""
    if os.geteuid() != 0:
        return "only root can boot a container"
    if missing := [name for name in PROGRAMS if not shutil.which(name)]:
        remedy = "apt install mmdebstrap systemd-container"
        return f"no {', '.join(missing)}: {remedy}"
    with tempfile.TemporaryDirectory() as root, tempfile.TemporaryDirectory() as top:
        tried = subprocess.run(
            [*MOUNTED, root, top, "true"],
            check=False,
            stderr=subprocess.PIPE,
            text=True,
            timeout=COMMAND_SECONDS,
        )
    return f"cannot be mounted: {tried.stderr.strip()}" if tried.returncode else ""


def debian_root() -> Path:
    """Return a folder with Debian and the server's packages, built if there is none."""
    kept = os.environ.get("WXGPT_ROOTFS") or "~/.cache/wxgpt-debian"
    recipe = PACKAGES.encode() + LOCK.read_bytes()
    name = f"{SUITE}-{hashlib.sha256(recipe).hexdigest()[:12]}"
    root = Path(kept).expanduser() / name
    root.parent.mkdir(parents=True, exist_ok=True)
    with root.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not root.exists():
            build_root(unfinished := root.with_suffix(".new"))
            unfinished.rename(root)
            remove_older(root)
    return root


def remove_older(root: Path) -> None:
    """Remove the roots of other lists of packages: nobody will ask for them again."""
    for other in root.parent.glob(f"{SUITE}-*/"):
        if other != root:
            shutil.rmtree(other, ignore_errors=True)


def build_root(root: Path) -> None:
    """Install Debian, then what the server needs as the README does it."""
    shutil.rmtree(root, ignore_errors=True)  # of a build that was broken off
    build_debian(root, PACKAGES)
    (root / HOME).mkdir()
    (root / SETTINGS.parent).mkdir()
    inside = ["chroot", str(root)]
    build([*inside, "systemctl", "disable", "nginx", "caddy"])
    build([*inside, "python3", "-m", "venv", VENV])
    with tempfile.TemporaryDirectory(dir=root / HOME) as folder:
        download_wheels(root, Path(folder))
        wheels = [f"/{path.relative_to(root)}" for path in Path(folder).iterdir()]
        build([*inside, f"{VENV}/bin/pip", "install", "--no-index", *wheels])


def build_debian(root: Path, packages: str, suite: str = SUITE, *options: str) -> None:
    """Install the smallest Debian and some packages."""
    debian = ["mmdebstrap", "--variant=minbase", f"--include={packages}"]
    build([*debian, *options, suite, str(root)])


def download_wheels(root: Path, folder: Path) -> None:
    """Fetch the server's packages for the root's Python with our own pip."""
    tell = "import sys; print('%d.%d' % sys.version_info[:2])"
    version = build(["chroot", str(root), "python3", "-c", tell]).strip()
    pip = [sys.executable, "-m", "pip", "download", "-d", str(folder)]
    fitting = ["--only-binary=:all:", f"--python-version={version}"]
    build([*pip, *fitting, "-r", str(LOCK)])


def build(command: list[str]) -> str:
    """Run a step of the build; return its output, or raise with its complaint."""
    done = subprocess.run(
        command, check=False, capture_output=True, text=True, timeout=BUILD_SECONDS
    )
    if done.returncode:
        raise RuntimeError(f"{command[0]} failed: {done.stderr[-2000:]}")
    return done.stdout


@contextlib.contextmanager
def boot(root: Path, files: Mapping[str, str] = FILES) -> Iterator["Container"]:
    """Boot the root; give the container once all its units have started."""
    with tempfile.TemporaryDirectory() as folder:
        nspawn, news = start_nspawn(root, files, Path(folder))
        try:
            with news:  # not longer: when nobody reads, systemd-nspawn stands still
                leader = read_leader(news)
            yield Container(leader)
        finally:
            power_off(nspawn)


def start_nspawn(
    root: Path, files: Mapping[str, str], folder: Path
) -> tuple[subprocess.Popen[bytes], socket.socket]:
    """Start the container; give also the socket that hears how it gets on."""
    (top := folder / "top").mkdir()
    command = [
        *(*MOUNTED, str(root), str(top), "systemd-nspawn", "--boot"),
        *(f"--directory={top}/root", "--private-network", "--notify-ready=yes"),
        "--timezone=off",  # it is the packages' to set
        *("--register=no", "--keep-unit", "--console=read-only"),
        *(f"--bind-ro={PROJECT / name}:/{place}" for name, place in files.items()),
    ]
    news = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    news.bind(address := str(folder / "notify"))
    news.settimeout(BOOT_SECONDS)
    with (folder / "console").open("wb") as console:
        nspawn = subprocess.Popen(
            command,
            env=os.environ | {"NOTIFY_SOCKET": address},
            stdin=subprocess.DEVNULL,
            stdout=console,
            stderr=subprocess.STDOUT,
        )
    return nspawn, news


def read_leader(news: socket.socket) -> int:
    """Return the pid of the container's first process, once it is done booting."""
    leader = 0
    while True:
        lines = news.recv(4096).decode().splitlines()
        told = dict(line.split("=", 1) for line in lines if "=" in line)
        leader = int(told.get("X_NSPAWN_LEADER_PID", leader))
        if told.get("READY") == "1":
            return leader


def power_off(nspawn: subprocess.Popen[bytes]) -> None:
    """Shut the container down in order; by force when that takes too long."""
    nspawn.terminate()
    try:
        nspawn.wait(COMMAND_SECONDS)
    except subprocess.TimeoutExpired:
        end_children(nspawn.pid, signal.SIGKILL)  # systemd, and all others with it
        nspawn.kill()
        nspawn.wait()


def end_children(pid: int, number: int) -> None:
    """Send a signal to a process's children."""
    for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        os.kill(int(child), number)


class Here(AbstractResolver):
    """Every name is the loopback's."""

    async def resolve(
        self, host: str, port: int = 0, family: int = 0
    ) -> list[ResolveResult]:
        """Return the one address."""
        found = ResolveResult(
            hostname=host,
            host="127.0.0.1",
            port=port,
            family=socket.AF_INET,
            proto=0,
            flags=0,
        )
        return [found]

    async def close(self) -> None:
        """Do nothing: nothing is open."""


class Container:
    """A booted container; `boot` ends it."""

    def __init__(self, leader: int) -> None:
        self.leader = leader  # its first process, as this machine counts
        self.settings = self.path(SETTINGS)
        self.enter = ("nsenter", f"--target={leader}", *NAMESPACES, "-n")
        self.enter_partly = self.enter  # with this machine's network; see `network`

    def path(self, name: str | Path) -> Path:
        """Return where a file of the container can be reached from here."""
        return Path(f"/proc/{self.leader}/root", name)

    @contextlib.contextmanager
    def network(self) -> Iterator[None]:
        """Open this thread's sockets on the container's loopback, inside the block."""
        with open("/proc/thread-self/ns/net") as ours:
            network = f"--net=/proc/{os.getpid()}/fd/{ours.fileno()}"
            self.enter_partly = (*self.enter[:-1], network)
            with open(f"/proc/{self.leader}/ns/net") as theirs:
                set_network(theirs.fileno())
            try:
                yield
            finally:
                set_network(ours.fileno())

    async def certify(self) -> None:
        """Give it the name of the text, and a certificate."""
        status, output = await self.run("sh", "-c", CERTIFY)
        if status:
            raise RuntimeError(output)

    def connection(self) -> dict[str, Any]:
        """Return how to reach the name: options of aiohttp's connector."""
        pem = self.path(f"{PEM[1:]}/fullchain.pem")
        return {"ssl": ssl.create_default_context(cafile=pem), "resolver": Here()}

    async def run(self, *command: str) -> tuple[int, str]:
        """Run a command inside; return its exit status and what it wrote."""
        process = await asyncio.create_subprocess_exec(
            *(*self.enter, *command),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        output, _ = await asyncio.wait_for(process.communicate(), COMMAND_SECONDS)
        return await process.wait(), output.decode()

    @contextlib.asynccontextmanager
    async def follow(self, name: str) -> AsyncIterator["Unit"]:
        """Give a unit with its journal; in the end it is as if it had never run."""
        since = ("--no-tail", f"--since=@{time.time()}")
        journal = await asyncio.create_subprocess_exec(
            *(*self.enter, "journalctl", "--follow", *since),
            *("--output=json", f"--unit={name}"),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
        )
        assert journal.stdout
        unit = Unit(self, name)
        reader = asyncio.create_task(unit.read_journal(journal.stdout))
        try:
            yield unit
        finally:
            await unit.clean()
            # Not nsenter: a child that nobody waits for would delay the power-off.
            end_children(journal.pid, signal.SIGTERM)
            await journal.wait()
            await reader


def set_network(namespace: int) -> None:
    """Move this thread to a network namespace."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.setns(namespace, CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), "setns failed")


class Unit:
    """A service of the container, with the journal's entries about it."""

    def __init__(self, container: Container, name: str) -> None:
        self.container, self.name = container, name
        self.journal: list[dict[str, str]] = []
        self.news = asyncio.Event()
        self.drop_in = container.path(f"run/systemd/system/{name}.d/test.conf")

    async def change(self, *lines: str) -> None:
        """Add lines to its section [Service], as an owner's drop-in does."""
        self.drop_in.parent.mkdir(parents=True, exist_ok=True)
        self.drop_in.write_text("\n".join(["[Service]", *lines]) + "\n")
        await self.container.run("systemctl", "daemon-reload")

    async def systemctl(self, verb: str, *options: str) -> int:
        """Give an order and wait until it is carried out; return the exit status."""
        status, _ = await self.container.run("systemctl", verb, *options, self.name)
        return status

    async def signal(self, name: str) -> None:
        """Send a signal to its processes."""
        await self.systemctl("kill", f"--signal={name}")

    async def show(self, *properties: str) -> list[str]:
        """Return what systemd says about it, in the order asked for."""
        wanted = f"--property={','.join(properties)}"
        _, output = await self.container.run("systemctl", "show", wanted, self.name)
        shown = dict(line.split("=", 1) for line in output.splitlines())
        return [shown[name] for name in properties]

    async def read_journal(self, stream: asyncio.StreamReader) -> None:
        """Keep the journal's entries."""
        async for line in stream:
            if line.endswith(b"\n"):  # half of one is left when journalctl is ended
                self.journal.append(json.loads(line))
                self.news.set()

    async def says(self, words: str, since: int = 0) -> dict[str, str]:
        """Wait until an entry has these words; return it."""
        async with asyncio.timeout(COMMAND_SECONDS):
            while True:
                for entry in self.journal[since:]:
                    if words in entry["MESSAGE"]:
                        return entry
                self.news.clear()
                await self.news.wait()

    async def clean(self) -> None:
        """Stop it; forget its failures, its state and the drop-in."""
        await self.systemctl("stop")
        await self.systemctl("reset-failed")
        await self.systemctl("clean", "--what=state")
        if self.drop_in.exists():
            self.drop_in.unlink()
            await self.container.run("systemctl", "daemon-reload")
