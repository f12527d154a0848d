"""An ONNX model on PyTriton, with its dynamic batching: one ONNX Runtime thread, on the CPU.

pytriton_onnx.py MODEL.ONNX NAME GRPC_PORT HTTP_PORT METRICS_PORT
"""

import sys

import numpy as np
import onnxruntime
from pytriton.decorators import batch
from pytriton.model_config import DynamicBatcher, ModelConfig, Tensor
from pytriton.triton import Triton, TritonConfig

DTYPES = {"tensor(float)": np.float32, "tensor(uint8)": np.uint8}


def tensors(described) -> list[Tensor]:
    return [Tensor(name=one.name, dtype=DTYPES[one.type], shape=tuple(one.shape[1:])) for one in described]


if __name__ == "__main__":
    path, name, grpc_port, http_port, metrics_port = sys.argv[1:]
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]

    @batch
    def infer(**inputs):
        return dict(zip(names, session.run(names, inputs), strict=True))

    ports = TritonConfig(grpc_port=int(grpc_port), http_port=int(http_port), metrics_port=int(metrics_port))
    with Triton(config=ports) as triton:
        triton.bind(
            model_name=name,
            infer_func=infer,
            inputs=tensors(session.get_inputs()),
            outputs=tensors(session.get_outputs()),
            config=ModelConfig(max_batch_size=1024, batcher=DynamicBatcher()),
        )
        triton.serve()
