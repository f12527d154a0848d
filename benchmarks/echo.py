"""The bound: what gRPC itself costs in Python. A server that parses every request, answers zeros, and runs no model.

grpc.aio on uvloop, one process, one coroutine a request, protobuf objects in and out, answers as large as the model's.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import AsyncIterator
from typing import Any

import grpc

from benchmarks.calls import new_loop
from protos import open_inference as pb
from serving.tensors import DATATYPES

Outputs = list[tuple[str, str, int]]  # name, datatype, elements a row
_MESSAGE_BYTES = 64 << 20


def _answer(request: pb.ModelInferRequest, outputs: Outputs) -> pb.ModelInferResponse:
    rows = request.inputs[0].shape[0]
    response = pb.ModelInferResponse(model_name=request.model_name, model_version="1", id=request.id)
    for name, datatype, elements in outputs:
        response.outputs.add(name=name, datatype=datatype, shape=[rows, elements])
        response.raw_output_contents.append(bytes(rows * elements * DATATYPES[datatype].itemsize))
    return response


async def serve(port: int, outputs: Outputs) -> None:
    """Answer on 127.0.0.1 until the process is ended."""

    async def infer(request: pb.ModelInferRequest, _: Any) -> pb.ModelInferResponse:
        return _answer(request, outputs)

    async def stream(
        requests: AsyncIterator[pb.ModelInferRequest], _: Any
    ) -> AsyncIterator[pb.ModelStreamInferResponse]:
        async for request in requests:
            yield pb.ModelStreamInferResponse(infer_response=_answer(request, outputs))

    one, many = pb.RPCS["ModelInfer"], pb.RPCS["ModelStreamInfer"]
    handlers: dict[str, grpc.RpcMethodHandler[Any, Any]] = {
        one.name: grpc.unary_unary_rpc_method_handler(
            infer, request_deserializer=one.request.FromString, response_serializer=one.response.SerializeToString
        ),
        many.name: grpc.stream_stream_rpc_method_handler(
            stream, request_deserializer=many.request.FromString, response_serializer=many.response.SerializeToString
        ),
    }
    server = grpc.aio.server(options=[("grpc.max_receive_message_length", _MESSAGE_BYTES)])
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(pb.SERVICE, handlers),))
    server.add_insecure_port(f"127.0.0.1:{port}")
    await server.start()
    await server.wait_for_termination()


def main() -> int:
    """Serve until the process is ended."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.echo", description=__doc__.splitlines()[0])
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--output", action="append", required=True, metavar="NAME:DATATYPE:ELEMENTS", help="in a row")
    options = parser.parse_args()
    outputs = []
    for output in options.output:
        name, datatype, elements = output.split(":")
        outputs.append((name, datatype, int(elements)))
    with asyncio.Runner(loop_factory=new_loop) as runner:
        runner.run(serve(options.port, outputs))
    return 0


if __name__ == "__main__":
    sys.exit(main())
