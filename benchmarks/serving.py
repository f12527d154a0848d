"""How fast the server is, beside what bounds it and beside its peers, measured in one run on one machine.

    python -m benchmarks.serving --repository exported --model mnist --json runs/serving.json [--peer mlserver]

The bound is a bare grpc.aio server that runs no model; for many images a request it is ONNX Runtime called in a loop.
Every server is started as its users start it and asked alike, over the same connections, with the same requests.
Rounds alternate between the servers, and each figure is the median of its rounds, so that drift of the machine cancels.
Every answer of a server that runs the model is compared with ONNX Runtime's own.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks import contenders, inprocess, peers
from benchmarks.contenders import BOUND, Contender
from benchmarks.driver import UNARY, Load
from benchmarks.exchanges import Exchange, infer_request, random_inputs
from benchmarks.load import Result, run_load
from benchmarks.machine import Stolen, describe
from benchmarks.processes import Started, cpu_s, rss_mb, started
from benchmarks.report import tables
from benchmarks.work import Work, work_of
from serving.bundle import Bundle, newest, open_bundle
from serving.errors import BundleError

DIFFERENT = 8  # requests of each size, sent in turn


@dataclass(frozen=True)
class Case:
    """What is asked of every server alike."""

    images: int  # in a request
    stream: bool
    in_flight: int  # requests


class Round:
    """One server's figures of one case in one round."""

    def __init__(self, result: Result, seconds: float, mean_batch: float | None) -> None:
        answers = max(sum(result.statuses.values()), 1)
        self.figures: dict[str, float | None] = {
            "requests_per_s": result.requests_per_s,
            "images_per_s": result.images_per_s,
            **{f"{name}_ms": None if math.isnan(value) else value for name, value in asdict(result.ok).items()},
            "cpu_us_per_request": result.watched_cpu_s / answers * 1e6,
            "generator_cpu_us_per_request": result.cpu_s / answers * 1e6,
            "generator_cpu_percent": result.cpu_s / seconds * 100,
            "mean_batch": mean_batch,
        }
        self.statuses = result.statuses
        self.messages = result.messages


def main(arguments: list[str] | None = None) -> int:
    """Measure, print a table and write JSON; 1 when an answer was not right or a server could not be measured."""
    options = _parser().parse_args(arguments)
    console = Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else 140)
    try:
        bundle = open_bundle(newest(options.repository / options.model))
        onnx = bundle.path / bundle.manifest.file_for("onnx")
        exchanges = {images: _exchanges(bundle, onnx, images) for images in options.images}
        report = _measure(options, bundle, onnx, exchanges, console)
    except BundleError as error:
        print(f"error: {error} (`make demo` gets the data, trains and exports)", file=sys.stderr)
        return 2
    except (peers.PeerError, RuntimeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for table in tables(report):
        console.print(table)
    wrong = {status: text for row in report["rows"] for status, text in row["messages"].items()}
    for status, text in wrong.items():
        console.print(f"{status}: {text}", style="red")
    return 1 if wrong else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serving", description=__doc__.splitlines()[0])
    parser.add_argument("--repository", type=Path, default=Path("exported"), help="(default: exported)")
    parser.add_argument("--model", default="mnist", help="(default: mnist)")
    parser.add_argument("--peer", action="append", default=[], choices=list(peers.PACKAGES), help="repeat for several")
    parser.add_argument(
        "--peer-python",
        default=sys.executable,
        metavar="PATH",
        help="makes the peers' environments (default: this one); PyTriton needs one that has a shared libpython",
    )
    parser.add_argument("--workers", metavar="N", help="passed on to our server")
    parser.add_argument("--serve-option", action="append", default=[], metavar="--X=Y", help="passed on to our server")
    parser.add_argument(
        "--also",
        action="append",
        default=[],
        metavar="NAME:OPTIONS",
        help="our server once more, with these options: 'one by one:--max-batch-size 1'",
    )
    parser.add_argument("--images", type=int, nargs="+", default=[1, 8, 64], metavar="N", help="in a request")
    parser.add_argument("--in-flight", type=int, nargs="+", default=[1, 8, 32, 128], metavar="N", help="requests")
    parser.add_argument("--mode", nargs="+", default=["unary", "stream"], choices=["unary", "stream"])
    parser.add_argument("--connections", type=int, default=4, metavar="N", help="(default: 4)")
    parser.add_argument("--processes", type=int, default=1, metavar="N", help="of the load generator (default: 1)")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="(default: 3)")
    parser.add_argument("--seconds", type=float, default=2.0, metavar="S", help="that count, each time (default: 2)")
    parser.add_argument("--warmup", type=float, default=0.5, metavar="S", help="before that (default: 0.5)")
    parser.add_argument("--idle", type=float, default=5.0, metavar="S", help="to watch idle servers (default: 5)")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the figures there, case by case")
    return parser


def _exchanges(bundle: Bundle, onnx: Path, images: int) -> tuple[Exchange, ...]:
    """Requests, with what ONNX Runtime answers to them here."""
    specs = bundle.manifest.inputs
    session = inprocess.open_model(onnx, threads=1)
    made = []
    for seed in range(DIFFERENT):
        inputs = random_inputs(specs, images, seed)
        made.append(Exchange(infer_request(bundle.manifest.model, specs, inputs), inprocess.answers(session, inputs)))
    return tuple(made)


