"""Tensors as the wire and the bundle name them: datatypes of the Open Inference Protocol, shapes with named axes.

Raw bytes become arrays here and arrays raw bytes; `serving.wire` does the same for whole requests and answers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict

from serving.errors import InvalidArgument

Array = npt.NDArray[np.generic]

# https://github.com/kserve/open-inference-protocol: the tensor datatypes, and what holds their elements here.
DATATYPES: dict[str, np.dtype[np.generic]] = {
    "BOOL": np.dtype(np.bool_),
    "UINT8": np.dtype(np.uint8),
    "UINT16": np.dtype("<u2"),
    "UINT32": np.dtype("<u4"),
    "UINT64": np.dtype("<u8"),
    "INT8": np.dtype(np.int8),
    "INT16": np.dtype("<i2"),
    "INT32": np.dtype("<i4"),
    "INT64": np.dtype("<i8"),
    "FP16": np.dtype("<f2"),
    "FP32": np.dtype("<f4"),
    "FP64": np.dtype("<f8"),
    # numpy has no bfloat16. Its 16 bits are the upper half of a float32, so widening is exact; encoding rounds to
    # the nearest, ties to even.
    "BF16": np.dtype("<f4"),
    "BYTES": np.dtype(object),  # of bytes
}

# The datatypes that Triton ranks for its `classification` extension.
_RANKED = frozenset(
    {"UINT8", "UINT16", "UINT32", "UINT64", "INT8", "INT16", "INT32", "INT64", "FP32", "FP64"},
)
_MAX_CLASSES = 1_000_000  # Triton's limit: a larger output is not a list of classes


class TensorSpec(BaseModel):
    """Name, datatype and shape of one input or output; an axis of any length has a name instead of a number."""

    model_config = ConfigDict(frozen=True)

    name: str
    datatype: str
    shape: tuple[int | str, ...]

    @property
    def dtype(self) -> np.dtype[np.generic]:
        """The numpy dtype of this tensor's elements."""
        return DATATYPES[self.datatype]

    def accepts(self, shape: tuple[int, ...]) -> bool:
        """Whether a tensor of this shape fits: equal numbers where they are given, anything from 1 up elsewhere."""
        return len(shape) == len(self.shape) and all(
            got == want if isinstance(want, int) else got >= 1 for got, want in zip(shape, self.shape, strict=True)
        )

    def dims(self) -> tuple[int, ...]:
        """The shape as the protocol has it: -1 for an axis of any length."""
        return tuple(axis if isinstance(axis, int) else -1 for axis in self.shape)

    def shape_text(self) -> str:
        """The shape as messages show it: `[batch,1,28,28]`."""
        return shape_text(self.shape)


Buffer: TypeAlias = bytes | memoryview | Array


class Layout:
    """What the inputs of a request are, but for their contents.

    The contents are buffers, one for each input in this order: bytes as they came cost less than arrays of them.
    """

    __slots__ = ("_inputs", "nbytes", "row", "rows")

    def __init__(self, inputs: Sequence[tuple[str, np.dtype[np.generic], tuple[int, ...]]]) -> None:
        """Of inputs with these names, dtypes and shapes."""
        self._inputs = tuple(inputs)
        self.nbytes = sum(dtype.itemsize * math.prod(shape) for _, dtype, shape in inputs)
        self.rows = inputs[0][2][0] if inputs and inputs[0][2] else 1  # the length of the first axis
        self.row = tuple((name, dtype, shape[1:]) for name, dtype, shape in inputs)  # alike: may be joined

    @classmethod
    def of(cls, arrays: Mapping[str, Array]) -> Layout:
        """That of arrays, which are then the buffers."""
        layout = cls([(name, array.dtype, array.shape) for name, array in arrays.items()])
        texts = [array.ravel().tolist() for array in arrays.values() if array.dtype.hasobject]
        layout.nbytes += sum(sum(map(len, each)) for each in texts)
        return layout

    def arrays(self, buffers: Sequence[Buffer]) -> dict[str, Array]:
        """A request's inputs."""
        return {
            name: buffer if isinstance(buffer, np.ndarray) else np.ndarray(shape, dtype, buffer)
            for (name, dtype, shape), buffer in zip(self._inputs, buffers, strict=True)
        }

    def joined(self, columns: Sequence[Sequence[Buffer]], rows: int, padding: int) -> dict[str, Array]:
        """The inputs of several requests that are alike, one after the other.

        Args:
            columns: for each input the requests' buffers.
            rows: of all of them.
            padding: rows of zeros that follow.
        """
        joined = {}
        for (name, dtype, shape), buffers in zip(self.row, columns, strict=True):
            if dtype.hasobject:
                joined[name] = np.concatenate([*map(np.asarray, buffers), np.zeros((padding, *shape), dtype)])
            else:  # a tenth of the time for bytes, and numpy would let go of the interpreter's lock for every one
                zeros = bytes(padding * math.prod(shape) * dtype.itemsize)
                whole = b"".join([*buffers, zeros])  # type: ignore[list-item]  # arrays are buffers too
                joined[name] = np.ndarray((rows + padding, *shape), dtype, whole)
        return joined


def shape_text(shape: tuple[int | str, ...]) -> str:
    """A shape as messages show it: `[2,1,28,28]`."""
    return f"[{','.join(map(str, shape))}]"


class Origin(NamedTuple):
    """Which tensor a message is about."""

    role: Literal["input", "output"]
    name: str
    model: str

    def __str__(self) -> str:
        """As Triton's messages name it: `input 'image' for model 'mnist'`."""
        return f"{self.role} '{self.name}' for model '{self.model}'"


def element_bytes(datatype: str) -> int:
    """The width of one element on the wire, in bytes; BYTES has none of its own."""
    return 2 if datatype == "BF16" else DATATYPES[datatype].itemsize


