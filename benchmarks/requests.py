"""What a load consists of: requests of the Open Inference Protocol, and how their answers are judged."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from protos import open_inference as pb
from serving.tensors import DATATYPES, Array

TOLERANCE = 1e-3  # absolute and relative; batches of other sizes may be computed in another order


@dataclass(frozen=True)
class Exchange:
    """A request, and what its answer must be."""

    request: bytes  # a ModelInferRequest
    expected: bytes | None = None  # the first output's raw bytes; None where any answer will do
    datatype: str = "FP32"  # the first output's

    def right(self, answer: bytes) -> bool:
        """Whether `answer`, a ModelInferResponse, has the expected first output, within `TOLERANCE`."""
        if self.expected is None:
            return True
        raw = pb.ModelInferResponse.FromString(answer).raw_output_contents
        if not raw or len(raw[0]) != len(self.expected):
            return False
        dtype = DATATYPES[self.datatype]
        got, want = np.frombuffer(raw[0], dtype), np.frombuffer(self.expected, dtype)
        return np.allclose(got, want, TOLERANCE, TOLERANCE)


def infer_request(model: str, inputs: dict[str, tuple[str, Array]]) -> bytes:
    """A ModelInferRequest of raw tensors; `inputs` has each one's datatype and array by name."""
    request = pb.ModelInferRequest(model_name=model)
    for name, (datatype, array) in inputs.items():
        request.inputs.add(name=name, datatype=datatype, shape=array.shape)
        request.raw_input_contents.append(array.tobytes())
    return request.SerializeToString()


def random_requests(metadata: pb.ModelMetadataResponse, rows: int, count: int, seed: int = 0) -> list[bytes]:
    """`count` different requests of `rows` rows for a model; axes of any length are `rows` if first, else 1.

    Raises:
        ValueError: an input's datatype is not a number's.
    """
    generator = np.random.default_rng(seed)
    requests = []
    for _ in range(count):
        inputs: dict[str, tuple[str, Array]] = {}
        for tensor in metadata.inputs:
            if tensor.datatype == "BYTES":
                raise ValueError(f"input {tensor.name}: got datatype BYTES, want numbers")
            shape = [axis if axis >= 0 else rows if place == 0 else 1 for place, axis in enumerate(tensor.shape)]
            dtype = DATATYPES[tensor.datatype]
            array: Array = generator.random(shape) * (256 if tensor.datatype == "UINT8" else 1)
            inputs[tensor.name] = (tensor.datatype, array.astype(dtype))
        requests.append(infer_request(metadata.name, inputs))
    return requests
