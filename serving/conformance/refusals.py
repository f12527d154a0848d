"""Checks of ModelInfer's answers to wrong requests: the status, and that the server still works afterwards."""

from __future__ import annotations

from collections.abc import Callable

import grpc

from serving.conformance import wrong_requests as wrong
from serving.conformance.probe import Probe
from serving.conformance.rules import Check, Group, Refused, expect, refused
from serving.conformance.samples import same

INVALID_ARGUMENT = grpc.StatusCode.INVALID_ARGUMENT
NOT_FOUND = grpc.StatusCode.NOT_FOUND


def refusal(build: Callable[[Probe], wrong.Request | bytes], *codes: grpc.StatusCode) -> Callable[[Probe], None]:
    """A check that such a request is refused with one of these codes, and a valid one then answered as before."""

    def run(probe: Probe) -> None:
        request = build(probe)
        refused(lambda: probe.call("ModelInfer", request), *codes)
        still_answers(probe)

    return run


def still_answers(probe: Probe) -> None:
    wanted = "afterwards, a valid request answered as before"
    try:
        got = probe.ask()
    except Refused as error:
        expect(False, wanted, error)
    else:
        expect(not probe.repeatable or same(got, probe.answer), wanted, "another answer")


_CODE = "google.rpc.Code: INVALID_ARGUMENT"
_FOUND = "google.rpc.Code: NOT_FOUND"


def _check(
    name: str, group: Group, rule: str, build: Callable[[Probe], wrong.Request | bytes], *codes: grpc.StatusCode
) -> Check:
    return Check(f"refuse.{name}", group, rule, refusal(build, *(codes or (INVALID_ARGUMENT,))))


_O, _R = Group.REQUIRED, Group.ROBUSTNESS
_PARSING = "what cannot be parsed is INVALID_ARGUMENT (gRPC's libraries say INTERNAL or UNKNOWN by themselves)"

CHECKS = [
    _check("unknown-model", _O, f"OIP, Inference: model_name; {_FOUND}", wrong.unknown_model, NOT_FOUND),
    _check("unknown-version", _O, f"OIP, Inference: model_version; {_FOUND}", wrong.unknown_version, NOT_FOUND),
    _check("no-inputs", _O, f"OIP, Inference: inputs; {_CODE}", wrong.no_inputs),
    _check("missing-input", _O, f"OIP, Inference: inputs; {_CODE}", wrong.missing_input),
    _check("unknown-input", _O, f"OIP, Inference: inputs; {_CODE}", wrong.unknown_input),
    _check("unknown-output", _O, f"OIP, Inference: outputs; {_CODE}", wrong.unknown_output),
    _check("wrong-datatype", _O, f"OIP, Model Metadata: datatype; {_CODE}", wrong.wrong_datatype),
    _check("unknown-datatype", _O, f"OIP, Tensor Data Types; {_CODE}", wrong.unknown_datatype),
    _check("wrong-shape", _O, f"OIP, Model Metadata: shape; {_CODE}", wrong.wrong_shape),
    _check("wrong-rank", _O, f"OIP, Model Metadata: shape; {_CODE}", wrong.wrong_rank),
    _check("negative-axis", _O, f"OIP, Inference: shape; {_CODE}", wrong.negative_axis),
    _check("huge-axis", _O, f"OIP, Inference: size must match the shape; {_CODE}", wrong.huge_axis),
    _check("too-few-bytes", _O, f"OIP, Inference: raw_input_contents, size; {_CODE}", wrong.too_few_bytes),
    _check("too-many-bytes", _O, f"OIP, Inference: raw_input_contents, size; {_CODE}", wrong.too_many_bytes),
    _check("too-few-raw", _O, f"OIP, Inference: raw_input_contents, data for each; {_CODE}", wrong.too_few_raw_entries),
    _check(
        "contents-beside-raw", _O, f"OIP, Inference: contents must not be specified; {_CODE}", wrong.contents_beside_raw
    ),
    _check("wrong-field", _O, f"OIP, Tensor Data: InferTensorContents; {_CODE}", wrong.wrong_field),
    _check("too-few-elements", _O, f"OIP, InferTensorContents: size must match; {_CODE}", wrong.too_few_elements),
    _check("too-many-elements", _O, f"OIP, InferTensorContents: size must match; {_CODE}", wrong.too_many_elements),
    _check("malformed-bytes", _O, f"OIP, Tensor Data Types: BYTES; {_CODE}", wrong.malformed_bytes),
    _check("malformed-version", _R, "Triton, core: a version is a number; INVALID_ARGUMENT", wrong.malformed_version),
    _check(
        "empty-message",
        _R,
        "a request that names no model is refused as such",
        wrong.empty_message,
        INVALID_ARGUMENT,
        NOT_FOUND,
    ),
    _check("duplicate-input", _R, "Triton, core: input already exists in request", wrong.duplicate_input),
    _check("duplicate-output", _R, "Triton, core: output already exists in request", wrong.duplicate_output),
    _check(
        "too-many-raw", _R, "KServe: one raw entry for each input (Triton ignores others)", wrong.too_many_raw_entries
    ),
    _check("out-of-range", _R, "no number is changed to fit its datatype (Triton truncates)", wrong.out_of_range),
    _check("not-protobuf", _R, _PARSING, wrong.not_protobuf),
    _check("truncated", _R, _PARSING, wrong.truncated),
    _check("not-utf8", _R, _PARSING, wrong.not_utf8),
]
