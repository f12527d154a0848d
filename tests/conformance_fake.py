"""A server that keeps every rule which the conformance command checks, small enough to break one at a time."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc
import numpy as np
from google.protobuf.message import DecodeError
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from protos import open_inference as pb
from serving import wire
from serving.errors import InvalidArgument, NotFound, RequestError
from serving.services.statuses import to_status
from serving.shared_memory import unknown_region
from serving.tensors import TensorSpec

MODEL = "mixed"
MAX_BATCH = 64
INPUTS = [
    TensorSpec(name="x", datatype="FP32", shape=("batch", 3)),
    TensorSpec(name="n", datatype="UINT8", shape=("batch", 2)),
    TensorSpec(name="s", datatype="BYTES", shape=("batch", 1)),
]
OUTPUTS = [
    TensorSpec(name="scores", datatype="FP32", shape=("batch", 4)),
    TensorSpec(name="text", datatype="BYTES", shape=("batch", 1)),
]


class Fake(grpc.GenericRpcHandler):
    """Each RPC is a method of its name; a RequestError becomes its status."""

    extensions = ("statistics", "model_configuration", "model_repository", "classification", "system_shared_memory")
    missing: frozenset[str] = frozenset()  # RPCs that are not there
    pool = pb.POOL
    health = health_pb2.HealthCheckResponse.SERVING
    healthy = ("", pb.SERVICE)
    reflected = (pb.SERVICE,)

    def __init__(self):
        self.stats = pb.ModelStatistics(name=MODEL, version="1", last_inference=1_700_000_000_000)

    def service(self, details):
        rpc = pb.RPCS.get(details.method.rpartition("/")[2])
        if rpc is None or rpc.path != details.method or rpc.name in self.missing:
            return None
        if rpc.request_streaming:
            return grpc.stream_stream_rpc_method_handler(
                self.ModelStreamInfer, rpc.request.FromString, lambda answer: answer.SerializeToString()
            )

        def answer(data, context):
            try:
                return getattr(self, rpc.name)(self.parse(rpc, data))
            except RequestError as error:
                context.abort(*to_status(error, dict))

        return grpc.unary_unary_rpc_method_handler(answer, None, lambda answer: answer.SerializeToString())

    def parse(self, rpc, data):
        try:
            return rpc.request.FromString(data)
        except DecodeError as error:
            raise InvalidArgument("not a request") from error

    def find(self, name, version=""):
        if name != MODEL:
            raise NotFound(f"Request for unknown model: '{name}' is not found")
        if version and not version.isdigit():
            raise InvalidArgument(f"failed to get model version from specified version string '{version}'")
        if version not in ("", "1"):
            raise NotFound(f"Request for unknown model: '{name}' version {version} is not found")

    # Health and metadata

    def ServerLive(self, request):
        return pb.ServerLiveResponse(live=True)

    def ServerReady(self, request):
        return pb.ServerReadyResponse(ready=True)

    def ModelReady(self, request):
        return pb.ModelReadyResponse(ready=request.name == MODEL and request.version in ("", "1"))

    def ServerMetadata(self, request):
        return pb.ServerMetadataResponse(name="fake", version="1.0", extensions=self.extensions)

    def ModelMetadata(self, request):
        self.find(request.name, request.version)
        answer = pb.ModelMetadataResponse(name=MODEL, versions=["1"], platform="fake")
        for listed, specs in ((answer.inputs, INPUTS), (answer.outputs, OUTPUTS)):
            for spec in specs:
                listed.add(name=spec.name, datatype=spec.datatype, shape=spec.dims())
        return answer

    # Inference

    def compute(self, arrays):
        scores = np.concatenate([2 * arrays["x"], arrays["n"].sum(axis=1, keepdims=True) / 9], axis=1)
        text = np.array([[element[::-1] for element in row] for row in arrays["s"]], dtype=object)
        return {"scores": scores.astype(np.float32), "text": text}

    def decode(self, request):
        return wire.decode_inputs(request, INPUTS, MAX_BATCH, unknown_region)

    def requested(self, request):
        return wire.requested_outputs(request, OUTPUTS)

    def ModelInfer(self, request):
        started = time.perf_counter_ns()
        self.find(request.model_name, request.model_version)
        requested = self.requested(request)
        arrays = self.decode(request)
        answer = pb.ModelInferResponse(model_name=MODEL, model_version="1", id=request.id)
        wire.encode_outputs(answer, requested, self.compute(arrays), OUTPUTS, {"scores": ["a", "b"]}, MAX_BATCH)
        self.count(len(arrays["x"]), time.perf_counter_ns() - started)
        return answer

    def ModelStreamInfer(self, requests, context):
        for request in requests:
            try:
                yield pb.ModelStreamInferResponse(infer_response=self.ModelInfer(request))
            except RequestError as error:
                yield pb.ModelStreamInferResponse(
                    error_message=str(error), infer_response=pb.ModelInferResponse(id=request.id)
                )

    # Statistics

    def count(self, rows, ns):
        stats = self.stats
        stats.last_inference = time.time_ns() // 1_000_000
        stats.inference_count += rows
        stats.execution_count += 1
        for name in ("success", "queue", "compute_input", "compute_infer", "compute_output"):
            duration = getattr(stats.inference_stats, name)
            duration.count += 1
            duration.ns += ns if name == "success" else ns // 5
        entry = next((entry for entry in stats.batch_stats if entry.batch_size == rows), None)
        entry = stats.batch_stats.add(batch_size=rows) if entry is None else entry
        entry.compute_infer.count += 1

    def ModelStatistics(self, request):
        if request.name:
            self.find(request.name, request.version)
        return pb.ModelStatisticsResponse(model_stats=[self.stats])

    # The other extensions

    def ModelConfig(self, request):
        self.find(request.name, request.version)
        config = pb.ModelConfig(name=MODEL, max_batch_size=MAX_BATCH)
        for listed, specs in ((config.input, INPUTS), (config.output, OUTPUTS)):
            for spec in specs:
                kind = "STRING" if spec.datatype == "BYTES" else spec.datatype
                listed.add(name=spec.name, data_type=pb.DataType.Value(f"TYPE_{kind}"), dims=spec.dims()[1:])
        return pb.ModelConfigResponse(config=config)

    def RepositoryIndex(self, request):
        answer = pb.RepositoryIndexResponse()
        answer.models.add(name=MODEL, version="1", state="READY")
        if not request.ready:
            answer.models.add(name="rested", version="1", state="UNAVAILABLE", reason="unloaded")
        return answer

    def RepositoryModelLoad(self, request):
        self.find(request.model_name)

    def RepositoryModelUnload(self, request):
        self.find(request.model_name)

    def SystemSharedMemoryStatus(self, request):
        return pb.SystemSharedMemoryStatusResponse()

    def SystemSharedMemoryUnregister(self, request):
        return pb.SystemSharedMemoryUnregisterResponse()

    def CudaSharedMemoryStatus(self, request):
        return pb.CudaSharedMemoryStatusResponse()

    def CudaSharedMemoryUnregister(self, request):
        return pb.CudaSharedMemoryUnregisterResponse()

    def TraceSetting(self, request):
        return pb.TraceSettingResponse()

    def LogSettings(self, request):
        answer = pb.LogSettingsResponse()
        answer.settings["log_info"].bool_param = True
        return answer


@contextlib.contextmanager
def serving(fake: Fake) -> Iterator[str]:
    """Serve it on a free port until the block ends; gives the address."""
    options = [("grpc.so_reuseport", 0), ("grpc.max_receive_message_length", -1)]
    server = grpc.server(ThreadPoolExecutor(4), options=options)
    server.add_generic_rpc_handlers([fake])
    servicer = health.HealthServicer()
    for service in fake.healthy:
        servicer.set(service, fake.health)
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    reflection.enable_server_reflection(fake.reflected, server, fake.pool)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        server.stop(None).wait()
