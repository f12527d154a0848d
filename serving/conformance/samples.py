"""Valid inputs for a model of which only the signature is known."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from protos import open_inference as pb
from serving.tensors import DATATYPES, Array
from serving.wire import CONTENTS_FIELD

_SEED = 3


class Recipe(NamedTuple):
    """How inputs are made that a signature leaves open."""

    axis: int  # the length of axes of any length, the first one excepted
    limit: int  # whole numbers are smaller


# In this order until the model takes one: it may read numbers as indexes into a small table, or need a picture of some
# size where its signature says any.
RECIPES = tuple(Recipe(axis, limit) for axis in (1, 2, 32, 224) for limit in (128, 2))


def make(inputs: Sequence[pb.ModelMetadataResponse.TensorMetadata], recipe: Recipe, rows: int = 1) -> dict[str, Array]:
    """One array for each input, of the dtype of its datatype; the same ones for the same arguments.

    Args:
        inputs: from the model's metadata, of known datatypes.
        recipe: what the signature leaves open.
        rows: the length of the first axis where that may be any.
    """
    generator = np.random.default_rng(_SEED)
    arrays = {}
    for tensor in inputs:
        open_axes = [rows if index == 0 else recipe.axis for index in range(len(tensor.shape))]
        shape = tuple(size if axis < 0 else axis for axis, size in zip(tensor.shape, open_axes, strict=True))
        arrays[tensor.name] = _elements(generator, tensor.datatype, shape, recipe.limit)
    return arrays


def _elements(generator: np.random.Generator, datatype: str, shape: tuple[int, ...], limit: int) -> Array:
    dtype = DATATYPES[datatype]
    if dtype.kind == "f":
        return generator.random(shape, np.float32).astype(dtype)
    if dtype.kind == "b":
        return generator.integers(0, 2, shape).astype(dtype)
    numbers = generator.integers(0, limit, shape)
    if datatype != "BYTES":
        return numbers.astype(dtype)
    texts = np.empty(numbers.size, dtype=object)
    texts[:] = [b"%d" % number for number in numbers.ravel().tolist()]
    return texts.reshape(shape)


def with_typed_contents(request: pb.ModelInferRequest, arrays: dict[str, Array]) -> pb.ModelInferRequest:
    """The same request with each element in its typed field, and nothing raw.

    Raises:
        KeyError: FP16 and BF16 have no such field.
    """
    typed = pb.ModelInferRequest()
    typed.CopyFrom(request)
    del typed.raw_input_contents[:]
    for tensor in typed.inputs:
        getattr(tensor.contents, CONTENTS_FIELD[tensor.datatype]).extend(arrays[tensor.name].ravel().tolist())
    return typed


def same(first: dict[str, Array], second: dict[str, Array]) -> bool:
    """Whether two answers hold the same tensors, whatever their order.

    Real numbers may differ by rounding: other batch sizes run other kernels, and some of them in 16 bits.
    """
    return first.keys() == second.keys() and all(_close(first[name], second[name]) for name in first)


def _close(first: Array, second: Array) -> bool:
    if first.shape != second.shape or first.dtype != second.dtype:
        return False
    if first.dtype.kind != "f":
        return bool(np.array_equal(first, second))
    return bool(np.allclose(first, second, rtol=1e-2, atol=1e-5, equal_nan=True))


def rows_of(arrays: dict[str, Array]) -> Iterator[dict[str, Array]]:
    """Each row by itself, still with its first axis."""
    for index in range(len(next(iter(arrays.values())))):
        yield {name: array[index : index + 1] for name, array in arrays.items()}
