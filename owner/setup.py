"""`wxgpt.py setup`: from nothing to a served account, by questions.

Every question has an option, so that it runs without a terminal, too. Nothing is written
before all questions are answered; what is there already is the default of each answer,
and what nobody was asked about stays as it is. As root, where systemd runs, it also puts
the service up.
"""

import argparse
import asyncio
import base64
import contextlib
import dataclasses
import getpass
import json
import os
import pathlib
import re
import secrets
import subprocess
import sys
import tempfile
import time
import tomllib
import typing
import urllib.parse

from owner.check import BY_SETUP, DOOR, Doctor, console_words, is_private
from owner.commands import Parser
from owner.words import explain, tell
from wxgpt import (
    EXAMPLE_KEYS,
    EXAMPLE_TOKEN,
    EXAMPLE_URL,
    Config,
    ConfigError,
    check_commands,
    is_http_url,
    load_config,
    open_chat,
    read_toml,
)

ROOT = pathlib.Path(__file__).resolve().parents[1]
SERVICE_SETTINGS = pathlib.Path("/etc/wxgpt/wxgpt.toml")
UNIT = pathlib.Path("/etc/systemd/system/wxgpt.service")
COMMAND = pathlib.Path("/usr/local/bin/wxgpt")
VERIFIED = "verified by WeChat's console"  # in the server's log
CHATGPT = "assistants.chatgpt."
EXTRA = CHATGPT + "extra."

Value = str | bool | int | float
Check = typing.Callable[[str], str]  # what is wrong with an answer, '' if nothing is


class Stop(Exception):
    """Setup cannot go on; the text is the line that says why."""


@dataclasses.dataclass(frozen=True, slots=True)
class Provider:
    """One row of the table of docs/models.md, with its recipe."""

    title: str
    name: str  # of the recipe's assistant
    base_url: str
    model: str
    extra: dict[str, typing.Any]

    @property
    def is_local(self) -> bool:
        """Say whether it runs on this machine and looks at no key."""
        return "127.0.0.1" in self.base_url

    @property
    def is_whole(self) -> bool:
        """Say whether its URL and model can be taken as they are."""
        return not self.is_local and "RESOURCE" not in self.base_url


def read_providers() -> list[Provider]:
    """Return the providers of the recipes, in their order."""
    is_english = tell("yes") == "yes"
    page = "models.md" if is_english else "models.zh-CN.md"
    text = (ROOT / "docs" / page).read_text("utf-8")
    titles = re.findall(r"(?m)^\| \[(.+?)\]\(#", text)
    recipes = "\n".join(re.findall(r"(?ms)^```toml\n(.*?)^```$", text))
    found = tomllib.loads(recipes)["assistants"].items()
    openai = {"base_url": "https://api.openai.com/v1", "model": "gpt-6-luna"}
    return [
        Provider(title, name, one["base_url"], one["model"], one.get("extra", {}))
        for title, (name, recipe) in zip(titles, found, strict=False)
        for one in [openai | recipe]
    ]


def flat(table: dict[str, typing.Any], prefix: str = "") -> dict[str, typing.Any]:
    """Return the values of nested tables by their dotted names."""
    found: dict[str, typing.Any] = {}
    for key, value in table.items():
        is_plain = not isinstance(value, dict) or not value
        found |= {prefix + key: value} if is_plain else flat(value, f"{prefix}{key}.")
    return found


HEADER = re.compile(r"\s*\[([^\[\]]+)\]\s*(?:#.*)?$")
NAME = re.compile(r"\s*([\w.-]+)\s*=")


