"""A load generator for gRPC that costs a fraction of what a server does, so that the server is what is measured.

    python -m benchmarks.load --target 127.0.0.1:8001 --images 1 --in-flight 32 --seconds 5 [--stream] [--rate R]

Closed loop: so many requests are in flight, and each answer sends the next. Open loop (`--rate`): requests leave when
they are due, whatever the answers do. Every answer is compared with what the server answered to the same request when
it was asked alone; one that differs is WRONG, and no success.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import multiprocessing
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from multiprocessing.synchronize import Barrier
from pathlib import Path

import numpy as np

from benchmarks.calls import ask, new_loop
from benchmarks.driver import UNANSWERED, UNARY, Driver, Floats, Load, Record
from benchmarks.exchanges import Exchange, infer_request, random_inputs
from benchmarks.headers import OK
from protos import open_inference as pb
from serving.tensors import TensorSpec
from serving.wire import decode_outputs


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
    def of(cls, seconds: Floats) -> Latency:
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
    watched_cpu_s: float  # of the processes that were watched
    lag_p99_ms: float  # open loop: how much later than due requests were sent; not-a-number otherwise

    @property
    def failed(self) -> int:
        """Answers that were not OK."""
        return sum(self.statuses.values()) - self.statuses.get("OK", 0)


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
            watch=load.watch if number == 0 else (),
        )
        for number in range(processes)
    ]
    with ProcessPoolExecutor(processes, context, _share, (barrier,)) as pool:
        return _result(load, list(pool.map(_run, shares)))


_barrier: Barrier | None = None


def _share(barrier: Barrier) -> None:
    global _barrier
    _barrier = barrier


def _run(load: Load) -> Record:
    with asyncio.Runner(loop_factory=new_loop) as runner:
        return runner.run(Driver(load).run(_barrier))


def _result(load: Load, records: list[Record]) -> Result:
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
        sent_bytes=int(sum(record.sent_bytes for record in records)),
        received_bytes=int(sum(record.received_bytes for record in records)),
        cpu_s=sum(record.cpu_s for record in records),
        watched_cpu_s=max(record.watched_cpu_s for record in records),
        lag_p99_ms=float(np.percentile(lags, 99) * 1e3) if len(lags) else math.nan,
    )


async def learn(target: str, model: str, images: int, count: int = 8) -> tuple[Exchange, ...]:
    """Random requests for a model, and what the server answers to each when it is asked alone.

    Raises:
        OSError: the target cannot be connected to.
        ValueError: the server refuses a request; the text says why.
    """
    about = await ask(target, pb.RPCS["ModelMetadata"].path, pb.ModelMetadataRequest(name=model).SerializeToString())
    specs = [
        TensorSpec(name=tensor.name, datatype=tensor.datatype, shape=tuple("any" if n < 0 else n for n in tensor.shape))
        for tensor in pb.ModelMetadataResponse.FromString(about).inputs
    ]
    exchanges = []
    for seed in range(count):
        request = infer_request(model, specs, random_inputs(specs, images, seed))
        answer = pb.ModelInferResponse.FromString(await ask(target, UNARY, request))
        exchanges.append(Exchange(request, decode_outputs(answer)))
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
