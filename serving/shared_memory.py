"""Shared memory in place of bytes: which region a tensor of a request or an answer names."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, NoReturn

from protos import open_inference as pb
from serving.errors import InvalidArgument, NotFound


class Region(NamedTuple):
    """A part of registered shared memory that holds a tensor's elements, raw."""

    name: str
    byte_size: int
    offset: int  # in bytes, from the region's start


ReadRegion = Callable[[Region], bytes | memoryview]
WriteRegion = Callable[[Region, bytes], None]

_Tensor = (
    pb.ModelInferRequest.InferInputTensor
    | pb.ModelInferRequest.InferRequestedOutputTensor
    | pb.ModelInferResponse.InferOutputTensor
)

_TYPES = {
    "shared_memory_region": "string_param",
    "shared_memory_byte_size": "int64_param",
    "shared_memory_offset": "int64_param",
}


def unknown_region(region: Region, data: bytes = b"") -> NoReturn:  # noqa: ARG001
    """Read or write a region where none are registered."""
    raise NotFound(f"Unable to find shared memory region: '{region.name}'")


def region_of(tensor: _Tensor) -> Region | None:
    """Where in shared memory a tensor's elements are; None when they are not there.

    Raises:
        InvalidArgument: the tensor's parameters name a region incompletely, or in the wrong types.
    """
    parameters = tensor.parameters
    values = {key: _value(tensor, key) for key in _TYPES if key in parameters} if parameters else {}
    if not values:
        return None
    if "shared_memory_region" not in values:
        raise InvalidArgument(
            f"'{next(iter(values))}' can not be specified without 'shared_memory_region' parameter "
            f"for tensor '{tensor.name}'"
        )
    if "shared_memory_byte_size" not in values:
        raise InvalidArgument(
            "'shared_memory_byte_size' must be specified along with 'shared_memory_region' parameter "
            f"for tensor '{tensor.name}'"
        )
    return Region(
        values["shared_memory_region"], values["shared_memory_byte_size"], values.get("shared_memory_offset", 0)
    )


def _value(tensor: _Tensor, key: str) -> Any:
    parameter = tensor.parameters[key]
    if parameter.WhichOneof("parameter_choice") != _TYPES[key]:
        raise InvalidArgument(
            f"invalid value type for '{key}' parameter for tensor '{tensor.name}', expected {_TYPES[key]}."
        )
    value = getattr(parameter, _TYPES[key])
    if isinstance(value, int) and value < 0:
        raise InvalidArgument(f"invalid value for '{key}' parameter for tensor '{tensor.name}', expected >= 0")
    return value
