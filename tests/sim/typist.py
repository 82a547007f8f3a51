"""A person at a terminal of their own, where Ctrl-C is a key.

async with typing_at("wxgpt", "setup") as typist:
    await typist.answer("address: ", "https://wx.example.com\\n")
    assert await typist.ends() == 0
"""

import asyncio
import codecs
import contextlib
import os
import pty
from collections.abc import AsyncIterator, Mapping

from waiting import limit, within


class Typist:
    """Answers what a program asks, and keeps what it shows."""

    def __init__(self, terminal: int, process: asyncio.subprocess.Process) -> None:
        self.terminal, self.process = terminal, process
        self.shown = ""  # since the last answer
        self.all_shown = ""
        self.news, self.over = asyncio.Event(), asyncio.Event()
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")
        asyncio.get_running_loop().add_reader(terminal, self.read)

    def read(self) -> None:
        """Take in what is shown."""
        piece = b""
        with contextlib.suppress(OSError):  # EIO: nobody writes any more
            piece = os.read(self.terminal, 4096)
        if not piece:
            asyncio.get_running_loop().remove_reader(self.terminal)
            self.over.set()
        text = self.decoder.decode(piece).replace("\r\n", "\n")
        self.shown += text
        self.all_shown += text
        self.news.set()

    async def answer(self, question: str, keys: str = "", seconds: float = 30) -> str:
        """Wait for a question, and press keys; return what was shown before it."""
        async with limit(seconds, f"{question!r} in {self.shown!r}"):
            while question not in self.shown:
                assert not self.over.is_set(), f"no {question!r} in {self.all_shown!r}"
                self.news.clear()
                await self.news.wait()
        before, _, self.shown = self.shown.partition(question)
        os.write(self.terminal, keys.encode())
        return before

    async def ends(self, pressing: str = "") -> int:
        """Return the exit status; keys are pressed again, as a person would.

        A Ctrl-C that comes between a prompt and the wait for a key is lost.
        """
        ended = asyncio.ensure_future(self.process.wait())
        for _ in range(60):
            if (await asyncio.wait({ended}, timeout=1))[0]:
                break
            os.write(self.terminal, pressing.encode())
        await within(1, "end of what it shows", self.over.wait())
        return await within(1, "end of the program", ended)


@contextlib.asynccontextmanager
async def typing_at(
    *command: str, env: Mapping[str, str] | None = None
) -> AsyncIterator[Typist]:
    """Run a program at a terminal; end it with the block if it still runs."""
    master, slave = pty.openpty()
    process = await asyncio.create_subprocess_exec(
        *("setsid", "--ctty", "--wait", *command),
        env=env,
        stdin=slave,
        stdout=slave,
        stderr=slave,
    )
    os.close(slave)
    typist = Typist(master, process)
    try:
        yield typist
    finally:
        asyncio.get_running_loop().remove_reader(master)
        os.close(master)  # which hangs it up
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                process.terminate()
            await process.wait()
