"""`inference.GRPCInferenceService`: the Open Inference Protocol with Triton's extensions, for any model's signature."""

from __future__ import annotations

import asyncio
import functools
import time
from collections.abc import AsyncIterator

from protos import open_inference as pb
from serving import __version__, wire
from serving.config import ServerConfig
from serving.control import Control
from serving.errors import InvalidArgument, NotFound, RequestError, Unavailable, Unimplemented
from serving.repository import Repository, ServedModel, State
from serving.services import Context, Pending, ask, in_bytes, in_order, parser
from serving.services.prepared import Awaited, PreparedRequests, Streamed, stream_error
from serving.statistics import Duration, Rpcs, Stages, Statistics
from serving.tensors import TensorSpec
from serving.versions import VersionPolicy

# https://github.com/triton-inference-server/server/tree/main/docs/protocol: the extensions' names.
EXTENSIONS = (
    "classification",
    "model_configuration",
    "model_repository",
    "binary_tensor_data",
    "parameters",
    "statistics",
)

# What Triton calls a model that a backend of ours runs: (platform, backend).
_PLATFORMS = {
    "onnx": ("onnxruntime_onnx", "onnxruntime"),
    "torchscript": ("pytorch_libtorch", "pytorch"),
    "pt2": ("pytorch_libtorch", "pytorch"),
    "aoti": ("torch_aoti", "pytorch"),
}

_parse = parser(pb.ModelInferRequest)

_NO_CONTROL = "explicit model load / unload is not allowed if polling is enabled"  # Triton's text, for none too


