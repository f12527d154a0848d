"""Everything that clients do to a server, for as long as you like, while its memory and open files are watched.

    python -m benchmarks.soak --repository exported --model mnist --seconds 600
    python -m benchmarks.soak --only "vanished clients" --seconds 60     # which part makes memory grow?

Unary and streamed tensors, raw and encoded pictures, requests that are wrong, clients that vanish, and reloads.
Every answer is judged: tensors must be right, wrong requests must be refused with the right status.
"""

from __future__ import annotations

import argparse
import asyncio
import io
import json
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from rich.console import Console
from rich.table import Table

from benchmarks import contenders
from benchmarks.calls import all_ready, ask, connect, new_loop
from benchmarks.driver import UNARY, Driver, Load
from benchmarks.exchanges import Exchange, infer_request, random_inputs
from benchmarks.headers import Status
from benchmarks.http2 import Call, Connection, message
from benchmarks.load import learn
from benchmarks.machine import describe
from benchmarks.processes import started
from benchmarks.sampling import Sampler, memory_slope, more_open_files
from protos import open_inference as pb
from serving.bundle import newest, open_bundle
from serving.client import AsyncClient
from serving.errors import BundleError, ParityserveError
from serving.images import Polarity

IN_FLIGHT = 8  # of each of the two loads of tensors
RELOAD_S = 5.0
VANISH_S = 0.05  # between two clients that vanish, each with as many calls unanswered as there are exchanges
MOST_MORE_FILES = 2  # that may be open at the end
WARMUP = 0.25  # of the time; the allocators' pools fill up


@dataclass
class Mix:
    """What is done to one server, and what came of it."""

    target: str
    model: str
    exchanges: tuple[Exchange, ...]
    until: float  # `time.perf_counter()`
    done: Counter[str]
    problems: Counter[str]

    async def run(self, parts: Sequence[str]) -> None:
        """These of `PARTS` at once, until the time is over."""
        await asyncio.gather(*(PARTS[part](self, part) for part in parts))

    async def tensors(self, name: str, stream: bool) -> None:
        """Single images, `IN_FLIGHT` at a time; the answers must be the right ones."""
        seconds = self.until - time.perf_counter()
        load = Load(
            self.target, self.exchanges, in_flight=IN_FLIGHT, stream=stream, connections=2, seconds=seconds, warmup_s=0
        )
        record = await Driver(load).run(None)
        for status, samples in record.samples.items():
            if status == "OK":
                self.done[name] += len(samples)
            else:
                self.problems[f"{name}: {status}"] += len(samples)

    async def again(self, name: str, act: Callable[[], Awaitable[None]], pause_s: float) -> None:
        """The same until the time is over; what goes wrong is noted."""
        while time.perf_counter() < self.until:
            try:
                await act()
                self.done[name] += 1
            except (OSError, ValueError, ParityserveError) as error:
                self.problems[f"{name}: {error}"] += 1
            await asyncio.sleep(min(pause_s, max(0.0, self.until - time.perf_counter())))

    def pictures(self, encoded: bool) -> Callable[[], Awaitable[None]]:
        """Two pictures a request, over a new connection every time."""
        noise = np.random.default_rng(0).integers(0, 256, (2, 28, 28), np.uint8)
        files = [_png(Image.fromarray(picture).resize((200, 150))) for picture in noise]

        async def act() -> None:
            async with AsyncClient(self.target) as client:
                result = await client.predict(files if encoded else noise, self.model, polarity=Polarity.LIGHT_ON_DARK)
            if len(result.predictions) != len(noise):
                raise ValueError(f"got {len(result.predictions)} predictions for {len(noise)} pictures")

        return act

    async def wrong(self) -> None:
        """Three requests that must be refused, each with its status."""
        request = pb.ModelInferRequest.FromString(self.exchanges[0].request)
        request.raw_input_contents[0] = request.raw_input_contents[0][:-1]
        for body, status in (
            (b"\xff" * 100, "INVALID_ARGUMENT"),
            (request.SerializeToString(), "INVALID_ARGUMENT"),
            (pb.ModelInferRequest(model_name="no-such-model").SerializeToString(), "NOT_FOUND"),
        ):
            try:
                await ask(self.target, UNARY, body)
            except ValueError as error:
                if status not in str(error):
                    raise
            else:
                raise ValueError(f"a wrong request was answered, want {status}")

    async def vanish(self) -> None:
        """Leave one request unfinished and others unanswered."""
        connection = await connect(_Nobody(), self.target, UNARY)
        for exchange in self.exchanges:
            connection.call(message(exchange.request))
        connection.send(connection.open_stream(), message(self.exchanges[0].request)[:-1])
        await asyncio.sleep(0)  # some of it leaves
        connection.abort()

    async def reload(self) -> None:
        """Load the versions that are served once more."""
        request = pb.RepositoryModelLoadRequest(model_name=self.model).SerializeToString()
        await ask(self.target, pb.RPCS["RepositoryModelLoad"].path, request)