def put_settings(text: str, values: dict[str, Value]) -> str:
    """Return the text of settings with these values, all else as it was.

    `extra` of chatgpt belongs to the model: what the values do not have of it goes.
    """
    lines, table, left = [], "", dict(values)
    for line in text.splitlines():
        if header := HEADER.match(line):
            table = header[1].strip() + "."
        elif key := NAME.match(line):
            name = table + key[1]
            if name in left:
                line = f"{key[1]} = {json.dumps(left.pop(name), ensure_ascii=False)}"
            elif f"{name}.".startswith(EXTRA):
                continue
        lines.append(line)
    for name, value in left.items():
        headers = {
            m[1].strip(): at for at, one in enumerate(lines) if (m := HEADER.match(one))
        }
        homes = [home for home in headers if name.startswith(home + ".")]
        home = max(homes, key=len, default="")
        at = headers[home] + 1 if home else min(headers.values(), default=len(lines))
        key_in_table = name.removeprefix(home + ".")
        lines.insert(at, f"{key_in_table} = {json.dumps(value, ensure_ascii=False)}")
    return "\n".join(lines) + "\n"


def merge_settings(text: str, values: dict[str, Value]) -> str:
    """Return the settings with these values; raise Stop if that is not all that changes."""
    new = put_settings(text, values)

    def others(text: str) -> dict[str, typing.Any]:
        found = flat(tomllib.loads(text))
        return {
            k: v
            for k, v in found.items()
            if k not in values and v != {} and not k.startswith(EXTRA)
        }

    try:
        is_right = (
            others(new) == others(text)
            and values.items() <= flat(tomllib.loads(new)).items()
        )
    except tomllib.TOMLDecodeError:
        is_right = False
    if not is_right:
        raise Stop(
            tell(
                "the settings are written in a way that setup cannot change: move the file away and try again"
            )
        )
    return new


def at_home(text: str) -> str:
    """Return a file of the service as it must be where this program lies."""
    places = {"/opt/wxgpt": str(ROOT), "/opt/wxgpt/.venv/bin/python": sys.executable}
    return re.sub(r"/opt/wxgpt(/\.venv/bin/python)?", lambda m: places[m[0]], text)


def make_aes_key() -> str:
    """Return an EncodingAESKey: 32 random bytes as 43 letters and digits."""
    while True:
        key = base64.b64encode(secrets.token_bytes(32)).decode().rstrip("=")
        if key.isalnum():
            return key


# What is wrong with an answer


def wrong_url(text: str) -> str:
    """Say what is wrong with an address for WeChat."""
    url = text.rstrip("/")
    if not re.match("https?:", url):
        return tell("it begins with http:// or https://")
    if not is_http_url(url):
        return tell("it is http:// or https:// and a domain name")
    parts = urllib.parse.urlsplit(url)
    if parts.port is not None:
        return tell("write no port: WeChat reaches 80 (http) and 443 (https) only")
    if parts.path:
        return tell("write the domain name only, without what follows it")
    if is_private(parts.hostname or ""):
        return tell("the internet does not reach it")
    return ""


def wrong_base_url(text: str) -> str:
    """Say what is wrong with the address of a chat API."""
    return "" if is_http_url(text.partition("?")[0]) else wrong_url(text)


def wrong_key(text: str) -> str:
    """Say what is wrong with a key."""
    if text in EXAMPLE_KEYS:
        return tell("the key your provider gave you")
    return (
        "" if re.fullmatch("[!-~]+", text) else tell("it has no blanks and no Chinese")
    )


def wrong_token(text: str) -> str:
    """Say what is wrong with a token."""
    is_right = re.fullmatch("[A-Za-z0-9]{3,32}", text) and text != EXAMPLE_TOKEN
    return (
        "" if is_right else tell("it has 3 to 32 letters and digits, and is your own")
    )


def wrong_app_id(text: str) -> str:
    """Say what is wrong with an AppID."""
    is_right = re.fullmatch("wx[0-9A-Za-z]{16}", text)
    return "" if is_right else tell("it is wx and 16 letters and digits")


def wrong_aes_key(text: str) -> str:
    """Say what is wrong with an EncodingAESKey."""
    is_right = re.fullmatch("[A-Za-z0-9]{43}", text)
    return "" if is_right else tell("it has 43 letters and digits")


