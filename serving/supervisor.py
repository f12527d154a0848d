"""The supervisor of several workers: starts, watches, replaces, tells, asks and stops them; knows nothing of models."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
import time
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple

from serving import logs
from serving.channel import Channel, Gone, Handler
from serving.config import ServerConfig
from serving.control import Readiness, Report, Role, Stop
from serving.errors import ParityserveError, StartupError, Unavailable
from serving.forks import Forked, Forks

if TYPE_CHECKING:  # a server without metrics saves the time and memory
    from serving.snapshot import Snapshot

logger = logging.getLogger(__name__)

START_TRIES = 3  # of one worker, before the server gives up starting
QUICK_END_S = 10.0  # a worker that lives longer is replaced at once when it ends
FIRST_PAUSE_S = 0.5  # before a worker that ended so quickly twice in a row is replaced; doubled from then on
LONGEST_PAUSE_S = 30.0
ANSWER_S = 10.0  # within which a worker that is asked has to answer
END_S = 10.0  # beyond `drain_delay_s` and `drain_s`, within which a worker that is stopped has to end


@dataclass
class _Worker:
    number: int
    process: Forked
    started_s: float  # on `time.monotonic()`
    channel: Channel = field(init=False)
    joined: bool = False  # from here on it is told and asked what concerns all
    report: Report | None = None
    error: ParityserveError | None = None  # why it could not start
    snapshot: Snapshot | None = None  # the last that it gave

    def __str__(self) -> str:
        return f"worker {self.number} (pid {self.process.pid})"


class _End(NamedTuple):
    """Of a worker's process."""

    how: str
    code: int  # of its exit; below 0, minus the signal
    error: ParityserveError | None = None  # why it could not start, in its own words


