"""What concerns every process of a server: loading, unloading, statistics, readiness, stopping.

A server of one process is its own control, `Local`. One of several is a `Member`: it tells and asks all of them over a
`Channel` to their supervisor, which is in `serving/workers.py`.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import pickle
import socket
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol

from serving.channel import Channel, Handler
from serving.config import ServerConfig
from serving.errors import ParityserveError
from serving.statistics import Statistics, merge

if TYPE_CHECKING:  # the supervisor does without what runs models
    from serving.repository import Repository
    from serving.snapshot import Snapshot

logger = logging.getLogger(__name__)

ByVersion = dict[tuple[str, str], Statistics]  # by the model's name and version


@dataclass(frozen=True)
class Readiness:
    """Whether the server as a whole is ready, and whether each model is, by name."""

    server: bool = False
    models: Mapping[str, bool] = field(default_factory=dict)


@dataclass(frozen=True)
class Report:
    """What a process tells of itself when its models changed."""

    readiness: Readiness
    models: bytes  # what `Repository.statuses` and `labels` give, for the process that takes the place of one that died


@dataclass(frozen=True)
class Role:
    """What a process of several is told when it has started."""

    config: ServerConfig
    number: int  # from 1
    models: bytes | None  # what to serve, from a `Report`; None for the first processes, which find it themselves


class Stop:
    """Waited for: to be asked to stop, and to be asked again, by someone in a hurry."""

    def __init__(self) -> None:
        self.asked = asyncio.Event()
        self.asked_again = asyncio.Event()

    def ask(self) -> None:
        """Ask, or ask again."""
        (self.asked_again if self.asked.is_set() else self.asked).set()


class Control(Protocol):
    """What concerns every process of a server, whichever of them was asked."""

    async def load(self, name: str) -> None:
        """Load the newest version of a model everywhere; raises what `Repository.load` raises."""

    async def unload(self, name: str) -> None:
        """Take a model out of service everywhere; raises what `Repository.unload` raises."""

    async def statistics(self) -> ByVersion:
        """What every version that is served has done, in all processes together."""

    async def report(self) -> None:
        """Have changed models taken into account; returns when all processes show what became of their readiness."""

    def readiness(self) -> Readiness:
        """Of all processes together."""


class Local:
    """The control of one process: the server's, when it is the only one."""

    def __init__(
        self,
        repository: Repository,
        changed: Callable[[], Awaitable[None]],
        show: Callable[[Readiness], Awaitable[None]],
        snapshot: Callable[[], Snapshot],
    ) -> None:
        """`changed` is called after a change, whatever came of it; `show` tells clients of the readiness."""
        self._repository = repository
        self._changed = changed
        self._snapshot = snapshot
        self.show = show

    async def load(self, name: str) -> None:
        """Load the newest version of a model here."""
        await self._change(self._repository.load, name)

    async def unload(self, name: str) -> None:
        """Take a model out of service here."""
        await self._change(self._repository.unload, name)

    async def _change(self, change: Callable[[str], None], name: str) -> None:
        try:
            await asyncio.to_thread(change, name)
        finally:
            await self._changed()

    async def statistics(self) -> ByVersion:
        """What every version served here has done."""
        served = [status.served for status in self._repository.statuses() if status.served]
        return {(model.name, model.version): merge([model.statistics]) for model in served}

    async def snapshot(self) -> Snapshot:
        """This process as it stands, for its metrics."""
        return self._snapshot()

    async def report(self) -> None:
        """Show how ready this process is."""
        await self.show(self.readiness())

    def readiness(self) -> Readiness:
        """Of this process."""
        return Readiness(self._repository.ready(), self._repository.answering())

    def models(self) -> bytes:
        """What is served here and what is not, for `Repository.adopt` of another process."""
        statuses = [replace(status, served=None) for status in self._repository.statuses()]
        return pickle.dumps((statuses, self._repository.labels()))


class Member:
    """The control of one process of several: what it is asked is done, or answered, by all of them."""

    def __init__(self) -> None:
        self.stop = Stop()
        self._joined = asyncio.Event()
        self._readiness = Readiness()

    async def connect(self, end: socket.socket) -> Role:
        """Join the supervisor at the other end of `end`. When it ends, this process is asked to stop."""
        self._channel = await Channel.open(end, self._handlers())
        self._watching = asyncio.create_task(self._watch())
        role: Role = await self._channel.call("join")
        self.role = role
        return role

    def _handlers(self) -> dict[str, Handler]:
        """What the supervisor may call."""

        async def joined(method: str, *arguments: Any) -> Any:
            await self._joined.wait()
            return await getattr(self._local, method)(*arguments)

        async def show(readiness: Readiness) -> None:
            self._readiness = readiness
            await joined("show", readiness)

        async def stop() -> None:
            self.stop.asked.set()  # it may have had a signal too: that is not yet a hurry

        async def hurry() -> None:
            self.stop.asked_again.set()

        own = {method: functools.partial(joined, method) for method in ("load", "unload", "statistics", "snapshot")}
        return {**own, "show": show, "stop": stop, "hurry": hurry}

    async def _watch(self) -> None:
        await self._channel.closed()
        if not self.stop.asked.is_set():
            logger.error("the supervisor has ended: this worker stops")
        self.stop.asked.set()

    def join(self, local: Local) -> None:
        """Take part from here on, with the control of this process."""
        self._local = local
        self._joined.set()

    async def started(self) -> None:
        """Tell that this process has loaded its models and takes connections."""
        await self._channel.call("started")

    async def failed(self, error: ParityserveError) -> None:
        """Tell why this process cannot start."""
        await self._channel.call("failed", error)

    async def load(self, name: str) -> None:
        """Load the newest version of a model in all processes."""
        await self._channel.call("change", "load", name)

    async def unload(self, name: str) -> None:
        """Take a model out of service in all processes."""
        await self._channel.call("change", "unload", name)

    async def statistics(self) -> ByVersion:
        """What every version that is served has done, in all processes together."""
        parts: dict[tuple[str, str], list[Statistics]] = {}
        for answer in await self._channel.call("ask", "statistics"):
            for version, statistics in answer.items():
                parts.setdefault(version, []).append(statistics)
        return {version: merge(found) for version, found in parts.items()}

    async def report(self) -> None:
        """Tell the supervisor, and return when all processes show what follows."""
        await self._channel.call("report", Report(self._local.readiness(), self._local.models()))

    def readiness(self) -> Readiness:
        """Of all processes together."""
        return self._readiness
