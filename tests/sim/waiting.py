"""Waits that end: what does not come in time fails the test in words.

await within(10, "end of the call", asked.over.wait())
async with limit(30, "hundred events"):
    ...
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable
from typing import TypeVar

T = TypeVar("T")


@contextlib.asynccontextmanager
async def limit(seconds: float, what: str) -> AsyncIterator[None]:
    """Let a block take so long at most, or raise AssertionError that says what for."""
    try:
        async with asyncio.timeout(seconds) as timeout:
            yield
    except TimeoutError:
        if timeout.expired():
            raise AssertionError(f"no {what} within {seconds:g} s") from None
        raise  # somebody else's


async def within(seconds: float, what: str, awaitable: Awaitable[T]) -> T:
    """Return what an awaitable brings, or raise AssertionError that says what for."""
    async with limit(seconds, what):
        return await awaitable