class Supervisor:
    """The workers of one server."""

    def __init__(self, config: ServerConfig, count: int, forks: Forks) -> None:
        """`config.port` is the port itself, not 0; `forks` makes processes that are workers."""
        self.stop = Stop()
        self._config = config
        self._count = count
        self._forks = forks
        self._workers: dict[int, _Worker] = {}  # those that live, by number
        self._started: set[int] = set()  # the numbers under which a process took connections
        self._models: bytes | None = None  # what is served, as last known
        self._changing = asyncio.Lock()  # held while that changes, and while a new worker learns of it
        self._showing: set[asyncio.Task[None]] = set()
        self._ended: Snapshot | None = None  # what workers that have ended had counted, where anyone asked them

    async def run(self) -> None:
        """Keep the workers running until `stop` is asked for, then have them drain.

        Raises:
            StartupError, DeviceError, BundleError: a worker cannot start.
            ParityserveError: a worker died, or had to be killed, while it drained.
        """
        asked = asyncio.create_task(self.stop.asked.wait())
        hurrying = asyncio.create_task(self._hurry())
        keeping = [asyncio.create_task(self._keep(number)) for number in range(1, self._count + 1)]
        await asyncio.wait([asked, *keeping], return_when=asyncio.FIRST_COMPLETED)
        first = [task for task in keeping if task.done()]  # where one cannot start, the others need not
        self.stop.asked.set()
        for worker in self._workers.values():
            worker.channel.tell("stop")
        await asyncio.wait(keeping, timeout=self._config.drain_delay_s + self._config.drain_s + END_S)
        for worker in self._workers.values():
            logger.error("%s does not end, and is killed", worker)
            worker.process.kill()
        hurrying.cancel()
        await asyncio.gather(*first, *keeping)

    def reload(self) -> None:
        """Have every worker read its certificates and tokens again."""
        for worker in self._workers.values():
            if worker.report:  # until then it may not handle the signal yet, and would be ended by it
                worker.process.send_signal(signal.SIGHUP)

    async def ask(self, method: str, *arguments: Any) -> list[Any]:
        """Call what every worker offers by a name, and gather the answers; one that dies meanwhile is left out.

        Raises:
            Unavailable: a worker does not answer.
        """
        calls = [worker.channel.call(method, *arguments) for worker in self._joined()]
        try:
            answers = await asyncio.wait_for(asyncio.gather(*calls, return_exceptions=True), ANSWER_S)
        except TimeoutError as error:
            raise Unavailable(f"not every worker answers within {ANSWER_S:g} s; try again") from error
        for answer in answers:
            if isinstance(answer, BaseException) and not isinstance(answer, Gone):
                raise answer
        return [answer for answer in answers if not isinstance(answer, Gone)]

    async def snapshot(self) -> Snapshot:
        """All workers as they stand, for the metrics; one that does not answer as it last stood."""
        from serving.snapshot import combine

        async def of(worker: _Worker) -> Snapshot | None:
            with contextlib.suppress(TimeoutError, Gone):
                worker.snapshot = await asyncio.wait_for(worker.channel.call("snapshot"), ANSWER_S)
            return worker.snapshot

        given = [snapshot for snapshot in await asyncio.gather(*map(of, self._joined())) if snapshot]
        live = combine(given)
        whole = combine([live, self._ended]) if self._ended else live
        return replace(
            whole,
            ready=live.ready and self._readiness().server,
            statistics={key: whole.statistics[key] for key in live.statistics},  # not of what was unloaded since
        )

    def _joined(self) -> list[_Worker]:
        return [worker for worker in self._workers.values() if worker.joined]

    async def _hurry(self) -> None:
        await self.stop.asked_again.wait()
        for worker in self._workers.values():
            worker.channel.tell("hurry")

    async def _keep(self, number: int) -> None:
        """Start a worker, and another in its place whenever it ends, until all are to stop."""
        quick_ends = 0
        while not self.stop.asked.is_set():
            began_s = time.monotonic()
            end = await self._run(number)
            if self.stop.asked.is_set():
                if end.code:
                    raise end.error or ParityserveError(f"{end.how} while it stopped; what it was answering is lost")
                return
            quick_ends = quick_ends + 1 if time.monotonic() - began_s < QUICK_END_S else 0
            if number not in self._started and (end.error or quick_ends == START_TRIES):
                raise end.error or StartupError(f"{end.how} before it was READY, as all of {START_TRIES} did")
            pause_s = min(FIRST_PAUSE_S * 2 ** (quick_ends - 2), LONGEST_PAUSE_S) if quick_ends > 1 else 0.0
            why = f": {end.error}" if end.error else ""
            logger.error("%s%s; it is replaced %s", end.how, why, f"in {pause_s:g} s" if pause_s else "at once")
            self._show_soon()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.stop.asked.wait(), pause_s)

    async def _run(self, number: int) -> _End:
        """Start a process, and wait for its end."""
        try:
            worker = await self._begin(number)
        except OSError as error:  # there is no memory, or no file descriptor, for one more
            return _End(f"worker {number} cannot be started ({error})", code=1)
        self._workers[number] = worker
        logger.info("%s started", worker)
        if self.stop.asked.is_set():
            worker.channel.tell("stop")
        code = await worker.process.wait()
        await worker.channel.closed()  # all that it had to say has been heard
        del self._workers[number]
        if worker.snapshot:
            from serving.snapshot import combine, ended

            self._ended = combine([snapshot for snapshot in (self._ended, ended(worker.snapshot)) if snapshot])
        how = f"ended with exit code {code}" if code >= 0 else f"was ended by signal {-code}"
        return _End(f"{worker} {how}", code, worker.error)

    async def _begin(self, number: int) -> _Worker:
        ours, theirs = socket.socketpair()
        with contextlib.ExitStack() as failing, theirs:
            failing.callback(ours.close)
            process = await self._forks.fork(theirs)
            failing.pop_all()
        worker = _Worker(number, process, time.monotonic())
        worker.channel = await Channel.open(ours, self._handlers(worker))
        return worker

    # --- what workers ask for

    def _handlers(self, worker: _Worker) -> dict[str, Handler]:
        async def join() -> Role:
            async with self._changing:
                worker.joined = True
                complete = len(self._started) == self._count
                return Role(self._config, worker.number, self._models if complete else None)

        async def started() -> None:
            complete = len(self._started) == self._count
            self._started.add(worker.number)
            logger.info("%s READY after %.2f s", worker, time.monotonic() - worker.started_s)
            if not complete and len(self._started) == self._count:
                await self._show()
                address = f"{self._config.address} ({self._count} workers)"
                logs.started(address, self._readiness().server)

        async def failed(error: ParityserveError) -> None:
            worker.error = error

        async def report(report: Report) -> None:
            worker.report = report
            self._remember()
            await self._show()

        return {
            "join": join,
            "started": started,
            "failed": failed,
            "report": report,
            "change": self._change,
            "ask": self.ask,
        }

    def _remember(self) -> None:
        """Note what the worker serves that has served longest: the others are to serve the same."""
        reporting = [worker for worker in self._workers.values() if worker.report]
        oldest = min(reporting, key=lambda worker: worker.started_s, default=None)
        if oldest and oldest.report:
            self._models = oldest.report.models

    async def _change(self, method: str, name: str) -> None:
        """Have every worker load or unload a model; one that fails where others succeed is replaced by one like them.

        Raises:
            ParityserveError: what workers raised; where all of them did, nothing has changed.
        """
        async with self._changing:
            asked = self._joined()
            calls = [worker.channel.call(method, name) for worker in asked]
            answers = await asyncio.gather(*calls, return_exceptions=True)
            lived = [(w, a) for w, a in zip(asked, answers, strict=True) if not isinstance(a, Gone)]
            failed = [(worker, error) for worker, error in lived if isinstance(error, BaseException)]
            if not lived:
                raise Unavailable("every worker has died and is replaced; try again")
            if not failed:
                return
            worker, error = failed[0]
            if len(failed) == len(lived):
                raise error
            for worker, error in failed:
                logger.error("%s is replaced, as it failed where others succeeded: %s", worker, error)
                worker.report, worker.joined = None, False
                worker.channel.tell("stop")
            self._remember()
            raise Unavailable(f"{error}; {worker} is replaced, all others succeeded")

    def _readiness(self) -> Readiness:
        """At the start nothing is ready before every worker is. Later, a worker that died takes the readiness of the
        server away until it is replaced, but not that of the models: the others answer for them, and its successor
        listens only when it can.
        """
        reports = [worker.report.readiness for worker in self._workers.values() if worker.report]
        complete = len(self._started) == self._count
        names = {name for report in reports for name in report.models}
        return Readiness(
            complete and len(reports) == self._count and all(report.server for report in reports),
            {name: complete and all(report.models.get(name, False) for report in reports) for name in names},
        )

    async def _show(self) -> None:
        with contextlib.suppress(Unavailable):  # a worker that hangs shows what it showed
            await self.ask("show", self._readiness())

    def _show_soon(self) -> None:
        task = asyncio.create_task(self._show())
        self._showing.add(task)
        task.add_done_callback(self._showing.discard)
