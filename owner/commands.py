"""The command line: what it takes, its help, and who carries a command out.

`wxgpt.py` itself knows how to serve; every other command line is read here.
"""

import argparse
import os
import pathlib
import re
import signal
import sys
import typing

from owner.words import tell
from wxgpt import VERSION, OwnerError, print_error, serve_command

DEMO = pathlib.Path(__file__).with_name("demo.py")
LANGUAGE = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
LANGUAGE.add_argument("--lang", choices=("zh", "en"), help=argparse.SUPPRESS)
COMMANDS = {
    "serve": "serve (the default)",
    "check": "test each thing that usually goes wrong, and say how to fix it",
    "stats": "who asked how much",
    "logs": "follow the service's log",
    "update": "bring a newer version, or this one again if it does not start",
    "backup": "copy the database",
    "setup": "from nothing to a served account",
    "demo": "try it all with no account and no key",
}


class Parser(argparse.ArgumentParser):
    """A command line's parser, which speaks the owner's language."""

    def __init__(self, **options: typing.Any) -> None:
        # argparse's own words, and the description that its commands have not
        argparse._ = lambda text: text and tell(text)  # type: ignore[attr-defined]
        super().__init__(**options)

    def format_help(self) -> str:
        """Return the help; argparse writes the colon of a heading itself."""
        colon = tell(": ").rstrip()
        return re.sub(r"(?m)^(\S+):(?=\S*$)", rf"\1{colon}", super().format_help())


def make_parser() -> Parser:
    """Return the command line's parser."""
    common = Parser(add_help=False)
    text = tell("settings (the service's, else wxgpt.toml)")
    common.add_argument("--config", metavar="FILE", help=text)
    parser = Parser(
        parents=[common],
        prog="wxgpt.py",
        usage="wxgpt.py [COMMAND] [--config FILE] [--lang en] [-h] [--version]",
        description=tell("Subscribers of a WeChat Official Account talk with a model."),
    )
    version, text = f"wxgpt {VERSION}", tell("show program's version number and exit")
    parser.add_argument("--version", action="version", version=version, help=text)
    text = tell("zh: Chinese (the default), en: English")  # LANGUAGE has taken it
    parser.add_argument("--lang", metavar="zh|en", help=text)
    commands = parser.add_subparsers(
        title=tell("commands"), dest="command", metavar="COMMAND", prog="wxgpt.py"
    )
    add = {}
    for name, words in COMMANDS.items():
        parents = [] if name in ("setup", "demo") else [common]
        one = commands.add_parser(name, parents=parents, help=tell(words))
        add[name] = one.add_argument
    text = tell("Beijing days, today included (7); 0: all")
    add["stats"]("--days", type=int, default=7, metavar="N", help=text)
    text = tell("all subscribers, with whole openids")
    add["stats"]("--full", action="store_true", help=text)
    add["stats"]("--json", action="store_true", help=tell("for machines"))
    text = tell("older lines (50)")
    add["logs"]("-n", dest="lines", type=int, default=50, help=text)
    text = tell("the new version (.tar.gz or .zip); without one: git pull")
    add["update"]("archive", nargs="?", default="", metavar="ARCHIVE", help=text)
    text = tell("new file; without one it is named by the time")
    add["backup"]("file", nargs="?", default="", metavar="FILE", help=text)
    return parser


def demo_command(words: list[str]) -> int:
    """Replace this process by demo.py; return the exit status if a file is missing."""
    for needed in (DEMO, DEMO.parents[1] / "tests" / "sim" / "child.py"):
        if not needed.exists():
            print_error(OwnerError("{path}: not found", path=needed))
            return 1
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])  # until demo.py is loaded
    os.execv(sys.executable, [sys.executable, str(DEMO), *words])


def run_command(words: list[str]) -> int:
    """Run a command line, `serve` if it names no command; return the exit status."""
    options, words = LANGUAGE.parse_known_args(words)
    os.environ.update({"WXGPT_LANG": options.lang} if options.lang else {})
    if words[:1] == ["demo"]:
        return demo_command(words[1:])
    if words[:1] == ["setup"]:
        from owner.setup import setup_command

        return setup_command(words[1:])
    if not words or words[0] not in (*COMMANDS, "--version", "-h", "--help"):
        words = ["serve", *words]
    arguments = make_parser().parse_args(words)
    if arguments.command == "serve":
        return serve_command(arguments.config or "wxgpt.toml")
    from owner.service import owner_command

    return owner_command(arguments)
