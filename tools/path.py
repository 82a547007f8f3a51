"""What one ordinary question costs a reader: functions entered, and jumps of the eye.

Serves wxgpt in this process, asks it one question of an open session on the simulators,
and lists by `sys.setprofile` which functions of wxgpt.py are entered between the request
and the stored end of the answer. A jump is a call from one of them to another that
stands more than 200 lines away; a coroutine that goes on counts as called again.

Usage: python tools/path.py [--list]
"""

import asyncio
import contextlib
import pathlib
import sys
import tempfile
import threading
import types

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "sim")]

import wxgpt  # noqa: E402
from conftest import ANN, TOKEN, platform, toml  # noqa: E402
from fake_openai import FakeOpenAI, says  # noqa: E402

FAR = 200  # lines


class Path:
    """The functions of wxgpt.py that a profile meets, and the calls between them."""

    def __init__(self) -> None:
        self.entered: dict[str, int] = {}  # name: first line
        self.jumps: list[tuple[str, str]] = []
        self.is_walked = False

    def note(self, frame: types.FrameType, event: str, _: object) -> None:
        """Take in one event of the profiler."""
        code, caller = frame.f_code, frame.f_back
        is_function = not code.co_name.startswith("<")
        if (
            not self.is_walked
            or event != "call"
            or code.co_filename != wxgpt.__file__
            or not is_function
        ):
            return
        self.entered.setdefault(code.co_qualname, code.co_firstlineno)
        while caller and caller.f_code.co_name.startswith("<"):
            caller = caller.f_back
        if caller and caller.f_code.co_filename == wxgpt.__file__:
            if abs(caller.f_lineno - code.co_firstlineno) > FAR:
                self.jumps.append((caller.f_code.co_qualname, code.co_qualname))


async def walk(folder: str) -> Path:
    """Return the path of one question of an open session."""
    path = Path()
    threading.setprofile(path.note)  # for the database's thread, which starts below
    sys.setprofile(path.note)
    async with contextlib.AsyncExitStack() as stack:
        upstream = await stack.enter_async_context(FakeOpenAI())
        chatgpt = {"base_url": upstream.base_url, "api_key": "-"}
        settings = pathlib.Path(folder) / "wxgpt.toml"
        table = {
            "public_url": "http://127.0.0.1",
            "server": {"port": 0},
            "wechat": {"token": TOKEN},
            "assistants": {"chatgpt": chatgpt},
            "database": {"path": f"{folder}/wxgpt.db"},
        }
        settings.write_text(toml(table), "utf-8")
        opened = wxgpt.open_server(wxgpt.load_config(settings))
        _, port = await stack.enter_async_context(opened)
        here = await stack.enter_async_context(platform(port, attempt_timeout=5.0))
        await here.ask("/chatgpt")
        await here.ask("你好")
        upstream.will(says("你好！有什么可以帮你？"))
        await asyncio.sleep(1.2)  # what is done every second lies behind
        path.is_walked = True
        seen = await here.wechat.send(ANN, "在吗？")
        await asyncio.sleep(0.3)  # until the end is stored
        path.is_walked = False
        assert seen.text and "有什么可以帮你" in seen.text
    return path


def main() -> None:
    """Walk, and print what was met."""
    with tempfile.TemporaryDirectory() as folder:
        path = asyncio.run(walk(folder))
    if "--list" in sys.argv:
        for name, line in sorted(path.entered.items(), key=lambda item: item[1]):
            print(f"{line:5} {name}")
        for caller, callee in path.jumps:
            print(f"      {caller} -> {callee}")
    print(f"{len(path.entered)} functions, {len(path.jumps)} jumps of over {FAR} lines")


if __name__ == "__main__":
    main()