def _measure(
    options: argparse.Namespace,
    bundle: Bundle,
    onnx: Path,
    exchanges: dict[int, tuple[Exchange, ...]],
    console: Console,
) -> dict[str, Any]:
    """Everything, as it is written to the JSON file."""
    about = {
        "machine": describe(),
        "options": {k: str(v) for k, v in vars(options).items()},
        "bundle": str(bundle.path),
    }
    report: dict[str, Any] = {**about, "servers": {}, "inprocess": [], "rows": []}
    stolen = Stolen()
    cases = [
        Case(images, mode == "stream", in_flight)
        for images in options.images
        for mode in options.mode
        for in_flight in options.in_flight
    ]
    with contextlib.ExitStack() as stack:
        servers: list[tuple[Contender, Started]] = []
        for contender in _contenders(options, bundle, onnx, stack):
            first = exchanges[options.images[0]][0].request
            server = stack.enter_context(started(contender.command, contender.port, UNARY, first, contender.env))
            servers.append((contender, server))
            report["servers"][contender.name] = _at_rest(contender, server, options.idle)
            console.print(f"{contender.name}: first answer after {server.ready_s:.2f} s")
        loops: dict[int, list[list[dict[str, Any]]]] = {images: [] for images in options.images}
        for number, case in enumerate(cases):
            loops[case.images].append(_inprocess(onnx, case.images, options.seconds / 2))
            rows = _case(case, servers, exchanges[case.images], options)
            report["inprocess"] = [_median(rounds) for each in loops.values() for rounds in zip(*each, strict=True)]
            report["rows"] += rows
            console.print(
                f"{number + 1} of {len(cases)}: {case}: "
                + ", ".join(f"{row['server']} {row['requests_per_s']:,.0f}" for row in rows)
                + " requests/s"
            )
            report["machine"]["CPU time kept by its host"] = f"{stolen.share():.0%}"
            _write(options.json, report)
        for contender, server in servers:
            report["servers"][contender.name]["rss_mb_after"] = rss_mb([server.pid])
    _write(options.json, report)
    return report


def _contenders(
    options: argparse.Namespace, bundle: Bundle, onnx: Path, stack: contextlib.ExitStack
) -> Iterator[Contender]:
    yield contenders.bound(bundle)
    extra = [*(["--workers", options.workers] if options.workers else []), *options.serve_option]
    yield contenders.ours(options.repository, options.model, extra)
    for also in options.also:
        name, _, more = also.partition(":")
        yield contenders.ours(options.repository, options.model, shlex.split(more), name)
    for name in options.peer:
        yield stack.enter_context(peers.peer(name, onnx, options.model, options.peer_python))


def _at_rest(contender: Contender, server: Started, seconds: float) -> dict[str, Any]:
    """What a server needs that is asked nothing."""
    time.sleep(seconds)  # one of its processes has answered; others may be starting
    before = cpu_s([server.pid])
    time.sleep(seconds)
    return {
        "command": " ".join(contender.command),
        **contender.about,
        "computes": contender.computes,
        "ready_s": server.ready_s,
        "idle_cpu_percent": (cpu_s([server.pid]) - before) / max(seconds, 1e-9) * 100,
        "rss_mb": rss_mb([server.pid]),
    }


def _inprocess(onnx: Path, images: int, seconds: float) -> list[dict[str, Any]]:
    """Once for each case, so that these figures are spread over the run as the servers' are."""
    command = [sys.executable, "-m", "benchmarks.inprocess", str(onnx), "--seconds", str(seconds)]
    done = subprocess.run([*command, "--images", str(images)], check=True, capture_output=True, text=True)
    figures: list[dict[str, Any]] = json.loads(done.stdout)
    return figures


def _case(
    case: Case, servers: list[tuple[Contender, Started]], exchanges: tuple[Exchange, ...], options: argparse.Namespace
) -> list[dict[str, Any]]:
    """Rounds of one case, the servers in turn; the order is turned round each time."""
    taking_part = [(contender, server) for contender, server in servers if contender.streams or not case.stream]
    rounds: dict[str, list[Round]] = {contender.name: [] for contender, _ in taking_part}
    for number in range(options.rounds):
        for contender, server in taking_part if number % 2 == 0 else taking_part[::-1]:
            load = Load(
                server.target,
                exchanges if contender.computes else tuple(Exchange(exchange.request) for exchange in exchanges),
                images=case.images,
                in_flight=case.in_flight,
                stream=case.stream,
                connections=options.connections,
                seconds=options.seconds,
                warmup_s=options.warmup,
                watch=(server.pid,),
            )
            before = _work(server, options.model)
            result = run_load(load, options.processes)
            after = _work(server, options.model)
            mean_batch = after.since(before).mean_batch if before and after else None
            rounds[contender.name].append(Round(result, options.seconds, mean_batch))
    rows = [_row(name, case, measured) for name, measured in rounds.items()]
    bounds = [row["requests_per_s"] for row in rows if row["server"] == BOUND]
    for row in rows:
        row["ratio_to_bound"] = row["requests_per_s"] / bounds[0] if bounds and bounds[0] else None
    return rows


def _work(server: Started, model: str) -> Work | None:
    """What the model has done so far; None where the server does not say."""
    try:
        return work_of(server.target, model)
    except ValueError:
        return None


def _row(name: str, case: Case, rounds: list[Round]) -> dict[str, Any]:
    statuses: dict[str, int] = {}
    for each in rounds:
        for status, count in each.statuses.items():
            statuses[status] = statuses.get(status, 0) + count
    return {
        "server": name,
        **asdict(case),
        **_median([each.figures for each in rounds]),
        "rounds": [each.figures["requests_per_s"] for each in rounds],
        "statuses": statuses,
        "messages": {status: text for each in rounds for status, text in each.messages.items()},
    }


def _median(rounds: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The median of each figure; None where it is missing in a round."""
    return {
        name: None if any(each[name] is None for each in rounds) else statistics.median(each[name] for each in rounds)
        for name in rounds[0]
    }


def _write(path: Path | None, report: dict[str, Any]) -> None:
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".part")
    unfinished.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    unfinished.replace(path)


if __name__ == "__main__":
    sys.exit(main())
