"""Checks of ModelStreamInfer: answers carry their ids, and errors end no stream. Answers may come in any order."""

from __future__ import annotations

from collections import Counter

from protos import open_inference as pb
from serving.conformance.metadata import UNKNOWN_MODEL
from serving.conformance.probe import Probe
from serving.conformance.rules import Check, Group, Violation, expect
from serving.conformance.samples import rows_of, same
from serving.tensors import Array

_IN_FLIGHT = 32


def _request(probe: Probe, identifier: str, arrays: dict[str, Array] | None = None) -> pb.ModelInferRequest:
    request = probe.request(arrays)
    request.id = identifier
    return request


def _by_id(answers: list[pb.ModelStreamInferResponse], wanted: list[str]) -> dict[str, pb.ModelStreamInferResponse]:
    """The answers by their ids, of which each must be there once."""
    got = Counter(answer.infer_response.id for answer in answers)
    missing = [identifier for identifier in wanted if got[identifier] != 1]
    expect(not missing and len(got) == len(wanted), f"one answer each for the ids {wanted}", dict(got))
    return {answer.infer_response.id: answer for answer in answers}


def _outputs(probe: Probe, answer: pb.ModelStreamInferResponse) -> dict[str, Array]:
    if answer.error_message:
        raise Violation("an answer to a valid request", f"error_message '{answer.error_message}'")
    return probe.outputs(answer.infer_response)


def one(probe: Probe) -> None:
    """One request, one answer, the same as ModelInfer's; then the stream ends with OK."""
    answers = probe.stream([_request(probe, "only")])
    expect(len(answers) == 1, "one answer to one request", len(answers))
    got = _outputs(probe, answers[0])
    identifier = answers[0].infer_response.id
    expect(identifier == "only", "id 'only'", f"'{identifier}'")
    expect(same(got, probe.answer), "ModelInfer's answer to the same request", "another")


def none(probe: Probe) -> None:
    answers = probe.stream([])
    expect(not answers, "no answer and OK from a stream without requests", f"{len(answers)} answers")


def many(probe: Probe) -> None:
    identifiers = [str(number) for number in range(_IN_FLIGHT)]
    answers = _by_id(probe.stream([_request(probe, identifier) for identifier in identifiers]), identifiers)
    for identifier, answer in answers.items():
        got = _outputs(probe, answer)
        expect(same(got, probe.answer), f"ModelInfer's answer to request {identifier}", "another")


def own_rows(probe: Probe) -> None:
    """Requests that differ, in flight together: each id has the answer to its own."""
    rows = {str(index): row for index, row in enumerate(rows_of(probe.rows(_IN_FLIGHT)))}
    wanted = {identifier: probe.ask(row) for identifier, row in rows.items()} if probe.answer else {}
    answers = _by_id(probe.stream([_request(probe, name, row) for name, row in rows.items()]), list(rows))
    for identifier, answer in answers.items():
        expect(same(_outputs(probe, answer), wanted[identifier]), f"the answer to request {identifier}", "another's")


def error(probe: Probe) -> None:
    bad = _request(probe, "bad")
    bad.model_name = UNKNOWN_MODEL
    sent = [_request(probe, "before"), bad, _request(probe, "after")]
    answers = _by_id(probe.stream(sent), ["before", "bad", "after"])
    expect(bool(answers["bad"].error_message), "an error_message for an unknown model", "none")
    tensors = len(answers["bad"].infer_response.outputs)
    expect(not tensors, "no outputs beside an error_message", f"{tensors} outputs")
    for identifier in ("before", "after"):
        expect(same(_outputs(probe, answers[identifier]), probe.answer), f"request {identifier} answered", "otherwise")


_RULE = "Triton, grpc_service.proto: ModelStreamInfer"

CHECKS = [
    Check("stream.one", Group.EXTENSION, _RULE, one),
    Check("stream.none", Group.EXTENSION, _RULE, none),
    Check("stream.many", Group.EXTENSION, f"{_RULE}, an answer for each request, with its id", many),
    Check("stream.own-rows", Group.EXTENSION, f"{_RULE}, an answer for each request, with its id", own_rows),
    Check("stream.error", Group.EXTENSION, f"{_RULE}, error_message; the stream goes on", error),
]
