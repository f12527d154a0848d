"""Open Inference Protocol requests and answers to numpy arrays and back.

The rules are the protocol's, and the texts Triton's, whose clients look for some of them:
https://github.com/triton-inference-server/server (src/grpc/infer_handler.h) and core (src/infer_request.cc).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from protos import open_inference as pb
from serving.errors import InvalidArgument
from serving.shared_memory import ReadRegion, Region, WriteRegion, region_of, unknown_region
from serving.tensors import (
    DATATYPES,
    Array,
    Origin,
    TensorSpec,
    bytes_array,
    check_byte_size,
    classify,
    decode,
    element_bytes,
    encode,
    shape_text,
)

# The datatypes that each field of InferTensorContents holds. Triton's messages name the first where none fits.
_CONTENTS: dict[str, tuple[str, ...]] = {
    "bool_contents": ("BOOL",),
    "int_contents": ("INT32", "INT16", "INT8"),
    "int64_contents": ("INT64",),
    "uint_contents": ("UINT32", "UINT16", "UINT8"),
    "uint64_contents": ("UINT64",),
    "fp32_contents": ("FP32",),
    "fp64_contents": ("FP64",),
    "bytes_contents": ("BYTES",),
}
CONTENTS_FIELD = {datatype: field for field, datatypes in _CONTENTS.items() for datatype in datatypes}

_MAX_RANK = 32  # what every numpy can hold
_MAX_AXIS = 2**31 - 1


class Requested(NamedTuple):
    """One output that a request wants."""

    name: str
    classes: int  # how many of the best classes, in place of the scores; 0 for the scores
    region: Region | None  # where the elements go; None for into the answer


_Tensor = pb.ModelInferRequest.InferInputTensor | pb.ModelInferResponse.InferOutputTensor


def parameter(value: pb.InferParameter) -> bool | int | str | float | None:
    """A parameter's value in its own type; None when it is not set."""
    choice = value.WhichOneof("parameter_choice")
    chosen: bool | int | str | float | None = getattr(value, choice) if choice else None
    return chosen


def decode_inputs(
    request: pb.ModelInferRequest,
    specs: Sequence[TensorSpec],
    max_batch_size: int,
    read_region: ReadRegion = unknown_region,
) -> dict[str, Array]:
    """A request's inputs as arrays that fit the model's signature.

    Args:
        request: from a client; nothing about it is trusted.
        specs: the inputs that the model takes.
        max_batch_size: how many rows the first axis of every input may have, the same for all; 0 for a model whose
            first axis is no batch axis.
        read_region: gives the bytes of an input that is in shared memory.

    Returns:
        One array for each of `specs`, of its dtype; read-only where it shares the request's memory.

    Raises:
        InvalidArgument: the request breaks the protocol or does not fit the signature.
    """
    model = request.model_name
    _check_names([tensor.name for tensor in request.inputs], specs, model)
    by_name = {spec.name: spec for spec in specs}
    shapes = {tensor.name: _check_signature(tensor, by_name[tensor.name], model) for tensor in request.inputs}
    if max_batch_size:
        _check_batch(shapes, max_batch_size, model)
    _check_axes(shapes, specs, model)
    raw = request.raw_input_contents
    used = 0  # inputs in shared memory have no raw entry
    arrays = {}
    for tensor in request.inputs:
        origin = Origin("input", tensor.name, model)
        shape = shapes[tensor.name]
        if (region := region_of(tensor)) is None:
            arrays[tensor.name] = _elements(tensor, shape, raw, used, origin)
            used += 1
            continue
        if tensor.HasField("contents"):
            raise InvalidArgument(
                f"unexpected 'content' provided when using shared memory for input tensor {_of(tensor.name, model)}"
            )
        arrays[tensor.name] = decode(read_region(region), tensor.datatype, shape, origin)
    if len(raw) > used:
        raise InvalidArgument(
            f"unexpected raw_input_contents for model '{model}': got {len(raw)} entries for {used} inputs"
        )
    return arrays


def requested_outputs(request: pb.ModelInferRequest, specs: Sequence[TensorSpec]) -> list[Requested]:
    """The outputs that a request wants, in its order; every one of `specs` when it names none.

    Raises:
        InvalidArgument: an output is unknown, named twice, or has parameters that say nothing possible.
    """
    known = {spec.name for spec in specs}
    requested: dict[str, Requested] = {}
    for output in request.outputs:
        if output.name not in known:
            raise InvalidArgument(f"unexpected inference output '{output.name}' for model '{request.model_name}'")
        if output.name in requested:
            raise InvalidArgument(f"output '{output.name}' already exists in request")
        wanted = Requested(output.name, _classes(output), region_of(output))
        if wanted.classes and wanted.region:
            raise InvalidArgument("output can't set both 'shared_memory_region' and 'classification'")
        requested[output.name] = wanted
    return list(requested.values()) or [Requested(spec.name, classes=0, region=None) for spec in specs]


