"""How other threads have things done on the event loop: many with one wake-up."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable
from typing import Any

logger = logging.getLogger(__name__)

_DRAINED = 256  # callbacks that are called before the loop has another turn


class Inbox:
    """Callbacks that wait for the loop."""

    def __init__(self) -> None:
        self.loop: asyncio.AbstractEventLoop  # has to be set before anything is told
        self._waiting: deque[tuple[Callable[[Any], None], Any]] = deque()
        self._told = False  # whether the loop will look
        self.afterwards: list[Callable[[], None]] | None = None  # while callbacks are called: what is to follow them

    def tell(self, callback: Callable[[Any], None], argument: Any = None) -> None:
        """Have something called on the loop; from any thread."""
        self._waiting.append((callback, argument))
        if not self._told:
            self._told = True
            self.loop.call_soon_threadsafe(self._listen)

    def _listen(self) -> None:
        self._told = False  # what comes from here on tells again
        waiting = self._waiting
        afterwards: list[Callable[[], None]] = []
        self.afterwards = afterwards
        for _ in range(min(len(waiting), _DRAINED)):
            callback, argument = waiting.popleft()
            try:
                callback(argument)
            except Exception:  # the others must be called all the same
                logger.exception("unexpected error in the server")
        self.afterwards = None
        for follow in afterwards:
            try:
                follow()
            except Exception:
                logger.exception("unexpected error in the server")
        if waiting and not self._told:
            self._told = True
            self.loop.call_soon(self._listen)
