"""Checks of ModelStatistics. They count: other clients of the model meanwhile would spoil them."""

from __future__ import annotations

import time

from protos import open_inference as pb
from serving.conformance.metadata import NOT_FOUND, UNKNOWN_MODEL
from serving.conformance.probe import Probe
from serving.conformance.refusals import INVALID_ARGUMENT
from serving.conformance.rules import Check, Group, Refused, Skipped, Violation, expect, refused
from serving.conformance.wrong_requests import too_many_bytes

_SETTLE_S = 2.0  # servers may count a request after it was answered
_PAUSE_S = 0.02


def _statistics(probe: Probe) -> pb.ModelStatistics:
    """Of the version that answers; of any where the answers do not tell."""
    answer: pb.ModelStatisticsResponse = probe.call("ModelStatistics", pb.ModelStatisticsRequest(name=probe.model))
    for entry in answer.model_stats:
        if entry.name == probe.model and probe.version in ("", entry.version):
            return entry
    got = [(entry.name, entry.version) for entry in answer.model_stats]
    raise Violation(f"an entry for '{probe.model}' version '{probe.version}'", got)


def _settled(probe: Probe, successes: int) -> pb.ModelStatistics:
    """The statistics when that many requests have succeeded, or when there was time enough for them to be counted."""
    end = time.monotonic() + _SETTLE_S
    while True:
        statistics = _statistics(probe)
        if statistics.inference_stats.success.count >= successes or time.monotonic() > end:
            return statistics
        time.sleep(_PAUSE_S)


def answer(probe: Probe) -> None:
    _statistics(probe)


def all_models(probe: Probe) -> None:
    everything: pb.ModelStatisticsResponse = probe.call("ModelStatistics", pb.ModelStatisticsRequest())
    names = sorted({entry.name for entry in everything.model_stats})
    expect(probe.model in names, f"'{probe.model}' among all models", names)


def unknown_model(probe: Probe) -> None:
    _statistics(probe)
    request = pb.ModelStatisticsRequest(name=UNKNOWN_MODEL)
    refused(lambda: probe.call("ModelStatistics", request), NOT_FOUND, INVALID_ARGUMENT)


def counts(probe: Probe) -> None:
    """Two requests of one row and, where the model batches, one of two rows, one after the other."""
    before = _statistics(probe)
    if probe.config is not None and probe.config.response_cache.enable:
        raise Skipped("answers from the response cache are not counted as runs")
    batches = probe.batches and probe.config is not None
    requests = [probe.request(), probe.request(), *([probe.request(probe.rows(2))] if batches else [])]
    for request in requests:
        probe.infer(request)
    after = _settled(probe, before.inference_stats.success.count + len(requests))
    rows = len(requests) + batches
    wanted = {"success.count": len(requests), "inference_count": rows, "execution_count": len(requests)}
    got = {
        "success.count": after.inference_stats.success.count - before.inference_stats.success.count,
        "inference_count": after.inference_count - before.inference_count,
        "execution_count": after.execution_count - before.execution_count,
    }
    expect(got == wanted, f"after {len(requests)} requests of {rows} rows together, increases {wanted}", got)


def refused_requests(probe: Probe) -> None:
    """A request that is refused is no success, and no run of the model."""
    before = _statistics(probe)
    try:
        probe.infer(too_many_bytes(probe))
    except Refused:
        probe.infer(probe.request())
    else:
        raise Skipped("this server accepts the wrong request that would be sent: see refuse.too-many-bytes")
    after = _settled(probe, before.inference_stats.success.count + 1)
    got = after.inference_stats.success.count - before.inference_stats.success.count
    expect(got == 1, "one success more after one request refused and one answered", got)
    runs = after.execution_count - before.execution_count
    expect(runs <= 1, "one run more after one request refused and one answered", runs)


def last_inference(probe: Probe) -> None:
    before = _statistics(probe)
    probe.infer(probe.request())
    after = _settled(probe, before.inference_stats.success.count + 1)
    # Milliseconds since 1970 lie between 2001 and 2286 when they have 13 digits; clocks of two machines may differ.
    expect(len(str(after.last_inference)) == 13, "milliseconds since 1970", after.last_inference)
    expect(after.last_inference >= before.last_inference, f"{before.last_inference} or later", after.last_inference)


def durations(probe: Probe) -> None:
    """Cumulative, and the parts of a request no longer together than the whole."""
    before = _statistics(probe)
    probe.infer(probe.request())
    after = _settled(probe, before.inference_stats.success.count + 1)
    stats = after.inference_stats
    for name in ("success", "queue", "compute_input", "compute_infer", "compute_output"):
        earlier, later = getattr(before.inference_stats, name), getattr(stats, name)
        expect(later.ns >= earlier.ns, f"{name}.ns of {earlier.ns} or more", later.ns)
    parts = stats.queue.ns + stats.compute_input.ns + stats.compute_infer.ns + stats.compute_output.ns
    whole = stats.success.ns
    expect(parts <= whole, f"queue, compute_input, compute_infer and compute_output within success.ns {whole}", parts)
    expect(whole > before.inference_stats.success.ns, "success.ns to grow with a request", "no growth")


def batches(probe: Probe) -> None:
    """The runs by batch size add up to all runs and all rows."""
    before = _statistics(probe)
    probe.infer(probe.request())
    statistics = _settled(probe, before.inference_stats.success.count + 1)
    runs = {entry.batch_size: entry.compute_infer.count for entry in statistics.batch_stats}
    expect(len(runs) == len(statistics.batch_stats), "one entry for each batch size", list(runs))
    expect(sum(runs.values()) == statistics.execution_count, f"{statistics.execution_count} runs together", runs)
    rows = sum(size * count for size, count in runs.items())
    expect(rows == statistics.inference_count, f"{statistics.inference_count} rows together", rows)


_RULE = "Triton, Statistics extension"

CHECKS = [
    Check(f"statistics.{name}", Group.EXTENSION, f"{_RULE}{section}", run, "statistics")
    for name, section, run in (
        ("answer", "", answer),
        ("all-models", ": name, if not given", all_models),
        ("unknown-model", "", unknown_model),
        ("counts", ": inference_count, execution_count, success", counts),
        ("refused", ": success", refused_requests),
        ("last-inference", ": last_inference", last_inference),
        ("durations", ": queue, compute_*, success", durations),
        ("batches", ": batch_stats", batches),
    )
]
