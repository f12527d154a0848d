"""What the server does when twice as much is asked of it as it can answer.

    python -m benchmarks.overload --repository exported --model mnist --seconds 60

Finds the most requests a second that it answers, then offers twice as many, whatever it answers, and finds the most
again. Accepted requests must keep a bounded latency, the others must be refused with RESOURCE_EXHAUSTED and quickly,
memory must stay flat, and as many requests must be answered as before and after: of both, so that a machine whose speed
drifts is not taken for a server that gives way.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks import contenders
from benchmarks.calls import all_ready
from benchmarks.driver import UNARY, Load
from benchmarks.exchanges import infer_request, random_inputs
from benchmarks.load import Result, learn, line, run_load
from benchmarks.machine import Stolen, describe
from benchmarks.processes import started
from benchmarks.sampling import Sampler, memory_slope
from benchmarks.work import work_of
from serving.bundle import newest, open_bundle
from serving.errors import BundleError

PEAK_ROUNDS = 3
REFUSED_P99_MS = 10.0
LEAST_OF_PEAK = 0.9
MOST_GROWTH_MB = 5.0
LEAST_OFFERED = 0.95  # of what should have been


@dataclass(frozen=True)
class Check:
    """One demand, and whether it is met."""

    demand: str
    measured: str
    passed: bool


def main(arguments: list[str] | None = None) -> int:
    """Measure, print figures and a verdict; 1 when a demand is not met."""
    options = _parser().parse_args(arguments)
    console = Console(highlight=False)
    try:
        specs = open_bundle(newest(options.repository / options.model)).manifest.inputs
        extra = ["--max-queue", str(options.max_queue), "--workers", str(options.workers), *options.serve_option]
        server = contenders.ours(options.repository, options.model, extra)
        first = infer_request(options.model, specs, random_inputs(specs, 1, seed=0))
        with started(server.command, server.port, UNARY, first) as running:
            asyncio.run(all_ready(running.target))
            load = Load(
                running.target,
                asyncio.run(learn(running.target, options.model, options.images)),
                images=options.images,
                in_flight=options.in_flight,
                connections=options.connections,
                seconds=options.peak_seconds,
                warmup_s=options.warmup,
            )
            stolen, work = Stolen(), [work_of(running.target, options.model)]
            peak = _peak(load, options.processes, console)
            stolen_at_peak, stolen = stolen.share(), Stolen()
            offered = Load(**{**vars(load), "rate": 2 * peak, "seconds": options.seconds})
            work.append(work_of(running.target, options.model))
            with Sampler(running.pid) as sampler:
                result = run_load(offered, options.processes)
            stolen_since = stolen.share()
            work.append(work_of(running.target, options.model))
            after = _peak(load, options.processes, console)
            work.append(work_of(running.target, options.model))
    except BundleError as error:
        print(f"error: {error} (`make demo` gets the data, trains and exports)", file=sys.stderr)
        return 2
    except (OSError, ValueError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    console.print(line(offered, result))
    for status, text in result.messages.items():
        console.print(f"  {status}: {text}", markup=False)
    console.print(f"the host kept {stolen_at_peak:.0%} of the CPU time at the peak, {stolen_since:.0%} since")
    us_per_image = [later.since(earlier).us_per_image for earlier, later in pairwise(work)]
    console.print(_speeds(us_per_image, [rate * options.images for rate in (peak, result.requests_per_s, after)]))
    settled = sampler.after(options.warmup + options.seconds / 3)
    growth = memory_slope(settled) * (settled[-1].at_s - settled[0].at_s) / 60
    bound_ms = options.most_ms or 2 * options.workers * options.max_queue / peak * 1e3
    checks = judge(result, peak, after, options.seconds, growth, bound_ms)
    table = Table("demand", "measured", "")
    for check in checks:
        table.add_row(check.demand, check.measured, "met" if check.passed else "[red]NOT MET")
    console.print(table)
    if options.json:
        report: dict[str, Any] = {"machine": describe(), "peak_requests_per_s": peak, **asdict(result)}
        report |= {"peak_after_requests_per_s": after}
        report |= {"stolen_at_peak": stolen_at_peak, "stolen_since": stolen_since}
        report |= {"model_us_per_image": dict(zip(("before", "meanwhile", "after"), us_per_image, strict=True))}
        report |= {"samples": sampler.samples, "checks": [asdict(check) for check in checks]}
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return 0 if all(check.passed for check in checks) else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.overload", description=__doc__.splitlines()[0])
    parser.add_argument("--repository", type=Path, default=Path("exported"), help="(default: exported)")
    parser.add_argument("--model", default="mnist", help="(default: mnist)")
    parser.add_argument("--images", type=int, default=8, metavar="N", help="in a request (default: 8)")
    parser.add_argument("--seconds", type=float, default=60.0, metavar="S", help="of overload (default: 60)")
    parser.add_argument("--peak-seconds", type=float, default=5.0, metavar="S", help="of each search (default: 5)")
    parser.add_argument("--warmup", type=float, default=2.0, metavar="S", help="before each (default: 2)")
    parser.add_argument("--in-flight", type=int, default=64, metavar="N", help="while the peak is sought (default: 64)")
    parser.add_argument("--connections", type=int, default=4, metavar="N", help="(default: 4)")
    parser.add_argument("--processes", type=int, default=1, metavar="N", help="of the load generator (default: 1)")
    parser.add_argument("--workers", type=int, default=1, metavar="N", help="of the server (default: 1)")
    parser.add_argument("--max-queue", type=int, default=128, metavar="N", help="of each of them (default: 128)")
    parser.add_argument(
        "--most-ms", type=float, metavar="MS", help="p99 of what is accepted (default: twice the time for full queues)"
    )
    parser.add_argument("--serve-option", action="append", default=[], metavar="--X=Y", help="passed on to the server")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the figures there too")
    return parser


def _peak(load: Load, processes: int, console: Console) -> float:
    """The most requests a second that are answered: the median of some rounds.

    Raises:
        ValueError: a request was not answered, or not rightly.
    """
    rates = []
    for _ in range(PEAK_ROUNDS):
        result = run_load(load, processes)
        console.print(line(load, result))
        if result.failed or not result.requests_per_s:
            raise ValueError(f"not every request was answered while the peak was sought: {result.statuses}")
        rates.append(result.requests_per_s)
    return statistics.median(rates)


def _speeds(us_per_image: Sequence[float], images_per_s: Sequence[float]) -> str:
    """What a machine whose speed drifts does to the model, and how much of the time the server let it compute."""
    times = ", ".join(f"{us:.0f}" for us in us_per_image)
    shares = ", ".join(f"{us * rate / 1e6:.0%}" for us, rate in zip(us_per_image, images_per_s, strict=True))
    return f"the model, at the peak before, meanwhile, at the peak after: {times} us an image, {shares} of the time"


def judge(result: Result, peak: float, after: float, seconds: float, growth_mb: float, bound_ms: float) -> list[Check]:
    """What is demanded of a server under twice its peak.

    Args:
        result: of the overload.
        peak: requests a second that it answered before; twice as many were offered.
        after: and afterwards.
        seconds: for how long it was overloaded.
        growth_mb: of its memory in the later part, 10^6 bytes.
        bound_ms: the most that the p99 of accepted requests may be.
    """
    offered = sum(result.statuses.values()) / seconds
    refused = result.statuses.get("RESOURCE_EXHAUSTED", 0)
    others = {status: count for status, count in result.statuses.items() if status not in ("OK", "RESOURCE_EXHAUSTED")}
    return [
        Check(
            f"twice the peak of {peak:,.0f} requests/s is offered",
            f"{offered:,.0f} requests/s, late by p99 {result.lag_p99_ms:.1f} ms",
            offered >= LEAST_OFFERED * 2 * peak,
        ),
        Check(f"p99 of accepted requests <= {bound_ms:.0f} ms", f"{result.ok.p99:.1f} ms", result.ok.p99 <= bound_ms),
        Check(
            "all others are refused with RESOURCE_EXHAUSTED",
            f"{refused} refused; otherwise {others or 'none'}",
            refused > 0 and not others,
        ),
        Check(
            f"p99 of refusals <= {REFUSED_P99_MS:g} ms",
            f"{result.refused.p99:.1f} ms",
            result.refused.p99 <= REFUSED_P99_MS,
        ),
        Check(f"memory grows <= {MOST_GROWTH_MB:g} MB", f"{growth_mb:+.1f} MB", growth_mb <= MOST_GROWTH_MB),
        Check(
            f"throughput >= {LEAST_OF_PEAK:.0%} of the peaks before and after, {peak:,.0f} and {after:,.0f}",
            f"{result.requests_per_s / ((peak + after) / 2):.1%}",
            result.requests_per_s >= LEAST_OF_PEAK * (peak + after) / 2,
        ),
    ]


if __name__ == "__main__":
    sys.exit(main())
