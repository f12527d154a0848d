"""Run one load in this process: which request is sent when, over which connection, and what came back."""

from __future__ import annotations

import asyncio
import gc
import math
import time
from array import array
from collections import deque
from collections.abc import Coroutine
from dataclasses import dataclass, field
from multiprocessing.synchronize import Barrier
from time import perf_counter
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from benchmarks.calls import connect
from benchmarks.exchanges import Exchange
from benchmarks.headers import CONNECTION_LOST, OK, UNPROCESSED, Status
from benchmarks.http2 import Call, Connection, message
from benchmarks.processes import cpu_s
from protos import open_inference as pb

Floats = npt.NDArray[np.float64]
_Request: TypeAlias = tuple[float, int]  # when it was sent, `perf_counter()`, and the number of its exchange

UNARY, STREAM = (pb.RPCS[name].path for name in ("ModelInfer", "ModelStreamInfer"))
GRACE_S = 10.0  # how long answers are waited for when the time is over
RETRY_S = 0.001  # until another try: gRPC core frees a stream a little after its end is seen
TRIED_S = 5.0  # for so long a request is sent again that the server says it has not looked at
_MOST_KNOWN = 1000  # answers to one request that are remembered as right

WRONG = Status("WRONG", "the answer is not the expected one")
UNANSWERED = Status("UNANSWERED", f"no answer within {GRACE_S:g} s after the load ended")


@dataclass(frozen=True)
class Load:
    """What to send, how, and for how long."""

    target: str  # host:port
    exchanges: tuple[Exchange, ...]  # sent in turn
    images: int = 1  # in each request
    in_flight: int = 32  # requests; not looked at when there is a rate
    rate: float | None = None  # requests a second, sent when due
    stream: bool = False  # one bidirectional stream a connection instead of a call a request
    connections: int = 4
    seconds: float = 5.0
    warmup_s: float = 1.0  # before anything is counted
    metadata: tuple[tuple[str, str], ...] = ()
    watch: tuple[int, ...] = ()  # processes whose CPU time to measure while it counts


@dataclass
class Record:
    """What one process counted."""

    samples: dict[str, array[float]] = field(default_factory=dict)  # seconds, by status
    messages: dict[str, str] = field(default_factory=dict)
    lags: array[float] = field(default_factory=lambda: array("d"))
    sent_bytes: float = 0
    received_bytes: float = 0
    cpu_s: float = 0.0
    watched_cpu_s: float = 0.0


class _Lane:
    """One connection, made anew whenever it ends, and the requests that go over it."""

    def __init__(self, driver: Driver, first: int) -> None:
        self._driver = driver
        self._turn = first
        self._connection: Connection | None = None
        self._connections: list[Connection] = []  # with earlier ones that still have calls under way
        self._past = [0, 0]  # bytes sent and received on earlier connections
        self._call: Call | None = None  # the stream; its tag has the unanswered requests
        self._owed: deque[_Request] = deque()  # to be sent once there is a connection
        self._down = False  # the last try to connect failed

    async def connect(self) -> None:
        """Connect, and send what is owed.

        Raises:
            OSError: nothing listens there, or it does not speak HTTP/2.
        """
        load = self._driver.load
        self._connection = await connect(self, load.target, STREAM if load.stream else UNARY, load.metadata)
        self._connections = [one for one in self._connections if not one.closed.is_set()] + [self._connection]
        self._down = False
        for _ in range(len(self._owed)):
            self._send(self._owed.popleft())

    async def _reconnect(self) -> None:
        """As gRPC's clients do: what is asked meanwhile waits, but fails once a try to connect has failed."""
        while not self._driver.stopping and self._connection is None:
            try:
                await self.connect()
            except OSError:
                self._down = True
                if self._driver.load.rate is not None:
                    self.give_up()
                await asyncio.sleep(0.05)

    def give_up(self) -> None:
        """What waits for a connection has failed."""
        while self._owed:
            self._driver.record(CONNECTION_LOST, self._owed.popleft()[0])

    def gather(self) -> None:
        """Requests go out together, with `flush`."""
        if self._connection:
            self._connection.gather()

    def flush(self) -> None:
        """Send what was gathered."""
        if self._connection:
            self._connection.flush()

    def issue(self) -> None:
        """Send the next request."""
        driver = self._driver
        index = self._turn % len(driver.bodies)
        self._turn += 1
        driver.pending += 1
        self._send((perf_counter(), index))

    def _send(self, request: _Request) -> None:
        driver, connection = self._driver, self._connection
        if connection is None:
            if driver.stopping or (self._down and driver.load.rate is not None):
                driver.record(CONNECTION_LOST, request[0])
            else:  # a closed loop waits
                self._owed.append(request)
        elif not driver.load.stream:
            connection.call(driver.bodies[request[1]], request)
        else:
            if self._call is None:
                self._call = connection.open_stream(deque())
            self._call.tag.append(request)
            connection.send(self._call, driver.bodies[request[1]])

    def answered(self, call: Call, body: bytes) -> None:
        if call.tag:
            start, exchange = call.tag.popleft()
            self._driver.record(self._driver.judge(exchange, body), start)
            self._again()
        else:
            self._driver.record(Status("WRONG", "an answer that no request asked for"), perf_counter())

    def ended(self, call: Call, status: Status) -> None:
        if not call.streamed:
            start, exchange = call.tag
            if status is OK:
                status = self._driver.judge(exchange, call.body)
            if status is not UNPROCESSED or not self._try_again(call.tag):
                self._driver.record(status, start)
                self._again()
            return
        if call is self._call:
            self._call = None
        if status is OK:
            status = Status("STREAM_ENDED", "the stream ended before its requests were answered")
        for request in call.tag:
            if status is not UNPROCESSED or not self._try_again(request):
                self._driver.record(status, request[0])
                asyncio.get_running_loop().call_later(0.01, self._again)  # a stream that fails at once must not spin

    def _try_again(self, request: _Request) -> bool:
        """As gRPC's clients do with what the server has not looked at."""
        if perf_counter() - request[0] >= TRIED_S or self._driver.stopping:
            return False
        asyncio.get_running_loop().call_later(RETRY_S, self._send, request)
        return True

    def closing(self, connection: Connection) -> None:
        if connection is not self._connection:
            return
        if self._call:
            connection.finish(self._call)
        self._connection, self._call = None, None
        self._past[0] += connection.sent_bytes
        self._past[1] += connection.received_bytes
        if not self._driver.stopping:
            self._driver.spawn(self._reconnect())

    def bytes(self) -> Floats:
        """Sent and received."""
        now = self._connection
        return np.array(self._past, float) + ((now.sent_bytes, now.received_bytes) if now else (0, 0))

    async def close(self) -> None:
        """Once every answer is there, or no longer waited for."""
        for connection in self._connections:
            connection.close()
            await connection.closed.wait()

    def _again(self) -> None:
        if self._driver.load.rate is None and not self._driver.stopping:
            self.issue()


