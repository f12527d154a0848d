"""Every check, run in order against one server."""

from __future__ import annotations

import time

import grpc

from serving.conformance import (
    basics,
    classification,
    configuration,
    inference,
    metadata,
    refusals,
    repository,
    settings,
    statistics,
    streaming,
)
from serving.conformance.probe import CHANNEL_OPTIONS, CONNECT_S, Probe
from serving.conformance.report import Report, Result, Verdict
from serving.conformance.rules import Check, Group, NotOffered, Refused, Skipped, Violation

# What changes nothing comes first, and what might bring a weak server down last.
CHECKS: list[Check] = [
    *metadata.CHECKS,
    *inference.CHECKS,
    *streaming.CHECKS,
    *configuration.CHECKS,
    *statistics.CHECKS,
    *repository.CHECKS,
    *classification.CHECKS,
    *settings.CHECKS,
    *basics.CHECKS,
    *refusals.CHECKS,
]

_OPTIONAL = {Group.EXTENSION, Group.GRPC}  # whose RPCs a server may leave out


def run(target: str, model: str = "") -> Report:
    """Check the server at `target`, host:port, with one of its models.

    Args:
        target: the server.
        model: its name; the first that is ready, by the server's index, when empty.

    Raises:
        ValueError: nothing answers at `target`, the model is unknown, or none can be chosen.
    """
    with grpc.insecure_channel(target, CHANNEL_OPTIONS) as channel:
        try:
            grpc.channel_ready_future(channel).result(timeout=CONNECT_S)
        except grpc.FutureTimeoutError as error:
            raise ValueError(f"{target}: no gRPC server answers in plain text there, within {CONNECT_S:g} s") from error
        probe = Probe(channel, model)
        results = [_judge(check, probe) for check in CHECKS]
    return Report(
        target=target,
        server=f"{probe.server.name} {probe.server.version}".strip(),
        extensions=list(probe.server.extensions),
        model=probe.model,
        version=probe.version,
        results=results,
    )


def _judge(check: Check, probe: Probe) -> Result:
    listed = check.extension in probe.extensions
    started = time.perf_counter()

    def result(verdict: Verdict, wanted: str = "", got: str = "", reason: str = "") -> Result:
        return Result(check.id, check.group, check.rule, verdict, wanted, got, reason, time.perf_counter() - started)

    try:
        check.run(probe)
    except Violation as violation:
        return result(Verdict.VIOLATION, violation.wanted, violation.got)
    except Skipped as skipped:
        return result(Verdict.SKIPPED, reason=str(skipped))
    except (Refused, NotOffered) as error:
        missing = isinstance(error, NotOffered) or error.code is grpc.StatusCode.UNIMPLEMENTED
        if missing and check.group in _OPTIONAL and not listed:
            return result(Verdict.NOT_OFFERED, reason=str(error))
        listing = f": ServerMetadata.extensions lists {check.extension}" if listed else ""
        return result(Verdict.VIOLATION, f"an answer{listing}", str(error))
    return result(Verdict.PASS)
