"""Checks of ModelInfer's answers to requests that are right."""

from __future__ import annotations

import math

from protos import open_inference as pb
from serving.conformance.probe import Probe
from serving.conformance.rules import Check, Group, Skipped, expect
from serving.conformance.samples import rows_of, same, with_typed_contents
from serving.tensors import Array, element_bytes, shape_text
from serving.wire import CONTENTS_FIELD


def answer(probe: Probe) -> None:
    if not (probe.metadata.inputs and probe.metadata.outputs):
        raise Skipped(probe.problem)  # `metadata.answer` reports it
    expect(not probe.problem, "an answer", probe.problem)


def all_outputs(probe: Probe) -> None:
    got = set(probe.ask())
    wanted = {tensor.name for tensor in probe.metadata.outputs}
    expect(got == wanted, f"outputs {sorted(wanted)}, all there are", sorted(got))


def signature(probe: Probe) -> None:
    response = probe.infer(probe.request())
    known = {tensor.name: tensor for tensor in probe.metadata.outputs}
    for tensor in response.outputs:
        expect(tensor.name in known, f"an output that ModelMetadata names: {sorted(known)}", f"'{tensor.name}'")
        listed = known[tensor.name]
        expect(tensor.datatype == listed.datatype, f"'{tensor.name}' as {listed.datatype}", tensor.datatype)
        fits = len(tensor.shape) == len(listed.shape) and all(
            axis in (-1, length) for axis, length in zip(listed.shape, tensor.shape, strict=True)
        )
        wanted = f"'{tensor.name}' of shape {shape_text(tuple(listed.shape))}"
        expect(fits, wanted, shape_text(tuple(tensor.shape)))


def contents(probe: Probe) -> None:
    """Raw entries with the bytes that shape and datatype need, or typed contents with as many elements; not both."""
    response = probe.infer(probe.request())
    probe.outputs(response)
    raw = response.raw_output_contents
    expect(len(raw) in (0, len(response.outputs)), f"{len(response.outputs)} raw entries or none", len(raw))
    for index, tensor in enumerate(response.outputs):
        expect(not (raw and tensor.HasField("contents")), f"'{tensor.name}' without contents, for it is raw", "both")
        if raw and tensor.datatype != "BYTES":
            size = math.prod(tensor.shape) * element_bytes(tensor.datatype)
            expect(len(raw[index]) == size, f"{size} bytes of '{tensor.name}'", len(raw[index]))


def request_id(probe: Probe) -> None:
    _expect_id(probe, "conformance-1")


def any_text_as_id(probe: Probe) -> None:
    """It is a text, not a header's value."""
    _expect_id(probe, "ünïcode / \t")


def _expect_id(probe: Probe, identifier: str) -> None:
    request = probe.request()
    request.id = identifier
    got = probe.infer(request).id
    expect(got == identifier, f"id {identifier!r}", repr(got))


def model_name(probe: Probe) -> None:
    got = probe.infer(probe.request()).model_name
    expect(got == probe.model, f"model_name '{probe.model}'", f"'{got}'")


def resolved_version(probe: Probe) -> None:
    got = probe.infer(probe.request()).model_version
    if not (got or probe.metadata.versions):
        raise Skipped("this server's models have no versions")
    expect(got in probe.metadata.versions, f"one of the versions {list(probe.metadata.versions)}", f"'{got}'")


def named_version(probe: Probe) -> None:
    request = probe.request()
    if not probe.metadata.versions:
        raise Skipped("ModelMetadata lists no versions")
    for version in probe.metadata.versions:
        request.model_version = version
        got = probe.infer(request).model_version
        expect(got == version, f"model_version '{version}'", f"'{got}'")


def repeated(probe: Probe) -> None:
    """The model may draw lots; the form of its answers may not change."""
    first, second = probe.ask(), probe.ask()
    forms = [{name: array.dtype for name, array in answer.items()} for answer in (first, second)]
    expect(forms[0] == forms[1], f"the outputs and datatypes of the answer before, {forms[0]}", forms[1])
    expect(
        same(first, probe.answer) and same(second, probe.answer), "the answer before, to the same request", "another"
    )


def requested_outputs(probe: Probe) -> None:
    for name in (tensor.name for tensor in probe.metadata.outputs):
        request = probe.request()
        request.outputs.add(name=name)
        _expect_outputs(probe, request, [name])


def requested_order(probe: Probe) -> None:
    request = probe.request()
    names = [tensor.name for tensor in probe.metadata.outputs][::-1]
    if len(names) < 2:
        raise Skipped("the model has one output")
    for name in names:
        request.outputs.add(name=name)
    got = [tensor.name for tensor in probe.infer(request).outputs]
    expect(got == names, f"outputs in the order asked for, {names}", got)


def requested_contents(probe: Probe) -> None:
    """Asked for in another order, each output still has its own elements."""
    request = probe.request()
    names = [tensor.name for tensor in probe.metadata.outputs][::-1]
    if len(names) < 2:
        raise Skipped("the model has one output")
    for name in names:
        request.outputs.add(name=name)
    _expect_outputs(probe, request, names)