PARTS: dict[str, Callable[[Mix, str], Awaitable[None]]] = {
    "unary tensors": lambda mix, name: mix.tensors(name, stream=False),
    "streamed tensors": lambda mix, name: mix.tensors(name, stream=True),
    "raw pictures": lambda mix, name: mix.again(name, mix.pictures(encoded=False), pause_s=0.01),
    "encoded pictures": lambda mix, name: mix.again(name, mix.pictures(encoded=True), pause_s=0.01),
    "wrong requests": lambda mix, name: mix.again(name, mix.wrong, pause_s=0.02),
    "vanished clients": lambda mix, name: mix.again(name, mix.vanish, VANISH_S),
    "reloads": lambda mix, name: mix.again(name, mix.reload, min(RELOAD_S, (mix.until - time.perf_counter()) / 4)),
}


class _Nobody:
    """Does not listen."""

    def answered(self, call: Call, body: bytes) -> None: ...

    def ended(self, call: Call, status: Status) -> None: ...

    def closing(self, connection: Connection) -> None: ...


def _png(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


def main(arguments: list[str] | None = None) -> int:
    """Run, print figures and a verdict; 1 when memory or files grow, or an answer was not what it should be."""
    options = _parser().parse_args(arguments)
    console = Console(highlight=False)
    try:
        specs = open_bundle(newest(options.repository / options.model)).manifest.inputs
        extra = ["--model-control", "explicit", *options.serve_option]
        server = contenders.ours(options.repository, options.model, extra)
        first = infer_request(options.model, specs, random_inputs(specs, 1, seed=0))
        with started(server.command, server.port, UNARY, first) as running:
            asyncio.run(all_ready(running.target))
            exchanges = asyncio.run(learn(running.target, options.model, images=1))
            until = time.perf_counter() + options.seconds
            mix = Mix(running.target, options.model, exchanges, until, Counter(), Counter())
            with (
                Sampler(running.pid, every_s=min(1.0, options.seconds / 60)) as sampler,
                asyncio.Runner(loop_factory=new_loop) as runner,
            ):
                runner.run(mix.run(options.only or list(PARTS)))
    except BundleError as error:
        print(f"error: {error} (`make demo` gets the data, trains and exports)", file=sys.stderr)
        return 2
    except (OSError, ValueError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    settled = sampler.after(options.seconds * WARMUP)
    slope, files = memory_slope(settled), more_open_files(settled)
    checks = {
        f"memory grows < {options.most_mb_per_min:g} MB a minute": (f"{slope:+.2f}", slope < options.most_mb_per_min),
        f"at most {MOST_MORE_FILES} more open files": (f"{files:+d}", files <= MOST_MORE_FILES),
        "every answer is what it should be": (f"{sum(mix.problems.values())} are not", not mix.problems),
    }
    table = Table("what", "times")
    for what, count in sorted(mix.done.items()):
        table.add_row(what, f"{count:,}")
    console.print(table)
    for problem, count in mix.problems.items():
        console.print(f"{count:,} times: {problem}", style="red", markup=False)
    console.print(
        f"memory {sampler.samples[0].rss_mb:.0f} MB at first, {settled[0].rss_mb:.0f} MB after "
        f"{settled[0].at_s:.0f} s, {settled[-1].rss_mb:.0f} MB at the end"
    )
    for demand, (measured, passed) in checks.items():
        console.print(f"{demand}: {measured}: {'met' if passed else '[red]NOT MET'}")
    if options.json:
        report = {"machine": describe(), "done": mix.done, "problems": mix.problems, "mb_per_min": slope}
        report |= {"more_open_files": files, "samples": [sample._asdict() for sample in sampler.samples]}
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return 0 if all(passed for _, passed in checks.values()) else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.soak", description=__doc__.splitlines()[0])
    parser.add_argument("--repository", type=Path, default=Path("exported"), help="(default: exported)")
    parser.add_argument("--model", default="mnist", help="(default: mnist)")
    parser.add_argument("--seconds", type=float, default=600.0, metavar="S", help="(default: 600)")
    parser.add_argument("--only", action="append", choices=PARTS, metavar="PART", help=f"of: {', '.join(PARTS)}")
    parser.add_argument("--most-mb-per-min", type=float, default=1.0, metavar="MB", help="of memory (default: 1)")
    parser.add_argument("--serve-option", action="append", default=[], metavar="--X=Y", help="passed on to the server")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the figures there too")
    return parser


if __name__ == "__main__":
    sys.exit(main())
