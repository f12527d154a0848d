"""`serving.wire`: requests and answers of the Open Inference Protocol, their rules and the texts of their errors."""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np
import pytest
import tritonclient.grpc as triton
from tritonclient.grpc import service_pb2

from protos import open_inference as pb
from serving import wire
from serving.errors import InvalidArgument, NotFound
from serving.shared_memory import Region
from serving.tensors import DATATYPES, Array, TensorSpec

IMAGE = TensorSpec(name="X", datatype="FP32", shape=("batch", 1, 28, 28))
PAIR = TensorSpec(name="Y", datatype="INT8", shape=("batch", 2))

# For each field of InferTensorContents: the datatypes that it holds, and a value for it.
TYPED = {
    "bool_contents": (["BOOL"], True),
    "int_contents": (["INT32", "INT16", "INT8"], -128),
    "int64_contents": (["INT64"], -(2**63)),
    "uint_contents": (["UINT32", "UINT16", "UINT8"], 255),
    "uint64_contents": (["UINT64"], 2**64 - 1),
    "fp32_contents": (["FP32"], 0.5),
    "fp64_contents": (["FP64"], 0.1),
    "bytes_contents": (["BYTES"], b"\x00\xff"),
}


def refusal(text: str) -> object:
    return pytest.raises(InvalidArgument, match=f"^{re.escape(text)}$")


def flat(datatype: str) -> TensorSpec:
    """An input X of any number of elements."""
    return TensorSpec(name="X", datatype=datatype, shape=("count",))


def typed_request(datatype: str, field: str, values: list[object]) -> pb.ModelInferRequest:
    request = pb.ModelInferRequest(model_name="M")
    contents = request.inputs.add(name="X", datatype=datatype, shape=[max(1, len(values))]).contents
    contents.SetInParent()
    getattr(contents, field).extend(values)
    return request


def raw_request(**arrays: Array) -> pb.ModelInferRequest:
    request = pb.ModelInferRequest(model_name="M")
    for name, array in arrays.items():
        datatype = next(datatype for datatype, dtype in DATATYPES.items() if dtype == array.dtype)
        wire.encode_input(request, name, datatype, array)
    return request


def images(count: int) -> Array:
    return np.arange(count * 784, dtype=np.float32).reshape(count, 1, 28, 28)


def pairs(count: int) -> Array:
    return np.arange(count * 2, dtype=np.int8).reshape(count, 2)


@pytest.mark.parametrize("datatype", DATATYPES)
def test_raw_inputs_come_through(datatype: str) -> None:
    array = np.array([[b"", b"ab"]] if datatype == "BYTES" else [[0, 1]], dtype=DATATYPES[datatype])
    request = pb.ModelInferRequest(model_name="M")
    wire.encode_input(request, "X", datatype, array)
    spec = TensorSpec(name="X", datatype=datatype, shape=("batch", 2))
    decoded = wire.decode_inputs(pb.ModelInferRequest.FromString(request.SerializeToString()), [spec], 8)
    assert list(decoded) == ["X"]
    assert decoded["X"].dtype == DATATYPES[datatype]
    assert decoded["X"].tolist() == array.tolist()


@pytest.mark.parametrize(("field", "datatype"), [(field, one) for field, (held, _) in TYPED.items() for one in held])
def test_typed_inputs_come_through(field: str, datatype: str) -> None:
    values = [TYPED[field][1]] * 3
    decoded = wire.decode_inputs(typed_request(datatype, field, values), [flat(datatype)], 0)["X"]
    assert (decoded.tolist(), decoded.dtype) == (values, DATATYPES[datatype])


@pytest.mark.parametrize(
    ("field", "datatype"),
    [(field, datatype) for field, (held, _) in TYPED.items() for datatype in DATATYPES if datatype not in held],
)
def test_typed_contents_of_another_kind_are_refused(field: str, datatype: str) -> None:
    held, value = TYPED[field]
    with refusal(
        f"unexpected explicit tensor data for input tensor 'X' for model 'M' of type '{held[0]}', "
        f"expected datatype '{datatype}'"
    ):
        wire.decode_inputs(typed_request(datatype, field, [value]), [flat(datatype)], 0)