class OpenInferenceService:
    """The servicer; see `protos/open_inference.proto` for what each method promises."""

    def __init__(
        self,
        repository: Repository,
        config: ServerConfig,
        rpcs: Rpcs,
        control: Control,
        prepared: PreparedRequests,
    ) -> None:
        self._repository = repository
        self._config = config
        self._rpcs = rpcs
        self._control = control
        self._prepared = prepared
        self._policy = VersionPolicy.parse(config.version_policy)

    async def ServerLive(self, request: pb.ServerLiveRequest, context: Context) -> pb.ServerLiveResponse:
        """True: who answers is alive."""
        return pb.ServerLiveResponse(live=True)

    async def ServerReady(self, request: pb.ServerReadyRequest, context: Context) -> pb.ServerReadyResponse:
        """Whether every model that should be served is."""
        return pb.ServerReadyResponse(ready=self._control.readiness().server)

    async def ModelReady(self, request: pb.ModelReadyRequest, context: Context) -> pb.ModelReadyResponse:
        """Whether a version is served; a model that is not known is not ready."""
        try:
            self._repository.get(request.name, request.version)
        except (NotFound, Unavailable):
            return pb.ModelReadyResponse(ready=False)
        return pb.ModelReadyResponse(ready=self._control.readiness().models.get(request.name, False))

    async def ServerMetadata(self, request: pb.ServerMetadataRequest, context: Context) -> pb.ServerMetadataResponse:
        """The server's name and version, and the extensions that it offers."""
        return pb.ServerMetadataResponse(name=self._config.server_name, version=__version__, extensions=EXTENSIONS)

    async def ModelMetadata(self, request: pb.ModelMetadataRequest, context: Context) -> pb.ModelMetadataResponse:
        """A model's inputs and outputs, and where it really runs."""
        served = self._repository.get(request.name, request.version)
        return pb.ModelMetadataResponse(
            name=served.name,
            versions=[version.version for version in self._repository.versions(served.name)],
            platform=_PLATFORMS[served.backend.name][0],
            inputs=[_tensor_metadata(spec) for spec in served.backend.inputs],
            outputs=[_tensor_metadata(spec) for spec in served.backend.outputs],
            properties=_properties(served),
        )

    async def ModelConfig(self, request: pb.ModelConfigRequest, context: Context) -> pb.ModelConfigResponse:
        """A model's configuration, as Triton's clients read it."""
        served = self._repository.get(request.name, request.version)
        policy = _version_policy(self._policy, self._repository.versions(served.name))
        return pb.ModelConfigResponse(config=_config(served, policy))

    @in_bytes
    async def ModelInfer(self, data: bytes, context: Context) -> bytes:
        """Run a model."""
        until = context.deadline_ns
        if (running := self._prepared.submit(data, until, Awaited)) is not None:
            return await running
        return (await self._infer(data, _parse(data), until)).SerializeToString()

    @in_bytes
    async def ModelStreamInfer(self, requests: AsyncIterator[bytes], context: Context) -> AsyncIterator[bytes]:
        """Run models for many requests at once; an error does not end the stream."""
        until = context.deadline_ns

        def begin(data: bytes) -> Pending[bytes]:
            try:
                waiting = functools.partial(Streamed, data, self._rpcs)
                if (running := self._prepared.submit(data, until, waiting)) is not None:
                    return running
            except RequestError as error:
                refused: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
                refused.set_result(stream_error(_parse(data), error, self._rpcs).SerializeToString())
                return refused
            return asyncio.create_task(self._infer_in_stream(data, _parse(data), until))

        async for response in in_order(requests, begin):
            yield response

    async def _infer_in_stream(self, data: bytes, request: pb.ModelInferRequest, until: float) -> bytes:
        try:
            response = pb.ModelStreamInferResponse(infer_response=await self._infer(data, request, until))
        except Exception as error:
            response = stream_error(request, error, self._rpcs)
        return response.SerializeToString()

    async def _infer(self, data: bytes, request: pb.ModelInferRequest, until: float) -> pb.ModelInferResponse:
        async def question(served: ServedModel) -> tuple[pb.ModelInferResponse, Stages]:
            backend = served.backend
            inputs = wire.decode_inputs(request, backend.inputs, served.max_batch_size)
            wanted = wire.requested_outputs(request, backend.outputs)
            answer = await served.scheduler.infer(inputs, _with_timeout(request, until))
            response = pb.ModelInferResponse(model_name=served.name, model_version=served.version, id=request.id)
            labels = _labels(served)
            wire.encode_outputs(response, wanted, answer.outputs, backend.outputs, labels, served.max_batch_size)
            self._prepared.learn(data, request, served, wanted, response)
            return response, answer

        return await ask(self._repository, request.model_name, request.model_version, question)

    async def ModelStatistics(self, request: pb.ModelStatisticsRequest, context: Context) -> pb.ModelStatisticsResponse:
        """What versions have done since they were loaded: one, all of a model, or all of every model."""
        if request.name:
            models = self._repository.versions(request.name, request.version)
        else:
            models = [status.served for status in self._repository.statuses() if status.served]
        counted = await self._control.statistics()
        return pb.ModelStatisticsResponse(
            model_stats=[
                _statistics(served, counted.get((served.name, served.version), served.statistics)) for served in models
            ]
        )

    async def RepositoryIndex(self, request: pb.RepositoryIndexRequest, context: Context) -> pb.RepositoryIndexResponse:
        """Every version that is known and every other model in the repository, or only the versions that are ready."""
        _check_repository(request.repository_name)
        known = await asyncio.to_thread(self._repository.index)
        index = [status for status in known if status.state is State.READY or not request.ready]
        return pb.RepositoryIndexResponse(
            models=[
                pb.RepositoryIndexResponse.ModelIndex(
                    name=status.name, version=status.version, state=status.state.value, reason=status.reason
                )
                for status in index
            ]
        )

    async def RepositoryModelLoad(
        self, request: pb.RepositoryModelLoadRequest, context: Context
    ) -> pb.RepositoryModelLoadResponse:
        """Load the versions of a model that the policy selects."""
        self._check_control(request.repository_name, request.model_name)
        if request.parameters:
            raise Unimplemented(f"load parameters are not supported: {', '.join(sorted(request.parameters))}")
        await asyncio.shield(self._control.load(request.model_name))  # it ends, whether or not the caller waits
        return pb.RepositoryModelLoadResponse()

    async def RepositoryModelUnload(
        self, request: pb.RepositoryModelUnloadRequest, context: Context
    ) -> pb.RepositoryModelUnloadResponse:
        """Take a model out of service once the requests that wait for it are answered."""
        self._check_control(request.repository_name, request.model_name)
        await asyncio.shield(self._control.unload(request.model_name))
        return pb.RepositoryModelUnloadResponse()

    def _check_control(self, repository_name: str, model_name: str) -> None:
        _check_repository(repository_name)
        if self._config.model_control != "explicit":
            raise Unavailable(_NO_CONTROL)
        if not model_name:
            raise InvalidArgument("Model name cannot be empty")

    # Clients ask for the state of shared memory, and unregister all of it, before they know whether it is offered.

    async def SystemSharedMemoryStatus(
        self, request: pb.SystemSharedMemoryStatusRequest, context: Context
    ) -> pb.SystemSharedMemoryStatusResponse:
        """No region is registered."""
        _check_region(request.name)
        return pb.SystemSharedMemoryStatusResponse()

    async def SystemSharedMemoryRegister(
        self, request: pb.SystemSharedMemoryRegisterRequest, context: Context
    ) -> pb.SystemSharedMemoryRegisterResponse:
        """Not offered."""
        raise Unimplemented("system shared memory is not supported; send the tensors as raw_input_contents")

    async def SystemSharedMemoryUnregister(
        self, request: pb.SystemSharedMemoryUnregisterRequest, context: Context
    ) -> pb.SystemSharedMemoryUnregisterResponse:
        """Nothing to do."""
        return pb.SystemSharedMemoryUnregisterResponse()

    async def CudaSharedMemoryStatus(
        self, request: pb.CudaSharedMemoryStatusRequest, context: Context
    ) -> pb.CudaSharedMemoryStatusResponse:
        """No region is registered."""
        _check_region(request.name)
        return pb.CudaSharedMemoryStatusResponse()

    async def CudaSharedMemoryRegister(
        self, request: pb.CudaSharedMemoryRegisterRequest, context: Context
    ) -> pb.CudaSharedMemoryRegisterResponse:
        """Not offered."""
        raise Unimplemented("CUDA shared memory is not supported; send the tensors as raw_input_contents")

    async def CudaSharedMemoryUnregister(
        self, request: pb.CudaSharedMemoryUnregisterRequest, context: Context
    ) -> pb.CudaSharedMemoryUnregisterResponse:
        """Nothing to do."""
        return pb.CudaSharedMemoryUnregisterResponse()

    async def TraceSetting(self, request: pb.TraceSettingRequest, context: Context) -> pb.TraceSettingResponse:
        """Not offered."""
        raise Unimplemented("trace settings are not supported")

    async def LogSettings(self, request: pb.LogSettingsRequest, context: Context) -> pb.LogSettingsResponse:
        """Not offered."""
        raise Unimplemented("log settings are not supported")