def encode_outputs(
    response: pb.ModelInferResponse,
    requested: Sequence[Requested],
    arrays: Mapping[str, Array],
    specs: Sequence[TensorSpec],
    labels: Mapping[str, Sequence[str]],
    max_batch_size: int,
    write_region: WriteRegion = unknown_region,
) -> None:
    """Add the outputs that a request wants to its answer, all of them raw.

    Args:
        response: gets the tensors.
        requested: from `requested_outputs`.
        arrays: what the model gave, by output, of the specs' dtypes.
        specs: the outputs that the model gives.
        labels: the classes' names for the outputs that have them.
        max_batch_size: 0 for a model whose first axis is no batch axis: its classes are not ranked row by row.
        write_region: takes the bytes of an output that is wanted in shared memory.

    Raises:
        InvalidArgument: classes of an output that has none, or a region too small for an output.
    """
    datatypes = {spec.name: spec.datatype for spec in specs}
    for wanted in requested:
        array, datatype = arrays[wanted.name], datatypes[wanted.name]
        if wanted.classes:
            rows = array if max_batch_size else array[np.newaxis]
            ranked = classify(rows, datatype, wanted.classes, labels.get(wanted.name, ()))
            array, datatype = ranked if max_batch_size else ranked[0], "BYTES"
        data = encode(array, datatype)
        tensor = response.outputs.add(name=wanted.name, datatype=datatype, shape=array.shape)
        if wanted.region is None:
            response.raw_output_contents.append(data)
            continue
        if len(data) > wanted.region.byte_size:
            raise InvalidArgument(
                f"shared memory size specified with the request for output '{wanted.name}' "
                f"({wanted.region.byte_size} bytes) should be at least {len(data)} bytes to hold the results"
            )
        write_region(wanted.region, data)
        tensor.parameters["shared_memory_region"].string_param = wanted.region.name
        tensor.parameters["shared_memory_byte_size"].int64_param = len(data)
        response.raw_output_contents.append(b"")


def encode_input(request: pb.ModelInferRequest, name: str, datatype: str, array: Array) -> None:
    """Add an array of `DATATYPES[datatype]` to a request, raw.

    Raises:
        TypeError: the array is of another dtype.
    """
    data = encode(array, datatype)
    request.inputs.add(name=name, datatype=datatype, shape=array.shape)
    request.raw_input_contents.append(data)


def decode_outputs(response: pb.ModelInferResponse) -> dict[str, Array]:
    """An answer's outputs as arrays, raw or not, in its order; those in shared memory are left out.

    Raises:
        InvalidArgument: the answer breaks the protocol.
    """
    arrays = {}
    for index, tensor in enumerate(response.outputs):
        origin = Origin("output", tensor.name, response.model_name)
        if tensor.datatype not in DATATYPES:
            raise InvalidArgument(f"unknown datatype '{tensor.datatype}' of {origin}")
        shape = tuple(tensor.shape)
        if len(shape) > _MAX_RANK or not all(0 <= axis <= _MAX_AXIS for axis in shape):
            raise InvalidArgument(f"unexpected shape for {origin}: got {shape_text(shape)}")
        if region_of(tensor) is None:
            arrays[tensor.name] = _elements(tensor, shape, response.raw_output_contents, index, origin)
    return arrays


def _check_names(names: Sequence[str], specs: Sequence[TensorSpec], model: str) -> None:
    """Every input of the model once, and nothing else."""
    known = [spec.name for spec in specs]
    for index, name in enumerate(names):
        if name in names[:index]:
            raise InvalidArgument(f"input '{name}' already exists in request")
        if name not in known:
            raise InvalidArgument(f"unexpected inference input '{name}' for model '{model}'")
    if missing := [name for name in known if name not in names]:
        raise InvalidArgument(
            f"expected {len(known)} inputs but got {len(names)} inputs for model '{model}'. "
            f"Got input(s) {_quoted(names)}, but missing required input(s) {_quoted(missing)}. "
            "Please provide all required input(s)."
        )


def _quoted(names: Sequence[str]) -> str:
    return "[" + ",".join(f"'{name}'" for name in names) + "]"


def _of(name: str, model: str) -> str:
    return f"'{name}' for model '{model}'"


