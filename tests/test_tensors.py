"""`serving.tensors`: raw contents to arrays and back for every datatype, and the ranking of classes."""

from __future__ import annotations

import re
import struct

import ml_dtypes
import numpy as np
import pytest
from tritonclient.utils import deserialize_bytes_tensor, serialize_byte_tensor

from serving import tensors
from serving.errors import InvalidArgument
from serving.tensors import DATATYPES, Array, Layout, Origin, TensorSpec, classify, decode, encode

ORIGIN = Origin("input", "X", "M")

# Values at the ends of each datatype's range, and the bytes that the protocol gives them.
EXTREMES: dict[str, tuple[list[object], bytes]] = {
    "BOOL": ([True, False], b"\x01\x00"),
    "UINT8": ([0, 255], struct.pack("<2B", 0, 255)),
    "UINT16": ([1, 65535], struct.pack("<2H", 1, 65535)),
    "UINT32": ([1, 2**32 - 1], struct.pack("<2I", 1, 2**32 - 1)),
    "UINT64": ([1, 2**64 - 1], struct.pack("<2Q", 1, 2**64 - 1)),
    "INT8": ([-128, 127], struct.pack("<2b", -128, 127)),
    "INT16": ([-32768, 32767], struct.pack("<2h", -32768, 32767)),
    "INT32": ([-(2**31), 2**31 - 1], struct.pack("<2i", -(2**31), 2**31 - 1)),
    "INT64": ([-(2**63), 2**63 - 1], struct.pack("<2q", -(2**63), 2**63 - 1)),
    "FP16": ([65504.0, -(2.0**-24)], struct.pack("<2e", 65504.0, -(2.0**-24))),
    "BF16": ([1.0, -2.0], b"\x80\x3f\x00\xc0"),
    "FP32": ([3.4028234663852886e38, -(2.0**-149)], struct.pack("<2f", 3.4028234663852886e38, -(2.0**-149))),
    "FP64": ([1.7976931348623157e308, 5e-324], struct.pack("<2d", 1.7976931348623157e308, 5e-324)),
    "BYTES": ([b"", b"\x00\xff"], b"\x00\x00\x00\x00\x02\x00\x00\x00\x00\xff"),
}
REALS = ["FP16", "BF16", "FP32", "FP64"]
FIXED_WIDTH = [datatype for datatype in DATATYPES if datatype != "BYTES"]


def array_of(values: list[object], datatype: str) -> Array:
    return np.array(values, dtype=DATATYPES[datatype])


def refusal(text: str) -> object:
    return pytest.raises(InvalidArgument, match=f"^{re.escape(text)}$")


def test_the_table_of_extremes_has_every_datatype() -> None:
    assert set(EXTREMES) == set(DATATYPES)


@pytest.mark.parametrize("datatype", DATATYPES)
def test_raw_contents_are_the_protocols_bytes(datatype: str) -> None:
    values, raw = EXTREMES[datatype]
    decoded = decode(raw, datatype, (1, 2), ORIGIN)
    assert (decoded.tolist(), decoded.shape, decoded.dtype) == ([values], (1, 2), DATATYPES[datatype])
    assert encode(array_of([values], datatype), datatype) == raw


@pytest.mark.parametrize("datatype", DATATYPES)
def test_a_memoryview_decodes_as_bytes_do(datatype: str) -> None:
    values, raw = EXTREMES[datatype]
    assert decode(memoryview(raw), datatype, (2,), ORIGIN).tolist() == values


@pytest.mark.parametrize("datatype", DATATYPES)
def test_no_elements_are_no_bytes(datatype: str) -> None:
    assert decode(b"", datatype, (0, 3), ORIGIN).shape == (0, 3)
    assert encode(np.empty((0, 3), DATATYPES[datatype]), datatype) == b""


@pytest.mark.parametrize("datatype", DATATYPES)
def test_a_scalar_has_an_empty_shape(datatype: str) -> None:
    values, _ = EXTREMES[datatype]
    raw = encode(array_of(values, datatype)[:1].reshape(()), datatype)
    assert decode(raw, datatype, (), ORIGIN)[()] == values[0]


