"""Checks of the `classification` parameter: the best classes of an output in place of its scores."""

from __future__ import annotations

import math
import re

import grpc

from protos import open_inference as pb
from serving.conformance.probe import Probe
from serving.conformance.refusals import INVALID_ARGUMENT, still_answers
from serving.conformance.rules import Check, Group, NotOffered, Refused, Skipped, expect, refused
from serving.tensors import Array, shape_text

_CLASS = re.compile(rb"(?P<score>[^:]+):(?P<index>\d+)(:(?P<label>.*))?", re.DOTALL)


def _scores(probe: Probe) -> tuple[str, Array]:
    """The first output that can be ranked and has no more than a thousand elements."""
    for name, array in probe.answer.items():
        if array.dtype.kind in "iuf" and array.dtype.itemsize != 2 and 0 < array.size <= 1000:
            return name, array
    raise Skipped("no output has scores: numbers, at most a thousand of them")


def _request(probe: Probe, name: str, count: int) -> pb.ModelInferRequest:
    request = probe.request()
    request.outputs.add(name=name).parameters["classification"].int64_param = count
    return request


def _classes(probe: Probe, name: str, count: int) -> Array:
    """The output as classes.

    Raises:
        NotOffered: the server ignores the parameter or refuses it.
    """
    try:
        response = probe.infer(_request(probe, name, count))
    except Refused as error:
        if error.code is grpc.StatusCode.UNIMPLEMENTED:
            raise
        raise NotOffered(f"classification is refused ({error})") from error
    if response.outputs[0].datatype != "BYTES":
        raise NotOffered(f"classification is ignored: '{name}' comes as {response.outputs[0].datatype}")
    return probe.outputs(response)[name]


def strings(probe: Probe) -> None:
    """`value:index[:label]`, the value being the score at that index."""
    name, scores = _scores(probe)
    for element in _classes(probe, name, scores.size).ravel().tolist():
        match = _CLASS.fullmatch(element)
        expect(match is not None, "'value:index' or 'value:index:label'", element)
        assert match is not None
        index = int(match["index"])
        expect(index < scores.size, f"an index below {scores.size}", element)
        score = float(scores.ravel()[index])
        close = math.isclose(float(match["score"]), score, rel_tol=1e-3, abs_tol=1e-5)
        expect(close or math.isnan(score), f"the score at index {index}, {score:f}", element)


def shape(probe: Probe) -> None:
    """`[rows, k]`, or `[k]` where the model has no rows, and never more classes than there are."""
    name, scores = _scores(probe)
    for count in (1, scores.size, scores.size + 5):
        got = _classes(probe, name, count).shape
        classes = min(count, scores.size)
        wanted = f"{shape_text((1, classes))} or {shape_text((classes,))} for {count} classes of {scores.size}"
        expect(got in ((1, classes), (classes,)), wanted, shape_text(got))


def order(probe: Probe) -> None:
    """Highest first; a single class is the highest of all."""
    name, scores = _scores(probe)
    values = [float(element.split(b":")[0]) for element in _classes(probe, name, scores.size).ravel().tolist()]
    expect(values == sorted(values, reverse=True), "the highest first", values)
    indexes = [int(element.split(b":")[1]) for element in _classes(probe, name, scores.size).ravel().tolist()]
    expect(sorted(indexes) == list(range(scores.size)), "each index once", indexes)


def wrong_type(probe: Probe) -> None:
    """As text, or less than one."""
    name, _ = _scores(probe)
    _classes(probe, name, 1)
    text = probe.request()
    text.outputs.add(name=name).parameters["classification"].string_param = "1"
    refused(lambda: probe.infer(text), INVALID_ARGUMENT)
    refused(lambda: probe.infer(_request(probe, name, 0)), INVALID_ARGUMENT)
    still_answers(probe)


_RULE = "Triton, Classification extension"

CHECKS = [
    Check("classification.strings", Group.EXTENSION, f"{_RULE}: value:index[:label]", strings, "classification"),
    Check("classification.shape", Group.EXTENSION, f"{_RULE}: shape", shape, "classification"),
    Check("classification.order", Group.EXTENSION, f"{_RULE}: the n highest", order, "classification"),
    Check("classification.wrong-type", Group.EXTENSION, f"{_RULE}: int64_param", wrong_type, "classification"),
]