def test_typed_contents_of_two_kinds_are_refused() -> None:
    request = typed_request("FP32", "fp32_contents", [1.0])
    request.inputs[0].contents.int64_contents.append(1)
    with refusal(
        "unexpected explicit tensor data for input tensor 'X' for model 'M' of type 'INT64', expected datatype 'FP32'"
    ):
        wire.decode_inputs(request, [flat("FP32")], 0)


@pytest.mark.parametrize(
    ("datatype", "field", "low", "high"),
    [
        ("INT8", "int_contents", -128, 127),
        ("INT16", "int_contents", -32768, 32767),
        ("UINT8", "uint_contents", 0, 255),
        ("UINT16", "uint_contents", 0, 65535),
    ],
)
def test_typed_integers_are_never_truncated(datatype: str, field: str, low: int, high: int) -> None:
    decoded = wire.decode_inputs(typed_request(datatype, field, [low, high]), [flat(datatype)], 0)["X"]
    assert decoded.tolist() == [low, high]
    for outside in (high + 1, low - 1) if low else (high + 1,):
        with refusal(f"unexpected value {outside} in {datatype} input 'X' for model 'M', expected {low} to {high}"):
            wire.decode_inputs(typed_request(datatype, field, [low, outside]), [flat(datatype)], 0)


def test_typed_nan_and_empty_bytes_come_through() -> None:
    reals = wire.decode_inputs(typed_request("FP64", "fp64_contents", [np.nan, -np.inf]), [flat("FP64")], 0)["X"]
    np.testing.assert_array_equal(reals, [np.nan, -np.inf])
    texts = wire.decode_inputs(typed_request("BYTES", "bytes_contents", [b"", b"a"]), [flat("BYTES")], 0)["X"]
    assert texts.tolist() == [b"", b"a"]


@pytest.mark.parametrize("datatype", ["FP32", "FP16", "BF16"])
def test_present_but_empty_contents_are_too_few(datatype: str) -> None:
    width = 4 if datatype == "FP32" else 2
    with refusal(f"input byte size mismatch for input 'X' for model 'M'. Expected {width}, got 0"):
        wire.decode_inputs(typed_request(datatype, "fp32_contents", []), [flat(datatype)], 0)


def test_typed_contents_of_another_number_are_refused() -> None:
    request = typed_request("INT16", "int_contents", [1, 2, 3])
    request.inputs[0].shape[:] = [2]
    with refusal("input byte size mismatch for input 'X' for model 'M'. Expected 4, got 6"):
        wire.decode_inputs(request, [flat("INT16")], 0)
    request = typed_request("BYTES", "bytes_contents", [b"a"])
    request.inputs[0].shape[:] = [3]
    with refusal("expected 3 string elements for inference input 'X' for model 'M', got 1"):
        wire.decode_inputs(request, [flat("BYTES")], 0)


def drop_raw(request: pb.ModelInferRequest) -> None:
    del request.raw_input_contents[1:]


def drop_all_raw(request: pb.ModelInferRequest) -> None:
    request.ClearField("raw_input_contents")


def contents_beside_raw(request: pb.ModelInferRequest) -> None:
    request.inputs[1].contents.SetInParent()


def extra_raw(request: pb.ModelInferRequest) -> None:
    request.raw_input_contents.append(b"")


def long_raw(request: pb.ModelInferRequest) -> None:
    request.raw_input_contents[0] += b"1234"


def rename(request: pb.ModelInferRequest) -> None:
    request.inputs[1].name = "Z"


def twice(request: pb.ModelInferRequest) -> None:
    request.inputs[1].name = "X"


def no_inputs(request: pb.ModelInferRequest) -> None:
    request.ClearField("inputs")