@pytest.mark.parametrize("datatype", REALS)
def test_nan_infinity_and_the_sign_of_zero_survive(datatype: str) -> None:
    special = array_of([np.nan, np.inf, -np.inf, -0.0], datatype)
    decoded = decode(encode(special, datatype), datatype, (4,), ORIGIN)
    np.testing.assert_array_equal(decoded, special)
    assert np.signbit(decoded[3])


@pytest.mark.parametrize("datatype", [datatype for datatype in FIXED_WIDTH if datatype != "BF16"])
def test_decoding_copies_nothing(datatype: str) -> None:
    raw = EXTREMES[datatype][1]
    decoded = decode(raw, datatype, (2,), ORIGIN)
    assert np.shares_memory(decoded, np.frombuffer(raw, np.uint8))
    assert not decoded.flags.writeable


def test_encoding_is_row_major_whatever_the_array() -> None:
    array = np.arange(6, dtype=np.int32).reshape(2, 3)
    assert encode(array.T, "INT32") == struct.pack("<6i", 0, 3, 1, 4, 2, 5)
    assert encode(array[:, ::-1], "INT32") == struct.pack("<6i", 2, 1, 0, 5, 4, 3)
    assert encode(array.astype(">i4"), "INT32") == array.tobytes()


def test_encoding_never_converts() -> None:
    with pytest.raises(TypeError, match="Cannot cast"):
        encode(np.zeros(1, np.float64), "FP32")
    with pytest.raises(TypeError, match="Cannot cast"):
        encode(np.zeros(1, np.float16), "BF16")


def test_text_is_sent_as_utf_8() -> None:
    text = np.array(["\N{SNOWMAN}", "a"], dtype=object)
    assert decode(encode(text, "BYTES"), "BYTES", (2,), ORIGIN).tolist() == ["\N{SNOWMAN}".encode(), b"a"]
    assert encode(np.array(["a", "bc"]), "BYTES") == encode(np.array([b"a", b"bc"], dtype=object), "BYTES")


def test_bytes_are_as_tritons_client_has_them() -> None:
    elements = np.array([[b"", b"one"], [b"\x00" * 300, "\N{SNOWMAN}".encode()]], dtype=object)
    raw = encode(elements, "BYTES")
    assert raw == serialize_byte_tensor(elements).item()
    assert decode(raw, "BYTES", (2, 2), ORIGIN).tolist() == elements.tolist()
    assert deserialize_bytes_tensor(raw).tolist() == elements.ravel().tolist()


@pytest.mark.parametrize(
    ("bits", "rounded"),
    [
        (0x3F800000, 0x3F80),  # exact
        (0x3F808000, 0x3F80),  # a tie, to even below
        (0x3F818000, 0x3F82),  # a tie, to even above
        (0x3F808001, 0x3F81),  # just over a tie
        (0x3F807FFF, 0x3F80),  # just under a tie
        (0x7F7FFFFF, 0x7F80),  # the largest float32 rounds to infinity
        (0x00000001, 0x0000),  # the smallest to zero
        (0x7F800001, 0x7FC0),  # NaN whose payload is all in the lower half
        (0xFFFFFFFF, 0xFFFF),  # NaN that a carry would make a zero
    ],
)
def test_bf16_rounds_to_nearest_even(bits: int, rounded: int) -> None:
    array = np.array([bits], "<u4").view("<f4")
    assert encode(array, "BF16") == struct.pack("<H", rounded)


def test_every_bf16_widens_exactly_and_comes_back() -> None:
    every = np.arange(2**16, dtype="<u2")
    widened = decode(every.tobytes(), "BF16", (2**16,), ORIGIN)
    np.testing.assert_array_equal(widened.view("<u4") >> 16, every)
    number = ~np.isnan(widened)  # a signalling NaN comes back quiet
    np.testing.assert_array_equal(np.frombuffer(encode(widened, "BF16"), "<u2")[number], every[number])
    assert np.isnan(decode(encode(widened[~number], "BF16"), "BF16", (sum(~number),), ORIGIN)).all()


