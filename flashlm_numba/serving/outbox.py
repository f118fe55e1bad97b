"""Results on their way from worker threads to the event loop."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Any


class Outbox:
    """Collects numbered results from any thread. The event loop takes all that are there at once.

    The last result of a number is None or an exception. The loop is woken for the first result, and then for a last
    one: waking it for each would cost more than a token.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._results: deque[tuple[int, Any]] = deque()  # append and popleft are atomic
        self._woken, self._hurried = asyncio.Event(), asyncio.Event()
        self._waking = False

    def put(self, index: int, result: Any) -> None:
        """Add a result, in any thread. Raises RuntimeError if the event loop is closed."""
        self._results.append((index, result))
        if not self._waking:
            self._waking = True
            self._loop.call_soon_threadsafe(self._woken.set)
        if result is None or isinstance(result, Exception):
            self._loop.call_soon_threadsafe(self._hurried.set)

    async def take(self, pause: float) -> list[tuple[int, Any]]:
        """Wait for results, then for more of them until a last one is there, at most `pause` seconds, and take all."""
        await self._woken.wait()
        if pause > 0:
            timer = self._loop.call_later(pause, self._hurried.set)
            await self._hurried.wait()
            timer.cancel()
        self._woken.clear()
        self._hurried.clear()
        self._waking = False  # before the results are taken, so that a later one wakes again
        return [self._results.popleft() for _ in range(len(self._results))]