def one_input(request: pb.ModelInferRequest) -> None:
    del request.inputs[1]


def other_datatype(request: pb.ModelInferRequest) -> None:
    request.inputs[0].datatype = "FP64"


def lower_case_datatype(request: pb.ModelInferRequest) -> None:
    request.inputs[1].datatype = "int8"


def no_batch_axis(request: pb.ModelInferRequest) -> None:
    request.inputs[0].shape[:] = [1, 28, 28]


def negative_axis(request: pb.ModelInferRequest) -> None:
    request.inputs[0].shape[:] = [-1, 1, 28, 28]


def huge_axis(request: pb.ModelInferRequest) -> None:
    request.inputs[0].shape[:] = [2**62, 1, 28, 28]
    request.inputs[1].shape[:] = [2**62, 2]


def empty_batch(request: pb.ModelInferRequest) -> None:
    request.inputs[1].shape[:] = [0, 2]


def too_many_rows(request: pb.ModelInferRequest) -> None:
    request.inputs[0].shape[0] = request.inputs[1].shape[0] = 9


def uneven_batch(request: pb.ModelInferRequest) -> None:
    request.inputs[1].shape[0] = 2


@pytest.mark.parametrize(
    ("spoil", "text"),
    [
        (drop_raw, "unable to find data for input tensor 'Y' for model 'M' in request."),
        (drop_all_raw, "unable to find data for input tensor 'X' for model 'M' in request."),
        (
            contents_beside_raw,
            "contents field must not be specified when using raw_input_contents for 'Y' for model 'M'",
        ),
        (extra_raw, "unexpected raw_input_contents for model 'M': got 3 entries for 2 inputs"),
        (long_raw, "input byte size mismatch for input 'X' for model 'M'. Expected 3136, got 3140"),
        (rename, "unexpected inference input 'Z' for model 'M'"),
        (twice, "input 'X' already exists in request"),
        (
            no_inputs,
            "expected 2 inputs but got 0 inputs for model 'M'. Got input(s) [], "
            "but missing required input(s) ['X','Y']. Please provide all required input(s).",
        ),
        (
            one_input,
            "expected 2 inputs but got 1 inputs for model 'M'. Got input(s) ['X'], "
            "but missing required input(s) ['Y']. Please provide all required input(s).",
        ),
        (other_datatype, "inference input 'X' data-type is 'FP64', but model 'M' expects 'FP32'"),
        (lower_case_datatype, "inference input 'Y' data-type is 'int8', but model 'M' expects 'INT8'"),
        (no_batch_axis, "unexpected shape for input 'X' for model 'M'. Expected [-1,1,28,28], got [1,28,28]. "),
        (negative_axis, "unexpected shape for input 'X' for model 'M'. Expected [-1,1,28,28], got [-1,1,28,28]. "),
        (huge_axis, "inference request batch-size must be <= 8 for 'M'"),
        (empty_batch, "unexpected shape for input 'Y' for model 'M'. Expected [-1,2], got [0,2]. "),
        (too_many_rows, "inference request batch-size must be <= 8 for 'M'"),
        (uneven_batch, "input 'Y' batch size does not match other inputs for 'M'"),
    ],
)
def test_a_broken_request_is_refused(spoil: Callable[[pb.ModelInferRequest], None], text: str) -> None:
    request = raw_request(X=images(1), Y=pairs(1))
    assert list(wire.decode_inputs(request, [IMAGE, PAIR], 8)) == ["X", "Y"]
    spoil(request)
    with refusal(text):
        wire.decode_inputs(request, [IMAGE, PAIR], 8)


def test_inputs_come_in_any_order_with_their_own_data() -> None:
    decoded = wire.decode_inputs(raw_request(Y=pairs(3), X=images(3)), [IMAGE, PAIR], 8)
    np.testing.assert_array_equal(decoded["X"], images(3))
    np.testing.assert_array_equal(decoded["Y"], pairs(3))