def test_bf16_agrees_with_an_implementation_of_its_own() -> None:
    bits = np.random.default_rng(0).integers(0, 2**32, 100_000, dtype="<u4")
    array = bits.view("<f4")
    array = array[~np.isnan(array)]
    expected = array.astype(ml_dtypes.bfloat16)
    assert encode(array, "BF16") == expected.tobytes()
    decoded = decode(expected.tobytes(), "BF16", array.shape, ORIGIN)
    np.testing.assert_array_equal(decoded, expected.astype(np.float32))


@pytest.mark.parametrize("datatype", FIXED_WIDTH)
@pytest.mark.parametrize("extra", [-1, 1])
def test_a_wrong_byte_count_is_refused(datatype: str, extra: int) -> None:
    right = 6 * tensors.element_bytes(datatype)
    with refusal(f"input byte size mismatch for input 'X' for model 'M'. Expected {right}, got {right + extra}"):
        decode(bytes(right + extra), datatype, (2, 3), ORIGIN)
    decode(bytes(right), datatype, (2, 3), ORIGIN)


def test_a_bool_is_0_or_1() -> None:
    with refusal("unexpected value 2 in BOOL input 'X' for model 'M', expected 0 or 1"):
        decode(b"\x00\x02\x01", "BOOL", (3,), ORIGIN)


@pytest.mark.parametrize(
    ("raw", "text"),
    [
        (
            b"\x01\x00\x00\x00a\x00\x00\x00",
            "incomplete string length indicator for inference input 'X' for model 'M', "
            "expecting 4 bytes but only 3 bytes available.",
        ),
        (
            b"\x03\x00\x00\x00ab",
            "incomplete string data for inference input 'X' for model 'M', "
            "expecting string of length 3 but only 2 bytes available.",
        ),
        (
            b"\xff\xff\xff\xff",
            "incomplete string data for inference input 'X' for model 'M', "
            "expecting string of length 4294967295 but only 0 bytes available.",
        ),
        (b"\x00\x00\x00\x00", "expected 2 string elements for inference input 'X' for model 'M', got 1"),
        (bytes(12), "expected 2 string elements for inference input 'X' for model 'M', got 3"),
        (b"", "expected 2 string elements for inference input 'X' for model 'M', got 0"),
    ],
)
def test_damaged_bytes_contents_are_refused(raw: bytes, text: str) -> None:
    with refusal(text):
        decode(raw, "BYTES", (2,), ORIGIN)


def test_classes_are_ranked_row_by_row() -> None:
    scores = np.array([[0.125, 0.5, 0.375], [0.0, 1e-7, -3.0]], np.float32)
    ranked = classify(scores, "FP32", 2, ("zero", "one", "two"))
    assert ranked.tolist() == [
        [b"0.500000:1:one", b"0.375000:2:two"],
        [b"0.000000:1:one", b"0.000000:0:zero"],
    ]
    assert ranked.dtype == object


def test_equal_scores_come_by_index() -> None:
    scores = np.random.default_rng(0).integers(0, 3, (4, 100))  # more than a sort that is stable by chance takes
    for row, ranked in zip(scores.tolist(), classify(scores, "INT64", 100, ()).tolist(), strict=True):
        expected = sorted(range(100), key=lambda index: (-row[index], index))
        assert [int(text.split(b":")[1]) for text in ranked] == expected


def test_more_classes_than_there_are_is_all_of_them() -> None:
    assert classify(np.zeros((2, 3), np.float32), "FP32", 2**62, ()).shape == (2, 3)
    assert classify(np.zeros((2, 3), np.float32), "FP32", 1, ()).shape == (2, 1)


def test_the_classes_of_a_row_are_all_its_elements() -> None:
    scores = np.arange(12, dtype=np.int16).reshape(2, 3, 2)
    assert classify(scores, "INT16", 1, ()).tolist() == [[b"5:5"], [b"11:5"]]


def test_no_rows_have_no_classes() -> None:
    assert classify(np.zeros((0, 3), np.float32), "FP32", 2, ()).shape == (0, 2)


@pytest.mark.parametrize("datatype", ["UINT8", "UINT16", "UINT32", "UINT64", "INT8", "INT16", "INT32", "INT64"])
def test_integer_scores_are_ranked_over_their_whole_range(datatype: str) -> None:
    limits = np.iinfo(DATATYPES[datatype].name)
    scores = array_of([[limits.min, limits.max, 1]], datatype)
    expected = [f"{limits.max}:1:b".encode(), b"1:2", f"{limits.min}:0:a".encode()]
    assert classify(scores, datatype, 3, ("a", "b")).tolist() == [expected]


