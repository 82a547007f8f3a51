"""The host that a subscriber's pictures lie on, as WeChat's mmbiz.qpic.cn does."""

import secrets
from pathlib import Path
from typing import Self

from aiohttp import web


class PictureHost:
    """Serves the pictures that were sent, on a loopback port of its own."""

    def __init__(self) -> None:
        self._pictures: dict[str, bytes] = {}

    async def __aenter__(self) -> Self:
        app = web.Application()
        app.add_routes([web.get("/{key}", self._answer)])
        self._runner = web.AppRunner(app)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", 0).start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._runner.cleanup()

    def add(self, path: Path) -> str:
        """Take in a file and return its URL; raise OSError."""
        key = secrets.token_hex(8)
        self._pictures[key] = path.expanduser().read_bytes()
        port = self._runner.addresses[0][1]
        return f"http://127.0.0.1:{port}/{key}"

    async def _answer(self, request: web.Request) -> web.Response:
        body = self._pictures.get(request.match_info["key"])
        return web.Response(status=404) if body is None else web.Response(body=body)