def test_without_a_batch_axis_the_rows_may_differ() -> None:
    other = PAIR.model_copy(update={"shape": ("pairs", 2)})
    decoded = wire.decode_inputs(raw_request(X=images(1), Y=pairs(99)), [IMAGE, other], 0)
    assert (len(decoded["X"]), len(decoded["Y"])) == (1, 99)


def test_axes_of_one_name_have_one_length() -> None:
    """As ONNX has it: https://onnx.ai/onnx/repo-docs/IR.html#tensor-shapes."""
    with pytest.raises(InvalidArgument, match="Axis batch is 99, but 1 in input 'X'"):
        wire.decode_inputs(raw_request(X=images(1), Y=pairs(99)), [IMAGE, PAIR], 0)


def test_a_request_of_tritons_client_decodes() -> None:
    array = np.array([[b"", "\N{SNOWMAN}".encode()]], dtype=object)
    given = triton.InferInput("X", [1, 2], "BYTES")
    given.set_data_from_numpy(array)
    request = service_pb2.ModelInferRequest(model_name="M", inputs=[given._get_tensor()])
    request.raw_input_contents.append(given._get_content())
    ours = pb.ModelInferRequest.FromString(request.SerializeToString())
    spec = TensorSpec(name="X", datatype="BYTES", shape=("batch", 2))
    assert wire.decode_inputs(ours, [spec], 8)["X"].tolist() == array.tolist()


def test_inputs_in_shared_memory_have_no_raw_entry() -> None:
    request = raw_request(X=images(1), Y=pairs(1))
    del request.raw_input_contents[0]
    request.inputs[0].parameters["shared_memory_region"].string_param = "images"
    request.inputs[0].parameters["shared_memory_byte_size"].int64_param = 3136
    request.inputs[0].parameters["shared_memory_offset"].int64_param = 16
    memory = {Region("images", 3136, 16): memoryview(images(1).tobytes())}
    decoded = wire.decode_inputs(request, [IMAGE, PAIR], 8, memory.__getitem__)
    np.testing.assert_array_equal(decoded["X"], images(1))
    np.testing.assert_array_equal(decoded["Y"], pairs(1))
    with pytest.raises(NotFound, match=r"^Unable to find shared memory region: 'images'$"):
        wire.decode_inputs(request, [IMAGE, PAIR], 8)
    request.inputs[0].contents.fp32_contents.append(1)
    with refusal("unexpected 'content' provided when using shared memory for input tensor 'X' for model 'M'"):
        wire.decode_inputs(request, [IMAGE, PAIR], 8, memory.__getitem__)


@pytest.mark.parametrize(
    ("parameters", "text"),
    [
        (
            {"shared_memory_region": {"string_param": "r"}},
            "'shared_memory_byte_size' must be specified along with 'shared_memory_region' parameter for tensor 'X'",
        ),
        (
            {"shared_memory_byte_size": {"int64_param": 1}},
            "'shared_memory_byte_size' can not be specified without 'shared_memory_region' parameter for tensor 'X'",
        ),
        (
            {"shared_memory_offset": {"int64_param": 1}},
            "'shared_memory_offset' can not be specified without 'shared_memory_region' parameter for tensor 'X'",
        ),
        (
            {"shared_memory_region": {"int64_param": 1}},
            "invalid value type for 'shared_memory_region' parameter for tensor 'X', expected string_param.",
        ),
        (
            {"shared_memory_region": {"string_param": "r"}, "shared_memory_byte_size": {"uint64_param": 1}},
            "invalid value type for 'shared_memory_byte_size' parameter for tensor 'X', expected int64_param.",
        ),
        (
            {"shared_memory_region": {"string_param": "r"}, "shared_memory_byte_size": {"int64_param": -1}},
            "invalid value for 'shared_memory_byte_size' parameter for tensor 'X', expected >= 0",
        ),
    ],
)
def test_an_incomplete_region_is_refused(parameters: dict[str, dict[str, object]], text: str) -> None:
    request = raw_request(X=images(1))
    for key, value in parameters.items():
        request.inputs[0].parameters[key].MergeFrom(pb.InferParameter(**value))
    with refusal(text):
        wire.decode_inputs(request, [IMAGE], 8)


