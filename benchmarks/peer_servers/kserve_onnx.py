"""An ONNX model on KServe's Python server: one ONNX Runtime thread, on the CPU.

kserve_onnx.py MODEL.ONNX NAME GRPC_PORT HTTP_PORT
"""

import sys

import onnxruntime
from kserve import InferOutput, InferRequest, InferResponse, Model, ModelServer

DATATYPES = {"tensor(float)": "FP32", "tensor(uint8)": "UINT8"}


class OnnxModel(Model):
    def __init__(self, path: str, name: str) -> None:
        super().__init__(name)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        self._session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        self._outputs = [(output.name, DATATYPES[output.type]) for output in self._session.get_outputs()]
        self._names = [name for name, _ in self._outputs]
        self.ready = True

    def predict(self, payload: InferRequest, headers=None, response_headers=None) -> InferResponse:
        arrays = self._session.run(self._names, {tensor.name: tensor.as_numpy() for tensor in payload.inputs})
        outputs = []
        for (name, datatype), array in zip(self._outputs, arrays, strict=True):
            output = InferOutput(name=name, shape=list(array.shape), datatype=datatype)
            output.set_data_from_numpy(array, binary_data=True)
            outputs.append(output)
        return InferResponse(response_id=payload.id, model_name=self.name, infer_outputs=outputs)


if __name__ == "__main__":
    path, name, grpc_port, http_port = sys.argv[1:]
    ModelServer(http_port=int(http_port), grpc_port=int(grpc_port), workers=1).start([OnnxModel(path, name)])
