"""A terminal for programs that print while somebody types: output, and lines read.

Only the main thread can be interrupted by Ctrl-C, so that is where lines are read; an
event loop in another thread asks for each one through `Lines`.
"""

import asyncio
import io
import os
import queue
import re
import shutil
import signal
import sys
import threading
import unicodedata
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

try:
    import readline  # gives input() its line editing, where there is such a thing
except ImportError:
    readline = None  # type: ignore[assignment]  # an optional module

PROMPT = "> "
DIM, GREEN, BLUE = "2", "32", "34"
BUBBLE_COLUMNS = 64
HANGING = "，。、；：？！）」』》"
LINK = re.compile(r"\[(?:网页 )?\d+\]")  # as callers mark what can be opened
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def columns(text: str) -> int:
    """Return how many columns a terminal gives to a text."""
    shown = (c for c in text if not unicodedata.combining(c))
    return sum(2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in shown)


def fold(line: str, width: int) -> Iterator[str]:
    """Yield the rows that a line fills; a row's last mark may stand over its end."""
    row = ""
    for word in re.findall(f"[!-~]{{1,{width}}}|.", line):
        if row and columns(row + word) > width and word not in HANGING:
            yield row
            row = ""
            if word == " ":
                continue
        row += word
    yield row


class Screen:
    """Standard output: lines and, on a terminal, one last line that changes in place."""

    def __init__(self) -> None:
        self.is_live = sys.stdout.isatty() and os.environ.get("TERM") != "dumb"
        self._is_coloured = self.is_live and not os.environ.get("NO_COLOR")
        self._is_prompting = False  # the main thread waits in input()

    def line(self, text: str = "", style: str = "") -> None:
        """Print lines, above the prompt if there is one, folded to fit a terminal."""
        width = max(8, shutil.get_terminal_size().columns - 1)
        for line in text.split("\n"):
            for row in fold(line, width) if self.is_live else [line]:
                self._put(self._styled(row, style))

    def _put(self, row: str) -> None:
        typed = ""
        if self._is_prompting:
            typed = PROMPT + (readline.get_line_buffer() if readline else "")
        self._write(f"{row}\n{typed}")

    def status(self, text: str = "") -> None:
        """Show a line that the next output replaces; nothing unless on a terminal."""
        if self.is_live and not self._is_prompting:
            self._write(self._styled(text, DIM))

    def bubble(self, text: str) -> None:
        """Print a reply as a phone shows it, indented behind a bar."""
        room = shutil.get_terminal_size().columns - 7
        width = max(8, min(room, BUBBLE_COLUMNS))
        bar = self._styled("▌" if self.is_live else "|", GREEN)
        for line in text.split("\n"):
            for row in fold(line, width) if self.is_live else [line]:
                marked = LINK.sub(lambda link: self._styled(link[0], BLUE), row)
                self._put(f"  {bar} {marked}".rstrip())

    def read_line(self) -> str | None:
        """Return the next line without blanks around it, None at the end of input."""
        if not (self.is_live and sys.stdin.isatty()):
            line = sys.stdin.readline()
            if line.strip():
                self.line(PROMPT + line.strip())
            return line.strip() if line else None
        self.status()
        self._is_prompting = True
        try:
            return input(PROMPT).strip()
        except EOFError:
            print()
            return None
        finally:
            self._is_prompting = False

    def _styled(self, text: str, style: str) -> str:
        has_style = self._is_coloured and style
        return f"\033[{style}m{text}\033[0m" if has_style else text

    def _write(self, text: str) -> None:
        sys.stdout.write(f"\r\033[K{text}" if self.is_live else text)
        sys.stdout.flush()


class Lines:
    """Brings lines from the main thread, which reads them, to the event loop."""

    def __init__(self) -> None:
        self._wishes: queue.SimpleQueue[asyncio.Future | None] = queue.SimpleQueue()

    async def next(self) -> str | None:
        """Return the next line, None at the end of input."""
        wish = asyncio.get_running_loop().create_future()
        self._wishes.put(wish)
        return await wish

    def close(self) -> None:
        """Let `serve` return: nobody wants another line."""
        self._wishes.put(None)

    def serve(self, screen: Screen) -> None:
        """Read a line whenever one is wanted, in the main thread."""
        while wish := self._wishes.get():
            line = screen.read_line()
            wish.get_loop().call_soon_threadsafe(self._fulfil, wish, line)

    @staticmethod
    def _fulfil(wish: asyncio.Future, line: str | None) -> None:
        if not wish.done():
            wish.set_result(line)


def talk(make: Callable[[Screen, Lines], Coroutine[Any, Any, None]]) -> None:
    """Run a coroutine in a second thread, and read its lines; raise what ended it.

    A signal ends it too, as `SystemExit`, once the coroutine has closed what it opened.
    """
    sys.stdin = sys.stdin or open(os.devnull)  # noqa: SIM115
    for stream in (sys.stdin, sys.stdout):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding="utf-8", errors="replace")
    screen, lines, loop = Screen(), Lines(), asyncio.new_event_loop()
    task = loop.create_task(make(screen, lines))
    begun, leaving = threading.Event(), threading.Event()
    work = (loop, task, begun, lines)
    thread = threading.Thread(target=run_to_end, args=work, daemon=True)

    def leave(number: int, _: object) -> None:
        if not leaving.is_set():  # once it is, nothing keeps us from tidying up
            leaving.set()
            sys.exit(128 + number)

    for number in SIGNALS:
        signal.signal(number, leave)
    thread.start()
    try:
        begun.set()  # from here on there may be something to close
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)  # held while we started
        lines.serve(screen)
    finally:
        leaving.set()
        loop.call_soon_threadsafe(task.cancel)  # without effect on what is over
        thread.join()
        loop.close()
    task.result()


def run_to_end(
    loop: asyncio.AbstractEventLoop,
    task: asyncio.Task,
    begun: threading.Event,
    end: Lines,
) -> None:
    """Run a task whatever becomes of it, then tell the reader of lines."""
    begun.wait()
    loop.run_until_complete(asyncio.wait([task]))
    loop.run_until_complete(loop.shutdown_asyncgens())
    end.close()
