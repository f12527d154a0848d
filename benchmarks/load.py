"""A load generator for gRPC that costs a fraction of what a server does, so that the server is what is measured.

    python -m benchmarks.load --target 127.0.0.1:8001 --images 1 --in-flight 32 --seconds 5 [--stream] [--rate R]

Closed loop: so many requests are in flight, and each answer sends the next. Open loop (`--rate`): requests leave when
they are due, whatever the answers do. Every answer is compared with what the server answered to the same request when
it was asked alone; one that differs is WRONG, and no success.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import math
import multiprocessing
import sys
import time
from array import array
from collections import deque
from dataclasses import asdict, dataclass, field, replace
from multiprocessing.synchronize import Barrier
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

from benchmarks.http2 import CONNECTION_LOST, Call, Connection, Status, connect, message
from benchmarks.requests import Exchange, random_requests
from protos import open_inference as pb

UNARY, STREAM = (pb.RPCS[name].path for name in ("ModelInfer", "ModelStreamInfer"))
GRACE_S = 10.0  # how long answers are waited for when the time is over
_MOST_KNOWN = 1000  # answers to one request that are remembered as right

OK = Status("OK")
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


@dataclass(frozen=True)
class Latency:
    """From the sending of a request to the end of its answer, milliseconds; not-a-number where there was none."""

    mean: float = math.nan
    p50: float = math.nan
    p90: float = math.nan
    p99: float = math.nan
    p999: float = math.nan
    max: float = math.nan

    @classmethod
    def of(cls, seconds: np.ndarray) -> Latency:
        """The summary of many."""
        if not len(seconds):
            return cls()
        ms = seconds * 1e3
        p50, p90, p99, p999 = (float(p) for p in np.percentile(ms, [50, 90, 99, 99.9]))
        return cls(float(ms.mean()), p50, p90, p99, p999, float(ms.max()))


@dataclass(frozen=True)
class Result:
    """What came of a load, in the seconds that count."""

    requests_per_s: float  # answered OK, and rightly
    images_per_s: float
    ok: Latency
    refused: Latency  # of everything else that was answered
    statuses: dict[str, int]  # answers by status; WRONG, UNANSWERED, STREAM_ERROR and CONNECTION_LOST are among them
    messages: dict[str, str]  # an example of each status's text
    sent_bytes: int
    received_bytes: int
    cpu_s: float  # of the load generator
    lag_p99_ms: float  # open loop: how much later than due requests were sent; not-a-number otherwise

    @property
    def failed(self) -> int:
        """Answers that were not OK."""
        return sum(self.statuses.values()) - self.statuses.get("OK", 0)


@dataclass
class _Record:
    """What one process counted."""

    samples: dict[str, array[float]] = field(default_factory=dict)  # seconds, by status
    messages: dict[str, str] = field(default_factory=dict)
    lags: array[float] = field(default_factory=lambda: array("d"))
    sent_bytes: int = 0
    received_bytes: int = 0
    cpu_s: float = 0.0


class _Lane:
    """One connection, made anew whenever it ends, and the requests that go over it."""

    def __init__(self, driver: _Driver, first: int) -> None:
        self._driver = driver
        self._turn = first
        self._connection: Connection | None = None
        self._past = [0, 0]  # bytes sent and received on earlier connections
        self._call: Call | None = None  # the stream; its tag has the start and exchange of each unanswered request
        self._owed = 0  # requests to send once there is a connection

    async def connect(self) -> None:
        """Connect, and send what is owed.

        Raises:
            OSError: nothing listens there, or it does not speak HTTP/2.
        """
        load = self._driver.load
        self._connection = await connect(self, load.target, STREAM if load.stream else UNARY, load.metadata)
        while self._owed and not self._driver.stopping:
            self._owed -= 1
            self.issue()

    async def _reconnect(self) -> None:
        while not self._driver.stopping and self._connection is None:
            try:
                await self.connect()
            except OSError:
                await asyncio.sleep(0.05)

    def issue(self) -> None:
        """Send the next request."""
        driver, connection = self._driver, self._connection
        if connection is None:
            if driver.load.rate is None:
                self._owed += 1
            else:
                driver.sent()
                driver.record(CONNECTION_LOST, perf_counter())
            return
        index = self._turn % len(driver.bodies)
        self._turn += 1
        driver.sent()
        if not driver.load.stream:
            connection.call(driver.bodies[index], index)
            return
        if self._call is None:
            self._call = connection.open_stream(deque())
        self._call.tag.append((perf_counter(), index))
        connection.send(self._call, driver.bodies[index])

    def answered(self, call: Call, body: bytes) -> None:
        if call.tag:
            start, index = call.tag.popleft()
            self._driver.record(self._driver.judge(index, body), start)
            self._again()
        else:
            self._driver.record(Status("WRONG", "an answer that no request asked for"), perf_counter())

    def ended(self, call: Call, status: Status) -> None:
        if not call.streamed:
            if status.name == "OK":
                status = self._driver.judge(call.tag, call.body)
            self._driver.record(status, call.started)
            self._again()
            return
        if call is self._call:
            self._call = None
        if status.name == "OK":
            status = Status("STREAM_ENDED", "the stream ended before its requests were answered")
        for start, _ in call.tag:
            self._driver.record(status, start)
            asyncio.get_running_loop().call_later(0.01, self._again)  # a stream that fails at once must not spin

    def closing(self, connection: Connection) -> None:
        if connection is not self._connection:
            return
        self._connection, self._call = None, None
        self._past[0] += connection.sent_bytes
        self._past[1] += connection.received_bytes
        if not self._driver.stopping:
            self._driver.spawn(self._reconnect())

    def bytes(self) -> np.ndarray:
        """Sent and received."""
        now = self._connection
        return np.array(self._past) + ((now.sent_bytes, now.received_bytes) if now else (0, 0))

    def close(self) -> None:
        if self._connection:
            self._connection.close()

    def _again(self) -> None:
        if self._driver.load.rate is None and not self._driver.stopping:
            self.issue()


class _Driver:
    """Runs one load in this process."""

    def __init__(self, load: Load) -> None:
        self.load = load
        self.bodies = [message(exchange.request) for exchange in load.exchanges]
        self.stopping = False
        self._known: list[set[bytes]] = [set() for _ in load.exchanges]  # answers that were found right
        self._record = _Record()
        self._begin = self._end = math.inf
        self._pending = 0
        self._idle = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()

    def spawn(self, work: Any) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def sent(self) -> None:
        self._pending += 1

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
        self._pending -= 1
        when = now if self.load.rate is None else start
        if self._begin <= when < self._end:
            self._record.samples.setdefault(status.name, array("d")).append(now - start)
            if status.message:
                self._record.messages.setdefault(status.name, status.message)
        if self.stopping and self._pending <= 0:
            self._idle.set()

    async def run(self, barrier: Barrier | None) -> _Record:
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
        await asyncio.sleep(self._begin - perf_counter())
        bytes_before, cpu_before = np.sum([lane.bytes() for lane in lanes], axis=0), time.process_time()
        await asyncio.sleep(self._end - perf_counter())
        self._record.cpu_s = time.process_time() - cpu_before
        moved = np.sum([lane.bytes() for lane in lanes], axis=0) - bytes_before
        self._record.sent_bytes, self._record.received_bytes = (int(count) for count in moved)
        self.stopping = True
        if self._pending > 0:
            try:
                await asyncio.wait_for(self._idle.wait(), GRACE_S)
            except TimeoutError:
                self._record.samples[UNANSWERED.name] = array("d", [math.nan] * self._pending)
                self._record.messages[UNANSWERED.name] = UNANSWERED.message
        for lane in lanes:
            lane.close()
        await asyncio.sleep(0)  # the sockets close
        return self._record

    async def _send_when_due(self, lanes: list[_Lane], rate: float) -> None:
        start = perf_counter()
        count = 0
        while (now := perf_counter()) < self._end:
            due = int((now - start) * rate)
            while count < due:
                if now >= self._begin:
                    self._record.lags.append(now - start - (count + 1) / rate)
                lanes[count % len(lanes)].issue()
                count += 1
            await asyncio.sleep(0.001)


def run_load(load: Load, processes: int = 1) -> Result:
    """Run a load, from this process or from `processes` others that share it.

    Raises:
        OSError: the target cannot be connected to.
    """
    if processes == 1:
        return _result(load, [_run(load)])
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(processes)
    shares = [
        replace(
            load,
            in_flight=load.in_flight // processes + (number < load.in_flight % processes),
            rate=load.rate and load.rate / processes,
            connections=max(1, load.connections // processes),
        )
        for number in range(processes)
    ]
    with context.Pool(processes, _share, (barrier,)) as pool:
        return _result(load, pool.map(_run, shares, chunksize=1))


_barrier: Barrier | None = None


def _share(barrier: Barrier) -> None:
    global _barrier
    _barrier = barrier


def _run(load: Load) -> _Record:
    with asyncio.Runner(loop_factory=_loop) as runner:
        return runner.run(_Driver(load).run(_barrier))


def _loop() -> asyncio.AbstractEventLoop:
    try:
        import uvloop
    except ImportError:  # it is not made for every platform
        return asyncio.new_event_loop()
    return uvloop.new_event_loop()


def _result(load: Load, records: list[_Record]) -> Result:
    names = sorted({name for record in records for name in record.samples})
    samples = {
        name: np.concatenate([np.array(r.samples[name]) for r in records if name in r.samples]) for name in names
    }
    answered = [sample for name, sample in samples.items() if name not in (OK.name, UNANSWERED.name)]
    lags = np.concatenate([np.array(record.lags) for record in records])
    rate = len(samples.get(OK.name, ())) / load.seconds
    return Result(
        requests_per_s=rate,
        images_per_s=rate * load.images,
        ok=Latency.of(samples.get(OK.name, np.array([]))),
        refused=Latency.of(np.concatenate(answered) if answered else np.array([])),
        statuses={name: len(sample) for name, sample in samples.items()},
        messages={name: text for record in records for name, text in record.messages.items()},
        sent_bytes=sum(record.sent_bytes for record in records),
        received_bytes=sum(record.received_bytes for record in records),
        cpu_s=sum(record.cpu_s for record in records),
        lag_p99_ms=float(np.percentile(lags, 99) * 1e3) if len(lags) else math.nan,
    )


async def ask(target: str, path: str, request: bytes) -> bytes:
    """One unary call by itself.

    Raises:
        OSError: the target cannot be connected to.
        ValueError: the answer is an error of gRPC's; the text says which.
    """
    answer: asyncio.Future[tuple[Status, bytes]] = asyncio.get_running_loop().create_future()

    class One:
        def answered(self, call: Call, body: bytes) -> None: ...

        def ended(self, call: Call, status: Status) -> None:
            if not answer.done():
                answer.set_result((status, call.body[5:]))

        def closing(self, connection: Connection) -> None: ...

    connection = await connect(One(), target, path)
    connection.call(message(request))
    status, body = await answer
    connection.close()
    if status.name != "OK":
        raise ValueError(f"{target}: {path}: {status.name}: {status.message}")
    return body


async def learn(target: str, model: str, images: int, count: int = 8) -> tuple[Exchange, ...]:
    """Random requests for a model, and what the server answers to each when it is asked alone.

    Raises:
        OSError: the target cannot be connected to.
        ValueError: the server refuses a request; the text says why.
    """
    described = await ask(
        target, pb.RPCS["ModelMetadata"].path, pb.ModelMetadataRequest(name=model).SerializeToString()
    )
    metadata = pb.ModelMetadataResponse.FromString(described)
    exchanges = []
    for request in random_requests(metadata, images, count):
        answer = pb.ModelInferResponse.FromString(await ask(target, UNARY, request))
        exchanges.append(Exchange(request, answer.raw_output_contents[0], answer.outputs[0].datatype))
    return tuple(exchanges)


def main(arguments: list[str] | None = None) -> int:
    """Run one load and print a line; 1 when nothing was answered, or an answer was wrong."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.load", description=__doc__.splitlines()[0])
    parser.add_argument("--target", default="127.0.0.1:8001", metavar="HOST:PORT")
    parser.add_argument("--model", default="mnist")
    parser.add_argument("--images", type=int, default=1, metavar="N", help="in each request (default: 1)")
    parser.add_argument("--in-flight", type=int, default=32, metavar="N", help="requests (default: 32)")
    parser.add_argument("--connections", type=int, default=4, metavar="N", help="(default: 4)")
    parser.add_argument("--seconds", type=float, default=5.0, metavar="S", help="that count (default: 5)")
    parser.add_argument("--warmup", type=float, default=1.0, metavar="S", help="that do not (default: 1)")
    parser.add_argument("--stream", action="store_true", help="one stream a connection instead of a call a request")
    parser.add_argument("--rate", type=float, metavar="R", help="send R requests a second, whatever the answers do")
    parser.add_argument("--processes", type=int, default=1, metavar="N", help="that share the load (default: 1)")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the result there too")
    options = parser.parse_args(arguments)
    try:
        exchanges = asyncio.run(learn(options.target, options.model, options.images))
        load = Load(
            options.target,
            exchanges,
            images=options.images,
            in_flight=options.in_flight,
            rate=options.rate,
            stream=options.stream,
            connections=options.connections,
            seconds=options.seconds,
            warmup_s=options.warmup,
        )
        result = run_load(load, options.processes)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if options.json:
        options.json.write_text(json.dumps(asdict(result), indent=2) + "\n", encoding="utf-8")
    print(line(load, result))
    for status, text in result.messages.items():
        print(f"  {status}: {text}")
    return 1 if "WRONG" in result.statuses or "OK" not in result.statuses else 0


def line(load: Load, result: Result) -> str:
    """A result on one line."""
    offered = f"{load.in_flight} in flight" if load.rate is None else f"{load.rate:,.0f} requests/s offered"
    answers = sum(result.statuses.values())
    ok, refused = result.ok, result.refused
    parts = [
        f"{load.images} image{'s' * (load.images != 1)}, {offered}, {'stream' if load.stream else 'unary'}: "
        f"{result.requests_per_s:,.0f} requests/s, {result.images_per_s:,.0f} images/s",
        f"ms: mean {ok.mean:.2f} p50 {ok.p50:.2f} p90 {ok.p90:.2f} p99 {ok.p99:.2f} p99.9 {ok.p999:.2f}",
        ", ".join(f"{name} {count}" for name, count in result.statuses.items()),
        f"generator {result.cpu_s / max(answers, 1) * 1e6:.1f} us CPU a request",
    ]
    if result.failed:
        parts.append(f"not OK: p50 {refused.p50:.2f} p99 {refused.p99:.2f} ms")
    if load.rate is not None:
        parts.append(f"sent late by p99 {result.lag_p99_ms:.2f} ms")
    return "; ".join(parts)


if __name__ == "__main__":
    sys.exit(main())