LOGITS = TensorSpec(name="logits", datatype="FP32", shape=("batch", 3))
WORDS = TensorSpec(name="words", datatype="BYTES", shape=("batch", 1))
OUTPUTS = [LOGITS, WORDS]
ANSWERS: dict[str, Array] = {
    "logits": np.array([[0, 2, 1], [5, 3, 4]], np.float32),
    "words": np.array([["a"], ["bc"]], dtype=object),
}


def answer(
    request: pb.ModelInferRequest, max_batch_size: int = 8, **options: object
) -> tuple[pb.ModelInferResponse, dict[str, Array]]:
    """What a request's outputs look like to the client."""
    response = pb.ModelInferResponse(model_name="M", model_version="1")
    requested = wire.requested_outputs(request, OUTPUTS)
    wire.encode_outputs(response, requested, ANSWERS, OUTPUTS, {"logits": ("x", "y")}, max_batch_size, **options)
    assert len(response.raw_output_contents) == len(response.outputs)
    return response, wire.decode_outputs(pb.ModelInferResponse.FromString(response.SerializeToString()))


def test_without_named_outputs_all_are_answered() -> None:
    _, decoded = answer(pb.ModelInferRequest())
    assert list(decoded) == ["logits", "words"]
    np.testing.assert_array_equal(decoded["logits"], ANSWERS["logits"])
    assert decoded["words"].tolist() == [[b"a"], [b"bc"]]


def test_named_outputs_are_answered_in_the_requests_order() -> None:
    request = pb.ModelInferRequest()
    request.outputs.add(name="words")
    request.outputs.add(name="logits")
    assert list(answer(request)[1]) == ["words", "logits"]
    del request.outputs[0]
    assert list(answer(request)[1]) == ["logits"]


def test_tritons_client_reads_the_answer() -> None:
    response, _ = answer(pb.ModelInferRequest())
    result = triton.InferResult(service_pb2.ModelInferResponse.FromString(response.SerializeToString()))
    np.testing.assert_array_equal(result.as_numpy("logits"), ANSWERS["logits"])
    assert result.as_numpy("words").tolist() == [[b"a"], [b"bc"]]


def test_classification_replaces_the_scores() -> None:
    request = pb.ModelInferRequest()
    request.outputs.add(name="logits").parameters["classification"].int64_param = 2
    response, decoded = answer(request)
    assert (response.outputs[0].datatype, list(response.outputs[0].shape)) == ("BYTES", [2, 2])
    assert decoded["logits"].tolist() == [
        [b"2.000000:1:y", b"1.000000:2"],
        [b"5.000000:0:x", b"4.000000:2"],
    ]


def test_classification_without_a_batch_axis_ranks_the_whole_output() -> None:
    request = pb.ModelInferRequest()
    request.outputs.add(name="logits").parameters["classification"].int64_param = 2
    response, decoded = answer(request, max_batch_size=0)
    assert list(response.outputs[0].shape) == [2]
    assert decoded["logits"].tolist() == [b"5.000000:3", b"4.000000:5"]


def test_classification_of_bytes_is_refused() -> None:
    request = pb.ModelInferRequest()
    request.outputs.add(name="words").parameters["classification"].int64_param = 1
    with refusal("class result not available for output due to unsupported type 'BYTES'"):
        answer(request)