def say(words: str = "", **values: object) -> None:
    """Print a line, or some."""
    print(tell(words, **values), flush=True)


class Setup:
    """One run: the options, what was there before, and the answers."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.is_asking = sys.stdin.isatty() and not options.yes
        has_systemd = os.geteuid() == 0 and os.path.isdir("/run/systemd/system")
        self.is_service = has_systemd and not options.no_service
        place = SERVICE_SETTINGS if self.is_service else pathlib.Path("wxgpt.toml")
        self.path = pathlib.Path(options.config or place)
        self.text, self.before = "", {}
        if self.path.exists():
            if not (self.path.is_file() or self.path.is_dir()):  # /dev/null
                raise Stop(tell("{path}: this is no file", path=self.path))
            self.before = flat(read_toml(self.path))
            self.text = self.path.read_text("utf-8-sig")
            if self.before.get("public_url") == EXAMPLE_URL:
                del self.before["public_url"]  # nobody's own
        self.missing: list[str] = []

    def ask(self, question: str, option: str, default: str, check: Check) -> str:
        """Return an answer that can be used: the option's, the owner's, or the default."""
        given = getattr(self.options, option.replace("-", "_"))
        if given is not None:
            if wrong := check(given):
                raise Stop(f"--{option}: {wrong}")
            return given
        default = "" if default and check(default) else default
        while self.is_asking:
            shown = "***" if default and option == "key" else default
            prompt = question + (f" [{shown}]" if shown else "") + tell(": ")
            read = getpass.getpass if option == "key" else input
            answer = read(prompt).strip() or default
            if not (wrong := check(answer)):
                return answer
            print("  " + wrong)
        if not default:
            self.missing.append(f"--{option}")
        return default

    def agrees(self, question: str) -> bool:
        """Return whether the owner agrees; Enter does."""
        if not self.is_asking:
            return True
        answer = input(question + tell(" [Y/n]: ")).strip().lower()
        return answer[:1] not in ("n", "否", "不")

    def choose(self, question: str, option: str, names: list[str], default: str) -> int:
        """Return the index of what is chosen, by its number or its name."""

        def place(text: str) -> int:
            lower = [name.lower() for name in names]
            if text.isdigit() and 0 < int(text) <= len(names):
                return int(text) - 1
            return next(
                (i for i, n in enumerate(lower) if text.lower() in n.split("|")), -1
            )

        def wrong(text: str) -> str:
            known = tell(", ").join(name.partition("|")[0] for name in names)
            return "" if place(text) >= 0 else tell("one of {known}", known=known)

        if self.is_asking and getattr(self.options, option) is None:
            print(question)
            for number, name in enumerate(names, 1):
                print(f"  {number:2} {name.partition('|')[0]}")
            question = tell("number")
        default = str(place(default) + 1) if place(default) >= 0 else ""
        return place(self.ask(question, option, default, wrong))

    # --- The questions

    def gather(self) -> dict[str, Value]:
        """Ask everything; return the settings by their names."""
        before, options = self.before, self.options
        url = self.ask(
            tell("address, as in https://wx.example.com"),
            "public-url",
            str(before.get("public_url", "")),
            wrong_url,
        )
        values: dict[str, Value] = {"public_url": url.rstrip("/")}
        values |= self.gather_safety()
        values |= self.gather_model()
        if options.auto_open is None and "session.auto_open" not in before:
            question = tell("may subscribers just write, without /chatgpt first?")
            values["session.auto_open"] = self.agrees(question)
        elif options.auto_open is not None:
            values["session.auto_open"] = options.auto_open
        values |= self.gather_way(url)
        if options.port is not None:
            values["server.port"] = options.port
        if self.missing:
            raise Stop(
                tell(
                    "without a terminal these options are needed: {names}",
                    names=" ".join(self.missing),
                )
            )
        return values

    def gather_safety(self) -> dict[str, Value]:
        """Ask for the mode and what it needs; what can be made is made."""
        before, options = self.before, self.options
        token = str(before.get("wechat.token", ""))
        token = secrets.token_hex(16) if wrong_token(token) else token
        if options.token is not None:
            token = self.ask("", "token", "", wrong_token)
        values: dict[str, Value] = {"wechat.token": token}
        old = str(before.get("wechat.app_id", ""))
        if options.mode == "plain":
            app_id = ""
        elif options.mode is None and options.app_id is None and self.is_asking:
            say(
                "Safe mode encrypts what WeChat sends. It needs the AppID (wx…), which the console shows under 基础信息."
            )
            question = "AppID" if old else tell("AppID (Enter: plain mode for now)")
            app_id = self.ask(
                question, "app-id", old, lambda text: text and wrong_app_id(text)
            )
        else:
            app_id = self.ask("AppID", "app-id", old, wrong_app_id)
            self.missing = [
                re.sub("id$", "id|--mode=plain", one) for one in self.missing
            ]
        key = ""
        if app_id:
            key = str(before.get("wechat.aes_key", "")) or make_aes_key()
            if options.aes_key is not None:
                key = self.ask("", "aes-key", "", wrong_aes_key)
        return values | {"wechat.app_id": app_id, "wechat.aes_key": key}

    def gather_model(self) -> dict[str, Value]:
        """Ask for the provider and its key."""
        before, providers = self.before, read_providers()
        other = Provider(tell("another one"), "other", "", "", {})
        providers.append(other)
        now = str(before.get(CHATGPT + "base_url", ""))
        default = next((p.name for p in providers if p.base_url == now), "other")
        default = default if now else ""
        names = [f"{one.title}|{one.title.lower()}|{one.name}" for one in providers]
        names = [
            name if name.split("|")[-1] != "chatgpt" else name + "|openai"
            for name in names
        ]
        chosen = self.choose(
            tell("Who answers? Any of these, or any OpenAI-compatible API:"),
            "provider",
            names,
            default,
        )
        if chosen < 0:
            self.missing += [] if self.options.key else ["--key"]
            return {}
        one = providers[chosen]
        is_same = one.base_url == now or one is other
        url, model = one.base_url, one.model
        if is_same and now:
            url, model = now, str(before.get(CHATGPT + "model", one.model))
        if not one.is_whole or self.options.base_url is not None or one is other:
            url = self.ask(
                tell("address of the API, with its version"),
                "base-url",
                url,
                wrong_base_url,
            )
        model = self.ask(
            tell("name of the model"),
            "model",
            model,
            lambda text: "" if text else tell("a name is needed"),
        )
        key = str(before.get(CHATGPT + "api_key", "")) if is_same else ""
        key = self.ask(
            tell("key (what you type is not shown)"),
            "key",
            key or ("any" if one.is_local else ""),
            wrong_key,
        )
        values: dict[str, Value] = {
            CHATGPT + "base_url": url,
            CHATGPT + "api_key": key,
            CHATGPT + "model": model,
        }
        extra = flat(one.extra, EXTRA)
        if is_same and now:
            extra = {k: v for k, v in before.items() if k.startswith(EXTRA)}
        return values | extra

    def gather_way(self, url: str) -> dict[str, Value]:
        """Ask how the internet reaches the program; note it for `write_proxy`."""
        ways = [
            "nginx",
            "Caddy|caddy",
            tell("no proxy, port 80 (http only)") + "|none",
            tell("there is one already") + "|other",
        ]
        old = "none" if self.before.get("server.port") == 80 else "other"
        default = (
            old if self.before else ("nginx" if url.startswith("https") else "none")
        )
        way = self.choose(tell("What stands before wxgpt?"), "proxy", ways, default)
        self.way = ("nginx", "caddy", "none", "other")[way]
        if self.way == "none" and url.startswith("https"):
            raise Stop(
                tell(
                    "https needs nginx or Caddy before wxgpt: --proxy nginx or caddy, or an http:// address"
                )
            )
        if self.way == "none":
            return {"server.host": "0.0.0.0", "server.port": 80}
        if self.before.get("server.port") == 80:
            return {"server.host": "127.0.0.1", "server.port": 8080}
        return {}

    # --- What is done with the answers

    def load(self, text: str) -> Config:
        """Return the settings of a text; raise ConfigError."""
        with tempfile.TemporaryDirectory() as folder:
            path = pathlib.Path(folder, self.path.name)
            path.touch(0o600)
            path.write_text(text, "utf-8")
            return load_config(path, os.environ, check_commands)

    async def try_key(self, config: Config) -> bool:
        """Ask the model one word; print how that went, and return whether it did."""
        doctor = Doctor(config, os.environ)
        async with open_chat(config) as (clients, _), doctor.talking():
            await doctor.check_assistant("chatgpt", clients["chatgpt"])
        return doctor.counts["fail"] == 0

    def settle_key(self, text: str, values: dict[str, Value]) -> str:
        """Try the key, and let the owner type another one; return the settings."""
        while not self.options.skip_test:
            say("asking the model one word …")
            with left_by_ctrl_c():
                if asyncio.run(self.try_key(self.load(text))):
                    return text
            if not self.is_asking:
                return text
            answer = getpass.getpass(
                tell("another key (Enter: keep this one and go on): ")
            ).strip()
            if not answer:
                return text
            if not (wrong := wrong_key(answer)):
                text = merge_settings(text, values | {CHATGPT + "api_key": answer})
            else:
                print("  " + wrong)
        return text

    def write(self, text: str) -> None:
        """Write the settings for their owner alone; the old ones are kept beside them."""
        if text == self.text:
            return say("{path}: nothing changes", path=self.path)
        old = self.path.with_name(self.path.name + ".old")
        if self.path.exists():
            if not self.is_asking and not self.options.yes:
                raise Stop(
                    tell(
                        "{path} is there already: with --yes it is changed, and the old one kept as {old}",
                        path=self.path,
                        old=old,
                    )
                )
            if not self.agrees(
                tell(
                    "change {path}? The old one is kept as {old}",
                    path=self.path,
                    old=old,
                )
            ):
                raise Stop(tell("nothing was changed"))
        self.path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=self.path.parent)  # mode 0600
        with open(handle, "w", encoding="utf-8") as file:
            file.write(text)
        if self.path.exists():
            os.replace(self.path, old)
        os.replace(name, self.path)
        say("✓ {path} is written; nobody else can read it", path=self.path)

    def write_proxy(self, config: Config) -> None:
        """Write the proxy's block beside the settings, and put it in place, or say how."""
        if self.way not in ("nginx", "caddy"):
            return
        url = urllib.parse.urlsplit(config.public_url)
        is_plain = url.scheme == "http"
        page = "README.md" if self.way == "nginx" and is_plain else "docs/deploy.md"
        text = (ROOT / page).read_text("utf-8")
        [block] = re.findall(rf"(?ms)^```{self.way}\n(.*?)^```$", text)
        block = block.replace(":8080", f":{config.server.port}")
        block = block.replace("wx.example.com", url.hostname or "")
        if self.way == "caddy" and is_plain:
            block = block.replace(f"{url.hostname} {{", f"http://{url.hostname} {{")
        path = self.path.with_name(f"wxgpt.{self.way}")
        path.write_text(block, "utf-8")
        say("✓ {path} is written, for {way}. Then:", path=path, way=self.way)
        if self.way == "caddy":
            steps = [
                "apt install -y caddy",
                f"cp -b {path} /etc/caddy/Caddyfile",
                "systemctl reload-or-restart caddy",
            ]
        else:
            certificate = f"certbot certonly --nginx -d {url.hostname}"
            packages = "nginx" if is_plain else "nginx certbot python3-certbot-nginx"
            steps = [f"apt install -y {packages}", *([] if is_plain else [certificate])]
            steps += [
                f"cp -b {path} /etc/nginx/conf.d/wxgpt.conf",
                "nginx -t && systemctl reload-or-restart nginx",
            ]
        print(*(f"    {step}" for step in steps), sep="\n")
        if self.way == "nginx" and not is_plain:
            say("certbot asks in English: your mail address, and Y or N to its terms")
        if not self.is_asking:
            return
        if os.geteuid() == 0 and self.agrees(tell("run these now?")):
            run_steps(steps)
        else:
            input(tell("run them in another window; then Enter, or Enter without: "))

    def put_up(self) -> None:
        """Put the unit and the short command up, and restart the service."""
        if str(ROOT).startswith(("/home/", "/root/")):
            self.is_service = False
            return say(
                "! the service cannot see {root}: move it to /opt/wxgpt, make .venv there again, and rerun setup",
                root=ROOT,
            )
        for path, name in {UNIT: "wxgpt.service", COMMAND: "owner/wxgpt"}.items():
            text = at_home((ROOT / name).read_text("utf-8"))
            if not path.exists() or path.read_text("utf-8") != text:
                path.write_text(text, "utf-8")
        COMMAND.chmod(0o755)
        for words in ("daemon-reload", "enable wxgpt", "restart wxgpt"):
            done = subprocess.run(["systemctl", "--quiet", *words.split()])
            if done.returncode:
                subprocess.run(
                    ["journalctl", "-u", "wxgpt", "-n", "15", "-o", "cat", "--no-pager"]
                )
                raise Stop(tell("the service does not start; its log is above"))
        say(
            "✓ the service runs, also after a reboot; from any folder: wxgpt check, wxgpt stats"
        )

    def wait_for_console(self, since: float) -> None:
        """Wait until WeChat's verification comes, by the service's log or our own."""
        if self.is_service:
            command = f"journalctl -u wxgpt -f -o cat --since @{since:.0f}".split()
        elif self.is_asking and not self.agrees(
            tell("start wxgpt now and wait for WeChat's verification?")
        ):
            return
        else:
            command = [
                sys.executable,
                str(ROOT / "wxgpt.py"),
                "--config",
                str(self.path),
            ]
        seconds = self.options.wait
        if seconds is None:
            seconds = 1800.0 if self.is_asking else 0.0
        if not seconds:
            return
        say(
            "waiting for WeChat's verification (if the console says it failed: Ctrl-C, and all is checked) …"
        )
        found = asyncio.run(find_line(command, VERIFIED, seconds))
        if found:
            say(
                "✓ verified. Now enable the settings there (启用), follow the account and write to it."
            )
        else:
            say(
                "! no verification has come: see what the check below finds, fix it, and run setup again"
            )