def test_infinities_are_at_the_ends_and_nan_after_them() -> None:
    scores = np.array([[np.nan, -np.inf, 0.5, np.inf]], np.float32)
    assert classify(scores, "FP32", 4, ()).tolist() == [[b"inf:3", b"0.500000:2", b"-inf:1", b"nan:0"]]


def test_a_class_without_a_label_has_none() -> None:
    assert classify(np.array([[3, 2, 1]], np.int8), "INT8", 3, ("a", "")).tolist() == [[b"3:0:a", b"2:1", b"1:2"]]


@pytest.mark.parametrize("datatype", ["BOOL", "FP16", "BF16", "BYTES"])
def test_datatypes_that_triton_does_not_rank_are_refused(datatype: str) -> None:
    with refusal(f"class result not available for output due to unsupported type '{datatype}'"):
        classify(array_of([EXTREMES[datatype][0]], datatype), datatype, 1, ())


def test_over_a_million_classes_are_refused() -> None:
    with refusal("classification output tensor too large"):
        classify(np.zeros((1, 1_000_001), np.uint8), "UINT8", 1, ())
    assert classify(np.zeros((1, 1_000_000), np.uint8), "UINT8", 1, ()).tolist() == [[b"0:0"]]


def test_a_spec_has_the_protocols_shape() -> None:
    spec = TensorSpec(name="image", datatype="UINT8", shape=("batch", 1, 28, 28))
    assert (spec.dims(), spec.shape_text(), spec.dtype) == ((-1, 1, 28, 28), "[batch,1,28,28]", np.uint8)


@pytest.mark.parametrize("datatype", DATATYPES)
@pytest.mark.parametrize("padding", [0, 2])
def test_requests_that_are_alike_become_one(datatype: str, padding: int) -> None:
    row = array_of([EXTREMES[datatype][0]], datatype)  # [1,n]
    one, two = Layout.of({"x": row}), Layout.of({"x": np.concatenate([row, row])})
    assert (one.rows, two.rows, one.row) == (1, 2, two.row)
    joined = one.joined([[row, np.concatenate([row, row])]], 3, padding)["x"]
    assert joined.dtype == row.dtype
    assert np.array_equal(joined[:3], np.concatenate([row] * 3))
    assert joined[3:].shape == (padding, *row.shape[1:])
    assert not joined[3:].any()


def test_bytes_and_arrays_are_the_same_to_a_layout() -> None:
    arrays = {"a": np.array([[1, 2]], "<u2"), "b": np.array([[3.0]], "<f4")}
    layout = Layout([("a", np.dtype("<u2"), (1, 2)), ("b", np.dtype("<f4"), (1, 1))])
    assert (layout.nbytes, layout.row) == (8, Layout.of(arrays).row)
    buffers = (b"\x01\x00\x02\x00", memoryview(b"\x00\x00\x40\x40"))
    columns = list(zip(buffers, arrays.values(), strict=True))
    for found in (layout.arrays(buffers), layout.arrays(tuple(arrays.values()))):
        assert {name: array.tolist() for name, array in found.items()} == {"a": [[1, 2]], "b": [[3.0]]}
    joined = layout.joined(columns, 2, 0)
    assert {name: array.tolist() for name, array in joined.items()} == {"a": [[1, 2]] * 2, "b": [[3.0]] * 2}


def test_texts_take_as_many_bytes_as_they_have() -> None:
    texts = array_of([b"four", b"", b"x" * 1000], "BYTES")
    assert Layout.of({"x": texts, "y": np.zeros(5, np.uint8)}).nbytes == texts.nbytes + 1004 + 5


@pytest.mark.parametrize(
    "other",
    [{"x": np.zeros((1, 3), np.uint8)}, {"x": np.zeros((1, 2), np.int8)}, {"y": np.zeros((1, 2), np.uint8)}],
)
def test_what_differs_in_more_than_its_rows_is_not_alike(other: dict[str, Array]) -> None:
    assert Layout.of(other).row != Layout.of({"x": np.zeros((1, 2), np.uint8)}).row
