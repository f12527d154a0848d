"""Requests that are wrong, each a valid one changed in one way.

Raises, in all of them:
    Skipped: the model has nothing that could be wrong in this way, or no valid request is known.
"""

from __future__ import annotations

import numpy as np

from protos import open_inference as pb
from serving.conformance.metadata import UNKNOWN_MODEL, UNKNOWN_VERSION
from serving.conformance.probe import Probe
from serving.conformance.rules import Skipped
from serving.conformance.samples import with_typed_contents
from serving.tensors import DATATYPES, element_bytes
from serving.wire import CONTENTS_FIELD

Request = pb.ModelInferRequest

_NARROW = {"INT8", "INT16", "UINT8", "UINT16"}


# Names and versions


def unknown_model(probe: Probe) -> Request:
    request = probe.request()
    request.model_name = UNKNOWN_MODEL
    return request


def unknown_version(probe: Probe) -> Request:
    request = probe.request()
    request.model_version = UNKNOWN_VERSION
    return request


def malformed_version(probe: Probe) -> Request:
    request = probe.request()
    if not all(version.isdigit() for version in probe.metadata.versions or [""]):
        raise Skipped(f"ModelMetadata does not say that versions are numbers: {list(probe.metadata.versions)}")
    request.model_version = "one"
    return request


def empty_message(probe: Probe) -> Request:  # noqa: ARG001
    return Request()


def no_inputs(probe: Probe) -> Request:
    return Request(model_name=probe.model) if probe.sample else Request()


def missing_input(probe: Probe) -> Request:
    request = probe.request()
    if len(request.inputs) < 2:
        raise Skipped("the model has one input")
    del request.inputs[-1], request.raw_input_contents[-1]
    return request


def unknown_input(probe: Probe) -> Request:
    request = probe.request()
    request.inputs.add(name="conformance-no-such-input", datatype="UINT8", shape=[1])
    request.raw_input_contents.append(b"\0")
    return request


def duplicate_input(probe: Probe) -> Request:
    request = probe.request()
    request.inputs.append(request.inputs[0])
    request.raw_input_contents.append(request.raw_input_contents[0])
    return request


def unknown_output(probe: Probe) -> Request:
    request = probe.request()
    request.outputs.add(name="conformance-no-such-output")
    return request


def duplicate_output(probe: Probe) -> Request:
    request = probe.request()
    for _ in range(2):
        request.outputs.add(name=probe.metadata.outputs[0].name)
    return request


# Datatypes and shapes


def wrong_datatype(probe: Probe) -> Request:
    """Another datatype of the same width, so that the bytes alone give no hint."""
    request = probe.request()
    tensor = request.inputs[0]
    others = [name for name in DATATYPES if name not in ("BYTES", "BOOL", tensor.datatype)]
    if tensor.datatype != "BYTES":
        others = [name for name in others if element_bytes(name) == element_bytes(tensor.datatype)]
    tensor.datatype = others[0]
    return request


def unknown_datatype(probe: Probe) -> Request:
    request = probe.request()
    request.inputs[0].datatype = "FLOAT"
    return request


def wrong_shape(probe: Probe) -> Request:
    """One more along an axis whose length is fixed, and the bytes that it needs."""
    sample = probe.sample
    for tensor in probe.metadata.inputs:
        fixed = [index for index, axis in enumerate(tensor.shape) if axis > 0]
        if fixed:
            longer = np.concatenate([sample[tensor.name]] * 2, axis=fixed[-1])
            longer = longer.take(range(tensor.shape[fixed[-1]] + 1), axis=fixed[-1])
            return probe.request({**sample, tensor.name: longer})
    raise Skipped("no input has an axis of fixed length")


def wrong_rank(probe: Probe) -> Request:
    request = probe.request()
    request.inputs[0].shape.append(1)
    return request


def negative_axis(probe: Probe) -> Request:
    request = probe.request()
    if not request.inputs[0].shape:
        raise Skipped("the first input has no axes")
    request.inputs[0].shape[0] = -1
    return request


def huge_axis(probe: Probe) -> Request:
    request = probe.request()
    if not request.inputs[0].shape:
        raise Skipped("the first input has no axes")
    request.inputs[0].shape[0] = 2**62
    return request


# Contents


def too_few_bytes(probe: Probe) -> Request:
    request = probe.request()
    request.raw_input_contents[0] = request.raw_input_contents[0][:-1]
    return request


def too_many_bytes(probe: Probe) -> Request:
    request = probe.request()
    request.raw_input_contents[0] += b"\0"
    return request


def too_few_raw_entries(probe: Probe) -> Request:
    request = probe.request()
    del request.raw_input_contents[-1]
    return request


def too_many_raw_entries(probe: Probe) -> Request:
    request = probe.request()
    request.raw_input_contents.append(request.raw_input_contents[-1])
    return request


def contents_beside_raw(probe: Probe) -> Request:
    request = probe.request()
    request.inputs[0].contents.CopyFrom(_typed(probe).inputs[0].contents)
    return request


def _typed(probe: Probe) -> Request:
    raw_only = [tensor.name for tensor in probe.metadata.inputs if tensor.datatype not in CONTENTS_FIELD]
    request = probe.request()
    if raw_only:
        raise Skipped(f"FP16 and BF16 have no typed contents: {raw_only}")
    return with_typed_contents(request, probe.sample)


def wrong_field(probe: Probe) -> Request:
    """As many elements as are needed, in the field of another datatype."""
    request = _typed(probe)
    tensor = request.inputs[0]
    count = len(getattr(tensor.contents, CONTENTS_FIELD[tensor.datatype]))
    tensor.ClearField("contents")
    if tensor.datatype == "FP64":
        tensor.contents.fp32_contents.extend([0.5] * count)
    else:
        tensor.contents.fp64_contents.extend([0.5] * count)
    return request


def too_few_elements(probe: Probe) -> Request:
    request = _typed(probe)
    tensor = request.inputs[0]
    getattr(tensor.contents, CONTENTS_FIELD[tensor.datatype]).pop()
    return request


def too_many_elements(probe: Probe) -> Request:
    request = _typed(probe)
    tensor = request.inputs[0]
    elements = getattr(tensor.contents, CONTENTS_FIELD[tensor.datatype])
    elements.append(elements[0])
    return request


def out_of_range(probe: Probe) -> Request:
    request = _typed(probe)
    for tensor in request.inputs:
        if tensor.datatype in _NARROW:
            getattr(tensor.contents, CONTENTS_FIELD[tensor.datatype])[0] = 70_000
            return request
    raise Skipped("no input is of INT8, INT16, UINT8 or UINT16")


def malformed_bytes(probe: Probe) -> Request:
    """An element that is said to be longer than all that follows."""
    request = probe.request()
    for index, tensor in enumerate(request.inputs):
        if tensor.datatype == "BYTES":
            request.raw_input_contents[index] = b"\xff\xff\xff\x7f" + request.raw_input_contents[index][4:]
            return request
    raise Skipped("no input is of BYTES")


def not_protobuf(probe: Probe) -> bytes:  # noqa: ARG001
    return b"\xff" * 16


def truncated(probe: Probe) -> bytes:
    return probe.request().SerializeToString()[:-1]


def not_utf8(probe: Probe) -> bytes:
    return b"\x0a\x02\xff\xfe" + probe.request().SerializeToString()  # field 1, model_name