def run_steps(steps: list[str]) -> None:
    """Run commands up to the first that fails."""
    for step in steps:
        if subprocess.run(step, shell=True).returncode:
            return say(
                "! this failed, the rest of these was left out: {step}", step=step
            )


@contextlib.contextmanager
def left_by_ctrl_c() -> typing.Iterator[None]:
    """Let Ctrl-C end this step alone."""
    try:
        yield
    except KeyboardInterrupt:
        say("\nleft out")


async def find_line(command: list[str], words: str, seconds: float) -> bool:
    """Run a command until it prints these words; say whether it did in time.

    What the server refuses at its door meanwhile is told, and why it does not start.
    """
    pipe, out = asyncio.subprocess.PIPE, asyncio.subprocess.STDOUT
    process = await asyncio.create_subprocess_exec(*command, stdout=pipe, stderr=out)
    assert process.stdout
    try:
        async with asyncio.timeout(seconds):
            async for raw in process.stdout:
                line = raw.decode("utf-8", "replace").rstrip()
                if words in line:
                    return True
                if line.startswith("wxgpt: "):
                    print("  " + line, flush=True)
                for sign, found, fix in DOOR:
                    if sign in line:
                        say("! {found} → {fix}", found=found, fix=fix)
    except TimeoutError:
        pass
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
        await process.wait()
    return False


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of setup's options, one for each question."""
    text = tell("From nothing to a served account, by questions; each has an option.")
    parser = Parser(prog="wxgpt.py setup", description=text)
    options = {
        "config": ("FILE", "settings; as root /etc/wxgpt/wxgpt.toml, else wxgpt.toml"),
        "public-url": ("URL", "address, as in https://wx.example.com"),
        "app-id": ("ID", "AppID of the account, for safe mode"),
        "token": ("TOKEN", "of your own; without it one is made"),
        "aes-key": ("KEY", "EncodingAESKey; without it one is made"),
        "provider": ("NAME", "of docs/models.md, as deepseek; or other"),
        "base-url": ("URL", "address of the API, with its version"),
        "model": ("NAME", "model"),
        "key": ("KEY", "key of the API"),
        "proxy": ("WAY", "nginx, caddy, none or other: what stands before wxgpt"),
    }
    for name, (shown, words) in options.items():
        parser.add_argument(f"--{name}", metavar=shown, help=tell(words))
    text = tell("safe (the default) or plain")
    parser.add_argument("--mode", choices=("safe", "plain"), help=text)
    text = tell("subscribers need no /chatgpt first")
    parser.add_argument("--auto-open", action=argparse.BooleanOptionalAction, help=text)
    text = tell("port to listen on (8080)")
    parser.add_argument("--port", type=int, metavar="N", help=text)
    text = tell("seconds to wait for WeChat's verification (without a terminal 0)")
    parser.add_argument("--wait", type=float, metavar="N", help=text)
    flags = {
        "yes": "ask nothing, and change settings that are there",
        "skip-test": "do not try the key",
        "no-service": "do not put the service up",
        "no-check": "do not end in check",
    }
    for name, words in flags.items():
        parser.add_argument(f"--{name}", action="store_true", help=tell(words))
    return parser


