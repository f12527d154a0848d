"""What a load consists of: requests of the Open Inference Protocol, and how their answers are judged."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from protos import open_inference as pb
from serving.tensors import DATATYPES, Array, TensorSpec
from serving.wire import decode_outputs, encode_input

TOLERANCE = 1e-3  # absolute and relative; batches of other sizes may be computed in another order


@dataclass(frozen=True)
class Exchange:
    """A request, and what its answer must be."""

    request: bytes  # a ModelInferRequest
    expected: Mapping[str, Array] | None = None  # the outputs by name; None where any answer will do

    def right(self, answer: bytes) -> bool:
        """Whether `answer`, a ModelInferResponse, has the expected outputs, within `TOLERANCE`."""
        if self.expected is None:
            return True
        response = pb.ModelInferResponse.FromString(answer)
        if response.raw_output_contents:
            for output in response.outputs:
                output.ClearField("contents")  # MLServer leaves an empty one beside raw contents, against the protocol
        outputs = decode_outputs(response)
        return outputs.keys() == self.expected.keys() and all(
            outputs[name].shape == array.shape and np.allclose(outputs[name], array, TOLERANCE, TOLERANCE)
            for name, array in self.expected.items()
        )


def random_inputs(specs: Sequence[TensorSpec], rows: int, seed: int) -> dict[str, Array]:
    """Noise for a model's inputs, by name: `rows` along a first axis of any length, one along every other such axis.

    Raises:
        ValueError: an input's datatype is not a number's.
    """
    generator = np.random.default_rng(seed)
    inputs: dict[str, Array] = {}
    for spec in specs:
        if spec.datatype == "BYTES":
            raise ValueError(f"input {spec.name}: got datatype BYTES, want numbers")
        shape = [axis if isinstance(axis, int) else rows if not place else 1 for place, axis in enumerate(spec.shape)]
        noise = generator.random(shape) * (256 if spec.datatype == "UINT8" else 1)
        inputs[spec.name] = noise.astype(DATATYPES[spec.datatype])
    return inputs


def infer_request(model: str, specs: Sequence[TensorSpec], inputs: Mapping[str, Array]) -> bytes:
    """A ModelInferRequest with raw tensors."""
    request = pb.ModelInferRequest(model_name=model)
    for spec in specs:
        encode_input(request, spec.name, spec.datatype, inputs[spec.name])
    return request.SerializeToString()