def _with_timeout(request: pb.ModelInferRequest, until: float) -> float:
    """The earlier of the call's deadline and the request's own `timeout` parameter, microseconds."""
    if "timeout" not in request.parameters:
        return until
    timeout = wire.parameter(request.parameters["timeout"])
    if isinstance(timeout, bool) or not isinstance(timeout, int) or timeout < 0:
        raise InvalidArgument(f"invalid value for 'timeout' parameter, expected microseconds >= 0, got {timeout!r}")
    if timeout == 0:  # as Triton has it: none
        return until
    return min(time.monotonic_ns() + 1e3 * timeout, until)


def _check_repository(name: str) -> None:
    if name:
        raise Unimplemented("'repository_name' specification is not supported")


def _check_region(name: str) -> None:
    if name:
        raise NotFound(f"Unable to find shared memory region: '{name}'")


def _tensor_metadata(spec: TensorSpec) -> pb.ModelMetadataResponse.TensorMetadata:
    return pb.ModelMetadataResponse.TensorMetadata(name=spec.name, datatype=spec.datatype, shape=spec.dims())


def _properties(served: ServedModel) -> dict[str, str]:
    """Read back from what really runs."""
    about = {"backend": served.backend.name, "provider": served.backend.provider, "device": served.backend.device}
    about["tf32"] = str(served.backend.tf32).lower()
    about["verified"] = str(served.verified).lower()
    if served.golden and served.manifest:
        _, about["precision"] = served.manifest.artefacts()[served.backend.file]
        about["golden_max_abs"] = f"{served.golden.max_abs:.3g}"
    return {**about, "reason": served.doubt} if served.doubt else about


def _labels(served: ServedModel) -> dict[str, tuple[str, ...]]:
    """The classes' names, for the outputs that have one score a class."""
    if served.manifest is None:
        return {}
    labels = served.manifest.labels
    return {spec.name: labels for spec in served.backend.outputs if spec.shape[1:] == (len(labels),)}