def _expect_outputs(probe: Probe, request: pb.ModelInferRequest, names: list[str]) -> None:
    got = probe.outputs(probe.infer(request))
    expect(set(got) == set(names), f"outputs {sorted(names)} and no other", sorted(got))
    wanted = {name: array for name, array in probe.answer.items() if name in names}
    expect(same(got, wanted), f"for {names} what the answer without `outputs` has", "other elements")


def typed_contents(probe: Probe) -> None:
    raw_only = [tensor.name for tensor in probe.metadata.inputs if tensor.datatype not in CONTENTS_FIELD]
    sample = probe.sample
    if raw_only:
        raise Skipped(f"FP16 and BF16 have no typed contents: {raw_only}")
    got = probe.outputs(probe.infer(with_typed_contents(probe.request(), sample)))
    expect(same(got, probe.answer), "the answer to the same elements sent raw", "another")


def batch(probe: Probe) -> None:
    rows = probe.rows(2)
    together = probe.ask(rows)
    lengths = {name: len(array) for name, array in together.items()}
    expect(set(lengths.values()) == {2}, "2 rows of each output for 2 rows of input", lengths)
    if not probe.repeatable:
        raise Skipped("this model answers the same request differently each time")
    for index, (alone, part) in enumerate(zip(rows_of(rows), rows_of(together), strict=True)):
        expect(same(probe.ask(alone), part), f"for row {index} of 2 the answer that it has alone", "another")


def parameters(probe: Probe) -> None:
    request = probe.request()
    request.parameters["conformance_bool"].bool_param = True
    request.parameters["conformance_int64"].int64_param = -42
    request.parameters["conformance_string"].string_param = "tolerated"
    _expect_answer(probe, request)


def tensor_parameters(probe: Probe) -> None:
    request = probe.request()
    for tensor in request.inputs:
        tensor.parameters["conformance_string"].string_param = "tolerated"
    for listed in probe.metadata.outputs:
        request.outputs.add(name=listed.name).parameters["conformance_bool"].bool_param = False
    _expect_answer(probe, request)


def wide_parameters(probe: Probe) -> None:
    request = probe.request()
    request.parameters["conformance_uint64"].uint64_param = 2**64 - 1
    request.parameters["conformance_double"].double_param = 0.5
    _expect_answer(probe, request)


def priority(probe: Probe) -> None:
    """As Triton's own clients send them: both uint64 and int64 microseconds."""
    request = probe.request()
    request.parameters["priority"].uint64_param = 1
    request.parameters["timeout"].int64_param = 60_000_000
    _expect_answer(probe, request)


def _expect_answer(probe: Probe, request: pb.ModelInferRequest) -> None:
    got: dict[str, Array] = probe.outputs(probe.infer(request))
    expect(same(got, probe.answer), "the answer that the request has without parameters", "another")


CHECKS = [
    Check("infer.answer", Group.REQUIRED, "OIP, Inference", answer),
    Check("infer.signature", Group.REQUIRED, "OIP, Model Metadata: outputs; Inference: outputs", signature),
    Check("infer.contents", Group.REQUIRED, "OIP, Inference: raw_output_contents", contents),
    Check("infer.id", Group.REQUIRED, "OIP, Inference: id", request_id),
    Check("infer.id.any-text", Group.REQUIRED, "OIP, Inference: id, a string", any_text_as_id),
    Check("infer.model-name", Group.REQUIRED, "OIP, Inference: model_name", model_name),
    Check("infer.version.resolved", Group.REQUIRED, "OIP, Inference: model_version", resolved_version),
    Check("infer.version.named", Group.REQUIRED, "OIP, Inference: model_version", named_version),
    Check("infer.outputs.all", Group.REQUIRED, "OIP, Inference: outputs, if not specified", all_outputs),
    Check("infer.outputs.requested", Group.REQUIRED, "OIP, Inference: outputs", requested_outputs),
    Check("infer.outputs.contents", Group.REQUIRED, "OIP, Inference: outputs, raw_output_contents", requested_contents),
    Check("infer.typed", Group.REQUIRED, "OIP, Tensor Data: InferTensorContents", typed_contents),
    Check("infer.batch", Group.REQUIRED, "OIP, Model Metadata: a variable-size dimension is -1", batch),
    Check("infer.parameters", Group.REQUIRED, "OIP, Parameters", parameters),
    Check(
        "infer.parameters.tensor", Group.REQUIRED, "OIP, Inference: parameters of inputs and outputs", tensor_parameters
    ),
    Check(
        "infer.parameters.wide", Group.EXTENSION, "Triton, InferParameter: double_param, uint64_param", wide_parameters
    ),
    Check("infer.parameters.priority", Group.EXTENSION, "Triton, Schedule Policy: priority, timeout", priority),
    Check("infer.repeat", Group.ROBUSTNESS, "the same request has the same answer, where the model allows", repeated),
    Check("infer.outputs.order", Group.ROBUSTNESS, "outputs come in the order of the request", requested_order),
]