async def _until(when: float) -> None:
    """Wait until then, and never less: uvloop's timers are right to a millisecond."""
    while (left := when - perf_counter()) > 0:
        await asyncio.sleep(left)


class Driver:
    """Runs one load in this process."""

    def __init__(self, load: Load) -> None:
        self.load = load
        self.bodies = [message(exchange.request) for exchange in load.exchanges]
        self.stopping = False
        self._known: list[set[bytes]] = [set() for _ in load.exchanges]  # answers that were found right
        self._record = Record()
        self._begin = self._end = math.inf
        self.pending = 0
        self._idle = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()

    def spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def judge(self, index: int, body: bytes) -> Status:
        """The status of an answer that came without an error of gRPC's."""
        if body in self._known[index]:
            return OK
        try:
            status = self._examine(index, body)
        except Exception as error:  # not the message that it should be
            return Status("WRONG", str(error))
        if status is OK and len(self._known[index]) < _MOST_KNOWN:
            self._known[index].add(body)
        return status

    def _examine(self, index: int, body: bytes) -> Status:
        if len(body) < 5 or body[0] or len(body) != 5 + int.from_bytes(body[1:5], "big"):
            return Status("WRONG", f"{len(body)} bytes that are not one uncompressed message")
        answer = body[5:]
        if self.load.stream:
            streamed = pb.ModelStreamInferResponse.FromString(answer)
            if streamed.error_message:
                return Status("STREAM_ERROR", streamed.error_message)
            answer = streamed.infer_response.SerializeToString()
        return OK if self.load.exchanges[index].right(answer) else WRONG

    def record(self, status: Status, start: float) -> None:
        """Count an answer. Closed loop: those that end while it counts; open loop: those that were sent then."""
        now = perf_counter()
        self.pending -= 1
        when = now if self.load.rate is None else start
        if self._begin <= when < self._end:
            samples = self._record.samples.get(status.name)
            if samples is None:
                samples = self._record.samples[status.name] = array("d")
                if status.message:
                    self._record.messages[status.name] = status.message
            samples.append(now - start)
        if self.stopping and self.pending <= 0:
            self._idle.set()

    async def run(self, barrier: Barrier | None) -> Record:
        """Connect, warm up, count, and wait for the last answers.

        Raises:
            OSError: the target cannot be connected to.
        """
        lanes = [_Lane(self, n * len(self.bodies) // self.load.connections) for n in range(self.load.connections)]
        await asyncio.gather(*(lane.connect() for lane in lanes))
        if barrier:
            barrier.wait()
        gc.freeze()
        self._begin = perf_counter() + self.load.warmup_s
        self._end = self._begin + self.load.seconds
        if self.load.rate is None:
            for number in range(self.load.in_flight):
                lanes[number % len(lanes)].issue()
        else:
            self.spawn(self._send_when_due(lanes, self.load.rate))
        await _until(self._begin)
        before = self._meters(lanes)
        await _until(self._end)
        record = self._record
        moved = (self._meters(lanes) - before).tolist()
        record.sent_bytes, record.received_bytes, record.cpu_s, record.watched_cpu_s = moved
        self.stopping = True
        for lane in lanes:
            lane.give_up()
        if self.pending > 0:
            try:
                await asyncio.wait_for(self._idle.wait(), GRACE_S)
            except TimeoutError:
                record.samples[UNANSWERED.name] = array("d", [math.nan] * self.pending)
                record.messages[UNANSWERED.name] = UNANSWERED.message
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for lane in lanes:
            await lane.close()
        return record

    def _meters(self, lanes: list[_Lane]) -> Floats:
        """Bytes sent and received, CPU seconds of this process and of those watched."""
        sent, received = np.sum([lane.bytes() for lane in lanes], axis=0)
        return np.array([sent, received, time.process_time(), cpu_s(self.load.watch)])

    async def _send_when_due(self, lanes: list[_Lane], rate: float) -> None:
        start = perf_counter()
        count = 0
        while (now := perf_counter()) < self._end:
            due = int((now - start) * rate)
            for lane in lanes:
                lane.gather()
            while count < due:
                if now >= self._begin:
                    self._record.lags.append(now - start - (count + 1) / rate)
                lanes[count % len(lanes)].issue()
                count += 1
            for lane in lanes:
                lane.flush()
            await asyncio.sleep(0.001)
