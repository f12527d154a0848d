"""How the pump has things done on the event loop: many with one wake-up."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Any

_DRAINED = 256  # callbacks that are called before the loop has another turn


class Inbox:
    """Callbacks that wait for the loop."""

    def __init__(self) -> None:
        self.loop: asyncio.AbstractEventLoop  # has to be set before anything is told
        self._waiting: deque[tuple[Callable[[Any], None], Any]] = deque()
        self._told = False  # whether the loop will look

    def __len__(self) -> int:
        return len(self._waiting)

    def tell(self, callback: Callable[[Any], None], argument: Any = None) -> None:
        """On the pump: have something called on the loop."""
        self._waiting.append((callback, argument))
        if not self._told:
            self._told = True
            self.loop.call_soon_threadsafe(self._listen)

    def _listen(self) -> None:
        self._told = False  # what comes from here on tells again
        waiting = self._waiting
        for _ in range(min(len(waiting), _DRAINED)):
            callback, argument = waiting.popleft()
            callback(argument)
        if waiting and not self._told:
            self._told = True
            self.loop.call_soon(self._listen)