def _check_signature(tensor: pb.ModelInferRequest.InferInputTensor, spec: TensorSpec, model: str) -> tuple[int, ...]:
    """The tensor's shape, when it and the datatype are the model's."""
    if tensor.datatype != spec.datatype:
        raise InvalidArgument(
            f"inference input '{tensor.name}' data-type is '{tensor.datatype}', "
            f"but model '{model}' expects '{spec.datatype}'"
        )
    shape = tuple(tensor.shape)
    if not spec.accepts(shape):
        raise InvalidArgument(
            f"unexpected shape for input {_of(tensor.name, model)}. "
            f"Expected {shape_text(spec.dims())}, got {shape_text(shape)}. "  # the space at the end is Triton's
        )
    return shape


def _check_batch(shapes: Mapping[str, tuple[int, ...]], max_batch_size: int, model: str) -> None:
    """As many rows in one input as in the others, and no more than the model takes."""
    sizes = {name: shape[0] for name, shape in shapes.items()}
    for name, size in sizes.items():
        if size != next(iter(sizes.values())):
            raise InvalidArgument(f"input '{name}' batch size does not match other inputs for '{model}'")
        if size > max_batch_size:
            raise InvalidArgument(f"inference request batch-size must be <= {max_batch_size} for '{model}'")


def _check_axes(shapes: Mapping[str, tuple[int, ...]], specs: Sequence[TensorSpec], model: str) -> None:
    """Axes of one name have one length."""
    lengths: dict[str, tuple[int, str]] = {}
    for spec in specs:
        for axis, length in zip(spec.shape, shapes[spec.name], strict=True):
            if not isinstance(axis, str):
                continue
            first, whose = lengths.setdefault(axis, (length, spec.name))
            if length != first:
                raise InvalidArgument(
                    f"unexpected shape for input {_of(spec.name, model)}. "
                    f"Axis {axis} is {length}, but {first} in input '{whose}'"
                )


def _elements(tensor: _Tensor, shape: tuple[int, ...], raw: Sequence[bytes], index: int, origin: Origin) -> Array:
    """A tensor's elements: raw entry `index` where there are raw entries, else its own contents."""
    if tensor.HasField("contents"):
        if raw:
            raise InvalidArgument(
                f"contents field must not be specified when using raw_{origin.role}_contents "
                f"for {_of(origin.name, origin.model)}"
            )
        return _from_contents(tensor.contents, tensor.datatype, shape, origin)
    if index >= len(raw):
        message = "request" if origin.role == "input" else "response"
        raise InvalidArgument(
            f"unable to find data for {origin.role} tensor {_of(origin.name, origin.model)} in {message}."
        )
    return decode(raw[index], tensor.datatype, shape, origin)


def _from_contents(contents: pb.InferTensorContents, datatype: str, shape: tuple[int, ...], origin: Origin) -> Array:
    """Typed contents as an array of `DATATYPES[datatype]`; integers too large for it are refused, never truncated."""
    for field, _ in contents.ListFields():
        if datatype not in _CONTENTS[field.name]:
            raise InvalidArgument(
                f"unexpected explicit tensor data for {origin.role} tensor {_of(origin.name, origin.model)} "
                f"of type '{_CONTENTS[field.name][0]}', expected datatype '{datatype}'"
            )
    # FP16 and BF16 have no field: what passed the loop is empty.
    values = getattr(contents, CONTENTS_FIELD[datatype]) if datatype in CONTENTS_FIELD else ()
    if datatype == "BYTES":
        return bytes_array(values, shape, origin)
    width = element_bytes(datatype)
    check_byte_size(math.prod(shape) * width, len(values) * width, origin)
    dtype = DATATYPES[datatype]
    if dtype.kind not in "iu":
        return np.fromiter(values, dtype, len(values)).reshape(shape)
    wide = np.fromiter(values, np.int64 if dtype.kind == "i" else np.uint64, len(values))
    limits = np.iinfo(dtype.name)
    if outside := wide[(wide < limits.min) | (wide > limits.max)].tolist():
        raise InvalidArgument(
            f"unexpected value {outside[0]} in {datatype} {origin}, expected {limits.min} to {limits.max}"
        )
    return wide.astype(dtype).reshape(shape)


def _classes(output: pb.ModelInferRequest.InferRequestedOutputTensor) -> int:
    """How many classes the `classification` parameter asks for; 0 when it is not there."""
    if "classification" not in output.parameters:
        return 0
    classes = output.parameters["classification"]
    if classes.WhichOneof("parameter_choice") != "int64_param":
        raise InvalidArgument("invalid value type for 'classification' parameter, expected int64_param")
    if classes.int64_param < 1:
        raise InvalidArgument("invalid value for 'classification' parameter, expected >= 1")
    return classes.int64_param