@pytest.mark.parametrize(
    ("parameters", "text"),
    [
        (
            {"classification": {"string_param": "1"}},
            "invalid value type for 'classification' parameter, expected int64_param",
        ),
        ({"classification": {"int64_param": 0}}, "invalid value for 'classification' parameter, expected >= 1"),
        (
            {
                "classification": {"int64_param": 1},
                "shared_memory_region": {"string_param": "r"},
                "shared_memory_byte_size": {"int64_param": 1},
            },
            "output can't set both 'shared_memory_region' and 'classification'",
        ),
    ],
)
def test_impossible_output_parameters_are_refused(parameters: dict[str, dict[str, object]], text: str) -> None:
    request = pb.ModelInferRequest()
    output = request.outputs.add(name="logits")
    for key, value in parameters.items():
        output.parameters[key].MergeFrom(pb.InferParameter(**value))
    with refusal(text):
        wire.requested_outputs(request, OUTPUTS)


def test_unknown_and_repeated_outputs_are_refused() -> None:
    request = pb.ModelInferRequest(model_name="M")
    request.outputs.add(name="logits")
    request.outputs.add(name="logits")
    with refusal("output 'logits' already exists in request"):
        wire.requested_outputs(request, OUTPUTS)
    request.outputs[1].name = "Z"
    with refusal("unexpected inference output 'Z' for model 'M'"):
        wire.requested_outputs(request, OUTPUTS)


def test_an_output_in_shared_memory_leaves_its_raw_entry_empty() -> None:
    request = pb.ModelInferRequest()
    parameters = request.outputs.add(name="logits").parameters
    parameters["shared_memory_region"].string_param = "scores"
    parameters["shared_memory_byte_size"].int64_param = 32
    request.outputs.add(name="words")
    written: dict[Region, bytes] = {}
    response, decoded = answer(request, write_region=written.__setitem__)
    assert written == {Region("scores", 32, 0): ANSWERS["logits"].tobytes()}
    assert response.raw_output_contents[0] == b""
    assert wire.parameter(response.outputs[0].parameters["shared_memory_byte_size"]) == 24
    assert list(decoded) == ["words"]
    parameters["shared_memory_byte_size"].int64_param = 23
    with refusal(
        "shared memory size specified with the request for output 'logits' (23 bytes) "
        "should be at least 24 bytes to hold the results"
    ):
        answer(request, write_region=written.__setitem__)


def test_typed_answers_are_read_too() -> None:
    response = pb.ModelInferResponse(model_name="M")
    response.outputs.add(name="logits", datatype="FP32", shape=[1, 2]).contents.fp32_contents.extend([0.5, 1.5])
    assert wire.decode_outputs(response)["logits"].tolist() == [[0.5, 1.5]]


@pytest.mark.parametrize(
    ("datatype", "shape", "raw", "text"),
    [
        ("FP32", [1, 2], [], "unable to find data for output tensor 'logits' for model 'M' in response."),
        ("FP8", [1, 2], [b""], "unknown datatype 'FP8' of output 'logits' for model 'M'"),
        ("FP32", [-1], [b""], "unexpected shape for output 'logits' for model 'M': got [-1]"),
        ("FP32", [0, 2**62], [b""], "unexpected shape for output 'logits' for model 'M': got [0,4611686018427387904]"),
        (
            "FP32",
            [1, 2],
            [b"1"],
            "output byte size mismatch for output 'logits' for model 'M'. Expected 8, got 1",
        ),
    ],
)
def test_a_broken_answer_is_refused(datatype: str, shape: list[int], raw: list[bytes], text: str) -> None:
    response = pb.ModelInferResponse(model_name="M", raw_output_contents=raw)
    response.outputs.add(name="logits", datatype=datatype, shape=shape)
    with refusal(text):
        wire.decode_outputs(response)


@pytest.mark.parametrize(
    ("choice", "value"),
    [
        ("bool_param", False),
        ("int64_param", -1),
        ("string_param", ""),
        ("double_param", 0.1),
        ("uint64_param", 2**64 - 1),
    ],
)
def test_a_parameter_has_its_own_type(choice: str, value: object) -> None:
    got = wire.parameter(pb.InferParameter(**{choice: value}))
    assert got == value
    assert type(got) is type(value)
    assert wire.parameter(pb.InferParameter()) is None