def _version_policy(policy: VersionPolicy, served: list[ServedModel]) -> pb.ModelVersionPolicy:
    match policy.kind:
        case "latest":
            return pb.ModelVersionPolicy(latest=pb.ModelVersionPolicy.Latest(num_versions=policy.numbers[0]))
        case "specific":
            return pb.ModelVersionPolicy(specific=pb.ModelVersionPolicy.Specific(versions=policy.numbers))
        case "all":
            return pb.ModelVersionPolicy(all=pb.ModelVersionPolicy.All())
        case "labels":  # for which the protocol has no word
            numbers = [int(version.version) for version in served]
            return pb.ModelVersionPolicy(specific=pb.ModelVersionPolicy.Specific(versions=numbers))


def _config(served: ServedModel, policy: pb.ModelVersionPolicy) -> pb.ModelConfig:
    platform, backend = _PLATFORMS[served.backend.name]
    labels = _labels(served)
    skipped = 1 if served.max_batch_size else 0  # the batch axis is not among a configuration's dims
    on_gpu = served.backend.device != "cpu"
    in_force = {**served.backend.settings, **_properties(served)}
    config = pb.ModelConfig(
        name=served.name,
        platform=platform,
        backend=backend,
        max_batch_size=served.max_batch_size,
        version_policy=policy,
        input=[
            pb.ModelInput(
                name=spec.name,
                data_type=_data_type(spec),
                dims=spec.dims()[skipped:],
                format=pb.ModelInput.FORMAT_NCHW if labels and len(spec.shape) == 4 else pb.ModelInput.FORMAT_NONE,
            )
            for spec in served.backend.inputs
        ],
        output=[
            pb.ModelOutput(
                name=spec.name,
                data_type=_data_type(spec),
                dims=spec.dims()[skipped:],
                label_filename="labels.txt" if spec.name in labels else "",
            )
            for spec in served.backend.outputs
        ],
        instance_group=[
            pb.ModelInstanceGroup(
                name=f"{served.name}_0",
                count=served.scheduler.instances,
                kind=pb.ModelInstanceGroup.KIND_GPU if on_gpu else pb.ModelInstanceGroup.KIND_CPU,
                gpus=[int(served.backend.device.partition(":")[2])] if on_gpu else [],
            )
        ],
        default_model_filename=served.backend.file,
        parameters={key: pb.ModelParameter(string_value=value) for key, value in in_force.items()},
    )
    if served.max_batch_size:
        limits = served.scheduler.limits
        config.dynamic_batching.preferred_batch_size.append(limits.batch_rows)
        config.dynamic_batching.max_queue_delay_microseconds = limits.max_delay_us
    return config


def _data_type(spec: TensorSpec) -> str:
    """The configuration's name for a datatype: TYPE_FP32 for FP32, TYPE_STRING for BYTES."""
    return f"TYPE_{'STRING' if spec.datatype == 'BYTES' else spec.datatype}"


def _statistics(served: ServedModel, counted: Statistics) -> pb.ModelStatistics:
    answered = counted.success.count
    return pb.ModelStatistics(
        name=served.name,
        version=served.version,
        last_inference=counted.last_inference_ms,
        inference_count=counted.inference_count,
        execution_count=counted.execution_count,
        inference_stats=pb.InferStatistics(
            success=pb.StatisticDuration(count=answered, ns=counted.success.ns),
            fail=_duration(counted.fail),
            queue=pb.StatisticDuration(count=answered, ns=counted.queue.ns),
            compute_input=pb.StatisticDuration(count=answered, ns=counted.compute_input_ns),
            compute_infer=pb.StatisticDuration(count=answered, ns=counted.compute_infer_ns),
            compute_output=pb.StatisticDuration(count=answered, ns=counted.compute_output_ns),
        ),
        batch_stats=[
            pb.InferBatchStatistics(
                batch_size=rows,
                compute_input=_duration(batch.compute_input),
                compute_infer=_duration(batch.compute_infer),
                compute_output=_duration(batch.compute_output),
            )
            for rows, batch in sorted(counted.batches.items())
        ],
    )


def _duration(duration: Duration) -> pb.StatisticDuration:
    return pb.StatisticDuration(count=duration.count, ns=duration.ns)
