"""A version on a running server behind the `Backend` protocol, over the Open Inference Protocol.

What it runs is what the server says of itself, as read back there from the running session.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType
from typing import Any

import grpc

from protos import open_inference as pb
from serving.client import DEFAULT_TIMEOUT_S, NO_CREDENTIALS, open_channel
from serving.credentials import Credentials
from serving.errors import NotFound, ParityserveError, Unavailable, from_status
from serving.tensors import Array, Origin, TensorSpec, decode, encode

_BATCH = "batch"  # what an axis of any length is called here: the protocol has -1 for it


class RemoteBackend:
    """One version of one model on a server; close it, or use it as a context manager."""

    def __init__(
        self,
        target: str,
        model: str,
        version: str,
        credentials: Credentials = NO_CREDENTIALS,
        timeout_s: float = DEFAULT_TIMEOUT_S,
    ) -> None:
        """Connect to `target`, host:port, and ask what it runs. Each call fails after `timeout_s` seconds.

        Raises:
            Unavailable: the server cannot be reached.
            NotFound: it does not serve this version now, or does not say what runs it.
            InvalidArgument: the credentials are incomplete, or a token would be sent unencrypted.
            ParityserveError: it answered with another error.
            OSError: a file of the credentials cannot be read.
        """
        self.target = target
        self._model, self._version = model, version
        self._timeout_s = timeout_s
        self._metadata = credentials.metadata(target)
        self._channel = open_channel(target, credentials)
        try:
            self._read()
        except BaseException:
            self.close()
            raise
        self._infer = self._method("ModelInfer")

    def _read(self) -> None:
        try:
            self._call("ServerLive", pb.ServerLiveRequest())
        except Unavailable as error:
            raise Unavailable(
                f"{self.target}: no server answers ({error}); start one with python -m serving serve, or see --server"
            ) from error
        about = {"name": self._model, "version": self._version}
        try:
            config = self._call("ModelConfig", pb.ModelConfigRequest(**about)).config
            metadata = self._call("ModelMetadata", pb.ModelMetadataRequest(**about))
        except (NotFound, Unavailable) as error:
            raise NotFound(
                f"{self.target} does not serve {self._model} version {self._version}: {error}; give that server this "
                f"version, as with --version-policy specific:{self._version}, or compare the one that it serves"
            ) from error
        said = dict(metadata.properties)
        missing = [name for name in ("backend", "provider", "device") if not said.get(name)]
        if missing or not config.default_model_filename:
            raise NotFound(
                f"{self.target} does not say what runs {self._model}: no {', '.join(missing) or 'file name'} in its "
                "metadata; want a server of parityserve"
            )
        self.name, self.provider, self.device = said["backend"], said["provider"], said["device"]
        self.tf32 = said.get("tf32") == "true"
        self.settings: Mapping[str, str] = {name: value.string_value for name, value in config.parameters.items()}
        self.file: str = config.default_model_filename
        self.max_batch_size: int = config.max_batch_size
        self.inputs = tuple(map(_spec, metadata.inputs))
        self.outputs = tuple(map(_spec, metadata.outputs))

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """As `Backend.run`, through the server.

        Raises:
            ParityserveError: it refused the request or answered from another version.
        """
        request = pb.ModelInferRequest(model_name=self._model, model_version=self._version)
        for spec in self.inputs:
            array = inputs[spec.name]
            request.inputs.add(name=spec.name, datatype=spec.datatype, shape=array.shape)
            request.raw_input_contents.append(encode(array, spec.datatype))
        response = self._ask(self._infer, request)
        if response.model_version != self._version:
            raise ParityserveError(f"{self.target} answered from version {response.model_version}, not {self._version}")
        return {
            tensor.name: decode(raw, tensor.datatype, tuple(tensor.shape), Origin("output", tensor.name, self._model))
            for tensor, raw in zip(response.outputs, response.raw_output_contents, strict=True)
        }

    def _method(self, name: str) -> Any:
        rpc = pb.RPCS[name]
        return self._channel.unary_unary(
            rpc.path,
            request_serializer=rpc.request.SerializeToString,
            response_deserializer=rpc.response.FromString,
        )

    def _call(self, name: str, request: Any) -> Any:
        return self._ask(self._method(name), request)

    def _ask(self, method: Any, request: Any) -> Any:
        try:
            return method(request, timeout=self._timeout_s, metadata=self._metadata)
        except grpc.RpcError as error:
            raise from_status(error.code(), error.details() or "") from error

    def close(self) -> None:
        """Close the connection."""
        self._channel.close()

    def __enter__(self) -> RemoteBackend:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _spec(tensor: pb.ModelMetadataResponse.TensorMetadata) -> TensorSpec:
    shape = tuple(_BATCH if axis < 0 else axis for axis in tensor.shape)
    return TensorSpec(name=tensor.name, datatype=tensor.datatype, shape=shape)