def decode(raw: bytes | memoryview, datatype: str, shape: tuple[int, ...], origin: Origin) -> Array:
    """Raw contents as an array of `DATATYPES[datatype]`.

    It is read-only and shares the memory of `raw`, except for BF16, which is widened, and BYTES.

    Raises:
        InvalidArgument: the bytes are too few or too many for the shape, or no elements of this datatype.
    """
    count = math.prod(shape)
    if datatype == "BYTES":
        return bytes_array(_split(raw, origin), shape, origin)
    check_byte_size(count * element_bytes(datatype), len(raw), origin)
    if datatype == "BF16":
        return (np.frombuffer(raw, "<u2").astype("<u4") << 16).view("<f4").reshape(shape)
    if datatype == "BOOL":
        octets = np.frombuffer(raw, np.uint8)
        if count and octets.max() > 1:
            raise InvalidArgument(f"unexpected value {octets.max()} in BOOL {origin}, expected 0 or 1")
        return octets.view(np.bool_).reshape(shape)
    return np.frombuffer(raw, DATATYPES[datatype]).reshape(shape)


def encode(array: Array, datatype: str) -> bytes:
    """An array of `DATATYPES[datatype]` as raw contents, in one copy; BYTES elements may be `str` too, sent as UTF-8.

    Raises:
        TypeError: the array is of another dtype; converting it could lose what it holds.
    """
    if datatype == "BYTES":
        return b"".join(map(_with_length, array.ravel().tolist()))
    exact = array.astype(DATATYPES[datatype], casting="equiv", copy=False)
    return _round_to_bf16(exact).tobytes() if datatype == "BF16" else exact.tobytes()


def bytes_array(elements: Sequence[bytes], shape: tuple[int, ...], origin: Origin) -> Array:
    """BYTES elements as an object array; InvalidArgument where their number is not the shape's."""
    if len(elements) != math.prod(shape):
        raise InvalidArgument(
            f"expected {math.prod(shape)} string elements for inference {origin}, got {len(elements)}"
        )
    array = np.empty(len(elements), dtype=object)
    array[:] = elements
    return array.reshape(shape)


def check_byte_size(expected: int, got: int, origin: Origin) -> None:
    """Raise InvalidArgument unless a tensor has as many bytes as its shape needs."""
    if got != expected:
        raise InvalidArgument(f"{origin.role} byte size mismatch for {origin}. Expected {expected}, got {got}")


def classify(scores: Array, datatype: str, count: int, labels: Sequence[str]) -> Array:
    """The best classes of each row, as Triton's `classification` extension writes them.

    Args:
        scores: [batch, ...]; all of a row's elements are its classes.
        datatype: the datatype of `scores`.
        count: how many classes are wanted, at least 1.
        labels: the classes' names by index; those without one are written without.

    Returns:
        BYTES [batch, min(count, classes)]: `score:index` or `score:index:label`, highest first, the lower index first
        among equals, NaN last; real scores have six decimals.

    Raises:
        InvalidArgument: scores of this datatype are not ranked, or a row has over a million.
    """
    if datatype not in _RANKED:
        raise InvalidArgument(f"class result not available for output due to unsupported type '{datatype}'")
    rows = scores.reshape(len(scores), math.prod(scores.shape[1:]))
    if rows.shape[1] > _MAX_CLASSES:
        raise InvalidArgument("classification output tensor too large")
    # A stable ascending sort of the reversed order: -x for reals; ~x for integers, whose smallest has no negative.
    reversing = np.negative if rows.dtype.kind == "f" else np.invert
    order = np.argsort(reversing(rows), axis=1, kind="stable")[:, :count]
    best = np.take_along_axis(rows, order, axis=1)
    texts = [
        _class_text(score, index, labels)
        for score, index in zip(best.ravel().tolist(), order.ravel().tolist(), strict=True)
    ]
    ranked = np.empty(len(texts), dtype=object)
    ranked[:] = texts
    return ranked.reshape(order.shape)


def _class_text(score: float | int, index: int, labels: Sequence[str]) -> bytes:
    text = f"{score:f}:{index}" if isinstance(score, float) else f"{score}:{index}"
    label = labels[index] if index < len(labels) else ""
    return (f"{text}:{label}" if label else text).encode()


def _split(raw: bytes | memoryview, origin: Origin) -> list[bytes]:
    """The elements of raw BYTES contents: each is its length as uint32, little-endian, and that many bytes."""
    elements = []
    offset, end = 0, len(raw)
    while offset < end:
        if end - offset < 4:
            raise InvalidArgument(
                f"incomplete string length indicator for inference {origin}, "
                f"expecting 4 bytes but only {end - offset} bytes available."
            )
        length = int.from_bytes(raw[offset : offset + 4], "little")
        offset += 4
        if end - offset < length:
            raise InvalidArgument(
                f"incomplete string data for inference {origin}, "
                f"expecting string of length {length} but only {end - offset} bytes available."
            )
        elements.append(bytes(raw[offset : offset + length]))
        offset += length
    return elements


def _with_length(element: bytes | str) -> bytes:
    data = element.encode() if isinstance(element, str) else element
    return len(data).to_bytes(4, "little") + data


def _round_to_bf16(array: Array) -> npt.NDArray[np.uint16]:
    """The upper 16 bits of float32 elements, rounded to nearest even; a NaN stays one."""
    bits = np.ascontiguousarray(array).view("<u4")
    rounded = (bits + (((bits >> 16) & 1) + 0x7FFF)) >> 16
    # Rounding could carry a NaN's bits over into an infinity or a zero.
    return np.where(np.isnan(array), (bits >> 16) | 0x40, rounded).astype("<u2")