def run_setup(setup: Setup) -> int:
    """Go through all steps; return the exit status."""
    if setup.is_asking:
        say(
            "Enter takes what stands in brackets; Ctrl-C leaves, and nothing is written before the last question."
        )
    values = setup.gather()
    head = tell(
        "written by setup; all settings with their meaning: {path}",
        path=ROOT / "wxgpt.example.toml",
    )
    text = merge_settings(setup.text or f"# {head}\n", values)
    config = setup.load(text)
    text = setup.settle_key(text, values)
    setup.write(text)
    since = time.time()
    with left_by_ctrl_c():
        setup.write_proxy(config)
    if setup.is_service:
        setup.put_up()
    print(console_words(config), flush=True)
    with left_by_ctrl_c():
        setup.wait_for_console(since)
    check = "wxgpt check"
    if not setup.is_service:
        command, path = f"{sys.executable} {ROOT}/wxgpt.py", setup.path.absolute()
        say("to start it: {command} --config {path}", command=command, path=path)
        check = f"{command} check --config {path}"
    if setup.options.no_check:
        return 0
    say("\nchecking it all (again at any time: {check}) …", check=check)
    words = [
        sys.executable,
        str(ROOT / "wxgpt.py"),
        "check",
        "--config",
        str(setup.path),
    ]
    return subprocess.run(words, env=os.environ | {BY_SETUP: "1"}).returncode


def setup_command(words: list[str]) -> int:
    """Run `setup` with its options; return the exit status."""
    options = make_parser().parse_args(words)
    try:
        return run_setup(Setup(options))
    except Stop as stop:
        print(f"wxgpt: {stop}", file=sys.stderr)
        return 2
    except OSError as error:
        why = error.strerror or str(error)
        line = tell("{path}: {why}", path=error.filename or "setup", why=why)
        print(f"wxgpt: {line}", file=sys.stderr)
        return 1
    except EOFError:
        print(file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        say("\nleft; run setup again at any time")
        raise
    except ConfigError as error:
        for line in explain(error).splitlines():
            print(f"wxgpt: {line}", file=sys.stderr)
        return 2
