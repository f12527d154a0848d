"""Signs of life: which of them a client is asked for, which it may ask for, and how old a connection may grow."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from typing import Protocol

from serving.rpc import frames
from serving.rpc.frames import frame
from serving.rpc.options import Options
from serving.rpc.outgoing import Outgoing

_ALIVE = b"alive..."
_STRIKES = 2  # pings that may come too early


class Aging(Protocol):
    """A connection."""

    def go_away(self, why: bytes) -> None:
        """Have the client make new calls elsewhere."""

    def abort(self, why: str) -> None:
        """End it, whatever runs."""


class Signs:
    """Of one connection's client."""

    def __init__(self, connection: Aging, transport: asyncio.Transport, outgoing: Outgoing, options: Options) -> None:
        """It has just connected."""
        self._connection = connection
        self._transport = transport
        self._outgoing = outgoing
        self._options = options
        self._loop = asyncio.get_running_loop()
        self._heard_s = self._loop.time()
        self._pinged_s = -options.min_ping_interval_s
        self._strikes = 0
        self._silence = self._later(options.keepalive_time_s, self._look)
        self._age: asyncio.TimerHandle | None = None
        if options.max_connection_age_s:
            # Not all of a time: clients that came together should not all leave together.
            self._age = self._later(options.max_connection_age_s * random.uniform(0.9, 1.1), self._grow_old)

    def heard(self) -> None:
        """It has sent something, or taken something."""
        self._heard_s = self._loop.time()

    def pinged(self) -> bool:
        """It has asked for a sign of life; whether it may ask so often. Each answer to a call lets it begin anew."""
        now_s = self._loop.time()
        if self._outgoing.answered:
            self._outgoing.answered, self._strikes = False, 0
        if now_s - self._pinged_s < self._options.min_ping_interval_s:
            self._strikes += 1
        self._pinged_s = now_s
        return self._strikes <= _STRIKES

    def stop(self) -> None:
        """It has gone."""
        self._silence.cancel()
        if self._age:
            self._age.cancel()

    def _later(self, seconds: float, then: Callable[[], None]) -> asyncio.TimerHandle:
        return self._loop.call_later(seconds, then)

    def _look(self) -> None:
        """Ask a silent client for a sign of life."""
        silent_s = self._loop.time() - self._heard_s
        if silent_s < self._options.keepalive_time_s:
            self._silence = self._later(self._options.keepalive_time_s - silent_s, self._look)
            return
        self._outgoing.write(frame(frames.PING, 0, 0, _ALIVE))
        asked_s, unsent = self._loop.time(), self._transport.get_write_buffer_size()

        def give_up() -> None:
            if self._heard_s >= asked_s or self._transport.get_write_buffer_size() < unsent:  # or it takes, slowly
                self._look()
            else:
                self._transport.abort()

        self._silence = self._later(self._options.keepalive_timeout_s, give_up)

    def _grow_old(self) -> None:
        self._connection.go_away(b"max_age")
        self._age = self._later(
            self._options.max_connection_age_grace_s, lambda: self._connection.abort("max connection age")
        )
